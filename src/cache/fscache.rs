//! fscache: local copies of mail objects, bounded in bytes.
//!
//! Layout: `<dir>/<hh>/<user>/<object id>`, each file the exact bytes of one object. A file may
//! vanish at any time (I7): the next read fetches it again. The books are made anew from the
//! directory at each start, so nothing needs to be written to keep them. A copy of which this
//! session does not know that it is what was published (it is of an earlier one, or was written to
//! by hand) counts as a miss until its checksum was looked at: [`Fscache::doubtful`].
//!
//! Space is reserved before bytes arrive. A file that is unlinked while somebody reads it
//! counts until it is closed. What does not fit because everything is in use is read through
//! memory, so a full cache never fails a read.

use super::disk::{Disk, DiskFile, How};
use crate::format::ObjectId;
use crate::format::key::{parse_user_dir, user_dir};
use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

type CacheKey = (Arc<str>, ObjectId);

#[derive(Debug)]
struct Known {
    size: u64,
    /// The file's stamp when it was known to be right.
    stamp: Option<(u64, i64, i64)>,
    /// Set while somebody has the file open.
    open: Weak<Cached>,
}

#[derive(Debug)]
struct Books {
    files: LruCache<CacheKey, Known>,
}

#[derive(Debug)]
pub struct Fscache {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    max: u64,
    books: Mutex<Books>,
    /// Bytes reserved, present, or open without a name. Beside the lock, because the last
    /// reference to an open copy may be dropped while the lock is held.
    used: AtomicU64,
    parts: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
}

/// An open cached object.
#[derive(Debug)]
pub struct Cached {
    cache: Arc<Fscache>,
    pub file: Arc<dyn DiskFile>,
    size: u64,
    /// Set when its name was removed while it was open: its bytes are given back at close.
    unlinked: std::sync::atomic::AtomicBool,
}

impl Drop for Cached {
    fn drop(&mut self) {
        if self.unlinked.load(Ordering::Acquire) {
            self.cache.used.fetch_sub(self.size, Ordering::Relaxed);
        }
    }
}

/// Room for a file that is about to arrive.
#[derive(Debug)]
pub struct Reservation {
    cache: Arc<Fscache>,
    size: u64,
    pub path: PathBuf,
    spent: bool,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.spent {
            self.cache.used.fetch_sub(self.size, Ordering::Relaxed);
            remove_quietly(&*self.cache.disk, &self.path);
        }
    }
}

impl Reservation {
    /// The file to write to, at the path; its directory is made anew where somebody removed it.
    pub fn create(&self) -> io::Result<Arc<dyn DiskFile>> {
        let disk = &self.cache.disk;
        match disk.open(&self.path, How::CreateNew) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = self.path.parent() {
                    disk.create_dirs(dir)?;
                }
                disk.open(&self.path, How::CreateNew)
            }
            file => file,
        }
    }
}

/// Numbers for people.
#[derive(Debug, Clone, Copy, Default)]
pub struct FscacheUsage {
    pub used: u64,
    pub max: u64,
    pub files: u64,
    pub hits: u64,
    pub misses: u64,
}

impl Fscache {
    /// Opens the directory, removes unfinished downloads and counts what is there, oldest use
    /// first; what exceeds the bound is removed.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, max: u64) -> io::Result<Arc<Fscache>> {
        disk.create_dirs(dir)?;
        let incoming = dir.join(".part");
        disk.remove_tree(&incoming)?;
        disk.create_dirs(&incoming)?;
        let mut found = Vec::new();
        for hh in disk.list(dir)?.into_iter().filter(|e| e.is_dir && e.name != ".part") {
            for user in disk.list(&dir.join(&hh.name))?.into_iter().filter(|e| e.is_dir) {
                let user_path = dir.join(&hh.name).join(&user.name);
                let owner: Option<Arc<str>> =
                    user.name.to_str().and_then(|n| parse_user_dir(n).ok()).map(Arc::from);
                for file in disk.list(&user_path)? {
                    let id = file.name.to_str().and_then(|n| n.parse::<ObjectId>().ok());
                    if let (Some(owner), Some(id)) = (&owner, id) {
                        found.push((file.used, (owner.clone(), id), file.len));
                    }
                }
            }
        }
        found.sort();
        let mut books = Books { files: LruCache::unbounded() };
        let mut used = 0;
        for (_, key, size) in found {
            used += size;
            books.files.put(key, Known { size, stamp: None, open: Weak::new() });
        }
        let cache = Arc::new(Fscache {
            dir: dir.into(),
            disk,
            max,
            books: Mutex::new(books),
            used: AtomicU64::new(used),
            parts: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        });
        cache.make_room(&mut cache.books.lock(), 0);
        Ok(cache)
    }

    fn path(&self, key: &CacheKey) -> PathBuf {
        self.dir.join(user_dir(&key.0)).join(key.1.to_string())
    }

    /// The cached copy, if there is a whole one that is known to be right.
    pub fn get(self: &Arc<Self>, user: &Arc<str>, id: ObjectId, size: u64) -> Option<Arc<Cached>> {
        let key = (user.clone(), id);
        let mut books = self.books.lock();
        let hit = self.open_known(&mut books, &key, size);
        let counter = if hit.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        hit
    }

    fn open_known(
        self: &Arc<Self>,
        books: &mut Books,
        key: &CacheKey,
        size: u64,
    ) -> Option<Arc<Cached>> {
        let known = books.files.get_mut(key)?;
        if let Some(open) = known.open.upgrade() {
            return Some(open);
        }
        let opened = self.disk.open(&self.path(key), How::Read);
        match opened.and_then(|file| Ok((file.size()?, file.stamp()?, file))) {
            Ok((len, stamp, _))
                if len == size && known.size == size && known.stamp != Some(stamp) =>
            {
                None
            }
            Ok((len, _, file)) if len == size && known.size == size => {
                let cached = Arc::new(Cached {
                    cache: self.clone(),
                    file,
                    size,
                    unlinked: std::sync::atomic::AtomicBool::new(false),
                });
                known.open = Arc::downgrade(&cached);
                Some(cached)
            }
            other => {
                // Deleted or altered by hand, or the disk fails: a miss, and it is fetched anew.
                if let Err(error) = other
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, user = %key.0, object = %key.1, "cached copy unreadable");
                }
                self.forget(books, key);
                None
            }
        }
    }

    /// The file of a copy that may or may not be right. It is read to its end, and then
    /// [`Fscache::vouch`]ed for or removed.
    pub fn doubtful(&self, user: &Arc<str>, id: ObjectId) -> Option<Arc<dyn DiskFile>> {
        let key = (user.clone(), id);
        self.books.lock().files.peek(&key)?;
        self.disk.open(&self.path(&key), How::Read).ok()
    }

    /// The copy whose file had this stamp before it was read is right.
    pub fn vouch(
        self: &Arc<Self>,
        user: &Arc<str>,
        id: ObjectId,
        size: u64,
        stamp: (u64, i64, i64),
    ) -> Option<Arc<Cached>> {
        let key = (user.clone(), id);
        let mut books = self.books.lock();
        books.files.get_mut(&key)?.stamp = Some(stamp);
        self.open_known(&mut books, &key, size)
    }

    /// A copy in memory, of bytes for which there is no room or no disk. Nobody else finds it.
    pub fn apart(self: &Arc<Self>, bytes: Bytes) -> Arc<Cached> {
        Arc::new(Cached {
            cache: self.clone(),
            size: bytes.len() as u64,
            file: Arc::new(InMemory(bytes)),
            unlinked: std::sync::atomic::AtomicBool::new(false),
        })
    }

    fn forget(&self, books: &mut Books, key: &CacheKey) {
        if let Some(known) = books.files.pop(key) {
            remove_quietly(&*self.disk, &self.path(key));
            match known.open.upgrade() {
                Some(open) => open.unlinked.store(true, Ordering::Release),
                None => _ = self.used.fetch_sub(known.size, Ordering::Relaxed),
            }
        }
    }

    /// Removes what was used longest ago until `more` bytes fit; false if they cannot.
    fn make_room(&self, books: &mut Books, more: u64) -> bool {
        if more > self.max {
            return false;
        }
        let mut in_use = Vec::new();
        while self.used.load(Ordering::Relaxed).saturating_add(more) > self.max {
            let Some((key, known)) = books.files.pop_lru() else { break };
            if known.open.strong_count() > 0 {
                in_use.push((key, known));
                continue;
            }
            remove_quietly(&*self.disk, &self.path(&key));
            self.used.fetch_sub(known.size, Ordering::Relaxed);
        }
        for (key, known) in in_use {
            books.files.put(key, known);
        }
        self.used.load(Ordering::Relaxed).saturating_add(more) <= self.max
    }

    /// Room for `size` bytes and the path to write them to; `None` when all is in use.
    pub fn reserve(self: &Arc<Self>, size: u64) -> Option<Reservation> {
        let mut books = self.books.lock();
        if !self.make_room(&mut books, size) {
            return None;
        }
        self.used.fetch_add(size, Ordering::Relaxed);
        let path =
            self.dir.join(".part").join(self.parts.fetch_add(1, Ordering::Relaxed).to_string());
        Some(Reservation { cache: self.clone(), size, path, spent: false })
    }

    /// The file at the reservation's path is the object's whole, verified content.
    pub fn commit(
        self: &Arc<Self>,
        mut room: Reservation,
        user: &Arc<str>,
        id: ObjectId,
    ) -> io::Result<Arc<Cached>> {
        let size = room.size;
        self.adopt(&room.path.clone(), user, id, size, || room.spent = true)
    }

    /// Takes over a file outside the cache (a staged mail) as the object's copy. `None` when
    /// there is no room for it.
    pub fn take_over(
        self: &Arc<Self>,
        path: &Path,
        user: &Arc<str>,
        id: ObjectId,
        size: u64,
    ) -> io::Result<Option<Arc<Cached>>> {
        let Some(mut room) = self.reserve(size) else { return Ok(None) };
        self.adopt(path, user, id, size, || room.spent = true).map(Some)
    }

    fn adopt(
        self: &Arc<Self>,
        from: &Path,
        user: &Arc<str>,
        id: ObjectId,
        size: u64,
        spend: impl FnOnce(),
    ) -> io::Result<Arc<Cached>> {
        let key = (user.clone(), id);
        let path = self.path(&key);
        if let Err(first) = self.disk.rename(from, &path) {
            if first.kind() != io::ErrorKind::NotFound {
                return Err(first);
            }
            if let Some(dir) = path.parent() {
                self.disk.create_dirs(dir)?;
            }
            self.disk.rename(from, &path)?;
        }
        let mut books = self.books.lock();
        // A second download of the same object: the file was replaced, count it once.
        if let Some(old) = books.files.pop(&key) {
            match old.open.upgrade() {
                Some(open) => open.unlinked.store(true, Ordering::Release),
                None => _ = self.used.fetch_sub(old.size, Ordering::Relaxed),
            }
        }
        let file = self.disk.open(&path, How::Read)?;
        let stamp = Some(file.stamp()?);
        spend();
        let cached = Arc::new(Cached {
            cache: self.clone(),
            file,
            size,
            unlinked: std::sync::atomic::AtomicBool::new(false),
        });
        books.files.put(key, Known { size, stamp, open: Arc::downgrade(&cached) });
        Ok(cached)
    }

    /// The object is not needed any more.
    pub fn remove(&self, user: &Arc<str>, id: ObjectId) {
        self.forget(&mut self.books.lock(), &(user.clone(), id));
    }

    pub fn usage(&self) -> FscacheUsage {
        let books = self.books.lock();
        FscacheUsage {
            used: self.used.load(Ordering::Relaxed),
            max: self.max,
            files: books.files.len() as u64,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }
}

#[derive(Debug)]
struct InMemory(Bytes);

impl DiskFile for InMemory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let from = usize::try_from(offset).map_or(self.0.len(), |o| o.min(self.0.len()));
        let len = buf.len().min(self.0.len() - from);
        buf[..len].copy_from_slice(&self.0[from..from + len]);
        Ok(len)
    }
    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    fn real(&self) -> Option<Arc<std::fs::File>> {
        None
    }
}

fn remove_quietly(disk: &dyn Disk, path: &Path) {
    if let Err(error) = disk.remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "cache file not removed");
    }
}
