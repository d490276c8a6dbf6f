//! `metacache`, `fscache` and `obox`: the words of obox's own commands, so that what admins and
//! their scripts know works here. `docs/ADMIN.md` has them side by side.

use super::exit::{Code, Failure};
use super::formatter::Format;
use super::show;
use super::talk::{self, unexpected};
use super::{Target, out};
use crate::admin::caches::{CacheAnswer, CacheRequest, FlushRequest, Unflushed, Whom};
use crate::admin::{Answer, Request};
use clap::{Args, Subcommand};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

mod tables;

use tables::{by_root, by_time, list, rescanned};
pub(super) use tables::{list_text, size};

/// Which users a command is for.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Users {
    /// One user, or those whose names match a mask with * and ?.
    #[arg(short, long)]
    user: Option<String>,
    /// All users that the mount knows.
    #[arg(short = 'A', long = "all")]
    all: bool,
    /// The users in this file, one a line.
    #[arg(short = 'F', long = "file", value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Users {
    pub(super) fn whom(self) -> Result<Whom, Failure> {
        if let Some(user) = self.user {
            return Ok(Whom::User(user));
        }
        let Some(file) = self.file else { return Ok(Whom::all()) };
        let text = std::fs::read_to_string(&file)
            .map_err(|e| Failure::new(Code::NoInput, format!("{}: {e}", file.display())))?;
        let names = text.lines().map(str::trim).filter(|line| !line.is_empty());
        Ok(Whom::Names(names.map(str::to_owned).collect()))
    }
}

/// A field to find users by, or (like `-f` before the command) a format of the answer.
fn field_or_format(text: &str) -> Result<FieldOrFormat, String> {
    if let Ok(format) = <Format as clap::ValueEnum>::from_str(text, false) {
        return Ok(FieldOrFormat::Format(format));
    }
    match text == "username" || text.starts_with("user_") {
        true => Ok(FieldOrFormat::Field(text.to_owned())),
        false => Err("neither a format (flow, pager, tab, table, json) nor a field \
                      (username, user_...)"
            .to_owned()),
    }
}

#[derive(Debug, Clone)]
pub(super) enum FieldOrFormat {
    Field(String),
    Format(Format),
}

#[derive(Debug, Subcommand)]
pub(super) enum Metacache {
    /// Show who is in the metacache, what it holds of them, and what is not uploaded yet.
    List {
        /// Only users whose name (with -f FIELD: that field) matches this (`*` and `?`).
        mask: Option<String>,
        /// A format of the answer, or the field that the mask is for.
        #[arg(short, value_name = "FORMAT|FIELD", value_parser = field_or_format)]
        field: Vec<FieldOrFormat>,
        #[command(flatten)]
        target: Target,
    },
    /// Show what the metacache uses, by when users were last seen.
    Status {
        /// By directory and device instead.
        #[arg(long)]
        roots: bool,
        /// In bytes, not in units for people.
        #[arg(short)]
        bytes: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Upload users' changes now.
    Flush {
        #[command(flatten)]
        users: Users,
        /// Only important changes: flags, expunges, moves, folders; no caches.
        #[arg(short, long)]
        important: bool,
        /// Only users with changes of this priority (0 to 3) or of a less important one.
        #[arg(short, value_name = "PRIORITY", value_parser = clap::value_parser!(u8).range(0..=3))]
        priority: Option<u8>,
        /// Of doveadm's: here one user has one tree, and all of it is meant.
        namespace: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Upload the changes of all users now.
    Flushall {
        /// Only important changes: flags, expunges, moves, folders; no caches.
        #[arg(short, long)]
        important: bool,
        /// The mask is for this field of the users, not for their names.
        #[arg(short, value_name = "FIELD")]
        field: Option<String>,
        /// Only users whose name matches this (`*` and `?`).
        mask: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Remove users' files from the local disk. They come back at the next access.
    ///
    /// Fails (75) for users with changes that are not uploaded, unless told what to do with them.
    Clean {
        #[command(flatten)]
        users: Users,
        /// Only what was not used for so many days.
        #[arg(short, value_name = "DAYS", default_value_t = 0)]
        days: u32,
        /// Only files of this priority (0 to 3) and of less important ones.
        #[arg(short, value_name = "PRIORITY", default_value_t = 0,
              value_parser = clap::value_parser!(u8).range(0..=3))]
        priority: u8,
        /// Upload changes first.
        #[arg(long)]
        flush: bool,
        /// Throw changes away: users go back to what was uploaded last. Mails stay.
        #[arg(long, conflicts_with = "flush")]
        discard: bool,
        /// Do not ask whether --discard is meant.
        #[arg(long, requires = "discard")]
        yes: bool,
        /// Of doveadm's: here one user has one tree, and all of it is meant.
        namespace: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Look whether somebody else has changed users; if so they are read anew.
    Refresh {
        #[command(flatten)]
        users: Users,
        /// Of doveadm's: here one user has one tree, and all of it is meant.
        namespace: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Upload users, give them up, and forget them here. Exit code 75: one is in use.
    Remove {
        /// Users whose names match this (`*` and `?`).
        mask: String,
        #[command(flatten)]
        target: Target,
    },
    /// Count what is on the disk, and put the books right.
    Rescan {
        #[command(flatten)]
        target: Target,
    },
    /// Change what is shown of users.
    #[command(subcommand)]
    Update(Update),
    /// Unpack a bundle for inspection.
    Unpack(super::unpack::UnpackArgs),
}

#[derive(Debug, Subcommand)]
pub(super) enum Update {
    /// Set another name (a field user_...) of a user, which lists show and masks can be for.
    Userdb {
        username: String,
        field: String,
        /// Empty: take the field away.
        value: String,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum Obox {
    /// Whole users.
    #[command(subcommand)]
    User(OboxUser),
}

#[derive(Debug, Subcommand)]
pub(super) enum OboxUser {
    /// Delete everything of users. Exit code 65: somebody has a file open.
    ///
    /// Disable the user and end its sessions first. The bytes stay in the store until `retention` is
    /// over, and `vmailfs user restore` can bring them back until then.
    Delete {
        #[command(flatten)]
        users: Users,
        #[command(flatten)]
        target: Target,
    },
    /// Wait until nobody has a file of the users open. Exit code 65: somebody still has.
    Wait {
        #[command(flatten)]
        users: Users,
        /// Seconds to wait at most.
        #[arg(short, default_value_t = 0)]
        t: u64,
        #[command(flatten)]
        target: Target,
    },
}

pub(super) fn ask(target: &Target, what: CacheRequest) -> Result<CacheAnswer, Failure> {
    match talk::ask_of(target, &Request::Caches { what })? {
        Answer::Caches(answer) => Ok(answer),
        _ => Err(unexpected()),
    }
}

pub(super) fn metacache(command: Metacache, format: Option<Format>) -> Result<(), Failure> {
    match command {
        Metacache::List { mask, field, target } => {
            let (mut by, mut format) = (None, format);
            for one in field {
                match one {
                    FieldOrFormat::Field(field) => by = Some(field),
                    FieldOrFormat::Format(chosen) => format = Some(chosen),
                }
            }
            match ask(&target, CacheRequest::MetacacheList { mask, field: by })? {
                CacheAnswer::List(rows) => out(&list(&rows).text(format.unwrap_or(Format::Table))?),
                _ => Err(unexpected()),
            }
        }
        Metacache::Status { roots, bytes, target } => {
            match ask(&target, CacheRequest::MetacacheStatus)? {
                CacheAnswer::Metacache(report) => {
                    let table =
                        if roots { by_root(&report, bytes) } else { by_time(&report, bytes) };
                    out(&table.text(format.unwrap_or(Format::Table))?)
                }
                _ => Err(unexpected()),
            }
        }
        Metacache::Flush { users, important, priority, namespace: _, target } => {
            let what = FlushRequest {
                whom: users.whom()?,
                important_only: important,
                min_priority: priority,
            };
            talk::flush(&target, what)
        }
        Metacache::Flushall { important, field, mask, target } => {
            let whom = Whom::Matching { mask, field };
            let what = FlushRequest { whom, important_only: important, min_priority: None };
            talk::flush(&target, what)
        }
        Metacache::Clean { users, days, priority, flush, discard, yes, namespace: _, target } => {
            let unflushed = match (flush, discard) {
                (true, _) => Unflushed::Flush,
                (_, true) => Unflushed::Discard,
                _ => Unflushed::Refuse,
            };
            if discard && !yes {
                really()?;
            }
            let whom = users.whom()?;
            let what =
                CacheRequest::MetacacheClean { whom, min_priority: priority, days, unflushed };
            cleaned(ask(&target, what)?)
        }
        Metacache::Remove { mask, target } => {
            cleaned(ask(&target, CacheRequest::MetacacheRemove { mask })?)
        }
        Metacache::Refresh { users, namespace: _, target } => {
            let what = CacheRequest::MetacacheRefresh { whom: users.whom()? };
            let CacheAnswer::Refreshed(all) = ask(&target, what)? else { return Err(unexpected()) };
            let mut failed = 0;
            for user in all {
                if let Some(error) = &user.error {
                    out(&format!("{}: {error}\n", user.user))?;
                    failed += 1;
                } else if user.changed {
                    out(&format!("{}: was changed elsewhere, and is read anew\n", user.user))?;
                }
            }
            match failed {
                0 => Ok(()),
                n => Err(Failure::new(Code::TempFail, format!("{n} users could not be looked at"))),
            }
        }
        Metacache::Rescan { target } => match ask(&target, CacheRequest::MetacacheRescan)? {
            CacheAnswer::Rescanned(found) => out(&rescanned(&found)),
            _ => Err(unexpected()),
        },
        Metacache::Update(Update::Userdb { username, field, value, target }) => {
            let what = CacheRequest::UpdateUserdb { user: username, field, value };
            match ask(&target, what)? {
                CacheAnswer::Done => Ok(()),
                _ => Err(unexpected()),
            }
        }
        Metacache::Unpack(args) => super::unpack::unpack(&args),
    }
}

/// Asks at the terminal; no terminal is a no.
fn really() -> Result<(), Failure> {
    let question =
        "Changes that are not uploaded yet will be lost: flags, moves, expunges. Go on? ";
    let mut answer = String::new();
    if std::io::stdin().is_terminal() {
        let _ = write!(std::io::stderr(), "{question}");
        let _ = std::io::stdin().read_line(&mut answer);
    }
    match answer.trim() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::new(Code::Usage, "nothing was done; --yes says that it is meant")),
    }
}

fn cleaned(answer: CacheAnswer) -> Result<(), Failure> {
    let CacheAnswer::Cleaned(all) = answer else { return Err(unexpected()) };
    let (mut freed, mut left) = (0, 0);
    let mut failed = 0_u64;
    for user in &all {
        freed += user.freed;
        left += user.left;
        let why = match (&user.error, user.busy) {
            (Some(error), _) => error.as_str(),
            (None, true) => "is in use",
            (None, false) => continue,
        };
        failed += 1;
        out(&format!("{}: {why}\n", user.user))?;
    }
    let done = show::count(all.len() as u64 - failed, "user");
    out(&format!("{done}: {} freed, {} left\n", show::bytes(freed), show::bytes(left)))?;
    match failed {
        0 => Ok(()),
        n => Err(Failure::new(Code::TempFail, format!("{n} of the users stay as they were"))),
    }
}

pub(super) fn obox(command: Obox) -> Result<(), Failure> {
    let Obox::User(command) = command;
    match command {
        OboxUser::Delete { users, target } => delete(users, &target),
        OboxUser::Wait { users, t, target } => wait(users, t, &target),
    }
}

fn delete(users: Users, target: &Target) -> Result<(), Failure> {
    if users.all {
        let text = "-A would delete the mail of everybody: name the users with -u or -F";
        return Err(Failure::new(Code::Usage, text));
    }
    let CacheAnswer::Deleted(all) = ask(target, CacheRequest::UserDelete { whom: users.whom()? })?
    else {
        return Err(unexpected());
    };
    let (mut busy, mut failed) = (Vec::new(), 0);
    for user in all {
        let files = show::count(user.files, "file");
        let folders = show::count(user.folders, "folder");
        out(&format!("{}: {files} and {folders} deleted\n", user.user))?;
        if let Some(error) = &user.error {
            out(&format!("{}: {error}\n", user.user))?;
            failed += 1;
        }
        if user.busy {
            busy.push(user.user);
        }
    }
    match (busy.as_slice(), failed) {
        ([], 0) => Ok(()),
        ([], n) => Err(Failure::new(Code::TempFail, format!("{n} of the users are still there"))),
        (busy, _) => Err(Failure::new(
            Code::DataErr,
            format!("files are still open of: {}; what is left of them stays", busy.join(", ")),
        )),
    }
}

fn wait(users: Users, t: u64, target: &Target) -> Result<(), Failure> {
    match ask(target, CacheRequest::UserWait { whom: users.whom()?, secs: t })? {
        CacheAnswer::Busy(busy) if busy.is_empty() => Ok(()),
        CacheAnswer::Busy(busy) => Err(Failure::new(
            Code::DataErr,
            format!("files are still open of: {}", busy.join(", ")),
        )),
        _ => Err(unexpected()),
    }
}
