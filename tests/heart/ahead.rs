//! Who reads a folder mail by mail finds the next ones here, and nobody else pays for it.

use super::world::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::session::Settings;

fn name(n: usize) -> String {
    format!("{:010}.M{n:06}P1.test", 1_700_000_000 + n)
}

fn content(n: usize) -> String {
    format!("mail {n}")
}

async fn put(world: &World, mails: usize, content: impl Fn(usize) -> String) {
    let here = world.session(HERE);
    here.maildir(&["anna"]).await;
    for n in 0..mails {
        here.deliver("anna", &name(n), content(n).as_bytes()).await.unwrap();
    }
    here.close().await;
}

fn elsewhere(world: &World, set: impl FnOnce(&mut Settings)) -> Client {
    let mut settings = world.settings(FRESH);
    set(&mut settings);
    world.session_with(settings, Arc::new(vmailfs::cache::disk::RealDisk))
}

/// A machine that has nothing of a user with so many mails.
async fn fresh(world: &World, mails: usize, ahead: usize) -> Client {
    put(world, mails, content).await;
    elsewhere(world, |settings| settings.read_ahead = ahead)
}

async fn read(client: &Client, n: usize) {
    let text = client.read(&format!("anna/new/{}", name(n))).await.unwrap();
    assert_eq!(text, content(n).as_bytes());
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

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_has_few_mails_ahead() {
    let world = World::new();
    let client = fresh(&world, 200, 8).await;
    world.requests();
    for n in 0..3 {
        read(&client, n).await;
        quiet().await;
    }
    for n in 3..40 {
        read(&client, n).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    quiet().await;
    let asked = fetched(&world).len();
    assert!((44..=40 + 32).contains(&asked), "{asked} for 40 mails");
}

/// A store that answers what was asked for so far, all at once, when nothing more is asked for: each
/// time that happens is a wait of the distance to a store far away.
#[tokio::test(flavor = "multi_thread")]
async fn a_fast_reader_waits_a_few_times_and_not_for_each_mail() {
    let world = World::new();
    let client = fresh(&world, 300, 32).await;
    let (asked, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let (count, wait) = (asked.clone(), go.clone());
    world.faults(move |request| match request.op {
        Op::Get | Op::Download if request.key.contains("/mail/") => {
            count.fetch_add(1, Ordering::Relaxed);
            Fault::HangBefore(wait.clone())
        }
        _ => Fault::None,
    });
    let waits = Arc::new(AtomicUsize::new(0));
    let (done, waited) = (Arc::new(AtomicUsize::new(0)), waits.clone());
    let end = done.clone();
    let answering = tokio::spawn(async move {
        let mut most = 0;
        while end.load(Ordering::Relaxed) == 0 {
            let before = asked.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(25)).await;
            let now = asked.load(Ordering::Relaxed);
            if now == before {
                waited.fetch_add(usize::from(now > 0), Ordering::Relaxed);
                most = most.max(asked.swap(0, Ordering::Relaxed));
                go.notify_waiters();
            }
        }
        most
    });
    for n in 0..300 {
        read(&client, n).await;
    }
    done.store(1, Ordering::Relaxed);
    let most = answering.await.unwrap();
    // Three to see that somebody walks, two while the window opens, and 300 mails in lots of 32.
    let waits = waits.load(Ordering::Relaxed);
    assert!(waits <= 3 + 2 + 300 / 32 + 4, "{waits} waits");
    assert!(most >= 30, "{most} in flight at most");
}

/// What is ahead never pushes out what is ahead and was not read yet.
#[tokio::test(flavor = "multi_thread")]
async fn in_a_small_fscache_few_bytes_are_ahead() {
    let world = World::new();
    let large = |n: usize| format!("{n:08}").repeat(60 * 1024 / 8);
    put(&world, 60, large).await;
    let client = elsewhere(&world, |settings| {
        settings.read_ahead = 8;
        settings.fscache[0].max = 1 << 20;
    });
    world.requests();
    for n in 0..60 {
        let text = client.read(&format!("anna/new/{}", name(n))).await.unwrap();
        assert_eq!(text, large(n).as_bytes());
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    let all = fetched(&world);
    assert_eq!(all.len(), 60, "fetched twice");
}
