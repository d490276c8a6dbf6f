//! The file system in plain Rust: what the kernel (through `fuse`), a simulation or a bench calls.

pub mod api;
