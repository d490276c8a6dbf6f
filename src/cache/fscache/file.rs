//! Open copies, and room for copies that are on their way. Both give back what they hold when dropped.

use super::books::{Arrival, CacheKey, Segment};
use super::volume::Volume;
use crate::cache::disk::{DiskFile, How};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// What open files hold. Beside the books' lock, because the last reference to an open file may be
/// dropped while that is held.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Of files that are open, named or not.
    open: AtomicU64,
    /// Of those, the ones without a name.
    unlinked: AtomicU64,
}

impl Counters {
    pub(super) fn unlinked(&self) -> u64 {
        self.unlinked.load(Ordering::Acquire)
    }

    pub(super) fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }
}

/// An open cached object.
#[derive(Debug)]
pub struct Cached {
    pub file: Arc<dyn DiskFile>,
    counters: Arc<Counters>,
    charge: u64,
    unlinked: AtomicBool,
    spoilt: AtomicBool,
}

impl Cached {
    /// Bytes of it; `None` if they cannot be read, because the disk fails or somebody cut the file.
    pub fn read(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        match self.file.read_exact_at(offset, len) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                if !self.spoilt.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "an open copy in fscache cannot be read; the mail is streamed");
                }
                None
            }
        }
    }

    pub(super) fn new(
        file: Arc<dyn DiskFile>,
        counters: Arc<Counters>,
        charge: u64,
    ) -> Arc<Cached> {
        counters.open.fetch_add(charge, Ordering::Relaxed);
        Arc::new(Cached {
            file,
            counters,
            charge,
            unlinked: AtomicBool::new(false),
            spoilt: AtomicBool::new(false),
        })
    }

    /// The file loses its name: if it is open, its bytes are given back at its close.
    pub(super) fn unlinked(open: &Weak<Cached>) {
        if let Some(open) = open.upgrade()
            && !open.unlinked.swap(true, Ordering::AcqRel)
        {
            open.counters.unlinked.fetch_add(open.charge, Ordering::AcqRel);
        }
    }
}

impl Drop for Cached {
    fn drop(&mut self) {
        self.counters.open.fetch_sub(self.charge, Ordering::Relaxed);
        if *self.unlinked.get_mut() {
            self.counters.unlinked.fetch_sub(self.charge, Ordering::AcqRel);
        }
    }
}

/// Room for a file that is about to arrive.
#[derive(Debug)]
pub struct Reservation {
    pub(super) volume: Arc<Volume>,
    pub(super) key: CacheKey,
    pub(super) segment: Segment,
    pub(super) arrival: Arrival,
    pub(super) size: u64,
    /// Bytes that are set aside.
    pub(super) bytes: u64,
    pub(super) part: u64,
    /// Where the bytes go until they are complete.
    pub path: PathBuf,
}

impl Reservation {
    /// The file to write to, at the path; its directory is made anew where somebody removed it.
    pub fn create(&self) -> io::Result<Arc<dyn DiskFile>> {
        let disk = &self.volume.disk;
        let file = match disk.open(&self.path, How::CreateNew) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = self.path.parent() {
                    disk.create_dirs(dir)?;
                }
                disk.open(&self.path, How::CreateNew)
            }
            file => file,
        };
        file.inspect_err(|error| self.failed(error))
    }

    /// The copy cannot be written because the disk does not take it.
    pub fn failed(&self, error: &io::Error) {
        self.volume.failed_with("writing a copy", error, self.bytes);
    }

    /// Fills it from a local file.
    pub fn fill(&self, from: &dyn DiskFile) -> io::Result<()> {
        let to = self.create()?;
        let mut buf = vec![0; 128 * 1024];
        let mut at = 0;
        while at < self.size {
            let n = from.read_at(&mut buf, at)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            to.write_all_at(&buf[..n], at).inspect_err(|error| self.failed(error))?;
            at += n as u64;
        }
        Ok(())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.volume.give_back(self.part, self.bytes, &self.path);
    }
}
