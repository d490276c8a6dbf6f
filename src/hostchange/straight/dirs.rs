//! Reading directories.

use super::files::errno;
use super::{Answer, Straight, open_again};
use crate::hostchange::creds::Who;
use crate::hostchange::is_list_index;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::fstatat;
use parking_lot::Mutex;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// Enough for some hundred names.
const BUFFER: usize = 32 << 10;
/// Where `d_off`, `d_reclen`, `d_type` and the name are in what the kernel tells of a name.
const OFF_AT: usize = 8;
const LENGTH_AT: usize = 16;
const TYPE_AT: usize = 18;
const NAME_AT: usize = 19;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub ino: u64,
    /// `DT_*`.
    pub kind: u8,
    pub name: Vec<u8>,
    /// Where the next one begins.
    pub next: i64,
}

/// An open directory.
#[derive(Debug)]
pub struct Listing {
    dir: Mutex<File>,
    /// In an INDEX directory: the names of the list index, and where they begin.
    local: Option<Mutex<Vec<Entry>>>,
}

/// The offsets of names that are shown after those on NFS. File systems use the whole 63 bits for
/// theirs, but none of them counts from here up by one.
const LOCAL: i64 = 0x7f6d_6169_6c00_0000;

impl Straight {
    pub fn opendir(&self, who: Who, id: u64) -> Answer<u64> {
        let node = self.node(id)?;
        let dir = open_again(&*node.fd(), OFlag::O_RDONLY | OFlag::O_DIRECTORY, who)?;
        let place = node.place();
        let local = match &place.user {
            Some(user) if self.is_index(&place) => Some(match self.users().dir(user) {
                Ok(dir) => dir.list_index().map_err(|_| Errno::EIO)?,
                Err(_) => Vec::new(),
            }),
            _ => None,
        };
        let entries = local.map(|names| {
            let entry = |(at, name): (i64, std::ffi::OsString)| Entry {
                ino: super::table::ROOT,
                kind: libc::DT_REG,
                name: name.as_bytes().to_vec(),
                next: LOCAL + at + 1,
            };
            Mutex::new((0..).zip(names).map(entry).collect())
        });
        let number = self.new_handle();
        let listing = Listing { dir: Mutex::new(dir), local: entries };
        self.listings.lock().insert(number, Arc::new(listing));
        Ok(number)
    }

    fn listing(&self, number: u64) -> Answer<Arc<Listing>> {
        self.listings.lock().get(&number).cloned().ok_or(Errno::EBADF)
    }

    /// Tells names from `offset` on, until `take` has enough.
    pub fn readdir(
        &self,
        number: u64,
        offset: i64,
        mut take: impl FnMut(&Entry) -> bool,
    ) -> Answer<()> {
        let listing = self.listing(number)?;
        let local = listing.local.as_ref();
        let in_local = local.is_some_and(|names| {
            let count = i64::try_from(names.lock().len()).unwrap_or(0);
            (LOCAL..=LOCAL + count).contains(&offset)
        });
        if !in_local {
            let mut dir = listing.dir.lock();
            let mut at = offset;
            loop {
                let entries = read_some(&mut dir, at)?;
                if entries.is_empty() {
                    break;
                }
                for mut entry in entries {
                    at = entry.next;
                    if local.is_some() && is_list_index(&entry.name) {
                        continue;
                    }
                    if entry.kind == libc::DT_UNKNOWN {
                        entry.kind = kind_of(&dir, &entry.name);
                    }
                    if !take(&entry) {
                        return Ok(());
                    }
                }
            }
        }
        let Some(names) = local else { return Ok(()) };
        let from = if in_local { usize::try_from(offset - LOCAL).unwrap_or(0) } else { 0 };
        for entry in names.lock().iter().skip(from) {
            if !take(entry) {
                break;
            }
        }
        Ok(())
    }

    pub fn releasedir(&self, number: u64) {
        let gone = self.listings.lock().remove(&number);
        drop(gone);
    }

    pub fn fsyncdir(&self, number: u64) -> Answer<()> {
        let listing = self.listing(number)?;
        let done = listing.dir.lock().sync_all();
        done.map_err(|e| errno(&e))
    }
}

/// For servers that do not say it with the name; mail servers believe what is listed.
fn kind_of(dir: &File, name: &[u8]) -> u8 {
    let name = std::ffi::OsStr::from_bytes(name);
    let kinds = [(libc::S_IFDIR, libc::DT_DIR), (libc::S_IFLNK, libc::DT_LNK)];
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => {
            let found = kinds.iter().find(|(mode, _)| stat.st_mode & libc::S_IFMT == *mode);
            found.map_or(libc::DT_REG, |(_, kind)| *kind)
        }
        // Gone meanwhile.
        Err(_) => libc::DT_REG,
    }
}

/// Names of a directory from an offset on; none at its end.
fn read_some(dir: &mut File, offset: i64) -> Answer<Vec<Entry>> {
    // SAFETY: the descriptor is open.
    Errno::result(unsafe { libc::lseek(dir.as_raw_fd(), offset, libc::SEEK_SET) })?;
    let mut buffer = vec![0u8; BUFFER];
    // SAFETY: the kernel writes at most so many bytes into the buffer.
    let filled = Errno::result(unsafe {
        libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), buffer.len())
    })?;
    let filled = usize::try_from(filled).map_err(|_| Errno::EIO)?;
    let mut rest = buffer.get(..filled).ok_or(Errno::EIO)?;
    let mut entries = Vec::new();
    while rest.len() > NAME_AT {
        let number = |at: usize| rest.get(at..at + 8).and_then(|b| b.try_into().ok());
        let ino = u64::from_ne_bytes(number(0).ok_or(Errno::EIO)?);
        let next = i64::from_ne_bytes(number(OFF_AT).ok_or(Errno::EIO)?);
        let length = usize::from(u16::from_ne_bytes([rest[LENGTH_AT], rest[LENGTH_AT + 1]]));
        let name = rest.get(NAME_AT..length).ok_or(Errno::EIO)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        entries.push(Entry { ino, kind: rest[TYPE_AT], name, next });
        rest = rest.get(length..).ok_or(Errno::EIO)?;
    }
    Ok(entries)
}
