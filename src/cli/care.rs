//! Checks, earlier states and restores: done from the store alone, or by the mount that owns the
//! user.

use super::bars::Watch;
use super::exit::{Code, Failure};
use super::index_lock::ThroughMount;
use super::live::s3_config;
use super::options::MountArgs;
use crate::admin::care::{
    BroughtBack, Care, Cared, Exported, HistoryReport, MailBack, StateReport,
};
use crate::admin::{AdminError, Answer, ErrorKind, Request, client, place};
use crate::format::escape::escape;
use crate::store::url::{StoreUrl, open_store};
use crate::store::{ObjectStore, Reason, StoreError};
use crate::vmail::error::Error;
use crate::vmail::flush::Options;
use crate::vmail::history::{self, Ends};
use crate::vmail::repair::{Wanted, repair};
use crate::vmail::session::{Session, UserCell};
use crate::vmail::stored::{self, Stored};
use crate::vmail::undelete::{Back, Which, undelete};
use crate::vmail::{export, fsck};
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;

/// Where a command finds the users: in a running mount, or in a store without one.
#[derive(Debug, Default, Args)]
pub(super) struct Source {
    /// Ask this store itself (file:///dir or s3://bucket/prefix), without a mount.
    #[arg(long)]
    store: Option<String>,
    /// Ask the store of this configuration file itself, without a mount.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// URL of the S3 server; default: AWS.
    #[arg(long)]
    s3_endpoint: Option<String>,
    #[arg(long)]
    s3_region: Option<String>,
    /// Put the bucket into the path, not into the host name.
    #[arg(long)]
    s3_path_style: bool,
    /// Set any key of the configuration.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    mount: super::Target,
}

/// Answers requests about users' data.
pub(super) enum Via {
    Mount(PathBuf),
    Store(Arc<dyn ObjectStore>, tokio::runtime::Runtime),
}

impl Source {
    /// `store` is one that was given in another way.
    pub(super) fn open(&self, store: Option<String>) -> Result<Via, Failure> {
        let store = store.or_else(|| self.store.clone());
        if store.is_none() && self.config.is_none() {
            let (socket, point) = (self.mount.socket.as_deref(), self.mount.mountpoint.as_deref());
            return Ok(Via::Mount(client::find(&place::run_dir(), socket, point)?));
        }
        let args = MountArgs {
            store,
            config: self.config.clone(),
            s3_endpoint: self.s3_endpoint.clone(),
            s3_region: self.s3_region.clone(),
            s3_path_style: self.s3_path_style,
            set: self.set.clone(),
            ..MountArgs::default()
        };
        let settings = args.effective()?.resolve_store()?;
        let url: StoreUrl =
            settings.url.parse().map_err(|e| Failure::new(Code::Config, format!("{e}")))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::new(Code::OsErr, format!("cannot start threads: {e}")))?;
        let store = runtime.block_on(open_store(&url, &s3_config(&settings)))?;
        Ok(Via::Store(store, runtime))
    }
}

impl Via {
    pub(super) fn ask(&self, care: Care) -> Result<Cared, Failure> {
        match self {
            Via::Mount(socket) => {
                let mut watch = Watch::new();
                match client::call(socket, &Request::Care { care }, &mut |t| watch.told(t))? {
                    Answer::Care(cared) => Ok(cared),
                    _ => Err(super::talk::unexpected()),
                }
            }
            Via::Store(store, runtime) => runtime
                .block_on(from_store(store, care))
                .map_err(|e| Failure::from(client::ClientError::Refused(e))),
        }
    }
}

pub(super) fn told(error: Error) -> AdminError {
    super::heart::told(&error)
}

/// What a mount does for its users.
pub(super) async fn from_mount(
    session: &Arc<Session>,
    mountpoint: &Path,
    care: Care,
) -> Result<Cared, AdminError> {
    let user = match &care {
        Care::Users | Care::Bundle { .. } => {
            return from_store(&session.env.store, care).await;
        }
        Care::Fsck { user, .. }
        | Care::History { user }
        | Care::Undelete { user, .. }
        | Care::Export { user, .. }
        | Care::Restore { user, .. } => user.clone(),
    };
    let (which, dry_run) = match care {
        Care::Undelete { folder, since, dry_run, .. } => {
            (Which::Expunged { folder, since }, dry_run)
        }
        Care::Restore { at, dry_run, .. } => (Which::Of { at }, dry_run),
        Care::Fsck { read, repair, drop_lost, owner_gone, .. } if repair || drop_lost => {
            let wanted = Wanted { all: repair, drop_lost, owner_gone };
            let report = repaired(session, mountpoint, &user, read, wanted).await?;
            return Ok(Cared::Fsck(Box::new(report)));
        }
        care => {
            // What the store says of a user that is open is what was flushed.
            let options = Options { caches: false, release: false, important_only: false };
            let flushed = session.flush_user(&user, options).await;
            // Who only looks is shown what there is, on a full disk, too.
            let looks = matches!(care, Care::Fsck { .. } | Care::History { .. });
            let not_flushed = match flushed {
                Err(error) if looks => {
                    tracing::warn!(user, %error, "not flushed before the look");
                    Some(error.to_string())
                }
                flushed => flushed.map(|_| None).map_err(told)?,
            };
            let mut cared = from_store(&session.env.store, care).await?;
            match &mut cared {
                Cared::Fsck(report) => report.not_flushed = not_flushed,
                Cared::History(report) => report.not_flushed = not_flushed,
                _ => {}
            }
            return Ok(cared);
        }
    };
    let cell = known(session, &user).await?;
    let logs = ThroughMount { mountpoint: mountpoint.to_path_buf() };
    let report = undelete(&cell, &which, dry_run, &logs).await.map_err(told)?;
    Ok(Cared::BroughtBack(BroughtBack {
        user,
        dry_run,
        mails: report.mails.into_iter().map(mail_back).collect(),
        folders: report.folders,
        left: report.left,
    }))
}

async fn repaired(
    session: &Arc<Session>,
    mountpoint: &Path,
    user: &str,
    read: bool,
    wanted: Wanted,
) -> Result<fsck::Report, AdminError> {
    let (stored, options) =
        (Stored::new(session.env.store.clone(), user, Reason("fsck")), fsck::Options { read });
    // With a damaged head in the store nothing can be flushed.
    let flush = Options { caches: false, release: false, important_only: false };
    let flushed = async || {
        let failed = session.flush_user(user, flush).await.err();
        failed.inspect(|error| tracing::warn!(user, %error, "not flushed before the check"))
    };
    let not_flushed = flushed().await.map(|error| error.to_string());
    let mut report = fsck::check(&stored, options).await.map_err(told)?;
    if report.findings.is_empty() {
        report.not_flushed = not_flushed;
        return Ok(report);
    }
    let none = || AdminError::new(ErrorKind::NoSuchUser, format!("{user}: no such user"));
    let cell = session.user_by_name(user).ok_or_else(none)?;
    let logs = ThroughMount { mountpoint: mountpoint.to_path_buf() };
    let done = repair(&cell, &stored, &report, wanted, &logs).await.map_err(told)?;
    let mut report = fsck::check(&stored, options).await.map_err(told)?;
    report.repaired = done;
    if not_flushed.is_some() {
        report.not_flushed = flushed().await.map(|error| error.to_string());
    }
    Ok(report)
}

/// A user that has a head; none is made by asking.
async fn known(session: &Arc<Session>, user: &str) -> Result<Arc<UserCell>, AdminError> {
    let none = || AdminError::new(ErrorKind::NoSuchUser, format!("{user}: no such user"));
    let cell = session.user_by_name(user).ok_or_else(none)?;
    if cell.if_open(|_| ()).is_none() {
        let stored = Stored::new(session.env.store.clone(), user, Reason("lookup"));
        stored.head_object().await.map_err(told)?.ok_or_else(none)?;
    }
    Ok(cell)
}

fn mail_back(mail: Back) -> MailBack {
    MailBack {
        folder: stored::path_text(&mail.path),
        old_name: escape(&mail.old_name),
        name: mail.name,
        object: mail.tail.to_string(),
        size: mail.size,
        expunged: mail.expunged,
    }
}

/// What can be done without owning the user.
pub(super) async fn from_store(
    store: &Arc<dyn ObjectStore>,
    care: Care,
) -> Result<Cared, AdminError> {
    let stored = |user: &str, why| Stored::new(store.clone(), user, Reason(why));
    match care {
        Care::Users => {
            let mut users = stored::users(store, Reason("users")).await.map_err(told)?;
            users.sort();
            Ok(Cared::Users(users))
        }
        Care::Fsck { drop_lost: true, .. } => Err(needs_mount("taking names away")),
        Care::Fsck { user, read, repair, owner_gone, .. } => {
            let (stored, options) = (stored(&user, "fsck"), fsck::Options { read });
            let mut report = fsck::check(&stored, options).await.map_err(told)?;
            if repair && !report.findings.is_empty() {
                let random = (rand::random(), rand::random());
                let how = fsck::rescue::Rescue { random, owner_gone };
                let done = fsck::rescue::rescue(&stored, &how).await.map_err(told)?;
                report = fsck::check(&stored, options).await.map_err(told)?;
                report.repaired = done;
            }
            Ok(Cared::Fsck(Box::new(report)))
        }
        Care::History { user } => {
            let stored = stored(&user, "history");
            history_of(&stored).await.map(Cared::History).map_err(told)
        }
        Care::Export { user, at, dir } => {
            let stored = stored(&user, "restore");
            let history = history::read(&stored, Some(at)).await.map_err(told)?;
            let state = history.at(at).map_err(told)?;
            let done = export::export(&stored, state, &dir).await.map_err(told)?;
            Ok(Cared::Exported(Exported {
                user,
                dir,
                time: state.time,
                folders: done.folders,
                mails: done.mails,
                files: done.files,
                bytes: done.bytes,
                missing: done.missing,
            }))
        }
        Care::Bundle { key, to } => bundle(store, &key, &to).await.map(Cared::Bundle),
        Care::Undelete { .. } => Err(needs_mount("undelete")),
        Care::Restore { .. } => Err(needs_mount("a restore in place")),
    }
}

async fn bundle(store: &Arc<dyn ObjectStore>, key: &str, to: &Path) -> Result<u64, AdminError> {
    if !key.contains("/bundle/") {
        let text = format!("{key}: bundles are called <hh>/<user>/bundle/<id>.tar.zst");
        return Err(AdminError::new(ErrorKind::Usage, text));
    }
    let got = store.get(key, None, crate::format::unpack::LIMIT, Reason("unpack")).await;
    let (_, bytes) = match got {
        Ok(got) => got,
        Err(StoreError::NotFound { .. }) => {
            let text = format!("{key}: neither a file nor an object of the store");
            return Err(AdminError::new(ErrorKind::Usage, text));
        }
        Err(error) => return Err(AdminError::new(ErrorKind::TempFail, error.to_string())),
    };
    let failed =
        |e: std::io::Error| AdminError::new(ErrorKind::Internal, format!("{}: {e}", to.display()));
    let mut options = tokio::fs::OpenOptions::new();
    let mut file =
        options.write(true).create_new(true).mode(0o600).open(to).await.map_err(failed)?;
    file.write_all(&bytes).await.map_err(failed)?;
    file.flush().await.map_err(failed)?;
    Ok(bytes.len() as u64)
}

fn needs_mount(what: &str) -> AdminError {
    let text = format!("{what} is done by the mount that owns the user: leave out the store");
    AdminError::new(ErrorKind::Usage, text)
}

async fn history_of(stored: &Stored) -> Result<HistoryReport, Error> {
    let history = history::read(stored, None).await?;
    let counts = history::count_mails(stored, &history.states).await?;
    let states = history.states.iter().zip(counts).map(|(state, mails)| StateReport {
        time: state.time,
        epoch: state.head.epoch.0,
        folders: state.head.folders.len() as u64,
        mails,
        bundle: state.head.previous.as_ref().map(|part| part.bundle.to_string()),
    });
    let ends = match history.ends {
        Ends::First => "the user began here".to_owned(),
        Ends::Retention => "older states were deleted after retention".to_owned(),
        Ends::Broken(why) => format!("an older state cannot be read: {why}"),
    };
    let (user, states) = (stored.user.to_string(), states.collect());
    Ok(HistoryReport { user, states, ends, not_flushed: None })
}
