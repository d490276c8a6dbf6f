//! What the kernel knows: names it was told, and what it has forgotten. What root may delete.

use super::api::{Caller, Found, Ino};
use super::attr;
use super::calls::VmailFs;
use crate::dovecot::classes::Class;
use crate::format::Place;
use crate::vmail::error::{Error, Plain};
use crate::vmail::need::Op;
use crate::vmail::session::{InoTarget, UserCell};
use crate::vmail::tree::Target;
use crate::vmail::user::User;
use std::sync::Arc;

impl VmailFs {
    /// What the kernel is told of a name, counted as a lookup.
    pub(super) fn found(
        &self,
        user: &mut User,
        cell: &Arc<UserCell>,
        at: Place,
        target: Target,
    ) -> Op<Found> {
        let (attr, register) = match target {
            Target::Node(ix) => {
                let node = user.node_mut(ix)?;
                node.lookups += 1;
                let attr = attr::of_node(user, user.node(ix)?);
                (attr, InoTarget::Node(cell.clone(), ix))
            }
            Target::Folder(_) | Target::Sub(_) => {
                let place = match target {
                    Target::Folder(id) => Place::own(id),
                    Target::Sub(sub) => Place { folder: at.folder, sub },
                    Target::Node(_) => return Err(Plain::NotDir.into()),
                };
                let dir = user.tree.dir_mut(place).ok_or(Plain::NotFound)?;
                dir.lookups += 1;
                let dir = user.tree.dir(place).ok_or(Plain::NotFound)?;
                (attr::of_dir(user, place, dir), InoTarget::Dir(cell.clone(), place))
            }
        };
        self.session.register(attr.ino, || register);
        Ok(Found { attr, cacheable: true })
    }

    /// The policy on deletions by root: a site's old `rm -rf` of a metacache must not delete
    /// its mail.
    pub(super) fn may_delete(
        &self,
        caller: Caller,
        user: &User,
        at: Place,
        name: &[u8],
    ) -> Result<(), Error> {
        if caller.uid != 0 || self.session.settings.allow_root_delete {
            return Ok(());
        }
        let harmless = match user.target(at, name)? {
            Some(Target::Node(ix)) => {
                let class = user.node(ix)?.class;
                class.is_local_only() || class == Class::MailTemp
            }
            // An empty folder is a user's folder, too.
            Some(Target::Folder(_) | Target::Sub(_)) => false,
            None => true,
        };
        if harmless {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "user {}: root may not delete {}: these are the mails themselves, not a cache of them \
             (to drop a cache use `vmailfs metacache flush` and remove files of the caches; to \
             delete mail as root mount with allow_root_delete)",
            user.name,
            String::from_utf8_lossy(name)
        )))
    }

    /// The kernel has forgotten so many lookups of an inode.
    pub(super) fn forget_lookups(&self, ino: Ino, lookups: u64) {
        match self.session.target(ino) {
            Some(InoTarget::Node(cell, ix)) => {
                let known = cell.if_open(|user| {
                    if let Some(node) = user.tree.nodes.get_mut(ix)
                        && node.ino == ino
                    {
                        node.lookups = node.lookups.saturating_sub(lookups);
                        if node.lookups == 0 {
                            if node.handles == 0 {
                                self.session.forget_ino(ino);
                            }
                            user.drop_if_unused(ix);
                        }
                        return true;
                    }
                    false
                });
                if known != Some(true) {
                    // Its user was closed, or opened again since.
                    self.session.forget_ino(ino);
                }
            }
            Some(InoTarget::Dir(cell, Place::ROOT)) => {
                let mut root = cell.root.lock();
                root.lookups = root.lookups.saturating_sub(lookups);
                if root.lookups == 0 {
                    self.session.forget_ino(ino);
                }
            }
            Some(InoTarget::Dir(cell, at)) => {
                let known = cell.if_open(|user| match user.tree.dir_mut(at) {
                    Some(dir) if dir.ino == ino => {
                        dir.lookups = dir.lookups.saturating_sub(lookups);
                        // Under the user's lock: a lookup that comes now registers it again.
                        if dir.lookups == 0 {
                            self.session.forget_ino(ino);
                        }
                        true
                    }
                    _ => false,
                });
                if known != Some(true) {
                    self.session.forget_ino(ino);
                }
            }
            // The mount's root and what leads to users stay: they are few.
            Some(InoTarget::Above(_)) | None => {}
        }
    }
}
