//! Publishing: a mail's bytes go to the store, and only then is its fsync or close answered.
//!
//! # The rule (I1)
//!
//! A call that makes a mail safe returns success only after (1) the PUT of its bytes was
//! answered with success, under a key that tells folder, name, size, mtime and mode, and
//! (2) the record that names the object is in the journal.
//!
//! **The journal need not be on the disk by then.** What reads it is a start after the death of
//! this process, and that sees what was written. After anything that takes written pages (a power cut, a
//! lost disk) a start does not believe the journal to be whole: it lists the store above the watermark and
//! gives every object that the journal does not name a name (`recover`), which it must do anyway for a
//! machine that is lost. So a sync would only make the same mail come back under the name that it
//! had, which is one in `tmp/` or a temporary one. It follows within a second
//! ([`super::sync::later`]), for all that was delivered meanwhile at once; what a
//! server syncs itself (its index files, a directory) has the journal synced before it is answered, as
//! ever. One fault must come to another to lose a mail: the kernel loses written pages of the
//! journal to a disk error, drops them from its memory, and the process dies, all within that second.
//!
//! # Order, and what a death in between leaves
//!
//! 1. An id is taken; it counts as unanswered, so the watermark stays below it.
//! 2. PUT. A death before its answer leaves perhaps an object that nothing names, above the
//!    watermark: the next start with local state puts it on the dropped list (nobody was told
//!    that it is safe), a start without local state takes it for a mail (it cannot know).
//! 3. Under the user's lock: the names of the file are recorded with the object, an object that
//!    this one replaces is put on the dropped list, and the id is answered.
//!
//! A PUT that failed may still have happened, or happen later: its id goes on the dropped list
//! before the watermark may pass it.
//!
//! A mail in a folder that no head knows yet is answered only after the flush that makes the
//! folder known, with the index files it has: without them a recovery could bring back the mail's
//! bytes but not the UIDVALIDITY under which clients have seen it. That flush is due anyway and
//! comes only earlier. (Where a server makes the index later than the mail, a recovery has dbox
//! begin a new one.)
//!
//! With `ack = "journal"` a durable promise stands for the PUT (see [`super::promise`]).
//!
//! No directory is locked while this goes on, neither here nor in the kernel: fsync and close
//! lock none. Publishes of one user run side by side.
//!
//! Rejected: publishing at link or rename (the kernel holds a mutex of the whole mount across
//! cross-directory renames, so one slow PUT would stop everybody's deliveries).

use super::close::Begun;
use super::error::{During, Error, Result, pass};
use super::flush;
use super::need::NodeRef;
use super::node::{Kind, Node};
use super::promise::{self, Ack, Held, Promise};
use super::user::User;
use super::wait::Patience;
use crate::cache::staging::Staged;
use crate::dovecot::classes::Class;
use crate::failpoint;
use crate::format::journal::Change;
use crate::format::key::{
    KeyTail, META_FOLDER, META_NAME, META_REPLACES, META_USER, MailKey, Piece, mail_key,
    meta_folder,
};
use crate::format::listing::Extent;
use crate::format::{ObjectId, Timestamp};
use crate::sabotage::{self, Bug};
use crate::store::{Body, PutMode, Reason, StoreError};
use bytes::Bytes;
use std::sync::Arc;

/// Mails up to this size, just written and so in the page cache, are read where we are, and kept in memory
/// until they are put: each change to another thread costs more than that.
const SMALL: u64 = 64 << 10;

/// Earlier attempts of one file that an object tells of.
const ATTEMPTS: usize = 8;

/// One attempt to publish, taken under the user's lock.
struct Job {
    id: ObjectId,
    staged: Arc<Staged>,
    /// Where the piece begins in the file, and its length.
    offset: u64,
    len: u64,
    growing: bool,
    predecessor: Option<ObjectId>,
    writes: u64,
    folder: crate::format::FolderId,
    folder_path: String,
    name: Vec<u8>,
    /// Maildir: complete the name by what readers of the mail want to know.
    maildir: bool,
    mtime: Timestamp,
    mode: u32,
    /// Ids under which the same file was put before.
    replaces: Vec<ObjectId>,
    /// It is safe once it is on this machine's disk.
    promise: Option<Arc<Held>>,
    /// Until its record is written.
    begun: Option<Begun>,
}

/// What was found out about the bytes.
struct Digest {
    crc: u32,
    /// Size with CRLF line ends.
    virtual_size: u64,
    bytes: Option<Bytes>,
}

fn digest(job: &Job) -> Result<Digest> {
    let disk = |e: std::io::Error| Error::disk("staging", &e);
    let mut crc = 0;
    let mut bare = 0;
    let mut last = 0;
    let mut kept = Vec::new();
    let keep = job.growing
        || job.promise.is_some()
        || job.len <= SMALL
        || job.staged.file.real().is_none();
    let mut at = 0;
    let mut buf = vec![0; 128 * 1024];
    while at < job.len {
        let want = usize::try_from(job.len - at).unwrap_or(usize::MAX).min(buf.len());
        let n = job.staged.file.read_at(&mut buf[..want], job.offset + at).map_err(disk)?;
        if n < want && !job.growing {
            return Err(Error::Damaged {
                what: "staged file is shorter than what was written".into(),
            });
        }
        // Beyond what was ever written a file reads as zeros.
        buf[n..want].fill(0);
        let piece = &buf[..want];
        crc = crc32c::crc32c_append(crc, piece);
        for &byte in piece {
            bare += u64::from(byte == b'\n' && last != b'\r');
            last = byte;
        }
        if keep {
            kept.extend_from_slice(piece);
        }
        at += want as u64;
    }
    let bytes = keep.then(|| Bytes::from(kept));
    Ok(Digest { crc, virtual_size: job.len + bare, bytes })
}

impl Job {
    fn key(&self, digest: &Digest) -> (KeyTail, bool) {
        let name = if self.maildir {
            maildir_name(&self.name, self.len, digest.virtual_size)
        } else {
            self.name.clone()
        };
        let piece = if self.growing {
            Piece::Extent { offset: self.offset, predecessor: self.predecessor }
        } else {
            Piece::Whole
        };
        let key = MailKey {
            id: self.id,
            folder: self.folder,
            mtime: self.mtime,
            mode: self.mode,
            crc: digest.crc,
            piece,
            name: Some(name),
        };
        key.encode()
    }
}

/// A mail's name without flags, with sizes: what it is called when nothing but the key is left.
fn maildir_name(name: &[u8], size: u64, virtual_size: u64) -> Vec<u8> {
    let base = name.split(|b| *b == b':').next().unwrap_or(name);
    let mut full = base.to_vec();
    if !base.windows(3).any(|w| w == b",S=") {
        let tail = format!(",S={size},W={virtual_size}");
        if full.len() + tail.len() <= super::names::NAME_MAX {
            full.extend_from_slice(tail.as_bytes());
        }
    }
    full
}

impl User {
    /// Begins a publish of a file; `None` if nothing needs to be put.
    fn begin_publish(&mut self, node: &NodeRef) -> Result<Option<Job>> {
        self.may_write()?;
        let Some(found) = self.tree.nodes.get_mut(node.ix).filter(|n| n.ino == node.ino) else {
            return Ok(None);
        };
        if let Kind::Growing(grow) = &mut found.kind {
            grow.lowest = u64::MAX;
        }
        let Some(found) = self.tree.nodes.get(node.ix) else { return Ok(None) };
        if !super::io::is_dirty(&found.kind) || found.nlink == 0 {
            return Ok(None);
        }
        let Some(name) = found.names.first() else { return Ok(None) };
        let bytes = self.tree.name_bytes(name).cloned().unwrap_or_else(|| Arc::from(&b"?"[..]));
        let path = self.tree.path(crate::format::Place::own(name.at.folder));
        let mut job = Job {
            id: ObjectId::ZERO,
            staged: match &found.kind {
                Kind::Mail(mail) if mail.refused.is_some() => {
                    return Err(Error::Full("a write to this mail was refused".into()));
                }
                Kind::Mail(mail) => match &mail.staged {
                    Some(staged) => staged.clone(),
                    None => return Err(Error::Internal("dirty mail without bytes".into())),
                },
                Kind::Growing(grow) => match &grow.tail {
                    Some(tail) => tail.clone(),
                    None => Arc::new(
                        self.session.staging.create().map_err(|e| Error::disk("staging", &e))?,
                    ),
                },
                _ => return Ok(None),
            },
            offset: 0,
            len: found.size,
            growing: false,
            predecessor: None,
            writes: 0,
            folder: name.at.folder,
            folder_path: meta_folder(path.iter().map(|p| &**p)),
            name: bytes.to_vec(),
            maildir: name.at.sub != crate::format::Sub::Own
                && matches!(found.class, Class::Mail | Class::MailTemp),
            mtime: found.mtime,
            mode: found.mode,
            replaces: Vec::new(),
            promise: None,
            begun: Some(Begun::new(&node.cell)),
        };
        match &found.kind {
            Kind::Mail(mail) => job.writes = mail.writes,
            Kind::Growing(grow) => {
                job.growing = true;
                job.writes = grow.writes;
                job.offset = grow.published;
                job.len = found.size.saturating_sub(grow.published);
                let before = |e: &&Extent| e.offset < grow.published;
                job.predecessor = grow.extents.iter().rfind(before).map(|e| e.object.id());
            }
            _ => return Ok(None),
        }
        job.promise = self.session.may_promise(job.len);
        job.id = self.new_id();
        if let Some(Node { kind: Kind::Mail(mail), .. }) = self.tree.nodes.get_mut(node.ix) {
            let object = mail.object.as_ref().map(KeyTail::id);
            mail.attempts.extend(object.filter(|id| !mail.attempts.contains(id)));
            let excess = mail.attempts.len().saturating_sub(ATTEMPTS);
            mail.attempts.drain(..excess);
            job.replaces = mail.attempts.clone();
            mail.attempts.push(job.id);
        }
        Ok(Some(job))
    }

    /// The bytes are in the store, or promised to be: says so, and returns whether nothing changed meanwhile.
    fn end_publish(&mut self, node: &NodeRef, job: &Job, key: &KeyTail) -> Result<bool> {
        let alive = self.tree.nodes.get(node.ix).filter(|n| n.ino == node.ino && n.nlink > 0);
        let Some(found) = alive else {
            self.drop_object(key.clone())?;
            return Ok(true);
        };
        let mut changes = Vec::new();
        let (names, class) = (found.nlink, found.class);
        let mut extents = Vec::new();
        match &found.kind {
            Kind::Mail(mail) => {
                changes.extend(mail.object.iter().map(|o| Change::Drop { object: o.clone() }));
            }
            Kind::Growing(grow) => {
                extents = grow.extents.clone();
                let cut = extents.partition_point(|e| e.offset < job.offset);
                for old in extents.split_off(cut) {
                    changes.push(Change::Drop { object: old.object });
                }
                if job.len > 0 {
                    let object = key.clone();
                    extents.push(Extent { offset: job.offset, len: job.len, object });
                }
            }
            _ => return Err(Error::Internal("published what is no mail".into())),
        }
        let old_object = found.object().map(KeyTail::id);
        let published_size = job.offset + job.len;
        let entry = match &found.kind {
            Kind::Growing(_) => crate::format::listing::Entry::Extents {
                size: published_size,
                attrs: found.attrs(),
                extents: extents.clone(),
            },
            _ => crate::format::listing::Entry::Mail {
                size: published_size,
                attrs: found.attrs(),
                object: key.clone(),
            },
        };
        for name in found.names.all() {
            if let Some(bytes) = self.tree.name_bytes(*name) {
                changes.push(Change::Line {
                    folder: name.at.folder,
                    line: crate::format::listing::Line::Set {
                        sub: name.at.sub,
                        name: bytes.to_vec(),
                        entry: entry.clone(),
                    },
                });
            }
        }
        if names > 1 && !(job.growing && job.len == 0) {
            changes.push(Change::Names { object: job.id, count: names });
        }
        if job.growing && job.len == 0 {
            changes.push(Change::Drop { object: key.clone() });
        }
        self.commit(changes)?;
        if let Some(held) = &job.promise {
            self.promised.insert(job.id.counter, held.clone());
        } else {
            self.answered(job.id);
        }
        if names > 1 {
            if let Some(old) = old_object {
                self.tree.links.remove(&old);
                self.tree.shared.remove(&old);
            }
            self.tree.links.insert(job.id, names);
            self.tree.shared.insert(job.id, node.ix);
        }
        let Some(found) = self.tree.nodes.get_mut(node.ix) else { return Ok(true) };
        let unchanged = match &mut found.kind {
            Kind::Mail(mail) => {
                mail.object = Some(key.clone());
                mail.published_size = published_size;
                mail.dirty = mail.writes != job.writes;
                !mail.dirty
            }
            Kind::Growing(grow) => {
                grow.extents = extents;
                // Rewritten while it was under way: the piece is published once more.
                let again = grow.lowest < published_size;
                grow.published = if again { job.offset } else { published_size };
                grow.dirty = grow.writes != job.writes;
                grow.safe_writes = job.writes;
                if !grow.dirty {
                    grow.tail = None;
                }
                !grow.dirty
            }
            _ => true,
        };
        if class == Class::Mail || class == Class::Growing {
            self.note_new_mail();
        }
        Ok(unchanged)
    }
}

/// Makes a file safe: after success everything written before the call is in the store, and
/// the journal says so on disk.
///
/// Tries for as long as a delivery may wait; then the error is one that servers defer on.
pub async fn publish(node: &NodeRef) -> Result<()> {
    let mut patience = Patience::new(&node.cell.session);
    let _one = node.cell.one_at_a_time(node.ino).await;
    loop {
        let error = match publish_once(node).await {
            Err(error @ Error::Store { .. }) => error,
            done => return done,
        };
        tracing::warn!(user = %node.cell.name, %error, "mail not published");
        if !patience.again().await {
            return Err(error);
        }
    }
}

async fn publish_once(node: &NodeRef) -> Result<()> {
    let session = node.cell.session.clone();
    let Some(job) = node.cell.open_user(|user| user.begin_publish(node))? else {
        settle(node).await?;
        // It may be promised, by a call whose sync failed.
        return match session.settings.ack {
            Ack::Store => Ok(()),
            Ack::Journal => sync_journal(node).await,
        };
    };
    let (mut job, found) = if job.len <= SMALL {
        let found = digest(&job);
        (job, found)
    } else {
        let digested = blocking(move || {
            let found = digest(&job);
            (job, found)
        });
        digested.await?
    };
    let found = match found {
        Ok(found) => found,
        Err(error) => {
            // Nothing was put under this id.
            node.cell.if_open(|user| user.answered(job.id));
            return Err(error);
        }
    };
    let (key, name_apart) = job.key(&found);
    let mut metadata = vec![
        (META_FOLDER.to_string(), job.folder_path.clone()),
        (META_USER.to_string(), crate::format::escape::escape_key(node.cell.name.as_bytes())),
    ];
    if name_apart {
        let name = crate::format::escape::escape_key(&job.name);
        metadata.push((META_NAME.to_string(), name));
    }
    if !job.replaces.is_empty() {
        let ids: Vec<String> = job.replaces.iter().map(ObjectId::to_string).collect();
        metadata.push((META_REPLACES.to_string(), ids.join(" ")));
    }
    let body = match &found.bytes {
        Some(bytes) => Body::Bytes(bytes.clone()),
        None => Body::File { path: job.staged.path(), len: job.len },
    };
    if let (Some(_), Some(bytes)) = (&job.promise, &found.bytes) {
        let (key, bytes) = (key.clone(), bytes.clone());
        if let Err(error) = promise::write(&node.cell, Promise { key, metadata, bytes }).await {
            promise::take_back(&node.cell, job.id);
            node.cell.if_open(|user| user.answered(job.id));
            return Err(error);
        }
    } else if !(job.growing && job.len == 0) {
        let store_key = mail_key(&node.cell.name, &key);
        let failed = |e: std::io::Error| StoreError::Unavailable { detail: e.to_string() };
        let store = session.env.store.clone();
        let put = async move {
            failpoint::hit(failpoint::PUBLISH_BEFORE_PUT).map_err(failed)?;
            let (how, why) = (PutMode::Overwrite, Reason("publish"));
            let tag = store.put(&store_key, body, how, &metadata, why).await?;
            failpoint::hit(failpoint::PUBLISH_AFTER_PUT).map_err(failed)?;
            Ok(tag)
        };
        let done = match sabotage::is(Bug::AckBeforePut) {
            true => sabotage::unasked(put),
            false => put.await,
        };
        if let Err(error) = done {
            node.cell.if_open(|user| user.drop_unnamed(key));
            return Err(Error::store(
                format!("publishing a mail of {}", node.cell.name),
                During::Delivery,
                error,
            ));
        }
    }
    if job.growing
        && let Some(bytes) = &found.bytes
        && !bytes.is_empty()
    {
        super::fetch::keep(&session, &node.cell.name, job.id, bytes);
    }
    let ended = node.cell.open_user(|user| {
        let ended = user.end_publish(node, &job, &key);
        if ended.is_err() {
            user.drop_unnamed(key);
        }
        ended
    });
    // What follows may wait for a flush, and a hand-over waits for this.
    drop(job.begun.take());
    if job.promise.is_some() {
        let kept = node.cell.if_open(|user| user.promised.contains_key(&job.id.counter));
        if kept != Some(true) {
            promise::take_back(&node.cell, job.id);
        }
        ended?;
        // No other machine could show the mail: its folder need not be in the store either.
        sync_journal(node).await?;
        promise::keep_soon(&node.cell);
        return Ok(());
    }
    ended?;
    pass(failpoint::PUBLISH_AFTER_RECORD)?;
    settle(node).await
}

/// The object is in the store: now its folder must be, too.
async fn settle(node: &NodeRef) -> Result<()> {
    let known = node.cell.open_user(|user| {
        let found = user.tree.nodes.get(node.ix).filter(|n| n.ino == node.ino && n.nlink > 0);
        let folder = found.and_then(|n| n.names.first()).map(|name| name.at.folder);
        Ok(folder
            .is_none_or(|id| user.head.folders.iter().any(|f| f.id == id && !f.parts.is_empty())))
    })?;
    if !known {
        flush::flush(&node.cell, flush::Options::default()).await?;
    }
    super::sync::later(&node.cell);
    Ok(())
}

async fn sync_journal(node: &NodeRef) -> Result<()> {
    let point = node.cell.open_user(|user| user.sync_point())?;
    match point {
        Some(point) => blocking(move || point.sync()).await?,
        None => Ok(()),
    }
}

/// Runs what blocks on a disk away from the tasks. A runtime of one thread has nobody else to keep
/// going: there it is done at once, so that a simulation has one order of events.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    use tokio::runtime::{Handle, RuntimeFlavor};
    if Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::Internal(format!("a disk task ended early: {e}")))
}

#[cfg(test)]
mod tests {
    use super::maildir_name;

    #[test]
    fn names_get_their_sizes_once_and_lose_their_flags() {
        assert_eq!(maildir_name(b"1.M2P3.host", 10, 12), b"1.M2P3.host,S=10,W=12");
        assert_eq!(maildir_name(b"1.M2P3.host,S=10,W=12:2,S", 10, 12), b"1.M2P3.host,S=10,W=12");
        let long = [b'x'; 250];
        assert_eq!(maildir_name(&long, 10, 12), long);
    }
}
