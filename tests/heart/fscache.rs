//! The caches of mails stay inside their bounds, and nobody notices but by the time it takes (I7, I8).

use super::full_disk::FullDisk;
use super::world::*;
use bytes::Bytes;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmailfs::cache::disk::RealDisk;
use vmailfs::cache::fscache::Place;
use vmailfs::fs::api::{Caller, MailFs};
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::promise::Ack;
use vmailfs::vmail::session::Settings;

/// What `du` shows, in bytes; files that vanish meanwhile are not there.
fn du(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    meta.blocks() * 512 + below.map(|entry| du(&entry.path())).sum::<u64>()
}

/// All files below a directory.
fn files(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.path().is_dir() {
            true => files(&entry.path()),
            false => vec![entry.path()],
        })
        .collect()
}

fn tiny(world: &World, fscache: u64, staging: u64) -> Settings {
    let mut settings = world.settings(HERE);
    settings.fscache[0].max = fscache;
    settings.staging_max = staging;
    settings
}

/// Bytes that tell one mail and one place in it from all others.
fn mail(n: usize, size: usize) -> Vec<u8> {
    let mut body = format!("Subject: {n}\n\n").into_bytes();
    while body.len() < size {
        body.extend(format!("{n} {}\n", body.len()).bytes());
    }
    body.truncate(size);
    body
}

async fn read_at(client: &Client, file: Open, at: u64, len: u32) -> Answer<Vec<u8>> {
    client.go(|fs| fs.read(file.ino, file.fh, at, len)).await
}

fn release(client: &Client, file: Open) {
    client.fs.release(file.ino, file.fh);
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides
    }
}

fn bounds_hold(world: &World, client: &Client, step: &str) {
    let session = client.session();
    let (seen, usage) = (du(&session.settings.fscache[0].path), session.fscache.usage().remove(0));
    assert!(seen <= usage.used && usage.used <= usage.max, "{step}: du {seen}, {usage:?}");
    let staged = du(&world.machine_dir(HERE).join("staging"));
    assert!(staged <= session.settings.staging_max, "{step}: staging {staged}");
    assert!(session.streams.used() <= session.settings.stream_memory / 2, "{step}");
}

/// I7, I8: whatever is read, kept open, removed or damaged: bounds hold, and the bytes are right.
async fn random_work(seed: u64, ack: Ack) {
    let world = World::new();
    let mut settings = tiny(&world, 400 << 10, 12 << 20);
    settings.ack = ack;
    let cache = settings.fscache[0].path.clone();
    let client = world.session_with(settings, Arc::new(RealDisk));
    let mut dice = Dice(seed);
    let mut mails: Vec<(String, Vec<u8>)> = Vec::new();
    let mut open: Vec<(Open, Vec<u8>)> = Vec::new();
    for user in ["a", "b", "c"] {
        client.maildir(&[user]).await;
    }
    for n in 0..180 {
        let roll = dice.roll(100);
        let step = format!("seed {seed}, step {n}, {roll}");
        match roll {
            0..30 => {
                let user = ["a", "b", "c"][dice.roll(3)];
                let size = [20, 3_000, 40_000, 150_000, 1_500_000, 4_500_000][dice.roll(6)];
                let body = mail(n, size);
                client.deliver(user, &n.to_string(), &body).await.unwrap();
                mails.push((format!("{user}/new/{n}"), body));
            }
            30..60 if !mails.is_empty() => {
                let (path, body) = &mails[dice.roll(mails.len())];
                assert!(client.read(path).await.unwrap() == *body, "{step}: {path}");
            }
            60..75 if !mails.is_empty() && open.len() < 8 => {
                let (path, body) = &mails[dice.roll(mails.len())];
                open.push((client.open(path, READ).await.unwrap(), body.clone()));
            }
            75..80 if !open.is_empty() => {
                let (file, _) = open.swap_remove(dice.roll(open.len()));
                release(&client, file);
            }
            80..85 if !mails.is_empty() => {
                let (path, _) = mails.swap_remove(dice.roll(mails.len()));
                client.unlink(&path).await.unwrap();
            }
            85..90 => {
                let all = files(&cache);
                if !all.is_empty() {
                    fs::remove_file(&all[dice.roll(all.len())]).unwrap();
                }
            }
            90 if cache.exists() => fs::remove_dir_all(&cache).unwrap(),
            91..93 => {
                client.session().fscache.rescan(None, None).unwrap();
            }
            93 => drop(client.session().fscache.clean()),
            _ => {
                client.flush(["a", "b", "c"][dice.roll(3)]).await;
            }
        }
        // The slow readers read on, anywhere.
        for (file, body) in &open {
            let at = dice.roll(body.len());
            let len = (1 << (8 + dice.roll(10))).min(body.len() - at);
            let got = read_at(&client, *file, at as u64, len as u32).await.unwrap();
            assert!(got == body[at..at + len], "{step}: {at}");
        }
        bounds_hold(&world, &client, &step);
    }
    for (file, _) in open {
        release(&client, file);
    }
    for (path, body) in &mails {
        assert!(client.read(path).await.unwrap() == *body, "seed {seed}: {path}");
    }
    let usage = client.session().fscache.usage().remove(0);
    assert!(usage.pinned == 0 && usage.reserved == 0, "{usage:?}");
    assert!(usage.hits > 0 && usage.evictions > 0 && usage.streamed > 0, "{usage:?}");
    assert!(client.session().staging.usage().0 == 0);
}

#[tokio::test]
async fn i8_bounds_hold_under_random_work() {
    for seed in 0..2 {
        random_work(seed, Ack::Store).await;
    }
}

#[tokio::test]
async fn i8_bounds_hold_with_mails_that_are_only_promised() {
    random_work(7, Ack::Journal).await;
}

/// A cache too small for anything, and a mail in it.
async fn streamed(size: usize) -> (World, Client, Vec<u8>) {
    let world = World::new();
    let client = world.session_with(tiny(&world, 100 << 10, 64 << 20), Arc::new(RealDisk));
    client.maildir(&["u"]).await;
    let body = mail(1, size);
    client.deliver("u", "1", &body).await.unwrap();
    (world, client, body)
}

/// Readers of one large mail bring each piece once, however they stand to one another.
#[tokio::test]
async fn a_mail_without_room_is_read_in_pieces() {
    let (world, client, body) = streamed(3_500_000).await;
    world.requests();
    let files =
        [client.open("u/new/1", READ).await.unwrap(), client.open("u/new/1", READ).await.unwrap()];
    for at in (0..body.len()).step_by(100_000) {
        for file in files {
            let got = read_at(&client, file, at as u64, 100_000).await.unwrap();
            // Never a short read but at the end: the kernel would take that for the end.
            assert!(got == body[at..body.len().min(at + 100_000)], "{at}");
        }
    }
    let gets = world.requests().iter().filter(|(op, ..)| *op == Op::Get).count();
    assert_eq!(gets, 4);
    let usage = client.session().fscache.usage().remove(0);
    assert_eq!(usage.streamed, body.len() as u64);
    for file in files {
        release(&client, file);
    }
}

/// What the store gives is not what was published: the reader is not told that all is well.
#[tokio::test]
async fn i7_a_streamed_mail_is_checked_before_its_end() {
    let (world, client, body) = streamed(2_500_000).await;
    let key = world.mails().remove(0);
    let mut wrong = body.clone();
    wrong[1_200_000] ^= 1;
    world.mem.damage(&key, wrong);
    for _ in 0..2 {
        assert_eq!(client.read("u/new/1").await, Err(libc::EIO));
    }
    // Its end alone is not given to who was there when it was found out, nor to others.
    let file = client.open("u/new/1", READ).await.unwrap();
    assert_eq!(read_at(&client, file, 2_400_000, 1000).await, Err(libc::EIO));
    world.mem.damage(&key, body.clone());
    assert!(client.read("u/new/1").await.unwrap() == body);
    assert!(read_at(&client, file, 2_400_000, 1000).await.unwrap() == body[2_400_000..2_401_000]);
    release(&client, file);
}

/// The same when the end was read first, as an IMAP client may.
#[tokio::test]
async fn i7_an_end_that_was_read_first_is_checked_with_the_rest() {
    let (world, client, body) = streamed(2_500_000).await;
    let key = world.mails().remove(0);
    let mut wrong = body.clone();
    wrong[100] ^= 1;
    world.mem.damage(&key, wrong.clone());
    let file = client.open("u/new/1", READ).await.unwrap();
    assert!(read_at(&client, file, 2_400_000, 1000).await.is_ok());
    assert_eq!(read_at(&client, file, 1_100_000, 1000).await, Err(libc::EIO));
    release(&client, file);
    // Another length shows at once.
    world.mem.damage(&key, wrong[..2_000_000].to_vec());
    assert_eq!(client.open("u/new/1", READ).await.map(|_| ()), Err(libc::EIO));
}

/// A small mail that is spoilt on its way is read again before anybody sees it.
#[tokio::test]
async fn i7_a_streamed_mail_of_one_piece_is_never_shown_wrong() {
    let (world, client, body) = streamed(200_000).await;
    let spoilt = Arc::new(AtomicUsize::new(2));
    let (left, wrong) = (spoilt.clone(), Bytes::from(vec![b'x'; body.len()]));
    world.faults(move |request| match request.op {
        Op::Get if left.load(Ordering::SeqCst) > 0 => {
            left.fetch_sub(1, Ordering::SeqCst);
            Fault::WrongBody(wrong.clone())
        }
        _ => Fault::None,
    });
    assert!(client.read("u/new/1").await.unwrap() == body);
    assert_eq!(spoilt.load(Ordering::SeqCst), 0);
}

/// mdbox: pieces of a growing file, more and larger than there is room for.
#[tokio::test]
async fn i8_extents_without_room_are_streamed() {
    let world = World::new();
    let client = world.session_with(tiny(&world, 200 << 10, 64 << 20), Arc::new(RealDisk));
    client.mkdir("u").await.unwrap();
    client.mkdir("u/storage").await.unwrap();
    let file = client.create("u/storage/m.1").await.unwrap();
    let mut body = Vec::new();
    for (n, size) in
        [1_000, 90_000, 1_500_000, 10, 60_000, 60_000, 2_200_000, 7].into_iter().enumerate()
    {
        client.write(file, body.len() as u64, &mail(n, size)).await.unwrap();
        client.fsync(file).await.unwrap();
        body.extend(mail(n, size));
        bounds_hold(&world, &client, "append");
    }
    for n in 0..40 {
        client.write(file, body.len() as u64, &mail(n, 50)).await.unwrap();
        client.fsync(file).await.unwrap();
        body.extend(mail(n, 50));
    }
    client.close_file(file).await.unwrap();
    for _ in 0..2 {
        assert!(client.read("u/storage/m.1").await.unwrap() == body);
        bounds_hold(&world, &client, "read");
    }
    let file = client.open("u/storage/m.1", READ).await.unwrap();
    for at in [0, 1_590_000, 99_000, 3_800_000, 1_591_100] {
        let end = body.len().min(at + 130_000);
        assert!(read_at(&client, file, at as u64, 130_000).await.unwrap() == body[at..end], "{at}");
        bounds_hold(&world, &client, "read somewhere");
    }
    release(&client, file);
    // Written once more from within a large one: back to staging, and published again.
    let file = client.open("u/storage/m.1", WRITE).await.unwrap();
    client.write(file, 1_000_000, b"changed").await.unwrap();
    body[1_000_000..1_000_007].copy_from_slice(b"changed");
    client.fsync(file).await.unwrap();
    client.close_file(file).await.unwrap();
    assert!(client.read("u/storage/m.1").await.unwrap() == body);
    bounds_hold(&world, &client, "rewrite");
}

/// A disk that is full below the bound, or broken: reads and deliveries go on, and so does the cache
/// once it works again.
#[tokio::test]
async fn i7_the_disk_of_fscache_fails_and_nobody_notices() {
    let world = World::new();
    let settings = world.settings(HERE);
    let disk = FullDisk::below(Arc::new(RealDisk), &settings.fscache[0].path);
    let disk = Arc::new(disk);
    let client = world.session_with(settings, disk.clone());
    client.maildir(&["u"]).await;
    let body = |n: usize| mail(n, 30_000);
    for n in 0..5 {
        client.deliver("u", &n.to_string(), &body(n)).await.unwrap();
    }
    client.session().fscache.clean();
    let all_is_well = async |from: usize, to: usize| {
        for n in from..to {
            client.deliver("u", &n.to_string(), &body(n)).await.unwrap();
        }
        for n in 0..to {
            assert!(client.read(&format!("u/new/{n}")).await.unwrap() == body(n), "{n}");
        }
        client.session().fscache.usage().remove(0)
    };
    disk.set_full(true);
    let usage = all_is_well(5, 10).await;
    assert!(!usage.failing && usage.streamed >= 5 * 30_000, "{usage:?}");
    disk.set_full(false);
    let mut after = all_is_well(10, 12).await;
    for _ in 0..8 {
        after = all_is_well(12, 12).await;
    }
    assert_eq!(after.files, 12, "it is used again");
    disk.set_broken(true);
    let usage = all_is_well(12, 15).await;
    // Those that were streamed before are still in memory.
    assert!(usage.failing && usage.streamed >= after.streamed + 5 * 30_000, "{usage:?}");
    disk.set_broken(false);
    let mut usage = usage;
    for _ in 0..10 {
        usage = all_is_well(15, 15).await;
    }
    assert!(!usage.failing, "it is tried again now and then: {usage:?}");
}

/// fscache on another file system than staging, as on a tmpfs: fresh mail is copied there.
#[tokio::test]
async fn a_fresh_mail_is_kept_on_another_file_system() {
    let world = World::new();
    let other = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut settings = world.settings(HERE);
    settings.fscache[0].path = other.path().join("c");
    let client = world.session_with(settings, Arc::new(RealDisk));
    let dev = |path: &Path| fs::metadata(path).unwrap().dev();
    assert_ne!(
        dev(other.path()),
        dev(&world.machine_dir(HERE)),
        "this test needs two file systems"
    );
    client.maildir(&["u"]).await;
    client.deliver("u", "1", &mail(1, 700_000)).await.unwrap();
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while std::time::Instant::now() < end {
        if client.session().fscache.usage()[0].files == 1 && client.session().staging.usage().0 == 0
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    world.store.set_down(true);
    assert!(client.read("u/new/1").await.unwrap() == mail(1, 700_000));
    assert_eq!(client.session().staging.usage().0, 0);
    bounds_hold(&world, &client, "copied");
}

/// One of several directories is lost; the users of the others do not read a byte more.
#[tokio::test]
async fn i7_one_disk_of_several_fails() {
    let world = World::new();
    let mut settings = world.settings(HERE);
    let dir = world.machine_dir(HERE);
    settings.fscache =
        (0..2).map(|n| Place { path: dir.join(format!("c{n}")), max: 1 << 20 }).collect();
    let disk = Arc::new(FullDisk::below(Arc::new(RealDisk), &dir.join("c0")));
    let client = world.session_with(settings, disk.clone());
    let users = ["ann", "bob", "eve", "joe", "tom", "zoe"];
    for user in users {
        client.maildir(&[user]).await;
        client.deliver(user, "1", user.as_bytes()).await.unwrap();
    }
    disk.set_broken(true);
    for user in users {
        assert_eq!(client.read(&format!("{user}/new/1")).await.unwrap(), user.as_bytes());
    }
    let usage = client.session().fscache.usage();
    assert!(usage[0].failing && usage[0].streamed > 0, "{usage:?}");
    assert!(!usage[1].failing && usage[1].streamed == 0 && usage[1].hits > 0, "{usage:?}");
}

/// Staging is full: who delivers waits, others go on, and is deferred when nothing becomes free.
#[tokio::test]
async fn i8_a_delivery_waits_for_room_in_staging() {
    let world = World::new();
    // No room in fscache at all: a publish needs none.
    let client = world.session_with(tiny(&world, 40 << 10, 2 << 20), Arc::new(RealDisk));
    client.maildir(&["u"]).await;
    client.maildir(&["v"]).await;
    client.deliver("v", "0", b"small").await.unwrap();
    let first = client.create("u/tmp/1").await.unwrap();
    client.write(first, 0, &mail(1, 1_500_000)).await.unwrap();
    let second = client.create("u/tmp/2").await.unwrap();
    let other = client.clone();
    let waiting = tokio::spawn(async move { other.write(second, 0, &mail(2, 900_000)).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!waiting.is_finished());
    assert_eq!(client.read("v/new/0").await.unwrap(), b"small");
    bounds_hold(&world, &client, "waiting");
    client.fsync(first).await.unwrap();
    client.close_file(first).await.unwrap();
    waiting.await.unwrap().unwrap();
    client.close_file(second).await.unwrap();
    client.rename("u/tmp/2", "u/new/2").await.unwrap();
    assert!(client.read("u/new/2").await.unwrap() == mail(2, 900_000));
    // In vain: deferred, after as long as a delivery may wait; nothing of it is published.
    let first = client.create("u/tmp/3").await.unwrap();
    client.write(first, 0, &mail(1, 1_500_000)).await.unwrap();
    let second = client.create("u/tmp/4").await.unwrap();
    let before = world.clock_boot();
    assert_eq!(client.write(second, 0, &mail(2, 900_000)).await, Err(libc::ENOSPC));
    let waited = (world.clock_boot() - before).as_secs();
    assert!((19..=22).contains(&waited), "{waited}");
    assert_eq!(client.fsync(second).await, Err(libc::ENOSPC));
    // Larger than all of it: at once.
    let before = world.clock_boot();
    assert_eq!(client.write(second, 0, &mail(2, 3_000_000)).await, Err(libc::ENOSPC));
    assert!((world.clock_boot() - before).as_secs() < 2);
    bounds_hold(&world, &client, "refused");
}

/// Many half-written mails must not keep one another from being finished.
#[tokio::test]
async fn i8_what_has_begun_can_be_finished() {
    let world = World::new();
    let client = world.session_with(tiny(&world, 40 << 10, 4 << 20), Arc::new(RealDisk));
    client.maildir(&["u"]).await;
    let deliveries = (0..12).map(|n| {
        let client = client.clone();
        tokio::spawn(async move {
            let tmp = format!("u/tmp/{n}");
            let file = client.create(&tmp).await.unwrap();
            let body = mail(n, 900_000);
            for at in (0..body.len()).step_by(100_000) {
                client.write(file, at as u64, &body[at..at + 100_000]).await.unwrap();
                tokio::task::yield_now().await;
            }
            client.fsync(file).await.unwrap();
            client.close_file(file).await.unwrap();
            client.rename(&tmp, &format!("u/new/{n}")).await.unwrap();
        })
    });
    for delivery in deliveries.collect::<Vec<_>>() {
        delivery.await.unwrap();
        bounds_hold(&world, &client, "delivered");
    }
    for n in 0..12 {
        assert!(client.read(&format!("u/new/{n}")).await.unwrap() == mail(n, 900_000));
    }
}

/// A small mail comes quicker from the kernel's own pages.
#[tokio::test]
async fn only_large_mails_are_read_past_the_daemon() {
    let world = World::new();
    let client = world.session(HERE);
    client.maildir(&["u"]).await;
    let who = Caller { uid: 1000, gid: 1000, pid: 1 };
    for (name, size, direct) in [("1", 5000, false), ("2", 200_000, true)] {
        client.deliver("u", name, &mail(1, size)).await.unwrap();
        let ino = client.look(&format!("u/new/{name}")).await.unwrap().attr.ino;
        let opened = client.go(|fs| fs.open(who, ino, READ)).await.unwrap();
        assert_eq!(opened.backing.is_some(), direct, "{size} bytes");
        assert!(opened.keep_cache);
        client.fs.release(ino, opened.fh);
    }
}
