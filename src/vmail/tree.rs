//! A user's tree in memory: folders, their directories, names and nodes.
//!
//! A folder is a directory with an id. Maildir's `cur`, `new` and `tmp` belong to the folder
//! they lie in ([`Sub`]). A folder that is not loaded knows its child folders (they are in the
//! head) but none of its other names.

use super::node::{Kind, Name, Node, NodeIx};
use crate::format::head::PartRef;
use crate::format::listing::{Attrs, Line, Owner};
use crate::format::{FolderId, ObjectId, Place, Sub, Timestamp};
use crate::fs::api::Ino;
use crate::vmail::node::Since;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

pub type NameBytes = Arc<[u8]>;

/// What a name leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Node(NodeIx),
    Folder(FolderId),
    Sub(Sub),
}

pub use super::entries::{Entries, FIRST_COOKIE};

/// A directory.
#[derive(Debug)]
pub struct Dir {
    pub ino: Ino,
    pub mode: u32,
    pub owner: Option<Owner>,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub entries: Entries,
    pub lookups: u64,
    pub handles: u32,
    /// How somebody reads its mails, while not all of them are here.
    pub walk: Option<Box<super::ahead::Walk>>,
}

impl Dir {
    pub fn new(ino: Ino, attrs: Attrs) -> Dir {
        Dir {
            ino,
            mode: attrs.mode,
            owner: attrs.owner,
            mtime: attrs.mtime,
            ctime: attrs.mtime,
            entries: Entries::default(),
            lookups: 0,
            handles: 0,
            walk: None,
        }
    }

    pub fn attrs(&self) -> Attrs {
        Attrs { mode: self.mode, owner: self.owner, mtime: self.mtime }
    }

    /// A change at `now`: the mtime always grows, or Dovecot would not look.
    pub fn touch(&mut self, now: Timestamp) {
        self.mtime = self.mtime.next().max(now);
        self.ctime = self.mtime;
    }
}

/// What a part on top of the base holds: needed to fold it into the next one.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    pub names: HashSet<(Sub, NameBytes)>,
    pub members: HashMap<(Sub, NameBytes), Since>,
}

/// Changes of a folder that no part holds yet.
#[derive(Debug, Clone, Default)]
pub struct Unflushed {
    pub names: HashSet<(Sub, NameBytes)>,
    /// Attributes of these directories changed, or they came or went.
    pub dirs: HashSet<Sub>,
}

impl Unflushed {
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.dirs.is_empty()
    }

    pub fn merge(&mut self, other: Unflushed) {
        self.names.extend(other.names);
        self.dirs.extend(other.dirs);
    }
}

#[derive(Debug)]
pub struct Folder {
    pub id: FolderId,
    /// Where it lies; the root's is itself.
    pub parent: Place,
    pub name: NameBytes,
    pub loaded: bool,
    dirs: [Option<Box<Dir>>; 4],
    /// Lines of the journal to put on top of what the parts say, for a folder not loaded.
    pub pending: Vec<Line>,
    pub parts: Vec<PartRef>,
    /// One for each part after the base; `None` where what it holds is not known any more.
    pub layers: Vec<Option<Layer>>,
    pub unflushed: Unflushed,
    /// Of these names, those whose last note in the journal is from before a cut whose head may hold
    /// although its flush failed. Who goes on from that head takes them for flushed.
    pub unnoted: HashSet<(Sub, NameBytes)>,
    /// The largest next-UID that was seen.
    pub next_uid: Option<u32>,
    /// What the head allows it to reach.
    pub uid_ceiling: Option<u32>,
    /// UIDs below this may have been given by a session whose changes are lost.
    pub burnt_below: Option<u32>,
    /// Some mail in it has only a temporary name, as the head says.
    pub unfinished: bool,
    /// Whether its snapshot on the local disk is older than what is in memory.
    pub snapshot_stale: bool,
    /// How soon its files are wanted, once that was looked at.
    pub priority: Option<u8>,
}

impl Folder {
    pub fn new(id: FolderId, parent: Place, name: &[u8]) -> Folder {
        Folder {
            id,
            parent,
            name: name.into(),
            loaded: false,
            dirs: [None, None, None, None],
            pending: Vec::new(),
            parts: Vec::new(),
            layers: Vec::new(),
            unflushed: Unflushed::default(),
            unnoted: HashSet::new(),
            next_uid: None,
            uid_ceiling: None,
            burnt_below: None,
            unfinished: false,
            snapshot_stale: true,
            priority: None,
        }
    }

    pub fn dir(&self, sub: Sub) -> Option<&Dir> {
        self.dirs[sub as usize].as_deref()
    }

    pub fn dir_mut(&mut self, sub: Sub) -> Option<&mut Dir> {
        self.dirs[sub as usize].as_deref_mut()
    }

    pub fn set_dir(&mut self, sub: Sub, dir: Option<Dir>) -> Option<Box<Dir>> {
        std::mem::replace(&mut self.dirs[sub as usize], dir.map(Box::new))
    }

    pub fn dirs(&self) -> impl Iterator<Item = (Sub, &Dir)> {
        Sub::ALL.into_iter().filter_map(|sub| self.dir(sub).map(|d| (sub, d)))
    }
}

/// A slab of nodes: indices are reused, so they must not outlive what they are looked up by.
#[derive(Debug, Default)]
pub struct Nodes {
    slots: Vec<Option<Node>>,
    free: Vec<NodeIx>,
}

impl Nodes {
    pub fn add(&mut self, node: Node) -> NodeIx {
        match self.free.pop() {
            Some(ix) => {
                self.slots[ix] = Some(node);
                ix
            }
            None => {
                self.slots.push(Some(node));
                self.slots.len() - 1
            }
        }
    }

    pub fn get(&self, ix: NodeIx) -> Option<&Node> {
        self.slots.get(ix)?.as_ref()
    }

    pub fn get_mut(&mut self, ix: NodeIx) -> Option<&mut Node> {
        self.slots.get_mut(ix)?.as_mut()
    }

    pub fn remove(&mut self, ix: NodeIx) -> Option<Node> {
        let node = self.slots.get_mut(ix)?.take()?;
        self.free.push(ix);
        Some(node)
    }

    pub fn iter(&self) -> impl Iterator<Item = (NodeIx, &Node)> {
        self.slots.iter().enumerate().filter_map(|(ix, n)| n.as_ref().map(|n| (ix, n)))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (NodeIx, &mut Node)> {
        self.slots.iter_mut().enumerate().filter_map(|(ix, n)| n.as_mut().map(|n| (ix, n)))
    }
}

#[derive(Debug, Default)]
pub struct Tree {
    pub folders: HashMap<FolderId, Folder>,
    pub nodes: Nodes,
    /// Objects with more than one name, and how many.
    pub links: HashMap<ObjectId, u32>,
    /// Nodes of those objects that are in memory.
    pub shared: HashMap<ObjectId, NodeIx>,
}

impl Tree {
    pub fn dir(&self, at: Place) -> Option<&Dir> {
        self.folders.get(&at.folder)?.dir(at.sub)
    }

    pub fn dir_mut(&mut self, at: Place) -> Option<&mut Dir> {
        self.folders.get_mut(&at.folder)?.dir_mut(at.sub)
    }

    pub fn name_bytes(&self, name: Name) -> Option<&NameBytes> {
        self.dir(name.at)?.entries.name_of(name.cookie)
    }

    /// Gives a node a name that is free.
    pub fn attach(&mut self, at: Place, name: NameBytes, ix: NodeIx) {
        let Some(dir) = self.dir_mut(at) else { return };
        let cookie = dir.entries.insert(name, Target::Node(ix));
        if let Some(node) = self.nodes.get_mut(ix) {
            node.names.add(Name { at, cookie });
        }
    }

    /// Takes a name from its node and returns the node; its `nlink` is the caller's business.
    pub fn detach(&mut self, at: Place, name: &[u8]) -> Option<NodeIx> {
        let dir = self.dir_mut(at)?;
        let Some((_, Target::Node(_))) = dir.entries.get(name) else { return None };
        let (cookie, Target::Node(ix)) = dir.entries.remove(name)? else { return None };
        if let Some(node) = self.nodes.get_mut(ix) {
            node.names.remove(Name { at, cookie });
        }
        Some(ix)
    }

    /// Lets a name that is there stand for something else, which no longer counts its old place.
    pub fn retarget(&mut self, at: Place, name: &[u8], target: Target) {
        let Some(dir) = self.dir_mut(at) else { return };
        let Some((cookie, old)) = dir.entries.get(name) else { return };
        dir.entries.retarget(name, target);
        let place = Name { at, cookie };
        if let Target::Node(ix) = old
            && let Some(node) = self.nodes.get_mut(ix)
        {
            node.names.remove(place);
        }
        match target {
            Target::Node(ix) => {
                if let Some(node) = self.nodes.get_mut(ix) {
                    node.names.add(place);
                }
            }
            Target::Folder(id) => {
                if let Some(folder) = self.folders.get_mut(&id) {
                    folder.parent = at;
                    folder.name = name.into();
                }
            }
            Target::Sub(_) => {}
        }
    }

    /// Removes a node that nothing refers to any more.
    pub fn collect(&mut self, ix: NodeIx) -> Option<Node> {
        if !self.nodes.get(ix)?.unused() {
            return None;
        }
        let node = self.nodes.remove(ix)?;
        for id in node.objects().iter().map(|o| o.id()) {
            if self.shared.get(&id) == Some(&ix) {
                self.shared.remove(&id);
            }
        }
        Some(node)
    }

    /// Path components of a directory below the user's root.
    pub fn path(&self, at: Place) -> Vec<NameBytes> {
        let mut path = Vec::new();
        let mut at = at;
        // The depth is bounded by the head's decoder and by mkdir.
        for _ in 0..MAX_DEPTH * 2 {
            if at.sub != Sub::Own {
                path.push(Arc::from(at.sub.as_str().as_bytes()));
                at.sub = Sub::Own;
            }
            if at.folder == FolderId::ROOT {
                break;
            }
            let Some(folder) = self.folders.get(&at.folder) else { break };
            path.push(folder.name.clone());
            at = folder.parent;
        }
        path.reverse();
        path
    }

    /// How deep a directory lies.
    pub fn depth(&self, at: Place) -> usize {
        self.path(at).len()
    }

    /// How many levels of folders a folder and those below it make.
    pub fn levels(&self, id: FolderId) -> usize {
        let inside = self.folders.keys().filter(|f| self.within(Place::own(**f), id));
        let deepest = inside.map(|f| self.depth(Place::own(*f))).max().unwrap_or(0);
        (deepest + 1).saturating_sub(self.depth(Place::own(id)))
    }

    /// Whether `inner` is `outer` or lies below it.
    pub fn within(&self, inner: Place, outer: FolderId) -> bool {
        let mut at = inner;
        for _ in 0..MAX_DEPTH * 2 {
            if at.folder == outer {
                return true;
            }
            if at.folder == FolderId::ROOT {
                return false;
            }
            match self.folders.get(&at.folder) {
                Some(folder) => at = folder.parent,
                None => return false,
            }
        }
        true
    }

    /// The folder that a path of folder names leads to, as far as folders go.
    pub fn find(&self, path: &[&[u8]]) -> Option<Place> {
        let mut at = Place::ROOT;
        for name in path {
            let (_, target) = self.dir(at)?.entries.get(name)?;
            at = match target {
                Target::Folder(id) => Place::own(id),
                Target::Sub(sub) => Place { folder: at.folder, sub },
                Target::Node(_) => return None,
            };
        }
        Some(at)
    }

    pub fn kind_is_local(&self, ix: NodeIx) -> bool {
        self.nodes.get(ix).is_some_and(|n| matches!(n.kind, Kind::Local(_)))
    }
}

/// Directories below a user's root may be nested so deep.
pub const MAX_DEPTH: usize = 64;
