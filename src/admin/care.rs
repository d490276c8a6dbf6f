//! What is done for one user's data on an admin's word: checks, earlier states, what was deleted.

use crate::vmail::fsck;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A request about users' data. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Care {
    /// Compare what is in the store with what is named, and repair it if asked to.
    Fsck { user: String, read: bool, repair: bool, drop_lost: bool, owner_gone: bool },
    /// Names of all users of the store.
    Users,
    /// The states that can be gone back to.
    History { user: String },
    /// Bring back mails that were expunged since a time, from a folder or from all.
    Undelete { user: String, folder: Option<String>, since: Option<i64>, dry_run: bool },
    /// Write a state into a directory.
    Export { user: String, at: i64, dir: PathBuf },
    /// Read a bundle from the store into a new file.
    Bundle { key: String, to: PathBuf },
    /// Bring back what a state had and is gone.
    Restore { user: String, at: i64, dry_run: bool },
}

/// The answers, in the same order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cared {
    Fsck(Box<fsck::Report>),
    Users(Vec<String>),
    History(HistoryReport),
    BroughtBack(BroughtBack),
    Exported(Exported),
    /// Its bytes.
    Bundle(u64),
}

/// States of a user, the newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HistoryReport {
    pub user: String,
    pub states: Vec<StateReport>,
    /// Why there is nothing older.
    pub ends: String,
    /// Why what changed since the last flush is no state yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_flushed: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StateReport {
    /// When it was flushed, seconds since 1970.
    pub time: i64,
    pub epoch: u32,
    pub folders: u64,
    /// `None`: some folder of it cannot be read.
    pub mails: Option<u64>,
    /// The bundle that was written with it.
    pub bundle: Option<String>,
}

/// What an undelete or a restore in place did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BroughtBack {
    pub user: String,
    pub dry_run: bool,
    pub mails: Vec<MailBack>,
    /// Folders that were made anew.
    pub folders: Vec<String>,
    /// Mails that stay away, each with the reason.
    pub left: Vec<(String, String)>,
}

/// A mail that comes back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MailBack {
    /// Path of the folder below the user's root.
    pub folder: String,
    /// What it was called.
    pub old_name: String,
    /// What it is called now; empty if it was only asked what would be done.
    pub name: String,
    pub object: String,
    pub size: u64,
    /// When it was expunged, seconds since 1970; `None`: not known.
    pub expunged: Option<i64>,
}

/// What a restore wrote into a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exported {
    pub user: String,
    pub dir: PathBuf,
    /// When the state was flushed, seconds since 1970.
    pub time: i64,
    pub folders: u64,
    pub mails: u64,
    pub files: u64,
    pub bytes: u64,
    /// Path and reason of what is not there.
    pub missing: Vec<(String, String)>,
}
