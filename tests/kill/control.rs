//! Only Dovecot is killed, again and again, under the same load: over a plain directory, where
//! what its log says then it says of itself, and over a mount that lives on, where it may say no
//! more than that. No mail is lost and no UID given twice in either.

use super::half::of_half_a_mail;
use super::trial::{names_corruption, own_repair};
use crate::support::check::{Kind, NO_MAIL, Tolerance, compare};
use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::mount::Mount;
use crate::support::workload::{Size, Workload, user_names};
use crate::support::{mail_root, remove_locks, scratch};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Rounds below `root`; `meanwhile` is called while no server runs.
fn rounds(format: Format, root: &Path, rounds: u64, mut meanwhile: impl FnMut(u64)) {
    let users = user_names(2);
    let work = Workload::new(5, &users);
    let mut dovecot = Dovecot::start(root, &Layout::usual(format), &users).unwrap();
    work.first_round(&dovecot, Size::SHORT);
    let mut said: BTreeMap<String, u32> = BTreeMap::new();
    let mut strange: Vec<String> = Vec::new();
    let mut accused: Vec<String> = Vec::new();
    let shown_root: String =
        root.display().to_string().chars().filter(|c| !c.is_ascii_digit()).collect();
    for round in 0..rounds {
        let ports = dovecot.ports();
        let time = Duration::from_millis(200 + round * 137 % 900);
        work.traffic_until(ports, time, || dovecot.kill9());
        let mut lines = dovecot.complaints();
        meanwhile(round);
        remove_locks(root);
        dovecot.resume(root).unwrap();
        work.model().resolve();
        let seen = dovecot.look().unwrap();
        for problem in compare(&work.model(), &seen, Tolerance::Nothing) {
            *said.entry(format!("{:?}", problem.kind)).or_default() += 1;
            let harm = [Kind::Lost, Kind::UidReused, Kind::Content, Kind::FolderMissing];
            // Of a mail whose header was never written the repair makes one with the empty header
            // in front.
            let repaired = format == Format::Mdbox && problem.detail.ends_with(NO_MAIL);
            if harm.contains(&problem.kind) && !repaired {
                accused.push(problem.to_string());
            }
        }
        lines.extend(dovecot.complaints());
        for line in lines.iter().filter(|line| names_corruption(line)) {
            let text = line.split_once(">: ").map_or(line.as_str(), |(_, text)| text);
            let bare: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
            *said.entry(bare.replace(&shown_root, "")).or_default() += 1;
        }
        // Elsewhere these would count against the mount.
        strange.extend(lines.into_iter().filter(|line| {
            let known = own_repair(format, line) || of_half_a_mail(format, line);
            names_corruption(line) && !known
        }));
        work.model().adopt(&seen);
    }
    eprintln!("{}: {said:#?}", format.name());
    // Nor does a local disk lose mail: the checker would be wrong about the mount, too.
    assert!(accused.is_empty(), "{accused:#?}");
    assert!(strange.is_empty(), "{strange:#?}");
    let (mails, _) = work.model().acknowledged;
    assert!(mails > rounds, "only {mails} mails in {rounds} rounds: this shows nothing");
}

fn on_a_plain_directory(format: Format, count: u64) {
    let place = scratch("control");
    rounds(format, &mail_root(place.path()), count, |_| ());
}

/// Every second time it is unmounted in good order before the server is back.
fn on_a_mount(format: Format, count: u64) {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let root = mount.root();
    rounds(format, &root, count, |round| {
        if round % 2 == 1 {
            mount.umount().unwrap();
            mount.mount().unwrap();
        }
    });
}

#[test]
fn sdbox() {
    on_a_plain_directory(Format::Sdbox, 5);
}

#[test]
fn mdbox() {
    on_a_plain_directory(Format::Mdbox, 5);
}

#[test]
fn mdbox_on_a_mount() {
    on_a_mount(Format::Mdbox, 5);
}

#[test]
#[ignore = "long; run by `make kills-control`"]
fn long() {
    let count = std::env::var("KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let only = std::env::var("FORMAT").ok();
    for format in [Format::Mdbox, Format::Sdbox, Format::Maildir] {
        if only.as_deref().is_none_or(|name| name == format.name()) {
            eprintln!("on a plain directory:");
            on_a_plain_directory(format, count);
            eprintln!("on a mount:");
            on_a_mount(format, count);
        }
    }
}
