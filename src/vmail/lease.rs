//! The lease under which a backend owns its users (I5).
//!
//! A backend says in its object `backends/<name>` that it lives, every third of the lease: its
//! *sign*. While the store does not take it, every thirtieth: a lease that ended in an outage is to
//! be back soon after it. It counts its lease from before it sent the renewal, by a clock that runs while the
//! machine is suspended. Whoever wants a user of another backend watches that object: only when it
//! has not changed for a whole lease plus a margin, by the watcher's own clock, is the backend
//! over. No clock is compared between machines.
//!
//! The sign is claimed once, at the mount ([`super::claim`]), and from then on only ever replaced by
//! the session that wrote it last, by compare-and-swap. So two sessions that were given one name (a
//! copied configuration, a copied machine) find out: the one whose renewal does not hold has lost
//! its name. Nothing of a lost name is written to the store any more, whatever the heads still say:
//! it is as if the lease had ended, and does not come back.
//!
//! Each write of the sign has a random number of its own, for a swap whose answer was lost finds its
//! own write, which must not be taken for a rival's; and a session id alone would be the same on a
//! machine that was copied while it ran.

use super::claim::Record;
use super::env::Env;
use super::error::{During, Error, Result};
use super::publish::blocking;
use super::session::{Session, Settings, UserCell};
use crate::format::key::backend_key;
use crate::store::{Body, ETag, PutMode, Reason, StoreError};
use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const LEASE: Reason = Reason("lease");
/// Size of a sign at most.
const LIMIT: u64 = 64 * 1024;

/// What a backend says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) struct Sign {
    #[serde(rename = "vmailfs-backend")]
    version: u32,
    backend: String,
    pub session: String,
    /// For people.
    #[serde(default)]
    pub host: String,
    /// Differs from renewal to renewal.
    renewal: u64,
    /// Random, in each write another.
    #[serde(default)]
    pub write: String,
    lease_seconds: u64,
    /// The session has handed over all users and ended.
    #[serde(default)]
    pub ended: bool,
}

impl Sign {
    /// For how long whoever wrote it may still believe that its users are its own.
    pub fn lease(said: Option<&Sign>, usual: Duration) -> Duration {
        said.map_or(usual, |sign| Duration::from_secs(sign.lease_seconds.clamp(1, LONGEST)))
    }
}

/// A sign as the store has it. `None`: what is there is none.
#[derive(Debug)]
pub(super) struct Seen {
    pub sign: Option<Sign>,
    pub tag: ETag,
    said: String,
}

/// Who goes by a backend's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub session: String,
    pub host: String,
}

impl Holder {
    pub(super) fn of(sign: Option<&Sign>) -> Holder {
        let text = |of: fn(&Sign) -> &String| match sign.map(of) {
            Some(text) if !text.is_empty() => text.clone(),
            _ => "(unknown)".to_string(),
        };
        Holder { session: text(|s| &s.session), host: text(|s| &s.host) }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {} on host {}", self.session, self.host)
    }
}

/// The sign as this session wrote it last.
#[derive(Debug)]
pub(super) struct Mine {
    /// `None`: it is not there and is to be made.
    pub tag: Option<ETag>,
    renewal: u64,
    /// Number of the last write. One that was not answered is sent again under the same number:
    /// it may still arrive.
    pub write: String,
    answered: bool,
    pub record: Record,
}

impl Mine {
    pub fn new(tag: Option<ETag>, record: Record) -> Mine {
        Mine { tag, renewal: 0, write: String::new(), answered: true, record }
    }

    /// The last write is in the store. The next one is another, or nobody would see it.
    pub fn answered(&mut self, tag: ETag) {
        self.tag = Some(tag);
        self.answered = true;
        self.record.answered();
    }
}

#[derive(Debug)]
pub struct Lease {
    single: bool,
    pub(super) time: Duration,
    /// End of the lease, in milliseconds of the boot clock.
    until: AtomicU64,
    now: Mutex<Option<Env>>,
    /// Held across each write of the sign. `None`: not claimed, or given up.
    pub(super) mine: tokio::sync::Mutex<Option<Mine>>,
    /// Who has our name.
    taken: Mutex<Option<Holder>>,
    /// Other backends: what their object said, and since when.
    watched: Mutex<HashMap<String, (String, Duration)>>,
}

/// Whom a head names after a repair: no backend can be called that, and nobody has to be waited
/// for.
pub const REPAIRED: &str = "(fsck)";

/// Margin for the difference in speed of two clocks.
pub(super) const MARGIN: Duration = Duration::from_secs(10);

impl Lease {
    pub fn new(settings: &Settings) -> Lease {
        Lease {
            single: settings.single_backend,
            time: settings.lease,
            until: AtomicU64::new(0),
            now: Mutex::new(None),
            mine: tokio::sync::Mutex::new(None),
            taken: Mutex::new(None),
            watched: Mutex::new(HashMap::new()),
        }
    }

    /// A single backend has no sign: nobody is there to look at it.
    pub(super) fn is_needed(&self) -> bool {
        !self.single
    }

    /// Whether this session may write now.
    pub fn holds(&self) -> bool {
        if self.single {
            return true;
        }
        let now = self.now.lock().as_ref().map(|env| millis(env.clock.boot()));
        now.is_some_and(|now| now < self.until.load(Ordering::Acquire))
    }

    /// Until the lease ends, or (negative) since it ended.
    pub fn seconds_left(&self) -> i64 {
        let now = self.now.lock().as_ref().map_or(0, |env| millis(env.clock.boot()));
        let until = self.until.load(Ordering::Acquire);
        (i64::try_from(until).unwrap_or(i64::MAX) - i64::try_from(now).unwrap_or(0)) / 1000
    }

    /// Who took our name, if somebody did.
    pub fn taken_by(&self) -> Option<Holder> {
        self.taken.lock().clone()
    }

    /// An error once somebody else goes by our name: users are not ours to open or to write then.
    pub fn check_name(&self, backend: &str) -> Result<()> {
        match &*self.taken.lock() {
            None => Ok(()),
            Some(holder) => Err(Error::NameTaken {
                what: format!(
                    "backend {backend}: {holder} has taken this name; nothing is written here any \
                     more"
                ),
            }),
        }
    }

    /// Renews once. A single backend needs none, nor does one that has given up its name.
    ///
    /// # Errors
    /// Of the store; [`Error::NameTaken`], for ever, once somebody else has written the sign.
    pub async fn renew(&self, session: &Session) -> Result<()> {
        let mut mine = self.mine.lock().await;
        let backend = &session.settings.backend;
        self.check_name(backend)?;
        let Some(mine) = mine.as_mut() else { return Ok(()) };
        let mut again = true;
        loop {
            let error = match self.write(session, mine, false).await {
                Err(error @ StoreError::Precondition { .. }) if again => error,
                done => return done.map_err(|e| renewing(backend, e)),
            };
            again = false;
            match self.look(session, backend).await? {
                // Our own, whose answer was lost. The lease counts from a write that was answered.
                Some(Seen { sign: Some(sign), tag, .. }) if sign.write == mine.write => {
                    mine.answered(tag);
                }
                // Somebody removed it.
                None => mine.tag = None,
                // What is no sign says nothing of anybody.
                Some(Seen { sign: None, .. }) => return Err(renewing(backend, error)),
                Some(Seen { sign, .. }) => {
                    let holder = Holder::of(sign.as_ref());
                    self.until.store(0, Ordering::Release);
                    *self.taken.lock() = Some(holder.clone());
                    tracing::error!(
                        %backend, by = %holder,
                        "another machine has taken this backend's name: nothing is written here any \
                         more, deliveries are deferred, and what was not flushed stays on this disk. \
                         Unmount here, or give each machine a name of its own (option backend)"
                    );
                    return self.check_name(backend);
                }
            }
        }
    }

    /// Writes the sign over the one that `mine` knows. The lease counts from before it was sent.
    pub(super) async fn write(
        &self,
        session: &Session,
        mine: &mut Mine,
        ended: bool,
    ) -> std::result::Result<(), StoreError> {
        let settings = &session.settings;
        let before = session.env.clock.boot();
        if mine.answered {
            mine.renewal += 1;
            mine.write = format!("{:016x}", session.env.random.u64());
            mine.answered = false;
        }
        let sign = Sign {
            version: 1,
            backend: settings.backend.clone(),
            session: session.id.clone(),
            host: settings.host.clone(),
            renewal: mine.renewal,
            write: mine.write.clone(),
            lease_seconds: self.time.as_secs(),
            ended,
        };
        // Should it not get there, the next start here takes its own sign for a stranger's, and waits.
        mine.record.sent(&session.id, &mine.write);
        let (disk, dir) = (session.env.disk.clone(), settings.state_dir.clone());
        let record = mine.record.clone();
        if let Err(error) = blocking(move || record.save(&*disk, &dir)).await.and_then(|done| done)
        {
            tracing::warn!(%error, "this session's id is not kept");
        }
        let detail = |e: serde_json::Error| StoreError::Unsupported { detail: e.to_string() };
        let bytes = serde_json::to_vec_pretty(&sign).map_err(detail)?;
        let mode = match &mine.tag {
            Some(tag) => PutMode::Update(tag.clone()),
            None => PutMode::Create,
        };
        let key = backend_key(&settings.backend);
        let body = Body::Bytes(Bytes::from(bytes));
        let tag = session.env.store.put(&key, body, mode, &[], LEASE).await?;
        mine.answered(tag);
        if !ended {
            self.held(session, before);
        }
        Ok(())
    }

    /// The lease is held, counted from `before`.
    pub(super) fn held(&self, session: &Session, before: Duration) {
        *self.now.lock() = Some(session.env.clone());
        self.until.store(millis(before + self.time), Ordering::Release);
    }

    /// Gives up the name after the last user was handed over: whoever has it next need not wait.
    /// One try; without it, others wait for the end of the lease.
    pub async fn end(&self, session: &Session) {
        let mut mine = self.mine.lock().await;
        self.until.store(0, Ordering::Release);
        if let Some(mut mine) = mine.take()
            && self.taken.lock().is_none()
            && let Err(error) = self.write(session, &mut mine, true).await
        {
            tracing::warn!(%error, "the end of this session is not told: others wait for its lease");
        }
    }

    /// Renews for as long as the session has users: handing over many may take longer than a lease.
    pub async fn keep(session: Arc<Session>) {
        let lease = &session.lease;
        if lease.single {
            return;
        }
        let mut wait = lease.time / 3;
        loop {
            session.env.clock.sleep(wait).await;
            let open = |cell: &Arc<UserCell>| cell.if_open(|_| ()).is_some();
            if session.is_closing() && !session.all_users().iter().any(open) {
                return;
            }
            match lease.renew(&session).await {
                // Told where it was found out; nothing is left to be renewed.
                Err(Error::NameTaken { .. }) => return,
                Err(error) => {
                    let held = lease.holds();
                    tracing::warn!(%error, held, "lease not renewed");
                    // Deliveries may be waiting for it.
                    wait = (lease.time / 30).max(Duration::from_secs(1));
                }
                Ok(()) => wait = lease.time / 3,
            }
        }
    }

    /// A backend's sign, if there is one.
    pub(super) async fn look(&self, session: &Session, backend: &str) -> Result<Option<Seen>> {
        let outage = |e| Error::store(format!("lease of {backend}"), During::Delivery, e);
        match session.env.store.get(&backend_key(backend), None, LIMIT, LEASE).await {
            Ok((meta, bytes)) => {
                let said = String::from_utf8_lossy(&bytes).into_owned();
                let detail = "a sign was answered without its tag".to_string();
                let tag = meta.etag.ok_or(StoreError::Unavailable { detail }).map_err(outage)?;
                Ok(Some(Seen { sign: serde_json::from_str(&said).ok(), tag, said }))
            }
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(outage(e)),
        }
    }

    /// Whether another backend is certainly over. Looks once; to be called again until it is.
    pub async fn is_over(&self, session: &Session, backend: &str) -> Result<bool> {
        if self.single || backend == REPAIRED {
            return Ok(true);
        }
        let (sign, said) = match self.look(session, backend).await? {
            Some(seen) => (seen.sign, seen.said),
            None => (None, String::new()),
        };
        if sign.as_ref().is_some_and(|sign| sign.ended) {
            return Ok(true);
        }
        let lease = Sign::lease(sign.as_ref(), self.time);
        let now = session.env.clock.boot();
        let mut watched = self.watched.lock();
        let seen = watched.entry(backend.to_string()).or_insert_with(|| (said.clone(), now));
        if seen.0 != said {
            *seen = (said, now);
        }
        Ok(now.saturating_sub(seen.1) > lease + MARGIN)
    }
}

pub(super) fn renewing(backend: &str, error: StoreError) -> Error {
    Error::store(format!("lease of {backend}"), During::Delivery, error)
}

/// No backend is waited for longer, whatever its sign says; seconds.
const LONGEST: u64 = 24 * 3600;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
