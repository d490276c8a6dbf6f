//! What an administrator asks of the metacache.

use super::error::{Error, Result};
use super::flush::{self, Options};
use super::publish::blocking;
use super::session::{Session, UserCell};
use super::swap::{is_own_swap, read_head};
use super::user::User;
use super::{close, evict, idle, space};
use crate::cache::weight::PRIORITIES;
use crate::fs::api::Invalidate;
use crate::store::Reason;
use std::sync::Arc;
use std::time::Duration;

/// What a user's changes are that are in no flush yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pending {
    #[default]
    None,
    /// The listing and the mails would bring them back.
    Unimportant,
    /// Flags, moves, expunges, folders: a lost machine would undo them.
    Important,
}

/// One user in the metacache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserCache {
    pub user: String,
    /// What it takes of the local disk, in whole blocks, by priority.
    pub bytes: [u64; PRIORITIES],
    /// Seconds since 1970, 0 for never, by priority.
    pub last_access: [i64; PRIORITIES],
    pub pending: Pending,
    /// How many names, directories and files changed since the last flush.
    pub changes: u64,
    /// When the changes will be flushed at the latest, as far as the settings say.
    pub upload_within: Option<Duration>,
    /// What is evicted of it first has this weight; the lowest of all users goes first.
    pub cleanup_weight: Option<i64>,
    pub weights: [Option<i64>; PRIORITIES],
    /// The program that used it last.
    pub last_service: Option<String>,
    /// Whether it is in memory, and owned here.
    pub open: bool,
    /// Another session owns it.
    pub lost: bool,
}

/// The metacache as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetacacheUse {
    /// What it takes of the local disk, with what is set aside for loads.
    pub bytes: u64,
    pub max_space: u64,
    pub max_grace: u64,
    pub by_priority: [u64; PRIORITIES],
    /// Users of whom something is there.
    pub users: u64,
    /// Those in memory.
    pub open: u64,
    /// The device that the metacache lies on.
    pub dev_major: u32,
    pub dev_minor: u32,
}

struct InMemory {
    pending: Pending,
    changes: u64,
    upload_within: Option<Duration>,
    lost: bool,
}

impl InMemory {
    fn of(user: &User) -> InMemory {
        let now = user.boot();
        let settings = &user.session.settings;
        let unflushed = user.has_unflushed();
        let changes = &user.changes;
        let important = unflushed && changes.important.is_some();
        let caches = user.caches_wait();
        let under_way = user.cut_out.as_ref();
        let sent = under_way.is_some_and(|w| w.important().is_some());
        let waits = unflushed || caches || changes.unimportant.is_some();
        let pending = match (important || sent, waits || under_way.is_some_and(|w| w.unflushed)) {
            (true, _) => Pending::Important,
            (false, true) => Pending::Unimportant,
            (false, false) => Pending::None,
        };
        let left = |since: Option<Duration>, span: Duration| {
            since.map(|since| (since + span).saturating_sub(now))
        };
        let many = changes.new_mails > settings.max_rescan_mail_count;
        let within = [
            left(changes.urgent.map(|(first, _)| first), settings.quiet_max),
            left(changes.important.filter(|_| important), settings.upload_interval),
            left(changes.new_since.filter(|_| many), settings.upload_interval),
            left(Some(user.used), settings.idle_upload),
        ];
        InMemory {
            pending,
            changes: user.number_of_changes() + under_way.map_or(0, |w| w.number),
            upload_within: within.into_iter().flatten().min().filter(|_| pending != Pending::None),
            lost: user.lost,
        }
    }
}

/// What `clean` does with changes that no flush has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Unflushed {
    /// It fails.
    #[default]
    Refuse,
    Flush,
    /// They are thrown away: the user goes back to the last flush. Mails stay.
    Discard,
}

/// What `clean` drops.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clean {
    /// Files of this priority and of less important ones (larger numbers).
    pub min_priority: usize,
    /// Only what was not used for so long.
    pub unused_for: Duration,
    pub unflushed: Unflushed,
}

/// What became of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub freed: u64,
    /// What is still there, because it is in use, or was used too lately.
    pub left: u64,
}

/// What `refresh` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refreshed {
    /// Nothing is in memory, so the next access reads the head anyway.
    NotOpen,
    /// The head is the one that is known here.
    Unchanged,
    /// Another session has taken the user: it is given up here, and opened anew at the next access.
    Changed,
}

/// What a rescan found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rescan {
    pub users: u64,
    /// What the books said, and what is there.
    pub booked: u64,
    pub found: u64,
    /// Users whose books were wrong: what they said, and what is there.
    pub wrong: Vec<(String, u64, u64)>,
}

impl Session {
    /// Counts everything on the disk, and puts the books right. Users stay in use meanwhile, each is
    /// held up while it is counted.
    pub async fn metacache_rescan(self: &Arc<Self>) -> Result<Rescan> {
        let session = self.clone();
        blocking(move || session.rescan_now()).await?
    }

    fn rescan_now(self: &Arc<Self>) -> Result<Rescan> {
        let failed = |e: std::io::Error| Error::disk("counting the metacache", &e);
        let on_disk = space::users_on_disk(self.disk(), &self.settings).map_err(failed)?;
        let mut names: std::collections::BTreeSet<Arc<str>> =
            on_disk.into_iter().map(|name| name.into()).collect();
        names.extend(self.metacache.users().into_iter().map(|(name, _)| name));
        let mut report = Rescan::default();
        for name in names {
            let Some(cell) = self.user_by_name(&name) else { continue };
            // A user that is being opened counts itself.
            let Ok(_still) = cell.opening.try_lock() else { continue };
            let (booked, found) = match cell.if_open(|user| user.rescan()) {
                Some(counted) => counted?,
                None => {
                    let account = self.metacache.account(&name);
                    let booked = account.bytes().iter().sum();
                    (booked, self.count_closed(&cell).map_err(failed)?)
                }
            };
            let found = found.bytes.iter().sum();
            report.users += 1;
            report.booked += booked;
            report.found += found;
            if booked != found {
                report.wrong.push((name.to_string(), booked, found));
            }
            if found == 0 {
                self.metacache.forget(&name);
            }
        }
        for (user, booked, found) in &report.wrong {
            tracing::warn!(user, booked, found, "the books of the metacache were wrong");
        }
        self.metacache.press();
        Ok(report)
    }

    /// Drops a user's files from the local disk.
    ///
    /// # Errors
    /// [`Error::Refused`] if there are changes that no flush has, and nothing was said of them.
    pub async fn metacache_clean(self: &Arc<Self>, name: &str, what: Clean) -> Result<Cleaned> {
        let Some(cell) = self.user_by_name(name) else { return Ok(Cleaned::default()) };
        let Some(account) = self.metacache.known(name) else { return Ok(Cleaned::default()) };
        let sum = || account.bytes().iter().sum::<u64>();
        let before = sum();
        if cell.if_open(|_| ()).is_none() && before > 0 && !evict::is_settled(&cell).await? {
            // Its last session did not end well.
            super::open::open(&cell).await?;
        }
        let pending = cell.if_open(|user| InMemory::of(user).pending).unwrap_or_default();
        if pending != Pending::None {
            match what.unflushed {
                Unflushed::Refuse => {
                    return Err(Error::Refused(format!(
                        "user {name} has changes that are in no flush yet: flush them first, or \
                         say that they are to be discarded"
                    )));
                }
                Unflushed::Flush => {
                    let options = Options { caches: true, ..Options::default() };
                    flush::flush(&cell, options).await?;
                }
                Unflushed::Discard => {
                    close::discard(&cell).await?;
                    return Ok(Cleaned { freed: before.saturating_sub(sum()), left: sum() });
                }
            }
        }
        let now = self.env.clock.wall().secs;
        let unused_for = i64::try_from(what.unused_for.as_secs()).unwrap_or(i64::MAX);
        // The root last: with it everything goes, if nobody uses the user.
        for priority in (what.min_priority..PRIORITIES).rev() {
            let used = account.last_access()[priority];
            if account.bytes()[priority] > 0 && now.saturating_sub(used) >= unused_for {
                evict::evict_unit(&cell, priority).await?;
            }
        }
        self.metacache.freed.notify_waiters();
        Ok(Cleaned { freed: before.saturating_sub(sum()), left: sum() })
    }

    /// Forgets a user here: flushed, handed over, closed, and nothing of it left on the local
    /// disk. False if somebody uses it.
    pub async fn metacache_remove(self: &Arc<Self>, name: &str) -> Result<bool> {
        let Some(cell) = self.user_by_name(name) else { return Ok(true) };
        if !idle::close_unused(&cell).await? {
            return Ok(false);
        }
        if !evict::evict_closed(&cell, 0).await? {
            super::open::open(&cell).await?;
            if !idle::close_unused(&cell).await? || !evict::evict_closed(&cell, 0).await? {
                return Ok(false);
            }
        }
        self.metacache.freed.notify_waiters();
        Ok(true)
    }

    /// Looks whether the head of a user is still the one that is known here, or one that this session
    /// sent and has not heard of.
    ///
    /// # Errors
    /// A store that does not answer; [`Error::Doubt`] if the head is gone, which makes nobody the
    /// user's owner.
    pub async fn metacache_refresh(self: &Arc<Self>, name: &str) -> Result<Refreshed> {
        let Some(cell) = self.known_user(name) else { return Ok(Refreshed::NotOpen) };
        // No swap of ours in between.
        let one = cell.flushing.lock().await;
        let Some(known) =
            cell.if_open(|user| (user.head.write_id.clone(), user.head.epoch, user.lost))
        else {
            return Ok(Refreshed::NotOpen);
        };
        let (write_id, epoch, lost) = known;
        let Some((head, _)) = read_head(&cell, Reason("refresh")).await? else {
            return Err(Error::Doubt {
                what: format!("user {name}: its head is not in the store"),
            });
        };
        drop(one);
        let same = head.write_id == write_id || is_own_swap(&cell, &head, epoch);
        if same && !lost {
            return Ok(Refreshed::Unchanged);
        }
        cell.if_open(|user| user.lost = true);
        // What is here and in no head is kept aside by the next opening.
        let _opened = cell.opening.lock().await;
        *cell.state.lock() = super::session::CellState::Closed;
        let parent = cell.root.lock().parent;
        if let (Some(parent), Some(last)) = (parent, cell.path.last()) {
            self.invalidate(Invalidate::Name { parent, name: last.clone().into_bytes() });
        }
        Ok(Refreshed::Changed)
    }

    /// Every user of whom something is on the local disk, or that is open, by name.
    pub fn metacache_list(self: &Arc<Self>) -> Vec<UserCache> {
        let units = self.metacache.units();
        let mut all: std::collections::BTreeMap<Arc<str>, UserCache> = self
            .metacache
            .users()
            .into_iter()
            .map(|(name, account)| {
                let user = UserCache {
                    user: name.to_string(),
                    bytes: account.bytes(),
                    last_access: account.last_access(),
                    last_service: account.last_service().map(|name| name.to_string()),
                    ..UserCache::default()
                };
                (name, user)
            })
            .collect();
        for unit in units {
            if let Some(user) = all.get_mut(&unit.user) {
                user.weights[unit.priority] = Some(unit.weight);
                let least = user.cleanup_weight.map_or(unit.weight, |w| w.min(unit.weight));
                user.cleanup_weight = Some(least);
            }
        }
        for (_, user) in all.iter_mut().filter(|(name, _)| self.leftovers.has(name)) {
            user.pending = Pending::Important;
        }
        for cell in self.all_users() {
            let Some(found) = cell.if_open(|user| InMemory::of(user)) else { continue };
            let Some(user) = all.get_mut(&cell.name) else { continue };
            user.open = true;
            user.pending = found.pending;
            user.changes = found.changes;
            user.upload_within = found.upload_within;
            user.lost = found.lost;
        }
        all.retain(|_, user| user.open || user.bytes.iter().any(|n| *n > 0));
        all.into_values().collect()
    }

    pub fn metacache_use(self: &Arc<Self>) -> MetacacheUse {
        let users = self.metacache.users();
        let device = self.disk().device(&self.settings.metacache_dir);
        let (dev_major, dev_minor) = device.unwrap_or_else(|error| {
            tracing::warn!(%error, "the device of the metacache is not known");
            (0, 0)
        });
        MetacacheUse {
            bytes: self.metacache.used(),
            max_space: self.metacache.limits.max_space,
            max_grace: self.metacache.limits.max_grace,
            by_priority: self.metacache.by_priority(),
            users: users.iter().filter(|(_, a)| a.bytes().iter().any(|n| *n > 0)).count() as u64,
            open: self.open_users().len() as u64,
            dev_major,
            dev_minor,
        }
    }

    /// The users that are in memory.
    pub fn open_users(self: &Arc<Self>) -> Vec<Arc<UserCell>> {
        // Of many that are known only these are put in order.
        let mut all = self.users_in_any_order();
        all.retain(|cell| cell.if_open(|_| ()).is_some());
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }
}
