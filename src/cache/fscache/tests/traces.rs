//! What is found under traffic like a mail server's, against a plain LRU of the same size.

use super::super::books::{Arrival, Books, CacheKey, Known, charge};
use super::id;
use lru::LruCache;
use std::sync::Arc;

trait Cache {
    /// Whether it was there; it is afterwards, if there is room.
    fn read(&mut self, key: &CacheKey, size: u64) -> bool;
    fn deliver(&mut self, key: &CacheKey, size: u64);
}

struct Plain {
    files: LruCache<CacheKey, u64>,
    used: u64,
    max: u64,
}

impl Plain {
    fn new(max: u64) -> Plain {
        Plain { files: LruCache::unbounded(), used: 0, max }
    }
}

impl Cache for Plain {
    fn read(&mut self, key: &CacheKey, size: u64) -> bool {
        let hit = self.files.get(key).is_some();
        if !hit {
            self.deliver(key, size);
        }
        hit
    }

    fn deliver(&mut self, key: &CacheKey, size: u64) {
        self.used += charge(size, 4096);
        self.files.put(key.clone(), charge(size, 4096));
        while self.used > self.max {
            self.used -= self.files.pop_lru().unwrap().1;
        }
    }
}

impl Cache for Books {
    fn read(&mut self, key: &CacheKey, size: u64) -> bool {
        if self.known(key).is_some() {
            self.used(key);
            return true;
        }
        arrive(self, key, size, Arrival::Read);
        false
    }

    fn deliver(&mut self, key: &CacheKey, size: u64) {
        arrive(self, key, size, Arrival::Delivered);
    }
}

fn arrive(books: &mut Books, key: &CacheKey, size: u64, arrival: Arrival) -> bool {
    let segment = books.segment_for(key, arrival);
    let bytes = charge(size, 4096);
    let Some(victims) = books.room(segment, bytes, arrival) else { return false };
    for (victim, _) in victims {
        books.takes_leave(&victim);
        books.dirs.file_goes(&victim.0);
    }
    let read = arrival == Arrival::Read;
    books.insert(key.clone(), segment, read, Known::new(size, bytes, None));
    books.release(bytes);
    assert!(books.total() <= books.max);
    true
}

fn books(max: u64) -> Books {
    Books::new(max, Arc::default())
}

fn key(n: u64) -> CacheKey {
    (Arc::from(format!("u{}", n % 100)), id(n))
}

/// Numbers that look random and are always the same.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Mails are mostly small.
fn size_of(n: u64) -> u64 {
    [3_000, 8_000, 8_000, 20_000, 60_000, 400_000][(n.wrapping_mul(0x9E37_79B9) >> 7) as usize % 6]
}

#[derive(Default)]
struct Ratio {
    hits: u64,
    reads: u64,
}

impl Ratio {
    fn note(&mut self, hit: bool) {
        self.hits += u64::from(hit);
        self.reads += 1;
    }
    fn percent(&self) -> f64 {
        self.hits as f64 * 100.0 / self.reads as f64
    }
}

/// Days of a server: mail is delivered and read by up to three devices within some hundred deliveries, a few
/// old mails are read again and again, others once; and at night, perhaps, a backup reads everything,
/// each mail twice.
fn days(cache: &mut dyn Cache, backup: bool) -> Ratio {
    const OLD: u64 = 6_000;
    let mut dice = Dice(1);
    let mut ratio = Ratio::default();
    let mut next = OLD;
    let mut due: Vec<(u64, u64)> = Vec::new();
    for day in 0..4 {
        let mut scan = 0;
        for step in 0..4_000u64 {
            let now = day * 4_000 + step;
            if dice.below(4) == 0 {
                cache.deliver(&key(next), size_of(next));
                for _ in 0..=dice.below(3) {
                    due.push((now + 5 + dice.below(1_000), next));
                }
                next += 1;
            }
            let (ready, later): (Vec<_>, Vec<_>) = due.into_iter().partition(|(at, _)| *at <= now);
            due = later;
            for (_, n) in ready {
                ratio.note(cache.read(&key(n), size_of(n)));
            }
            // A hundred mails are wanted often.
            let n = if dice.below(3) > 0 { dice.below(100) } else { dice.below(OLD) };
            ratio.note(cache.read(&key(n), size_of(n)));
            if backup && step > 2_000 {
                for _ in 0..3 {
                    cache.read(&key(scan), size_of(scan));
                    cache.read(&key(scan), size_of(scan));
                    scan = (scan + 1) % next;
                }
            }
        }
    }
    ratio
}

const MAX: u64 = 40 << 20;

#[test]
fn a_backup_costs_the_clients_little() {
    let quiet =
        (days(&mut books(MAX), false).percent(), days(&mut Plain::new(MAX), false).percent());
    let busy = (days(&mut books(MAX), true).percent(), days(&mut Plain::new(MAX), true).percent());
    let text = format!(
        "without a backup {:.1} % (LRU {:.1} %), with one {:.1} % (LRU {:.1} %)",
        quiet.0, quiet.1, busy.0, busy.1
    );
    println!("{text}");
    assert!(quiet.0 > quiet.1 - 1.0, "{text}");
    assert!(busy.0 > busy.1 + 10.0, "{text}");
    assert!(busy.0 > quiet.0 - 8.0, "{text}");
}

/// Fills a cache as it is in the evening: fresh mail nobody has read yet, and what is read often.
fn evening(cache: &mut dyn Cache) -> (Vec<u64>, Vec<u64>) {
    let (fresh, used): (Vec<u64>, Vec<u64>) = ((0..200).collect(), (1_000..1_300).collect());
    for _ in 0..3 {
        for n in &used {
            cache.read(&key(*n), 50_000);
        }
        // Time passes.
        for n in 0..100 {
            cache.read(&key(5_000 + n), 50_000);
        }
    }
    for n in &fresh {
        cache.deliver(&key(*n), 50_000);
    }
    (fresh, used)
}

fn left(cache: &mut dyn Cache, of: &[u64]) -> usize {
    of.iter().filter(|n| cache.read(&key(**n), 50_000)).count()
}

#[test]
fn a_scan_of_any_length_takes_neither_fresh_mail_nor_what_is_in_use() {
    for twice in [false, true] {
        let (mut ours, mut plain) = (books(MAX), Plain::new(MAX));
        for cache in [&mut ours as &mut dyn Cache, &mut plain] {
            evening(cache);
            for n in 10_000..20_000 {
                cache.read(&key(n), 50_000);
                if twice {
                    cache.read(&key(n), 50_000);
                }
            }
        }
        let (fresh, used): (Vec<u64>, Vec<u64>) = ((0..200).collect(), (1_000..1_300).collect());
        assert_eq!((left(&mut plain, &fresh), left(&mut plain, &used)), (0, 0));
        assert_eq!(left(&mut ours, &fresh), 200, "twice: {twice}");
        assert_eq!(left(&mut ours, &used), 300, "twice: {twice}");
    }
}

#[test]
fn deliveries_that_nobody_reads_do_not_take_what_is_in_use() {
    let mut ours = books(MAX);
    let (_, used) = evening(&mut ours);
    for n in 10_000..20_000 {
        ours.deliver(&key(n), 50_000);
    }
    assert_eq!(left(&mut ours, &used), 300);
    // The latest of them are there.
    assert_eq!(left(&mut ours, &(19_800..20_000).collect::<Vec<_>>()), 200);
}

#[test]
fn a_mail_too_large_for_its_share_is_streamed_unless_space_is_free() {
    let mut ours = books(MAX);
    assert!(arrive(&mut ours, &key(1), 30 << 20, Arrival::Read));
    let (mut ours, large) = (books(MAX), key(99_999));
    evening(&mut ours);
    for n in 10_000..12_000 {
        ours.read(&key(n), 50_000);
    }
    let before = ours.files();
    assert!(!arrive(&mut ours, &large, 20 << 20, Arrival::Read));
    assert_eq!(ours.files(), before, "nothing went for what did not come");
    assert!(arrive(&mut ours, &large, 6 << 20, Arrival::Read));
}

#[test]
fn reading_ahead_takes_the_place_of_nothing_but_what_was_read_once() {
    let mut ours = books(MAX);
    let (fresh, used) = evening(&mut ours);
    for n in 10_000..12_000 {
        arrive(&mut ours, &key(n), 50_000, Arrival::Ahead);
    }
    assert_eq!((left(&mut ours, &fresh), left(&mut ours, &used)), (200, 300));
}
