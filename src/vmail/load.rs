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

use super::error::{During, Error, Plain, Result};
use super::node::{Kind, Local, Names, Node, Since};
use super::publish::blocking;
use super::session::UserCell;
use super::tree::{Dir, Layer, NameBytes, Target};
use super::user::User;
use super::wait::Patience;
use crate::cache::disk::{DiskFile, How};
use crate::dovecot::classes::{Class, IndexKind};
use crate::dovecot::index_snapshot::SnapshotHeader;
use crate::dovecot::{recover, uidlist, uidvalidity};
use crate::format::head::PartRef;
use crate::format::journal::Change;
use crate::format::key::{bundle_key, file_key};
use crate::format::listing::{Attrs, Entry, Line, read_listing};
use crate::format::part::{Content, apply_content, read_part};
use crate::format::{FolderId, FormatError, ObjectId, Place, Sub, Timestamp};
use crate::store::{Reason, StoreError};
use hashbrown::HashTable;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// Decompressed size of one part at most.
pub const PART_LIMIT: u64 = 4 << 30;
/// Lines of a local listing snapshot at most.
const SNAPSHOT_LINES: usize = 50_000_000;
/// After loading so many names what the load itself needed is given back to the kernel.
const MANY: usize = 5000;
/// Parts this near to each other are fetched in one request.
const GAP: u64 = 256 * 1024;

/// Attributes of a directory nothing is known about yet.
pub const UNKNOWN: Attrs =
    Attrs { mode: 0o700, owner: None, mtime: Timestamp { secs: 0, nanos: 0 } };

/// What was found of a folder, before the journal's lines.
pub(super) struct Source {
    pub state: Final,
    /// `None`: from the snapshot on the local disk.
    pub parts: Option<FromParts>,
}

/// What files hold, by their names.
pub(super) type Contents = HashMap<(Sub, NameBytes), Vec<u8>>;

/// What the parts of a folder hold besides the listing.
#[derive(Default)]
pub(super) struct FromParts {
    pub contents: Contents,
    layers: Vec<Option<Layer>>,
}

pub(super) struct Wanted {
    pub id: FolderId,
    pub parts: Vec<PartRef>,
    pub snapshot: Option<std::path::PathBuf>,
}

/// Loads a folder, trying for as long as a delivery may wait.
pub async fn load(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    let mut patience = Patience::new(&cell.session);
    let _one = cell.loading.lock().await;
    loop {
        let error = match load_once(cell, folder).await {
            Err(error @ Error::Store { .. }) => error,
            done => return done,
        };
        tracing::warn!(user = %cell.name, %error, "folder not loaded");
        if !patience.again().await {
            return Err(error);
        }
    }
}

async fn load_once(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
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
    sources.extend(fetch_parts(cell, &fetch).await?);
    // Parents before children, so that paths are known.
    let mut names = 0;
    for (id, source) in sources {
        names += source.state.len();
        install_checked(cell, id, source).await?;
    }
    if names > MANY {
        crate::memory::give_back();
    }
    Ok(())
}

async fn install_checked(cell: &Arc<UserCell>, id: FolderId, source: Source) -> Result<()> {
    let large = large_files(cell, id, &source).await?;
    let missing = cell.open_user(|user| user.install(id, source, &large, false))?;
    if !missing {
        return Ok(());
    }
    tracing::warn!(
        user = %cell.name, folder = %id,
        "index files are missing in the metacache; all of the folder's come back from the last flush"
    );
    let parts = cell.open_user(|user| {
        let folder = user.tree.folders.get(&id).ok_or(Plain::NotFound)?;
        Ok(vec![Wanted { id, parts: folder.parts.clone(), snapshot: None }])
    })?;
    let mut fetched = fetch_parts(cell, &parts).await?;
    let Some((_, source)) = fetched.pop() else { return Ok(()) };
    let large = large_files(cell, id, &source).await?;
    cell.open_user(|user| user.install(id, source, &large, true)).map(|_| ())
}

async fn read_snapshot(cell: &Arc<UserCell>, path: &std::path::Path) -> Result<Option<Final>> {
    let disk = cell.session.env.disk.clone();
    let at = path.to_path_buf();
    let read = blocking(move || match disk.open(&at, How::Read) {
        Ok(file) => check_snapshot(file).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Unusable::Disk(e)),
    });
    match read.await? {
        Ok(state) => Ok(state),
        Err(Unusable::Disk(e)) => Err(Error::disk(path.display().to_string(), &e)),
        Err(Unusable::Format(error)) => {
            // The parts say the same, only older; the journal brings them up to date.
            tracing::warn!(user = %cell.name, %error, path = %path.display(), "listing snapshot unusable");
            Ok(None)
        }
    }
}

/// A listing snapshot is a listing with its checksum in front.
pub fn seal_snapshot(listing: &str) -> Vec<u8> {
    let mut out = format!("{:08x}\n", crc32c::crc32c(listing.as_bytes())).into_bytes();
    out.extend_from_slice(listing.as_bytes());
    out
}

/// Why a snapshot cannot be taken.
enum Unusable {
    Disk(io::Error),
    Format(FormatError),
}

/// A file of the local disk, read from front to end.
struct Front {
    file: Arc<dyn DiskFile>,
    at: u64,
}

impl io::Read for Front {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Reads a snapshot twice, for its checksum and for its lines: it never is in memory whole.
fn check_snapshot(file: Arc<dyn DiskFile>) -> std::result::Result<Final, Unusable> {
    const SUM: u64 = 9;
    let what = "listing snapshot";
    let front = |at| BufReader::with_capacity(64 << 10, Front { file: file.clone(), at });
    let mut source = front(0);
    let mut sum = [0; SUM as usize];
    match source.read_exact(&mut sum) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(Unusable::Format(FormatError::malformed(what, "too short")));
        }
        done => done.map_err(Unusable::Disk)?,
    }
    let mut crc = 0;
    loop {
        let some = source.fill_buf().map_err(Unusable::Disk)?;
        if some.is_empty() {
            break;
        }
        crc = crc32c::crc32c_append(crc, some);
        let len = some.len();
        source.consume(len);
    }
    if sum != *format!("{crc:08x}\n").as_bytes() {
        return Err(Unusable::Format(FormatError::Checksum { what }));
    }
    let mut state = Final::default();
    read_listing(&mut front(SUM), SNAPSHOT_LINES, |line| state.apply(line))
        .map_err(Unusable::Format)?;
    Ok(state)
}

/// Index files that lie in objects of their own and are not on the local disk.
pub(super) async fn large_files(
    cell: &Arc<UserCell>,
    id: FolderId,
    source: &Source,
) -> Result<HashMap<ObjectId, bytes::Bytes>> {
    let mut objects = BTreeMap::new();
    for (_, _, entry) in source.state.names() {
        if let Entry::Local { size, object: Some(object), .. } = entry {
            objects.insert(*object, *size);
        }
    }
    let mut found = HashMap::new();
    for (object, size) in objects {
        let key = file_key(&cell.name, object);
        match cell.session.env.store.get(&key, None, size, Reason("load")).await {
            Ok((_, bytes)) => _ = found.insert(object, bytes),
            // Perhaps named by an older line only; if it is needed, it counts as missing.
            Err(StoreError::NotFound { .. }) => {
                tracing::warn!(user = %cell.name, folder = %id, key, "large file gone from the store");
            }
            Err(e) => {
                return Err(Error::store(format!("loading {}", cell.name), During::Delivery, e));
            }
        }
    }
    Ok(found)
}

/// Fetches the parts of folders, side by side ones together.
pub(super) async fn fetch_parts(
    cell: &Arc<UserCell>,
    wanted: &[Wanted],
) -> Result<Vec<(FolderId, Source)>> {
    let all: Vec<&PartRef> = wanted.iter().flat_map(|w| &w.parts).collect();
    let mut bytes = fetch_ranges(cell, &all).await?.into_iter();
    let mut out = Vec::new();
    for want in wanted {
        let parts: Vec<_> = want.parts.iter().cloned().zip(bytes.by_ref()).collect();
        let user = cell.name.clone();
        out.push((want.id, blocking(move || read_parts(&user, parts)).await??));
    }
    Ok(out)
}

/// Puts the parts of a folder together.
fn read_parts(user: &str, parts: Vec<(PartRef, bytes::Bytes)>) -> Result<Source> {
    let (mut state, mut found) = (Final::default(), FromParts::default());
    for (i, (part, raw)) in parts.into_iter().enumerate() {
        let corrupt = |e| Error::corrupt(format!("user {user}: bundle {}", part.bundle), e);
        part.check(&raw).map_err(corrupt)?;
        let limit = part.raw_len.saturating_add(4096).min(PART_LIMIT);
        let mut layer = Layer::default();
        let members = read_part(&raw, limit, |line| {
            if i > 0
                && let Line::Set { sub, name, .. } | Line::Unset { sub, name } = &line
            {
                layer.names.insert((*sub, NameBytes::from(name.as_slice())));
            }
            state.apply(line);
        });
        for member in members.map_err(corrupt)? {
            let key = (member.sub, NameBytes::from(member.name));
            let old = found.contents.get(&key).map(Vec::as_slice);
            let new = apply_content(old, &member.content).map_err(corrupt)?;
            let since = match &member.content {
                Content::Tail { offset, .. } => Since::nothing(*offset),
                Content::Whole(_) | Content::Blocks { .. } => Since::everything(),
            };
            layer.members.insert(key.clone(), since);
            found.contents.insert(key, new);
        }
        if i > 0 {
            found.layers.push(Some(layer));
        }
    }
    Ok(Source { state, parts: Some(found) })
}

fn too_short(cell: &UserCell, bundle: ObjectId) -> Error {
    let what = format!("user {}: bundle {bundle} is shorter than its head says", cell.name);
    Error::Damaged { what }
}

/// The bytes of parts, in the order asked for, with as few requests as their places allow.
pub async fn fetch_ranges(cell: &Arc<UserCell>, parts: &[&PartRef]) -> Result<Vec<bytes::Bytes>> {
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|i| (parts[*i].bundle, parts[*i].offset));
    let mut ranges: Vec<(ObjectId, std::ops::Range<u64>)> = Vec::new();
    let mut place = vec![0; parts.len()];
    for i in order {
        let part = parts[i];
        let end = part.offset + part.len;
        match ranges.last_mut() {
            Some((bundle, range)) if *bundle == part.bundle && part.offset <= range.end + GAP => {
                range.end = range.end.max(end);
            }
            _ => ranges.push((part.bundle, part.offset..end)),
        }
        place[i] = ranges.len() - 1;
    }
    let gets = ranges.iter().map(|(bundle, range)| async move {
        let key = bundle_key(&cell.name, *bundle);
        let limit = range.end - range.start;
        let got = cell.session.env.store.get(&key, Some(range.clone()), limit, Reason("load"));
        match got.await {
            Ok((_, bytes)) => Ok(bytes),
            Err(StoreError::NotFound { .. }) => Err(Error::Damaged {
                what: format!(
                    "user {}: bundle {bundle} is named but gone from the store",
                    cell.name
                ),
            }),
            Err(e) => {
                // Cut off on the way, which may pass, or lying there too short, which does not.
                let short = matches!(e, StoreError::BadBody { .. })
                    && matches!(
                        cell.session.env.store.head(&key, Reason("load")).await,
                        Ok(meta) if meta.size < range.end
                    );
                Err(match short {
                    true => too_short(cell, *bundle),
                    false => Error::store(format!("loading {}", cell.name), During::Delivery, e),
                })
            }
        }
    });
    let got = futures_util::future::try_join_all(gets).await?;
    let mut out = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let start = part.offset - ranges[place[i]].1.start;
        let slice = usize::try_from(start)
            .ok()
            .zip(usize::try_from(start + part.len).ok())
            .filter(|(_, end)| *end <= got[place[i]].len());
        let (start, end) = slice.ok_or_else(|| too_short(cell, part.bundle))?;
        out.push(got[place[i]].slice(start..end));
    }
    Ok(out)
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
        if let Some(at_cut) = at_cut {
            state.restore_locals(at_cut, index);
        }
        // What is missing must be known before anything is changed.
        if !restore
            && (self.any_missing(id, &state, &contents, large)?
                || self.unclean && self.any_torn(id, &state, &contents)?)
        {
            return Ok(true);
        }
        self.fill(id, state, contents, large, restore)?;
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.loaded = true;
            folder.pending = Vec::new();
            folder.layers = layers;
            folder.snapshot_stale = from_parts || amended;
            if restore {
                folder.burnt_below = folder.burnt_below.max(folder.uid_ceiling);
            }
        }
        self.sweep(id);
        self.follow_uids(id)?;
        Ok(false)
    }

    fn unflushed(&self, id: FolderId, key: &(Sub, NameBytes)) -> bool {
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
                    let since = if dirty { Since::everything() } else { Since::nothing(size) };
                    let local = Local { since, shipped: !dirty, object, ..Local::default() };
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
            if let Some((_, ino)) = on_disk.get(&(sub, name.clone())) {
                same_file.insert(*ino, ix);
            }
            self.tree.attach(at, name, ix);
        }
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

    pub(super) fn write_local(&self, at: Place, name: &[u8], content: &[u8]) -> Result<()> {
        let path = self.file_path(at, name);
        let disk = &*self.session.env.disk;
        disk.create_dirs(&self.cache_path(at))
            .and_then(|()| disk.replace(&path, content, false))
            .map_err(|e| Error::disk(path.display().to_string(), &e))
    }

    /// Removes what lies in the folder's metacache directory and is named nowhere: locks and
    /// temporary files of a session that died.
    fn sweep(&self, id: FolderId) {
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
                let gone =
                    if entry.is_dir { disk.remove_tree(&path) } else { disk.remove_file(&path) };
                if let Err(error) = gone {
                    tracing::warn!(%error, path = %path.display(), "leftover not removed");
                }
            }
        }
    }

    // ---- UIDs

    pub(super) fn content_of(&self, ix: usize) -> Result<Vec<u8>> {
        let node = self.node(ix)?;
        let name = node.names.first().ok_or(Plain::NotFound)?;
        let bytes = self.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
        let path = self.file_path(name.at, &bytes);
        let read = self.session.env.disk.read(&path, u64::MAX);
        read.map_err(|e| Error::disk(path.display().to_string(), &e))?
            .ok_or_else(|| Error::Damaged { what: format!("{}: vanished", path.display()) })
    }

    /// Reads what the folder's files say of UIDs, and burns those that may have been given by a
    /// session whose changes are lost.
    pub(super) fn follow_uids(&mut self, id: FolderId) -> Result<()> {
        let at = Place::own(id);
        let Some(dir) = self.tree.dir(at) else { return Ok(()) };
        let files: Vec<(NameBytes, usize)> = dir
            .entries
            .after(0)
            .filter_map(|(_, name, target)| match target {
                Target::Node(ix) => Some((name.clone(), ix)),
                _ => None,
            })
            .collect();
        let burnt = self.tree.folders.get(&id).and_then(|f| f.burnt_below);
        let mut next = None;
        for (name, ix) in files {
            if !self.tree.kind_is_local(ix) {
                continue;
            }
            let class = self.node(ix)?.class;
            match class {
                Class::Index(IndexKind::UidList | IndexKind::Log) => {
                    if let Some(burnt) = burnt {
                        self.burn(ix, at, &name, class, burnt)?;
                    }
                    let content = self.content_of(ix)?;
                    let tracker = self.track(class, &content);
                    next = next.max(User::tracker_next_uid(&tracker));
                    if let Kind::Local(local) = &mut self.node_mut(ix)?.kind {
                        local.tracker = tracker;
                    }
                }
                Class::Index(IndexKind::Snapshot) => {
                    if let Ok(header) = SnapshotHeader::parse(&self.content_of(ix)?) {
                        next = next.max(Some(header.next_uid));
                    }
                }
                Class::Index(IndexKind::UidValidity) => self.follow_uidvalidity(at, &name)?,
                _ => {}
            }
        }
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.next_uid = folder.next_uid.max(next);
        }
        Ok(())
    }

    /// Raises next-UID in a file of Dovecot's.
    fn burn(&mut self, ix: usize, at: Place, name: &[u8], class: Class, burnt: u32) -> Result<()> {
        let content = self.content_of(ix)?;
        let raised = match class {
            Class::Index(IndexKind::UidList) => match uidlist::parse(&content) {
                Ok(list) if list.next_uid() >= burnt => return Ok(()),
                Ok(_) => match uidlist::raise_next_uid(&content, burnt) {
                    Ok(raised) => raised,
                    Err(error) => {
                        return Err(Error::Damaged {
                            what: format!("user {}: uidlist: {error}", self.name),
                        });
                    }
                },
                // Dovecot makes a new one, with a new UIDVALIDITY.
                Err(_) => return Ok(()),
            },
            _ => match recover::raise_next_uid(&content, burnt) {
                Ok(append) => {
                    let mut raised = content.clone();
                    raised.truncate(append.at);
                    raised.extend_from_slice(&append.bytes);
                    raised
                }
                Err(recover::RecoverError::NoUidValidity) => return Ok(()),
                Err(error) => {
                    tracing::error!(user = %self.name, %error, "next-UID cannot be raised");
                    return Err(Error::Damaged {
                        what: format!("user {}: index log: {error}", self.name),
                    });
                }
            },
        };
        if raised == content {
            return Ok(());
        }
        self.write_local(at, name, &raised)?;
        let size = raised.len() as u64;
        if let Some(node) = self.tree.nodes.get_mut(ix) {
            node.size = size;
            if let Kind::Local(local) = &mut node.kind {
                local.since = Since::everything();
                local.file = None;
            }
        }
        let lines = self.node_lines(ix);
        self.commit(lines)?;
        self.important();
        Ok(())
    }

    fn follow_uidvalidity(&mut self, at: Place, name: &[u8]) -> Result<()> {
        let Some(value) = uidvalidity::parse(name) else { return Ok(()) };
        self.uidvalidity = self.uidvalidity.max(Some(value));
        let Some(burnt) = self.uidvalidity_burnt.filter(|burnt| *burnt > value) else {
            return Ok(());
        };
        let new = uidvalidity::format(burnt);
        // The ceiling was raised beyond this before the user was opened.
        match self.rename(at, name, at, new.as_bytes(), true) {
            Ok(()) => Ok(()),
            Err(super::need::Stop::Error(error)) => Err(error),
            Err(super::need::Stop::Wait(_)) => {
                Err(Error::Internal("the uidvalidity ceiling was not raised".into()))
            }
        }
    }

    /// Appends to an index log of this user what a recovery made, and remembers it.
    pub(super) fn append_log(&mut self, ix: usize, append: &recover::LogAppend) -> Result<()> {
        if append.bytes.is_empty() {
            return Ok(());
        }
        let name = self.node(ix)?.names.first().ok_or(Plain::NotFound)?;
        let bytes = self.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
        let mut content = self.content_of(ix)?;
        content.truncate(append.at);
        content.extend_from_slice(&append.bytes);
        self.write_local(name.at, &bytes, &content)?;
        let size = content.len() as u64;
        let class = self.node(ix)?.class;
        let tracker = self.track(class, &content);
        let next = User::tracker_next_uid(&tracker);
        let node = self.node_mut(ix)?;
        node.size = size;
        if let Kind::Local(local) = &mut node.kind {
            local.since = Since::everything();
            local.tracker = tracker;
            local.file = None;
        }
        if let Some(folder) = self.tree.folders.get_mut(&name.at.folder) {
            folder.next_uid = folder.next_uid.max(next);
        }
        let lines: Vec<Change> = self.node_lines(ix);
        self.commit(lines)?;
        self.important();
        Ok(())
    }

    pub(super) fn index_content(&self, ix: usize) -> Result<Vec<u8>> {
        self.content_of(ix)
    }
}

/// The final meaning of lines, with names in the order of their first appearance.
#[derive(Default)]
pub(super) struct Final {
    dirs: [Option<Attrs>; 4],
    order: Vec<Option<(Sub, NameBytes, Entry)>>,
    /// Places in `order` by name.
    at: HashTable<u32>,
    hasher: RandomState,
}

impl Final {
    fn len(&self) -> usize {
        self.at.len()
    }

    fn apply(&mut self, line: Line) {
        match line {
            Line::Dir { sub, attrs } => self.dirs[sub as usize] = Some(attrs),
            Line::NoDir { sub } => self.dirs[sub as usize] = None,
            Line::Set { sub, name, entry } => self.set(sub, name.into(), entry),
            Line::Unset { sub, name } => self.unset(sub, &name),
        }
    }

    fn set(&mut self, sub: Sub, name: NameBytes, entry: Entry) {
        let (order, hasher) = (&mut self.order, &self.hasher);
        let hash = hasher.hash_one((sub, &*name));
        let found = self.at.find(hash, |i| is_at(order, *i, sub, &name)).copied();
        if let Some(i) = found {
            order[i as usize] = Some((sub, name, entry));
            return;
        }
        order.push(Some((sub, name, entry)));
        // No listing has so many lines.
        let i = u32::try_from(order.len() - 1).unwrap_or(u32::MAX);
        self.at.insert_unique(hash, i, |i| match &order[*i as usize] {
            Some((sub, name, _)) => hasher.hash_one((*sub, &**name)),
            None => 0,
        });
    }

    fn unset(&mut self, sub: Sub, name: &[u8]) {
        let order = &mut self.order;
        let hash = self.hasher.hash_one((sub, name));
        if let Ok(found) = self.at.find_entry(hash, |i| is_at(order, *i, sub, name)) {
            order[found.remove().0 as usize] = None;
        }
    }

    pub fn names(&self) -> impl Iterator<Item = (Sub, &NameBytes, &Entry)> {
        self.order.iter().flatten().map(|(sub, name, entry)| (*sub, name, entry))
    }

    fn into_names(self) -> impl Iterator<Item = (Sub, NameBytes, Entry)> {
        self.order.into_iter().flatten()
    }

    fn locals(&self, which: impl Fn(Sub, &[u8]) -> bool) -> Vec<(Sub, NameBytes, Entry)> {
        self.names()
            .filter(|(sub, name, entry)| matches!(entry, Entry::Local { .. }) && which(*sub, name))
            .map(|(sub, name, entry)| (sub, name.clone(), entry.clone()))
            .collect()
    }

    /// Local files of a kind are those given and no others.
    fn restore_locals(
        &mut self,
        locals: Vec<(Sub, NameBytes, Entry)>,
        which: impl Fn(Sub, &[u8]) -> bool,
    ) {
        for (sub, name, _) in self.locals(which) {
            self.unset(sub, &name);
        }
        for (sub, name, entry) in locals {
            self.set(sub, name, entry);
        }
    }
}

fn is_at(order: &[Option<(Sub, NameBytes, Entry)>], i: u32, sub: Sub, name: &[u8]) -> bool {
    matches!(&order[i as usize], Some((s, n, _)) if *s == sub && **n == *name)
}
