//! The full listing of a user: what no head ever named (I6).
//!
//! By the watermark every mail object up to it is named by the head or on its dropped list. One
//! that is neither is a late arrival: its request was sent by a session that ended, and reached
//! the store after the listings of the opens that followed. Its mail may have been acknowledged:
//! it gets a name, as after a loss, and is never garbage. In a dbox folder that needs records in
//! logs which a server may have open; there it is only told, and stays where it is.
//!
//! Bundles and large files of epochs that are over are another matter: nothing was promised for
//! one that no head names. They go on the dropped list, and live for another retention.
//!
//! Cost: the listings of the user's `mail/`, `bundle/` and `file/`, and the folders' parts, once for
//! every [`WINDOW`] mails. Memory: one page of a listing, the ids of a window, the dropped list, and
//! [`PARTS`] of compressed listings (or one folder's, if that is larger). No lock that a flush needs
//! is held.

use super::error::{During, Error, Result};
use super::gc::{Look, Report, WHY, named_bundles, named_by, note};
use super::parts::{PART_LIMIT, fetch_ranges_for};
use super::publish::blocking;
use super::recover::{adopt_mails, is_temporary, tail_of};
use super::session::UserCell;
use crate::cache::disk::How;
use crate::format::head::{Head, HeadFolder, PartRef};
use crate::format::key::{KeyTail, Piece, bundle_key, file_key, mail_dir, mail_key};
use crate::format::listing::{Entry, Line};
use crate::format::part::{Dropped, DroppedId, DroppedList, read_part_listing};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::fs::api::Invalidate;
use crate::sabotage::{self, Bug};
use crate::store::ObjectMeta;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What a listing of everything found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Mails that nothing names and nothing dropped, with their sizes.
    pub late: Vec<(KeyTail, u64)>,
    /// Bundles and large files of epochs that are over.
    pub orphans: Vec<Dropped>,
}

impl Found {
    /// What has come on the list since.
    pub(super) fn without_dropped(&mut self, list: &DroppedList) {
        self.late.retain(|(tail, _)| list.mail(tail.id()).is_none());
        self.orphans.retain(|object| list.get(object.id()).is_none());
    }
}

/// Mails listed by one call of the store.
const PAGE: usize = 10_000;
/// Ids that are compared with the listings at a time: 16 bytes each.
const WINDOW: usize = 500_000;
/// Compressed parts of listings held at a time.
const PARTS: u64 = 8 << 20;

/// Lists everything of a user. What is flushed meanwhile does not matter: what the head of `look`
/// names or has dropped is known, and what was neither is late, whatever comes after it.
pub(super) async fn scan(cell: &Arc<UserCell>, look: &Look) -> Result<Found> {
    let head = &look.head;
    let closed = |id: ObjectId| id.epoch < head.epoch;
    let named = named_bundles(head);
    let bundles = list_ids(cell, bundle_key, |id| {
        closed(id) && !named.contains(&id) && look.list.get(DroppedId::Bundle(id)).is_none()
    });
    let bundles = bundles.await?;
    let files =
        list_ids(cell, file_key, |id| closed(id) && look.list.get(DroppedId::File(id)).is_none());
    let mut files = files.await?;
    let mut late = Vec::new();
    let mut after = ObjectId::ZERO;
    loop {
        let (ids, next) = unlisted(cell, look, after).await?;
        if !ids.is_empty() || !files.is_empty() {
            let marks = Marks { mails: Ids::new(ids), files: Ids::new(std::mem::take(&mut files)) };
            let marks = read_folders(cell, head.folders.iter().collect(), marks).await?;
            late.extend(marks.mails.unmarked());
            files = marks.files.unmarked();
        }
        match next {
            Some(next) => after = next,
            None => break,
        }
    }
    let mut ids: HashSet<ObjectId> = late.iter().copied().collect();
    cell.open_user(|user| {
        user.without_named(&mut ids);
        user.dropped.iter().for_each(|tail| _ = ids.remove(&tail.id()));
        Ok(())
    })?;
    let kept = |id: &ObjectId| ids.contains(id) || sabotage::is(Bug::GcByDifference);
    let mut found = Vec::new();
    for id in late.into_iter().filter(kept) {
        found.extend(find_mail(cell, id).await?);
    }
    if sabotage::is(Bug::GcByDifference) {
        let keys: Vec<String> = found.iter().map(|(t, _)| mail_key(&cell.name, t)).collect();
        cell.session.env.store.delete(&keys, WHY).await.unwrap_or_default();
        found.retain(|(tail, _)| ids.contains(&tail.id()));
    }
    let bundles = bundles.into_iter().map(Dropped::Bundle);
    let orphans = bundles.chain(files.into_iter().map(Dropped::File)).collect();
    Ok(Found { late: found, orphans })
}

/// The next mails above `after` that are up to the watermark and not dropped, in order; and where
/// to go on.
async fn unlisted(
    cell: &Arc<UserCell>,
    look: &Look,
    after: ObjectId,
) -> Result<(Vec<ObjectId>, Option<ObjectId>)> {
    let (mut ids, mut after) = (Vec::new(), after);
    loop {
        let page = list_page(cell, after, PAGE).await?;
        let Some(last) = page.last else { return Ok((ids, None)) };
        after = last;
        let looked_at =
            |id: &ObjectId| *id <= look.head.watermark || sabotage::is(Bug::GcByDifference);
        let mails = page.mails.iter().map(|(tail, _)| tail.id()).filter(looked_at);
        ids.extend(mails.filter(|id| look.list.mail(*id).is_none()));
        if page.full && ids.len() >= WINDOW {
            return Ok((ids, Some(after)));
        }
        if !page.full || after > look.head.watermark && !sabotage::is(Bug::GcByDifference) {
            return Ok((ids, None));
        }
    }
}

/// Ids in order, each with a mark.
struct Ids {
    ids: Vec<ObjectId>,
    marked: Vec<bool>,
}

impl Ids {
    fn new(mut ids: Vec<ObjectId>) -> Ids {
        ids.sort_unstable();
        let marked = vec![false; ids.len()];
        Ids { ids, marked }
    }

    fn mark(&mut self, id: ObjectId) {
        if let Ok(i) = self.ids.binary_search(&id) {
            self.marked[i] = true;
        }
    }

    fn unmarked(self) -> Vec<ObjectId> {
        self.ids
            .into_iter()
            .zip(self.marked)
            .filter(|(_, marked)| !marked)
            .map(|(id, _)| id)
            .collect()
    }
}

/// What goes through the lines of folders.
trait Reader: Send + 'static {
    fn line(&mut self, line: Line);
    /// The folder ends here.
    fn end(&mut self) {}
}

/// Marks what any line names. A name that a later line took away is no matter: it was dropped
/// then, or has another name.
struct Marks {
    mails: Ids,
    files: Ids,
}

impl Reader for Marks {
    fn line(&mut self, line: Line) {
        let Line::Set { entry, .. } = line else { return };
        named_by(&entry).for_each(|id| self.mails.mark(id));
        if let Entry::Local { object: Some(id), .. } = entry {
            self.files.mark(id);
        }
    }
}

/// Finds which of some mails have a name in the end.
struct Names {
    wanted: HashSet<ObjectId>,
    here: HashMap<(Sub, Vec<u8>), Vec<ObjectId>>,
    found: HashSet<ObjectId>,
}

impl Reader for Names {
    fn line(&mut self, line: Line) {
        match line {
            Line::Set { sub, name, entry } => {
                let ids: Vec<_> = named_by(&entry).filter(|id| self.wanted.contains(id)).collect();
                match ids.is_empty() {
                    true => _ = self.here.remove(&(sub, name)),
                    false => _ = self.here.insert((sub, name), ids),
                }
            }
            Line::Unset { sub, name } => _ = self.here.remove(&(sub, name)),
            Line::Dir { .. } | Line::NoDir { .. } => {}
        }
    }

    fn end(&mut self) {
        self.found.extend(self.here.drain().flat_map(|(_, ids)| ids));
    }
}

/// Which of some mails are named in a folder that is not in memory.
pub(super) async fn named_among(
    cell: &Arc<UserCell>,
    head: &Head,
    wanted: HashSet<ObjectId>,
) -> Result<HashSet<ObjectId>> {
    let away: Vec<&HeadFolder> = cell.open_user(|user| {
        let loaded = |id: &FolderId| user.tree.folders.get(id).is_none_or(|f| f.loaded);
        Ok(head.folders.iter().filter(|f| !loaded(&f.id)).collect())
    })?;
    let names = Names { wanted, here: HashMap::new(), found: HashSet::new() };
    let names = read_folders(cell, away, names).await?;
    Ok(names.found)
}

/// Reads the listings of folders as the head's parts have them, some parts at a time.
async fn read_folders<R: Reader>(
    cell: &Arc<UserCell>,
    folders: Vec<&HeadFolder>,
    mut reader: R,
) -> Result<R> {
    let mut next = 0;
    while next < folders.len() {
        // Each part, and whether it is the last of its folder.
        let mut some: Vec<(PartRef, bool)> = Vec::new();
        let mut len = 0;
        while let Some(folder) = folders.get(next) {
            let more: u64 = folder.parts.iter().map(|part| part.len).sum();
            if !some.is_empty() && len + more > PARTS {
                break;
            }
            next += 1;
            len += more;
            some.extend(folder.parts.iter().map(|part| (part.clone(), false)));
            if let (Some((_, last)), false) = (some.last_mut(), folder.parts.is_empty()) {
                *last = true;
            }
        }
        let refs: Vec<&PartRef> = some.iter().map(|(part, _)| part).collect();
        let frames = fetch_ranges_for(cell, &refs, WHY).await?;
        let user = cell.name.clone();
        reader = blocking(move || {
            for ((part, last), frame) in some.into_iter().zip(frames) {
                let corrupt = |e| Error::corrupt(format!("user {user}: bundle {}", part.bundle), e);
                part.check(&frame).map_err(corrupt)?;
                let limit = part.raw_len.saturating_add(4096).min(PART_LIMIT);
                read_part_listing(&frame, limit, |line| reader.line(line)).map_err(corrupt)?;
                if last {
                    reader.end();
                }
            }
            Ok::<_, Error>(reader)
        })
        .await??;
    }
    Ok(reader)
}

/// Some mails of a user, in the order of their ids.
struct Page {
    mails: Vec<(KeyTail, u64)>,
    /// The last id.
    last: Option<ObjectId>,
    /// There may be more.
    full: bool,
}

async fn list_page(cell: &Arc<UserCell>, after: ObjectId, most: usize) -> Result<Page> {
    let dir = mail_dir(&cell.name);
    list_from(cell, &dir, &format!("{dir}/{after}.~"), most).await
}

async fn list_from(cell: &Arc<UserCell>, dir: &str, start: &str, most: usize) -> Result<Page> {
    let store = &cell.session.env.store;
    let failed = |e| Error::store(format!("listing {dir}"), During::Delivery, e);
    let (mut mails, mut start) = (Vec::new(), start.to_owned());
    loop {
        let listed = store.list_some(dir, Some(&start), most, WHY).await.map_err(failed)?;
        let full = listed.len() >= most;
        if let Some(last) = listed.last() {
            start.clone_from(&last.key);
        }
        mails.extend(listed.iter().filter_map(|object| Some((tail_of(object)?, object.size))));
        // A page with nothing of ours says nothing of what follows.
        if !full || !mails.is_empty() {
            let last = mails.last().map(|(tail, _)| tail.id());
            return Ok(Page { mails, last, full });
        }
    }
}

/// A mail by its id.
async fn find_mail(cell: &Arc<UserCell>, id: ObjectId) -> Result<Option<(KeyTail, u64)>> {
    let dir = mail_dir(&cell.name);
    let page = list_from(cell, &dir, &format!("{dir}/{id}"), 1).await?;
    Ok(page.mails.into_iter().find(|(tail, _)| tail.id() == id))
}

/// The ids of those objects whose keys `key` makes that are `wanted`.
async fn list_ids(
    cell: &Arc<UserCell>,
    key: fn(&str, ObjectId) -> String,
    wanted: impl Fn(ObjectId) -> bool,
) -> Result<Vec<ObjectId>> {
    let sample = key(&cell.name, ObjectId::ZERO);
    let dir = sample.rsplit_once('/').map_or("", |(dir, _)| dir);
    let store = &cell.session.env.store;
    let failed = |e| Error::store(format!("listing {dir}"), During::Delivery, e);
    let (mut ids, mut after) = (Vec::new(), None::<String>);
    loop {
        let listed = store.list_some(dir, after.as_deref(), PAGE, WHY).await.map_err(failed)?;
        let id = |object: &ObjectMeta| {
            let name = object.key.rsplit_once('/')?.1;
            let id: ObjectId = name.get(..ObjectId::TEXT_LEN)?.parse().ok()?;
            (key(&cell.name, id) == object.key).then_some(id)
        };
        ids.extend(listed.iter().filter_map(id).filter(|id| wanted(*id)));
        match listed.last() {
            Some(last) if listed.len() >= PAGE => after = Some(last.key.clone()),
            _ => return Ok(ids),
        }
    }
}

/// Gives names to late mails where that can be done in a user that is served, and tells of the
/// others. Notes that the user was listed.
pub(super) async fn take_in(
    cell: &Arc<UserCell>,
    found: Found,
    dry_run: bool,
    report: &mut Report,
) -> Result<()> {
    let mut adopt = Vec::new();
    for (tail, size) in found.late {
        if cell.open_user(|user| Ok(user.takes_mails(&tail)))? {
            report.adopted.push(tail.to_string());
            adopt.push((tail, size));
        } else {
            tracing::error!(
                user = %cell.name, object = %tail,
                "a mail reached the store late and cannot be shown while the user is served"
            );
            report.late.push(tail.to_string());
        }
    }
    if dry_run {
        return Ok(());
    }
    if !adopt.is_empty() {
        tracing::warn!(user = %cell.name, mails = adopt.len(), "adopting mails that nothing names");
        let folders: HashSet<FolderId> = adopt.iter().map(|(t, _)| t.decode().folder).collect();
        adopt_mails(cell, adopt).await?;
        cell.open_user(|user| {
            for folder in folders {
                for sub in [Sub::Own, Sub::New] {
                    if let Some(dir) = user.tree.dir(Place { folder, sub }) {
                        user.session.invalidate(Invalidate::Inode { ino: dir.ino });
                    }
                }
            }
            Ok(())
        })?;
    }
    let (path, now) = (scanned(cell), cell.session.store_time());
    note(cell, path, now).await
}

impl super::user::User {
    /// Whether a mail can be put into its folder while somebody uses it: not where a name alone
    /// does not show it.
    fn takes_mails(&self, tail: &KeyTail) -> bool {
        let key = tail.decode();
        let name = self.tree.folders.get(&key.folder).map(|folder| &*folder.name);
        // The name of a folder that is gone is in the object's metadata; it is made anew.
        let dbox = match name {
            Some(name) => matches!(name, b"dbox-Mails" | b"storage"),
            None => key.name.as_deref().is_some_and(|n| n.starts_with(b"u.") || is_temporary(n)),
        };
        key.piece == Piece::Whole && !dbox
    }
}

fn scanned(cell: &UserCell) -> std::path::PathBuf {
    cell.session.state_dir_of(&cell.name).join("scanned")
}

/// Whether the user's last full listing is long ago, or none is known here.
pub(super) async fn is_due(cell: &Arc<UserCell>) -> Result<bool> {
    let (disk, path) = (cell.session.env.disk.clone(), scanned(cell));
    let text = blocking(move || {
        let file = disk.open(&path, How::Read).ok()?;
        let bytes = file.read_exact_at(0, usize::try_from(file.size().ok()?.min(64)).ok()?).ok()?;
        String::from_utf8(bytes).ok()
    })
    .await?;
    let last: Option<i64> = text.and_then(|text| text.trim_end().parse().ok());
    let full = i64::try_from(cell.session.settings.gc.full_scan.as_secs()).unwrap_or(i64::MAX);
    Ok(last.is_none_or(|last| cell.session.store_time().saturating_sub(last) >= full))
}
