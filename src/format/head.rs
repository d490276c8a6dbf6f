//! The head: the one mutable object of a user, swapped by compare-and-swap.
//!
//! Text: JSON with one folder per line, so that `less`, `jq`, `diff` and `grep` work on it. The
//! last member is the CRC-32C of all bytes before its line. The JSON itself is in
//! [`super::headjson`]; here are the types and what must hold between the fields.

use super::escape::is_name;
use super::{Epoch, FolderId, FormatError, ObjectId, Place, headjson, listing::Owner};
use std::collections::{HashMap, HashSet};

/// Whether a part stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartKind {
    Base,
    Diff,
}

/// Where a part lies: a byte range of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartRef {
    pub bundle: ObjectId,
    pub offset: u64,
    pub len: u64,
    /// CRC-32C of the range.
    pub crc: u32,
    pub kind: PartKind,
    /// Size of the content before compression, for deciding when a chain is folded.
    pub raw_len: u64,
}

/// A folder as the head knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadFolder {
    pub id: FolderId,
    /// The directory it lies in; for the root folder itself [`Place::ROOT`].
    pub parent: Place,
    pub name: Vec<u8>,
    /// A base and the diffs on top of it, oldest first. Empty: the folder is empty.
    pub parts: Vec<PartRef>,
    /// next-UID stays at or below this (I2). `None`: no UID of this folder is known.
    pub uid_ceiling: Option<u32>,
    /// UIDs below this may have been given by a session whose changes are lost: next-UID is
    /// raised to it before the folder is used, and then this is said no more.
    pub burnt_below: Option<u32>,
    /// Some mail of it that was made safe has a temporary name: its server had not named it yet, or
    /// not taken this one away. A recovery gives it a name if it has no other.
    pub unfinished: bool,
}

/// Who writes the user now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadOwner {
    pub backend: String,
    /// The mount session: a random number in hex.
    pub session: String,
}

/// An epoch that is over, with the last id it is known to have used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClosedEpoch {
    pub epoch: Epoch,
    pub end: ObjectId,
}

/// The head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    pub user: String,
    pub epoch: Epoch,
    /// Random; tells our own write from a rival's after a lost answer.
    pub write_id: String,
    /// `None` after a clean hand-over: nothing is missing from this head.
    pub owner: Option<HeadOwner>,
    /// Every id up to it is named by this head or is on its dropped list.
    pub watermark: ObjectId,
    pub closed: Vec<ClosedEpoch>,
    pub root_owner: Owner,
    pub root_mode: u32,
    pub folders: Vec<HeadFolder>,
    /// Ceiling of Dovecot's uidvalidity counter.
    pub uidvalidity_ceiling: Option<u32>,
    /// Values up to this may have been given by a session whose changes are lost.
    pub uidvalidity_burnt: Option<u32>,
    /// Ids above the watermark that are nevertheless named or on the dropped list: a PUT with a
    /// smaller id was still unanswered.
    pub known_above: Vec<ObjectId>,
    /// Tables that grow, as base and diffs: objects with more than one name, dropped objects.
    pub names: Vec<PartRef>,
    pub dropped: Vec<PartRef>,
    /// The head before this one lies in this part.
    pub previous: Option<PartRef>,
    /// When what it names was flushed, seconds since 1970. A swap that flushes nothing leaves it:
    /// earlier states are found by it.
    pub written: i64,
}

/// The version of the head format that this code writes, and the newest it reads.
pub const HEAD_VERSION: u32 = 1;
/// The largest head, in bytes.
pub const HEAD_LIMIT: u64 = 64 << 20;
/// The most folders of a user, the root folder included. A caller that would make one more
/// refuses: such a head would not be read again.
pub const FOLDERS_MAX: usize = 100_000;
/// How deep folders may lie: the root folder is at depth 0, a folder in it at 1.
pub const DEPTH_MAX: usize = 64;

pub(super) const WHAT: &str = "head";

impl PartRef {
    /// Whether these are the bytes of the range, by length and checksum.
    ///
    /// # Errors
    /// [`FormatError::Malformed`] for another length, [`FormatError::Checksum`].
    pub fn check(&self, bytes: &[u8]) -> Result<(), FormatError> {
        let what = "part";
        if bytes.len() as u64 != self.len {
            let detail =
                format!("{} bytes instead of {} of {}", bytes.len(), self.len, self.bundle);
            return Err(FormatError::malformed(what, detail));
        }
        if crc32c::crc32c(bytes) != self.crc {
            return Err(FormatError::Checksum { what });
        }
        Ok(())
    }
}

impl Head {
    /// The head as it is stored. What [`Head::decode`] would refuse must not be given: check with
    /// [`Head::check`] where folders come from an untrusted place.
    pub fn encode(&self) -> Vec<u8> {
        headjson::encode(self)
    }

    /// Reads a stored head.
    ///
    /// # Errors
    /// [`FormatError::TooLarge`] above [`HEAD_LIMIT`]; [`FormatError::TooNew`];
    /// [`FormatError::Checksum`]; [`FormatError::Malformed`] for anything else that is not as
    /// [`Head::encode`] writes it, or fails [`Head::check`].
    pub fn decode(bytes: &[u8]) -> Result<Head, FormatError> {
        if bytes.len() as u64 > HEAD_LIMIT {
            return Err(FormatError::TooLarge { what: WHAT, limit: HEAD_LIMIT });
        }
        let head = headjson::decode(bytes)?;
        head.check()?;
        Ok(head)
    }

    /// What must hold of the folders: at most [`FOLDERS_MAX`], each id once, one of them the root
    /// folder (no name, in [`Place::ROOT`]), all others with a legal name in a folder of this
    /// head, no name twice in a place, all below the root, and at most [`DEPTH_MAX`] deep.
    ///
    /// # Errors
    /// [`FormatError::Malformed`], naming the folder.
    pub fn check(&self) -> Result<(), FormatError> {
        let bad = |detail: String| Err(FormatError::malformed(WHAT, detail));
        if self.folders.len() > FOLDERS_MAX {
            return bad(format!("{} folders, more than {FOLDERS_MAX}", self.folders.len()));
        }
        let mut parents = HashMap::with_capacity(self.folders.len());
        let mut names = HashSet::with_capacity(self.folders.len());
        for folder in &self.folders {
            let id = folder.id;
            if parents.insert(id, folder.parent.folder).is_some() {
                return bad(format!("folder {id} occurs twice"));
            }
            if id == FolderId::ROOT {
                if folder.parent != Place::ROOT || !folder.name.is_empty() {
                    return bad("the root folder has a name or a parent".into());
                }
            } else if !is_name(&folder.name) {
                return bad(format!("folder {id} has an illegal name"));
            } else if !names.insert((folder.parent, folder.name.as_slice())) {
                return bad(format!("folder {id} has the name of another"));
            }
        }
        if !parents.contains_key(&FolderId::ROOT) {
            return bad("no root folder".into());
        }
        // DEPTH_MAX steps for each folder at most: a cycle is a folder that is too deep.
        for folder in &self.folders {
            let mut at = folder.id;
            let mut depth = 0;
            while at != FolderId::ROOT {
                let Some(&parent) = parents.get(&at) else {
                    return bad(format!("folder {} lies in {at}, which does not exist", folder.id));
                };
                depth += 1;
                if depth > DEPTH_MAX {
                    return bad(format!("folder {} is too deep or inside itself", folder.id));
                }
                at = parent;
            }
        }
        Ok(())
    }
}
