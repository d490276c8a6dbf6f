//! A disk that fails (not: is full) takes the directory out of service: nothing is found in it and nothing is put
//! there, all is streamed. Every [`TRIAL`]th request is let through to see whether it works again. A full
//! disk is a smaller budget: what is there makes room for what comes, and each file that was written widens
//! it again; so does every [`TRIAL`]th request that finds no room.

use super::volume::Volume;
use std::io;
use std::sync::atomic::Ordering;

/// Of so many requests to a directory whose disk fails, one is tried.
const TRIAL: u64 = 64;

/// What an error says is wrong.
enum Failed {
    /// One file, which somebody removed or put something else in the place of; or we have too many open.
    File,
    Space,
    Disk,
}

fn what_failed(error: &io::Error) -> Failed {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    if matches!(error.kind(), QuotaExceeded | StorageFull) {
        return Failed::Space;
    }
    match error.raw_os_error() {
        Some(
            libc::EIO
            | libc::EROFS
            | libc::ENODEV
            | libc::ENXIO
            | libc::ESTALE
            | libc::EUCLEAN
            | libc::EREMOTEIO
            | libc::ENOTCONN
            | libc::ETIMEDOUT,
        ) => Failed::Disk,
        _ => Failed::File,
    }
}

impl Volume {
    pub(super) fn usable(&self, to_write: bool) -> bool {
        if !self.failing.load(Ordering::Relaxed) {
            return true;
        }
        !self.dead && self.is_trial(usize::from(to_write))
    }

    fn is_trial(&self, of: usize) -> bool {
        self.asked[of].fetch_add(1, Ordering::Relaxed) % TRIAL == TRIAL - 1
    }

    /// Whether what finds no room because the disk was full once is tried all the same.
    pub(super) fn tries_in_spite(&self) -> bool {
        self.is_trial(2)
    }

    /// What the disk said is noted, and logged once until it changes its mind.
    pub(super) fn failed(&self, what: &str, error: &io::Error) {
        self.failed_with(what, error, 0);
    }

    /// The same of bytes that were set aside, and will be given back.
    pub(super) fn failed_with(&self, what: &str, error: &io::Error, set_aside: u64) {
        let dir = self.dir.display();
        match what_failed(error) {
            Failed::File => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, what, "fscache {dir}");
                }
            }
            Failed::Space => {
                self.books.lock().disk_full(set_aside);
                if !self.full.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, what, "the disk of fscache {dir} has less room than max_size; mails that do not fit are streamed");
                }
            }
            Failed::Disk => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::error!(%error, what, "the disk of fscache {dir} fails; its mails are streamed until it works again");
                }
            }
        }
    }

    pub(super) fn works(&self) {
        self.full.store(false, Ordering::Relaxed);
        if self.failing.swap(false, Ordering::Relaxed) {
            tracing::info!("the disk of fscache {} works again", self.dir.display());
        }
    }
}
