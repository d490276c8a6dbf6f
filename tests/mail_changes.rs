//! `changes` is right for real Dovecot traffic of each format: what the listing and the mails
//! would bring back is unimportant, what a lost machine would undo is important.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;
use support::dovecot::{Dovecot, Format, Layout};
use support::imap::{Imap, flags};
use support::mount::Mount;
use support::{Outcome, wait_until};

const USER: &str = "anna@mail.test";

struct Site {
    mount: Mount,
    dovecot: Dovecot,
    format: Format,
}

fn mail(subject: &str) -> Vec<u8> {
    format!(
        "From: a@mail.test\r\nSubject: {subject}\r\nMIME-Version: 1.0\r\n\
         Content-Type: multipart/mixed; boundary=\"b\"\r\n\r\n\
         --b\r\nContent-Type: text/plain\r\n\r\nThis is {subject}.\r\n\
         --b\r\nContent-Type: application/pdf\r\nContent-Disposition: attachment; filename=a.pdf\r\n\r\n\
         %PDF\r\n--b--\r\n"
    )
    .into_bytes()
}

impl Site {
    /// Nothing is flushed but when a test says so.
    fn new(format: Format) -> Outcome<Site> {
        let mut mount = Mount::on_directory();
        for option in [
            "metacache.upload_interval=10h",
            "metacache.folder_change_quiet=10h",
            "metacache.folder_change_max=10h",
            "metacache.max_rescan_mail_count=1000",
        ] {
            mount = mount.option(&["--set", option]);
        }
        mount.mount()?;
        let layout = Layout::usual(format).setting("mail_attachment_detection_options = add-flags");
        let dovecot = Dovecot::start(&mount.root(), &layout, &[USER.into()])?;
        Ok(Site { mount, dovecot, format })
    }

    fn deliver(&self, subject: &str) -> Outcome<()> {
        let answers = self.dovecot.ports().lmtp()?.deliver(&[USER], &mail(subject))?;
        assert!(answers.iter().all(|a| a.accepted()));
        Ok(())
    }

    fn changes(&self) -> String {
        let (ok, text) = self.mount.vmailfs(&["status", "--json"]).unwrap();
        assert!(ok, "{text}");
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        let users = status["users"].as_array().unwrap();
        let of = users.iter().find(|u| u["user"] == USER);
        of.map_or("none".into(), |u| u["changes"].as_str().unwrap().to_string())
    }

    fn last_service(&self) -> String {
        let (ok, text) = self.mount.vmailfs(&["metacache", "list", "-f", "json", USER]).unwrap();
        assert!(ok, "{text}");
        let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
        rows[0]["last-service"].as_str().unwrap_or("-").to_owned()
    }

    fn flush(&self) {
        // What is still on its way ends up in one of a few flushes.
        let settled = wait_until(Duration::from_secs(120), || {
            let (ok, text) = self.mount.vmailfs(&["metacache", "flushall"]).unwrap();
            assert!(ok, "{text}");
            std::thread::sleep(Duration::from_millis(200));
            self.changes() != "important"
        });
        assert!(settled, "{:?}: changes do not end", self.format);
    }

    /// What `what` leaves, from a flush on.
    fn after(&self, step: &str, want: &[&str], what: impl FnOnce() -> Outcome<()>) {
        self.flush();
        what().unwrap_or_else(|e| panic!("{:?} {step}: {e:?}", self.format));
        // Some of it is written after the answer; nothing more comes of it.
        wait_until(Duration::from_secs(30), || want.contains(&self.changes().as_str()));
        std::thread::sleep(Duration::from_millis(300));
        let found = self.changes();
        assert!(want.contains(&found.as_str()), "{:?}: after {step}: {found}", self.format);
    }
}

fn changes_of(format: Format) -> Outcome<()> {
    let site = Site::new(format)?;
    for subject in ["one", "two", "three"] {
        site.deliver(subject)?;
    }
    let mut imap: Imap = site.dovecot.imap(USER)?;
    imap.select("INBOX")?;
    imap.create("Work")?;
    imap.append("Work", &flags(&[]), None, &mail("in work"))?;
    const IMPORTANT: &[&str] = &["important"];
    const UNIMPORTANT: &[&str] = &["unimportant"];

    assert_eq!(site.last_service(), "imap", "{format:?}");
    site.after("a delivery", UNIMPORTANT, || site.deliver("four"));
    assert_eq!(site.last_service(), "lmtp", "{format:?}");
    // The mailbox is looked at, which moves Maildir's mails from new to cur.
    site.after("a client's look", &["none", "unimportant"], || imap.select("INBOX").map(drop));
    site.after("another delivery", UNIMPORTANT, || site.deliver("five"));
    site.after("a write to the cache", &["none", "unimportant"], || {
        imap.select("INBOX")?;
        imap.command(
            "UID FETCH 1:* (ENVELOPE BODYSTRUCTURE RFC822.SIZE BODY.PEEK[HEADER.FIELDS (X-Y)])",
        )
        .map(drop)
    });
    let has = |imap: &mut Imap| -> Outcome<bool> {
        Ok(imap.fetch_all()?.iter().any(|mail| mail.flags.contains("$HasAttachment")))
    };
    assert!(has(&mut imap)?, "{format:?}: Dovecot did not set $HasAttachment at delivery");
    site.after("a flag", IMPORTANT, || imap.store(1, "+", &flags(&["\\Flagged"])));
    site.after("a keyword", IMPORTANT, || imap.store(2, "+", &flags(&["Later"])));
    site.after("a keyword that is known", IMPORTANT, || imap.store(3, "+", &flags(&["Later"])));
    site.after("an expunge", IMPORTANT, || {
        imap.store(1, "+", &flags(&["\\Deleted"]))?;
        imap.expunge(1)
    });
    site.after("a copy", IMPORTANT, || imap.copy(2, "Work").map(drop));
    site.after("a subscription", IMPORTANT, || imap.subscribe("Work"));
    site.after("a new folder", IMPORTANT, || imap.create("Fresh"));
    site.after("a renamed folder", IMPORTANT, || imap.rename("Fresh", "Renamed"));
    site.after("a deleted folder", IMPORTANT, || imap.delete("Renamed"));
    site.after("a last delivery", UNIMPORTANT, || site.deliver("six"));
    imap.logout();
    Ok(())
}

#[test]
fn changes_of_maildir() {
    changes_of(Format::Maildir).unwrap();
}

#[test]
fn changes_of_sdbox() {
    changes_of(Format::Sdbox).unwrap();
}

#[test]
fn changes_of_mdbox() {
    changes_of(Format::Mdbox).unwrap();
}
