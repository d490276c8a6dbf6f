//! Parts and bundles: how index files and listings travel.

use super::content::{put_blocks, take_blocks};
use super::escape::{clip, is_name};
use super::frame::{self, compress};
use super::listing::{Entry, Line, Owner, encode_listing, number, read_listing};
use super::tar::{self, Show};
use super::{FormatError, Sub};
use bytes::Bytes;
use std::collections::HashMap;
use std::io::BufReader;

pub use super::bundle::{
    BundleWriter, decode_head_part, decode_names, decode_table, encode_head_part, encode_names,
    encode_table,
};
pub use super::content::{BLOCK_SIZE_MAX, apply_content};
pub use super::dropped::{
    Dropped, DroppedAt, DroppedId, DroppedList, DroppedRow, decode_dropped, encode_dropped,
};

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

/// The most lines of a listing in a part.
pub const LINES_MAX: usize = 10_000_000;

const WHAT: &str = "part";
const LISTING: &[u8] = b"@listing";
const LISTING_DIFF: &[u8] = b"@listing-diff";
pub(super) const PLAIN: Show = Show { mode: 0o600, uid: 0, gid: 0, mtime: 0 };

/// `@` marks our own suffixes, `%` this escape; every other byte of a name stands for itself.
fn put_name(name: &[u8], out: &mut Vec<u8>) {
    for &byte in name {
        match byte {
            b'@' => out.extend_from_slice(b"%40"),
            b'%' => out.extend_from_slice(b"%25"),
            _ => out.push(byte),
        }
    }
}

fn take_name(text: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'%' => {
                let (code, after) = rest.split_at_checked(2)?;
                name.push(match code {
                    b"40" => b'@',
                    b"25" => b'%',
                    _ => return None,
                });
                rest = after;
            }
            b'@' => return None,
            _ => name.push(byte),
        }
    }
    is_name(&name).then_some(name)
}

fn is_of_base(line: &Line) -> bool {
    matches!(line, Line::Dir { .. } | Line::Set { .. })
}

/// Whether a base could hold this.
fn stands_alone(part: &Part) -> bool {
    part.lines.iter().all(is_of_base)
        && part.members.iter().all(|member| matches!(member.content, Content::Whole(_)))
}

/// A part as one zstd frame of a tar. `folder_path` (bytes, `/` between the names, empty for the
/// root folder) is for people: members are named below it, and no decoder uses it.
///
/// The listing comes first, as `@listing`, or as `@listing-diff` if the part has what no base
/// can have. Names must be legal, blocks at most [`BLOCK_SIZE_MAX`] and in ascending order.
pub fn encode_part(part: &Part, folder_path: &[u8]) -> Vec<u8> {
    let mut prefix = Vec::new();
    let start = folder_path.iter().position(|&b| b != b'/').unwrap_or(folder_path.len());
    let path = &folder_path[start..];
    prefix.extend_from_slice(if path.is_empty() { b"." } else { path });
    prefix.push(b'/');
    let mut shows = HashMap::new();
    for line in &part.lines {
        if let Line::Set { sub, name, entry: Entry::Local { attrs, .. } } = line {
            let owner = attrs.owner.unwrap_or(Owner { uid: 0, gid: 0 });
            let mtime = u64::try_from(attrs.mtime.secs).unwrap_or(0);
            let show = Show { mode: attrs.mode, uid: owner.uid, gid: owner.gid, mtime };
            shows.insert((*sub, name.as_slice()), show);
        }
    }
    let mut raw = Vec::new();
    let mut name = prefix.clone();
    name.extend_from_slice(if stands_alone(part) { LISTING } else { LISTING_DIFF });
    tar::put(&mut raw, &name, encode_listing(part.lines.iter()).as_bytes(), PLAIN);
    for member in &part.members {
        name.truncate(prefix.len());
        if member.sub != Sub::Own {
            name.extend_from_slice(member.sub.as_str().as_bytes());
            name.push(b'/');
        }
        put_name(&member.name, &mut name);
        let show = shows.get(&(member.sub, member.name.as_slice())).copied().unwrap_or(PLAIN);
        match &member.content {
            Content::Whole(bytes) => tar::put(&mut raw, &name, bytes, show),
            Content::Tail { offset, bytes } => {
                name.extend_from_slice(format!("@tail-{offset}").as_bytes());
                tar::put(&mut raw, &name, bytes, show);
            }
            Content::Blocks { size, block_size, blocks } => {
                name.extend_from_slice(format!("@blocks-{size}-{block_size}").as_bytes());
                tar::put(&mut raw, &name, &put_blocks(blocks), show);
            }
        }
    }
    tar::finish(&mut raw);
    compress(&raw)
}

/// A member from its name below the prefix, and its bytes.
fn take_member(text: &[u8], bytes: Bytes) -> Option<Member> {
    let (sub, text) = match text.iter().position(|&b| b == b'/') {
        Some(at) => (Sub::from_name(&text[..at])?, &text[at + 1..]),
        None => (Sub::Own, text),
    };
    let Some(at) = text.iter().rposition(|&b| b == b'@') else {
        let content = Content::Whole(bytes);
        return Some(Member { sub, name: take_name(text)?, content });
    };
    let name = take_name(&text[..at])?;
    let suffix = std::str::from_utf8(&text[at + 1..]).ok()?;
    let content = if let Some(offset) = suffix.strip_prefix("tail-") {
        let offset = number(offset)?;
        offset.checked_add(bytes.len() as u64)?;
        Content::Tail { offset, bytes }
    } else {
        let (size, block_size) = suffix.strip_prefix("blocks-")?.split_once('-')?;
        let size = number(size)?;
        let block_size = u32::try_from(number(block_size)?).ok()?;
        Content::Blocks { size, block_size, blocks: take_blocks(&bytes, size, block_size)? }
    };
    Some(Member { sub, name, content })
}

/// Reads what [`encode_part`] wrote. `limit` bounds the bytes after decompression.
///
/// # Errors
/// [`FormatError::TooLarge`], [`FormatError::TooNew`] for a listing of a newer version,
/// [`FormatError::Malformed`] for anything else.
pub fn decode_part(bytes: &[u8], limit: u64) -> Result<Part, FormatError> {
    let mut lines = Vec::new();
    let members = read_part(bytes, limit, |line| lines.push(line))?;
    Ok(Part { lines, members })
}

/// The same, with the listing a line at a time: a large folder's lines together take many times
/// the room that is needed for what they say. What was given before an error must be thrown away.
///
/// # Errors
/// Those of [`decode_part`].
pub fn read_part(
    bytes: &[u8],
    limit: u64,
    mut each: impl FnMut(Line),
) -> Result<Vec<Member>, FormatError> {
    let source = BufReader::with_capacity(64 << 10, frame::Content::of(bytes, limit)?);
    let mut tar = tar::Members::new(source);
    let no_listing = || FormatError::malformed(WHAT, "does not start with a listing");
    let first = tar.next_member()?.ok_or_else(no_listing)?;
    let cut = first.iter().rposition(|&b| b == b'/').ok_or_else(no_listing)? + 1;
    let (prefix, word) = first.split_at(cut);
    if word != LISTING && word != LISTING_DIFF {
        return Err(no_listing());
    }
    let mut alone = true;
    tar.read_content(|source| {
        read_listing(source, LINES_MAX, |line| {
            alone &= is_of_base(&line);
            each(line);
        })
    })?;
    let mut members = Vec::new();
    while let Some(name) = tar.next_member()? {
        let bytes = Bytes::from(tar.content()?);
        let member = name.strip_prefix(prefix).and_then(|text| take_member(text, bytes));
        let member = member.ok_or_else(|| {
            let name = clip(&String::from_utf8_lossy(&name));
            FormatError::malformed(WHAT, format!("member {name}"))
        })?;
        alone &= matches!(member.content, Content::Whole(_));
        members.push(member);
    }
    tar.into_source().into_inner().end()?;
    if word == LISTING && !alone {
        return Err(FormatError::malformed(WHAT, "a base with changes in it"));
    }
    Ok(members)
}

/// Only the listing, a line at a time; the members are not looked at.
///
/// # Errors
/// Those of [`decode_part`]; of the source's end, none.
pub fn read_part_listing(
    bytes: &[u8],
    limit: u64,
    each: impl FnMut(Line),
) -> Result<(), FormatError> {
    let source = BufReader::with_capacity(64 << 10, frame::Content::of(bytes, limit)?);
    let mut tar = tar::Members::new(source);
    let no_listing = || FormatError::malformed(WHAT, "does not start with a listing");
    let first = tar.next_member()?.ok_or_else(no_listing)?;
    let word = first.rsplit(|&b| b == b'/').next().unwrap_or_default();
    if word != LISTING && word != LISTING_DIFF {
        return Err(no_listing());
    }
    tar.read_content(|source| read_listing(source, LINES_MAX, each))
}
