//! A mail server on a mount that behaves like Dovecot where it matters: with Maildir its uidlist
//! and index log, their locks, COPY and MOVE by hard link, flags by rename, folders made and
//! renamed in two places; and deliveries as Dovecot's LMTP, Postfix and a shell do them. What it
//! does with sdbox is in `sdbox`.

use super::maillog;
use super::model::{Item, MailNo, is_mail};
use super::mount::{Answer, Mount};
use super::uidlist::UidList;
use super::world::Core;
use super::wrong::Kind;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What clients were told, for ever.
#[derive(Debug, Default)]
pub struct Told {
    /// (UIDVALIDITY, UID) names this mail.
    mails: BTreeMap<(u32, u32), MailNo>,
    /// UIDVALIDITYs that folders had.
    pub validities: BTreeSet<u32>,
}

/// Locks that the kernel holds for the processes of a life: they die with it.
#[derive(Debug, Default)]
pub struct Locks(Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Locks {
    pub async fn lock(&self, path: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = self.0.lock().entry(path.to_string()).or_default().clone();
        lock.lock_owned().await
    }
}

/// How mails are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Maildir,
    Sdbox,
}

#[derive(Debug, Clone)]
pub struct Server {
    pub mount: Mount,
    pub locks: Arc<Locks>,
    pub user: String,
    pub format: Format,
    /// Maildir: whether it has index files (`INDEX=MEMORY` has none). sdbox: whether they have a
    /// directory of their own, or lie with the mails.
    pub index: bool,
}

/// A mail's name without its flags.
pub fn base(name: &str) -> &str {
    name.split(':').next().unwrap_or(name)
}

/// A folder as a client sees it: UID and file name.
#[derive(Debug, Default)]
pub struct View {
    pub validity: u32,
    pub mails: BTreeMap<u32, String>,
}

impl Server {
    pub(super) fn core(&self) -> &Core {
        &self.mount.life.core
    }

    pub fn mail_dir(&self, folder: &str) -> String {
        match (self.format, folder) {
            (Format::Maildir, "INBOX") => format!("{}/mail", self.user),
            (Format::Maildir, folder) => format!("{}/mail/.{folder}", self.user),
            (Format::Sdbox, _) => format!("{}/dbox-Mails", self.box_dir(folder)),
        }
    }

    /// sdbox: what holds the directory of a folder's mails.
    pub fn box_dir(&self, folder: &str) -> String {
        format!("{}/mail/mailboxes/{folder}", self.user)
    }

    pub fn index_dir(&self, folder: &str) -> String {
        match self.format {
            Format::Maildir => format!("{}/index/.{folder}", self.user),
            Format::Sdbox if self.index => format!("{}/index/mailboxes/{folder}", self.user),
            Format::Sdbox => self.mail_dir(folder),
        }
    }

    /// Where a mail that a client sees lies.
    pub fn mail_path(&self, folder: &str, name: &str) -> String {
        match self.format {
            Format::Maildir => format!("{}/cur/{name}", self.mail_dir(folder)),
            Format::Sdbox => format!("{}/{name}", self.mail_dir(folder)),
        }
    }

    /// The lock file beside a uidlist, which only says something to processes of this life.
    pub(super) async fn lock_uidlist(&self, dir: &str) -> Answer<tokio::sync::OwnedMutexGuard<()>> {
        let held = self.locks.lock(dir).await;
        let path = format!("{dir}/dovecot-uidlist.lock");
        if self.mount.find(&path).await?.is_some() {
            self.mount.unlink(&path).await?;
        }
        let file = self.mount.make(&path, None).await?;
        self.mount.close(&file).await?;
        Ok(held)
    }

    pub(super) async fn unlock_uidlist(&self, dir: &str) -> Answer<()> {
        self.mount.unlink(&format!("{dir}/dovecot-uidlist.lock")).await
    }

    pub(super) async fn read_list(&self, dir: &str) -> Answer<Option<UidList>> {
        let path = format!("{dir}/dovecot-uidlist");
        if self.mount.find(&path).await?.is_none() {
            return Ok(None);
        }
        let content = self.mount.read_all(&path).await?;
        let list = UidList::parse(&content);
        if list.is_none() {
            self.core()
                .log(&format!("{path} cannot be read: {:?}", String::from_utf8_lossy(&content)));
        }
        Ok(list)
    }

    pub(super) async fn read_index(&self, folder: &str) -> Answer<Option<maillog::State>> {
        if !self.index {
            return Ok(None);
        }
        let path = format!("{}/dovecot.index.log", self.index_dir(folder));
        if self.mount.find(&path).await?.is_none() {
            return Ok(None);
        }
        let content = self.mount.read_all(&path).await?;
        let state = maillog::read(&content);
        if state.is_none() {
            self.core().log(&format!("{path} cannot be read"));
        }
        Ok(state)
    }

    pub(super) async fn append_index(
        &self,
        folder: &str,
        records: &[u8],
        sync: bool,
    ) -> Answer<()> {
        if !self.index || records.is_empty() {
            return Ok(());
        }
        let path = format!("{}/dovecot.index.log", self.index_dir(folder));
        match self.mount.append(&path, records, sync).await {
            // It goes on with indexes in memory, and so does not tell.
            Err(libc::ENOSPC) => Ok(()),
            other => other,
        }
    }

    pub(super) async fn new_index(&self, folder: &str, validity: u32, next: u32) -> Answer<()> {
        let dir = self.index_dir(folder);
        self.ensure_dir(&dir).await?;
        let path = format!("{dir}/dovecot.index.log");
        let content = maillog::new_log(validity, next);
        let lock = format!("{path}.newlock");
        if self.mount.find(&lock).await?.is_some() {
            self.mount.unlink(&lock).await?;
        }
        let file = self.mount.make(&lock, None).await?;
        self.mount.write(&file, 0, &content).await?;
        self.mount.close(&file).await?;
        self.mount.rename(&lock, &path).await
    }

    /// The uidlist, made anew if it is not there; under its lock.
    pub(super) async fn uidlist(&self, folder: &str) -> Answer<UidList> {
        let dir = self.mail_dir(folder);
        let index = self.read_index(folder).await?;
        let list = match self.read_list(&dir).await? {
            Some(mut list) => {
                if let Some(index) = &index
                    && index.validity == list.validity
                {
                    list.next = list.next.max(index.next);
                }
                if list.torn {
                    self.rewrite_list(&dir, &list).await?;
                }
                list
            }
            None => {
                let (validity, next) = match &index {
                    Some(index) if index.validity > 0 => (index.validity, index.next),
                    _ => (self.new_validity().await?, 1),
                };
                let guid = format!("{:032x}", self.core().chance.below(u64::MAX));
                let list = UidList { validity, next, guid, ..UidList::default() };
                self.rewrite_list(&dir, &list).await?;
                list
            }
        };
        if self.index && index.is_none_or(|i| i.torn || i.validity != list.validity) {
            self.new_index(folder, list.validity, list.next).await?;
        }
        self.core().told.lock().validities.insert(list.validity);
        Ok(list)
    }

    pub(super) async fn rewrite_list(&self, dir: &str, list: &UidList) -> Answer<()> {
        let path = format!("{dir}/dovecot-uidlist");
        self.mount.replace(&path, &format!("{path}.tmp"), &list.write()).await
    }

    /// Gives UIDs to base names and says so in the uidlist.
    pub(super) async fn give_uids(
        &self,
        folder: &str,
        list: &mut UidList,
        names: &[String],
        sync: bool,
    ) -> Answer<Vec<u32>> {
        let dir = self.mail_dir(folder);
        let mut lines = String::new();
        let mut uids = Vec::new();
        for name in names {
            let uid = list.next;
            list.next += 1;
            list.mails.insert(uid, name.clone());
            lines.push_str(&format!("{uid} :{name}\n"));
            uids.push(uid);
        }
        if !uids.is_empty() {
            let path = format!("{dir}/dovecot-uidlist");
            self.mount.append(&path, lines.as_bytes(), sync).await?;
        }
        Ok(uids)
    }

    /// What a client hears: these UIDs are these mails.
    pub(super) fn tell(&self, folder: &str, view: &View) {
        let model = self.core().model.lock();
        let mut wrong = Vec::new();
        {
            let mut told = self.core().told.lock();
            for (uid, name) in &view.mails {
                let path = self.mail_path(folder, name);
                let Some(Item::Mail(mail)) = model.find(&path) else { continue };
                let before = *told.mails.entry((view.validity, *uid)).or_insert(*mail);
                if before != *mail {
                    wrong.push(format!(
                        "{folder}: UID {uid} of UIDVALIDITY {} was mail {before} and is mail {mail} (I2)",
                        view.validity
                    ));
                }
            }
        }
        drop(model);
        wrong.into_iter().for_each(|what| self.core().fail(Kind::UidTwice, what));
    }

    /// SELECT. Maildir: everything in `new/` goes to `cur/`, everything without a UID gets one.
    pub async fn select(&self, folder: &str) -> Answer<View> {
        let dir = self.mail_dir(folder);
        if self.mount.find(&dir).await?.is_none() {
            return Err(libc::ENOENT);
        }
        self.ensure_folder(folder).await?;
        if self.format == Format::Sdbox {
            return self.select_sdbox(folder).await;
        }
        let held = self.lock_uidlist(&dir).await?;
        let done = self.select_locked(folder).await;
        let unlocked = self.unlock_uidlist(&dir).await;
        drop(held);
        unlocked.and(done)
    }

    pub(super) async fn select_locked(&self, folder: &str) -> Answer<View> {
        let dir = self.mail_dir(folder);
        let mut list = self.uidlist(folder).await?;
        for (name, _) in self.mount.list(&format!("{dir}/new")).await? {
            let path = format!("{dir}/new/{name}");
            if self.core().model.lock().find(&path).is_none() {
                let body = self.mount.read_all(&path).await?;
                let now = self.core().time.now();
                let adopted = self.core().model.lock().adopted(&path, &body, now);
                adopted.unwrap_or_else(|what| self.core().fail(Kind::MailWrong, what));
            }
            let to = format!("{dir}/cur/{}:2,", base(&name));
            if self.mount.find(&to).await?.is_none() {
                match self.mount.rename(&format!("{dir}/new/{name}"), &to).await {
                    Ok(()) | Err(libc::ENOENT) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        let mut files: BTreeMap<String, String> = BTreeMap::new();
        for (name, _) in self.mount.list(&format!("{dir}/cur")).await? {
            let twice = files.insert(base(&name).to_string(), name.clone());
            if let Some(other) = twice {
                self.core()
                    .fail(Kind::MailDoubled, format!("{dir}/cur has both {other} and {name}"));
            }
        }
        let gone: Vec<u32> = list
            .mails
            .iter()
            .filter(|(_, name)| !files.contains_key(*name))
            .map(|(uid, _)| *uid)
            .collect();
        list.mails.retain(|_, name| files.contains_key(name));
        let known: BTreeSet<&String> = list.mails.values().collect();
        let new: Vec<String> = files.keys().filter(|n| !known.contains(n)).cloned().collect();
        let uids = self.give_uids(folder, &mut list, &new, false).await?;
        let mut records = maillog::append(&uids);
        records.extend(maillog::expunge(&gone, true));
        self.append_index(folder, &records, false).await?;
        if gone.len() > 3 || self.core().chance.once_in(8) {
            self.rewrite_list(&dir, &list).await?;
        }
        let mails = list
            .mails
            .iter()
            .filter_map(|(uid, name)| Some((*uid, files.get(name)?.clone())))
            .collect();
        let view = View { validity: list.validity, mails };
        self.tell(folder, &view);
        Ok(view)
    }

    /// STORE: a record that asks, a rename, a record that says it is done.
    pub async fn store_flags(&self, folder: &str) -> Answer<()> {
        let view = self.select(folder).await?;
        let Some((uid, name)) = self.some_mail(&view) else { return Ok(()) };
        let letters = ["", "S", "F", "FS", "RS", "DS"];
        let flags = letters[self.core().chance.index(letters.len())];
        if self.format == Format::Sdbox {
            return self.store_flags_sdbox(folder, uid, flags).await;
        }
        let dir = self.mail_dir(folder);
        let held = self.locks.lock(&dir).await;
        self.append_index(folder, &maillog::flags(uid, flags, false), false).await?;
        let to = format!("{dir}/cur/{}:2,{flags}", base(&name));
        let done = match self.mount.rename(&format!("{dir}/cur/{name}"), &to).await {
            Err(libc::ENOENT) => Ok(()),
            other => other,
        };
        let logged = self.append_index(folder, &maillog::flags(uid, flags, true), false).await;
        drop(held);
        done.and(logged)
    }

    pub(super) fn some_mail(&self, view: &View) -> Option<(u32, String)> {
        let all: Vec<_> = view.mails.iter().collect();
        self.core().chance.pick(&all).map(|(uid, name)| (**uid, (*name).clone()))
    }

    /// EXPUNGE of one mail: a record that asks, unlink, a record that says it is done.
    pub async fn expunge(&self, folder: &str) -> Answer<()> {
        let view = self.select(folder).await?;
        let Some((uid, name)) = self.some_mail(&view) else { return Ok(()) };
        self.remove(folder, uid, &name).await
    }

    pub(super) async fn remove(&self, folder: &str, uid: u32, name: &str) -> Answer<()> {
        if self.format == Format::Sdbox {
            return self.remove_sdbox(folder, uid).await;
        }
        let dir = self.mail_dir(folder);
        let held = self.locks.lock(&dir).await;
        self.append_index(folder, &maillog::expunge(&[uid], false), false).await?;
        let done = match self.mount.unlink(&format!("{dir}/cur/{name}")).await {
            Err(libc::ENOENT) => Ok(()),
            other => other,
        };
        let logged = self.append_index(folder, &maillog::expunge(&[uid], true), false).await;
        drop(held);
        done.and(logged)
    }

    /// COPY, and MOVE, which removes the first: `link` to the other's `tmp/`, `rename` to `cur/`.
    pub async fn copy(&self, from: &str, to: &str, remove: bool) -> Answer<()> {
        let view = self.select(from).await?;
        let Some((uid, name)) = self.some_mail(&view) else { return Ok(()) };
        if self.core().model.lock().dir(&self.mail_dir(to)).is_none() {
            self.ensure_folder(to).await?;
        }
        if self.format == Format::Sdbox {
            let copied = self.copy_sdbox(from, to, uid).await?;
            return if copied && remove { self.remove_sdbox(from, uid).await } else { Ok(()) };
        }
        let (a, b) = (self.mail_dir(from), self.mail_dir(to));
        let new = format!("{},S=1", self.new_name());
        let tmp = format!("{b}/tmp/{new}");
        match self.mount.link(&format!("{a}/cur/{name}"), &tmp).await {
            Err(libc::ENOENT) => return Ok(()),
            other => other?,
        }
        let held = self.lock_uidlist(&b).await?;
        let locked = async {
            let mut list = self.uidlist(to).await?;
            let flags = name.split(":2,").nth(1).unwrap_or_default();
            let there = format!("{new}:2,{flags}");
            self.mount.rename(&tmp, &format!("{b}/cur/{there}")).await?;
            self.mount.fsync_dir(&format!("{b}/cur")).await?;
            let uids = self.give_uids(to, &mut list, &[new], true).await?;
            self.append_index(to, &maillog::append(&uids), false).await?;
            // COPYUID.
            let mails = uids.iter().map(|uid| (*uid, there.clone())).collect();
            self.tell(to, &View { validity: list.validity, mails });
            Ok(())
        };
        let done = locked.await;
        let unlocked = self.unlock_uidlist(&b).await;
        drop(held);
        done.and(unlocked)?;
        if remove { self.remove(from, uid, &name).await } else { Ok(()) }
    }

    /// Next-UID is raised by a person (`doveadm mailbox update --min-next-uid`).
    pub async fn raise_next_uid(&self, folder: &str) -> Answer<()> {
        let by = self.core().chance.between(1, 2500) as u32;
        if self.format == Format::Sdbox {
            return self.raise_sdbox(folder, by).await;
        }
        let dir = self.mail_dir(folder);
        let held = self.lock_uidlist(&dir).await?;
        let locked = async {
            let mut list = self.uidlist(folder).await?;
            list.next += by;
            self.rewrite_list(&dir, &list).await?;
            self.append_index(folder, &maillog::raise(list.next), false).await
        };
        let done = locked.await;
        let unlocked = self.unlock_uidlist(&dir).await;
        drop(held);
        done.and(unlocked)
    }

    /// FETCH of a body.
    pub async fn fetch(&self, folder: &str) -> Answer<()> {
        let view = self.select(folder).await?;
        let Some((_, name)) = self.some_mail(&view) else { return Ok(()) };
        let path = self.mail_path(folder, &name);
        let want = match self.core().model.lock().find(&path) {
            Some(Item::Mail(mail)) => Some(*mail),
            _ => None,
        };
        let body = match self.mount.read_all(&path).await {
            Err(libc::ENOENT) => return Ok(()),
            other => other?,
        };
        debug_assert!(is_mail(&path));
        if want.is_some() && self.core().model.lock().mail_of(&body) != want {
            self.core().fail(Kind::MailWrong, format!("{path} is read as something else"));
        }
        Ok(())
    }
}
