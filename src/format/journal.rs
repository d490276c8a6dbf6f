//! The journal of a user: checksummed records, each an atomic change; every prefix is a legal
//! state. A record states what is, not what was done, so that replaying one twice is harmless.

use super::{
    FolderId, ObjectId, Place,
    key::KeyTail,
    listing::{Attrs, Line, Owner},
};

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

#[allow(unused)]
fn _attrs(_: Attrs) {}
