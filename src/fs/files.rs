//! The calls of [`super::api::MailFs`] on open files.

use super::api::{Caller, Fh, Ino, OpenMode, Opened, Step};
use super::calls::{VmailFs, plain, reading, step};
use super::handles::Handle;
use crate::vmail::error::{Error, Plain};
use crate::vmail::io::HELD_OPEN;
use crate::vmail::need::Op;
use crate::vmail::node::{Kind, NodeIx};
use crate::vmail::session::{InoTarget, UserCell};
use crate::vmail::user::User;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

impl VmailFs {
    pub(super) fn open_in(
        &self,
        caller: Caller,
        user: &mut User,
        cell: &Arc<UserCell>,
        ix: NodeIx,
        how: OpenMode,
    ) -> Op<Opened> {
        let copy = user.open(ix, how)?;
        user.used_by(caller.pid);
        let ino = user.node(ix)?.ino;
        // That costs two system calls at open and close, and a GETATTR at the next `fstat` after each
        // read (the kernel then counts the access time as unknown, mount option or not); a smaller mail is
        // one READ, and none while the kernel has its pages.
        let direct = user.node(ix)?.size >= HELD_OPEN;
        let backing = copy.as_ref().filter(|_| direct).and_then(|copy| copy.file.real());
        let written = AtomicU64::new(0);
        let handle = Handle { cell: cell.clone(), ix, ino, write: how.write, copy, written };
        // What stands in for a lost mail must not stay in the kernel.
        let kind = &user.node(ix)?.kind;
        let blank = matches!(kind, Kind::Mail(mail) if mail.blank.is_some());
        let quiet_close = matches!(kind, Kind::Local(_));
        let keep_cache = self.session.blanks.keeps_pages(ino, blank);
        let fh = self.handles.add(handle);
        Ok(Opened { fh, keep_cache, uncached: blank, backing, quiet_close })
    }

    pub(super) fn open_file(&self, caller: Caller, ino: Ino, how: OpenMode) -> Step<Opened> {
        match self.target(ino) {
            Err(error) => Step::Done(Err(error.answer())),
            Ok(InoTarget::Node(cell, ix)) => step(cell.with(|user| {
                user.node_known(ix, ino)?;
                if how.truncate && caller.uid == 0 && !user.session.settings.allow_root_delete {
                    let node = user.node(ix)?;
                    if node.size > 0 && !node.class.is_local_only() {
                        return Err(Error::Refused(format!(
                            "user {}: root may not empty a file of a user (allow_root_delete)",
                            user.name
                        ))
                        .into());
                    }
                }
                self.open_in(caller, user, &cell, ix, how)
            })),
            Ok(InoTarget::Above(path)) => self.open_shown(&path, how),
            Ok(InoTarget::Dir(..)) => plain(Plain::IsDir),
        }
    }

    fn with_handle<T>(&self, fh: Fh, f: impl FnOnce(&mut User, &Handle) -> Op<T>) -> Op<T> {
        let handle = self.handles.get(fh).ok_or(Plain::BadHandle)?;
        handle.cell.with(|user| {
            if user.node(handle.ix)?.ino != handle.ino {
                return Err(Error::Lost { user: user.name.to_string() }.into());
            }
            f(user, &handle)
        })
    }

    pub(super) fn read_file(&self, fh: Fh, offset: u64, size: u32) -> Step<Vec<u8>> {
        if self.handles.get(fh).is_none() {
            return self.read_shown(fh, offset, size);
        }
        reading(self.with_handle(fh, |user, handle| {
            user.read(handle.ix, handle.copy.as_ref(), offset, size)
        }))
    }

    pub(super) fn write_file(&self, fh: Fh, offset: u64, data: &[u8]) -> Step<u32> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        step(self.with_handle(fh, |user, handle| {
            if !handle.write {
                return Err(Plain::BadHandle.into());
            }
            user.write(handle.ix, offset, data)?;
            handle.written.store(user.writes_to_growing(handle.ix), Ordering::Relaxed);
            Ok(len)
        }))
    }

    pub(super) fn close_file(&self, fh: Fh) -> Step<()> {
        if self.has_shown(fh) {
            return Step::Done(Ok(()));
        }
        step(self.with_handle(fh, |user, handle| {
            let written = handle.written.load(Ordering::Relaxed);
            user.close(handle.ix, handle.write, written)
        }))
    }

    pub(super) fn sync_file(&self, fh: Fh) -> Step<()> {
        step(self.with_handle(fh, |user, handle| user.fsync(handle.ix)))
    }

    /// Space is not set aside, but a file can be made longer.
    pub(super) fn allocate(&self, fh: Fh, offset: u64, length: u64, mode: i32) -> Step<()> {
        if mode != 0 && mode != libc::FALLOC_FL_KEEP_SIZE {
            return plain(Plain::NotSupported);
        }
        step(self.with_handle(fh, |user, handle| {
            let end = offset.checked_add(length).ok_or(Plain::Invalid)?;
            if mode == 0 && end > user.node(handle.ix)?.size {
                user.truncate(handle.ix, end)?;
            }
            Ok(())
        }))
    }

    pub(super) fn release_file(&self, fh: Fh) {
        if let Some(handle) = self.handles.remove(fh) {
            handle.cell.if_open(|user| {
                // In a user that was opened again the slot may be another file's.
                if user.node(handle.ix).is_ok_and(|node| node.ino == handle.ino) {
                    user.release(handle.ix, handle.write);
                }
            });
        } else {
            self.release_shown(fh);
        }
    }
}
