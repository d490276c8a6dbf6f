//! A recovery of dbox that is begun again: the machine dies after each single change of its disk.

use super::full_disk::FullDisk;
use super::sdbox::{self, MAILS};
use super::world::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use vmailfs::cache::disk::RealDisk;
use vmailfs::dovecot::records::header;
use vmailfs::dovecot::replay::{IndexState, replay};
use vmailfs::dovecot::transaction::{Intro, Transaction};

/// Recoveries that died before they ended, one after the other.
const DEATHS: usize = 2;

/// Opens the user on a fresh machine that dies again and again, at other moments in each round,
/// until a recovery gets to its end. False: none of them died.
async fn recovered(world: &World, user: &str, round: i64) -> Option<Client> {
    let mut died = false;
    for death in 0..DEATHS as i64 {
        let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
        let client = world.session_with(world.settings(FRESH), disk.clone());
        // The first dies later and later, the others everywhere.
        disk.dies_after(if death == 0 { round } else { (round * 7 + 3) % 23 });
        let opened = client.list(user).await;
        if death == 0 && !disk.is_dead() {
            opened.unwrap();
            return None;
        }
        died |= disk.is_dead();
    }
    assert!(died);
    Some(world.session(FRESH))
}

/// I1, I2: sdbox. Between a mail's new number in the journal and its record in Dovecot's log, and
/// anywhere else: each mail is there once, under a number that was never given, and shows.
#[tokio::test]
async fn i1_i2_a_recovery_of_sdbox_that_died_anywhere_is_finished() {
    let place = "u/index/mailboxes/INBOX";
    let mut rounds = 0;
    loop {
        let world = World::new();
        let client = world.session(HERE);
        sdbox::folders(&client, place).await;
        sdbox::deliver(&client, 1).await;
        sdbox::add(&client, place, |t| t.append(&[1])).await;
        // One that has its number when the flush is cut, and no record yet.
        sdbox::deliver(&client, 2).await;
        // And one that has a temporary name only.
        let file = sdbox::save(&client, 5).await;
        client.flush("u").await;
        let ceiling = world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max().unwrap();
        sdbox::add(&client, place, |t| t.append(&[2])).await;
        sdbox::commit(&client, 5, file).await;
        for uid in [3, 4] {
            sdbox::deliver(&client, uid).await;
            sdbox::add(&client, place, |t| t.append(&[uid])).await;
        }
        drop(client);
        let Some(client) = recovered(&world, "u", rounds).await else { break };
        rounds += 1;
        let look = |client: Client| async move {
            let there = sdbox::numbers(&client).await;
            let shown: Vec<u32> =
                sdbox::index(&client, place).await.records.keys().copied().collect();
            assert_eq!(shown, there, "what shows and what is there");
            assert!(
                there[0] == 1 && there[1..].iter().all(|n| *n >= ceiling),
                "{there:?} {ceiling}"
            );
            let mut bodies = Vec::new();
            for n in &there {
                bodies.push(client.read(&format!("{MAILS}/u.{n}")).await.unwrap());
            }
            bodies.sort();
            assert_eq!(
                bodies,
                [b"mail 1", b"mail 2", b"mail 3", b"mail 4", b"mail 5"],
                "{there:?}"
            );
            there
        };
        let there = look(client.clone()).await;
        client.flush("u").await;
        drop(client);
        let last = world.session(On { machine: "third", ..FRESH });
        assert_eq!(look(last).await, there);
    }
    assert!(rounds > 15, "a recovery changes the disk more often than {rounds} times");
}

fn log(records: impl FnOnce(&mut Transaction)) -> Vec<u8> {
    let mut out = vec![1, 3, 40, 0];
    for n in [77u32, 1, 0, 0, 77, 0, 0, 1, 0] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    let mut transaction = Transaction::new();
    transaction.header_update(header::UID_VALIDITY, 1234);
    records(&mut transaction);
    out.extend(transaction.finish());
    out
}

fn mdbox_mail(n: u8) -> Vec<u8> {
    let body = format!("mail {n}\n");
    let guid = format!("{n:02x}").repeat(16);
    let head = format!("\x01\x02N          {:016x}\n{body}", body.len());
    let end = format!("\n\x01\x03\nR65a00000\nV{:x}\nG{guid}\nBINBOX\n\n", body.len());
    format!("{head}{end}").into_bytes()
}

const STORAGE: &str = "u/mail/storage";
const INBOX: &str = "u/mail/mailboxes/INBOX/dbox-Mails";

async fn state(client: &Client, path: &str) -> IndexState {
    replay(None, &[&client.read(path).await.unwrap()]).unwrap()
}

/// What the folder shows, by UID: where the map says that the mail lies.
async fn shown(client: &Client) -> Vec<(u32, Vec<u8>)> {
    let map = state(client, &format!("{STORAGE}/dovecot.map.index.log")).await;
    let folder = state(client, &format!("{INBOX}/dovecot.index.log")).await;
    let mut all = Vec::new();
    let number = |data: &[u8], at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
    for uid in folder.records.keys() {
        let link = folder.ext_data("mdbox").find(|(u, _)| u == uid).unwrap().1;
        let (_, place) = map.ext_data("map").find(|(u, _)| *u == number(link, 0)).unwrap();
        let (file, offset, size) = (number(place, 0), number(place, 4), number(place, 8));
        let bytes = client.read(&format!("{STORAGE}/m.{file}")).await.unwrap();
        let (from, to) = (offset as usize, (offset + size) as usize);
        all.push((*uid, bytes[from..to].to_vec()));
    }
    all
}

/// I1, I2: mdbox. Between the extent and the map, between the map and the folder, and anywhere else:
/// each mail shows, once, under a UID that was never given.
#[tokio::test]
async fn i1_i2_a_recovery_of_mdbox_that_died_anywhere_is_finished() {
    let mut rounds = 0;
    loop {
        let world = World::new();
        let client = world.session(HERE);
        for dir in ["u", "u/mail", STORAGE, "u/mail/mailboxes", "u/mail/mailboxes/INBOX", INBOX] {
            client.mkdir(dir).await.unwrap();
        }
        client.put(&format!("{STORAGE}/dovecot.map.index.log"), &log(|_| ())).await.unwrap();
        // Which map it goes with.
        let header = |t: &mut Transaction| {
            let name = "mdbox-hdr";
            let shape = Intro { name, reset_id: 0, hdr_size: 24, record_size: 0, record_align: 0 };
            t.ext_intro(&shape);
            t.ext_header_update(0, &1234u32.to_le_bytes());
        };
        client.put(&format!("{INBOX}/dovecot.index.log"), &log(header)).await.unwrap();
        client.flush("u").await;
        let ceiling = |world: &World| {
            let head = world.head("u");
            let inbox = head.folders.iter().find(|f| f.name == b"dbox-Mails").unwrap();
            inbox.uid_ceiling.unwrap()
        };
        let file = client.create(&format!("{STORAGE}/m.1")).await.unwrap();
        let mut at = 0;
        let append = async |data: &[u8], at: &mut u64| {
            client.write(file, *at, data).await.unwrap();
            client.fsync(file).await.unwrap();
            *at += data.len() as u64;
        };
        append(b"2 M1e C65a00000\n", &mut at).await;
        append(&mdbox_mail(1), &mut at).await;
        // This one's extent is in the flush, and no index knows it.
        client.flush("u").await;
        let given = ceiling(&world);
        append(&mdbox_mail(2), &mut at).await;
        append(&mdbox_mail(3), &mut at).await;
        drop(client);
        let Some(client) = recovered(&world, "u", rounds).await else { break };
        rounds += 1;
        let look = |client: Client| async move {
            let all = shown(&client).await;
            assert!(all.iter().all(|(uid, _)| *uid >= given), "{given}: {all:?}");
            let mails: Vec<_> = all.iter().map(|(_, mail)| mail.clone()).collect();
            let once: BTreeSet<_> = mails.iter().cloned().collect();
            assert_eq!(mails.len(), 3, "each once: {all:?}");
            assert_eq!(once, BTreeSet::from([mdbox_mail(1), mdbox_mail(2), mdbox_mail(3)]));
            all
        };
        let all = look(client.clone()).await;
        client.flush("u").await;
        drop(client);
        let last = world.session(On { machine: "third", ..FRESH });
        assert_eq!(look(last).await, all);
    }
    assert!(rounds > 15, "a recovery changes the disk more often than {rounds} times");
}
