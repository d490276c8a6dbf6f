//! Following a `dovecot.index.log` while it is written.
//!
//! [`LogTracker`] is fed every write and knows at any time where the whole records end, what
//! next-UID is at least, and whether what was written matters to a user. It keeps at most one
//! unfinished record. It looks at a record as soon as the record is whole, also within a
//! transaction that is not: next-UID is then early, never late, and that is the safe side (I2).
//! Where the log may be cut, [`LogTracker::whole_len`] honours transactions.

use super::{
    bytes::u32_at,
    index_snapshot::SnapshotHeader,
    keywords,
    records::{self, LogError, LogHeader, Next, Record, header, kind, record_at},
};

/// A record longer than this is not followed any more: Dovecot writes none near it.
const MAX_PENDING: usize = 64 << 20;

/// What a write held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// A change that a user would miss (see [`important`]).
    pub important: bool,
    /// At least one new mail.
    pub appended: bool,
}

/// Follows one log file.
#[derive(Debug, Clone, Default)]
pub struct LogTracker {
    header: Option<LogHeader>,
    /// Bytes from `at` on that do not make a whole record yet.
    pending: Vec<u8>,
    /// Where `pending` begins in the file.
    at: u64,
    /// Start and end of the transaction that `at` lies in.
    open: Option<(u64, u64)>,
    uid_validity: Option<u32>,
    next_uid: u32,
    lost: bool,
}

impl LogTracker {
    /// Of a file that is empty so far.
    pub fn new() -> LogTracker {
        LogTracker { next_uid: 1, ..LogTracker::default() }
    }

    /// Of a file with this content; `snapshot` is the `dovecot.index` beside it, if any.
    pub fn of(log: &[u8], snapshot: Option<&SnapshotHeader>) -> LogTracker {
        let mut tracker = LogTracker::new();
        if let Some(snapshot) = snapshot {
            tracker.next_uid = snapshot.next_uid.max(1);
            tracker.uid_validity = Some(snapshot.uid_validity).filter(|v| *v != 0);
        }
        tracker.feed(0, log);
        tracker
    }

    /// Another file took the place of this one (a rotation, a rename over it). What is known of
    /// the mailbox stays known.
    pub fn reset(&mut self, log: &[u8]) -> Seen {
        *self = LogTracker {
            next_uid: self.next_uid.max(1),
            uid_validity: self.uid_validity,
            ..LogTracker::default()
        };
        self.feed(0, log)
    }

    /// A write of `bytes` at `offset`. Writes before the end of what was fed (Dovecot marks a
    /// log as corrupted that way) change the header only; a gap, or an overwritten record,
    /// makes the tracker [`lost`](Self::is_lost).
    pub fn feed(&mut self, offset: u64, bytes: &[u8]) -> Seen {
        let end = self.at + self.pending.len() as u64;
        let mut seen = Seen::default();
        if offset > end {
            self.lost = true;
        }
        if self.lost {
            // Nothing is known of what is written now.
            return Seen { important: true, appended: true };
        }
        if offset < end {
            let overlap = (end - offset).min(bytes.len() as u64) as usize;
            match &mut self.header {
                Some(header) if offset + overlap as u64 <= header.hdr_size as u64 => {
                    if offset == 4 && overlap >= 4 {
                        header.indexid = u32_at(bytes, 0).unwrap_or_default();
                    }
                }
                _ => self.lost = true,
            }
            let rest = bytes.get(overlap..).unwrap_or_default();
            return if rest.is_empty() { seen } else { self.feed(end, rest) };
        }
        self.pending.extend_from_slice(bytes);
        if self.header.is_none() {
            match LogHeader::parse(&self.pending) {
                Ok(header) => {
                    self.pending.drain(..header.hdr_size);
                    self.at = header.hdr_size as u64;
                    self.header = Some(header);
                }
                Err(LogError::Short) => return seen,
                Err(_) => {
                    self.lost = true;
                    return seen;
                }
            }
        }
        self.take_records(&mut seen);
        seen
    }

    fn take_records(&mut self, seen: &mut Seen) {
        let pending = std::mem::take(&mut self.pending);
        let mut used = 0;
        while let Next::Record(record) = record_at(&pending, used) {
            let start = self.at + used as u64;
            if self.open.is_some_and(|(_, end)| start >= end) {
                self.open = None;
            }
            match record.boundary() {
                Some(size) => self.open = Some((start, start + size as u64)),
                None => self.learn(&record, seen),
            }
            used += record.size();
        }
        self.at += used as u64;
        self.pending = pending;
        self.pending.drain(..used);
        if self.pending.len() > MAX_PENDING {
            self.lost = true;
            self.pending = Vec::new();
        }
    }

    fn learn(&mut self, record: &Record<'_>, seen: &mut Seen) {
        seen.important |= record_important(record);
        seen.appended |= record.kind == kind::APPEND;
        match record.kind {
            kind::APPEND => {
                for mail in record.body.chunks_exact(8) {
                    let uid = u32_at(mail, 0).unwrap_or_default();
                    self.next_uid = self.next_uid.max(uid.saturating_add(1));
                }
            }
            kind::HEADER_UPDATE => {
                for (offset, data) in records::header_updates(record.body) {
                    let field = |wanted: u16| {
                        usize::from(wanted).checked_sub(offset).and_then(|at| u32_at(data, at))
                    };
                    if let Some(next) = field(header::NEXT_UID) {
                        self.next_uid = self.next_uid.max(next);
                    }
                    if let Some(validity) = field(header::UID_VALIDITY).filter(|v| *v != 0) {
                        self.uid_validity = Some(validity);
                    }
                }
            }
            _ => {}
        }
    }

    /// The log's header, once it was written.
    pub fn header(&self) -> Option<&LogHeader> {
        self.header.as_ref()
    }

    /// UIDVALIDITY, if a record or the snapshot told it.
    pub fn uid_validity(&self) -> Option<u32> {
        self.uid_validity
    }

    /// At least next-UID of the mailbox: 1 when nothing is known.
    pub fn next_uid(&self) -> u32 {
        self.next_uid
    }

    /// Learns from a snapshot written meanwhile.
    pub fn snapshot(&mut self, snapshot: &SnapshotHeader) {
        self.next_uid = self.next_uid.max(snapshot.next_uid);
        if snapshot.uid_validity != 0 {
            self.uid_validity = Some(snapshot.uid_validity);
        }
    }

    /// Length of the file up to which only whole transactions lie: where a cut may end it.
    pub fn whole_len(&self) -> u64 {
        match (self.open, &self.header) {
            (_, None) => 0,
            (Some((start, end)), _) if self.at < end => start,
            _ => self.at,
        }
    }

    /// The writes could not be followed: read the file again ([`LogTracker::of`]). Until then
    /// `next_uid` may be too low.
    pub fn is_lost(&self) -> bool {
        self.lost
    }
}

/// Whether records (whole ones, as a write or the tail of a log holds them) hold a change that
/// a user would miss. Appends are not one (the mail itself is safe, and is found by listing),
/// nor are offsets, caches and counters. What is not known counts as important.
pub fn important(records: &[u8]) -> bool {
    let mut iter = records::Records::new(records, 0);
    iter.by_ref().any(|record| record_important(&record)) || iter.position() < records.len()
}

fn record_important(record: &Record<'_>) -> bool {
    match record.kind {
        kind::APPEND
        | kind::BOUNDARY
        | kind::EXT_INTRO
        | kind::EXT_RESET
        | kind::EXT_HDR_UPDATE
        | kind::EXT_HDR_UPDATE32
        | kind::EXT_REC_UPDATE
        | kind::MODSEQ_UPDATE => false,
        kind::KEYWORD_UPDATE => !records::keyword_update(record.body)
            .is_some_and(|(_, keyword, _)| keywords::is_derived(keyword)),
        kind::HEADER_UPDATE => {
            records::header_updates(record.body).any(|(at, data)| !is_counter(at, data.len()))
        }
        // Flags, expunges, attributes, deletion of the mailbox, and the map's reference counts
        // (a COPY in mdbox is nothing else).
        _ => true,
    }
}

/// Header fields that follow from others or only steer Dovecot's own upkeep.
fn is_counter(at: usize, len: usize) -> bool {
    let within = |from: usize, to: usize| at >= from && at.saturating_add(len) <= to;
    // next-UID to the counts and lowwaters, log positions, time stamps.
    within(28, 84) || within(84, header::BASE_SIZE)
}

#[cfg(test)]
#[path = "index_log/tests.rs"]
mod tests;
