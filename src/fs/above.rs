//! At and above the users' roots.
//!
//! Nothing here takes ownership or loads a user, and nothing waits for long: the kernel holds
//! the directory's lock across a lookup, and one mkdir behind it would stop everybody. A user
//! that is known is answered at once. For one that is not, the store is asked whether it
//! exists, for a fraction of a second; a store that does not answer in that time means "it may",
//! and a directory is shown: an outage is never an absence. So `ls` and `mkdir` behave as people
//! expect, a user that the store certainly does not know is absent, and a new one is made by
//! mkdir, at once.

use super::api::{Caller, DirEntry, FileKind, Found, FsError, Ino, Lookup, Step};
use super::attr;
use super::calls::VmailFs;
use crate::format::Place;
use crate::format::listing::Owner;
use crate::vmail::error::{Error, Plain};
use crate::vmail::need::Need;
use crate::vmail::session::{CellState, Exists, InoTarget, UserCell};
use std::sync::Arc;

/// The mount's root.
pub const ROOT: Ino = 1;

impl VmailFs {
    fn parts<'a>(path: &'a [Vec<u8>], name: &'a [u8]) -> Vec<&'a [u8]> {
        path.iter().map(Vec::as_slice).chain([name]).collect()
    }

    /// The inode number of a directory above the users.
    pub(super) fn above_ino(&self, path: &[&[u8]]) -> Ino {
        let key: Vec<Vec<u8>> = path.iter().map(|p| p.to_vec()).collect();
        let mut known = self.above.lock();
        if let Some(ino) = known.get(&key) {
            return *ino;
        }
        let ino = self.session.new_ino();
        known.insert(key.clone(), ino);
        self.session.inos.write().insert(ino, InoTarget::Above(Arc::new(key)));
        ino
    }

    pub(super) fn lookup_above(&self, path: &[Vec<u8>], name: &[u8]) -> Step<Lookup> {
        if let Some(shown) = self.lookup_shown(path, name) {
            return shown;
        }
        let layout = &self.session.settings.layout;
        let parts = Self::parts(path, name);
        if parts.len() < layout.depth() {
            if !layout.prefix_possible(&parts) {
                return Step::Done(Ok(Lookup::Absent { cacheable: false }));
            }
            let attr = attr::above(&self.session, self.above_ino(&parts));
            return Step::Done(Ok(Lookup::Found(Found { attr, cacheable: true })));
        }
        let Some(user) = layout.user_of(&parts) else {
            return Step::Done(Ok(Lookup::Absent { cacheable: false }));
        };
        let cell = self.session.user(&user, &parts);
        match self.user_exists(&cell) {
            Exists::Yes => Step::Done(Ok(Lookup::Found(self.found_root(&cell, path)))),
            Exists::No => Step::Done(Ok(Lookup::Absent { cacheable: false })),
            Exists::Unknown => Step::Wait(super::api::Need::new(Need::Exists(cell))),
        }
    }

    /// What can be said of a user at once. A "no" of the store is used up by being told.
    fn user_exists(&self, cell: &Arc<UserCell>) -> Exists {
        if !self.session.settings.ask_for_users {
            return Exists::Yes;
        }
        let mut root = cell.root.lock();
        match root.exists {
            Exists::No => {
                root.exists = Exists::Unknown;
                Exists::No
            }
            known => known,
        }
    }

    fn found_root(&self, cell: &Arc<UserCell>, above: &[Vec<u8>]) -> Found {
        let above: Vec<&[u8]> = above.iter().map(Vec::as_slice).collect();
        let parent = if above.is_empty() { ROOT } else { self.above_ino(&above) };
        {
            let mut root = cell.root.lock();
            root.lookups += 1;
            root.parent = Some(parent);
        }
        let target = cell.clone();
        self.session.register(cell.ino, || InoTarget::Dir(target, Place::ROOT));
        Found { attr: self.root_attr(cell), cacheable: true }
    }

    pub(super) fn root_attr(&self, cell: &Arc<UserCell>) -> super::api::Attr {
        match &*cell.state.lock() {
            CellState::Open(user) if user.ready => match user.tree.dir(Place::ROOT) {
                Some(dir) => attr::of_dir(user, Place::ROOT, dir),
                None => attr::of_closed_root(cell),
            },
            CellState::Open(_) | CellState::Closed => attr::of_closed_root(cell),
        }
    }

    pub(super) fn mkdir_above(
        &self,
        caller: Caller,
        path: &[Vec<u8>],
        name: &[u8],
        mode: u32,
    ) -> Step<Found> {
        if self.is_shown(path) {
            return Step::Done(Err(self.refuse_in(path, name)));
        }
        let layout = &self.session.settings.layout;
        let parts = Self::parts(path, name);
        if parts.len() < layout.depth() {
            // Shown as soon as it is named; whether it is listed depends on the users in it.
            let plain = if layout.prefix_possible(&parts) { Plain::Exists } else { Plain::Invalid };
            return Step::Done(Err(Error::from(plain).answer()));
        }
        let Some(user) = layout.user_of(&parts) else {
            return Step::Done(Err(
                self.refuse_above("is not a user's directory in this layout", &parts)
            ));
        };
        let cell = self.session.user(&user, &parts);
        {
            let mut root = cell.root.lock();
            if root.exists == Exists::Yes {
                return Step::Done(Err(Error::from(Plain::Exists).answer()));
            }
            root.exists = Exists::Yes;
            root.maker = Some((Owner { uid: caller.uid, gid: caller.gid }, mode & 0o7777));
        }
        // The user is made behind the answer; what needs it waits for that.
        self.session.open_soon(&cell);
        Step::Done(Ok(self.found_root(&cell, path)))
    }

    /// Files, links and the like at or above the users' level: refused, and said in the log.
    pub(super) fn refuse_above(&self, why: &str, parts: &[&[u8]]) -> FsError {
        let path: Vec<String> =
            parts.iter().map(|p| String::from_utf8_lossy(p).into_owned()).collect();
        Error::Refused(format!("{}: {why}", path.join("/"))).answer()
    }

    pub(super) fn refuse_in(&self, path: &[Vec<u8>], name: &[u8]) -> FsError {
        let parts = Self::parts(path, name);
        self.refuse_above("only users' directories may be at or above the users' level", &parts)
    }

    /// Entries of a directory above the users: those that lead to users which exist.
    pub(super) fn readdir_above(
        &self,
        ino: Ino,
        path: &[Vec<u8>],
        cookie: u64,
        emit: &mut dyn FnMut(&DirEntry) -> bool,
    ) -> Step<()> {
        if self.is_shown(path) {
            return self.list_shown(ino, cookie, emit);
        }
        // What was found for the first entries is gone through to the end: to put it together takes
        // time for each user there is, and a listing of many users is many calls.
        let found = self.listed_above.lock().clone().filter(|(of, _)| *of == ino && cookie > 0);
        let names = match found {
            Some((_, names)) => names,
            None => match self.names_above(path) {
                Some(names) => names,
                None => return Step::Wait(super::api::Need::new(Need::Users)),
            },
        };
        let mut next = cookie;
        let dots = [(b".".to_vec(), ino), (b"..".to_vec(), ROOT)];
        for (name, ino) in dots.into_iter().skip(usize::try_from(cookie).unwrap_or(usize::MAX)) {
            next += 1;
            if !emit(&DirEntry { ino, name, kind: FileKind::Directory, cookie: next }) {
                return Step::Done(Ok(()));
            }
        }
        let passed = usize::try_from(next.saturating_sub(2)).unwrap_or(usize::MAX);
        let mut full = false;
        for name in names.iter().skip(passed) {
            next += 1;
            let name = name.clone().into_bytes();
            let parts = Self::parts(path, &name);
            let layout = &self.session.settings.layout;
            let ino = if parts.len() < layout.depth() {
                self.above_ino(&parts)
            } else {
                layout.user_of(&parts).map_or(ino, |user| self.session.user(&user, &parts).ino)
            };
            if !emit(&DirEntry { ino, name, kind: FileKind::Directory, cookie: next }) {
                full = true;
                break;
            }
        }
        *self.listed_above.lock() = full.then_some((ino, names));
        Step::Done(Ok(()))
    }

    /// The names in a directory above the users, in order; `None` while it is not known who is there.
    fn names_above(&self, path: &[Vec<u8>]) -> Option<Arc<Vec<String>>> {
        let mut names = std::collections::BTreeSet::new();
        let listed = self.session.user_list.lock();
        let fits = |found: &[String]| {
            found.len() > path.len()
                && found.iter().zip(path).all(|(a, b)| a.as_bytes() == b.as_slice())
        };
        names.extend(listed.as_ref()?.iter().filter(|p| fits(p)).map(|p| p[path.len()].clone()));
        for cell in self.session.all_users() {
            if cell.root.lock().exists == Exists::Yes && fits(&cell.path) {
                names.insert(cell.path[path.len()].clone());
            }
        }
        Some(Arc::new(names.into_iter().collect()))
    }
}
