//! The NFS mode: mail and indexes lie on NFS, and of each user only the index of mailboxes
//! (`dovecot.list.index*`) is on this machine, below `/dev/shm`. It has to be thrown away when the
//! user was served by another host in the meantime.
//!
//! Two files named `.lasthost` decide that. The one in the INDEX directory, on NFS, holds the name of
//! the host that took the user last. The one beside the list index ([`record`]) holds what that
//! file was when this host took the user: inode and mtime. If they still are the same, nobody
//! else was here.
//!
//! * [`check`] is what happens at a login, and when a session ends; [`migrate`] fetches a list
//!   index that was kept on NFS before.
//! * [`place`] finds and makes directories below `/dev/shm`, where any local user can plant things.
//! * [`lock`] is the lock on the local record: logins of one user on one host come one by one.
//! * [`clean`] lists and removes list indexes that nobody used for long.
//! * [`straight`] is the file system of `vmailfs mount nfs:///...`, in plain Rust.
//! * [`creds`] acts as the owner of the files, so that `root_squash` and quotas mean what they say.
//!
//! What is promised and what not (two hosts at once) is told to administrators in `docs/NFS.md`.
//!
//! This path is its own and thin: it knows neither stores nor heads nor journals, and the rest of
//! the program does not know it.

pub mod check;
pub mod clean;
pub mod creds;
pub mod lock;
pub mod migrate;
pub mod place;
pub mod record;
pub mod straight;

use std::io;
use std::path::{Path, PathBuf};

/// The file that tells who took the user last, and what this host remembers of it.
pub const LASTHOST: &str = ".lasthost";
/// What the names of all files begin with that are kept on this machine.
pub const LIST_INDEX: &str = "dovecot.list.index";

/// Whether a name is one of the list index.
pub fn is_list_index(name: &[u8]) -> bool {
    name.starts_with(LIST_INDEX.as_bytes())
}

/// Why something could not be done; one line that names the file.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// Somebody else's file, or one that cannot be what it should be.
    #[error("{}: {why}", path.display())]
    Refused { path: PathBuf, why: String },
    #[error("{}: another process has had it locked for too long", .0.display())]
    Locked(PathBuf),
    #[error("{}: {doing}: {error}", path.display())]
    Io { doing: &'static str, path: PathBuf, error: io::Error },
}

impl Trouble {
    pub(crate) fn io(
        doing: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> Trouble {
        let path = path.as_ref().to_owned();
        move |error| Trouble::Io { doing, path, error }
    }

    pub(crate) fn refused(path: impl AsRef<Path>, why: impl Into<String>) -> Trouble {
        Trouble::Refused { path: path.as_ref().to_owned(), why: why.into() }
    }

    /// The system's error, if it is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Trouble::Io { error, .. } => error.raw_os_error(),
            Trouble::Refused { .. } => Some(libc::EPERM),
            Trouble::Locked(_) => Some(libc::EAGAIN),
        }
    }
}
