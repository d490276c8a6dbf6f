//! What several test programs share. Each of them uses only a part.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod fakefs;
pub mod http;
pub mod weed;
