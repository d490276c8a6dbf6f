//! I3, I5: a change that races with the hand-over of its user is in the head that hands it over,
//! or is refused; a hand-over that fails leaves a user that is served.

use super::world::*;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use vmailfs::store::Op;
use vmailfs::store::faulty::{Fault, Request};
use vmailfs::vmail::close::close;
use vmailfs::vmail::error::Error;

const NEXT: On = On { machine: "next", ..FRESH };

async fn mailbox(world: &World) -> Client {
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    client
}

/// Holds requests until the gate is notified.
fn hold(world: &World, what: impl Fn(&Request) -> bool + Send + Sync + 'static) -> Arc<Notify> {
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    world.requests();
    world.faults(move |r| if what(r) { Fault::HangBefore(held.clone()) } else { Fault::None });
    gate
}

async fn asked(world: &World, op: Op, part: &str) {
    while !world.log.lock().iter().any(|r| r.0 == op && r.1.contains(part)) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn closing(client: &Client) -> JoinHandle<Result<(), Error>> {
    let cell = client.cell("u");
    tokio::spawn(async move { close(&cell).await })
}

fn is_head(r: &Request) -> bool {
    r.op == Op::Put && r.key.ends_with("/head")
}

/// A change that comes after the last cut waits, and is made in the user as it is opened again;
/// what came before the cut is in the head without an owner.
#[tokio::test]
async fn i5_a_change_after_the_last_cut_waits_for_the_hand_over() {
    let world = World::new();
    let client = mailbox(&world).await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let gate = hold(&world, is_head);
    let closed = closing(&client);
    asked(&world, Op::Put, "/head").await;
    let other = client.clone();
    let late = tokio::spawn(async move { other.rename("u/cur/1:2,S", "u/cur/1:2,RS").await });
    // Reading goes on.
    assert_eq!(client.read("u/cur/1:2,S").await.unwrap(), b"mail");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!late.is_finished());
    world.no_faults();
    gate.notify_one();
    closed.await.unwrap().unwrap();
    // Whichever side of the hand-over it fell on, it is not lost.
    late.await.unwrap().unwrap();
    assert_eq!(client.list("u/cur").await.unwrap(), ["1:2,RS"]);
    client.close().await;
    assert!(world.head("u").owner.is_none());
    let fresh = world.session(NEXT);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,RS"]);
}

/// When the whole mount goes there is nothing to wait for.
#[tokio::test]
async fn i5_a_change_after_the_last_cut_of_a_mount_is_refused() {
    let world = World::new();
    let client = mailbox(&world).await;
    let mail = client.create("u/tmp/2").await.unwrap();
    client.write(mail, 0, b"second").await.unwrap();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let gate = hold(&world, is_head);
    let session = client.session().clone();
    let closed = tokio::spawn(async move { session.close(Duration::from_secs(600)).await });
    asked(&world, Op::Put, "/head").await;
    assert_eq!(client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await, Err(libc::EAGAIN));
    assert_eq!(client.put("u/dovecot-uidlist", b"3 V1 N2 G0\n").await, Err(libc::EAGAIN));
    assert_eq!(client.unlink("u/cur/1:2,S").await, Err(libc::EAGAIN));
    assert_eq!(client.fsync(mail).await, Err(libc::EAGAIN));
    assert_eq!(client.mkdir("u/.New").await, Err(libc::EAGAIN));
    world.no_faults();
    gate.notify_one();
    assert!(closed.await.unwrap().is_empty());
    assert!(world.head("u").owner.is_none());
    let fresh = world.session(NEXT);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,S"]);
    assert_eq!(fresh.list("u").await.unwrap(), ["cur", "new", "tmp"]);
}

/// I1: a publish that is under way ends before the cut, and its mail is in the head.
#[tokio::test]
async fn i1_a_publish_under_way_is_waited_for() {
    let world = World::new();
    let client = mailbox(&world).await;
    let gate = hold(&world, |r| r.op == Op::Put && r.key.contains("/mail/"));
    let mail = client.create("u/new/2").await.unwrap();
    client.write(mail, 0, b"second").await.unwrap();
    let other = client.clone();
    let synced = tokio::spawn(async move { other.fsync(mail).await });
    asked(&world, Op::Put, "/mail/").await;
    let closed = closing(&client);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!world.log.lock().iter().any(|r| r.0 == Op::Put && r.1.ends_with("/head")));
    gate.notify_one();
    closed.await.unwrap().unwrap();
    assert!(world.head("u").owner.is_none());
    // The handle went with the user; whatever its fsync says, the mail is there.
    let _ = synced.await.unwrap();
    let fresh = world.session(NEXT);
    assert_eq!(fresh.list("u/new").await.unwrap(), ["1", "2"]);
    assert_eq!(fresh.read("u/new/2").await.unwrap(), b"second");
}

/// A publish that does not end: the user is served again.
#[tokio::test]
async fn i5_a_publish_that_hangs_stops_the_hand_over() {
    let world = World::new();
    let client = mailbox(&world).await;
    let gate = hold(&world, |r| r.op == Op::Put && r.key.contains("/mail/"));
    let other = client.clone();
    let slow = tokio::spawn(async move { other.deliver("u", "2", b"second").await });
    asked(&world, Op::Put, "/mail/").await;
    let closed = closing(&client);
    let mut wait = 0;
    while !closed.is_finished() {
        world.clock.advance(Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(2)).await;
        wait += 1;
        assert!(wait < 30_000);
    }
    assert!(matches!(closed.await.unwrap(), Err(Error::Full(_))));
    world.no_faults();
    gate.notify_one();
    slow.await.unwrap().unwrap();
    client.rename("u/new/2", "u/cur/2:2,S").await.unwrap();
    client.close().await;
    let fresh = world.session(NEXT);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["2:2,S"]);
}

/// A hand-over that fails before its swap was sent leaves the user as it was.
#[tokio::test]
async fn i5_a_hand_over_that_fails_leaves_a_user_that_is_served() {
    let world = World::new();
    let client = mailbox(&world).await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    world.faults(|r| match r.op == Op::Put && r.key.contains("/bundle/") {
        true => Fault::Before(down()),
        false => Fault::None,
    });
    assert!(matches!(close(&client.cell("u")).await, Err(Error::Store { .. })));
    client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await.unwrap();
    client.deliver("u", "2", b"second").await.unwrap();
    world.no_faults();
    client.flush("u").await;
    assert!(world.head("u").owner.is_some());
    close(&client.cell("u")).await.unwrap();
    let fresh = world.session(NEXT);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,RS"]);
    assert_eq!(fresh.list("u/new").await.unwrap(), ["2"]);
}

/// I5: while it is not known whether the head without an owner is in the store, nothing is changed;
/// then the user is taken back, whichever of the two it was.
#[tokio::test]
async fn i5_a_hand_over_without_an_answer_is_taken_back_first() {
    for arrived in [false, true] {
        let world = World::new();
        let client = mailbox(&world).await;
        client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
        world.faults(move |r| match (r.op, r.key.ends_with("/head"), arrived) {
            (Op::Put, true, true) if r.why.0 == "flush" => Fault::After(down()),
            (Op::Put | Op::Get, true, _) => Fault::Before(down()),
            _ => Fault::None,
        });
        assert!(matches!(close(&client.cell("u")).await, Err(Error::Store { .. })));
        assert_eq!(world.head("u").owner.is_none(), arrived);
        assert_eq!(client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await, Err(libc::EAGAIN));
        assert_eq!(client.deliver("u", "2", b"second").await, Err(libc::EAGAIN));
        assert_eq!(client.read("u/cur/1:2,S").await.unwrap(), b"mail");
        world.no_faults();
        client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await.unwrap();
        let owner = world.head("u").owner.unwrap();
        assert_eq!(owner.session, client.session().id);
        client.deliver("u", "2", b"second").await.unwrap();
        client.flush("u").await;
        drop(client);
        let fresh = world.session(NEXT);
        assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,RS"], "{arrived}");
        assert_eq!(fresh.list("u/new").await.unwrap(), ["2"]);
    }
}

/// I5: another backend took the user while it was not known whether it was handed over.
#[tokio::test]
async fn i5_a_hand_over_without_an_answer_may_have_been_taken_up() {
    let world = World::new();
    let client = mailbox(&world).await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put, true) => Fault::After(down()),
        (Op::Get, true) => Fault::Before(down()),
        _ => Fault::None,
    });
    assert!(close(&client.cell("u")).await.is_err());
    world.no_faults();
    let rival = world.session(On { backend: "b", ..NEXT });
    assert_eq!(rival.list("u/cur").await.unwrap(), ["1:2,S"]);
    assert_eq!(client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await, Err(libc::ESTALE));
    rival.rename("u/cur/1:2,S", "u/cur/1:2,FS").await.unwrap();
    rival.close().await;
    let last = world.session(On { machine: "last", ..FRESH });
    assert_eq!(last.list("u/cur").await.unwrap(), ["1:2,FS"]);
}

/// A death in the doubt: the next start of the same machine has everything.
#[tokio::test]
async fn i3_a_death_after_a_hand_over_without_an_answer() {
    for arrived in [false, true] {
        let world = World::new();
        let client = mailbox(&world).await;
        client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
        world.faults(move |r| match (r.op, r.key.ends_with("/head"), arrived) {
            (Op::Put, true, true) => Fault::After(down()),
            (Op::Put | Op::Get, true, _) => Fault::Before(down()),
            _ => Fault::None,
        });
        assert!(close(&client.cell("u")).await.is_err());
        drop(client);
        world.no_faults();
        let client = world.session(HERE);
        assert_eq!(client.list("u/cur").await.unwrap(), ["1:2,S"]);
        client.close().await;
    }
}
