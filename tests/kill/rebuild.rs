//! A rebuild of mdbox while a mail is being stored, on a plain directory: nobody dies, and a mail
//! of which the mail server said that it has it is gone.
//!
//! The rebuild does not lock the files that it reads. It takes half a mail for damage, writes the
//! file anew without it, and whoever is storing goes on writing into the file that was replaced.
//! So a mail that is missing after such a repair tells nothing of a mount ([`replaces_a_file`]).

use super::half::bytes_below;
use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::messages::message;
use crate::support::workload::{Size, Workload, user_names};
use crate::support::{mail_root, scratch, wait_until};
use std::time::Duration;

/// The file of mdbox that Dovecot's log says to have been replaced; others may be appending to it.
pub fn replaces_a_file(format: Format, line: &str) -> Option<&str> {
    let (_, copy) = line.split_once("Copy of the broken file saved to ")?;
    let file = copy.split_whitespace().next()?.strip_suffix(".broken")?;
    (format == Format::Mdbox).then_some(file)
}

#[test]
fn on_a_plain_directory_it_loses_mail_that_is_being_stored() {
    let place = scratch("rebuild");
    let root = mail_root(place.path());
    let users = user_names(1);
    let user = &users[0];
    let work = Workload::new(7, &users);
    let dovecot = Dovecot::start(&root, &Layout::usual(Format::Mdbox), &users).unwrap();
    work.first_round(&dovecot, Size { one_by_one: 2, at_once: 0, to_all: 1, appended: 2 });
    work.must_have_worked(&dovecot, "before");

    let mut mail = message(work.seed(), "half");
    mail.bytes.extend(b"more of it\r\n".repeat(20_000));
    let size = || bytes_below(&root.join(user).join("mail"));
    let was = size();
    let (part, rest) = mail.bytes.split_at(mail.bytes.len() / 2);
    let mut imap = dovecot.imap(user).unwrap();
    imap.append_part("INBOX", &mail.bytes, part.len()).unwrap();
    assert!(wait_until(Duration::from_secs(20), || size() > was + 16_384), "nothing is stored");
    let (_, said) = dovecot.doveadm(&["force-resync", "-u", user, "INBOX"]).unwrap();
    let stored = imap.append_rest(rest).unwrap();
    drop(imap);

    let seen = dovecot.look().unwrap();
    let mails = &seen[user].folders["INBOX"].mails;
    let there = mails.iter().filter(|m| m.id.as_deref() == Some(mail.id.as_str())).count();
    let log = dovecot.complaints().join("\n");
    assert!(said.lines().any(|line| replaces_a_file(Format::Mdbox, line).is_some()), "{said}{log}");
    assert!(stored, "it was refused: {log}");
    assert_eq!(there, 0, "Dovecot has learnt it; then the kill test need not forgive it");
}
