//! The main job over a real S3 server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use support::dovecot::Format;
use support::mount::Mount;
use support::scenario::survives_everything;

fn on_s3(format: Format) {
    let server = support::weed::server();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bucket = runtime.block_on(server.new_bucket());
    let keys = (server.access_key_id(), server.secret_access_key());
    survives_everything(format, Mount::on_s3(&server.endpoint(), &bucket, keys.0, keys.1));
}

#[test]
fn maildir() {
    on_s3(Format::Maildir);
}

#[test]
fn sdbox() {
    on_s3(Format::Sdbox);
}

#[test]
fn mdbox() {
    on_s3(Format::Mdbox);
}
