//! Listings: what the names in a folder stand for. Text: a header line, then a line for each
//! [`Line`], its fields separated by tabs.
//!
//! A line says the whole truth about its name, so that lines can be applied again, and the last
//! one about a name wins. The journal holds the same lines.

use super::escape::{clip, escape_into, unescape, unescape_name};
use super::{FormatError, ObjectId, Sub, Timestamp, key::KeyTail};
use std::fmt::Write;
use std::io::BufRead;

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

/// The version of the listing format that this code writes, and the newest it reads.
pub const LISTING_VERSION: u32 = 1;
/// The longest target of a symbolic link, in bytes (PATH_MAX without its NUL).
pub const TARGET_MAX: usize = 4095;

const HEADER: &str = "vmailfs listing ";

/// Writing to a string cannot fail.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => { let _ = write!($out, $($arg)*); };
}

fn put_owner(owner: Option<Owner>, out: &mut String) {
    match owner {
        Some(Owner { uid, gid }) => {
            put!(out, "\t{uid}:{gid}");
        }
        None => out.push_str("\t-"),
    }
}

fn put_attrs(attrs: &Attrs, out: &mut String) {
    put!(out, "\t{:04o}", attrs.mode & 0o7777);
    put_owner(attrs.owner, out);
    put!(out, "\t{}", attrs.mtime);
}

/// Appends the line to `out`, without a line end. What cannot be decoded again (an illegal name,
/// extents with gaps, a target above [`TARGET_MAX`]) must not be given; debug builds panic.
pub fn encode_line(line: &Line, out: &mut String) {
    let start = out.len();
    put_line(line, out);
    debug_assert!(parse_line(&out[start..]).is_some(), "cannot be decoded: {}", &out[start..]);
}

fn put_line(line: &Line, out: &mut String) {
    match line {
        Line::Dir { sub, attrs } => {
            put!(out, "dir\t{}", sub.as_str());
            put_attrs(attrs, out);
        }
        Line::NoDir { sub } => {
            put!(out, "nodir\t{}", sub.as_str());
        }
        Line::Unset { sub, name } => {
            put!(out, "gone\t{}\t", sub.as_str());
            escape_into(name, out);
        }
        Line::Set { sub, name, entry } => {
            let (word, attrs) = match entry {
                Entry::Mail { attrs, .. } => ("mail", attrs),
                Entry::Extents { attrs, .. } => ("grow", attrs),
                Entry::Local { attrs, .. } => ("file", attrs),
                Entry::Symlink { attrs, .. } => ("link", attrs),
            };
            put!(out, "{word}\t{}\t", sub.as_str());
            escape_into(name, out);
            out.push('\t');
            match entry {
                Entry::Mail { size, .. }
                | Entry::Extents { size, .. }
                | Entry::Local { size, .. } => {
                    put!(out, "{size}");
                }
                Entry::Symlink { target, .. } => escape_into(target, out),
            }
            put_attrs(attrs, out);
            match entry {
                Entry::Mail { object, .. } => {
                    put!(out, "\t{object}");
                }
                Entry::Extents { extents, .. } => {
                    put!(out, "\t{}", extents.len());
                    for Extent { offset, len, object } in extents {
                        put!(out, "\t{offset}:{len}:{object}");
                    }
                }
                Entry::Local { object: Some(object), .. } => {
                    put!(out, "\t{object}");
                }
                Entry::Local { object: None, .. } => out.push_str("\t-"),
                Entry::Symlink { .. } => {}
            }
        }
    }
}

/// The fields of a line of text. Each reader answers `None` where the line is not as it should be.
pub(super) struct Fields<'a>(std::str::Split<'a, char>);

impl<'a> Fields<'a> {
    pub(super) fn new(line: &'a str) -> Fields<'a> {
        Fields(line.split('\t'))
    }

    pub(super) fn text(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    pub(super) fn parse<T: std::str::FromStr>(&mut self) -> Option<T> {
        self.text()?.parse().ok()
    }

    pub(super) fn number(&mut self) -> Option<u64> {
        number(self.text()?)
    }

    pub(super) fn name(&mut self) -> Option<Vec<u8>> {
        unescape_name(self.text()?).ok()
    }

    pub(super) fn mode(&mut self) -> Option<u32> {
        mode(self.text()?)
    }

    pub(super) fn owner(&mut self) -> Option<Owner> {
        owner(self.text()?)
    }

    fn attrs(&mut self) -> Option<Attrs> {
        let mode = self.mode()?;
        let owner = match self.text()? {
            "-" => None,
            text => Some(owner(text)?),
        };
        Some(Attrs { mode, owner, mtime: mtime(self.text()?)? })
    }

    fn extents(&mut self, size: u64) -> Option<Vec<Extent>> {
        // The count is not trusted with an allocation: the fields are there or they are not.
        let count = self.number()?;
        let mut extents = Vec::new();
        let mut end = 0u64;
        for _ in 0..count {
            let mut parts = self.text()?.splitn(3, ':');
            let offset = number(parts.next()?)?;
            let len = number(parts.next()?)?;
            let object = KeyTail::parse(parts.next()?).ok()?;
            if offset != end {
                return None;
            }
            end = offset.checked_add(len)?;
            extents.push(Extent { offset, len, object });
        }
        (end == size).then_some(extents)
    }

    /// That nothing follows.
    pub(super) fn end(&mut self) -> Option<()> {
        self.0.next().is_none().then_some(())
    }
}

/// Unsigned decimal as Rust prints it: no sign, no leading zeros.
pub(super) fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    text.parse().ok()
}

/// Exactly `digits` lower case hex digits.
pub(super) fn hex(text: &str, digits: usize) -> Option<u64> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if text.len() != digits || !text.bytes().all(lower) {
        return None;
    }
    u64::from_str_radix(text, 16).ok()
}

/// Four octal digits.
pub(super) fn mode(text: &str) -> Option<u32> {
    if text.len() != 4 || !text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
        return None;
    }
    u32::from_str_radix(text, 8).ok()
}

fn owner(text: &str) -> Option<Owner> {
    let (uid, gid) = text.split_once(':')?;
    let id = |text| u32::try_from(number(text)?).ok();
    Some(Owner { uid: id(uid)?, gid: id(gid)? })
}

fn mtime(text: &str) -> Option<Timestamp> {
    let secs = text.split_once('.')?.0;
    let digits = match secs.strip_prefix('-') {
        Some("0") => return None,
        Some(digits) => digits,
        None => secs,
    };
    number(digits)?;
    text.parse().ok()
}

fn parse_line(text: &str) -> Option<Line> {
    let mut fields = Fields::new(text);
    let word = fields.text()?;
    let sub: Sub = fields.parse()?;
    let line = match word {
        "dir" => Line::Dir { sub, attrs: fields.attrs()? },
        "nodir" if sub != Sub::Own => Line::NoDir { sub },
        "gone" => Line::Unset { sub, name: fields.name()? },
        "mail" | "grow" | "file" => {
            let name = fields.name()?;
            let size = fields.number()?;
            let attrs = fields.attrs()?;
            let entry = match word {
                "mail" => {
                    let object = KeyTail::parse(fields.text()?).ok()?;
                    Entry::Mail { size, attrs, object }
                }
                "grow" => Entry::Extents { size, attrs, extents: fields.extents(size)? },
                _ => {
                    let object = match fields.text()? {
                        "-" => None,
                        id => Some(id.parse().ok()?),
                    };
                    Entry::Local { size, attrs, object }
                }
            };
            Line::Set { sub, name, entry }
        }
        "link" => {
            let name = fields.name()?;
            let target = unescape(fields.text()?).ok()?;
            if target.is_empty() || target.len() > TARGET_MAX || target.contains(&0) {
                return None;
            }
            Line::Set { sub, name, entry: Entry::Symlink { target, attrs: fields.attrs()? } }
        }
        _ => return None,
    };
    fields.end()?;
    Some(line)
}

/// Reads what [`encode_line`] wrote.
///
/// # Errors
/// [`FormatError::Malformed`] for any other text. Names are 1 to 255 bytes without `/` and NUL,
/// and not `.` or `..`; extents follow each other without gap from 0 to the file's size.
pub fn decode_line(text: &str) -> Result<Line, FormatError> {
    parse_line(text).ok_or_else(|| FormatError::malformed("listing line", clip(text)))
}

/// A listing as text: the header, then one line for each.
pub fn encode_listing<'a>(lines: impl Iterator<Item = &'a Line>) -> String {
    let mut out = format!("{HEADER}{LISTING_VERSION}\n");
    for line in lines {
        encode_line(line, &mut out);
        out.push('\n');
    }
    out
}

/// Reads what [`encode_listing`] wrote. A name may occur more than once; the last line counts.
///
/// # Errors
/// [`FormatError::TooNew`]; [`FormatError::TooLarge`] (its limit is in lines here) for more than
/// `max_lines` lines below the header; [`FormatError::Malformed`] for anything else that is
/// wrong, a last line that does not end included.
pub fn decode_listing(mut bytes: &[u8], max_lines: usize) -> Result<Vec<Line>, FormatError> {
    let mut lines = Vec::new();
    read_listing(&mut bytes, max_lines, |line| lines.push(line))?;
    Ok(lines)
}

/// The same, a line at a time, from a source that is read to its end. What was given before an
/// error must be thrown away.
///
/// # Errors
/// Those of [`decode_listing`]; of the source's own, [`FormatError::Malformed`].
pub fn read_listing(
    source: &mut impl BufRead,
    max_lines: usize,
    mut each: impl FnMut(Line),
) -> Result<(), FormatError> {
    let what = "listing";
    let mut buf = Vec::new();
    let mut start = 0;
    for number in 1.. {
        buf.clear();
        source.read_until(b'\n', &mut buf).map_err(|e| FormatError::from_io(what, e))?;
        if buf.is_empty() && number > 1 {
            break;
        }
        let text = std::str::from_utf8(&buf).map_err(|e| {
            FormatError::malformed(what, format!("not text at byte {}", start + e.valid_up_to()))
        })?;
        start += buf.len();
        let text = text
            .strip_suffix('\n')
            .ok_or_else(|| FormatError::malformed(what, "does not end with a line end"))?;
        if number == 1 {
            check_header(what, HEADER, text, LISTING_VERSION)?;
            continue;
        }
        if number - 2 == max_lines {
            return Err(FormatError::TooLarge { what, limit: max_lines as u64 });
        }
        let bad = || FormatError::malformed(what, format!("line {number}: {}", clip(text)));
        each(parse_line(text).ok_or_else(bad)?);
    }
    Ok(())
}

/// Checks a header line `<start><version>`; what follows the version after a space is ignored
/// by this check, so that a newer version is told apart whatever it has there.
pub(super) fn check_header(
    what: &'static str,
    start: &str,
    line: &str,
    known: u32,
) -> Result<(), FormatError> {
    let version = line
        .strip_prefix(start)
        .and_then(|rest| number(rest.split(' ').next()?))
        .ok_or_else(|| FormatError::malformed(what, format!("header: {}", clip(line))))?;
    match u32::try_from(version).unwrap_or(u32::MAX) {
        found if found > known => Err(FormatError::TooNew { what, found, known }),
        0 => Err(FormatError::malformed(what, "version 0")),
        _ => Ok(()),
    }
}
