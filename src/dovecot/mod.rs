//! What we know of mail servers' files: which file is what, and how to read and repair
//! Dovecot's own.
//!
//! Pure: bytes in, bytes out. Whatever is parsed here was written by a mail server or came back
//! from a store, possibly torn; every parser is bounded and none panics (I9).

pub mod classes;
pub mod uidvalidity;
