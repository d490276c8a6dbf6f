//! A user whom this machine has never seen, in a store that is far away.

use crate::Wanted;
use crate::cpus::Cpus;
use crate::link::{Link, in_flight, in_sequence, round_trip, text};
use crate::place::{Kind, Place, append};
use crate::shares::Used;
use crate::support::dovecot::Format;
use crate::support::messages::message;
use crate::support::weed;
use crate::table::{Limit, Row, Table, median, number};
use std::sync::Arc;
use std::time::Instant;
use vmailfs::format::key::mail_dir;
use vmailfs::store::s3::S3Store;
use vmailfs::store::{ObjectMeta, ObjectStore, Reason};

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
        let start = Instant::now();
        for place in &places {
            fill(place, wanted);
        }
        println!("\n(mails stored in {} s)", start.elapsed().as_secs());
        if !wanted.skips("SELECT") {
            select(table, &mut places, format, wanted.cold_mails(), rounds);
        }
        if !wanted.skips("FETCH") {
            bodies(table, &mut places, format, wanted.cold_bodies(), rounds, cpus);
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
    let mut folders = Vec::new();
    if !wanted.skips("SELECT") {
        let small: Vec<Vec<u8>> = (0..wanted.cold_mails()).map(small).collect();
        append(&mut imap, "INBOX", &small);
        folders.push("INBOX");
    }
    if !wanted.skips("FETCH") {
        imap.create("Real").unwrap();
        let real: Vec<Vec<u8>> =
            (0..wanted.cold_bodies()).map(|n| message(13, &format!("real{n}")).bytes).collect();
        append(&mut imap, "Real", &real);
        folders.push("Real");
    }
    for folder in folders {
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

fn bodies(
    table: &mut Table,
    places: &mut [Place],
    format: Format,
    mails: usize,
    rounds: usize,
    cpus: &Cpus,
) {
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
            let before = Used::now(Some(place));
            let start = Instant::now();
            imap.measured("UID FETCH 1:* (BODY.PEEK[])").unwrap();
            let end = Instant::now();
            let after = Used::now(Some(place));
            took.push((end - start).as_secs_f64() * 1e3);
            if let Some(link) = &place.link {
                let calls = link.take();
                told = format!("{}; {}", text(&calls), flight(&calls, start, end));
                told = format!("{told}; {}", after.since(&before, cpus.count()));
                let gets: Vec<_> = calls.into_iter().filter(|c| c.kind == "GET mail").collect();
                trips.push(round_trip(&gets));
            }
            place.delay(0);
            imap.logout();
        }
    }
    let (ext4, here) = (median(took[0].clone()), median(took[1].clone()));
    let trip = median(trips);
    let away = format!("{}, {AWAY} ms", places[1].name());
    let what = format!("FETCH of {mails} bodies");
    let row = Row::new(PART, &what, format.name(), &away).value(here, "ms").ext4(ext4);
    let one_by_one = (AWAY as f64) * mails as f64;
    let note = format!(
        "figure: times faster than {mails} waits of {AWAY} ms; a GET took {trip:.1} ms; of the last round: {told}"
    );
    table.row(row.figure(one_by_one / here, Limit::AtLeast(16.0)).note(note));
    // What the machine allows: the same objects, and nobody who wants them for anything.
    for parallel in [32, 64] {
        let mut took = Vec::new();
        let mut told = String::new();
        for _ in 0..rounds {
            let place = &places[1];
            let (ms, note) = plain_gets(place, parallel, mails, cpus);
            took.push(ms);
            told = note;
        }
        let ms = median(took);
        let what = format!("GETs of the same {mails}, {parallel} at a time, and nothing else");
        let row = Row::new(PART, &what, format.name(), &away).value(ms, "ms");
        table.row(row.figure(one_by_one / ms, Limit::None).note(told));
    }
}

fn flight(calls: &[crate::link::Call], start: Instant, end: Instant) -> String {
    let (tenths, most) = in_flight(calls, start, end);
    let tenths: Vec<String> = tenths.iter().map(|n| format!("{n:.0}")).collect();
    format!("in flight in each tenth of the time: {} (at most {most})", tenths.join(" "))
}

/// All mails of the folder by a client that throws them away, with the daemon's own way of asking.
fn plain_gets(place: &Place, parallel: usize, mails: usize, cpus: &Cpus) -> (f64, String) {
    let (Some(link), Some(mount)) = (&place.link, place.mount()) else {
        return (0.0, String::new());
    };
    let (bucket, prefix) =
        mount.store().trim_start_matches("s3://").split_once('/').expect("bucket and prefix");
    let mut config = weed::server().config(bucket, prefix);
    config.endpoint = Some(link.endpoint());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    link.delay(0);
    let (store, objects) = runtime.block_on(async {
        let store = Arc::new(S3Store::connect(config).await.unwrap());
        let all = store.list(&mail_dir(USER), None, Reason("bench")).await.unwrap();
        // Those of the INBOX are the small ones.
        let mut real: Vec<ObjectMeta> = all;
        real.sort_by_key(|object| std::cmp::Reverse(object.size));
        real.truncate(mails);
        real.sort_by(|a, b| a.key.cmp(&b.key));
        (store, real)
    });
    assert_eq!(objects.len(), mails, "the mails of the folder");
    link.delay(AWAY);
    let answer = timed_gets(&runtime, store, objects, parallel, link, cpus);
    link.delay(0);
    answer
}

fn timed_gets(
    runtime: &tokio::runtime::Runtime,
    store: Arc<S3Store>,
    objects: Vec<ObjectMeta>,
    parallel: usize,
    link: &Link,
    cpus: &Cpus,
) -> (f64, String) {
    let slots = Arc::new(tokio::sync::Semaphore::new(parallel));
    link.take();
    let before = Used::now(None);
    let start = Instant::now();
    runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for object in objects {
            let slot = slots.clone().acquire_owned().await.unwrap();
            let store = store.clone();
            tasks.spawn(async move {
                let got = store.get(&object.key, None, object.size, Reason("bench")).await;
                assert_eq!(got.unwrap().1.len() as u64, object.size);
                drop(slot);
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    });
    let end = Instant::now();
    let calls = link.take();
    let used = Used::now(None).since(&before, cpus.count());
    let ms = (end - start).as_secs_f64() * 1e3;
    let trip = number(round_trip(&calls));
    (ms, format!("a GET took {trip} ms; {}; {used}", flight(&calls, start, end)))
}
