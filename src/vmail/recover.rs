//! After a session that did not hand over: what the store holds above the watermark.
//!
//! With the journal of the dead session at hand, an object that it does not name was promised
//! to nobody: it goes on the dropped list. Without it, every such object may be a mail whose
//! server was told that it is safe, and comes back: into the folder it was published in, under
//! the name in its key (Maildir: in `new/`), or, for dbox, under a number at or above the
//! folder's ceiling, with the records that make Dovecot show it (`dovecot::recover`).
//!
//! One name published twice is one mail: the newest object counts. What was copied, moved or
//! flagged since the last flush is as before it (I3).

use super::error::{During, Error, Plain, Result};
use super::fetch;
use super::load;
use super::need::Stop;
use super::node::{Growing, Kind, Names, Node, NodeIx};
use super::session::UserCell;
use super::tree::{NameBytes, Target};
use super::user::User;
use crate::dovecot::classes::Class;
use crate::dovecot::recover::{RecoverError, append_sdbox, mark_fsckd};
use crate::dovecot::recover_mdbox::{MapEntry, MdboxFolder, MdboxInput, MdboxRange, recover_mdbox};
use crate::dovecot::replay::replay;
use crate::format::journal::Change;
use crate::format::key::{
    KeyTail, META_FOLDER, META_NAME, MailKey, Piece, mail_dir, mail_key, parse_meta_folder,
};
use crate::format::listing::{Entry, Extent, Line};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::fs::api::Caller;
use crate::store::{ObjectMeta, Reason};
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Whether a name is one that dbox gives to what it still writes.
pub fn is_temporary(name: &[u8]) -> bool {
    name.starts_with(b".temp.")
}

/// Whether a published mail has no name but a temporary one.
pub fn unfinished(node: &Node) -> bool {
    match node.kind {
        Kind::Mail(_) | Kind::Published(_) => {
            node.class == Class::MailTemp && node.nlink == 1 && node.object().is_some()
        }
        Kind::Growing(ref grow) => grow.temporary && !grow.extents.is_empty(),
        Kind::Local(_) | Kind::Symlink(_) => false,
    }
}

/// Mails that were safe and not yet named when the last flush was cut get their names: their
/// servers may have said since that they are delivered.
pub async fn finish_names(cell: &Arc<UserCell>) -> Result<()> {
    let folders: Vec<FolderId> = cell.open_user(|user| {
        let waits = |f: &&super::tree::Folder| f.unfinished;
        Ok(user.tree.folders.values().filter(waits).map(|f| f.id).collect())
    })?;
    for folder in folders {
        load::load(cell, folder).await?;
        let found = cell.open_user(|user| user.take_unfinished(folder))?;
        if !found.is_empty() {
            tracing::warn!(user = %cell.name, mails = found.len(), "naming mails that had only a temporary name");
            put_back(cell, folder, found).await?;
        }
        let name =
            cell.open_user(|user| Ok(user.tree.folders.get(&folder).map(|f| f.name.clone())))?;
        match name.as_deref() {
            Some(b"dbox-Mails") => {
                let index = index_folder(cell, folder, b"dovecot.index.log").await?;
                cell.open_user(|user| user.show_unindexed(folder, index))?;
            }
            Some(b"storage") => map_unmapped(cell, folder).await?,
            _ => {}
        }
        cell.if_open(|user| {
            if let Some(folder) = user.tree.folders.get_mut(&folder) {
                folder.unfinished = false;
            }
        });
    }
    Ok(())
}

/// An object that nothing names.
#[derive(Debug, Clone)]
struct Found {
    tail: KeyTail,
    key: MailKey,
    size: u64,
    name: Vec<u8>,
}

/// Looks at what lies above the watermark and adopts or drops it.
pub async fn after_crash(
    cell: &Arc<UserCell>,
    watermark: ObjectId,
    named: &HashSet<ObjectId>,
    adopt: bool,
) -> Result<()> {
    let dir = mail_dir(&cell.name);
    let start = format!("{dir}/{watermark}.~");
    let store = &cell.session.env.store;
    let listed = store.list(&dir, Some(&start), Reason("recover")).await;
    let listed = listed.map_err(|e| {
        Error::store(format!("listing mails of {}", cell.name), During::Delivery, e)
    })?;
    let mut found = Vec::new();
    for object in listed {
        let Some(tail) = tail_of(&object) else {
            tracing::warn!(user = %cell.name, key = %object.key, "not a key of ours; left alone");
            continue;
        };
        if !named.contains(&tail.id()) {
            found.push((tail, object.size));
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    if !adopt {
        tracing::info!(user = %cell.name, objects = found.len(), "unfinished publishes dropped");
        let drops = found.into_iter().map(|(tail, _)| Change::Drop { object: tail }).collect();
        return cell.open_user(|user| user.commit(drops));
    }
    tracing::warn!(
        user = %cell.name, objects = found.len(),
        "recovering mails that are newer than the last flush"
    );
    let (found, doubles) = sort_out(cell, found).await?;
    let mut by_folder: BTreeMap<FolderId, Vec<Found>> = BTreeMap::new();
    for object in found {
        by_folder.entry(object.key.folder).or_default().push(object);
    }
    for (folder, mut objects) in by_folder {
        objects.sort_by_key(|o| o.key.id);
        let folder = find_folder(cell, folder, &objects[0]).await?;
        load::load(cell, folder).await?;
        put_back(cell, folder, objects).await?;
    }
    cell.open_user(|user| {
        user.commit(doubles.into_iter().map(|object| Change::Drop { object }).collect())?;
        user.urgent();
        Ok(())
    })
}

fn tail_of(object: &ObjectMeta) -> Option<KeyTail> {
    KeyTail::parse(object.key.rsplit_once('/')?.1).ok()
}

/// Names from metadata where they did not fit the key, and of one name the newest object only.
async fn sort_out(
    cell: &Arc<UserCell>,
    all: Vec<(KeyTail, u64)>,
) -> Result<(Vec<Found>, Vec<KeyTail>)> {
    let mut out: Vec<Found> = Vec::new();
    let mut doubles = Vec::new();
    let mut seen: HashMap<(FolderId, Vec<u8>), usize> = HashMap::new();
    for (tail, size) in all {
        let key = tail.decode();
        let name = match &key.name {
            Some(name) => name.clone(),
            None => metadata(cell, &tail, META_NAME)
                .await?
                .and_then(|text| crate::format::escape::unescape_key(&text).ok())
                .unwrap_or_else(|| format!("recovered.{}", key.id).into_bytes()),
        };
        let found = Found { tail, key, size, name: name.clone() };
        if matches!(found.key.piece, Piece::Extent { .. }) {
            out.push(found);
            continue;
        }
        match seen.get(&(found.key.folder, name.clone())) {
            Some(i) => {
                let old = &mut out[*i];
                let (newer, older) = if old.key.id < found.key.id {
                    (found, old.tail.clone())
                } else {
                    (old.clone(), found.tail)
                };
                doubles.push(older);
                *old = newer;
            }
            None => {
                seen.insert((found.key.folder, name), out.len());
                out.push(found);
            }
        }
    }
    Ok((out, doubles))
}

async fn metadata(cell: &Arc<UserCell>, tail: &KeyTail, which: &str) -> Result<Option<String>> {
    let head = cell.session.env.store.head(&mail_key(&cell.name, tail), Reason("recover")).await;
    let meta = head.map_err(|e| {
        Error::store(format!("object {tail} of {}", cell.name), During::Delivery, e)
    })?;
    Ok(meta.metadata.into_iter().find(|(k, _)| k == which).map(|(_, v)| v))
}

/// The folder of a recovered object; one that no head knows is made anew at its path.
async fn find_folder(cell: &Arc<UserCell>, id: FolderId, sample: &Found) -> Result<FolderId> {
    if cell.open_user(|user| Ok(user.tree.folders.contains_key(&id)))? {
        return Ok(id);
    }
    let path = metadata(cell, &sample.tail, META_FOLDER).await?;
    let path = match path.map(|text| parse_meta_folder(&text)) {
        Some(Ok((path, true))) if !path.is_empty() => path,
        _ => vec![format!("recovered-lost-folder-{id}").into_bytes()],
    };
    tracing::warn!(
        user = %cell.name, folder = %String::from_utf8_lossy(&path.join(&b'/')),
        "a folder that was never flushed is made anew for its mails"
    );
    let mut at = Place::ROOT;
    for name in &path {
        load::load(cell, at.folder).await?;
        at = cell.open_user(|user| {
            let target = match user.target(at, name)? {
                Some(target) => target,
                None => {
                    let caller = Caller { uid: user.owner.uid, gid: user.owner.gid, pid: 0 };
                    user.mkdir(caller, at, name, 0o700).map_err(unstop)?
                }
            };
            match target {
                Target::Folder(id) => Ok(Place::own(id)),
                Target::Sub(sub) => Ok(Place { folder: at.folder, sub }),
                Target::Node(_) => Err(Plain::Exists.into()),
            }
        })?;
    }
    Ok(at.folder)
}

fn unstop(stop: Stop) -> Error {
    match stop {
        Stop::Error(error) => error,
        Stop::Wait(need) => Error::Internal(format!("recovery would have to wait: {need:?}")),
    }
}

async fn put_back(cell: &Arc<UserCell>, folder: FolderId, objects: Vec<Found>) -> Result<()> {
    let name = cell.open_user(|user| {
        Ok(user
            .tree
            .folders
            .get(&folder)
            .map(|f| f.name.clone())
            .unwrap_or_else(|| Arc::from(&b""[..])))
    })?;
    match &*name {
        b"storage" => put_back_growing(cell, folder, objects).await,
        b"dbox-Mails" => put_back_numbered(cell, folder, objects).await,
        _ => cell.open_user(|user| user.put_back_named(folder, objects)),
    }
}

/// The folder with the Dovecot index of a mail folder, loaded.
async fn index_folder(
    cell: &Arc<UserCell>,
    folder: FolderId,
    log: &[u8],
) -> Result<Option<FolderId>> {
    let there = |user: &User, id: FolderId| {
        user.tree.dir(Place::own(id)).is_some_and(|d| d.entries.get(log).is_some())
    };
    if cell.open_user(|user| Ok(there(user, folder)))? {
        return Ok(Some(folder));
    }
    let Some(other) = cell.open_user(|user| Ok(user.counterpart(folder)))? else { return Ok(None) };
    load::load(cell, other).await?;
    cell.open_user(|user| Ok(there(user, other).then_some(other)))
}

/// sdbox: each mail gets a free number at or above the ceiling, and a record.
async fn put_back_numbered(
    cell: &Arc<UserCell>,
    folder: FolderId,
    objects: Vec<Found>,
) -> Result<()> {
    let index = index_folder(cell, folder, b"dovecot.index.log").await?;
    cell.open_user(|user| user.put_back_sdbox(folder, index, objects))
}

async fn put_back_growing(
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
async fn map_unmapped(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
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

async fn map_ranges(cell: &Arc<UserCell>, folder: FolderId, ranges: Vec<Range>) -> Result<()> {
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
struct Range {
    file: u32,
    offset: u64,
    bytes: Bytes,
}

impl User {
    fn mail_node(&self, object: &Found, class: Class) -> Node {
        Node {
            ino: self.session.new_ino(),
            kind: Kind::Published(object.tail.clone()),
            class,
            size: object.size,
            mode: object.key.mode,
            owner: None,
            mtime: object.key.mtime,
            ctime: self.now(),
            names: Names::None,
            nlink: 1,
            lookups: 0,
            handles: 0,
            writers: 0,
        }
    }

    /// Takes the temporary names from mails that have no other.
    fn take_unfinished(&mut self, folder: FolderId) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for sub in [Sub::Own, Sub::Tmp] {
            let at = Place { folder, sub };
            let Some(dir) = self.tree.dir(at) else { continue };
            let waiting: Vec<(NameBytes, NodeIx)> = dir
                .entries
                .after(0)
                .filter_map(|(_, name, target)| match target {
                    Target::Node(ix) => Some((name.clone(), ix)),
                    _ => None,
                })
                .filter(|(_, ix)| self.tree.nodes.get(*ix).is_some_and(unfinished))
                .collect();
            for (name, ix) in waiting {
                let node = self.node(ix)?;
                let sizes: Vec<u64> = match &node.kind {
                    Kind::Growing(grow) => grow.extents.iter().map(|e| e.len).collect(),
                    _ => vec![node.size],
                };
                for (tail, size) in node.objects().into_iter().zip(sizes) {
                    let key = tail.decode();
                    let name = key.name.clone().unwrap_or_else(|| name.to_vec());
                    found.push(Found { tail: tail.clone(), key, size, name });
                }
                let line = Line::Unset { sub, name: name.to_vec() };
                self.commit(vec![Change::Line { folder, line }])?;
                self.tree.detach(at, &name);
                self.drop_if_unused(ix);
            }
        }
        Ok(found)
    }

    /// Names a recovered object.
    fn put_name(&mut self, at: Place, name: NameBytes, node: Node) -> Result<NodeIx> {
        let now = self.now();
        let mut changes = Vec::new();
        if self.tree.dir(at).is_none() {
            let attrs = crate::format::listing::Attrs { mode: 0o700, owner: None, mtime: now };
            changes
                .push(Change::Line { folder: at.folder, line: Line::Dir { sub: at.sub, attrs } });
            self.add_sub(at.folder, at.sub, attrs);
        }
        if let Some(entry) = node.entry() {
            let line = Line::Set { sub: at.sub, name: name.to_vec(), entry };
            changes.push(Change::Line { folder: at.folder, line });
        }
        changes.extend(self.touch_line(at, now));
        self.commit(changes)?;
        let ix = self.tree.nodes.add(node);
        self.tree.attach(at, name, ix);
        if let Some(dir) = self.tree.dir_mut(at) {
            dir.touch(now);
        }
        Ok(ix)
    }

    /// Maildir, and any folder that is not dbox: under the name in the key, in `new/`.
    fn put_back_named(&mut self, folder: FolderId, objects: Vec<Found>) -> Result<()> {
        let at = Place { folder, sub: Sub::New };
        for object in objects {
            let mut name = object.name.clone();
            let base = base_name(&name).to_vec();
            let known = [Sub::New, Sub::Cur].into_iter().any(|sub| {
                let dir = self.tree.dir(Place { folder, sub });
                dir.is_some_and(|d| d.entries.after(0).any(|(_, n, _)| base_name(n) == base))
            });
            if known {
                name.extend_from_slice(format!(".{}", object.key.id).as_bytes());
                if name.len() > super::names::NAME_MAX {
                    name = format!("recovered.{}", object.key.id).into_bytes();
                }
            }
            let node = self.mail_node(&object, Class::Mail);
            self.put_name(at, name.into(), node)?;
        }
        Ok(())
    }

    fn child(&self, folder: FolderId, name: &[u8]) -> Option<NodeIx> {
        match self.tree.dir(Place::own(folder))?.entries.get(name)?.1 {
            Target::Node(ix) => Some(ix),
            Target::Folder(_) | Target::Sub(_) => None,
        }
    }

    fn child_content(&self, folder: FolderId, name: &[u8]) -> Result<Option<Vec<u8>>> {
        self.child(folder, name).map(|ix| self.index_content(ix)).transpose()
    }

    fn put_back_sdbox(
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
        self.show_numbered(index, &uids)
    }

    /// A number that no mail of an sdbox folder has or may have had.
    fn free_uid(&self, folder: FolderId, index: Option<FolderId>) -> u32 {
        let highest = self.tree.dir(Place::own(folder)).map_or(0, |dir| {
            dir.entries.after(0).filter_map(|(_, n, _)| number(n, b"u.")).max().unwrap_or(0)
        });
        let known = index.and_then(|id| self.tree.folders.get(&id));
        let burnt = known.and_then(|f| f.burnt_below).unwrap_or(0);
        let next = known.and_then(|f| f.next_uid).unwrap_or(1);
        burnt.max(next).max(highest.saturating_add(1)).max(1)
    }

    /// Makes Dovecot show the files with these numbers.
    fn show_numbered(&mut self, index: Option<FolderId>, uids: &[u32]) -> Result<()> {
        let known = index.and_then(|id| self.tree.folders.get(&id));
        let burnt = known.and_then(|f| f.burnt_below).unwrap_or(0);
        let Some(index) = index else {
            tracing::warn!(user = %self.name, "recovered sdbox mails have no index yet; Dovecot finds them at its rebuild");
            return Ok(());
        };
        let Some(log) = self.child(index, b"dovecot.index.log") else { return Ok(()) };
        let state = self.index_state(index, b"dovecot.index")?;
        let content = self.index_content(log)?;
        let append = match state.map(|state| append_sdbox(&state, uids, burnt)) {
            Some(Ok(append)) => append,
            other => {
                tracing::warn!(user = %self.name, problem = ?other.map(|r| r.err()), "Dovecot is asked to rebuild a folder");
                mark_fsckd(&content, 0).map_err(|e| damaged(self, &e))?
            }
        };
        self.append_log(log, &append)
    }

    /// sdbox: mails that had their number when the last flush was cut, and were not yet in the
    /// index. The number may have been given again since, so they get another.
    fn show_unindexed(&mut self, folder: FolderId, index: Option<FolderId>) -> Result<()> {
        let Some(id) = index else { return Ok(()) };
        let Some(state) = self.index_state(id, b"dovecot.index")? else { return Ok(()) };
        let last = state.records.keys().next_back().copied().unwrap_or(0);
        let at = Place::own(folder);
        let Some(dir) = self.tree.dir(at) else { return Ok(()) };
        let mut waiting: Vec<u32> = dir
            .entries
            .after(0)
            .filter_map(|(_, name, _)| number(name, b"u."))
            .filter(|uid| *uid > last)
            .collect();
        waiting.sort_unstable();
        let mut uids = Vec::new();
        for old in waiting {
            let uid = self.free_uid(folder, index);
            let (from, to) = (format!("u.{old}"), format!("u.{uid}"));
            self.rename(at, from.as_bytes(), at, to.as_bytes(), true).map_err(unstop)?;
            uids.push(uid);
        }
        if uids.is_empty() {
            return Ok(());
        }
        tracing::warn!(user = %self.name, mails = uids.len(), "mails that were not yet in their index are put into it");
        self.show_numbered(index, &uids)
    }

    /// Whether the newest mail file of an sdbox folder, or a file of a storage, may not be in
    /// its index yet.
    pub(super) fn unindexed(&self, id: FolderId, changed: &[&[u8]]) -> bool {
        let Some(folder) = self.tree.folders.get(&id) else { return false };
        match &*folder.name {
            b"dbox-Mails" => {
                let newest = changed.iter().filter_map(|n| number(n, b"u.")).max().unwrap_or(0);
                let index = if self.child(id, b"dovecot.index.log").is_some() {
                    Some(id)
                } else {
                    self.counterpart(id)
                };
                let next = index.and_then(|i| self.tree.folders.get(&i)).and_then(|f| f.next_uid);
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

    /// The extents of a storage's files, with the files' numbers.
    fn storage_extents(&self, folder: FolderId) -> Vec<(u32, Extent)> {
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
    fn unmapped(&self, folder: FolderId, map: FolderId) -> Result<Vec<(u32, Extent)>> {
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

    /// The state of a Dovecot index from its files; `None` if they cannot be read.
    fn index_state(
        &self,
        folder: FolderId,
        base: &[u8],
    ) -> Result<Option<crate::dovecot::replay::IndexState>> {
        let files = IndexFiles::read(self, folder, base)?;
        let logs: Vec<&[u8]> = files.logs.iter().map(Vec::as_slice).collect();
        Ok(replay(files.snapshot.as_deref(), &logs).ok())
    }

    /// mdbox: extents go to the end of their files; gives the stretches that came back.
    fn put_back_extents(
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

    fn add_extent(
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
        self.commit(changes)?;
        let file = number(&name, b"m.").unwrap_or(0);
        let bytes = bytes.get(&object.key.id).cloned().unwrap_or_default();
        Ok(Some(Range { file, offset, bytes }))
    }

    /// The folders with the indexes of an mdbox storage.
    fn mdbox_folders(&self, map: FolderId) -> Vec<FolderId> {
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
    fn map_recovered(
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

fn damaged(user: &User, error: &RecoverError) -> Error {
    Error::Damaged { what: format!("user {}: index log: {error}", user.name) }
}

/// The files of a Dovecot index, oldest log first.
struct IndexFiles {
    snapshot: Option<Vec<u8>>,
    logs: Vec<Vec<u8>>,
}

impl IndexFiles {
    fn read(user: &User, folder: FolderId, base: &[u8]) -> Result<IndexFiles> {
        let with = |end: &[u8]| [base, end].concat();
        let mut logs = Vec::new();
        for name in [with(b".log.2"), with(b".log")] {
            logs.extend(user.child_content(folder, &name)?);
        }
        Ok(IndexFiles { snapshot: user.child_content(folder, base)?, logs })
    }
}

/// A mailbox's name from the path of its index directory, whose first `skip` components lead to
/// the storage. With `INDEX=` that is `mailboxes/BOX`, without it `mailboxes/BOX/dbox-Mails`.
fn mailbox_name(path: &[NameBytes], skip: usize) -> Option<Vec<u8>> {
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

fn number(name: &[u8], prefix: &[u8]) -> Option<u32> {
    std::str::from_utf8(name.strip_prefix(prefix)?).ok()?.parse().ok()
}

fn base_name(name: &[u8]) -> &[u8] {
    let end = name.iter().position(|b| *b == b':').unwrap_or(name.len());
    let name = &name[..end];
    let end = name.windows(3).position(|w| w == b",S=").unwrap_or(name.len());
    &name[..end]
}
