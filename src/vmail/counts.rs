//! What the heart did since the mount began, in numbers.

use super::error::Result;
use super::flush::Report;
use crate::cache::weight::PRIORITIES;
use crate::histogram::{Durations, Histogram};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// See the module.
#[derive(Debug, Default)]
pub struct Counts {
    opens_local: AtomicU64,
    opens_store: AtomicU64,
    loads_local: AtomicU64,
    loads_store: AtomicU64,
    flushes: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    time: Histogram,
    evictions: [AtomicU64; PRIORITIES],
    evicted_bytes: [AtomicU64; PRIORITIES],
}

/// The numbers of a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CountsNow {
    /// Users opened whose state on the local disk was good, and others.
    pub opens_local: u64,
    pub opens_store: u64,
    /// Folders whose listing was on the local disk, and others.
    pub loads_local: u64,
    pub loads_store: u64,
    /// Flushes that wrote something,
    pub flushes: u64,
    /// and those that failed.
    pub flushes_failed: u64,
    /// Bytes that flushes wrote.
    pub flushed_bytes: u64,
    /// How long both kinds took.
    pub flush_time: Durations,
    /// Users of whom files of a priority were removed to make room, and what that freed.
    pub evictions: [u64; PRIORITIES],
    pub evicted_bytes: [u64; PRIORITIES],
}

impl Counts {
    /// A user was opened.
    pub fn opened(&self, local: bool) {
        let counter = if local { &self.opens_local } else { &self.opens_store };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// So many folders were loaded.
    pub fn loaded(&self, local: usize, store: usize) {
        self.loads_local.fetch_add(local as u64, Ordering::Relaxed);
        self.loads_store.fetch_add(store as u64, Ordering::Relaxed);
    }

    /// A flush ended. One that found nothing to do does not count.
    pub fn flushed(&self, took: Duration, done: &Result<Report>) {
        match done {
            Ok(report) if !report.flushed => return,
            Ok(report) => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(report.bytes, Ordering::Relaxed);
            }
            Err(_) => _ = self.failed.fetch_add(1, Ordering::Relaxed),
        }
        self.time.add(took);
    }

    /// A user's files of a priority were removed to make room.
    pub fn evicted(&self, priority: usize, bytes: u64) {
        let at = priority.min(PRIORITIES - 1);
        self.evictions[at].fetch_add(1, Ordering::Relaxed);
        self.evicted_bytes[at].fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn now(&self) -> CountsNow {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CountsNow {
            opens_local: get(&self.opens_local),
            opens_store: get(&self.opens_store),
            loads_local: get(&self.loads_local),
            loads_store: get(&self.loads_store),
            flushes: get(&self.flushes),
            flushes_failed: get(&self.failed),
            flushed_bytes: get(&self.bytes),
            flush_time: self.time.read(),
            evictions: self.evictions.each_ref().map(get),
            evicted_bytes: self.evicted_bytes.each_ref().map(get),
        }
    }
}
