//! Closing users that nobody uses: memory, open files and ownership are given up.
//!
//! A user is handed over to nobody: everything is flushed, and the head in the store says so. So the
//! loss of this machine burns no UIDs of users that were closed, another backend can take them at
//! once, and the next access here costs two small requests and no listing.
//!
//! The kernel knows names and inodes of a user for as long as it likes. It is told to forget the
//! name of the user's root, and with it what lies below; what somebody still uses it keeps,
//! and then the user stays open. The root's own inode number is the same before and after.
//!
//! What was in use when the root's name was taken away hangs on below a directory without a name, and
//! no second message about the root reaches it, nor is it forgotten by itself once nobody uses it. A
//! close(2) under way is enough, for RELEASE comes before the kernel lets go of the name. So
//! what is still known a little later is named one by one.
//!
//! A file without an open descriptor may still be in use: a lock is held by its mere existence. So
//! a user with a fresh lock or temporary file stays open, too, as does one with mails that are on
//! their way.

use super::close;
use super::error::Result;
use super::node::Kind;
use super::session::{CellState, Session, UserCell};
use super::user::User;
use crate::format::{FolderId, Place, Sub};
use crate::fs::api::Invalidate;
use std::sync::Arc;
use std::time::Duration;

/// Longest time between two looks.
const TICK: Duration = Duration::from_secs(30);
/// How long the kernel may take to forget.
const FORGETTING: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(10);
/// After so long what is left is named one by one.
const ONE_BY_ONE: Duration = Duration::from_millis(200);
/// Locks older than this are left over from a process that died: no server's is left untouched
/// for so long.
const LOCKS_FOR: i64 = 600;

impl User {
    /// Whether anybody holds something of it that would not be there after it was closed.
    pub(super) fn is_used(&self) -> bool {
        let now = self.now().secs;
        let dirs =
            self.tree.folders.values().flat_map(|f| f.dirs().map(move |(s, d)| (f.id, s, d)));
        let root = crate::format::Place::ROOT;
        let known = dirs
            .filter(|(id, sub, _)| (*id, *sub) != (root.folder, root.sub))
            .any(|(_, _, dir)| dir.lookups > 0 || dir.handles > 0);
        known
            || !self.promised.is_empty()
            || self.tree.nodes.iter().any(|(_, node)| {
                let under_way = match &node.kind {
                    Kind::Mail(mail) => mail.staged.is_some(),
                    Kind::Growing(grow) => grow.dirty,
                    Kind::Local(_) => {
                        let fresh = now.saturating_sub(node.mtime.secs) < LOCKS_FOR;
                        node.class.is_local_only() && node.nlink > 0 && fresh
                    }
                    Kind::Published(_) | Kind::Symlink(_) => false,
                };
                node.lookups > 0 || node.handles > 0 || under_way
            })
    }
}

impl User {
    /// The names that the kernel knows something by.
    fn known_names(&self) -> Vec<Invalidate> {
        let mut known = Vec::new();
        let mut tell = |at: Place, name: &[u8]| {
            if let Some(dir) = self.tree.dir(at) {
                known.push(Invalidate::Name { parent: dir.ino, name: name.to_vec() });
            }
        };
        for folder in self.tree.folders.values() {
            for (sub, _) in folder.dirs().filter(|(_, dir)| dir.lookups > 0) {
                match sub {
                    Sub::Own if folder.id == FolderId::ROOT => {}
                    Sub::Own => tell(folder.parent, &folder.name),
                    _ => tell(Place::own(folder.id), sub.as_str().as_bytes()),
                }
            }
        }
        for (_, node) in self.tree.nodes.iter().filter(|(_, node)| node.lookups > 0) {
            for name in node.names.all() {
                if let Some(bytes) = self.tree.name_bytes(*name) {
                    tell(name.at, bytes);
                }
            }
        }
        known
    }
}

/// Closes a user unless somebody uses it. True if it is closed.
pub async fn close_unused(cell: &Arc<UserCell>) -> Result<bool> {
    match cell.if_open(|user| user.is_busy() || !user.ready) {
        None => return Ok(true),
        Some(true) => return Ok(false),
        Some(false) => {}
    }
    if !forgotten(cell).await {
        return Ok(false);
    }
    if given_up(cell).await {
        return Ok(true);
    }
    close::close_unused(cell).await
}

/// A user that another session has taken is not handed over, only forgotten. What is on the local
/// disk of it and in no head is kept aside when it is opened next.
async fn given_up(cell: &UserCell) -> bool {
    let _opened = cell.opening.lock().await;
    let mut state = cell.state.lock();
    let lost = matches!(&*state, CellState::Open(user) if user.lost && !user.is_used());
    if lost {
        *state = CellState::Closed;
    }
    lost
}

/// Asks the kernel to forget what is below a user's root, and waits until it has.
async fn forgotten(cell: &Arc<UserCell>) -> bool {
    let unused = || cell.if_open(|user| !user.is_used()).unwrap_or(true);
    if unused() {
        return true;
    }
    let parent = cell.root.lock().parent;
    let (Some(parent), Some(name)) = (parent, cell.path.last()) else { return false };
    let session = &cell.session;
    session.invalidate(Invalidate::Name { parent, name: name.clone().into_bytes() });
    let clock = &session.env.clock;
    let begun = clock.boot();
    let mut named = false;
    while clock.boot() < begun + FORGETTING {
        if unused() {
            return true;
        }
        if !named && clock.boot() >= begun + ONE_BY_ONE {
            named = true;
            let known = cell.if_open(|user| user.known_names()).unwrap_or_default();
            known.into_iter().for_each(|name| session.invalidate(name));
        }
        clock.sleep(LOOK).await;
    }
    false
}

/// Runs until the session closes.
pub async fn run(session: Arc<Session>) {
    let settings = &session.settings.metacache;
    let tick = TICK.min(settings.close_idle / 4).max(Duration::from_millis(100));
    loop {
        tokio::select! {
            () = session.too_many.notified() => {}
            () = session.env.clock.sleep(tick) => {}
        }
        if session.is_closing() {
            return;
        }
        look(&session).await;
    }
}

/// Closes who was not used for long enough, and of too many those who were not for longest.
pub async fn look(session: &Arc<Session>) {
    let settings = &session.settings.metacache;
    let now = session.env.clock.boot();
    let mut open: Vec<(Duration, Arc<UserCell>)> = session
        .open_users()
        .into_iter()
        .filter_map(|cell| Some((cell.if_open(|user| user.used)?, cell)))
        .collect();
    open.sort_by_key(|(used, _)| *used);
    let excess = open.len().saturating_sub(settings.max_open_users);
    let due = open
        .into_iter()
        .enumerate()
        .filter(|(n, (used, _))| *n < excess || now.saturating_sub(*used) >= settings.close_idle);
    let mut running = tokio::task::JoinSet::new();
    for (_, (_, cell)) in due {
        if session.is_closing() {
            break;
        }
        while running.len() >= session.settings.max_flushes.max(1) {
            running.join_next().await;
        }
        running.spawn(async move {
            match close_unused(&cell).await {
                Ok(true) => tracing::debug!(user = %cell.name, "closed: nobody uses it"),
                Ok(false) => {}
                Err(error) => tracing::warn!(user = %cell.name, %error, "idle user not closed"),
            }
        });
    }
    while running.join_next().await.is_some() {}
}

/// A user that is not open shows whom its root belongs to.
pub(super) fn remember_root(cell: &UserCell) {
    let shown = match &*cell.state.lock() {
        CellState::Open(user) => {
            let root = user.tree.dir(crate::format::Place::ROOT);
            root.map(|dir| (dir.owner.unwrap_or(user.owner), dir.mode))
        }
        CellState::Closed => None,
    };
    if let Some(shown) = shown {
        cell.root.lock().maker = Some(shown);
    }
}
