//! A mount while it is served, and how it ends.
//!
//! The ways:
//! * [`Mounted::unmount`], which detaches a busy one (its holders keep their open files until
//!   they close them or the process ends);
//! * `umount(8)` by an admin: the kernel ends the session, [`Mounted::ended`] resolves, and the
//!   caller flushes as after any other end;
//! * dropping [`Mounted`]: a start that failed later leaves nothing half-mounted.
//!
//! The kernel does not send RELEASE for all handles when a mount ends: after `ended` every
//! handle counts as released.

use super::holders::{Holder, holders};
use super::mount::FSTYPE;
use super::mountinfo::{self, MountEntry};
use super::notify::Invalidations;
use super::stats::FuseStats;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// A busy mount is tried this often: whoever looks around (`updatedb`) is soon gone.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
/// How long the kernel may take to unmount. It does not wait for holders, but it forgets every
/// inode that it knows, and that may be a million.
const KERNEL_PATIENCE: Duration = Duration::from_secs(20);

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
    over: SessionEnd,
    settled: bool,
}

/// Our mount, told from others by id and device. The kernel gives both to other mounts once
/// ours is gone, so they count only while the session lives (the device is taken then), or for
/// a dead mount that is left where ours was.
#[derive(Debug, Clone)]
pub(super) struct Place {
    mountpoint: PathBuf,
    id: u64,
    device: (u32, u32),
}

type SessionEnd = watch::Receiver<Option<Result<(), String>>>;

impl Place {
    /// Right after mounting there.
    pub(super) fn of_new_mount(mountpoint: &Path) -> io::Result<Place> {
        let mounts = mountinfo::read()?;
        let top = mountinfo::top(&mounts, mountpoint).filter(|m| m.fstype == FSTYPE);
        let MountEntry { id, device, .. } =
            top.ok_or_else(|| io::Error::other("the new mount is not there"))?;
        Ok(Place { mountpoint: mountpoint.to_owned(), id: *id, device: *device })
    }

    fn is(&self, mount: &MountEntry) -> bool {
        mount.id == self.id && mount.device == self.device && mount.fstype == FSTYPE
    }

    fn on_top(&self, mounts: &[MountEntry]) -> bool {
        mountinfo::top(mounts, &self.mountpoint).is_some_and(|m| self.is(m))
    }

    /// Whether a mount without a daemon is there.
    fn dead(&self) -> bool {
        let stat = std::fs::metadata(&self.mountpoint);
        stat.is_err_and(|e| matches!(e.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)))
    }

    /// Whether the mount still exists, anywhere.
    fn exists(&self, mounts: &[MountEntry], over: &SessionEnd) -> bool {
        if over.borrow().is_some() {
            self.on_top(mounts) && self.dead()
        } else {
            mounts.iter().any(|m| self.is(m))
        }
    }

    /// Unmounts; blocks.
    fn unmount(&self, over: &SessionEnd) -> io::Result<Unmounted> {
        for tried in 1.. {
            let mounts = mountinfo::read()?;
            if !self.exists(&mounts, over) {
                return Ok(Unmounted::Before);
            }
            match mountinfo::top(&mounts, &self.mountpoint) {
                Some(_) if self.on_top(&mounts) => {}
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
    pub(super) fn new(
        place: Place,
        invalidations: Invalidations,
        stats: Arc<FuseStats>,
        over: SessionEnd,
    ) -> Mounted {
        Mounted { place, invalidations, stats, over, settled: false }
    }

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
        let (place, over) = (self.place.clone(), self.over.clone());
        let (tell, told) = oneshot::channel();
        // Not on the runtime's own threads: the kernel may first write back pages of writable
        // mappings, and a runtime that shuts down would wait for that.
        std::thread::Builder::new().name("fuse-unmount".into()).spawn(move || {
            // Nobody listens after the time is over.
            let _ = tell.send(place.unmount(&over));
        })?;
        let how = match tokio::time::timeout(grace.max(KERNEL_PATIENCE), told).await {
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
            self.place.on_top(&mounts) && self.place.exists(&mounts, &self.over)
        });
        if ours {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            let _ = umount2(&self.place.mountpoint, flags);
        }
    }
}
