use super::*;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("nfs/user@x.org/indexes")).unwrap();
        Site { dir }
    }

    fn index(&self) -> PathBuf {
        self.dir.path().join("nfs/user@x.org/indexes")
    }

    fn host(&self, name: &str) -> Straight {
        Straight::new(Settings {
            root: self.dir.path().join("nfs"),
            layout: Layout::parse("%u").unwrap(),
            index_dir: vec![b"indexes".to_vec()],
            listindex_root: self.dir.path().join(format!("shm-{name}/list")),
            listindex_layout: Layout::parse("%u").unwrap(),
            host: Host { name: name.into(), boot: "boot".into() },
            login_idle: Duration::from_millis(50),
            migration: false,
            ttl: Duration::from_secs(1),
            max_known: 1000,
        })
        .unwrap()
    }

    fn local(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("shm-{name}/list/user@x.org"))
    }
}

fn me() -> Who {
    Who::me()
}

fn walk(fs: &Straight, path: &str) -> Answer<u64> {
    path.split('/').try_fold(ROOT, |at, name| Ok(fs.lookup(me(), at, name.as_bytes())?.id))
}

const INDEX: &str = "user@x.org/indexes";

fn create(fs: &Straight, dir: u64, name: &str, text: &str) -> u64 {
    let (found, handle, _) =
        fs.create(me(), dir, name.as_bytes(), 0o600, libc::O_RDWR | libc::O_EXCL).unwrap();
    assert_eq!(fs.write(handle, 0, text.as_bytes()).unwrap() as usize, text.len());
    fs.flush(handle, 7).unwrap();
    fs.release(handle);
    found.id
}

fn names(fs: &Straight, dir: u64) -> Vec<String> {
    let handle = fs.opendir(me(), dir).unwrap();
    let mut names = Vec::new();
    let mut offset = 0;
    // One name at a time, as from a caller with a small buffer.
    loop {
        let mut taken = None;
        fs.readdir(handle, offset, |entry| {
            taken = taken.take().or_else(|| Some(entry.clone()));
            false
        })
        .unwrap();
        let Some(entry) = taken else { break };
        offset = entry.next;
        names.push(String::from_utf8(entry.name).unwrap());
    }
    fs.releasedir(handle);
    names.retain(|name| name != "." && name != "..");
    names.sort();
    names
}

fn wait_idle(fs: &Straight) {
    std::thread::sleep(Duration::from_millis(80));
    fs.users().tick(false);
}

#[test]
fn the_list_index_is_here_and_all_else_on_nfs() {
    let site = Site::new();
    let fs = site.host("a");
    let index = walk(&fs, INDEX).unwrap();
    create(&fs, index, "dovecot.list.index.log", "list");
    create(&fs, index, "dovecot.index.log", "mail");
    assert_eq!(std::fs::read(site.local("a").join("dovecot.list.index.log")).unwrap(), b"list");
    assert_eq!(std::fs::read(site.index().join("dovecot.index.log")).unwrap(), b"mail");
    assert!(!site.index().join("dovecot.list.index.log").exists());
    assert_eq!(names(&fs, index), [".lasthost", "dovecot.index.log", "dovecot.list.index.log"]);
    // As Dovecot rewrites it.
    create(&fs, index, "dovecot.list.index.tmp", "new");
    let (from, to) = (&b"dovecot.list.index.tmp"[..], &b"dovecot.list.index"[..]);
    fs.rename(me(), (index, from), (index, to), 0).unwrap();
    assert_eq!(std::fs::read(site.local("a").join("dovecot.list.index")).unwrap(), b"new");
    // From one place to the other nothing moves.
    assert_eq!(fs.rename(me(), (index, to), (index, b"elsewhere"), 0), Err(Errno::EXDEV));
    let list = walk(&fs, "user@x.org/indexes/dovecot.list.index").unwrap();
    assert_eq!(fs.link(me(), list, index, b"elsewhere").unwrap_err(), Errno::EXDEV);
    fs.link(me(), list, index, b"dovecot.list.index.2").unwrap();
    fs.unlink(me(), index, b"dovecot.list.index").unwrap();
    assert_eq!(fs.lookup(me(), index, b"dovecot.list.index").unwrap_err(), Errno::ENOENT);
    // Only in the INDEX directory.
    let user = walk(&fs, "user@x.org").unwrap();
    create(&fs, user, "dovecot.list.index", "elsewhere");
    assert!(site.dir.path().join("nfs/user@x.org/dovecot.list.index").exists());
}

#[test]
fn what_lies_on_nfs_under_those_names_is_not_shown() {
    let site = Site::new();
    std::fs::write(site.index().join("dovecot.list.index"), "of another time").unwrap();
    let fs = site.host("a");
    let index = walk(&fs, INDEX).unwrap();
    assert_eq!(fs.lookup(me(), index, b"dovecot.list.index").unwrap_err(), Errno::ENOENT);
    assert_eq!(names(&fs, index), [".lasthost"]);
}

#[test]
fn a_session_begins_with_the_check_and_ends_with_silence() {
    let site = Site::new();
    let (a, b) = (site.host("a"), site.host("b"));
    let at = |fs: &Straight| walk(fs, INDEX).unwrap();
    create(&a, at(&a), "dovecot.list.index", "1");
    wait_idle(&a);
    assert!(a.lookup(me(), at(&a), b"dovecot.list.index").is_ok(), "kept by a");
    assert_eq!((a.users().counts().kept, a.users().counts().dropped), (1, 1));
    wait_idle(&a);
    at(&b);
    wait_idle(&b);
    let index = at(&a);
    assert_eq!(a.lookup(me(), index, b"dovecot.list.index").unwrap_err(), Errno::ENOENT);
    assert_eq!((a.users().counts().kept, a.users().counts().dropped), (1, 2));
    assert_eq!(std::fs::read_to_string(site.index().join(".lasthost")).unwrap(), "a\n");
    // Any access keeps a session: no further check.
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(10));
        a.getattr(index, None).unwrap();
        a.users().tick(false);
    }
    assert_eq!((a.users().counts().kept, a.users().counts().dropped), (1, 2));
}

#[test]
fn a_planted_directory_costs_the_list_index_and_nothing_else() {
    if me().uid != 0 {
        return;
    }
    let site = Site::new();
    let fs = site.host("a");
    std::fs::create_dir_all(site.dir.path().join("elsewhere")).unwrap();
    std::fs::create_dir_all(site.dir.path().join("shm-a/list")).unwrap();
    std::os::unix::fs::symlink(site.dir.path().join("elsewhere"), site.local("a")).unwrap();
    std::os::unix::fs::lchown(site.local("a"), Some(999), Some(999)).unwrap();
    let index = walk(&fs, INDEX).unwrap();
    assert_eq!(fs.lookup(me(), index, b"dovecot.list.index").unwrap_err(), Errno::ENOENT);
    let made = fs.create(me(), index, b"dovecot.list.index", 0o600, libc::O_RDWR);
    assert_eq!(made.map(drop).unwrap_err(), Errno::ENOSPC);
    create(&fs, index, "dovecot.index.log", "mail");
    assert_eq!(fs.users().counts().failed, 1);
    assert_eq!(std::fs::read_dir(site.dir.path().join("elsewhere")).unwrap().count(), 0);
}

#[test]
fn callers_own_what_they_make_and_may_not_what_they_may_not() {
    if me().uid != 0 {
        return;
    }
    let site = Site::new();
    let vmail = Who { uid: 4321, gid: 4322 };
    for path in ["nfs/user@x.org", "nfs/user@x.org/indexes"] {
        let path = site.dir.path().join(path);
        std::os::unix::fs::chown(path, Some(vmail.uid), Some(vmail.gid)).unwrap();
    }
    let fs = site.host("a");
    let index = walk(&fs, INDEX).unwrap();
    let owner = |path: &Path| {
        std::fs::metadata(path).map(|m| (m.uid(), m.gid(), m.mode() & 0o777)).unwrap()
    };
    let flags = libc::O_RDWR | libc::O_EXCL;
    for name in ["dovecot.index", "dovecot.list.index"] {
        fs.create(vmail, index, name.as_bytes(), 0o640, flags).unwrap();
    }
    fs.mkdir(vmail, index, b"dir", 0o750).unwrap();
    assert_eq!(owner(&site.index().join("dovecot.index")), (4321, 4322, 0o640));
    assert_eq!(owner(&site.local("a").join("dovecot.list.index")), (4321, 4322, 0o640));
    assert_eq!(owner(&site.local("a")), (4321, 4322, 0o700));
    assert_eq!(owner(&site.index().join("dir")), (4321, 4322, 0o750));
    assert_eq!(owner(&site.index().join(".lasthost")).0, 4321, "the server may squash root");
    let other = Who { uid: 5000, gid: 5000 };
    assert!(fs.create(other, index, b"x", 0o600, flags).is_err());
    let mail = walk(&fs, "user@x.org/indexes/dovecot.index").unwrap();
    assert_eq!(fs.open(other, mail, libc::O_RDONLY).map(drop).unwrap_err(), Errno::EACCES);
    let chmod = Changes { mode: Some(0o777), ..Changes::default() };
    assert_eq!(fs.setattr(other, mail, None, chmod).map(drop).unwrap_err(), Errno::EPERM);
    fs.setattr(vmail, mail, None, Changes { mode: Some(0o600), size: Some(5), ..chmod }).unwrap();
    assert_eq!(std::fs::metadata(site.index().join("dovecot.index")).unwrap().len(), 5);
}

#[test]
fn what_another_host_replaced_is_looked_up_again() {
    let site = Site::new();
    let fs = site.host("a");
    let index = walk(&fs, INDEX).unwrap();
    let id = create(&fs, index, "f", "old");
    std::fs::write(site.index().join("g"), "new").unwrap();
    std::fs::rename(site.index().join("g"), site.index().join("f")).unwrap();
    assert_eq!(fs.open(me(), id, libc::O_RDONLY).map(drop).unwrap_err(), Errno::ESTALE);
    let id = fs.lookup(me(), index, b"f").unwrap().id;
    let (handle, _) = fs.open(me(), id, libc::O_RDONLY).unwrap();
    assert_eq!(fs.read(handle, 0, 100).unwrap(), b"new");
}

#[test]
fn locks_of_two_mounts_exclude_each_other_until_flush() {
    use super::locks::Range;
    let site = Site::new();
    let (a, b) = (site.host("a"), site.host("b"));
    let index = walk(&a, INDEX).unwrap();
    create(&a, index, "f", "text");
    let open = |fs: &Straight| {
        let id = walk(fs, "user@x.org/indexes/f").unwrap();
        fs.open(me(), id, libc::O_RDWR).unwrap().0
    };
    let (on_a, twice, on_b) = (open(&a), open(&a), open(&b));
    let all = Range { start: 0, end: i64::MAX as u64, kind: libc::F_WRLCK };
    assert!(a.lock(me(), on_a, 1, all).unwrap());
    assert!(!b.lock(me(), on_b, 1, all).unwrap());
    assert_eq!(b.test_lock(on_b, 1, all).unwrap(), Some(all));
    assert_eq!(a.test_lock(on_a, 1, all).unwrap(), None);
    // Closing any of its descriptors takes a process's locks, and no other's.
    a.flush(twice, 2).unwrap();
    assert!(!b.lock(me(), on_b, 1, all).unwrap());
    a.flush(twice, 1).unwrap();
    assert!(b.lock(me(), on_b, 1, all).unwrap());
    assert!(!a.lock(me(), on_a, 1, all).unwrap());
    b.release(on_b);
    assert!(a.lock(me(), on_a, 1, all).unwrap());
}

#[test]
fn the_kernel_is_asked_to_forget_and_numbers_are_given_back() {
    let site = Site::new();
    let mut fs = site.host("a");
    fs.settings.max_known = 20;
    let index = walk(&fs, INDEX).unwrap();
    for n in 0..40 {
        std::fs::write(site.index().join(format!("f{n}")), "").unwrap();
    }
    let found: Vec<u64> =
        (0..40).map(|n| fs.lookup(me(), index, format!("f{n}").as_bytes()).unwrap().id).collect();
    assert_eq!(fs.known(), 43);
    assert!(fs.crowded().iter().any(|(parent, name)| *parent == index && name == b"f0"));
    found.iter().for_each(|id| fs.forget(*id, 1));
    assert_eq!(fs.known(), 3);
    assert!(fs.crowded().is_empty());
    assert_eq!(fs.getattr(found[0], None).map(drop).unwrap_err(), Errno::ESTALE);
}
