//! Putting local files and the journal on the disk.
//!
//! A sync of a local file that failed is not simply made again: the kernel may have marked the pages
//! as clean, says success to the next sync, and reads from the disk what was there before as soon
//! as it forgets them. So the file is *spoilt*: what it still shows is copied into a new file at once,
//! and that is synced and put in its place. If this succeeds the caller hears nothing of it. If it
//! does not, the call fails (EAGAIN, or ENOSPC from a full disk), the file stays spoilt, and
//! the next sync of it begins with the copy again. No sync that was answered depends on bytes whose
//! sync failed.

use super::error::{Error, Result};
use super::journal::SyncPoint;
use super::need::NodeRef;
use super::node::{Kind, Local, Name};
use super::publish::blocking;
use super::session::{Session, UserCell};
use super::user::User;
use crate::cache::disk::{Disk, DiskFile, How};
use crate::fs::api::Ino;
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// Copies that are made while somebody keeps writing.
const TRIES: usize = 5;
const PIECE: usize = 128 << 10;

/// Puts a local file and the journal on disk.
pub async fn sync_local(node: &NodeRef) -> Result<()> {
    // Of two syncs at a time one would be told of a failure, and the other of success.
    let _one = node.cell.one_at_a_time(node.ino).await;
    let (file, writes, spoilt, point) = node.cell.open_user(|user| {
        let point = user.sync_point()?;
        let file = user.local_file(node.ix)?;
        let local = local(user, node)?;
        Ok((file, local.writes, local.spoilt, point))
    })?;
    // At once: a disk takes two syncs in the time of one. Neither needs the other to be first, as
    // what is not synced reaches the disk in any order.
    let (writes, names) = tokio::join!(sync_bytes(node, file, writes, spoilt), sync_names(point));
    let writes = writes?;
    names?;
    node.cell.if_open(|user| {
        if let Ok(local) = local(user, node) {
            local.synced = local.synced.max(writes);
        }
    });
    Ok(())
}

/// What a file shows is on the disk afterwards. Gives the writes that it holds.
async fn sync_bytes(
    node: &NodeRef,
    file: Arc<dyn DiskFile>,
    writes: u64,
    spoilt: bool,
) -> Result<u64> {
    if spoilt {
        // Also each young file after a death of ours: nobody knows what the dead one was told.
        return write_anew(node).await;
    }
    let Err(error) = blocking(move || file.sync_data()).await? else { return Ok(writes) };
    node.cell.open_user(|user| {
        local(user, node)?.spoilt = true;
        Ok(())
    })?;
    tracing::error!(user = %node.cell.name, %error, "a file cannot be synced; it is written anew");
    write_anew(node).await
}

async fn sync_names(point: Option<SyncPoint>) -> Result<()> {
    match point {
        Some(point) => blocking(move || point.sync()).await?,
        None => Ok(()),
    }
}

/// Puts the journal on disk.
pub async fn sync_user(cell: &Arc<UserCell>) -> Result<()> {
    sync_names(cell.open_user(|user| user.sync_point())?).await
}

/// Users whose journal is to be on the disk soon, without anybody waiting for it.
#[derive(Debug, Default)]
pub struct Later {
    cells: Mutex<Vec<Weak<UserCell>>>,
    /// Somebody goes through them.
    busy: AtomicBool,
}

/// Puts the journal on disk at the scheduler's next tick, with all that is written until then.
pub(super) fn later(cell: &Arc<UserCell>) {
    if !cell.sync_later.swap(true, Ordering::AcqRel) {
        cell.session.sync_later.cells.lock().push(Arc::downgrade(cell));
    }
}

/// Does it for those that wait, one after another.
pub(super) fn sync_those_due(session: &Arc<Session>) {
    let later = &session.sync_later;
    if later.cells.lock().is_empty() || later.busy.swap(true, Ordering::AcqRel) {
        return;
    }
    let session = session.clone();
    tokio::spawn(async move {
        let due = std::mem::take(&mut *session.sync_later.cells.lock());
        for cell in due.iter().filter_map(Weak::upgrade) {
            // First: what is written from here on may miss this sync.
            cell.sync_later.store(false, Ordering::Release);
            let point = cell.if_open(|user| user.sync_point());
            let done = match point.unwrap_or(Ok(None)) {
                Ok(Some(point)) => blocking(move || point.sync()).await.and_then(|done| done),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                tracing::warn!(user = %cell.name, %error, "the journal is not on the disk yet");
                self::later(&cell);
            }
        }
        session.sync_later.busy.store(false, Ordering::Release);
    });
}

fn local<'u>(user: &'u mut User, node: &NodeRef) -> Result<&'u mut Local> {
    match user.tree.nodes.get_mut(node.ix) {
        Some(found) if found.ino == node.ino => match &mut found.kind {
            Kind::Local(local) => Ok(local),
            _ => Err(Error::Internal("not a local file".into())),
        },
        _ => Err(Error::Lost { user: node.cell.name.to_string() }),
    }
}

/// Everything that a file shows is on the disk, under its names. Gives the writes that it holds.
async fn write_anew(node: &NodeRef) -> Result<u64> {
    let disk = node.cell.session.env.disk.clone();
    for _ in 0..TRIES {
        let (from, writes, paths) = node.cell.open_user(|user| {
            let file = user.local_file(node.ix)?;
            Ok((file, local(user, node)?.writes, user.local_paths(node)?))
        })?;
        let Some(first) = paths.first().cloned() else {
            // Without a name it is lost with its last descriptor.
            return Ok(writes);
        };
        let (on, beside, ino) = (disk.clone(), first.clone(), node.ino);
        let made = blocking(move || copy_synced(&*on, &*from, &beside, ino)).await?;
        let (copy, temp) = made.map_err(|e| failed(&first, &e))?;
        let put = node.cell.if_open(|user| user.put_copy(node, &temp, copy, writes, &paths));
        let put = put.unwrap_or(Ok(false));
        match put {
            Ok(true) => {
                let (on, dirs) = (disk.clone(), paths);
                let dirs = move || {
                    dirs.iter()
                        .filter_map(|path| path.parent())
                        .try_for_each(|dir| on.sync_dir(dir))
                };
                blocking(dirs).await?.map_err(|e| failed(&first, &e))?;
                node.cell.open_user(|user| {
                    local(user, node)?.spoilt = false;
                    Ok(())
                })?;
                return Ok(writes);
            }
            put => {
                let _ = disk.remove_file(&temp);
                put.map_err(|e| failed(&first, &e))?;
            }
        }
    }
    Err(Error::Crowded(format!(
        "user {}: a file changes faster than it can be synced",
        node.cell.name
    )))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::disk(format!("sync of {}", path.display()), error)
}

/// A synced copy beside a file, and its name, which no other file has: any may be a mail server's.
fn copy_synced(
    disk: &dyn Disk,
    from: &dyn DiskFile,
    beside: &Path,
    ino: Ino,
) -> io::Result<(Arc<dyn DiskFile>, PathBuf)> {
    let mut n = 0;
    let (copy, temp) = loop {
        let temp = beside.with_file_name(format!(".new.i{ino}.{n}"));
        match disk.open(&temp, How::CreateNew) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => n += 1,
            copy => break (copy?, temp),
        }
    };
    let copied = copy_all(from, &*copy).and_then(|()| copy.sync_data());
    if let Err(error) = copied {
        // It is named nowhere.
        let _ = disk.remove_file(&temp);
        return Err(error);
    }
    Ok((copy, temp))
}

pub(super) fn copy_all(from: &dyn DiskFile, to: &dyn DiskFile) -> io::Result<()> {
    let mut buf = vec![0; PIECE];
    let mut at = 0;
    loop {
        let n = from.read_at(&mut buf, at)?;
        if n == 0 {
            return Ok(());
        }
        to.write_all_at(&buf[..n], at)?;
        at += n as u64;
    }
}

impl User {
    /// Where a local file lies, under each of its names.
    fn local_paths(&self, node: &NodeRef) -> Result<Vec<PathBuf>> {
        let found = self.node(node.ix)?;
        let names = found.names.all();
        if found.nlink as usize != names.len() {
            let what =
                "a file cannot be written anew while a name of it is in another folder".into();
            return Err(Error::Deferred { what });
        }
        let path = |name: &Name| Some(self.file_path(name.at, self.tree.name_bytes(*name)?));
        Ok(names.iter().filter_map(path).collect())
    }

    /// Puts a copy in the place of a file, unless that was written or renamed since.
    fn put_copy(
        &mut self,
        node: &NodeRef,
        temp: &Path,
        copy: Arc<dyn DiskFile>,
        writes: u64,
        paths: &[PathBuf],
    ) -> io::Result<bool> {
        let same = self.local_paths(node).is_ok_and(|now| now == paths);
        let disk = self.session.env.disk.clone();
        let (Ok(local), Some((first, others)), true) =
            (local(self, node), paths.split_first(), same)
        else {
            return Ok(false);
        };
        if local.writes != writes {
            return Ok(false);
        }
        disk.rename(temp, first)?;
        if local.file.is_some() {
            local.file = Some(copy);
        }
        for other in others {
            disk.hard_link(first, temp)?;
            disk.rename(temp, other)?;
        }
        Ok(true)
    }
}
