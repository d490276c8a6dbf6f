//! Other ways to lay out mail: users under domains or hashed, Maildir in plain directories,
//! control files and indexes elsewhere or beside the mails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;
use support::check::Tolerance;
use support::dovecot::{Dovecot, Format, Layout};
use support::mount::Mount;
use support::workload::{Size, Workload, user_names};
use support::{mail_root, scratch};

fn first(work: &Workload, root: &Path, layout: &Layout, users: &[String]) {
    let mut dovecot = Dovecot::start(root, layout, users).unwrap();
    work.first_round(&dovecot, Size::SHORT);
    work.must_have_worked(&dovecot, &layout.location);
    work.must_hold(&dovecot, Tolerance::Nothing, &layout.location);
    dovecot.stop();
}

fn again(work: &Workload, root: &Path, layout: &Layout, users: &[String]) {
    let mut dovecot = Dovecot::start(root, layout, users).unwrap();
    work.must_hold(&dovecot, Tolerance::Nothing, &format!("{}, again", layout.location));
    work.must_have_worked(&dovecot, &format!("{}, again", layout.location));
    dovecot.stop();
}

fn works_on_a_mount(layout: &Layout) {
    let users = user_names(2);
    let work = Workload::new(3, &users);
    let mut mount = Mount::on_directory().option(&["--layout", &layout.home]);
    mount.mount().unwrap();
    first(&work, &mount.root(), layout, &users);
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    again(&work, &mount.root(), layout, &users);
    mount.umount().unwrap();
}

fn layouts() -> Vec<Layout> {
    vec![
        Layout::usual(Format::Maildir).home("%d/%n"),
        Layout::usual(Format::Mdbox).home("%2.256Nu/%u"),
        Layout::new(Format::Maildir, "maildir:~/mail:LAYOUT=fs:INDEX=~/index"),
        Layout::new(Format::Maildir, "maildir:~/mail:CONTROL=~/control:INDEX=~/index"),
        Layout::new(Format::Maildir, "maildir:~/Maildir"),
        Layout::new(Format::Sdbox, "sdbox:~/mail"),
        Layout::new(Format::Sdbox, "sdbox:~/mail:CONTROL=~/control:INDEX=~/index"),
        Layout::new(Format::Mdbox, "mdbox:~/mail"),
    ]
}

#[test]
fn all_work_on_a_plain_directory() {
    let users = user_names(2);
    std::thread::scope(|scope| {
        for layout in layouts() {
            let users = &users;
            scope.spawn(move || {
                let place = scratch("layout");
                let root = mail_root(place.path());
                let work = Workload::new(3, users);
                first(&work, &root, &layout, users);
                again(&work, &root, &layout, users);
            });
        }
    });
}

#[test]
fn users_under_domains() {
    works_on_a_mount(&layouts()[0]);
}

#[test]
fn users_under_hashes() {
    works_on_a_mount(&layouts()[1]);
}

#[test]
fn maildir_in_nested_directories() {
    works_on_a_mount(&layouts()[2]);
}

#[test]
fn maildir_with_control_files_elsewhere() {
    works_on_a_mount(&layouts()[3]);
}

#[test]
fn maildir_with_indexes_beside_the_mails() {
    works_on_a_mount(&layouts()[4]);
}

#[test]
fn sdbox_with_indexes_beside_the_mails() {
    works_on_a_mount(&layouts()[5]);
}

#[test]
fn sdbox_with_control_files_elsewhere() {
    works_on_a_mount(&layouts()[6]);
}

#[test]
fn mdbox_with_indexes_beside_the_mails() {
    works_on_a_mount(&layouts()[7]);
}
