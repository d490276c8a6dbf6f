//! Eviction: index files leave the local disk when the metacache is full.
//!
//! What goes together is one user's files of one priority, in the order of the cleanup weights
//! ([`crate::cache::weight`]). First the user is flushed, caches included; then, under its lock, each
//! file that the parts of its folder hold exactly as it is, and that nobody has open, is removed.
//! Its node stays as it was, inode number, attributes and what the kernel has cached of it; the
//! next open brings the bytes back from the parts ([`super::restore`]).
//!
//! The folder's listing snapshot is removed before the first file: without it the next start reads
//! the folder from its parts, and misses nothing on the disk. So a death in between is harmless.
//!
//! The root of a user (priority 0) goes with everything else it has, its state included, once it
//! is closed ([`super::idle`]); a user whose root cannot be closed loses only those of its root's
//! files that nobody has open.
//!
//! What could not be evicted rests for a while, and the next one is tried.

use super::build::build_folders;
use super::error::{Error, Result};
use super::flush::{self, Options};
use super::local;
use super::node::{Kind, Node, NodeIx, Since};
use super::publish::blocking;
use super::session::{CellState, Session, UserCell};
use super::tree::{Folder, Tree};
use super::user::User;
use super::{idle, open};
use crate::cache::metacache::{DIR, Purpose, of_file};
use crate::cache::weight::PRIORITIES;
use crate::dovecot::classes;
use crate::format::{FolderId, Place, Sub};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Longest time between two looks.
const TICK: Duration = Duration::from_secs(10);
/// A unit that gave nothing is not tried again for so long; one that failed neither.
const REST: Duration = Duration::from_secs(10);
/// The same while somebody waits for room and nothing else is left to try.
const SHORT_REST: Duration = Duration::from_millis(500);

type Resting = HashMap<(Arc<str>, usize), Duration>;

/// Runs until the session closes.
pub async fn run(session: Arc<Session>) {
    let resting: Mutex<Resting> = Mutex::default();
    loop {
        tokio::select! {
            () = session.metacache.pressed.notified() => {}
            () = session.env.clock.sleep(TICK) => {}
        }
        while session.metacache.excess() > 0 {
            if session.is_closing() {
                return;
            }
            if !round(&session, &resting).await {
                session.env.clock.sleep(SHORT_REST).await;
                break;
            }
        }
        if session.is_closing() {
            return;
        }
    }
}

/// Evicts what is to go first, several users at a time. False if nothing was there to try.
async fn round(session: &Arc<Session>, resting: &Mutex<Resting>) -> bool {
    let now = session.env.clock.boot();
    resting.lock().retain(|_, until| now < *until);
    let excess = session.metacache.excess();
    let (mut chosen, mut sum) = (Vec::new(), 0);
    for unit in session.metacache.units() {
        if sum >= excess || chosen.len() >= session.settings.max_flushes.max(1) {
            break;
        }
        if resting.lock().contains_key(&(unit.user.clone(), unit.priority)) {
            continue;
        }
        sum += unit.bytes;
        chosen.push(unit);
    }
    let mut running = tokio::task::JoinSet::new();
    let tried = !chosen.is_empty();
    for unit in chosen {
        let Some(cell) = session.user_by_name(&unit.user) else {
            // Nobody of this layout: files of an earlier one. They are counted, and stay.
            resting.lock().insert((unit.user, unit.priority), now + REST);
            continue;
        };
        running.spawn(async move {
            let freed = evict_unit(&cell, unit.priority).await;
            (unit, freed)
        });
    }
    while let Some(done) = running.join_next().await {
        let Ok((unit, freed)) = done else { continue };
        match freed {
            Ok(freed) if freed > 0 => {
                session.counts.evicted(unit.priority, freed);
                tracing::info!(
                    user = %unit.user, priority = unit.priority, bytes = freed, weight = unit.weight,
                    "evicted from the metacache"
                );
                session.metacache.freed.notify_waiters();
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(user = %unit.user, %error, "not evicted from the metacache");
            }
        }
        let until = session.env.clock.boot() + REST;
        resting.lock().insert((unit.user, unit.priority), until);
    }
    tried
}

/// What is loaded of the user meanwhile is loaded to make room.
struct Making<'a>(&'a UserCell);

impl Making<'_> {
    fn new(cell: &UserCell) -> Making<'_> {
        cell.makes_room.fetch_add(1, Ordering::AcqRel);
        Making(cell)
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.makes_room.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Evicts a user's files of one priority, as far as nobody has them open. Gives the bytes that
/// were freed.
pub async fn evict_unit(cell: &Arc<UserCell>, priority: usize) -> Result<u64> {
    let account = cell.session.metacache.account(&cell.name);
    let sum = || account.bytes().iter().sum::<u64>();
    let before = sum();
    if cell.opening.try_lock().is_err() {
        return Ok(0);
    }
    // Somebody loads a folder of it, and perhaps waits for the room that others must give. A flush
    // might wait for the same; what is flushed already can go. If it stayed, users who all wait for
    // room would keep from one another what none of them has open.
    if cell.loading.try_lock().is_err() {
        cell.if_open(|user| user.evict(priority, What::Loaded)).transpose()?;
        return Ok(before.saturating_sub(sum()));
    }
    let _making = Making::new(cell);
    let closed = |cell: &UserCell| matches!(*cell.state.lock(), CellState::Closed);
    if closed(cell) && !evict_closed(cell, priority).await? {
        // Its last session did not end well: what it left is flushed first.
        open::open_now(cell, Purpose::Flush).await?;
    }
    if priority == 0 && !closed(cell) {
        idle::close_unused(cell).await?;
        if closed(cell) {
            evict_closed(cell, 0).await?;
        }
    }
    if !closed(cell) {
        flush::flush(cell, Options { caches: true, ..Options::default() }).await?;
        cell.if_open(|user| user.evict(priority, What::All)).transpose()?;
    }
    Ok(before.saturating_sub(sum()))
}

/// Which folders files are evicted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    All,
    /// Those in memory. What lies on the disk of others may be what is being loaded.
    Loaded,
}

/// Removes a file; true if it was there.
fn remove(user: &str, path: &Path, removed: io::Result<()>) -> Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::disk(format!("user {user}: {}", path.display()), &e)),
    }
}

impl User {
    /// Whether a file can be brought back from the parts exactly as it is, and is not in use.
    fn can_go(&self, folder: &Folder, node: &Node) -> bool {
        let Kind::Local(local) = &node.kind else { return false };
        let [name] = node.names.all() else { return false };
        let Some(bytes) = self.tree.name_bytes(*name) else { return false };
        let in_parts = local.shipped && local.since == Since::nothing(node.size);
        let flushed = !folder.unflushed.names.contains(&(name.at.sub, bytes.clone()));
        let idle = node.handles == 0 && local.file.is_none() && node.nlink == 1;
        idle && in_parts
            && flushed
            && !local.evicted
            && node.size > 0
            && !node.class.is_local_only()
    }

    /// Evicts the files of one priority. What is not flushed, or open, stays.
    pub(super) fn evict(&mut self, priority: usize, what: What) -> Result<()> {
        self.may_write()?;
        // What is being flushed counts as unchanged, and is in no part yet.
        if self.cut_out.is_some() {
            return Ok(());
        }
        let ids: Vec<FolderId> = self.tree.folders.keys().copied().collect();
        for id in ids {
            if self.priority_on_disk(id)? != priority {
                continue;
            }
            let Some(folder) = self.tree.folders.get(&id) else { continue };
            if folder.parts.is_empty() {
                continue;
            }
            if folder.loaded {
                self.evict_loaded(id)?;
            } else if what == What::All && folder.unflushed.is_empty() {
                self.evict_unloaded(id, priority)?;
            }
        }
        Ok(())
    }

    /// The priority of a folder, of one that is not loaded by what lies on the disk.
    fn priority_on_disk(&mut self, id: FolderId) -> Result<usize> {
        let Some(folder) = self.tree.folders.get(&id) else { return Ok(0) };
        if folder.loaded {
            return Ok(self.priority(id));
        }
        let dirs = self.tree.path(Place::own(id));
        let dirs: Vec<&[u8]> = dirs.iter().map(|n| &**n).collect();
        let dir = self.cache_path(Place::own(id));
        let found = self.session.disk().list(&dir);
        let found = found.map_err(|e| Error::disk(dir.display().to_string(), &e))?;
        let names = found.iter().map(|e| e.name.as_bytes());
        let soon = &self.session.settings.metacache.soon;
        Ok(usize::from(classes::folder_priority(&dirs, names, soon)))
    }

    fn evict_loaded(&mut self, id: FolderId) -> Result<()> {
        let Some(folder) = self.tree.folders.get(&id) else { return Ok(()) };
        let can_go =
            |ix: &NodeIx| self.tree.nodes.get(*ix).is_some_and(|node| self.can_go(folder, node));
        let going: Vec<NodeIx> = self.nodes_of(id).into_iter().filter(can_go).collect();
        if going.is_empty() {
            return Ok(());
        }
        self.drop_snapshot(id)?;
        for ix in going {
            let Some(name) = self.tree.nodes.get(ix).and_then(|n| n.names.first()) else {
                continue;
            };
            let Some(bytes) = self.tree.name_bytes(name).cloned() else { continue };
            let path = self.file_path(name.at, &bytes);
            let gone = remove(&self.name, &path, self.session.disk().remove_file(&path));
            if let Some(node) = self.tree.nodes.get_mut(ix)
                && let Kind::Local(local) = &mut node.kind
                && gone.is_ok()
            {
                local.evicted = true;
            }
            self.recharge(ix);
            gone?;
        }
        for sub in [Sub::Cur, Sub::New, Sub::Tmp, Sub::Own] {
            let dir = self.cache_path(Place { folder: id, sub });
            let disk = self.session.disk();
            let failed = |e: io::Error| Error::disk(dir.display().to_string(), &e);
            if dir != self.cache_dir
                && disk.is_dir(&dir).map_err(failed)?
                && disk.list(&dir).map_err(failed)?.is_empty()
            {
                disk.remove_tree(&dir).map_err(failed)?;
                self.space.account.release(0, DIR);
            }
        }
        Ok(())
    }

    fn evict_unloaded(&mut self, id: FolderId, priority: usize) -> Result<()> {
        self.drop_snapshot(id)?;
        for sub in Sub::ALL {
            let dir = self.cache_path(Place { folder: id, sub });
            let (freed, dir_gone) = remove_files(self.session.disk(), &self.name, &dir)?;
            self.space.account.release(priority, freed);
            if dir_gone {
                self.space.account.release(0, DIR);
            }
        }
        Ok(())
    }

    /// The next start reads the folder from its parts.
    fn drop_snapshot(&mut self, id: FolderId) -> Result<()> {
        let path = self.snapshot_path(id);
        let gone = remove(&self.name, &path, self.session.disk().remove_file(&path));
        self.snapshots.remove(&id);
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.snapshot_stale = true;
        }
        if gone? {
            self.recount_state();
        }
        Ok(())
    }

    /// Whether a file of a folder is evicted.
    pub(super) fn has_evicted(&self, id: FolderId) -> bool {
        let evicted = |ix: &NodeIx| {
            matches!(
                self.tree.nodes.get(*ix).map(|n| &n.kind),
                Some(Kind::Local(local)) if local.evicted
            )
        };
        self.nodes_of(id).iter().any(evicted)
    }
}

/// Removes the files of a directory, and the directory if nothing else is in it. Gives what they
/// took, and whether the directory is gone.
fn remove_files(
    disk: &dyn crate::cache::disk::Disk,
    user: &str,
    dir: &Path,
) -> Result<(u64, bool)> {
    let failed = |e: io::Error| Error::disk(dir.display().to_string(), &e);
    if !disk.is_dir(dir).map_err(failed)? {
        return Ok((0, false));
    }
    let (mut freed, mut dirs) = (0, 0);
    for entry in disk.list(dir).map_err(failed)? {
        if entry.is_dir {
            dirs += 1;
            continue;
        }
        let path = dir.join(&entry.name);
        if remove(user, &path, disk.remove_file(&path))? {
            freed += of_file(entry.len);
        }
    }
    if dirs == 0 {
        disk.remove_tree(dir).map_err(failed)?;
    }
    Ok((freed, dirs == 0))
}

/// Evicts from a user that is not open, if its local state holds nothing that the store does not
/// have. False if it does.
pub(super) async fn evict_closed(cell: &Arc<UserCell>, priority: usize) -> Result<bool> {
    let _still = cell.opening.lock().await;
    if !matches!(*cell.state.lock(), CellState::Closed) {
        return Ok(true);
    }
    let same = cell.clone();
    blocking(move || evict_left(&same, priority)).await?
}

/// Whether the store has everything that a closed user left on the local disk.
pub(super) async fn is_settled(cell: &Arc<UserCell>) -> Result<bool> {
    let session = cell.session.clone();
    let (name, state) = (cell.name.clone(), session.state_dir_of(&cell.name));
    let look = move || {
        let found = local::read(session.disk(), &state, &name, &session.settings.boot_id)?;
        settled(session.disk(), &state, found.as_ref())
    };
    blocking(look).await?
}

fn settled(
    disk: &dyn crate::cache::disk::Disk,
    state: &Path,
    found: Option<&local::LocalState>,
) -> Result<bool> {
    let failed = |e: io::Error| Error::disk("evicting", &e);
    Ok(match found {
        Some(found) => {
            found.stamp.clean
                && found.last_seq <= found.stamp.flushed_seq
                && found.head.owner.is_none()
                && !found.stamp.recovering
                && disk.list(&state.join("pending")).map_err(failed)?.is_empty()
        }
        None => !disk.exists(&state.join("journal")).map_err(failed)?,
    })
}

/// Where a closed user's things lie.
struct Left {
    state: PathBuf,
    cache: PathBuf,
}

fn evict_left(cell: &Arc<UserCell>, priority: usize) -> Result<bool> {
    let session = &cell.session;
    let disk = session.disk();
    let left =
        Left { state: session.state_dir_of(&cell.name), cache: session.cache_dir_of(&cell.path) };
    let failed = |e: io::Error| Error::disk("evicting", &e);
    let found = local::read(disk, &left.state, &cell.name, &session.settings.boot_id)?;
    if !settled(disk, &left.state, found.as_ref())? {
        return Ok(false);
    }
    match found {
        Some(found) if priority > 0 => left.remove_priority(cell, &found.head, priority)?,
        // Without a head nothing says whose flush the index files are from.
        _ => left.remove(disk)?,
    }
    if session.count_closed(cell).map_err(failed)?.bytes == [0; PRIORITIES] {
        session.metacache.forget(&cell.name);
    }
    Ok(true)
}

impl Left {
    /// State first: index files without it are removed by the next opening.
    fn remove(&self, disk: &dyn crate::cache::disk::Disk) -> Result<()> {
        local::put_aside(disk, &self.state, &self.cache, None)
    }

    fn remove_priority(
        &self,
        cell: &Arc<UserCell>,
        head: &crate::format::head::Head,
        priority: usize,
    ) -> Result<()> {
        let disk = cell.session.disk();
        let mut tree = Tree::default();
        build_folders(cell, head, &mut tree)?;
        let soon = &cell.session.settings.metacache.soon;
        // Those below others first, so that empty directories can go.
        let mut ids: Vec<FolderId> = tree.folders.keys().copied().collect();
        ids.sort_by_key(|id| std::cmp::Reverse(tree.depth(Place::own(*id))));
        for id in ids {
            let path = tree.path(Place::own(id));
            let dir = path
                .iter()
                .fold(self.cache.clone(), |dir, name| dir.join(std::ffi::OsStr::from_bytes(name)));
            let found = disk.list(&dir).map_err(|e| Error::disk("evicting", &e))?;
            let dirs: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
            let names = found.iter().map(|e| e.name.as_bytes());
            if usize::from(classes::folder_priority(&dirs, names, soon)) != priority {
                continue;
            }
            let snapshot = self.state.join("listing").join(id.to_string());
            remove(&cell.name, &snapshot, disk.remove_file(&snapshot))?;
            for sub in [Sub::Cur, Sub::New, Sub::Tmp] {
                remove_files(disk, &cell.name, &dir.join(sub.as_str()))?;
            }
            remove_files(disk, &cell.name, &dir)?;
        }
        Ok(())
    }
}
