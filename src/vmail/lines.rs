//! The final meaning of a listing's lines, with names in the order of their first appearance.

use super::tree::NameBytes;
use crate::format::Sub;
use crate::format::listing::{Attrs, Entry, Line};
use hashbrown::HashTable;
use std::hash::{BuildHasher, RandomState};

/// The final meaning of lines, with names in the order of their first appearance.
#[derive(Default)]
pub(super) struct Final {
    pub(super) dirs: [Option<Attrs>; 4],
    pub(super) order: Vec<Option<(Sub, NameBytes, Entry)>>,
    /// Places in `order` by name.
    pub(super) at: HashTable<u32>,
    pub(super) hasher: RandomState,
}

impl Final {
    pub(super) fn len(&self) -> usize {
        self.at.len()
    }

    pub(super) fn apply(&mut self, line: Line) {
        match line {
            Line::Dir { sub, attrs } => self.dirs[sub as usize] = Some(attrs),
            Line::NoDir { sub } => self.dirs[sub as usize] = None,
            Line::Set { sub, name, entry } => self.set(sub, name.into(), entry),
            Line::Unset { sub, name } => self.unset(sub, &name),
        }
    }

    pub(super) fn set(&mut self, sub: Sub, name: NameBytes, entry: Entry) {
        let (order, hasher) = (&mut self.order, &self.hasher);
        let hash = hasher.hash_one((sub, &*name));
        let found = self.at.find(hash, |i| is_at(order, *i, sub, &name)).copied();
        if let Some(i) = found {
            order[i as usize] = Some((sub, name, entry));
            return;
        }
        order.push(Some((sub, name, entry)));
        // No listing has so many lines.
        let i = u32::try_from(order.len() - 1).unwrap_or(u32::MAX);
        self.at.insert_unique(hash, i, |i| match &order[*i as usize] {
            Some((sub, name, _)) => hasher.hash_one((*sub, &**name)),
            None => 0,
        });
    }

    pub(super) fn unset(&mut self, sub: Sub, name: &[u8]) {
        let order = &mut self.order;
        let hash = self.hasher.hash_one((sub, name));
        if let Ok(found) = self.at.find_entry(hash, |i| is_at(order, *i, sub, name)) {
            order[found.remove().0 as usize] = None;
        }
    }

    pub fn names(&self) -> impl Iterator<Item = (Sub, &NameBytes, &Entry)> {
        self.order.iter().flatten().map(|(sub, name, entry)| (*sub, name, entry))
    }

    pub(super) fn into_names(self) -> impl Iterator<Item = (Sub, NameBytes, Entry)> {
        self.order.into_iter().flatten()
    }

    pub(super) fn locals(
        &self,
        which: impl Fn(Sub, &[u8]) -> bool,
    ) -> Vec<(Sub, NameBytes, Entry)> {
        self.names()
            .filter(|(sub, name, entry)| matches!(entry, Entry::Local { .. }) && which(*sub, name))
            .map(|(sub, name, entry)| (sub, name.clone(), entry.clone()))
            .collect()
    }

    /// Local files of a kind are those given and no others.
    pub(super) fn restore_locals(
        &mut self,
        locals: Vec<(Sub, NameBytes, Entry)>,
        which: impl Fn(Sub, &[u8]) -> bool,
    ) {
        for (sub, name, _) in self.locals(which) {
            self.unset(sub, &name);
        }
        for (sub, name, entry) in locals {
            self.set(sub, name, entry);
        }
    }
}

pub(super) fn is_at(
    order: &[Option<(Sub, NameBytes, Entry)>],
    i: u32,
    sub: Sub,
    name: &[u8],
) -> bool {
    matches!(&order[i as usize], Some((s, n, _)) if *s == sub && **n == *name)
}
