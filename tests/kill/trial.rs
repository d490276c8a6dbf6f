//! One mail server over one mount, whose daemon is killed round after round while everything it
//! holds goes on living.
//!
//! A round: everything is flushed; clients work and note what they are told; the daemon dies;
//! the local state is deleted or kept (the cached mails are deleted either way); it is mounted
//! again, sometimes to be killed once more before it has recovered; then every mailbox is read
//! through Dovecot and compared with what was acknowledged.
//!
//! Nothing heals what the kill left but what an administrator's init scripts do: leftover lock
//! files of dead processes are removed.

use super::half::of_half_a_mail;
use super::rebuild::replaces_a_file;
use super::table::Row;
use super::traffic::{Traffic, answers};
use crate::support::check::{Kind, Problem, Tolerance, compare};
use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::model::Witness;
use crate::support::mount::Mount;
use crate::support::workload::{Size, Workload, user_names};
use crate::support::{Outcome, fail, remove_locks, wait_until};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Important changes are in the store after this.
const INTERVAL: Duration = Duration::from_secs(1);
/// How much longer that may take: the scheduler's tick, and so many times what a flush of
/// everything took before the load.
const SLACK: Duration = Duration::from_secs(3);
const SLOWER: u32 = 8;
/// How long clients may work until something is acknowledged or a failpoint is reached.
const PATIENCE: Duration = Duration::from_secs(120);

/// When the daemon dies.
#[derive(Debug, Clone)]
pub enum Shot {
    /// So long after something was acknowledged.
    After(Duration),
    /// At a failpoint under load: a plan as in `src/failpoint.rs`.
    At(String),
    /// At a failpoint during `vmailfs umount`.
    Leaving(String),
    /// At a random moment under load, and once more at a failpoint while it recovers.
    Recovering(Duration, String),
    /// At a random moment, and so long after each of the next mounts.
    Again(Duration, Vec<Duration>),
    /// Some index files of open mailboxes vanish; at a failpoint while they are brought back.
    Restoring(String),
}

#[derive(Debug, Clone)]
pub struct Round {
    pub shot: Shot,
    pub wipe: bool,
    /// Whether Dovecot goes on over the dead mount and the next one.
    pub survivor: bool,
}

pub struct Trial {
    format: Format,
    store: &'static str,
    mount: Mount,
    dovecot: Dovecot,
    work: Workload,
    users: Vec<String>,
    rng: StdRng,
    plan: PathBuf,
    rounds: u32,
    /// Changes older than this are in the store when the daemon dies.
    window: Duration,
}

impl Trial {
    pub fn new(format: Format, store: &'static str, mount: Mount, seed: u64) -> Trial {
        let users = user_names(2);
        let work = Workload::new(seed, &users);
        let plan = mount.beside("failpoints");
        let interval = format!("{}s", INTERVAL.as_secs());
        let mut mount = mount
            .variable("VMAILFS_FAILPOINTS", &plan.display().to_string())
            .option(&["--single-backend", "--upload-interval", &interval]);
        mount.mount().unwrap();
        let dovecot = Dovecot::start(&mount.root(), &Layout::usual(format), &users).unwrap();
        work.first_round(&dovecot, Size { one_by_one: 2, at_once: 2, to_all: 1, appended: 2 });
        work.must_have_worked(&dovecot, "before the first kill");
        work.must_hold(&dovecot, Tolerance::Nothing, "before the first kill");
        let root = mount.root();
        let witness = Witness(Arc::new(move || answers(&root)));
        work.model().witness = Some(witness);
        let rng = StdRng::seed_from_u64(seed);
        Trial { format, store, mount, dovecot, work, users, rng, plan, rounds: 0, window: INTERVAL }
    }

    /// A round as chance will have it.
    pub fn any_round(&mut self) -> Round {
        let rng = &mut self.rng;
        let mut soon = |most| Duration::from_millis(rng.random_range(0..most));
        let time = soon(if self.rounds % 8 == 3 { 12_000 } else { 4000 });
        let shot = match self.rng.random_range(0..10) {
            0..3 => Shot::After(time),
            3 => Shot::Again(time, vec![Duration::from_millis(self.rng.random_range(0..800))]),
            4..9 => {
                const POINTS: [&str; 13] = [
                    "publish.before-put",
                    "publish.after-put",
                    "publish.after-record",
                    "flush.before-bundle",
                    "flush.after-bundle",
                    "flush.before-swap",
                    "flush.after-swap",
                    "journal.before-append",
                    "journal.torn",
                    "journal.after-append",
                    "journal.after-append",
                    "journal.after-append",
                    "journal.before-sync",
                ];
                let point = POINTS[self.rng.random_range(0..POINTS.len())];
                let often = match point.split('.').next() {
                    Some("journal") => 120,
                    Some("publish") => 15,
                    _ => 3,
                };
                Shot::At(format!("{point}=kill@{}", self.rng.random_range(1..=often)))
            }
            _ => Shot::Again(time, (0..2).map(|n| Duration::from_millis(n * 200 + 20)).collect()),
        };
        // Every second round, whatever was drawn.
        let wipe = self.rounds % 2 == 1;
        Round { shot, wipe, survivor: self.rng.random_bool(0.3) }
    }

    /// Runs a round. The problems found are printed; the row counts them.
    pub fn round(&mut self, round: &Round) -> Row {
        self.rounds += 1;
        let what =
            format!("{} {} round {}: {round:?}", self.store, self.format.name(), self.rounds);
        self.try_round(round).unwrap_or_else(|failure| {
            panic!("{what}: {failure}\ndaemon's log:\n{}", tail(&self.mount.log(), 60))
        })
    }

    fn try_round(&mut self, round: &Round) -> Outcome<Row> {
        let begun = Instant::now();
        self.flush_all()?;
        self.window = INTERVAL + SLACK + begun.elapsed() * SLOWER;
        self.work.model().settled();
        let before = self.work.model().acknowledged;
        self.dovecot.forget_log();
        let mut refused = self.load(round)?;
        if !refused.is_empty() {
            refused.extend(self.dovecot.complaints().into_iter().filter(|l| !of_death(l)));
        }
        // What it says over a dead mount, or crashes with there, says nothing of the mailboxes.
        let lines = self.dovecot.complaints().into_iter().take_while(|line| !of_death(line));
        let under_load = corruptions(self.format, lines);
        let mut kills = 1;
        self.bury(round)?;
        let again: Vec<Shot> = match &round.shot {
            Shot::Recovering(_, plan) => vec![Shot::At(plan.clone())],
            Shot::Again(_, times) => times.iter().map(|t| Shot::After(*t)).collect(),
            _ => Vec::new(),
        };
        for shot in again {
            self.mount_and_die(&shot)?;
            kills += 1;
            self.bury(round)?;
        }
        self.come_back()?;
        let acknowledged = self.work.model().acknowledged;
        let (mails, changes) = (acknowledged.0 - before.0, acknowledged.1 - before.1);
        if mails == 0 {
            return fail("no mail was acknowledged: this round shows nothing");
        }
        let mut row = Row {
            format: self.format.name(),
            store: self.store,
            wiped: round.wipe,
            kills,
            mails,
            changes,
            refused: refused.clone(),
            corrupted: under_load,
            ..Row::default()
        };
        self.check(round, &mut row, &refused)?;
        Ok(row)
    }

    fn flush_all(&self) -> Outcome<()> {
        let root = self.mount.root();
        let arguments = ["metacache", "flushall", "--mountpoint", &root.display().to_string()];
        match self.mount.vmailfs(&arguments)? {
            (true, _) => Ok(()),
            (false, text) => fail(format!("flushall: {text}")),
        }
    }

    /// Clients at work until the daemon is dead.
    fn load(&mut self, round: &Round) -> Outcome<Vec<String>> {
        let pause = Duration::from_millis(self.rng.random_range(0..400));
        let refused = Arc::new(Mutex::new(Vec::new()));
        let traffic = Traffic {
            work: &self.work,
            ports: self.dovecot.ports(),
            root: self.mount.root(),
            users: &self.users,
            maildir: (self.format == Format::Maildir).then_some("mail"),
            refused: refused.clone(),
            clients: AtomicUsize::new(0),
            enough: AtomicBool::new(false),
        };
        let (mount, plan, work) = (&mut self.mount, &self.plan, &self.work);
        let (dovecot, window) = (&mut self.dovecot, self.window);
        let outcome = thread::scope(|scope| {
            let before = work.model().acknowledged.0;
            traffic.start(scope);
            let end = Instant::now() + PATIENCE;
            while work.model().acknowledged.0 < before + 3 && Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
            }
            let gone = || traffic.clients.load(Ordering::SeqCst) == 0;
            // Whose paths lead elsewhere half-way takes back a mail of mdbox that its index has,
            // and who dies in a rebuild of sdbox leaves an empty index, on any file system: a mail
            // server is stopped before its mount. It lets those who are at work go on, and who has
            // waited long enough for it kills it, in the middle of a mail (see `half.rs`): so its
            // clients end first.
            let stopped = match round.shot {
                Shot::Leaving(_) => {
                    traffic.enough.store(true, Ordering::SeqCst);
                    match wait_until(PATIENCE, gone) && dovecot.stop() {
                        true => Ok(()),
                        false => fail("the mail server does not end by itself"),
                    }
                }
                _ => Ok(()),
            };
            let shot = stopped.and_then(|()| kill(mount, plan, &round.shot));
            work.model().settled_until(Instant::now() - window);
            if shot.is_err() {
                // Ends the clients, too.
                mount.kill9();
            }
            thread::sleep(pause);
            // Some wait minutes for a lock that cannot be made on a dead mount.
            if shot.is_err() || !round.survivor || !wait_until(Duration::from_secs(1), gone) {
                dovecot.kill9();
            }
            shot
        });
        outcome?;
        Ok(std::mem::take(&mut refused.lock().unwrap()))
    }

    /// Takes away what the dead daemon left.
    fn bury(&mut self, round: &Round) -> Outcome<()> {
        let _ = std::fs::remove_file(&self.plan);
        self.mount.kill9();
        match round.wipe {
            true => self.mount.wipe_state(),
            false => self.mount.empty_fscache(),
        }
    }

    /// Mounts, lets clients look, and kills in the middle of it.
    fn mount_and_die(&mut self, shot: &Shot) -> Outcome<()> {
        if let Shot::At(plan) = shot {
            std::fs::write(&self.plan, plan)?;
        }
        self.mount.mount()?;
        let root = self.mount.root();
        let (ports, users) = (self.dovecot.ports(), self.users.clone());
        let traffic = Traffic {
            work: &self.work,
            ports,
            root: root.clone(),
            users: &users,
            maildir: None,
            refused: Arc::default(),
            clients: AtomicUsize::new(0),
            enough: AtomicBool::new(false),
        };
        let (mount, dovecot) = (&mut self.mount, &mut self.dovecot);
        thread::scope(|scope| {
            let (traffic, root) = (&traffic, &root);
            scope.spawn(move || {
                for user in traffic.users {
                    // Opens the user.
                    let _ = std::fs::read_dir(root.join(user).join("mail"));
                }
                while answers(root) {
                    for user in traffic.users {
                        let _ = traffic.watch(user);
                    }
                    thread::sleep(Duration::from_millis(20));
                }
            });
            let shot = match shot {
                Shot::After(time) => {
                    // Without Dovecot it would only be mounted.
                    let _ = dovecot.resume_unless_running(root);
                    thread::sleep(*time);
                    mount.shoot()
                }
                _ => mount.must_have_been_shot(PATIENCE),
            };
            if shot.is_err() {
                mount.kill9();
            }
            dovecot.kill9();
            shot
        })
    }

    fn come_back(&mut self) -> Outcome<()> {
        if let Some(place) = self.evidence() {
            let _ = std::fs::remove_dir_all(&place);
            std::fs::create_dir_all(&place)?;
            for name in ["store", "state"] {
                copy_tree(&self.mount.beside(name), &place.join(name));
            }
        }
        self.mount.mount()?;
        self.mount.running()?;
        let root = self.mount.root();
        if !self.dovecot.is_running() {
            remove_locks(&root);
        }
        self.dovecot.forget_log();
        self.dovecot.resume_unless_running(&root)
    }

    /// Compares all mailboxes with what was acknowledged.
    fn check(&mut self, round: &Round, row: &mut Row, refused: &[String]) -> Outcome<()> {
        let restored = matches!(round.shot, Shot::Restoring(_));
        let lossy = round.wipe || restored;
        let tolerance = if lossy { Tolerance::LostMachine } else { Tolerance::Nothing };
        self.work.model().resolve();
        if restored && self.format == Format::Mdbox {
            // The indexes are those of the last flush; mails that came since are not in them, and
            // mails that went are. The daemon's log says so, and this is what an administrator
            // does then. An index of sdbox is right by itself; a resync would only find what was
            // half expunged when an earlier machine was lost.
            let _ = self.dovecot.look();
            self.work.maintain(&self.dovecot);
            self.dovecot.forget_log();
        }
        let seen = self.dovecot.look()?;
        let problems = compare(&self.work.model(), &seen, tolerance);
        for problem in &problems {
            *match problem.kind {
                Kind::Lost | Kind::FolderMissing | Kind::Content => &mut row.lost,
                Kind::UidReused | Kind::UidNextWentBack => &mut row.uid_clashes,
                Kind::UidValidityChanged => &mut row.uid_validity,
                Kind::Flags => &mut row.flags,
                Kind::Duplicate => &mut row.duplicates,
                _ => &mut row.others,
            } += 1;
        }
        let complaints = self.dovecot.complaints();
        row.corrupted.extend(corruptions(self.format, complaints.iter().cloned()));
        // A rebuild of mdbox brings a mail twice that is being delivered meanwhile, takes flags
        // back, and ends sessions.
        let rebuilds = self.format == Format::Mdbox && self.dovecot.ever_said("rebuilding indexes");
        // And one that replaced a file lost what was being appended to it (see `rebuild.rs`).
        let mut lines = refused.iter().chain(&complaints);
        if rebuilds && lines.any(|line| replaces_a_file(self.format, line).is_some()) {
            row.rebuilt += std::mem::take(&mut row.lost);
        }
        if rebuilds {
            row.rebuilt += row.duplicates + row.flags + row.others;
            (row.duplicates, row.flags, row.others) = (0, 0, 0);
        }
        if row.bad() {
            self.report(round, row, &problems, &complaints, refused);
        }
        let mut model = self.work.model();
        model.adopt(&seen);
        for user in model.users.values_mut() {
            user.clashes.clear();
        }
        Ok(())
    }

    fn report(
        &self,
        round: &Round,
        row: &Row,
        problems: &[Problem],
        complaints: &[String],
        refused: &[String],
    ) {
        let mut text = format!(
            "\n=== {} {} seed {} round {}: {round:?}\n{row:?}\n",
            self.store,
            self.format.name(),
            self.work.seed(),
            self.rounds
        );
        for problem in problems {
            text += &format!("  {problem}\n");
        }
        text += &format!("Dovecot's log:\n{}\n", complaints.join("\n"));
        text += &format!("refused: {refused:#?}\n");
        text += &format!("the daemon's log:\n{}", tail(&self.mount.log(), 40));
        eprintln!("{text}");
        if let Some(place) = self.evidence() {
            let _ = std::fs::write(place.join("report"), text);
            copy_tree(&self.mount.root(), &place.join("mnt"));
            self.dovecot.copy_log(&place.join("dovecot.log"));
            let _ = std::fs::rename(&place, place.with_extension(self.rounds.to_string()));
        }
    }

    /// Where the store and the local state are kept as they were before a round's last mount:
    /// below the directory that the variable KILL_EVIDENCE names. A bad round's stay.
    fn evidence(&self) -> Option<PathBuf> {
        let place = std::env::var_os("KILL_EVIDENCE")?;
        Some(PathBuf::from(place).join(format!("{}-{}", self.store, self.format.name())))
    }
}

fn copy_tree(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.is_ok_and(|status| status.success()) || !from.exists());
}

/// Kills as told; the daemon was alive before, and is dead by SIGKILL after it.
fn kill(mount: &mut Mount, plan: &PathBuf, shot: &Shot) -> Outcome<()> {
    let daemon = mount.running()?;
    let arm = |text: &str| {
        let new = plan.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, plan)
    };
    match shot {
        Shot::After(time) | Shot::Again(time, _) | Shot::Recovering(time, _) => {
            thread::sleep(*time);
            mount.shoot()?;
        }
        Shot::At(text) => {
            arm(text)?;
            mount.must_have_been_shot(PATIENCE)?;
        }
        Shot::Leaving(text) => {
            arm(text)?;
            let left = mount.umount();
            if left.is_ok() {
                return fail("the failpoint was not reached by umount");
            }
            mount.must_have_been_shot(PATIENCE)?;
        }
        Shot::Restoring(text) => {
            arm(text)?;
            // What was open at that moment needs nothing to be brought back.
            let end = Instant::now() + PATIENCE;
            loop {
                remove_indexes(&mount.state());
                match mount.must_have_been_shot(Duration::from_secs(1)) {
                    Err(_) if Instant::now() < end => {}
                    shot => break shot?,
                }
            }
        }
    }
    match mount.pid() {
        Some(pid) if pid == daemon => Ok(()),
        other => fail(format!("the daemon was {daemon}, and {other:?} died")),
    }
}

/// As an administrator does who takes the metacache for a cache.
fn remove_indexes(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() {
            remove_indexes(&path);
        } else if name == "dovecot.index.log" || name == "dovecot-uidlist" {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Whether a line of the log says that a mailbox is not as it should be.
pub fn names_corruption(line: &str) -> bool {
    let words = ["orrupt", "roken", "Panic", "ebuild", "nconsisten", "Fatal", "Error"];
    words.iter().any(|word| line.contains(word))
}

/// Whether Dovecot says it after it was killed itself, whatever the file system: a kill between
/// two of its writes makes its dbox formats rebuild, sdbox rarely. `control.rs` shows that.
pub fn own_repair(format: Format, line: &str) -> bool {
    let sdbox = [
        // A mail that was saved and not logged, met by the next save.
        "already exists, rebuilding index",
        "Rebuilding index",
        "reset, view is now inconsistent",
    ];
    let mdbox = [
        "Inconsistency in map index",
        "rebuilding indexes",
        "fscking index file",
        "reset, view is now inconsistent",
        "refcount too low",
        "Unexpectedly lost ",
        "Deleting corrupted cache: reset_id mismatch",
    ];
    let said: &[&str] = match format {
        Format::Maildir => &[],
        Format::Sdbox => &sdbox,
        Format::Mdbox => &mdbox,
    };
    said.iter().any(|text| line.contains(text))
}

/// Lines of the log that call something corrupted, and are none that Dovecot also writes without a
/// mount. A rebuild of mdbox locks no file that it reads: of one that another process is appending
/// to it says what it says of half a mail, on any file system. Whoever says that first has met it.
/// And if it writes that file anew, what was being appended is not in it, wherever a mail's entry says
/// that it is (see `rebuild.rs`).
fn corruptions(format: Format, lines: impl Iterator<Item = String>) -> Vec<String> {
    let mut rebuilding: BTreeSet<String> = BTreeSet::new();
    let mut replaced: BTreeSet<String> = BTreeSet::new();
    let mut found = Vec::new();
    for line in lines {
        let who =
            line.split_once(">: ").and_then(|(who, _)| who.rsplit_once('<')).map(|(_, who)| who);
        let at_it = who.is_some_and(|who| rebuilding.contains(who));
        let own = own_repair(format, &line)
            || at_it && of_half_a_mail(format, &line)
            || replaced.iter().any(|file| misses_a_mail(&line, file));
        replaced.extend(replaces_a_file(format, &line).map(str::to_owned));
        if let Some(who) = who.filter(|_| line.contains("rebuilding indexes")) {
            rebuilding.insert(who.to_owned());
        }
        if names_corruption(&line) && !own {
            found.push(line);
        }
    }
    found
}

/// Whether a line says that a file of mails ends where a mail should be.
fn misses_a_mail(line: &str, file: &str) -> bool {
    let said = ["EOF reading msg header (got 0/", "points to broken data"];
    line.contains(&format!("Corrupted dbox file {file} (around"))
        && said.iter().any(|text| line.contains(text))
}

#[test]
fn a_mail_that_a_rebuild_left_out_is_forgiven_in_that_file_only() {
    let said = |text: &str| format!("Nov 22 12:41:45 imap(u)<12><b>: {text}");
    let missed = |file: &str| {
        let end = "(around offset=7): EOF reading msg header (got 0/30 bytes)";
        said(&format!("Error: Corrupted dbox file /m/{file} {end}"))
    };
    let saved = "Warning: dbox: Copy of the broken file saved to /m/m.2.broken";
    let rebuilding = "Nov 22 12:41:44 imap(u)<12><a>: Warning: mdbox /m: rebuilding indexes";
    let saved = format!("Nov 22 12:41:44 imap(u)<12><a>: {saved}");
    let lines = [rebuilding.to_owned(), missed("m.2"), saved, missed("m.2"), missed("m.3")];
    let found = corruptions(Format::Mdbox, lines.clone().into_iter());
    assert_eq!(found, [lines[1].clone(), lines[4].clone()]);
}

#[test]
fn half_a_mail_is_forgiven_to_who_rebuilds_and_to_nobody_else() {
    let said = |who: &str, text: &str| format!("Nov 22 12:41:45 imap(u)<12><{who}>: {text}");
    let lines = [
        said("a", "Warning: mdbox /m: rebuilding indexes"),
        said(
            "a",
            "Error: Corrupted dbox file /m/m.3 (around offset=7): msg header has bad magic value",
        ),
        said(
            "b",
            "Error: Corrupted dbox file /m/m.3 (around offset=7): msg header has bad magic value",
        ),
        said("a", "Error: Corrupted dbox file /m/m.3 (around offset=7): EOF reading msg header"),
    ];
    let found = corruptions(Format::Mdbox, lines.clone().into_iter());
    assert_eq!(found, lines[2..]);
    assert_eq!(corruptions(Format::Sdbox, lines.clone().into_iter()), lines);
}

/// Whether a line only says that the mount is dead. A write that the daemon was just taking over when
/// it died is answered with EIO by the kernel (its copy fails, and that is what it says then); of the
/// daemon itself a write never gets that without an error in its log.
fn of_death(line: &str) -> bool {
    let said = [
        "Transport endpoint is not connected",
        "Software caused connection abort",
        "killed with signal ",
        "Panic: ",
    ];
    let taken_over = line.contains("write(") && line.contains("failed: Input/output error");
    said.iter().any(|text| line.contains(text)) || taken_over
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
