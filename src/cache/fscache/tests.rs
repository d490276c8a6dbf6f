//! The directory: what is counted is what is there.

use super::*;
use crate::cache::disk::RealDisk;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

mod traces;

pub(super) fn id(n: u64) -> ObjectId {
    ObjectId { epoch: crate::format::Epoch(1), counter: n }
}

/// What `du` shows, in bytes.
fn du(dir: &Path) -> u64 {
    let mut sum = fs::symlink_metadata(dir).unwrap().blocks() * 512;
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        sum += match entry.file_type().unwrap().is_dir() {
            true => du(&path),
            false => fs::symlink_metadata(&path).unwrap().blocks() * 512,
        };
    }
    sum
}

struct Site {
    dir: tempfile::TempDir,
    cache: Arc<Fscache>,
    max: u64,
}

fn user(name: &str) -> Arc<str> {
    Arc::from(name)
}

impl Site {
    fn new(max: u64) -> Site {
        let dir = tempfile::tempdir().unwrap();
        let cache = Site::open(dir.path(), max);
        Site { dir, cache, max }
    }

    fn open(dir: &Path, max: u64) -> Arc<Fscache> {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        Fscache::open(&disk, &[Place { path: dir.join("c"), max }]).unwrap()
    }

    fn again(&mut self) {
        self.cache = Site::open(self.dir.path(), self.max);
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("c")
    }

    fn put(&self, who: &str, n: u64, size: usize, arrival: Arrival) -> Option<Arc<Cached>> {
        let room = self.cache.reserve(&user(who), id(n), size as u64, arrival)?;
        room.create().unwrap().write_all_at(&vec![n as u8; size], 0).unwrap();
        let copy = self.cache.commit(room).unwrap();
        self.bounded();
        Some(copy)
    }

    fn has(&self, who: &str, n: u64, size: u64) -> bool {
        self.cache.get(&user(who), id(n), size).is_some()
    }

    fn usage(&self) -> FscacheUsage {
        self.cache.usage().remove(0)
    }

    /// The bound holds as seen from outside, and the books say no less than what is there.
    fn bounded(&self) {
        let (seen, usage) = (du(&self.root()), self.usage());
        assert!(seen <= usage.used, "du says {seen}, the books {usage:?}");
        assert!(usage.used <= self.max, "{usage:?}");
    }
}

#[test]
fn the_bound_holds_as_du_sees_it_whatever_comes() {
    let site = Site::new(1 << 20);
    let mut open = Vec::new();
    let mut streamed = 0;
    for n in 0..600u64 {
        // Small and large mails of many users, some of them kept open for a while.
        let size = [10, 4096, 5000, 70_000, 300_000, 2_000_000][n as usize * 7 % 6];
        let arrival = [Arrival::Read, Arrival::Delivered, Arrival::Ahead][n as usize % 3];
        match site.put(&format!("u{}", n % 50), n, size, arrival) {
            Some(copy) if n % 5 == 0 => open.push(copy),
            Some(_) => {}
            None => streamed += 1,
        }
        if n % 40 == 0 {
            open.clear();
        }
        site.bounded();
    }
    assert!(streamed >= 100, "what is larger than the cache found room");
    let usage = site.usage();
    assert!(usage.used > site.max / 2 && usage.evictions > 100, "{usage:?}");
    drop(open);
    // Nothing is left over once all is removed.
    site.cache.clean();
    let usage = site.usage();
    assert_eq!((usage.files, usage.pinned, usage.reserved), (0, 0, 0));
    assert_eq!(
        usage.used,
        books::BASE,
        "{:?}",
        fs::read_dir(site.root()).unwrap().collect::<Vec<_>>()
    );
}

#[test]
fn what_is_open_counts_until_it_is_closed() {
    let site = Site::new(1 << 20);
    let copy = site.put("u", 1, 600_000, Arrival::Read).unwrap();
    assert!(site.put("u", 2, 600_000, Arrival::Read).is_none(), "the first is open");
    site.cache.remove(&user("u"), id(1));
    assert!(!site.has("u", 1, 600_000));
    assert!(site.usage().used > 600_000);
    assert!(site.put("u", 2, 600_000, Arrival::Read).is_none(), "the first is still open");
    assert_eq!(copy.read(599_990, 10).unwrap(), [1; 10]);
    drop(copy);
    assert!(site.put("u", 2, 600_000, Arrival::Read).is_some());
}

#[test]
fn a_reservation_that_comes_to_nothing_is_given_back() {
    let site = Site::new(1 << 20);
    let before = site.usage();
    let room = site.cache.reserve(&user("u"), id(1), 500_000, Arrival::Read).unwrap();
    room.create().unwrap().write_all_at(&[1; 100_000], 0).unwrap();
    assert!(site.usage().used >= 500_000);
    assert!(site.cache.reserve(&user("u"), id(2), 600_000, Arrival::Read).is_none());
    drop(room);
    assert_eq!(site.usage(), before);
    assert_eq!(fs::read_dir(site.root().join(".part")).unwrap().count(), 0);
}

#[test]
fn a_new_start_finds_the_copies_and_keeps_the_latest() {
    let mut site = Site::new(4 << 20);
    for n in 0..30 {
        site.put("u", n, 100_000, Arrival::Read);
    }
    let used = site.usage().used;
    site.again();
    assert_eq!((site.usage().files, site.usage().used), (30, used));
    // They are doubtful until somebody looked.
    assert!(!site.has("u", 7, 100_000));
    let file = site.cache.doubtful(&user("u"), id(7)).unwrap();
    assert!(site.cache.vouch(&user("u"), id(7), 100_000, file.stamp().unwrap()).is_some());
    assert!(site.has("u", 7, 100_000));
    // A smaller bound, and rubbish of others.
    fs::write(site.root().join("README"), [0; 5000]).unwrap();
    fs::write(site.root().join(".part/7"), [0; 5000]).unwrap();
    site.max = 1 << 20;
    site.again();
    site.bounded();
    assert!((5..10).contains(&site.usage().files), "{:?}", site.usage());
    assert!(!site.root().join(".part/7").exists() && site.root().join("README").exists());
}

#[test]
fn anything_may_be_removed_and_a_rescan_tells_by_how_much_the_books_were_off() {
    let site = Site::new(4 << 20);
    for n in 0..20 {
        site.put(&format!("u{}", n % 4), n, 50_000, Arrival::Read);
    }
    let right = site.cache.rescan(None, None).unwrap().remove(0);
    assert!(right.was_right() && right.files == 20, "{right:?}");
    let dir_of = |n: u32| {
        let dir = crate::format::key::user_dir(&format!("u{n}"));
        site.root().join(dir)
    };
    // One file, one user's directory, the place for downloads; and a copy from elsewhere.
    fs::remove_file(dir_of(0).join(id(4).to_string())).unwrap();
    fs::remove_dir_all(dir_of(1)).unwrap();
    fs::remove_dir_all(site.root().join(".part")).unwrap();
    fs::write(dir_of(2).join(id(99).to_string()), [9; 10_000]).unwrap();
    fs::write(dir_of(3).join("core"), [9; 5_000]).unwrap();
    let found = site.cache.rescan(None, None).unwrap().remove(0);
    assert_eq!((found.files, found.strange_files), (15, 1), "{found:?}");
    assert_eq!(found.missing, 6 * books::charge(50_000, 4096));
    assert_eq!(found.missed, books::charge(10_000, 4096) + books::charge(5_000, 4096));
    assert_eq!(found.off_by(), found.missed as i64 - found.missing as i64);
    assert!(!found.was_right());
    assert!(site.cache.rescan(None, None).unwrap()[0].was_right());
    site.bounded();
    for n in 100..120 {
        site.put("u1", n, 50_000, Arrival::Read).unwrap();
    }
    // Without a rescan, everything at once.
    fs::remove_dir_all(site.root()).unwrap();
    assert!(!site.has("u1", 105, 50_000));
    assert!(site.put("u1", 105, 50_000, Arrival::Read).is_some());
    assert!(site.has("u1", 105, 50_000));
    site.cache.rescan(None, None).unwrap();
    assert_eq!(site.usage().files, 1);
    site.bounded();
}

#[test]
fn a_rescan_removes_what_is_older_than_asked_for() {
    let site = Site::new(4 << 20);
    for n in 0..4 {
        site.put("u", n, 5_000, Arrival::Read);
    }
    let old = site.root().join(crate::format::key::user_dir("u")).join(id(2).to_string());
    let time = fs::FileTimes::new()
        .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000));
    fs::File::options().write(true).open(&old).unwrap().set_times(time).unwrap();
    let report = site.cache.rescan(Some(&site.root()), Some(2_000)).unwrap().remove(0);
    assert_eq!((report.removed_files, report.files), (1, 3), "{report:?}");
    assert!(report.was_right() && !old.exists());
    assert!(site.cache.rescan(Some(Path::new("/elsewhere")), None).is_err());
}

#[test]
fn a_copy_can_be_used_before_it_is_opened() {
    let site = Site::new(4 << 20);
    drop(site.put("u", 1, 5_000, Arrival::Read));
    let unopened = |n, size| site.cache.use_unopened(&user("u"), id(n), size);
    assert!(unopened(1, 5_000) && !unopened(1, 4_999) && !unopened(2, 5_000));
    // Of another size than the mail: it was no copy of that.
    assert!(!unopened(1, 5_000));
    drop(site.put("u", 1, 5_000, Arrival::Read));
    let hits = site.usage().hits;
    assert!(unopened(1, 5_000));
    assert_eq!((site.usage().pinned, site.usage().hits), (0, hits + 1));
    let copy = site.cache.reopen(&user("u"), id(1), 5_000);
    assert!(copy.is_some() && site.usage().pinned > 0);
    assert_eq!(site.usage().hits, hits + 1, "one use");
}

#[test]
fn altered_copies_are_not_shown() {
    let site = Site::new(4 << 20);
    for n in 0..3 {
        site.put("u", n, 5_000, Arrival::Read);
    }
    let path = |n| site.root().join(crate::format::key::user_dir("u")).join(id(n).to_string());
    fs::write(path(0), [7; 5_000]).unwrap();
    fs::write(path(1), [7; 4_000]).unwrap();
    fs::remove_file(path(2)).unwrap();
    site.put("u", 3, 5_000, Arrival::Read);
    fs::remove_file(path(3)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", path(3)).unwrap();
    let unopened = |n| site.cache.use_unopened(&user("u"), id(n), 5_000);
    assert!((0..2).all(|n| !site.has("u", n, 5_000)));
    assert!((2..4).all(|n| !unopened(n) && !site.has("u", n, 5_000)));
    assert!(!site.usage().failing && fs::symlink_metadata(path(3)).is_err());
    assert!(
        site.cache.doubtful(&user("u"), id(0)).is_some(),
        "of the right length: to be looked at"
    );
    assert!(site.cache.doubtful(&user("u"), id(1)).is_none());
}

#[test]
fn users_are_split_and_one_disk_that_fails_leaves_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let places: Vec<Place> =
        (0..4).map(|n| Place { path: dir.path().join(format!("c{n}")), max: 1 << 20 }).collect();
    // A file where a directory should be: one that cannot be used.
    fs::write(&places[2].path, b"").unwrap();
    let cache = Fscache::open(&disk, &places).unwrap();
    let mut kept = [0; 4];
    for n in 0..40 {
        let who = user(&format!("user{n}@example.com"));
        let place = place_of(&who, 4) as usize;
        let Some(room) = cache.reserve(&who, id(n), 1_000, Arrival::Read) else {
            assert_eq!(place, 2);
            continue;
        };
        assert!(room.path.starts_with(&places[place].path));
        room.create().unwrap().write_all_at(&[1; 1_000], 0).unwrap();
        cache.commit(room).unwrap();
        assert!(cache.get(&who, id(n), 1_000).is_some());
        kept[place] += 1;
    }
    assert!(kept[2] == 0 && [kept[0], kept[1], kept[3]].iter().all(|n| *n > 3), "{kept:?}");
    let failing: Vec<bool> = cache.usage().iter().map(|u| u.failing).collect();
    assert_eq!(failing, [false, false, true, false]);
    assert_eq!(cache.rescan(None, None).unwrap().len(), 3);
    assert!(cache.rescan(Some(&places[2].path), None).is_err());
    // Split another way, what lies where nobody looks is removed.
    drop(cache);
    let two = Fscache::open(&disk, &places[..2]).unwrap();
    for n in 0..40 {
        let who = user(&format!("user{n}@example.com"));
        let place = place_of(&who, 4);
        let stays = place < 2 && place == place_of(&who, 2);
        assert_eq!(two.doubtful(&who, id(n)).is_some(), stays);
    }
    let files: u64 = two.usage().iter().map(|u| u.files).sum();
    assert_eq!(files, kept[0] + kept[1]);
}
