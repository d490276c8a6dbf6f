//! Values that are wrong by themselves or beside others.

use super::{Config, ConfigError, err};
use std::time::Duration;

/// The shortest lease that a store's slow moment cannot eat up.
const MIN_LEASE: Duration = Duration::from_secs(10);
/// Below this a cache could not hold one ordinary mail.
const MIN_CACHE: u64 = 1 << 20;

impl Config {
    pub(super) fn check_values(&self) -> Result<(), ConfigError> {
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
        if limits.hedge > 100 {
            return err("store_limits.hedge is more than 100".into());
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
}
