//! sdbox after a loss and after a power cut (I1, I2): every mail that was made safe is there, and
//! shows without a person's help.

use super::full_disk::FullDisk;
use super::world::*;
use std::fs;
use std::sync::Arc;
use vmailfs::cache::disk::RealDisk;
use vmailfs::dovecot::records::header;
use vmailfs::dovecot::replay::{IndexState, replay};
use vmailfs::dovecot::transaction::Transaction;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;

pub(super) const MAILS: &str = "u/mail/mailboxes/INBOX/dbox-Mails";

pub(super) async fn folders(client: &Client, index: &str) {
    directories(client, index).await;
    // As Dovecot makes it: first its header, then the first records.
    let mut log = vec![1, 3, 40, 0];
    for n in [77u32, 1, 0, 0, 77, 0, 0, 1, 0] {
        log.extend_from_slice(&n.to_le_bytes());
    }
    client.put(&format!("{index}/dovecot.index.log"), &log).await.unwrap();
    add(client, index, |t| t.header_update(header::UID_VALIDITY, 1234)).await;
}

async fn directories(client: &Client, index: &str) {
    let mut done = String::new();
    for dir in ["u", "u/mail", "u/mail/mailboxes", "u/mail/mailboxes/INBOX", MAILS] {
        let made = client.mkdir(dir).await;
        assert!(matches!(made, Ok(()) | Err(libc::EEXIST)), "{made:?}");
    }
    for name in index.split('/') {
        done = if done.is_empty() { name.into() } else { format!("{done}/{name}") };
        let _ = client.mkdir(&done).await;
    }
}

pub(super) async fn add(client: &Client, index: &str, records: impl FnOnce(&mut Transaction)) {
    let mut transaction = Transaction::new();
    records(&mut transaction);
    client.append(&format!("{index}/dovecot.index.log"), &transaction.finish()).await.unwrap();
}

pub(super) async fn deliver(client: &Client, uid: u32) {
    let file = save(client, uid).await;
    commit(client, uid, file).await;
}

/// Made safe under its temporary name.
pub(super) async fn save(client: &Client, uid: u32) -> Open {
    let file = client.create(&format!("{MAILS}/.temp.{uid}")).await.unwrap();
    client.write(file, 0, format!("mail {uid}").as_bytes()).await.unwrap();
    client.fsync(file).await.unwrap();
    file
}

pub(super) async fn commit(client: &Client, uid: u32, file: Open) {
    client.rename(&format!("{MAILS}/.temp.{uid}"), &format!("{MAILS}/u.{uid}")).await.unwrap();
    client.close_file(file).await.unwrap();
}

pub(super) async fn index(client: &Client, dir: &str) -> IndexState {
    replay(None, &[&client.read(&format!("{dir}/dovecot.index.log")).await.unwrap()]).unwrap()
}

/// The numbers of the mail files.
pub(super) async fn numbers(client: &Client) -> Vec<u32> {
    let names = client.list(MAILS).await.unwrap();
    let mut all: Vec<u32> =
        names.iter().filter_map(|n| n.strip_prefix("u.")?.parse().ok()).collect();
    all.sort_unstable();
    all
}

/// I1, I2: a power cut that leaves a mail's number in the journal, and of Dovecot's log only what
/// the last flush holds: the mail gets another number, above all that were given, and shows.
#[tokio::test]
async fn i1_a_power_cut_that_takes_the_record_leaves_the_mail_shown() {
    let world = World::new();
    let client = world.session(HERE);
    let place = "u/index/mailboxes/INBOX";
    folders(&client, place).await;
    deliver(&client, 1).await;
    add(&client, place, |t| t.append(&[1])).await;
    client.flush("u").await;
    let ceiling = world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max().unwrap();
    deliver(&client, 2).await;
    add(&client, place, |t| t.append(&[2])).await;
    drop(client);
    let log = world.machine_dir(HERE).join("meta").join(place).join("dovecot.index.log");
    fs::write(log, b"torn").unwrap();
    let again = world.session(REBOOTED);
    let there = numbers(&again).await;
    assert_eq!(there.len(), 2);
    assert_eq!(there[0], 1);
    assert!(there[1] >= ceiling, "{there:?}");
    let shown: Vec<u32> = index(&again, place).await.records.keys().copied().collect();
    assert_eq!(shown, there);
}

/// I1: the last flush was cut while one mail was written and another had its number and no record
/// yet. Both show, whichever is put back first.
#[tokio::test]
async fn i1_a_mail_without_a_record_shows_beside_one_without_a_number() {
    let world = World::new();
    let client = world.session(HERE);
    let place = "u/index/mailboxes/INBOX";
    folders(&client, place).await;
    deliver(&client, 1).await;
    add(&client, place, |t| t.append(&[1])).await;
    client.flush("u").await;
    let file = client.create(&format!("{MAILS}/.temp.3")).await.unwrap();
    client.write(file, 0, b"mail 3").await.unwrap();
    client.fsync(file).await.unwrap();
    deliver(&client, 2).await;
    client.flush("u").await;
    drop(client);
    let again = world.session(FRESH);
    let there = numbers(&again).await;
    let shown: Vec<u32> = index(&again, place).await.records.keys().copied().collect();
    assert_eq!(shown, there);
    let mut texts = Vec::new();
    for uid in &there {
        texts.push(again.read(&format!("{MAILS}/u.{uid}")).await.unwrap());
    }
    texts.sort();
    assert_eq!(texts, [b"mail 1", b"mail 2", b"mail 3"]);
}

/// I1: a mail that was made safe in a folder whose index was in no flush comes back, and the folder
/// gets an index where its server would have it, by which it looks for the mail. Also when that index
/// could not be written at once.
#[tokio::test]
async fn i1_mails_without_an_index_are_looked_for() {
    for place in ["u/index/mailboxes/INBOX", MAILS] {
        for fails in [false, true] {
            let world = World::new();
            let client = world.session(HERE);
            directories(&client, place).await;
            deliver(&client, 1).await;
            drop(client);
            let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
            if fails {
                disk.fail_replace("dovecot.index.log", 0);
            }
            let again = world.session_with(world.settings(FRESH), disk.clone());
            if fails {
                again.list(MAILS).await.unwrap_err();
                assert!(disk.has_failed());
            }
            assert_eq!(numbers(&again).await, [1]);
            let state = index(&again, place).await;
            assert_eq!(state.flags & header::FLAG_FSCKD, header::FLAG_FSCKD, "{place}");
            assert_eq!(state.uid_validity, 0, "the server gives one that no folder had");
            if place != MAILS {
                let names = again.list(MAILS).await.unwrap();
                assert!(!names.contains(&"dovecot.index.log".to_owned()), "{names:?}");
            }
        }
    }
}

/// I1: a recovery that ended between a mail's number and its record is begun again, by the same
/// session or by the next, and then each mail is there once, and shows.
#[tokio::test]
async fn i1_a_recovery_that_is_begun_again_shows_its_mails() {
    let mut failures = 0;
    for (after, same) in (0..4).flat_map(|after| [(after, true), (after, false)]) {
        let world = World::new();
        let client = world.session(HERE);
        let place = "u/index/mailboxes/INBOX";
        folders(&client, place).await;
        deliver(&client, 1).await;
        add(&client, place, |t| t.append(&[1])).await;
        client.flush("u").await;
        let ceiling = world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max().unwrap();
        for uid in [2, 3] {
            deliver(&client, uid).await;
            add(&client, place, |t| t.append(&[uid])).await;
        }
        drop(client);
        let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
        disk.fail_replace("dovecot.index.log", after);
        let mut again = world.session_with(world.settings(FRESH), disk.clone());
        let first = again.list(MAILS).await;
        assert_eq!(first.is_err(), disk.has_failed());
        failures += usize::from(first.is_err());
        if !same {
            drop(again);
            again = world.session(FRESH);
        }
        let there = numbers(&again).await;
        assert_eq!((there.len(), there[0]), (3, 1), "{there:?}");
        assert!(there[1] >= ceiling, "{there:?}");
        let shown: Vec<u32> = index(&again, place).await.records.keys().copied().collect();
        assert_eq!(shown, there);
        let mut texts = Vec::new();
        for uid in &there {
            let text = again.read(&format!("{MAILS}/u.{uid}")).await.unwrap();
            texts.push(String::from_utf8(text).unwrap());
        }
        texts.sort();
        assert_eq!(texts, ["mail 1", "mail 2", "mail 3"]);
    }
    // The log as it was flushed, its next-UID, and the records.
    assert_eq!(failures, 2 * 3);
}

/// I3: the machine of a recovery dies at any change of its disk, and what was not synced of the journal
/// is gone: the index never shows a mail whose new name is gone with it.
#[tokio::test]
async fn i3_a_power_cut_in_a_recovery_leaves_no_record_without_its_mail() {
    let place = "u/index/mailboxes/INBOX";
    for changes in 0.. {
        let world = World::new();
        let client = world.session(HERE);
        folders(&client, place).await;
        deliver(&client, 1).await;
        add(&client, place, |t| t.append(&[1])).await;
        client.flush("u").await;
        for uid in [2, 3] {
            deliver(&client, uid).await;
            add(&client, place, |t| t.append(&[uid])).await;
        }
        drop(client);
        let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
        let again = world.session_with(world.settings(FRESH), disk.clone());
        disk.dies_after(changes);
        let opened = again.list(MAILS).await;
        if !disk.is_dead() {
            opened.unwrap();
            assert!(changes > 10);
            return;
        }
        let journal = again.session().state_dir_of("u").join("journal");
        drop(again);
        if journal.exists() {
            fs::write(&journal, disk.on_disk(&journal).unwrap_or_default()).unwrap();
        }
        let last = world.session(On { boot: "boot-10", ..FRESH });
        let there = numbers(&last).await;
        assert_eq!((there.len(), there[0]), (3, 1), "{changes}: {there:?}");
        let shown: Vec<u32> = index(&last, place).await.records.keys().copied().collect();
        assert_eq!(shown, there, "{changes}");
    }
}

/// I7: the user's directory in the metacache is removed while it is in use. The index is that of the last
/// flush again; the mail that came after it shows all the same, under a number that was never given.
#[tokio::test]
async fn i7_a_removed_index_leaves_later_mails_shown() {
    let world = World::new();
    let client = world.session(HERE);
    let place = "u/index/mailboxes/INBOX";
    folders(&client, place).await;
    deliver(&client, 1).await;
    add(&client, place, |t| t.append(&[1])).await;
    client.flush("u").await;
    let ceiling = world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max().unwrap();
    deliver(&client, 2).await;
    add(&client, place, |t| t.append(&[2])).await;
    fs::remove_dir_all(world.machine_dir(HERE).join("meta/u")).unwrap();
    let shown = index(&client, place).await;
    let uids: Vec<u32> = shown.records.keys().copied().collect();
    assert_eq!(uids.len(), 2, "{uids:?}");
    assert!(uids[0] == 1 && uids[1] >= ceiling, "{uids:?}, {ceiling}");
    assert_eq!(numbers(&client).await, uids);
    let mail = client.read(&format!("{MAILS}/u.{}", uids[1])).await.unwrap();
    assert_eq!(mail, b"mail 2");
    // And goes on so.
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(numbers(&fresh).await, uids);
    assert_eq!(index(&fresh, place).await.records.len(), 2);
}

/// I4: a mail with a late number, copied into a mailbox that no head knows, whose server died before
/// it could say so. A flush shows it first, and must not wait for a ceiling that comes with a flush.
#[tokio::test]
async fn i4_a_late_number_in_a_new_folder_shows_after_a_death() {
    let world = World::new();
    let client = world.session(HERE);
    folders(&client, "u/index/mailboxes/INBOX").await;
    deliver(&client, 1).await;
    client.flush("u").await;
    let known = world.head("u").folders.len();
    world.faults(|r| match r.op {
        Op::Put if r.key.contains("/bundle/") => Fault::Before(down()),
        _ => Fault::None,
    });
    let (place, mails) = ("u/index/mailboxes/New", "u/mail/mailboxes/New/dbox-Mails");
    client.mkdir("u/mail/mailboxes/New").await.unwrap();
    client.mkdir(mails).await.unwrap();
    folders(&client, place).await;
    client.link(&format!("{MAILS}/u.1"), &format!("{mails}/u.1200")).await.unwrap();
    drop(client);
    assert_eq!(world.head("u").folders.len(), known, "no head knows the mailbox");
    world.no_faults();
    let again = world.session(HERE);
    assert_eq!(index(&again, place).await.records.len(), 1);
    assert_eq!(again.list(mails).await.unwrap().len(), 1);
    again.flush("u").await;
}
