//! What was deleted comes back, and what is damaged is repaired.

use super::fsck::{WHY, check, delete, kinds, put, some_mail, stored};
use super::world::{Client, FRESH, Mailbox, World};
use std::time::Duration;
use vmailfs::dovecot::uidlist;
use vmailfs::format::key::{bundle_key, head_key};
use vmailfs::store::ObjectStore;
use vmailfs::vmail::bring_back::{Alone, UID_GAP};
use vmailfs::vmail::error::Error;
use vmailfs::vmail::fsck::Kind;
use vmailfs::vmail::fsck::rescue::{Rescue, rescue};
use vmailfs::vmail::gc;
use vmailfs::vmail::repair::{Wanted, repair};
use vmailfs::vmail::undelete::{Report, Which, undelete};

pub(super) async fn back(client: &Client, which: &Which, dry_run: bool) -> Result<Report, Error> {
    undelete(&client.cell("u"), which, dry_run, &Alone).await
}

pub(super) fn all() -> Which {
    Which::Expunged { folder: None, since: None }
}

pub(super) fn now(world: &World) -> i64 {
    world.clock_boot().as_secs() as i64 + 1_700_000_000
}

#[tokio::test(flavor = "multi_thread")]
async fn i2_an_expunged_mail_comes_back_under_another_name() {
    let world = World::new();
    let a = some_mail(&world).await;
    a.rename("u/new/1.M1", "u/cur/1.M1:2,FS").await.unwrap();
    a.unlink("u/cur/1.M1:2,FS").await.unwrap();
    a.unlink("u/.Sent/new/1.M5").await.unwrap();
    // One of two names is no expunge.
    a.unlink("u/.Sent/new/1.M6").await.unwrap();
    a.deliver("u", "1.M7", b"came and went").await.unwrap();
    a.unlink("u/new/1.M7").await.unwrap();
    let asked = back(&a, &all(), true).await.unwrap();
    assert_eq!((asked.mails.len(), asked.left.len()), (3, 0));
    assert_eq!(a.list("u/new").await.unwrap().len(), 4);

    let sent = Which::Expunged { folder: Some("Sent".into()), since: None };
    let done = back(&a, &sent, false).await.unwrap();
    assert_eq!(done.mails.len(), 1);
    let names = a.list("u/.Sent/new").await.unwrap();
    assert_eq!(names.len(), 1);
    assert!(!names[0].starts_with("1.M5"));
    assert_eq!(a.read(&format!("u/.Sent/new/{}", names[0])).await.unwrap(), b"body 5");
    let done = back(&a, &all(), false).await.unwrap();
    assert_eq!(done.mails.len(), 2);
    assert_eq!(back(&a, &all(), false).await.unwrap().mails.len(), 0);
    assert_eq!(a.list("u/new").await.unwrap().len(), 6);

    // It stays when this machine is lost, and through a gc after retention.
    drop(a);
    let b = world.session(FRESH);
    b.list("u/new").await.unwrap();
    world.clock.advance(Duration::from_secs(30 * 86400));
    gc::collect(&b.cell("u"), gc::Options::default()).await.unwrap();
    assert_eq!(b.list("u/new").await.unwrap().len(), 6);
    let mut bodies = Vec::new();
    for name in b.list("u/new").await.unwrap() {
        bodies.push(b.read(&format!("u/new/{name}")).await.unwrap());
    }
    assert!(bodies.contains(&b"came and went".to_vec()) && bodies.contains(&b"body 1".to_vec()));
    b.flush("u").await;
    assert_eq!(check(&world, true).await.findings, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn i6_what_is_being_deleted_stays_away() {
    let world = World::new();
    let a = some_mail(&world).await;
    let then = now(&world);
    world.clock.advance(Duration::from_secs(10));
    a.unlink("u/new/1.M1").await.unwrap();
    a.flush("u").await;
    world.clock.advance(Duration::from_secs(30 * 86400));
    let report = gc::collect(&a.cell("u"), gc::Options::default()).await.unwrap();
    assert_eq!(report.mails, 1);
    let done = back(&a, &all(), false).await.unwrap();
    assert_eq!(done.mails.len(), 0);
    let gone = back(&a, &Which::Of { at: then }, false).await;
    match gone {
        Ok(report) => assert_eq!((report.mails.len(), report.left.len()), (0, 1)),
        Err(error) => assert!(matches!(error, Error::Refused(_)), "{error}"),
    }
    assert_eq!(a.list("u/new").await.unwrap().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn i2_a_restore_in_place_keeps_what_is_there_and_leaves_a_gap() {
    let world = World::new();
    let a = some_mail(&world).await;
    a.rename("u/new/1.M1", "u/cur/1.M1:2,FS").await.unwrap();
    a.flush("u").await;
    let then = now(&world);
    world.clock.advance(Duration::from_secs(10));
    a.unlink("u/cur/1.M1:2,FS").await.unwrap();
    a.unlink("u/new/1.M0").await.unwrap();
    a.rename("u/new/1.M2", "u/.Sent/new/1.M2").await.unwrap();
    a.deliver("u", "1.M8", b"later").await.unwrap();
    a.replace("u/dovecot-uidlist", b"3 V1 N9 G0\n2 :1.M2\n").await.unwrap();
    let done = back(&a, &Which::Of { at: then }, false).await.unwrap();
    assert_eq!(done.mails.len(), 1, "{done:?}");
    assert!(done.mails[0].name.ends_with(":2,FS"));
    assert_eq!(a.list("u/cur").await.unwrap().len(), 1);
    assert_eq!(a.list("u/new").await.unwrap(), ["1.M3", "1.M4", "1.M8"]);
    assert!(a.list("u/.Sent/new").await.unwrap().contains(&"1.M2".to_owned()));
    let list = a.read("u/dovecot-uidlist").await.unwrap();
    assert_eq!(uidlist::parse(&list).unwrap().next_uid(), 9 + UID_GAP);
    assert_eq!(a.list("u").await.unwrap(), [".Sent", "cur", "dovecot-uidlist", "new", "tmp"]);
}

async fn repaired(world: &World, client: &Client, wanted: Wanted) -> Vec<String> {
    let report = check(world, false).await;
    let session = client.session();
    let cell = session.user_by_name("u").unwrap();
    let done = repair(&cell, &stored(world), &report, wanted, &Alone).await.unwrap();
    assert_eq!(check(world, false).await.findings, [], "after {done:?}");
    done
}

const ALL: Wanted = Wanted { all: true, drop_lost: false, owner_gone: false };

#[tokio::test(flavor = "multi_thread")]
async fn names_of_lost_mails_go_only_when_that_is_asked_for() {
    let world = World::new();
    let a = some_mail(&world).await;
    let linked = world.mails().into_iter().find(|k| k.contains("M0")).unwrap();
    delete(&world, &linked).await;
    let report = check(&world, false).await;
    assert_eq!(kinds(&report), [Kind::Lost]);
    let cell = a.cell("u");
    repair(&cell, &stored(&world), &report, ALL, &Alone).await.unwrap();
    assert_eq!(kinds(&check(&world, false).await), [Kind::Lost]);
    assert_eq!(a.list("u/new").await.unwrap().len(), 5);
    repaired(&world, &a, Wanted { drop_lost: true, ..Wanted::default() }).await;
    assert_eq!(a.list("u/new").await.unwrap().len(), 4);
    assert_eq!(a.list("u/.Sent/new").await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_mail_gets_a_name() {
    let world = World::new();
    some_mail(&world).await.close().await;
    let known = world.mails().into_iter().find(|k| k.contains("M5")).unwrap();
    let late = known.replace("-00000000000", "-0000000001f").replace("M5", "M77");
    put(&world, &late, &world.mem.bytes_of(&known).unwrap()).await;
    let b = world.session(FRESH);
    b.list("u").await.unwrap();
    b.deliver("u", "1.M9", b"so that the epoch is flushed").await.unwrap();
    b.flush("u").await;
    assert_eq!(kinds(&check(&world, false).await), [Kind::Late]);
    repaired(&world, &b, ALL).await;
    let names = b.list("u/.Sent/new").await.unwrap();
    assert!(names.iter().any(|n| n.contains("M77")), "{names:?}");
}

/// All mails of [`some_mail`] and one more, by what they hold.
async fn all_there(client: &Client) {
    let mut bodies = Vec::new();
    for dir in ["u/new", "u/cur", "u/.Sent/new"] {
        for name in client.list(dir).await.unwrap() {
            bodies.push(client.read(&format!("{dir}/{name}")).await.unwrap());
        }
    }
    for n in 0..6 {
        assert!(bodies.contains(&format!("body {n}").into_bytes()), "body {n}");
    }
    assert!(bodies.contains(&b"the last".to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn i1_i2_no_mail_and_no_uid_is_lost_with_a_damaged_head() {
    for gone in [false, true] {
        let world = World::new();
        let a = some_mail(&world).await;
        a.replace("u/dovecot-uidlist", b"3 V1 N400 G0\n1 :1.M0\n").await.unwrap();
        a.rename("u/new/1.M1", "u/cur/1.M1:2,S").await.unwrap();
        a.deliver("u", "1.M9", b"the last").await.unwrap();
        a.close().await;
        let good = world.mem.bytes_of(&head_key("u")).unwrap();
        let ceiling = world.head("u").folders.iter().filter_map(|f| f.uid_ceiling).max().unwrap();
        let mut bad = good.to_vec();
        bad[40] ^= 4;
        match gone {
            false => put(&world, &head_key("u"), &bad).await,
            true => delete(&world, &head_key("u")).await,
        }
        let bad = (!gone).then(|| bad.into());
        // It still is JSON, and still our head: damage, not somebody's error page.
        assert_eq!(world.session(FRESH).list("u/new").await, Err(libc::EAGAIN));
        let no = Rescue { random: (1, 2), owner_gone: false };
        let refused = rescue(&stored(&world), &no).await;
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
        assert_eq!(world.mem.bytes_of(&head_key("u")), bad);

        let b = world.session(FRESH);
        let done = repaired(&world, &b, ALL).await;
        all_there(&b).await;
        let aside = world.mem.keys().into_iter().find(|k| k.contains("/aside/head-"));
        assert_eq!(aside.and_then(|key| world.mem.bytes_of(&key)), bad, "{done:?}");
        let list = b.read("u/dovecot-uidlist").await.unwrap();
        assert!(uidlist::parse(&list).unwrap().next_uid() >= ceiling);
        b.deliver("u", "1.M10", b"and on").await.unwrap();
        b.close().await;
        assert_eq!(check(&world, true).await.findings, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i1_a_folder_with_a_damaged_bundle_goes_back_and_keeps_its_mails() {
    for gone in [false, true] {
        let world = World::new();
        let a = some_mail(&world).await;
        world.clock.advance(Duration::from_secs(10));
        a.deliver("u", "1.M9", b"the last").await.unwrap();
        a.close().await;
        let head = world.head("u");
        let newest = head.previous.unwrap().bundle;
        let key = bundle_key("u", newest);
        let bytes = world.mem.bytes_of(&key).unwrap();
        match gone {
            false => put(&world, &key, &bytes[..40]).await,
            true => delete(&world, &key).await,
        }
        assert!(kinds(&check(&world, false).await).contains(&Kind::Part));
        let b = world.session(FRESH);
        assert!(b.list("u/new").await.is_err());
        drop(b);
        let b = world.session(FRESH);
        repaired(&world, &b, ALL).await;
        all_there(&b).await;
        let aside = world.mem.keys().iter().any(|k| k.contains("/aside/bundle-"));
        assert_eq!(aside, !gone);
        b.close().await;
        assert_eq!(check(&world, true).await.findings, []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_user_writes_its_head_and_bundles_again() {
    let world = World::new();
    let a = some_mail(&world).await;
    a.deliver("u", "1.M9", b"the last").await.unwrap();
    a.flush("u").await;
    for key in world.mem.keys().into_iter().filter(|k| k.contains("/bundle/")) {
        world.mem.delete(&[key], WHY).await.unwrap();
    }
    put(&world, &head_key("u"), b"not a head").await;
    repaired(&world, &a, ALL).await;
    drop(a);
    let b = world.session(FRESH);
    all_there(&b).await;
}

const GONE: Rescue = Rescue { random: (1, 2), owner_gone: true };

async fn spoil_head(world: &World) {
    let mut bad = world.mem.bytes_of(&head_key("u")).unwrap().to_vec();
    bad[40] ^= 4;
    put(world, &head_key("u"), &bad).await;
}

/// A mail that came and was expunged after the head that is gone back to stays away, and that is
/// told; it can be asked for.
#[tokio::test(flavor = "multi_thread")]
async fn i6_what_was_expunged_does_not_come_back_with_a_rescue() {
    let world = World::new();
    let a = some_mail(&world).await;
    a.deliver("u", "1.M8", b"came and went").await.unwrap();
    a.unlink("u/new/1.M8").await.unwrap();
    a.deliver("u", "1.M9", b"the last").await.unwrap();
    a.close().await;
    spoil_head(&world).await;
    let done = rescue(&stored(&world), &GONE).await.unwrap();
    assert!(done.iter().any(|d| d.starts_with("1 mails that were expunged since")), "{done:?}");
    let b = world.session(FRESH);
    all_there(&b).await;
    assert_eq!(b.list("u/new").await.unwrap().len(), 6);
    assert_eq!(back(&b, &all(), false).await.unwrap().mails.len(), 1);
    assert_eq!(b.list("u/new").await.unwrap().len(), 7);
    b.close().await;
    assert_eq!(check(&world, true).await.findings, []);
}

/// I8: however much lies above the oldest mail that nothing names, the head stays one that can be
/// read; what is too far back comes with the next repair.
#[tokio::test(flavor = "multi_thread")]
async fn i8_a_rescued_head_does_not_tell_of_everything() {
    use vmailfs::format::ObjectId;
    use vmailfs::format::journal::Change;
    use vmailfs::format::key::KeyTail;
    use vmailfs::vmail::fsck::rescue::KNOWN_MAX;
    let world = World::new();
    let a = some_mail(&world).await;
    let known = world.mails().into_iter().find(|k| k.contains("M5")).unwrap();
    let (dir, tail) = known.rsplit_once('/').unwrap();
    let rest = &tail[ObjectId::TEXT_LEN..];
    let epoch = world.head("u").epoch;
    let id = |counter| ObjectId { epoch, counter };
    let drops = (0..KNOWN_MAX as u64 + 10)
        .map(|n| KeyTail::parse(&format!("{}{rest}", id(5000 + n))).unwrap())
        .map(|object| Change::Drop { object });
    let drops: Vec<Change> = drops.collect();
    for some in drops.chunks(10_000) {
        a.cell("u").open_user(|user| user.commit(some.to_vec())).unwrap();
    }
    a.deliver("u", "1.M9", b"the last").await.unwrap();
    a.flush("u").await;
    drop(a);
    let late = format!("{dir}/{}{}", id(900), rest.replace("M5", "M77"));
    put(&world, &late, &world.mem.bytes_of(&known).unwrap()).await;
    let done = rescue(&stored(&world), &GONE).await.unwrap();
    assert!(done.iter().any(|d| d.starts_with("1 more mails")), "{done:?}");
    assert_eq!(world.head("u").known_above.len(), KNOWN_MAX);
    let b = world.session(FRESH);
    all_there(&b).await;
    b.deliver("u", "1.M10", b"and on").await.unwrap();
    b.flush("u").await;
    repaired(&world, &b, ALL).await;
    let names = b.list("u/.Sent/new").await.unwrap();
    assert!(names.iter().any(|n| n.contains("M77")), "{names:?}");
}
