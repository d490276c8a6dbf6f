//! A disk on which a test can leave no room.

use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vmailfs::cache::disk::{Disk, DiskEntry, DiskFile, How, Space};

/// A disk that can be full: nothing can be written, all can be read. One that is broken
/// does nothing at all.
#[derive(Debug)]
pub struct FullDisk {
    inner: Arc<dyn Disk>,
    full: Arc<AtomicBool>,
    broken: AtomicBool,
    /// Only below this.
    at: PathBuf,
    fail_sync: Arc<AtomicBool>,
}

#[derive(Debug)]
struct FullFile(Arc<dyn DiskFile>, Arc<AtomicBool>, Option<Arc<AtomicBool>>);

fn no_space(full: &AtomicBool) -> io::Result<()> {
    match full.load(Ordering::SeqCst) {
        true => Err(io::ErrorKind::StorageFull.into()),
        false => Ok(()),
    }
}

impl FullDisk {
    pub fn new(inner: Arc<dyn Disk>) -> FullDisk {
        FullDisk::below(inner, Path::new("/"))
    }

    pub fn below(inner: Arc<dyn Disk>, at: &Path) -> FullDisk {
        FullDisk {
            inner,
            full: Arc::default(),
            fail_sync: Arc::default(),
            broken: AtomicBool::new(false),
            at: at.into(),
        }
    }

    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::SeqCst);
    }

    fn works(&self, path: &Path) -> io::Result<()> {
        match self.broken.load(Ordering::SeqCst) && path.starts_with(&self.at) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(()),
        }
    }

    /// The next sync of a journal fails; like a disk, it says so once.
    pub fn fail_next_sync(&self) {
        self.fail_sync.store(true, Ordering::SeqCst);
    }

    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }
}

impl DiskFile for FullFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        no_space(&self.1)?;
        self.0.write_all_at(data, offset)
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        let bad = || Err(io::Error::other("bad sector"));
        if self.fails.as_ref().is_some_and(|fails| fails.swap(false, Ordering::SeqCst)) {
            return bad();
        }
        let mut syncs = self.syncs.lock();
        let Some(ino) = self.ino() else { return self.file.sync_data() };
        if let Some((_, left)) =
            syncs.fail.iter_mut().find(|(name, n)| *name == self.name && *n > 0)
        {
            *left -= 1;
            syncs.lost.insert(ino);
            return bad();
        }
        if !syncs.lost.contains(&ino) {
            let len = usize::try_from(self.file.size()?).unwrap();
            syncs.synced.insert(ino, self.file.read_exact_at(0, len)?);
        }
        self.file.sync_data()
    }
    fn real(&self) -> Option<Arc<std::fs::File>> {
        // What is written to behind our back would find room.
        self.file.real().filter(|_| no_space(&self.full).is_ok())
    }
    fn stamp(&self) -> io::Result<(u64, i64, i64)> {
        self.file.stamp()
    }
    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}

impl Disk for FullDisk {
    fn open(&self, path: &Path, how: How) -> io::Result<Arc<dyn DiskFile>> {
        self.works(path)?;
        let file = self.inner.open(path, how)?;
        if !path.starts_with(&self.at) {
            return Ok(file);
        }
        let journal =
            path.file_name().is_some_and(|name| name == "journal" || name == "journal.new");
        let fails = journal.then(|| self.fail_sync.clone());
        Ok(Arc::new(FullFile(file, self.full.clone(), fails)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.works(to)?;
        self.inner.rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.inner.exchange(a, b)
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.hard_link(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.works(path)?;
        self.inner.remove_file(path)
    }
    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_tree(path)
    }
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        self.inner.create_dirs(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_dir(path)
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }
    fn is_dir(&self, path: &Path) -> io::Result<bool> {
        self.inner.is_dir(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<DiskEntry>> {
        self.inner.list(dir)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        self.inner.space(path)
    }
    fn dir_size(&self, path: &Path) -> io::Result<u64> {
        self.inner.dir_size(path)
    }
    fn block_size(&self, path: &Path) -> u64 {
        self.inner.block_size(path)
    }
    fn replace(&self, path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
        if path.starts_with(&self.at) {
            no_space(&self.full)?;
        }
        self.inner.replace(path, bytes, durable)
    }
}
