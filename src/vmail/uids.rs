//! UIDs of a folder that was loaded: what its files say of them, and raising next-UID past what a
//! session whose changes are lost may have given (I2).

use super::ceilings::UID_ROOM;
use super::error::{Error, Plain, Result};
use super::node::{Kind, Since, Tracker};
use super::tree::{NameBytes, Target};
use super::user::User;
use crate::dovecot::classes::{Class, IndexKind};
use crate::dovecot::index_log::LogTracker;
use crate::dovecot::index_snapshot::SnapshotHeader;
use crate::dovecot::records::whole_records_len;
use crate::dovecot::{recover, uidlist, uidvalidity};
use crate::format::journal::Change;
use crate::format::{FolderId, Place, Sub};

/// No file that says UIDs is larger; one that is, is none of a mail server's.
const MOST: usize = 64 << 20;

/// What the whole transactions of an index log say of next-UID.
fn whole_next_uid(log: &[u8]) -> u32 {
    let whole = log.get(..whole_records_len(log)).unwrap_or_default();
    LogTracker::of(whole, None).next_uid()
}

impl User {
    pub(super) fn content_of(&self, ix: usize) -> Result<Vec<u8>> {
        let node = self.node(ix)?;
        let name = node.names.first().ok_or(Plain::NotFound)?;
        let bytes = self.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
        let path = self.file_path(name.at, &bytes);
        let read = self.session.env.disk.read(&path, u64::MAX);
        read.map_err(|e| Error::disk(path.display().to_string(), &e))?
            .ok_or_else(|| Error::Damaged { what: format!("{}: vanished", path.display()) })
    }

    /// What a followed file will say of UIDs after a write that does not continue the last one:
    /// Dovecot cuts off what an unfinished write left, and writes over it.
    pub(super) fn track_anew(&mut self, ix: usize, offset: u64, data: &[u8]) -> Result<Tracker> {
        let (class, size) = self.node(ix).map(|node| (node.class, node.size))?;
        let failed = |e: std::io::Error| Error::disk("metacache", &e);
        let len = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let end = len(offset).saturating_add(data.len());
        if len(size).max(end) > MOST {
            return Ok(self.track(class, b""));
        }
        let mut content = self.local_file(ix)?.read_exact_at(0, len(size)).map_err(failed)?;
        content.resize(content.len().max(end), 0);
        content[end - data.len()..end].copy_from_slice(data);
        Ok(self.track(class, &content))
    }

    /// Reads what the folder's files say of UIDs, and burns those that may have been given by a
    /// session whose changes are lost.
    pub(super) fn follow_uids(&mut self, id: FolderId) -> Result<()> {
        self.burn_unknown(id);
        let at = Place::own(id);
        let Some(dir) = self.tree.dir(at) else { return Ok(()) };
        let files: Vec<(NameBytes, usize)> = dir
            .entries
            .after(0)
            .filter_map(|(_, name, target)| match target {
                Target::Node(ix) => Some((name.clone(), ix)),
                _ => None,
            })
            .collect();
        let burnt = self.tree.folders.get(&id).and_then(|f| f.burnt_below);
        let maildir = burnt.is_some() && self.index_of_maildir(id)?;
        let mut next = None;
        for (name, ix) in files {
            if !self.tree.kind_is_local(ix) {
                continue;
            }
            let class = self.node(ix)?.class;
            match class {
                Class::Index(IndexKind::UidList | IndexKind::Log) => {
                    let log_of_maildir = maildir && class == Class::Index(IndexKind::Log);
                    if let Some(burnt) = burnt.filter(|_| !log_of_maildir) {
                        self.burn(ix, at, &name, class, burnt)?;
                    }
                    let content = self.content_of(ix)?;
                    let tracker = self.track(class, &content);
                    next = next.max(User::tracker_next_uid(&tracker));
                    if let Kind::Local(local) = &mut self.node_mut(ix)?.kind {
                        local.tracker = tracker;
                    }
                }
                Class::Index(IndexKind::Snapshot) => {
                    if let Ok(header) = SnapshotHeader::parse(&self.content_of(ix)?) {
                        next = next.max(Some(header.next_uid));
                    }
                }
                Class::Index(IndexKind::UidValidity) => self.follow_uidvalidity(at, &name)?,
                _ => {}
            }
        }
        if let Some(folder) = self.tree.folders.get_mut(&id) {
            folder.next_uid = folder.next_uid.max(next);
        }
        Ok(())
    }

    /// After a power cut the UIDs of a folder without a ceiling count as given, as far as that let any
    /// be given.
    fn burn_unknown(&mut self, id: FolderId) {
        if self.unclean
            && let Some(folder) = self.tree.folders.get_mut(&id)
            && folder.uid_ceiling.is_none()
        {
            folder.burnt_below = folder.burnt_below.max(Some(UID_ROOM));
        }
    }

    /// Whether the folder's index is of a Maildir. There `dovecot-uidlist` gives UIDs, and the index
    /// follows: a next-UID raised in the index makes Dovecot take the mails that are in the uidlist
    /// and not yet in the index for expunged ones, so that they are missing once and then get new
    /// UIDs.
    fn index_of_maildir(&self, id: FolderId) -> Result<bool> {
        let state = self.index_state(id, b"dovecot.index")?;
        let extensions = state.map(|s| s.extensions).unwrap_or_default();
        if extensions.iter().any(|e| e.name == "maildir") {
            return Ok(true);
        }
        let dbox = |name: &[u8]| name == b"dbox-Mails" || name == b"storage";
        Ok(extensions.is_empty() && !self.tree.folders.values().any(|f| dbox(&f.name)))
    }

    /// Raises next-UID in a file of Dovecot's.
    pub(super) fn burn(
        &mut self,
        ix: usize,
        at: Place,
        name: &[u8],
        class: Class,
        burnt: u32,
    ) -> Result<()> {
        let content = self.content_of(ix)?;
        let raised = match class {
            Class::Index(IndexKind::UidList) => match uidlist::parse(&content) {
                Ok(list) if list.next_uid() >= burnt => return Ok(()),
                Ok(_) => match uidlist::raise_next_uid(&content, burnt) {
                    Ok(raised) => raised,
                    Err(error) => {
                        return Err(Error::Damaged {
                            what: format!("user {}: uidlist: {error}", self.name),
                        });
                    }
                },
                // Dovecot makes a new one, with a new UIDVALIDITY.
                Err(_) => return Ok(()),
            },
            _ if whole_next_uid(&content) >= burnt => return Ok(()),
            _ => match recover::raise_next_uid(&content, burnt) {
                Ok(append) => {
                    let mut raised = content.clone();
                    raised.truncate(append.at);
                    raised.extend_from_slice(&append.bytes);
                    raised
                }
                Err(recover::RecoverError::NoUidValidity) => return Ok(()),
                Err(error) => {
                    tracing::error!(user = %self.name, %error, "next-UID cannot be raised");
                    return Err(Error::Damaged {
                        what: format!("user {}: index log: {error}", self.name),
                    });
                }
            },
        };
        if raised == content {
            return Ok(());
        }
        self.rewrite_local(at, name, &raised)?;
        let size = raised.len() as u64;
        if let Some(node) = self.tree.nodes.get_mut(ix) {
            node.size = size;
            if let Kind::Local(local) = &mut node.kind {
                local.since = Since::everything();
                local.file = None;
            }
        }
        self.recharge(ix);
        let mut lines = self.node_lines(ix);
        let (now, mut looked_at) = (self.now(), None);
        if class == Class::Index(IndexKind::UidList) {
            // Makes Dovecot read the list again and take its next-UID into the index: clients
            // were told a higher one than the index of the last flush has.
            let cur = Place { folder: at.folder, sub: Sub::Cur };
            looked_at = self.touch_line(cur, now).map(|line| (cur, line));
            lines.extend(looked_at.iter().map(|(_, line)| line.clone()));
        }
        self.commit(lines)?;
        if let Some((cur, _)) = looked_at {
            self.touch(cur, now);
        }
        self.important();
        Ok(())
    }

    pub(super) fn follow_uidvalidity(&mut self, at: Place, name: &[u8]) -> Result<()> {
        let Some(value) = uidvalidity::parse(name) else { return Ok(()) };
        self.uidvalidity = self.uidvalidity.max(Some(value));
        let Some(burnt) = self.uidvalidity_burnt.filter(|burnt| *burnt > value) else {
            return Ok(());
        };
        let new = uidvalidity::format(burnt);
        // The ceiling was raised beyond this before the user was opened.
        match self.rename(at, name, at, new.as_bytes(), true) {
            Ok(()) => Ok(()),
            Err(super::need::Stop::Error(error)) => Err(error),
            Err(super::need::Stop::Wait(_)) => {
                Err(Error::Internal("the uidvalidity ceiling was not raised".into()))
            }
        }
    }

    /// Appends to an index log of this user what a recovery made, and remembers it. The log is synced,
    /// so the names of the mails that it shows are, before it: a power cut would leave records
    /// of mails whose names it took.
    pub(super) fn append_log(&mut self, ix: usize, append: &recover::LogAppend) -> Result<()> {
        if append.bytes.is_empty() {
            return Ok(());
        }
        let name = self.node(ix)?.names.first().ok_or(Plain::NotFound)?;
        let bytes = self.tree.name_bytes(name).cloned().ok_or(Plain::NotFound)?;
        let mut content = self.content_of(ix)?;
        content.truncate(append.at);
        content.extend_from_slice(&append.bytes);
        if let Some(point) = self.sync_point()? {
            point.sync()?;
        }
        self.rewrite_local(name.at, &bytes, &content)?;
        let size = content.len() as u64;
        let class = self.node(ix)?.class;
        let tracker = self.track(class, &content);
        let next = User::tracker_next_uid(&tracker);
        let node = self.node_mut(ix)?;
        node.size = size;
        if let Kind::Local(local) = &mut node.kind {
            local.since = Since::everything();
            local.tracker = tracker;
            local.file = None;
        }
        self.recharge(ix);
        if let Some(folder) = self.tree.folders.get_mut(&name.at.folder) {
            folder.next_uid = folder.next_uid.max(next);
        }
        let lines: Vec<Change> = self.node_lines(ix);
        self.commit(lines)?;
        self.important();
        Ok(())
    }

    pub(super) fn index_content(&self, ix: usize) -> Result<Vec<u8>> {
        self.content_of(ix)
    }
}
