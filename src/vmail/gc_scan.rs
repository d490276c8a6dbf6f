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
//! Cost: the listings of the user's `mail/`, `bundle/` and `file/`, and the folders' parts if some
//! mail is on no list. Memory: the ids of these mails.

use super::error::{During, Error, Result};
use super::gc::{Look, Report, WHY, named_bundles, named_by, note};
use super::lines::Final;
use super::parts::{PART_LIMIT, fetch_ranges_for};
use super::publish::blocking;
use super::recover::{adopt_mails, list_mails};
use super::session::UserCell;
use crate::cache::disk::How;
use crate::format::head::Head;
use crate::format::key::{KeyTail, Piece, bundle_key, file_key, mail_key};
use crate::format::listing::Entry;
use crate::format::part::{Dropped, DroppedId, read_part_listing};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::fs::api::Invalidate;
use crate::sabotage::{self, Bug};
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

/// Lists everything of a user, whose `flushing` is held.
pub(super) async fn scan(cell: &Arc<UserCell>, look: &Look) -> Result<Found> {
    let head = &look.head;
    let mut late: HashMap<ObjectId, (KeyTail, u64)> = HashMap::new();
    for (tail, size) in list_mails(cell, ObjectId::ZERO, None, WHY).await? {
        let looked_at = tail.id() <= head.watermark || sabotage::is(Bug::GcByDifference);
        if looked_at && look.list.mail(tail.id()).is_none() {
            late.insert(tail.id(), (tail, size));
        }
    }
    let closed = |id: ObjectId| id.epoch < head.epoch;
    let named = named_bundles(head);
    let mut bundles = list_ids(cell, bundle_key).await?;
    bundles.retain(|id| {
        closed(*id) && !named.contains(id) && look.list.get(DroppedId::Bundle(*id)).is_none()
    });
    let mut files: HashSet<ObjectId> = list_ids(cell, file_key).await?.into_iter().collect();
    files.retain(|id| closed(*id) && look.list.get(DroppedId::File(*id)).is_none());
    if !late.is_empty() || !files.is_empty() {
        without_named(cell, head, &mut late, &mut files).await?;
    }
    let mut ids: HashSet<ObjectId> = late.keys().copied().collect();
    cell.open_user(|user| {
        user.without_named(&mut ids);
        user.dropped.iter().for_each(|tail| _ = ids.remove(&tail.id()));
        Ok(())
    })?;
    if sabotage::is(Bug::GcByDifference) {
        let keys: Vec<String> = late.values().map(|(t, _)| mail_key(&cell.name, t)).collect();
        cell.session.env.store.delete(&keys, WHY).await.unwrap_or_default();
    }
    late.retain(|id, _| ids.contains(id));
    let mut late: Vec<_> = late.into_values().collect();
    late.sort_by_key(|(tail, _)| tail.id());
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_unstable();
    let bundles = bundles.into_iter().map(Dropped::Bundle);
    Ok(Found { late, orphans: bundles.chain(files.into_iter().map(Dropped::File)).collect() })
}

/// Takes out what the head's listings name.
async fn without_named(
    cell: &Arc<UserCell>,
    head: &Head,
    mails: &mut HashMap<ObjectId, (KeyTail, u64)>,
    files: &mut HashSet<ObjectId>,
) -> Result<()> {
    for folder in head.folders.iter().filter(|f| !f.parts.is_empty()) {
        for entry in read_listing(cell, &folder.parts).await? {
            named_by(&entry).for_each(|id| _ = mails.remove(&id));
            if let Entry::Local { object: Some(id), .. } = entry {
                files.remove(&id);
            }
        }
    }
    Ok(())
}

/// The ids of the objects whose keys `key` makes.
async fn list_ids(
    cell: &Arc<UserCell>,
    key: fn(&str, ObjectId) -> String,
) -> Result<Vec<ObjectId>> {
    let sample = key(&cell.name, ObjectId::ZERO);
    let dir = sample.rsplit_once('/').map_or("", |(dir, _)| dir);
    let listed = cell
        .session
        .env
        .store
        .list(dir, None, WHY)
        .await
        .map_err(|e| Error::store(format!("listing {dir}"), During::Delivery, e))?;
    let id = |object: &str| {
        let name = object.rsplit_once('/')?.1;
        let id: ObjectId = name.get(..ObjectId::TEXT_LEN)?.parse().ok()?;
        (key(&cell.name, id) == object).then_some(id)
    };
    Ok(listed.iter().filter_map(|object| id(&object.key)).collect())
}

/// The entries of a folder's listing, as its parts have it.
async fn read_listing(
    cell: &Arc<UserCell>,
    parts: &[crate::format::head::PartRef],
) -> Result<Vec<Entry>> {
    let refs: Vec<_> = parts.iter().collect();
    let frames = fetch_ranges_for(cell, &refs, WHY).await?;
    let both: Vec<_> = parts.iter().cloned().zip(frames).collect();
    let user = cell.name.clone();
    blocking(move || {
        let mut state = Final::default();
        for (part, frame) in both {
            let corrupt = |e| Error::corrupt(format!("user {user}: bundle {}", part.bundle), e);
            part.check(&frame).map_err(corrupt)?;
            let limit = part.raw_len.saturating_add(4096).min(PART_LIMIT);
            read_part_listing(&frame, limit, |line| state.apply(line)).map_err(corrupt)?;
        }
        Ok(state.into_names().map(|(_, _, entry)| entry).collect())
    })
    .await?
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
            None => key.name.as_deref().is_some_and(|n| n.starts_with(b"u.")),
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
