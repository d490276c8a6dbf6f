//! Names: create, link, unlink, rename, folders. None of these waits for a store, and none
//! leaves anything half done: the record says it all, or nothing happened.

use super::error::{Error, Plain, Result};
use super::need::{Need, Op, Stop};
use super::node::{Growing, Kind, Mail, Names, Node, NodeIx, Since, Tracker};
use super::tree::{Dir, Folder, MAX_DEPTH, NameBytes, Target};
use super::user::User;
use crate::dovecot::classes::{Class, IndexKind};
use crate::format::journal::{Change, DiskOp};
use crate::format::key::KeyTail;
use crate::format::listing::{Attrs, Line, Owner};
use crate::format::{FolderId, Place, Sub, Timestamp};
use crate::fs::api::Caller;
use std::sync::Arc;

/// Longest name.
pub const NAME_MAX: usize = 255;

fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(Plain::NameTooLong.into());
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0)
    {
        return Err(Plain::Invalid.into());
    }
    Ok(())
}

fn line(at: Place, line: Line) -> Change {
    Change::Line { folder: at.folder, line }
}

impl User {
    /// Whom a new file in `at` belongs to: its maker, or the directory's group if that is
    /// set-group-id.
    fn new_owner(&self, at: Place, caller: Caller) -> Option<Owner> {
        let mut owner = Owner { uid: caller.uid, gid: caller.gid };
        if let Some(dir) = self.tree.dir(at)
            && dir.mode & 0o2000 != 0
        {
            owner.gid = dir.owner.unwrap_or(self.owner).gid;
        }
        self.deviation(owner)
    }

    /// What is stored for an owner: nothing where it is the user's, or the one that this mount
    /// shows for everything.
    pub fn deviation(&self, owner: Owner) -> Option<Owner> {
        (owner != self.owner && Some(owner) != self.session.settings.owner).then_some(owner)
    }

    pub fn target(&self, at: Place, name: &[u8]) -> Result<Option<Target>> {
        let dir = self.tree.dir(at).ok_or(Plain::NotFound)?;
        Ok(dir.entries.get(name).map(|(_, target)| target))
    }

    pub(super) fn touch(&mut self, at: Place, now: Timestamp) {
        if let Some(dir) = self.tree.dir_mut(at) {
            dir.touch(now);
        }
    }

    fn new_node(&mut self, kind: Kind, class: Class, mode: u32, owner: Option<Owner>) -> Node {
        let now = self.now();
        Node {
            ino: self.session.new_ino(),
            kind,
            class,
            size: 0,
            mode: mode & 0o7777,
            owner,
            mtime: now,
            ctime: now,
            names: Names::None,
            nlink: 1,
            lookups: 0,
            handles: 0,
            writers: 0,
        }
    }

    /// A new empty file; the name must be free.
    pub fn create(&mut self, caller: Caller, at: Place, name: &[u8], mode: u32) -> Op<NodeIx> {
        check_name(name)?;
        let class = self.class_of(at, name);
        self.may_change(class)?;
        if self.target(at, name)?.is_some() {
            return Err(Plain::Exists.into());
        }
        let uid_validity = match class {
            Class::Index(IndexKind::UidValidity) => self.await_uidvalidity_ceiling(name)?,
            _ => None,
        };
        let owner = self.new_owner(at, caller);
        let now = self.now();
        let kind = match class {
            Class::Mail | Class::MailTemp => {
                let staged =
                    self.session.staging.create().map_err(|e| Error::disk("staging", &e))?;
                let mail = Mail { staged: Some(Arc::new(staged)), dirty: true, ..Mail::default() };
                Kind::Mail(Box::new(mail))
            }
            Class::Growing => {
                let temporary = super::recover::is_temporary(name);
                Kind::Growing(Box::new(Growing { temporary, ..Growing::default() }))
            }
            _ => Kind::Local(Box::new(User::new_local())),
        };
        let node = self.new_node(kind, class, mode, owner);
        let disk = DiskOp::Create { at, name: name.to_vec() };
        let local = matches!(node.kind, Kind::Local(_));
        if let Some(entry) = node.entry() {
            let mut changes = vec![line(at, Line::Set { sub: at.sub, name: name.to_vec(), entry })];
            changes.extend(self.touch_line(at, now));
            if local {
                changes.push(Change::Disk(disk));
            }
            self.commit(changes)?;
            self.note_new_name(class);
        } else if local {
            self.run_unrecorded(disk)?;
        }
        let ix = self.tree.nodes.add(node);
        self.tree.attach(at, name.into(), ix);
        self.touch(at, now);
        if let Some(value) = uid_validity {
            self.uidvalidity_given(value);
        }
        Ok(ix)
    }

    fn note_new_name(&mut self, class: Class) {
        match class {
            c if c.is_cache() || c.holds_mail() => self.unimportant(),
            Class::Index(IndexKind::Log | IndexKind::LogRotated | IndexKind::Snapshot) => {
                self.unimportant();
            }
            _ => self.important(),
        }
    }

    pub fn symlink(&mut self, caller: Caller, at: Place, name: &[u8], to: &[u8]) -> Op<NodeIx> {
        check_name(name)?;
        if to.is_empty() || to.len() > 4095 || to.contains(&0) {
            return Err(Plain::Invalid.into());
        }
        self.may_write()?;
        if self.target(at, name)?.is_some() {
            return Err(Plain::Exists.into());
        }
        let now = self.now();
        let owner = self.new_owner(at, caller);
        let mut node = self.new_node(Kind::Symlink(to.into()), Class::Other, 0o777, owner);
        node.size = to.len() as u64;
        let mut changes = Vec::new();
        if let Some(entry) = node.entry() {
            changes.push(line(at, Line::Set { sub: at.sub, name: name.to_vec(), entry }));
        }
        changes.extend(self.touch_line(at, now));
        self.commit(changes)?;
        self.important();
        let ix = self.tree.nodes.add(node);
        self.tree.attach(at, name.into(), ix);
        self.touch(at, now);
        Ok(ix)
    }

    /// A further name for a file.
    pub fn link(&mut self, ix: NodeIx, at: Place, name: &[u8]) -> Op<()> {
        check_name(name)?;
        self.may_write()?;
        if self.target(at, name)?.is_some() {
            return Err(Plain::Exists.into());
        }
        let class = self.class_for(ix, at, name)?;
        let node = self.tree.nodes.get(ix).ok_or(Plain::NotFound)?;
        if node.nlink == 0 {
            return Err(Plain::NotFound.into());
        }
        let now = self.now();
        let mut changes = Vec::new();
        match &node.kind {
            Kind::Mail(_) | Kind::Published(_) | Kind::Growing(_) => {
                if let Some(entry) = node.entry() {
                    changes.push(line(at, Line::Set { sub: at.sub, name: name.to_vec(), entry }));
                    let count = node.nlink + 1;
                    let names = |o: &KeyTail| Change::Names { object: o.id(), count };
                    changes.extend(node.objects().into_iter().map(names));
                    changes.extend(self.touch_line(at, now));
                }
            }
            Kind::Local(_) => {
                let first = node.names.first().ok_or(Plain::NotFound)?;
                let from = self.tree.name_bytes(first).ok_or(Plain::NotFound)?.to_vec();
                let disk =
                    DiskOp::Link { from: first.at, name: from, to: at, new_name: name.to_vec() };
                if class.is_local_only() {
                    self.run_unrecorded(disk)?;
                } else {
                    let entry = crate::format::listing::Entry::Local {
                        size: node.size,
                        attrs: node.attrs(),
                        object: None,
                    };
                    changes.push(line(at, Line::Set { sub: at.sub, name: name.to_vec(), entry }));
                    changes.extend(self.touch_line(at, now));
                    changes.push(Change::Disk(disk));
                }
            }
            Kind::Symlink(_) => return Err(Plain::CrossDevice.into()),
        }
        self.commit(changes)?;
        let (from_class, objects) = match self.tree.nodes.get_mut(ix) {
            Some(node) => {
                node.nlink += 1;
                node.ctime = now;
                // The weightier class decides: a lock linked into place is what it became, and a
                // mail of which a copy is being made stays a mail.
                let before = node.class;
                let lighter = class.is_local_only() || class == Class::MailTemp;
                if !lighter || before.is_local_only() || before == Class::MailTemp {
                    node.class = class;
                }
                if let Kind::Local(local) = &mut node.kind {
                    // No part has it under this name.
                    local.since = Since::everything();
                    local.shipped = false;
                }
                (before, node.objects().iter().map(|o| o.id()).collect::<Vec<_>>())
            }
            None => return Err(Plain::NotFound.into()),
        };
        self.tree.attach(at, name.into(), ix);
        self.touch(at, now);
        if !objects.is_empty() {
            let count = self.tree.nodes.get(ix).map_or(1, |n| n.nlink);
            for object in objects {
                self.tree.links.insert(object, count);
                self.tree.shared.insert(object, ix);
            }
            if from_class != Class::MailTemp {
                self.important();
            } else if class == Class::Mail {
                self.note_new_mail();
            }
        } else if self.tree.kind_is_local(ix) {
            self.became(ix)?;
        }
        Ok(())
    }

    /// A local file has a name that its class is decided by anew.
    fn became(&mut self, ix: NodeIx) -> Result<()> {
        let Some(node) = self.tree.nodes.get(ix) else { return Ok(()) };
        let class = node.class;
        self.note_new_name(class);
        if User::tracked(class) {
            let file = self.local_file(ix)?;
            let len = self.tree.nodes.get(ix).map_or(0, |n| n.size);
            let content = file
                .read_exact_at(0, usize::try_from(len).unwrap_or(usize::MAX))
                .map_err(|e| Error::disk("metacache", &e))?;
            let tracker = self.track(class, &content);
            if let Some(Node { kind: Kind::Local(local), .. }) = self.tree.nodes.get_mut(ix) {
                local.tracker = tracker;
            }
        }
        Ok(())
    }

    /// What goes on record when a node loses a name.
    fn loss(&self, at: Place, name: &[u8], ix: NodeIx) -> Vec<Change> {
        let Some(node) = self.tree.nodes.get(ix) else { return Vec::new() };
        let mut changes = Vec::new();
        if node.entry().is_some() {
            changes.push(line(at, Line::Unset { sub: at.sub, name: name.to_vec() }));
        }
        let left = node.nlink.saturating_sub(1);
        for object in node.objects() {
            changes.push(match left {
                0 => Change::Drop { object: object.clone() },
                count => Change::Names { object: object.id(), count },
            });
        }
        changes
    }

    /// The name is gone: the node counts it, and goes with its last one.
    pub(super) fn lost_name(&mut self, ix: NodeIx, now: Timestamp) {
        let Some(node) = self.tree.nodes.get_mut(ix) else { return };
        node.nlink = node.nlink.saturating_sub(1);
        node.ctime = now;
        let gone = node.nlink == 0;
        let left = node.nlink;
        let objects: Vec<_> = node.objects().iter().map(|o| o.id()).collect();
        for object in objects {
            if left > 1 {
                self.tree.links.insert(object, left);
            } else {
                self.tree.links.remove(&object);
            }
            if gone {
                self.session.fscache.remove(&self.name, object);
            }
        }
        self.drop_if_unused(ix);
    }

    pub fn drop_if_unused(&mut self, ix: NodeIx) {
        if let Some(node) = self.tree.collect(ix) {
            self.session.forget_ino(node.ino);
        }
    }

    pub fn unlink(&mut self, at: Place, name: &[u8]) -> Op<()> {
        let ix = match self.target(at, name)?.ok_or(Plain::NotFound)? {
            Target::Node(ix) => ix,
            Target::Folder(_) | Target::Sub(_) => return Err(Plain::IsDir.into()),
        };
        let now = self.now();
        let node = self.tree.nodes.get(ix).ok_or(Plain::NotFound)?;
        let class = node.class;
        self.may_change(class)?;
        let last_of_new_mail = node.nlink <= 1
            && class == Class::Mail
            && node.object().is_some_and(|o| o.id() > self.head.watermark);
        let local = matches!(node.kind, Kind::Local(_));
        let more_names = node.nlink > 1;
        let disk = DiskOp::Unlink { at, name: name.to_vec() };
        let mut changes = self.loss(at, name, ix);
        if changes.is_empty() {
            if local {
                self.run_unrecorded(disk)?;
            }
        } else {
            changes.extend(self.touch_line(at, now));
            if local {
                changes.push(Change::Disk(disk));
            }
            self.commit(changes)?;
            // A delivery that linked its mail into place takes the temporary name away.
            let spare = more_names && self.class_of(at, name) == Class::MailTemp;
            if class != Class::MailTemp && !class.is_cache() && !spare {
                self.important();
            }
            if last_of_new_mail || class == Class::Growing {
                self.urgent();
            }
        }
        self.tree.detach(at, name);
        self.touch(at, now);
        self.lost_name(ix, now);
        Ok(())
    }

    // ---- rename

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

    fn rename_node(
        &mut self,
        from: Place,
        name: &[u8],
        ix: NodeIx,
        to: Place,
        new_name: &[u8],
        replaced: Option<NodeIx>,
    ) -> Op<()> {
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
                // other flags, are what a lost machine would undo.
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

    pub(super) fn note_new_mail(&mut self) {
        let now = self.boot();
        self.changes.new_mails += 1;
        self.changes.new_since.get_or_insert(now);
        self.unimportant();
    }

    fn rename_folder(
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

    fn move_folder(&mut self, from: Place, name: &[u8], id: FolderId, to: Place, new_name: &[u8]) {
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
    }

    fn remove_folder(&mut self, at: Place, name: &[u8], id: FolderId) {
        if let Some(dir) = self.tree.dir_mut(at) {
            dir.entries.remove(name);
        }
        if let Some(folder) = self.tree.folders.remove(&id) {
            let snapshot = self.state_dir.join("listing").join(id.to_string());
            if let Err(error) = self.session.env.disk.remove_file(&snapshot)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "snapshot of a removed folder not removed");
            }
            for (_, dir) in folder.dirs() {
                if dir.lookups == 0 {
                    self.session.forget_ino(dir.ino);
                }
            }
        }
    }

    // ---- folders

    pub fn mkdir(&mut self, caller: Caller, at: Place, name: &[u8], mode: u32) -> Op<Target> {
        check_name(name)?;
        self.may_write()?;
        if self.target(at, name)?.is_some() {
            return Err(Plain::Exists.into());
        }
        if self.tree.depth(at) + 1 > MAX_DEPTH {
            return Err(Plain::NameTooLong.into());
        }
        let now = self.now();
        let owner = self.new_owner(at, caller);
        let inherited = self.tree.dir(at).map_or(0, |d| d.mode & 0o2000);
        let attrs = Attrs { mode: (mode & 0o7777) | inherited, owner, mtime: now };
        let touch = self.touch_line(at, now);
        let ino = self.session.new_ino();
        let sub = if at.sub == Sub::Own { Sub::from_name(name) } else { None };
        let target = match sub {
            Some(sub) => {
                let mut changes = vec![line(at, Line::Dir { sub, attrs })];
                changes.extend(touch);
                self.commit(changes)?;
                if let Some(folder) = self.tree.folders.get_mut(&at.folder) {
                    folder.set_dir(sub, Some(Dir::new(ino, attrs)));
                }
                Target::Sub(sub)
            }
            None => {
                let id = self.session.new_folder_id();
                let mut changes = vec![
                    Change::Folder { id, parent: at, name: name.to_vec() },
                    Change::Line { folder: id, line: Line::Dir { sub: Sub::Own, attrs } },
                ];
                changes.extend(touch);
                self.commit(changes)?;
                let mut folder = Folder::new(id, at, name);
                folder.loaded = true;
                folder.unflushed.dirs.insert(Sub::Own);
                folder.set_dir(Sub::Own, Some(Dir::new(ino, attrs)));
                self.tree.folders.insert(id, folder);
                Target::Folder(id)
            }
        };
        if let Some(dir) = self.tree.dir_mut(at) {
            dir.entries.insert(name.into(), target);
        }
        self.touch(at, now);
        self.urgent();
        Ok(target)
    }

    /// A folder may go when it is loaded and nothing is in it.
    fn check_empty(&self, id: FolderId) -> Op<()> {
        let folder = self.tree.folders.get(&id).ok_or(Plain::NotFound)?;
        if !folder.loaded {
            return Err(Stop::Wait(Need::load(self, id)));
        }
        if folder.dirs().any(|(_, dir)| !dir.entries.is_empty()) {
            return Err(Plain::NotEmpty.into());
        }
        Ok(())
    }

    pub fn rmdir(&mut self, at: Place, name: &[u8]) -> Op<()> {
        self.may_write()?;
        let now = self.now();
        let touch = self.touch_line(at, now);
        match self.target(at, name)?.ok_or(Plain::NotFound)? {
            Target::Node(_) => return Err(Plain::NotDir.into()),
            Target::Sub(sub) => {
                let place = Place { folder: at.folder, sub };
                if self.tree.dir(place).is_some_and(|d| !d.entries.is_empty()) {
                    return Err(Plain::NotEmpty.into());
                }
                let mut changes = vec![line(at, Line::NoDir { sub })];
                changes.extend(touch);
                self.commit(changes)?;
                self.remove_cache_dir(place);
                if let Some(dir) = self.tree.dir_mut(at) {
                    dir.entries.remove(name);
                }
                if let Some(folder) = self.tree.folders.get_mut(&at.folder)
                    && let Some(dir) = folder.set_dir(sub, None)
                {
                    self.session.forget_ino(dir.ino);
                }
            }
            Target::Folder(id) => {
                self.check_empty(id)?;
                let mut changes = vec![Change::NoFolder { id }];
                changes.extend(touch);
                self.commit(changes)?;
                self.remove_cache_dir(Place::own(id));
                self.remove_folder(at, name, id);
            }
        }
        self.touch(at, now);
        self.urgent();
        Ok(())
    }

    fn remove_cache_dir(&self, at: Place) {
        let path = self.cache_path(at);
        if let Err(error) = self.session.env.disk.remove_tree(&path) {
            // What is left there is named by no listing and goes at the next load.
            tracing::warn!(%error, path = %path.display(), "metacache directory not removed");
        }
    }

    /// Opens the file of a local node that was just created.
    pub fn open_local(&mut self, ix: NodeIx) -> Result<()> {
        let file = self.local_file(ix)?;
        if let Some(Node { kind: Kind::Local(local), .. }) = self.tree.nodes.get_mut(ix) {
            local.file = Some(file);
        }
        Ok(())
    }
}

/// Whether the journal has said that a node is there under the name it has now.
fn node_is_recorded(user: &User, ix: NodeIx, class: Class) -> bool {
    user.tree.nodes.get(ix).is_some_and(|n| n.entry().is_some()) && !class.is_local_only()
}
