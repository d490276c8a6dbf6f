//! What the end-to-end tests share: a private Dovecot, small IMAP and LMTP clients, a model of
//! what every mailbox must hold, the workload that fills it, and the mount under test.
//!
//! Each test binary uses its own part of this, hence the `dead_code`.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod check;
pub mod dovecot;
pub mod fsops;
pub mod imap;
pub mod imap_text;
pub mod lmtp;
pub mod messages;
pub mod model;
pub mod mount;
pub mod mta;
pub mod openmetrics;
pub mod scenario;
pub mod session;
pub mod watch;
pub mod workload;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Mail processes and the files they make belong to this user and group.
pub const MAIL_UID: u32 = 5000;

/// Why a step of a test did not work: text for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure(pub String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure(error.to_string())
    }
}

pub type Outcome<T> = Result<T, Failure>;

pub fn fail<T>(text: impl Into<String>) -> Outcome<T> {
    Err(Failure(text.into()))
}

/// A new directory under the temporary directory that any user may enter; it is removed when
/// the guard is dropped, unless `KEEP_TEST_DIRS` is set.
pub fn scratch(label: &str) -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let mut dir = tempfile::Builder::new().prefix(&format!("vmt-{label}-")).tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir.disable_cleanup(std::env::var_os("KEEP_TEST_DIRS").is_some());
    dir
}

/// A plain directory in which mail processes may make the users' homes.
pub fn mail_root(parent: &Path) -> PathBuf {
    let root = parent.join("mail");
    std::fs::create_dir(&root).unwrap();
    std::os::unix::fs::chown(&root, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
    root
}

/// Removes the lock files below `directory`, whose owners must have been killed. Dovecot would
/// wait two minutes for one whose owner did not live to write its number into it, and three for
/// an index log that was being made.
pub fn remove_locks(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            remove_locks(&path);
        } else if path.extension().is_some_and(|e| e == "lock" || e == "newlock") {
            std::fs::remove_file(path).unwrap();
        }
    }
}

/// Waits until `ready` says so; false when `limit` has passed before.
pub fn wait_until(limit: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if ready() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Makes a child end with the thread that starts it, so that an aborted test leaves nothing.
pub fn die_with_parent(command: &mut std::process::Command, signal: libc::c_int) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure runs between fork and exec and makes one async-signal-safe call.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong);
            Ok(())
        });
    }
}
pub mod deaf;
pub mod fakefs;
pub mod http;
pub mod proxy;
pub mod weed;
