//! A store in a local (or network mounted) directory: `file:///srv/mail`.
//!
//! Keys are paths below the root, bodies are files; any tool can read and copy them. Beside the
//! objects the root holds `.tmp` (files being written), `.lock` (one lock file per 1/256 of the
//! keys) and, where the file system has no user attributes, `.meta/<key>` (user metadata as
//! JSON; elsewhere it is in the attribute `user.vmailfs`). A key may not begin with a dot, and
//! `a` and `a/b` cannot both be objects.
//!
//! # Invariants
//!
//! * An object is whole or absent, at every moment and after every crash: it is written and
//!   synced under a temporary name, then renamed or linked. A crash leaves at most a temporary
//!   file, which a later open removes when it is a day old.
//! * A put that succeeded survives power loss: the file is synced before it gets its name, the
//!   directory after that, and so is every directory above that this process has not synced yet
//!   (it may be new). A put into a known directory costs one fsync of the file and one of the
//!   directory; where the file system has one journal for everything, one fsync altogether (see
//!   [`super::dir_fs`]). Deletes are synced, too: a deleted mail that came back would be taken for one
//!   that nobody named yet.
//! * Conditions are exact between processes of one machine (and where flock works across a
//!   network file system): Create and Update hold the key's lock while they look and rename.
//!   Overwrite takes no lock: it is for keys that are never written with other bytes.
//! * An absence is one only while the root is the directory that was opened: see
//!   [`Root`](super::dir_io::Root). Every call looks at it first, and every "not found" and every
//!   missing directory is checked against it again, and so an unmounted disk is an outage, whatever
//!   lies below its mount point.
//!
//! A sidecar of metadata is written before its object. After a crash in between, an object that
//! was being replaced may show the metadata of its successor; objects with metadata are never
//! replaced by other ones.
//!
//! # Tags
//!
//! The tag of an object of up to 1 MiB is the hash of its bytes: it costs nothing beside the
//! reading, and does not depend on clocks. Larger ones have size, mtime and inode number:
//! heads, for which tags matter, are small. A listing tells no tags.

use super::dir_io::{Root, get_xattr, is_missing, plain, sync_dir};
use super::key::{check_dir, check_key, check_metadata, check_range};
use super::{Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, StoreError, StoreResult};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashSet};
use std::fs::{DirBuilder, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

pub(super) const TMP: &str = ".tmp";
pub(super) const LOCK: &str = ".lock";
pub(super) const META: &str = ".meta";
/// Objects up to this size are tagged by their contents.
pub(super) const HASHED: u64 = 1 << 20;
/// Temporary files that are older are leftovers.
const LEFTOVER: Duration = Duration::from_secs(24 * 3600);
/// So many directories are remembered as synced; then the memory starts anew.
pub(super) const KNOWN_DIRS: usize = 1 << 16;

/// See the module.
#[derive(Debug, Clone)]
pub struct DirStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) root: Root,
    /// Directories whose own entries, up to the root, this process has synced.
    pub(super) durable: Mutex<HashSet<PathBuf>>,
    /// Bytes that were written back before a name was given are there if the name is, and the
    /// sync of a file makes its name durable.
    pub(super) in_order: bool,
    pub(super) xattrs: AtomicBool,
    /// Whether there may be sidecars.
    pub(super) sidecars: AtomicBool,
    /// How far the file system's clock is ahead of ours, in seconds.
    pub(super) ahead: AtomicI64,
}

pub(super) fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl DirStore {
    /// Opens the store in `root`, which must exist; makes its `.tmp` and `.lock` and removes
    /// temporary files older than a day.
    pub fn open(root: &Path) -> StoreResult<DirStore> {
        let root = Root::open(root)?;
        for name in [TMP, LOCK] {
            let dir = root.path.join(name);
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(plain(e, &dir.display().to_string()));
                }
                _ => {}
            }
        }
        let inner = Inner {
            durable: Mutex::default(),
            in_order: super::dir_fs::in_order(&root.path),
            xattrs: AtomicBool::new(true),
            sidecars: AtomicBool::new(root.path.join(META).is_dir()),
            ahead: AtomicI64::new(0),
            root,
        };
        inner.clean(SystemTime::now())?;
        Ok(DirStore { inner: Arc::new(inner) })
    }

    async fn blocking<T, F>(&self, work: F) -> StoreResult<T>
    where
        T: Send + 'static,
        F: FnOnce(&Inner) -> StoreResult<T> + Send + 'static,
    {
        let inner = self.inner.clone();
        let checked = move || {
            // Another store may be there meanwhile, and would take what is put.
            inner.root.check()?;
            work(&inner)
        };
        tokio::task::spawn_blocking(checked).await.unwrap_or_else(|e| {
            Err(StoreError::Unavailable { detail: format!("the task was lost: {e}") })
        })
    }
}

#[async_trait]
impl ObjectStore for DirStore {
    fn describe(&self) -> String {
        format!("file://{}", self.inner.root.path.display())
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        _why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let key = key.to_owned();
        self.blocking(move |inner| inner.get(&key, range, limit)).await
    }

    async fn download(&self, key: &str, file: &File, _why: Reason) -> StoreResult<ObjectMeta> {
        let key = key.to_owned();
        let file = file.try_clone().map_err(|e| plain(e, "local file"))?;
        self.blocking(move |inner| inner.download(&key, file)).await
    }

    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        _why: Reason,
    ) -> StoreResult<ETag> {
        check_metadata(metadata)?;
        let key = key.to_owned();
        let mut metadata = metadata.to_vec();
        metadata.sort_unstable();
        self.blocking(move |inner| inner.put(&key, &body, &mode, &metadata)).await
    }

    async fn head(&self, key: &str, _why: Reason) -> StoreResult<ObjectMeta> {
        let key = key.to_owned();
        self.blocking(move |inner| {
            let (file, stat) = inner.open_object(&key)?;
            let etag = inner.etag(&file, &stat).map_err(|e| plain(e, &key))?;
            inner.meta(&key, &file, &stat, etag)
        })
        .await
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        _why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let (dir, after) = (dir.to_owned(), start_after.map(str::to_owned));
        self.blocking(move |inner| inner.list(&dir, after.as_deref())).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        _why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let (dir, after) = (dir.to_owned(), start_after.map(str::to_owned));
        self.blocking(move |inner| inner.list_some(&dir, after.as_deref(), most)).await
    }

    async fn list_dirs(&self, dir: &str, _why: Reason) -> StoreResult<Vec<String>> {
        let dir = dir.to_owned();
        self.blocking(move |inner| inner.list_dirs(&dir)).await
    }

    async fn delete(&self, keys: &[String], _why: Reason) -> StoreResult<()> {
        let keys = keys.to_vec();
        self.blocking(move |inner| inner.delete(&keys)).await
    }

    /// The clock by which the file system dates files: that of the server, if it is a remote one.
    fn time(&self) -> Option<i64> {
        Some(seconds(SystemTime::now()) + self.inner.ahead.load(Ordering::Relaxed))
    }
}

impl Inner {
    /// Removes leftovers of crashed processes.
    fn clean(&self, now: SystemTime) -> StoreResult<()> {
        let dir = self.root.path.join(TMP);
        let entries = std::fs::read_dir(&dir).map_err(|e| plain(e, &dir.display().to_string()))?;
        for entry in entries.flatten() {
            let modified = entry.metadata().and_then(|meta| meta.modified());
            let age = modified.ok().and_then(|then| now.duration_since(then).ok());
            if age.is_some_and(|age| age > LEFTOVER)
                && let Err(error) = std::fs::remove_file(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "cannot remove a leftover");
            }
        }
        Ok(())
    }

    pub(super) fn path(&self, key: &str) -> StoreResult<PathBuf> {
        check_key(key)?;
        if key.starts_with('.') {
            let detail = format!("the key {key:?} begins with a dot");
            return Err(StoreError::Unsupported { detail });
        }
        Ok(self.root.path.join(key))
    }

    pub(super) fn dir_path(&self, dir: &str) -> StoreResult<PathBuf> {
        check_dir(dir)?;
        if dir.is_empty() { Ok(self.root.path.clone()) } else { self.path(dir) }
    }

    pub(super) fn open_object(&self, key: &str) -> StoreResult<(File, Metadata)> {
        let path = self.path(key)?;
        let opened = File::open(&path).and_then(|file| {
            let stat = file.metadata()?;
            if stat.is_dir() {
                Err(io::Error::from_raw_os_error(libc::EISDIR))
            } else {
                Ok((file, stat))
            }
        });
        opened.map_err(|e| self.root.explain(e, key))
    }

    pub(super) fn etag(&self, file: &File, stat: &Metadata) -> io::Result<ETag> {
        if stat.size() > HASHED {
            return Ok(etag_of_large(stat));
        }
        let mut bytes = vec![0; usize::try_from(stat.size()).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(etag_of_bytes(&bytes))
    }

    fn meta(&self, key: &str, file: &File, stat: &Metadata, etag: ETag) -> StoreResult<ObjectMeta> {
        let json = match get_xattr(file).map_err(|e| plain(e, key))? {
            None if self.sidecars.load(Ordering::Relaxed) => {
                match std::fs::read(self.root.path.join(META).join(key)) {
                    Ok(json) => Some(json),
                    Err(e) if is_missing(&e) => None,
                    Err(e) => return Err(plain(e, key)),
                }
            }
            found => found,
        };
        let metadata = match json {
            None => Vec::new(),
            Some(json) => serde_json::from_slice(&json).map_err(|e| StoreError::BadBody {
                key: key.to_owned(),
                detail: format!("its user metadata cannot be read: {e}"),
            })?,
        };
        Ok(ObjectMeta {
            key: key.to_owned(),
            size: stat.size(),
            etag: Some(etag),
            modified: Some(stat.mtime()),
            metadata,
        })
    }

    fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let (mut file, stat) = self.open_object(key)?;
        let size = stat.size();
        check_range(key, size, range.as_ref(), limit)?;
        let range = range.unwrap_or(0..size);
        let whole = size <= HASHED;
        let (from, len) = if whole { (0, size) } else { (range.start, range.end - range.start) };
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        file.seek(SeekFrom::Start(from))
            .and_then(|_| (&mut file).take(len).read_to_end(&mut bytes))
            .map_err(|e| plain(e, key))?;
        if bytes.len() as u64 != len {
            let detail = format!("{} bytes read of {len}", bytes.len());
            return Err(StoreError::BadBody { key: key.to_owned(), detail });
        }
        let etag = if whole { etag_of_bytes(&bytes) } else { etag_of_large(&stat) };
        let meta = self.meta(key, &file, &stat, etag)?;
        let bytes = Bytes::from(bytes);
        // Offsets fit: they are at most HASHED.
        let cut = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        Ok((meta, if whole { bytes.slice(cut(range.start)..cut(range.end)) } else { bytes }))
    }

    fn download(&self, key: &str, mut to: File) -> StoreResult<ObjectMeta> {
        let (mut file, stat) = self.open_object(key)?;
        let copied = to
            .seek(SeekFrom::Start(0))
            .and_then(|_| io::copy(&mut file, &mut to))
            .map_err(|e| plain(e, key))?;
        if copied != stat.size() {
            let detail = format!("{copied} bytes copied of {}", stat.size());
            return Err(StoreError::BadBody { key: key.to_owned(), detail });
        }
        let etag = self.etag(&file, &stat).map_err(|e| plain(e, key))?;
        self.meta(key, &file, &stat, etag)
    }

    pub(super) fn remove_sidecar(&self, key: &str) -> io::Result<()> {
        match std::fs::remove_file(self.root.path.join(META).join(key)) {
            Err(e) if !is_missing(&e) => Err(e),
            _ => Ok(()),
        }
    }

    fn delete(&self, keys: &[String]) -> StoreResult<()> {
        let mut touched = BTreeSet::new();
        for key in keys {
            let path = self.path(key)?;
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    if let Some(dir) = path.parent() {
                        touched.insert(dir.to_owned());
                    }
                }
                Err(e) => match self.root.explain(e, key) {
                    StoreError::NotFound { .. } => {}
                    error => return Err(error),
                },
            }
            if self.sidecars.load(Ordering::Relaxed) {
                self.remove_sidecar(key).map_err(|e| plain(e, key))?;
            }
        }
        for dir in touched {
            self.settle(&dir).map_err(|e| plain(e, &dir.display().to_string()))?;
        }
        Ok(())
    }

    /// After deletes in `dir`: removes directories that are empty now, and syncs the lowest one
    /// that stays.
    fn settle(&self, dir: &Path) -> io::Result<()> {
        for dir in dir.ancestors() {
            if dir != self.root.path {
                // Forgotten first: who makes it anew must not find it here.
                self.durable.lock().remove(dir);
                if std::fs::remove_dir(dir).is_ok() {
                    continue;
                }
            }
            return match sync_dir(dir) {
                // Somebody else removed it: then he syncs what is above.
                Err(e) if !is_missing(&e) => Err(e),
                _ => Ok(()),
            };
        }
        Ok(())
    }
}

pub(super) fn etag_of_bytes(bytes: &[u8]) -> ETag {
    ETag(blake3::hash(bytes).to_hex().to_string())
}

pub(super) fn etag_of_large(stat: &Metadata) -> ETag {
    let nanos = i128::from(stat.mtime()) * 1_000_000_000 + i128::from(stat.mtime_nsec());
    ETag(format!("{}-{nanos}-{}", stat.size(), stat.ino()))
}

#[cfg(test)]
#[path = "dir/tests.rs"]
mod tests;
