//! A mount whose caches are far too small for what is done on it, seen from outside (I8).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::mount::Mount;
use support::watch::Watch;

const MB: u64 = 1 << 20;
const FSCACHE: u64 = 8 * MB;
const STAGING: u64 = 64 * MB;

/// Bytes of a mail from `at` on: different for each mail and place.
fn fill(n: u64, at: u64, out: &mut [u8]) {
    for (i, byte) in out.iter_mut().enumerate() {
        let word = (at + i as u64) / 8;
        let mixed = (word ^ n << 40).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
        *byte = (mixed >> (((at + i as u64) % 8) * 8)) as u8;
    }
}

/// Compares what is read with what was written, in steps of so many bytes with pauses between them.
fn check(file: &File, n: u64, size: u64, step: usize, pause: Duration) {
    let (mut got, mut want) = (vec![0; step], vec![0; step]);
    let mut at = 0;
    while at < size {
        let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(step);
        file.read_exact_at(&mut got[..len], at).unwrap_or_else(|e| panic!("mail {n} at {at}: {e}"));
        fill(n, at, &mut want[..len]);
        assert!(got[..len] == want[..len], "mail {n} is wrong at {at}");
        at += len as u64;
        std::thread::sleep(pause);
    }
    assert_eq!(file.read_at(&mut got, size).unwrap(), 0, "mail {n} is longer");
}

fn deliver(home: &Path, n: u64, size: u64) -> PathBuf {
    let tmp = home.join(format!("tmp/{n}"));
    let mut file = File::create(&tmp).unwrap();
    let mut buf = vec![0; 256 << 10];
    let mut at = 0;
    while at < size {
        let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(buf.len());
        fill(n, at, &mut buf[..len]);
        file.write_all(&buf[..len]).unwrap_or_else(|e| panic!("mail {n} at {at}: {e}"));
        at += len as u64;
    }
    file.sync_all().unwrap();
    drop(file);
    let new = home.join(format!("new/{n}"));
    fs::rename(&tmp, &new).unwrap();
    new
}

/// Removes cached files, and now and then whole directories of them, while others read.
fn vandal(cache: &Path, stop: &AtomicBool) {
    let mut n = 0u64;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        for hh in fs::read_dir(cache).into_iter().flatten().flatten() {
            let user = fs::read_dir(hh.path()).into_iter().flatten().flatten().next();
            let Some(user) = user.map(|u| u.path()) else { continue };
            let removed = match n % 5 {
                0 => fs::remove_dir_all(&user),
                _ => match fs::read_dir(&user).into_iter().flatten().flatten().next() {
                    Some(file) => fs::remove_file(file.path()),
                    None => Ok(()),
                },
            };
            match removed {
                Err(e)
                    if !matches!(
                        e.kind(),
                        ErrorKind::NotFound
                            | ErrorKind::DirectoryNotEmpty
                            | ErrorKind::NotADirectory
                    ) =>
                {
                    panic!("{e}")
                }
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(30));
    }
}

#[test]
fn i8_caches_stay_inside_their_bounds_and_nobody_sees_an_error() {
    let begun = Instant::now();
    let mut mount = Mount::on_directory()
        .option(&["-o", "fscache.max_size=8M,staging.max_size=64M,store_limits.stream_memory=16M"]);
    mount.mount().unwrap();
    let homes: Vec<PathBuf> = (0..4).map(|n| mount.root().join(format!("user{n}"))).collect();
    for home in &homes {
        fs::create_dir(home).unwrap();
        for sub in ["cur", "new", "tmp"] {
            fs::create_dir(home.join(sub)).unwrap();
        }
    }
    let cache = mount.state().join("fscache");
    let watches = [cache.clone(), mount.state().join("staging")]
        .map(|dir| Watch::new(&[dir], Duration::from_millis(2)));
    let stop = AtomicBool::new(false);
    let moved = std::thread::scope(|scope| {
        scope.spawn(|| vandal(&cache, &stop));
        let work: Vec<_> = homes
            .iter()
            .zip(0..)
            .map(|(home, who)| scope.spawn(move || one_user(home, who)))
            .collect();
        let moved: u64 = work.into_iter().map(|w| w.join().unwrap()).sum();
        stop.store(true, Ordering::Relaxed);
        moved
    });
    let [fscache, staging] = watches.map(|watch| watch.end());
    println!(
        "{} MB moved in {:?}; fscache of {FSCACHE}: {fscache:?}; staging of {STAGING}: {staging:?}",
        moved / MB,
        begun.elapsed()
    );
    assert!(moved > 10 * (FSCACHE + 10 * MB), "{moved}");
    assert!(fscache.bytes <= FSCACHE && fscache.walked > FSCACHE / 4, "{fscache:?}");
    assert!(staging.bytes <= STAGING && staging.walked > 10 * MB, "{staging:?}");
    let log = mount.log();
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
    mount.umount().unwrap();
}

/// Delivers mails of all sizes, keeps some open, and reads all of them. Returns the bytes moved.
fn one_user(home: &Path, who: u64) -> u64 {
    let mut sizes = vec![300, 5_000, 70_000, 400_000, 900_000, 2_500_000, 6_000_000, 40_000];
    // One of each user's is larger than the cache; one of all is as large as mails get.
    sizes.push(if who == 0 { 50_000_000 } else { 9_000_000 });
    let mails: Vec<(u64, u64, PathBuf)> = sizes
        .iter()
        .zip(who * 100..)
        .map(|(size, n)| (n, *size, deliver(home, n, *size)))
        .collect();
    let mut moved: u64 = sizes.iter().sum();
    std::thread::scope(|scope| {
        // Slow readers hold what they read open for long.
        for (n, size, path) in
            mails.iter().filter(|(_, size, _)| (400_000..3_000_000).contains(size))
        {
            scope.spawn(move || {
                let file = File::open(path).unwrap();
                check(
                    &file,
                    *n,
                    *size,
                    usize::try_from(size / 100).unwrap() + 1,
                    Duration::from_millis(15),
                );
            });
        }
        for _ in 0..2 {
            for (n, size, path) in &mails {
                let file = File::open(path).unwrap();
                check(&file, *n, *size, 128 << 10, Duration::ZERO);
                moved += size;
            }
        }
    });
    // In the middle, too, and once more to the end by another way.
    for (n, size, path) in mails.iter().rev() {
        let mut file = File::open(path).unwrap();
        let (mut got, mut want) = ([0; 100], [0; 100]);
        file.read_exact_at(&mut got, size / 2).unwrap();
        fill(*n, size / 2, &mut want);
        assert_eq!(got, want);
        let mut first = [0; 300];
        file.read_exact(&mut first).unwrap();
    }
    moved
}
