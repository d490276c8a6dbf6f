//! Which users an admin means.

use super::aliases::Aliases;
use super::told;
use crate::admin::caches::{Whom, is_mask};
use crate::admin::{AdminError, ErrorKind};
use crate::dovecot::mask::matches;
use crate::store::Reason;
use crate::vmail::session::{Session, UserCell};
use crate::vmail::stored::Stored;
use std::collections::BTreeMap;
use std::sync::Arc;

pub(super) fn fits(mask: Option<&str>, name: &str) -> bool {
    mask.is_none_or(|mask| matches(mask.as_bytes(), name.as_bytes()))
}

/// A user that is open here or has a head in the store.
pub(super) async fn one(session: &Arc<Session>, name: &str) -> Result<Arc<UserCell>, AdminError> {
    let none = || AdminError::new(ErrorKind::NoSuchUser, format!("{name}: no such user"));
    let open = session.known_user(name).filter(|cell| cell.if_open(|_| ()).is_some());
    if let Some(cell) = open {
        return Ok(cell);
    }
    if session.metacache.known(name).is_some()
        && let Some(cell) = session.user_by_name(name)
    {
        return Ok(cell);
    }
    // None is made by asking.
    session.settings.layout.path_of(name).ok_or_else(none)?;
    let stored = Stored::new(session.env.store.clone(), name, Reason("lookup"));
    stored.head_object().await.map_err(|e| told(&e))?.ok_or_else(none)?;
    session.user_by_name(name).ok_or_else(none)
}

/// Users, and names of which none was found, with the reason: they may be nobody's, or the store may not
/// say.
pub(super) async fn cells(
    session: &Arc<Session>,
    whom: &Whom,
) -> Result<(Vec<Arc<UserCell>>, Vec<(String, AdminError)>), AdminError> {
    let known = |keep: &dyn Fn(&str) -> bool| -> Vec<Arc<UserCell>> {
        let mut all: BTreeMap<Arc<str>, Arc<UserCell>> =
            session.all_users().into_iter().map(|cell| (cell.name.clone(), cell)).collect();
        for (name, _) in session.metacache.users() {
            if !all.contains_key(&name)
                && let Some(cell) = session.user_by_name(&name)
            {
                all.insert(name, cell);
            }
        }
        all.into_values().filter(|cell| keep(&cell.name)).collect()
    };
    match whom {
        Whom::User(mask) if is_mask(mask) => {
            Ok((known(&|name| fits(Some(mask), name)), Vec::new()))
        }
        Whom::User(name) => Ok((vec![one(session, name).await?], Vec::new())),
        Whom::Names(names) => {
            let (mut found, mut nobody) = (Vec::new(), Vec::new());
            for name in names {
                match one(session, name).await {
                    Ok(cell) => found.push(cell),
                    Err(error) => nobody.push((name.clone(), error)),
                }
            }
            Ok((found, nobody))
        }
        Whom::Matching { mask, field: None } => {
            Ok((known(&|name| fits(mask.as_deref(), name)), Vec::new()))
        }
        Whom::Matching { mask, field: Some(field) } => {
            let aliases = Aliases::read(session)?;
            let keep = |name: &str| aliases.fits(name, field, mask.as_deref());
            Ok((known(&keep), Vec::new()))
        }
    }
}
