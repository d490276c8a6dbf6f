//! File names are bytes; keys, listings and journals are ASCII text. Two escapings, both strict:
//! each byte string has exactly one text, and any other text is refused.
//!
//! [`escape`] serves text files, where `/`, `_` and most else may stand as they are. [`escape_key`]
//! serves one component of a store's key: only characters that every store, URL and file system
//! leaves alone, and never a `.` first.

use super::FormatError;

/// The longest file name, in bytes, as on Linux.
pub const NAME_MAX: usize = 255;

const UPPER_HEX: &[u8; 16] = b"0123456789ABCDEF";

fn push_hex(out: &mut String, lead: char, byte: u8) {
    out.push(lead);
    out.push(char::from(UPPER_HEX[usize::from(byte >> 4)]));
    out.push(char::from(UPPER_HEX[usize::from(byte & 15)]));
}

fn hex_digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'A'..=b'F' => Some(byte - b'A' + 10),
        _ => None,
    }
}

/// Undoes `lead XX`; `literal(byte, index)` says what stands for itself.
fn decode(text: &str, lead: u8, literal: impl Fn(u8, usize) -> bool) -> Option<Vec<u8>> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte == lead {
            let value = hex_digit(*bytes.get(at + 1)?)? << 4 | hex_digit(*bytes.get(at + 2)?)?;
            if literal(value, at) {
                return None;
            }
            out.push(value);
            at += 3;
        } else if literal(byte, at) {
            out.push(byte);
            at += 1;
        } else {
            return None;
        }
    }
    Some(out)
}

fn plain(byte: u8, _: usize) -> bool {
    (0x21..=0x7e).contains(&byte) && byte != b'%'
}

fn plain_in_key(byte: u8, at: usize) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'-' | b'@' | b',' | b'=')
        || (byte == b'.' && at > 0)
}

/// Bytes as one word of printable ASCII: 0x21 to 0x7e stand for themselves, but `%` and all
/// others are `%XX`. The empty string is `%-`. Three times as long at most.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    escape_into(bytes, &mut out);
    out
}

/// [`escape`], appending.
pub fn escape_into(bytes: &[u8], out: &mut String) {
    if bytes.is_empty() {
        out.push_str("%-");
    }
    for (at, &byte) in bytes.iter().enumerate() {
        if plain(byte, at) {
            out.push(char::from(byte));
        } else {
            push_hex(out, '%', byte);
        }
    }
}

/// The bytes that [`escape`] made this text of.
///
/// # Errors
/// [`FormatError::Malformed`] for any text that [`escape`] does not produce.
pub fn unescape(text: &str) -> Result<Vec<u8>, FormatError> {
    if text == "%-" {
        return Ok(Vec::new());
    }
    match decode(text, b'%', plain) {
        Some(bytes) if !bytes.is_empty() => Ok(bytes),
        _ => Err(FormatError::malformed("escaped text", clip(text))),
    }
}

/// Bytes as (part of) a component of a key: ASCII letters, digits and `-.@,=` stand for
/// themselves, all others are `_XX`, and so is a `.` at the start. Three times as long at most.
/// Never `.` or `..`; empty only for the empty string, which [`unescape_key`] refuses.
pub fn escape_key(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for (at, &byte) in bytes.iter().enumerate() {
        if plain_in_key(byte, at) {
            out.push(char::from(byte));
        } else {
            push_hex(&mut out, '_', byte);
        }
    }
    out
}

/// The bytes that [`escape_key`] made this text of.
///
/// # Errors
/// [`FormatError::Malformed`] for any text that [`escape_key`] does not produce, and for the
/// empty one.
pub fn unescape_key(text: &str) -> Result<Vec<u8>, FormatError> {
    match decode(text, b'_', plain_in_key) {
        Some(bytes) if !bytes.is_empty() => Ok(bytes),
        _ => Err(FormatError::malformed("escaped key", clip(text))),
    }
}

/// Whether a directory can hold a file of this name: 1 to 255 bytes, no `/`, no NUL, neither
/// `.` nor `..`.
pub fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_MAX
        && !name.contains(&b'/')
        && !name.contains(&0)
}

pub(super) fn unescape_name(text: &str) -> Result<Vec<u8>, FormatError> {
    let name = unescape(text)?;
    if is_name(&name) { Ok(name) } else { Err(FormatError::malformed("file name", clip(text))) }
}

/// The start of untrusted text, short enough for a log line.
pub(super) fn clip(text: &str) -> String {
    const KEEP: usize = 120;
    match text.char_indices().nth(KEEP) {
        Some((end, _)) => format!("{}...", text[..end].escape_debug()),
        None => text.escape_debug().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn looks() {
        assert_eq!(escape(b"1732.M1P2.host,S=12:2,S"), "1732.M1P2.host,S=12:2,S");
        assert_eq!(escape(b"a b%\t\xff"), "a%20b%25%09%FF");
        assert_eq!(escape(b""), "%-");
        assert_eq!(escape_key(b".Trash_1:2,S"), "_2ETrash_5F1_3A2,S");
        assert_eq!(escape_key(b"joe@example.com"), "joe@example.com");
        assert_eq!(escape_key(b".."), "_2E.");
    }

    #[test]
    fn only_one_text_for_each() {
        for bad in ["", "%", "%4", "%41", "%2f", "%-x", "x%-", "a b", "\u{e9}", "%\u{e9}1"] {
            assert!(unescape(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "_", "_4", "_41", "_2d", ".x", "a/b", "a b", "a_2Eb", "_\u{e9}1"] {
            assert!(unescape_key(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
            assert!(!is_name(bad));
        }
        for good in [&b"..."[..], b"-", b"\xff\n", &[b'x'; 255]] {
            assert!(is_name(good));
        }
    }

    proptest! {
        #[test]
        fn round_trip(bytes: Vec<u8>) {
            let text = escape(&bytes);
            prop_assert!(text.bytes().all(|b| (0x21..=0x7e).contains(&b)));
            prop_assert_eq!(unescape(&text).unwrap(), bytes.clone());
            let text = escape_key(&bytes);
            if bytes.is_empty() {
                prop_assert!(unescape_key(&text).is_err());
            } else {
                prop_assert_eq!(unescape_key(&text).unwrap(), bytes);
            }
        }

        #[test]
        fn any_text_is_refused_or_canonical(text in "[%_.\\-0-9A-Fa-z]{0,12}|\\PC{0,12}") {
            if let Ok(bytes) = unescape(&text) {
                prop_assert_eq!(escape(&bytes), text.clone());
            }
            if let Ok(bytes) = unescape_key(&text) {
                prop_assert_eq!(escape_key(&bytes), text);
            }
        }
    }
}
