//! Lost mails: the listing names an object, and the store says that it is gone.
//!
//! The answer is EIO, never ENOENT (Dovecot would take that for an expunge), and the store is
//! asked a second time before anybody is told. A site may prefer blank mails, for users or
//! folders that it names: a file system does not know which client is reading. The truth is
//! never replaced: nothing of a blank mail is cached, here or in the kernel, and each open asks
//! the store again, so a mail whose object comes back is there again. The kernel does keep pages of
//! one for `sendfile` and `splice`, whatever the handle says (`FOPEN_DIRECT_IO` is for reads and
//! writes only), so an inode that was blank once is never opened with its pages kept ([`Blanks`]).
//!
//! A blank mail has the size of the lost one, and as many line ends, because both are part of
//! the file's name (`S=`, `W=`) and Dovecot renames a file whose name tells another size. Only
//! Maildir mails are blanked: a dbox file without its headers is damage to Dovecot, which would
//! rebuild the folder and forget the mail.

use super::error::{Error, Result};
use super::node::NodeIx;
use super::session::Session;
use super::user::User;
use crate::dovecot::mask;
use crate::format::key::{KeyTail, mail_key};
use crate::format::{ObjectId, Place, Sub};
use crate::fs::api::Ino;
use crate::store::{Reason, StoreError};
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Which lost mails are shown as blank ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum LostMails {
    /// None: reading them fails with EIO.
    #[default]
    Error,
    /// Those of users, or of folders (`USER/DIRECTORY`), that match one of these masks.
    Blank(Vec<String>),
}

impl LostMails {
    fn blank(&self, user: &str, folder: &[u8]) -> bool {
        let LostMails::Blank(masks) = self else { return false };
        let path = [user.as_bytes(), b"/", folder].concat();
        masks.iter().any(|m| {
            mask::matches(m.as_bytes(), user.as_bytes()) || mask::matches(m.as_bytes(), &path)
        })
    }
}

/// Lost mails that were met, each counted once.
#[derive(Debug, Default)]
pub struct Met(Mutex<BTreeSet<(Arc<str>, ObjectId)>>);

/// Inodes that were shown blank since the kernel learnt of them.
#[derive(Debug, Default)]
pub struct Blanks {
    /// How many there are: the lock is not taken as long as there are none.
    count: AtomicUsize,
    all: Mutex<HashSet<Ino>>,
}

impl Blanks {
    /// Whether pages that the kernel has of an inode may be used by a handle that is being
    /// opened, which shows it `blank` or as it is.
    pub fn keeps_pages(&self, ino: Ino, blank: bool) -> bool {
        if blank {
            let mut all = self.all.lock();
            all.insert(ino);
            self.count.store(all.len(), Ordering::Release);
            return false;
        }
        self.count.load(Ordering::Acquire) == 0 || !self.all.lock().contains(&ino)
    }

    /// The kernel has forgotten an inode, and with it all pages.
    pub fn forget(&self, ino: Ino) {
        if self.count.load(Ordering::Acquire) > 0 {
            let mut all = self.all.lock();
            all.remove(&ino);
            self.count.store(all.len(), Ordering::Release);
        }
    }
}

/// More are not told apart.
const MET_MAX: usize = 100_000;

impl Met {
    fn add(&self, user: &Arc<str>, object: ObjectId) {
        let mut all = self.0.lock();
        if all.len() < MET_MAX {
            all.insert((user.clone(), object));
        }
    }

    pub fn count(&self) -> u64 {
        self.0.lock().len() as u64
    }
}

/// The store said that an object is not there: asks again, and says what it is.
pub async fn confirm(session: &Session, user: &Arc<str>, key: &KeyTail) -> Error {
    match session.env.store.head(&mail_key(user, key), Reason("fetch")).await {
        Err(StoreError::NotFound { .. }) => {
            session.lost_mails.add(user, key.id());
            Error::Gone { user: user.to_string(), object: key.to_string() }
        }
        // There and not there: nothing is certain but that it cannot be read now.
        Ok(_) => Error::Damaged {
            what: format!("user {user}: object {key} is there, but the store does not give it"),
        },
        Err(source) => super::fetch::unread(user, source),
    }
}

impl User {
    /// For a lost mail that is to be shown blank: how many of its line ends are bare.
    pub(super) fn blank(&self, ix: NodeIx) -> Result<Option<u64>> {
        let node = self.node(ix)?;
        let Some(first) = node.names.first() else { return Ok(None) };
        if first.at.sub == Sub::Own {
            return Ok(None);
        }
        let path = self.tree.path(Place::own(first.at.folder));
        let path: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
        if !self.session.settings.lost_mails.blank(&self.name, &path.join(&b'/')) {
            return Ok(None);
        }
        let name = self.tree.name_bytes(first).cloned().unwrap_or_else(|| Arc::from(&b""[..]));
        let bare = number_after(&name, b",W=").and_then(|w| w.checked_sub(node.size));
        Ok(Some(bare.unwrap_or(1).min(node.size)))
    }
}

fn number_after(name: &[u8], what: &[u8]) -> Option<u64> {
    let at = name.windows(what.len()).position(|w| w == what)? + what.len();
    let digits = name[at..].iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&name[at..at + digits]).ok()?.parse().ok()
}

/// Bytes of a blank mail of `size` bytes: its line ends, then spaces.
pub(super) fn blank_bytes(bare: u64, offset: u64, len: usize) -> Vec<u8> {
    (offset..).take(len).map(|at| blank_byte(bare, at)).collect()
}

fn blank_byte(bare: u64, at: u64) -> u8 {
    match (bare, at) {
        // No bare line end may be in it, so the empty header ends as on the wire.
        (0, 0) => b'\r',
        (0, 1) => b'\n',
        (bare, at) if at < bare => b'\n',
        _ => b' ',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blank_mail_has_the_sizes_of_the_lost_one() {
        for (size, virtual_size) in [(10u64, 13u64), (10, 10), (3, 3), (1, 2)] {
            let bare = virtual_size - size;
            let bytes = blank_bytes(bare, 0, size as usize);
            let found = bytes
                .iter()
                .enumerate()
                .filter(|(i, b)| **b == b'\n' && (*i == 0 || bytes[i - 1] != b'\r'));
            assert_eq!(found.count() as u64, bare);
            assert_eq!(blank_bytes(bare, 1, size as usize - 1), bytes[1..]);
        }
    }

    #[test]
    fn pages_of_a_blank_are_not_kept_until_the_kernel_forgets_it() {
        let blanks = Blanks::default();
        assert!(blanks.keeps_pages(1, false));
        assert!(!blanks.keeps_pages(1, true));
        // The real one, twice: an answer may not have reached the kernel.
        assert!(!blanks.keeps_pages(1, false));
        assert!(!blanks.keeps_pages(1, false));
        assert!(blanks.keeps_pages(2, false));
        blanks.forget(2);
        assert!(!blanks.keeps_pages(1, false));
        blanks.forget(1);
        assert!(blanks.keeps_pages(1, false));
    }

    #[test]
    fn masks_name_users_or_their_folders() {
        let lost = LostMails::Blank(vec!["a@x".into(), "b@x/.Old*".into()]);
        assert!(lost.blank("a@x", b""));
        assert!(lost.blank("a@x", b".Any"));
        assert!(lost.blank("b@x", b".Old.2019"));
        assert!(!lost.blank("b@x", b""));
        assert!(!LostMails::Error.blank("a@x", b""));
    }

    #[test]
    fn sizes_are_read_from_names() {
        assert_eq!(number_after(b"1.M2.host,S=10,W=12:2,S", b",W="), Some(12));
        assert_eq!(number_after(b"1.M2.host", b",W="), None);
    }
}
