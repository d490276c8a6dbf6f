//! A mail server's hands: calls on a mount by path, with every answer noted in the model.

use super::model::{Change, Item, Key, MailNo, is_passing};
use super::world::Life;
use super::wrong::Kind;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use vmailfs::fs::VmailFs;
use vmailfs::fs::api::{
    Attr, Caller, Fh, FileKind, Found, Ino, Lookup, MailFs, OpenMode, RenameMode, SetAttr, Step,
};

/// An answer, or the errno.
pub type Answer<T> = Result<T, i32>;

const WHO: Caller = Caller { uid: 1000, gid: 1000, pid: 1 };
const READ: OpenMode =
    OpenMode { read: true, write: false, append: false, truncate: false, exclusive: false };
const WRITE: OpenMode =
    OpenMode { read: true, write: true, append: false, truncate: false, exclusive: false };
const MAKE: OpenMode =
    OpenMode { read: true, write: true, append: false, truncate: false, exclusive: true };

#[derive(Debug, Clone)]
pub struct Mount {
    pub fs: Arc<VmailFs>,
    pub life: Arc<Life>,
    /// Nothing but the head tells sessions apart: a fenced one may not know.
    pub single: bool,
}

/// An open file, and what is known of it.
#[derive(Debug, Clone)]
pub struct Open {
    pub ino: Ino,
    pub fh: Fh,
    pub path: String,
    /// Kept for files that hold mail; what they hold counts when they are made safe.
    mail: Option<(MailNo, Arc<Mutex<Vec<u8>>>)>,
}

/// Whether a path is of a file whose content is a mail.
fn holds_mail(path: &str) -> bool {
    let dirs = ["/cur/", "/new/", "/tmp/", "/dbox-Mails/", "-TRASHED/u.", "-TRASHED/.temp."];
    dirs.iter().any(|dir| path.contains(dir))
}

impl Mount {
    /// Makes a call until it is answered. `change` says what it does to the names, asked at the
    /// moment of the answer.
    pub async fn go<T>(
        &self,
        what: impl Fn() -> String,
        call: impl Fn(&VmailFs) -> Step<T>,
        change: impl FnOnce(&T) -> Change,
        begun: impl FnOnce() -> Change,
    ) -> Answer<T> {
        for _ in 0..1000 {
            self.life.check().await;
            match call(&self.fs) {
                Step::Done(done) => {
                    let now = self.life.core.time.now();
                    if self.life.is_dead() {
                        let begun = begun();
                        self.life.log(&format!("unanswered: {}", what()));
                        if !begun.is_empty() {
                            self.life.core.model.lock().perhaps(begun, now);
                        }
                        return self.life.nothing().await;
                    }
                    return match done {
                        Ok(done) => {
                            let change = change(&done);
                            let passing = |((_, name), _): &(Key, Option<Item>)| is_passing(name);
                            if self.life.is_fenced() && !self.single && !change.iter().all(passing)
                            {
                                self.life.core.fail(
                                    Kind::Answer,
                                    format!("{} by a fenced session (I5)", what()),
                                );
                            }
                            if !change.is_empty() {
                                self.life.log(&format!("{} ok", what()));
                                self.life.core.model.lock().apply(change, now);
                            }
                            Ok(done)
                        }
                        Err(error) => {
                            self.life.log(&format!(
                                "{} -> {}: {}",
                                what(),
                                error.errno,
                                error.text
                            ));
                            Err(error.errno)
                        }
                    };
                }
                Step::Wait(need) => {
                    let waited = self.fs.wait(need).await;
                    self.life.check().await;
                    if let Err(error) = waited {
                        self.life.log(&format!("{} -> {}: {}", what(), error.errno, error.text));
                        return Err(error.errno);
                    }
                }
            }
        }
        self.life.core.fail(Kind::Stuck, format!("{} waits for ever", what()));
        Err(libc::EDEADLK)
    }

    /// A call that changes no name.
    async fn ask<T>(
        &self,
        what: impl Fn() -> String,
        call: impl Fn(&VmailFs) -> Step<T>,
    ) -> Answer<T> {
        self.go(what, call, |_| Vec::new(), Vec::new).await
    }

    pub async fn find(&self, path: &str) -> Answer<Option<Found>> {
        let mut at = 1;
        let mut found = None;
        for name in path.split('/') {
            let what = || format!("lookup {path}");
            match self.ask(what, |fs| fs.lookup(WHO, at, name.as_bytes())).await? {
                Lookup::Found(next) => {
                    at = next.attr.ino;
                    found = Some(next);
                }
                Lookup::Absent { .. } => {
                    // An outage is never an absence, and neither is anything else (I4).
                    if !is_passing(path)
                        && self.life.core.model.lock().find(path).is_some()
                        && !self.life.core.is_looking()
                    {
                        self.life.core.fail(
                            Kind::Answer,
                            format!("{path} is there, and {name} was not found"),
                        );
                    }
                    return Ok(None);
                }
            }
        }
        Ok(found)
    }

    pub async fn look(&self, path: &str) -> Answer<Found> {
        self.find(path).await?.ok_or(libc::ENOENT)
    }

    pub async fn stat(&self, path: &str) -> Answer<Attr> {
        Ok(self.look(path).await?.attr)
    }

    async fn parent<'a>(&self, path: &'a str) -> Answer<(Ino, &'a [u8])> {
        match path.rsplit_once('/') {
            Some((dir, name)) => Ok((self.look(dir).await?.attr.ino, name.as_bytes())),
            None => Ok((1, path.as_bytes())),
        }
    }

    fn key(&self, path: &str) -> Key {
        // A path whose directory is gone is one that another client removed.
        self.life.core.model.lock().key(path).unwrap_or((u32::MAX, path.to_string()))
    }

    fn item(&self, path: &str) -> Option<Item> {
        self.life.core.model.lock().find(path).cloned()
    }

    pub async fn mkdir(&self, path: &str) -> Answer<()> {
        let (at, name) = self.parent(path).await?;
        let made = || vec![(self.key(path), Some(self.life.core.model.lock().new_dir()))];
        let call = |fs: &VmailFs| fs.mkdir(WHO, at, name, 0o700);
        self.go(|| format!("mkdir {path}"), call, |_| made(), made).await.map(drop)
    }

    /// Makes a file that must not exist. `mail`: it is to hold one.
    pub async fn make(&self, path: &str, mail: Option<MailNo>) -> Answer<Open> {
        let (at, name) = self.parent(path).await?;
        let item = || match mail {
            // Counts once it is safe.
            Some(_) => Vec::new(),
            None => vec![(self.key(path), Some(Item::File(Arc::default())))],
        };
        let call = |fs: &VmailFs| fs.create(WHO, at, name, 0o600, MAKE);
        let (found, opened) = self.go(|| format!("create {path}"), call, |_| item(), item).await?;
        let mail = mail.map(|no| (no, Arc::default()));
        Ok(Open { ino: found.attr.ino, fh: opened.fh, path: path.into(), mail })
    }

    pub async fn open(&self, path: &str, write: bool) -> Answer<Open> {
        let ino = self.look(path).await?.attr.ino;
        let how = if write { WRITE } else { READ };
        let opened = self.ask(|| format!("open {path}"), |fs| fs.open(WHO, ino, how)).await?;
        Ok(Open { ino, fh: opened.fh, path: path.into(), mail: None })
    }

    pub async fn write(&self, file: &Open, offset: u64, data: &[u8]) -> Answer<()> {
        let what = || format!("write {} at {offset} len {}", file.path, data.len());
        let at = usize::try_from(offset).unwrap();
        let put = |content: &mut Vec<u8>| {
            content.resize(content.len().max(at + data.len()), 0);
            content[at..at + data.len()].copy_from_slice(data);
        };
        let change = || match &file.mail {
            Some(_) => Vec::new(),
            None => match self.item(&file.path) {
                Some(Item::File(old)) => {
                    let mut content = old.to_vec();
                    put(&mut content);
                    vec![(self.key(&file.path), Some(Item::File(Arc::new(content))))]
                }
                _ => Vec::new(),
            },
        };
        let call = |fs: &VmailFs| fs.write(WHO, file.ino, file.fh, offset, data);
        self.go(what, call, |_| change(), change).await?;
        if let Some((_, content)) = &file.mail {
            put(&mut content.lock());
        }
        Ok(())
    }

    /// Cuts a file off.
    pub async fn truncate(&self, path: &str, len: u64) -> Answer<()> {
        let ino = self.look(path).await?.attr.ino;
        let set = SetAttr { size: Some(len), ..SetAttr::default() };
        let change = || match self.item(path) {
            Some(Item::File(old)) => {
                let mut content = old.to_vec();
                content.resize(usize::try_from(len).unwrap(), 0);
                vec![(self.key(path), Some(Item::File(Arc::new(content))))]
            }
            _ => Vec::new(),
        };
        let what = || format!("truncate {path} to {len}");
        let call = |fs: &VmailFs| fs.setattr(WHO, ino, None, set);
        self.go(what, call, |_| change(), change).await.map(drop)
    }

    /// What makes a mail safe was answered (or, with `perhaps`, was asked for).
    async fn safe(&self, file: &Open) {
        let Some((no, content)) = &file.mail else { return };
        if self.life.is_fenced() {
            // It comes to the store after whoever took the user has looked.
            return;
        }
        // Another client may have deleted the folder meanwhile, or given it another name.
        if !matches!(self.find(&file.path).await, Ok(Some(found)) if found.attr.ino == file.ino) {
            return;
        }
        let mut model = self.life.core.model.lock();
        let folder = file.path.rsplitn(3, '/').nth(2).and_then(|p| model.dir(p));
        if let Some(info) = model.mails.get_mut(no)
            && info.body == *content.lock()
        {
            info.safe = true;
            info.folder = folder;
            let named = info.named;
            if let Some(key) = model.key(&file.path)
                && named.is_none()
            {
                let now = self.life.core.time.now();
                model.name_mail(*no, key, now);
            }
        }
    }

    pub async fn fsync(&self, file: &Open) -> Answer<()> {
        let before = self.life.core.model.lock().index();
        let what = || format!("fsync {}", file.path);
        self.ask(what, |fs| fs.fsync(file.ino, file.fh, false)).await?;
        self.life.log(&format!("fsync {} ok", file.path));
        // That of a mail promises nothing of what was done before.
        if file.mail.is_none() {
            self.synced(before);
            self.life.core.model.lock().file_synced(&file.path, before);
        }
        self.safe(file).await;
        Ok(())
    }

    fn synced(&self, before: usize) {
        let mut model = self.life.core.model.lock();
        model.synced = model.synced.max(before);
    }

    pub async fn fsync_dir(&self, path: &str) -> Answer<()> {
        let before = self.life.core.model.lock().index();
        let ino = self.look(path).await?.attr.ino;
        let fh = self.ask(|| format!("opendir {path}"), |fs| fs.opendir(WHO, ino)).await?;
        let done = self.ask(|| format!("fsyncdir {path}"), |fs| fs.fsyncdir(ino, fh)).await;
        self.fs.releasedir(ino, fh);
        done?;
        self.synced(before);
        Ok(())
    }

    /// Closes; for a server that never syncs this is what makes a mail safe.
    pub async fn close(&self, file: &Open) -> Answer<()> {
        let done = self.ask(|| format!("close {}", file.path), |fs| fs.flush(file.ino, file.fh));
        let done = done.await;
        self.fs.release(file.ino, file.fh);
        if done.is_ok() {
            self.safe(file).await;
        }
        done
    }

    pub async fn read_all(&self, path: &str) -> Answer<Vec<u8>> {
        let file = self.open(path, false).await?;
        let mut out = Vec::new();
        let done = loop {
            let at = out.len() as u64;
            let what = || format!("read {path}");
            match self.ask(what, |fs| fs.read(file.ino, file.fh, at, 65536)).await {
                Ok(more) if more.is_empty() => break Ok(out),
                Ok(more) => out.extend(more),
                Err(errno) => break Err(errno),
            }
        };
        self.fs.release(file.ino, file.fh);
        done
    }

    pub async fn rename(&self, from: &str, to: &str) -> Answer<()> {
        let (a, name) = self.parent(from).await?;
        let (b, new) = self.parent(to).await?;
        let change = || match self.item(from) {
            Some(item) if from != to => {
                vec![(self.key(from), None), (self.key(to), Some(item))]
            }
            // A mail in tmp/ that was not safe yet, or one that another client took away.
            _ => Vec::new(),
        };
        let call = |fs: &VmailFs| fs.rename(WHO, a, name, b, new, RenameMode::Replace);
        self.go(|| format!("rename {from} {to}"), call, |()| change(), change).await
    }

    pub async fn link(&self, from: &str, to: &str) -> Answer<()> {
        let ino = self.look(from).await?.attr.ino;
        let (at, name) = self.parent(to).await?;
        let change = || match self.item(from) {
            Some(item) => vec![(self.key(to), Some(item))],
            None => Vec::new(),
        };
        let call = |fs: &VmailFs| fs.link(WHO, ino, at, name);
        self.go(|| format!("link {from} {to}"), call, |_| change(), change).await.map(drop)
    }

    pub async fn unlink(&self, path: &str) -> Answer<()> {
        let (at, name) = self.parent(path).await?;
        let change = || vec![(self.key(path), None)];
        let mail = self.item(path);
        let call = |fs: &VmailFs| fs.unlink(WHO, at, name);
        self.go(|| format!("unlink {path}"), call, |()| change(), change).await?;
        if let Some(Item::Mail(mail)) = mail
            && (path.contains("/tmp/") || path.contains("/.temp."))
        {
            self.life.core.model.lock().abandoned(mail);
        }
        Ok(())
    }

    pub async fn rmdir(&self, path: &str) -> Answer<()> {
        let (at, name) = self.parent(path).await?;
        let change = || vec![(self.key(path), None)];
        let call = |fs: &VmailFs| fs.rmdir(WHO, at, name);
        self.go(|| format!("rmdir {path}"), call, |()| change(), change).await
    }

    /// Names and kinds, in the directory's order, without the dots.
    pub async fn list(&self, path: &str) -> Answer<Vec<(String, FileKind)>> {
        let ino = if path.is_empty() { 1 } else { self.look(path).await?.attr.ino };
        let all: Mutex<Vec<(String, FileKind)>> = Mutex::default();
        let what = || format!("list {path}");
        self.ask(what, |fs| {
            all.lock().clear();
            fs.readdir(ino, 0, 0, &mut |entry| {
                let name = String::from_utf8_lossy(&entry.name).into_owned();
                if name != "." && name != ".." {
                    all.lock().push((name, entry.kind));
                }
                true
            })
        })
        .await?;
        Ok(all.into_inner())
    }

    /// A whole file written beside and renamed into place, synced first.
    pub async fn replace(&self, path: &str, temp: &str, data: &[u8]) -> Answer<()> {
        if self.find(temp).await?.is_some() {
            self.unlink(temp).await?;
        }
        let file = self.make(temp, None).await?;
        let written = async {
            self.write(&file, 0, data).await?;
            self.fsync(&file).await
        };
        let written = written.await;
        let closed = self.close(&file).await;
        written.and(closed)?;
        self.rename(temp, path).await
    }

    /// Adds to the end of a file.
    pub async fn append(&self, path: &str, data: &[u8], sync: bool) -> Answer<()> {
        let size = self.stat(path).await?.size;
        let file = self.open(path, true).await?;
        let mut done = self.write(&file, size, data).await;
        if sync && done.is_ok() {
            done = self.fsync(&file).await;
        }
        let closed = self.close(&file).await;
        done.and(closed)
    }

    /// All that is there, with what it holds.
    pub async fn look_at_all(&self) -> Answer<BTreeMap<String, Item>> {
        let mut seen = BTreeMap::new();
        let mut dirs = vec![String::new()];
        while let Some(dir) = dirs.pop() {
            for (name, kind) in self.list(&dir).await? {
                let path = if dir.is_empty() { name } else { format!("{dir}/{name}") };
                if kind == FileKind::Directory {
                    seen.insert(path.clone(), Item::Dir(0));
                    dirs.push(path);
                    continue;
                }
                let body = self.read_all(&path).await?;
                let size = self.stat(&path).await?.size;
                if size != body.len() as u64 {
                    let len = body.len();
                    self.life
                        .core
                        .fail(Kind::Answer, format!("{path} has size {size} and {len} bytes"));
                }
                let mail = self.life.core.model.lock().mail_of(&body);
                let item = match mail {
                    Some(mail) if holds_mail(&path) => Item::Mail(mail),
                    None if super::model::is_mail(&path) => {
                        self.life
                            .core
                            .fail(Kind::MailWrong, format!("{path} holds what nobody sent"));
                        Item::Mail(0)
                    }
                    _ => Item::File(Arc::new(body)),
                };
                seen.insert(path, item);
            }
        }
        Ok(seen)
    }
}
