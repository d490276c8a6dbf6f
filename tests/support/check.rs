//! Reads mailboxes over IMAP and compares them with the model.

use super::imap::{Fetched, Flags, Imap};
use super::messages::identify;
use super::model::{Folder, Mail, Model, User};
use super::{Failure, Outcome};
use std::collections::{BTreeMap, BTreeSet};

/// How a mail that nobody brought is told of.
pub const NO_MAIL: &str = "is no mail that was sent";

/// What kind of wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Lost,
    Resurrected,
    UidChanged,
    UidReused,
    UidNextWentBack,
    UidValidityChanged,
    Content,
    Duplicate,
    Flags,
    Date,
    Order,
    Subscriptions,
    FolderMissing,
    FolderExtra,
    CannotRead,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    pub kind: Kind,
    pub user: String,
    pub folder: String,
    pub detail: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {}/{} {}", self.kind, self.user, self.folder, self.detail)
    }
}

/// Which differences are forgiven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tolerance {
    Nothing,
    /// What a lost machine may undo: flag changes, arrivals' UIDs, expunges, copies and moves
    /// made since the model was last settled; never a mail, and never the meaning of a UID.
    LostMachine,
}

#[derive(Debug, Clone, Default)]
pub struct SeenMail {
    pub uid: u32,
    pub flags: Flags,
    pub date: i64,
    pub size: u64,
    pub length: u64,
    pub id: Option<String>,
    pub hash: String,
}

#[derive(Debug, Clone, Default)]
pub struct SeenFolder {
    pub uid_validity: u32,
    pub uid_next: u32,
    /// In the order of their sequence numbers.
    pub mails: Vec<SeenMail>,
}

/// What a user's mailboxes look like from outside.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub folders: BTreeMap<String, SeenFolder>,
    pub subscriptions: BTreeSet<String>,
    /// Folders that failed at the first try, and how.
    pub unreadable: Vec<(String, Failure)>,
}

/// Reads everything of the users at an IMAP port. A folder that cannot be read is tried once
/// more on a new connection, so that the rest of the report says something.
pub fn look(port: u16, users: &[String]) -> Outcome<BTreeMap<String, Seen>> {
    let mut all = BTreeMap::new();
    for user in users {
        all.insert(user.clone(), look_at_user(port, user)?);
    }
    Ok(all)
}

fn look_at_user(port: u16, user: &str) -> Outcome<Seen> {
    let mut imap = Imap::login(port, user)?;
    let mut seen = Seen { subscriptions: imap.lsub()?, ..Seen::default() };
    for name in imap.list()? {
        let folder = match look_at_folder(&mut imap, &name) {
            Ok(folder) => Some(folder),
            Err(failure) => {
                seen.unreadable.push((name.clone(), failure));
                imap = Imap::login(port, user)?;
                look_at_folder(&mut imap, &name).ok()
            }
        };
        match folder {
            Some(folder) => drop(seen.folders.insert(name, folder)),
            None => imap = Imap::login(port, user)?,
        }
    }
    imap.logout();
    Ok(seen)
}

fn look_at_folder(imap: &mut Imap, name: &str) -> Outcome<SeenFolder> {
    let selected = imap.select(name)?;
    let mails = if selected.exists == 0 { Vec::new() } else { imap.fetch_all()? };
    Ok(SeenFolder {
        uid_validity: selected.uid_validity,
        uid_next: selected.uid_next,
        mails: mails.into_iter().map(seen_mail).collect(),
    })
}

fn seen_mail(mail: Fetched) -> SeenMail {
    let (id, hash) = identify(&mail.body);
    let length = mail.body.len() as u64;
    SeenMail {
        uid: mail.uid,
        flags: mail.flags,
        date: mail.date,
        size: mail.size,
        length,
        id,
        hash,
    }
}

/// Compares; what the tolerance forgives is left out.
pub fn compare(model: &Model, seen: &BTreeMap<String, Seen>, tolerance: Tolerance) -> Vec<Problem> {
    let mut problems = Vec::new();
    let empty = Seen::default();
    for (name, user) in &model.users {
        let seen = seen.get(name).unwrap_or(&empty);
        let mut check = Check { name, user, seen, tolerance, folder: "", found: Vec::new() };
        check.user();
        problems.append(&mut check.found);
    }
    problems.sort();
    problems
}

struct Check<'a> {
    name: &'a str,
    user: &'a User,
    seen: &'a Seen,
    tolerance: Tolerance,
    folder: &'a str,
    found: Vec<Problem>,
}

impl<'a> Check<'a> {
    fn bad(&mut self, kind: Kind, detail: String) {
        let (user, folder) = (self.name.to_owned(), self.folder.to_owned());
        self.found.push(Problem { kind, user, folder, detail });
    }

    fn undone(&self, mail: &Mail) -> bool {
        self.tolerance == Tolerance::LostMachine && mail.fresh
    }

    fn user(&mut self) {
        let (user, seen) = (self.user, self.seen);
        for (name, failure) in &seen.unreadable {
            self.folder = name;
            self.bad(Kind::CannotRead, failure.to_string());
        }
        for name in seen.folders.keys().filter(|n| !user.unsure.contains(*n)) {
            self.folder = name;
            if !user.folders.contains_key(name) {
                self.bad(Kind::FolderExtra, "is listed, and should not be".into());
            }
        }
        for (name, folder) in &user.folders {
            self.folder = name;
            match seen.folders.get(name) {
                Some(there) => self.folder(folder, there),
                None if user.unsure.contains(name) => {}
                None if seen.unreadable.iter().any(|(n, _)| n == name) => {}
                None => self.bad(Kind::FolderMissing, "cannot be selected".into()),
            }
        }
        self.folder = "*";
        let differing = seen.subscriptions.symmetric_difference(&user.subscriptions);
        let differing: Vec<&String> = differing.filter(|n| !user.unsure.contains(*n)).collect();
        if !differing.is_empty() {
            self.bad(Kind::Subscriptions, format!("differ in {differing:?}"));
        }
        for clash in &user.clashes {
            self.bad(Kind::UidReused, clash.clone());
        }
        for (id, from, to) in &user.either {
            if !self.is_in(id, from) && !self.is_in(id, to) {
                self.folder = from;
                self.bad(Kind::Lost, format!("{id}: neither here nor in {to} after a cut MOVE"));
            }
        }
    }

    fn is_in(&self, id: &str, folder: &str) -> bool {
        let there = self.seen.folders.get(folder);
        there.is_some_and(|f| f.mails.iter().any(|m| m.id.as_deref() == Some(id)))
    }

    fn folder(&mut self, folder: &Folder, there: &SeenFolder) {
        let unsure = self.user.unsure.contains(self.folder);
        let same_validity = folder.uid_validity.is_none_or(|v| v == there.uid_validity);
        if !same_validity && !unsure {
            let (was, is) = (folder.uid_validity.unwrap_or(0), there.uid_validity);
            self.bad(Kind::UidValidityChanged, format!("was {was}, is {is}"));
        }
        if same_validity && there.uid_next < folder.uid_next {
            let (was, is) = (folder.uid_next, there.uid_next);
            self.bad(Kind::UidNextWentBack, format!("was {was}, is {is}"));
        }
        let mut found = BTreeMap::new();
        for mail in &there.mails {
            self.mail(folder, there, mail, same_validity, unsure, &mut found);
        }
        for (id, mail) in &folder.mails {
            if !found.contains_key(id) && !mail.maybe && !unsure && !self.copy_undone(id, mail) {
                self.bad(Kind::Lost, format!("{id}, uid {:?}", mail.uid));
            }
        }
        self.order(folder, there);
    }

    fn copy_undone(&self, id: &str, mail: &Mail) -> bool {
        self.undone(mail) && mail.origins.iter().any(|origin| self.is_in(id, origin))
    }

    fn mail(
        &mut self,
        folder: &Folder,
        there: &SeenFolder,
        mail: &SeenMail,
        same_validity: bool,
        unsure: bool,
        found: &mut BTreeMap<String, u32>,
    ) {
        let uid = mail.uid;
        let Some(id) = mail.id.clone() else {
            let (size, length) = (mail.size, mail.length);
            let text = format!("uid {uid}, {length} of {size} bytes, {NO_MAIL}");
            return self.bad(Kind::Content, text);
        };
        if mail.size != mail.length {
            let (size, length) = (mail.size, mail.length);
            self.bad(Kind::Content, format!("{id}: RFC822.SIZE {size}, body {length}"));
        }
        if let Some(first) = found.insert(id.clone(), uid) {
            return self.bad(Kind::Duplicate, format!("{id}: uid {first} and uid {uid}"));
        }
        let owner = self.user.ledger.get(&(there.uid_validity, uid));
        if let Some(owner) = owner.filter(|owner| **owner != id) {
            self.bad(Kind::UidReused, format!("uid {uid} was {owner}, is {id}"));
        }
        let Some(known) = folder.mails.get(&id) else {
            let undone = self.tolerance == Tolerance::LostMachine && folder.left.contains_key(&id);
            let half = self.user.unanswered.contains(&id)
                || self.user.half_done.contains(&(self.folder.to_owned(), id.clone()));
            if !undone && !unsure && !half {
                self.bad(Kind::Resurrected, format!("{id}, uid {uid}, should not be here"));
            }
            return;
        };
        // A file that a forked child closed half-written is put into the store as it is: nobody
        // can know whether more was to come. Nobody was told that it is delivered, either.
        let half = known.maybe && self.tolerance == Tolerance::LostMachine;
        if mail.hash != known.hash && !half {
            self.bad(Kind::Content, format!("{id}, uid {uid}: {} bytes, changed", mail.length));
        }
        if let Some(was) = known.uid.filter(|was| *was != uid && same_validity)
            && !self.undone(known)
        {
            self.bad(Kind::UidChanged, format!("{id}: was {was}, is {uid}"));
        }
        let allowed = known.maybe
            || known.loose
            || known.flags == mail.flags
            || known.other_flags.contains(&mail.flags);
        if !allowed && !self.undone(known) {
            let (want, have) = (&known.flags, &mail.flags);
            self.bad(Kind::Flags, format!("{id}, uid {uid}: want {want:?}, have {have:?}"));
        }
        if let Some(date) = known.date.filter(|date| *date != mail.date) {
            self.bad(Kind::Date, format!("{id}, uid {uid}: want {date}, have {}", mail.date));
        }
    }

    /// UIDs rise with the sequence numbers, and a mail that was answered for before another was
    /// begun has the smaller UID. A recovered mail gets its UID in whatever order it is found.
    fn order(&mut self, folder: &Folder, there: &SeenFolder) {
        if let Some(pair) = there.mails.windows(2).find(|p| p[0].uid >= p[1].uid) {
            self.bad(Kind::Order, format!("uid {} comes before {}", pair[0].uid, pair[1].uid));
        }
        let mut latest: Option<(u64, &String)> = None;
        for mail in &there.mails {
            let known = mail.id.as_ref().and_then(|id| Some((id, folder.mails.get(id)?)));
            let Some((id, known)) = known.filter(|(_, k)| !self.undone(k)) else { continue };
            if let Some((began, other)) = latest.filter(|(began, _)| known.answered < *began) {
                let text = format!("{id} was there before {other} was begun (step {began})");
                self.bad(Kind::Order, text);
            }
            if latest.is_none_or(|(began, _)| known.began > began) {
                latest = Some((known.began, id));
            }
        }
    }
}
