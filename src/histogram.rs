//! Durations counted in fixed buckets: cheap enough for every operation, and what metrics need.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper ends of the buckets, in microseconds; one more bucket takes what is longer. From what is
/// answered out of memory to the longest that a delivery waits.
pub const BOUNDS: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000,
    5_000_000, 15_000_000, 60_000_000,
];
const BUCKETS: usize = BOUNDS.len() + 1;

/// See the module.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
}

/// The counts of a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Durations {
    /// Not added up; the last one is of what exceeds all bounds.
    pub buckets: [u64; BUCKETS],
    pub sum: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: std::array::from_fn(|_| AtomicU64::new(0)), nanos: AtomicU64::new(0) }
    }
}

impl Histogram {
    pub fn add(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        // A bound belongs to its bucket, and what is a fraction of a microsecond longer does not.
        let exact = took.subsec_nanos().is_multiple_of(1000);
        let at = BOUNDS.partition_point(|bound| *bound < micros || *bound == micros && !exact);
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub fn read(&self) -> Durations {
        Durations {
            buckets: std::array::from_fn(|i| self.buckets[i].load(Ordering::Relaxed)),
            sum: Duration::from_nanos(self.nanos.load(Ordering::Relaxed)),
        }
    }
}

impl Durations {
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Adds those of others.
    pub fn merge(&mut self, other: &Durations) {
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += theirs;
        }
        self.sum += other.sum;
    }

    pub fn mean(&self) -> Option<Duration> {
        let count = self.count();
        (count > 0).then(|| self.sum.div_f64(count as f64))
    }

    /// Upper ends in seconds with the counts of their buckets, as metrics have them.
    pub fn rows(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = BOUNDS.iter().map(|micros| *micros as f64 / 1e6).chain([f64::INFINITY]);
        bounds.zip(self.buckets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_duration_is_in_the_first_bucket_that_holds_it() {
        let h = Histogram::default();
        for (i, bound) in BOUNDS.iter().enumerate() {
            for (nanos, at) in [(-1, i), (0, i), (1, i + 1)] {
                let before = h.read().buckets[at];
                h.add(Duration::from_nanos((*bound * 1000).saturating_add_signed(nanos)));
                assert_eq!(h.read().buckets[at], before + 1, "{bound} µs, {nanos} ns");
            }
        }
        h.add(Duration::ZERO);
        h.add(Duration::from_secs(1 << 40));
        assert_eq!(h.read().count(), 3 * BOUNDS.len() as u64 + 2);
        assert!(BOUNDS.is_sorted());
    }

    #[test]
    fn sums_and_means() {
        let (a, b) = (Histogram::default(), Histogram::default());
        assert_eq!(a.read().mean(), None);
        a.add(Duration::from_millis(1));
        b.add(Duration::from_millis(3));
        let mut both = a.read();
        both.merge(&b.read());
        assert_eq!((both.count(), both.sum), (2, Duration::from_millis(4)));
        assert_eq!(both.mean(), Some(Duration::from_millis(2)));
        let rows: Vec<_> = both.rows().filter(|(_, n)| *n > 0).collect();
        assert_eq!(rows, [(0.001, 1), (0.005, 1)]);
        assert_eq!(both.rows().last(), Some((f64::INFINITY, 0)));
    }
}
