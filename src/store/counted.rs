//! Counts and logs every request that passes: the one place where it is known why the store was
//! asked.

use super::{Body, ETag, ObjectMeta, ObjectStore, Op, PutMode, Reason, StoreError, StoreResult};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request that takes longer is worth a warning.
const SLOW: Duration = Duration::from_secs(5);
/// Keys in one page of a listing, and in one bulk delete, of S3.
const PAGE: usize = 1000;

/// The counts of one kind of request made for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountRow {
    pub op: Op,
    pub reason: &'static str,
    /// Calls of the store trait.
    pub calls: u64,
    /// The requests that S3 needs for them when nothing is retried: a listing costs one per
    /// 1000 entries, a delete one per 1000 keys.
    pub requests: u64,
    /// Calls that failed, without the two answers counted next.
    pub errors: u64,
    /// "No such object" and "condition does not hold": answers, not failures.
    pub refusals: u64,
    /// Bytes of bodies read from the store.
    pub bytes_in: u64,
    /// Bytes of bodies written to the store, of puts that succeeded.
    pub bytes_out: u64,
    /// The time that all calls took together.
    pub time: Duration,
    /// The time of the slowest one.
    pub slowest: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct CountedStore {
    inner: Arc<dyn ObjectStore>,
    rows: Mutex<BTreeMap<(Op, Reason), CountRow>>,
}

/// What a call brought besides its answer.
struct Volume {
    requests: usize,
    bytes_in: u64,
    bytes_out: u64,
}

impl Volume {
    const NONE: Volume = Volume { requests: 1, bytes_in: 0, bytes_out: 0 };

    fn pages(entries: usize) -> Volume {
        Volume { requests: entries.div_ceil(PAGE).max(1), ..Volume::NONE }
    }
}

impl CountedStore {
    pub fn new(inner: Arc<dyn ObjectStore>) -> CountedStore {
        CountedStore { inner, rows: Mutex::default() }
    }

    /// All rows with at least one call, by kind and reason.
    pub fn snapshot(&self) -> Vec<CountRow> {
        self.rows.lock().values().cloned().collect()
    }

    /// The requests of all rows together.
    pub fn requests(&self) -> u64 {
        self.rows.lock().values().map(|row| row.requests).sum()
    }

    async fn run<T>(
        &self,
        op: Op,
        key: &str,
        why: Reason,
        request: impl Future<Output = StoreResult<T>>,
        volume: impl FnOnce(&T) -> Volume,
    ) -> StoreResult<T> {
        let start = Instant::now();
        let answer = request.await;
        let took = start.elapsed();
        let reason = why.0;
        let ms = took.as_millis() as u64;
        match &answer {
            Ok(_) => tracing::debug!(%op, reason, key, ms, "store request"),
            Err(error) => tracing::debug!(%op, reason, key, ms, %error, "store request failed"),
        }
        if took >= SLOW {
            tracing::warn!(%op, reason, key, ms, "slow store request");
        }
        let mut rows = self.rows.lock();
        let row = rows.entry((op, why)).or_insert_with(|| CountRow {
            op,
            reason,
            calls: 0,
            requests: 0,
            errors: 0,
            refusals: 0,
            bytes_in: 0,
            bytes_out: 0,
            time: Duration::ZERO,
            slowest: Duration::ZERO,
        });
        row.calls += 1;
        row.time += took;
        row.slowest = row.slowest.max(took);
        let volume = match &answer {
            Ok(value) => volume(value),
            Err(StoreError::NotFound { .. } | StoreError::Precondition { .. }) => {
                row.refusals += 1;
                Volume::NONE
            }
            Err(_) => {
                row.errors += 1;
                Volume::NONE
            }
        };
        row.requests += volume.requests as u64;
        row.bytes_in += volume.bytes_in;
        row.bytes_out += volume.bytes_out;
        drop(rows);
        answer
    }
}

#[async_trait]
impl ObjectStore for CountedStore {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let request = self.inner.get(key, range, limit, why);
        self.run(Op::Get, key, why, request, |(_, bytes)| Volume {
            bytes_in: bytes.len() as u64,
            ..Volume::NONE
        })
        .await
    }

    async fn download(
        &self,
        key: &str,
        file: &std::fs::File,
        why: Reason,
    ) -> StoreResult<ObjectMeta> {
        let request = self.inner.download(key, file, why);
        self.run(Op::Download, key, why, request, |meta| Volume {
            bytes_in: meta.size,
            ..Volume::NONE
        })
        .await
    }

    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        why: Reason,
    ) -> StoreResult<ETag> {
        let bytes_out = match &body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File { len, .. } => *len,
        };
        let request = self.inner.put(key, body, mode, metadata, why);
        self.run(Op::Put, key, why, request, |_| Volume { bytes_out, ..Volume::NONE }).await
    }

    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        self.run(Op::Head, key, why, self.inner.head(key, why), |_| Volume::NONE).await
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let request = self.inner.list(dir, start_after, why);
        self.run(Op::List, dir, why, request, |entries| Volume::pages(entries.len())).await
    }

    async fn list_before(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: &str,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let request = self.inner.list_before(dir, start_after, before, why);
        self.run(Op::List, dir, why, request, |entries| Volume::pages(entries.len())).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let request = self.inner.list_some(dir, start_after, most, why);
        self.run(Op::List, dir, why, request, |entries| Volume::pages(entries.len())).await
    }

    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        let request = self.inner.list_dirs(dir, why);
        self.run(Op::ListDirs, dir, why, request, |names| Volume::pages(names.len())).await
    }

    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        let first = keys.first().map_or("", String::as_str);
        let request = self.inner.delete(keys, why);
        self.run(Op::Delete, first, why, request, |()| Volume::pages(keys.len())).await
    }

    fn time(&self) -> Option<i64> {
        self.inner.time()
    }

    fn wire_requests(&self) -> Option<u64> {
        self.inner.wire_requests()
    }
}

#[cfg(test)]
mod tests {
    use super::super::mem::MemStore;
    use super::*;

    #[tokio::test]
    async fn counts_by_kind_and_reason() {
        let store = CountedStore::new(Arc::new(MemStore::new()));
        for n in 0..1500 {
            let body = Body::Bytes(Bytes::from_static(b"12345"));
            let key = format!("d/{n:04}");
            store.put(&key, body, PutMode::Create, &[], Reason("publish")).await.unwrap();
        }
        store.get("d/0000", Some(1..4), 9, Reason("open")).await.unwrap();
        assert!(store.get("d/none", None, 9, Reason("open")).await.is_err());
        assert!(store.get("d/0000", None, 2, Reason("open")).await.is_err());
        assert_eq!(store.list("d", None, Reason("open")).await.unwrap().len(), 1500);
        let keys: Vec<String> = (0..1500).map(|n| format!("d/{n:04}")).collect();
        store.delete(&keys, Reason("gc")).await.unwrap();
        let rows: Vec<_> = store
            .snapshot()
            .iter()
            .map(|r| {
                (
                    r.op.name(),
                    r.reason,
                    r.calls,
                    r.requests,
                    r.errors,
                    r.refusals,
                    r.bytes_in,
                    r.bytes_out,
                )
            })
            .collect();
        assert_eq!(
            rows,
            [
                ("get", "open", 3, 3, 1, 1, 3, 0),
                ("put", "publish", 1500, 1500, 0, 0, 0, 7500),
                ("list", "open", 1, 2, 0, 0, 0, 0),
                ("delete", "gc", 1, 2, 0, 0, 0, 0),
            ]
        );
        assert_eq!(store.requests(), 1507);
    }
}
