//! Repairs of a user by the session that owns it, while mail servers may use it.
//!
//! What keeps a user from being opened is done before ([`super::fsck::rescue`]); the rest is done
//! in the open user, by the same records as everything else: late mails get names, mails that
//! are named and dropped are taken off the list, and, if that was asked for, names of lost mails
//! are taken away. A folder in memory whose parts are damaged is simply written anew.

use super::bring_back::{LogWriter, bring_back};
use super::error::{Error, Result};
use super::flush::{self, Options};
use super::fsck::rescue::{Rescue, keep, rescue};
use super::fsck::{Kind, Report};
use super::gc;
use super::recover::unstop;
use super::session::UserCell;
use super::stored::{Stored, path_text};
use super::tree::Target;
use super::undelete::{self, Back};
use super::{load, open};
use crate::format::journal::Change;
use crate::format::key::{KeyTail, Piece, head_key, mail_key};
use crate::format::part::{Dropped, DroppedList};
use crate::format::{FolderId, ObjectId, Place};
use crate::fs::api::Invalidate;
use crate::store::{Body, PutMode, StoreError};
use std::collections::HashSet;
use std::sync::Arc;

/// What is repaired.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Everything by which nothing can be lost.
    pub all: bool,
    /// Names of mails whose objects are gone are taken away.
    pub drop_lost: bool,
    /// Whoever owned the user by a head that cannot be read is gone.
    pub owner_gone: bool,
}

/// Repairs what a check found. Gives what was done, for people.
///
/// # Errors
/// [`Error::Foreign`] and [`Error::Refused`] for a user of another backend; a store that does not
/// answer.
pub async fn repair(
    cell: &Arc<UserCell>,
    stored: &Stored,
    report: &Report,
    wanted: Wanted,
    logs: &dyn LogWriter,
) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let has = |kind: Kind| report.findings.iter().any(|f| f.kind == kind);
    if wanted.all && (has(Kind::Head) || has(Kind::Part)) {
        done.extend(make_openable(cell, stored, wanted.owner_gone).await?);
    }
    open::open(cell).await?;
    flush::flush(cell, Options::default()).await?;
    if wanted.all {
        // First, or the gc that looks for late mails would take what is named after all.
        done.extend(take_off_list(cell, stored).await?);
        done.extend(take_in_late(cell, stored, logs).await?);
    }
    if wanted.drop_lost && has(Kind::Lost) {
        done.extend(drop_lost(cell, stored, report).await?);
    }
    flush::flush(cell, Options::default()).await?;
    Ok(done)
}

async fn make_openable(
    cell: &Arc<UserCell>,
    stored: &Stored,
    owner_gone: bool,
) -> Result<Vec<String>> {
    // Nobody opens it meanwhile.
    let _one = cell.opening.lock().await;
    if cell.if_open(|_| ()).is_some() {
        let mut done = put_head_back(cell, stored).await?;
        done.extend(write_anew(cell, stored).await?);
        return Ok(done);
    }
    let session = &cell.session;
    let owner = stored.head_object().await?.and_then(|found| found.head.ok()).map(|h| h.owner);
    let gone = match &owner {
        Some(None) => true,
        Some(Some(owner)) if owner.backend == session.settings.backend => true,
        Some(Some(owner)) => {
            if !session.lease.is_over(session, &owner.backend).await? {
                let backend = owner.backend.clone();
                return Err(Error::Foreign { user: cell.name.to_string(), backend });
            }
            true
        }
        None => owner_gone || session.settings.single_backend,
    };
    let random = &session.env.random;
    let how = Rescue { random: (random.u64(), random.u64()), owner_gone: gone };
    rescue(stored, &how).await
}

/// A damaged head of a user that is open is written again from memory.
async fn put_head_back(cell: &Arc<UserCell>, stored: &Stored) -> Result<Vec<String>> {
    let found = stored.head_object().await?;
    let _one = cell.flushing.lock().await;
    let mut done = Vec::new();
    let mode = match found {
        Some(found) if found.head.is_ok() => return Ok(done),
        Some(found) => {
            let kept = keep(stored, "head", found.bytes).await?;
            done.push(format!("the damaged head is kept as {kept}"));
            PutMode::Update(found.tag.ok_or_else(|| Error::Internal("a head without tag".into()))?)
        }
        None => PutMode::Create,
    };
    let head = cell.open_user(|user| {
        user.may_write()?;
        Ok(user.head.encode())
    })?;
    let key = head_key(&stored.user);
    let put = stored.store.put(&key, Body::Bytes(head.into()), mode, &[], stored.why);
    let tag = put.await.map_err(|e| stored.failed(e))?;
    cell.if_open(|user| user.etag = tag);
    done.push("the head is written again".into());
    Ok(done)
}

/// The folders that are in memory are written as new bases, so no damaged part is needed.
async fn write_anew(cell: &Arc<UserCell>, stored: &Stored) -> Result<Vec<String>> {
    let head = cell.open_user(|user| Ok(user.head.clone()))?;
    let good = |read: Result<()>| match read {
        Ok(()) => Ok(true),
        Err(error @ Error::Store { .. }) => Err(error),
        Err(_) => Ok(false),
    };
    let links = good(stored.links(&head).await.map(drop))?;
    let mut dropped = Vec::new();
    for part in &head.dropped {
        if good(stored.ranges(&[part]).await.map(drop))? {
            dropped.push(part.clone());
        }
    }
    let folders = cell.open_user(|user| {
        let mut count = 0;
        for folder in user.tree.folders.values_mut().filter(|f| f.loaded && !f.parts.is_empty()) {
            folder.parts.clear();
            folder.layers.clear();
            let names: Vec<_> = folder
                .dirs()
                .flat_map(|(sub, dir)| {
                    dir.entries.after(0).map(move |(_, name, _)| (sub, name.clone()))
                })
                .collect();
            let subs: Vec<_> = folder.dirs().map(|(sub, _)| sub).collect();
            folder.unflushed.names.extend(names);
            folder.unflushed.dirs.extend(subs);
            count += 1;
        }
        if !links && user.links_known {
            user.head.names.clear();
            user.links_changed.extend(user.tree.links.keys());
        }
        user.head.dropped = dropped;
        user.important();
        Ok(count)
    })?;
    flush::flush(cell, Options::default()).await?;
    Ok(vec![format!("{folders} folders are written anew from local disk")])
}

/// Mails that nothing names get names.
async fn take_in_late(
    cell: &Arc<UserCell>,
    stored: &Stored,
    logs: &dyn LogWriter,
) -> Result<Vec<String>> {
    let options = gc::Options { dry_run: false, scan: true, unasked: true };
    let report = gc::collect(cell, options).await?;
    let mut done: Vec<String> =
        report.adopted.iter().map(|tail| format!("adopted {tail}")).collect();
    if report.orphans > 0 {
        done.push(format!("{} leftovers of dead sessions put on the dropped list", report.orphans));
    }
    let mut back = undelete::Report::default();
    for tail in report.late.iter().filter_map(|tail| KeyTail::parse(tail).ok()) {
        let key = tail.decode();
        if key.piece != Piece::Whole {
            continue;
        }
        let size = match stored.store.head(&mail_key(&stored.user, &tail), stored.why).await {
            Ok(meta) => meta.size,
            Err(StoreError::NotFound { .. }) => continue,
            Err(e) => return Err(stored.failed(e)),
        };
        let path = cell.open_user(|user| Ok(user.tree.path(Place::own(key.folder))))?;
        back.mails.push(Back {
            size,
            folder: key.folder,
            path,
            old_name: key.name.unwrap_or_default(),
            expunged: None,
            with_flags: false,
            late: true,
            name: String::new(),
            tail,
        });
    }
    bring_back(cell, &DroppedList::default(), &mut back, false, logs).await?;
    done.extend(back.mails.iter().map(|m| format!("adopted {} as {}", m.tail, m.name)));
    Ok(done)
}

/// What is named must not be on the dropped list.
async fn take_off_list(cell: &Arc<UserCell>, stored: &Stored) -> Result<Vec<String>> {
    let head = cell.open_user(|user| Ok(user.head.clone()))?;
    let list = stored.dropped(&head).await?;
    if list.is_empty() {
        return Ok(Vec::new());
    }
    let mut named: HashSet<ObjectId> = HashSet::new();
    for folder in &head.folders {
        let state = stored.folder(folder).await?;
        for (_, _, entry) in state.listing.names() {
            named.extend(gc::named_by(entry));
        }
    }
    let mut done = Vec::new();
    for at in list.iter().filter(|at| !at.doomed) {
        if let Dropped::Mail(tail) = &at.object
            && named.contains(&tail.id())
        {
            let object = tail.clone();
            cell.open_user(|user| user.commit(vec![Change::Again { object }]))?;
            done.push(format!("{tail} is named, and taken off the dropped list"));
        }
    }
    Ok(done)
}

/// Takes the names of mails away whose objects are gone.
async fn drop_lost(cell: &Arc<UserCell>, stored: &Stored, report: &Report) -> Result<Vec<String>> {
    let mut lost: HashSet<ObjectId> = HashSet::new();
    for finding in report.findings.iter().filter(|f| f.kind == Kind::Lost) {
        let tail = finding.object.as_deref().and_then(|key| key.rsplit_once('/'));
        let Some(tail) = tail.and_then(|(_, tail)| KeyTail::parse(tail).ok()) else { continue };
        // It may have come back, and nothing is taken away that the store still has.
        match stored.store.head(&mail_key(&stored.user, &tail), stored.why).await {
            Ok(_) => {}
            Err(StoreError::NotFound { .. }) => _ = lost.insert(tail.id()),
            Err(e) => return Err(stored.failed(e)),
        }
    }
    let folders: Vec<FolderId> =
        cell.open_user(|user| Ok(user.tree.folders.keys().copied().collect()))?;
    let mut done = Vec::new();
    for folder in folders {
        load::load(cell, folder).await?;
        done.extend(cell.open_user(|user| {
            let Some(found) = user.tree.folders.get(&folder) else { return Ok(Vec::new()) };
            let mut names = Vec::new();
            for (sub, dir) in found.dirs() {
                for (_, name, target) in dir.entries.after(0) {
                    if let Target::Node(ix) = target
                        && let Some(object) = user.tree.nodes.get(ix).and_then(|n| n.object())
                        && lost.contains(&object.id())
                    {
                        names.push((Place { folder, sub }, name.clone(), dir.ino));
                    }
                }
            }
            let mut done = Vec::new();
            for (at, name, parent) in names {
                user.unlink(at, &name).map_err(unstop)?;
                user.session.invalidate(Invalidate::Name { parent, name: name.to_vec() });
                user.session.invalidate(Invalidate::Inode { ino: parent });
                let name = crate::format::escape::escape(&name);
                done.push(format!("the name {}/{name} is gone", path_text(&user.tree.path(at))));
            }
            Ok(done)
        })?);
    }
    Ok(done)
}
