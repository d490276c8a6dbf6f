//! How a running mount is asked about and told things: a unix socket in its state directory.
//!
//! One connection carries one request: a JSON object on one line. The answer is JSON objects,
//! one a line: any number of `progress` and `alive`, then `done` or `error`. `alive` comes every two
//! seconds while there is nothing else to tell, so that a silent daemon is known to be one. Who may connect is decided by
//! the credentials the kernel reports for the peer: root, or the account the daemon runs as.
//!
//! After the final answer to `stop` the daemon keeps the connection until it is gone, so that
//! whoever waits for its end sees it as the end of the connection, also when it is killed.
//!
//! A symbolic link per mount in the run directory ([`place`]) lets commands find the socket.

pub mod caches;
pub mod care;
pub mod client;
pub mod gc;
pub mod http;
pub mod metrics;
pub mod place;
pub mod server;
mod status;

pub use status::{
    Aside, AtRisk, Backlog, CacheUse, Caches, Changes, Count, Damaged, Flushes, HostchangeStatus,
    LeaseStatus, OperationCount, RequestCount, Status, StoreHealth, UserStatus,
};

use async_trait::async_trait;
use caches::{CacheAnswer, CacheRequest, FlushRequest};
use care::{Care, Cared};
use gc::{GcReport, GcRequest};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::SocketAddr;
use tokio::sync::mpsc;

/// What the daemon offers to its admin.
#[async_trait]
pub trait AdminApi: Send + Sync + 'static {
    /// Uploads what users have changed.
    async fn flush(
        &self,
        what: FlushRequest,
        progress: &Progress,
    ) -> Result<FlushReport, AdminError>;

    /// Deletes what was dropped longer than the retention ago.
    async fn gc(&self, what: GcRequest, progress: &Progress) -> Result<GcReport, AdminError>;

    async fn status(&self) -> Status;

    /// All numbers, as OpenMetrics text.
    async fn metrics(&self) -> String;

    /// They are served over HTTP from now on.
    fn metrics_served(&self, _at: SocketAddr) {}

    /// Does something for users' data.
    async fn care(&self, _what: Care, _progress: &Progress) -> Result<Cared, AdminError> {
        Err(AdminError::new(ErrorKind::Usage, "this is not served here"))
    }

    /// Something about the caches, or about whole users.
    async fn caches(
        &self,
        _what: CacheRequest,
        _progress: &Progress,
    ) -> Result<CacheAnswer, AdminError> {
        Err(AdminError::new(ErrorKind::Usage, "this is not served here"))
    }

    /// Flushes everything and unmounts, within the configured time. Returns when the mount point
    /// is free again; the process then ends by itself. What could not be flushed is kept on
    /// local disk and told in the report.
    async fn stop(&self, progress: &Progress) -> Result<StopReport, AdminError>;
}

/// What a flush did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlushReport {
    /// Users whose changes are now in the store.
    pub flushed: u64,
    /// Users that had nothing to upload.
    pub unchanged: u64,
    /// Bytes uploaded.
    pub bytes: u64,
    /// User and reason, for each that could not be flushed; their changes stay on local disk.
    pub failed: Vec<(String, String)>,
    /// Names that are nobody's.
    pub unknown: Vec<String>,
}

/// How a mount ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StopReport {
    /// What only local disk holds now. All zero: everything is in the store.
    pub at_risk: AtRisk,
    /// The users concerned, the oldest changes first.
    pub users: Vec<UserStatus>,
    /// Processes that still held files open when the mount point was detached.
    pub holders: Vec<String>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct AdminError {
    pub kind: ErrorKind,
    pub text: String,
}

impl AdminError {
    pub fn new(kind: ErrorKind, text: impl Into<String>) -> AdminError {
        AdminError { kind, text: text.into() }
    }
}

/// Failures by meaning; each has its exit code in `cli::exit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense to this daemon.
    Usage,
    /// There is no such user.
    NoSuchUser,
    /// There is no such state or folder of the user.
    NotThere,
    /// The store or another resource fails for now: try again.
    TempFail,
    /// The caller may not do this.
    Denied,
    /// A defect, here or in stored data.
    Internal,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Flush(FlushRequest),
    Gc(GcRequest),
    Caches { what: CacheRequest },
    Status,
    Care { care: Care },
    Stop,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Reply {
    /// The work goes on.
    Alive,
    Progress(Told),
    Done(Answer),
    Error(AdminError),
}

/// The final answer to a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Flush(FlushReport),
    Gc(GcReport),
    Caches(CacheAnswer),
    Status(Box<Status>),
    Care(Cared),
    Stop(StopReport),
}

/// What a long operation says meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    Line(String),
    /// How far it is: so many of so many `users` and the like.
    Step {
        done: u64,
        of: u64,
        what: String,
    },
}

/// Where a long operation tells how far it is. Never blocks; what nobody reads is dropped.
#[derive(Clone)]
pub struct Progress(Option<mpsc::Sender<Told>>);

impl Progress {
    /// For callers that nobody watches.
    pub fn none() -> Progress {
        Progress(None)
    }

    fn channel() -> (Progress, mpsc::Receiver<Told>) {
        let (sender, receiver) = mpsc::channel(64);
        (Progress(Some(sender)), receiver)
    }

    /// One line for people.
    pub fn say(&self, text: impl Into<String>) {
        self.tell(Told::Line(text.into()));
    }

    pub fn step(&self, done: u64, of: u64, what: &str) {
        self.tell(Told::Step { done, of, what: what.to_owned() });
    }

    fn tell(&self, told: Told) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(told);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

#[cfg(test)]
mod tests;
