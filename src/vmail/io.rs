//! The bytes of files: open, write, truncate, and what close and fsync must wait for.

use super::error::{Error, Plain, Result};
use super::fetch;
use super::need::{Need, NodeRef, Op, Stop};
use super::node::{Growing, Kind, Mail, Node, NodeIx, Tracker};
use super::promise::Ack;
use super::user::User;
use crate::cache::fscache::{Cached, Taken};
use crate::dovecot::classes::{Class, IndexKind};
use crate::dovecot::index_log;
use crate::format::journal::Change;
use crate::format::listing::Owner;
use crate::format::{ObjectId, Timestamp};
use crate::fs::api::OpenMode;
use std::sync::Arc;

/// From this size on, in bytes, a handle holds its mail's copy open, for the kernel to read it past the
/// daemon. The copy of a smaller one is opened at its first READ, which mostly does not come, because the
/// kernel has its pages.
pub const HELD_OPEN: u64 = 128 * 1024;

pub(super) fn disk(e: &std::io::Error) -> Error {
    Error::disk("local file", e)
}

impl User {
    pub fn node(&self, ix: NodeIx) -> Result<&Node> {
        self.tree.nodes.get(ix).ok_or_else(|| Plain::BadHandle.into())
    }

    pub fn node_mut(&mut self, ix: NodeIx) -> Result<&mut Node> {
        self.tree.nodes.get_mut(ix).ok_or_else(|| Plain::BadHandle.into())
    }

    /// The node of a number that was handed out. The slot may be another's since.
    pub fn node_known(&self, ix: NodeIx, ino: u64) -> Result<&Node> {
        let lost = || Error::Lost { user: self.name.to_string() };
        self.tree.nodes.get(ix).filter(|node| node.ino == ino).ok_or_else(lost)
    }

    pub fn known_mut(&mut self, node: &NodeRef) -> Result<&mut Node> {
        self.node_known(node.ix, node.ino)?;
        self.node_mut(node.ix)
    }

    pub fn node_ref(&self, ix: NodeIx) -> Result<NodeRef> {
        Ok(NodeRef { cell: self.cell(), ix, ino: self.node(ix)?.ino })
    }

    /// A published mail that is opened gets room for what an open mail needs.
    fn unpack(&mut self, ix: NodeIx) -> Result<&mut Node> {
        let node = self.node_mut(ix)?;
        if let Kind::Published(object) = &node.kind {
            let mail =
                Mail { object: Some(object.clone()), published_size: node.size, ..Mail::default() };
            node.kind = Kind::Mail(Box::new(mail));
        }
        Ok(node)
    }

    /// Opens a file and counts the handle. For a published mail the cached copy comes with it,
    /// unless the cache has no room for it.
    pub fn open(&mut self, ix: NodeIx, how: OpenMode) -> Op<Option<Arc<Cached>>> {
        // Even a file opened for reading only is emptied by O_TRUNC.
        let changes = how.write || how.truncate;
        if changes && let Err(error) = self.may_change(self.node(ix)?.class) {
            let node = self.node(ix)?;
            let reading = !how.truncate && matches!(error, Error::Lapsed { .. });
            // Readers open index files for writing, too, and Dovecot gives up a mailbox whose index
            // it cannot open so; each write is refused then.
            if !reading || !matches!(node.class, Class::Index(_)) {
                return Err(error.into());
            }
        }
        let name = self.name.clone();
        let fscache = self.session.fscache.clone();
        let reference = self.node_ref(ix)?;
        let node = self.unpack(ix)?;
        let (class, size) = (node.class, node.size);
        let mut copy = None;
        match &mut node.kind {
            Kind::Mail(mail) if mail.staged.is_some() => {}
            Kind::Mail(mail) => {
                if changes {
                    if class != Class::MailTemp {
                        return Err(Plain::Access.into());
                    }
                    return Err(Stop::Wait(Need::Stage(reference, 0)));
                }
                let object = mail.object.as_ref().map(|o| o.id());
                let object =
                    object.ok_or_else(|| Error::Internal("mail without object or bytes".into()))?;
                copy = mail.fetched.take().or_else(|| mail.cached.upgrade());
                if copy.is_none() && !mail.through && mail.blank.is_none() {
                    let here = if size < HELD_OPEN {
                        fscache.use_unopened(&name, object, size)
                    } else {
                        copy = fscache.get(&name, object, size);
                        copy.is_some()
                    };
                    if !here {
                        self.walks(ix, true);
                        return Err(Stop::Wait(Need::Fetch(reference)));
                    }
                }
                if let Some(copy) = &copy {
                    mail.cached = Arc::downgrade(copy);
                }
                self.walks(ix, false);
            }
            Kind::Growing(_) => {}
            Kind::Local(_) => self.open_local(ix)?,
            Kind::Symlink(_) => return Err(Plain::Invalid.into()),
            Kind::Published(_) => return Err(Error::Internal("mail not unpacked".into()).into()),
        }
        if how.truncate {
            self.truncate(ix, 0)?;
        }
        let node = self.node_mut(ix)?;
        node.handles += 1;
        node.writers += u32::from(how.write);
        let folder = node.names.first().map(|name| name.at.folder);
        self.used = self.boot();
        if let Some(folder) = folder {
            self.used_folder(folder);
        }
        Ok(copy)
    }

    /// The last use of a handle.
    pub fn release(&mut self, ix: NodeIx, wrote: bool) {
        let name = self.name.clone();
        let fscache = self.session.fscache.clone();
        if self.tree.nodes.get(ix).is_some_and(|node| node.handles == 1) {
            self.keep_removed(ix);
        }
        let Some(node) = self.tree.nodes.get_mut(ix) else { return };
        node.handles = node.handles.saturating_sub(1);
        node.writers = node.writers.saturating_sub(u32::from(wrote));
        let idle = node.handles == 0;
        let closed = node.writers == 0;
        let named = node.nlink > 0;
        let mut retry = false;
        let mut elsewhere = None;
        let size = node.size;
        match &mut node.kind {
            Kind::Mail(mail) => {
                if closed && mail.dirty && named {
                    // Its close failed and said so; it is tried again behind the scenes.
                    retry = mail.refused.is_none();
                } else if closed
                    && !mail.dirty
                    && let (Some(staged), Some(object)) = (mail.staged.take(), &mail.object)
                    && named
                {
                    match fscache.take_over(&staged.path(), &name, object.id(), size) {
                        Ok(Taken::Kept(copy)) => mail.cached = Arc::downgrade(&copy),
                        Ok(Taken::Elsewhere(room)) => elsewhere = Some((room, staged)),
                        Ok(Taken::NoRoom) => {}
                        Err(error) => {
                            tracing::debug!(user = %name, %error, "fresh mail not taken into fscache");
                        }
                    }
                }
                if idle && mail.staged.is_none() {
                    mail.fetched = None;
                    mail.through = false;
                    mail.blank = None;
                    if let Some(object) = mail.object.take() {
                        node.kind = Kind::Published(object);
                    }
                }
            }
            Kind::Growing(grow) => {
                retry = closed && grow.dirty && named;
                if idle {
                    grow.open.clear();
                    grow.through.clear();
                    if !grow.dirty {
                        grow.tail = None;
                    }
                }
            }
            Kind::Local(local) if idle => local.file = None,
            Kind::Local(_) | Kind::Published(_) | Kind::Symlink(_) => {}
        }
        if let Some((room, staged)) = elsewhere {
            let copy = fetch::copy_in(self.session.clone(), room, staged);
            let _task = self.session.runtime.spawn(copy);
        }
        if retry {
            let ino = node.ino;
            self.session.retry_publish(&self.cell(), ix, ino);
        }
        let forgotten = self.tree.nodes.get(ix).filter(|n| n.handles == 0 && n.lookups == 0);
        if let Some(ino) = forgotten.map(|n| n.ino) {
            self.session.forget_ino(ino);
        }
        self.recharge(ix);
        self.drop_if_unused(ix);
    }

    // ---- writing

    /// Writes; the kernel has chosen the offset, also for O_APPEND.
    pub fn write(&mut self, ix: NodeIx, offset: u64, data: &[u8]) -> Op<()> {
        self.may_change(self.node(ix)?.class)?;
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end < MAX_FILE)
            .ok_or(Plain::Invalid)?;
        let now = self.now();
        let class = self.node(ix)?.class;
        let mut tracker = None;
        match &self.node(ix)?.kind {
            Kind::Mail(_) => self.write_mail(ix, offset, data)?,
            Kind::Growing(_) => self.write_growing(ix, offset, data)?,
            Kind::Local(local) => {
                let file = local.file.clone().ok_or(Plain::BadHandle)?;
                tracker = self.probe_uids(ix, offset, data)?;
                self.make_room(ix, end)?;
                let written = self
                    .first_write(ix)
                    .and_then(|()| file.write_all_at(data, offset).map_err(|e| disk(&e)));
                if let Err(error) = written {
                    self.recharge(ix);
                    return Err(error.into());
                }
            }
            Kind::Published(_) | Kind::Symlink(_) => return Err(Plain::BadHandle.into()),
        }
        let node = self.node_mut(ix)?;
        node.mtime = now;
        node.ctime = now;
        let inside = offset < node.size;
        node.size = node.size.max(end);
        if let Kind::Local(local) = &mut node.kind {
            local.inplace += u64::from(inside);
            local.since.wrote(offset, data.len() as u64);
            local.writes += 1;
            if let Some(tracker) = tracker {
                local.tracker = tracker;
            }
            self.mark_local(ix);
            let matters = match class {
                Class::Index(IndexKind::Log) => index_log::important(data),
                _ => !class.follows(),
            };
            if matters {
                self.important();
            } else {
                self.unimportant();
            }
        }
        Ok(())
    }

    /// Before the first write since the last cut the journal notes that the file is about to change, so
    /// that a restart knows what the head lacks; also if the flush of that cut failed, for its head
    /// may be in the store all the same.
    fn first_write(&mut self, ix: NodeIx) -> Result<()> {
        let node = self.node(ix)?;
        if node.class.is_local_only() {
            return Ok(());
        }
        let noted = |name: &super::node::Name| {
            let bytes = self.tree.name_bytes(*name);
            let folder = self.tree.folders.get(&name.at.folder);
            bytes.zip(folder).is_some_and(|(bytes, folder)| {
                let name = (name.at.sub, bytes.clone());
                folder.unflushed.names.contains(&name) && !folder.unnoted.contains(&name)
            })
        };
        if node.names.all().iter().all(noted) {
            return Ok(());
        }
        let lines = self.node_lines(ix);
        self.commit(lines)
    }

    fn write_mail(&mut self, ix: NodeIx, offset: u64, data: &[u8]) -> Op<()> {
        let cell = self.cell();
        let node = self.node_mut(ix)?;
        let Kind::Mail(mail) = &mut node.kind else { return Err(Plain::BadHandle.into()) };
        let Some(staged) = mail.staged.clone() else { return Err(Plain::Access.into()) };
        let end = offset + data.len() as u64;
        if !staged.reserve(end) {
            // For as long as it waits, and if it waits in vain.
            mail.refused = Some(mail.refused.map_or(offset, |first| first.min(offset)));
            return Err(Stop::Wait(Need::Staging(cell, staged, end)));
        }
        if let Err(error) = staged.write(data, offset) {
            mail.refused = Some(mail.refused.map_or(offset, |first| first.min(offset)));
            return Err(Error::disk("staging", &error).into());
        }
        mail.refused = mail.refused.filter(|first| *first < offset);
        mail.dirty = true;
        mail.writes += 1;
        Ok(())
    }

    fn write_growing(&mut self, ix: NodeIx, offset: u64, data: &[u8]) -> Op<()> {
        let reference = self.node_ref(ix)?;
        let staging = self.session.staging.clone();
        let node = self.node_mut(ix)?;
        let Kind::Growing(grow) = &mut node.kind else { return Err(Plain::BadHandle.into()) };
        if offset < grow.published {
            return Err(Stop::Wait(Need::Stage(reference, offset)));
        }
        let tail = match &grow.tail {
            Some(tail) => tail.clone(),
            None => {
                let tail = Arc::new(staging.create().map_err(|e| Error::disk("staging", &e))?);
                grow.tail = Some(tail.clone());
                tail
            }
        };
        let held = (offset + data.len() as u64).saturating_sub(grow.published);
        if !tail.reserve(held) {
            return Err(Stop::Wait(Need::Staging(reference.cell, tail, held)));
        }
        tail.write_sparse(data, offset, grow.published).map_err(|e| Error::disk("staging", &e))?;
        grow.dirty = true;
        grow.lowest = grow.lowest.min(offset);
        grow.writes += 1;
        Ok(())
    }

    /// What a file's tracker will know after a write, once the ceilings allow it.
    fn probe_uids(&mut self, ix: NodeIx, offset: u64, data: &[u8]) -> Op<Option<Tracker>> {
        let node = self.node(ix)?;
        let Kind::Local(local) = &node.kind else { return Ok(None) };
        let mut probe = match &local.tracker {
            Tracker::None => return Ok(None),
            Tracker::UidList(t) => {
                let mut t = t.clone();
                t.fed(offset, data);
                Tracker::UidList(t)
            }
            Tracker::Log(t) => {
                let mut t = t.clone();
                t.feed(offset, data);
                Tracker::Log(t)
            }
        };
        let name = node.names.first();
        if probe.is_lost() {
            probe = self.track_anew(ix, offset, data)?;
        }
        if let (Some(next), Some(name)) = (User::tracker_next_uid(&probe), name) {
            self.await_ceiling(name.at.folder, next)?;
        }
        Ok(Some(probe))
    }

    pub fn truncate(&mut self, ix: NodeIx, len: u64) -> Op<()> {
        self.may_change(self.node(ix)?.class)?;
        if len >= MAX_FILE {
            return Err(Plain::Invalid.into());
        }
        let now = self.now();
        let reference = self.node_ref(ix)?;
        let staging = self.session.staging.clone();
        let node = self.unpack(ix)?;
        if node.size == len && !matches!(node.kind, Kind::Local(_)) {
            return Ok(());
        }
        let class = node.class;
        match &mut node.kind {
            Kind::Mail(mail) => match &mail.staged {
                Some(staged) => {
                    if !staged.reserve(len) {
                        let staged = staged.clone();
                        return Err(Stop::Wait(Need::Staging(reference.cell, staged, len)));
                    }
                    staged.set_len(len).map_err(|e| Error::disk("staging", &e))?;
                    mail.refused = mail.refused.filter(|first| *first < len);
                    mail.dirty = true;
                    mail.writes += 1;
                }
                None if class == Class::MailTemp => {
                    return Err(Stop::Wait(Need::Stage(reference, 0)));
                }
                None => return Err(Plain::Access.into()),
            },
            Kind::Growing(grow) => {
                if len < grow.published {
                    return Err(Stop::Wait(Need::Stage(reference, len)));
                }
                if grow.tail.is_none() {
                    let tail = staging.create().map_err(|e| Error::disk("staging", &e))?;
                    grow.tail = Some(Arc::new(tail));
                }
                if let Some(tail) = &grow.tail {
                    let held = len.saturating_sub(grow.published);
                    if !tail.reserve(held) {
                        let tail = tail.clone();
                        return Err(Stop::Wait(Need::Staging(reference.cell, tail, held)));
                    }
                    tail.set_len_sparse(len, grow.published)
                        .map_err(|e| Error::disk("staging", &e))?;
                }
                grow.dirty = true;
                grow.writes += 1;
                grow.lowest = grow.lowest.min(len);
            }
            Kind::Local(_) => {
                let file = self.local_file(ix)?;
                self.make_room(ix, len)?;
                self.first_write(ix)?;
                file.set_len(len).map_err(|e| disk(&e))?;
                if let Kind::Local(local) = &mut self.node_mut(ix)?.kind {
                    local.since.cut_to(len);
                    local.inplace += 1;
                    local.writes += 1;
                }
                self.mark_local(ix);
                if !class.is_local_only() {
                    self.important();
                }
            }
            Kind::Published(_) | Kind::Symlink(_) => return Err(Plain::Invalid.into()),
        }
        let node = self.node_mut(ix)?;
        node.size = len;
        node.mtime = now;
        node.ctime = now;
        self.recharge(ix);
        Ok(())
    }

    /// Attributes other than the size.
    pub fn set_attrs(
        &mut self,
        ix: NodeIx,
        mode: Option<u32>,
        owner: Option<Owner>,
        mtime: Option<Timestamp>,
    ) -> Op<()> {
        let now = self.now();
        let deviation = owner.map(|o| self.deviation(o));
        let node = self.node_mut(ix)?;
        let before = (node.mode, node.owner, node.mtime);
        node.mode = mode.map_or(node.mode, |m| m & 0o7777);
        node.owner = deviation.unwrap_or(node.owner);
        node.mtime = mtime.unwrap_or(node.mtime);
        node.ctime = now;
        if (node.mode, node.owner, node.mtime) == before {
            return Ok(());
        }
        let lines = self.node_lines(ix);
        let recorded = !lines.is_empty();
        if let Err(error) = self.commit(lines) {
            if let Ok(node) = self.node_mut(ix) {
                (node.mode, node.owner, node.mtime) = before;
            }
            return Err(error.into());
        }
        // Of a mail that is being written nothing is on record: it takes its time along.
        if recorded && !self.node(ix)?.class.follows() {
            self.important();
        }
        Ok(())
    }

    // ---- what close and fsync wait for

    /// A descriptor was closed: a mail that nobody synced is made safe now. Of a growing file
    /// only what was `written` through this descriptor is promised: what lies at its end may be a
    /// mail that another server process is in the middle of, and half a mail in the store is one
    /// that Dovecot calls corrupted after a crash.
    pub fn close(&mut self, ix: NodeIx, wrote: bool, written: u64) -> Op<()> {
        let reference = self.node_ref(ix)?;
        let node = self.node(ix)?;
        if matches!(&node.kind, Kind::Growing(grow) if written <= grow.safe_writes) {
            return Ok(());
        }
        // A file that nothing was written to holds no mail: a shell closes a copy of its
        // descriptor before it writes. It is published behind its last close.
        let untouched = matches!(&node.kind, Kind::Mail(mail) if mail.writes == 0);
        if wrote && node.nlink > 0 && is_dirty(&node.kind) && !untouched {
            return Err(Stop::Wait(Need::Publish(reference)));
        }
        Ok(())
    }

    /// How often the growing file was written to; 0 for others.
    pub fn writes_to_growing(&self, ix: NodeIx) -> u64 {
        match self.tree.nodes.get(ix).map(|node| &node.kind) {
            Some(Kind::Growing(grow)) => grow.writes,
            _ => 0,
        }
    }

    pub fn fsync(&mut self, ix: NodeIx) -> Op<()> {
        let reference = self.node_ref(ix)?;
        let node = self.node(ix)?;
        match &node.kind {
            // A file without a name is lost with its last descriptor: nothing to make safe.
            _ if node.nlink == 0 => Ok(()),
            kind if is_dirty(kind) => Err(Stop::Wait(Need::Publish(reference))),
            Kind::Local(local) if local.synced < local.writes => {
                Err(Stop::Wait(Need::SyncLocal(reference)))
            }
            // It is in the store, and is found there without the journal (see `publish`).
            Kind::Mail(_) | Kind::Published(_) | Kind::Growing(_)
                if self.session.settings.ack == Ack::Store =>
            {
                Ok(())
            }
            _ => self.sync_journal(),
        }
    }

    pub fn sync_journal(&mut self) -> Op<()> {
        match self.sync_point()? {
            None => Ok(()),
            Some(_) => Err(Stop::Wait(Need::SyncJournal(self.cell()))),
        }
    }

    /// Notes on record that an object was put in vain, or lost its last name.
    pub fn drop_object(&mut self, key: crate::format::key::KeyTail) -> Result<()> {
        let id: ObjectId = key.id();
        self.commit(vec![Change::Drop { object: key }])?;
        self.answered(id);
        Ok(())
    }

    /// The same for one that never got a name, also where no record can be written. Then the next
    /// flush says that it is dropped; until then a restart finds it unnamed above the watermark,
    /// which says the same. (Left unanswered for good, it would end up below the watermark of the
    /// next session, and the full listing would take it for a mail that arrived late.)
    pub fn drop_unnamed(&mut self, key: crate::format::key::KeyTail) {
        if self.drop_object(key.clone()).is_err() {
            self.mark_dropped(&key, true);
            self.answered(key.id());
        }
    }
}

/// Whether a file has bytes that no object holds.
pub fn is_dirty(kind: &Kind) -> bool {
    match kind {
        Kind::Mail(mail) => mail.dirty,
        Kind::Growing(grow) => grow.dirty,
        Kind::Published(_) | Kind::Local(_) | Kind::Symlink(_) => false,
    }
}

/// Files stay below this size.
pub const MAX_FILE: u64 = 1 << 40;

impl Growing {
    /// Where a rewrite from `offset` must start: at the beginning of the extent it lies in.
    pub fn rewrite_from(&self, offset: u64) -> u64 {
        let i = self.extents.partition_point(|e| e.offset <= offset);
        i.checked_sub(1).and_then(|i| self.extents.get(i)).map_or(0, |e| e.offset)
    }
}
