//! A read that takes unusually long is made a second time, now and then.

use super::world::*;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use vmailfs::cache::disk::RealDisk;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;

fn name(n: usize) -> String {
    format!("{:010}.M{n:06}P1.test", 1_700_000_000 + n)
}

/// A machine that has nothing of a user with a hundred mails.
async fn fresh(world: &World, hedge: u32) -> Arc<Client> {
    let here = world.session(HERE);
    here.maildir(&["anna"]).await;
    for n in 0..100 {
        here.deliver("anna", &name(n), format!("mail {n}").as_bytes()).await.unwrap();
    }
    here.close().await;
    let mut settings = world.settings(FRESH);
    (settings.read_ahead, settings.hedge) = (0, hedge);
    Arc::new(world.session_with(settings, Arc::new(RealDisk)))
}

async fn read(client: &Client, n: usize) {
    let text = client.read(&format!("anna/new/{}", name(n))).await.unwrap();
    assert_eq!(text, format!("mail {n}").as_bytes());
}

/// The first request for a mail gets no answer before the notification.
fn hang(world: &World) -> Arc<Notify> {
    let go = Arc::new(Notify::new());
    let wait = go.clone();
    world.faults(move |request| match request.op {
        Op::Get if request.why.0 == "fetch" => Fault::HangBefore(wait.clone()),
        _ => Fault::None,
    });
    go
}

fn second(world: &World) -> usize {
    world.requests().iter().filter(|(_, _, why)| *why == "hedge").count()
}

/// Whether a mail cannot be read before the notification; it is, after it.
async fn waits(client: &Arc<Client>, n: usize, go: &Notify) -> bool {
    let reader = client.clone();
    let reading = tokio::spawn(async move { read(&reader, n).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let waited = !reading.is_finished();
    go.notify_waiters();
    tokio::time::timeout(Duration::from_secs(20), reading).await.unwrap().unwrap();
    waited
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_read_is_made_again_within_a_budget() {
    let world = World::new();
    let client = fresh(&world, 5).await;
    // What is usual is not known yet.
    let go = hang(&world);
    assert!(waits(&client, 0, &go).await);
    world.no_faults();
    for n in 1..70 {
        read(&client, n).await;
    }
    assert_eq!(second(&world), 0);
    // Seventy reads earned three more, and these earn a seventh of one.
    let go = hang(&world);
    for n in 70..73 {
        read(&client, n).await;
    }
    assert_eq!(second(&world), 3);
    assert!(waits(&client, 73, &go).await, "the budget is spent");
    assert_eq!(second(&world), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_request_that_fails_is_no_answer() {
    let world = World::new();
    let client = fresh(&world, 5).await;
    for n in 0..70 {
        read(&client, n).await;
    }
    let go = Arc::new(Notify::new());
    let wait = go.clone();
    world.faults(move |request| match (request.op, request.why.0) {
        (Op::Get, "fetch") => Fault::HangBefore(wait.clone()),
        (Op::Get, "hedge") => Fault::Before(down()),
        _ => Fault::None,
    });
    assert!(waits(&client, 70, &go).await);
    assert_eq!(second(&world), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_asked_twice_where_that_is_off() {
    let world = World::new();
    let client = fresh(&world, 0).await;
    for n in 0..70 {
        read(&client, n).await;
    }
    let go = hang(&world);
    assert!(waits(&client, 70, &go).await);
    assert_eq!(second(&world), 0);
}
