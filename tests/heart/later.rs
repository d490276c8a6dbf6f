//! Index files that are removed from the metacache while their user is in use (I7, I2): what was
//! flushed, or is open, comes back as it was; where the index must go back to the last flush it
//! says what came and went since before anybody is answered.

use super::full_disk::FullDisk;
use super::sdbox::{MAILS, add, commit, deliver, folders, index, numbers, save};
use super::world::*;
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use vmailfs::cache::disk::RealDisk;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;

const PLACE: &str = "u/index/mailboxes/INBOX";
const LOG: &str = "u/index/mailboxes/INBOX/dovecot.index.log";

fn on_disk(world: &World, path: &str) -> PathBuf {
    world.machine_dir(HERE).join("meta").join(path)
}

fn ceiling(world: &World) -> u32 {
    world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max().unwrap()
}

async fn came(client: &Client, uid: u32) {
    deliver(client, uid).await;
    add(client, PLACE, |t| t.append(&[uid])).await;
}

/// Mails 1 and 2 are flushed; 3 came and 1 went since.
async fn changed(client: &Client) {
    folders(client, PLACE).await;
    came(client, 1).await;
    came(client, 2).await;
    client.flush("u").await;
    came(client, 3).await;
    add(client, PLACE, |t| t.expunge(&[1])).await;
    client.unlink(&format!("{MAILS}/u.1")).await.unwrap();
}

async fn shown(client: &Client) -> Vec<u32> {
    index(client, PLACE).await.records.keys().copied().collect()
}

/// What an index that had to go back shows: mail 2, and mail 3 under a number that nobody had.
async fn must_show(client: &Client, ceiling: u32, when: &str) -> Vec<u32> {
    let uids = shown(client).await;
    assert_eq!(numbers(client).await, uids, "{when}");
    assert!(uids.len() == 2 && uids[0] == 2 && uids[1] >= ceiling, "{when}: {uids:?}, {ceiling}");
    let mail = client.read(&format!("{MAILS}/u.{}", uids[1])).await.unwrap();
    assert_eq!(mail, b"mail 3", "{when}");
    uids
}

#[tokio::test]
async fn i2_an_index_that_goes_back_says_what_came_and_went() {
    for way in ["open", "died", "all", "flush"] {
        let world = World::new();
        let mut client = world.session(HERE);
        changed(&client).await;
        let before = ceiling(&world);
        if way == "died" {
            drop(std::mem::replace(&mut client, world.session(HERE)));
        }
        match way {
            "all" => fs::remove_dir_all(on_disk(&world, "u")).unwrap(),
            _ => fs::remove_file(on_disk(&world, LOG)).unwrap(),
        }
        if way == "flush" {
            client.flush("u").await;
        }
        let uids = must_show(&client, before, way).await;
        // What was shown is shown after the loss of the machine, or its number is burnt.
        let after = ceiling(&world);
        assert!(after > uids[1], "{way}: {after}, {uids:?}");
        client.flush("u").await;
        drop(client);
        let fresh = world.session(FRESH);
        assert_eq!(shown(&fresh).await, uids, "{way}");
        assert_eq!(numbers(&fresh).await, uids, "{way}");
    }
}

/// Nobody is answered between the index that came back and its records for later mails, also if the
/// record cannot be written at first, and whoever comes next.
#[tokio::test]
async fn i2_nobody_sees_an_index_that_has_not_heard_of_later_mails() {
    for dies in [false, true] {
        let mut failures = 0;
        for after in 0..4 {
            for next in ["numbers", "list", "save", "flush"] {
                let world = World::new();
                let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
                let mut client = world.session_with(world.settings(HERE), disk.clone());
                changed(&client).await;
                let before = ceiling(&world);
                if dies {
                    let session = world.session_with(world.settings(HERE), disk.clone());
                    drop(std::mem::replace(&mut client, session));
                }
                fs::remove_file(on_disk(&world, LOG)).unwrap();
                disk.fail_replace("dovecot.index.log", after);
                let first = client.read(LOG).await;
                assert_eq!(first.is_err(), disk.has_failed(), "{dies} {after}");
                failures += usize::from(first.is_err());
                let when = format!("{dies} {after} {next}");
                match next {
                    "numbers" => assert!(!numbers(&client).await.contains(&3), "{when}"),
                    "list" => assert!(client.list(PLACE).await.unwrap().len() == 1, "{when}"),
                    "save" => {
                        let file = save(&client, 9).await;
                        let uid = index(&client, PLACE).await.next_uid;
                        assert!(uid > before, "{when}");
                        assert!(!numbers(&client).await.contains(&uid), "{when}");
                        commit(&client, 9, file).await;
                        client.unlink(&format!("{MAILS}/u.9")).await.unwrap();
                    }
                    _ => _ = client.flush("u").await,
                }
                must_show(&client, before, &when).await;
            }
        }
        assert!(failures >= 2 * 4, "{dies}: {failures}");
    }
}

/// A death between any two changes of the disk: the next session finishes it.
#[tokio::test]
async fn i2_a_restoration_that_died_anywhere_is_finished() {
    let mut deaths = 0;
    for round in 0.. {
        let world = World::new();
        let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
        let client = world.session_with(world.settings(HERE), disk.clone());
        changed(&client).await;
        let before = ceiling(&world);
        fs::remove_file(on_disk(&world, LOG)).unwrap();
        disk.dies_after(round);
        let read = client.read(LOG).await;
        let died = disk.is_dead();
        drop(client);
        if !died {
            read.unwrap();
            break;
        }
        deaths += 1;
        let again = world.session(HERE);
        let uids = must_show(&again, before, &format!("round {round}")).await;
        again.close().await;
        let fresh = world.session(FRESH);
        assert_eq!(shown(&fresh).await, uids, "round {round}");
    }
    assert!(deaths >= 4, "{deaths}");
}

/// I7: of a flushed user nothing changes, not even a number that may be given.
#[tokio::test]
async fn i7_what_is_flushed_comes_back_as_it_was() {
    for (dies, closed) in [(false, false), (true, false), (false, true)] {
        for all in [false, true] {
            let world = World::new();
            let mut client = world.session(HERE);
            changed(&client).await;
            client.put("u/sieve.script", b"keep;").await.unwrap();
            client.flush("u").await;
            let (log, next) =
                (client.read(LOG).await.unwrap(), index(&client, PLACE).await.next_uid);
            if closed {
                client.close().await;
                client = world.session(HERE);
            } else if dies {
                drop(std::mem::replace(&mut client, world.session(HERE)));
            }
            match all {
                true => fs::remove_dir_all(on_disk(&world, "u")).unwrap(),
                false => fs::remove_file(on_disk(&world, LOG)).unwrap(),
            }
            assert_eq!(client.read(LOG).await.unwrap(), log, "{dies} {closed} {all}");
            assert_eq!(numbers(&client).await, [2, 3]);
            assert_eq!(client.read("u/sieve.script").await.unwrap(), b"keep;");
            came(&client, next).await;
            assert_eq!(shown(&client).await, [2, 3, next]);
        }
    }
}

/// I7: one that counts as flushed because a flush of it is under way is not in the parts yet.
#[tokio::test]
async fn i7_what_is_being_flushed_is_not_taken_for_flushed() {
    for fails in [false, true] {
        let world = World::new();
        let client = world.session(HERE);
        changed(&client).await;
        let before = ceiling(&world);
        let meta = on_disk(&world, LOG);
        world.faults(move |r| {
            if matches!(r.op, Op::Put) && r.key.contains("/bundle/") {
                let _ = fs::remove_file(&meta);
                if fails {
                    return Fault::Before(down());
                }
            }
            Fault::None
        });
        let log = client.read(LOG).await.unwrap();
        let cell = client.cell("u");
        let options = vmailfs::vmail::flush::Options::default();
        let flushed = vmailfs::vmail::flush::flush(&cell, options).await;
        assert_eq!(flushed.is_err(), fails);
        world.no_faults();
        match fails {
            true => _ = must_show(&client, before, "failed").await,
            false => assert_eq!(client.read(LOG).await.unwrap(), log),
        }
    }
}

/// I7: what is open is there without its name, with all that was written.
#[tokio::test]
async fn i7_what_is_open_is_not_lost() {
    for closes in [false, true] {
        let world = World::new();
        let client = world.session(HERE);
        changed(&client).await;
        let log = client.read(LOG).await.unwrap();
        let (open, lock) =
            (client.open(LOG, WRITE).await.unwrap(), format!("{PLACE}/dovecot.index.tmp"));
        let young = client.create(&lock).await.unwrap();
        client.write(young, 0, b"young").await.unwrap();
        fs::remove_dir_all(on_disk(&world, "u")).unwrap();
        if closes {
            client.close_file(open).await.unwrap();
        }
        assert_eq!(client.read(LOG).await.unwrap(), log);
        client.close_file(young).await.unwrap();
        client.rename(&lock, &format!("{PLACE}/dovecot.index.backup")).await.unwrap();
        assert_eq!(client.read(&format!("{PLACE}/dovecot.index.backup")).await.unwrap(), b"young");
        came(&client, 4).await;
        if !closes {
            let size = client.stat(LOG).await.unwrap().size;
            assert_eq!(client.read_open(open).await.unwrap().len() as u64, size);
            client.close_file(open).await.unwrap();
        }
        assert_eq!(shown(&client).await, [2, 3, 4]);
        client.close().await;
        let fresh = world.session(FRESH);
        assert_eq!(shown(&fresh).await, [2, 3, 4]);
    }
}

/// I1: our process died while a mail server was saving: the mail has its number and no record. The next
/// one's number is free, and the mail shows.
#[tokio::test]
async fn i1_a_mail_without_a_record_shows_after_our_death() {
    let world = World::new();
    let client = world.session(HERE);
    changed(&client).await;
    deliver(&client, 4).await;
    drop(client);
    let again = world.session(HERE);
    let there: BTreeSet<u32> = numbers(&again).await.into_iter().collect();
    let state = index(&again, PLACE).await;
    assert_eq!(there, state.records.keys().copied().collect());
    assert_eq!(there.len(), 3);
    assert!(there.last().unwrap() < &state.next_uid && there.contains(&3));
    // An expunge that was not finished stays one.
    add(&again, PLACE, |t| t.expunge(&[3])).await;
    drop(again);
    let third = world.session(HERE);
    assert_eq!(shown(&third).await.len(), 2);
    assert!(numbers(&third).await.contains(&3));
}
