//! The life of a mount: start, serve, leave.

use super::exit::{Code, Failure};
use super::heart;
use super::live::{self, Heart, LiveMount};
use super::mount::Claim;
use super::nfs_mount::NfsMount;
use super::{show, shown};
use crate::admin::caches::{CacheAnswer, CacheRequest, FlushRequest};
use crate::admin::care::{Care, Cared};
use crate::admin::gc::{GcReport, GcRequest};
use crate::admin::http;
use crate::admin::place::{self, Registration};
use crate::admin::server::Server;
use crate::admin::{AdminApi, AdminError, FlushReport, Progress, Status, StopReport};
use crate::config::Settings;
use crate::fs::VmailFs;
use crate::fuse::daemon::{Background, daemonize};
use crate::store::counted::CountedStore;
use crate::vmail::claim::Waiting;
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use sd_notify::NotifyState;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, OnceCell};

/// A mount that serves.
pub(super) struct Live {
    pub api: Arc<dyn AdminApi>,
    /// Ends when the kernel has let go of the mount, whoever unmounted it.
    pub gone: BoxFuture<'static, ()>,
}

/// Mounts, serves until somebody asks for the end, flushes and leaves.
pub(super) fn run_mount(settings: Settings, claim: Claim, daemon: bool) -> Result<(), Failure> {
    let os = |what: &str, e: std::io::Error| Failure::new(Code::OsErr, format!("{what}: {e}"));
    let background = match daemon {
        true => Some(daemonize().map_err(|e| os("cannot go to the background", e))?),
        false => None,
    };
    let result = serve(settings, daemon, background, os);
    drop(claim);
    result
}

/// Everything after the fork; a failure before the mount stands goes to the waiting parent.
fn serve(
    settings: Settings,
    daemon: bool,
    background: Option<Background>,
    os: impl Fn(&str, std::io::Error) -> Failure,
) -> Result<(), Failure> {
    let start = || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| os("cannot start threads", e))?;
        let (signals, live) = runtime.block_on(async {
            // Before mounting: a signal must never kill a process that has a mount to flush.
            let mut signals = Signals::new().map_err(|e| os("cannot handle signals", e))?;
            // A store that does not answer, or a name that may be in use, can take minutes. Nothing
            // is mounted before the last of these waits.
            let live = tokio::select! {
                live = bring_up(&settings) => live?,
                () = signals.end() => {
                    return Err(Failure::new(Code::TempFail, "told to end before it was mounted"));
                }
            };
            Ok::<_, Failure>((signals, live))
        })?;
        Ok((runtime, signals, live))
    };
    let (runtime, signals, live) = match (start(), background) {
        (Ok(started), None) => started,
        (Ok(started), Some(background)) => {
            let keep_stderr = settings.log.to.as_deref() == Some("stderr");
            if let Err(error) = background.ready(keep_stderr) {
                tracing::warn!(%error, "cannot leave the terminal");
            }
            started
        }
        (Err(failure), None) => return Err(failure),
        (Err(failure), Some(background)) => {
            tracing::error!("{failure}");
            background.failed(&format!("vmailfs: {failure}"));
            // The parent tells it; once is enough.
            std::process::exit(failure.code as i32);
        }
    };
    let run_dir = place::run_dir();
    let result = runtime.block_on(attend(&run_dir, &settings, live, signals, daemon));
    runtime.shutdown_timeout(Duration::from_secs(5));
    result
}

/// The signals that end a mount, and SIGHUP.
pub(super) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    /// Until somebody wants this process to end.
    async fn end(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
            _ = self.hup.recv() => {}
        }
    }
}

/// Opens and probes the store, starts the heart, mounts.
async fn bring_up(settings: &Settings) -> Result<Live, Failure> {
    if let Some(root) = settings.nfs() {
        let (live, gone) = NfsMount::start(settings, root)?;
        return Ok(Live { api: Arc::new(live), gone: Box::pin(gone) });
    }
    let store = live::open(settings).await?;
    let (fs, heart) = start_heart(settings, store.clone()).await?;
    let (live, gone) = LiveMount::start(settings, store, fs.clone(), heart)?;
    let api: Arc<dyn AdminApi> = Arc::new(live);
    if settings.admin_directory {
        shown::show(&fs, &api);
    }
    Ok(Live { api, gone: Box::pin(gone) })
}

/// How long the rest of a start may take, for systemd.
const SLOW: Duration = Duration::from_secs(120);

/// The one place that makes the file system and its heart.
async fn start_heart(
    settings: &Settings,
    store: Arc<CountedStore>,
) -> Result<(Arc<VmailFs>, Arc<dyn Heart>), Failure> {
    let (fs, heart) = heart::start(settings, store, &mut |wait: &Waiting| {
        let text =
            format!("waiting for at most {}s: is {} alive?", wait.left.as_secs(), wait.holder);
        // systemd allows a start less time than a lease may take.
        let more = u32::try_from((wait.next + SLOW).as_micros()).unwrap_or(u32::MAX);
        notify(&[NotifyState::Status(&text), NotifyState::ExtendTimeoutUsec(more)]);
    })
    .await?;
    Ok((fs, Arc::new(heart)))
}

/// From "mounted" to the end of the mount. The admin socket and the registration live here.
async fn attend(
    run_dir: &Path,
    settings: &Settings,
    live: Live,
    mut signals: Signals,
    daemon: bool,
) -> Result<(), Failure> {
    let stopped = OnceCell::new();
    let api = Arc::new(StopOnce { inner: live.api, stopped, done: Notify::new() });
    let os = |what: &str, e: std::io::Error| Failure::new(Code::OsErr, format!("{what}: {e}"));
    let set_up = Server::bind(&settings.admin_socket).map_err(|e| os("admin socket", e)).and_then(
        |server| {
            let link = Registration::new(run_dir, &settings.mountpoint, &settings.admin_socket)
                .map_err(|e| os("run directory", e))?;
            Ok((server, link))
        },
    );
    let metrics = match settings.metrics_listen {
        None => Ok(None),
        Some(address) => http::Server::bind(address)
            .await
            .map(Some)
            .map_err(|e| Failure::new(Code::Config, format!("metrics.listen {address}: {e}"))),
    };
    let (server, link, metrics) = match set_up.and_then(|(s, l)| Ok((s, l, metrics?))) {
        Ok(all) => all,
        Err(failure) => {
            // Nothing half-mounted.
            let _ = api.stop(&Progress::none()).await;
            return Err(failure);
        }
    };
    let drain = server.drain();
    let serving = tokio::spawn(server.serve(Arc::clone(&api) as Arc<dyn AdminApi>));
    let scraping = metrics.map(|server| {
        api.metrics_served(server.address());
        tracing::info!(address = %server.address(), "metrics are served");
        let api = Arc::clone(&api);
        tokio::spawn(server.serve(Arc::new(move || {
            let api = Arc::clone(&api);
            Box::pin(async move { api.metrics().await })
        })))
    });
    notify(&[NotifyState::Ready, NotifyState::Status("mounted")]);
    tracing::info!(store = %settings.store.url, mountpoint = %settings.mountpoint.display(), "mounted");

    let mut gone = live.gone;
    let why = loop {
        tokio::select! {
            _ = &mut gone => break "unmounted",
            // Whoever holds a file open keeps the mount from being gone, perhaps for ever.
            () = api.done.notified() => break "an admin",
            _ = signals.term.recv() => break "SIGTERM",
            _ = signals.int.recv() => break "SIGINT",
            _ = signals.hup.recv() => {
                // Foreground: the terminal went away. Background: others reload on it.
                if !daemon {
                    break "SIGHUP";
                }
                tracing::info!("SIGHUP: nothing to reload; a restart reads the configuration");
            }
        }
    };
    tracing::info!(why, "flushing everything, then leaving");
    let patience = settings.unmount_timeout + Duration::from_secs(10);
    let micros = u32::try_from(patience.as_micros()).unwrap_or(u32::MAX);
    notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros)]);
    let result = api.stop(&Progress::none()).await;
    drop(link);
    drain.wait(Duration::from_secs(2)).await;
    scraping.inspect(|task| task.abort());
    serving.abort();
    // The socket goes away with the task, which ends only now.
    let _ = serving.await;
    let report = result.map_err(|e| Failure::new(Code::TempFail, e.text))?;
    if report.at_risk.nothing() {
        tracing::info!("unmounted; nothing is at risk");
        return Ok(());
    }
    let text = show::stopped(&report);
    tracing::error!("{}", text.trim_end());
    Err(Failure::new(Code::TempFail, text.trim_end()))
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd is not told");
    }
}

/// A mount may be stopped by a signal, by an admin and by the kernel at the same time: it is
/// stopped once, and all get the same report.
struct StopOnce {
    inner: Arc<dyn AdminApi>,
    stopped: OnceCell<Result<StopReport, AdminError>>,
    done: Notify,
}

impl fmt::Debug for StopOnce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StopOnce")
    }
}

#[async_trait]
impl AdminApi for StopOnce {
    async fn flush(
        &self,
        what: FlushRequest,
        progress: &Progress,
    ) -> Result<FlushReport, AdminError> {
        self.inner.flush(what, progress).await
    }

    async fn caches(
        &self,
        what: CacheRequest,
        progress: &Progress,
    ) -> Result<CacheAnswer, AdminError> {
        self.inner.caches(what, progress).await
    }

    async fn gc(&self, what: GcRequest, progress: &Progress) -> Result<GcReport, AdminError> {
        self.inner.gc(what, progress).await
    }

    async fn status(&self) -> Status {
        self.inner.status().await
    }

    async fn metrics(&self) -> String {
        self.inner.metrics().await
    }

    fn metrics_served(&self, at: std::net::SocketAddr) {
        self.inner.metrics_served(at);
    }

    async fn care(&self, what: Care, progress: &Progress) -> Result<Cared, AdminError> {
        self.inner.care(what, progress).await
    }

    async fn stop(&self, progress: &Progress) -> Result<StopReport, AdminError> {
        let report = self.stopped.get_or_init(|| self.inner.stop(progress)).await.clone();
        self.done.notify_one();
        report
    }
}

#[cfg(test)]
mod tests;
