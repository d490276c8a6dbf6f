//! `vmailfs nfs`: the NFS mode without a mount, and cleaning `/dev/shm`.

use super::exit::{Code, Failure};
use super::formatter::{Format, Table};
use super::{out, show};
use crate::config::{Size, Span};
use crate::dovecot::template::Layout;
use crate::hostchange::Trouble;
use crate::hostchange::check::{self, Host, Outcome, Rules, Settle, Told};
use crate::hostchange::clean::{self, Cleaned, EntryState};
use crate::hostchange::place::Dir;
use clap::Subcommand;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where sites keep list indexes.
pub(super) const DEFAULT_ROOT: &str = "/dev/shm/dovecot-listindex";

#[derive(Debug, Subcommand)]
pub(super) enum Nfs {
    /// At a login: drop the local index of mailboxes if the user was on another host.
    ///
    /// For Dovecot's post-login scripts, where no vmailfs is mounted. Directories may hold Dovecot's
    /// variables (%u, %n, %d, hashes like %2.256Nu). Exit code 0: the index may be used; 75:
    /// it could not be made safe, so the login should fail.
    Login {
        /// The user, as Dovecot names him.
        #[arg(short, long)]
        user: String,
        /// The user's INDEX directory, on NFS.
        #[arg(long, value_name = "DIR")]
        index: PathBuf,
        /// The user's LISTINDEX directory, below /dev/shm.
        #[arg(long, value_name = "DIR")]
        listindex: PathBuf,
        /// This host's name in .lasthost; default: the host name.
        #[arg(long)]
        host: Option<String>,
        /// Look for an index of mailboxes on NFS, and take it over (nfs_hostchange_migration).
        #[arg(long)]
        migration: bool,
        /// Time after a change of host from which a login may keep what it builds; until then
        /// a session on the host before may still be open.
        #[arg(long, default_value = "1min", value_parser = span)]
        settle: Span,
        /// Time to wait for another login of the same user.
        #[arg(long, default_value = "10s", value_parser = span)]
        lock_timeout: Span,
        /// What to become afterwards: "$@" of the script.
        #[arg(last = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Indexes of mailboxes below /dev/shm.
    #[command(subcommand)]
    Usercache(Usercache),
}

#[derive(Debug, Subcommand)]
pub(super) enum Usercache {
    /// Remove one user's index of mailboxes, if the user was not here for AGE (7days).
    ///
    /// Exit code 75: he was, or is logging in at this moment; nothing was changed.
    Clean {
        #[arg(value_parser = span)]
        age: Span,
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Remove those of all users below ROOT that were not here for AGE.
    CleanAll {
        #[arg(value_parser = span)]
        age: Span,
        #[arg(value_name = "ROOT", default_value = DEFAULT_ROOT)]
        root: PathBuf,
        /// Remove more, those used longest ago first, until all are within this size.
        #[arg(long, value_parser = size)]
        max_size: Option<Size>,
    },
    /// Show the users' directories below ROOT, those used longest ago first.
    List {
        #[arg(value_name = "ROOT", default_value = DEFAULT_ROOT)]
        root: PathBuf,
    },
}

fn span(text: &str) -> Result<Span, String> {
    text.parse().map_err(|e: crate::config::ParseError| e.0)
}

fn size(text: &str) -> Result<Size, String> {
    text.parse().map_err(|e: crate::config::ParseError| e.0)
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Failure {
        let code = match &trouble {
            Trouble::Refused { .. } => Code::NoPerm,
            Trouble::Locked(_) | Trouble::Io { .. } => Code::TempFail,
        };
        Failure::new(code, trouble.to_string())
    }
}

/// Seconds since 1970.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn warn(text: &str) {
    let _ = writeln!(std::io::stderr(), "vmailfs: {text}");
}

pub(super) fn nfs(command: Nfs, format: Option<Format>) -> Result<(), Failure> {
    // Warnings of the layers below; in a script they go to the mail server's log.
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).without_time();
    let _ = log.with_max_level(tracing::Level::WARN).with_target(false).try_init();
    match command {
        Nfs::Login { user, index, listindex, host, migration, settle, lock_timeout, command } => {
            let usage = |text| Failure::new(Code::Usage, text);
            let host = Host::new(host).map_err(usage)?;
            let rules =
                Rules { patience: lock_timeout.0, migration, settle: Settle::Later(settle.0) };
            let index = expand(&index, &user).map_err(usage)?;
            let listindex = expand(&listindex, &user).map_err(usage)?;
            login(&user, &index, &listindex, &host, &rules)?;
            become_command(&command)
        }
        Nfs::Usercache(Usercache::Clean { age, dir }) => clean_one(age.0, &dir),
        Nfs::Usercache(Usercache::CleanAll { age, root, max_size }) => {
            clean_all(age.0, &root, max_size)
        }
        Nfs::Usercache(Usercache::List { root }) => {
            let text = list(&root)?.text(format.unwrap_or(Format::Table))?;
            out(&text)
        }
    }
}

/// A path with Dovecot's variables filled in.
fn expand(path: &Path, user: &str) -> Result<PathBuf, String> {
    let text = path.to_str().ok_or_else(|| format!("{}: not UTF-8", path.display()))?;
    let Some(at) = text.find('%') else { return Ok(path.to_owned()) };
    let from = text[..at].rfind('/').map_or(0, |slash| slash + 1);
    let layout = Layout::parse(&text[from..]).map_err(|e| format!("{text}: {e}"))?;
    let below = layout.path_of(user).ok_or_else(|| format!("{text}: `{user}` is no user there"))?;
    Ok(below.iter().fold(PathBuf::from(&text[..from]), |path, name| path.join(name)))
}

fn login(
    user: &str,
    index: &Path,
    local: &Path,
    host: &Host,
    rules: &Rules,
) -> Result<(), Failure> {
    let temp = |trouble: Trouble| Failure::new(Code::TempFail, format!("{user}: {trouble}"));
    let opened = match Dir::index(index) {
        Ok(dir) => dir,
        // The first login of all: Dovecot makes the directory later, and there is nothing to drop
        // but what is here.
        Err(trouble) if trouble.errno() == Some(libc::ENOENT) => std::fs::create_dir_all(index)
            .map_err(Trouble::io("making the INDEX directory", index))
            .and_then(|()| Dir::index(index))
            .map_err(temp)?,
        Err(trouble) => return Err(temp(trouble)),
    };
    match check::enter(&opened, local, host, rules, now()).map_err(temp)?.1 {
        Outcome::Kept | Outcome::Dropped { told: Told::Written, .. } => Ok(()),
        Outcome::Dropped { told: Told::Removed(trouble), .. } => {
            warn(&format!("{user}: {trouble}: the file was removed, so each login starts anew"));
            Ok(())
        }
        // Nothing can be changed on a file system that is read-only.
        Outcome::Dropped { told: Told::Not(t), .. } if t.errno() == Some(libc::EROFS) => {
            warn(&format!("{user}: {t}"));
            Ok(())
        }
        Outcome::Dropped { told: Told::Not(trouble), .. } => Err(Failure::new(
            Code::TempFail,
            format!("{user}: {trouble}: other hosts would not notice this session"),
        )),
    }
}

fn become_command(command: &[std::ffi::OsString]) -> Result<(), Failure> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let error = std::process::Command::new(program).args(arguments).exec();
    let text = format!("{}: {error}", program.to_string_lossy());
    Err(Failure::new(Code::TempFail, text))
}

fn clean_one(age: Duration, dir: &Path) -> Result<(), Failure> {
    let said = dir.display();
    match clean::clean(dir, age, now())? {
        Cleaned::Removed(bytes) => out(&format!("{said}: removed, {}\n", show::bytes(bytes))),
        Cleaned::Absent => out(&format!("{said}: nothing there\n")),
        Cleaned::Used(ago) => {
            let ago = show::age(u64::try_from(ago).unwrap_or(0));
            Err(Failure::new(Code::TempFail, format!("{said}: used {ago} ago: left alone")))
        }
        Cleaned::Busy => {
            Err(Failure::new(Code::TempFail, format!("{said}: a login is under way: left alone")))
        }
    }
}

fn clean_all(age: Duration, root: &Path, max_size: Option<Size>) -> Result<(), Failure> {
    let budget = max_size.map(|size| size.0);
    let swept = clean::clean_all(root, Some(age), budget, now(), &|_| false)?;
    out(&format!(
        "removed {} ({}), left {} ({})\n",
        show::count(swept.removed, "user"),
        show::bytes(swept.freed),
        show::count(swept.kept, "user"),
        show::bytes(swept.left)
    ))?;
    for trouble in &swept.failed {
        warn(&trouble.to_string());
    }
    match swept.failed.len() {
        0 => Ok(()),
        n => Err(Failure::new(Code::IoErr, format!("{n} could not be cleaned; see above"))),
    }
}

fn list(root: &Path) -> Result<Table, Failure> {
    let mut table = Table::new(["directory", "bytes-used", "last-access", "state"]);
    for entry in clean::list(root)? {
        let state = match entry.state {
            EntryState::Settled => "settled",
            EntryState::Open => "open",
            EntryState::Invalid => "invalid",
        };
        let directory = entry.path.to_string_lossy().into_owned();
        let row = vec![directory.into(), entry.size.into(), entry.accessed.into(), state.into()];
        table.rows.push(row);
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_may_hold_dovecots_variables() {
        let expand = |path: &str, user| expand(Path::new(path), user);
        assert_eq!(expand("/dev/shm/x/%d/%n", "a@b").unwrap(), Path::new("/dev/shm/x/b/a"));
        assert_eq!(expand("/srv/u", "a@b").unwrap(), Path::new("/srv/u"));
        assert!(expand("/srv/%q", "a").is_err());
        assert!(expand("/srv/%u", "../a").is_err());
        let hashed = expand("/dev/shm/l/%2.256Nu/%u", "testuser").unwrap();
        assert_eq!(hashed.components().count(), 6);
        assert!(hashed.ends_with("testuser"));
    }
}
