//! Publishing (I1): what is acknowledged is in the store, and the journal says so.

use super::full_disk::FullDisk;
use super::world::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;
use vmailfs::cache::disk::RealDisk;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::gc;

/// I1: fsync is answered after the PUT; what a dead process leaves is in its journal.
#[tokio::test]
async fn i1_fsync_returns_after_the_put_and_the_record() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let file = client.create("u/tmp/1").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    assert!(world.mails().is_empty());
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    world.faults(move |r| match r.why.0 {
        "publish" => Fault::HangAfter(held.clone()),
        _ => Fault::None,
    });
    let other = client.clone();
    let syncing = tokio::spawn(async move { other.fsync(file).await });
    while world.mails().is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(!syncing.is_finished(), "the store has not answered");
    gate.notify_one();
    syncing.await.unwrap().unwrap();
    world.no_faults();
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.read("u/tmp/1").await.unwrap(), b"mail");
}

/// I1: a close without an fsync publishes, too, and a failed one says so.
#[tokio::test]
async fn i1_close_publishes_what_nobody_synced() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let file = client.create("u/new/1").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    client.close_file(file).await.unwrap();
    assert_eq!(world.mails().len(), 1);
    let file = client.create("u/new/2").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    world.store.set_down(true);
    assert_eq!(client.close_file(file).await, Err(libc::EAGAIN));
}

/// I1, I6: a PUT whose answer was lost is put again; the first object is on the dropped list
/// and no second mail.
#[tokio::test]
async fn i1_a_lost_answer_of_a_put_makes_one_mail() {
    for before in [true, false] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        let first = std::sync::atomic::AtomicBool::new(true);
        world.faults(move |r| {
            let hit =
                r.why.0 == "publish" && first.swap(false, std::sync::atomic::Ordering::SeqCst);
            match (hit, before) {
                (true, true) => Fault::Before(down()),
                (true, false) => Fault::After(down()),
                _ => Fault::None,
            }
        });
        client.deliver("u", "1", b"mail").await.unwrap();
        assert_eq!(world.mails().len(), if before { 1 } else { 2 });
        client.flush("u").await;
        drop(client);
        for on in [HERE, FRESH] {
            let again = world.session(on);
            assert_eq!(again.list("u/new").await.unwrap(), ["1"], "before: {before}");
            assert_eq!(again.read("u/new/1").await.unwrap(), b"mail");
        }
    }
}

/// Two syncs of one file at a time: the later content wins, whoever is answered last.
#[tokio::test]
async fn i1_publishes_of_one_file_do_not_overtake() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let file = client.create("u/tmp/1").await.unwrap();
    client.write(file, 0, b"old").await.unwrap();
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    let first = std::sync::atomic::AtomicBool::new(true);
    world.faults(move |r| {
        let hit = r.why.0 == "publish" && first.swap(false, std::sync::atomic::Ordering::SeqCst);
        if hit { Fault::HangAfter(held.clone()) } else { Fault::None }
    });
    let other = client.clone();
    let one = tokio::spawn(async move { other.fsync(file).await });
    while world.mails().is_empty() {
        tokio::task::yield_now().await;
    }
    client.write(file, 0, b"new mail").await.unwrap();
    let other = client.clone();
    let two = tokio::spawn(async move { other.fsync(file).await });
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    gate.notify_one();
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.read("u/tmp/1").await.unwrap(), b"new mail");
}

/// Renamed, linked, touched or unlinked while the PUT is under way: the record says what holds
/// at its end.
#[tokio::test]
async fn i1_names_and_times_may_change_during_a_publish() {
    for change in ["rename", "link", "mtime", "unlink"] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        let file = client.create("u/tmp/1").await.unwrap();
        client.write(file, 0, b"mail").await.unwrap();
        let gate = Arc::new(Notify::new());
        let held = gate.clone();
        world.faults(move |r| match r.why.0 {
            "publish" => Fault::HangAfter(held.clone()),
            _ => Fault::None,
        });
        let other = client.clone();
        let syncing = tokio::spawn(async move { other.fsync(file).await });
        while world.mails().is_empty() {
            tokio::task::yield_now().await;
        }
        let time = vmailfs::format::Timestamp { secs: 1_000_000, nanos: 7 };
        match change {
            "rename" => client.rename("u/tmp/1", "u/new/2").await.unwrap(),
            "link" => client.link("u/tmp/1", "u/new/2").await.unwrap(),
            "unlink" => client.unlink("u/tmp/1").await.unwrap(),
            _ => client.set_mtime("u/tmp/1", time).await,
        }
        gate.notify_one();
        syncing.await.unwrap().unwrap();
        world.no_faults();
        client.close_file(file).await.unwrap();
        let check = async |client: &Client| {
            let (tmp, new) =
                (client.list("u/tmp").await.unwrap(), client.list("u/new").await.unwrap());
            match change {
                "rename" => assert_eq!((tmp.len(), &new[..]), (0, &["2".to_string()][..])),
                "link" => {
                    assert_eq!((tmp.len(), new.len()), (1, 1));
                    assert_eq!(client.stat("u/new/2").await.unwrap().nlink, 2);
                    let (a, b) = (client.stat("u/new/2").await, client.stat("u/tmp/1").await);
                    assert_eq!(a.unwrap().ino, b.unwrap().ino);
                }
                "unlink" => assert_eq!((tmp.len(), new.len()), (0, 0)),
                _ => assert_eq!(client.stat("u/tmp/1").await.unwrap().mtime, time),
            }
        };
        check(&client).await;
        client.flush("u").await;
        drop(client);
        check(&world.session(HERE)).await;
    }
}

/// I1: the watermark stays below a PUT that is not answered while others are flushed; after a
/// loss the mails are there, each once.
#[tokio::test]
async fn i1_the_watermark_waits_for_the_slowest_put() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    let slow = client.create("u/tmp/slow").await.unwrap();
    client.write(slow, 0, b"slow mail").await.unwrap();
    let gate = Arc::new(Notify::new());
    let held = gate.clone();
    world.faults(move |r| match (r.op, r.why.0, r.key.contains("slow")) {
        (Op::Put, "publish", true) => Fault::HangAfter(held.clone()),
        _ => Fault::None,
    });
    let other = client.clone();
    let syncing = tokio::spawn(async move { other.fsync(slow).await });
    while world.mails().is_empty() {
        tokio::task::yield_now().await;
    }
    client.deliver("u", "fast", b"fast mail").await.unwrap();
    client.flush("u").await;
    let head = world.head("u");
    let slow_id: vmailfs::format::ObjectId =
        world.mails()[0].rsplit('/').next().unwrap()[..21].parse().unwrap();
    assert!(head.watermark < slow_id, "{} {slow_id}", head.watermark);
    assert!(!head.known_above.is_empty());
    gate.notify_one();
    syncing.await.unwrap().unwrap();
    client.rename("u/tmp/slow", "u/new/slow").await.unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    let names = fresh.list("u/new").await.unwrap();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.iter().any(|n| n.starts_with("slow")) && names.contains(&"fast".to_string()));
    assert!(fresh.list("u/tmp").await.unwrap().is_empty());
}

/// I4: while the store is down a delivery waits, then gets what servers defer on; another
/// user that has nothing to ask of the store goes on, and mails come through afterwards.
#[tokio::test]
async fn i4_a_delivery_into_an_outage_is_deferred() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.maildir(&["v"]).await;
    client.deliver("v", "1", b"mail").await.unwrap();
    world.store.set_down(true);
    let before = world.clock_boot();
    assert_eq!(client.deliver("u", "1", b"mail").await, Err(libc::EAGAIN));
    let waited = world.clock_boot() - before;
    assert!(waited.as_secs() >= 10 && waited.as_secs() <= 21, "{waited:?}");
    client.rename("v/new/1", "v/cur/1:2,S").await.unwrap();
    assert_eq!(client.read("v/cur/1:2,S").await.unwrap(), b"mail");
    world.store.set_down(false);
    client.deliver("u", "2", b"mail").await.unwrap();
    assert_eq!(client.list("u/new").await.unwrap(), ["2"]);
}

/// I4: the user itself cannot be opened: the same, and nothing looks absent.
#[tokio::test]
async fn i4_an_unreachable_user_is_not_absent() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.close().await;
    world.store.set_down(true);
    let again = world.session(HERE);
    assert_eq!(again.stat("u/new").await.map(|_| ()), Err(libc::EAGAIN));
    assert_eq!(again.mkdir("u/x").await, Err(libc::EAGAIN));
    world.store.set_down(false);
    assert_eq!(again.list("u").await.unwrap(), ["cur", "new", "tmp"]);
}

/// A journal that cannot be written refuses the change, and nothing is half done.
#[tokio::test]
async fn i1_a_full_disk_defers() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    disk.set_full(true);
    assert_eq!(client.rename("u/new/1", "u/cur/1:2,S").await, Err(libc::ENOSPC));
    let refused = client.deliver("u", "2", b"mail").await;
    assert_eq!(refused, Err(libc::ENOSPC));
    disk.set_full(false);
    assert_eq!(client.list("u/cur").await.unwrap(), [""; 0]);
    client.deliver("u", "3", b"mail").await.unwrap();
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.list("u/new").await.unwrap(), ["1", "3"]);
}

/// I1, I6: a put whose answer was lost, when the journal could not take down that it was in vain: its
/// object is dropped by the next flush all the same, and is nobody's mail after a hand-over.
#[tokio::test]
async fn i6_what_was_put_in_vain_is_dropped_without_a_record() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.flush("u").await;
    let file = client.create("u/tmp/1").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    let (puts, full) = (AtomicUsize::new(0), disk.clone());
    world.faults(move |r| match r.op == Op::Put && r.key.contains("/mail/") {
        true if puts.fetch_add(1, Ordering::SeqCst) == 0 => {
            full.set_full(true);
            Fault::After(down())
        }
        true => {
            full.set_full(false);
            Fault::None
        }
        false => Fault::None,
    });
    if client.fsync(file).await.is_err() {
        disk.set_full(false);
        client.fsync(file).await.unwrap();
    }
    client.close_file(file).await.unwrap();
    client.rename("u/tmp/1", "u/new/1").await.unwrap();
    assert_eq!(world.mails().len(), 2);
    client.close().await;
    let next = world.session(HERE);
    next.deliver("u", "2", b"mail").await.unwrap();
    next.flush("u").await;
    let scan = gc::Options { dry_run: false, scan: true, unasked: false };
    let report = gc::collect(&next.cell("u"), scan).await.unwrap();
    assert!(report.scanned && report.kept > 0 && report.adopted.is_empty(), "{report:?}");
    assert_eq!(next.list("u/new").await.unwrap(), ["1", "2"]);
}

/// I1: Postfix names a mail in `tmp/` after its process and the second; the next mail of that
/// second has the same name. Both were acknowledged, and both come back.
#[tokio::test]
async fn i1_two_mails_that_had_one_name_in_turn_are_two() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    for body in [&b"the first"[..], b"the second"] {
        let file = client.create("u/tmp/1700000000.P7.host").await.unwrap();
        client.write(file, 0, body).await.unwrap();
        client.fsync(file).await.unwrap();
        client.close_file(file).await.unwrap();
        let name = format!("u/new/1700000000.V1I{}M1.host", body.len());
        client.link("u/tmp/1700000000.P7.host", &name).await.unwrap();
        client.unlink("u/tmp/1700000000.P7.host").await.unwrap();
    }
    drop(client);
    let fresh = world.session(FRESH);
    let mut found = Vec::new();
    for name in fresh.list("u/new").await.unwrap() {
        found.push(fresh.read(&format!("u/new/{name}")).await.unwrap());
    }
    found.sort();
    assert_eq!(found, [b"the first".to_vec(), b"the second".to_vec()]);
}
