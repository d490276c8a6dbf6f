//! The heart of a mount: made from the configuration, and asked by the admin.

use super::exit::{Code, Failure};
use super::live::Heart;
use crate::admin::caches::{CacheAnswer, CacheRequest, FlushRequest};
use crate::admin::care::{Care, Cared};
use crate::admin::gc::{GcReport, GcRequest};
use crate::admin::{AdminError, ErrorKind, FlushReport, Progress, Status, StopReport, UserStatus};
use crate::cache::disk::RealDisk;
use crate::cache::fscache::Place;
use crate::cache::metacache::Limits;
use crate::config::{self, Settings};
use crate::dovecot::template::Layout;
use crate::format::listing::Owner;
use crate::fs::VmailFs;
use crate::store::counted::CountedStore;
use crate::vmail::claim::Waiting;
use crate::vmail::counts::CountsNow;
use crate::vmail::env::{Env, SystemClock, SystemRandom};
use crate::vmail::error::Error;
use crate::vmail::evict;
use crate::vmail::gc;
use crate::vmail::idle;
use crate::vmail::lease::Lease;
use crate::vmail::leftover;
use crate::vmail::schedule;
use crate::vmail::session::{self, Session};
use crate::vmail::version;
use async_trait::async_trait;
use std::sync::Arc;
use std::time::Duration;

mod aliases;
mod caches;
mod fscache;
mod metacache;
mod status;
mod whom;

use status::{at_risk, user_status};

/// How long a mount that has nothing left to do tells others of its end.
const LAST_WORD: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(super) struct LiveHeart {
    session: Arc<Session>,
    fs: Arc<VmailFs>,
    mountpoint: std::path::PathBuf,
}

/// The users' places below the mount.
pub(super) fn layout(settings: &Settings) -> Result<Layout, Failure> {
    Layout::parse(&settings.layout)
        .map_err(|e| Failure::new(Code::Config, format!("layout {:?}: {e}", settings.layout)))
}

/// Opens the local directories, takes the lease and starts what runs behind the scenes.
pub(super) async fn start(
    settings: &Settings,
    store: Arc<CountedStore>,
    waits: &mut (dyn FnMut(&Waiting) + Send),
) -> Result<(Arc<VmailFs>, LiveHeart), Failure> {
    let layout = layout(settings)?;
    let env = Env {
        store,
        disk: Arc::new(RealDisk),
        clock: Arc::new(SystemClock),
        random: Arc::new(SystemRandom),
    };
    version::check_state(&env, &settings.state_dir).map_err(|e| unfit(&e))?;
    version::check_store(&env, &settings.state_dir).await.map_err(|e| unfit(&e))?;
    let local = |e: Error| Failure::new(Code::CantCreate, e.to_string());
    let session = Session::open(env, translate(settings, layout)).map_err(local)?;
    session.set_services(Box::new(process_name));
    if let Err(error) = session.lease.claim(&session, settings.take_backend, waits).await {
        return Err(Failure::new(Code::TempFail, error.to_string()));
    }
    tokio::spawn(Lease::keep(session.clone()));
    tokio::spawn(schedule::run(session.clone()));
    tokio::spawn(leftover::run(session.clone()));
    tokio::spawn(evict::run(session.clone()));
    tokio::spawn(idle::run(session.clone()));
    tokio::spawn(gc::run(session.clone()));
    let fs = Arc::new(VmailFs::new(session.clone()));
    Ok((fs.clone(), LiveHeart { session, fs, mountpoint: settings.mountpoint.clone() }))
}

/// A store or a state directory that another vmailfs must serve. No restart helps.
fn unfit(error: &Error) -> Failure {
    let code = match error {
        Error::Corrupt { .. } => Code::Config,
        Error::Disk { .. } => Code::CantCreate,
        _ => Code::TempFail,
    };
    Failure::new(code, error.to_string())
}

fn translate(s: &Settings, layout: Layout) -> session::Settings {
    let owner = |o: config::Owner| Owner { uid: o.uid, gid: o.gid };
    session::Settings {
        state_dir: s.state_dir.clone(),
        metacache_dir: s.metacache.path.clone(),
        fscache: s
            .fscache
            .iter()
            .map(|c| Place { path: c.path.clone(), max: c.max_size })
            .collect(),
        stream_memory: s.stream_memory,
        read_ahead: s.read_ahead,
        hedge: s.hedge,
        staging_dir: s.staging.path.clone(),
        staging_max: s.staging.max_size,
        metacache: session::Metacache {
            limits: Limits { max_space: s.metacache.max_space, max_grace: s.metacache.max_grace },
            weights: s.metacache.weights.clone(),
            soon: s.metacache.priority2_names.clone(),
            close_idle: s.metacache.close_idle,
            max_open_users: s.metacache.max_open_users as usize,
            idle_uploads: s.metacache.idle_uploads,
        },
        layout,
        backend: s.backend.clone(),
        host: host(),
        single_backend: s.single_backend,
        lease: s.lease,
        owner: s.owner.map(owner),
        root_owner: s.root_owner.map(owner),
        root_mode: s.root_mode,
        allow_root_delete: s.allow_root_delete,
        upload_interval: s.metacache.upload_interval,
        max_rescan_mail_count: s.metacache.max_rescan_mail_count,
        quiet: s.metacache.folder_change_quiet,
        quiet_max: s.metacache.folder_change_max,
        idle_upload: s.metacache.idle_upload,
        delivery_timeout: s.delivery_timeout,
        ack: s.ack,
        lost_mails: s.lost_mails.clone(),
        max_flushes: s.metacache.max_parallel_requests as usize,
        boot_id: boot_id(),
        gc: gc::Limits {
            retention: s.gc.retention,
            interval: s.gc.interval,
            full_scan: s.gc.full_scan,
            parallel: s.gc.parallel,
            delete_rate: s.gc.delete_rate,
        },
        ask_for_users: true,
    }
}

/// What a process calls itself; Dovecot's are `imap`, `lmtp`, `pop3` and so on.
fn process_name(pid: u32) -> Option<String> {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    // Whoever runs a program chooses its name; it ends up in tables.
    let name: String = name.trim().chars().filter(char::is_ascii_graphic).collect();
    (!name.is_empty()).then_some(name)
}

/// This machine's name; empty if it has none.
fn host() -> String {
    nix::unistd::gethostname().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Differs from boot to boot. Unreadable: each start counts as a new boot, which is safe.
fn boot_id() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(id) => id.trim().to_string(),
        Err(error) => {
            tracing::warn!(%error, "the machine's boot cannot be told");
            format!("unknown-{:016x}", rand::random::<u64>())
        }
    }
}

pub(super) fn told(error: &Error) -> AdminError {
    let kind = match error {
        Error::Store { .. }
        | Error::Foreign { .. }
        | Error::Full(_)
        | Error::Crowded(_)
        | Error::Closing
        | Error::HandingOver { .. }
        | Error::Doubt { .. }
        | Error::Deferred { .. } => ErrorKind::TempFail,
        Error::Lost { .. }
        | Error::Lapsed { .. }
        | Error::NameTaken { .. }
        | Error::Disk { .. }
        | Error::Vanished { .. } => ErrorKind::TempFail,
        Error::NoUser { .. } => ErrorKind::NoSuchUser,
        Error::NotThere(_) => ErrorKind::NotThere,
        Error::Refused(_) => ErrorKind::Denied,
        Error::Plain(_)
        | Error::Corrupt { .. }
        | Error::Damaged { .. }
        | Error::Gone { .. }
        | Error::Internal(_) => ErrorKind::Internal,
    };
    AdminError::new(kind, error.to_string())
}

#[async_trait]
impl Heart for LiveHeart {
    async fn flush(
        &self,
        what: FlushRequest,
        progress: &Progress,
    ) -> Result<FlushReport, AdminError> {
        caches::flush(&self.session, what, progress).await
    }

    async fn caches(
        &self,
        what: CacheRequest,
        progress: &Progress,
    ) -> Result<CacheAnswer, AdminError> {
        caches::serve(&self.session, what, progress).await
    }

    async fn gc(&self, what: GcRequest, progress: &Progress) -> Result<GcReport, AdminError> {
        super::gc::run(&self.session, what, progress).await
    }

    async fn status(&self, status: &mut Status) {
        status::fill(&self.session, status);
    }

    fn counts(&self) -> CountsNow {
        self.session.counts.now()
    }

    async fn care(&self, what: Care, _progress: &Progress) -> Result<Cared, AdminError> {
        super::care::from_mount(&self.session, &self.mountpoint, what).await
    }

    async fn finish(&self, patience: Duration, _progress: &Progress) -> StopReport {
        self.fs.release_all();
        let failed = self.session.close(patience).await;
        let (_, waiting) = self.session.waiting();
        if failed.is_empty() && waiting.is_empty() {
            // A store that fails just now is not waited for.
            let ended = self.session.lease.end(&self.session);
            if tokio::time::timeout(LAST_WORD, ended).await.is_err() {
                tracing::warn!("the end of this session is not told: others wait for its lease");
            }
        }
        let mut report = StopReport {
            at_risk: at_risk(&waiting),
            users: waiting.iter().map(user_status).collect(),
            holders: Vec::new(),
        };
        for (name, error) in failed {
            match report.users.iter_mut().find(|u| u.user == name) {
                Some(user) => user.error = Some(error.to_string()),
                None => report.users.push(UserStatus {
                    user: name,
                    error: Some(error.to_string()),
                    ..UserStatus::default()
                }),
            }
        }
        report
    }
}
