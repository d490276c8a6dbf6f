//! Puts of the directory store: the order of writes, syncs and names that [`super::dir`] states.

use super::dir::{
    HASHED, Inner, KNOWN_DIRS, LOCK, META, TMP, etag_of_bytes, etag_of_large, seconds,
};
use super::dir_fs;
use super::dir_io::{TempFile, is_missing, lock, plain, set_xattr, sync_dir};
use super::{Body, ETag, PutMode, StoreError, StoreResult};
use crate::failpoint;
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::SystemTime;

impl Inner {
    pub(super) fn put(
        &self,
        key: &str,
        body: &Body,
        mode: &PutMode,
        metadata: &[(String, String)],
    ) -> StoreResult<ETag> {
        let path = self.path(key)?;
        // Early, so that a create that is bound to fail does not write the body first.
        if *mode == PutMode::Create && path.symlink_metadata().is_ok() {
            return Err(StoreError::Precondition { key: key.to_owned() });
        }
        // A temporary directory that is gone is a root that is gone.
        let tmp_dir = self.root.path.join(TMP);
        let mut temp = TempFile::create(&tmp_dir).map_err(|e| {
            if is_missing(&e)
                && let Err(outage) = self.root.check()
            {
                return outage;
            }
            plain(e, key)
        })?;
        let small = write_body(&mut temp.file, key, body)?;
        let json = if metadata.is_empty() {
            None
        } else {
            Some(serde_json::to_vec(metadata).map_err(|e| plain(e.into(), key))?)
        };
        let sidecar = match &json {
            Some(json) => !self.set_attribute(&temp.file, json).map_err(|e| plain(e, key))?,
            None => false,
        };
        self.before_name(&temp.file).map_err(|e| plain(e, key))?;
        if let Ok(stat) = temp.file.metadata() {
            let ahead = stat.mtime() - seconds(SystemTime::now());
            // Less is how long the write took.
            let ahead = if ahead.abs() < 60 { 0 } else { ahead };
            self.ahead.store(ahead, Ordering::Relaxed);
        }
        let etag = match small {
            Some(etag) => etag,
            None => etag_of_large(&temp.file.metadata().map_err(|e| plain(e, key))?),
        };
        let held = match mode {
            PutMode::Overwrite => None,
            PutMode::Create | PutMode::Update(_) => {
                Some(lock(&self.lock_path(key)).map_err(|e| plain(e, key))?)
            }
        };
        self.check_condition(key, &path, mode)?;
        if let (true, Some(json)) = (sidecar, &json) {
            self.write_sidecar(key, json)?;
        } else if self.sidecars.load(Ordering::Relaxed) {
            self.remove_sidecar(key).map_err(|e| plain(e, key))?;
        }
        let placed = self.place(&path, &mut temp, |temp, path| match mode {
            PutMode::Create => std::fs::hard_link(&temp.path, path),
            PutMode::Overwrite | PutMode::Update(_) => temp.rename(path),
        });
        drop(held);
        match placed {
            Ok(()) => Ok(etag),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(StoreError::Precondition { key: key.to_owned() })
            }
            Err(e) => {
                self.root.check()?;
                Err(plain(e, key))
            }
        }
    }

    /// Whether the put may happen; the caller holds the key's lock.
    fn check_condition(&self, key: &str, path: &Path, mode: &PutMode) -> StoreResult<()> {
        let holds = match mode {
            PutMode::Overwrite => true,
            PutMode::Create => path.symlink_metadata().is_err(),
            PutMode::Update(tag) => match self.open_object(key) {
                Ok((file, stat)) => *tag == self.etag(&file, &stat).map_err(|e| plain(e, key))?,
                Err(StoreError::NotFound { .. }) => false,
                Err(error) => return Err(error),
            },
        };
        if holds { Ok(()) } else { Err(StoreError::Precondition { key: key.to_owned() }) }
    }

    /// Before a file gets its name: a name that survives a power loss must have all bytes behind it.
    fn before_name(&self, file: &File) -> io::Result<()> {
        if self.in_order { dir_fs::write_back(file) } else { file.sync_all() }
    }

    /// Runs `name` with its directories made, then makes the new name of the file durable.
    fn place(
        &self,
        path: &Path,
        temp: &mut TempFile,
        mut name: impl FnMut(&mut TempFile, &Path) -> io::Result<()>,
    ) -> io::Result<()> {
        let parent = path.parent().unwrap_or(&self.root.path);
        // A delete in parallel may take away a directory that it finds empty.
        let mut tries = 0;
        loop {
            match name(temp, path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound && tries < 100 => {
                    tries += 1;
                    self.durable.lock().remove(parent);
                    match self.make_dirs(parent) {
                        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                        _ => {}
                    }
                }
                Err(e) => return Err(e),
                Ok(()) => break,
            }
        }
        failpoint::hit(failpoint::DIR_NAMED)?;
        let synced = if self.in_order { temp.file.sync_all() } else { sync_dir(parent) };
        match synced.and_then(|()| self.sync_above(parent)) {
            // The object was deleted again, and its directory with it; what became of the root
            // is another question.
            Err(e) if is_missing(&e) && self.root.check().is_ok() => Ok(()),
            done => done,
        }
    }

    fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        // Never the root itself: when it is gone, so is the store.
        let mut missing = Vec::new();
        for dir in dir.ancestors().take_while(|dir| *dir != self.root.path) {
            if dir.is_dir() {
                break;
            }
            missing.push(dir);
        }
        for dir in missing.into_iter().rev() {
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {
                    self.durable.lock().remove(dir);
                }
            }
        }
        Ok(())
    }

    /// Makes the names of `dir` and of the directories above it durable, once per process.
    fn sync_above(&self, dir: &Path) -> io::Result<()> {
        for dir in dir.ancestors().take_while(|dir| *dir != self.root.path) {
            if self.durable.lock().contains(dir) {
                break;
            }
            if let Some(above) = dir.parent() {
                sync_dir(above)?;
            }
        }
        let mut durable = self.durable.lock();
        if durable.len() >= KNOWN_DIRS {
            durable.clear();
        }
        for dir in dir.ancestors().take_while(|dir| *dir != self.root.path) {
            if !durable.insert(dir.to_owned()) {
                break;
            }
        }
        Ok(())
    }

    fn lock_path(&self, key: &str) -> PathBuf {
        let hash = blake3::hash(key.as_bytes());
        self.root.path.join(LOCK).join(format!("{:02x}", hash.as_bytes()[0]))
    }

    /// `false`: the file system cannot, a sidecar is needed.
    fn set_attribute(&self, file: &File, json: &[u8]) -> io::Result<bool> {
        Ok(self.xattrs.load(Ordering::Relaxed) && set_xattr(file, json)?)
    }

    fn write_sidecar(&self, key: &str, json: &[u8]) -> StoreResult<()> {
        self.sidecars.store(true, Ordering::Relaxed);
        let written = || -> io::Result<()> {
            let mut temp = TempFile::create(&self.root.path.join(TMP))?;
            temp.file.write_all(json)?;
            self.before_name(&temp.file)?;
            self.place(&self.root.path.join(META).join(key), &mut temp, TempFile::rename)
        };
        written().map_err(|e| plain(e, key))
    }
}

/// Writes the body; gives its tag if it is small.
fn write_body(to: &mut File, key: &str, body: &Body) -> StoreResult<Option<ETag>> {
    let written = match body {
        Body::Bytes(bytes) => {
            to.write_all(bytes).map_err(|e| plain(e, key))?;
            return Ok((bytes.len() as u64 <= HASHED).then(|| etag_of_bytes(bytes)));
        }
        Body::File { path, len } => {
            let local = |e| plain(e, &format!("local file {}", path.display()));
            let mut from = File::open(path).map_err(local)?;
            if *len <= HASHED {
                let mut bytes = Vec::with_capacity(usize::try_from(*len).unwrap_or(0));
                (&mut from).take(HASHED + 1).read_to_end(&mut bytes).map_err(local)?;
                if bytes.len() as u64 == *len {
                    to.write_all(&bytes).map_err(|e| plain(e, key))?;
                    return Ok(Some(etag_of_bytes(&bytes)));
                }
                bytes.len() as u64
            } else {
                io::copy(&mut from, to).map_err(|e| plain(e, key))?
            }
        }
    };
    match body {
        Body::File { len, .. } if *len != written => {
            let detail = format!("the local file has {written} bytes, not {len}");
            Err(StoreError::BadBody { key: key.to_owned(), detail })
        }
        _ => Ok(None),
    }
}
