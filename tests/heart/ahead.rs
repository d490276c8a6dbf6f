//! Who reads a folder mail by mail finds the next ones here, and nobody else pays for it.

use super::world::*;
use std::collections::BTreeSet;
use std::time::Duration;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;

fn name(n: usize) -> String {
    format!("{:010}.M{n:06}P1.test", 1_700_000_000 + n)
}

/// A machine that has nothing of a user with so many mails.
async fn fresh(world: &World, mails: usize, ahead: usize) -> Client {
    let here = world.session(HERE);
    here.maildir(&["anna"]).await;
    for n in 0..mails {
        here.deliver("anna", &name(n), format!("mail {n}").as_bytes()).await.unwrap();
    }
    here.close().await;
    let mut settings = world.settings(FRESH);
    settings.read_ahead = ahead;
    world.session_with(settings, std::sync::Arc::new(vmailfs::cache::disk::RealDisk))
}

async fn read(client: &Client, n: usize) {
    let text = client.read(&format!("anna/new/{}", name(n))).await.unwrap();
    assert_eq!(text, format!("mail {n}").as_bytes());
}

/// The mails that were asked for since the last call.
fn fetched(world: &World) -> Vec<String> {
    let all = world.requests().into_iter();
    all.filter(|(op, key, _)| matches!(op, Op::Get | Op::Download) && key.contains("/mail/"))
        .map(|a| a.1)
        .collect()
}

/// Waits until so many mails are cached.
async fn copies(client: &Client, count: usize) {
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while (client.session().fscache.usage()[0].files as usize) < count {
        assert!(std::time::Instant::now() < end, "{:?}", client.session().fscache.usage());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn quiet() {
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_walks_asks_for_nothing_twice_and_waits_for_little() {
    let world = World::new();
    let client = fresh(&world, 100, 8).await;
    world.requests();
    for n in 0..3 {
        read(&client, n).await;
    }
    // Some that nobody has opened.
    copies(&client, 3 + 8).await;
    for n in 3..100 {
        read(&client, n).await;
        if n % 5 == 0 {
            // A reader does other things now and then.
            copies(&client, 100.min(n + 6)).await;
        }
    }
    let all = fetched(&world);
    let once: BTreeSet<&String> = all.iter().collect();
    assert_eq!(once.len(), all.len(), "fetched twice");
    assert!(client.session().fscache.usage()[0].misses < 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn single_mails_bring_only_themselves() {
    let world = World::new();
    let client = fresh(&world, 100, 8).await;
    world.requests();
    for n in [3, 40, 77, 20, 60] {
        read(&client, n).await;
    }
    quiet().await;
    assert_eq!(fetched(&world).len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_read_ahead_where_that_is_off() {
    let world = World::new();
    let client = fresh(&world, 40, 0).await;
    world.requests();
    for n in 0..20 {
        read(&client, n).await;
    }
    quiet().await;
    assert_eq!(fetched(&world).len(), 20);
}

/// A store that fails for what is read ahead does so for nobody who waits.
#[tokio::test(flavor = "multi_thread")]
async fn errors_ahead_are_not_told_to_readers() {
    let world = World::new();
    let client = fresh(&world, 40, 8).await;
    for n in 0..3 {
        world.faults(|_| Fault::None);
        read(&client, n).await;
    }
    world.faults(|request| match request.op {
        Op::Get | Op::Download => Fault::Before(down()),
        _ => Fault::None,
    });
    quiet().await;
    world.no_faults();
    for n in 3..40 {
        read(&client, n).await;
    }
}
