//! What an earlier session left on the local disk and had not flushed: it died, or its store was away.
//!
//! It is at risk like any other change, whether anybody looks at its user or not. So such users are
//! looked for once a mount is there, and opened one after the other; from then on they are flushed and
//! closed as all are ([`super::schedule`], [`super::idle`]). Until one is open it counts as a user with
//! important changes: only an opening tells what they are.

use super::admin::Waiting;
use super::evict::is_settled;
use super::open::open_now;
use super::session::Session;
use crate::cache::metacache::Purpose;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Between two rounds through those that could not be opened.
const PAUSE: Duration = Duration::from_secs(5);

/// The users that were not opened yet.
#[derive(Debug, Default)]
pub struct Leftovers(Mutex<BTreeSet<Arc<str>>>);

impl Leftovers {
    pub fn has(&self, user: &str) -> bool {
        self.0.lock().contains(user)
    }

    /// Whoever opened it: from here on it is told of as every open user is.
    pub(super) fn opened(&self, user: &str) {
        self.0.lock().remove(user);
    }

    fn all(&self) -> Vec<Arc<str>> {
        self.0.lock().iter().cloned().collect()
    }
}

/// Looks for such users, and opens them; ends when none is left, or with the session.
pub async fn run(session: Arc<Session>) {
    look(&session).await;
    while !session.is_closing() && open_all(&session).await > 0 {
        session.env.clock.sleep(PAUSE).await;
    }
}

/// Notes the users of whom the local disk has what the store may not have.
pub async fn look(session: &Arc<Session>) {
    for (name, _) in session.metacache.users() {
        let Some(cell) = session.user_by_name(&name) else { continue };
        if session.is_closing() {
            return;
        }
        if cell.if_open(|_| ()).is_some() {
            continue;
        }
        let settled = is_settled(&cell).await.unwrap_or_else(|error| {
            tracing::warn!(user = %name, %error, "what an earlier session left cannot be read");
            false
        });
        if !settled && cell.if_open(|_| ()).is_none() {
            session.leftovers.0.lock().insert(name.clone());
            if cell.if_open(|_| ()).is_some() {
                session.leftovers.opened(&name);
            }
        }
    }
}

/// Tries once with each. Gives how many are left.
pub async fn open_all(session: &Arc<Session>) -> usize {
    for name in session.leftovers.all() {
        let Some(cell) = session.user_by_name(&name) else { continue };
        if session.is_closing() {
            break;
        }
        match open_now(&cell, Purpose::Load).await {
            Ok(()) => session.leftovers.opened(&name),
            Err(error) => {
                tracing::debug!(user = %name, %error, "left by an earlier session, not opened yet");
            }
        }
    }
    session.leftovers.0.lock().len()
}

impl Session {
    /// Users that an earlier session left with changes and that are not open, since the start.
    pub(super) fn left_over(self: &Arc<Self>, now: Duration) -> Vec<Waiting> {
        let closed = |name: &Arc<str>| {
            self.known_user(name).is_none_or(|cell| cell.if_open(|_| ()).is_none())
        };
        let waiting = |name: Arc<str>| Waiting {
            user: name.to_string(),
            important: true,
            unimportant: true,
            oldest: Some(now.saturating_sub(self.started)),
            ..Waiting::default()
        };
        self.leftovers.all().into_iter().filter(closed).map(waiting).collect()
    }
}
