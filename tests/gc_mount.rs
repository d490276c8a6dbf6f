//! `vmailfs gc` on a real mount: what it deletes, what it says, and that the mount does it by
//! itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::mount::Mount;
use support::{wait_until, weed};

/// A Maildir with mails `0` to `n`.
fn make_home(root: &Path, user: &str, n: usize) -> PathBuf {
    let home = root.join(user);
    for sub in ["", "cur", "new", "tmp"] {
        fs::create_dir(home.join(sub)).unwrap();
    }
    for i in 0..n {
        fs::write(home.join(format!("tmp/{i}")), format!("Subject: {i}\n\n")).unwrap();
        fs::rename(home.join(format!("tmp/{i}")), home.join(format!("new/{i}"))).unwrap();
    }
    home
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Files of a directory store whose path has this in it.
fn objects(mount: &Mount, part: &str) -> usize {
    fn walk(dir: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { walk(&path, found) } else { found.push(path.display().to_string()) }
        }
    }
    let mut found = Vec::new();
    walk(&mount.root().with_file_name("store"), &mut found);
    found.iter().filter(|path| path.contains(part)).count()
}

fn gc(mount: &Mount, arguments: &[&str]) -> String {
    let (ok, text) = mount.vmailfs(&[&["gc"], arguments].concat()).unwrap();
    assert!(ok, "{text}");
    text
}

#[test]
fn gc_deletes_what_is_due_and_nothing_else() {
    let mut mount = Mount::on_directory().option(&["--set", "retention=1h"]);
    mount.mount().unwrap();
    let home = make_home(&mount.root(), "joe", 5);
    make_home(&mount.root(), "jane", 1);
    fs::hard_link(home.join("new/1"), home.join("cur/copy:2,")).unwrap();
    for i in [1, 2, 3] {
        fs::remove_file(home.join(format!("new/{i}"))).unwrap();
    }
    let flushed = mount.vmailfs(&["metacache", "flushall"]).unwrap();
    assert!(flushed.0, "{}", flushed.1);
    assert!(gc(&mount, &[]).contains("deleted 0 mails"));
    assert_eq!(objects(&mount, "/joe/mail/"), 5);
    mount.umount().unwrap();
    let mut mount = mount.option(&["--set", "retention=1s"]);
    mount.mount().unwrap();
    for user in ["joe", "jane"] {
        fs::read_dir(mount.root().join(user).join("new")).unwrap();
    }
    std::thread::sleep(Duration::from_secs(2));
    let text = gc(&mount, &["-u", "joe", "--dry-run"]);
    assert!(text.contains("joe: would delete 2 mails"), "{text}");
    assert_eq!(objects(&mount, "/joe/mail/"), 5);
    let text = gc(&mount, &["--full"]);
    assert!(text.contains("joe: deleted 2 mails"), "{text}");
    assert!(text.contains("2 users looked at"), "{text}");
    assert!(!text.contains("late"), "{text}");
    assert_eq!((objects(&mount, "/joe/mail/"), objects(&mount, "/jane/mail/")), (3, 1));
    assert!(gc(&mount, &["-u", "joe"]).contains("deleted 0 mails"));
    let (ok, text) = mount.vmailfs(&["gc", "-u", "nobody"]).unwrap();
    assert!(!ok && text.contains("nobody: no such user in the store"), "{text}");
    let (_, text) = mount.vmailfs(&["status", "--json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    let requests = status["requests"].as_array().unwrap();
    assert!(requests.iter().any(|r| r["operation"] == "delete" && r["reason"] == "gc"), "{text}");

    // Users that are not open are found in the store; of another machine they are all there.
    fs::remove_file(home.join("new/4")).unwrap();
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    std::thread::sleep(Duration::from_secs(4));
    mount.mount().unwrap();
    assert!(gc(&mount, &[]).contains("0 users looked at"));
    let text = gc(&mount, &["-A", "--json"]);
    let json = text.rsplit_once('}').unwrap().0.to_owned() + "}";
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["looked_at"], 2, "{text}");
    assert_eq!(objects(&mount, "/joe/mail/"), 2);
    assert_eq!(names(&home.join("new")), ["0"]);
    assert_eq!(fs::read(home.join("cur/copy:2,")).unwrap(), b"Subject: 1\n\n");
    mount.umount().unwrap();
}

#[test]
fn a_mount_deletes_by_itself() {
    let options = ["--set", "retention=1s", "--set", "gc.interval=1s"];
    let mut mount = Mount::on_directory().option(&options);
    mount.mount().unwrap();
    let home = make_home(&mount.root(), "joe", 3);
    fs::remove_file(home.join("new/1")).unwrap();
    let flushed = mount.vmailfs(&["metacache", "flushall"]).unwrap();
    assert!(flushed.0, "{}", flushed.1);
    assert!(wait_until(Duration::from_secs(60), || objects(&mount, "/joe/mail/") == 2));
    assert_eq!(names(&home.join("new")), ["0", "2"]);
    mount.umount().unwrap();
}

/// What reached the store after its session was over is shown, and the bundles it left go.
#[test]
fn late_mails_are_shown() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let home = make_home(&mount.root(), "joe", 1);
    mount.umount().unwrap();
    mount.mount().unwrap();
    assert_eq!(names(&home.join("new")), ["0"]);
    fs::write(home.join("tmp/1"), b"Subject: 1\n\n").unwrap();
    fs::rename(home.join("tmp/1"), home.join("new/1")).unwrap();
    assert!(mount.vmailfs(&["metacache", "flushall"]).unwrap().0);
    let store = mount.root().with_file_name("store");
    let user = fs::read_dir(&store)
        .unwrap()
        .map(|e| e.unwrap().path().join("joe"))
        .find(|p| p.is_dir())
        .unwrap();
    let first = names(&user.join("mail")).remove(0);
    let late = first.replace(&first[..21], "00000001-000000000fff").replace(".m.0", ".m.late");
    fs::copy(user.join("mail").join(&first), user.join("mail").join(&late)).unwrap();
    let text = gc(&mount, &["--full"]);
    assert!(text.contains("adopted: a mail that reached the store late"), "{text}");
    let shown = names(&home.join("new"));
    assert_eq!(shown.len(), 3, "{shown:?}");
    let late = shown.iter().find(|name| name.starts_with("late")).unwrap();
    assert_eq!(fs::read(home.join("new").join(late)).unwrap(), b"Subject: 0\n\n");
    assert!(!gc(&mount, &["--full"]).contains("adopted"));
    mount.umount().unwrap();
}

/// The same against an S3 server: bulk requests, and its clock.
#[test]
fn gc_on_s3() {
    let weed = weed::server();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bucket = runtime.block_on(weed.new_bucket());
    let (id, secret) = (weed.access_key_id(), weed.secret_access_key());
    let mut mount =
        Mount::on_s3(&weed.endpoint(), &bucket, id, secret).option(&["--set", "retention=2s"]);
    mount.mount().unwrap();
    let home = make_home(&mount.root(), "joe", 6);
    for i in 0..5 {
        fs::remove_file(home.join(format!("new/{i}"))).unwrap();
    }
    assert!(mount.vmailfs(&["metacache", "flushall"]).unwrap().0);
    std::thread::sleep(Duration::from_secs(4));
    let text = gc(&mount, &["-u", "joe", "--full"]);
    assert!(text.contains("joe: deleted 5 mails"), "{text}");
    let (_, text) = mount.vmailfs(&["status", "--json"]).unwrap();
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    let requests = status["requests"].as_array().unwrap();
    let deletes = requests.iter().find(|r| r["operation"] == "delete" && r["reason"] == "gc");
    assert_eq!(deletes.unwrap()["count"], 1, "{text}");
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    assert_eq!(names(&home.join("new")), ["5"]);
    assert_eq!(fs::read(home.join("new/5")).unwrap(), b"Subject: 5\n\n");
    mount.umount().unwrap();
}
