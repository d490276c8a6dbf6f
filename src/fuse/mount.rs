//! Mounting; [`super::mounted`] tells how it ends.
//!
//! The mount is made with `mount(2)` and ended with `umount2(2)` here, not by fuser: so the
//! type is `fuse.vmailfs`, a busy mount can be tried again, and what is unmounted is this mount
//! and nothing that came to the same place later. A mount is known by its id and device.

use super::adapter::Adapter;
use super::mounted::{Mounted, Place};
use super::mountinfo;
use super::notify::Invalidations;
use super::stats::FuseStats;
use super::straight;
use crate::fs::api::MailFs;
use crate::hostchange::straight::Straight;
use fuser::{Config, Filesystem, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// The type of our mounts, in `/proc/mounts` and for `mount -t`.
pub const FSTYPE: &str = "fuse.vmailfs";

/// Where and how to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// An existing directory.
    pub mountpoint: PathBuf,
    /// Other users than the one who mounts may enter (mail servers need it).
    pub allow_other: bool,
    /// The kernel checks permissions by mode, uid and gid.
    pub default_permissions: bool,
    pub read_only: bool,
    /// Mount over a directory that holds something, which is hidden meanwhile.
    pub nonempty: bool,
    /// The first word in `/proc/mounts`; no control characters, at most 1000 bytes.
    pub fsname: String,
    /// Threads that serve the kernel; default: one per core, at least 2.
    pub n_threads: Option<usize>,
    /// Let the kernel read local copies of mails directly, where it can.
    pub passthrough: bool,
    /// Read-ahead requests in flight.
    pub max_background: u16,
}

impl MountOptions {
    pub fn new(mountpoint: impl Into<PathBuf>) -> MountOptions {
        MountOptions {
            mountpoint: mountpoint.into(),
            allow_other: true,
            default_permissions: true,
            read_only: false,
            nonempty: false,
            fsname: "vmailfs".into(),
            n_threads: None,
            passthrough: true,
            max_background: 64,
        }
    }
}

/// Why there is no mount. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("mountpoint {0}: no such directory; create it first")]
    Missing(PathBuf),
    #[error("mountpoint {0}: not a directory")]
    NotADirectory(PathBuf),
    #[error("mountpoint {0}: not empty; give option nonempty to hide what it holds")]
    NotEmpty(PathBuf),
    #[error("mountpoint {path}: in use, {fstype} ({fs_source}) is mounted there; unmount it first")]
    InUse { path: PathBuf, fstype: String, fs_source: String },
    #[error("cannot open /dev/fuse: {0}; is the kernel module loaded (modprobe fuse)?")]
    NoDevice(io::Error),
    #[error("not permitted to mount at {0}; run as root (CAP_SYS_ADMIN is needed)")]
    NotPermitted(PathBuf),
    #[error("mount option {option}: {reason}")]
    Option { option: &'static str, reason: String },
    #[error("{doing}: {error}")]
    Io { doing: String, error: io::Error },
}

impl MountError {
    fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> MountError {
        let doing = doing.into();
        move |error| MountError::Io { doing, error }
    }
}

/// Mounts `fs` and starts to serve it; what must wait runs on `rt`.
///
/// # Errors
/// Nothing is mounted then.
pub fn mount(
    fs: Arc<dyn MailFs>,
    rt: Handle,
    options: &MountOptions,
) -> Result<Mounted, MountError> {
    let invalidations = Invalidations::default();
    let notes = invalidations.clone();
    fs.set_invalidator(Box::new(move |note| notes.push(note)));
    let adapter = Adapter::new(fs, rt, options.passthrough, options.max_background);
    let stats = adapter.stats();
    attach(adapter, stats, &invalidations, options)
}

/// Mounts the file system of the NFS mode. `lock_wait`: how long a process waits for a lock.
///
/// # Errors
/// Nothing is mounted then.
pub fn mount_straight(
    fs: Arc<Straight>,
    rt: Handle,
    lock_wait: Duration,
    options: &MountOptions,
) -> Result<Mounted, MountError> {
    let notes = Invalidations::default();
    let adapter = straight::Adapter::new(fs, rt, notes.clone(), lock_wait, options.passthrough);
    let stats = adapter.stats();
    attach(adapter, stats, &notes, options)
}

/// Mounts, and serves with whatever answers the kernel.
fn attach(
    adapter: impl Filesystem,
    stats: Arc<FuseStats>,
    invalidations: &Invalidations,
    options: &MountOptions,
) -> Result<Mounted, MountError> {
    let fsname = check_fsname(&options.fsname)?;
    let mountpoint = check_mountpoint(options)?;
    fill_stdio().map_err(MountError::io("opening /dev/null"))?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::NoDevice)?;

    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    flags |= MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, options.read_only);
    let data = mount_data(&device, options);
    nix::mount::mount(Some(fsname), &mountpoint, Some(FSTYPE), flags, Some(data.as_str()))
        .map_err(|errno| match errno {
            Errno::EPERM => MountError::NotPermitted(mountpoint.clone()),
            errno => MountError::io(format!("mounting at {}", mountpoint.display()))(errno.into()),
        })?;
    let detach = |error| {
        let _ = umount2(&mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        error
    };
    let place = Place::of_new_mount(&mountpoint)
        .map_err(MountError::io("reading /proc/self/mountinfo"))
        .map_err(detach)?;

    let (tell, over) = watch::channel(None);
    serve(adapter, device.into(), options, invalidations, tell)
        .map_err(MountError::io("starting the FUSE session"))
        .map_err(detach)?;
    Ok(Mounted::new(place, invalidations.clone(), stats, over))
}

/// Starts the session's threads, and one that sees them end.
fn serve(
    adapter: impl Filesystem,
    device: OwnedFd,
    options: &MountOptions,
    invalidations: &Invalidations,
    tell: watch::Sender<Option<Result<(), String>>>,
) -> io::Result<()> {
    let mut config = Config::default();
    let acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.acl = acl;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    config.n_threads = Some(options.n_threads.unwrap_or(cores.max(2)).max(1));
    config.clone_fd = true;
    let session = Session::from_fd(adapter, device, acl, config)?;
    let notifier = session.notifier();
    let session = session.spawn()?;
    invalidations.start(notifier)?;
    let invalidations = invalidations.clone();
    std::thread::Builder::new().name("fuse-session".into()).spawn(move || {
        let result = match session.join() {
            // A thread had just taken a request (the last RELEASE) when the mount ended: the
            // usual end, though not a usual errno.
            Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
            result => result.map_err(|error| error.to_string()),
        };
        invalidations.close();
        if let Err(error) = &result {
            tracing::error!(error, "the FUSE session failed");
        }
        tell.send_replace(Some(result));
    })?;
    Ok(())
}

fn mount_data(device: &File, options: &MountOptions) -> String {
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={}",
        device.as_raw_fd(),
        nix::unistd::geteuid(),
        nix::unistd::getegid()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    data
}

/// `mount(2)` takes the name as an argument of its own, so commas are harmless; control
/// characters would only make `/proc/mounts` hard to read.
fn check_fsname(name: &str) -> Result<&str, MountError> {
    let refuse =
        |reason: &str| Err(MountError::Option { option: "fsname", reason: reason.to_owned() });
    match name {
        "" => refuse("must not be empty"),
        name if name.len() > 1000 => refuse("must be at most 1000 bytes"),
        name if name.chars().any(char::is_control) => refuse("must not hold control characters"),
        name => Ok(name),
    }
}

/// The mountpoint without symbolic links. A dead mount of ours is cleared away first.
fn check_mountpoint(options: &MountOptions) -> Result<PathBuf, MountError> {
    let given = &options.mountpoint;
    let looking = || MountError::io(format!("mountpoint {}", given.display()));
    loop {
        // A dead mount answers ENOTCONN to everything, so its own path cannot be resolved.
        let (path, dead) = match given.canonicalize().and_then(|p| Ok((p.metadata()?, p))) {
            Ok((meta, path)) if meta.is_dir() => (path, false),
            Ok((_, path)) => return Err(MountError::NotADirectory(path)),
            Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => {
                (resolve_parent(given).map_err(looking())?, true)
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {
                return Err(MountError::Missing(given.clone()));
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOTDIR) => {
                return Err(MountError::NotADirectory(given.clone()));
            }
            Err(e) => return Err(looking()(e)),
        };
        let mounts = mountinfo::read().map_err(looking())?;
        match mountinfo::top(&mounts, &path) {
            Some(top) if dead && top.fstype == FSTYPE => {
                tracing::warn!(mountpoint = %path.display(), "detaching a dead vmailfs mount");
                umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
                    .map_err(|errno| looking()(errno.into()))?;
                continue;
            }
            Some(top) if dead || top.is_fuse() => {
                return Err(MountError::InUse {
                    path,
                    fstype: top.fstype.clone(),
                    fs_source: top.source.to_string_lossy().into_owned(),
                });
            }
            None if dead => return Err(looking()(io::Error::from_raw_os_error(libc::ENOTCONN))),
            _ => {}
        }
        if !options.nonempty && path.read_dir().map_err(looking())?.next().is_some() {
            return Err(MountError::NotEmpty(path));
        }
        return Ok(path);
    }
}

fn resolve_parent(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => Ok(path),
    }
}

/// Opens /dev/null for each of stdin, stdout, stderr that is closed: a device that got one of
/// their numbers would receive what is printed.
fn fill_stdio() -> io::Result<()> {
    loop {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        let _stays_open = null.into_raw_fd();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fsname_may_hold_commas_but_no_newline() {
        assert!(check_fsname("s3://bucket/a,b c").is_ok());
        for bad in ["", "a\nb", &"x".repeat(1001)] {
            assert!(matches!(check_fsname(bad), Err(MountError::Option { .. })));
        }
    }

    #[test]
    fn mountpoints_that_cannot_be() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = MountOptions::new(dir.path().join("missing"));
        assert!(matches!(check_mountpoint(&options), Err(MountError::Missing(_))));
        std::fs::write(dir.path().join("file"), "").unwrap();
        options.mountpoint = dir.path().join("file");
        assert!(matches!(check_mountpoint(&options), Err(MountError::NotADirectory(_))));
        options.mountpoint = dir.path().join("file/below");
        assert!(matches!(check_mountpoint(&options), Err(MountError::NotADirectory(_))));
        options.mountpoint = dir.path().to_owned();
        assert!(matches!(check_mountpoint(&options), Err(MountError::NotEmpty(_))));
        options.nonempty = true;
        assert_eq!(check_mountpoint(&options).unwrap(), dir.path().canonicalize().unwrap());
    }
}
