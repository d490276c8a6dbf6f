//! Giving names again to mails that lost theirs, in a user that is in use.
//!
//! Each mail is named by one record together with the one that takes it off the dropped list
//! (`super::dropped`), so no death in between leaves it named and dropped. In Maildir the name
//! alone shows it: a new one in `new/` (or in `cur/` with its flags), which no client has seen
//! with a UID. In sdbox a mail is a numbered file and a record in Dovecot's index log, and the
//! number must be free when the record is written: so both happen while the log is locked as
//! Dovecot locks it. Who can take that lock is not known here ([`LogWriter`]).
//!
//! The kernel is told of each name: it was not asked for it.

use super::dropped;
use super::error::{Error, Plain, Result};
use super::load;
use super::need::Op;
use super::node::{Node, NodeIx};
use super::recover::{Found, find_path};
use super::recover_sdbox::{INDEX_LOG, first_index, index_folder};
use super::session::UserCell;
use super::tree::{NameBytes, Target};
use super::undelete::{Back, Report, shown};
use super::user::User;
use super::wait::satisfy;
use crate::dovecot::classes::Class;
use crate::dovecot::recover::{LogAppend, append_sdbox};
use crate::dovecot::uidlist;
use crate::format::key::KeyTail;
use crate::format::part::DroppedList;
use crate::format::{FolderId, ObjectId, Place, Sub};
use crate::fs::api::{Caller, Invalidate};
use async_trait::async_trait;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// UIDs that a restore in place leaves free above those that were given.
pub const UID_GAP: u32 = 1000;

/// Who appends to an index log that a mail server may be writing.
#[async_trait]
pub trait LogWriter: Send + Sync {
    /// Locks a log (a path below the user's root) as its server does.
    ///
    /// # Errors
    /// [`Error::Full`] if the server holds it for too long.
    async fn lock(&self, cell: &Arc<UserCell>, log: &LogFile) -> Result<Box<dyn LockedLog>>;
}

/// A log, and where it lies.
#[derive(Debug, Clone)]
pub struct LogFile {
    pub path: Vec<NameBytes>,
    pub(super) at: Place,
}

/// A log that nobody else writes while this lives.
#[async_trait]
pub trait LockedLog: Send {
    /// Writes at the log's end.
    ///
    /// # Errors
    /// Nothing is written then.
    async fn append(&mut self, append: &LogAppend) -> Result<()>;
}

/// For users whose files nobody but this session touches (no mount, or nobody logged in).
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

struct AloneLog(Arc<UserCell>, LogFile);

#[async_trait]
impl LogWriter for Alone {
    async fn lock(&self, cell: &Arc<UserCell>, log: &LogFile) -> Result<Box<dyn LockedLog>> {
        Ok(Box::new(AloneLog(cell.clone(), log.clone())))
    }
}

#[async_trait]
impl LockedLog for AloneLog {
    async fn append(&mut self, append: &LogAppend) -> Result<()> {
        self.0.open_user(|user| {
            let log = user.child(self.1.at.folder, INDEX_LOG).ok_or(Plain::NotFound)?;
            user.append_log(log, append)
        })
    }
}

const UIDLIST: &[u8] = b"dovecot-uidlist";
const UIDLIST_LOCK: &[u8] = b"dovecot-uidlist.lock";

/// Calls `f` under the user's lock, as often as it has to wait for something.
async fn go<T>(cell: &Arc<UserCell>, f: impl Fn(&mut User) -> Op<T>) -> Result<T> {
    loop {
        match cell.with(&f) {
            Ok(done) => return Ok(done),
            Err(super::need::Stop::Error(error)) => return Err(error),
            Err(super::need::Stop::Wait(need)) => satisfy(&cell.session, need).await?,
        }
    }
}

/// Names all mails of the report; fills in what they are called. `gap`: next-UIDs are raised.
pub(super) async fn bring_back(
    cell: &Arc<UserCell>,
    list: &DroppedList,
    report: &mut Report,
    gap: bool,
    logs: &dyn LogWriter,
) -> Result<()> {
    let mut by_folder: BTreeMap<(FolderId, Vec<NameBytes>), Vec<Back>> = BTreeMap::new();
    for mail in report.mails.drain(..) {
        by_folder.entry((mail.folder, mail.path.clone())).or_default().push(mail);
    }
    let mut placed = Placed::default();
    for ((id, path), mut mails) in by_folder {
        let folder = match folder_of(cell, id, &path, report).await {
            Ok(folder) => folder,
            Err(error @ Error::Plain(_)) => {
                let why = format!("its folder cannot be made: {error}");
                report.left.extend(mails.iter().map(|mail| (shown(mail), why.clone())));
                continue;
            }
            Err(error) => return Err(error),
        };
        let dbox = path.last().is_some_and(|name| &**name == b"dbox-Mails");
        let named = match dbox {
            true => sdbox(cell, folder, list, &mut mails, gap, &mut placed, logs).await,
            false => maildir(cell, folder, list, &mut mails, gap, &mut placed).await,
        };
        named?;
        for mail in mails {
            match mail.name.is_empty() {
                false => report.mails.push(mail),
                true => report.left.push((shown(&mail), "its retention ended just now".into())),
            }
        }
    }
    super::sync::sync_user(cell).await
}

/// The folder a mail was in, made anew at its path if it is gone.
async fn folder_of(
    cell: &Arc<UserCell>,
    id: FolderId,
    path: &[NameBytes],
    report: &mut Report,
) -> Result<FolderId> {
    let there = cell.open_user(|user| Ok(user.tree.folders.contains_key(&id)))?;
    let folder = if there {
        id
    } else {
        let (folder, made) = find_path(cell, path).await?;
        if made {
            report.folders.push(super::stored::path_text(path));
        }
        folder
    };
    load::load(cell, folder).await?;
    Ok(folder)
}

/// Objects that have a name again, and the nodes they are.
#[derive(Default)]
struct Placed(HashMap<ObjectId, (NodeIx, u64)>);

impl User {
    /// The objects of mails that a folder names.
    pub(super) fn published_in(&self, id: FolderId) -> Vec<KeyTail> {
        let Some(folder) = self.tree.folders.get(&id) else { return Vec::new() };
        let nodes = folder.dirs().flat_map(|(_, dir)| dir.entries.after(0));
        nodes
            .filter_map(|(_, _, target)| match target {
                Target::Node(ix) => self.tree.nodes.get(ix)?.object().cloned(),
                Target::Folder(_) | Target::Sub(_) => None,
            })
            .collect()
    }

    /// Names a dropped mail again; false: it is not on the list any more, or is being deleted.
    fn name_again(
        &mut self,
        at: Place,
        name: &[u8],
        mail: &Back,
        list: &DroppedList,
        placed: &mut Placed,
    ) -> Result<bool> {
        let known = placed.0.get(&mail.tail.id()).copied();
        let alive = |(ix, ino): (NodeIx, u64)| {
            self.tree.nodes.get(ix).is_some_and(|node: &Node| node.ino == ino && node.nlink > 0)
        };
        if let Some((ix, _)) = known.filter(|known| alive(*known)) {
            self.link(ix, at, name).map_err(super::recover::unstop)?;
        } else {
            let again = match dropped::again(list, &mail.tail) {
                _ if mail.late => Vec::new(),
                Err(Error::Refused(_) | Error::Plain(Plain::NotFound)) => return Ok(false),
                again => vec![again?],
            };
            let found = Found {
                tail: mail.tail.clone(),
                key: mail.tail.decode(),
                size: mail.size,
                name: name.to_vec(),
                replaces: Vec::new(),
            };
            let node = self.mail_node(&found, Class::Mail);
            let ino = node.ino;
            let ix = match self.put_name_with(at, name.into(), node, again) {
                Err(Error::Refused(_)) => return Ok(false),
                ix => ix?,
            };
            placed.0.insert(mail.tail.id(), (ix, ino));
        }
        self.tell_kernel(at, name);
        self.important();
        Ok(true)
    }

    pub(super) fn tell_kernel(&self, at: Place, name: &[u8]) {
        if let Some(dir) = self.tree.dir(at) {
            self.session.invalidate(Invalidate::Name { parent: dir.ino, name: name.to_vec() });
            self.session.invalidate(Invalidate::Inode { ino: dir.ino });
        }
    }

    fn caller(&self) -> Caller {
        Caller { uid: self.owner.uid, gid: self.owner.gid, pid: 0 }
    }
}

/// A name that no mail had, with the sizes that readers of names want to know.
fn fresh_name(cell: &UserCell, mail: &Back) -> Vec<u8> {
    let env = &cell.session.env;
    let now = env.clock.wall();
    let random = env.random.u64();
    let mut name =
        format!("{}.M{}P{random:016x}.undeleted", now.secs, now.nanos / 1000).into_bytes();
    let known = mail.tail.decode().name.unwrap_or_default();
    let sized = [&mail.old_name, &known].into_iter().find_map(|old| {
        let old = old.split(|b| *b == b':').next().unwrap_or_default();
        let at = old.windows(3).position(|w| w == b",S=")?;
        Some(&old[at..])
    });
    name.extend_from_slice(sized.unwrap_or_default());
    name
}

/// The system flags in a Maildir name: letters for keywords mean nothing without their list.
fn flags_of(mail: &Back) -> Option<Vec<u8>> {
    if !mail.with_flags {
        return None;
    }
    let at = mail.old_name.windows(3).rposition(|w| w == b":2,")?;
    Some(mail.old_name[at + 3..].iter().copied().filter(u8::is_ascii_uppercase).collect())
}

async fn maildir(
    cell: &Arc<UserCell>,
    folder: FolderId,
    list: &DroppedList,
    mails: &mut [Back],
    gap: bool,
    placed: &mut Placed,
) -> Result<()> {
    for sub in [Sub::Cur, Sub::New, Sub::Tmp] {
        let own = Place::own(folder);
        go(cell, |user| {
            if user.tree.dir(Place { folder, sub }).is_some() {
                return Ok(());
            }
            user.mkdir(user.caller(), own, sub.as_str().as_bytes(), 0o700)?;
            user.tell_kernel(own, sub.as_str().as_bytes());
            Ok(())
        })
        .await?;
    }
    if gap {
        raise_uidlist(cell, folder).await?;
    }
    for mail in mails {
        let mut name = fresh_name(cell, mail);
        let mut sub = Sub::New;
        if let Some(flags) = flags_of(mail) {
            name.extend_from_slice(b":2,");
            name.extend_from_slice(&flags);
            sub = Sub::Cur;
        }
        let at = Place { folder, sub };
        let done = cell.open_user(|user| user.name_again(at, &name, mail, list, placed))?;
        if done {
            mail.name = format!("{}/{}", sub.as_str(), crate::format::escape::escape(&name));
        }
    }
    Ok(())
}

/// Raises next-UID in a uidlist as Dovecot writes one: beside it, under its lock, renamed over it.
async fn raise_uidlist(cell: &Arc<UserCell>, folder: FolderId) -> Result<()> {
    // Maildir++ keeps INBOX's with the mails; with CONTROL= it lies elsewhere.
    let mut homes = vec![folder];
    homes.extend(cell.open_user(|user| Ok(user.counterpart(folder)))?);
    for home in homes {
        load::load(cell, home).await?;
        let at = Place::own(home);
        let mut patience = super::wait::Patience::new(&cell.session);
        loop {
            let raised = go(cell, |user| match user.child(home, UIDLIST) {
                None => Ok(true),
                Some(ix) => user.raise_uidlist(at, ix),
            })
            .await?;
            if raised {
                break;
            }
            // Dovecot holds the lock.
            if !patience.again().await {
                return Err(Error::Full(format!("{}: the uidlist stays locked", cell.name)));
            }
        }
    }
    Ok(())
}

impl User {
    /// False: it is locked.
    fn raise_uidlist(&mut self, at: Place, ix: NodeIx) -> Op<bool> {
        let content = self.index_content(ix)?;
        let Ok(known) = uidlist::parse(&content) else { return Ok(true) };
        let next = known.next_uid().saturating_add(UID_GAP);
        self.await_ceiling(at.folder, next)?;
        let Ok(raised) = uidlist::raise_next_uid(&content, next) else { return Ok(true) };
        let mode = self.node(ix)?.mode;
        let lock = match self.create(self.caller(), at, UIDLIST_LOCK, mode) {
            Err(super::need::Stop::Error(Error::Plain(Plain::Exists))) => return Ok(false),
            lock => lock?,
        };
        self.write_local(at, UIDLIST_LOCK, &raised)?;
        if let Ok(node) = self.node_mut(lock) {
            node.size = raised.len() as u64;
        }
        self.recharge(lock);
        let done = self.rename(at, UIDLIST_LOCK, at, UIDLIST, false);
        if done.is_err() {
            self.unlink(at, UIDLIST_LOCK)?;
        }
        self.tell_kernel(at, UIDLIST_LOCK);
        self.tell_kernel(at, UIDLIST);
        done.map(|()| true)
    }
}

async fn sdbox(
    cell: &Arc<UserCell>,
    folder: FolderId,
    list: &DroppedList,
    mails: &mut [Back],
    gap: bool,
    placed: &mut Placed,
    logs: &dyn LogWriter,
) -> Result<()> {
    let index = index_folder(cell, folder, INDEX_LOG).await?;
    if index.is_none() {
        let path = cell.open_user(|user| Ok(user.index_path(folder)))?;
        first_index(cell, &path).await?;
    }
    let mut locked = match index {
        Some(index) => {
            let at = Place::own(index);
            let path = cell.open_user(|user| {
                let mut path = user.tree.path(at);
                path.push(INDEX_LOG.into());
                Ok(path)
            })?;
            Some(logs.lock(cell, &LogFile { path, at }).await?)
        }
        None => None,
    };
    let at = Place::own(folder);
    let count = u32::try_from(mails.len()).unwrap_or(u32::MAX);
    let spare = if gap { UID_GAP } else { 0 };
    let first = go(cell, |user| {
        let first = user.free_uid(folder, index).saturating_add(spare);
        if let Some(index) = index {
            user.await_ceiling(index, first.saturating_add(count))?;
        }
        Ok(first)
    })
    .await?;
    let mut uids = Vec::new();
    for (uid, mail) in (first..).zip(mails.iter_mut()) {
        let name = format!("u.{uid}");
        if cell.open_user(|user| user.name_again(at, name.as_bytes(), mail, list, placed))? {
            mail.name = name;
            uids.push(uid);
        }
    }
    let (Some(index), Some(locked)) = (index, &mut locked) else { return Ok(()) };
    let append = cell.open_user(|user| {
        let state = user.index_state(index, b"dovecot.index")?;
        let append = state.map(|state| append_sdbox(&state, &uids, 0));
        match append {
            Some(Ok(append)) => Ok(append),
            Some(Err(error)) => {
                Err(Error::Damaged { what: format!("user {}: index log: {error}", user.name) })
            }
            None => Err(Error::Damaged { what: format!("user {}: index unreadable", user.name) }),
        }
    });
    let shown = match append {
        Ok(append) => locked.append(&append).await,
        Err(error) => Err(error),
    };
    if shown.is_err() {
        // A file without its record would get in the way of the next mail with its number.
        for mail in mails.iter_mut().filter(|mail| !mail.name.is_empty()) {
            let name = std::mem::take(&mut mail.name);
            go(cell, |user| user.unlink(at, name.as_bytes())).await?;
            cell.open_user(|user| {
                user.tell_kernel(at, name.as_bytes());
                Ok(())
            })?;
        }
    }
    shown
}
