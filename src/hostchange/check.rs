//! What happens at a login, and when a session ends.
//!
//! **At a login**, under the lock on the local record: if the file on NFS is still the one that the
//! record describes, nobody else was here and the list index is kept. Else, in this order:
//!
//! 1. the record is emptied: whatever happens from here on, the next login starts over;
//! 2. the local list index is removed;
//! 3. a new `.lasthost` is written on NFS under a name of our own, and looked at: its inode and
//!    mtime are what is recorded, for what lies there after the rename may be a rival's;
//! 4. the record is written;
//! 5. the new file is renamed into its place: other hosts notice from now on.
//!
//! A death before 4 leaves no record, one before 5 a record that describes no file in place.
//! The file is written anew also where it has our name but is not the recorded one: two hosts that
//! were given the same name by mistake, or one that lost its `/dev/shm`, are still noticed by all
//! others.
//!
//! **Two hosts at the same moment.** The one whose rename came first finds another's file next time.
//! But the other, whose file stays, took the user while the first still served him, and may have
//! looked at folders before the first was done with them. So a takeover is only [`State::Open`]: what
//! is built in that session is not kept for the next. A mount knows when a session ends, and then
//! settles it, or, finding a rival's file, writes one that the rival will notice in turn. A login
//! script does not know; there the first login that comes long enough after settles it. Neither touches
//! the file on NFS: a rival's may be there by then, and has to stay visible.

use super::lock::Locked;
use super::place::{Dir, Missing};
use super::record::{self, Bad, Record, Stamp, State};
use super::{LASTHOST, Trouble, migrate};
use crate::failpoint::{self, hit};
use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, fstat};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// Clocks of servers may differ by this many seconds. Dovecot asks for one on NFS.
const CLOCKS: i64 = 5;

/// This machine, as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub name: String,
    /// Differs after each boot.
    pub boot: String,
}

impl Host {
    /// # Errors
    /// The name cannot stand in the file, or the system does not tell it.
    pub fn new(name: Option<String>) -> Result<Host, String> {
        let name = match name {
            Some(name) => name,
            None => nix::unistd::gethostname()
                .map_err(|e| format!("this host's name: {e}"))?
                .to_string_lossy()
                .into_owned(),
        };
        if record::host_of(name.as_bytes()) != Some(&name) {
            return Err(format!("`{name}` is no name of a host"));
        }
        let file = "/proc/sys/kernel/random/boot_id";
        let boot = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
        Ok(Host { name, boot: boot.trim().to_owned() })
    }
}

/// When what was built since a takeover may be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settle {
    /// After a login that comes so long after the takeover.
    Later(Duration),
    /// When [`ended`] says so.
    AtEnd,
}

#[derive(Debug, Clone)]
pub struct Rules {
    /// How long the lock on the record is waited for.
    pub patience: Duration,
    /// Look for a list index on NFS.
    pub migration: bool,
    pub settle: Settle,
}

/// Why a list index was dropped.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    #[error("the user is new on this host")]
    New,
    #[error("the local .lasthost says nothing: {0}")]
    Bad(Bad),
    #[error("the user was on another host: {}", .0.as_deref().unwrap_or("an unknown one"))]
    Elsewhere(Option<String>),
    #[error("this host was booted since")]
    Booted,
    #[error("the last session may have overlapped with one on another host")]
    Unsettled,
    #[error("the INDEX directory's .lasthost cannot be read: {0}")]
    Unreadable(io::Error),
    #[error("a host without this mode served the user; its list index {}", if *.0 { "was taken over" } else { "was removed" })]
    Migrated(bool),
}

/// Whether other hosts will notice that we were here.
#[derive(Debug)]
pub enum Told {
    Written,
    /// The file could not be written, so it was removed, which they notice, too.
    Removed(Trouble),
    Not(Trouble),
}

/// What a login found.
#[derive(Debug)]
pub enum Outcome {
    /// The list index is as this host left it.
    Kept,
    /// It is gone (or taken over from NFS), and Dovecot builds it again.
    Dropped { why: Why, told: Told },
}

/// What the end of a session found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nobody else was here.
    Kept,
    /// Somebody came when we were done.
    Left,
    /// Somebody came while we were not; neither's list index will be kept.
    Contested,
}

/// The check at a login. `now` is in seconds since 1970.
///
/// # Errors
/// The local list index could not be made safe: it must not be used.
pub fn login(
    index: &Dir,
    local: &Dir,
    host: &Host,
    rules: &Rules,
    now: i64,
) -> Result<Outcome, Trouble> {
    // Root acts as the owner of the INDEX directory, to whom the local directory belongs, too.
    let _as_owner = index.owner()?.act();
    let locked = Locked::new(local, rules.patience)?;
    at(failpoint::HOSTCHANGE_LOCKED, local)?;
    let migrated = if rules.migration { migrate::take_over(index, &locked)? } else { None };
    let remembered = locked.read();
    let seen = look(index);
    let stamp_there = seen.as_ref().ok().and_then(|seen| seen.as_ref()).map(|seen| seen.stamp);
    let why = match (migrated, &remembered, seen) {
        (Some(copied), ..) => Why::Migrated(copied),
        (None, _, Err(error)) => Why::Unreadable(error),
        (None, Err(Bad::Empty), _) => Why::New,
        (None, Err(bad), _) => Why::Bad(*bad),
        (None, Ok(record), Ok(seen)) => {
            if seen.as_ref().map(|seen| seen.stamp) != Some(record.stamp) {
                Why::Elsewhere(seen.and_then(|seen| seen.host()))
            } else if record.boot != host.boot {
                Why::Booted
            } else if let State::Open(_) = record.state {
                Why::Unsettled
            } else {
                locked.touch()?;
                return Ok(Outcome::Kept);
            }
        }
    };
    let state = match (&why, remembered, rules.settle) {
        (Why::Unsettled, Ok(Record { state: State::Open(since), .. }), Settle::Later(after)) => {
            let after = i64::try_from(after.as_secs()).unwrap_or(i64::MAX);
            // A clock that was ahead must not keep it open for ever.
            let since = since.min(now);
            if now.saturating_sub(since) >= after { State::Settled } else { State::Open(since) }
        }
        _ => State::Open(now),
    };
    locked.invalidate()?;
    at(failpoint::HOSTCHANGE_INVALIDATED, local)?;
    if migrated != Some(true) {
        drop_list_index(local)?;
    }
    at(failpoint::HOSTCHANGE_DROPPED, local)?;
    let told = match (&why, stamp_there) {
        // It is ours already. To write it anew could hide a rival's that came this moment.
        (Why::Unsettled | Why::Booted, Some(stamp)) => {
            locked.write(&Record { stamp, boot: host.boot.clone(), state })?;
            at(failpoint::HOSTCHANGE_SETTLING, local)?;
            Told::Written
        }
        _ => tell(index, Some((&locked, state)), host)?,
    };
    locked.touch()?;
    Ok(Outcome::Dropped { why, told })
}

/// Opens a user's directory for the list index, making it if need be, and makes the check.
///
/// # Errors
/// As [`login`], or the directory is not the user's own.
pub fn enter(
    index: &Dir,
    local: &Path,
    host: &Host,
    rules: &Rules,
    now: i64,
) -> Result<(Dir, Outcome), Trouble> {
    let mut tries = 0;
    loop {
        let Some(dir) = Dir::own(local, index.owner()?, Missing::Make)? else {
            return Err(Trouble::refused(local, "cannot be made"));
        };
        tries += 1;
        match login(index, &dir, host, rules, now) {
            // It was cleaned away between the two.
            Err(trouble) if trouble.errno() == Some(libc::ENOENT) && tries < 10 => {}
            result => return result.map(|outcome| (dir, outcome)),
        }
    }
}

/// The check at the end of a session, whose last access was at `last` (seconds since 1970).
///
/// # Errors
/// It is not known what came of it; the next login finds out.
pub fn ended(
    index: &Dir,
    local: &Dir,
    host: &Host,
    rules: &Rules,
    last: i64,
) -> Result<Ended, Trouble> {
    let _as_owner = index.owner()?.act();
    let locked = Locked::new(local, rules.patience)?;
    let (remembered, seen) = (locked.read(), look(index));
    match (remembered, seen) {
        (Ok(record), Ok(Some(seen))) if record.stamp == seen.stamp && record.boot == host.boot => {
            if record.state != State::Settled {
                at(failpoint::HOSTCHANGE_SETTLING, local)?;
                locked.write(&Record { state: State::Settled, ..record })?;
                locked.touch()?;
            }
            Ok(Ended::Kept)
        }
        // The next login here drops what there is.
        (_, Ok(Some(seen))) if seen.stamp.secs > last.saturating_add(CLOCKS) => Ok(Ended::Left),
        _ => {
            locked.invalidate()?;
            at(failpoint::HOSTCHANGE_INVALIDATED, local)?;
            drop_list_index(local)?;
            match tell(index, None, host)? {
                Told::Written | Told::Removed(_) => Ok(Ended::Contested),
                Told::Not(trouble) => Err(trouble),
            }
        }
    }
}

/// Makes sure that nothing in a user's directory is believed, for one who has no INDEX directory.
///
/// # Errors
/// Something is still there.
pub fn forget(local: &Path, patience: Duration) -> Result<(), Trouble> {
    let Some(dir) = Dir::existing(local)? else { return Ok(()) };
    let locked = Locked::new(&dir, patience)?;
    locked.invalidate()?;
    drop_list_index(&dir)
}

/// Removes a user's local list index.
///
/// # Errors
/// Some of it is still there.
pub fn drop_list_index(local: &Dir) -> Result<(), Trouble> {
    for name in local.list_index()? {
        at(failpoint::HOSTCHANGE_DROPPING, local)?;
        local.remove(&name).map_err(Trouble::io("removing it", local.join(&name)))?;
    }
    Ok(())
}

/// Passes a failpoint.
pub(super) fn at(point: failpoint::Point, dir: &Dir) -> Result<(), Trouble> {
    hit(point).map_err(Trouble::io("using it", dir.path()))
}

/// An `INDEX/.lasthost` as it was found.
pub(super) struct Seen {
    file: File,
    stamp: Stamp,
}

impl Seen {
    fn host(&self) -> Option<String> {
        let mut bytes = Vec::new();
        // It decides nothing: the log says that the host is unknown.
        (&self.file).take(300).read_to_end(&mut bytes).ok()?;
        record::host_of(&bytes).map(str::to_owned)
    }
}

/// What is there. It is opened, not only looked at: an NFS client may answer `stat` from memory for a
/// minute, and asks the server at each open.
pub(super) fn look(index: &Dir) -> io::Result<Option<Seen>> {
    let file = match index.open(LASTHOST, OFlag::O_RDONLY) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let (stamp, links) = stamp(&file)?;
    // Replaced, and only this client does not know yet.
    Ok((links > 0).then_some(Seen { file, stamp }))
}

fn stamp(file: impl AsFd) -> io::Result<(Stamp, u64)> {
    let stat = fstat(file)?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
        return Err(io::Error::other("not a file"));
    }
    let nanos = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    #[allow(clippy::unnecessary_cast)]
    Ok((Stamp { inode: stat.st_ino, secs: stat.st_mtime, nanos }, stat.st_nlink as u64))
}

/// Lets other hosts know that we have the user; with a record, also this one.
fn tell(index: &Dir, record: Option<(&Locked<'_>, State)>, host: &Host) -> Result<Told, Trouble> {
    let failed = match write_ours(index, record, host) {
        Ok(()) => return Ok(Told::Written),
        Err(trouble) => trouble,
    };
    if let Some((locked, _)) = record {
        locked.invalidate()?;
    }
    match index.remove(LASTHOST) {
        Ok(()) => Ok(Told::Removed(failed)),
        Err(error) => {
            tracing::debug!(%error, path = %index.join(LASTHOST).display(), "cannot remove it either");
            Ok(Told::Not(failed))
        }
    }
}

fn write_ours(
    index: &Dir,
    record: Option<(&Locked<'_>, State)>,
    host: &Host,
) -> Result<(), Trouble> {
    let name = format!("{LASTHOST}.tmp.{}", record::escaped(&host.name));
    let path = index.join(&name);
    // Left by one that died; a new inode is wanted.
    index.remove(&name).map_err(Trouble::io("removing it", &path))?;
    let made = new_file(index, &name, host).map_err(Trouble::io("writing it", &path))?;
    at(failpoint::HOSTCHANGE_WRITTEN, index)?;
    if let Some((locked, state)) = record {
        locked.write(&Record { stamp: made, boot: host.boot.clone(), state })?;
    }
    at(failpoint::HOSTCHANGE_RECORDED, index)?;
    index.rename(&name, LASTHOST).map_err(Trouble::io("renaming it to .lasthost", &path))?;
    at(failpoint::HOSTCHANGE_RENAMED, index)
}

fn new_file(index: &Dir, name: &str, host: &Host) -> io::Result<Stamp> {
    let mut file = index.open(name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
    file.write_all(format!("{}\n", host.name).as_bytes())?;
    file.sync_all()?;
    let (written, _) = stamp(&file)?;
    drop(file);
    // Opened again, so that the mtime is the server's.
    let (found, _) = stamp(index.open(name, OFlag::O_RDONLY)?)?;
    match found.inode == written.inode {
        true => Ok(found),
        false => Err(io::Error::other("another process of this host's name has replaced it")),
    }
}

#[cfg(test)]
mod tests;
