//! A mail server on a mount that behaves like Dovecot with Maildir where it matters: its
//! uidlist and index log, their locks, COPY and MOVE by hard link, flags by rename, folders made
//! and renamed in two places; and deliveries as Dovecot's LMTP, Postfix and a shell do them.

use super::maillog;
use super::model::{Item, MailNo, is_mail};
use super::mount::{Answer, Mount};
use super::world::Core;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vmailfs::dovecot::uidvalidity;
use vmailfs::fs::api::FileKind;

/// What clients were told, for ever.
#[derive(Debug, Default)]
pub struct Told {
    /// (UIDVALIDITY, UID) names this mail.
    mails: BTreeMap<(u32, u32), MailNo>,
    /// UIDVALIDITYs that folders had.
    validities: BTreeSet<u32>,
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

#[derive(Debug, Clone)]
pub struct Server {
    pub mount: Mount,
    pub locks: Arc<Locks>,
    pub user: String,
    /// Whether it has index files (`INDEX=MEMORY` has none).
    pub index: bool,
}

/// `dovecot-uidlist`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UidList {
    pub validity: u32,
    pub next: u32,
    pub guid: String,
    pub mails: BTreeMap<u32, String>,
    /// It ends in a line that was not written whole.
    torn: bool,
}

impl UidList {
    fn parse(content: &[u8]) -> Option<UidList> {
        let text = String::from_utf8_lossy(content);
        let mut lines = text.split_inclusive('\n').filter_map(|l| l.strip_suffix('\n'));
        let mut list = UidList::default();
        let mut fields = lines.next()?.split(' ');
        if fields.next() != Some("3") {
            return None;
        }
        for field in fields {
            match field.split_at_checked(1)? {
                ("V", v) => list.validity = v.parse().ok()?,
                ("N", n) => list.next = n.parse().ok()?,
                ("G", guid) => list.guid = guid.to_string(),
                _ => {}
            }
        }
        for line in lines {
            let (uid, name) = line.split_once(" :")?;
            list.mails.insert(uid.parse().ok()?, name.to_string());
        }
        let last = list.mails.keys().next_back().copied().unwrap_or(0);
        list.next = list.next.max(last + 1);
        list.torn = !text.ends_with('\n');
        (list.validity > 0).then_some(list)
    }

    fn write(&self) -> Vec<u8> {
        let mut out = format!("3 V{} N{} G{}\n", self.validity, self.next, self.guid);
        for (uid, name) in &self.mails {
            out.push_str(&format!("{uid} :{name}\n"));
        }
        out.into_bytes()
    }
}

/// A mail's name without its flags.
pub fn base(name: &str) -> &str {
    name.split(':').next().unwrap_or(name)
}

/// A folder as a client sees it: UID and file name in `cur/`.
#[derive(Debug, Default)]
pub struct View {
    pub validity: u32,
    pub mails: BTreeMap<u32, String>,
}

impl Server {
    fn core(&self) -> &Core {
        &self.mount.life.core
    }

    pub fn mail_dir(&self, folder: &str) -> String {
        match folder {
            "INBOX" => format!("{}/mail", self.user),
            folder => format!("{}/mail/.{folder}", self.user),
        }
    }

    pub fn index_dir(&self, folder: &str) -> String {
        format!("{}/index/.{folder}", self.user)
    }

    async fn ensure_dir(&self, path: &str) -> Answer<()> {
        if self.mount.find(path).await?.is_some() {
            let mut model = self.core().model.lock();
            if model.find(path).is_none()
                && let Some(key) = model.key(path)
            {
                // Made anew for a mail that arrived late.
                let dir = model.new_dir();
                model.apply(vec![(key, Some(dir))], self.core().time.now());
            }
            return Ok(());
        }
        match self.mount.mkdir(path).await {
            Err(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// The user's directories and INBOX, as at a first login.
    pub async fn login(&self) -> Answer<()> {
        let user = &self.user;
        for dir in [user.clone(), format!("{user}/mail"), format!("{user}/index")] {
            self.ensure_dir(&dir).await?;
        }
        self.ensure_folder("INBOX").await
    }

    async fn ensure_folder(&self, folder: &str) -> Answer<()> {
        let dir = self.mail_dir(folder);
        for dir in [dir.clone(), format!("{dir}/cur"), format!("{dir}/new"), format!("{dir}/tmp")] {
            self.ensure_dir(&dir).await?;
        }
        if self.index {
            self.ensure_dir(&self.index_dir(folder)).await?;
        }
        Ok(())
    }

    pub async fn folders(&self) -> Answer<Vec<String>> {
        let all = self.mount.list(&format!("{}/mail", self.user)).await?;
        let mut folders: Vec<String> = all
            .into_iter()
            .filter(|(_, kind)| *kind == FileKind::Directory)
            .filter_map(|(name, _)| name.strip_prefix('.').map(str::to_string))
            .filter(|name| !name.starts_with('.'))
            .collect();
        folders.push("INBOX".into());
        folders.sort();
        Ok(folders)
    }

    /// The lock file beside a uidlist, which only says something to processes of this life.
    async fn lock_uidlist(&self, dir: &str) -> Answer<tokio::sync::OwnedMutexGuard<()>> {
        let held = self.locks.lock(dir).await;
        let path = format!("{dir}/dovecot-uidlist.lock");
        if self.mount.find(&path).await?.is_some() {
            self.mount.unlink(&path).await?;
        }
        let file = self.mount.make(&path, None).await?;
        self.mount.close(&file).await?;
        Ok(held)
    }

    async fn unlock_uidlist(&self, dir: &str) -> Answer<()> {
        self.mount.unlink(&format!("{dir}/dovecot-uidlist.lock")).await
    }

    /// A UIDVALIDITY that no folder had.
    async fn new_validity(&self) -> Answer<u32> {
        let dir = format!("{}/mail", self.user);
        let _held = self.locks.lock("uidvalidity").await;
        let there = self.mount.list(&dir).await?;
        let now = there.iter().filter_map(|(n, _)| uidvalidity::parse(n.as_bytes())).max();
        let value = match now {
            Some(now) => {
                let new = format!("{dir}/{}", uidvalidity::format(now + 1));
                self.mount.rename(&format!("{dir}/{}", uidvalidity::format(now)), &new).await?;
                now + 1
            }
            None => {
                let now = super::clock::START as u64 + self.core().time.now().as_secs();
                let value = u32::try_from(now).unwrap();
                let path = format!("{dir}/{}", uidvalidity::format(value));
                let file = self.mount.make(&path, None).await?;
                self.mount.close(&file).await?;
                value
            }
        };
        if self.core().told.lock().validities.contains(&value) {
            self.core().fail(format!("UIDVALIDITY {value} is given to a second folder (I2)"));
        }
        Ok(value)
    }

    async fn read_list(&self, dir: &str) -> Answer<Option<UidList>> {
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

    async fn read_index(&self, folder: &str) -> Answer<Option<maillog::State>> {
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

    async fn append_index(&self, folder: &str, records: &[u8], sync: bool) -> Answer<()> {
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

    async fn new_index(&self, folder: &str, validity: u32, next: u32) -> Answer<()> {
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
    async fn uidlist(&self, folder: &str) -> Answer<UidList> {
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

    async fn rewrite_list(&self, dir: &str, list: &UidList) -> Answer<()> {
        let path = format!("{dir}/dovecot-uidlist");
        self.mount.replace(&path, &format!("{path}.tmp"), &list.write()).await
    }

    /// Gives UIDs to base names and says so in the uidlist.
    async fn give_uids(
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
    fn tell(&self, folder: &str, view: &View) {
        let dir = self.mail_dir(folder);
        let model = self.core().model.lock();
        let mut wrong = Vec::new();
        {
            let mut told = self.core().told.lock();
            for (uid, name) in &view.mails {
                let path = format!("{dir}/cur/{name}");
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
        wrong.into_iter().for_each(|what| self.core().fail(what));
    }

    /// SELECT: everything in `new/` goes to `cur/`, everything without a UID gets one.
    pub async fn select(&self, folder: &str) -> Answer<View> {
        let dir = self.mail_dir(folder);
        if self.mount.find(&dir).await?.is_none() {
            return Err(libc::ENOENT);
        }
        self.ensure_folder(folder).await?;
        let held = self.lock_uidlist(&dir).await?;
        let done = self.select_locked(folder).await;
        let unlocked = self.unlock_uidlist(&dir).await;
        drop(held);
        unlocked.and(done)
    }

    async fn select_locked(&self, folder: &str) -> Answer<View> {
        let dir = self.mail_dir(folder);
        let mut list = self.uidlist(folder).await?;
        for (name, _) in self.mount.list(&format!("{dir}/new")).await? {
            let path = format!("{dir}/new/{name}");
            if self.core().model.lock().find(&path).is_none() {
                let body = self.mount.read_all(&path).await?;
                let now = self.core().time.now();
                let adopted = self.core().model.lock().adopted(&path, &body, now);
                adopted.unwrap_or_else(|what| self.core().fail(what));
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
                self.core().fail(format!("{dir}/cur has both {other} and {name}"));
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

    fn new_name(&self) -> String {
        let now = self.core().time.tick();
        let secs = super::clock::START as u64 + now.as_secs();
        format!("{secs}.M{}P{}.sim", now.subsec_micros(), self.mount.life.serial())
    }

    fn new_mail(&self) -> (MailNo, Vec<u8>) {
        let chance = &self.core().chance;
        let mut model = self.core().model.lock();
        let no = model.mails.len() + 1;
        let lines = 1 + chance.below(if chance.once_in(20) { 400 } else { 6 });
        let body = format!("Subject: {no}\n\n{}", "some text\n".repeat(lines as usize));
        (model.new_mail(body.as_bytes()), body.into_bytes())
    }

    async fn write_mail(&self, path: &str, no: MailNo, body: &[u8], sync: bool) -> Answer<()> {
        let name = path.rsplit('/').next().unwrap_or(path).to_string();
        if let Some(info) = self.core().model.lock().mails.get_mut(&no) {
            info.name = Some(name);
        }
        let file = self.mount.make(path, Some(no)).await?;
        let written = async {
            let mut at = 0;
            while at < body.len() {
                let end = (at + 1 + self.core().chance.index(2000)).min(body.len());
                self.mount.write(&file, at as u64, &body[at..end]).await?;
                at = end;
            }
            if sync { self.mount.fsync(&file).await } else { Ok(()) }
        };
        let written = written.await;
        let closed = self.mount.close(&file).await;
        written.and(closed)
    }

    /// Delivers a mail. An error is one that the sender's server makes of it, and must be one
    /// that it defers on (I4).
    pub async fn deliver(&self, folder: &str) -> Answer<()> {
        let tmp = format!("{}/tmp", self.mail_dir(folder));
        if self.core().model.lock().dir(&tmp).is_none() {
            self.ensure_folder(folder).await?;
        }
        let (no, body) = self.new_mail();
        let how = self.core().chance.below(4);
        let done = match how {
            0 => self.deliver_postfix(folder, no, &body).await,
            1 => self.deliver_plain(folder, no, &body).await,
            _ => self.deliver_lmtp(folder, no, &body).await,
        };
        match done {
            Ok(()) => self.mount.life.log(&format!("mail {no} delivered to {folder}")),
            Err(errno @ (libc::EIO | libc::EDQUOT | libc::EFBIG | libc::EROFS)) => {
                self.core().fail(format!("a delivery to {folder} is bounced: errno {errno} (I4)"));
            }
            Err(errno) => self.mount.life.log(&format!("mail {no} deferred: {errno}")),
        }
        done
    }

    async fn abandon(&self, path: &str) {
        if let Ok(Some(_)) = self.mount.find(path).await {
            let _ = self.mount.unlink(path).await;
        }
    }

    /// `tmp/`, fsync, rename to `new/`, uidlist, index.
    async fn deliver_lmtp(&self, folder: &str, no: MailNo, body: &[u8]) -> Answer<()> {
        let dir = self.mail_dir(folder);
        let name = self.new_name();
        let tmp = format!("{dir}/tmp/{name}");
        if let Err(errno) = self.write_mail(&tmp, no, body, true).await {
            self.abandon(&tmp).await;
            return Err(errno);
        }
        let held = self.lock_uidlist(&dir).await?;
        let locked = async {
            let mut list = self.uidlist(folder).await?;
            let name = format!("{name},S={},W={}", body.len(), body.len());
            self.mount.rename(&tmp, &format!("{dir}/new/{name}")).await?;
            self.mount.fsync_dir(&format!("{dir}/new")).await?;
            let uids = self.give_uids(folder, &mut list, &[name], true).await?;
            self.append_index(folder, &maillog::append(&uids), false).await
        };
        let done = locked.await;
        let unlocked = self.unlock_uidlist(&dir).await;
        drop(held);
        done.and(unlocked)
    }

    /// `tmp/`, fsync, link to `new/`, unlink.
    async fn deliver_postfix(&self, folder: &str, no: MailNo, body: &[u8]) -> Answer<()> {
        let dir = self.mail_dir(folder);
        let name = self.new_name();
        let tmp = format!("{dir}/tmp/{name}");
        if let Err(errno) = self.write_mail(&tmp, no, body, true).await {
            self.abandon(&tmp).await;
            return Err(errno);
        }
        let linked = self.mount.link(&tmp, &format!("{dir}/new/{name}")).await;
        let gone = self.mount.unlink(&tmp).await;
        linked.and(gone)
    }

    /// `tmp/`, rename to `new/`; nothing is synced.
    async fn deliver_plain(&self, folder: &str, no: MailNo, body: &[u8]) -> Answer<()> {
        let dir = self.mail_dir(folder);
        let name = self.new_name();
        let tmp = format!("{dir}/tmp/{name}");
        if let Err(errno) = self.write_mail(&tmp, no, body, false).await {
            self.abandon(&tmp).await;
            return Err(errno);
        }
        self.mount.rename(&tmp, &format!("{dir}/new/{name}")).await
    }

    /// STORE: a record that asks, a rename, a record that says it is done.
    pub async fn store_flags(&self, folder: &str) -> Answer<()> {
        let view = self.select(folder).await?;
        let Some((uid, name)) = self.some_mail(&view) else { return Ok(()) };
        let dir = self.mail_dir(folder);
        let held = self.locks.lock(&dir).await;
        let letters = ["", "S", "F", "FS", "RS", "DS"];
        let flags = letters[self.core().chance.index(letters.len())];
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

    fn some_mail(&self, view: &View) -> Option<(u32, String)> {
        let all: Vec<_> = view.mails.iter().collect();
        self.core().chance.pick(&all).map(|(uid, name)| (**uid, (*name).clone()))
    }

    /// EXPUNGE of one mail: a record that asks, unlink, a record that says it is done.
    pub async fn expunge(&self, folder: &str) -> Answer<()> {
        let view = self.select(folder).await?;
        let Some((uid, name)) = self.some_mail(&view) else { return Ok(()) };
        self.remove(folder, uid, &name).await
    }

    async fn remove(&self, folder: &str, uid: u32, name: &str) -> Answer<()> {
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

    /// CREATE.
    pub async fn create(&self, folder: &str) -> Answer<()> {
        let _held = self.locks.lock("mailboxes").await;
        let dir = self.mail_dir(folder);
        let index = self.index_dir(folder);
        if self.mount.find(&dir).await?.is_none() && self.mount.find(&index).await?.is_some() {
            // Another folder's, left by a deletion or a renaming that failed.
            self.remove_all(&index).await?;
        }
        self.ensure_folder(folder).await?;
        let held = self.lock_uidlist(&dir).await?;
        let made = self.uidlist(folder).await;
        let unlocked = self.unlock_uidlist(&dir).await;
        drop(held);
        made.map(drop).and(unlocked)
    }

    /// RENAME: the mails' directory, then the index's.
    pub async fn rename(&self, from: &str, to: &str) -> Answer<()> {
        let _held = self.locks.lock("mailboxes").await;
        let (a, b) = (self.mail_dir(from), self.mail_dir(to));
        let _first = self.locks.lock(&a).await;
        if self.mount.find(&b).await?.is_some() || self.mount.find(&a).await?.is_none() {
            return Ok(());
        }
        self.mount.rename(&a, &b).await?;
        let (a, b) = (self.index_dir(from), self.index_dir(to));
        if self.index && self.mount.find(&a).await?.is_some() {
            if self.mount.find(&b).await?.is_some() {
                // Left by a rename that was cut in two.
                self.remove_all(&b).await?;
            }
            self.mount.rename(&a, &b).await?;
        }
        Ok(())
    }

    /// DELETE: out of sight first, then file by file.
    pub async fn delete(&self, folder: &str) -> Answer<()> {
        let _held = self.locks.lock("mailboxes").await;
        let dir = self.mail_dir(folder);
        let _first = self.locks.lock(&dir).await;
        if self.mount.find(&dir).await?.is_none() {
            return Ok(());
        }
        let trash = format!("{}/mail/..DOVECOT-TRASHED", self.user);
        if self.mount.find(&trash).await?.is_some() {
            self.remove_all(&trash).await?;
        }
        self.mount.rename(&dir, &trash).await?;
        self.remove_all(&trash).await?;
        let index = self.index_dir(folder);
        if self.index && self.mount.find(&index).await?.is_some() {
            self.remove_all(&index).await?;
        }
        Ok(())
    }

    async fn remove_all(&self, dir: &str) -> Answer<()> {
        let mut dirs = vec![dir.to_string()];
        let mut at = 0;
        while at < dirs.len() {
            for (name, kind) in self.mount.list(&dirs[at]).await? {
                let path = format!("{}/{name}", dirs[at]);
                if kind == FileKind::Directory {
                    dirs.push(path);
                } else {
                    self.mount.unlink(&path).await?;
                }
            }
            at += 1;
        }
        for dir in dirs.into_iter().rev() {
            self.mount.rmdir(&dir).await?;
        }
        Ok(())
    }

    /// FETCH of a body.
    pub async fn fetch(&self, folder: &str) -> Answer<()> {
        let view = self.select(folder).await?;
        let Some((_, name)) = self.some_mail(&view) else { return Ok(()) };
        let path = format!("{}/cur/{name}", self.mail_dir(folder));
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
            self.core().fail(format!("{path} is read as something else"));
        }
        Ok(())
    }

    /// SUBSCRIBE.
    pub async fn subscribe(&self, folder: &str) -> Answer<()> {
        let _held = self.locks.lock("subscriptions").await;
        let path = format!("{}/mail/subscriptions", self.user);
        let mut content = match self.mount.find(&path).await? {
            Some(_) => self.mount.read_all(&path).await?,
            None => b"V\t2\n\n".to_vec(),
        };
        content.extend_from_slice(format!("{folder}\n").as_bytes());
        self.mount.replace(&path, &format!("{path}.lock"), &content).await
    }
}
