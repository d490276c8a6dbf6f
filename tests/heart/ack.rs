//! `ack = "journal"`: what was promised is kept, whatever dies but the disk.

use super::world::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmailfs::cache::disk::RealDisk;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::promise::{self, Ack};

fn promising(world: &World, on: On) -> Client {
    let mut settings = world.settings(on);
    settings.ack = Ack::Journal;
    world.session_with(settings, Arc::new(RealDisk))
}

fn no_mail_arrives(world: &World) {
    world.faults(|r| match r.op {
        Op::Put if r.key.contains("/mail/") => Fault::Before(down()),
        _ => Fault::None,
    });
}

async fn kept(client: &Client) {
    for _ in 0..100 {
        promise::keep_all(&client.cell("u")).await.unwrap();
        let left = client.cell("u").if_open(|user| user.promised.len());
        if left == Some(0) {
            return;
        }
    }
    panic!("promises are left");
}

#[tokio::test]
async fn i1_a_promise_is_answered_without_the_store_and_kept_later() {
    let world = World::new();
    let client = promising(&world, HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    world.store.set_down(true);
    client.deliver("u", "1", b"mail").await.unwrap();
    assert_eq!(client.read("u/new/1").await.unwrap(), b"mail");
    let waiting = client.session().waiting().1;
    assert_eq!((waiting[0].promised, waiting[0].promised_bytes), (1, 4));
    world.store.set_down(false);
    kept(&client).await;
    assert_eq!(world.mails().len(), 1);
    assert_eq!(client.session().waiting().1.iter().map(|w| w.promised).sum::<u64>(), 0);
    client.flush("u").await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap(), ["1"]);
    assert_eq!(fresh.read("u/new/1").await.unwrap(), b"mail");
}

/// The head never names what is not up, and what it names is not taken for a lost mail.
#[tokio::test]
async fn i1_no_head_names_a_promise() {
    let world = World::new();
    let client = promising(&world, HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    let before = world.head("u");
    no_mail_arrives(&world);
    client.deliver("u", "1", b"mail").await.unwrap();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    assert!(flush::flush(&client.cell("u"), Options::default()).await.is_err());
    assert_eq!(world.head("u"), before);
    world.no_faults();
    client.flush("u").await;
    assert_eq!(world.mails().len(), 1);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap(), [""; 0]);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,S"]);
}

#[tokio::test]
async fn i1_a_dead_process_keeps_its_promises() {
    for on in [HERE, REBOOTED] {
        let world = World::new();
        let client = promising(&world, HERE);
        client.maildir(&["u"]).await;
        client.flush("u").await;
        no_mail_arrives(&world);
        client.deliver("u", "1", b"mail").await.unwrap();
        client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
        drop(client);
        world.no_faults();
        // The site went back to the other mode meanwhile.
        let again = world.session(on);
        assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,S"]);
        assert_eq!(again.list("u/new").await.unwrap(), [""; 0]);
        assert_eq!(again.read("u/cur/1:2,S").await.unwrap(), b"mail");
        assert_eq!(world.mails().len(), 1);
    }
}

/// Another session took the user before the mail was up: it comes back where it belongs.
#[tokio::test]
async fn i5_promises_of_a_fenced_session_are_kept() {
    let world = World::new();
    let client = promising(&world, HERE);
    client.maildir(&["u", "u/.Box"]).await;
    client.flush("u").await;
    no_mail_arrives(&world);
    client.deliver("u/.Box", "1", b"mail").await.unwrap();
    let rival = world.session(FRESH);
    assert_eq!(rival.list("u/.Box/new").await.unwrap(), [""; 0]);
    client.session().closing.store(true, Ordering::SeqCst);
    while client.cell("u").uploader.load(Ordering::SeqCst) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    drop(client);
    rival.close().await;
    world.no_faults();
    let again = promising(&world, HERE);
    assert_eq!(again.list("u/.Box/new").await.unwrap(), ["1,S=4,W=4"]);
    assert_eq!(again.read("u/.Box/new/1,S=4,W=4").await.unwrap(), b"mail");
    again.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/.Box/new").await.unwrap(), ["1,S=4,W=4"]);
}

#[tokio::test]
async fn a_mail_deleted_before_its_upload_stays_deleted() {
    let world = World::new();
    let client = promising(&world, HERE);
    client.maildir(&["u"]).await;
    no_mail_arrives(&world);
    client.deliver("u", "1", b"mail").await.unwrap();
    client.unlink("u/new/1").await.unwrap();
    world.no_faults();
    kept(&client).await;
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap(), [""; 0]);
}

/// The store is down for long: what is promised keeps within its bound, and what comes then is deferred,
/// not lost and not promised.
#[tokio::test]
async fn i8_promises_have_a_bound() {
    let world = World::new();
    let mut settings = world.settings(HERE);
    settings.ack = Ack::Journal;
    settings.staging_max = 300_000;
    let client = world.session_with(settings, Arc::new(RealDisk));
    client.maildir(&["u"]).await;
    client.flush("u").await;
    no_mail_arrives(&world);
    let mail = |n: u8| vec![n; 60_000];
    let mut delivered = Vec::new();
    let mut refused = None;
    for n in 0..10 {
        let name = n.to_string();
        match client.deliver("u", &name, &mail(n)).await {
            Ok(_) => delivered.push(n),
            Err(errno) => {
                refused = Some(errno);
                break;
            }
        }
    }
    assert!(matches!(refused, Some(libc::EAGAIN | libc::ENOSPC)), "{refused:?}");
    assert_eq!(delivered.len(), 5);
    let pending = world.machine_dir(HERE).join("state/users");
    assert!(pending.exists());
    let waiting = client.session().waiting().1;
    assert_eq!((waiting[0].promised, waiting[0].promised_bytes), (5, 300_000));
    world.no_faults();
    kept(&client).await;
    // There is room again.
    client.deliver("u", "again", &mail(100)).await.unwrap();
    kept(&client).await;
    client.close().await;
    let fresh = world.session(FRESH);
    for n in delivered {
        assert_eq!(fresh.read(&format!("u/new/{n}")).await.unwrap(), mail(n));
    }
}
