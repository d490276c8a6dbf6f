//! What a session that died had not flushed is at risk, and is flushed, though nobody uses its user.

use super::world::*;
use std::sync::Arc;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::leftover;
use vmailfs::vmail::metacache::Pending;
use vmailfs::vmail::session::Session;

const ALL: Options = Options { caches: true, release: false, important_only: false };

/// A machine whose process died with a flag that is in no flush, and which runs again.
async fn died(world: &World) -> Client {
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    drop(client);
    world.session(HERE)
}

fn at_risk(session: &Arc<Session>) -> Vec<String> {
    session.waiting().1.into_iter().filter(|w| w.important).map(|w| w.user).collect()
}

async fn elsewhere(world: &World, again: Client) {
    again.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,S"]);
}

#[tokio::test]
async fn i3_a_flush_finds_what_a_dead_session_left() {
    let world = World::new();
    let again = died(&world).await;
    let before = world.head("u").write_id;
    let report =
        again.session().flush_cell(&again.session().user_by_name("u").unwrap(), ALL).await.unwrap();
    assert!(report.flushed);
    assert_ne!(world.head("u").write_id, before);
    assert_eq!(at_risk(again.session()), [""; 0]);
    // Nor is somebody opened who left nothing.
    again.close().await;
    let again = world.session(HERE);
    let report =
        again.session().flush_cell(&again.session().user_by_name("u").unwrap(), ALL).await.unwrap();
    assert!(!report.flushed && again.session().open_users().is_empty());
    leftover::look(again.session()).await;
    assert_eq!(at_risk(again.session()), [""; 0]);
}

#[tokio::test]
async fn i3_what_a_dead_session_left_is_told_and_opened() {
    let world = World::new();
    let again = died(&world).await;
    let session = again.session().clone();
    leftover::look(&session).await;
    assert_eq!(at_risk(&session), ["u"]);
    assert_eq!(session.metacache_list()[0].pending, Pending::Important);
    world.store.set_down(true);
    assert_eq!(leftover::open_all(&session).await, 1);
    assert_eq!(at_risk(&session), ["u"], "still");
    world.store.set_down(false);
    assert_eq!(leftover::open_all(&session).await, 0);
    // It waits for its flush, as it did before the death.
    assert_eq!(at_risk(&session), ["u"]);
    assert!(session.metacache_list()[0].upload_within.is_some());
    again.flush("u").await;
    assert_eq!(at_risk(&session), [""; 0]);
    elsewhere(&world, again).await;
}

/// What a flush has taken along is at risk until the store has answered.
#[tokio::test]
async fn i3_what_is_on_its_way_is_still_at_risk() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    client.put("u/dovecot.index.log", b"some log").await.unwrap();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let session = client.session().clone();
    let told = |session: &Arc<Session>| session.waiting().1.first().cloned().unwrap();
    let before = told(&session);
    let (held, sent) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicBool::new(false)));
    let (wait, seen) = (held.clone(), sent.clone());
    world.faults(move |r| match r.op == Op::Put && r.key.contains("/bundle/") {
        true => {
            seen.store(true, Ordering::SeqCst);
            Fault::HangBefore(wait.clone())
        }
        false => Fault::None,
    });
    let cell = client.cell("u");
    let flushing = tokio::spawn(async move { flush::flush(&cell, ALL).await });
    while !sent.load(Ordering::SeqCst) {
        tokio::task::yield_now().await;
    }
    let now = told(&session);
    assert!(now.important && now.user == "u" && now.oldest >= before.oldest, "{now:?}");
    assert_eq!(now.changed_bytes, before.changed_bytes);
    let listed = session.metacache_list();
    assert!(listed[0].pending == Pending::Important && listed[0].changes > 0, "{listed:?}");
    world.faults(|_| Fault::None);
    held.notify_one();
    assert!(flushing.await.unwrap().unwrap().flushed);
    assert_eq!(at_risk(&session), [""; 0]);
    assert_eq!(session.metacache_list()[0].pending, Pending::None);
}

/// Whoever opens such a user, a clean end leaves nothing to be told of.
#[tokio::test]
async fn i3_a_user_that_somebody_opened_is_not_left() {
    let world = World::new();
    let again = died(&world).await;
    let session = again.session().clone();
    leftover::look(&session).await;
    assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,S"]);
    again.close().await;
    assert_eq!(at_risk(&session), [""; 0]);
}

/// Whoever moves a mail out of `new` and sets its flags in one step has set flags.
#[tokio::test]
async fn flags_that_come_with_the_move_from_new_are_important() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    for name in ["1", "2"] {
        client.deliver("u", name, b"mail").await.unwrap();
    }
    client.flush("u").await;
    client.rename("u/new/1", "u/cur/1:2,").await.unwrap();
    assert_eq!(at_risk(client.session()), [""; 0]);
    client.rename("u/new/2", "u/cur/2:2,S").await.unwrap();
    assert_eq!(at_risk(client.session()), ["u"]);
}
