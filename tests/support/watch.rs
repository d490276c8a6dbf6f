//! What directories take of the disk, sampled from outside while others work.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What `du` shows, in bytes; files that vanish meanwhile are not there.
pub fn du(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    meta.blocks() * 512 + below.map(|entry| du(&entry.path())).sum::<u64>()
}

/// Samples what directories take together until it is told to stop.
pub struct Watch {
    stop: Arc<AtomicBool>,
    samples: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<u64>,
}

impl Watch {
    pub fn new(dirs: &[PathBuf], pause: Duration) -> Watch {
        let dirs = dirs.to_vec();
        let (stop, samples) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stops, counted) = (stop.clone(), samples.clone());
        let thread = std::thread::spawn(move || {
            let mut most = 0;
            while !stops.load(Ordering::Relaxed) {
                most = most.max(dirs.iter().map(|dir| du(dir)).sum());
                counted.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(pause);
            }
            most
        });
        Watch { stop, samples, thread }
    }

    /// The most that was seen, and how often it was looked.
    pub fn end(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let most = self.thread.join().unwrap();
        let samples = self.samples.load(Ordering::Relaxed);
        assert!(samples > 100, "hardly anything was seen");
        (most, samples)
    }
}
