//! What is awaited on behalf of a call, each with its deadline.

use super::env::Clock;
use super::error::{During, Error, Result};
use super::need::Need;
use super::session::{Exists, Session, UserCell};
use super::swap::{is_nobody, read_head};
use super::{fetch, flush, load, open, publish, restore, space, stage, stream, sync, unserved};
use crate::cache::staging::Staged;
use crate::format::key::parse_user_dir;
use crate::store::Reason;
use std::sync::Arc;
use std::time::Duration;

/// How long a delivery waits for a store that fails, and the pauses between its tries.
#[derive(Debug)]
pub struct Patience {
    clock: Arc<dyn Clock>,
    end: Duration,
    pause: Duration,
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

impl Patience {
    pub fn new(session: &Session) -> Patience {
        let clock = session.env.clock.clone();
        let end = clock.boot() + session.settings.delivery_timeout;
        Patience { clock, end, pause: FIRST_PAUSE }
    }

    /// By [`Clock::boot`].
    pub fn end(&self) -> Duration {
        self.end
    }

    /// Pauses before one more try; false when there is no time for it.
    pub async fn again(&mut self) -> bool {
        if self.clock.boot() + self.pause >= self.end {
            return false;
        }
        self.clock.sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        true
    }
}

/// How often a delivery looks whether staging has room.
const ROOM_PAUSE: Duration = Duration::from_millis(50);

/// Sets room in staging aside for a file to become so long, for as long as a delivery may wait.
pub async fn staging_room(session: &Session, staged: &Staged, len: u64) -> Result<()> {
    let clock = &session.env.clock;
    let end = clock.boot() + session.settings.delivery_timeout;
    let full = |what: &str| Error::Full(format!("staging {what} for a file of {len} bytes"));
    if !staged.ever_fits(len) {
        return Err(full("is too small"));
    }
    while !staged.reserve(len) {
        if clock.boot() >= end {
            return Err(full("has no room"));
        }
        clock.sleep(ROOM_PAUSE).await;
    }
    Ok(())
}

/// How long a lookup waits to hear whether a user exists: the kernel holds the lock of the
/// users' directory meanwhile.
const EXISTS_WAIT: Duration = Duration::from_millis(300);

pub async fn satisfy(session: &Arc<Session>, need: Need) -> Result<()> {
    let (cell, reading) = (need.cell().cloned(), is_reading(&need));
    let subject = unserved::subject(&need);
    let done = satisfy_once(session, need).await;
    if let Some(subject) = subject {
        session.unserved.note(subject, &done);
    }
    let done = if reading { done } else { done.map_err(Error::for_delivery) };
    match (done, cell) {
        // The user was closed under it, for itself: the call is made again once that is over.
        (Err(Error::HandingOver { .. } | Error::Closing), Some(cell)) if !session.is_closing() => {
            open::open(&cell).await.map_err(Error::for_delivery)
        }
        (done, _) => done,
    }
}

/// Whether a call that waits for this reads a mail. Anything else may be on the way of a delivery.
fn is_reading(need: &Need) -> bool {
    match need {
        Need::Fetch(_) | Need::FetchExtent(..) | Need::Through(..) => true,
        Need::Publish(_)
        | Need::SyncLocal(_)
        | Need::SyncJournal(_)
        | Need::Stage(..)
        | Need::Room(..)
        | Need::Staging(..)
        | Need::Ceiling(..)
        | Need::UidValidity(..)
        | Need::Open(_)
        | Need::Exists(_)
        | Need::Users
        | Need::Load(..)
        | Need::Restore(..) => false,
    }
}

async fn satisfy_once(session: &Arc<Session>, need: Need) -> Result<()> {
    match need {
        Need::Open(cell) => open::open(&cell).await,
        Need::Exists(cell) => {
            exists(session, &cell).await;
            Ok(())
        }
        Need::Users => list_users(session).await,
        Need::Load(cell, folder) => load::load(&cell, folder).await,
        Need::Restore(cell, folder) => restore::restore(&cell, folder).await,
        Need::Publish(node) => publish::publish(&node).await,
        Need::SyncLocal(node) => sync::sync_local(&node).await,
        Need::SyncJournal(cell) => sync::sync_user(&cell).await,
        Need::Fetch(node) => fetch::fetch(&node).await,
        Need::FetchExtent(node, index) => fetch::fetch_extent(&node, index).await,
        Need::Through(node, piece) => stream::through(&node, &piece).await,
        Need::Staging(cell, staged, len) => staging_room(&cell.session, &staged, len).await,
        Need::Room(bytes, purpose) => space::reserve(session, bytes, purpose).await.map(drop),
        Need::Stage(node, offset) => stage::stage(&node, offset).await,
        need @ (Need::Ceiling(..) | Need::UidValidity(..)) => flush::await_ceiling(need).await,
    }
}

/// Asks the store whether a user exists. Without an answer in time the user counts as there.
///
/// It is the head that is asked for: whoever looks a user up mostly opens it next, and then has
/// it.
async fn exists(session: &Arc<Session>, cell: &Arc<UserCell>) {
    let why = Reason("lookup");
    let asked = async {
        match read_head(cell, why).await? {
            Some((head, tag)) => {
                session.heads.keep(&cell.name, session.env.clock.boot(), head, tag);
                Ok(Exists::Yes)
            }
            // Who has been here is asked for again by whoever opens it.
            None if is_known_here(session, cell) => Ok(Exists::Yes),
            None => is_nobody(cell, why).await.map(|()| Exists::No),
        }
    };
    let in_time = session.env.clock.sleep(EXISTS_WAIT);
    let answer = tokio::select! {
        answer = asked => answer.unwrap_or(Exists::Yes),
        () = in_time => Exists::Yes,
    };
    let mut root = cell.root.lock();
    if root.exists == Exists::Unknown {
        root.exists = answer;
    }
}

/// Whether this machine has state of a user.
pub(super) fn is_known_here(session: &Session, cell: &UserCell) -> bool {
    let head = session.state_dir_of(&cell.name).join("head");
    session.disk().exists(&head).unwrap_or(true)
}

/// How long a list of all users is shown before it is made anew.
const USERS_FOR: Duration = Duration::from_secs(30);

async fn list_users(session: &Arc<Session>) -> Result<()> {
    let store = &session.env.store;
    let failed = |e| Error::store("listing users", During::Delivery, e);
    let mut users = Vec::new();
    let top = store.list_dirs("", Reason("users")).await.map_err(failed)?;
    for hh in top.iter().filter(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit())) {
        for dir in store.list_dirs(hh, Reason("users")).await.map_err(failed)? {
            if let Some(path) =
                parse_user_dir(&dir).ok().and_then(|name| session.settings.layout.path_of(&name))
            {
                users.push(path);
            }
        }
    }
    *session.user_list.lock() = Some(users);
    let again = session.clone();
    tokio::spawn(async move {
        again.env.clock.sleep(USERS_FOR).await;
        *again.user_list.lock() = None;
    });
    Ok(())
}
