//! Listings of a directory store. A file system gives names in no order, and shows what is no object.

use super::dir::Inner;
use super::dir_io::{is_missing, plain};
use super::key::{check_key, join, name_after};
use super::{ObjectMeta, StoreResult};
use std::collections::BinaryHeap;
use std::fs::{DirEntry, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;

/// What a listing tells of a name; `None` for what is no file, or gone by now.
fn object_at(
    key: String,
    stat: io::Result<Metadata>,
    dir: &str,
) -> StoreResult<Option<ObjectMeta>> {
    match stat {
        Ok(stat) if stat.is_file() => Ok(Some(ObjectMeta {
            key,
            size: stat.size(),
            etag: None,
            modified: Some(stat.mtime()),
            metadata: Vec::new(),
        })),
        Ok(_) => Ok(None),
        Err(e) if is_missing(&e) => Ok(None),
        Err(e) => Err(plain(e, dir)),
    }
}

impl Inner {
    /// The entries of a directory; none if it is missing while the root is there.
    fn entries(&self, dir: &str) -> StoreResult<Vec<(String, DirEntry)>> {
        let mut found = Vec::new();
        self.each_entry(dir, |name, entry| found.push((name, entry)))?;
        Ok(found)
    }

    /// All names in a directory that may be keys.
    fn each_entry(&self, dir: &str, mut each: impl FnMut(String, DirEntry)) -> StoreResult<()> {
        let path = self.dir_path(dir)?;
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if is_missing(&e) => {
                self.root.check()?;
                return Ok(());
            }
            Err(e) => return Err(plain(e, dir)),
        };
        let mut empty = true;
        for entry in entries {
            let entry = entry.map_err(|e| plain(e, dir))?;
            // What is not ours: names that are no keys, deleted files that NFS still holds.
            if let Ok(name) = entry.file_name().into_string()
                && check_key(&name).is_ok()
                && !name.starts_with(".nfs")
                && !(dir.is_empty() && name.starts_with('.'))
            {
                empty = false;
                each(name, entry);
            }
        }
        if empty {
            self.root.check()?;
        }
        Ok(())
    }

    /// The first names are kept while all are read: a file system gives them in no order.
    pub(super) fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let after = name_after(dir, start_after)?.unwrap_or("");
        let mut from = after.to_owned();
        let mut objects = Vec::new();
        loop {
            let mut first = BinaryHeap::new();
            self.each_entry(dir, |name, _| {
                let full = first.len() == most;
                if *name <= *from || full && first.peek().is_none_or(|last| name >= *last) {
                    return;
                }
                if full {
                    first.pop();
                }
                first.push(name);
            })?;
            let names = first.into_sorted_vec();
            let all = names.len() < most;
            from = names.last().cloned().unwrap_or(from);
            for name in names {
                let path = self.dir_path(dir)?.join(&name);
                objects.extend(object_at(join(dir, &name), path.symlink_metadata(), dir)?);
            }
            // Some may have been directories, or were just removed.
            if all || objects.len() >= most {
                objects.truncate(most);
                return Ok(objects);
            }
        }
    }

    pub(super) fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let after = name_after(dir, start_after)?.unwrap_or("");
        let mut objects = Vec::new();
        for (name, entry) in self.entries(dir)? {
            if name.as_str() <= after {
                continue;
            }
            objects.extend(object_at(join(dir, &name), entry.metadata(), dir)?);
        }
        objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    pub(super) fn list_dirs(&self, dir: &str) -> StoreResult<Vec<String>> {
        let mut names = Vec::new();
        for (name, entry) in self.entries(dir)? {
            if entry.file_type().map_err(|e| plain(e, dir))?.is_dir() {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}
