//! What a mail client gets when a mail's object is gone from the store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};
use support::dovecot::{Dovecot, Format, Layout};
use support::imap::Imap;
use support::imap_text::Value;
use support::mount::Mount;
use support::{Outcome, fail};

const USER: &str = "anna@mail.test";

fn objects(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            objects(&path, found);
        } else if path.parent().is_some_and(|p| p.ends_with("mail")) {
            found.push(path);
        }
    }
}

fn texts(value: &Value, all: &mut Vec<u8>) {
    match value {
        Value::Atom(_) => {}
        Value::Text(bytes) => all.extend(bytes),
        Value::List(values) => values.iter().for_each(|value| texts(value, all)),
    }
}

fn mail(subject: &str) -> Vec<u8> {
    format!("From: a@mail.test\r\nSubject: {subject}\r\n\r\nThis is {subject}.\r\n").into_bytes()
}

/// Three mails, of which the second is lost; the first and third are not cached either.
struct Site {
    mount: Mount,
    dovecot: Dovecot,
    lost: PathBuf,
    bytes: Vec<u8>,
}

impl Site {
    fn new(options: &[&str]) -> Outcome<Site> {
        let mut mount = Mount::on_directory().option(options);
        mount.mount()?;
        let layout = Layout::usual(Format::Maildir).setting("imap_fetch_failure = no-after");
        let dovecot = Dovecot::start(&mount.root(), &layout, &[USER.into()])?;
        let mut lmtp = dovecot.ports().lmtp()?;
        for subject in ["one", "two", "three"] {
            let answers = lmtp.deliver(&[USER], &mail(subject))?;
            assert!(answers.iter().all(|a| a.accepted()));
        }
        let mut all = Vec::new();
        objects(&mount.root().parent().unwrap().join("store"), &mut all);
        let two = all
            .iter()
            .find(|p| String::from_utf8_lossy(&std::fs::read(p).unwrap()).contains("Subject: two"));
        let lost = two.expect("the object of the second mail").clone();
        let bytes = std::fs::read(&lost)?;
        std::fs::remove_file(&lost)?;
        for entry in std::fs::read_dir(mount.state().join("fscache"))? {
            let path = entry?.path();
            if !path.ends_with(".part") && path.is_dir() {
                std::fs::remove_dir_all(path)?;
            }
        }
        Ok(Site { mount, dovecot, lost, bytes })
    }

    fn imap(&self) -> Outcome<Imap> {
        let mut imap = self.dovecot.imap(USER)?;
        imap.select("INBOX")?;
        Ok(imap)
    }

    /// Subjects that a client is given which fetches everything, and whether it is told OK.
    fn subjects(&self) -> Outcome<(Vec<&'static str>, bool)> {
        let mut imap = self.imap()?;
        let (ok, reply) = imap.attempt(b"UID FETCH 1:* BODY.PEEK[]")?;
        let mut text = Vec::new();
        reply.untagged.iter().flatten().for_each(|value| texts(value, &mut text));
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut known = vec!["one", "two", "three"];
        known.retain(|s| text.contains(&format!("This is {s}.")));
        Ok((known, ok))
    }

    fn restore(&self) -> Outcome<()> {
        Ok(std::fs::write(&self.lost, &self.bytes)?)
    }

    fn nobody_took_it_for_the_truth(&self) -> Outcome<()> {
        self.restore()?;
        if self.subjects()? != (vec!["one", "two", "three"], true) {
            return fail("the mail is back in the store and not in the mailbox");
        }
        let (_, text) = self.mount.vmailfs(&["status", self.mount.root().to_str().unwrap()])?;
        assert!(text.contains("Lost mails met: 1"), "{text}");
        Ok(())
    }
}

#[test]
fn i4_others_are_read_and_the_client_is_told() {
    let site = Site::new(&[]).unwrap();
    assert_eq!(site.subjects().unwrap(), (vec!["one", "three"], false));
    site.nobody_took_it_for_the_truth().unwrap();
}

#[test]
fn i4_a_site_may_have_them_blank() {
    let site = Site::new(&["-o", "lost_mails=empty,lost_mails_for=anna@*"]).unwrap();
    assert_eq!(site.subjects().unwrap(), (vec!["one", "three"], true));
    let complaints = site.dovecot.complaints();
    assert!(complaints.is_empty(), "{complaints:?}");
    site.nobody_took_it_for_the_truth().unwrap();
}
