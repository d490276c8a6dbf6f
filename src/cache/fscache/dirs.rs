//! The directories of a cache: how many files are in them, and what they take by themselves.

use std::collections::HashMap;
use std::sync::Arc;

/// A user's directory, or one of those above.
#[derive(Debug, Default)]
struct Dir {
    entries: u64,
    charge: u64,
}

#[derive(Debug, Default)]
pub(super) struct Dirs {
    users: HashMap<Arc<str>, Dir>,
    hashes: HashMap<u8, Dir>,
    bytes: u64,
}

impl Dirs {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn file_comes(&mut self, user: &Arc<str>) {
        self.users.entry(user.clone()).or_default().entries += 1;
    }

    /// Notes that a file is away; whether it was the user's last.
    pub(super) fn file_goes(&mut self, user: &Arc<str>) -> bool {
        let Some(dir) = self.users.get_mut(user) else { return false };
        dir.entries = dir.entries.saturating_sub(1);
        dir.entries == 0
    }

    /// What the directories of a user and its hash take.
    pub(super) fn measured(&mut self, user: &Arc<str>, hash: u8, own: u64, above: u64) {
        let users = self.hashes.entry(hash).or_default();
        self.bytes = self.bytes - users.charge + above;
        users.charge = above;
        let dir = self.users.entry(user.clone()).or_default();
        users.entries += u64::from(dir.charge == 0 && own > 0);
        self.bytes = self.bytes - dir.charge + own;
        dir.charge = own;
    }

    /// A user's directory is away; whether it was the last below its hash.
    pub(super) fn user_goes(&mut self, user: &Arc<str>, hash: u8) -> bool {
        let Some(dir) = self.users.remove(user) else { return false };
        self.bytes -= dir.charge;
        let Some(users) = self.hashes.get_mut(&hash) else { return false };
        users.entries = users.entries.saturating_sub(1);
        users.entries == 0
    }

    pub(super) fn hash_goes(&mut self, hash: u8) {
        if let Some(users) = self.hashes.remove(&hash) {
            self.bytes -= users.charge;
        }
    }
}
