//! Attributes as `stat` shows them, from what is stored and what this mount was told to show.

use super::api::{Attr, FileKind};
use crate::format::Place;
use crate::format::Timestamp;
use crate::format::listing::Owner;
use crate::vmail::node::{Kind, Node};
use crate::vmail::session::{Session, UserCell};
use crate::vmail::tree::Dir;
use crate::vmail::user::User;

/// Attributes of a file.
pub fn of_node(user: &User, node: &Node) -> Attr {
    let shown = &user.session.settings;
    let owner = shown.owner.unwrap_or_else(|| node.owner.unwrap_or(user.owner));
    let kind = match node.kind {
        Kind::Symlink(_) => FileKind::Symlink,
        Kind::Mail(_) | Kind::Published(_) | Kind::Growing(_) | Kind::Local(_) => FileKind::Regular,
    };
    Attr {
        ino: node.ino,
        kind,
        size: node.size,
        mode: node.mode,
        nlink: node.nlink,
        uid: owner.uid,
        gid: owner.gid,
        atime: node.mtime,
        mtime: node.mtime,
        ctime: node.ctime,
        cacheable: true,
    }
}

/// Attributes of a directory below a user's root, or of the root of a user that is open.
pub fn of_dir(user: &User, at: Place, dir: &Dir) -> Attr {
    let shown = &user.session.settings;
    let stored = dir.owner.unwrap_or(user.owner);
    let (owner, mode) = match (at == Place::ROOT, shown.root_owner) {
        (true, Some(owner)) => (owner, shown.root_mode),
        (true, None) => (stored, dir.mode),
        (false, _) => (shown.owner.unwrap_or(stored), dir.mode),
    };
    directory(dir.ino, owner, mode, dir.mtime, dir.ctime)
}

/// The root of a user that is not open: what the mount was told, and nothing for long.
pub fn of_closed_root(cell: &UserCell) -> Attr {
    let shown = &cell.session.settings;
    let made = cell.root.lock().maker;
    let (owner, mode) = match (shown.root_owner, made) {
        (Some(owner), _) => (owner, shown.root_mode),
        (None, Some(made)) => made,
        (None, None) => (Owner { uid: 0, gid: 0 }, shown.root_mode),
    };
    let epoch = Timestamp::default();
    Attr { cacheable: false, ..directory(cell.ino, owner, mode, epoch, epoch) }
}

/// A directory above the users' level.
pub fn above(session: &Session, ino: u64) -> Attr {
    let shown = &session.settings;
    let owner = shown.root_owner.unwrap_or(Owner { uid: 0, gid: 0 });
    let epoch = Timestamp::default();
    directory(ino, owner, shown.root_mode, epoch, epoch)
}

fn directory(ino: u64, owner: Owner, mode: u32, mtime: Timestamp, ctime: Timestamp) -> Attr {
    Attr {
        ino,
        kind: FileKind::Directory,
        size: 4096,
        mode,
        // Subdirectories are not counted; programs that rely on the count stop doing so at 1.
        nlink: 1,
        uid: owner.uid,
        gid: owner.gid,
        atime: mtime,
        mtime,
        ctime,
        cacheable: true,
    }
}
