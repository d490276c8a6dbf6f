//! Random kills: a few by default, as many as the variable KILLS says in the long version.

use super::table::{Row, Table};
use super::trial::Trial;
use crate::support::dovecot::Format;
use crate::support::mount::Mount;
use std::sync::Mutex;
use std::thread;

const FORMATS: [Format; 3] = [Format::Maildir, Format::Sdbox, Format::Mdbox];

fn on_directory() -> (&'static str, Mount) {
    ("dir", Mount::on_directory())
}

fn on_s3() -> (&'static str, Mount) {
    let server = crate::support::weed::server();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bucket = runtime.block_on(server.new_bucket());
    let keys = (server.access_key_id(), server.secret_access_key());
    ("s3", Mount::on_s3(&server.endpoint(), &bucket, keys.0, keys.1))
}

/// Rounds until so many kills are done.
fn run(
    format: Format,
    place: (&'static str, Mount),
    kills: u32,
    seed: u64,
    rows: &Mutex<Vec<Row>>,
) {
    let mut trial = Trial::new(format, place.0, place.1, seed);
    let mut done = 0;
    let mut rounds = 0;
    while done < kills || rounds < 2 {
        let round = trial.any_round();
        let row = trial.round(&round);
        done += row.kills;
        rounds += 1;
        rows.lock().unwrap().push(row);
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
    run(format, on_directory(), 2, rand::random(), &rows);
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
/// choice of rounds, though not their timing.
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
    let rows = Mutex::default();
    thread::scope(|scope| {
        for (n, format) in FORMATS.into_iter().enumerate() {
            let rows = &rows;
            let seed = seed + n as u64;
            scope.spawn(move || {
                run(format, on_directory(), kills * 4, seed, rows);
                run(format, on_s3(), kills, seed + 100, rows);
            });
        }
    });
    judge(rows);
}
