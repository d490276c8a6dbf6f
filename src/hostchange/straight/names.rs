//! Operations on names.

use super::table::{Node, Place};
use super::{Answer, Found, Straight, reopened};
use crate::hostchange::creds::Who;
use crate::hostchange::is_list_index;
use crate::hostchange::place::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::Arc;

/// The directory that a name is really in.
pub(super) enum Holder {
    Nfs(Arc<OwnedFd>),
    Local(Arc<Dir>),
}

impl Holder {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Holder::Nfs(fd) => fd.as_fd(),
            Holder::Local(dir) => dir.fd(),
        }
    }

    pub(super) fn is_local(&self) -> bool {
        matches!(self, Holder::Local(_))
    }
}

impl Straight {
    /// Where a name of a directory is; the directory's user has been noticed.
    pub(super) fn holder(&self, parent: u64, name: &[u8]) -> Answer<(Holder, Place)> {
        let node = self.node(parent)?;
        let place = node.place();
        let local = is_list_index(name) && self.is_index(&place);
        let holder = match &place.user {
            Some(user) if local => Holder::Local(self.users().dir(user)?),
            _ => Holder::Nfs(node.fd()),
        };
        Ok((holder, place))
    }

    /// Tells the kernel of what a descriptor is of.
    pub(super) fn tell(
        &self,
        fd: OwnedFd,
        holder: &Holder,
        parent: (u64, &Place),
        name: &[u8],
    ) -> Answer<Found> {
        let stat = fstat(&fd)?;
        let place = match holder.is_local() {
            true => Place { user: parent.1.user.clone(), ..Place::default() },
            false => self.below(parent.1, name),
        };
        let named = (parent.0, name.to_vec());
        let (id, old) = self.table.lock().found(fd, &stat, place, holder.is_local(), named);
        drop(old);
        Ok(Found { id, stat })
    }

    fn look(&self, holder: &Holder, parent: (u64, &Place), name: &[u8], who: Who) -> Answer<Found> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = {
            let _as_caller = who.act();
            openat(holder.fd(), OsStr::from_bytes(name), flags, Mode::empty())?
        };
        self.tell(fd, holder, parent, name)
    }

    pub fn lookup(&self, who: Who, parent: u64, name: &[u8]) -> Answer<Found> {
        let (holder, place) = match self.holder(parent, name) {
            // No place for a list index: there is none.
            Err(Errno::ENOSPC) => return Err(Errno::ENOENT),
            held => held?,
        };
        self.look(&holder, (parent, &place), name, who)
    }

    pub fn mkdir(&self, who: Who, parent: u64, name: &[u8], mode: u32) -> Answer<Found> {
        let (holder, place) = self.holder(parent, name)?;
        {
            let _as_caller = who.act();
            mkdirat(holder.fd(), OsStr::from_bytes(name), Mode::from_bits_truncate(mode & 0o7777))?;
        }
        self.look(&holder, (parent, &place), name, who)
    }

    /// Regular files only.
    pub fn mknod(&self, who: Who, parent: u64, name: &[u8], mode: u32) -> Answer<Found> {
        let (holder, place) = self.holder(parent, name)?;
        {
            let _as_caller = who.act();
            let mode = Mode::from_bits_truncate(mode & 0o7777);
            mknodat(holder.fd(), OsStr::from_bytes(name), SFlag::S_IFREG, mode, 0)?;
        }
        self.look(&holder, (parent, &place), name, who)
    }

    pub fn symlink(&self, who: Who, parent: u64, name: &[u8], target: &OsStr) -> Answer<Found> {
        let (holder, place) = self.holder(parent, name)?;
        {
            let _as_caller = who.act();
            symlinkat(target, holder.fd(), OsStr::from_bytes(name))?;
        }
        self.look(&holder, (parent, &place), name, who)
    }

    pub fn readlink(&self, id: u64) -> Answer<Vec<u8>> {
        let node = self.node(id)?;
        Ok(nix::fcntl::readlinkat(&*node.fd(), "")?.into_vec())
    }

    pub fn unlink(&self, who: Who, parent: u64, name: &[u8]) -> Answer<()> {
        self.remove(who, parent, name, UnlinkatFlags::NoRemoveDir)
    }

    pub fn rmdir(&self, who: Who, parent: u64, name: &[u8]) -> Answer<()> {
        self.remove(who, parent, name, UnlinkatFlags::RemoveDir)
    }

    fn remove(&self, who: Who, parent: u64, name: &[u8], how: UnlinkatFlags) -> Answer<()> {
        let (holder, _) = self.holder(parent, name)?;
        let _as_caller = who.act();
        unlinkat(holder.fd(), OsStr::from_bytes(name), how)
    }

    pub fn rename(&self, who: Who, from: (u64, &[u8]), to: (u64, &[u8]), flags: u32) -> Answer<()> {
        let (old, _) = self.holder(from.0, from.1)?;
        let (new, _) = self.holder(to.0, to.1)?;
        if old.is_local() != new.is_local() {
            return Err(Errno::EXDEV);
        }
        let (from, to) = (OsStr::from_bytes(from.1), OsStr::from_bytes(to.1));
        let _as_caller = who.act();
        if flags == 0 {
            // renameat2 is not known to every NFS client.
            return nix::fcntl::renameat(old.fd(), from, new.fd(), to);
        }
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?;
        nix::fcntl::renameat2(old.fd(), from, new.fd(), to, flags)
    }

    pub fn link(&self, who: Who, id: u64, parent: u64, name: &[u8]) -> Answer<Found> {
        let node: Arc<Node> = self.node(id)?;
        let (holder, place) = self.holder(parent, name)?;
        if node.local != holder.is_local() {
            return Err(Errno::EXDEV);
        }
        {
            let _as_caller = who.act();
            let from = reopened(&*node.fd());
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            linkat(AT_FDCWD, from.as_str(), holder.fd(), OsStr::from_bytes(name), follow)?;
        }
        self.look(&holder, (parent, &place), name, who)
    }
}
