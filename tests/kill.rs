//! The daemon is killed under load, again and again, and whatever a client was told holds.
//!
//! Needs root (it mounts). `make kills KILLS=200` runs the long version.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

mod kill {
    mod control;
    mod failpoints;
    mod half;
    mod many;
    mod rebuild;
    mod table;
    mod traffic;
    mod trial;
}
