//! The formats of everything vmailfs writes to the store or to its state directory.
//!
//! Pure: no I/O, no clock, no randomness. Whatever is decoded here came from a store or a
//! disk and is not trusted (I9): every decoder has limits and returns [`FormatError`].

pub mod bundle;
mod content;
pub mod dropped;
pub mod escape;
mod frame;
pub mod head;
mod headjson;
pub mod ids;
pub mod journal;
pub mod key;
pub mod listing;
pub mod part;
mod tar;
pub mod unpack;

pub use ids::{Epoch, FolderId, ObjectId, Place, Sub, Timestamp};

/// Why bytes could not be decoded. The text names the place, for the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes do not follow the format.
    #[error("{what}: {detail}")]
    Malformed { what: &'static str, detail: String },
    /// A checksum does not match.
    #[error("{what}: checksum mismatch")]
    Checksum { what: &'static str },
    /// Written by a newer version of vmailfs.
    #[error(
        "{what}: format version {found} is newer than {known}, the newest this vmailfs knows; upgrade vmailfs"
    )]
    TooNew { what: &'static str, found: u32, known: u32 },
    /// Larger than the decoder's limit.
    #[error("{what}: larger than the limit of {limit} bytes")]
    TooLarge { what: &'static str, limit: u64 },
}

impl FormatError {
    pub(crate) fn malformed(what: &'static str, detail: impl Into<String>) -> FormatError {
        FormatError::Malformed { what, detail: detail.into() }
    }

    /// What a source of bytes reports: one of our own errors, or bytes that it cannot decode.
    fn from_io(what: &'static str, error: std::io::Error) -> FormatError {
        match error.downcast::<FormatError>() {
            Ok(own) => own,
            Err(error) => FormatError::malformed(what, error.to_string()),
        }
    }
}
