//! Users and folders that cannot be served because what is stored of them is damaged, or a head is
//! gone.
//!
//! Callers get EAGAIN, so that mail waits with its senders while a person looks (see
//! [`super::error`]); this is where the person is told.

use super::error::{Error, Result};
use super::need::Need;
use crate::format::FolderId;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Entries that are kept at most.
const MOST: usize = 1000;

/// A user or a folder, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    pub user: String,
    pub error: String,
}

/// A user as a whole, or a folder of one.
pub(super) type Subject = (Arc<str>, Option<FolderId>);

/// See the module.
#[derive(Debug, Default)]
pub struct Unserved(Mutex<BTreeMap<Subject, String>>);

/// Whose damage would show in what is awaited.
pub(super) fn subject(need: &Need) -> Option<Subject> {
    match need {
        Need::Open(cell) => Some((cell.name.clone(), None)),
        Need::Load(cell, folder) | Need::Restore(cell, folder) => {
            Some((cell.name.clone(), Some(*folder)))
        }
        _ => None,
    }
}

impl Unserved {
    /// Notes how an opening or a loading ended. The log is told once of each.
    pub(super) fn note(&self, subject: Subject, done: &Result<()>) {
        let mut all = self.0.lock();
        match done {
            Err(error @ (Error::Corrupt { .. } | Error::Damaged { .. } | Error::Doubt { .. })) => {
                let text = error.to_string();
                if all.get(&subject) == Some(&text) {
                    return;
                }
                tracing::error!(
                    user = %subject.0, error = %text,
                    "this user, or a folder of it, cannot be served; mail for it is deferred. vmailfs fsck \
                     tells what is damaged, and --repair goes back to what can be read"
                );
                if all.len() < MOST || all.contains_key(&subject) {
                    all.insert(subject, text);
                }
            }
            // Nothing is known of the damage while the store is down.
            Err(_) => {}
            Ok(()) => _ = all.remove(&subject),
        }
    }

    pub fn all(&self) -> Vec<Damaged> {
        let all = self.0.lock();
        let damaged = |((user, _), error): (&Subject, &String)| Damaged {
            user: user.to_string(),
            error: error.clone(),
        };
        all.iter().map(damaged).collect()
    }
}
