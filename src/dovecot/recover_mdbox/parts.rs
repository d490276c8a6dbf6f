//! The map and a folder while they are recovered, and the extensions they use.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    super::{
        bytes::u32_at,
        records::header,
        recover::{LogAppend, RecoverError, append_mails},
        replay::{IndexState, ReplayError, replay},
        transaction::{Intro, Transaction},
    },
    MapEntry, MdboxInput,
};

pub(super) const MAP: ExtShape =
    ExtShape { name: "map", hdr_size: 8, record_size: 12, record_align: 4 };
pub(super) const REF: ExtShape =
    ExtShape { name: "ref", hdr_size: 0, record_size: 2, record_align: 2 };
pub(super) const MDBOX: ExtShape =
    ExtShape { name: "mdbox", hdr_size: 0, record_size: 8, record_align: 4 };
pub(super) const GUID: ExtShape =
    ExtShape { name: "guid", hdr_size: 0, record_size: 16, record_align: 1 };
pub(super) const HEADER: &str = "mdbox-hdr";
pub(super) const NO_GUID: [u8; 16] = [0; 16];

#[derive(Debug, Clone, Copy)]
pub(super) struct ExtShape {
    pub(super) name: &'static str,
    pub(super) hdr_size: u32,
    pub(super) record_size: u16,
    pub(super) record_align: u16,
}

impl ExtShape {
    /// The introduction that Dovecot accepts for the extension as the index has it.
    pub(super) fn intro(&self, state: &IndexState) -> Intro<'static> {
        let known = state.extension(self.name);
        Intro {
            name: self.name,
            reset_id: known.map_or(0, |e| e.reset_id),
            hdr_size: known.map_or(0, |e| e.header.len() as u32).max(self.hdr_size),
            record_size: self.record_size,
            record_align: known.map_or(self.record_align, |e| e.record_align),
        }
    }

    pub(super) fn check(&self, state: &IndexState) -> Result<(), RecoverError> {
        match state.extension(self.name) {
            Some(ext) if ext.record_size != self.record_size => Err(RecoverError::NeedsRebuild(
                format!("extension {} has records of {} bytes", self.name, ext.record_size),
            )),
            _ => Ok(()),
        }
    }
}

/// A folder while it is recovered.
pub(super) struct Folder {
    pub(super) state: IndexState,
    pub(super) at_least: u32,
    /// New mails: (UID, map UID, GUID).
    pub(super) new: Vec<(u32, u32, [u8; 16])>,
    /// Entries whose map UID is corrected: (UID, data of `mdbox`).
    pub(super) fixed: Vec<(u32, [u8; 8])>,
}

/// The map while it is recovered.
pub(super) struct Map {
    pub(super) state: IndexState,
    pub(super) next_uid: u32,
    /// By place: (map UID, count in the map).
    pub(super) by_place: HashMap<(u32, u32), (u32, u16)>,
    /// Count by folders.
    pub(super) held: BTreeMap<u32, u32>,
    pub(super) new: Vec<(u32, [u8; 12], u16)>,
    pub(super) counts: Vec<(u32, u16)>,
}

pub(super) fn map_uid_of(state: &IndexState, uid: u32) -> u32 {
    state.ext_of(uid, MDBOX.name).and_then(|data| u32_at(data, 0)).unwrap_or_default()
}

pub(super) fn guid_of(state: &IndexState, uid: u32) -> [u8; 16] {
    state.ext_of(uid, GUID.name).and_then(|data| data.try_into().ok()).unwrap_or(NO_GUID)
}

pub(super) fn needs_rebuild(what: &str, error: &ReplayError) -> RecoverError {
    RecoverError::NeedsRebuild(format!("{what}: {error}"))
}

pub(super) fn open_folders(
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
        let Some(header) = state.extension(HEADER).filter(|_| state.uid_validity != 0) else {
            // Mails of such a folder would go to INBOX; Dovecot's own rebuild knows where to.
            if folder.logs.len() > 1 || folder.snapshot.is_some() {
                return Err(RecoverError::NeedsRebuild(format!(
                    "the index of folder {} was just being made anew",
                    name()
                )));
            }
            // Not set up yet: Dovecot will do it.
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
    pub(super) fn add(&mut self, map_uid: u32, guid: [u8; 16]) -> Result<u32, RecoverError> {
        let first = self.state.next_uid.max(self.at_least);
        let uid = match self.new.last() {
            None => first,
            Some((last, ..)) => last.checked_add(1).ok_or(RecoverError::UidsExhausted)?,
        };
        self.new.push((uid, map_uid, guid));
        Ok(uid)
    }

    pub(super) fn relink(&mut self, uid: u32, map_uid: u32) {
        let mut data = [0; 8];
        if let Some(old) = self.state.ext_of(uid, MDBOX.name).and_then(|d| d.get(..8)) {
            data.copy_from_slice(old);
        }
        data[..4].copy_from_slice(&map_uid.to_le_bytes());
        self.fixed.push((uid, data));
    }

    pub(super) fn finish(
        self,
        map_uid_validity: u32,
        save_date: u32,
    ) -> Result<LogAppend, RecoverError> {
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
    pub(super) fn open(input: &MdboxInput<'_>) -> Result<Map, RecoverError> {
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

    pub(super) fn add(
        &mut self,
        file: u32,
        offset: u32,
        size: u32,
        count: u16,
    ) -> Result<u32, RecoverError> {
        let uid = self.next_uid;
        self.next_uid = uid.checked_add(1).ok_or(RecoverError::UidsExhausted)?;
        let mut data = [0; 12];
        for (place, number) in data.chunks_exact_mut(4).zip([file, offset, size]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        self.new.push((uid, data, count));
        Ok(uid)
    }

    pub(super) fn unreferenced(&self, restored: &HashSet<u32>) -> Vec<MapEntry> {
        let uids = self.state.records.keys();
        uids.filter(|uid| !self.held.contains_key(uid) && !restored.contains(uid))
            .filter_map(|uid| map_entry(&self.state, *uid))
            .filter(|(_, count)| *count > 0)
            .map(|(entry, _)| entry)
            .collect()
    }

    pub(super) fn raise_counts(&mut self) {
        for (uid, held) in &self.held {
            let count = map_entry(&self.state, *uid).map_or(0, |(_, count)| u32::from(count));
            if *held > count {
                self.counts.push((*uid, u16::try_from(*held).unwrap_or(u16::MAX)));
            }
        }
        self.counts.sort_unstable();
    }

    pub(super) fn finish(&self, highest_file: u32) -> Result<LogAppend, RecoverError> {
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
pub(super) fn map_entry(state: &IndexState, uid: u32) -> Option<(MapEntry, u16)> {
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
