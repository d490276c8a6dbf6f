//! The kernel's requests as calls of [`Straight`], the file system of the NFS mode.
//!
//! Unlike [`super::adapter`] it may wait for the server in any call: what is asked is asked of NFS, and
//! each FUSE thread waits for its own answer, as the caller would on NFS itself. So there are more
//! of them. What else differs:
//!
//! * POSIX locks are asked for, and taken on the NFS file; a waiting one polls on a thread of its own
//!   until a deadline. `flock` is not asked for.
//! * Open files are in passthrough mode where the kernel can, for reading and writing: pages are
//!   then those of the NFS client, which it drops when another host has written or had a lock.
//!   Where it cannot, files are opened with `DIRECT_IO`, so that no second page cache goes stale.
//! * Names and attributes are believed for a second.

use super::notify::Invalidations;
use super::stats::{Begun, FuseStats, Op};
use crate::fs::api::Invalidate;
use crate::hostchange::creds::Who;
use crate::hostchange::straight::locks::{Range, is_interrupted};
use crate::hostchange::straight::{Changes, Found, Straight};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents,
    PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use nix::errno::Errno as Number;
use nix::sys::stat::FileStat;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};
use through::Through;
use tokio::runtime::Handle as Runtime;
use types::{attr, entry_kind, timespec};

mod through;
mod types;

/// The largest WRITE, in bytes.
const MAX_WRITE: u32 = 1 << 20;
/// A lock that somebody else has is tried again after this; longer and longer.
const POLL: Duration = Duration::from_millis(5);
const LONGEST_POLL: Duration = Duration::from_millis(100);

/// Serves a [`Straight`] to the kernel.
#[derive(Debug)]
pub struct Adapter {
    core: Arc<Core>,
    rt: Runtime,
    notes: Invalidations,
    /// How long a lock is waited for.
    lock_wait: Duration,
    want_passthrough: bool,
}

#[derive(Debug)]
struct Core {
    fs: Arc<Straight>,
    stats: Arc<FuseStats>,
    through: Through,
}

impl Adapter {
    pub(super) fn new(
        fs: Arc<Straight>,
        rt: Runtime,
        notes: Invalidations,
        lock_wait: Duration,
        passthrough: bool,
    ) -> Adapter {
        let stats = Arc::new(FuseStats::default());
        let core = Core { fs, stats, through: Through::default() };
        Adapter { core: Arc::new(core), rt, notes, lock_wait, want_passthrough: passthrough }
    }

    pub(super) fn stats(&self) -> Arc<FuseStats> {
        self.core.stats.clone()
    }

    fn fs(&self) -> &Straight {
        &self.core.fs
    }

    fn begin(&self, op: Op) -> Begun {
        self.core.stats.request(op)
    }

    fn ttl(&self) -> Duration {
        self.fs().settings().ttl
    }

    fn entry(&self, begun: Begun, found: Result<Found, Number>, reply: ReplyEntry) {
        match found {
            Ok(found) => {
                reply.entry(&self.ttl(), &attr(found.id, &found.stat), Generation(0));
                self.core.stats.answered(begun);
                self.make_room();
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    /// Asks the kernel to forget names when it knows too many.
    fn make_room(&self) {
        for (parent, name) in self.fs().crowded() {
            self.notes.push(Invalidate::Name { parent, name });
        }
    }

    fn attributes(&self, begun: Begun, id: u64, stat: Result<FileStat, Number>, reply: ReplyAttr) {
        match stat {
            Ok(stat) => {
                reply.attr(&self.ttl(), &attr(id, &stat));
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }
}

impl Core {
    /// The one door for errors: counted, told where a person has something to do, and answered.
    fn failed(&self, begun: Begun, errno: Number) -> Errno {
        self.stats.answered(begun);
        let trouble = [
            Number::EIO,
            Number::ESTALE,
            Number::ETIMEDOUT,
            Number::ENOSPC,
            Number::EDQUOT,
            Number::EROFS,
        ];
        if trouble.contains(&errno) {
            tracing::warn!(op = begun.op.name(), errno = errno as i32, "{errno}");
        }
        // Those say what is there, and nothing is wrong.
        if !matches!(errno, Number::ENOENT | Number::EEXIST | Number::EAGAIN) {
            self.stats.error(begun.op, errno as i32);
        }
        Errno::from_i32(errno as i32)
    }

    fn empty(&self, begun: Begun, done: Result<(), Number>, reply: ReplyEmpty) {
        match done {
            Ok(()) => {
                reply.ok();
                self.stats.answered(begun);
            }
            Err(errno) => reply.error(self.failed(begun, errno)),
        }
    }
}

fn who(req: &Request) -> Who {
    Who { uid: req.uid(), gid: req.gid() }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_POSIX_LOCKS
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let offered = config.capabilities();
        if !offered.contains(InitFlags::FUSE_POSIX_LOCKS) {
            return Err(io::Error::other("this kernel does not hand on POSIX locks"));
        }
        // Neither fails: the bits were offered, the number is within limits.
        let _ = config.add_capabilities(wanted & offered);
        let _ = config.set_max_write(MAX_WRITE);
        if self.want_passthrough
            && offered.contains(InitFlags::FUSE_PASSTHROUGH)
            && config.set_max_stack_depth(1).is_ok()
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
        {
            self.core.through.wanted.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn destroy(&mut self) {}

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let begun = self.begin(Op::Lookup);
        self.entry(begun, self.fs().lookup(who(req), parent.0, name.as_bytes()), reply);
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        self.begin(Op::Forget);
        self.fs().forget(ino.0, lookups);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let begun = self.begin(Op::Getattr);
        self.attributes(begun, ino.0, self.fs().getattr(ino.0, fh.map(|fh| fh.0)), reply);
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let begun = self.begin(Op::Setattr);
        let (atime, mtime) = (atime.map(timespec), mtime.map(timespec));
        let set = Changes { mode, uid, gid, size, atime, mtime };
        let done = self.fs().setattr(who(req), ino.0, fh.map(|fh| fh.0), set);
        self.attributes(begun, ino.0, done, reply);
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let begun = self.begin(Op::Readlink);
        match self.fs().readlink(ino.0) {
            Ok(target) => {
                reply.data(&target);
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    /// The kernel has applied the umask to `mode`, here and below.
    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let begun = self.begin(Op::Mknod);
        let found = match mode & libc::S_IFMT {
            0 | libc::S_IFREG => self.fs().mknod(who(req), parent.0, name.as_bytes(), mode),
            _ => Err(Number::EPERM),
        };
        self.entry(begun, found, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let begun = self.begin(Op::Mkdir);
        self.entry(begun, self.fs().mkdir(who(req), parent.0, name.as_bytes(), mode), reply);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let begun = self.begin(Op::Unlink);
        self.core.empty(begun, self.fs().unlink(who(req), parent.0, name.as_bytes()), reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let begun = self.begin(Op::Rmdir);
        self.core.empty(begun, self.fs().rmdir(who(req), parent.0, name.as_bytes()), reply);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let begun = self.begin(Op::Symlink);
        let target = target.as_os_str();
        self.entry(begun, self.fs().symlink(who(req), parent.0, name.as_bytes(), target), reply);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let begun = self.begin(Op::Rename);
        let (from, to) = ((parent.0, name.as_bytes()), (new_parent.0, new_name.as_bytes()));
        self.core.empty(begun, self.fs().rename(who(req), from, to, flags.bits()), reply);
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let begun = self.begin(Op::Link);
        let made = self.fs().link(who(req), ino.0, new_parent.0, new_name.as_bytes());
        self.entry(begun, made, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let begun = self.begin(Op::Open);
        let caller = who(req);
        let (number, handle) = match self.fs().open(caller, ino.0, flags.0) {
            Ok(opened) => opened,
            Err(errno) => return reply.error(self.core.failed(begun, errno)),
        };
        let backing = self.core.through.opened(&handle, |handle| {
            // The kernel reopens the file as whoever registers it.
            let _as_caller = caller.act();
            reply.open_backing(&handle.file)
        });
        match backing {
            Some(backing) => {
                self.core.stats.passthrough_open();
                reply.opened_passthrough(FileHandle(number), FopenFlags::empty(), &backing);
            }
            None => reply.opened(FileHandle(number), FopenFlags::FOPEN_DIRECT_IO),
        }
        self.core.stats.answered(begun);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let begun = self.begin(Op::Create);
        let caller = who(req);
        let created = self.fs().create(caller, parent.0, name.as_bytes(), mode, flags);
        let (found, number, handle) = match created {
            Ok(created) => created,
            Err(errno) => return reply.error(self.core.failed(begun, errno)),
        };
        let backing = self.core.through.opened(&handle, |handle| {
            let _as_caller = caller.act();
            reply.open_backing(&handle.file)
        });
        let (attr, number) = (attr(found.id, &found.stat), FileHandle(number));
        match backing {
            Some(backing) => {
                self.core.stats.passthrough_open();
                let flags = FopenFlags::empty();
                reply.created_passthrough(
                    &self.ttl(),
                    &attr,
                    Generation(0),
                    number,
                    flags,
                    &backing,
                );
            }
            None => {
                let flags = FopenFlags::FOPEN_DIRECT_IO;
                reply.created(&self.ttl(), &attr, Generation(0), number, flags);
            }
        }
        self.core.stats.answered(begun);
        self.make_room();
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let begun = self.begin(Op::Read);
        match self.fs().read(fh.0, offset, size.min(MAX_WRITE)) {
            Ok(bytes) => {
                reply.data(&bytes);
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let begun = self.begin(Op::Write);
        match self.fs().write(fh.0, offset, data) {
            Ok(written) => {
                reply.written(written);
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let begun = self.begin(Op::Flush);
        self.core.empty(begun, self.fs().flush(fh.0, owner.0), reply);
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let begun = self.begin(Op::Release);
        self.core.through.released(ino.0);
        self.fs().release(fh.0);
        self.core.empty(begun, Ok(()), reply);
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let begun = self.begin(Op::Fsync);
        self.core.empty(begun, self.fs().fsync(fh.0, data_only), reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let begun = self.begin(Op::Fallocate);
        self.core.empty(begun, self.fs().fallocate(fh.0, offset, length, mode), reply);
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let begun = self.begin(Op::Opendir);
        match self.fs().opendir(who(req), ino.0) {
            Ok(number) => {
                reply.opened(FileHandle(number), FopenFlags::empty());
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let begun = self.begin(Op::Readdir);
        let offset = i64::from_ne_bytes(offset.to_ne_bytes());
        let told = self.fs().readdir(fh.0, offset, |entry| {
            let next = u64::from_ne_bytes(entry.next.to_ne_bytes());
            !reply.add(
                INodeNo(entry.ino),
                next,
                entry_kind(entry.kind),
                OsStr::from_bytes(&entry.name),
            )
        });
        match told {
            Ok(()) => {
                reply.ok();
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        let begun = self.begin(Op::Releasedir);
        self.fs().releasedir(fh.0);
        self.core.empty(begun, Ok(()), reply);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        let begun = self.begin(Op::Fsyncdir);
        self.core.empty(begun, self.fs().fsyncdir(fh.0), reply);
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let begun = self.begin(Op::Statfs);
        match self.fs().statfs(ino.0) {
            Ok(s) => {
                let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
                let (block, fragment) = (small(s.f_bsize), small(s.f_frsize));
                let name = small(s.f_namemax);
                reply.statfs(
                    s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, block, name, fragment,
                );
                self.core.stats.answered(begun);
            }
            Err(errno) => reply.error(self.core.failed(begun, errno)),
        }
    }

    fn getlk(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        _pid: u32,
        reply: ReplyLock,
    ) {
        let begun = self.begin(Op::Getlk);
        match self.fs().test_lock(fh.0, owner.0, Range { start, end, kind: typ }) {
            // Whose it is cannot be told: it may be another host's.
            Ok(Some(r)) => reply.locked(r.start, r.end, r.kind, 0),
            Ok(None) => reply.locked(start, end, libc::F_UNLCK, 0),
            Err(errno) => return reply.error(self.core.failed(begun, errno)),
        }
        self.core.stats.answered(begun);
    }

    fn setlk(
        &self,
        req: &Request,
        _: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        _pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let begun = self.begin(Op::Setlk);
        let (caller, thread) = (who(req), req.pid());
        let wanted = Range { start, end, kind: typ };
        match self.fs().lock(caller, fh.0, owner.0, wanted) {
            Ok(false) if sleep => {}
            Ok(false) => return self.core.empty(begun, Err(Number::EAGAIN), reply),
            Ok(true) => return self.core.empty(begun, Ok(()), reply),
            Err(errno) => return self.core.empty(begun, Err(errno), reply),
        }
        let (core, until) = (self.core.clone(), Instant::now() + self.lock_wait);
        self.rt.spawn_blocking(move || {
            let done = {
                let _waits = core.stats.wait(Op::Setlk);
                wait_for_lock(&core.fs, caller, (fh.0, owner.0), wanted, thread, until)
            };
            core.empty(begun, done, reply);
        });
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // The kernel decides by mode and owner (default_permissions), the server in the end.
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: PollNotifier,
        _: PollEvents,
        _: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        // The kernel then takes the file to be without holes.
        reply.error(Errno::ENOSYS);
    }
}

/// Waits until a lock is free, the caller has something else to do, or the time is over.
fn wait_for_lock(
    fs: &Straight,
    caller: Who,
    (handle, owner): (u64, u64),
    wanted: Range,
    thread: u32,
    until: Instant,
) -> Result<(), Number> {
    let mut pause = POLL;
    loop {
        // The kernel starts the call anew after a signal whose handler wants that.
        if is_interrupted(thread) {
            return Err(Number::EINTR);
        }
        if Instant::now() >= until {
            return Err(Number::EAGAIN);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_POLL);
        if fs.lock(caller, handle, owner, wanted)? {
            return Ok(());
        }
    }
}
