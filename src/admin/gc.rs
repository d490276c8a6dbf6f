//! The request to delete what is due, and its answer.

use serde::{Deserialize, Serialize};

/// Whose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GcUsers {
    User(String),
    /// Those that are open in this mount.
    Open,
    /// All of the store, but for those that belong to other backends.
    All,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    pub users: GcUsers,
    /// Only tell what would be done.
    pub dry_run: bool,
    /// Also list everything, whether or not that is due.
    pub scan: bool,
}

/// What was done, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GcReport {
    pub dry_run: bool,
    /// Users looked at.
    pub looked_at: u64,
    /// Those of them of which there is something to tell.
    pub users: Vec<GcUser>,
    /// Users of other backends; these do it themselves.
    pub foreign: u64,
    /// User and reason; what is due of them is deleted another time.
    pub failed: Vec<(String, String)>,
}

/// One user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GcUser {
    pub user: String,
    /// Deleted objects.
    pub mails: u64,
    pub bundles: u64,
    pub files: u64,
    /// Objects that wait for the end of their retention,
    pub kept: u64,
    /// and when that of the first ends, seconds since 1970.
    pub next_due: Option<i64>,
    /// Whether everything was listed.
    pub scanned: bool,
    /// Objects of dead sessions that begin their retention.
    pub orphans: u64,
    /// Mails that arrived late and are in their folders from now on.
    pub adopted: Vec<String>,
    /// Mails that arrived late and have to wait.
    pub late: Vec<String>,
}
