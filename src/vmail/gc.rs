//! Deleting from the store what nothing names any more (I6).
//!
//! # The rule, and why each part of it
//!
//! 1. Only what is on the head's dropped list. It got there by the swap that stopped naming it;
//!    so no listing is ever compared with a head to find out what may go. (What such a
//!    comparison finds is late or an orphan, and is kept: [`super::gc_scan`].)
//! 2. Only after `retention`, by the store's clock at both ends: history and undelete reach back
//!    so far, and the clocks of machines do not matter.
//! 3. Only by the owner of the user: the epoch held, the lease valid, and the swap of step 4 done.
//! 4. Only after a swap of the head marked it as doomed. A takeover, an undelete or a restore by
//!    whoever owns the user next reads that mark and does not name the object again; so a
//!    request to delete it may arrive as late as it likes. Within this session
//!    [`super::user::User::commit`] refuses to name it, from before the swap is sent.
//!
//! # Order, and what a death in between leaves
//!
//! The list is read, everything is listed where that is due, and the folders are looked through
//! for what the list has in spite of a name: all that beside the flushes of the user, which a mail
//! in a new folder waits for. Then no flush may come between: what was flushed meanwhile is read,
//! what is due is doomed in memory, in a bundle with the whole list as one new base, and by the
//! swap; then come the requests that delete, with no lock that a flush needs;
//! then the next flush takes what is gone off the list, on its way. A death before the swap
//! leaves a bundle that no head names, which goes on the list when the epoch is over. A death
//! after it leaves doomed objects, some of them gone: the next gc deletes all of them (again,
//! which does no harm). A swap that was given up and arrives late dooms what nobody deletes
//! until the next gc.
//!
//! Rejected: a list of doomed objects in the head (it grows with what was deleted, the head is
//! read at every login); taking objects off the list by a swap of its own (two more requests for
//! each gc of each user, and the list is no more right for it).
//!
//! # What is assumed
//!
//! That a request to delete which was given up has arrived before a mail's own PUT does that was
//! given up more than `retention` before: an object that shows up after its id went off the list
//! is a late arrival like any other, and gets a name. (Retention is days; the second request would
//! have to be under way for so long, and the first to arrive after both.)
//!
//! # What it costs
//!
//! Nothing for a user without a dropped list, and nothing before the oldest entry is due. Else one
//! request for each segment of the list, two for the mark, and one for 1000 objects. A gc that
//! nobody asked for does nothing while only a few bundles are due: each writes a bundle that
//! replaces one, and would be the reason of the next.

use super::error::{During, Error, Result};
use super::flush::{lost, new_write_id, no_longer_named, save_head};
use super::node::Kind;
use super::open::intend;
use super::publish::blocking;
use super::session::{Session, UserCell};
use super::swap::swap_head;
use super::user::User;
use super::{dropped, gc_scan};
use crate::format::ObjectId;
use crate::format::head::{Head, PartKind};
use crate::format::key::{bundle_key, file_key, mail_key};
use crate::format::listing::{Entry, Line};
use crate::format::part::{
    BundleWriter, Dropped, DroppedId, DroppedList, DroppedRow, encode_dropped,
};
use crate::store::{Body, ETag, PutMode, Reason};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// The reason under which all requests of a gc are counted.
pub const WHY: Reason = Reason("gc");
/// Objects deleted by one call of the store.
const BULK: usize = 1000;
/// So many bundles, with nothing else, are worth a gc that nobody asked for.
const WORTH: usize = 8;

/// What the configuration says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What was dropped is kept so long.
    pub retention: Duration,
    /// Time between two looks at a user.
    pub interval: Duration,
    /// Time between two full listings of a user.
    pub full_scan: Duration,
    /// Users looked at at once.
    pub parallel: usize,
    /// Objects deleted in a second, for each user looked at.
    pub delete_rate: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        Limits {
            retention: DAY * 7,
            interval: DAY,
            full_scan: DAY * 7,
            parallel: 1,
            delete_rate: 1000,
        }
    }
}

impl Limits {
    fn retention_secs(&self) -> i64 {
        i64::try_from(self.retention.as_secs()).unwrap_or(i64::MAX)
    }
}

/// What a gc is asked to do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Say what would be done; nothing is changed, neither in the store nor here.
    pub dry_run: bool,
    /// Also look for what no head ever named, by a listing of everything.
    pub scan: bool,
    /// Nobody asked for it: little is left for another time.
    pub unasked: bool,
}

/// What it did, or (dry run) would do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Deleted.
    pub mails: u64,
    pub bundles: u64,
    pub files: u64,
    /// Dropped, and not due yet.
    pub kept: u64,
    /// When (store's clock) the next of these is due.
    pub next_due: Option<i64>,
    /// Whether everything was listed.
    pub scanned: bool,
    /// Bundles and large files of dead sessions, put on the dropped list.
    pub orphans: u64,
    /// Mails that arrived late and have a name now.
    pub adopted: Vec<String>,
    /// Objects that nothing names, and that cannot be given a name while the user is in use.
    pub late: Vec<String>,
}

impl Report {
    pub fn deleted(&self) -> u64 {
        self.mails + self.bundles + self.files
    }

    fn count(&mut self, id: DroppedId) {
        match id {
            DroppedId::Mail(_) => self.mails += 1,
            DroppedId::Bundle(_) => self.bundles += 1,
            DroppedId::File(_) => self.files += 1,
        }
    }

    /// What is over of a list; counts the rest.
    fn sort_out(&mut self, session: &Session, list: &DroppedList, now: i64) -> Vec<DroppedId> {
        let retention = session.settings.gc.retention_secs();
        let mut due = Vec::new();
        for at in list.iter() {
            let over = at.when.saturating_add(retention);
            if at.doomed || now >= over {
                due.push(at.object.id());
            } else {
                self.kept += 1;
                self.next_due = Some(self.next_due.map_or(over, |next| next.min(over)));
            }
        }
        due
    }
}

/// When a user is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Looked {
    /// Not before this, by the boot clock.
    pub next: Duration,
    /// Nothing is due before this, by the store's clock.
    pub not_before: i64,
}

impl Looked {
    /// Of a user that is opened at `now`: not in the rush of a start.
    pub fn opened(now: Duration, limits: Limits) -> Looked {
        Looked { next: now + limits.interval.min(AGAIN), not_before: i64::MIN }
    }
}

/// The state that a gc starts from.
pub(super) struct Look {
    pub head: Head,
    pub etag: ETag,
    pub list: DroppedList,
    pub now: i64,
}

impl Look {
    /// What this session has deleted is not on the list, whatever the head says.
    fn without_deleted(&mut self, cell: &UserCell) -> Result<()> {
        cell.open_user(|user| {
            for object in &user.deleted {
                self.list.apply(DroppedRow::Out(object.clone()));
            }
            Ok(())
        })
    }

    /// What was flushed since. The head does not change while `flushing` is held.
    async fn refresh(&mut self, cell: &Arc<UserCell>) -> Result<()> {
        let (head, etag) = cell.open_user(|user| {
            user.may_write()?;
            Ok((user.head.clone(), user.etag.clone()))
        })?;
        let known = self.head.dropped.len();
        if head.dropped.starts_with(&self.head.dropped) {
            dropped::read_onto(cell, &mut self.list, &head.dropped[known..], WHY).await?;
        } else {
            self.list = dropped::read(cell, &head.dropped, WHY).await?;
        }
        (self.head, self.etag) = (head, etag);
        self.without_deleted(cell)
    }
}

/// The mails that are due, without those that some folder names, whatever the list says: what is
/// deleted cannot be brought back. Folders in memory are looked at later.
async fn due_mails(cell: &Arc<UserCell>, look: &Look) -> Result<HashSet<ObjectId>> {
    let due = Report::default().sort_out(&cell.session, &look.list, look.now);
    let mail = |id| if let DroppedId::Mail(id) = id { Some(id) } else { None };
    let mut mails: HashSet<ObjectId> = due.into_iter().filter_map(mail).collect();
    if mails.is_empty() {
        return Ok(mails);
    }
    for id in gc_scan::named_among(cell, &look.head, mails.clone()).await? {
        tracing::error!(user = %cell.name, object = %id, "on the dropped list, and named; it is kept");
        mails.remove(&id);
    }
    Ok(mails)
}

/// Deletes what is due of a user that is open and owned by this session.
///
/// # Errors
/// [`Error::Lost`] if it is not (any more), [`Error::Store`]; what was doomed before stays so, and
/// is deleted next time.
pub async fn collect(cell: &Arc<UserCell>, options: Options) -> Result<Report> {
    let _one = cell.collecting.lock().await;
    let mut report = Report::default();
    let (head, etag) = cell.open_user(|user| {
        user.may_write()?;
        if !user.ready {
            return Err(Error::Closing);
        }
        Ok((user.head.clone(), user.etag.clone()))
    })?;
    let list = dropped::read(cell, &head.dropped, WHY).await?;
    let now = cell.session.store_time();
    let over = now.saturating_add(cell.session.settings.gc.retention_secs());
    let mut look = Look { head, etag, list, now };
    look.without_deleted(cell)?;
    let mut found = if options.scan { Some(gc_scan::scan(cell, &look).await?) } else { None };
    let looked_at = due_mails(cell, &look).await?;
    // From here on no flush may come between what is looked at and the swap.
    let flushing = cell.flushing.lock().await;
    look.refresh(cell).await?;
    let due = cell.open_user(|user| user.due(&look, &looked_at, &mut report))?;
    if let Some(found) = &mut found {
        found.without_dropped(&look.list);
    }
    let orphans = found.iter().flat_map(|f| f.orphans.clone()).collect::<Vec<_>>();
    report.orphans = orphans.len() as u64;
    let fresh = due.iter().any(|id| look.list.get(*id).is_some_and(|at| !at.doomed));
    let mut doomed: Vec<Dropped> =
        due.iter().filter_map(|id| look.list.get(*id)).map(|at| at.object.clone()).collect();
    let few = |d: &[Dropped]| d.len() < WORTH && d.iter().all(|d| matches!(d, Dropped::Bundle(_)));
    if options.unasked && orphans.is_empty() && few(&doomed) {
        doomed.clear();
    }
    doomed.iter().for_each(|object| report.count(object.id()));
    if !options.dry_run {
        if !orphans.is_empty() || fresh && !doomed.is_empty() {
            mark(cell, look, &doomed, orphans).await?;
        }
        drop(flushing);
        delete(cell, &doomed).await?;
        // What is dropped from now on is due after all that is on the list.
        cell.if_open(|user| user.gc.not_before = report.next_due.unwrap_or(i64::MAX).min(over));
    }
    if let Some(found) = found {
        report.scanned = true;
        gc_scan::take_in(cell, found, options.dry_run, &mut report).await?;
    }
    Ok(report)
}

impl User {
    /// What is due of the list.
    fn due(
        &mut self,
        look: &Look,
        looked_at: &HashSet<ObjectId>,
        report: &mut Report,
    ) -> Result<Vec<DroppedId>> {
        self.may_write()?;
        let mut due = report.sort_out(&self.session, &look.list, look.now);
        let named = named_bundles(&look.head);
        due.retain(|id| match id {
            DroppedId::Mail(id) => {
                looked_at.contains(id) && !self.again.iter().any(|tail| tail.id() == *id)
            }
            DroppedId::Bundle(id) => !named.contains(id),
            DroppedId::File(_) => true,
        });
        // Whatever the list says: what has a name here is not deleted.
        let mut mails: HashSet<ObjectId> = due
            .iter()
            .filter_map(|id| if let DroppedId::Mail(id) = id { Some(*id) } else { None })
            .collect();
        let all = mails.len();
        self.without_named(&mut mails);
        if mails.len() < all {
            tracing::error!(
                user = %self.name, objects = all - mails.len(),
                "mails on the dropped list have names; they are kept"
            );
            due.retain(|id| !matches!(id, DroppedId::Mail(id) if !mails.contains(id)));
        }
        Ok(due)
    }

    /// Takes out of `ids` what has a name in memory: in a loaded folder, or by a change that waits
    /// for its folder to be loaded.
    pub(super) fn without_named(&self, ids: &mut HashSet<ObjectId>) {
        if ids.is_empty() {
            return;
        }
        for (_, node) in self.tree.nodes.iter().filter(|(_, node)| node.nlink > 0) {
            match &node.kind {
                Kind::Local(_) | Kind::Symlink(_) => {}
                _ => node.objects().iter().for_each(|o| _ = ids.remove(&o.id())),
            }
        }
        for line in self.tree.folders.values().flat_map(|f| &f.pending) {
            if let Line::Set { entry, .. } = line {
                named_by(entry).for_each(|id| _ = ids.remove(&id));
            }
        }
    }
}

/// The mail objects that an entry of a listing names.
pub(super) fn named_by(entry: &Entry) -> impl Iterator<Item = ObjectId> {
    let (one, many) = match entry {
        Entry::Mail { object, .. } => (Some(object.id()), None),
        Entry::Extents { extents, .. } => (None, Some(extents.iter().map(|e| e.object.id()))),
        Entry::Local { .. } | Entry::Symlink { .. } => (None, None),
    };
    one.into_iter().chain(many.into_iter().flatten())
}

/// The bundles that a head names, that of the head before it included.
pub(super) fn named_bundles(head: &Head) -> HashSet<ObjectId> {
    let folders = head.folders.iter().flat_map(|f| &f.parts);
    let tables = head.names.iter().chain(&head.dropped);
    folders.chain(tables).chain(&head.previous).map(|part| part.bundle).collect()
}

/// The swap after which objects may be deleted.
async fn mark(
    cell: &Arc<UserCell>,
    look: Look,
    doomed: &[Dropped],
    orphans: Vec<Dropped>,
) -> Result<()> {
    let Look { head: old, etag, mut list, now } = look;
    let ids: HashSet<DroppedId> = doomed.iter().map(Dropped::id).collect();
    for at in list.iter_mut().filter(|at| ids.contains(&at.object.id())) {
        at.doomed = true;
    }
    let (id, dir, stamp) = cell.open_user(|user| {
        user.may_write()?;
        // The last look at what was named meanwhile, and from here on nothing is.
        for object in doomed {
            if let Dropped::Mail(tail) = object {
                if user.again.contains(tail) {
                    return Err(Error::Refused(format!("mail object {tail} was just named again")));
                }
                user.doomed.insert(tail.id());
            }
        }
        user.last_counter += 1;
        let id = ObjectId { epoch: user.epoch, counter: user.last_counter };
        Ok((id, user.state_dir.clone(), user.stamp(user.flushed_seq, false)))
    })?;
    let mut head = old.clone();
    head.dropped.clear();
    let bundles = no_longer_named(&old, &head, id);
    let rows = orphans.into_iter().chain(bundles);
    list.extend(rows.map(|object| DroppedRow::since(now, object)));
    let mut bundle = BundleWriter::new(id);
    head.dropped = vec![bundle.add(PartKind::Base, &encode_dropped(&list.rows()))];
    head.write_id = new_write_id(cell);
    let store = &cell.session.env.store;
    let (key, body) = (bundle_key(&cell.name, id), Body::Bytes(bundle.finish()));
    store.put(&key, body, PutMode::Overwrite, &[], WHY).await.map_err(|e| failed(cell, e))?;
    intend(cell, &dir, &head, &stamp).await?;
    match swap_head(cell, &head, Some(etag), WHY).await? {
        Some(tag) => {
            cell.open_user(|user| {
                // In the list that was just written they are not.
                user.deleted.clear();
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

fn failed(cell: &UserCell, e: crate::store::StoreError) -> Error {
    Error::store(format!("gc of {}", cell.name), During::Delivery, e)
}

/// Deletes what is doomed in the store's head.
async fn delete(cell: &Arc<UserCell>, doomed: &[Dropped]) -> Result<()> {
    let session = &cell.session;
    let rate = session.settings.gc.delete_rate.max(1);
    for some in doomed.chunks(BULK.min(rate as usize)) {
        cell.open_user(|user| user.may_write())?;
        let keys: Vec<String> = some.iter().map(|object| key(&cell.name, object)).collect();
        session.env.store.delete(&keys, WHY).await.map_err(|e| failed(cell, e))?;
        cell.if_open(|user| user.note_deleted(some.iter().cloned()));
        if doomed.len() > some.len() {
            session.env.clock.sleep(Duration::from_secs(1)).await;
        }
    }
    if !doomed.is_empty() {
        tracing::info!(user = %cell.name, objects = doomed.len(), "deleted after their retention");
    }
    Ok(())
}

/// The key under which a dropped object lies.
pub fn key(user: &str, object: &Dropped) -> String {
    match object {
        Dropped::Mail(tail) => mail_key(user, tail),
        Dropped::Bundle(id) => bundle_key(user, *id),
        Dropped::File(id) => file_key(user, *id),
    }
}

/// Time between two looks for users that are due.
const TICK: Duration = Duration::from_secs(30);
/// After a gc that failed, and after an open.
const AGAIN: Duration = Duration::from_secs(3600);

/// Looks after the users that are open here, until the session closes.
pub async fn run(session: Arc<Session>) {
    let limits = session.settings.gc;
    let mut running = tokio::task::JoinSet::new();
    loop {
        session.env.clock.sleep(TICK.min(limits.interval)).await;
        if session.closing.load(std::sync::atomic::Ordering::Acquire) {
            return;
        }
        for cell in session.all_users() {
            let now = session.env.clock.boot();
            let due = cell.if_open(|user| user.ready && !user.lost && user.gc.next <= now);
            if due != Some(true) {
                continue;
            }
            while running.len() >= limits.parallel.max(1) {
                _ = running.join_next().await;
            }
            if session.closing.load(std::sync::atomic::Ordering::Acquire) {
                return;
            }
            cell.if_open(|user| user.gc.next = now + limits.interval);
            running.spawn(async move {
                if let Err(error) = unasked(&cell).await {
                    tracing::warn!(user = %cell.name, %error, "gc failed; tried again later");
                    let again = cell.session.env.clock.boot() + AGAIN.min(limits.interval);
                    cell.if_open(|user| user.gc.next = again);
                }
            });
        }
        while running.try_join_next().is_some() {}
    }
}

/// What is due of a user in the course of time.
pub async fn unasked(cell: &Arc<UserCell>) -> Result<Option<Report>> {
    let scan = gc_scan::is_due(cell).await?;
    let now = cell.session.store_time();
    let nothing =
        cell.open_user(|user| Ok(user.head.dropped.is_empty() || now < user.gc.not_before))?;
    if nothing && !scan {
        return Ok(None);
    }
    let report = collect(cell, Options { scan, unasked: true, ..Options::default() }).await?;
    Ok(Some(report))
}

/// What a gc of a user would delete, by its dropped list alone.
pub(super) fn look_only(session: &Session, list: &DroppedList) -> Report {
    let mut report = Report::default();
    let now = session.store_time();
    for id in report.sort_out(session, list, now) {
        report.count(id);
    }
    report
}

/// The local disk's note of when a user was last listed whole.
pub(super) async fn note(cell: &Arc<UserCell>, path: std::path::PathBuf, at: i64) -> Result<()> {
    let disk = cell.session.env.disk.clone();
    let text = format!("{at}\n");
    blocking(move || {
        disk.replace(&path, text.as_bytes(), false)
            .map_err(|e| Error::disk(path.display().to_string(), &e))
    })
    .await?
}
