//! A small file system in memory, for tests of what drives a `MailFs`.
//!
//! Everything is under one lock. Names that start with `slow` wait at their first lookup, open,
//! read or fsync until [`FakeFs::let_go`]. Files opened for reading below `/published` have a
//! local copy and may not be opened for writing.

use async_trait::async_trait;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use vmailfs::format::Timestamp;
use vmailfs::fs::api::*;

type Invalidator = Box<dyn Fn(Invalidate) + Send + Sync>;

pub struct FakeFs {
    tree: Mutex<Tree>,
    gate: watch::Sender<bool>,
    invalidate: Mutex<Option<Invalidator>>,
    /// Answer attributes and names as cacheable.
    pub cacheable: AtomicBool,
}

#[derive(Default)]
struct Tree {
    nodes: HashMap<Ino, Node>,
    handles: HashMap<Fh, Handle>,
    last: u64,
    calls: HashMap<&'static str, u64>,
    quiet: bool,
}

struct Node {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u32,
    lookups: u64,
    mtime: Timestamp,
    ctime: Timestamp,
    slow: bool,
    copy: Option<Arc<File>>,
    published: bool,
}

enum Kind {
    File(Vec<u8>),
    Symlink(Vec<u8>),
    /// Names, each with its cookie.
    Dir(BTreeMap<Vec<u8>, (Ino, u64)>),
}

struct Handle {
    ino: Ino,
    append: bool,
}

/// What its calls wait for.
struct Gate;

fn now() -> Timestamp {
    let t = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Timestamp { secs: t.as_secs() as i64, nanos: t.subsec_nanos() }
}

fn error(errno: i32) -> FsError {
    FsError { errno, text: format!("fake error {errno}"), quiet: true }
}

type Answer<T> = Result<T, FsError>;

impl FakeFs {
    pub fn new() -> Arc<FakeFs> {
        let fs = FakeFs {
            tree: Mutex::new(Tree { last: 1, ..Tree::default() }),
            gate: watch::channel(false).0,
            invalidate: Mutex::new(None),
            cacheable: AtomicBool::new(true),
        };
        let mut root = Node::new(Kind::Dir(BTreeMap::new()), 0o755, Caller::default());
        root.lookups = 1;
        fs.tree().nodes.insert(1, root);
        Arc::new(fs)
    }

    /// Lets everything that waits go on, now and later.
    pub fn let_go(&self) {
        self.gate.send_replace(true);
    }

    pub fn calls(&self, op: &'static str) -> u64 {
        self.tree().calls.get(op).copied().unwrap_or(0)
    }

    /// Files that are opened from here on have nothing to make safe at their close.
    pub fn quiet_closes(&self) {
        self.tree().quiet = true;
    }

    pub fn open_handles(&self) -> usize {
        self.tree().handles.len()
    }

    /// Changes a file behind the kernel's back.
    pub fn poke(&self, ino: Ino, data: &[u8]) {
        if let Some(Node { kind: Kind::File(bytes), .. }) = self.tree().nodes.get_mut(&ino) {
            *bytes = data.to_vec();
        }
    }

    /// Removes a name behind the kernel's back.
    pub fn remove(&self, parent: Ino, name: &[u8]) {
        self.tree().dir(parent).unwrap().remove(name);
    }

    pub fn invalidate(&self, what: Invalidate) {
        self.invalidate.lock().unwrap().as_ref().unwrap()(what);
    }

    /// Makes a file immutable, with a local copy.
    pub fn publish(&self, ino: Ino) {
        let mut tree = self.tree();
        let node = tree.nodes.get_mut(&ino).unwrap();
        let Kind::File(bytes) = &node.kind else { panic!("not a file") };
        let mut copy = tempfile::tempfile().unwrap();
        copy.write_all(bytes).unwrap();
        node.copy = Some(Arc::new(copy));
        node.published = true;
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap()
    }

    fn cacheable(&self) -> bool {
        self.cacheable.load(Ordering::Relaxed)
    }

    fn shut(&self) -> bool {
        !*self.gate.borrow()
    }

    fn wait_for<T>(&self) -> Step<T> {
        Step::Wait(Need::new(Gate))
    }

    fn call<T>(&self, op: &'static str, f: impl FnOnce(&mut Tree) -> Answer<T>) -> Step<T> {
        let mut tree = self.tree();
        *tree.calls.entry(op).or_default() += 1;
        Step::Done(f(&mut tree))
    }

    fn slow(&self, ino: Ino) -> bool {
        self.shut() && self.tree().nodes.get(&ino).is_some_and(|n| n.slow)
    }

    fn found(&self, tree: &mut Tree, ino: Ino) -> Answer<Found> {
        tree.node(ino)?.lookups += 1;
        let attr = self.attr(tree, ino)?;
        Ok(Found { attr, cacheable: self.cacheable() })
    }

    fn attr(&self, tree: &mut Tree, ino: Ino) -> Answer<Attr> {
        let node = tree.node(ino)?;
        let (kind, size) = match &node.kind {
            Kind::File(data) => (FileKind::Regular, data.len()),
            Kind::Symlink(to) => (FileKind::Symlink, to.len()),
            Kind::Dir(names) => (FileKind::Directory, names.len()),
        };
        Ok(Attr {
            ino,
            kind,
            size: size as u64,
            mode: node.mode,
            nlink: node.nlink,
            uid: node.uid,
            gid: node.gid,
            atime: node.mtime,
            mtime: node.mtime,
            ctime: node.ctime,
            cacheable: self.cacheable(),
        })
    }
}

impl Node {
    fn new(kind: Kind, mode: u32, caller: Caller) -> Node {
        let (time, dir) = (now(), matches!(kind, Kind::Dir(_)));
        Node {
            kind,
            mode,
            uid: caller.uid,
            gid: caller.gid,
            nlink: if dir { 2 } else { 1 },
            lookups: 0,
            mtime: time,
            ctime: time,
            slow: false,
            copy: None,
            published: false,
        }
    }

    fn bytes(&mut self) -> Answer<&mut Vec<u8>> {
        match &mut self.kind {
            Kind::File(data) => Ok(data),
            Kind::Symlink(_) => Err(error(libc::EINVAL)),
            Kind::Dir(_) => Err(error(libc::EISDIR)),
        }
    }
}

impl Tree {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn node(&mut self, ino: Ino) -> Answer<&mut Node> {
        self.nodes.get_mut(&ino).ok_or_else(|| error(libc::ESTALE))
    }

    fn dir(&mut self, ino: Ino) -> Answer<&mut BTreeMap<Vec<u8>, (Ino, u64)>> {
        match &mut self.node(ino)?.kind {
            Kind::Dir(names) => Ok(names),
            _ => Err(error(libc::ENOTDIR)),
        }
    }

    fn get(&mut self, parent: Ino, name: &[u8]) -> Answer<Option<Ino>> {
        Ok(self.dir(parent)?.get(name).map(|(ino, _)| *ino))
    }

    fn need(&mut self, parent: Ino, name: &[u8]) -> Answer<Ino> {
        self.get(parent, name)?.ok_or_else(|| error(libc::ENOENT))
    }

    fn is_dir(&self, ino: Ino) -> bool {
        matches!(self.nodes.get(&ino), Some(Node { kind: Kind::Dir(_), .. }))
    }

    fn put(&mut self, parent: Ino, name: &[u8], ino: Ino) -> Answer<()> {
        let cookie = self.next();
        self.dir(parent)?.insert(name.to_vec(), (ino, cookie));
        self.touch(parent)
    }

    fn touch(&mut self, ino: Ino) -> Answer<()> {
        let node = self.node(ino)?;
        node.mtime = now().max(node.mtime.next());
        node.ctime = node.mtime;
        Ok(())
    }

    fn make(&mut self, parent: Ino, name: &[u8], mut node: Node) -> Answer<Ino> {
        if self.get(parent, name)?.is_some() {
            return Err(error(libc::EEXIST));
        }
        node.slow = name.starts_with(b"slow");
        let ino = self.next();
        self.nodes.insert(ino, node);
        self.put(parent, name, ino)?;
        Ok(ino)
    }

    fn drop_name(&mut self, parent: Ino, name: &[u8]) -> Answer<()> {
        let ino = self.need(parent, name)?;
        self.dir(parent)?.remove(name);
        let node = self.node(ino)?;
        node.nlink = if matches!(node.kind, Kind::Dir(_)) { 0 } else { node.nlink - 1 };
        node.ctime = now();
        self.touch(parent)?;
        self.collect(ino);
        Ok(())
    }

    fn collect(&mut self, ino: Ino) {
        let open = self.handles.values().any(|h| h.ino == ino);
        if self.nodes.get(&ino).is_some_and(|n| n.nlink == 0 && n.lookups == 0 && !open) {
            self.nodes.remove(&ino);
        }
    }

    fn open(&mut self, ino: Ino, how: OpenMode) -> Answer<Opened> {
        let node = self.node(ino)?;
        if node.published && how.write {
            return Err(error(libc::EACCES));
        }
        if how.truncate {
            node.bytes()?.clear();
            node.mtime = now();
        }
        let backing = node.copy.clone();
        let fh = self.next();
        self.handles.insert(fh, Handle { ino, append: how.append });
        let quiet_close = self.quiet;
        Ok(Opened { fh, keep_cache: true, uncached: false, backing, quiet_close })
    }
}

#[async_trait]
impl MailFs for FakeFs {
    async fn wait(&self, need: Need) -> Result<(), FsError> {
        need.downcast::<Gate>().unwrap();
        self.gate.subscribe().wait_for(|open| *open).await.unwrap();
        Ok(())
    }

    fn lookup(&self, _: Caller, parent: Ino, name: &[u8]) -> Step<Lookup> {
        if name.starts_with(b"slowlookup") && self.shut() {
            return self.wait_for();
        }
        self.call("lookup", |t| match t.get(parent, name)? {
            Some(ino) => Ok(Lookup::Found(self.found(t, ino)?)),
            None => Ok(Lookup::Absent { cacheable: self.cacheable() }),
        })
    }

    fn forget(&self, ino: Ino, lookups: u64) {
        let mut tree = self.tree();
        if let Some(node) = tree.nodes.get_mut(&ino) {
            node.lookups = node.lookups.checked_sub(lookups).expect("forgot too much");
        }
        tree.collect(ino);
    }

    fn getattr(&self, ino: Ino, _: Option<Fh>) -> Step<Attr> {
        self.call("getattr", |t| self.attr(t, ino))
    }

    fn setattr(&self, _: Caller, ino: Ino, _: Option<Fh>, set: SetAttr) -> Step<Attr> {
        self.call("setattr", |t| {
            let node = t.node(ino)?;
            node.ctime = now();
            if let Some(size) = set.size {
                node.bytes()?.resize(size as usize, 0);
                node.mtime = now();
            }
            node.mode = set.mode.unwrap_or(node.mode);
            node.uid = set.uid.unwrap_or(node.uid);
            node.gid = set.gid.unwrap_or(node.gid);
            match set.mtime {
                Some(SetTime::Now) => node.mtime = now(),
                Some(SetTime::At(time)) => node.mtime = time,
                None => {}
            }
            self.attr(t, ino)
        })
    }

    fn readlink(&self, ino: Ino) -> Step<Vec<u8>> {
        self.call("readlink", |t| match &t.node(ino)?.kind {
            Kind::Symlink(to) => Ok(to.clone()),
            _ => Err(error(libc::EINVAL)),
        })
    }

    fn mkdir(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Step<Found> {
        self.call("mkdir", |t| {
            let node = Node::new(Kind::Dir(BTreeMap::new()), mode, caller);
            let ino = t.make(parent, name, node)?;
            self.found(t, ino)
        })
    }

    fn mknod(&self, caller: Caller, parent: Ino, name: &[u8], mode: u32) -> Step<Found> {
        self.call("mknod", |t| {
            let ino = t.make(parent, name, Node::new(Kind::File(Vec::new()), mode, caller))?;
            self.found(t, ino)
        })
    }

    fn symlink(&self, caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Step<Found> {
        self.call("symlink", |t| {
            let node = Node::new(Kind::Symlink(target.to_vec()), 0o777, caller);
            let ino = t.make(parent, name, node)?;
            self.found(t, ino)
        })
    }

    fn unlink(&self, _: Caller, parent: Ino, name: &[u8]) -> Step<()> {
        self.call("unlink", |t| {
            let ino = t.need(parent, name)?;
            if t.is_dir(ino) {
                return Err(error(libc::EISDIR));
            }
            t.drop_name(parent, name)
        })
    }

    fn rmdir(&self, _: Caller, parent: Ino, name: &[u8]) -> Step<()> {
        self.call("rmdir", |t| {
            let ino = t.need(parent, name)?;
            if !t.dir(ino)?.is_empty() {
                return Err(error(libc::ENOTEMPTY));
            }
            t.drop_name(parent, name)
        })
    }

    fn rename(
        &self,
        _: Caller,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Step<()> {
        self.call("rename", |t| {
            let ino = t.need(parent, name)?;
            let there = t.get(new_parent, new_name)?;
            match (mode, there) {
                (RenameMode::NoReplace, Some(_)) => return Err(error(libc::EEXIST)),
                (RenameMode::Exchange, None) => return Err(error(libc::ENOENT)),
                (RenameMode::Exchange, Some(other)) => {
                    t.put(parent, name, other)?;
                    return t.put(new_parent, new_name, ino);
                }
                (_, Some(other)) if other == ino => return Ok(()),
                (_, Some(other)) => {
                    if t.is_dir(other) && !t.dir(other)?.is_empty() {
                        return Err(error(libc::ENOTEMPTY));
                    }
                    t.drop_name(new_parent, new_name)?;
                }
                (_, None) => {}
            }
            let (_, cookie) = t.dir(parent)?.remove(name).unwrap();
            t.touch(parent)?;
            t.put(new_parent, new_name, ino)?;
            if parent == new_parent {
                t.dir(parent)?.insert(new_name.to_vec(), (ino, cookie));
            }
            Ok(())
        })
    }

    fn link(&self, _: Caller, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Step<Found> {
        self.call("link", |t| {
            if t.get(new_parent, new_name)?.is_some() {
                return Err(error(libc::EEXIST));
            }
            t.node(ino)?.nlink += 1;
            t.put(new_parent, new_name, ino)?;
            self.found(t, ino)
        })
    }

    fn open(&self, _: Caller, ino: Ino, how: OpenMode) -> Step<Opened> {
        if self.slow(ino) {
            return self.wait_for();
        }
        self.call("open", |t| t.open(ino, how))
    }

    fn create(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u32,
        how: OpenMode,
    ) -> Step<(Found, Opened)> {
        self.call("create", |t| {
            let ino = match t.get(parent, name)? {
                Some(_) if how.exclusive => return Err(error(libc::EEXIST)),
                Some(ino) => ino,
                None => t.make(parent, name, Node::new(Kind::File(Vec::new()), mode, caller))?,
            };
            let opened = t.open(ino, how)?;
            Ok((self.found(t, ino)?, opened))
        })
    }

    fn read(&self, ino: Ino, _: Fh, offset: u64, size: u32) -> Step<Vec<u8>> {
        if self.slow(ino) {
            return self.wait_for();
        }
        self.call("read", |t| {
            let data = t.node(ino)?.bytes()?;
            let from = (offset as usize).min(data.len());
            let to = (from + size as usize).min(data.len());
            Ok(data[from..to].to_vec())
        })
    }

    fn write(&self, _: Caller, ino: Ino, fh: Fh, offset: u64, data: &[u8]) -> Step<u32> {
        if self.slow(ino) && data.starts_with(b"slow") {
            return self.wait_for();
        }
        self.call("write", |t| {
            let append = t.handles.get(&fh).is_some_and(|h| h.append);
            let node = t.node(ino)?;
            node.mtime = now();
            let bytes = node.bytes()?;
            let from = if append { bytes.len() } else { offset as usize };
            if bytes.len() < from + data.len() {
                bytes.resize(from + data.len(), 0);
            }
            bytes[from..from + data.len()].copy_from_slice(data);
            Ok(data.len() as u32)
        })
    }

    fn flush(&self, _: Ino, _: Fh) -> Step<()> {
        self.call("flush", |_| Ok(()))
    }

    fn fsync(&self, ino: Ino, _: Fh, _: bool) -> Step<()> {
        if self.slow(ino) {
            return self.wait_for();
        }
        self.call("fsync", |_| Ok(()))
    }

    fn fallocate(&self, ino: Ino, _: Fh, offset: u64, length: u64, mode: i32) -> Step<()> {
        self.call("fallocate", |t| {
            if mode != 0 {
                return Err(error(libc::EOPNOTSUPP));
            }
            let bytes = t.node(ino)?.bytes()?;
            let len = bytes.len().max((offset + length) as usize);
            bytes.resize(len, 0);
            Ok(())
        })
    }

    fn release(&self, ino: Ino, fh: Fh) {
        let mut tree = self.tree();
        tree.handles.remove(&fh).expect("released twice");
        tree.collect(ino);
    }

    fn opendir(&self, _: Caller, ino: Ino) -> Step<Fh> {
        self.call("opendir", |t| {
            t.dir(ino)?;
            let fh = t.next();
            t.handles.insert(fh, Handle { ino, append: false });
            Ok(fh)
        })
    }

    fn readdir(
        &self,
        ino: Ino,
        _: Fh,
        cookie: u64,
        emit: &mut dyn FnMut(&DirEntry) -> bool,
    ) -> Step<()> {
        let mut found_slow = false;
        let step = self.call("readdir", |t| {
            let mut entries: Vec<_> =
                t.dir(ino)?.iter().map(|(name, &(ino, at))| (at + 2, ino, name.clone())).collect();
            entries.push((1, ino, b".".to_vec()));
            entries.push((2, 1, b"..".to_vec()));
            entries.sort();
            for (at, ino, name) in entries.into_iter().filter(|e| e.0 > cookie) {
                if name.starts_with(b"slowentry") && self.shut() {
                    found_slow = true;
                    return Ok(());
                }
                let kind = match t.node(ino)?.kind {
                    Kind::File(_) => FileKind::Regular,
                    Kind::Symlink(_) => FileKind::Symlink,
                    Kind::Dir(_) => FileKind::Directory,
                };
                if !emit(&DirEntry { ino, name, kind, cookie: at }) {
                    break;
                }
            }
            Ok(())
        });
        if found_slow { self.wait_for() } else { step }
    }

    fn fsyncdir(&self, _: Ino, _: Fh) -> Step<()> {
        self.call("fsyncdir", |_| Ok(()))
    }

    fn releasedir(&self, ino: Ino, fh: Fh) {
        self.release(ino, fh);
    }

    fn statfs(&self) -> StatFs {
        StatFs {
            blocks: 1000,
            blocks_free: 500,
            blocks_available: 400,
            files: 70,
            files_free: 60,
            block_size: 4096,
            name_max: 255,
        }
    }

    fn set_invalidator(&self, send: Invalidator) {
        *self.invalidate.lock().unwrap() = Some(send);
    }
}
