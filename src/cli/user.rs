//! `vmailfs user`: earlier states of a user, and what was deleted.

use super::care::Source;
use super::exit::{Code, Failure};
use super::talk::unexpected;
use super::when::moment;
use super::{out, show};
use crate::admin::care::{Care, Cared};
use clap::{ArgGroup, Subcommand};
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(super) enum User {
    /// List the states of a user that can be gone back to.
    History {
        #[arg(short, long)]
        user: String,
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Bring expunged mails back, as new mails in the folders they were in.
    ///
    /// Possible for as long as they are kept (`retention`). Done by the running mount.
    Undelete {
        #[arg(short, long)]
        user: String,
        /// Only mails of this folder: `Sent`, or its path below the user (`mail/.Sent`).
        #[arg(short, long)]
        folder: Option<String>,
        /// Only mails expunged since then: 2h, 3days, "2026-11-22 05:30", RFC 3339.
        #[arg(long)]
        since: Option<String>,
        /// Only tell what would come back.
        #[arg(long)]
        dry_run: bool,
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        source: Source,
    },
    /// Bring an earlier state back.
    ///
    /// --to writes it into a new directory as ordinary mail files, with the index files of that
    /// time; this needs no mount. --in-place brings back, as new mails, what that state had and
    /// is gone; what is there stays as it is.
    #[command(group(ArgGroup::new("where").required(true).args(["to", "in_place"])))]
    Restore {
        #[arg(short, long)]
        user: String,
        /// 2h, 3days, "2026-11-22 05:30", RFC 3339.
        #[arg(long)]
        at: String,
        /// A new or empty directory.
        #[arg(long)]
        to: Option<PathBuf>,
        #[arg(long)]
        in_place: bool,
        /// With --in-place: only tell what would come back.
        #[arg(long, conflicts_with = "to")]
        dry_run: bool,
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        source: Source,
    },
}

fn time(text: &str) -> Result<i64, Failure> {
    moment(text).map_err(|text| Failure::new(Code::Usage, text))
}

pub(super) fn user(command: User) -> Result<(), Failure> {
    match command {
        User::History { user, json, source } => {
            match source.open(None)?.ask(Care::History { user })? {
                Cared::History(history) if json => out(&show::json(&history)?),
                Cared::History(history) => {
                    if let Some(why) = &history.not_flushed {
                        let _ = writeln!(
                            std::io::stderr(),
                            "{}: changes since the last flush are no state yet: {why}",
                            history.user
                        );
                    }
                    out(&show::history(&history))
                }
                _ => Err(unexpected()),
            }
        }
        User::Undelete { user, folder, since, dry_run, json, source } => {
            let since = since.as_deref().map(time).transpose()?;
            brought_back(&source, Care::Undelete { user, folder, since, dry_run }, json)
        }
        User::Restore { user, at, to: None, dry_run, json, source, .. } => {
            brought_back(&source, Care::Restore { user, at: time(&at)?, dry_run }, json)
        }
        User::Restore { user, at, to: Some(dir), json, source, .. } => {
            let at = time(&at)?;
            let dir = std::path::absolute(&dir)
                .map_err(|e| Failure::new(Code::CantCreate, format!("{}: {e}", dir.display())))?;
            match source.open(None)?.ask(Care::Export { user, at, dir })? {
                Cared::Exported(done) => {
                    out(&if json { show::json(&done)? } else { show::exported(&done) })?;
                    match done.missing.len() {
                        0 => Ok(()),
                        n => Err(Failure::new(Code::DataErr, format!("{n} files are missing"))),
                    }
                }
                _ => Err(unexpected()),
            }
        }
    }
}

fn brought_back(source: &Source, care: Care, json: bool) -> Result<(), Failure> {
    match source.open(None)?.ask(care)? {
        Cared::BroughtBack(done) => {
            out(&if json { show::json(&done)? } else { show::brought_back(&done) })?;
            match done.left.len() {
                0 => Ok(()),
                n => Err(Failure::new(Code::DataErr, format!("{n} mails stay away"))),
            }
        }
        _ => Err(unexpected()),
    }
}
