//! Deliveries as Dovecot's LMTP, Postfix and a shell do them.

use super::maillog;
use super::model::MailNo;
use super::mount::Answer;
use super::sdbox;
use super::server::{Format, Server};
use super::wrong::Kind;

impl Server {
    pub(super) fn new_name(&self) -> String {
        let now = self.core().time.tick();
        let secs = super::clock::START as u64 + now.as_secs();
        format!("{secs}.M{}P{}.sim", now.subsec_micros(), self.mount.life.serial())
    }

    pub(super) fn new_mail(&self) -> (MailNo, Vec<u8>) {
        let chance = &self.core().chance;
        let mut model = self.core().model.lock();
        let no = model.mails.len() + 1;
        let lines = 1 + chance.below(if chance.once_in(20) { 400 } else { 6 });
        let body = format!("Subject: {no}\n\n{}", "some text\n".repeat(lines as usize));
        let mut file = body.into_bytes();
        if self.format == Format::Sdbox {
            file = sdbox::file_of(no as MailNo, &file);
        }
        (model.new_mail(&file), file)
    }

    pub(super) async fn write_mail(
        &self,
        path: &str,
        no: MailNo,
        body: &[u8],
        sync: bool,
    ) -> Answer<()> {
        // A key has no dot first.
        let name = path.rsplit('/').next().unwrap_or(path).trim_start_matches('.').to_string();
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
        let dir = match self.format {
            Format::Maildir => format!("{}/tmp", self.mail_dir(folder)),
            Format::Sdbox => self.mail_dir(folder),
        };
        if self.core().model.lock().dir(&dir).is_none() {
            self.ensure_folder(folder).await?;
        }
        let (no, body) = self.new_mail();
        let how = self.core().chance.below(4);
        let done = match how {
            _ if self.format == Format::Sdbox => self.deliver_sdbox(folder, no, &body).await,
            0 => self.deliver_postfix(folder, no, &body).await,
            1 => self.deliver_plain(folder, no, &body).await,
            _ => self.deliver_lmtp(folder, no, &body).await,
        };
        match done {
            Ok(()) => self.mount.life.log(&format!("mail {no} delivered to {folder}")),
            Err(errno @ (libc::EIO | libc::EDQUOT | libc::EFBIG | libc::EROFS)) => {
                self.core().fail(
                    Kind::Answer,
                    format!("a delivery to {folder} is bounced: errno {errno} (I4)"),
                );
            }
            Err(errno) => self.mount.life.log(&format!("mail {no} deferred: {errno}")),
        }
        done
    }

    pub(super) async fn abandon(&self, path: &str) {
        if let Ok(Some(_)) = self.mount.find(path).await {
            let _ = self.mount.unlink(path).await;
        }
    }

    /// `tmp/`, fsync, rename to `new/`, uidlist, index.
    pub(super) async fn deliver_lmtp(&self, folder: &str, no: MailNo, body: &[u8]) -> Answer<()> {
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
    pub(super) async fn deliver_postfix(
        &self,
        folder: &str,
        no: MailNo,
        body: &[u8],
    ) -> Answer<()> {
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
    pub(super) async fn deliver_plain(&self, folder: &str, no: MailNo, body: &[u8]) -> Answer<()> {
        let dir = self.mail_dir(folder);
        let name = self.new_name();
        let tmp = format!("{dir}/tmp/{name}");
        if let Err(errno) = self.write_mail(&tmp, no, body, false).await {
            self.abandon(&tmp).await;
            return Err(errno);
        }
        self.mount.rename(&tmp, &format!("{dir}/new/{name}")).await
    }
}
