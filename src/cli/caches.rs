//! `metacache`, `fscache` and `obox`: the words of obox's own commands, so that what admins and
//! their scripts know works here. `docs/ADMIN.md` has them side by side.

use super::Target;
use super::exit::{Code, Failure};
use super::talk::{self, unexpected};
use crate::admin::caches::{CacheAnswer, CacheRequest, FlushRequest, Whom};
use crate::admin::{Answer, Request};
use clap::{Args, Subcommand};
use std::path::PathBuf;

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
    fn whom(self) -> Result<Whom, Failure> {
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

#[derive(Debug, Subcommand)]
pub(super) enum Metacache {
    /// Upload users' changes now.
    Flush {
        #[command(flatten)]
        users: Users,
        /// Only important changes: flags, expunges, moves, folders; no caches.
        #[arg(short, long)]
        important: bool,
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

fn ask(target: &Target, what: CacheRequest) -> Result<CacheAnswer, Failure> {
    match talk::ask_of(target, &Request::Caches { what })? {
        Answer::Caches(answer) => Ok(answer),
        _ => Err(unexpected()),
    }
}

pub(super) fn metacache(command: Metacache) -> Result<(), Failure> {
    match command {
        Metacache::Flush { users, important, target } => {
            let what = FlushRequest { whom: users.whom()?, important_only: important };
            talk::flush(&target, what)
        }
        Metacache::Flushall { important, field, mask, target } => {
            let whom = Whom::Matching { mask, field };
            let what = FlushRequest { whom, important_only: important };
            talk::flush(&target, what)
        }
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

pub(super) fn obox(command: Obox) -> Result<(), Failure> {
    let Obox::User(OboxUser::Wait { users, t, target }) = command;
    match ask(&target, CacheRequest::UserWait { whom: users.whom()?, secs: t })? {
        CacheAnswer::Busy(busy) if busy.is_empty() => Ok(()),
        CacheAnswer::Busy(busy) => Err(Failure::new(
            Code::DataErr,
            format!("files are still open of: {}", busy.join(", ")),
        )),
        _ => Err(unexpected()),
    }
}
