//! Bad input, met by the real program: what is wrong with a request is told in one line, with an
//! exit code and nothing half-mounted; what is wrong with one user's data is that user's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::deaf::{self, Deaf};
use support::mount::{Mount, is_mounted};
use support::weed;

const USAGE: i32 = 64;
const UNAVAILABLE: i32 = 69;
const TEMP_FAIL: i32 = 75;
const NO_PERM: i32 = 77;
const CONFIG: i32 = 78;
const NO_USER: i32 = 67;
/// What mail servers take for "later".
const DEFERS: [i32; 2] = [libc::EAGAIN, libc::ENOSPC];

// ---- requests that are refused

/// A mount point and a state directory for commands that must fail.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let dir = support::scratch("bad");
        for name in ["mnt", "store"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        World { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn file_store(&self) -> String {
        format!("file://{}", self.text("store"))
    }

    fn mount(&self, store: &str, more: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmailfs"));
        command.args(["mount", store, &self.text("mnt"), "--state-dir", &self.text("state")]);
        command.args(more).stdin(Stdio::null());
        command.env("VMAILFS_RUN_DIR", self.path("run"));
        for name in ["VMAILFS_CONFIG", "VMAILFS_LOG", "AWS_PROFILE"] {
            command.env_remove(name);
        }
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("HOME", self.path("home"));
        support::die_with_parent(&mut command, libc::SIGTERM);
        command.output().unwrap()
    }

    /// The mount fails with this code and one line that holds `part`.
    fn refuses(&self, store: &str, more: &[&str], code: i32, part: &str) {
        let output = self.mount(store, more);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(part), "{part:?} is not in: {text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        assert!(!is_mounted(&self.path("mnt")), "half-mounted");
        assert!(!self.path("state/admin.sock").exists());
    }
}

#[test]
fn unknown_and_contradictory_configuration() {
    let w = World::new();
    let store = w.file_store();
    let with_file = |toml: &str, part: &str| {
        let path = w.path("c.toml");
        fs::write(&path, toml).unwrap();
        w.refuses(&store, &["--config", path.to_str().unwrap()], CONFIG, part);
    };
    with_file("upload_interval = \"5min\"\n", "there is `metacache.upload_interval`");
    with_file("[s3]\nendpiont = \"x\"\n", "is `s3.endpoint` meant?");
    with_file("[fscache]\nmax_size = \"many\"\n", "line 2: `many` is no size");
    with_file("root_mode = \"rwx\"\n", "`rwx` is no mode");
    with_file("owner = \"no-such-account:mail\"\n", "no-such-account");
    with_file("layout = \"%q\"\n", "%q");
    with_file("[store_limits\n", "line 1");
    with_file(
        "[store_limits]\nattempt_timeout = \"60s\"\ndeadline = \"5s\"\n",
        "attempt_timeout is longer than deadline",
    );
    let inside = format!("state_dir = \"{}/x\"\n", w.text("mnt"));
    fs::write(w.path("c.toml"), inside).unwrap();
    let cache = format!("fscache.path={}/cache", w.text("mnt"));
    w.refuses(&store, &["-o", &cache], CONFIG, "lie in one another");
    w.refuses(&store, &["--set", "frobnicate=1"], USAGE, "unknown key `frobnicate`");
    w.refuses(&store, &["--config", "/does/not/exist"], CONFIG, "/does/not/exist");
    assert!(!w.path("state").exists(), "a refused mount leaves nothing behind");
}

#[test]
fn a_store_that_is_not_there() {
    let w = World::new();
    let absent = format!("file://{}", w.text("absent"));
    w.refuses(&absent, &[], UNAVAILABLE, "does not exist");
    w.refuses("ftp://host/x", &[], CONFIG, "use file:///some/dir or s3://");
    let file = format!("file://{}", w.text("file"));
    fs::write(w.path("file"), "x").unwrap();
    w.refuses(&file, &[], UNAVAILABLE, "file");
}

/// I4: an empty directory in the place of a store that this machine knows is no new store, neither at
/// a mount nor under one.
#[test]
fn i4_a_store_whose_disk_is_not_mounted() {
    let mut mount = Mount::on_directory();
    let limits = "store_limits.delivery_timeout=2s";
    mount = mount.option(&["-o", limits]);
    mount.mount().unwrap();
    deliver(&mount, "ada", "1", b"mail");
    let place = PathBuf::from(mount.store().strip_prefix("file://").unwrap());
    let away = mount.beside("away");
    let swap = |empty: bool| match empty {
        true => {
            fs::rename(&place, &away).unwrap();
            fs::create_dir(&place).unwrap();
        }
        false => {
            fs::remove_dir_all(&place).unwrap();
            fs::rename(&away, &place).unwrap();
        }
    };
    swap(true);
    // As an earlier start without the disk may have left it.
    fs::create_dir(place.join(".tmp")).unwrap();
    let mut file = fs::File::create(mount.root().join("ada/tmp/2")).unwrap();
    file.write_all(b"it would be lost").unwrap();
    let error = file.sync_all().unwrap_err();
    assert!(DEFERS.contains(&error.raw_os_error().unwrap()), "{error}");
    drop(file);
    let error = fs::read_dir(mount.root().join("bob")).unwrap_err();
    assert!(DEFERS.contains(&error.raw_os_error().unwrap()), "{error}");
    assert_eq!(fs::read_dir(&place).unwrap().count(), 1, "nothing is put there");
    swap(false);
    let mut tries = 0..50;
    while mount.umount().is_err() && tries.next().is_some() {
        std::thread::sleep(Duration::from_millis(200));
    }
    swap(true);
    let refused = mount.mount().unwrap_err().to_string();
    assert!(refused.contains("Is its disk mounted"), "{refused}");
    swap(false);
    mount.mount().unwrap();
    assert_eq!(mails(&mount, "ada"), ["1"]);
    mount.umount().unwrap();
}

/// A check of nobody is not one that found nothing wrong.
#[test]
fn a_check_of_a_place_that_is_no_store() {
    let w = World::new();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmailfs"));
        let output = command.args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let store = w.file_store();
    let (code, text) = run(&["fsck", &store, "-A"]);
    assert_eq!(code, Some(UNAVAILABLE), "{text}");
    assert!(text.contains("no store of vmailfs"), "{text}");
    fs::write(w.path("store/format"), "vmailfs store 1\n").unwrap();
    let (code, text) = run(&["fsck", &store, "-A"]);
    assert_eq!((code, &*text), (Some(0), "no users\n"));
    let (code, text) = run(&["fsck", &store, "-u", "a*"]);
    assert_eq!((code, &*text), (Some(NO_USER), "vmailfs: a*: no such user\n"));
    let (code, text) = run(&["user", "restore", "--store", &store, "-u", "a", "--at", "1h"]);
    assert_eq!(code, Some(USAGE), "{text}");
    assert!(text.contains("--to <TO>|--in-place"), "{text}");
}

#[test]
fn an_endpoint_that_nobody_listens_at() {
    let w = World::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let keys = "s3.access_key_id=a,s3.secret_access_key=b";
    let limits = "store_limits.attempt_timeout=1s,store_limits.deadline=3s";
    let begin = Instant::now();
    let options = ["--s3-endpoint", &endpoint, "--s3-path-style", "-o", keys, "-o", limits];
    w.refuses("s3://bucket/p", &options, TEMP_FAIL, &endpoint);
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn wrong_credentials_and_a_missing_bucket() {
    let w = World::new();
    let server = weed::server();
    let endpoint = server.endpoint();
    let with =
        |id: &str, secret: &str| format!("s3.access_key_id={id},s3.secret_access_key={secret}");
    let right = with(server.access_key_id(), server.secret_access_key());
    let wrong = with(server.access_key_id(), "wrong");
    let nobody = with("nobody", "wrong");
    let s3 = ["--s3-endpoint", &endpoint, "--s3-path-style", "-o"];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bucket = format!("s3://{}", runtime.block_on(server.new_bucket()));
    for keys in [&wrong, &nobody] {
        w.refuses(&bucket, &[&s3[..], &[keys]].concat(), NO_PERM, "refuses access");
    }
    w.refuses("s3://no-such-bucket", &[&s3[..], &[&right]].concat(), UNAVAILABLE, "no-such-bucket");
    let half = "s3.access_key_id=a";
    w.refuses(&bucket, &[&s3[..], &[half]].concat(), CONFIG, "secret_access_key");
}

#[test]
fn a_store_without_conditional_writes() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for (kind, part) in [(Deaf::Ignores, "ignores If-None-Match"), (Deaf::Refuses, "knows no")] {
        let w = World::new();
        let (server, objects) = runtime.block_on(deaf::start(kind));
        let keys = "s3.access_key_id=a,s3.secret_access_key=b";
        let s3 = ["--s3-endpoint", &server.endpoint, "--s3-path-style", "-o", keys];
        w.refuses("s3://b/prefix", &s3, UNAVAILABLE, part);
        w.refuses("s3://b/prefix", &s3, UNAVAILABLE, "--single-backend");
        assert!(objects.lock().is_empty(), "a refused mount leaves nothing in the store");

        let mut mount = Mount::on_s3(&server.endpoint, "b", "a", "b").option(&["--single-backend"]);
        mount.mount().unwrap();
        assert!(mount.log().contains(part), "{}", mount.log());
        deliver(&mount, "ada", "1", b"Subject: one\n\nmail\n");
        mount.umount().unwrap();
        mount.wipe_state().unwrap();
        mount.mount().unwrap();
        assert_eq!(mails(&mount, "ada"), ["1"]);
        mount.umount().unwrap();
    }
}

#[test]
fn a_mount_point_or_a_state_directory_in_use() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    deliver(&mount, "ada", "1", b"mail");
    let w = World::new();
    let try_on = |point: &Path, state: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmailfs"));
        command.arg("mount").arg(w.file_store()).arg(point).arg("--state-dir").arg(state);
        let output = command.env("VMAILFS_RUN_DIR", w.path("run")).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = try_on(&mount.root(), &w.path("state"));
    assert_eq!(code, Some(UNAVAILABLE), "{text}");
    assert!(text.contains("something is mounted there already"), "{text}");
    let (code, text) = try_on(&w.path("mnt"), &mount.state());
    assert_eq!(code, Some(TEMP_FAIL), "{text}");
    assert!(text.contains("another vmailfs uses it"), "{text}");
    assert_eq!(text.trim_end().lines().count(), 1);
    assert_eq!(mails(&mount, "ada"), ["1"], "the first one goes on");
    mount.umount().unwrap();
}

// ---- versions

#[test]
fn a_store_and_a_state_directory_of_a_newer_version() {
    let w = World::new();
    fs::write(w.path("store/format"), "vmailfs store 2\n").unwrap();
    w.refuses(&w.file_store(), &[], CONFIG, "upgrade vmailfs");
    fs::write(w.path("store/format"), "something else").unwrap();
    w.refuses(&w.file_store(), &[], CONFIG, "not written by vmailfs");
    fs::remove_file(w.path("store/format")).unwrap();
    fs::create_dir_all(w.path("state")).unwrap();
    fs::write(w.path("state/format"), "vmailfs state 7\n").unwrap();
    w.refuses(&w.file_store(), &[], CONFIG, "format version 7 is newer than 1");
}

// ---- one user's data

/// Delivers as a mail server does: `tmp/`, fsync, rename into `new/`.
fn deliver(mount: &Mount, user: &str, name: &str, bytes: &[u8]) {
    let home = mount.root().join(user);
    for dir in ["cur", "new", "tmp"] {
        fs::create_dir_all(home.join(dir)).unwrap();
    }
    let temporary = home.join("tmp").join(name);
    let mut file = fs::File::create(&temporary).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    drop(file);
    fs::rename(&temporary, home.join("new").join(name)).unwrap();
}

fn try_mails(mount: &Mount, user: &str) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(mount.root().join(user).join("new"))? {
        names.push(entry?.file_name().into_string().unwrap());
    }
    names.sort();
    Ok(names)
}

fn mails(mount: &Mount, user: &str) -> Vec<String> {
    try_mails(mount, user).unwrap()
}

/// The user's calls are deferred (never "no such file", never what bounces mail), it is named in the
/// log with `part` and in the status; the other works.
fn only_ada_fails(mount: &Mount, part: &str) {
    for _ in 0..2 {
        let error = try_mails(mount, "ada").expect_err("a damaged user must not be served");
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN), "{error}\n{}", mount.log());
    }
    let create = fs::write(mount.root().join("ada/file"), "x").expect_err("nor written");
    assert_eq!(create.raw_os_error(), Some(libc::EAGAIN), "{create}");
    let (_, status) = mount.vmailfs(&["status", &mount.root().display().to_string()]).unwrap();
    assert!(status.contains("DAMAGED") && status.contains("ada"), "{status}");
    let log = mount.log();
    assert!(log.lines().any(|l| l.contains("ada") && l.contains(part)), "{part:?}: {log}");
    assert_eq!(mails(mount, "bob"), ["b1"]);
    deliver(mount, "bob", "b2", b"Subject: more\n\n");
    assert_eq!(mails(mount, "bob"), ["b1", "b2"]);
}

/// A store with mail of two users, unmounted.
fn two_users() -> Mount {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    deliver(&mount, "ada", "a1", b"Subject: ada\n\nmail\n");
    fs::write(mount.root().join("ada/.subscriptions"), "INBOX\n").unwrap();
    deliver(&mount, "bob", "b1", b"Subject: bob\n\nmail\n");
    mount.umount().unwrap();
    mount
}

/// The directory of a user in the directory store, or in the local state.
fn user_dir(top: &Path, user: &str) -> PathBuf {
    let mut found = fs::read_dir(top).unwrap().map(|e| e.unwrap().path().join(user));
    found.find(|p| p.is_dir()).expect("the user's directory")
}

fn store_dir(mount: &Mount, user: &str) -> PathBuf {
    user_dir(&mount.root().with_file_name("store"), user)
}

fn only_file(dir: &Path) -> PathBuf {
    let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all.pop().expect("a file")
}

/// The same object with other bytes. (Objects are replaced as the store does: by name.)
fn replace(path: &Path, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let bytes = change(fs::read(path).unwrap());
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn flip(at: usize) -> impl FnOnce(Vec<u8>) -> Vec<u8> {
    move |mut bytes| {
        bytes[at] ^= 0x20;
        bytes
    }
}

fn half(bytes: Vec<u8>) -> Vec<u8> {
    bytes[..bytes.len() / 2].to_vec()
}

#[test]
fn a_damaged_head() {
    let newer = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        text.replace("\"vmailfs-head\": 1", "\"vmailfs-head\": 2").into_bytes()
    };
    type Change = Box<dyn FnOnce(Vec<u8>) -> Vec<u8>>;
    let damages: [(&str, Change); 5] = [
        ("head", Box::new(half)),
        ("head", Box::new(|_| Vec::new())),
        ("head", Box::new(flip(40))),
        ("head", Box::new(|_| b"{}".to_vec())),
        ("upgrade vmailfs", Box::new(newer)),
    ];
    for (part, damage) in damages {
        let mut mount = two_users();
        let head = store_dir(&mount, "ada").join("head");
        let good = fs::read(&head).unwrap();
        replace(&head, damage);
        mount.mount().unwrap();
        only_ada_fails(&mount, part);
        // Put right, the user is there again, without a new mount.
        replace(&head, |_| good);
        assert_eq!(mails(&mount, "ada"), ["a1"]);
        mount.umount().unwrap();
    }
}

#[test]
fn a_head_of_another_user() {
    let mut mount = two_users();
    let foreign = fs::read(store_dir(&mount, "bob").join("head")).unwrap();
    replace(&store_dir(&mount, "ada").join("head"), |_| foreign);
    mount.mount().unwrap();
    only_ada_fails(&mount, "names bob");
    mount.umount().unwrap();
}

#[test]
fn a_damaged_or_missing_bundle() {
    type Damage = Box<dyn Fn(&Path)>;
    let damages: [Damage; 3] = [
        Box::new(|path| replace(path, |bytes| bytes[..10].to_vec())),
        Box::new(|path| {
            replace(path, |mut b| {
                b.iter_mut().for_each(|b| *b ^= 1);
                b
            })
        }),
        Box::new(|path| fs::remove_file(path).unwrap()),
    ];
    for damage in damages {
        let mut mount = two_users();
        mount.wipe_state().unwrap();
        for bundle in fs::read_dir(store_dir(&mount, "ada").join("bundle")).unwrap() {
            damage(&bundle.unwrap().path());
        }
        mount.mount().unwrap();
        only_ada_fails(&mount, "bundle");
        mount.umount().unwrap();
    }
}

#[test]
fn a_damaged_journal() {
    let mut mount = two_users();
    mount.mount().unwrap();
    for name in ["a2", "a3", "a4"] {
        deliver(&mount, "ada", name, b"Subject: more\n\n");
    }
    mount.kill9();
    let dir = user_dir(&mount.state().join("users"), "ada");
    let journal = dir.join("journal");
    // In the middle: behind it lie records that were promised.
    let at = fs::read(&journal).unwrap().len() / 2;
    replace(&journal, flip(at));
    mount.mount().unwrap();
    only_ada_fails(&mount, &journal.display().to_string());
    // What the log says to do.
    fs::rename(&dir, mount.state().join("ada-aside")).unwrap();
    let names = mails(&mount, "ada");
    for name in ["a1", "a2", "a3", "a4"] {
        assert!(names.iter().any(|n| n.starts_with(name)), "{name} in {names:?}");
    }
    mount.umount().unwrap();
}

#[test]
fn a_journal_that_a_crash_cut_short() {
    let mut mount = two_users();
    mount.mount().unwrap();
    deliver(&mount, "ada", "a2", b"Subject: more\n\n");
    mount.kill9();
    let journal = user_dir(&mount.state().join("users"), "ada").join("journal");
    let mut file = fs::OpenOptions::new().append(true).open(&journal).unwrap();
    file.write_all(b"R 999 100 0000").unwrap();
    mount.mount().unwrap();
    assert_eq!(mails(&mount, "ada"), ["a1", "a2"]);
    mount.umount().unwrap();
}

#[test]
fn local_state_of_a_newer_version() {
    let mut mount = two_users();
    let head = user_dir(&mount.state().join("users"), "ada").join("head");
    replace(&head, |bytes| {
        let text = String::from_utf8(bytes).unwrap();
        text.replacen("\"vmailfs-state\":1", "\"vmailfs-state\":2", 1).into_bytes()
    });
    mount.mount().unwrap();
    only_ada_fails(&mount, "upgrade vmailfs");
    // What it holds cannot be read here: it is not said to be in the store.
    let left = mount.umount().unwrap_err().to_string();
    assert!(left.contains("75") && left.contains("ada"), "{left}");
}

#[test]
fn a_mail_whose_object_is_gone_or_altered() {
    type Damage = Box<dyn FnOnce(&Path)>;
    let damages: [Damage; 3] = [
        Box::new(|path| fs::remove_file(path).unwrap()),
        Box::new(|path| replace(path, half)),
        Box::new(|path| replace(path, flip(3))),
    ];
    for damage in damages {
        let mut mount = two_users();
        mount.wipe_state().unwrap();
        let object = only_file(&store_dir(&mount, "ada").join("mail"));
        damage(&object);
        mount.mount().unwrap();
        assert_eq!(mails(&mount, "ada"), ["a1"], "it is there, and cannot be read");
        let error = fs::read(mount.root().join("ada/new/a1")).expect_err("not these bytes");
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
        assert!(mount.log().lines().any(|l| l.contains("ada")), "{}", mount.log());
        mount.umount().unwrap();
    }
}

// ---- names

#[test]
fn files_above_the_users_are_refused() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let error = fs::write(mount.root().join("README"), "x").expect_err("no files there");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    let error = std::os::unix::fs::symlink("x", mount.root().join("link")).expect_err("nor links");
    assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}");
    assert!(mount.log().contains("README"), "{}", mount.log());
    mount.umount().unwrap();
}

#[test]
fn any_name_of_255_bytes_survives_the_store() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    deliver(&mount, "ada", "a1", b"mail");
    // Every byte but NUL and the slash, twice over.
    let all: Vec<u8> = (1..=255u8).filter(|b| *b != b'/').collect();
    let names: Vec<OsString> = [all.clone(), all.iter().rev().copied().chain([b'x']).collect()]
        .into_iter()
        .map(|name: Vec<u8>| OsString::from_vec(name))
        .collect();
    for (n, name) in names.iter().enumerate() {
        fs::write(mount.root().join("ada/cur").join(name), format!("mail {n}")).unwrap();
        fs::write(mount.root().join("ada").join(name), format!("other {n}")).unwrap();
        // What a replacement beside it must not use.
        fs::write(mount.root().join("ada/.new.0"), "mine").unwrap();
    }
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    for (n, name) in names.iter().enumerate() {
        let read = |dir: &str| {
            let path = mount.root().join(dir).join(name);
            fs::read_to_string(path).unwrap_or_else(|e| panic!("{dir}: {e}\n{}", mount.log()))
        };
        assert_eq!(read("ada/cur"), format!("mail {n}"));
        assert_eq!(read("ada"), format!("other {n}"));
        assert_eq!(fs::read(mount.root().join("ada/.new.0")).unwrap(), b"mine");
    }
    mount.umount().unwrap();
}
