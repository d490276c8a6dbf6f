//! An administrator brings expunged mails back while servers work and machines die.
//!
//! Which mails come back is not foreseen: while an undelete goes on, and if it is not answered, each
//! mail without a name may have one again, once more than it had. What it answers is there from then on,
//! like any other mail: no gc may take it away, no death, and no UID may be given twice for it.

use super::chance::Chance;
use super::mount::Answer;
use super::server::Server;
use async_trait::async_trait;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use vmailfs::dovecot::recover::LogAppend;
use vmailfs::vmail::bring_back::{LockedLog, LogFile, LogWriter};
use vmailfs::vmail::error::{Error, Result};
use vmailfs::vmail::session::UserCell;
use vmailfs::vmail::undelete::{Which, undelete};

/// Writes index logs as the command does: under the server's lock, through the mount.
struct ByServer(Server);

struct Locked {
    server: Server,
    path: String,
    len: u64,
    _held: OwnedMutexGuard<()>,
}

fn failed(errno: i32) -> Error {
    Error::Full(format!("errno {errno}"))
}

#[async_trait]
impl LogWriter for ByServer {
    async fn lock(&self, cell: &Arc<UserCell>, log: &LogFile) -> Result<Box<dyn LockedLog>> {
        let names: Vec<_> = log.path.iter().map(|n| String::from_utf8_lossy(n)).collect();
        // `mail/mailboxes/F/dbox-Mails/...` or `index/mailboxes/F/...`
        let held = self.0.locks.lock(&self.0.mail_dir(&names[2])).await;
        let path = format!("{}/{}", cell.name, names.join("/"));
        let len = self.0.mount.stat(&path).await.map_err(failed)?.size;
        Ok(Box::new(Locked { server: self.0.clone(), path, len, _held: held }))
    }
}

#[async_trait]
impl LockedLog for Locked {
    async fn append(&mut self, append: &LogAppend) -> Result<()> {
        if append.at as u64 != self.len {
            return Err(Error::Full("it ends in a torn write".into()));
        }
        self.server.mount.append(&self.path, &append.bytes, true).await.map_err(failed)
    }
}

impl Server {
    /// Some undeletes, with pauses.
    pub async fn undeletes(&self, chance: Chance) {
        for _ in 0..chance.between(1, 4) {
            let pause = Duration::from_millis(chance.between(10, 100_000));
            self.core().time.sleep(pause).await;
            let done = self.undelete().await;
            self.mount.life.log(&format!("undelete: {done:?}"));
        }
    }

    async fn undelete(&self) -> Answer<usize> {
        let Some(cell) = self.mount.fs.session().known_user(&self.user) else { return Ok(0) };
        self.core().model.lock().undelete_begins();
        let which = Which::Expunged { folder: None, since: None };
        let done = undelete(&cell, &which, false, &ByServer(self.clone())).await;
        let answered = match done {
            Ok(report) => {
                let back = report.mails.iter();
                let dirs: BTreeSet<String> = back
                    .filter_map(|mail| {
                        let path: Vec<_> =
                            mail.path.iter().map(|n| String::from_utf8_lossy(n)).collect();
                        let file = format!("{}/{}/{}", self.user, path.join("/"), mail.name);
                        Some(file.rsplit_once('/')?.0.to_owned())
                    })
                    .collect();
                for dir in dirs {
                    self.came_back(&dir).await;
                }
                Ok(report.mails.len())
            }
            Err(error) => {
                self.mount.life.log(&format!("undelete failed: {error}"));
                Err(libc::EAGAIN)
            }
        };
        if !self.mount.life.is_fenced() {
            self.core().model.lock().undelete_ends();
        }
        answered
    }

    /// Notes the mails of a directory that nobody gave a name but the undelete.
    async fn came_back(&self, dir: &str) {
        let Ok(names) = self.mount.list(dir).await else { return };
        for (name, _) in names {
            let path = format!("{dir}/{name}");
            let known = || self.core().model.lock().find(&path).is_some();
            if known() || !super::model::is_mail(&path) {
                continue;
            }
            let Ok(body) = self.mount.read_all(&path).await else { continue };
            // A client may have moved it meanwhile.
            if matches!(self.mount.find(&path).await, Ok(Some(_))) && !known() {
                let now = self.core().time.now();
                let adopted = self.core().model.lock().adopted(&path, &body, now);
                adopted.unwrap_or_else(|what| {
                    self.core().fail(super::wrong::Kind::MailWrong, what);
                });
            }
        }
    }
}
