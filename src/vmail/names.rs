//! Names: create, link, unlink, rename, folders. None of these waits for a store, and none
//! leaves anything half done: the record says it all, or nothing happened.

use super::error::{Error, Plain, Result};
use super::need::Op;
use super::node::{Growing, Kind, Local, Mail, Names, Node, NodeIx, Since};
use super::tree::Target;
use super::user::User;
use crate::dovecot::classes::{Class, IndexKind};
use crate::format::journal::{Change, DiskOp};
use crate::format::key::KeyTail;
use crate::format::listing::{Line, Owner};
use crate::format::{Place, Timestamp};
use crate::fs::api::Caller;
use std::sync::Arc;

/// Longest name.
pub const NAME_MAX: usize = 255;

pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        return Err(Plain::NameTooLong.into());
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0)
    {
        return Err(Plain::Invalid.into());
    }
    Ok(())
}

pub(super) fn line(at: Place, line: Line) -> Change {
    Change::Line { folder: at.folder, line }
}

impl User {
    /// Whom a new file in `at` belongs to: its maker, or the directory's group if that is
    /// set-group-id.
    pub(super) fn new_owner(&self, at: Place, caller: Caller) -> Option<Owner> {
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
        if !class.is_local_only() {
            self.room_for_name()?;
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
            // Whoever copies a mailbox in writes its index files under their own names.
            _ => Kind::Local(Box::new(Local {
                tracker: self.track(class, b""),
                ..User::new_local()
            })),
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
        self.named(ix, at);
        if let Some(value) = uid_validity {
            self.uidvalidity_given(value);
            // A lost session may have given more, with a counter that no flush has seen.
            self.follow_uidvalidity(at, name)?;
        }
        Ok(ix)
    }

    fn note_new_name(&mut self, class: Class) {
        if class.holds_mail() || class == Class::Index(IndexKind::Log) || class.follows() {
            self.unimportant();
        } else {
            self.important();
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
        self.here(ix)?;
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
        self.named(ix, at);
        if !objects.is_empty() {
            let count = self.tree.nodes.get(ix).map_or(1, |n| n.nlink);
            for object in objects {
                self.tree.links.insert(object, count);
                self.tree.shared.insert(object, ix);
            }
            if from_class != Class::MailTemp || self.tells_flags(at.folder, name) {
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
    pub(super) fn became(&mut self, ix: NodeIx) -> Result<()> {
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
    pub(super) fn loss(&self, at: Place, name: &[u8], ix: NodeIx) -> Vec<Change> {
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
        if let (true, Kind::Local(local)) = (gone, &node.kind) {
            self.dropped_files.extend(local.object);
        }
        let left = node.nlink;
        self.recharge(ix);
        let Some(node) = self.tree.nodes.get(ix) else { return };
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
            if let Kind::Local(local) = &node.kind {
                self.space.account.release(local.charged_to, local.charged);
            }
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

    pub(super) fn note_new_mail(&mut self) {
        let now = self.boot();
        self.changes.new_mails += 1;
        self.changes.new_since.get_or_insert(now);
        self.unimportant();
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
