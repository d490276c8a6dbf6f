//! Listing snapshots on the local disk: the lines of a folder with their checksum in front.
//!
//! One that cannot be used is no loss: the parts say the same, only older, and the journal brings
//! them up to date. It is read twice, so that it never is in memory whole.

use super::error::{Error, Result};
use super::lines::Final;
use super::publish::blocking;
use super::session::UserCell;
use crate::cache::disk::{DiskFile, How};
use crate::format::FormatError;
use crate::format::listing::read_listing;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

/// Lines of a local listing snapshot at most.
pub(super) const SNAPSHOT_LINES: usize = 50_000_000;

pub(super) async fn read_snapshot(
    cell: &Arc<UserCell>,
    path: &std::path::Path,
) -> Result<Option<Final>> {
    let disk = cell.session.env.disk.clone();
    let at = path.to_path_buf();
    let read = blocking(move || match disk.open(&at, How::Read) {
        Ok(file) => check_snapshot(file).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Unusable::Disk(e)),
    });
    match read.await? {
        Ok(state) => Ok(state),
        Err(Unusable::Disk(e)) => Err(Error::disk(path.display().to_string(), &e)),
        Err(Unusable::Format(error)) => {
            // The parts say the same, only older; the journal brings them up to date.
            tracing::warn!(user = %cell.name, %error, path = %path.display(), "listing snapshot unusable");
            Ok(None)
        }
    }
}

/// A listing snapshot is a listing with its checksum in front.
pub fn seal_snapshot(listing: &str) -> Vec<u8> {
    let mut out = format!("{:08x}\n", crc32c::crc32c(listing.as_bytes())).into_bytes();
    out.extend_from_slice(listing.as_bytes());
    out
}

/// Why a snapshot cannot be taken.
pub(super) enum Unusable {
    Disk(io::Error),
    Format(FormatError),
}

/// A file of the local disk, read from front to end.
pub(super) struct Front {
    file: Arc<dyn DiskFile>,
    at: u64,
}

impl io::Read for Front {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Reads a snapshot twice, for its checksum and for its lines: it never is in memory whole.
pub(super) fn check_snapshot(file: Arc<dyn DiskFile>) -> std::result::Result<Final, Unusable> {
    pub(super) const SUM: u64 = 9;
    let what = "listing snapshot";
    let front = |at| BufReader::with_capacity(64 << 10, Front { file: file.clone(), at });
    let mut source = front(0);
    let mut sum = [0; SUM as usize];
    match source.read_exact(&mut sum) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(Unusable::Format(FormatError::malformed(what, "too short")));
        }
        done => done.map_err(Unusable::Disk)?,
    }
    let mut crc = 0;
    loop {
        let some = source.fill_buf().map_err(Unusable::Disk)?;
        if some.is_empty() {
            break;
        }
        crc = crc32c::crc32c_append(crc, some);
        let len = some.len();
        source.consume(len);
    }
    if sum != *format!("{crc:08x}\n").as_bytes() {
        return Err(Unusable::Format(FormatError::Checksum { what }));
    }
    let mut state = Final::default();
    read_listing(&mut front(SUM), SNAPSHOT_LINES, |line| state.apply(line))
        .map_err(Unusable::Format)?;
    Ok(state)
}
