//! The end-to-end harness over a plain directory: what it demands of the mount, a local file
//! system gives; and what it is there to find, it finds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;
use support::check::{Kind, Problem, Tolerance, compare};
use support::dovecot::{Dovecot, Format, Layout};
use support::imap::flags;
use support::imap_text::{date_time, decode_name, encode_name, parse_date_time};
use support::workload::{Size, Workload, user_names};
use support::{mail_root, remove_locks, scratch};

fn workload_passes(format: Format) {
    let place = scratch("plain");
    let root = mail_root(place.path());
    let users = user_names(3);
    let layout = Layout::usual(format);
    let mut dovecot = Dovecot::start(&root, &layout, &users).unwrap();
    let work = Workload::new(1, &users);
    work.first_round(&dovecot, Size::USUAL);
    work.must_have_worked(&dovecot, "first round");
    work.must_hold(&dovecot, Tolerance::Nothing, "first round");

    dovecot.stop();
    dovecot.resume(&root).unwrap();
    work.must_hold(&dovecot, Tolerance::Nothing, "after a restart");
    work.more(&dovecot);
    work.must_have_worked(&dovecot, "second round");
    work.must_hold(&dovecot, Tolerance::Nothing, "second round");

    let ports = dovecot.ports();
    work.traffic_until(ports, Duration::from_millis(600), || dovecot.kill9());
    remove_locks(&root);
    dovecot.resume(&root).unwrap();
    work.let_dovecot_repair(&dovecot);
    work.must_hold(&dovecot, Tolerance::Nothing, "after a crash of the mail server");
    dovecot.stop();
    dovecot.resume(&root).unwrap();
    work.changes(&dovecot);
    work.must_have_worked(&dovecot, "work after the crash");
    work.must_hold(&dovecot, Tolerance::Nothing, "work after the crash");
}

#[test]
fn maildir() {
    workload_passes(Format::Maildir);
}

#[test]
fn sdbox() {
    workload_passes(Format::Sdbox);
}

#[test]
fn mdbox() {
    workload_passes(Format::Mdbox);
}

/// A user's mailboxes after the first round, with Dovecot stopped.
struct Quiet {
    _place: tempfile::TempDir,
    root: PathBuf,
    dovecot: Dovecot,
    work: Workload,
}

impl Quiet {
    fn new(format: Format) -> Quiet {
        let place = scratch("tamper");
        let root = mail_root(place.path());
        let users = user_names(1);
        let mut dovecot = Dovecot::start(&root, &Layout::usual(format), &users).unwrap();
        let work = Workload::new(5, &users);
        work.first_round(&dovecot, Size::SHORT);
        work.must_have_worked(&dovecot, "first round");
        work.must_hold(&dovecot, Tolerance::Nothing, "first round");
        dovecot.stop();
        Quiet { _place: place, root, dovecot, work }
    }

    fn drop_inbox_index(&self) {
        let indexes = self.root.join("user0@mail.test/index");
        let inbox = match self.dovecot.layout.format {
            Format::Maildir => indexes.join(".INBOX"),
            _ => indexes.join("mailboxes/INBOX"),
        };
        std::fs::remove_dir_all(inbox).unwrap();
    }

    fn mail_dir(&self) -> PathBuf {
        self.root.join("user0@mail.test/mail")
    }

    /// What the checker says after somebody has tampered with the files.
    fn kinds(&mut self) -> Vec<Kind> {
        self.dovecot.resume(&self.root).unwrap();
        let problems = self.dovecot.check(&self.work.model(), Tolerance::Nothing).unwrap();
        self.dovecot.kill9();
        kinds(&problems)
    }
}

fn kinds(problems: &[Problem]) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = problems.iter().map(|p| p.kind).collect();
    kinds.dedup();
    kinds
}

fn names(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    names.sort();
    names
}

/// The first mail of INBOX whose file name ends as given.
fn mail_ending(quiet: &Quiet, end: &str) -> PathBuf {
    let files = names(&quiet.mail_dir().join("cur")).into_iter();
    let mut files = files.filter(|p| p.to_string_lossy().ends_with(end));
    files.next().unwrap_or_else(|| panic!("no mail ends with {end}"))
}

#[test]
fn a_deleted_file_is_a_lost_mail() {
    let mut quiet = Quiet::new(Format::Maildir);
    std::fs::remove_file(mail_ending(&quiet, "S")).unwrap();
    assert_eq!(quiet.kinds(), [Kind::Lost]);
}

#[test]
fn changed_flags_are_found() {
    let mut quiet = Quiet::new(Format::Maildir);
    let old = mail_ending(&quiet, ":2,S");
    let new = old.to_string_lossy().replace(":2,S", ":2,RS");
    std::fs::rename(&old, new).unwrap();
    assert_eq!(quiet.kinds(), [Kind::Flags]);
}

#[test]
fn swapped_uids_are_found() {
    let mut quiet = Quiet::new(Format::Maildir);
    let path = quiet.mail_dir().join("dovecot-uidlist");
    let list = std::fs::read_to_string(&path).unwrap();
    let mut lines: Vec<String> = list.lines().map(str::to_owned).collect();
    let (first, second) = (lines[1].clone(), lines[2].clone());
    let (uid1, name1) = first.split_once(' ').unwrap();
    let (uid2, name2) = second.split_once(' ').unwrap();
    lines[1] = format!("{uid1} {name2}");
    lines[2] = format!("{uid2} {name1}");
    std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    quiet.drop_inbox_index();
    let found = quiet.kinds();
    assert!(found.contains(&Kind::UidChanged) && found.contains(&Kind::UidReused), "{found:?}");
}

#[test]
fn changed_contents_dates_and_copies_are_found() {
    let mut quiet = Quiet::new(Format::Maildir);
    let path = mail_ending(&quiet, "S");
    let old = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(old).unwrap();
    assert_eq!(quiet.kinds(), [Kind::Content]);

    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(old - Duration::from_secs(60)).unwrap();
    let copy = quiet.mail_dir().join("new/1700000000.M1P1.elsewhere");
    std::fs::copy(&path, &copy).unwrap();
    std::os::unix::fs::chown(&copy, Some(support::MAIL_UID), None).unwrap();
    // Dates are cached; without the cache the file's own counts.
    quiet.drop_inbox_index();
    let found = quiet.kinds();
    for kind in [Kind::Content, Kind::Duplicate, Kind::Date] {
        assert!(found.contains(&kind), "{kind:?} is not in {found:?}");
    }
}

#[test]
fn lost_indexes_of_sdbox_are_found() {
    let mut quiet = Quiet::new(Format::Sdbox);
    quiet.drop_inbox_index();
    let found = quiet.kinds();
    for kind in [Kind::UidValidityChanged, Kind::Lost] {
        assert!(found.contains(&kind), "{kind:?} is not in {found:?}");
    }
}

#[test]
fn changed_folders_are_found() {
    let mut quiet = Quiet::new(Format::Maildir);
    let mail = quiet.mail_dir();
    std::fs::rename(mail.join(".Sent"), mail.join(".Extra")).unwrap();
    std::fs::write(mail.join("subscriptions"), "V\t2\n\nSent\n").unwrap();
    let found = quiet.kinds();
    assert_eq!(found, [Kind::Subscriptions, Kind::FolderMissing, Kind::FolderExtra]);
}

#[test]
fn a_mail_that_comes_back_is_found() {
    let mut quiet = Quiet::new(Format::Maildir);
    let old = mail_ending(&quiet, "S");
    let saved = std::fs::read(&old).unwrap();
    quiet.dovecot.resume(&quiet.root).unwrap();
    let id = support::messages::identify(&saved).0.unwrap();
    let ports = quiet.dovecot.ports();
    let user = "user0@mail.test";
    let mut session = support::session::Session::open(&quiet.work, ports, user).unwrap();
    session.expunge("INBOX", &id).unwrap();
    session.imap.logout();
    quiet.dovecot.stop();
    assert_eq!(quiet.kinds(), []);
    std::fs::write(&old, &saved).unwrap();
    std::os::unix::fs::chown(&old, Some(support::MAIL_UID), None).unwrap();
    assert_eq!(quiet.kinds(), [Kind::Resurrected]);
}

/// The comparison alone, on what a server could show.
#[test]
fn a_lost_machine_may_undo_what_was_fresh_and_nothing_else() {
    let mut quiet = Quiet::new(Format::Sdbox);
    let user = "user0@mail.test";
    quiet.work.model().settled();
    quiet.dovecot.resume(&quiet.root).unwrap();
    let before = quiet.dovecot.look().unwrap();
    let ids: Vec<String> =
        before[user].folders["INBOX"].mails.iter().map(|m| m.id.clone().unwrap()).collect();
    let archive: Vec<Option<String>> =
        before[user].folders["Archive"].mails.iter().map(|m| m.id.clone()).collect();
    let mut free = ids.iter().filter(|id| !archive.contains(&Some((*id).clone())));
    let (moved, flagged) = (free.next().unwrap(), free.next().unwrap());
    let ports = quiet.dovecot.ports();
    let mut session = support::session::Session::open(&quiet.work, ports, user).unwrap();
    session.move_to("INBOX", "Archive", moved).unwrap();
    session.store("INBOX", flagged, "+", &["\\Draft", "Late"]).unwrap();
    session.imap.logout();

    let model = quiet.work.model();
    let strict = kinds(&compare(&model, &before, Tolerance::Nothing));
    for kind in [Kind::Lost, Kind::Resurrected, Kind::Flags, Kind::UidNextWentBack] {
        assert!(strict.contains(&kind), "{kind:?} is not in {strict:?}");
    }
    let mut undone = before.clone();
    let seen = undone.get_mut(user).unwrap();
    // The UID of the undone copy is burnt, not given again.
    seen.folders.get_mut("Archive").unwrap().uid_next += 1;
    assert_eq!(compare(&model, &undone, Tolerance::LostMachine), []);

    // The moved mail in neither folder, and a change to one that nobody had touched.
    let seen = undone.get_mut(user).unwrap();
    let inbox = &mut seen.folders.get_mut("INBOX").unwrap().mails;
    inbox.retain(|m| m.id.as_ref() != Some(moved));
    let other = inbox.iter_mut().find(|m| m.id.as_ref() != Some(flagged)).unwrap();
    other.flags = flags(&["Other"]);
    let found = kinds(&compare(&model, &undone, Tolerance::LostMachine));
    assert_eq!(found, [Kind::Lost, Kind::Flags]);
}

#[test]
fn dates_and_names_survive_the_wire() {
    for seconds in [0, 951_782_399, 951_782_400, 1_709_164_800, 4_102_444_799] {
        assert_eq!(parse_date_time(&date_time(seconds)), Some(seconds));
    }
    assert_eq!(date_time(951_782_400), "29-Feb-2000 00:00:00 +0000");
    assert_eq!(parse_date_time(" 1-Jan-1970 01:00:00 +0100"), Some(0));
    for (name, wire) in
        [("Entwürfe", "Entw&APw-rfe"), ("Q1 & Q2", "Q1 &- Q2"), ("日本語", "&ZeVnLIqe-")]
    {
        assert_eq!(encode_name(name), wire);
        assert_eq!(decode_name(wire), name);
    }
}
