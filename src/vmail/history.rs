//! Earlier states of a user.
//!
//! Each bundle holds the head that was in the store when it was made, so the heads form a chain
//! from the newest back to where retention has taken the bundles away. A state is a head of this
//! chain: what it names was kept since, for nothing goes before retention (I6). States are those
//! of the flushes; what came and went between two flushes is in none of them.

use super::error::{Error, Result};
use super::stored::{Paths, Stored};
use crate::format::ObjectId;
use crate::format::head::{Head, HeadFolder};
use crate::format::listing::Entry;
use crate::store::StoreError;
use std::collections::HashMap;

/// States that are followed back at most: one a minute for a year.
const MOST: usize = 525_600;

/// A state of a user that can be read.
#[derive(Debug, Clone)]
pub struct State {
    /// When it was flushed, seconds since 1970.
    pub time: i64,
    pub head: Head,
}

/// Why there is nothing older.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ends {
    /// The user began here.
    First,
    /// Older bundles were deleted after retention.
    Retention,
    /// An earlier head cannot be read.
    Broken(String),
}

/// The states of a user, the newest first.
#[derive(Debug)]
pub struct History {
    pub states: Vec<State>,
    pub ends: Ends,
}

/// Follows the chain of heads back, at least to `since` if that far can be seen.
///
/// # Errors
/// [`Error::NoUser`]; a head that cannot be read; a store that does not answer.
pub async fn read(stored: &Stored, since: Option<i64>) -> Result<History> {
    follow(stored, stored.head().await?, since).await
}

/// The same from a head that was read.
///
/// # Errors
/// A store that does not answer.
pub async fn follow(stored: &Stored, head: Head, since: Option<i64>) -> Result<History> {
    let mut states: Vec<State> = Vec::new();
    let mut next = Some(head);
    let ends = loop {
        let Some(head) = next.take() else { break Ends::First };
        let time = head.written;
        let before = head.previous.as_ref().map(|p| p.bundle);
        // Bundles are numbered upwards; anything else would be a circle.
        let older = |last: &State| match (&last.head.previous, before) {
            (Some(newer), Some(older)) => older < newer.bundle,
            _ => true,
        };
        if !states.last().is_none_or(older) {
            break Ends::Broken("the chain of heads does not go back in time".into());
        }
        states.push(State { time, head });
        if since.is_some_and(|since| time <= since) || states.len() == MOST {
            break Ends::First;
        }
        let Some(last) = states.last() else { break Ends::First };
        match stored.before(&last.head).await {
            Ok(found) => next = found,
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(error) => {
                break match before {
                    Some(bundle) if gone(stored, bundle).await? && states.len() > 1 => {
                        Ends::Retention
                    }
                    _ => Ends::Broken(error.to_string()),
                };
            }
        }
    };
    Ok(History { states, ends })
}

async fn gone(stored: &Stored, bundle: ObjectId) -> Result<bool> {
    let key = crate::format::key::bundle_key(&stored.user, bundle);
    match stored.store.head(&key, stored.why).await {
        Ok(_) => Ok(false),
        Err(StoreError::NotFound { .. }) => Ok(true),
        Err(e) => Err(stored.failed(e)),
    }
}

impl History {
    /// The state that held at a time, seconds since 1970.
    ///
    /// # Errors
    /// [`Error::NotThere`] if nothing so old can be read.
    pub fn at(&self, time: i64) -> Result<&State> {
        if let Some(state) = self.states.iter().find(|state| state.time <= time) {
            return Ok(state);
        }
        let why = match &self.ends {
            Ends::First => "there was no such user yet".to_string(),
            Ends::Retention => "older states were deleted after retention".to_string(),
            Ends::Broken(why) => format!("an older state cannot be read: {why}"),
        };
        Err(Error::NotThere(format!("no state of that time: {why}")))
    }
}

/// Mails of the states, in their order; `None` where a folder of a state cannot be read. Files
/// of many mails count as one.
///
/// # Errors
/// A store that does not answer.
pub async fn count_mails(stored: &Stored, states: &[State]) -> Result<Vec<Option<u64>>> {
    type Chain = Vec<(ObjectId, u64)>;
    let chain =
        |f: &HeadFolder| -> Chain { f.parts.iter().map(|p| (p.bundle, p.offset)).collect() };
    // Most folders are the same from one state to the next.
    let mut known: HashMap<Chain, Option<u64>> = HashMap::new();
    let mut out = Vec::with_capacity(states.len());
    for state in states {
        let mut sum = Some(0u64);
        for folder in &state.head.folders {
            let key = chain(folder);
            let count = match known.get(&key) {
                Some(count) => *count,
                None => {
                    let count = match stored.folder(folder).await {
                        Ok(found) => Some(found.listing.names().filter(|n| is_mail(n.2)).count()),
                        Err(error @ Error::Store { .. }) => return Err(error),
                        Err(_) => None,
                    };
                    *known.entry(key).or_insert(count.map(|n| n as u64))
                }
            };
            sum = sum.zip(count).map(|(a, b)| a + b);
        }
        out.push(sum);
    }
    Ok(out)
}

fn is_mail(entry: &Entry) -> bool {
    matches!(entry, Entry::Mail { .. } | Entry::Extents { .. })
}

/// The folders of a head that a person may mean by a name: a path below the user's root
/// (`mail/.Sent`), or what a mail program calls it (`Sent`).
pub fn folders_called(head: &Head, name: &str) -> Vec<crate::format::FolderId> {
    let paths = Paths::new(head);
    let meant = |folder: &&HeadFolder| {
        let path = paths.of(crate::format::Place::own(folder.id));
        let plain: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
        plain.join(&b'/') == name.as_bytes()
            || !path.is_empty() && is_called(&super::stored::mailbox_of(&path), name)
    };
    head.folders.iter().filter(meant).map(|f| f.id).collect()
}

fn is_called(mailbox: &[u8], name: &str) -> bool {
    let upper = |text: &[u8]| text.eq_ignore_ascii_case(b"inbox");
    mailbox == name.as_bytes() || upper(mailbox) && upper(name.as_bytes())
}
