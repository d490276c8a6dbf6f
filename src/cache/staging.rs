//! Staging: mails while they are written. A staged file holds what no server was told is safe
//! yet, and what has just been published until it becomes the cached copy.
//!
//! It has a bound of its own, so that neither a full fscache nor a rush of readers stops deliveries. Space
//! is reserved as files grow, in whole blocks, the way `du` counts; a file that is open without a name counts
//! until it is closed. What exceeds the bound is refused here, and whoever wrote it waits until others are done
//! (`vmail::wait`). The last quarter is for one file at a time, the first that found no room, until it is closed:
//! else many half-written mails, none of which can be finished, would wait for one another. So a mail of up to a
//! quarter of staging is finished sooner or later, whatever else is under way.

use super::disk::{BLOCK, Disk, DiskFile, How};
use parking_lot::Mutex;
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
    block: u64,
    /// The file that may use the last quarter.
    favoured: Mutex<Option<u64>>,
}

/// For the directory itself.
const BASE: u64 = 16 * BLOCK;

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
        let disk_block = disk.block_size(dir);
        Ok(Arc::new(Staging {
            dir: dir.into(),
            disk,
            next: AtomicU64::new(1),
            used: AtomicU64::new(0),
            max,
            block: disk_block,
            favoured: Mutex::new(None),
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
        Ok(Staged { staging: self.clone(), number, file, size: AtomicU64::new(0) })
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Bytes in use and the bound.
    pub fn usage(&self) -> (u64, u64) {
        (self.used.load(Ordering::Relaxed), self.max)
    }

    fn room(&self) -> u64 {
        self.max.saturating_sub(BASE)
    }

    /// Takes so much more, for a file that has the last quarter or one that has not.
    fn take(&self, more: u64, favoured: bool) -> bool {
        let max = if favoured { self.room() } else { self.room() / 4 * 3 };
        let fits = |used: u64| used.checked_add(more).filter(|used| *used <= max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn round(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.block).saturating_mul(self.block)
    }
}

impl Staged {
    pub fn path(&self) -> PathBuf {
        self.staging.path(self.number)
    }

    /// Sets space aside for the file to become so long; false where staging would exceed its bound.
    pub fn reserve(&self, len: u64) -> bool {
        let len = self.staging.round(len);
        let old = self.size.load(Ordering::Relaxed);
        if len <= old {
            return true;
        }
        let taken = self.staging.take(len - old, false) || {
            let favoured = *self.staging.favoured.lock().get_or_insert(self.number);
            favoured == self.number && self.staging.take(len - old, true)
        };
        if taken {
            self.size.store(len, Ordering::Relaxed);
        }
        taken
    }

    /// Whether a file so long could ever be had.
    pub fn ever_fits(&self, len: u64) -> bool {
        self.staging.round(len) <= self.staging.room()
    }

    fn grow_to(&self, len: u64) -> io::Result<()> {
        match self.reserve(len) {
            true => Ok(()),
            false => Err(io::Error::from(io::ErrorKind::StorageFull)),
        }
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
        let len = self.staging.round(len);
        let old = self.size.swap(len, Ordering::Relaxed);
        if old > len {
            self.staging.used.fetch_sub(old - len, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Its name is gone already where the file became a cached copy; otherwise what is left
        // behind is removed at the next start.
        if let Err(error) = self.staging.disk.remove_file(&self.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path().display(), "staged file not removed");
        }
        let size = self.size.load(Ordering::Relaxed);
        self.staging.used.fetch_sub(size, Ordering::Relaxed);
        self.staging.favoured.lock().take_if(|number| *number == self.number);
    }
}
