//! Chance, from a seed; also for the hash tables of the standard library, whose order would
//! otherwise differ from run to run.

use parking_lot::Mutex;
use std::cell::Cell;
use vmailfs::vmail::env::Random;

/// Repeatable numbers (splitmix64).
#[derive(Debug)]
pub struct Chance(Mutex<u64>);

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(Mutex::new(seed))
    }

    /// A number below `n`.
    pub fn below(&self, n: u64) -> u64 {
        next(&mut self.0.lock()) % n.max(1)
    }

    pub fn index(&self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// Happens `percent` times out of a hundred.
    pub fn percent(&self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Happens once in `n` times.
    pub fn once_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn between(&self, from: u64, to: u64) -> u64 {
        from + self.below(to - from)
    }

    pub fn pick<'a, T>(&self, all: &'a [T]) -> Option<&'a T> {
        if all.is_empty() { None } else { Some(&all[self.index(all.len())]) }
    }

    /// An independent source.
    pub fn split(&self) -> Chance {
        Chance::new(next(&mut self.0.lock()))
    }
}

impl Random for Chance {
    fn u64(&self) -> u64 {
        next(&mut self.0.lock())
    }
}

thread_local! {
    static THREAD: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on this thread's hash tables (and whatever else asks the system for randomness) take
/// it from `seed`. To be called on a fresh thread, before the first hash table is made.
pub fn seed_thread(seed: u64) {
    THREAD.set(Some(seed));
}

/// Takes the place of the C library's function: the standard library seeds its hash tables by it.
///
/// # Safety
/// As getrandom(2): `buf` has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buf: *mut u8, len: usize, flags: u32) -> isize {
    let Some(mut state) = THREAD.try_with(Cell::get).ok().flatten() else {
        // SAFETY: the caller's promise.
        return unsafe { libc::syscall(libc::SYS_getrandom, buf, len, flags) } as isize;
    };
    for i in 0..len {
        // SAFETY: `i` is below `len`.
        unsafe { *buf.add(i) = next(&mut state) as u8 };
    }
    THREAD.set(Some(state));
    len as isize
}
