//! The formats: every value survives, every damage is noticed or harmless, nothing panics,
//! other people's tools read what we write, and what was once written is readable for ever.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "formats/any.rs"]
mod any;
#[path = "formats/damage.rs"]
mod damage;
#[path = "formats/frozen.rs"]
mod frozen;
#[path = "formats/round_trip.rs"]
mod round_trip;
#[path = "formats/tools.rs"]
mod tools;
