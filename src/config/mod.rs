//! Configuration: one typed TOML file.
//!
//! [`Config`] is the file as written: every key is optional there and has a default. [`KEYS`]
//! is the one table that tells what each key means; `vmailfs config` prints it, and a test
//! holds it against the struct. The file, `-o` options and flags all end in the same
//! key-and-text form ([`Config::set`]), so a setting has the same spelling everywhere.
//! [`Config::resolve`] turns it into [`Settings`]: plain values, with paths filled in and names
//! of accounts looked up. Code below the command line only sees those.

mod check;
mod keys;
mod load;
mod place;
mod resolve;
mod settings;
mod types;

pub use keys::{KEYS, Key, Kind};
pub use load::ConfigError;
pub use place::escape_path;
pub use settings::{
    CacheDir, GcSettings, HostchangeSettings, MetacacheSettings, Owner, Secret, Settings,
    StoreSettings,
};
pub use types::{Mode, ParseError, Size, Span};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::path::PathBuf;

/// The configuration file. What each key means stands in [`KEYS`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mountpoint: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    pub layout: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_owner: Option<String>,
    pub root_mode: Mode,
    pub allow_other: bool,
    pub allow_root_delete: bool,
    pub nonempty: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    pub single_backend: bool,
    pub ack: Ack,
    pub retention: Span,
    pub lost_mails: LostMails,
    /// Masks, separated by spaces.
    pub lost_mails_for: String,
    pub fscache: Fscaches,
    pub staging: Staging,
    pub metacache: Metacache,
    pub s3: S3,
    pub store_limits: StoreLimits,
    pub gc: Gc,
    pub fuse: Fuse,
    pub hostchange: Hostchange,
    pub admin: Admin,
    pub metrics: Metrics,
    pub log: Log,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            store: None,
            mountpoint: None,
            state_dir: None,
            layout: "%u".to_owned(),
            owner: None,
            root_owner: None,
            root_mode: Mode(0o755),
            allow_other: true,
            allow_root_delete: false,
            nonempty: false,
            backend: None,
            single_backend: false,
            ack: Ack::Store,
            retention: Span::secs(7 * DAY),
            lost_mails: LostMails::Error,
            lost_mails_for: "*".into(),
            fscache: Fscaches::default(),
            staging: Staging::default(),
            metacache: Metacache::default(),
            s3: S3::default(),
            store_limits: StoreLimits::default(),
            gc: Gc::default(),
            fuse: Fuse::default(),
            hostchange: Hostchange::default(),
            admin: Admin::default(),
            metrics: Metrics::default(),
            log: Log::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fscache {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    pub max_size: Size,
}

impl Default for Fscache {
    fn default() -> Self {
        Fscache { path: None, max_size: Size::gib(2) }
    }
}

/// One `[fscache]`, or several `[[fscache]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fscaches(pub Vec<Fscache>);

impl Default for Fscaches {
    fn default() -> Self {
        Fscaches(vec![Fscache::default()])
    }
}

impl Serialize for Fscaches {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [one] => one.serialize(s),
            several => several.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Fscaches {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> de::Visitor<'de> for Visit {
            type Value = Fscaches;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table [fscache], or several [[fscache]]")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Fscaches, A::Error> {
                let one = Fscache::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Fscaches(vec![one]))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Fscaches, A::Error> {
                let mut all = Vec::new();
                while let Some(one) = seq.next_element()? {
                    all.push(one);
                }
                match all.is_empty() {
                    true => Err(de::Error::invalid_length(0, &self)),
                    false => Ok(Fscaches(all)),
                }
            }
        }
        d.deserialize_any(Visit)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Staging {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    pub max_size: Size,
}

impl Default for Staging {
    fn default() -> Self {
        Staging { path: None, max_size: Size::gib(1) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metacache {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    pub max_space: Size,
    pub max_grace: Size,
    pub priority_weights: String,
    pub size_weights: String,
    /// Folders, separated by commas.
    pub priority2_names: String,
    pub upload_interval: Span,
    pub max_rescan_mail_count: u32,
    pub folder_change_quiet: Span,
    pub folder_change_max: Span,
    pub idle_upload: Span,
    pub idle_uploads: u32,
    pub close_idle: Span,
    pub max_open_users: u32,
    pub max_parallel_requests: u32,
}

impl Default for Metacache {
    fn default() -> Self {
        Metacache {
            path: None,
            max_space: Size::gib(10),
            max_grace: Size::gib(1),
            priority_weights: crate::cache::weight::PRIORITY_DEFAULT.to_owned(),
            size_weights: crate::cache::weight::SIZE_DEFAULT.to_owned(),
            priority2_names: "INBOX, Junk, Spam, Junk E-mail, Junk Email".to_owned(),
            upload_interval: Span::secs(300),
            max_rescan_mail_count: 10,
            folder_change_quiet: Span::secs(1),
            folder_change_max: Span::secs(5),
            idle_upload: Span::secs(3600),
            idle_uploads: 600,
            close_idle: Span::secs(4 * 3600),
            max_open_users: 10_000,
            max_parallel_requests: 10,
        }
    }
}

/// Keys of the S3 store. `Debug` hides the secrets.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3 {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    pub path_style: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_key_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_access_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_token: Option<String>,
    pub checksums: Checksums,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = |v: &Option<String>| v.as_ref().map(|_| "(hidden)");
        f.debug_struct("S3")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("path_style", &self.path_style)
            .field("access_key_id", &self.access_key_id)
            .field("secret_access_key", &hidden(&self.secret_access_key))
            .field("session_token", &hidden(&self.session_token))
            .field("checksums", &self.checksums)
            .finish()
    }
}

/// When a mail counts as safe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ack {
    #[default]
    Store,
    Journal,
}

/// What reading a mail gives whose object is gone from the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LostMails {
    #[default]
    Error,
    Empty,
}

/// Whether requests carry a checksum of their body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checksums {
    /// Wherever the API knows them.
    #[default]
    WhenSupported,
    /// Only where the API demands them, for stores that do not know the newer kinds.
    WhenRequired,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreLimits {
    pub attempt_timeout: Span,
    pub deadline: Span,
    pub attempts: u32,
    pub delivery_timeout: Span,
    pub max_requests: u32,
    pub read_ahead: u32,
    pub hedge: u32,
    pub stream_memory: Size,
    pub lease: Span,
    pub unmount_timeout: Span,
}

impl Default for StoreLimits {
    fn default() -> Self {
        StoreLimits {
            attempt_timeout: Span::secs(10),
            deadline: Span::secs(30),
            attempts: 5,
            delivery_timeout: Span::secs(60),
            max_requests: 64,
            read_ahead: 32,
            hedge: 5,
            stream_memory: Size(64 << 20),
            lease: Span::secs(180),
            unmount_timeout: Span::secs(60),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gc {
    pub interval: Span,
    pub full_scan: Span,
    pub parallel: u32,
    pub delete_rate: u32,
}

/// Seconds.
const DAY: u64 = 24 * 3600;

impl Default for Gc {
    fn default() -> Self {
        Gc {
            interval: Span::secs(DAY),
            full_scan: Span::secs(7 * DAY),
            parallel: 1,
            delete_rate: 1000,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fuse {
    pub threads: u32,
    pub passthrough: bool,
}

impl Default for Fuse {
    fn default() -> Self {
        Fuse { threads: 0, passthrough: true }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hostchange {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index_dir: Option<String>,
    pub listindex_root: PathBuf,
    pub listindex_layout: String,
    pub listindex_max_size: Size,
    pub login_idle: Span,
    pub migration: bool,
    pub attribute_cache: Span,
    pub lock_wait: Span,
}

impl Default for Hostchange {
    fn default() -> Self {
        Hostchange {
            index_dir: None,
            listindex_root: "/dev/shm/dovecot-listindex".into(),
            listindex_layout: "%2.256Nu/%u".to_owned(),
            listindex_max_size: Size(512 << 20),
            login_idle: Span::secs(60),
            migration: false,
            attribute_cache: Span::secs(1),
            lock_wait: Span::secs(60),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    pub directory: bool,
}

impl Default for Admin {
    fn default() -> Self {
        Admin { socket: None, directory: true }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub level: String,
    pub format: LogFormat,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

impl Default for Log {
    fn default() -> Self {
        Log { level: "info".to_owned(), format: LogFormat::Text, to: None }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

fn err<T>(text: String) -> Result<T, ConfigError> {
    Err(ConfigError(text))
}

#[cfg(test)]
mod tests;
