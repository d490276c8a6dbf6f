//! The name of a backend is claimed when a mount begins (I5).
//!
//! Users are owned in the name of a backend, and a session takes its own name's users without
//! waiting. So one name must have one living session. The sign of the last one lies in the store:
//!
//! - there is none: it is made;
//! - it was written by an earlier session of this state directory, or by one that ended and said
//!   so: it is replaced at once, so that a restart or a reboot waits for nothing;
//! - it is a stranger's: another machine with a copy of our configuration, or ourselves before our
//!   state directory was lost. It is watched for the lease that it tells, and some seconds. If it
//!   moves, its session lives, and the mount is refused. If it does not, it is replaced.
//!
//! It is only replaced as it was seen (`If-Match`), so of two that claim a name at a time one finds
//! the other. Whoever had the name and only seemed to be dead finds out at its next renewal.
//!
//! What makes a sign ours is the random number of its write, which the state directory knows before
//! the write is sent. A session id would not do: on a copy of this machine it is the same, while the
//! one that goes on writes numbers that the copy cannot know.

use super::error::{Error, Result};
use super::lease::{Holder, Lease, MARGIN, Mine, Seen, Sign, renewing};
use super::publish::blocking;
use super::session::Session;
use crate::cache::disk::Disk;
use crate::store::{ETag, StoreError};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::Duration;

/// Name of the file in the state directory.
const NAME: &str = "session";
const LIMIT: u64 = 64 * 1024;
/// Writes that are remembered. Each start that fails leaves one.
const WRITES: usize = 16;
/// Longest time between two looks at a stranger's sign.
const LOOK: Duration = Duration::from_secs(15);
/// Tries to write the sign over one that need not be waited for.
const TRIES: usize = 5;

/// What the state directory knows of the signs that were written from here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(rename = "vmailfs-session")]
    version: u32,
    session: String,
    /// Newest first.
    writes: Vec<String>,
}

impl Record {
    fn none() -> Record {
        Record { version: 1, session: String::new(), writes: Vec::new() }
    }

    /// What cannot be read is as good as none: then there is something to wait for.
    fn read(disk: &dyn Disk, dir: &Path) -> Record {
        let path = dir.join(NAME);
        let read = disk.read(&path, LIMIT).map_err(|e| e.to_string());
        let record = read.and_then(|bytes| match bytes {
            None => Ok(Record::none()),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| e.to_string()),
        });
        record.unwrap_or_else(|error| {
            tracing::warn!(path = %path.display(), error, "the last session's id is not known");
            Record::none()
        })
    }

    pub(super) fn save(&self, disk: &dyn Disk, dir: &Path) -> Result<()> {
        let failed = |e: &std::io::Error| Error::disk("session", e);
        let bytes = serde_json::to_vec(self).map_err(|e| failed(&e.into()))?;
        disk.replace(&dir.join(NAME), &bytes, true).map_err(|e| failed(&e))
    }

    /// A write is about to be sent.
    pub(super) fn sent(&mut self, session: &str, write: &str) {
        self.session = session.to_string();
        if self.writes.first().map(String::as_str) != Some(write) {
            self.writes.insert(0, write.to_string());
            self.writes.truncate(WRITES);
        }
    }

    /// The last write is in the store, and no earlier one can be any more.
    pub(super) fn answered(&mut self) {
        self.writes.truncate(1);
    }

    fn wrote(&self, sign: &Sign) -> bool {
        self.writes.contains(&sign.write)
    }
}

/// What a mount waits for before it has its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub holder: Holder,
    /// At most; less if the holder shows that it lives.
    pub left: Duration,
    /// Until there is news.
    pub next: Duration,
}

/// A stranger's sign, and since when it has not moved.
struct Watch {
    tag: ETag,
    since: Duration,
    lease: Duration,
    holder: Holder,
}

impl Lease {
    /// Claims this backend's name, before any user is opened. A single backend needs no name.
    /// `at_once`: somebody knows that the last session is dead. `tell` is called while it waits.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if a living session has the name; of the store.
    pub async fn claim(
        &self,
        session: &Session,
        at_once: bool,
        tell: &mut (dyn FnMut(&Waiting) + Send),
    ) -> Result<()> {
        if !self.is_needed() {
            return Ok(());
        }
        let mut held = self.mine.lock().await;
        let backend = &session.settings.backend;
        let (disk, dir) = (session.env.disk.clone(), session.settings.state_dir.clone());
        let mut mine = Mine::new(None, blocking(move || Record::read(&*disk, &dir)).await?);
        let mut watch: Option<Watch> = None;
        let mut tries = 0;
        loop {
            let now = session.env.clock.boot();
            mine.tag = match self.look(session, backend).await {
                Ok(None) => None,
                Ok(Some(seen)) if at_once || is_free(&seen, &mine.record) => Some(seen.tag),
                Ok(Some(seen)) => match &mut watch {
                    None => {
                        let begun = watch.insert(self.begin(seen, now));
                        tracing::warn!(
                            %backend, holder = %begun.holder, at_most = ?(begun.lease + MARGIN),
                            "this backend's name was last used by a session that this state directory \
                             does not know; waiting to see whether it lives. If that machine is \
                             certainly dead, mount with --take-backend"
                        );
                        self.pause(session, begun, tell).await;
                        continue;
                    }
                    Some(begun) if begun.tag != seen.tag => {
                        return Err(in_use(backend, &Holder::of(seen.sign.as_ref())));
                    }
                    Some(begun) if now.saturating_sub(begun.since) > begun.lease + MARGIN => {
                        tracing::warn!(%backend, holder = %begun.holder, "is over; its name is taken");
                        Some(seen.tag)
                    }
                    Some(begun) => {
                        self.pause(session, begun, tell).await;
                        continue;
                    }
                },
                // No answer moves nothing: what counts is that the sign is the same afterwards.
                Err(error) => match &mut watch {
                    Some(begun) if now.saturating_sub(begun.since) <= begun.lease + MARGIN => {
                        tracing::warn!(%error, "the sign cannot be seen");
                        self.pause(session, begun, tell).await;
                        continue;
                    }
                    _ => return Err(error),
                },
            };
            let before = session.env.clock.boot();
            let error = match self.write(session, &mut mine, false).await {
                Ok(()) => break,
                Err(e @ (StoreError::Precondition { .. } | StoreError::Unavailable { .. })) => e,
                Err(e) => return Err(renewing(backend, e)),
            };
            // Perhaps our own write, its answer lost.
            if let Some(Seen { sign: Some(sign), tag, .. }) = self.look(session, backend).await?
                && sign.write == mine.write
            {
                mine.answered(tag);
                self.held(session, before);
                break;
            }
            tries += 1;
            if matches!(error, StoreError::Unavailable { .. }) || tries == TRIES {
                return Err(renewing(backend, error));
            }
        }
        *held = Some(mine);
        Ok(())
    }

    fn begin(&self, seen: Seen, now: Duration) -> Watch {
        let sign = seen.sign.as_ref();
        let (lease, holder) = (Sign::lease(sign, self.time), Holder::of(sign));
        Watch { tag: seen.tag, since: now, lease, holder }
    }

    async fn pause(
        &self,
        session: &Session,
        watch: &Watch,
        tell: &mut (dyn FnMut(&Waiting) + Send),
    ) {
        let gone = session.env.clock.boot().saturating_sub(watch.since);
        let left = (watch.lease + MARGIN).saturating_sub(gone);
        let next = (watch.lease / 12).clamp(Duration::from_secs(1), LOOK);
        tell(&Waiting { holder: watch.holder.clone(), left, next });
        session.env.clock.sleep(next).await;
    }
}

/// Whether nobody can go by the name whose sign this is.
fn is_free(seen: &Seen, record: &Record) -> bool {
    seen.sign.as_ref().is_some_and(|sign| sign.ended || record.wrote(sign))
}

fn in_use(backend: &str, holder: &Holder) -> Error {
    Error::NameTaken {
        what: format!(
            "backend name {backend} is in use: {holder} is alive and renews its lease. Give each \
             machine a name of its own (option backend), or, if that one is to be replaced, unmount it \
             first"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::disk::RealDisk;

    #[test]
    fn a_record_is_bounded_and_damage_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::read(&RealDisk, dir.path());
        for n in 0..100 {
            record.sent("s", &format!("w{n}"));
            record.sent("s", &format!("w{n}"));
        }
        assert_eq!(record.writes.len(), WRITES);
        record.save(&RealDisk, dir.path()).unwrap();
        let mut read = Record::read(&RealDisk, dir.path());
        assert_eq!((read.session.as_str(), &read.writes), ("s", &record.writes));
        read.answered();
        assert_eq!(read.writes, ["w99"]);
        std::fs::write(dir.path().join(NAME), b"{\"vmailfs-session\": 1").unwrap();
        assert!(Record::read(&RealDisk, dir.path()).writes.is_empty());
    }
}
