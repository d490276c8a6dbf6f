//! The entries of a directory as the kernel reads them.

use super::above::ROOT;
use super::api::{DirEntry, FileKind};
use crate::format::{Place, Sub};
use crate::vmail::error::Plain;
use crate::vmail::need::Op;
use crate::vmail::node::Kind;
use crate::vmail::tree::Target;
use crate::vmail::user::User;
use std::ops::RangeInclusive;

/// Entries after the first cookie up to the last.
pub(super) fn emit_entries(
    user: &User,
    at: Place,
    cookies: RangeInclusive<u64>,
    emit: &mut dyn FnMut(&DirEntry) -> bool,
) -> Op<()> {
    let cookie = *cookies.start();
    let dir = user.tree.dir(at).ok_or(Plain::NotFound)?;
    let above = match at.sub {
        Sub::Own => user.tree.folders.get(&at.folder).map(|f| f.parent),
        _ => Some(Place::own(at.folder)),
    };
    let parent = above.and_then(|p| user.tree.dir(p)).map_or(ROOT, |d| d.ino);
    let parent = if at == Place::ROOT { ROOT } else { parent };
    for (number, name, ino) in [(1, ".", dir.ino), (2, "..", parent)] {
        let entry = DirEntry { ino, name: name.into(), kind: FileKind::Directory, cookie: number };
        if cookie < number && !emit(&entry) {
            return Ok(());
        }
    }
    let listed = dir.entries.after(cookie.max(2));
    for (number, name, target) in listed.take_while(|(number, _, _)| number <= cookies.end()) {
        let (ino, kind) = match target {
            Target::Node(ix) => {
                let node = user.node(ix)?;
                let link = matches!(node.kind, Kind::Symlink(_));
                (node.ino, if link { FileKind::Symlink } else { FileKind::Regular })
            }
            Target::Folder(id) => {
                (user.tree.dir(Place::own(id)).map_or(1, |d| d.ino), FileKind::Directory)
            }
            Target::Sub(sub) => {
                let place = Place { folder: at.folder, sub };
                (user.tree.dir(place).map_or(1, |d| d.ino), FileKind::Directory)
            }
        };
        let entry = DirEntry { ino, name: name.to_vec(), kind, cookie: number };
        if !emit(&entry) {
            break;
        }
    }
    Ok(())
}
