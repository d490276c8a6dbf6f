//! Deleted mails and earlier states come back, as a real Dovecot shows them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::dovecot::{Dovecot, Format, Layout};
use support::imap::{Fetched, Imap, flags};
use support::lmtp::Lmtp;
use support::messages::{Message, identify, message};
use support::mount::Mount;
use support::scratch;

const USER: &str = "user0@mail.test";

struct Site {
    mount: Mount,
    dovecot: Dovecot,
}

impl Site {
    fn new(format: Format) -> Site {
        let mut mount = Mount::on_directory().option(&["--single-backend"]);
        mount.mount().unwrap();
        let users = [USER.to_owned()];
        let dovecot = Dovecot::start(&mount.root(), &Layout::usual(format), &users).unwrap();
        Site { mount, dovecot }
    }

    fn deliver(&self, seed: u64) -> Message {
        let mail = message(seed, &format!("mail-{seed}"));
        let mut lmtp = Lmtp::connect(self.dovecot.lmtp_port).unwrap();
        assert!(lmtp.deliver(&[USER], &mail.bytes).unwrap()[0].accepted());
        mail
    }

    fn login(&self) -> Imap {
        Imap::login(self.dovecot.imap_port, USER).unwrap()
    }

    /// Runs a command that must succeed.
    fn vmailfs(&self, arguments: &[&str]) -> String {
        let (good, text) = self.mount.vmailfs(arguments).unwrap();
        assert!(good, "{arguments:?}: {text}\n{}", self.mount.log());
        text
    }

    fn flush(&self) {
        self.vmailfs(&["metacache", "flush", "-u", USER]);
    }

    /// The user's mails, and files around them, as they lie in the mount.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        files(&self.mount.root().join(USER).join("mail"))
    }
}

fn files(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(at) = todo.pop() {
        for entry in std::fs::read_dir(at).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                todo.push(path);
            } else if !path.to_string_lossy().ends_with(".lock") {
                let name = path.strip_prefix(root).unwrap().to_owned();
                found.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Ids and UIDs of mails, whose contents must be those that were delivered.
fn ids(mails: &[Fetched]) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    for mail in mails {
        let (id, _) = identify(&mail.body);
        let id = id.expect("a mail of this test");
        let seed = id.strip_prefix("mail-").unwrap().parse().unwrap();
        let expected = identify(&message(seed, &id).bytes).1;
        assert_eq!(identify(&mail.body).1, expected, "content of {id}");
        assert!(found.insert(id, mail.uid).is_none());
    }
    found
}

fn names(ids: &BTreeMap<String, u32>) -> BTreeSet<&str> {
    ids.keys().map(String::as_str).collect()
}

/// Seconds that states are told apart by.
fn a_moment() {
    std::thread::sleep(Duration::from_millis(1100));
}

fn now() -> String {
    let time = std::time::SystemTime::now();
    let secs = time.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let output = std::process::Command::new("date")
        .args(["-u", "-d", &format!("@{secs}"), "+%Y-%m-%dT%H:%M:%SZ"])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn deleted_mails_come_back(format: Format) {
    let mut site = Site::new(format);
    for seed in 0..4 {
        site.deliver(seed);
    }
    let mut open = site.login();
    let before = open.select("INBOX").unwrap();
    assert_eq!(before.exists, 4);
    let old = ids(&open.fetch_all().unwrap());
    open.create("Sent").unwrap();
    for seed in 10..13 {
        let mail = message(seed, &format!("mail-{seed}"));
        open.append("Sent", &flags(&["\\Flagged", "\\Seen"]), None, &mail.bytes).unwrap();
    }
    site.flush();
    a_moment();
    let then = now();
    let then_files = site.files();
    a_moment();

    // Expunged, one of them moved before, and one that no flush ever saw.
    site.deliver(4);
    open.command("NOOP").unwrap();
    let fresh = ids(&open.fetch_all().unwrap())["mail-4"];
    for uid in [old["mail-1"], old["mail-2"], fresh] {
        open.store(uid, "+", &flags(&["\\Deleted"])).unwrap();
        open.expunge(uid).unwrap();
    }
    open.move_to(old["mail-3"], "Sent").unwrap();
    let text = site.vmailfs(&["user", "undelete", "-u", USER, "--since", "1h", "--dry-run"]);
    assert!(text.contains("3 mails would come back"), "{text}");
    let none = site.vmailfs(&["user", "undelete", "-u", USER, "-f", "Sent"]);
    assert!(none.contains("0 mails brought back"), "{none}");
    assert_eq!(names(&ids(&open.fetch_all().unwrap())), BTreeSet::from(["mail-0"]));

    // While a session has the folder open.
    let text = site.vmailfs(&["user", "undelete", "-u", USER, "--folder", "INBOX"]);
    assert!(text.contains("3 mails brought back"), "{text}");
    open.command("NOOP").unwrap();
    let seen = ids(&open.fetch_all().unwrap());
    assert_eq!(names(&seen), BTreeSet::from(["mail-0", "mail-1", "mail-2", "mail-4"]));
    assert_eq!(seen["mail-0"], old["mail-0"]);
    for id in ["mail-1", "mail-2", "mail-4"] {
        assert!(seen[id] > fresh, "{id} has the UID {} again", seen[id]);
    }
    let again = site.vmailfs(&["user", "undelete", "-u", USER]);
    assert!(again.contains("0 mails brought back"), "{again}");
    site.deliver(5);
    open.command("NOOP").unwrap();
    let seen_now = ids(&open.fetch_all().unwrap());
    assert_eq!(seen_now.len(), 5);
    assert!(seen.iter().all(|(id, uid)| seen_now[id] == *uid));
    assert!(seen.values().all(|uid| *uid < seen_now["mail-5"]));
    let mut second = site.login();
    second.select("INBOX").unwrap();
    assert_eq!(ids(&second.fetch_all().unwrap()), seen_now);
    second.logout();

    // A state into a directory, from the store alone as well as from the mount.
    let place = scratch("restored");
    for (dir, store) in [("mount", None), ("store", Some(site.mount.store().to_owned()))] {
        let dir = place.path().join(dir);
        let path = dir.display().to_string();
        let mut arguments = vec!["user", "restore", "-u", USER, "--at", &then, "--to", &path];
        let store = store.unwrap_or_default();
        if !store.is_empty() {
            arguments.extend(["--store", &store]);
        }
        site.vmailfs(&arguments);
        let restored = files(&dir.join("mail"));
        let mails = |all: &BTreeMap<PathBuf, Vec<u8>>| -> BTreeMap<PathBuf, Vec<u8>> {
            let mail = |path: &PathBuf| {
                let text = path.to_string_lossy();
                ["cur/", "new/", "u."].iter().any(|part| text.contains(part))
            };
            all.iter().filter(|(p, _)| mail(p)).map(|(p, b)| (p.clone(), b.clone())).collect()
        };
        assert_eq!(mails(&restored), mails(&then_files));
        assert_eq!(mails(&restored).len(), 7);
    }

    // A folder that was deleted, in place.
    open.delete("Sent").unwrap();
    let text = site.vmailfs(&["user", "restore", "-u", USER, "--at", &then, "--in-place"]);
    assert!(text.contains("4 mails brought back"), "{text}");
    open.command("NOOP").unwrap();
    let sent = open.select("Sent").unwrap();
    assert_eq!(sent.exists, 3, "{}", site.mount.log());
    let mails = open.fetch_all().unwrap();
    assert_eq!(names(&ids(&mails)), BTreeSet::from(["mail-10", "mail-11", "mail-12"]));
    if format == Format::Maildir {
        assert!(mails.iter().all(|m| m.flags == flags(&["\\Flagged", "\\Seen"])), "{mails:?}");
    }
    // What went with the deleted folder is where it was then; what was here stays as it was.
    open.select("INBOX").unwrap();
    let mut inbox = ids(&open.fetch_all().unwrap());
    assert!(inbox.remove("mail-3").unwrap() >= seen_now["mail-5"] + 1000);
    assert_eq!(inbox, seen_now);
    open.logout();
    // A folder of sdbox that is made anew is looked through by Dovecot.
    let mut problems = site.dovecot.complaints();
    problems.retain(|line| !line.contains("Rebuilding index"));
    assert!(problems.is_empty(), "{problems:#?}");

    let text = site.vmailfs(&["fsck", "-u", USER, "--read"]);
    assert!(text.contains("nothing wrong"), "{text}");
    let text = site.vmailfs(&["user", "history", "-u", USER]);
    assert!(text.lines().count() > 4, "{text}");
    site.dovecot.stop();
    site.mount.umount().unwrap();
    let store = site.mount.store().to_owned();
    let text = site.vmailfs(&["fsck", &store, "-A", "--read"]);
    assert!(text.contains("nothing wrong"), "{text}");
}

#[test]
fn maildir() {
    deleted_mails_come_back(Format::Maildir);
}

#[test]
fn sdbox() {
    deleted_mails_come_back(Format::Sdbox);
}

#[test]
fn mdbox_is_told_the_other_way() {
    let site = Site::new(Format::Mdbox);
    for seed in 0..3 {
        site.deliver(seed);
    }
    site.flush();
    a_moment();
    let then = now();
    a_moment();
    let (good, text) = site.mount.vmailfs(&["user", "undelete", "-u", USER]).unwrap();
    assert!(!good && text.contains("--at TIME --to DIR"), "{text}");
    let way = format!("doveadm import -u {USER} mdbox:DIR/mail:INDEX=DIR/index \"\" all");
    assert!(text.contains(&way), "{text}");
    let mut imap = site.login();
    imap.select("INBOX").unwrap();
    let all = ids(&imap.fetch_all().unwrap());
    imap.store(all["mail-1"], "+", &flags(&["\\Deleted"])).unwrap();
    imap.expunge(all["mail-1"]).unwrap();
    imap.logout();

    let place = scratch("restored");
    let dir = place.path().join("then").display().to_string();
    site.vmailfs(&["user", "restore", "-u", USER, "--at", &then, "--to", &dir]);
    let source = format!("mdbox:{dir}/mail:INDEX={dir}/index");
    let arguments = ["import", "-u", USER, &source, "", "all"];
    let (good, text) = site.dovecot.doveadm(&arguments).unwrap();
    assert!(good, "{text}");
    let mut imap = site.login();
    imap.select("INBOX").unwrap();
    let bodies = imap.fetch_all().unwrap();
    let back: BTreeSet<String> = bodies.iter().filter_map(|m| identify(&m.body).0).collect();
    assert!(back.contains("mail-1"), "{back:?}");
    imap.logout();
}

/// The only object of the store whose key has this in it.
fn object(site: &Site, part: &str) -> PathBuf {
    let root = PathBuf::from(site.mount.store().strip_prefix("file://").unwrap());
    let keys = files(&root);
    let mut found = keys.into_keys().filter(|key| key.to_string_lossy().contains(part));
    root.join(found.next_back().unwrap_or_else(|| panic!("no object {part}")))
}

/// Kinds of what a check of a store prints, and its exit code.
fn found(site: &Site, arguments: &[&str]) -> (Option<i32>, Vec<String>) {
    let store = site.mount.store().to_owned();
    let all = [&["fsck", &store, "-u", USER], arguments].concat();
    let (code, out, _) = site.mount.exit_of(&all).unwrap();
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split('\t').collect()).collect();
    assert!(lines.iter().all(|fields| fields.len() == 6), "{out}");
    (code, lines.iter().map(|fields| fields[0].to_owned()).collect())
}

/// Files are changed as a broken disk or a person would: the store knows nothing of it.
#[test]
fn fsck_finds_and_repairs_what_happened_to_a_store() {
    let mut site = Site::new(Format::Maildir);
    for seed in 0..5 {
        site.deliver(seed);
    }
    let mut imap = site.login();
    imap.select("INBOX").unwrap();
    let uids = ids(&imap.fetch_all().unwrap());
    imap.logout();
    site.flush();
    a_moment();
    site.deliver(5);
    site.dovecot.stop();
    site.mount.umount().unwrap();
    assert_eq!(found(&site, &["--read"]), (Some(0), vec![]));
    let (code, ..) = site.mount.exit_of(&["fsck", "file:///nowhere/at/all", "-A"]).unwrap();
    assert!(code.is_some_and(|code| code >= 64), "{code:?}");

    // One mail deleted, another with a flipped byte.
    let root = PathBuf::from(site.mount.store().strip_prefix("file://").unwrap());
    let mut mails: Vec<PathBuf> = files(&root)
        .into_keys()
        .filter(|key| key.components().any(|c| c.as_os_str() == "mail"))
        .map(|key| root.join(key))
        .collect();
    mails.sort();
    assert_eq!(mails.len(), 6);
    let (gone, bent) = (std::fs::read(&mails[0]).unwrap(), std::fs::read(&mails[1]).unwrap());
    std::fs::remove_file(&mails[0]).unwrap();
    let mut flipped = bent.clone();
    flipped[bent.len() / 2] ^= 1;
    std::fs::write(&mails[1], &flipped).unwrap();
    assert_eq!(found(&site, &[]), (Some(4), vec!["lost".to_owned()]));
    let both = vec!["lost".to_owned(), "content".to_owned()];
    assert_eq!(found(&site, &["--read"]), (Some(4), both));
    let store = site.mount.store().to_owned();
    let json = site.mount.exit_of(&["fsck", &store, "-u", USER, "--json"]).unwrap();
    assert!(json.1.starts_with('{') && json.1.contains("\"kind\":\"lost\""), "{}", json.1);
    std::fs::write(&mails[0], &gone).unwrap();
    std::fs::write(&mails[1], &bent).unwrap();

    // A mail that arrived when nobody looked any more: planted, then adopted by the owner.
    let name = mails[2].file_name().unwrap().to_string_lossy().into_owned();
    let late = mails[2].with_file_name(name.replacen("-0000000", "-00000ff", 1));
    assert_ne!(late, mails[2]);
    std::fs::copy(&mails[2], &late).unwrap();
    assert_eq!(found(&site, &[]), (Some(4), vec!["late".to_owned()]));
    std::fs::remove_file(&late).unwrap();
    assert_eq!(found(&site, &[]), (Some(0), vec![]));

    // The newest bundle cut off, and the head damaged: both at once.
    let head = object(&site, "/head");
    let bundle = object(&site, "/bundle/");
    let (whole_head, whole) = (std::fs::read(&head).unwrap(), std::fs::read(&bundle).unwrap());
    std::fs::write(&bundle, &whole[..whole.len() / 3]).unwrap();
    let (code, kinds) = found(&site, &[]);
    assert!(code == Some(4) && kinds.contains(&"part".to_owned()), "{kinds:?}");
    let mut bad = whole_head.clone();
    bad[30] ^= 1;
    std::fs::write(&head, &bad).unwrap();
    assert_eq!(found(&site, &[]), (Some(4), vec!["head".to_owned()]));
    let (code, _) = found(&site, &["--repair"]);
    assert_eq!(code, Some(77), "nobody can know who owns it");
    let (code, left) = found(&site, &["--repair", "--owner-gone"]);
    assert_eq!((code, left), (Some(1), vec![]));

    site.mount.mount().unwrap();
    site.dovecot.resume(&site.mount.root()).unwrap();
    let mut imap = site.login();
    imap.select("INBOX").unwrap();
    let after = ids(&imap.fetch_all().unwrap());
    assert_eq!(after.len(), 6, "{after:?}\n{}", site.mount.log());
    for (id, uid) in &after {
        let same = uids.get(id) == Some(uid);
        assert!(same || uids.values().all(|old| old < uid), "{id} has another's UID {uid}");
    }
    imap.logout();
    let text = site.vmailfs(&["fsck", "-u", USER, "--read"]);
    assert!(text.contains("nothing wrong"), "{text}");
    site.dovecot.stop();
    site.mount.umount().unwrap();
}
