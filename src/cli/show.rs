//! Answers of a mount, for people.

use crate::admin::{
    AtRisk, CacheUse, FlushReport, HostchangeStatus, RequestCount, Status, StopReport, StoreHealth,
    UserStatus,
};
use std::fmt::Write as _;

mod care;

pub(super) use care::{brought_back, checked, exported, history, json};

/// Users shown by `status`; `--json` has them all.
const SHOWN_USERS: usize = 20;

pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "K", "M", "G", "T"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0}{}", UNITS[unit])
    } else {
        format!("{value:.1}{}", UNITS[unit])
    }
}

pub(super) fn age(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}min", secs / 60),
        3600..86_400 => format!("{}h {}min", secs / 3600, secs % 3600 / 60),
        _ => format!("{} days", secs / 86_400),
    }
}

pub(super) fn count(n: u64, one: &str) -> String {
    if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") }
}

/// One sentence: what would be lost with this machine's disk.
pub(super) fn at_risk(risk: &AtRisk) -> String {
    if risk.nothing() {
        return "nothing: every mail and every important change is in the store".to_owned();
    }
    let mut parts = Vec::new();
    if risk.users > 0 {
        let oldest = risk.oldest_age.map(|a| format!(", the oldest {} old", age(a)));
        parts.push(format!(
            "important changes of {} ({}){}",
            count(risk.users, "user"),
            bytes(risk.changed_bytes),
            oldest.unwrap_or_default()
        ));
    }
    if risk.promised_mails > 0 {
        parts.push(format!(
            "{} ({}) acknowledged and only on this machine's disk so far",
            count(risk.promised_mails, "mail"),
            bytes(risk.promised_bytes)
        ));
    }
    if risk.unpublished_mails > 0 {
        parts.push(format!(
            "{} being written ({}), not acknowledged to any server",
            count(risk.unpublished_mails, "mail"),
            bytes(risk.unpublished_bytes)
        ));
    }
    parts.join("; ")
}

fn cache(out: &mut String, name: &str, cache: &CacheUse) {
    let percent = cache.used.saturating_mul(100).checked_div(cache.max).unwrap_or(0);
    let files = cache.files.map(|n| format!("  {}", count(n, "file"))).unwrap_or_default();
    let hits = cache.hit_ratio().map(|r| format!("  hits {:>3.0} %", r * 100.0));
    let hits = hits.unwrap_or_default();
    let _ = writeln!(
        out,
        "    {name:<10} {:>7} of {:>7} {percent:>3} %{hits}{files}  {}",
        bytes(cache.used),
        bytes(cache.max),
        cache.path
    );
}

fn users(out: &mut String, users: &[UserStatus]) {
    let width = users.iter().take(SHOWN_USERS).map(|u| u.user.len()).max().unwrap_or(0).max(4);
    let _ = writeln!(out, "    {:<width$}  {:<11}  {:>9}  NEW MAILS", "USER", "CHANGES", "OLDEST");
    for u in users.iter().take(SHOWN_USERS) {
        let oldest = u.oldest_age.map(age).unwrap_or_else(|| "-".to_owned());
        let changes = u.changes.as_str();
        let new = u.mails_newer_than_bundle;
        let _ = write!(out, "    {:<width$}  {changes:<11}  {oldest:>9}  {new}", u.user);
        let _ = match &u.error {
            Some(error) => writeln!(out, "  {error}"),
            None => writeln!(out),
        };
    }
    if users.len() > SHOWN_USERS {
        let _ = writeln!(out, "    and {} more (--json shows all)", users.len() - SHOWN_USERS);
    }
}

pub(super) fn health(health: &StoreHealth) -> String {
    let mut text = match health.down_for {
        None => "answers".to_owned(),
        Some(secs) => format!("DOWN for {}", age(secs)),
    };
    if health.outages > 0 {
        let all = age(health.down_seconds as u64);
        let _ = write!(text, "; {}, {all} in all", count(health.outages, "outage"));
    }
    text
}

/// `1.7 ms`
pub(super) fn millis(seconds: f64) -> String {
    let ms = seconds * 1000.0;
    if ms >= 100.0 { format!("{ms:.0} ms") } else { format!("{ms:.1} ms") }
}

fn requests(out: &mut String, all: &[RequestCount]) {
    let total: u64 = all.iter().map(|r| r.count).sum();
    let _ = writeln!(out, "\n  Store requests: {total}");
    for r in all {
        let mean = millis(r.mean_seconds);
        let _ = write!(out, "    {:<10} {:<14} {:>9} {mean:>10}", r.operation, r.reason, r.count);
        for (n, what) in [(r.bytes_in, "in"), (r.bytes_out, "out")] {
            if n > 0 {
                let _ = write!(out, "  {} {what}", bytes(n));
            }
        }
        if r.failed > 0 {
            let _ = write!(out, "  {} failed", r.failed);
        }
        out.push('\n');
    }
}

/// A mount in the NFS mode has no store, no caches and nothing to upload.
fn hostchange_status(s: &Status, h: &HostchangeStatus, now: i64) -> String {
    let up = age(u64::try_from(now.saturating_sub(s.since)).unwrap_or(0));
    let stopping = if s.stopping { ", UNMOUNTING" } else { "" };
    let mut out = format!("{} on {}\n", s.store, s.mountpoint);
    let _ = writeln!(
        out,
        "  vmailfs {}, pid {}, for {up}, host {}{stopping}",
        s.version, s.pid, h.host
    );
    out.push_str(
        "\n  NFS mode: everything goes straight through; only dovecot.list.index* is on this machine.\n  \
         Locks of fcntl reach the server; those of flock do not.\n",
    );
    let (used, max) = (bytes(h.used), bytes(h.max));
    let _ = writeln!(
        out,
        "\n  List indexes: {used} of {max} in {}, {} removed for want of room",
        h.listindex_root, h.evicted
    );
    let (active, known) = (h.active, h.known);
    let _ = writeln!(out, "  Users: {active} with a session, {known} files and directories known");
    let _ = writeln!(
        out,
        "  Logins: {} kept the list index, {} dropped it, {} had none; on two hosts at once: {}",
        h.kept, h.dropped, h.failed, h.contested
    );
    errors(&mut out, s);
    out
}

fn errors(out: &mut String, s: &Status) {
    if s.errors.iter().all(|e| e.count == 0) {
        out.push_str("\n  Errors: none\n");
    } else {
        out.push_str("\n  Errors:\n");
        for e in s.errors.iter().filter(|e| e.count > 0) {
            let _ = writeln!(out, "    {:<25} {:>9}", e.name, e.count);
        }
    }
}

/// `now`: seconds since 1970.
pub(super) fn status(s: &Status, now: i64) -> String {
    if let Some(hostchange) = &s.hostchange {
        return hostchange_status(s, hostchange, now);
    }
    let mut out = String::new();
    let _ = writeln!(out, "{} on {}", s.store, s.mountpoint);
    let up = u64::try_from(now.saturating_sub(s.since)).unwrap_or(0);
    let _ = write!(
        out,
        "  vmailfs {}, pid {}, for {}, backend {}",
        s.version,
        s.pid,
        age(up),
        s.backend
    );
    out.push_str(if s.single_backend { " (the only one)" } else { "" });
    if let Some(lease) = &s.lease {
        let left = age(lease.seconds_left.unsigned_abs());
        let _ = match &lease.taken_by {
            Some(holder) => write!(out, ", NAME TAKEN by {holder}: nothing is written here"),
            None if lease.held => write!(out, ", lease held for {left} more"),
            None => write!(out, ", LEASE LOST {left} ago"),
        };
    }
    out.push_str(if s.stopping { ", UNMOUNTING\n" } else { "\n" });
    let _ = writeln!(out, "\n  At risk: {}.", at_risk(&s.at_risk));
    let _ = writeln!(out, "\n  Store: {}", health(&s.store_health));
    let changed = s.backlog.users_important + s.backlog.users_unimportant;
    let _ = write!(out, "\n  Users: {} open, {changed} with changes to upload", s.users_open);
    let oldest = s.backlog.oldest_age.map(|a| format!(", the oldest {} old", age(a)));
    let _ = writeln!(out, "{}", oldest.unwrap_or_default());
    if !s.users.is_empty() {
        users(&mut out, &s.users);
    }
    out.push_str("\n  Caches:\n");
    cache(&mut out, "fscache", &s.caches.fscache);
    cache(&mut out, "staging", &s.caches.staging);
    cache(&mut out, "metacache", &s.caches.metacache);
    if s.aside.users > 0 {
        let _ = writeln!(
            out,
            "    Kept aside for you to look at, in no budget: changes of {} ({}) in {}",
            count(s.aside.users, "user"),
            bytes(s.aside.bytes),
            s.aside.path
        );
    }
    let f = &s.flushes;
    let _ = write!(out, "\n  Flushes: {} ({})", f.done, bytes(f.bytes));
    if f.failed > 0 {
        let _ = write!(out, ", {} failed", f.failed);
    }
    out.push('\n');
    requests(&mut out, &s.requests);
    if !s.damaged.is_empty() {
        out.push_str(
            "\n  DAMAGED, not served, mail is deferred (vmailfs fsck -u USER --repair):\n",
        );
        for d in &s.damaged {
            let _ = writeln!(out, "    {}: {}", d.user, d.error);
        }
    }
    if s.lost_mails > 0 {
        let _ = writeln!(
            out,
            "\n  Lost mails met: {} (named in a listing, gone from the store; the log names them)",
            s.lost_mails
        );
    }
    errors(&mut out, s);
    out
}

pub(super) fn flushed(report: &FlushReport) -> String {
    let mut out = format!("{} flushed ({})", count(report.flushed, "user"), bytes(report.bytes));
    if report.unchanged > 0 {
        let _ = write!(out, ", {} had nothing to upload", report.unchanged);
    }
    out.push('\n');
    for (user, reason) in &report.failed {
        let _ = writeln!(out, "{user}: not flushed: {reason}");
    }
    for user in &report.unknown {
        let _ = writeln!(out, "{user}: no such user");
    }
    out
}

pub(super) fn stopped(report: &StopReport) -> String {
    let mut out = String::new();
    if !report.at_risk.nothing() {
        let _ = writeln!(
            out,
            "left with the store not up to date; on local disk only: {}. It is kept, and goes to \
             the store after the next mount.",
            at_risk(&report.at_risk)
        );
        users(&mut out, &report.users);
    }
    if !report.holders.is_empty() {
        let _ = writeln!(out, "still held files open: {}", report.holders.join(", "));
    }
    out
}
