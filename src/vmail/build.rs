//! A user in memory from its head and what the local disk knows: the folders, and what the
//! journal says since the last flush. Lines of the journal wait until their folder is loaded.

use super::close::Leaving;
use super::error::{Error, Result};
use super::journal::Journal;
use super::load;
use super::local::{LocalState, Stamp, encode_stamped};
use super::open::Follows;
use super::session::{Session, UserCell};
use super::tree::{Dir, Folder, Target, Tree};
use super::user::{Changes, User, renamed_from};
use crate::format::head::Head;
use crate::format::journal::{Change, DiskOp};
use crate::format::listing::{Entry, Line};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::store::ETag;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

pub(super) struct Built {
    pub user: User,
    /// Ids that the journal names or drops, though the head does not.
    pub named_above: HashSet<ObjectId>,
}

pub(super) fn build(
    cell: &Arc<UserCell>,
    head: Head,
    etag: ETag,
    local: Option<LocalState>,
    follows: Follows,
    state_dir: std::path::PathBuf,
    cache_dir: std::path::PathBuf,
) -> Result<Built> {
    let session = cell.session.clone();
    let disk = session.env.disk.clone();
    let mut tree = Tree::default();
    build_folders(cell, &head, &mut tree)?;
    let resumed = local.is_some();
    let local = local.unwrap_or_else(|| LocalState {
        stamp: Stamp {
            version: 1,
            flushed_seq: 0,
            boot: String::new(),
            clean: true,
            recovering: false,
        },
        head: head.clone(),
        next: None,
        head_is_newer: false,
        records: Vec::new(),
        journal_len: 0,
        last_seq: 0,
        snapshots: HashSet::new(),
        restoring: HashSet::new(),
        links: None,
    });
    let journal_path = state_dir.join("journal");
    let journal = if resumed {
        let mut journal =
            Journal::resume(&*disk, &journal_path, local.last_seq, local.journal_len)?;
        if follows == Follows::OwnCrash {
            journal.inherit();
        }
        journal
    } else {
        Journal::create(&*disk, &journal_path, 0)?
    };
    let unclean = resumed && (follows == Follows::Loss || !kept_on_disk(&session, &local.stamp));
    // A table that a checkpoint wrote may be newer than what is left of the journal.
    let links = local.links.filter(|_| !unclean);
    let links_known = links.is_some();
    tree.links = links.unwrap_or_default();
    let mut named_above: HashSet<ObjectId> = head.known_above.iter().copied().collect();
    let mut user = User {
        name: cell.name.clone(),
        session: session.clone(),
        tree,
        journal,
        epoch: head.epoch,
        last_counter: 0,
        unanswered: BTreeSet::new(),
        promised: BTreeMap::new(),
        owner: head.root_owner,
        flushed_seq: local.stamp.flushed_seq,
        dropped: Vec::new(),
        dropped_files: Vec::new(),
        again: HashSet::new(),
        deleted: Vec::new(),
        doomed: HashSet::new(),
        closed_end: None,
        gc: super::gc::Looked::opened(session.env.clock.boot(), session.settings.gc),
        links_changed: HashSet::new(),
        links_known,
        folders_changed: false,
        changes: Changes::default(),
        snapshots: local.snapshots,
        cache_dir,
        state_dir: state_dir.clone(),
        lost: false,
        cut_out: None,
        leaving: Leaving::No,
        handed_over: None,
        ready: false,
        renamed_from: None,
        unclean,
        inherited: resumed && follows == Follows::OwnCrash,
        used: session.env.clock.boot(),
        restored: Vec::new(),
        restoring: local.restoring,
        half_restored: HashSet::new(),
        users_of: super::services::Services::default(),
        cell: Arc::downgrade(cell),
        uidvalidity: None,
        space: super::space::Space::new(session.metacache.account(&cell.name)),
        uidvalidity_ceiling: head.uidvalidity_ceiling,
        uidvalidity_burnt: head.uidvalidity_burnt,
        recovering: follows == Follows::Loss || unclean,
        pending_made: false,
        ceiling_wanted: false,
        old_names: std::collections::HashMap::new(),
        idle_flush: None,
        head,
        etag,
    };
    let last = local.records.last().map(|r| r.seq);
    for record in local.records {
        let fresh = record.seq > user.flushed_seq;
        for change in &record.changes {
            user.replay(change, fresh, &mut named_above);
        }
        // What a flush has was done: its file may be evicted since.
        if Some(record.seq) == last && fresh {
            user.redo(&record.changes);
        }
        user.renamed_from = renamed_from(&record.changes);
    }
    if user.has_unflushed() {
        user.important();
    }
    let clean = follows == Follows::Clean && !user.has_unflushed();
    let stamp = user.stamp(user.flushed_seq, clean);
    let bytes = encode_stamped(&stamp, &user.head)?;
    let path = state_dir.join("head");
    disk.replace(&path, &bytes, true).map_err(|e| Error::disk(path.display().to_string(), &e))?;
    user.count()?;
    Ok(Built { user, named_above })
}

/// Whether what was written to the local disk under a stamp is there: index files are not synced
/// when their user is handed over, so the machine must not have been started since.
pub(super) fn kept_on_disk(session: &Session, stamp: &Stamp) -> bool {
    stamp.boot == session.settings.boot_id
}

pub(super) fn build_folders(cell: &UserCell, head: &Head, tree: &mut Tree) -> Result<()> {
    let session = &cell.session;
    for found in &head.folders {
        let mut folder = Folder::new(found.id, found.parent, &found.name);
        folder.parts = found.parts.clone();
        folder.layers = vec![None; found.parts.len().saturating_sub(1)];
        folder.uid_ceiling = found.uid_ceiling;
        folder.burnt_below = found.burnt_below;
        folder.unfinished = found.unfinished;
        let (ino, attrs) = if found.id == FolderId::ROOT {
            let mut attrs = load::UNKNOWN;
            attrs.mode = head.root_mode;
            (cell.ino, attrs)
        } else {
            (session.new_ino(), load::UNKNOWN)
        };
        folder.set_dir(Sub::Own, Some(Dir::new(ino, attrs)));
        tree.folders.insert(found.id, folder);
    }
    for found in head.folders.iter().filter(|f| f.id != FolderId::ROOT) {
        hang(cell, tree, found.id, found.parent, &found.name);
    }
    Ok(())
}

/// Puts a folder's name into its parent.
pub(super) fn hang(cell: &UserCell, tree: &mut Tree, id: FolderId, parent: Place, name: &[u8]) {
    let ino = cell.session.new_ino();
    let Some(above) = tree.folders.get_mut(&parent.folder) else { return };
    if above.dir(parent.sub).is_none() {
        above.set_dir(parent.sub, Some(Dir::new(ino, load::UNKNOWN)));
        if let Some(own) = above.dir_mut(Sub::Own) {
            own.entries.insert(parent.sub.as_str().as_bytes().into(), Target::Sub(parent.sub));
        }
    }
    if let Some(dir) = above.dir_mut(parent.sub) {
        dir.entries.remove(name);
        dir.entries.insert(name.into(), Target::Folder(id));
    }
}

impl User {
    /// Takes a change from the journal. Only folders are put into the tree; lines wait until
    /// their folder is loaded.
    pub(super) fn replay(&mut self, change: &Change, fresh: bool, named: &mut HashSet<ObjectId>) {
        let cell = self.cell();
        match change {
            Change::Folder { id, parent, name } => {
                if let Some(old) = self.tree.folders.get(id) {
                    let (old_parent, old_name) = (old.parent, old.name.clone());
                    if let Some(dir) = self.tree.dir_mut(old_parent)
                        && dir.entries.get(&old_name).is_some_and(|(_, t)| t == Target::Folder(*id))
                    {
                        dir.entries.remove(&old_name);
                    }
                } else {
                    let mut folder = Folder::new(*id, *parent, name);
                    let ino = self.session.new_ino();
                    folder.set_dir(Sub::Own, Some(Dir::new(ino, load::UNKNOWN)));
                    self.tree.folders.insert(*id, folder);
                }
                if let Some(folder) = self.tree.folders.get_mut(id) {
                    folder.parent = *parent;
                    folder.name = name.as_slice().into();
                }
                hang(&cell, &mut self.tree, *id, *parent, name);
            }
            Change::NoFolder { id } => {
                if let Some(folder) = self.tree.folders.remove(id)
                    && let Some(dir) = self.tree.dir_mut(folder.parent)
                    && dir.entries.get(&folder.name).is_some_and(|(_, t)| t == Target::Folder(*id))
                {
                    dir.entries.remove(&folder.name);
                }
            }
            Change::Line { folder, line } => {
                if let Line::Set { entry, .. } = line {
                    match entry {
                        Entry::Mail { object, .. } => _ = named.insert(object.id()),
                        Entry::Extents { extents, .. } => {
                            named.extend(extents.iter().map(|e| e.object.id()));
                        }
                        Entry::Local { .. } | Entry::Symlink { .. } => {}
                    }
                }
                if let Some(folder) = self.tree.folders.get_mut(folder) {
                    folder.pending.push(line.clone());
                }
            }
            Change::Names { object, count } => {
                if *count > 1 {
                    self.tree.links.insert(*object, *count);
                } else {
                    self.tree.links.remove(object);
                }
            }
            Change::Drop { object } | Change::Again { object } => {
                named.insert(object.id());
            }
            Change::User { owner, mode } => {
                self.owner = *owner;
                if let Some(dir) = self.tree.dir_mut(Place::ROOT) {
                    dir.mode = *mode;
                }
            }
            Change::Disk(_) => {}
        }
        if fresh {
            self.mark(change);
        }
    }

    /// The last record's work on the disk may not have been done.
    pub(super) fn redo(&self, changes: &[Change]) {
        for change in changes {
            let Change::Disk(op) = change else { continue };
            let due = match op {
                // Making a file anew would empty it; it is missing only if it was never made.
                DiskOp::Create { at, name } => {
                    !self.session.disk().exists(&self.file_path(*at, name)).unwrap_or(true)
                }
                DiskOp::Link { to, new_name, .. } => {
                    !self.session.disk().exists(&self.file_path(*to, new_name)).unwrap_or(true)
                }
                DiskOp::Rename { from, name, .. } => {
                    self.session.disk().exists(&self.file_path(*from, name)).unwrap_or(false)
                }
                DiskOp::Unlink { .. } => true,
                // Whether it was done cannot be seen; mail servers do not exchange files.
                DiskOp::Exchange { .. } => false,
            };
            if due && let Err(error) = self.run(op) {
                tracing::error!(user = %self.name, %error, "the last change cannot be finished");
            }
        }
    }
}
