//! Recovering mdbox: mails in `m.N` that neither the map nor any folder knows.
//!
//! A mail of mdbox needs two entries: one in the map (`storage/dovecot.map.index`: where it
//! lies, how many folders hold it) and one in its folder (UID, map UID, GUID). Both come from
//! one cut, so together they are an older state of the whole storage, and what the recovered
//! ranges of `m.N` hold on top of it was written later. For each mail found there:
//!
//! - the map knows its place and a folder holds it: nothing to do;
//! - the map knows its place with a reference count of 0: it was expunged, and stays so (the
//!   count goes down before the folder's expunge is logged, so 0 is certain);
//! - the map counts a reference that no folder holds: a delivery that the cut went through. The
//!   map is written before the folder and the delivery may have been acknowledged since, so the
//!   mail is put into its folder (unless `restore_unreferenced` is off);
//! - the map does not know it, but its GUID is live: the copy that a purge made. It gets a map
//!   entry without references, so that the next purge removes it;
//! - else it is new: a map entry, and an entry in the folder its `B` line names, or INBOX.
//!
//! Counts that are lower than what the folders hold (a COPY that the cut went through) are
//! raised, never lowered: too high costs space, too low loses mail at the next purge.
//!
//! Write the map's bytes first, then the folders'. A crash in between leaves map entries with a
//! count of 1 that no folder holds, which the next recovery puts into their folders as above.
//! The map's tail is set to its end, as Dovecot takes any difference for a crash and rebuilds.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    bytes::u32_at,
    dbox_file::{self, DboxMail},
    records::{Intro, Transaction, header},
    recover::{LogAppend, RecoverError, append_mails},
    replay::{IndexState, ReplayError, replay},
};

const MAP: ExtShape = ExtShape { name: "map", hdr_size: 8, record_size: 12, record_align: 4 };
const REF: ExtShape = ExtShape { name: "ref", hdr_size: 0, record_size: 2, record_align: 2 };
const MDBOX: ExtShape = ExtShape { name: "mdbox", hdr_size: 0, record_size: 8, record_align: 4 };
const GUID: ExtShape = ExtShape { name: "guid", hdr_size: 0, record_size: 16, record_align: 1 };
const HEADER: &str = "mdbox-hdr";
const NO_GUID: [u8; 16] = [0; 16];

/// A folder of the storage.
#[derive(Debug, Clone, Copy)]
pub struct MdboxFolder<'a> {
    /// As `B` lines name it: the path below `mailboxes`, levels separated by `/`.
    pub name: &'a [u8],
    pub snapshot: Option<&'a [u8]>,
    /// Oldest first. Empty: the folder has no index yet, and is not used.
    pub logs: &'a [&'a [u8]],
    /// Its UID ceiling; 0 for none.
    pub at_least: u32,
}

/// A stretch of a file `m.<file>`.
#[derive(Debug, Clone, Copy)]
pub struct MdboxRange<'a> {
    pub file: u32,
    pub offset: u64,
    pub bytes: &'a [u8],
}

/// What a recovery starts from. **All** folders of the storage must be given.
#[derive(Debug, Clone, Copy)]
pub struct MdboxInput<'a> {
    pub map_snapshot: Option<&'a [u8]>,
    /// Oldest first.
    pub map_logs: &'a [&'a [u8]],
    pub folders: &'a [MdboxFolder<'a>],
    /// Later ones win where they overlap.
    pub ranges: &'a [MdboxRange<'a>],
    /// The highest number of any `m.N` that exists.
    pub highest_file: u32,
    /// The save date of recovered mails, seconds since 1970.
    pub save_date: u32,
    /// Put a mail back that the map counts and no folder holds, if its bytes are given.
    pub restore_unreferenced: bool,
}

/// Where a mail lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    pub map_uid: u32,
    pub file: u32,
    pub offset: u32,
    pub size: u32,
}

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MdboxOutput {
    /// For the newest `storage/dovecot.map.index.log`. Write it first.
    pub map: LogAppend,
    /// For each folder given, in that order; `None` for those without an index.
    pub folders: Vec<Option<LogAppend>>,
    /// Mails put into a folder: (number of the folder, UID), in storage order.
    pub placed: Vec<(usize, u32)>,
    /// Of them, those whose own folder is not there, now in INBOX.
    pub redirected: usize,
    /// Copies of live mails, left for the next purge.
    pub copies: usize,
    /// The map counts a reference to them, no folder holds them, and their bytes were not given
    /// (or restoring is off). Given in another run, they are put back.
    pub unreferenced: Vec<MapEntry>,
    /// Entries of folders whose map entry is missing and whose mail was not found.
    pub dangling: usize,
}

#[derive(Debug, Clone, Copy)]
struct ExtShape {
    name: &'static str,
    hdr_size: u32,
    record_size: u16,
    record_align: u16,
}

impl ExtShape {
    /// The introduction that Dovecot accepts for the extension as the index has it.
    fn intro(&self, state: &IndexState) -> Intro<'static> {
        let known = state.extension(self.name);
        Intro {
            name: self.name,
            reset_id: known.map_or(0, |e| e.reset_id),
            hdr_size: known.map_or(0, |e| e.header.len() as u32).max(self.hdr_size),
            record_size: self.record_size,
            record_align: known.map_or(self.record_align, |e| e.record_align),
        }
    }

    fn check(&self, state: &IndexState) -> Result<(), RecoverError> {
        match state.extension(self.name) {
            Some(ext) if ext.record_size != self.record_size => Err(RecoverError::NeedsRebuild(
                format!("extension {} has records of {} bytes", self.name, ext.record_size),
            )),
            _ => Ok(()),
        }
    }
}

/// A folder while it is recovered.
struct Folder {
    state: IndexState,
    at_least: u32,
    /// New mails: (UID, map UID, GUID).
    new: Vec<(u32, u32, [u8; 16])>,
    /// Entries whose map UID is corrected: (UID, data of `mdbox`).
    fixed: Vec<(u32, [u8; 8])>,
}

/// The map while it is recovered.
struct Map {
    state: IndexState,
    next_uid: u32,
    /// By place: (map UID, count in the map).
    by_place: HashMap<(u32, u32), (u32, u16)>,
    /// Count by folders.
    held: BTreeMap<u32, u32>,
    new: Vec<(u32, [u8; 12], u16)>,
    counts: Vec<(u32, u16)>,
}

/// Brings recovered mails into the map and their folders; see the module's text.
///
/// # Errors
/// [`RecoverError::NeedsRebuild`] when only Dovecot's own rebuild can help: the map or a
/// folder's index cannot be read, or they do not belong together. Raise every folder's next-UID
/// and mark every folder ([`super::recover::mark_fsckd`]).
pub fn recover_mdbox(input: &MdboxInput<'_>) -> Result<MdboxOutput, RecoverError> {
    let mut map = Map::open(input)?;
    let mut folders = open_folders(input, map.state.uid_validity)?;

    let mut live = HashSet::new();
    let mut dangling: HashMap<[u8; 16], Vec<(usize, u32)>> = HashMap::new();
    let mut lost = 0;
    for (number, folder) in folders.iter().enumerate() {
        let Some(folder) = folder else { continue };
        for uid in folder.state.records.keys() {
            let map_uid = map_uid_of(&folder.state, *uid);
            let guid = guid_of(&folder.state, *uid);
            if map.state.records.contains_key(&map_uid) {
                *map.held.entry(map_uid).or_default() += 1;
                live.insert(guid);
            } else if guid != NO_GUID {
                dangling.entry(guid).or_default().push((number, *uid));
            } else {
                lost += 1;
            }
        }
    }
    live.remove(&NO_GUID);

    let inbox = input
        .folders
        .iter()
        .zip(&folders)
        .position(|(f, state)| f.name.eq_ignore_ascii_case(b"INBOX") && state.is_some());
    let by_name: HashMap<&[u8], usize> = (input.folders.iter().enumerate())
        .filter(|(n, _)| folders[*n].is_some())
        .map(|(n, f)| (f.name, n))
        .collect();

    let mut out = MdboxOutput {
        map: LogAppend { at: 0, bytes: Vec::new() },
        folders: Vec::new(),
        placed: Vec::new(),
        redirected: 0,
        copies: 0,
        unreferenced: Vec::new(),
        dangling: 0,
    };
    let mut placed: HashSet<([u8; 16], u64)> = HashSet::new();
    let mut restored: HashSet<u32> = HashSet::new();
    for (file, mail) in mails_in(input.ranges) {
        let (Ok(offset), Ok(size)) = (u32::try_from(mail.offset), u32::try_from(mail.size)) else {
            continue;
        };
        let known = map.by_place.get(&(file, offset)).copied();
        let map_uid = match known {
            Some((uid, count)) => {
                let wanted = count > 0 && !map.held.contains_key(&uid) && !restored.contains(&uid);
                if !wanted || !input.restore_unreferenced || live.contains(&mail.guid) {
                    continue;
                }
                restored.insert(uid);
                if count != 1 {
                    map.counts.push((uid, 1));
                }
                uid
            }
            None => {
                if let Some(entries) = dangling.remove(&mail.guid) {
                    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
                    let uid = map.add(file, offset, size, count)?;
                    for (number, entry) in entries {
                        if let Some(folder) = folders[number].as_mut() {
                            folder.relink(entry, uid);
                        }
                    }
                    live.insert(mail.guid);
                    continue;
                }
                if live.contains(&mail.guid) || placed.contains(&(mail.guid, mail.body_size)) {
                    map.add(file, offset, size, 0)?;
                    out.copies += 1;
                    continue;
                }
                map.add(file, offset, size, 1)?
            }
        };
        placed.insert((mail.guid, mail.body_size));
        let own = mail.folder.as_deref().and_then(|name| by_name.get(name)).copied();
        let number = own.or(inbox).ok_or_else(|| {
            RecoverError::NeedsRebuild("a mail's folder is unknown and INBOX has no index".into())
        })?;
        out.redirected += usize::from(own.is_none());
        if let Some(folder) = folders[number].as_mut() {
            let uid = folder.add(map_uid, mail.guid)?;
            out.placed.push((number, uid));
        }
    }
    out.unreferenced = map.unreferenced(&restored);
    out.dangling = lost + dangling.values().map(Vec::len).sum::<usize>();
    map.raise_counts();
    out.map = map.finish(input.highest_file)?;
    for folder in folders {
        out.folders.push(match folder {
            Some(folder) => Some(folder.finish(map.state.uid_validity, input.save_date)?),
            None => None,
        });
    }
    Ok(out)
}

/// The whole mails of the ranges, by file and offset.
fn mails_in(ranges: &[MdboxRange<'_>]) -> Vec<(u32, DboxMail)> {
    let merged = dbox_file::merge_ranges(ranges.iter().map(|r| (r.file, r.offset, r.bytes)));
    let mut mails = Vec::new();
    for ((file, offset), bytes) in &merged {
        mails.extend(dbox_file::scan(*offset, bytes).mails.into_iter().map(|m| (*file, m)));
    }
    mails
}

fn map_uid_of(state: &IndexState, uid: u32) -> u32 {
    state.ext_of(uid, MDBOX.name).and_then(|data| u32_at(data, 0)).unwrap_or_default()
}

fn guid_of(state: &IndexState, uid: u32) -> [u8; 16] {
    state.ext_of(uid, GUID.name).and_then(|data| data.try_into().ok()).unwrap_or(NO_GUID)
}

fn needs_rebuild(what: &str, error: &ReplayError) -> RecoverError {
    RecoverError::NeedsRebuild(format!("{what}: {error}"))
}

fn open_folders(
    input: &MdboxInput<'_>,
    map_uid_validity: u32,
) -> Result<Vec<Option<Folder>>, RecoverError> {
    let mut folders = Vec::with_capacity(input.folders.len());
    for folder in input.folders {
        let name = || String::from_utf8_lossy(folder.name).into_owned();
        if folder.logs.is_empty() {
            folders.push(None);
            continue;
        }
        let state = replay(folder.snapshot, folder.logs)
            .map_err(|error| needs_rebuild(&format!("folder {}", name()), &error))?;
        // Not set up yet: Dovecot will do it.
        let Some(header) = state.extension(HEADER).filter(|_| state.uid_validity != 0) else {
            folders.push(None);
            continue;
        };
        let validity = u32_at(&header.header, 0).unwrap_or_default();
        if validity != map_uid_validity && !state.records.is_empty() {
            return Err(RecoverError::NeedsRebuild(format!(
                "folder {} belongs to another map",
                name()
            )));
        }
        MDBOX.check(&state)?;
        GUID.check(&state)?;
        folders.push(Some(Folder {
            state,
            at_least: folder.at_least,
            new: Vec::new(),
            fixed: Vec::new(),
        }));
    }
    Ok(folders)
}

impl Folder {
    fn add(&mut self, map_uid: u32, guid: [u8; 16]) -> Result<u32, RecoverError> {
        let first = self.state.next_uid.max(self.at_least);
        let uid = match self.new.last() {
            None => first,
            Some((last, ..)) => last.checked_add(1).ok_or(RecoverError::UidsExhausted)?,
        };
        self.new.push((uid, map_uid, guid));
        Ok(uid)
    }

    fn relink(&mut self, uid: u32, map_uid: u32) {
        let mut data = [0; 8];
        if let Some(old) = self.state.ext_of(uid, MDBOX.name).and_then(|d| d.get(..8)) {
            data.copy_from_slice(old);
        }
        data[..4].copy_from_slice(&map_uid.to_le_bytes());
        self.fixed.push((uid, data));
    }

    fn finish(self, map_uid_validity: u32, save_date: u32) -> Result<LogAppend, RecoverError> {
        let mut t = Transaction::new();
        if let Some(ext) = self.state.extension(HEADER).filter(|ext| {
            u32_at(&ext.header, 0).is_some_and(|validity| validity != map_uid_validity)
        }) {
            t.ext_intro(&Intro {
                name: HEADER,
                reset_id: ext.reset_id,
                hdr_size: ext.header.len() as u32,
                record_size: ext.record_size,
                record_align: ext.record_align,
            });
            t.ext_header_update(0, &map_uid_validity.to_le_bytes());
        }
        let uids: Vec<u32> = self.new.iter().map(|(uid, ..)| *uid).collect();
        append_mails(&mut t, &self.state, &uids, self.at_least)?;
        let mut links = self.fixed;
        links.sort_unstable();
        for (uid, map_uid, _) in &self.new {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&map_uid.to_le_bytes());
            data[4..].copy_from_slice(&save_date.to_le_bytes());
            links.push((*uid, data));
        }
        if !links.is_empty() {
            t.ext_intro(&MDBOX.intro(&self.state));
            t.ext_records(links.iter().map(|(uid, data)| (*uid, data.as_slice())));
        }
        if !self.new.is_empty() {
            t.ext_intro(&GUID.intro(&self.state));
            t.ext_records(self.new.iter().map(|(uid, _, guid)| (*uid, guid.as_slice())));
        }
        Ok(LogAppend { at: self.state.log_end.1, bytes: t.finish() })
    }
}

impl Map {
    fn open(input: &MdboxInput<'_>) -> Result<Map, RecoverError> {
        let state = replay(input.map_snapshot, input.map_logs)
            .map_err(|error| needs_rebuild("the map", &error))?;
        if state.uid_validity == 0 {
            return Err(RecoverError::NeedsRebuild("the map has no UIDVALIDITY".into()));
        }
        MAP.check(&state)?;
        REF.check(&state)?;
        let mut by_place = HashMap::new();
        for uid in state.records.keys() {
            if let Some((entry, count)) = map_entry(&state, *uid) {
                by_place.insert((entry.file, entry.offset), (*uid, count));
            }
        }
        Ok(Map {
            next_uid: state.next_uid,
            state,
            by_place,
            held: BTreeMap::new(),
            new: Vec::new(),
            counts: Vec::new(),
        })
    }

    fn add(&mut self, file: u32, offset: u32, size: u32, count: u16) -> Result<u32, RecoverError> {
        let uid = self.next_uid;
        self.next_uid = uid.checked_add(1).ok_or(RecoverError::UidsExhausted)?;
        let mut data = [0; 12];
        for (place, number) in data.chunks_exact_mut(4).zip([file, offset, size]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        self.new.push((uid, data, count));
        Ok(uid)
    }

    fn unreferenced(&self, restored: &HashSet<u32>) -> Vec<MapEntry> {
        let uids = self.state.records.keys();
        uids.filter(|uid| !self.held.contains_key(uid) && !restored.contains(uid))
            .filter_map(|uid| map_entry(&self.state, *uid))
            .filter(|(_, count)| *count > 0)
            .map(|(entry, _)| entry)
            .collect()
    }

    fn raise_counts(&mut self) {
        for (uid, held) in &self.held {
            let count = map_entry(&self.state, *uid).map_or(0, |(_, count)| u32::from(count));
            if *held > count {
                self.counts.push((*uid, u16::try_from(*held).unwrap_or(u16::MAX)));
            }
        }
        self.counts.sort_unstable();
    }

    fn finish(&self, highest_file: u32) -> Result<LogAppend, RecoverError> {
        let mut t = Transaction::new();
        let old = self.state.extension(MAP.name).and_then(|e| u32_at(&e.header, 0)).unwrap_or(0);
        let newest = self.new.iter().filter_map(|(_, data, _)| u32_at(data, 0)).max();
        let highest = highest_file.max(newest.unwrap_or(0));
        if highest > old {
            t.ext_intro(&MAP.intro(&self.state));
            t.ext_header_update(0, &highest.to_le_bytes());
        }
        let uids: Vec<u32> = self.new.iter().map(|(uid, ..)| *uid).collect();
        append_mails(&mut t, &self.state, &uids, 0)?;
        if !self.new.is_empty() {
            t.ext_intro(&MAP.intro(&self.state));
            t.ext_records(self.new.iter().map(|(uid, data, _)| (*uid, data.as_slice())));
        }
        let counts: Vec<(u32, [u8; 2])> = (self.counts.iter().copied())
            .chain(self.new.iter().map(|(uid, _, count)| (*uid, *count)))
            .map(|(uid, count)| (uid, count.to_le_bytes()))
            .collect();
        if !counts.is_empty() {
            t.ext_intro(&REF.intro(&self.state));
            t.ext_records(counts.iter().map(|(uid, count)| (*uid, count.as_slice())));
        }
        let at = self.state.log_end.1;
        if t.is_empty() && self.state.log_tail == at {
            return Ok(LogAppend { at, bytes: Vec::new() });
        }
        let mut bytes = t.finish();
        let mut tail = Transaction::new();
        // The tail's own record, 16 bytes, lies before the tail as well.
        let end = u32::try_from(at + bytes.len() + 16)
            .map_err(|_| RecoverError::NeedsRebuild("the map's log is too long".into()))?;
        tail.header_update(header::LOG_TAIL_OFFSET, end);
        bytes.extend(tail.finish());
        Ok(LogAppend { at, bytes })
    }
}

/// A map record: where the mail lies and how many folders hold it.
fn map_entry(state: &IndexState, uid: u32) -> Option<(MapEntry, u16)> {
    let data = state.ext_of(uid, MAP.name)?;
    let entry = MapEntry {
        map_uid: uid,
        file: u32_at(data, 0).filter(|file| *file != 0)?,
        offset: u32_at(data, 4)?,
        size: u32_at(data, 8)?,
    };
    let count = state.ext_of(uid, REF.name).and_then(|d| d.try_into().ok());
    Some((entry, count.map_or(0, u16::from_le_bytes)))
}

#[cfg(test)]
#[path = "recover_mdbox/tests.rs"]
mod tests;
