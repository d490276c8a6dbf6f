//! The one place where what went wrong becomes an errno.
//!
//! Mail servers act on errnos: Postfix bounces mail on EIO, EDQUOT, EFBIG and EROFS and defers
//! on ENOSPC, EAGAIN and ESTALE; Dovecot takes ENOENT for an expunge. So an outage is never
//! ENOENT, and on the way of a delivery never one of the bouncing ones (I4).
//!
//! Nor is damage: a head, a bundle or a journal that cannot be read will not mend by waiting, but a
//! person may mend it before senders give up, and mail that bounced is gone. Nobody can tell a
//! delivery's lookup from a reader's, so everything but the reading of a mail answers EAGAIN
//! ([`Error::for_delivery`]); EIO is left for a mail whose own bytes cannot be had.

use crate::failpoint::{self, Point};
use crate::format::{FolderId, FormatError};
use crate::fs::api::FsError;
use crate::store::StoreError;
use std::io;

/// An ordinary answer of a file system, nothing that anybody must be told about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plain {
    NotFound,
    Exists,
    NotDir,
    IsDir,
    NotEmpty,
    Invalid,
    CrossDevice,
    NameTooLong,
    Access,
    BadHandle,
    NotSupported,
    TooManyLinks,
}

/// What was being done when the store failed: it decides what the caller may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum During {
    /// Loading a user or folder, or anything on the way of a delivery.
    Delivery,
    /// Reading a mail.
    Reading,
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("{0:?}")]
    Plain(Plain),
    /// Refused by policy, with what to do instead.
    #[error("{0}")]
    Refused(String),
    /// Somebody names a state or a folder that there is not.
    #[error("{0}")]
    NotThere(String),
    #[error("{what}: {source}")]
    Store { what: String, during: During, source: StoreError },
    /// Head, bundle or journal do not decode: this user (or folder) cannot be served.
    #[error("{what}: {source}")]
    Corrupt { what: String, source: FormatError },
    /// State that contradicts itself, or an object that is named but gone.
    #[error("{what}")]
    Damaged { what: String },
    /// An object that the listing names is not in the store.
    #[error("user {user}: object {object} is named but gone from the store")]
    Gone { user: String, object: String },
    /// A file of the metacache was removed behind our back; it is brought back, and the call
    /// made again.
    #[error("{what}: named in the listing but missing in the metacache")]
    Vanished { folder: FolderId, what: String },
    /// There is no such user in the store.
    #[error("user {user}: not in this store")]
    NoUser { user: String },
    /// The local disk failed.
    #[error("{what}: {detail}")]
    Disk { what: String, full: bool, detail: String },
    /// Another session writes this user now.
    #[error("user {user} belongs to another session now")]
    Lost { user: String },
    /// The lease is over and could not be renewed: perhaps somebody else's user by now.
    #[error(
        "user {user}: this backend's lease is over, nothing can be changed until it is renewed"
    )]
    Lapsed { user: String },
    /// Another session goes by this backend's name.
    #[error("{what}")]
    NameTaken { what: String },
    /// Another backend owns the user and is alive.
    #[error("user {user} is owned by backend {backend}, which is alive")]
    Foreign { user: String, backend: String },
    /// The store says what cannot be. It is asked again, and nothing is taken for true meanwhile.
    #[error("{what}")]
    Doubt { what: String },
    /// On the way of a delivery, what is an error of its own elsewhere: the mail stays with its
    /// sender.
    #[error("{what}")]
    Deferred { what: String },
    /// The user is on its way out of this session; see [`super::close`].
    #[error("user {user} is being handed over")]
    HandingOver { user: String },
    /// Space is reserved for others, or a bound is reached.
    #[error("{0}")]
    Full(String),
    /// A cache is full and nothing of it can go at present.
    #[error("{0}")]
    Crowded(String),
    /// The session is ending.
    #[error("the mount is going away")]
    Closing,
    /// A mistake of ours; the call is refused and nothing is changed.
    #[error("internal error: {0}")]
    Internal(String),
}

pub type Result<T> = std::result::Result<T, Error>;

/// Passes a failpoint, whose error is one of the disk.
pub fn pass(point: Point) -> Result<()> {
    failpoint::hit(point).map_err(|e| Error::disk(point.0, &e))
}

impl From<Plain> for Error {
    fn from(plain: Plain) -> Error {
        Error::Plain(plain)
    }
}

impl Error {
    pub fn store(what: impl Into<String>, during: During, source: StoreError) -> Error {
        Error::Store { what: what.into(), during, source }
    }

    pub fn disk(what: impl Into<String>, error: &io::Error) -> Error {
        let full =
            matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        Error::Disk { what: what.into(), full, detail: error.to_string() }
    }

    pub fn corrupt(what: impl Into<String>, source: FormatError) -> Error {
        Error::Corrupt { what: what.into(), source }
    }

    /// The errno table. Exhaustive: a new error cannot be forgotten here.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Plain(plain) => match plain {
                Plain::NotFound => libc::ENOENT,
                Plain::Exists => libc::EEXIST,
                Plain::NotDir => libc::ENOTDIR,
                Plain::IsDir => libc::EISDIR,
                Plain::NotEmpty => libc::ENOTEMPTY,
                Plain::Invalid => libc::EINVAL,
                Plain::CrossDevice => libc::EXDEV,
                Plain::NameTooLong => libc::ENAMETOOLONG,
                Plain::Access => libc::EACCES,
                Plain::BadHandle => libc::EBADF,
                Plain::NotSupported => libc::EOPNOTSUPP,
                Plain::TooManyLinks => libc::EMLINK,
            },
            Error::Refused(_) => libc::EPERM,
            Error::NoUser { .. } | Error::NotThere(_) => libc::ENOENT,
            Error::Store { during, source, .. } => match (during, source) {
                (During::Delivery, StoreError::Full { .. }) => libc::ENOSPC,
                (During::Delivery, _) => libc::EAGAIN,
                (During::Reading, _) => libc::EIO,
            },
            Error::Corrupt { .. }
            | Error::Damaged { .. }
            | Error::Gone { .. }
            | Error::Internal(_) => libc::EIO,
            // ENOSPC is what every server takes for "later"; a broken disk is not the mail's
            // fault either, and EIO would bounce it.
            Error::Disk { full: true, .. } | Error::Full(_) => libc::ENOSPC,
            Error::Disk { full: false, .. } => libc::EAGAIN,
            Error::Lost { .. } | Error::Lapsed { .. } | Error::NameTaken { .. } => libc::ESTALE,
            Error::Foreign { .. }
            | Error::HandingOver { .. }
            | Error::Doubt { .. }
            | Error::Deferred { .. }
            | Error::Closing
            | Error::Crowded(_)
            | Error::Vanished { .. } => libc::EAGAIN,
        }
    }

    /// What is told to a call that may be part of a delivery: EIO would bounce the mail, and what is
    /// wrong here may be mended before its sender gives up.
    #[must_use]
    pub fn for_delivery(self) -> Error {
        match self {
            Error::Store { what, source, .. } => Error::store(what, During::Delivery, source),
            Error::Corrupt { .. }
            | Error::Damaged { .. }
            | Error::Gone { .. }
            | Error::Internal(_) => Error::Deferred { what: self.to_string() },
            other => other,
        }
    }

    /// For whoever called, reading a mail or waiting for it ([`super::wait::satisfy`] has seen to it
    /// that nobody else gets EIO).
    pub fn answer(&self) -> FsError {
        FsError {
            errno: self.errno(),
            text: self.to_string(),
            quiet: matches!(self, Error::Plain(_)),
        }
    }
}
