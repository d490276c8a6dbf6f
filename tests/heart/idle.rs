//! Users that nobody uses are closed, and what the metacache has of them can go (I5, I8).

use super::metacache::exact;
use super::world::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use vmailfs::cache::disk::RealDisk;
use vmailfs::format::key::head_key;
use vmailfs::fs::VmailFs;
use vmailfs::fs::api::{Invalidate, MailFs};
use vmailfs::store::faulty::Fault;
use vmailfs::store::{Body, ObjectStore, Op, PutMode, Reason};
use vmailfs::vmail::error::Error;
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::metacache::Refreshed;
use vmailfs::vmail::session::{InoTarget, Metacache};
use vmailfs::vmail::{evict, idle};

/// A kernel that forgets what it is told to, unless somebody has it open.
pub fn obedient(fs: &Arc<VmailFs>) {
    let weak = Arc::downgrade(fs);
    fs.set_invalidator(Box::new(move |what| {
        let (Some(fs), Invalidate::Name { parent: 1, name }) = (weak.upgrade(), what) else {
            return;
        };
        let known: Vec<u64> = fs
            .session()
            .inos
            .read()
            .iter()
            .filter(|(_, target)| match target {
                InoTarget::Dir(cell, _) | InoTarget::Node(cell, _) => {
                    cell.path.last().map(String::as_bytes) == Some(&name)
                }
                InoTarget::Above(_) => false,
            })
            .map(|(ino, _)| *ino)
            .collect();
        for ino in known {
            fs.forget(ino, u64::MAX);
        }
    }));
}

async fn user(client: &Client, user: &str) {
    client.maildir(&[user]).await;
    client.put(&format!("{user}/dovecot.index.log"), &noise(9000)).await.unwrap();
    client.deliver(user, "1700000000.M1P1.host", b"mail").await.unwrap();
}

fn open(client: &Client) -> Vec<String> {
    client.session().open_users().iter().map(|cell| cell.name.to_string()).collect()
}

fn session(world: &World, close_idle: u64, max_open_users: usize) -> Client {
    let mut settings = world.settings(HERE);
    settings.metacache = Metacache {
        close_idle: Duration::from_secs(close_idle),
        max_open_users,
        ..Metacache::default()
    };
    let client = world.session_with(settings, Arc::new(RealDisk));
    obedient(&client.fs);
    client
}

#[tokio::test]
async fn a_user_that_nobody_uses_is_handed_over_and_comes_back_without_a_listing() {
    let world = World::new();
    let client = session(&world, 3600, 100);
    user(&client, "u").await;
    user(&client, "v").await;
    world.clock.advance(Duration::from_secs(3000));
    client.read("v/dovecot.index.log").await.unwrap();
    world.clock.advance(Duration::from_secs(1000));
    idle::look(client.session()).await;
    assert_eq!(open(&client), ["v"]);
    assert_eq!(world.head("u").owner, None);
    exact(&client).await;
    let ino = client.stat("u").await.unwrap().ino;
    world.requests();
    assert_eq!(client.read("u/dovecot.index.log").await.unwrap(), noise(9000));
    assert_eq!(client.list("u/new").await.unwrap(), ["1700000000.M1P1.host"]);
    assert_eq!(client.stat("u").await.unwrap().ino, ino);
    // Head read, head swapped.
    let asked = world.requests();
    assert_eq!(asked.len(), 2, "{asked:?}");
    // It is written again.
    client.deliver("u", "1700000000.M2P1.host", b"mail").await.unwrap();
    client.close().await;
    assert_eq!(world.session(FRESH).list("u/new").await.unwrap().len(), 2);
}

#[tokio::test]
async fn who_holds_something_keeps_the_user_open() {
    let world = World::new();
    let client = session(&world, 100, 100);
    for name in ["file", "lock", "mail"] {
        user(&client, name).await;
    }
    world.clock.advance(Duration::from_secs(1000));
    let file = client.open("file/dovecot.index.log", WRITE).await.unwrap();
    let lock = client.create("lock/dovecot-uidlist.lock").await.unwrap();
    client.close_file(lock).await.unwrap();
    let mail = client.create("mail/tmp/new").await.unwrap();
    world.clock.advance(Duration::from_secs(200));
    idle::look(client.session()).await;
    assert_eq!(open(&client), ["file", "lock", "mail"]);
    client.write(file, 0, b"still").await.unwrap();
    client.close_file(file).await.unwrap();
    client.write(mail, 0, b"mail").await.unwrap();
    client.close_file(mail).await.unwrap();
    world.clock.advance(Duration::from_secs(1000));
    idle::look(client.session()).await;
    assert_eq!(open(&client), Vec::<String>::new());
    assert_eq!(&client.read("file/dovecot.index.log").await.unwrap()[..5], b"still");
}

/// A kernel that does not forget: nothing is closed, nothing is lost.
#[tokio::test]
async fn what_the_kernel_knows_stays() {
    let world = World::new();
    let client = session(&world, 100, 100);
    user(&client, "u").await;
    let above = client.session().clone();
    above.known_user("u").unwrap().root.lock().parent = Some(2);
    world.clock.advance(Duration::from_secs(1000));
    idle::look(client.session()).await;
    assert_eq!(open(&client), ["u"]);
    client.deliver("u", "1700000000.M2P1.host", b"mail").await.unwrap();
}

/// Somebody comes while the user is handed over: it is taken back, and serves on.
#[tokio::test]
async fn who_comes_late_finds_the_user_open() {
    let world = World::new();
    let client = session(&world, 100, 100);
    user(&client, "u").await;
    world.clock.advance(Duration::from_secs(1000));
    let cell = client.cell("u");
    let (fs, ino) = (client.fs.clone(), cell.ino);
    world.faults(move |request| {
        // At the swap of the head somebody looks a name up.
        if request.why.0 == "flush" && request.key.ends_with("/head") {
            let who = vmailfs::fs::api::Caller { uid: 1000, gid: 1000, pid: 1 };
            let _ = fs.lookup(who, 1, b"u");
            let _ = fs.lookup(who, ino, b"new");
        }
        vmailfs::store::faulty::Fault::None
    });
    assert!(!idle::close_unused(&cell).await.unwrap());
    world.no_faults();
    assert_eq!(open(&client), ["u"]);
    assert!(world.head("u").owner.is_some());
    client.deliver("u", "1700000000.M2P1.host", b"mail").await.unwrap();
    client.flush("u").await;
    client.close().await;
    assert_eq!(world.session(FRESH).list("u/new").await.unwrap().len(), 2);
}

#[tokio::test]
async fn of_too_many_users_those_used_longest_ago_are_closed() {
    let world = World::new();
    let client = session(&world, 100_000, 2);
    for name in ["a", "b", "c", "d"] {
        user(&client, name).await;
        world.clock.advance(Duration::from_secs(10));
    }
    client.read("a/dovecot.index.log").await.unwrap();
    idle::look(client.session()).await;
    assert_eq!(open(&client), ["a", "d"]);
}

#[tokio::test]
async fn a_closed_user_is_evicted_by_priority_and_whole() {
    let world = World::new();
    let client = session(&world, 100, 100);
    client.mkdir("u").await.unwrap();
    for dir in ["u/index", "u/index/.INBOX", "u/index/.Old"] {
        client.mkdir(dir).await.unwrap();
    }
    for folder in [".INBOX", ".Old"] {
        let log = format!("u/index/{folder}/dovecot.index.log");
        client.put(&log, &noise(30_000)).await.unwrap();
    }
    world.clock.advance(Duration::from_secs(1000));
    idle::look(client.session()).await;
    assert!(open(&client).is_empty());
    let cell = client.cell("u");
    let before = client.session().metacache_list()[0].bytes;
    assert!(evict::evict_unit(&cell, 3).await.unwrap() > 30_000);
    exact(&client).await;
    let after = client.session().metacache_list()[0].bytes;
    assert_eq!((after[3], after[2]), (0, before[2]));
    // Nothing was opened for that.
    assert!(open(&client).is_empty());
    for folder in [".Old", ".INBOX"] {
        let log = format!("u/index/{folder}/dovecot.index.log");
        assert_eq!(client.read(&log).await.unwrap(), noise(30_000));
    }
    exact(&client).await;
    assert!(evict::evict_unit(&cell, 0).await.unwrap() > 60_000);
    assert!(open(&client).is_empty());
    assert_eq!(client.session().metacache_list(), []);
    assert!(!world.machine_dir(HERE).join("meta/u").exists());
    exact(&client).await;
    let log = "u/index/.Old/dovecot.index.log";
    assert_eq!(client.read(log).await.unwrap(), noise(30_000));
}

#[tokio::test]
async fn remove_forgets_a_user_that_nobody_uses() {
    let world = World::new();
    let client = session(&world, 100, 100);
    user(&client, "u").await;
    let file = client.open("u/dovecot.index.log", WRITE).await.unwrap();
    assert!(!client.session().metacache_remove("u").await.unwrap());
    client.close_file(file).await.unwrap();
    assert!(client.session().metacache_remove("u").await.unwrap());
    assert_eq!(client.session().metacache_list(), []);
    // After a death: what was left is flushed first.
    client.append("u/dovecot.index.log", b"more").await.unwrap();
    drop(client);
    let client = session(&world, 100, 100);
    assert!(client.session().metacache_remove("u").await.unwrap());
    assert!(client.session().metacache_remove("nobody").await.unwrap());
    assert_eq!(client.read("u/dovecot.index.log").await.unwrap().len(), 9004);
}

#[tokio::test]
async fn refresh_looks_at_the_head_again() {
    let world = World::new();
    let client = session(&world, 100, 100);
    user(&client, "u").await;
    client.flush("u").await;
    // Who made the user opened it behind the answer, too.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let here = client.session().clone();
    assert_eq!(here.metacache_refresh("u").await.unwrap(), Refreshed::Unchanged);
    assert_eq!(here.metacache_refresh("nobody").await.unwrap(), Refreshed::NotOpen);
    let rival = world.session(On { machine: "b", ..HERE });
    rival.deliver("u", "1700000000.M2P1.host", b"mail").await.unwrap();
    rival.flush("u").await;
    assert_eq!(here.metacache_refresh("u").await.unwrap(), Refreshed::Changed);
    world.requests();
    let failed = rival.session().close(Duration::from_secs(600)).await;
    assert!(failed.is_empty(), "{failed:?} {:?}", world.requests());
    assert_eq!(client.list("u/new").await.unwrap().len(), 2);
}

/// A swap of this session's own whose answer was lost, and that nobody read back, is no rival's: the
/// user stays open, and the next flush goes on top of it. A head that is gone is no rival's either.
#[tokio::test]
async fn refresh_takes_no_swap_of_its_own_for_a_rivals() {
    for release in [false, true] {
        let world = World::new();
        let client = session(&world, 100, 100);
        user(&client, "u").await;
        client.flush("u").await;
        let here = client.session().clone();
        let file = client.open("u/dovecot.index.log", WRITE).await.unwrap();
        client.write(file, 0, b"changed").await.unwrap();
        let before = world.head("u").write_id;
        let swapped = AtomicBool::new(false);
        world.faults(move |r| match (r.op, r.key.ends_with("/head")) {
            (Op::Put, true) => {
                swapped.store(true, SeqCst);
                Fault::After(down())
            }
            (Op::Get, true) if swapped.load(SeqCst) => Fault::Before(down()),
            _ => Fault::None,
        });
        let options = Options { release, ..Options::default() };
        assert!(flush::flush(&client.cell("u"), options).await.is_err());
        world.no_faults();
        let after = world.head("u");
        assert_ne!(after.write_id, before, "the swap was made");
        assert_eq!(after.owner.is_none(), release);
        assert_eq!(here.metacache_refresh("u").await.unwrap(), Refreshed::Unchanged);
        client.write(file, 0, b"CHANGED").await.unwrap();
        client.close_file(file).await.unwrap();
        client.flush("u").await;
        assert_eq!(here.metacache_refresh("u").await.unwrap(), Refreshed::Unchanged);
        // A head that is gone is a doubt.
        let key = head_key("u");
        let head = world.mem.bytes_of(&key).unwrap();
        world.mem.delete(std::slice::from_ref(&key), Reason("test")).await.unwrap();
        let refreshed = here.metacache_refresh("u").await;
        assert!(matches!(refreshed, Err(Error::Doubt { .. })), "{refreshed:?}");
        let (body, how) = (Body::Bytes(head), PutMode::Overwrite);
        world.mem.put(&key, body, how, &[], Reason("test")).await.unwrap();
        let file = client.open("u/dovecot.index.log", WRITE).await.unwrap();
        client.write(file, 7, b"!").await.unwrap();
        client.close_file(file).await.unwrap();
        client.close().await;
        let log = world.session(FRESH).read("u/dovecot.index.log").await.unwrap();
        assert!(log.starts_with(b"CHANGED!"));
        // Somebody else's is one, whatever was lost before.
        let rival = world.session(On { machine: "b", ..HERE });
        let client = session(&world, 100, 100);
        client.list("u/new").await.unwrap();
        rival.list("u/new").await.unwrap();
        assert_eq!(client.session().metacache_refresh("u").await.unwrap(), Refreshed::Changed);
    }
}

/// A number is taken away while nobody can look its directory up. Otherwise a lookup that came in
/// between was told of a number that meant nothing: ESTALE for whoever used it, and a directory that
/// nobody could forget any more, so that its user was never closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_is_forgotten_under_its_users_lock() {
    let world = World::new();
    let client = session(&world, 100, 100);
    user(&client, "u").await;
    let ino = client.stat("u/new").await.unwrap().ino;
    let (fs, cell) = (client.fs.clone(), client.cell("u"));
    let numbers = client.session().clone();
    let held = numbers.inos.read();
    let forgets = std::thread::spawn(move || fs.forget(ino, u64::MAX));
    // It waits for the table of numbers, and nobody can come in between.
    let end = std::time::Instant::now() + Duration::from_secs(60);
    let mut locked = 0;
    while locked < 20 {
        assert!(std::time::Instant::now() < end, "the number goes without the lock");
        locked = if cell.state.is_locked() { locked + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(held);
    forgets.join().unwrap();
    assert!(numbers.target(ino).is_none());
}

/// A listing of many users goes on where it stopped, and looks at no user twice.
#[tokio::test]
async fn users_are_listed_call_by_call() {
    let world = World::new();
    let client = world.session(HERE);
    for n in 0..20 {
        client.maildir(&[&*format!("u{n:02}")]).await;
    }
    client.close().await;
    let fresh = world.session(FRESH);
    let (mut names, mut cookie) = (Vec::new(), 0);
    loop {
        let some: parking_lot::Mutex<Vec<(String, u64)>> = Default::default();
        let answer = fresh
            .go(|fs| {
                some.lock().clear();
                fs.readdir(1, 0, cookie, &mut |entry| {
                    let mut some = some.lock();
                    let room = some.len() < 7;
                    if room {
                        some.push((
                            String::from_utf8_lossy(&entry.name).into_owned(),
                            entry.cookie,
                        ));
                    }
                    room
                })
            })
            .await;
        answer.unwrap();
        let some = some.into_inner();
        // One more was shown than there was room for.
        let known = fresh.session().all_users().len();
        let Some((_, last)) = some.last() else { break };
        cookie = *last;
        names.extend(some.into_iter().map(|(name, _)| name));
        assert!(known <= names.len() - 2 + 1, "{known} users made for {}", names.len());
    }
    let all: Vec<String> = (0..20).map(|n| format!("u{n:02}")).collect();
    names.retain(|name| !name.starts_with('.'));
    assert_eq!(names, all);
}
