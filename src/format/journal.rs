//! The journal of a user: checksummed records, each an atomic change; every prefix is a legal
//! state. A record states what is, not what was done, so that replaying one twice is harmless.
//!
//! A file is a header line and records. A record is a line `R <seq> <bytes> <crc>` and so many
//! bytes of payload, one line per change. No payload line can look like a record's line: a
//! payload has no spaces, for names are escaped.
//!
//! What a crash leaves at the end is told apart from damage. Bytes after the last good record in
//! which no later record can be read are a torn tail: nobody was told that they were written. A
//! record that cannot be read with a good one behind it means that something acknowledged is
//! missing. (After a power loss the same can come from blocks that reached the disk out of
//! order beyond the last sync; the caller, who knows whether the machine went down, decides.)

use super::escape::{clip, escape_into, unescape};
use super::listing::{Fields, Line, Owner, check_header, decode_line, encode_line, hex, number};
use super::{FolderId, FormatError, ObjectId, Place, key::KeyTail};
use std::fmt::Write;

/// A change on the metacache's disk that goes with a record. The record is written first; only
/// the last one of a journal can be unfinished, and is redone at the next start if its source
/// still exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskOp {
    Create { at: Place, name: Vec<u8> },
    Unlink { at: Place, name: Vec<u8> },
    Rename { from: Place, name: Vec<u8>, to: Place, new_name: Vec<u8> },
    Exchange { from: Place, name: Vec<u8>, to: Place, new_name: Vec<u8> },
    Link { from: Place, name: Vec<u8>, to: Place, new_name: Vec<u8> },
}

/// One part of an atomic change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A folder exists, here, under this name. Says so for a new folder and for a moved one.
    Folder { id: FolderId, parent: Place, name: Vec<u8> },
    /// A folder exists no more.
    NoFolder { id: FolderId },
    /// A line of a folder's listing.
    Line { folder: FolderId, line: Line },
    /// An object has so many names now (said when it has, or had, more than one).
    Names { object: ObjectId, count: u32 },
    /// An object has lost its last name: it goes on the dropped list.
    Drop { object: KeyTail },
    /// A dropped object has a name again: it is taken off the dropped list.
    Again { object: KeyTail },
    /// Owner and permission bits of the user's root directory.
    User { owner: Owner, mode: u32 },
    /// What is done on the disk after this record is written.
    Disk(DiskOp),
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// One more than the record before.
    pub seq: u64,
    pub changes: Vec<Change>,
}

/// The version of the journal format that this code writes, and the newest it reads.
pub const JOURNAL_VERSION: u32 = 1;
/// The largest payload of a record, in bytes.
pub const RECORD_MAX: usize = 64 << 20;

const WHAT: &str = "journal";
const HEADER: &str = "vmailfs journal ";
/// Longer than any header line or record line.
const HEAD_LINE_MAX: usize = 64;

fn put_place(at: Place, name: &[u8], out: &mut String) {
    let _ = write!(out, "\t{}\t{}\t", at.folder, at.sub.as_str());
    escape_into(name, out);
}

fn encode_change(change: &Change, out: &mut String) {
    // Writing to a string cannot fail.
    let _ = match change {
        Change::Folder { id, parent, name } => {
            let _ = write!(out, "folder\t{id}");
            put_place(*parent, name, out);
            Ok(())
        }
        Change::NoFolder { id } => write!(out, "nofolder\t{id}"),
        Change::Line { folder, line } => {
            let _ = write!(out, "line\t{folder}\t");
            encode_line(line, out);
            Ok(())
        }
        Change::Names { object, count } => write!(out, "names\t{object}\t{count}"),
        Change::Drop { object } => write!(out, "drop\t{object}"),
        Change::Again { object } => write!(out, "again\t{object}"),
        Change::User { owner, mode } => {
            write!(out, "user\t{}:{}\t{:04o}", owner.uid, owner.gid, mode & 0o7777)
        }
        Change::Disk(op) => {
            let (word, at, name, to) = match op {
                DiskOp::Create { at, name } => ("create", at, name, None),
                DiskOp::Unlink { at, name } => ("unlink", at, name, None),
                DiskOp::Rename { from, name, to, new_name } => {
                    ("rename", from, name, Some((to, new_name)))
                }
                DiskOp::Exchange { from, name, to, new_name } => {
                    ("exchange", from, name, Some((to, new_name)))
                }
                DiskOp::Link { from, name, to, new_name } => {
                    ("link", from, name, Some((to, new_name)))
                }
            };
            let _ = write!(out, "disk\t{word}");
            put_place(*at, name, out);
            if let Some((to, new_name)) = to {
                put_place(*to, new_name, out);
            }
            Ok(())
        }
    };
    out.push('\n');
}

fn place(fields: &mut Fields<'_>) -> Option<Place> {
    Some(Place { folder: fields.parse()?, sub: fields.parse()? })
}

fn parse_disk_op(fields: &mut Fields<'_>) -> Option<DiskOp> {
    let word = fields.text()?;
    let from = place(fields)?;
    let name = fields.name()?;
    Some(match word {
        "create" => DiskOp::Create { at: from, name },
        "unlink" => DiskOp::Unlink { at: from, name },
        "rename" => DiskOp::Rename { from, name, to: place(fields)?, new_name: fields.name()? },
        "exchange" => DiskOp::Exchange { from, name, to: place(fields)?, new_name: fields.name()? },
        "link" => DiskOp::Link { from, name, to: place(fields)?, new_name: fields.name()? },
        _ => return None,
    })
}

fn parse_change(text: &str) -> Option<Change> {
    if let Some(rest) = text.strip_prefix("line\t") {
        let (folder, line) = rest.split_once('\t')?;
        return Some(Change::Line { folder: folder.parse().ok()?, line: decode_line(line).ok()? });
    }
    let mut fields = Fields::new(text);
    let change = match fields.text()? {
        "folder" => {
            let id = fields.parse()?;
            let parent = place(&mut fields)?;
            let name = if id == FolderId::ROOT {
                let name = unescape(fields.text()?).ok()?;
                (name.is_empty() && parent == Place::ROOT).then_some(name)?
            } else {
                fields.name()?
            };
            Change::Folder { id, parent, name }
        }
        "nofolder" => Change::NoFolder { id: fields.parse()? },
        "names" => {
            Change::Names { object: fields.parse()?, count: u32::try_from(fields.number()?).ok()? }
        }
        "drop" => Change::Drop { object: KeyTail::parse(fields.text()?).ok()? },
        "again" => Change::Again { object: KeyTail::parse(fields.text()?).ok()? },
        "user" => Change::User { owner: fields.owner()?, mode: fields.mode()? },
        "disk" => Change::Disk(parse_disk_op(&mut fields)?),
        _ => return None,
    };
    fields.end()?;
    Some(change)
}

/// CRC-32C over the sequence number as in the record's line, a line end, and the payload.
fn checksum(seq: u64, payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(format!("{seq}\n").as_bytes()), payload)
}

/// The first line of a journal whose first record will be `first_seq`. The number has no
/// checksum: in a journal without records, a reader compares it with what it knows.
pub fn encode_journal_header(first_seq: u64) -> Vec<u8> {
    format!("{HEADER}{JOURNAL_VERSION} {first_seq}\n").into_bytes()
}

/// A record as it is appended to a journal. The root folder is named by the empty name and
/// [`Place::ROOT`]; other names must be legal. A payload above [`RECORD_MAX`] bytes would not be
/// read again: a caller that has so many changes makes several records of them.
pub fn encode_record(record: &Record) -> Vec<u8> {
    let mut payload = String::new();
    for change in &record.changes {
        encode_change(change, &mut payload);
    }
    let crc = checksum(record.seq, payload.as_bytes());
    let mut out = format!("R {} {} {crc:08x}\n", record.seq, payload.len()).into_bytes();
    out.extend_from_slice(payload.as_bytes());
    out
}

/// Why a journal cannot be read on. Everything before `offset` (bytes) is good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalEnd {
    /// It ends in an incomplete record or header that a crash left; cut it off there.
    #[error("journal: incomplete record at byte {offset}")]
    Torn { offset: u64 },
    /// Damaged, or written by a newer version.
    #[error("journal: bad at byte {offset}: {error}")]
    Corrupt { offset: u64, error: FormatError },
}

/// Reads a journal. Yields each record with the offset of its end in bytes; stops after the last
/// record, or after one error.
#[derive(Debug)]
pub struct JournalReader<'a> {
    bytes: &'a [u8],
    at: usize,
    next_seq: Option<u64>,
    done: bool,
}

/// A record's line and payload.
struct Frame<'a> {
    seq: u64,
    crc: u32,
    payload: &'a [u8],
    end: usize,
}

impl Frame<'_> {
    fn is_good(&self) -> bool {
        checksum(self.seq, self.payload) == self.crc
    }
}

fn line_at(bytes: &[u8], at: usize) -> Option<(&str, usize)> {
    let rest = bytes.get(at..)?;
    let rest = &rest[..rest.len().min(HEAD_LINE_MAX)];
    let len = rest.iter().position(|&b| b == b'\n')?;
    Some((std::str::from_utf8(&rest[..len]).ok()?, at + len + 1))
}

/// The record that starts at `at`, if all of it is there; not yet checked.
fn frame_at(bytes: &[u8], at: usize) -> Option<Frame<'_>> {
    let (line, start) = line_at(bytes, at)?;
    let mut words = line.strip_prefix("R ")?.split(' ');
    let seq = number(words.next()?)?;
    let len = usize::try_from(number(words.next()?)?).ok().filter(|&len| len <= RECORD_MAX)?;
    let crc = u32::try_from(hex(words.next()?, 8)?).ok()?;
    if words.next().is_some() {
        return None;
    }
    let end = start.checked_add(len)?;
    Some(Frame { seq, crc, payload: bytes.get(start..end)?, end })
}

impl<'a> JournalReader<'a> {
    pub fn new(bytes: &'a [u8]) -> JournalReader<'a> {
        JournalReader { bytes, at: 0, next_seq: None, done: false }
    }

    /// The sequence number in the header; `None` if there is no good header.
    pub fn first_seq(&self) -> Option<u64> {
        Some(self.header().ok()?.0)
    }

    fn corrupt(&self, error: FormatError) -> JournalEnd {
        JournalEnd::Corrupt { offset: self.at as u64, error }
    }

    fn header(&self) -> Result<(u64, usize), JournalEnd> {
        let Some((line, end)) = line_at(self.bytes, 0) else {
            return Err(match self.later_record(0, 0) {
                false => JournalEnd::Torn { offset: 0 },
                true => self.corrupt(FormatError::malformed(WHAT, "no header")),
            });
        };
        check_header(WHAT, HEADER, line, JOURNAL_VERSION).map_err(|e| self.corrupt(e))?;
        let first = line.rsplit_once(' ').and_then(|(start, seq)| {
            (start == format!("{HEADER}{JOURNAL_VERSION}")).then(|| number(seq))?
        });
        match first {
            Some(first) => Ok((first, end)),
            None => {
                Err(self.corrupt(FormatError::malformed(WHAT, format!("header: {}", clip(line)))))
            }
        }
    }

    /// Whether a good record with a number from `seq` on starts at `from` or later.
    fn later_record(&self, from: usize, seq: u64) -> bool {
        // Each byte may be summed a few times. A file that asks for more was made to be slow,
        // not left by a crash, and counts as damaged.
        let mut budget = self.bytes.len().saturating_mul(4);
        let mut at = from;
        while let Some(step) = self.bytes.get(at..).and_then(|b| b.iter().position(|&b| b == b'R'))
        {
            at += step;
            if let Some(frame) = frame_at(self.bytes, at).filter(|frame| frame.seq >= seq) {
                match budget.checked_sub(frame.payload.len()) {
                    Some(left) if !frame.is_good() => budget = left,
                    _ => return true,
                }
            }
            at += 1;
        }
        false
    }

    fn record(&mut self) -> Result<Option<(Record, u64)>, JournalEnd> {
        let seq = match self.next_seq {
            Some(seq) => seq,
            None => {
                let (first, end) = self.header()?;
                self.at = end;
                first
            }
        };
        self.next_seq = Some(seq);
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let Some(frame) = frame_at(self.bytes, self.at).filter(Frame::is_good) else {
            return Err(match self.later_record(self.at + 1, seq) {
                false => JournalEnd::Torn { offset: self.at as u64 },
                true => self.corrupt(FormatError::Checksum { what: WHAT }),
            });
        };
        if frame.seq != seq {
            let detail = format!("record {} where {seq} is due", frame.seq);
            return Err(self.corrupt(FormatError::malformed(WHAT, detail)));
        }
        let changes = self.changes(frame.payload)?;
        self.at = frame.end;
        self.next_seq = seq.checked_add(1);
        if self.next_seq.is_none() {
            return Err(self.corrupt(FormatError::malformed(WHAT, "sequence numbers are used up")));
        }
        Ok(Some((Record { seq, changes }, frame.end as u64)))
    }

    fn changes(&self, payload: &[u8]) -> Result<Vec<Change>, JournalEnd> {
        let bad = |text: &str| self.corrupt(FormatError::malformed(WHAT, clip(text)));
        let text = std::str::from_utf8(payload).map_err(|_| bad("not text"))?;
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let text = text.strip_suffix('\n').ok_or_else(|| bad("a change without line end"))?;
        text.split('\n').map(|line| parse_change(line).ok_or_else(|| bad(line))).collect()
    }
}

impl Iterator for JournalReader<'_> {
    type Item = Result<(Record, u64), JournalEnd>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let result = self.record().transpose();
        self.done = !matches!(result, Some(Ok(_)));
        result
    }
}
