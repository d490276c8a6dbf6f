//! The bytes of files: reading. From a local file, from a copy in fscache, or, where there is no room for one,
//! from the pieces of a stream.

use super::error::{Error, Plain};
use super::io::disk;
use super::lost;
use super::need::{Need, Op, Stop};
use super::node::{Kind, NodeIx};
use super::stream::Piece;
use super::user::User;
use crate::cache::fscache::Cached;
use std::sync::Arc;

/// Copies of extents that an open file keeps open.
const OPEN_EXTENTS: usize = 16;

impl User {
    /// Bytes of a file; `copy` is what the handle was given at open.
    pub fn read(
        &mut self,
        ix: NodeIx,
        copy: Option<&Arc<Cached>>,
        offset: u64,
        size: u32,
    ) -> Op<Vec<u8>> {
        let reference = self.node_ref(ix)?;
        let name = self.name.clone();
        let session = self.session.clone();
        let fscache = &session.fscache;
        let node = self.node_mut(ix)?;
        let end = node.size.min(offset.saturating_add(u64::from(size)));
        if offset >= end {
            return Ok(Vec::new());
        }
        let len = usize::try_from(end - offset).unwrap_or(usize::MAX);
        match &mut node.kind {
            Kind::Local(local) => {
                let file = local.file.clone().ok_or(Plain::BadHandle)?;
                let mut buf = vec![0; len];
                let n = file.read_at(&mut buf, offset).map_err(|e| disk(&e))?;
                buf.truncate(n);
                Ok(buf)
            }
            Kind::Mail(mail) => {
                let size = mail.published_size;
                if let Some(staged) = &mail.staged {
                    return Ok(staged.file.read_exact_at(offset, len).map_err(|e| disk(&e))?);
                }
                let key = mail.object.clone().ok_or(Plain::BadHandle)?;
                let copy = copy.cloned().or_else(|| mail.fetched.clone());
                let copy = copy.or_else(|| mail.cached.upgrade()).or_else(|| {
                    // It was being written when this handle was opened, or is small.
                    let found =
                        (!mail.through).then(|| fscache.reopen(&name, key.id(), size))??;
                    mail.fetched = Some(found.clone());
                    Some(found)
                });
                if let Some(bytes) = copy.and_then(|copy| copy.read(offset, len)) {
                    return Ok(bytes);
                }
                if let Some(bare) = mail.blank {
                    return Ok(lost::blank_bytes(bare, offset, len));
                }
                session.streams.read(&name, key.id(), offset, len).map_err(|index| {
                    Stop::Wait(Need::Through(reference, Piece { object: key, size, index }))
                })
            }
            Kind::Growing(grow) => {
                let mut out = Vec::with_capacity(len);
                while out.len() < len {
                    let at = offset + out.len() as u64;
                    let want = len - out.len();
                    if at >= grow.published {
                        match &grow.tail {
                            Some(tail) => {
                                let mut buf = vec![0; want];
                                let n = tail.file.read_at(&mut buf, at).map_err(|e| disk(&e))?;
                                // What was never written reads as zeros.
                                let _ = n;
                                out.extend(buf);
                            }
                            None => out.extend(std::iter::repeat_n(0, want)),
                        }
                        continue;
                    }
                    let i = grow.extents.partition_point(|e| e.offset <= at).saturating_sub(1);
                    let Some(extent) = grow.extents.get(i) else {
                        return Err(Error::Internal("hole in a growing file".into()).into());
                    };
                    let id = extent.object.id();
                    let open = match grow.open.get(&id) {
                        Some(open) => Some(open.clone()),
                        None => fscache.get(&name, id, extent.len).inspect(|open| {
                            grow.open.insert(id, open.clone());
                        }),
                    };
                    let stop = (extent.offset + extent.len).min(grow.published);
                    let n = usize::try_from(stop - at).unwrap_or(usize::MAX).min(want);
                    let from = at - extent.offset;
                    if open.is_none() && !grow.through.contains(&id) {
                        return Err(Stop::Wait(Need::FetchExtent(reference, i)));
                    }
                    let bytes = match open.and_then(|open| open.read(from, n)) {
                        Some(bytes) => bytes,
                        None => {
                            let (object, size) = (extent.object.clone(), extent.len);
                            session.streams.read(&name, id, from, n).map_err(|index| {
                                Stop::Wait(Need::Through(
                                    reference.clone(),
                                    Piece { object, size, index },
                                ))
                            })?
                        }
                    };
                    out.extend(bytes);
                }
                // What the next read needs first is what this one needed last.
                if grow.open.len() > OPEN_EXTENTS {
                    grow.open.clear();
                }
                Ok(out)
            }
            Kind::Published(_) | Kind::Symlink(_) => Err(Plain::BadHandle.into()),
        }
    }
}
