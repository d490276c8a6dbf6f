//! One at a time, for each of many things.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use tokio::sync::OwnedMutexGuard;

/// Who is at work on what. What nobody works on takes no space.
#[derive(Debug)]
pub struct Turns<K>(Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>);

impl<K> Default for Turns<K> {
    fn default() -> Turns<K> {
        Turns(Mutex::default())
    }
}

impl<K: Eq + Hash> Turns<K> {
    /// Waits for its turn.
    pub async fn take(&self, key: K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut all = self.0.lock();
            // Those that nobody holds or waits for are done.
            all.retain(|_, lock| Arc::strong_count(lock) > 1);
            all.entry(key).or_default().clone()
        };
        lock.lock_owned().await
    }
}
