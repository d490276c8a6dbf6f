//! The metacache's bound on a real mount, seen from outside with `du`, under ten times as much as
//! fits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use support::mount::Mount;
use support::wait_until;
use support::watch::Watch;

const MB: u64 = 1 << 20;
const SPACE: u64 = 6 * MB;
const GRACE: u64 = 4 * MB;

/// A user with the index files of a few folders.
fn make_user(root: &Path, user: usize) -> Vec<PathBuf> {
    let home = root.join(format!("user{user}"));
    fs::create_dir(&home).unwrap();
    fs::create_dir(home.join("index")).unwrap();
    let mut files = Vec::new();
    for folder in [".INBOX", ".Junk", ".Sent", ".Archive"] {
        let dir = home.join("index").join(folder);
        fs::create_dir(&dir).unwrap();
        for name in ["dovecot.index", "dovecot.index.log", "dovecot.index.cache"] {
            files.push(dir.join(name));
        }
    }
    files
}

/// Does not compress, and differs from file to file.
fn content(path: &Path, len: usize) -> Vec<u8> {
    let mut seed = path.as_os_str().len() as u64 + 1;
    for byte in path.to_string_lossy().rsplit('/').flat_map(str::bytes) {
        seed = seed.wrapping_mul(131).wrapping_add(u64::from(byte));
    }
    (0..len)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            (seed >> 33) as u8
        })
        .collect()
}

#[test]
fn du_never_sees_more_than_space_and_grace() {
    let mut mount = Mount::on_directory()
        .option(&["--set", &format!("metacache.max_space={SPACE}")])
        .option(&["--set", &format!("metacache.max_grace={GRACE}")])
        .option(&["--set", "metacache.close_idle=2s"]);
    mount.mount().unwrap();
    let dirs = [mount.state().join("metacache"), mount.state().join("users")];
    let watch = Watch::new(&dirs, Duration::from_millis(20));
    let root = mount.root();
    let started = Instant::now();
    let mut written = 0;
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let root = root.clone();
            std::thread::spawn(move || {
                let mut all = Vec::new();
                let mut written = 0;
                for user in (0..52).filter(|user| user % 4 == worker) {
                    for path in make_user(&root, user) {
                        let bytes = content(&path, 60_000 + user * 900);
                        let mut file =
                            OpenOptions::new().create_new(true).write(true).open(&path).unwrap();
                        for chunk in bytes.chunks(16_384) {
                            file.write_all(chunk).unwrap();
                        }
                        written += bytes.len() as u64;
                        all.push((path, bytes.len()));
                    }
                }
                (all, written)
            })
        })
        .collect();
    let mut files = Vec::new();
    for worker in workers {
        let (all, bytes) = worker.join().unwrap();
        files.extend(all);
        written += bytes;
    }
    assert!(written > 8 * SPACE, "{written}");
    for (path, len) in files.iter().rev().step_by(7) {
        assert!(fs::read(path).unwrap() == content(path, *len), "{}", path.display());
    }
    // Some are closed meanwhile: nobody uses them.
    let open = || {
        let (_, text) = mount.vmailfs(&["status", "--json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        status["users_open"].as_u64().unwrap()
    };
    assert!(wait_until(Duration::from_secs(120), || open() < 52), "{}", mount.log());
    for (path, len) in files.iter().step_by(11) {
        assert!(fs::read(path).unwrap() == content(path, *len), "{}", path.display());
    }
    let seen = watch.end();
    eprintln!("{written} bytes written in {:?}; of {}: {seen:?}", started.elapsed(), SPACE + GRACE);
    assert!(seen.walked > SPACE / 2, "{seen:?}");
    assert!(seen.bytes <= SPACE + GRACE, "{seen:?}");
    mount.umount().unwrap();
}

/// Somebody holds a file by its name alone while the kernel is told to forget the user, and lets go
/// of it later: what was below the root then is found all the same, and the user is closed.
#[test]
fn a_user_that_was_held_is_closed_once_it_is_let_go() {
    let mut mount = Mount::on_directory()
        .option(&["--set", "metacache.close_idle=500ms"])
        .option(&["--set", "log.level=debug"]);
    mount.mount().unwrap();
    let path = make_user(&mount.root(), 0).remove(0);
    fs::write(&path, b"index").unwrap();
    let open = || {
        let (_, text) = mount.vmailfs(&["status", "--json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        status["users_open"].as_u64().unwrap()
    };
    // No OPEN is sent for it.
    let held = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(open(), 1);
    drop(held);
    let closed = wait_until(Duration::from_secs(120), || open() == 0);
    assert!(closed, "{}", mount.log());
    assert_eq!(fs::read(&path).unwrap(), b"index");
    mount.umount().unwrap();
}
