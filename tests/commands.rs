//! Commands on a real mount: what they say and their exit codes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
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
    assert_eq!(code, 67, "one of them is nobody");
    assert!(out.contains("1 user flushed") && out.contains("nobody: no such user"), "{out}");
    assert_eq!(run(&mount, &["metacache", "flush", "-F", "/none"]).0, 66);

    // Users by another name that they have.
    let set = ["metacache", "update", "userdb", "carl", "user_alias", "c@example.com"];
    assert_eq!(run(&mount, &set).0, 0);
    let bad = ["metacache", "update", "userdb", "carl", "alias", "c@example.com"];
    assert_eq!(run(&mount, &bad).0, 64);
    // Nobody gets another name, and none is made by it; who is gone can lose it.
    let set = |value| ["metacache", "update", "userdb", "nobody", "user_alias", value];
    for value in ["n@example.com", ""] {
        let (code, out, err) = run(&mount, &set(value));
        assert_eq!((code, out.as_str()), (67, ""), "{err}");
        assert!(err.contains("nobody: no such user"), "{err}");
    }
    let fields = mount.state().join("userdb-fields.json");
    let text = fs::read_to_string(&fields).unwrap();
    assert!(text.contains("carl") && !text.contains("nobody"), "{text}");
    fs::write(&fields, text.replacen('{', r#"{"nobody":{"user_alias":"n"},"#, 1)).unwrap();
    assert_eq!(run(&mount, &set("")).0, 0);
    assert!(!fs::read_to_string(&fields).unwrap().contains("nobody"));
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

/// I3: of a user that nobody has used since its changes were left by a mount that died.
#[test]
fn a_flush_uploads_what_a_dead_mount_left() {
    let mut mount = with_users(&["anna"]);
    assert_eq!(run(&mount, &["metacache", "flush", "-u", "anna"]).0, 0);
    fs::write(mount.root().join("anna/subscriptions"), "INBOX\nWork\n").unwrap();
    mount.kill9();
    mount.mount().unwrap();
    let (code, out, err) = run(&mount, &["metacache", "flush", "-p", "0", "-A"]);
    // The new mount opens who has changes by itself, and may have uploaded them before that.
    let done = out.starts_with("1 user flushed") || out.contains("1 had nothing to upload");
    assert_eq!((code, done), (0, true), "{out}{err}");
    mount.kill9();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    let text = fs::read_to_string(mount.root().join("anna/subscriptions")).unwrap();
    assert_eq!(text, "INBOX\nWork\n");
    mount.umount().unwrap();
}

#[test]
fn every_command_takes_the_mount_in_the_same_way() {
    let mut mount = with_users(&["anna"]);
    let place = mount.root().display().to_string();
    let at = ["--mountpoint", &place];
    for arguments in [&["status"][..], &["top", "--once", "-d", "0.1"], &["metacache", "list"]] {
        assert_eq!(run(&mount, &[arguments, &at].concat()).0, 0, "{arguments:?}");
    }
    assert_eq!(run(&mount, &["status", &place, "--mountpoint", &place]).0, 64);
    mount.umount().unwrap();
}

/// Nothing is refused to whom asks for what there is not.
#[test]
fn what_never_was_is_not_there() {
    let mut mount = with_users(&["anna"]);
    assert_eq!(run(&mount, &["metacache", "flush", "-u", "anna"]).0, 0);
    let dir = mount.beside("restored").display().to_string();
    let restore = ["user", "restore", "-u", "anna", "--at", "2h"];
    for how in [&["--in-place"][..], &["--in-place", "--dry-run"], &["--to", &dir]] {
        let (code, out, err) = run(&mount, &[&restore[..], how].concat());
        assert_eq!((code, out.as_str()), (66, ""), "{err}");
        assert!(err.contains("no state of that time: there was no such user yet"), "{err}");
    }
    let (code, out, err) = run(&mount, &["user", "undelete", "-u", "anna", "--folder", "Snt"]);
    assert_eq!((code, out.as_str()), (66, ""), "{err}");
    assert!(err.contains("anna: no folder Snt"), "{err}");
    assert_eq!(run(&mount, &["user", "undelete", "-u", "anna", "--folder", "INBOX"]).0, 0);
    let store = mount.store().to_owned();
    mount.umount().unwrap();
    let outside = [&restore[..], &["--to", &dir, "--store", &store]].concat();
    assert_eq!(run(&mount, &outside).0, 66);
}

/// A daemon that hangs keeps nobody waiting who asks how it is.
#[test]
fn a_stopped_daemon_is_told_of() {
    use nix::sys::signal::{Signal, kill};
    let mut mount = with_users(&["anna"]);
    let daemon = nix::unistd::Pid::from_raw(mount.running().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let root = mount.root();
    let begun = Instant::now();
    let (code, out, err) = run(&mount, &["status", root.to_str().unwrap()]);
    let took = begun.elapsed();
    assert_eq!((code, out.as_str()), (75, ""), "{err}");
    assert!(err.contains(&format!("(process {daemon}) does not answer")), "{err}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    kill(daemon, Signal::SIGCONT).unwrap();
    assert_eq!(run(&mount, &["status"]).0, 0);
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
    let closed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let closed = &closed;
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(700));
            closed.store(true, Ordering::SeqCst);
            drop(file);
        });
        assert_eq!(run(&mount, &[&wait[..], &["-t", "300"]].concat()).0, 0);
        assert!(closed.load(Ordering::SeqCst), "it has waited");
    });
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

fn json(mount: &Mount, arguments: &[&str]) -> serde_json::Value {
    let (code, out, err) = run(mount, arguments);
    assert_eq!(code, 0, "{arguments:?}: {err}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

#[test]
fn the_list_has_the_documented_fields() {
    let mut mount = with_users(&["anna", "ben"]);
    let set = ["metacache", "update", "userdb", "ben", "user_alias", "b@example.com"];
    assert_eq!(run(&mount, &set).0, 0);
    let all = json(&mount, &["-f", "json", "metacache", "list"]);
    assert_eq!(all.as_array().unwrap().len(), 2);
    let (anna, ben) = (&all[0], &all[1]);
    assert_eq!((&anna["username"], &ben["username"]), (&"anna".into(), &"ben".into()));
    assert_eq!((&anna["user_alias"], &ben["user_alias"]), (&().into(), &"b@example.com".into()));
    assert_eq!(anna["changes"], "important");
    assert!(anna["upload-within"].as_u64().unwrap() <= 300);
    assert!(anna["bytes-used(0)"].as_u64().unwrap() > 0, "{anna}");
    for priority in 0..4 {
        assert!(anna[format!("bytes-used({priority})")].is_u64());
        assert!(anna[format!("last-access({priority})")].is_i64());
    }
    assert!(anna["cleanup-weight"].as_i64().unwrap() > 1_600_000_000, "seconds, and then some");
    assert!(anna["dev-major"].is_u64() && anna["dev-minor"].is_u64());
    assert!(anna.as_object().unwrap().contains_key("last-service"));

    assert_eq!(run(&mount, &["metacache", "flush", "-u", "anna"]).0, 0);
    let after = json(&mount, &["metacache", "list", "-f", "json", "an*"]);
    assert_eq!(after.as_array().unwrap().len(), 1);
    assert_eq!(after[0]["changes"], "none");
    let by = ["-f", "tab", "metacache", "list", "-f", "user_alias", "*@example.com"];
    let (_, out, _) = run(&mount, &by);
    let lines: Vec<_> = out.lines().collect();
    assert!(lines[0].starts_with("username\tuser_alias\tupload-within\tdev-major\tdev-minor\t"));
    assert!(lines.len() == 2 && lines[1].starts_with("ben\tb@example.com\t"), "{out}");
    assert_eq!(run(&mount, &["metacache", "list", "-f", "colour"]).0, 64);
    let shown = fs::read_to_string(mount.root().join(".vmailfs/list")).unwrap();
    assert!(shown.starts_with("username") && shown.contains("anna"), "{shown}");

    // Only users with changes of a priority are flushed for it.
    fs::write(mount.root().join("anna/subscriptions"), "B\n").unwrap();
    let (_, out, _) = run(&mount, &["metacache", "flush", "-p", "3", "-u", "anna"]);
    assert!(out.starts_with("0 users flushed"), "{out}");
    let (_, out, _) = run(&mount, &["metacache", "flush", "-p", "0", "-u", "anna"]);
    assert!(out.starts_with("1 user flushed"), "{out}");

    let roots = json(&mount, &["-f", "json", "metacache", "status", "--roots", "-b"]);
    assert_eq!(roots[0]["users"], 2);
    assert!(roots[0]["bytes-used"].as_u64().unwrap() > 0);
    let spans = json(&mount, &["-f", "json", "metacache", "status", "-b"]);
    assert_eq!(
        (&spans[0]["last-access"], &spans[0]["users"]),
        (&"within an hour".into(), &2.into())
    );
    let (_, out, _) = run(&mount, &["metacache", "rescan"]);
    assert!(out.starts_with("2 users, ") && out.contains("the books were right"), "{out}");
    mount.umount().unwrap();
}

#[test]
fn fscache_is_counted_and_emptied() {
    let mut mount = with_users(&["anna"]);
    let home = mount.root().join("anna");
    for dir in ["tmp", "new", "cur"] {
        fs::create_dir(home.join(dir)).unwrap();
    }
    for n in 0..3 {
        let tmp = home.join(format!("tmp/{n}"));
        fs::write(&tmp, vec![b'x'; 10_000]).unwrap();
        fs::rename(tmp, home.join(format!("new/{n}"))).unwrap();
    }
    let status = json(&mount, &["-f", "json", "fscache", "status", "-b"]);
    assert_eq!(status[0]["files"], 3);
    let used = status[0]["bytes-used"].as_u64().unwrap();
    assert!(used >= 30_000);
    let (_, out, _) = run(&mount, &["fscache", "rescan"]);
    assert!(out.contains("the size was right"), "{out}");

    // Somebody removes one: the books are off by it, once.
    let cache = mount.state().join("fscache");
    let mut copies = Vec::new();
    for hh in fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()) {
        let Ok(inside) = fs::read_dir(hh.join("anna")) else { continue };
        copies.extend(inside.map(|e| e.unwrap().path()));
    }
    assert_eq!(copies.len(), 3);
    fs::remove_file(&copies[0]).unwrap();
    let (_, out, _) = run(&mount, &["fscache", "rescan", cache.to_str().unwrap()]);
    assert!(out.contains("the size was wrong by "), "{out}");
    let (_, out, _) = run(&mount, &["fscache", "rescan"]);
    assert!(out.contains("2 files") && out.contains("the size was right"), "{out}");
    let (code, _, err) = run(&mount, &["fscache", "rescan", "/tmp"]);
    assert_eq!((code, err.contains("no fscache is there")), (64, true), "{err}");
    assert_eq!(run(&mount, &["fscache", "rescan", cache.to_str().unwrap(), "soon"]).0, 64);
    std::thread::sleep(Duration::from_millis(3100));
    let (_, out, _) = run(&mount, &["fscache", "rescan", cache.to_str().unwrap(), "1"]);
    assert!(out.contains("0 files"), "old enough are all: {out}");
    assert_eq!(run(&mount, &["fscache", "clean"]).0, 0);
    for n in 0..3 {
        assert_eq!(fs::read(home.join(format!("new/{n}"))).unwrap().len(), 10_000);
    }
    let (_, out, _) = run(&mount, &["fscache", "clean"]);
    assert!(out.contains("3 files"), "{out}");
    mount.umount().unwrap();
}

#[test]
fn a_deleted_user_is_empty_and_can_come_back() {
    let mut mount = with_users(&["anna"]);
    let home = mount.root().join("anna");
    for dir in ["tmp", "new", "cur", ".Sent", ".Sent/new"] {
        fs::create_dir(home.join(dir)).unwrap();
    }
    fs::write(home.join(".Sent/new/1"), "mine").unwrap();
    assert_eq!(run(&mount, &["metacache", "flush", "-u", "anna"]).0, 0);
    let file = fs::File::open(home.join("subscriptions")).unwrap();
    let delete = ["obox", "user", "delete", "-u", "anna"];
    assert_eq!(run(&mount, &delete).0, 65);
    assert_eq!(fs::read(home.join(".Sent/new/1")).unwrap(), b"mine");
    drop(file);
    assert!(support::wait_until(Duration::from_secs(60), || run(&mount, &delete).0 == 0));
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    assert!(fs::metadata(home.join(".Sent/new/1")).is_err(), "nor does the kernel remember it");
    assert_eq!(run(&mount, &["obox", "user", "delete", "-A"]).0, 64);
    let undelete = ["user", "undelete", "-u", "anna"];
    let (code, out, err) = run(&mount, &undelete);
    assert_eq!(code, 0, "{out}{err}");
    let back = home.join(".Sent/new");
    let name = fs::read_dir(&back).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::read(name).unwrap(), b"mine");
    mount.umount().unwrap();
}

#[test]
fn an_unmount_does_not_wait_for_who_holds_a_file() {
    let mut mount = with_users(&["anna"]);
    let held = fs::File::open(mount.root().join("anna/subscriptions")).unwrap();
    let begun = Instant::now();
    mount.umount().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
    drop(held);
}

/// What `arguments` writes to a terminal of its own until it has written `until`, then what it writes
/// after `keys`; and its exit code.
fn on_terminal(
    mount: &Mount,
    arguments: &[&str],
    until: &str,
    keys: &str,
) -> (String, String, i32) {
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || std::process::Stdio::from(pty.slave.as_fd().try_clone_to_owned().unwrap());
    let mut child = mount.spawn(arguments, [end(), end(), end()]).unwrap();
    drop(pty.slave);
    let mut master = fs::File::from(pty.master);
    let mut shown = Vec::new();
    let read = |shown: &mut Vec<u8>, done: &dyn Fn(&str) -> bool, master: &mut fs::File| {
        let mut piece = [0u8; 4096];
        // The other end of a terminal that is gone is an error, and the end.
        while let Ok(n @ 1..) = master.read(&mut piece) {
            shown.extend_from_slice(&piece[..n]);
            if done(&String::from_utf8_lossy(shown)) {
                break;
            }
        }
    };
    read(&mut shown, &|text| text.contains(until), &mut master);
    let before = String::from_utf8_lossy(&shown).into_owned();
    let _ = master.write_all(keys.as_bytes());
    let mut rest = Vec::new();
    read(&mut rest, &|_| false, &mut master);
    let code = child.wait().unwrap().code().unwrap();
    (before, String::from_utf8_lossy(&rest).into_owned(), code)
}

#[test]
fn top_renews_itself_and_leaves_the_terminal_as_it_was() {
    let mut mount = with_users(&["anna"]);
    for keys in ["q", "\u{3}"] {
        let (before, rest, code) = on_terminal(&mount, &["top", "-d", "0.2"], "KERNEL", keys);
        assert_eq!(code, 0, "{before}{rest}");
        assert!(before.contains("\u{1b}[?1049h") && before.contains("At risk: "), "{before}");
        assert!(rest.ends_with("\u{1b}[?25h\u{1b}[?1049l"), "{rest:?}");
    }
    mount.umount().unwrap();
}

#[test]
fn a_bar_shows_on_a_terminal_only() {
    let mut mount = with_users(&["anna", "ben"]);
    let line = ["metacache", "flushall"];
    let (shown, _, code) = on_terminal(&mount, &line, "flushed", "");
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("users") && shown.contains('\u{1b}'), "{shown:?}");
    assert_eq!(run(&mount, &line).2, "", "nothing on standard error elsewhere");
    mount.umount().unwrap();
}

#[test]
fn clean_leaves_what_is_not_uploaded_unless_it_is_told() {
    let mut mount = with_users(&["anna", "ben"]);
    let file = mount.root().join("anna/subscriptions");
    let used = |mount: &Mount, user: &str| -> u64 {
        let all = json(mount, &["metacache", "list", "-f", "json", user]);
        let row = &all[0];
        (0..4).map(|p| row[format!("bytes-used({p})")].as_u64().unwrap_or(0)).sum()
    };
    let (code, out, _) = run(&mount, &["metacache", "clean", "-u", "anna"]);
    assert_eq!((code, out.contains("in no flush")), (75, true), "{out}");
    assert!(used(&mount, "anna") > 0);
    assert_eq!(run(&mount, &["metacache", "clean", "--flush", "-u", "anna"]).0, 0);
    assert_eq!(fs::read_to_string(&file).unwrap(), "INBOX\n", "it comes back");

    // Discard: back to the last flush, also while the user is in use.
    fs::write(&file, "a change to forget\n").unwrap();
    let discard = ["metacache", "clean", "--discard", "-u", "anna"];
    let (code, _, err) = run(&mount, &discard);
    assert_eq!((code, err.contains("--yes")), (64, true), "{err}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "a change to forget\n");
    let (code, out, err) = run(&mount, &[&discard[..], &["--yes"]].concat());
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "INBOX\n");

    // By days: it was used today.
    assert_eq!(run(&mount, &["metacache", "flushall"]).0, 0);
    let before = used(&mount, "ben");
    assert_eq!(run(&mount, &["metacache", "clean", "-d", "1", "-u", "ben"]).0, 0);
    assert_eq!(used(&mount, "ben"), before);
    assert_eq!(run(&mount, &["metacache", "clean", "-u", "nobody"]).0, 67);

    // Forgotten, and back at the next access.
    let (code, out, err) = run(&mount, &["metacache", "remove", "b*"]);
    assert_eq!(code, 0, "{out}{err}");
    let all = json(&mount, &["metacache", "list", "-f", "json"]);
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    assert_eq!(run(&mount, &["metacache", "remove"]).0, 64, "a mask is required");
    assert_eq!(fs::read_to_string(mount.root().join("ben/subscriptions")).unwrap(), "INBOX\n");
    let held = fs::File::open(mount.root().join("ben/subscriptions")).unwrap();
    let (code, out, _) = run(&mount, &["metacache", "remove", "ben"]);
    assert_eq!((code, out.contains("in use")), (75, true), "{out}");
    drop(held);
    assert_eq!(run(&mount, &["metacache", "refresh", "-A"]).0, 0);
    mount.umount().unwrap();
}
