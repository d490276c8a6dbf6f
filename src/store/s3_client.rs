//! The client, and a new one when the store refuses its credentials.
//!
//! The SDK renews credentials that say when they end. Keys in a file do not say so: whoever
//! rotates them writes the file anew, and expects no restart of a mount to be needed. So a
//! refusal makes a new client, which looks again where credentials are looked for; not more
//! often than every few seconds, as a refusal may also be meant.

use super::StoreResult;
use super::clock::StoreClock;
use super::s3_config::S3Config;
use aws_sdk_s3::Client;
use parking_lot::RwLock;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Between two new clients at least.
const PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Reloading {
    config: S3Config,
    clock: StoreClock,
    /// With its number, by which a request tells whether there has been a newer one.
    current: RwLock<(Client, u64)>,
    renewed: Mutex<Option<Instant>>,
}

impl Reloading {
    pub(super) async fn new(config: S3Config, clock: StoreClock) -> StoreResult<Reloading> {
        let current = RwLock::new((config.client(clock.clone()).await?, 0));
        Ok(Reloading { config, clock, current, renewed: Mutex::new(None) })
    }

    pub(super) fn get(&self) -> (Client, u64) {
        self.current.read().clone()
    }

    /// After client number `used` was refused: whether there is another one to try.
    pub(super) async fn renew(&self, used: u64) -> bool {
        // What stands in the configuration does not change.
        if self.config.access_key_id.is_some() {
            return false;
        }
        let mut renewed = self.renewed.lock().await;
        if self.current.read().1 > used {
            return true;
        }
        if renewed.is_some_and(|at| at.elapsed() < PAUSE) {
            return false;
        }
        *renewed = Some(Instant::now());
        match self.config.client(self.clock.clone()).await {
            Ok(client) => {
                tracing::info!("the store refuses access: looking for new credentials");
                *self.current.write() = (client, used + 1);
                true
            }
            Err(error) => {
                tracing::warn!(%error, "no new client after the store refused access");
                false
            }
        }
    }
}
