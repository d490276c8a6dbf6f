//! What the heart is given instead of taking it: clock, randomness, disk and store. With
//! simulated ones, a run is repeatable.

use crate::cache::disk::Disk;
use crate::format::Timestamp;
use crate::store::ObjectStore;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// Time, in both senses that are needed.
pub trait Clock: Send + Sync + fmt::Debug {
    /// Wall-clock time, for the mtimes that people and mail servers see.
    fn wall(&self) -> Timestamp;
    /// Time since some fixed moment, suspended time included (CLOCK_BOOTTIME): for leases and
    /// intervals.
    fn boot(&self) -> Duration;
    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// Randomness, for ids that must not collide.
pub trait Random: Send + Sync + fmt::Debug {
    fn u64(&self) -> u64;
}

/// Everything the heart reaches the world through.
#[derive(Debug, Clone)]
pub struct Env {
    pub store: Arc<dyn ObjectStore>,
    pub disk: Arc<dyn Disk>,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
}

/// The machine's own clock.
#[derive(Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> Timestamp {
        clock(nix::libc::CLOCK_REALTIME)
    }

    fn boot(&self) -> Duration {
        let t = clock(nix::libc::CLOCK_BOOTTIME);
        Duration::new(u64::try_from(t.secs).unwrap_or(0), t.nanos)
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(time))
    }
}

fn clock(id: libc::clockid_t) -> Timestamp {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec; with a clock that exists the call cannot fail.
    unsafe { libc::clock_gettime(id, &mut t) };
    Timestamp { secs: t.tv_sec, nanos: u32::try_from(t.tv_nsec).unwrap_or(0) }
}

/// The operating system's randomness.
#[derive(Debug, Default)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn u64(&self) -> u64 {
        rand::random()
    }
}
