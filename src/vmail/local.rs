//! What a user leaves on the local disk: the head it goes with, the journal, and snapshots of
//! listings. Directory `<state>/users/<hh>/<user>/`:
//!
//! | file | content |
//! |---|---|
//! | `head` | one line of JSON (`flushed_seq`, `boot`, `clean`), then the head as in the store |
//! | `head.next` | the same, written before a head is swapped: after a crash the store tells which of the two holds |
//! | `journal` | the records since the last checkpoint |
//! | `listing/<folder id>` | a folder's whole listing at some checkpoint, checksum in front |
//! | `restoring.<folder id>` | empty: the folder's index files are being brought back from the last flush |
//! | `links` | objects with more than one name at that checkpoint |
//!
//! A checkpoint writes snapshots first and then a new journal, which begins with one record
//! that states everything not yet flushed. Lines say what is, so older lines over a newer
//! snapshot end in the same state.
//!
//! That holds for a journal that is there to its end. After a power cut it may end before the state
//! that a snapshot or the table of links shows (both are synced, the journal behind them need not
//! be): then neither is used, and both are read from the head's parts (`super::restore`). Index
//! files are not synced at all when a user is handed over, so that is asked of each start of the
//! machine, also after a clean end.

use super::aside::move_tree;
use super::error::{Error, Result, pass};
use super::journal::{Journal, SyncPoint};
use super::snapshot::seal_snapshot;
use super::tree::Target;
use super::user::User;
use crate::cache::disk::Disk;
use crate::failpoint;
use crate::format::head::{HEAD_LIMIT, Head};
use crate::format::journal::{Change, JournalEnd, JournalReader, Record};
use crate::format::listing::{Line, encode_listing};
use crate::format::{FolderId, FormatError, ObjectId, Sub};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::path::Path;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stamp {
    #[serde(rename = "vmailfs-state")]
    pub version: u32,
    /// The journal up to here is in this head.
    pub flushed_seq: u64,
    /// The boot of the machine during which this was written.
    pub boot: String,
    /// Nothing was left to do when this was written.
    pub clean: bool,
    /// A recovery from a loss was begun and is not finished: it is due again.
    #[serde(default)]
    pub recovering: bool,
}

/// What was found of a user on the local disk.
#[derive(Debug)]
pub struct LocalState {
    pub stamp: Stamp,
    pub head: Head,
    /// A swap that may or may not have happened.
    pub next: Option<(Stamp, Head)>,
    /// `head` is of a swap that happened, and the file of that name does not have it.
    pub head_is_newer: bool,
    pub records: Vec<Record>,
    /// End of the last whole record.
    pub journal_len: u64,
    pub last_seq: u64,
    pub snapshots: HashSet<FolderId>,
    /// Folders whose index files were being brought back (see [`super::later`]).
    pub restoring: HashSet<FolderId>,
    /// The table of links at the last checkpoint, if there was one.
    pub links: Option<HashMap<ObjectId, u32>>,
}

const WHAT: &str = "local state";

/// How the names of files begin that tell which folders are being brought back.
pub(super) const RESTORING: &str = "restoring.";

fn disk_error(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |e| Error::disk(path.display().to_string(), &e)
}

pub fn encode_stamped(stamp: &Stamp, head: &Head) -> Result<Vec<u8>> {
    let mut out = serde_json::to_vec(stamp).map_err(|e| Error::Internal(format!("state: {e}")))?;
    out.push(b'\n');
    out.extend_from_slice(&head.encode());
    Ok(out)
}

fn decode_stamped(bytes: &[u8]) -> std::result::Result<(Stamp, Head), FormatError> {
    let bad = |d: String| FormatError::Malformed { what: WHAT, detail: d };
    let cut = bytes.iter().position(|b| *b == b'\n').ok_or_else(|| bad("no first line".into()))?;
    let stamp: Stamp = serde_json::from_slice(&bytes[..cut]).map_err(|e| bad(e.to_string()))?;
    if stamp.version > 1 {
        return Err(FormatError::TooNew { what: WHAT, found: stamp.version, known: 1 });
    }
    Ok((stamp, Head::decode(&bytes[cut + 1..])?))
}

/// Reads what is there. `None`: nothing, or nothing usable (said in the log, and moved aside by
/// the caller where it holds changes).
///
/// # Errors
/// State of a newer version, and a journal that was damaged while the machine ran (`boot` is
/// still the boot it was written in): it holds what the store does not have, so a person decides.
pub fn read(disk: &dyn Disk, dir: &Path, user: &str, boot: &str) -> Result<Option<LocalState>> {
    let head_path = dir.join("head");
    let Some(bytes) = disk.read(&head_path, HEAD_LIMIT + 4096).map_err(disk_error(&head_path))?
    else {
        return Ok(None);
    };
    let unusable = |what: &str, error: &dyn std::fmt::Display| {
        tracing::error!(user, %error, "{what} on the local disk is not usable");
        Ok(None)
    };
    let (stamp, head) = match decode_stamped(&bytes) {
        Ok(found) => found,
        Err(error @ FormatError::TooNew { .. }) => {
            return Err(Error::corrupt(format!("user {user}: {}", head_path.display()), error));
        }
        Err(error) => return unusable("head", &error),
    };
    let next_path = dir.join("head.next");
    let next = disk.read(&next_path, HEAD_LIMIT + 4096).map_err(disk_error(&next_path))?;
    // Torn while it was written: then the swap was not begun.
    let next = next.and_then(|bytes| decode_stamped(&bytes).ok());
    let journal_path = dir.join("journal");
    let Some(journal) = disk.read(&journal_path, u64::MAX).map_err(disk_error(&journal_path))?
    else {
        return unusable("journal", &"missing");
    };
    let mut records = Vec::new();
    let mut reader = JournalReader::new(&journal);
    let Some(first) = reader.first_seq() else { return unusable("journal", &"no header") };
    let mut last_seq = first - 1;
    let mut journal_len = journal.iter().position(|b| *b == b'\n').map_or(0, |n| n as u64 + 1);
    for item in &mut reader {
        match item {
            Ok((record, end)) => {
                last_seq = record.seq;
                journal_len = end;
                records.push(record);
            }
            Err(JournalEnd::Torn { offset }) => {
                tracing::warn!(user, offset, "the journal ends in an unfinished record");
                break;
            }
            // After a power cut blocks beyond the last sync may be missing before others: what was
            // synced is before them.
            Err(JournalEnd::Corrupt { offset, error }) if stamp.boot != boot => {
                tracing::warn!(user, offset, %error, "the journal ends where the power cut tore it");
                break;
            }
            Err(JournalEnd::Corrupt { offset, error }) => {
                let what = format!(
                    "user {user}: {} is damaged at byte {offset}; to go on from the last flush, \
                     without the changes made since, move the directory {} away",
                    journal_path.display(),
                    dir.display()
                );
                return Err(Error::corrupt(what, error));
            }
        }
    }
    let folders = |dir: &Path, before: &str| -> Result<HashSet<FolderId>> {
        let found = disk.list(dir).map_err(disk_error(dir))?;
        let names = found.iter().filter_map(|entry| entry.name.to_str()?.strip_prefix(before));
        Ok(names.filter_map(|id| id.parse().ok()).collect())
    };
    let snapshots = folders(&dir.join("listing"), "")?;
    let restoring = folders(dir, RESTORING)?;
    let links_path = dir.join("links");
    let links = disk.read(&links_path, u64::MAX).map_err(disk_error(&links_path))?;
    let links = match links.map(|bytes| decode_links(&bytes)).transpose() {
        Ok(links) => links,
        Err(error) => return unusable("link table", &error),
    };
    Ok(Some(LocalState {
        stamp,
        head,
        next,
        head_is_newer: false,
        records,
        journal_len,
        last_seq,
        snapshots,
        restoring,
        links,
    }))
}

fn encode_links(links: &HashMap<ObjectId, u32>) -> Vec<u8> {
    let mut lines: Vec<String> = links.iter().map(|(id, n)| format!("{id}\t{n}\n")).collect();
    lines.sort();
    seal_snapshot(&lines.concat())
}

fn decode_links(bytes: &[u8]) -> std::result::Result<HashMap<ObjectId, u32>, FormatError> {
    let bad = || FormatError::Malformed { what: "link table", detail: "bad line".into() };
    let (sum, text) = bytes.split_at_checked(9).ok_or_else(bad)?;
    if sum != format!("{:08x}\n", crc32c::crc32c(text)).as_bytes() {
        return Err(FormatError::Checksum { what: "link table" });
    }
    let text = std::str::from_utf8(text).map_err(|_| bad())?;
    text.lines()
        .map(|line| {
            let (id, count) = line.split_once('\t').ok_or_else(bad)?;
            Ok((id.parse()?, count.parse().map_err(|_| bad())?))
        })
        .collect()
}

/// Moves what is there out of the way, where a person finds it, or removes it if it holds
/// nothing that is not in the store. The state goes last: while it is there, whoever begins again
/// knows that the rest is to be kept.
pub fn put_aside(disk: &dyn Disk, dir: &Path, cache: &Path, keep: Option<&Path>) -> Result<()> {
    match keep {
        Some(lost) => {
            disk.create_dirs(lost).map_err(disk_error(lost))?;
            for (from, name) in [(cache, "metacache"), (dir, "state")] {
                if disk.exists(from).map_err(disk_error(from))? {
                    move_tree(disk, from, &lost.join(name)).map_err(disk_error(from))?;
                }
            }
            Ok(())
        }
        None => {
            disk.remove_tree(dir).map_err(disk_error(dir))?;
            disk.remove_tree(cache).map_err(disk_error(cache))
        }
    }
}

impl User {
    pub fn stamp(&self, flushed_seq: u64, clean: bool) -> Stamp {
        let boot = self.session.settings.boot_id.clone();
        Stamp { version: 1, flushed_seq, boot, clean, recovering: self.recovering }
    }

    /// A folder's whole listing as lines.
    pub fn listing_lines(&self, id: FolderId) -> Vec<Line> {
        let mut lines = Vec::new();
        let Some(folder) = self.tree.folders.get(&id) else { return lines };
        for (sub, dir) in folder.dirs() {
            lines.push(Line::Dir { sub, attrs: dir.attrs() });
        }
        for (sub, dir) in folder.dirs() {
            for (_, name, target) in dir.entries.after(0) {
                if let Target::Node(ix) = target
                    && let Some(entry) = self.tree.nodes.get(ix).and_then(|n| n.entry())
                {
                    lines.push(Line::Set { sub, name: name.to_vec(), entry });
                }
            }
        }
        lines
    }

    /// Everything that the head does not know, as one record's changes.
    fn unflushed_changes(&self) -> Vec<Change> {
        let mut changes = Vec::new();
        let in_head: HashMap<FolderId, _> =
            self.head.folders.iter().map(|f| (f.id, (f.parent, f.name.as_slice()))).collect();
        let mut folders: Vec<_> = self.tree.folders.values().collect();
        folders.sort_by_key(|f| (self.tree.depth(crate::format::Place::own(f.id)), f.id));
        changes.extend(
            self.head
                .folders
                .iter()
                .filter(|f| !self.tree.folders.contains_key(&f.id))
                .map(|f| Change::NoFolder { id: f.id }),
        );
        for folder in folders {
            if folder.id != FolderId::ROOT
                && in_head.get(&folder.id) != Some(&(folder.parent, &*folder.name))
            {
                let (id, parent, name) = (folder.id, folder.parent, folder.name.to_vec());
                changes.push(Change::Folder { id, parent, name });
            }
            if !folder.loaded {
                let lines = folder.pending.iter().cloned();
                changes.extend(lines.map(|line| Change::Line { folder: folder.id, line }));
                continue;
            }
            for sub in Sub::ALL.into_iter().filter(|s| folder.unflushed.dirs.contains(s)) {
                let line = match folder.dir(sub) {
                    Some(dir) => Line::Dir { sub, attrs: dir.attrs() },
                    None => Line::NoDir { sub },
                };
                changes.push(Change::Line { folder: folder.id, line });
            }
            for (sub, name) in &folder.unflushed.names {
                let at = crate::format::Place { folder: folder.id, sub: *sub };
                changes.extend(self.current(at, name));
            }
        }
        for id in &self.links_changed {
            let count = self.tree.links.get(id).copied().unwrap_or(1);
            changes.push(Change::Names { object: *id, count });
        }
        changes.extend(self.dropped.iter().map(|o| Change::Drop { object: o.clone() }));
        changes.extend(self.again.iter().map(|o| Change::Again { object: o.clone() }));
        if self.owner != self.head.root_owner {
            changes.push(Change::User { owner: self.owner, mode: self.root_mode() });
        }
        changes
    }

    /// Writes snapshots of what is loaded and starts a new journal.
    pub fn checkpoint(&mut self) -> Result<()> {
        let session = self.session.clone();
        let disk = session.disk();
        let listing = self.state_dir.join("listing");
        disk.create_dirs(&listing).map_err(disk_error(&listing))?;
        let stale: Vec<FolderId> = self
            .tree
            .folders
            .values()
            // Of evicted files only the parts tell, so the folder is read from them.
            .filter(|f| !self.has_evicted(f.id))
            .filter(|f| f.loaded && f.snapshot_stale)
            .map(|f| f.id)
            .collect();
        pass(failpoint::SNAPSHOT_BEFORE)?;
        for id in &stale {
            let lines = self.listing_lines(*id);
            let bytes = seal_snapshot(&encode_listing(lines.iter()));
            let path = self.snapshot_path(*id);
            disk.replace(&path, &bytes, true).map_err(disk_error(&path))?;
            pass(failpoint::SNAPSHOT_BETWEEN)?;
        }
        let path = self.state_dir.join("links");
        let links = encode_links(&self.tree.links);
        disk.replace(&path, &links, true).map_err(disk_error(&path))?;
        let new = self.state_dir.join("journal.new");
        match disk.remove_file(&new) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(disk_error(&new)(e));
            }
            _ => {}
        }
        let mut journal = Journal::create(disk, &new, self.journal.seq())?;
        let changes = self.unflushed_changes();
        if !changes.is_empty() {
            journal.append(changes)?;
        }
        if let Some(point) = journal.sync_point() {
            point.sync()?;
        }
        let path = self.state_dir.join("journal");
        pass(failpoint::SNAPSHOT_BEFORE_JOURNAL)?;
        disk.rename(&new, &path).map_err(disk_error(&path))?;
        // The next start reads this one, whatever becomes of the sync.
        self.journal = journal;
        if let Err(error) = disk.sync_dir(&self.state_dir) {
            // A power cut may bring the old one back.
            self.journal.doubt();
            return Err(disk_error(&self.state_dir)(error));
        }
        pass(failpoint::SNAPSHOT_AFTER_JOURNAL)?;
        for id in stale {
            self.snapshots.insert(id);
            if let Some(folder) = self.tree.folders.get_mut(&id) {
                folder.snapshot_stale = false;
            }
        }
        self.recount_state();
        Ok(())
    }

    /// A journal whose sync failed is written anew. While a cut is out, what that carries is in no
    /// memory that a new journal is made from: then it stays as it is, and so does the failure.
    pub(super) fn mend_journal(&mut self) -> Result<()> {
        if !self.journal.failed() || self.cut_out.is_some() {
            return Ok(());
        }
        if !self.journal.is_inherited() {
            tracing::error!(user = %self.name, "a sync of the journal failed; it is written anew");
        }
        self.checkpoint()
    }

    /// What to sync so that every change up to now is on the disk.
    pub fn sync_point(&mut self) -> Result<Option<SyncPoint>> {
        self.mend_journal()?;
        Ok(self.journal.sync_point())
    }

    /// Writes everything anew if somebody removed it: what is in memory needs none of it, but a
    /// restart would, and nothing could be flushed. True if it did; then the head is to be saved.
    pub fn remake_state(&mut self) -> Result<bool> {
        let path = self.state_dir.join("journal");
        if self.session.disk().exists(&path).map_err(disk_error(&path))? {
            return Ok(false);
        }
        tracing::error!(
            user = %self.name, dir = %self.state_dir.display(),
            "the local state was removed; it is written anew"
        );
        self.snapshots.clear();
        for folder in self.tree.folders.values_mut() {
            folder.snapshot_stale = true;
        }
        self.checkpoint()?;
        Ok(true)
    }

    /// Permission bits of the user's root directory.
    pub fn root_mode(&self) -> u32 {
        self.tree.dir(crate::format::Place::ROOT).map_or(self.head.root_mode, |d| d.mode)
    }
}
