//! `dovecot.index.log`, as far as the simulated server writes and reads it.

use vmailfs::dovecot::replay::replay;

const EXTERNAL: u32 = 0x1000_0000;
const EXPUNGE: u32 = 0x1 | 0xcd90;
const APPEND: u32 = 0x2;
const FLAGS: u32 = 0x4;
const HEADER: u32 = 0x20;

/// What a log says.
#[derive(Debug, Clone, Default)]
pub struct State {
    pub validity: u32,
    pub next: u32,
    /// It ends in a record that was not written whole; nothing may be appended.
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

/// A new log with its header and a folder's first transaction.
pub fn new_log(validity: u32, next: u32) -> Vec<u8> {
    let mut out = vec![1, 3];
    out.extend(40u16.to_le_bytes());
    out.extend(validity.to_le_bytes());
    out.extend(1u32.to_le_bytes());
    out.extend([0; 8]);
    out.extend(validity.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.push(1);
    out.resize(40, 0);
    header_update(&mut out, 24, validity);
    header_update(&mut out, 28, next);
    out
}

/// New mails.
pub fn append(uids: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    if !uids.is_empty() {
        let body: Vec<u8> = uids.iter().flat_map(|uid| u64::from(*uid).to_le_bytes()).collect();
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

/// Reads a log. `None`: it is damaged, and Dovecot would make it anew.
pub fn read(log: &[u8]) -> Option<State> {
    let state = replay(None, &[log]).ok()?;
    Some(State {
        validity: state.uid_validity,
        next: state.next_uid,
        torn: state.log_end.1 != log.len(),
    })
}
