//! `vmailfs gc`: both ends of it.

use super::exit::{Code, Failure};
use super::heart::told;
use super::show::{age, count};
use super::talk::{ask, unexpected};
use super::{Target, out};
use crate::admin::caches::is_mask;
use crate::admin::gc::{GcReport, GcRequest, GcUser, GcUsers};
use crate::admin::{AdminError, Answer, ErrorKind, Progress, Request};
use crate::dovecot::mask::matches;
use crate::vmail::gc::{Options, Report};
use crate::vmail::gc_users::{self, Outcome};
use crate::vmail::session::{Session, UserCell};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

// ---- the command

pub(super) fn request(user: Option<String>, all: bool, dry_run: bool, scan: bool) -> GcRequest {
    let users = match (user, all) {
        (Some(user), _) => GcUsers::User(user),
        (None, true) => GcUsers::All,
        (None, false) => GcUsers::Open,
    };
    GcRequest { users, dry_run, scan }
}

pub(super) fn command(target: &Target, what: GcRequest, json: bool) -> Result<(), Failure> {
    let one = matches!(&what.users, GcUsers::User(name) if !is_mask(name));
    let request = Request::Gc(what);
    let answer = ask(target.socket.as_deref(), target.mountpoint.as_deref(), &request)?;
    let Answer::Gc(report) = answer else { return Err(unexpected()) };
    if json {
        let text = serde_json::to_string_pretty(&report)
            .map_err(|e| Failure::new(Code::Software, e.to_string()))?;
        out(&format!("{text}\n"))?;
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
        out(&show(&report, now))?;
    }
    match (report.failed.len(), report.foreign) {
        (0, 1..) if one => {
            Err(Failure::new(Code::TempFail, "the user belongs to another backend, which lives"))
        }
        (0, _) => Ok(()),
        (n, _) => Err(Failure::new(
            Code::TempFail,
            format!("gc of {} failed; it is done another time", count(n as u64, "user")),
        )),
    }
}

/// For people. `now`: seconds since 1970.
fn show(report: &GcReport, now: i64) -> String {
    let mut text = String::new();
    let verb = if report.dry_run { "would delete" } else { "deleted" };
    let (mut mails, mut others) = (0, 0);
    for user in &report.users {
        mails += user.mails;
        others += user.bundles + user.files;
        let _ = write!(
            text,
            "{}: {verb} {}, {}, {}",
            user.user,
            count(user.mails, "mail"),
            count(user.bundles, "bundle"),
            count(user.files, "large file")
        );
        if user.kept > 0 {
            let _ = write!(text, "; {} within retention", count(user.kept, "dropped object"));
            let wait = user.next_due.map(|due| u64::try_from(due - now).unwrap_or(0));
            let _ = wait.map(|wait| write!(text, ", the next for {} more", age(wait)));
        }
        text.push('\n');
        let late = if report.dry_run { "would be adopted" } else { "adopted" };
        for object in &user.adopted {
            let _ = writeln!(text, "  {late}: a mail that reached the store late: {object}");
        }
        for object in &user.late {
            let _ = writeln!(
                text,
                "  LATE: a mail that nothing names, kept in the store, not shown: {object}"
            );
        }
        if user.orphans > 0 {
            let _ = writeln!(
                text,
                "  {} of dead sessions, kept for their retention from now on",
                count(user.orphans, "object")
            );
        }
    }
    for (user, reason) in &report.failed {
        let _ = writeln!(text, "{user}: {reason}");
    }
    let looked = count(report.looked_at, "user");
    let _ = write!(
        text,
        "{looked} looked at: {verb} {} and {}",
        count(mails, "mail"),
        count(others, "other object")
    );
    if report.foreign > 0 {
        let _ = write!(text, "; {} left to other backends", count(report.foreign, "user"));
    }
    text.push('\n');
    text
}

// ---- in the mount

/// Carries a request out, on as many users at once as the configuration says.
pub(super) async fn run(
    session: &Arc<Session>,
    what: GcRequest,
    progress: &Progress,
) -> Result<GcReport, AdminError> {
    let no_user = |name: &str| {
        AdminError::new(ErrorKind::NoSuchUser, format!("{name}: no such user in the store"))
    };
    let cells = match &what.users {
        GcUsers::User(mask) if is_mask(mask) => {
            let mut all = gc_users::all_users(session).await.map_err(|e| told(&e))?;
            all.retain(|cell| matches(mask.as_bytes(), cell.name.as_bytes()));
            all
        }
        GcUsers::User(name) => vec![session.user_by_name(name).ok_or_else(|| no_user(name))?],
        GcUsers::Open => gc_users::open_users(session),
        GcUsers::All => gc_users::all_users(session).await.map_err(|e| told(&e))?,
    };
    let options = Options { dry_run: what.dry_run, scan: what.scan, unasked: false };
    let mut report = GcReport { dry_run: what.dry_run, ..GcReport::default() };
    let one = matches!(&what.users, GcUsers::User(name) if !is_mask(name));
    let total = cells.len();
    let mut next = cells.into_iter();
    let mut running = tokio::task::JoinSet::new();
    loop {
        while running.len() < session.settings.gc.parallel.max(1) {
            let Some(cell) = next.next() else { break };
            running.spawn(async move {
                let done = gc_users::one(&cell, options).await;
                (cell, done)
            });
        }
        let (cell, done): (Arc<UserCell>, _) = match running.join_next().await {
            None => break,
            Some(done) => done.map_err(|e| AdminError::new(ErrorKind::Internal, e.to_string()))?,
        };
        report.looked_at += 1;
        match done {
            Ok(Outcome::Done(done)) => report.users.extend(told_of(&cell.name, done)),
            Ok(Outcome::Foreign { .. }) => report.foreign += 1,
            Ok(Outcome::Absent) if one => return Err(no_user(&cell.name)),
            Ok(Outcome::Absent) => {}
            Err(error) => report.failed.push((cell.name.to_string(), error.to_string())),
        }
        progress.step(report.looked_at, total as u64, "users");
    }
    report.users.sort_by(|a, b| a.user.cmp(&b.user));
    Ok(report)
}

fn told_of(user: &str, report: Report) -> Option<GcUser> {
    let Report { mails, bundles, files, kept, next_due, scanned, orphans, adopted, late } = report;
    let nothing = mails + bundles + files + kept + orphans == 0;
    if nothing && adopted.is_empty() && late.is_empty() {
        return None;
    }
    let user = user.to_string();
    Some(GcUser { user, mails, bundles, files, kept, next_due, scanned, orphans, adopted, late })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_are_told_what_was_done_and_what_waits() {
        let user = GcUser {
            user: "joe".into(),
            mails: 2,
            bundles: 1,
            kept: 1,
            next_due: Some(86_400 * 3),
            orphans: 1,
            adopted: vec!["a".into()],
            late: vec!["b".into()],
            ..GcUser::default()
        };
        let report = GcReport {
            looked_at: 3,
            users: vec![user],
            foreign: 1,
            failed: vec![("jane".into(), "the store is down".into())],
            ..GcReport::default()
        };
        let text = show(&report, 0);
        assert_eq!(
            text,
            "joe: deleted 2 mails, 1 bundle, 0 large files; 1 dropped object within retention, the \
             next for 3 days more\n\
             \x20 adopted: a mail that reached the store late: a\n\
             \x20 LATE: a mail that nothing names, kept in the store, not shown: b\n\
             \x20 1 object of dead sessions, kept for their retention from now on\n\
             jane: the store is down\n\
             3 users looked at: deleted 2 mails and 1 other object; 1 user left to other backends\n"
        );
        let dry = show(&GcReport { dry_run: true, ..GcReport::default() }, 0);
        assert_eq!(dry, "0 users looked at: would delete 0 mails and 0 other objects\n");
    }
}
