//! The journal of a user on the local disk.
//!
//! A record is written before what it says is answered, so that the death of this process
//! loses nothing; it is synced before an fsync of anything of the user is answered, so that a
//! power cut loses nothing that was synced. A record that cannot be written whole is taken
//! back; until that has succeeded, the journal takes no more records, because a record after a
//! torn one would never be read.
//!
//! A sync that failed is not made again: the kernel may have dropped the pages, and says success
//! to the next one. The journal counts as not on the disk until it was written anew
//! (`User::mend_journal`). So does one that a dead process of ours left behind: what its last sync
//! said is not known.

use super::error::{Error, Result, pass};
use crate::cache::disk::{Disk, DiskFile, How};
use crate::failpoint;
use crate::format::journal::{Change, Record, encode_journal_header, encode_record};
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[derive(Debug)]
pub struct Journal {
    file: Arc<dyn DiskFile>,
    len: u64,
    /// Number of the last record.
    seq: u64,
    synced: Arc<AtomicU64>,
    broken: bool,
    /// Left behind by a process that died.
    inherited: bool,
    syncing: Arc<Syncing>,
}

/// One sync at a time: of two, the first may be told of a failure, and the second of a success
/// for the same bytes.
#[derive(Debug, Default)]
struct Syncing {
    one: Mutex<()>,
    failed: AtomicBool,
}

/// What a sync needs, without the user's lock.
#[derive(Debug, Clone)]
pub struct SyncPoint {
    file: Arc<dyn DiskFile>,
    seq: u64,
    synced: Arc<AtomicU64>,
    syncing: Arc<Syncing>,
}

impl Journal {
    /// Starts a new journal at `path` (which must not exist) whose next record is `seq + 1`.
    pub fn create(disk: &dyn Disk, path: &Path, seq: u64) -> Result<Journal> {
        let what = || format!("journal {}", path.display());
        let header = encode_journal_header(seq + 1);
        let file = disk.open(path, How::CreateNew).map_err(|e| Error::disk(what(), &e))?;
        file.write_all_at(&header, 0).map_err(|e| Error::disk(what(), &e))?;
        Ok(Journal {
            file,
            len: header.len() as u64,
            seq,
            synced: Arc::new(AtomicU64::new(0)),
            broken: false,
            inherited: false,
            syncing: Arc::default(),
        })
    }

    /// Goes on with a journal whose last whole record is `seq` and ends at `len`.
    pub fn resume(disk: &dyn Disk, path: &Path, seq: u64, len: u64) -> Result<Journal> {
        let what = || format!("journal {}", path.display());
        let file = disk.open(path, How::ReadWrite).map_err(|e| Error::disk(what(), &e))?;
        file.set_len(len).map_err(|e| Error::disk(what(), &e))?;
        let (synced, syncing) = (Arc::default(), Arc::default());
        Ok(Journal { file, len, seq, synced, broken: false, inherited: false, syncing })
    }

    /// It is what a process left that died: perhaps after a sync of it had failed.
    pub fn inherit(&mut self) {
        self.inherited = true;
        self.syncing.failed.store(true, Ordering::Release);
    }

    /// See [`Journal::inherit`].
    pub fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// Its name may not be on the disk: nothing in it counts as safe until it was written anew.
    pub fn doubt(&mut self) {
        self.synced.store(0, Ordering::Release);
        self.syncing.failed.store(true, Ordering::Release);
    }

    pub fn append(&mut self, changes: Vec<Change>) -> Result<Record> {
        if self.broken {
            self.file.set_len(self.len).map_err(|e| Error::disk("journal", &e))?;
            self.broken = false;
        }
        let record = Record { seq: self.seq + 1, changes };
        let bytes = encode_record(&record);
        pass(failpoint::JOURNAL_BEFORE_APPEND)?;
        let written = self.tear(&bytes).and_then(|()| self.file.write_all_at(&bytes, self.len));
        if let Err(error) = written {
            self.broken = self.file.set_len(self.len).is_err();
            return Err(Error::disk("journal", &error));
        }
        self.len += bytes.len() as u64;
        self.seq = record.seq;
        // An error would be one after the record, which cannot be taken back.
        let _ = failpoint::hit(failpoint::JOURNAL_AFTER_APPEND);
        Ok(record)
    }

    /// Takes the last record back, before which the journal was `before` bytes long.
    pub fn take_back(&mut self, before: u64) -> Result<()> {
        self.file.set_len(before).map_err(|e| Error::disk("journal", &e))?;
        (self.len, self.broken) = (before, false);
        self.seq = self.seq.saturating_sub(1);
        Ok(())
    }

    /// Half of a record is on the disk while the failpoint is passed.
    fn tear(&self, bytes: &[u8]) -> std::io::Result<()> {
        if failpoint::armed(failpoint::JOURNAL_TORN) {
            let half = bytes.get(..bytes.len() / 2).unwrap_or_default();
            self.file.write_all_at(half, self.len)?;
        }
        failpoint::hit(failpoint::JOURNAL_TORN)
    }

    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Bytes in its file.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Whether a sync of it failed, or may have.
    pub fn failed(&self) -> bool {
        self.syncing.failed.load(Ordering::Acquire)
    }

    /// What to sync so that everything written up to now is durable; `None` if it is.
    pub fn sync_point(&self) -> Option<SyncPoint> {
        (self.synced.load(Ordering::Acquire) < self.seq).then(|| SyncPoint {
            file: self.file.clone(),
            seq: self.seq,
            synced: self.synced.clone(),
            syncing: self.syncing.clone(),
        })
    }
}

impl SyncPoint {
    /// Blocks until the disk says so.
    pub fn sync(&self) -> Result<()> {
        if self.synced.load(Ordering::Acquire) >= self.seq {
            return Ok(());
        }
        pass(failpoint::JOURNAL_BEFORE_SYNC)?;
        let _one = self.syncing.one.lock();
        if self.synced.load(Ordering::Acquire) >= self.seq {
            return Ok(());
        }
        let failed = |e| Error::disk("sync of journal", &e);
        if self.syncing.failed.load(Ordering::Acquire) {
            return Err(failed(std::io::Error::other("an earlier sync failed")));
        }
        self.file.sync_data().map_err(|e| {
            self.syncing.failed.store(true, Ordering::Release);
            failed(e)
        })?;
        self.synced.fetch_max(self.seq, Ordering::AcqRel);
        Ok(())
    }
}
