//! The lease under which a backend owns its users (I5).
//!
//! A backend says in its object `backends/<name>` that it lives, every third of the lease. It
//! counts its lease from before it sent the renewal, by a clock that runs while the machine is
//! suspended. Whoever wants a user of another backend watches that object: only when it has
//! not changed for a whole lease plus a margin, by the watcher's own clock, is the backend
//! over. No clock is compared between machines.

use super::env::Env;
use super::error::{During, Error, Result};
use super::session::{Session, Settings, UserCell};
use crate::format::key::backend_key;
use crate::store::{Body, PutMode, Reason, StoreError};
use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a backend says of itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
struct Sign {
    #[serde(rename = "vmailfs-backend")]
    version: u32,
    backend: String,
    session: String,
    /// Differs from renewal to renewal.
    renewal: u64,
    lease_seconds: u64,
}

#[derive(Debug)]
pub struct Lease {
    single: bool,
    time: Duration,
    /// End of the lease, in milliseconds of the boot clock.
    until: AtomicU64,
    now: Mutex<Option<Env>>,
    renewals: AtomicU64,
    /// Other backends: what their object said, and since when.
    watched: Mutex<HashMap<String, (String, Duration)>>,
}

/// Whom a head names after a repair: no backend can be called that, and nobody has to be waited
/// for.
pub const REPAIRED: &str = "(fsck)";

/// Margin for the difference in speed of two clocks.
const MARGIN: Duration = Duration::from_secs(10);

impl Lease {
    pub fn new(settings: &Settings) -> Lease {
        Lease {
            single: settings.single_backend,
            time: settings.lease,
            until: AtomicU64::new(0),
            now: Mutex::new(None),
            renewals: AtomicU64::new(0),
            watched: Mutex::new(HashMap::new()),
        }
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

    /// Renews once. A single backend needs none.
    pub async fn renew(&self, session: &Session) -> Result<()> {
        if self.single {
            return Ok(());
        }
        let settings = &session.settings;
        let before = session.env.clock.boot();
        let sign = Sign {
            version: 1,
            backend: settings.backend.clone(),
            session: session.id.clone(),
            renewal: self.renewals.fetch_add(1, Ordering::Relaxed),
            lease_seconds: self.time.as_secs(),
        };
        let bytes =
            serde_json::to_vec_pretty(&sign).map_err(|e| Error::Internal(format!("lease: {e}")))?;
        let key = backend_key(&settings.backend);
        let put = session.env.store.put(
            &key,
            Body::Bytes(Bytes::from(bytes)),
            PutMode::Overwrite,
            &[],
            Reason("lease"),
        );
        put.await.map_err(|e| Error::store("renewing the lease", During::Delivery, e))?;
        *self.now.lock() = Some(session.env.clone());
        self.until.store(millis(before + self.time), Ordering::Release);
        Ok(())
    }

    /// Renews for as long as the session has users: handing over many may take longer than a lease.
    pub async fn keep(session: Arc<Session>) {
        let lease = &session.lease;
        if lease.single {
            return;
        }
        loop {
            session.env.clock.sleep(lease.time / 3).await;
            let open = |cell: &Arc<UserCell>| cell.if_open(|_| ()).is_some();
            if session.is_closing() && !session.all_users().iter().any(open) {
                return;
            }
            if let Err(error) = lease.renew(&session).await {
                let held = lease.holds();
                tracing::warn!(%error, held, "lease not renewed");
            }
        }
    }

    /// Whether another backend is certainly over. Looks once; to be called again until it is.
    pub async fn is_over(&self, session: &Session, backend: &str) -> Result<bool> {
        if self.single || backend == REPAIRED {
            return Ok(true);
        }
        let key = backend_key(backend);
        let got = session.env.store.get(&key, None, 64 * 1024, Reason("lease")).await;
        let said = match got {
            Ok((_, bytes)) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(StoreError::NotFound { .. }) => String::new(),
            Err(e) => return Err(Error::store(format!("lease of {backend}"), During::Delivery, e)),
        };
        let lease = serde_json::from_str::<Sign>(&said)
            .map_or(self.time, |sign| Duration::from_secs(sign.lease_seconds.clamp(1, LONGEST)));
        let now = session.env.clock.boot();
        let mut watched = self.watched.lock();
        let seen = watched.entry(backend.to_string()).or_insert_with(|| (said.clone(), now));
        if seen.0 != said {
            *seen = (said, now);
        }
        Ok(now.saturating_sub(seen.1) > lease + MARGIN)
    }
}

/// No backend is waited for longer, whatever its sign says; seconds.
const LONGEST: u64 = 24 * 3600;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
