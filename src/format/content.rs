//! The bytes of local files in parts: whole, as a tail, or as changed blocks.

use super::FormatError;
use super::part::Content;
use bytes::Bytes;

/// The largest block of [`Content::Blocks`], in bytes.
pub const BLOCK_SIZE_MAX: u32 = 16 << 20;

/// Blocks as a member's bytes: for each its number (8 bytes), its length (4 bytes), both little
/// endian, and itself.
pub(super) fn put_blocks(blocks: &[(u64, Bytes)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(blocks.iter().map(|(_, bytes)| bytes.len() + 12).sum());
    for (number, bytes) in blocks {
        out.extend_from_slice(&number.to_le_bytes());
        // A block is BLOCK_SIZE_MAX bytes long at most.
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(bytes);
    }
    out
}

/// Whether a block can be where it is: full, but for the last one of the file, and behind `last`.
fn fits(last: Option<u64>, number: u64, len: usize, size: u64, block_size: u32) -> bool {
    let block = u64::from(block_size);
    let due = number.checked_mul(block).and_then(|start| size.checked_sub(start));
    let due = due.unwrap_or(0).min(block);
    due > 0 && len as u64 == due && last.is_none_or(|last| last < number)
}

/// Reads what [`put_blocks`] wrote.
pub(super) fn take_blocks(
    mut rest: &[u8],
    size: u64,
    block_size: u32,
) -> Option<Vec<(u64, Bytes)>> {
    if block_size == 0 || block_size > BLOCK_SIZE_MAX {
        return None;
    }
    let mut blocks: Vec<(u64, Bytes)> = Vec::new();
    while !rest.is_empty() {
        let (number, after) = rest.split_first_chunk::<8>()?;
        let (len, after) = after.split_first_chunk::<4>()?;
        let number = u64::from_le_bytes(*number);
        let len = u32::from_le_bytes(*len) as usize;
        let (bytes, after) = after.split_at_checked(len)?;
        if !fits(blocks.last().map(|block| block.0), number, len, size, block_size) {
            return None;
        }
        blocks.push((number, Bytes::copy_from_slice(bytes)));
        rest = after;
    }
    Some(blocks)
}

fn bad(detail: &str) -> FormatError {
    FormatError::malformed("content", detail)
}

/// A file's bytes from what they were (`None`: it did not exist) and what a part says of it.
///
/// # Errors
/// [`FormatError::Malformed`] if the old bytes are not what the content builds on (too short for
/// a tail, or for the blocks that are not there), or a block is not where it can be.
pub fn apply_content(old: Option<&[u8]>, content: &Content) -> Result<Vec<u8>, FormatError> {
    let old = old.unwrap_or_default();
    match content {
        Content::Whole(bytes) => Ok(bytes.to_vec()),
        Content::Tail { offset, bytes } => {
            let kept = usize::try_from(*offset).ok().and_then(|offset| old.get(..offset));
            let kept = kept.ok_or_else(|| bad("a tail beyond the end of its file"))?;
            Ok([kept, bytes].concat())
        }
        Content::Blocks { size, block_size, blocks } => {
            apply_blocks(old, *size, *block_size, blocks)
        }
    }
}

fn apply_blocks(
    old: &[u8],
    size: u64,
    block_size: u32,
    blocks: &[(u64, Bytes)],
) -> Result<Vec<u8>, FormatError> {
    if block_size == 0 || block_size > BLOCK_SIZE_MAX {
        return Err(bad("block size"));
    }
    let block = u64::from(block_size);
    let first_new = old.len() as u64 / block;
    let mut last = None;
    let mut new = 0;
    for (number, bytes) in blocks {
        if !fits(last, *number, bytes.len(), size, block_size) {
            return Err(bad("a block where it cannot be"));
        }
        last = Some(*number);
        new += u64::from(*number >= first_new);
    }
    // What the old file does not reach must all be in the blocks: nothing is made up, and no
    // allocation is larger than what is there.
    if size > old.len() as u64 && new < size.div_ceil(block) - first_new {
        return Err(bad("blocks that build on a longer file"));
    }
    let len = usize::try_from(size).map_err(|_| bad("size"))?;
    let mut out = old[..old.len().min(len)].to_vec();
    out.resize(len, 0);
    for (number, bytes) in blocks {
        let at = (number * block) as usize;
        out[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Ok(out)
}
