//! The metacache: its books, what is listed of it (I8).

use super::world::*;
use std::time::Duration;
use vmailfs::vmail::metacache::Pending;

/// What `du` says of the directories that the metacache's bound is for.
pub fn du(client: &Client) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fn blocks(dir: &std::path::Path) -> u64 {
        let mut sum = std::fs::symlink_metadata(dir).map_or(0, |m| m.blocks() * 512);
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            match std::fs::symlink_metadata(&path) {
                Ok(meta) if meta.is_dir() => sum += blocks(&path),
                Ok(meta) => sum += meta.blocks() * 512,
                Err(_) => {}
            }
        }
        sum
    }
    let settings = &client.session().settings;
    blocks(&settings.metacache_dir) + blocks(&settings.state_dir.join("users"))
}

/// The books say what is on the disk, to the byte, and no less than `du` does.
pub async fn exact(client: &Client) {
    let report = client.session().metacache_rescan().await.unwrap();
    assert_eq!(report.wrong, [], "the books were wrong");
    assert_eq!(report.booked, report.found);
    let (used, seen) = (client.session().metacache.used(), du(client));
    assert!(used + 16384 >= seen, "{used} booked, du says {seen}");
}

/// A user with a folder of each priority.
async fn priorities(client: &Client, user: &str) {
    client.mkdir(user).await.unwrap();
    let dirs = ["mail", "mail/cur", "mail/new", "mail/tmp", "index", "index/.INBOX", "index/.Junk"];
    for dir in dirs.iter().chain(&["index/.Old", "index/.Old/fts-flatcurve"]) {
        client.mkdir(&format!("{user}/{dir}")).await.unwrap();
    }
    for (file, len) in [
        ("mail/dovecot-uidlist", 100),
        ("index/dovecot.list.index.log", 5000),
        ("index/.INBOX/dovecot.index.log", 20_000),
        ("index/.Junk/dovecot.index.log", 8192),
        ("index/.Old/dovecot.index.log", 8193),
        ("index/.Old/fts-flatcurve/glass.1", 70_000),
    ] {
        client.put(&format!("{user}/{file}"), &noise(len)).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_on_the_disk_is_in_the_books() {
    let world = World::new();
    let client = world.session(HERE);
    exact(&client).await;
    priorities(&client, "u").await;
    exact(&client).await;
    let list = client.session().metacache_list();
    assert_eq!(list.len(), 1);
    let [root, fts, soon, rest] = list[0].bytes;
    assert!((4096..80_000).contains(&root), "{root}");
    assert!((70_000..90_000).contains(&fts), "{fts}");
    assert!((30_000..60_000).contains(&soon), "{soon}");
    assert!((8193..25_000).contains(&rest), "{rest}");

    client.append("u/index/.INBOX/dovecot.index.log", &noise(50_000)).await.unwrap();
    client.replace("u/mail/dovecot-uidlist", &noise(30_000)).await.unwrap();
    client.rename("u/index/.Old", "u/index/.Older").await.unwrap();
    client.link("u/index/.Older/dovecot.index.log", "u/index/.Older/second").await.unwrap();
    exact(&client).await;
    let file = client.open("u/index/.Junk/dovecot.index.log", WRITE).await.unwrap();
    client.truncate(file, 3).await.unwrap();
    exact(&client).await;
    client.unlink("u/index/.Junk/dovecot.index.log").await.unwrap();
    client.write(file, 0, &noise(40_000)).await.unwrap();
    let booked = client.session().metacache.used();
    exact(&client).await;
    client.close_file(file).await.unwrap();
    assert!(client.session().metacache.used() + 40_000 <= booked);
    exact(&client).await;
    client.deliver("u/mail", "1700000000.M1P1.host", b"mail").await.unwrap();
    client.flush_all("u").await;
    exact(&client).await;
    client.unlink("u/index/.Older/second").await.unwrap();
    client.unlink("u/index/.Older/dovecot.index.log").await.unwrap();
    client.unlink("u/index/.Older/fts-flatcurve/glass.1").await.unwrap();
    let ino = client.look("u/index/.Older").await.unwrap().attr.ino;
    let above = client.look("u/index").await.unwrap().attr.ino;
    let who = vmailfs::fs::api::Caller { uid: 1000, gid: 1000, pid: 1 };
    use vmailfs::fs::api::MailFs;
    client.go(|fs| fs.rmdir(who, ino, b"fts-flatcurve")).await.unwrap();
    client.go(|fs| fs.rmdir(who, above, b".Older")).await.unwrap();
    exact(&client).await;
    assert_eq!(client.session().metacache_list()[0].bytes[1], 0);
}

#[tokio::test]
async fn the_books_are_made_anew_from_the_disk() {
    let world = World::new();
    let client = world.session(HERE);
    priorities(&client, "u").await;
    priorities(&client, "v").await;
    client.flush_all("u").await;
    let before: Vec<_> = client.session().metacache_list().iter().map(|u| u.bytes).collect();
    // A death, and a clean end.
    for _ in 0..2 {
        let client = world.session(HERE);
        exact(&client).await;
        let list = client.session().metacache_list();
        let after: Vec<u64> = list.iter().map(|u| u.bytes.iter().sum()).collect();
        for (user, (now, was)) in after.iter().zip(&before).enumerate() {
            let was: u64 = was.iter().sum();
            // The journal may have been begun anew, listings written.
            assert!(now.abs_diff(was) < 64_000, "user {user}: {now}, {was}");
        }
        client.read("u/index/.INBOX/dovecot.index.log").await.unwrap();
        client.read("v/index/.Old/dovecot.index.log").await.unwrap();
        exact(&client).await;
        client.close().await;
    }
    // On another machine nothing is there, and then what was loaded.
    let client = world.session(FRESH);
    exact(&client).await;
    assert_eq!(client.session().metacache_list(), []);
    client.read("v/index/.Old/dovecot.index.log").await.unwrap();
    exact(&client).await;
}

#[tokio::test]
async fn a_list_tells_what_waits_and_how_soon_it_goes_up() {
    let world = World::new();
    let client = world.session(HERE);
    priorities(&client, "u").await;
    let list = client.session().metacache_list();
    assert_eq!(list[0].pending, Pending::Important);
    assert!(list[0].changes > 10);
    // Folders were made.
    assert!(list[0].upload_within.unwrap() <= Duration::from_secs(5));
    assert!(list[0].cleanup_weight.unwrap() > 1_700_000_000);
    client.flush_all("u").await;
    let list = client.session().metacache_list();
    assert_eq!((list[0].pending, list[0].changes), (Pending::None, 0));
    assert_eq!(list[0].upload_within, None);
    world.clock.advance(Duration::from_secs(100));
    client.deliver("u/mail", "1700000000.M1P1.host", b"mail").await.unwrap();
    let list = client.session().metacache_list();
    assert_eq!(list[0].pending, Pending::Unimportant);
    assert!(list[0].upload_within.unwrap() > Duration::from_secs(3000));
    client
        .rename("u/mail/new/1700000000.M1P1.host", "u/mail/cur/1700000000.M1P1.host:2,")
        .await
        .unwrap();
    client
        .rename("u/mail/cur/1700000000.M1P1.host:2,", "u/mail/cur/1700000000.M1P1.host:2,S")
        .await
        .unwrap();
    let list = client.session().metacache_list();
    assert_eq!(list[0].pending, Pending::Important);
    assert!(list[0].upload_within.unwrap() <= Duration::from_secs(300));
    assert!(list[0].open && !list[0].lost);
    let used = client.session().metacache_use();
    assert_eq!((used.users, used.open), (1, 1));
    assert_eq!(used.by_priority.iter().sum::<u64>(), used.bytes);
}

/// A path that somebody removed is found by a rescan, and only by that.
#[tokio::test]
async fn a_rescan_finds_what_was_removed_behind_our_back() {
    let world = World::new();
    let client = world.session(HERE);
    priorities(&client, "u").await;
    let path = world.machine_dir(HERE).join("meta/u/index/.Old/fts-flatcurve/glass.1");
    let before = client.session().metacache.used();
    std::fs::remove_file(path).unwrap();
    let report = client.session().metacache_rescan().await.unwrap();
    assert_eq!(report.wrong.len(), 1);
    assert_eq!(report.booked - report.found, before - client.session().metacache.used());
    assert!(report.booked - report.found > 70_000);
    exact(&client).await;
}

/// `last-service` is the program that opened a file of the user last; it outlives the user's being
/// open, and administration does not change it.
#[tokio::test]
async fn the_last_service_is_the_program_that_opened_a_file() {
    let world = World::new();
    let client = world.session(HERE);
    client.session().set_services(Box::new(|pid| (pid == 1).then(|| "imap".to_owned())));
    client.maildir(&["u"]).await;
    let last = || client.session().metacache_list().remove(0).last_service;
    assert_eq!(last(), None);
    client.put("u/dovecot.index.log", &noise(100)).await.unwrap();
    assert_eq!(last().as_deref(), Some("imap"));
    client.flush_all("u").await;
    assert!(vmailfs::vmail::close::close(&client.cell("u")).await.is_ok());
    assert_eq!(last().as_deref(), Some("imap"));
}
