//! Mails in a dbox file: `m.N` of mdbox, `u.N` of sdbox.
//!
//! A header line (`2 M1e C<hex>`), then mails: a header of 30 bytes with the body's size, the
//! body, a trailer of lines. What is given here may be any range of a file that begins where an
//! append began, and may end, or have a hole, anywhere.

use std::collections::BTreeMap;

use super::guid::guid_128;

/// The message header's size, which the file's header line repeats.
const MESSAGE_HEADER: usize = 30;
const MAGIC: &[u8] = b"\x01\x02N";
const TRAILER_MAGIC: &[u8] = b"\n\x01\x03\n";
/// A trailer longer than this is damage.
const MAX_TRAILER: usize = 256 << 10;

/// A mail found in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DboxMail {
    /// Where its header begins in the file.
    pub offset: u64,
    /// From there to the end of its trailer.
    pub size: u64,
    /// Of the body as stored.
    pub body_size: u64,
    /// As the index holds it.
    pub guid: [u8; 16],
    /// Seconds since 1970, from the `R` line.
    pub received: Option<u64>,
    /// The folder it was saved to, from the `B` line (mdbox).
    pub folder: Option<Vec<u8>>,
}

/// What a range of a file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DboxScan {
    pub mails: Vec<DboxMail>,
    /// Bytes that belong to no whole mail: the file's header, a torn end, damage.
    pub other_bytes: u64,
}

/// Finds the whole mails in `data`, which lies at `base` in its file.
pub fn scan(base: u64, data: &[u8]) -> DboxScan {
    let mut found = DboxScan::default();
    let mut at = 0;
    if base == 0 {
        at = file_header_len(data).unwrap_or(0);
    }
    found.other_bytes = at as u64;
    while at < data.len() {
        if let Some((mail, size)) = mail_at(base, data, at) {
            found.mails.push(mail);
            at += size;
            continue;
        }
        // Torn or damaged: go on at the next thing that begins like a mail.
        let next = (at + 1..data.len()).find(|p| data[*p..].starts_with(MAGIC));
        let next = next.unwrap_or(data.len());
        found.other_bytes += (next - at) as u64;
        at = next;
    }
    found
}

fn file_header_len(data: &[u8]) -> Option<usize> {
    let line = data.get(..data.len().min(256))?;
    let end = line.iter().position(|b| *b == b'\n')?;
    line.starts_with(b"2 ").then_some(end + 1)
}

fn mail_at(base: u64, data: &[u8], at: usize) -> Option<(DboxMail, usize)> {
    let rest = data.get(at..)?;
    let header = rest.get(..MESSAGE_HEADER)?;
    if !header.starts_with(MAGIC) || header[MESSAGE_HEADER - 1] != b'\n' {
        return None;
    }
    let body_size = usize::try_from(hex(header.get(13..29)?)?).ok()?;
    let trailer_at = MESSAGE_HEADER.checked_add(body_size)?;
    let trailer = rest.get(trailer_at..)?.strip_prefix(TRAILER_MAGIC)?;
    let trailer = trailer.get(..trailer.len().min(MAX_TRAILER))?;
    let (mut guid, mut received, mut folder) = (None, None, None);
    let mut used = 0;
    loop {
        let line_len = trailer.get(used..)?.iter().position(|b| *b == b'\n')?;
        let line = trailer.get(used..used + line_len)?;
        used += line_len + 1;
        // A torn trailer runs into the next mail.
        if line.contains(&1) {
            return None;
        }
        match line.split_first() {
            None | Some((b' ', _)) => break,
            Some((b'G', text)) if guid.is_none() && !text.is_empty() => guid = Some(guid_128(text)),
            Some((b'R', text)) => received = hex(text),
            Some((b'B', text)) => folder = Some(text.to_vec()),
            Some((b'A'..=b'Z', _)) => {}
            Some(_) => return None,
        }
    }
    let size = trailer_at + TRAILER_MAGIC.len() + used;
    let mail = DboxMail {
        offset: base.checked_add(at as u64)?,
        size: size as u64,
        body_size: body_size as u64,
        guid: guid?,
        received,
        folder,
    };
    Some((mail, size))
}

fn hex(digits: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Puts ranges of files that touch or overlap together; a later one in the list wins where they
/// overlap, as a later extent does. Keyed by (file number, offset).
pub fn merge_ranges<'a>(
    ranges: impl Iterator<Item = (u32, u64, &'a [u8])>,
) -> BTreeMap<(u32, u64), Vec<u8>> {
    let mut merged: BTreeMap<(u32, u64), Vec<u8>> = BTreeMap::new();
    for (file, mut offset, bytes) in ranges {
        // The usual case: the extents of a file in order.
        let last = merged.range_mut((file, 0)..=(file, u64::MAX)).next_back();
        if let Some(((_, start), last)) = last
            && start.checked_add(last.len() as u64) == Some(offset)
        {
            last.extend_from_slice(bytes);
            continue;
        }
        let mut bytes = bytes.to_vec();
        // Nothing real lies at the end of what 64 bits can count.
        let Some(end) = offset.checked_add(bytes.len() as u64) else { continue };
        let touching: Vec<u64> = merged
            .range((file, 0)..=(file, end))
            .filter(|((_, start), data)| start.saturating_add(data.len() as u64) >= offset)
            .map(|((_, start), _)| *start)
            .collect();
        for start in touching {
            let Some(old) = merged.remove(&(file, start)) else { continue };
            let old_end = start + old.len() as u64;
            let new_end = offset + bytes.len() as u64;
            if old_end > new_end {
                bytes.extend_from_slice(&old[(new_end - start) as usize..]);
            }
            if start < offset {
                let mut joined = old[..(offset - start) as usize].to_vec();
                joined.append(&mut bytes);
                bytes = joined;
                offset = start;
            }
        }
        merged.insert((file, offset), bytes);
    }
    merged
}

#[cfg(test)]
pub(crate) fn test_mail(body: &[u8], guid: u8, folder: &str) -> Vec<u8> {
    let mut out = format!("\x01\x02N          {:016x}\n", body.len()).into_bytes();
    out.extend_from_slice(body);
    out.extend_from_slice(
        format!(
            "\n\x01\x03\nR65a00000\nV{:x}\nG{}\nB{folder}\n\n",
            body.len(),
            format!("{guid:02x}").repeat(16)
        )
        .as_bytes(),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mails_are_found_whole() {
        let mut file = b"2 M1e C65a00000\n".to_vec();
        let start = file.len() as u64;
        let one = test_mail(b"hello\n", 1, "INBOX");
        file.extend_from_slice(&one);
        file.extend_from_slice(&test_mail(b"", 2, "A/B"));
        let found = scan(0, &file);
        assert_eq!(found.other_bytes, start);
        assert_eq!(found.mails.len(), 2);
        let first = &found.mails[0];
        assert_eq!((first.offset, first.size, first.body_size), (start, one.len() as u64, 6));
        assert_eq!((first.guid, first.received), ([1; 16], Some(0x65a0_0000)));
        assert_eq!(found.mails[1].folder.as_deref(), Some(b"A/B".as_slice()));
        for cut in 0..one.len() {
            let found = scan(start, &file[start as usize..start as usize + cut]);
            assert!(found.mails.is_empty(), "{cut}");
        }
    }

    #[test]
    fn damage_hides_only_itself() {
        let mut data = test_mail(b"x", 1, "INBOX");
        data.truncate(data.len() - 3);
        data.extend_from_slice(&test_mail(b"y", 2, "INBOX"));
        let found = scan(500, &data);
        assert_eq!(found.mails.len(), 1);
        assert_eq!(found.mails[0].guid, [2; 16]);
    }

    #[test]
    fn ranges_join() {
        let pieces: [(u32, u64, &[u8]); 5] =
            [(1, 10, b"cd"), (1, 8, b"ab"), (2, 12, b"zz"), (1, 11, b"DE"), (1, 20, b"far")];
        let merged = merge_ranges(pieces.into_iter());
        let want: Vec<((u32, u64), &[u8])> =
            vec![((1, 8), b"abcDE"), ((1, 20), b"far"), ((2, 12), b"zz")];
        let got: Vec<_> = merged.iter().map(|(k, v)| (*k, v.as_slice())).collect();
        assert_eq!(got, want);
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(base: u64, data: Vec<u8>, flips: Vec<(u16, u8)>) {
            let _ = scan(base, &data);
            let mut mails = test_mail(b"hello", 1, "INBOX");
            mails.extend(test_mail(b"world", 2, "INBOX"));
            for (at, byte) in flips {
                let at = usize::from(at) % mails.len();
                mails[at] = byte;
            }
            let _ = scan(base, &mails);
            let _ = scan(0, &mails);
        }

        #[test]
        fn joined_ranges_hold_the_last_bytes(
            pieces in proptest::collection::vec((0u64..30, proptest::collection::vec(0u8.., 1..8)), 0..8)
        ) {
            let mut model = BTreeMap::new();
            for (at, bytes) in &pieces {
                for (i, b) in bytes.iter().enumerate() {
                    model.insert(at + i as u64, *b);
                }
            }
            let merged = merge_ranges(pieces.iter().map(|(at, b)| (1, *at, b.as_slice())));
            let got: BTreeMap<u64, u8> = merged
                .iter()
                .flat_map(|((_, at), d)| d.iter().enumerate().map(move |(i, b)| (at + i as u64, *b)))
                .collect();
            proptest::prop_assert_eq!(got, model);
        }
    }
}
