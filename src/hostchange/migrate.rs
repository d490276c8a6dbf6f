//! Taking over a list index that lies on NFS, where a host without this mode keeps it.
//!
//! Its log there says that such a host served the user after us: our own list index is old. Theirs
//! is copied if no host of this mode has taken the user before (there is no `INDEX/.lasthost`), for
//! only then is it known to be newer than anything such a host did. Then it is removed from NFS:
//! `dovecot.list.index` first, its log last. So a death in between leaves the log, which makes the
//! next login come here again, without the file that makes it copy: it removes the rest.

use super::check::{at, drop_list_index, look};
use super::lock::Locked;
use super::place::Dir;
use super::{LIST_INDEX, Trouble};
use crate::failpoint::{self, hit};
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, SFlag};
use std::ffi::OsString;
use std::io;

/// What of it is worth copying; the rest is locks and temporary files.
const COPIED: &[&str] =
    &["dovecot.list.index", "dovecot.list.index.log", "dovecot.list.index.log.2"];
const LOG: &str = "dovecot.list.index.log";
/// A list index is some kilobytes; nothing of this size is one.
const LARGEST: i64 = 256 << 20;

/// `None`: there was none. Else whether it was taken over.
///
/// # Errors
/// What is here could not be made safe.
pub fn take_over(index: &Dir, locked: &Locked<'_>) -> Result<Option<bool>, Trouble> {
    let local = locked.dir();
    match index.look(LOG) {
        Ok(Some(_)) => {}
        Ok(None) => return Ok(None),
        Err(error) => {
            // The check itself will meet the same and drop what is here.
            tracing::warn!(%error, path = %index.join(LOG).display(), "cannot look for a list index on NFS");
            return Ok(None);
        }
    }
    locked.invalidate()?;
    drop_list_index(local)?;
    let copied = match copy(index, local) {
        Ok(copied) => copied,
        Err(error) => {
            tracing::warn!(%error, path = %index.path().display(), "the list index on NFS is not taken over");
            false
        }
    };
    if !copied {
        drop_list_index(local)?;
    }
    at(failpoint::MIGRATE_COPIED, local)?;
    if let Err(error) = remove(index) {
        tracing::warn!(%error, "the list index on NFS cannot be removed; this is tried again at each login");
        // Somebody may still use it, so a copy would be of no use for long.
        drop_list_index(local)?;
        return Ok(Some(false));
    }
    Ok(Some(copied))
}

fn copy(index: &Dir, local: &Dir) -> io::Result<bool> {
    if look(index)?.is_some() || index.look(LIST_INDEX)?.is_none() {
        return Ok(false);
    }
    let before = sources(index)?;
    for (name, stat) in &before {
        let regular = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
        if !regular || stat.st_size > LARGEST {
            return Err(io::Error::other(format!("{name}: no file of a list index")));
        }
        let mut from = index.open(name, OFlag::O_RDONLY)?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
        let mut to = local.open(name, flags)?;
        io::copy(&mut from, &mut to)?;
        hit(failpoint::MIGRATE_COPYING)?;
    }
    let same = |(a, b): (&(&str, FileStat), &(&str, FileStat))| {
        let id = |s: &FileStat| (s.st_ino, s.st_size, s.st_mtime, s.st_mtime_nsec);
        a.0 == b.0 && id(&a.1) == id(&b.1)
    };
    let after = sources(index)?;
    // Somebody wrote while it was copied: what we have may be half of each.
    Ok(before.len() == after.len() && before.iter().zip(&after).all(same))
}

fn sources(index: &Dir) -> io::Result<Vec<(&'static str, FileStat)>> {
    let mut found = Vec::new();
    for name in COPIED {
        if let Some(stat) = index.look(name)? {
            found.push((*name, stat));
        }
    }
    Ok(found)
}

fn remove(index: &Dir) -> Result<(), Trouble> {
    let mut names = index.list_index()?;
    // `dovecot.list.index` sorts before all others; the log goes last.
    names.retain(|name| name != LOG);
    names.push(OsString::from(LOG));
    for name in names {
        at(failpoint::MIGRATE_REMOVING, index)?;
        index.remove(&name).map_err(Trouble::io("removing it", index.join(&name)))?;
    }
    Ok(())
}
