//! Opening a user: who owns it, what is known of it here, and what was lost.
//!
//! 1. The head is read. Another backend that lives keeps its user. Without a head it is a new user,
//!    unless this machine or the store has something else of it: then it is a doubt.
//! 2. Local state is good if the head in the store is the one it goes with (or the one whose
//!    swap was under way when we died). Otherwise it is obsolete: put aside if it holds changes,
//!    removed if not.
//! 3. The head is swapped: a new epoch, our name. After a session that did not end cleanly the
//!    same swap burns every UID below the old ceilings and raises them, so no UID can be given
//!    again whatever happens next.
//! 4. Only then is the store listed from the watermark (I5): objects that nothing names are
//!    mails that were made safe after the last flush. With our own journal at hand they were
//!    promised to nobody and are dropped; without it they are put into their folders.
//!
//! Until step 4 is done nobody is served and nothing is flushed: a new mail would be taken for
//! a lost one, and a flush would move the watermark past what is looked for. Local state says
//! so, too (`recovering`): whoever opens the user after a step 4 that failed or died
//! begins it again, and does not take the half of it for a journal that knows everything.

use super::build::{build, kept_on_disk};
use super::error::{Error, Result, pass};
use super::flush::save_head;
use super::local::{self, LocalState, Stamp, encode_stamped};
use super::parts;
use super::promise;
use super::publish::blocking;
use super::session::{CellState, Exists, UserCell};
use super::swap::{is_nobody, ours, read_head, swap_head};
use super::wait::Patience;
use super::{ceilings, close, load, recover, restore, space, sync};
use crate::cache::disk::sync_above;
use crate::cache::metacache::Purpose;
use crate::failpoint;
use crate::format::head::{ClosedEpoch, Head, HeadFolder, HeadOwner};
use crate::format::listing::Owner;
use crate::format::{Epoch, FolderId, ObjectId, Place};
use crate::sabotage::{self, Bug};
use crate::store::Reason;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Opens a user unless it is open, trying once.
pub async fn open_now(cell: &Arc<UserCell>, purpose: Purpose) -> Result<()> {
    let _one = cell.opening.lock().await;
    match is_served(cell) {
        Some(true) => return Ok(()),
        _ if cell.session.is_closing() => return Err(Error::Closing),
        Some(false) => {
            let _one = cell.flushing.lock().await;
            return close::reclaim(cell).await;
        }
        None => {}
    }
    open_once(cell, purpose).await
}

/// Opens a user unless it is open, trying for as long as a delivery may wait.
pub async fn open(cell: &Arc<UserCell>) -> Result<()> {
    let session = &cell.session;
    let mut patience = Patience::new(session);
    let _one = cell.opening.lock().await;
    loop {
        if session.is_closing() {
            return match is_served(cell) {
                Some(true) => Ok(()),
                _ => Err(Error::Closing),
            };
        }
        match is_served(cell) {
            Some(true) => return Ok(()),
            Some(false) => return close::reclaim_for(cell, &mut patience).await,
            None => {}
        }
        let error = match open_once(cell, Purpose::Load).await {
            Err(error @ (Error::Store { .. } | Error::Foreign { .. } | Error::Doubt { .. })) => {
                error
            }
            done => return done,
        };
        tracing::warn!(user = %cell.name, %error, "user not opened");
        if !patience.again().await {
            return Err(error);
        }
    }
}

/// Whether an open user can be written, as far as this session is concerned; `None` if it is to be
/// opened.
fn is_served(cell: &UserCell) -> Option<bool> {
    match &*cell.state.lock() {
        CellState::Open(user) if user.ready => Some(user.handed_over.is_none()),
        _ => None,
    }
}

/// How the new session follows the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Follows {
    /// There was none, or it handed over.
    Clean,
    /// Ours died, the machine lives: disk and journal tell everything.
    OwnCrash,
    /// Something may be missing.
    Loss,
}

/// What a user takes that has just been opened: its state, and the directories that lead to it.
const OPENED: u64 = 32 << 10;

async fn open_once(cell: &Arc<UserCell>, purpose: Purpose) -> Result<()> {
    let session = cell.session.clone();
    session.lease.check_name(&session.settings.backend)?;
    let _room = space::reserve_of(cell, OPENED, purpose).await?;
    // One that is no longer right makes the swap fail, and the next try reads it again.
    let remote = match session.heads.take(&cell.name, session.env.clock.boot()) {
        Some(read) => Some(read),
        None => read_head(cell, Reason("open")).await?,
    };
    let state_dir = session.state_dir_of(&cell.name);
    let cache_dir = cell.path.iter().fold(session.settings.metacache_dir.clone(), |d, c| d.join(c));
    let found = {
        let (disk, dir, name) = (session.env.disk.clone(), state_dir.clone(), cell.name.clone());
        let boot = session.settings.boot_id.clone();
        blocking(move || local::read(&*disk, &dir, &name, &boot)).await??
    };
    let local = match (&remote, found) {
        (Some(_), None) => None,
        (None, None) => {
            is_nobody(cell, Reason("open")).await?;
            None
        }
        (None, Some(_)) => {
            return Err(Error::Doubt {
                what: format!(
                    "user {}: the store says that it has no head of this user, but this machine \
                     knows one; it is asked again, and nothing is served until the head is there. \
                     If the user was removed on purpose, move {} away; if the head was lost, \
                     vmailfs fsck --repair makes one",
                    cell.name,
                    state_dir.display()
                ),
            });
        }
        (Some((head, _)), Some(local)) => usable(cell, head, local),
    };
    if let Some(local) = local.as_ref().filter(|local| local.head_is_newer) {
        // The note that tells whose the store's head is must outlive the next one.
        let bytes = local::encode_stamped(&local.stamp, &local.head)?;
        let (disk, path) = (session.env.disk.clone(), state_dir.join("head"));
        let done = blocking(move || disk.replace(&path, &bytes, true)).await?;
        done.map_err(|e| Error::disk("state", &e))?;
    }
    if local.is_none() {
        promise::set_aside(&session, &cell.name, &state_dir)?;
        let (disk, dir, cache) = (session.env.disk.clone(), state_dir.clone(), cache_dir.clone());
        let keep = unflushed_leftovers(cell, &dir)?.then(|| {
            let name = format!("{}-{:016x}", cell.path.join("_"), session.env.random.u64());
            session.settings.state_dir.join("lost").join(name)
        });
        if let Some(keep) = &keep {
            tracing::error!(
                user = %cell.name, kept = %keep.display(),
                "local state is damaged or older than the store's; what was not flushed of it is kept here"
            );
        }
        let (users, own) = (session.users_dir(), session.settings.state_dir.clone());
        blocking(move || {
            local::put_aside(&*disk, &dir, &cache, keep.as_deref())?;
            // Whoever else is just making one of these: nothing is in it before its name is safe.
            disk.create_dirs(&dir)
                .and_then(|()| sync_above(&*disk, &dir, &users))
                .and_then(|()| keep.map_or(Ok(()), |keep| sync_above(&*disk, &keep, &own)))
                .map_err(|e| Error::disk("state", &e))
        })
        .await??;
    }
    let follows = match (&remote, &local) {
        (None, _) => Follows::Clean,
        (Some((head, _)), _) if head.owner.is_none() => Follows::Clean,
        (_, Some(local))
            if local.stamp.boot == session.settings.boot_id && !local.stamp.recovering =>
        {
            Follows::OwnCrash
        }
        _ => Follows::Loss,
    };
    if let Some((head, _)) = &remote
        && let Some(owner) = &head.owner
        && owner.backend != session.settings.backend
        && !session.lease.is_over(&session, &owner.backend).await?
    {
        return Err(Error::Foreign { user: cell.name.to_string(), backend: owner.backend.clone() });
    }
    let before = remote.as_ref().map(|(head, _)| head.clone());
    let begun = local.as_ref().is_some_and(|l| l.stamp.recovering);
    let known_here = local.is_some();
    let (head, tag) = match remote {
        // A recovery of this session that failed: its epoch has given no id yet.
        Some((head, tag)) if begun && ours(cell, &head) => (head, tag),
        remote => {
            let (old, tag) = remote.unzip();
            let head = next_head(cell, old.as_ref(), follows);
            let flushed_seq = local.as_ref().map_or(0, |l| l.stamp.flushed_seq);
            let boot = session.settings.boot_id.clone();
            // A death from here on leaves index files that nobody has judged since the power cut.
            let judged = local.as_ref().is_none_or(|local| kept_on_disk(&session, &local.stamp));
            let recovering = follows == Follows::Loss || !judged;
            let stamp = Stamp { version: 1, flushed_seq, boot, clean: false, recovering };
            intend(cell, &state_dir, &head, &stamp).await?;
            if sabotage::is(Bug::ListBeforeSwap) {
                let start = before.as_ref().map_or(ObjectId::ZERO, |head| head.watermark);
                let found = recover::list_mails(cell, start, None, Reason("recover")).await?;
                sabotage::listed(found.iter().map(|(tail, _)| tail.id()).collect());
            }
            pass(failpoint::OPEN_BEFORE_SWAP)?;
            let swapped = swap_head(cell, &head, tag, Reason("open")).await?;
            pass(failpoint::OPEN_AFTER_SWAP)?;
            match swapped {
                Some(tag) => (head, tag),
                None => {
                    let backend = "(a rival)".into();
                    return Err(Error::Foreign { user: cell.name.to_string(), backend });
                }
            }
        }
    };
    let user = {
        let (cell, head, follows) = (cell.clone(), head, follows);
        blocking(move || build(&cell, head, tag, local, follows, state_dir, cache_dir)).await??
    };
    let named = user.named_above.clone();
    *cell.state.lock() = CellState::Open(Box::new(user.user));
    cell.root.lock().exists = Exists::Yes;
    let finished = finish(cell, follows, before, named, begun).await;
    if finished.is_ok() {
        session.counts.opened(known_here);
        session.leftovers.opened(&cell.name);
    } else {
        // Not ready to be served: the next call starts again, and finds our own epoch.
        *cell.state.lock() = CellState::Closed;
    }
    finished
}

async fn finish(
    cell: &Arc<UserCell>,
    follows: Follows,
    before: Option<Head>,
    named: HashSet<ObjectId>,
    begun: bool,
) -> Result<()> {
    promise::resume(cell, &named).await?;
    load_links(cell).await?;
    restore::after_power_cut(cell).await?;
    let epoch = cell.open_user(|user| Ok(user.epoch))?;
    if follows != Follows::Clean
        && let Some(head) = &before
    {
        let adopt = follows == Follows::Loss;
        // What is known to be a file published before it was whole.
        let finished = match adopt {
            true => recover::finish_names(cell, begun).await?,
            false => HashSet::new(),
        };
        recover::after_crash(cell, head.watermark, epoch, &named, adopt, &finished).await?;
    }
    if let Some(head) = &before {
        recover::late_arrivals(cell, head, &named).await?;
    }
    recover::adopt_promises(cell).await?;
    // Everything that came back is in the journal now.
    if cell.open_user(|user| Ok(user.recovering))? {
        sync::sync_user(cell).await?;
        pass(failpoint::RECOVER_BEFORE_DONE)?;
        cell.open_user(|user| {
            user.recovering = false;
            Ok(())
        })?;
        save_head(cell, false).await?;
    }
    load::load(cell, FolderId::ROOT).await?;
    cell.open_user(|user| {
        user.ready = true;
        Ok(())
    })?;
    cell.session.invalidate(crate::fs::api::Invalidate::Inode { ino: cell.ino });
    if cell.session.open_users().len() > cell.session.settings.metacache.max_open_users {
        cell.session.too_many.notify_one();
    }
    Ok(())
}

/// The table of objects with more than one name, unless it came from the local disk.
async fn load_links(cell: &Arc<UserCell>) -> Result<()> {
    let parts = cell.open_user(|user| {
        Ok(if user.links_known { Vec::new() } else { user.head.names.clone() })
    })?;
    if !parts.is_empty() {
        let refs: Vec<_> = parts.iter().collect();
        let frames = parts::fetch_ranges(cell, &refs).await?;
        let mut links = HashMap::new();
        for (part, frame) in parts.iter().zip(frames) {
            let what = || format!("user {}: bundle {}", cell.name, part.bundle);
            part.check(&frame).map_err(|e| Error::corrupt(what(), e))?;
            let limit = part.raw_len.saturating_add(4096).min(parts::PART_LIMIT);
            let rows = crate::format::part::decode_names(&frame, limit);
            for (id, count) in rows.map_err(|e| Error::corrupt(what(), e))? {
                if count > 1 {
                    links.insert(id, count);
                } else {
                    links.remove(&id);
                }
            }
        }
        cell.if_open(|user| {
            // What the journal said since is newer.
            for id in &user.links_changed {
                links.remove(id);
            }
            user.tree.links.extend(links);
        });
    }
    cell.if_open(|user| user.links_known = true);
    Ok(())
}

/// Local state that goes with the head in the store.
fn usable(cell: &UserCell, head: &Head, mut local: LocalState) -> Option<LocalState> {
    let by_session = |known: &Head| {
        head.owner.is_some() && head.owner == known.owner && head.epoch == known.epoch
    };
    match local.next.take() {
        _ if local.head.write_id == head.write_id => {}
        Some((stamp, next)) if next.write_id == head.write_id => {
            local.stamp = stamp;
            local.head = next;
            local.head_is_newer = true;
        }
        // A later head of the same session, of which the disk does not know (a swap that
        // arrived after it was given up, or a power cut): the journal was on the disk
        // before that swap, so it holds all that is in the head, and is only flushed again.
        _ if by_session(&local.head) => {}
        // Another try to open of the session that noted one, which arrived after it was given up. It
        // has flushed nothing, or the head of this disk were its own.
        Some((_, next)) if by_session(&next) => {
            local.head = head.clone();
            local.head_is_newer = true;
        }
        _ => {
            tracing::info!(user = %cell.name, "local state is older than the store's and not used");
            return None;
        }
    }
    if local.last_seq < local.stamp.flushed_seq {
        tracing::warn!(user = %cell.name, "the journal ends before the last flush and is not used");
        return None;
    }
    Some(local)
}

/// Whether obsolete local state holds changes that no head has.
fn unflushed_leftovers(cell: &UserCell, dir: &std::path::Path) -> Result<bool> {
    let disk = cell.session.disk();
    Ok(match local::read(disk, dir, &cell.name, &cell.session.settings.boot_id)? {
        Some(local) => local.last_seq > local.stamp.flushed_seq,
        None => disk.exists(&dir.join("journal")).map_err(|e| Error::disk("state", &e))?,
    })
}

fn next_head(cell: &UserCell, old: Option<&Head>, follows: Follows) -> Head {
    let session = &cell.session;
    let settings = &session.settings;
    let owner = HeadOwner { backend: settings.backend.clone(), session: session.id.clone() };
    let write_id = format!("{:016x}{:016x}", session.env.random.u64(), session.env.random.u64());
    let written = session.env.clock.wall().secs;
    let Some(old) = old else {
        let made = cell.root.lock().maker;
        let (root_owner, root_mode) = made
            .or(settings.root_owner.map(|o| (o, settings.root_mode)))
            .unwrap_or((Owner { uid: 0, gid: 0 }, settings.root_mode));
        return Head {
            user: cell.name.to_string(),
            epoch: Epoch(1),
            write_id,
            owner: Some(owner),
            watermark: ObjectId { epoch: Epoch(1), counter: 0 },
            closed: Vec::new(),
            root_owner,
            root_mode,
            folders: vec![HeadFolder {
                id: FolderId::ROOT,
                parent: Place::ROOT,
                name: Vec::new(),
                parts: Vec::new(),
                uid_ceiling: None,
                burnt_below: None,
                unfinished: false,
            }],
            uidvalidity_ceiling: None,
            uidvalidity_burnt: None,
            known_above: Vec::new(),
            names: Vec::new(),
            dropped: Vec::new(),
            previous: None,
            written,
        };
    };
    let mut head = old.clone();
    head.epoch = Epoch(old.epoch.0.saturating_add(1));
    head.write_id = write_id;
    head.owner = Some(owner);
    // After a clean hand-over nothing can show up late.
    if follows != Follows::Clean {
        head.closed.push(ClosedEpoch { epoch: old.epoch, end: old.watermark });
    }
    let excess = head.closed.len().saturating_sub(8);
    head.closed.drain(..excess);
    if follows == Follows::Loss {
        for folder in &mut head.folders {
            if let Some(ceiling) = folder.uid_ceiling {
                folder.burnt_below = folder.burnt_below.max(Some(ceiling));
                folder.uid_ceiling = ceilings::raised_uids(folder.uid_ceiling, ceiling);
            }
        }
        if let Some(ceiling) = head.uidvalidity_ceiling {
            head.uidvalidity_burnt = head.uidvalidity_burnt.max(Some(ceiling));
            head.uidvalidity_ceiling =
                ceilings::raised(head.uidvalidity_ceiling, ceiling, ceilings::VALIDITY_ROOM);
        }
    }
    head
}

/// Notes on the local disk that a head is about to be swapped in. Synced: with a head that it
/// does not know, everything on this disk would count as obsolete.
pub async fn intend(
    cell: &Arc<UserCell>,
    state_dir: &std::path::Path,
    head: &Head,
    stamp: &Stamp,
) -> Result<()> {
    let bytes = encode_stamped(stamp, head)?;
    let (disk, path) = (cell.session.env.disk.clone(), state_dir.join("head.next"));
    blocking(move || disk.replace(&path, &bytes, true).map_err(|e| Error::disk("state", &e)))
        .await?
}
