//! How long a mount takes to begin over caches with very many files: they are counted before anybody
//! is served, or the bounds would not hold.

use crate::support::mount::Mount;
use std::fs;
use std::time::{Duration, Instant};
use vmailfs::format::key::user_dir;

/// Files of each cache.
const FILES: usize = 200_000;
/// Of one user.
const EACH: usize = 20;

#[test]
#[ignore = "long; run by `make caches`"]
fn a_large_cache_does_not_hold_up_a_mount() {
    // On a tmpfs it is the program that is measured, not a disk.
    let place = std::path::Path::new("/dev/shm");
    let state = tempfile::Builder::new().prefix("vmt-large-").tempdir_in(place).unwrap();
    let mut mount = Mount::on_directory().state_in(state.path());
    let mut start = |what: &str| {
        let begun = Instant::now();
        mount.mount().unwrap();
        let took = begun.elapsed();
        println!("{what}: mounted after {took:?}");
        let (_, text) = mount.vmailfs(&["status", "--json"]).unwrap();
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        mount.umount().unwrap();
        (took, status)
    };
    let (empty, _) = start("nothing");
    for user in 0..FILES / EACH {
        let name = format!("user{user}");
        let dir = state.path().join("fscache").join(user_dir(&name));
        fs::create_dir_all(&dir).unwrap();
        for file in 0..EACH {
            fs::write(dir.join(format!("00000001-{file:012x}")), b"mail").unwrap();
        }
    }
    let (took, status) = start("fscache with 200,000 files");
    assert_eq!(status["caches"]["fscache"]["files"].as_u64(), Some(FILES as u64));
    assert!(took < empty + Duration::from_secs(60), "{took:?}");
    fs::remove_dir_all(state.path().join("fscache")).unwrap();
    for user in 0..FILES / EACH {
        let dir = state.path().join("metacache").join(format!("user{user}")).join("index");
        for folder in 0..EACH / 4 {
            let dir = dir.join(format!(".folder{folder}"));
            fs::create_dir_all(&dir).unwrap();
            for name in
                ["dovecot.index", "dovecot.index.log", "dovecot.index.cache", "maildirfolder"]
            {
                fs::write(dir.join(name), b"index").unwrap();
            }
        }
    }
    let (took, status) = start("metacache with 200,000 files of 10,000 users");
    let used = status["caches"]["metacache"]["used"].as_u64().unwrap();
    assert!(used >= FILES as u64 * 4096, "{used}");
    assert!(took < empty + Duration::from_secs(60), "{took:?}");
}
