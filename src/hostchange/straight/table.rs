//! What the kernel knows: a number for each file and directory, and an open descriptor of it.

use super::users::User;
use nix::sys::stat::FileStat;
use parking_lot::RwLock;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The number of the mount's root.
pub const ROOT: u64 = 1;
/// Numbers of our own, where the file's cannot be used.
const OWN: u64 = 1 << 62;
/// How many names the kernel is asked to forget at a time.
const BATCH: usize = 64;

/// Where something lies, as far as that matters.
#[derive(Debug, Clone, Default)]
pub struct Place {
    /// Its path, if it is the root or between the root and users.
    pub above: Option<Vec<Vec<u8>>>,
    pub user: Option<Arc<User>>,
    /// How many names of `index_dir` lead to it, if it is on that way.
    pub index: Option<usize>,
}

/// A file or directory that the kernel knows.
#[derive(Debug)]
pub struct Node {
    pub id: u64,
    /// In a user's local directory.
    pub local: bool,
    now: RwLock<(Arc<OwnedFd>, Place)>,
}

impl Node {
    pub fn fd(&self) -> Arc<OwnedFd> {
        self.now.read().0.clone()
    }

    pub fn place(&self) -> Place {
        self.now.read().1.clone()
    }
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    lookups: u64,
    key: Key,
    /// Where it was found last, and its turn to be forgotten.
    name: (u64, Vec<u8>),
    turn: u64,
}

type Key = (u64, u64);

/// See the module.
#[derive(Debug)]
pub struct Table {
    by_id: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    turns: BTreeMap<u64, u64>,
    next_turn: u64,
    next_own: u64,
}

impl Table {
    pub fn new(root: OwnedFd, stat: &FileStat) -> Table {
        let place = Place { above: Some(Vec::new()), ..Place::default() };
        let node = Node { id: ROOT, local: false, now: RwLock::new((Arc::new(root), place)) };
        let key = (stat.st_dev, stat.st_ino);
        let entry = Entry { node: Arc::new(node), lookups: 1, key, name: (0, Vec::new()), turn: 0 };
        Table {
            by_id: HashMap::from([(ROOT, entry)]),
            by_key: HashMap::from([(key, ROOT)]),
            turns: BTreeMap::new(),
            next_turn: 1,
            next_own: OWN,
        }
    }

    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    pub fn get(&self, id: u64) -> Option<Arc<Node>> {
        self.by_id.get(&id).map(|entry| entry.node.clone())
    }

    /// The kernel is told of a file: one lookup more. The newest descriptor counts, for a server
    /// may use the number of a file that is gone for another. Also returns the descriptor that
    /// is not needed any more, to be closed without a lock.
    pub fn found(
        &mut self,
        fd: OwnedFd,
        stat: &FileStat,
        place: Place,
        local: bool,
        name: (u64, Vec<u8>),
    ) -> (u64, Option<Arc<OwnedFd>>) {
        let key = (stat.st_dev, stat.st_ino);
        let turn = self.next_turn;
        self.next_turn += 1;
        if let Some(entry) = self.by_key.get(&key).and_then(|id| self.by_id.get_mut(id)) {
            let id = entry.node.id;
            entry.lookups += 1;
            if id == ROOT {
                return (id, Some(Arc::new(fd)));
            }
            entry.name = name;
            self.turns.remove(&std::mem::replace(&mut entry.turn, turn));
            self.turns.insert(turn, id);
            let old = std::mem::replace(&mut *entry.node.now.write(), (Arc::new(fd), place));
            return (id, Some(old.0));
        }
        // What the file is numbered on the server, where that is no number of ours.
        let usable = !local && stat.st_ino > ROOT && stat.st_ino < OWN;
        let id = if usable && !self.by_id.contains_key(&stat.st_ino) {
            stat.st_ino
        } else {
            self.next_own += 1;
            self.next_own
        };
        let node = Arc::new(Node { id, local, now: RwLock::new((Arc::new(fd), place)) });
        self.by_id.insert(id, Entry { node, lookups: 1, key, name, turn });
        self.by_key.insert(key, id);
        self.turns.insert(turn, id);
        (id, None)
    }

    /// The kernel forgets so many lookups. Returns what is not needed any more.
    pub fn forget(&mut self, id: u64, lookups: u64) -> Option<Arc<Node>> {
        let entry = self.by_id.get_mut(&id).filter(|_| id != ROOT)?;
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups > 0 {
            return None;
        }
        let entry = self.by_id.remove(&id)?;
        self.by_key.remove(&entry.key);
        self.turns.remove(&entry.turn);
        Some(entry.node)
    }

    /// Some names of what was found longest ago, if more than `most` are known. They get another
    /// turn, for the kernel may be using them.
    pub fn oldest_beyond(&mut self, most: usize) -> Vec<(u64, Vec<u8>)> {
        if self.by_id.len() <= most {
            return Vec::new();
        }
        let mut names = Vec::new();
        for _ in 0..BATCH {
            let Some((_, id)) = self.turns.pop_first() else { break };
            let turn = self.next_turn;
            self.next_turn += 1;
            if let Some(entry) = self.by_id.get_mut(&id) {
                entry.turn = turn;
                self.turns.insert(turn, id);
                names.push(entry.name.clone());
            }
        }
        names
    }
}
