//! Identifiers and small values that all formats share.

use super::FormatError;
use std::fmt;
use std::str::FromStr;

/// One opening of a user by one mount session. Every session that opens a user takes a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u32);

/// The id of an object of a user: `<epoch>-<counter>`, fixed width, so that names sort as ids do.
/// No clock is involved. Text: 8 hex digits, `-`, 12 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ObjectId {
    pub epoch: Epoch,
    pub counter: u64,
}

impl ObjectId {
    /// Sorts before every id that is ever given.
    pub const ZERO: ObjectId = ObjectId { epoch: Epoch(0), counter: 0 };
    /// Largest counter that fits the text form.
    pub const MAX_COUNTER: u64 = (1 << 48) - 1;
    /// Length of the text form.
    pub const TEXT_LEN: usize = 21;
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:012x}", self.epoch.0, self.counter)
    }
}

fn fixed_hex(s: &str, digits: usize) -> Option<u64> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if s.len() != digits || !s.bytes().all(lower) {
        return None;
    }
    u64::from_str_radix(s, 16).ok()
}

impl FromStr for ObjectId {
    type Err = FormatError;
    fn from_str(s: &str) -> Result<Self, FormatError> {
        let bad = || FormatError::malformed("object id", s);
        let (epoch, counter) = s.split_once('-').ok_or_else(bad)?;
        let epoch = fixed_hex(epoch, 8).ok_or_else(bad)? as u32;
        let counter = fixed_hex(counter, 12).ok_or_else(bad)?;
        Ok(ObjectId { epoch: Epoch(epoch), counter })
    }
}

/// A folder: a directory below a user's root, with a random id that a rename does not change.
/// Text: 16 hex digits. Zero is the user's root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FolderId(pub u64);

impl FolderId {
    pub const ROOT: FolderId = FolderId(0);
}

impl fmt::Display for FolderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for FolderId {
    type Err = FormatError;
    fn from_str(s: &str) -> Result<Self, FormatError> {
        fixed_hex(s, 16).map(FolderId).ok_or_else(|| FormatError::malformed("folder id", s))
    }
}

/// A directory inside a folder: the folder's own, or one of Maildir's three, which belong to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sub {
    Own,
    Cur,
    New,
    Tmp,
}

impl Sub {
    pub const ALL: [Sub; 4] = [Sub::Own, Sub::Cur, Sub::New, Sub::Tmp];

    /// The text form, which for Maildir's three is also the directory's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Sub::Own => ".",
            Sub::Cur => "cur",
            Sub::New => "new",
            Sub::Tmp => "tmp",
        }
    }

    /// Which of Maildir's three a directory of this name is.
    pub fn from_name(name: &[u8]) -> Option<Sub> {
        match name {
            b"cur" => Some(Sub::Cur),
            b"new" => Some(Sub::New),
            b"tmp" => Some(Sub::Tmp),
            _ => None,
        }
    }
}

impl FromStr for Sub {
    type Err = FormatError;
    fn from_str(s: &str) -> Result<Self, FormatError> {
        match s {
            "." => Ok(Sub::Own),
            _ => Sub::from_name(s.as_bytes()).ok_or_else(|| FormatError::malformed("sub", s)),
        }
    }
}

/// A directory of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub folder: FolderId,
    pub sub: Sub,
}

impl Place {
    pub const ROOT: Place = Place { folder: FolderId::ROOT, sub: Sub::Own };
    pub fn own(folder: FolderId) -> Place {
        Place { folder, sub: Sub::Own }
    }
}

/// Seconds and nanoseconds since 1970. Text: `<seconds>.<9 digits>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    pub secs: i64,
    pub nanos: u32,
}

impl Timestamp {
    /// The smallest time after this one.
    pub fn next(self) -> Timestamp {
        if self.nanos >= 999_999_999 {
            Timestamp { secs: self.secs.saturating_add(1), nanos: 0 }
        } else {
            Timestamp { secs: self.secs, nanos: self.nanos + 1 }
        }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.secs, self.nanos)
    }
}

impl FromStr for Timestamp {
    type Err = FormatError;
    fn from_str(s: &str) -> Result<Self, FormatError> {
        let bad = || FormatError::malformed("time", s);
        let (secs, nanos) = s.split_once('.').ok_or_else(bad)?;
        if nanos.len() != 9 || !nanos.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        Ok(Timestamp {
            secs: secs.parse().map_err(|_| bad())?,
            nanos: nanos.parse().map_err(|_| bad())?,
        })
    }
}
