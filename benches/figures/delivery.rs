//! Requests of deliveries and of changes.

use crate::site::{Site, StoreKind, USER};
use crate::support::dovecot::Format;
use crate::support::imap::flags;
use crate::table::{Limit, Table};
use std::time::{Duration, Instant};

/// Deliveries as fast as they go, to a new user, with the usual settings; from the mount of an
/// empty store to the umount's flush. What the flush at umount asks for is what `status` cannot
/// tell any more, so the user is flushed before.
pub fn burst(table: &mut Table, store: StoreKind, format: Format, mails: usize) {
    let mut site = Site::new(store, format, &[]);
    let before = site.requests();
    let start = Instant::now();
    site.deliver(mails);
    let rate = mails as f64 / start.elapsed().as_secs_f64();
    site.settle();
    let made = site.requests().since(&before);
    let how = format!("{} ({rate:.0} mails/s)", made.text());
    let value = made.total() as f64 / mails as f64;
    let what = format!("requests per delivery, {mails} at once");
    table.row(&what, &site.place(), value, Limit::AtMost(1.25), &how);
    site.dovecot.stop();
    site.mount.umount().unwrap();
}

/// Deliveries at the pace of a busy user, time running 300 times faster: changes must be in the
/// store after one second instead of five minutes, and a mail comes each 0.3 seconds instead of
/// each 90.
pub fn trickle(table: &mut Table, store: StoreKind, format: Format, mails: usize) {
    let mut site = Site::new(store, format, &["--upload-interval", "1s"]);
    site.deliver(1);
    site.settle();
    let before = site.requests();
    let mut lmtp = site.dovecot.ports().lmtp().unwrap();
    let start = Instant::now();
    for number in 0..mails {
        let due = Duration::from_millis(300) * u32::try_from(number).unwrap();
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        site.deliver_one(&mut lmtp, number);
    }
    site.settle();
    let made = site.requests().since(&before);
    let value = made.total() as f64 / mails as f64;
    let what = format!("requests per delivery, {mails} one by one");
    table.row(&what, &site.place(), value, Limit::AtMost(1.25), &made.text());
    site.dovecot.stop();
    site.mount.umount().unwrap();
}

/// What a client does to mails, each counted from the command to its answer.
pub fn changes(table: &mut Table, store: StoreKind, format: Format) {
    let mut site = Site::new(store, format, &[]);
    site.deliver(20);
    let mut imap = site.imap();
    imap.create("Work").unwrap();
    imap.select("INBOX").unwrap();
    let uids: Vec<u32> = imap.fetch_all().unwrap().iter().map(|m| m.uid).collect();
    // Whatever is due because a folder is new is done before.
    imap.copy(uids[0], "Work").unwrap();
    site.settle();
    let place = site.place();
    let mut count = |what: &str, work: &mut dyn FnMut()| {
        let before = site.requests();
        work();
        let made = site.requests().since(&before);
        table.row(what, &place, made.total() as f64, Limit::AtMost(0.0), &made.text());
    };
    count("requests of a flag change", &mut || {
        imap.store(uids[1], "+", &flags(&["\\Seen", "\\Flagged"])).unwrap();
    });
    count("requests of a keyword", &mut || {
        imap.store(uids[1], "+", &flags(&["$Label1"])).unwrap();
    });
    count("requests of a COPY", &mut || {
        imap.copy(uids[2], "Work").unwrap();
    });
    count("requests of a MOVE", &mut || {
        imap.move_to(uids[3], "Work").unwrap();
    });
    imap.logout();
    site.dovecot.stop();
    site.mount.umount().unwrap();
}

/// IMAP RENAME, and the flush that follows by itself.
pub fn rename(table: &mut Table, store: StoreKind, format: Format, mails: usize) {
    let mut site = Site::new(store, format, &[]);
    let mut imap = site.imap();
    imap.create("Archive").unwrap();
    site.fill("Archive", mails);
    site.settle();
    let before = site.requests();
    imap.rename("Archive", "Old archive").unwrap();
    std::thread::sleep(Duration::from_secs(7));
    site.settle();
    let made = site.requests().since(&before);
    let what = format!("requests of a RENAME of {mails} mails");
    table.row(&what, &site.place(), made.total() as f64, Limit::AtMost(6.0), &made.text());
    let selected = imap.select("Old archive").unwrap();
    assert_eq!(selected.exists as usize, mails, "user {USER}");
    imap.logout();
    site.dovecot.stop();
    site.mount.umount().unwrap();
}
