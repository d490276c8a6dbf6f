//! fscache: local copies of mail objects, bounded in bytes.
//!
//! **Layout**: `<dir>/<hh>/<user>/<object id>`, each file the exact bytes of one object;
//! `<dir>/.part/<number>` while they arrive. Nothing else: the books ([`books`], also what is kept and what
//! goes) are made anew from the directory at each start, so no crash can make them wrong, and anything may
//! be removed by hand at any time (I7): a file that is gone is fetched again, a file that is open stays readable, a
//! directory that is gone is made anew. What such a removal frees is noticed when the copy is next asked
//! for or evicted, or by [`Fscache::rescan`]; until then the books count too much, never too little.
//!
//! A copy of which this session does not know that it is what was published (it is of an earlier one, or
//! was written to by hand) counts as a miss until its checksum was looked at: [`Fscache::doubtful`].
//!
//! **The bound** holds as `du` sees it, because space is reserved before the first byte and directories
//! are counted. A file that is unlinked while somebody reads it counts until it is closed. What does not fit,
//! and everything while the disk fails, is *streamed* (`vmail::stream`): a full cache never fails a read, and a publish
//! needs none of it.
//!
//! **Several** fscaches, each with its own bound and disk, share the users by Dovecot's hash (`%4Nu`), so that one
//! user's rush fills one of them, and one disk's failure takes one out of service ([`trouble`]).

mod books;
mod care;
mod dirs;
mod file;
#[cfg(test)]
mod tests;
mod trouble;
mod volume;

pub use books::{Arrival, Shares};
pub use care::{Cleaned, Rescanned};
pub use file::{Cached, Reservation};

use super::disk::{Disk, DiskFile};
use crate::dovecot::template::place_of;
use crate::format::ObjectId;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use volume::Volume;

/// Where an fscache is, and how large it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    pub max: u64,
}

/// Numbers for people, of one fscache since its mount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FscacheUsage {
    pub path: PathBuf,
    /// Bytes that are present, reserved, or open without a name; directories included.
    pub used: u64,
    pub max: u64,
    pub files: u64,
    /// Opens that found their copy, and such as did not.
    pub hits: u64,
    pub misses: u64,
    /// Bytes read from the store for want of room.
    pub streamed: u64,
    pub evictions: u64,
    /// Bytes that were evicted.
    pub evicted: u64,
    /// Bytes of copies that are open.
    pub pinned: u64,
    /// Bytes set aside for copies that are on their way.
    pub reserved: u64,
    pub segments: Shares,
    /// Its disk fails: everything is streamed.
    pub failing: bool,
}

/// What became of a file that was to be taken over.
#[derive(Debug)]
pub enum Taken {
    Kept(Arc<Cached>),
    /// It lies on another file system and must be copied into the room that is there for it.
    Elsewhere(Reservation),
    NoRoom,
}

/// All fscaches of a mount.
#[derive(Debug)]
pub struct Fscache {
    volumes: Vec<Arc<Volume>>,
}

impl Fscache {
    /// Opens the directories, removes unfinished downloads and counts what is there; what exceeds
    /// the bound is removed. With several, one that cannot be opened is left out.
    pub fn open(disk: &Arc<dyn Disk>, places: &[Place]) -> io::Result<Arc<Fscache>> {
        let count = places.len() as u64;
        let mut volumes = Vec::new();
        for (index, place) in (0..).zip(places) {
            let opened = Volume::open(disk.clone(), place).and_then(|volume| {
                let volume = Arc::new(volume);
                volume.load(&|user| place_of(user, count) == index)?;
                Ok(volume)
            });
            volumes.push(match opened {
                Err(error) if count > 1 => {
                    tracing::error!(%error, "fscache {} cannot be used; its mails are streamed", place.path.display());
                    Arc::new(Volume::dead(disk.clone(), place))
                }
                opened => opened?,
            });
        }
        match volumes.is_empty() {
            true => Err(io::Error::new(io::ErrorKind::InvalidInput, "no fscache is given")),
            false => Ok(Arc::new(Fscache { volumes })),
        }
    }

    fn of(&self, user: &str) -> &Arc<Volume> {
        let index = place_of(user, self.volumes.len() as u64);
        let index = usize::try_from(index).unwrap_or(0);
        // There is at least one, and the index is below their number.
        self.volumes.get(index).unwrap_or(&self.volumes[0])
    }

    /// The cached copy, if there is a whole one that is known to be right.
    pub fn get(&self, user: &Arc<str>, id: ObjectId, size: u64) -> Option<Arc<Cached>> {
        let volume = self.of(user);
        let hit = volume.get(&(user.clone(), id), size);
        volume.hits.fetch_add(u64::from(hit.is_some()), Ordering::Relaxed);
        hit
    }

    /// Whether [`Fscache::get`] would give a copy, which is not opened but counts as used.
    pub fn use_unopened(&self, user: &Arc<str>, id: ObjectId, size: u64) -> bool {
        let volume = self.of(user);
        let hit = volume.has(&(user.clone(), id), size);
        volume.hits.fetch_add(u64::from(hit), Ordering::Relaxed);
        hit
    }

    /// The copy of an object whose use is counted already.
    pub fn reopen(&self, user: &Arc<str>, id: ObjectId, size: u64) -> Option<Arc<Cached>> {
        self.of(user).get(&(user.clone(), id), size)
    }

    /// Whether there is a copy, right or not.
    pub fn holds(&self, user: &Arc<str>, id: ObjectId) -> bool {
        self.of(user).books.lock().known(&(user.clone(), id)).is_some()
    }

    /// How many bytes a reader may have before it. More would go again before they are read, once
    /// the cache is full.
    pub fn room_ahead(&self, user: &str) -> u64 {
        self.of(user).books.lock().room_ahead()
    }

    /// Somebody needs an object that is not here.
    pub fn missed(&self, user: &str) {
        self.of(user).misses.fetch_add(1, Ordering::Relaxed);
    }

    /// So many bytes of it were streamed.
    pub fn streamed(&self, user: &str, bytes: u64) {
        self.of(user).streamed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The file of a copy that may or may not be right. It is read to its end, and then
    /// [`Fscache::vouch`]ed for or removed.
    pub fn doubtful(&self, user: &Arc<str>, id: ObjectId) -> Option<Arc<dyn DiskFile>> {
        self.of(user).doubtful(&(user.clone(), id))
    }

    /// The copy whose file had this stamp before it was read is right.
    pub fn vouch(
        &self,
        user: &Arc<str>,
        id: ObjectId,
        size: u64,
        stamp: (u64, i64, i64),
    ) -> Option<Arc<Cached>> {
        self.of(user).vouch(&(user.clone(), id), size, stamp)
    }

    /// Room for a copy and the path to write it to; `None` when it must be streamed.
    pub fn reserve(
        &self,
        user: &Arc<str>,
        id: ObjectId,
        size: u64,
        arrival: Arrival,
    ) -> Option<Reservation> {
        self.of(user).reserve((user.clone(), id), size, arrival)
    }

    /// The file at the reservation's path is the object's whole, verified content.
    pub fn commit(&self, room: Reservation) -> io::Result<Arc<Cached>> {
        room.volume.commit(&room)
    }

    /// Takes over a file outside the cache (a staged mail) as the object's copy.
    pub fn take_over(
        &self,
        path: &Path,
        user: &Arc<str>,
        id: ObjectId,
        size: u64,
    ) -> io::Result<Taken> {
        match self.reserve(user, id, size, Arrival::Delivered) {
            Some(room) => room.volume.clone().take_over(path, room),
            None => Ok(Taken::NoRoom),
        }
    }

    /// The object is not needed any more, or its copy is not what it should be.
    pub fn remove(&self, user: &Arc<str>, id: ObjectId) {
        self.of(user).remove(&(user.clone(), id));
    }

    // ---- for administrators

    /// Of each fscache, in the order of the configuration.
    pub fn usage(&self) -> Vec<FscacheUsage> {
        self.volumes.iter().map(|volume| volume.usage()).collect()
    }

    /// Counts anew what is there, while everything goes on. `path`: only the fscache at, or around, this
    /// directory. `oldest`: files last written before this time (seconds since 1970) are removed.
    ///
    /// # Errors
    /// No fscache is there, or its disk cannot be read.
    pub fn rescan(&self, path: Option<&Path>, oldest: Option<i64>) -> io::Result<Vec<Rescanned>> {
        let wanted = |volume: &&Arc<Volume>| match path {
            Some(path) => path.starts_with(&volume.dir),
            None => !volume.dead,
        };
        let chosen: Vec<_> = self.volumes.iter().filter(wanted).collect();
        if chosen.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no fscache is there"));
        }
        chosen.into_iter().map(|volume| volume.rescan(oldest)).collect()
    }

    /// Removes all copies. Those that are open stay readable, and count until they are closed.
    pub fn clean(&self) -> Vec<Cleaned> {
        self.volumes.iter().map(|volume| volume.clean()).collect()
    }
}
