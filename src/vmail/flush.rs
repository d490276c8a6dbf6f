//! Flushing: a user's changes go to the store as one bundle, and the head is swapped.
//!
//! # Order, and what a death in between leaves
//!
//! 1. The cut (see [`super::cut`]).
//! 2. Large files are put, then the bundle. A death here leaves objects that no head names;
//!    their ids are of our epoch and gc knows them by it.
//! 3. The journal is synced, so that this disk never knows less than a head in the store.
//!    `head.next` is written locally, the head is swapped by compare-and-swap, `head` is
//!    written. A death around the swap leaves both candidates here, and the store tells by the
//!    write id which one holds.
//!
//! The head names only what is up already, so no reader ever meets a part that is missing. One
//! swap makes the changes of any number of folders visible at once: a MOVE is in both or in
//! neither. A swap that does not hold means that another session has taken the user: from
//! then on nothing is written here (ESTALE).
//!
//! An index that its server is just making anew is waited for ([`super::reset`]).
//!
//! A flush costs two requests, and one more for each large file.

use super::ceilings::{self, VALIDITY_ROOM};
use super::close::Leaving;
use super::cut::{Cut, Extent, copy};
use super::error::{During, Error, Result, pass};
use super::local::encode_stamped;
use super::open::intend;
use super::promise;
use super::publish::blocking;
use super::session::{CellState, UserCell};
use super::swap::swap_head;
use super::wait::Patience;
use super::{close, dropped, later, load, need, parts, restore};
use crate::cache::metacache::Purpose;
use crate::failpoint;
use crate::format::head::{Head, HeadFolder, PartKind, PartRef};
use crate::format::key::{bundle_key, file_key};
use crate::format::part::{
    BundleWriter, Dropped, DroppedList, DroppedRow, encode_dropped, encode_head_part, encode_names,
    encode_part,
};
use crate::format::{FolderId, ObjectId, Place};
use crate::sabotage::{self, Bug};
use crate::store::{Body, PutMode, Reason};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// What a flush is for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Caches travel, too.
    pub caches: bool,
    /// The user is handed over: the head says that nobody owns it.
    pub release: bool,
    /// Only if something important waits.
    pub important_only: bool,
}

/// What a flush did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    pub flushed: bool,
    pub folders: usize,
    pub bytes: u64,
}

/// A cut that keeps being disturbed is given up after so many tries, until the next flush.
const TRIES: u32 = 8;
/// How long the second try waits, and each further one twice as long: on a busy machine a mail
/// server may write something into each of several copies that are begun at once.
const PAUSE: Duration = Duration::from_millis(10);
/// Segments of the dropped list before they are written anew as one.
const DROPPED_CHAIN: usize = 64;

/// Flushes a user that is open.
pub async fn flush(cell: &Arc<UserCell>, options: Options) -> Result<Report> {
    let _one = cell.flushing.lock().await;
    if matches!(*cell.state.lock(), CellState::Open(_)) {
        close::reclaim(cell).await?;
    }
    flush_alone(cell, options).await
}

pub(super) async fn flush_alone(cell: &Arc<UserCell>, options: Options) -> Result<Report> {
    let session = &cell.session;
    let begun = session.env.clock.boot();
    let done = flush_changes(cell, options).await;
    session.counts.flushed(session.env.clock.boot().saturating_sub(begun), &done);
    done
}

async fn flush_changes(cell: &Arc<UserCell>, options: Options) -> Result<Report> {
    let Some(wanted) = cell.if_open(|user| {
        if user.lost {
            return Err(Error::Lost { user: user.name.to_string() });
        }
        if !user.ready {
            return Ok(false);
        }
        let changed = if options.important_only {
            user.changes.important.is_some() && user.has_unflushed()
        } else {
            user.has_unflushed() || options.caches && user.caches_wait()
        };
        Ok(changed || options.release)
    }) else {
        return Ok(Report::default());
    };
    if !wanted? {
        return Ok(Report::default());
    }
    if cell.open_user(|user| user.remake_state())? {
        save_head(cell, false).await?;
    }
    for tried in 0..TRIES {
        for folder in cell.open_user(|user| Ok(user.unloaded_changes()))? {
            load::load_for(cell, folder, Purpose::Flush).await?;
        }
        // What is in no index yet would be in none after the loss of the machine.
        later::show_later_mails(cell, Purpose::Flush).await?;
        know_layers(cell).await?;
        match attempt(cell, options, tried + 1 == TRIES).await {
            Ok(Some(report)) => return Ok(report),
            Ok(None) => cell.session.env.clock.sleep(PAUSE.saturating_mul(1 << tried)).await,
            Err(Error::Vanished { folder, .. }) => {
                restore::restore_for(cell, folder, Purpose::Flush).await?;
            }
            Err(error) => return Err(error),
        }
    }
    Err(Error::Full(format!(
        "user {}: index files change faster than they can be copied",
        cell.name
    )))
}

/// Reads what the diffs of large folders hold that an earlier session wrote. Without it the next
/// part is a base, which is always right.
async fn know_layers(cell: &Arc<UserCell>) -> Result<()> {
    for (folder, unknown) in cell.open_user(|user| Ok(user.unknown_layers()))? {
        let refs: Vec<&PartRef> = unknown.iter().map(|(_, part)| part).collect();
        let frames = match parts::fetch_ranges_for(cell, &refs, Reason("flush")).await {
            Ok(frames) => frames,
            Err(error) => {
                tracing::warn!(user = %cell.name, %folder, %error, "a folder is written anew as its diffs cannot be read");
                continue;
            }
        };
        let name = cell.name.clone();
        let read = move || {
            let both = unknown.into_iter().zip(frames);
            both.map(|((n, part), raw)| Ok((n, parts::read_layer(&name, &part, &raw)?, part)))
                .collect::<Result<Vec<_>>>()
        };
        match blocking(read).await? {
            Ok(layers) => cell.open_user(|user| {
                let Some(found) = user.tree.folders.get_mut(&folder) else { return Ok(()) };
                for (n, layer, part) in layers {
                    if found.parts.get(n + 1) == Some(&part)
                        && let Some(unknown) = found.layers.get_mut(n)
                    {
                        *unknown = Some(layer);
                    }
                }
                Ok(())
            })?,
            Err(error) => {
                tracing::warn!(user = %cell.name, %folder, %error, "a folder is written anew as its diffs cannot be read");
            }
        }
    }
    Ok(())
}

/// `None`: to be tried again. The `last` time, what cannot be waited for is taken as it is.
async fn attempt(cell: &Arc<UserCell>, options: Options, last: bool) -> Result<Option<Report>> {
    let extent = Extent { caches: options.caches };
    let cut = cell.open_user(|user| {
        user.may_finish()?;
        if let Some(folder) = user.unshown() {
            return Err(Error::Vanished {
                folder,
                what: "what came later is not shown yet".into(),
            });
        }
        if let Some(folder) = user.being_reset()? {
            if !last {
                return Ok(None);
            }
            let folder = user.tree.path(Place::own(folder)).join(&b'/');
            tracing::warn!(
                user = %user.name, folder = %String::from_utf8_lossy(&folder),
                "an index was begun anew and not finished: it is flushed as it is"
            );
        }
        user.mend_journal()?;
        let (unflushed, number) = (user.has_unflushed(), user.number_of_changes());
        let cut = user.cut(extent)?;
        user.cut_out = Some(cut.under_way(unflushed, number));
        if options.release {
            user.leaving = Leaving::Sealed;
        }
        Ok(Some(cut))
    })?;
    let Some(cut) = cut else { return Ok(None) };
    let lines: usize = cut.folders.iter().map(|folder| folder.lines.len()).sum();
    let (cut, done) = send(cell, cut, options).await;
    match done {
        Ok(Some((head, tag, parts, report))) => {
            let clean = cell.open_user(|user| {
                user.flushed_seq = cut.seq;
                user.settle_cut(cut, &parts);
                user.take_head(head, tag);
                user.handed_over = None;
                Ok(options.release && !user.has_unflushed())
            })?;
            save_head(cell, clean).await?;
            compact_journal(cell)?;
            if lines > load::MANY {
                crate::memory::give_back();
            }
            Ok(Some(report))
        }
        Ok(None) => {
            cell.if_open(|user| {
                user.undo_cut(cut);
                user.unseal();
            });
            Ok(None)
        }
        Err(error) => {
            cell.if_open(|user| {
                user.lost |= matches!(error, Error::Lost { .. });
                user.undo_cut(cut);
                user.unseal();
            });
            Err(error)
        }
    }
}

/// A journal longer than this is begun anew after a flush.
const JOURNAL_LIMIT: u64 = 8 * 1024 * 1024;

fn compact_journal(cell: &Arc<UserCell>) -> Result<()> {
    cell.open_user(|user| {
        let listed: usize = user
            .tree
            .folders
            .values()
            .filter(|f| f.loaded && f.snapshot_stale)
            .flat_map(|f| f.dirs().map(|(_, d)| d.entries.len()))
            .sum();
        // Writing snapshots costs their size: worth it once the journal has as much.
        let worth = JOURNAL_LIMIT.max(listed as u64 * 200);
        if user.journal.size() > worth { user.checkpoint() } else { Ok(()) }
    })
}

type Sent = (Head, crate::store::ETag, HashMap<FolderId, PartRef>, Report);

async fn send(cell: &Arc<UserCell>, cut: Cut, options: Options) -> (Cut, Result<Option<Sent>>) {
    let cut = Arc::new(cut);
    let result = send_cut(cell, &cut, options).await;
    match Arc::try_unwrap(cut) {
        Ok(cut) => (cut, result),
        // Every task that shared it has ended.
        Err(shared) => {
            let cut = wait_alone(shared).await;
            (cut, result)
        }
    }
}

async fn wait_alone(mut shared: Arc<Cut>) -> Cut {
    loop {
        match Arc::try_unwrap(shared) {
            Ok(cut) => return cut,
            Err(again) => {
                shared = again;
                tokio::task::yield_now().await;
            }
        }
    }
}

async fn send_cut(cell: &Arc<UserCell>, cut: &Arc<Cut>, options: Options) -> Result<Option<Sent>> {
    let session = &cell.session;
    let store = &session.env.store;
    let failed = |e| Error::store(format!("flushing {}", cell.name), During::Delivery, e);
    for file in cut.folders.iter().flat_map(|f| &f.files) {
        let Some(id) = file.large else { continue };
        let (reader, len) = (file.file.clone(), file.len);
        let bytes =
            blocking(move || reader.read_exact_at(0, usize::try_from(len).unwrap_or(usize::MAX)))
                .await?;
        let Ok(bytes) = bytes else { return Ok(None) };
        let body = Body::Bytes(Bytes::from(bytes));
        let key = file_key(&cell.name, id);
        store.put(&key, body, PutMode::Overwrite, &[], Reason("flush")).await.map_err(failed)?;
    }
    let (old, tag) = cell.open_user(|user| Ok((user.head.clone(), user.etag.clone())))?;
    let old_dropped = if old.dropped.len() >= DROPPED_CHAIN {
        Some(dropped::read(cell, &old.dropped, Reason("flush")).await?)
    } else {
        None
    };
    let now = session.store_time();
    let built = {
        let (cut, old) = (cut.clone(), old.clone());
        blocking(move || build(&cut, &old, now, old_dropped)).await??
    };
    let Some((bundle, mut head, parts)) = built else { return Ok(None) };
    if !cell.open_user(|user| Ok(user.unchanged(cut)))? {
        return Ok(None);
    }
    promise::keep_all(cell).await?;
    let report = Report { flushed: true, folders: parts.len(), bytes: bundle.len() as u64 };
    let body = Body::Bytes(bundle);
    let key = bundle_key(&cell.name, cut.bundle);
    pass(failpoint::FLUSH_BEFORE_BUNDLE)?;
    if !sabotage::is(Bug::HeadBeforeBundle) {
        let put = store.put(&key, body.clone(), PutMode::Overwrite, &[], Reason("flush"));
        put.await.map_err(failed)?;
    }
    pass(failpoint::FLUSH_AFTER_BUNDLE)?;
    head.write_id = new_write_id(cell);
    if options.release {
        head.owner = None;
    }
    let (dir, stamp, point) = cell.open_user(|user| {
        Ok((user.state_dir.clone(), user.stamp(cut.seq, false), user.journal.sync_point()))
    })?;
    if let Some(point) = point {
        blocking(move || point.sync()).await??;
    }
    intend(cell, &dir, &head, &stamp).await?;
    pass(failpoint::FLUSH_BEFORE_SWAP)?;
    if options.release {
        cell.open_user(|user| {
            user.handed_over = Some(head.write_id.clone());
            Ok(())
        })?;
    }
    let swapped = swap_head(cell, &head, Some(tag), Reason("flush")).await?;
    pass(failpoint::FLUSH_AFTER_SWAP)?;
    match swapped {
        Some(tag) => {
            if sabotage::is(Bug::HeadBeforeBundle) {
                let put = store.put(&key, body, PutMode::Overwrite, &[], Reason("flush"));
                put.await.map_err(failed)?;
            }
            Ok(Some((head, tag, parts, report)))
        }
        None => Err(lost(cell)),
    }
}

pub(super) fn lost(cell: &UserCell) -> Error {
    tracing::error!(user = %cell.name, "another session has taken this user; nothing is written any more");
    Error::Lost { user: cell.name.to_string() }
}

pub(super) fn new_write_id(cell: &UserCell) -> String {
    let random = &cell.session.env.random;
    format!("{:016x}{:016x}", random.u64(), random.u64())
}

type Built = (Bytes, Head, HashMap<FolderId, PartRef>);

/// Makes the bundle and the head that names it. `None`: a file changed under the cut.
fn build(
    cut: &Cut,
    old: &Head,
    now: i64,
    old_dropped: Option<DroppedList>,
) -> Result<Option<Built>> {
    let mut bundle = BundleWriter::new(cut.bundle);
    let mut parts = HashMap::new();
    for folder in &cut.folders {
        let Some(part) = copy(folder)? else { return Ok(None) };
        let frame = encode_part(&part, &folder.path);
        parts.insert(folder.id, bundle.add(folder.kind, &frame));
    }
    let mut head = old.clone();
    head.folders = cut.tree.clone();
    for folder in &cut.folders {
        if let (Some(named), Some(part)) =
            (head.folders.iter_mut().find(|f| f.id == folder.id), parts.get(&folder.id))
        {
            named.parts.truncate(folder.keep);
            named.parts.push(part.clone());
        }
    }
    head.root_owner = cut.owner;
    head.root_mode = cut.root_mode;
    raise(&mut head, &cut.next_uids, cut.uidvalidity);
    if cut.uidvalidity >= old.uidvalidity_burnt {
        head.uidvalidity_burnt = None;
    }
    if let Some(all) = &cut.all_links {
        head.names = vec![bundle.add(PartKind::Base, &encode_names(all))];
    } else if !cut.links.is_empty() {
        let kind = if head.names.is_empty() { PartKind::Base } else { PartKind::Diff };
        head.names.push(bundle.add(kind, &encode_names(&cut.links)));
    }
    head.watermark = cut.watermark;
    head.known_above = cut.known_above.clone();
    head.written = now;
    if let (Some(end), Some(closed)) = (cut.closed_end, head.closed.last_mut()) {
        closed.end = closed.end.max(end);
    }
    let mails = cut.dropped.iter().map(|tail| Dropped::Mail(tail.clone()));
    let replaced = cut.folders.iter().flat_map(|f| &f.replaced);
    let files = replaced.chain(&cut.dropped_files).map(|id| Dropped::File(*id));
    let again = cut.again.iter().map(|tail| Dropped::Mail(tail.clone()));
    let mut rows: Vec<DroppedRow> =
        again.chain(cut.deleted.iter().cloned()).map(DroppedRow::Out).collect();
    rows.extend(mails.chain(files).map(|object| DroppedRow::since(now, object)));
    if old_dropped.is_some() {
        head.dropped.clear();
    }
    // First the previous head: with the one before it, its bundle may go.
    head.previous = Some(bundle.add(PartKind::Base, &encode_head_part(&old.encode())));
    let bundles = no_longer_named(old, &head, cut.bundle);
    rows.extend(bundles.into_iter().map(|object| DroppedRow::since(now, object)));
    if let Some(mut all) = old_dropped {
        all.extend(rows);
        head.dropped = vec![bundle.add(PartKind::Base, &encode_dropped(&all.rows()))];
    } else if !rows.is_empty() {
        let kind = if head.dropped.is_empty() { PartKind::Base } else { PartKind::Diff };
        head.dropped.push(bundle.add(kind, &encode_dropped(&rows)));
    }
    Ok(Some((bundle.finish(), head, parts)))
}

/// Bundles of the old head that the new one has no use for. `bundle` is the one that is being
/// written.
pub(super) fn no_longer_named(old: &Head, new: &Head, bundle: ObjectId) -> Vec<Dropped> {
    let used = |head: &Head| -> HashSet<ObjectId> {
        let folders = head.folders.iter().flat_map(|f| &f.parts);
        folders.chain(&head.names).chain(&head.dropped).map(|p| p.bundle).collect()
    };
    let mut still = used(new);
    still.insert(bundle);
    still.extend(new.previous.as_ref().map(|p| p.bundle));
    let mut gone: Vec<ObjectId> = used(old).difference(&still).copied().collect();
    gone.extend(old.previous.as_ref().map(|p| p.bundle).filter(|b| !still.contains(b)));
    gone.sort();
    gone.dedup();
    gone.into_iter().map(Dropped::Bundle).collect()
}

/// Raises the ceilings that are too near.
fn raise(head: &mut Head, next: &HashMap<FolderId, u32>, uidvalidity: Option<u32>) {
    for folder in &mut head.folders {
        if let Some(next) = next.get(&folder.id) {
            folder.uid_ceiling = ceilings::raised_uids(folder.uid_ceiling, *next);
        }
    }
    if let Some(value) = uidvalidity {
        head.uidvalidity_ceiling = ceilings::raised(head.uidvalidity_ceiling, value, VALIDITY_ROOM);
    }
}

/// Raises ceilings by a swap of the head alone, at least for the value somebody waits for.
pub async fn raise_ceilings(
    cell: &Arc<UserCell>,
    wanted: Option<(FolderId, u32)>,
    uidvalidity: Option<u32>,
) -> Result<()> {
    let _one = cell.flushing.lock().await;
    close::reclaim(cell).await?;
    cell.open_user(|user| user.may_write())?;
    raise_ceilings_alone(cell, wanted, uidvalidity).await
}

/// The same for who holds `flushing`.
pub(super) async fn raise_ceilings_alone(
    cell: &Arc<UserCell>,
    wanted: Option<(FolderId, u32)>,
    uidvalidity: Option<u32>,
) -> Result<()> {
    if cell.open_user(|user| user.remake_state())? {
        save_head(cell, false).await?;
    }
    let (mut head, tag, dir, stamp) = cell.open_user(|user| {
        user.may_finish()?;
        if wanted.is_some_and(|(id, _)| user.has_unknown(id)) {
            let what = format!("user {}: a new folder is not flushed yet", user.name);
            return Err(Error::Crowded(what));
        }
        user.ceiling_wanted = false;
        let mut next: HashMap<FolderId, u32> =
            user.tree.folders.values().filter_map(|f| Some((f.id, f.next_uid?))).collect();
        if let Some((folder, value)) = wanted {
            let entry = next.entry(folder).or_insert(value);
            *entry = value.max(*entry);
        }
        let mut head = user.head.clone();
        // A folder whose ceiling the head does not hold gets one with its first flush, or when
        // somebody waits for it.
        let first = wanted.map(|(id, _)| id);
        let has = |f: &HeadFolder| f.uid_ceiling.is_some() || Some(f.id) == first;
        next.retain(|id, _| head.folders.iter().any(|f| f.id == *id && has(f)));
        raise(&mut head, &next, uidvalidity.max(user.uidvalidity));
        let stamp = user.stamp(user.flushed_seq, false);
        Ok((head, user.etag.clone(), user.state_dir.clone(), stamp))
    })?;
    head.write_id = new_write_id(cell);
    intend(cell, &dir, &head, &stamp).await?;
    let swapped = swap_head(cell, &head, Some(tag), Reason("ceiling")).await;
    let swapped = swapped.and_then(|tag| pass(failpoint::CEILING_AFTER_SWAP).map(|()| tag));
    if swapped.is_err() {
        cell.if_open(|user| user.ceiling_wanted = true);
    }
    match swapped? {
        Some(tag) => {
            cell.open_user(|user| {
                user.take_head(head, tag);
                Ok(())
            })?;
            save_head(cell, false).await
        }
        None => {
            cell.if_open(|user| user.lost = true);
            Err(lost(cell))
        }
    }
}

/// Writes the head that holds to the local disk. Synced: a power cut that left half of it would
/// make everything beside it obsolete.
pub(super) async fn save_head(cell: &Arc<UserCell>, clean: bool) -> Result<()> {
    let (bytes, path) = cell.open_user(|user| {
        let stamp = user.stamp(user.flushed_seq, clean);
        let bytes = encode_stamped(&stamp, &user.head)?;
        user.head_is(bytes.len() as u64);
        Ok((bytes, user.state_dir.join("head")))
    })?;
    let disk = cell.session.env.disk.clone();
    let written =
        blocking(move || disk.replace(&path, &bytes, true).map_err(|e| (path, e))).await?;
    written.map_err(|(path, e)| Error::disk(path.display().to_string(), &e))
}

impl super::user::User {
    /// Whether there is such a folder, and the head does not know it.
    fn has_unknown(&self, id: FolderId) -> bool {
        let known = self.head.folders.iter().any(|f| f.id == id);
        !known && self.tree.folders.contains_key(&id)
    }

    /// The head in the store is this one now.
    pub(super) fn take_head(&mut self, head: Head, tag: crate::store::ETag) {
        for named in &head.folders {
            if let Some(folder) = self.tree.folders.get_mut(&named.id) {
                folder.uid_ceiling = named.uid_ceiling;
            }
        }
        self.uidvalidity_ceiling = head.uidvalidity_ceiling;
        self.uidvalidity_burnt = head.uidvalidity_burnt;
        self.head = head;
        self.etag = tag;
    }

    /// Whether a cache is not in any part.
    pub fn caches_wait(&self) -> bool {
        let loaded = self.tree.folders.values().filter(|folder| folder.loaded);
        loaded.into_iter().any(|folder| self.unshipped_cache(folder.id))
    }
}

/// A folder that no head has gets into one with its first flush.
async fn know_folder(cell: &Arc<UserCell>, id: FolderId) -> Result<()> {
    if cell.open_user(|user| Ok(user.has_unknown(id)))? {
        // A flush may wait for a ceiling itself, of a folder that came back: that is in a head, or
        // needs none (`await_ceiling_of_synced`).
        match Box::pin(flush(cell, Options::default())).await {
            // Of files that change too fast, not of the disk.
            Err(Error::Full(why)) => return Err(Error::Crowded(why)),
            done => done?,
        };
    }
    Ok(())
}

/// Waits that end in a head swap.
pub async fn await_ceiling(need: need::Need) -> Result<()> {
    let (cell, folder, uidvalidity) = match need {
        need::Need::Ceiling(cell, folder, next) => (cell, Some((folder, next)), None),
        need::Need::UidValidity(cell, value) => (cell, None, Some(value)),
        other => return Err(Error::Internal(format!("not a ceiling: {other:?}"))),
    };
    let mut patience = Patience::new(&cell.session);
    loop {
        let raised = async {
            if let Some((id, _)) = folder {
                know_folder(&cell, id).await?;
            }
            raise_ceilings(&cell, folder, uidvalidity).await
        };
        let error = match raised.await {
            Err(error @ (Error::Store { .. } | Error::Crowded(_))) => error,
            done => return done,
        };
        tracing::warn!(user = %cell.name, %error, "UID ceiling not raised");
        if !patience.again().await {
            return Err(error);
        }
    }
}
