//! Deaths and losses (I1, I3, I6): what is there afterwards, and that it is there once.

use super::full_disk::FullDisk;
use super::world::*;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmailfs::cache::disk::RealDisk;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;

/// I3: the death of the process loses nothing.
#[tokio::test]
async fn i3_a_dead_process_loses_nothing() {
    let world = World::new();
    let mut client = world.session(HERE);
    client.maildir(&["u", "u/.Sent"]).await;
    for round in 0..6 {
        client.deliver("u", &format!("m{round}"), b"mail").await.unwrap();
        client.link(&format!("u/new/m{round}"), &format!("u/.Sent/cur/c{round}")).await.unwrap();
        client.put("u/.Sent/notes", format!("notes {round}").as_bytes()).await.unwrap();
        client.replace("u/subscriptions", format!("Sent{round}\n").as_bytes()).await.unwrap();
        if round % 2 == 0 {
            client
                .rename(&format!("u/new/m{round}"), &format!("u/cur/m{round}:2,S"))
                .await
                .unwrap();
        }
        if round == 3 {
            client.flush("u").await;
            client.mkdir("u/.Made").await.unwrap();
        }
        drop(client);
        client = world.session(HERE);
        assert_eq!(client.list("u/cur").await.unwrap().len(), round / 2 + 1);
        assert_eq!(client.list("u/new").await.unwrap().len(), round.div_ceil(2));
        assert_eq!(client.list("u/.Sent/cur").await.unwrap().len(), round + 1);
        assert_eq!(client.stat(&format!("u/.Sent/cur/c{round}")).await.unwrap().nlink, 2);
        let notes = client.read("u/.Sent/notes").await.unwrap();
        assert_eq!(notes, format!("notes {round}").as_bytes());
        let subs = client.read("u/subscriptions").await.unwrap();
        assert_eq!(subs, format!("Sent{round}\n").as_bytes());
    }
    assert!(client.list("u").await.unwrap().contains(&".Made".to_string()));
}

/// I3: of deaths in the middle of an open, one after another, each leaves a note of the head that it
/// was about to swap in. The store's may be one of the notes before the last.
#[tokio::test]
async fn i3_an_open_that_dies_again_and_again_loses_nothing() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    client.put("u/notes", b"notes").await.unwrap();
    drop(client);
    // The first is done, and nobody hears of it; the second is not.
    for done in [true, false] {
        let put = AtomicBool::new(false);
        world.faults(move |r| match r.op {
            Op::Put if r.key.ends_with("/head") => {
                put.store(true, Ordering::SeqCst);
                if done { Fault::After(down()) } else { Fault::Before(down()) }
            }
            Op::Get if r.key.ends_with("/head") && put.load(Ordering::SeqCst) => {
                Fault::Before(down())
            }
            _ => Fault::None,
        });
        let client = world.session(HERE);
        client.read("u/notes").await.unwrap_err();
        drop(client);
        world.no_faults();
    }
    assert_eq!(world.session(HERE).read("u/notes").await.unwrap(), b"notes");
}

/// I3: the store's head may be a try of the last session that arrived when it had noted another.
#[tokio::test]
async fn i3_a_try_to_open_that_arrives_late_is_known_by_its_session() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    client.put("u/notes", b"notes").await.unwrap();
    drop(client);
    world.faults(|r| match r.op {
        Op::Put if r.key.ends_with("/head") => Fault::Before(down()),
        _ => Fault::None,
    });
    let client = world.session(HERE);
    client.read("u/notes").await.unwrap_err();
    drop(client);
    world.no_faults();
    let note = fs::read(find(&world.machine_dir(HERE), "head.next")).unwrap();
    let at = note.iter().position(|b| *b == b'\n').unwrap() + 1;
    let mut head = vmailfs::format::head::Head::decode(&note[at..]).unwrap();
    head.write_id = "f".repeat(32);
    let key = vmailfs::format::key::head_key("u");
    world.mem.damage(&key, head.encode());
    assert_eq!(world.session(HERE).read("u/notes").await.unwrap(), b"notes");
}

/// I3: of a session's heads the disk may know one before the store's, and have a note of one that
/// the store never got. What that would have flushed is not flushed.
#[tokio::test]
async fn i3_the_note_of_a_flush_that_failed_is_not_believed() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    let before = world.head("u").dropped;
    client.unlink("u/new/1").await.unwrap();
    world.faults(|r| match r.op {
        Op::Put if r.key.ends_with("/head") => Fault::Before(down()),
        _ => Fault::None,
    });
    let failed = vmailfs::vmail::flush::flush(&client.cell("u"), Default::default()).await;
    failed.unwrap_err();
    drop(client);
    world.no_faults();
    let mut head = world.head("u");
    head.write_id = "f".repeat(32);
    world.mem.damage(&vmailfs::format::key::head_key("u"), head.encode());
    let again = world.session(HERE);
    assert_eq!(again.list("u/new").await.unwrap(), [""; 0]);
    again.close().await;
    let dropped = world.head("u").dropped;
    assert_ne!(dropped, before, "a full listing would find the mail and name it again");
    assert_eq!(world.session(FRESH).list("u/new").await.unwrap(), [""; 0]);
}

/// I3: the table of links that came with the head is there again when the process died before
/// it wrote one of its own.
#[tokio::test]
async fn i3_links_of_the_head_survive_a_death() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.link("u/new/1", "u/.B/cur/copy").await.unwrap();
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.stat("u/new/1").await.unwrap().nlink, 2);
    drop(fresh);
    let again = world.session(FRESH);
    assert_eq!(again.stat("u/new/1").await.unwrap().nlink, 2);
    again.unlink("u/new/1").await.unwrap();
    assert_eq!(again.read("u/.B/cur/copy").await.unwrap(), b"mail");
    again.close().await;
    assert_eq!(world.session(HERE).read("u/.B/cur/copy").await.unwrap(), b"mail");
}

/// I3: what the journal said on top of a snapshot is in the next snapshot, when the journal is
/// begun anew.
#[tokio::test]
async fn i3_a_snapshot_takes_in_the_journal_before_it_ends() {
    let world = World::new();
    let mut client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.close().await;
    client = world.session(HERE);
    client.unlink("u/new/1").await.unwrap();
    client.deliver("u", "2", b"mail").await.unwrap();
    drop(client);
    // Reads the snapshot and the journal, changes nothing, and hands over.
    client = world.session(HERE);
    assert_eq!(client.list("u/new").await.unwrap(), ["2"]);
    client.close().await;
    assert_eq!(world.session(HERE).list("u/new").await.unwrap(), ["2"]);
}

/// I1, I3: the machine is lost: mails are there once, other changes as of the last flush.
#[tokio::test]
async fn i1_a_lost_machine_loses_no_mail() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.Archive"]).await;
    for i in 0..5 {
        client.deliver("u", &format!("old{i}"), b"old").await.unwrap();
    }
    client.flush("u").await;
    for i in 0..5 {
        client.deliver("u", &format!("new{i}"), b"new").await.unwrap();
    }
    client.rename("u/new/old0", "u/cur/old0:2,S").await.unwrap();
    client.rename("u/new/old1", "u/.Archive/cur/old1:2,").await.unwrap();
    client.link("u/new/old2", "u/.Archive/cur/copy").await.unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    let names = fresh.list("u/new").await.unwrap();
    assert_eq!(names.len(), 10, "{names:?}");
    assert!(fresh.list("u/.Archive/cur").await.unwrap().is_empty());
    for name in &names {
        let want: &[u8] = if name.starts_with("old") { b"old" } else { b"new" };
        assert_eq!(fresh.read(&format!("u/new/{name}")).await.unwrap(), want);
        assert_eq!(fresh.stat(&format!("u/new/{name}")).await.unwrap().nlink, 1);
    }
}

/// A MOVE is undone or done by a loss, never half: both folders are in one swap.
#[tokio::test]
async fn i3_a_move_is_in_both_folders_or_in_none() {
    for fail in [None, Some("bundle"), Some("head")] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u", "u/.B"]).await;
        client.deliver("u", "1", b"mail").await.unwrap();
        client.flush("u").await;
        client.rename("u/new/1", "u/.B/cur/1:2,").await.unwrap();
        if let Some(fail) = fail {
            world.faults(move |r| match (r.op, r.key.contains(fail)) {
                (Op::Put, true) => Fault::Before(down()),
                _ => Fault::None,
            });
            let cell = client.cell("u");
            assert!(vmailfs::vmail::flush::flush(&cell, Default::default()).await.is_err());
            world.no_faults();
        } else {
            client.flush("u").await;
        }
        drop(client);
        let fresh = world.session(FRESH);
        let (a, b) = (fresh.list("u/new").await.unwrap(), fresh.list("u/.B/cur").await.unwrap());
        let want = if fail.is_none() { (0, 1) } else { (1, 0) };
        assert_eq!((a.len(), b.len()), want, "{fail:?}");
    }
}

/// I1: a recovery that is interrupted, by an error or by death, is a recovery again and not
/// taken for the restart of a session that knew everything.
#[tokio::test]
async fn i1_an_interrupted_recovery_begins_again() {
    for dies in [false, true] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        client.flush("u").await;
        client.deliver("u", "1", b"mail").await.unwrap();
        drop(client);
        let failing = Arc::new(AtomicBool::new(true));
        let asked = failing.clone();
        world.faults(move |r| match (r.op, asked.load(Ordering::SeqCst)) {
            (Op::List, true) => Fault::Before(down()),
            _ => Fault::None,
        });
        let mut fresh = world.session(FRESH);
        assert_eq!(fresh.list("u/new").await, Err(libc::EAGAIN));
        failing.store(false, Ordering::SeqCst);
        if dies {
            drop(fresh);
            fresh = world.session(FRESH);
        }
        let names = fresh.list("u/new").await.unwrap();
        assert_eq!(names.len(), 1, "dies: {dies}");
        fresh.flush("u").await;
        drop(fresh);
        let last = world.session(On { machine: "third", ..FRESH });
        assert_eq!(last.list("u/new").await.unwrap(), names);
    }
}

/// I5, I6: while the mails of a lost session are looked for nobody is served, so no new mail is
/// taken for one of them.
#[tokio::test]
async fn i6_nothing_is_served_during_a_recovery() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    client.deliver("u", "1", b"mail").await.unwrap();
    drop(client);
    let gate = Arc::new(tokio::sync::Notify::new());
    let held = gate.clone();
    world.faults(move |r| match r.op {
        Op::List => Fault::HangBefore(held.clone()),
        _ => Fault::None,
    });
    let fresh = world.session(FRESH);
    let other = fresh.clone();
    let one = tokio::spawn(async move { other.list("u/new").await });
    let other = fresh.clone();
    let two = tokio::spawn(async move { other.deliver("u", "2", b"second").await });
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    assert!(!one.is_finished() && !two.is_finished());
    assert_eq!(world.mails().len(), 1);
    // A flush that somebody asks for would move the watermark past what is looked for.
    if let Some(cell) = fresh.session().known_user("u") {
        let other = tokio::spawn(async move {
            vmailfs::vmail::flush::flush(&cell, Default::default()).await.map(|r| r.flushed)
        });
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        other.abort();
    }
    assert!(world.head("u").watermark.epoch.0 == 1);
    world.no_faults();
    gate.notify_one();
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
    assert_eq!(fresh.list("u/new").await.unwrap().len(), 2);
    fresh.flush("u").await;
    drop(fresh);
    let last = world.session(On { machine: "third", ..FRESH });
    assert_eq!(last.list("u/new").await.unwrap().len(), 2);
}

/// I3: a rename that was done is not done once more over its target, when the next lock file
/// already has the old name.
#[tokio::test]
async fn i3_the_last_rename_is_not_repeated_with_another_file() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.replace("u/dovecot-uidlist", b"3 V1 N2 Gabc\n1 :a\n").await.unwrap();
    let half = client.create("u/dovecot-uidlist.lock").await.unwrap();
    client.write(half, 0, b"3 V").await.unwrap();
    drop(client);
    let again = world.session(HERE);
    assert_eq!(again.read("u/dovecot-uidlist").await.unwrap(), b"3 V1 N2 Gabc\n1 :a\n");
    assert_eq!(again.stat("u/dovecot-uidlist.lock").await.map(|_| ()), Err(libc::ENOENT));
}

/// A mail that is safe under a temporary name when the last flush is cut, and delivered after,
/// is found after a loss.
#[tokio::test]
async fn i1_a_mail_flushed_under_its_temporary_name_comes_back() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let file = client.create("u/tmp/1").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    client.fsync(file).await.unwrap();
    client.flush("u").await;
    client.close_file(file).await.unwrap();
    client.rename("u/tmp/1", "u/new/1").await.unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    let names = fresh.list("u/new").await.unwrap();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(fresh.read(&format!("u/new/{}", names[0])).await.unwrap(), b"mail");
    assert!(fresh.list("u/tmp").await.unwrap().is_empty());
    fresh.flush("u").await;
    drop(fresh);
    let last = world.session(On { machine: "third", ..FRESH });
    assert_eq!(last.list("u/new").await.unwrap(), names);
}

/// A mail that was linked into place, and whose temporary name stayed when its other one went, is safe
/// under a temporary name like any other: no recovery may leave it where nobody looks, whichever
/// folder's flush took note of the other name's end.
#[tokio::test]
async fn i1_a_mail_that_keeps_only_its_temporary_name_comes_back() {
    for (other, flushes) in [("u/new/1", 1), ("u/.F/cur/1", 1), ("u/.F/cur/1", 2)] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u", "u/.F"]).await;
        let file = client.create("u/tmp/1").await.unwrap();
        client.write(file, 0, b"mail").await.unwrap();
        client.fsync(file).await.unwrap();
        client.close_file(file).await.unwrap();
        client.link("u/tmp/1", other).await.unwrap();
        if flushes > 1 {
            client.flush("u").await;
        }
        client.unlink(other).await.unwrap();
        client.flush("u").await;
        drop(client);
        let fresh = world.session(FRESH);
        let names = fresh.list("u/new").await.unwrap();
        assert_eq!(names.len(), 1, "{other} {flushes}: {names:?}");
        assert_eq!(fresh.read(&format!("u/new/{}", names[0])).await.unwrap(), b"mail");
        assert!(fresh.list("u/tmp").await.unwrap().is_empty());
        assert!(fresh.list("u/.F/cur").await.unwrap().is_empty());
    }
}

/// A temporary name beside another one is left alone by a recovery: the mail shows once.
#[tokio::test]
async fn i1_a_temporary_name_beside_another_makes_no_second_mail() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u", "u/.F"]).await;
    let file = client.create("u/tmp/1").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    client.fsync(file).await.unwrap();
    client.close_file(file).await.unwrap();
    client.link("u/tmp/1", "u/.F/cur/1").await.unwrap();
    client.flush("u").await;
    drop(client);
    let fresh = world.session(FRESH);
    assert!(fresh.list("u/new").await.unwrap().is_empty());
    assert_eq!(fresh.list("u/tmp").await.unwrap(), ["1"]);
    assert_eq!(fresh.list("u/.F/cur").await.unwrap(), ["1"]);
}

/// I1: a file whose descriptor is closed in a child process while its mail is still being written
/// is published half-written, and again when it is whole. That is one mail.
#[tokio::test]
async fn i1_a_mail_published_before_it_was_whole_comes_back_once() {
    for flush in [false, true] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        client.flush("u").await;
        let file = client.create("u/tmp/1").await.unwrap();
        client.write(file, 0, b"half").await.unwrap();
        client.fsync(file).await.unwrap();
        if flush {
            client.flush("u").await;
        }
        client.write(file, 4, b" and whole").await.unwrap();
        client.fsync(file).await.unwrap();
        client.close_file(file).await.unwrap();
        client.rename("u/tmp/1", "u/new/1").await.unwrap();
        drop(client);
        let fresh = world.session(FRESH);
        let names = fresh.list("u/new").await.unwrap();
        assert_eq!(names.len(), 1, "{names:?}");
        assert_eq!(fresh.read(&format!("u/new/{}", names[0])).await.unwrap(), b"half and whole");
    }
}

/// I3: after a power cut with the disk kept what was synced is there, also if the flush had
/// got further than the journal on the disk.
#[tokio::test]
async fn i3_a_reboot_keeps_what_was_synced() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.put("u/sieve.script", b"").await.unwrap();
    client.flush("u").await;
    let journal = find(&world.machine_dir(HERE).join("state/users"), "journal");
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    client.fsync_dir("u/cur").await.unwrap();
    assert_eq!(disk.on_disk(&journal), Some(fs::read(&journal).unwrap()), "by a directory");
    client.deliver("u", "2", b"mail").await.unwrap();
    client.append("u/sieve.script", b"keep;").await.unwrap();
    let script = client.open("u/sieve.script", WRITE).await.unwrap();
    client.fsync(script).await.unwrap();
    assert_eq!(disk.on_disk(&journal), Some(fs::read(&journal).unwrap()), "by a file");
    client.write(script, 5, b"stop;").await.unwrap();
    client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await.unwrap();
    // The power goes: of these two files there is what was synced.
    let path = world.machine_dir(HERE).join("meta/u/sieve.script");
    drop(client);
    for path in [journal, path] {
        fs::write(&path, disk.on_disk(&path).unwrap()).unwrap();
    }
    let again = world.session(REBOOTED);
    assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,S"]);
    assert_eq!(again.list("u/new").await.unwrap(), ["2"]);
    assert_eq!(again.read("u/sieve.script").await.unwrap(), b"keep;");
}

/// I1: with a mail in a folder that no head knows its folder goes to the store, as clients saw it.
#[tokio::test]
async fn i1_a_mail_in_a_new_folder_takes_the_folder_along() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    client.maildir(&["u/.New"]).await;
    let list = b"3 V1234 N1 Gabcdef0123456789abcdef0123456789\n";
    client.replace("u/.New/dovecot-uidlist", list).await.unwrap();
    client.deliver("u/.New", "1", b"mail").await.unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/.New/new").await.unwrap().len(), 1);
    let list = fresh.read("u/.New/dovecot-uidlist").await.unwrap();
    assert!(list.starts_with(b"3 V1234 "), "{}", String::from_utf8_lossy(&list));
}

/// I1: a mail is safe without the journal on the disk: a power cut that takes all that was not synced
/// brings it back from the store, and what was synced before stays.
#[tokio::test]
async fn i1_a_publish_does_not_wait_for_the_journals_sync() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"first").await.unwrap();
    client.flush("u").await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    client.fsync_dir("u/cur").await.unwrap();
    let journal = find(&world.machine_dir(HERE).join("state"), "journal");
    let synced = disk.on_disk(&journal).unwrap();
    // The journal cannot be synced at all meanwhile.
    disk.fail_syncs_of("journal", usize::MAX);
    for n in ["2", "3"] {
        client.deliver("u", n, n.as_bytes()).await.unwrap();
    }
    assert!(fs::read(&journal).unwrap().len() > synced.len());
    drop(client);
    fs::write(&journal, synced).unwrap();
    let again = world.session(REBOOTED);
    assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,S"]);
    let names = again.list("u/new").await.unwrap();
    assert_eq!(names.len(), 2, "{names:?}");
    let mut bodies = Vec::new();
    for name in &names {
        bodies.push(again.read(&format!("u/new/{name}")).await.unwrap());
    }
    bodies.sort();
    assert_eq!(bodies, [b"2", b"3"]);
}

/// And the journal is synced all the same, soon.
#[tokio::test]
async fn i3_what_a_publish_did_not_wait_for_follows() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.flush("u").await;
    client.deliver("u", "1", b"first").await.unwrap();
    let journal = find(&world.machine_dir(HERE).join("state"), "journal");
    assert_ne!(disk.on_disk(&journal), Some(fs::read(&journal).unwrap()));
    // The first time fails: the next look writes it anew.
    disk.fail_syncs_of("journal", 1);
    let ticks = tokio::spawn(vmailfs::vmail::schedule::run(client.session().clone()));
    for _ in 0..1000 {
        world.clock.advance(Duration::from_secs(1));
        tokio::task::yield_now().await;
        let journal = find(&world.machine_dir(HERE).join("state"), "journal");
        if disk.on_disk(&journal) == Some(fs::read(&journal).unwrap()) {
            ticks.abort();
            return;
        }
    }
    panic!("the journal never got to the disk");
}

/// I1: a power cut that takes the name which a delivered mail was given, and leaves the one under which
/// it was made safe: nobody but the delivery that is gone looks there, so it gets a name in `new/`.
#[tokio::test]
async fn i1_a_mail_that_a_power_cut_leaves_in_tmp_gets_a_name() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    let file = client.create("u/tmp/1").await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    client.fsync(file).await.unwrap();
    client.close_file(file).await.unwrap();
    let journal = find(&world.machine_dir(HERE).join("state"), "journal");
    let synced = fs::metadata(&journal).unwrap().len();
    client.rename("u/tmp/1", "u/new/1").await.unwrap();
    drop(client);
    fs::OpenOptions::new().write(true).open(&journal).unwrap().set_len(synced).unwrap();
    let again = world.session(REBOOTED);
    let names = again.list("u/new").await.unwrap();
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(again.list("u/tmp").await.unwrap().is_empty());
    assert_eq!(again.read(&format!("u/new/{}", names[0])).await.unwrap(), b"mail");
}

/// I3: a checkpoint's snapshot is on the disk, the journal that it was made from is not to its end, and
/// the power is cut: what is left of the journal counts, also at the start after the next.
#[tokio::test]
async fn i3_a_snapshot_that_is_newer_than_the_journal_is_not_used() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    for n in ["1", "2"] {
        client.deliver("u", n, b"mail").await.unwrap();
    }
    client.flush("u").await;
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    client.link("u/cur/1:2,S", "u/cur/copy").await.unwrap();
    let file = client.create("u/tmp/3").await.unwrap();
    client.fsync(file).await.unwrap();
    client.close_file(file).await.unwrap();
    let dir = client.cell("u").open_user(|u| Ok(u.state_dir.clone())).unwrap();
    let synced = fs::read(dir.join("journal")).unwrap();
    client.rename("u/new/2", "u/cur/2:2,F").await.unwrap();
    client.unlink("u/cur/copy").await.unwrap();
    client.cell("u").open_user(|u| u.checkpoint()).unwrap();
    drop(client);
    fs::write(dir.join("journal"), &synced).unwrap();
    let again = world.session(REBOOTED);
    assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,S", "copy"]);
    assert_eq!(again.stat("u/cur/copy").await.unwrap().nlink, 2);
    let new = again.list("u/new").await.unwrap();
    assert!(new.contains(&"2".to_owned()), "{new:?}");
    again.rename("u/new/2", "u/cur/2:2,R").await.unwrap();
    drop(again);
    let last = world.session(REBOOTED);
    assert_eq!(last.list("u/cur").await.unwrap(), ["1:2,S", "2:2,R", "copy"]);
    assert_eq!(last.stat("u/cur/copy").await.unwrap().nlink, 2);
}

/// I3: of a journal whose unsynced end is damaged by a power cut the synced part counts.
#[tokio::test]
async fn i3_a_power_cut_may_tear_the_end_of_the_journal() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let journal = find(&world.machine_dir(HERE).join("state"), "journal");
    let synced = fs::metadata(&journal).unwrap().len() as usize;
    client.put("u/a", b"x").await.unwrap();
    client.put("u/b", b"y").await.unwrap();
    drop(client);
    let mut bytes = fs::read(&journal).unwrap();
    bytes[synced + 30..synced + 60].fill(0);
    fs::write(&journal, bytes).unwrap();
    let again = world.session(REBOOTED);
    assert_eq!(again.list("u/cur").await.unwrap(), ["1:2,S"]);
}

/// A journal that is damaged while the machine lives holds what the store does not have: that
/// user's mail is deferred until a person decides, and others go on.
#[tokio::test]
async fn i9_a_damaged_journal_is_its_users_alone() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.maildir(&["v"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.deliver("v", "1", b"mail").await.unwrap();
    drop(client);
    let journal = find(&world.machine_dir(HERE).join("state/users"), "journal");
    let mut bytes = fs::read(&journal).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    fs::write(&journal, bytes).unwrap();
    let (bad, good) = match journal.parent().unwrap().ends_with("u") {
        true => ("u/new", "v/new"),
        false => ("v/new", "u/new"),
    };
    let again = world.session(HERE);
    assert_eq!(again.list(bad).await, Err(libc::EAGAIN));
    let (user, file) = (bad.split('/').next().unwrap(), "journal");
    let told = again.session().unserved.all();
    assert!(told.iter().any(|d| d.user == user && d.error.contains(file)), "{told:?}");
    assert_eq!(again.list(good).await.unwrap().len(), 1);
}

/// The first file of a name below a directory, in order.
fn find(dir: &std::path::Path, name: &str) -> std::path::PathBuf {
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let mut all: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        for path in all.into_iter().rev() {
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().unwrap() == name {
                return path;
            }
        }
    }
    panic!("no {name}");
}

/// I3: after a sync of the journal that failed, the next one proves nothing: the journal is written
/// anew before anything is called safe.
#[tokio::test]
async fn i3_a_journal_whose_sync_failed_is_written_anew() {
    use std::os::unix::fs::MetadataExt;
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    let journal = client.cell("u").open_user(|u| Ok(u.state_dir.join("journal"))).unwrap();
    let before = std::fs::metadata(&journal).unwrap().ino();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let mail = client.create("u/tmp/2").await.unwrap();
    client.write(mail, 0, b"second").await.unwrap();
    client.fsync(mail).await.unwrap();
    disk.fail_next_sync();
    assert_eq!(client.fsync_dir("u/cur").await, Err(libc::EAGAIN));
    assert_eq!(std::fs::metadata(&journal).unwrap().ino(), before);
    client.fsync_dir("u/cur").await.unwrap();
    assert_ne!(std::fs::metadata(&journal).unwrap().ino(), before);
    client.close_file(mail).await.unwrap();
    client.rename("u/tmp/2", "u/new/2").await.unwrap();
    // A flush, too, asks for the journal on the disk.
    client.rename("u/cur/1:2,S", "u/cur/1:2,RS").await.unwrap();
    disk.fail_next_sync();
    let cell = client.cell("u");
    assert!(vmailfs::vmail::flush::flush(&cell, Default::default()).await.is_err());
    client.flush("u").await;
    client.rename("u/new/2", "u/cur/2:2,S").await.unwrap();
    drop((client, cell));
    let client = world.session(HERE);
    assert_eq!(client.list("u/cur").await.unwrap(), ["1:2,RS", "2:2,S"]);
}

/// I1, I3: a journal that was begun anew, and whose name could not be synced, is the one that the next
/// start reads: what is recorded from then on goes into it, and counts as safe only under a name
/// that is on the disk.
#[tokio::test]
async fn i3_a_journal_whose_name_cannot_be_synced_takes_what_follows() {
    use std::os::unix::fs::MetadataExt;
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    let cell = client.cell("u");
    disk.fail_next_dir();
    assert!(cell.open_user(|user| user.checkpoint()).is_err());
    let journal = cell.open_user(|u| Ok(u.state_dir.join("journal"))).unwrap();
    let before = std::fs::metadata(&journal).unwrap().ino();
    client.fsync_dir("u/cur").await.unwrap();
    assert_ne!(std::fs::metadata(&journal).unwrap().ino(), before, "not said of a name in doubt");
    disk.fail_next_dir();
    assert!(cell.open_user(|user| user.checkpoint()).is_err());
    client.deliver("u", "2", b"second").await.unwrap();
    client.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    drop((client, cell));
    let client = world.session(HERE);
    assert_eq!(client.list("u/cur").await.unwrap(), ["1:2,S"]);
    assert_eq!(client.read("u/new/2").await.unwrap(), b"second");
}

/// I3: a process that dies after a sync failed tells nobody. The next one finds pages that never
/// reach the disk, and a sync of them that says success: it makes safe only what it wrote anew.
#[tokio::test]
async fn i3_a_sync_that_failed_before_a_death_is_not_trusted_after_it() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let start = || world.session_with(world.settings(HERE), disk.clone());
    let client = start();
    client.maildir(&["u"]).await;
    client.put("u/dovecot.index.log", b"one").await.unwrap();
    let log = client.open("u/dovecot.index.log", WRITE).await.unwrap();
    client.write(log, 3, b"two").await.unwrap();
    disk.fail_syncs_of("dovecot.index.log", 1);
    disk.fail_syncs_of("journal", 1);
    disk.set_full(true);
    assert!(client.fsync(log).await.is_err());
    disk.set_full(false);
    let path = world.machine_dir(HERE).join("meta/u/dovecot.index.log");
    let journal = find(&world.machine_dir(HERE).join("state/users"), "journal");
    drop(client);

    let client = start();
    let log = client.open("u/dovecot.index.log", WRITE).await.unwrap();
    client.write(log, 6, b"three").await.unwrap();
    client.fsync(log).await.unwrap();
    assert_eq!(disk.on_disk(&path).as_deref(), Some(&b"onetwothree"[..]));
    assert_eq!(disk.on_disk(&journal), Some(fs::read(&journal).unwrap()));
}

/// I3: the same for an index file: what an fsync of it said is safe is on the disk, whatever an
/// earlier one lost; and one that cannot be made safe says so for as long as that is so.
#[tokio::test]
async fn i3_a_file_whose_sync_failed_is_written_anew() {
    let world = World::new();
    let disk = Arc::new(FullDisk::new(Arc::new(RealDisk)));
    let client = world.session_with(world.settings(HERE), disk.clone());
    client.maildir(&["u"]).await;
    let path = world.machine_dir(HERE).join("meta/u/dovecot.index.log");
    let log = client.create("u/dovecot.index.log").await.unwrap();
    client.write(log, 0, b"one").await.unwrap();
    client.fsync(log).await.unwrap();
    assert_eq!(disk.on_disk(&path).unwrap(), b"one");

    // The disk has room for a copy: nobody hears of it.
    client.write(log, 3, b"two").await.unwrap();
    disk.fail_syncs_of("dovecot.index.log", 1);
    client.fsync(log).await.unwrap();
    assert_eq!(disk.on_disk(&path).unwrap(), b"onetwo");
    client.write(log, 6, b"three").await.unwrap();
    client.fsync(log).await.unwrap();
    assert_eq!(disk.on_disk(&path).unwrap(), b"onetwothree", "the handle goes on in the new file");

    // It has none: deferred, and not forgotten when a later sync of the old file says success.
    client.write(log, 11, b"four").await.unwrap();
    let other = client.open("u/dovecot.index.log", WRITE).await.unwrap();
    let copy = format!(".new.i{}.0", log.ino);
    disk.fail_syncs_of(&copy, 1);
    disk.set_full(true);
    assert_eq!(client.fsync(log).await, Err(libc::ENOSPC));
    assert_eq!(client.fsync(log).await, Err(libc::ENOSPC));
    assert_eq!(client.fsync(other).await, Err(libc::ENOSPC), "nor through another descriptor");
    assert_eq!(disk.on_disk(&path).unwrap(), b"onetwothree");
    disk.set_full(false);
    disk.fail_syncs_of(&copy, 1);
    client.close_file(log).await.unwrap();
    assert_eq!(client.fsync(other).await, Err(libc::EAGAIN), "the copy is on the same disk");
    assert_eq!(client.read("u/dovecot.index.log").await.unwrap(), b"onetwothreefour");
    client.fsync(other).await.unwrap();
    assert_eq!(disk.on_disk(&path).unwrap(), b"onetwothreefour");
    client.append("u/dovecot.index.log", b"five").await.unwrap();
    client.fsync(other).await.unwrap();
    assert_eq!(disk.on_disk(&path).unwrap(), b"onetwothreefourfive");
    let left: Vec<_> =
        fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with(".new")), "{left:?}");
    // And it is what a flush and the next start find.
    client.close_file(other).await.unwrap();
    client.flush("u").await;
    drop(client);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.read("u/dovecot.index.log").await.unwrap(), b"onetwothreefourfive");
}

/// I3: a process dies between a rename and the next record, and so does the one that follows it,
/// which has made a file under the old name again: the rename is not done once more.
#[tokio::test]
async fn i3_a_rename_is_not_done_again_by_the_second_start() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.put("u/subscriptions.lock", b"first").await.unwrap();
    client.rename("u/subscriptions.lock", "u/subscriptions").await.unwrap();
    drop(client);
    let second = world.session(HERE);
    second.put("u/subscriptions.lock", b"the second's, not finished").await.unwrap();
    drop(second);
    let third = world.session(HERE);
    assert_eq!(third.read("u/subscriptions").await.unwrap(), b"first");
}

/// I2, I3: an append to a uidlist reached the disk with a hole in it. The list stays, up to the line
/// that Dovecot would not read; one that lost what the last flush has comes back from there.
#[tokio::test]
async fn i2_a_uidlist_is_cut_where_dovecot_would_throw_it_away() {
    let list = "3 V1700000000 N1 G01\n1 :a\n2 :b\n";
    for (left, want) in [
        (format!("{list}\0\0\0\0c.host,S=4\n4 :d\n"), "1 :a\n2 :b\n"),
        (format!("{list}3 :c\n"), "1 :a\n2 :b\n3 :c\n"),
        ("3 V1700000000 N1 G01\n1 :a\n\0\0:b\n3 :c\n".into(), "1 :a\n2 :b\n"),
    ] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        client.put("u/dovecot-uidlist", list.as_bytes()).await.unwrap();
        client.flush("u").await;
        client.append("u/dovecot-uidlist", b"3 :c.host,S=4\n4 :d\n").await.unwrap();
        drop(client);
        let file = world.machine_dir(HERE).join("meta/u/dovecot-uidlist");
        fs::write(&file, &left).unwrap();
        let again = world.session(REBOOTED);
        let found = String::from_utf8(again.read("u/dovecot-uidlist").await.unwrap()).unwrap();
        let (header, lines) = found.split_once('\n').unwrap();
        assert_eq!(lines, want, "{left:?}");
        let next = header.strip_prefix("3 V1700000000 N").and_then(|h| h.strip_suffix(" G01"));
        assert!(next.unwrap().parse::<u32>().unwrap() >= 1003, "{header}");
    }
}

fn root_ceiling(world: &World) -> Option<u32> {
    let head = world.head("u");
    head.folders.iter().find(|f| f.id == vmailfs::format::FolderId::ROOT).unwrap().uid_ceiling
}

/// I2: the UIDs of a new folder, whose UIDVALIDITY was synced and which no head knows yet.
#[tokio::test]
async fn i2_a_power_cut_does_not_give_the_first_uids_again() {
    for flushed in [false, true] {
        let world = World::new();
        let client = world.session(HERE);
        client.maildir(&["u"]).await;
        if flushed {
            client.flush("u").await;
        }
        client.put("u/dovecot-uidlist", b"3 V1700000000 N1 G01\n").await.unwrap();
        client.append("u/dovecot-uidlist", b"1 :a\n2 :b\n").await.unwrap();
        drop(client);
        let file = world.machine_dir(HERE).join("meta/u/dovecot-uidlist");
        fs::write(&file, b"3 V1700000000 N1 G01\n1 :a\n").unwrap();
        let again = world.session(REBOOTED);
        let found = again.read("u/dovecot-uidlist").await.unwrap();
        assert_eq!(String::from_utf8(found).unwrap(), "3 V1700000000 N1000 G01\n1 :a\n");
        // Beyond them a head must know that they were given.
        again.append("u/dovecot-uidlist", b"1000 :b\n").await.unwrap();
        assert_eq!(root_ceiling(&world), Some(2001));
    }
}

/// I2: nor does it matter how many they are.
#[tokio::test]
async fn i2_many_first_uids_wait_for_a_ceiling() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    client.put("u/dovecot-uidlist", b"3 V1700000000 N1 G01\n").await.unwrap();
    assert_eq!(root_ceiling(&world), None);
    client.append("u/dovecot-uidlist", b"7000 :a\n").await.unwrap();
    assert!(root_ceiling(&world) > Some(7000));
    // Without the store no such UID is given.
    client.mkdir("u/.New").await.unwrap();
    client.put("u/.New/dovecot-uidlist", b"3 V1700000001 N1 G02\n").await.unwrap();
    world.store.set_down(true);
    client.append("u/.New/dovecot-uidlist", b"999 :a\n").await.unwrap();
    assert_eq!(client.append("u/.New/dovecot-uidlist", b"1000 :b\n").await, Err(libc::EAGAIN));
}
