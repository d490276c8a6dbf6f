//! Mounting, watching and unmounting.
//!
//! The mount is made with `mount(2)` and ended with `umount2(2)` here, not by fuser: so the
//! type is `fuse.vmailfs`, a busy mount can be tried again, and what is unmounted is this mount
//! and nothing that came to the same place later. A mount is known by its id and device.
//!
//! How a mount can end:
//! * [`Mounted::unmount`], which detaches a busy one (its holders keep their open files until
//!   they close them or the process ends);
//! * `umount(8)` by an admin: the kernel ends the session, [`Mounted::ended`] resolves, and the
//!   caller flushes as after any other end;
//! * dropping [`Mounted`]: a start that failed later leaves nothing half-mounted.
//!
//! The kernel does not send RELEASE for all handles when a mount ends: after `ended` every
//! handle counts as released.

use super::adapter::Adapter;
use super::holders::{Holder, holders};
use super::mountinfo::{self, MountEntry};
use super::notify::Invalidations;
use super::stats::FuseStats;
use crate::fs::api::MailFs;
use fuser::{Config, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

/// The type of our mounts, in `/proc/mounts` and for `mount -t`.
pub const FSTYPE: &str = "fuse.vmailfs";

/// A busy mount is tried this often: whoever looks around (`updatedb`) is soon gone.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);

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

/// How an unmount went. However it went, the caller flushes next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unmounted {
    /// By this call.
    Clean,
    /// Somebody else had done it.
    Before,
    /// It was busy: gone from its place, but these still hold files in it (empty: unknown).
    Detached { holders: Vec<Holder>, mounts_inside: Vec<PathBuf> },
    /// Something else is mounted over it, which is left alone; so this mount stays, dead once
    /// the process ends.
    Covered { by: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmountOutcome {
    pub how: Unmounted,
    /// Whether the kernel is done with the daemon: no request will come any more. If not, open
    /// handles go on working until the process ends.
    pub session_over: bool,
}

/// A mount that is being served.
#[derive(Debug)]
pub struct Mounted {
    place: Place,
    invalidations: Invalidations,
    stats: Arc<FuseStats>,
    over: watch::Receiver<Option<Result<(), String>>>,
    settled: bool,
}

/// Our mount, told from others at the same path.
#[derive(Debug, Clone)]
struct Place {
    mountpoint: PathBuf,
    id: u64,
    device: (u32, u32),
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
    let fsname = check_fsname(&options.fsname)?;
    let mountpoint = check_mountpoint(options)?;
    fill_stdio().map_err(MountError::io("opening /dev/null"))?;
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::NoDevice)?;

    let invalidations = Invalidations::default();
    let notes = invalidations.clone();
    fs.set_invalidator(Box::new(move |note| notes.push(note)));
    let adapter = Adapter::new(fs, rt, options.passthrough, options.max_background);
    let stats = adapter.stats();

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
    serve(adapter, device.into(), options, &invalidations, tell)
        .map_err(MountError::io("starting the FUSE session"))
        .map_err(detach)?;
    Ok(Mounted { place, invalidations, stats, over, settled: false })
}

/// Starts the session's threads, and one that sees them end.
fn serve(
    adapter: Adapter,
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
        let result = session.join().map_err(|error| error.to_string());
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

impl Place {
    fn of_new_mount(mountpoint: &Path) -> io::Result<Place> {
        let mounts = mountinfo::read()?;
        let top = mountinfo::top(&mounts, mountpoint).filter(|m| m.fstype == FSTYPE);
        let MountEntry { id, device, .. } =
            top.ok_or_else(|| io::Error::other("the new mount is not there"))?;
        Ok(Place { mountpoint: mountpoint.to_owned(), id: *id, device: *device })
    }

    fn is(&self, mount: &MountEntry) -> bool {
        mount.id == self.id && mount.device == self.device && mount.fstype == FSTYPE
    }

    /// Unmounts; blocks.
    fn unmount(&self) -> io::Result<Unmounted> {
        for tried in 1.. {
            let mounts = mountinfo::read()?;
            if !mounts.iter().any(|m| self.is(m)) {
                return Ok(Unmounted::Before);
            }
            match mountinfo::top(&mounts, &self.mountpoint) {
                Some(top) if self.is(top) => {}
                Some(other) => {
                    let by = format!("{} ({})", other.fstype, other.source.to_string_lossy());
                    return Ok(Unmounted::Covered { by });
                }
                None => {
                    let by = "a mount on a directory above it, or it was moved".to_owned();
                    return Ok(Unmounted::Covered { by });
                }
            }
            match umount2(&self.mountpoint, MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => return Ok(Unmounted::Clean),
                Err(Errno::EBUSY) if tried < BUSY_TRIES => std::thread::sleep(BUSY_PAUSE),
                Err(Errno::EBUSY) => return self.detach(&mounts),
                // Gone meanwhile: looked at again.
                Err(Errno::EINVAL | Errno::ENOENT) if tried < BUSY_TRIES => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Unmounted::Before)
    }

    fn detach(&self, mounts: &[MountEntry]) -> io::Result<Unmounted> {
        let holders = holders(&self.mountpoint);
        let mounts_inside = mounts
            .iter()
            .filter(|m| !self.is(m) && m.mountpoint.starts_with(&self.mountpoint))
            .map(|m| m.mountpoint.clone())
            .collect();
        umount2(&self.mountpoint, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        Ok(Unmounted::Detached { holders, mounts_inside })
    }
}

impl Mounted {
    /// Absolute, without symbolic links.
    pub fn mountpoint(&self) -> &Path {
        &self.place.mountpoint
    }

    pub fn stats(&self) -> Arc<FuseStats> {
        self.stats.clone()
    }

    /// Where notes for the kernel go; the file system was given it already.
    pub fn notifier(&self) -> &Invalidations {
        &self.invalidations
    }

    /// Waits until no request will come any more: it was unmounted and nobody holds a file in
    /// it. An error tells why the session failed. May be waited for after `unmount`, too.
    pub fn ended(&self) -> impl Future<Output = Result<(), String>> + Send + use<> {
        let mut over = self.over.clone();
        async move {
            match over.wait_for(Option::is_some).await {
                Ok(result) => result.clone().unwrap_or(Ok(())),
                Err(_) => Err("the thread that watches the session is gone".to_owned()),
            }
        }
    }

    /// Unmounts, unless that was done already, and waits up to `grace` for the session to end.
    /// A busy mount is detached, and its holders are logged.
    ///
    /// # Errors
    /// The kernel refused and the mount is still there, or it is not done in time.
    pub async fn unmount(mut self, grace: Duration) -> io::Result<UnmountOutcome> {
        self.settled = true;
        let place = self.place.clone();
        let (tell, told) = oneshot::channel();
        // Not on the runtime's own threads: the kernel may first write back pages of writable
        // mappings, and a runtime that shuts down would wait for that.
        std::thread::Builder::new().name("fuse-unmount".into()).spawn(move || {
            // Nobody listens after the time is over.
            let _ = tell.send(place.unmount());
        })?;
        let how = match tokio::time::timeout(grace.max(BUSY_PAUSE * (BUSY_TRIES + 1)), told).await {
            Ok(Ok(result)) => result?,
            Ok(Err(_)) => return Err(io::Error::other("the unmounting thread is gone")),
            Err(_) => return Err(io::Error::from(io::ErrorKind::TimedOut)),
        };
        self.log(&how);
        let session_over = match how {
            // Without an end in sight: it ends with the process.
            Unmounted::Covered { .. } => self.over.borrow().is_some(),
            _ => tokio::time::timeout(grace, self.ended()).await.is_ok(),
        };
        Ok(UnmountOutcome { how, session_over })
    }

    fn log(&self, how: &Unmounted) {
        let mountpoint = self.place.mountpoint.display();
        match how {
            Unmounted::Clean | Unmounted::Before => {
                tracing::info!(%mountpoint, "unmounted");
            }
            Unmounted::Detached { holders, mounts_inside } => {
                let waiting = self.stats.waiting();
                tracing::warn!(%mountpoint, waiting, "busy, so it was detached");
                for holder in holders {
                    tracing::warn!(%mountpoint, "still used by {holder}");
                }
                for inside in mounts_inside {
                    tracing::warn!(%mountpoint, "still used by the mount {}", inside.display());
                }
            }
            Unmounted::Covered { by } => {
                tracing::warn!(%mountpoint, by, "mounted over by something else: left as it is");
            }
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let ours = mountinfo::read().is_ok_and(|mounts| {
            mountinfo::top(&mounts, &self.place.mountpoint).is_some_and(|m| self.place.is(m))
        });
        if ours {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            let _ = umount2(&self.place.mountpoint, flags);
        }
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
