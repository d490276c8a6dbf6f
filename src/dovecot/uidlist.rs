//! `dovecot-uidlist`: UIDVALIDITY, next-UID and the UID of each mail of a Maildir folder.
//!
//! A header line, `3 V<uidvalidity> N<next uid> G<guid>`, then a line a mail, `<uid> ... :<base
//! name>`, ascending. A delivery appends a line and leaves the header alone, so next-UID is the
//! larger of `N` and the last UID + 1. Dovecot rewrites the whole file now and then.

/// A header line longer than this is damage.
const MAX_HEADER: usize = 4096;

/// Why a file is no uidlist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UidListError {
    #[error("the uidlist has no whole header line")]
    NoHeader,
    #[error("the uidlist's header is not of version 3")]
    Version,
    #[error("the uidlist's header lacks UIDVALIDITY or next-UID")]
    Incomplete,
}

/// What a uidlist tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UidList {
    pub uid_validity: u32,
    /// The header's `N`.
    pub header_next_uid: u32,
    /// The largest UID of a line; 0 when there is none.
    pub last_uid: u32,
    /// Whole lines after the header.
    pub lines: usize,
}

impl UidList {
    /// The UID that the next mail gets.
    pub fn next_uid(&self) -> u32 {
        self.header_next_uid.max(self.last_uid.saturating_add(1))
    }
}

/// Where in the header line the number of `N` lies, and both numbers.
struct Header {
    uid_validity: u32,
    next_uid: u32,
    next_uid_at: std::ops::Range<usize>,
    /// Of the line, with its end.
    len: usize,
}

fn header(content: &[u8]) -> Result<Header, UidListError> {
    let line = content.get(..content.len().min(MAX_HEADER)).unwrap_or_default();
    let end = line.iter().position(|b| *b == b'\n').ok_or(UidListError::NoHeader)?;
    let line = &line[..end];
    let fields = line.strip_prefix(b"3 ").ok_or(UidListError::Version)?;
    let (mut uid_validity, mut next_uid, mut next_uid_at) = (0, 0, 0..0);
    let mut at = 2;
    for field in fields.split(|b| *b == b' ') {
        match field.split_first() {
            Some((b'V', digits)) => uid_validity = number(digits).unwrap_or(0),
            Some((b'N', digits)) => {
                next_uid = number(digits).unwrap_or(0);
                next_uid_at = at + 1..at + field.len();
            }
            _ => {}
        }
        at += field.len() + 1;
    }
    if uid_validity == 0 || next_uid == 0 {
        return Err(UidListError::Incomplete);
    }
    Ok(Header { uid_validity, next_uid, next_uid_at, len: end + 1 })
}

fn number(digits: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(digits).ok()?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// The UID at the start of a line.
fn line_uid(line: &[u8]) -> Option<u32> {
    let digits = line.iter().position(|b| !b.is_ascii_digit())?;
    (line.get(digits) == Some(&b' ')).then(|| number(&line[..digits])).flatten()
}

/// Reads a uidlist; a last line without its end does not count.
pub fn parse(content: &[u8]) -> Result<UidList, UidListError> {
    let header = header(content)?;
    let mut list = UidList {
        uid_validity: header.uid_validity,
        header_next_uid: header.next_uid,
        last_uid: 0,
        lines: 0,
    };
    for line in content[header.len..].split_inclusive(|b| *b == b'\n') {
        if let Some(line) = line.strip_suffix(b"\n") {
            list.last_uid = list.last_uid.max(line_uid(line).unwrap_or(0));
            list.lines += 1;
        }
    }
    Ok(list)
}

/// Length of the whole lines: where a cut may end the file. What follows a line that Dovecot does not
/// read does not count: it would throw the list away, and with it what UIDs were given. (Blocks of
/// an append reach a disk in any order: a power cut leaves zeros before the end of a line.)
pub fn whole_lines_len(content: &[u8]) -> usize {
    let Some(header) = content.iter().position(|b| *b == b'\n') else { return 0 };
    let (mut at, mut last) = (header + 1, 0);
    for line in content[at..].split_inclusive(|b| *b == b'\n') {
        let uid = line.strip_suffix(b"\n").filter(|line| !line.contains(&0));
        match uid.filter(|line| line.contains(&b':')).and_then(line_uid) {
            Some(uid) if uid > last => last = uid,
            _ => break,
        }
        at += line.len();
    }
    at
}

/// The file with the header's next-UID at least `at_least` and nothing else changed, except that
/// what is torn is left out. It replaces the file as a whole.
///
/// Dovecot reads a changed file anew because its size or time differs; the number keeps its
/// other fields, so neither UIDVALIDITY nor the folder's GUID move.
pub fn raise_next_uid(content: &[u8], at_least: u32) -> Result<Vec<u8>, UidListError> {
    let header = header(content)?;
    let content = &content[..whole_lines_len(content)];
    if header.next_uid >= at_least {
        return Ok(content.to_vec());
    }
    let mut raised = content[..header.next_uid_at.start].to_vec();
    raised.extend_from_slice(at_least.to_string().as_bytes());
    raised.extend_from_slice(&content[header.next_uid_at.end..]);
    Ok(raised)
}

/// Knows next-UID of a folder from the writes to its uidlist, at the cost of a look at each.
#[derive(Debug, Clone, Default)]
pub struct UidTracker {
    /// From the header line, once it is whole.
    header: Option<(u32, u32)>,
    last_uid: u32,
    /// End of what was fed.
    end: u64,
    /// The start of the line that is not finished: the header's whole, else up to its UID.
    line: Vec<u8>,
    lost: bool,
}

impl UidTracker {
    /// Of a file that is empty so far.
    pub fn new() -> UidTracker {
        UidTracker::default()
    }

    /// Another file took this one's name, or the file was read anew.
    pub fn reset(&mut self, content: &[u8]) {
        *self = UidTracker::default();
        self.fed(0, content);
    }

    /// A write of `bytes` at `offset`. One that does not continue the last makes the tracker
    /// [`lost`](Self::is_lost).
    pub fn fed(&mut self, offset: u64, bytes: &[u8]) {
        if offset != self.end {
            self.lost = true;
            return;
        }
        self.end += bytes.len() as u64;
        let mut rest = bytes;
        while !rest.is_empty() {
            let end = rest.iter().position(|b| *b == b'\n');
            let piece = &rest[..end.unwrap_or(rest.len())];
            let room = if self.header.is_none() { MAX_HEADER } else { 16 };
            let room = room.saturating_sub(self.line.len());
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            match end {
                Some(end) => {
                    self.finish_line();
                    rest = &rest[end + 1..];
                }
                None => rest = &[],
            }
        }
        // A line's UID is given out as soon as it stands there, finished or not.
        if self.header.is_some() {
            self.last_uid = self.last_uid.max(line_uid(&self.line).unwrap_or(0));
        }
    }

    fn finish_line(&mut self) {
        if self.header.is_some() {
            self.last_uid = self.last_uid.max(line_uid(&self.line).unwrap_or(0));
        } else {
            self.line.push(b'\n');
            match header(&self.line) {
                Ok(header) => self.header = Some((header.uid_validity, header.next_uid)),
                Err(_) => self.lost = true,
            }
        }
        self.line.clear();
    }

    /// The UID that the next mail gets; `None` before the header is there.
    pub fn next_uid(&self) -> Option<u32> {
        self.header.map(|(_, next)| next.max(self.last_uid.saturating_add(1)))
    }

    /// UIDVALIDITY; `None` before the header is there.
    pub fn uid_validity(&self) -> Option<u32> {
        self.header.map(|(validity, _)| validity)
    }

    /// The writes could not be followed: [`reset`](Self::reset) with the file's content.
    pub fn is_lost(&self) -> bool {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = b"3 V1700000000 N4 G0123456789abcdef0123456789abcdef\n\
        1 :1700.M1P2.host,S=5\n3 W7 :1700.M2P2.host,S=6\n5 :1700.M3P2.host\n";

    #[test]
    fn a_list_is_read() {
        let list = parse(LIST).unwrap();
        assert_eq!((list.uid_validity, list.header_next_uid), (1_700_000_000, 4));
        assert_eq!((list.last_uid, list.lines, list.next_uid()), (5, 3, 6));
        assert_eq!(parse(b""), Err(UidListError::NoHeader));
        assert_eq!(parse(b"1 17 5\n"), Err(UidListError::Version));
        assert_eq!(parse(b"3 V17\n"), Err(UidListError::Incomplete));
    }

    #[test]
    fn only_the_number_is_raised() {
        let raised = raise_next_uid(LIST, 1005).unwrap();
        assert_eq!(
            String::from_utf8(raised.clone()).unwrap(),
            std::str::from_utf8(LIST).unwrap().replace(" N4 ", " N1005 ")
        );
        assert_eq!(raise_next_uid(&raised, 7).unwrap(), raised);
        let torn = [LIST, b"6 :17"].concat();
        assert_eq!(raise_next_uid(&torn, 2).unwrap(), LIST);
        assert_eq!(parse(&raised).unwrap().next_uid(), 1005);
    }

    #[test]
    fn a_list_ends_before_what_dovecot_does_not_read() {
        let bad: [&[u8]; 6] = [
            b"\0\0\0\0.M4P2.host\n",
            b"6 :1700\0\0.host\n",
            b"5 :1700.M4P2.host\n",
            b"0 :1700.M4P2.host\n",
            b"6:1700.M4P2.host\n",
            b"6 1700.M4P2.host\n",
        ];
        for bad in bad {
            let torn = [LIST, bad, b"7 :1700.M5P2.host\n"].concat();
            assert_eq!(whole_lines_len(&torn), LIST.len(), "{}", String::from_utf8_lossy(bad));
        }
        assert_eq!(whole_lines_len(&[LIST, b"6 :17"].concat()), LIST.len());
        assert_eq!(whole_lines_len(b"3 V17"), 0);
    }

    #[test]
    fn a_list_is_followed_through_any_split() {
        for step in 1..LIST.len() {
            let mut tracker = UidTracker::new();
            for (i, piece) in LIST.chunks(step).enumerate() {
                tracker.fed((i * step) as u64, piece);
            }
            assert_eq!(tracker.next_uid(), Some(6), "{step}");
            assert_eq!(tracker.uid_validity(), Some(1_700_000_000));
            assert!(!tracker.is_lost());
        }
        let mut tracker = UidTracker::new();
        tracker.reset(LIST);
        tracker.fed(LIST.len() as u64, b"9 ");
        assert_eq!(tracker.next_uid(), Some(10));
        tracker.fed(3, b"x");
        assert!(tracker.is_lost());
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(data: Vec<u8>, at_least: u32, split: u8) {
            let mut tracker = UidTracker::new();
            let (a, b) = data.split_at(data.len().min(usize::from(split)));
            tracker.fed(0, a);
            tracker.fed(a.len() as u64, b);
            let _ = (parse(&data), tracker.next_uid(), whole_lines_len(&data));
            let mixed = [b"3 V1 N2\n".as_slice(), &data].concat();
            let raised = raise_next_uid(&mixed, at_least).unwrap();
            proptest::prop_assert!(parse(&raised).unwrap().next_uid() >= at_least);
        }
    }
}
