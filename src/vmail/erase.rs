//! Deleting everything a user has: mails, folders, index files.
//!
//! It is what a client could do by itself, only all of it: each object loses its names, and a flush
//! puts it on the dropped list. So the bytes stay in the store until `retention` is over, gc takes
//! them then, and until then an undelete or a restore brings the user back. What is left is an empty
//! user with its head.
//!
//! Nothing is deleted of a user of whom somebody has a file open. Should somebody come in between,
//! the rest stays, and the deletion can be asked for again.

use super::error::Result;
use super::flush::{self, Options};
use super::need::Stop;
use super::session::UserCell;
use super::tree::{NameBytes, Target};
use super::user::User;
use super::{load, open, wait};
use crate::format::{FolderId, Place};
use crate::fs::api::Invalidate;
use std::sync::Arc;

/// Names taken away under one holding of the user's lock.
const AT_ONCE: usize = 256;

/// What was taken away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Erased {
    pub files: u64,
    pub folders: u64,
}

/// How a deletion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done(Erased),
    /// Somebody has a file open; so much was deleted all the same.
    Busy(Erased),
}

/// Deletes everything of a user, and flushes that.
///
/// # Errors
/// Those of opening, loading and flushing.
pub async fn erase(cell: &Arc<UserCell>) -> Result<Outcome> {
    open::open(cell).await?;
    let mut erased = Erased::default();
    loop {
        while let Some(folder) = cell.open_user(|user| Ok(user.first_unloaded()))? {
            load::load(cell, folder).await?;
        }
        let stop = match cell.with(|user| Ok(user.erase_some(&mut erased))) {
            Ok(Ok(Some(true))) => break,
            Ok(Ok(Some(false))) => continue,
            Ok(Ok(None)) => return Ok(Outcome::Busy(erased)),
            Ok(Err(stop)) | Err(stop) => stop,
        };
        match stop {
            Stop::Wait(need) => wait::satisfy(&cell.session, need).await?,
            Stop::Error(error) => return Err(error),
        }
    }
    let options = Options { caches: false, release: false, important_only: false };
    flush::flush(cell, options).await?;
    Ok(Outcome::Done(erased))
}

impl User {
    /// Whether somebody has a file open.
    pub fn is_busy(&self) -> bool {
        self.tree.nodes.iter().any(|(_, node)| node.handles > 0)
    }

    fn first_unloaded(&self) -> Option<FolderId> {
        self.tree.folders.values().find(|f| !f.loaded).map(|f| f.id)
    }

    /// Takes some names away: whether that were the last. `None`: it is in use.
    fn erase_some(&mut self, erased: &mut Erased) -> std::result::Result<Option<bool>, Stop> {
        if self.is_busy() {
            return Ok(None);
        }
        self.may_write()?;
        let Some((at, name, target)) = self.deepest() else { return Ok(Some(true)) };
        let names = match target {
            Target::Node(_) => self.files_in(at),
            Target::Folder(_) | Target::Sub(_) => vec![name],
        };
        for name in names {
            match target {
                Target::Node(_) => {
                    self.unlink(at, &name)?;
                    erased.files += 1;
                }
                Target::Folder(_) => {
                    self.rmdir(at, &name)?;
                    erased.folders += 1;
                }
                Target::Sub(_) => self.rmdir(at, &name)?,
            }
            if let Some(dir) = self.tree.dir(at) {
                // The kernel remembers names.
                let parent = dir.ino;
                self.session.invalidate(Invalidate::Name { parent, name: name.to_vec() });
            }
        }
        Ok(Some(false))
    }

    fn files_in(&self, at: Place) -> Vec<NameBytes> {
        let all = self.tree.dir(at).map(|dir| dir.entries.after(0));
        let files = all.into_iter().flatten().filter(|(.., to)| matches!(to, Target::Node(_)));
        files.take(AT_ONCE).map(|(_, name, _)| name.clone()).collect()
    }

    /// A name below which there is nothing.
    fn deepest(&self) -> Option<(Place, NameBytes, Target)> {
        let mut at = Place::ROOT;
        let mut found = None;
        loop {
            let Some((_, name, target)) = self.tree.dir(at)?.entries.after(0).next() else {
                return found;
            };
            found = Some((at, name.clone(), target));
            at = match target {
                Target::Node(_) => return found,
                Target::Folder(id) => Place::own(id),
                Target::Sub(sub) => Place { folder: at.folder, sub },
            };
        }
    }
}
