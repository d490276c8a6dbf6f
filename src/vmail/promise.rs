//! `ack = "journal"`: a mail counts as safe once it is on this machine's disk, and is uploaded
//! within seconds.
//!
//! # The rule
//!
//! Before fsync or close is answered, a *promise* (the mail's key, its metadata and its bytes in
//! one file, named by the object's id) is durable in `pending/` of the user's state directory, and
//! after it the journal record that names the object. A promise is kept by a PUT under exactly
//! that key; its file goes when the PUT was answered. Until then the id counts as unanswered, so
//! the watermark stays below it.
//!
//! A head never names what is not up: a flush uploads every promise that its cut may name before
//! it puts its bundle.
//!
//! # What a death leaves
//!
//! - A promise without a record: nobody was told. The next start removes it.
//! - A promise with its record: the next start uploads it before the user is served.
//! - Local state that is obsolete because another session took the user meanwhile: the
//!   promises in it that are not in the store are put there under new ids, and back into their
//!   folders. At worst a mail is there twice.
//! - The disk lost: what was promised and not uploaded is lost. That is this mode's price; `vmailfs
//!   status` shows how much that is.
//!
//! What is promised and not uploaded takes no more of the disk than `staging.max_size`. Mails that come
//! when so much waits, because the store is down, are not promised: they wait for the store.
//!
//! A mail above [`LARGEST`] goes to the store at once, as with `ack = "store"`: it would be held
//! in memory, and nobody expects its delivery to be quick.

use super::error::{During, Error, Result};
use super::publish::blocking;
use super::session::{Session, UserCell};
use super::user::User;
use crate::cache::disk::{How, sync_above};
use crate::format::ObjectId;
use crate::format::key::{KeyTail, Piece, mail_key, user_dir};
use crate::store::{Body, PutMode, Reason};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// When a mail counts as safe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ack {
    /// When it is in the store.
    #[default]
    Store,
    /// When it is on this machine's disk.
    Journal,
}

/// Larger mails wait for the store, in bytes.
pub const LARGEST: u64 = 16 << 20;
/// What stands in front of the bytes is shorter than this.
const FRONT: usize = 64 << 10;
/// Uploads of one user at a time.
const AT_ONCE: usize = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Bytes of promises that are on the disk, of all users.
pub type Promises = Arc<AtomicU64>;

/// The bytes of one of them; given back when dropped.
#[derive(Debug)]
pub struct Held {
    of: Promises,
    pub len: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.of.fetch_sub(self.len, Ordering::AcqRel);
    }
}

impl Session {
    /// The right to promise a mail of so many bytes; `None` if it must wait for the store.
    pub(super) fn may_promise(&self, len: u64) -> Option<Arc<Held>> {
        if self.settings.ack == Ack::Store || !(1..=LARGEST).contains(&len) {
            return None;
        }
        let most = self.settings.staging_max;
        let room = |used: u64| used.checked_add(len).filter(|sum| *sum <= most);
        let of = &self.promises;
        of.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        Some(Arc::new(Held { of: of.clone(), len }))
    }
}

/// What stands in front of the bytes, on a line of its own.
#[derive(Debug, Serialize, Deserialize)]
struct Front {
    version: u32,
    key: String,
    metadata: Vec<(String, String)>,
}

/// A mail that was promised.
#[derive(Debug)]
pub(super) struct Promise {
    pub key: KeyTail,
    pub metadata: Vec<(String, String)>,
    pub bytes: Bytes,
}

impl Promise {
    fn encode(&self) -> Result<Vec<u8>> {
        let front =
            Front { version: 1, key: self.key.to_string(), metadata: self.metadata.clone() };
        let mut out = serde_json::to_vec(&front).map_err(|e| Error::Internal(e.to_string()))?;
        out.push(b'\n');
        out.extend_from_slice(&self.bytes);
        Ok(out)
    }

    fn decode(content: Vec<u8>, path: &Path) -> Result<Promise> {
        let damaged = |why: &str| Error::Damaged { what: format!("{}: {why}", path.display()) };
        let end = content.iter().position(|b| *b == b'\n').ok_or_else(|| damaged("no header"))?;
        let front: Front =
            serde_json::from_slice(&content[..end]).map_err(|e| damaged(&e.to_string()))?;
        let key = KeyTail::parse(&front.key).map_err(|e| damaged(&e.to_string()))?;
        let bytes = Bytes::from(content).slice(end + 1..);
        if crc32c::crc32c(&bytes) != key.decode().crc {
            return Err(damaged("its bytes are not those that were promised"));
        }
        Ok(Promise { key, metadata: front.metadata, bytes })
    }
}

fn dir_of(state_dir: &Path) -> PathBuf {
    state_dir.join("pending")
}

fn read_at(session: &Session, path: &Path) -> Result<Option<Promise>> {
    let read = session.disk().read(path, LARGEST + FRONT as u64);
    let read = read.map_err(|e| Error::disk(path.display().to_string(), &e))?;
    read.map(|content| Promise::decode(content, path)).transpose()
}

/// The promises in a directory, by their files.
fn all_in(session: &Session, dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = session.disk().list(dir);
    let listed = listed.map_err(|e| Error::disk(dir.display().to_string(), &e))?;
    let ids = listed.into_iter().filter(|e| {
        !e.is_dir && e.name.to_str().is_some_and(|name| name.parse::<ObjectId>().is_ok())
    });
    Ok(ids.map(|e| dir.join(e.name)).collect())
}

/// Where the promises of obsolete local state wait for their adoption.
fn orphans(session: &Session, user: &str) -> PathBuf {
    session.settings.state_dir.join("adopt").join(user_dir(user))
}

/// Takes the promises out of local state that is about to be given up.
pub(super) fn set_aside(session: &Session, user: &str, state_dir: &Path) -> Result<()> {
    let to = orphans(session, user);
    let paths = all_in(session, &dir_of(state_dir))?;
    if paths.is_empty() {
        return Ok(());
    }
    let disk = session.disk();
    let failed = |e| Error::disk(to.display().to_string(), &e);
    disk.create_dirs(&to)
        .and_then(|()| sync_above(disk, &to, &session.settings.state_dir))
        .map_err(failed)?;
    for path in paths {
        if let Some(name) = path.file_name() {
            disk.rename(&path, &to.join(name)).map_err(failed)?;
        }
    }
    disk.sync_dir(&to).map_err(failed)
}

fn forget(session: &Session, path: &Path) {
    if let Err(error) = session.disk().remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        // Uploaded again at the next start, under the same key.
        tracing::warn!(%error, path = %path.display(), "kept promise not removed");
    }
}

/// Makes a promise durable. Its record follows.
pub(super) async fn write(cell: &Arc<UserCell>, promise: Promise) -> Result<()> {
    let session = cell.session.clone();
    let state = session.state_dir_of(&cell.name);
    let known = cell.open_user(|user| Ok(user.pending_made))?;
    blocking(move || {
        let dir = dir_of(&state);
        let path = dir.join(promise.key.id().to_string());
        let content = promise.encode()?;
        let disk = session.disk();
        disk.create_dirs(&dir)
            // Others may be at their first promise, too, and each waits for this.
            .and_then(|()| if known { Ok(()) } else { disk.sync_dir(&state) })
            .and_then(|()| disk.replace(&path, &content, true))
            .map_err(|e| Error::disk(path.display().to_string(), &e))
    })
    .await??;
    cell.if_open(|user| user.pending_made = true);
    Ok(())
}

/// A promise that no record names.
pub(super) fn take_back(cell: &UserCell, id: ObjectId) {
    let dir = dir_of(&cell.session.state_dir_of(&cell.name));
    forget(&cell.session, &dir.join(id.to_string()));
}

/// The bytes of an object that is promised and perhaps not in the store yet.
pub(super) async fn read(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
) -> Result<Option<Bytes>> {
    if session.settings.ack == Ack::Store {
        return Ok(None);
    }
    let path = dir_of(&session.state_dir_of(user)).join(key.id().to_string());
    let session = session.clone();
    let found = blocking(move || read_at(&session, &path)).await??;
    Ok(found.map(|promise| promise.bytes))
}

/// A part of the same bytes; not checked.
pub(super) async fn read_range(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    range: Range<u64>,
) -> Result<Option<Bytes>> {
    if session.settings.ack == Ack::Store {
        return Ok(None);
    }
    let path = dir_of(&session.state_dir_of(user)).join(key.id().to_string());
    let session = session.clone();
    blocking(move || {
        let file = match session.disk().open(&path, How::Read) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::disk(path.display().to_string(), &e)),
        };
        let local = |e: io::Error| Error::disk(path.display().to_string(), &e);
        let mut front = vec![0; FRONT];
        let n = file.read_at(&mut front, 0).map_err(local)?;
        let end = front[..n].iter().position(|b| *b == b'\n');
        let end =
            end.ok_or_else(|| Error::Damaged { what: format!("{}: no header", path.display()) })?;
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let bytes = file.read_exact_at(end as u64 + 1 + range.start, len).map_err(local)?;
        Ok(Some(Bytes::from(bytes)))
    })
    .await?
}

async fn upload(cell: &Arc<UserCell>, path: PathBuf) -> Result<()> {
    let session = cell.session.clone();
    let (reading, at) = (session.clone(), path.clone());
    let Some(promise) = blocking(move || read_at(&reading, &at)).await?? else {
        return Err(Error::Damaged {
            what: format!("{}: a promised mail is gone from the disk", path.display()),
        });
    };
    put(cell, &promise).await?;
    forget(&session, &path);
    Ok(())
}

async fn put(cell: &Arc<UserCell>, promise: &Promise) -> Result<()> {
    let body = Body::Bytes(promise.bytes.clone());
    let key = mail_key(&cell.name, &promise.key);
    let store = &cell.session.env.store;
    let put = store.put(&key, body, PutMode::Overwrite, &promise.metadata, Reason("publish")).await;
    put.map(|_| ()).map_err(|e| {
        Error::store(format!("uploading a mail of {}", cell.name), During::Delivery, e)
    })
}

/// Keeps every promise made so far to an open user.
pub async fn keep_all(cell: &Arc<UserCell>) -> Result<()> {
    let _one = cell.uploading.lock().await;
    // What a session promised that has lost the user is put back by the next that opens it here:
    // an object that arrives now would be in no listing of the new owner's.
    let mine = |user: &mut User| !user.lost;
    if cell.if_open(mine) != Some(true) {
        return Ok(());
    }
    let open = cell.if_open(|user| {
        let ids: Vec<_> = user.promised.keys().copied().collect();
        (user.epoch, ids)
    });
    let Some((epoch, ids)) = open else { return Ok(()) };
    let dir = dir_of(&cell.session.state_dir_of(&cell.name));
    let uploads = ids.into_iter().map(|counter| {
        let id = ObjectId { epoch, counter };
        let path = dir.join(id.to_string());
        async move {
            let done = upload(cell, path).await;
            if let Err(error @ Error::Damaged { .. }) = &done {
                // Nothing brings it back: from here on it is a lost mail, and shows as one.
                tracing::error!(user = %cell.name, %error, "a promise cannot be kept");
            }
            if matches!(done, Ok(()) | Err(Error::Damaged { .. })) {
                cell.if_open(|user| {
                    user.promised.remove(&counter);
                    user.answered(id);
                });
                return Ok(());
            }
            done
        }
    });
    let mut running = futures_util::stream::iter(uploads).buffer_unordered(AT_ONCE);
    let mut first = Ok(());
    while let Some(done) = running.next().await {
        first = first.and(done);
    }
    first
}

/// Uploads behind the scenes, for as long as it takes.
pub(super) fn keep_soon(cell: &Arc<UserCell>) {
    if cell.uploader.swap(true, Ordering::AcqRel) {
        return;
    }
    let cell = cell.clone();
    let _task = cell.session.runtime.clone().spawn(async move {
        let mut pause = FIRST_PAUSE;
        loop {
            match keep_all(&cell).await {
                Ok(()) => {
                    cell.uploader.store(false, Ordering::Release);
                    // One that was made since saw an uploader that was about to end.
                    let more = cell.if_open(|user| !user.lost && !user.promised.is_empty());
                    if more != Some(true) || cell.uploader.swap(true, Ordering::AcqRel) {
                        return;
                    }
                    pause = FIRST_PAUSE;
                }
                Err(error) => {
                    tracing::warn!(user = %cell.name, %error, "mails that were promised are not uploaded yet");
                    if cell.session.closing.load(Ordering::Acquire) {
                        cell.uploader.store(false, Ordering::Release);
                        return;
                    }
                    cell.session.env.clock.sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    });
}

/// At the start: uploads what the journal names, and removes what nobody was promised.
pub(super) async fn resume(
    cell: &Arc<UserCell>,
    named: &std::collections::HashSet<ObjectId>,
) -> Result<()> {
    let session = cell.session.clone();
    let dir = dir_of(&session.state_dir_of(&cell.name));
    let paths = blocking(move || all_in(&session, &dir)).await??;
    for path in paths {
        let id = path.file_name().and_then(|n| n.to_str()).map(str::parse::<ObjectId>);
        match id {
            Some(Ok(id)) if named.contains(&id) => match upload(cell, path).await {
                Err(error @ Error::Damaged { .. }) => {
                    tracing::error!(user = %cell.name, %error, "a promise cannot be kept");
                }
                done => done?,
            },
            _ => forget(&cell.session, &path),
        }
    }
    Ok(())
}

/// The promises of obsolete local state that are not in the store: each is put there under a
/// new id, for the caller to name.
pub(super) async fn adopt(cell: &Arc<UserCell>) -> Result<Vec<(KeyTail, u64, PathBuf)>> {
    let session = cell.session.clone();
    let dir = orphans(&session, &cell.name);
    let paths = blocking(move || all_in(&session, &dir)).await??;
    let mut adopted = Vec::new();
    let mut new_ids = std::collections::HashMap::new();
    for path in paths {
        let (session, at) = (cell.session.clone(), path.clone());
        let promise = match blocking(move || read_at(&session, &at)).await? {
            Ok(Some(promise)) => promise,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(user = %cell.name, %error, "a promise cannot be kept");
                continue;
            }
        };
        let store = &cell.session.env.store;
        match store.head(&mail_key(&cell.name, &promise.key), Reason("recover")).await {
            // Whoever took the user knows it.
            Ok(_) => {
                forget(&cell.session, &path);
                continue;
            }
            Err(crate::store::StoreError::NotFound { .. }) => {}
            Err(e) => {
                let what = format!("object {} of {}", promise.key, cell.name);
                return Err(Error::store(what, During::Delivery, e));
            }
        }
        let mut key = promise.key.decode();
        let old = key.id;
        key.id = cell.open_user(|user| Ok(user.new_id()))?;
        new_ids.insert(old, key.id);
        if let Piece::Extent { predecessor: Some(before), .. } = &mut key.piece {
            *before = new_ids.get(before).copied().unwrap_or(*before);
        }
        let (key, _) = key.encode();
        let size = promise.bytes.len() as u64;
        put(cell, &Promise { key: key.clone(), ..promise }).await?;
        adopted.push((key, size, path));
    }
    Ok(adopted)
}

/// An adopted promise has its name, and that is on disk.
pub(super) fn adopted(cell: &UserCell, path: &Path) {
    forget(&cell.session, path);
}
