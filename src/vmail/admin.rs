//! What an administrator asks of the heart: what is at risk, flush now, close.

use super::close;
use super::error::{Error, Result};
use super::evict::is_settled;
use super::flush::{self, Options, Report};
use super::io::is_dirty;
use super::node::Kind;
use super::open;
use super::session::{CellState, Session, UserCell};
use super::swap::{is_nobody, read_head};
use super::user::{UnderWay, User};
use super::wait::is_known_here;
use crate::cache::metacache::Purpose;
use crate::store::Reason;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// What waits in one user.
#[derive(Debug, Clone, Default)]
pub struct Waiting {
    pub user: String,
    pub important: bool,
    pub unimportant: bool,
    pub oldest: Option<Duration>,
    pub new_mails: u32,
    /// Bytes of index files that changed since the last flush, caches left out.
    pub changed_bytes: u64,
    /// Mails written here that no server was told are safe.
    pub unpublished: u64,
    pub unpublished_bytes: u64,
    /// Mails that were promised and are not in the store yet.
    pub promised: u64,
    pub promised_bytes: u64,
    pub lost: bool,
}

impl Waiting {
    fn of(user: &User, now: Duration) -> Waiting {
        let changes = &user.changes;
        let unflushed = user.has_unflushed();
        let under_way = user.cut_out.as_ref();
        let sent = under_way.and_then(UnderWay::important);
        let left = changes.important.filter(|_| unflushed);
        let important = sent.or(left);
        let since = important.or(under_way.and_then(|w| w.changes.unimportant));
        let mut waiting = Waiting {
            user: user.name.to_string(),
            important: important.is_some(),
            unimportant: unflushed
                || changes.unimportant.is_some()
                || under_way.is_some_and(|w| w.unflushed),
            oldest: since.or(changes.unimportant).map(|s| now.saturating_sub(s)),
            new_mails: changes.new_mails + under_way.map_or(0, |w| w.changes.new_mails),
            changed_bytes: under_way.map_or(0, |w| w.bytes),
            promised: user.promised.len() as u64,
            promised_bytes: user.promised.values().map(|held| held.len).sum(),
            lost: user.lost,
            ..Waiting::default()
        };
        for (_, node) in user.tree.nodes.iter().filter(|(_, n)| n.nlink > 0) {
            if let Kind::Local(local) = &node.kind
                && !node.class.is_local_only()
                && !node.class.is_cache()
            {
                waiting.changed_bytes += local.since.bytes_of(node.size);
            }
            if !is_dirty(&node.kind) {
                continue;
            }
            waiting.unpublished += 1;
            waiting.unpublished_bytes += match &node.kind {
                Kind::Growing(grow) => node.size.saturating_sub(grow.published),
                _ => node.size,
            };
        }
        waiting
    }

    pub fn anything(&self) -> bool {
        self.important || self.unimportant || self.promised > 0 || self.unpublished > 0
    }
}

impl Session {
    /// Users that are open, and what waits in those where something does; oldest first.
    pub fn waiting(self: &Arc<Self>) -> (u64, Vec<Waiting>) {
        let now = self.env.clock.boot();
        let mut open = 0;
        let mut all: Vec<Waiting> = Vec::new();
        for cell in self.all_users() {
            if let Some(waiting) = cell.if_open(|user| Waiting::of(user, now)) {
                open += 1;
                all.extend(Some(waiting).filter(Waiting::anything));
            }
        }
        all.extend(self.left_over(now));
        all.sort_by_key(|w| std::cmp::Reverse((w.important, w.oldest)));
        (open, all)
    }

    /// Flushes a user by name. One that is not open has nothing to flush, unless an earlier session
    /// left something here.
    ///
    /// # Errors
    /// [`Error::NoUser`] if neither this machine nor the store knows the user.
    pub async fn flush_user(
        self: &Arc<Self>,
        name: &str,
        options: Options,
    ) -> Result<Option<Report>> {
        let no_user = || Error::NoUser { user: name.to_string() };
        let cell = self.user_by_name(name).ok_or_else(no_user)?;
        until_ready(&cell).await?;
        if cell.if_open(|_| ()).is_none() {
            if !is_known_here(self, &cell) {
                return match read_head(&cell, Reason("flush")).await? {
                    Some(_) => Ok(None),
                    None => {
                        is_nobody(&cell, Reason("flush")).await?;
                        Err(no_user())
                    }
                };
            }
            open::open_now(&cell, Purpose::Load).await?;
        }
        flush::flush(&cell, options).await.map(Some)
    }

    /// Flushes a user, and what an earlier session left of one that is not open.
    pub async fn flush_cell(
        self: &Arc<Self>,
        cell: &Arc<UserCell>,
        options: Options,
    ) -> Result<Report> {
        until_ready(cell).await?;
        if cell.if_open(|_| ()).is_none() && !is_settled(cell).await? {
            open::open_now(cell, Purpose::Load).await?;
        }
        flush::flush(cell, options).await
    }

    /// After the kernel is gone: hands over every user. Gives those that could not be, and why.
    pub async fn close(self: &Arc<Self>, patience: Duration) -> Vec<(String, Error)> {
        self.closing.store(true, Ordering::Release);
        self.wake_scheduler();
        let mut failed = Vec::new();
        let cells: Vec<Arc<UserCell>> = self
            .all_users()
            .into_iter()
            // One that is just being opened, too.
            .filter(|cell| {
                matches!(*cell.state.lock(), CellState::Open(_)) || cell.opening.try_lock().is_err()
            })
            .collect();
        let give_up = self.env.clock.sleep(patience);
        tokio::pin!(give_up);
        let mut running = tokio::task::JoinSet::new();
        let mut next = cells.iter();
        let mut left: std::collections::BTreeMap<String, ()> =
            cells.iter().map(|c| (c.name.to_string(), ())).collect();
        loop {
            while running.len() < self.settings.max_flushes.max(1) {
                let Some(cell) = next.next().cloned() else { break };
                running.spawn(async move { (cell.name.to_string(), close::close(&cell).await) });
            }
            tokio::select! {
                done = running.join_next() => match done {
                    None => break,
                    Some(Ok((name, result))) => {
                        left.remove(&name);
                        if let Err(error) = result {
                            tracing::error!(user = %name, %error, "not everything is in the store");
                            failed.push((name, error));
                        }
                    }
                    Some(Err(error)) => tracing::error!(%error, "closing a user ended early"),
                },
                () = &mut give_up => {
                    running.abort_all();
                    failed.extend(left.into_keys().map(|name| (name, Error::Closing)));
                    break;
                }
            }
        }
        // What stays here must survive a power cut as far as it can.
        for cell in self.all_users() {
            let point = cell.if_open(|user| user.journal.sync_point()).flatten();
            if let Some(Err(error)) = point.map(|p| p.sync()) {
                tracing::error!(user = %cell.name, %error, "journal not synced");
            }
        }
        failed
    }
}

/// Of one that is just being opened a flush would say that there is nothing to upload.
async fn until_ready(cell: &Arc<UserCell>) -> Result<()> {
    if cell.if_open(|user| user.ready) == Some(false) {
        open::open_now(cell, Purpose::Load).await?;
    }
    Ok(())
}
