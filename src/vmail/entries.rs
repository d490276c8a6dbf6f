//! The names of a directory.
//!
//! Each has a cookie: a number that only grows, by which a readdir goes on where it stopped,
//! whatever happened in between. A folder may hold a hundred thousand names, and all of them
//! are in memory while it is loaded, so they take little: one row for each, in the order of
//! their cookies, and a table of row numbers to find them by name. A name that goes leaves a
//! gap; when half of the rows are gaps they are closed, which no cookie notices.

use super::tree::{NameBytes, Target};
use hashbrown::HashTable;
use std::hash::{BuildHasher, RandomState};

/// First cookie of a name; smaller ones are `.` and `..`.
pub const FIRST_COOKIE: u64 = 3;
/// Gaps that are not worth closing.
const FEW: usize = 64;

#[derive(Debug)]
struct Row {
    cookie: u64,
    /// `None`: a gap.
    name: Option<NameBytes>,
    target: Target,
}

#[derive(Debug, Default)]
pub struct Entries {
    rows: Vec<Row>,
    by_name: HashTable<u32>,
    hasher: RandomState,
    last: u64,
}

impl Entries {
    fn find(&self, name: &[u8]) -> Option<usize> {
        let same = |row: &u32| self.rows[*row as usize].name.as_deref() == Some(name);
        self.by_name.find(self.hasher.hash_one(name), same).map(|row| *row as usize)
    }

    /// The row of a cookie, or the first one after it.
    fn row_from(&self, cookie: u64) -> usize {
        self.rows.partition_point(|row| row.cookie < cookie)
    }

    pub fn get(&self, name: &[u8]) -> Option<(u64, Target)> {
        self.find(name).map(|row| (self.rows[row].cookie, self.rows[row].target))
    }

    /// Adds a name that is not there.
    pub fn insert(&mut self, name: NameBytes, target: Target) -> u64 {
        self.last = self.last.max(FIRST_COOKIE - 1) + 1;
        let cookie = self.last;
        let hash = self.hasher.hash_one(&*name);
        self.rows.push(Row { cookie, name: Some(name), target });
        self.index(hash, self.rows.len() - 1);
        cookie
    }

    fn index(&mut self, hash: u64, row: usize) {
        let (rows, hasher) = (&self.rows, &self.hasher);
        let again = |row: &u32| hasher.hash_one(rows[*row as usize].name.as_deref().unwrap_or(&[]));
        // A listing has fewer lines than this.
        self.by_name.insert_unique(hash, u32::try_from(row).unwrap_or(u32::MAX), again);
    }

    /// Takes a name out of the table; its row stays.
    fn unindex(&mut self, name: &[u8]) -> Option<usize> {
        let rows = &self.rows;
        let same = |row: &u32| rows[*row as usize].name.as_deref() == Some(name);
        let found = self.by_name.find_entry(self.hasher.hash_one(name), same).ok()?;
        Some(found.remove().0 as usize)
    }

    pub fn remove(&mut self, name: &[u8]) -> Option<(u64, Target)> {
        let row = self.unindex(name)?;
        self.rows[row].name = None;
        let gone = (self.rows[row].cookie, self.rows[row].target);
        let gaps = self.rows.len() - self.by_name.len();
        if gaps > FEW && gaps > self.rows.len() / 2 {
            self.close_gaps();
        }
        Some(gone)
    }

    fn close_gaps(&mut self) {
        self.rows.retain(|row| row.name.is_some());
        self.rows.shrink_to_fit();
        self.by_name = HashTable::with_capacity(self.rows.len());
        for row in 0..self.rows.len() {
            let hash = self.hasher.hash_one(self.rows[row].name.as_deref().unwrap_or(&[]));
            self.index(hash, row);
        }
    }

    /// A new name for an entry, which keeps its place; the new name must not be there.
    pub fn rename(&mut self, name: &[u8], new_name: NameBytes) -> Option<u64> {
        let row = self.unindex(name)?;
        let hash = self.hasher.hash_one(&*new_name);
        self.rows[row].name = Some(new_name);
        self.index(hash, row);
        Some(self.rows[row].cookie)
    }

    pub fn retarget(&mut self, name: &[u8], target: Target) {
        if let Some(row) = self.find(name) {
            self.rows[row].target = target;
        }
    }

    pub fn name_of(&self, cookie: u64) -> Option<&NameBytes> {
        let row = self.rows.get(self.row_from(cookie))?;
        row.name.as_ref().filter(|_| row.cookie == cookie)
    }

    /// Entries in order, those after `cookie`.
    pub fn after(&self, cookie: u64) -> impl Iterator<Item = (u64, &NameBytes, Target)> {
        let from = self.row_from(cookie.saturating_add(1));
        self.rows[from..].iter().filter_map(|r| Some((r.cookie, r.name.as_ref()?, r.target)))
    }

    /// Entries in the opposite order, those before `cookie`.
    pub fn before(&self, cookie: u64) -> impl Iterator<Item = (u64, &NameBytes, Target)> {
        let to = self.row_from(cookie);
        self.rows[..to].iter().rev().filter_map(|r| Some((r.cookie, r.name.as_ref()?, r.target)))
    }

    /// How many rows two cookies are apart, names and gaps.
    pub fn between(&self, one: u64, other: u64) -> u64 {
        self.row_from(one).abs_diff(self.row_from(other)) as u64
    }

    /// The cookie of the name that was added last.
    pub fn end(&self) -> u64 {
        self.last
    }

    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn name(n: u64) -> NameBytes {
        n.to_string().as_bytes().into()
    }

    fn names(entries: &Entries) -> Vec<(u64, NameBytes)> {
        entries.after(0).map(|(cookie, name, _)| (cookie, name.clone())).collect()
    }

    #[test]
    fn a_renamed_name_keeps_its_place() {
        let mut entries = Entries::default();
        for n in 0..3 {
            assert_eq!(entries.insert(name(n), Target::Node(n as usize)), FIRST_COOKIE + n);
        }
        assert_eq!(entries.rename(b"1", name(7)), Some(FIRST_COOKIE + 1));
        assert_eq!(entries.get(b"1"), None);
        assert_eq!(entries.get(b"7"), Some((FIRST_COOKIE + 1, Target::Node(1))));
        assert_eq!(entries.name_of(FIRST_COOKIE + 1), Some(&name(7)));
        let order: Vec<_> = names(&entries).into_iter().map(|(_, n)| n).collect();
        assert_eq!(order, [name(0), name(7), name(2)]);
        entries.retarget(b"7", Target::Node(9));
        assert_eq!(entries.get(b"7").unwrap().1, Target::Node(9));
    }

    #[test]
    fn cookies_outlive_the_closing_of_gaps_and_are_not_given_again() {
        let mut entries = Entries::default();
        let mut model = BTreeMap::new();
        for n in 0..1000 {
            model.insert(entries.insert(name(n), Target::Node(0)), name(n));
        }
        for n in (0..1000).filter(|n| n % 7 != 0) {
            let (cookie, _) = entries.remove(name(n).as_ref()).unwrap();
            assert_eq!(model.remove(&cookie), Some(name(n)));
            assert_eq!(entries.name_of(cookie), None);
        }
        assert!(entries.rows.len() < 500);
        assert_eq!(entries.len(), model.len());
        assert_eq!(names(&entries), model.clone().into_iter().collect::<Vec<_>>());
        // A reader that stopped at a name that is gone goes on behind it.
        assert_eq!(entries.after(500).next().unwrap().0, *model.range(501..).next().unwrap().0);
        for (cookie, name) in &model {
            assert_eq!(entries.name_of(*cookie), Some(name));
            assert_eq!(entries.get(name).unwrap().0, *cookie);
        }
        assert_eq!(entries.insert(name(5), Target::Node(0)), FIRST_COOKIE + 1000);
        assert_eq!(entries.remove(b"none"), None);
    }
}
