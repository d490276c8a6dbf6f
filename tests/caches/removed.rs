//! Files of both caches are removed while they are in use (I7): of a user that was just flushed nothing
//! shows of it, of any other at most what is younger than the upload interval is undone.

use crate::load::{Camp, Done, Plan};
use crate::support::check::{Tolerance, compare, look};
use crate::support::dovecot::Format;
use crate::support::model::Model;
use crate::support::mount::Mount;
use crate::support::{Outcome, fail};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vmailfs::format::key::user_dir;

const UPLOAD_INTERVAL: Duration = Duration::from_secs(2);
/// A flush that is due is made within this, on a machine with much else to do.
const LATE: Duration = Duration::from_secs(10);

/// Within this every kind of thing was removed, on any machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// What the log may complain of.
const TOLD: [&str; 2] = ["the local state was removed", "gone from the metacache, and in no flush"];

fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => files(&entry.path(), found),
            false => found.push(entry.path()),
        }
    }
}

/// Everything of a home but mails is opened, so that what is missing is noticed and comes back from
/// the last flush at once. A server looks at some files only later (of its uidlist it looks at the size
/// first), and what is undone then would show in its later sessions; and one that has read an index when
/// the log beside it goes back to the last flush may take it for damaged (Dovecot's list index).
fn meet(home: &Path) {
    let mut all = Vec::new();
    files(home, &mut all);
    let is_mail = |path: &Path| {
        let dir = path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        dir.is_some_and(|dir| ["cur", "new", "tmp", "dbox-Mails"].contains(&dir))
    };
    for path in all.iter().filter(|path| !is_mail(path)) {
        // It may be there no more.
        drop(fs::read(path));
    }
}

/// While others make files in it.
fn remove_all(dir: &Path) -> Outcome<()> {
    for _ in 0..100 {
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {}
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            done => return Ok(done?),
        }
    }
    fail(format!("{} does not get empty", dir.display()))
}

/// What goes of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// All that is in the metacache.
    Directory,
    /// And what is known of the user, its journal included.
    State,
    /// Some files of the metacache.
    Files,
}

/// What is removed, and whether the user was flushed just before.
type Kind = (What, bool);

const KINDS: [Kind; 6] = [
    (What::Directory, true),
    (What::State, true),
    (What::Files, true),
    (What::Directory, false),
    (What::State, false),
    (What::Files, false),
];

#[derive(Debug, Default)]
struct Removed {
    /// How often something of the kind was there and is gone, for each camp.
    done: [BTreeMap<Kind, u32>; 2],
    fscache: u32,
    /// Mails whose flags, or whose copies and moves, were undone; of users that were not flushed.
    undone: usize,
}

impl Removed {
    fn every_kind(&self) -> bool {
        self.done.iter().all(|done| done.len() == KINDS.len())
    }
}

struct Vandal<'a> {
    mount: &'a Mount,
    rng: StdRng,
    removed: Removed,
    /// The kinds that are next in each camp: each comes once before any comes again.
    next: [Vec<Kind>; 2],
}

impl<'a> Vandal<'a> {
    fn new(mount: &'a Mount, seed: u64) -> Vandal<'a> {
        let rng = StdRng::seed_from_u64(seed);
        Vandal { mount, rng, removed: Removed::default(), next: Default::default() }
    }

    fn flush(&self, user: &str) -> Outcome<()> {
        match self.mount.vmailfs(&["metacache", "flush", "-u", user])? {
            (true, _) => Ok(()),
            (false, text) => fail(format!("flush of {user}: {text}")),
        }
    }

    /// Something of a user goes from the metacache, if there is any of it.
    fn remove(&mut self, user: &str, what: What) -> Outcome<bool> {
        let dir = self.mount.state().join("metacache").join(user);
        let mut all = Vec::new();
        files(&dir, &mut all);
        if what != What::Files {
            remove_all(&dir)?;
            if what == What::State {
                remove_all(&self.mount.state().join("users").join(user_dir(user)))?;
            }
            return Ok(!all.is_empty());
        }
        let mut gone = false;
        for path in all.choose_multiple(&mut self.rng, 3) {
            match fs::remove_file(path) {
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                done => {
                    done?;
                    gone = true;
                }
            }
        }
        Ok(gone)
    }

    /// Takes things of one user away, and looks what that user sees then.
    fn step(&mut self, n: usize, camp: &Camp) -> Outcome<()> {
        let mut rng = StdRng::seed_from_u64(self.rng.random());
        let (user, _busy) = camp.take(&mut rng);
        if self.next[n].is_empty() {
            self.next[n] = KINDS.to_vec();
            self.next[n].shuffle(&mut self.rng);
        }
        let Some(&(what, flushed)) = self.next[n].last() else { return Ok(()) };
        // Somebody who has the mailbox open and does nothing.
        let mut idle = camp.dovecot.imap(user)?;
        let before = idle.select("INBOX")?;
        let mails = if before.exists == 0 { Vec::new() } else { idle.fetch("1:*", "UID FLAGS")? };
        if flushed {
            self.flush(user)?;
        } else {
            idle.logout();
            idle = camp.dovecot.imap(user)?;
        }
        let safe = Instant::now() - UPLOAD_INTERVAL - LATE;
        // With nothing there it is somebody else's turn to lose it.
        if self.remove(user, what)? {
            self.next[n].pop();
            *self.removed.done[n].entry((what, flushed)).or_default() += 1;
        }
        if !flushed {
            meet(&self.mount.root().join(user));
        }
        if flushed && before.exists > 0 {
            let after = idle.fetch("1:*", "UID FLAGS")?;
            let same = mails.len() == after.len()
                && mails.iter().zip(&after).all(|(a, b)| (a.uid, &a.flags) == (b.uid, &b.flags));
            if !same {
                return fail(format!("{user}, {what:?}: was {mails:?}, is {after:?}"));
            }
        }
        idle.logout();
        let seen = look(camp.dovecot.imap_port, std::slice::from_ref(user))?;
        let mut one = Model::default();
        {
            let mut model = camp.work.model();
            model.settled_until(safe);
            one.users.insert(user.clone(), model.user(user).clone());
        }
        let strict = compare(&one, &seen, Tolerance::Nothing);
        let problems = match flushed {
            true => strict,
            false => {
                self.removed.undone += strict.len();
                compare(&one, &seen, Tolerance::LostMachine)
            }
        };
        if let Some(problem) = problems.first() {
            let n = problems.len();
            return fail(format!(
                "{what:?}, flushed {flushed}: {n} problems, the first: {problem}"
            ));
        }
        if !flushed {
            // What it has become must not be undone once more: the model takes it for settled.
            self.flush(user)?;
        }
        let mut model = camp.work.model();
        match flushed {
            true => model.learn(&seen),
            false => model.adopt(&seen),
        }
        Ok(())
    }

    /// Cached mails go, and directories of them; whoever reads them does not notice.
    fn fscache(&mut self) -> Outcome<()> {
        let cache = self.mount.state().join("fscache");
        let below = |dir: &Path| -> Vec<PathBuf> {
            fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
        };
        let Some(hh) = below(&cache).choose(&mut self.rng).cloned() else { return Ok(()) };
        if !hh.is_dir() {
            return Ok(());
        }
        self.removed.fscache += 1;
        if self.rng.random_bool(0.3) {
            return remove_all(&hh);
        }
        let mut all = Vec::new();
        files(&hh, &mut all);
        for path in all.iter().take(5) {
            match fs::remove_file(path) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The load ends with whoever needs it, however that ends.
struct Enough<'a>(&'a AtomicBool);

impl Drop for Enough<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

fn remove_under_load(plan: &Plan, seed: u64) {
    let begun = Instant::now();
    let interval = format!("metacache.upload_interval={}s", UPLOAD_INTERVAL.as_secs());
    let mut mount = Mount::on_directory().option(&["--set", &interval]);
    mount.mount().unwrap();
    let root = mount.root();
    let mut camps = [Format::Maildir, Format::Sdbox].map(|f| Camp::new(&root, f, plan.users));
    let (done, stop) = (Done::default(), AtomicBool::new(false));
    done.needed.store(true, Ordering::Relaxed);
    let (removed, failures) = std::thread::scope(|scope| {
        let (done, stop, camps, mount) = (&done, &stop, &camps, &mount);
        let readers = scope.spawn(move || camps[0].slow_readers(&mount.root(), stop, done));
        let vandal = scope.spawn(move || {
            let mut vandal = Vandal::new(mount, seed);
            let _enough = Enough(&done.needed);
            let mut failures = Vec::new();
            let begun_all = || camps.iter().all(Camp::has_begun);
            while !begun_all() && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
            // Scripts and subscriptions of the first turns may be lost where nothing was flushed, and
            // the model does not say which.
            for user in camps.iter().flat_map(|camp| &camp.users) {
                failures.extend(vandal.flush(user).err().map(|e| e.to_string()));
            }
            while !stop.load(Ordering::Relaxed) {
                for (n, camp) in camps.iter().enumerate() {
                    let done = vandal.fscache().and_then(|()| vandal.step(n, camp));
                    failures.extend(done.err().map(|e| format!("{:?}: {e}", begun.elapsed())));
                }
                if vandal.removed.every_kind() || !failures.is_empty() || begun.elapsed() > PATIENCE
                {
                    done.needed.store(false, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            (vandal.removed, failures)
        });
        let work = [0, 1].map(|n| scope.spawn(move || camps[n].work(plan, seed + n as u64, done)));
        for work in work {
            work.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        readers.join().unwrap();
        vandal.join().unwrap()
    });
    println!("{:?}: {done:?}, {removed:?}", begun.elapsed());
    let said: Vec<String> = camps.iter().flat_map(|camp| camp.dovecot.complaints()).collect();
    assert!(failures.is_empty(), "{}\n{}\n{}", failures.join("\n"), said.join("\n"), mount.log());
    for camp in &camps {
        camp.must_hold(Tolerance::Nothing, "after all that");
    }
    // The books are wrong by what was removed of users that nobody has touched since, and are put
    // right.
    for cache in ["metacache", "fscache"] {
        let (first, told) = mount.vmailfs(&[cache, "rescan"]).unwrap();
        let (second, told_again) = mount.vmailfs(&[cache, "rescan"]).unwrap();
        println!("{cache} rescan: {}, then: {}", told.trim(), told_again.trim());
        assert!(first && second, "{told}{told_again}");
    }
    let log = mount.log();
    let mut texts: BTreeMap<&str, u32> = BTreeMap::new();
    for line in log.lines().filter(|line| line.contains(" ERROR ")) {
        let known = TOLD.into_iter().find(|text| line.contains(text));
        *texts.entry(known.unwrap_or_else(|| panic!("{line}"))).or_default() += 1;
    }
    println!("the log says: {texts:?}");
    assert!(!log.contains("panicked"), "{log}");
    assert!(removed.every_kind(), "not all kinds within {PATIENCE:?}: {removed:?}");
    for camp in &mut camps {
        camp.dovecot.stop();
    }
    mount.umount().unwrap();
    // Nothing of it got into the store.
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    for camp in &mut camps {
        camp.dovecot.resume(&root).unwrap();
        camp.must_hold(Tolerance::Nothing, "on a fresh machine");
        camp.dovecot.stop();
    }
    mount.umount().unwrap();
    println!("{:?} in all", begun.elapsed());
}

#[test]
fn i7_what_is_removed_under_load_is_brought_back() {
    let plan = Plan {
        users: 2,
        workers: 1,
        large: Vec::new(),
        turns: 6,
        time: Duration::ZERO,
        apart: true,
    };
    remove_under_load(&plan, 1);
}

/// As long as the variable CACHES_SECONDS says.
#[test]
#[ignore = "long; run by `make caches`"]
fn long() {
    let time = std::env::var("CACHES_SECONDS").map_or(600, |text| text.parse().unwrap());
    let time = Duration::from_secs(time);
    let plan = Plan { users: 8, workers: 2, large: vec![3_000_000], turns: 25, time, apart: true };
    remove_under_load(&plan, 2);
}
