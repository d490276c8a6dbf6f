//! A private Dovecot of one user on a plain directory, without a server: `doveadm` for
//! everything, and `doveadm exec imap` for IMAP.

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
};

use serde_json::Value;

/// Mail processes run as this when the tests run as root.
const MAIL_UID: u32 = 5000;

pub struct Dovecot {
    dir: tempfile::TempDir,
    log: Mutex<String>,
}

/// A mail as Dovecot shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub uid: u32,
    pub subject: String,
    pub flags: String,
    pub body: String,
}

/// What STATUS says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub messages: u32,
    pub uidnext: u32,
    pub uidvalidity: u32,
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

impl Dovecot {
    /// `None`, with a word on stderr, where Dovecot is not installed. `rotating`: index logs
    /// are rotated, and snapshots written, every few changes.
    pub fn new(format: &str, rotating: bool) -> Option<Dovecot> {
        if Command::new("doveadm").arg("--version").output().is_err() {
            eprintln!("skipped: doveadm is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let root = dir.path().display();
        let mut config = format!(
            "base_dir = {root}/run\nstate_dir = {root}/run\nprotocols = imap\nssl = no\n\
             mail_location = {format}:{root}/home/mail:INDEX={root}/home/index\n\
             namespace inbox {{\n  inbox = yes\n}}\n"
        );
        if is_root() {
            config += &format!(
                "mail_uid = {MAIL_UID}\nmail_gid = {MAIL_UID}\n\
                 first_valid_uid = {MAIL_UID}\nfirst_valid_gid = {MAIL_UID}\n"
            );
        }
        if rotating {
            config += "mail_index_log_rotate_min_size = 1k\nmail_index_log_rotate_min_age = 0\n\
                       mail_index_log_rotate_max_size = 1k\n\
                       mail_index_rewrite_min_log_bytes = 256\n\
                       mail_index_rewrite_max_log_bytes = 512\n";
        }
        fs::write(dir.path().join("dovecot.conf"), config).unwrap();
        fs::create_dir(dir.path().join("home")).unwrap();
        let dovecot = Dovecot { dir, log: Mutex::default() };
        dovecot.own();
        Some(dovecot)
    }

    /// Below the user's home: `mail/`, `index/`.
    pub fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join("home").join(below)
    }

    /// Gives everything to the mail user again, after the test wrote.
    pub fn own(&self) {
        if is_root() {
            own_tree(&self.path(""));
        }
    }

    /// Runs doveadm; its complaints go to [`Dovecot::log`].
    pub fn doveadm(&self, args: &[&str], input: &str) -> String {
        let mut child = Command::new("doveadm")
            .arg("-c")
            .arg(self.dir.path().join("dovecot.conf"))
            .args(args)
            .env("USER", "anna")
            .env("HOME", self.path(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        self.log.lock().unwrap().push_str(&errors);
        assert!(output.status.success(), "doveadm {args:?}: {} {errors}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Delivers a mail.
    pub fn save(&self, folder: &str, subject: &str) {
        let mail = format!("From: a@b\nSubject: {subject}\n\nbody of {subject}\n");
        self.doveadm(&["save", "-m", folder], &mail);
    }

    /// Gives commands to a pre-authenticated IMAP session; all its answers.
    pub fn imap(&self, commands: &[&str]) -> String {
        let mut text = String::new();
        for (n, command) in commands.iter().enumerate() {
            text += &format!("a{n} {command}\r\n");
        }
        text += "z LOGOUT\r\n";
        let answers = self.doveadm(&["exec", "imap"], &text);
        for n in 0..commands.len() {
            assert!(answers.contains(&format!("a{n} OK")), "{commands:?}: {answers}");
        }
        answers
    }

    /// All mails of a folder, with the words of `flags` sorted and without `\Recent`.
    pub fn mails(&self, folder: &str) -> Vec<Shown> {
        let query = ["-f", "json", "fetch", "uid flags hdr.subject body", "mailbox", folder];
        let json: Value = serde_json::from_str(&self.doveadm(&query, "")).unwrap();
        let text = |mail: &Value, key: &str| mail[key].as_str().unwrap_or_default().to_owned();
        let mail = |mail: &Value| {
            let flags = text(mail, "flags");
            let mut flags: Vec<&str> =
                flags.split_whitespace().filter(|f| *f != "\\Recent").collect();
            flags.sort_unstable();
            Shown {
                uid: text(mail, "uid").parse().unwrap(),
                subject: text(mail, "hdr.subject"),
                flags: flags.join(" "),
                body: text(mail, "body").trim().to_owned(),
            }
        };
        json.as_array().unwrap().iter().map(mail).collect()
    }

    pub fn status(&self, folder: &str) -> Status {
        let query = ["-f", "json", "mailbox", "status", "messages uidnext uidvalidity", folder];
        let json: Value = serde_json::from_str(&self.doveadm(&query, "")).unwrap();
        let number = |key: &str| json[0][key].as_str().unwrap().parse().unwrap();
        Status {
            messages: number("messages"),
            uidnext: number("uidnext"),
            uidvalidity: number("uidvalidity"),
        }
    }

    /// What Dovecot complained about since the last call.
    pub fn log(&self) -> String {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// Dovecot found nothing wrong and rebuilt nothing.
    pub fn assert_content(&self) {
        let log = self.log();
        for word in ["Error:", "Warning:", "Panic:", "orrupt", "fsck", "rebuil"] {
            assert!(!log.contains(word), "{log}");
        }
    }

    pub fn force_resync(&self) {
        self.doveadm(&["force-resync", "*"], "");
    }

    /// Replaces a directory by another.
    pub fn put_back(&self, saved: &Path, below: &str) {
        fs::remove_dir_all(self.path(below)).unwrap();
        copy_tree(saved, &self.path(below));
        self.own();
    }
}

fn own_tree(path: &Path) {
    chown(path, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| own_tree(&entry.unwrap().path()));
    }
}

/// Copies a directory; `to` must not exist.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
