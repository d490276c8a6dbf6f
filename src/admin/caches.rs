//! Requests about the caches and about whole users, and their answers.

use serde::{Deserialize, Serialize};

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
}

impl FlushRequest {
    /// Everything of everybody.
    pub fn all() -> FlushRequest {
        FlushRequest { whom: Whom::all(), important_only: false }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum CacheRequest {
    /// Sets a field of a user that lists show; an empty value takes it away.
    UpdateUserdb { user: String, field: String, value: String },
    /// Waits until nobody has a file of them open, at most so long.
    UserWait { whom: Whom, secs: u64 },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheAnswer {
    Done,
    /// Users with open files.
    Busy(Vec<String>),
}
