//! A deterministic simulation of the heart: one or two machines, their disks, a store, a mail
//! server and time itself, all made from one seed.
//!
//! A run is a sequence of lives. In each, simulated mail servers work on the mounts until
//! something dies: the process, the machine's power, its disk. Then the next life begins, what
//! is there is compared with what may be there, and the work goes on. The same seed gives the
//! same run to the last byte, so a failure prints its seed and can be looked at again:
//!
//! ```text
//! SEED=17 cargo test --test sim one_seed -- --nocapture     one seed, with everything it does
//! make soak SEEDS=2000 FROM=0                               many seeds
//! FORMAT=sdbox+undelete make soak SEEDS=100                 also with mails that are brought back
//! ```
//!
//! Everything happens on one thread. The runtime's thread, when it has nothing to do, moves the
//! virtual clock to the next timer; the order of tasks, timers, answers and of the keys in hash
//! tables follows from the seed alone. What is dead stays dead: no call of a machine that died
//! reaches its disk, the store or the clock any more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod sim {
    mod chance;
    mod clock;
    mod deliver;
    mod disk;
    mod folders;
    mod indexes;
    mod maillog;
    mod model;
    mod mount;
    mod run;
    mod sdbox;
    mod seeds;
    mod server;
    mod store;
    mod uidlist;
    mod undelete;
    mod world;
    mod wrong;
}
