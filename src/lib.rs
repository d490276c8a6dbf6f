//! vmailfs: a FUSE file system that keeps a mail server's mail in an object store.
//!
//! Layers, from the top; each may use only those below it:
//! `cli`, `config`, `admin`, `fuse`, `fs`, `vmail`, `dovecot`, `cache`, `format`, `store`.
//! `docs/ARCHITECTURE.md` tells what lives where and why.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod admin;
pub mod cache;
pub mod cli;
pub mod config;
pub mod dovecot;
pub mod failpoint;
pub mod format;
pub mod fs;
pub mod fuse;
pub mod histogram;
pub mod hostchange;
pub mod memory;
#[doc(hidden)]
pub mod sabotage;
pub mod store;
pub mod vmail;
