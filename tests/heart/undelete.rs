//! What an undelete does where names are equal: nothing is replaced, nothing is doubled.

use super::repair::{all, back, now};
use super::world::*;
use vmailfs::vmail::error::Error;
use vmailfs::vmail::undelete::Which;

/// What the mails of a directory hold, sorted.
async fn bodies(client: &Client, dir: &str) -> Vec<String> {
    let mut all = Vec::new();
    for name in client.list(dir).await.unwrap() {
        let bytes = client.read(&format!("{dir}/{name}")).await.unwrap();
        all.push(String::from_utf8(bytes).unwrap());
    }
    all.sort();
    all
}

async fn remove_folder(client: &Client, dir: &str) {
    for sub in ["cur", "new", "tmp"] {
        for name in client.list(&format!("{dir}/{sub}")).await.unwrap() {
            client.unlink(&format!("{dir}/{sub}/{name}")).await.unwrap();
        }
        client.rmdir(&format!("{dir}/{sub}")).await.unwrap();
    }
    client.rmdir(dir).await.unwrap();
}

/// A folder that was deleted twice and made anew, with a mail of the same file name each time: all
/// mails are in the folder that has the name today, and the one that is there is untouched.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_the_same_name_takes_the_mails_beside_its_own() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    for body in ["first", "second", "third"] {
        client.maildir(&["u/.Old"]).await;
        client.deliver("u/.Old", "1.M1", body.as_bytes()).await.unwrap();
        client.flush("u").await;
        if body != "third" {
            remove_folder(&client, "u/.Old").await;
            client.flush("u").await;
        }
    }
    let before = client.stat("u/.Old/new/1.M1").await.unwrap().ino;
    let done = back(&client, &all(), false).await.unwrap();
    assert_eq!((done.mails.len(), done.left.len()), (2, 0), "{done:?}");
    assert_eq!(done.folders, Vec::<String>::new());
    assert_eq!(bodies(&client, "u/.Old/new").await, ["first", "second", "third"]);
    assert_eq!(client.stat("u/.Old/new/1.M1").await.unwrap().ino, before);
    assert_eq!(client.read("u/.Old/new/1.M1").await.unwrap(), b"third");
    // A folder that is gone is made anew, once for all that were in it.
    remove_folder(&client, "u/.Old").await;
    client.flush("u").await;
    let done = back(&client, &all(), false).await.unwrap();
    assert_eq!((done.mails.len(), done.folders.len()), (3, 1), "{done:?}");
    assert_eq!(bodies(&client, "u/.Old/new").await, ["first", "second", "third"]);
}

/// Something else has the folder's name: its mails stay away, and it is said why.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_has_the_folders_name_stays() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.Old"]).await;
    client.deliver("u/.Old", "1.M1", b"mail").await.unwrap();
    client.deliver("u", "1.M2", b"other").await.unwrap();
    client.flush("u").await;
    remove_folder(&client, "u/.Old").await;
    client.unlink("u/new/1.M2").await.unwrap();
    client.put("u/.Old", b"a file").await.unwrap();
    let done = back(&client, &all(), false).await.unwrap();
    assert_eq!((done.mails.len(), done.left.len()), (1, 1), "{done:?}");
    assert!(done.left[0].1.contains("cannot be made"), "{done:?}");
    assert_eq!(client.read("u/.Old").await.unwrap(), b"a file");
    assert_eq!(bodies(&client, "u/new").await, ["other"]);
    // Out of the way, it is not in the way: the mail is still there to be had.
    client.unlink("u/.Old").await.unwrap();
    assert_eq!(back(&client, &all(), false).await.unwrap().mails.len(), 1);
    assert_eq!(bodies(&client, "u/.Old/new").await, ["mail"]);
}

/// A renamed folder is the same folder, found under both its names.
#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_folder_gets_its_mails_under_its_new_name() {
    for asked in ["Old", "Renamed"] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u", "u/.Old"]).await;
        client.deliver("u/.Old", "1.M1", b"mail").await.unwrap();
        client.flush("u").await;
        client.unlink("u/.Old/new/1.M1").await.unwrap();
        client.flush("u").await;
        client.rename("u/.Old", "u/.Renamed").await.unwrap();
        // Another has the old name today.
        client.maildir(&["u/.Old"]).await;
        let which = Which::Expunged { folder: Some(asked.into()), since: None };
        let done = back(&client, &which, false).await.unwrap();
        assert_eq!((done.mails.len(), done.left.len()), (1, 0), "{asked}: {done:?}");
        assert_eq!(&*done.mails[0].path[0], b".Renamed");
        assert_eq!(bodies(&client, "u/.Renamed/new").await, ["mail"]);
        assert_eq!(bodies(&client, "u/.Old/new").await, Vec::<String>::new());
    }
}

/// A mistyped folder is no folder without deleted mails.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_never_was_is_told() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.Old", "u/.Gone", "u/.Empty"]).await;
    client.deliver("u/.Old", "1.M1", b"mail").await.unwrap();
    client.flush("u").await;
    remove_folder(&client, "u/.Gone").await;
    client.unlink("u/.Old/new/1.M1").await.unwrap();
    client.flush("u").await;
    let of = |folder: &str| Which::Expunged { folder: Some(folder.into()), since: None };
    for (folder, mails) in [("inbox", 0), ("Empty", 0), (".Empty", 0), ("Gone", 0), ("Old", 1)] {
        let done = back(&client, &of(folder), true).await.unwrap();
        assert_eq!(done.mails.len(), mails, "{folder}");
    }
    // None is due, and there it is all the same.
    let late = Which::Expunged { folder: Some("Old".into()), since: Some(now(&world) + 3600) };
    assert_eq!(back(&client, &late, true).await.unwrap().mails.len(), 0);
    for (folder, dry_run) in [("Odl", true), ("Odl", false), ("old", true)] {
        match back(&client, &of(folder), dry_run).await {
            Err(Error::NotThere(text)) => assert!(text.contains(&format!("no folder {folder}"))),
            other => panic!("{folder}: {other:?}"),
        }
    }
}

/// However often a mail is deleted, and however often it is asked for, it comes back once.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_was_deleted_twice_comes_back_once() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1.M1", b"mail").await.unwrap();
    client.flush("u").await;
    let then = now(&world);
    world.clock.advance(std::time::Duration::from_secs(10));
    for round in 0..3 {
        for name in client.list("u/new").await.unwrap() {
            client.unlink(&format!("u/new/{name}")).await.unwrap();
        }
        // With a flush in between and without.
        if round != 1 {
            client.flush("u").await;
        }
        // Two people at a time.
        let (which, other) = (all(), all());
        let (a, b) = tokio::join!(back(&client, &which, false), back(&client, &other, false));
        assert_eq!(a.unwrap().mails.len() + b.unwrap().mails.len(), 1, "round {round}");
        assert_eq!(back(&client, &all(), false).await.unwrap().mails.len(), 0);
        // Nor does a restore bring what is there under another name.
        let restored = back(&client, &Which::Of { at: then }, false).await.unwrap();
        assert_eq!(restored.mails.len(), 0, "{restored:?}");
        assert_eq!(bodies(&client, "u/new").await, ["mail"]);
    }
}

/// A copy is a mail of its own: both come back to their folders, and each if only it is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn copies_come_back_each_to_its_folder() {
    for asked in [None, Some("Copy"), Some("INBOX")] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u", "u/.Copy"]).await;
        client.deliver("u", "1.M1", b"mail").await.unwrap();
        client.link("u/new/1.M1", "u/.Copy/new/1.M2").await.unwrap();
        client.flush("u").await;
        client.unlink("u/new/1.M1").await.unwrap();
        client.unlink("u/.Copy/new/1.M2").await.unwrap();
        let which = Which::Expunged { folder: asked.map(str::to_owned), since: None };
        let dry = back(&client, &which, true).await.unwrap();
        let done = back(&client, &which, false).await.unwrap();
        let wanted = |folder: &str| usize::from(asked.is_none_or(|asked| asked == folder));
        assert_eq!(done.mails.len(), wanted("INBOX") + wanted("Copy"), "{asked:?} {done:?}");
        assert_eq!(dry.mails.len(), done.mails.len());
        assert_eq!(bodies(&client, "u/new").await.len(), wanted("INBOX"));
        assert_eq!(bodies(&client, "u/.Copy/new").await.len(), wanted("Copy"));
        assert_eq!(back(&client, &all(), false).await.unwrap().mails.len(), 0, "{asked:?}");
        client.flush("u").await;
        drop(client);
        let fresh = world.session(FRESH);
        assert_eq!(bodies(&fresh, "u/new").await.len(), wanted("INBOX"));
        assert_eq!(bodies(&fresh, "u/.Copy/new").await.len(), wanted("Copy"));
    }
}

/// Two mails of one file name that no flush has seen are two; earlier versions of one are one.
#[tokio::test(flavor = "multi_thread")]
async fn mails_of_one_file_name_are_told_apart() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    for body in ["first", "second"] {
        client.deliver("u", "1.M1", body.as_bytes()).await.unwrap();
        client.unlink("u/new/1.M1").await.unwrap();
    }
    client.deliver("u", "1.M1", b"third").await.unwrap();
    // Made safe three times while it was written.
    let file = client.create("u/tmp/1.M2").await.unwrap();
    let mut at = 0;
    for part in ["a ", "whole ", "mail"] {
        client.write(file, at, part.as_bytes()).await.unwrap();
        client.fsync(file).await.unwrap();
        at += part.len() as u64;
    }
    client.close_file(file).await.unwrap();
    client.rename("u/tmp/1.M2", "u/new/1.M2").await.unwrap();
    client.unlink("u/new/1.M2").await.unwrap();
    let done = back(&client, &all(), false).await.unwrap();
    assert_eq!((done.mails.len(), done.left.len()), (3, 0), "{done:?}");
    assert_eq!(bodies(&client, "u/new").await, ["a whole mail", "first", "second", "third"]);
    assert_eq!(client.read("u/new/1.M1").await.unwrap(), b"third");
}
