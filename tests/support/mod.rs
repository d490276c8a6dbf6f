//! What several test programs share. Each of them uses only a part.
#![allow(dead_code)]

pub mod http;
pub mod weed;
