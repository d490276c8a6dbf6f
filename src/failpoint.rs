//! Named places at which a test can make this process die, wait or fail.
//!
//! They exist only with the feature `failpoints`, which the tests of this package turn on and a
//! build for use does not: without it [`hit`] is an empty function.
//!
//! `VMAILFS_FAILPOINTS` names a file that need not be there. Whenever a place is reached the file
//! is looked at, so a test can arm places while the daemon runs:
//!
//! ```text
//! publish.after-put=kill@3;journal.before-sync=sleep(200)
//! ```
//!
//! | action | what happens |
//! |---|---|
//! | `kill` | the process kills itself with SIGKILL, having said where on stderr |
//! | `sleep(MS)` | the thread sleeps, with whatever locks are held there |
//! | `error` | the call fails as if the disk or the store had failed |
//!
//! With `@N` the action is for the N-th time the place is reached since the file said so, else
//! for every time. A name that no place has aborts the process: a test that aims at nothing must
//! not pass.
//!
//! Rejected: the `fail` crate. Its registry has no action that dies as a process killed from
//! outside does (its `panic` unwinds, and the daemon goes on), a misspelt name is silently never
//! reached, and its macro returns early only from functions written around it.

/// A place. The constants below are all there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point(pub &'static str);

macro_rules! points {
    ($($(#[$doc:meta])* $id:ident = $name:literal;)*) => {
        $($(#[$doc])* pub const $id: Point = Point($name);)*
        /// All of them.
        pub const ALL: &[Point] = &[$($id),*];
    };
}

points! {
    /// Nothing was put: the mail is not there, and nobody was told that it is.
    PUBLISH_BEFORE_PUT = "publish.before-put";
    /// An object nobody names: dropped by a start with the journal, adopted by one without.
    PUBLISH_AFTER_PUT = "publish.after-put";
    /// Safe and recorded, and nobody was told: the mail is there.
    PUBLISH_AFTER_RECORD = "publish.after-record";
    /// In a store that is a directory: an object has its name, and nobody has synced that.
    DIR_NAMED = "dir.named";
    /// The cut was taken and nothing of it is in the store.
    FLUSH_BEFORE_BUNDLE = "flush.before-bundle";
    /// A bundle that no head names.
    FLUSH_AFTER_BUNDLE = "flush.after-bundle";
    /// `head.next` is written and the store has the old head.
    FLUSH_BEFORE_SWAP = "flush.before-swap";
    /// The store has the new head and this disk does not know it.
    FLUSH_AFTER_SWAP = "flush.after-swap";
    /// The head alone was swapped for a higher ceiling, and this disk does not know it.
    CEILING_AFTER_SWAP = "ceiling.after-swap";
    /// The next owner is noted here and not in the store.
    OPEN_BEFORE_SWAP = "open.before-swap";
    /// The epoch is ours, and what came after the last flush was not looked for.
    OPEN_AFTER_SWAP = "open.after-swap";
    /// Mails were found above the watermark and none of them is recorded.
    RECOVER_BEFORE_RECORD = "recover.before-record";
    /// One folder has its mails back.
    RECOVER_BETWEEN_FOLDERS = "recover.between-folders";
    /// All came back, and this disk still says that they did not.
    RECOVER_BEFORE_DONE = "recover.before-done";
    /// What the record would say did not happen, and nobody was told.
    JOURNAL_BEFORE_APPEND = "journal.before-append";
    /// Half a record: the next start ends at the one before.
    JOURNAL_TORN = "journal.torn";
    /// Recorded, and not done on the disk: the next start does it.
    JOURNAL_AFTER_APPEND = "journal.after-append";
    /// In the page cache, which the death of a process does not touch.
    JOURNAL_BEFORE_SYNC = "journal.before-sync";
    /// No snapshot is written, and the old journal stands.
    SNAPSHOT_BEFORE = "snapshot.before";
    /// Some snapshots are newer than the journal that goes with them says.
    SNAPSHOT_BETWEEN = "snapshot.between";
    /// The new journal is whole and not in its place.
    SNAPSHOT_BEFORE_JOURNAL = "snapshot.before-journal";
    /// The new journal is in its place, and the head is not said to be clean.
    SNAPSHOT_AFTER_JOURNAL = "snapshot.after-journal";
    /// Files were found missing in the metacache, and none is back.
    RESTORE_BEFORE = "restore.before";
    /// Some files of a folder are back, and some are not.
    RESTORE_BETWEEN = "restore.between";
    /// The NFS mode: the local record is locked, and nothing is done.
    HOSTCHANGE_LOCKED = "hostchange.locked";
    /// The local record says nothing, and the old list index is there.
    HOSTCHANGE_INVALIDATED = "hostchange.invalidated";
    /// Some of the list index is gone.
    HOSTCHANGE_DROPPING = "hostchange.dropping";
    /// All of it is gone, and nobody is told.
    HOSTCHANGE_DROPPED = "hostchange.dropped";
    /// Our file is on NFS under a name of its own, and not recorded.
    HOSTCHANGE_WRITTEN = "hostchange.written";
    /// It is recorded, and not in its place.
    HOSTCHANGE_RECORDED = "hostchange.recorded";
    /// It is in its place.
    HOSTCHANGE_RENAMED = "hostchange.renamed";
    /// A session ended alone, and the record does not say so.
    HOSTCHANGE_SETTLING = "hostchange.settling";
    /// Some of the list index on NFS is copied.
    MIGRATE_COPYING = "migrate.copying";
    /// All of it is, and it is still on NFS.
    MIGRATE_COPIED = "migrate.copied";
    /// Some of it is gone from NFS.
    MIGRATE_REMOVING = "migrate.removing";
    /// A user's list index is to be removed, and the record says nothing.
    USERCACHE_INVALIDATED = "usercache.invalidated";
    /// The list index is gone, and the record and the directory are there.
    USERCACHE_EMPTIED = "usercache.emptied";
    /// The record is gone, the directory is there.
    USERCACHE_UNLOCKED = "usercache.unlocked";
}

/// The variable that names the file that says what is to happen where.
pub const VARIABLE: &str = "VMAILFS_FAILPOINTS";

/// Passes a place. An error is to be treated as one of the disk or the store there.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn hit(_: Point) -> std::io::Result<()> {
    Ok(())
}

/// Whether something is to happen at a place, for places that cost something to get to.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn armed(_: Point) -> bool {
    false
}

#[cfg(feature = "failpoints")]
pub use active::{armed, hit};

#[cfg(feature = "failpoints")]
mod active {
    use super::{ALL, Point, VARIABLE};
    use std::path::PathBuf;
    use std::sync::{Mutex, OnceLock, PoisonError};
    use std::time::Duration;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Action {
        Kill,
        Sleep(u64),
        Error,
    }

    /// A place, what happens there, and when: at the n-th time, or every time if that is 0.
    type Armed = (Point, Action, u64);

    #[derive(Debug, Default)]
    struct Plan {
        text: String,
        /// And how often each was reached.
        armed: Vec<(Armed, u64)>,
    }

    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    static PLAN: Mutex<Plan> = Mutex::new(Plan { text: String::new(), armed: Vec::new() });

    /// What is planned for a place, as the file has it at this moment.
    fn with_plan<T>(point: Point, look: impl FnOnce(&mut (Armed, u64)) -> T) -> Option<T> {
        let file = FILE.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from)).as_ref()?;
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let mut plan = PLAN.lock().unwrap_or_else(PoisonError::into_inner);
        if plan.text != text {
            match parse(&text) {
                Ok(armed) => plan.armed = armed.into_iter().map(|armed| (armed, 0)).collect(),
                Err(wrong) => {
                    eprintln!("{VARIABLE}: {wrong}");
                    std::process::abort();
                }
            }
            plan.text = text;
        }
        plan.armed.iter_mut().find(|((at, ..), _)| *at == point).map(look)
    }

    pub(super) fn parse(text: &str) -> Result<Vec<Armed>, String> {
        let items = text.split(';').map(str::trim).filter(|item| !item.is_empty());
        items.map(|item| parse_one(item).ok_or_else(|| item.to_owned())).collect()
    }

    fn parse_one(item: &str) -> Option<Armed> {
        let (name, what) = item.split_once('=')?;
        let point = ALL.iter().find(|point| point.0 == name)?;
        let (what, nth) = match what.split_once('@') {
            Some((what, nth)) => (what, nth.parse().ok().filter(|n| *n > 0)?),
            None => (what, 0),
        };
        let action = match what {
            "kill" => Action::Kill,
            "error" => Action::Error,
            _ => Action::Sleep(what.strip_prefix("sleep(")?.strip_suffix(')')?.parse().ok()?),
        };
        Some((*point, action, nth))
    }

    /// Whether something is to happen at a place, for places that cost something to get to.
    pub fn armed(point: Point) -> bool {
        with_plan(point, |_| ()).is_some()
    }

    /// Passes a place. An error is to be treated as one of the disk or the store there.
    pub fn hit(point: Point) -> std::io::Result<()> {
        let reached = with_plan(point, |((_, action, nth), passed)| {
            *passed += 1;
            (*nth == 0 || passed == nth).then_some((*action, *passed))
        });
        let Some(Some((action, n))) = reached else { return Ok(()) };
        eprintln!("failpoint {} (time {n}): {action:?}", point.0);
        match action {
            Action::Kill => {
                // SAFETY: a plain system call; it does not return to this process's threads.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
                loop {
                    std::thread::park();
                }
            }
            Action::Sleep(ms) => {
                std::thread::sleep(Duration::from_millis(ms));
                Ok(())
            }
            Action::Error => Err(std::io::Error::other(format!("failpoint {}", point.0))),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::super::*;
        use super::{Action, parse};

        #[test]
        fn plans_name_places_and_refuse_what_is_no_place() {
            assert_eq!(
                parse(
                    "publish.after-put=kill@3; journal.before-sync=sleep(20);flush.after-swap=error"
                )
                .unwrap(),
                [
                    (PUBLISH_AFTER_PUT, Action::Kill, 3),
                    (JOURNAL_BEFORE_SYNC, Action::Sleep(20), 0),
                    (FLUSH_AFTER_SWAP, Action::Error, 0)
                ]
            );
            assert_eq!(parse("").unwrap(), []);
            for wrong in ["publish.after=kill", "publish.after-put", "publish.after-put=kill@0"] {
                assert!(parse(wrong).is_err(), "{wrong}");
            }
        }

        #[test]
        fn names_are_unique() {
            let mut names: Vec<&str> = ALL.iter().map(|p| p.0).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), ALL.len());
        }
    }
}
