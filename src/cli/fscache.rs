//! `fscache`: what it holds, counting anew, emptying.

use super::caches::{ask, size};
use super::exit::{Code, Failure};
use super::formatter::{Format, Table};
use super::show;
use super::talk::unexpected;
use super::{Target, out};
use crate::admin::caches::{CacheAnswer, CacheRequest, FscacheRescanned};
use crate::config::Span;
use clap::Subcommand;
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub(super) enum Fscache {
    /// Show what each fscache holds, and what it was good for.
    Status {
        /// In bytes, not in units for people.
        #[arg(short)]
        bytes: bool,
        #[command(flatten)]
        target: Target,
    },
    /// Count what is on the disk, and say whether the books were right.
    Rescan {
        /// Only the fscache in this directory.
        path: Option<PathBuf>,
        /// Remove files that were last written longer ago: seconds, or 30min, 2h, 7days.
        #[arg(value_parser = age)]
        max_age: Option<u64>,
        #[command(flatten)]
        target: Target,
    },
    /// Remove all copies; what is read just now stays until it is closed.
    Clean {
        #[command(flatten)]
        target: Target,
    },
}

fn age(text: &str) -> Result<u64, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    text.parse::<Span>().map(|span| span.0.as_secs()).map_err(|e| e.to_string())
}

pub(super) fn fscache(command: Fscache, format: Option<Format>) -> Result<(), Failure> {
    match command {
        Fscache::Status { bytes, target } => match ask(&target, CacheRequest::FscacheStatus)? {
            CacheAnswer::Fscaches(all) => {
                let mut table = Table::new([
                    "path",
                    "bytes-used",
                    "max-size",
                    "files",
                    "hits",
                    "misses",
                    "streamed",
                    "evictions",
                    "evicted",
                    "open",
                    "failing",
                ]);
                for one in all {
                    table.rows.push(vec![
                        one.path.display().to_string().into(),
                        size(one.bytes_used, bytes),
                        size(one.max_size, bytes),
                        one.files.into(),
                        one.hits.into(),
                        one.misses.into(),
                        size(one.streamed, bytes),
                        one.evictions.into(),
                        size(one.evicted, bytes),
                        size(one.open, bytes),
                        if one.failing { "yes" } else { "no" }.into(),
                    ]);
                }
                out(&table.text(format.unwrap_or(Format::Table))?)
            }
            _ => Err(unexpected()),
        },
        Fscache::Rescan { path, max_age, target } => {
            let real = |path: PathBuf| {
                path.canonicalize()
                    .map_err(|e| Failure::new(Code::Usage, format!("{}: {e}", path.display())))
            };
            let path = path.map(real).transpose()?;
            match ask(&target, CacheRequest::FscacheRescan { path, max_age })? {
                CacheAnswer::FscachesRescanned(all) => {
                    all.iter().try_for_each(|one| out(&rescanned(one)))
                }
                _ => Err(unexpected()),
            }
        }
        Fscache::Clean { target } => match ask(&target, CacheRequest::FscacheClean)? {
            CacheAnswer::FscachesCleaned(all) => all.iter().try_for_each(|one| {
                let files = show::count(one.files, "file");
                let (bytes, open) = (show::bytes(one.bytes), show::bytes(one.open));
                let path = one.path.display();
                out(&match one.open {
                    0 => format!("{path}: {files} ({bytes}) removed\n"),
                    _ => format!("{path}: {files} ({bytes}) removed, {open} of it still open\n"),
                })
            }),
            _ => Err(unexpected()),
        },
    }
}

fn rescanned(one: &FscacheRescanned) -> String {
    let path = one.path.display();
    let files = show::count(one.files, "file");
    let mut text = match one.was_right {
        true => format!("{path}: {files}, {} bytes: the size was right\n", one.bytes_used),
        false => format!(
            "{path}: {files}, {} bytes: the size was wrong by {}\n",
            one.bytes_used,
            -i128::from(one.off_by)
        ),
    };
    if one.removed_files > 0 {
        let removed = show::count(one.removed_files, "old file");
        text.push_str(&format!("{path}: {removed}, {} bytes removed\n", one.removed_bytes));
    }
    if one.strange_files > 0 {
        let strange = show::count(one.strange_files, "file");
        let bytes = one.strange_bytes;
        text.push_str(&format!(
            "{path}: {strange}, {bytes} bytes that are no copies; left alone\n"
        ));
    }
    text
}
