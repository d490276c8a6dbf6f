//! Exit codes, from `sysexits.h`, as mail people know them.

use crate::admin::ErrorKind;
use crate::admin::client::ClientError;
use crate::config::ConfigError;
use crate::store::StoreError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// `fsck`: what was wrong is repaired.
    Repaired = 1,
    /// `fsck`: something is wrong.
    Found = 4,
    /// The command line makes no sense.
    Usage = 64,
    /// Stored data is damaged.
    DataErr = 65,
    /// What is to be read is not there: a file, a state, a folder.
    NoInput = 66,
    /// No such user.
    NoUser = 67,
    /// The mount is not running, or something it needs is absent.
    Unavailable = 69,
    /// A defect of vmailfs.
    Software = 70,
    /// The system refuses something (fork, mount).
    OsErr = 71,
    /// A file or directory cannot be made.
    CantCreate = 73,
    /// Input or output failed.
    IoErr = 74,
    /// It may work later; nothing is lost. `fsck`: what was flushed is whole, but not everything was.
    TempFail = 75,
    /// The caller may not do this.
    NoPerm = 77,
    /// The configuration is wrong.
    Config = 78,
}

/// Why a command failed: one line for people, and a code for scripts.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    pub code: Code,
    pub text: String,
}

impl Failure {
    pub fn new(code: Code, text: impl Into<String>) -> Failure {
        Failure { code, text: text.into() }
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Failure {
        Failure::new(Code::Config, e.0)
    }
}

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Failure {
        let code = match &e {
            ClientError::NotRunning { source, .. }
                if source.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                Code::NoPerm
            }
            ClientError::NotRunning { .. } | ClientError::NotFound(_) => Code::Unavailable,
            ClientError::Several(_) => Code::Usage,
            ClientError::Silent(_) => Code::TempFail,
            ClientError::Broken(_) => Code::IoErr,
            ClientError::Protocol(_) => Code::Software,
            ClientError::Refused(e) => match e.kind {
                ErrorKind::Usage => Code::Usage,
                ErrorKind::NoSuchUser => Code::NoUser,
                ErrorKind::NotThere => Code::NoInput,
                ErrorKind::TempFail => Code::TempFail,
                ErrorKind::Denied => Code::NoPerm,
                ErrorKind::Internal => Code::Software,
            },
        };
        Failure::new(code, e.to_string())
    }
}

impl From<StoreError> for Failure {
    fn from(e: StoreError) -> Failure {
        let code = match &e {
            StoreError::Denied { .. } => Code::NoPerm,
            StoreError::Unavailable { .. } | StoreError::Full { .. } => Code::TempFail,
            StoreError::NoSuchStore { .. }
            | StoreError::Unsupported { .. }
            | StoreError::NotFound { .. } => Code::Unavailable,
            StoreError::BadBody { .. } => Code::DataErr,
            StoreError::Precondition { .. } => Code::Software,
        };
        Failure::new(code, e.to_string())
    }
}
