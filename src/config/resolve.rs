//! From the file to plain values: defaults that depend on others, accounts, contradictions.

use super::{Checksums, Config, ConfigError, Log};
use crate::cache::weight::{WeightError, Weights};
use crate::store::RetryPolicy;
use nix::unistd::{Group, User};
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
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
    pub ack: crate::vmail::promise::Ack,
    pub lost_mails: crate::vmail::lost::LostMails,
    /// At least one.
    pub fscache: Vec<CacheDir>,
    pub stream_memory: u64,
    pub read_ahead: usize,
    pub staging: CacheDir,
    pub metacache: MetacacheSettings,
    pub gc: GcSettings,
    pub delivery_timeout: Duration,
    pub lease: Duration,
    pub unmount_timeout: Duration,
    /// 0: by the number of CPUs.
    pub fuse_threads: usize,
    pub passthrough: bool,
    pub admin_socket: PathBuf,
    pub admin_directory: bool,
    pub metrics_listen: Option<SocketAddr>,
    pub log: Log,
}

/// The shortest lease that a store's slow moment cannot eat up.
const MIN_LEASE: Duration = Duration::from_secs(10);
/// Below this a cache could not hold one ordinary mail.
const MIN_CACHE: u64 = 1 << 20;

fn err<T>(text: String) -> Result<T, ConfigError> {
    Err(ConfigError(text))
}

/// Names separated by commas.
fn names(text: &str) -> Vec<Vec<u8>> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names.map(|name| name.as_bytes().to_vec()).collect()
}

impl Config {
    /// Fills in what depends on other keys, and refuses contradictions. Needs the mount point
    /// to exist; changes nothing on disk.
    pub fn resolve(&self) -> Result<Settings, ConfigError> {
        let Some(store) = self.store.clone() else {
            return err("no store given: name one like file:///srv/mail or s3://bucket".into());
        };
        let store_dir = check_store(&store)?;
        let Some(mountpoint) = &self.mountpoint else {
            return err("no mount point given".into());
        };
        let mountpoint = mountpoint.canonicalize().map_err(|e| {
            ConfigError(format!("mount point {}: {e}: create it first", mountpoint.display()))
        })?;
        let state_dir = match &self.state_dir {
            Some(dir) => absolute("state_dir", dir)?,
            None => Path::new("/var/lib/vmailfs").join(escape_path(&mountpoint)),
        };
        let place = |key: &str, path: &Option<PathBuf>, default: &str| match path {
            Some(path) => absolute(key, path),
            None => Ok(state_dir.join(default)),
        };
        let fscache = self.fscaches(&state_dir)?;
        let staging = place("staging.path", &self.staging.path, "staging")?;
        let metacache = place("metacache.path", &self.metacache.path, "metacache")?;
        let admin_socket = place("admin.socket", &self.admin.socket, "admin.sock")?;

        let mut places: Vec<_> =
            fscache.iter().map(|one| ("fscache.path", one.path.as_path())).collect();
        places.push(("staging.path", staging.as_path()));
        places.push(("metacache.path", metacache.as_path()));
        if let Some(dir) = &store_dir {
            places.push(("store", dir.as_path()));
        }
        apart(&places)?;
        places.push(("state_dir", state_dir.as_path()));
        for (key, path) in &places {
            if path.starts_with(&mountpoint) || mountpoint.starts_with(path) {
                return err(format!(
                    "{key} ({}) and the mount point ({}) lie in one another: choose another place",
                    path.display(),
                    mountpoint.display()
                ));
            }
        }
        if admin_socket.starts_with(&mountpoint) {
            return err("admin.socket lies in the mount point: choose another place".into());
        }
        self.check_values()?;

        let m = &self.metacache;
        let limits = &self.store_limits;
        Ok(Settings {
            store: self.store_settings(store),
            mountpoint,
            state_dir,
            layout: self.layout.clone(),
            owner: self.owner.as_deref().map(|o| account("owner", o)).transpose()?,
            root_owner: self.root_owner.as_deref().map(|o| account("root_owner", o)).transpose()?,
            root_mode: self.root_mode.0,
            allow_other: self.allow_other,
            allow_root_delete: self.allow_root_delete,
            nonempty: self.nonempty,
            backend: self.backend_name()?,
            single_backend: self.single_backend,
            ack: match self.ack {
                super::Ack::Store => crate::vmail::promise::Ack::Store,
                super::Ack::Journal => crate::vmail::promise::Ack::Journal,
            },
            lost_mails: self.lost_mails(),
            fscache,
            stream_memory: limits.stream_memory.0,
            read_ahead: limits.read_ahead as usize,
            staging: CacheDir { path: staging, max_size: self.staging.max_size.0 },
            metacache: MetacacheSettings {
                path: metacache,
                max_space: m.max_space.0,
                max_grace: m.max_grace.0,
                weights: self.weights()?,
                priority2_names: names(&m.priority2_names),
                upload_interval: m.upload_interval.0,
                max_rescan_mail_count: m.max_rescan_mail_count,
                folder_change_quiet: m.folder_change_quiet.0,
                folder_change_max: m.folder_change_max.0,
                idle_upload: m.idle_upload.0,
                idle_uploads: m.idle_uploads,
                close_idle: m.close_idle.0,
                max_open_users: m.max_open_users,
                max_parallel_requests: m.max_parallel_requests,
            },
            gc: GcSettings {
                retention: self.retention.0,
                interval: self.gc.interval.0,
                full_scan: self.gc.full_scan.0,
                parallel: self.gc.parallel as usize,
                delete_rate: self.gc.delete_rate,
            },
            delivery_timeout: limits.delivery_timeout.0,
            lease: limits.lease.0,
            unmount_timeout: limits.unmount_timeout.0,
            fuse_threads: self.fuse.threads as usize,
            passthrough: self.fuse.passthrough,
            admin_socket,
            admin_directory: self.admin.directory,
            metrics_listen: self.metrics_listen()?,
            log: self.log.clone(),
        })
    }

    /// What is needed to reach the store, without a mount.
    ///
    /// # Errors
    /// No store, or an impossible one.
    pub fn resolve_store(&self) -> Result<StoreSettings, ConfigError> {
        let Some(url) = self.store.clone() else {
            return err("no store given: name one like file:///srv/mail or s3://bucket".into());
        };
        check_store(&url)?;
        self.check_values()?;
        Ok(self.store_settings(url))
    }

    fn store_settings(&self, url: String) -> StoreSettings {
        let (limits, s3) = (&self.store_limits, &self.s3);
        StoreSettings {
            url,
            endpoint: s3.endpoint.clone(),
            region: s3.region.clone(),
            path_style: s3.path_style,
            access_key_id: s3.access_key_id.clone(),
            secret_access_key: s3.secret_access_key.clone().map(Secret),
            session_token: s3.session_token.clone().map(Secret),
            checksums: s3.checksums,
            retry: RetryPolicy {
                attempt_timeout: limits.attempt_timeout.0,
                deadline: limits.deadline.0,
                attempts: limits.attempts,
                ..RetryPolicy::default()
            },
            max_requests: limits.max_requests as usize,
        }
    }

    /// Where the fscaches are. Which users belong to which follows from their order.
    fn fscaches(&self, state_dir: &Path) -> Result<Vec<CacheDir>, ConfigError> {
        let tables = self.fscache.0.as_slice();
        let mut all = Vec::new();
        for one in tables {
            let path = match &one.path {
                Some(path) => path.clone(),
                None if tables.len() == 1 => state_dir.join("fscache"),
                None => return err("each of several [[fscache]] needs a path".into()),
            };
            let paths = match split_path(&path)? {
                Some(_) if tables.len() > 1 => {
                    return err(
                        "%Nu in fscache.path and several [[fscache]] exclude each other".into()
                    );
                }
                Some(paths) => paths,
                None => vec![path],
            };
            for path in paths {
                let path = absolute("fscache.path", &path)?;
                all.push(CacheDir { path, max_size: one.max_size.0 });
            }
        }
        Ok(all)
    }

    fn lost_mails(&self) -> crate::vmail::lost::LostMails {
        use crate::vmail::lost::LostMails as Answer;
        match self.lost_mails {
            super::LostMails::Error => Answer::Error,
            super::LostMails::Empty => {
                let masks = self.lost_mails_for.split_ascii_whitespace();
                Answer::Blank(masks.map(str::to_string).collect())
            }
        }
    }

    fn weights(&self) -> Result<Weights, ConfigError> {
        let m = &self.metacache;
        let failed = |key: &str, e: WeightError| ConfigError(format!("metacache.{key}: {e}"));
        Ok(Weights {
            priority: m.priority_weights.parse().map_err(|e| failed("priority_weights", e))?,
            size: m.size_weights.parse().map_err(|e| failed("size_weights", e))?,
        })
    }

    fn check_values(&self) -> Result<(), ConfigError> {
        let fscaches = self.fscache.0.iter().map(|one| ("fscache.max_size", one.max_size));
        for (key, size) in fscaches.chain([
            ("staging.max_size", self.staging.max_size),
            ("metacache.max_space", self.metacache.max_space),
            ("metacache.max_grace", self.metacache.max_grace),
        ]) {
            if size.0 < MIN_CACHE {
                return err(format!("{key} = {size} is too small: at least 1M"));
            }
        }
        let (m, limits) = (&self.metacache, &self.store_limits);
        for (key, span) in [
            ("metacache.upload_interval", m.upload_interval),
            ("metacache.folder_change_max", m.folder_change_max),
            ("metacache.idle_upload", m.idle_upload),
            ("metacache.close_idle", m.close_idle),
            ("gc.interval", self.gc.interval),
            ("gc.full_scan", self.gc.full_scan),
            ("store_limits.attempt_timeout", limits.attempt_timeout),
            ("store_limits.deadline", limits.deadline),
            ("store_limits.delivery_timeout", limits.delivery_timeout),
            ("store_limits.unmount_timeout", limits.unmount_timeout),
        ] {
            if span.0.is_zero() {
                return err(format!("{key} must be longer than 0"));
            }
        }
        for (key, number) in [
            ("metacache.max_rescan_mail_count", m.max_rescan_mail_count),
            ("metacache.idle_uploads", m.idle_uploads),
            ("metacache.max_open_users", m.max_open_users),
            ("metacache.max_parallel_requests", m.max_parallel_requests),
            ("gc.parallel", self.gc.parallel),
            ("gc.delete_rate", self.gc.delete_rate),
            ("store_limits.attempts", limits.attempts),
            ("store_limits.max_requests", limits.max_requests),
        ] {
            if number == 0 {
                return err(format!("{key} must be at least 1"));
            }
        }
        if limits.stream_memory.0 < crate::vmail::stream::LEAST {
            let size = limits.stream_memory;
            return err(format!("store_limits.stream_memory = {size} is too small: at least 8M"));
        }
        if m.folder_change_quiet > m.folder_change_max {
            return err("metacache.folder_change_quiet is longer than folder_change_max".into());
        }
        if limits.lease.0 < MIN_LEASE {
            return err(format!(
                "store_limits.lease = {} is too short: at least 10s",
                limits.lease
            ));
        }
        if limits.attempt_timeout > limits.deadline {
            return err("store_limits.attempt_timeout is longer than deadline".into());
        }
        if limits.deadline.0 >= limits.lease.0 {
            return err(format!(
                "store_limits.deadline ({}) must be shorter than lease ({}), or no renewal is ever \
                 sure to be in time",
                limits.deadline, limits.lease
            ));
        }
        if self.s3.access_key_id.is_some() != self.s3.secret_access_key.is_some() {
            return err("s3.access_key_id and s3.secret_access_key only work together".into());
        }
        if self.s3.session_token.is_some() && self.s3.access_key_id.is_none() {
            return err("s3.session_token needs s3.access_key_id and s3.secret_access_key".into());
        }
        if let Some(endpoint) = &self.s3.endpoint
            && !endpoint.starts_with("http://")
            && !endpoint.starts_with("https://")
        {
            return err(format!("s3.endpoint `{endpoint}` must begin with https:// or http://"));
        }
        Ok(())
    }

    fn metrics_listen(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let Some(text) = &self.metrics.listen else { return Ok(None) };
        text.parse().map(Some).map_err(|_| {
            ConfigError(format!(
                "metrics.listen `{text}`: write it like 127.0.0.1:9154 or [::1]:9154"
            ))
        })
    }

    fn backend_name(&self) -> Result<String, ConfigError> {
        let name = match &self.backend {
            Some(name) => name.clone(),
            None => nix::unistd::gethostname()
                .ok()
                .and_then(|n| n.into_string().ok())
                .filter(|n| !n.is_empty())
                .ok_or_else(|| ConfigError("this host has no usable name: set backend".into()))?,
        };
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(legal)
        {
            return err(format!(
                "backend `{name}`: use 1 to 128 letters, digits, `-`, `_` and `.`, not `.` first"
            ));
        }
        Ok(name)
    }
}

/// The directories that `%4Nu` in a path stands for.
fn split_path(path: &Path) -> Result<Option<Vec<PathBuf>>, ConfigError> {
    let Some((before, rest)) = path.to_str().and_then(|text| text.split_once('%')) else {
        return Ok(None);
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (range, variable) = rest.split_at(digits);
    let range: u32 = range.parse().unwrap_or(0);
    match variable.strip_prefix("Nu") {
        Some(after) if (1..=256).contains(&range) && !after.contains('%') => {
            Ok(Some((0..range).map(|n| format!("{before}{n:x}{after}").into()).collect()))
        }
        _ => err(format!(
            "fscache.path {}: of Dovecot's variables only %<1 to 256>Nu, once, is understood here",
            path.display()
        )),
    }
}

/// The form of a store's URL; the directory of a file store.
fn check_store(store: &str) -> Result<Option<PathBuf>, ConfigError> {
    if let Some(path) = store.strip_prefix("file://") {
        if !path.starts_with('/') {
            return err(format!("store `{store}`: write an absolute path, like file:///srv/mail"));
        }
        return Ok(Some(real(Path::new(path))));
    }
    let Some(rest) = store.strip_prefix("s3://") else {
        return err(format!("store `{store}`: use file:///some/dir or s3://bucket/prefix"));
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() || prefix.contains("//") || prefix.starts_with('/') {
        return err(format!("store `{store}`: write it like s3://bucket or s3://bucket/prefix"));
    }
    Ok(None)
}

/// Refuses directories that are equal or lie in one another: what empties one would empty both.
fn apart(places: &[(&str, &Path)]) -> Result<(), ConfigError> {
    for (i, (key, path)) in places.iter().enumerate() {
        for (other_key, other) in &places[i + 1..] {
            let (inner, outer) = match (path.starts_with(other), other.starts_with(path)) {
                (true, true) => {
                    return err(format!(
                        "{key} and {other_key} are the same directory ({}): each needs its own",
                        path.display()
                    ));
                }
                (true, false) => (key, other_key),
                (false, true) => (other_key, key),
                (false, false) => continue,
            };
            return err(format!("{inner} lies inside {outer}: each needs a directory of its own"));
        }
    }
    Ok(())
}

fn absolute(key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    if path.as_os_str().is_empty() {
        return err(format!("{key} is empty: name a path or leave it out"));
    }
    match std::path::absolute(path) {
        Ok(path) => Ok(real(&path)),
        Err(e) => err(format!("{key} {}: {e}", path.display())),
    }
}

/// The path without symbolic links as far as it exists, so that comparing paths means something.
fn real(path: &Path) -> PathBuf {
    let mut rest = Vec::new();
    let mut head = path;
    loop {
        if let Ok(mut found) = head.canonicalize() {
            for part in rest.iter().rev() {
                match part {
                    Component::ParentDir => {
                        found.pop();
                    }
                    Component::Normal(name) => found.push(name),
                    _ => {}
                }
            }
            return found;
        }
        match (head.parent(), head.components().next_back()) {
            (Some(parent), Some(last)) => {
                rest.push(last);
                head = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

/// `user:group`, or `user` with that account's group; names or numbers.
fn account(key: &str, text: &str) -> Result<Owner, ConfigError> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let known = match user.parse::<u32>() {
        Ok(uid) => {
            User::from_uid(uid.into()).ok().flatten().map(|u| (uid, u.gid.as_raw())).or_else(
                || group.map(|_| (uid, 0)), // the group follows
            )
        }
        Err(_) => User::from_name(user).ok().flatten().map(|u| (u.uid.as_raw(), u.gid.as_raw())),
    };
    let Some((uid, own_gid)) = known else {
        return err(format!("{key} `{text}`: there is no account `{user}` on this machine"));
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => match Group::from_name(group).ok().flatten() {
                Some(group) => group.gid.as_raw(),
                None => {
                    return err(format!(
                        "{key} `{text}`: there is no group `{group}` on this machine"
                    ));
                }
            },
        },
    };
    Ok(Owner { uid, gid })
}

/// A file name for a path: `/var/vmail` becomes `var-vmail`. Two paths never give one name.
pub fn escape_path(path: &Path) -> String {
    use std::fmt::Write as _;
    use std::os::unix::ffi::OsStrExt as _;
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_prefix(b"/").unwrap_or(bytes);
    let mut out = String::with_capacity(bytes.len());
    for b in bytes {
        match b {
            b'/' => out.push('-'),
            b'.' if out.is_empty() => out.push_str("%2e"),
            b if b.is_ascii_alphanumeric() || b"_.".contains(b) => out.push(*b as char),
            b => {
                let _ = write!(out, "%{b:02x}");
            }
        }
    }
    if out.is_empty() {
        return "-".to_owned();
    }
    if out.len() > 200 {
        let hash = blake3::hash(path.as_os_str().as_bytes()).to_hex();
        out.truncate(160);
        out.push('%');
        out.push_str(&hash[..32]);
    }
    out
}
