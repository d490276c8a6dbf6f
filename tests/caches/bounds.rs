//! The bounds of both caches and of staging under one load, ten times as large and more (I8): as `du`
//! sees them they hold, no client gets an error, and nothing is missing.

use crate::load::{Camp, Done, Plan};
use crate::support::check::Tolerance;
use crate::support::dovecot::Format;
use crate::support::mount::Mount;
use crate::support::watch::{Watch, du};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const KB: u64 = 1 << 10;
const MB: u64 = 1 << 20;

/// What the caches may hold.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    fscache: u64,
    staging: u64,
    space: u64,
    grace: u64,
}

impl Bounds {
    fn metacache(self) -> u64 {
        self.space + self.grace
    }

    fn options(self) -> Vec<String> {
        let Bounds { fscache, staging, space, grace } = self;
        [
            format!("fscache.max_size={fscache}"),
            format!("staging.max_size={staging}"),
            format!("metacache.max_space={space}"),
            format!("metacache.max_grace={grace}"),
            "store_limits.stream_memory=16M".to_owned(),
        ]
        .into_iter()
        .flat_map(|set| ["--set".to_owned(), set])
        .collect()
    }
}

fn with(mount: Mount, bounds: Bounds) -> Mount {
    let options = bounds.options();
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    mount.option(&options)
}

fn hold(bounds: Bounds, plan: &Plan) {
    let begun = Instant::now();
    let mut mount = with(Mount::on_directory(), bounds);
    mount.mount().unwrap();
    let root = mount.root();
    let mut camps = [Format::Maildir, Format::Sdbox].map(|f| Camp::new(&root, f, plan.users));
    let state = mount.state();
    let watches = [
        (vec![state.join("fscache")], bounds.fscache),
        (vec![state.join("staging")], bounds.staging),
        (vec![state.join("metacache"), state.join("users")], bounds.metacache()),
    ]
    .map(|(dirs, bound)| (Watch::new(&dirs, Duration::from_millis(20)), bound));
    let (done, stop) = (Done::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (done, stop, camps, root) = (&done, &stop, &camps, &root);
        scope.spawn(move || camps[0].slow_readers(root, stop, done));
        let work = [0, 1].map(|n| scope.spawn(move || camps[n].work(plan, n as u64 * 100, done)));
        for work in work {
            work.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{:?}: {done:?}", begun.elapsed());
    for camp in &camps {
        camp.work.must_have_worked(&camp.dovecot, "under load");
        camp.must_hold(Tolerance::Nothing, "after the load");
    }
    println!("{:?}: everything is as it must be", begun.elapsed());
    let seen = watches.map(|(watch, bound)| (watch.end(), bound));
    let log = mount.log();
    let warnings = log.lines().filter(|l| l.contains(" WARN ")).count();
    println!("{warnings} warnings");
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
    for camp in &mut camps {
        camp.dovecot.stop();
    }
    mount.umount().unwrap();

    // How much there was: the same again on caches that have room for it.
    mount.wipe_state().unwrap();
    let wide = Bounds { fscache: 1 << 40, staging: 1 << 30, space: 1 << 40, grace: 1 << 30 };
    mount = with(mount, wide);
    mount.mount().unwrap();
    for camp in &mut camps {
        camp.dovecot.resume(&root).unwrap();
        camp.must_hold(Tolerance::Nothing, "with caches that hold all");
        camp.dovecot.stop();
    }
    let all =
        [du(&state.join("fscache")), 0, du(&state.join("metacache")) + du(&state.join("users"))];
    mount.umount().unwrap();
    let mut good = true;
    for ((name, all), (seen, bound)) in
        ["fscache", "staging", "metacache"].into_iter().zip(all).zip(seen)
    {
        println!(
            "{name}: at most {} kB of {} kB in {} samples of du; all would take {} kB (a walk that \
             saw no one moment counted {} kB)",
            seen.bytes / KB,
            bound / KB,
            seen.samples,
            all / KB,
            seen.walked / KB
        );
        good &= seen.bytes <= bound && seen.walked > bound / 5;
        good &= name == "staging" || all >= 10 * bound;
    }
    println!("{:?} in all", begun.elapsed());
    assert!(good, "a bound was passed, or was none for this load");
}

/// Staging is such that a quarter of it holds the largest mail: only so is one sure to be finished.
#[test]
#[ignore = "takes minutes; run by `make caches`"]
fn i8_both_caches_hold_under_one_load() {
    let bounds = Bounds { fscache: 4 * MB, staging: 96 * MB, space: MB, grace: MB };
    let large = vec![20_000_000, 6_000_000];
    hold(
        bounds,
        &Plan { users: 18, workers: 1, large, turns: 16, time: Duration::ZERO, apart: false },
    );
}

/// As long as the variable CACHES_SECONDS says.
#[test]
#[ignore = "long; run by `make caches`"]
fn long() {
    let time = std::env::var("CACHES_SECONDS").map_or(600, |text| text.parse().unwrap());
    let bounds = Bounds { fscache: 8 * MB, staging: 224 * MB, space: 3 * MB, grace: 2 * MB };
    let large = vec![50_000_000, 20_000_000, 6_000_000, 2_000_000];
    let time = Duration::from_secs(time);
    hold(bounds, &Plan { users: 48, workers: 3, large, turns: 40, time, apart: false });
}
