//! Deliveries by LMTP to a store that is far away: one session, eight sessions, eight of which one
//! waits for a PUT that hangs.

use crate::Wanted;
use crate::cpus::Cpus;
use crate::link::{round_trip, text};
use crate::place::{Kind, Place, deliver};
use crate::support::dovecot::Format;
use crate::support::messages::message;
use crate::table::{Limit, Row, Table, median};
use std::time::Instant;

const USERS: [&str; 8] = ["anna", "bert", "cleo", "dora", "emil", "finn", "gina", "hugo"];
/// The one whose PUT hangs.
const HUNG: &str = USERS[7];

/// A mail of some 8 kB.
fn mail(number: usize) -> Vec<u8> {
    let mut bytes = message(11, &format!("delivery{number}")).bytes;
    bytes.truncate(8000);
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// One session, one mail after another; how much later than on ext4 each is answered.
pub fn one(table: &mut Table, wanted: &Wanted, cpus: &Cpus) {
    const PART: &str = "delivery, one session";
    let (blocks, times) = if wanted.quick { (4, 5) } else { (10, 10) };
    for format in wanted.formats(&[Format::Maildir, Format::Sdbox]) {
        let places: Vec<Place> = [Kind::Ext4, Kind::File, Kind::S3]
            .iter()
            .map(|kind| Place::start(*kind, format, &USERS[..1], &[], cpus))
            .collect();
        for delay in [0, 20, 100] {
            if delay != 20 && wanted.quick {
                continue;
            }
            let mut sessions: Vec<_> = places.iter().map(Place::lmtp).collect();
            let mut took: Vec<Vec<f64>> = places.iter().map(|_| Vec::new()).collect();
            let mut trips = Vec::new();
            for (place, lmtp) in places.iter().zip(&mut sessions) {
                place.delay(delay);
                deliver(lmtp, USERS[0], &mail(0));
            }
            for block in 0..blocks {
                for at in 0..places.len() {
                    let at = (at + block) % places.len();
                    let _before = places[at].link.as_ref().map(|link| link.take());
                    for time in 0..times {
                        let mail = mail(block * times + time);
                        let start = Instant::now();
                        deliver(&mut sessions[at], USERS[0], &mail);
                        took[at].push(start.elapsed().as_secs_f64() * 1e3);
                    }
                    if let Some(link) = &places[at].link {
                        let puts = link.take().into_iter().filter(|c| c.kind == "PUT mail");
                        trips.push(round_trip(&puts.collect::<Vec<_>>()));
                    }
                }
            }
            let ext4 = median(took[0].clone());
            let trip = median(trips);
            for (place, took) in places.iter().zip(took).skip(1) {
                let here = median(took);
                let what = match place.kind {
                    Kind::S3 => format!("p50, store {delay} ms away"),
                    _ if delay == 20 => "p50".to_owned(),
                    _ => continue,
                };
                let row = Row::new(PART, &what, format.name(), place.name());
                let row = row.value(here, "ms").ext4(ext4);
                table.row(match place.kind {
                    Kind::S3 => {
                        let more = here - ext4;
                        let note = format!(
                            "figure: round trips more than ext4, of the {trip:.1} ms that a PUT takes with the \
                             server's part; {:.2} of {delay} ms",
                            more / delay.max(1) as f64,
                        );
                        let limit = if delay == 0 { Limit::None } else { Limit::AtMost(1.25) };
                        row.figure(more / trip, limit).note(note)
                    }
                    _ => row.figure(here / ext4, Limit::None).note("figure: times ext4"),
                });
            }
        }
        for place in places {
            place.delay(0);
            place.end();
        }
    }
}

/// Each of these users gets so many mails, all at once; all times in ms, and mails a second.
fn at_once(place: &Place, users: &[&str], mails: usize) -> (Vec<f64>, f64) {
    let start = Instant::now();
    let took: Vec<f64> = std::thread::scope(|scope| {
        let threads: Vec<_> = users
            .iter()
            .map(|user| {
                scope.spawn(move || {
                    let mut lmtp = place.lmtp();
                    let mut took = Vec::new();
                    for number in 0..mails {
                        let mail = mail(number);
                        let start = Instant::now();
                        deliver(&mut lmtp, user, &mail);
                        took.push(start.elapsed().as_secs_f64() * 1e3);
                    }
                    took
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let rate = took.len() as f64 / start.elapsed().as_secs_f64();
    (took, rate)
}

/// Eight sessions against one, and seven beside one that hangs.
pub fn eight(table: &mut Table, wanted: &Wanted, cpus: &Cpus) {
    const PART: &str = "delivery, eight sessions";
    let (rounds, mails) = if wanted.quick { (3, 15) } else { (6, 40) };
    for format in wanted.formats(&[Format::Maildir, Format::Sdbox]) {
        for kind in [Kind::Ext4, Kind::S3] {
            let place = Place::start(kind, format, &USERS, &[], cpus);
            place.delay(20);
            at_once(&place, &USERS, 2);
            let (mut single, mut all) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                single.push(at_once(&place, &USERS[..1], mails).1);
                all.push(at_once(&place, &USERS, mails).1);
            }
            let (single, all) = (median(single), median(all));
            let note = format!("figure: times one session, {single:.0} mails/s");
            let limit = if kind == Kind::S3 { Limit::AtLeast(6.0) } else { Limit::None };
            let what = match kind {
                Kind::S3 => "mails a second, store 20 ms away",
                _ => "mails a second",
            };
            let row = Row::new(PART, what, format.name(), place.name());
            table.row(row.value(all, "/s").figure(all / single, limit).note(note));
            if kind == Kind::S3 {
                hung(table, &place, format, rounds, mails);
            }
            place.delay(0);
            place.end();
        }
    }
}

/// Seven sessions, with and without a delivery to an eighth user whose PUT hangs.
fn hung(table: &mut Table, place: &Place, format: Format, rounds: usize, mails: usize) {
    const PART: &str = "one hung PUT";
    let Some(link) = &place.link else { return };
    let others = &USERS[..7];
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        without.extend(at_once(place, others, mails).0);
        link.hold(&format!("/{HUNG}/mail/"));
        std::thread::scope(|scope| {
            let one = scope.spawn(|| deliver(&mut place.lmtp(), HUNG, &mail(0)));
            link.wait_until_held();
            with.extend(at_once(place, others, mails).0);
            link.release();
            one.join().unwrap();
        });
    }
    let (without, with) = (median(without), median(with));
    let row = Row::new(PART, "p50 of seven others", format.name(), place.name());
    let note = format!("without: {without:.1} ms; the PUT hung as long as they delivered");
    table.row(row.value(with, "ms").figure(with / without, Limit::AtMost(1.1)).note(note));
}

/// Requests of deliveries, as the store gets them, from an empty mount to the umount's end.
pub fn requests(table: &mut Table, wanted: &Wanted, cpus: &Cpus) {
    const PART: &str = "requests";
    let mails = if wanted.quick { 200 } else { 1000 };
    for format in wanted.formats(&[Format::Maildir, Format::Sdbox]) {
        let options = ["--set", "retention=1s"];
        let place = Place::start(Kind::S3, format, &USERS[..1], &options, cpus);
        let Some(link) = &place.link else { continue };
        // What the mount itself asked: whether the store is fit for mail.
        link.take();
        let mut lmtp = place.lmtp();
        for number in 0..mails {
            deliver(&mut lmtp, USERS[0], &mail(number));
        }
        drop(lmtp);
        let calls = link.take();
        std::thread::sleep(std::time::Duration::from_secs(2));
        // Deletes the bundles of earlier flushes.
        let gc = place.mount().map(|mount| mount.vmailfs(&["gc", "-u", USERS[0]]).unwrap());
        assert!(gc.as_ref().is_some_and(|(ok, _)| *ok), "{gc:?}");
        let Some(link) = place.end() else { continue };
        let calls = [calls, link.take()].concat();
        let per_mail = calls.len() as f64 / mails as f64;
        let what = format!("per delivery of {mails} at once, flushes, gc and umount included");
        let row = Row::new(PART, &what, format.name(), "vmailfs s3").value(per_mail, "requests");
        table.row(row.figure(per_mail, Limit::AtMost(1.25)).note(text(&calls)));
        changes(table, format, cpus);
    }
}

/// What clients change, each counted from the command to its answer.
fn changes(table: &mut Table, format: Format, cpus: &Cpus) {
    const PART: &str = "requests";
    let place = Place::start(Kind::S3, format, &USERS[..1], &[], cpus);
    let Some(link) = &place.link else { return };
    let mut imap = place.imap(USERS[0]);
    imap.create("Work").unwrap();
    let mails: Vec<Vec<u8>> = (0..30).map(mail).collect();
    crate::place::append(&mut imap, "INBOX", &mails);
    imap.select("INBOX").unwrap();
    // Whatever is due because a folder is new is done before.
    imap.measured("UID COPY 1 Work").unwrap();
    std::thread::sleep(std::time::Duration::from_secs(7));
    let commands = [
        ("a flag change", "UID STORE 2 +FLAGS (\\Seen)"),
        ("a keyword", "UID STORE 3 +FLAGS ($Label1)"),
        ("a COPY", "UID COPY 4 Work"),
        ("a COPY of 10", "UID COPY 5:14 Work"),
        ("a MOVE", "UID MOVE 15 Work"),
    ];
    for (what, command) in commands {
        link.take();
        imap.measured(command).unwrap();
        let calls = link.take();
        let row = Row::new(PART, what, format.name(), place.name());
        let row = row.value(calls.len() as f64, "requests");
        table.row(row.figure(calls.len() as f64, Limit::AtMost(0.0)).note(text(&calls)));
    }
    imap.logout();
    place.end();
}
