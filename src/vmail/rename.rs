//! Renames of files and folders: one record each, whatever lies below.

use super::error::{Plain, Result};
use super::names::{check_name, line};
use super::need::Op;
use super::node::{Kind, NodeIx, Since, Tracker};
use super::tree::{MAX_DEPTH, NameBytes, Target};
use super::user::User;
use crate::dovecot::classes::{Class, IndexKind};
use crate::dovecot::keywords;
use crate::format::journal::{Change, DiskOp};
use crate::format::listing::Line;
use crate::format::{FolderId, Place, Sub, Timestamp};

impl User {
    pub fn rename(
        &mut self,
        from: Place,
        name: &[u8],
        to: Place,
        new_name: &[u8],
        no_replace: bool,
    ) -> Op<()> {
        check_name(new_name)?;
        self.may_write()?;
        let source = self.target(from, name)?.ok_or(Plain::NotFound)?;
        let there = self.target(to, new_name)?;
        if no_replace && there.is_some() {
            return Err(Plain::Exists.into());
        }
        if from == to && name == new_name {
            return Ok(());
        }
        match (source, there) {
            (Target::Node(ix), Some(Target::Node(other))) if ix == other => Ok(()),
            (Target::Node(_), Some(Target::Folder(_) | Target::Sub(_))) => Err(Plain::IsDir.into()),
            (Target::Node(ix), there) => {
                let replaced = match there {
                    Some(Target::Node(other)) => Some(other),
                    _ => None,
                };
                self.rename_node(from, name, ix, to, new_name, replaced)
            }
            (_, Some(Target::Node(_))) => Err(Plain::NotDir.into()),
            (Target::Folder(id), there) => self.rename_folder(from, name, id, to, new_name, there),
            // Maildir's three belong to their folder; whoever moves one by hand copies it.
            (Target::Sub(_), _) => Err(Plain::CrossDevice.into()),
        }
    }

    pub(super) fn rename_node(
        &mut self,
        from: Place,
        name: &[u8],
        ix: NodeIx,
        to: Place,
        new_name: &[u8],
        replaced: Option<NodeIx>,
    ) -> Op<()> {
        self.here(ix)?;
        let now = self.now();
        let node = self.tree.nodes.get(ix).ok_or(Plain::NotFound)?;
        let old_class = node.class;
        let local = matches!(node.kind, Kind::Local(_));
        let class = self.class_for(ix, to, new_name)?;
        if local && class == Class::Index(IndexKind::UidList) {
            self.await_uidlist_ceiling(to, ix)?;
        }
        let uid_validity = match (local, class) {
            (true, Class::Index(IndexKind::UidValidity)) => {
                self.await_uidvalidity_ceiling(new_name)?
            }
            _ => None,
        };
        let mut changes = Vec::new();
        if node_is_recorded(self, ix, old_class) {
            changes.push(line(from, Line::Unset { sub: from.sub, name: name.to_vec() }));
        }
        if let Some(other) = replaced {
            changes.extend(self.loss(to, new_name, other));
        }
        let entry = self.tree.nodes.get(ix).and_then(|node| node.entry_as(class));
        if let Some(entry) = entry {
            changes.push(line(to, Line::Set { sub: to.sub, name: new_name.to_vec(), entry }));
        }
        let disk = DiskOp::Rename { from, name: name.to_vec(), to, new_name: new_name.to_vec() };
        let replaced_local = replaced.is_some_and(|other| self.tree.kind_is_local(other));
        if changes.is_empty() {
            if local {
                self.run_unrecorded(disk)?;
            }
        } else {
            changes.extend(self.touch_line(from, now));
            if to != from {
                changes.extend(self.touch_line(to, now));
            }
            if local {
                changes.push(Change::Disk(disk));
            } else if replaced_local {
                changes.push(Change::Disk(DiskOp::Unlink { at: to, name: new_name.to_vec() }));
            }
            self.commit(changes)?;
            match class {
                // A mail gets its name: the delivery itself is safe already. A move, or
                // flags, are what a lost machine would undo.
                Class::Mail if self.tells_flags(to.folder, new_name) => self.important(),
                Class::Mail if old_class == Class::MailTemp => self.unimportant(),
                Class::Growing => self.unimportant(),
                Class::Mail if from.folder == to.folder && from.sub == Sub::New => {
                    self.unimportant();
                }
                Class::Mail => self.important(),
                _ => {}
            }
        }
        if let Some(other) = replaced {
            self.tree.detach(to, new_name);
            self.lost_name(other, now);
        }
        if from == to {
            let new_name: NameBytes = new_name.into();
            if let Some(dir) = self.tree.dir_mut(from) {
                dir.entries.rename(name, new_name);
            }
        } else {
            self.tree.detach(from, name);
            self.tree.attach(to, new_name.into(), ix);
        }
        self.touch(from, now);
        if to != from {
            self.touch(to, now);
        }
        self.renamed(ix, class, new_name, now)?;
        self.named(ix, to);
        if let Some(value) = uid_validity {
            self.uidvalidity_given(value);
        }
        if old_class == Class::MailTemp && class == Class::Mail {
            self.note_new_mail();
        }
        Ok(())
    }

    /// The class that a node has under another name; an error if it cannot have that name.
    pub(super) fn class_for(&self, ix: NodeIx, to: Place, name: &[u8]) -> Result<Class> {
        let class = self.class_of(to, name);
        match &self.node(ix)?.kind {
            // Its bytes would have to become an object at once, and a rename does not wait.
            Kind::Local(_) if class.holds_mail() => Err(Plain::CrossDevice.into()),
            Kind::Local(_) | Kind::Symlink(_) => Ok(class),
            // A mail keeps being one whatever it is called.
            Kind::Mail(_) | Kind::Published(_) => Ok(match class {
                Class::MailTemp => Class::MailTemp,
                _ => Class::Mail,
            }),
            Kind::Growing(_) => Ok(Class::Growing),
        }
    }

    /// A node has another name.
    pub(super) fn renamed(
        &mut self,
        ix: NodeIx,
        class: Class,
        name: &[u8],
        now: Timestamp,
    ) -> Result<()> {
        let node = self.node_mut(ix)?;
        node.class = class;
        node.ctime = now;
        match &mut node.kind {
            Kind::Growing(grow) => grow.temporary = super::recover::is_temporary(name),
            Kind::Local(local) => {
                local.since = Since::everything();
                local.shipped = false;
                local.tracker = Tracker::None;
                return self.became(ix);
            }
            Kind::Mail(_) | Kind::Published(_) | Kind::Symlink(_) => {}
        }
        Ok(())
    }

    pub(super) fn rename_folder(
        &mut self,
        from: Place,
        name: &[u8],
        id: FolderId,
        to: Place,
        new_name: &[u8],
        there: Option<Target>,
    ) -> Op<()> {
        if self.tree.within(to, id) {
            return Err(Plain::Invalid.into());
        }
        if self.tree.depth(to) + self.tree.levels(id) > MAX_DEPTH {
            return Err(Plain::NameTooLong.into());
        }
        let replaced = match there {
            None => None,
            Some(Target::Folder(other)) if other == id => return Ok(()),
            Some(Target::Folder(other)) => {
                self.check_empty(other)?;
                Some(other)
            }
            Some(_) => return Err(Plain::Exists.into()),
        };
        let now = self.now();
        let mut changes = Vec::new();
        changes.extend(replaced.map(|other| Change::NoFolder { id: other }));
        changes.push(Change::Folder { id, parent: to, name: new_name.to_vec() });
        changes.extend(self.touch_line(from, now));
        if to != from {
            changes.extend(self.touch_line(to, now));
        }
        changes.push(Change::Disk(DiskOp::Rename {
            from,
            name: name.to_vec(),
            to,
            new_name: new_name.to_vec(),
        }));
        self.commit(changes)?;
        if let Some(other) = replaced {
            self.remove_folder(to, new_name, other);
        }
        self.move_folder(from, name, id, to, new_name);
        self.touch(from, now);
        self.touch(to, now);
        self.urgent();
        Ok(())
    }

    pub(super) fn move_folder(
        &mut self,
        from: Place,
        name: &[u8],
        id: FolderId,
        to: Place,
        new_name: &[u8],
    ) {
        let new_name: NameBytes = new_name.into();
        if from == to {
            if let Some(dir) = self.tree.dir_mut(from) {
                dir.entries.rename(name, new_name.clone());
            }
        } else {
            if let Some(dir) = self.tree.dir_mut(from) {
                dir.entries.remove(name);
            }
            if let Some(dir) = self.tree.dir_mut(to) {
                dir.entries.insert(new_name.clone(), Target::Folder(id));
            }
        }
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.parent = to;
            folder.name = new_name;
        }
        self.judge_anew(id);
    }
}

impl User {
    /// Whether a Maildir name says more than that somebody has seen the mail arrive, and what the
    /// server derives from the mail. Of a letter that cannot be looked up that is not known.
    pub(super) fn tells_flags(&self, folder: FolderId, name: &[u8]) -> bool {
        let letters = keywords::letters(name);
        if letters.is_empty() {
            return false;
        }
        let both = [Some(folder), self.counterpart(folder)].into_iter().flatten();
        let content = both
            .filter_map(|id| self.child_content(id, b"dovecot-keywords").ok().flatten())
            .find(|content| !content.is_empty())
            .unwrap_or_default();
        !letters
            .iter()
            .all(|letter| keywords::of_letter(&content, *letter).is_some_and(keywords::is_derived))
    }
}

/// Whether the journal has said that a node is there under the name it has now.
pub(super) fn node_is_recorded(user: &User, ix: NodeIx, class: Class) -> bool {
    user.tree.nodes.get(ix).is_some_and(|n| n.entry().is_some()) && !class.is_local_only()
}
