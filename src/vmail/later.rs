//! Mails that came, or went, after the flush from which a folder's index files came back.
//!
//! dbox shows what its index says, and one of the last flush does not know them. So nothing of the
//! user is answered between the moment at which index files come back and the one at which the
//! index says what lies there ([`super::session::UserCell::with`] waits for it): a server that
//! appends to the log meanwhile would write over what is added to it, and one that gives the next
//! number would meet a mail that has it. In sdbox mails above the index's last one get other
//! numbers and records, and records of mails that went since are expunged. Maildir gives new UIDs
//! by itself, and what mdbox misses it finds at its rebuild.
//!
//! A death in between is told by an empty file `restoring.<folder id>` beside the journal: the
//! next session brings the folder's index files back once more.
//!
//! A death of ours while a mail server was saving leaves a mail with its number and without a
//! record, too. sdbox would refuse the next mail and rebuild; so the first load of each index after
//! such a death looks for it.

use super::close::Leaving;
use super::error::{Error, Result};
use super::flush;
use super::load;
use super::local::RESTORING;
use super::need::{Need, Op, Stop};
use super::recover_sdbox::{INDEX_LOG, begin_index};
use super::restore::restore_alone;
use super::session::UserCell;
use super::user::User;
use crate::cache::metacache::Purpose;
use crate::format::{FolderId, Place};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Folders that are brought back on the way to one that is wanted. More come with the next call.
const RESTORES: usize = 16;

/// Has the index files of each folder that came back say what is there.
pub(super) async fn show_later_mails(cell: &Arc<UserCell>, purpose: Purpose) -> Result<()> {
    let mut again = RESTORES;
    while let Some(id) = cell.if_open(|user| user.unshown()).flatten() {
        match show(cell, id, purpose).await {
            Ok(()) => {}
            // Its log was removed as well: that folder first.
            Err(Error::Vanished { folder, .. }) if again > 0 => {
                again -= 1;
                restore_alone(cell, folder, purpose).await?;
            }
            Err(error @ Error::Damaged { .. }) => {
                tracing::error!(
                    user = %cell.name, folder = %id, %error,
                    "mails that came after the last flush may not show before Dovecot's rebuild"
                );
                cell.open_user(|user| user.is_shown(id))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn show(cell: &Arc<UserCell>, id: FolderId, purpose: Purpose) -> Result<()> {
    if cell.open_user(|user| Ok(user.half_restored.contains(&id)))? {
        restore_alone(cell, id, purpose).await?;
    }
    for other in cell.open_user(|user| Ok(user.mailboxes().others(user, id)))? {
        load::load_for(cell, other, purpose).await?;
    }
    let without = loop {
        let shown = cell.open_user(|user| {
            // What came back before the user is handed over is part of what is handed over.
            let leaving = std::mem::replace(&mut user.leaving, Leaving::No);
            let shown = user.show(id);
            user.leaving = leaving;
            Ok(shown)
        })?;
        match shown {
            Ok(without) => break without,
            Err(Stop::Error(error)) => return Err(error),
            // The flush that asks holds what raising a ceiling needs.
            Err(Stop::Wait(Need::Ceiling(_, folder, next))) if purpose == Purpose::Flush => {
                flush::raise_ceilings_alone(cell, Some((folder, next)), None).await?;
            }
            Err(Stop::Wait(need)) => flush::await_ceiling(need).await?,
        }
    };
    if let Some(mails) = without {
        begin_index(cell, mails).await?;
        cell.open_user(|user| user.is_shown(id))?;
    }
    Ok(())
}

impl User {
    /// A folder of which nothing may be answered before [`show_later_mails`].
    pub fn unshown(&self) -> Option<FolderId> {
        let id = self.restored.last().copied()?;
        (self.ready && self.leaving != Leaving::Sealed && self.owns().is_ok()).then_some(id)
    }

    /// Gives the folder of mails if they have no index at all.
    fn show(&mut self, id: FolderId) -> Op<Option<FolderId>> {
        if self.half_restored.contains(&id) {
            return Err(Error::Vanished { folder: id, what: "half of it is back".into() }.into());
        }
        if let Some(mails) = self.numbered_mails(id) {
            let index = self.index_of(mails, INDEX_LOG);
            if index.is_none() && self.restoring.contains(&id) {
                return Ok(Some(mails));
            }
            // After a death alone nothing says that the folder is the one in use.
            if self.restoring.contains(&id) || index == Some(id) {
                self.show_numbers_above(mails, index, self.restoring.contains(&id))?;
            }
        }
        self.is_shown(id)?;
        Ok(None)
    }

    /// A folder's index files are about to be those of the last flush.
    pub(super) fn begin_restoring(&mut self, id: FolderId) -> Result<()> {
        let path = self.restoring_path(id);
        let disk = self.session.disk();
        disk.replace(&path, b"", false).map_err(|e| Error::disk(path.display().to_string(), &e))?;
        self.restoring.insert(id);
        self.recount_state();
        Ok(())
    }

    fn is_shown(&mut self, id: FolderId) -> Result<()> {
        if self.restoring.contains(&id) {
            let path = self.restoring_path(id);
            match self.session.disk().remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::disk(path.display().to_string(), &e));
                }
                _ => self.restoring.remove(&id),
            };
            self.half_restored.remove(&id);
            self.recount_state();
        }
        self.restored.retain(|other| *other != id);
        Ok(())
    }

    fn restoring_path(&self, id: FolderId) -> PathBuf {
        self.state_dir.join(format!("{RESTORING}{id}"))
    }

    /// After a death of ours alone a folder of an index may have a mail that it does not know.
    pub(super) fn look_after_death(&mut self, id: FolderId) {
        if self.inherited && self.child(id, INDEX_LOG).is_some() {
            self.restored.push(id);
        }
    }

    /// The numbers of the mails that went from an sdbox folder since the last flush.
    pub(super) fn numbers_gone(&self, mails: FolderId) -> Vec<u32> {
        let at = Place::own(mails);
        let Some(folder) = self.tree.folders.get(&mails) else { return Vec::new() };
        let changed = folder.unflushed.names.iter().filter(|(sub, _)| *sub == at.sub);
        changed
            .filter(|(_, name)| self.child(mails, name).is_none())
            .filter_map(|(_, name)| super::recover_sdbox::number(name, b"u."))
            .collect()
    }
}
