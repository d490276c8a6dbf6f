//! The dropped list of a user, as its head refers to it (I6).
//!
//! Whoever wants to give a dropped object a name again asks three things of it: it is on the
//! list, it is not doomed there, and [`User::commit`] takes the record that names it together
//! with [`Change::Again`]. The last one refuses what a gc of this session has doomed since the
//! list was read. [`again`] does all that.

use super::error::{Error, Plain, Result};
use super::parts::{PART_LIMIT, fetch_ranges_for};
use super::session::UserCell;
use super::user::User;
use crate::format::head::PartRef;
use crate::format::journal::Change;
use crate::format::key::KeyTail;
use crate::format::listing::{Entry, Line};
use crate::format::part::{Dropped, DroppedList, decode_dropped};
use crate::store::Reason;
use std::sync::Arc;

/// Reads the list that some head of the user (the present one, or an earlier one) refers to.
///
/// # Errors
/// As reading a folder's parts: a store that fails, a bundle that is gone or damaged.
pub async fn read(cell: &Arc<UserCell>, parts: &[PartRef], why: Reason) -> Result<DroppedList> {
    let mut list = DroppedList::default();
    read_onto(cell, &mut list, parts, why).await?;
    Ok(list)
}

/// Puts further segments of the list on top of what was read before.
pub(super) async fn read_onto(
    cell: &Arc<UserCell>,
    list: &mut DroppedList,
    parts: &[PartRef],
    why: Reason,
) -> Result<()> {
    let refs: Vec<&PartRef> = parts.iter().collect();
    let frames = fetch_ranges_for(cell, &refs, why).await?;
    let what = || format!("user {}: dropped list", cell.name);
    for (part, frame) in parts.iter().zip(frames) {
        part.check(&frame).map_err(|e| Error::corrupt(what(), e))?;
        let limit = part.raw_len.saturating_add(4096).min(PART_LIMIT);
        list.extend(decode_dropped(&frame, limit).map_err(|e| Error::corrupt(what(), e))?);
    }
    Ok(())
}

/// The record that takes a mail off the list, to be committed together with the line that names
/// it.
///
/// # Errors
/// [`Plain::NotFound`] if it is not on the list (deleted already, or named); [`Error::Refused`]
/// if it is doomed.
pub fn again(list: &DroppedList, tail: &KeyTail) -> Result<Change> {
    match list.mail(tail.id()) {
        None => Err(Plain::NotFound.into()),
        Some(at) if at.doomed => Err(doomed(tail)),
        Some(_) => Ok(Change::Again { object: tail.clone() }),
    }
}

fn doomed(tail: &KeyTail) -> Error {
    Error::Refused(format!("mail object {tail} is being deleted: its retention is over"))
}

impl User {
    /// Refuses changes that would name what this session's gc has doomed.
    pub(super) fn check_doomed(&self, changes: &[Change]) -> Result<()> {
        if self.doomed.is_empty() {
            return Ok(());
        }
        let check = |tail: &KeyTail| {
            if self.doomed.contains(&tail.id()) { Err(doomed(tail)) } else { Ok(()) }
        };
        for change in changes {
            match change {
                Change::Again { object } => check(object)?,
                Change::Line { line: Line::Set { entry, .. }, .. } => match entry {
                    Entry::Mail { object, .. } => check(object)?,
                    Entry::Extents { extents, .. } => {
                        extents.iter().try_for_each(|e| check(&e.object))?;
                    }
                    Entry::Local { .. } | Entry::Symlink { .. } => {}
                },
                _ => {}
            }
        }
        Ok(())
    }

    /// Marks a dropped object as one that is named again, or the reverse: the two sets of what
    /// the next flush says of the list have nothing in common.
    pub(super) fn mark_dropped(&mut self, tail: &KeyTail, dropped: bool) {
        if dropped {
            self.again.remove(tail);
            self.dropped.push(tail.clone());
        } else {
            self.dropped.retain(|t| t != tail);
            self.again.insert(tail.clone());
        }
    }

    /// What is deleted is taken off the list by the next flush, whatever that is for. Until then
    /// it stays doomed there.
    pub(super) fn note_deleted(&mut self, objects: impl IntoIterator<Item = Dropped>) {
        self.deleted.extend(objects);
    }
}
