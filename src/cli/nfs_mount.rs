//! `vmailfs mount nfs:///srv/nfs/vmail`: the NFS mode as a mount that answers the admin.

use super::exit::{Code, Failure};
use super::heart;
use crate::admin::caches::FlushRequest;
use crate::admin::gc::{GcReport, GcRequest};
use crate::admin::metrics::{self, Numbers};
use crate::admin::{
    AdminApi, AdminError, Count, ErrorKind, FlushReport, HostchangeStatus, OperationCount,
    Progress, Status, StopReport,
};
use crate::config::Settings;
use crate::fuse::mount::{MountOptions, mount_straight};
use crate::fuse::mounted::{Mounted, Unmounted};
use crate::fuse::stats::{FuseStats, Op};
use crate::hostchange::check::Host;
use crate::hostchange::straight::{self, Straight};
use crate::store::HealthNow;
use crate::vmail::counts::CountsNow;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::task::JoinHandle;

/// The server may be slow to answer, and each thread waits for its own answer.
const THREADS: usize = 16;
/// How often the size of all list indexes is looked at.
const SWEEP: Duration = Duration::from_secs(60);
/// Descriptors for other things than what the kernel knows: open files, locks, sockets.
const SPARE: u64 = 4;

/// See the module.
pub(super) struct NfsMount {
    fs: Arc<Straight>,
    settings: Settings,
    since: SystemTime,
    state: Mutex<State>,
    fuse: Arc<FuseStats>,
    /// Bytes below `listindex_root`, as of the last look.
    used: Arc<AtomicU64>,
    housekeeping: JoinHandle<()>,
}

struct State {
    mounted: Option<Mounted>,
    stopping: bool,
}

impl fmt::Debug for NfsMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NfsMount").field("mountpoint", &self.settings.mountpoint).finish()
    }
}

impl NfsMount {
    /// Mounts; in a tokio runtime. The future ends when the kernel has let go of the mount.
    pub(super) fn start(
        settings: &Settings,
        root: &Path,
    ) -> Result<(NfsMount, impl Future<Output = ()> + Send + use<>), Failure> {
        // The kernel has applied the callers' umask.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        let files = raise_open_files();
        let fs = Straight::new(file_system(settings, root, files)?).map_err(|e| {
            let text = format!("{}: {e}: mount NFS there first", root.display());
            Failure::new(Code::Unavailable, text)
        })?;
        let fs = Arc::new(fs);
        let threads = if settings.fuse_threads > 0 { settings.fuse_threads } else { THREADS };
        let options = MountOptions {
            allow_other: settings.allow_other,
            nonempty: settings.nonempty,
            fsname: settings.store.url.clone(),
            n_threads: Some(threads),
            passthrough: settings.passthrough,
            ..MountOptions::new(&settings.mountpoint)
        };
        let runtime = tokio::runtime::Handle::current();
        let lock_wait = settings.hostchange.lock_wait;
        let mounted = mount_straight(fs.clone(), runtime, lock_wait, &options)?;
        let ended = mounted.ended();
        let gone = async move {
            if let Err(error) = ended.await {
                tracing::error!(error, "the kernel's connection failed");
            }
        };
        let used = Arc::new(AtomicU64::new(0));
        let housekeeping = tokio::spawn(housekeeping(
            fs.clone(),
            used.clone(),
            settings.hostchange.listindex_max_size,
        ));
        let fuse = mounted.stats();
        let state = Mutex::new(State { mounted: Some(mounted), stopping: false });
        let since = SystemTime::now();
        let settings = settings.clone();
        Ok((NfsMount { fs, settings, since, state, fuse, used, housekeeping }, gone))
    }
}

fn file_system(
    settings: &Settings,
    root: &Path,
    files: u64,
) -> Result<straight::Settings, Failure> {
    let h = &settings.hostchange;
    let host = Host::new(Some(settings.backend.clone()))
        .map_err(|text| Failure::new(Code::Config, format!("backend: {text}")))?;
    if h.listindex_root.starts_with(root) {
        let text = "hostchange.listindex_root lies on NFS: choose a place on this machine";
        return Err(Failure::new(Code::Config, text));
    }
    let known = files - files / SPARE;
    Ok(straight::Settings {
        root: root.to_owned(),
        layout: heart::layout(settings)?,
        index_dir: h.index_dir.clone(),
        listindex_root: h.listindex_root.clone(),
        listindex_layout: h.listindex_layout.clone(),
        host,
        login_idle: h.login_idle,
        migration: h.migration,
        ttl: h.attribute_cache,
        max_known: usize::try_from(known).unwrap_or(usize::MAX),
    })
}

/// Lets this process have as many open files as the system allows, and tells how many.
fn raise_open_files() -> u64 {
    let allowed = std::fs::read_to_string("/proc/sys/fs/nr_open");
    let allowed = allowed.ok().and_then(|text| text.trim().parse::<u64>().ok());
    let wanted = allowed.unwrap_or(4096).min(1 << 20);
    let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `now` is a valid place for the answer.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut now) } != 0 {
        return 1024;
    }
    // Root may raise the hard limit as well; others get what that is.
    for max in [wanted.max(now.rlim_max), now.rlim_max] {
        let limit = libc::rlimit { rlim_cur: max.min(wanted), rlim_max: max };
        // SAFETY: `limit` is valid for the call.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0 {
            return limit.rlim_cur;
        }
    }
    now.rlim_cur
}

/// Ends the sessions of those who have gone, and keeps the list indexes within their size.
async fn housekeeping(fs: Arc<Straight>, used: Arc<AtomicU64>, max: u64) {
    let pause =
        (fs.settings().login_idle / 4).clamp(Duration::from_millis(20), Duration::from_secs(15));
    let mut swept = None;
    loop {
        let (fs, used) = (fs.clone(), used.clone());
        let due = swept.is_none_or(|at: tokio::time::Instant| at.elapsed() >= SWEEP);
        if due {
            swept = Some(tokio::time::Instant::now());
        }
        let work = tokio::task::spawn_blocking(move || {
            fs.users().tick(false);
            if due {
                match fs.users().clean(None, Some(max)) {
                    Ok(left) => used.store(left.left, Ordering::Relaxed),
                    Err(trouble) => tracing::warn!("list indexes cannot be counted: {trouble}"),
                }
            }
        });
        if let Err(error) = work.await {
            tracing::error!(%error, "housekeeping failed");
        }
        tokio::time::sleep(pause).await;
    }
}

fn not_here() -> AdminError {
    AdminError::new(ErrorKind::Usage, "there is no object store behind this mount (NFS mode)")
}

#[async_trait]
impl AdminApi for NfsMount {
    /// Everything is on NFS as soon as it is written.
    async fn flush(&self, _: FlushRequest, _: &Progress) -> Result<FlushReport, AdminError> {
        Ok(FlushReport::default())
    }

    async fn gc(&self, _: GcRequest, _: &Progress) -> Result<GcReport, AdminError> {
        Err(not_here())
    }

    async fn status(&self) -> Status {
        let s = &self.settings;
        let errors = self.fuse.errors();
        let used = Op::ALL.iter().copied().filter(|op| self.fuse.requests(*op) > 0);
        let operations = used.map(|op| OperationCount {
            operation: op.name().to_owned(),
            count: self.fuse.requests(op),
            waited: self.fuse.waits(op),
            errors: errors.iter().filter(|(of, _, _)| *of == op).map(|(_, _, n)| n).sum(),
            mean_seconds: self.fuse.answers(op).mean().map_or(0.0, |mean| mean.as_secs_f64()),
        });
        let counts = self.fs.users().counts();
        let hostchange = HostchangeStatus {
            host: s.backend.clone(),
            listindex_root: s.hostchange.listindex_root.display().to_string(),
            used: self.used.load(Ordering::Relaxed),
            max: s.hostchange.listindex_max_size,
            active: counts.active,
            kept: counts.kept,
            dropped: counts.dropped,
            failed: counts.failed,
            contested: counts.contested,
            evicted: counts.evicted,
            known: self.fs.known() as u64,
        };
        let counted = |(op, errno, count): &(Op, i32, u64)| Count {
            name: format!("{} {}", op.name(), metrics::errno_name(*errno)),
            count: *count,
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            mountpoint: s.mountpoint.display().to_string(),
            store: s.store.url.clone(),
            state_dir: s.state_dir.display().to_string(),
            backend: s.backend.clone(),
            since: self.since.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64),
            stopping: self.state.lock().stopping,
            users_open: counts.active,
            operations: operations.collect(),
            errors: errors.iter().map(counted).collect(),
            hostchange: Some(hostchange),
            ..Status::default()
        }
    }

    async fn metrics(&self) -> String {
        metrics::text(Numbers {
            status: self.status().await,
            store: Vec::new(),
            health: HealthNow::default(),
            wire_requests: None,
            fuse: Some(self.fuse.clone()),
            heart: CountsNow::default(),
        })
    }

    async fn stop(&self, progress: &Progress) -> Result<StopReport, AdminError> {
        self.state.lock().stopping = true;
        let mounted = self.state.lock().mounted.take();
        let mut report = StopReport::default();
        if let Some(mounted) = mounted {
            progress.say("unmounting");
            // Holders of open files are not waited for long: they may never end.
            let outcome = mounted.unmount(Duration::from_secs(1)).await.map_err(|e| {
                AdminError::new(ErrorKind::Internal, format!("cannot unmount: {e}"))
            })?;
            if let Unmounted::Detached { holders, .. } = outcome.how {
                report.holders = holders.iter().map(ToString::to_string).collect();
            }
        }
        self.housekeeping.abort();
        progress.say("ending sessions");
        let fs = self.fs.clone();
        let ending = tokio::task::spawn_blocking(move || fs.users().tick(true));
        // A server that does not answer is not waited for: what was not settled is not trusted.
        if tokio::time::timeout(self.settings.unmount_timeout, ending).await.is_err() {
            tracing::warn!(
                "the NFS server does not answer: list indexes are dropped at the next login"
            );
        }
        Ok(report)
    }
}
