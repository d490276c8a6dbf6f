//! What we know of mail servers' files: which file is what, and how to read and repair
//! Dovecot's own.
//!
//! Pure: bytes in, bytes out. Whatever is parsed here was written by a mail server or came back
//! from a store, possibly torn; every parser is bounded and none panics (I9).

mod bytes;
pub mod classes;
pub mod dbox_file;
mod guid;
pub mod index_log;
pub mod index_snapshot;
pub mod keywords;
pub mod mask;
pub mod records;
pub mod recover;
pub mod recover_mdbox;
pub mod replay;
pub mod template;
pub mod transaction;
pub mod uidlist;
pub mod uidvalidity;
