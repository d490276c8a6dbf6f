//! What the metacache's books say, for an admin.

use super::aliases::Aliases;
use super::{told, whom};
use crate::admin::caches::{
    ByTime, CacheAnswer, CacheRequest, ListRow, MetacacheReport, Rescanned,
};
use crate::admin::{AdminError, Changes, ErrorKind};
use crate::vmail::metacache::{Pending, UserCache};
use crate::vmail::session::{Session, UserCell};
use std::sync::Arc;

/// Ends of the spans by which a status sums up, seconds: an hour, a day, a week, a month.
const SPANS: [u64; 4] = [3600, 86_400, 7 * 86_400, 30 * 86_400];

pub(super) async fn serve(
    session: &Arc<Session>,
    what: CacheRequest,
) -> Result<CacheAnswer, AdminError> {
    match what {
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
        .unwrap_or(false)
    });
}
