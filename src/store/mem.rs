//! A store in memory, for tests and for simulations: conditional writes are exact, nothing
//! fails, nothing is kept.

use super::key::{check_dir, check_key, check_metadata, check_range, join, name_after};
use super::{Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, StoreError, StoreResult};
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Bound, Range};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// See the module. Clones share their objects.
#[derive(Clone)]
pub struct MemStore {
    state: Arc<Mutex<State>>,
    clock: Clock,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Object>,
    writes: u64,
}

#[derive(Clone)]
struct Object {
    bytes: Bytes,
    etag: ETag,
    modified: i64,
    metadata: Vec<(String, String)>,
}

impl Object {
    fn meta(&self, key: &str, with_metadata: bool) -> ObjectMeta {
        ObjectMeta {
            key: key.to_owned(),
            size: self.bytes.len() as u64,
            etag: Some(self.etag.clone()),
            modified: Some(self.modified),
            metadata: if with_metadata { self.metadata.clone() } else { Vec::new() },
        }
    }
}

impl fmt::Debug for MemStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemStore").field("objects", &self.state.lock().objects.len()).finish()
    }
}

impl Default for MemStore {
    fn default() -> Self {
        MemStore::new()
    }
}

impl MemStore {
    /// An empty store with the machine's clock.
    pub fn new() -> MemStore {
        MemStore::with_clock(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        })
    }

    /// An empty store whose objects are dated by `clock`, in seconds since 1970.
    pub fn with_clock(clock: impl Fn() -> i64 + Send + Sync + 'static) -> MemStore {
        MemStore { state: Arc::default(), clock: Arc::new(clock) }
    }

    /// All keys, in order.
    pub fn keys(&self) -> Vec<String> {
        self.state.lock().objects.keys().cloned().collect()
    }

    /// The bytes of one object.
    pub fn bytes_of(&self, key: &str) -> Option<Bytes> {
        self.state.lock().objects.get(key).map(|object| object.bytes.clone())
    }

    /// Replaces the bytes of an existing object behind everybody's back, keeping its tag: a
    /// damaged object. `false`: there is none.
    pub fn damage(&self, key: &str, bytes: impl Into<Bytes>) -> bool {
        match self.state.lock().objects.get_mut(key) {
            Some(object) => {
                object.bytes = bytes.into();
                true
            }
            None => false,
        }
    }

    fn find(&self, key: &str) -> StoreResult<Object> {
        check_key(key)?;
        let found = self.state.lock().objects.get(key).cloned();
        found.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })
    }
}

impl MemStore {
    fn first(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
    ) -> StoreResult<Vec<ObjectMeta>> {
        check_dir(dir)?;
        let after = name_after(dir, start_after)?.unwrap_or("");
        let from = join(dir, after);
        let state = self.state.lock();
        let prefix = join(dir, "");
        let rest =
            state.objects.range::<str, _>((Bound::Excluded(from.as_str()), Bound::Unbounded));
        Ok(rest
            .take_while(|(key, _)| key.starts_with(&prefix))
            .filter(|(key, _)| !key[prefix.len()..].contains('/'))
            .map(|(key, object)| object.meta(key, false))
            .take(most)
            .collect())
    }
}

#[async_trait]
impl ObjectStore for MemStore {
    fn describe(&self) -> String {
        "mem:".to_owned()
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        _why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let object = self.find(key)?;
        check_range(key, object.bytes.len() as u64, range.as_ref(), limit)?;
        let bytes = match range {
            Some(range) => object.bytes.slice(range.start as usize..range.end as usize),
            None => object.bytes.clone(),
        };
        Ok((object.meta(key, true), bytes))
    }

    async fn download(
        &self,
        key: &str,
        file: &std::fs::File,
        _why: Reason,
    ) -> StoreResult<ObjectMeta> {
        let object = self.find(key)?;
        file.write_all_at(&object.bytes, 0)
            .map_err(|e| StoreError::Unavailable { detail: format!("local file: {e}") })?;
        Ok(object.meta(key, true))
    }

    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        _why: Reason,
    ) -> StoreResult<ETag> {
        check_key(key)?;
        check_metadata(metadata)?;
        let bytes = match body {
            Body::Bytes(bytes) => bytes,
            Body::File { path, len } => {
                let bytes = std::fs::read(&path).map_err(|e| StoreError::Unavailable {
                    detail: format!("local file {}: {e}", path.display()),
                })?;
                if bytes.len() as u64 != len {
                    let detail = format!("local file has {} bytes, not {len}", bytes.len());
                    return Err(StoreError::BadBody { key: key.to_owned(), detail });
                }
                bytes.into()
            }
        };
        let mut metadata = metadata.to_vec();
        metadata.sort_unstable();
        let modified = (self.clock)();
        let mut state = self.state.lock();
        let present = state.objects.get(key).map(|object| &object.etag);
        let may = match &mode {
            PutMode::Overwrite => true,
            PutMode::Create => present.is_none(),
            PutMode::Update(tag) => present == Some(tag),
        };
        if !may {
            return Err(StoreError::Precondition { key: key.to_owned() });
        }
        state.writes += 1;
        let etag = ETag(format!("\"{}\"", state.writes));
        let object = Object { bytes, etag: etag.clone(), modified, metadata };
        state.objects.insert(key.to_owned(), object);
        Ok(etag)
    }

    async fn head(&self, key: &str, _why: Reason) -> StoreResult<ObjectMeta> {
        Ok(self.find(key)?.meta(key, true))
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        _why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.first(dir, start_after, usize::MAX)
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        _why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.first(dir, start_after, most)
    }

    async fn list_dirs(&self, dir: &str, _why: Reason) -> StoreResult<Vec<String>> {
        check_dir(dir)?;
        let prefix = join(dir, "");
        let state = self.state.lock();
        let names: BTreeSet<String> = state
            .objects
            .range::<str, _>((Bound::Included(prefix.as_str()), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&prefix))
            .filter_map(|(key, _)| Some(key[prefix.len()..].split_once('/')?.0.to_owned()))
            .collect();
        Ok(names.into_iter().collect())
    }

    async fn delete(&self, keys: &[String], _why: Reason) -> StoreResult<()> {
        for key in keys {
            check_key(key)?;
        }
        let mut state = self.state.lock();
        for key in keys {
            state.objects.remove(key);
        }
        Ok(())
    }

    fn time(&self) -> Option<i64> {
        Some((self.clock)())
    }
}
