//! A mail server that dies in the middle of storing a mail, on a plain directory and on a mount
//! that goes on: what it then says of its mailboxes it says in both places, and nothing is lost
//! in either.
//!
//! The file that mdbox appends to ends in half a mail; the next who appends calls that corrupted
//! and rebuilds. So such a line in the log tells of a mount's mistake only where no server was
//! killed over a mount that lived.

use super::trial::names_corruption;
use crate::support::check::Tolerance;
use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::imap::Flags;
use crate::support::messages::message;
use crate::support::model::Op;
use crate::support::mount::Mount;
use crate::support::workload::{Size, Workload, user_names};
use crate::support::{mail_root, remove_locks, scratch, wait_until};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

/// What happens to the mount while no mail server runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    Unmounted,
    Killed,
}

/// What the log says, without what differs from run to run.
type Said = BTreeSet<String>;

/// The bytes of all files below a directory.
pub fn bytes_below(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

fn said_of(dovecot: &Dovecot, root: &Path) -> Said {
    let root = root.display().to_string();
    let lines = dovecot.complaints();
    let said = lines.iter().filter(|line| names_corruption(line)).map(|line| {
        let text = line.split_once(">: ").map_or(line.as_str(), |(_, text)| text);
        // Who meets it first is a matter of luck.
        let text = text
            .rsplit_once(": rcpt ")
            .and_then(|(_, t)| Some(t.split_once(": ")?.1))
            .unwrap_or(text);
        let text = text.trim_start_matches("Error: ").replace(&root, "");
        text.chars().filter(|c| !c.is_ascii_digit()).collect()
    });
    said.collect()
}

/// Stores mails, kills the server in the middle of one, lets it start again and store more.
fn half(format: Format, root: &Path, mut meanwhile: impl FnMut()) -> Said {
    let users = user_names(1);
    let user = &users[0];
    let work = Workload::new(7, &users);
    let mut dovecot = Dovecot::start(root, &Layout::usual(format), &users).unwrap();
    work.first_round(&dovecot, Size { one_by_one: 2, at_once: 0, to_all: 1, appended: 2 });
    work.must_have_worked(&dovecot, "before");
    work.must_hold(&dovecot, Tolerance::Nothing, "before");

    let mut mail = message(work.seed(), &work.next_id("half"));
    mail.bytes.extend(b"more of it\r\n".repeat(10_000));
    let op = Op::Put {
        folder: "INBOX".into(),
        id: mail.id.clone(),
        hash: mail.hash.clone(),
        flags: Flags::new(),
        date: None,
    };
    let _unanswered = work.model().begin(user, op);
    let home = root.join(user).join("mail");
    let before = bytes_below(&home);
    let mut imap = dovecot.imap(user).unwrap();
    let part = mail.bytes.len() / 2;
    imap.append_part("INBOX", &mail.bytes, part).unwrap();
    let long = Duration::from_secs(20);
    assert!(wait_until(long, || bytes_below(&home) > before + 16_384), "nothing is stored");
    dovecot.kill9();
    drop(imap);
    meanwhile();
    remove_locks(root);
    dovecot.resume(root).unwrap();
    work.model().resolve();
    work.must_hold(&dovecot, Tolerance::Nothing, "with half a mail");
    work.changes(&dovecot);
    // A rebuild ends sessions.
    let _refused = work.failures();
    work.model().resolve();
    work.must_hold(&dovecot, Tolerance::Nothing, "once more was stored");
    said_of(&dovecot, root)
}

fn on_a_plain_directory(format: Format) -> Said {
    let place = scratch("half");
    half(format, &mail_root(place.path()), || ())
}

fn on_a_mount(format: Format, what: Meanwhile) -> Said {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let root = mount.root();
    half(format, &root, || match what {
        Meanwhile::Nothing => {}
        Meanwhile::Unmounted => {
            mount.umount().unwrap();
            mount.mount().unwrap();
        }
        Meanwhile::Killed => {
            mount.shoot().unwrap();
            mount.kill9();
            mount.mount().unwrap();
        }
    })
}

/// What Dovecot says of the end of a file of mdbox that it died over: none of it comes after a
/// death of the daemon alone, because half a mail is in no object.
pub fn of_half_a_mail(format: Format, line: &str) -> bool {
    let said = [
        "msg header has bad magic value",
        "Copy of the broken file saved to",
        // It died in the middle of the repair, and has such a copy already.
        ".broken) failed: File exists",
    ];
    format == Format::Mdbox && said.iter().any(|text| line.contains(text))
}

#[test]
fn maildir() {
    assert_eq!(on_a_mount(Format::Maildir, Meanwhile::Unmounted), Said::new());
}

#[test]
fn sdbox() {
    assert_eq!(on_a_mount(Format::Sdbox, Meanwhile::Unmounted), Said::new());
}

#[test]
fn mdbox() {
    let plain = on_a_plain_directory(Format::Mdbox);
    assert!(plain.iter().any(|line| of_half_a_mail(Format::Mdbox, line)), "{plain:#?}");
    for what in [Meanwhile::Nothing, Meanwhile::Unmounted] {
        assert_eq!(on_a_mount(Format::Mdbox, what), plain, "{what:?}");
    }
    // The half that nobody synced may be there or not.
    let killed = on_a_mount(Format::Mdbox, Meanwhile::Killed);
    assert!(killed.is_subset(&plain), "{killed:#?}, and on a plain directory {plain:#?}");
}
