//! Reading ahead: who walks through a folder finds its next mails here.
//!
//! A FETCH of all bodies, a SEARCH in texts, a POP3 download and a backup open one mail after
//! another, in the order in which the folder got them (which is the order of the directory's
//! cookies, and what a flush keeps) or the other way round. Each open would wait for a request of
//! its own. So once some opens in a row were near each other and something was missing, the mails
//! that follow are brought as well.
//!
//! **How far ahead.** At first a few; twice as far each time the reader catches up with what is on its
//! way, and no further while it does not: a slow reader needs few, and a fast one of a distant store
//! needs as many as it reads in the time of a request, and some more. Each quarter that was read is asked for
//! again at once, in small lots, so that requests are in flight all the time and do not come in waves.
//!
//! **What it costs others.** Mails ahead take their own slots (`store_limits.read_ahead`), fewer
//! than there are requests in flight; their copies make room in fscache only by what was read once
//! ([`Arrival::Ahead`]), so nobody's fresh mail goes for them. What is ahead of a reader is a small part
//! of fscache ([`Fscache::room_ahead`]): what comes would else push out what came before it and was not
//! read yet. Large mails are left to their reader: a wrong guess would be dear. An open of a mail
//! that is on its way waits for it and asks for nothing.
//!
//! **What it costs where nothing is missing**: nothing is noted of a directory until an open in it
//! misses its copy, and the note goes once all that would be brought is there.
//!
//! Errors are left to the reader: its own open asks again and tells.

use super::fetch;
use super::node::{Kind, Node, NodeIx};
use super::session::Session;
use super::tree::{Entries, Target};
use super::user::User;
use crate::cache::disk::BLOCK;
#[cfg(doc)]
use crate::cache::fscache::{Arrival, Fscache};
use crate::format::Place;
use crate::format::key::KeyTail;
use std::sync::Arc;

/// Opens in a row from which somebody is taken to walk.
const STEADY: u32 = 3;
/// How far apart they may be, in names: some mails need not be read.
const NEAR: u64 = 16;
/// Names ahead of the reader at first, and at most.
const FIRST: u64 = 16;
const MOST: u64 = 128;
/// A larger mail is left to its reader.
const LARGE: u64 = 8 << 20;
/// Bytes of mails ahead of a reader, where fscache is large.
const BYTES: u64 = 64 << 20;

/// How somebody goes through a directory. Two at once look like nobody, unless one is much ahead.
#[derive(Debug, Default)]
pub struct Walk {
    /// The cookie of the mail that was opened last; 0: none.
    at: u64,
    back: bool,
    /// Opens in a row.
    run: u32,
    /// Up to this cookie mails were brought.
    until: u64,
    /// How many names further on that is to be.
    window: u64,
}

impl Walk {
    /// Takes an open into account: whether somebody walks.
    fn step(&mut self, entries: &Entries, cookie: u64) -> bool {
        if cookie == self.at {
            return false;
        }
        let back = cookie < self.at;
        let near = self.at != 0 && entries.between(self.at, cookie) <= NEAR;
        if near && (back == self.back || self.run == 1) {
            self.run += 1;
        } else {
            self.run = 1;
            self.window = 0;
        }
        if self.window == 0 {
            self.until = cookie;
        }
        (self.at, self.back) = (cookie, back);
        self.run >= STEADY
    }

    /// From which cookie on mails are to be brought, and how many names; `None`: enough is here.
    fn next(&mut self, entries: &Entries, missed: bool) -> Option<(u64, u64)> {
        let passed = if self.back { self.until >= self.at } else { self.until <= self.at };
        let left = if passed { 0 } else { entries.between(self.at, self.until) };
        if missed || self.window == 0 {
            self.window = (self.window * 2).clamp(FIRST, MOST);
        }
        if left > self.window / 4 * 3 {
            return None;
        }
        let from = if passed { self.at } else { self.until };
        Some((from, self.window - left))
    }
}

/// What is to be brought.
struct Lot {
    /// Up to here names were looked at.
    until: u64,
    wanted: Vec<(KeyTail, u64)>,
    /// It ends before what was asked for, as enough is ahead.
    short: bool,
}

impl User {
    /// Somebody opens a published mail, whose copy is not here if it is `missed`.
    pub(super) fn walks(&mut self, ix: NodeIx, missed: bool) {
        if self.session.settings.read_ahead == 0 {
            return;
        }
        let Some(node) = self.tree.nodes.get(ix) else { return };
        // A mail with several names may be read under any of them.
        for name in node.names.all().to_vec() {
            let Some(dir) = self.tree.dir_mut(name.at) else { continue };
            if !missed && dir.walk.is_none() {
                continue;
            }
            let walk = dir.walk.get_or_insert_default();
            if !walk.step(&dir.entries, name.cookie) {
                continue;
            }
            let Some((from, count)) = walk.next(&dir.entries, missed) else { continue };
            let (at, back) = (walk.at, walk.back);
            let lot = self.missing(name.at, (at, from), count, back);
            if let Some(dir) = self.tree.dir_mut(name.at) {
                match &mut dir.walk {
                    // All that lies before the reader is here, and will be left to it.
                    _ if lot.wanted.is_empty() && !lot.short && !missed && count >= FIRST => {
                        dir.walk = None;
                    }
                    Some(walk) => walk.until = lot.until,
                    None => {}
                }
            }
            for (key, size) in lot.wanted {
                bring(&self.session, &self.name, key, size);
            }
        }
    }

    /// Which mails behind `from` are not here, for a reader who is `at` a name before it.
    fn missing(&self, dir: Place, (at, from): (u64, u64), count: u64, back: bool) -> Lot {
        let mut lot = Lot { until: from, wanted: Vec::new(), short: false };
        let Some(dir) = self.tree.dir(dir) else { return lot };
        let most = BYTES.min(self.session.fscache.room_ahead(&self.name));
        let mut ahead = 0;
        let names: Box<dyn Iterator<Item = (u64, _, Target)>> = match back {
            false => Box::new(dir.entries.after(at)),
            true => Box::new(dir.entries.before(at)),
        };
        let mut looked = 0;
        for (cookie, _, target) in names {
            // What was asked for before is ahead as well, here or not yet.
            let new = if back { cookie < from } else { cookie > from };
            if new && looked == count {
                break;
            }
            let node = match target {
                Target::Node(ix) => self.tree.nodes.get(ix),
                _ => None,
            };
            let mail = node.filter(|node| node.size <= LARGE && node.object().is_some());
            ahead += mail.map_or(0, |node| node.size.max(BLOCK));
            if new && ahead > most {
                lot.short = true;
                break;
            }
            if !new {
                continue;
            }
            looked += 1;
            lot.until = cookie;
            if let Some(Node { kind: Kind::Published(key), size, .. }) = mail
                && !self.session.fscache.holds(&self.name, key.id())
            {
                lot.wanted.push((key.clone(), *size));
            }
        }
        lot
    }
}

/// Brings a mail for which nobody waits yet.
fn bring(session: &Arc<Session>, user: &Arc<str>, key: KeyTail, size: u64) {
    let (session, user) = (session.clone(), user.clone());
    let runtime = session.runtime.clone();
    let _task = runtime.spawn(async move {
        // In the order in which they were asked for. The semaphore is never closed.
        let Ok(_slot) = session.ahead.acquire().await else { return };
        if session.is_closing() {
            return;
        }
        if let Err(error) = fetch::ahead(&session, &user, &key, size).await {
            tracing::debug!(%user, object = %key, %error, "not read ahead");
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(count: u64) -> Entries {
        let mut entries = Entries::default();
        for n in 0..count {
            entries.insert(n.to_string().as_bytes().into(), Target::Node(0));
        }
        entries
    }

    /// Cookies of the names asked for, by a reader that opens these; it waits for each that `missed` says.
    fn asked_by(
        entries: &Entries,
        opens: impl IntoIterator<Item = u64>,
        missed: impl Fn(u64) -> bool,
    ) -> Vec<(u64, u64)> {
        let mut walk = Walk::default();
        let mut asked = Vec::new();
        for cookie in opens {
            if walk.step(entries, cookie)
                && let Some((from, count)) = walk.next(entries, missed(cookie))
            {
                walk.until = if walk.back { from - count } else { from + count };
                asked.push((from, count));
            }
        }
        asked
    }

    fn asked(entries: &Entries, opens: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
        asked_by(entries, opens, |_| true)
    }

    #[test]
    fn a_walk_is_followed_both_ways_without_gaps_or_repeats() {
        let entries = entries(1000);
        let forward = asked(&entries, 100..500);
        assert_eq!(forward[0], (102, FIRST));
        for pair in forward.windows(2) {
            assert_eq!(pair[0].0 + pair[0].1, pair[1].0);
        }
        assert!(forward.len() < 20, "{forward:?}");
        let back = asked(&entries, (400..800).rev());
        assert_eq!(back[0], (797, FIRST));
        for pair in back.windows(2) {
            assert_eq!(pair[0].0 - pair[0].1, pair[1].0);
        }
    }

    #[test]
    fn only_who_catches_up_gets_more_ahead() {
        let entries = entries(1000);
        let ahead = |lots: &[(u64, u64)], at: u64| {
            lots.iter().map(|(from, count)| from + count).max().unwrap_or(at) - at
        };
        // Three opens that wait tell that somebody walks; from then on all is there in time.
        let slow = asked_by(&entries, 100..300, |cookie| cookie < 103);
        assert!(ahead(&slow, 299) <= FIRST, "{slow:?}");
        // In lots of a quarter, not one by one.
        assert!(slow.len() <= 200 / (FIRST as usize / 4) + 1, "{slow:?}");
        let fast = asked_by(&entries, 100..300, |cookie| cookie < 103 || cookie % 16 == 0);
        assert!(ahead(&fast, 299) > MOST / 4 * 3 && ahead(&fast, 299) <= MOST, "{fast:?}");
    }

    #[test]
    fn jumps_are_no_walk() {
        let entries = entries(1000);
        assert!(asked(&entries, (0..50).map(|n| 3 + n * 389 % 997)).is_empty());
        // The same mail again and again.
        assert!(asked(&entries, [5, 5, 5, 5, 5]).is_empty());
        // Here and there.
        assert!(asked(&entries, [5, 6, 5, 6, 5, 6]).is_empty());
    }

    #[test]
    fn mails_that_are_passed_over_do_not_end_it() {
        let entries = entries(1000);
        assert!(!asked(&entries, (0..20).map(|n| 10 + n * 7)).is_empty());
    }
}
