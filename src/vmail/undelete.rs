//! Mails that were expunged come back, while their objects are kept.
//!
//! Two questions are answered here, from the store: which mails, and where were they. An undelete
//! takes what is on the dropped list; a restore in place takes what a state names and nothing
//! names today. Either way the mail comes back as a new one (`super::bring_back`): with another
//! name and another UID, because clients were told that the old one is expunged.
//!
//! Where a mail was is said by the last state before it was dropped: it comes back under each name it
//! had there. So one of two copies whose expunge was followed by that of the other comes back once,
//! and both of them if no flush was in between. A mail that came and went between two flushes is in
//! no state: its key says where it was delivered. Such a key may also be that of a mail whose file
//! was written again after it was made safe; the object that took its place tells so, and it
//! stays away.
//!
//! # Equal names
//!
//! Nothing that is there is changed or replaced. A mail's file gets a name that no file has, so a
//! mail of the same file name stays as it is beside it. A folder is known by its id: one that was
//! renamed gets its mails under the name it has today. One that is gone gets them at its old path: in
//! the folder that is there today, beside that one's mails, or in one made anew. Where something else
//! than a folder has the name, its mails stay away, and the report says so. An object that has a name
//! again is on no list any more, so however often a mail is deleted and an undelete is begun, it
//! comes back once.
//!
//! A user with mdbox is refused: there an expunge takes no object away (mails share files,
//! and a purge copies what is left into new ones), so there is no mail to bring back; the way is
//! a restore into a directory and `doveadm import`.

use super::bring_back::{LogWriter, bring_back};
use super::error::{Error, Result};
use super::flush::{self, Options};
use super::history::{self, History};
use super::session::UserCell;
use super::stored::{Paths, Stored, mailbox_of, path_text};
use super::tree::NameBytes;
use super::{load, open, recover};
use crate::format::head::{Head, HeadFolder};
use crate::format::key::{KeyTail, MailKey, Piece};
use crate::format::listing::Entry;
use crate::format::part::{Dropped, DroppedAt};
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::store::{Reason, StoreError};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Which mails come back.
#[derive(Debug, Clone)]
pub enum Which {
    /// Those expunged since a time (seconds since 1970), from a folder or from all.
    Expunged { folder: Option<String>, since: Option<i64> },
    /// Those of a state at a time that nothing names any more.
    Of { at: i64 },
}

/// A mail that comes back, and what it was.
#[derive(Debug, Clone)]
pub struct Back {
    pub tail: KeyTail,
    pub size: u64,
    /// The folder it was in, and the names that lead there, or led there as long as it was there.
    pub folder: FolderId,
    pub path: Vec<NameBytes>,
    pub old_name: Vec<u8>,
    /// When it was expunged, seconds since 1970.
    pub expunged: Option<i64>,
    /// Nothing ever named it, so it is on no list.
    pub late: bool,
    /// The flags in its name come along.
    pub with_flags: bool,
    /// What it is called now.
    pub name: String,
}

/// What was done, or would be.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub mails: Vec<Back>,
    /// Folders that were made anew.
    pub folders: Vec<String>,
    /// Mails that stay away, and why.
    pub left: Vec<(String, String)>,
}

/// Brings mails of a user of this session back. With `dry_run` only says which.
///
/// # Errors
/// [`Error::Refused`] for mdbox; [`Error::NotThere`] for a time of which no state is left, and for a
/// folder that neither is nor was there; those of opening and flushing the user.
pub async fn undelete(
    cell: &Arc<UserCell>,
    which: &Which,
    dry_run: bool,
    logs: &dyn LogWriter,
) -> Result<Report> {
    // Neither a gc nor a second undelete may name or delete what this one looks at.
    let _one = cell.collecting.lock().await;
    open::open(cell).await?;
    // What was expunged a moment ago is then on the list, too.
    flush::flush(cell, Options::default()).await?;
    let head = cell.open_user(|user| Ok(user.head.clone()))?;
    let stored = Stored::new(cell.session.env.store.clone(), &cell.name, Reason("undelete"));
    if is_mdbox(&head) {
        return Err(Error::Refused(format!(
            "{}: mails of mdbox share files, so none can be brought back by itself: write the \
             state into a directory (vmailfs user restore -u {0} --at TIME --to DIR) and take \
             mails from there (doveadm import -u {0} mdbox:DIR/mail:INDEX=DIR/index \"\" all)",
            cell.name
        )));
    }
    let mut report = Report::default();
    let list = stored.dropped(&head).await?;
    let paths = Paths::new(&head);
    let mails = match which {
        Which::Expunged { folder, since } => {
            let due = |at: &&DroppedAt| since.is_none_or(|since| at.when >= since);
            let dropped: Vec<&DroppedAt> = list.iter().filter(due).collect();
            let mut found = expunged(cell, &stored, &head, &dropped).await?;
            if let Some(folder) = folder {
                let today = |mail: &Back| path_today(&paths, mail.folder);
                found.retain(|mail| {
                    is_called(&mail.path, folder)
                        || today(mail).is_some_and(|path| is_called(&path, folder))
                });
                if found.is_empty() {
                    must_have_been(&stored, &head, folder).await?;
                }
            }
            found
        }
        Which::Of { at } => gone_since(&stored, &head, *at).await?,
    };
    for mut mail in mails {
        if let Some(path) = path_today(&paths, mail.folder) {
            mail.path = path;
        }
        match list.mail(mail.tail.id()) {
            Some(at) if !at.doomed => {
                let expunged = Some(at.when);
                report.mails.push(Back { expunged, ..mail });
            }
            Some(_) => report.left.push((shown(&mail), "its retention is over".into())),
            None => report.left.push((shown(&mail), "it was deleted after its retention".into())),
        }
    }
    report.mails.sort_by(|a, b| (&a.path, a.tail.id()).cmp(&(&b.path, b.tail.id())));
    if !dry_run && !report.mails.is_empty() {
        bring_back(cell, &list, &mut report, matches!(which, Which::Of { .. }), logs).await?;
        // After this nothing takes it away again.
        flush::flush(cell, Options::default()).await?;
    }
    Ok(report)
}

/// A name that no folder has or had in any state that is left is a mistake of whoever asks.
async fn must_have_been(stored: &Stored, head: &Head, folder: &str) -> Result<()> {
    let has = |head: &Head| {
        let paths = Paths::new(head);
        head.folders.iter().any(|f| is_called(&paths.of(Place::own(f.id)), folder))
    };
    if has(head) {
        return Ok(());
    }
    let history = history::follow(stored, head.clone(), None).await?;
    if history.states.iter().any(|state| has(&state.head)) {
        return Ok(());
    }
    let text =
        format!("{}: no folder {folder}, neither today nor in a state that is kept", stored.user);
    Err(Error::NotThere(text))
}

/// What leads to a folder that is still there.
fn path_today(paths: &Paths<'_>, folder: FolderId) -> Option<Vec<NameBytes>> {
    paths.folder(folder).map(|_| paths.of(Place::own(folder)))
}

pub(super) fn shown(mail: &Back) -> String {
    format!("{}/{}", path_text(&mail.path), crate::format::escape::escape(&mail.old_name))
}

/// Whether the user has a storage of files with many mails.
fn is_mdbox(head: &Head) -> bool {
    let beside = |storage: &HeadFolder| {
        head.folders.iter().any(|f| f.parent == storage.parent && f.name == b"mailboxes")
    };
    head.folders.iter().any(|f| f.name == b"storage" && beside(f))
}

fn is_called(path: &[NameBytes], name: &str) -> bool {
    let plain: Vec<&[u8]> = path.iter().map(|n| &**n).collect();
    let mailbox = mailbox_of(path);
    plain.join(&b'/') == name.as_bytes()
        || mailbox == name.as_bytes()
        || mailbox == b"INBOX" && name.eq_ignore_ascii_case("inbox")
}

/// A name in an earlier state, without the flags that came after it.
fn base(name: &[u8]) -> &[u8] {
    let end = name.iter().position(|b| *b == b':').unwrap_or(name.len());
    let name = &name[..end];
    let end = name.windows(3).position(|w| w == b",S=").unwrap_or(name.len());
    &name[..end]
}

/// Where dropped mails were when they were last seen.
async fn expunged(
    cell: &Arc<UserCell>,
    stored: &Stored,
    head: &Head,
    dropped: &[&DroppedAt],
) -> Result<Vec<Back>> {
    let mut open: HashMap<ObjectId, (KeyTail, MailKey)> = HashMap::new();
    let mut oldest = i64::MAX;
    for at in dropped {
        if let Dropped::Mail(tail) = &at.object {
            let key = tail.decode();
            if key.piece == Piece::Whole {
                oldest = oldest.min(at.when);
                open.insert(tail.id(), (tail.clone(), key));
            }
        }
    }
    if open.is_empty() {
        return Ok(Vec::new());
    }
    // The state before the first of them went is the last that can name one.
    let history = history::follow(stored, head.clone(), Some(oldest - 1)).await?;
    let mut found = named_in(stored, &history, &mut open).await?;
    found.extend(delivered(cell, head, open).await?);
    sizes(stored, &mut found).await?;
    Ok(found)
}

/// Takes what some state names, the newest first.
async fn named_in(
    stored: &Stored,
    history: &History,
    open: &mut HashMap<ObjectId, (KeyTail, MailKey)>,
) -> Result<Vec<Back>> {
    let mut found = Vec::new();
    let mut read: HashSet<Vec<(ObjectId, u64)>> = HashSet::new();
    for state in &history.states {
        let paths = Paths::new(&state.head);
        let mut here = HashSet::new();
        for folder in &state.head.folders {
            let chain = folder.parts.iter().map(|p| (p.bundle, p.offset)).collect();
            if open.is_empty() || !read.insert(chain) {
                continue;
            }
            for mail in mails_of(stored, &paths, folder).await? {
                let id = mail.tail.id();
                if open.contains_key(&id) {
                    here.insert(id);
                    found.push(mail);
                }
            }
        }
        open.retain(|id, _| !here.contains(id));
    }
    Ok(found)
}

/// The mails that a folder of a state names.
async fn mails_of(stored: &Stored, paths: &Paths<'_>, folder: &HeadFolder) -> Result<Vec<Back>> {
    let state = match stored.folder(folder).await {
        Ok(state) => state,
        Err(error @ Error::Store { .. }) => return Err(error),
        Err(error) => {
            tracing::warn!(user = %stored.user, %error, "a folder of an earlier state is passed over");
            return Ok(Vec::new());
        }
    };
    let path = paths.of(Place::own(folder.id));
    let mail = |(sub, name, entry): (Sub, &NameBytes, &Entry)| match entry {
        Entry::Mail { object, size, .. } if sub != Sub::Tmp && !name.starts_with(b".temp.") => {
            Some(Back {
                tail: object.clone(),
                size: *size,
                folder: folder.id,
                path: path.clone(),
                old_name: name.to_vec(),
                expunged: None,
                late: false,
                with_flags: false,
                name: String::new(),
            })
        }
        _ => None,
    };
    Ok(state.listing.names().filter_map(mail).collect())
}

/// Mails that no state names: where they were delivered.
async fn delivered(
    cell: &Arc<UserCell>,
    head: &Head,
    open: HashMap<ObjectId, (KeyTail, MailKey)>,
) -> Result<Vec<Back>> {
    let paths = Paths::new(head);
    // Objects by the name of their file: of several some may be earlier versions of others.
    let mut named: HashMap<(FolderId, Vec<u8>), Vec<KeyTail>> = HashMap::new();
    let mut add = |tail: &KeyTail, key: &MailKey| {
        if let Some(name) = &key.name {
            named.entry((key.folder, base(name).to_vec())).or_default().push(tail.clone());
        }
    };
    open.values().for_each(|(tail, key)| add(tail, key));
    let folders: HashSet<FolderId> = open.values().map(|(_, key)| key.folder).collect();
    for id in folders.into_iter().filter(|id| paths.folder(*id).is_some()) {
        load::load(cell, id).await?;
        for tail in cell.open_user(|user| Ok(user.published_in(id)))? {
            add(&tail, &tail.decode());
        }
    }
    let mut replaced = HashSet::new();
    for tail in named.into_values().filter(|all| all.len() > 1).flatten() {
        replaced.extend(match recover::replaced(cell, &tail).await {
            // Its PUT was never carried out.
            Err(Error::Store { source: StoreError::NotFound { .. }, .. }) => Vec::new(),
            ids => ids?,
        });
    }
    let mut found = Vec::new();
    for (tail, key) in open.into_values() {
        let (Some(folder), Some(name)) = (paths.folder(key.folder), &key.name) else { continue };
        if replaced.contains(&key.id) {
            continue;
        }
        found.push(Back {
            size: 0,
            folder: folder.id,
            path: paths.of(Place::own(folder.id)),
            old_name: name.clone(),
            expunged: None,
            late: false,
            with_flags: false,
            name: String::new(),
            tail,
        });
    }
    Ok(found)
}

/// Asks for the sizes that no listing has told.
async fn sizes(stored: &Stored, mails: &mut Vec<Back>) -> Result<()> {
    let mut kept = Vec::with_capacity(mails.len());
    for mut mail in mails.drain(..) {
        if mail.size == 0 {
            let key = crate::format::key::mail_key(&stored.user, &mail.tail);
            match stored.store.head(&key, stored.why).await {
                Ok(meta) => mail.size = meta.size,
                // Its PUT was never carried out.
                Err(StoreError::NotFound { .. }) => continue,
                Err(e) => return Err(stored.failed(e)),
            }
        }
        kept.push(mail);
    }
    *mails = kept;
    Ok(())
}

/// What a state names and nothing names today, once under each name it had.
async fn gone_since(stored: &Stored, head: &Head, at: i64) -> Result<Vec<Back>> {
    let history = history::follow(stored, head.clone(), Some(at)).await?;
    let state = history.at(at)?;
    let mut here: HashSet<ObjectId> = HashSet::new();
    for folder in &head.folders {
        let now = stored.folder(folder).await?;
        here.extend(now.listing.names().filter_map(|(_, _, entry)| match entry {
            Entry::Mail { object, .. } => Some(object.id()),
            _ => None,
        }));
    }
    let paths = Paths::new(&state.head);
    let mut found = Vec::new();
    for folder in &state.head.folders {
        let mails = mails_of(stored, &paths, folder).await?;
        let gone = mails.into_iter().filter(|mail| !here.contains(&mail.tail.id()));
        found.extend(gone.map(|mail| Back { with_flags: true, ..mail }));
    }
    Ok(found)
}
