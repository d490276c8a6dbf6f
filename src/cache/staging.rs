//! Staging: mails while they are written. A staged file holds what no server was told is safe
//! yet, and what has just been published until it becomes the cached copy.

use super::disk::{Disk, DiskFile, How};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The staging directory of a mount. Its files have numbers for names; none outlives the
/// session, because whatever was not published at a crash was promised to nobody.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    next: AtomicU64,
    used: AtomicU64,
    max: u64,
    live: Mutex<BTreeSet<u64>>,
}

/// One staged file; it is deleted when dropped, unless it was handed over.
#[derive(Debug)]
pub struct Staged {
    staging: Arc<Staging>,
    number: u64,
    pub file: Arc<dyn DiskFile>,
    size: AtomicU64,
}

impl Staging {
    /// Opens the directory and empties it.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, max: u64) -> io::Result<Arc<Staging>> {
        disk.create_dirs(dir)?;
        for entry in disk.list(dir)? {
            if !entry.is_dir {
                disk.remove_file(&dir.join(entry.name))?;
            }
        }
        Ok(Arc::new(Staging {
            dir: dir.into(),
            disk,
            next: AtomicU64::new(1),
            used: AtomicU64::new(0),
            max,
            live: Mutex::new(BTreeSet::new()),
        }))
    }

    /// A new empty file.
    pub fn create(self: &Arc<Self>) -> io::Result<Staged> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let file = match self.disk.open(&self.path(number), How::CreateNew) {
            // Somebody removed the directory.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.disk.create_dirs(&self.dir)?;
                self.disk.open(&self.path(number), How::CreateNew)?
            }
            file => file?,
        };
        self.live.lock().insert(number);
        Ok(Staged { staging: self.clone(), number, file, size: AtomicU64::new(0) })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Bytes in use and the bound.
    pub fn usage(&self) -> (u64, u64) {
        (self.used.load(Ordering::Relaxed), self.max)
    }

    fn reserve(&self, more: u64) -> io::Result<()> {
        let fits = |used: u64| used.checked_add(more).filter(|total| *total <= self.max);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
    }
}

impl Staged {
    pub fn path(&self) -> PathBuf {
        self.staging.path(self.number)
    }

    /// Writes; refused with `StorageFull` where staging would exceed its bound.
    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.grow_to(offset + data.len() as u64)?;
        self.file.write_all_at(data, offset)
    }

    /// Like [`Staged::write`] for a file whose first `hole` bytes are never written, and so
    /// take no space.
    pub fn write_sparse(&self, data: &[u8], offset: u64, hole: u64) -> io::Result<()> {
        self.grow_to((offset + data.len() as u64).saturating_sub(hole))?;
        self.file.write_all_at(data, offset)
    }

    /// Like [`Staged::set_len`] for such a file.
    pub fn set_len_sparse(&self, len: u64, hole: u64) -> io::Result<()> {
        self.grow_to(len.saturating_sub(hole))?;
        self.file.set_len(len)
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.grow_to(len)?;
        self.file.set_len(len)?;
        let old = self.size.swap(len, Ordering::Relaxed);
        if old > len {
            self.staging.used.fetch_sub(old - len, Ordering::Relaxed);
        }
        Ok(())
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        let old = self.size.load(Ordering::Relaxed);
        if len > old {
            self.staging.reserve(len - old)?;
            self.size.store(len, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let size = self.size.load(Ordering::Relaxed);
        self.staging.used.fetch_sub(size, Ordering::Relaxed);
        self.staging.live.lock().remove(&self.number);
        // Its name is gone already where the file became a cached copy; otherwise what is left
        // behind is removed at the next start.
        if let Err(error) = self.staging.disk.remove_file(&self.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path().display(), "staged file not removed");
        }
    }
}
