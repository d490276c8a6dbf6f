//! UID ceilings (I2): a UID never names two mails, whatever is lost.
//!
//! The head holds for each folder a ceiling that next-UID does not pass. It is raised by a swap
//! of the head alone, begun when half of the room is used; a write that would pass it waits
//! for that swap. When a session ends without a hand-over, whoever opens the user next takes
//! every UID below the old ceiling for given: the head says so (`burnt_below`) until the
//! folder was loaded, its next-UID raised in Dovecot's own files, and the result flushed.
//!
//! A folder's first UIDs are given without a ceiling: with the machine its UIDVALIDITY would be lost,
//! too. A power cut may leave that and take the records of UIDs, so these are no more than
//! `UID_ROOM`, all of which then count as given (`User::burn_unknown`).
//!
//! The same holds for the counter from which Dovecot takes the UIDVALIDITY of new folders.

use super::error::Result;
use super::need::{Need, Op, Stop};
use super::node::{Kind, NodeIx};
use super::user::User;
use crate::dovecot::{uidlist, uidvalidity};
use crate::format::{FolderId, Place};
use crate::sabotage::{self, Bug};

/// Room between next-UID and a new ceiling.
pub const UID_ROOM: u32 = 1000;
/// The same for the UIDVALIDITY counter.
pub const VALIDITY_ROOM: u32 = 1000;

/// The ceiling that goes with a value, if the old one leaves less than half of the room.
pub fn raised(old: Option<u32>, value: u32, room: u32) -> Option<u32> {
    match old {
        Some(old) if value.saturating_add(room / 2) <= old => Some(old),
        _ => Some(old.unwrap_or(0).max(value.saturating_add(room))),
    }
}

/// The same of a folder's UIDs.
pub fn raised_uids(old: Option<u32>, next: u32) -> Option<u32> {
    match old {
        Some(old) if sabotage::is(Bug::CeilingNotRaised) => Some(old),
        _ => raised(old, next, UID_ROOM),
    }
}

impl User {
    /// Next-UID of a folder is about to be `next`.
    pub fn await_ceiling(&mut self, folder: FolderId, next: u32) -> Op<()> {
        let cell = self.cell();
        let Some(found) = self.tree.folders.get_mut(&folder) else { return Ok(()) };
        match found.uid_ceiling {
            Some(ceiling) if next > ceiling && !sabotage::is(Bug::CeilingNotRaised) => {
                return Err(Stop::Wait(Need::Ceiling(cell, folder, next)));
            }
            Some(ceiling) => {
                found.next_uid = found.next_uid.max(Some(next));
                if next.saturating_add(UID_ROOM / 2) > ceiling {
                    self.ceiling_wanted = true;
                    self.session.wake_scheduler();
                }
            }
            None if next > UID_ROOM => return Err(Stop::Wait(Need::Ceiling(cell, folder, next))),
            None => {
                // No head knows this folder's UIDVALIDITY together with a UID. The next flush
                // brings both, soon.
                let first = found.next_uid.is_none();
                found.next_uid = found.next_uid.max(Some(next));
                if first {
                    self.urgent();
                }
            }
        }
        Ok(())
    }

    /// The same of UIDs whose records are on the disk before anybody sees them: in a folder that no
    /// head knows they need no ceiling, and whoever flushes it can show them first.
    pub(super) fn await_ceiling_of_synced(&mut self, folder: FolderId, next: u32) -> Op<()> {
        match self.tree.folders.get_mut(&folder) {
            Some(found) if found.uid_ceiling.is_none() => {
                found.next_uid = found.next_uid.max(Some(next));
                self.urgent();
                Ok(())
            }
            _ => self.await_ceiling(folder, next),
        }
    }

    /// A new uidlist is about to be renamed into place.
    pub(super) fn await_uidlist_ceiling(&mut self, to: Place, ix: NodeIx) -> Op<()> {
        let size = self.node(ix)?.size;
        let file = self.local_file(ix)?;
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let content =
            file.read_exact_at(0, len).map_err(|e| super::error::Error::disk("metacache", &e))?;
        match uidlist::parse(&content) {
            Ok(list) => self.await_ceiling(to.folder, list.next_uid()),
            // Not ours to judge; Dovecot makes it anew.
            Err(_) => Ok(()),
        }
    }

    /// The UIDVALIDITY counter is about to move; gives its new value.
    pub(super) fn await_uidvalidity_ceiling(&mut self, name: &[u8]) -> Op<Option<u32>> {
        let Some(value) = uidvalidity::parse(name) else { return Ok(None) };
        match self.uidvalidity_ceiling {
            Some(ceiling) if value > ceiling => {
                Err(Stop::Wait(Need::UidValidity(self.cell(), value)))
            }
            _ => Ok(Some(value)),
        }
    }

    pub(super) fn uidvalidity_given(&mut self, value: u32) {
        self.uidvalidity = self.uidvalidity.max(Some(value));
        if self.uidvalidity_ceiling.is_none_or(|c| value.saturating_add(VALIDITY_ROOM / 2) > c) {
            self.ceiling_wanted = true;
            self.session.wake_scheduler();
        }
    }

    /// What next-UID the trackers of a folder know.
    pub fn tracked_next_uid(&self, folder: FolderId) -> Result<Option<u32>> {
        let mut next = None;
        let Some(dir) = self.tree.dir(Place::own(folder)) else { return Ok(None) };
        for (_, _, target) in dir.entries.after(0) {
            if let super::tree::Target::Node(ix) = target
                && let Kind::Local(local) = &self.node(ix)?.kind
            {
                next = next.max(User::tracker_next_uid(&local.tracker));
            }
        }
        Ok(next)
    }
}

#[cfg(test)]
mod tests {
    use super::raised;

    #[test]
    fn a_ceiling_is_raised_at_half_of_its_room_and_never_falls() {
        assert_eq!(raised(None, 5, 1000), Some(1005));
        assert_eq!(raised(Some(1005), 500, 1000), Some(1005));
        assert_eq!(raised(Some(1005), 506, 1000), Some(1506));
        assert_eq!(raised(Some(9000), 5, 1000), Some(9000));
        assert_eq!(raised(Some(u32::MAX), u32::MAX, 1000), Some(u32::MAX));
    }
}
