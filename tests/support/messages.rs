//! Mails that can be recognised: the same name and seed give the same bytes.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fmt::Write;

/// The header that names a mail. Servers put their own headers before it, never behind it.
const HEADER: &str = "X-Test-Mail: ";

/// A mail to send.
#[derive(Debug, Clone)]
pub struct Message {
    /// Unique in a test.
    pub id: String,
    /// With CRLF line ends.
    pub bytes: Vec<u8>,
    pub hash: String,
    /// A word that occurs in the body of this mail only.
    pub token: String,
}

const LINES: [&str; 8] = [
    "The delivery note is attached, please confirm by Thursday.",
    ".",
    ".. leading dots must survive the wire",
    "From time to time a line begins like an mbox separator.",
    "Grüße aus Köln, наилучшие пожелания, よろしく",
    "> quoted: shall we move the meeting to next week?",
    "\tindented with a tab, and trailing spaces   ",
    "",
];

/// Builds the mail `id`. Most are some kilobytes, one in fifteen some hundred.
pub fn message(seed: u64, id: &str) -> Message {
    let mut rng = dice(seed, id);
    let size = match rng.random_range(0..15) {
        0 => rng.random_range(100_000..400_000),
        1..4 => rng.random_range(20_000..60_000),
        _ => rng.random_range(300..9_000),
    };
    build(seed, id, size, rng)
}

/// The same, of about so many bytes.
pub fn message_of(seed: u64, id: &str, size: usize) -> Message {
    build(seed, id, size, dice(seed, id))
}

fn digest(seed: u64, id: &str) -> blake3::Hash {
    blake3::hash(format!("{seed}/{id}").as_bytes())
}

fn dice(seed: u64, id: &str) -> StdRng {
    StdRng::from_seed(*digest(seed, id).as_bytes())
}

fn build(seed: u64, id: &str, size: usize, mut rng: StdRng) -> Message {
    let token = format!("word{}", &digest(seed, id).to_hex()[..16]);
    let mut text = format!(
        "{HEADER}{id}\r\nMessage-ID: <{id}@client.test>\r\nFrom: Anna <anna@client.test>\r\n\
         To: somebody@mail.test\r\nSubject: number {}\r\n\tcontinued\r\n\
         Date: Mon, 01 Jan 2024 10:{:02}:00 +0000\r\nMIME-Version: 1.0\r\n\
         Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n\
         {token}\r\n",
        rng.random_range(0..1000),
        rng.random_range(0..60),
    );
    while text.len() < size {
        if rng.random_bool(0.5) {
            text.push_str(LINES[rng.random_range(0..LINES.len())]);
        } else {
            let _ = write!(text, "{:064x}", rng.random::<u128>());
        }
        text.push_str("\r\n");
    }
    let bytes = text.into_bytes();
    Message { id: id.to_owned(), hash: hash(&bytes), bytes, token }
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..24].to_owned()
}

/// The id and hash of a mail as a server gives it back; the hash leaves out what was put before
/// our first header. No id: not one of ours, or damaged.
pub fn identify(bytes: &[u8]) -> (Option<String>, String) {
    let header = HEADER.as_bytes();
    let found = bytes.windows(header.len()).position(|w| w == header);
    let Some(at) = found.filter(|&at| at == 0 || bytes[at - 1] == b'\n') else {
        return (None, hash(bytes));
    };
    let name = bytes[at + header.len()..].split(|c| b"\r\n".contains(c)).next().unwrap_or_default();
    (Some(String::from_utf8_lossy(name).into_owned()), hash(&bytes[at..]))
}
