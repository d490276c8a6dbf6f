//! Clients that note what they are told, until the daemon is dead: IMAP sessions that change
//! mails, one that only looks, LMTP, and an agent that writes into the Maildir itself.

use crate::support::dovecot::Ports;
use crate::support::imap::{Flags, Imap};
use crate::support::lmtp::Lmtp;
use crate::support::messages::{identify, message};
use crate::support::model::Op;
use crate::support::session::Session;
use crate::support::workload::{Turn, Workload};
use crate::support::{Failure, MAIL_UID, Outcome, fail};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, Scope};
use std::time::{Duration, SystemTime};

/// Whether the daemon behind `root` answers. It is asked, so that "yes" means that it was alive
/// when this call began.
pub fn answers(root: &Path) -> bool {
    // Without a mount there is still the directory below it.
    let there = nix::sys::statfs::statfs(root).map(|s| s.filesystem_type());
    there.is_ok_and(|kind| kind == nix::sys::statfs::FUSE_SUPER_MAGIC)
}

pub struct Traffic<'a> {
    pub work: &'a Workload,
    pub ports: Ports,
    pub root: PathBuf,
    pub users: &'a [String],
    /// Below the home, if an agent is to deliver there by itself.
    pub maildir: Option<&'a str>,
    /// What was refused or broken off while the daemon was alive.
    pub refused: Arc<Mutex<Vec<String>>>,
    /// Those that have not ended.
    pub clients: AtomicUsize,
    /// They are to end once they have their answers.
    pub enough: AtomicBool,
}

impl<'a> Traffic<'a> {
    pub fn start<'scope, 'env>(&'env self, scope: &'scope Scope<'scope, 'env>) {
        for user in self.users {
            scope.spawn(move || self.go_on(|| self.session(user)));
            if self.maildir.is_some() {
                scope.spawn(move || {
                    become_mail_user();
                    self.go_on(|| self.agent(user));
                });
            }
        }
        scope.spawn(move || self.go_on(|| self.deliveries()));
        scope.spawn(move || {
            self.go_on(|| {
                thread::sleep(Duration::from_millis(300));
                self.users.iter().try_for_each(|user| self.watch(user))
            });
        });
    }

    fn enough(&self) -> bool {
        self.enough.load(Ordering::SeqCst)
    }

    /// Does a job again and again, with new connections after a failure, until the daemon is dead
    /// or it is enough.
    fn go_on(&self, mut job: impl FnMut() -> Outcome<()>) {
        self.clients.fetch_add(1, Ordering::SeqCst);
        while !self.enough() && answers(&self.root) {
            if let Err(failure) = job()
                && answers(&self.root)
            {
                self.refused.lock().unwrap().push(failure.0);
                thread::sleep(Duration::from_millis(50));
            }
        }
        self.clients.fetch_sub(1, Ordering::SeqCst);
    }

    fn session(&self, user: &str) -> Outcome<()> {
        let mut session = Session::open(self.work, self.ports, user)?;
        while !self.enough() {
            session.any_change()?;
        }
        session.imap.logout();
        Ok(())
    }

    fn deliveries(&self) -> Outcome<()> {
        let mut lmtp = Lmtp::connect(self.ports.lmtp)?;
        let all: Vec<&String> = self.users.iter().collect();
        while !self.enough() {
            for user in &all {
                self.work.deliver(&mut lmtp, &[user], Turn::Any)?;
            }
            self.work.deliver(&mut lmtp, &all, Turn::Any)?;
            for refusal in self.work.failures() {
                if answers(&self.root) {
                    self.refused.lock().unwrap().push(refusal);
                }
            }
            if !answers(&self.root) {
                return fail("the daemon is dead");
            }
        }
        Ok(())
    }

    /// Notes which mail each UID stands for.
    pub fn watch(&self, user: &str) -> Outcome<()> {
        let mut imap = Imap::login(self.ports.imap, user)?;
        for folder in imap.list()? {
            let there = imap.select(&folder)?;
            if there.exists == 0 {
                continue;
            }
            let newest = format!("{}:*", there.uid_next.saturating_sub(12).max(1));
            for mail in imap.fetch(&newest, "UID BODY.PEEK[]")? {
                // A body that the mail server cannot read it shows as an empty one.
                if let (Some(id), _) = identify(&mail.body) {
                    self.work.model().told(user, there.uid_validity, mail.uid, &id);
                }
            }
        }
        imap.logout();
        Ok(())
    }

    /// As Postfix delivers: written, synced, linked into place.
    fn agent(&self, user: &str) -> Outcome<()> {
        let Some(maildir) = self.maildir else { return Ok(()) };
        let maildir = self.root.join(user).join(maildir);
        let mail = message(self.work.seed(), &self.work.next_id("raw"));
        let op = Op::Put {
            folder: "INBOX".into(),
            id: mail.id.clone(),
            hash: mail.hash.clone(),
            flags: Flags::new(),
            date: None,
        };
        let ticket = self.work.model().begin(user, op);
        let cleared = deliver(&maildir, &mail.bytes)?;
        let mut model = self.work.model();
        model.done(ticket, None);
        if !cleared {
            model.user(user).unanswered.insert(mail.id.clone());
        }
        // It gets its UID when a server looks.
        if let Some(mail) = model.folder(user, "INBOX").mails.get_mut(&mail.id) {
            mail.answered = u64::MAX;
        }
        drop(model);
        thread::sleep(Duration::from_millis(40));
        Ok(())
    }
}

/// False if its name in `tmp/` is still there, because the daemon died between the two: once the
/// mail was expunged it is one that was never named, and comes back if the machine is lost.
fn deliver(maildir: &Path, mail: &[u8]) -> Outcome<bool> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let name = format!("{}.M{}P{n}.agent", time.as_secs(), time.subsec_micros());
    let (tmp, new) = (maildir.join("tmp").join(&name), maildir.join("new").join(&name));
    let at = |what: &str, e: std::io::Error| Failure(format!("agent, {what}: {e}"));
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&tmp)
        .map_err(|e| at("create", e))?;
    let unix: Vec<u8> = mail.iter().copied().filter(|&c| c != b'\r').collect();
    for part in unix.chunks(8192) {
        file.write_all(part).map_err(|e| at("write", e))?;
    }
    file.sync_all().map_err(|e| at("fsync", e))?;
    drop(file);
    if n.is_multiple_of(2) {
        std::fs::rename(&tmp, &new).map_err(|e| at("rename", e))?;
        Ok(true)
    } else {
        std::fs::hard_link(&tmp, &new).map_err(|e| at("link", e))?;
        Ok(std::fs::remove_file(&tmp).is_ok())
    }
}

/// Makes this thread act as the mail user, and no other thread.
fn become_mail_user() {
    let (keep, id) = (u32::MAX, MAIL_UID);
    // SAFETY: plain system calls. The raw ones change the calling thread only, which is what is
    // wanted here; the C library's would change all threads.
    let failed = unsafe {
        libc::syscall(libc::SYS_setresgid, keep, id, keep) != 0
            || libc::syscall(libc::SYS_setresuid, keep, id, keep) != 0
    };
    assert!(!failed, "cannot become uid {id}");
}
