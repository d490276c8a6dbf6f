//! Deleting from the store (I6): nothing leaves it early, whatever dies in between, and nothing
//! that was once safe is taken for garbage.

use super::world::*;
use std::collections::HashSet;
use std::time::Duration;
use vmailfs::format::ObjectId;
use vmailfs::format::journal::Change;
use vmailfs::format::part::DroppedList;
use vmailfs::store::faulty::Fault;
use vmailfs::store::{Body, ObjectStore, Op, PutMode, Reason};
use vmailfs::vmail::gc::{self, Options, Report};
use vmailfs::vmail::{dropped, error::Error};

const DAY: Duration = Duration::from_secs(24 * 3600);
const ASKED: Options = Options { dry_run: false, scan: false, unasked: false };
const DRY: Options = Options { dry_run: true, ..ASKED };
const SCAN: Options = Options { scan: true, ..ASKED };

async fn collect(client: &Client, options: Options) -> Report {
    gc::collect(&client.cell("u"), options).await.unwrap()
}

async fn dropped_list(client: &Client) -> DroppedList {
    let cell = client.cell("u");
    let parts = cell.open_user(|user| Ok(user.head.dropped.clone())).unwrap();
    dropped::read(&cell, &parts, Reason("test")).await.unwrap()
}

/// A user with mails `0` to `n`, all flushed.
async fn mailbox(world: &World, n: usize) -> Client {
    let client = world.session(HERE);
    client.maildir(&["u", "u/.B"]).await;
    for i in 0..n {
        client.deliver("u", &i.to_string(), b"mail").await.unwrap();
    }
    client.flush("u").await;
    client
}

/// I6: retention counts from the flush that stopped naming the mail, and is not over before it
/// is over.
#[tokio::test]
async fn i6_what_is_dropped_stays_for_its_retention() {
    let world = World::new();
    let client = mailbox(&world, 3).await;
    client.unlink("u/new/1").await.unwrap();
    // Not on the list yet: nothing may be said of it, however much later.
    world.clock.advance(DAY * 30);
    collect(&client, ASKED).await;
    assert_eq!(world.mails().len(), 3);
    client.flush("u").await;
    world.clock.advance(DAY * 7 - Duration::from_secs(60));
    let report = collect(&client, ASKED).await;
    assert_eq!((report.mails, world.mails().len()), (0, 3));
    assert!(report.kept > 0 && report.next_due.is_some());
    world.clock.advance(Duration::from_secs(61));
    let before = world.mem.keys();
    let report = collect(&client, DRY).await;
    assert_eq!((report.mails, world.mem.keys()), (1, before));
    let report = collect(&client, ASKED).await;
    assert_eq!((report.mails, world.mails().len()), (1, 2));
    assert!(report.bundles > 0);
    // Again: there is nothing to do, and the list is empty of it after the next flush.
    world.requests();
    assert_eq!(collect(&client, ASKED).await.deleted(), 0);
    assert!(world.requests().iter().all(|(op, ..)| *op == Op::Get));
    client.deliver("u", "9", b"mail").await.unwrap();
    client.flush("u").await;
    assert!(dropped_list(&client).await.iter().all(|at| !at.doomed));
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap(), ["0", "2", "9"]);
    for name in ["0", "2", "9"] {
        assert_eq!(fresh.read(&format!("u/new/{name}")).await.unwrap(), b"mail");
    }
}

/// I6: it is the store's clock that counts: a machine whose clock runs ahead deletes nothing
/// early, one that lags behind dates nothing too early.
#[tokio::test]
async fn i6_retention_is_by_the_stores_clock() {
    let world = World::new();
    let client = mailbox(&world, 1).await;
    // The machine's clock is years behind the store's when the mail is dropped.
    world.skew(Duration::from_secs(3 * 365 * 24 * 3600));
    client.unlink("u/new/0").await.unwrap();
    client.flush("u").await;
    collect(&client, ASKED).await;
    assert_eq!(world.mails().len(), 1);
    // Ten days by the machine's, none by the store's.
    world.freeze_store_clock(true);
    world.clock.advance(DAY * 10);
    collect(&client, ASKED).await;
    assert_eq!(world.mails().len(), 1);
    world.freeze_store_clock(false);
    world.clock.advance(DAY * 7);
    collect(&client, ASKED).await;
    assert!(world.mails().is_empty());
}

/// I6: a mail that was copied is not dropped with the first of its names.
#[tokio::test]
async fn i6_a_mail_with_another_name_stays() {
    let world = World::new();
    let client = mailbox(&world, 1).await;
    client.link("u/new/0", "u/.B/cur/copy").await.unwrap();
    client.flush("u").await;
    client.unlink("u/new/0").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    assert_eq!(collect(&client, SCAN).await.mails, 0);
    assert_eq!(client.read("u/.B/cur/copy").await.unwrap(), b"mail");
    client.unlink("u/.B/cur/copy").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    assert_eq!(collect(&client, SCAN).await.mails, 1);
    assert!(world.mails().is_empty());
}

/// I6: a death at every request of a gc: before it, and after it with the answer lost. What was
/// doomed is deleted by the next one; what was not is as it was; nothing else is touched.
#[tokio::test]
async fn i6_a_gc_may_die_anywhere() {
    for after in [false, true] {
        for nth in 0.. {
            let world = World::new();
            let client = mailbox(&world, 4).await;
            client.unlink("u/new/1").await.unwrap();
            client.unlink("u/new/2").await.unwrap();
            client.flush("u").await;
            world.clock.advance(DAY * 8);
            let seen = std::sync::atomic::AtomicUsize::new(0);
            world.faults(move |r| {
                let mine = r.why.0 == "gc" && {
                    seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst) >= nth
                };
                match (mine, after) {
                    (true, true) => Fault::After(down()),
                    (true, false) => Fault::Before(down()),
                    _ => Fault::None,
                }
            });
            let done = gc::collect(&client.cell("u"), ASKED).await;
            world.no_faults();
            // Killed on the spot, or it goes on.
            let client = if nth % 2 == 0 {
                drop(client);
                world.session(if after { FRESH } else { HERE })
            } else {
                client
            };
            assert_eq!(client.list("u/new").await.unwrap(), ["0", "3"]);
            let again = collect(&client, ASKED).await;
            assert_eq!(world.mails().len(), 2, "request {nth}, {again:?}");
            client.deliver("u", "4", b"mail").await.unwrap();
            client.flush("u").await;
            let report = collect(&client, SCAN).await;
            assert_eq!((report.adopted.len(), report.late.len()), (0, 0), "{report:?}");
            client.close().await;
            let last = world.session(On { machine: "last", ..FRESH });
            for name in ["0", "3", "4"] {
                assert_eq!(last.read(&format!("u/new/{name}")).await.unwrap(), b"mail");
            }
            if done.is_ok() {
                assert!(nth > 3);
                break;
            }
        }
    }
}

/// I6: another backend takes the user over between the mark and the deletion: it sees what is
/// doomed and does not name it; the deletion that arrives then harms nothing.
#[tokio::test]
async fn i6_a_takeover_between_mark_and_deletion() {
    let world = World::new();
    let client = mailbox(&world, 2).await;
    client.unlink("u/new/0").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let held = gate.clone();
    world.faults(move |r| match (r.op, r.why.0) {
        (Op::Delete, "gc") => Fault::HangBefore(held.clone()),
        _ => Fault::None,
    });
    let cell = client.cell("u");
    let slow = tokio::spawn(async move { gc::collect(&cell, ASKED).await });
    while !world.log.lock().iter().any(|r| r.0 == Op::Delete && r.2 == "gc") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    world.no_faults();
    let rival = world.session(On { backend: "b", ..FRESH });
    assert_eq!(rival.list("u/new").await.unwrap(), ["1"]);
    let list = dropped_list(&rival).await;
    let at = list.iter().find(|at| at.doomed && gc::key("u", &at.object).contains("/mail/"));
    let tail = match &at.unwrap().object {
        vmailfs::format::part::Dropped::Mail(tail) => tail.clone(),
        other => panic!("{other:?}"),
    };
    assert!(matches!(dropped::again(&list, &tail), Err(Error::Refused(_))));
    assert_eq!(world.mails().len(), 2);
    gate.notify_one();
    slow.await.unwrap().unwrap();
    assert_eq!(world.mails().len(), 1);
    // The old owner finds out, and deletes nothing from then on.
    client.deliver("u", "2", b"mail").await.unwrap();
    let cell = client.cell("u");
    assert!(vmailfs::vmail::flush::flush(&cell, Default::default()).await.is_err());
    assert!(matches!(gc::collect(&cell, ASKED).await, Err(Error::Lost { .. })));
    // The new one does what is left, which is gone already.
    collect(&rival, ASKED).await;
    rival.flush("u").await;
    assert_eq!(rival.read("u/new/1").await.unwrap(), b"mail");
}

/// I5, I6: without a lease nothing is deleted.
#[tokio::test]
async fn i6_no_lease_no_deletion() {
    let world = World::new();
    let mut settings = world.settings(HERE);
    settings.single_backend = false;
    let client = world.session_with(settings, std::sync::Arc::new(vmailfs::cache::disk::RealDisk));
    client.claim().await;
    client.maildir(&["u"]).await;
    client.deliver("u", "0", b"mail").await.unwrap();
    client.unlink("u/new/0").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    let keys = world.mem.keys();
    let result = gc::collect(&client.cell("u"), ASKED).await;
    assert!(matches!(result, Err(Error::Lapsed { .. })), "{result:?}");
    assert_eq!(world.mem.keys(), keys);
    client.session().lease.renew(client.session()).await.unwrap();
    assert!(collect(&client, ASKED).await.mails == 1);
}

/// The record that names a dropped mail again, as an undelete writes it.
fn name_again(client: &Client, tail: &vmailfs::format::key::KeyTail, again: Change) -> bool {
    use vmailfs::format::listing::{Attrs, Entry, Line};
    use vmailfs::format::{FolderId, Sub, Timestamp};
    let attrs = Attrs { mode: 0o600, owner: None, mtime: Timestamp { secs: 1, nanos: 0 } };
    let entry = Entry::Mail { size: 4, attrs, object: tail.clone() };
    let line = Line::Set { sub: Sub::New, name: b"back".to_vec(), entry };
    let line = Change::Line { folder: FolderId::ROOT, line };
    let done = client.cell("u").open_user(|user| user.commit(vec![again, line]));
    done.is_ok()
}

/// I6: what was named again is off the list, by the journal alone and by the flush; what is doomed
/// is refused, also if the list was read before it was doomed.
#[tokio::test]
async fn i6_a_doomed_object_is_never_named_again() {
    let world = World::new();
    let client = mailbox(&world, 2).await;
    client.unlink("u/new/0").await.unwrap();
    client.unlink("u/new/1").await.unwrap();
    client.flush("u").await;
    let list = dropped_list(&client).await;
    let tails: Vec<_> = list
        .iter()
        .filter_map(|at| match &at.object {
            vmailfs::format::part::Dropped::Mail(tail) => Some(tail.clone()),
            _ => None,
        })
        .collect();
    let again: Vec<_> = tails.iter().map(|t| dropped::again(&list, t).unwrap()).collect();
    // One comes back before it is due; a restart from the journal knows it, too.
    assert!(name_again(&client, &tails[0], again[0].clone()));
    drop(client);
    let client = world.session(HERE);
    assert_eq!(client.read("u/new/back").await.unwrap(), b"mail");
    world.clock.advance(DAY * 8);
    assert_eq!(collect(&client, ASKED).await.mails, 1);
    assert_eq!(world.mails().len(), 1);
    assert!(!name_again(&client, &tails[1], again[1].clone()));
    client.flush("u").await;
    assert!(dropped_list(&client).await.mail(tails[0].id()).is_none());
    world.clock.advance(DAY * 8);
    assert_eq!(collect(&client, SCAN).await.mails, 0);
    assert_eq!(client.read("u/new/back").await.unwrap(), b"mail");
    // Dropped once more, its time counts anew.
    client.unlink("u/new/back").await.unwrap();
    client.flush("u").await;
    assert_eq!(collect(&client, ASKED).await.mails, 0);
    world.clock.advance(DAY * 8);
    assert_eq!(collect(&client, ASKED).await.mails, 1);
}

/// Puts a mail object as a dead session's request that arrives late would.
async fn put_late(world: &World, sample: &str, id: ObjectId, body: &'static [u8]) -> String {
    let (dir, tail) = sample.rsplit_once('/').unwrap();
    let mut fields: Vec<String> = tail.splitn(7, '.').map(str::to_string).collect();
    fields[0] = id.to_string();
    fields[4] = format!("{:08x}", crc32c::crc32c(body));
    fields[6] = format!("late{}", id.counter);
    let key = format!("{dir}/{}", fields.join("."));
    let body = Body::Bytes(bytes::Bytes::from_static(body));
    world.mem.put(&key, body, PutMode::Overwrite, &[], Reason("test")).await.unwrap();
    key
}

/// I1, I6: an object of a session that was lost shows up after the take-over: the next open finds
/// it, with one listing that ends where the epoch ends; a later one does not look again.
#[tokio::test]
async fn i6_an_open_finds_what_came_late_to_the_last_closed_epoch() {
    let world = World::new();
    let client = mailbox(&world, 1).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    drop(client);
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap().len(), 2);
    fresh.flush("u").await;
    let end = world.head("u").closed.last().unwrap().end;
    let late = ObjectId { epoch: end.epoch, counter: end.counter + 3 };
    put_late(&world, &world.mails()[0], late, b"late mail").await;
    fresh.deliver("u", "2", b"mail").await.unwrap();
    fresh.close().await;
    world.requests();
    let next = world.session(On { machine: "next", ..FRESH });
    let names = next.list("u/new").await.unwrap();
    assert_eq!(names.len(), 4, "{names:?}");
    assert_eq!(next.read(&format!("u/new/late{}", late.counter)).await.unwrap(), b"late mail");
    assert_eq!(world.requests().iter().filter(|r| r.0 == Op::List).count(), 1);
    // Lost before it was flushed, it is found again.
    drop(next);
    let again = world.session(On { machine: "again", ..FRESH });
    assert_eq!(again.list("u/new").await.unwrap().len(), 4);
    again.close().await;
    world.requests();
    let last = world.session(On { machine: "last", ..FRESH });
    assert_eq!(last.list("u/new").await.unwrap().len(), 4);
    last.close().await;
    let last = world.session(On { machine: "last", ..FRESH });
    world.requests();
    assert_eq!(last.list("u/new").await.unwrap().len(), 4);
    assert_eq!(world.requests().iter().filter(|r| r.0 == Op::List).count(), 0);
}

/// I1, I6: what came even later is found by the full listing, and is adopted, not deleted.
#[tokio::test]
async fn i6_a_mail_that_no_head_named_is_adopted_never_deleted() {
    let world = World::new();
    let client = mailbox(&world, 3).await;
    client.unlink("u/new/1").await.unwrap();
    client.close().await;
    let client = world.session(FRESH);
    client.deliver("u", "3", b"mail").await.unwrap();
    client.flush("u").await;
    let sample = world.mails()[0].clone();
    let epoch = world.head("u").watermark.epoch.0 - 1;
    let id = ObjectId { epoch: vmailfs::format::Epoch(epoch), counter: 900 };
    let key = put_late(&world, &sample, id, b"late mail").await;
    let before = client.stat("u/new").await.unwrap().mtime;
    assert_eq!(collect(&client, Options { scan: true, ..DRY }).await.adopted.len(), 1);
    assert_eq!(client.list("u/new").await.unwrap(), ["0", "2", "3"]);
    let report = collect(&client, SCAN).await;
    assert_eq!((report.adopted.len(), report.late.len()), (1, 0), "{report:?}");
    assert_eq!(client.read("u/new/late900").await.unwrap(), b"late mail");
    // A server that looks at times sees that there is something new.
    assert!(client.stat("u/new").await.unwrap().mtime > before);
    client.flush("u").await;
    world.clock.advance(DAY * 30);
    let report = collect(&client, SCAN).await;
    assert_eq!((report.mails, report.adopted.len()), (1, 0), "{report:?}");
    assert!(world.mem.keys().contains(&key));
    client.close().await;
    let last = world.session(On { machine: "last", ..FRESH });
    assert_eq!(last.list("u/new").await.unwrap(), ["0", "2", "3", "late900"]);
}

/// I6: bundles that no head ever named go on the list once their epoch is over, and from there
/// like everything; those of the running epoch are left alone.
#[tokio::test]
async fn i6_bundles_of_dead_flushes_go_on_the_list() {
    let world = World::new();
    let client = mailbox(&world, 1).await;
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put, true) => Fault::Before(down()),
        _ => Fault::None,
    });
    client.deliver("u", "1", b"mail").await.unwrap();
    let cell = client.cell("u");
    assert!(vmailfs::vmail::flush::flush(&cell, Default::default()).await.is_err());
    world.no_faults();
    assert_eq!(collect(&client, SCAN).await.orphans, 0);
    drop((client, cell));
    let client = world.session(HERE);
    client.list("u").await.unwrap();
    client.flush("u").await;
    let report = collect(&client, SCAN).await;
    assert_eq!(report.orphans, 1, "{report:?}");
    let bundles = |world: &World| {
        world.mem.keys().into_iter().filter(|k| k.contains("/bundle/")).collect::<HashSet<_>>()
    };
    let before = bundles(&world);
    assert_eq!(collect(&client, SCAN).await.orphans, 0);
    assert!(before.is_subset(&bundles(&world)));
    world.clock.advance(DAY * 8);
    assert!(collect(&client, ASKED).await.bundles > 0);
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap(), ["0", "1"]);
}

/// I6: a large file that was replaced is dropped by the flush that replaced it; one that was
/// removed, once the epoch is over.
#[tokio::test]
async fn i6_large_files_are_dropped_and_deleted() {
    let world = World::new();
    let client = mailbox(&world, 1).await;
    let files = |world: &World| world.mem.keys().iter().filter(|k| k.contains("/file/")).count();
    for byte in [1u8, 2] {
        client.replace("u/large", &vec![byte; 5 << 20]).await.unwrap();
        client.replace("u/other", &vec![byte; 5 << 20]).await.unwrap();
        client.flush("u").await;
    }
    client.unlink("u/other").await.unwrap();
    client.flush("u").await;
    let before = files(&world);
    assert!(before >= 4);
    world.clock.advance(DAY * 8);
    let report = collect(&client, SCAN).await;
    assert!(report.files >= 2, "{report:?}");
    assert_eq!(files(&world) as u64 + report.files, before as u64, "{report:?}");
    client.close().await;
    let client = world.session(FRESH);
    client.list("u").await.unwrap();
    collect(&client, SCAN).await;
    world.clock.advance(DAY * 8);
    collect(&client, SCAN).await;
    assert_eq!(files(&world), 1);
    assert_eq!(client.read("u/large").await.unwrap(), vec![2; 5 << 20]);
}

/// I6: a late mail of a dbox folder cannot be shown while servers use the folder; it is told, and
/// stays.
#[tokio::test]
async fn i6_a_late_dbox_mail_is_told_and_kept() {
    let world = World::new();
    let client = world.session(HERE);
    for dir in ["u", "u/mailboxes", "u/mailboxes/INBOX", "u/mailboxes/INBOX/dbox-Mails"] {
        client.mkdir(dir).await.unwrap();
    }
    let place = "u/mailboxes/INBOX/dbox-Mails";
    let file = client.create(&format!("{place}/.temp.1")).await.unwrap();
    client.write(file, 0, b"mail").await.unwrap();
    client.fsync(file).await.unwrap();
    client.rename(&format!("{place}/.temp.1"), &format!("{place}/u.1")).await.unwrap();
    client.close_file(file).await.unwrap();
    client.close().await;
    let client = world.session(FRESH);
    client.list("u").await.unwrap();
    client.mkdir("u/x").await.unwrap();
    client.flush("u").await;
    let epoch = vmailfs::format::Epoch(world.head("u").watermark.epoch.0 - 1);
    let id = ObjectId { epoch, counter: 900 };
    let key = put_late(&world, &world.mails()[0].clone(), id, b"late mail").await;
    let report = collect(&client, SCAN).await;
    assert_eq!((report.adopted.len(), report.late.len()), (0, 1), "{report:?}");
    world.clock.advance(DAY * 30);
    collect(&client, SCAN).await;
    assert!(world.mem.keys().contains(&key));
    assert_eq!(client.list(place).await.unwrap(), ["u.1"]);
}

/// I8: what gc itself leaves behind does not keep it busy: a user that nobody uses costs no
/// writes after a while, and no reads but those of the full listing.
#[tokio::test]
async fn i8_gc_of_an_idle_user_comes_to_rest() {
    let world = World::new();
    let client = mailbox(&world, 12).await;
    for i in 0..11 {
        client.unlink(&format!("u/new/{i}")).await.unwrap();
        client.flush("u").await;
    }
    let cell = client.cell("u");
    let mut requests = Vec::new();
    for _ in 0..60 {
        world.clock.advance(DAY);
        world.requests();
        gc::unasked(&cell).await.unwrap();
        requests.push(world.requests());
    }
    assert_eq!(world.mails().len(), 1);
    let last: Vec<_> = requests[30..].concat();
    assert!(last.iter().all(|r| matches!(r.0, Op::List | Op::Get)), "{last:?}");
    assert!(last.len() < 5 * 8, "{last:?}");
}

/// Begins a gc that waits in the first of such requests until the gate is notified.
async fn held_gc(
    world: &World,
    client: &Client,
    which: Op,
) -> (
    std::sync::Arc<tokio::sync::Notify>,
    tokio::task::JoinHandle<vmailfs::vmail::error::Result<Report>>,
) {
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let held = gate.clone();
    world.requests();
    let first = std::sync::atomic::AtomicBool::new(true);
    world.faults(move |r| {
        let hangs = r.op == which && r.why.0 == "gc";
        match hangs && first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            true => Fault::HangBefore(held.clone()),
            false => Fault::None,
        }
    });
    let cell = client.cell("u");
    let slow = tokio::spawn(async move { gc::collect(&cell, SCAN).await });
    while !world.log.lock().iter().any(|r| r.0 == which && r.2 == "gc") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    world.no_faults();
    (gate, slow)
}

/// I8: the first mail of a new folder waits for a flush, and that for no listing of a gc.
#[tokio::test]
async fn i8_a_delivery_does_not_wait_for_a_gc() {
    let world = World::new();
    let client = mailbox(&world, 2).await;
    client.unlink("u/new/0").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    for which in [Op::List, Op::Get] {
        let (gate, slow) = held_gc(&world, &client, which).await;
        let folder = format!("u/.{which}");
        client.maildir(&[&folder]).await;
        let mail = client.deliver(&folder, "9", b"first");
        tokio::time::timeout(Duration::from_secs(20), mail).await.unwrap().unwrap();
        gate.notify_one();
        let report = slow.await.unwrap().unwrap();
        assert_eq!((report.adopted.len(), report.late.len()), (0, 0), "{report:?}");
    }
    assert_eq!(world.mails().len(), 3);
    client.close().await;
    let fresh = world.session(FRESH);
    assert_eq!(fresh.list("u/new").await.unwrap(), ["1"]);
    assert_eq!(fresh.read("u/.list/new/9").await.unwrap(), b"first");
}

/// I6: what is named again while a gc looks around is not doomed by it, whether that was flushed
/// meanwhile or not.
#[tokio::test]
async fn i6_what_comes_back_while_a_gc_looks_is_kept() {
    for flushed in [true, false] {
        let world = World::new();
        let client = mailbox(&world, 3).await;
        client.unlink("u/new/0").await.unwrap();
        client.unlink("u/new/1").await.unwrap();
        client.flush("u").await;
        let list = dropped_list(&client).await;
        let tail = list
            .iter()
            .find_map(|at| match &at.object {
                vmailfs::format::part::Dropped::Mail(tail) => Some(tail.clone()),
                _ => None,
            })
            .unwrap();
        world.clock.advance(DAY * 8);
        let (gate, slow) = held_gc(&world, &client, Op::List).await;
        assert!(name_again(&client, &tail, dropped::again(&list, &tail).unwrap()));
        if flushed {
            client.flush("u").await;
        }
        gate.notify_one();
        let report = slow.await.unwrap().unwrap();
        assert_eq!((report.mails, report.adopted.len()), (1, 0), "{report:?}");
        let key = vmailfs::format::key::mail_key("u", &tail);
        assert!(world.mem.keys().contains(&key), "flushed: {flushed}");
        if !flushed {
            drop(client);
            let client = world.session(HERE);
            assert_eq!(client.read("u/new/back").await.unwrap(), b"mail");
        }
    }
}

/// An undelete that comes while a gc is under way finds what that has left; one that came first is
/// waited for.
#[tokio::test(flavor = "multi_thread")]
async fn i6_an_undelete_and_a_gc_take_turns() {
    use vmailfs::vmail::bring_back::Alone;
    use vmailfs::vmail::undelete::{Which, undelete};
    let all = Which::Expunged { folder: None, since: None };
    let world = World::new();
    let client = mailbox(&world, 3).await;
    client.unlink("u/new/0").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    let (gate, slow) = held_gc(&world, &client, Op::List).await;
    let (cell, which) = (client.cell("u"), all.clone());
    let back = tokio::spawn(async move { undelete(&cell, &which, false, &Alone).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    gate.notify_one();
    assert_eq!(slow.await.unwrap().unwrap().mails, 1);
    assert_eq!(back.await.unwrap().unwrap().mails.len(), 0);
    assert_eq!(client.list("u/new").await.unwrap(), ["1", "2"]);

    client.unlink("u/new/1").await.unwrap();
    client.flush("u").await;
    world.clock.advance(DAY * 8);
    let gate = std::sync::Arc::new(tokio::sync::Notify::new());
    let held = gate.clone();
    world.requests();
    let first = std::sync::atomic::AtomicBool::new(true);
    world.faults(move |r| {
        let hangs = r.op == Op::Get && r.why.0 == "undelete";
        match hangs && first.swap(false, std::sync::atomic::Ordering::SeqCst) {
            true => Fault::HangBefore(held.clone()),
            false => Fault::None,
        }
    });
    let cell = client.cell("u");
    let back = tokio::spawn(async move { undelete(&cell, &all, false, &Alone).await });
    while !world.log.lock().iter().any(|r| r.0 == Op::Get && r.2 == "undelete") {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    world.no_faults();
    let cell = client.cell("u");
    let slow = tokio::spawn(async move { gc::collect(&cell, SCAN).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    gate.notify_one();
    assert_eq!(back.await.unwrap().unwrap().mails.len(), 1);
    assert_eq!(slow.await.unwrap().unwrap().mails, 0);
    assert_eq!(client.list("u/new").await.unwrap().len(), 2);
}

/// I6: what some folder names is not deleted, whatever the list says, and whether the folder is in
/// memory or not.
#[tokio::test]
async fn i6_what_has_a_name_is_kept_whatever_the_list_says() {
    for on in [HERE, FRESH] {
        let world = World::new();
        let client = mailbox(&world, 1).await;
        // Too much to be loaded with the root folder.
        client.put("u/.B/other", &noise(400_000)).await.unwrap();
        let before = world.mails();
        client.deliver("u/.B", "b", b"body").await.unwrap();
        client.flush("u").await;
        let key = world.mails().into_iter().find(|k| !before.contains(k)).unwrap();
        let name = key.rsplit_once('/').unwrap().1;
        let object = vmailfs::format::key::KeyTail::parse(name).unwrap();
        let drop_it = Change::Drop { object: object.clone() };
        client.cell("u").open_user(|user| user.commit(vec![drop_it])).unwrap();
        client.close().await;
        let client = world.session(on);
        client.list("u/new").await.unwrap();
        assert!(dropped_list(&client).await.mail(object.id()).is_some());
        world.clock.advance(DAY * 8);
        let loaded = client
            .cell("u")
            .open_user(|user| Ok(user.tree.folders.values().filter(|f| f.loaded).count()));
        assert_eq!(loaded.unwrap(), 1, "only the root folder");
        assert_eq!(collect(&client, SCAN).await.mails, 0);
        assert_eq!(client.read("u/.B/new/b").await.unwrap(), b"body");
    }
}

/// I8: a listing of more than a page finds all that is late.
#[tokio::test]
async fn i8_a_full_listing_goes_page_by_page() {
    const LATE: u64 = 10_050;
    let world = World::new();
    let client = mailbox(&world, 1).await;
    drop(client);
    let client = world.session(HERE);
    client.deliver("u", "1", b"mail").await.unwrap();
    client.flush("u").await;
    let epoch = vmailfs::format::Epoch(world.head("u").watermark.epoch.0 - 1);
    let sample = world.mails()[0].clone();
    for counter in 0..LATE {
        put_late(&world, &sample, ObjectId { epoch, counter: 900 + counter }, b"late").await;
    }
    world.requests();
    let report = collect(&client, Options { scan: true, ..DRY }).await;
    assert_eq!(report.adopted.len() as u64, LATE);
    let listed = |r: &Asked| r.0 == Op::List && r.1.ends_with("/mail");
    // Two pages, and each late mail by its id.
    assert_eq!(world.requests().iter().filter(|r| listed(r)).count() as u64, LATE + 2);
}
