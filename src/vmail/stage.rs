//! Back to staging: a published file that is written once more.

use super::error::{Error, Result};
use super::fetch;
use super::need::NodeRef;
use super::node::Kind;
use super::publish::blocking;
use super::session::Session;
use super::wait::staging_room;
use crate::cache::disk::DiskFile;
use crate::cache::staging::Staged;
use crate::format::key::KeyTail;
use crate::format::listing::Extent;
use std::io;
use std::sync::Arc;

fn local(error: io::Error) -> Error {
    Error::disk("staging", &error)
}

/// An object in a staged file, checked.
async fn staged(
    session: &Arc<Session>,
    user: &Arc<str>,
    key: &KeyTail,
    size: u64,
) -> Result<Staged> {
    let staged = session.staging.create().map_err(local)?;
    staging_room(session, &staged, size).await?;
    if let Some(copy) = fetch::cached(session, user, key, size).await? {
        return blocking(move || {
            copy_into(&copy.file, size, |bytes, at| staged.file.write_all_at(bytes, at))?;
            Ok(staged)
        })
        .await?
        .map_err(local);
    }
    fetch::download_to(session, user, key, size, &staged.file)
        .await
        .map_err(Error::for_delivery)?;
    Ok(staged)
}

/// Hands over a file's bytes in small pieces.
fn copy_into(
    from: &Arc<dyn DiskFile>,
    len: u64,
    mut to: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut buf = vec![0; 128 * 1024];
    let mut at = 0;
    while at < len {
        let want = usize::try_from(len - at).unwrap_or(usize::MAX).min(buf.len());
        let n = from.read_at(&mut buf[..want], at)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to(&buf[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

/// Brings a published file back to staging, from `offset` on, so that it can be written.
pub async fn stage(node: &NodeRef, offset: u64) -> Result<()> {
    let cell = &node.cell;
    let session = &cell.session;
    let _one = cell.one_at_a_time(node.ino).await;
    enum What {
        Mail(KeyTail, u64),
        Growing(u64, Vec<Extent>),
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
    match wanted {
        None => Ok(()),
        Some(What::Mail(key, size)) => {
            let staged = staged(session, &cell.name, &key, size).await?;
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
                let piece = staged(session, &cell.name, &extent.object, extent.len).await?;
                pieces.push((extent.offset, extent.len, piece));
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
                for (offset, len, piece) in &pieces {
                    copy_into(&piece.file, *len, |bytes, at| {
                        tail.write_sparse(bytes, offset + at, from)
                    })
                    .map_err(local)?;
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
