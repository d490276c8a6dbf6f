//! Bundles: frames one after the other. Each is a part of a folder, a table, or an earlier head,
//! and is found by the byte range that the head names.

use super::dropped::DROPPED;
use super::frame::{self, compress, content_size};
use super::head::{PartKind, PartRef};
use super::listing::number;
use super::part::PLAIN;
use super::{FormatError, ObjectId, tar};
use bytes::Bytes;
use std::io::BufReader;

pub(super) const TABLE: &str = "@table";
const NAMES: &str = "@names";
const HEAD: &str = "@head";

fn one_member(name: &str, content: &[u8]) -> Vec<u8> {
    let mut raw = Vec::new();
    tar::put(&mut raw, name.as_bytes(), content, PLAIN);
    tar::finish(&mut raw);
    compress(&raw)
}

/// The content of the only member, which has one of these names.
fn take_one(
    bytes: &[u8],
    limit: u64,
    what: &'static str,
    names: &[&str],
) -> Result<Vec<u8>, FormatError> {
    let source = BufReader::new(frame::Content::of(bytes, limit)?);
    let mut tar = tar::Members::new(source);
    let bad = || FormatError::malformed(what, "not one member of the right name");
    let name = tar.next_member()?.ok_or_else(bad)?;
    let content = tar.content()?;
    if !names.iter().any(|n| n.as_bytes() == name) || tar.next_member()?.is_some() {
        return Err(bad());
    }
    tar.into_source().into_inner().end()?;
    Ok(content)
}

pub(super) fn table(name: &str, lines: impl Iterator<Item = String>) -> Vec<u8> {
    let mut text = String::new();
    for line in lines {
        text.push_str(&line);
        text.push('\n');
    }
    one_member(name, text.as_bytes())
}

pub(super) fn take_table(
    bytes: &[u8],
    limit: u64,
    names: &[&str],
) -> Result<Vec<String>, FormatError> {
    let what = "table";
    let text = String::from_utf8(take_one(bytes, limit, what, names)?)
        .map_err(|_| FormatError::malformed(what, "not text"))?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let text = text
        .strip_suffix('\n')
        .ok_or_else(|| FormatError::malformed(what, "does not end with a line end"))?;
    Ok(text.split('\n').map(str::to_string).collect())
}

/// A table as a frame: a tar with one member `@table`. Lines must not contain line ends.
pub fn encode_table(lines: &[String]) -> Vec<u8> {
    table(TABLE, lines.iter().cloned())
}

/// The lines of a table, also of one made by [`encode_names`] or
/// [`super::dropped::encode_dropped`]. `limit` bounds the bytes after decompression.
///
/// # Errors
/// [`FormatError::TooLarge`], [`FormatError::Malformed`].
pub fn decode_table(bytes: &[u8], limit: u64) -> Result<Vec<String>, FormatError> {
    take_table(bytes, limit, &[TABLE, NAMES, DROPPED])
}

/// Objects with more than one name and how many they have, as a table `@names`. In a diff a
/// count of 0 or 1 takes the object out.
pub fn encode_names(names: &[(ObjectId, u32)]) -> Vec<u8> {
    table(NAMES, names.iter().map(|(id, count)| format!("{id}\t{count}")))
}

/// Reads what [`encode_names`] wrote.
///
/// # Errors
/// As [`decode_table`].
pub fn decode_names(bytes: &[u8], limit: u64) -> Result<Vec<(ObjectId, u32)>, FormatError> {
    let take = |line: &String| {
        let (id, count) = line.split_once('\t')?;
        Some((id.parse().ok()?, u32::try_from(number(count)?).ok()?))
    };
    let lines = take_table(bytes, limit, &[TABLE, NAMES])?;
    let bad = |line| FormatError::malformed("names", super::escape::clip(line));
    lines.iter().map(|line| take(line).ok_or_else(|| bad(line))).collect()
}

/// An encoded head as a frame: a tar with one member `@head`.
pub fn encode_head_part(head: &[u8]) -> Vec<u8> {
    one_member(HEAD, head)
}

/// The encoded head in a frame. `limit` bounds the bytes after decompression.
///
/// # Errors
/// [`FormatError::TooLarge`], [`FormatError::Malformed`].
pub fn decode_head_part(bytes: &[u8], limit: u64) -> Result<Vec<u8>, FormatError> {
    take_one(bytes, limit, "head part", &[HEAD])
}

/// Collects the frames of a bundle.
#[derive(Debug)]
pub struct BundleWriter {
    id: ObjectId,
    bytes: Vec<u8>,
}

impl BundleWriter {
    pub fn new(id: ObjectId) -> BundleWriter {
        BundleWriter { id, bytes: Vec::new() }
    }

    /// Appends a frame that one of the encoders of [`super::part`] made; says where it lies.
    pub fn add(&mut self, kind: PartKind, frame: &[u8]) -> PartRef {
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(frame);
        PartRef {
            bundle: self.id,
            offset,
            len: frame.len() as u64,
            crc: crc32c::crc32c(frame),
            kind,
            raw_len: content_size(frame),
        }
    }

    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Bytes so far.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The object's bytes.
    pub fn finish(self) -> Bytes {
        self.bytes.into()
    }
}
