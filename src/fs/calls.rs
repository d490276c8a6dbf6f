//! The calls of [`MailFs`] on names and attributes; those on open files are in `files`.

use super::above::ROOT;
use super::api::{
    Attr, Caller, DirEntry, Fh, Found, FsError, Ino, Invalidate, Lookup, MailFs, Need, OpenMode,
    Opened, RenameMode, SetAttr, StatFs, Step,
};
use super::attr;
use super::handles::{Handles, OpenDirs};
use super::readdir::emit_entries;
use super::shown::{Ours, Shown};
use crate::format::Place;
use crate::vmail::error::{Error, Plain};
use crate::vmail::need::{Need as HeartNeed, Op, Stop};
use crate::vmail::node::Kind;
use crate::vmail::session::{InoTarget, Session, UserCell};
use crate::vmail::tree::Target;
use crate::vmail::user::User;
use crate::vmail::wait;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

/// The file system over a session.
#[derive(Debug)]
pub struct VmailFs {
    pub(super) session: Arc<Session>,
    pub(super) handles: Handles,
    dirs: OpenDirs,
    pub(super) above: Mutex<HashMap<Vec<Vec<u8>>, Ino>>,
    /// Of the directory above the users that somebody is listing: its names.
    pub(super) listed_above: Mutex<Option<(Ino, Arc<Vec<String>>)>>,
    pub(super) shown: OnceLock<Shown>,
}

/// The answer of a call that may be part of a delivery.
pub(super) fn step<T>(op: Op<T>) -> Step<T> {
    reading(op.map_err(|stop| match stop {
        Stop::Error(error) => error.for_delivery().into(),
        wait @ Stop::Wait(_) => wait,
    }))
}

/// The answer of one that reads what is in a file.
pub(super) fn reading<T>(op: Op<T>) -> Step<T> {
    match op {
        Ok(value) => Step::Done(Ok(value)),
        Err(Stop::Error(error)) => Step::Done(Err(error.answer())),
        Err(Stop::Wait(need)) => Step::Wait(Need::new(need)),
    }
}

pub(super) fn plain<T>(error: Plain) -> Step<T> {
    Step::Done(Err(Error::from(error).answer()))
}

impl VmailFs {
    pub fn new(session: Arc<Session>) -> VmailFs {
        session.inos.write().insert(ROOT, InoTarget::Above(Arc::new(Vec::new())));
        VmailFs {
            session,
            handles: Handles::default(),
            dirs: OpenDirs::default(),
            above: Mutex::default(),
            listed_above: Mutex::default(),
            shown: OnceLock::new(),
        }
    }

    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The kernel is gone: every handle is released.
    pub fn release_all(&self) {
        self.dirs.clear();
        for handle in self.handles.drain() {
            handle.cell.if_open(|user| user.release(handle.ix, handle.write));
        }
    }

    pub(super) fn target(&self, ino: Ino) -> Result<InoTarget, Error> {
        // A number that is not known was forgotten, or its node went with its user.
        self.session.target(ino).ok_or(Error::Lost { user: format!("inode {ino}") })
    }

    /// A directory of a user, or the path of one above.
    fn dir(&self, ino: Ino) -> Result<InoTarget, Error> {
        match self.target(ino)? {
            InoTarget::Node(..) => Err(Plain::NotDir.into()),
            dir => Ok(dir),
        }
    }

    /// Calls `f` on a user's directory, loaded; `above` on one above the users.
    fn in_dir<T>(
        &self,
        ino: Ino,
        above: impl FnOnce(&[Vec<u8>]) -> Step<T>,
        f: impl FnOnce(&mut User, Place, &Arc<UserCell>) -> Op<T>,
    ) -> Step<T> {
        match self.dir(ino) {
            Err(error) => Step::Done(Err(error.answer())),
            Ok(InoTarget::Above(path)) => above(&path),
            Ok(InoTarget::Dir(cell, at)) => step(cell.with(|user| {
                loaded(user, at)?;
                f(user, at, &cell)
            })),
            Ok(InoTarget::Node(..)) => plain(Plain::NotDir),
        }
    }
}

/// A directory whose folder is in memory; otherwise it must be loaded first.
pub(super) fn loaded(user: &User, at: Place) -> Op<()> {
    match user.tree.folders.get(&at.folder) {
        None => Err(Plain::NotFound.into()),
        Some(folder) if !folder.loaded => Err(Stop::Wait(HeartNeed::load(user, at.folder))),
        Some(folder) if folder.dir(at.sub).is_none() => Err(Plain::NotFound.into()),
        Some(_) => Ok(()),
    }
}

/// A name's target with, for a folder, its listing loaded: whoever looks a folder up needs the
/// store now, and none of the calls that follow.
fn target_loaded(user: &User, at: Place, name: &[u8]) -> Op<Option<Target>> {
    let target = user.target(at, name)?;
    if let Some(Target::Folder(id)) = target {
        loaded(user, Place::own(id))?;
    }
    Ok(target)
}

#[async_trait]
impl MailFs for VmailFs {
    async fn wait(&self, need: Need) -> Result<(), FsError> {
        let need = match Ours::of(need) {
            Ours::Text(name) => {
                self.make_shown(name).await;
                return Ok(());
            }
            Ours::Other(need) => need,
        };
        let Some(need) = need.downcast::<HeartNeed>() else {
            return Err(Error::Internal("a need of another file system".into()).answer());
        };
        wait::satisfy(&self.session, need).await.map_err(|e| e.answer())
    }

    fn lookup(&self, _caller: Caller, parent: Ino, name: &[u8]) -> Step<Lookup> {
        self.in_dir(
            parent,
            |path| self.lookup_above(path, name),
            |user, at, cell| match target_loaded(user, at, name)? {
                None => Ok(Lookup::Absent { cacheable: true }),
                Some(target) => Ok(Lookup::Found(self.found(user, cell, at, target)?)),
            },
        )
    }

    fn forget(&self, ino: Ino, lookups: u64) {
        self.forget_lookups(ino, lookups);
    }

    fn getattr(&self, ino: Ino, _fh: Option<Fh>) -> Step<Attr> {
        match self.target(ino) {
            Err(error) => Step::Done(Err(error.answer())),
            Ok(InoTarget::Above(path)) => {
                let shown = self.shown_attr(&path, ino);
                Step::Done(Ok(shown.unwrap_or_else(|| attr::above(&self.session, ino))))
            }
            Ok(InoTarget::Dir(cell, at)) => self.dir_attr(&cell, at),
            Ok(InoTarget::Node(cell, ix)) => {
                step(cell.with(|user| Ok(attr::of_node(user, user.node_known(ix, ino)?))))
            }
        }
    }

    fn setattr(&self, caller: Caller, ino: Ino, _fh: Option<Fh>, set: SetAttr) -> Step<Attr> {
        match self.target(ino) {
            Err(error) => Step::Done(Err(error.answer())),
            Ok(InoTarget::Above(path)) => Step::Done(Err(self.refuse_in(&path, b"."))),
            Ok(InoTarget::Dir(cell, at)) => self.set_dir_attr(&cell, at, set),
            Ok(InoTarget::Node(cell, ix)) => self.set_node_attr(caller, &cell, (ix, ino), set),
        }
    }

    fn readlink(&self, ino: Ino) -> Step<Vec<u8>> {
        match self.target(ino) {
            Err(error) => Step::Done(Err(error.answer())),
            Ok(InoTarget::Node(cell, ix)) => {
                step(cell.with(|user| match &user.node_known(ix, ino)?.kind {
                    Kind::Symlink(target) => Ok(target.to_vec()),
                    _ => Err(Plain::Invalid.into()),
                }))
            }
            Ok(_) => plain(Plain::Invalid),
        }
    }

    fn mkdir(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Step<Found> {
        self.in_dir(
            parent,
            |path| self.mkdir_above(caller, path, name, mode),
            |user, at, cell| {
                let target = user.mkdir(caller, at, name, mode)?;
                self.found(user, cell, at, target)
            },
        )
    }

    fn mknod(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Step<Found> {
        self.in_dir(
            parent,
            |path| Step::Done(Err(self.refuse_in(path, name))),
            |user, at, cell| {
                let ix = user.create(caller, at, name, mode)?;
                self.found(user, cell, at, Target::Node(ix))
            },
        )
    }

    fn symlink(&self, caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Step<Found> {
        self.in_dir(
            parent,
            |path| Step::Done(Err(self.refuse_in(path, name))),
            |user, at, cell| {
                let ix = user.symlink(caller, at, name, target)?;
                self.found(user, cell, at, Target::Node(ix))
            },
        )
    }

    fn unlink(&self, caller: Caller, parent: Ino, name: &[u8]) -> Step<()> {
        self.in_dir(
            parent,
            |path| Step::Done(Err(self.refuse_in(path, name))),
            |user, at, _| {
                self.may_delete(caller, user, at, name)?;
                user.unlink(at, name)
            },
        )
    }

    fn rmdir(&self, caller: Caller, parent: Ino, name: &[u8]) -> Step<()> {
        self.in_dir(
            parent,
            |path| Step::Done(Err(self.refuse_in(path, name))),
            |user, at, _| {
                self.may_delete(caller, user, at, name)?;
                user.rmdir(at, name)
            },
        )
    }

    fn rename(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Step<()> {
        let (from, to) = match (self.dir(parent), self.dir(new_parent)) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(error), _) | (_, Err(error)) => return Step::Done(Err(error.answer())),
        };
        match (from, to) {
            (InoTarget::Dir(cell, from), InoTarget::Dir(other, to)) => {
                if !Arc::ptr_eq(&cell, &other) {
                    return plain(Plain::CrossDevice);
                }
                step(cell.with(|user| {
                    loaded(user, from)?;
                    loaded(user, to)?;
                    match mode {
                        RenameMode::Exchange => user.exchange(from, name, to, new_name),
                        RenameMode::NoReplace => user.rename(from, name, to, new_name, true),
                        RenameMode::Replace => {
                            self.may_delete(caller, user, to, new_name)?;
                            user.rename(from, name, to, new_name, false)
                        }
                    }
                }))
            }
            (InoTarget::Above(path), _) => Step::Done(Err(self.refuse_in(&path, name))),
            (_, InoTarget::Above(path)) => Step::Done(Err(self.refuse_in(&path, new_name))),
            _ => plain(Plain::NotDir),
        }
    }

    fn link(&self, _caller: Caller, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Step<Found> {
        let node = match self.target(ino) {
            Ok(InoTarget::Node(cell, ix)) => (cell, ix),
            Ok(_) => {
                return Step::Done(Err(
                    Error::Refused("a directory cannot be linked".into()).answer()
                ));
            }
            Err(error) => return Step::Done(Err(error.answer())),
        };
        self.in_dir(
            new_parent,
            |path| Step::Done(Err(self.refuse_in(path, new_name))),
            |user, at, cell| {
                if !Arc::ptr_eq(cell, &node.0) {
                    // Each user stays whole by itself: the server copies.
                    return Err(Plain::CrossDevice.into());
                }
                user.node_known(node.1, ino)?;
                user.link(node.1, at, new_name)?;
                self.found(user, cell, at, Target::Node(node.1))
            },
        )
    }

    fn open(&self, caller: Caller, ino: Ino, how: OpenMode) -> Step<Opened> {
        self.open_file(caller, ino, how)
    }

    fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        how: OpenMode,
    ) -> Step<(Found, Opened)> {
        self.in_dir(
            parent,
            |path| Step::Done(Err(self.refuse_in(path, name))),
            |user, at, cell| {
                let ix = match user.target(at, name)? {
                    Some(Target::Node(_)) if how.exclusive => return Err(Plain::Exists.into()),
                    Some(Target::Node(ix)) => ix,
                    Some(_) => return Err(Plain::IsDir.into()),
                    None => user.create(caller, at, name, mode)?,
                };
                let opened = self.open_in(caller, user, cell, ix, how)?;
                let found = self.found(user, cell, at, Target::Node(ix))?;
                Ok((found, opened))
            },
        )
    }

    fn read(&self, _ino: Ino, fh: Fh, offset: u64, size: u32) -> Step<Vec<u8>> {
        self.read_file(fh, offset, size)
    }

    fn write(&self, _caller: Caller, _ino: Ino, fh: Fh, offset: u64, data: &[u8]) -> Step<u32> {
        self.write_file(fh, offset, data)
    }

    fn flush(&self, _ino: Ino, fh: Fh) -> Step<()> {
        self.close_file(fh)
    }

    fn fsync(&self, _ino: Ino, fh: Fh, _data_only: bool) -> Step<()> {
        self.sync_file(fh)
    }

    fn fallocate(&self, _ino: Ino, fh: Fh, offset: u64, length: u64, mode: i32) -> Step<()> {
        self.allocate(fh, offset, length, mode)
    }

    fn release(&self, _ino: Ino, fh: Fh) {
        self.release_file(fh);
    }

    fn opendir(&self, _caller: Caller, ino: Ino) -> Step<Fh> {
        let end = |user: &User, at| user.tree.dir(at).map_or(0, |dir| dir.entries.end());
        self.in_dir(
            ino,
            |_| Step::Done(Ok(self.dirs.add(u64::MAX))),
            |user, at, _| Ok(self.dirs.add(end(user, at))),
        )
    }

    fn readdir(
        &self,
        ino: Ino,
        fh: Fh,
        cookie: u64,
        emit: &mut dyn FnMut(&DirEntry) -> bool,
    ) -> Step<()> {
        match self.dir(ino) {
            Err(error) => Step::Done(Err(error.answer())),
            Ok(InoTarget::Above(path)) => self.readdir_above(ino, &path, cookie, emit),
            Ok(InoTarget::Dir(cell, at)) => step(cell.with(|user| {
                loaded(user, at)?;
                let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
                let end = self.dirs.end(fh, cookie, dir.entries.end());
                emit_entries(user, at, cookie..=end, emit)
            })),
            Ok(InoTarget::Node(..)) => plain(Plain::NotDir),
        }
    }

    fn fsyncdir(&self, ino: Ino, _fh: Fh) -> Step<()> {
        self.in_dir(ino, |_| Step::Done(Ok(())), |user, _, _| user.sync_journal())
    }

    fn releasedir(&self, _ino: Ino, fh: Fh) {
        self.dirs.remove(fh);
    }

    fn statfs(&self) -> StatFs {
        let space = self.session.disk().space(&self.session.settings.metacache_dir);
        let space = space.unwrap_or_else(|error| {
            tracing::warn!(%error, "free space of the metacache's disk is not known");
            crate::cache::disk::Space::default()
        });
        let unit = 4096;
        StatFs {
            blocks: space.total / unit,
            blocks_free: space.free / unit,
            blocks_available: space.free / unit,
            files: space.files,
            files_free: space.files_free,
            block_size: 4096,
            name_max: 255,
        }
    }

    fn set_invalidator(&self, send: Box<dyn Fn(Invalidate) + Send + Sync>) {
        self.session.set_invalidator(send);
    }
}
