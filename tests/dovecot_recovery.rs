//! The records that a recovery writes, judged by a real Dovecot on a plain directory.
//!
//! Each test makes an older state of the indexes ("the last cut"), goes on delivering, puts the
//! old indexes back beside the newer mails, as a recovery by listing finds them, applies the
//! recovery's bytes, and asks Dovecot. Dovecot must show everything at once, keep every UID and
//! flag of the old state, give no UID below the ceiling, and complain of nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/recovery_dovecot.rs"]
mod recovery_dovecot;

use std::{
    fs,
    path::{Path, PathBuf},
};

use recovery_dovecot::{Dovecot, Shown, copy_tree};
use vmailfs::dovecot::{
    index_log::{self, LogTracker},
    recover::{self, LogAppend},
    recover_mdbox::{MdboxFolder, MdboxInput, MdboxOutput, MdboxRange, recover_mdbox},
    replay::{IndexState, replay},
    uidlist,
};

const CEILING: u32 = 1005;

/// The files of one index.
struct Index {
    dir: PathBuf,
    prefix: &'static str,
    snapshot: Option<Vec<u8>>,
    logs: Vec<Vec<u8>>,
}

impl Index {
    fn read(dir: &Path, prefix: &'static str) -> Index {
        let file = |suffix: &str| fs::read(dir.join(format!("{prefix}{suffix}"))).ok();
        let mut logs = Vec::new();
        logs.extend(file(".log.2"));
        logs.extend(file(".log"));
        Index { dir: dir.to_owned(), prefix, snapshot: file(""), logs }
    }

    fn folder(dovecot: &Dovecot, name: &str) -> Index {
        let dir = dovecot.path(&format!("index/mailboxes/{name}"));
        Index::read(&dir, "dovecot.index")
    }

    fn logs(&self) -> Vec<&[u8]> {
        self.logs.iter().map(Vec::as_slice).collect()
    }

    fn state(&self) -> IndexState {
        replay(self.snapshot.as_deref(), &self.logs()).unwrap()
    }

    fn newest(&self) -> &[u8] {
        self.logs.last().unwrap()
    }

    fn apply(&self, append: &LogAppend) {
        let mut log = self.newest().to_vec();
        log.truncate(append.at);
        log.extend_from_slice(&append.bytes);
        fs::write(self.dir.join(format!("{}.log", self.prefix)), log).unwrap();
    }
}

/// What our reader says must be what Dovecot shows.
fn assert_read_right(index: &Index, mails: &[Shown], uidnext: u32) {
    let state = index.state();
    let ours: Vec<(u32, String)> = state
        .records
        .iter()
        .map(|(uid, record)| {
            let names = ["\\Answered", "\\Flagged", "\\Deleted", "\\Seen", "\\Draft"];
            let mut flags: Vec<&str> =
                (0..5).filter(|bit| record.flags & 1 << bit != 0).map(|bit| names[bit]).collect();
            flags.extend(state.keywords_of(*uid));
            flags.sort_unstable();
            (*uid, flags.join(" "))
        })
        .collect();
    let theirs: Vec<_> = mails.iter().map(|m| (m.uid, m.flags.clone())).collect();
    assert_eq!(ours, theirs);
    assert_eq!(state.next_uid, uidnext);
}

fn deliver(dovecot: &Dovecot, folder: &str, subjects: std::ops::Range<u32>) {
    for n in subjects {
        dovecot.save(folder, &format!("{folder}{n}"));
    }
}

fn subjects(mails: &[Shown]) -> Vec<&str> {
    mails.iter().map(|m| m.subject.as_str()).collect()
}

fn uids(mails: &[Shown]) -> Vec<u32> {
    mails.iter().map(|m| m.uid).collect()
}

fn assert_bodies(mails: &[Shown]) {
    for mail in mails {
        assert_eq!(mail.body, format!("body of {}", mail.subject));
    }
}

/// Five mails with flags and keywords, and one that was expunged.
fn fill(dovecot: &Dovecot) {
    deliver(dovecot, "INBOX", 0..6);
    dovecot.imap(&[
        "SELECT INBOX",
        "STORE 1,2 +FLAGS (\\Seen work)",
        "STORE 3 +FLAGS (\\Flagged later)",
        "STORE 6 +FLAGS (\\Deleted)",
        "EXPUNGE",
        "STORE 1 -FLAGS (work)",
    ]);
}

fn sdbox(rotating: bool, deliver_first: bool) {
    let Some(dovecot) = Dovecot::new("sdbox", rotating) else { return };
    fill(&dovecot);
    let before = dovecot.mails("INBOX");
    let status = dovecot.status("INBOX");
    let saved = tempfile::tempdir().unwrap();
    copy_tree(&dovecot.path("index"), &saved.path().join("index"));
    let index = Index::folder(&dovecot, "INBOX");
    assert_read_right(&index, &before, 7);
    assert_eq!(index.snapshot.is_some(), rotating, "the test's own premise");

    deliver(&dovecot, "INBOX", 10..15);
    dovecot.imap(&["SELECT INBOX", "STORE 6:* +FLAGS (\\Answered)"]);
    let later = dovecot.mails("INBOX");
    assert_read_right(&Index::folder(&dovecot, "INBOX"), &later, 12);
    dovecot.assert_content();

    dovecot.put_back(&saved.path().join("index"), "index");
    if deliver_first {
        // Caches need not have travelled.
        fs::remove_file(dovecot.path("index/mailboxes/INBOX/dovecot.index.cache")).unwrap();
    }
    let mails = dovecot.path("mail/mailboxes/INBOX/dbox-Mails");
    let new: Vec<u32> = (0..5).map(|n| CEILING + n).collect();
    for (old, new) in (7..12).zip(&new) {
        fs::rename(mails.join(format!("u.{old}")), mails.join(format!("u.{new}"))).unwrap();
    }
    let index = Index::folder(&dovecot, "INBOX");
    index.apply(&recover::append_sdbox(&index.state(), &new, CEILING).unwrap());
    dovecot.own();

    check_recovered(&dovecot, &before, status.uidvalidity, deliver_first);
    dovecot.force_resync();
    assert_eq!(uids(&dovecot.mails("INBOX")).last(), Some(&(CEILING + 5)));
}

/// INBOX holds `before`, then INBOX10..15 from the ceiling on; then takes a delivery.
fn check_recovered(dovecot: &Dovecot, before: &[Shown], uidvalidity: u32, deliver_first: bool) {
    if deliver_first {
        deliver(dovecot, "INBOX", 20..21);
    }
    let shown = dovecot.mails("INBOX");
    let (old, new) = shown.split_at(before.len());
    assert_eq!(old, before, "UIDs and flags of the cut");
    assert_eq!(uids(&new[..5]), (0..5).map(|n| CEILING + n).collect::<Vec<_>>());
    assert_eq!(subjects(&new[..5]), ["INBOX10", "INBOX11", "INBOX12", "INBOX13", "INBOX14"]);
    assert!(new[..5].iter().all(|m| m.flags.is_empty()));
    if !deliver_first {
        assert_eq!(new.len(), 5);
        let status = dovecot.status("INBOX");
        assert_eq!((status.uidnext, status.messages), (CEILING + 5, before.len() as u32 + 5));
        deliver(dovecot, "INBOX", 20..21);
    }
    let shown = dovecot.mails("INBOX");
    assert_eq!(shown.last().map(|m| (m.uid, m.subject.as_str())), Some((CEILING + 5, "INBOX20")));
    assert_bodies(&shown);
    let status = dovecot.status("INBOX");
    assert_eq!((status.uidvalidity, status.uidnext), (uidvalidity, CEILING + 6));
    let answers = dovecot.imap(&[
        "SELECT INBOX",
        &format!("UID STORE {CEILING} +FLAGS (\\Seen later)"),
        &format!("UID FETCH {CEILING} (FLAGS BODY.PEEK[TEXT])"),
    ]);
    assert!(answers.contains(&format!("[UIDVALIDITY {uidvalidity}]")), "{answers}");
    assert!(answers.contains("later") && answers.contains("body of INBOX10"), "{answers}");
    dovecot.assert_content();
}

#[test]
fn sdbox_mails_show_at_once() {
    sdbox(false, false);
}

#[test]
fn sdbox_takes_a_delivery_first() {
    sdbox(false, true);
}

#[test]
fn sdbox_with_rotated_logs() {
    sdbox(true, false);
    sdbox(true, true);
}

#[test]
fn next_uid_alone_is_raised() {
    for (format, rotating) in [("sdbox", false), ("sdbox", true), ("mdbox", false), ("mdbox", true)]
    {
        let Some(dovecot) = Dovecot::new(format, rotating) else { return };
        fill(&dovecot);
        let before = dovecot.mails("INBOX");
        let index = Index::folder(&dovecot, "INBOX");
        // A torn write at the end goes away.
        let append = recover::raise_next_uid(
            &[index.newest(), &[0x80, 0x80, 0x80, 0x90, 2, 0, 0, 0x10, 9]].concat(),
            CEILING,
        )
        .unwrap();
        index.apply(&append);
        assert_eq!(dovecot.status("INBOX").uidnext, CEILING);
        deliver(&dovecot, "INBOX", 20..21);
        let shown = dovecot.mails("INBOX");
        assert_eq!(shown[..before.len()], before[..]);
        assert_eq!(shown.last().map(|m| m.uid), Some(CEILING));
        dovecot.assert_content();
    }
}

#[test]
fn sdbox_rebuilds_when_marked() {
    let Some(dovecot) = Dovecot::new("sdbox", false) else { return };
    fill(&dovecot);
    let before = dovecot.mails("INBOX");
    let mails = dovecot.path("mail/mailboxes/INBOX/dbox-Mails");
    fs::copy(mails.join("u.1"), mails.join(format!("u.{CEILING}"))).unwrap();
    let index = Index::folder(&dovecot, "INBOX");
    index.apply(&recover::raise_next_uid(index.newest(), CEILING).unwrap());
    let index = Index::folder(&dovecot, "INBOX");
    index.apply(&recover::mark_fsckd(index.newest(), index.state().flags).unwrap());
    dovecot.own();
    let shown = dovecot.mails("INBOX");
    assert_eq!(shown[..before.len()], before[..]);
    assert_eq!(uids(&shown[before.len()..]), [CEILING]);
    assert_eq!(dovecot.status("INBOX").uidnext, CEILING + 1);
}

/// Recovered mails in a folder whose index never reached the store: its first log makes Dovecot look
/// for them, whoever comes first.
#[test]
fn sdbox_mails_without_an_index_show() {
    for deliver_first in [false, true] {
        let Some(dovecot) = Dovecot::new("sdbox", false) else { return };
        // From here on UIDVALIDITYs come from the counter.
        deliver(&dovecot, "INBOX", 0..1);
        dovecot.imap(&["CREATE new"]);
        deliver(&dovecot, "new", 0..5);
        let old = dovecot.status("new").uidvalidity;
        dovecot.assert_content();
        let index = dovecot.path("index/mailboxes/new");
        fs::remove_dir_all(&index).unwrap();
        fs::create_dir(&index).unwrap();
        fs::write(index.join("dovecot.index.log"), recover::first_log(1_700_000_000)).unwrap();
        dovecot.own();
        if deliver_first {
            deliver(&dovecot, "new", 20..21);
        }
        let shown = dovecot.mails("new");
        let mut wanted: Vec<String> = (0..5).map(|n| format!("new{n}")).collect();
        wanted.extend(deliver_first.then(|| "new20".to_owned()));
        assert!(dovecot.log().contains("Rebuilding index"));
        assert_eq!(subjects(&shown), wanted);
        assert_eq!(uids(&shown), (1..=u32::try_from(wanted.len()).unwrap()).collect::<Vec<_>>());
        assert_bodies(&shown);
        // UIDs may have been other mails' under the lost index.
        assert!(dovecot.status("new").uidvalidity > old);
        deliver(&dovecot, "new", 30..31);
        assert_eq!(dovecot.mails("new").len(), wanted.len() + 1);
    }
}

/// The last resort: Dovecot rebuilds the storage, under UIDs from the ceiling on.
#[test]
fn mdbox_rebuilds_when_marked() {
    for deliver_first in [false, true] {
        let Some(dovecot) = Dovecot::new("mdbox", false) else { return };
        fill(&dovecot);
        let before = dovecot.mails("INBOX");
        let status = dovecot.status("INBOX");
        let cut = mdbox_cut(&dovecot);
        deliver(&dovecot, "INBOX", 10..15);
        dovecot.put_back(&cut.saved.path().join("index"), "index");
        let index = Index::folder(&dovecot, "INBOX");
        index.apply(&recover::raise_next_uid(index.newest(), CEILING).unwrap());
        // The mark goes into the folders: Dovecot does not look at the map's in time.
        let index = Index::folder(&dovecot, "INBOX");
        index.apply(&recover::mark_fsckd(index.newest(), index.state().flags).unwrap());
        dovecot.own();
        dovecot.log();
        if deliver_first {
            deliver(&dovecot, "INBOX", 20..21);
        }
        let shown = dovecot.mails("INBOX");
        assert_eq!(shown[..before.len()], before[..], "{}", dovecot.log());
        assert!(shown[before.len()..].iter().all(|m| m.uid >= CEILING));
        assert_eq!(shown.len(), before.len() + 5 + usize::from(deliver_first));
        assert_eq!(dovecot.status("INBOX").uidvalidity, status.uidvalidity);
        assert_bodies(&shown);
    }
}

/// The empty log that Dovecot puts over an index to make it anew, in its place; the old one is
/// `.log.2`.
fn begin_anew(index: &Index) {
    let mut log = index.newest()[..40].to_vec();
    let seq = u32::from_le_bytes(log[8..12].try_into().unwrap());
    log[8..12].copy_from_slice(&(seq + 1).to_le_bytes());
    log[12..20].fill(0);
    let at = index.dir.join(format!("{}.log", index.prefix));
    fs::rename(&at, index.dir.join(format!("{}.log.2", index.prefix))).unwrap();
    fs::write(at, log).unwrap();
}

/// A machine that was lost while Dovecot had begun an index anew: the mails show in their folders.
#[test]
fn mdbox_index_that_was_begun_anew() {
    for (anew, first) in [("INBOX", "INBOX"), ("INBOX", "Archive"), ("Archive", "INBOX")] {
        let Some(dovecot) = Dovecot::new("mdbox", false) else { return };
        fill(&dovecot);
        dovecot.imap(&["CREATE Archive"]);
        deliver(&dovecot, "Archive", 0..3);
        let before = [dovecot.mails("INBOX"), dovecot.mails("Archive")];
        begin_anew(&Index::folder(&dovecot, anew));
        for folder in ["INBOX", "Archive"] {
            let index = Index::folder(&dovecot, folder);
            index.apply(&recover::mark_fsckd(index.newest(), 0).unwrap());
        }
        dovecot.own();
        dovecot.log();
        dovecot.mails(first);
        for (folder, before) in ["INBOX", "Archive"].into_iter().zip(before) {
            let shown = dovecot.mails(folder);
            assert_eq!(subjects(&shown), subjects(&before), "{anew} {first}");
        }
    }
}

struct MdboxCut {
    saved: tempfile::TempDir,
    /// Length of each m.N.
    lengths: Vec<(u32, u64)>,
}

fn storage_files(dovecot: &Dovecot) -> Vec<(u32, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dovecot.path("mail/storage")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if let Some(number) = name.strip_prefix("m.") {
            files.push((number.parse().unwrap(), fs::read(entry.path()).unwrap()));
        }
    }
    files.sort();
    files
}

fn mdbox_cut(dovecot: &Dovecot) -> MdboxCut {
    let saved = tempfile::tempdir().unwrap();
    copy_tree(&dovecot.path("index"), &saved.path().join("index"));
    copy_tree(&dovecot.path("mail/storage"), &saved.path().join("storage"));
    let lengths = storage_files(dovecot).iter().map(|(n, b)| (*n, b.len() as u64)).collect();
    MdboxCut { saved, lengths }
}

/// Puts the cut's indexes back, with the files of mails of both moments, and recovers.
fn mdbox_recover(dovecot: &Dovecot, cut: &MdboxCut, folders: &[&str]) -> MdboxOutput {
    dovecot.put_back(&cut.saved.path().join("index"), "index");
    let now = storage_files(dovecot);
    for (number, _) in &cut.lengths {
        // A purge after the cut removed it: the head still names it.
        let path = dovecot.path(&format!("mail/storage/m.{number}"));
        if !path.exists() {
            fs::copy(cut.saved.path().join(format!("storage/m.{number}")), path).unwrap();
        }
    }
    let ranges: Vec<MdboxRange<'_>> = now
        .iter()
        .map(|(file, bytes)| {
            let old = cut.lengths.iter().find(|(n, _)| n == file).map_or(0, |(_, len)| *len);
            MdboxRange { file: *file, offset: old, bytes: &bytes[old as usize..] }
        })
        .collect();
    let map = Index::read(&dovecot.path("index/storage"), "dovecot.map.index");
    let indexes: Vec<Index> = folders.iter().map(|f| Index::folder(dovecot, f)).collect();
    let logs: Vec<Vec<&[u8]>> = indexes.iter().map(Index::logs).collect();
    let given: Vec<MdboxFolder<'_>> = (folders.iter().zip(&indexes).zip(&logs))
        .map(|((name, index), logs)| MdboxFolder {
            name: name.as_bytes(),
            snapshot: index.snapshot.as_deref(),
            logs,
            at_least: CEILING,
        })
        .collect();
    let out = recover_mdbox(&MdboxInput {
        map_snapshot: map.snapshot.as_deref(),
        map_logs: &map.logs(),
        folders: &given,
        ranges: &ranges,
        highest_file: storage_files(dovecot).last().map_or(0, |(n, _)| *n),
        save_date: 1_700_000_000,
        restore_unreferenced: true,
    })
    .unwrap();
    map.apply(&out.map);
    for (index, append) in indexes.iter().zip(&out.folders) {
        index.apply(append.as_ref().unwrap());
    }
    dovecot.own();
    out
}

fn mdbox(rotating: bool, deliver_first: bool, purge: bool) {
    let Some(dovecot) = Dovecot::new("mdbox", rotating) else { return };
    dovecot.imap(&["CREATE Work/2026", "CREATE Empty"]);
    fill(&dovecot);
    deliver(&dovecot, "Work/2026", 0..2);
    dovecot.imap(&["SELECT INBOX", "COPY 2 Work/2026"]);
    let before = dovecot.mails("INBOX");
    let work = dovecot.mails("Work/2026");
    let status = dovecot.status("INBOX");
    assert_read_right(&Index::folder(&dovecot, "INBOX"), &before, 7);
    let cut = mdbox_cut(&dovecot);

    deliver(&dovecot, "INBOX", 10..15);
    deliver(&dovecot, "Work/2026", 10..12);
    deliver(&dovecot, "Empty", 10..11);
    dovecot.imap(&["CREATE New", "SELECT INBOX", "STORE 6:* +FLAGS (\\Answered)"]);
    deliver(&dovecot, "New", 10..11);
    if purge {
        dovecot.imap(&["SELECT INBOX", "STORE 4 +FLAGS (\\Deleted)", "EXPUNGE"]);
        dovecot.doveadm(&["purge"], "");
        deliver(&dovecot, "Empty", 11..12);
    }
    dovecot.assert_content();

    let out = mdbox_recover(&dovecot, &cut, &["INBOX", "Work/2026", "Empty"]);
    // The folder New is not in the cut: its mail comes to INBOX, after the others.
    assert_eq!(out.redirected, 1);
    assert!(out.unreferenced.is_empty());
    assert_eq!(out.dangling, 0);
    if !purge {
        assert_eq!((out.placed.len(), out.copies), (9, 0));
    }
    if deliver_first {
        // Caches need not have travelled.
        fs::remove_file(dovecot.path("index/mailboxes/INBOX/dovecot.index.cache")).unwrap();
        deliver(&dovecot, "INBOX", 20..21);
    }
    let shown = dovecot.mails("INBOX");
    assert_eq!(shown[..before.len()], before[..], "UIDs and flags of the cut");
    let new = &shown[before.len()..];
    let mut names = subjects(new);
    names[..6].sort_unstable();
    assert_eq!(names[..6], ["INBOX10", "INBOX11", "INBOX12", "INBOX13", "INBOX14", "New10"]);
    assert_eq!(uids(&new[..6]), (CEILING..CEILING + 6).collect::<Vec<_>>());
    assert_bodies(&shown);
    if !deliver_first {
        assert_eq!(dovecot.status("INBOX").uidnext, CEILING + 6);
        deliver(&dovecot, "INBOX", 20..21);
    }
    let shown = dovecot.mails("INBOX");
    assert_eq!(shown.last().map(|m| (m.uid, m.subject.as_str())), Some((CEILING + 6, "INBOX20")));
    assert_bodies(&shown);
    let status_now = dovecot.status("INBOX");
    assert_eq!(status_now.uidvalidity, status.uidvalidity);
    assert_eq!(status_now.uidnext, CEILING + 7);
    let work_now = dovecot.mails("Work/2026");
    assert_eq!(work_now[..work.len()], work[..]);
    assert_eq!(subjects(&work_now[work.len()..]), ["Work/202610", "Work/202611"]);
    assert_eq!(uids(&work_now[work.len()..]), [CEILING, CEILING + 1]);
    let empty = dovecot.mails("Empty");
    assert_eq!(subjects(&empty)[..1], ["Empty10"]);
    assert_eq!(empty[0].uid, CEILING);
    assert_bodies(&work_now);
    assert_bodies(&empty);
    dovecot.assert_content();

    // Changes, a purge and a rebuild of the storage find nothing amiss.
    dovecot.imap(&[
        "SELECT INBOX",
        &format!("UID STORE {CEILING} +FLAGS (\\Deleted)"),
        "EXPUNGE",
        &format!("UID COPY {} Empty", CEILING + 1),
    ]);
    dovecot.doveadm(&["purge"], "");
    dovecot.assert_content();
    let shown = [dovecot.mails("INBOX"), dovecot.mails("Work/2026"), dovecot.mails("Empty")];
    assert_bodies(&shown.concat());
    dovecot.force_resync();
    let again = [dovecot.mails("INBOX"), dovecot.mails("Work/2026"), dovecot.mails("Empty")];
    assert_eq!(shown, again);
}

#[test]
fn mdbox_mails_show_at_once() {
    mdbox(false, false, false);
}

#[test]
fn mdbox_takes_a_delivery_first() {
    mdbox(false, true, false);
}

#[test]
fn mdbox_with_rotated_logs() {
    mdbox(true, false, false);
    mdbox(true, true, false);
}

#[test]
fn mdbox_after_a_purge() {
    mdbox(false, false, true);
    mdbox(true, true, true);
}

/// What Dovecot's own writes are taken for, and that the tracker follows them.
#[test]
fn writes_are_judged_as_they_are() {
    for format in ["maildir", "sdbox", "mdbox"] {
        let Some(dovecot) = Dovecot::new(format, false) else { return };
        deliver(&dovecot, "INBOX", 0..3);
        let dir = match format {
            "maildir" => dovecot.path("index/.INBOX"),
            _ => dovecot.path("index/mailboxes/INBOX"),
        };
        let log = || fs::read(dir.join("dovecot.index.log")).unwrap();
        let mut tracker = LogTracker::of(&log(), None);
        let mut step = |what: &str, important: bool, act: &dyn Fn()| {
            let old = log().len();
            act();
            let new = log();
            assert_eq!(index_log::important(&new[old..]), important, "{format}: {what}");
            let seen = tracker.feed(old as u64, &new[old..]);
            assert_eq!(seen.important, important, "{format}: {what}");
            assert_eq!(tracker.whole_len(), new.len() as u64);
            assert!(!tracker.is_lost());
            tracker.next_uid()
        };
        assert_eq!(step("delivery", false, &|| dovecot.save("INBOX", "x")), 5);
        step("reading", false, &|| {
            dovecot.imap(&["SELECT INBOX", "FETCH 1:* (ENVELOPE BODYSTRUCTURE BODY.PEEK[])"]);
        });
        step("a flag", true, &|| drop(dovecot.imap(&["SELECT INBOX", "STORE 1 +FLAGS (\\Seen)"])));
        step("a keyword", true, &|| drop(dovecot.imap(&["SELECT INBOX", "STORE 1 +FLAGS (a)"])));
        step("an expunge", true, &|| {
            dovecot.imap(&["SELECT INBOX", "STORE 4 +FLAGS (\\Deleted)", "EXPUNGE"]);
        });
        assert_eq!(step("delivery", false, &|| dovecot.save("INBOX", "y")), 6);
        assert_eq!(dovecot.status("INBOX").uidnext, 6);
        assert_eq!(tracker.uid_validity(), Some(dovecot.status("INBOX").uidvalidity));
        dovecot.assert_content();
    }
}

/// The map was copied after a delivery had written it, the folder before.
#[test]
fn mdbox_delivery_that_the_cut_went_through() {
    let Some(dovecot) = Dovecot::new("mdbox", false) else { return };
    fill(&dovecot);
    let before = dovecot.mails("INBOX");
    let folders = tempfile::tempdir().unwrap();
    copy_tree(&dovecot.path("index/mailboxes"), &folders.path().join("mailboxes"));
    deliver(&dovecot, "INBOX", 10..11);
    let mut cut = mdbox_cut(&dovecot);
    let saved = cut.saved.path().join("index/mailboxes");
    fs::remove_dir_all(&saved).unwrap();
    copy_tree(&folders.path().join("mailboxes"), &saved);

    let out = mdbox_recover(&dovecot, &cut, &["INBOX"]);
    assert_eq!((out.placed.len(), out.unreferenced.len()), (0, 1), "its bytes were not given");
    cut.lengths.iter_mut().for_each(|(_, len)| *len = 0);
    let out = mdbox_recover(&dovecot, &cut, &["INBOX"]);
    assert_eq!((out.placed.as_slice(), out.copies), ([(0, CEILING)].as_slice(), 0));
    assert!(out.unreferenced.is_empty());
    let shown = dovecot.mails("INBOX");
    assert_eq!(shown[..before.len()], before[..]);
    assert_eq!(subjects(&shown[before.len()..]), ["INBOX10"]);
    dovecot.doveadm(&["purge"], "");
    assert_eq!(dovecot.mails("INBOX"), shown);
    assert_bodies(&shown);
    dovecot.assert_content();
}

#[test]
fn maildir_uids_start_at_the_ceiling() {
    let Some(dovecot) = Dovecot::new("maildir", false) else { return };
    fill(&dovecot);
    let before = dovecot.mails("INBOX");
    let status = dovecot.status("INBOX");
    let list = dovecot.path("mail/dovecot-uidlist");
    let old = fs::read(&list).unwrap();
    assert_eq!(uidlist::parse(&old).unwrap().next_uid(), 7);
    deliver(&dovecot, "INBOX", 10..15);
    assert_eq!(uidlist::parse(&fs::read(&list).unwrap()).unwrap().next_uid(), 12);

    fs::write(&list, uidlist::raise_next_uid(&old, CEILING).unwrap()).unwrap();
    fs::remove_dir_all(dovecot.path("index")).unwrap();
    // A mail that came back under its name in tmp/.
    fs::write(
        dovecot.path("mail/new/1700000000.M1P1.host"),
        "Subject: INBOX15\n\nbody of INBOX15\n",
    )
    .unwrap();
    dovecot.own();
    let shown = dovecot.mails("INBOX");
    let kept = |mails: &[Shown]| -> Vec<_> {
        mails.iter().map(|m| (m.uid, m.subject.clone(), m.flags.clone())).collect()
    };
    assert_eq!(kept(&shown[..before.len()]), kept(&before));
    assert_eq!(uids(&shown[before.len()..]), (CEILING..CEILING + 6).collect::<Vec<_>>());
    deliver(&dovecot, "INBOX", 20..21);
    let status_now = dovecot.status("INBOX");
    assert_eq!(status_now.uidvalidity, status.uidvalidity);
    assert_eq!(status_now.uidnext, CEILING + 7);
    assert_bodies(&dovecot.mails("INBOX"));
    dovecot.assert_content();
}
