//! Setting attributes of directories and of what is in them.

use super::api::{Attr, Caller, Ino, SetAttr, SetTime, Step};
use super::attr;
use super::calls::{VmailFs, loaded, step};
use crate::format::Place;
use crate::format::journal::Change;
use crate::format::listing::{Attrs, Line, Owner};
use crate::vmail::error::{Error, Plain};
use crate::vmail::node::NodeIx;
use crate::vmail::session::UserCell;
use std::sync::Arc;

impl VmailFs {
    pub(super) fn dir_attr(&self, cell: &Arc<UserCell>, at: Place) -> Step<Attr> {
        if at == Place::ROOT {
            return Step::Done(Ok(self.root_attr(cell)));
        }
        step(cell.with(|user| {
            let dir = user.tree.dir(at).ok_or(Error::Lost { user: user.name.to_string() })?;
            Ok(attr::of_dir(user, at, dir))
        }))
    }

    pub(super) fn set_dir_attr(&self, cell: &Arc<UserCell>, at: Place, set: SetAttr) -> Step<Attr> {
        step(cell.with(|user| {
            loaded(user, at)?;
            let now = user.now();
            let owner_now = user.tree.dir(at).ok_or(Plain::NotFound)?.owner.unwrap_or(user.owner);
            let owner = set_owner(owner_now, set);
            let empty_user = user.tree.folders.len() == 1
                && user.tree.dir(Place::ROOT).is_some_and(|d| d.entries.is_empty());
            let mut changes = Vec::new();
            if at == Place::ROOT && empty_user && owner != user.owner {
                // A user that has nothing yet: its files will belong to whom it belongs to.
                let mode = set.mode.unwrap_or(user.root_mode()) & 0o7777;
                changes.push(Change::User { owner, mode });
            }
            let based = changes.is_empty();
            let deviation = if based { user.deviation(owner) } else { None };
            let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
            let attrs = Attrs {
                mode: set.mode.map_or(dir.mode, |m| m & 0o7777),
                owner: deviation,
                mtime: time(set.mtime, now).unwrap_or(dir.mtime),
            };
            if attrs != dir.attrs() || !based {
                let line = Line::Dir { sub: at.sub, attrs };
                changes.push(Change::Line { folder: at.folder, line });
                user.commit(changes)?;
                if !based {
                    user.owner = owner;
                }
                user.important();
            }
            let dir = user.tree.dir_mut(at).ok_or(Plain::NotFound)?;
            dir.mode = attrs.mode;
            dir.owner = attrs.owner;
            dir.mtime = attrs.mtime;
            dir.ctime = now;
            let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
            Ok(attr::of_dir(user, at, dir))
        }))
    }

    pub(super) fn set_node_attr(
        &self,
        caller: Caller,
        cell: &Arc<UserCell>,
        (ix, ino): (NodeIx, Ino),
        set: SetAttr,
    ) -> Step<Attr> {
        step(cell.with(|user| {
            user.node_known(ix, ino)?;
            let now = user.now();
            if let Some(size) = set.size {
                let node = user.node(ix)?;
                let shrinks = size < node.size;
                if shrinks && let Some(name) = node.names.first() {
                    let bytes = user.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
                    self.may_delete(caller, user, name.at, &bytes)?;
                }
                user.truncate(ix, size)?;
            }
            let owner_now = user.node(ix)?.owner.unwrap_or(user.owner);
            let owner = (set.uid.is_some() || set.gid.is_some()).then(|| set_owner(owner_now, set));
            user.set_attrs(ix, set.mode, owner, time(set.mtime, now))?;
            Ok(attr::of_node(user, user.node(ix)?))
        }))
    }
}

fn time(set: Option<SetTime>, now: crate::format::Timestamp) -> Option<crate::format::Timestamp> {
    set.map(|set| match set {
        SetTime::Now => now,
        SetTime::At(at) => at,
    })
}

fn set_owner(now: Owner, set: SetAttr) -> Owner {
    Owner { uid: set.uid.unwrap_or(now.uid), gid: set.gid.unwrap_or(now.gid) }
}
