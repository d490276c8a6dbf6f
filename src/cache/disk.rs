//! The local disk, as a trait, so that a simulation can lose and tear what was not synced.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Read,
    ReadWrite,
    /// Read and write; made if absent, kept if there.
    Create,
    /// Read and write; must not exist.
    CreateNew,
}

/// An open file. Cheap to share; stays readable after its name is gone.
pub trait DiskFile: Send + Sync + fmt::Debug {
    /// Reads up to `buf.len()` bytes; fewer only at the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    fn size(&self) -> io::Result<u64>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    fn sync_data(&self) -> io::Result<()>;
    /// The real file behind it, if there is one.
    fn real(&self) -> Option<Arc<File>>;
    /// Differs once somebody wrote to the file by its name, or put another in its place; the
    /// same for all where nobody can.
    fn stamp(&self) -> io::Result<(u64, i64, i64)> {
        Ok((0, 0, 0))
    }
    /// Bytes that the file takes on its file system, as that says.
    fn allocated(&self) -> io::Result<u64> {
        self.size()
    }

    /// `len` bytes from `offset` on; an error if there are fewer.
    fn read_exact_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buf = vec![0; len];
        if self.read_at(&mut buf, offset)? != len {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "file is shorter"));
        }
        Ok(buf)
    }
}

/// What a directory holds.
#[derive(Debug, Clone)]
pub struct DiskEntry {
    pub name: OsString,
    pub is_dir: bool,
    pub len: u64,
    /// Identity within the file system: equal for two names of one file.
    pub ino: u64,
    /// Seconds since 1970 of the last use that is known.
    pub used: i64,
}

/// The usual unit of space, in bytes.
pub const BLOCK: u64 = 4096;

/// Free and total space, in bytes and in files.
#[derive(Debug, Clone, Copy, Default)]
pub struct Space {
    pub total: u64,
    pub free: u64,
    pub files: u64,
    pub files_free: u64,
}

pub trait Disk: Send + Sync + fmt::Debug {
    fn open(&self, path: &Path, how: How) -> io::Result<Arc<dyn DiskFile>>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with what it holds; no error if it is not there.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;
    fn create_dirs(&self, path: &Path) -> io::Result<()>;
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    fn exists(&self, path: &Path) -> io::Result<bool>;
    fn is_dir(&self, path: &Path) -> io::Result<bool>;
    /// What is in a directory, sorted by name; empty if it is not there.
    fn list(&self, dir: &Path) -> io::Result<Vec<DiskEntry>>;
    fn space(&self, path: &Path) -> io::Result<Space>;
    /// Major and minor number of the device that a path lies on, where there is one.
    fn device(&self, _path: &Path) -> io::Result<(u32, u32)> {
        Ok((0, 0))
    }
    /// Size and stamp of a file, without opening it where that can be spared.
    fn look(&self, path: &Path) -> io::Result<(u64, (u64, i64, i64))> {
        let file = self.open(path, How::Read)?;
        Ok((file.size()?, file.stamp()?))
    }
    /// Bytes that a directory takes by itself, as its file system says.
    fn dir_size(&self, path: &Path) -> io::Result<u64> {
        let _ = path;
        Ok(BLOCK)
    }
    /// The unit in which the file system of a directory gives space to files, in bytes.
    fn block_size(&self, path: &Path) -> u64 {
        let _ = path;
        BLOCK
    }

    /// Replaces a file's content so that after a crash it is either the old or the new one.
    fn replace(&self, path: &Path, bytes: &[u8], durable: bool) -> io::Result<()>;

    /// A whole file, refused above `limit` bytes; `None` if there is none.
    fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open(path, How::Read) {
            Ok(f) => f,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let len = file.size()?;
        if len > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "file exceeds its limit"));
        }
        let mut buf = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        let n = file.read_at(&mut buf, 0)?;
        buf.truncate(n);
        Ok(Some(buf))
    }
}

/// Makes a directory, and those above it, as [`Disk::create_dirs`] does, and syncs the parents of those
/// that were not there: a file in it that is synced is there after a power cut, wherever it lies.
///
/// For one caller at a time: whoever finds a directory that another one is just making does not wait
/// for its name to be on the disk ([`sync_above`] does).
pub fn make_dirs(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let mut parents = Vec::new();
    for dir in path.ancestors() {
        if dir.as_os_str().is_empty() || disk.exists(dir)? {
            break;
        }
        parents.extend(dir.parent());
    }
    disk.create_dirs(path)?;
    // From the top: what is on the disk can be reached.
    for parent in parents.into_iter().rev() {
        let here = parent.as_os_str().is_empty();
        disk.sync_dir(if here { Path::new(".") } else { parent })?;
    }
    Ok(())
}

/// Syncs the directories above `path`, up to `top` and with it, whoever made what is in them.
pub fn sync_above(disk: &dyn Disk, path: &Path, top: &Path) -> io::Result<()> {
    let above: Vec<&Path> =
        path.ancestors().skip(1).take_while(|dir| dir.starts_with(top)).collect();
    above.into_iter().rev().try_for_each(|dir| disk.sync_dir(dir))
}

/// A new file in the directory of `path`. Its name is short whatever the other's is, and nobody
/// else's: any name may be a mail server's.
fn new_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    loop {
        let temp = path.with_file_name(format!(".new.{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        match options.open(&temp) {
            Ok(file) => return Ok((file, temp)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
}

/// The machine's disk. New files and directories are for the daemon's user only.
#[derive(Debug, Default)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile(Arc<File>);

impl DiskFile for RealFile {
    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while !buf.is_empty() {
            match FileExt::read_at(&*self.0, buf, offset) {
                Ok(0) => break,
                Ok(n) => {
                    done += n;
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(&*self.0, data, offset)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn real(&self) -> Option<Arc<File>> {
        Some(self.0.clone())
    }
    fn stamp(&self) -> io::Result<(u64, i64, i64)> {
        Ok(stamp_of(&self.0.metadata()?))
    }
    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }
}

fn stamp_of(meta: &fs::Metadata) -> (u64, i64, i64) {
    (meta.ino(), meta.mtime(), meta.mtime_nsec())
}

fn not_found_is_ok(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, how: How) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options.read(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        match how {
            How::Read => {}
            How::ReadWrite => _ = options.write(true),
            How::Create => _ = options.write(true).create(true),
            How::CreateNew => _ = options.write(true).create_new(true),
        }
        Ok(Arc::new(RealFile(Arc::new(options.open(path)?))))
    }
    fn look(&self, path: &Path) -> io::Result<(u64, (u64, i64, i64))> {
        let meta = fs::symlink_metadata(path)?;
        if meta.is_symlink() {
            // As `open` says it.
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        Ok((meta.len(), stamp_of(&meta)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
        Ok(renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE)?)
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        not_found_is_ok(fs::remove_dir_all(path))
    }
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
    fn is_dir(&self, path: &Path) -> io::Result<bool> {
        match fs::symlink_metadata(path) {
            Ok(m) => Ok(m.is_dir()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<DiskEntry>> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry?;
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(e),
            };
            all.push(DiskEntry {
                name: entry.file_name(),
                is_dir: meta.is_dir(),
                len: meta.len(),
                ino: meta.ino(),
                used: meta.mtime().max(meta.atime()),
            });
        }
        all.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
        Ok(all)
    }
    fn device(&self, path: &Path) -> io::Result<(u32, u32)> {
        let dev = fs::metadata(path)?.dev();
        Ok((libc::major(dev), libc::minor(dev)))
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        let s = nix::sys::statvfs::statvfs(path)?;
        let unit = s.fragment_size();
        Ok(Space {
            total: s.blocks() * unit,
            free: s.blocks_available() * unit,
            files: s.files(),
            files_free: s.files_available(),
        })
    }
    fn dir_size(&self, path: &Path) -> io::Result<u64> {
        Ok(fs::symlink_metadata(path)?.blocks() * 512)
    }
    fn block_size(&self, path: &Path) -> u64 {
        match nix::sys::statvfs::statvfs(path) {
            Ok(s) => s.fragment_size().clamp(BLOCK, 1 << 20),
            Err(_) => BLOCK,
        }
    }
    fn replace(&self, path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
        let (mut file, temp) = new_beside(path)?;
        let written = file
            .write_all(bytes)
            .and_then(|()| if durable { file.sync_data() } else { Ok(()) })
            .and_then(|()| fs::rename(&temp, path));
        if let Err(error) = written {
            // The first error counts; a file left behind is named nowhere.
            let _ = fs::remove_file(&temp);
            return Err(error);
        }
        if durable && let Some(dir) = path.parent() {
            self.sync_dir(dir)?;
        }
        Ok(())
    }
}
