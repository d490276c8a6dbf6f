//! I3: an index that its server is just making anew is no state to flush.

use super::sdbox::{add, deliver, folders};
use super::world::*;
use std::time::Duration;
use vmailfs::dovecot::records::header;
use vmailfs::dovecot::replay::replay;
use vmailfs::dovecot::transaction::Transaction;
use vmailfs::vmail::flush::{self, Options};

const PLACE: &str = "u/index/mailboxes/INBOX";
const UIDVALIDITY: u32 = 1234;

fn log(seq: u32, prev: u32) -> Vec<u8> {
    let mut log = vec![1, 3, 40, 0];
    for n in [77u32, seq, prev, 0, 77, 0, 0, 1, 0] {
        log.extend_from_slice(&n.to_le_bytes());
    }
    log
}

/// A mailbox with one mail, flushed; then an empty log was put in place of its log.
async fn begun(world: &World) -> Client {
    let client = world.session(HERE);
    folders(&client, PLACE).await;
    deliver(&client, 1).await;
    add(&client, PLACE, |t| t.append(&[1])).await;
    client.flush("u").await;
    let old = client.read(&format!("{PLACE}/dovecot.index.log")).await.unwrap();
    client.put(&format!("{PLACE}/dovecot.index.log.2"), &old).await.unwrap();
    put_over(&client, "dovecot.index.log", "newlock", &log(2, 0)).await;
    client
}

async fn put_over(client: &Client, name: &str, end: &str, bytes: &[u8]) {
    let new = format!("{PLACE}/{name}.{end}");
    client.put(&new, bytes).await.unwrap();
    client.rename(&new, &format!("{PLACE}/{name}")).await.unwrap();
}

/// All that the mailbox has, as a rebuild writes it.
fn rebuilt(t: &mut Transaction) {
    t.header_update(header::UID_VALIDITY, UIDVALIDITY);
    t.append(&[1]);
}

/// What another machine has of the mailbox: UIDVALIDITY and mails.
async fn after_the_loss(world: &World) -> (u32, Vec<u32>) {
    let other = world.session(FRESH);
    let name = |end: &str| format!("{PLACE}/dovecot.index{end}");
    let log = other.read(&name(".log")).await.unwrap();
    let state = replay(other.read(&name("")).await.ok().as_deref(), &[&log]).unwrap();
    (state.uid_validity, state.records.keys().copied().collect())
}

/// Ends once a flush has seen the mailbox and waits.
async fn flush_waits(world: &World) {
    let before = world.clock_boot();
    let real = std::time::Instant::now();
    while world.clock_boot() - before < Duration::from_millis(10) {
        assert!(real.elapsed() < Duration::from_secs(60), "the flush does not wait");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn i3_a_rebuild_is_flushed_whole() {
    let world = World::new();
    let client = begun(&world).await;
    let cell = client.cell("u");
    let flushing = tokio::spawn(async move { flush::flush(&cell, Options::default()).await });
    flush_waits(&world).await;
    add(&client, PLACE, rebuilt).await;
    assert!(flushing.await.unwrap().unwrap().flushed);
    drop(client);
    assert_eq!(after_the_loss(&world).await, (UIDVALIDITY, vec![1]));
}

/// An empty log with a snapshot that belongs to it is a whole state, and not waited for.
#[tokio::test]
async fn i3_an_empty_log_with_its_snapshot_is_flushed_at_once() {
    let world = World::new();
    let client = begun(&world).await;
    // Header of 120 bytes and one record of 8.
    let mut index = vec![0; 128];
    index[..3].copy_from_slice(&[7, 0, 120]);
    let fields = [(4, 120), (8, 8), (12, 1), (16, 77), (24, UIDVALIDITY), (28, 2), (32, 1)];
    for (at, n) in fields.into_iter().chain([(60, 2), (64, 40), (68, 40), (120, 1)]) {
        index[at..at + 4].copy_from_slice(&n.to_le_bytes());
    }
    put_over(&client, "dovecot.index", "tmp", &index).await;
    let before = world.clock_boot();
    assert!(client.flush("u").await.flushed);
    assert!(world.clock_boot() - before < Duration::from_millis(10));
    drop(client);
    assert_eq!(after_the_loss(&world).await, (UIDVALIDITY, vec![1]));
}

/// A server that died there leaves it so; nothing else of the user waits for ever.
#[tokio::test]
async fn i3_an_index_that_stays_unfinished_holds_up_no_flush() {
    let world = World::new();
    let client = begun(&world).await;
    deliver(&client, 2).await;
    assert!(client.flush("u").await.flushed);
    let head = world.head("u");
    assert!(!client.flush("u").await.flushed, "everything is in the store");
    assert_eq!(world.head("u").write_id, head.write_id);
}
