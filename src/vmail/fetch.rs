//! Fetching: a published object comes back to the local disk.
//!
//! What arrives is checked against the key's checksum before anybody sees it. An object that
//! the listing names and the store says it does not have is an error (EIO), never an absent or
//! an empty mail.

use super::error::{During, Error, Plain, Result};
use super::hedge;
use super::lost;
use super::need::NodeRef;
use super::node::{Kind, Node};
use super::promise;
use super::publish::blocking;
use super::session::Session;
use super::stream::{self, Piece};
use crate::cache::disk::DiskFile;
use crate::cache::fscache::{Arrival, Cached, Reservation};
use crate::cache::staging::Staged;
use crate::format::ObjectId;
use crate::format::key::{KeyTail, mail_key};
use crate::store::{Reason, StoreError};
use bytes::Bytes;
use std::io;
use std::sync::Arc;

/// How often something is read from the store before it counts as damaged there. A body may have
/// been spoilt on its way in spite of its length, and TCP's checksum lets some of that pass.
pub const SPOILT_TRIES: u32 = 3;

pub(super) async fn failed(
    session: &Session,
    user: &Arc<str>,
    key: &KeyTail,
    error: StoreError,
) -> Error {
    match error {
        StoreError::NotFound { .. } => lost::confirm(session, user, key).await,
        error => unread(user, error),
    }
}

pub(super) fn unread(user: &str, error: StoreError) -> Error {
    Error::store(format!("reading a mail of {user}"), During::Reading, error)
}

/// The cached copy, its checksum looked at where that is not known to be right.
pub(super) async fn cached(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
) -> Result<Option<Arc<Cached>>> {
    let id = key.id();
    if let Some(copy) = session.fscache.get(user, id, size) {
        return Ok(Some(copy));
    }
    let Some(file) = session.fscache.doubtful(user, id) else { return Ok(None) };
    let looked = blocking(move || Ok::<_, io::Error>((file.stamp()?, digest(&*file)?))).await?;
    if let Ok((stamp, found)) = looked
        && found == (size, key.decode().crc)
    {
        return Ok(session.fscache.vouch(user, id, size, stamp));
    }
    tracing::warn!(%user, object = %key, "cached copy is not what was published; it is fetched anew");
    session.fscache.remove(user, id);
    Ok(None)
}

/// Objects up to this size pass through memory on their way: checked there and written once, in one
/// visit to a thread that may block. As many as there are requests may do so at once.
const IN_MEMORY: u64 = 256 << 10;

/// Length and checksum of a file.
fn digest(file: &dyn DiskFile) -> io::Result<(u64, u32)> {
    let (mut crc, mut at) = (0, 0);
    let mut buf = vec![0; 128 * 1024];
    loop {
        let n = file.read_at(&mut buf, at)?;
        if n == 0 {
            return Ok((at, crc));
        }
        crc = crc32c::crc32c_append(crc, &buf[..n]);
        at += n as u64;
    }
}

/// Brings an object into fscache; `None` if there is no room for it, or its disk fails: it is
/// streamed then.
async fn to_cache(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
    arrival: Arrival,
) -> Result<Option<Arc<Cached>>> {
    if let Some(copy) = cached(session, user, key, size).await? {
        return Ok(Some(copy));
    }
    // Who comes second finds it.
    let _turn = session.fetching.take((user.clone(), key.id())).await;
    if let Some(copy) = cached(session, user, key, size).await? {
        return Ok(Some(copy));
    }
    if arrival == Arrival::Read {
        session.fscache.missed(user);
    }
    let room = session.fscache.reserve(user, key.id(), size, arrival);
    let Some(room) = room else { return Ok(None) };
    let brought = match download(session, user, key, size, &room).await {
        // A disk that does not keep it has said so in the log.
        Ok(()) => return Ok(session.fscache.commit(room).ok()),
        Err(error) => error,
    };
    match brought {
        Error::Disk { .. } => Ok(None),
        // The store tells a local disk that is full apart, and calls any other fault of it its own.
        Error::Store { source: StoreError::Full { .. }, .. } => {
            room.failed(&io::ErrorKind::StorageFull.into());
            Ok(None)
        }
        error => Err(error),
    }
}

/// Brings a mail that will probably be read soon, if there is room for it beside what others use.
pub(super) async fn ahead(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
) -> Result<()> {
    to_cache(session, user, key, size, Arrival::Ahead).await.map(drop)
}

async fn download(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
    room: &Reservation,
) -> Result<()> {
    let file = room.create().map_err(|e| Error::disk("fscache", &e))?;
    download_to(session, user, key, size, &file).await
}

/// Fills an empty local file with an object, checked.
pub(super) async fn download_to(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
    file: &Arc<dyn DiskFile>,
) -> Result<()> {
    for _ in 0..SPOILT_TRIES {
        if download_once(session, user, key, size, file).await? {
            return Ok(());
        }
        tracing::warn!(%user, object = %key, "spoilt on its way, reading it again");
        file.set_len(0).map_err(|e| Error::disk("local copy", &e))?;
    }
    Err(Error::Damaged {
        what: format!("user {user}: object {key} does not hold what was published"),
    })
}

/// Whether the object arrived as it was published.
async fn download_once(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
    file: &Arc<dyn DiskFile>,
) -> Result<bool> {
    let local = |e: io::Error| Error::disk("local copy", &e);
    let store_key = mail_key(user, key);
    let wanted = (size, key.decode().crc);
    let bytes = match (promise::read(session, user, key).await?, file.real()) {
        (Some(bytes), _) => bytes,
        (None, Some(real)) if size > IN_MEMORY => {
            let got = session.env.store.download(&store_key, &real, Reason("fetch")).await;
            if let Err(error) = got {
                return Err(failed(session, user, key, error).await);
            }
            let file = file.clone();
            return Ok(blocking(move || digest(&*file)).await?.map_err(local)? == wanted);
        }
        (None, _) => match hedge::get(session, &store_key, size).await {
            Ok(bytes) => bytes,
            Err(error) => return Err(failed(session, user, key, error).await),
        },
    };
    let file = file.clone();
    let written = blocking(move || {
        let found = (bytes.len() as u64, crc32c::crc32c(&bytes));
        if found == wanted { file.write_all_at(&bytes, 0).map(|()| true) } else { Ok(false) }
    });
    written.await?.map_err(local)
}

/// Keeps bytes that were just published as the object's cached copy. Best effort.
pub fn keep(session: &Arc<Session>, user: &Arc<str>, id: ObjectId, bytes: &Bytes) {
    let room = session.fscache.reserve(user, id, bytes.len() as u64, Arrival::Delivered);
    let Some(room) = room else { return };
    let written = room.create().and_then(|file| file.write_all_at(bytes, 0));
    match written {
        Ok(()) => _ = session.fscache.commit(room),
        Err(error) => room.failed(&error),
    }
}

/// Copies a staged file into the room that another file system has for it. Best effort, too.
pub async fn copy_in(session: Arc<Session>, room: Reservation, staged: Arc<Staged>) {
    let copied = blocking(move || room.fill(&*staged.file).map(|()| room)).await;
    if let Ok(Ok(room)) = copied {
        let _ = session.fscache.commit(room);
    }
}

/// What a mail that fscache has no room for begins with: whether it is there shows now.
async fn stream_begins(
    session: &Arc<Session>,
    user: &Arc<str>,
    object: &KeyTail,
    size: u64,
) -> Result<()> {
    let first = Piece { object: object.clone(), size, index: 0 };
    stream::bring(session, user, &first).await
}

/// For an open: brings a mail's copy, or notes that it is streamed.
pub async fn fetch(node: &NodeRef) -> Result<()> {
    let cell = &node.cell;
    let wanted = cell.open_user(|user| {
        let found = user.node_known(node.ix, node.ino)?;
        match &found.kind {
            Kind::Mail(mail) if mail.staged.is_none() => {
                let key = mail.object.clone().ok_or(Plain::BadHandle)?;
                Ok(Some((key, mail.published_size)))
            }
            _ => Ok(None),
        }
    })?;
    let Some((key, size)) = wanted else { return Ok(()) };
    let session = &cell.session;
    let copy = match to_cache(session, &cell.name, &key, size, Arrival::Read).await {
        Ok(None) => stream_begins(session, &cell.name, &key, size).await.map(|()| None),
        copy => copy,
    };
    let copy = match copy {
        Err(gone @ Error::Gone { .. }) => {
            let blank = cell.open_user(|user| user.blank(node.ix))?;
            let Some(bare) = blank else { return Err(gone) };
            tracing::error!(user = %cell.name, object = %key, "gone from the store; shown as a blank mail");
            cell.if_open(|user| {
                if let Ok(Node { kind: Kind::Mail(mail), .. }) = user.known_mut(node) {
                    mail.blank = Some(bare);
                }
            });
            return Ok(());
        }
        copy => copy?,
    };
    cell.if_open(|user| {
        if let Ok(found) = user.known_mut(node)
            && let Kind::Mail(mail) = &mut found.kind
            && mail.object.as_ref() == Some(&key)
        {
            mail.through = copy.is_none();
            mail.fetched = copy;
        }
    });
    Ok(())
}

/// Brings one extent of a growing file.
pub async fn fetch_extent(node: &NodeRef, index: usize) -> Result<()> {
    let cell = &node.cell;
    let wanted = cell.open_user(|user| match &user.node_known(node.ix, node.ino)?.kind {
        Kind::Growing(grow) => Ok(grow.extents.get(index).cloned()),
        _ => Ok(None),
    })?;
    let Some(extent) = wanted else { return Ok(()) };
    let id = extent.object.id();
    let (object, read) = (&extent.object, Arrival::Read);
    let copy = match to_cache(&cell.session, &cell.name, object, extent.len, read).await? {
        Some(copy) => Some(copy),
        None => {
            stream_begins(&cell.session, &cell.name, &extent.object, extent.len).await?;
            None
        }
    };
    cell.if_open(|user| {
        if let Ok(found) = user.known_mut(node)
            && let Kind::Growing(grow) = &mut found.kind
        {
            match copy {
                Some(copy) => _ = grow.open.insert(id, copy),
                None => _ = grow.through.insert(id),
            }
        }
    });
    Ok(())
}

/// All bytes of an object, checked. For rare reads, behind the scenes.
pub async fn whole(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
) -> Result<Bytes> {
    if let Some(copy) = cached(session, user, key, size).await? {
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        if let Some(bytes) = copy.read(0, len) {
            return Ok(Bytes::from(bytes));
        }
    }
    if let Some(bytes) = promise::read(session, user, key).await? {
        return Ok(bytes);
    }
    let store = &session.env.store;
    for _ in 0..SPOILT_TRIES {
        let got = store.get(&mail_key(user, key), None, size, Reason("fetch")).await;
        let (_, bytes) = match got {
            Ok(got) => got,
            Err(error) => return Err(failed(session, user, key, error).await),
        };
        if bytes.len() as u64 == size && crc32c::crc32c(&bytes) == key.decode().crc {
            return Ok(bytes);
        }
    }
    Err(Error::Damaged {
        what: format!("user {user}: object {key} does not hold what was published"),
    })
}
