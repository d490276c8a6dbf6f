//! A mount and what is below it, as one thing that answers the admin.

use super::exit::{Code, Failure};
use crate::admin::caches::{CacheAnswer, CacheRequest, FlushRequest};
use crate::admin::care::{Care, Cared};
use crate::admin::gc::{GcReport, GcRequest};
use crate::admin::metrics::{self, Numbers};
use crate::admin::{
    AdminApi, AdminError, Count, ErrorKind, FlushReport, OperationCount, Progress, RequestCount,
    Status, StopReport, StoreHealth,
};
use crate::config::{Checksums, Settings, StoreSettings};
use crate::fs::api::MailFs;
use crate::fuse::mount::{MountError, MountOptions, mount};
use crate::fuse::mounted::{Mounted, Unmounted};
use crate::fuse::stats::{FuseStats, Op};
use crate::store::counted::CountedStore;
use crate::store::probe::{ProbeError, probe};
use crate::store::s3::S3Config;
use crate::store::unconditional::Unconditional;
use crate::store::url::{StoreUrl, open_store};
use crate::store::{ObjectStore, StoreError};
use crate::vmail::counts::CountsNow;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What is asked of the heart beside file operations.
#[async_trait]
pub(super) trait Heart: Send + Sync + 'static {
    async fn flush(
        &self,
        what: FlushRequest,
        progress: &Progress,
    ) -> Result<FlushReport, AdminError>;

    /// Something about the caches, or about whole users.
    async fn caches(
        &self,
        what: CacheRequest,
        progress: &Progress,
    ) -> Result<CacheAnswer, AdminError>;

    /// Deletes what was dropped longer than the retention ago.
    async fn gc(&self, what: GcRequest, progress: &Progress) -> Result<GcReport, AdminError>;

    /// Fills in what it knows: users, risk, caches, lease, errors.
    async fn status(&self, status: &mut Status);

    /// What it did so far.
    fn counts(&self) -> CountsNow;

    /// Does something for users' data.
    async fn care(&self, what: Care, progress: &Progress) -> Result<Cared, AdminError>;

    /// After the unmount: flushes what is left within `patience`, gives users back, and tells
    /// what stays on local disk only. `holders` is left empty.
    async fn finish(&self, patience: Duration, progress: &Progress) -> StopReport;
}

/// Opens the store and proves that it can hold mail.
pub(super) async fn open(settings: &Settings) -> Result<Arc<CountedStore>, Failure> {
    let s = &settings.store;
    let url: StoreUrl = s.url.parse().map_err(|e| Failure::new(Code::Config, format!("{e}")))?;
    let bare = open_store(&url, &s3_config(s)).await?;
    let store = Arc::new(CountedStore::new(bare.clone()));
    let token = format!("{:016x}", rand::random::<u64>());
    match probe(store.as_ref(), "backends/probe", &token).await {
        Ok(()) => Ok(store),
        Err(e) if e.waived_by_single_backend() && settings.single_backend => {
            tracing::warn!("single_backend is promised, so this is accepted: {e}");
            Ok(match e {
                ProbeError::NoConditions { .. } => {
                    Arc::new(CountedStore::new(Arc::new(Unconditional(bare))))
                }
                _ => store,
            })
        }
        Err(ProbeError::Store { step, source }) => {
            let advice = advice(&source);
            let failure = Failure::from(source);
            let at = s.endpoint.as_ref().map(|e| format!(" at {e}")).unwrap_or_default();
            Err(Failure::new(failure.code, format!("{url}{at}: {step}: {failure}{advice}")))
        }
        Err(e) => Err(Failure::new(Code::Unavailable, format!("{url}: {e}"))),
    }
}

/// What an admin can do about a store that fails at the start.
fn advice(error: &StoreError) -> &'static str {
    match error {
        StoreError::Unavailable { .. } => {
            ": check the endpoint, the region, the network and the credentials"
        }
        StoreError::Denied { .. } => {
            ": check the credentials (s3.access_key_id and its secret, AWS_*) and their rights"
        }
        StoreError::NoSuchStore { .. } => ": create it first",
        StoreError::NotFound { .. }
        | StoreError::Precondition { .. }
        | StoreError::Unsupported { .. }
        | StoreError::BadBody { .. }
        | StoreError::Full { .. } => "",
    }
}

pub(super) fn s3_config(s: &StoreSettings) -> S3Config {
    S3Config {
        endpoint: s.endpoint.clone(),
        region: s.region.clone(),
        path_style: s.path_style,
        access_key_id: s.access_key_id.clone(),
        secret_access_key: s.secret_access_key.clone().map(|s| s.0),
        session_token: s.session_token.clone().map(|s| s.0),
        request_checksums: s.checksums == Checksums::WhenSupported,
        retry: s.retry.clone(),
        max_requests: s.max_requests,
        ..S3Config::default()
    }
}

impl From<MountError> for Failure {
    fn from(e: MountError) -> Failure {
        let code = match &e {
            MountError::Missing(_)
            | MountError::NotADirectory(_)
            | MountError::NotEmpty(_)
            | MountError::InUse { .. }
            | MountError::NoDevice(_) => Code::Unavailable,
            MountError::NotPermitted(_) => Code::NoPerm,
            MountError::Option { .. } => Code::Config,
            MountError::Io { .. } => Code::OsErr,
        };
        Failure::new(code, e.to_string())
    }
}

/// See the module.
pub(super) struct LiveMount {
    heart: Arc<dyn Heart>,
    store: Arc<CountedStore>,
    settings: Settings,
    since: SystemTime,
    state: Mutex<State>,
    fuse: Arc<FuseStats>,
    /// Where metrics are served, once they are.
    metrics_at: OnceLock<SocketAddr>,
}

struct State {
    mounted: Option<Mounted>,
    stopping: bool,
}

impl fmt::Debug for LiveMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveMount").field("mountpoint", &self.settings.mountpoint).finish()
    }
}

impl LiveMount {
    /// Mounts `fs`, whose heart is `heart`; in a tokio runtime. The future ends when the kernel
    /// has let go of the mount.
    pub(super) fn start(
        settings: &Settings,
        store: Arc<CountedStore>,
        fs: Arc<dyn MailFs>,
        heart: Arc<dyn Heart>,
    ) -> Result<(LiveMount, impl Future<Output = ()> + Send + use<>), Failure> {
        let options = MountOptions {
            allow_other: settings.allow_other,
            nonempty: settings.nonempty,
            fsname: settings.store.url.clone(),
            n_threads: (settings.fuse_threads > 0).then_some(settings.fuse_threads),
            passthrough: settings.passthrough,
            ..MountOptions::new(&settings.mountpoint)
        };
        let mounted = mount(fs, tokio::runtime::Handle::current(), &options)?;
        let ended = mounted.ended();
        let gone = async move {
            if let Err(error) = ended.await {
                tracing::error!(error, "the kernel's connection failed");
            }
        };
        let fuse = mounted.stats();
        let state = Mutex::new(State { mounted: Some(mounted), stopping: false });
        let live = LiveMount {
            heart,
            store,
            settings: settings.clone(),
            since: SystemTime::now(),
            state,
            fuse,
            metrics_at: OnceLock::new(),
        };
        Ok((live, gone))
    }

    fn operations(&self) -> Vec<OperationCount> {
        let errors = self.fuse.errors();
        let used = Op::ALL.iter().copied().filter(|op| self.fuse.requests(*op) > 0);
        used.map(|op| OperationCount {
            operation: op.name().to_owned(),
            count: self.fuse.requests(op),
            waited: self.fuse.waits(op),
            errors: errors.iter().filter(|(of, _, _)| *of == op).map(|(_, _, n)| n).sum(),
            mean_seconds: self.fuse.answers(op).mean().map_or(0.0, |mean| mean.as_secs_f64()),
        })
        .collect()
    }
}

#[async_trait]
impl AdminApi for LiveMount {
    async fn flush(
        &self,
        what: FlushRequest,
        progress: &Progress,
    ) -> Result<FlushReport, AdminError> {
        self.heart.flush(what, progress).await
    }

    async fn caches(
        &self,
        what: CacheRequest,
        progress: &Progress,
    ) -> Result<CacheAnswer, AdminError> {
        self.heart.caches(what, progress).await
    }

    async fn status(&self) -> Status {
        let s = &self.settings;
        let requests = self.store.snapshot().into_iter().map(|row| RequestCount {
            operation: row.op.name().to_owned(),
            reason: row.reason.to_owned(),
            count: row.requests,
            failed: row.errors,
            bytes_in: row.bytes_in,
            bytes_out: row.bytes_out,
            mean_seconds: row.time.mean().map_or(0.0, |mean| mean.as_secs_f64()),
        });
        let health = self.store.health();
        let errors = self.fuse.errors().into_iter().map(|(op, errno, count)| Count {
            name: format!("{} {}", op.name(), metrics::errno_name(errno)),
            count,
        });
        let mut status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            mountpoint: s.mountpoint.display().to_string(),
            store: s.store.url.clone(),
            state_dir: s.state_dir.display().to_string(),
            backend: s.backend.clone(),
            single_backend: s.single_backend,
            since: self.since.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64),
            stopping: self.state.lock().stopping,
            metrics: self.metrics_at.get().map(SocketAddr::to_string),
            store_health: StoreHealth {
                down_for: health.down_for.map(|d| d.as_secs()),
                outages: health.outages,
                down_seconds: health.down.as_secs_f64(),
            },
            requests: requests.collect(),
            operations: self.operations(),
            errors: errors.collect(),
            ..Status::default()
        };
        self.heart.status(&mut status).await;
        status
    }

    async fn metrics(&self) -> String {
        metrics::text(Numbers {
            status: self.status().await,
            store: self.store.snapshot(),
            health: self.store.health(),
            wire_requests: self.store.wire_requests(),
            fuse: Some(self.fuse.clone()),
            heart: self.heart.counts(),
        })
    }

    fn metrics_served(&self, at: SocketAddr) {
        // Once in a mount's life.
        let _ = self.metrics_at.set(at);
    }

    async fn gc(&self, what: GcRequest, progress: &Progress) -> Result<GcReport, AdminError> {
        self.heart.gc(what, progress).await
    }

    async fn care(&self, what: Care, progress: &Progress) -> Result<Cared, AdminError> {
        self.heart.care(what, progress).await
    }

    async fn stop(&self, progress: &Progress) -> Result<StopReport, AdminError> {
        self.state.lock().stopping = true;
        let patience = self.settings.unmount_timeout;
        let deadline = tokio::time::Instant::now() + patience;
        // Most of the work while files can still be used; what changes meanwhile follows below.
        progress.say("flushing");
        let early = self.heart.flush(FlushRequest::all(), progress);
        let _ = tokio::time::timeout(patience / 2, early).await;
        let mounted = self.state.lock().mounted.take();
        let mut holders = Vec::new();
        let mut refused = None;
        if let Some(mounted) = mounted {
            progress.say("unmounting");
            // Holders of open files are not waited for long: they may never end.
            match mounted.unmount(Duration::from_secs(1)).await {
                Ok(outcome) => {
                    if let Unmounted::Detached { holders: found, .. } = outcome.how {
                        holders = found.iter().map(ToString::to_string).collect();
                    }
                }
                Err(e) => refused = Some(e),
            }
        }
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let mut report = self.heart.finish(left.max(Duration::from_secs(1)), progress).await;
        report.holders = holders;
        match refused {
            None => Ok(report),
            Some(e) => Err(AdminError::new(ErrorKind::Internal, format!("cannot unmount: {e}"))),
        }
    }
}
