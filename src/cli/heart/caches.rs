//! What an admin asks of the caches and of whole users, in the mount.

use super::aliases::Aliases;
use super::{told, whom};
use crate::admin::caches::{CacheAnswer, CacheRequest, Deleted, FlushRequest, Whom};
use crate::admin::{AdminError, ErrorKind, FlushReport, Progress};
use crate::vmail::erase::{Erased, Outcome, erase};
use crate::vmail::flush::Options;
use crate::vmail::session::{Session, UserCell};
use std::sync::Arc;
use std::time::Duration;

/// Between two looks at users that are waited for.
const LOOK: Duration = Duration::from_millis(200);

/// Flushes users, a few at once.
pub(super) async fn flush(
    session: &Arc<Session>,
    what: FlushRequest,
    progress: &Progress,
) -> Result<FlushReport, AdminError> {
    let FlushRequest { whom, important_only, min_priority } = what;
    let options = Options { caches: !important_only, release: false, important_only };
    let (mut cells, missing) = whom::cells(session, &whom).await?;
    if let Some(least) = min_priority {
        super::metacache::keep_changed(&mut cells, least);
    }
    let mut report = FlushReport::default();
    for (name, why) in missing {
        match why.kind {
            ErrorKind::NoSuchUser => report.unknown.push(name),
            _ => report.failed.push((name, why.text)),
        }
    }
    let total = cells.len() as u64;
    let mut next = cells.into_iter();
    let mut running = tokio::task::JoinSet::new();
    let mut done = 0;
    loop {
        while running.len() < session.settings.max_flushes.max(1) {
            let Some(cell) = next.next() else { break };
            let session = session.clone();
            running.spawn(async move {
                let result = session.flush_cell(&cell, options).await;
                (cell.name.to_string(), result)
            });
        }
        match running.join_next().await {
            None => return Ok(report),
            Some(Ok((_, Ok(one)))) if one.flushed => {
                report.flushed += 1;
                report.bytes += one.bytes;
            }
            Some(Ok((_, Ok(_)))) => report.unchanged += 1,
            Some(Ok((_, Err(error)))) if total == 1 && matches!(whom, Whom::User(_)) => {
                return Err(told(&error));
            }
            Some(Ok((name, Err(error)))) => report.failed.push((name, error.to_string())),
            Some(Err(error)) => {
                return Err(AdminError::new(ErrorKind::Internal, error.to_string()));
            }
        }
        done += 1;
        progress.step(done, total, "users");
    }
}

pub(super) async fn serve(
    session: &Arc<Session>,
    what: CacheRequest,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    match what {
        CacheRequest::UpdateUserdb { user, field, value } => {
            Aliases::set(session, &user, &field, &value).await?;
            Ok(CacheAnswer::Done)
        }
        CacheRequest::UserWait { whom, secs } => {
            wait(session, &whom, Duration::from_secs(secs), progress).await
        }
        CacheRequest::MetacacheList { .. }
        | CacheRequest::MetacacheStatus
        | CacheRequest::MetacacheRescan
        | CacheRequest::MetacacheClean { .. }
        | CacheRequest::MetacacheRefresh { .. }
        | CacheRequest::MetacacheRemove { .. } => {
            super::metacache::serve(session, what, progress).await
        }
        CacheRequest::FscacheStatus
        | CacheRequest::FscacheRescan { .. }
        | CacheRequest::FscacheClean => super::fscache::serve(session, what).await,
        CacheRequest::UserDelete { whom } => delete(session, &whom, progress).await,
    }
}

/// Whether somebody has a file of the user open.
fn is_busy(cell: &UserCell) -> bool {
    cell.if_open(|user| user.is_busy()).unwrap_or(false)
}

async fn delete(
    session: &Arc<Session>,
    whom: &Whom,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    if matches!(whom, Whom::Matching { .. }) {
        return Err(AdminError::new(ErrorKind::Usage, "not everybody at once"));
    }
    let (cells, nobody) = whom::cells(session, whom).await?;
    let mut report: Vec<Deleted> = nobody
        .into_iter()
        .map(|(user, why)| Deleted { user, error: Some(why.text), ..Deleted::default() })
        .collect();
    let total = cells.len() as u64;
    for (done, cell) in (1..).zip(cells) {
        let user = cell.name.to_string();
        report.push(match erase(&cell).await {
            Ok(outcome) => {
                let (erased, busy) = match outcome {
                    Outcome::Done(erased) => (erased, false),
                    Outcome::Busy(erased) => (erased, true),
                };
                tracing::warn!(user, files = erased.files, busy, "deleted on an admin's word");
                let Erased { files, folders } = erased;
                Deleted { user, files, folders, busy, error: None }
            }
            Err(error) if total == 1 && report.is_empty() => return Err(told(&error)),
            Err(error) => Deleted { user, error: Some(error.to_string()), ..Deleted::default() },
        });
        progress.step(done, total, "users");
    }
    Ok(CacheAnswer::Deleted(report))
}

async fn wait(
    session: &Arc<Session>,
    whom: &Whom,
    limit: Duration,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    let (mut cells, nobody) = whom::cells(session, whom).await?;
    if let Some((_, why)) = nobody.into_iter().next() {
        return Err(why);
    }
    let clock = &session.env.clock;
    let (end, total) = (clock.boot().saturating_add(limit), cells.len() as u64);
    loop {
        cells.retain(|cell| is_busy(cell));
        let busy = cells.len() as u64;
        progress.step(total - busy, total, "users free");
        if cells.is_empty() || clock.boot() >= end {
            let names = cells.iter().map(|cell| cell.name.to_string());
            return Ok(CacheAnswer::Busy(names.collect()));
        }
        clock.sleep(LOOK).await;
    }
}
