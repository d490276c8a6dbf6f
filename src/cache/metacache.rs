//! The books of the metacache: how much of the local disk each user's index files, listings and
//! journals take, by priority, and when they were last used.
//!
//! What counts is what `du` sees from outside, never less: files in whole blocks, every name, every
//! directory ([`of_file`], [`DIR`]). The books are kept where files are written, and made anew from
//! the disk at the start, whenever a user is opened, and by a rescan.
//!
//! Space is taken before bytes are written ([`Books::try_charge`], [`Books::reserve`]). Above
//! `max_space` others are evicted in the background; how far into `max_grace` somebody may go
//! meanwhile depends on what it is for ([`Purpose`]): what is only wanted stops first, and the last
//! part is left to what makes room (a flush) and to records that cannot wait.

use super::weight::{PRIORITIES, Unit, Weights};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// File systems give space in blocks of this size at least.
const BLOCK: u64 = 4096;
/// What a name takes in its directory, with room to spare.
const NAME: u64 = 256;
/// A directory that holds nothing. All count as part of their user's root.
pub const DIR: u64 = BLOCK + NAME;

/// What a file of `len` bytes takes: its blocks, one more for each megabyte to find them by, and
/// its name.
pub fn of_file(len: u64) -> u64 {
    len.div_ceil(BLOCK).saturating_mul(BLOCK) + (len >> 20) * BLOCK + NAME
}

/// What space is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Opening a user, loading a folder.
    Load,
    /// Index files of open users that grow.
    Write,
    /// What a flush must read to make room.
    Flush,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub max_space: u64,
    pub max_grace: u64,
}

impl Limits {
    /// Up to where bytes for a purpose are given.
    pub fn of(&self, purpose: Purpose) -> u64 {
        let eighths = match purpose {
            Purpose::Load => 4,
            Purpose::Write => 6,
            Purpose::Flush => 7,
        };
        self.max_space.saturating_add(self.max_grace / 8 * eighths)
    }

    /// Eviction goes on until no more is used.
    fn low(&self) -> u64 {
        self.max_space - self.max_space / 20
    }
}

#[derive(Debug, Default)]
struct Totals {
    used: AtomicU64,
    of: [AtomicU64; PRIORITIES],
}

/// One user's part.
#[derive(Debug)]
pub struct Account {
    totals: Arc<Totals>,
    bytes: [AtomicU64; PRIORITIES],
    /// Seconds since 1970, 0 for never.
    access: [AtomicI64; PRIORITIES],
    /// The program that used it last.
    service: Mutex<Option<Arc<str>>>,
}

fn take(from: &AtomicU64, bytes: u64) -> u64 {
    let before =
        from.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| Some(n.saturating_sub(bytes)));
    before.unwrap_or(0).min(bytes)
}

impl Account {
    fn slot(priority: usize) -> usize {
        priority.min(PRIORITIES - 1)
    }

    /// Bytes are there, whatever the limits say.
    pub fn charge(&self, priority: usize, bytes: u64) {
        self.totals.used.fetch_add(bytes, Ordering::AcqRel);
        self.add(priority, bytes);
    }

    fn add(&self, priority: usize, bytes: u64) {
        let p = Self::slot(priority);
        self.bytes[p].fetch_add(bytes, Ordering::AcqRel);
        self.totals.of[p].fetch_add(bytes, Ordering::AcqRel);
    }

    /// Bytes are gone.
    pub fn release(&self, priority: usize, bytes: u64) {
        let p = Self::slot(priority);
        let gone = take(&self.bytes[p], bytes);
        take(&self.totals.of[p], gone);
        take(&self.totals.used, gone);
    }

    /// What a count of the disk found.
    pub fn set(&self, bytes: [u64; PRIORITIES]) {
        for (p, bytes) in bytes.into_iter().enumerate() {
            let before = self.bytes[p].load(Ordering::Acquire);
            if bytes >= before {
                self.charge(p, bytes - before);
            } else {
                self.release(p, before - bytes);
            }
        }
    }

    pub fn used_at(&self, priority: usize, secs: i64) {
        self.access[Self::slot(priority)].fetch_max(secs, Ordering::AcqRel);
    }

    pub fn used_by(&self, service: Arc<str>) {
        *self.service.lock() = Some(service);
    }

    pub fn last_service(&self) -> Option<Arc<str>> {
        self.service.lock().clone()
    }

    pub fn bytes(&self) -> [u64; PRIORITIES] {
        [0, 1, 2, 3].map(|p: usize| self.bytes[p].load(Ordering::Acquire))
    }

    pub fn last_access(&self) -> [i64; PRIORITIES] {
        [0, 1, 2, 3].map(|p: usize| self.access[p].load(Ordering::Acquire))
    }
}

/// Space that was set aside; given back when dropped.
#[derive(Debug)]
pub struct Reserved {
    totals: Arc<Totals>,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        take(&self.totals.used, self.bytes);
    }
}

/// One unit of eviction, as it is weighed now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weighed {
    pub user: Arc<str>,
    pub priority: usize,
    pub bytes: u64,
    pub last_access: i64,
    pub weight: i64,
}

#[derive(Debug)]
pub struct Books {
    pub limits: Limits,
    pub weights: Weights,
    totals: Arc<Totals>,
    accounts: Mutex<HashMap<Arc<str>, Arc<Account>>>,
    /// Bytes that somebody waits for.
    wanted: AtomicU64,
    /// More is used than may stay.
    pub pressed: tokio::sync::Notify,
    /// Something was evicted.
    pub freed: tokio::sync::Notify,
}

impl Books {
    pub fn new(limits: Limits, weights: Weights) -> Books {
        Books {
            limits,
            weights,
            totals: Arc::default(),
            accounts: Mutex::default(),
            wanted: AtomicU64::new(0),
            pressed: tokio::sync::Notify::new(),
            freed: tokio::sync::Notify::new(),
        }
    }

    pub fn account(&self, user: &Arc<str>) -> Arc<Account> {
        let mut all = self.accounts.lock();
        let new = || {
            Arc::new(Account {
                totals: self.totals.clone(),
                bytes: Default::default(),
                access: Default::default(),
                service: Mutex::default(),
            })
        };
        all.entry(user.clone()).or_insert_with(new).clone()
    }

    pub fn known(&self, user: &str) -> Option<Arc<Account>> {
        self.accounts.lock().get(user).cloned()
    }

    /// A user of whom nothing is on the disk any more.
    pub fn forget(&self, user: &str) {
        if let Some(account) = self.accounts.lock().remove(user) {
            account.set([0; PRIORITIES]);
        }
    }

    /// Everything that is used or set aside.
    pub fn used(&self) -> u64 {
        self.totals.used.load(Ordering::Acquire)
    }

    pub fn by_priority(&self) -> [u64; PRIORITIES] {
        [0, 1, 2, 3].map(|p: usize| self.totals.of[p].load(Ordering::Acquire))
    }

    /// Users of whom something is on the disk, by name.
    pub fn users(&self) -> Vec<(Arc<str>, Arc<Account>)> {
        let all = self.accounts.lock();
        let mut users: Vec<_> = all.iter().map(|(name, a)| (name.clone(), a.clone())).collect();
        drop(all);
        users.sort_by(|a, b| a.0.cmp(&b.0));
        users
    }

    /// More is used than may stay: says so to who evicts.
    pub fn press(&self) {
        if self.used() > self.limits.max_space {
            self.pressed.notify_one();
        }
    }

    fn take_room(&self, bytes: u64, purpose: Purpose) -> bool {
        let limit = self.limits.of(purpose);
        let room = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        let taken =
            self.totals.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).is_ok();
        self.press();
        taken
    }

    /// Bytes that are about to be written; false if there is no room for them.
    pub fn try_charge(
        &self,
        account: &Account,
        priority: usize,
        bytes: u64,
        purpose: Purpose,
    ) -> bool {
        let taken = self.take_room(bytes, purpose);
        if taken {
            account.add(priority, bytes);
        }
        taken
    }

    /// Sets space aside, if there is room.
    pub fn reserve(&self, bytes: u64, purpose: Purpose) -> Option<Reserved> {
        (bytes == 0 || self.take_room(bytes, purpose))
            .then(|| Reserved { totals: self.totals.clone(), bytes })
    }

    /// Space for what makes room, and cannot wait for it.
    pub fn insist(&self, bytes: u64) -> Reserved {
        self.totals.used.fetch_add(bytes, Ordering::AcqRel);
        Reserved { totals: self.totals.clone(), bytes }
    }

    /// Somebody waits for so many bytes, until the guard is dropped.
    pub fn want(&self, bytes: u64) -> Wanted<'_> {
        self.wanted.fetch_add(bytes, Ordering::AcqRel);
        self.pressed.notify_one();
        Wanted { books: self, bytes }
    }

    /// How much is to be evicted.
    pub fn excess(&self) -> u64 {
        let (used, wanted) = (self.used(), self.wanted.load(Ordering::Acquire));
        let limits = &self.limits;
        let waiting = wanted > 0 && used.saturating_add(wanted) > limits.of(Purpose::Load);
        if used > limits.max_space || waiting {
            let room = limits.of(Purpose::Load).saturating_sub(wanted);
            used.saturating_sub(limits.low().min(room))
        } else {
            0
        }
    }

    /// All units that hold something, what is to go first in front.
    pub fn units(&self) -> Vec<Weighed> {
        let of = self.by_priority();
        let mut units = Vec::new();
        for (user, account) in self.users() {
            let (bytes, access) = (account.bytes(), account.last_access());
            for priority in (0..PRIORITIES).filter(|p| bytes[*p] > 0) {
                let unit = Unit {
                    priority,
                    last_access: access[priority],
                    bytes: bytes[priority],
                    of_priority: of[priority],
                };
                units.push(Weighed {
                    user: user.clone(),
                    priority,
                    bytes: unit.bytes,
                    last_access: unit.last_access,
                    weight: self.weights.weigh(unit, self.limits.max_space),
                });
            }
        }
        // Of equal weight the less important priority goes first.
        units.sort_by(|a, b| {
            (a.weight, std::cmp::Reverse(a.priority), &a.user).cmp(&(
                b.weight,
                std::cmp::Reverse(b.priority),
                &b.user,
            ))
        });
        units
    }
}

/// See [`Books::want`].
#[derive(Debug)]
pub struct Wanted<'a> {
    books: &'a Books,
    bytes: u64,
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        take(&self.books.wanted, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn books(max_space: u64, max_grace: u64) -> Books {
        Books::new(Limits { max_space, max_grace }, Weights::none())
    }

    #[test]
    fn whole_blocks_count() {
        assert_eq!(of_file(0), NAME);
        assert_eq!(of_file(1), BLOCK + NAME);
        assert_eq!(of_file(BLOCK), BLOCK + NAME);
        assert_eq!(of_file(BLOCK + 1), 2 * BLOCK + NAME);
        assert_eq!(of_file(2 << 20), (2 << 20) + 2 * BLOCK + NAME);
    }

    #[test]
    fn what_is_for_later_stops_first() {
        let books = books(1000, 800);
        let account = books.account(&"u".into());
        account.charge(3, 1000);
        assert!(books.try_charge(&account, 3, 400, Purpose::Load));
        assert!(!books.try_charge(&account, 3, 1, Purpose::Load));
        assert!(books.try_charge(&account, 2, 200, Purpose::Write));
        assert!(!books.try_charge(&account, 2, 1, Purpose::Write));
        let held = books.reserve(100, Purpose::Flush).unwrap();
        assert!(books.reserve(1, Purpose::Flush).is_none());
        assert_eq!(books.used(), 1700);
        drop(held);
        assert_eq!(books.used(), 1600);
        assert_eq!(account.bytes(), [0, 0, 200, 1400]);
        assert_eq!(books.by_priority(), [0, 0, 200, 1400]);
    }

    #[test]
    fn more_is_never_given_back_than_was_taken() {
        let books = books(1000, 800);
        let (a, b) = (books.account(&"a".into()), books.account(&"b".into()));
        a.charge(0, 10);
        b.charge(0, 20);
        a.release(0, 100);
        assert_eq!((books.used(), books.by_priority()[0]), (20, 20));
        b.set([1, 2, 3, 4]);
        assert_eq!((books.used(), books.by_priority()), (10, [1, 2, 3, 4]));
        books.forget("b");
        assert_eq!(books.used(), 0);
        assert!(books.known("b").is_none());
    }

    #[test]
    fn eviction_goes_below_the_bound_and_makes_room_for_who_waits() {
        let books = books(1000, 800);
        let account = books.account(&"u".into());
        account.charge(3, 1000);
        assert_eq!(books.excess(), 0);
        account.charge(3, 10);
        assert_eq!(books.excess(), 60);
        account.release(3, 10);
        let waits = books.want(500);
        assert_eq!(books.excess(), 100);
        drop(waits);
        assert_eq!(books.excess(), 0);
    }

    #[test]
    fn what_was_used_longest_ago_goes_first() {
        let books = books(1000, 800);
        for (user, priority, at) in [("a", 3, 30), ("b", 2, 10), ("a", 2, 20), ("c", 0, 20)] {
            let account = books.account(&user.into());
            account.charge(priority, 10);
            account.used_at(priority, at);
        }
        let order: Vec<_> =
            books.units().into_iter().map(|u| (u.user.to_string(), u.priority)).collect();
        let want = [("b", 2), ("a", 2), ("c", 0), ("a", 3)];
        assert_eq!(order, want.map(|(user, p)| (user.to_string(), p)));
    }
}
