//! Recovered mails of mdbox: extents go to the end of their files, and the mails in them into the
//! map and into the folders they were delivered to.

use super::error::Result;
use super::fetch;
use super::load;
use super::node::{Growing, Kind, Node, NodeIx};
use super::recover::Found;
use super::recover_sdbox::{IndexFiles, damaged, index_folder, number};
use super::session::UserCell;
use super::tree::{NameBytes, Target};
use super::user::User;
use crate::dovecot::classes::Class;
use crate::dovecot::recover::mark_fsckd;
use crate::dovecot::recover_mdbox::{MapEntry, MdboxFolder, MdboxInput, MdboxRange, recover_mdbox};
use crate::format::journal::Change;
use crate::format::key::Piece;
use crate::format::listing::{Entry, Extent, Line};
use crate::format::{FolderId, ObjectId, Place};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;

pub(super) async fn put_back_growing(
    cell: &Arc<UserCell>,
    folder: FolderId,
    objects: Vec<Found>,
) -> Result<()> {
    let mut bytes: HashMap<ObjectId, Bytes> = HashMap::new();
    for object in &objects {
        let whole = fetch::whole(&cell.session, &cell.name, &object.tail, object.size).await?;
        bytes.insert(object.key.id, whole);
    }
    let ranges = cell.open_user(|user| user.put_back_extents(folder, objects, &bytes))?;
    map_ranges(cell, folder, ranges).await
}

/// mdbox: mails that were in the storage when the last flush was cut, and not yet in the map or
/// in their folder.
pub(super) async fn map_unmapped(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    let Some(map) = index_folder(cell, folder, b"dovecot.map.index.log").await? else {
        return Ok(());
    };
    let extents = cell.open_user(|user| user.unmapped(folder, map))?;
    let mut ranges = Vec::new();
    for (file, extent) in extents {
        let bytes = fetch::whole(&cell.session, &cell.name, &extent.object, extent.len).await?;
        ranges.push(Range { file, offset: extent.offset, bytes });
    }
    map_ranges(cell, folder, ranges).await
}

pub(super) async fn map_ranges(
    cell: &Arc<UserCell>,
    folder: FolderId,
    ranges: Vec<Range>,
) -> Result<()> {
    let mut ranges = ranges;
    let Some(map) = index_folder(cell, folder, b"dovecot.map.index.log").await? else {
        tracing::error!(
            user = %cell.name,
            "recovered mdbox mails have no map: run doveadm force-resync for this user"
        );
        return Ok(());
    };
    let folders = cell.open_user(|user| Ok(user.mdbox_folders(map)))?;
    for id in &folders {
        load::load(cell, *id).await?;
    }
    let missing = cell.open_user(|user| user.map_recovered(map, &folders, &ranges))?;
    if missing.is_empty() {
        return Ok(());
    }
    for entry in missing {
        let end = u64::from(entry.offset) + u64::from(entry.size);
        let held = cell.open_user(|user| {
            Ok(user
                .storage_extents(folder)
                .into_iter()
                .filter(|(file, extent)| {
                    *file == entry.file
                        && extent.offset < end
                        && extent.offset + extent.len > u64::from(entry.offset)
                })
                .collect::<Vec<_>>())
        })?;
        for (file, extent) in held {
            let bytes = fetch::whole(&cell.session, &cell.name, &extent.object, extent.len).await?;
            ranges.push(Range { file, offset: extent.offset, bytes });
        }
    }
    cell.open_user(|user| user.map_recovered(map, &folders, &ranges)).map(|_| ())
}

/// A stretch of `m.<file>` that came back.
pub(super) struct Range {
    pub file: u32,
    pub offset: u64,
    pub bytes: Bytes,
}

impl User {
    /// The extents of a storage's files, with the files' numbers.
    pub(super) fn storage_extents(&self, folder: FolderId) -> Vec<(u32, Extent)> {
        let mut all = Vec::new();
        let Some(dir) = self.tree.dir(Place::own(folder)) else { return all };
        for (_, name, target) in dir.entries.after(0) {
            if let (Some(file), Target::Node(ix)) = (number(name, b"m."), target)
                && let Some(Node { kind: Kind::Growing(grow), .. }) = self.tree.nodes.get(ix)
            {
                all.extend(grow.extents.iter().map(|e| (file, e.clone())));
            }
        }
        all
    }

    /// Extents that reach beyond what the map knows of their file.
    pub(super) fn unmapped(&self, folder: FolderId, map: FolderId) -> Result<Vec<(u32, Extent)>> {
        let mut ends: HashMap<u32, u64> = HashMap::new();
        let Some(state) = self.index_state(map, b"dovecot.map.index")? else {
            return Ok(Vec::new());
        };
        for (_, data) in state.ext_data("map") {
            let field = |at: usize| {
                let bytes = data.get(at..at + 4)?;
                Some(u32::from_le_bytes(bytes.try_into().ok()?))
            };
            if let (Some(file), Some(offset), Some(size)) = (field(0), field(4), field(8)) {
                let end = ends.entry(file).or_insert(0);
                *end = (*end).max(u64::from(offset) + u64::from(size));
            }
        }
        let mut all = self.storage_extents(folder);
        all.retain(|(file, e)| e.offset + e.len > ends.get(file).copied().unwrap_or(0));
        Ok(all)
    }

    /// mdbox: extents go to the end of their files; gives the stretches that came back.
    pub(super) fn put_back_extents(
        &mut self,
        folder: FolderId,
        objects: Vec<Found>,
        bytes: &HashMap<ObjectId, Bytes>,
    ) -> Result<Vec<Range>> {
        let at = Place::own(folder);
        let mut file_of: HashMap<ObjectId, NodeIx> = HashMap::new();
        let mut highest = 0;
        if let Some(dir) = self.tree.dir(at) {
            for (_, name, target) in dir.entries.after(0) {
                highest = highest.max(number(name, b"m.").unwrap_or(0));
                if let Target::Node(ix) = target
                    && let Some(Node { kind: Kind::Growing(grow), .. }) = self.tree.nodes.get(ix)
                {
                    file_of.extend(grow.extents.iter().map(|e| (e.object.id(), ix)));
                }
            }
        }
        let mut ranges = Vec::new();
        for object in objects {
            let (offset, predecessor) = match object.key.piece {
                Piece::Extent { offset, predecessor } => (offset, predecessor),
                Piece::Whole => (0, None),
            };
            let named = number(&object.name, b"m.")
                .and_then(|_| self.child(folder, &object.name))
                .filter(|_| predecessor.is_none());
            let ix = match predecessor.and_then(|p| file_of.get(&p).copied()).or(named) {
                Some(ix) => ix,
                None => {
                    let wanted = number(&object.name, b"m.").filter(|n| *n > highest);
                    highest = wanted.unwrap_or(highest + 1);
                    let node = Node {
                        kind: Kind::Growing(Box::default()),
                        size: 0,
                        ..self.mail_node(&object, Class::Growing)
                    };
                    self.put_name(at, format!("m.{highest}").into_bytes().into(), node)?
                }
            };
            file_of.insert(object.key.id, ix);
            if let Some(range) = self.add_extent(at, ix, offset, &object, bytes)? {
                ranges.push(range);
            }
        }
        Ok(ranges)
    }

    pub(super) fn add_extent(
        &mut self,
        at: Place,
        ix: NodeIx,
        offset: u64,
        object: &Found,
        bytes: &HashMap<ObjectId, Bytes>,
    ) -> Result<Option<Range>> {
        let name = self.node(ix)?.names.first().and_then(|n| self.tree.name_bytes(n).cloned());
        let Some(name) = name else { return Ok(None) };
        let Kind::Growing(grow) = &self.node(ix)?.kind else { return Ok(None) };
        let Growing { mut extents, published, .. } = Growing {
            extents: grow.extents.clone(),
            published: grow.published,
            ..Growing::default()
        };
        if offset > published {
            tracing::error!(
                user = %self.name, object = %object.tail,
                "an extent does not join its file; kept in the store, not served"
            );
            return Ok(None);
        }
        let mut changes = Vec::new();
        let cut = extents.partition_point(|e| e.offset < offset);
        let mut dropped = Vec::new();
        for old in extents.split_off(cut) {
            dropped.push(old.object);
        }
        if let Some(last) = extents.last_mut() {
            last.len = last.len.min(offset - last.offset);
        }
        extents.push(Extent { offset, len: object.size, object: object.tail.clone() });
        let size = offset + object.size;
        let node = self.node_mut(ix)?;
        node.size = size;
        node.mtime = object.key.mtime;
        if let Kind::Growing(grow) = &mut node.kind {
            grow.extents = extents.clone();
            grow.published = size;
        }
        let attrs = node.attrs();
        let entry = Entry::Extents { size, attrs, extents };
        let line = Line::Set { sub: at.sub, name: name.to_vec(), entry };
        changes.push(Change::Line { folder: at.folder, line });
        changes.extend(dropped.into_iter().map(|object| Change::Drop { object }));
        changes.extend(self.old_names.remove(&object.key.id));
        self.commit(changes)?;
        let file = number(&name, b"m.").unwrap_or(0);
        let bytes = bytes.get(&object.key.id).cloned().unwrap_or_default();
        Ok(Some(Range { file, offset, bytes }))
    }

    /// The folders with the indexes of an mdbox storage.
    pub(super) fn mdbox_folders(&self, map: FolderId) -> Vec<FolderId> {
        let Some(storage) = self.tree.folders.get(&map) else { return Vec::new() };
        let root = self.tree.path(storage.parent);
        self.tree
            .folders
            .values()
            .filter(|f| mailbox_name(&self.tree.path(Place::own(f.id)), root.len()).is_some())
            .filter(|f| self.tree.path(Place::own(f.id)).starts_with(&root))
            .map(|f| f.id)
            .collect()
    }

    /// Brings stretches of storage files into map and folders. Gives mails that the map counts,
    /// no folder holds, and whose bytes were not among the stretches.
    pub(super) fn map_recovered(
        &mut self,
        map: FolderId,
        folders: &[FolderId],
        ranges: &[Range],
    ) -> Result<Vec<MapEntry>> {
        let depth = match self.tree.folders.get(&map) {
            Some(folder) => self.tree.path(folder.parent).len(),
            None => return Ok(Vec::new()),
        };
        let map_files = IndexFiles::read(self, map, b"dovecot.map.index")?;
        let mut indexes = Vec::new();
        for id in folders {
            if self.child(*id, b"dovecot.index.log").is_none() {
                continue;
            }
            let files = IndexFiles::read(self, *id, b"dovecot.index")?;
            let path = self.tree.path(Place::own(*id));
            let name = mailbox_name(&path, depth).unwrap_or_default();
            let at_least = self.tree.folders.get(id).and_then(|f| f.burnt_below).unwrap_or(0);
            indexes.push((*id, files, name, at_least));
        }
        let logs: Vec<Vec<&[u8]>> = indexes
            .iter()
            .map(|(_, files, _, _)| files.logs.iter().map(Vec::as_slice).collect())
            .collect();
        let given: Vec<MdboxFolder<'_>> = indexes
            .iter()
            .zip(&logs)
            .map(|((_, files, name, at_least), logs)| MdboxFolder {
                name,
                snapshot: files.snapshot.as_deref(),
                logs,
                at_least: *at_least,
            })
            .collect();
        let map_logs: Vec<&[u8]> = map_files.logs.iter().map(Vec::as_slice).collect();
        let stretches: Vec<MdboxRange<'_>> = ranges
            .iter()
            .map(|r| MdboxRange { file: r.file, offset: r.offset, bytes: &r.bytes })
            .collect();
        let input = MdboxInput {
            map_snapshot: map_files.snapshot.as_deref(),
            map_logs: &map_logs,
            folders: &given,
            ranges: &stretches,
            highest_file: ranges.iter().map(|r| r.file).max().unwrap_or(0),
            save_date: u32::try_from(self.now().secs).unwrap_or(0),
            restore_unreferenced: true,
        };
        let output = recover_mdbox(&input);
        let ids: Vec<FolderId> = indexes.iter().map(|(id, ..)| *id).collect();
        match output {
            Ok(output) => {
                tracing::info!(
                    user = %self.name, placed = output.placed.len(), copies = output.copies,
                    redirected = output.redirected, dangling = output.dangling,
                    "mdbox mails recovered"
                );
                if let Some(log) = self.child(map, b"dovecot.map.index.log") {
                    self.append_log(log, &output.map)?;
                }
                for (id, append) in ids.iter().zip(&output.folders) {
                    if let (Some(append), Some(log)) =
                        (append, self.child(*id, b"dovecot.index.log"))
                    {
                        self.append_log(log, append)?;
                    }
                }
                Ok(output.unreferenced)
            }
            Err(error) => {
                tracing::warn!(user = %self.name, %error, "Dovecot is asked to rebuild the storage");
                for id in &ids {
                    if let Some(log) = self.child(*id, b"dovecot.index.log") {
                        let content = self.index_content(log)?;
                        let mark = mark_fsckd(&content, 0).map_err(|e| damaged(self, &e))?;
                        self.append_log(log, &mark)?;
                    }
                }
                Ok(Vec::new())
            }
        }
    }
}

/// A mailbox's name from the path of its index directory, whose first `skip` components lead to
/// the storage. With `INDEX=` that is `mailboxes/BOX`, without it `mailboxes/BOX/dbox-Mails`.
pub(super) fn mailbox_name(path: &[NameBytes], skip: usize) -> Option<Vec<u8>> {
    let rest = path.get(skip..)?;
    let (first, rest) = rest.split_first()?;
    let middle = match rest.split_last() {
        Some((last, middle)) if &**last == b"dbox-Mails" => middle,
        _ => rest,
    };
    if &**first != b"mailboxes" || middle.is_empty() {
        return None;
    }
    let parts: Vec<&[u8]> = middle.iter().map(|n| &**n).collect();
    Some(parts.join(&b'/'))
}
