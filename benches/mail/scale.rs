//! Many users, and a folder of very many mails: what it costs when there is more of everything.
//!
//! Users and listings are put into the store as a flush would have left them, without the mails'
//! bytes: nobody reads any. What follows is done through the mount.

use crate::Wanted;
use crate::local::resident;
use crate::support::MAIL_UID;
use crate::support::mount::Mount;
use crate::table::{Limit, Row, Table, median, number, quantile};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use vmailfs::format::bundle::BundleWriter;
use vmailfs::format::head::{Head, HeadFolder, PartKind, PartRef};
use vmailfs::format::key::{MailKey, Piece, bundle_key, head_key};
use vmailfs::format::listing::{Attrs, Entry, Line, Owner};
use vmailfs::format::part::{Part, encode_part};
use vmailfs::format::{Epoch, FolderId, ObjectId, Place, Sub, Timestamp};

const FOLDER: FolderId = FolderId(0x5f3a_9c01_d2e4_b678);
const MAIL_SIZE: u64 = 2;

pub fn run(table: &mut Table, wanted: &Wanted) {
    if !wanted.skips("users") {
        users(table, wanted);
    }
    if !wanted.skips("folder") {
        folder(table, wanted);
    }
}

fn id(counter: u64) -> ObjectId {
    ObjectId { epoch: Epoch(1), counter }
}

fn base_name(number: u64) -> String {
    format!("17{number:08}.M{:06}P4000.mail.test,S={MAIL_SIZE},W=3", number % 1_000_000)
}

/// The names of the mails in `cur`.
fn name(number: u64) -> String {
    base_name(number) + ":2,S"
}

/// The listing of a Maildir with so many mails.
fn part(mails: u64) -> Part {
    let mtime = Timestamp { secs: 1_700_000_000, nanos: 1 };
    let dir = Attrs { mode: 0o700, owner: None, mtime };
    let file = Attrs { mode: 0o600, owner: None, mtime };
    let mut lines: Vec<Line> =
        Sub::ALL.into_iter().map(|sub| Line::Dir { sub, attrs: dir }).collect();
    lines.extend((0..mails).map(|number| {
        let key = MailKey {
            id: id(number + 1),
            folder: FOLDER,
            mtime,
            mode: 0o600,
            crc: number as u32,
            piece: Piece::Whole,
            name: Some(base_name(number).into_bytes()),
        };
        let entry = Entry::Mail { size: MAIL_SIZE, attrs: file, object: key.encode().0 };
        Line::Set { sub: Sub::Cur, name: name(number).into_bytes(), entry }
    }));
    Part { lines, members: Vec::new() }
}

/// The bundle with that part, and where it lies in it.
fn bundle(mails: u64) -> (Vec<u8>, PartRef) {
    let mut bundle = BundleWriter::new(id(mails + 1));
    let part = bundle.add(PartKind::Base, &encode_part(&part(mails), b"Maildir"));
    (bundle.finish().to_vec(), part)
}

fn put(store: &Path, key: &str, bytes: &[u8]) {
    let path = store.join(key);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// A user who was handed over, with a Maildir that this part lists, or with nothing.
fn put_user(store: &Path, user: &str, part: Option<&PartRef>) {
    let folder = |id, name: &[u8], parts| HeadFolder {
        id,
        parent: Place::ROOT,
        name: name.to_vec(),
        parts,
        uid_ceiling: None,
        burnt_below: None,
        unfinished: false,
    };
    let mut folders = vec![folder(FolderId::ROOT, b"", Vec::new())];
    folders.extend(part.map(|part| folder(FOLDER, b"Maildir", vec![part.clone()])));
    let head = Head {
        user: user.to_owned(),
        epoch: Epoch(1),
        write_id: "0123456789abcdef0123456789abcdef".to_owned(),
        owner: None,
        watermark: part.map_or(id(0), |part| part.bundle),
        closed: Vec::new(),
        root_owner: Owner { uid: MAIL_UID, gid: MAIL_UID },
        root_mode: 0o700,
        folders,
        uidvalidity_ceiling: None,
        uidvalidity_burnt: None,
        known_above: Vec::new(),
        names: Vec::new(),
        dropped: Vec::new(),
        previous: None,
        written: 1_700_000_000,
    };
    put(store, &head_key(user), &head.encode());
}

fn store_of(mount: &Mount) -> PathBuf {
    mount.store().trim_start_matches("file://").into()
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

fn users(table: &mut Table, wanted: &Wanted) {
    const PART: &str = "many users";
    const MAILS: u64 = 100;
    let (known, open) = if wanted.quick { (10_000, 500) } else { (100_000, 2000) };
    let mut mount = Mount::on_directory();
    let store = store_of(&mount);
    let start = Instant::now();
    let (bytes, part) = bundle(MAILS);
    for number in 0..known {
        let user = format!("user{number}");
        let has = (number < open).then_some(&part);
        put_user(&store, &user, has);
        if has.is_some() {
            put(&store, &bundle_key(&user, part.bundle), &bytes);
        }
    }
    println!("\n({known} users made in {} s)", start.elapsed().as_secs());
    mount.mount().unwrap();
    let alone = resident(&mount);
    let root = mount.root();
    let start = Instant::now();
    // `.vmailfs` is not told.
    let listed = count(&root);
    let listing = start.elapsed().as_secs_f64() * 1e3;
    assert!(listed >= known, "{listed} users listed");
    let row = Row::new(PART, &format!("list {known} users"), "maildir", "vmailfs file");
    table.row(row.value(listing, "ms"));
    let start = Instant::now();
    for number in 0..known {
        fs::metadata(root.join(format!("user{number}"))).unwrap();
    }
    let each = start.elapsed().as_secs_f64() * 1e6 / known as f64;
    let after = resident(&mount);
    let row = Row::new(PART, &format!("look each of {known} up"), "maildir", "vmailfs file");
    let note = format!("{:.2} KiB of memory each", (after - alone) / known as f64);
    table.row(row.value(each, "µs").note(note));
    let mut took = Vec::new();
    for number in 0..open {
        let start = Instant::now();
        let found = count(&root.join(format!("user{number}/Maildir/cur")));
        took.push(start.elapsed().as_secs_f64() * 1e3);
        assert_eq!(found as u64, MAILS);
    }
    let row =
        Row::new(PART, &format!("open a user and list {MAILS} mails"), "maildir", "vmailfs file");
    let p95 = quantile(took.clone(), 0.95);
    table.row(row.value(median(took), "ms").note(format!("p95 {} ms", number(p95))));
    let now = resident(&mount) / 1024.0;
    let what = format!("{known} known, {open} of them open with {MAILS} mails each");
    let row = Row::new(PART, &what, "maildir", "vmailfs file").value(now, "MiB");
    table.row(row.figure(now, Limit::AtMost(1024.0)).note("resident memory of the daemon"));
    let start = Instant::now();
    mount.umount().unwrap();
    let row = Row::new(PART, &format!("hand {open} users over"), "maildir", "vmailfs file");
    table.row(row.value(start.elapsed().as_secs_f64(), "s"));
}

/// What was measured with a folder of some size, by name; ms, KiB.
type Measured = BTreeMap<&'static str, f64>;

fn folder(table: &mut Table, wanted: &Wanted) {
    const PART: &str = "large folder";
    let sizes = if wanted.quick { [1000, 100_000] } else { [10_000, 1_000_000] };
    let [small, large] = sizes.map(|mails| of_size(mails, if wanted.quick { 100 } else { 300 }));
    for (what, value) in &large {
        let before = small.get(what).copied().unwrap_or(0.0);
        let unit = what.rsplit_once(", ").map_or("ms", |(_, unit)| unit);
        let row =
            Row::new(PART, what.split(", ").next().unwrap_or(what), "maildir", "vmailfs file");
        let row = row.value(*value, if unit == "KiB" { "KiB" } else { "ms" });
        let whole =
            what.starts_with("open") || what.starts_with("resident") || what.starts_with("list");
        let limit = if whole { Limit::None } else { Limit::AtMost(1.5) };
        let [few, many] = sizes;
        let note =
            format!("with {many} mails; {} with {few}, the figure is the ratio", number(before));
        table.row(row.figure(value / before.max(1e-9), limit).note(note));
    }
}

fn of_size(mails: u64, times: u64) -> Measured {
    let mut done = Measured::new();
    let mut mount = Mount::on_directory();
    let store = store_of(&mount);
    let start = Instant::now();
    let (bytes, part) = bundle(mails);
    put(&store, &bundle_key("anna", part.bundle), &bytes);
    put_user(&store, "anna", Some(&part));
    drop(bytes);
    println!("\n(a listing of {mails} made in {} s)", start.elapsed().as_secs());
    mount.mount().unwrap();
    let alone = resident(&mount);
    let maildir = mount.root().join("anna/Maildir");
    let (cur, new) = (maildir.join("cur"), maildir.join("new"));
    let start = Instant::now();
    fs::metadata(&cur).unwrap();
    done.insert("open on a fresh machine", ms(start));
    let start = Instant::now();
    assert_eq!(count(&cur) as u64, mails);
    done.insert("list", ms(start));
    done.insert("resident memory, KiB", resident(&mount) - alone);
    let each = |from: u64, act: &dyn Fn(u64)| {
        let one = |n| {
            let start = Instant::now();
            act(n);
            ms(start)
        };
        median((from..from + times).map(one).collect())
    };
    let deliver = |n: u64| {
        let (tmp, name) = (maildir.join("tmp").join(base_name(n)), base_name(n));
        fs::write(&tmp, b"x\n").unwrap();
        fs::rename(&tmp, new.join(name)).unwrap();
    };
    let flag = |n: u64| {
        fs::rename(cur.join(name(n)), cur.join(name(n) + "T")).unwrap();
    };
    let expunge = |n: u64| fs::remove_file(cur.join(name(n))).unwrap();
    let fresh = |n: u64| mails + 100_000 * n;
    done.insert("deliver", each(fresh(1), &deliver));
    done.insert("change a flag", each(mails / 2, &flag));
    done.insert("expunge", each(mails / 4, &expunge));
    // The first flush takes what all that has left.
    flush(&mount);
    let mut took = Vec::new();
    let mut sizes = Vec::new();
    for round in 0..5 {
        for n in 0..10 {
            deliver(fresh(2) + round * 10 + n);
            expunge(mails / 8 + round * 10 + n);
        }
        let before = stored(&store);
        let start = Instant::now();
        flush(&mount);
        took.push(ms(start));
        sizes.push((stored(&store) - before) as f64 / 1024.0);
    }
    done.insert("flush of 20 changes", median(took));
    done.insert("stored by that, KiB", median(sizes));
    // What others wait for while a flush goes on.
    let end = AtomicBool::new(false);
    let waits = std::thread::scope(|scope| {
        let changing = scope.spawn(|| {
            let mut waits: Vec<f64> = Vec::new();
            let mut n = mails / 16;
            while !end.load(Ordering::Relaxed) {
                let start = Instant::now();
                flag(n);
                waits.push(ms(start));
                n += 1;
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            waits
        });
        for _ in 0..5 {
            flush(&mount);
        }
        end.store(true, Ordering::Relaxed);
        changing.join().unwrap()
    });
    done.insert("longest flag change beside flushes", waits.into_iter().fold(0.0, f64::max));
    let start = Instant::now();
    mount.umount().unwrap();
    done.insert("open: hand over", ms(start));
    mount.mount().unwrap();
    let start = Instant::now();
    fs::metadata(&cur).unwrap();
    done.insert("open from local state", ms(start));
    // A session that did not read the parts knows less of them.
    deliver(fresh(3));
    let before = stored(&store);
    flush(&mount);
    done.insert(
        "stored by a later session's flush, KiB",
        (stored(&store) - before) as f64 / 1024.0,
    );
    mount.umount().unwrap();
    done
}

fn flush(mount: &Mount) {
    let (ok, text) = mount.vmailfs(&["metacache", "flush", "-u", "anna"]).unwrap();
    assert!(ok, "{text}");
}

/// Bytes of all bundles.
fn stored(store: &Path) -> u64 {
    let dir = store.join(bundle_key("anna", id(0)));
    let bundles = fs::read_dir(dir.parent().unwrap()).unwrap();
    bundles.map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

fn ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}
