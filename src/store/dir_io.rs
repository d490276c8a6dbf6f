//! System calls of the directory store: what errors mean, user metadata, locks, durable
//! directories. All of it blocks.

use super::{StoreError, StoreResult};
use nix::fcntl::{Flock, FlockArg};
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The attribute that holds the user metadata as JSON.
const XATTR: &CStr = c"user.vmailfs";
/// More than any metadata that was ever written.
const XATTR_MAX: usize = 8 << 10;
/// Who holds a lock so long is stopped or dead on the far side of a network file system.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// The root as it was when the store was opened. A root that is gone, or that is another
/// directory now (its file system was unmounted), makes every absence in it meaningless.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) path: PathBuf,
    id: (u64, u64),
}

impl Root {
    pub(super) fn open(path: &Path) -> StoreResult<Root> {
        let no_store = |detail| StoreError::NoSuchStore { detail };
        let shown = path.display();
        match std::fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {
                Ok(Root { path: path.to_owned(), id: (meta.dev(), meta.ino()) })
            }
            Ok(_) => Err(no_store(format!("{shown} is not a directory"))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(no_store(format!("the directory {shown} does not exist")))
            }
            Err(e) => Err(plain(e, &shown.to_string())),
        }
    }

    /// Fails unless the root is there and the same.
    pub(super) fn check(&self) -> StoreResult<()> {
        let now = Root::open(&self.path)?;
        if now.id == self.id {
            return Ok(());
        }
        let detail = format!(
            "{} is another directory than at the start (was its file system unmounted?)",
            self.path.display()
        );
        Err(StoreError::NoSuchStore { detail })
    }

    /// What an error on the object `key` means.
    pub(super) fn explain(&self, error: io::Error, key: &str) -> StoreError {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::EISDIR) => match self.check() {
                Ok(()) => StoreError::NotFound { key: key.to_owned() },
                Err(outage) => outage,
            },
            _ => plain(error, key),
        }
    }
}

/// What an error means where a missing file would not mean a missing object.
pub(super) fn plain(error: io::Error, what: &str) -> StoreError {
    let detail = format!("{what}: {error}");
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => StoreError::Full { detail },
        Some(libc::EACCES | libc::EPERM) => StoreError::Denied { detail },
        Some(libc::ENAMETOOLONG) => StoreError::Unsupported { detail },
        _ => StoreError::Unavailable { detail },
    }
}

pub(super) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
}

/// Makes the directory's entries durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A file in the store's temporary directory; removed when dropped, unless it was renamed.
#[derive(Debug)]
pub(super) struct TempFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    renamed: bool,
}

impl TempFile {
    pub(super) fn create(dir: &Path) -> io::Result<TempFile> {
        let name = format!("{:032x}", rand::random::<u128>());
        let path = dir.join(name);
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(TempFile { file, path, renamed: false })
    }

    pub(super) fn rename(&mut self, to: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, to)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if !self.renamed {
            // What stays is found by the cleaning at the next start.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Takes the lock file exclusively, across processes. Released when dropped.
pub(super) fn lock(path: &Path) -> io::Result<Flock<File>> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(held),
            Err((_, errno)) if errno != nix::errno::Errno::EWOULDBLOCK => return Err(errno.into()),
            Err((back, _)) if start.elapsed() < LOCK_PATIENCE => file = back,
            Err(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("{} is locked by another process", path.display()),
                ));
            }
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Sets the attribute. `false`: this file system has no room or no place for it.
pub(super) fn set_xattr(file: &File, value: &[u8]) -> io::Result<bool> {
    // SAFETY: the name is NUL terminated, the value is valid for its length, and the
    // descriptor is open; the kernel keeps neither.
    let rc = unsafe {
        libc::fsetxattr(file.as_raw_fd(), XATTR.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if rc == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // ENOSPC is also how ext4 says that the value exceeds its attribute block; a disk that
        // is really full says so again when the sidecar is written.
        Some(libc::ENOTSUP | libc::ENOSPC | libc::E2BIG | libc::EPERM | libc::ENOSYS) => Ok(false),
        _ => Err(error),
    }
}

/// The attribute's value; `None`: there is none.
pub(super) fn get_xattr(file: &File) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0_u8; XATTR_MAX];
    // SAFETY: the name is NUL terminated, the buffer is writable for its length, and the
    // descriptor is open; the kernel keeps neither.
    let rc = unsafe {
        libc::fgetxattr(file.as_raw_fd(), XATTR.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    if let Ok(len) = usize::try_from(rc) {
        value.truncate(len);
        return Ok(Some(value));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENODATA | libc::ENOTSUP | libc::ENOSYS) => Ok(None),
        _ => Err(error),
    }
}
