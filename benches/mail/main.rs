//! The same mail workload on ext4, on a mount on a directory, and on a mount on an S3 server that
//! is some milliseconds away, in turns: a real Dovecot by IMAP and LMTP. Prints tables and writes
//! all of it as JSON. It judges nothing by its exit code: times depend on the machine.
//!
//! `cargo bench --bench mail -- [PART...] [--quick] [--format F] [--rounds N] [--only WORD]
//! [--unpinned] [--json FILE] [--svg FILE]`, run as root. `VMAILFS_PROGRAM` says which build of the daemon.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/support/mod.rs"]
mod support;

mod cold;
mod cpus;
mod delivery;
mod disk;
mod link;
mod local;
mod peers;
mod place;
mod plot;
mod scale;
mod shares;
mod table;
mod warm;

use cpus::Cpus;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;
use support::dovecot::Format;
use table::Table;

const USAGE: &str = "mail [warm] [delivery] [eight] [requests] [cold] [creates] [memory] [scale] \
    [peers] [all] [--quick] [--format maildir|sdbox|mdbox] [--rounds N] [--only WORD] [--unpinned] [--json FILE] \
    [--svg FILE]";
const PARTS: [&str; 9] =
    ["warm", "delivery", "eight", "requests", "cold", "creates", "memory", "scale", "peers"];
/// What is measured if nothing is asked for: in minutes, and on one processor.
const QUICK: [&str; 4] = ["warm", "delivery", "requests", "creates"];

/// What is to be measured.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    parts: Vec<String>,
    formats: Vec<Format>,
    only: Option<String>,
    pub quick: bool,
    pub rounds: Option<usize>,
    unpinned: bool,
    json: Option<PathBuf>,
    svg: Option<PathBuf>,
}

impl Wanted {
    fn from_arguments() -> Wanted {
        let mut wanted = Wanted::default();
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_else(|| panic!("{USAGE}"));
            match argument.as_str() {
                // Cargo's own.
                "--bench" => {}
                "--quick" => wanted.quick = true,
                "--unpinned" => wanted.unpinned = true,
                "--rounds" => wanted.rounds = Some(value().parse().expect(USAGE)),
                "--only" => wanted.only = Some(value()),
                "--json" => wanted.json = Some(value().into()),
                "--svg" => wanted.svg = Some(value().into()),
                "--format" => wanted.formats.push(match value().as_str() {
                    "maildir" => Format::Maildir,
                    "sdbox" => Format::Sdbox,
                    "mdbox" => Format::Mdbox,
                    _ => panic!("{USAGE}"),
                }),
                "all" => wanted.parts = PARTS.map(str::to_owned).to_vec(),
                part if PARTS.contains(&part) => wanted.parts.push(argument),
                _ => panic!("{USAGE}"),
            }
        }
        if wanted.parts.is_empty() {
            wanted.quick = true;
            wanted.parts = QUICK.map(str::to_owned).to_vec();
        }
        wanted
    }

    pub fn formats(&self, usual: &[Format]) -> Vec<Format> {
        if self.formats.is_empty() { usual.to_vec() } else { self.formats.clone() }
    }

    /// Whether something is not among what was asked for.
    pub fn skips(&self, what: &str) -> bool {
        self.only.as_ref().is_some_and(|only| !what.contains(only.as_str()))
    }

    pub fn cold_mails(&self) -> usize {
        if self.quick { 2000 } else { 10_000 }
    }

    pub fn cold_bodies(&self) -> usize {
        if self.quick { 500 } else { 2000 }
    }
}

fn main() {
    let wanted = Wanted::from_arguments();
    let free = Cpus::new(false);
    // Much at once on one processor would measure that processor.
    let pinned = Cpus::new(!wanted.unpinned);
    let mut table = Table::default();
    let about = about(&wanted, &pinned);
    println!("{about:#}");
    for part in &wanted.parts {
        let start = Instant::now();
        let cpus = if matches!(&**part, "eight" | "cold" | "memory" | "scale" | "peers") {
            &free
        } else {
            &pinned
        };
        cpus.here();
        match part.as_str() {
            "warm" => warm::run(&mut table, &wanted, cpus),
            "delivery" => delivery::one(&mut table, &wanted, cpus),
            "eight" => delivery::eight(&mut table, &wanted, cpus),
            "requests" => delivery::requests(&mut table, &wanted, cpus),
            "cold" => cold::run(&mut table, &wanted, cpus),
            "creates" => local::creates(&mut table, &wanted),
            "scale" => scale::run(&mut table, &wanted),
            "peers" => peers::run(&mut table, &wanted, cpus),
            _ => local::memory(&mut table, &wanted),
        }
        println!("\n({part} took {} s)", start.elapsed().as_secs());
        if let Some(path) = &wanted.json {
            table.write(path, &about);
        }
        if let Some(path) = &wanted.svg {
            plot::write(path, table.rows(), &about);
        }
    }
}

/// Where and with what it was measured.
fn about(wanted: &Wanted, cpus: &Cpus) -> serde_json::Value {
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
    };
    let of = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
        line.split_once([':', '=']).map(|(_, v)| v.trim().trim_matches('"').to_owned())
    };
    serde_json::json!({
        "kernel": said("uname", &["-r"]),
        "system": of("/etc/os-release", "PRETTY_NAME"),
        "cpu": of("/proc/cpuinfo", "model name"),
        "cpus": cpus.count(),
        "pinned": cpus.pinned,
        "memory": of("/proc/meminfo", "MemTotal"),
        "load": std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim(),
        "dovecot": said("dovecot", &["--version"]),
        "vmailfs": env!("CARGO_PKG_VERSION"),
        "commit": said("git", &["describe", "--always", "--dirty"]),
        "program": std::env::var("VMAILFS_PROGRAM").unwrap_or_else(|_| "cargo's".to_owned()),
        "quick": wanted.quick,
        "parts": wanted.parts,
    })
}
