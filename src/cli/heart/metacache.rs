//! What the metacache's books say, for an admin.

use super::aliases::Aliases;
use super::{told, whom};
use crate::admin::caches::{
    self, ByTime, CacheAnswer, CacheRequest, Cleaned, ListRow, MetacacheReport, Refreshed,
    Rescanned, Whom,
};
use crate::admin::{AdminError, Changes, ErrorKind, Progress};
use crate::vmail::metacache::{Clean, Pending, Refreshed as Found, Unflushed, UserCache};
use crate::vmail::session::{Session, UserCell};
use std::sync::Arc;
use std::time::Duration;

/// Ends of the spans by which a status sums up, seconds: an hour, a day, a week, a month.
const SPANS: [u64; 4] = [3600, 86_400, 7 * 86_400, 30 * 86_400];

pub(super) async fn serve(
    session: &Arc<Session>,
    what: CacheRequest,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    match what {
        CacheRequest::MetacacheClean { whom, min_priority, days, unflushed } => {
            let what = Clean {
                min_priority: usize::from(min_priority),
                unused_for: Duration::from_secs(u64::from(days) * 86_400),
                unflushed: match unflushed {
                    caches::Unflushed::Refuse => Unflushed::Refuse,
                    caches::Unflushed::Flush => Unflushed::Flush,
                    caches::Unflushed::Discard => Unflushed::Discard,
                },
            };
            clean(session, &whom, what, progress).await
        }
        CacheRequest::MetacacheRemove { mask } => remove(session, mask, progress).await,
        CacheRequest::MetacacheRefresh { whom } => refresh(session, &whom, progress).await,
        CacheRequest::MetacacheList { mask, field } => {
            list(session, mask.as_deref(), field.as_deref()).map(CacheAnswer::List)
        }
        CacheRequest::MetacacheStatus => Ok(CacheAnswer::Metacache(report(session))),
        CacheRequest::MetacacheRescan => {
            let found = session.metacache_rescan().await.map_err(|e| told(&e))?;
            Ok(CacheAnswer::Rescanned(Rescanned {
                users: found.users,
                booked: found.booked,
                found: found.found,
                wrong: found.wrong,
            }))
        }
        _ => Err(AdminError::new(ErrorKind::Internal, "not a request about the metacache")),
    }
}

/// Names that are meant; one that is nobody's is an error.
async fn names(session: &Arc<Session>, whom: &Whom) -> Result<Vec<String>, AdminError> {
    let (cells, nobody) = whom::cells(session, whom).await?;
    match nobody.into_iter().next() {
        Some((_, why)) => Err(why),
        None => Ok(cells.iter().map(|cell| cell.name.to_string()).collect()),
    }
}

async fn clean(
    session: &Arc<Session>,
    whom: &Whom,
    what: Clean,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    let names = names(session, whom).await?;
    let (of, mut all) = (names.len() as u64, Vec::new());
    for (at, user) in (1..).zip(names) {
        let done = session.metacache_clean(&user, what).await;
        let mut row = Cleaned { user, ..Cleaned::default() };
        match done {
            Ok(done) => (row.freed, row.left) = (done.freed, done.left),
            Err(error) => row.error = Some(error.to_string()),
        }
        all.push(row);
        progress.step(at, of, "users");
    }
    Ok(CacheAnswer::Cleaned(all))
}

async fn remove(
    session: &Arc<Session>,
    mask: String,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    let names = names(session, &Whom::Matching { mask: Some(mask), field: None }).await?;
    let (of, mut all) = (names.len() as u64, Vec::new());
    for (at, user) in (1..).zip(names) {
        let bytes = || session.metacache.known(&user).map_or(0, |a| a.bytes().iter().sum::<u64>());
        let before = bytes();
        let done = session.metacache_remove(&user).await;
        let left = bytes();
        let mut row = Cleaned { freed: before.saturating_sub(left), left, ..Cleaned::default() };
        match done {
            Ok(gone) => row.busy = !gone,
            Err(error) => row.error = Some(error.to_string()),
        }
        row.user = user;
        all.push(row);
        progress.step(at, of, "users");
    }
    Ok(CacheAnswer::Cleaned(all))
}

async fn refresh(
    session: &Arc<Session>,
    whom: &Whom,
    progress: &Progress,
) -> Result<CacheAnswer, AdminError> {
    let names = names(session, whom).await?;
    let (of, mut all) = (names.len() as u64, Vec::new());
    for (at, user) in (1..).zip(names) {
        let found = session.metacache_refresh(&user).await;
        all.push(match found {
            Ok(found) => Refreshed { user, changed: found == Found::Changed, error: None },
            Err(error) => Refreshed { user, changed: false, error: Some(error.to_string()) },
        });
        progress.step(at, of, "users");
    }
    Ok(CacheAnswer::Refreshed(all))
}

fn list(
    session: &Arc<Session>,
    mask: Option<&str>,
    field: Option<&str>,
) -> Result<Vec<ListRow>, AdminError> {
    let aliases = Aliases::read(session)?;
    let all = session.metacache_use();
    let keep = |user: &UserCache| match field {
        Some(field) => aliases.fits(&user.user, field, mask),
        None => whom::fits(mask, &user.user),
    };
    let row = |user: UserCache| ListRow {
        fields: aliases.of(&user.user),
        upload_within: user.upload_within.map(|within| within.as_secs()),
        dev_major: all.dev_major,
        dev_minor: all.dev_minor,
        bytes_used: user.bytes.to_vec(),
        last_access: user.last_access.to_vec(),
        changes: match user.pending {
            Pending::None => Changes::None,
            Pending::Unimportant => Changes::Unimportant,
            Pending::Important => Changes::Important,
        },
        last_service: user.last_service,
        cleanup_weight: user.cleanup_weight,
        username: user.user,
    };
    Ok(session.metacache_list().into_iter().filter(keep).map(row).collect())
}

fn report(session: &Arc<Session>) -> MetacacheReport {
    let all = session.metacache_use();
    let now = session.env.clock.wall().secs;
    let spans = SPANS.iter().map(|secs| Some(*secs)).chain([None]);
    let mut by_time: Vec<ByTime> =
        spans.map(|within| ByTime { within, ..ByTime::default() }).collect();
    for user in session.metacache_list() {
        let latest = user.last_access.iter().copied().max().unwrap_or(0);
        let age = u64::try_from(now.saturating_sub(latest)).unwrap_or(0);
        if let Some(span) = by_time.iter_mut().find(|s| s.within.is_none_or(|secs| age < secs)) {
            span.users += 1;
            span.bytes += user.bytes.iter().sum::<u64>();
        }
    }
    MetacacheReport {
        root: session.settings.metacache_dir.clone(),
        dev_major: all.dev_major,
        dev_minor: all.dev_minor,
        max_space: all.max_space,
        max_grace: all.max_grace,
        bytes_used: all.bytes,
        by_priority: all.by_priority.to_vec(),
        by_time,
    }
}

/// Leaves those that changed something of this priority, or of a less important one.
pub(super) fn keep_changed(cells: &mut Vec<Arc<UserCell>>, least: u8) {
    cells.retain(|cell| {
        cell.if_open(|user| {
            let folders = user.tree.folders.values();
            let changed: Vec<_> =
                folders.filter(|f| !f.unflushed.is_empty()).map(|f| f.id).collect();
            let listing = least == 0 && user.has_unflushed();
            listing || changed.into_iter().any(|id| user.priority(id) >= usize::from(least))
        })
        // Of what an earlier session left only an opening tells.
        .unwrap_or(true)
    });
}
