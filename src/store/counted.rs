//! Counts and logs every request that passes: the one place where it is known why the store was
//! asked.

use super::health::{Health, HealthNow};
use super::{Body, ETag, ObjectMeta, ObjectStore, Op, PutMode, Reason, StoreError, StoreResult};
use crate::histogram::{Durations, Histogram};
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
    /// Calls that nobody waited for to their end. Whether the store carried them out is not known.
    pub abandoned: u64,
    /// The time that calls took, those that failed included.
    pub time: Durations,
    /// The time of the slowest one.
    pub slowest: Duration,
}

#[derive(Debug)]
struct Row {
    counts: CountRow,
    time: Histogram,
}

/// See the module.
#[derive(Debug)]
pub struct CountedStore {
    inner: Arc<dyn ObjectStore>,
    rows: Mutex<BTreeMap<(Op, Reason), Row>>,
    health: Health,
}

/// Counts a call as abandoned unless it comes to its end.
struct Call<'a> {
    store: &'a CountedStore,
    op: Op,
    why: Reason,
    ended: bool,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.store.row(self.op, self.why, |row| {
                row.counts.calls += 1;
                row.counts.requests += 1;
                row.counts.abandoned += 1;
            });
        }
    }
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
        CountedStore { inner, rows: Mutex::default(), health: Health::default() }
    }

    /// All rows with at least one call, by kind and reason.
    pub fn snapshot(&self) -> Vec<CountRow> {
        let rows = self.rows.lock();
        rows.values().map(|row| CountRow { time: row.time.read(), ..row.counts.clone() }).collect()
    }

    /// Whether the store answers, and since when not.
    pub fn health(&self) -> HealthNow {
        self.health.now(Instant::now())
    }

    /// The requests of all rows together.
    pub fn requests(&self) -> u64 {
        self.rows.lock().values().map(|row| row.counts.requests).sum()
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
        let mut call = Call { store: self, op, why, ended: false };
        let answer = request.await;
        call.ended = true;
        let end = Instant::now();
        let took = end.saturating_duration_since(start);
        self.health.ended(start, end, answer.as_ref().err());
        let reason = why.0;
        let ms = took.as_millis() as u64;
        match &answer {
            Ok(_) => tracing::debug!(%op, reason, key, ms, "store request"),
            Err(error) => tracing::debug!(%op, reason, key, ms, %error, "store request failed"),
        }
        if took >= SLOW {
            tracing::warn!(%op, reason, key, ms, "slow store request");
        }
        self.row(op, why, |row| {
            row.time.add(took);
            let counts = &mut row.counts;
            counts.calls += 1;
            counts.slowest = counts.slowest.max(took);
            let volume = match &answer {
                Ok(value) => volume(value),
                Err(StoreError::NotFound { .. } | StoreError::Precondition { .. }) => {
                    counts.refusals += 1;
                    Volume::NONE
                }
                Err(_) => {
                    counts.errors += 1;
                    Volume::NONE
                }
            };
            counts.requests += volume.requests as u64;
            counts.bytes_in += volume.bytes_in;
            counts.bytes_out += volume.bytes_out;
        });
        answer
    }

    fn row(&self, op: Op, why: Reason, change: impl FnOnce(&mut Row)) {
        let mut rows = self.rows.lock();
        change(rows.entry((op, why)).or_insert_with(|| Row {
            counts: CountRow {
                op,
                reason: why.0,
                calls: 0,
                requests: 0,
                errors: 0,
                refusals: 0,
                bytes_in: 0,
                bytes_out: 0,
                abandoned: 0,
                time: Durations::default(),
                slowest: Duration::ZERO,
            },
            time: Histogram::default(),
        }));
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
        assert!(store.snapshot().iter().all(|row| row.time.count() == row.calls));
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_counted_all_the_same() {
        let store = CountedStore::new(Arc::new(MemStore::new()));
        drop(store.head("d/1", Reason("open")));
        assert_eq!(store.snapshot(), [], "it was not begun");
        let stuck =
            store.run(Op::Get, "k", Reason("open"), std::future::pending(), |()| Volume::NONE);
        assert!(tokio::time::timeout(Duration::from_millis(1), stuck).await.is_err());
        let rows = store.snapshot();
        assert_eq!((rows[0].calls, rows[0].requests, rows[0].abandoned), (1, 1, 1));
        assert_eq!(rows[0].time.count(), 0);
    }
}
