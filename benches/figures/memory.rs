//! The daemon's memory when a large folder is listed.

use crate::site::{Site, StoreKind, USER, put_in_maildir};
use crate::support::dovecot::Format;
use crate::support::mount::Mount;
use crate::table::{Limit, Table};
use std::time::{Duration, Instant};

const FOLDER: &str = "Archive";

/// One Maildir folder on a directory as the store, written, then seen by another machine: by
/// `ls`, by `ls -l`, and by a SELECT.
pub fn listed(table: &mut Table, mails: usize) {
    let mut site = Site::new(StoreKind::File, Format::Maildir, &[]);
    let mut imap = site.imap();
    imap.create(FOLDER).unwrap();
    imap.logout();
    let folder = site.mount.root().join(USER).join("mail").join(format!(".{FOLDER}"));
    let start = Instant::now();
    put_in_maildir(&folder, mails, 4);
    eprintln!("{mails} mails made in {} s", start.elapsed().as_secs());
    row(table, &site.mount, &format!("written {mails} mails"), 0, Limit::None);
    site.flush();

    site.move_to_fresh_machine();
    let idle = memory(&site.mount).0;
    row(table, &site.mount, "idle", 0, Limit::None);
    assert_eq!(std::fs::read_dir(folder.join("new")).unwrap().count(), mails);
    row(table, &site.mount, &format!("ls of {mails}"), idle, Limit::AtMost(60.0));
    for entry in std::fs::read_dir(folder.join("new")).unwrap() {
        entry.unwrap().metadata().unwrap();
    }
    row(table, &site.mount, &format!("ls -l of {mails}"), idle, Limit::None);

    site.move_to_fresh_machine();
    let idle = memory(&site.mount).0;
    let mut imap = site.imap();
    assert_eq!(imap.select(FOLDER).unwrap().exists as usize, mails);
    row(table, &site.mount, &format!("first SELECT of {mails} in new/"), idle, Limit::None);
    imap.logout();

    site.move_to_fresh_machine();
    let idle = memory(&site.mount).0;
    let mut imap = site.imap();
    assert_eq!(imap.select(FOLDER).unwrap().exists as usize, mails);
    row(table, &site.mount, &format!("SELECT of {mails}"), idle, Limit::AtMost(60.0));
    imap.logout();

    site.dovecot.stop();
    site.mount.umount().unwrap();
    site.mount.mount().unwrap();
    site.dovecot.resume(&site.mount.root()).unwrap();
    let idle = memory(&site.mount).0;
    let mut imap = site.imap();
    assert_eq!(imap.select(FOLDER).unwrap().exists as usize, mails);
    let what = format!("SELECT of {mails} from local state");
    row(table, &site.mount, &what, idle, Limit::AtMost(60.0));
    imap.logout();
    site.dovecot.stop();
    site.mount.umount().unwrap();
}

fn row(table: &mut Table, mount: &Mount, what: &str, idle: u64, limit: Limit) {
    // What a load needed for a moment is given back soon after it.
    std::thread::sleep(Duration::from_secs(2));
    let (now, peak) = memory(mount);
    let over = now.saturating_sub(idle) as f64 / 1024.0;
    let how = format!(
        "RSS {:.1} MiB, peak {:.1} MiB, idle {:.1} MiB",
        now as f64 / 1024.0,
        peak as f64 / 1024.0,
        idle as f64 / 1024.0
    );
    table.row(&format!("MiB over idle, {what}"), "maildir, file", over, limit, &how);
}

/// Resident memory of the daemon now and at its highest, in KiB.
fn memory(mount: &Mount) -> (u64, u64) {
    let path = format!("/proc/{}/status", mount.pid().unwrap());
    let text = std::fs::read_to_string(path).unwrap();
    let field = |name: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}
