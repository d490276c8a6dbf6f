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
//! Listings are in `s3_list`, deletions in `s3_delete`.

use super::clock::StoreClock;
use super::dir_io::plain;
use super::key::{check_dir, check_key, check_metadata, check_range, join};
use super::retry::{Again, Failure, Progress, retry};
use super::s3_body::Upload;
use super::s3_client::Reloading;
pub use super::s3_config::S3Config;
use super::s3_error::{Asked, explain};
use super::s3_read::{Writer, opened, read_body, sorted};
use super::s3_reason::said;
use super::{
    Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, RetryPolicy, StoreError, StoreResult,
};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_smithy_types::DateTime;
use aws_smithy_types::byte_stream::ByteStream;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::{Semaphore, SemaphorePermit};

/// See the module.
pub struct S3Store {
    client: Reloading,
    clock: StoreClock,
    pub(super) bucket: String,
    prefix: String,
    policy: RetryPolicy,
    slots: Semaphore,
    sent: AtomicU64,
    pub(super) no_bulk_delete: AtomicBool,
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

    pub(super) fn full_key(&self, key: &str) -> StoreResult<String> {
        check_key(key)?;
        let full = join(&self.prefix, key);
        check_key(&full)?;
        Ok(full)
    }

    /// The prefix of all keys in `dir`, with its final slash; empty for the whole bucket.
    pub(super) fn full_dir(&self, dir: &str) -> StoreResult<String> {
        check_dir(dir)?;
        let full = if dir.is_empty() { self.prefix.clone() } else { join(&self.prefix, dir) };
        Ok(if full.is_empty() { full } else { full + "/" })
    }

    /// Runs one request with retries; each attempt has a slot and is counted.
    pub(super) async fn request<T, F, Fut>(
        &self,
        what: &str,
        key: &str,
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
                let mut outcome = attempt(client, progress).await;
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
        let get = self.request("GET", key, |client, progress| {
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
        });
        said(why, get).await
    }

    async fn download(&self, key: &str, file: &File, why: Reason) -> StoreResult<ObjectMeta> {
        let full = self.full_key(key)?;
        let file = Arc::new(file.try_clone().map_err(|e| plain(e, "local file"))?);
        let get = self.request("GET", key, |client, progress| {
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
        });
        said(why, get).await
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
        let put = self.request("PUT", key, |client, progress| {
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
        });
        said(why, put).await
    }

    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        let full = &self.full_key(key)?;
        let head = self.request("HEAD", key, |client, _| async move {
            client
                .head_object()
                .bucket(&self.bucket)
                .key(full)
                .send()
                .await
                .map_err(|e| explain(e, key, Asked::Head))
        });
        let answer = said(why, head).await;
        let answer = match answer {
            Err(StoreError::NotFound { .. }) => {
                let get = self.request("GET", key, |client, _| async move {
                    let (meta, _, _) = self.start_get(&client, key, full, None).await?;
                    Ok(meta)
                });
                return said(why, get).await;
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
        said(why, self.list_range(dir, start_after, None, usize::MAX)).await
    }

    async fn list_before(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: &str,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        said(why, self.list_range(dir, start_after, Some(before), usize::MAX)).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        said(why, self.list_range(dir, start_after, None, most)).await
    }

    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        said(why, self.dirs(dir)).await
    }

    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        said(why, self.delete_all(keys)).await
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
