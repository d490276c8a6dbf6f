//! The kernel's requests as calls of [`MailFs`].

use super::convert::{self, caller, name, open_mode, rename_mode, set_time};
use super::passthrough::Passthrough;
use super::reply::{Core, CreateReply, Fs, OpenReply, OpendirReply};
use super::stats::{FuseStats, Op};
use crate::fs::api::{MailFs, SetAttr};
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents, PollFlags, PollNotifier,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::runtime::Handle;

/// The largest WRITE, in bytes; each FUSE thread's receive buffer grows up to this.
const MAX_WRITE: u32 = 1 << 20;

/// Serves a [`MailFs`] to the kernel.
#[derive(Debug)]
pub struct Adapter {
    core: Arc<Core>,
    want_passthrough: bool,
    max_background: u16,
}

impl Adapter {
    /// `rt` runs what must wait. `passthrough`: let the kernel read local copies directly if
    /// it can. `max_background`: read-ahead requests in flight, at least 1.
    pub fn new(fs: Arc<dyn MailFs>, rt: Handle, passthrough: bool, max_background: u16) -> Adapter {
        let core = Core {
            fs: Fs(fs),
            rt,
            stats: Arc::new(FuseStats::default()),
            passthrough: Passthrough::default(),
        };
        Adapter { core: Arc::new(core), want_passthrough: passthrough, max_background }
    }

    pub fn stats(&self) -> Arc<FuseStats> {
        self.core.stats.clone()
    }

    fn fs(&self) -> &dyn MailFs {
        &*self.core.fs.0
    }

    /// For what the kernel need not ask again.
    fn unsupported(&self) -> Errno {
        self.core.stats.request(Op::Unsupported);
        Errno::ENOSYS
    }
}

/// The name in bytes, or the reply has been sent.
macro_rules! name_or_reply {
    ($self:ident, $op:expr, $reply:ident, $name:expr) => {
        match name($name) {
            Ok(name) => name,
            Err(error) => {
                $self.core.stats.request($op);
                return $self.core.fail($op, $reply, &error);
            }
        }
    };
}

impl Filesystem for Adapter {
    /// Not asked for, and why:
    /// POSIX_LOCKS, FLOCK_LOCKS: the kernel's own locks are right and cost nothing;
    /// WRITEBACK_CACHE: every write must be seen, and it excludes passthrough;
    /// AUTO_INVAL_DATA: only this daemon writes, a new mtime says nothing about cached pages;
    /// EXPLICIT_INVAL_DATA: without it a size that changed by itself drops the pages, a net;
    /// HANDLE_KILLPRIV: without it the kernel clears setuid bits by itself;
    /// DO_READDIRPLUS: mail servers read names and do not stat them;
    /// NO_OPEN_SUPPORT: every handle must be known; SETXATTR_EXT: breaks fuser 0.18.
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_ATOMIC_O_TRUNC
            | InitFlags::FUSE_CACHE_SYMLINKS;
        let wanted = wanted & config.capabilities();
        // Neither fails: the bits were offered, the numbers are within limits.
        let _ = config.add_capabilities(wanted);
        let _ = config.set_max_write(MAX_WRITE);
        let _ = config.set_max_background(self.max_background.max(1));
        if self.want_passthrough
            && config.capabilities().contains(InitFlags::FUSE_PASSTHROUGH)
            && config.set_max_stack_depth(1).is_ok()
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
        {
            self.core.passthrough.negotiated();
        }
        Ok(())
    }

    fn destroy(&mut self) {}

    fn lookup(&self, req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEntry) {
        let name = name_or_reply!(self, Op::Lookup, reply, entry);
        let (caller, parent) = (caller(req), parent.0);
        let begun = self.core.stats.request(Op::Lookup);
        let first = self.fs().lookup(caller, parent, name);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.lookup(caller, parent, &name)
        });
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        self.core.stats.request(Op::Forget);
        self.fs().forget(ino.0, lookups);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let (ino, fh) = (ino.0, fh.map(|fh| fh.0));
        let begun = self.core.stats.request(Op::Getattr);
        let first = self.fs().getattr(ino, fh);
        self.core.serve(begun, reply, first, || move |fs| fs.getattr(ino, fh));
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
        let (caller, ino, fh) = (caller(req), ino.0, fh.map(|fh| fh.0));
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
        };
        let begun = self.core.stats.request(Op::Setattr);
        let first = self.fs().setattr(caller, ino, fh, set);
        self.core.serve(begun, reply, first, || move |fs| fs.setattr(caller, ino, fh, set));
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let ino = ino.0;
        let begun = self.core.stats.request(Op::Readlink);
        let first = self.fs().readlink(ino);
        self.core.serve(begun, reply, first, || move |fs| fs.readlink(ino));
    }

    /// The kernel has applied the umask to `mode`, here and below.
    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        let name = name_or_reply!(self, Op::Mknod, reply, entry);
        if !matches!(mode & libc::S_IFMT, 0 | libc::S_IFREG) {
            self.core.stats.request(Op::Mknod);
            let error = convert::error(libc::EPERM, "only regular files can be made");
            return self.core.fail(Op::Mknod, reply, &error);
        }
        let (caller, parent, mode) = (caller(req), parent.0, mode & 0o7777);
        let begun = self.core.stats.request(Op::Mknod);
        let first = self.fs().mknod(caller, parent, name, mode);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.mknod(caller, parent, &name, mode)
        });
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let name = name_or_reply!(self, Op::Mkdir, reply, entry);
        let (caller, parent, mode) = (caller(req), parent.0, mode & 0o7777);
        let begun = self.core.stats.request(Op::Mkdir);
        let first = self.fs().mkdir(caller, parent, name, mode);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.mkdir(caller, parent, &name, mode)
        });
    }

    fn unlink(&self, req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        let name = name_or_reply!(self, Op::Unlink, reply, entry);
        let (caller, parent) = (caller(req), parent.0);
        let begun = self.core.stats.request(Op::Unlink);
        let first = self.fs().unlink(caller, parent, name);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.unlink(caller, parent, &name)
        });
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, entry: &OsStr, reply: ReplyEmpty) {
        let name = name_or_reply!(self, Op::Rmdir, reply, entry);
        let (caller, parent) = (caller(req), parent.0);
        let begun = self.core.stats.request(Op::Rmdir);
        let first = self.fs().rmdir(caller, parent, name);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.rmdir(caller, parent, &name)
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let name = name_or_reply!(self, Op::Symlink, reply, entry);
        let (caller, parent) = (caller(req), parent.0);
        let target = target.as_os_str().as_bytes();
        let begun = self.core.stats.request(Op::Symlink);
        let first = self.fs().symlink(caller, parent, name, target);
        self.core.serve(begun, reply, first, || {
            let (name, target) = (name.to_vec(), target.to_vec());
            move |fs| fs.symlink(caller, parent, &name, &target)
        });
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        new_parent: INodeNo,
        new_entry: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let from = name_or_reply!(self, Op::Rename, reply, entry);
        let to = name_or_reply!(self, Op::Rename, reply, new_entry);
        let mode = match rename_mode(flags) {
            Ok(mode) => mode,
            Err(error) => {
                self.core.stats.request(Op::Rename);
                return self.core.fail(Op::Rename, reply, &error);
            }
        };
        let (caller, parent, new_parent) = (caller(req), parent.0, new_parent.0);
        let begun = self.core.stats.request(Op::Rename);
        let first = self.fs().rename(caller, parent, from, new_parent, to, mode);
        self.core.serve(begun, reply, first, || {
            let (from, to) = (from.to_vec(), to.to_vec());
            move |fs| fs.rename(caller, parent, &from, new_parent, &to, mode)
        });
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        new_parent: INodeNo,
        new_entry: &OsStr,
        reply: ReplyEntry,
    ) {
        let name = name_or_reply!(self, Op::Link, reply, new_entry);
        let (caller, ino, new_parent) = (caller(req), ino.0, new_parent.0);
        let begun = self.core.stats.request(Op::Link);
        let first = self.fs().link(caller, ino, new_parent, name);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.link(caller, ino, new_parent, &name)
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let (caller, ino, how) = (caller(req), ino.0, open_mode(flags.0));
        let reply = OpenReply { reply, ino, how };
        let begun = self.core.stats.request(Op::Open);
        let first = self.fs().open(caller, ino, how);
        self.core.serve(begun, reply, first, || move |fs| fs.open(caller, ino, how));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        entry: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let name = name_or_reply!(self, Op::Create, reply, entry);
        let (caller, parent) = (caller(req), parent.0);
        let (mode, how) = (mode & 0o7777, open_mode(flags));
        let reply = CreateReply { reply, how };
        let begun = self.core.stats.request(Op::Create);
        let first = self.fs().create(caller, parent, name, mode, how);
        self.core.serve(begun, reply, first, || {
            let name = name.to_vec();
            move |fs| fs.create(caller, parent, &name, mode, how)
        });
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (ino, fh) = (ino.0, fh.0);
        let begun = self.core.stats.request(Op::Read);
        let first = self.fs().read(ino, fh, offset, size);
        self.core.serve(begun, reply, first, || move |fs| fs.read(ino, fh, offset, size));
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (caller, ino, fh) = (caller(req), ino.0, fh.0);
        let begun = self.core.stats.request(Op::Write);
        let first = self.fs().write(caller, ino, fh, offset, data);
        self.core.serve(begun, reply, first, || {
            let data = data.to_vec();
            move |fs| fs.write(caller, ino, fh, offset, &data)
        });
    }

    fn flush(&self, _: &Request, ino: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let (ino, fh) = (ino.0, fh.0);
        let begun = self.core.stats.request(Op::Flush);
        let first = self.fs().flush(ino, fh);
        self.core.serve(begun, reply, first, || move |fs| fs.flush(ino, fh));
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
        let begun = self.core.stats.request(Op::Release);
        // Before the file system may use the handle's number again.
        self.core.passthrough.released(ino.0, fh.0);
        self.fs().release(ino.0, fh.0);
        reply.ok();
        self.core.stats.answered(begun);
    }

    fn fsync(&self, _: &Request, ino: INodeNo, fh: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let (ino, fh) = (ino.0, fh.0);
        let begun = self.core.stats.request(Op::Fsync);
        let first = self.fs().fsync(ino, fh, data_only);
        self.core.serve(begun, reply, first, || move |fs| fs.fsync(ino, fh, data_only));
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (ino, fh) = (ino.0, fh.0);
        let begun = self.core.stats.request(Op::Fallocate);
        let first = self.fs().fallocate(ino, fh, offset, length, mode);
        self.core
            .serve(begun, reply, first, || move |fs| fs.fallocate(ino, fh, offset, length, mode));
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let (caller, ino) = (caller(req), ino.0);
        let begun = self.core.stats.request(Op::Opendir);
        let first = self.fs().opendir(caller, ino);
        self.core.serve(begun, OpendirReply(reply), first, || move |fs| fs.opendir(caller, ino));
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        cookie: u64,
        reply: ReplyDirectory,
    ) {
        self.core.serve_listing(reply, ino.0, fh.0, cookie);
    }

    fn releasedir(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let begun = self.core.stats.request(Op::Releasedir);
        self.fs().releasedir(ino.0, fh.0);
        reply.ok();
        self.core.stats.answered(begun);
    }

    fn fsyncdir(
        &self,
        _: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        let (ino, fh) = (ino.0, fh.0);
        let begun = self.core.stats.request(Op::Fsyncdir);
        let first = self.fs().fsyncdir(ino, fh);
        self.core.serve(begun, reply, first, || move |fs| fs.fsyncdir(ino, fh));
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let begun = self.core.stats.request(Op::Statfs);
        let s = self.fs().statfs();
        reply.statfs(
            s.blocks,
            s.blocks_free,
            s.blocks_available,
            s.files,
            s.files_free,
            s.block_size,
            s.name_max,
            s.block_size,
        );
        self.core.stats.answered(begun);
    }

    // From here on: what is left to the kernel, which asks once. It falls back to its own way
    // (lseek, copy_file_range, poll, access), or tells the caller EOPNOTSUPP (attributes) or
    // ENOTTY (ioctl).

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
        reply.error(self.unsupported());
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(self.unsupported());
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(self.unsupported());
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.unsupported());
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(self.unsupported());
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(self.unsupported());
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
        reply.error(self.unsupported());
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
        reply.error(self.unsupported());
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(self.unsupported());
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
        reply.error(self.unsupported());
    }
}
