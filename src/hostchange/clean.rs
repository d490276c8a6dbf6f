//! Listing and removing the list indexes of users that nobody served for long.
//!
//! A user's directory is emptied under the lock on his record, and in an order that a login which
//! finds half of it takes for a change of host: the record is emptied first and removed last.

use super::check::{at, drop_list_index};
use super::lock::Locked;
use super::place::Dir;
use super::record::{Bad, State};
use super::{LASTHOST, Trouble};
use crate::failpoint;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How deep below a root users' directories are looked for.
const DEEPEST: usize = 8;
/// How long a user who is just logging in is waited for.
const PATIENCE: Duration = Duration::from_millis(200);

/// A user's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: PathBuf,
    /// Bytes, as du shows them.
    pub size: u64,
    /// Last use, in seconds since 1970.
    pub accessed: i64,
    pub state: EntryState,
}

/// What its record says, as far as that can be told from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryState {
    /// Kept if nobody else takes the user.
    Settled,
    /// In a session that took the user over.
    Open,
    /// Dropped at the next login, whatever happens.
    Invalid,
}

/// What cleaning did to a user's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cleaned {
    /// Bytes that are free again.
    Removed(u64),
    /// Used so many seconds ago: left alone.
    Used(i64),
    /// Somebody is logging in at this moment.
    Busy,
    Absent,
}

/// Removes the list index of one user unless it was used within `age`. `now`: seconds since 1970.
///
/// # Errors
/// Not a user's directory, or something in it cannot be removed.
pub fn clean(path: &Path, age: Duration, now: i64) -> Result<Cleaned, Trouble> {
    let Some(dir) = Dir::existing(path)? else { return Ok(Cleaned::Absent) };
    let known = dir.look(LASTHOST).map_err(Trouble::io("looking at it", dir.join(LASTHOST)))?;
    if known.is_none() && dir.list_index()?.is_empty() {
        return match dir.names()?.is_empty() {
            true => Ok(Cleaned::Absent),
            false => Err(Trouble::refused(path, "not a user's directory: no .lasthost in it")),
        };
    }
    let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
    // Before it is locked: making a lock file counts as use.
    let entry = look(&dir)?;
    let since = |entry: &Entry| now.saturating_sub(entry.accessed);
    if since(&entry) < age {
        return Ok(Cleaned::Used(since(&entry)));
    }
    let locked = match Locked::new(&dir, PATIENCE) {
        Ok(locked) => locked,
        Err(Trouble::Locked(_)) => return Ok(Cleaned::Busy),
        Err(trouble) => return Err(trouble),
    };
    // Somebody may have come before we had the lock.
    if known.is_some() && age > 0 {
        let entry = look(&dir)?;
        if since(&entry) < age {
            return Ok(Cleaned::Used(since(&entry)));
        }
    }
    locked.invalidate()?;
    at(failpoint::USERCACHE_INVALIDATED, &dir)?;
    drop_list_index(&dir)?;
    at(failpoint::USERCACHE_EMPTIED, &dir)?;
    locked.remove()?;
    at(failpoint::USERCACHE_UNLOCKED, &dir)?;
    remove_empty(path)?;
    Ok(Cleaned::Removed(entry.size))
}

/// The directory itself goes if nothing is in it; a login that comes meanwhile makes it again.
fn remove_empty(path: &Path) -> Result<(), Trouble> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let Some(parent) = Dir::existing(parent)? else { return Ok(()) };
    match parent.remove_dir(name) {
        Err(e)
            if !matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST | libc::ENOENT)) =>
        {
            Err(Trouble::io("removing the directory", path)(e))
        }
        _ => Ok(()),
    }
}

/// All users' directories below a root, those used longest ago first.
///
/// # Errors
/// The root cannot be read. What lies below it and cannot be read is told in the log.
pub fn list(root: &Path) -> Result<Vec<Entry>, Trouble> {
    let mut found = Vec::new();
    if let Some(root) = Dir::existing(root)? {
        root.names()?;
        gather(&root, 0, &mut found);
    }
    found.sort_by(|a, b| (a.accessed, &a.path).cmp(&(b.accessed, &b.path)));
    Ok(found)
}

fn gather(dir: &Dir, depth: usize, found: &mut Vec<Entry>) {
    let names = match dir.names() {
        Ok(names) => names,
        Err(error) => return tracing::warn!(%error, "left out"),
    };
    let is_user = names.iter().any(|n| n == LASTHOST || super::is_list_index(n.as_encoded_bytes()));
    if is_user {
        match look(dir) {
            Ok(entry) => found.push(entry),
            Err(error) => tracing::warn!(%error, "left out"),
        }
    }
    if depth == DEEPEST {
        return;
    }
    for name in names {
        // Files and links are none; what vanished meanwhile is none either.
        if let Ok(below) = dir.below(&name) {
            gather(&below, depth + 1, found);
        }
    }
}

fn look(dir: &Dir) -> Result<Entry, Trouble> {
    let mut entry =
        Entry { path: dir.path().to_owned(), size: 0, accessed: 0, state: EntryState::Invalid };
    let mut names = dir.list_index()?;
    names.push(LASTHOST.into());
    for name in names {
        let looked = dir.look(&name).map_err(Trouble::io("looking at it", dir.join(&name)))?;
        let Some(stat) = looked else { continue };
        entry.size += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        // Reading a list index does not always change its access time; a login sets the record's.
        let used = if name == LASTHOST { stat.st_atime.max(stat.st_mtime) } else { stat.st_mtime };
        entry.accessed = entry.accessed.max(used);
    }
    entry.state = match super::lock::peek(dir) {
        Ok(record) if record.state == State::Settled => EntryState::Settled,
        Ok(_) => EntryState::Open,
        Err(Bad::Empty | Bad::Damaged | Bad::Version) => EntryState::Invalid,
    };
    Ok(entry)
}

/// What [`clean_all`] did.
#[derive(Debug, Default)]
pub struct Swept {
    pub removed: u64,
    pub freed: u64,
    pub kept: u64,
    /// Bytes that are still in use.
    pub left: u64,
    pub failed: Vec<Trouble>,
}

/// Removes what was not used within `age`, and, those used longest ago first, more until all
/// together are within `budget` bytes. `in_use` tells who must be left alone in any case.
///
/// # Errors
/// The root cannot be read.
pub fn clean_all(
    root: &Path,
    age: Option<Duration>,
    budget: Option<u64>,
    now: i64,
    in_use: &dyn Fn(&Path) -> bool,
) -> Result<Swept, Trouble> {
    let entries = list(root)?;
    let mut swept = Swept { left: entries.iter().map(|e| e.size).sum(), ..Swept::default() };
    let old_enough = |entry: &Entry, age: Duration, swept: &mut Swept| {
        if in_use(&entry.path) {
            swept.kept += 1;
            return;
        }
        match clean(&entry.path, age, now) {
            Ok(Cleaned::Removed(bytes)) => {
                swept.removed += 1;
                swept.freed += bytes;
                swept.left = swept.left.saturating_sub(bytes);
            }
            Ok(Cleaned::Absent) => swept.left = swept.left.saturating_sub(entry.size),
            Ok(Cleaned::Used(_) | Cleaned::Busy) => swept.kept += 1,
            Err(trouble) => swept.failed.push(trouble),
        }
    };
    for entry in &entries {
        let too_old = age.is_some_and(|age| {
            now.saturating_sub(entry.accessed) >= i64::try_from(age.as_secs()).unwrap_or(i64::MAX)
        });
        if budget.is_some_and(|budget| swept.left > budget) {
            old_enough(entry, Duration::ZERO, &mut swept);
        } else if too_old {
            old_enough(entry, age.unwrap_or_default(), &mut swept);
        } else {
            swept.kept += 1;
        }
    }
    Ok(swept)
}

#[cfg(test)]
mod tests;
