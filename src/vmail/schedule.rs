//! When a user is flushed, and what else is done behind the scenes.
//!
//! | trigger | when |
//! |---|---|
//! | important change | it is `upload_interval` old |
//! | more than `max_rescan_mail_count` mails newer than the last flush | the first is `upload_interval` old |
//! | folder made, renamed or removed; expunge of a mail newer than the last flush; first UID of a folder | quiet for `quiet`, at the latest after `quiet_max` |
//! | UID ceiling near | at once, the head alone |
//! | anything else | once a user is unused for `idle_upload`, at most once a day, and no more than `idle_uploads` users a minute |
//!
//! A flush that fails is tried again at the next look, with a pause that grows.

use super::flush::{self, Options};
use super::need::NodeRef;
use super::publish;
use super::session::{Session, UserCell};
use super::sync;
use super::user::User;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Longest time between two looks.
const TICK: Duration = Duration::from_millis(500);
const DAY: Duration = Duration::from_secs(24 * 3600);
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What a user is due for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    Nothing,
    Flush { caches: bool },
    Ceiling,
}

/// Decides at `now` by what waits. Pure, so that a virtual clock can walk through it.
pub fn due(user: &User, now: Duration) -> Due {
    if user.lost || !user.ready || user.session.lease.taken_by().is_some() {
        return Due::Nothing;
    }
    let settings = &user.session.settings;
    let age = |since: Option<Duration>| since.map_or(Duration::ZERO, |s| now.saturating_sub(s));
    let changes = &user.changes;
    if let Some((first, last)) = changes.urgent
        && (now.saturating_sub(last) >= settings.quiet
            || now.saturating_sub(first) >= settings.quiet_max)
    {
        return Due::Flush { caches: false };
    }
    if user.ceiling_wanted {
        return Due::Ceiling;
    }
    if changes.important.is_some() && age(changes.important) >= settings.upload_interval {
        return Due::Flush { caches: false };
    }
    if changes.new_mails > settings.max_rescan_mail_count
        && age(changes.new_since) >= settings.upload_interval
    {
        return Due::Flush { caches: false };
    }
    let idle = now.saturating_sub(user.used) >= settings.idle_upload;
    let today = user.idle_flush.is_some_and(|at| now.saturating_sub(at) < DAY);
    if idle && !today && (changes.unimportant.is_some() || user.caches_wait()) {
        return Due::Flush { caches: true };
    }
    Due::Nothing
}

/// Limits how many flushes of unimportant changes are begun.
#[derive(Debug, Default)]
struct Rate {
    next: Duration,
}

impl Rate {
    /// Whether one may be begun at `now`. After a pause some may follow each other at once.
    fn take(&mut self, now: Duration, in_a_minute: u32) -> bool {
        let between = Duration::from_secs(60) / in_a_minute.max(1);
        self.next = self.next.max(now.saturating_sub(between * 10));
        if self.next > now {
            return false;
        }
        self.next += between;
        true
    }
}

/// Users whose last flush failed: until when they rest, and for how long that is.
type Pauses = HashMap<Arc<str>, (Duration, Duration)>;

/// Runs until the session closes.
pub async fn run(session: Arc<Session>) {
    let pauses: Arc<Mutex<Pauses>> = Arc::default();
    let mut idle = Rate::default();
    loop {
        tokio::select! {
            () = session.wake.notified() => {}
            () = session.env.clock.sleep(TICK) => {}
        }
        if session.closing.load(Ordering::Acquire) {
            return;
        }
        retry_publishes(&session);
        sync::sync_those_due(&session);
        let now = session.env.clock.boot();
        // Many users are known and few have anything to do: only these are put in order.
        let mut all: Vec<(Arc<UserCell>, Due)> = session
            .users_in_any_order()
            .into_iter()
            .filter_map(|cell| cell.if_open(|user| due(user, now)).map(|due| (cell, due)))
            .filter(|(_, due)| *due != Due::Nothing)
            .collect();
        all.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        for (cell, due) in all {
            if pauses.lock().get(&cell.name).is_some_and(|(until, _)| now < *until) {
                continue;
            }
            if cell.flushing.try_lock().is_err() {
                continue;
            }
            if due == (Due::Flush { caches: true })
                && !idle.take(now, session.settings.metacache.idle_uploads)
            {
                continue;
            }
            let Ok(room) = session.flushes.try_acquire() else { break };
            room.forget();
            let (session, pauses) = (session.clone(), pauses.clone());
            tokio::spawn(async move {
                let done = work(&cell, due).await;
                session.flushes.add_permits(1);
                let now = session.env.clock.boot();
                let mut pauses = pauses.lock();
                match done {
                    Ok(()) => _ = pauses.remove(&cell.name),
                    Err(error) => {
                        let pause = pauses.get(&cell.name).map_or(FIRST_PAUSE, |(_, p)| *p * 2);
                        let pause = pause.min(LONGEST_PAUSE);
                        pauses.insert(cell.name.clone(), (now + pause, pause));
                        tracing::warn!(user = %cell.name, %error, "flush failed; tried again later");
                    }
                }
            });
        }
    }
}

async fn work(cell: &Arc<UserCell>, due: Due) -> super::error::Result<()> {
    match due {
        Due::Nothing => Ok(()),
        Due::Ceiling => flush::raise_ceilings(cell, None, None).await,
        Due::Flush { caches } => {
            let options = Options { caches, ..Options::default() };
            let report = flush::flush(cell, options).await?;
            cell.if_open(|user| {
                if caches {
                    user.idle_flush = Some(user.boot());
                    user.changes.unimportant = None;
                }
                if !report.flushed {
                    // There was nothing in it after all.
                    user.changes.urgent = None;
                    user.changes.important = None;
                }
            });
            Ok(())
        }
    }
}

/// Mails whose close failed: their names are shown here, so they must get to the store.
fn retry_publishes(session: &Arc<Session>) {
    for (cell, ix, ino) in std::mem::take(&mut *session.retries.lock()) {
        let Some(cell) = cell.upgrade() else { continue };
        let session = session.clone();
        tokio::spawn(async move {
            let node = NodeRef { cell, ix, ino };
            if let Err(error) = publish::publish(&node).await {
                tracing::warn!(user = %node.cell.name, %error, "a mail is still not in the store");
                let waiting = node.cell.if_open(|user| {
                    !user.lost
                        && user.tree.nodes.get(ix).is_some_and(|n| n.ino == ino && n.nlink > 0)
                });
                if waiting == Some(true) {
                    session.retries.lock().push((Arc::downgrade(&node.cell), ix, ino));
                }
            } else {
                // Its bytes may go from staging to the cache now.
                node.cell.if_open(|user| {
                    if let Some(node) = user.tree.nodes.get_mut(ix)
                        && node.ino == ino
                    {
                        node.handles += 1;
                        user.release(ix, false);
                    }
                });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_uploads_have_a_rate() {
        let mut rate = Rate::default();
        let mut begun = 0;
        for tick in 0..1200 {
            let now = Duration::from_secs(1000) + Duration::from_millis(500) * tick;
            while rate.take(now, 60) {
                begun += 1;
            }
        }
        // Ten minutes, and the few that may come at once.
        assert!((600..=612).contains(&begun), "{begun}");
    }
}
