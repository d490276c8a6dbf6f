//! What a cache directory holds, what that takes, and what goes when room is needed. No I/O.
//!
//! # What must survive what
//!
//! Mail is read in three ways. A client reads what has just been delivered, once from each of its
//! devices; a few mails (attachments, threads, search) are read again and again; and now and then
//! something reads a whole folder, or every mail of the server, once: a backup, a migration, a client
//! that is set up anew. In a plain LRU the third pushes out all that the first two would have found.
//!
//! So there are three **segments**, each with a share of the space:
//!
//! - **fresh** (30 %): what was delivered here, first in, first out. It has been written to the disk
//!   anyway; whoever is told of it will ask for it within seconds or hours.
//! - **probation** (20 %): what was read from the store for the first time, first in, first out.
//! - **used** (50 %): what was read again, least recently used first.
//!
//! A share that is not used is lent to the others. When room is needed, probation gives first if it has more
//! than its share, then the segment that grows, then others that have more than theirs. What arrives by
//! reading takes nothing of another's share: a scan of any length runs through its fifth of the cache, and a mail
//! too large for that while the rest is in use is streamed. Deliveries nobody reads run through their third.
//!
//! **Read again** must not mean "opened twice": a mail server opens a mail once for its headers and once for
//! its body, and a scan that does so would make everything used. Two uses count as separate when a sixteenth of the
//! cache's size has arrived in between; time is counted in bytes, so no clock is needed, and a cache that is not
//! under pressure need not decide anything. A mail so marked moves to *used* when it reaches the end of its
//! queue. One that comes back after it was evicted is recognised by its **ghost** (a hash of its name, as many as
//! there are files) and goes to *used* at once: it was wanted longer than its queue is.
//!
//! Rejected: *LRU*; see the figures in `tests`. *SLRU*: the second open of a scan promotes. *2Q*: the same three
//! ideas, but deliveries and scans would share a queue. *S3-FIFO*: counts uses without telling whether they belong
//! together; its queues and ghosts are what is used here otherwise. *ARC*: moves its border by ghost
//! hits, which a scan that is repeated every night produces in masses. *TinyLFU*: a filter in front needs
//! counters that outlive what they count; fresh mail, which has no history, would have to be let past it.
//!
//! # What is counted
//!
//! Every byte that `du` would show, and those of files that have lost their name while somebody reads them:
//! files in whole blocks, and what the file system says they take if that is more; directories; downloads from before
//! their first byte; files of others that lie in the directory. A little is added for what file systems
//! add ([`BASE`], [`SLACK`], [`charge`]), so the sum errs on the safe side.

use super::dirs::Dirs;
use super::file::{Cached, Counters};
use crate::cache::disk::BLOCK;
use crate::format::ObjectId;
use lru::LruCache;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Weak};

/// For the directory itself and those of its parts that do not grow.
pub(super) const BASE: u64 = 8 * BLOCK;
/// What directories may grow by when one file gets its name.
pub(super) const SLACK: u64 = 5 * BLOCK;

/// What a file of this length takes, in blocks of this size. A thousandth is added for the lists of
/// blocks that a file system keeps of large files.
pub(super) fn charge(size: u64, block: u64) -> u64 {
    size.saturating_add(size / 1024).div_ceil(block).saturating_mul(block)
}

pub(super) type CacheKey = (Arc<str>, ObjectId);
pub(super) type Stamp = (u64, i64, i64);

/// Why a copy comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It was written here.
    Delivered,
    /// Somebody reads it.
    Read,
    /// Somebody may read it soon. It takes the place of nothing but what was read once.
    Ahead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Segment {
    Probation,
    Fresh,
    Used,
}

const SEGMENTS: [Segment; 3] = [Segment::Probation, Segment::Fresh, Segment::Used];

/// Bytes in each segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shares {
    /// Read once.
    pub probation: u64,
    /// Delivered here.
    pub fresh: u64,
    /// Read again.
    pub used: u64,
}

/// Shares of the segments, in hundredths.
const SHARES: [u64; 3] = [20, 30, 50];
/// Uses are separate when the cache's size divided by this arrived between them.
const APART: u64 = 16;
/// The fewest and most ghosts.
const GHOSTS: std::ops::Range<usize> = 256..1 << 17;

/// A file of the cache.
#[derive(Debug)]
pub(super) struct Known {
    pub size: u64,
    pub charge: u64,
    /// The file's stamp when it was known to be right.
    pub stamp: Option<Stamp>,
    /// Set while somebody has the file open.
    pub open: Weak<Cached>,
    /// How much had arrived at its last use.
    at: u64,
    read: bool,
    again: bool,
}

impl Known {
    pub(super) fn new(size: u64, charge: u64, stamp: Option<Stamp>) -> Known {
        Known { size, charge, stamp, open: Weak::new(), at: 0, read: false, again: false }
    }
}

#[derive(Debug)]
pub(super) struct Books {
    pub max: u64,
    /// Below `max` while the disk has less to give than that.
    limit: u64,
    segments: [LruCache<CacheKey, Known>; 3],
    bytes: [u64; 3],
    ghosts: LruCache<u64, ()>,
    /// Not in a segment any more; their files are being removed.
    leaving: HashSet<CacheKey>,
    arrived: u64,
    reserved: u64,
    /// Files that are not ours, and such as could not be removed.
    pub other: u64,
    pub dirs: Dirs,
    counters: Arc<Counters>,
    pub evictions: u64,
    pub evicted: u64,
}

fn ghost(key: &CacheKey) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

impl Books {
    pub(super) fn new(max: u64, counters: Arc<Counters>) -> Books {
        Books {
            max,
            limit: max,
            segments: std::array::from_fn(|_| LruCache::unbounded()),
            bytes: [0; 3],
            ghosts: LruCache::unbounded(),
            leaving: HashSet::new(),
            arrived: 0,
            reserved: 0,
            other: 0,
            dirs: Dirs::default(),
            counters,
            evictions: 0,
            evicted: 0,
        }
    }

    /// Everything that is counted.
    pub(super) fn total(&self) -> u64 {
        let held = self.bytes.iter().sum::<u64>() + self.counters.unlinked();
        BASE + held + self.reserved + self.other + self.dirs.bytes()
    }

    pub(super) fn files(&self) -> usize {
        self.segments.iter().map(LruCache::len).sum()
    }

    pub(super) fn reserved(&self) -> u64 {
        self.reserved
    }

    pub(super) fn bytes_in(&self, segment: Segment) -> u64 {
        self.bytes[segment as usize]
    }

    pub(super) fn segments(&self) -> Shares {
        let [probation, fresh, used] = self.bytes;
        Shares { probation, fresh, used }
    }

    pub(super) fn known(&mut self, key: &CacheKey) -> Option<&mut Known> {
        self.segments.iter_mut().find_map(|s| s.peek_mut(key))
    }

    pub(super) fn keys(&self) -> Vec<CacheKey> {
        self.segments.iter().flat_map(|s| s.iter().map(|(key, _)| key.clone())).collect()
    }

    pub(super) fn is_leaving(&self, key: &CacheKey) -> bool {
        self.leaving.contains(key)
    }

    fn pop(&mut self, key: &CacheKey) -> Option<(Segment, Known)> {
        for segment in SEGMENTS {
            if let Some(known) = self.segments[segment as usize].pop(key) {
                self.bytes[segment as usize] -= known.charge;
                return Some((segment, known));
            }
        }
        None
    }

    fn put(&mut self, segment: Segment, key: CacheKey, known: Known) {
        self.bytes[segment as usize] += known.charge;
        self.segments[segment as usize].put(key, known);
    }

    /// Somebody opens it.
    pub(super) fn used(&mut self, key: &CacheKey) {
        let (arrived, apart) = (self.arrived, self.max / APART);
        // Getting it moves it to the front, which only means something among the used.
        if self.segments[Segment::Used as usize].get(key).is_some() {
            return;
        }
        if let Some(known) = self.known(key) {
            known.again |= known.read && arrived - known.at > apart;
            if !known.read {
                known.at = arrived;
            }
            known.read = true;
        }
    }

    // ---- making room

    fn share(&self, segment: Segment) -> u64 {
        self.max / 100 * SHARES[segment as usize]
    }

    fn over(&self, segment: Segment) -> bool {
        self.bytes_in(segment) > self.share(segment)
    }

    /// How much of what somebody will probably read may be here before it is read: half of what
    /// arrivals of that kind run through.
    pub(super) fn room_ahead(&self) -> u64 {
        self.share(Segment::Probation) / 2
    }

    /// Where a copy belongs.
    pub(super) fn segment_for(&self, key: &CacheKey, arrival: Arrival) -> Segment {
        match arrival {
            Arrival::Delivered => Segment::Fresh,
            Arrival::Read if self.ghosts.contains(&ghost(key)) => Segment::Used,
            Arrival::Read | Arrival::Ahead => Segment::Probation,
        }
    }

    /// Takes the next file that may go out of a segment; `None` when all of it is open.
    fn pop_from(&mut self, segment: Segment) -> Option<Victim> {
        for _ in 0..self.segments[segment as usize].len() {
            let (key, mut known) = self.segments[segment as usize].pop_lru()?;
            self.bytes[segment as usize] -= known.charge;
            if known.open.strong_count() > 0 {
                self.put(segment, key, known);
            } else if known.again && segment != Segment::Used {
                known.again = false;
                self.put(Segment::Used, key, known);
            } else {
                return Some((segment, key, known));
            }
        }
        None
    }

    fn next_victim(&mut self, own: Segment, arrival: Arrival) -> Option<Victim> {
        if arrival == Arrival::Ahead {
            return self.pop_from(Segment::Probation);
        }
        let order = [Segment::Probation, own, Segment::Used, Segment::Fresh];
        for segment in order {
            if self.over(segment)
                && let Some(victim) = self.pop_from(segment)
            {
                return Some(victim);
            }
        }
        self.pop_from(own).or_else(|| self.pop_from(Segment::Probation))
    }

    /// Sets so many bytes aside. What must be removed for that is not counted from here on, and its
    /// files are to be removed before any byte is written. `None`: there is no room.
    pub(super) fn room(
        &mut self,
        own: Segment,
        bytes: u64,
        arrival: Arrival,
    ) -> Option<Vec<(CacheKey, u64)>> {
        let mut victims: Vec<Victim> = Vec::new();
        loop {
            let total = self.total();
            if total.saturating_add(bytes) <= self.limit {
                break;
            }
            // What could not fit beside what is no file of a segment costs nobody anything.
            let movable: u64 = self.bytes.iter().sum();
            let possible = (total - movable).saturating_add(bytes) <= self.limit;
            match possible.then(|| self.next_victim(own, arrival)).flatten() {
                Some(victim) => victims.push(victim),
                None => {
                    for (segment, key, known) in victims.into_iter().rev() {
                        self.put(segment, key.clone(), known);
                        self.segments[segment as usize].demote(&key);
                    }
                    return None;
                }
            }
        }
        self.reserved += bytes;
        let gone = victims.into_iter().map(|(_, key, known)| {
            self.evictions += 1;
            self.evicted += known.charge;
            if known.read {
                self.ghosts.put(ghost(&key), ());
            }
            self.leaving.insert(key.clone());
            (key, known.charge)
        });
        let gone = gone.collect();
        let ghosts = self.files().clamp(GHOSTS.start, GHOSTS.end);
        while self.ghosts.len() > ghosts {
            self.ghosts.pop_lru();
        }
        Some(gone)
    }

    /// What must go because there is more than may be; to be removed by the caller.
    pub(super) fn excess(&mut self) -> Vec<(CacheKey, u64)> {
        let mut gone = Vec::new();
        while self.total() > self.max {
            let victim = self.next_victim(Segment::Probation, Arrival::Read);
            let victim = victim.or_else(|| self.pop_from(Segment::Used));
            let Some((_, key, known)) = victim.or_else(|| self.pop_from(Segment::Fresh)) else {
                break;
            };
            self.leaving.insert(key.clone());
            gone.push((key, known.charge));
        }
        gone
    }

    /// Forgets all files; to be removed by the caller.
    pub(super) fn everything(&mut self) -> Vec<(CacheKey, u64)> {
        self.keys().into_iter().filter_map(|key| Some((key.clone(), self.forget(&key)?))).collect()
    }

    /// The segment of a file of which is known only how much is there that was used as late, or later.
    pub(super) fn segment_by_age(&self, later: u64) -> Segment {
        let (used, fresh) = (self.share(Segment::Used), self.share(Segment::Fresh));
        match later {
            later if later <= used => Segment::Used,
            later if later <= used + fresh => Segment::Fresh,
            _ => Segment::Probation,
        }
    }

    pub(super) fn release(&mut self, bytes: u64) {
        self.reserved -= bytes;
    }

    /// The disk had no room for bytes that were set aside: there may be no more than there is, until
    /// more was written.
    pub(super) fn disk_full(&mut self, set_aside: u64) {
        self.limit = self.limit.min(self.total().saturating_sub(set_aside));
    }

    /// Whether the disk has less to give than there may be.
    pub(super) fn is_limited(&self) -> bool {
        self.limit < self.max
    }

    /// As if the disk had never been full.
    pub(super) fn lift_limit(&mut self) {
        self.limit = self.max;
    }

    // ---- files that come and go

    /// A file has its name. One that it replaced is not counted any more, unless it is open.
    pub(super) fn insert(&mut self, key: CacheKey, segment: Segment, read: bool, mut known: Known) {
        let there = self.pop(&key);
        if let Some((_, old)) = &there {
            Cached::unlinked(&old.open);
        }
        if there.is_none() && !self.leaving.remove(&key) {
            self.dirs.file_comes(&key.0);
        }
        self.arrived += known.charge;
        self.limit = self.limit.saturating_add(known.charge).min(self.max);
        known.at = self.arrived;
        known.read = read || segment == Segment::Used;
        self.put(segment, key, known);
    }

    /// Its file is to be removed now. What is open counts until it is closed.
    pub(super) fn forget(&mut self, key: &CacheKey) -> Option<u64> {
        let (_, known) = self.pop(key)?;
        Cached::unlinked(&known.open);
        self.leaving.insert(key.clone());
        Some(known.charge)
    }

    /// Whether a file that was to be removed still is.
    pub(super) fn takes_leave(&mut self, key: &CacheKey) -> bool {
        self.leaving.remove(key)
    }

    /// What a file really takes. Returns what it was thought to.
    pub(super) fn recount(&mut self, key: &CacheKey, charge: u64) -> Option<u64> {
        for segment in SEGMENTS {
            if let Some(known) = self.segments[segment as usize].peek_mut(key) {
                let old = std::mem::replace(&mut known.charge, charge);
                self.bytes[segment as usize] = self.bytes[segment as usize] - old + charge;
                return Some(old);
            }
        }
        None
    }
}

type Victim = (Segment, CacheKey, Known);
