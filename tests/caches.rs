//! Both caches under one load that is many times what they may hold: real Dovecots, a model of what
//! they must show, and what the disk says meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "caches/bounds.rs"]
mod bounds;
#[path = "caches/large.rs"]
mod large;
#[path = "caches/load.rs"]
mod load;
#[path = "caches/removed.rs"]
mod removed;
mod support;
