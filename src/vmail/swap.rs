//! The head in the store: read, and swapped by compare-and-swap.
//!
//! A swap whose answer is lost is read back and known by its write id. One that was given up
//! may still arrive later; it is known by its session, and the next swap goes on top of it.
//!
//! A user without a head does not exist only if nothing else of it is in the store, either: ids
//! begin at the first epoch again in a head that is made anew, and new bundles would be written over
//! those of the lost one.

use super::error::{During, Error, Result};
use super::fetch::SPOILT_TRIES;
use super::session::UserCell;
use crate::format::head::{HEAD_LIMIT, Head};
use crate::format::key::{head_key, user_dir};
use crate::format::{Epoch, FormatError};
use crate::store::{Body, ETag, PutMode, Reason, StoreError};
use bytes::Bytes;

/// The field that every head has, whatever its version.
const HEAD_FIELD: &str = "vmailfs-head";

/// Whether bytes never were a head of any version: some other text, or JSON of somebody else's.
fn is_no_head(bytes: &[u8]) -> bool {
    let json = bytes.first().is_none_or(|first| *first == b'{');
    !json
        || serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(bytes)
            .is_ok_and(|fields| !fields.is_empty() && !fields.contains_key(HEAD_FIELD))
}

/// The head as the store has it. What does not decode was read more than once.
pub async fn read_head(cell: &UserCell, why: Reason) -> Result<Option<(Head, ETag)>> {
    let mut tries = 1;
    loop {
        match read_head_once(cell, why).await {
            Err(Error::Corrupt { source, .. })
                if tries < SPOILT_TRIES && !matches!(source, FormatError::TooNew { .. }) =>
            {
                tries += 1;
            }
            done => return done,
        }
    }
}

async fn read_head_once(cell: &UserCell, why: Reason) -> Result<Option<(Head, ETag)>> {
    let what = || format!("head of {}", cell.name);
    let outage = |e| Error::store(what(), During::Delivery, e);
    let (meta, bytes) =
        match cell.session.env.store.get(&head_key(&cell.name), None, HEAD_LIMIT, why).await {
            Ok(got) => got,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(outage(e)),
        };
    // A page of some proxy on the way, with status 200: that is an outage, and no damage, for
    // which deliveries would be bounced. What begins as a head does, or is empty, is damage, and
    // waiting would not mend it.
    let detail = |what: &str| StoreError::Unavailable { detail: what.to_string() };
    if is_no_head(&bytes) {
        return Err(outage(detail("what was answered is no head")));
    }
    let head = Head::decode(&bytes).map_err(|e| Error::corrupt(what(), e))?;
    if head.user != *cell.name {
        return Err(Error::Damaged { what: format!("{} names {}", what(), head.user) });
    }
    let etag = meta.etag.ok_or_else(|| outage(detail("a head was answered without its tag")))?;
    Ok(Some((head, etag)))
}

/// What of a user is nothing without its head.
const KINDS: [&str; 3] = ["bundle", "mail", "file"];

/// Makes sure that a user whose head is not in the store has nothing else there: one request, if it
/// was never there.
pub(super) async fn is_nobody(cell: &UserCell, why: Reason) -> Result<()> {
    let (store, dir) = (&cell.session.env.store, user_dir(&cell.name));
    let failed = |e| Error::store(format!("looking for {}", cell.name), During::Delivery, e);
    let dirs = store.list_dirs(&dir, why).await.map_err(failed)?;
    for kind in KINDS.iter().filter(|kind| dirs.iter().any(|dir| dir == *kind)) {
        // One that is empty may be named still.
        let kind = format!("{dir}/{kind}");
        if store.list_some(&kind, None, 1, why).await.map_err(failed)?.is_empty() {
            continue;
        }
        return Err(Error::Doubt {
            what: format!(
                "user {}: the store says that it has no head of this user, but there is {kind}; it is \
                 asked again, and nothing is served until the head is there. If the head was lost, \
                 vmailfs fsck --repair makes one; if the user was removed on purpose, remove what \
                 is left of it below {dir}",
                cell.name
            ),
        });
    }
    Ok(())
}

/// Swaps the head. `Ok(None)`: somebody else has swapped it.
pub async fn swap_head(
    cell: &UserCell,
    head: &Head,
    old: Option<ETag>,
    why: Reason,
) -> Result<Option<ETag>> {
    swap(cell, head, old, why, true).await
}

/// Whether a head is the one that this session sent to hand the user over, and has not heard of.
fn sent_last(cell: &UserCell, head: &Head) -> bool {
    let is = |user: &mut super::user::User| user.handed_over.as_ref() == Some(&head.write_id);
    cell.if_open(is) == Some(true)
}

/// Whether this session wrote a head.
pub(super) fn ours(cell: &UserCell, head: &Head) -> bool {
    head.owner.as_ref().is_some_and(|owner| owner.session == cell.session.id)
}

/// Whether a head that was not expected is a swap of this session's own of this epoch: given up, and
/// carried out all the same.
pub(super) fn is_own_swap(cell: &UserCell, head: &Head, epoch: Epoch) -> bool {
    head.epoch == epoch && (ours(cell, head) || sent_last(cell, head))
}

pub(super) async fn swap(
    cell: &UserCell,
    head: &Head,
    old: Option<ETag>,
    why: Reason,
    again: bool,
) -> Result<Option<ETag>> {
    let mode = match old {
        Some(tag) => PutMode::Update(tag),
        None => PutMode::Create,
    };
    head.check().map_err(|e| Error::corrupt(format!("new head of {}", cell.name), e))?;
    let bytes = head.encode();
    if bytes.len() as u64 > HEAD_LIMIT {
        // Nobody could read it.
        return Err(Error::Full(format!("head of {} is too large", cell.name)));
    }
    let body = Body::Bytes(Bytes::from(bytes));
    match cell.session.env.store.put(&head_key(&cell.name), body, mode, &[], why).await {
        Ok(tag) => Ok(Some(tag)),
        Err(first @ (StoreError::Precondition { .. } | StoreError::Unavailable { .. })) => {
            // Perhaps our own write, its answer lost.
            match read_head(cell, why).await? {
                Some((now, tag)) if now.write_id == head.write_id => Ok(Some(tag)),
                // An earlier swap of ours that was given up and has arrived since.
                Some((now, tag)) if again && is_own_swap(cell, &now, head.epoch) => {
                    Box::pin(swap(cell, head, Some(tag), why, false)).await
                }
                // No rival, and no absence: one of the two answers is wrong.
                None => {
                    let what = format!("head of {}: there for a write, and then not", cell.name);
                    Err(Error::Doubt { what })
                }
                _ if matches!(first, StoreError::Precondition { .. }) => Ok(None),
                _ => Err(Error::store(format!("head of {}", cell.name), During::Delivery, first)),
            }
        }
        Err(e) => Err(Error::store(format!("head of {}", cell.name), During::Delivery, e)),
    }
}
