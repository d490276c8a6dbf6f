//! The file system in plain Rust: what the kernel (through `fuse`), a simulation or a bench calls.
//!
//! Users' directories hang below the mount at the depth that the layout says. At and above
//! that level nothing waits for a user to be loaded; below it everything belongs to one user
//! and runs under that user's lock.

mod above;
pub mod api;
mod attr;
mod calls;
mod files;
mod handles;
mod known;
mod readdir;
mod setattr;
pub mod shown;

pub use calls::VmailFs;
