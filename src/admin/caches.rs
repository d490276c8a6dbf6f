//! Requests about the caches and about whole users, and their answers.

use super::Changes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Whose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whom {
    /// One, or those that fit a mask with `*` and `?`.
    User(String),
    /// From a file.
    Names(Vec<String>),
    /// Those that this mount knows and that fit a mask; `field`: by this field of theirs instead
    /// of the name.
    Matching { mask: Option<String>, field: Option<String> },
}

impl Whom {
    pub fn all() -> Whom {
        Whom::Matching { mask: None, field: None }
    }
}

/// Whether a name is a mask.
pub fn is_mask(name: &str) -> bool {
    name.contains(['*', '?'])
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlushRequest {
    pub whom: Whom,
    /// Leave caches and the like.
    pub important_only: bool,
    /// Only users that changed something of this priority, or of a less important one.
    pub min_priority: Option<u8>,
}

impl FlushRequest {
    /// Everything of everybody.
    pub fn all() -> FlushRequest {
        FlushRequest { whom: Whom::all(), important_only: false, min_priority: None }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum CacheRequest {
    MetacacheList {
        mask: Option<String>,
        field: Option<String>,
    },
    MetacacheStatus,
    MetacacheRescan,
    MetacacheClean {
        whom: Whom,
        min_priority: u8,
        days: u32,
        unflushed: Unflushed,
    },
    /// Looks at the store whether somebody else has changed the users.
    MetacacheRefresh {
        whom: Whom,
    },
    /// Flushes users, gives them up and removes what is here of them.
    MetacacheRemove {
        mask: String,
    },
    /// Sets a field of a user that lists show; an empty value takes it away.
    UpdateUserdb {
        user: String,
        field: String,
        value: String,
    },
    FscacheStatus,
    /// Counts anew; `path`: only the fscache that is there or around it. Files last written so many
    /// seconds ago are removed.
    FscacheRescan {
        path: Option<PathBuf>,
        max_age: Option<u64>,
    },
    /// Removes all copies.
    FscacheClean,
    /// Deletes everything of users, with what the caches have of it.
    UserDelete {
        whom: Whom,
    },
    /// Waits until nobody has a file of them open, at most so long.
    UserWait {
        whom: Whom,
        secs: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheAnswer {
    Done,
    List(Vec<ListRow>),
    Metacache(MetacacheReport),
    Rescanned(Rescanned),
    Cleaned(Vec<Cleaned>),
    Refreshed(Vec<Refreshed>),
    Fscaches(Vec<FscacheReport>),
    FscachesRescanned(Vec<FscacheRescanned>),
    FscachesCleaned(Vec<FscacheCleaned>),
    Deleted(Vec<Deleted>),
    /// Users with open files.
    Busy(Vec<String>),
}

/// A user in the metacache.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListRow {
    pub username: String,
    /// Other names of the user, as they were set.
    pub fields: BTreeMap<String, String>,
    /// Seconds until its changes are flushed at the latest.
    pub upload_within: Option<u64>,
    pub dev_major: u32,
    pub dev_minor: u32,
    /// By priority.
    pub bytes_used: Vec<u64>,
    /// Seconds since 1970, 0 for never; by priority.
    pub last_access: Vec<i64>,
    pub changes: Changes,
    pub last_service: Option<String>,
    pub cleanup_weight: Option<i64>,
}

/// The metacache as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MetacacheReport {
    pub root: PathBuf,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub max_space: u64,
    pub max_grace: u64,
    pub bytes_used: u64,
    pub by_priority: Vec<u64>,
    /// By when they were used last, from the latest on.
    pub by_time: Vec<ByTime>,
}

/// Users last used within a time, and not within that of the row before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ByTime {
    /// Seconds; `None`: longer ago than all others.
    pub within: Option<u64>,
    pub users: u64,
    pub bytes: u64,
}

/// What a count of the disk found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rescanned {
    pub users: u64,
    /// Bytes by the books, and by the disk.
    pub booked: u64,
    pub found: u64,
    /// User, books, disk; of those whose books were wrong.
    pub wrong: Vec<(String, u64, u64)>,
}

/// What a clean does with changes that are in no flush.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unflushed {
    /// It leaves the user alone and fails.
    #[default]
    Refuse,
    Flush,
    Discard,
}

/// What became of one user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cleaned {
    pub user: String,
    /// Bytes that were freed, and that are left.
    pub freed: u64,
    pub left: u64,
    /// It could not be removed: somebody uses it.
    pub busy: bool,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refreshed {
    pub user: String,
    /// Somebody else has changed it: it is read anew at the next access.
    pub changed: bool,
    pub error: Option<String>,
}

/// One fscache; numbers are since the mount began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FscacheReport {
    pub path: PathBuf,
    pub bytes_used: u64,
    pub max_size: u64,
    pub files: u64,
    pub hits: u64,
    pub misses: u64,
    /// Bytes read past it for want of room.
    pub streamed: u64,
    /// Files removed to make room, and their bytes.
    pub evictions: u64,
    pub evicted: u64,
    /// Bytes of copies that are open.
    pub open: u64,
    /// Its disk fails: everything is read past it.
    pub failing: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FscacheRescanned {
    pub path: PathBuf,
    pub bytes_used: u64,
    pub files: u64,
    /// By how many bytes the books were too low (negative: too high).
    pub off_by: i64,
    pub was_right: bool,
    /// Files that are no copies.
    pub strange_files: u64,
    pub strange_bytes: u64,
    /// Files that were older than asked for.
    pub removed_files: u64,
    pub removed_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FscacheCleaned {
    pub path: PathBuf,
    pub files: u64,
    pub bytes: u64,
    /// Of these, bytes that count until they are closed.
    pub open: u64,
}

/// A user that was deleted, or would have been.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deleted {
    pub user: String,
    pub files: u64,
    pub folders: u64,
    /// Somebody has a file open: the rest was left.
    pub busy: bool,
    pub error: Option<String>,
}
