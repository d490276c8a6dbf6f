//! The daemon's memory when a large folder is listed.

use crate::site::{Site, StoreKind, USER, put_in_maildir};
use crate::support::dovecot::Format;
use crate::support::mount::Mount;
use crate::table::{Limit, Table};
use std::path::Path;
use std::time::{Duration, Instant};

const FOLDER: &str = "Archive";
/// Who is open while the daemon counts as idle.
const SMALL: &str = "bert";
const WANTED: Limit = Limit::AtMost(60.0);

/// One Maildir folder on a directory as the store, written, then seen by other machines: by
/// `ls`, by `ls -l`, by a SELECT with FETCH FLAGS. The peak counts, not what is left.
pub fn listed(table: &mut Table, mails: usize) {
    let mut site = Site::new(StoreKind::File, Format::Maildir, &[]);
    let mut imap = site.imap();
    imap.create(FOLDER).unwrap();
    imap.logout();
    let folder = site.mount.root().join(USER).join("mail").join(format!(".{FOLDER}"));
    let small = site.mount.root().join(SMALL);
    put_in_maildir(&small, 100, 1);
    let start = Instant::now();
    put_in_maildir(&folder, mails, 8);
    eprintln!("{mails} mails made in {} s", start.elapsed().as_secs());
    row(table, &site.mount, &format!("written {mails} mails"), 0, Limit::None);
    site.flush();

    let idle = fresh_and_idle(&mut site);
    assert_eq!(std::fs::read_dir(folder.join("new")).unwrap().count(), mails);
    row(table, &site.mount, &format!("ls of {mails}"), idle, WANTED);
    see_all(&folder.join("new"));
    row(table, &site.mount, &format!("ls -l of {mails}"), idle, WANTED);

    let idle = fresh_and_idle(&mut site);
    select(&site, mails);
    row(table, &site.mount, &format!("first SELECT of {mails} in new/"), idle, Limit::None);

    let idle = fresh_and_idle(&mut site);
    select(&site, mails);
    row(table, &site.mount, &format!("SELECT, FETCH FLAGS of {mails}"), idle, WANTED);
    see_all(&folder.join("cur"));
    row(table, &site.mount, &format!("and ls -l of {mails}"), idle, WANTED);

    site.dovecot.stop();
    site.mount.umount().unwrap();
    site.mount.mount().unwrap();
    site.dovecot.resume(&site.mount.root()).unwrap();
    let idle = idle_now(&site);
    select(&site, mails);
    row(table, &site.mount, &format!("SELECT of {mails} from local state"), idle, WANTED);
    site.dovecot.stop();
    site.mount.umount().unwrap();
}

fn select(site: &Site, mails: usize) {
    let mut imap = site.imap();
    assert_eq!(imap.select(FOLDER).unwrap().exists as usize, mails);
    assert_eq!(imap.fetch("1:*", "FLAGS").unwrap().len(), mails);
    imap.logout();
}

fn see_all(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        entry.unwrap().metadata().unwrap();
    }
}

fn fresh_and_idle(site: &mut Site) -> u64 {
    site.move_to_fresh_machine();
    idle_now(site)
}

/// Resident memory of a daemon that has one small user open, in KiB.
fn idle_now(site: &Site) -> u64 {
    see_all(&site.mount.root().join(SMALL).join("new"));
    std::thread::sleep(Duration::from_secs(2));
    let idle = memory(&site.mount).0;
    forget_peak(&site.mount);
    idle
}

fn row(table: &mut Table, mount: &Mount, what: &str, idle: u64, limit: Limit) {
    // What a load needed for a moment is given back soon after it.
    std::thread::sleep(Duration::from_secs(2));
    let (now, peak) = memory(mount);
    forget_peak(mount);
    let mib = |kib: u64| kib as f64 / 1024.0;
    let how = format!(
        "VmHWM {:.1} MiB; VmRSS 2 s later {:.1} MiB; VmRSS idle {:.1} MiB",
        mib(peak),
        mib(now),
        mib(idle)
    );
    let over = mib(peak.saturating_sub(idle));
    table.row(&format!("MiB over idle, {what}"), "maildir, file", over, limit, &how);
}

/// The highest resident memory counts from here on.
fn forget_peak(mount: &Mount) {
    std::fs::write(format!("/proc/{}/clear_refs", mount.pid().unwrap()), "5").unwrap();
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
