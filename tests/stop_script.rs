//! `mount-scripts/vmailfs-stop`: its steps in their order, in bounded time, whatever fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Programs that write down how they are called.
struct Fakes {
    dir: tempfile::TempDir,
}

impl Fakes {
    fn new(vmailfs: &str, doveadm: &str) -> Fakes {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("calls");
        for (name, then) in [("vmailfs", vmailfs), ("doveadm", doveadm)] {
            let path = dir.path().join(name);
            let text = format!("#!/bin/sh\necho \"{name} $*\" >>{}\n{then}\n", log.display());
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Fakes { dir }
    }

    fn stop(&self, arguments: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-scripts/vmailfs-stop");
        let path = format!("{}:{}", self.dir.path().display(), std::env::var("PATH").unwrap());
        Command::new(script).args(arguments).env("PATH", path).output().unwrap()
    }

    /// What was called, without the question for the services that there are.
    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default();
        text.lines().filter(|l| !l.contains("service status")).map(str::to_owned).collect()
    }
}

/// Two of the services run.
const SERVICES: &str =
    "[ \"$1 $2\" = 'service status' ] && printf 'name: imap-login\\n\\nname: lmtp\\n'; true";

#[test]
fn the_documented_steps_in_their_order() {
    let fakes = Fakes::new("true", SERVICES);
    let begun = Instant::now();
    let done = fakes.stop(&["/mail here"]);
    assert!(done.status.success(), "{done:?}");
    assert!(done.stderr.is_empty(), "{done:?}");
    let flush = "vmailfs metacache flushall -i --mountpoint /mail here";
    let expected = [
        flush,
        "doveadm service stop imap-login",
        "doveadm service stop lmtp",
        "doveadm kick *",
        flush,
        "doveadm kick *",
        flush,
        "doveadm stop",
    ];
    assert_eq!(fakes.calls(), expected);
    assert!(begun.elapsed() >= Duration::from_secs(1), "it waits between the kicks");

    let fakes = Fakes::new("true", SERVICES);
    assert!(fakes.stop(&["-n"]).status.success());
    assert_eq!(fakes.calls().last().unwrap(), "vmailfs metacache flushall -i");
}

#[test]
fn what_fails_is_told_and_passed_over() {
    let fakes = Fakes::new("exit 75", "exit 70");
    let done = fakes.stop(&[]);
    assert_eq!(done.status.code(), Some(75));
    let told = String::from_utf8(done.stderr).unwrap();
    assert_eq!(told.matches("flush: failed (75), going on").count(), 3, "{told}");
    assert_eq!(told.matches("kick: failed (70), going on").count(), 2, "{told}");
    assert!(told.contains("stopping dovecot: failed"), "{told}");
    assert_eq!(fakes.calls().len(), 6);
    // Nobody there to be kicked is no failure.
    let fakes = Fakes::new("true", "[ \"$1\" != kick ] || exit 68");
    let done = fakes.stop(&[]);
    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
}

#[test]
fn it_ends_in_time_whoever_hangs() {
    // Not even SIGTERM ends it.
    let fakes = Fakes::new("trap '' TERM; while :; do sleep 1; done", SERVICES);
    let begun = Instant::now();
    let done = fakes.stop(&["-t", "6"]);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert_eq!(done.status.code(), Some(75));
    let told = String::from_utf8(done.stderr).unwrap();
    assert!(told.contains("flush: took too long, going on"), "{told}");
    assert_eq!(fakes.stop(&["-t", "soon"]).status.code(), Some(64));
    assert_eq!(fakes.stop(&["a", "b"]).status.code(), Some(64));
    assert_eq!(fakes.stop(&["-x"]).status.code(), Some(64));
}
