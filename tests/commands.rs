//! Commands on a real mount: what they say and their exit codes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::time::{Duration, Instant};
use support::mount::Mount;

fn run(mount: &Mount, arguments: &[&str]) -> (i32, String, String) {
    let (code, out, err) = mount.exit_of(arguments).unwrap();
    (code.unwrap(), out, err)
}

fn with_users(names: &[&str]) -> Mount {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    for name in names {
        fs::create_dir(mount.root().join(name)).unwrap();
        fs::write(mount.root().join(name).join("subscriptions"), "INBOX\n").unwrap();
    }
    mount
}

#[test]
fn flushes_are_for_whom_they_say() {
    let mut mount = with_users(&["anna", "ben", "carl"]);
    let (code, out, err) = run(&mount, &["metacache", "flush", "-u", "anna"]);
    assert_eq!((code, out.starts_with("1 user flushed"), err.as_str()), (0, true, ""), "{out}");
    assert_eq!(run(&mount, &["metacache", "flush", "-u", "nobody"]).0, 67);
    assert_eq!(run(&mount, &["metacache", "flush"]).0, 64);
    assert_eq!(run(&mount, &["metacache", "flush", "-u", "a", "-A"]).0, 64);

    let list = mount.beside("list");
    fs::write(&list, "ben\n\nnobody\n").unwrap();
    let list = list.to_str().unwrap();
    let (code, out, _) = run(&mount, &["metacache", "flush", "-F", list]);
    assert_eq!(code, 75, "one of them is nobody");
    assert!(out.contains("1 user flushed") && out.contains("nobody: not flushed"), "{out}");
    assert_eq!(run(&mount, &["metacache", "flush", "-F", "/none"]).0, 66);

    // Users by another name that they have.
    let set = ["metacache", "update", "userdb", "carl", "user_alias", "c@example.com"];
    assert_eq!(run(&mount, &set).0, 0);
    let bad = ["metacache", "update", "userdb", "carl", "alias", "c@example.com"];
    assert_eq!(run(&mount, &bad).0, 64);
    let by_alias = ["metacache", "flushall", "-i", "-f", "user_alias", "*@example.com"];
    let (code, out, _) = run(&mount, &by_alias);
    assert_eq!((code, out.starts_with("1 user flushed")), (0, true), "{out}");
    let (code, out, _) = run(&mount, &["metacache", "flush", "-u", "?????*"]);
    assert_eq!((code, out.starts_with("0 users flushed")), (0, true), "{out}");
    let (code, out, _) = run(&mount, &["metacache", "flush", "-A"]);
    assert_eq!((code, out.contains("had nothing to upload")), (0, true), "{out}");
    // Quiet where nobody watches, unless asked.
    assert_eq!(run(&mount, &["metacache", "flushall"]).2, "");
    assert!(run(&mount, &["-v", "metacache", "flushall"]).2.contains("3 of 3 users"));
    mount.umount().unwrap();
}

#[test]
fn a_user_in_use_is_waited_for() {
    let mut mount = with_users(&["anna"]);
    let wait = ["obox", "user", "wait", "-u", "anna"];
    assert_eq!(run(&mount, &wait).0, 0, "nobody has a file open");
    let file = fs::File::open(mount.root().join("anna/subscriptions")).unwrap();
    let (code, _, err) = run(&mount, &wait);
    assert_eq!((code, err.contains("still open of: anna")), (65, true), "{err}");
    let closer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        drop(file);
    });
    let begun = Instant::now();
    assert_eq!(run(&mount, &[&wait[..], &["-t", "30"]].concat()).0, 0);
    assert!(begun.elapsed() > Duration::from_millis(500) && begun.elapsed().as_secs() < 20);
    closer.join().unwrap();
    assert_eq!(run(&mount, &["obox", "user", "wait", "-u", "nobody"]).0, 67);
    mount.umount().unwrap();
}

#[test]
fn a_bundle_can_be_looked_into() {
    let mut mount = with_users(&["anna"]);
    assert_eq!(run(&mount, &["metacache", "flush", "-u", "anna"]).0, 0);
    let store = std::path::PathBuf::from(mount.store().strip_prefix("file://").unwrap());
    let bundles = fs::read_dir(&store).unwrap().filter_map(|hh| {
        let dir = hh.ok()?.path().join("anna/bundle");
        fs::read_dir(dir).ok()?.next()?.ok().map(|e| e.path())
    });
    let bundle = bundles.last().unwrap();
    let from_file = mount.beside("from-file");
    let unpack = ["metacache", "unpack", bundle.to_str().unwrap(), from_file.to_str().unwrap()];
    let (code, out, err) = run(&mount, &unpack);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("files"), "{out}");
    let find = |dir: &std::path::Path| {
        let mut found = Vec::new();
        for frame in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            let file = frame.join("subscriptions");
            found.extend(fs::read_to_string(file).ok());
        }
        found
    };
    assert_eq!(find(&from_file), ["INBOX\n"]);
    assert_eq!(run(&mount, &unpack).0, 73, "there is something in it now");

    // By its key: through the mount, and from the store itself.
    let key = bundle.strip_prefix(&store).unwrap().to_str().unwrap();
    for (name, more) in [("by-mount", &[][..]), ("by-store", &["--store", mount.store()])] {
        let dir = mount.beside(name);
        let line = [&["metacache", "unpack", key, dir.to_str().unwrap()][..], more].concat();
        let (code, _, err) = run(&mount, &line);
        assert_eq!(code, 0, "{name}: {err}");
        assert_eq!(find(&dir), ["INBOX\n"], "{name}");
        assert!(!dir.join(".bundle").exists());
    }
    let dir = mount.beside("none");
    let dir = dir.to_str().unwrap();
    assert_eq!(run(&mount, &["metacache", "unpack", "aa/bundle/none", dir]).0, 64);
    assert_eq!(run(&mount, &["metacache", "unpack", "/etc/hostname", dir]).0, 65);
    mount.umount().unwrap();
}

#[test]
fn top_needs_no_terminal_for_one_view() {
    let mut mount = with_users(&["anna"]);
    let (code, out, err) = run(&mount, &["top", "--once", "--delay", "0.2"]);
    assert_eq!(code, 0, "{err}");
    for part in ["At risk: important changes of 1 user", "Store: answers", "KERNEL", "USER"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert!(!out.contains('\u{1b}'), "plain text");
    assert_eq!(run(&mount, &["top"]).0, 64, "no terminal");
    mount.umount().unwrap();
}
