//! UID ceilings and the UIDVALIDITY counter (I2).

use super::world::*;
use vmailfs::dovecot::index_log::LogTracker;
use vmailfs::dovecot::transaction::{Intro, Transaction};
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;

fn list(next: u32) -> Vec<u8> {
    format!("3 V1234 N{next} Gabcdef0123456789abcdef0123456789\n").into_bytes()
}

fn next_uid(content: &[u8]) -> u32 {
    vmailfs::dovecot::uidlist::parse(content).unwrap().next_uid()
}

fn ceiling(world: &World) -> Option<u32> {
    world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max()
}

/// I2: next-UID never passes what the head allows; the write waits for the swap.
#[tokio::test]
async fn i2_a_write_waits_for_the_ceiling() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.replace("u/dovecot-uidlist", &list(10)).await.unwrap();
    client.flush("u").await;
    assert_eq!(ceiling(&world), Some(1010));
    client.replace("u/dovecot-uidlist", &list(900)).await.unwrap();
    assert_eq!(ceiling(&world), Some(1010));
    client.replace("u/dovecot-uidlist", &list(1500)).await.unwrap();
    assert!(ceiling(&world) >= Some(1500));
    // With the store down it is deferred, and the old list stays.
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put | Op::Get, true) => Fault::Before(down()),
        _ => Fault::None,
    });
    let before = world.clock_boot();
    assert_eq!(client.replace("u/dovecot-uidlist", &list(9000)).await, Err(libc::EAGAIN));
    assert!((world.clock_boot() - before).as_secs() >= 10, "it waits before it gives up");
    assert_eq!(next_uid(&client.read("u/dovecot-uidlist").await.unwrap()), 1500);
    world.no_faults();
    client.unlink("u/dovecot-uidlist.lock").await.unwrap();
    client.replace("u/dovecot-uidlist", &list(9000)).await.unwrap();
    assert!(ceiling(&world) >= Some(9000));
}

/// I2: appends count like new lists.
#[tokio::test]
async fn i2_an_append_waits_for_the_ceiling() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.replace("u/dovecot-uidlist", &list(10)).await.unwrap();
    client.flush("u").await;
    client.append("u/dovecot-uidlist", b"2000 :name\n").await.unwrap();
    assert!(ceiling(&world) >= Some(2001), "{:?}", ceiling(&world));
}

/// An index log with one mail, of a Maildir or of sdbox.
pub fn index_log(extension: &str) -> Vec<u8> {
    let mut log = vec![1, 3, 40, 0];
    for field in [77u32, 1, 0, 0, 77, 0, 0, 1, 0] {
        log.extend_from_slice(&field.to_le_bytes());
    }
    let mut first = Transaction::new();
    first.header_update(24, 1234);
    first.append(&[1]);
    let (reset_id, hdr_size, record_size, record_align) = (0, 36, 0, 1);
    let intro = Intro { name: extension, reset_id, hdr_size, record_size, record_align };
    first.ext_intro(&intro);
    first.ext_header_update(0, &[1; 36]);
    log.extend(first.finish());
    log
}

/// After a loss the index of a Maildir keeps its next-UID, or Dovecot takes mails that only the
/// uidlist has for expunged ones; the index of sdbox is raised to the ceiling.
#[tokio::test]
async fn i2_a_loss_burns_the_file_that_gives_uids() {
    for (extension, raised) in [("maildir", false), ("dbox-hdr", true)] {
        let world = World::new();
        let client = world.session(HERE);
        client.mkdir("u").await.unwrap();
        client.mkdir("u/box").await.unwrap();
        let new = "u/box/dovecot.index.log.newlock";
        client.put(new, &index_log(extension)).await.unwrap();
        client.rename(new, "u/box/dovecot.index.log").await.unwrap();
        let mut second = Transaction::new();
        second.append(&[2]);
        client.append("u/box/dovecot.index.log", &second.finish()).await.unwrap();
        client.flush_all("u").await;
        drop(client);
        let fresh = world.session(FRESH);
        let log = fresh.read("u/box/dovecot.index.log").await.unwrap();
        let next = LogTracker::of(&log, None).next_uid();
        assert_eq!(next, if raised { 1003 } else { 3 }, "{extension}");
    }
}

/// I2: after a loss next-UID is at the old ceiling, and the head's lies above; after a clean
/// hand-over and after the death of the process it stays.
#[tokio::test]
async fn i2_a_loss_burns_what_may_have_been_given() {
    let world = World::new();
    let mut client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.replace("u/dovecot-uidlist", &list(10)).await.unwrap();
    client.close().await;
    client = world.session(HERE);
    assert_eq!(next_uid(&client.read("u/dovecot-uidlist").await.unwrap()), 10);
    client.replace("u/dovecot-uidlist", &list(200)).await.unwrap();
    drop(client);
    client = world.session(HERE);
    assert_eq!(next_uid(&client.read("u/dovecot-uidlist").await.unwrap()), 200);
    let cur = client.stat("u/cur").await.unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    let next = next_uid(&fresh.read("u/dovecot-uidlist").await.unwrap());
    assert_eq!(next, 1010);
    assert!(ceiling(&world) > Some(1010));
    // Dovecot looks at the list again only if the directory of mails looks changed.
    assert!(fresh.stat("u/cur").await.unwrap().mtime > cur.mtime);
    // Said no more once the raised list is in the store.
    fresh.flush("u").await;
    assert!(world.head("u").folders.iter().all(|f| f.burnt_below.is_none()));
    fresh.close().await;
    let last = world.session(On { machine: "third", ..FRESH });
    assert_eq!(next_uid(&last.read("u/dovecot-uidlist").await.unwrap()), 1010);
}

/// I2: a folder that nobody opened after a loss keeps being burnt until somebody does.
#[tokio::test]
async fn i2_an_unopened_folder_stays_burnt() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B"]).await;
    client.replace("u/.B/dovecot-uidlist", &list(10)).await.unwrap();
    // Too large to be fetched along with others.
    client.put("u/.B/large", &noise(20_000)).await.unwrap();
    client.flush("u").await;
    drop(client);
    let fresh = world.session(FRESH);
    fresh.put("u/x", b"x").await.unwrap();
    fresh.flush("u").await;
    fresh.close().await;
    assert!(world.head("u").folders.iter().any(|f| f.burnt_below.is_some()));
    let last = world.session(On { machine: "third", ..FRESH });
    assert_eq!(next_uid(&last.read("u/.B/dovecot-uidlist").await.unwrap()), 1010);
}

/// I2: the counter of UIDVALIDITYs has its ceiling, too.
#[tokio::test]
async fn i2_the_uidvalidity_counter_is_burnt_likewise() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.put("u/dovecot-uidvalidity.65000000", b"").await.unwrap();
    client.flush("u").await;
    let ceiling = world.head("u").uidvalidity_ceiling.unwrap();
    assert!(ceiling > 0x6500_0000);
    client
        .rename("u/dovecot-uidvalidity.65000000", "u/dovecot-uidvalidity.65000001")
        .await
        .unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    let names = fresh.list("u").await.unwrap();
    let counter = names.iter().find_map(|n| n.strip_prefix("dovecot-uidvalidity.")).unwrap();
    assert!(u32::from_str_radix(counter, 16).unwrap() >= ceiling);
    assert!(world.head("u").uidvalidity_ceiling.unwrap() > ceiling);
}

/// I2: files that are written under their own names, cut off or written over are followed, too.
#[tokio::test]
async fn i2_whatever_way_a_list_is_written_its_ceiling_holds() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.put("u/dovecot-uidlist", &list(10)).await.unwrap();
    client.flush("u").await;
    assert_eq!(ceiling(&world), Some(1010));
    client.append("u/dovecot-uidlist", b"1700 :a\n170").await.unwrap();
    assert!(ceiling(&world) >= Some(1701), "{:?}", ceiling(&world));
    let file = client.open("u/dovecot-uidlist", WRITE).await.unwrap();
    let whole = list(10).len() as u64 + 8;
    client.truncate(file, whole).await.unwrap();
    client.write(file, whole, b"4000 :b\n").await.unwrap();
    assert!(ceiling(&world) >= Some(4001), "{:?}", ceiling(&world));
    client.write(file, 0, &list(7000)).await.unwrap();
    assert!(ceiling(&world) >= Some(7000), "{:?}", ceiling(&world));
    client.close_file(file).await.unwrap();
}
