//! What the kernel asked for, how often that had to wait, and which errors it was told.

use crate::histogram::{Durations, Histogram};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

macro_rules! ops {
    ($($op:ident $name:literal,)*) => {
        /// An operation of the kernel.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Op { $($op,)* }

        impl Op {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Op] = &[$(Op::$op,)*];

            /// As in logs and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Op::$op => $name,)* }
            }
        }
    };
}

ops! {
    Lookup "lookup", Forget "forget", Getattr "getattr", Setattr "setattr",
    Readlink "readlink", Mknod "mknod", Mkdir "mkdir", Unlink "unlink", Rmdir "rmdir",
    Symlink "symlink", Rename "rename", Link "link", Open "open", Create "create", Read "read",
    Write "write", Flush "flush", Release "release", Fsync "fsync", Fallocate "fallocate",
    Opendir "opendir", Readdir "readdir", Releasedir "releasedir", Fsyncdir "fsyncdir",
    Statfs "statfs", Getlk "getlk", Setlk "setlk", Unsupported "unsupported",
}

const OPS: usize = Op::ALL.len();

/// Counters of one mount since it began.
#[derive(Debug)]
pub struct FuseStats {
    requests: [AtomicU64; OPS],
    answers: [Histogram; OPS],
    waits: [AtomicU64; OPS],
    waiting: AtomicU64,
    passthrough: AtomicU64,
    errors: Mutex<BTreeMap<(Op, i32), u64>>,
}

impl Default for FuseStats {
    fn default() -> Self {
        FuseStats {
            requests: std::array::from_fn(|_| AtomicU64::new(0)),
            answers: std::array::from_fn(|_| Histogram::default()),
            waits: std::array::from_fn(|_| AtomicU64::new(0)),
            waiting: AtomicU64::new(0),
            passthrough: AtomicU64::new(0),
            errors: Mutex::new(BTreeMap::new()),
        }
    }
}

impl FuseStats {
    /// Requests of this kind.
    pub fn requests(&self, op: Op) -> u64 {
        self.requests[op as usize].load(Ordering::Relaxed)
    }

    /// How long they took from their arrival to their answer; requests that need none (forget) and
    /// those that are not answered yet are not in it.
    pub fn answers(&self, op: Op) -> Durations {
        self.answers[op as usize].read()
    }

    /// How many of them could not be answered at once.
    pub fn waits(&self, op: Op) -> u64 {
        self.waits[op as usize].load(Ordering::Relaxed)
    }

    /// Requests that wait just now.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Opens whose reads go past the daemon.
    pub fn passthrough_opens(&self) -> u64 {
        self.passthrough.load(Ordering::Relaxed)
    }

    /// Errors told to the kernel, by operation and errno.
    pub fn errors(&self) -> Vec<(Op, i32, u64)> {
        self.errors.lock().iter().map(|(&(op, errno), &n)| (op, errno, n)).collect()
    }

    pub(super) fn request(&self, op: Op) -> Begun {
        self.requests[op as usize].fetch_add(1, Ordering::Relaxed);
        Begun { op, at: Instant::now() }
    }

    pub(super) fn answered(&self, begun: Begun) {
        self.answers[begun.op as usize].add(begun.at.elapsed());
    }

    /// Counts one wait, which lasts until the guard is dropped.
    pub(super) fn wait(&self, op: Op) -> Waiting<'_> {
        self.waits[op as usize].fetch_add(1, Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(&self.waiting)
    }

    pub(super) fn passthrough_open(&self) {
        self.passthrough.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn error(&self, op: Op, errno: i32) {
        *self.errors.lock().entry((op, errno)).or_default() += 1;
    }
}

/// A request that has no answer yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    pub(super) op: Op,
    at: Instant,
}

#[derive(Debug)]
pub(super) struct Waiting<'a>(&'a AtomicU64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_list() {
        for (i, op) in Op::ALL.iter().enumerate() {
            assert_eq!(*op as usize, i);
        }
    }

    #[test]
    fn a_wait_ends_with_its_guard() {
        let stats = FuseStats::default();
        let guard = stats.wait(Op::Read);
        assert_eq!((stats.waits(Op::Read), stats.waiting()), (1, 1));
        drop(guard);
        assert_eq!((stats.waits(Op::Read), stats.waiting()), (1, 0));
    }

    #[test]
    fn errors_are_counted_by_op_and_errno() {
        let stats = FuseStats::default();
        stats.error(Op::Open, libc::EACCES);
        stats.error(Op::Open, libc::EACCES);
        stats.error(Op::Read, libc::EIO);
        assert_eq!(stats.errors(), [(Op::Open, libc::EACCES, 2), (Op::Read, libc::EIO, 1)]);
    }
}
