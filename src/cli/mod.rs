//! The commands.
//!
//! [`mount`] becomes the daemon; the others talk to a running one over its admin socket
//! ([`talk`]), or, like `config`, to nobody. Exit codes are those of [`exit`].

mod bars;
mod caches;
mod care;
mod exit;
mod formatter;
mod fscache;
mod fsck;
mod gc;
mod heart;
mod index_lock;
mod live;
mod logging;
mod mount;
mod nfs;
mod nfs_mount;
mod options;
mod run;
mod show;
mod shown;
mod talk;
mod top;
mod unpack;
mod user;
mod when;

pub use exit::{Code, Failure};
pub use options::MountArgs;

use clap::{Args, Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// A mail server's mail in an object store, as ordinary files.
#[derive(Debug, Parser)]
#[command(name = "vmailfs", version, disable_help_subcommand = true)]
#[command(after_help = "Exit codes are those of sysexits.h: 64 usage, 65 the data are not as \
    asked for, 66 no such file, state or folder, 67 no such user, 69 no such mount, 70 defect, 75 try again (nothing is lost), 77 not allowed, 78 configuration.")]
struct Cli {
    /// How tables are written; before the command, as with doveadm.
    #[arg(short, value_name = "FORMAT")]
    format: Option<formatter::Format>,
    /// Tell how far long work is, also where there is no terminal (-D does the same).
    #[arg(short, short_alias = 'D')]
    verbose: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a store, or (nfs:///srv/vmail) mail on NFS.
    ///
    /// Stays in the foreground unless --daemon is given. SIGTERM, Ctrl-C, `vmailfs umount` and
    /// `umount` flush everything, then leave.
    Mount(Box<MountArgs>),
    /// Flush everything, unmount, and wait until the mount's process has ended.
    ///
    /// Exit code 75: the store did not take everything in time; the rest stays on local disk, is
    /// listed, and goes to the store after the next mount.
    Umount {
        #[arg(required_unless_present = "config")]
        mountpoint: Option<PathBuf>,
        /// Take the mount point from this configuration file.
        #[arg(long, short, conflicts_with = "mountpoint")]
        config: Option<PathBuf>,
        /// Only clear away a mount whose process was killed; leave one that works alone.
        #[arg(long)]
        dead: bool,
        /// The mount's admin socket, if it is not in the run directory.
        #[arg(long)]
        socket: Option<PathBuf>,
    },
    /// Print every configuration key with its value, unit and meaning.
    Config {
        /// Show the values of this file (secrets are hidden) instead of the defaults.
        #[arg(long, short)]
        config: Option<PathBuf>,
    },
    /// Show what a mount does, what its caches hold, and what is at risk.
    Status {
        /// The mount; may be left out if there is only one.
        mountpoint: Option<PathBuf>,
        /// The mount's admin socket.
        #[arg(long, short = 'S', conflicts_with = "mountpoint")]
        socket: Option<PathBuf>,
        /// The mount, as other commands name it.
        #[arg(long = "mountpoint", value_name = "DIR", conflicts_with_all = ["mountpoint", "socket"])]
        at: Option<PathBuf>,
        /// Everything as one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Watch a mount: what is at risk, and what it does each second. q ends it.
    Top {
        /// The mount; may be left out if there is only one.
        mountpoint: Option<PathBuf>,
        /// The mount's admin socket.
        #[arg(long, short = 'S', conflicts_with = "mountpoint")]
        socket: Option<PathBuf>,
        /// The mount, as other commands name it.
        #[arg(long = "mountpoint", value_name = "DIR", conflicts_with_all = ["mountpoint", "socket"])]
        at: Option<PathBuf>,
        /// Seconds between two looks.
        #[arg(long, short, default_value_t = 2.0)]
        delay: f64,
        /// Show one view (of so many seconds) and end; needs no terminal.
        #[arg(long)]
        once: bool,
    },
    /// Delete from the store what was dropped longer than `retention` ago.
    ///
    /// A mount does this by itself, once in `gc.interval`, for the users that are open in it.
    /// Without -u and -A: these, now. Nothing is deleted that has a name, nor what never had one.
    Gc {
        /// One user, or those that fit a mask with * and ?; they need not be open.
        #[arg(short, long, conflicts_with = "all")]
        user: Option<String>,
        /// All users of the store, but for those that belong to other backends.
        #[arg(short = 'A', long)]
        all: bool,
        /// Only say what would be deleted.
        #[arg(long)]
        dry_run: bool,
        /// Also list everything in the store, for mails that reached it late and for what dead
        /// sessions left (else once in `gc.full_scan`).
        #[arg(long)]
        full: bool,
        /// The answer as one JSON object.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Index files and listings of the users seen lately.
    #[command(subcommand)]
    Metacache(caches::Metacache),
    /// Copies of mails on the local disk.
    #[command(subcommand)]
    Fscache(fscache::Fscache),
    /// Whole users, in obox's words.
    #[command(subcommand)]
    Obox(caches::Obox),
    /// Check users: what is in the store against what is named, both ways.
    ///
    /// One finding a line, fields separated by tabs: kind, user, folder, name, object, and a text
    /// for people. Exit code 0: nothing wrong; 1: repaired; 4: something is (still) wrong; others
    /// as everywhere: it could not be checked.
    Fsck(Box<fsck::FsckArgs>),
    /// Earlier states of a user, and mails that were deleted.
    #[command(subcommand)]
    User(user::User),
    /// Mail on NFS, with the index of mailboxes on this machine (docs/NFS.md).
    #[command(subcommand)]
    Nfs(nfs::Nfs),
    /// For the daemon's own use: locks an index log and appends to it.
    #[command(hide = true)]
    IndexLock { path: PathBuf },
}

/// Which mount is meant; may be left out if there is only one.
#[derive(Debug, Default, Args)]
struct Target {
    /// The mount's admin socket.
    #[arg(long, short = 'S', short_alias = 'a', conflicts_with = "mountpoint")]
    socket: Option<PathBuf>,
    /// Where it is mounted.
    #[arg(long)]
    mountpoint: Option<PathBuf>,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() {
                ExitCode::from(Code::Usage as u8)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if cli.verbose {
        bars::be_verbose();
    }
    let result = match cli.command {
        Command::Mount(args) => mount::mount(&args),
        Command::Umount { mountpoint, config, dead, socket } => umount_point(mountpoint, config)
            .and_then(|m| match dead {
                true => talk::umount_dead(&m),
                false => talk::umount(&m, socket.as_deref()),
            }),
        Command::Config { config } => print_config(config),
        Command::Status { mountpoint, socket, at, json } => {
            talk::status(mountpoint.or(at).as_deref(), socket.as_deref(), json)
        }
        Command::Gc { user, all, dry_run, full, json, target } => {
            gc::command(&target, gc::request(user, all, dry_run, full), json)
        }
        Command::Fsck(args) => fsck::fsck(&args),
        Command::User(command) => user::user(command),
        Command::Nfs(command) => nfs::nfs(command, cli.format),
        Command::IndexLock { path } => index_lock::hold(&path),
        Command::Metacache(command) => caches::metacache(command, cli.format),
        Command::Fscache(command) => fscache::fscache(command, cli.format),
        Command::Obox(command) => caches::obox(command),
        Command::Top { mountpoint, socket, at, delay, once } => {
            let every = Duration::try_from_secs_f64(delay).unwrap_or(Duration::from_secs(2));
            top::top(mountpoint.or(at).as_deref(), socket.as_deref(), every, once)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "vmailfs: {failure}");
            ExitCode::from(failure.code as u8)
        }
    }
}

fn print_config(file: Option<PathBuf>) -> Result<(), Failure> {
    let config = match file {
        Some(file) => crate::config::Config::load(&file)?,
        None => crate::config::Config::default(),
    };
    out(&config.print()?)
}

fn umount_point(given: Option<PathBuf>, file: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let from_file = match (&given, &file) {
        (None, Some(file)) => crate::config::Config::load(file)?.mountpoint,
        _ => None,
    };
    given.or(from_file).ok_or_else(|| Failure::new(Code::Usage, "no mount point given"))
}

/// Writes to standard output; a reader that has had enough (`| head`) is no error.
fn out(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Code::IoErr, format!("standard output: {e}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
