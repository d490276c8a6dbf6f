//! The adapter under the real kernel: each test mounts a small file system in memory and uses
//! it through system calls. Needs root and /dev/fuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(missing_debug_implementations)]

mod support;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};

use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use support::fakefs::FakeFs;
use tokio::runtime::Runtime;
use vmailfs::fs::api::{Invalidate, MailFs};
use vmailfs::fuse::mount::{MountError, MountOptions, mount};
use vmailfs::fuse::mounted::{Mounted, UnmountOutcome, Unmounted};
use vmailfs::fuse::stats::Op;

const GRACE: Duration = Duration::from_secs(10);
/// Time enough for what must not happen to happen.
const A_WHILE: Duration = Duration::from_millis(200);

struct Place {
    dir: tempfile::TempDir,
    rt: Runtime,
    fs: Arc<FakeFs>,
    mounted: Option<Mounted>,
}

impl Place {
    fn new() -> Place {
        Place::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut MountOptions)) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let rt = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let fs = FakeFs::new();
        let mut options = MountOptions::new(dir.path());
        options.fsname = "file:///some where/a,b".into();
        change(&mut options);
        let mounted = mount(fs.clone(), rt.handle().clone(), &options).unwrap();
        Place { dir, rt, fs, mounted: Some(mounted) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn mounted(&self) -> &Mounted {
        self.mounted.as_ref().unwrap()
    }

    fn unmount(&mut self, grace: Duration) -> UnmountOutcome {
        self.rt.block_on(self.mounted.take().unwrap().unmount(grace)).unwrap()
    }

    fn ended(&self) -> Result<Result<(), String>, tokio::time::error::Elapsed> {
        self.rt.block_on(async { tokio::time::timeout(GRACE, self.mounted().ended()).await })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.fs.let_go();
        self.mounted.take();
        // Whatever a failed test left at this place.
        while umount2(self.dir.path(), MntFlags::MNT_DETACH).is_ok() {}
    }
}

fn errno<T>(result: io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error.raw_os_error().unwrap(),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Waits until something is so, as the kernel does some things later (RELEASE, FORGET).
fn soon(so: impl FnMut() -> bool) {
    assert!(support::wait_until(Duration::from_secs(60), so), "it did not come about");
}

fn top_of(path: &Path) -> Option<vmailfs::fuse::mountinfo::MountEntry> {
    let mounts = vmailfs::fuse::mountinfo::read().unwrap();
    vmailfs::fuse::mountinfo::top(&mounts, path).cloned()
}

#[test]
fn the_mount_shows_type_source_and_flags() {
    let mut place = Place::new();
    let entry = top_of(place.dir.path()).unwrap();
    assert_eq!(entry.fstype, "fuse.vmailfs");
    assert_eq!(entry.source, "file:///some where/a,b");
    let line = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = line.lines().find(|l| l.contains(place.dir.path().to_str().unwrap())).unwrap();
    for word in ["nosuid", "nodev", "noexec", "noatime", "default_permissions", "allow_other"] {
        assert!(line.contains(word), "{word} in {line}");
    }
    assert_eq!(place.unmount(GRACE), UnmountOutcome { how: Unmounted::Clean, session_over: true });
    assert_eq!(top_of(place.dir.path()), None);
}

#[test]
fn files_are_created_written_and_read() {
    let place = Place::new();
    let path = place.at("file");
    let mut file =
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o640).open(&path).unwrap();
    assert_eq!(errno(File::create_new(&path)), libc::EEXIST);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    file.write_all(b"0123456789").unwrap();
    file.write_all_at(b"xy", 4).unwrap();
    file.write_all_at(b"end", 15).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0123xy6789\0\0\0\0\0end");
    file.set_len(4).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0123");
    file.set_len(6).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 6);
    assert_eq!(fs::read(&path).unwrap(), b"0123\0\0");
    // O_TRUNC goes with the open, not as a change of size before it.
    let changes = place.fs.calls("setattr");
    fs::write(&path, b"new").unwrap();
    assert_eq!(place.fs.calls("setattr"), changes);
    assert_eq!(fs::read(&path).unwrap(), b"new");
    // A large file, in more than one request.
    let large: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    fs::write(&path, &large).unwrap();
    assert_eq!(fs::read(&path).unwrap(), large);
    nix::fcntl::posix_fallocate(&file, 0, 4_000_000).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 4_000_000);
}

#[test]
fn appends_of_two_handles_follow_each_other() {
    let place = Place::new();
    let open = || OpenOptions::new().append(true).create(true).open(place.at("log")).unwrap();
    let (mut a, mut b) = (open(), open());
    a.write_all(b"one ").unwrap();
    b.write_all(b"two ").unwrap();
    a.write_all(b"three").unwrap();
    assert_eq!(fs::read(place.at("log")).unwrap(), b"one two three");
}

#[test]
fn renames_of_every_kind() {
    let place = Place::new();
    let (a, b) = (place.at("a"), place.at("b"));
    fs::write(&a, "A").unwrap();
    fs::write(&b, "B").unwrap();
    let rename = |flags| renameat2(AT_FDCWD, &a, AT_FDCWD, &b, flags);
    assert_eq!(rename(RenameFlags::RENAME_NOREPLACE), Err(Errno::EEXIST));
    rename(RenameFlags::RENAME_EXCHANGE).unwrap();
    assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (b"B".into(), b"A".into()));
    let mut open = File::open(&b).unwrap();
    let ino = fs::metadata(&a).unwrap().ino();
    fs::rename(&a, &b).unwrap();
    assert_eq!(fs::metadata(&b).unwrap().ino(), ino);
    assert_eq!(errno(fs::metadata(&a)), libc::ENOENT);
    // The file that was renamed over can still be read.
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "A");
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    // Directories, with what is in them.
    fs::create_dir_all(place.at("dir/sub")).unwrap();
    fs::write(place.at("dir/sub/mail"), "x").unwrap();
    fs::rename(place.at("dir"), place.at("moved")).unwrap();
    assert_eq!(fs::read(place.at("moved/sub/mail")).unwrap(), b"x");
    assert_eq!(errno(fs::remove_dir(place.at("moved"))), libc::ENOTEMPTY);
    assert_eq!(errno(fs::remove_file(place.at("moved"))), libc::EISDIR);
    fs::write(&a, "A").unwrap();
    assert_eq!(rename(RenameFlags::RENAME_WHITEOUT), Err(Errno::EINVAL));
}

#[test]
fn links_share_an_inode() {
    let place = Place::new();
    fs::create_dir(place.at("tmp")).unwrap();
    fs::create_dir(place.at("new")).unwrap();
    fs::write(place.at("tmp/1"), "mail").unwrap();
    fs::hard_link(place.at("tmp/1"), place.at("new/1")).unwrap();
    assert_eq!(errno(fs::hard_link(place.at("tmp/1"), place.at("new/1"))), libc::EEXIST);
    let (a, b) = (fs::metadata(place.at("tmp/1")).unwrap(), fs::metadata(place.at("new/1")));
    assert_eq!((a.ino(), a.nlink()), (b.as_ref().unwrap().ino(), 2));
    fs::remove_file(place.at("tmp/1")).unwrap();
    assert_eq!(fs::metadata(place.at("new/1")).unwrap().nlink(), 1);
    assert_eq!(fs::read(place.at("new/1")).unwrap(), b"mail");
}

#[test]
fn symlinks_nodes_and_names() {
    let place = Place::new();
    symlink("some/target", place.at("link")).unwrap();
    assert_eq!(fs::read_link(place.at("link")).unwrap(), Path::new("some/target"));
    let mode = Mode::from_bits_truncate(0o600);
    mknod(&place.at("node"), SFlag::S_IFREG, mode, 0).unwrap();
    assert_eq!(fs::metadata(place.at("node")).unwrap().mode(), libc::S_IFREG | 0o600);
    assert_eq!(mknod(&place.at("fifo"), SFlag::S_IFIFO, mode, 0), Err(Errno::EPERM));
    fs::write(place.at(&"x".repeat(255)), "").unwrap();
    assert_eq!(errno(fs::write(place.at(&"x".repeat(256)), "")), libc::ENAMETOOLONG);
    assert_eq!(errno(fs::create_dir(place.at("none/sub"))), libc::ENOENT);
    assert_eq!(errno(fs::create_dir(place.at("node"))), libc::EEXIST);
    let odd = place.at("odd\n:2,S=4 \\ \u{e4}");
    fs::write(&odd, "odd").unwrap();
    assert_eq!(fs::read(&odd).unwrap(), b"odd");
    assert!(names(place.dir.path()).contains(&"odd\n:2,S=4 \\ \u{e4}".to_owned()));
}

#[test]
fn modes_owners_and_times() {
    let place = Place::new();
    let path = place.at("file");
    fs::write(&path, "x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
    std::os::unix::fs::chown(&path, Some(1234), Some(5678)).unwrap();
    let set = |mtime| {
        utimensat(AT_FDCWD, &path, &TimeSpec::UTIME_OMIT, &mtime, UtimensatFlags::NoFollowSymlink)
            .unwrap();
        let meta = fs::metadata(&path).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    };
    assert_eq!(set(TimeSpec::new(1_600_000_000, 123_456_789)), (1_600_000_000, 123_456_789));
    assert_eq!(set(TimeSpec::new(-2, 800_000_000)), (-2, 800_000_000));
    assert!(set(TimeSpec::UTIME_NOW).0 > 1_700_000_000);
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o604, 1234, 5678));
    // Renaming keeps the file's time and moves the directory's.
    let time = set(TimeSpec::new(1_600_000_000, 1));
    let before = fs::metadata(place.dir.path()).unwrap();
    fs::rename(&path, place.at("renamed")).unwrap();
    let after = fs::metadata(place.dir.path()).unwrap();
    let meta = fs::metadata(place.at("renamed")).unwrap();
    assert_eq!((meta.mtime(), meta.mtime_nsec()), time);
    assert!((after.mtime(), after.mtime_nsec()) > (before.mtime(), before.mtime_nsec()));
}

#[test]
fn an_unlinked_open_file_lives_until_its_last_close() {
    let place = Place::new();
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(place.at("f"));
    let file = file.as_mut().unwrap();
    file.write_all(b"before").unwrap();
    fs::remove_file(place.at("f")).unwrap();
    file.write_all(b" after").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before after");
    let meta = file.metadata().unwrap();
    assert_eq!((meta.nlink(), meta.len()), (0, 12));
    file.set_len(3).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_mapping_follows_a_file_that_others_append_to() {
    let place = Place::new();
    let mut log = OpenOptions::new().append(true).create(true).open(place.at("log")).unwrap();
    log.write_all(&[b'a'; 5000]).unwrap();
    let reader = File::open(place.at("log")).unwrap();
    // SAFETY: a new shared mapping of a file that stays open and only grows.
    let map = unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ,
            libc::MAP_SHARED,
            reader.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        std::slice::from_raw_parts(at.cast::<u8>(), 8192)
    };
    // SAFETY: within the mapping; volatile since the kernel changes it.
    let byte = |at: usize| unsafe { std::ptr::read_volatile(&map[at]) };
    assert_eq!((byte(4999), byte(5000)), (b'a', 0));
    log.write_all(b"bcd").unwrap();
    assert_eq!((byte(5000), byte(5002)), (b'b', b'd'));
    let mut tail = [0; 3];
    reader.read_exact_at(&mut tail, 5000).unwrap();
    assert_eq!(&tail, b"bcd");
    // SAFETY: mapped above, not used below.
    unsafe { libc::munmap(map.as_ptr().cast_mut().cast(), 8192) };
}

#[test]
fn every_fsync_reaches_the_file_system() {
    let place = Place::new();
    let mut file = File::create(place.at("f")).unwrap();
    for n in 1..=3u64 {
        file.write_all(b"x").unwrap();
        file.sync_all().unwrap();
        assert_eq!(place.fs.calls("fsync"), n);
    }
    file.write_all(b"x").unwrap();
    file.sync_data().unwrap();
    assert_eq!(place.fs.calls("fsync"), 4);
    let dir = File::open(place.dir.path()).unwrap();
    dir.sync_all().unwrap();
    dir.sync_all().unwrap();
    assert_eq!(place.fs.calls("fsyncdir"), 2);
}

#[test]
fn closing_asks_only_for_writers() {
    let place = Place::new();
    fs::write(place.at("f"), "x").unwrap();
    let flushes = place.fs.calls("flush");
    assert_eq!(flushes, 1);
    fs::read(place.at("f")).unwrap();
    assert_eq!(place.fs.calls("flush"), flushes);
    drop(OpenOptions::new().read(true).write(true).open(place.at("f")).unwrap());
    assert_eq!(place.fs.calls("flush"), flushes + 1);
    place.fs.quiet_closes();
    fs::write(place.at("f"), "y").unwrap();
    fs::write(place.at("g"), "z").unwrap();
    assert_eq!(place.fs.calls("flush"), flushes + 1);
    soon(|| place.fs.open_handles() == 0);
}

#[test]
fn other_users_enter_and_permissions_hold() {
    let place = Place::new();
    fs::write(place.at("secret"), "x").unwrap();
    fs::set_permissions(place.at("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(place.at("dir")).unwrap();
    fs::set_permissions(place.at("dir"), fs::Permissions::from_mode(0o777)).unwrap();
    let sh = |script: &str| {
        let mut sh = Command::new("sh");
        sh.args(["-c", script]).current_dir("/").uid(65534).gid(65534);
        sh.env("MOUNT", place.dir.path()).stderr(std::process::Stdio::null());
        sh.status().unwrap().success()
    };
    assert!(sh("umask 027; echo mail > $MOUNT/dir/f && cat $MOUNT/dir/f"));
    assert!(!sh("cat $MOUNT/secret"));
    assert!(!sh("echo mail > $MOUNT/f"));
    let meta = fs::metadata(place.at("dir/f")).unwrap();
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (65534, 65534, 0o640));
}

fn lock(file: &File, kind: i32) -> io::Result<()> {
    // SAFETY: all zeroes is a legal lock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    // SAFETY: the descriptor is open and the lock outlives the call. OFD locks act between
    // handles of one process as the others do between processes.
    let rc = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn locks_are_the_kernels() {
    let place = Place::new();
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(place.at("lock")).unwrap()
    };
    let (a, b) = (open(), open());
    lock(&a, libc::F_WRLCK).unwrap();
    assert_eq!(errno(lock(&b, libc::F_WRLCK)), libc::EAGAIN);
    lock(&a, libc::F_UNLCK).unwrap();
    lock(&b, libc::F_WRLCK).unwrap();
    // On a file without a name, too.
    fs::remove_file(place.at("lock")).unwrap();
    assert_eq!(errno(lock(&a, libc::F_RDLCK)), libc::EAGAIN);
    lock(&b, libc::F_UNLCK).unwrap();
    lock(&a, libc::F_RDLCK).unwrap();

    a.lock().unwrap();
    assert!(b.try_lock().is_err());
    a.unlock().unwrap();
    b.try_lock().unwrap();
}

#[test]
fn a_listing_is_stable_while_names_move_out() {
    let place = Place::new();
    fs::create_dir(place.at("new")).unwrap();
    fs::create_dir(place.at("cur")).unwrap();
    for n in 0..2000 {
        File::create(place.at(&format!("new/{n:04}.with.a.longer.name"))).unwrap();
    }
    let mut seen = Vec::new();
    for entry in fs::read_dir(place.at("new")).unwrap() {
        let entry = entry.unwrap();
        assert!(entry.file_type().unwrap().is_file());
        let name = entry.file_name().into_string().unwrap();
        fs::rename(entry.path(), place.at(&format!("cur/{name}:2,"))).unwrap();
        seen.push(name);
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 2000);
    assert!(names(&place.at("new")).is_empty());
    assert_eq!(names(&place.at("cur")).len(), 2000);
    // Renames inside the directory while it is read: each mail is seen once.
    let mut seen = 0;
    for entry in fs::read_dir(place.at("cur")).unwrap() {
        let path = entry.unwrap().path();
        fs::rename(&path, path.with_extension("flagged")).unwrap();
        seen += 1;
    }
    assert_eq!(seen, 2000);
}

#[test]
fn statfs_and_extended_attributes() {
    let place = Place::new();
    let s = nix::sys::statvfs::statvfs(place.dir.path()).unwrap();
    assert_eq!((s.blocks(), s.blocks_free(), s.blocks_available()), (1000, 500, 400));
    assert_eq!((s.files(), s.block_size(), s.name_max()), (70, 4096, 255));
    fs::write(place.at("f"), "x").unwrap();
    let path = CString::new(place.at("f").to_str().unwrap()).unwrap();
    for _ in 0..2 {
        // SAFETY: both strings end with NUL, the buffer is empty.
        let rc =
            unsafe { libc::getxattr(path.as_ptr(), c"user.x".as_ptr(), std::ptr::null_mut(), 0) };
        assert_eq!((rc, Errno::last()), (-1, Errno::EOPNOTSUPP));
        // SAFETY: as above, with a value of one byte.
        let rc = unsafe {
            libc::setxattr(path.as_ptr(), c"user.x".as_ptr(), c"1".as_ptr().cast(), 1, 0)
        };
        assert_eq!((rc, Errno::last()), (-1, Errno::EOPNOTSUPP));
    }
    // The kernel's own way for what the file system does not do.
    assert_eq!(fs::copy(place.at("f"), place.at("copy")).unwrap(), 1);
    assert_eq!(fs::read(place.at("copy")).unwrap(), b"x");
}

#[test]
fn inotify_sees_local_changes() {
    let place = Place::new();
    fs::create_dir(place.at("new")).unwrap();
    let path = CString::new(place.at("new").to_str().unwrap()).unwrap();
    // SAFETY: plain system calls with a path that ends with NUL.
    let mut events = unsafe {
        let fd = libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK);
        assert!(
            libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_CREATE | libc::IN_MOVED_TO) > 0
        );
        <File as std::os::fd::FromRawFd>::from_raw_fd(fd)
    };
    fs::write(place.at("tmp"), "mail").unwrap();
    fs::rename(place.at("tmp"), place.at("new/mail")).unwrap();
    let mut buffer = [0; 512];
    let n = events.read(&mut buffer).unwrap();
    assert!(buffer[..n].windows(4).any(|w| w == b"mail"));
}

#[test]
fn names_and_attributes_are_cached_until_invalidated() {
    let place = Place::new();
    fs::write(place.at("f"), "old").unwrap();
    let ino = fs::metadata(place.at("f")).unwrap().ino();
    let before = (place.fs.calls("lookup"), place.fs.calls("getattr"));
    for _ in 0..100 {
        assert_eq!(fs::metadata(place.at("f")).unwrap().len(), 3);
    }
    let after = (place.fs.calls("lookup"), place.fs.calls("getattr"));
    assert!(after.0 <= before.0 + 1 && after.1 <= before.1 + 1, "{before:?} {after:?}");

    assert_eq!(fs::read(place.at("f")).unwrap(), b"old");
    // Of the same size: another one would show at the next GETATTR and drop the pages.
    place.fs.poke(ino, b"new");
    assert_eq!(fs::read(place.at("f")).unwrap(), b"old");
    place.fs.invalidate(Invalidate::Inode { ino });
    soon(|| fs::read(place.at("f")).unwrap() == b"new");

    place.fs.remove(1, b"f");
    assert!(place.at("f").exists());
    place.fs.invalidate(Invalidate::Name { parent: 1, name: b"f".to_vec() });
    place.fs.invalidate(Invalidate::Name { parent: 1, name: b"never there".to_vec() });
    soon(|| !place.at("f").exists());
}

/// The kernel holds a notification back while a call in the same directory waits. Whoever left
/// the note goes on, and so does everybody elsewhere.
#[test]
fn a_notification_that_blocks_holds_up_nobody_elsewhere() {
    let place = Place::new();
    fs::create_dir(place.at("here")).unwrap();
    fs::create_dir(place.at("there")).unwrap();
    fs::write(place.at("here/f"), "x").unwrap();
    let here = fs::metadata(place.at("here")).unwrap().ino();
    let waiting = place.at("here/slowlookup");
    let caller = thread::spawn(move || errno(fs::metadata(waiting)));
    let stats = place.mounted().stats();
    soon(|| stats.waiting() == 1);
    for name in ["f", "g", "h"] {
        place.fs.invalidate(Invalidate::Name { parent: here, name: name.into() });
    }
    // The first is being told.
    soon(|| place.mounted().notifier().len() == 2);
    thread::sleep(A_WHILE);
    assert_eq!(place.mounted().notifier().len(), 2, "it is told");
    for n in 0..50 {
        fs::write(place.at(&format!("there/{n}")), "x").unwrap();
    }
    place.fs.let_go();
    assert_eq!(caller.join().unwrap(), libc::ENOENT);
    soon(|| place.mounted().notifier().is_empty());
}

#[test]
fn absent_names_are_cached_if_the_file_system_says_so() {
    let place = Place::new();
    for (cacheable, extra) in [(true, 1), (false, 10)] {
        place.fs.cacheable.store(cacheable, std::sync::atomic::Ordering::Relaxed);
        let name = format!("absent{cacheable}");
        let before = place.fs.calls("lookup");
        for _ in 0..10 {
            assert_eq!(errno(fs::metadata(place.at(&name))), libc::ENOENT);
        }
        assert_eq!(place.fs.calls("lookup") - before, extra);
    }
    // A name that the kernel knows to be absent can be created.
    fs::write(place.at("absenttrue"), "x").unwrap();
    assert_eq!(fs::read(place.at("absenttrue")).unwrap(), b"x");
}

#[test]
fn a_call_that_waits_blocks_nobody_else() {
    let place = Place::new();
    fs::write(place.at("fast"), "fast").unwrap();
    fs::create_dir(place.at("dir")).unwrap();
    let (tell, done) = mpsc::channel();
    for n in 0..16 {
        File::create(place.at(&format!("slow{n}"))).unwrap();
    }
    for n in 0..16 {
        let path = place.at(&format!("slow{n}"));
        let tell = tell.clone();
        thread::spawn(move || {
            let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            file.write_all(b"slow data").unwrap();
            file.sync_all().unwrap();
            tell.send(fs::read(&path).unwrap()).unwrap();
        });
    }
    soon(|| place.mounted().stats().waiting() == 16);
    // More waiting calls than threads, and everything else goes on.
    for n in 0..100 {
        assert_eq!(fs::read(place.at("fast")).unwrap(), b"fast");
        fs::write(place.at(&format!("dir/{n}")), "x").unwrap();
        fs::rename(place.at(&format!("dir/{n}")), place.at("moved")).unwrap();
    }
    assert!(done.recv_timeout(A_WHILE).is_err());
    place.fs.let_go();
    for _ in 0..16 {
        assert_eq!(done.recv_timeout(GRACE).unwrap(), b"slow data");
    }
    let stats = place.mounted().stats();
    assert!(stats.waits(Op::Open) >= 16 && stats.waiting() == 0);
}

#[test]
fn a_waiting_lookup_or_listing_comes_to_its_answer() {
    let place = Place::new();
    fs::create_dir(place.at("dir")).unwrap();
    fs::write(place.at("dir/a"), "").unwrap();
    fs::write(place.at("dir/slowentry"), "").unwrap();
    fs::write(place.at("dir/z"), "").unwrap();
    let (tell, done) = mpsc::channel();
    let (dir, other) = (place.at("dir"), place.at("slowlookup"));
    let listed = tell.clone();
    thread::spawn(move || listed.send(names(&dir).join(" ")).unwrap());
    thread::spawn(move || tell.send(errno(fs::metadata(other)).to_string()).unwrap());
    assert!(done.recv_timeout(A_WHILE).is_err());
    place.fs.let_go();
    let mut got = [done.recv_timeout(GRACE).unwrap(), done.recv_timeout(GRACE).unwrap()];
    got.sort();
    assert_eq!(got, [libc::ENOENT.to_string(), "a slowentry z".to_owned()]);
}

#[test]
fn immutable_files_are_read_past_the_daemon() {
    let place = Place::new();
    let path = place.at("mail");
    let writer = File::create(&path).unwrap();
    (&writer).write_all(b"published mail").unwrap();
    place.fs.publish(writer.metadata().unwrap().ino());
    let stats = place.mounted().stats();
    // Its writer is still there: a plain handle.
    let early = File::open(&path).unwrap();
    assert_eq!(stats.passthrough_opens(), 0);
    let plain = place.fs.open_handles();
    drop((writer, early));
    soon(|| place.fs.open_handles() == plain - 2);

    let reads = place.fs.calls("read");
    let first = File::open(&path).unwrap();
    if stats.passthrough_opens() == 0 {
        return eprintln!("this kernel does not offer passthrough: not tested");
    }
    let second = File::open(&path).unwrap();
    for file in [&first, &second] {
        let mut data = [0; 14];
        file.read_exact_at(&mut data, 0).unwrap();
        assert_eq!(&data, b"published mail");
    }
    assert_eq!((place.fs.calls("read"), stats.passthrough_opens()), (reads, 2));
    assert_eq!(errno(OpenOptions::new().write(true).open(&path)), libc::EACCES);
    // The kernel unlinks and renames such a file as any other.
    fs::rename(&path, place.at("mail:2,S")).unwrap();
    assert_eq!(fs::read(place.at("mail:2,S")).unwrap(), b"published mail");
    fs::remove_file(place.at("mail:2,S")).unwrap();
    assert_eq!(first.metadata().unwrap().nlink(), 0);
}

#[test]
fn without_passthrough_the_same_file_is_read_through_the_daemon() {
    let place = Place::with(|options| options.passthrough = false);
    fs::write(place.at("mail"), "published mail").unwrap();
    place.fs.publish(fs::metadata(place.at("mail")).unwrap().ino());
    assert_eq!(fs::read(place.at("mail")).unwrap(), b"published mail");
    assert_eq!(place.mounted().stats().passthrough_opens(), 0);
}

#[test]
fn a_read_only_mount_refuses_changes() {
    let place = Place::with(|options| options.read_only = true);
    assert_eq!(errno(File::create(place.at("f"))), libc::EROFS);
}

#[test]
fn handles_are_released_and_inodes_forgotten() {
    let mut place = Place::new();
    for n in 0..50 {
        fs::write(place.at(&n.to_string()), "x").unwrap();
        fs::remove_file(place.at(&n.to_string())).unwrap();
    }
    soon(|| place.fs.open_handles() == 0);
    let stats = place.mounted().stats();
    soon(|| stats.requests(Op::Forget) >= 50);
    assert!(place.unmount(GRACE).session_over);
}

#[test]
fn an_umount_by_somebody_else_ends_the_session() {
    let mut place = Place::new();
    fs::write(place.at("f"), "x").unwrap();
    soon(|| umount2(place.dir.path(), MntFlags::empty()).is_ok());
    assert_eq!(place.ended(), Ok(Ok(())));
    // Something else comes to the same place: it is not touched.
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("t"), place.dir.path(), Some("tmpfs"), flags, none).unwrap();
    assert_eq!(place.unmount(GRACE), UnmountOutcome { how: Unmounted::Before, session_over: true });
    assert_eq!(top_of(place.dir.path()).unwrap().fstype, "tmpfs");
}

#[test]
fn what_is_mounted_over_it_is_left_alone() {
    let mut place = Place::new();
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("t"), place.dir.path(), Some("tmpfs"), flags, none).unwrap();
    let outcome = place.unmount(GRACE);
    assert!(matches!(outcome.how, Unmounted::Covered { .. }) && !outcome.session_over);
    assert_eq!(top_of(place.dir.path()).unwrap().fstype, "tmpfs");
}

#[test]
fn a_busy_mount_is_detached_and_its_holders_are_named() {
    let mut place = Place::new();
    let mut file = File::create(place.at("held")).unwrap();
    let path = place.at("held");
    let outcome = place.unmount(A_WHILE);
    let Unmounted::Detached { holders, .. } = outcome.how else { panic!("{outcome:?}") };
    assert!(!outcome.session_over);
    assert!(holders.iter().any(|h| h.pid == std::process::id() && h.path == path), "{holders:?}");
    assert_eq!(top_of(place.dir.path()), None);
    // The holder can go on.
    file.write_all(b"still here").unwrap();
    file.sync_all().unwrap();
    drop(file);
}

#[test]
fn a_call_that_waits_does_not_hold_up_an_unmount() {
    let mut place = Place::new();
    File::create(place.at("slow")).unwrap();
    let path = place.at("slow");
    let reader = thread::spawn(move || fs::read(path).map_err(|e| e.raw_os_error()));
    let stats = place.mounted().stats();
    soon(|| stats.waiting() == 1);
    let ended = place.mounted().ended();
    let outcome = place.unmount(A_WHILE);
    assert!(matches!(outcome.how, Unmounted::Detached { .. }) && !outcome.session_over);
    place.fs.let_go();
    assert_eq!(reader.join().unwrap(), Ok(Vec::new()));
    // Its RELEASE may never come: the last close ends the session.
    assert_eq!(place.rt.block_on(async { tokio::time::timeout(GRACE, ended).await }), Ok(Ok(())));
}

#[test]
fn what_is_stored_through_a_mapping_arrives() {
    let place = Place::new();
    let file = File::create_new(place.at("f")).unwrap();
    drop(file);
    let file = OpenOptions::new().read(true).write(true).open(place.at("f")).unwrap();
    file.set_len(4096).unwrap();
    // SAFETY: a new shared mapping of one page of an open file, synced and unmapped below.
    unsafe {
        let (prot, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, shared, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        std::ptr::write_volatile(at.cast::<u8>().add(7), b'!');
        assert_eq!(libc::msync(at, 4096, libc::MS_SYNC), 0);
        libc::munmap(at, 4096);
    }
    assert!(place.fs.calls("write") == 1 && place.fs.calls("fsync") == 1);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 7).unwrap();
    assert_eq!(&byte, b"!");
}

/// Also without msync, and where no close is asked for.
#[test]
fn what_is_stored_through_a_mapping_arrives_with_its_end() {
    let place = Place::new();
    place.fs.quiet_closes();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(place.at("f"));
    let file = file.unwrap();
    file.set_len(4096).unwrap();
    // SAFETY: a new shared mapping of one page of an open file, unmapped below.
    unsafe {
        let (prot, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, shared, file.as_raw_fd(), 0);
        assert_ne!(at, libc::MAP_FAILED);
        drop(file);
        std::ptr::write_volatile(at.cast::<u8>().add(7), b'!');
        libc::munmap(at, 4096);
    }
    soon(|| place.fs.calls("write") == 1 && place.fs.open_handles() == 0);
    assert_eq!(place.fs.calls("flush"), 0);
}

#[test]
fn a_mountpoint_in_use_is_refused() {
    let place = Place::new();
    fs::write(place.at("f"), "x").unwrap();
    let fs: Arc<dyn MailFs> = FakeFs::new();
    let options = MountOptions::new(place.dir.path());
    let refused = mount(fs, place.rt.handle().clone(), &options);
    assert!(matches!(refused, Err(MountError::InUse { .. })), "{refused:?}");
    assert_eq!(fs::read(place.at("f")).unwrap(), b"x");
}

#[test]
fn a_failed_start_leaves_nothing_mounted() {
    let mut place = Place::new();
    drop(place.mounted.take());
    assert_eq!(top_of(place.dir.path()), None);
}

/// A mount whose daemon died, which the next mount clears away.
#[test]
fn a_dead_mount_is_detached_first() {
    let dir = tempfile::tempdir().unwrap();
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let flags = nix::mount::MsFlags::empty();
    let data = Some(data.as_str());
    nix::mount::mount(Some("dead"), dir.path(), Some("fuse.vmailfs"), flags, data).unwrap();
    drop(device);
    assert_eq!(errno(fs::metadata(dir.path())), libc::ENOTCONN);

    let rt = tokio::runtime::Runtime::new().unwrap();
    let options = MountOptions::new(dir.path());
    let mounted = mount(FakeFs::new(), rt.handle().clone(), &options).unwrap();
    assert!(fs::metadata(dir.path()).unwrap().is_dir());
    assert_eq!(rt.block_on(mounted.unmount(GRACE)).unwrap().how, Unmounted::Clean);
    assert_eq!(top_of(dir.path()), None);
}
