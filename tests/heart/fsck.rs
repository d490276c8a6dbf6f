//! Checks, earlier states and restores, from the store alone.

use super::world::{Client, HERE, Mailbox, World};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use vmailfs::format::key::{bundle_key, head_key};
use vmailfs::store::{Body, ObjectStore, PutMode, Reason};
use vmailfs::vmail::error::Error;
use vmailfs::vmail::export::export;
use vmailfs::vmail::fsck::{self, Kind, Options, Report};
use vmailfs::vmail::history;
use vmailfs::vmail::stored::Stored;

pub const WHY: Reason = Reason("test");

pub fn stored(world: &World) -> Stored {
    Stored::new(world.store.clone(), "u", Reason("fsck"))
}

pub async fn put(world: &World, key: &str, bytes: &[u8]) {
    let body = Body::Bytes(Bytes::copy_from_slice(bytes));
    world.mem.put(key, body, PutMode::Overwrite, &[], WHY).await.unwrap();
}

pub async fn delete(world: &World, key: &str) {
    world.mem.delete(&[key.to_owned()], WHY).await.unwrap();
}

pub async fn check(world: &World, read: bool) -> Report {
    fsck::check(&stored(world), Options { read }).await.unwrap()
}

pub fn kinds(report: &Report) -> Vec<Kind> {
    report.findings.iter().map(|f| f.kind).collect()
}

/// Two folders with mails, flushed twice.
pub async fn some_mail(world: &World) -> Client {
    let a = world.session(HERE);
    a.maildir(&["u", "u/.Sent"]).await;
    for n in 0..5 {
        a.deliver("u", &format!("1.M{n}"), format!("body {n}").as_bytes()).await.unwrap();
    }
    a.put("u/dovecot-uidlist", b"3 V1 N6 G0\n1 :1.M0\n").await.unwrap();
    a.flush("u").await;
    world.clock.advance(Duration::from_secs(100));
    a.deliver("u/.Sent", "1.M5", b"body 5").await.unwrap();
    a.link("u/new/1.M0", "u/.Sent/new/1.M6").await.unwrap();
    a.flush("u").await;
    a
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_well_is_found_well() {
    let world = World::new();
    let a = some_mail(&world).await;
    a.deliver("u", "1.M9", b"not flushed").await.unwrap();
    let report = check(&world, true).await;
    assert_eq!(report.findings, []);
    assert_eq!((report.mails, report.newer, report.folders), (7, 1, 2));
    assert!(report.read > 0);
    a.close().await;
    let report = check(&world, true).await;
    assert_eq!(report.findings, []);
    assert_eq!((report.mails, report.newer, report.owner), (8, 0, None));
    let nobody = Stored::new(world.store.clone(), "nobody", WHY);
    let none = fsck::check(&nobody, Options::default()).await;
    assert!(matches!(none, Err(Error::NoUser { .. })), "{none:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_damage_is_found_and_told_where_it_is() {
    let world = World::new();
    some_mail(&world).await.close().await;
    let mails = world.mails();
    let victim = mails.iter().find(|k| k.contains("M5")).unwrap().clone();
    let linked = mails.iter().find(|k| k.contains("M0")).unwrap().clone();
    let bytes = world.mem.bytes_of(&victim).unwrap();

    delete(&world, &victim).await;
    let report = check(&world, false).await;
    assert_eq!(kinds(&report), [Kind::Lost]);
    let found = &report.findings[0];
    assert_eq!(found.folder.as_deref(), Some(".Sent"));
    assert_eq!(found.name.as_deref(), Some("new/1.M5"));
    assert_eq!(found.object.as_ref(), Some(&victim));
    assert_eq!(found.to_string().split('\t').count(), 6);

    put(&world, &victim, &bytes[1..]).await;
    assert_eq!(kinds(&check(&world, false).await), [Kind::Size]);

    let mut flipped = bytes.to_vec();
    flipped[2] ^= 1;
    put(&world, &victim, &flipped).await;
    assert_eq!(check(&world, false).await.findings, []);
    assert_eq!(kinds(&check(&world, true).await), [Kind::Content]);
    put(&world, &victim, &bytes).await;

    // An object that its session never got an answer for, stored after the session was over.
    let late = victim.replace("-00000000000", "-0000000001f").replace("M5", "M77");
    assert_ne!(late, victim);
    put(&world, &late, &bytes).await;
    let report = check(&world, false).await;
    assert_eq!(kinds(&report), [Kind::Late]);
    assert_eq!(report.findings[0].name.as_deref().map(|n| n.contains("M77")), Some(true));
    delete(&world, &late).await;

    put(&world, &format!("{}x", victim.rsplit_once('/').unwrap().0.to_owned() + "/"), b"?").await;
    assert_eq!(kinds(&check(&world, false).await), [Kind::Stray]);
    let stray = check(&world, false).await.findings[0].object.clone().unwrap();
    delete(&world, &stray).await;

    delete(&world, &linked).await;
    let report = check(&world, false).await;
    assert_eq!(kinds(&report), [Kind::Lost]);
    assert!(report.findings[0].detail.contains("2 names"), "{:?}", report.findings);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_bundle_or_head_is_found_and_an_outage_is_not_damage() {
    let world = World::new();
    some_mail(&world).await.close().await;
    let head = world.head("u");
    let key = bundle_key("u", head.folders[0].parts[0].bundle);
    let bytes = world.mem.bytes_of(&key).unwrap();
    put(&world, &key, &bytes[..20]).await;
    let report = check(&world, false).await;
    assert!(kinds(&report).contains(&Kind::Part), "{:?}", report.findings);
    assert!(report.findings.iter().any(|f| f.object.as_ref() == Some(&key)));
    delete(&world, &key).await;
    assert!(kinds(&check(&world, false).await).contains(&Kind::Part));
    put(&world, &key, &bytes).await;
    assert_eq!(check(&world, false).await.findings, []);

    let good = world.mem.bytes_of(&head_key("u")).unwrap();
    let mut bad = good.to_vec();
    bad[40] ^= 4;
    put(&world, &head_key("u"), &bad).await;
    assert_eq!(kinds(&check(&world, false).await), [Kind::Head]);
    delete(&world, &head_key("u")).await;
    assert_eq!(kinds(&check(&world, false).await), [Kind::Head]);
    put(&world, &head_key("u"), &good).await;

    world.faults(|_| vmailfs::store::faulty::Fault::Before(super::world::down()));
    let down = fsck::check(&stored(&world), Options::default()).await;
    assert!(matches!(down, Err(Error::Store { .. })), "{down:?}");
}

/// Everything below a directory, by path.
fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(at) = todo.pop() {
        for entry in std::fs::read_dir(at).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                todo.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn earlier_states_can_be_listed_and_written_out() {
    let world = World::new();
    let a = some_mail(&world).await;
    let now = || world.clock_boot().as_secs() as i64 + 1_700_000_000;
    let before = now();
    world.clock.advance(Duration::from_secs(100));
    a.rename("u/new/1.M1", "u/cur/1.M1:2,FS").await.unwrap();
    a.unlink("u/new/1.M2").await.unwrap();
    a.unlink("u/.Sent/new/1.M5").await.unwrap();
    a.flush("u").await;
    let flushed = now();
    world.clock.advance(Duration::from_secs(100));
    a.deliver("u", "1.M8", b"body 8").await.unwrap();
    a.close().await;

    let stored = stored(&world);
    let all = history::read(&stored, None).await.unwrap();
    let counts = history::count_mails(&stored, &all.states).await.unwrap();
    assert_eq!(all.ends, history::Ends::First);
    let counts: Vec<u64> = counts.into_iter().flatten().collect();
    // The first mail of a new folder is flushed at once.
    assert_eq!(counts, [6, 5, 7, 5, 1, 0]);
    assert!(all.states.is_sorted_by_key(|s| std::cmp::Reverse(s.time)));
    assert!(matches!(all.at(12), Err(Error::NotThere(_))));

    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("then");
    let done = export(&stored, all.at(before).unwrap(), &dir).await.unwrap();
    assert_eq!((done.mails, done.folders, done.missing.len()), (7, 2, 0));
    let then = tree(&dir);
    assert_eq!(then["new/1.M2"], b"body 2");
    assert_eq!(then["new/1.M1"], b"body 1");
    assert_eq!(then[".Sent/new/1.M5"], b"body 5");
    assert_eq!(then["dovecot-uidlist"], b"3 V1 N6 G0\n1 :1.M0\n");
    assert!(!then.contains_key("new/1.M8"));
    let meta = std::fs::metadata(dir.join("new/1.M2")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(meta.mode() & 0o7777, 0o600);
    assert_eq!(meta.mtime() / 1000, 1_700_000);
    assert!(dir.join("tmp").is_dir() && dir.join(".Sent/cur").is_dir());

    let dir = place.path().join("later");
    export(&stored, all.at(flushed).unwrap(), &dir).await.unwrap();
    let later = tree(&dir);
    assert_eq!(later["cur/1.M1:2,FS"], b"body 1");
    assert!(!later.contains_key("new/1.M2"));
    // Nothing is written over anything.
    let again = export(&stored, all.at(flushed).unwrap(), &dir).await;
    assert!(matches!(again, Err(Error::Refused(_))), "{again:?}");

    // A mail that is gone is told, and the others are there.
    let gone = world.mails().into_iter().find(|k| k.contains("M3")).unwrap();
    delete(&world, &gone).await;
    let dir = place.path().join("lossy");
    let done = export(&stored, all.at(before).unwrap(), &dir).await.unwrap();
    assert_eq!(done.missing.len(), 1);
    assert_eq!(done.missing[0].0, "new/1.M3");
    assert_eq!(tree(&dir).len(), then.len() - 1);
}
