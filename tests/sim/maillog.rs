//! `dovecot.index.log`, as far as the simulated server writes and reads it. Nothing here is the
//! code under test: what that writes into a log must mean the same to a reader of its own.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

const EXTERNAL: u32 = 0x1000_0000;
const BOUNDARY: u32 = 0x80000;
const EXPUNGE: u32 = 0x1 | 0xcd90;
const APPEND: u32 = 0x2;
const FLAGS: u32 = 0x4;
const HEADER: u32 = 0x20;

/// Offsets of header updates.
const HEADER_FLAGS: usize = 20;
const VALIDITY: usize = 24;
const NEXT: usize = 28;
const TAIL: u16 = 64;
/// A flag of the header: the index is to be made anew from the mails.
const FSCKD: u32 = 4;

/// What a log says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    pub validity: u32,
    pub next: u32,
    /// Flags of mails by UID.
    pub mails: BTreeMap<u32, u8>,
    /// The index is to be made anew.
    pub rebuild: bool,
    /// Up to here it holds whole transactions.
    pub whole: usize,
    /// It ends in a record that was not written whole.
    pub torn: bool,
}

fn record(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let words = (8 + body.len()).div_ceil(4) as u32;
    out.extend([21, 14, 7, 0].map(|shift| 0x80 | (words >> shift & 0x7f) as u8));
    out.extend(kind.to_le_bytes());
    out.extend(body);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn header_update(out: &mut Vec<u8>, offset: u16, value: u32) {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(4u16.to_le_bytes());
    body.extend(value.to_le_bytes());
    record(out, HEADER | EXTERNAL, &body);
}

/// Records that happen together or not at all.
pub fn transaction(records: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    record(&mut out, BOUNDARY | EXTERNAL, &(12 + records.len() as u32).to_le_bytes());
    out.extend(records);
    out
}

/// A new log with nothing but its header. `seq` tells it from those before it.
pub fn empty_log(id: u32, seq: u32) -> Vec<u8> {
    let mut out = vec![1, 3];
    out.extend(40u16.to_le_bytes());
    out.extend(id.to_le_bytes());
    out.extend(seq.to_le_bytes());
    out.extend([0; 8]);
    out.extend(id.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.push(1);
    out.resize(40, 0);
    out
}

/// A new log with its header and a folder's first transaction.
pub fn new_log(validity: u32, next: u32) -> Vec<u8> {
    let mut out = empty_log(validity, 1);
    out.extend(begin(validity, next));
    out
}

/// A folder's first records.
pub fn begin(validity: u32, next: u32) -> Vec<u8> {
    let mut out = Vec::new();
    header_update(&mut out, VALIDITY as u16, validity);
    header_update(&mut out, NEXT as u16, next);
    out
}

/// Next-UID is raised.
pub fn raise(next: u32) -> Vec<u8> {
    let mut out = Vec::new();
    header_update(&mut out, NEXT as u16, next);
    out
}

/// What was asked for so far was done.
pub fn tail(offset: usize) -> Vec<u8> {
    let mut out = Vec::new();
    header_update(&mut out, TAIL, u32::try_from(offset).unwrap());
    out
}

/// The index is to be made anew.
pub fn mark_corrupted() -> Vec<u8> {
    let mut out = Vec::new();
    header_update(&mut out, HEADER_FLAGS as u16, FSCKD);
    out
}

/// New mails.
pub fn append(uids: &[u32]) -> Vec<u8> {
    append_flagged(uids.iter().map(|uid| (*uid, 0)))
}

pub fn append_flagged(mails: impl Iterator<Item = (u32, u8)>) -> Vec<u8> {
    let body: Vec<u8> =
        mails.flat_map(|(uid, flags)| [uid, u32::from(flags)]).flat_map(u32::to_le_bytes).collect();
    let mut out = Vec::new();
    if !body.is_empty() {
        record(&mut out, APPEND | EXTERNAL, &body);
    }
    out
}

/// Expunges: asked for, or `done`.
pub fn expunge(uids: &[u32], done: bool) -> Vec<u8> {
    let mut out = Vec::new();
    if !uids.is_empty() {
        let pair = |uid: &u32| [uid.to_le_bytes(), uid.to_le_bytes()].concat();
        let body: Vec<u8> = uids.iter().flat_map(pair).collect();
        record(&mut out, EXPUNGE | if done { EXTERNAL } else { 0 }, &body);
    }
    out
}

/// Flags of a mail as Maildir letters: asked for, or `done`.
pub fn flags(uid: u32, letters: &str, done: bool) -> Vec<u8> {
    let bit = |c| match c {
        'R' => 1,
        'F' => 2,
        'T' => 4,
        'S' => 8,
        _ => 16,
    };
    let add = letters.chars().map(bit).fold(0, |a, b| a | b);
    let mut body = [uid.to_le_bytes(), uid.to_le_bytes()].concat();
    body.extend([add, !add & 0x1f, 0, 0]);
    let mut out = Vec::new();
    record(&mut out, FLAGS | if done { EXTERNAL } else { 0 }, &body);
    out
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*data.get(at..)?.first_chunk()?))
}

/// Reads a log. `None`: it is damaged, and Dovecot would make it anew.
pub fn read(log: &[u8]) -> Option<State> {
    let header = usize::from(u16::from_le_bytes([*log.get(2)?, *log.get(3)?]));
    if log[0] != 1 || header < 24 || log.len() < header || word(log, 4)? == 0 {
        return None;
    }
    let mut state = State { next: 1, whole: header, ..State::default() };
    let mut at = header;
    while let Some((kind, body, end)) = next_record(log, at) {
        let together = word(body, 0).filter(|_| kind & !EXTERNAL == BOUNDARY);
        if together.is_some_and(|size| at + size as usize > log.len()) {
            break;
        }
        state.play(kind, body);
        at = end;
    }
    state.whole = at;
    state.torn = at != log.len();
    Some(state)
}

/// Type, body and end of the record at `at`, if it is whole.
fn next_record(log: &[u8], at: usize) -> Option<(u32, &[u8], usize)> {
    let packed = log.get(at..at + 4)?;
    if packed.iter().any(|byte| byte & 0x80 == 0) {
        return None;
    }
    let words = packed.iter().fold(0, |sum, byte| sum << 7 | usize::from(byte & 0x7f));
    let end = at + words * 4;
    let body = log.get(at + 8..end)?;
    Some((word(log, at + 4)? & !0x2000_0000, body, end))
}

/// The UIDs that a record is about. A power cut leaves ends before their beginnings: no UID.
fn range(record: &[u8]) -> RangeInclusive<u32> {
    word(record, 0).unwrap_or(1)..=word(record, 4).unwrap_or(0)
}

impl State {
    fn play(&mut self, kind: u32, body: &[u8]) {
        let number = |at: usize| word(body, at).unwrap_or_default();
        match kind & !EXTERNAL {
            APPEND => {
                for mail in body.chunks_exact(8) {
                    let uid = word(mail, 0).unwrap_or_default();
                    if uid >= self.next {
                        self.mails.insert(uid, mail[4]);
                        self.next = uid.saturating_add(1);
                    }
                }
            }
            EXPUNGE if kind & EXTERNAL != 0 => {
                for pair in body.chunks_exact(8) {
                    let uids = range(pair);
                    self.mails.retain(|uid, _| !uids.contains(uid));
                }
            }
            FLAGS => {
                for change in body.chunks_exact(12) {
                    let (add, remove) = (change[8], change[9]);
                    let uids = range(change);
                    let changed = self.mails.iter_mut().filter(|(uid, _)| uids.contains(uid));
                    changed.for_each(|(_, flags)| *flags = *flags & !remove | add);
                }
            }
            HEADER => {
                let mut at = 0;
                while at + 4 <= body.len() {
                    let offset = usize::from(u16::from_le_bytes([body[at], body[at + 1]]));
                    let len = usize::from(u16::from_le_bytes([body[at + 2], body[at + 3]]));
                    match (offset, len) {
                        (HEADER_FLAGS, 4) => self.rebuild = number(at + 4) & FSCKD != 0,
                        (VALIDITY, 4) => self.validity = number(at + 4),
                        (NEXT, 4) => self.next = self.next.max(number(at + 4)),
                        _ => {}
                    }
                    at = (at + 4 + len).next_multiple_of(4);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn a_log_is_read_as_it_was_written() {
    let mut log = new_log(7, 1);
    log.extend(transaction(&append(&[1, 2, 3])));
    log.extend(flags(2, "FS", false));
    log.extend(expunge(&[1], false));
    log.extend(expunge(&[3], true));
    log.extend(raise(50));
    let whole = log.len();
    log.extend(&transaction(&append(&[50]))[..20]);
    let state = read(&log).unwrap();
    assert_eq!((state.validity, state.next, state.whole, state.torn), (7, 50, whole, true));
    assert_eq!(state.mails, BTreeMap::from([(1, 0), (2, 10)]));
    // As the heart reads it.
    let theirs = vmailfs::dovecot::replay::replay(None, &[&log]).unwrap();
    assert_eq!((theirs.next_uid, theirs.records.len()), (50, 2));
    assert_eq!(theirs.records[&2].flags, 10);
}

/// A disk without power leaves anything in a log.
#[test]
fn any_bytes_are_read() {
    let mut log = new_log(7, 1);
    log.extend(append(&[1, 2, 3, u32::MAX]));
    log.extend(flags(2, "FS", false));
    log.extend(expunge(&[3], true));
    log.extend(raise(50));
    for at in 40..log.len() {
        for byte in [0, 1, 0x7f, 0x80, 0x84, 0xff] {
            let mut torn = log.clone();
            torn[at] = byte;
            let _ = read(&torn);
            torn[at..].fill(byte);
            let _ = read(&torn);
            let _ = read(&torn[..at]);
        }
    }
    // Flags of what ends before it begins.
    let mut log = new_log(7, 1);
    log.extend(append(&[1, 2]));
    let mut body = [2u32.to_le_bytes(), 1u32.to_le_bytes()].concat();
    body.extend([8, 0, 0, 0]);
    record(&mut log, FLAGS | EXTERNAL, &body);
    assert_eq!(read(&log).unwrap().mails, BTreeMap::from([(1, 0), (2, 0)]));
}
