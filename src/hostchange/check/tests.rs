use super::*;
use crate::hostchange::creds::Who;
use crate::hostchange::place::Missing;
use crate::hostchange::record::MAX_RECORD;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One INDEX directory on "NFS", and any number of hosts.
struct Site {
    dir: tempfile::TempDir,
}

struct Machine {
    host: Host,
    index: PathBuf,
    local: PathBuf,
    rules: Rules,
}

impl Site {
    fn new() -> Site {
        // In memory where there is some: a thousand rounds sync ten thousand times.
        let shm = Path::new("/dev/shm");
        let dir = match shm.is_dir() {
            true => tempfile::tempdir_in(shm).unwrap(),
            false => tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir(dir.path().join("index")).unwrap();
        Site { dir }
    }

    fn machine(&self, name: &str) -> Machine {
        Machine {
            host: Host { name: name.into(), boot: format!("boot of {name}") },
            index: self.dir.path().join("index"),
            local: self.dir.path().join(format!("shm-{name}/user")),
            rules: Rules {
                patience: Duration::from_secs(20),
                migration: false,
                settle: Settle::AtEnd,
            },
        }
    }

    fn lasthost(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("index/.lasthost")).unwrap()
    }
}

impl Machine {
    fn index(&self) -> Dir {
        Dir::index(&self.index).unwrap()
    }

    fn login_at(&self, now: i64) -> Outcome {
        enter(&self.index(), &self.local, &self.host, &self.rules, now).unwrap().1
    }

    fn login(&self) -> Outcome {
        self.login_at(1_000_000)
    }

    /// With a last access far ahead: whatever others did, they did meanwhile.
    fn end(&self) -> Ended {
        let local = Dir::own(&self.local, Who::me(), Missing::Leave).unwrap().unwrap();
        ended(&self.index(), &local, &self.host, &self.rules, i64::MAX).unwrap()
    }

    /// A login, what Dovecot would build, and the end of the session.
    fn session(&self) -> Outcome {
        let outcome = self.login();
        self.build("built");
        self.end();
        outcome
    }

    fn build(&self, what: &str) {
        std::fs::write(self.local.join("dovecot.list.index"), what).unwrap();
        std::fs::write(self.local.join("dovecot.list.index.log"), what).unwrap();
    }

    fn built(&self) -> Option<String> {
        std::fs::read_to_string(self.local.join("dovecot.list.index")).ok()
    }
}

fn kept(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Kept)
}

#[test]
fn a_list_index_is_kept_while_nobody_else_comes() {
    let site = Site::new();
    let (a, b) = (site.machine("mx-a"), site.machine("mx-b"));
    assert!(matches!(a.session(), Outcome::Dropped { why: Why::New, told: Told::Written }));
    assert_eq!(site.lasthost(), "mx-a\n");
    for _ in 0..3 {
        assert!(kept(&a.session()));
        assert_eq!(a.built().as_deref(), Some("built"));
    }
    b.session();
    assert_eq!(site.lasthost(), "mx-b\n");
    match a.login() {
        Outcome::Dropped { why: Why::Elsewhere(Some(host)), told: Told::Written } => {
            assert_eq!(host, "mx-b");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(a.built(), None);
    assert!(!a.local.join("dovecot.list.index.log").exists());
    assert_eq!(site.lasthost(), "mx-a\n");
}

#[test]
fn the_index_directory_holds_no_leftovers_and_the_rest_of_it_is_untouched() {
    let site = Site::new();
    let a = site.machine("a");
    std::fs::write(a.index.join("dovecot.index.log"), "x").unwrap();
    std::fs::write(a.index.join(".lasthost.tmp.a"), "of one that died").unwrap();
    a.session();
    a.session();
    let mut names: Vec<_> =
        std::fs::read_dir(&a.index).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, [".lasthost", "dovecot.index.log"]);
}

/// Two machines with one name differ in nothing but the file they wrote.
#[test]
fn hosts_of_the_same_name_notice_each_other() {
    let site = Site::new();
    let (a, mut b) = (site.machine("mx"), site.machine("mx"));
    b.local = site.dir.path().join("other/user");
    a.session();
    assert!(!kept(&b.session()));
    assert!(!kept(&a.session()));
    assert!(!kept(&b.session()));
}

#[test]
fn what_cannot_be_read_counts_as_a_change() {
    let site = Site::new();
    let a = site.machine("a");
    a.session();
    let record = a.local.join(LASTHOST);
    let good = std::fs::read(&record).unwrap();
    let bad: [&[u8]; 5] =
        [b"", b"garbage", &good[..good.len() / 2], &[0; 4096], b"vmailfs-lasthost 2\nmore\n"];
    for text in bad {
        a.session();
        assert!(kept(&a.session()));
        std::fs::write(&record, text).unwrap();
        let outcome = a.login();
        assert!(matches!(outcome, Outcome::Dropped { .. }), "{text:?}: {outcome:?}");
        assert_eq!(a.built(), None);
        assert!(std::fs::read(&record).unwrap().len() < MAX_RECORD);
    }
    // After a boot, for a list index that is on a disk.
    a.session();
    let booted =
        Machine { host: Host { boot: "next".into(), ..a.host.clone() }, ..site.machine("a") };
    assert!(matches!(booted.login(), Outcome::Dropped { why: Why::Booted, .. }));
}

#[test]
fn a_lasthost_that_is_no_file_is_told_and_harms_nothing() {
    let site = Site::new();
    let a = site.machine("a");
    a.session();
    // Gone.
    std::fs::remove_file(a.index.join(LASTHOST)).unwrap();
    assert!(matches!(a.session(), Outcome::Dropped { why: Why::Elsewhere(None), .. }));
    // Garbage, and from the future: another file is another file.
    std::fs::remove_file(a.index.join(LASTHOST)).unwrap();
    std::fs::write(a.index.join(LASTHOST), [0xff; 5000]).unwrap();
    let future = std::time::SystemTime::now() + Duration::from_secs(1 << 30);
    std::fs::File::options()
        .write(true)
        .open(a.index.join(LASTHOST))
        .unwrap()
        .set_modified(future)
        .unwrap();
    assert!(matches!(
        a.session(),
        Outcome::Dropped { why: Why::Elsewhere(None), told: Told::Written }
    ));
    assert!(kept(&a.session()));
    // A link: replaced, and what it leads to is not touched.
    let target = site.dir.path().join("target");
    std::fs::write(&target, "precious").unwrap();
    std::fs::remove_file(a.index.join(LASTHOST)).unwrap();
    std::os::unix::fs::symlink(&target, a.index.join(LASTHOST)).unwrap();
    assert!(matches!(
        a.session(),
        Outcome::Dropped { why: Why::Unreadable(_), told: Told::Written }
    ));
    assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious");
    // A directory cannot be replaced: each login starts anew, and says so.
    std::fs::remove_file(a.index.join(LASTHOST)).unwrap();
    std::fs::create_dir(a.index.join(LASTHOST)).unwrap();
    for _ in 0..2 {
        a.build("stale");
        let outcome = a.login();
        assert!(
            matches!(outcome, Outcome::Dropped { why: Why::Unreadable(_), told: Told::Not(_) }),
            "{outcome:?}"
        );
        assert_eq!(a.built(), None);
    }
}

#[test]
fn a_session_that_was_not_seen_to_end_is_not_trusted() {
    let site = Site::new();
    let a = site.machine("a");
    a.login();
    a.build("first");
    assert!(matches!(a.login(), Outcome::Dropped { why: Why::Unsettled, .. }));
    a.build("second");
    assert_eq!(a.end(), Ended::Kept);
    assert!(kept(&a.login()));
    // Later sessions need no end: nobody was here before them.
    assert!(kept(&a.login()));
    assert_eq!(a.built().as_deref(), Some("second"));
}

#[test]
fn a_script_settles_with_a_login_that_comes_late_enough() {
    let site = Site::new();
    let mut a = site.machine("a");
    a.rules.settle = Settle::Later(Duration::from_secs(60));
    for now in [1000, 1001, 1059] {
        assert!(!kept(&a.login_at(now)), "{now}");
    }
    assert!(!kept(&a.login_at(1060)));
    assert!(kept(&a.login_at(1061)));
    // A clock that went back does not keep it open for ever.
    let mut b = site.machine("b");
    b.rules = a.rules.clone();
    for now in [9000, 1000, 1030] {
        assert!(!kept(&b.login_at(now)), "{now}");
    }
    assert!(!kept(&b.login_at(1060)));
    assert!(kept(&b.login_at(1061)));
}

#[test]
fn a_rival_met_at_the_end_is_told_in_turn() {
    let site = Site::new();
    let (a, b) = (site.machine("a"), site.machine("b"));
    a.session();
    // a is still here when b comes and goes.
    assert!(kept(&a.login()));
    b.login();
    b.build("half of the truth");
    assert_eq!(b.end(), Ended::Kept);
    assert_eq!(a.end(), Ended::Contested);
    assert_eq!(a.built(), None);
    assert!(!kept(&b.login()));
    assert!(!kept(&a.login()));
    // One that came when a had been silent for long is none.
    let c = site.machine("c");
    c.session();
    let local = Dir::own(&a.local, Who::me(), Missing::Leave).unwrap().unwrap();
    assert_eq!(ended(&a.index(), &local, &a.host, &a.rules, 1000).unwrap(), Ended::Left);
    assert!(kept(&c.login()));
}

#[test]
fn a_list_index_on_nfs_is_taken_over_once() {
    let site = Site::new();
    let mut a = site.machine("a");
    a.rules.migration = true;
    std::fs::write(a.index.join("dovecot.list.index"), "nfs").unwrap();
    std::fs::write(a.index.join("dovecot.list.index.log"), "nfs log").unwrap();
    std::fs::write(a.index.join("dovecot.list.index.log.newlock"), "").unwrap();
    assert!(matches!(
        a.login(),
        Outcome::Dropped { why: Why::Migrated(true), told: Told::Written }
    ));
    assert_eq!(a.built().as_deref(), Some("nfs"));
    assert!(Dir::index(&a.index).unwrap().list_index().unwrap().is_empty());
    a.end();
    assert!(kept(&a.login()));
    assert_eq!(a.built().as_deref(), Some("nfs"));
    // A host without the mode comes by: whether what it found there was new, nobody knows.
    std::fs::write(a.index.join("dovecot.list.index"), "later").unwrap();
    std::fs::write(a.index.join("dovecot.list.index.log"), "later log").unwrap();
    assert!(matches!(a.login(), Outcome::Dropped { why: Why::Migrated(false), .. }));
    assert_eq!(a.built(), None);
    assert!(Dir::index(&a.index).unwrap().list_index().unwrap().is_empty());
    // Half of one, as a death leaves it, is not taken over.
    let mut b = site.machine("b");
    b.rules.migration = true;
    std::fs::remove_file(a.index.join(LASTHOST)).unwrap();
    std::fs::write(a.index.join("dovecot.list.index.log"), "only the log").unwrap();
    assert!(matches!(b.login(), Outcome::Dropped { why: Why::Migrated(false), .. }));
    assert!(!b.local.join("dovecot.list.index.log").exists());
}

#[test]
fn logins_of_one_user_come_one_by_one() {
    let site = Site::new();
    let mut a = site.machine("a");
    a.login();
    let dir = Dir::own(&a.local, Who::me(), Missing::Leave).unwrap().unwrap();
    let locked = Locked::new(&dir, Duration::ZERO).unwrap();
    a.rules.patience = Duration::from_millis(20);
    let refused = enter(&a.index(), &a.local, &a.host, &a.rules, 1);
    assert!(matches!(refused, Err(Trouble::Locked(_))), "{refused:?}");
    drop(locked);
    a.login();
}

/// Done-when 4. A session looks at the folders ("state"), changes them, and keeps in its list index
/// what it saw last; another may do the same at the same moment.
struct World {
    state: AtomicUsize,
}

impl World {
    /// The session on a machine. What is found kept at the login must be right.
    fn session(&self, machine: &Machine, alone: bool) -> bool {
        let outcome = machine.login();
        if alone && let Some(seen) = machine.built() {
            let state = self.state.load(Ordering::SeqCst).to_string();
            assert_eq!(seen, state, "{} trusts a stale list index", machine.host.name);
        }
        std::thread::yield_now();
        let seen = self.state.load(Ordering::SeqCst);
        machine.build(&seen.to_string());
        std::thread::yield_now();
        self.state.fetch_add(1, Ordering::SeqCst);
        // Its own change is all that it knows of what came after its look.
        machine.build(&(seen + 1).to_string());
        kept(&outcome)
    }

    /// As one that ended alone leaves it: Dovecot has seen its own changes.
    fn quiet(&self, machine: &Machine) -> bool {
        let kept = self.session(machine, true);
        machine.build(&self.state.load(Ordering::SeqCst).to_string());
        kept
    }
}

fn race(settle: Settle, one_host: bool, rounds: usize) {
    let site = Site::new();
    let (mut a, mut b) = (site.machine("a"), site.machine(if one_host { "a" } else { "b" }));
    a.rules.settle = settle;
    b.rules.settle = settle;
    let world = World { state: AtomicUsize::new(0) };
    let mut kept = 0;
    for round in 0..rounds {
        std::thread::scope(|scope| {
            for machine in [&a, &b] {
                scope.spawn(|| {
                    world.session(machine, false);
                    if settle == Settle::AtEnd && !one_host {
                        machine.end();
                    }
                });
            }
        });
        if one_host {
            // Two sessions of one host see each other's changes through the list index itself.
            a.build(&world.state.load(Ordering::SeqCst).to_string());
            a.end();
        }
        let order = if round % 2 == 0 { [&a, &b] } else { [&b, &a] };
        for machine in order {
            for _ in 0..round % 3 {
                kept += usize::from(world.quiet(machine));
                if settle == Settle::AtEnd {
                    machine.end();
                }
            }
        }
    }
    assert!(kept > rounds / 10, "nothing was ever kept: {kept}");
}

#[test]
fn two_at_once_on_two_hosts() {
    race(Settle::AtEnd, false, 1000);
}

#[test]
fn two_at_once_on_two_hosts_by_script() {
    // Kept from the third login in a row on.
    let site_rule = Settle::Later(Duration::ZERO);
    race_by_script(site_rule, 1000);
}

#[test]
fn two_at_once_on_one_host() {
    race(Settle::AtEnd, true, 1000);
}

/// Without anybody who sees the sessions end.
fn race_by_script(settle: Settle, rounds: usize) {
    let site = Site::new();
    let (mut a, mut b) = (site.machine("a"), site.machine("b"));
    a.rules.settle = settle;
    b.rules.settle = settle;
    let world = World { state: AtomicUsize::new(0) };
    let mut kept = 0;
    for round in 0..rounds {
        std::thread::scope(|scope| {
            for machine in [&a, &b] {
                scope.spawn(|| world.session(machine, false));
            }
        });
        let order = if round % 2 == 0 { [&a, &b] } else { [&b, &a] };
        for machine in order {
            for _ in 0..round % 4 {
                kept += usize::from(world.quiet(machine));
            }
        }
    }
    assert!(kept > rounds / 10, "nothing was ever kept: {kept}");
}
