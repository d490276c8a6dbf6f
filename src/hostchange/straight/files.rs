//! Operations on files and their attributes.

use super::{Answer, Found, Straight, open_again, reopened};
use crate::hostchange::creds::Who;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::unistd::{Gid, Uid, fchownat};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// An open file.
#[derive(Debug)]
pub struct Handle {
    pub node: u64,
    pub file: File,
}

/// What `setattr` may change.
#[derive(Debug, Clone, Copy, Default)]
pub struct Changes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    /// As `utimensat` takes them.
    pub atime: Option<libc::timespec>,
    pub mtime: Option<libc::timespec>,
}

/// What of an application's flags is meant for the file on NFS.
fn passed_on(flags: i32) -> OFlag {
    let ours = OFlag::O_CREAT
        | OFlag::O_EXCL
        | OFlag::O_NOCTTY
        | OFlag::O_NOFOLLOW
        | OFlag::O_DIRECT
        | OFlag::O_ASYNC
        | OFlag::O_NOATIME
        | OFlag::O_PATH
        | OFlag::O_TMPFILE;
    OFlag::from_bits_truncate(flags) - ours
}

impl Straight {
    pub fn open(&self, who: Who, id: u64, flags: i32) -> Answer<(u64, Arc<Handle>)> {
        let node = self.node(id)?;
        let fd = node.fd();
        // It was replaced by another host, or by a login: the kernel looks the name up again.
        if fstat(&*fd)?.st_nlink == 0 {
            return Err(Errno::ESTALE);
        }
        let file = open_again(&*fd, passed_on(flags), who)?;
        Ok(self.opened(id, file))
    }

    pub fn create(
        &self,
        who: Who,
        parent: u64,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> Answer<(Found, u64, Arc<Handle>)> {
        let (holder, place) = self.holder(parent, name)?;
        let exclusive = OFlag::from_bits_truncate(flags) & OFlag::O_EXCL;
        let flags = passed_on(flags) | OFlag::O_CREAT | exclusive;
        let file = {
            let _as_caller = who.act();
            let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let mode = Mode::from_bits_truncate(mode & 0o7777);
            File::from(openat(holder.fd(), OsStr::from_bytes(name), flags, mode)?)
        };
        // The file itself, whatever the name means by now.
        let path: OwnedFd = open_again(&file, OFlag::O_PATH, Who::me())?.into();
        let found = self.tell(path, &holder, (parent, &place), name)?;
        let (number, handle) = self.opened(found.id, file);
        Ok((found, number, handle))
    }

    fn opened(&self, node: u64, file: File) -> (u64, Arc<Handle>) {
        let handle = Arc::new(Handle { node, file });
        let number = self.new_handle();
        self.open.lock().insert(number, handle.clone());
        (number, handle)
    }

    pub fn handle(&self, number: u64) -> Answer<Arc<Handle>> {
        self.open.lock().get(&number).cloned().ok_or(Errno::EBADF)
    }

    pub fn read(&self, number: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let handle = self.handle(number)?;
        let mut bytes = vec![0; size as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match handle.file.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) if filled > 0 => break,
                Err(e) => return Err(errno(&e)),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    pub fn write(&self, number: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        let handle = self.handle(number)?;
        let mut written = 0;
        while written < data.len() {
            // With O_APPEND the kernel below knows the end better than the one above.
            match handle.file.write_at(&data[written..], offset + written as u64) {
                Ok(0) => break,
                Ok(n) => written += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) if written > 0 => break,
                Err(e) => return Err(errno(&e)),
            }
        }
        u32::try_from(written).map_err(|_| Errno::EIO)
    }

    /// A descriptor is closed: as on NFS, what was written reaches the server, or the error is told
    /// now. And the process has no lock on the file any more, whichever descriptor it came by.
    pub fn flush(&self, number: u64, owner: u64) -> Answer<()> {
        let handle = self.handle(number)?;
        self.locks.release(owner, handle.node);
        // Closing a duplicate is what makes an NFS client write back.
        let copy = handle.file.try_clone().map_err(|e| errno(&e))?;
        // SAFETY: the descriptor is ours and is not used afterwards.
        Errno::result(unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(copy)) }).map(drop)
    }

    pub fn release(&self, number: u64) {
        let gone = {
            let mut open = self.open.lock();
            let Some(handle) = open.remove(&number) else { return };
            let last = !open.values().any(|other| other.node == handle.node);
            (handle, last)
        };
        if gone.1 {
            self.locks.release_all(gone.0.node);
        }
    }

    pub fn fsync(&self, number: u64, data_only: bool) -> Answer<()> {
        let handle = self.handle(number)?;
        let done = if data_only { handle.file.sync_data() } else { handle.file.sync_all() };
        done.map_err(|e| errno(&e))
    }

    pub fn fallocate(&self, number: u64, offset: u64, length: u64, mode: i32) -> Answer<()> {
        let handle = self.handle(number)?;
        let number = |n: u64| i64::try_from(n).map_err(|_| Errno::EFBIG);
        let mode = nix::fcntl::FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        nix::fcntl::fallocate(&handle.file, mode, number(offset)?, number(length)?)
    }

    pub fn setattr(
        &self,
        who: Who,
        id: u64,
        handle: Option<u64>,
        set: Changes,
    ) -> Answer<FileStat> {
        let node = self.node(id)?;
        let fd = node.fd();
        if let Some(size) = set.size {
            match handle.map(|number| self.handle(number)).transpose()? {
                Some(handle) => handle.file.set_len(size),
                None => open_again(&*fd, OFlag::O_WRONLY, who)?.set_len(size),
            }
            .map_err(|e| errno(&e))?;
        }
        {
            let _as_caller = who.act();
            if set.uid.is_some() || set.gid.is_some() {
                let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
                fchownat(&*fd, "", uid, gid, AtFlags::AT_EMPTY_PATH)?;
            }
            if let Some(mode) = set.mode {
                let mode = Mode::from_bits_truncate(mode & 0o7777);
                let follow = nix::sys::stat::FchmodatFlags::FollowSymlink;
                nix::sys::stat::fchmodat(
                    nix::fcntl::AT_FDCWD,
                    reopened(&*fd).as_str(),
                    mode,
                    follow,
                )?;
            }
            if set.atime.is_some() || set.mtime.is_some() {
                let keep = libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
                let times = [set.atime.unwrap_or(keep), set.mtime.unwrap_or(keep)];
                // SAFETY: descriptor, empty name and two times are valid for the call.
                Errno::result(unsafe {
                    libc::utimensat(
                        fd.as_raw_fd(),
                        c"".as_ptr(),
                        times.as_ptr(),
                        libc::AT_EMPTY_PATH,
                    )
                })?;
            }
        }
        fstat(&*fd)
    }

    /// See [`super::locks`]; `false`: somebody else has it.
    pub fn lock(
        &self,
        who: Who,
        number: u64,
        owner: u64,
        wanted: super::locks::Range,
    ) -> Answer<bool> {
        let handle = self.handle(number)?;
        let node = self.node(handle.node)?;
        self.locks.set(owner, handle.node, wanted, || {
            // Both ways if possible, so that one descriptor carries all of an owner's locks.
            match open_again(&*node.fd(), OFlag::O_RDWR, who) {
                Err(Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ETXTBSY) => {
                    let bits = nix::fcntl::fcntl(&handle.file, nix::fcntl::FcntlArg::F_GETFL)?;
                    let mode = OFlag::from_bits_truncate(bits) & OFlag::O_ACCMODE;
                    open_again(&*node.fd(), mode, who)
                }
                opened => opened,
            }
        })
    }

    /// Who is in the way of a lock.
    pub fn test_lock(
        &self,
        number: u64,
        owner: u64,
        wanted: super::locks::Range,
    ) -> Answer<Option<super::locks::Range>> {
        let handle = self.handle(number)?;
        self.locks.test(owner, &handle, wanted)
    }
}

pub(super) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
