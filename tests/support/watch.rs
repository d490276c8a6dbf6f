//! What directories take of the disk, sampled from outside while others work.
//!
//! A walk as `du` makes it is no moment: of a file that goes after it was counted, and one that comes
//! in a directory that was not yet looked at, it counts both. So a sample counts only if a second walk
//! right behind it finds the same files with the same sizes; then that is what was there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Inodes and bytes on the disk, in the order in which they were met.
type Walk = Vec<(u64, u64)>;

fn walk(path: &Path, found: &mut Walk) {
    // What vanishes meanwhile is not there.
    let Ok(meta) = fs::symlink_metadata(path) else { return };
    found.push((meta.ino(), meta.blocks() * 512));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        walk(&entry.path(), found);
    }
}

fn sum(walk: &Walk) -> u64 {
    walk.iter().map(|(_, bytes)| bytes).sum()
}

/// What `du` shows, in bytes.
pub fn du(path: &Path) -> u64 {
    let mut found = Walk::new();
    walk(path, &mut found);
    sum(&found)
}

/// What was seen.
#[derive(Debug, Clone, Copy)]
pub struct Most {
    /// The most of one moment.
    pub bytes: u64,
    /// Moments.
    pub samples: u64,
    /// The most that a walk counted, be it of one moment or not.
    pub walked: u64,
}

/// Samples what directories take together until it is told to stop.
pub struct Watch {
    stop: Arc<AtomicBool>,
    samples: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<(u64, u64, u64)>,
}

impl Watch {
    pub fn new(dirs: &[PathBuf], pause: Duration) -> Watch {
        let dirs = dirs.to_vec();
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stops, counted) = (stop.clone(), samples.clone());
        let thread = std::thread::spawn(move || {
            let look = || {
                let mut found = Walk::new();
                dirs.iter().for_each(|dir| walk(dir, &mut found));
                found
            };
            let (mut most, mut walked, mut looks) = (0, 0, 0);
            while !stops.load(Ordering::Relaxed) {
                let (first, second) = (look(), look());
                walked = walked.max(sum(&first)).max(sum(&second));
                looks += 1;
                if first == second {
                    most = most.max(sum(&first));
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(pause);
            }
            (most, walked, looks)
        });
        Watch { stop, samples, thread }
    }

    pub fn end(self) -> Most {
        self.stop.store(true, Ordering::Relaxed);
        let (bytes, walked, looks) = self.thread.join().unwrap();
        let samples = self.samples.load(Ordering::Relaxed);
        assert!(looks > 100 && samples > 0, "hardly anything was seen");
        Most { bytes, samples, walked }
    }
}
