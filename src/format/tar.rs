//! The little of tar that parts need: regular files, with GNU's long names.
//!
//! Our own, because what is read is not trusted: one form only, no sparse files (whose size is
//! whatever their header says), no links, no names that are paths of this machine.

use super::FormatError;
use std::io::{self, BufRead, Read};

pub(super) const BLOCK: usize = 512;
const WHAT: &str = "part";
const NAME_LEN: usize = 100;
/// The longest member name, in bytes, that is read: more than any path of folders.
const LONG_NAME_MAX: u64 = 64 << 10;
const LONG_NAME: &[u8] = b"././@LongLink";
const OCTAL_MAX: u64 = (1 << 33) - 1;

/// What `tar -tv` shows of a member; not read back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Show {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
}

/// Octal with a final NUL, or GNU's big-endian binary for what does not fit.
fn put_number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    if digits < 21 && value >> (3 * digits) != 0 {
        let bytes = value.to_be_bytes();
        let from = field.len().saturating_sub(bytes.len());
        let width = field.len() - from;
        field[from..].copy_from_slice(&bytes[bytes.len() - width..]);
        field[0] |= 0x80;
        return;
    }
    for (index, byte) in field[..digits].iter_mut().enumerate() {
        let shift = 3 * (digits - 1 - index);
        *byte = b'0' + (value.checked_shr(shift as u32).unwrap_or(0) & 7) as u8;
    }
}

fn header(name: &[u8], kind: u8, size: u64, show: Show) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let short = name.len().min(NAME_LEN);
    block[..short].copy_from_slice(&name[..short]);
    put_number(&mut block[100..108], u64::from(show.mode & 0o7777));
    put_number(&mut block[108..116], u64::from(show.uid));
    put_number(&mut block[116..124], u64::from(show.gid));
    put_number(&mut block[124..136], size);
    put_number(&mut block[136..148], show.mtime.min(OCTAL_MAX));
    block[148..156].fill(b' ');
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar  \0");
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    put_number(&mut block[148..155], sum);
    block
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// Appends a member.
pub(super) fn put(out: &mut Vec<u8>, name: &[u8], content: &[u8], show: Show) {
    if name.len() > NAME_LEN {
        let root = Show { mode: 0o644, uid: 0, gid: 0, mtime: 0 };
        out.extend_from_slice(&header(LONG_NAME, b'L', name.len() as u64 + 1, root));
        out.extend_from_slice(name);
        out.push(0);
        pad(out);
    }
    out.extend_from_slice(&header(name, b'0', content.len() as u64, show));
    out.extend_from_slice(content);
    pad(out);
}

/// Appends the end mark: two blocks of zeros.
pub(super) fn finish(out: &mut Vec<u8>) {
    out.resize(out.len() + 2 * BLOCK, 0);
}

fn take_number(field: &[u8]) -> Option<u64> {
    if let [0x80, 0, 0, 0, low @ ..] = field {
        return Some(u64::from_be_bytes(low.try_into().ok()?));
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if text.is_empty() || !text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
        return None;
    }
    u64::from_str_radix(text, 8).ok()
}

/// The members of a tar, as they come.
#[derive(Debug)]
pub(super) struct Members<R> {
    source: R,
    /// Bytes of the source that were read or are content that may be read.
    at: u64,
    /// Of the present member: bytes of content that were not read, and what pads it.
    left: u64,
    padding: u64,
}

impl<R: BufRead> Members<R> {
    pub(super) fn new(source: R) -> Members<R> {
        Members { source, at: 0, left: 0, padding: 0 }
    }

    /// What the members were read from, at the end of the last one that was asked for.
    pub(super) fn into_source(self) -> R {
        self.source
    }

    fn bad(&self) -> FormatError {
        FormatError::malformed(WHAT, format!("bad tar member at byte {}", self.at))
    }

    fn broken(&self, error: io::Error) -> FormatError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.bad(),
            _ => FormatError::from_io(WHAT, error),
        }
    }

    fn block(&mut self) -> Result<[u8; BLOCK], FormatError> {
        let mut block = [0; BLOCK];
        self.source.read_exact(&mut block).map_err(|e| self.broken(e))?;
        self.at += BLOCK as u64;
        Ok(block)
    }

    /// The end mark was begun; it must be whole, and the last.
    fn end(&mut self) -> Result<(), FormatError> {
        if self.block()?.iter().any(|&b| b != 0) {
            return Err(self.bad());
        }
        let rest = self.source.fill_buf().map_err(|e| FormatError::from_io(WHAT, e))?;
        if rest.is_empty() { Ok(()) } else { Err(self.bad()) }
    }

    /// Kind, short name and size; `None` for the end mark.
    fn header(&mut self) -> Result<Option<(u8, Vec<u8>, u64)>, FormatError> {
        let block = self.block()?;
        if block.iter().all(|&b| b == 0) {
            self.end()?;
            return Ok(None);
        }
        let blank = 8 * u64::from(b' ');
        let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
        let field: u64 = block[148..156].iter().map(|&b| u64::from(b)).sum();
        if take_number(&block[148..156]) != Some(sum - field + blank) {
            return Err(self.bad());
        }
        let name = &block[..NAME_LEN];
        let len = name.iter().position(|&b| b == 0).unwrap_or(NAME_LEN);
        let size = take_number(&block[124..136]).ok_or_else(|| self.bad())?;
        let padded = size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| self.bad())?;
        (self.left, self.padding) = (size, padded - size);
        Ok(Some((block[156], name[..len].to_vec(), size)))
    }

    /// The next member's name; what was not read of the last one is skipped. `None`: the end.
    pub(super) fn next_member(&mut self) -> Result<Option<Vec<u8>>, FormatError> {
        self.skip()?;
        let Some((kind, short, size)) = self.header()? else { return Ok(None) };
        match kind {
            b'0' => Ok(Some(short)),
            b'L' if size <= LONG_NAME_MAX => {
                let mut long = self.content()?;
                if long.pop() != Some(0) {
                    return Err(self.bad());
                }
                self.skip()?;
                match self.header()? {
                    Some((b'0', ..)) => Ok(Some(long)),
                    _ => Err(self.bad()),
                }
            }
            _ => Err(self.bad()),
        }
    }

    fn skip(&mut self) -> Result<(), FormatError> {
        let mut left = self.left.saturating_add(self.padding);
        self.at = self.at.saturating_add(left);
        (self.left, self.padding) = (0, 0);
        while left > 0 {
            let there = self.source.fill_buf().map_err(|e| FormatError::from_io(WHAT, e))?.len();
            let step = usize::try_from(left).unwrap_or(usize::MAX).min(there);
            if step == 0 {
                return Err(self.bad());
            }
            self.source.consume(step);
            left -= step as u64;
        }
        Ok(())
    }

    /// The present member's content. Its size is not trusted with an allocation.
    pub(super) fn content(&mut self) -> Result<Vec<u8>, FormatError> {
        let mut content = Vec::new();
        self.read_content(|source| {
            source.read_to_end(&mut content).map_err(|e| FormatError::from_io(WHAT, e))?;
            Ok(())
        })?;
        Ok(content)
    }

    /// Gives `read` the present member's content to read to its end.
    pub(super) fn read_content<T>(
        &mut self,
        read: impl FnOnce(&mut io::Take<&mut R>) -> Result<T, FormatError>,
    ) -> Result<T, FormatError> {
        let mut source = (&mut self.source).take(self.left);
        let value = read(&mut source)?;
        let short = source.limit();
        self.at += self.left - short;
        self.left = 0;
        // It ended before its size.
        if short > 0 { Err(self.bad()) } else { Ok(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for value in [0, 1, 0o7777, OCTAL_MAX, OCTAL_MAX + 1, u64::MAX] {
            let mut field = [0; 12];
            put_number(&mut field, value);
            assert_eq!(take_number(&field), Some(value));
        }
        let mut field = [0; 8];
        put_number(&mut field, 0o7654321);
        assert_eq!(&field, b"7654321\0");
        put_number(&mut field, u64::from(u32::MAX));
        assert_eq!(field, [0x80, 0, 0, 0, 255, 255, 255, 255]);
        for bad in [&[0x80; 8][..], &[0xff; 12], b"\0\0\0\0", b"12 4\0", b"8\0", b""] {
            assert_eq!(take_number(bad), None);
        }
    }
}
