//! The numbers of a mount, over HTTP, as Prometheus would read them: the format to the letter, and
//! that they say what happened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;
use support::mount::Mount;
use support::openmetrics::{Page, read};
use support::wait_until;

/// Where the mount says that it serves.
fn address(mount: &Mount) -> String {
    let (ok, text) = mount.vmailfs(&["status", "--json"]).unwrap();
    assert!(ok, "{text}");
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    status["metrics"].as_str().unwrap().to_owned()
}

fn scrape(address: &str) -> Page {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    assert!(head.contains("application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    // For another reader: `python3 -m prometheus_client.openmetrics.parser`.
    if let Some(dir) = std::env::var_os("KEEP_METRICS") {
        std::fs::write(Path::new(&dir).join("metrics.txt"), body).unwrap();
    }
    read(body).unwrap_or_else(|e| panic!("{e}\n{body}"))
}

/// A mail as Dovecot's delivery makes one.
fn deliver(home: &Path, name: &str, size: usize) {
    let (tmp, new) = (home.join("tmp").join(name), home.join("new").join(name));
    let mut file = std::fs::File::create(&tmp).unwrap();
    file.write_all(&vec![b'x'; size]).unwrap();
    file.sync_all().unwrap();
    std::fs::rename(tmp, new).unwrap();
}

#[test]
fn a_scrape_is_openmetrics_and_tells_what_happened() {
    let mut mount = Mount::on_directory()
        .option(&["--set", "metrics.listen=127.0.0.1:0"])
        .option(&["--set", "log.level=info,vmailfs::store=debug"]);
    mount.mount().unwrap();
    let at = address(&mount);
    let before = scrape(&at);
    assert_eq!(before.value("vmailfs_at_risk_bytes", &[("kind", "changes")]), Some(0.0));
    assert_eq!(before.value("vmailfs_store_up", &[]), Some(1.0));

    let home = mount.root().join("someone");
    for dir in ["", "tmp", "new", "cur"] {
        std::fs::create_dir(home.join(dir)).unwrap();
    }
    deliver(&home, "1.a", 1000);
    deliver(&home, "2.b", 5000);
    assert_eq!(std::fs::read(home.join("new/1.a")).unwrap().len(), 1000);
    assert!(std::fs::metadata(home.join("new/none")).is_err());
    assert!(std::fs::remove_dir(home.join("new")).is_err());

    // A file is a cached copy once its last handle is let go of, and that comes after close().
    let cached = [("cache", "fscache")];
    let copied = || scrape(&at).value("vmailfs_cache_used_bytes", &cached).unwrap() >= 6000.0;
    assert!(wait_until(Duration::from_secs(60), copied));
    let after = scrape(&at);
    let operation = |sample, op| after.value(sample, &[("operation", op)]).unwrap();
    assert_eq!(after.value("vmailfs_users_open", &[]), Some(1.0));
    assert_eq!(operation("vmailfs_fuse_request_duration_seconds_count", "fsync"), 2.0);
    assert_eq!(operation("vmailfs_fuse_waits_total", "fsync"), 2.0, "both were published");
    let refused = [("operation", "rmdir"), ("errno", "ENOTEMPTY")];
    assert_eq!(after.value("vmailfs_fuse_errors_total", &refused), Some(1.0));
    let publish = [("operation", "put"), ("reason", "publish")];
    assert_eq!(after.value("vmailfs_store_requests_total", &publish), Some(2.0));
    assert_eq!(after.value("vmailfs_store_sent_bytes_total", &publish), Some(6000.0));
    assert_eq!(after.value("vmailfs_store_call_duration_seconds_count", &publish), Some(2.0));
    assert_eq!(after.sum("vmailfs_store_errors_total", &[]), 0.0);
    assert_eq!(after.value("vmailfs_backlog_users", &[("changes", "important")]), Some(0.0));
    assert_eq!(after.value("vmailfs_backlog_users", &[("changes", "unimportant")]), Some(1.0));
    assert_eq!(after.value("vmailfs_backlog_mails", &[]), Some(2.0), "in the store, in no bundle");
    assert_eq!(after.value("vmailfs_user_opens_total", &[("from", "store")]), Some(1.0));

    let (ok, text) = mount.vmailfs(&["metacache", "flush", "-u", "someone"]).unwrap();
    assert!(ok, "{text}");
    let flushed = scrape(&at);
    assert_eq!(flushed.value("vmailfs_backlog_mails", &[]), Some(0.0));
    assert!(flushed.value("vmailfs_flushes_total", &[("result", "done")]).unwrap() >= 1.0);
    assert_eq!(flushed.value("vmailfs_flushes_total", &[("result", "failed")]), Some(0.0));
    assert!(flushed.value("vmailfs_flushed_bytes_total", &[]).unwrap() > 0.0);
    // Every request says why, in the log, too.
    let log = mount.log();
    let requests: Vec<&str> = log.lines().filter(|l| l.contains("store request")).collect();
    assert!(requests.len() > 5 && requests.iter().all(|l| l.contains("reason=")), "{requests:?}");
    assert!(requests.iter().any(|l| l.contains("reason=\"publish\"")), "{requests:?}");
    mount.umount().unwrap();
    assert!(std::net::TcpStream::connect(&at).is_err(), "nobody serves after the end");
}

#[test]
fn the_bytes_at_risk_are_those_that_changed() {
    let mut mount = Mount::on_directory().option(&["--set", "metrics.listen=127.0.0.1:0"]);
    mount.mount().unwrap();
    let at = address(&mount);
    let home = mount.root().join("someone");
    std::fs::create_dir(&home).unwrap();
    let risk = || scrape(&at).value("vmailfs_at_risk_bytes", &[("kind", "changes")]).unwrap();
    std::fs::write(home.join("subscriptions"), vec![b'a'; 70_000]).unwrap();
    assert_eq!(risk(), 70_000.0);
    assert!(mount.vmailfs(&["metacache", "flushall"]).unwrap().0);
    assert_eq!(risk(), 0.0);
    let mut file =
        std::fs::OpenOptions::new().append(true).open(home.join("subscriptions")).unwrap();
    file.write_all(&[b'b'; 500]).unwrap();
    drop(file);
    assert!(wait_until(Duration::from_secs(60), || risk() == 500.0), "{}", risk());
    mount.umount().unwrap();
}

#[test]
fn an_address_that_cannot_be_had_is_told_and_nothing_is_mounted() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let wanted = format!("metrics.listen={}", taken.local_addr().unwrap());
    let mut mount = Mount::on_directory().option(&["--set", &wanted]);
    let error = mount.mount().unwrap_err().to_string();
    assert!(error.contains("metrics.listen") && error.contains("in use"), "{error}");
    let mut mount = Mount::on_directory().option(&["--set", "metrics.listen=somewhere"]);
    let error = mount.mount().unwrap_err().to_string();
    assert!(error.contains("write it like 127.0.0.1:9154"), "{error}");
}
