//! The file interface where randomness does not reach: files without names, locks, listings and
//! appends under concurrency, mappings, times, links. Each test runs on a mount and, to keep it
//! honest, on a plain directory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use support::fsops::{c_path, read_mapped, rename_with};
use support::mount::mounted_home;
use support::scratch;

fn on_plain(test: impl Fn(&Path)) {
    let place = scratch("posix");
    test(place.path());
}

fn on_mount(test: impl Fn(&Path)) {
    let (mut mount, home) = mounted_home().unwrap();
    test(&home);
    mount.umount().unwrap();
}

fn open_files_outlive_their_names(home: &Path) {
    let (a, b) = (home.join("a"), home.join("b"));
    let mut first = File::options().read(true).write(true).create_new(true).open(&a).unwrap();
    first.write_all(b"first").unwrap();
    fs::remove_file(&a).unwrap();
    assert_eq!(first.metadata().unwrap().nlink(), 0);
    first.write_all(b" and more").unwrap();
    first.sync_all().unwrap();
    let mut text = String::new();
    first.rewind().unwrap();
    first.read_to_string(&mut text).unwrap();
    assert_eq!(text, "first and more");
    assert!(!a.exists());

    fs::write(&a, "old").unwrap();
    fs::write(&b, "new").unwrap();
    let old = File::options().read(true).write(true).open(&a).unwrap();
    let ino = fs::metadata(&b).unwrap().ino();
    fs::rename(&b, &a).unwrap();
    let mut bytes = [0; 3];
    old.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!((&bytes, old.metadata().unwrap().nlink()), (b"old", 0));
    assert_eq!(fs::read(&a).unwrap(), b"new");
    assert_eq!(fs::metadata(&a).unwrap().ino(), ino, "rename keeps the inode");
    assert_ne!(old.metadata().unwrap().ino(), ino, "path and descriptor can be told apart");

    // Dovecot locks logs that were rotated away.
    lock(&old, libc::F_WRLCK).unwrap();
    lock(&old, libc::F_UNLCK).unwrap();
}

/// The traditional lock of a process on a whole file.
fn lock(file: &File, kind: libc::c_int) -> std::io::Result<()> {
    // SAFETY: all fields of the structure may be zero.
    let mut whole: libc::flock = unsafe { std::mem::zeroed() };
    whole.l_type = kind as libc::c_short;
    whole.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the descriptor is open and the structure lives during the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &whole) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[test]
fn open_files_plain() {
    on_plain(open_files_outlive_their_names);
}

#[test]
fn open_files() {
    on_mount(open_files_outlive_their_names);
}

/// The errno with which another process fails to lock `path`, or 0.
fn lock_from_another_process(path: &Path) -> i32 {
    let path = c_path(path);
    // SAFETY: the child makes system calls only, no allocation, and leaves by _exit.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            let fd = libc::open(path.as_ptr(), libc::O_RDWR);
            let mut whole: libc::flock = std::mem::zeroed();
            whole.l_type = libc::F_WRLCK as libc::c_short;
            let failed = fd < 0 || libc::fcntl(fd, libc::F_SETLK, &whole) != 0;
            libc::_exit(if failed { *libc::__errno_location() } else { 0 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(libc::WIFEXITED(status));
        libc::WEXITSTATUS(status)
    }
}

fn locks_exclude(home: &Path) {
    let path = home.join("locked");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    assert_eq!(lock_from_another_process(&path), 0);
    lock(&file, libc::F_WRLCK).unwrap();
    assert_eq!(lock_from_another_process(&path), libc::EAGAIN);
    lock(&file, libc::F_UNLCK).unwrap();
    assert_eq!(lock_from_another_process(&path), 0);

    let other = File::open(&path).unwrap();
    let flock = |file: &File, how| {
        // SAFETY: the descriptor is open.
        unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) == 0 }
    };
    assert!(flock(&file, libc::LOCK_EX));
    assert!(!flock(&other, libc::LOCK_EX) && !flock(&other, libc::LOCK_SH));
    assert!(flock(&file, libc::LOCK_UN));
    assert!(flock(&other, libc::LOCK_SH) && flock(&file, libc::LOCK_SH));
}

#[test]
fn locks_plain() {
    on_plain(locks_exclude);
}

#[test]
fn locks() {
    on_mount(locks_exclude);
}

/// Names as one `getdents64` with a small buffer returns them; empty at the end.
fn some_names(directory: &File) -> Vec<OsString> {
    let mut buffer = [0u8; 400];
    // SAFETY: the descriptor is open; the kernel writes at most the buffer's length.
    let length = unsafe {
        let fd = directory.as_raw_fd();
        libc::syscall(libc::SYS_getdents64, fd, buffer.as_mut_ptr(), buffer.len())
    };
    let length = usize::try_from(length).unwrap();
    let (mut at, mut names) = (0, Vec::new());
    while at < length {
        let record = usize::from(u16::from_ne_bytes([buffer[at + 16], buffer[at + 17]]));
        let name = buffer[at + 19..at + record].split(|b| *b == 0).next().unwrap();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
        at += record;
    }
    names
}

/// Reads a directory in small steps while names move in it, out of it and into it.
/// `renamed_too`: also a name that was renamed inside must be seen, once.
fn listing_under_renames(home: &Path, renamed_too: bool) {
    let (here, there) = (home.join("here"), home.join("there"));
    fs::create_dir(&here).unwrap();
    fs::create_dir(&there).unwrap();
    for n in 0..400 {
        fs::write(here.join(format!("{n:03}-name-of-a-mail")), "").unwrap();
    }
    let directory = File::open(&here).unwrap();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for step in 0.. {
        let names = some_names(&directory);
        if names.is_empty() && step > 0 {
            break;
        }
        for name in names {
            let number: String = name.to_string_lossy().chars().take(3).collect();
            *seen.entry(number).or_default() += 1;
        }
        for n in [step * 5, 399usize.saturating_sub(step * 5)] {
            let name = here.join(format!("{n:03}-name-of-a-mail"));
            let to = if step % 2 == 0 {
                here.join(format!("{n:03}-name-of-a-mail:2,S"))
            } else {
                there.join(format!("{n:03}"))
            };
            let _ = fs::rename(name, to);
        }
        // The listing must end all the same.
        fs::write(here.join(format!("new{step}")), "").unwrap();
    }
    for n in 0..400 {
        let number = format!("{n:03}");
        let count = seen.get(&number).copied().unwrap_or(0);
        let stayed = here.join(format!("{n:03}-name-of-a-mail")).exists();
        let renamed = here.join(format!("{n:03}-name-of-a-mail:2,S")).exists();
        if stayed || (renamed && renamed_too) {
            assert_eq!(count, 1, "{number}: renamed {renamed}");
        }
        assert!(count <= 1 || !renamed_too, "{number} was seen {count} times");
    }
}

#[test]
fn listing_plain() {
    on_plain(|home| listing_under_renames(home, false));
}

#[test]
fn listing() {
    on_mount(|home| listing_under_renames(home, true));
}

/// As Dovecot empties `new/`: each name is renamed away while the directory is being read.
fn emptying_while_reading(home: &Path) {
    let (new, cur) = (home.join("new"), home.join("cur"));
    fs::create_dir(&new).unwrap();
    fs::create_dir(&cur).unwrap();
    for n in 0..500 {
        fs::write(new.join(format!("mail{n}")), "").unwrap();
    }
    let mut rounds = 0;
    loop {
        let mut moved = 0;
        for entry in fs::read_dir(&new).unwrap() {
            let name = entry.unwrap().file_name();
            fs::rename(new.join(&name), cur.join(&name)).unwrap();
            moved += 1;
        }
        rounds += 1;
        if moved == 0 {
            break;
        }
    }
    assert!(rounds <= 3, "{rounds} rounds");
    assert_eq!(fs::read_dir(&cur).unwrap().count(), 500);
}

#[test]
fn emptying_plain() {
    on_plain(emptying_while_reading);
}

#[test]
fn emptying() {
    on_mount(emptying_while_reading);
}

fn only_one_wins(home: &Path) {
    const THREADS: usize = 6;
    fs::write(home.join("source"), "").unwrap();
    for round in 0..20 {
        let start = Barrier::new(THREADS);
        let (created, linked) = (home.join(format!("c{round}")), home.join(format!("l{round}")));
        let wins: Vec<(bool, bool)> = thread::scope(|scope| {
            let attempt = || {
                start.wait();
                let create = File::create_new(&created).is_ok();
                (create, fs::hard_link(home.join("source"), &linked).is_ok())
            };
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(attempt)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(wins.iter().filter(|w| w.0).count(), 1, "creators in round {round}");
        assert_eq!(wins.iter().filter(|w| w.1).count(), 1, "linkers in round {round}");
    }
    assert_eq!(fs::metadata(home.join("source")).unwrap().nlink(), 21);
}

#[test]
fn races_plain() {
    on_plain(only_one_wins);
}

#[test]
fn races() {
    on_mount(only_one_wins);
}

/// Appends of several writers stay whole, and readers and mappings see them at once.
fn appends_are_whole(home: &Path) {
    const WRITERS: usize = 4;
    let path = home.join("log");
    File::create_new(&path).unwrap();
    let reader = File::open(&path).unwrap();
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let path = &path;
            scope.spawn(move || {
                let mut file = File::options().append(true).open(path).unwrap();
                for n in 0..200 {
                    let length = 10 + (n * 37 + writer * 11) % 700;
                    let mut record = vec![b'a' + writer as u8; length];
                    record.push(b'\n');
                    assert_eq!(file.write(&record).unwrap(), record.len());
                }
            });
        }
    });
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.split(|b| *b == b'\n').count(), WRITERS * 200 + 1);
    for line in bytes.split(|b| *b == b'\n') {
        assert!(line.windows(2).all(|w| w[0] == w[1]), "a record is torn");
    }
    assert!(read_mapped(&reader).unwrap() == bytes, "a mapping shows something else");

    let mut file = File::options().append(true).open(&path).unwrap();
    for n in 0..50u8 {
        file.write_all(&[n; 300]).unwrap();
        let mut last = [0; 300];
        let at = reader.metadata().unwrap().len() - 300;
        reader.read_exact_at(&mut last, at).unwrap();
        assert_eq!(last, [n; 300]);
        assert!(read_mapped(&reader).unwrap().ends_with(&last));
    }
}

#[test]
fn appends_plain() {
    on_plain(appends_are_whole);
}

#[test]
fn appends() {
    on_mount(appends_are_whole);
}

/// What is written through a shared mapping is in the file.
fn mapped_writes(home: &Path) {
    let path = home.join("mapped");
    fs::write(&path, vec![b'.'; 10_000]).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: the mapping is of the file's whole length, which stays; it is used only here.
    unsafe {
        let (prot, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        let map = libc::mmap(std::ptr::null_mut(), 10_000, prot, libc::MAP_SHARED, fd, 0);
        assert_ne!(map, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        std::slice::from_raw_parts_mut(map.cast::<u8>(), 10_000)[5_000..5_005]
            .copy_from_slice(b"hello");
        assert_eq!(libc::msync(map, 10_000, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(map, 10_000), 0);
    }
    drop(file);
    let bytes = fs::read(&path).unwrap();
    assert_eq!((bytes.len(), &bytes[4_999..5_006]), (10_000, &b".hello."[..]));
}

#[test]
fn mapped_writes_plain() {
    on_plain(mapped_writes);
}

#[test]
fn mapped_writes_on_a_mount() {
    on_mount(mapped_writes);
}

/// A directory's mtime tells of each change inside (Dovecot does not look again otherwise), and
/// of nothing else. `strictly`: two changes within a clock tick count, too.
fn directory_times(home: &Path, strictly: bool) {
    // Not a real `cur/`: mails there cannot be written again.
    let cur = home.join("files");
    fs::create_dir(&cur).unwrap();
    let time = || {
        let meta = fs::metadata(&cur).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    };
    let mut last = time();
    let mut changed = |what: &str| {
        let now = time();
        assert!(now > last || (!strictly && now == last), "{what}: {last:?}, {now:?}");
        last = now;
    };
    for n in 0..20 {
        let (one, two) = (cur.join(format!("{n}")), cur.join(format!("{n}:2,S")));
        fs::write(&one, "x").unwrap();
        changed("create");
        fs::rename(&one, &two).unwrap();
        changed("rename");
        fs::hard_link(&two, &one).unwrap();
        changed("link");
        fs::remove_file(&one).unwrap();
        changed("unlink");
        fs::rename(&two, home.join("elsewhere")).unwrap();
        changed("rename out");
        fs::rename(home.join("elsewhere"), &two).unwrap();
        changed("rename in");
    }
    let before = time();
    fs::write(cur.join("3:2,S"), "changed").unwrap();
    assert_eq!(fs::read_dir(&cur).unwrap().count(), 20);
    assert_eq!(time(), before, "neither writing a file nor listing is a change");
}

#[test]
fn directory_times_plain() {
    on_plain(|home| directory_times(home, false));
}

#[test]
fn directory_times_on_a_mount() {
    on_mount(|home| directory_times(home, true));
}

/// A hard link is the same file, and a rename onto another name of it changes nothing.
fn links_are_one_file(home: &Path) {
    let (a, b, c) = (home.join("a"), home.join("b"), home.join("c"));
    fs::write(&a, "one").unwrap();
    fs::hard_link(&a, &b).unwrap();
    assert_eq!(fs::metadata(&a).unwrap().ino(), fs::metadata(&b).unwrap().ino());
    fs::rename(&a, &b).unwrap();
    assert!(a.exists() && b.exists(), "a rename between names of one file does nothing");
    let eexist = Some(libc::EEXIST);
    assert_eq!(fs::hard_link(&a, &b).unwrap_err().raw_os_error(), eexist);
    fs::write(&c, "three").unwrap();
    let refused = rename_with(&a, &c, libc::RENAME_NOREPLACE).unwrap_err();
    assert_eq!(refused.raw_os_error(), eexist);
    rename_with(&a, &c, libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((fs::read(&a).unwrap(), fs::read(&c).unwrap()), (b"three".into(), b"one".into()));
    fs::remove_file(&b).unwrap();
    assert_eq!((fs::read(&c).unwrap(), fs::metadata(&c).unwrap().nlink()), (b"one".into(), 1));
    let eisdir = fs::create_dir(home.join("d")).and_then(|()| fs::remove_file(home.join("d")));
    assert_eq!(eisdir.unwrap_err().raw_os_error(), Some(libc::EISDIR));
}

#[test]
fn links_plain() {
    on_plain(links_are_one_file);
}

#[test]
fn links() {
    on_mount(links_are_one_file);
}
