//! Directories and books are brought together: at the start, by a rescan, and by removing everything.

use super::books::{CacheKey, Known, charge};
use super::volume::{PART, Volume, hash_of};
use crate::cache::disk::{DiskEntry, How};
use crate::format::ObjectId;
use crate::format::key::{is_hashed_user_dir, parse_user_dir, user_dir};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a rescan found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rescanned {
    pub path: PathBuf,
    /// Bytes that the books said when it began, and say at its end.
    pub counted: u64,
    pub used: u64,
    pub files: u64,
    /// Bytes on the disk that the books lacked, and bytes in the books that were not on the disk.
    pub missed: u64,
    pub missing: u64,
    /// Files that lie there and are no copies; they count, and are left alone.
    pub strange_files: u64,
    pub strange_bytes: u64,
    /// Files older than was asked for.
    pub removed_files: u64,
    pub removed_bytes: u64,
}

impl Rescanned {
    /// Whether the books agreed with the directory.
    pub fn was_right(&self) -> bool {
        self.missed == 0 && self.missing == 0
    }

    /// By how much the books were too low; negative: too high.
    pub fn off_by(&self) -> i64 {
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        signed(self.missed) - signed(self.missing)
    }
}

/// What was removed at once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cleaned {
    pub path: PathBuf,
    pub files: u64,
    pub bytes: u64,
    /// Of these, what still counts because somebody reads it.
    pub open: u64,
}

/// A file that the books should know.
struct Found {
    key: CacheKey,
    len: u64,
    used: i64,
}

/// What lies below one `<hh>`.
#[derive(Default)]
struct Below {
    copies: Vec<Found>,
    empty: Vec<PathBuf>,
    /// Directories of users that nobody finds by their names.
    nameless: Vec<PathBuf>,
    strange: Vec<(PathBuf, u64)>,
}

/// What the books know below one `<hh>`.
#[derive(Default)]
struct Noted {
    owners: HashMap<PathBuf, Arc<str>>,
    keys: HashSet<CacheKey>,
}

impl Volume {
    /// Users' directories below one `<hh>`. `owners`: users whose directories are known.
    fn below(&self, hh: &DiskEntry, owners: &HashMap<PathBuf, Arc<str>>) -> io::Result<Below> {
        let mut below = Below::default();
        let above = self.dir.join(&hh.name);
        for user in self.disk.list(&above)? {
            let path = above.join(&user.name);
            if !user.is_dir {
                below.strange.push((path, charge(user.len, self.block)));
                continue;
            }
            let name = user.name.to_str().unwrap_or_default();
            let owner = owners.get(&path).cloned();
            if owner.is_none() && is_hashed_user_dir(name) {
                below.nameless.push(path);
                continue;
            }
            let named = || parse_user_dir(name).ok().filter(|n| self.dir.join(user_dir(n)) == path);
            let owner = owner.or_else(|| named().map(Arc::from));
            let files = self.disk.list(&path)?;
            if files.is_empty() {
                below.empty.push(path);
                continue;
            }
            for file in files {
                let id = file.name.to_str().and_then(|n| n.parse::<ObjectId>().ok());
                match (&owner, id) {
                    (Some(owner), Some(id)) if !file.is_dir => {
                        let key = (owner.clone(), id);
                        below.copies.push(Found { key, len: file.len, used: file.used });
                    }
                    _ => below.strange.push((path.join(&file.name), charge(file.len, self.block))),
                }
            }
        }
        Ok(below)
    }

    /// Removes what holds nothing, and what nobody finds.
    fn tidy(&self, below: &Below, above: &Path) -> io::Result<()> {
        for dir in &below.nameless {
            self.disk.remove_tree(dir)?;
        }
        for dir in &below.empty {
            self.remove_if_empty(dir);
        }
        self.remove_if_empty(above);
        Ok(())
    }

    /// Fills the books at the start. The latest used are taken for those that are used again; which
    /// they were is written nowhere.
    pub(super) fn load(&self, belongs: &dyn Fn(&str) -> bool) -> io::Result<()> {
        let mut found = Vec::new();
        let mut strange = 0;
        for hh in self.disk.list(&self.dir)?.into_iter().filter(|e| e.name != PART) {
            if !hh.is_dir {
                strange += charge(hh.len, self.block);
                continue;
            }
            let mut below = self.below(&hh, &HashMap::new())?;
            strange += below.strange.iter().map(|(_, bytes)| bytes).sum::<u64>();
            for copy in std::mem::take(&mut below.copies) {
                if belongs(&copy.key.0) {
                    found.push(copy);
                    continue;
                }
                // Left from when the users were split another way.
                let path = self.path(&copy.key);
                self.delete(&path);
                below.empty.extend(path.parent().map(Path::to_path_buf));
            }
            self.tidy(&below, &self.dir.join(&hh.name))?;
        }
        found.sort_by(|a, b| (a.used, &a.key).cmp(&(b.used, &b.key)));
        let users: HashSet<Arc<str>> = found.iter().map(|copy| copy.key.0.clone()).collect();
        {
            let mut books = self.books.lock();
            books.other = strange;
            let all: u64 = found.iter().map(|copy| charge(copy.len, self.block)).sum();
            let mut newer = all;
            for copy in found {
                let takes = charge(copy.len, self.block);
                let segment = books.segment_by_age(newer);
                newer -= takes;
                books.insert(copy.key, segment, false, Known::new(copy.len, takes, None));
            }
        }
        for user in users {
            self.measure_dirs(&user_dir(&user), &user)?;
        }
        self.shrink();
        Ok(())
    }

    /// Removes what exceeds the bound.
    fn shrink(&self) {
        let victims = self.books.lock().excess();
        for (key, bytes) in victims {
            self.unlink(&key, bytes);
        }
    }

    pub(super) fn rescan(&self, oldest: Option<i64>) -> io::Result<Rescanned> {
        let mut report = Rescanned { path: self.dir.clone(), ..Rescanned::default() };
        let (noted_other, keys) = {
            let books = self.books.lock();
            report.counted = books.total();
            (books.other, books.keys())
        };
        let mut known: BTreeMap<u8, Noted> = BTreeMap::new();
        for key in keys {
            let dir = user_dir(&key.0);
            let noted = known.entry(hash_of(&dir)).or_default();
            noted.owners.insert(self.dir.join(dir), key.0.clone());
            noted.keys.insert(key);
        }
        for entry in self.disk.list(&self.dir)? {
            if entry.name == PART {
                continue;
            }
            let hash = entry.name.to_str().filter(|n| n.len() == 2);
            match hash.and_then(|hh| u8::from_str_radix(hh, 16).ok()).filter(|_| entry.is_dir) {
                Some(hash) => {
                    let noted = known.remove(&hash).unwrap_or_default();
                    self.rescan_below(hash, Some(&entry), noted, oldest, &mut report)?;
                }
                None => {
                    report.strange_files += 1;
                    report.strange_bytes += charge(entry.len, self.block);
                }
            }
        }
        for (hash, noted) in known {
            self.rescan_below(hash, None, noted, oldest, &mut report)?;
        }
        self.rescan_parts(&mut report)?;
        {
            let mut books = self.books.lock();
            books.other = report.strange_bytes;
            report.missed += report.strange_bytes.saturating_sub(noted_other);
            report.missing += noted_other.saturating_sub(report.strange_bytes);
        }
        self.shrink();
        let books = self.books.lock();
        (report.used, report.files) = (books.total(), books.files() as u64);
        Ok(report)
    }

    /// One `<hh>`; nothing in it changes meanwhile but by hand.
    fn rescan_below(
        &self,
        hash: u8,
        entry: Option<&DiskEntry>,
        noted: Noted,
        oldest: Option<i64>,
        report: &mut Rescanned,
    ) -> io::Result<()> {
        let stripe = self.stripe(hash);
        let below = entry.map(|entry| self.below(entry, &noted.owners)).transpose()?;
        let below = below.unwrap_or_default();
        report.strange_files += below.strange.len() as u64;
        report.strange_bytes += below.strange.iter().map(|(_, bytes)| bytes).sum::<u64>();
        let mut gone = noted.keys;
        let mut users = HashSet::new();
        for copy in &below.copies {
            gone.remove(&copy.key);
            users.insert(copy.key.0.clone());
            self.settle(copy, report);
            if oldest.is_some_and(|oldest| self.written(&copy.key).is_some_and(|at| at < oldest)) {
                let bytes = self.books.lock().forget(&copy.key);
                if let Some(bytes) = bytes {
                    report.removed_files += 1;
                    report.removed_bytes += bytes;
                    self.unlink_in(&stripe, &user_dir(&copy.key.0), &copy.key, bytes);
                }
            }
        }
        for key in gone {
            let bytes = self.books.lock().forget(&key);
            if let Some(bytes) = bytes {
                report.missing += bytes;
                self.unlink_in(&stripe, &user_dir(&key.0), &key, bytes);
            }
        }
        if let Some(entry) = entry {
            self.tidy(&below, &self.dir.join(&entry.name))?;
        }
        for user in users {
            let dir = user_dir(&user);
            if self.disk.is_dir(&self.dir.join(&dir))? {
                self.measure_dirs(&dir, &user)?;
            }
        }
        Ok(())
    }

    /// A file that is there is in the books, with what it takes.
    fn settle(&self, copy: &Found, report: &mut Rescanned) {
        let takes = charge(copy.len, self.block);
        let mut books = self.books.lock();
        if books.is_leaving(&copy.key) {
            return;
        }
        let Some(known) = books.known(&copy.key) else {
            report.missed += takes;
            let segment = books.segment_by_age(u64::MAX);
            books.insert(copy.key.clone(), segment, false, Known::new(copy.len, takes, None));
            return;
        };
        // The file system may have said that it takes more.
        if known.size != copy.len {
            (known.size, known.stamp) = (copy.len, None);
            let noted = books.recount(&copy.key, takes).unwrap_or(takes);
            report.missed += takes.saturating_sub(noted);
            report.missing += noted.saturating_sub(takes);
        }
    }

    /// When a file was last written.
    fn written(&self, key: &CacheKey) -> Option<i64> {
        let file = self.disk.open(&self.path(key), How::Read).ok()?;
        file.stamp().ok().map(|(_, mtime, _)| mtime)
    }

    /// Files in the place for downloads that are of none.
    fn rescan_parts(&self, report: &mut Rescanned) -> io::Result<()> {
        let dir = self.dir.join(PART);
        for entry in self.disk.list(&dir)? {
            let number = entry.name.to_str().and_then(|n| n.parse::<u64>().ok());
            let ours = number.is_some_and(|number| self.parts.lock().contains(&number));
            if !ours && !entry.is_dir && self.delete(&dir.join(&entry.name)) {
                report.missed += charge(entry.len, self.block);
                report.removed_files += 1;
                report.removed_bytes += charge(entry.len, self.block);
            }
        }
        Ok(())
    }

    pub(super) fn clean(&self) -> Cleaned {
        let before = self.counters.unlinked();
        let victims = self.books.lock().everything();
        let mut report = Cleaned { path: self.dir.clone(), ..Cleaned::default() };
        for (key, bytes) in victims {
            if self.unlink(&key, bytes) {
                report.files += 1;
                report.bytes += bytes;
            }
        }
        report.open = self.counters.unlinked().saturating_sub(before);
        report
    }
}
