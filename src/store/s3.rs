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

use super::dir_io::plain;
use super::key::{check_dir, check_key, check_metadata, check_range, join, name_after};
use super::retry::{Failure, Progress, retry};
use super::s3_body::Upload;
use super::s3_error::{Asked, chain, explain, explain_body};
use super::{
    Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, RetryPolicy, StoreError, StoreResult,
};
use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use aws_smithy_http_client::{Builder, tls};
use aws_smithy_types::DateTime;
use aws_smithy_types::byte_stream::ByteStream;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Semaphore;

/// Keys per bulk delete.
const BULK: usize = 1000;
/// Single deletes in flight where bulk deletes are refused.
const SINGLE_DELETES: usize = 16;
/// A download is written in pieces of about this size.
const WRITE_PIECE: usize = 1 << 20;

/// How to reach the bucket.
#[derive(Clone)]
pub struct S3Config {
    pub bucket: String,
    /// Empty, or a key without slashes at its ends.
    pub prefix: String,
    /// `http://host:port` or `https://host`; `None`: Amazon's, or what the AWS environment says.
    pub endpoint: Option<String>,
    /// `None`: what the AWS environment says, or `us-east-1` if there is an endpoint.
    pub region: Option<String>,
    /// The bucket as first component of the path, not as part of the host name.
    pub path_style: bool,
    /// `None`: credentials are taken where AWS tools look for them.
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<String>,
    pub session_token: Option<String>,
    /// Send and check the CRCs of newer S3 on each request, beside the MD5 of puts. Some servers
    /// do not understand them.
    pub request_checksums: bool,
    pub retry: RetryPolicy,
    /// Requests in flight at most; others wait.
    pub max_requests: usize,
}

impl Default for S3Config {
    fn default() -> Self {
        S3Config {
            bucket: String::new(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: false,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            request_checksums: false,
            retry: RetryPolicy::default(),
            max_requests: 64,
        }
    }
}

impl fmt::Debug for S3Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = |secret: &Option<String>| secret.as_ref().map(|_| "(hidden)");
        f.debug_struct("S3Config")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("path_style", &self.path_style)
            .field("access_key_id", &self.access_key_id)
            .field("secret_access_key", &hidden(&self.secret_access_key))
            .field("session_token", &hidden(&self.session_token))
            .field("request_checksums", &self.request_checksums)
            .field("retry", &self.retry)
            .field("max_requests", &self.max_requests)
            .finish()
    }
}

/// See the module.
pub struct S3Store {
    client: Client,
    bucket: String,
    prefix: String,
    policy: RetryPolicy,
    slots: Arc<Semaphore>,
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
        let endpoint = config.endpoint.as_deref();
        if let Some(url) = endpoint
            && !url.starts_with("http://")
            && !url.starts_with("https://")
        {
            let detail = format!("the endpoint {url:?} must begin with http:// or https://");
            return Err(StoreError::Unsupported { detail });
        }
        let keys = match (&config.access_key_id, &config.secret_access_key) {
            (Some(id), Some(secret)) => {
                let token = config.session_token.clone();
                Some(Credentials::new(id, secret, token, None, "configuration"))
            }
            (None, None) => None,
            _ => {
                let detail = "access key id and secret access key are given only together";
                return Err(StoreError::Denied { detail: detail.to_owned() });
            }
        };
        // Where no TLS is needed, a machine without root certificates will do.
        let plain_http = keys.is_some() && endpoint.is_some_and(|url| url.starts_with("http://"));
        let http = if plain_http {
            Builder::new().build_http()
        } else {
            let ring = tls::rustls_provider::CryptoMode::Ring;
            Builder::new().tls_provider(tls::Provider::Rustls(ring)).build_https()
        };
        let behavior = BehaviorVersion::v2026_01_12();
        let mut loader = aws_config::defaults(behavior).http_client(http);
        if let Some(keys) = keys {
            loader = loader.credentials_provider(keys);
        }
        if let Some(url) = endpoint {
            loader = loader.endpoint_url(url);
        }
        if let Some(region) = &config.region {
            loader = loader.region(Region::new(region.clone()));
        } else if plain_http {
            loader = loader.region(
                aws_config::meta::region::RegionProviderChain::first_try(
                    aws_config::environment::EnvironmentVariableRegionProvider::new(),
                )
                .or_else("us-east-1"),
            );
        }
        let shared = loader.load().await;
        let mut builder = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(config.path_style)
            .retry_config(RetryConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder().connect_timeout(config.retry.attempt_timeout).build(),
            )
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        if shared.region().is_none() {
            if shared.endpoint_url().is_none() {
                let detail = "no region is known for the bucket: set one".to_owned();
                return Err(StoreError::NoSuchStore { detail });
            }
            builder = builder.region(Region::from_static("us-east-1"));
        }
        builder = if config.request_checksums {
            builder
                .request_checksum_calculation(RequestChecksumCalculation::WhenSupported)
                .response_checksum_validation(ResponseChecksumValidation::WhenSupported)
        } else {
            builder
                .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
                .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        };
        Ok(S3Store {
            client: Client::from_conf(builder.build()),
            bucket: config.bucket,
            prefix: config.prefix,
            policy: config.retry,
            slots: Arc::new(Semaphore::new(config.max_requests.max(1))),
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

    /// Runs one request with retries; each attempt has a slot and is counted.
    async fn request<T, F, Fut>(&self, what: &str, key: &str, attempt: F) -> StoreResult<T>
    where
        F: Fn(Progress) -> Fut,
        Fut: Future<Output = Result<T, Failure>>,
    {
        let what = format!("{what} {key}");
        retry(&self.policy, &what, |progress| {
            let attempt = &attempt;
            async move {
                let slot = self.slots.acquire().await;
                progress.add(0);
                self.sent.fetch_add(1, Ordering::Relaxed);
                let outcome = attempt(progress).await;
                drop(slot);
                outcome
            }
        })
        .await
    }

    /// One attempt of a GET, up to the start of the body.
    async fn start_get(
        &self,
        key: &str,
        full: &str,
        range: Option<&Range<u64>>,
    ) -> Result<(ObjectMeta, u64, ByteStream), Failure> {
        let header = range.map(|r| format!("bytes={}-{}", r.start, r.end.saturating_sub(1)));
        let answer = self
            .client
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
    ) -> StoreResult<ListObjectsV2Output> {
        self.request("LIST", dir, |_| async {
            self.client
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(prefix)
                .delimiter("/")
                .set_start_after(start_after.map(|name| format!("{prefix}{name}")))
                .set_continuation_token(token.map(str::to_owned))
                .send()
                .await
                .map_err(|e| explain(e, dir, Asked::Bucket))
        })
        .await
    }

    /// All pages of a listing, each given to `take`.
    async fn pages(
        &self,
        dir: &str,
        prefix: &str,
        start_after: Option<&str>,
        mut take: impl FnMut(ListObjectsV2Output),
    ) -> StoreResult<()> {
        let mut token: Option<String> = None;
        loop {
            let mut page = self.page(dir, prefix, start_after, token.as_deref()).await?;
            let more = page.is_truncated().unwrap_or(false);
            let next = page.next_continuation_token.take();
            take(page);
            if !more {
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

    async fn delete_one(&self, key: &str) -> StoreResult<()> {
        let full = self.full_key(key)?;
        let deleted = self
            .request("DELETE", key, |_| async {
                self.client
                    .delete_object()
                    .bucket(&self.bucket)
                    .key(&full)
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

    async fn delete_each(&self, keys: &[String]) -> StoreResult<()> {
        let deletes: Vec<_> = keys.iter().map(|key| self.delete_one(key)).collect();
        stream::iter(deletes).buffer_unordered(SINGLE_DELETES).try_collect::<()>().await
    }

    /// Deletes up to [`BULK`] keys by one request; gives those that it did not delete.
    async fn delete_bulk(&self, keys: &[String]) -> StoreResult<Vec<String>> {
        let mut by_full = HashMap::with_capacity(keys.len());
        let mut objects = Vec::with_capacity(keys.len());
        for key in keys {
            let full = self.full_key(key)?;
            let object = ObjectIdentifier::builder().key(&full).build();
            objects.push(object.map_err(|e| StoreError::Unsupported { detail: chain(&e) })?);
            by_full.insert(full, key);
        }
        let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build();
        let delete = delete.map_err(|e| StoreError::Unsupported { detail: chain(&e) })?;
        let first = keys.first().map_or("", String::as_str);
        let answer = self
            .request("DELETE several", first, |_| async {
                self.client
                    .delete_objects()
                    .bucket(&self.bucket)
                    .delete(delete.clone())
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

/// Checks the head of a GET's answer; gives what is known, the body's length, and the body.
fn opened(
    key: &str,
    range: Option<&Range<u64>>,
    answer: GetObjectOutput,
) -> Result<(ObjectMeta, u64, ByteStream), Failure> {
    let bad = |detail: String| StoreError::BadBody { key: key.to_owned(), detail };
    let Some(len) = answer.content_length().and_then(|len| u64::try_from(len).ok()) else {
        return Err(Failure::passing(bad("an answer without a length".to_owned())));
    };
    let mut size = len;
    if let Some(range) = range {
        let Some((from, total)) = answer.content_range().and_then(parse_content_range) else {
            let detail = format!("{key}: the store ignores that a part was asked for");
            return Err(Failure::last(StoreError::Unsupported { detail }));
        };
        check_range(key, total, Some(range), u64::MAX).map_err(Failure::last)?;
        if from != range.start || len != range.end - range.start {
            let detail = format!("{len} bytes from {from}, asked for {range:?}");
            return Err(Failure::passing(bad(detail)));
        }
        size = total;
    }
    let meta = ObjectMeta {
        key: key.to_owned(),
        size,
        etag: answer.e_tag.map(ETag),
        modified: answer.last_modified.as_ref().map(DateTime::secs),
        metadata: sorted(answer.metadata),
    };
    Ok((meta, len, answer.body))
}

/// First byte and total size of `bytes 5-9/20`.
fn parse_content_range(header: &str) -> Option<(u64, u64)> {
    let (part, total) = header.strip_prefix("bytes ")?.split_once('/')?;
    let (from, _) = part.split_once('-')?;
    Some((from.trim().parse().ok()?, total.trim().parse().ok()?))
}

fn sorted(metadata: Option<HashMap<String, String>>) -> Vec<(String, String)> {
    let lower = |(name, value): (String, String)| (name.to_ascii_lowercase(), value);
    let mut pairs: Vec<_> = metadata.unwrap_or_default().into_iter().map(lower).collect();
    pairs.sort_unstable();
    pairs
}

/// Reads a body to its end, giving pieces to `take`; it must have exactly `len` bytes.
async fn read_body<F, Fut>(
    key: &str,
    len: u64,
    mut body: ByteStream,
    progress: &Progress,
    mut take: F,
) -> Result<(), Failure>
where
    F: FnMut(Bytes) -> Fut,
    Fut: Future<Output = Result<(), Failure>>,
{
    let mut got = 0;
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|e| explain_body(&e, key, got, len))?;
        got += piece.len() as u64;
        progress.add(piece.len() as u64);
        if got > len {
            break;
        }
        take(piece).await?;
    }
    if got == len {
        return Ok(());
    }
    let detail = format!("{got} bytes came, {len} were announced");
    Err(Failure::passing(StoreError::BadBody { key: key.to_owned(), detail }))
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
        _why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let full = self.full_key(key)?;
        if let Some(range) = &range {
            check_range(key, u64::MAX, Some(range), limit)?;
        }
        self.request("GET", key, |progress| {
            let (full, range) = (&full, range.as_ref());
            async move {
                let (meta, len, body) = self.start_get(key, full, range).await?;
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

    async fn download(&self, key: &str, file: &File, _why: Reason) -> StoreResult<ObjectMeta> {
        let full = self.full_key(key)?;
        let file = Arc::new(file.try_clone().map_err(|e| plain(e, "local file"))?);
        self.request("GET", key, |progress| {
            let (full, file) = (&full, &file);
            async move {
                let (meta, len, body) = self.start_get(key, full, None).await?;
                let mut writer = Writer { file: file.clone(), at: 0, waiting: BytesMut::new() };
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
        _why: Reason,
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
        let tag = self
            .request("PUT", key, |progress| {
                let body = upload.stream(progress);
                let request = self
                    .client
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
                    Ok(answer.e_tag)
                }
            })
            .await?;
        tag.map(ETag).ok_or_else(|| StoreError::Unsupported {
            detail: format!("{key}: written, but the store gives no tag for it"),
        })
    }

    async fn head(&self, key: &str, _why: Reason) -> StoreResult<ObjectMeta> {
        let full = self.full_key(key)?;
        let answer = self
            .request("HEAD", key, |_| async {
                self.client
                    .head_object()
                    .bucket(&self.bucket)
                    .key(&full)
                    .send()
                    .await
                    .map_err(|e| explain(e, key, Asked::Head))
            })
            .await;
        let answer = match answer {
            Err(StoreError::NotFound { .. }) => {
                return self
                    .request("GET", key, |_| async {
                        let (meta, _, _) = self.start_get(key, &full, None).await?;
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
        _why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let prefix = self.full_dir(dir)?;
        let after = name_after(dir, start_after)?;
        let mut found = Vec::new();
        self.pages(dir, &prefix, after, |page| {
            for object in page.contents.unwrap_or_default() {
                let name = object.key.as_deref().and_then(|key| key.strip_prefix(&prefix));
                // Not ours: markers of directories, names that are no keys.
                let Some(name) = name.filter(|n| !n.contains('/') && check_key(n).is_ok()) else {
                    continue;
                };
                if after.is_some_and(|after| name <= after) {
                    continue;
                }
                found.push(ObjectMeta {
                    key: join(dir, name),
                    size: object.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
                    etag: object.e_tag.map(ETag),
                    modified: object.last_modified.as_ref().map(DateTime::secs),
                    metadata: Vec::new(),
                });
            }
        })
        .await?;
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found.dedup_by(|a, b| a.key == b.key);
        Ok(found)
    }

    async fn list_dirs(&self, dir: &str, _why: Reason) -> StoreResult<Vec<String>> {
        let prefix = self.full_dir(dir)?;
        let mut names = Vec::new();
        self.pages(dir, &prefix, None, |page| {
            for common in page.common_prefixes.unwrap_or_default() {
                let name = common.prefix.as_deref().and_then(|p| p.strip_prefix(&prefix));
                let name = name.and_then(|name| name.strip_suffix('/'));
                if let Some(name) = name.filter(|name| check_key(name).is_ok()) {
                    names.push(name.to_owned());
                }
            }
        })
        .await?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    async fn delete(&self, keys: &[String], _why: Reason) -> StoreResult<()> {
        for key in keys {
            self.full_key(key)?;
        }
        for keys in keys.chunks(BULK) {
            if keys.len() == 1 || self.no_bulk_delete.load(Ordering::Relaxed) {
                self.delete_each(keys).await?;
                continue;
            }
            match self.delete_bulk(keys).await {
                Ok(left) => self.delete_each(&left).await?,
                Err(error @ (StoreError::NoSuchStore { .. } | StoreError::Denied { .. })) => {
                    return Err(error);
                }
                Err(error) => {
                    let refused = matches!(error, StoreError::Unsupported { .. });
                    if refused {
                        self.no_bulk_delete.store(true, Ordering::Relaxed);
                    }
                    tracing::debug!(%error, refused, "bulk delete failed, deleting one by one");
                    self.delete_each(keys).await?;
                }
            }
        }
        Ok(())
    }

    fn wire_requests(&self) -> Option<u64> {
        Some(self.sent.load(Ordering::Relaxed))
    }
}

/// Writes pieces of a body to their places in a file, outside of the async threads.
struct Writer {
    file: Arc<File>,
    at: u64,
    waiting: BytesMut,
}

impl Writer {
    async fn add(&mut self, piece: &[u8]) -> Result<(), Failure> {
        self.waiting.extend_from_slice(piece);
        if self.waiting.len() >= WRITE_PIECE { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        let piece = self.waiting.split().freeze();
        let (file, at) = (self.file.clone(), self.at);
        self.at += piece.len() as u64;
        tokio::task::spawn_blocking(move || file.write_all_at(&piece, at))
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))
            .map_err(|e| Failure::last(plain(e, "local file")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/20"), Some((5, 20)));
        for bad in ["", "bytes */20", "bytes 5-9/*", "5-9/20", "bytes 5/20"] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

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
