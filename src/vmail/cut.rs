//! A cut: what a flush copies.
//!
//! It freezes nothing. Under the user's lock it takes the journal's position, the lines of what
//! changed, and of every changed index file an open descriptor and its length; the copying
//! follows without the lock. Every write comes through this process in the order in which it
//! was made, so the lengths taken at one moment are a state in which the files were together.
//! Only a write inside what is being copied would break it: then the cut is taken again.
//!
//! Locks and temporary files never travel. A cache travels only when asked for; a cut that
//! leaves it out says that it is absent, because an old cache under a newer log shows one
//! mail's headers for another.

use super::chain::{Next, stays_light};
use super::error::{Error, Result};
use super::node::{Kind, NodeIx, Since};
use super::tree::{Layer, NameBytes, Target, Unflushed};
use super::user::{Changes, UnderWay, User};
use crate::cache::disk::DiskFile;
use crate::dovecot::classes::{self, Class};
use crate::format::head::{HeadFolder, PartKind, PartRef};
use crate::format::key::KeyTail;
use crate::format::listing::{Entry, Line, Owner};
use crate::format::part::{Content, Dropped, Member, Part};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::sabotage::{self, Bug};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Ordinary files above this size become objects of their own.
pub const LARGE: u64 = 4 * 1024 * 1024;

/// A file to copy.
#[derive(Debug)]
pub struct CutFile {
    pub at: Place,
    pub name: NameBytes,
    pub ix: NodeIx,
    pub file: Arc<dyn DiskFile>,
    pub len: u64,
    /// What changed of it since the part before.
    pub since: Since,
    /// What is taken from the node, to give back if the flush fails.
    taken: Since,
    inplace: u64,
    cache: bool,
    /// The object that is to hold it.
    pub large: Option<ObjectId>,
}

#[derive(Debug)]
pub struct CutFolder {
    pub id: FolderId,
    pub path: Vec<u8>,
    pub kind: PartKind,
    /// How many of the parts before stay under this one.
    pub keep: usize,
    pub lines: Vec<Line>,
    pub files: Vec<CutFile>,
    pub layer: Layer,
    unflushed: Unflushed,
    absent_caches: Vec<NodeIx>,
    /// Objects of large files whose bytes are in others from this cut on.
    pub replaced: Vec<ObjectId>,
}

#[derive(Debug)]
pub struct Cut {
    pub seq: u64,
    pub bundle: ObjectId,
    pub watermark: ObjectId,
    pub known_above: Vec<ObjectId>,
    pub folders: Vec<CutFolder>,
    /// All folders, with the parts of before.
    pub tree: Vec<HeadFolder>,
    pub dropped: Vec<KeyTail>,
    pub dropped_files: Vec<ObjectId>,
    pub again: HashSet<KeyTail>,
    pub deleted: Vec<Dropped>,
    pub closed_end: Option<ObjectId>,
    pub links: Vec<(ObjectId, u32)>,
    /// All links, where a new base of that table is due.
    pub all_links: Option<Vec<(ObjectId, u32)>>,
    pub next_uids: HashMap<FolderId, u32>,
    pub uidvalidity: Option<u32>,
    /// Whom files belong to that say nothing else, and the mode of the user's root.
    pub owner: Owner,
    pub root_mode: u32,
    links_changed: HashSet<ObjectId>,
    folders_changed: bool,
    changes: Changes,
}

impl Cut {
    /// What of it is at risk until its flush is answered. Before it was taken, there were so many
    /// changes, and something that no head names.
    pub fn under_way(&self, unflushed: bool, number: u64) -> UnderWay {
        let files = self.folders.iter().flat_map(|folder| &folder.files);
        let bytes = files.map(|f| if f.cache { 0 } else { f.taken.bytes_of(f.len) }).sum();
        UnderWay { changes: self.changes.clone(), unflushed, bytes, number }
    }
}

/// What a flush takes along.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extent {
    pub caches: bool,
}

impl User {
    /// Folders with changes that are not in memory.
    pub fn unloaded_changes(&self) -> Vec<FolderId> {
        let changed = |f: &&super::tree::Folder| !f.loaded && !f.unflushed.is_empty();
        self.tree.folders.values().filter(changed).map(|f| f.id).collect()
    }

    /// The caches of a folder: they have one name, so that no other need be looked at.
    fn caches(&self, id: FolderId) -> impl Iterator<Item = (Sub, u64, NodeIx)> {
        Sub::ALL.into_iter().filter_map(move |sub| {
            let dir = self.tree.dir(Place { folder: id, sub })?;
            let (cookie, Target::Node(ix)) = dir.entries.get(classes::CACHE)? else { return None };
            self.tree.nodes.get(ix).filter(|n| n.class.is_cache()).map(|_| (sub, cookie, ix))
        })
    }

    pub(super) fn unshipped_cache(&self, id: FolderId) -> bool {
        self.caches(id).any(|(_, _, ix)| {
            self.tree.nodes.get(ix).is_some_and(|n| matches!(&n.kind, Kind::Local(l) if !l.shipped))
        })
    }

    /// Whether some published mail of a folder has a temporary name. It may have others; they may go
    /// without this folder being in a cut again, so how many there are is asked by who recovers.
    fn unfinished(&self, id: FolderId, changed: &Unflushed) -> bool {
        let Some(folder) = self.tree.folders.get(&id) else { return false };
        let waits = |sub: Sub| {
            let at = Place { folder: id, sub };
            folder.dir(sub).is_some_and(|dir| {
                dir.entries.after(0).any(|(_, name, target)| match target {
                    Target::Node(ix) => self.safe_under_temporary(at, name, ix),
                    _ => false,
                })
            })
        };
        if waits(Sub::Tmp) {
            return true;
        }
        let names: Vec<&[u8]> = changed.names.iter().map(|(_, name)| &**name).collect();
        if self.unindexed(id, &names) {
            return true;
        }
        // What an earlier cut did not find is there only if it changed since.
        let came = changed.names.iter().any(|(sub, name)| {
            *sub == Sub::Own
                && folder.dir(*sub).is_some_and(|dir| match dir.entries.get(name) {
                    Some((_, Target::Node(ix))) => {
                        self.safe_under_temporary(Place::own(id), name, ix)
                    }
                    _ => false,
                })
        });
        came || folder.unfinished && waits(Sub::Own)
    }

    /// Takes a cut. All changed folders are loaded.
    pub fn cut(&mut self, extent: Extent) -> Result<Cut> {
        let in_head: HashSet<FolderId> = self.head.folders.iter().map(|f| f.id).collect();
        let changed = self.tree.folders.values().filter(|folder| {
            folder.loaded
                && (!folder.unflushed.is_empty()
                    || !in_head.contains(&folder.id)
                    || folder.parts.is_empty()
                    || extent.caches && self.unshipped_cache(folder.id))
        });
        let changed = changed.map(|folder| folder.id).collect();
        // Small ones first and a mailbox's two folders side by side: what is read together
        // lies together.
        let mut order: Vec<_> = self
            .next_parts(&changed)
            .into_iter()
            .map(|(id, next)| {
                let path = self.tree.path(Place::own(id));
                let rest: Vec<NameBytes> = path.get(1..).unwrap_or_default().to_vec();
                let light = self.tree.folders.get(&id).is_some_and(stays_light);
                (!light, rest, path, id, next)
            })
            .collect();
        order.sort();
        if sabotage::is(Bug::HalfMove) && !extent.caches {
            order.retain(|(.., id, _)| !self.took_a_move(*id));
        }
        let mut folders = Vec::new();
        for (_, _, _, id, next) in order {
            match self.cut_folder(id, next, extent) {
                Ok(folder) => folders.push(folder),
                Err(error) => {
                    for folder in folders {
                        self.give_back(folder);
                    }
                    return Err(error);
                }
            }
        }
        let links_changed = std::mem::take(&mut self.links_changed);
        let count = |id: &ObjectId| (*id, self.tree.links.get(id).copied().unwrap_or(0));
        let mut links: Vec<_> = links_changed.iter().map(count).collect();
        links.sort();
        let all_links = (self.head.names.len() > 8).then(|| {
            let mut all: Vec<_> = self.tree.links.iter().map(|(id, n)| (*id, *n)).collect();
            all.sort();
            all
        });
        let watermark = self.watermark();
        let known_above = (watermark.counter + 1..=self.last_counter)
            // What was promised is up before the head that names it.
            .filter(|c| !self.unanswered.contains(c) || self.promised.contains_key(c))
            .map(|counter| ObjectId { epoch: self.epoch, counter })
            .collect();
        self.last_counter += 1;
        let bundle = ObjectId { epoch: self.epoch, counter: self.last_counter };
        Ok(Cut {
            seq: self.journal.seq(),
            bundle,
            watermark,
            known_above,
            folders,
            tree: self.head_folders(),
            dropped: std::mem::take(&mut self.dropped),
            dropped_files: std::mem::take(&mut self.dropped_files),
            again: std::mem::take(&mut self.again),
            deleted: std::mem::take(&mut self.deleted),
            closed_end: self.closed_end,
            links,
            all_links,
            next_uids: self
                .tree
                .folders
                .values()
                .filter_map(|f| Some((f.id, f.next_uid?)))
                .collect(),
            uidvalidity: self.uidvalidity,
            owner: self.owner,
            root_mode: self.root_mode(),
            links_changed,
            folders_changed: std::mem::take(&mut self.folders_changed),
            changes: std::mem::take(&mut self.changes),
        })
    }

    /// Whether a mail that was moved here from another folder is in no part. For the mistake of a
    /// flush that chooses among folders, and takes only the one that it came from.
    fn took_a_move(&self, id: FolderId) -> bool {
        let Some(folder) = self.tree.folders.get(&id) else { return false };
        folder.unflushed.names.iter().any(|(sub, name)| {
            let target = folder.dir(*sub).and_then(|dir| dir.entries.get(name));
            let Some((_, Target::Node(ix))) = target else { return false };
            self.tree.nodes.get(ix).is_some_and(|node| {
                node.nlink == 1 && node.object().is_some_and(|o| o.decode().folder != id)
            })
        })
    }

    /// The folders as a head names them, with their present parts and ceilings.
    pub fn head_folders(&self) -> Vec<HeadFolder> {
        let mut all: Vec<HeadFolder> = self
            .tree
            .folders
            .values()
            .map(|f| HeadFolder {
                id: f.id,
                parent: f.parent,
                name: f.name.to_vec(),
                parts: f.parts.clone(),
                uid_ceiling: f.uid_ceiling,
                burnt_below: if f.loaded { None } else { f.burnt_below },
                unfinished: f.unfinished,
            })
            .collect();
        all.sort_by_key(|f| f.id);
        all
    }

    fn cut_folder(&mut self, id: FolderId, next: Next, extent: Extent) -> Result<CutFolder> {
        let missing = || Error::Internal("cut of a folder that is not there".into());
        let path: Vec<NameBytes> = self.tree.path(Place::own(id));
        let path: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
        let path = path.join(&b'/');
        let folder = self.tree.folders.get_mut(&id).ok_or_else(missing)?;
        let unflushed = std::mem::take(&mut folder.unflushed);
        let (kind, keep) = (next.kind(), next.keep);
        let mut layer = Layer { names: unflushed.names.clone(), members: HashMap::new() };
        if kind == PartKind::Diff {
            for older in folder.layers.iter().skip(keep.saturating_sub(1)).flatten() {
                layer.names.extend(older.names.iter().cloned());
            }
        }
        let older: Vec<Layer> =
            folder.layers.iter().skip(keep.saturating_sub(1)).flatten().cloned().collect();
        let folder = self.tree.folders.get(&id).ok_or_else(missing)?;
        let mut lines = Vec::new();
        for sub in Sub::ALL {
            match folder.dir(sub) {
                Some(dir) => lines.push(Line::Dir { sub, attrs: dir.attrs() }),
                None if kind == PartKind::Diff && sub != Sub::Own => {
                    lines.push(Line::NoDir { sub });
                }
                None => {}
            }
        }
        // Every name of a base; of a diff those that changed, and the caches: a flush costs what
        // changed, however large the folder is. In the order of the directory, which loading keeps.
        let mut names: Vec<(Sub, NameBytes)> = Vec::new();
        if kind == PartKind::Base {
            for (sub, dir) in folder.dirs() {
                let nodes = dir.entries.after(0).filter(|e| matches!(e.2, Target::Node(_)));
                names.extend(nodes.map(|(_, name, _)| (sub, name.clone())));
            }
        } else {
            let changed = layer.names.iter().filter_map(|(sub, name)| {
                match folder.dir(*sub)?.entries.get(name)? {
                    (cookie, Target::Node(_)) => Some((*sub, cookie, name.clone())),
                    _ => None,
                }
            });
            let caches =
                self.caches(id).map(|(sub, cookie, _)| (sub, cookie, classes::CACHE.into()));
            let mut some: Vec<(Sub, u64, NameBytes)> = changed.chain(caches).collect();
            some.sort_unstable_by_key(|(sub, cookie, _)| (*sub as usize, *cookie));
            some.dedup_by_key(|(sub, cookie, _)| (*sub as usize, *cookie));
            names.extend(some.into_iter().map(|(sub, _, name)| (sub, name)));
        }
        if kind == PartKind::Diff {
            let here: HashSet<_> = names.iter().cloned().collect();
            for (sub, name) in layer.names.iter().filter(|n| !here.contains(*n)) {
                lines.push(Line::Unset { sub: *sub, name: name.to_vec() });
            }
        }
        let unfinished = self.unfinished(id, &unflushed);
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.unfinished = unfinished;
        }
        let mut cut = CutFolder {
            id,
            path,
            kind,
            keep,
            lines,
            files: Vec::new(),
            layer,
            unflushed,
            absent_caches: Vec::new(),
            replaced: Vec::new(),
        };
        for (sub, name) in names {
            if let Err(error) =
                self.cut_name(&mut cut, Place { folder: id, sub }, name, extent, &older)
            {
                self.give_back(cut);
                return Err(error);
            }
        }
        Ok(cut)
    }

    fn cut_name(
        &mut self,
        cut: &mut CutFolder,
        at: Place,
        name: NameBytes,
        extent: Extent,
        older: &[Layer],
    ) -> Result<()> {
        let sub = at.sub;
        let Some((_, Target::Node(ix))) = self.tree.dir(at).and_then(|d| d.entries.get(&name))
        else {
            return Ok(());
        };
        let node = self.node(ix)?;
        let class = node.class;
        let base = cut.kind == PartKind::Base;
        let gone = Line::Unset { sub, name: name.to_vec() };
        let Some(entry) = node.entry() else {
            // Unpublished, a lock, or temporary: what an earlier part says of the name is over.
            if !base {
                cut.lines.push(gone);
            }
            return Ok(());
        };
        let Kind::Local(local) = &node.kind else {
            cut.lines.push(Line::Set { sub, name: name.to_vec(), entry });
            return Ok(());
        };
        if local.evicted && !base && !cut.layer.names.contains(&(sub, name.clone())) {
            // The parts below hold it as it is, and have since before it was evicted.
            return Ok(());
        }
        if class.is_cache() && !extent.caches {
            if !base && (local.shipped || cut.layer.names.contains(&(sub, name.clone()))) {
                cut.layer.names.insert((sub, name.clone()));
                cut.lines.push(gone);
            }
            cut.absent_caches.push(ix);
            return Ok(());
        }
        let (len, inplace, shipped) = (node.size, local.inplace, local.shipped);
        // With another name it may go on being named by a folder that is not in this cut.
        cut.replaced.extend(local.object.filter(|_| node.nlink == 1));
        let mut since = local.since.clone();
        let taken = since.clone();
        // With two names the first would take the changes away from the second.
        if base || !shipped || self.node(ix)?.names.all().len() > 1 {
            since = Since::everything();
        } else {
            for layer in older.iter().rev() {
                if let Some(old) = layer.members.get(&(sub, name.clone())) {
                    since.merge_older(old);
                } else if layer.names.contains(&(sub, name.clone())) {
                    since = Since::everything();
                }
            }
        }
        let file = self.local_file(ix)?;
        let mut large = None;
        if len > LARGE && class == Class::Other {
            self.last_counter += 1;
            large = Some(ObjectId { epoch: self.epoch, counter: self.last_counter });
        }
        let entry = match entry {
            Entry::Local { size, attrs, .. } => Entry::Local { size, attrs, object: large },
            other => other,
        };
        cut.lines.push(Line::Set { sub, name: name.to_vec(), entry });
        cut.layer.names.insert((sub, name.clone()));
        if large.is_none() {
            cut.layer.members.insert((sub, name.clone()), since.clone());
        }
        if let Kind::Local(local) = &mut self.node_mut(ix)?.kind {
            local.since = Since::nothing(len);
        }
        let cache = class.is_cache();
        cut.files.push(CutFile { at, name, ix, file, len, since, taken, inplace, cache, large });
        Ok(())
    }

    /// Whether nothing was written inside what the cut copied.
    pub fn unchanged(&self, cut: &Cut) -> bool {
        cut.folders.iter().flat_map(|f| &f.files).all(|file| {
            match self.tree.nodes.get(file.ix).map(|n| &n.kind) {
                Some(Kind::Local(local)) => local.inplace == file.inplace,
                // Replaced meanwhile: its bytes were read from the descriptor.
                _ => true,
            }
        })
    }

    fn give_back(&mut self, cut: CutFolder) {
        for file in &cut.files {
            if let Some(node) = self.tree.nodes.get_mut(file.ix)
                && let Kind::Local(local) = &mut node.kind
            {
                local.since.merge_older(&file.taken);
            }
        }
        if let Some(folder) = self.tree.folders.get_mut(&cut.id) {
            let noted = &folder.unflushed.names;
            let older = cut.unflushed.names.iter().filter(|name| !noted.contains(*name));
            folder.unnoted.extend(older.cloned());
            folder.unflushed.merge(cut.unflushed);
        }
    }

    /// The flush failed: everything counts as unflushed again.
    pub fn undo_cut(&mut self, cut: Cut) {
        self.cut_out = None;
        for folder in cut.folders {
            self.give_back(folder);
        }
        self.dropped.splice(0..0, cut.dropped);
        self.dropped.retain(|tail| !self.again.contains(tail));
        self.again.extend(cut.again);
        self.again.retain(|tail| !self.dropped.contains(tail));
        self.deleted.extend(cut.deleted);
        self.dropped_files.extend(cut.dropped_files);
        self.links_changed.extend(cut.links_changed);
        self.folders_changed |= cut.folders_changed;
        let now = std::mem::replace(&mut self.changes, cut.changes);
        self.changes.important = earlier(self.changes.important, now.important);
        self.changes.unimportant = earlier(self.changes.unimportant, now.unimportant);
        self.changes.new_since = earlier(self.changes.new_since, now.new_since);
        self.changes.new_mails += now.new_mails;
        self.changes.urgent = match (self.changes.urgent, now.urgent) {
            (Some((first, _)), Some((_, last))) => Some((first, last)),
            (before, after) => before.or(after),
        };
    }

    /// The flush succeeded: what it carried is what the parts hold.
    pub fn settle_cut(&mut self, cut: Cut, parts: &HashMap<FolderId, PartRef>) {
        self.cut_out = None;
        for folder in cut.folders {
            for file in &folder.files {
                if let Some(node) = self.tree.nodes.get_mut(file.ix)
                    && let Kind::Local(local) = &mut node.kind
                {
                    local.shipped = true;
                    local.object = file.large;
                }
            }
            for ix in folder.absent_caches {
                if let Some(node) = self.tree.nodes.get_mut(ix)
                    && let Kind::Local(local) = &mut node.kind
                {
                    local.shipped = false;
                    local.since = Since::everything();
                }
            }
            let (Some(found), Some(part)) =
                (self.tree.folders.get_mut(&folder.id), parts.get(&folder.id))
            else {
                continue;
            };
            found.parts.truncate(folder.keep);
            found.parts.push(part.clone());
            found.layers.truncate(folder.keep.saturating_sub(1));
            if folder.kind == PartKind::Diff {
                found.layers.push(Some(folder.layer));
            }
            found.burnt_below = None;
        }
    }
}

fn earlier<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Copies a folder's files and makes its part. `None` if a file became shorter meanwhile.
pub fn copy(folder: &CutFolder) -> Result<Option<Part>> {
    let mut members = Vec::new();
    for file in folder.files.iter().filter(|f| f.large.is_none()) {
        let read = |offset: u64, len: u64| -> Result<Option<Bytes>> {
            let mut buf = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
            let n = file.file.read_at(&mut buf, offset).map_err(|e| Error::disk("cut", &e))?;
            Ok((n == buf.len()).then(|| Bytes::from(buf)))
        };
        let since = &file.since;
        let content = if since.whole || since.base_len > file.len {
            read(0, file.len)?.map(Content::Whole)
        } else if since.blocks.is_empty() {
            let offset = since.base_len;
            read(offset, file.len - offset)?.map(|bytes| Content::Tail { offset, bytes })
        } else {
            let last = file.len.div_ceil(Since::BLOCK);
            let grown = since.base_len / Since::BLOCK..last;
            let mut numbers: Vec<u64> =
                since.blocks.iter().copied().filter(|b| *b < last).chain(grown).collect();
            numbers.sort_unstable();
            numbers.dedup();
            let mut blocks = Vec::new();
            for number in numbers {
                let at = number * Since::BLOCK;
                match read(at, Since::BLOCK.min(file.len - at))? {
                    Some(bytes) => blocks.push((number, bytes)),
                    None => return Ok(None),
                }
            }
            let block_size = u32::try_from(Since::BLOCK).unwrap_or(u32::MAX);
            Some(Content::Blocks { size: file.len, block_size, blocks })
        };
        match content {
            Some(content) => {
                members.push(Member { sub: file.at.sub, name: file.name.to_vec(), content });
            }
            None => return Ok(None),
        }
    }
    Ok(Some(Part { lines: folder.lines.clone(), members }))
}
