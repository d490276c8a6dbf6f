//! A disk on which a test can leave no room.

use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use vmailfs::cache::disk::{Disk, DiskEntry, DiskFile, How, Space};

/// A disk that can be full: nothing can be written, all can be read. One that is broken
/// does nothing at all. A sync that fails loses the file's unsynced pages: later ones say success,
/// and the file shows what it showed. One whose fuse has burnt is a machine's that died: nothing
/// reaches it any more.
#[derive(Debug)]
pub struct FullDisk {
    inner: Arc<dyn Disk>,
    full: Arc<AtomicBool>,
    broken: AtomicBool,
    /// Only below this.
    at: PathBuf,
    fail_sync: Arc<AtomicBool>,
    syncs: Arc<Mutex<Syncs>>,
    fuse: Arc<AtomicI64>,
    /// A file of this name is not replaced, after so many that are.
    fail_replace: Mutex<Option<(&'static str, usize)>>,
    fail_dir: AtomicBool,
    /// What lies below this is on a file system of its own.
    apart: Mutex<Option<PathBuf>>,
}

/// What reached the disk, by inode.
#[derive(Debug, Default)]
struct Syncs {
    /// Names of files whose next syncs fail, so often.
    fail: Vec<(OsString, usize)>,
    lost: HashSet<u64>,
    synced: HashMap<u64, Vec<u8>>,
}

#[derive(Debug)]
struct FullFile {
    file: Arc<dyn DiskFile>,
    full: Arc<AtomicBool>,
    fails: Option<Arc<AtomicBool>>,
    name: OsString,
    syncs: Arc<Mutex<Syncs>>,
    fuse: Arc<AtomicI64>,
}

/// A change of the disk; the one after the last that was allowed is not made.
fn burn(fuse: &AtomicI64) -> io::Result<()> {
    match fuse.fetch_sub(1, Ordering::SeqCst) > 0 {
        true => Ok(()),
        false => Err(io::Error::other("the machine is dead")),
    }
}

impl FullFile {
    fn ino(&self) -> Option<u64> {
        self.file.real().and_then(|file| file.metadata().ok()).map(|meta| meta.ino())
    }
}

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
            syncs: Arc::default(),
            fuse: Arc::new(AtomicI64::new(i64::MAX)),
            fail_replace: Mutex::default(),
            fail_dir: AtomicBool::default(),
            apart: Mutex::default(),
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

    /// The next syncs of files of this name fail.
    pub fn fail_syncs_of(&self, name: &str, times: usize) {
        self.syncs.lock().fail.push((name.into(), times));
    }

    /// The next sync of a directory fails.
    pub fn fail_next_dir(&self) {
        self.fail_dir.store(true, Ordering::SeqCst);
    }

    /// A directory is another file system's.
    pub fn set_apart(&self, dir: &Path) {
        *self.apart.lock() = Some(dir.into());
    }

    /// What a power cut would leave at a path of what was written and synced; `None`: nothing.
    pub fn on_disk(&self, path: &Path) -> Option<Vec<u8>> {
        let ino = std::fs::metadata(path).unwrap().ino();
        self.syncs.lock().synced.get(&ino).cloned()
    }

    /// The machine dies after so many changes.
    pub fn dies_after(&self, changes: i64) {
        self.fuse.store(changes, Ordering::SeqCst);
    }

    pub fn is_dead(&self) -> bool {
        self.fuse.load(Ordering::SeqCst) < 0
    }

    /// A file of this name is not replaced once, after so many times that it is.
    pub fn fail_replace(&self, name: &'static str, after: usize) {
        *self.fail_replace.lock() = Some((name, after));
    }

    /// Whether what was to fail has failed.
    pub fn has_failed(&self) -> bool {
        self.fail_replace.lock().is_none()
    }

    fn fails_now(&self, path: &Path) -> bool {
        let mut fail = self.fail_replace.lock();
        match &mut *fail {
            Some((name, left)) if path.file_name().is_some_and(|n| n == *name) => {
                if *left == 0 {
                    *fail = None;
                    return true;
                }
                *left -= 1;
                false
            }
            _ => false,
        }
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
        no_space(&self.full)?;
        burn(&self.fuse)?;
        self.file.write_all_at(data, offset)
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        burn(&self.fuse)?;
        self.file.set_len(len)
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
        if how != How::Read && how != How::ReadWrite {
            burn(&self.fuse)?;
        }
        let file = self.inner.open(path, how)?;
        if !path.starts_with(&self.at) {
            return Ok(file);
        }
        let journal =
            path.file_name().is_some_and(|name| name == "journal" || name == "journal.new");
        let fails = journal.then(|| self.fail_sync.clone());
        let made = how == How::CreateNew || how == How::Create && file.size()? == 0;
        let file = FullFile {
            file,
            full: self.full.clone(),
            fails,
            name: path.file_name().unwrap_or_default().into(),
            syncs: self.syncs.clone(),
            fuse: self.fuse.clone(),
        };
        if made && let Some(ino) = file.ino() {
            // A number that an earlier file had.
            let mut syncs = self.syncs.lock();
            syncs.lost.remove(&ino);
            syncs.synced.remove(&ino);
        }
        Ok(Arc::new(file))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.works(to)?;
        burn(&self.fuse)?;
        if let Some(dir) = &*self.apart.lock()
            && from.starts_with(dir) != to.starts_with(dir)
        {
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        self.inner.rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        burn(&self.fuse)?;
        self.inner.exchange(a, b)
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        burn(&self.fuse)?;
        self.inner.hard_link(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.works(path)?;
        burn(&self.fuse)?;
        self.inner.remove_file(path)
    }
    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        burn(&self.fuse)?;
        self.inner.remove_tree(path)
    }
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        burn(&self.fuse)?;
        self.inner.create_dirs(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if self.fail_dir.swap(false, Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
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
        burn(&self.fuse)?;
        if self.fails_now(path) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.replace(path, bytes, durable)
    }
}
