//! What a mount tells about itself. The one question it must answer: is everything uploaded,
//! and if not, what is at risk?

use serde::{Deserialize, Serialize};

/// State of a mount. Fields that a daemon of another version does not know read as empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    pub pid: u32,
    pub mountpoint: String,
    /// As `ObjectStore::describe` tells it.
    pub store: String,
    pub state_dir: String,
    pub backend: String,
    pub single_backend: bool,
    /// Seconds since 1970.
    pub since: i64,
    /// Whether an unmount is under way.
    pub stopping: bool,
    pub lease: Option<LeaseStatus>,
    /// Where metrics are served over HTTP.
    pub metrics: Option<String>,
    pub store_health: StoreHealth,
    /// Users that are loaded.
    pub users_open: u64,
    /// Users with changes that are not in the store, the oldest first; may be cut off.
    pub users: Vec<UserStatus>,
    pub at_risk: AtRisk,
    pub backlog: Backlog,
    pub flushes: Flushes,
    pub caches: Caches,
    pub aside: Aside,
    /// Requests since the mount began.
    pub requests: Vec<RequestCount>,
    /// Requests of the kernel since the mount began.
    pub operations: Vec<OperationCount>,
    /// In the NFS mode; all about a store is empty then.
    pub hostchange: Option<HostchangeStatus>,
    /// Users and folders that are damaged and cannot be served; may be cut off.
    pub damaged: Vec<Damaged>,
    /// Mails met that the listing names and the store does not have, each counted once.
    pub lost_mails: u64,
    /// Errors given to callers or found in stored data, by kind, since the mount began.
    pub errors: Vec<Count>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeaseStatus {
    pub held: bool,
    /// Who goes by this backend's name instead of this mount.
    pub taken_by: Option<String>,
    /// Until it ends, or (negative) since it ended.
    pub seconds_left: i64,
}

/// A user that cannot be served as a whole, or a folder of whom cannot, and why.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Damaged {
    pub user: String,
    pub error: String,
}

/// What kind of change waits for upload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Changes {
    #[default]
    None,
    Unimportant,
    Important,
}

impl Changes {
    pub fn as_str(self) -> &'static str {
        match self {
            Changes::None => "none",
            Changes::Unimportant => "unimportant",
            Changes::Important => "important",
        }
    }
}

/// A user, as far as uploads are concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UserStatus {
    pub user: String,
    pub changes: Changes,
    /// Age in seconds of the oldest change that is not in the store.
    pub oldest_age: Option<u64>,
    /// Mails that are in the store, but in no bundle yet: nothing is at risk, a recovery lists them.
    pub mails_newer_than_bundle: u64,
    /// Why the last flush failed, or why the user cannot be served.
    pub error: Option<String>,
}

/// What would be lost with this machine's disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AtRisk {
    /// Users with important changes that are not in the store.
    pub users: u64,
    /// Age in seconds of the oldest of those changes.
    pub oldest_age: Option<u64>,
    /// Bytes of their index files that changed.
    pub changed_bytes: u64,
    /// Mails that servers were told are safe and that are not in the store yet (`ack = "journal"`).
    pub promised_mails: u64,
    pub promised_bytes: u64,
    /// Mails that are written to local disk only; no server was told that they are safe.
    pub unpublished_mails: u64,
    pub unpublished_bytes: u64,
}

impl AtRisk {
    /// Bytes of all kinds.
    pub fn bytes(&self) -> u64 {
        self.changed_bytes
            .saturating_add(self.promised_bytes)
            .saturating_add(self.unpublished_bytes)
    }

    pub fn nothing(&self) -> bool {
        self.users == 0 && self.promised_mails == 0 && self.unpublished_mails == 0
    }
}

/// The three directories on local disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Caches {
    pub fscache: CacheUse,
    pub staging: CacheUse,
    pub metacache: CacheUse,
}

/// Bytes in use and allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheUse {
    pub path: String,
    pub used: u64,
    pub max: u64,
    /// Files in it, if they are counted.
    pub files: Option<u64>,
    /// How often something was found in it, and how often not, since the mount began.
    pub hits: Option<u64>,
    pub misses: Option<u64>,
    /// Files removed to make room, and bytes read past it for want of room.
    pub evictions: Option<u64>,
    pub streamed: Option<u64>,
}

impl CacheUse {
    /// Between 0 and 1, once there was anything to find.
    pub fn hit_ratio(&self) -> Option<f64> {
        let (hits, misses) = (self.hits?, self.misses?);
        let all = hits.saturating_add(misses);
        (all > 0).then(|| hits as f64 / all as f64)
    }
}

/// What is kept on local disk for a person to look at, and counts for no budget.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Aside {
    pub path: String,
    /// Users of whom a session left changes that no flush has.
    pub users: u64,
    pub bytes: u64,
}

/// Whether the store answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreHealth {
    /// Seconds for which nothing has been answered, while the store is down.
    pub down_for: Option<u64>,
    /// Times that it was down since the mount began, and for how many seconds in all.
    pub outages: u64,
    pub down_seconds: f64,
}

/// What waits to be uploaded, at risk or not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Backlog {
    pub users_important: u64,
    pub users_unimportant: u64,
    /// Age in seconds of the oldest change of any kind.
    pub oldest_age: Option<u64>,
    /// Mails in the store that are in no bundle yet.
    pub mails_newer_than_bundle: u64,
}

/// Flushes since the mount began.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Flushes {
    pub done: u64,
    pub failed: u64,
    pub bytes: u64,
    pub mean_seconds: f64,
}

/// Requests of the kernel of one kind.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OperationCount {
    pub operation: String,
    pub count: u64,
    /// Of these, how many had to wait for the store or the disk.
    pub waited: u64,
    pub errors: u64,
    pub mean_seconds: f64,
}

/// Requests to the store of one kind.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RequestCount {
    /// `get`, `put`, `list` and so on.
    pub operation: String,
    /// Why: `publish`, `flush`, `open` and so on.
    pub reason: String,
    pub count: u64,
    pub failed: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Of one call; a listing may be many requests.
    pub mean_seconds: f64,
}

/// The NFS mode, since the mount began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostchangeStatus {
    pub host: String,
    pub listindex_root: String,
    /// Bytes below it, and allowed.
    pub used: u64,
    pub max: u64,
    /// Users with a session.
    pub active: u64,
    /// Logins that found the list index as it was left, that dropped it, and that got none.
    pub kept: u64,
    pub dropped: u64,
    pub failed: u64,
    /// Sessions at whose end another host's was found.
    pub contested: u64,
    /// Users' list indexes removed to make room.
    pub evicted: u64,
    /// Files and directories that the kernel knows.
    pub known: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Count {
    pub name: String,
    pub count: u64,
}
