//! The heart: users, folders, publishing, flushing, recovering.

/// What a file system call must wait for.
#[derive(Debug)]
pub enum Need {}
