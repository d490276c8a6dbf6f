//! Folders: login, CREATE, RENAME, DELETE, SUBSCRIBE, and the counter of UIDVALIDITYs.

use super::mount::Answer;
use super::server::{Format, Server};
use super::wrong::Kind;
use vmailfs::dovecot::uidvalidity;
use vmailfs::fs::api::FileKind;

impl Server {
    pub(super) async fn ensure_dir(&self, path: &str) -> Answer<()> {
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
        if self.format == Format::Sdbox {
            self.ensure_dir(&format!("{user}/mail/mailboxes")).await?;
            self.ensure_dir(&format!("{user}/index/mailboxes")).await?;
        }
        self.ensure_folder("INBOX").await
    }

    pub(super) async fn ensure_folder(&self, folder: &str) -> Answer<()> {
        let dir = self.mail_dir(folder);
        let dirs = match self.format {
            Format::Maildir => {
                vec![dir.clone(), format!("{dir}/cur"), format!("{dir}/new"), format!("{dir}/tmp")]
            }
            Format::Sdbox => vec![self.box_dir(folder), dir],
        };
        for dir in dirs {
            self.ensure_dir(&dir).await?;
        }
        if self.index {
            self.ensure_dir(&self.index_dir(folder)).await?;
        }
        Ok(())
    }

    pub async fn folders(&self) -> Answer<Vec<String>> {
        if self.format == Format::Sdbox {
            return self.boxes().await;
        }
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

    /// Folders of sdbox: what has a directory for mails.
    async fn boxes(&self) -> Answer<Vec<String>> {
        let all = self.mount.list(&format!("{}/mail/mailboxes", self.user)).await?;
        let mut folders = Vec::new();
        for (name, _) in all {
            if !name.starts_with('.') && self.mount.find(&self.mail_dir(&name)).await?.is_some() {
                folders.push(name);
            }
        }
        folders.sort();
        Ok(folders)
    }

    /// A UIDVALIDITY that no folder had.
    pub(super) async fn new_validity(&self) -> Answer<u32> {
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
            self.core().fail(
                Kind::UidTwice,
                format!("UIDVALIDITY {value} is given to a second folder (I2)"),
            );
        }
        Ok(value)
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
        if self.format == Format::Sdbox {
            let _held = self.locks.lock(&dir).await;
            return self.open_box(folder).await.map(drop);
        }
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
        if self.format == Format::Sdbox {
            let (a, b) = (self.box_dir(from), self.box_dir(to));
            if self.mount.find(&b).await?.is_some() {
                // Half of a folder: of one that was being made or deleted.
                self.remove_all(&b).await?;
            }
            self.mount.rename(&a, &b).await?;
        } else {
            self.mount.rename(&a, &b).await?;
        }
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
        if self.format == Format::Sdbox {
            self.mount.rmdir(&self.box_dir(folder)).await?;
        }
        let index = self.index_dir(folder);
        if self.index && self.mount.find(&index).await?.is_some() {
            self.remove_all(&index).await?;
        }
        Ok(())
    }

    pub(super) async fn remove_all(&self, dir: &str) -> Answer<()> {
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
