//! Each failpoint once.

use super::table::{Row, Table};
use super::trial::{Round, Shot, Trial};
use crate::support::dovecot::Format;
use crate::support::mount::Mount;
use std::time::Duration;

fn under_load(point: &str, nth: u32) -> Shot {
    Shot::At(format!("{point}=kill@{nth}"))
}

fn recovering(point: &str) -> Shot {
    Shot::Recovering(Duration::from_millis(700), format!("{point}=kill"))
}

fn leaving(point: &str) -> Shot {
    Shot::Leaving(format!("{point}=kill"))
}

fn restoring(point: &str) -> Shot {
    Shot::Restoring(format!("{point}=kill"))
}

/// Each place at which the daemon may die, and what must be done to get there.
fn all() -> Vec<(Shot, bool)> {
    vec![
        (under_load("publish.before-put", 4), false),
        (under_load("publish.after-put", 5), true),
        (under_load("publish.after-record", 3), true),
        (under_load("dir.named", 7), true),
        (under_load("flush.before-bundle", 1), false),
        (under_load("flush.after-bundle", 2), true),
        (under_load("flush.before-swap", 1), false),
        (under_load("flush.after-swap", 1), false),
        (under_load("flush.after-swap", 2), true),
        (recovering("open.before-swap"), true),
        (recovering("open.after-swap"), false),
        (recovering("open.after-swap"), true),
        (recovering("recover.before-record"), true),
        (recovering("recover.between-folders"), true),
        (recovering("recover.before-done"), true),
        (under_load("journal.before-append", 33), false),
        (under_load("journal.torn", 40), false),
        (under_load("journal.after-append", 50), false),
        (under_load("journal.before-sync", 6), true),
        (leaving("snapshot.before"), false),
        (leaving("snapshot.between"), false),
        (leaving("snapshot.before-journal"), false),
        (leaving("snapshot.after-journal"), true),
        (restoring("restore.before"), false),
        (restoring("restore.between"), false),
    ]
}

/// Every third of them, with one format; together the three formats pass all.
fn run(format: Format, from: usize) {
    let mut trial = Trial::new(format, "dir", Mount::on_directory(), 11);
    let mut rows: Vec<Row> = Vec::new();
    for (n, (shot, wipe)) in all().into_iter().enumerate() {
        if n % 3 == from {
            rows.push(trial.round(&Round { shot, wipe, survivor: n % 4 == 0 }));
        }
    }
    let table = Table(rows);
    eprintln!("{table}");
    assert!(!table.0.iter().any(Row::bad), "see above\n{table}");
}

#[test]
fn maildir() {
    run(Format::Maildir, 0);
}

#[test]
fn sdbox() {
    run(Format::Sdbox, 1);
}

#[test]
fn mdbox() {
    run(Format::Mdbox, 2);
}

/// One of them again and again, to find out about it: those whose plan has the text that the
/// variable FAILPOINT gives, with the format that FORMAT names, ROUNDS (20) times.
#[test]
#[ignore = "long, and of one place"]
fn one() {
    let name = std::env::var("FAILPOINT").expect("FAILPOINT names a place");
    let wanted = std::env::var("FORMAT").unwrap_or_else(|_| "mdbox".to_owned());
    let format = [Format::Maildir, Format::Sdbox, Format::Mdbox]
        .into_iter()
        .find(|format| format.name() == wanted)
        .expect("FORMAT names no format");
    let rounds = std::env::var("ROUNDS").ok().map_or(20, |n| n.parse().expect("ROUNDS"));
    let shots: Vec<(Shot, bool)> =
        all().into_iter().filter(|(shot, _)| format!("{shot:?}").contains(&name)).collect();
    assert!(!shots.is_empty(), "no failpoint is called {name}");
    let mut rows: Vec<Row> = Vec::new();
    let mut trial = Trial::new(format, "dir", Mount::on_directory(), rand::random());
    for n in 0..rounds {
        let (shot, wipe) = shots[n % shots.len()].clone();
        rows.push(trial.round(&Round { shot, wipe, survivor: n % 4 == 0 }));
        if rows.last().is_some_and(Row::bad) {
            trial = Trial::new(format, "dir", Mount::on_directory(), rand::random());
        }
    }
    let table = Table(rows);
    eprintln!("{table}");
    assert!(!table.0.iter().any(Row::bad), "see above\n{table}");
}

/// A failpoint that no test passes would be there for nothing.
#[test]
fn all_are_passed() {
    let named: String = all().iter().map(|(shot, _)| format!("{shot:?}")).collect();
    let missing: Vec<&str> = vmailfs::failpoint::ALL
        .iter()
        .map(|point| point.0)
        // Its swap comes after hundreds of mails; `tests/heart/uids.rs` passes it.
        .filter(|name| *name != "ceiling.after-swap" && !named.contains(&format!("{name}=")))
        // Those of the NFS mode: `tests/hostchange.rs` passes them.
        .filter(|name| {
            !["hostchange.", "migrate.", "usercache."].iter().any(|m| name.starts_with(m))
        })
        .collect();
    assert_eq!(missing, [""; 0]);
}
