//! Random kills: a few by default, as many as the variable KILLS says in the long version.

use super::table::{Row, Table};
use super::trial::Trial;
use crate::support::dovecot::Format;
use crate::support::mount::Mount;
use std::sync::Mutex;
use std::thread;

const FORMATS: [Format; 3] = [Format::Maildir, Format::Sdbox, Format::Mdbox];

/// A kind of store, and how to get a fresh one.
type Place = (&'static str, fn() -> Mount);

const DIRECTORY: Place = ("dir", Mount::on_directory);
const S3: Place = ("s3", on_s3);

fn on_s3() -> Mount {
    let server = crate::support::weed::server();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bucket = runtime.block_on(server.new_bucket());
    let keys = (server.access_key_id(), server.secret_access_key());
    Mount::on_s3(&server.endpoint(), &bucket, keys.0, keys.1)
}

/// Rounds until so many kills are done.
fn run(format: Format, place: Place, kills: u32, seed: u64, rows: &Mutex<Vec<Row>>) {
    let mut trial = Trial::new(format, place.0, place.1(), seed);
    let mut done = 0;
    let mut rounds = 0;
    while done < kills || rounds < 2 {
        let round = trial.any_round();
        let row = trial.round(&round);
        done += row.kills;
        rounds += 1;
        let bad = row.bad();
        let state = if row.wiped { "wiped" } else { "kept" };
        eprintln!(
            "{} {} {state}, {done} kills: {} mails, {} changes acknowledged{}",
            place.0,
            format.name(),
            row.mails,
            row.changes,
            if bad { ", BAD" } else { "" }
        );
        rows.lock().unwrap().push(row);
        if bad {
            // What is wrong stays wrong: the rest needs a fresh start.
            trial = Trial::new(format, place.0, place.1(), seed + u64::from(done));
        }
    }
}

fn judge(rows: Mutex<Vec<Row>>) {
    let table = Table(rows.into_inner().unwrap());
    eprintln!("\n{table}");
    for line in table.0.iter().flat_map(|row| &row.corrupted) {
        eprintln!("{line}");
    }
    assert!(!table.0.iter().any(Row::bad), "see above\n{table}");
}

fn a_few(format: Format) {
    let rows = Mutex::default();
    run(format, DIRECTORY, 2, rand::random(), &rows);
    judge(rows);
}

#[test]
fn maildir() {
    a_few(Format::Maildir);
}

#[test]
fn sdbox() {
    a_few(Format::Sdbox);
}

#[test]
fn mdbox() {
    a_few(Format::Mdbox);
}

/// `KILLS` (200) kills over all formats, a fifth of them over an S3 server; `SEED` repeats the
/// choice of rounds, though not their timing, and `FORMAT` leaves the other formats out.
#[test]
#[ignore = "long; run by `make kills`"]
fn all() {
    let number = |name: &str, usual: u64| match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}")),
        Err(_) => usual,
    };
    let kills = number("KILLS", 200).div_ceil(15) as u32;
    let seed = number("SEED", rand::random::<u32>().into());
    eprintln!("seed {seed}");
    let only = std::env::var("FORMAT").ok();
    let rows = Mutex::default();
    thread::scope(|scope| {
        for (n, format) in FORMATS.into_iter().enumerate() {
            if only.as_deref().is_some_and(|name| name != format.name()) {
                continue;
            }
            let rows = &rows;
            let seed = seed + n as u64;
            scope.spawn(move || {
                run(format, DIRECTORY, kills * 4, seed, rows);
                run(format, S3, kills, seed + 100, rows);
            });
        }
    });
    judge(rows);
}
