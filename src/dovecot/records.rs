//! Reading the records of `dovecot.index.log`, format 1.3.
//!
//! A log is a header and then records, each a packed size, a type and a body. The size is
//! written last, so a record whose size is not complete ends the log. A boundary record spans a
//! transaction: unless all of it is in the file, none of it happened.

use super::bytes::{pad4, u16_at, u32_at};

/// Smallest header Dovecot accepts.
const MIN_HEADER: usize = 24;
/// Size of a record's own header.
pub(super) const RECORD_HEADER: usize = 8;

/// Type bits of records, without flags and without the expunge protection mask.
pub mod kind {
    pub const EXPUNGE: u32 = 0x1;
    pub const APPEND: u32 = 0x2;
    pub const FLAG_UPDATE: u32 = 0x4;
    pub const HEADER_UPDATE: u32 = 0x20;
    pub const EXT_INTRO: u32 = 0x40;
    pub const EXT_RESET: u32 = 0x80;
    pub const EXT_HDR_UPDATE: u32 = 0x100;
    pub const EXT_REC_UPDATE: u32 = 0x200;
    pub const KEYWORD_UPDATE: u32 = 0x400;
    pub const KEYWORD_RESET: u32 = 0x800;
    pub const EXT_ATOMIC_INC: u32 = 0x1000;
    pub const EXPUNGE_GUID: u32 = 0x2000;
    pub const MODSEQ_UPDATE: u32 = 0x8000;
    pub const EXT_HDR_UPDATE32: u32 = 0x10000;
    pub const INDEX_DELETED: u32 = 0x20000;
    pub const INDEX_UNDELETED: u32 = 0x40000;
    pub const BOUNDARY: u32 = 0x80000;
    pub const ATTRIBUTE_UPDATE: u32 = 0x10_0000;
}

const TYPE_MASK: u32 = 0x0fff_ffff;
pub(super) const EXTERNAL: u32 = 0x1000_0000;
/// Present in every valid expunge, so that a damaged log expunges nothing.
pub(super) const EXPUNGE_PROTECTION: u32 = 0xcd90;

/// Offsets in the index header, as header updates name them.
pub mod header {
    pub const FLAGS: u16 = 20;
    pub const UID_VALIDITY: u16 = 24;
    pub const NEXT_UID: u16 = 28;
    pub const LOG_TAIL_OFFSET: u16 = 64;
    /// Size of the base header of format 7.3.
    pub const BASE_SIZE: usize = 120;
    /// Bit of the flags: rebuild at the next sync.
    pub const FLAG_FSCKD: u32 = 0x4;
}

/// The header of a log file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogHeader {
    pub hdr_size: usize,
    /// The same in all files of an index; 0 once Dovecot found the file corrupted.
    pub indexid: u32,
    /// One more at each rotation.
    pub file_seq: u32,
    /// The rotated log before this one; 0 for the first.
    pub prev_file_seq: u32,
    /// Its size.
    pub prev_file_offset: u32,
}

/// Why a log cannot be read at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    #[error("the log is shorter than its header")]
    Short,
    #[error("the log has format version {0}, not 1")]
    Version(u8),
    #[error("the log's header is invalid")]
    Header,
    #[error("the log is marked as corrupted")]
    MarkedCorrupted,
    #[error("the log was written on a machine of another byte order")]
    ByteOrder,
}

impl LogHeader {
    /// Reads the header at the start of a log file.
    pub fn parse(log: &[u8]) -> Result<LogHeader, LogError> {
        if log.len() < MIN_HEADER {
            return Err(LogError::Short);
        }
        if log[0] != 1 {
            return Err(LogError::Version(log[0]));
        }
        let field = |at| u32_at(log, at).ok_or(LogError::Short);
        let hdr_size = usize::from(u16_at(log, 2).ok_or(LogError::Short)?);
        if hdr_size < MIN_HEADER || !hdr_size.is_multiple_of(4) {
            return Err(LogError::Header);
        }
        if log.len() < hdr_size {
            return Err(LogError::Short);
        }
        if log[1] >= 2 && hdr_size > 32 && log[32] & 1 == 0 {
            return Err(LogError::ByteOrder);
        }
        let header = LogHeader {
            hdr_size,
            indexid: field(4)?,
            file_seq: field(8)?,
            prev_file_seq: field(12)?,
            prev_file_offset: field(16)?,
        };
        match header.indexid {
            0 => Err(LogError::MarkedCorrupted),
            _ => Ok(header),
        }
    }
}

/// One record of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Where it starts in the bytes given.
    pub offset: usize,
    /// One of [`kind`], or something newer.
    pub kind: u32,
    /// It describes what has happened, not what is asked for.
    pub external: bool,
    pub body: &'a [u8],
}

impl Record<'_> {
    /// The record's size in the file, header included.
    pub fn size(&self) -> usize {
        RECORD_HEADER + self.body.len()
    }

    /// For a boundary: the size of its transaction, itself included.
    pub fn boundary(&self) -> Option<usize> {
        (self.kind == kind::BOUNDARY).then(|| u32_at(self.body, 0)).flatten().map(|s| s as usize)
    }
}

/// What stands at a position of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next<'a> {
    Record(Record<'a>),
    /// The record needs this many bytes, counted from the position; fewer are there.
    Torn(usize),
    /// The size was not written, or is nonsense.
    Unwritten,
}

/// The record at `at`.
pub(super) fn record_at(data: &[u8], at: usize) -> Next<'_> {
    let rest = data.get(at..).unwrap_or_default();
    let (Some(&packed), Some(raw)) = (rest.first_chunk::<4>(), u32_at(rest, 4)) else {
        return Next::Torn(RECORD_HEADER);
    };
    let Some(size) = unpack_size(packed).filter(|s| *s > RECORD_HEADER) else {
        return Next::Unwritten;
    };
    let Some(body) = rest.get(RECORD_HEADER..size) else { return Next::Torn(size) };
    let full = raw & TYPE_MASK;
    let kind = match full {
        _ if full == kind::EXPUNGE | EXPUNGE_PROTECTION => kind::EXPUNGE,
        _ if full == kind::EXPUNGE_GUID | EXPUNGE_PROTECTION => kind::EXPUNGE_GUID,
        // Without its protection an expunge is damage: give it a type nobody knows.
        kind::EXPUNGE | kind::EXPUNGE_GUID => 0,
        other => other,
    };
    Next::Record(Record { offset: at, kind, external: raw & EXTERNAL != 0, body })
}

/// Iterates over the whole records of a log from a position; a transaction of which a part is
/// missing is not begun.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Records<'a> {
    /// `start` is where a record begins: the header's size, or an offset from a snapshot.
    pub fn new(data: &'a [u8], start: usize) -> Records<'a> {
        Records { data, at: start.min(data.len()) }
    }

    /// Where the next record begins; after the last, where the whole records end.
    pub fn position(&self) -> usize {
        self.at
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        let Next::Record(record) = record_at(self.data, self.at) else { return None };
        if record.boundary().is_some_and(|size| size > self.data.len() - self.at) {
            return None;
        }
        self.at += record.size();
        Some(record)
    }
}

/// Length of the part of a log file, header included, that holds whole transactions only. What
/// follows is a write that was not finished; Dovecot itself would cut it off. 0 when not even
/// the header is whole.
pub fn whole_records_len(log: &[u8]) -> usize {
    let Ok(header) = LogHeader::parse(log) else { return 0 };
    let mut records = Records::new(log, header.hdr_size);
    records.by_ref().for_each(drop);
    records.position()
}

/// Unpacks a record's size: 28 bits of 4-byte words, seven to a byte, each byte's top bit set.
pub(super) fn unpack_size(packed: [u8; 4]) -> Option<usize> {
    let mut words = 0usize;
    for byte in packed {
        if byte & 0x80 == 0 {
            return None;
        }
        words = words << 7 | usize::from(byte & 0x7f);
    }
    Some(words << 2)
}

/// The patches of a header update record: (offset, data).
pub(super) fn header_updates(body: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    patches(body, 2)
}

/// The patches of a (header or extension header) update; `width` is the size of its numbers.
pub(super) fn patches(body: &[u8], width: usize) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let number = |at: usize| match width {
            2 => u16_at(body, at).map(usize::from),
            _ => u32_at(body, at).map(|n| n as usize),
        };
        let offset = number(at)?;
        let start = at + 2 * width;
        let end = start.checked_add(number(at + width)?)?;
        let data = body.get(start..end)?;
        at = pad4(end);
        Some((offset, data))
    })
}

/// An extension introduction as read: (ext id if given, name if given, intro's numbers).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadIntro<'a> {
    pub ext_id: Option<u32>,
    pub name: &'a [u8],
    pub reset_id: u32,
    pub hdr_size: u32,
    pub record_size: u16,
    pub record_align: u16,
    pub no_shrink: bool,
}

/// The introductions of an intro record.
pub(super) fn intros(body: &[u8]) -> impl Iterator<Item = ReadIntro<'_>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let head = body.get(at..at + 20)?;
        let len = usize::from(u16_at(head, 18)?);
        let name = body.get(at + 20..at + 20 + len)?;
        at = pad4(at + 20 + len);
        Some(ReadIntro {
            ext_id: u32_at(head, 0).filter(|id| *id != u32::MAX),
            name,
            reset_id: u32_at(head, 4)?,
            hdr_size: u32_at(head, 8)?,
            record_size: u16_at(head, 12)?,
            record_align: u16_at(head, 14)?,
            no_shrink: u16_at(head, 16)? & 1 != 0,
        })
    })
}

/// The name and the ranges of a keyword update: (how, name, body from the first range on).
pub(super) fn keyword_update(body: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let len = usize::from(u16_at(body, 2)?);
    let name = body.get(4..4 + len)?;
    Some((*body.first()?, name, body.get(pad4(4 + len)..)?))
}

/// Pairs of UIDs, first and last.
pub(super) fn uid_ranges(body: &[u8]) -> impl Iterator<Item = (u32, u32)> {
    body.chunks_exact(8).filter_map(|r| Some((u32_at(r, 0)?, u32_at(r, 4)?)))
}

#[cfg(test)]
mod tests {
    use super::{
        super::transaction::{Intro, Transaction, pack_size},
        *,
    };

    /// A log header as Dovecot 2.3 writes it.
    fn log(records: &[u8]) -> Vec<u8> {
        let mut out = vec![1, 3, 40, 0];
        for n in [77u32, 2, 1, 500, 0, 0, 0, 1, 0] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(records);
        out
    }

    #[test]
    fn header_is_read_and_checked() {
        let header = LogHeader::parse(&log(&[])).unwrap();
        assert_eq!((header.hdr_size, header.indexid, header.file_seq), (40, 77, 2));
        assert_eq!((header.prev_file_seq, header.prev_file_offset), (1, 500));
        let mut bad = log(&[]);
        bad[4..8].fill(0);
        assert_eq!(LogHeader::parse(&bad), Err(LogError::MarkedCorrupted));
        bad[0] = 2;
        assert_eq!(LogHeader::parse(&bad), Err(LogError::Version(2)));
        assert_eq!(LogHeader::parse(&bad[..20]), Err(LogError::Short));
    }

    #[test]
    fn a_transaction_counts_whole_or_not_at_all() {
        let mut one = Transaction::new();
        one.header_update(header::NEXT_UID, 9);
        let mut two = Transaction::new();
        two.append(&[9, 10]);
        two.header_update(header::NEXT_UID, 20);
        let first = log(&one.finish());
        let mut whole = first.clone();
        whole.extend_from_slice(&two.finish());
        assert_eq!(whole_records_len(&whole), whole.len());
        let kinds: Vec<u32> = Records::new(&whole, 40).map(|r| r.kind).collect();
        assert_eq!(kinds, [kind::HEADER_UPDATE, kind::BOUNDARY, kind::APPEND, kind::HEADER_UPDATE]);
        for cut in first.len()..whole.len() {
            assert_eq!(whole_records_len(&whole[..cut]), first.len(), "cut at {cut}");
        }
        for cut in 40..first.len() {
            assert_eq!(whole_records_len(&first[..cut]), 40, "cut at {cut}");
        }
    }

    #[test]
    fn an_expunge_needs_its_protection() {
        let mut bytes = pack_size(16).to_vec();
        bytes.extend_from_slice(&(kind::EXPUNGE | 0xcd90).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        assert_eq!(Records::new(&bytes, 0).next().unwrap().kind, kind::EXPUNGE);
        bytes[4..8].copy_from_slice(&kind::EXPUNGE.to_le_bytes());
        assert_eq!(Records::new(&bytes, 0).next().unwrap().kind, 0);
    }

    #[test]
    fn parts_of_records_round_trip() {
        let mut t = Transaction::new();
        t.ext_intro(&Intro {
            name: "guid",
            reset_id: 3,
            hdr_size: 0,
            record_size: 16,
            record_align: 1,
        });
        t.ext_header_update(4, b"abcde");
        let bytes = t.finish();
        let records: Vec<_> = Records::new(&bytes, 0).collect();
        let intro = intros(records[1].body).next().unwrap();
        assert_eq!((intro.ext_id, intro.name, intro.reset_id), (None, b"guid".as_slice(), 3));
        assert!(intro.no_shrink);
        let update: Vec<_> = patches(records[2].body, 2).collect();
        assert_eq!(update, [(4, b"abcde".as_slice())]);
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(data: Vec<u8>, start in 0usize..64) {
            let _ = LogHeader::parse(&data);
            let _ = whole_records_len(&data);
            for record in Records::new(&data, start) {
                intros(record.body).for_each(drop);
                header_updates(record.body).for_each(drop);
            }
            intros(&data).for_each(drop);
            patches(&data, 2).for_each(drop);
            patches(&data, 4).for_each(drop);
            let _ = keyword_update(&data);
            uid_ranges(&data).for_each(drop);
        }
    }
}
