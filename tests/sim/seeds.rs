//! The tests: some seeds each time, one seed by hand, many on demand.

use super::run::{Outcome, Plan, format_of, run};
use super::server::Format;
#[cfg(feature = "sabotage")]
use super::wrong::Kind;
use parking_lot::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What is run of a seed. `FORMAT=maildir` or `sdbox`, otherwise the seed decides;
/// `FORMAT=maildir+undelete` or `sdbox+undelete` with mails brought back.
fn plan(seed: u64) -> Plan {
    let wanted = std::env::var("FORMAT").ok();
    let plan = Plan { seed, format: format_of(seed), undeletes: false };
    wanted.and_then(|name| named(seed, &name)).unwrap_or(plan)
}

fn named(seed: u64, format: &str) -> Option<Plan> {
    let (format, undeletes) = match format.strip_suffix("+undelete") {
        Some(format) => (format, true),
        None => (format, false),
    };
    let format = match format {
        "maildir" => Format::Maildir,
        "sdbox" => Format::Sdbox,
        _ => return None,
    };
    Some(Plan { seed, format, undeletes })
}

fn judge(outcome: &Outcome) {
    let Some(failure) = &outcome.failure else { return };
    let from = outcome.lines.len().saturating_sub(300);
    for line in &outcome.lines[from..] {
        eprintln!("{line}");
    }
    panic!(
        "seed {}: {}\nto see it again: SEED={} cargo test --test sim one_seed -- --nocapture",
        outcome.seed, failure.what, outcome.seed
    );
}

/// `SEED=n`: that seed, with all it does. Otherwise nothing.
#[test]
fn one_seed() {
    if let Some(seed) = number("SEED") {
        // What the daemon itself would say.
        let said = tracing_subscriber::fmt().with_writer(std::io::stderr).without_time();
        said.with_max_level(tracing::Level::INFO).with_ansi(false).init();
        judge(&run(plan(seed), true));
    }
}

#[test]
fn a_seed_is_one_run() {
    for (seed, format, undeletes) in
        [(3, Format::Maildir, false), (8, Format::Sdbox, false), (8, Format::Sdbox, true)]
    {
        let plan = Plan { seed, format, undeletes };
        let (a, b) = (run(plan, false), run(plan, false));
        assert_eq!(a.sum, b.sum, "{plan:?}");
        assert!(a.sum.1 > 100);
    }
}

/// I1 to I5 under deaths, power cuts, losses and a bad store.
#[test]
fn some_seeds() {
    let (from, seeds) = (number("FROM").unwrap_or(0), number("SEEDS").unwrap_or(60));
    let (next, mails, deaths) = (AtomicU64::new(from), AtomicUsize::new(0), AtomicUsize::new(0));
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Relaxed);
            if seed >= from + seeds {
                return;
            }
            let outcome = run(plan(seed), false);
            if (seed - from) % 200 == 199 {
                eprintln!("{} seeds", seed - from + 1);
            }
            mails.fetch_add(outcome.safe_mails, Relaxed);
            deaths.fetch_add(outcome.deaths, Relaxed);
            if let Some(what) = &outcome.failure {
                eprintln!("seed {seed}: {:?} {}", what.kinds, what.what);
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
        let mut words = line.split_whitespace();
        if let (Some(seed), Some(format)) = (words.next(), words.next())
            && let Ok(seed) = seed.parse()
        {
            judge(&run(named(seed, format).unwrap(), false));
        }
    }
}

/// What a mistake leads to: it must be noticed as one of these, not by some side effect.
#[cfg(feature = "sabotage")]
fn leads_to(bug: vmailfs::sabotage::Bug) -> &'static [Kind] {
    use vmailfs::sabotage::Bug;
    match bug {
        Bug::AckBeforePut | Bug::WatermarkAbovePut | Bug::ListBeforeSwap => &[Kind::MailLost],
        Bug::HalfMove => &[Kind::MailLost, Kind::MailDoubled],
        Bug::HeadBeforeBundle => &[Kind::HeadTooEarly],
        Bug::CeilingNotRaised => &[Kind::UidTwice],
        Bug::GcByDifference => &[Kind::MailLost],
    }
}

/// Each deliberate mistake is noticed within so many seeds, and for what it does.
#[cfg(feature = "sabotage")]
#[test]
fn mistakes_are_noticed() {
    use vmailfs::sabotage::{self, Bug};
    let most = number("SEEDS").unwrap_or(200);
    let only = std::env::var("BUG").ok();
    let mut missed = Vec::new();
    eprintln!("{:<18} {:>5} {:>5}  noticed as", "mistake", "first", "seed");
    for bug in Bug::ALL {
        let name = format!("{bug:?}");
        if only.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        sabotage::choose(Some(bug));
        let mut first = None;
        let found = (0..most).find_map(|seed| {
            let failure = run(plan(seed), false).failure?;
            first.get_or_insert(seed);
            failure.kinds.iter().any(|k| leads_to(bug).contains(k)).then_some((seed, failure))
        });
        sabotage::choose(None);
        let first = first.map_or("-".to_owned(), |seed| seed.to_string());
        match found {
            Some((seed, failure)) => {
                let mut lines = failure.what.lines();
                let line = lines.clone().find(|l| l.contains("LOST")).or(lines.next());
                let (kinds, line) = (&failure.kinds, line.unwrap_or_default().trim());
                eprintln!("{name:<18} {first:>5} {seed:>5}  {kinds:?} {line}");
            }
            None => {
                eprintln!("{name:<18} {first:>5}     -  NOT NOTICED in {most} seeds");
                missed.push(bug);
            }
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
