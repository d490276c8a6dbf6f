//! The two files `.lasthost`: what is in them, and reading it. Pure.
//!
//! On NFS: the host's name and a line feed, as Dovecot Pro writes it, so both can share users.
//!
//! Beside the list index, five lines:
//!
//! ```text
//! vmailfs-lasthost 1
//! <inode> <seconds> <nanoseconds>     of the file on NFS, when this host took the user
//! <boot id>                           a list index on a real disk does not outlive a boot
//! open <seconds since 1970>           taken then, and not known yet that nobody else was there
//! <CRC-32C of the lines above, 8 hexadecimal digits>
//! ```
//!
//! `settled` stands in the fourth line once it is known. It is written in place, under the lock: one
//! that is torn fails its checksum. Whatever cannot be read counts as a change of host: the list
//! index is a cache, and to drop it is always right.

/// The longest name of a host that is shown to people.
const MAX_HOST: usize = 255;
/// No record is longer.
pub const MAX_RECORD: usize = 512;
const MAGIC: &str = "vmailfs-lasthost ";
const VERSION: &str = "1";

/// What tells one `INDEX/.lasthost` from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub inode: u64,
    pub secs: i64,
    pub nanos: u32,
}

/// Whether this host may keep what it builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Taken over at this time (seconds since 1970). The host that had the user before may still be
    /// serving him, so what is built in this session is good for this session only.
    Open(i64),
    Settled,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub stamp: Stamp,
    pub boot: String,
    pub state: State,
}

/// Why a record says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    #[error("it is empty")]
    Empty,
    #[error("it is damaged")]
    Damaged,
    #[error("it is of another version")]
    Version,
}

impl Record {
    pub fn text(&self) -> String {
        let Stamp { inode, secs, nanos } = self.stamp;
        let state = match self.state {
            State::Open(since) => format!("open {since}"),
            State::Settled => "settled".to_owned(),
        };
        let lines = format!("{MAGIC}{VERSION}\n{inode} {secs} {nanos}\n{}\n{state}\n", self.boot);
        let sum = crc32c::crc32c(lines.as_bytes());
        format!("{lines}{sum:08x}\n")
    }

    /// # Errors
    /// Anything but the exact text of a record.
    pub fn parse(bytes: &[u8]) -> Result<Record, Bad> {
        if bytes.is_empty() {
            return Err(Bad::Empty);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| Bad::Damaged)?;
        let version = text.strip_prefix(MAGIC).and_then(|rest| rest.split_once('\n'));
        let (version, _) = version.ok_or(Bad::Damaged)?;
        if version != VERSION {
            return Err(Bad::Version);
        }
        let record = Record::lines(text).ok_or(Bad::Damaged)?;
        // One text per value: numbers with a plus or zeros in front are nobody's writing.
        if record.text() == text { Ok(record) } else { Err(Bad::Damaged) }
    }

    fn lines(text: &str) -> Option<Record> {
        let mut lines = text.lines().skip(1);
        let mut numbers = lines.next()?.split(' ');
        let stamp = Stamp {
            inode: numbers.next()?.parse().ok()?,
            secs: numbers.next()?.parse().ok()?,
            nanos: numbers.next()?.parse().ok()?,
        };
        let boot = lines.next()?.to_owned();
        let state = match lines.next()?.split_once(' ') {
            Some(("open", since)) => State::Open(since.parse().ok()?),
            _ => State::Settled,
        };
        Some(Record { stamp, boot, state })
    }
}

/// The name in `INDEX/.lasthost`, for the log; it decides nothing.
pub fn host_of(bytes: &[u8]) -> Option<&str> {
    let name = std::str::from_utf8(bytes).ok()?.lines().next()?.trim();
    let legal = |c: char| c.is_ascii_graphic() && c != '/';
    (!name.is_empty() && name.len() <= MAX_HOST && name.chars().all(legal)).then_some(name)
}

/// A host's name as part of a file's name.
pub fn escaped(host: &str) -> String {
    let mut out = String::new();
    for byte in host.bytes().take(120) {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' => out.push(byte as char),
            _ => out.push_str(&format!("_{byte:02x}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(state: State) -> Record {
        let stamp = Stamp { inode: 7, secs: -3, nanos: 999_999_999 };
        Record { stamp, boot: "b-1".into(), state }
    }

    #[test]
    fn a_record_reads_back_and_a_changed_byte_is_noticed() {
        for state in [State::Open(1_700_000_000), State::Settled] {
            let record = record(state);
            let text = record.text();
            assert_eq!(Record::parse(text.as_bytes()).unwrap(), record);
            for at in 0..text.len() {
                let mut torn = text.clone().into_bytes();
                torn[at] ^= 1;
                assert!(Record::parse(&torn).is_err(), "byte {at}");
                assert!(Record::parse(&text.as_bytes()[..at]).is_err(), "cut at {at}");
            }
        }
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        assert_eq!(Record::parse(b""), Err(Bad::Empty));
        assert_eq!(Record::parse(b"mx1\n"), Err(Bad::Damaged));
        assert_eq!(Record::parse(&[0xff; 40]), Err(Bad::Damaged));
        let newer = record(State::Settled).text().replace("lasthost 1", "lasthost 2");
        assert_eq!(Record::parse(newer.as_bytes()), Err(Bad::Version));
        let text = record(State::Settled).text();
        assert!(Record::parse(format!("{text}more\n").as_bytes()).is_err());
    }

    #[test]
    fn names_of_hosts_for_people_and_for_files() {
        assert_eq!(host_of(b"mx1.example\n"), Some("mx1.example"));
        assert_eq!(host_of(b"  mx1\nmore"), Some("mx1"));
        for bad in [&b""[..], b"\n", b"a b", b"a\x1b[2J", b"\xff\xfe", &[b'x'; 300]] {
            assert_eq!(host_of(bad), None);
        }
        assert_eq!(escaped("mx-1.ex"), "mx-1.ex");
        assert_eq!(escaped("a/../b"), "a_2f.._2fb");
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Record::parse(&bytes);
            let _ = host_of(&bytes);
        }
    }
}
