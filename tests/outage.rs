//! The store goes away under deliveries and logins, and comes back (I4).
//!
//! Mail servers of both kinds go on to deliver meanwhile, to users that are known here and to
//! users in no cache: everything is delivered or deferred, nothing is bounced, nothing that was
//! acknowledged is lost, and what was deferred goes through afterwards, without a restart. Other
//! users log in, read what is cached and change flags, and wait for nobody.
//!
//! `OUTAGE_SECONDS` makes it longer; what was seen is printed (`--nocapture`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use support::check::look;
use support::dovecot::{Dovecot, Format, Layout, Ports};
use support::imap::{Imap, flags};
use support::messages::{Message, message};
use support::mount::Mount;
use support::mta::{self, Refusal, Times};
use support::proxy::{Fault, Proxy, Rule};
use support::{Outcome, wait_until, weed};

/// Readers whose mail is cached.
const WARM: usize = 3;
/// Receivers that are known to the mount, that are in the store only, and that are nowhere.
const KNOWN: usize = 2;
const COLD: usize = 3;
const NEW: usize = 2;
/// Deliveries that hang at the same time, beside those below.
const STUCK: usize = 50;
/// What calls of readers take less than, whatever hangs beside them: one that waits for what hangs takes
/// a delivery timeout. A few may meet a moment in which the machine does nothing for them.
const PROMPT: Duration = Duration::from_millis(2500);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Refused,
    BlackHole,
}

#[derive(Debug, Clone, Copy)]
struct Plan {
    seconds: u64,
    how: How,
    delivery_timeout: u64,
    /// `None`: a single backend.
    lease: Option<u64>,
}

impl Plan {
    /// Long enough for a few rounds of deferred deliveries.
    fn usual(how: How, lease: Option<u64>) -> Plan {
        let seconds = std::env::var("OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok());
        let seconds = seconds.unwrap_or(8);
        let delivery_timeout = if seconds >= 60 { 20 } else { 3 };
        Plan { seconds, how, delivery_timeout, lease }
    }
}

fn name(kind: &str, n: usize) -> String {
    format!("{kind}{n}@mail.test")
}

fn names(kind: &'static str, count: usize) -> impl Iterator<Item = String> {
    (0..count).map(move |n| name(kind, n))
}

/// What deliveries came to.
#[derive(Debug, Default)]
struct Post {
    /// Per user: what was acknowledged.
    delivered: Mutex<BTreeMap<String, Vec<String>>>,
    refusals: Mutex<BTreeMap<String, usize>>,
    /// Answers for which a mail goes back to its sender.
    bounced: Mutex<Vec<String>>,
    deferred: Mutex<BTreeSet<String>>,
    times: Mutex<Times>,
}

/// A way for a mail to a user; the text of an error says how it was refused and whether it may
/// be tried again.
trait Route {
    fn send(&mut self, user: &str, mail: &Message) -> Result<(), (String, bool)>;
}

/// By system calls.
struct Raw<'a> {
    root: &'a Path,
    /// Whether a directory may be missing: it never is for a user that exists.
    make: bool,
}

impl Route for Raw<'_> {
    fn send(&mut self, user: &str, mail: &Message) -> Result<(), (String, bool)> {
        let maildir = self.root.join(user).join("mail");
        mta::deliver(&maildir, mail, self.make)
            .map_err(|refusal: Refusal| (refusal.to_string(), refusal.deferred()))
    }
}

/// By Dovecot's LMTP.
struct Wire {
    ports: Ports,
}

impl Route for Wire {
    fn send(&mut self, user: &str, mail: &Message) -> Result<(), (String, bool)> {
        // A server without an answer is tried again, as any MTA does.
        let broken = |failure: support::Failure| (format!("LMTP: {failure}"), true);
        let mut lmtp = self.ports.lmtp().map_err(broken)?;
        let answers = lmtp.deliver(&[user], &mail.bytes).map_err(broken)?;
        match answers[0].code {
            200..300 => Ok(()),
            code => Err((format!("LMTP: {}", short(&answers[0].text)), (400..500).contains(&code))),
        }
    }
}

/// Without what differs from mail to mail.
fn short(text: &str) -> String {
    let words = text.split(' ').filter(|w| !w.contains(['<', '@', '[', ':']));
    words.take(12).collect::<Vec<_>>().join(" ")
}

impl Post {
    /// Sends mails until told to stop, then those that were deferred until all are through.
    fn work(&self, mut route: impl Route, user: &str, kind: &str, stop: &AtomicBool) {
        let mut queue: VecDeque<(Message, Instant)> = VecDeque::new();
        let mut number = 0;
        let end = Instant::now() + Duration::from_secs(900);
        loop {
            let over = stop.load(Ordering::SeqCst);
            let due = queue.front().is_some_and(|(_, at)| *at <= Instant::now());
            let mail = if due {
                queue.pop_front().unwrap().0
            } else if !over {
                number += 1;
                message(9, &format!("{kind}-{user}-{number}"))
            } else if over && queue.is_empty() {
                return;
            } else {
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            let mut times = Times::default();
            match times.take(|| route.send(user, &mail)) {
                Ok(()) => {
                    let mut delivered = self.delivered.lock().unwrap();
                    delivered.entry(user.to_owned()).or_default().push(mail.id.clone());
                }
                Err((text, again)) => {
                    *self.refusals.lock().unwrap().entry(text.clone()).or_default() += 1;
                    if !again || Instant::now() > end {
                        self.bounced.lock().unwrap().push(format!("{} to {user}: {text}", mail.id));
                    } else {
                        self.deferred.lock().unwrap().insert(mail.id.clone());
                        queue.push_back((mail, Instant::now() + Duration::from_secs(1)));
                    }
                }
            }
            self.times.lock().unwrap().add(times);
            if !over {
                thread::sleep(Duration::from_millis(200));
            }
        }
    }

    fn count(&self) -> usize {
        self.delivered.lock().unwrap().values().map(Vec::len).sum()
    }
}

/// What readers did, by kind of call.
#[derive(Debug, Default)]
struct Readers {
    times: Mutex<BTreeMap<&'static str, Times>>,
    failed: Mutex<Vec<String>>,
}

impl Readers {
    fn note<T>(&self, what: &'static str, run: impl FnOnce() -> Outcome<T>) -> Option<T> {
        let mut times = Times::default();
        let start = Instant::now();
        let outcome = times.take(run);
        self.times.lock().unwrap().entry(what).or_default().add(times);
        let took = start.elapsed();
        outcome
            .map_err(|e| self.failed.lock().unwrap().push(format!("{what} ({took:.1?}): {e}")))
            .ok()
    }

    /// A login, a cached mail, a flag there and back; then the same again.
    fn by_imap(&self, ports: Ports, user: &str, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            let Some(mut imap) = self.note("login", || Imap::login(ports.imap, user)) else {
                continue;
            };
            for (round, how) in ["+", "-"].into_iter().enumerate() {
                self.note("select", || imap.select("INBOX"));
                let uid = (round + 1).to_string();
                self.note("fetch", || imap.fetch(&uid, "UID FLAGS BODY.PEEK[]"));
                self.note("flag", || imap.store(1, how, &flags(&["\\Flagged"])));
            }
            imap.logout();
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn by_calls(&self, maildir: &Path, stop: &AtomicBool) {
        mta::become_mail_user();
        while !stop.load(Ordering::SeqCst) {
            let listed = self.note("readdir", || {
                Ok(std::fs::read_dir(maildir.join("cur"))?.collect::<Result<Vec<_>, _>>()?)
            });
            for entry in listed.unwrap_or_default() {
                // A flag change may rename it meanwhile.
                self.note("read", || match std::fs::read(entry.path()) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e.into()),
                    _ => Ok(()),
                });
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A bucket, its proxy, a mount on it and a Dovecot, with users in every state.
struct World {
    proxy: Proxy,
    mount: Mount,
    dovecot: Dovecot,
    post: Post,
}

impl World {
    fn new(plan: Plan) -> World {
        let server = weed::server();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let bucket = runtime.block_on(server.new_bucket());
        let proxy = Proxy::start(&server.endpoint());
        let (id, secret) = (server.access_key_id(), server.secret_access_key());
        let (attempt, deadline) =
            (plan.delivery_timeout.div_ceil(4), plan.delivery_timeout.div_ceil(2));
        let limits = format!(
            "store_limits.attempt_timeout={attempt}s,store_limits.deadline={deadline}s,\
             store_limits.delivery_timeout={}s,store_limits.lease={}s,allow_other",
            plan.delivery_timeout,
            plan.lease.unwrap_or(180)
        );
        let mut mount =
            Mount::on_s3(&proxy.endpoint(), &bucket, id, secret).option(&["-o", &limits]);
        if plan.lease.is_none() {
            mount = mount.option(&["--single-backend"]);
        }
        mount.mount().unwrap();
        let users: Vec<String> = names("warm", WARM)
            .chain(names("known", KNOWN))
            .chain(names("cold", COLD))
            .chain(names("new", NEW))
            .collect();
        let layout = Layout::usual(Format::Maildir);
        let mut dovecot = Dovecot::start(&mount.root(), &layout, &users).unwrap();
        let post = Post::default();
        let before = users.iter().filter(|user| !user.starts_with("new"));
        for user in before.clone() {
            for n in 0..3 {
                let mail = message(9, &format!("before-{user}-{n}"));
                Wire { ports: dovecot.ports() }.send(user, &mail).unwrap();
                post.delivered.lock().unwrap().entry(user.clone()).or_default().push(mail.id);
            }
        }
        // A fresh machine: cold users are in no cache.
        dovecot.stop();
        mount.umount().unwrap();
        mount.wipe_state().unwrap();
        mount.mount().unwrap();
        dovecot.resume(&mount.root()).unwrap();
        for user in before.filter(|user| !user.starts_with("cold")) {
            let mut imap = dovecot.imap(user).unwrap();
            imap.select("INBOX").unwrap();
            assert_eq!(imap.fetch_all().unwrap().len(), 3);
            imap.store(1, "+", &flags(&["\\Seen"])).unwrap();
            imap.logout();
        }
        World { proxy, mount, dovecot, post }
    }

    fn shut(&self, how: How) {
        match how {
            How::Refused => self.proxy.refuse(),
            How::BlackHole => self.proxy.black_hole(),
        }
    }

    fn maildir(&self, user: &str) -> PathBuf {
        self.mount.root().join(user).join("mail")
    }

    /// What of the acknowledged mails is not there; and how many are there twice.
    fn missing(&self) -> (Vec<String>, usize) {
        let delivered = self.post.delivered.lock().unwrap();
        let seen = look(self.dovecot.imap_port, &self.dovecot.users).unwrap();
        let (mut missing, mut twice) = (Vec::new(), 0);
        for (user, ids) in &*delivered {
            let mut found: BTreeMap<&str, usize> = BTreeMap::new();
            for mail in seen[user].folders.values().flat_map(|folder| &folder.mails) {
                *found.entry(mail.id.as_deref().unwrap_or("damaged")).or_default() += 1;
            }
            missing.extend(ids.iter().filter(|id| !found.contains_key(id.as_str())).cloned());
            missing.extend(found.get("damaged").map(|_| format!("a damaged mail of {user}")));
            twice += found.values().filter(|n| **n > 1).count();
        }
        (missing, twice)
    }

    /// Ends everything, and looks at it on a fresh machine.
    fn missing_elsewhere(&mut self) -> (Vec<String>, usize) {
        self.dovecot.stop();
        self.mount.umount().unwrap();
        self.mount.wipe_state().unwrap();
        self.mount.mount().unwrap();
        self.dovecot.resume(&self.mount.root()).unwrap();
        self.missing()
    }
}

/// Runs deliveries and readers through an outage and says what became of them.
fn outage(plan: Plan) {
    let mut world = World::new(plan);
    let (root, ports) = (world.mount.root(), world.dovecot.ports());
    let (post, readers) = (&world.post, Readers::default());
    let (over, seen_enough) = (AtomicBool::new(false), AtomicBool::new(false));
    let before = post.count();
    let (mut during, mut first, mut all) = (0, Duration::ZERO, Duration::ZERO);
    world.shut(plan.how);
    thread::scope(|scope| {
        let raw = |user: String, kind: String, make: bool| {
            let (root, over) = (&root, &over);
            scope.spawn(move || {
                mta::become_mail_user();
                post.work(Raw { root, make }, &user, &kind, over);
            })
        };
        let known = || names("known", KNOWN).chain(names("cold", COLD));
        let mut senders = Vec::new();
        for n in 0..STUCK {
            senders.push(raw(name("known", n % KNOWN), format!("stuck{n}"), false));
        }
        senders.extend(known().map(|user| raw(user, "raw".to_owned(), false)));
        senders.extend(names("new", NEW).map(|user| raw(user, "raw".to_owned(), true)));
        for user in known().chain(names("new", NEW)) {
            let over = &over;
            senders.push(scope.spawn(move || post.work(Wire { ports }, &user, "lmtp", over)));
        }
        for user in names("warm", WARM) {
            let (readers, stop, maildir) = (&readers, &seen_enough, world.maildir(&user));
            scope.spawn(move || readers.by_imap(ports, &user, stop));
            scope.spawn(move || readers.by_calls(&maildir, stop));
        }
        thread::sleep(Duration::from_secs(plan.seconds));
        let enough = || readers.times.lock().unwrap().values().all(|times| times.count() >= 10);
        wait_until(Duration::from_secs(120), enough);
        seen_enough.store(true, Ordering::SeqCst);
        during = post.count() - before;
        let start = Instant::now();
        over.store(true, Ordering::SeqCst);
        world.proxy.open();
        while senders.iter().any(|sender| !sender.is_finished()) {
            thread::sleep(Duration::from_millis(20));
            if first.is_zero() && post.count() > before + during {
                first = start.elapsed();
            }
        }
        all = start.elapsed();
    });
    println!("{plan:?}");
    println!("delivered during {during}, after {}", post.count() - before - during);
    println!("first after {first:.1?}, all after {all:.1?}");
    println!("deliveries: {}", post.times.lock().unwrap());
    let count = post.deferred.lock().unwrap().len();
    println!("deferred {count} mails, by: {:#?}", post.refusals.lock().unwrap());
    for (what, times) in &*readers.times.lock().unwrap() {
        println!("readers: {what}: {times}");
    }
    let (missing, twice) = world.missing();
    println!("twice: {twice}");
    assert_eq!(*post.bounced.lock().unwrap(), [""; 0], "bounced");
    assert!(count >= STUCK, "nothing was deferred: there was no outage");
    assert_eq!(missing, [""; 0], "acknowledged, and not there");
    assert_eq!(*readers.failed.lock().unwrap(), [""; 0], "readers");
    for (what, times) in &*readers.times.lock().unwrap() {
        assert!(times.count() >= 10, "{what}: {times}");
        assert!(times.within(0.95) < PROMPT, "{what}: {times}");
    }
    let (missing, twice) = world.missing_elsewhere();
    println!("twice on a fresh machine: {twice}");
    assert_eq!(missing, [""; 0], "acknowledged, and not there on a fresh machine");
    world.dovecot.stop();
    world.mount.umount().unwrap();
}

#[test]
fn i4_nobody_listens_for_a_while() {
    outage(Plan::usual(How::Refused, None));
}

#[test]
fn i4_a_black_hole_for_a_while() {
    outage(Plan::usual(How::BlackHole, Some(180)));
}

/// Tries until it works.
fn eventually<T>(what: &str, limit: Duration, mut run: impl FnMut() -> Outcome<T>) -> T {
    let start = Instant::now();
    loop {
        match run() {
            Ok(done) => return done,
            Err(e) if start.elapsed() > limit => panic!("{what} after {limit:?}: {e}"),
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// I5: within its lease a backend serves fully without the store, after it reads go on and
/// writes are put off, locks and temporary files excepted; and then it owns its users again.
#[test]
fn i5_after_its_lease_a_backend_reads_only() {
    let plan = Plan { seconds: 0, how: How::BlackHole, delivery_timeout: 3, lease: Some(30) };
    let mut world = World::new(plan);
    let user = name("warm", 0);
    let maildir = world.maildir(&user);
    // Somebody else's, so that nothing waits for Dovecot in the one that is read.
    let other = world.maildir(&name("warm", 1));
    let flag = |how: &str| -> Outcome<()> {
        let mut imap = world.dovecot.imap(&user)?;
        imap.select("INBOX")?;
        imap.store(1, how, &flags(&["\\Flagged"]))
    };
    let read = || -> Outcome<()> {
        let mut imap = world.dovecot.imap(&user)?;
        imap.select("INBOX")?;
        let mails = imap.fetch("1:3", "UID FLAGS BODY.PEEK[]")?;
        if mails.len() == 3 && mails.iter().all(|m| !m.body.is_empty()) {
            return Ok(());
        }
        support::fail("mails are missing")
    };
    world.shut(plan.how);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        flag("+").unwrap();
        read().unwrap();
        flag("-").unwrap();
    }
    let rename = |suffix: &str| -> Result<(), Option<i32>> {
        let entry = std::fs::read_dir(other.join("cur")).unwrap().next().unwrap().unwrap();
        let (from, name) = (entry.path(), entry.file_name().into_string().unwrap());
        let base = name.split(":2,").next().unwrap();
        std::fs::rename(from, other.join(format!("cur/{base}:2,{suffix}")))
            .map_err(|e| e.raw_os_error())
    };
    let mut turn = 0;
    while let Ok(()) = rename(["S", "FS"][turn % 2]) {
        turn += 1;
        assert!(start.elapsed() < Duration::from_secs(90), "the lease does not end");
        thread::sleep(Duration::from_millis(100));
    }
    let ended = start.elapsed();
    assert!(ended > Duration::from_secs(5), "{ended:?}");
    // Reading goes on, and what reading needs.
    for _ in 0..3 {
        read().unwrap_or_else(|e| panic!("{e}\n{:#?}", world.dovecot.complaints()));
    }
    let lock = maildir.join("dovecot-uidlist.lock");
    std::fs::write(&lock, "1\n").unwrap();
    assert_eq!(std::fs::read(&lock).unwrap(), b"1\n");
    std::fs::remove_file(&lock).unwrap();
    // Changes are put off. What Dovecot cannot write to an index it keeps in the memory of that
    // session.
    assert_eq!(rename("RS"), Err(Some(libc::ESTALE)));
    println!("a flag change without a lease: {:?}", flag("+").map_err(|e| e.0));
    let mail = message(9, "late");
    let refusal = mta::deliver(&maildir, &mail, false).unwrap_err();
    assert!(refusal.deferred(), "{refusal}");
    println!("lease ended after {ended:.1?}; raw delivery: {refusal}");
    let mut wire = Wire { ports: world.dovecot.ports() };
    let (text, again) = wire.send(&user, &mail).unwrap_err();
    assert!(again, "{text}");
    let (text, again) = wire.send(&name("cold", 0), &mail).unwrap_err();
    assert!(again, "{text}");
    // All of it again, without a restart.
    world.proxy.open();
    let start = Instant::now();
    let limit = Duration::from_secs(20);
    eventually("a flag change", limit, || {
        rename("FRS").map_err(|errno| support::Failure(format!("{errno:?}")))
    });
    flag("+").unwrap();
    println!("changes again {:.1?} after the store", start.elapsed());
    for user in [&user, &name("cold", 0)] {
        eventually("a delivery", limit, || {
            wire.send(user, &mail).map_err(|e| support::Failure(e.0))
        });
        let mut delivered = world.post.delivered.lock().unwrap();
        delivered.entry(user.clone()).or_default().push(mail.id.clone());
    }
    thread::scope(|scope| {
        let deliver = || {
            mta::become_mail_user();
            mta::deliver(&maildir, &message(9, "later"), false)
        };
        scope.spawn(deliver).join().unwrap().unwrap();
    });
    let missing = world.missing().0;
    assert_eq!(missing, [""; 0], "{:#?}", world.dovecot.complaints());
    assert_eq!(world.missing_elsewhere().0, [""; 0]);
    world.dovecot.stop();
    world.mount.umount().unwrap();
}

/// Answers to swaps of a head that are lost are known as our own writes; keys that run out are
/// looked for again where they came from. Neither needs a restart, nor is a mail lost.
#[test]
fn i4_lost_answers_and_new_keys() {
    let server = weed::server();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bucket = runtime.block_on(server.new_bucket());
    let proxy = Proxy::start(&server.endpoint());
    let dir = support::scratch("keys");
    let file = dir.path().join("credentials");
    let write = |(id, secret): (&str, &str)| {
        let text =
            format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
        std::fs::write(&file, text).unwrap();
    };
    let old = (server.access_key_id(), server.secret_access_key());
    write(old);
    let limits = "store_limits.delivery_timeout=20s,store_limits.attempt_timeout=2s";
    let mut mount = Mount::on_s3(&proxy.endpoint(), &bucket, old.0, old.1)
        .keys_in(&file)
        .option(&["-o", limits]);
    mount.mount().unwrap();
    let maildir = mount.root().join("someone/mail");
    let deliver = |n: usize| mta::deliver(&maildir, &message(5, &format!("m{n}")), true);
    let head = |call: &support::proxy::Call| call.method == "PUT" && call.is_head_object();
    proxy.rule(Rule::when(Fault::LoseAnswer, head).times(3));
    deliver(1).unwrap();
    assert!(proxy.calls().iter().any(|call| call.spoilt), "no answer was lost");
    proxy.clear();
    // The old keys are refused from now on.
    let word = format!("Credential={}/", old.0);
    proxy.rule(Rule::when(Fault::error("403 Forbidden", "ExpiredToken"), move |call| {
        call.header("authorization").is_some_and(|text| text.contains(&word))
    }));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| deliver(2));
        thread::sleep(Duration::from_secs(1));
        write(weed::OTHER_KEYS);
        waiting.join().unwrap().unwrap();
    });
    deliver(3).unwrap();
    assert_eq!(std::fs::read_dir(maildir.join("new")).unwrap().count(), 3);
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    assert_eq!(std::fs::read_dir(maildir.join("new")).unwrap().count(), 3);
    mount.umount().unwrap();
}
