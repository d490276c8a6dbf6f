//! Flushing, lazy loading, growing files, and what triggers a flush.

use super::world::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;
use vmailfs::format::head::PartRef;
use vmailfs::format::key::bundle_key;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::schedule::{Due, due};

/// Opening one folder fetches nothing of another.
#[tokio::test]
async fn a_folder_is_fetched_when_it_is_used() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.Archive"]).await;
    for i in 0..20 {
        client.deliver("u", &format!("m{i}"), b"mail").await.unwrap();
        client.deliver("u/.Archive", &format!("m{i}"), b"mail").await.unwrap();
    }
    // More than what is fetched along with others.
    client.put("u/x", &noise(200_000)).await.unwrap();
    client.put("u/.Archive/x", &noise(200_000)).await.unwrap();
    client.close().await;
    let fresh = world.session(FRESH);
    world.requests();
    assert_eq!(fresh.list("u/new").await.unwrap().len(), 20);
    let gets = |of: &[(Op, String, &str)]| of.iter().filter(|r| r.0 == Op::Get).count();
    let first = world.requests();
    assert!(first.len() <= 6, "{first:?}");
    assert_eq!(fresh.list("u/.Archive/new").await.unwrap().len(), 20);
    assert_eq!(gets(&world.requests()), 1);
    assert_eq!(fresh.list("u/.Archive/new").await.unwrap().len(), 20);
    assert!(world.requests().is_empty());
}

/// COPY, MOVE, flags and renaming a folder ask nothing of the store.
#[tokio::test]
async fn names_cost_no_request() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.deliver("u", "2", b"mail").await.unwrap();
    world.requests();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    client.link("u/cur/1:2,S", "u/.B/cur/copy").await.unwrap();
    client.rename("u/new/2", "u/.B/cur/2:2,").await.unwrap();
    client.rename("u/.B", "u/.C").await.unwrap();
    client.unlink("u/cur/1:2,S").await.unwrap();
    assert!(world.requests().is_empty());
    client.flush("u").await;
    let asked = world.requests();
    assert_eq!(asked.len(), 2, "{asked:?}");
}

/// Link counts hold while one of the folders is not loaded, and its end is counted when it is.
#[tokio::test]
async fn a_copy_counts_in_folders_that_are_not_loaded() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B"]).await;
    client.put("u/.B/x", &noise(100_000)).await.unwrap();
    client.deliver("u", "1", b"mail").await.unwrap();
    client.link("u/new/1", "u/.B/cur/copy").await.unwrap();
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.stat("u/new/1").await.unwrap().nlink, 2);
    fresh.unlink("u/new/1").await.unwrap();
    fresh.flush("u").await;
    assert_eq!(fresh.stat("u/.B/cur/copy").await.unwrap().nlink, 1);
    assert_eq!(fresh.read("u/.B/cur/copy").await.unwrap(), b"mail");
    fresh.close().await;
    let last = world.session(On { machine: "third", ..FRESH });
    assert_eq!(last.stat("u/.B/cur/copy").await.unwrap().nlink, 1);
    assert_eq!(last.read("u/.B/cur/copy").await.unwrap(), b"mail");
}

/// Names of any bytes and of full length come back from the store.
#[tokio::test]
async fn long_names_of_any_bytes_survive() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let mut names: Vec<Vec<u8>> = Vec::new();
    for first in [1u8, 128, 200] {
        names.push((0..255).map(|i| first.wrapping_add(i as u8)).map(legal).collect());
    }
    names.push(vec![0xff; 255]);
    names.push(b"with\nline\tand % @ \\ :2,S".to_vec());
    for (i, name) in names.iter().enumerate() {
        client.deliver("u", &format!("m{i}"), format!("mail {i}").as_bytes()).await.unwrap();
        client.rename_bytes(&format!("u/new/m{i}"), &["u", "cur"], name).await.unwrap();
        client.create_bytes(&["u"], name, b"local").await.unwrap();
        // Of a name that fits the key a second mail would be the newer content of the first.
        if name.len() == 255 {
            let late = format!("late {i}");
            client.create_bytes(&["u", "tmp"], name, late.as_bytes()).await.unwrap();
        }
    }
    client.flush("u").await;
    for (i, name) in names.iter().enumerate() {
        // Published under the long name, and never flushed.
        let new = client.create_bytes(&["u", "new"], name, format!("new {i}").as_bytes()).await;
        new.unwrap();
    }
    drop(client);
    let fresh = world.session(FRESH);
    for (i, name) in names.iter().enumerate() {
        for (dir, want) in [("cur", format!("mail {i}")), ("new", format!("new {i}"))] {
            let path: [&[u8]; 3] = [b"u", dir.as_bytes(), name];
            let found = fresh.read_bytes(&path).await;
            if dir == "cur" {
                assert_eq!(found.unwrap(), want.as_bytes());
            }
        }
        assert_eq!(fresh.read_bytes(&[b"u", name]).await.unwrap(), b"local");
    }
    // The late and the new ones have one name each, whichever got its own.
    assert_eq!(fresh.list("u/new").await.unwrap().len(), 2 * names.len() - 1);
    assert!(fresh.list("u/tmp").await.unwrap().is_empty());
}

fn legal(byte: u8) -> u8 {
    if byte == b'/' || byte == 0 { b'x' } else { byte }
}

/// mdbox: appended, rewritten and truncated; after a death and after a loss.
#[tokio::test]
async fn i1_growing_files_keep_what_was_synced() {
    let world = World::new();
    let client = world.session(HERE);
    client.mkdir("u").await.unwrap();
    client.mkdir("u/storage").await.unwrap();
    client.flush("u").await;
    let file = client.create("u/storage/m.1").await.unwrap();
    let mut model = Vec::new();
    for i in 0..6usize {
        let piece = format!("piece {i} ").repeat(10 + i).into_bytes();
        client.write(file, model.len() as u64, &piece).await.unwrap();
        model.extend(piece);
        client.fsync(file).await.unwrap();
        if i == 3 {
            client.write(file, 50, b"REWRITTEN").await.unwrap();
            model[50..59].copy_from_slice(b"REWRITTEN");
            client.fsync(file).await.unwrap();
        }
        if i == 4 {
            client.truncate(file, 300).await.unwrap();
            model.truncate(300);
            client.fsync(file).await.unwrap();
            client.flush("u").await;
        }
        assert_eq!(client.read("u/storage/m.1").await.unwrap(), model, "{i}");
    }
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.read("u/storage/m.1").await.unwrap(), model);
    drop(again);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.read("u/storage/m.1").await.unwrap(), model);
}

/// A growing file is rewritten while its end is being published.
#[tokio::test]
async fn i1_a_rewrite_during_a_publish_counts() {
    let world = World::new();
    let client = world.session(HERE);
    client.mkdir("u").await.unwrap();
    client.mkdir("u/storage").await.unwrap();
    client.flush("u").await;
    let file = client.create("u/storage/m.1").await.unwrap();
    client.write(file, 0, &[b'a'; 100]).await.unwrap();
    client.fsync(file).await.unwrap();
    client.write(file, 100, &[b'b'; 50]).await.unwrap();
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let held = gate.clone();
    world.faults(move |r| match r.why.0 {
        "publish" => Fault::HangAfter(held.clone()),
        _ => Fault::None,
    });
    let other = client.clone();
    let syncing = tokio::spawn(async move { other.fsync(file).await });
    while world.mails().len() < 2 {
        tokio::task::yield_now().await;
    }
    world.no_faults();
    client.write(file, 120, b"inside").await.unwrap();
    let other = client.clone();
    let writing = tokio::spawn(async move { other.write(file, 20, b"before").await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    gate.notify_one();
    syncing.await.unwrap().unwrap();
    writing.await.unwrap().unwrap();
    client.fsync(file).await.unwrap();
    let mut model = [vec![b'a'; 100], vec![b'b'; 50]].concat();
    model[20..26].copy_from_slice(b"before");
    model[120..126].copy_from_slice(b"inside");
    assert_eq!(client.read("u/storage/m.1").await.unwrap(), model);
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.read("u/storage/m.1").await.unwrap(), model);
}

/// Who closes a growing file promises only what was written through that descriptor: another
/// process may be in the middle of a mail, and half a mail in the store outlives a crash.
#[tokio::test]
async fn i1_a_reader_that_closes_does_not_publish_half_a_mail() {
    let world = World::new();
    let client = world.session(HERE);
    client.mkdir("u").await.unwrap();
    client.mkdir("u/storage").await.unwrap();
    client.flush("u").await;
    let mine = client.create("u/storage/m.1").await.unwrap();
    client.write(mine, 0, b"a whole mail").await.unwrap();
    client.fsync(mine).await.unwrap();
    let other = client.open("u/storage/m.1", WRITE).await.unwrap();
    client.write(other, 12, b"half a m").await.unwrap();
    let third = client.open("u/storage/m.1", WRITE).await.unwrap();
    client.close_file(third).await.unwrap();
    client.close_file(mine).await.unwrap();
    assert_eq!(world.mails().len(), 1);
    // Its own close makes safe what was written through it.
    client.write(other, 20, b"ail").await.unwrap();
    client.close_file(other).await.unwrap();
    assert_eq!(world.mails().len(), 2);
    drop(client);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.read("u/storage/m.1").await.unwrap(), b"a whole mailhalf a mail");
}

/// What is due, and when, by a clock that the test moves.
#[tokio::test]
async fn flushes_are_due_as_the_table_says() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let cell = client.cell("u");
    let now = |after: u64| world.clock_boot() + Duration::from_secs(after);
    let ask = |at: Duration| cell.if_open(|user| due(user, at)).unwrap();
    let flush_soon = Due::Flush { caches: false };
    assert_eq!(ask(now(0)), Due::Nothing, "a folder was made a moment ago");
    assert_eq!(ask(now(2)), flush_soon, "and it is quiet");
    client.flush("u").await;
    assert_eq!(ask(now(4000)), Due::Nothing);
    // Few deliveries can be found again; many cannot.
    for i in 0..10 {
        client.deliver("u", &format!("a{i}"), b"mail").await.unwrap();
    }
    assert_eq!(ask(now(400)), Due::Nothing);
    assert_eq!(ask(now(4000)), Due::Flush { caches: true }, "long unused");
    client.deliver("u", "a10", b"mail").await.unwrap();
    assert_eq!(ask(now(100)), Due::Nothing);
    assert_eq!(ask(now(301)), flush_soon);
    client.flush("u").await;
    // A delivery by link counts like one by rename, and is no important change.
    for i in 0..11 {
        let file = client.create(&format!("u/tmp/b{i}")).await.unwrap();
        client.write(file, 0, b"mail").await.unwrap();
        client.fsync(file).await.unwrap();
        client.close_file(file).await.unwrap();
        client.link(&format!("u/tmp/b{i}"), &format!("u/new/b{i}")).await.unwrap();
        client.unlink(&format!("u/tmp/b{i}")).await.unwrap();
        let want = if i < 10 { Due::Nothing } else { flush_soon };
        assert_eq!(ask(now(301)), want, "{i}");
    }
    // An expunge of one of these goes soon.
    client.unlink("u/new/b0").await.unwrap();
    assert_eq!(ask(now(2)), flush_soon);
    // A flush that fails leaves all of it due.
    world.store.set_down(true);
    assert!(flush::flush(&cell, Options::default()).await.is_err());
    world.store.set_down(false);
    assert_eq!(ask(now(2)), flush_soon);
    client.flush("u").await;
    // Flags: important, in their time.
    client.rename("u/new/b1", "u/cur/b1:2,S").await.unwrap();
    client.rename("u/cur/b1:2,S", "u/cur/b1:2,RS").await.unwrap();
    assert_eq!(ask(now(299)), Due::Nothing);
    assert_eq!(ask(now(301)), flush_soon);
}

/// I3: flags are important whatever call gives them: a client that sees a mail arrive and reads it
/// at once, one that stores a mail with flags, and a server that links its mails into place.
#[tokio::test]
async fn i3_flags_given_with_a_name_are_due_in_their_time() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    // What Dovecot derives from a mail at its delivery is no flag that anybody gave.
    client.put("u/dovecot-keywords", b"0 $HasAttachment\n1 work\n").await.unwrap();
    let cell = client.cell("u");
    for (name, from, to, linked, important) in [
        ("g", "u/tmp/g", "u/cur/g:2,a", false, false),
        ("h", "u/tmp/h", "u/cur/h:2,ab", false, true),
        ("i", "u/tmp/i", "u/cur/i:2,c", false, true),
        ("j", "u/tmp/j", "u/cur/j:2,a", true, false),
        ("a", "u/new/a", "u/cur/a:2,S", false, true),
        ("b", "u/tmp/b", "u/cur/b:2,S", false, true),
        ("c", "u/tmp/c", "u/cur/c:2,Fa", true, true),
        ("d", "u/new/d", "u/cur/d:2,", false, false),
        ("e", "u/tmp/e", "u/cur/e:2,", false, false),
        ("f", "u/tmp/f", "u/cur/f:2,", true, false),
    ] {
        match from.starts_with("u/new") {
            true => client.deliver("u", name, b"mail").await.unwrap(),
            false => client.put(from, b"mail").await.unwrap(),
        }
        client.flush("u").await;
        match linked {
            true => client.link(from, to).await.unwrap(),
            false => client.rename(from, to).await.unwrap(),
        }
        let due = cell.if_open(|user| due(user, user.boot() + Duration::from_secs(301))).unwrap();
        let want = if important { Due::Flush { caches: false } } else { Due::Nothing };
        assert_eq!(due, want, "{to}");
    }
}

/// The mount's root lists who exists, here and in the store, and an outage is no empty list.
#[tokio::test]
async fn i4_the_root_lists_the_users_that_exist() {
    let world = World::new();
    let client = world.session(HERE);
    for user in ["anna", "bert"] {
        client.maildir(&[user]).await;
    }
    client.close().await;
    let again = world.session(HERE);
    world.store.set_down(true);
    assert!(again.list("").await.is_err());
    world.store.set_down(false);
    assert_eq!(again.list("").await.unwrap(), ["anna", "bert"]);
    assert_eq!(again.stat("carl").await.map(|_| ()), Err(libc::ENOENT));
    again.mkdir("carl").await.unwrap();
    assert_eq!(again.mkdir("carl").await, Err(libc::EEXIST));
    assert_eq!(again.list("").await.unwrap(), ["anna", "bert", "carl"]);
}

/// A user that nobody knows is an error, and not one with nothing to upload; what an earlier
/// session left here is flushed without anybody else opening the user.
#[tokio::test]
async fn a_flush_by_name_knows_who_there_is() {
    use vmailfs::vmail::error::Error;
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let by_name = async |client: &Client, name: &str| {
        client.session().flush_user(name, Options::default()).await
    };
    let typo = by_name(&client, "typo").await;
    assert!(matches!(typo, Err(Error::NoUser { .. })), "{typo:?}");
    let elsewhere = world.session(FRESH);
    assert_eq!(by_name(&elsewhere, "u").await.unwrap(), None);
    drop(client);
    let client = world.session(HERE);
    assert!(by_name(&client, "u").await.unwrap().unwrap().flushed);
    drop(client);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/cur").await.unwrap(), ["1:2,S"]);
}

/// I3: a flush whose answer is lost counts as failed, and its head may hold. What is written after it
/// is known to be missing from that head, by whoever goes on from it.
#[tokio::test]
async fn i3_what_follows_a_flush_without_an_answer_is_not_taken_for_flushed() {
    for on in [HERE, REBOOTED] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        client.put("u/notes", b"one ").await.unwrap();
        client.flush("u").await;
        client.append("u/notes", b"two ").await.unwrap();
        world.faults(|r| match (r.op, r.key.ends_with("/head")) {
            (Op::Put, true) => Fault::After(down()),
            (_, true) => Fault::Before(down()),
            _ => Fault::None,
        });
        let cell = client.cell("u");
        flush::flush(&cell, Options::default()).await.unwrap_err();
        client.append("u/notes", b"three ").await.unwrap();
        drop((client, cell));
        world.no_faults();
        let again = world.session(on);
        assert_eq!(again.read("u/notes").await.unwrap(), b"one two three ");
        assert!(again.cell("u").open_user(|u| Ok(u.has_unflushed())).unwrap());
        again.append("u/notes", b"four ").await.unwrap();
        again.flush("u").await;
        drop(again);
        let fresh = world.session(FRESH);
        assert_eq!(fresh.read("u/notes").await.unwrap(), b"one two three four ");
    }
}

/// The name of one of many links to a mail.
fn many(mail: usize, n: usize) -> String {
    format!("u/new/{mail}.{n:04}.{}", "x".repeat(200))
}

/// How many names a folder of [`large_folder`] has.
const MANY: usize = 10 + 10 * 1500 - 201;

/// A user whose folder is large enough for its diffs to be worth reading: a base and two of them,
/// and the session that wrote them has ended. The first 200 names of mail 1 are gone, one of mail 2.
async fn large_folder(world: &World) {
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    for mail in 0..10 {
        client.deliver("u", &format!("{mail}"), b"mail").await.unwrap();
        for n in 0..1500 {
            client.link(&format!("u/new/{mail}"), &many(mail, n)).await.unwrap();
        }
    }
    client.flush("u").await;
    for n in 0..200 {
        client.unlink(&many(1, n)).await.unwrap();
    }
    client.flush("u").await;
    client.unlink(&many(2, 0)).await.unwrap();
    client.flush("u").await;
    client.close().await;
    let parts = longest_chain(world);
    assert_eq!(parts.len(), 3, "a base and two diffs");
    assert!(parts[0].raw_len > 4 << 20);
}

fn longest_chain(world: &World) -> Vec<PartRef> {
    let folders = world.head("u").folders;
    folders.into_iter().map(|f| f.parts).max_by_key(Vec::len).unwrap()
}

/// A session that finds a large folder's listing on its disk reads what the diffs hold, and does not write all
/// of the folder because it does not know.
#[tokio::test]
async fn a_later_session_writes_no_new_base_of_a_large_folder() {
    let world = World::new();
    large_folder(&world).await;
    let base = longest_chain(&world).remove(0);
    for gone in 0..3 {
        let client = world.session(HERE);
        client.unlink(&many(3, gone)).await.unwrap();
        client.flush("u").await;
        client.close().await;
        let now = longest_chain(&world);
        assert_eq!((now.len(), &now[0]), (3, &base), "the base is still the same");
    }
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap().len(), MANY - 3);
}

/// Where these diffs cannot be read, the flush does not wait for them: the folder is written whole,
/// with a warning, and the next flush of that session is a diff on top of it.
#[tokio::test]
async fn a_large_folder_whose_diffs_cannot_be_read_is_written_whole() {
    let world = World::new();
    large_folder(&world).await;
    let faults = [
        Fault::Before(down()),
        Fault::Before(vmailfs::store::StoreError::NotFound { key: "a bundle".into() }),
        // An answer, and of something else.
        Fault::WrongBody(bytes::Bytes::from(noise(1 << 20))),
    ];
    for (gone, fault) in faults.into_iter().enumerate() {
        let before = longest_chain(&world);
        let client = world.session(HERE);
        client.unlink(&many(3, gone)).await.unwrap();
        let refused = Arc::new(AtomicUsize::new(0));
        let (count, of) = (refused.clone(), before.clone());
        world.faults(move |r| {
            let diff = of[1..].iter().any(|part| r.key == bundle_key("u", part.bundle));
            if r.op == Op::Get && r.why.0 == "flush" && diff {
                count.fetch_add(1, SeqCst);
                return fault.clone();
            }
            Fault::None
        });
        let said = Said::default();
        let listening = said.listen();
        let report = client.flush("u").await;
        drop(listening);
        assert!(report.flushed && refused.load(SeqCst) > 0, "{report:?} {refused:?}");
        let now = longest_chain(&world);
        assert_eq!(now.len(), 1, "a base alone");
        assert_ne!(now[0], before[0]);
        assert_eq!(said.count("a folder is written anew as its diffs cannot be read"), 1);
        // What is known from here on needs no reading.
        for n in 0..200 {
            client.unlink(&many(4 + gone, n)).await.unwrap();
        }
        client.flush("u").await;
        client.unlink(&many(8, gone)).await.unwrap();
        client.flush("u").await;
        world.no_faults();
        client.close().await;
        let after = longest_chain(&world);
        assert_eq!((after.len(), &after[0]), (3, &now[0]), "two diffs on the new base");
    }
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap().len(), MANY - 3 * 202);
}
