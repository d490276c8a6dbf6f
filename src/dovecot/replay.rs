//! The state of an index: a snapshot with the logs that follow it played on top.
//!
//! This is what Dovecot itself does at each open, kept to what a recovery asks: which mails
//! there are, with which flags, keywords and extension data, and where the log ends. Records
//! that Dovecot would skip are skipped; where Dovecot would have to rebuild, this fails.

use std::collections::BTreeMap;

use super::{
    bytes::u32_at,
    index_snapshot::{self, SnapshotError, SnapshotHeader},
    records::{self, LogError, LogHeader, Record, Records, header, kind},
};

/// Dovecot's own limit of an extension's header, and ours for all of them together.
const MAX_EXT_HEADER: u32 = (1 << 20) - 1;
const MAX_EXT_HEADERS: usize = 8 << 20;
const MAX_EXTENSIONS: usize = 512;
const KEYWORDS: &str = "keywords";

/// Why an index has no readable state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    #[error("the index has no log")]
    NoLog,
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("the files are of different indexes ({0:#x} and {1:#x})")]
    IndexId(u32, u32),
    #[error("log {wanted} is missing")]
    LogMissing { wanted: u32 },
    #[error("log {seq} ends at {end}, before {wanted}, where its continuation begins")]
    LogShort { seq: u32, end: usize, wanted: usize },
}

/// An extension of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    pub name: String,
    pub reset_id: u32,
    pub header: Vec<u8>,
    pub record_size: u16,
    pub record_align: u16,
}

/// A mail as its index knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MailRecord {
    /// 1 answered, 2 flagged, 4 deleted, 8 seen, 16 draft, 0x40 and 0x80 Dovecot's own.
    pub flags: u8,
    /// Numbers into [`IndexState::keywords`].
    pub keywords: Vec<u16>,
    /// By number of the extension. Absent: zeros.
    ext: Vec<(u16, Vec<u8>)>,
}

/// The state of an index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexState {
    pub indexid: u32,
    /// The index header's flags.
    pub flags: u32,
    pub uid_validity: u32,
    pub next_uid: u32,
    /// By UID.
    pub records: BTreeMap<u32, MailRecord>,
    pub keywords: Vec<String>,
    /// In the order that numbers them.
    pub extensions: Vec<Extension>,
    /// Position of the newest log: file sequence and end of its whole records.
    pub log_end: (u32, usize),
    /// What lies before it in the newest log has been synced into the mailbox.
    pub log_tail: usize,
}

impl IndexState {
    /// An extension by name.
    pub fn extension(&self, name: &str) -> Option<&Extension> {
        self.extension_number(name).and_then(|n| self.extensions.get(usize::from(n)))
    }

    fn extension_number(&self, name: &str) -> Option<u16> {
        self.extensions.iter().position(|e| e.name == name).map(|n| n as u16)
    }

    /// The extension's data of each mail that has any.
    pub fn ext_data<'a>(&'a self, name: &str) -> impl Iterator<Item = (u32, &'a [u8])> + 'a {
        let number = self.extension_number(name);
        self.records.iter().filter_map(move |(uid, record)| {
            Some((*uid, record.ext(number?).filter(|data| !data.is_empty())?))
        })
    }

    /// The extension's data of one mail.
    pub fn ext_of(&self, uid: u32, name: &str) -> Option<&[u8]> {
        self.records.get(&uid)?.ext(self.extension_number(name)?)
    }

    /// The names of a mail's keywords.
    pub fn keywords_of(&self, uid: u32) -> Vec<&str> {
        let numbers = self.records.get(&uid).map(|r| r.keywords.as_slice()).unwrap_or_default();
        numbers
            .iter()
            .filter_map(|n| self.keywords.get(usize::from(*n)))
            .map(String::as_str)
            .collect()
    }
}

impl MailRecord {
    fn ext(&self, number: u16) -> Option<&[u8]> {
        self.ext.iter().find(|(n, _)| *n == number).map(|(_, data)| data.as_slice())
    }

    fn ext_mut(&mut self, number: u16) -> &mut Vec<u8> {
        if let Some(at) = self.ext.iter().position(|(n, _)| *n == number) {
            return &mut self.ext[at].1;
        }
        self.ext.push((number, Vec::new()));
        let last = self.ext.len() - 1;
        &mut self.ext[last].1
    }
}

/// Plays `logs`, oldest first, on `snapshot`. Without a snapshot the first log must be one that
/// has no predecessor. A torn write at the end of the newest log is left out.
pub fn replay(snapshot: Option<&[u8]>, logs: &[&[u8]]) -> Result<IndexState, ReplayError> {
    let mut headers = Vec::with_capacity(logs.len());
    for log in logs {
        headers.push((LogHeader::parse(log)?, *log));
    }
    let Some((newest, _)) = headers.last().copied() else { return Err(ReplayError::NoLog) };
    let mut state = IndexState { next_uid: 1, indexid: newest.indexid, ..IndexState::default() };
    // Where to go on reading: (file sequence, offset).
    let mut from = (0, 0);
    let mut tail = 0;
    if let Some(index) = snapshot {
        let header = SnapshotHeader::parse(index)?;
        if header.indexid != newest.indexid {
            return Err(ReplayError::IndexId(header.indexid, newest.indexid));
        }
        load(&mut state, index, &header)?;
        from = (header.log_file_seq, header.log_head_offset as usize);
        tail = header.log_tail_offset as usize;
    }
    for (log, bytes) in &headers {
        if log.file_seq < from.0 {
            continue;
        }
        if log.indexid != newest.indexid {
            return Err(ReplayError::IndexId(log.indexid, newest.indexid));
        }
        let mut start = log.hdr_size;
        if log.file_seq == from.0 {
            start = start.max(from.1);
        } else if log.prev_file_seq == 0 {
            // Written by a reset of the index: nothing before it counts.
            state = IndexState { next_uid: 1, indexid: newest.indexid, ..IndexState::default() };
        } else if log.prev_file_seq != from.0 {
            return Err(ReplayError::LogMissing { wanted: log.prev_file_seq });
        } else if from.1 < log.prev_file_offset as usize {
            return Err(ReplayError::LogShort {
                seq: from.0,
                end: from.1,
                wanted: log.prev_file_offset as usize,
            });
        }
        if log.file_seq != from.0 {
            tail = log.hdr_size;
        }
        if start > bytes.len() {
            return Err(ReplayError::LogShort {
                seq: log.file_seq,
                end: bytes.len(),
                wanted: start,
            });
        }
        let mut reader = Records::new(bytes, start);
        let mut player = player::Player::new(&mut state);
        let mut at = start;
        for record in reader.by_ref() {
            player.play(&record);
            tail = next_tail(tail, at, &record);
            at = record.offset + record.size();
        }
        from = (log.file_seq, reader.position());
    }
    if from.0 != newest.file_seq {
        return Err(ReplayError::LogMissing { wanted: from.0 });
    }
    state.log_end = from;
    state.log_tail = tail;
    Ok(state)
}

/// The tail follows external records, and is set by header updates.
fn next_tail(tail: usize, at: usize, record: &Record<'_>) -> usize {
    if !record.external {
        return tail;
    }
    if record.kind == kind::HEADER_UPDATE {
        let wanted = usize::from(header::LOG_TAIL_OFFSET);
        for (offset, data) in records::header_updates(record.body) {
            if let Some(value) = wanted.checked_sub(offset).and_then(|at| u32_at(data, at)) {
                return tail.max(value as usize);
            }
        }
    }
    if tail == at { at + record.size() } else { tail }
}

fn load(state: &mut IndexState, index: &[u8], header: &SnapshotHeader) -> Result<(), ReplayError> {
    state.flags = header.flags;
    state.uid_validity = header.uid_validity;
    state.next_uid = header.next_uid;
    let extensions = index_snapshot::extensions(index, header)?;
    for ext in &extensions {
        state.extensions.push(Extension {
            name: String::from_utf8_lossy(ext.name).into_owned(),
            reset_id: ext.reset_id,
            header: ext.header.to_vec(),
            record_size: ext.record_size,
            record_align: ext.record_align,
        });
    }
    let keywords = extensions.iter().position(|ext| ext.name == KEYWORDS.as_bytes());
    if let Some(at) = keywords {
        state.keywords = keyword_names(extensions[at].header);
    }
    for raw in index_snapshot::records(index, header)? {
        let (Some(uid), Some(flags)) = (u32_at(raw, 0), raw.get(4)) else { continue };
        let mut record = MailRecord { flags: *flags, ..MailRecord::default() };
        for (number, ext) in extensions.iter().enumerate() {
            let data = raw
                .get(ext.record_offset..ext.record_offset + usize::from(ext.record_size))
                .unwrap_or_default();
            if data.iter().all(|b| *b == 0) {
                continue;
            }
            if Some(number) == keywords {
                let bits = (0..data.len() * 8).filter(|bit| data[bit / 8] & 1 << (bit % 8) != 0);
                record.keywords = bits.map(|bit| bit as u16).collect();
            } else {
                record.ext.push((number as u16, data.to_vec()));
            }
        }
        state.records.insert(uid, record);
    }
    Ok(())
}

/// The names in the keywords extension's header: a count, (unused, offset) pairs, names.
fn keyword_names(data: &[u8]) -> Vec<String> {
    let count = u32_at(data, 0).unwrap_or_default() as usize;
    let Some(names) = count.checked_mul(8).and_then(|n| data.get(4 + n..)) else {
        return Vec::new();
    };
    let name = |n: usize| {
        let rest = names.get(u32_at(data, 8 + 8 * n)? as usize..)?;
        let end = rest.iter().position(|b| *b == 0)?;
        Some(String::from_utf8_lossy(&rest[..end]).into_owned())
    };
    (0..count).map_while(name).collect()
}

#[path = "replay/player.rs"]
mod player;

#[cfg(test)]
#[path = "replay/tests.rs"]
mod tests;
