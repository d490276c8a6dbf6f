//! Mounts in the NFS mode. No machine of ours has an NFS client: one directory, mounted twice, plays
//! an NFS server and two hosts; `tests/README.md` says what that leaves untested.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::dovecot::{Dovecot, Format, Layout};
use support::mount::Mount;
use support::{MAIL_UID, mail_root, scratch, wait_until};

/// Users of these tests are logged out after this.
const IDLE: Duration = Duration::from_millis(300);
const USER: &str = "u1@example.com";

fn mounted(nfs: &Path, host: &str, more: &[&str]) -> Mount {
    let mut mount = Mount::on_nfs(nfs, host)
        .option(&[
            "--set",
            "hostchange.login_idle=300ms",
            "--set",
            "hostchange.attribute_cache=50ms",
        ])
        .option(&["--set", "hostchange.index_dir=index", "--set", "hostchange.listindex_layout=%u"])
        .option(more);
    mount.mount().unwrap();
    mount
}

fn hostchange(mount: &Mount) -> BTreeMap<String, Value> {
    let root = mount.root();
    let (ok, text) = mount.vmailfs(&["status", root.to_str().unwrap(), "--json"]).unwrap();
    assert!(ok, "{text}");
    let status: Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(status["hostchange"].clone()).unwrap()
}

fn number(mount: &Mount, name: &str) -> u64 {
    hostchange(mount)[name].as_u64().unwrap()
}

/// Until nobody has a session.
fn until_idle(mount: &Mount) {
    assert!(wait_until(Duration::from_secs(20), || number(mount, "active") == 0));
}

fn lock(file: &File, kind: libc::c_int, wait: bool) -> std::io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let command = if wait { libc::F_SETLKW } else { libc::F_SETLK };
    // SAFETY: the descriptor is open and the lock valid for the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn files_go_straight_through() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    std::fs::create_dir_all(nfs.join("u/index")).unwrap();
    for more in [&[][..], &["--set", "fuse.passthrough=no"]] {
        let a = mounted(&nfs, "a", more);
        let dir = a.root().join("u");
        std::fs::write(dir.join("mail"), "one").unwrap();
        assert_eq!(std::fs::read_to_string(nfs.join("u/mail")).unwrap(), "one");
        // What another host writes is seen: a page cache of our own would be stale.
        let file = open(&dir.join("mail"));
        let mut bytes = [0; 3];
        file.read_exact_at(&mut bytes, 0).unwrap();
        std::fs::write(nfs.join("u/mail"), "two").unwrap();
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"two", "{more:?}");
        // Appends of two hosts, each at the end there is.
        let mut append = File::options().append(true).open(dir.join("mail")).unwrap();
        use std::io::Write;
        append.write_all(b"+a").unwrap();
        File::options()
            .append(true)
            .open(nfs.join("u/mail"))
            .unwrap()
            .write_all(b"+other")
            .unwrap();
        append.write_all(b"+a").unwrap();
        append.sync_all().unwrap();
        assert_eq!(std::fs::read_to_string(nfs.join("u/mail")).unwrap(), "two+a+other+a");
        // Many names, and a directory that is read while it is emptied.
        for n in 0..1500 {
            std::fs::write(dir.join(format!("index/f{n}")), "").unwrap();
        }
        let listed: BTreeSet<_> =
            std::fs::read_dir(dir.join("index")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(listed.iter().filter(|n| n.to_str().unwrap().starts_with('f')).count(), 1500);
        for n in 0..1500 {
            std::fs::remove_file(dir.join(format!("index/f{n}"))).unwrap();
        }
        std::fs::hard_link(dir.join("mail"), dir.join("second")).unwrap();
        assert_eq!(std::fs::metadata(nfs.join("u/second")).unwrap().nlink(), 2);
        std::fs::rename(dir.join("second"), dir.join("mail")).unwrap();
        std::os::unix::fs::symlink("mail", dir.join("link")).unwrap();
        assert_eq!(std::fs::read_link(dir.join("link")).unwrap(), Path::new("mail"));
        std::fs::remove_file(dir.join("link")).unwrap();
        std::fs::remove_file(dir.join("second")).unwrap();
        std::fs::set_permissions(dir.join("mail"), PermissionsExt::from_mode(0o640)).unwrap();
        let time = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        open(&dir.join("mail")).set_modified(time).unwrap();
        let there = std::fs::metadata(nfs.join("u/mail")).unwrap();
        assert_eq!((there.mode() & 0o777, there.mtime()), (0o640, 1_000_000_000));
        let mut a = a;
        a.umount().unwrap();
    }
}

/// What `fuse.passthrough` is for: data does not come by.
#[test]
fn data_goes_past_the_daemon() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    std::fs::create_dir_all(nfs.join("u/index")).unwrap();
    let a = mounted(&nfs, "a", &[]);
    let path = a.root().join("u/mail");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap().len(), 1 << 20);
    let root = a.root();
    let (_, text) = a.vmailfs(&["status", root.to_str().unwrap(), "--json"]).unwrap();
    let status: Value = serde_json::from_str(&text).unwrap();
    let operations = status["operations"].as_array().unwrap();
    assert!(operations.iter().any(|o| o["operation"] == "create"), "{operations:?}");
    let data = |o: &&Value| o["operation"] == "read" || o["operation"] == "write";
    if a.log().contains("passthrough is off") {
        return;
    }
    assert_eq!(operations.iter().find(data), None);
}

#[test]
fn locks_reach_other_hosts() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    std::fs::create_dir_all(nfs.join("u/index")).unwrap();
    std::fs::write(nfs.join("u/mail"), "x").unwrap();
    let (a, b) = (mounted(&nfs, "a", &[]), mounted(&nfs, "b", &[]));
    let (on_a, on_b) = (open(&a.root().join("u/mail")), open(&b.root().join("u/mail")));
    lock(&on_a, libc::F_WRLCK, false).unwrap();
    let refused = lock(&on_b, libc::F_RDLCK, false).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
    // One that waits gets it when the other lets go, not before.
    let let_go = Arc::new(AtomicBool::new(false));
    let seen = let_go.clone();
    let waiter = std::thread::spawn(move || {
        lock(&on_b, libc::F_WRLCK, true).map(|()| (seen.load(Ordering::SeqCst), on_b))
    });
    std::thread::sleep(Duration::from_millis(300));
    let_go.store(true, Ordering::SeqCst);
    lock(&on_a, libc::F_UNLCK, false).unwrap();
    let (after, on_b) = waiter.join().unwrap().unwrap();
    assert!(after, "two have the lock");
    assert!(lock(&on_a, libc::F_WRLCK, false).is_err());
    // Closing any descriptor of the file lets go, as POSIX has it.
    drop(open(&b.root().join("u/mail")));
    lock(&on_a, libc::F_WRLCK, false).unwrap();
    drop(on_b);
    // An alarm ends a wait: that is how Dovecot limits its own.
    let script = r#"use Fcntl; open(F, "+<", $ARGV[0]) or die; $SIG{ALRM} = sub { alarm 1 }; alarm 1;
        my $l = pack("s s x4 q q l x4", F_WRLCK, 0, 0, 0, 0);
        exit(fcntl(F, F_SETLKW, $l) ? 0 : $!{EINTR} ? 3 : 4)"#;
    let begun = Instant::now();
    let mut perl = Command::new("perl");
    let status = perl.args(["-e", script]).arg(b.root().join("u/mail")).status().unwrap();
    assert_eq!(status.code(), Some(3));
    assert!(begun.elapsed() < Duration::from_secs(45), "{:?}", begun.elapsed());
    // And so does a kill; what the dead had is free.
    let wait = script.replace("alarm 1;", "");
    let mut perl = Command::new("perl");
    let mut child = perl.args(["-e", &wait]).arg(b.root().join("u/mail")).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    child.kill().unwrap();
    let begun = Instant::now();
    child.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    lock(&on_a, libc::F_UNLCK, false).unwrap();
    let again = open(&b.root().join("u/mail"));
    assert!(wait_until(Duration::from_secs(60), || lock(&again, libc::F_WRLCK, false).is_ok()));
}

#[test]
fn a_lock_is_not_waited_for_for_ever() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    std::fs::create_dir_all(nfs.join("u/index")).unwrap();
    std::fs::write(nfs.join("u/mail"), "x").unwrap();
    let a = mounted(&nfs, "a", &["--set", "hostchange.lock_wait=500ms"]);
    // Held where only the "server" sees it.
    let held = open(&nfs.join("u/mail"));
    lock(&held, libc::F_WRLCK, false).unwrap();
    let on_a = open(&a.root().join("u/mail"));
    let begun = Instant::now();
    let refused = lock(&on_a, libc::F_WRLCK, true).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
    assert!(begun.elapsed() >= Duration::from_millis(490), "{:?}", begun.elapsed());
}

/// What every folder must show.
#[derive(Debug, Default)]
struct Model {
    folders: BTreeMap<String, u32>,
    made: u32,
}

/// A host: its mount (or, for comparison, only a directory) and its Dovecot.
struct Host {
    dovecot: Dovecot,
    mount: Option<Mount>,
}

impl Host {
    /// A session: what it shows is right, then it changes things. Returns what was wrong.
    fn session(&self, model: &mut Model, step: usize) -> Vec<String> {
        let mut imap = self.dovecot.imap(USER).unwrap();
        let mut wrong = Vec::new();
        let listed = imap.list().unwrap();
        let expected: BTreeSet<String> = model.folders.keys().cloned().collect();
        if listed != expected {
            wrong.push(format!("step {step}: LIST {listed:?}, not {expected:?}"));
        }
        for (folder, count) in &model.folders {
            match imap.status(folder) {
                Ok(status) if status.exists == *count => {}
                other => {
                    wrong.push(format!("step {step}: STATUS {folder}: {other:?}, not {count}"))
                }
            }
        }
        let mail = format!(
            "From: a@b\r\nSubject: {step}\r\nMessage-ID: <{step}@x>\r\n\r\ntext {step}\r\n"
        );
        let answers =
            self.dovecot.ports().lmtp().unwrap().deliver(&[USER], mail.as_bytes()).unwrap();
        assert!(answers[0].accepted(), "{answers:?}");
        *model.folders.get_mut("INBOX").unwrap() += 1;
        let others: Vec<String> = model.folders.keys().filter(|f| *f != "INBOX").cloned().collect();
        match step % 4 {
            0 | 1 => {
                model.made += 1;
                let name = format!("Folder{}", model.made);
                imap.create(&name).unwrap();
                imap.append_many(&name, &[mail.clone().into_bytes(), mail.clone().into_bytes()])
                    .unwrap();
                model.folders.insert(name, 2);
            }
            2 => {
                if let Some(old) = others.first() {
                    model.made += 1;
                    let new = format!("Renamed{}", model.made);
                    imap.rename(old, &new).unwrap();
                    let count = model.folders.remove(old).unwrap();
                    model.folders.insert(new, count);
                }
            }
            _ => {
                if others.len() > 6 {
                    imap.delete(&others[0]).unwrap();
                    model.folders.remove(&others[0]);
                }
                if let Some(folder) = others.last() {
                    imap.append_many(folder, &[mail.into_bytes()]).unwrap();
                    *model.folders.get_mut(folder).unwrap() += 1;
                }
            }
        }
        for folder in model.folders.keys() {
            imap.status(folder).unwrap();
        }
        imap.logout();
        if let Some(mount) = &self.mount {
            until_idle(mount);
        }
        wrong
    }
}

/// As on NFS, and so that Dovecot believes its list index wherever it may: staleness shows.
fn layout(listindex: &str) -> Layout {
    Layout::new(Format::Maildir, &format!("maildir:~/mail:INDEX=~/index{listindex}"))
        .setting("mmap_disable = yes")
        .setting("mail_fsync = always")
        .setting("mailbox_list_index_very_dirty_syncs = yes")
}

/// On which host the steps are: some stay for a session or two.
fn hosts_of(changes: usize) -> Vec<usize> {
    let mut hosts = Vec::new();
    for change in 0..=changes {
        hosts.extend(std::iter::repeat_n(change % 2, 1 + usize::from(change % 4 < 2)));
    }
    hosts
}

fn alternate(hosts: &[Host; 2], order: &[usize]) -> (Model, Vec<String>) {
    let mut model = Model::default();
    model.folders.insert("INBOX".into(), 0);
    let mut wrong = Vec::new();
    for (step, host) in order.iter().enumerate() {
        wrong.extend(hosts[*host].session(&mut model, step));
    }
    (model, wrong)
}

/// Done-when 2.
#[test]
fn a_user_alternates_between_two_hosts() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    let users = vec![USER.to_owned()];
    let hosts = ["a", "b"].map(|name| {
        let mount = mounted(&nfs, name, &[]);
        let dovecot = Dovecot::start(&mount.root(), &layout(""), &users).unwrap();
        Host { dovecot, mount: Some(mount) }
    });
    let order = hosts_of(50);
    let (model, wrong) = alternate(&hosts, &order);
    assert_eq!(wrong, [""; 0]);
    assert!(model.folders.len() > 4, "{model:?}");
    let complaints: Vec<String> = hosts.iter().flat_map(|h| h.dovecot.complaints()).collect();
    assert_eq!(complaints, [""; 0]);
    // Kept where the host did not change, dropped where it did. The first of all logins may take some
    // accesses, until Dovecot has made the INDEX directory.
    let of = |name: &str| hosts.each_ref().map(|h| number(h.mount.as_ref().unwrap(), name));
    let (kept, dropped) = (of("kept"), of("dropped"));
    println!("{} sessions, 50 changes: kept {kept:?}, dropped {dropped:?}", order.len());
    assert_eq!(dropped.iter().sum::<u64>(), 51);
    let stayed = order.windows(2).filter(|w| w[0] == w[1]).count() as u64;
    assert!(kept.iter().sum::<u64>() >= stayed, "{kept:?}, {stayed}");
    for host in &hosts {
        let mount = host.mount.as_ref().unwrap();
        assert_eq!(
            (number(mount, "contested"), number(mount, "failed")),
            (0, 0),
            "{}",
            mount.log()
        );
        assert!(mount.beside("shm/list").join(USER).join("dovecot.list.index.log").exists());
    }
    let lists: Vec<PathBuf> = std::fs::read_dir(nfs.join(USER).join("index"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with("dovecot.list.index"))
        .collect();
    assert_eq!(lists, Vec::<PathBuf>::new(), "on NFS");
}

/// The same without the mode is wrong: so the test above can see it.
#[test]
fn without_the_mode_the_other_hosts_changes_are_missed() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    let users = vec![USER.to_owned()];
    let hosts = ["a", "b"].map(|name| {
        let shm = nfs.join(format!("shm-{name}"));
        std::fs::create_dir(&shm).unwrap();
        std::os::unix::fs::chown(&shm, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
        let listindex = format!(":LISTINDEX={}/%u/dovecot.list.index", shm.display());
        let dovecot = Dovecot::start(&nfs, &layout(&listindex), &users).unwrap();
        Host { dovecot, mount: None }
    });
    let (_, wrong) = alternate(&hosts, &hosts_of(10));
    assert!(!wrong.is_empty(), "a list index of another time did no harm");
}

/// A mount with names and attributes cached for long plays an NFS client; it asks anew when a
/// file is opened, as NFS does. `stat` alone would miss the other host.
#[test]
fn attribute_caching_does_not_hide_a_change() {
    let place = scratch("nfs-server");
    std::fs::create_dir_all(place.path().join("vmail/tree/index")).unwrap();
    let more = ["--set", "hostchange.attribute_cache=60s", "--set", "hostchange.login_idle=10min"];
    let clients = ["a", "b"].map(|name| mounted(&place.path().join("vmail"), name, &more));
    let shm = scratch("nfs-shm");
    let login = |host: usize| {
        let name = ["a", "b"][host];
        let local = shm.path().join(name).join("list");
        let output = Command::new(env!("CARGO_BIN_EXE_vmailfs"))
            .args(["nfs", "login", "-u", "u", "--settle", "0s", "--host", name, "--index"])
            .arg(clients[host].root().join("tree/index"))
            .arg("--listindex")
            .arg(&local)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let file = local.join("dovecot.list.index");
        let kept = file.exists();
        std::fs::write(file, "built").unwrap();
        kept
    };
    let lasthost = |host: usize| {
        std::fs::metadata(clients[host].root().join("tree/index/.lasthost")).unwrap().ino()
    };
    let mut missed = 0;
    for _ in 0..10 {
        assert!(!login(0));
        assert!(!login(0), "not settled");
        assert!(login(0), "nobody else was here");
        let before = lasthost(0);
        assert!(!login(1));
        missed += usize::from(lasthost(0) == before);
    }
    assert_eq!(missed, 10, "these clients do not cache, so this shows nothing");
}

/// Requests that reach the "server" in a session that looks at the folders, counted where it is.
fn requests_of_a_login(with: bool) -> u64 {
    let place = scratch("nfs-server");
    let nfs = mail_root(&place.path().join("."));
    // Plays the NFS client: what it is asked, the server is asked.
    let mut client = Mount::on_nfs(place.path(), "client").option(&[
        "--set",
        "hostchange.attribute_cache=1s",
        "--set",
        "hostchange.login_idle=10min",
        "--set",
        "fuse.passthrough=no",
    ]);
    client.mount().unwrap();
    let below = client.root().join(nfs.file_name().unwrap());
    let mount = with.then(|| mounted(&below, "a", &["--set", "fuse.passthrough=no"]));
    let root = mount.as_ref().map_or(below.clone(), Mount::root);
    let users = vec![USER.to_owned()];
    let dovecot = Dovecot::start(&root, &layout(""), &users).unwrap();
    let mut model = Model::default();
    model.folders.insert("INBOX".into(), 0);
    let host = Host { dovecot, mount };
    for step in 0..12 {
        host.session(&mut model, step);
    }
    let asked = || {
        let at = client.root();
        let (_, text) = client.vmailfs(&["status", at.to_str().unwrap(), "--json"]).unwrap();
        let status: Value = serde_json::from_str(&text).unwrap();
        let all = status["operations"].as_array().unwrap();
        let counted =
            all.iter().filter(|o| o["operation"] != "forget" && o["operation"] != "release");
        counted.map(|o| o["count"].as_u64().unwrap()).sum::<u64>()
    };
    const LOGINS: u64 = 5;
    // Each login finds nothing of the one before in the client's cache.
    std::thread::sleep(Duration::from_millis(1500));
    let before = asked();
    for _ in 0..LOGINS {
        let mut imap = host.dovecot.imap(USER).unwrap();
        assert_eq!(imap.list().unwrap().len(), model.folders.len());
        for folder in model.folders.keys() {
            imap.status(folder).unwrap();
        }
        imap.logout();
        std::thread::sleep(Duration::from_millis(1500));
    }
    (asked() - before) / LOGINS
}

/// A figure, and that the check costs less than the list index on NFS does.
#[test]
fn requests_per_login() {
    let (without, with) = (requests_of_a_login(false), requests_of_a_login(true));
    println!("requests to the server per login: {without} without the mode, {with} with it");
    assert!(with < without, "{with} with the mode, {without} without");
}

/// The same check by Dovecot's own login, where nothing is mounted.
#[test]
fn a_post_login_script_makes_the_check() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    let users = vec![USER.to_owned()];
    let hosts = ["a", "b"].map(|name| {
        let shm = place.path().join(format!("shm-{name}/list"));
        std::fs::create_dir_all(&shm).unwrap();
        let script = place.path().join(format!("postlogin-{name}"));
        let text = format!(
            "#!/bin/sh\nexec {} nfs login --host {name} --settle 0s -u \"$USER\" --index \"$HOME/index\" \
             --listindex '{}/%u' -- \"$@\"\n",
            env!("CARGO_BIN_EXE_vmailfs"),
            shm.display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&shm, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
        let listindex = format!(":LISTINDEX={}/%u/dovecot.list.index", shm.display());
        let services = format!(
            "service imap {{\n executable = imap imap-postlogin\n}}\nservice imap-postlogin {{\n \
             executable = script-login {}\n user = root\n unix_listener imap-postlogin {{\n }}\n}}",
            script.display()
        );
        let layout = layout(&listindex).setting(&services);
        Host { dovecot: Dovecot::start(&nfs, &layout, &users).unwrap(), mount: None }
    });
    let (_, wrong) = alternate(&hosts, &hosts_of(10));
    let complaints: Vec<String> = hosts.iter().flat_map(|h| h.dovecot.complaints()).collect();
    assert_eq!((wrong, complaints), (Vec::new(), Vec::new()));
    let last = std::fs::read_to_string(nfs.join(USER).join("index/.lasthost")).unwrap();
    assert_eq!(last, "a\n");
}

/// `/dev/shm` is full: mail goes on, without a list index.
#[test]
fn no_room_for_a_list_index() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    let mut a = Mount::on_nfs(&nfs, "a").option(&["--set", "hostchange.index_dir=index"]);
    let shm = a.beside("shm");
    let small = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs"])
        .arg(&shm)
        .status();
    assert!(small.unwrap().success());
    struct Umount(PathBuf);
    impl Drop for Umount {
        fn drop(&mut self) {
            let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let _umount = Umount(shm.clone());
    std::fs::write(shm.join("filler"), vec![1; 60 << 10]).unwrap();
    let _ = std::fs::write(shm.join("more"), vec![1; 16 << 10]);
    a.mount().unwrap();
    let users = vec![USER.to_owned()];
    let dovecot = Dovecot::start(&a.root(), &layout(""), &users).unwrap();
    let mut imap = dovecot.imap(USER).unwrap();
    imap.create("Folder").unwrap();
    imap.append_many("Folder", &[b"Subject: x\r\n\r\ntext\r\n".to_vec()]).unwrap();
    assert_eq!(imap.status("Folder").unwrap().exists, 1);
    assert_eq!(imap.list().unwrap().len(), 2);
    imap.logout();
    assert!(a.log().contains("No space left") || number(&a, "failed") > 0, "{}", a.log());
}

/// A mount that plays the NFS client of a host, and the host's own mount on top of it.
fn behind_a_client(place: &Path) -> (Mount, Mount) {
    let nfs = mail_root(place);
    std::fs::create_dir_all(nfs.join("u/index")).unwrap();
    std::fs::write(nfs.join("u/mail"), "text").unwrap();
    let idle = ["--set", "hostchange.login_idle=10min", "--set", "fuse.passthrough=no"];
    let brief = ["--set", "hostchange.attribute_cache=10ms"];
    let mut client = Mount::on_nfs(place, "client").option(&idle).option(&brief);
    client.mount().unwrap();
    let host = mounted(&client.root().join("mail"), "a", &["--set", "fuse.passthrough=no"]);
    (client, host)
}

/// As with a hard mount and a server that is away for a while.
#[test]
fn a_server_that_hangs_is_waited_for() {
    let place = scratch("nfs-server");
    let (client, a) = behind_a_client(place.path());
    assert_eq!(std::fs::read_to_string(a.root().join("u/mail")).unwrap(), "text");
    until_idle(&a);
    let pid = client.pid().unwrap() as libc::pid_t;
    // SAFETY: plain system calls; the process is this test's child.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    let path = a.root().join("u/mail");
    let reader = std::thread::spawn(move || std::fs::read_to_string(path));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!reader.is_finished(), "it cannot know");
    // The mount still says what it does.
    number(&a, "active");
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    assert_eq!(reader.join().unwrap().unwrap(), "text");
    until_idle(&a);
    assert_eq!(number(&a, "failed"), 0, "{}", a.log());
}

/// As with a soft mount: errors, and none of them says that something is not there.
#[test]
fn a_server_that_is_gone_is_no_absence() {
    let place = scratch("nfs-server");
    let (mut client, mut a) = behind_a_client(place.path());
    std::fs::write(a.root().join("u/index/dovecot.list.index"), "built").unwrap();
    until_idle(&a);
    client.kill9_only();
    std::thread::sleep(IDLE);
    for name in ["u/mail", "u/new", "u/index/dovecot.index.log", "u"] {
        let error = std::fs::metadata(a.root().join(name)).unwrap_err();
        assert_ne!(error.kind(), std::io::ErrorKind::NotFound, "{name}");
    }
    number(&a, "active");
    // What is here is not trusted without the server's word, and not lost for it.
    let list = a.beside("shm/list/u/dovecot.list.index");
    assert_eq!(std::fs::read_to_string(list).unwrap(), "built");
    a.umount().unwrap();
}

#[test]
fn the_mount_says_what_it_is_and_ends_like_others() {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    std::fs::create_dir_all(nfs.join("u/index")).unwrap();
    let mut a = mounted(&nfs, "a", &[]);
    std::fs::write(a.root().join("u/index/dovecot.list.index"), "x").unwrap();
    let root = a.root();
    let (ok, text) = a.vmailfs(&["status", root.to_str().unwrap()]).unwrap();
    assert!(ok && text.contains("NFS mode") && text.contains("1 dropped it"), "{text}");
    let (ok, text) = a.vmailfs(&["gc", "--mountpoint", root.to_str().unwrap()]).unwrap();
    assert!(!ok && text.contains("NFS mode"), "{text}");
    a.umount().unwrap();
    // The session ended with the mount: nothing is rebuilt after a restart.
    a.mount().unwrap();
    assert_eq!(std::fs::read_to_string(a.root().join("u/index/dovecot.list.index")).unwrap(), "x");
    assert_eq!(number(&a, "kept"), 1);
    // After a crash nobody knows what the session had been.
    std::thread::sleep(IDLE * 2);
    a.kill9();
    a.mount().unwrap();
    assert_eq!(std::fs::read_to_string(a.root().join("u/index/dovecot.list.index")).unwrap(), "x");
    a.umount().unwrap();
    // A server that is not there is said at once.
    let mut gone = Mount::on_nfs(&nfs.join("gone"), "a");
    let told = gone.mount().unwrap_err().to_string();
    assert!(told.contains("mount NFS there first"), "{told}");
}
