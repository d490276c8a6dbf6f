//! What users take of the local disk, for the books of [`crate::cache::metacache`].
//!
//! What is counted of a user: its index files and their directories in the metacache, by the
//! priority of the folder they lie in, and directories, head, journal and listings as part of its
//! root (priority 0). A folder has one priority, for its index files belong together: the highest
//! number that any of them asks for.
//!
//! Each local node knows what is charged for it, and [`User::recharge`] is called after whatever
//! may change that. Files of folders that are not in memory are counted as they lie on the disk,
//! when the user is opened.

use super::error::{Error, Result};
use super::need::{Need, Op, Stop};
use super::node::{Kind, NodeIx};
use super::session::{Session, Settings, UserCell};
use super::tree::NameBytes;
use super::user::User;
use super::wait::Patience;
use crate::cache::disk::Disk;
use crate::cache::metacache::{Account, DIR, Purpose, Reserved, of_file};
use crate::cache::weight::PRIORITIES;
use crate::dovecot::classes::{self, Class};
use crate::format::key::parse_user_dir;
use crate::format::{FolderId, Place, Sub};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What is charged for an open user besides its nodes.
#[derive(Debug)]
pub struct Space {
    pub account: Arc<Account>,
    /// For what is in its state directory.
    state: State,
}

/// What a user's state directory takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct State {
    journal: u64,
    /// The head, twice while it is replaced.
    heads: u64,
    /// Directories, listings, links.
    other: u64,
}

impl State {
    pub fn sum(&self) -> u64 {
        self.journal + self.heads + self.other
    }
}

impl Space {
    pub fn new(account: Arc<Account>) -> Space {
        Space { account, state: State::default() }
    }
}

/// What lies on the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measured {
    pub bytes: [u64; PRIORITIES],
    /// Seconds since 1970.
    pub used: [i64; PRIORITIES],
    pub files: u64,
    /// Those that have a second name, perhaps.
    seen: BTreeSet<u64>,
}

/// Directories may be nested so deep, at most twice of which is looked at.
const DEEPEST: usize = super::tree::MAX_DEPTH * 2;

impl Measured {
    /// Counts a directory of a user and what is below it. `path` is where it lies below the
    /// user's root.
    fn tree(
        &mut self,
        disk: &dyn Disk,
        dir: &Path,
        path: &mut Vec<Vec<u8>>,
        soon: &[Vec<u8>],
    ) -> io::Result<()> {
        let entries = disk.list(dir)?;
        let names = entries.iter().map(|e| e.name.as_bytes());
        let dirs: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        let priority = usize::from(classes::folder_priority(&dirs, names, soon));
        self.bytes[0] += DIR;
        for entry in &entries {
            if !entry.is_dir {
                if !self.seen.insert(entry.ino) {
                    continue;
                }
                self.bytes[priority] += of_file(entry.len);
                self.used[priority] = self.used[priority].max(entry.used);
                self.files += 1;
            } else if path.len() < DEEPEST {
                path.push(entry.name.as_bytes().to_vec());
                self.tree(disk, &dir.join(&entry.name), path, soon)?;
                path.pop();
            }
        }
        Ok(())
    }

    /// Counts the index files of a user.
    pub fn of_user(disk: &dyn Disk, cache: &Path, soon: &[Vec<u8>]) -> io::Result<Measured> {
        let mut found = Measured::default();
        if disk.exists(cache)? {
            // The directories above it, as if they were its alone.
            found.bytes[0] += DIR;
            found.tree(disk, cache, &mut Vec::new(), soon)?;
        }
        Ok(found)
    }
}

/// Counts a user's state directory.
pub fn measure_state(disk: &dyn Disk, dir: &Path) -> io::Result<State> {
    let mut found = State::default();
    if !disk.exists(dir)? {
        return Ok(found);
    }
    // Its own, and what leads to it.
    found.other = 2 * DIR;
    for entry in disk.list(dir)? {
        let takes = of_file(entry.len);
        if entry.name == "pending" {
            // Mails on their way to the store: no part of the metacache.
            continue;
        }
        if entry.is_dir {
            found.other += DIR;
            let inside = disk.list(&dir.join(&entry.name))?;
            found.other += inside.iter().map(|e| of_file(e.len)).sum::<u64>();
        } else if entry.name == "journal" {
            found.journal = takes;
        } else if entry.name == "head" {
            found.heads = 2 * takes;
        } else if entry.name != "head.next" {
            found.other += takes;
        }
    }
    Ok(found)
}

impl User {
    fn books(&self) -> &crate::cache::metacache::Books {
        &self.session.metacache
    }

    /// The priority of a folder.
    pub fn priority(&mut self, id: FolderId) -> usize {
        let Some(folder) = self.tree.folders.get(&id) else { return 0 };
        if let Some(known) = folder.priority {
            return usize::from(known);
        }
        let path = self.tree.path(Place::own(id));
        let dirs: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
        let soon = &self.session.settings.metacache.soon;
        let names: Vec<NameBytes> = folder
            .dir(Sub::Own)
            .into_iter()
            .flat_map(|dir| dir.entries.after(0))
            .map(|(_, name, _)| name.clone())
            .collect();
        let found = classes::folder_priority(&dirs, names.iter().map(|n| &**n), soon);
        let loaded = folder.loaded;
        if let Some(folder) = self.tree.folders.get_mut(&id)
            && loaded
        {
            folder.priority = Some(found);
        }
        usize::from(found)
    }

    /// A folder got a name by which its priority may be another one, or another path: it and those
    /// below it are judged anew.
    pub(super) fn judge_anew(&mut self, id: FolderId) {
        let below: Vec<FolderId> = self
            .tree
            .folders
            .keys()
            .copied()
            .filter(|f| *f == id || self.tree.within(Place::own(*f), id))
            .collect();
        for id in below {
            let Some(folder) = self.tree.folders.get_mut(&id) else { continue };
            if folder.priority.take().is_some() {
                for ix in self.nodes_of(id) {
                    self.recharge(ix);
                }
            }
        }
    }

    pub(super) fn nodes_of(&self, id: FolderId) -> Vec<NodeIx> {
        let Some(folder) = self.tree.folders.get(&id) else { return Vec::new() };
        let targets = folder.dirs().flat_map(|(_, dir)| dir.entries.after(0));
        targets
            .filter_map(|(_, _, target)| match target {
                super::tree::Target::Node(ix) if self.tree.kind_is_local(ix) => Some(ix),
                _ => None,
            })
            .collect()
    }

    /// Puts right what is charged for a local file.
    pub(super) fn recharge(&mut self, ix: NodeIx) {
        let Some(node) = self.tree.nodes.get(ix) else { return };
        let Kind::Local(local) = &node.kind else { return };
        let there = !local.evicted && (node.nlink > 0 || node.handles > 0);
        let due = if there { of_file(node.size) } else { 0 };
        let (had, from) = (local.charged, local.charged_to);
        let folder = node.names.first().map(|name| name.at.folder);
        let to = folder.map_or(from, |folder| self.priority(folder));
        if (due, to) == (had, from) {
            return;
        }
        let account = self.space.account.clone();
        if to == from && due > had {
            account.charge(to, due - had);
        } else {
            account.release(from, had);
            account.charge(to, due);
        }
        if let Some(node) = self.tree.nodes.get_mut(ix)
            && let Kind::Local(local) = &mut node.kind
        {
            (local.charged, local.charged_to) = (due, to);
        }
        self.books().press();
    }

    /// A file of a folder that is being loaded; with so many bytes when the user was counted.
    pub(super) fn charged_already(&mut self, ix: NodeIx, before: Option<u64>) {
        let folder = self.tree.nodes.get(ix).and_then(|n| n.names.first()).map(|n| n.at.folder);
        let to = folder.map_or(0, |folder| self.priority(folder));
        if let Some(node) = self.tree.nodes.get_mut(ix)
            && let Kind::Local(local) = &mut node.kind
        {
            (local.charged, local.charged_to) = (before.map_or(0, of_file), to);
        }
        self.recharge(ix);
    }

    /// A node has a new name in `at`.
    pub(super) fn named(&mut self, ix: NodeIx, at: Place) {
        let known = self.tree.folders.get(&at.folder).and_then(|f| f.priority);
        let index = self.tree.nodes.get(ix).is_some_and(|n| matches!(n.class, Class::Index(_)));
        if at.sub == Sub::Own && known == Some(0) && index {
            // The first index file tells that it is a mailbox.
            if let Some(folder) = self.tree.folders.get_mut(&at.folder) {
                folder.priority = None;
            }
            if self.priority(at.folder) != 0 {
                self.nodes_of(at.folder).into_iter().for_each(|ix| self.recharge(ix));
            }
        }
        self.recharge(ix);
    }

    /// The bytes of a file that is to change its name must be here: parts know it by that.
    pub(super) fn here(&self, ix: NodeIx) -> Result<()> {
        let node = self.node(ix)?;
        match (&node.kind, node.names.first()) {
            (Kind::Local(local), Some(name)) if local.evicted => {
                Err(Error::Vanished { folder: name.at.folder, what: "evicted".into() })
            }
            _ => Ok(()),
        }
    }

    /// Takes the room that a local file needs to have so many bytes.
    pub(super) fn make_room(&mut self, ix: NodeIx, len: u64) -> Op<()> {
        let Some(node) = self.tree.nodes.get(ix) else { return Ok(()) };
        let Kind::Local(local) = &node.kind else { return Ok(()) };
        let (had, to) = (local.charged, local.charged_to);
        let more = of_file(len).saturating_sub(had);
        if more == 0 {
            return Ok(());
        }
        if node.class.is_local_only() {
            // Without its lock files no server could even read.
            self.space.account.charge(to, more);
        } else if !self.books().try_charge(&self.space.account, to, more, Purpose::Write) {
            return Err(Stop::Wait(Need::Room(more, Purpose::Write)));
        }
        if let Some(node) = self.tree.nodes.get_mut(ix)
            && let Kind::Local(local) = &mut node.kind
        {
            local.charged = had + more;
        }
        Ok(())
    }

    /// Whether a new name may be made.
    pub(super) fn room_for_name(&self) -> Op<()> {
        let books = self.books();
        if books.reserve(DIR, Purpose::Write).is_some() {
            return Ok(());
        }
        Err(Stop::Wait(Need::Room(DIR, Purpose::Write)))
    }

    /// Makes a directory of the metacache.
    pub(super) fn make_cache_dir(&self, dir: &Path) -> io::Result<()> {
        let disk = self.session.disk();
        let mut missing = 0;
        let mut at = Some(dir);
        while let Some(path) = at.filter(|path| path.starts_with(&self.cache_dir)) {
            if disk.exists(path)? {
                break;
            }
            missing += 1;
            if path == self.cache_dir {
                missing += 1;
            }
            at = path.parent();
        }
        disk.create_dirs(dir)?;
        self.space.account.charge(0, missing * DIR);
        Ok(())
    }

    /// Removes a directory of the metacache with whatever is in it that no node stands for.
    pub(super) fn drop_cache_dir(&self, dir: &Path) -> io::Result<()> {
        let disk = self.session.disk();
        if !disk.is_dir(dir)? {
            return Ok(());
        }
        let mut found = Measured::default();
        found.tree(disk, dir, &mut Vec::new(), &[])?;
        disk.remove_tree(dir)?;
        for (priority, bytes) in found.bytes.into_iter().enumerate() {
            self.space.account.release(priority, bytes);
        }
        Ok(())
    }

    /// Counts what the user has on the disk. Called before anything of it is in memory.
    pub(super) fn count(&mut self) -> Result<()> {
        let session = self.session.clone();
        let failed = |e: io::Error| Error::disk("counting the metacache", &e);
        let soon = &session.settings.metacache.soon;
        let found = Measured::of_user(session.disk(), &self.cache_dir, soon).map_err(failed)?;
        self.space.state = measure_state(session.disk(), &self.state_dir).map_err(failed)?;
        let mut bytes = found.bytes;
        bytes[0] += self.space.state.sum();
        self.space.account.set(bytes);
        self.books().press();
        Ok(())
    }

    /// Counts the user while it is open and puts the books right: what they said, and what was
    /// found.
    pub(super) fn rescan(&mut self) -> Result<(u64, Measured)> {
        let before = self.space.account.bytes().iter().sum();
        self.count()?;
        // What has no name any more and is still open.
        let mut unnamed = [0; PRIORITIES];
        for (_, node) in self.tree.nodes.iter().filter(|(_, node)| node.nlink == 0) {
            if let Kind::Local(local) = &node.kind {
                unnamed[local.charged_to.min(PRIORITIES - 1)] += local.charged;
            }
        }
        for (priority, bytes) in unnamed.into_iter().enumerate() {
            self.space.account.charge(priority, bytes);
        }
        let bytes = self.space.account.bytes();
        Ok((before, Measured { bytes, ..Measured::default() }))
    }

    /// Counts the state directory anew.
    pub(super) fn recount_state(&mut self) {
        let session = self.session.clone();
        match measure_state(session.disk(), &self.state_dir) {
            Ok(state) => self.state_is(state),
            Err(error) => {
                tracing::warn!(user = %self.name, %error, "local state not counted");
            }
        }
    }

    fn state_is(&mut self, state: State) {
        let had = std::mem::replace(&mut self.space.state, state).sum();
        match state.sum().checked_sub(had) {
            Some(0) => {}
            Some(more) => self.space.account.charge(0, more),
            None => self.space.account.release(0, had - state.sum()),
        }
    }

    /// The journal has another length.
    pub(super) fn journal_grew(&mut self) {
        let journal = of_file(self.journal.size());
        self.state_is(State { journal, ..self.space.state });
    }

    /// The head takes so many bytes.
    pub(super) fn head_is(&mut self, len: u64) {
        self.state_is(State { heads: 2 * of_file(len), ..self.space.state });
    }

    /// Something of a folder was used.
    pub(super) fn used_folder(&mut self, id: FolderId) {
        let priority = self.priority(id);
        let now = self.now().secs;
        self.space.account.used_at(priority, now);
        // Nothing is reached but through the root.
        self.space.account.used_at(0, now);
    }
}

impl Session {
    /// Where a user's index files lie.
    pub fn cache_dir_of(&self, path: &[String]) -> PathBuf {
        path.iter().fold(self.settings.metacache_dir.clone(), |dir, name| dir.join(name))
    }

    /// Counts every user that the local disk has something of. Only at the start: what is in
    /// memory knows better.
    pub(super) fn count_all(self: &Arc<Self>) -> Result<()> {
        let failed = |e: io::Error| Error::disk("counting the metacache", &e);
        for name in users_on_disk(self.disk(), &self.settings).map_err(failed)? {
            let Some(path) = self.settings.layout.path_of(&name) else { continue };
            self.count_user(&name, &path).map_err(failed)?;
        }
        self.metacache.press();
        Ok(())
    }

    fn count_user(&self, name: &str, path: &[String]) -> io::Result<Measured> {
        let soon = &self.settings.metacache.soon;
        let mut found = Measured::of_user(self.disk(), &self.cache_dir_of(path), soon)?;
        found.bytes[0] += measure_state(self.disk(), &self.state_dir_of(name))?.sum();
        let account = self.metacache.account(&name.into());
        account.set(found.bytes);
        for (priority, at) in found.used.into_iter().enumerate() {
            account.used_at(priority, at);
        }
        Ok(found)
    }

    /// Counts a user that is not open, and puts its books right.
    pub(super) fn count_closed(&self, cell: &UserCell) -> io::Result<Measured> {
        self.count_user(&cell.name, &cell.path)
    }
}

/// Users of whom there is a state or a metacache directory.
pub fn users_on_disk(disk: &dyn Disk, settings: &Settings) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let users = settings.state_dir.join("users");
    for hh in disk.list(&users)?.iter().filter(|e| e.is_dir) {
        for user in disk.list(&users.join(&hh.name))?.iter().filter(|e| e.is_dir) {
            names.extend(user.name.to_str().and_then(|name| parse_user_dir(name).ok()));
        }
    }
    let layout = &settings.layout;
    let mut above = vec![Vec::<Vec<u8>>::new()];
    for depth in 1..=layout.depth() {
        let mut next = Vec::new();
        for path in above {
            let dir = path.iter().fold(settings.metacache_dir.clone(), |dir, name| {
                dir.join(OsStr::from_bytes(name))
            });
            for entry in disk.list(&dir)?.iter().filter(|e| e.is_dir) {
                let mut path = path.clone();
                path.push(entry.name.as_bytes().to_vec());
                let parts: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
                if depth == layout.depth() {
                    names.extend(layout.user_of(&parts));
                } else {
                    next.push(path);
                }
            }
        }
        above = next;
    }
    Ok(names)
}

/// How often who waits for room looks.
const LOOK: Duration = Duration::from_millis(200);
/// What makes room waits for it no longer than this.
const SHORTLY: Duration = Duration::from_secs(1);

/// Sets space aside for what is loaded of a user: while it is being evicted that is part of making
/// room, whoever asked for it.
pub(super) async fn reserve_of(cell: &UserCell, bytes: u64, purpose: Purpose) -> Result<Reserved> {
    let purpose = match cell.makes_room.load(Ordering::Acquire) {
        0 => purpose,
        _ => Purpose::Flush,
    };
    reserve(&cell.session, bytes, purpose).await
}

/// Sets space aside, waiting for eviction where there is none.
pub(super) async fn reserve(
    session: &Arc<Session>,
    bytes: u64,
    purpose: Purpose,
) -> Result<Reserved> {
    let books = &session.metacache;
    if let Some(reserved) = books.reserve(bytes, purpose) {
        return Ok(reserved);
    }
    let most = books.limits.of(purpose);
    if purpose != Purpose::Flush && bytes > most {
        // No waiting helps.
        return Err(Error::Crowded(format!(
            "{bytes} bytes never find room in the metacache, which may take {most} for this: \
             raise metacache.max_space"
        )));
    }
    let _waits = books.want(bytes);
    let start = session.env.clock.boot();
    let end = Patience::new(session).end();
    loop {
        let freed = books.freed.notified();
        if let Some(reserved) = books.reserve(bytes, purpose) {
            return Ok(reserved);
        }
        let now = session.env.clock.boot();
        if purpose == Purpose::Flush && now >= start + SHORTLY {
            return Ok(books.insist(bytes));
        }
        if now >= end {
            return Err(Error::Crowded(format!(
                "the metacache has no room for {bytes} bytes more, and nothing of it can be \
                 evicted (metacache.max_space)"
            )));
        }
        tokio::select! {
            () = freed => {}
            () = session.env.clock.sleep(LOOK) => {}
        }
    }
}
