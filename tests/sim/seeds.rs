//! The tests: some seeds each time, one seed by hand, many on demand.

use super::run::{Outcome, run};
use parking_lot::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn judge(outcome: &Outcome) {
    let Some(failure) = &outcome.failure else { return };
    let from = outcome.lines.len().saturating_sub(300);
    for line in &outcome.lines[from..] {
        eprintln!("{line}");
    }
    panic!(
        "seed {}: {failure}\nto see it again: SEED={} cargo test --test sim one_seed -- --nocapture",
        outcome.seed, outcome.seed
    );
}

/// `SEED=n`: that seed, with all it does. Otherwise nothing.
#[test]
fn one_seed() {
    if let Some(seed) = number("SEED") {
        // What the daemon itself would say.
        let said = tracing_subscriber::fmt().with_writer(std::io::stderr).without_time();
        said.with_max_level(tracing::Level::INFO).with_ansi(false).init();
        judge(&run(seed, true));
    }
}

#[test]
fn a_seed_is_one_run() {
    for seed in [3, 8] {
        let (a, b) = (run(seed, false), run(seed, false));
        assert_eq!(a.sum, b.sum, "seed {seed}");
        assert!(a.sum.1 > 100);
    }
}

/// I1 to I5 under deaths, power cuts, losses and a bad store.
#[test]
fn some_seeds() {
    let (from, seeds) = (number("FROM").unwrap_or(0), number("SEEDS").unwrap_or(100));
    let (next, mails, deaths) = (AtomicU64::new(from), AtomicUsize::new(0), AtomicUsize::new(0));
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= from + seeds {
                return;
            }
            let outcome = run(seed, false);
            mails.fetch_add(outcome.safe_mails, Relaxed);
            deaths.fetch_add(outcome.deaths, Relaxed);
            if let Some(what) = &outcome.failure {
                eprintln!("seed {seed}: {what}");
                failed.lock().push(outcome);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..number("JOBS").unwrap_or(2) {
            scope.spawn(work);
        }
    });
    let (mails, deaths, mut failed) =
        (mails.into_inner(), deaths.into_inner(), failed.into_inner());
    failed.sort_by_key(|f| f.seed);
    eprintln!("{seeds} seeds from {from}: {mails} mails made safe, {deaths} deaths");
    let seeds: Vec<u64> = failed.iter().map(|f| f.seed).collect();
    if let Some(first) = failed.first() {
        eprintln!("{} seeds fail: {seeds:?}; the first:", seeds.len());
        judge(first);
    }
    assert!(mails > 10 && deaths > 3, "nothing was tried");
}

/// Every seed that ever found something.
#[test]
fn regressions() {
    for line in include_str!("seeds.txt").lines() {
        if let Some(seed) = line.split_whitespace().next().and_then(|w| w.parse().ok()) {
            judge(&run(seed, false));
        }
    }
}

/// Each deliberate mistake is noticed within so many seeds.
#[cfg(feature = "sabotage")]
#[test]
fn mistakes_are_noticed() {
    use vmailfs::sabotage::{self, Bug};
    let most = number("SEEDS").unwrap_or(200);
    let only = std::env::var("BUG").ok();
    let mut missed = Vec::new();
    eprintln!("{:<20} {:>5}  noticed as", "mistake", "seed");
    for bug in Bug::ALL {
        if only.as_ref().is_some_and(|only| *only != format!("{bug:?}")) {
            continue;
        }
        sabotage::choose(Some(bug));
        let found = (0..most).map(|seed| run(seed, false)).find(|o| o.failure.is_some());
        sabotage::choose(None);
        match found {
            Some(outcome) => {
                let what = outcome.failure.unwrap_or_default();
                let line = what.lines().find(|l| l.contains("LOST")).or(what.lines().next());
                let line = line.unwrap_or_default().trim();
                eprintln!("{:<20} {:>5}  {line}", format!("{bug:?}"), outcome.seed);
            }
            None => {
                eprintln!("{:<20}     -  NOT NOTICED in {most} seeds", format!("{bug:?}"));
                missed.push(bug);
            }
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
