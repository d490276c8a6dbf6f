//! Eviction: the bound holds, what comes back is what was there, and the order is that of the
//! weights (I7, I8).

use super::metacache::{du, exact};
use super::world::*;
use std::collections::BTreeMap;
use std::time::Duration;
use vmailfs::cache::disk::RealDisk;
use vmailfs::cache::metacache::Limits;
use vmailfs::cache::weight::Weights;
use vmailfs::vmail::evict;
use vmailfs::vmail::metacache::{Clean, Unflushed};
use vmailfs::vmail::session::{Metacache, Settings};

const LOG: &str = "u/index/.INBOX/dovecot.index.log";

async fn user(client: &Client, user: &str) {
    client.mkdir(user).await.unwrap();
    for dir in ["index", "index/.INBOX", "index/.Old", "index/.Old/fts"] {
        client.mkdir(&format!("{user}/{dir}")).await.unwrap();
    }
    for (file, len) in [
        ("index/dovecot.list.index.log", 3000),
        ("index/.INBOX/dovecot.index.log", 20_000),
        ("index/.INBOX/dovecot.index.cache", 30_000),
        ("index/.Old/dovecot.index.log", 9000),
        ("index/.Old/fts/glass.1", 70_000),
    ] {
        client.put(&format!("{user}/{file}"), &noise(len)).await.unwrap();
    }
}

fn on_disk(world: &World, path: &str) -> bool {
    world.machine_dir(HERE).join("meta").join(path).exists()
}

#[tokio::test]
async fn what_was_evicted_comes_back_exactly_as_it_was() {
    let world = World::new();
    let client = world.session(HERE);
    user(&client, "u").await;
    let before = format!("{:?}", client.stat(LOG).await.unwrap());
    let other = "u/index/.Old/dovecot.index.log";
    let cell = client.cell("u");
    assert!(evict::evict_unit(&cell, 2).await.unwrap() > 50_000);
    assert!(!on_disk(&world, LOG));
    assert!(on_disk(&world, other));
    exact(&client).await;
    // Looking at it costs nothing, reading it one request.
    world.requests();
    assert_eq!(format!("{:?}", client.stat(LOG).await.unwrap()), before);
    assert_eq!(world.requests(), []);
    assert_eq!(client.read(LOG).await.unwrap(), noise(20_000));
    assert_eq!(world.requests().len(), 1);
    assert_eq!(client.read("u/index/.INBOX/dovecot.index.cache").await.unwrap(), noise(30_000));
    assert_eq!(format!("{:?}", client.stat(LOG).await.unwrap()), before);
    exact(&client).await;
    // Nothing of it counts as changed.
    assert!(!client.flush_all("u").await.flushed);
    // It goes on from there.
    evict::evict_unit(&cell, 2).await.unwrap();
    client.append(LOG, b"more").await.unwrap();
    let whole = [noise(20_000), b"more".to_vec()].concat();
    assert_eq!(client.read(LOG).await.unwrap(), whole);
    client.flush_all("u").await;
    evict::evict_unit(&cell, 2).await.unwrap();
    assert_eq!(client.read(LOG).await.unwrap(), whole);
    exact(&client).await;
}

#[tokio::test]
async fn what_is_open_or_held_stays() {
    let world = World::new();
    let client = world.session(HERE);
    user(&client, "u").await;
    let file = client.open(LOG, WRITE).await.unwrap();
    let held = client.create("u/index/.INBOX/dovecot.index.log.lock").await.unwrap();
    client.close_file(held).await.unwrap();
    let cell = client.cell("u");
    for priority in (0..4).rev() {
        evict::evict_unit(&cell, priority).await.unwrap();
    }
    assert!(on_disk(&world, LOG));
    assert!(on_disk(&world, "u/index/.INBOX/dovecot.index.log.lock"));
    assert!(!on_disk(&world, "u/index/.INBOX/dovecot.index.cache"));
    assert!(!on_disk(&world, "u/index/.Old/fts/glass.1"));
    client.write(file, 20_000, b"more").await.unwrap();
    assert_eq!(client.read_open(file).await.unwrap().len(), 20_004);
    assert_eq!(client.read("u/index/.Old/fts/glass.1").await.unwrap(), noise(70_000));
    exact(&client).await;
}

/// A death at any time after an eviction: no UIDs burnt, nothing restored.
#[tokio::test]
async fn an_eviction_survives_the_process() {
    let world = World::new();
    let client = world.session(HERE);
    user(&client, "u").await;
    client.flush_all("u").await;
    client.cell("u").if_open(|user| user.checkpoint()).unwrap().unwrap();
    evict::evict_unit(&client.cell("u"), 2).await.unwrap();
    client.append("u/index/.Old/dovecot.index.log", b"unflushed").await.unwrap();
    drop(client);
    let client = world.session(HERE);
    assert_eq!(client.read(LOG).await.unwrap(), noise(20_000));
    assert_eq!(client.read("u/index/.INBOX/dovecot.index.cache").await.unwrap(), noise(30_000));
    let other = client.read("u/index/.Old/dovecot.index.log").await.unwrap();
    assert_eq!(other, [noise(9000), b"unflushed".to_vec()].concat());
    let burnt = client
        .cell("u")
        .if_open(|user| user.tree.folders.values().filter_map(|f| f.burnt_below).count());
    assert_eq!(burnt, Some(0));
    exact(&client).await;
}

#[tokio::test]
async fn names_of_what_is_evicted_can_be_changed() {
    let world = World::new();
    let client = world.session(HERE);
    user(&client, "u").await;
    let cell = client.cell("u");
    evict::evict_unit(&cell, 3).await.unwrap();
    let (log, moved) = ("u/index/.Old/dovecot.index.log", "u/index/.Old/dovecot.index.log.2");
    client.rename(log, moved).await.unwrap();
    assert_eq!(client.read(moved).await.unwrap(), noise(9000));
    client.flush_all("u").await;
    evict::evict_unit(&cell, 3).await.unwrap();
    client.rename("u/index/.Old", "u/index/.Older").await.unwrap();
    assert_eq!(client.read("u/index/.Older/dovecot.index.log.2").await.unwrap(), noise(9000));
    client.flush_all("u").await;
    evict::evict_unit(&cell, 3).await.unwrap();
    client.unlink("u/index/.Older/dovecot.index.log.2").await.unwrap();
    evict::evict_unit(&cell, 2).await.unwrap();
    client.replace(LOG, b"another").await.unwrap();
    client.flush_all("u").await;
    drop(client);
    let client = world.session(FRESH);
    assert_eq!(client.read(LOG).await.unwrap(), b"another");
    assert_eq!(client.list("u/index/.Older").await.unwrap(), ["fts"]);
}

fn tight_settings(world: &World, max_space: u64, max_grace: u64, weights: Weights) -> Settings {
    let mut settings = world.settings(HERE);
    settings.metacache =
        Metacache { limits: Limits { max_space, max_grace }, weights, ..Metacache::default() };
    settings
}

fn tight(world: &World, max_space: u64, max_grace: u64, weights: Weights) -> Client {
    let settings = tight_settings(world, max_space, max_grace, weights);
    world.session_with(settings, std::sync::Arc::new(RealDisk))
}

/// The order of eviction is that of the weights: last access, plus a day for roots, an hour for
/// INBOX.
#[tokio::test]
async fn the_order_is_that_of_the_weights() {
    let world = World::new();
    let client = tight(&world, 10 << 20, 1 << 20, Weights::default());
    for (name, pause) in [("a", 600), ("b", 1800), ("c", 1800)] {
        user(&client, name).await;
        client.flush_all(name).await;
        world.clock.advance(Duration::from_secs(pause));
    }
    let order: Vec<(String, usize)> = client
        .session()
        .metacache
        .units()
        .into_iter()
        .map(|unit| (unit.user.to_string(), unit.priority))
        .collect();
    // FTS is kept a day longer, as roots are; an INBOX an hour.
    let want = [
        ("a", 3),
        ("b", 3),
        ("c", 3),
        ("a", 2),
        ("b", 2),
        ("c", 2),
        ("a", 1),
        ("a", 0),
        ("b", 1),
        ("b", 0),
        ("c", 1),
        ("c", 0),
    ];
    assert_eq!(order, want.map(|(user, p)| (user.to_string(), p)));
}

#[tokio::test]
async fn a_full_metacache_evicts_in_that_order() {
    let world = World::new();
    let client = tight(&world, 900 << 10, 1 << 20, Weights::none());
    let task = tokio::spawn(evict::run(client.session().clone()));
    for name in ["a", "b", "c", "d", "e"] {
        user(&client, name).await;
        client.flush_all(name).await;
        world.clock.advance(Duration::from_secs(1000));
    }
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while client.session().metacache.excess() > 0 && std::time::Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    task.abort();
    assert_eq!(client.session().metacache.excess(), 0);
    assert!(client.session().metacache.used() <= 900 << 10);
    let list = client.session().metacache_list();
    let fts = |n: usize| {
        list.iter().find(|u| u.user == ["a", "b", "c", "d", "e"][n]).map_or(0, |u| u.bytes[1])
    };
    // What was used longest ago is gone, what was used last is whole.
    assert!(fts(0) < 20_000 && fts(4) > 70_000, "{list:?}");
    exact(&client).await;
}

#[tokio::test]
async fn clean_wants_changes_flushed_or_given_up() {
    let world = World::new();
    let client = world.session(HERE);
    user(&client, "u").await;
    client.maildir(&["u/mail"]).await;
    client.flush_all("u").await;
    client.append(LOG, b"change").await.unwrap();
    client.deliver("u/mail", "1700000000.M1P1.host", b"mail").await.unwrap();
    let session = client.session().clone();
    let refused = session.metacache_clean("u", Clean::default()).await;
    assert_eq!(refused.unwrap_err().errno(), libc::EPERM);
    let flush = Clean { unflushed: Unflushed::Flush, min_priority: 2, ..Clean::default() };
    let done = session.metacache_clean("u", flush).await.unwrap();
    assert!(done.freed > 50_000 && done.left > 70_000, "{done:?}");
    assert!(!on_disk(&world, LOG) && on_disk(&world, "u/index/.Old/fts/glass.1"));
    assert_eq!(client.read(LOG).await.unwrap().len(), 20_006);
    // Used just now.
    let old = Clean { unused_for: Duration::from_secs(86_400), ..Clean::default() };
    assert_eq!(session.metacache_clean("u", old).await.unwrap().freed, 0);

    // Thrown away while somebody has files open: back to the last flush, and every mail is there.
    client.append(LOG, b"thrown away").await.unwrap();
    client.deliver("u/mail", "1700000000.M2P1.host", b"second").await.unwrap();
    let file = client.open(LOG, WRITE).await.unwrap();
    let discard = Clean { unflushed: Unflushed::Discard, ..Clean::default() };
    let done = session.metacache_clean("u", discard).await.unwrap();
    assert_eq!(done.left, 0);
    assert_eq!(client.write(file, 0, b"x").await, Err(libc::ESTALE));
    assert_eq!(client.read(LOG).await.unwrap().len(), 20_006);
    let mails = client.list("u/mail/new").await.unwrap();
    assert_eq!(mails.len(), 2, "{mails:?}");
    exact(&client).await;
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides
    }
}

/// Random work on far more than fits: no error, the right content, and at no step more on the disk
/// than max_space and max_grace.
#[tokio::test]
async fn the_bound_holds_at_every_step() {
    for seed in 1..4 {
        let (max_space, max_grace) = (900 << 10, 700 << 10);
        let world = World::new();
        // While somebody waits this clock runs faster than what is waited for.
        let tight = |world: &World, max_space, max_grace, weights| {
            let mut settings = tight_settings(world, max_space, max_grace, weights);
            settings.delivery_timeout = Duration::from_secs(5000);
            world.session_with(settings, std::sync::Arc::new(RealDisk))
        };
        let mut client = tight(&world, max_space, max_grace, Weights::default());
        let mut task = tokio::spawn(evict::run(client.session().clone()));
        let mut dice = Dice(seed);
        let mut model: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let (mut written, mut most) = (0u64, 0);
        for step in 0..400 {
            let user = format!("u{}", dice.roll(12));
            let folder = [".INBOX", ".Old", ".Junk", ".A.B"][dice.roll(4)];
            let name = ["dovecot.index.log", "dovecot.index", "other"][dice.roll(3)];
            let path = format!("{user}/index/{folder}/{name}");
            let what = dice.roll(100);
            let bytes = noise(1 + dice.roll(40_000));
            if !model.keys().any(|p| p.starts_with(&format!("{user}/"))) {
                match client.mkdir(&user).await {
                    Ok(()) | Err(libc::EEXIST) => {}
                    other => panic!("{other:?}"),
                }
                client.mkdir(&format!("{user}/index")).await.unwrap();
                for folder in [".INBOX", ".Old", ".Junk", ".A.B"] {
                    client.mkdir(&format!("{user}/index/{folder}")).await.unwrap();
                }
                model.insert(format!("{user}/index/known"), Vec::new());
                client.put(&format!("{user}/index/known"), b"").await.unwrap();
            }
            match what {
                0..25 => {
                    client.put(&path, &bytes).await.unwrap();
                    written += bytes.len() as u64;
                    model.insert(path.clone(), bytes);
                }
                25..40 => {
                    client.replace(&path, &bytes).await.unwrap();
                    written += bytes.len() as u64;
                    model.insert(path.clone(), bytes);
                }
                40..60 => {
                    if let Some(known) = model.get_mut(&path) {
                        client.append(&path, &bytes[..bytes.len() / 4]).await.unwrap();
                        known.extend(&bytes[..bytes.len() / 4]);
                        written += bytes.len() as u64 / 4;
                    }
                }
                60..90 => match model.get(&path) {
                    Some(known) => {
                        let read = client.read(&path).await.unwrap();
                        assert!(read == *known, "{seed} {step} {path}: {}", read.len());
                    }
                    None => {
                        let read = client.read(&path).await.map(|bytes| bytes.len());
                        assert_eq!(read, Err(libc::ENOENT), "{seed} {step} {path}");
                    }
                },
                90..94 => {
                    if model.remove(&path).is_some() {
                        client.unlink(&path).await.unwrap();
                    }
                }
                94..96 => {
                    if client.session().known_user(&user).is_some() {
                        client.flush(&user).await;
                    }
                }
                96..98 => world.clock.advance(Duration::from_secs(dice.roll(5000) as u64)),
                _ => {
                    // The process dies.
                    task.abort();
                    drop(client);
                    client = tight(&world, max_space, max_grace, Weights::default());
                    task = tokio::spawn(evict::run(client.session().clone()));
                }
            }
            let seen = du(&client);
            most = most.max(seen);
            assert!(seen <= max_space + max_grace, "{seed} {step}: {seen}");
        }
        assert!(written > 2 * max_space && most > max_space / 2, "{written} {most}");
        for (path, known) in &model {
            assert!(client.read(path).await.unwrap() == *known, "{seed} {path}");
            assert!(du(&client) <= max_space + max_grace);
        }
        exact(&client).await;
        task.abort();
        client.close().await;
        // And all of it is in the store.
        let client = world.session(FRESH);
        for (path, known) in &model {
            assert!(client.read(path).await.unwrap() == *known, "{seed} {path}");
        }
    }
}

/// Nothing can go: who wants more waits, and is told to come again; who reads is served.
#[tokio::test]
async fn where_nothing_can_go_writers_are_deferred_and_readers_served() {
    let world = World::new();
    let client = tight(&world, 300 << 10, 100 << 10, Weights::none());
    let task = tokio::spawn(evict::run(client.session().clone()));
    user(&client, "u").await;
    let file = client.open("u/index/.Old/fts/glass.1", WRITE).await.unwrap();
    let mut refused = None;
    for n in 0..40 {
        if let Err(errno) = client.write(file, 70_000 + n * 16_384, &noise(16_384)).await {
            refused = Some(errno);
            break;
        }
        assert!(du(&client) <= 400 << 10);
    }
    assert_eq!(refused, Some(libc::EAGAIN));
    assert!(client.read_open(file).await.unwrap().len() > 100_000);
    client.truncate(file, 10).await.unwrap();
    client.write(file, 10, b"room again").await.unwrap();
    client.close_file(file).await.unwrap();
    task.abort();
}

/// A folder whose index files alone are more than the metacache may hold: the bound holds, whoever opens
/// the folder is told to come again, at once, and everybody else is served.
#[tokio::test]
async fn a_folder_that_can_never_be_held_is_refused_at_once() {
    let world = World::new();
    let client = world.session(FRESH);
    user(&client, "u").await;
    client.put("u/index/.Old/dovecot.index.cache", &noise(500_000)).await.unwrap();
    client.close().await;
    let client = tight(&world, 300 << 10, 100 << 10, Weights::none());
    let task = tokio::spawn(evict::run(client.session().clone()));
    let begun = std::time::Instant::now();
    let refused = client.read("u/index/.Old/dovecot.index.log").await;
    assert_eq!(refused.map(|bytes| bytes.len()), Err(libc::EAGAIN));
    // Nobody waits for what cannot come.
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(du(&client) <= 400 << 10);
    assert_eq!(client.read(LOG).await.unwrap(), noise(20_000));
    assert!(client.session().counts.now().evictions.iter().sum::<u64>() < 100);
    task.abort();
    client.close().await;
    let wide = world.session(HERE);
    assert_eq!(wide.read("u/index/.Old/dovecot.index.log").await.unwrap(), noise(9000));
}

/// What was evicted to make room is counted, by priority.
#[tokio::test]
async fn evictions_are_counted() {
    let world = World::new();
    let client = tight(&world, 300 << 10, 200 << 10, Weights::none());
    let task = tokio::spawn(evict::run(client.session().clone()));
    for name in ["a", "b", "c", "d"] {
        user(&client, name).await;
    }
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while client.session().metacache.used() > 300 << 10 {
        assert!(std::time::Instant::now() < end, "nothing is evicted");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let counts = client.session().counts.now();
    for (n, bytes) in counts.evictions.into_iter().zip(counts.evicted_bytes) {
        assert_eq!(n > 0, bytes > 0, "{counts:?}");
    }
    assert!(counts.evicted_bytes.iter().sum::<u64>() > 200 << 10, "{counts:?}");
    task.abort();
}

/// Users who load folders and wait for room do not keep from one another what is flushed and not open.
#[tokio::test]
async fn what_is_flushed_goes_while_a_folder_is_loaded() {
    let world = World::new();
    let client = world.session(HERE);
    user(&client, "u").await;
    let cell = client.cell("u");
    client.flush_all("u").await;
    client.append("u/index/.Old/dovecot.index.log", &noise(500)).await.unwrap();
    let loads = cell.loading.lock().await;
    world.requests();
    assert!(evict::evict_unit(&cell, 2).await.unwrap() > 50_000);
    assert!(!on_disk(&world, LOG));
    // What is not flushed stays, for a flush might wait for the same.
    evict::evict_unit(&cell, 3).await.unwrap();
    assert!(on_disk(&world, "u/index/.Old/dovecot.index.log"));
    assert_eq!(world.requests(), []);
    drop(loads);
    assert_eq!(client.read(LOG).await.unwrap(), noise(20_000));
    exact(&client).await;
}
