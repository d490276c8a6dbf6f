//! The first SELECT on a machine that has nothing of the user.

use crate::site::{Site, StoreKind};
use crate::support::dovecot::Format;
use crate::support::imap::{Imap, flags};
use crate::table::{Limit, Table};
use std::time::Instant;

const FOLDER: &str = "Archive";

/// Once after the first flush of the folder, and once after a history: mails and flags came in
/// many flushes and sessions, so that the folder lies in a base and diffs.
pub fn select(table: &mut Table, store: StoreKind, format: Format, mails: usize) {
    let mut site = Site::new(
        store,
        format,
        &["--log-level", "info,vmailfs::vmail::load=debug,vmailfs::store=debug"],
    );
    site.deliver(20);
    let mut imap = site.imap();
    for folder in ["Drafts", "Sent", "Trash", FOLDER] {
        imap.create(folder).unwrap();
    }
    site.fill(FOLDER, mails);
    imap.logout();
    measure(table, &mut site, mails, "flushed once");
    let mut total = mails;
    for round in 0..24 {
        let mut imap = site.imap();
        let selected = imap.select(FOLDER).unwrap();
        for step in 1..=8 {
            let uid = (round * 997 + step * 13) % selected.exists + 1;
            imap.store(uid, "+", &flags(&["\\Seen"])).unwrap();
        }
        imap.append(FOLDER, &flags(&[]), None, &crate::site::mail(total)).unwrap();
        total += 1;
        imap.logout();
        site.deliver(3);
        site.flush();
        if round % 8 == 7 {
            site.dovecot.stop();
            site.mount.umount().unwrap();
            site.mount.mount().unwrap();
            site.dovecot.resume(&site.mount.root()).unwrap();
        }
    }
    measure(table, &mut site, total, "after 24 flushes");
    site.dovecot.stop();
    site.mount.umount().unwrap();
}

fn measure(table: &mut Table, site: &mut Site, mails: usize, when: &str) {
    site.move_to_fresh_machine();
    let before = site.requests();
    let start = Instant::now();
    let mut imap: Imap = site.imap();
    let selected = imap.select(FOLDER).unwrap();
    assert_eq!(selected.exists as usize, mails);
    assert_eq!(imap.fetch("1:*", "FLAGS").unwrap().len(), mails);
    let took = start.elapsed();
    let made = site.requests().since(&before);
    let what = format!("requests of the first login, SELECT and FETCH FLAGS of {mails}, {when}");
    let how = format!("{} ({} ms)", made.text(), took.as_millis());
    table.row(&what, &site.place(), made.total() as f64, Limit::AtMost(6.0), &how);
    imap.logout();
    if std::env::var_os("FIGURES_LOG").is_some() {
        println!("{}", site.mount.log());
    }
}
