//! What a mount goes by: plain values, complete and free of contradictions.

use super::{Checksums, Log};
use crate::cache::weight::Weights;
use crate::dovecot::template::Layout;
use crate::store::RetryPolicy;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Numeric owner of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A cache directory and its bound in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheDir {
    pub path: PathBuf,
    pub max_size: u64,
}

/// The metacache: where, how much (bytes), and when it is flushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetacacheSettings {
    pub path: PathBuf,
    pub max_space: u64,
    pub max_grace: u64,
    pub weights: Weights,
    pub priority2_names: Vec<Vec<u8>>,
    pub upload_interval: Duration,
    pub max_rescan_mail_count: u32,
    pub folder_change_quiet: Duration,
    pub folder_change_max: Duration,
    pub idle_upload: Duration,
    /// In a minute.
    pub idle_uploads: u32,
    pub close_idle: Duration,
    pub max_open_users: u32,
    pub max_parallel_requests: u32,
}

/// The NFS mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostchangeSettings {
    /// One name after another.
    pub index_dir: Vec<Vec<u8>>,
    pub listindex_root: PathBuf,
    pub listindex_layout: Layout,
    pub listindex_max_size: u64,
    pub login_idle: Duration,
    pub migration: bool,
    pub attribute_cache: Duration,
    pub lock_wait: Duration,
}

/// What is deleted from the store, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcSettings {
    pub retention: Duration,
    pub interval: Duration,
    pub full_scan: Duration,
    pub parallel: usize,
    /// Objects a second.
    pub delete_rate: u32,
}

/// What the store adapters need. Secrets are in here: not to be logged.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// `file:///dir` or `s3://bucket/prefix`.
    pub url: String,
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub path_style: bool,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    pub checksums: Checksums,
    pub retry: RetryPolicy,
    pub max_requests: usize,
}

/// Text that `Debug` does not show.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Everything a mount needs to know; complete and free of contradictions.
#[derive(Debug, Clone)]
pub struct Settings {
    pub store: StoreSettings,
    /// Absolute, without symbolic links.
    pub mountpoint: PathBuf,
    pub state_dir: PathBuf,
    pub layout: String,
    pub owner: Option<Owner>,
    pub root_owner: Option<Owner>,
    pub root_mode: u32,
    pub allow_other: bool,
    pub allow_root_delete: bool,
    /// Mount over a directory that holds something.
    pub nonempty: bool,
    pub backend: String,
    pub single_backend: bool,
    /// Said of one mount, and so by no key: in a file it would hold for each mount after it.
    pub take_backend: bool,
    pub ack: crate::vmail::promise::Ack,
    pub lost_mails: crate::vmail::lost::LostMails,
    /// At least one.
    pub fscache: Vec<CacheDir>,
    pub stream_memory: u64,
    /// Requests in flight for mails that are read ahead; 0: none are.
    pub read_ahead: usize,
    /// Of a hundred mails read, how many may be asked for a second time.
    pub hedge: u32,
    pub staging: CacheDir,
    pub metacache: MetacacheSettings,
    pub gc: GcSettings,
    pub delivery_timeout: Duration,
    pub lease: Duration,
    pub unmount_timeout: Duration,
    /// 0: by the number of CPUs.
    pub fuse_threads: usize,
    pub passthrough: bool,
    pub hostchange: HostchangeSettings,
    pub admin_socket: PathBuf,
    pub admin_directory: bool,
    pub metrics_listen: Option<SocketAddr>,
    pub log: Log,
}

impl Settings {
    /// The directory on NFS, in the NFS mode.
    pub fn nfs(&self) -> Option<&Path> {
        self.store.url.strip_prefix(super::place::NFS).map(Path::new)
    }
}
