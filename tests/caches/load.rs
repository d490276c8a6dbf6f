//! Many users at work in turns: deliveries, sessions, readers that take their time.

use crate::support::check::{Tolerance, look};
use crate::support::dovecot::{Dovecot, Format, Layout, Ports};
use crate::support::messages::{identify, message_of};
use crate::support::session::Session;
use crate::support::workload::{Turn, Workload, user_names};
use crate::support::{Failure, Outcome, fail};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How many scripts a user has, and how long they are.
const SCRIPTS: usize = 4;
const SCRIPT: usize = 100_000;

/// How much is done, and by how many at a time.
#[derive(Debug, Clone)]
pub struct Plan {
    pub users: usize,
    /// Turns of users that run at once, and deliveries beside them.
    pub workers: usize,
    /// Mails that are as large, one for each of the first users.
    pub large: Vec<usize>,
    /// Turns of each format's users in all, and how long there are turns at least.
    pub turns: u64,
    pub time: Duration,
    /// Nothing comes for a user while somebody acts for it.
    pub apart: bool,
}

/// The users of one format, with the server that serves them and what it must show.
pub struct Camp {
    pub dovecot: Dovecot,
    pub work: Workload,
    pub users: Vec<String>,
    root: PathBuf,
    /// First turns that are over.
    begun: AtomicU64,
    /// Held by whoever acts for a user in a session.
    busy: Vec<Mutex<u32>>,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Done {
    pub turns: AtomicU64,
    pub slow_reads: AtomicU64,
    /// Something that needs the load is not through: there are turns until it is.
    pub needed: AtomicBool,
}

impl Camp {
    pub fn new(root: &Path, format: Format, count: usize) -> Camp {
        let users: Vec<String> =
            user_names(count).iter().map(|name| format!("{}-{name}", format.name())).collect();
        let work = Workload::new(11, &users);
        let layout = Layout::usual(format);
        let dovecot = Dovecot::start(root, &layout, &users).unwrap();
        let busy = users.iter().map(|_| Mutex::new(0)).collect();
        Camp { dovecot, work, users, root: root.to_owned(), begun: AtomicU64::new(0), busy }
    }

    /// Whether all users have had their first turn.
    pub fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed) >= self.users.len() as u64
    }

    /// A user that nobody else acts for until the guard is dropped.
    pub fn take(&self, rng: &mut StdRng) -> (&String, MutexGuard<'_, u32>) {
        loop {
            let n = rng.random_range(0..self.users.len());
            if let Ok(guard) = self.busy[n].try_lock() {
                return (&self.users[n], guard);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Each user's first folders and mails, then turns until the time is over and nobody needs more.
    pub fn work(&self, plan: &Plan, seed: u64, done: &Done) {
        let stop = AtomicBool::new(false);
        let (next, begun) = (AtomicU64::new(0), AtomicU64::new(0));
        let ports = self.dovecot.ports();
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..plan.workers)
                .map(|n| {
                    let (next, begun) = (&next, &begun);
                    scope.spawn(move || {
                        let mut rng = StdRng::seed_from_u64(seed + n as u64);
                        loop {
                            let n = next.fetch_add(1, Ordering::Relaxed) as usize;
                            let Some(user) = self.users.get(n) else { break };
                            let _busy = self.busy[n].lock().unwrap();
                            self.work.note(self.first_turn(ports, user, plan.large.get(n)));
                            self.begun.fetch_add(1, Ordering::Relaxed);
                        }
                        let end = Instant::now() + plan.time;
                        while begun.fetch_add(1, Ordering::Relaxed) < plan.turns
                            || Instant::now() < end
                            || done.needed.load(Ordering::Relaxed)
                        {
                            let (user, mut turns) = self.take(&mut rng);
                            self.work.note(self.turn(ports, user, *turns));
                            *turns += 1;
                            done.turns.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            let stop = &stop;
            scope.spawn(move || self.work.note(self.deliveries(ports, seed, plan.apart, stop)));
            for worker in workers {
                worker.join().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }

    fn first_turn(&self, ports: Ports, user: &String, large: Option<&usize>) -> Outcome<()> {
        let mut lmtp = ports.lmtp()?;
        if let Some(size) = large {
            let mail = message_of(self.work.seed(), &self.work.next_id("large"), *size);
            self.work.deliver_mail(&mut lmtp, &[user], Turn::Any, &mail)?;
        }
        self.work.deliver(&mut lmtp, &[user], Turn::Any)?;
        let mut session = Session::open(&self.work, ports, user)?;
        session.make_folders(3)?;
        session.imap.logout();
        for (path, text) in self.scripts(user) {
            fs::create_dir_all(path.parent().unwrap())?;
            fs::write(path, text)?;
        }
        Ok(())
    }

    /// Long Sieve scripts: not all in a home is mail or index.
    fn scripts(&self, user: &str) -> impl Iterator<Item = (PathBuf, Vec<u8>)> {
        let home = self.root.join(user);
        let text = message_of(0, user, SCRIPTS * SCRIPT).bytes;
        (0..SCRIPTS).map(move |n| {
            let path = home.join(format!("sieve/{n}/long.sieve"));
            (path, text[n * SCRIPT..(n + 1) * SCRIPT].to_vec())
        })
    }

    fn look_at_scripts(&self, user: &str) -> Outcome<()> {
        for (path, text) in self.scripts(user) {
            let read = fs::read(&path).map_err(|e| Failure(format!("{}: {e}", path.display())))?;
            if read != text {
                return fail(format!("{} has changed", path.display()));
            }
        }
        Ok(())
    }

    /// Everything of everybody is as it must be.
    pub fn must_hold(&self, tolerance: Tolerance, when: &str) {
        self.work.must_hold(&self.dovecot, tolerance, when);
        for user in &self.users {
            self.work.note(self.look_at_scripts(user));
        }
        self.work.must_have_worked(&self.dovecot, when);
    }

    /// Some mails come, everything is looked at now and then, and some of it changes.
    fn turn(&self, ports: Ports, user: &String, turns: u32) -> Outcome<()> {
        self.look_at_scripts(user)?;
        let mut lmtp = ports.lmtp()?;
        self.work.deliver(&mut lmtp, &[user], Turn::Any)?;
        if turns.is_multiple_of(3) {
            let seen = look(ports.imap, std::slice::from_ref(user))?;
            self.work.model().learn(&seen);
        }
        let mut session = Session::open(&self.work, ports, user)?;
        for _ in 0..5 {
            session.any_change()?;
        }
        if turns % 4 == 3 {
            session.more_folders(u64::from(turns))?;
        }
        session.imap.logout();
        Ok(())
    }

    /// Mails that come while their user may be at work.
    fn deliveries(&self, ports: Ports, seed: u64, apart: bool, stop: &AtomicBool) -> Outcome<()> {
        let mut rng = StdRng::seed_from_u64(seed ^ 0xde11);
        while !stop.load(Ordering::Relaxed) {
            let mut lmtp = ports.lmtp()?;
            for _ in 0..4 {
                let (user, busy) = match apart {
                    true => {
                        let (user, busy) = self.take(&mut rng);
                        (user, Some(busy))
                    }
                    false => (self.users.choose(&mut rng).unwrap(), None),
                };
                self.work.deliver(&mut lmtp, &[user], Turn::Any)?;
                drop(busy);
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Ok(())
    }

    /// Reads mail files to the end over some seconds, several at a time, until it is told to stop:
    /// whatever becomes of their cached copies, and of their names, what is read is the mail.
    pub fn slow_readers(&self, root: &Path, stop: &AtomicBool, done: &Done) {
        std::thread::scope(|scope| {
            for reader in 0..4 {
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(reader);
                    while !stop.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(100));
                        let user = self.users.choose(&mut rng).unwrap();
                        let Some(path) = some_mail(&root.join(user), &mut rng) else { continue };
                        match self.read_slowly(user, &path) {
                            Ok(()) => drop(done.slow_reads.fetch_add(1, Ordering::Relaxed)),
                            Err(failure) => self
                                .work
                                .note(fail(format!("reading {}: {failure}", path.display()))),
                        }
                    }
                });
            }
        });
    }

    fn read_slowly(&self, user: &str, path: &Path) -> Outcome<()> {
        let mut file = match File::open(path) {
            // It was moved or expunged since it was chosen.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        let length = file.metadata()?.len();
        let mut bytes = Vec::new();
        let mut piece = vec![0; usize::try_from(length / 40).unwrap_or(0) + 1];
        loop {
            let got = file.read(&mut piece)?;
            if got == 0 {
                break;
            }
            bytes.extend_from_slice(&piece[..got]);
            std::thread::sleep(Duration::from_millis(40));
        }
        if bytes.len() as u64 != length {
            return fail(format!("{} of {length} bytes", bytes.len()));
        }
        let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n").replace('\n', "\r\n");
        let (id, hash) = identify(text.as_bytes());
        let Some(id) = id else { return fail("it is no mail that was sent") };
        let mut model = self.work.model();
        let folders = &model.user(user).folders;
        // One that was expunged meanwhile is in no folder.
        match folders.values().find_map(|folder| folder.mails.get(&id)) {
            Some(mail) if mail.hash != hash => fail(format!("{id} has changed")),
            _ => Ok(()),
        }
    }
}

/// Some Maildir mail of a home.
fn some_mail(home: &Path, rng: &mut StdRng) -> Option<PathBuf> {
    let names = |dir: PathBuf| -> Vec<PathBuf> {
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
    };
    let mut all = names(home.join("mail/cur"));
    all.extend(names(home.join("mail/new")));
    all.choose(rng).cloned()
}
