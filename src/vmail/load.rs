//! Loading a folder: its listing into memory, its index files into the metacache.
//!
//! A listing comes from the snapshot on the local disk where there is a valid one, else from
//! the parts that the head names; the journal's lines go on top. Index files that are on the
//! local disk are newer than any part and stay; the others come from the parts.
//!
//! An index file that is named but on no disk is never answered as absent (I4): a cache becomes
//! absent by a recorded change; anything else brings the folder's whole set of index files back
//! from the last cut, with next-UID at its ceiling, because files of different times together
//! would lie.
//!
//! What travels together is fetched together: the folder, the small folders that lead to it,
//! and the index folder of a mail folder, in one request per bundle where they lie side by side
//! (see [`super::chain`]).

use super::error::{Error, Plain, Result};
use super::lines::Final;
use super::node::{Kind, Local, Names, Node, Since};
use super::parts::{Contents, FromParts, Source, Wanted, fetch_parts, large_files};
use super::session::UserCell;
use super::snapshot::read_snapshot;
use super::space;
use super::tree::{Dir, NameBytes, Target};
use super::user::User;
use super::wait::Patience;
use crate::cache::metacache::{DIR, Purpose, of_file};
use crate::dovecot::classes::Class;
use crate::format::listing::{Attrs, Entry};
use crate::format::{FolderId, ObjectId, Place, Sub, Timestamp};
use std::collections::{BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// After loading or flushing so many names what that needed is given back to the kernel.
pub(super) const MANY: usize = 5000;

/// Attributes of a directory nothing is known about yet.
pub const UNKNOWN: Attrs =
    Attrs { mode: 0o700, owner: None, mtime: Timestamp { secs: 0, nanos: 0 } };

/// Loads a folder, trying for as long as a delivery may wait.
pub async fn load(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    load_for(cell, folder, Purpose::Load).await
}

/// The same for somebody who may go further into the metacache's grace.
pub async fn load_for(cell: &Arc<UserCell>, folder: FolderId, purpose: Purpose) -> Result<()> {
    let mut patience = Patience::new(&cell.session);
    let _one = cell.loading.lock().await;
    loop {
        let error = match load_once(cell, folder, purpose).await {
            Err(error @ Error::Store { .. }) => error,
            done => return done,
        };
        tracing::warn!(user = %cell.name, %error, "folder not loaded");
        if !patience.again().await {
            return Err(error);
        }
    }
}

async fn load_once(cell: &Arc<UserCell>, folder: FolderId, purpose: Purpose) -> Result<()> {
    let wanted = cell.open_user(|user| Ok(user.wanted(folder)))?;
    if wanted.is_empty() {
        return Ok(());
    }
    let mut sources = Vec::new();
    let mut fetch = Vec::new();
    for want in wanted {
        let state = match &want.snapshot {
            Some(path) => read_snapshot(cell, path).await?,
            None => None,
        };
        match state {
            Some(state) => sources.push((want.id, Source { state, parts: None })),
            None => fetch.push(want),
        }
    }
    let known_here = sources.len();
    sources.extend(fetch_parts(cell, &fetch).await?);
    cell.session.counts.loaded(known_here, sources.len() - known_here);
    // Parents before children, so that paths are known.
    let mut names = 0;
    for (id, source) in sources {
        names += source.state.len();
        install_checked(cell, id, source, purpose).await?;
    }
    if names > MANY {
        crate::memory::give_back();
    }
    Ok(())
}

async fn install_checked(
    cell: &Arc<UserCell>,
    id: FolderId,
    source: Source,
    purpose: Purpose,
) -> Result<()> {
    let from_parts = source.parts.is_some();
    if !install_from(cell, id, source, purpose, false).await? {
        return Ok(());
    }
    // With what the parts hold as it was nothing is missing, or what changed since is.
    if !from_parts {
        let Some(source) = fetch_one(cell, id).await? else { return Ok(()) };
        if !install_from(cell, id, source, purpose, false).await? {
            return Ok(());
        }
    }
    tracing::warn!(
        user = %cell.name, folder = %id,
        "index files are missing in the metacache; all of the folder's come back from the last flush"
    );
    match fetch_one(cell, id).await? {
        Some(source) => install_from(cell, id, source, purpose, true).await.map(drop),
        None => Ok(()),
    }
}

/// Says whether files are missing; see [`User::install`].
async fn install_from(
    cell: &Arc<UserCell>,
    id: FolderId,
    source: Source,
    purpose: Purpose,
    restore: bool,
) -> Result<bool> {
    let large = large_files(cell, id, &source).await?;
    let _room = space::reserve_of(cell, takes(&source, &large), purpose).await?;
    cell.open_user(|user| user.install(id, source, &large, restore))
}

/// A folder as its parts have it.
async fn fetch_one(cell: &Arc<UserCell>, id: FolderId) -> Result<Option<Source>> {
    let parts = cell.open_user(|user| {
        let folder = user.tree.folders.get(&id).ok_or(Plain::NotFound)?;
        Ok(vec![Wanted { id, parts: folder.parts.clone(), snapshot: None }])
    })?;
    Ok(fetch_parts(cell, &parts).await?.pop().map(|(_, source)| source))
}

/// What the files that came with a listing take at most, once they are on the disk.
pub(super) fn takes(source: &Source, large: &HashMap<ObjectId, bytes::Bytes>) -> u64 {
    let small = source.parts.iter().flat_map(|parts| parts.contents.values()).map(Vec::len);
    let all: u64 = small.chain(large.values().map(|b| b.len())).map(|n| of_file(n as u64)).sum();
    if all == 0 { 0 } else { all + DIR }
}

impl User {
    /// What to load for a folder: parents first. Empty if it is loaded.
    fn wanted(&self, id: FolderId) -> Vec<Wanted> {
        match self.tree.folders.get(&id) {
            None => return Vec::new(),
            Some(folder) if folder.loaded => return Vec::new(),
            Some(_) => {}
        }
        let mut ids = vec![id];
        let mut at = id;
        while at != FolderId::ROOT {
            let Some(folder) = self.tree.folders.get(&at) else { break };
            at = folder.parent.folder;
            ids.push(at);
        }
        ids.reverse();
        ids.extend(self.light_beside());
        ids.extend(self.mailboxes().others(self, id));
        let mut seen = std::collections::HashSet::new();
        ids.retain(|id| seen.insert(*id));
        ids.iter()
            .filter_map(|id| self.tree.folders.get(id))
            .filter(|f| !f.loaded)
            .map(|f| Wanted {
                id: f.id,
                parts: f.parts.clone(),
                // After a power cut the content of the last cut is needed beside it.
                snapshot: (self.snapshots.contains(&f.id) && !self.unclean)
                    .then(|| self.snapshot_path(f.id)),
            })
            .collect()
    }

    pub fn snapshot_path(&self, id: FolderId) -> std::path::PathBuf {
        self.state_dir.join("listing").join(id.to_string())
    }

    /// The folder that is the same mailbox in the other tree: the index directory of a mail
    /// directory, or the other way round. Known by the end of their paths.
    pub fn counterpart(&self, id: FolderId) -> Option<FolderId> {
        self.mailboxes().others(self, id).first().copied()
    }

    /// Puts a folder's names into memory and its files on the disk. With `restore` its index
    /// files are those of the last cut, whatever is on the disk. Says whether files are missing
    /// for which a restore is needed; then nothing was changed.
    fn install(
        &mut self,
        id: FolderId,
        source: Source,
        large: &HashMap<ObjectId, bytes::Bytes>,
        restore: bool,
    ) -> Result<bool> {
        let Some(folder) = self.tree.folders.get_mut(&id) else { return Ok(false) };
        if folder.loaded {
            return Ok(false);
        }
        let pending = folder.pending.clone();
        let amended = !pending.is_empty();
        let from_parts = source.parts.is_some();
        let FromParts { contents, layers } = source.parts.unwrap_or_else(|| FromParts {
            contents: Contents::new(),
            layers: vec![None; folder.parts.len().saturating_sub(1)],
        });
        // The final meaning of each name, in the order in which names first appeared.
        let mut state = source.state;
        let index = |sub: Sub, name: &[u8]| {
            matches!(self.class_of(Place { folder: id, sub }, name), Class::Index(_))
        };
        let at_cut = if restore { Some(state.locals(index)) } else { None };
        pending.into_iter().for_each(|line| state.apply(line));
        let mut restored: BTreeSet<(Sub, NameBytes)> = BTreeSet::new();
        if let Some(at_cut) = at_cut {
            let now = state.locals(index);
            restored.extend(now.iter().chain(&at_cut).map(|(sub, name, _)| (*sub, name.clone())));
            state.restore_locals(at_cut, index);
        }
        // What is missing must be known before anything is changed.
        if !restore
            && (self.restoring.contains(&id)
                || self.any_missing(id, &state, &contents, large)?
                || self.unclean && self.any_torn(id, &state, &contents)?)
        {
            return Ok(true);
        }
        if restore {
            self.begin_restoring(id)?;
        }
        self.fill(id, state, contents, large, restore)?;
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.loaded = true;
            folder.pending = Vec::new();
            folder.layers = layers;
            folder.snapshot_stale = from_parts || amended;
            if restore {
                folder.burnt_below = folder.burnt_below.max(folder.uid_ceiling);
                self.restored.push(id);
            }
        }
        self.sweep(id);
        // The journal still says what was there before, and the next start would miss it again.
        let states = restored
            .iter()
            .filter_map(|(sub, name)| self.current(Place { folder: id, sub: *sub }, name));
        let states = states.collect();
        self.commit(states)?;
        self.follow_uids(id)?;
        if !restore {
            self.look_after_death(id);
        }
        Ok(false)
    }

    pub(super) fn unflushed(&self, id: FolderId, key: &(Sub, NameBytes)) -> bool {
        self.tree.folders.get(&id).is_some_and(|f| f.unflushed.names.contains(key))
    }

    fn any_missing(
        &self,
        id: FolderId,
        state: &Final,
        contents: &Contents,
        large: &HashMap<ObjectId, bytes::Bytes>,
    ) -> Result<bool> {
        for (sub, name, entry) in state.names() {
            let Entry::Local { object, .. } = entry else { continue };
            let at = Place { folder: id, sub };
            let key = (sub, name.clone());
            // What was written since the last cut is nowhere but on the disk.
            let fetched = !self.unflushed(id, &key)
                && (contents.contains_key(&key) || object.is_some_and(|o| large.contains_key(&o)));
            if fetched || self.class_of(at, name).is_cache() {
                continue;
            }
            let path = self.file_path(at, name);
            let there = self.session.env.disk.exists(&path);
            if !there.map_err(|e| Error::disk(path.display().to_string(), &e))? {
                tracing::warn!(path = %path.display(), "missing in the metacache");
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn fill(
        &mut self,
        id: FolderId,
        state: Final,
        mut contents: Contents,
        large: &HashMap<ObjectId, bytes::Bytes>,
        restore: bool,
    ) -> Result<()> {
        for sub in Sub::ALL {
            let attrs = state.dirs[sub as usize];
            let there = self.tree.dir(Place { folder: id, sub }).is_some();
            match (attrs, there) {
                (Some(attrs), true) => {
                    if let Some(dir) = self.tree.dir_mut(Place { folder: id, sub }) {
                        dir.mode = attrs.mode;
                        dir.owner = attrs.owner;
                        dir.mtime = attrs.mtime;
                        dir.ctime = attrs.mtime;
                    }
                }
                (Some(attrs), false) => self.add_sub(id, sub, attrs),
                (None, _) => {}
            }
        }
        let on_disk = self.disk_inos(id)?;
        let mut same_file: HashMap<u64, usize> = HashMap::new();
        let mut here = Vec::new();
        for (sub, name, entry) in state.into_names() {
            let at = Place { folder: id, sub };
            if self.tree.dir(at).is_none() {
                self.add_sub(id, sub, UNKNOWN);
            }
            if self.tree.dir(at).is_some_and(|d| d.entries.get(&name).is_some()) {
                // A folder has the name; a listing cannot say so, so it is damage.
                tracing::error!(user = %self.name, folder = %id, "a file and a folder have one name");
                continue;
            }
            let class = self.class_of(at, &name);
            let (kind, size, attrs, class) = match entry {
                Entry::Mail { size, attrs, object } => {
                    let class = if class == Class::MailTemp { class } else { Class::Mail };
                    if let Some(ix) = self.tree.shared.get(&object.id()).copied() {
                        self.tree.attach(at, name, ix);
                        if class == Class::Mail
                            && let Some(node) = self.tree.nodes.get_mut(ix)
                        {
                            node.class = class;
                        }
                        continue;
                    }
                    (Kind::Published(object), size, attrs, class)
                }
                Entry::Extents { size, attrs, extents } => {
                    let first = extents.first().map(|e| e.object.id());
                    if let Some(ix) = first.and_then(|id| self.tree.shared.get(&id).copied()) {
                        self.tree.attach(at, name, ix);
                        continue;
                    }
                    let grow = super::node::Growing {
                        extents,
                        published: size,
                        temporary: super::recover::is_temporary(&name),
                        ..super::node::Growing::default()
                    };
                    (Kind::Growing(Box::new(grow)), size, attrs, Class::Growing)
                }
                Entry::Symlink { target, attrs } => {
                    let size = target.len() as u64;
                    (Kind::Symlink(target.into()), size, attrs, Class::Other)
                }
                Entry::Local { attrs, object, .. } => {
                    let restore = restore && matches!(class, Class::Index(_));
                    let key = (sub, name.clone());
                    // After a power cut only what the store does not have is taken from the disk.
                    let fetch = self.unclean && !self.unflushed(id, &key);
                    let known = on_disk.get(&key).copied().filter(|_| !fetch);
                    // A cache of another time than the log beside it would lie.
                    let stale = class.is_cache() && !restore && !on_disk.is_empty();
                    if stale && (known.is_none() || self.unclean) {
                        contents.remove(&key);
                        if let Some(folder) = self.tree.folders.get_mut(&id) {
                            folder.unflushed.names.insert(key);
                        }
                        continue;
                    }
                    let content = contents
                        .remove(&(sub, name.clone()))
                        .or_else(|| object.and_then(|o| large.get(&o)).map(|bytes| bytes.to_vec()));
                    if let (Some((_, ino)), false) = (known, restore)
                        && let Some(ix) = same_file.get(&ino)
                    {
                        self.tree.attach(at, name, *ix);
                        if let Some(node) = self.tree.nodes.get_mut(*ix) {
                            node.nlink += 1;
                        }
                        continue;
                    }
                    let size = match (known, content) {
                        (Some((len, _)), _) if !restore => len,
                        (_, Some(content)) => {
                            self.write_local(at, &name, &content)?;
                            content.len() as u64
                        }
                        (_, None) => {
                            // A cache, or a file that no cut ever held.
                            if let Some(folder) = self.tree.folders.get_mut(&id) {
                                folder.unflushed.names.insert((sub, name.clone()));
                            }
                            continue;
                        }
                    };
                    let dirty = self
                        .tree
                        .folders
                        .get(&id)
                        .is_some_and(|f| f.unflushed.names.contains(&(sub, name.clone())));
                    // What a listing of this disk has need not be in a part: a cut leaves caches out.
                    let shipped = !dirty && (!class.is_cache() || known.is_none() || restore);
                    let since = if shipped { Since::nothing(size) } else { Since::everything() };
                    let local = Local {
                        since,
                        shipped,
                        object,
                        // What a dead process was told of its last sync is not known.
                        spoilt: dirty && self.inherited,
                        ..Local::default()
                    };
                    (Kind::Local(Box::new(local)), size, attrs, class)
                }
            };
            let object = match &kind {
                Kind::Published(object) => Some(object.id()),
                Kind::Growing(grow) => grow.extents.first().map(|e| e.object.id()),
                _ => None,
            };
            let total = object.and_then(|o| self.tree.links.get(&o).copied());
            let ix = self.tree.nodes.add(Node {
                ino: self.session.new_ino(),
                kind,
                class,
                size,
                mode: attrs.mode,
                owner: attrs.owner,
                mtime: attrs.mtime,
                ctime: attrs.mtime,
                names: Names::None,
                nlink: total.unwrap_or(1),
                lookups: 0,
                handles: 0,
                writers: 0,
            });
            if let (Some(object), Some(_)) = (object, total) {
                self.tree.shared.insert(object, ix);
            }
            let mut before = None;
            if let Some((len, ino)) = on_disk.get(&(sub, name.clone())) {
                same_file.insert(*ino, ix);
                before = Some(*len);
            }
            self.tree.attach(at, name, ix);
            if self.tree.kind_is_local(ix) {
                here.push((ix, before));
            }
        }
        // By its names the priority of the folder is known.
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.priority = None;
        }
        for (ix, before) in here {
            self.charged_already(ix, before);
        }
        // What was fetched for somebody must not be what goes first.
        self.used_folder(id);
        Ok(())
    }

    pub(super) fn add_sub(&mut self, id: FolderId, sub: Sub, attrs: Attrs) {
        let ino = self.session.new_ino();
        let Some(folder) = self.tree.folders.get_mut(&id) else { return };
        folder.set_dir(sub, Some(Dir::new(ino, attrs)));
        if sub != Sub::Own
            && let Some(own) = folder.dir_mut(Sub::Own)
            && own.entries.get(sub.as_str().as_bytes()).is_none()
        {
            own.entries.insert(sub.as_str().as_bytes().into(), Target::Sub(sub));
        }
    }

    /// Size and identity of the files of a folder in the metacache.
    fn disk_inos(&self, id: FolderId) -> Result<HashMap<(Sub, NameBytes), (u64, u64)>> {
        let mut found = HashMap::new();
        for sub in Sub::ALL {
            let path = self.cache_path(Place { folder: id, sub });
            let listed = self.session.env.disk.list(&path);
            for entry in listed.map_err(|e| Error::disk(path.display().to_string(), &e))? {
                if !entry.is_dir {
                    let name: NameBytes = entry.name.as_bytes().into();
                    found.insert((sub, name), (entry.len, entry.ino));
                }
            }
        }
        Ok(found)
    }

    /// Writes a file that the store has, too.
    pub(super) fn write_local(&self, at: Place, name: &[u8], content: &[u8]) -> Result<()> {
        self.put_local(at, name, content, false)
    }

    /// Replaces a file that may hold what was synced here and is in no bundle yet: after a power
    /// cut it is the old one or the new one.
    pub(super) fn rewrite_local(&self, at: Place, name: &[u8], content: &[u8]) -> Result<()> {
        self.put_local(at, name, content, true)
    }

    fn put_local(&self, at: Place, name: &[u8], content: &[u8], durable: bool) -> Result<()> {
        let path = self.file_path(at, name);
        let disk = &*self.session.env.disk;
        self.make_cache_dir(&self.cache_path(at))
            .and_then(|()| disk.replace(&path, content, durable))
            .map_err(|e| Error::disk(path.display().to_string(), &e))
    }

    /// Removes what lies in the folder's metacache directory and is named nowhere: locks and
    /// temporary files of a session that died.
    fn sweep(&mut self, id: FolderId) {
        let priority = self.priority(id);
        let disk = &*self.session.env.disk;
        for sub in Sub::ALL {
            let at = Place { folder: id, sub };
            let path = self.cache_path(at);
            let Ok(entries) = disk.list(&path) else { continue };
            for entry in entries {
                let name = entry.name.as_bytes();
                let target = self.tree.dir(at).and_then(|d| d.entries.get(name));
                let stays = match target {
                    Some((_, Target::Node(ix))) => !entry.is_dir && self.tree.kind_is_local(ix),
                    Some((_, Target::Folder(_) | Target::Sub(_))) => entry.is_dir,
                    None => false,
                };
                if stays {
                    continue;
                }
                let path = path.join(&entry.name);
                let gone = if entry.is_dir {
                    self.drop_cache_dir(&path)
                } else {
                    self.space.account.release(priority, of_file(entry.len));
                    disk.remove_file(&path)
                };
                if let Err(error) = gone {
                    tracing::warn!(%error, path = %path.display(), "leftover not removed");
                }
            }
        }
    }
}
