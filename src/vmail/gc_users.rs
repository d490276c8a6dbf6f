//! Gc of users by name, open here or not.
//!
//! A user that is not open is looked at through its head and its dropped list; it is opened, which
//! takes ownership, only if something is due of it.

use super::error::{During, Error, Result};
use super::gc::{self, Options, Report, WHY};
use super::session::{CellState, Session, UserCell};
use super::swap::read_head;
use super::{dropped, open};
use crate::format::key::parse_user_dir;
use std::sync::Arc;

/// What became of one user.
#[derive(Debug)]
pub enum Outcome {
    Done(Report),
    /// No such user.
    Absent,
    /// Another backend has it, and lives.
    Foreign {
        backend: String,
    },
}

/// Gc of one user.
///
/// # Errors
/// Those of [`gc::collect`], and of opening the user.
pub async fn one(cell: &Arc<UserCell>, options: Options) -> Result<Outcome> {
    if !is_open(cell) {
        let Some((head, _)) = read_head(cell, WHY).await? else { return Ok(Outcome::Absent) };
        let list = dropped::read(cell, &head.dropped, WHY).await?;
        let report = gc::look_only(&cell.session, &list);
        let work = report.deleted() > 0 || options.scan;
        if options.dry_run || !work {
            return Ok(Outcome::Done(report));
        }
        match open::open_now(cell, crate::cache::metacache::Purpose::Load).await {
            Err(Error::Foreign { backend, .. }) => return Ok(Outcome::Foreign { backend }),
            done => done?,
        }
    }
    gc::collect(cell, options).await.map(Outcome::Done)
}

fn is_open(cell: &UserCell) -> bool {
    matches!(&*cell.state.lock(), CellState::Open(user) if user.ready)
}

/// Users that are open here.
pub fn open_users(session: &Arc<Session>) -> Vec<Arc<UserCell>> {
    session.all_users().into_iter().filter(|cell| is_open(cell)).collect()
}

/// All users of the store, as far as their directories tell their names and the layout has a
/// place for them.
///
/// # Errors
/// [`Error::Store`].
pub async fn all_users(session: &Arc<Session>) -> Result<Vec<Arc<UserCell>>> {
    let store = &session.env.store;
    let failed = |e| Error::store("listing users", During::Delivery, e);
    let mut users = Vec::new();
    for hh in store.list_dirs("", WHY).await.map_err(failed)? {
        if hh.len() != 2 || !hh.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        for dir in store.list_dirs(&hh, WHY).await.map_err(failed)? {
            let name = parse_user_dir(&dir).ok();
            users.extend(name.and_then(|name| session.user_by_name(&name)));
        }
    }
    Ok(users)
}
