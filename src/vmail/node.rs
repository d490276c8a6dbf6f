//! Nodes: what the names of a user stand for, with one node for all names of an object.

use crate::cache::disk::DiskFile;
use crate::cache::fscache::Cached;
use crate::cache::staging::Staged;
use crate::dovecot::classes::Class;
use crate::dovecot::index_log::LogTracker;
use crate::dovecot::uidlist::UidTracker;
use crate::format::key::KeyTail;
use crate::format::listing::{Attrs, Entry, Extent, Owner};
use crate::format::{ObjectId, Place, Timestamp};
use crate::fs::api::Ino;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Weak};

/// Index of a node in its user's slab.
pub type NodeIx = usize;

/// One name of a node: where, and its place in the directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name {
    pub at: Place,
    pub cookie: u64,
}

/// The names of a node that are in loaded folders. One is by far the commonest number, so it
/// takes no allocation.
#[derive(Debug, Clone, Default)]
pub enum Names {
    #[default]
    None,
    One(Name),
    Many(Box<Vec<Name>>),
}

impl Names {
    pub fn add(&mut self, name: Name) {
        *self = match std::mem::take(self) {
            Names::None => Names::One(name),
            Names::One(first) => Names::Many(Box::new(vec![first, name])),
            Names::Many(mut all) => {
                all.push(name);
                Names::Many(all)
            }
        };
    }

    pub fn remove(&mut self, name: Name) {
        *self = match std::mem::take(self) {
            Names::Many(mut all) => {
                all.retain(|n| *n != name);
                match all.as_slice() {
                    [] => Names::None,
                    [one] => Names::One(*one),
                    _ => Names::Many(all),
                }
            }
            Names::One(one) if one == name => Names::None,
            other => other,
        };
    }

    pub fn all(&self) -> &[Name] {
        match self {
            Names::None => &[],
            Names::One(name) => std::slice::from_ref(name),
            Names::Many(all) => all,
        }
    }

    pub fn first(&self) -> Option<Name> {
        self.all().first().copied()
    }
}

/// Which part of a local file changed since some part was made of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Since {
    /// The whole file counts as changed.
    pub whole: bool,
    /// Length that the earlier parts hold; everything beyond is new.
    pub base_len: u64,
    /// Changed blocks below `base_len`.
    pub blocks: BTreeSet<u64>,
}

impl Since {
    pub const BLOCK: u64 = 32 * 1024;

    pub fn everything() -> Since {
        Since { whole: true, ..Since::default() }
    }

    pub fn nothing(len: u64) -> Since {
        Since { whole: false, base_len: len, blocks: BTreeSet::new() }
    }

    pub fn wrote(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.base_len);
        if self.whole || offset >= end {
            return;
        }
        self.blocks.extend(offset / Since::BLOCK..=(end - 1) / Since::BLOCK);
    }

    pub fn cut_to(&mut self, len: u64) {
        if len < self.base_len {
            self.whole = true;
        }
    }

    /// How much of a file of this size changed.
    pub fn bytes_of(&self, size: u64) -> u64 {
        if self.whole {
            return size;
        }
        let blocks = self.blocks.len() as u64 * Since::BLOCK;
        size.saturating_sub(self.base_len).saturating_add(blocks).min(size)
    }

    /// Puts the changes of an earlier time before these.
    pub fn merge_older(&mut self, older: &Since) {
        if older.whole || self.whole {
            *self = Since::everything();
            return;
        }
        self.base_len = self.base_len.min(older.base_len);
        self.blocks.extend(&older.blocks);
        let limit = self.base_len.div_ceil(Since::BLOCK);
        self.blocks.retain(|b| *b < limit);
    }
}

/// What is known of the UIDs in a local file.
#[derive(Debug, Default)]
pub enum Tracker {
    #[default]
    None,
    UidList(Box<UidTracker>),
    Log(Box<LogTracker>),
}

impl Tracker {
    /// A write could not be followed.
    pub fn is_lost(&self) -> bool {
        match self {
            Tracker::None => false,
            Tracker::UidList(tracker) => tracker.is_lost(),
            Tracker::Log(tracker) => tracker.is_lost(),
        }
    }
}

/// A file of the metacache.
#[derive(Debug, Default)]
pub struct Local {
    /// Open while a handle is.
    pub file: Option<Arc<dyn DiskFile>>,
    pub since: Since,
    /// Whether the parts made so far hold this file under its name.
    pub shipped: bool,
    /// Counts changes inside what the file held already.
    pub inplace: u64,
    /// Counts writes, and the writes that are known to be on disk.
    pub writes: u64,
    pub synced: u64,
    /// A sync of it failed: what it shows may not be what the disk has, now or later.
    pub spoilt: bool,
    pub tracker: Tracker,
    /// The object that held its bytes at the last cut, if they were too many for a part.
    pub object: Option<ObjectId>,
    /// Not on the disk: the parts hold it as it is, and the next open brings it back.
    pub evicted: bool,
    /// What the books of the metacache have for it, and under which priority.
    pub charged: u64,
    pub charged_to: usize,
}

/// A mail: immutable once published, a staged file before that.
#[derive(Debug, Default)]
pub struct Mail {
    /// The published object; absent until the first publish.
    pub object: Option<KeyTail>,
    pub published_size: u64,
    /// Ids under which it was put, or may have been put; the latest last.
    pub attempts: Vec<ObjectId>,
    /// The bytes while they are written, and until they become the cached copy.
    pub staged: Option<Arc<Staged>>,
    /// Written since the last publish.
    pub dirty: bool,
    /// Counts changes, so that a publish knows whether what it put is still the content.
    pub writes: u64,
    /// A write from here on was refused: what is there is not what its writer meant, and is
    /// not published.
    pub refused: Option<u64>,
    /// The open cached copy.
    pub cached: Weak<Cached>,
    /// A copy that was fetched for an open that has not come back for it yet.
    pub fetched: Option<Arc<Cached>>,
    /// The cache has no room for it: it is streamed.
    pub through: bool,
    /// Its object is gone and it is shown blank, with so many bare line ends, until it is closed.
    pub blank: Option<u64>,
}

/// A file that grows by appending.
#[derive(Debug, Default)]
pub struct Growing {
    pub extents: Vec<Extent>,
    /// Bytes from `published` on, at their own offsets; below it are holes.
    pub tail: Option<Arc<Staged>>,
    /// Bytes below this are in extents.
    pub published: u64,
    pub dirty: bool,
    pub writes: u64,
    /// The last of those whose bytes are safe, with all before it.
    pub safe_writes: u64,
    /// Made under a temporary name, and not renamed yet.
    pub temporary: bool,
    /// Where the earliest write since the last publish began lies.
    pub lowest: u64,
    /// Cached copies of extents that were read lately, open while a handle is.
    pub open: HashMap<ObjectId, Arc<Cached>>,
    /// Extents that are streamed.
    pub through: HashSet<ObjectId>,
}

#[derive(Debug)]
pub enum Kind {
    Mail(Box<Mail>),
    /// A published mail that nobody has open, in the space of its key.
    Published(KeyTail),
    Growing(Box<Growing>),
    Local(Box<Local>),
    Symlink(Box<[u8]>),
}

#[derive(Debug)]
pub struct Node {
    pub ino: Ino,
    pub kind: Kind,
    pub class: Class,
    pub size: u64,
    pub mode: u32,
    pub owner: Option<Owner>,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub names: Names,
    /// How many names the object has in all folders, loaded or not.
    pub nlink: u32,
    /// Lookups the kernel has not forgotten.
    pub lookups: u64,
    pub handles: u32,
    /// Handles that may write.
    pub writers: u32,
}

impl Node {
    /// The objects that hold its bytes.
    pub fn objects(&self) -> Vec<&KeyTail> {
        match &self.kind {
            Kind::Growing(grow) => grow.extents.iter().map(|e| &e.object).collect(),
            _ => self.object().into_iter().collect(),
        }
    }

    pub fn attrs(&self) -> Attrs {
        Attrs { mode: self.mode, owner: self.owner, mtime: self.mtime }
    }

    pub fn object(&self) -> Option<&KeyTail> {
        match &self.kind {
            Kind::Mail(mail) => mail.object.as_ref(),
            Kind::Published(key) => Some(key),
            Kind::Growing(_) | Kind::Local(_) | Kind::Symlink(_) => None,
        }
    }

    /// What the journal and the listing say of it; `None` for what is not to be remembered:
    /// unpublished files, locks and temporary files.
    pub fn entry(&self) -> Option<Entry> {
        self.entry_as(self.class)
    }

    /// The same once it is of that class.
    pub fn entry_as(&self, class: Class) -> Option<Entry> {
        let attrs = self.attrs();
        match &self.kind {
            Kind::Published(object) => {
                Some(Entry::Mail { size: self.size, attrs, object: object.clone() })
            }
            Kind::Mail(mail) => {
                let object = mail.object.clone()?;
                Some(Entry::Mail { size: mail.published_size, attrs, object })
            }
            Kind::Growing(grow) => Some(Entry::Extents {
                size: grow.extents.last().map_or(0, |e| e.offset + e.len),
                attrs,
                extents: grow.extents.clone(),
            }),
            Kind::Local(_) if class.is_local_only() => None,
            Kind::Local(local) => {
                Some(Entry::Local { size: self.size, attrs, object: local.object })
            }
            Kind::Symlink(target) => Some(Entry::Symlink { target: target.to_vec(), attrs }),
        }
    }

    /// Whether nothing keeps it in memory.
    pub fn unused(&self) -> bool {
        self.names.all().is_empty() && self.lookups == 0 && self.handles == 0
    }
}
