//! What is kept aside for a person: changes that no flush has, of users whose local state was damaged,
//! or obsolete because another session had taken them. It counts for no budget and is never
//! removed by itself; so it is shown.

use super::session::Session;
use super::sync::copy_all;
use crate::cache::disk::{Disk, How};
use crate::cache::metacache::of_file;
use parking_lot::Mutex;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A count is good for so long: a scrape of metrics is no reason to walk through directories.
const GOOD_FOR: Duration = Duration::from_secs(60);
/// As deep as users' directories can be.
const DEEPEST: usize = super::tree::MAX_DEPTH * 2;

/// What lies there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Each is what one session left of one user.
    pub users: u64,
    pub bytes: u64,
}

/// The last count, and when it was made.
#[derive(Debug, Default)]
pub struct Aside(Mutex<Option<(Duration, Kept)>>);

fn bytes_of(disk: &dyn Disk, dir: &Path, depth: usize) -> io::Result<u64> {
    let mut sum = 0;
    for entry in disk.list(dir)? {
        sum += match entry.is_dir {
            true if depth < DEEPEST => bytes_of(disk, &dir.join(&entry.name), depth + 1)?,
            true => 0,
            false => of_file(entry.len),
        };
    }
    Ok(sum)
}

/// Moves a directory to where things are kept, which may be on another file system.
pub(super) fn move_tree(disk: &dyn Disk, from: &Path, to: &Path) -> io::Result<()> {
    match disk.rename(from, to) {
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {
            if let Err(error) = copy_tree(disk, from, to, 0) {
                // Whoever tries again takes another name: half a copy would be left with each.
                let _ = disk.remove_tree(to);
                return Err(error);
            }
            disk.remove_tree(from)
        }
        done => done,
    }
}

fn copy_tree(disk: &dyn Disk, from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    if depth > DEEPEST {
        return Err(io::Error::other("directories lie too deep"));
    }
    disk.create_dirs(to)?;
    for entry in disk.list(from)? {
        let (from, to) = (from.join(&entry.name), to.join(&entry.name));
        if entry.is_dir {
            copy_tree(disk, &from, &to, depth + 1)?;
        } else {
            let copy = disk.open(&to, How::CreateNew)?;
            copy_all(&*disk.open(&from, How::Read)?, &*copy)?;
            copy.sync_data()?;
        }
    }
    disk.sync_dir(to)
}

impl Session {
    /// Where it is kept.
    pub fn aside_dir(&self) -> PathBuf {
        self.settings.state_dir.join("lost")
    }

    pub fn kept_aside(&self) -> Kept {
        let now = self.env.clock.boot();
        let mut last = self.aside.0.lock();
        if let Some((at, kept)) = *last
            && now.saturating_sub(at) < GOOD_FOR
        {
            return kept;
        }
        let dir = self.aside_dir();
        let count = || -> io::Result<Kept> {
            let users = self.disk().list(&dir)?.iter().filter(|entry| entry.is_dir).count();
            Ok(Kept { users: users as u64, bytes: bytes_of(self.disk(), &dir, 0)? })
        };
        let kept = count().unwrap_or_else(|error| {
            tracing::warn!(%error, dir = %dir.display(), "what is kept aside is not counted");
            Kept::default()
        });
        *last = Some((now, kept));
        kept
    }
}
