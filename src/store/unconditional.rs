//! A store that refuses conditional writes, used as if it knew them.
//!
//! Only where the admin promised that a single backend uses the store: then nobody else can
//! write between our look and our write, and a condition would always hold. (A store that takes
//! conditions and ignores them needs nothing of this.)

use super::{Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, StoreResult};
use async_trait::async_trait;
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Unconditional(pub Arc<dyn ObjectStore>);

#[async_trait]
impl ObjectStore for Unconditional {
    fn describe(&self) -> String {
        self.0.describe()
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        self.0.get(key, range, limit, why).await
    }

    async fn download(
        &self,
        key: &str,
        file: &std::fs::File,
        why: Reason,
    ) -> StoreResult<ObjectMeta> {
        self.0.download(key, file, why).await
    }

    async fn put(
        &self,
        key: &str,
        body: Body,
        _mode: PutMode,
        metadata: &[(String, String)],
        why: Reason,
    ) -> StoreResult<ETag> {
        self.0.put(key, body, PutMode::Overwrite, metadata, why).await
    }

    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        self.0.head(key, why).await
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.0.list(dir, start_after, why).await
    }

    async fn list_before(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: &str,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.0.list_before(dir, start_after, before, why).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.0.list_some(dir, start_after, most, why).await
    }

    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        self.0.list_dirs(dir, why).await
    }

    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        self.0.delete(keys, why).await
    }

    fn time(&self) -> Option<i64> {
        self.0.time()
    }

    fn wire_requests(&self) -> Option<u64> {
        self.0.wire_requests()
    }
}
