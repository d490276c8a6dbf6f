//! What the heart tells of itself.

use crate::admin::{
    Aside, AtRisk, Backlog, CacheUse, Changes, Damaged, Flushes, LeaseStatus, Status, UserStatus,
};
use crate::cache::fscache::FscacheUsage;
use crate::vmail::admin::Waiting;
use crate::vmail::session::Session;
use std::path::Path;
use std::sync::Arc;

/// Users that a status names at most.
const NAMED: usize = 1000;

pub(super) fn user_status(waiting: &Waiting) -> UserStatus {
    UserStatus {
        user: waiting.user.clone(),
        changes: match (waiting.important, waiting.unimportant) {
            (true, _) => Changes::Important,
            (false, true) => Changes::Unimportant,
            (false, false) => Changes::None,
        },
        oldest_age: waiting.oldest.map(|age| age.as_secs()),
        mails_newer_than_bundle: u64::from(waiting.new_mails),
        error: waiting.lost.then(|| "another session writes this user now".to_string()),
    }
}

pub(super) fn at_risk(all: &[Waiting]) -> AtRisk {
    let important = all.iter().filter(|w| w.important);
    AtRisk {
        users: important.clone().count() as u64,
        changed_bytes: important.clone().map(|w| w.changed_bytes).sum(),
        oldest_age: important.filter_map(|w| w.oldest).max().map(|age| age.as_secs()),
        promised_mails: all.iter().map(|w| w.promised).sum(),
        promised_bytes: all.iter().map(|w| w.promised_bytes).sum(),
        unpublished_mails: all.iter().map(|w| w.unpublished).sum(),
        unpublished_bytes: all.iter().map(|w| w.unpublished_bytes).sum(),
    }
}

fn backlog(all: &[Waiting]) -> Backlog {
    let important = all.iter().filter(|w| w.important).count() as u64;
    let changed = all.iter().filter(|w| w.important || w.unimportant).count() as u64;
    Backlog {
        users_important: important,
        users_unimportant: changed - important,
        oldest_age: all.iter().filter_map(|w| w.oldest).max().map(|age| age.as_secs()),
        mails_newer_than_bundle: all.iter().map(|w| u64::from(w.new_mails)).sum(),
    }
}

/// Users, risk, lease, caches, flushes.
pub(super) fn fill(session: &Arc<Session>, status: &mut Status) {
    let (open, waiting) = session.waiting();
    status.users_open = open;
    status.lost_mails = session.lost_mails.count();
    let damaged = session.unserved.all().into_iter();
    status.damaged = damaged.map(|d| Damaged { user: d.user, error: d.error }).collect();
    status.at_risk = at_risk(&waiting);
    status.backlog = backlog(&waiting);
    status.users = waiting.iter().take(NAMED).map(user_status).collect();
    status.lease = (!session.settings.single_backend).then(|| LeaseStatus {
        held: session.lease.holds(),
        taken_by: session.lease.taken_by().map(|holder| holder.to_string()),
        seconds_left: session.lease.seconds_left(),
    });
    let counts = session.counts.now();
    status.flushes = Flushes {
        done: counts.flushes,
        failed: counts.flushes_failed,
        bytes: counts.flushed_bytes,
        mean_seconds: counts.flush_time.mean().map_or(0.0, |mean| mean.as_secs_f64()),
    };
    let settings = &session.settings;
    let place = |path: &Path, used, max| CacheUse {
        path: path.display().to_string(),
        used,
        max,
        ..CacheUse::default()
    };
    let kept = session.kept_aside();
    status.aside = Aside {
        path: session.aside_dir().display().to_string(),
        users: kept.users,
        bytes: kept.bytes,
    };
    let fscache = session.fscache.usage();
    let sum = |of: fn(&FscacheUsage) -> u64| fscache.iter().map(of).sum();
    let paths: Vec<String> = fscache.iter().map(|one| one.path.display().to_string()).collect();
    status.caches.fscache = CacheUse {
        path: paths.join(" "),
        used: sum(|one| one.used),
        max: sum(|one| one.max),
        files: Some(sum(|one| one.files)),
        hits: Some(sum(|one| one.hits)),
        misses: Some(sum(|one| one.misses)),
        evictions: Some(sum(|one| one.evictions)),
        streamed: Some(sum(|one| one.streamed)),
    };
    let (staged, staging_max) = session.staging.usage();
    status.caches.staging = place(&settings.staging_dir, staged, staging_max);
    status.caches.metacache = CacheUse {
        hits: Some(counts.opens_local + counts.loads_local),
        misses: Some(counts.opens_store + counts.loads_store),
        ..place(
            &settings.metacache_dir,
            session.metacache.used(),
            settings.metacache.limits.max_space,
        )
    };
}
