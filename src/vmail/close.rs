//! Handing a user over: everything is flushed, nobody owns it, local state says so.
//!
//! # The rule
//!
//! A change is in the head that hands the user over, or it is refused. What comes after the cut
//! of that head would be lost (whoever opens the user next looks for nothing above the watermark
//! of a head without an owner), so from the cut on nothing is changed here.
//!
//! # Order, and what a death in between leaves
//!
//! 1. New changes are refused ([`Leaving::Draining`]); what was begun ends: publishes put their
//!    record. A death leaves a session that died.
//! 2. The last cut. Under the same hold of the user's lock the user is sealed: from here on
//!    no record is written ([`Leaving::Sealed`]).
//! 3. The flush whose head has no owner. Its write id is kept before the swap is sent
//!    (`User::handed_over`); a death around the swap leaves both candidates on the disk, as with
//!    every flush.
//! 4. The local state is settled, the user is closed. The local disk may fail here: the next start
//!    finds `head.next`.
//!
//! Reading goes on through all of it. A change that meets a user on its way out waits for the end
//! of it and is made again, in the user that was opened again or not handed over; when the
//! whole mount ends it is refused (EAGAIN).
//!
//! # When it fails
//!
//! Before the swap was sent: the user is served as before. After that, while the answer is
//! missing, the store may have a head without an owner, or have it later, and another backend may
//! take the user at any time: nothing may be written until a swap in our name holds
//! ([`reclaim`]). The next call that needs the user makes it, and so does the next flush.
//!
//! Run it in a task of its own: dropped half-way it leaves a user that refuses changes, until the
//! next start.

use super::error::{Error, Result};
use super::flush::{self, Options, lost, new_write_id, save_head};
use super::open::intend;
use super::publish::blocking;
use super::session::{CellState, UserCell};
use super::swap::swap_head;
use super::user::User;
use super::wait::Patience;
use super::{idle, local, promise};
use crate::cache::weight::PRIORITIES;
use crate::format::head::HeadOwner;
use crate::fs::api::Invalidate;
use crate::store::Reason;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How far a user is on its way out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Leaving {
    #[default]
    No,
    /// Calls may change nothing; what they began before may end.
    Draining,
    /// The cut that hands over is taken: nothing changes.
    Sealed,
}

/// Publishes of a user that have been begun and have not written their record.
#[derive(Debug, Default)]
pub struct UnderWay {
    count: AtomicUsize,
    ended: tokio::sync::Notify,
}

/// One of them.
#[derive(Debug)]
pub struct Begun(Arc<UserCell>);

impl Begun {
    /// To be called under the user's lock, after it was asked whether changes may be made.
    pub(super) fn new(cell: &Arc<UserCell>) -> Begun {
        cell.publishing.count.fetch_add(1, Ordering::AcqRel);
        Begun(cell.clone())
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.publishing.count.fetch_sub(1, Ordering::AcqRel);
        self.0.publishing.ended.notify_waiters();
    }
}

impl User {
    /// What was begun may end: less than [`User::may_write`] asks for.
    pub fn may_finish(&self) -> Result<()> {
        if self.leaving == Leaving::Sealed && !self.lost {
            return Err(Error::HandingOver { user: self.name.to_string() });
        }
        self.owns()
    }

    /// The cut was given up, and nothing was sent that could make it hold.
    pub(super) fn unseal(&mut self) {
        if self.leaving == Leaving::Sealed && self.handed_over.is_none() {
            self.leaving = Leaving::Draining;
        }
    }

    /// Whether the store's head has no owner, or may have none.
    fn is_handed_over(&self) -> bool {
        self.head.owner.is_none()
    }
}

/// Hands a user over and closes it. After an error it is open, and is written again as the module
/// says.
///
/// # Errors
/// Those of a flush; [`Error::Full`] if publishes under way do not end; [`Error::Lost`].
pub async fn close(cell: &Arc<UserCell>) -> Result<()> {
    close_if(cell, false).await.map(drop)
}

/// The same, unless somebody uses it; also if that shows only in the end, and then it is taken back.
/// True if it is closed.
pub(super) async fn close_unused(cell: &Arc<UserCell>) -> Result<bool> {
    close_if(cell, true).await
}

async fn close_if(cell: &Arc<UserCell>, unused: bool) -> Result<bool> {
    // Not in the middle of an opening, and no other flush between this one and its end.
    let _opened = cell.opening.lock().await;
    let _one = cell.flushing.lock().await;
    let used = || unused && cell.if_open(|user| user.is_used()) == Some(true);
    if matches!(*cell.state.lock(), CellState::Closed) {
        return Ok(true);
    }
    if used() {
        return Ok(false);
    }
    reclaim(cell).await?;
    cell.open_user(|user| {
        user.leaving = Leaving::Draining;
        Ok(())
    })?;
    let flushed = hand_over(cell).await;
    let done = cell.open_user(|user| Ok(user.is_handed_over()))?;
    if !done {
        cell.if_open(|user| {
            user.unseal();
            match user.leaving {
                Leaving::Sealed => tracing::warn!(
                    user = %user.name,
                    "whether the user was handed over is not known; nothing is changed until it is"
                ),
                Leaving::No | Leaving::Draining => user.leaving = Leaving::No,
            }
        });
        return match flushed {
            Err(error) => Err(error),
            Ok(()) => Err(Error::Internal(format!("user {} was not handed over", cell.name))),
        };
    }
    let settled = match flushed {
        Ok(()) => settle(cell).await,
        Err(error) => Err(error),
    };
    if let Err(error) = settled {
        tracing::error!(user = %cell.name, %error, "handed over, but the local disk fails");
    }
    let forgotten = cell.if_open(|user| user.has_unflushed()) == Some(true);
    idle::remember_root(cell);
    if !shut(cell, unused) {
        take_back(cell).await?;
        return Ok(false);
    }
    match forgotten {
        true => Err(Error::Internal(format!("user {} changed while it was closed", cell.name))),
        false => Ok(true),
    }
}

/// The user is closed from here on; false if it is not, because somebody uses it.
fn shut(cell: &UserCell, unused: bool) -> bool {
    let mut state = cell.state.lock();
    let kept = matches!(&*state, CellState::Open(user) if unused && user.is_used());
    if !kept {
        *state = CellState::Closed;
    }
    !kept
}

/// Somebody came while the user was handed over.
async fn take_back(cell: &Arc<UserCell>) -> Result<()> {
    let session = &cell.session;
    let owner =
        HeadOwner { backend: session.settings.backend.clone(), session: session.id.clone() };
    cell.open_user(|user| {
        user.handed_over = Some(user.head.write_id.clone());
        user.head.owner = Some(owner);
        Ok(())
    })?;
    reclaim(cell).await
}

/// Throws away what no flush has: what is in memory, and everything of the user on the local disk.
/// Mails that were made safe are in the store, or are put there now; the next opening finds them as
/// after the loss of a machine. Who has files of the user open gets ESTALE.
///
/// # Errors
/// [`Error::Full`] if publishes under way do not end; of the store, if promised mails cannot be put
/// there.
pub async fn discard(cell: &Arc<UserCell>) -> Result<()> {
    let _opened = cell.opening.lock().await;
    let _one = cell.flushing.lock().await;
    if cell.if_open(|user| user.leaving = Leaving::Draining).is_some() {
        let kept = match still(cell).await {
            Ok(()) => promise::keep_all(cell).await,
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            cell.if_open(|user| {
                if user.handed_over.is_none() {
                    user.leaving = Leaving::No;
                }
            });
            return Err(error);
        }
        idle::remember_root(cell);
        *cell.state.lock() = CellState::Closed;
    }
    let session = &cell.session;
    let (state, cache) = (session.state_dir_of(&cell.name), session.cache_dir_of(&cell.path));
    promise::set_aside(session, &cell.name, &state)?;
    let disk = session.env.disk.clone();
    blocking(move || local::put_aside(&*disk, &state, &cache, None)).await??;
    session.metacache.account(&cell.name).set([0; PRIORITIES]);
    session.metacache.freed.notify_waiters();
    let parent = cell.root.lock().parent;
    if let (Some(parent), Some(name)) = (parent, cell.path.last()) {
        session.invalidate(Invalidate::Name { parent, name: name.clone().into_bytes() });
    }
    Ok(())
}

async fn hand_over(cell: &Arc<UserCell>) -> Result<()> {
    still(cell).await?;
    let options = Options { caches: true, release: true, important_only: false };
    flush::flush_alone(cell, options).await.map(drop)
}

/// Waits until every publish that was begun has its record.
async fn still(cell: &Arc<UserCell>) -> Result<()> {
    let mut late = cell.session.env.clock.sleep(cell.session.settings.delivery_timeout);
    loop {
        let ended = cell.publishing.ended.notified();
        if cell.publishing.count.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        tokio::select! {
            () = ended => {}
            () = &mut late => {
                return Err(Error::Full(format!("user {}: mails are still on their way", cell.name)));
            }
        }
    }
}

async fn settle(cell: &Arc<UserCell>) -> Result<()> {
    cell.open_user(|user| user.checkpoint())?;
    save_head(cell, true).await
}

/// Makes a user ours again whose hand-over failed after it was sent. `flushing` is held.
///
/// The swap is made on top of whatever of the two heads the store has; the one that was sent can
/// never hold after it.
pub(super) async fn reclaim(cell: &Arc<UserCell>) -> Result<()> {
    let sent = cell.open_user(|user| {
        if user.handed_over.is_none() {
            return Ok(None);
        }
        user.owns()?;
        let stamp = user.stamp(user.flushed_seq, false);
        Ok(Some((user.head.clone(), user.etag.clone(), user.state_dir.clone(), stamp)))
    })?;
    let Some((mut head, tag, dir, stamp)) = sent else { return Ok(()) };
    head.write_id = new_write_id(cell);
    intend(cell, &dir, &head, &stamp).await?;
    match swap_head(cell, &head, Some(tag), Reason("reclaim")).await? {
        Some(tag) => {
            cell.open_user(|user| {
                user.take_head(head, tag);
                user.handed_over = None;
                user.leaving = Leaving::No;
                Ok(())
            })?;
            tracing::info!(user = %cell.name, "not handed over; served again");
            save_head(cell, false).await
        }
        None => {
            cell.if_open(|user| user.lost = true);
            Err(lost(cell))
        }
    }
}

/// [`reclaim`] on behalf of a call, for as long as a delivery may wait.
pub(super) async fn reclaim_for(cell: &Arc<UserCell>, patience: &mut Patience) -> Result<()> {
    loop {
        let error = {
            let _one = cell.flushing.lock().await;
            match reclaim(cell).await {
                Err(error @ Error::Store { .. }) => error,
                done => return done,
            }
        };
        tracing::warn!(user = %cell.name, %error, "user not taken back");
        if !patience.again().await {
            return Err(error);
        }
    }
}
