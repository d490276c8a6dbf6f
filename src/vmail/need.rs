//! What a call may have to wait for, and the two ways in which it stops short of an answer.

use super::error::{Error, Plain};
use super::node::NodeIx;
use super::session::UserCell;
use super::stream::Piece;
use super::user::User;
use crate::cache::metacache::Purpose;
use crate::cache::staging::Staged;
use crate::format::FolderId;
use crate::fs::api::Ino;
use std::sync::Arc;

/// A node as seen from outside the user's lock. The inode number tells whether the slot still
/// holds the same node.
#[derive(Debug, Clone)]
pub struct NodeRef {
    pub cell: Arc<UserCell>,
    pub ix: NodeIx,
    pub ino: Ino,
}

#[derive(Debug)]
pub enum Need {
    /// The user must be opened: owned, and its root loaded.
    Open(Arc<UserCell>),
    /// Whether a user of this name exists, as far as the store answers soon.
    Exists(Arc<UserCell>),
    /// The list of all users.
    Users,
    /// A folder's listing and index files must be here.
    Load(Arc<UserCell>, FolderId),
    /// Files that are missing in a folder's metacache must be there again.
    Restore(Arc<UserCell>, FolderId),
    /// A mail's bytes must be in the store.
    Publish(NodeRef),
    /// A local file and the journal must be on disk.
    SyncLocal(NodeRef),
    /// The journal must be on disk.
    SyncJournal(Arc<UserCell>),
    /// A mail's cached copy must be here.
    Fetch(NodeRef),
    /// One object of a growing file must be here.
    FetchExtent(NodeRef, usize),
    /// So many bytes of the metacache must be free.
    Room(u64, Purpose),
    /// A piece of an object that fscache has no room for.
    Through(NodeRef, Piece),
    /// Room in staging for a file to become so long.
    Staging(Arc<UserCell>, Arc<Staged>, u64),
    /// A published file that may still be written must be in staging again; a growing one from
    /// this offset on.
    Stage(NodeRef, u64),
    /// The folder's UID ceiling must lie above this.
    Ceiling(Arc<UserCell>, FolderId, u32),
    /// The ceiling of Dovecot's uidvalidity counter must lie above this.
    UidValidity(Arc<UserCell>, u32),
}

impl Need {
    /// The user whose call waits.
    pub fn cell(&self) -> Option<&Arc<UserCell>> {
        match self {
            Need::Users | Need::Room(..) => None,
            Need::Open(cell)
            | Need::Exists(cell)
            | Need::Load(cell, _)
            | Need::Restore(cell, _)
            | Need::SyncJournal(cell)
            | Need::Ceiling(cell, ..)
            | Need::UidValidity(cell, _)
            | Need::Staging(cell, ..) => Some(cell),
            Need::Publish(node)
            | Need::SyncLocal(node)
            | Need::Fetch(node)
            | Need::FetchExtent(node, _)
            | Need::Through(node, _)
            | Need::Stage(node, _) => Some(&node.cell),
        }
    }

    pub fn load(user: &User, folder: FolderId) -> Need {
        Need::Load(user.cell(), folder)
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Stop {
    Error(Error),
    Wait(Need),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Error(error)
    }
}

impl From<Plain> for Stop {
    fn from(plain: Plain) -> Stop {
        Stop::Error(plain.into())
    }
}

/// The outcome of a call under the user's lock.
pub type Op<T> = Result<T, Stop>;
