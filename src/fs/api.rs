//! What the file system offers to whoever drives it.
//!
//! Every operation is a plain call that never waits for a store or a disk flush. It answers at
//! once ([`Step::Done`]) or names what must happen first ([`Step::Wait`]): the driver then
//! awaits [`MailFs::wait`] on a task of its own and makes the same call again. So whatever is
//! in memory is answered on the calling thread, and no thread that serves the kernel ever waits
//! for the network. Calling again is harmless: a call that asks to wait has changed nothing
//! that its repetition would change twice.

use crate::format::Timestamp;
use async_trait::async_trait;
use std::any::Any;
use std::fs::File;
use std::sync::Arc;

/// An inode number; 1 is the mount's root.
pub type Ino = u64;
/// A handle of an open file or directory.
pub type Fh = u64;

/// Who calls.
#[derive(Debug, Clone, Copy, Default)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

/// The answer of a call.
#[derive(Debug)]
pub enum Step<T> {
    Done(Result<T, FsError>),
    Wait(Need),
}

/// What a call must wait for: opaque to the driver, known to the file system that made it.
#[derive(Debug)]
pub struct Need(Box<dyn Any + Send>);

impl Need {
    pub fn new<T: Any + Send>(what: T) -> Need {
        Need(Box::new(what))
    }

    /// What it was made of, if that is a `T`.
    ///
    /// # Errors
    /// It is something else, and is given back.
    pub fn try_downcast<T: Any>(self) -> Result<T, Need> {
        self.0.downcast().map(|what| *what).map_err(Need)
    }

    /// What it was made of; `None` if another file system made it.
    pub fn downcast<T: Any>(self) -> Option<T> {
        self.0.downcast().ok().map(|what| *what)
    }
}

/// An error on its way to the caller. Made where it arises; its errno was chosen there in the
/// one table of `vmail::error`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct FsError {
    /// As in `errno.h`, positive.
    pub errno: i32,
    /// For the log; names user and file where known.
    pub text: String,
    /// Whether people should see it: an ordinary answer such as ENOENT or EEXIST is not.
    pub quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    Directory,
    Regular,
    Symlink,
}

/// Attributes as `stat` shows them.
#[derive(Debug, Clone, Copy)]
pub struct Attr {
    pub ino: Ino,
    pub kind: FileKind,
    pub size: u64,
    /// Permission bits only.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    /// How long the kernel may keep these attributes: for long, or not at all.
    pub cacheable: bool,
}

/// A name that was looked up, and counts as one lookup of `attr.ino`.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub attr: Attr,
    /// Whether the kernel may keep the name for long, or not at all.
    pub cacheable: bool,
}

/// Answer to a lookup.
#[derive(Debug, Clone, Copy)]
pub enum Lookup {
    Found(Found),
    /// There is no such name; `cacheable`: the kernel may remember that.
    Absent {
        cacheable: bool,
    },
}

/// An opened file.
#[derive(Debug, Clone)]
pub struct Opened {
    pub fh: Fh,
    /// Pages cached by an earlier open are still right.
    pub keep_cache: bool,
    /// The kernel must keep nothing of what this handle reads.
    pub uncached: bool,
    /// A close has nothing to make safe, whatever was written.
    pub quiet_close: bool,
    /// An immutable local copy to which the kernel may pass reads directly; the driver may
    /// ignore it. All opens of one inode get the same file while one of them lives.
    pub backing: Option<Arc<File>>,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct SetAttr {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    /// Accepted; access times are not kept.
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
}

#[derive(Debug, Clone, Copy)]
pub enum SetTime {
    Now,
    At(Timestamp),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameMode {
    Replace,
    NoReplace,
    Exchange,
}

/// How a file is opened, from the flags of `open(2)`.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenMode {
    pub read: bool,
    pub write: bool,
    pub append: bool,
    pub truncate: bool,
    /// With create: fail if the name exists.
    pub exclusive: bool,
}

#[derive(Debug, Clone)]
pub struct DirEntry {
    pub ino: Ino,
    pub name: Vec<u8>,
    pub kind: FileKind,
    /// Where a later readdir goes on after this entry.
    pub cookie: u64,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct StatFs {
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    pub block_size: u32,
    pub name_max: u32,
}

/// What the kernel must be told to forget, in order. Sent from a thread of its own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Invalidate {
    Inode { ino: Ino },
    Name { parent: Ino, name: Vec<u8> },
}

/// The file system, as a driver sees it. Names are bytes without `/` and NUL, 1 to 255 long
/// (longer ones are ENAMETOOLONG, answered here).
#[async_trait]
pub trait MailFs: Send + Sync + 'static {
    async fn wait(&self, need: Need) -> Result<(), FsError>;

    fn lookup(&self, caller: Caller, parent: Ino, name: &[u8]) -> Step<Lookup>;
    fn forget(&self, ino: Ino, lookups: u64);
    fn getattr(&self, ino: Ino, fh: Option<Fh>) -> Step<Attr>;
    fn setattr(&self, caller: Caller, ino: Ino, fh: Option<Fh>, set: SetAttr) -> Step<Attr>;
    fn readlink(&self, ino: Ino) -> Step<Vec<u8>>;
    fn mkdir(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Step<Found>;
    /// An empty regular file, not opened.
    fn mknod(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Step<Found>;
    fn symlink(&self, caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Step<Found>;
    fn unlink(&self, caller: Caller, parent: Ino, name: &[u8]) -> Step<()>;
    fn rmdir(&self, caller: Caller, parent: Ino, name: &[u8]) -> Step<()>;
    fn rename(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Step<()>;
    fn link(&self, caller: Caller, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Step<Found>;

    fn open(&self, caller: Caller, ino: Ino, how: OpenMode) -> Step<Opened>;
    fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        how: OpenMode,
    ) -> Step<(Found, Opened)>;
    fn read(&self, ino: Ino, fh: Fh, offset: u64, size: u32) -> Step<Vec<u8>>;
    fn write(&self, caller: Caller, ino: Ino, fh: Fh, offset: u64, data: &[u8]) -> Step<u32>;
    /// At each close of a descriptor that could have written (or made) the file.
    fn flush(&self, ino: Ino, fh: Fh) -> Step<()>;
    fn fsync(&self, ino: Ino, fh: Fh, data_only: bool) -> Step<()>;
    fn fallocate(&self, ino: Ino, fh: Fh, offset: u64, length: u64, mode: i32) -> Step<()>;
    /// The last reference to the handle is gone. Never waits.
    fn release(&self, ino: Ino, fh: Fh);

    fn opendir(&self, caller: Caller, ino: Ino) -> Step<Fh>;
    /// Entries after `cookie` (0: from the start), including `.` and `..`; `emit` says false
    /// when its buffer is full, and then the entry was not taken.
    fn readdir(
        &self,
        ino: Ino,
        fh: Fh,
        cookie: u64,
        emit: &mut dyn FnMut(&DirEntry) -> bool,
    ) -> Step<()>;
    fn fsyncdir(&self, ino: Ino, fh: Fh) -> Step<()>;
    fn releasedir(&self, ino: Ino, fh: Fh);
    fn statfs(&self) -> StatFs;

    /// Where to send what the kernel must forget. Set once, before the first call.
    fn set_invalidator(&self, send: Box<dyn Fn(Invalidate) + Send + Sync>);
}
