//! The local disk fails under a running mount: full, read-only, emptied or altered by hand.
//!
//! Each directory of the daemon lies on a small file system of its own. Whatever happens to one of
//! them, a delivery is acknowledged or deferred, a mail that can be read is the right one,
//! nothing acknowledged is lost, and all is well again once the disk is, without a restart.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::messages::{Message, identify, message};
use support::mount::Mount;
use support::mta::{self, Refusal};

/// The daemon's directories.
const PLACES: [&str; 4] = ["state", "metacache", "fscache", "staging"];

/// A small file system in memory.
struct Small {
    path: PathBuf,
}

impl Small {
    fn new(path: PathBuf) -> Small {
        fs::create_dir_all(&path).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=8m")).unwrap();
        Small { path }
    }

    /// Until nothing fits any more.
    fn fill(&self) {
        let mut file = fs::File::create(self.path.join("filler")).unwrap();
        for size in [1 << 16, 1 << 12, 1] {
            while file.write_all(&vec![7; size]).is_ok() {}
        }
    }

    fn empty(&self) {
        fs::remove_file(self.path.join("filler")).unwrap();
    }

    /// False if somebody has a file of it open for writing.
    fn read_only(&self, yes: bool) -> bool {
        let flags = if yes { MsFlags::MS_RDONLY } else { MsFlags::empty() };
        let none: Option<&str> = None;
        mount(none, &self.path, none, MsFlags::MS_REMOUNT | flags, none).is_ok()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// A mount whose directories are small file systems, and what was acknowledged on it.
struct World {
    // Before the file systems below it.
    mount: Mount,
    places: BTreeMap<&'static str, Small>,
    _dir: tempfile::TempDir,
    delivered: Vec<Message>,
    /// Their sender tries again; they may be there all the same.
    deferred: Vec<Message>,
    number: usize,
}

impl World {
    fn new() -> World {
        let dir = support::scratch("local");
        let places: BTreeMap<_, _> =
            PLACES.iter().map(|name| (*name, Small::new(dir.path().join(name)))).collect();
        let path = |name: &str| places[name].path.display().to_string();
        let paths = format!(
            "fscache.path={},staging.path={},metacache.path={},store_limits.delivery_timeout=2s",
            path("fscache"),
            path("staging"),
            path("metacache"),
        );
        let mut mount =
            Mount::on_directory().state_in(&places["state"].path).option(&["-o", &paths]);
        mount.mount().unwrap();
        let mut world = World {
            mount,
            places,
            _dir: dir,
            delivered: Vec::new(),
            deferred: Vec::new(),
            number: 0,
        };
        for _ in 0..4 {
            world.deliver().unwrap();
        }
        fs::create_dir(world.home().join("index")).unwrap();
        fs::write(world.index(), "kept").unwrap();
        world
    }

    fn home(&self) -> PathBuf {
        self.mount.root().join("someone")
    }

    fn index(&self) -> PathBuf {
        self.home().join("index/notes")
    }

    fn maildir(&self) -> PathBuf {
        self.home().join("mail")
    }

    fn deliver(&mut self) -> Result<(), Refusal> {
        self.number += 1;
        let mail = message(3, &format!("mail-{}", self.number));
        let done = mta::deliver(&self.maildir(), &mail, true);
        if done.is_ok() { &mut self.delivered } else { &mut self.deferred }.push(mail);
        done
    }

    /// Deliveries under the fault: how many went through. None may be bounced.
    fn deliveries(&mut self, what: &str) -> usize {
        let mut through = 0;
        for _ in 0..4 {
            match self.deliver() {
                Ok(()) => through += 1,
                Err(refusal) => assert!(refusal.deferred(), "{what}: {refusal}"),
            }
        }
        through
    }

    /// Every mail that can be read is right; gives how many cannot, and why.
    fn read_all(&self, what: &str) -> Vec<String> {
        let mut refused = Vec::new();
        let mut found = 0;
        for sub in ["new", "cur"] {
            for entry in fs::read_dir(self.maildir().join(sub)).unwrap() {
                let path = entry.unwrap().path();
                match fs::read(&path) {
                    Ok(bytes) if self.deferred.iter().any(|mail| lf(mail) == bytes) => continue,
                    Ok(bytes) => {
                        let right = self.delivered.iter().any(|mail| lf(mail) == bytes);
                        let (id, _) = identify(&bytes);
                        assert!(right, "{what}: {path:?}: {} bytes of {id:?}", bytes.len());
                    }
                    Err(e) => refused.push(e.to_string()),
                }
                found += 1;
            }
        }
        assert_eq!(found, self.delivered.len(), "{what}: names");
        refused
    }

    /// A flag change there and back.
    fn flag(&self) -> Result<(), i32> {
        let sub = self.maildir().join("new");
        let Some(entry) = fs::read_dir(&sub).unwrap().next() else { return Ok(()) };
        let from = entry.unwrap().path();
        let to = self.maildir().join("cur").join(format!("{}:2,S", file_name(&from)));
        fs::rename(&from, &to).map_err(|e| e.raw_os_error().unwrap_or(0))?;
        fs::rename(&to, &from).map_err(|e| e.raw_os_error().unwrap_or(0))
    }

    /// As if the caches had never been read: the kernel forgets, too.
    fn forget_copies(&self) {
        let fscache = &self.places["fscache"].path;
        for entry in fs::read_dir(fscache).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() && entry.file_name() != ".part" {
                fs::remove_dir_all(entry.path()).unwrap();
            }
        }
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    }

    /// The disk is well again: so is everything, within a short time.
    fn recovers(&mut self, what: &str) {
        let start = Instant::now();
        while let Err(refusal) = self.deliver() {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}: {refusal}");
        }
        assert_eq!(self.read_all(what), [""; 0], "{what}: reading");
        assert_eq!(self.flag(), Ok(()), "{what}: a flag");
        assert_eq!(fs::read(self.index()).unwrap(), b"kept", "{what}: an index file");
        fs::write(self.index(), "kept").unwrap_or_else(|e| panic!("{what}: {e}"));
        let (good, text) = self.mount.vmailfs(&["metacache", "flushall"]).unwrap();
        assert!(good, "{what}: flush: {text}");
    }

    /// Nothing acknowledged is lost, here and elsewhere.
    fn survives(mut self, what: &str) {
        self.mount.kill9();
        self.mount.mount().unwrap();
        assert_eq!(
            self.read_all(&format!("{what}, after a crash")),
            [""; 0],
            "{what}: after a crash"
        );
        self.mount.kill9();
        for place in self.places.values() {
            clear(&place.path);
        }
        self.mount.is_fresh();
        self.mount.mount().unwrap();
        assert_eq!(self.read_all(&format!("{what}, fresh")), [""; 0], "{what}: on a fresh machine");
        assert_eq!(fs::read(self.index()).unwrap(), b"kept", "{what}: index on a fresh machine");
        self.mount.umount().unwrap();
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

fn lf(mail: &Message) -> Vec<u8> {
    mail.bytes.iter().copied().filter(|&c| c != b'\r').collect()
}

/// Errnos that a flag change may get: none that a server takes for an answer.
fn put_off(what: &str, flag: Result<(), i32>) {
    let fine = [Ok(()), Err(libc::ENOSPC), Err(libc::EAGAIN), Err(libc::ESTALE)].contains(&flag);
    assert!(fine, "{what}: a flag: {flag:?}");
}

/// What holds while one place is spoilt and the others are well.
fn while_spoilt(world: &mut World, place: &str, what: &str) {
    let through = world.deliveries(what);
    put_off(what, world.flag());
    let refused = world.read_all(what);
    assert_eq!(refused, [""; 0], "{what}: cached");
    world.forget_copies_unless(place);
    let refused = world.read_all(what);
    assert_eq!(refused, [""; 0], "{what}: not cached");
    if place == "fscache" {
        assert_eq!(through, 4, "{what}: a mail needs no place in the cache to be safe");
        assert_eq!(world.flag(), Ok(()), "{what}");
    }
    println!("{what}: {through} of 4 deliveries went through");
}

impl World {
    fn forget_copies_unless(&self, spoilt: &str) {
        if spoilt != "fscache" {
            self.forget_copies();
        } else {
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        }
    }
}

#[test]
fn a_full_disk_defers_and_loses_nothing() {
    for place in PLACES {
        let what = format!("{place} full");
        let mut world = World::new();
        if place == "fscache" {
            world.forget_copies();
        }
        world.places[place].fill();
        while_spoilt(&mut world, place, &what);
        for ask in [&["fsck", "-u", "someone"][..], &["user", "history", "-u", "someone"]] {
            let (code, out, err) = world.mount.exit_of(ask).unwrap();
            let text = out + &err;
            // What cannot be flushed is told, and what is in the store is shown all the same.
            let wanted = if place == "state" && ask[0] == "fsck" { 75 } else { 0 };
            assert_eq!(code, Some(wanted), "{what}: {ask:?}: {text}");
            let behind = text.contains("changes since the last flush");
            assert_eq!(behind, place == "state", "{what}: {ask:?}: {text}");
        }
        world.places[place].empty();
        world.recovers(&what);
        world.survives(&what);
    }
}

#[test]
fn a_read_only_disk_defers_and_loses_nothing() {
    // Journals and index files are open for writing: the kernel leaves them writable.
    for place in ["fscache", "staging"] {
        let what = format!("{place} read-only");
        let mut world = World::new();
        if place == "fscache" {
            world.forget_copies();
        }
        assert!(world.places[place].read_only(true), "{what}");
        while_spoilt(&mut world, place, &what);
        assert!(world.places[place].read_only(false), "{what}");
        world.recovers(&what);
        world.survives(&what);
    }
}

/// Everything below a directory, hidden names included; the way to the daemon stays.
fn clear(dir: &Path) {
    let all = fs::read_dir(dir).unwrap().map(Result::unwrap);
    for entry in all.filter(|entry| entry.file_name() != "admin.sock") {
        let is_dir = entry.file_type().unwrap().is_dir();
        if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }
            .unwrap();
    }
}

/// I7: what an admin removes under the running mount comes back, or was told to nobody.
#[test]
fn i7_a_directory_emptied_under_the_mount() {
    for place in PLACES {
        let what = format!("{place} emptied");
        let mut world = World::new();
        let (good, text) = world.mount.vmailfs(&["metacache", "flushall"]).unwrap();
        assert!(good, "{text}");
        clear(&world.places[place].path);
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        let through = world.deliveries(&what);
        put_off(&what, world.flag());
        assert_eq!(world.read_all(&what), [""; 0], "{what}");
        println!("{what}: {through} of 4 deliveries went through");
        world.recovers(&what);
        if place == "state" {
            world.mount.is_fresh();
        }
        world.survives(&what);
    }
}

/// The cached copies, as they lie in fscache.
fn copies(world: &World) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![world.places["fscache"].path.clone()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let is_dir = entry.file_type().unwrap().is_dir();
            if is_dir { &mut left } else { &mut found }.push(entry.path());
        }
    }
    found
}

/// I7: a cached copy that is not what was published is not shown, whoever changed it when.
#[test]
fn i7_altered_copies_are_not_shown() {
    type Alter = fn(&Path);
    let ways: [(&str, Alter); 5] = [
        ("one byte", |path| {
            let mut bytes = fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("cut", |path| {
            let file = fs::File::options().write(true).open(path).unwrap();
            file.set_len(10).unwrap();
        }),
        ("longer", |path| {
            fs::File::options().append(true).open(path).unwrap().write_all(b"more").unwrap();
        }),
        ("another file", |path| {
            let len = usize::try_from(fs::metadata(path).unwrap().len()).unwrap();
            fs::write(path.with_extension("x"), vec![b'x'; len]).unwrap();
            fs::rename(path.with_extension("x"), path).unwrap();
        }),
        ("a link", |path| {
            fs::remove_file(path).unwrap();
            std::os::unix::fs::symlink("/etc/passwd", path).unwrap();
        }),
    ];
    let mut world = World::new();
    for (what, alter) in ways {
        for restarted in [false, true] {
            let what = format!("{what}, restarted: {restarted}");
            assert_eq!(world.read_all(&what), [""; 0]);
            if restarted {
                world.mount.umount().unwrap();
            }
            let found = copies(&world);
            assert!(found.len() >= world.delivered.len(), "{what}: {found:?}");
            found.iter().for_each(|path| alter(path));
            if restarted {
                world.mount.mount().unwrap();
            }
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
            assert_eq!(world.read_all(&what), [""; 0], "{what}");
        }
    }
    world.mount.umount().unwrap();
}
