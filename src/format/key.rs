//! Keys of objects in the store.

use super::{FolderId, ObjectId, Timestamp};

/// The last component of a mail object's key, as text, already validated. Everything that is
/// needed to rebuild a lost listing entry can be read from it: see [`MailKey`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct KeyTail(Box<str>);

/// What an object holds of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// All of it.
    Whole,
    /// The bytes from `offset` on; a later extent at an earlier offset cuts what lay beyond it.
    /// `predecessor` is the extent that ends where this one begins.
    Extent { offset: u64, predecessor: Option<ObjectId> },
}

/// The meaning of a [`KeyTail`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailKey {
    pub id: ObjectId,
    pub folder: FolderId,
    pub mtime: Timestamp,
    pub mode: u32,
    /// CRC-32C of the object's bytes.
    pub crc: u32,
    pub piece: Piece,
    /// The file's name when it was published (Maildir: its base name completed by `,S=,W=`).
    /// `None`: it did not fit the key and is in the object's metadata.
    pub name: Option<Vec<u8>>,
}
