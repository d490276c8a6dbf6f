//! The simulated server with sdbox: a mail is a file `u.N` whose number is its UID; which mails
//! there are, and their flags, is said by `dovecot.index.log` alone.
//!
//! The order of things is Dovecot's: a mail is written and synced under a temporary name, renamed
//! to its number under the log's lock, then named by a record that is synced; an expunge is a
//! synced record, then an unlink; flags are a record that nobody syncs; a copy is a link to a
//! temporary name. Without a log a folder is a new one, and empty. Only an index that asks for it
//! is made anew from the files that are there, which keep their numbers.

use super::maillog::{self, State};
use super::model::{Item, MailNo};
use super::mount::Answer;
use super::server::{Server, View};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A mail as dbox keeps it: the file's header, the mail's, its bytes, what is known of it.
pub fn file_of(no: MailNo, body: &[u8]) -> Vec<u8> {
    let mut out = b"2 M1e C65000000\n".to_vec();
    out.extend(format!("\x01\x02N          {:016x}\n", body.len()).as_bytes());
    out.extend(body);
    out.extend(b"\n\x01\x03\n");
    let (received, guid) = (super::clock::START, u128::from(no) << 64 | 0x5157);
    out.extend(format!("R{received:x}\nV{:x}\nG{guid:032x}\n\n", body.len()).as_bytes());
    out
}

pub fn number(name: &str) -> Option<u32> {
    name.strip_prefix("u.")?.parse().ok()
}

impl Server {
    fn log_path(&self, folder: &str) -> String {
        format!("{}/dovecot.index.log", self.index_dir(folder))
    }

    /// The numbers of the mail files in a folder.
    async fn numbers(&self, folder: &str) -> Answer<Vec<u32>> {
        let names = self.mount.list(&self.mail_dir(folder)).await?;
        let mut all: Vec<u32> = names.iter().filter_map(|(name, _)| number(name)).collect();
        all.sort_unstable();
        Ok(all)
    }

    /// The index as its log has it, made where there is none. Under the folder's lock.
    pub(super) async fn open_box(&self, folder: &str) -> Answer<State> {
        let path = self.log_path(folder);
        let state = match self.mount.find(&path).await? {
            Some(_) => {
                let log = self.mount.read_all(&path).await?;
                let mut model = self.core().model.lock();
                if model.find(&path).is_none()
                    && let Some(key) = model.key(&path)
                {
                    // Made for mails that came back.
                    let file = Item::File(Arc::new(log.clone()));
                    model.apply(vec![(key, Some(file))], self.core().time.now());
                }
                maillog::read(&log)
            }
            None => None,
        };
        let state = match state {
            Some(state) if state.validity > 0 => state,
            Some(state) if state.rebuild => self.rebuild(folder, state).await?,
            _ => self.begin_log(folder, None, &[]).await?,
        };
        self.core().told.lock().validities.insert(state.validity);
        Ok(state)
    }

    /// A new log: its header under another name, then the records. `old`: UIDVALIDITY and
    /// next-UID that stay.
    async fn begin_log(
        &self,
        folder: &str,
        old: Option<(u32, u32)>,
        mails: &[(u32, u8)],
    ) -> Answer<State> {
        let (validity, next) = match old {
            Some(old) => old,
            None => (self.new_validity().await?, 1),
        };
        let path = self.log_path(folder);
        self.ensure_dir(&self.index_dir(folder)).await?;
        let lock = format!("{path}.newlock");
        if self.mount.find(&lock).await?.is_some() {
            self.mount.unlink(&lock).await?;
        }
        let file = self.mount.make(&lock, None).await?;
        let seq = u32::try_from(self.mount.life.serial()).unwrap() + 1;
        self.mount.write(&file, 0, &maillog::empty_log(validity, seq)).await?;
        self.mount.close(&file).await?;
        self.mount.rename(&lock, &path).await?;
        let mut records = maillog::begin(validity, 1);
        records.extend(maillog::append_flagged(mails.iter().copied()));
        records.extend(maillog::raise(next));
        self.mount.append(&path, &maillog::transaction(&records), false).await?;
        let state = maillog::read(&self.mount.read_all(&path).await?);
        state.ok_or(libc::EIO)
    }

    /// Makes the index anew from the mail files. What it knew of their flags stays.
    async fn rebuild(&self, folder: &str, old: State) -> Answer<State> {
        self.mount.life.log(&format!("index of {folder} is made anew"));
        let numbers = self.numbers(folder).await?;
        let flags = |uid: &u32| old.mails.get(uid).copied().unwrap_or(0);
        let mails: Vec<(u32, u8)> = numbers.iter().map(|uid| (*uid, flags(uid))).collect();
        let next = old.next.max(numbers.last().map_or(1, |last| last.saturating_add(1)));
        let kept = (old.validity > 0).then_some((old.validity, next));
        match kept {
            Some(_) => self.begin_log(folder, kept, &mails).await,
            None => {
                let validity = self.new_validity().await?;
                self.begin_log(folder, Some((validity, next)), &mails).await
            }
        }
    }

    /// Appends to the log. What a write left there that was not finished is cut off first.
    async fn add(&self, folder: &str, state: &State, records: &[u8], sync: bool) -> Answer<()> {
        let path = self.log_path(folder);
        if state.torn {
            self.mount.truncate(&path, state.whole as u64).await?;
        }
        self.mount.append(&path, &maillog::transaction(records), sync).await
    }

    /// Gives a file under a temporary name its number, and says so in the index.
    async fn give_number(&self, folder: &str, temp: &str) -> Answer<View> {
        let dir = self.mail_dir(folder);
        let held = self.locks.lock(&dir).await;
        let state = self.open_box(folder).await?;
        let uid = state.next;
        let path = format!("{dir}/u.{uid}");
        if self.mount.find(&path).await?.is_some() {
            // A server died before it could say so: the next to open the folder looks for all.
            self.add(folder, &state, &maillog::mark_corrupted(), false).await?;
            return Err(libc::EAGAIN);
        }
        self.mount.rename(temp, &path).await?;
        if let Err(errno) = self.add(folder, &state, &maillog::append(&[uid]), true).await {
            // The mail is not taken. A record that was written and not synced may stay.
            self.mount.life.log(&format!("{path} is not in the index: {errno}"));
            return Err(errno);
        }
        drop(held);
        self.mount.fsync_dir(&dir).await?;
        let mails = BTreeMap::from([(uid, format!("u.{uid}"))]);
        Ok(View { validity: state.validity, mails })
    }

    pub(super) async fn deliver_sdbox(&self, folder: &str, no: MailNo, file: &[u8]) -> Answer<()> {
        let temp = format!("{}/.temp.{}", self.mail_dir(folder), self.new_name());
        let done = match self.write_mail(&temp, no, file, true).await {
            Ok(()) => self.give_number(folder, &temp).await.map(drop),
            Err(errno) => Err(errno),
        };
        if done.is_err() {
            self.abandon(&temp).await;
        }
        done
    }

    /// SELECT: the mails of the index.
    pub(super) async fn select_sdbox(&self, folder: &str) -> Answer<View> {
        let dir = self.mail_dir(folder);
        let held = self.locks.lock(&dir).await;
        let mut state = self.open_box(folder).await?;
        let numbers = self.numbers(folder).await?;
        let missing = state.mails.keys().any(|uid| numbers.binary_search(uid).is_err());
        if missing {
            self.mount.life.log(&format!("{folder}: a mail of the index is not there"));
        }
        if state.rebuild || missing {
            state = self.rebuild(folder, state).await?;
        }
        drop(held);
        let mails = state.mails.keys().map(|uid| (*uid, format!("u.{uid}"))).collect();
        let view = View { validity: state.validity, mails };
        self.tell(folder, &view);
        Ok(view)
    }

    /// STORE: a record, and one that says how far the log was read.
    pub(super) async fn store_flags_sdbox(
        &self,
        folder: &str,
        uid: u32,
        flags: &str,
    ) -> Answer<()> {
        let held = self.locks.lock(&self.mail_dir(folder)).await;
        let state = self.open_box(folder).await?;
        self.add(folder, &state, &maillog::flags(uid, flags, false), false).await?;
        let state = self.open_box(folder).await?;
        let done = self.add(folder, &state, &maillog::tail(state.whole), false).await;
        drop(held);
        done
    }

    /// EXPUNGE of one mail: a record that asks, one that says it is done, synced; the unlink.
    pub(super) async fn remove_sdbox(&self, folder: &str, uid: u32) -> Answer<()> {
        let dir = self.mail_dir(folder);
        let held = self.locks.lock(&dir).await;
        let state = self.open_box(folder).await?;
        self.add(folder, &state, &maillog::expunge(&[uid], false), false).await?;
        let state = self.open_box(folder).await?;
        self.add(folder, &state, &maillog::expunge(&[uid], true), true).await?;
        let done = match self.mount.unlink(&format!("{dir}/u.{uid}")).await {
            Err(libc::ENOENT) => Ok(()),
            other => other,
        };
        drop(held);
        done
    }

    /// COPY: a link to a temporary name, which gets its number. Says whether there was a mail.
    pub(super) async fn copy_sdbox(&self, from: &str, to: &str, uid: u32) -> Answer<bool> {
        let temp = format!("{}/.temp.{}", self.mail_dir(to), self.new_name());
        match self.mount.link(&format!("{}/u.{uid}", self.mail_dir(from)), &temp).await {
            Err(libc::ENOENT) => return Ok(false),
            other => other?,
        }
        match self.give_number(to, &temp).await {
            // COPYUID.
            Ok(view) => self.tell(to, &view),
            Err(errno) => {
                self.abandon(&temp).await;
                return Err(errno);
            }
        }
        Ok(true)
    }

    /// Next-UID is raised by a person.
    pub(super) async fn raise_sdbox(&self, folder: &str, by: u32) -> Answer<()> {
        let held = self.locks.lock(&self.mail_dir(folder)).await;
        let state = self.open_box(folder).await?;
        let done =
            self.add(folder, &state, &maillog::raise(state.next.saturating_add(by)), false).await;
        drop(held);
        done
    }
}
