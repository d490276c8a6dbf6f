//! Which processors are used. Between two of them a wake-up costs more than a request of the file
//! system, so what is compared must run on the same ones.

use std::mem;

fn set(cpus: &[usize]) {
    // SAFETY: a plain structure that may be all zeros, and a system call that reads it.
    unsafe {
        let mut wanted: libc::cpu_set_t = mem::zeroed();
        for cpu in cpus {
            libc::CPU_SET(*cpu, &mut wanted);
        }
        assert_eq!(libc::sched_setaffinity(0, mem::size_of_val(&wanted), &raw const wanted), 0);
    }
}

/// Those that this thread may run on.
fn get() -> Vec<usize> {
    // SAFETY: as above; the call fills the structure.
    unsafe {
        let mut allowed: libc::cpu_set_t = mem::zeroed();
        let size = mem::size_of_val(&allowed);
        assert_eq!(libc::sched_getaffinity(0, size, &raw mut allowed), 0);
        (0..libc::CPU_SETSIZE as usize).filter(|cpu| libc::CPU_ISSET(*cpu, &allowed)).collect()
    }
}

/// Where things run: servers, daemon and clients on one processor, the store on others; or all
/// of them wherever the kernel puts them.
#[derive(Debug, Clone)]
pub struct Cpus {
    all: Vec<usize>,
    pub pinned: bool,
}

impl Cpus {
    pub fn new(pinned: bool) -> Cpus {
        Cpus { all: get(), pinned }
    }

    pub fn count(&self) -> usize {
        self.all.len()
    }

    /// Runs `f`, and whatever process or thread it starts, where the store belongs.
    pub fn beside<T>(&self, f: impl FnOnce() -> T) -> T {
        if self.pinned && self.all.len() > 1 {
            set(&self.all[1..]);
        }
        let done = f();
        self.here();
        done
    }

    /// This thread, and whatever it starts from here on, runs where servers and clients belong.
    pub fn here(&self) {
        set(if self.pinned { &self.all[..1] } else { &self.all });
    }
}
