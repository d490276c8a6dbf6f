//! The object store: what vmailfs asks of it, and the stores it can use.
//!
//! The trait knows keys and bytes, nothing of mail. Every request carries a [`Reason`], which
//! is counted and logged with it. A store that fails is told apart from an object that is
//! absent (I4): only [`StoreError::NotFound`] means that the store itself said "not there".

pub use health::HealthNow;

use async_trait::async_trait;
use bytes::Bytes;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

mod clock;
pub mod counted;
pub mod dir;
mod dir_fs;
mod dir_io;
mod dir_list;
mod dir_put;
pub mod faulty;
mod health;
mod key;
pub mod mem;
pub mod probe;
pub mod retry;
pub mod s3;
mod s3_body;
mod s3_client;
mod s3_config;
mod s3_delete;
mod s3_error;
mod s3_list;
mod s3_read;
mod s3_reason;
mod s3_whole;
pub mod unconditional;
pub mod url;

/// The tag of one version of an object, as the store gave it; only compared for equality.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ETag(pub String);

/// Why a request is made: a short fixed word such as `publish`, `flush`, `open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reason(pub &'static str);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What is put: bytes in memory, or a whole file on local disk (it must not change meanwhile).
#[derive(Debug, Clone)]
pub enum Body {
    Bytes(Bytes),
    File { path: PathBuf, len: u64 },
}

/// Under which condition a put may happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutMode {
    /// Whether or not the object exists. For keys that are never written twice with other bytes.
    Overwrite,
    /// Only if no object has this key (`If-None-Match: *`).
    Create,
    /// Only if the object still has this tag (`If-Match`).
    Update(ETag),
}

/// What a listing, a HEAD or a GET tells about an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    pub key: String,
    pub size: u64,
    pub etag: Option<ETag>,
    /// Seconds since 1970 by the store's clock.
    pub modified: Option<i64>,
    /// User metadata (HEAD and GET only), sorted. Keys are lower case ASCII, values ASCII.
    pub metadata: Vec<(String, String)>,
}

/// What may go wrong, by meaning.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The store said that there is no such object.
    #[error("{key}: no such object")]
    NotFound { key: String },
    /// The condition of a put did not hold (412), or the store saw a concurrent writer (409).
    /// After a retried put it may be our own first attempt that succeeded: read back and compare.
    #[error("{key}: condition of the write does not hold")]
    Precondition { key: String },
    /// The store refused our credentials or rights.
    #[error("the store refuses access: {detail}")]
    Denied { detail: String },
    /// The store does not know what we asked for (conditional writes, for instance).
    #[error("the store does not support this: {detail}")]
    Unsupported { detail: String },
    /// A body that is not what it should be: short, too long, or failing its checksum.
    #[error("{key}: bad body: {detail}")]
    BadBody { key: String, detail: String },
    /// Local disk of a directory store is full.
    #[error("the store's disk is full: {detail}")]
    Full { detail: String },
    /// The bucket or the directory of the store itself does not exist.
    #[error("no such store: {detail}")]
    NoSuchStore { detail: String },
    /// Anything that may pass: timeouts, resets, 5xx, throttling. Retries were already made.
    #[error("the store does not answer: {detail}")]
    Unavailable { detail: String },
}

pub type StoreResult<T> = Result<T, StoreError>;

/// An object store. Implementations retry what may pass, within deadlines of their own.
///
/// Keys are relative to the store's prefix, printable ASCII without `\`, without leading,
/// trailing or double `/`, and without `.` or `..` components; the first component does not begin
/// with a dot, and no key is a directory of another one (the directory store could not hold it).
#[async_trait]
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// What the store is, for people: `file:///srv/mail` or `s3://bucket/prefix`.
    fn describe(&self) -> String;

    /// The object's bytes, or those of `range` (which must not be empty). The body's length is
    /// checked; a body above `limit` bytes, and a range that the object does not wholly have,
    /// is refused as [`StoreError::BadBody`]. The size told is that of the whole object.
    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)>;

    /// Writes the whole object into `file` (at its start, through positioned writes) without
    /// holding it in memory. `file` may hold part of it after an error. Not synced.
    async fn download(
        &self,
        key: &str,
        file: &std::fs::File,
        why: Reason,
    ) -> StoreResult<ObjectMeta>;

    /// Stores an object. On success it is durable in the store. Metadata is what [`ObjectMeta`]
    /// can hold: values printable ASCII without a space at either end or two in a row, 2 KiB in
    /// all (others are refused as [`StoreError::Unsupported`]). An update of an object that does
    /// not exist fails its condition.
    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        why: Reason,
    ) -> StoreResult<ETag>;

    /// What is known about an object, with its user metadata.
    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta>;

    /// All objects directly in `dir` (a key prefix without its final `/`), in ascending byte
    /// order of their keys, those after the key `start_after` only. Not recursive. A directory
    /// that does not exist is empty.
    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>>;

    /// The same up to, and without, the key `before`: where a store lists page by page, what comes
    /// later costs nothing.
    async fn list_before(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: &str,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let mut found = self.list(dir, start_after, why).await?;
        found.retain(|object| object.key.as_str() < before);
        Ok(found)
    }

    /// The first of these objects: `most` of them, or all if there are not so many. For who goes
    /// through a directory of any size without holding all of it; the next call starts after the
    /// last key of this one.
    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let mut found = self.list(dir, start_after, why).await?;
        found.truncate(most);
        Ok(found)
    }

    /// The names of the "directories" directly in `dir` (empty string: the store's root), sorted.
    /// One whose objects were all deleted may still be named for a while.
    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>>;

    /// Deletes objects, by bulk requests where the store has them (S3: 1000 keys each); one that
    /// is already gone is no error. After an error any of them may be gone.
    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()>;

    /// The store's own clock, seconds since 1970, as it told it last (no request is made); `None`:
    /// it has not told yet, or has none.
    fn time(&self) -> Option<i64> {
        None
    }

    /// How many requests went over the wire so far, each page of a listing and each retry
    /// included; `None` where there is no wire.
    fn wire_requests(&self) -> Option<u64> {
        None
    }
}

/// The kinds of requests, for counters and for injected faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    Get,
    Download,
    Put,
    Head,
    List,
    ListDirs,
    Delete,
}

impl Op {
    pub const ALL: [Op; 7] =
        [Op::Get, Op::Download, Op::Put, Op::Head, Op::List, Op::ListDirs, Op::Delete];

    /// The word for logs and counters.
    pub fn name(self) -> &'static str {
        match self {
            Op::Get => "get",
            Op::Download => "download",
            Op::Put => "put",
            Op::Head => "head",
            Op::List => "list",
            Op::ListDirs => "list_dirs",
            Op::Delete => "delete",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Limits on one request and on its retries; the configuration fills them.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// No bytes for so long: the attempt has failed.
    pub attempt_timeout: Duration,
    /// All attempts together.
    pub deadline: Duration,
    /// Pause before the second attempt; doubled each time, with jitter.
    pub first_pause: Duration,
    /// Number of attempts at most.
    pub attempts: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy {
            attempt_timeout: Duration::from_secs(10),
            deadline: Duration::from_secs(30),
            first_pause: Duration::from_millis(50),
            attempts: 5,
        }
    }
}
