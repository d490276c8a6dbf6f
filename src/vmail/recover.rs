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

use super::error::{During, Error, Plain, Result, pass};
use super::load;
use super::need::Stop;
use super::node::{Kind, Names, Node, NodeIx};
use super::promise;
use super::recover_mdbox::{map_unmapped, put_back_growing};
use super::recover_sdbox::{put_back_numbered, show_unindexed};
use super::session::UserCell;
use super::tree::{NameBytes, Target};
use super::user::User;
use super::{dropped, gc_scan};
use crate::dovecot::classes::Class;
use crate::failpoint;
use crate::format::head::Head;
use crate::format::journal::Change;
use crate::format::key::{
    KeyTail, META_FOLDER, META_NAME, META_REPLACES, MailKey, Piece, mail_dir, mail_key,
    parse_meta_folder,
};
use crate::format::listing::Line;
use crate::format::{Epoch, FolderId, ObjectId, Place, Sub};
use crate::fs::api::{Caller, Invalidate};
use crate::sabotage::{self, Bug};
use crate::store::{ObjectMeta, Reason};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Whether a name is one that dbox gives to what it still writes.
pub fn is_temporary(name: &[u8]) -> bool {
    name.starts_with(b".temp.")
}

/// Mails that were safe and not yet named when the last flush was cut get their names: their
/// servers may have said since that they are delivered. Gives their objects.
///
/// If the recovery was `begun` before, it may have ended between a file of dbox and the record that
/// makes Dovecot show it: every folder of dbox is looked through. And after a power cut each one
/// with changes: what made a mail safe was synced to the journal, its later name or the record in
/// Dovecot's log perhaps not.
pub async fn finish_names(cell: &Arc<UserCell>, begun: bool) -> Result<HashSet<ObjectId>> {
    let mut finished = HashSet::new();
    let folders: Vec<FolderId> = cell.open_user(|user| {
        let dbox = |name: &[u8]| name == b"dbox-Mails" || name == b"storage";
        let waits = |f: &&super::tree::Folder| {
            f.unfinished || !f.unflushed.is_empty() || begun && dbox(&f.name)
        };
        Ok(user.tree.folders.values().filter(waits).map(|f| f.id).collect())
    })?;
    for folder in folders {
        load::load(cell, folder).await?;
        let name =
            cell.open_user(|user| Ok(user.tree.folders.get(&folder).map(|f| f.name.clone())))?;
        // Before others get their records: a number below the index's last one counts as shown.
        if name.as_deref() == Some(b"dbox-Mails") {
            show_unindexed(cell, folder).await?;
        }
        let found = cell.open_user(|user| user.take_unfinished(folder))?;
        if !found.is_empty() {
            tracing::warn!(user = %cell.name, mails = found.len(), "naming mails that had only a temporary name");
            finished.extend(found.iter().map(|object| object.key.id));
            put_back(cell, folder, found, &HashSet::new()).await?;
        }
        if name.as_deref() == Some(b"storage") {
            map_unmapped(cell, folder).await?;
        }
        cell.if_open(|user| {
            if let Some(folder) = user.tree.folders.get_mut(&folder) {
                folder.unfinished = false;
            }
        });
    }
    Ok(finished)
}

/// An object that nothing names.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub tail: KeyTail,
    pub key: MailKey,
    pub size: u64,
    pub name: Vec<u8>,
    /// Ids of the same file, where that was asked for.
    pub replaces: Vec<ObjectId>,
}

/// Looks at what lies above the watermark and adopts or drops it. `epoch` is the new one.
pub async fn after_crash(
    cell: &Arc<UserCell>,
    watermark: ObjectId,
    epoch: Epoch,
    named: &HashSet<ObjectId>,
    adopt: bool,
    finished: &HashSet<ObjectId>,
) -> Result<()> {
    let mut found = list_mails(cell, watermark, None, Reason("recover")).await?;
    if sabotage::is(Bug::ListBeforeSwap) {
        found.retain(|(tail, _)| sabotage::was_listed(tail.id()));
    }
    let end = found.iter().map(|(tail, _)| tail.id()).filter(|id| id.epoch < epoch).max();
    cell.if_open(|user| user.closed_end = end);
    found.retain(|(tail, _)| !named.contains(&tail.id()));
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
    adopt_over(cell, found, finished).await
}

/// The second listing of an open: what an epoch that was not handed over left in the store, and
/// only showed up there after the session that followed it had looked. That session's flush says
/// up to where it saw the epoch; a later one finds what the flush before the last crash missed.
pub async fn late_arrivals(
    cell: &Arc<UserCell>,
    old: &Head,
    named: &HashSet<ObjectId>,
) -> Result<()> {
    let flushed = old.watermark.epoch;
    let Some(closed) = old.closed.iter().find(|c| c.epoch.0.checked_add(1) == Some(flushed.0))
    else {
        return Ok(());
    };
    let before = ObjectId { epoch: flushed, counter: 0 };
    let mut found = list_mails(cell, closed.end, Some(before), Reason("recover")).await?;
    found.retain(|(tail, _)| !named.contains(&tail.id()));
    if found.is_empty() {
        return Ok(());
    }
    // One that was adopted before has a name, or was expunged since.
    let head = cell.open_user(|user| Ok(user.head.clone()))?;
    let list = dropped::read(cell, &head.dropped, Reason("recover")).await?;
    found.retain(|(tail, _)| list.mail(tail.id()).is_none());
    let mut ids: HashSet<ObjectId> = found.iter().map(|(tail, _)| tail.id()).collect();
    cell.if_open(|user| user.without_named(&mut ids));
    for id in gc_scan::named_among(cell, &head, ids.clone()).await? {
        ids.remove(&id);
    }
    found.retain(|(tail, _)| ids.contains(&tail.id()));
    if found.is_empty() {
        return Ok(());
    }
    tracing::warn!(
        user = %cell.name, objects = found.len(),
        "adopting mails that reached the store after their session was followed by another"
    );
    adopt_mails(cell, found).await
}

/// A user's mail objects with ids above `after`, and below `before`, with their sizes.
pub(super) async fn list_mails(
    cell: &Arc<UserCell>,
    after: ObjectId,
    before: Option<ObjectId>,
    why: Reason,
) -> Result<Vec<(KeyTail, u64)>> {
    let dir = mail_dir(&cell.name);
    let start = format!("{dir}/{after}.~");
    let store = &cell.session.env.store;
    let listed = match before {
        None => store.list(&dir, Some(&start), why).await,
        Some(id) => store.list_before(&dir, Some(&start), &format!("{dir}/{id}"), why).await,
    };
    let listed = listed.map_err(|e| {
        Error::store(format!("listing mails of {}", cell.name), During::Delivery, e)
    })?;
    let mut found = Vec::new();
    for object in listed {
        match tail_of(&object) {
            Some(tail) => found.push((tail, object.size)),
            None => {
                tracing::warn!(user = %cell.name, key = %object.key, "not a key of ours; left alone");
            }
        }
    }
    Ok(found)
}

/// Gives names to objects that nothing names, and has that flushed soon.
pub(super) async fn adopt_mails(cell: &Arc<UserCell>, found: Vec<(KeyTail, u64)>) -> Result<()> {
    adopt_over(cell, found, &HashSet::new()).await
}

/// The same, after `finished` got their names.
async fn adopt_over(
    cell: &Arc<UserCell>,
    found: Vec<(KeyTail, u64)>,
    finished: &HashSet<ObjectId>,
) -> Result<()> {
    let (mut found, doubles) = sort_out(cell, found).await?;
    if !finished.is_empty() {
        for object in &mut found {
            object.replaces = replaced(cell, &object.tail).await?;
        }
    }
    let mut by_folder: BTreeMap<FolderId, Vec<Found>> = BTreeMap::new();
    for object in found {
        by_folder.entry(object.key.folder).or_default().push(object);
    }
    for (folder, mut objects) in by_folder {
        objects.sort_by_key(|o| o.key.id);
        let folder = find_folder(cell, folder, &objects[0]).await?;
        load::load(cell, folder).await?;
        pass(failpoint::RECOVER_BEFORE_RECORD)?;
        put_back(cell, folder, objects, finished).await?;
        pass(failpoint::RECOVER_BETWEEN_FOLDERS)?;
    }
    cell.open_user(|user| {
        user.commit(doubles.into_iter().map(|object| Change::Drop { object }).collect())?;
        user.urgent();
        Ok(())
    })
}

/// Mails that this machine promised before another session took the user: they come back.
pub async fn adopt_promises(cell: &Arc<UserCell>) -> Result<()> {
    let adopted = promise::adopt(cell).await?;
    if adopted.is_empty() {
        return Ok(());
    }
    tracing::warn!(user = %cell.name, mails = adopted.len(), "recovering mails that were promised here");
    let paths: Vec<_> = adopted.iter().map(|(_, _, path)| path.clone()).collect();
    let ids: Vec<_> = adopted.iter().map(|(tail, ..)| tail.id()).collect();
    let found = adopted.into_iter().map(|(tail, size, _)| (tail, size)).collect();
    adopt_mails(cell, found).await?;
    cell.open_user(|user| {
        ids.into_iter().for_each(|id| user.answered(id));
        Ok(())
    })?;
    super::sync::sync_user(cell).await?;
    paths.iter().for_each(|path| promise::adopted(cell, path));
    Ok(())
}

pub(super) fn tail_of(object: &ObjectMeta) -> Option<KeyTail> {
    KeyTail::parse(object.key.rsplit_once('/')?.1).ok()
}

/// Names from metadata where they did not fit the key, and of one file the newest object only.
/// A name alone does not tell: Postfix gives it to the next mail of the same second, once the
/// first has left `tmp/`.
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
        let found = Found { tail, key, size, name: name.clone(), replaces: Vec::new() };
        if matches!(found.key.piece, Piece::Extent { .. }) {
            out.push(found);
            continue;
        }
        // Its size is in the name of a Maildir mail, and is another one if the mail was published
        // before it was whole.
        let name = base_name(&name).to_vec();
        match seen.get(&(found.key.folder, name.clone())) {
            // Listings are sorted by id.
            Some(i) if replaced(cell, &found.tail).await?.contains(&out[*i].key.id) => {
                let older = std::mem::replace(&mut out[*i], found);
                doubles.push(older.tail);
            }
            _ => {
                seen.insert((found.key.folder, name), out.len());
                out.push(found);
            }
        }
    }
    Ok((out, doubles))
}

/// The ids under which the file of an object was put before.
pub(super) async fn replaced(cell: &Arc<UserCell>, tail: &KeyTail) -> Result<Vec<ObjectId>> {
    let text = metadata(cell, tail, META_REPLACES).await?.unwrap_or_default();
    Ok(text.split(' ').filter_map(|id| id.parse().ok()).collect())
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
    let path: Vec<NameBytes> = path.into_iter().map(NameBytes::from).collect();
    find_path(cell, &path).await.map(|(folder, _)| folder)
}

/// The folder at a path, made if it is not there; says whether it was made.
pub(super) async fn find_path(
    cell: &Arc<UserCell>,
    path: &[NameBytes],
) -> Result<(FolderId, bool)> {
    let mut at = Place::ROOT;
    let mut made = false;
    for name in path {
        load::load(cell, at.folder).await?;
        at = cell.open_user(|user| {
            let target = match user.target(at, name)? {
                Some(target) => target,
                None => {
                    let caller = Caller { uid: user.owner.uid, gid: user.owner.gid, pid: 0 };
                    let target = user.mkdir(caller, at, name, 0o700).map_err(unstop)?;
                    if let Some(dir) = user.tree.dir(at) {
                        let parent = dir.ino;
                        user.session.invalidate(Invalidate::Name { parent, name: name.to_vec() });
                        user.session.invalidate(Invalidate::Inode { ino: parent });
                    }
                    made = true;
                    target
                }
            };
            match target {
                Target::Folder(id) => Ok(Place::own(id)),
                Target::Sub(sub) => Ok(Place { folder: at.folder, sub }),
                Target::Node(_) => Err(Plain::Exists.into()),
            }
        })?;
    }
    Ok((at.folder, made))
}

pub(super) fn unstop(stop: Stop) -> Error {
    match stop {
        Stop::Error(error) => error,
        Stop::Wait(need) => Error::Internal(format!("recovery would have to wait: {need:?}")),
    }
}

async fn put_back(
    cell: &Arc<UserCell>,
    folder: FolderId,
    objects: Vec<Found>,
    finished: &HashSet<ObjectId>,
) -> Result<()> {
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
        _ => cell.open_user(|user| user.put_back_named(folder, objects, finished)),
    }
}

impl User {
    pub(super) fn mail_node(&self, object: &Found, class: Class) -> Node {
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

    /// Whether this is a temporary name of a published mail. The name tells, not what its node is by all
    /// its names: a mail that was linked into place and expunged may have kept the one in `tmp/`.
    pub(super) fn safe_under_temporary(&self, at: Place, name: &[u8], ix: NodeIx) -> bool {
        let Some(node) = self.tree.nodes.get(ix) else { return false };
        match node.kind {
            Kind::Mail(_) | Kind::Published(_) => {
                (at.sub == Sub::Tmp || is_temporary(name))
                    && node.object().is_some()
                    && self.class_of(at, name) == Class::MailTemp
            }
            Kind::Growing(ref grow) => grow.temporary && !grow.extents.is_empty(),
            Kind::Local(_) | Kind::Symlink(_) => false,
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
                .filter(|(name, ix)| {
                    let only = self.tree.nodes.get(*ix).is_some_and(|node| node.nlink == 1);
                    only && self.safe_under_temporary(at, name, *ix)
                })
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
                    found.push(Found { tail: tail.clone(), key, size, name, replaces: Vec::new() });
                }
                // On record together with the new name: a death in between must leave one.
                if let Some(last) = found.last() {
                    let line = Line::Unset { sub, name: name.to_vec() };
                    self.old_names.insert(last.key.id, Change::Line { folder, line });
                }
                self.tree.detach(at, &name);
                self.drop_if_unused(ix);
            }
        }
        Ok(found)
    }

    /// Names a recovered object.
    pub(super) fn put_name(&mut self, at: Place, name: NameBytes, node: Node) -> Result<NodeIx> {
        self.put_name_with(at, name, node, Vec::new())
    }

    /// The same, with further changes in the same record.
    pub(super) fn put_name_with(
        &mut self,
        at: Place,
        name: NameBytes,
        node: Node,
        mut changes: Vec<Change>,
    ) -> Result<NodeIx> {
        let now = self.now();
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
        let object = node.object().map(KeyTail::id);
        changes.extend(object.and_then(|id| self.old_names.remove(&id)));
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
    /// A file that was published, flushed under its temporary name (`finished`), and published
    /// again with more in it is one mail: the newer object counts.
    fn put_back_named(
        &mut self,
        folder: FolderId,
        objects: Vec<Found>,
        finished: &HashSet<ObjectId>,
    ) -> Result<()> {
        let at = Place { folder, sub: Sub::New };
        let mut known: HashSet<Vec<u8>> = HashSet::new();
        for sub in [Sub::New, Sub::Cur] {
            if let Some(dir) = self.tree.dir(Place { folder, sub }) {
                known.extend(dir.entries.after(0).map(|(_, name, _)| base_name(name).to_vec()));
            }
        }
        for object in objects {
            let mut name = object.name.clone();
            if self.supersede(at, &object, finished)? {
                known.remove(base_name(&name));
            }
            if !known.insert(base_name(&name).to_vec()) {
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

    /// Removes what `object` is a newer content of; says whether there was such.
    fn supersede(
        &mut self,
        at: Place,
        object: &Found,
        finished: &HashSet<ObjectId>,
    ) -> Result<bool> {
        let Some(dir) = self.tree.dir(at).filter(|_| !finished.is_empty()) else {
            return Ok(false);
        };
        let old = dir.entries.after(0).find_map(|(_, name, target)| {
            let Target::Node(ix) = target else { return None };
            let tail = self.tree.nodes.get(ix)?.object()?;
            let older = finished.contains(&tail.id()) && object.replaces.contains(&tail.id());
            older.then(|| (name.clone(), ix, tail.clone()))
        });
        let Some((name, ix, tail)) = old else { return Ok(false) };
        let line = Line::Unset { sub: at.sub, name: name.to_vec() };
        let unset = Change::Line { folder: at.folder, line };
        self.commit(vec![unset, Change::Drop { object: tail }])?;
        self.tree.detach(at, &name);
        self.drop_if_unused(ix);
        Ok(true)
    }
}

/// What stays of a mail's name when its sizes and flags are known.
fn base_name(name: &[u8]) -> &[u8] {
    let end = name.iter().position(|b| *b == b':').unwrap_or(name.len());
    let name = &name[..end];
    let end = name.windows(3).position(|w| w == b",S=").unwrap_or(name.len());
    &name[..end]
}
