//! Streaming: mails that fscache has no room for are read from the store piece by piece.
//!
//! A piece is an aligned range of [`PIECE`] bytes. Pieces are kept in memory, least recently used
//! first out, for all handles of all users together; half of the bound (`store_limits.stream_memory`) is for
//! pieces that are kept, half for those that are under way, so no number of slow readers of however large
//! mails takes more. A piece that went is read again. Readers of one piece at the same time read it once.
//!
//! # What is checked
//!
//! - Of every piece: its length, and that the object is as long as the listing says.
//! - A mail of one piece: its CRC-32C, before anybody sees a byte of it; spoilt on its way, it is read again.
//! - A longer mail: its CRC-32C as the pieces arrive in order. The last piece of a mail that fails is
//!   not given: the read ends in EIO, the kernel forgets what it has of the mail, and a log line names the object.
//!   Who reads a part only, or pieces in another order (two readers of one mail count as one), gets
//!   bytes of which nothing but their length is known; TLS, where it is used, has checked their way.
//!
//! Rejected: reading such a mail once for its checksum and once more for the reader (twice the
//! requests, for each part that an IMAP client asks for); checksums of pieces in the key (a key is 1024 bytes,
//! and a mail of 50 MB has 50 pieces).

use super::error::{Error, Result};
use super::fetch::{SPOILT_TRIES, failed};
use super::need::NodeRef;
use super::promise;
use super::session::Session;
use super::turns::Turns;
use crate::format::ObjectId;
use crate::format::key::{KeyTail, mail_key};
use crate::fs::api::Invalidate;
use crate::store::Reason;
use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Bytes of a piece.
pub const PIECE: u64 = 1 << 20;
/// The smallest bound: a read may need two pieces at once.
pub const LEAST: u64 = 8 * PIECE;
/// Mails whose checksums are followed at a time.
const FOLLOWED: usize = 4096;

type Object = (Arc<str>, ObjectId);
type At = (Object, u64);

/// How far a mail was read in order, and the checksum up to there.
#[derive(Debug, Clone, Copy, Default)]
struct Check {
    next: u64,
    crc: u32,
    /// It was wrong when it was last read to its end.
    wrong: bool,
}

#[derive(Debug)]
struct Kept {
    pieces: LruCache<At, Bytes>,
    bytes: u64,
    checks: LruCache<Object, Check>,
}

/// The pieces of a session.
#[derive(Debug)]
pub struct Streams {
    kept: Mutex<Kept>,
    /// For kept pieces.
    max: u64,
    under_way: Semaphore,
    turns: Turns<At>,
}

/// One piece of an object.
#[derive(Debug, Clone)]
pub struct Piece {
    pub object: KeyTail,
    pub size: u64,
    pub index: u64,
}

impl Piece {
    fn range(&self) -> Range<u64> {
        let from = self.index.saturating_mul(PIECE);
        from..self.size.min(from.saturating_add(PIECE))
    }

    fn last(&self) -> bool {
        self.range().end >= self.size
    }
}

impl Streams {
    pub fn new(memory: u64) -> Streams {
        let max = memory.max(LEAST) / 2;
        let kept = Kept { pieces: LruCache::unbounded(), bytes: 0, checks: LruCache::unbounded() };
        Streams {
            kept: Mutex::new(kept),
            max,
            under_way: Semaphore::new(usize::try_from(max / PIECE).unwrap_or(1)),
            turns: Turns::default(),
        }
    }

    /// Bytes in memory.
    pub fn used(&self) -> u64 {
        self.kept.lock().bytes
    }

    /// `len` bytes of an object from `offset` on, which it has; or the index of a piece that must
    /// be brought first.
    pub fn read(
        &self,
        user: &Arc<str>,
        id: ObjectId,
        offset: u64,
        len: usize,
    ) -> std::result::Result<Vec<u8>, u64> {
        let mut kept = self.kept.lock();
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let at = offset + out.len() as u64;
            let index = at / PIECE;
            let piece = kept.pieces.get(&((user.clone(), id), index)).ok_or(index)?;
            let from = usize::try_from(at % PIECE).unwrap_or(usize::MAX);
            let there = piece.get(from..).filter(|b| !b.is_empty()).ok_or(index)?;
            out.extend_from_slice(&there[..there.len().min(len - out.len())]);
        }
        Ok(out)
    }

    fn has(&self, at: &At) -> bool {
        self.kept.lock().pieces.contains(at)
    }

    /// Keeps a piece that arrived; false if its object turns out to be wrong.
    fn keep(&self, at: At, piece: &Piece, bytes: Bytes) -> bool {
        let mut kept = self.kept.lock();
        kept.bytes += bytes.len() as u64;
        if let Some(old) = kept.pieces.put(at.clone(), bytes) {
            kept.bytes -= old.len() as u64;
        }
        let right = kept.follow(&at.0, piece);
        if !right {
            for index in 0..=piece.size / PIECE {
                kept.drop_piece(&(at.0.clone(), index));
            }
        }
        while kept.bytes > self.max {
            let Some((_, old)) = kept.pieces.pop_lru() else { break };
            kept.bytes -= old.len() as u64;
        }
        right
    }
}

impl Kept {
    fn drop_piece(&mut self, at: &At) {
        if let Some(old) = self.pieces.pop(at) {
            self.bytes -= old.len() as u64;
        }
    }

    /// Takes the checksum on over what is there by now; false if it is wrong.
    fn follow(&mut self, object: &Object, arrived: &Piece) -> bool {
        let mut check = self.checks.get(object).copied().unwrap_or_default();
        let end = arrived.size.div_ceil(PIECE);
        if check.wrong && check.next >= end {
            // Perhaps it was only spoilt on its way: judged again from its beginning.
            (check.next, check.crc) = (0, 0);
        }
        while check.next < end
            && let Some(bytes) = self.pieces.peek(&(object.clone(), check.next))
        {
            check.crc = crc32c::crc32c_append(check.crc, bytes);
            check.next += 1;
            if check.next == end {
                check.wrong = check.crc != arrived.object.decode().crc;
            }
        }
        self.checks.put(object.clone(), check);
        while self.checks.len() > FOLLOWED {
            self.checks.pop_lru();
        }
        // Of what was wrong nobody gets the end but who brings all that is before it.
        !(check.wrong && (check.next == end || arrived.last()))
    }
}

/// Brings a piece of a file's object into memory.
pub async fn through(node: &NodeRef, piece: &Piece) -> Result<()> {
    let session = &node.cell.session;
    let brought = bring(session, &node.cell.name, piece).await;
    if matches!(brought, Err(Error::Damaged { .. })) {
        // What the kernel keeps of it came before its checksum was known.
        session.invalidate(Invalidate::Inode { ino: node.ino });
    }
    brought
}

pub async fn bring(session: &Arc<Session>, user: &Arc<str>, piece: &Piece) -> Result<()> {
    let streams = &session.streams;
    let at = ((user.clone(), piece.object.id()), piece.index);
    let _turn = streams.turns.take(at.clone()).await;
    if streams.has(&at) {
        return Ok(());
    }
    let slot = streams.under_way.acquire().await;
    let _slot = slot.map_err(|_| Error::Internal("streaming has ended".into()))?;
    let alone = piece.index == 0 && piece.last();
    let crc = piece.object.decode().crc;
    for _ in 0..SPOILT_TRIES {
        let bytes = read(session, user, piece).await?;
        if alone && crc32c::crc32c(&bytes) != crc {
            tracing::warn!(%user, object = %piece.object, "spoilt on its way, reading it again");
            continue;
        }
        session.fscache.streamed(user, bytes.len() as u64);
        if streams.keep(at, piece, bytes) {
            return Ok(());
        }
        break;
    }
    tracing::error!(%user, object = %piece.object, "streamed bytes are not what was published");
    Err(Error::Damaged {
        what: format!("user {user}: object {} does not hold what was published", piece.object),
    })
}

async fn read(session: &Arc<Session>, user: &Arc<str>, piece: &Piece) -> Result<Bytes> {
    let range = piece.range();
    if range.is_empty() {
        return Ok(Bytes::new());
    }
    if let Some(bytes) = promise::read_range(session, user, &piece.object, range.clone()).await? {
        return Ok(bytes);
    }
    let len = range.end - range.start;
    let key = mail_key(user, &piece.object);
    let got = session.env.store.get(&key, Some(range), len, Reason("fetch")).await;
    let (meta, bytes) = match got {
        Ok(got) => got,
        Err(error) => return Err(failed(session, user, &piece.object, error).await),
    };
    if meta.size != piece.size || bytes.len() as u64 != len {
        let what =
            format!("user {user}: object {} has not the size it was published with", piece.object);
        return Err(Error::Damaged { what });
    }
    Ok(bytes)
}
