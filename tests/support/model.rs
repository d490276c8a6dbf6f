//! What every mailbox must hold, built only from what was asked of the server and what it
//! answered; never from looking at files.
//!
//! An operation is noted before it is sent ([`Model::begin`]) and again when the server said
//! OK ([`Model::done`]). One that was never answered may have happened or not, and the check
//! accepts both. After [`Model::cut`] answers no longer count: a server whose disk has just
//! vanished may say OK to anything.
//!
//! UIDs, UIDVALIDITY and dates that the server chose are learnt by [`Model::learn`] and must not
//! change from then on. Every (UIDVALIDITY, UID) ever seen stays in the ledger for good.

use super::imap::Flags;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

pub type MailId = String;

#[derive(Debug, Clone, Default)]
pub struct Mail {
    pub hash: String,
    /// None until the server told.
    pub uid: Option<u32>,
    pub flags: Flags,
    /// What the flags may be instead, if an unanswered change happened.
    pub other_flags: Vec<Flags>,
    /// INTERNALDATE in seconds since 1970; None until chosen or learnt.
    pub date: Option<i64>,
    /// Whether it may just as well not be there. Nor are its flags promised then: a rebuild of
    /// dbox finds the file without its record, and Maildir's keyword letters come before the
    /// file that says what they mean.
    pub maybe: bool,
    /// Whether it was brought with flags that are not promised: of a Maildir's keywords Dovecot
    /// says OK though the file that gives their names could not be written.
    pub loose: bool,
    /// Folders whose mail this is a copy of, made since the last [`Model::settled`].
    pub origins: BTreeSet<String>,
    /// Whether it came or its flags changed since the last [`Model::settled`].
    pub fresh: bool,
    /// Whether it came since the last [`Model::settled`].
    pub new: bool,
    /// When its latest change was answered.
    pub changed: Option<Instant>,
    /// When the operation that brought it began and was answered, in steps of the model.
    pub began: u64,
    pub answered: u64,
}

#[derive(Debug, Clone, Default)]
pub struct Folder {
    /// None until learnt.
    pub uid_validity: Option<u32>,
    /// The highest UIDNEXT seen, or one more than the highest UID.
    pub uid_next: u32,
    pub mails: BTreeMap<MailId, Mail>,
    /// Mails that left since the last [`Model::settled`], and when that was answered.
    pub left: BTreeMap<MailId, Option<Instant>>,
}

#[derive(Debug, Clone, Default)]
pub struct User {
    pub folders: BTreeMap<String, Folder>,
    pub subscriptions: BTreeSet<String>,
    /// Folders and subscriptions that an unanswered operation may have changed.
    pub unsure: BTreeSet<String>,
    /// Every (UIDVALIDITY, UID) ever seen, and the mail it stood for.
    pub ledger: BTreeMap<(u32, u32), MailId>,
    /// Mails whose bringing was never answered: one that was safe before it had its name, and
    /// that nobody has seen since, may still come back from a store that lost its machine.
    pub unanswered: BTreeSet<MailId>,
    /// Mails in a folder whose copying or expunging was never answered: they may show at any time.
    /// sdbox finds a file without a record when the next mail is to get its number, or at a resync.
    pub half_done: BTreeSet<(String, MailId)>,
    /// UIDs that a client was told of two mails.
    pub clashes: Vec<String>,
    /// Mails that an unanswered MOVE may have left in either folder, but must be in one.
    pub either: Vec<(MailId, String, String)>,
}

#[derive(Debug, Clone)]
pub enum Op {
    /// Delivery (no date) or APPEND.
    Put {
        folder: String,
        id: MailId,
        hash: String,
        flags: Flags,
        date: Option<i64>,
    },
    /// `how` as in STORE: `+`, `-`, or empty to replace.
    Store {
        folder: String,
        id: MailId,
        how: &'static str,
        flags: Flags,
    },
    Copy {
        from: String,
        to: String,
        id: MailId,
    },
    Move {
        from: String,
        to: String,
        id: MailId,
    },
    Expunge {
        folder: String,
        id: MailId,
    },
    Create {
        folder: String,
    },
    Rename {
        from: String,
        to: String,
    },
    Delete {
        folder: String,
    },
    Subscribe {
        folder: String,
    },
    Unsubscribe {
        folder: String,
    },
}

#[derive(Debug, Clone, Copy)]
pub struct Ticket(u64);

/// Says whether an answer that has come counts: whether what it rests on was still there when
/// it was given. A mail server goes on answering over a dead mount for a while.
#[derive(Clone)]
pub struct Witness(pub Arc<dyn Fn() -> bool + Send + Sync>);

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Witness")
    }
}

#[derive(Debug, Default)]
pub struct Model {
    pub users: BTreeMap<String, User>,
    pub witness: Option<Witness>,
    /// Mails that servers said they have, and all other changes they said they made.
    pub acknowledged: (u64, u64),
    step: u64,
    pending: BTreeMap<u64, (String, Op)>,
    cut: bool,
}

impl Model {
    /// Each user has an INBOX from the beginning.
    pub fn new(users: &[String]) -> Model {
        let mut model = Model::default();
        for name in users {
            let user = model.users.entry(name.clone()).or_default();
            user.folders.insert("INBOX".into(), Folder::default());
        }
        model
    }

    pub fn user(&mut self, name: &str) -> &mut User {
        self.users.entry(name.to_owned()).or_default()
    }

    pub fn folder(&mut self, user: &str, folder: &str) -> &mut Folder {
        self.user(user).folders.entry(folder.to_owned()).or_default()
    }

    /// To be called before the operation is sent.
    pub fn begin(&mut self, user: &str, op: Op) -> Ticket {
        self.step += 1;
        self.pending.insert(self.step, (user.to_owned(), op));
        Ticket(self.step)
    }

    /// The server said OK; `uid`: of the new mail or copy, if it told.
    pub fn done(&mut self, ticket: Ticket, uid: Option<u32>) {
        if self.cut {
            return;
        }
        let sure = self.witness.as_ref().is_none_or(|witness| (witness.0)());
        self.step += 1;
        let step = self.step;
        // A mail server that said it has a mail has it, whenever it said so; the mail's UID and
        // flags it may have made up.
        match self.pending.get(&ticket.0) {
            Some((_, Op::Put { .. })) => self.acknowledged.0 += 1,
            Some(_) if sure => self.acknowledged.1 += 1,
            _ => return,
        }
        let Some((user, op)) = self.pending.remove(&ticket.0) else { return };
        match (sure, op) {
            (false, Op::Put { folder, id, hash, flags, date }) => {
                let bare = Op::Put { folder: folder.clone(), id: id.clone(), hash, flags, date };
                self.user(&user).apply(bare, None, ticket.0, u64::MAX);
                if let Some(mail) = self.folder(&user, &folder).mails.get_mut(&id) {
                    mail.loose = true;
                }
            }
            (_, op) => self.user(&user).apply(op, uid, ticket.0, step),
        }
    }

    /// A client was told that a UID stands for a mail.
    pub fn told(&mut self, user: &str, uid_validity: u32, uid: u32, id: &str) {
        self.user(user).told(uid_validity, uid, id);
    }

    /// From now on no answer counts, until [`Model::resolve`].
    pub fn cut(&mut self) {
        self.cut = true;
    }

    pub fn is_cut(&self) -> bool {
        self.cut
    }

    /// Whether everything that was begun was answered.
    pub fn all_answered(&self) -> bool {
        self.pending.is_empty()
    }

    /// Turns each unanswered operation into "either is right". Before a check.
    pub fn resolve(&mut self) {
        self.cut = false;
        let pending = std::mem::take(&mut self.pending);
        for (began, (user, op)) in pending.clone() {
            self.user(&user).allow(op, began);
        }
        // One that may have been expunged before it was moved need not be anywhere.
        for (user, op) in pending.into_values() {
            if let Op::Expunge { folder, id } = op {
                self.user(&user).either.retain(|(moved, from, _)| (moved, from) != (&id, &folder));
            }
        }
    }

    /// Everything so far is safe even from the loss of the machine.
    pub fn settled(&mut self) {
        for folder in self.users.values_mut().flat_map(|u| u.folders.values_mut()) {
            folder.left.clear();
            for mail in folder.mails.values_mut() {
                mail.fresh = false;
                mail.new = false;
                mail.origins.clear();
            }
        }
    }

    /// What was answered up to `limit` is safe even from the loss of the machine, except where new
    /// mails stand and what was said of them when they came.
    pub fn settled_until(&mut self, limit: Instant) {
        for folder in self.users.values_mut().flat_map(|u| u.folders.values_mut()) {
            folder.left.retain(|_, at| at.is_none_or(|at| at > limit));
            for mail in folder.mails.values_mut() {
                if !mail.new && mail.changed.is_some_and(|at| at <= limit) {
                    mail.fresh = false;
                    mail.origins.clear();
                }
            }
        }
    }

    /// Notes what the server chose: it must not change later.
    pub fn learn(&mut self, seen: &BTreeMap<String, super::check::Seen>) {
        for (name, seen) in seen {
            self.user(name).learn(seen);
        }
    }

    /// Takes what was seen for the truth, where a check has just passed it; the ledger and the
    /// highest UIDNEXT stay.
    pub fn adopt(&mut self, seen: &BTreeMap<String, super::check::Seen>) {
        self.step += 1;
        let step = self.step;
        for (name, seen) in seen {
            self.user(name).adopt(seen, step);
            self.user(name).learn(seen);
        }
    }
}

impl User {
    fn folder(&mut self, name: &str) -> &mut Folder {
        self.folders.entry(name.to_owned()).or_default()
    }

    fn place(&mut self, name: &str, id: MailId, mail: Mail) {
        let folder = self.folders.entry(name.to_owned()).or_default();
        if let Some(uid) = mail.uid {
            folder.uid_next = folder.uid_next.max(uid + 1);
            if let Some(validity) = folder.uid_validity {
                self.told(validity, uid, &id);
            }
        }
        self.folder(name).mails.insert(id, mail);
    }

    fn told(&mut self, uid_validity: u32, uid: u32, id: &str) {
        let owner = self.ledger.entry((uid_validity, uid)).or_insert_with(|| id.to_owned());
        if owner != id {
            self.clashes.push(format!("uid {uid} of {uid_validity} was {owner}, is {id}"));
        }
    }

    fn apply(&mut self, op: Op, uid: Option<u32>, began: u64, answered: u64) {
        match op {
            Op::Put { folder, id, hash, flags, date } => {
                let mail = Mail { hash, uid, flags, date, began, answered, ..Mail::default() };
                let changed = Some(Instant::now());
                self.place(&folder, id, Mail { fresh: true, new: true, changed, ..mail });
            }
            Op::Store { folder, id, how, flags } => {
                if let Some(mail) = self.folder(&folder).mails.get_mut(&id) {
                    mail.flags = changed(&mail.flags, how, &flags);
                    mail.fresh = true;
                    mail.changed = Some(Instant::now());
                }
            }
            Op::Copy { from, to, id } => self.copy(&from, &to, &id, uid, began, answered),
            Op::Move { from, to, id } => {
                self.copy(&from, &to, &id, uid, began, answered);
                self.expunge(&from, &id);
            }
            Op::Expunge { folder, id } => self.expunge(&folder, &id),
            Op::Create { folder } => {
                self.folder(&folder);
            }
            Op::Rename { from, to } => {
                let below = format!("{from}/");
                for (name, folder) in std::mem::take(&mut self.folders) {
                    let new = match name.strip_prefix(&below) {
                        Some(rest) => format!("{to}/{rest}"),
                        None if name == from => to.clone(),
                        None => name,
                    };
                    self.folders.insert(new, folder);
                }
            }
            Op::Delete { folder } => {
                self.folders.remove(&folder);
            }
            Op::Subscribe { folder } => {
                self.subscriptions.insert(folder);
            }
            Op::Unsubscribe { folder } => {
                self.subscriptions.remove(&folder);
            }
        }
    }

    fn copy(&mut self, from: &str, to: &str, id: &str, uid: Option<u32>, began: u64, now: u64) {
        let Some(source) = self.folder(from).mails.get(id) else { return };
        let mut mail = Mail { uid, fresh: true, began, answered: now, ..source.clone() };
        mail.changed = Some(Instant::now());
        mail.origins.insert(from.to_owned());
        self.place(to, id.to_owned(), mail);
    }

    fn expunge(&mut self, folder: &str, id: &str) {
        let folder = self.folder(folder);
        folder.mails.remove(id);
        folder.left.insert(id.to_owned(), Some(Instant::now()));
    }

    fn allow(&mut self, op: Op, began: u64) {
        match op {
            Op::Put { folder, id, hash, flags, date } => {
                let mail = Mail { hash, flags, date, began, answered: u64::MAX, ..Mail::default() };
                self.unanswered.insert(id.clone());
                let mail = Mail { maybe: true, fresh: true, ..mail };
                self.folder(&folder).mails.entry(id).or_insert(mail);
            }
            Op::Store { folder, id, how, flags } => {
                if let Some(mail) = self.folder(&folder).mails.get_mut(&id) {
                    let mut others: Vec<Flags> = mail.other_flags.clone();
                    others.push(mail.flags.clone());
                    mail.other_flags.extend(others.iter().map(|f| changed(f, how, &flags)));
                    mail.fresh = true;
                }
            }
            Op::Copy { from, to, id } => self.allow_copy(&from, &to, &id, began),
            Op::Move { from, to, id } => {
                self.allow_copy(&from, &to, &id, began);
                self.allow_expunge(&from, &id);
                self.either.push((id, from, to));
            }
            Op::Expunge { folder, id } => self.allow_expunge(&folder, &id),
            Op::Create { folder }
            | Op::Delete { folder }
            | Op::Subscribe { folder }
            | Op::Unsubscribe { folder } => {
                self.unsure.insert(folder);
            }
            Op::Rename { from, to } => {
                let below = format!("{from}/");
                let inside = self.folders.keys().filter_map(|n| n.strip_prefix(&below));
                let inside: Vec<String> = inside.map(str::to_owned).collect();
                for name in inside {
                    self.unsure.insert(format!("{below}{name}"));
                    self.unsure.insert(format!("{to}/{name}"));
                }
                self.unsure.extend([from, to]);
            }
        }
    }

    fn allow_copy(&mut self, from: &str, to: &str, id: &str, began: u64) {
        self.half_done.insert((to.to_owned(), id.to_owned()));
        let Some(source) = self.folder(from).mails.get(id).cloned() else { return };
        let copy =
            Mail { uid: None, maybe: true, fresh: true, began, answered: u64::MAX, ..source };
        self.folder(to).mails.entry(id.to_owned()).or_insert(copy);
    }

    fn allow_expunge(&mut self, folder: &str, id: &str) {
        self.half_done.insert((folder.to_owned(), id.to_owned()));
        if let Some(mail) = self.folder(folder).mails.get_mut(id) {
            mail.maybe = true;
            mail.fresh = true;
        }
    }

    fn learn(&mut self, seen: &super::check::Seen) {
        for (name, there) in &seen.folders {
            let Some(folder) = self.folders.get_mut(name) else { continue };
            folder.uid_validity.get_or_insert(there.uid_validity);
            folder.uid_next = folder.uid_next.max(there.uid_next);
            for mail in &there.mails {
                let Some(id) = &mail.id else { continue };
                self.ledger.entry((there.uid_validity, mail.uid)).or_insert_with(|| id.clone());
                if let Some(known) = folder.mails.get_mut(id) {
                    known.uid.get_or_insert(mail.uid);
                    known.date.get_or_insert(mail.date);
                }
            }
        }
    }

    /// All are there now, and come before those that are brought from now on; in which order
    /// they came does not matter any more.
    fn adopt(&mut self, seen: &super::check::Seen, step: u64) {
        let old = std::mem::take(&mut self.folders);
        for (name, there) in &seen.folders {
            let before = old.get(name);
            let uid_next = before.map_or(0, |f| f.uid_next);
            let mut folder = Folder { uid_next, ..Folder::default() };
            for mail in &there.mails {
                let Some(id) = &mail.id else { continue };
                let known = Mail {
                    hash: mail.hash.clone(),
                    flags: mail.flags.clone(),
                    began: step,
                    answered: step,
                    ..Mail::default()
                };
                folder.mails.insert(id.clone(), known);
            }
            self.folders.insert(name.clone(), folder);
        }
        self.subscriptions = seen.subscriptions.clone();
        self.unsure.clear();
        self.either.clear();
    }
}

fn changed(old: &Flags, how: &str, flags: &Flags) -> Flags {
    match how {
        "+" => old.union(flags).cloned().collect(),
        "-" => old.difference(flags).cloned().collect(),
        _ => flags.clone(),
    }
}
