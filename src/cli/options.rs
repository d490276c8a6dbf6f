//! Flags and options of `vmailfs mount`, and how they become one configuration.
//!
//! Precedence, lowest first: defaults, the file, the environment, `-o`, flags.

use super::exit::{Code, Failure};
use crate::config::Config;
use clap::Args;
use std::path::PathBuf;

/// Arguments of `vmailfs mount`.
#[derive(Debug, Clone, Default, Args)]
pub struct MountArgs {
    /// file:///some/dir or s3://bucket/prefix; may stand in the file.
    #[arg(requires = "mountpoint")]
    pub store: Option<String>,
    /// An existing directory; may stand in the file.
    pub mountpoint: Option<PathBuf>,
    /// Configuration file; `vmailfs config` prints what may stand in it. Also as
    /// VMAILFS_CONFIG.
    #[arg(long, short)]
    pub config: Option<PathBuf>,
    /// Comma-separated options as in fstab: `config=FILE`, any key of the configuration
    /// (`allow_other`, `state_dir=DIR`, `metacache.max_space=4G`), and the usual ones.
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Set any key of the configuration: metacache.max_space=4G.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go to the background once mounted.
    #[arg(long)]
    pub daemon: bool,
    /// Directory for caches, journals and staging.
    #[arg(long)]
    pub state_dir: Option<PathBuf>,
    /// Let other accounts use the mount (the default).
    #[arg(long, overrides_with = "no_allow_other")]
    pub allow_other: bool,
    /// Only the mounting account may use the mount.
    #[arg(long)]
    pub no_allow_other: bool,
    /// Let root delete mails through the mount.
    #[arg(long)]
    pub allow_root_delete: bool,
    /// No other machine ever mounts this store.
    #[arg(long)]
    pub single_backend: bool,
    /// Take the backend's name at once: the machine that had it last is certainly dead.
    #[arg(long)]
    pub take_backend: bool,
    /// Which directories are users: %u, %d/%n, %2.256Nu/%u.
    #[arg(long)]
    pub layout: Option<String>,
    /// Show files below users as owned by USER[:GROUP].
    #[arg(long)]
    pub owner: Option<String>,
    /// Owner at and above users' directories.
    #[arg(long)]
    pub root_owner: Option<String>,
    /// Octal mode above users' directories.
    #[arg(long)]
    pub root_mode: Option<String>,
    /// This machine's name among those that share the store; default: host name.
    #[arg(long)]
    pub backend: Option<String>,
    /// URL of the S3 server; default: AWS.
    #[arg(long)]
    pub s3_endpoint: Option<String>,
    /// Region of the bucket; default: from the environment, else us-east-1.
    #[arg(long)]
    pub s3_region: Option<String>,
    /// Put the bucket into the path, not into the host name.
    #[arg(long)]
    pub s3_path_style: bool,
    /// Time after which important changes are in the store.
    #[arg(long)]
    pub upload_interval: Option<String>,
    /// error, warn, info, debug, trace; also per module. Also as VMAILFS_LOG.
    #[arg(long)]
    pub log_level: Option<String>,
    /// text or json.
    #[arg(long)]
    pub log_format: Option<String>,
    /// stderr, syslog or a file.
    #[arg(long)]
    pub log_to: Option<String>,
}

/// Options that mount(8), fstab and systemd give to every helper and that need nothing here.
/// FUSE mounts are nosuid, nodev, noexec and noatime anyway.
const IGNORED: &[&str] = &[
    "defaults",
    "rw",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "nodiratime",
    "relatime",
    "norelatime",
    "async",
    "dirsync",
    "default_permissions",
    "_rnetdev",
];

fn ignored(option: &str) -> bool {
    IGNORED.contains(&option)
        || option.starts_with("x-")
        || option.starts_with("X-")
        || option.starts_with("comment=")
        || option.starts_with("user=")
}

fn usage(text: impl Into<String>) -> Failure {
    Failure::new(Code::Usage, text)
}

/// What `-o` said: the configuration file, and keys with their values.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub config: Option<PathBuf>,
    pub keys: Vec<(String, String)>,
}

pub(super) fn parse_options(lists: &[String]) -> Result<Options, Failure> {
    let mut found = Options::default();
    for option in lists.iter().flat_map(|l| l.split(',')).map(str::trim).filter(|o| !o.is_empty()) {
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        match (name, value) {
            ("config", Some(file)) => found.config = Some(file.into()),
            ("ro", None) => return Err(usage("option ro: vmailfs has no read-only mount")),
            ("suid" | "dev" | "exec" | "remount", None) => {
                return Err(usage(format!("option {name} is not possible with vmailfs")));
            }
            _ if ignored(option) => {}
            (name, Some(value)) => found.keys.push((name.replace('-', "_"), value.to_owned())),
            (name, None) => {
                let name = name.replace('-', "_");
                found.keys.push(match name.strip_prefix("no_") {
                    Some(positive) => (positive.to_owned(), "no".to_owned()),
                    None => (name, "yes".to_owned()),
                });
            }
        }
    }
    Ok(found)
}

impl MountArgs {
    /// The configuration that this command line asks for.
    pub fn effective(&self) -> Result<Config, Failure> {
        self.effective_in(&|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    /// The same in a given environment.
    pub(super) fn effective_in(
        &self,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, Failure> {
        let options = parse_options(&self.options)?;
        let from_env = || env("VMAILFS_CONFIG").map(PathBuf::from);
        let mut config = match self.config.clone().or(options.config).or_else(from_env) {
            Some(file) => Config::load(&file)?,
            None => Config::default(),
        };
        if let Some(level) = env("VMAILFS_LOG") {
            config.set("log.level", &level)?;
        }
        for (key, value) in &options.keys {
            config.set(key, value).map_err(|e| usage(format!("-o: {e}")))?;
        }
        for pair in &self.set {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| usage(format!("--set {pair}: write KEY=VALUE")))?;
            config.set(key.trim(), value.trim()).map_err(|e| usage(format!("--set: {e}")))?;
        }
        let path = |p: &Option<PathBuf>| -> Result<Option<String>, Failure> {
            match p {
                None => Ok(None),
                Some(p) => match p.to_str() {
                    Some(text) => Ok(Some(text.to_owned())),
                    None => Err(usage(format!("{}: paths must be UTF-8", p.display()))),
                },
            }
        };
        let yes = |given: bool| given.then(|| "yes".to_owned());
        let allow_other =
            if self.no_allow_other { Some("no".into()) } else { yes(self.allow_other) };
        let flags: [(&str, Option<String>); 18] = [
            ("store", self.store.clone()),
            ("mountpoint", path(&self.mountpoint)?),
            ("state_dir", path(&self.state_dir)?),
            ("allow_other", allow_other),
            ("allow_root_delete", yes(self.allow_root_delete)),
            ("single_backend", yes(self.single_backend)),
            ("layout", self.layout.clone()),
            ("owner", self.owner.clone()),
            ("root_owner", self.root_owner.clone()),
            ("root_mode", self.root_mode.clone()),
            ("backend", self.backend.clone()),
            ("s3.endpoint", self.s3_endpoint.clone()),
            ("s3.region", self.s3_region.clone()),
            ("s3.path_style", yes(self.s3_path_style)),
            ("metacache.upload_interval", self.upload_interval.clone()),
            ("log.level", self.log_level.clone()),
            ("log.format", self.log_format.clone()),
            ("log.to", self.log_to.clone()),
        ];
        for (key, value) in flags {
            if let Some(value) = value {
                config.set(key, &value).map_err(|e| usage(e.0))?;
            }
        }
        Ok(config)
    }
}
