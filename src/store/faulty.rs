//! A store that fails as a test tells it to: before the request, after it was carried out (the
//! lost answer), by silence, or by a wrong body.

use super::{Body, ETag, ObjectMeta, ObjectStore, Op, PutMode, Reason, StoreError, StoreResult};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;

/// A request as the hook sees it.
#[derive(Debug, Clone)]
pub struct Request {
    pub op: Op,
    /// The key, the directory of a listing, or the first key of a delete.
    pub key: String,
    pub why: Reason,
    /// 1 for the store's first request.
    pub nth: u64,
}

/// What becomes of a request.
#[derive(Clone)]
pub enum Fault {
    None,
    /// Nothing happens in the store.
    Before(StoreError),
    /// The store carries the request out, and the answer is lost.
    After(StoreError),
    /// Waits for the notification, then goes on.
    HangBefore(Arc<Notify>),
    /// The store carries the request out, then its answer waits for the notification.
    HangAfter(Arc<Notify>),
    /// A GET or a download yields these bytes (at their whole length, without an error).
    WrongBody(Bytes),
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::None => "None",
            Fault::Before(_) => "Before",
            Fault::After(_) => "After",
            Fault::HangBefore(_) => "HangBefore",
            Fault::HangAfter(_) => "HangAfter",
            Fault::WrongBody(_) => "WrongBody",
        })
    }
}

type Hook = Arc<dyn Fn(&Request) -> Fault + Send + Sync>;

/// See the module.
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    hook: Mutex<Option<Hook>>,
    down: AtomicBool,
    nth: AtomicU64,
    counts: Mutex<BTreeMap<Op, u64>>,
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn ObjectStore>) -> FaultyStore {
        FaultyStore {
            inner,
            hook: Mutex::default(),
            down: AtomicBool::new(false),
            nth: AtomicU64::new(0),
            counts: Mutex::default(),
        }
    }

    /// From now on `hook` decides about each request. It must not call the store.
    pub fn set_hook(&self, hook: impl Fn(&Request) -> Fault + Send + Sync + 'static) {
        *self.hook.lock() = Some(Arc::new(hook));
    }

    /// No faults from now on.
    pub fn clear_hook(&self) {
        *self.hook.lock() = None;
    }

    /// While down, every request fails as unavailable, before the hook is asked.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Requests of one kind so far, failed ones included.
    pub fn count(&self, op: Op) -> u64 {
        self.counts.lock().get(&op).copied().unwrap_or(0)
    }

    /// All requests so far.
    pub fn requests(&self) -> u64 {
        self.nth.load(Ordering::SeqCst)
    }

    fn fault(&self, op: Op, key: &str, why: Reason) -> Fault {
        let nth = self.nth.fetch_add(1, Ordering::SeqCst) + 1;
        *self.counts.lock().entry(op).or_default() += 1;
        if self.down.load(Ordering::SeqCst) {
            return Fault::Before(StoreError::Unavailable { detail: "set down".to_owned() });
        }
        let hook = self.hook.lock().clone();
        hook.map_or(Fault::None, |hook| hook(&Request { op, key: key.to_owned(), why, nth }))
    }

    async fn run<T>(
        fault: &Fault,
        request: impl Future<Output = StoreResult<T>>,
    ) -> StoreResult<T> {
        match fault {
            Fault::Before(error) => return Err(error.clone()),
            Fault::HangBefore(gate) => gate.notified().await,
            _ => {}
        }
        let answer = request.await;
        match fault {
            Fault::After(error) => return Err(error.clone()),
            Fault::HangAfter(gate) => gate.notified().await,
            _ => {}
        }
        answer
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
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
        let fault = self.fault(Op::Get, key, why);
        let (meta, bytes) = Self::run(&fault, self.inner.get(key, range, limit, why)).await?;
        match fault {
            Fault::WrongBody(wrong) => Ok((meta, wrong)),
            _ => Ok((meta, bytes)),
        }
    }

    async fn download(
        &self,
        key: &str,
        file: &std::fs::File,
        why: Reason,
    ) -> StoreResult<ObjectMeta> {
        let fault = self.fault(Op::Download, key, why);
        let meta = Self::run(&fault, self.inner.download(key, file, why)).await?;
        if let Fault::WrongBody(wrong) = fault {
            let unavailable = |e: std::io::Error| StoreError::Unavailable { detail: e.to_string() };
            file.set_len(wrong.len() as u64).map_err(unavailable)?;
            file.write_all_at(&wrong, 0).map_err(unavailable)?;
        }
        Ok(meta)
    }

    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        why: Reason,
    ) -> StoreResult<ETag> {
        let fault = self.fault(Op::Put, key, why);
        Self::run(&fault, self.inner.put(key, body, mode, metadata, why)).await
    }

    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        let fault = self.fault(Op::Head, key, why);
        Self::run(&fault, self.inner.head(key, why)).await
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let fault = self.fault(Op::List, dir, why);
        Self::run(&fault, self.inner.list(dir, start_after, why)).await
    }

    async fn list_before(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: &str,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let fault = self.fault(Op::List, dir, why);
        Self::run(&fault, self.inner.list_before(dir, start_after, before, why)).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let fault = self.fault(Op::List, dir, why);
        Self::run(&fault, self.inner.list_some(dir, start_after, most, why)).await
    }

    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        let fault = self.fault(Op::ListDirs, dir, why);
        Self::run(&fault, self.inner.list_dirs(dir, why)).await
    }

    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        let fault = self.fault(Op::Delete, keys.first().map_or("", String::as_str), why);
        Self::run(&fault, self.inner.delete(keys, why)).await
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

    const WHY: Reason = Reason("test");

    fn lost() -> StoreError {
        StoreError::Unavailable { detail: "lost".into() }
    }

    async fn put(store: &FaultyStore, key: &str) -> StoreResult<ETag> {
        store.put(key, Body::Bytes(Bytes::from_static(b"x")), PutMode::Create, &[], WHY).await
    }

    #[tokio::test]
    async fn faults_before_and_after() {
        let mem = MemStore::new();
        let store = FaultyStore::new(Arc::new(mem.clone()));
        store.set_hook(|request| match request.nth {
            1 => Fault::Before(lost()),
            2 => Fault::After(lost()),
            3 => Fault::WrongBody(Bytes::from_static(b"wrong")),
            _ => Fault::None,
        });
        assert!(put(&store, "a").await.is_err());
        assert!(mem.keys().is_empty());
        assert!(put(&store, "a").await.is_err());
        assert_eq!(mem.keys(), ["a"]);
        assert_eq!(store.get("a", None, 9, WHY).await.unwrap().1, "wrong");
        assert!(matches!(put(&store, "a").await, Err(StoreError::Precondition { .. })));
        store.set_down(true);
        assert!(store.head("a", WHY).await.is_err());
        assert_eq!((store.requests(), store.count(Op::Put), store.count(Op::Head)), (5, 3, 1));
    }

    #[tokio::test]
    async fn hangs_until_told() {
        let mem = MemStore::new();
        let store = Arc::new(FaultyStore::new(Arc::new(mem.clone())));
        let gate = Arc::new(Notify::new());
        let held = gate.clone();
        store.set_hook(move |_| Fault::HangAfter(held.clone()));
        let other = store.clone();
        let task = tokio::spawn(async move { put(&other, "a").await });
        while mem.keys().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(!task.is_finished());
        gate.notify_one();
        task.await.unwrap().unwrap();
    }
}
