//! `vmailfs fsck`.

use super::care::{Source, Via};
use super::exit::{Code, Failure};
use super::{out, show};
use crate::admin::caches::is_mask;
use crate::admin::care::{Care, Cared};
use crate::dovecot::mask::matches;
use crate::store::{Reason, StoreError};
use crate::vmail::fsck::Report;
use crate::vmail::version;
use clap::Args;
use std::io::Write;

/// Arguments of `vmailfs fsck`. Exit codes: 0 all is well, 1 it was repaired, 4 there are findings,
/// 75 what was checked is well, but a user's latest changes could not be flushed before the check.
#[derive(Debug, Args)]
pub(super) struct FsckArgs {
    /// Check in this store itself, without a mount; default: ask the running mount.
    #[arg(value_name = "STORE")]
    url: Option<String>,
    /// One user, or those that fit a mask with * and ?.
    #[arg(short, long, required_unless_present = "all", conflicts_with = "all")]
    user: Option<String>,
    /// All users.
    #[arg(short = 'A', long)]
    all: bool,
    /// Read every mail and compare its checksum.
    #[arg(long)]
    read: bool,
    /// Repair what can be repaired: late mails are put into their folders, damaged heads and
    /// bundles are replaced by the last state that can be read (what was there is kept aside).
    #[arg(long)]
    repair: bool,
    /// Take the names of mails away whose objects are gone.
    #[arg(long)]
    drop_lost: bool,
    /// With --repair: the mount that owns the user, or may own it, is certainly not running any
    /// more. Needed where no mount runs, unless the user was handed over cleanly.
    #[arg(long, requires = "repair")]
    owner_gone: bool,
    /// One JSON object a line for each user.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: Source,
}

pub(super) fn fsck(args: &FsckArgs) -> Result<(), Failure> {
    let via = args.source.open(args.url.clone())?;
    let users = match &args.user {
        Some(user) if !is_mask(user) => vec![user.clone()],
        mask => match via.ask(Care::Users)? {
            Cared::Users(mut users) => {
                let fits = |name: &str, mask: &String| matches(mask.as_bytes(), name.as_bytes());
                users.retain(|name| mask.as_ref().is_none_or(|mask| fits(name, mask)));
                users
            }
            _ => return Err(super::talk::unexpected()),
        },
    };
    if users.is_empty() {
        return nobody(args, &via);
    }
    let several = args.all || args.user.as_deref().is_some_and(is_mask);
    let (mut left, mut repaired, mut unflushed, mut failed) = (0, 0, 0_u64, None);
    for user in users {
        match one(args, &via, user.clone()) {
            Ok(report) => {
                left += report.findings.len();
                repaired += report.repaired.len();
                unflushed += u64::from(report.not_flushed.is_some());
                tell(args, &report)?;
            }
            Err(failure) if several => {
                let _ = writeln!(std::io::stderr(), "{user}: not checked: {failure}");
                failed = Some(failure);
            }
            Err(failure) => return Err(failure),
        }
    }
    if let Some(failure) = failed {
        return Err(Failure::new(failure.code, "not all users were checked"));
    }
    match (left, repaired) {
        (0, _) if unflushed > 0 => {
            let users = show::count(unflushed, "user");
            let text = format!("what was flushed is whole; of {users} not everything was");
            Err(Failure::new(Code::TempFail, text))
        }
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::new(Code::Repaired, "everything that was wrong is repaired")),
        (1, _) => Err(Failure::new(Code::Found, "1 finding")),
        (n, _) => Err(Failure::new(Code::Found, format!("{n} findings"))),
    }
}

/// Nobody was checked, of which a script must not hear as of success, unless the store is a new one.
fn nobody(args: &FsckArgs, via: &Via) -> Result<(), Failure> {
    if let Some(mask) = &args.user {
        return Err(Failure::new(Code::NoUser, format!("{mask}: no such user")));
    }
    if let Via::Store(store, runtime) = via {
        runtime.block_on(store.head(version::NAME, Reason("fsck"))).map_err(|e| match e {
            StoreError::NotFound { .. } => {
                let text = format!("{}: this is no store of vmailfs", store.describe());
                Failure::new(Code::Unavailable, text)
            }
            e => e.into(),
        })?;
    }
    let _ = writeln!(std::io::stderr(), "no users");
    Ok(())
}

fn one(args: &FsckArgs, via: &Via, user: String) -> Result<Report, Failure> {
    let FsckArgs { read, repair, drop_lost, owner_gone, .. } = *args;
    let care = Care::Fsck { user, read, repair, drop_lost, owner_gone };
    match via.ask(care)? {
        Cared::Fsck(report) => Ok(*report),
        _ => Err(super::talk::unexpected()),
    }
}

fn tell(args: &FsckArgs, report: &Report) -> Result<(), Failure> {
    if args.json {
        return out(&show::json(report)?);
    }
    let lines: Vec<String> = report.findings.iter().map(|f| format!("{f}\n")).collect();
    out(&lines.concat())?;
    let mut err = std::io::stderr();
    for done in &report.repaired {
        let _ = writeln!(err, "{}: {done}", report.user);
    }
    if let Some(why) = &report.not_flushed {
        let _ =
            writeln!(err, "{}: changes since the last flush are not in this: {why}", report.user);
    }
    let _ = writeln!(err, "{}", show::checked(report));
    Ok(())
}
