//! A user whom this machine has never seen, in a store that is far away.

use crate::Wanted;
use crate::cpus::Cpus;
use crate::link::{in_sequence, round_trip, text};
use crate::place::{Kind, Place, append};
use crate::support::dovecot::Format;
use crate::support::messages::message;
use crate::table::{Limit, Row, Table, median};
use std::time::Instant;

const USER: &str = "anna";
/// Logs in before the clock starts, so that Dovecot's own processes are there.
const OTHER: &str = "bert";
const AWAY: u64 = 20;

pub fn run(table: &mut Table, wanted: &Wanted, cpus: &Cpus) {
    let rounds = wanted.rounds.unwrap_or(if wanted.quick { 3 } else { 5 });
    for format in wanted.formats(&[Format::Maildir, Format::Sdbox]) {
        let mut places: Vec<Place> = [Kind::ColdExt4, Kind::S3]
            .iter()
            .map(|kind| Place::start(*kind, format, &[USER, OTHER], &[], cpus))
            .collect();
        for place in &places {
            fill(place, wanted);
        }
        if !wanted.skips("SELECT") {
            select(table, &mut places, format, wanted.cold_mails(), rounds);
        }
        if !wanted.skips("FETCH") {
            bodies(table, &mut places, format, wanted.cold_bodies(), rounds);
        }
        for place in places {
            place.delay(0);
            place.end();
        }
    }
}

/// An INBOX of many small mails, and a folder of fewer real ones.
fn fill(place: &Place, wanted: &Wanted) {
    place.imap(OTHER).logout();
    let mut imap = place.imap(USER);
    let small: Vec<Vec<u8>> = (0..wanted.cold_mails()).map(small).collect();
    append(&mut imap, "INBOX", &small);
    imap.create("Real").unwrap();
    let real: Vec<Vec<u8>> =
        (0..wanted.cold_bodies()).map(|n| message(13, &format!("real{n}")).bytes).collect();
    append(&mut imap, "Real", &real);
    for folder in ["INBOX", "Real"] {
        imap.select(folder).unwrap();
        imap.measured("UID FETCH 1:* (FLAGS RFC822.SIZE)").unwrap();
    }
    imap.logout();
}

fn small(number: usize) -> Vec<u8> {
    format!(
        "Message-ID: <{number}@client.test>\r\nFrom: Anna <anna@client.test>\r\n\
         Subject: number {number}\r\nDate: Mon, 01 Jan 2024 10:00:00 +0000\r\n\r\nHello.\r\n"
    )
    .into_bytes()
}

fn select(table: &mut Table, places: &mut [Place], format: Format, mails: usize, rounds: usize) {
    const PART: &str = "cold login";
    let mut took: Vec<Vec<f64>> = places.iter().map(|_| Vec::new()).collect();
    let (mut sequence, mut told) = (Vec::new(), String::new());
    for _ in 0..rounds {
        for (place, took) in places.iter_mut().zip(&mut took) {
            place.delay(0);
            place.cold();
            place.imap(OTHER).logout();
            place.delay(AWAY);
            let _before = place.link.as_ref().map(|link| link.take());
            let start = Instant::now();
            let mut imap = place.imap(USER);
            let selected = imap.select("INBOX").unwrap();
            took.push(start.elapsed().as_secs_f64() * 1e3);
            assert_eq!(selected.exists as usize, mails);
            if let Some(link) = &place.link {
                let calls = link.take();
                sequence.push(in_sequence(&calls) as f64);
                told = text(&calls);
            }
            imap.logout();
        }
    }
    let (ext4, here) = (median(took[0].clone()), median(took[1].clone()));
    let place = format!("{}, {AWAY} ms", places[1].name());
    let what = format!("login and SELECT of {mails}");
    let row = Row::new(PART, &what, format.name(), &place).value(here, "ms").ext4(ext4);
    table.row(row.figure(here - ext4, Limit::AtMost(200.0)).note("figure: ms more than ext4"));
    let sequence = median(sequence);
    let row = Row::new(PART, "round trips in sequence", format.name(), &place);
    table.row(row.value(sequence, "").figure(sequence, Limit::AtMost(5.0)).note(told));
}

fn bodies(table: &mut Table, places: &mut [Place], format: Format, mails: usize, rounds: usize) {
    const PART: &str = "cold bodies";
    let mut took: Vec<Vec<f64>> = places.iter().map(|_| Vec::new()).collect();
    let (mut trips, mut told) = (Vec::new(), String::new());
    for _ in 0..rounds {
        for (place, took) in places.iter_mut().zip(&mut took) {
            place.delay(0);
            place.cold();
            let mut imap = place.imap(USER);
            assert_eq!(imap.select("Real").unwrap().exists as usize, mails);
            place.delay(AWAY);
            let _before = place.link.as_ref().map(|link| link.take());
            let start = Instant::now();
            imap.measured("UID FETCH 1:* (BODY.PEEK[])").unwrap();
            took.push(start.elapsed().as_secs_f64() * 1e3);
            if let Some(link) = &place.link {
                let calls = link.take();
                told = text(&calls);
                let gets: Vec<_> = calls.into_iter().filter(|c| c.kind == "GET mail").collect();
                trips.push(round_trip(&gets));
            }
            place.delay(0);
            imap.logout();
        }
    }
    let (ext4, here) = (median(took[0].clone()), median(took[1].clone()));
    let trip = median(trips);
    let place = format!("{}, {AWAY} ms", places[1].name());
    let what = format!("FETCH of {mails} bodies");
    let row = Row::new(PART, &what, format.name(), &place).value(here, "ms").ext4(ext4);
    let one_by_one = (AWAY as f64) * mails as f64;
    let note = format!(
        "figure: times faster than {mails} waits of {AWAY} ms; a GET took {trip:.1} ms; {told}"
    );
    table.row(row.figure(one_by_one / here, Limit::AtLeast(16.0)).note(note));
}
