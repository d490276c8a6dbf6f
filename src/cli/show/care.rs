//! Answers about users' data, for people.

use super::super::exit::{Code, Failure};
use super::super::when::shown;
use super::{bytes, count};
use crate::admin::care::{BroughtBack, Exported, HistoryReport};
use crate::vmail::fsck::Report;
use serde::Serialize;
use std::fmt::Write as _;

pub(in super::super) fn json(what: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(what)
        .map(|text| text + "\n")
        .map_err(|e| Failure::new(Code::Software, e.to_string()))
}

/// One line: what was looked at.
pub(in super::super) fn checked(report: &Report) -> String {
    let owner = report.owner.as_ref().map(|o| format!(", owned by {o}")).unwrap_or_default();
    let newer = match report.newer {
        0 => String::new(),
        n => format!(", {n} newer than the last flush"),
    };
    let left = match report.leftovers {
        0 => String::new(),
        n => format!(", {} that gc --full takes away", count(n, "leftover")),
    };
    let read = match report.read {
        0 => String::new(),
        n => format!(", {} of mail read", bytes(n)),
    };
    format!(
        "{}: {} in {}{newer}, {} on the dropped list{left}, {}{read}{owner}: {}",
        report.user,
        count(report.mails, "mail"),
        count(report.folders, "folder"),
        count(report.dropped, "object"),
        count(report.states, "state"),
        match report.findings.len() as u64 {
            0 => "nothing wrong".to_owned(),
            n => count(n, "finding"),
        }
    )
}

pub(in super::super) fn history(history: &HistoryReport) -> String {
    let mut out = String::new();
    let _ =
        writeln!(out, "{:<19}  {:>8}  {:>7}  {:>8}  BUNDLE", "TIME", "EPOCH", "FOLDERS", "MAILS");
    for state in &history.states {
        let mails = state.mails.map_or_else(|| "damaged".to_owned(), |n| n.to_string());
        let (time, bundle) = (shown(state.time), state.bundle.as_deref().unwrap_or("-"));
        let _ = writeln!(
            out,
            "{time:<19}  {:>8}  {:>7}  {mails:>8}  {bundle}",
            state.epoch, state.folders
        );
    }
    let _ = writeln!(out, "({})", history.ends);
    out
}

pub(in super::super) fn brought_back(done: &BroughtBack) -> String {
    let mut out = String::new();
    for folder in &done.folders {
        let _ = writeln!(out, "{folder}: made anew");
    }
    for mail in &done.mails {
        let expunged = mail.expunged.map(|t| format!(", gone since {}", shown(t)));
        let now = if mail.name.is_empty() { String::new() } else { format!(" as {}", mail.name) };
        let _ = writeln!(
            out,
            "{}: {} ({}{}){now}",
            mail.folder,
            mail.old_name,
            bytes(mail.size),
            expunged.unwrap_or_default()
        );
    }
    for (what, why) in &done.left {
        let _ = writeln!(out, "{what}: stays away: {why}");
    }
    let verb = if done.dry_run { "would come back" } else { "brought back" };
    let _ = writeln!(out, "{} {verb}", count(done.mails.len() as u64, "mail"));
    out
}

pub(in super::super) fn exported(done: &Exported) -> String {
    let mut out = String::new();
    for (path, why) in &done.missing {
        let _ = writeln!(out, "{path}: {why}");
    }
    let _ = writeln!(
        out,
        "{} as of {}: {} and {} in {} ({})",
        done.dir.display(),
        shown(done.time),
        count(done.mails, "mail"),
        count(done.files, "other file"),
        count(done.folders, "folder"),
        bytes(done.bytes)
    );
    out
}
