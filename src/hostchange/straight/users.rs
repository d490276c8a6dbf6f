//! Users of the mount: when a session begins and ends.
//!
//! Any call for something of a user is an access. The first one after `login_idle` without any waits
//! for the check; the others find a time and store one. A thread of the mount ends the sessions
//! of those who have gone ([`Users::tick`]).

use super::Settings;
use crate::hostchange::Trouble;
use crate::hostchange::check::{self, Ended, Outcome, Rules, Settle, Told};
use crate::hostchange::clean::{self, Swept};
use crate::hostchange::lock::touch_in;
use crate::hostchange::place::Dir;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long the lock of a record may be waited for; whoever has it makes a check, too.
const PATIENCE: Duration = Duration::from_secs(20);
/// An INDEX directory that cannot be opened is tried again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// A user of the mount.
#[derive(Debug)]
pub struct User {
    name: String,
    index: PathBuf,
    local: Option<PathBuf>,
    /// Milliseconds since the mount began.
    last: AtomicU64,
    active: AtomicBool,
    session: Mutex<Session>,
}

#[derive(Debug, Default)]
struct Session {
    /// Where the list index is, if there is a place for it.
    dir: Option<Arc<Dir>>,
    failed: Option<Instant>,
}

/// What happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub users: u64,
    pub active: u64,
    pub kept: u64,
    pub dropped: u64,
    pub failed: u64,
    pub contested: u64,
    pub evicted: u64,
}

#[derive(Debug, Default)]
struct Counters {
    kept: AtomicU64,
    dropped: AtomicU64,
    failed: AtomicU64,
    contested: AtomicU64,
    evicted: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Users {
    settings: Settings,
    rules: Rules,
    began: Instant,
    all: Mutex<HashMap<String, Arc<User>>>,
    counters: Counters,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Seconds since 1970.
fn wall() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl Users {
    pub(super) fn new(settings: &Settings) -> Users {
        Users {
            settings: settings.clone(),
            rules: Rules {
                patience: PATIENCE,
                migration: settings.migration,
                settle: Settle::AtEnd,
            },
            began: Instant::now(),
            all: Mutex::default(),
            counters: Counters::default(),
        }
    }

    /// The user whose directory has this path below the root.
    pub(super) fn get(&self, name: &str, path: &[Vec<u8>]) -> Arc<User> {
        let mut all = self.all.lock();
        if let Some(user) = all.get(name) {
            return user.clone();
        }
        let mut index = self.settings.root.clone();
        for name in path.iter().chain(&self.settings.index_dir) {
            index.push(std::ffi::OsStr::from_bytes(name));
        }
        let below = self.settings.listindex_layout.path_of(name);
        let local = below.map(|names| {
            names.iter().fold(self.settings.listindex_root.clone(), |path, name| path.join(name))
        });
        let user = Arc::new(User {
            name: name.to_owned(),
            index,
            local,
            last: AtomicU64::new(0),
            active: AtomicBool::new(false),
            session: Mutex::default(),
        });
        all.insert(name.to_owned(), user.clone());
        user
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn is_fresh(&self, user: &User, now: u64) -> bool {
        let idle = u64::try_from(self.settings.login_idle.as_millis()).unwrap_or(u64::MAX);
        user.active.load(Ordering::Acquire)
            && now.saturating_sub(user.last.load(Ordering::Relaxed)) < idle
    }

    /// Something of a user is used; a login waits here for its check.
    pub(super) fn access(&self, user: &User) {
        let now = self.millis();
        if self.is_fresh(user, now) {
            user.last.store(now, Ordering::Relaxed);
            return;
        }
        let mut session = user.session.lock();
        // Another call may have made the check meanwhile.
        if self.is_fresh(user, self.millis()) {
            user.last.store(now, Ordering::Relaxed);
            return;
        }
        if session.failed.is_some_and(|at| at.elapsed() < AGAIN) {
            return;
        }
        if user.active.swap(false, Ordering::AcqRel) {
            // The thread that ends sessions was not here yet.
            self.end(user, &mut session);
        }
        session.failed = None;
        match self.login(user) {
            Ok(Some(dir)) => {
                session.dir = Some(dir);
                user.last.store(self.millis(), Ordering::Relaxed);
                user.active.store(true, Ordering::Release);
            }
            // There is no INDEX directory yet: the next access looks again.
            Ok(None) => session.dir = None,
            Err(trouble) => {
                count(&self.counters.failed);
                tracing::error!(user = user.name, "no list index for this session: {trouble}");
                session.dir = None;
                session.failed = Some(Instant::now());
            }
        }
    }

    fn login(&self, user: &User) -> Result<Option<Arc<Dir>>, Trouble> {
        let Some(local) = &user.local else {
            let path = &self.settings.listindex_root;
            return Err(Trouble::refused(path, "the layout has no place for this user"));
        };
        let Some(index) = open_index(&user.index)? else { return Ok(None) };
        let first = check::enter(&index, local, &self.settings.host, &self.rules, wall());
        let (dir, outcome) = match first {
            Err(trouble) if trouble.errno() == Some(libc::ENOSPC) => {
                tracing::warn!(user = user.name, "{trouble}: making room");
                let entries = clean::list(&self.settings.listindex_root)?;
                let used: u64 = entries.iter().map(|entry| entry.size).sum();
                self.clean(None, Some(used / 2))?;
                check::enter(&index, local, &self.settings.host, &self.rules, wall())?
            }
            first => first?,
        };
        match outcome {
            Outcome::Kept => count(&self.counters.kept),
            Outcome::Dropped { why, told } => {
                count(&self.counters.dropped);
                tracing::info!(user = user.name, "list index dropped: {why}");
                if let Told::Removed(trouble) | Told::Not(trouble) = told {
                    tracing::error!(user = user.name, "{trouble}: the list index will not be kept");
                }
            }
        }
        Ok(Some(Arc::new(dir)))
    }

    fn end(&self, user: &User, session: &mut Session) {
        let Some(dir) = session.dir.take() else { return };
        let ago = self.millis().saturating_sub(user.last.load(Ordering::Relaxed));
        let last = wall().saturating_sub(i64::try_from(ago / 1000).unwrap_or(0));
        let ended = open_index(&user.index).and_then(|index| match index {
            Some(index) => check::ended(&index, &dir, &self.settings.host, &self.rules, last),
            None => Ok(Ended::Left),
        });
        match ended {
            Ok(Ended::Kept | Ended::Left) => {}
            Ok(Ended::Contested) => {
                count(&self.counters.contested);
                tracing::warn!(
                    user = user.name,
                    "was on two hosts at once: neither keeps its list index"
                );
            }
            // A record that does not say that it is settled is not trusted.
            Err(trouble) => tracing::warn!(user = user.name, "the end of a session: {trouble}"),
        }
    }

    /// Where a user's list index is.
    ///
    /// # Errors
    /// ENOSPC, which Dovecot answers by doing without.
    pub(super) fn dir(&self, user: &User) -> Result<Arc<Dir>, Errno> {
        let mut session = user.session.lock();
        let dir = session.dir.clone().ok_or(Errno::ENOSPC)?;
        if dir.is_there() {
            return Ok(dir);
        }
        // Somebody removed it under a session that goes on.
        session.dir = match self.login(user) {
            Ok(dir) => dir,
            Err(trouble) => {
                count(&self.counters.failed);
                tracing::error!(user = user.name, "no list index for this session: {trouble}");
                None
            }
        };
        session.dir.clone().ok_or(Errno::ENOSPC)
    }

    /// Ends the sessions of those who have gone; all of them if `all`.
    pub fn tick(&self, all: bool) {
        let users: Vec<Arc<User>> = {
            let mut all = self.all.lock();
            // Those whom neither the kernel nor a session knows are made again when they come.
            all.retain(|_, user| {
                user.active.load(Ordering::Acquire) || Arc::strong_count(user) > 1
            });
            all.values().cloned().collect()
        };
        for user in users {
            if !user.active.load(Ordering::Acquire) {
                continue;
            }
            if !all && self.is_fresh(&user, self.millis()) {
                let dir = user.session.lock().dir.clone();
                // For `usercache clean`: a long session is no absence.
                if let Some(Err(error)) = dir.map(|dir| touch_in(&dir)) {
                    tracing::debug!(user = user.name, %error, "cannot touch .lasthost");
                }
                continue;
            }
            let mut session = user.session.lock();
            if (all || !self.is_fresh(&user, self.millis()))
                && user.active.swap(false, Ordering::AcqRel)
            {
                self.end(&user, &mut session);
            }
        }
    }

    /// Removes list indexes of users who have gone: those not used for `age`, and more, the
    /// ones used longest ago first, until all are within `budget` bytes.
    ///
    /// # Errors
    /// The root cannot be read.
    pub fn clean(&self, age: Option<Duration>, budget: Option<u64>) -> Result<Swept, Trouble> {
        let in_use: Vec<PathBuf> = {
            let all = self.all.lock();
            let active = all.values().filter(|user| user.active.load(Ordering::Acquire));
            active.filter_map(|user| user.local.clone()).collect()
        };
        let spared = |path: &Path| in_use.iter().any(|used| used == path);
        let swept = clean::clean_all(&self.settings.listindex_root, age, budget, wall(), &spared)?;
        self.counters.evicted.fetch_add(swept.removed, Ordering::Relaxed);
        for trouble in &swept.failed {
            tracing::warn!("{trouble}");
        }
        Ok(swept)
    }

    pub fn counts(&self) -> Counts {
        let (users, active) = {
            let all = self.all.lock();
            // Also whose session is just beginning or ending: its files are still being changed.
            let is_active =
                |user: &&Arc<User>| user.session.is_locked() || user.active.load(Ordering::Acquire);
            let active = all.values().filter(is_active).count();
            (all.len() as u64, active as u64)
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            users,
            active,
            kept: read(&self.counters.kept),
            dropped: read(&self.counters.dropped),
            failed: read(&self.counters.failed),
            contested: read(&self.counters.contested),
            evicted: read(&self.counters.evicted),
        }
    }
}

/// Opens an INDEX directory as its owner; `None`: there is none.
fn open_index(path: &Path) -> Result<Option<Dir>, Trouble> {
    let owner = match std::fs::metadata(path) {
        Ok(found) => crate::hostchange::creds::Who { uid: found.uid(), gid: found.gid() },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Trouble::io("looking at the INDEX directory", path)(e)),
    };
    let _as_owner = owner.act();
    Dir::index(path).map(Some)
}
