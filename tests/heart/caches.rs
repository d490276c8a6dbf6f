//! Files of the caches may vanish at any time (I7), and an outage is no absence (I4).

use super::world::*;
use std::fs;
use std::sync::Arc;
use vmailfs::cache::disk::RealDisk;
use vmailfs::fs::api::MailFs;
use vmailfs::store::Op;
use vmailfs::store::StoreError;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::lost::LostMails;

fn list(next: u32) -> Vec<u8> {
    format!("3 V1234 N{next} Gabcdef0123456789abcdef0123456789\n").into_bytes()
}

fn next_uid(content: &[u8]) -> u32 {
    vmailfs::dovecot::uidlist::parse(content).unwrap().next_uid()
}

async fn with_indexes(world: &World) -> Client {
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.replace("u/dovecot-uidlist", &list(10)).await.unwrap();
    client.put("u/dovecot-keywords", b"0 a\n").await.unwrap();
    client.put("u/sieve.script", b"keep;").await.unwrap();
    client.flush("u").await;
    client.replace("u/dovecot-uidlist", &list(200)).await.unwrap();
    client.append("u/dovecot-keywords", b"1 b\n").await.unwrap();
    client.append("u/sieve.script", b" stop;").await.unwrap();
    client
}

/// I2, I7: an index file that is gone brings back the set of the last cut, next-UID at its
/// ceiling; other files stay as they are. Open or not, and whoever needs it first.
#[tokio::test]
async fn i7_an_index_file_that_vanished_comes_back() {
    for dies in [false, true] {
        for first in ["dovecot-uidlist", "dovecot-keywords", "flush"] {
            let world = World::new();
            let mut client = with_indexes(&world).await;
            if dies {
                drop(std::mem::replace(&mut client, world.session(HERE)));
            }
            fs::remove_file(world.machine_dir(HERE).join("meta/u/dovecot-uidlist")).unwrap();
            // After a death the next call opens the user.
            if !dies && first == "dovecot-keywords" {
                assert_eq!(client.read("u/dovecot-keywords").await.unwrap(), b"0 a\n1 b\n");
            } else if !dies && first == "flush" {
                client.flush("u").await;
            }
            let uids = client.read("u/dovecot-uidlist").await.unwrap();
            assert_eq!(next_uid(&uids), 1010, "dies: {dies}, {first}");
            assert_eq!(client.read("u/dovecot-keywords").await.unwrap(), b"0 a\n");
            assert_eq!(client.read("u/sieve.script").await.unwrap(), b"keep; stop;");
            assert_eq!(client.list("u/new").await.unwrap(), ["1"]);
            client.replace("u/dovecot-uidlist", &list(1011)).await.unwrap();
            client.close().await;
            let fresh = world.session(FRESH);
            assert_eq!(next_uid(&fresh.read("u/dovecot-uidlist").await.unwrap()), 1011);
            assert_eq!(fresh.read("u/sieve.script").await.unwrap(), b"keep; stop;");
        }
    }
}

/// I7: an ordinary file comes back alone, as it was flushed; one that never was becomes absent.
#[tokio::test]
async fn i7_other_files_come_back_one_by_one() {
    let world = World::new();
    let client = with_indexes(&world).await;
    client.put("u/young", b"x").await.unwrap();
    for name in ["sieve.script", "young"] {
        fs::remove_file(world.machine_dir(HERE).join("meta/u").join(name)).unwrap();
    }
    assert_eq!(client.read("u/sieve.script").await.unwrap(), b"keep;");
    assert_eq!(client.read("u/young").await, Err(libc::ENOENT));
    assert_eq!(next_uid(&client.read("u/dovecot-uidlist").await.unwrap()), 200);
}

/// I7: a cache that is gone is absent, by a record, and an older one does not come back.
#[tokio::test]
async fn i7_a_cache_that_vanished_is_absent() {
    for dies in [false, true] {
        let world = World::new();
        let mut client = with_indexes(&world).await;
        client.put("u/dovecot.index.cache", b"old").await.unwrap();
        client.flush_all("u").await;
        client.put("u/dovecot.index.cache", b"newer").await.unwrap();
        client.append("u/dovecot-keywords", b"2 c\n").await.unwrap();
        if dies {
            drop(std::mem::replace(&mut client, world.session(HERE)));
        }
        fs::remove_file(world.machine_dir(HERE).join("meta/u/dovecot.index.cache")).unwrap();
        if !dies {
            assert_eq!(client.read("u/dovecot.index.cache").await, Err(libc::ENOENT));
        }
        let names = client.list("u").await.unwrap();
        assert!(!names.contains(&"dovecot.index.cache".to_string()), "dies: {dies}");
        assert_eq!(next_uid(&client.read("u/dovecot-uidlist").await.unwrap()), 200);
        client.flush("u").await;
        drop(client);
        let fresh = world.session(FRESH);
        assert_eq!(fresh.read("u/dovecot.index.cache").await, Err(libc::ENOENT));
    }
}

/// A flush without caches says that they are absent: an old one under a newer log would lie.
#[tokio::test]
async fn a_cache_travels_with_its_log_or_not_at_all() {
    // A small folder is written whole again; on top of a large part only what changed is.
    for (large, parts) in [(0, 1), (200_000, 2)] {
        let world = World::new();
        let client = with_indexes(&world).await;
        client.put("u/large", &noise(large)).await.unwrap();
        client.put("u/dovecot.index.cache", b"cache").await.unwrap();
        client.flush_all("u").await;
        let rest = client.flush_all("u").await;
        assert!(!rest.flushed, "it was left out");
        client.append("u/dovecot-keywords", b"2 c\n").await.unwrap();
        client.flush("u").await;
        drop(client);
        assert_eq!(world.head("u").folders[0].parts.len(), parts);
        let fresh = world.session(FRESH);
        assert_eq!(fresh.read("u/dovecot.index.cache").await, Err(libc::ENOENT));
    }
}

/// That a cut left a cache out is not forgotten with the process: what a later part says of it does not
/// build on what no part has, or a lost machine could not read the folder.
#[tokio::test]
async fn a_cache_that_was_left_out_is_whole_in_the_next_part() {
    let world = World::new();
    let client = with_indexes(&world).await;
    // So much that cannot be compressed that the next part is a diff.
    let many: Vec<u8> = (0..65_536u64)
        .map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) >> 7) as u8)
        .collect();
    client.put("u/dovecot.index.cache", b"cache").await.unwrap();
    client.put("u/subscriptions", &many).await.unwrap();
    client.flush("u").await;
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.read("u/dovecot.index.cache").await.unwrap(), b"cache");
    again.append("u/dovecot-keywords", b"9 d\n").await.unwrap();
    again.flush_all("u").await;
    drop(again);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.read("u/dovecot.index.cache").await, Ok(b"cache".to_vec()));
    assert_eq!(fresh.read("u/subscriptions").await, Ok(many));
}

/// I4, I7: all of fscache may go; a mail is fetched again. One that cannot be fetched is EIO.
/// A mail whose object is gone, and whose cached copy, too.
/// However many names the directory of a cache has, and wherever among them it is.
#[tokio::test]
async fn a_cache_in_a_large_directory_travels() {
    let world = World::new();
    let client = world.session(HERE);
    client.mkdir("u").await.unwrap();
    client.mkdir("u/box").await.unwrap();
    for n in 0..4200 {
        client
            .create(&format!("u/box/file{n}"))
            .await
            .map(|f| client.close_file(f))
            .unwrap()
            .await
            .unwrap();
    }
    client.put("u/box/dovecot.index.cache", b"cache").await.unwrap();
    client.flush("u").await;
    client.flush_all("u").await;
    // A diff knows it, too.
    client.append("u/box/dovecot.index.cache", b" and more").await.unwrap();
    client.put("u/box/file0", b"first").await.unwrap();
    client.flush_all("u").await;
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.read("u/box/dovecot.index.cache").await.unwrap(), b"cache and more");
    assert_eq!(fresh.read("u/box/file0").await.unwrap(), b"first");
    assert_eq!(fresh.list("u/box").await.unwrap().len(), 4201);
}

async fn lose(world: &World, client: &Client, name: &str) {
    client.maildir(&["u"]).await;
    client.deliver("u", name, b"Subject: x\n\nbody\n").await.unwrap();
    let fscache = world.machine_dir(HERE).join("fscache");
    for entry in fs::read_dir(&fscache).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with(".part") {
            fs::remove_dir_all(path).unwrap();
        }
    }
    world.faults(|r| match r.op {
        Op::Get | Op::Download | Op::Head if r.key.contains("/mail/") => {
            Fault::Before(StoreError::NotFound { key: r.key.clone() })
        }
        _ => Fault::None,
    });
}

#[tokio::test]
async fn i4_a_lost_mail_is_an_error_and_is_counted_once() {
    let world = World::new();
    let client = world.session(HERE);
    lose(&world, &client, "1.M1P1.host,S=17,W=20").await;
    for _ in 0..2 {
        assert_eq!(client.read("u/new/1.M1P1.host,S=17,W=20").await, Err(libc::EIO));
    }
    assert_eq!(client.session().lost_mails.count(), 1);
    assert_eq!(client.list("u/new").await.unwrap().len(), 1);
}

/// Whether the kernel may use pages that it has, and whether it must have none.
async fn pages(client: &Client, path: &str) -> (bool, bool) {
    let ino = client.look(path).await.unwrap().attr.ino;
    let opened = client.go(|fs| fs.open(WHO, ino, READ)).await.unwrap();
    client.fs.release(ino, opened.fh);
    (opened.keep_cache, opened.uncached)
}

#[tokio::test]
async fn i4_a_blank_mail_is_never_taken_for_the_truth() {
    let world = World::new();
    let mut settings = world.settings(HERE);
    settings.lost_mails = LostMails::Blank(vec!["u".into()]);
    let client = world.session_with(settings, Arc::new(RealDisk));
    let name = "1.M1P1.host,S=17,W=20";
    lose(&world, &client, name).await;
    let path = format!("u/new/{name}");
    assert_eq!(client.read(&path).await.unwrap(), b"\n\n\n              ");
    assert_eq!(pages(&client, &path).await, (false, true));
    // It is there again: so is the mail, although the blank one was read. The kernel may have
    // pages of that (of sendfile), so it keeps none.
    world.no_faults();
    assert_eq!(client.read(&path).await.unwrap(), b"Subject: x\n\nbody\n");
    assert_eq!(pages(&client, &path).await, (false, false));
    client.deliver("u", "2", b"another").await.unwrap();
    assert_eq!(pages(&client, "u/new/2").await, (true, false));
}

#[tokio::test]
async fn i4_a_mail_that_cannot_be_read_is_no_absence() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.deliver("u", "2", b"mail two").await.unwrap();
    let wipe = || {
        let dir = world.machine_dir(HERE).join("fscache");
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with(".part") {
                fs::remove_dir_all(path).unwrap();
            }
        }
    };
    wipe();
    assert_eq!(client.read("u/new/1").await.unwrap(), b"mail");
    wipe();
    world.store.set_down(true);
    assert_eq!(client.read("u/new/1").await, Err(libc::EIO));
    world.store.set_down(false);
    // Other bytes of the right length, and none at all.
    let key = world.mails().into_iter().find(|k| k.contains(".1,S=") || k.ends_with(".1")).unwrap();
    world.mem.damage(&key, &b"liam"[..]);
    assert_eq!(client.read("u/new/1").await, Err(libc::EIO));
    world.faults(|r| match r.op {
        Op::Download | Op::Get => {
            Fault::Before(vmailfs::store::StoreError::NotFound { key: r.key.clone() })
        }
        _ => Fault::None,
    });
    assert_eq!(client.read("u/new/2").await, Err(libc::EIO));
    world.no_faults();
    assert_eq!(client.read("u/new/2").await.unwrap(), b"mail two");
    assert_eq!(client.list("u/new").await.unwrap(), ["1", "2"]);
}

/// I3: index files are not synced when their user is handed over. What a power cut after that leaves of
/// them is not shown, also if the start that finds it dies before it is done.
#[tokio::test]
async fn i3_files_of_a_user_that_was_handed_over_are_judged_after_a_power_cut() {
    for dies in [false, true] {
        let world = World::new();
        let client = with_indexes(&world).await;
        client.put("u/notes", b"notes").await.unwrap();
        let before = client.read("u/dovecot-uidlist").await.unwrap();
        client.close().await;
        let meta = world.machine_dir(HERE).join("meta/u");
        fs::write(meta.join("dovecot-uidlist"), b"\0\0\0").unwrap();
        fs::write(meta.join("notes"), b"").unwrap();
        if dies {
            world.faults(|r| match r.op {
                Op::Get if r.key.contains("/bundle/") => Fault::Before(down()),
                _ => Fault::None,
            });
            world.session(REBOOTED).read("u/notes").await.unwrap_err();
            world.no_faults();
        }
        let again = world.session(REBOOTED);
        assert_eq!(again.read("u/notes").await.unwrap(), b"notes", "dies: {dies}");
        let uids = again.read("u/dovecot-uidlist").await.unwrap();
        // Nothing was lost, so no UIDs are burnt, but by a recovery that is begun again.
        assert!(uids == before || dies && next_uid(&uids) > next_uid(&before), "dies: {dies}");
    }
}

/// I3: after a power cut what is not flushed counts if its format says that it is whole; else
/// the set of the last cut comes back. Nothing is taken from files that are flushed.
#[tokio::test]
async fn i3_torn_files_are_judged_after_a_power_cut() {
    for (torn, want) in [(&b"3 V1234 N200 Gabc\n100 :a\n101 :b\n102"[..], 1010), (b"\0\0\0", 2010)]
    {
        let world = World::new();
        let client = with_indexes(&world).await;
        client.mkdir("u/.B").await.unwrap();
        client.put("u/.B/notes", b"notes").await.unwrap();
        client.flush("u").await;
        client.replace("u/dovecot-uidlist", &list(200)).await.unwrap();
        client.deliver("u", "2", b"mail").await.unwrap();
        drop(client);
        let meta = world.machine_dir(HERE).join("meta/u");
        fs::write(meta.join("dovecot-uidlist"), torn).unwrap();
        fs::write(meta.join(".B/notes"), b"\0\0").unwrap();
        let again = world.session(REBOOTED);
        assert_eq!(again.list("u/new").await.unwrap(), ["1", "2"]);
        let uids = again.read("u/dovecot-uidlist").await.unwrap();
        assert!(next_uid(&uids) >= 1010 && next_uid(&uids) <= want, "{}", next_uid(&uids));
        assert_eq!(uids.windows(7).any(|w| w == b"101 :b\n"), want == 1010);
        assert_eq!(again.read("u/.B/notes").await.unwrap(), b"notes");
        again.flush("u").await;
        drop(again);
        let fresh = world.session(FRESH);
        assert_eq!(fresh.list("u/new").await.unwrap(), ["1", "2"]);
    }
}
