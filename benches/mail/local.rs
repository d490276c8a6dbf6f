//! What needs no mail server: files as Postfix makes them, and the daemon's memory.

use crate::Wanted;
use crate::disk::Disk;
use crate::support::mount::Mount;
use crate::support::{MAIL_UID, mail_root};
use crate::table::{Limit, Row, Table, median, quantile};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// As virtual(8) does it: a file in `tmp`, synced and closed, linked into `new`, unlinked.
fn postfix(folder: &Path, number: usize, content: &[u8]) -> std::io::Result<()> {
    let name = format!("17{number:08}.V801I{number:x}M{number:06}.mail.test");
    let (tmp, new) = (folder.join("tmp").join(&name), folder.join("new").join(&name));
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tmp)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    std::fs::hard_link(&tmp, &new)?;
    std::fs::remove_file(&tmp)
}

fn maildir(home: &Path) -> PathBuf {
    let folder = home.join("Maildir");
    let subs = ["cur", "new", "tmp"].map(|sub| folder.join(sub));
    for dir in [home, &folder].into_iter().chain(subs.iter().map(PathBuf::as_path)) {
        std::fs::DirBuilder::new().mode(0o700).create(dir).unwrap();
        chown(dir, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
    }
    folder
}

pub fn creates(table: &mut Table, wanted: &Wanted) {
    const PART: &str = "file creates";
    let (blocks, times) = if wanted.quick { (10, 10) } else { (30, 20) };
    let disk = Disk::directory();
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let folders =
        [maildir(&mail_root(&disk.path()).join("anna")), maildir(&mount.root().join("anna"))];
    let content = vec![b'x'; 8192];
    let mut took = [Vec::new(), Vec::new()];
    for block in 0..blocks {
        for at in 0..2 {
            let at = (at + block) % 2;
            let some: Vec<f64> = (0..times)
                .map(|time| {
                    let start = Instant::now();
                    postfix(&folders[at], block * times + time, &content).unwrap();
                    start.elapsed().as_secs_f64() * 1e3
                })
                .collect();
            took[at].push(some);
        }
    }
    let (ext4, here) = (median(took[0].concat()), median(took[1].concat()));
    let ratios: Vec<f64> =
        took[1].iter().zip(&took[0]).map(|(a, b)| median(a.clone()) / median(b.clone())).collect();
    let (low, high) = (quantile(ratios.clone(), 0.25), quantile(ratios, 0.75));
    let row = Row::new(PART, "create, fsync, link, unlink of 8 kB", "maildir", "vmailfs file");
    let row = row.value(here, "ms").ext4(ext4).figure(here / ext4, Limit::AtMost(1.5));
    table.row(row.note(format!("half of the blocks {low:.2} to {high:.2}")));
    mount.umount().unwrap();
}

pub fn memory(table: &mut Table, wanted: &Wanted) {
    const PART: &str = "memory";
    let (users, mails) = if wanted.quick { (100, 2000) } else { (1000, 20_000) };
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let alone = resident(&mount);
    let big = maildir(&mount.root().join("big"));
    for number in 0..mails {
        postfix_fast(&big, number);
    }
    for number in 0..users {
        let folder = maildir(&mount.root().join(format!("user{number}")));
        postfix_fast(&folder, number);
    }
    // A fresh machine, so that nothing counts that only writing needs.
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    let list = |folder: PathBuf| std::fs::read_dir(folder).unwrap().count();
    list(mount.root().join("user0/Maildir/new"));
    let before = resident(&mount);
    for number in 1..users {
        list(mount.root().join(format!("user{number}/Maildir/new")));
    }
    let open = resident(&mount);
    assert_eq!(list(mount.root().join("big/Maildir/new")), mails);
    let listed = resident(&mount);
    let row = Row::new(PART, "of the daemon with nobody open", "maildir", "vmailfs file");
    table.row(row.value(alone / 1024.0, "MiB"));
    let each = (open - before) / (users - 1) as f64;
    let row =
        Row::new(PART, "per open user (3 folders' directories, 1 mail)", "maildir", "vmailfs file");
    let note = format!("of {users}; {:.0} MiB for 2,000 users that way", each * 2000.0 / 1024.0);
    table.row(row.value(each, "KiB").note(note));
    let each = (listed - open) / (mails as f64 / 1000.0);
    let row = Row::new(PART, "per 1,000 mails listed", "maildir", "vmailfs file");
    table.row(row.value(each, "KiB").note(format!("of {mails}")));
    mount.umount().unwrap();
}

/// Without the sync, which is not what is measured.
fn postfix_fast(folder: &Path, number: usize) {
    let name = format!("17{number:08}.M{:06}P4000.mail.test,S=2,W=3", number % 1_000_000);
    std::fs::write(folder.join("tmp").join(&name), b"x\n").unwrap();
    std::fs::rename(folder.join("tmp").join(&name), folder.join("new").join(&name)).unwrap();
}

/// Resident memory of the daemon in KiB, once things are quiet.
pub fn resident(mount: &Mount) -> f64 {
    std::thread::sleep(Duration::from_secs(3));
    let path = format!("/proc/{}/status", mount.pid().unwrap());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
