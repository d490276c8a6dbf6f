//! Parts and bundles: how index files and listings travel.

use super::Sub;
use super::listing::Line;
use bytes::Bytes;

/// The bytes of a local file in a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The whole file.
    Whole(Bytes),
    /// What was appended: the file is what it was up to `offset`, then `bytes`.
    Tail { offset: u64, bytes: Bytes },
    /// Changed blocks of `block_size` bytes (the last one may be short), by block number, of a
    /// file that is `size` bytes long now.
    Blocks { size: u64, block_size: u32, blocks: Vec<(u64, Bytes)> },
}

/// A local file in a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub sub: Sub,
    pub name: Vec<u8>,
    pub content: Content,
}

/// What one folder contributes to a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Part {
    pub lines: Vec<Line>,
    pub members: Vec<Member>,
}
