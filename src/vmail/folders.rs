//! Folders: made and removed. Maildir's `cur`, `new` and `tmp` are parts of their folder.

use super::error::Plain;
use super::names::{check_name, line};
use super::need::{Need, Op, Stop};
use super::tree::{Dir, Folder, MAX_DEPTH, Target};
use super::user::User;
use crate::format::journal::Change;
use crate::format::listing::{Attrs, Line};
use crate::format::{FolderId, Place, Sub};
use crate::fs::api::Caller;

impl User {
    pub(super) fn remove_folder(&mut self, at: Place, name: &[u8], id: FolderId) {
        if let Some(dir) = self.tree.dir_mut(at) {
            dir.entries.remove(name);
        }
        if let Some(folder) = self.tree.folders.remove(&id) {
            let snapshot = self.state_dir.join("listing").join(id.to_string());
            if let Err(error) = self.session.env.disk.remove_file(&snapshot)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "snapshot of a removed folder not removed");
            }
            for (_, dir) in folder.dirs() {
                if dir.lookups == 0 {
                    self.session.forget_ino(dir.ino);
                }
            }
        }
    }

    pub fn mkdir(&mut self, caller: Caller, at: Place, name: &[u8], mode: u32) -> Op<Target> {
        check_name(name)?;
        self.may_write()?;
        if self.target(at, name)?.is_some() {
            return Err(Plain::Exists.into());
        }
        self.room_for_name()?;
        if self.tree.depth(at) + 1 > MAX_DEPTH {
            return Err(Plain::NameTooLong.into());
        }
        let now = self.now();
        let owner = self.new_owner(at, caller);
        let inherited = self.tree.dir(at).map_or(0, |d| d.mode & 0o2000);
        let attrs = Attrs { mode: (mode & 0o7777) | inherited, owner, mtime: now };
        let touch = self.touch_line(at, now);
        let ino = self.session.new_ino();
        let sub = if at.sub == Sub::Own { Sub::from_name(name) } else { None };
        let target = match sub {
            Some(sub) => {
                let mut changes = vec![line(at, Line::Dir { sub, attrs })];
                changes.extend(touch);
                self.commit(changes)?;
                if let Some(folder) = self.tree.folders.get_mut(&at.folder) {
                    folder.set_dir(sub, Some(Dir::new(ino, attrs)));
                }
                Target::Sub(sub)
            }
            None => {
                let id = self.session.new_folder_id();
                let mut changes = vec![
                    Change::Folder { id, parent: at, name: name.to_vec() },
                    Change::Line { folder: id, line: Line::Dir { sub: Sub::Own, attrs } },
                ];
                changes.extend(touch);
                self.commit(changes)?;
                let mut folder = Folder::new(id, at, name);
                folder.loaded = true;
                folder.unflushed.dirs.insert(Sub::Own);
                folder.set_dir(Sub::Own, Some(Dir::new(ino, attrs)));
                self.tree.folders.insert(id, folder);
                Target::Folder(id)
            }
        };
        if let Some(dir) = self.tree.dir_mut(at) {
            dir.entries.insert(name.into(), target);
        }
        self.touch(at, now);
        self.urgent();
        Ok(target)
    }

    /// A folder may go when it is loaded and nothing is in it.
    pub(super) fn check_empty(&self, id: FolderId) -> Op<()> {
        let folder = self.tree.folders.get(&id).ok_or(Plain::NotFound)?;
        if !folder.loaded {
            return Err(Stop::Wait(Need::load(self, id)));
        }
        if folder.dirs().any(|(_, dir)| !dir.entries.is_empty()) {
            return Err(Plain::NotEmpty.into());
        }
        Ok(())
    }

    pub fn rmdir(&mut self, at: Place, name: &[u8]) -> Op<()> {
        self.may_write()?;
        let now = self.now();
        let touch = self.touch_line(at, now);
        match self.target(at, name)?.ok_or(Plain::NotFound)? {
            Target::Node(_) => return Err(Plain::NotDir.into()),
            Target::Sub(sub) => {
                let place = Place { folder: at.folder, sub };
                if self.tree.dir(place).is_some_and(|d| !d.entries.is_empty()) {
                    return Err(Plain::NotEmpty.into());
                }
                let mut changes = vec![line(at, Line::NoDir { sub })];
                changes.extend(touch);
                self.commit(changes)?;
                self.remove_cache_dir(place);
                if let Some(dir) = self.tree.dir_mut(at) {
                    dir.entries.remove(name);
                }
                if let Some(folder) = self.tree.folders.get_mut(&at.folder)
                    && let Some(dir) = folder.set_dir(sub, None)
                {
                    self.session.forget_ino(dir.ino);
                }
            }
            Target::Folder(id) => {
                self.check_empty(id)?;
                let mut changes = vec![Change::NoFolder { id }];
                changes.extend(touch);
                self.commit(changes)?;
                self.remove_cache_dir(Place::own(id));
                self.remove_folder(at, name, id);
            }
        }
        self.touch(at, now);
        self.urgent();
        Ok(())
    }

    pub(super) fn remove_cache_dir(&self, at: Place) {
        let path = self.cache_path(at);
        if let Err(error) = self.drop_cache_dir(&path) {
            // What is left there is named by no listing and goes at the next load.
            tracing::warn!(%error, path = %path.display(), "metacache directory not removed");
        }
    }
}
