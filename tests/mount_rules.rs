//! What a mount refuses: writing to published mail, deletions by root, moves between users, and
//! anything but users' directories at or above their level.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use support::mount::Mount;
use support::{MAIL_UID, wait_until};

/// Runs a shell command as the mail user; what it said, if it failed.
fn as_mail_user(script: &str, arguments: &[&Path]) -> Result<(), String> {
    let mut command = Command::new("sh");
    command.args(["-ec", script, "sh"]).args(arguments).uid(MAIL_UID).gid(MAIL_UID);
    let output = command.output().unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// A Maildir with one mail, its UID list and a subscription.
fn make_home(root: &Path, user: &str) -> PathBuf {
    let home = root.join(user);
    let script = "umask 077; mkdir -p $1/mail/cur $1/mail/new $1/mail/tmp $1/mail/.Empty/cur
        printf 'Subject: kept\n\n' > $1/mail/tmp/1.M2P3.host; sync $1/mail/tmp/1.M2P3.host
        ln $1/mail/tmp/1.M2P3.host $1/mail/new/1.M2P3.host; rm $1/mail/tmp/1.M2P3.host
        mv $1/mail/new/1.M2P3.host $1/mail/cur/1.M2P3.host:2,S
        echo '3 V1 N2' > $1/mail/dovecot-uidlist; echo INBOX > $1/mail/subscriptions
        : > $1/mail/tmp/unfinished; : > $1/mail/dovecot-uidlist.lock";
    as_mail_user(script, &[&home]).unwrap();
    home
}

fn mail_of(home: &Path) -> PathBuf {
    home.join("mail/cur/1.M2P3.host:2,S")
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn published_mail_cannot_be_written() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let mail = mail_of(&make_home(&mount.root(), "someone"));
    for _ in 0..2 {
        assert_eq!(errno(File::options().write(true).open(&mail)), libc::EACCES);
        assert_eq!(errno(File::options().read(true).append(true).open(&mail)), libc::EACCES);
        let emptied = File::options().read(true).custom_flags(libc::O_TRUNC).open(&mail);
        assert_eq!(errno(emptied), libc::EACCES);
        let said = as_mail_user("echo more >> $1", &[&mail]).unwrap_err();
        assert!(said.contains("Permission denied"), "{said}");
        assert_eq!(fs::read(&mail).unwrap(), b"Subject: kept\n\n");
        mount.umount().unwrap();
        mount.mount().unwrap();
    }
    mount.umount().unwrap();
}

#[test]
fn root_deletes_no_mail() {
    let mut mount = Mount::on_directory().root_may_not_delete();
    mount.mount().unwrap();
    let home = make_home(&mount.root(), "someone");
    let (mail, list) = (mail_of(&home), home.join("mail/dovecot-uidlist"));
    for path in [&mail, &list, &home.join("mail/subscriptions")] {
        assert_eq!(errno(fs::remove_file(path)), libc::EPERM, "{}", path.display());
        let over = home.join("mail/tmp/unfinished");
        assert_eq!(errno(fs::rename(over, path)), libc::EPERM, "{}", path.display());
    }
    assert_eq!(errno(File::create(&list)), libc::EPERM);
    assert_eq!(errno(File::options().write(true).open(&list).unwrap().set_len(1)), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(home.join("mail/.Empty/cur"))), libc::EPERM);
    assert!(mount.log().contains("allow_root_delete"), "{}", mount.log());

    // The way in which a metacache used to be dropped.
    let rm = Command::new("sh").args(["-c", "rm -rf \"$0\"/*"]).arg(mount.root()).output().unwrap();
    assert!(!rm.status.success());
    assert_eq!(fs::read(&mail).unwrap(), b"Subject: kept\n\n");
    assert_eq!(fs::read(&list).unwrap(), b"3 V1 N2\n");
    assert!(home.join("mail/.Empty/cur").is_dir());
    // What is left over and locks may go.
    assert!(!home.join("mail/tmp/unfinished").exists());
    assert!(!home.join("mail/dovecot-uidlist.lock").exists());

    as_mail_user("rm -rf $1/mail", &[&home]).unwrap();
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    mount.umount().unwrap();
}

#[test]
fn users_are_apart() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let (one, two) = (make_home(&mount.root(), "one"), make_home(&mount.root(), "two"));
    for path in [mail_of(&one), one.join("mail/subscriptions")] {
        let there = two.join("mail/cur/other");
        assert_eq!(errno(fs::hard_link(&path, &there)), libc::EXDEV);
        assert_eq!(errno(fs::rename(&path, &there)), libc::EXDEV);
        assert!(path.exists() && !there.exists());
    }
    assert_eq!(errno(fs::rename(one.join("mail/.Empty"), two.join("mail/.Full"))), libc::EXDEV);
    mount.umount().unwrap();
}

/// Tries everything that makes a name in a directory.
fn nothing_can_be_made(mount: &Mount, directory: &Path, file: &Path) {
    let name = directory.join("not-a-user");
    assert_eq!(errno(File::create(&name)), libc::EPERM);
    assert_eq!(errno(symlink("target", &name)), libc::EPERM);
    assert_eq!(errno(fs::hard_link(file, &name)), libc::EPERM);
    assert_eq!(errno(fs::rename(file, &name)), libc::EPERM);
    assert!(file.exists() && fs::symlink_metadata(&name).is_err());
    assert!(mount.log().contains("not-a-user"), "{}", mount.log());
}

#[test]
fn beside_users_are_only_users() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let home = make_home(&mount.root(), "someone");
    nothing_can_be_made(&mount, &mount.root(), &home.join("mail/subscriptions"));
    assert_eq!(errno(fs::rename(&home, mount.root().join("other"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(&home)), libc::EPERM);
    File::create(home.join("in-a-user")).unwrap().write_all(b"is allowed").unwrap();
    mount.umount().unwrap();
}

#[test]
fn above_users_are_only_directories() {
    let mut mount = Mount::on_directory().option(&["--layout", "%d/%n"]);
    mount.mount().unwrap();
    let domain = mount.root().join("mail.test");
    let file = make_home(&domain, "someone").join("mail/subscriptions");
    nothing_can_be_made(&mount, &domain, &file);
    // A name that may lead to users is a directory before it does.
    assert_eq!(errno(File::create(mount.root().join("other.test"))), libc::EISDIR);
    assert_eq!(errno(fs::rename(&domain, mount.root().join("other.test"))), libc::EPERM);
    assert_eq!(errno(fs::remove_dir(&domain)), libc::EPERM);
    mount.umount().unwrap();
}

fn says(mount: &Mount) -> String {
    mount.vmailfs(&["status", &mount.root().display().to_string()]).unwrap().1
}

/// I5: two machines with one configuration: the second is told whose the name is; taken all the same,
/// the first notices, and loses nothing.
#[test]
fn i5_a_name_in_use_is_refused() {
    let limits = "store_limits.lease=10s,store_limits.deadline=8s,store_limits.attempt_timeout=4s";
    let mut first = Mount::on_directory().option(&["--backend", "mx1", "-o", limits]);
    let mut second = first.twin();
    first.mount().unwrap();
    let home = make_home(&first.root(), "someone");
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();

    let refusal = second.mount().unwrap_err().to_string();
    for word in ["backend name mx1 is in use", &host, "option backend"] {
        assert!(refusal.contains(word), "{refusal}");
    }
    assert!(says(&first).contains("lease held"), "{}", says(&first));
    let flush = ["metacache", "flush", "-u", "someone"];
    assert!(first.vmailfs(&flush).unwrap().0);
    let seen = mail_of(&home).with_file_name("1.M2P3.host:2,FS");
    as_mail_user("mv $1 $2", &[&mail_of(&home), &seen]).unwrap();

    let mut second = second.option(&["--take-backend"]);
    second.mount().unwrap();
    let noticed = wait_until(Duration::from_secs(60), || says(&first).contains("NAME TAKEN by"));
    assert!(noticed, "{}", says(&first));
    assert_eq!(first.log().matches("has taken this backend's name").count(), 1);
    assert_eq!(errno(fs::rename(&seen, mail_of(&home))), libc::ESTALE);
    assert_eq!(errno(fs::create_dir(home.join("mail/.New"))), libc::ESTALE);
    assert_eq!(fs::read(&seen).unwrap(), b"Subject: kept\n\n");
    let there = second.root().join("someone");
    assert_eq!(fs::read(mail_of(&there)).unwrap(), b"Subject: kept\n\n");
    assert!(says(&second).contains("lease held"));
    // What the first had not flushed stays with it, and is told.
    let umount = first.exit_of(&["umount", &first.root().display().to_string()]).unwrap();
    assert_eq!(umount.0, Some(75), "{umount:?}");
    assert!(umount.1.contains("someone") || umount.2.contains("someone"), "{umount:?}");
    first.kill9();

    // A machine that was lost with its state: the next one waits, and can be told to end.
    second.kill9();
    let again = first.twin();
    let mut waiting = again.start().unwrap();
    let told =
        wait_until(Duration::from_secs(60), || again.log().contains("waiting to see whether"));
    assert!(told, "{}", again.log());
    let pid = nix::unistd::Pid::from_raw(waiting.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(waiting.wait().unwrap().code(), Some(75), "{}", again.log());
    // The same machine takes its name back at once.
    let mut second = first.twin().state_in(&second.state());
    second.mount().unwrap();
    assert!(!second.log().contains("waiting to see whether"), "{}", second.log());
    second.umount().unwrap();
    // And after an end in good order anybody does.
    let mut fresh = first.twin();
    fresh.mount().unwrap();
    assert!(!fresh.log().contains("waiting to see whether"), "{}", fresh.log());
    fresh.umount().unwrap();
}
