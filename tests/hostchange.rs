//! `vmailfs nfs`: dies at each of its places, and the next login must be right all the same.
//! What two logins at the same moment do is tested in `src/hostchange/check/tests.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const FILES: [&str; 2] = ["dovecot.list.index", "dovecot.list.index.log"];

/// One INDEX directory and the /dev/shm of some hosts.
struct Site {
    dir: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("index")).unwrap();
        Site { dir }
    }

    fn index(&self) -> PathBuf {
        self.dir.path().join("index")
    }

    fn local(&self, host: &str) -> PathBuf {
        self.dir.path().join(format!("shm-{host}/listindex/user@example.com"))
    }

    fn vmailfs(&self, arguments: &[&str], failpoint: Option<&str>) -> Output {
        let plan = self.dir.path().join("failpoints");
        std::fs::write(&plan, failpoint.map(|p| format!("{p}=kill@1")).unwrap_or_default())
            .unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmailfs"));
        command.arg("nfs").args(arguments).env("VMAILFS_FAILPOINTS", &plan);
        command.output().unwrap()
    }

    fn login(&self, host: &str, more: &[&str], failpoint: Option<&str>) -> Output {
        let local = self.dir.path().join(format!("shm-{host}/listindex/%u"));
        let (index, local) = (self.index(), local.to_str().unwrap().to_owned());
        let mut arguments = vec!["login", "-u", "user@example.com", "--host", host];
        arguments.extend(["--index", index.to_str().unwrap(), "--listindex", &local]);
        arguments.extend(["--settle", "0s"]);
        arguments.extend(more);
        self.vmailfs(&arguments, failpoint)
    }

    fn good_login(&self, host: &str) {
        let output = self.login(host, &[], None);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }

    /// Until what is built is kept.
    fn settle(&self, host: &str) {
        self.good_login(host);
        self.good_login(host);
        build(&self.local(host), "settled");
        self.good_login(host);
        assert_eq!(read(&self.local(host)), both("settled"), "{host} keeps it");
    }
}

fn build(dir: &Path, text: &str) {
    FILES.iter().for_each(|file| std::fs::write(dir.join(file), text).unwrap());
}

fn read(dir: &Path) -> Vec<Option<String>> {
    FILES.iter().map(|file| std::fs::read_to_string(dir.join(file)).ok()).collect()
}

fn both(text: &str) -> Vec<Option<String>> {
    vec![Some(text.to_owned()); 2]
}

fn killed(output: &Output, point: &str) {
    assert_eq!(output.status.signal(), Some(9), "{point} is not passed: {output:?}");
}

/// Done-when 3, the check.
#[test]
fn a_login_that_dies_leaves_nothing_stale() {
    let points = [
        "hostchange.locked",
        "hostchange.invalidated",
        "hostchange.dropping",
        "hostchange.dropped",
        "hostchange.written",
        "hostchange.recorded",
        "hostchange.renamed",
    ];
    for point in points {
        let site = Site::new();
        site.settle("a");
        site.settle("b");
        // What a has is stale: b was here.
        killed(&site.login("a", &[], Some(point)), point);
        site.good_login("a");
        assert_eq!(read(&site.local("a")), [None, None], "{point}: a trusts what is stale");
        // b notices a's session, also if only the one that died was seen.
        site.good_login("b");
        assert_eq!(read(&site.local("b")), [None, None], "{point}: b trusts what is stale");
        site.settle("a");
        let left: Vec<_> =
            site.index().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [".lasthost"], "{point}");
    }
}

/// And the login that says that nobody else was here.
#[test]
fn a_death_while_it_is_settled() {
    for point in
        ["hostchange.locked", "hostchange.invalidated", "hostchange.dropped", "hostchange.settling"]
    {
        let site = Site::new();
        site.good_login("a");
        build(&site.local("a"), "of an open session");
        killed(&site.login("a", &[], Some(point)), point);
        site.good_login("a");
        assert_eq!(read(&site.local("a")), [None, None], "{point}");
        site.settle("a");
        // It stays possible to notice another host.
        site.settle("b");
        site.good_login("a");
        assert_eq!(read(&site.local("a")), [None, None], "{point}");
    }
}

/// Done-when 3, migration: either all of the list index comes, or none of it.
#[test]
fn a_migration_that_dies_is_begun_again() {
    let points = [
        "hostchange.locked",
        "migrate.copying",
        "migrate.copied",
        "migrate.removing",
        "hostchange.invalidated",
        "hostchange.dropped",
        "hostchange.written",
        "hostchange.recorded",
        "hostchange.renamed",
    ];
    for point in points {
        let site = Site::new();
        build(&site.index(), "nfs");
        killed(&site.login("a", &["--migration"], Some(point)), point);
        let found = read(&site.local("a"));
        let output = site.login("a", &["--migration"], None);
        assert!(output.status.success(), "{point}: {output:?}");
        let now = read(&site.local("a"));
        assert!(now == both("nfs") || now == [None, None], "{point}: {found:?}, then {now:?}");
        assert_eq!(read(&site.index()), [None, None], "{point}: still on NFS");
        // What a host without the mode left in the meantime is never mistaken for ours.
        site.settle("a");
        build(&site.index(), "later");
        assert!(site.login("a", &["--migration"], None).status.success());
        assert_eq!(read(&site.local("a")), [None, None], "{point}");
    }
}

/// Done-when 3, cleaning.
#[test]
fn a_cleaning_that_dies_leaves_nothing_half() {
    for point in
        ["usercache.invalidated", "hostchange.dropping", "usercache.emptied", "usercache.unlocked"]
    {
        let site = Site::new();
        site.settle("a");
        let dir = site.local("a");
        let clean = ["usercache", "clean", "0s", dir.to_str().unwrap()];
        killed(&site.vmailfs(&clean, Some(point)), point);
        site.good_login("a");
        assert_eq!(read(&dir), [None, None], "{point}: half of a list index is trusted");
        site.settle("a");
        assert!(site.vmailfs(&clean, None).status.success());
        assert!(!dir.exists(), "{point}");
    }
}

#[test]
fn a_script_becomes_what_it_was_given_and_fails_where_it_must() {
    let site = Site::new();
    let output = site.login("a", &["--", "sh", "-c", "echo became; exit 3"], None);
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(3), &b"became\n"[..]));
    // Nothing is made where there is no such file system.
    let local = site.dir.path().join("gone/%u");
    let arguments = ["login", "-u", "u", "--index", "/proc/no/such", "--listindex"];
    let arguments = [&arguments[..], &[local.to_str().unwrap()]].concat();
    let gone = site.vmailfs(&arguments, None);
    assert_eq!(gone.status.code(), Some(75), "{gone:?}");
    assert!(!site.dir.path().join("gone").exists());
    let odd = site.login("a b", &[], None);
    assert_eq!(odd.status.code(), Some(64), "{odd:?}");
}

#[test]
fn ages_are_written_as_dovecot_writes_them() {
    let site = Site::new();
    site.settle("a");
    let dir = site.local("a");
    let dir = dir.to_str().unwrap();
    let young = site.vmailfs(&["usercache", "clean", "7days", dir], None);
    assert_eq!(young.status.code(), Some(75), "{young:?}");
    assert!(String::from_utf8_lossy(&young.stderr).contains("left alone"), "{young:?}");
    let root = site.dir.path().join("shm-a");
    let list = site.vmailfs(&["usercache", "list", root.to_str().unwrap()], None);
    let text = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(text.contains(dir) && text.contains("settled"), "{text}");
    let all = site.vmailfs(&["usercache", "clean-all", "7days", root.to_str().unwrap()], None);
    assert!(all.status.success() && Path::new(dir).exists(), "{all:?}");
    let budget = ["usercache", "clean-all", "7days", root.to_str().unwrap(), "--max-size", "1"];
    assert!(site.vmailfs(&budget, None).status.success());
    assert!(!Path::new(dir).exists());
}

/// Every place of this mode is one at which something dies above.
#[test]
fn all_places_are_passed() {
    let here = include_str!("hostchange.rs");
    let ours = vmailfs::failpoint::ALL.iter().map(|point| point.0).filter(|name| {
        ["hostchange.", "migrate.", "usercache."].iter().any(|mode| name.starts_with(mode))
    });
    let missing: Vec<&str> = ours.filter(|name| !here.contains(&format!("\"{name}\""))).collect();
    assert_eq!(missing, [""; 0]);
}
