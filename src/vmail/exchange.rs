//! RENAME_EXCHANGE: two names, of files or folders alike, swap what they stand for.
//!
//! One record says both halves, so no crash leaves a name without its file. Cookies belong to
//! the names and stay: a listing that is being read shows each name once.

use super::error::{Error, Plain, Result};
use super::need::Op;
use super::tree::{MAX_DEPTH, Target};
use super::user::User;
use crate::format::Place;
use crate::format::journal::{Change, DiskOp};
use crate::format::listing::Line;

/// A name and what it stands for before the exchange.
#[derive(Clone, Copy)]
struct Side<'a> {
    at: Place,
    name: &'a [u8],
    target: Target,
}

impl User {
    /// Swaps two names.
    pub fn exchange(&mut self, a: Place, a_name: &[u8], b: Place, b_name: &[u8]) -> Op<()> {
        self.may_write()?;
        let side = |at, name| -> Result<Side<'_>> {
            Ok(Side { at, name, target: self.target(at, name)?.ok_or(Plain::NotFound)? })
        };
        let (a, b) = (side(a, a_name)?, side(b, b_name)?);
        if a.target == b.target {
            return Ok(());
        }
        for side in [a, b] {
            if let Target::Node(ix) = side.target {
                self.here(ix)?;
            }
        }
        let now = self.now();
        let mut changes = self.moves_to(a, b)?;
        changes.extend(self.moves_to(b, a)?);
        changes.extend(self.touch_line(a.at, now));
        if a.at != b.at {
            changes.extend(self.touch_line(b.at, now));
        }
        changes.extend(self.exchange_on_disk(a, b)?.map(Change::Disk));
        self.commit(changes)?;
        self.tree.retarget(a.at, a.name, b.target);
        self.tree.retarget(b.at, b.name, a.target);
        for (from, to) in [(a, b), (b, a)] {
            match from.target {
                Target::Node(ix) => {
                    let class = self.class_for(ix, to.at, to.name)?;
                    self.renamed(ix, class, to.name, now)?;
                    self.named(ix, to.at);
                }
                Target::Folder(id) => {
                    self.judge_anew(id);
                    self.urgent();
                }
                Target::Sub(_) => self.urgent(),
            }
        }
        self.touch(a.at, now);
        self.touch(b.at, now);
        self.important();
        Ok(())
    }

    /// The record of `from` getting the name `to`.
    fn moves_to(&self, from: Side<'_>, to: Side<'_>) -> Result<Vec<Change>> {
        let name = to.name.to_vec();
        let line = |line| Change::Line { folder: to.at.folder, line };
        let unset = Line::Unset { sub: to.at.sub, name: name.clone() };
        match from.target {
            Target::Node(ix) => {
                let class = self.class_for(ix, to.at, to.name)?;
                if User::tracked(class) {
                    // What is known of UIDs goes with the names; servers do not do this.
                    return Err(Plain::Invalid.into());
                }
                let set = |entry| Line::Set { sub: to.at.sub, name, entry };
                Ok(vec![line(self.node(ix)?.entry_as(class).map_or(unset, set))])
            }
            Target::Folder(id) if self.tree.within(to.at, id) => Err(Plain::Invalid.into()),
            Target::Folder(id) if self.tree.depth(to.at) + self.tree.levels(id) > MAX_DEPTH => {
                Err(Plain::NameTooLong.into())
            }
            Target::Folder(id) => {
                let mut changes = vec![Change::Folder { id, parent: to.at, name }];
                if matches!(to.target, Target::Node(_)) {
                    changes.push(line(unset));
                }
                Ok(changes)
            }
            Target::Sub(_) => Err(Plain::CrossDevice.into()),
        }
    }

    /// What must happen in the metacache, where folders and local files lie and mails do not.
    fn exchange_on_disk(&self, a: Side<'_>, b: Side<'_>) -> Result<Option<DiskOp>> {
        let lies_there = |side: Side<'_>| match side.target {
            Target::Node(ix) => self.tree.kind_is_local(ix),
            Target::Folder(_) | Target::Sub(_) => true,
        };
        let rename = |a: Side<'_>, b: Side<'_>| DiskOp::Rename {
            from: a.at,
            name: a.name.to_vec(),
            to: b.at,
            new_name: b.name.to_vec(),
        };
        Ok(match (lies_there(a), lies_there(b)) {
            (false, false) => None,
            (true, false) => Some(rename(a, b)),
            (false, true) => Some(rename(b, a)),
            (true, true) => {
                // A folder without files has no directory there.
                for side in [a, b].into_iter().filter(|s| matches!(s.target, Target::Folder(_))) {
                    let path = self.file_path(side.at, side.name);
                    let made = self.make_cache_dir(&path);
                    made.map_err(|e| Error::disk("metacache", &e))?;
                }
                Some(DiskOp::Exchange {
                    from: a.at,
                    name: a.name.to_vec(),
                    to: b.at,
                    new_name: b.name.to_vec(),
                })
            }
        })
    }
}
