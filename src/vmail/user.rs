//! A user that is open: its tree, its journal, its head, and the rules that tie them together.
//!
//! Everything here runs under the user's lock and never waits for a store. The order of every
//! change is: journal record, disk, memory. So a death in between leaves the record, and the
//! next start finishes what the record says (only the last record of a journal can be
//! unfinished). Should the disk refuse after the record was written, a second record states
//! again what memory still says.

use super::close::Leaving;
use super::error::{Error, Plain, Result};
use super::journal::Journal;
use super::node::{Kind, Local, NodeIx, Since, Tracker};
use super::session::{Session, UserCell};
use super::space::Space;
use super::tree::{NameBytes, Tree};
use crate::cache::disk::{DiskFile, How};
use crate::dovecot::classes::{Class, IndexKind, classify};
use crate::dovecot::index_log::LogTracker;
use crate::dovecot::uidlist::UidTracker;
use crate::format::head::Head;
use crate::format::journal::{Change, DiskOp};
use crate::format::key::KeyTail;
use crate::format::listing::{Line, Owner};
use crate::format::part::Dropped;
use crate::format::{Epoch, FolderId, ObjectId, Place, Sub, Timestamp};
use crate::sabotage::{self, Bug};
use crate::store::ETag;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What waits to be flushed, and since when (time of [`super::env::Clock::boot`]).
#[derive(Debug, Clone, Default)]
pub struct Changes {
    pub important: Option<Duration>,
    pub unimportant: Option<Duration>,
    /// First and latest change that wants a flush as soon as things are quiet.
    pub urgent: Option<(Duration, Duration)>,
    /// Mails newer than the last flush, and since when there is one.
    pub new_mails: u32,
    pub new_since: Option<Duration>,
}

/// What a cut took along: at risk until its flush is answered.
#[derive(Debug, Clone)]
pub struct UnderWay {
    pub changes: Changes,
    /// The cut has something that no head names, besides caches.
    pub unflushed: bool,
    /// Bytes of index files, caches left out.
    pub bytes: u64,
    /// How many things changed.
    pub number: u64,
}

impl UnderWay {
    /// Since when an important change has been under way.
    pub fn important(&self) -> Option<Duration> {
        self.changes.important.filter(|_| self.unflushed)
    }
}

#[derive(Debug)]
pub struct User {
    pub name: Arc<str>,
    pub session: Arc<Session>,
    pub tree: Tree,
    pub journal: Journal,
    pub head: Head,
    pub etag: ETag,
    pub epoch: Epoch,
    pub last_counter: u64,
    /// Ids whose PUT has not been answered, or is answered and not yet journalled.
    pub unanswered: BTreeSet<u64>,
    /// Of these, ids of mails that were promised and will be put (see [`super::promise`]), with
    /// their sizes.
    pub promised: BTreeMap<u64, Arc<super::promise::Held>>,
    /// Whom files belong to that say nothing else.
    pub owner: Owner,
    /// The journal up to here is in the head.
    pub flushed_seq: u64,
    /// Objects that lost their last name since the last flush.
    pub dropped: Vec<KeyTail>,
    /// Objects of large files that lost their last name. Only in memory: what a death forgets of
    /// them is found by the full listing.
    pub dropped_files: Vec<ObjectId>,
    /// Dropped objects that have got a name again since.
    pub again: HashSet<KeyTail>,
    /// What gc deleted and the head's dropped list still has.
    pub deleted: Vec<Dropped>,
    /// What this session's gc has doomed, or is about to: never named again.
    pub doomed: HashSet<ObjectId>,
    /// Up to where the epoch before this one is known by now, if it was not handed over.
    pub closed_end: Option<ObjectId>,
    /// When gc last looked at the user, and before when (by the store's clock) nothing is due.
    pub gc: super::gc::Looked,
    pub links_changed: HashSet<ObjectId>,
    /// Whether the table of links was loaded.
    pub links_known: bool,
    pub folders_changed: bool,
    pub changes: Changes,
    /// Folders that have a listing snapshot on the local disk.
    pub snapshots: HashSet<FolderId>,
    /// Directory of its metacache.
    pub cache_dir: PathBuf,
    /// Directory of its head, journal and listing snapshots.
    pub state_dir: PathBuf,
    /// Another session owns it now: nothing is written any more.
    pub lost: bool,
    /// The machine went down while files were written: what the disk has of them is judged
    /// before it is used.
    pub unclean: bool,
    /// A process of ours died with this user open, on the machine as it runs now.
    pub(super) inherited: bool,
    /// The old name in the last record, if that is a rename. See [`User::run_unrecorded`].
    pub renamed_from: Option<(Place, Vec<u8>)>,
    /// A cut is taken and neither settled nor undone.
    pub cut_out: Option<UnderWay>,
    /// How far it is on its way out.
    pub leaving: Leaving,
    /// The write id of a head without an owner that was sent, while its answer is missing.
    pub handed_over: Option<String>,
    /// Nothing of an earlier session is looked for any more: calls may be served.
    pub ready: bool,
    /// When something was last done with it.
    pub used: Duration,
    /// Folders whose index does not say yet what is there; see [`super::later`].
    pub restored: Vec<FolderId>,
    /// Folders whose index files are those of the last flush, or about to be, and do not say yet
    /// what came later.
    pub(super) restoring: HashSet<FolderId>,
    /// Of these, those of which some files are of that flush and others not yet.
    pub(super) half_restored: HashSet<FolderId>,
    /// Processes that used it lately, and what they are.
    pub users_of: super::services::Services,
    pub cell: Weak<UserCell>,
    /// The counter from which Dovecot takes UIDVALIDITYs, where it was seen.
    pub uidvalidity: Option<u32>,
    pub space: Space,
    /// What the head allows it to reach.
    pub uidvalidity_ceiling: Option<u32>,
    /// Raise the counter to this where it is found.
    pub uidvalidity_burnt: Option<u32>,
    /// When caches were last sent because nobody used them.
    pub idle_flush: Option<Duration>,
    /// What a lost session left is being brought back.
    pub recovering: bool,
    /// The directory of its promises is there, and its name on the disk.
    pub pending_made: bool,
    /// Some ceiling is nearer than half of its room.
    pub ceiling_wanted: bool,
    /// While a loss is recovered from: what takes the temporary name from an object, to go on
    /// record with its new one.
    pub old_names: HashMap<ObjectId, Change>,
}

/// The old name in a record, if that is a rename.
pub(super) fn renamed_from(changes: &[Change]) -> Option<(Place, Vec<u8>)> {
    changes.iter().find_map(|change| match change {
        Change::Disk(DiskOp::Rename { from, name, .. }) => Some((*from, name.clone())),
        _ => None,
    })
}

impl User {
    pub fn cell(&self) -> Arc<UserCell> {
        // The cell holds this user, so it is there while anybody can call this; the session
        // keeps every cell.
        self.cell.upgrade().unwrap_or_else(|| self.session.user(&self.name, &[]))
    }

    pub fn now(&self) -> Timestamp {
        self.session.env.clock.wall()
    }

    pub fn boot(&self) -> Duration {
        self.session.env.clock.boot()
    }

    /// The next object id; it counts as unanswered until [`User::answered`].
    pub fn new_id(&mut self) -> ObjectId {
        self.last_counter += 1;
        self.unanswered.insert(self.last_counter);
        ObjectId { epoch: self.epoch, counter: self.last_counter }
    }

    /// The id is named, or on the dropped list, or was never put.
    pub fn answered(&mut self, id: ObjectId) {
        if id.epoch == self.epoch {
            self.unanswered.remove(&id.counter);
        }
    }

    /// The largest id up to which all are settled.
    pub fn watermark(&self) -> ObjectId {
        let counter = match self.unanswered.first() {
            Some(first) if !sabotage::is(Bug::WatermarkAbovePut) => first - 1,
            _ => self.last_counter,
        };
        ObjectId { epoch: self.epoch, counter }
    }

    pub fn class_of(&self, at: Place, name: &[u8]) -> Class {
        let path = self.tree.path(at);
        let mut parts: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
        parts.push(name);
        match classify(&parts) {
            // A storage file of mdbox is made under a temporary name.
            Class::MailTemp if path.last().is_some_and(|d| &**d == b"storage") => Class::Growing,
            class => class,
        }
    }

    /// Where a directory's files lie in the metacache.
    pub fn cache_path(&self, at: Place) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        let mut path = self.cache_dir.clone();
        for name in self.tree.path(at) {
            path.push(std::ffi::OsStr::from_bytes(&name));
        }
        path
    }

    pub fn file_path(&self, at: Place, name: &[u8]) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        self.cache_path(at).join(std::ffi::OsStr::from_bytes(name))
    }

    /// Nothing may be changed any more once another session owns the user, or the lease is over;
    /// nor while the user is handed over.
    pub fn may_write(&self) -> Result<()> {
        match self.leaving {
            Leaving::Draining | Leaving::Sealed if !self.lost => {
                Err(Error::HandingOver { user: self.name.to_string() })
            }
            _ => self.owns(),
        }
    }

    /// Whether nobody else can own the user now.
    pub(super) fn owns(&self) -> Result<()> {
        let user = || self.name.to_string();
        if self.lost {
            return Err(Error::Lost { user: user() });
        }
        self.session.lease.check_name(&self.session.settings.backend)?;
        match self.session.lease.holds() {
            true => Ok(()),
            false => Err(Error::Lapsed { user: user() }),
        }
    }

    /// Locks and temporary files can be changed without owning the user: reading makes some.
    pub fn may_change(&self, class: Class) -> Result<()> {
        if class.is_local_only() { Ok(()) } else { self.may_write() }
    }

    // ---- records

    /// Writes one record, marks what it changes as not flushed, and does its disk operation.
    pub fn commit(&mut self, mut changes: Vec<Change>) -> Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        self.may_finish()?;
        self.check_doomed(&changes)?;
        self.mend_journal()?;
        let ops: Vec<DiskOp> = changes
            .iter()
            .filter_map(|c| if let Change::Disk(op) = c { Some(op.clone()) } else { None })
            .collect();
        changes.shrink_to_fit();
        let before = self.journal.size();
        let record = self.journal.append(changes)?;
        self.journal_grew();
        self.renamed_from = renamed_from(&record.changes);
        for (n, op) in ops.iter().enumerate() {
            if let Err(error) = self.run(op) {
                let undo = self.restate(op);
                // On a full disk there may be no room to say so; taking the record back needs none.
                let corrected = self.journal.append(undo).map(drop);
                let corrected = match corrected {
                    Err(_) if n == 0 => self.journal.take_back(before),
                    done => done,
                };
                if let Err(second) = corrected {
                    tracing::error!(user = %self.name, error = %second, "journal cannot be corrected");
                }
                return Err(Error::disk(format!("metacache of {}", self.name), &error));
            }
        }
        for change in &record.changes {
            self.mark(change);
        }
        Ok(())
    }

    /// Notes that a change is not in the head yet.
    pub fn mark(&mut self, change: &Change) {
        match change {
            Change::Folder { .. } | Change::NoFolder { .. } | Change::User { .. } => {
                self.folders_changed = true;
            }
            Change::Line { folder, line } => {
                let Some(folder) = self.tree.folders.get_mut(folder) else { return };
                folder.snapshot_stale = true;
                match line {
                    Line::Dir { sub, .. } | Line::NoDir { sub } => {
                        folder.unflushed.dirs.insert(*sub);
                    }
                    Line::Set { sub, name, .. } | Line::Unset { sub, name } => {
                        let name = (*sub, Arc::from(name.as_slice()));
                        folder.unnoted.remove(&name);
                        folder.unflushed.names.insert(name);
                    }
                }
            }
            Change::Names { object, .. } => {
                self.links_changed.insert(*object);
            }
            Change::Drop { object } => self.mark_dropped(object, true),
            Change::Again { object } => self.mark_dropped(object, false),
            Change::Disk(_) => {}
        }
    }

    /// Does the disk operation of a file that no listing has. Where that makes a file under the
    /// old name of the last record's rename, it needs a record all the same: the next start
    /// would find the name on the disk, and take the rename for one that was not done.
    pub fn run_unrecorded(&mut self, op: DiskOp) -> Result<()> {
        let made = match &op {
            DiskOp::Create { at, name } => Some((*at, name)),
            DiskOp::Rename { to, new_name, .. }
            | DiskOp::Link { to, new_name, .. }
            | DiskOp::Exchange { to, new_name, .. } => Some((*to, new_name)),
            DiskOp::Unlink { .. } => None,
        };
        let again = |(at, name): (Place, &Vec<u8>)| {
            self.renamed_from.as_ref().is_some_and(|(a, n)| *a == at && n == name)
        };
        if made.is_some_and(again) && self.may_finish().is_ok() {
            return self.commit(vec![Change::Disk(op)]);
        }
        self.run(&op).map_err(|e| Error::disk("metacache", &e))
    }

    /// Does a disk operation; doing it again after it was done is harmless.
    pub fn run(&self, op: &DiskOp) -> io::Result<()> {
        let disk = &*self.session.env.disk;
        let make_parent = |path: &PathBuf| path.parent().map_or(Ok(()), |p| self.make_cache_dir(p));
        match op {
            DiskOp::Create { at, name } => {
                let path = self.file_path(*at, name);
                match disk.open(&path, How::Create) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        make_parent(&path)?;
                        disk.open(&path, How::Create)?.set_len(0)
                    }
                    Ok(file) => file.set_len(0),
                    Err(e) => Err(e),
                }
            }
            DiskOp::Unlink { at, name } => match disk.remove_file(&self.file_path(*at, name)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            },
            DiskOp::Rename { from, name, to, new_name } => {
                let (from, to) = (self.file_path(*from, name), self.file_path(*to, new_name));
                if disk.is_dir(&from)? {
                    self.drop_cache_dir(&to)?;
                }
                match disk.rename(&from, &to) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        // A folder without files has no directory in the cache.
                        if !disk.exists(&from)? {
                            return Ok(());
                        }
                        make_parent(&to)?;
                        disk.rename(&from, &to)
                    }
                    other => other,
                }
            }
            DiskOp::Exchange { from, name, to, new_name } => {
                disk.exchange(&self.file_path(*from, name), &self.file_path(*to, new_name))
            }
            DiskOp::Link { from, name, to, new_name } => {
                let (from, to) = (self.file_path(*from, name), self.file_path(*to, new_name));
                match disk.hard_link(&from, &to) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        // A leftover of a crash: the listing says that the name is free.
                        disk.remove_file(&to)?;
                        disk.hard_link(&from, &to)
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotFound && disk.exists(&from)? => {
                        make_parent(&to)?;
                        disk.hard_link(&from, &to)
                    }
                    other => other,
                }
            }
        }
    }

    /// What memory says of the names of a disk operation.
    fn restate(&self, op: &DiskOp) -> Vec<Change> {
        let names: Vec<(Place, &Vec<u8>)> = match op {
            DiskOp::Create { at, name } | DiskOp::Unlink { at, name } => vec![(*at, name)],
            DiskOp::Rename { from, name, to, new_name }
            | DiskOp::Exchange { from, name, to, new_name }
            | DiskOp::Link { from, name, to, new_name } => vec![(*from, name), (*to, new_name)],
        };
        names.into_iter().filter_map(|(at, name)| self.current(at, name)).collect()
    }

    /// The present meaning of a name as a change.
    pub fn current(&self, at: Place, name: &[u8]) -> Option<Change> {
        use super::tree::Target;
        let line = match self.tree.dir(at)?.entries.get(name) {
            Some((_, Target::Folder(id))) => {
                return Some(Change::Folder { id, parent: at, name: name.to_vec() });
            }
            Some((_, Target::Sub(_))) => return None,
            Some((_, Target::Node(ix))) => match self.tree.nodes.get(ix)?.entry() {
                Some(entry) => Line::Set { sub: at.sub, name: name.to_vec(), entry },
                None => Line::Unset { sub: at.sub, name: name.to_vec() },
            },
            None => Line::Unset { sub: at.sub, name: name.to_vec() },
        };
        Some(Change::Line { folder: at.folder, line })
    }

    /// The record's line for a directory that changes now.
    pub fn touch_line(&self, at: Place, now: Timestamp) -> Option<Change> {
        let dir = self.tree.dir(at)?;
        let mut attrs = dir.attrs();
        attrs.mtime = attrs.mtime.next().max(now);
        Some(Change::Line { folder: at.folder, line: Line::Dir { sub: at.sub, attrs } })
    }

    /// A node's lines under all its names in loaded folders.
    pub fn node_lines(&self, ix: NodeIx) -> Vec<Change> {
        let Some(node) = self.tree.nodes.get(ix) else { return Vec::new() };
        let Some(entry) = node.entry() else { return Vec::new() };
        let mut lines = Vec::new();
        for name in node.names.all() {
            if let Some(bytes) = self.tree.name_bytes(*name) {
                let line =
                    Line::Set { sub: name.at.sub, name: bytes.to_vec(), entry: entry.clone() };
                lines.push(Change::Line { folder: name.at.folder, line });
            }
        }
        lines
    }

    /// A local file was written: its line at the next flush is another one. No record: its
    /// size and time are on the disk.
    pub fn mark_local(&mut self, ix: NodeIx) {
        let Some(node) = self.tree.nodes.get(ix) else { return };
        if node.class.is_local_only() {
            return;
        }
        let marks: Vec<(FolderId, Sub, NameBytes)> = node
            .names
            .all()
            .iter()
            .filter_map(|n| Some((n.at.folder, n.at.sub, self.tree.name_bytes(*n)?.clone())))
            .collect();
        for (id, sub, name) in marks {
            if let Some(folder) = self.tree.folders.get_mut(&id) {
                folder.snapshot_stale = true;
                folder.unflushed.names.insert((sub, name));
            }
        }
    }

    // ---- importance

    pub fn important(&mut self) {
        let now = self.boot();
        self.changes.important.get_or_insert(now);
    }

    pub fn unimportant(&mut self) {
        let now = self.boot();
        self.changes.unimportant.get_or_insert(now);
    }

    /// Wants a flush once things are quiet.
    pub fn urgent(&mut self) {
        let now = self.boot();
        let first = self.changes.urgent.map_or(now, |(first, _)| first);
        self.changes.urgent = Some((first, now));
        self.important();
        self.session.wake_scheduler();
    }

    // ---- local files

    /// The open file of a local node.
    pub fn local_file(&mut self, ix: NodeIx) -> Result<Arc<dyn DiskFile>> {
        let node = self.tree.nodes.get(ix).ok_or(Plain::BadHandle)?;
        let Kind::Local(local) = &node.kind else {
            return Err(Error::Internal("not a local file".into()));
        };
        if let Some(file) = &local.file {
            return Ok(file.clone());
        }
        let name = node.names.first().ok_or(Plain::NotFound)?;
        let bytes = self.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
        let path = self.file_path(name.at, &bytes);
        if local.evicted {
            let what = path.display().to_string();
            return Err(Error::Vanished { folder: name.at.folder, what });
        }
        let file = match self.session.env.disk.open(&path, How::ReadWrite) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let what = path.display().to_string();
                return Err(Error::Vanished { folder: name.at.folder, what });
            }
            Err(e) => return Err(Error::disk(path.display().to_string(), &e)),
        };
        Ok(file)
    }

    /// A tracker for a file of this class, fed with its content.
    pub fn track(&self, class: Class, content: &[u8]) -> Tracker {
        match class {
            Class::Index(IndexKind::UidList) => {
                let mut tracker = UidTracker::default();
                tracker.reset(content);
                Tracker::UidList(Box::new(tracker))
            }
            Class::Index(IndexKind::Log) => Tracker::Log(Box::new(LogTracker::of(content, None))),
            _ => Tracker::None,
        }
    }

    /// Whether files of this class are followed for UIDs.
    pub fn tracked(class: Class) -> bool {
        matches!(class, Class::Index(IndexKind::UidList | IndexKind::Log))
    }

    /// next-UID as a local file's tracker knows it.
    pub fn tracker_next_uid(tracker: &Tracker) -> Option<u32> {
        match tracker {
            Tracker::None => None,
            Tracker::UidList(t) => t.next_uid(),
            Tracker::Log(t) => Some(t.next_uid()),
        }
    }

    /// A fresh local node's state.
    pub fn new_local() -> Local {
        Local { since: Since::everything(), ..Local::default() }
    }

    /// Everything that is not in the head.
    /// How many things changed since the last flush.
    pub fn number_of_changes(&self) -> u64 {
        let of = |f: &super::tree::Folder| f.unflushed.names.len() + f.unflushed.dirs.len();
        let number: usize = self.tree.folders.values().map(of).sum();
        let rest = self.dropped.len() + self.again.len() + self.links_changed.len();
        (number + rest) as u64 + u64::from(self.folders_changed)
    }

    pub fn has_unflushed(&self) -> bool {
        self.folders_changed
            || !self.dropped.is_empty()
            || !self.again.is_empty()
            || !self.links_changed.is_empty()
            || self.tree.folders.values().any(|f| !f.unflushed.is_empty())
    }
}
