//! The head: the one mutable object of a user, swapped by compare-and-swap.

use super::{Epoch, FolderId, ObjectId, Place, listing::Owner};

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
    /// Tables that grow, as base and diffs: objects with more than one name, dropped objects.
    pub names: Vec<PartRef>,
    pub dropped: Vec<PartRef>,
    /// The head before this one lies in this part.
    pub previous: Option<PartRef>,
    /// When this head was written, seconds since 1970 (for people and for history).
    pub written: i64,
}
