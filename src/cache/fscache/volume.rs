//! One cache directory: its files, kept in step with its books.
//!
//! The books' lock is never held across I/O. What changes names below one `<hh>` directory holds that
//! directory's *stripe* instead: naming a new copy, removing one, removing an empty directory,
//! counting again. So a path belongs to one thread at a time, and whoever waits, waits for one small
//! operation of a 256th of the users. A stripe is taken before the books, and never two at once.

use super::books::{Arrival, Books, CacheKey, Known, SLACK, Stamp, charge};
use super::file::{Cached, Counters, Reservation};
use super::{FscacheUsage, Place, Taken};
use crate::cache::disk::{Disk, DiskFile, How};
use crate::format::key::user_dir;
use parking_lot::{Mutex, MutexGuard};
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(super) const PART: &str = ".part";

#[derive(Debug)]
pub(super) struct Volume {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) block: u64,
    pub(super) books: Mutex<Books>,
    pub(super) counters: Arc<Counters>,
    stripes: Vec<Mutex<()>>,
    next_part: AtomicU64,
    /// Downloads under way.
    pub(super) parts: Mutex<HashSet<u64>>,
    pub(super) failing: AtomicBool,
    /// It could not be opened, and is not tried again.
    pub(super) dead: bool,
    pub(super) full: AtomicBool,
    /// Requests while it failed, for finding and for room; and for room while it was full.
    pub(super) asked: [AtomicU64; 3],
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) streamed: AtomicU64,
}

/// What tells users' directories apart: the byte that their `<hh>` shows.
pub(super) fn hash_of(dir: &str) -> u8 {
    dir.get(..2).and_then(|hh| u8::from_str_radix(hh, 16).ok()).unwrap_or(0)
}

impl Volume {
    /// The directory with what an earlier session left in it.
    pub(super) fn open(disk: Arc<dyn Disk>, place: &Place) -> io::Result<Volume> {
        let parts = place.path.join(PART);
        disk.create_dirs(&place.path)?;
        disk.remove_tree(&parts)?;
        disk.create_dirs(&parts)?;
        let block = disk.block_size(&place.path);
        Ok(Volume { block, ..Volume::empty(disk, place) })
    }

    /// One that takes no part.
    pub(super) fn dead(disk: Arc<dyn Disk>, place: &Place) -> Volume {
        let failing = AtomicBool::new(true);
        Volume { dead: true, failing, ..Volume::empty(disk, place) }
    }

    fn empty(disk: Arc<dyn Disk>, place: &Place) -> Volume {
        let counters: Arc<Counters> = Arc::default();
        Volume {
            dir: place.path.clone(),
            disk,
            block: crate::cache::disk::BLOCK,
            books: Mutex::new(Books::new(place.max, counters.clone())),
            counters,
            stripes: (0..256).map(|_| Mutex::new(())).collect(),
            next_part: AtomicU64::new(0),
            parts: Mutex::default(),
            failing: AtomicBool::new(false),
            dead: false,
            full: AtomicBool::new(false),
            asked: Default::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            streamed: AtomicU64::new(0),
        }
    }

    pub(super) fn path(&self, key: &CacheKey) -> PathBuf {
        self.dir.join(user_dir(&key.0)).join(key.1.to_string())
    }

    pub(super) fn stripe(&self, hash: u8) -> MutexGuard<'_, ()> {
        self.stripes[usize::from(hash)].lock()
    }

    // ---- finding

    /// The open copy of an object, if it is whole and known to be right.
    pub(super) fn get(&self, key: &CacheKey, size: u64) -> Option<Arc<Cached>> {
        if let Some(open) = self.known(key, size)? {
            return Some(open);
        }
        let open = |path: &Path| {
            let file = self.disk.open(path, How::Read)?;
            Ok(((file.size()?, file.stamp()?), file))
        };
        self.on_disk(key, size, open, |known, file| {
            if let Some(open) = known.open.upgrade() {
                return open;
            }
            let cached = Cached::new(file, self.counters.clone(), known.charge);
            known.open = Arc::downgrade(&cached);
            cached
        })
    }

    /// Whether there is such a copy, without opening it.
    pub(super) fn has(&self, key: &CacheKey, size: u64) -> bool {
        match self.known(key, size) {
            None => false,
            Some(Some(_)) => true,
            Some(None) => {
                let look = |path: &Path| Ok((self.disk.look(path)?, ()));
                self.on_disk(key, size, look, |_, ()| ()).is_some()
            }
        }
    }

    /// Whether the books know a copy of this size, and that copy if it is open. It counts as used.
    fn known(&self, key: &CacheKey, size: u64) -> Option<Option<Arc<Cached>>> {
        let (there, open) = {
            let mut books = self.books.lock();
            let known = books.known(key)?;
            let found = (known.size, known.open.upgrade());
            books.used(key);
            found
        };
        if there != size {
            self.remove(key);
            return None;
        }
        Some(open)
    }

    /// What `look` finds of a copy, if that is the file which was known to be right; one that was
    /// deleted or altered by hand is a miss from then on.
    fn on_disk<T, R>(
        &self,
        key: &CacheKey,
        size: u64,
        look: impl FnOnce(&Path) -> io::Result<((u64, Stamp), T)>,
        found: impl FnOnce(&mut Known, T) -> R,
    ) -> Option<R> {
        if !self.usable(false) {
            return None;
        }
        let stripe = self.stripe(hash_of(&user_dir(&key.0)));
        match look(&self.path(key)) {
            Ok(((len, stamp), it)) if len == size => {
                let mut books = self.books.lock();
                let known = books.known(key)?;
                (known.stamp == Some(stamp)).then(|| found(known, it))
            }
            other => {
                drop(stripe);
                // Or the disk fails: it is fetched anew.
                if let Err(error) = other {
                    self.failed("opening a copy", &error);
                    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
                        return None;
                    }
                }
                self.remove(key);
                None
            }
        }
    }

    pub(super) fn doubtful(&self, key: &CacheKey) -> Option<Arc<dyn DiskFile>> {
        if self.books.lock().known(key).is_none() || !self.usable(false) {
            return None;
        }
        self.disk.open(&self.path(key), How::Read).ok()
    }

    pub(super) fn vouch(&self, key: &CacheKey, size: u64, stamp: Stamp) -> Option<Arc<Cached>> {
        self.books.lock().known(key)?.stamp = Some(stamp);
        self.get(key, size)
    }

    // ---- room

    /// Room for `size` bytes; `None` when all is in use, or the disk fails.
    pub(super) fn reserve(
        self: &Arc<Self>,
        key: CacheKey,
        size: u64,
        arrival: Arrival,
    ) -> Option<Reservation> {
        if !self.usable(true) {
            return None;
        }
        let bytes = charge(size, self.block) + SLACK;
        let (segment, victims) = {
            let mut books = self.books.lock();
            let segment = books.segment_for(&key, arrival);
            let mut victims = books.room(segment, bytes, arrival);
            if victims.is_none() && books.is_limited() && self.tries_in_spite() {
                books.lift_limit();
                victims = books.room(segment, bytes, arrival);
            }
            (segment, victims?)
        };
        let part = self.next_part.fetch_add(1, Ordering::Relaxed);
        self.parts.lock().insert(part);
        let path = self.dir.join(PART).join(part.to_string());
        let room =
            Reservation { volume: self.clone(), key, segment, arrival, size, bytes, part, path };
        // All of them, even if one fails: they are in no segment any more.
        let removed: Vec<bool> =
            victims.iter().map(|(key, bytes)| self.unlink(key, *bytes)).collect();
        removed.iter().all(|done| *done).then_some(room)
    }

    pub(super) fn give_back(&self, part: u64, bytes: u64, path: &Path) {
        self.delete(path);
        self.parts.lock().remove(&part);
        self.books.lock().release(bytes);
    }

    /// Removes a file; whether it is gone.
    pub(super) fn delete(&self, path: &Path) -> bool {
        match self.disk.remove_file(path) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            Err(error) => {
                self.failed("removing a copy", &error);
                false
            }
        }
    }

    /// Removes the file of a key that is leaving, and directories that are empty then. If it stays, it
    /// counts as somebody else's.
    pub(super) fn unlink(&self, key: &CacheKey, bytes: u64) -> bool {
        let dir = user_dir(&key.0);
        let stripe = self.stripe(hash_of(&dir));
        self.unlink_in(&stripe, &dir, key, bytes)
    }

    pub(super) fn unlink_in(
        &self,
        _stripe: &MutexGuard<'_, ()>,
        dir: &str,
        key: &CacheKey,
        bytes: u64,
    ) -> bool {
        if !self.books.lock().takes_leave(key) {
            // Another copy has its name.
            return true;
        }
        let gone = self.delete(&self.dir.join(dir).join(key.1.to_string()));
        let last = {
            let mut books = self.books.lock();
            books.other += if gone { 0 } else { bytes };
            books.dirs.file_goes(&key.0)
        };
        if last {
            self.remove_dirs(dir, &key.0);
        }
        gone
    }

    /// Removes a user's directory and the one above, if nothing is in them.
    fn remove_dirs(&self, dir: &str, user: &Arc<str>) {
        let hash = hash_of(dir);
        let own = self.dir.join(dir);
        if self.remove_if_empty(&own)
            && self.books.lock().dirs.user_goes(user, hash)
            && own.parent().is_some_and(|above| self.remove_if_empty(above))
        {
            self.books.lock().dirs.hash_goes(hash);
        }
    }

    pub(super) fn remove_if_empty(&self, dir: &Path) -> bool {
        match self.disk.list(dir) {
            Ok(entries) if entries.is_empty() => self.disk.remove_tree(dir).is_ok(),
            Ok(_) | Err(_) => false,
        }
    }

    /// Counts the directories of a user.
    pub(super) fn measure_dirs(&self, dir: &str, user: &Arc<str>) -> io::Result<()> {
        let own = self.dir.join(dir);
        let above = own.parent().map_or(Ok(0), |above| self.disk.dir_size(above))?;
        let own = self.disk.dir_size(&own)?;
        self.books.lock().dirs.measured(user, hash_of(dir), own, above);
        Ok(())
    }

    // ---- files that arrive

    /// The file at the reservation's path is the object's whole, verified content.
    pub(super) fn commit(&self, room: &Reservation) -> io::Result<Arc<Cached>> {
        self.adopt(&room.path, room).inspect_err(|error| self.failed("keeping a copy", error))
    }

    /// Takes over a file outside the cache as the object's copy.
    pub(super) fn take_over(&self, from: &Path, room: Reservation) -> io::Result<Taken> {
        match self.adopt(from, &room) {
            Ok(copy) => Ok(Taken::Kept(copy)),
            Err(e) if e.kind() == io::ErrorKind::CrossesDevices => Ok(Taken::Elsewhere(room)),
            Err(error) => {
                self.failed("keeping a copy", &error);
                Err(error)
            }
        }
    }

    fn adopt(&self, from: &Path, room: &Reservation) -> io::Result<Arc<Cached>> {
        let key = room.key.clone();
        let dir = user_dir(&key.0);
        let path = self.dir.join(&dir).join(key.1.to_string());
        let _stripe = self.stripe(hash_of(&dir));
        if let Err(first) = self.disk.rename(from, &path) {
            if first.kind() != io::ErrorKind::NotFound {
                return Err(first);
            }
            self.disk.create_dirs(&self.dir.join(&dir))?;
            self.disk.rename(from, &path)?;
        }
        let opened = self.disk.open(&path, How::Read).and_then(|file| {
            let (stamp, takes) = (file.stamp()?, file.allocated()?);
            Ok((file, stamp, takes))
        });
        let (file, stamp, takes) = opened.inspect_err(|_| {
            // In no book it would be counted by nobody.
            self.delete(&path);
        })?;
        let takes = charge(room.size, self.block).max(takes);
        let cached = Cached::new(file, self.counters.clone(), takes);
        let mut known = Known::new(room.size, takes, Some(stamp));
        known.open = Arc::downgrade(&cached);
        self.books.lock().insert(key.clone(), room.segment, room.arrival == Arrival::Read, known);
        if let Err(error) = self.measure_dirs(&dir, &key.0) {
            self.failed("measuring a directory", &error);
        } else {
            self.works();
        }
        Ok(cached)
    }

    /// The object is not needed any more, or its file is not what it should be.
    pub(super) fn remove(&self, key: &CacheKey) {
        let dir = user_dir(&key.0);
        let stripe = self.stripe(hash_of(&dir));
        let bytes = self.books.lock().forget(key);
        if let Some(bytes) = bytes {
            self.unlink_in(&stripe, &dir, key, bytes);
        }
    }

    pub(super) fn usage(&self) -> FscacheUsage {
        let books = self.books.lock();
        FscacheUsage {
            path: self.dir.clone(),
            used: books.total(),
            max: books.max,
            files: books.files() as u64,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            streamed: self.streamed.load(Ordering::Relaxed),
            evictions: books.evictions,
            evicted: books.evicted,
            pinned: self.counters.open(),
            reserved: books.reserved(),
            segments: books.segments(),
            failing: self.failing.load(Ordering::Relaxed),
        }
    }
}
