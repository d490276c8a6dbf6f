//! A user as the store has it, read without owning it: for checks, for earlier states, for
//! restores. Nothing here writes, needs a mount or a local disk, or takes part in ownership.
//!
//! Heads and bundles are never changed in place and go only after retention, so what one head
//! names can be read while the user's owner goes on. A read that fails is told apart: a store
//! that does not answer ([`Error::Store`]) is no finding about the user.

use super::error::{During, Error, Result};
use super::fetch::SPOILT_TRIES;
use super::lines::Final;
use super::parts::{self, Contents, PART_LIMIT, read_parts};
use super::publish::blocking;
use super::tree::NameBytes;
use crate::format::head::{HEAD_LIMIT, Head, HeadFolder, PartRef};
use crate::format::key::{head_key, parse_user_dir};
use crate::format::part::{DroppedList, decode_dropped, decode_head_part, decode_names};
use crate::format::{FolderId, FormatError, ObjectId, Place, Sub};
use crate::store::{ETag, ObjectStore, Reason, StoreError};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;

/// See the module.
#[derive(Debug, Clone)]
pub struct Stored {
    pub store: Arc<dyn ObjectStore>,
    pub user: Arc<str>,
    /// What its requests are counted as.
    pub why: Reason,
}

/// A head as it lies in the store, decoded or not.
#[derive(Debug)]
pub struct HeadObject {
    pub bytes: Bytes,
    pub tag: Option<ETag>,
    pub head: std::result::Result<Head, FormatError>,
}

/// A folder, put together from its parts.
pub(super) struct FolderState {
    pub listing: Final,
    pub contents: Contents,
}

impl Stored {
    pub fn new(store: Arc<dyn ObjectStore>, user: &str, why: Reason) -> Stored {
        Stored { store, user: user.into(), why }
    }

    pub(super) fn failed(&self, error: StoreError) -> Error {
        Error::store(format!("reading {}", self.user), During::Delivery, error)
    }

    /// The head, readable or not; `None`: there is none.
    ///
    /// # Errors
    /// Those of a store that does not answer.
    pub async fn head_object(&self) -> Result<Option<HeadObject>> {
        // What was spoilt on its way is no finding.
        for _ in 1..SPOILT_TRIES {
            let found = self.head_object_once().await?;
            if found.as_ref().is_none_or(|found| found.head.is_ok()) {
                return Ok(found);
            }
        }
        self.head_object_once().await
    }

    async fn head_object_once(&self) -> Result<Option<HeadObject>> {
        let key = head_key(&self.user);
        match self.store.get(&key, None, HEAD_LIMIT, self.why).await {
            Ok((meta, bytes)) => {
                let head = Head::decode(&bytes).and_then(|head| self.own(head));
                Ok(Some(HeadObject { bytes, tag: meta.etag, head }))
            }
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.failed(e)),
        }
    }

    fn own(&self, head: Head) -> std::result::Result<Head, FormatError> {
        if *head.user == *self.user {
            return Ok(head);
        }
        Err(FormatError::malformed("head", format!("it names another user, {:?}", head.user)))
    }

    /// The head of a user that must be there and readable.
    ///
    /// # Errors
    /// [`Error::NoUser`] where there is none; [`Error::Corrupt`].
    pub async fn head(&self) -> Result<Head> {
        match self.head_object().await? {
            Some(found) => {
                found.head.map_err(|e| Error::corrupt(format!("head of {}", self.user), e))
            }
            None => Err(Error::NoUser { user: self.user.to_string() }),
        }
    }

    /// Bytes of parts, each checked.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::Corrupt`] if one is gone, short or not what was written.
    pub async fn ranges(&self, wanted: &[&PartRef]) -> Result<Vec<Bytes>> {
        if let Some(empty) = wanted.iter().find(|part| part.len == 0) {
            let what = format!("user {}: bundle {}: an empty part", self.user, empty.bundle);
            return Err(Error::Damaged { what });
        }
        let got = parts::ranges_of(&*self.store, &self.user, wanted, self.why).await?;
        for (part, bytes) in wanted.iter().zip(&got) {
            part.check(bytes).map_err(|e| self.bad_part(part, e))?;
        }
        Ok(got)
    }

    fn bad_part(&self, part: &PartRef, error: FormatError) -> Error {
        Error::corrupt(format!("user {}: bundle {}", self.user, part.bundle), error)
    }

    /// A folder from its parts.
    ///
    /// # Errors
    /// Those of [`Stored::ranges`].
    pub(super) async fn folder(&self, folder: &HeadFolder) -> Result<FolderState> {
        let refs: Vec<&PartRef> = folder.parts.iter().collect();
        let bytes = self.ranges(&refs).await?;
        self.assemble(folder, bytes).await
    }

    /// The same from bytes that are here already.
    pub(super) async fn assemble(
        &self,
        folder: &HeadFolder,
        bytes: Vec<Bytes>,
    ) -> Result<FolderState> {
        let parts: Vec<_> = folder.parts.iter().cloned().zip(bytes).collect();
        let user = self.user.clone();
        let source = blocking(move || read_parts(&user, parts)).await??;
        let contents = source.parts.map(|parts| parts.contents).unwrap_or_default();
        Ok(FolderState { listing: source.state, contents })
    }

    fn limit(part: &PartRef) -> u64 {
        part.raw_len.saturating_add(4096).min(PART_LIMIT)
    }

    /// The dropped list.
    ///
    /// # Errors
    /// Those of [`Stored::ranges`].
    pub async fn dropped(&self, head: &Head) -> Result<DroppedList> {
        let refs: Vec<&PartRef> = head.dropped.iter().collect();
        let mut list = DroppedList::default();
        for (part, bytes) in refs.iter().zip(self.ranges(&refs).await?) {
            let rows = decode_dropped(&bytes, Stored::limit(part));
            list.extend(rows.map_err(|e| self.bad_part(part, e))?);
        }
        Ok(list)
    }

    /// Objects with more than one name, and how many they have.
    ///
    /// # Errors
    /// Those of [`Stored::ranges`].
    pub async fn links(&self, head: &Head) -> Result<HashMap<ObjectId, u32>> {
        let refs: Vec<&PartRef> = head.names.iter().collect();
        let mut links = HashMap::new();
        for (part, bytes) in refs.iter().zip(self.ranges(&refs).await?) {
            let rows = decode_names(&bytes, Stored::limit(part));
            for (id, count) in rows.map_err(|e| self.bad_part(part, e))? {
                match count {
                    0 | 1 => links.remove(&id),
                    _ => links.insert(id, count),
                };
            }
        }
        Ok(links)
    }

    /// The head before this one; `None` at the first.
    ///
    /// # Errors
    /// Those of [`Stored::ranges`], and a head that does not decode.
    pub async fn before(&self, head: &Head) -> Result<Option<Head>> {
        let Some(part) = &head.previous else { return Ok(None) };
        let bytes = self.ranges(&[part]).await?;
        let Some(bytes) = bytes.first() else { return Ok(None) };
        let limit = Stored::limit(part).min(HEAD_LIMIT + 4096);
        let decoded = decode_head_part(bytes, limit)
            .and_then(|bytes| Head::decode(&bytes))
            .and_then(|head| self.own(head));
        decoded.map(Some).map_err(|e| self.bad_part(part, e))
    }
}

/// The names of all users that have a head, in no order.
///
/// # Errors
/// A store that does not answer.
pub async fn users(store: &Arc<dyn ObjectStore>, why: Reason) -> Result<Vec<String>> {
    let failed = |e| Error::store("listing users", During::Delivery, e);
    let mut names = Vec::new();
    let top = store.list_dirs("", why).await.map_err(failed)?;
    for hh in top.iter().filter(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit())) {
        for dir in store.list_dirs(hh, why).await.map_err(failed)? {
            if let Ok(name) = parse_user_dir(&dir) {
                names.push(name);
                continue;
            }
            // A name too long for a key is in the head.
            match store.get(&format!("{hh}/{dir}/head"), None, HEAD_LIMIT, why).await {
                Ok((_, bytes)) => names.extend(Head::decode(&bytes).ok().map(|head| head.user)),
                Err(StoreError::NotFound { .. }) => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }
    Ok(names)
}

/// Where the folders of a head lie.
#[derive(Debug)]
pub struct Paths<'a>(HashMap<FolderId, &'a HeadFolder>);

impl<'a> Paths<'a> {
    pub fn new(head: &'a Head) -> Paths<'a> {
        Paths(head.folders.iter().map(|f| (f.id, f)).collect())
    }

    pub fn folder(&self, id: FolderId) -> Option<&'a HeadFolder> {
        self.0.get(&id).copied()
    }

    /// The names that lead from the user's root to a directory. The head's decoder saw to it that
    /// folders are not nested without end.
    pub fn of(&self, at: Place) -> Vec<NameBytes> {
        let mut path: Vec<NameBytes> = Vec::new();
        let mut at = at;
        for _ in 0..=crate::format::head::DEPTH_MAX {
            if at.sub != Sub::Own {
                path.push(at.sub.as_str().as_bytes().into());
            }
            let Some(folder) = self.0.get(&at.folder).filter(|f| f.id != FolderId::ROOT) else {
                break;
            };
            path.push(folder.name.as_slice().into());
            at = folder.parent;
        }
        path.reverse();
        path
    }

    /// The same as text, for people and scripts; the root is `.`.
    pub fn text(&self, at: Place) -> String {
        path_text(&self.of(at))
    }
}

/// A path as text: names escaped as in listings, joined by `/`.
pub fn path_text(path: &[NameBytes]) -> String {
    if path.is_empty() {
        return ".".to_string();
    }
    let names: Vec<String> = path.iter().map(|n| crate::format::escape::escape(n)).collect();
    names.join("/")
}

/// What a mail server calls the mailbox whose mails lie in a directory, as far as its path tells:
/// `mail/.Sent` and `mail/mailboxes/Sent/dbox-Mails` are `Sent`, `mail` is `INBOX`.
pub fn mailbox_of(path: &[NameBytes]) -> Vec<u8> {
    let path: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
    let path = match path.split_last() {
        Some((&b"dbox-Mails", above)) => above,
        _ => &path[..],
    };
    if let Some(at) = path.iter().position(|n| *n == b"mailboxes") {
        return path[at + 1..].join(&b'/');
    }
    match path.last().and_then(|last| last.strip_prefix(b".")) {
        Some(name) => name.iter().map(|b| if *b == b'.' { b'/' } else { *b }).collect(),
        // LAYOUT=fs has plain directories below the one that is INBOX.
        None if path.len() > 1 => path[1..].join(&b'/'),
        None => b"INBOX".to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mailboxes_are_called_as_clients_call_them() {
        let of = |path: &str| {
            let path: Vec<NameBytes> = path.split('/').map(|n| n.as_bytes().into()).collect();
            String::from_utf8(mailbox_of(&path)).unwrap()
        };
        assert_eq!(of("mail"), "INBOX");
        assert_eq!(of("mail/.Sent"), "Sent");
        assert_eq!(of("mail/.A.B"), "A/B");
        assert_eq!(of("mail/mailboxes/A/B/dbox-Mails"), "A/B");
        assert_eq!(of("mail/mailboxes/INBOX/dbox-Mails"), "INBOX");
        assert_eq!(of("mail/Work/Old"), "Work/Old");
    }
}
