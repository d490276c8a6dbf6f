//! Fetching: a published object comes back to the local disk.
//!
//! What arrives is checked against the key's checksum before anybody sees it. An object that
//! the listing names and the store says it does not have is an error (EIO), never an absent or
//! an empty mail.

use super::error::{During, Error, Plain, Result};
use super::lost;
use super::need::NodeRef;
use super::node::{Kind, Node};
use super::promise;
use super::publish::blocking;
use super::session::Session;
use crate::cache::disk::DiskFile;
use crate::cache::fscache::{Cached, Reservation};
use crate::format::ObjectId;
use crate::format::key::{KeyTail, mail_key};
use crate::store::{Reason, StoreError};
use bytes::Bytes;
use std::io;
use std::sync::Arc;

/// How often something is read from the store before it counts as damaged there. A body may have
/// been spoilt on its way in spite of its length, and TCP's checksum lets some of that pass.
pub const SPOILT_TRIES: u32 = 3;

/// How much of a mail that does not fit the cache is read at a time.
const WINDOW: u64 = 1024 * 1024;

async fn failed(session: &Session, user: &Arc<str>, key: &KeyTail, error: StoreError) -> Error {
    match error {
        StoreError::NotFound { .. } => lost::confirm(session, user, key).await,
        error => unread(user, error),
    }
}

pub(super) fn unread(user: &str, error: StoreError) -> Error {
    Error::store(format!("reading a mail of {user}"), During::Reading, error)
}

/// The cached copy, its checksum looked at where that is not known to be right.
async fn cached(
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

/// Brings an object into fscache; `None` if there is no room for it, or its disk fails.
async fn to_cache(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
) -> Result<Option<Arc<Cached>>> {
    if let Some(copy) = cached(session, user, key, size).await? {
        return Ok(Some(copy));
    }
    let Some(room) = session.fscache.reserve(size) else { return Ok(None) };
    let local = |e: io::Error| Error::disk("fscache", &e);
    let brought = match download(session, user, key, size, room).await {
        Ok(room) => session.fscache.commit(room, user, key.id()).map_err(local),
        Err(error) => Err(error),
    };
    match brought {
        Ok(copy) => Ok(Some(copy)),
        Err(
            error @ (Error::Disk { .. } | Error::Store { source: StoreError::Full { .. }, .. }),
        ) => {
            tracing::warn!(%user, %error, "no mail can be put into fscache; it is read through memory");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn download(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
    room: Reservation,
) -> Result<Reservation> {
    let local = |e: io::Error| Error::disk("fscache", &e);
    let file = room.create().map_err(local)?;
    for _ in 0..SPOILT_TRIES {
        if download_once(session, user, key, size, &file).await? {
            return Ok(room);
        }
        tracing::warn!(%user, object = %key, "spoilt on its way, reading it again");
        file.set_len(0).map_err(local)?;
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
    let local = |e: io::Error| Error::disk("fscache", &e);
    let store_key = mail_key(user, key);
    match (promise::read(session, user, key).await?, file.real()) {
        (Some(bytes), _) => file.write_all_at(&bytes, 0).map_err(local)?,
        (None, Some(real)) => {
            let got = session.env.store.download(&store_key, &real, Reason("fetch")).await;
            if let Err(error) = got {
                return Err(failed(session, user, key, error).await);
            }
        }
        (None, None) => {
            let got = session.env.store.get(&store_key, None, size, Reason("fetch")).await;
            let (_, bytes) = match got {
                Ok(got) => got,
                Err(error) => return Err(failed(session, user, key, error).await),
            };
            file.write_all_at(&bytes, 0).map_err(local)?;
        }
    }
    let file = file.clone();
    let found = blocking(move || digest(&*file)).await?.map_err(local)?;
    Ok(found == (size, key.decode().crc))
}

/// Keeps bytes that were just published as the object's cached copy. Best effort.
pub fn keep(session: &Arc<Session>, user: &Arc<str>, id: ObjectId, bytes: &Bytes) {
    let Some(room) = session.fscache.reserve(bytes.len() as u64) else { return };
    let kept = room
        .create()
        .and_then(|file| file.write_all_at(bytes, 0))
        .and_then(|()| session.fscache.commit(room, user, id));
    if let Err(error) = kept {
        tracing::warn!(%user, %error, "published bytes not kept in fscache");
    }
}

/// For an open: brings a mail's copy, or notes that it must be read through memory.
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
    let copy = match to_cache(&cell.session, &cell.name, &key, size).await {
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
    let copy = match to_cache(&cell.session, &cell.name, &extent.object, extent.len).await? {
        Some(copy) => copy,
        None => {
            let bytes = whole(&cell.session, &cell.name, &extent.object, extent.len).await?;
            cell.session.fscache.apart(bytes)
        }
    };
    cell.if_open(|user| {
        if let Ok(found) = user.known_mut(node)
            && let Kind::Growing(grow) = &mut found.kind
        {
            grow.open.insert(id, copy);
        }
    });
    Ok(())
}

/// Reads a piece of a mail that the cache has no room for.
pub async fn through(node: &NodeRef, offset: u64) -> Result<()> {
    let cell = &node.cell;
    let wanted = cell.open_user(|user| match &user.node_known(node.ix, node.ino)?.kind {
        Kind::Mail(mail) => Ok(mail.object.clone().map(|key| (key, mail.published_size))),
        _ => Ok(None),
    })?;
    let Some((key, size)) = wanted.filter(|(_, size)| offset < *size) else { return Ok(()) };
    let range = offset..size.min(offset + WINDOW);
    let limit = range.end - range.start;
    if let Some(bytes) = promise::read(&cell.session, &cell.name, &key).await? {
        let start = usize::try_from(range.start).unwrap_or(usize::MAX).min(bytes.len());
        let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(bytes.len());
        cell.if_open(|user| {
            if let Ok(Node { kind: Kind::Mail(mail), .. }) = user.known_mut(node) {
                mail.window = Some((offset, bytes.slice(start..end)));
            }
        });
        return Ok(());
    }
    let store = &cell.session.env.store;
    let got = store.get(&mail_key(&cell.name, &key), Some(range), limit, Reason("fetch")).await;
    let got = match got {
        Ok(got) => got,
        Err(error) => return Err(failed(&cell.session, &cell.name, &key, error).await),
    };
    let all = offset == 0 && got.1.len() as u64 == size;
    if all && crc32c::crc32c(&got.1) != key.decode().crc {
        return Err(Error::Damaged {
            what: format!("user {}: object {key} does not hold what was published", cell.name),
        });
    }
    cell.if_open(|user| {
        if let Ok(found) = user.known_mut(node)
            && let Kind::Mail(mail) = &mut found.kind
        {
            mail.window = Some((offset, got.1));
        }
    });
    Ok(())
}

/// All bytes of an object, checked. For small or rare reads.
pub async fn whole(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
) -> Result<Bytes> {
    if let Some(copy) = cached(session, user, key, size).await? {
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let read = copy.file.read_exact_at(0, len);
        return read.map(Bytes::from).map_err(|e| Error::disk("fscache", &e));
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

/// Brings a published file back to staging, from `offset` on, so that it can be written.
pub async fn stage(node: &NodeRef, offset: u64) -> Result<()> {
    let cell = &node.cell;
    let session = &cell.session;
    let _one = cell.one_at_a_time(node.ino).await;
    enum What {
        Mail(KeyTail, u64),
        Growing(u64, Vec<crate::format::listing::Extent>),
    }
    let wanted = cell.open_user(|user| match &user.node_known(node.ix, node.ino)?.kind {
        Kind::Mail(mail) if mail.staged.is_none() => {
            Ok(mail.object.clone().map(|key| What::Mail(key, mail.published_size)))
        }
        Kind::Growing(grow) if offset < grow.published => {
            let from = grow.rewrite_from(offset);
            let again =
                grow.extents.iter().filter(|e| e.offset >= from && e.offset < grow.published);
            Ok(Some(What::Growing(from, again.cloned().collect())))
        }
        _ => Ok(None),
    })?;
    let local = |e: io::Error| Error::disk("staging", &e);
    match wanted {
        None => Ok(()),
        Some(What::Mail(key, size)) => {
            let bytes =
                whole(session, &cell.name, &key, size).await.map_err(Error::for_delivery)?;
            let staged = session.staging.create().map_err(local)?;
            staged.write(&bytes, 0).map_err(local)?;
            cell.open_user(|user| {
                if let Kind::Mail(mail) = &mut user.known_mut(node)?.kind
                    && mail.staged.is_none()
                {
                    mail.staged = Some(Arc::new(staged));
                }
                Ok(())
            })
        }
        Some(What::Growing(from, extents)) => {
            let mut pieces = Vec::new();
            for extent in extents {
                let bytes = whole(session, &cell.name, &extent.object, extent.len)
                    .await
                    .map_err(Error::for_delivery)?;
                pieces.push((extent.offset, bytes));
            }
            cell.open_user(|user| {
                let staging = user.session.staging.clone();
                let Kind::Growing(grow) = &mut user.known_mut(node)?.kind else { return Ok(()) };
                if from >= grow.published {
                    return Ok(());
                }
                let tail = match &grow.tail {
                    Some(tail) => tail.clone(),
                    None => Arc::new(staging.create().map_err(local)?),
                };
                for (at, bytes) in &pieces {
                    tail.write_sparse(bytes, *at, from).map_err(local)?;
                }
                grow.tail = Some(tail);
                grow.published = from;
                grow.dirty = true;
                grow.writes += 1;
                grow.lowest = from;
                Ok(())
            })
        }
    }
}
