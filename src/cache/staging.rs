//! Staging: mails while they are written. A staged file holds what no server was told is safe
//! yet, and what has just been published until it becomes the cached copy.
//!
//! It has a bound of its own, so that neither a full fscache nor a rush of readers stops deliveries. Space
//! is reserved as files grow, in whole blocks, the way `du` counts; a file that is open without a name counts
//! until it is closed. What exceeds the bound is refused here, and whoever wrote it waits until others are done
//! (`vmail::wait`). The last quarter is for files that have begun: many half-written mails, none of which
//! can be finished, would wait for one another.

use super::disk::{BLOCK, Disk, DiskFile, How};
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
    block: u64,
    live: Mutex<BTreeSet<u64>>,
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

    /// Whether so much more may be written, by a file that has begun or one that has not.
    fn fits(&self, used: u64, more: u64, begun: bool) -> bool {
        let max = self.max.saturating_sub(BASE);
        let max = if begun || used == 0 { max } else { max - max / 4 };
        used.saturating_add(more) <= max
    }

    /// Whether it may be worth while to try again to write so much.
    pub fn may_fit(&self, more: u64) -> bool {
        self.fits(self.used.load(Ordering::Relaxed), self.round(more), false)
    }

    /// Whether so much fits when nothing else is there.
    pub fn ever_fits(&self, more: u64) -> bool {
        self.fits(0, self.round(more), false)
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
        let more = len - old;
        let fits =
            |used: u64| self.staging.fits(used, more, old > 0).then(|| used.saturating_add(more));
        let taken = self.staging.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        if taken.is_ok() {
            self.size.store(len, Ordering::Relaxed);
        }
        taken.is_ok()
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
        self.staging.live.lock().remove(&self.number);
        // Its name is gone already where the file became a cached copy; otherwise what is left
        // behind is removed at the next start.
        if let Err(error) = self.staging.disk.remove_file(&self.path())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.path().display(), "staged file not removed");
        }
        let size = self.size.load(Ordering::Relaxed);
        self.staging.used.fetch_sub(size, Ordering::Relaxed);
    }
}
