//! Who may write (I5), and heads that were answered late or by somebody else.

use super::full_disk::FullDisk;
use super::world::*;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;
use vmailfs::cache::disk::RealDisk;
use vmailfs::format::key::{head_key, user_dir};
use vmailfs::store::faulty::Fault;
use vmailfs::store::{Body, ObjectStore, Op, PutMode, Reason};
use vmailfs::vmail::env::Env;
use vmailfs::vmail::error::Error;
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::version::check_store;

/// I5: a session whose head was swapped by another writes nothing more and answers ESTALE.
#[tokio::test]
async fn i5_a_session_that_lost_the_user_is_fenced() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let rival = world.session(FRESH);
    assert_eq!(rival.list("u/new").await.unwrap(), ["1"]);
    let head = world.head("u");
    assert!(flush::flush(&client.cell("u"), Options::default()).await.is_err());
    assert_eq!(world.head("u"), head);
    assert_eq!(client.deliver("u", "2", b"mail").await, Err(libc::ESTALE));
    assert_eq!(client.unlink("u/cur/1:2,S").await, Err(libc::ESTALE));
    // Reading goes on, and the lock files that it takes.
    assert_eq!(client.read("u/cur/1:2,S").await.unwrap(), b"mail");
    client.put("u/dovecot-uidlist.lock", b"x").await.unwrap();
    client.unlink("u/dovecot-uidlist.lock").await.unwrap();
    assert_eq!(rival.list("u/cur").await.unwrap(), [""; 0]);
}

/// I5: what a session had not flushed when another took the user is kept for a person, also where the
/// metacache is on another file system than the state, and where the keeping is interrupted.
#[tokio::test]
async fn i5_what_a_fenced_session_had_is_kept() {
    for (apart, interrupted) in [(false, false), (true, false), (true, true), (false, true)] {
        let world = World::new();
        let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
        let settings = world.settings(HERE);
        if apart {
            disk.set_apart(&settings.metacache_dir);
        }
        let client = world.session_with(settings.clone(), disk.clone());
        client.maildir(&["u"]).await;
        client.put("u/dovecot.index.log", b"one").await.unwrap();
        client.deliver("u", "1", b"mail").await.unwrap();
        client.flush("u").await;
        client.append("u/dovecot.index.log", b"two").await.unwrap();
        client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
        drop(client);
        let rival = world.session(FRESH);
        assert_eq!(rival.list("u/new").await.unwrap(), ["1"]);
        rival.close().await;
        for after in (0..).take_while(|_| interrupted) {
            let dying = world.session_with(settings.clone(), disk.clone());
            disk.dies_after(after);
            let opened = dying.list("u/new").await;
            disk.dies_after(i64::MAX);
            if opened.is_ok() {
                break;
            }
        }
        let again = world.session_with(settings.clone(), disk.clone());
        assert_eq!(again.list("u/new").await.unwrap(), ["1"]);
        assert_eq!(again.read("u/dovecot.index.log").await.unwrap(), b"one");
        let kept = |name: &str| {
            let dirs = std::fs::read_dir(settings.state_dir.join("lost")).unwrap();
            let files = dirs.filter_map(|dir| std::fs::read(dir.unwrap().path().join(name)).ok());
            files.collect::<Vec<_>>()
        };
        // A death may leave a copy, and more of them.
        let logs = kept("metacache/dovecot.index.log");
        assert!(logs.contains(&b"onetwo".to_vec()), "{apart} {interrupted}: {logs:?}");
        assert!(!kept("state/journal").is_empty(), "{apart} {interrupted}");
        assert!(again.session().kept_aside().users > 0);
    }
}

/// I4: where a machine has used a store, a place without one is not a new store: each user would be
/// a new one there.
#[tokio::test]
async fn i4_a_place_without_the_store_is_no_new_store() {
    let (world, elsewhere) = (World::new(), World::new());
    let dir = world.machine_dir(HERE);
    let here = world.session(HERE).session().env.clone();
    let there = Env { store: elsewhere.store.clone(), ..here.clone() };
    for _ in 0..2 {
        check_store(&here, &dir).await.unwrap();
    }
    let refused = check_store(&there, &dir).await.unwrap_err();
    assert!(matches!(refused, Error::Doubt { .. }), "{refused}");
    assert!(elsewhere.requests().iter().all(|(op, ..)| *op == Op::Get), "nothing is written there");
    world.store.set_down(true);
    assert!(matches!(check_store(&here, &dir).await, Err(Error::Store { .. })));
    world.store.set_down(false);
    // A copy of the store, elsewhere; and then a new store that somebody means.
    check_store(&there, &elsewhere.machine_dir(HERE)).await.unwrap();
    check_store(&there, &dir).await.unwrap();
    let third = World::new();
    let third = Env { store: third.store.clone(), ..here.clone() };
    std::fs::remove_file(dir.join("store")).unwrap();
    check_store(&third, &dir).await.unwrap();
}

/// I5: a swap whose answer is lost is known by its write id, at every kind of swap.
#[tokio::test]
async fn i5_a_lost_answer_of_a_swap_is_no_rival() {
    let world = World::new();
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put, true) => Fault::After(down()),
        _ => Fault::None,
    });
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    client.replace("u/dovecot-uidlist", b"3 V1 N2 Gabc\n1 :1\n").await.unwrap();
    client.flush("u").await;
    client.replace("u/dovecot-uidlist", b"3 V1 N5000 Gabc\n1 :1\n").await.unwrap();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,S"]);
    world.no_faults();
    fresh.rename("u/cur/1:2,S", "u/cur/1:2,RS").await.unwrap();
    drop(fresh);
    // Nor is one begun anew where it is really gone, and what is known here stays for its return.
    let key = vmailfs::format::key::head_key("u");
    let why = vmailfs::store::Reason("test");
    let (_, head) = world.mem.get(&key, None, u64::MAX, why).await.unwrap();
    world.mem.delete(std::slice::from_ref(&key), why).await.unwrap();
    let again = world.session(FRESH);
    assert_eq!(again.list("u/cur").await, Err(libc::EAGAIN));
    assert_eq!(again.deliver("u", "3", b"mail").await, Err(libc::EAGAIN));
    let (body, how) = (vmailfs::store::Body::Bytes(head), vmailfs::store::PutMode::Create);
    world.mem.put(&key, body, how, &[], why).await.unwrap();
    assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,RS"]);
}

/// I5: a swap that was given up and arrives later is still ours, for the session that sent it
/// and for the one after it.
#[tokio::test]
async fn i5_a_swap_that_arrives_late_is_ours() {
    for dies in [false, true] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        client.deliver("u", "1", b"mail").await.unwrap();
        client.flush("u").await;
        client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
        // The answer is lost, and so is the question what became of it.
        world.faults(|r| match (r.op, r.key.ends_with("/head")) {
            (Op::Put, true) => Fault::After(down()),
            (Op::Get, true) => Fault::Before(down()),
            _ => Fault::None,
        });
        assert!(flush::flush(&client.cell("u"), Options::default()).await.is_err());
        world.no_faults();
        client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await.unwrap();
        let client = if dies {
            // And of two swaps the disk knows neither.
            world.faults(|r| match (r.op, r.key.ends_with("/head")) {
                (Op::Put, true) => Fault::Before(down()),
                _ => Fault::None,
            });
            assert!(flush::flush(&client.cell("u"), Options::default()).await.is_err());
            world.no_faults();
            drop(client);
            world.session(HERE)
        } else {
            client
        };
        assert_eq!(client.list("u/cur").await.unwrap(), ["1:2,RS"]);
        client.deliver("u", "2", b"mail").await.unwrap();
        client.flush("u").await;
        drop(client);
        let fresh = world.session(FRESH);
        assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,RS"], "dies: {dies}");
    }
}

/// I5: two sessions open a user at once: one gets it, the other waits for its lease.
#[tokio::test]
async fn i5_one_of_two_gets_the_user() {
    let world = World::new();
    let settings = |on: On| {
        let mut settings = world.settings(on);
        settings.single_backend = false;
        settings
    };
    let disk = || Arc::new(vmailfs::cache::disk::RealDisk);
    let a = world.session_with(settings(HERE), disk());
    let b = world.session_with(settings(On { backend: "b", ..FRESH }), disk());
    for client in [&a, &b] {
        client.claim().await;
    }
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    let heads = AtomicUsize::new(0);
    world.faults(move |r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put, true) if heads.fetch_add(1, Ordering::SeqCst) == 0 => {
            Fault::HangBefore(held.clone())
        }
        _ => Fault::None,
    });
    a.mkdir("u").await.unwrap();
    let other = a.clone();
    let slow = tokio::spawn(async move { other.mkdir("u/cur").await });
    while !world.log.lock().iter().any(|r| r.0 == Op::Put && r.1.ends_with("/head")) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    b.mkdir("u").await.unwrap();
    b.mkdir("u/cur").await.unwrap();
    b.flush("u").await;
    gate.notify_one();
    assert_eq!(slow.await.unwrap(), Err(libc::EAGAIN));
    assert_eq!(world.head("u").owner.unwrap().backend, "b");
    // The lease is over when its time and a margin have passed without a sign.
    world.clock.advance(std::time::Duration::from_secs(200));
    let session = a.session();
    session.lease.renew(session).await.unwrap();
    assert_eq!(a.list("u").await.unwrap(), ["cur"]);
    assert_eq!(b.mkdir("u/new").await, Err(libc::ESTALE));
}

/// I4, I9: a head or a bundle that does not decode is one user's, is no absence, and bounces nothing;
/// and a person is told until it is mended.
#[tokio::test]
async fn i9_damage_in_the_store_defers_for_one_user() {
    for what in ["/head", "/bundle/"] {
        let world = World::new();
        let client = world.session(HERE);
        for user in ["u", "v"] {
            client.maildir(&[user]).await;
            client.deliver(user, "1", b"mail").await.unwrap();
        }
        client.close().await;
        let mut whole = Vec::new();
        for key in world.mem.keys().into_iter().filter(|k| k.contains("/u/") && k.contains(what)) {
            let bytes = world.mem.bytes_of(&key).unwrap();
            whole.push((key.clone(), bytes.clone()));
            let wrong =
                bytes.iter().enumerate().map(|(n, b)| b ^ u8::from(n >= 40)).collect::<Vec<_>>();
            world.mem.damage(&key, wrong);
        }
        let fresh = world.session(FRESH);
        // What a delivery does, from its first look on: nothing of it may bounce, or wait in vain.
        let before = world.clock_boot();
        assert_eq!(fresh.list("u/new").await, Err(libc::EAGAIN), "{what}");
        assert_eq!(fresh.stat("u/new").await.map(drop), Err(libc::EAGAIN));
        assert_eq!(fresh.create("u/tmp/2").await.map(drop), Err(libc::EAGAIN));
        assert_eq!(fresh.deliver("u", "2", b"mail").await, Err(libc::EAGAIN));
        assert_eq!(fresh.mkdir("u/x").await, Err(libc::EAGAIN));
        assert!(world.clock_boot() - before < std::time::Duration::from_secs(5));
        assert_eq!(fresh.list("v/new").await.unwrap(), ["1"]);
        fresh.deliver("v", "2", b"mail").await.unwrap();
        let told = fresh.session().unserved.all();
        assert!(told.iter().all(|d| d.user == "u") && !told.is_empty(), "{told:?}");
        let word = if what == "/head" { "head of u" } else { "bundle" };
        assert!(told.iter().any(|d| d.error.contains(word)), "{told:?}");
        for (key, bytes) in whole {
            world.mem.damage(&key, bytes);
        }
        assert_eq!(fresh.list("u/new").await.unwrap(), ["1"]);
        fresh.deliver("u", "2", b"mail").await.unwrap();
        assert_eq!(fresh.session().unserved.all(), []);
    }
}

/// I4: what is no head at all was never written by us: some proxy's page with status 200.
#[tokio::test]
async fn i4_a_page_in_place_of_a_head_is_an_outage() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.close().await;
    let page = |r: &vmailfs::store::faulty::Request| r.key.ends_with("/head");
    world.faults(move |r| match page(r) {
        true => Fault::WrongBody(bytes::Bytes::from_static(b"{\"error\": \"try later\"}")),
        false => Fault::None,
    });
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await, Err(libc::EAGAIN));
    assert_eq!(fresh.mkdir("u/x").await, Err(libc::EAGAIN));
    // Once is not even noticed, nor is a bit that fell over.
    world.no_faults();
    let head = world.mem.keys().into_iter().find(|k| k.ends_with("/head")).unwrap();
    let mut spoilt = world.mem.bytes_of(&head).unwrap().to_vec();
    let last = spoilt.len() - 30;
    spoilt[last] ^= 1;
    let left = std::sync::atomic::AtomicU32::new(2);
    world.faults(move |r| {
        let wrong = page(r)
            && r.op == Op::Get
            && left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok();
        if wrong { Fault::WrongBody(spoilt.clone().into()) } else { Fault::None }
    });
    assert_eq!(fresh.list("u/new").await.unwrap(), ["1"]);
}

fn not_there(key: &str) -> Fault {
    Fault::Before(vmailfs::store::StoreError::NotFound { key: key.to_string() })
}

/// I4: the store says that a user has no head who was here a moment ago. That is asked again, and
/// never an absence, nor damage for which mail would be bounced.
#[tokio::test]
async fn i4_a_head_that_cannot_be_gone_is_a_doubt() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    drop(client);
    let client = world.session(HERE);
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Get, true) => not_there(&r.key),
        _ => Fault::None,
    });
    client.look("u").await.unwrap();
    assert_eq!(client.list("u/new").await, Err(libc::EAGAIN));
    assert_eq!(client.mkdir("u/.New").await, Err(libc::EAGAIN));
    assert_eq!(client.deliver("u", "2", b"mail").await, Err(libc::EAGAIN));
    assert!(world.requests().iter().filter(|r| r.1.ends_with("/head")).count() > 6);
    assert!(world.requests().iter().all(|r| r.0 != Op::Put));
    world.no_faults();
    assert_eq!(client.list("u/new").await.unwrap(), ["1"]);
    drop(client);
    // Once is not noticed.
    let client = world.session(HERE);
    let first = AtomicUsize::new(0);
    world.faults(move |r| match (r.op, r.key.ends_with("/head")) {
        (Op::Get, true) if first.fetch_add(1, SeqCst) < 2 => not_there(&r.key),
        _ => Fault::None,
    });
    assert_eq!(client.list("u/new").await.unwrap(), ["1"]);
    // Nor does it make a rival of a swap that fails.
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put, true) => {
            let key = r.key.clone();
            Fault::Before(vmailfs::store::StoreError::Precondition { key })
        }
        (Op::Get, true) => not_there(&r.key),
        _ => Fault::None,
    });
    assert!(flush::flush(&client.cell("u"), Options::default()).await.is_err());
    world.no_faults();
    client.deliver("u", "2", b"mail").await.unwrap();
    client.flush("u").await;
    // And neither a bundle that is not there for once.
    drop(client);
    let once = AtomicUsize::new(0);
    world.faults(move |r| match (r.op, r.key.contains("/bundle/")) {
        (Op::Get, true) if once.fetch_add(1, SeqCst) == 0 => not_there(&r.key),
        _ => Fault::None,
    });
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,S"]);
}

impl World {
    /// Takes objects away behind everybody's back.
    async fn lose(&self, which: impl Fn(&str) -> bool) {
        let keys: Vec<String> = self.mem.keys().into_iter().filter(|key| which(key)).collect();
        assert!(!keys.is_empty());
        self.mem.delete(&keys, Reason("test")).await.unwrap();
    }

    async fn put_back(&self, key: &str, bytes: bytes::Bytes) {
        let (body, how) = (Body::Bytes(bytes), PutMode::Overwrite);
        self.mem.put(key, body, how, &[], Reason("test")).await.unwrap();
    }
}

/// What a server meets at a user whom nobody can serve: everything waits with its sender, nothing is
/// absent, nothing is written.
async fn nobody_serves(world: &World, client: &Client) {
    let before = world.mem.keys();
    client.look("u").await.unwrap();
    assert_eq!(client.list("u/new").await, Err(libc::EAGAIN));
    assert_eq!(client.stat("u/new").await.map(drop), Err(libc::EAGAIN));
    assert_eq!(client.mkdir("u").await, Err(libc::EEXIST));
    assert_eq!(client.mkdir("u/.New").await, Err(libc::EAGAIN));
    assert_eq!(client.deliver("u", "2", b"mail").await, Err(libc::EAGAIN));
    let told = client.session().unserved.all();
    assert!(told.iter().any(|d| d.user == "u" && d.error.contains("no head")), "{told:?}");
    let flushed = client.session().flush_user("u", Options::default()).await;
    assert!(matches!(flushed, Err(Error::Doubt { .. })), "{flushed:?}");
    assert_eq!(world.mem.keys(), before);
}

/// I4: a head that is really gone from the store is not made anew by a session that has the user
/// open, nor by one that finds the user's state on its disk. Once it is back, all is as it was.
#[tokio::test]
async fn i4_a_head_that_is_gone_is_not_made_anew() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    let key = head_key("u");
    let head = world.mem.bytes_of(&key).unwrap();
    world.lose(|k| k == key).await;
    // What is here is served, and mails are safe without a head; flags wait.
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    client.deliver("u", "2", b"mail").await.unwrap();
    let flushed = flush::flush(&client.cell("u"), Options::default()).await;
    assert!(matches!(flushed, Err(Error::Doubt { .. })), "{flushed:?}");
    assert!(world.mem.bytes_of(&key).is_none());
    world.put_back(&key, head).await;
    client.flush("u").await;
    // The same after the death of the process.
    client.rename("u/new/2", "u/cur/2:2,S").await.unwrap();
    drop(client);
    let head = world.mem.bytes_of(&key).unwrap();
    world.lose(|k| k == key).await;
    let client = world.session(HERE);
    nobody_serves(&world, &client).await;
    world.put_back(&key, head).await;
    assert_eq!(client.list("u/cur").await.unwrap(), ["1:2,S", "2:2,S"]);
    client.close().await;
    assert_eq!(world.session(FRESH).list("u/cur").await.unwrap(), ["1:2,S", "2:2,S"]);
}

/// I4: a machine that knows nothing of a user makes no empty one over what the store has of it, even
/// if the head is gone: its ids would be given again, and its bundles written over.
#[tokio::test]
async fn i4_no_new_user_is_made_over_what_is_left_of_one() {
    for left in ["/mail/", "/bundle/", "/u/"] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        client.deliver("u", "1", b"mail").await.unwrap();
        client.close().await;
        let key = head_key("u");
        let head = world.mem.bytes_of(&key).unwrap();
        world.lose(|k| k == key || !k.contains(left)).await;
        let fresh = world.session(FRESH);
        nobody_serves(&world, &fresh).await;
        // Nor while the store does not say what is left.
        world.faults(|r| match r.op {
            Op::List | Op::ListDirs => Fault::Before(down()),
            _ => Fault::None,
        });
        let before = world.mem.keys();
        assert_eq!(fresh.deliver("u", "2", b"mail").await, Err(libc::EAGAIN));
        assert_eq!(world.mem.keys(), before);
        world.no_faults();
        if left == "/u/" {
            world.put_back(&key, head).await;
            assert_eq!(fresh.list("u/new").await.unwrap(), ["1"]);
        } else {
            // What fsck sets aside is no user.
            let aside = format!("{}/aside/head", user_dir("u"));
            world.put_back(&aside, head).await;
            world.lose(|k| k.contains(left)).await;
            assert_eq!(fresh.list("u").await.unwrap(), [""; 0]);
        }
    }
}

/// I4: what goes wrong in here while a mail is made safe is no reason to bounce it.
#[tokio::test]
async fn i4_a_mail_whose_staged_bytes_are_gone_is_deferred() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let mail = client.create("u/tmp/1").await.unwrap();
    client.write(mail, 0, b"mail").await.unwrap();
    let mut cut = 0;
    for file in std::fs::read_dir(world.machine_dir(HERE).join("staging")).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() && path.metadata().unwrap().len() == 4 {
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1).unwrap();
            cut += 1;
        }
    }
    assert_eq!(cut, 1);
    assert_eq!(client.fsync(mail).await, Err(libc::EAGAIN));
    assert_eq!(client.close_file(mail).await, Err(libc::EAGAIN));
}

/// I5: a backend whose sign tells of a lease without end is waited for as long as the longest.
#[tokio::test]
async fn i5_a_sign_of_a_lease_without_end_ends() {
    use std::time::Duration;
    let world = World::new();
    let mut settings = world.settings(HERE);
    settings.single_backend = false;
    let client = world.session_with(settings, Arc::new(vmailfs::cache::disk::RealDisk));
    let session = client.session();
    let sign = format!(
        "{{\"vmailfs-backend\": 1, \"backend\": \"b\", \"session\": \"x\", \"renewal\": 7, \
         \"lease_seconds\": {}}}",
        u64::MAX
    );
    let key = vmailfs::format::key::backend_key("b");
    let why = Reason("test");
    world.mem.put(&key, Body::Bytes(sign.into()), PutMode::Overwrite, &[], why).await.unwrap();
    assert!(!session.lease.is_over(session, "b").await.unwrap());
    world.clock.advance(Duration::from_secs(24 * 3600));
    assert!(!session.lease.is_over(session, "b").await.unwrap());
    world.clock.advance(Duration::from_secs(11));
    assert!(session.lease.is_over(session, "b").await.unwrap());
}
