//! The calls of [`MailFs`] on names and attributes; those on open files are in `files`.

use super::above::ROOT;
use super::api::{
    Attr, Caller, DirEntry, Fh, FileKind, Found, FsError, Ino, Invalidate, Lookup, MailFs, Need,
    OpenMode, Opened, RenameMode, SetAttr, SetTime, StatFs, Step,
};
use super::attr;
use super::handles::{Handles, OpenDirs};
use super::shown::{Ours, Shown};
use crate::dovecot::classes::Class;
use crate::format::journal::Change;
use crate::format::listing::{Attrs, Line, Owner};
use crate::format::{Place, Sub};
use crate::vmail::error::{Error, Plain};
use crate::vmail::need::{Need as HeartNeed, Op, Stop};
use crate::vmail::node::{Kind, NodeIx};
use crate::vmail::session::{InoTarget, Session, UserCell};
use crate::vmail::tree::Target;
use crate::vmail::user::User;
use crate::vmail::wait;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::{Arc, OnceLock};

/// The file system over a session.
#[derive(Debug)]
pub struct VmailFs {
    pub(super) session: Arc<Session>,
    pub(super) handles: Handles,
    dirs: OpenDirs,
    pub(super) above: Mutex<HashMap<Vec<Vec<u8>>, Ino>>,
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

    /// What the kernel is told of a name, counted as a lookup.
    fn found(&self, user: &mut User, cell: &Arc<UserCell>, at: Place, target: Target) -> Op<Found> {
        let (attr, register) = match target {
            Target::Node(ix) => {
                let node = user.node_mut(ix)?;
                node.lookups += 1;
                let attr = attr::of_node(user, user.node(ix)?);
                (attr, InoTarget::Node(cell.clone(), ix))
            }
            Target::Folder(_) | Target::Sub(_) => {
                let place = match target {
                    Target::Folder(id) => Place::own(id),
                    Target::Sub(sub) => Place { folder: at.folder, sub },
                    Target::Node(_) => return Err(Plain::NotDir.into()),
                };
                let dir = user.tree.dir_mut(place).ok_or(Plain::NotFound)?;
                dir.lookups += 1;
                let dir = user.tree.dir(place).ok_or(Plain::NotFound)?;
                (attr::of_dir(user, place, dir), InoTarget::Dir(cell.clone(), place))
            }
        };
        self.session.register(attr.ino, || register);
        Ok(Found { attr, cacheable: true })
    }

    /// The policy on deletions by root: a site's old `rm -rf` of a metacache must not delete
    /// its mail.
    fn may_delete(&self, caller: Caller, user: &User, at: Place, name: &[u8]) -> Result<(), Error> {
        if caller.uid != 0 || self.session.settings.allow_root_delete {
            return Ok(());
        }
        let harmless = match user.target(at, name)? {
            Some(Target::Node(ix)) => {
                let class = user.node(ix)?.class;
                class.is_local_only() || class == Class::MailTemp
            }
            // An empty folder is a user's folder, too.
            Some(Target::Folder(_) | Target::Sub(_)) => false,
            None => true,
        };
        if harmless {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "user {}: root may not delete {}: these are the mails themselves, not a cache of them \
             (to drop a cache use `vmailfs metacache flush` and remove files of the caches; to \
             delete mail as root mount with allow_root_delete)",
            user.name,
            String::from_utf8_lossy(name)
        )))
    }

    fn root_dir_attr(&self, cell: &Arc<UserCell>) -> Attr {
        self.root_attr(cell)
    }

    fn dir_attr(&self, cell: &Arc<UserCell>, at: Place) -> Step<Attr> {
        if at == Place::ROOT {
            return Step::Done(Ok(self.root_dir_attr(cell)));
        }
        step(cell.with(|user| {
            let dir = user.tree.dir(at).ok_or(Error::Lost { user: user.name.to_string() })?;
            Ok(attr::of_dir(user, at, dir))
        }))
    }

    fn set_dir_attr(&self, cell: &Arc<UserCell>, at: Place, set: SetAttr) -> Step<Attr> {
        step(cell.with(|user| {
            loaded(user, at)?;
            let now = user.now();
            let owner_now = user.tree.dir(at).ok_or(Plain::NotFound)?.owner.unwrap_or(user.owner);
            let owner = set_owner(owner_now, set);
            let empty_user = user.tree.folders.len() == 1
                && user.tree.dir(Place::ROOT).is_some_and(|d| d.entries.is_empty());
            let mut changes = Vec::new();
            if at == Place::ROOT && empty_user && owner != user.owner {
                // A user that has nothing yet: its files will belong to whom it belongs to.
                let mode = set.mode.unwrap_or(user.root_mode()) & 0o7777;
                changes.push(Change::User { owner, mode });
            }
            let based = changes.is_empty();
            let deviation = if based { user.deviation(owner) } else { None };
            let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
            let attrs = Attrs {
                mode: set.mode.map_or(dir.mode, |m| m & 0o7777),
                owner: deviation,
                mtime: time(set.mtime, now).unwrap_or(dir.mtime),
            };
            if attrs != dir.attrs() || !based {
                let line = Line::Dir { sub: at.sub, attrs };
                changes.push(Change::Line { folder: at.folder, line });
                user.commit(changes)?;
                if !based {
                    user.owner = owner;
                }
                user.important();
            }
            let dir = user.tree.dir_mut(at).ok_or(Plain::NotFound)?;
            dir.mode = attrs.mode;
            dir.owner = attrs.owner;
            dir.mtime = attrs.mtime;
            dir.ctime = now;
            let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
            Ok(attr::of_dir(user, at, dir))
        }))
    }

    fn set_node_attr(
        &self,
        caller: Caller,
        cell: &Arc<UserCell>,
        (ix, ino): (NodeIx, Ino),
        set: SetAttr,
    ) -> Step<Attr> {
        step(cell.with(|user| {
            user.node_known(ix, ino)?;
            let now = user.now();
            if let Some(size) = set.size {
                let node = user.node(ix)?;
                let shrinks = size < node.size;
                if shrinks && let Some(name) = node.names.first() {
                    let bytes = user.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
                    self.may_delete(caller, user, name.at, &bytes)?;
                }
                user.truncate(ix, size)?;
            }
            let owner_now = user.node(ix)?.owner.unwrap_or(user.owner);
            let owner = (set.uid.is_some() || set.gid.is_some()).then(|| set_owner(owner_now, set));
            user.set_attrs(ix, set.mode, owner, time(set.mtime, now))?;
            Ok(attr::of_node(user, user.node(ix)?))
        }))
    }
}

fn time(set: Option<SetTime>, now: crate::format::Timestamp) -> Option<crate::format::Timestamp> {
    set.map(|set| match set {
        SetTime::Now => now,
        SetTime::At(at) => at,
    })
}

fn set_owner(now: Owner, set: SetAttr) -> Owner {
    Owner { uid: set.uid.unwrap_or(now.uid), gid: set.gid.unwrap_or(now.gid) }
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
        match self.session.target(ino) {
            Some(InoTarget::Node(cell, ix)) => {
                let known = cell.if_open(|user| {
                    if let Some(node) = user.tree.nodes.get_mut(ix)
                        && node.ino == ino
                    {
                        node.lookups = node.lookups.saturating_sub(lookups);
                        if node.lookups == 0 {
                            if node.handles == 0 {
                                self.session.forget_ino(ino);
                            }
                            user.drop_if_unused(ix);
                        }
                        return true;
                    }
                    false
                });
                if known != Some(true) {
                    // Its user was closed, or opened again since.
                    self.session.forget_ino(ino);
                }
            }
            Some(InoTarget::Dir(cell, Place::ROOT)) => {
                let mut root = cell.root.lock();
                root.lookups = root.lookups.saturating_sub(lookups);
                if root.lookups == 0 {
                    self.session.forget_ino(ino);
                }
            }
            Some(InoTarget::Dir(cell, at)) => {
                let gone = cell.if_open(|user| match user.tree.dir_mut(at) {
                    Some(dir) if dir.ino == ino => {
                        dir.lookups = dir.lookups.saturating_sub(lookups);
                        dir.lookups == 0
                    }
                    _ => true,
                });
                if gone != Some(false) {
                    self.session.forget_ino(ino);
                }
            }
            // The mount's root and what leads to users stay: they are few.
            Some(InoTarget::Above(_)) | None => {}
        }
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
                let opened = self.open_in(user, cell, ix, how)?;
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

/// Entries after the first cookie up to the last.
fn emit_entries(
    user: &User,
    at: Place,
    cookies: RangeInclusive<u64>,
    emit: &mut dyn FnMut(&DirEntry) -> bool,
) -> Op<()> {
    let cookie = *cookies.start();
    let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
    let above = match at.sub {
        Sub::Own => user.tree.folders.get(&at.folder).map(|f| f.parent),
        _ => Some(Place::own(at.folder)),
    };
    let parent = above.and_then(|p| user.tree.dir(p)).map_or(ROOT, |d| d.ino);
    let parent = if at == Place::ROOT { ROOT } else { parent };
    for (number, name, ino) in [(1, ".", dir.ino), (2, "..", parent)] {
        let entry = DirEntry { ino, name: name.into(), kind: FileKind::Directory, cookie: number };
        if cookie < number && !emit(&entry) {
            return Ok(());
        }
    }
    let listed = dir.entries.after(cookie.max(2));
    for (number, name, target) in listed.take_while(|(number, _, _)| number <= cookies.end()) {
        let (ino, kind) = match target {
            Target::Node(ix) => {
                let node = user.node(ix)?;
                let link = matches!(node.kind, Kind::Symlink(_));
                (node.ino, if link { FileKind::Symlink } else { FileKind::Regular })
            }
            Target::Folder(id) => {
                (user.tree.dir(Place::own(id)).map_or(1, |d| d.ino), FileKind::Directory)
            }
            Target::Sub(sub) => {
                let place = Place { folder: at.folder, sub };
                (user.tree.dir(place).map_or(1, |d| d.ino), FileKind::Directory)
            }
        };
        let entry = DirEntry { ino, name: name.to_vec(), kind, cookie: number };
        if !emit(&entry) {
            break;
        }
    }
    Ok(())
}
