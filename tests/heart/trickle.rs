//! What a trickle of mail costs: a mail an hour to each of some users for a day of virtual time, with
//! the settings that a site has that set none. `TRICKLE_USERS` says how many (the figure in
//! docs/BENCHMARKS.md is of 1,000).

use super::idle::obedient;
use super::uids::index_log;
use super::world::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use vmailfs::cache::disk::RealDisk;
use vmailfs::config::Config;
use vmailfs::dovecot::transaction::Transaction;
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::idle;
use vmailfs::vmail::schedule::{Due, due};

/// Between two signs of life of the backend, all users together.
const RENEWAL: u64 = 60;
const DAY: u64 = 24 * 60;

fn spread(user: u64, hour: u64) -> u64 {
    let mixed = (user * 1_000_003 + hour * 7919 + 12345).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed >> 33
}

/// As Dovecot delivers: the mail, its line in the list, its record in the log, its headers in the cache.
async fn deliver(client: &Client, user: &str, uid: u32) {
    let name = format!("{}.M1P1.host", 1_700_000_000 + uid);
    client.deliver(user, &name, &noise(4000)).await.unwrap();
    let list = format!("{user}/dovecot-uidlist");
    if uid == 1 {
        let first = format!("3 V1234 N1 Gabcdef0123456789abcdef0123456789\n1 :{name}\n");
        client.replace(&list, first.as_bytes()).await.unwrap();
        let new = format!("{user}/dovecot.index.log.newlock");
        client.put(&new, &index_log("maildir")).await.unwrap();
        client.rename(&new, &format!("{user}/dovecot.index.log")).await.unwrap();
        client.put(&format!("{user}/dovecot.index.cache"), &noise(500)).await.unwrap();
        return;
    }
    client.append(&list, format!("{uid} :{name}\n").as_bytes()).await.unwrap();
    let mut record = Transaction::new();
    record.append(&[uid]);
    client.append(&format!("{user}/dovecot.index.log"), &record.finish()).await.unwrap();
    client.append(&format!("{user}/dovecot.index.cache"), &noise(300)).await.unwrap();
}

#[tokio::test]
async fn a_mail_an_hour_costs_little_more_than_its_put() {
    let users: u64 = std::env::var("TRICKLE_USERS").map_or(12, |n| n.parse().unwrap());
    let world = World::new();
    let mut settings = world.settings(HERE);
    let usual = Config::default().metacache;
    settings.upload_interval = usual.upload_interval.0;
    settings.max_rescan_mail_count = usual.max_rescan_mail_count;
    settings.idle_upload = usual.idle_upload.0;
    settings.metacache.close_idle = usual.close_idle.0;
    settings.metacache.max_open_users = usual.max_open_users as usize;
    let client = world.session_with(settings, Arc::new(RealDisk));
    obedient(&client.fs);
    let names: Vec<String> = (0..users).map(|n| format!("user{n}")).collect();
    for name in &names {
        client.maildir(&[name]).await;
        deliver(&client, name, 1).await;
    }
    world.clock.advance(Duration::from_secs(60));
    look(&client).await;
    world.requests();
    let mut mails = 0;
    let mut requests: BTreeMap<String, u64> = BTreeMap::new();
    for minute in 0..DAY {
        for (n, name) in (0..).zip(&names) {
            let hour = minute / 60;
            if (spread(n, hour)) % 60 == minute % 60 {
                mails += 1;
                deliver(&client, name, 2 + hour as u32).await;
            }
        }
        world.clock.advance(Duration::from_secs(60));
        look(&client).await;
        for (op, _, why) in world.requests() {
            *requests.entry(format!("{} {why}", op.name())).or_default() += 1;
        }
    }
    client.close().await;
    for (op, _, why) in world.requests() {
        *requests.entry(format!("{} {why}", op.name())).or_default() += 1;
    }
    assert_eq!(mails, users * 24);
    // All users share these; with few of them they would be the most there is.
    let renewals = DAY * 60 / RENEWAL;
    let per_mail = requests.values().sum::<u64>() as f64 / mails as f64;
    let with_lease = per_mail + renewals as f64 / 24_000.0;
    println!("{with_lease:.3} requests a mail, the lease's {renewals} among 24,000; {requests:?}");
    assert!(with_lease <= 1.5, "{with_lease} requests a mail: {requests:?}");
}

/// What a mount does behind the scenes: flushes that are due, and users that nobody uses.
async fn look(client: &Client) {
    let now = client.session().env.clock.boot();
    for cell in client.session().open_users() {
        match cell.if_open(|user| due(user, now)).unwrap_or(Due::Nothing) {
            Due::Nothing => {}
            Due::Ceiling => flush::raise_ceilings(&cell, None, None).await.unwrap(),
            Due::Flush { caches } => {
                flush::flush(&cell, Options { caches, ..Options::default() }).await.unwrap();
                cell.if_open(|user| {
                    if caches {
                        user.idle_flush = Some(user.boot());
                        user.changes.unimportant = None;
                    }
                });
            }
        }
    }
    idle::look(client.session()).await;
}
