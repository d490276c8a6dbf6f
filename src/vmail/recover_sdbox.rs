//! Recovered mails of sdbox: each gets a free number at or above the folder's ceiling, and a
//! record in Dovecot's index log that makes it show. Also what both dbox formats need of
//! Dovecot's index files.

use super::error::{Error, Result};
use super::load;
use super::need::Op;
use super::node::{Kind, NodeIx};
use super::recover::{Found, find_path, unstop};
use super::session::UserCell;
use super::tree::{NameBytes, Target};
use super::user::User;
use crate::dovecot::classes::Class;
use crate::dovecot::records::header;
use crate::dovecot::recover::{RecoverError, correct_sdbox, first_log, mark_fsckd};
use crate::dovecot::replay::replay;
use crate::format::listing::Attrs;
use crate::format::{FolderId, Place, Sub};
use std::sync::Arc;

pub(super) const INDEX_LOG: &[u8] = b"dovecot.index.log";

/// sdbox: each mail gets a free number at or above the ceiling, and a record.
///
/// A folder may be in the store without its index: Dovecot made it, and could not make the index, or
/// the flush came in between. It gets one that has Dovecot look for the mails, under a UIDVALIDITY
/// from its counter, which was raised above all that were given. Where Dovecot would have it is
/// known from other mailboxes; it is not read again once there is a younger one elsewhere.
pub(super) async fn put_back_numbered(
    cell: &Arc<UserCell>,
    folder: FolderId,
    objects: Vec<Found>,
) -> Result<()> {
    let index = index_folder(cell, folder, INDEX_LOG).await?;
    cell.open_user(|user| user.put_back_sdbox(folder, index, objects))?;
    if index.is_none() {
        begin_index(cell, folder).await?;
    }
    Ok(())
}

/// sdbox: mails that had their number when the last flush was cut, or when a recovery died, and were
/// not yet in the index.
pub(super) async fn show_unindexed(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    let index = index_folder(cell, folder, INDEX_LOG).await?;
    let mails = cell.open_user(|user| {
        user.show_numbers_above(folder, index, false).map_err(unstop)?;
        Ok(user.numbers(folder).next().is_some())
    })?;
    if index.is_none() && mails {
        begin_index(cell, folder).await?;
    }
    Ok(())
}

/// Makes Dovecot look for the mails of a folder that has no index.
pub(super) async fn begin_index(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    let path = cell.open_user(|user| Ok(user.index_path(folder)))?;
    let (place, _) = find_path(cell, &path).await?;
    load::load(cell, place).await?;
    // Without its log an index is made by Dovecot from what else there is of it.
    let half = cell.open_user(|user| {
        let others: [&[u8]; 2] = [b"dovecot.index", b"dovecot.index.log.2"];
        Ok(others.iter().any(|name| user.child(place, name).is_some()))
    })?;
    if half {
        tracing::warn!(
            user = %cell.name, folder = %String::from_utf8_lossy(&path.join(&b'/')),
            "recovered sdbox mails have an index without a log; Dovecot finds them at its rebuild"
        );
        return Ok(());
    }
    tracing::warn!(
        user = %cell.name, folder = %String::from_utf8_lossy(&path.join(&b'/')),
        "Dovecot is asked to make the index of recovered sdbox mails"
    );
    first_index(cell, &path).await.map(drop)
}

/// An sdbox folder that was made anew has no index, and Dovecot would make an empty one: it gets
/// one by which Dovecot looks what is there.
pub(super) async fn first_index(cell: &Arc<UserCell>, path: &[NameBytes]) -> Result<FolderId> {
    let (index, _) = find_path(cell, path).await?;
    load::load(cell, index).await?;
    cell.open_user(|user| {
        let now = user.now();
        let at = Place::own(index);
        let attrs = Attrs { mode: 0o600, owner: None, mtime: now };
        let log = first_log(u32::try_from(now.secs).unwrap_or(0));
        let class = user.class_of(at, INDEX_LOG);
        user.appears(at, INDEX_LOG.into(), class, attrs, &log)?;
        user.tell_kernel(at, INDEX_LOG);
        Ok(())
    })?;
    Ok(index)
}

impl User {
    /// The folder with the index of a mail folder, as far as it is in memory: beside the mails or in
    /// the tree of indexes. Only one is used; the other is left from another configuration, or from
    /// a recovery that could not know better.
    pub(super) fn index_of(&self, folder: FolderId, log: &[u8]) -> Option<FolderId> {
        let made = |id: &FolderId| Some(self.tree.nodes.get(self.child(*id, log)?)?.mtime);
        let both = [Some(folder), self.counterpart(folder)].into_iter().flatten();
        both.filter(|id| made(id).is_some()).max_by_key(made)
    }

    /// Where the index of an sdbox folder lies: in the tree of indexes if the user has one.
    pub(super) fn index_path(&self, folder: FolderId) -> Vec<NameBytes> {
        let own = self.tree.path(Place::own(folder));
        let Some(top) = own.first() else { return own };
        let other = self.tree.folders.keys().find_map(|id| {
            let path = self.tree.path(Place::own(*id));
            let apart = path.len() > 1 && path[0] != *top && &*path[1] == b"mailboxes";
            apart.then(|| path[0].clone())
        });
        match other {
            Some(other) => {
                let mailbox = own[1..].iter().filter(|n| &***n != b"dbox-Mails").cloned();
                std::iter::once(other).chain(mailbox).collect()
            }
            None => own,
        }
    }

    pub(super) fn put_back_sdbox(
        &mut self,
        folder: FolderId,
        index: Option<FolderId>,
        objects: Vec<Found>,
    ) -> Result<()> {
        let at = Place::own(folder);
        let mut uid = self.free_uid(folder, index);
        let mut uids = Vec::new();
        for object in &objects {
            let name: NameBytes = format!("u.{uid}").into_bytes().into();
            let node = self.mail_node(object, Class::Mail);
            self.put_name(at, name, node)?;
            uids.push(uid);
            uid = uid.saturating_add(1);
        }
        self.show_numbered(index, &uids, &[])
    }

    /// A number that no mail of an sdbox folder has or may have had.
    pub(super) fn free_uid(&self, folder: FolderId, index: Option<FolderId>) -> u32 {
        let highest = self.numbers(folder).max().unwrap_or(0);
        let known = index.and_then(|id| self.tree.folders.get(&id));
        let burnt = known.and_then(|f| f.burnt_below).unwrap_or(0);
        let next = known.and_then(|f| f.next_uid).unwrap_or(1);
        burnt.max(next).max(highest.saturating_add(1)).max(1)
    }

    /// Makes Dovecot show the files with these numbers, and not show those that are gone.
    fn show_numbered(&mut self, index: Option<FolderId>, uids: &[u32], gone: &[u32]) -> Result<()> {
        let known = index.and_then(|id| self.tree.folders.get(&id));
        let burnt = known.and_then(|f| f.burnt_below).unwrap_or(0);
        let Some(index) = index else { return Ok(()) };
        let Some(log) = self.child(index, b"dovecot.index.log") else { return Ok(()) };
        let state = self.index_state(index, b"dovecot.index")?;
        let content = self.index_content(log)?;
        let append = match state.map(|state| correct_sdbox(&state, gone, uids, burnt)) {
            Some(Ok(append)) => append,
            other => {
                tracing::warn!(user = %self.name, problem = ?other.map(|r| r.err()), "Dovecot is asked to rebuild a folder");
                mark_fsckd(&content, 0).map_err(|e| damaged(self, &e))?
            }
        };
        self.append_log(log, &append)
    }

    /// The sdbox folder whose index lies in a folder, if it has mails.
    pub(super) fn numbered_mails(&self, index: FolderId) -> Option<FolderId> {
        let others = self.mailboxes().others(self, index);
        others.into_iter().chain([index]).find(|id| self.numbers(*id).next().is_some())
    }

    /// The numbers of the mail files of an sdbox folder.
    fn numbers(&self, folder: FolderId) -> impl Iterator<Item = u32> {
        let dir = self.tree.dir(Place::own(folder));
        dir.into_iter().flat_map(|d| d.entries.after(0)).filter_map(|(_, n, _)| number(n, b"u."))
    }

    /// Shows the mails of which the index has not heard. Their numbers may have been given again
    /// since, so they get others. If it is `older` than the folder, it still has mails that went.
    pub(super) fn show_numbers_above(
        &mut self,
        folder: FolderId,
        index: Option<FolderId>,
        older: bool,
    ) -> Op<()> {
        let Some(id) = index else { return Ok(()) };
        let Some(state) = self.index_state(id, b"dovecot.index")? else { return Ok(()) };
        if state.uid_validity == 0 && state.flags & header::FLAG_FSCKD != 0 {
            // A first log, by which Dovecot takes the numbers as they are under a new UIDVALIDITY.
            return Ok(());
        }
        // Below what was burnt it has heard of all up to its last one, expunged ones included. What
        // was put back before this was given a number above it.
        let burnt = self.tree.folders.get(&id).and_then(|f| f.burnt_below);
        let heard = match burnt {
            Some(burnt) => {
                let last = state.records.range(..burnt).next_back();
                last.map_or(0, |(last, _)| last.saturating_add(1))
            }
            None => state.next_uid,
        };
        let at = Place::own(folder);
        let unheard = |uid: &u32| *uid >= heard && !state.records.contains_key(uid);
        let mut waiting: Vec<u32> = self.numbers(folder).filter(unheard).collect();
        waiting.sort_unstable();
        let mut gone = if older { self.numbers_gone(folder) } else { Vec::new() };
        gone.retain(|uid| state.records.contains_key(uid));
        if self.ready && !waiting.is_empty() {
            // An opening has raised it.
            let most = u32::try_from(waiting.len()).unwrap_or(u32::MAX);
            let next = self.free_uid(folder, index).saturating_add(most);
            self.await_ceiling_of_synced(id, next)?;
        }
        let mut uids = Vec::new();
        for old in waiting {
            let uid = self.free_uid(folder, index);
            let (from, to) = (format!("u.{old}"), format!("u.{uid}"));
            self.rename(at, from.as_bytes(), at, to.as_bytes(), true)?;
            self.tell_kernel(at, from.as_bytes());
            self.tell_kernel(at, to.as_bytes());
            uids.push(uid);
        }
        if uids.is_empty() && gone.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            user = %self.name, mails = uids.len(), gone = gone.len(),
            "mails that were not yet in their index are put into it"
        );
        Ok(self.show_numbered(index, &uids, &gone)?)
    }

    /// Whether the newest mail file of an sdbox folder, or a file of a storage, may not be in
    /// its index yet.
    pub(super) fn unindexed(&self, id: FolderId, changed: &[&[u8]]) -> bool {
        let Some(folder) = self.tree.folders.get(&id) else { return false };
        match &*folder.name {
            b"dbox-Mails" => {
                let newest = match folder.unfinished {
                    // It may be the mail of an earlier cut that still is not.
                    true => self.numbers(id).max(),
                    false => changed.iter().filter_map(|n| number(n, b"u.")).max(),
                };
                let newest = newest.unwrap_or(0);
                let index = self.index_of(id, INDEX_LOG).or_else(|| self.counterpart(id));
                // What the log holds, not what may have been given: a record that met a full disk
                // counts for the latter only.
                let logged = |i: FolderId| self.tracked_next_uid(i).ok().flatten();
                let given = |i: FolderId| self.tree.folders.get(&i).and_then(|f| f.next_uid);
                let next = index.and_then(|i| logged(i).or_else(|| given(i)));
                newest >= next.unwrap_or(1)
            }
            // A delivery keeps its storage file open until it is in map and folder.
            b"storage" => folder.dir(Sub::Own).is_some_and(|dir| {
                dir.entries.after(0).any(|(_, _, target)| match target {
                    Target::Node(ix) => self
                        .tree
                        .nodes
                        .get(ix)
                        .is_some_and(|n| n.writers > 0 && matches!(n.kind, Kind::Growing(_))),
                    _ => false,
                })
            }),
            _ => false,
        }
    }
}

/// The folder with the Dovecot index of a mail folder, loaded.
pub(super) async fn index_folder(
    cell: &Arc<UserCell>,
    folder: FolderId,
    log: &[u8],
) -> Result<Option<FolderId>> {
    if let Some(other) = cell.open_user(|user| Ok(user.counterpart(folder)))? {
        load::load(cell, other).await?;
    }
    cell.open_user(|user| Ok(user.index_of(folder, log)))
}

pub(super) fn damaged(user: &User, error: &RecoverError) -> Error {
    Error::Damaged { what: format!("user {}: index log: {error}", user.name) }
}

/// The files of a Dovecot index, oldest log first.
pub(super) struct IndexFiles {
    pub snapshot: Option<Vec<u8>>,
    pub logs: Vec<Vec<u8>>,
}

impl IndexFiles {
    pub(super) fn read(user: &User, folder: FolderId, base: &[u8]) -> Result<IndexFiles> {
        let with = |end: &[u8]| [base, end].concat();
        let mut logs = Vec::new();
        for name in [with(b".log.2"), with(b".log")] {
            logs.extend(user.child_content(folder, &name)?);
        }
        Ok(IndexFiles { snapshot: user.child_content(folder, base)?, logs })
    }
}

pub(super) fn number(name: &[u8], prefix: &[u8]) -> Option<u32> {
    std::str::from_utf8(name.strip_prefix(prefix)?).ok()?.parse().ok()
}

impl User {
    pub(super) fn child(&self, folder: FolderId, name: &[u8]) -> Option<NodeIx> {
        match self.tree.dir(Place::own(folder))?.entries.get(name)?.1 {
            Target::Node(ix) => Some(ix),
            Target::Folder(_) | Target::Sub(_) => None,
        }
    }

    pub(super) fn child_content(&self, folder: FolderId, name: &[u8]) -> Result<Option<Vec<u8>>> {
        self.child(folder, name).map(|ix| self.index_content(ix)).transpose()
    }

    /// The state of a Dovecot index from its files; `None` if they cannot be read.
    pub(super) fn index_state(
        &self,
        folder: FolderId,
        base: &[u8],
    ) -> Result<Option<crate::dovecot::replay::IndexState>> {
        let files = IndexFiles::read(self, folder, base)?;
        let logs: Vec<&[u8]> = files.logs.iter().map(Vec::as_slice).collect();
        Ok(replay(files.snapshot.as_deref(), &logs).ok())
    }
}
