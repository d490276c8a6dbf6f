//! From the file to plain values: defaults that depend on others, accounts, contradictions.

use super::place::{NFS, absolute, account, apart, check_store, escape_path, split_path};
use super::settings::{
    CacheDir, GcSettings, HostchangeSettings, MetacacheSettings, Secret, Settings, StoreSettings,
};
use super::{Config, ConfigError, err};
use crate::cache::weight::{WeightError, Weights};
use crate::dovecot::template::Layout;
use crate::store::RetryPolicy;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

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
        let hostchange = self.hostchange_settings(&mountpoint)?;

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
            take_backend: false,
            ack: match self.ack {
                super::Ack::Store => crate::vmail::promise::Ack::Store,
                super::Ack::Journal => crate::vmail::promise::Ack::Journal,
            },
            lost_mails: self.lost_mails(),
            fscache,
            stream_memory: limits.stream_memory.0,
            read_ahead: limits.read_ahead as usize,
            hedge: limits.hedge,
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
            hostchange,
            admin_socket,
            admin_directory: self.admin.directory,
            metrics_listen: self.metrics_listen()?,
            log: self.log.clone(),
        })
    }

    fn hostchange_settings(&self, mountpoint: &Path) -> Result<HostchangeSettings, ConfigError> {
        let h = &self.hostchange;
        let listindex_root = absolute("hostchange.listindex_root", &h.listindex_root)?;
        if listindex_root.starts_with(mountpoint) {
            return err("hostchange.listindex_root lies in the mount point".into());
        }
        let given = h.index_dir.as_deref().unwrap_or_default().trim_matches('/');
        let names: Vec<&str> = given.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
        if names.contains(&"..") {
            return err(format!(
                "hostchange.index_dir `{given}` leads out of the user's directory"
            ));
        }
        if h.login_idle.0 < h.attribute_cache.0 * 2 {
            let text = "hostchange.login_idle must be twice hostchange.attribute_cache at least";
            return err(text.into());
        }
        Ok(HostchangeSettings {
            index_dir: names.iter().map(|name| name.as_bytes().to_vec()).collect(),
            listindex_root,
            listindex_layout: Layout::parse(&h.listindex_layout)
                .map_err(|e| ConfigError(format!("hostchange.listindex_layout: {e}")))?,
            listindex_max_size: h.listindex_max_size.0,
            login_idle: h.login_idle.0,
            migration: h.migration,
            attribute_cache: h.attribute_cache.0,
            lock_wait: h.lock_wait.0,
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
        if url.starts_with(NFS) {
            return err(format!("store `{url}`: there is no object store in the NFS mode"));
        }
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
