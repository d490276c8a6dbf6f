//! Listings: what the names in a folder stand for.

use super::{ObjectId, Sub, Timestamp, key::KeyTail};

/// Numeric owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// Attributes of a file or directory. `owner` is present only where it deviates from the user's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attrs {
    /// Permission bits, `0o7777` at most.
    pub mode: u32,
    pub owner: Option<Owner>,
    pub mtime: Timestamp,
}

/// One piece of a file that grows by appending (mdbox `m.N`): its own object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
    pub object: KeyTail,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A published mail, immutable: one object.
    Mail { size: u64, attrs: Attrs, object: KeyTail },
    /// A file made of extents, in order of offset.
    Extents { size: u64, attrs: Attrs, extents: Vec<Extent> },
    /// A file of the metacache. Its bytes travel in the folder's parts, or, when it is large,
    /// as the object `file/<object>`.
    Local { size: u64, attrs: Attrs, object: Option<ObjectId> },
    /// A symbolic link.
    Symlink { target: Vec<u8>, attrs: Attrs },
}

/// One line of a listing. A base holds `Dir` and `Set` only; a diff and the journal hold all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// The directory exists and has these attributes (its mtime is the listing's).
    Dir { sub: Sub, attrs: Attrs },
    /// The directory does not exist any more (never for [`Sub::Own`]).
    NoDir { sub: Sub },
    /// The name stands for this.
    Set { sub: Sub, name: Vec<u8>, entry: Entry },
    /// The name stands for nothing any more.
    Unset { sub: Sub, name: Vec<u8> },
}
