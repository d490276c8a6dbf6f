//! The commands as scripts and mount(8) see them: output, exit codes, the mount helpers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        World { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn vmailfs(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_vmailfs"))
            .args(args)
            .env("VMAILFS_RUN_DIR", self.path("run"))
            .env_remove("VMAILFS_CONFIG")
            .env_remove("VMAILFS_LOG")
            .output()
            .unwrap()
    }
}

fn stdout(o: &Output) -> String {
    String::from_utf8_lossy(&o.stdout).into_owned()
}

/// Expects this exit code and one line of complaint.
fn fails(o: &Output, code: i32, part: &str) {
    let err = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(code), "{err}");
    assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    assert!(err.contains(part), "{err}");
}

#[test]
fn config_prints_what_it_reads() {
    let w = World::new();
    let defaults = stdout(&w.vmailfs(&["config"]));
    assert!(defaults.contains("upload_interval = \"5min\""));
    let copy = w.file("copy.toml", &defaults);
    let again = w.vmailfs(&["config", "--config", copy.to_str().unwrap()]);
    assert!(again.status.success());
    assert_eq!(stdout(&again), defaults);

    let own = w.file("own.toml", "[s3]\naccess_key_id = \"a\"\nsecret_access_key = \"hush\"\n");
    let shown = stdout(&w.vmailfs(&["config", "--config", own.to_str().unwrap()]));
    assert!(shown.contains("access_key_id = \"a\"") && !shown.contains("hush"));

    let bad = w.file("bad.toml", "\n[metacache]\nupload_intervall = \"5min\"\n");
    let o = w.vmailfs(&["config", "--config", bad.to_str().unwrap()]);
    fails(&o, 78, "line 3: unknown key `upload_intervall`; is `metacache.upload_interval` meant?");
}

#[test]
fn exit_codes_are_sysexits() {
    let w = World::new();
    assert_eq!(w.vmailfs(&["--help"]).status.code(), Some(0));
    assert_eq!(w.vmailfs(&[]).status.code(), Some(64));
    assert_eq!(w.vmailfs(&["mount", "--frobnicate"]).status.code(), Some(64));
    fails(&w.vmailfs(&["status"]), 69, "no vmailfs is mounted");
    fails(&w.vmailfs(&["umount", "/tmp"]), 69, "no vmailfs is mounted on /tmp");
    fails(&w.vmailfs(&["metacache", "flush", "-u", "x"]), 69, "no vmailfs is mounted");
    fails(&w.vmailfs(&["status", "--socket", "/does/not/exist"]), 69, "/does/not/exist");
    let o = w.vmailfs(&["umount", "--dead", w.path("absent").to_str().unwrap()]);
    assert!(o.status.success(), "nothing dead there");
}

#[test]
fn a_mount_that_cannot_be_is_refused_in_one_line() {
    let w = World::new();
    fs::create_dir(w.path("m")).unwrap();
    let m = w.path("m");
    let m = m.to_str().unwrap();
    let store = format!("file://{}", w.path("store").display());
    let absent = w.path("absent");
    fails(&w.vmailfs(&["mount"]), 78, "no store given");
    fails(&w.vmailfs(&["mount", &store, absent.to_str().unwrap()]), 78, "create it first");
    fails(&w.vmailfs(&["mount", "http://x", m]), 78, "use file:///some/dir or s3://");
    fails(&w.vmailfs(&["mount", &store, m, "--state-dir", m]), 78, "mount point");
    fails(&w.vmailfs(&["mount", &store, m, "-o", "quota"]), 64, "unknown key `quota`");
    fs::write(w.path("m").join("old"), "mail").unwrap();
    let o = w.vmailfs(&["mount", &store, m, "--state-dir", w.path("state").to_str().unwrap()]);
    fails(&o, 69, "not empty");
    let state = w.path("state");
    let state = state.to_str().unwrap();
    fails(
        &w.vmailfs(&["mount", &store, "/proc", "--state-dir", state]),
        69,
        "mounted there already",
    );
    assert!(!w.path("state").exists(), "a refused mount leaves nothing behind");
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-scripts").join(name)
}

/// Runs a mount helper over a `vmailfs` that prints its arguments, one a line.
fn helper(w: &World, name: &str, args: &[&str], exit: i32) -> Output {
    let fake = w.file("fake", &format!("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit {exit}\n"));
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    Command::new("sh").arg(script(name)).args(args).env("VMAILFS", fake).output().unwrap()
}

#[test]
fn mount_helper_translates_options() {
    let w = World::new();
    let run = |args: &[&str]| helper(&w, "mount.vmailfs", args, 0);
    let o = run(&[
        "s3://b/p",
        "/mnt/my mail",
        "-o",
        "rw,_netdev,noauto,x-systemd.automount,config=/etc/vmailfs.toml,allow_other,nofail,nosuid",
    ]);
    assert!(o.status.success());
    let expected = [
        "mount",
        "s3://b/p",
        "/mnt/my mail",
        "--daemon",
        "-o",
        "config=/etc/vmailfs.toml,allow_other",
    ];
    assert_eq!(stdout(&o).lines().collect::<Vec<_>>(), expected);

    let o = run(&[
        "file:///s",
        "/m",
        "-v",
        "-t",
        "vmailfs",
        "-o",
        "metacache.max_space=4G",
        "-o",
        "owner=v:v",
    ]);
    assert!(stdout(&o).ends_with("-o\nmetacache.max_space=4G,owner=v:v\n"), "{}", stdout(&o));
    let o = run(&["file:///s", "/m", "-o", "rw"]);
    assert_eq!(stdout(&o), "mount\nfile:///s\n/m\n--daemon\n");
    let o = run(&["file:///s", "/m", "-s", "-o", "quota,allow_other"]);
    assert!(stdout(&o).ends_with("-o\nallow_other\n"));

    fails(&run(&["file:///s", "/m", "-o", "allow_other,quota"]), 1, "unknown option quota");
    fails(&run(&["file:///s", "/m", "-o", "ro"]), 1, "no read-only mount");
    fails(&run(&["file:///s", "/m", "-o", "remount,nosuid"]), 1, "unmount and mount again");
    fails(&run(&["file:///s"]), 1, "usage");
    let o = run(&["file:///s", "/m", "-f"]);
    assert!(o.status.success() && stdout(&o).is_empty(), "-f must do nothing");
}

/// What the helper lets through must be what `-o` understands: each key of the configuration,
/// given as an option, arrives.
#[test]
fn mount_helper_knows_every_key() {
    let w = World::new();
    let keys = vmailfs::config::KEYS.iter().map(|k| k.name);
    for key in keys.filter(|k| !["store", "mountpoint"].contains(k)) {
        let option = format!("{key}=x");
        let o = helper(&w, "mount.vmailfs", &["file:///s", "/m", "-o", &option], 0);
        assert!(stdout(&o).ends_with(&format!("-o\n{option}\n")), "{key}");
    }
}

#[test]
fn mount_helpers_use_the_exit_codes_of_mount() {
    let w = World::new();
    for (ours, expected) in [(0, 0), (64, 1), (77, 1), (78, 1), (70, 2), (69, 32), (75, 32)] {
        let o = helper(&w, "mount.vmailfs", &["file:///s", "/m"], ours);
        assert_eq!(o.status.code(), Some(expected), "{ours}");
    }
    let o = helper(&w, "umount.vmailfs", &["/m", "-v"], 0);
    assert_eq!(stdout(&o), "umount\n/m\n");
    assert_eq!(helper(&w, "umount.vmailfs", &["/m"], 75).status.code(), Some(32));
}
