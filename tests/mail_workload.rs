//! The main job over a directory as the store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::dovecot::Format;
use support::mount::Mount;
use support::scenario::survives_everything;

#[test]
fn maildir() {
    survives_everything(Format::Maildir, Mount::on_directory());
}

#[test]
fn sdbox() {
    survives_everything(Format::Sdbox, Mount::on_directory());
}

#[test]
fn mdbox() {
    survives_everything(Format::Mdbox, Mount::on_directory());
}
