//! Local disk: the caches, staging, and the disk itself as the heart sees it.

pub mod disk;
pub mod fscache;
pub mod metacache;
pub mod staging;
pub mod weight;
