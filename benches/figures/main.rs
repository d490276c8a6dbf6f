//! The figures that the product promises, measured on a real mount with a real Dovecot:
//! requests to the store per delivery, per change, per RENAME and per first SELECT on a fresh
//! machine, and the daemon's memory for a large folder. Prints tables; exits with 1 if a figure is missed.
//!
//! `cargo bench --bench figures -- [GROUP...] [--store s3|file] [--format maildir|sdbox|mdbox]
//! [--mails N]`, run as root; without arguments everything. Groups: `delivery`, `changes`,
//! `rename`, `fresh`, `memory`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../tests/support/mod.rs"]
mod support;

mod delivery;
mod fresh;
mod memory;
mod site;
mod table;

use site::StoreKind;
use support::dovecot::Format;
use table::Table;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Wanted {
    groups: Vec<String>,
    stores: Vec<StoreKind>,
    formats: Vec<Format>,
    /// Instead of each group's own number of mails.
    mails: Option<usize>,
}

impl Wanted {
    fn from_arguments() -> Wanted {
        let mut wanted =
            Wanted { groups: Vec::new(), stores: Vec::new(), formats: Vec::new(), mails: None };
        let mut arguments = std::env::args().skip(1);
        let usage = "figures [delivery] [changes] [rename] [fresh] [memory] [--store s3|file] \
                     [--format maildir|sdbox|mdbox] [--mails N]";
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().unwrap_or_else(|| panic!("{usage}"));
            match argument.as_str() {
                // Cargo's own.
                "--bench" => {}
                "delivery" | "changes" | "rename" | "fresh" | "memory" => {
                    wanted.groups.push(argument)
                }
                "--mails" => wanted.mails = Some(value().parse().expect(usage)),
                "--store" => wanted.stores.push(match value().as_str() {
                    "s3" => StoreKind::S3,
                    "file" => StoreKind::File,
                    _ => panic!("{usage}"),
                }),
                "--format" => wanted.formats.push(match value().as_str() {
                    "maildir" => Format::Maildir,
                    "sdbox" => Format::Sdbox,
                    "mdbox" => Format::Mdbox,
                    _ => panic!("{usage}"),
                }),
                _ => panic!("{usage}"),
            }
        }
        if wanted.stores.is_empty() {
            wanted.stores = vec![StoreKind::S3, StoreKind::File];
        }
        if wanted.formats.is_empty() {
            wanted.formats = vec![Format::Maildir, Format::Sdbox, Format::Mdbox];
        }
        wanted
    }

    fn group(&self, name: &str) -> bool {
        self.groups.is_empty() || self.groups.iter().any(|g| g == name)
    }

    fn mails(&self, usual: usize) -> usize {
        self.mails.unwrap_or(usual)
    }
}

fn main() {
    let wanted = Wanted::from_arguments();
    let mut table = Table::default();
    for &store in &wanted.stores {
        for &format in &wanted.formats {
            if wanted.group("delivery") {
                delivery::burst(&mut table, store, format, wanted.mails(1000));
                delivery::trickle(&mut table, store, format, wanted.mails(200).min(1000));
            }
            if wanted.group("changes") {
                delivery::changes(&mut table, store, format);
            }
            if wanted.group("rename") {
                delivery::rename(&mut table, store, format, wanted.mails(10_000));
            }
            if wanted.group("fresh") {
                fresh::select(&mut table, store, format, wanted.mails(10_000));
            }
        }
    }
    if wanted.group("memory") {
        memory::listed(&mut table, wanted.mails(100_000));
    }
    std::process::exit(i32::from(table.missed()));
}
