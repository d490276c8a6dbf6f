//! Where sockets are, and how a mount is found.
//!
//! The socket itself lies in the state directory (or where `admin.socket` says). The run
//! directory holds one symbolic link per mount, named after its mount point. A link whose
//! socket nobody answers on is left over from a daemon that was killed; the next mount on the
//! same mount point replaces it.

use crate::config::escape_path;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// The run directory: `$VMAILFS_RUN_DIR`, or `/run/vmailfs`.
pub fn run_dir() -> PathBuf {
    match std::env::var_os("VMAILFS_RUN_DIR") {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ => PathBuf::from("/run/vmailfs"),
    }
}

/// The link of a mount point (an absolute path without symbolic links).
pub fn link_of(run_dir: &Path, mountpoint: &Path) -> PathBuf {
    run_dir.join(format!("{}.sock", escape_path(mountpoint)))
}

/// The links that exist, by name.
pub fn registered(run_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut links = Vec::new();
    match std::fs::read_dir(run_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(links),
        Err(e) => return Err(e),
        Ok(entries) => {
            for entry in entries {
                let path = entry?.path();
                if path.extension().is_some_and(|e| e == "sock") {
                    links.push(path);
                }
            }
        }
    }
    links.sort();
    Ok(links)
}

/// A link that goes away with the mount it names.
#[derive(Debug)]
pub struct Registration {
    link: PathBuf,
    socket: PathBuf,
}

impl Registration {
    /// Makes the link, replacing one that was left over.
    pub fn new(run_dir: &Path, mountpoint: &Path, socket: &Path) -> io::Result<Registration> {
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(run_dir)?;
        let link = link_of(run_dir, mountpoint);
        let temp = link.with_extension(format!("new{}", std::process::id()));
        match std::fs::remove_file(&temp) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => symlink(socket, &temp)?,
        }
        std::fs::rename(&temp, &link)?;
        Ok(Registration { link, socket: socket.to_owned() })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // A later mount may have put its own link there.
        if std::fs::read_link(&self.link).is_ok_and(|to| to == self.socket) {
            let _ = std::fs::remove_file(&self.link);
        }
    }
}

/// A socket's address of any length: `sun_path` holds 107 bytes, so the directory is opened and
/// named through `/proc/self/fd`. The directory stays open as long as this value lives.
#[derive(Debug)]
pub(super) struct Address {
    _dir: OwnedFd,
    path: PathBuf,
}

impl Address {
    pub(super) fn of(socket: &Path) -> io::Result<Address> {
        let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no path of a socket"));
        };
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let fd = open(dir, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd())).join(name);
        Ok(Address { _dir: fd, path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
