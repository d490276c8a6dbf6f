//! Deleting whole users: all of it, of nobody who is in use, and not before retention from the store.

use super::world::*;
use std::time::Duration;
use vmailfs::fs::api::OpenMode;
use vmailfs::vmail::erase::{Erased, Outcome, erase};
use vmailfs::vmail::gc::{self, Options};

#[tokio::test]
async fn everything_goes_and_the_bytes_stay_for_their_retention() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B", "u/.B.C"]).await;
    for i in 0..600 {
        client.deliver("u", &i.to_string(), b"mail").await.unwrap();
    }
    client.deliver("u/.B.C", "deep", b"mail").await.unwrap();
    client.link("u/new/1", "u/.B/cur/1:2,S").await.unwrap();
    client.put("u/subscriptions", b"B\n").await.unwrap();
    client.flush_all("u").await;
    client.deliver("u", "late", b"mail").await.unwrap();
    let cell = client.cell("u");

    // Somebody reads: nothing is touched.
    let read = OpenMode { read: true, ..OpenMode::default() };
    let file = client.open("u/subscriptions", read).await.unwrap();
    assert_eq!(erase(&cell).await.unwrap(), Outcome::Busy(Erased::default()));
    assert_eq!(client.list("u/new").await.unwrap().len(), 601);
    client.close_file(file).await.unwrap();

    let Outcome::Done(erased) = erase(&cell).await.unwrap() else { panic!("it is not in use") };
    assert_eq!((erased.files, erased.folders), (604, 2));
    assert_eq!(client.list("u").await.unwrap(), [""; 0]);
    assert_eq!(world.head("u").folders.len(), 1);
    assert_eq!(world.mails().len(), 602, "until retention is over they can be had back");
    assert_eq!(erase(&cell).await.unwrap(), Outcome::Done(Erased::default()));

    world.clock.advance(Duration::from_secs(8 * 24 * 3600));
    let options = Options { dry_run: false, scan: false, unasked: false };
    gc::collect(&cell, options).await.unwrap();
    assert_eq!(world.mails(), [""; 0]);
    client.close().await;
    let other = world.session(FRESH);
    assert_eq!(other.list("u").await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn a_user_that_was_deleted_by_mistake_comes_back() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B"]).await;
    client.deliver("u/.B", "kept", b"precious").await.unwrap();
    client.flush("u").await;
    let at = world.head("u").written;
    world.clock.advance(Duration::from_secs(3600));
    erase(&client.cell("u")).await.unwrap();
    let stored = vmailfs::vmail::stored::Stored::new(
        client.session().env.store.clone(),
        "u",
        vmailfs::store::Reason("test"),
    );
    let history = vmailfs::vmail::history::read(&stored, Some(at)).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let state = history.at(at).unwrap();
    let to = dir.path().join("u");
    let done = vmailfs::vmail::export::export(&stored, state, &to).await.unwrap();
    assert_eq!((done.mails, done.missing.len()), (1, 0));
    assert_eq!(std::fs::read(to.join(".B/new/kept")).unwrap(), b"precious");
}
