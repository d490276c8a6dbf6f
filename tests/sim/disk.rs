//! A machine's disk in memory, which knows what was synced.
//!
//! Names: changes of directories reach the disk in the order in which they were made (as with a
//! journalling file system); a sync of any file or directory brings all that came before. Bytes:
//! a file's writes since its last sync reach the disk in any order, in part, or not at all, also
//! when a later rename of the file did. A power cut decides by chance what was there. After a sync
//! that failed, a later one of the same file brings nothing of what it had then, and says success.

use super::chance::Chance;
use super::world::{Life, Moment};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmailfs::cache::disk::{Disk, DiskEntry, DiskFile, How, Space};

type DirId = u64;
const ROOT: DirId = 0;
/// What is written is torn at multiples of this.
const SECTOR: usize = 512;
/// Writes of one file that are told apart until it is synced.
const MOST_STEPS: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    File(usize),
    Dir(DirId),
}

/// One name's new meaning.
type Edit = (DirId, OsString, Option<Entry>);
type Names = BTreeMap<(DirId, OsString), Entry>;

#[derive(Debug, Default)]
struct Inode {
    live: Vec<u8>,
    disk: Vec<u8>,
    /// States of `live` since the last sync, oldest first.
    unsynced: Vec<Vec<u8>>,
    /// A sync failed: pages that were not on the disk count as clean.
    spoilt: bool,
}

#[derive(Debug, Default)]
struct State {
    inodes: Vec<Inode>,
    names: Names,
    on_disk: Names,
    unsynced: Vec<Vec<Edit>>,
    last_dir: DirId,
}

/// What outlives a machine's lives.
#[derive(Debug, Default)]
pub struct Platter(Mutex<State>);

fn error(kind: ErrorKind) -> io::Error {
    io::Error::from(kind)
}

impl State {
    fn edit(&mut self, edits: Vec<Edit>) {
        apply(&mut self.names, &edits);
        self.unsynced.push(edits);
    }

    fn sync_names(&mut self) {
        for edits in std::mem::take(&mut self.unsynced) {
            apply(&mut self.on_disk, &edits);
        }
    }

    fn find(&self, path: &Path) -> io::Result<Entry> {
        let mut at = Entry::Dir(ROOT);
        for part in parts(path) {
            let Entry::Dir(dir) = at else { return Err(error(ErrorKind::NotADirectory)) };
            let key = (dir, part.to_os_string());
            at = *self.names.get(&key).ok_or_else(|| error(ErrorKind::NotFound))?;
        }
        Ok(at)
    }

    fn file(&self, path: &Path) -> io::Result<usize> {
        match self.find(path)? {
            Entry::File(ino) => Ok(ino),
            Entry::Dir(_) => Err(error(ErrorKind::IsADirectory)),
        }
    }

    fn parent(&self, path: &Path) -> io::Result<(DirId, OsString)> {
        let name = path.file_name().ok_or_else(|| error(ErrorKind::InvalidInput))?.to_os_string();
        match self.find(path.parent().unwrap_or(Path::new("")))? {
            Entry::Dir(dir) => Ok((dir, name)),
            Entry::File(_) => Err(error(ErrorKind::NotADirectory)),
        }
    }

    fn children(&self, dir: DirId) -> Vec<(OsString, Entry)> {
        let from = (dir, OsString::new());
        let here = self.names.range(from..).take_while(|((d, _), _)| *d == dir);
        here.map(|((_, name), entry)| (name.clone(), *entry)).collect()
    }

    /// Edits that remove what lies below an entry, deepest first.
    fn remove_below(&self, entry: Entry, out: &mut Vec<Edit>) {
        if let Entry::Dir(dir) = entry {
            for (name, child) in self.children(dir) {
                self.remove_below(child, out);
                out.push((dir, name, None));
            }
        }
    }

    fn change(&mut self, ino: usize, f: impl FnOnce(&mut Vec<u8>)) {
        let inode = &mut self.inodes[ino];
        if inode.unsynced.len() == MOST_STEPS {
            // Two writes count as one.
            inode.unsynced.remove(MOST_STEPS / 2);
        }
        inode.unsynced.push(inode.live.clone());
        f(&mut inode.live);
    }
}

fn apply(names: &mut Names, edits: &[Edit]) {
    for (dir, name, entry) in edits {
        let key = (*dir, name.clone());
        match entry {
            Some(entry) => _ = names.insert(key, *entry),
            None => _ = names.remove(&key),
        }
    }
}

fn parts(path: &Path) -> impl Iterator<Item = &OsStr> {
    path.iter().filter(|p| *p != "/" && *p != ".")
}

impl Platter {
    /// The power goes: what was not synced is there, or not, or in part.
    pub fn power_cut(&self, chance: &Chance) {
        let mut state = self.0.lock();
        let kept = chance.index(state.unsynced.len() + 1);
        let edits: Vec<_> = std::mem::take(&mut state.unsynced);
        for group in edits.into_iter().take(kept) {
            apply(&mut state.on_disk, &group);
        }
        state.names = state.on_disk.clone();
        for inode in &mut state.inodes {
            inode.spoilt = false;
            if inode.unsynced.is_empty() {
                continue;
            }
            let steps = std::mem::take(&mut inode.unsynced);
            match chance.below(4) {
                0 => {}
                1 => inode.disk = inode.live.clone(),
                2 => {
                    // What was written up to some moment, the last of it torn.
                    let i = chance.index(steps.len());
                    let before = if i == 0 { &inode.disk } else { &steps[i] };
                    let after = steps.get(i + 1).unwrap_or(&inode.live);
                    inode.disk = torn(before, after, chance);
                }
                _ => inode.disk = torn(&inode.disk, &inode.live, chance),
            }
            inode.live = inode.disk.clone();
        }
    }
}

/// Some sectors of the new content, the others as before; where nothing was before, zeros.
fn torn(before: &[u8], after: &[u8], chance: &Chance) -> Vec<u8> {
    let len = match chance.below(3) {
        0 => before.len(),
        1 => after.len(),
        _ => before.len().min(after.len()) + chance.index(after.len().abs_diff(before.len()) + 1),
    };
    let mut out = vec![0; len];
    let some = before.len().min(len);
    out[..some].copy_from_slice(&before[..some]);
    let mut at = 0;
    while at < len.min(after.len()) {
        let end = (at + SECTOR).min(len).min(after.len());
        if chance.percent(50) {
            out[at..end].copy_from_slice(&after[at..end]);
        }
        at = end;
    }
    out
}

/// The disk as one life of its machine sees it.
#[derive(Debug, Clone)]
pub struct SimDisk {
    platter: Arc<Platter>,
    life: Arc<Life>,
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    ino: usize,
    path: PathBuf,
}

impl SimDisk {
    pub fn new(platter: Arc<Platter>, life: Arc<Life>) -> SimDisk {
        SimDisk { platter, life }
    }

    fn alive(&self) -> io::Result<()> {
        if self.life.is_dead() { Err(io::Error::other("the machine is dead")) } else { Ok(()) }
    }

    /// Something that changes the disk. The machine may die before, in the middle of and after
    /// it, and the disk may refuse.
    fn mutate<T>(
        &self,
        what: impl FnOnce() -> String,
        f: impl FnOnce(&mut State, bool) -> io::Result<T>,
    ) -> io::Result<T> {
        self.alive()?;
        let what = what();
        let moment = self.life.disk_moment(&what);
        if moment == Some(Moment::Before) {
            self.life.die(&format!("before {what}"));
            return Err(io::Error::other("the machine is dead"));
        }
        if let Some(fault) = self.life.disk_fault(&what) {
            return Err(fault);
        }
        let done = f(&mut self.platter.0.lock(), moment == Some(Moment::Middle));
        if let Some(moment) = moment {
            self.life.die(&format!("{moment:?} {what}"));
            return Err(io::Error::other("the machine is dead"));
        }
        done
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.alive()?;
        let state = self.disk.platter.0.lock();
        let data = &state.inodes[self.ino].live;
        let from = usize::try_from(offset).unwrap().min(data.len());
        let n = buf.len().min(data.len() - from);
        buf[..n].copy_from_slice(&data[from..from + n]);
        Ok(n)
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let sum = crc32c::crc32c(data);
        let what =
            || format!("write {} at {offset} len {} {sum:08x}", self.path.display(), data.len());
        let cut = if data.len() > 1 { self.disk.life.chance.index(data.len()) } else { 0 };
        self.disk.mutate(what, |state, half| {
            let data = if half { &data[..cut] } else { data };
            state.change(self.ino, |live| {
                let from = usize::try_from(offset).unwrap();
                if live.len() < from + data.len() {
                    live.resize(from + data.len(), 0);
                }
                live[from..from + data.len()].copy_from_slice(data);
            });
            Ok(())
        })
    }

    fn size(&self) -> io::Result<u64> {
        self.disk.alive()?;
        Ok(self.disk.platter.0.lock().inodes[self.ino].live.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let what = || format!("truncate {} to {len}", self.path.display());
        self.disk.mutate(what, |state, _| {
            state.change(self.ino, |live| live.resize(usize::try_from(len).unwrap(), 0));
            // No page is left that was lost.
            state.inodes[self.ino].spoilt &= len > 0;
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        let what = || format!("sync {}", self.path.display());
        let done = self.disk.mutate(what, |state, half| {
            // Died while it waited: it may have reached the disk, and nobody was told.
            if !half {
                state.sync_names();
                let inode = &mut state.inodes[self.ino];
                if !inode.spoilt {
                    inode.disk = inode.live.clone();
                    inode.unsynced.clear();
                }
            }
            Ok(())
        });
        if done.is_err() && self.disk.alive().is_ok() {
            let inode = &mut self.disk.platter.0.lock().inodes[self.ino];
            inode.spoilt |= !inode.unsynced.is_empty();
        }
        done
    }

    fn real(&self) -> Option<Arc<File>> {
        None
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, how: How) -> io::Result<Arc<dyn DiskFile>> {
        self.alive()?;
        let there = self.platter.0.lock().find(path);
        let ino = match (there, how) {
            (Ok(Entry::Dir(_)), _) => return Err(error(ErrorKind::IsADirectory)),
            (Ok(_), How::CreateNew) => return Err(error(ErrorKind::AlreadyExists)),
            (Ok(Entry::File(ino)), _) => ino,
            (Err(e), How::Create | How::CreateNew) if e.kind() == ErrorKind::NotFound => {
                let what = || format!("create {}", path.display());
                self.mutate(what, |state, half| {
                    let (dir, name) = state.parent(path)?;
                    state.inodes.push(Inode::default());
                    let ino = state.inodes.len() - 1;
                    if !half {
                        state.edit(vec![(dir, name, Some(Entry::File(ino)))]);
                    }
                    Ok(ino)
                })?
            }
            (Err(e), _) => return Err(e),
        };
        Ok(Arc::new(SimFile { disk: self.clone(), ino, path: path.into() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let what = || format!("rename {} {}", from.display(), to.display());
        self.mutate(what, |state, half| {
            let moved = state.find(from)?;
            let (from, to) = (state.parent(from)?, state.parent(to)?);
            let there = state.names.get(&to).copied();
            match (moved, there) {
                (Entry::Dir(_), Some(Entry::Dir(other))) if !state.children(other).is_empty() => {
                    return Err(error(ErrorKind::DirectoryNotEmpty));
                }
                (Entry::Dir(_), Some(Entry::File(_))) => {
                    return Err(error(ErrorKind::NotADirectory));
                }
                (Entry::File(_), Some(Entry::Dir(_))) => {
                    return Err(error(ErrorKind::IsADirectory));
                }
                _ => {}
            }
            // Two names of one file: rename(2) does nothing.
            if !half && there != Some(moved) {
                state.edit(vec![(from.0, from.1, None), (to.0, to.1, Some(moved))]);
            }
            Ok(())
        })
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        let what = || format!("exchange {} {}", a.display(), b.display());
        self.mutate(what, |state, _| {
            let (x, y) = (state.find(a)?, state.find(b)?);
            let (a, b) = (state.parent(a)?, state.parent(b)?);
            state.edit(vec![(a.0, a.1, Some(y)), (b.0, b.1, Some(x))]);
            Ok(())
        })
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let what = || format!("link {} {}", from.display(), to.display());
        self.mutate(what, |state, half| {
            let ino = state.file(from)?;
            let (dir, name) = state.parent(to)?;
            if state.names.contains_key(&(dir, name.clone())) {
                return Err(error(ErrorKind::AlreadyExists));
            }
            if !half {
                state.edit(vec![(dir, name, Some(Entry::File(ino)))]);
            }
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        // Often for what is not there, which changes nothing.
        self.alive()?;
        self.platter.0.lock().file(path)?;
        let what = || format!("unlink {}", path.display());
        self.mutate(what, |state, half| {
            let (dir, name) = state.parent(path)?;
            if !half {
                state.edit(vec![(dir, name, None)]);
            }
            Ok(())
        })
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.alive()?;
        match self.platter.0.lock().find(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            other => _ = other?,
        }
        let some = self.life.chance.percent(50);
        let what = || format!("remove tree {}", path.display());
        self.mutate(what, |state, half| {
            let entry = state.find(path)?;
            let mut edits = Vec::new();
            state.remove_below(entry, &mut edits);
            let (dir, name) = state.parent(path)?;
            edits.push((dir, name, None));
            let all = edits.len();
            let most = if half { all / if some { 2 } else { 3 } } else { all };
            edits.into_iter().take(most).for_each(|edit| state.edit(vec![edit]));
            Ok(())
        })
    }

    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        self.alive()?;
        let mut at = PathBuf::new();
        for part in path.iter() {
            at.push(part);
            let found = self.platter.0.lock().find(&at);
            match found {
                Ok(Entry::Dir(_)) => {}
                Ok(Entry::File(_)) => return Err(error(ErrorKind::NotADirectory)),
                Err(_) => {
                    let what = || format!("mkdir {}", at.display());
                    self.mutate(what, |state, half| {
                        let (dir, name) = state.parent(&at)?;
                        state.last_dir += 1;
                        let id = state.last_dir;
                        if !half {
                            state.edit(vec![(dir, name, Some(Entry::Dir(id)))]);
                        }
                        Ok(())
                    })?;
                }
            }
        }
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let what = || format!("sync dir {}", path.display());
        self.mutate(what, |state, half| {
            state.find(path)?;
            if !half {
                state.sync_names();
            }
            Ok(())
        })
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.alive()?;
        match self.platter.0.lock().find(path) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn is_dir(&self, path: &Path) -> io::Result<bool> {
        self.alive()?;
        Ok(matches!(self.platter.0.lock().find(path), Ok(Entry::Dir(_))))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<DiskEntry>> {
        self.alive()?;
        let state = self.platter.0.lock();
        let dir = match state.find(dir) {
            Ok(Entry::Dir(dir)) => dir,
            Ok(Entry::File(_)) => return Err(error(ErrorKind::NotADirectory)),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let entry = |(name, entry)| match entry {
            Entry::File(ino) => DiskEntry {
                name,
                is_dir: false,
                len: state.inodes[ino].live.len() as u64,
                ino: ino as u64 + 1,
                used: 0,
            },
            Entry::Dir(id) => {
                DiskEntry { name, is_dir: true, len: 0, ino: (1 << 40) | id, used: 0 }
            }
        };
        Ok(state.children(dir).into_iter().map(entry).collect())
    }

    fn space(&self, _path: &Path) -> io::Result<Space> {
        self.alive()?;
        Ok(Space { total: 1 << 40, free: 1 << 39, files: 1 << 20, files_free: 1 << 19 })
    }

    fn replace(&self, path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
        let temp = path.with_file_name(format!(".new.{}", self.life.serial()));
        let file = self.open(&temp, How::CreateNew)?;
        let written = file
            .write_all_at(bytes, 0)
            .and_then(|()| if durable { file.sync_data() } else { Ok(()) })
            .and_then(|()| self.rename(&temp, path));
        if let Err(error) = written {
            let _ = self.remove_file(&temp);
            return Err(error);
        }
        match path.parent() {
            Some(dir) if durable => self.sync_dir(dir),
            _ => Ok(()),
        }
    }
}
