//! Random file operations that run alike on two directories, and the comparison of the two.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Names are few, so that operations meet each other's files.
const NAMES: [&str; 7] = ["a", "b", "c", "dir", "ex,S=3:2,F", ".dot", "mäil"];

/// Times before this (2001) were set by hand and must be kept exactly; later ones are the clock's.
const BY_HAND: i64 = 1_000_000_000;

type Slot = usize;

/// Paths are relative; slots name open files.
#[derive(Debug, Clone)]
pub enum FileOp {
    Open { path: PathBuf, flags: i32, mode: u32, slot: Slot },
    Close { slot: Slot },
    Write { slot: Slot, bytes: Vec<u8> },
    WriteAt { slot: Slot, offset: u64, bytes: Vec<u8> },
    ReadAt { slot: Slot, offset: u64, length: usize },
    ReadMapped { slot: Slot },
    SetLength { slot: Slot, length: u64 },
    Sync { slot: Slot, data_only: bool },
    StatOpen { slot: Slot },
    Truncate { path: PathBuf, length: u64 },
    Rename { from: PathBuf, to: PathBuf, flags: u32 },
    Link { from: PathBuf, to: PathBuf },
    Symlink { target: String, path: PathBuf },
    Unlink { path: PathBuf },
    MakeDir { path: PathBuf },
    RemoveDir { path: PathBuf },
    SetMode { path: PathBuf, mode: u32 },
    SetTime { path: PathBuf, seconds: i64, nanos: i64 },
    List { path: PathBuf },
    Stat { path: PathBuf },
    SyncDir { path: PathBuf },
}

/// A seeded stream of operations.
pub struct Generator(StdRng);

impl Generator {
    pub fn new(seed: u64) -> Generator {
        Generator(StdRng::seed_from_u64(seed))
    }

    fn path(&mut self) -> PathBuf {
        let depth = [1, 1, 2, 2, 3].choose(&mut self.0).copied().unwrap_or(1);
        let mut path = PathBuf::new();
        for level in 0..depth {
            let inner = level + 1 < depth && self.0.random_bool(0.7);
            path.push(if inner { "dir" } else { NAMES.choose(&mut self.0).unwrap() });
        }
        path
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = match self.0.random_range(0..10) {
            0 => self.0.random_range(60_000..200_000),
            1..4 => self.0.random_range(3_000..9_000),
            _ => self.0.random_range(0..300),
        };
        let mut bytes = vec![0; length];
        self.0.fill(&mut bytes[..]);
        bytes
    }

    fn offset(&mut self) -> u64 {
        if self.0.random_bool(0.5) {
            self.0.random_range(0..500)
        } else {
            self.0.random_range(0..20_000)
        }
    }
}

impl Iterator for Generator {
    type Item = FileOp;

    fn next(&mut self) -> Option<FileOp> {
        let slot = self.0.random_range(0..5);
        let path = self.path();
        let op = match self.0.random_range(0..100) {
            0..18 => {
                let access = [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR];
                let extras = [0, libc::O_CREAT, libc::O_CREAT, libc::O_CREAT | libc::O_EXCL]
                    .into_iter()
                    .chain([libc::O_CREAT | libc::O_TRUNC, libc::O_CREAT | libc::O_APPEND]);
                let extras: Vec<i32> = extras.collect();
                let flags = access.choose(&mut self.0)? | extras.choose(&mut self.0)?;
                let mode = *[0o600, 0o640, 0o644].choose(&mut self.0)?;
                FileOp::Open { path, flags, mode, slot }
            }
            18..22 => FileOp::Close { slot },
            22..32 => FileOp::Write { slot, bytes: self.bytes() },
            32..40 => FileOp::WriteAt { slot, offset: self.offset(), bytes: self.bytes() },
            40..46 => FileOp::ReadAt { slot, offset: self.offset(), length: 10_000 },
            46..49 => FileOp::ReadMapped { slot },
            49..52 => FileOp::SetLength { slot, length: self.offset() },
            52..55 => FileOp::Sync { slot, data_only: self.0.random_bool(0.5) },
            55..57 => FileOp::StatOpen { slot },
            57..59 => FileOp::Truncate { path, length: self.offset() },
            59..67 => {
                let kinds = [0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE];
                let flags = *kinds.choose(&mut self.0)?;
                FileOp::Rename { from: path, to: self.path(), flags }
            }
            67..73 => FileOp::Link { from: path, to: self.path() },
            73..75 => {
                let target = (*["a", "dir/b", "nowhere", "/dev/null"].choose(&mut self.0)?).into();
                FileOp::Symlink { target, path }
            }
            75..80 => FileOp::Unlink { path },
            80..86 => FileOp::MakeDir { path },
            86..88 => FileOp::RemoveDir { path },
            88..90 => FileOp::SetMode { path, mode: *[0o600, 0o400, 0o664].choose(&mut self.0)? },
            90..93 => {
                let seconds = self.0.random_range(1..BY_HAND);
                FileOp::SetTime { path, seconds, nanos: self.0.random_range(0..1_000_000_000) }
            }
            93..96 => FileOp::List { path },
            96..98 => FileOp::Stat { path },
            _ => FileOp::SyncDir { path },
        };
        Some(op)
    }
}

/// A directory with the files that are open in it.
pub struct Side {
    pub root: PathBuf,
    open: BTreeMap<Slot, File>,
}

fn no_such_slot() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

pub fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn check(result: libc::c_int) -> io::Result<String> {
    if result == 0 { Ok(String::new()) } else { Err(io::Error::last_os_error()) }
}

pub fn rename_with(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let (from, to) = (c_path(from), c_path(to));
    // SAFETY: both strings end with NUL and live during the call.
    let result = unsafe {
        libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags)
    };
    check(result).map(|_| ())
}

/// Reads a whole file through a shared mapping.
pub fn read_mapped(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len() as usize;
    if length == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: a new mapping of a length that is not 0; it is read within that length, which
    // nobody shortens meanwhile, and taken away before anything else happens to the file.
    unsafe {
        let null = std::ptr::null_mut();
        let (prot, fd) = (libc::PROT_READ, file.as_raw_fd());
        let map = libc::mmap(null, length, prot, libc::MAP_SHARED, fd, 0);
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let bytes = std::slice::from_raw_parts(map.cast::<u8>(), length).to_vec();
        libc::munmap(map, length);
        Ok(bytes)
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("{} bytes {}", bytes.len(), &blake3::hash(bytes).to_hex()[..16])
}

fn time_shown(seconds: i64, nanos: i64) -> String {
    if seconds < BY_HAND { format!("{seconds}.{nanos:09}") } else { "recent".into() }
}

fn attributes(meta: &fs::Metadata) -> String {
    let mode = meta.permissions().mode();
    let kind = meta.file_type();
    if kind.is_dir() {
        return format!("directory {mode:o} {}", time_shown(meta.mtime(), meta.mtime_nsec()));
    }
    if kind.is_symlink() {
        return "symlink".into();
    }
    let special = kind.is_fifo() || kind.is_socket();
    let time = time_shown(meta.mtime(), meta.mtime_nsec());
    format!("file {mode:o} links {} size {} {time} {special}", meta.nlink(), meta.len())
}

impl Side {
    pub fn new(root: &Path) -> Side {
        Side { root: root.to_owned(), open: BTreeMap::new() }
    }

    fn slot(&self, slot: Slot) -> io::Result<&File> {
        self.open.get(&slot).ok_or_else(no_such_slot)
    }

    pub fn close_all(&mut self) {
        self.open.clear();
    }

    /// What the caller sees: a text that must be the same on both sides, or the errno.
    pub fn run(&mut self, op: &FileOp) -> Result<String, i32> {
        self.try_run(op).map_err(|e| e.raw_os_error().unwrap_or(-1))
    }

    fn try_run(&mut self, op: &FileOp) -> io::Result<String> {
        let at = |path: &Path| self.root.join(path);
        let nothing = |()| String::new();
        match op {
            FileOp::Open { path, flags, mode, slot } => {
                self.open.remove(slot);
                let (read, write) = match flags & libc::O_ACCMODE {
                    libc::O_RDONLY => (true, false),
                    libc::O_WRONLY => (false, true),
                    _ => (true, true),
                };
                let file = open_raw(&self.root.join(path), *flags, *mode)?;
                self.open.insert(*slot, file);
                Ok(format!("{read} {write}"))
            }
            FileOp::Close { slot } => {
                Ok(self.open.remove(slot).map_or("was closed".into(), |_| "closed".into()))
            }
            FileOp::Write { slot, bytes } => {
                let written = io::Write::write(&mut self.slot(*slot)?, bytes)?;
                Ok(written.to_string())
            }
            FileOp::WriteAt { slot, offset, bytes } => {
                Ok(self.slot(*slot)?.write_at(bytes, *offset)?.to_string())
            }
            FileOp::ReadAt { slot, offset, length } => {
                let mut bytes = vec![0; *length];
                let read = self.slot(*slot)?.read_at(&mut bytes, *offset)?;
                Ok(digest(&bytes[..read]))
            }
            FileOp::ReadMapped { slot } => Ok(digest(&read_mapped(self.slot(*slot)?)?)),
            FileOp::SetLength { slot, length } => self.slot(*slot)?.set_len(*length).map(nothing),
            FileOp::Sync { slot, data_only: true } => self.slot(*slot)?.sync_data().map(nothing),
            FileOp::Sync { slot, data_only: false } => self.slot(*slot)?.sync_all().map(nothing),
            FileOp::StatOpen { slot } => Ok(attributes(&self.slot(*slot)?.metadata()?)),
            FileOp::Truncate { path, length } => {
                let path = c_path(&at(path));
                // SAFETY: the string ends with NUL and lives during the call.
                check(unsafe { libc::truncate(path.as_ptr(), *length as libc::off_t) })
            }
            FileOp::Rename { from, to, flags } => {
                rename_with(&at(from), &at(to), *flags).map(nothing)
            }
            FileOp::Link { from, to } => fs::hard_link(at(from), at(to)).map(nothing),
            FileOp::Symlink { target, path } => {
                std::os::unix::fs::symlink(target, at(path)).map(nothing)
            }
            FileOp::Unlink { path } => fs::remove_file(at(path)).map(nothing),
            FileOp::MakeDir { path } => fs::create_dir(at(path)).map(nothing),
            FileOp::RemoveDir { path } => fs::remove_dir(at(path)).map(nothing),
            FileOp::SetMode { path, mode } => {
                // A link could point out of the directory.
                if fs::symlink_metadata(at(path))?.is_symlink() {
                    return Ok("symlink".into());
                }
                let mode = if at(path).is_dir() { mode | 0o111 } else { *mode };
                fs::set_permissions(at(path), fs::Permissions::from_mode(mode)).map(nothing)
            }
            FileOp::SetTime { path, seconds, nanos } => set_time(&at(path), *seconds, *nanos),
            FileOp::List { path } => Ok(names(&at(path))?.join(" ")),
            FileOp::Stat { path } => Ok(attributes(&fs::symlink_metadata(at(path))?)),
            FileOp::SyncDir { path } => {
                if !at(path).is_dir() {
                    return Ok("no directory".into());
                }
                File::open(at(path))?.sync_all().map(nothing)
            }
        }
    }

    /// Everything below: one line for each name; names of one file share their number.
    pub fn tree(&self) -> BTreeMap<String, String> {
        let mut lines = BTreeMap::new();
        let mut files = BTreeMap::new();
        walk(&self.root, "", &mut lines, &mut files);
        lines
    }
}

fn open_raw(path: &Path, flags: i32, mode: u32) -> io::Result<File> {
    let access = flags & libc::O_ACCMODE;
    let mut options = File::options();
    options.read(access != libc::O_WRONLY).write(access != libc::O_RDONLY).mode(mode);
    if flags & libc::O_CREAT != 0 && access == libc::O_RDONLY {
        // The library refuses to create a file for reading only; the system does not.
        let path = c_path(path);
        // SAFETY: the string ends with NUL; the descriptor is new and has no other owner.
        unsafe {
            let fd = libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, mode as libc::c_uint);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            return Ok(std::os::fd::FromRawFd::from_raw_fd(fd));
        }
    }
    options.custom_flags(flags & !libc::O_ACCMODE & !libc::O_CREAT & !libc::O_EXCL);
    if flags & libc::O_EXCL != 0 {
        options.create_new(true);
    } else if flags & libc::O_CREAT != 0 {
        options.create(true);
    }
    options.open(path)
}

fn set_time(path: &Path, seconds: i64, nanos: i64) -> io::Result<String> {
    let path = c_path(path);
    let time = libc::timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = [time, time];
    let flags = libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: the string ends with NUL, two times are given, both live during the call.
    check(unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), times.as_ptr(), flags) })
}

pub fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(directory)?;
    let names = entries.map(|e| Ok(e?.file_name().as_bytes().escape_ascii().to_string()));
    let mut names: Vec<String> = names.collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

fn walk(
    directory: &Path,
    prefix: &str,
    lines: &mut BTreeMap<String, String>,
    files: &mut BTreeMap<u64, usize>,
) {
    let mut entries: Vec<_> = fs::read_dir(directory).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().as_bytes().escape_ascii());
        let path = entry.path();
        let meta = fs::symlink_metadata(&path).unwrap();
        let mut line = attributes(&meta);
        if meta.is_dir() {
            walk(&path, &format!("{name}/"), lines, files);
        } else if meta.is_symlink() {
            line.push_str(&format!(" to {:?}", fs::read_link(&path).unwrap()));
        } else {
            let next = files.len();
            let number = files.entry(meta.ino()).or_insert(next);
            line.push_str(&format!(" #{number} {}", digest(&fs::read(&path).unwrap())));
        }
        lines.insert(name, line);
    }
}

/// The lines in which two trees differ.
pub fn difference(have: &BTreeMap<String, String>, want: &BTreeMap<String, String>) -> Vec<String> {
    let mut lines = Vec::new();
    let none = "absent".to_owned();
    for name in have.keys().chain(want.keys().filter(|n| !have.contains_key(*n))) {
        let (have, want) = (have.get(name).unwrap_or(&none), want.get(name).unwrap_or(&none));
        if have != want {
            lines.push(format!("{name}\n    have {have}\n    want {want}"));
        }
    }
    lines
}
