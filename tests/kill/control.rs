//! The same load on a plain directory, with only Dovecot killed: what its log says then it says
//! of itself, and means nothing when a mount was under it.

use super::trial::{names_corruption, own_repair};
use crate::support::check::{Kind, Tolerance, compare};
use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::workload::{Size, Workload, user_names};
use crate::support::{mail_root, remove_locks, scratch};
use std::collections::BTreeMap;
use std::time::Duration;

fn run(format: Format, rounds: u64) {
    let place = scratch("control");
    let root = mail_root(place.path());
    let users = user_names(2);
    let work = Workload::new(5, &users);
    let mut dovecot = Dovecot::start(&root, &Layout::usual(format), &users).unwrap();
    work.first_round(&dovecot, Size::SHORT);
    let mut said: BTreeMap<String, u32> = BTreeMap::new();
    let mut strange: Vec<String> = Vec::new();
    let mut accused: Vec<String> = Vec::new();
    for round in 0..rounds {
        let ports = dovecot.ports();
        let time = Duration::from_millis(200 + round * 137 % 900);
        work.traffic_until(ports, time, || dovecot.kill9());
        let mut lines = dovecot.complaints();
        remove_locks(&root);
        dovecot.resume(&root).unwrap();
        work.model().resolve();
        let seen = dovecot.look().unwrap();
        for problem in compare(&work.model(), &seen, Tolerance::Nothing) {
            *said.entry(format!("{:?}", problem.kind)).or_default() += 1;
            if matches!(problem.kind, Kind::Lost | Kind::UidReused) {
                accused.push(problem.to_string());
            }
        }
        lines.extend(dovecot.complaints());
        for line in lines.iter().filter(|line| names_corruption(line)) {
            let text = line.split_once(">: ").map_or(line.as_str(), |(_, text)| text);
            let bare: String = text.chars().filter(|c| !c.is_ascii_digit()).collect();
            let root = root.display().to_string();
            let root: String = root.chars().filter(|c| !c.is_ascii_digit()).collect();
            *said.entry(bare.replace(&root, "")).or_default() += 1;
        }
        // Elsewhere these would count against the mount.
        strange.extend(lines.into_iter().filter(|l| names_corruption(l) && !own_repair(format, l)));
        work.model().adopt(&seen);
    }
    eprintln!("{} without a mount: {said:#?}\nnot expected: {strange:#?}", format.name());
    // Nor does a local disk lose mail: the checker would be wrong about the mount, too.
    assert!(accused.is_empty(), "{accused:#?}");
    let (mails, _) = work.model().acknowledged;
    assert!(mails > rounds, "only {mails} mails in {rounds} rounds: this shows nothing");
}

#[test]
fn sdbox() {
    run(Format::Sdbox, 5);
}

#[test]
fn mdbox() {
    run(Format::Mdbox, 5);
}

#[test]
#[ignore = "long; run by `make kills-control`"]
fn long() {
    let rounds = std::env::var("KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let only = std::env::var("FORMAT").ok();
    for format in [Format::Mdbox, Format::Sdbox, Format::Maildir] {
        if only.as_deref().is_none_or(|name| name == format.name()) {
            run(format, rounds);
        }
    }
}
