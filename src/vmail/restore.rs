//! Files of the metacache that are not there, or not as they were written (I7).
//!
//! An admin removed them while the user is open: what is open or flushed comes back as it was
//! ([`super::exact`]). Of the rest that comes back which the last flush held. An index file brings
//! back the whole index set of its folder then, with next-UID at its ceiling, for files of
//! different times together would lie, and [`super::later`] has it say what is there; other files
//! come back one by one. What no flush ever held becomes absent by a record, and the log says so. A
//! cache becomes absent.
//!
//! The machine went down: what is flushed is taken from the store, whatever the disk says of it.
//! What is not is on this disk only, and judged by its own format: what grows by appending is
//! cut to its last whole record, and a file that is not what it should be counts as missing.

use super::error::{Error, Plain, Result, pass};
use super::later::show_later_mails;
use super::lines::Final;
use super::load;
use super::node::{Kind, Local, Names, Node, NodeIx, Since};
use super::parts::{self, Contents, Wanted};
use super::session::UserCell;
use super::space;
use super::tree::{NameBytes, Target};
use super::user::User;
use super::wait::Patience;
use crate::cache::disk::How;
use crate::cache::metacache::Purpose;
use crate::dovecot::classes::{Class, IndexKind};
use crate::dovecot::index_snapshot::SnapshotHeader;
use crate::dovecot::records::{LogHeader, whole_records_len};
use crate::dovecot::uidlist;
use crate::failpoint;
use crate::format::journal::Change;
use crate::format::listing::{Attrs, Entry, Line};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::fs::api::Invalidate;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// A file of a folder.
#[derive(Clone)]
pub(super) struct File {
    pub at: Place,
    pub name: NameBytes,
    pub ix: NodeIx,
    class: Class,
}

/// What a try to bring files back came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tried {
    Done,
    /// Once the flush that is under way has ended.
    Flushing,
}

/// Brings back what is missing in a loaded folder.
pub async fn restore(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    restore_for(cell, folder, Purpose::Load).await
}

/// The same for somebody who may go further into the metacache's grace.
pub async fn restore_for(cell: &Arc<UserCell>, folder: FolderId, purpose: Purpose) -> Result<()> {
    let restored = restore_alone(cell, folder, purpose).await;
    show_later_mails(cell, purpose).await?;
    restored
}

pub(super) async fn restore_alone(
    cell: &Arc<UserCell>,
    folder: FolderId,
    purpose: Purpose,
) -> Result<()> {
    let mut patience = Patience::new(&cell.session);
    loop {
        let tried = {
            let _one = cell.loading.lock().await;
            restore_once(cell, folder, purpose).await
        };
        let error = match tried {
            Err(error @ Error::Store { .. }) => error,
            // A flush does not wait for itself: it cuts again.
            Ok(Tried::Flushing) if purpose != Purpose::Flush => {
                drop(cell.flushing.lock().await);
                continue;
            }
            done => return done.map(drop),
        };
        tracing::warn!(user = %cell.name, %error, "files of the metacache not brought back");
        if !patience.again().await {
            return Err(error);
        }
    }
}

async fn restore_once(cell: &Arc<UserCell>, id: FolderId, purpose: Purpose) -> Result<Tried> {
    let wanted = cell.open_user(|user| {
        user.forget_locks(id)?;
        let folder = user.tree.folders.get(&id).ok_or(Plain::NotFound)?;
        let whole = Wanted { id, parts: folder.parts.clone(), snapshot: None };
        let half = user.half_restored.contains(&id);
        let here = !half && user.gone(id)?.is_empty() && !user.has_evicted(id);
        Ok(if here { Vec::new() } else { vec![whole] })
    })?;
    if wanted.is_empty() {
        return Ok(Tried::Done);
    }
    pass(failpoint::RESTORE_BEFORE)?;
    let mut fetched = parts::fetch_parts(cell, &wanted).await?;
    let Some((_, source)) = fetched.pop() else { return Ok(Tried::Done) };
    let large = parts::large_files(cell, id, &source).await?;
    let _room = space::reserve_of(cell, load::takes(&source, &large), purpose).await?;
    let contents = source.parts.map(|parts| parts.contents).unwrap_or_default();
    cell.open_user(|user| {
        let now = user.tree.folders.get(&id).ok_or(Plain::NotFound)?;
        if now.parts != wanted[0].parts {
            // Flushed meanwhile: what was fetched may be an earlier file of the same name. The
            // call is made again.
            return Ok(Tried::Done);
        }
        let mut contents = contents;
        user.return_evicted(id, &source.state, &mut contents, &large)?;
        if !user.return_exact(id, &contents)? {
            return Ok(Tried::Flushing);
        }
        if user.half_restored.contains(&id) || !user.gone(id)?.is_empty() {
            user.bring_back(id, &source.state, contents, &large)?;
        }
        Ok(Tried::Done)
    })
}

/// After a power cut, before anything else of the user is read: what is flushed is forgotten
/// here, and the folders with changes are loaded, which judges their files.
pub async fn after_power_cut(cell: &Arc<UserCell>) -> Result<()> {
    let changed: Vec<FolderId> = cell.open_user(|user| {
        if !user.unclean {
            return Ok(Vec::new());
        }
        // Those that a checkpoint wrote may be newer than what is left of the journal.
        let snapshots: Vec<FolderId> = user.snapshots.iter().copied().collect();
        for id in snapshots {
            user.forget_snapshot(id)?;
        }
        let all = user.tree.folders.values().map(|f| (f.id, f.unflushed.is_empty()));
        let (flushed, changed): (Vec<_>, Vec<_>) = all.partition(|(_, flushed)| *flushed);
        for (id, _) in flushed {
            user.forget_folder(id)?;
        }
        Ok(changed.into_iter().map(|(id, _)| id).collect())
    })?;
    for folder in changed {
        load::load(cell, folder).await?;
    }
    cell.if_open(|user| user.unclean = false);
    Ok(())
}

/// Large files, which no part holds.
fn add_large(cut: &Final, contents: &mut Contents, large: &HashMap<ObjectId, bytes::Bytes>) {
    for (sub, name, entry) in cut.names() {
        if let Entry::Local { object: Some(object), .. } = entry
            && let Some(bytes) = large.get(object)
        {
            contents.insert((sub, name.clone()), bytes.to_vec());
        }
    }
}

impl User {
    /// Those that travel, or the others: locks and temporary files.
    fn local_files(&self, id: FolderId, travel: bool) -> Vec<File> {
        let Some(folder) = self.tree.folders.get(&id) else { return Vec::new() };
        let mut all = Vec::new();
        for (sub, dir) in folder.dirs() {
            for (_, name, target) in dir.entries.after(0) {
                if let Target::Node(ix) = target
                    && let Some(Node { kind: Kind::Local(_), class, .. }) = self.tree.nodes.get(ix)
                    && class.is_local_only() != travel
                {
                    let at = Place { folder: id, sub };
                    all.push(File { at, name: name.clone(), ix, class: *class });
                }
            }
        }
        all
    }

    /// Files that travel and are not where they should be.
    pub(super) fn gone(&self, id: FolderId) -> Result<Vec<File>> {
        self.not_there(self.local_files(id, true))
    }

    /// A lock or temporary file that is gone is absent, unless it is open.
    fn forget_locks(&mut self, id: FolderId) -> Result<()> {
        for file in self.not_there(self.local_files(id, false))? {
            let open = |node: &Node| matches!(&node.kind, Kind::Local(l) if l.file.is_some());
            if !self.tree.nodes.get(file.ix).is_some_and(open) {
                self.is_absent(&file)?;
            }
        }
        Ok(())
    }

    fn not_there(&self, files: Vec<File>) -> Result<Vec<File>> {
        let mut gone = Vec::new();
        for file in files {
            if self.here(file.ix).is_err() {
                continue;
            }
            let path = self.file_path(file.at, &file.name);
            let there = self.session.disk().exists(&path);
            if !there.map_err(|e| Error::disk(path.display().to_string(), &e))? {
                gone.push(file);
            }
        }
        Ok(gone)
    }

    /// Evicted files are on the disk again, exactly as they were. One that the parts do not hold so
    /// counts as missing.
    fn return_evicted(
        &mut self,
        id: FolderId,
        cut: &Final,
        contents: &mut Contents,
        large: &HashMap<ObjectId, bytes::Bytes>,
    ) -> Result<()> {
        add_large(cut, contents, large);
        for file in self.local_files(id, true) {
            if self.here(file.ix).is_ok() {
                continue;
            }
            let content = contents.get(&(file.at.sub, file.name.clone()));
            let size = self.node(file.ix)?.size;
            match content.filter(|content| content.len() as u64 == size) {
                Some(content) => self.write_local(file.at, &file.name, content)?,
                None => tracing::error!(
                    user = %self.name, file = %String::from_utf8_lossy(&file.name),
                    "evicted, and no part holds it as it was"
                ),
            }
            if let Kind::Local(local) = &mut self.node_mut(file.ix)?.kind {
                local.evicted = false;
            }
            self.recharge(file.ix);
        }
        Ok(())
    }

    fn bring_back(
        &mut self,
        id: FolderId,
        cut: &Final,
        mut contents: Contents,
        large: &HashMap<ObjectId, bytes::Bytes>,
    ) -> Result<()> {
        add_large(cut, &mut contents, large);
        let gone: HashSet<NodeIx> = self.gone(id)?.iter().map(|file| file.ix).collect();
        let files = self.local_files(id, true);
        let index = |class: Class| matches!(class, Class::Index(_)) && !class.is_cache();
        let whole = self.half_restored.contains(&id)
            || files.iter().any(|f| gone.contains(&f.ix) && index(f.class));
        if whole {
            self.begin_restoring(id)?;
            self.half_restored.insert(id);
            if !self.restored.contains(&id) {
                self.restored.push(id);
            }
        }
        for file in &files {
            let of_set = whole && matches!(file.class, Class::Index(_));
            if !of_set && !gone.contains(&file.ix) {
                continue;
            }
            let content = contents.remove(&(file.at.sub, file.name.clone()));
            match content.filter(|_| of_set || !file.class.is_cache()) {
                Some(content) => self.rewrite(file, &content)?,
                None => self.is_absent(file)?,
            }
            pass(failpoint::RESTORE_BETWEEN)?;
        }
        if whole {
            tracing::warn!(
                user = %self.name, folder = %id,
                "index files are missing in the metacache; all of the folder's come back from the last flush"
            );
            let named: Vec<(Sub, NameBytes, Attrs)> = cut
                .names()
                .filter_map(|(sub, name, entry)| match entry {
                    Entry::Local { attrs, .. } => Some((sub, name.clone(), *attrs)),
                    _ => None,
                })
                .collect();
            for (sub, name, attrs) in named {
                let at = Place { folder: id, sub };
                let class = self.class_of(at, &name);
                let free = self.tree.dir(at).is_some_and(|d| d.entries.get(&name).is_none());
                if let Class::Index(_) = class
                    && free
                    && let Some(content) = contents.remove(&(sub, name.clone()))
                {
                    self.appears(at, name, class, attrs, &content)?;
                }
            }
            if let Some(folder) = self.tree.folders.get_mut(&id) {
                folder.burnt_below = folder.burnt_below.max(folder.uid_ceiling);
            }
            self.follow_uids(id)?;
            self.half_restored.remove(&id);
        }
        for file in self.local_files(id, true) {
            let Some(node) = self.tree.nodes.get(file.ix) else { continue };
            let closed = matches!(&node.kind, Kind::Local(local) if local.file.is_none());
            if node.handles > 0 && closed {
                self.open_local(file.ix)?;
            }
        }
        self.important();
        Ok(())
    }

    /// A file holds what it held at the last cut.
    fn rewrite(&mut self, file: &File, content: &[u8]) -> Result<()> {
        self.write_local(file.at, &file.name, content)?;
        let now = self.now();
        let node = self.node_mut(file.ix)?;
        node.size = content.len() as u64;
        node.mtime = now;
        if let Kind::Local(local) = &mut node.kind {
            local.file = None;
            local.since = Since::everything();
            local.inplace += 1;
            local.writes += 1;
        }
        let ino = node.ino;
        self.recharge(file.ix);
        let lines = self.node_lines(file.ix);
        self.commit(lines)?;
        self.session.invalidate(Invalidate::Inode { ino });
        Ok(())
    }

    fn is_absent(&mut self, file: &File) -> Result<()> {
        if !file.class.is_cache() && !file.class.is_local_only() {
            tracing::error!(
                user = %self.name, file = %String::from_utf8_lossy(&file.name),
                "gone from the metacache, and in no flush"
            );
        }
        let now = self.now();
        let line = Line::Unset { sub: file.at.sub, name: file.name.to_vec() };
        let mut changes = vec![Change::Line { folder: file.at.folder, line }];
        changes.extend(self.touch_line(file.at, now));
        self.commit(changes)?;
        // One that is there and belongs to another set of files.
        match self.session.disk().remove_file(&self.file_path(file.at, &file.name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::disk("metacache", &e));
            }
            _ => {}
        }
        self.tree.detach(file.at, &file.name);
        self.touch(file.at, now);
        self.lost_name(file.ix, now);
        if let Some(parent) = self.tree.dir(file.at).map(|d| d.ino) {
            self.session.invalidate(Invalidate::Name { parent, name: file.name.to_vec() });
        }
        Ok(())
    }

    pub(super) fn appears(
        &mut self,
        at: Place,
        name: NameBytes,
        class: Class,
        attrs: Attrs,
        content: &[u8],
    ) -> Result<()> {
        self.write_local(at, &name, content)?;
        let now = self.now();
        let ix = self.tree.nodes.add(Node {
            ino: self.session.new_ino(),
            kind: Kind::Local(Box::new(Local {
                tracker: self.track(class, content),
                ..User::new_local()
            })),
            class,
            size: content.len() as u64,
            mode: attrs.mode,
            owner: attrs.owner,
            mtime: attrs.mtime,
            ctime: now,
            names: Names::None,
            nlink: 1,
            lookups: 0,
            handles: 0,
            writers: 0,
        });
        self.tree.attach(at, name.clone(), ix);
        self.named(ix, at);
        let lines = self.node_lines(ix);
        self.commit(lines)?;
        if let Some(parent) = self.tree.dir(at).map(|d| d.ino) {
            self.session.invalidate(Invalidate::Name { parent, name: name.to_vec() });
        }
        Ok(())
    }

    /// Removes the files of a folder from the metacache, and its listing: the store has them.
    fn forget_folder(&mut self, id: FolderId) -> Result<()> {
        let disk = self.session.env.disk.clone();
        for sub in Sub::ALL {
            let dir = self.cache_path(Place { folder: id, sub });
            let failed = |e| Error::disk(dir.display().to_string(), &e);
            for entry in disk.list(&dir).map_err(failed)? {
                if !entry.is_dir {
                    disk.remove_file(&dir.join(&entry.name)).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn forget_snapshot(&mut self, id: FolderId) -> Result<()> {
        let path = self.snapshot_path(id);
        match self.session.env.disk.remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::disk(path.display().to_string(), &e))
            }
            _ => {
                self.snapshots.remove(&id);
                Ok(())
            }
        }
    }

    /// Whether an index file with changes that are not flushed did not survive a power cut.
    pub(super) fn any_torn(&self, id: FolderId, state: &Final, cut: &Contents) -> Result<bool> {
        for (sub, name, entry) in state.names() {
            let key = (sub, name.clone());
            let dirty =
                self.tree.folders.get(&id).is_some_and(|f| f.unflushed.names.contains(&key));
            let at = Place { folder: id, sub };
            let Class::Index(kind) = self.class_of(at, name) else { continue };
            if !dirty || !matches!(entry, Entry::Local { .. }) || kind == IndexKind::Cache {
                continue;
            }
            if !self.survived(at, name, kind, cut.get(&key).map(Vec::as_slice))? {
                tracing::warn!(
                    user = %self.name, file = %String::from_utf8_lossy(name),
                    "did not survive the power cut"
                );
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Cuts what grows by appending to its last whole record, and says whether the file is what
    /// it should be and not older than at the last cut.
    fn survived(
        &self,
        at: Place,
        name: &[u8],
        kind: IndexKind,
        cut: Option<&[u8]>,
    ) -> Result<bool> {
        let path = self.file_path(at, name);
        let failed = |e| Error::disk(path.display().to_string(), &e);
        let disk = self.session.disk();
        let Some(content) = disk.read(&path, u64::MAX).map_err(failed)? else { return Ok(false) };
        let whole = match kind {
            IndexKind::Log | IndexKind::LogRotated | IndexKind::MapLog | IndexKind::ListLog => {
                let Ok(header) = LogHeader::parse(&content) else { return Ok(false) };
                let whole = whole_records_len(&content);
                let start = content.get(..header.hdr_size);
                let same = |cut: &&[u8]| cut.get(..header.hdr_size) == start;
                if cut.filter(same).is_some_and(|cut| whole < cut.len()) {
                    return Ok(false);
                }
                whole
            }
            IndexKind::UidList => {
                let whole = uidlist::whole_lines_len(&content);
                let Ok(list) = uidlist::parse(content.get(..whole).unwrap_or_default()) else {
                    return Ok(false);
                };
                let same = |cut: &uidlist::UidList| cut.uid_validity == list.uid_validity;
                let known = cut.and_then(|cut| uidlist::parse(cut).ok()).filter(same);
                if known.is_some_and(|cut| cut.next_uid() > list.next_uid()) {
                    return Ok(false);
                }
                whole
            }
            IndexKind::Snapshot | IndexKind::MapSnapshot | IndexKind::ListSnapshot => {
                return Ok(SnapshotHeader::parse(&content).is_ok());
            }
            _ => return Ok(true),
        };
        if whole < content.len() {
            let file = disk.open(&path, How::ReadWrite).map_err(failed)?;
            file.set_len(whole as u64).map_err(failed)?;
        }
        Ok(true)
    }
}
