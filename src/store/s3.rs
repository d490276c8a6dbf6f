//! S3 and what speaks its protocol: `s3://bucket/prefix`.
//!
//! The SDK signs, sends and parses; what may pass is retried here (see [`super::retry`]), so
//! that one policy holds for all requests and each attempt is counted. Every put carries the MD5
//! of its body, which even simple servers verify; every body that is read is checked for its
//! length, since a connection that breaks looks like an end.
//!
//! A conditional put is retried like any other: if the answer to the first attempt was lost, the
//! second one meets our own object and the caller gets `Precondition`, reads back and compares.
//!
//! A HEAD that says 404 does not say whether the key or the bucket is missing. The two must not
//! be mixed up (I4): it is asked again with a GET, whose error has a body.
//!
//! Listings are asked for one directory (delimiter `/`) and sorted here: some servers do not
//! sort by bytes across directories.

use super::clock::StoreClock;
use super::dir_io::plain;
use super::key::{check_dir, check_key, check_metadata, check_range, join, name_after};
use super::retry::{Again, Failure, Progress, retry};
use super::s3_body::Upload;
use super::s3_client::Reloading;
pub use super::s3_config::S3Config;
use super::s3_error::{Asked, chain, explain};
use super::s3_read::{Writer, opened, read_body, sorted};
use super::s3_reason;
use super::s3_whole::WholeXml;
use super::{
    Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, RetryPolicy, StoreError, StoreResult,
};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use aws_smithy_types::DateTime;
use aws_smithy_types::byte_stream::ByteStream;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Keys per bulk delete.
const BULK: usize = 1000;
/// Single deletes in flight where bulk deletes are refused.
const SINGLE_DELETES: usize = 16;

/// The root elements of answers.
const LISTED: &str = "ListBucketResult";
pub(super) const DELETED: &str = "DeleteResult";

/// See the module.
pub struct S3Store {
    client: Reloading,
    clock: StoreClock,
    bucket: String,
    prefix: String,
    policy: RetryPolicy,
    slots: Semaphore,
    sent: AtomicU64,
    no_bulk_delete: AtomicBool,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3Store").field(&self.describe()).finish()
    }
}

impl S3Store {
    /// Makes the client; nothing is asked of the store yet.
    ///
    /// # Errors
    /// `Denied` for half of a key pair, `Unsupported` for an endpoint that is no URL,
    /// `NoSuchStore` if no region is known.
    pub async fn connect(config: S3Config) -> StoreResult<S3Store> {
        let clock = StoreClock::default();
        Ok(S3Store {
            bucket: config.bucket.clone(),
            prefix: config.prefix.clone(),
            policy: config.retry.clone(),
            clock: clock.clone(),
            slots: Semaphore::new(config.max_requests.max(1)),
            client: Reloading::new(config, clock).await?,
            sent: AtomicU64::new(0),
            no_bulk_delete: AtomicBool::new(false),
        })
    }

    fn full_key(&self, key: &str) -> StoreResult<String> {
        check_key(key)?;
        let full = join(&self.prefix, key);
        check_key(&full)?;
        Ok(full)
    }

    /// The prefix of all keys in `dir`, with its final slash; empty for the whole bucket.
    fn full_dir(&self, dir: &str) -> StoreResult<String> {
        check_dir(dir)?;
        let full = if dir.is_empty() { self.prefix.clone() } else { join(&self.prefix, dir) };
        Ok(if full.is_empty() { full } else { full + "/" })
    }

    /// Runs one request with retries; each attempt has a slot, is counted, and says why it is made.
    async fn request<T, F, Fut>(
        &self,
        what: &str,
        key: &str,
        why: Reason,
        attempt: F,
    ) -> StoreResult<T>
    where
        F: Fn(Client, Progress) -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let what = format!("{what} {key}");
        retry(&self.policy, &what, |progress| {
            let attempt = &attempt;
            async move {
                let slot = self.slot(&progress).await;
                progress.add(0);
                self.sent.fetch_add(1, Ordering::Relaxed);
                let (client, version) = self.client.get();
                let mut outcome = s3_reason::said(why, attempt(client, progress)).await;
                drop(slot);
                if let Err(Failure { error: StoreError::Denied { .. }, again }) = &mut outcome
                    && self.client.renew(version).await
                {
                    *again = Again::Yes;
                }
                outcome
            }
        })
        .await
    }

    /// Waits for a free slot. That is no silence of the store: only the deadline ends it.
    async fn slot(&self, progress: &Progress) -> Option<SemaphorePermit<'_>> {
        let mut slot = std::pin::pin!(self.slots.acquire());
        loop {
            match tokio::time::timeout(self.policy.attempt_timeout / 2, &mut slot).await {
                // The semaphore is never closed.
                Ok(slot) => return slot.ok(),
                Err(_) => progress.add(0),
            }
        }
    }

    /// One attempt of a GET, up to the start of the body.
    async fn start_get(
        &self,
        client: &Client,
        key: &str,
        full: &str,
        range: Option<&Range<u64>>,
    ) -> Result<(ObjectMeta, u64, ByteStream), Failure> {
        let header = range.map(|r| format!("bytes={}-{}", r.start, r.end.saturating_sub(1)));
        let answer = client
            .get_object()
            .bucket(&self.bucket)
            .key(full)
            .set_range(header)
            .send()
            .await
            .map_err(|e| explain(e, key, Asked::Object))?;
        opened(key, range, answer)
    }

    async fn page(
        &self,
        dir: &str,
        prefix: &str,
        start_after: Option<&str>,
        token: Option<&str>,
        why: Reason,
    ) -> StoreResult<ListObjectsV2Output> {
        self.request("LIST", dir, why, |client, _| async move {
            client
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(prefix)
                .delimiter("/")
                .set_start_after(start_after.map(|name| format!("{prefix}{name}")))
                .set_continuation_token(token.map(str::to_owned))
                .customize()
                .interceptor(WholeXml { root: LISTED })
                .send()
                .await
                .map_err(|e| explain(e, dir, Asked::Bucket))
        })
        .await
    }

    /// The pages of a listing, each given to `take`, until that has enough.
    async fn pages(
        &self,
        dir: &str,
        prefix: &str,
        start_after: Option<&str>,
        why: Reason,
        mut take: impl FnMut(ListObjectsV2Output) -> bool,
    ) -> StoreResult<()> {
        let mut token: Option<String> = None;
        loop {
            let mut page = self.page(dir, prefix, start_after, token.as_deref(), why).await?;
            let more = page.is_truncated().unwrap_or(page.next_continuation_token().is_some());
            let next = page.next_continuation_token.take();
            if !take(page) || !more {
                return Ok(());
            }
            // Without a new token the rest is out of reach, and a part is not a listing.
            if next.is_none() || next == token {
                let detail = "a listing that goes on without saying where".to_owned();
                return Err(StoreError::BadBody { key: dir.to_owned(), detail });
            }
            token = next;
        }
    }

    async fn list_range(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let prefix = self.full_dir(dir)?;
        let after = name_after(dir, start_after)?;
        let mut found = Vec::new();
        self.pages(dir, &prefix, after, why, |page| {
            let mut more = true;
            for object in page.contents.unwrap_or_default() {
                let name = object.key.as_deref().and_then(|key| key.strip_prefix(&prefix));
                // Not ours: markers of directories, names that are no keys.
                let Some(name) = name.filter(|n| !n.contains('/') && check_key(n).is_ok()) else {
                    continue;
                };
                if after.is_some_and(|after| name <= after) {
                    continue;
                }
                let key = join(dir, name);
                if before.is_some_and(|before| key.as_str() >= before) {
                    more = false;
                    continue;
                }
                found.push(ObjectMeta {
                    key,
                    size: object.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
                    etag: object.e_tag.map(ETag),
                    modified: object.last_modified.as_ref().map(DateTime::secs),
                    metadata: Vec::new(),
                });
            }
            more && found.len() < most
        })
        .await?;
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found.dedup_by(|a, b| a.key == b.key);
        found.truncate(most);
        Ok(found)
    }

    async fn delete_one(&self, key: &str, why: Reason) -> StoreResult<()> {
        let full = &self.full_key(key)?;
        let deleted = self
            .request("DELETE", key, why, |client, _| async move {
                client
                    .delete_object()
                    .bucket(&self.bucket)
                    .key(full)
                    .send()
                    .await
                    .map_err(|e| explain(e, key, Asked::Object))
            })
            .await;
        match deleted {
            Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn delete_each(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        let deletes: Vec<_> = keys.iter().map(|key| self.delete_one(key, why)).collect();
        stream::iter(deletes).buffer_unordered(SINGLE_DELETES).try_collect::<()>().await
    }

    /// Deletes up to [`BULK`] keys by one request; gives those that it did not delete.
    async fn delete_bulk(&self, keys: &[String], why: Reason) -> StoreResult<Vec<String>> {
        let mut by_full = HashMap::with_capacity(keys.len());
        let mut objects = Vec::with_capacity(keys.len());
        for key in keys {
            let full = self.full_key(key)?;
            let object = ObjectIdentifier::builder().key(&full).build();
            objects.push(object.map_err(|e| StoreError::Unsupported { detail: chain(&e) })?);
            by_full.insert(full, key);
        }
        let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build();
        let delete = &delete.map_err(|e| StoreError::Unsupported { detail: chain(&e) })?;
        let first = keys.first().map_or("", String::as_str);
        let answer = self
            .request("DELETE several", first, why, |client, _| async move {
                client
                    .delete_objects()
                    .bucket(&self.bucket)
                    .delete(delete.clone())
                    .customize()
                    .interceptor(WholeXml { root: DELETED })
                    .send()
                    .await
                    .map_err(|e| explain(e, first, Asked::Bucket))
            })
            .await?;
        let mut left = Vec::new();
        for error in answer.errors() {
            if error.code() == Some("NoSuchKey") {
                continue;
            }
            match error.key().and_then(|full| by_full.get(full)) {
                Some(key) => left.push((*key).clone()),
                // It failed for a key that we do not know: all may be meant.
                None => return Ok(keys.to_vec()),
            }
        }
        Ok(left)
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    fn describe(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        format!("s3://{}{slash}{}", self.bucket, self.prefix)
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let full = self.full_key(key)?;
        if let Some(range) = &range {
            check_range(key, u64::MAX, Some(range), limit)?;
        }
        self.request("GET", key, why, |client, progress| {
            let (full, range) = (&full, range.as_ref());
            async move {
                let (meta, len, body) = self.start_get(&client, key, full, range).await?;
                check_range(key, len, None, limit).map_err(Failure::last)?;
                let mut bytes = BytesMut::with_capacity(usize::try_from(len).unwrap_or(0));
                read_body(key, len, body, &progress, |piece| {
                    bytes.extend_from_slice(&piece);
                    std::future::ready(Ok(()))
                })
                .await?;
                Ok((meta, bytes.freeze()))
            }
        })
        .await
    }

    async fn download(&self, key: &str, file: &File, why: Reason) -> StoreResult<ObjectMeta> {
        let full = self.full_key(key)?;
        let file = Arc::new(file.try_clone().map_err(|e| plain(e, "local file"))?);
        self.request("GET", key, why, |client, progress| {
            let (full, file) = (&full, &file);
            async move {
                let (meta, len, body) = self.start_get(&client, key, full, None).await?;
                let mut writer = Writer::new(file.clone());
                let shared = tokio::sync::Mutex::new(&mut writer);
                read_body(key, len, body, &progress, |piece| {
                    let shared = &shared;
                    async move { shared.lock().await.add(&piece).await }
                })
                .await?;
                writer.flush().await?;
                Ok(meta)
            }
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
        let full = self.full_key(key)?;
        check_metadata(metadata)?;
        let upload = Upload::prepare(key, body).await?;
        let md5 = aws_smithy_types::base64::encode(upload.md5);
        let metadata: Option<HashMap<_, _>> =
            (!metadata.is_empty()).then(|| metadata.iter().cloned().collect());
        let (asked, none_match, if_match) = match &mode {
            PutMode::Overwrite => (Asked::Object, None, None),
            PutMode::Create => (Asked::Conditional, Some("*".to_owned()), None),
            PutMode::Update(tag) => (Asked::Conditional, None, Some(tag.0.clone())),
        };
        self.request("PUT", key, why, |client, progress| {
            let body = upload.stream(progress);
            let request = client
                .put_object()
                .bucket(&self.bucket)
                .key(&full)
                .content_length(i64::try_from(upload.len).unwrap_or(i64::MAX))
                .content_md5(&md5)
                .set_metadata(metadata.clone())
                .set_if_none_match(none_match.clone())
                .set_if_match(if_match.clone())
                .body(body);
            async move {
                let answer = request.send().await.map_err(|e| explain(e, key, asked))?;
                // Somebody's page with status 200 is not the store's word for "written".
                answer.e_tag.map(ETag).ok_or_else(|| {
                    let detail = format!("{key}: an answer to a write without a tag");
                    Failure::passing(StoreError::Unavailable { detail })
                })
            }
        })
        .await
    }

    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        let full = &self.full_key(key)?;
        let answer = self
            .request("HEAD", key, why, |client, _| async move {
                client
                    .head_object()
                    .bucket(&self.bucket)
                    .key(full)
                    .send()
                    .await
                    .map_err(|e| explain(e, key, Asked::Head))
            })
            .await;
        let answer = match answer {
            Err(StoreError::NotFound { .. }) => {
                return self
                    .request("GET", key, why, |client, _| async move {
                        let (meta, _, _) = self.start_get(&client, key, full, None).await?;
                        Ok(meta)
                    })
                    .await;
            }
            answer => answer?,
        };
        let Some(size) = answer.content_length().and_then(|len| u64::try_from(len).ok()) else {
            let detail = "an answer without a length".to_owned();
            return Err(StoreError::BadBody { key: key.to_owned(), detail });
        };
        Ok(ObjectMeta {
            key: key.to_owned(),
            size,
            etag: answer.e_tag.map(ETag),
            modified: answer.last_modified.as_ref().map(DateTime::secs),
            metadata: sorted(answer.metadata),
        })
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.list_range(dir, start_after, None, usize::MAX, why).await
    }

    async fn list_before(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: &str,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.list_range(dir, start_after, Some(before), usize::MAX, why).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        self.list_range(dir, start_after, None, most, why).await
    }

    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        let prefix = self.full_dir(dir)?;
        let mut names = Vec::new();
        self.pages(dir, &prefix, None, why, |page| {
            for common in page.common_prefixes.unwrap_or_default() {
                let name = common.prefix.as_deref().and_then(|p| p.strip_prefix(&prefix));
                let name = name.and_then(|name| name.strip_suffix('/'));
                if let Some(name) = name.filter(|name| check_key(name).is_ok()) {
                    names.push(name.to_owned());
                }
            }
            true
        })
        .await?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        for key in keys {
            self.full_key(key)?;
        }
        for keys in keys.chunks(BULK) {
            if keys.len() == 1 || self.no_bulk_delete.load(Ordering::Relaxed) {
                self.delete_each(keys, why).await?;
                continue;
            }
            match self.delete_bulk(keys, why).await {
                Ok(left) => self.delete_each(&left, why).await?,
                Err(error @ (StoreError::NoSuchStore { .. } | StoreError::Denied { .. })) => {
                    return Err(error);
                }
                Err(error) => {
                    let refused = matches!(error, StoreError::Unsupported { .. });
                    if refused {
                        self.no_bulk_delete.store(true, Ordering::Relaxed);
                    }
                    tracing::debug!(%error, refused, "bulk delete failed, deleting one by one");
                    self.delete_each(keys, why).await?;
                }
            }
        }
        Ok(())
    }

    fn time(&self) -> Option<i64> {
        self.clock.now()
    }

    fn wire_requests(&self) -> Option<u64> {
        Some(self.sent.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn secrets_are_not_printed_and_contradictions_refused() {
        let config = S3Config {
            bucket: "b".into(),
            prefix: "p".into(),
            endpoint: Some("http://127.0.0.1:1".into()),
            access_key_id: Some("id".into()),
            secret_access_key: Some("verysecret".into()),
            session_token: Some("tokensecret".into()),
            ..S3Config::default()
        };
        let store = S3Store::connect(config.clone()).await.unwrap();
        let shown = format!("{config:?} {store:?}");
        assert!(!shown.contains("secret\"") && !shown.contains("verysecret"), "{shown}");
        assert!(!shown.contains("tokensecret"), "{shown}");
        assert_eq!(store.describe(), "s3://b/p");
        let half = S3Config { secret_access_key: None, ..config.clone() };
        assert!(matches!(S3Store::connect(half).await, Err(StoreError::Denied { .. })));
        let odd = S3Config { endpoint: Some("127.0.0.1:1".into()), ..config };
        assert!(matches!(S3Store::connect(odd).await, Err(StoreError::Unsupported { .. })));
    }
}
