//! A mount on some store with a private Dovecot on it, and what can be asked of them.

use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::imap::Imap;
use crate::support::lmtp::Lmtp;
use crate::support::mount::Mount;
use crate::support::{MAIL_UID, weed};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmailfs::admin::Status;

pub const USER: &str = "anna";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreKind {
    S3,
    File,
}

impl StoreKind {
    pub fn name(self) -> &'static str {
        match self {
            StoreKind::S3 => "s3",
            StoreKind::File => "file",
        }
    }

    /// A mount on an empty store.
    pub fn mount(self) -> Mount {
        match self {
            StoreKind::File => Mount::on_directory(),
            StoreKind::S3 => {
                let server = weed::server();
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let bucket = runtime.block_on(server.new_bucket());
                let keys = (server.access_key_id(), server.secret_access_key());
                Mount::on_s3(&server.endpoint(), &bucket, keys.0, keys.1)
            }
        }
    }
}

/// How often the store was asked, by operation and reason.
#[derive(Debug, Clone, Default)]
pub struct Requests(pub BTreeMap<(String, String), u64>);

impl Requests {
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    pub fn since(&self, before: &Requests) -> Requests {
        let rows = self.0.iter().map(|(key, count)| {
            (key.clone(), count - before.0.get(key).copied().unwrap_or_default())
        });
        Requests(rows.filter(|(_, count)| *count > 0).collect())
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        for ((operation, reason), count) in &self.0 {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{count} {operation} {reason}");
        }
        if text.is_empty() { "nothing".to_owned() } else { text }
    }
}

#[derive(Debug)]
pub struct Site {
    pub mount: Mount,
    pub dovecot: Dovecot,
    pub format: Format,
    store: StoreKind,
}

impl Site {
    pub fn new(store: StoreKind, format: Format, options: &[&str]) -> Site {
        let mut mount = store.mount().option(options);
        mount.mount().unwrap();
        let users = [USER.to_owned()];
        let dovecot = Dovecot::start(&mount.root(), &Layout::usual(format), &users).unwrap();
        Site { mount, dovecot, format, store }
    }

    pub fn place(&self) -> String {
        format!("{}, {}", self.format.name(), self.store.name())
    }

    pub fn imap(&self) -> Imap {
        self.dovecot.imap(USER).unwrap()
    }

    pub fn requests(&self) -> Requests {
        let (ok, text) = self.mount.vmailfs(&["status", "--json"]).unwrap();
        assert!(ok, "{text}");
        let status: Status = serde_json::from_str(&text).unwrap();
        let rows = status.requests.into_iter();
        Requests(rows.map(|r| ((r.operation, r.reason), r.count)).collect())
    }

    pub fn flush(&self) {
        let (ok, text) = self.mount.vmailfs(&["metacache", "flush", "-u", USER]).unwrap();
        assert!(ok, "{text}");
    }

    /// Waits until no flush is due by itself any more.
    pub fn settle(&self) {
        std::thread::sleep(Duration::from_secs(2));
        self.flush();
    }

    /// The next SELECT is that of another machine.
    pub fn move_to_fresh_machine(&mut self) {
        self.dovecot.stop();
        self.mount.umount().unwrap();
        self.mount.wipe_state().unwrap();
        self.mount.mount().unwrap();
        self.dovecot.resume(&self.mount.root()).unwrap();
    }

    /// Fills a folder that exists, the fastest way that the format has.
    pub fn fill(&self, folder: &str, mails: usize) {
        match self.format {
            Format::Maildir => {
                let home = self.mount.root().join(USER);
                put_in_maildir(&home.join("mail").join(format!(".{folder}")), mails, 8);
                // Gives them their UIDs.
                assert_eq!(self.imap().select(folder).unwrap().exists as usize, mails);
            }
            Format::Sdbox | Format::Mdbox => append(&mut self.imap(), folder, mails),
        }
        self.flush();
    }

    pub fn deliver(&self, mails: usize) {
        let mut lmtp = self.dovecot.ports().lmtp().unwrap();
        for number in 0..mails {
            self.deliver_one(&mut lmtp, number);
        }
    }

    pub fn deliver_one(&self, lmtp: &mut Lmtp, number: usize) {
        let answers = lmtp.deliver(&[USER], &mail(number)).unwrap();
        assert!(answers.iter().all(|a| a.accepted()), "{answers:?}");
    }
}

/// A mail of about 2 kB.
pub fn mail(number: usize) -> Vec<u8> {
    let mut text = format!(
        "Message-ID: <{number}@client.test>\r\nFrom: Anna <anna@client.test>\r\n\
         To: somebody@mail.test\r\nSubject: number {number}\r\n\
         Date: Mon, 01 Jan 2024 10:00:00 +0000\r\n\r\n"
    );
    for line in 0..32 {
        let _ =
            write!(text, "Line {line} of mail {number}, and some more words to fill it up.\r\n");
    }
    text.into_bytes()
}

/// Mails by IMAP, many to a command.
fn append(imap: &mut Imap, folder: &str, mails: usize) {
    let numbers: Vec<usize> = (0..mails).collect();
    for some in numbers.chunks(250) {
        let texts: Vec<Vec<u8>> = some.iter().map(|n| mail(*n)).collect();
        imap.append_many(folder, &texts).unwrap();
    }
}

/// Mails into a Maildir as a mail server that is not Dovecot delivers them.
pub fn put_in_maildir(folder: &Path, mails: usize, threads: usize) {
    let dirs: Vec<PathBuf> = ["cur", "new", "tmp"].iter().map(|sub| folder.join(sub)).collect();
    for dir in std::iter::once(folder).chain(dirs.iter().map(PathBuf::as_path)) {
        if !dir.is_dir() {
            std::fs::DirBuilder::new().mode(0o700).create(dir).unwrap();
            chown(dir, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
        }
    }
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for number in (thread..mails).step_by(threads) {
                    let content = format!("Subject: {number}\n\nx\n");
                    // The lengths are those of Dovecot's names: they are most of a listing.
                    let base = format!("17{number:08}.M{:06}P4000.mail.test", number % 1_000_000);
                    let tmp = folder.join("tmp").join(&base);
                    let mut file = std::fs::OpenOptions::new()
                        .write(true)
                        .create_new(true)
                        .mode(0o600)
                        .open(&tmp)
                        .unwrap();
                    file.write_all(content.as_bytes()).unwrap();
                    chown(&tmp, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
                    drop(file);
                    let name = format!("{base},S={},W={}", content.len(), content.len() + 3);
                    std::fs::rename(&tmp, folder.join("new").join(&name)).unwrap();
                }
            });
        }
    });
}
