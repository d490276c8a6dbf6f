//! The file system of the NFS mode: what is on NFS, straight through, but for the list indexes.
//!
//! Every call acts as its caller on a descriptor (`O_PATH`) of the file or directory that the kernel
//! means, so names that other hosts move meanwhile lead nobody astray. Nothing is remembered
//! longer than [`Settings::ttl`], for other hosts write there, too.
//!
//! * [`table`] is what the kernel knows: a descriptor for each.
//! * [`users`] makes the check of [`super::check`] at a user's first access after he was away, and the
//!   one at the end.
//! * `names`, `files` and `dirs` are the operations; [`locks`] are POSIX locks, taken on the NFS
//!   file itself.
//!
//! In the INDEX directory of a user all names that begin with `dovecot.list.index` mean files in
//! the user's local directory; those that lie on NFS are not shown.

mod dirs;
mod files;
pub mod locks;
mod names;
pub mod table;
pub mod users;

pub use files::{Changes, Handle};
pub use table::ROOT;

use super::check::Host;
use super::creds::Who;
use crate::dovecot::template::Layout;
use dirs::Listing;
use locks::Locks;
use nix::errno::Errno;
use nix::sys::stat::FileStat;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use table::{Node, Place, Table};
use users::Users;

/// Where everything is, and what counts as a login.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory on NFS.
    pub root: PathBuf,
    /// Which directories below it are users.
    pub layout: Layout,
    /// The INDEX directory below a user's, one name after another.
    pub index_dir: Vec<Vec<u8>>,
    pub listindex_root: PathBuf,
    /// Where users are below that.
    pub listindex_layout: Layout,
    pub host: Host,
    /// Without access for so long, the next one is a login.
    pub login_idle: Duration,
    pub migration: bool,
    /// How long names and attributes may be believed.
    pub ttl: Duration,
    /// How many files and directories the kernel may know before it is asked to forget some.
    pub max_known: usize,
}

/// An answer of the file system.
pub type Answer<T> = Result<T, Errno>;

/// What a name is: its number and its attributes.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub id: u64,
    pub stat: FileStat,
}

/// See the module.
#[derive(Debug)]
pub struct Straight {
    settings: Settings,
    table: Mutex<Table>,
    users: Arc<Users>,
    open: Mutex<HashMap<u64, Arc<Handle>>>,
    listings: Mutex<HashMap<u64, Arc<Listing>>>,
    next_handle: AtomicU64,
    locks: Locks,
}

impl Straight {
    /// # Errors
    /// The directory cannot be opened.
    pub fn new(settings: Settings) -> std::io::Result<Straight> {
        use nix::fcntl::{OFlag, open};
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(&settings.root, flags, nix::sys::stat::Mode::empty())?;
        let stat = nix::sys::stat::fstat(&root)?;
        Ok(Straight {
            table: Mutex::new(Table::new(root, &stat)),
            users: Arc::new(Users::new(&settings)),
            settings,
            open: Mutex::default(),
            listings: Mutex::default(),
            next_handle: AtomicU64::new(1),
            locks: Locks::default(),
        })
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn users(&self) -> &Arc<Users> {
        &self.users
    }

    /// How many files and directories the kernel knows.
    pub fn known(&self) -> usize {
        self.table.lock().len()
    }

    fn new_handle(&self) -> u64 {
        self.next_handle.fetch_add(1, Ordering::Relaxed)
    }

    /// A node, and its user has been noticed.
    fn node(&self, id: u64) -> Answer<Arc<Node>> {
        let node = self.table.lock().get(id).ok_or(Errno::ESTALE)?;
        if let Some(user) = &node.place().user {
            self.users.access(user);
        }
        Ok(node)
    }

    fn is_index(&self, place: &Place) -> bool {
        place.index == Some(self.settings.index_dir.len())
    }

    /// What lies under a name of a directory.
    fn below(&self, parent: &Place, name: &[u8]) -> Place {
        if let Some(user) = &parent.user {
            let on = parent
                .index
                .filter(|at| self.settings.index_dir.get(*at).is_some_and(|n| n == name));
            return Place { above: None, user: Some(user.clone()), index: on.map(|at| at + 1) };
        }
        let Some(above) = &parent.above else { return Place::default() };
        let mut path = above.clone();
        path.push(name.to_vec());
        if path.len() < self.settings.layout.depth() {
            return Place { above: Some(path), ..Place::default() };
        }
        let names: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
        match self.settings.layout.user_of(&names) {
            Some(user) => {
                Place { above: None, user: Some(self.users.get(&user, &path)), index: Some(0) }
            }
            None => Place::default(),
        }
    }

    pub fn forget(&self, id: u64, lookups: u64) {
        let gone = self.table.lock().forget(id, lookups);
        // Closed without the lock: NFS may wait for the server.
        drop(gone);
    }

    /// What the kernel should be asked to forget, so that there is room for other names.
    pub fn crowded(&self) -> Vec<(u64, Vec<u8>)> {
        self.table.lock().oldest_beyond(self.settings.max_known)
    }

    pub fn getattr(&self, id: u64, handle: Option<u64>) -> Answer<FileStat> {
        let node = self.node(id)?;
        match handle.and_then(|handle| self.open.lock().get(&handle).cloned()) {
            Some(handle) => nix::sys::stat::fstat(&handle.file),
            None => nix::sys::stat::fstat(&*node.fd()),
        }
    }

    pub fn statfs(&self, id: u64) -> Answer<libc::statvfs> {
        let node = self.node(id)?;
        let mut out = std::mem::MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: the descriptor is open as long as `node` lives, and the kernel fills in `out`.
        Errno::result(unsafe { libc::fstatvfs(node.fd().as_raw_fd(), out.as_mut_ptr()) })?;
        // SAFETY: it succeeded.
        Ok(unsafe { out.assume_init() })
    }
}

/// The path through which the kernel opens a descriptor anew, as whoever acts just now.
fn reopened(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

fn open_again(fd: impl AsFd, flags: nix::fcntl::OFlag, who: Who) -> Answer<File> {
    let _as_caller = who.act();
    let flags = flags | nix::fcntl::OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(reopened(fd).as_str(), flags, nix::sys::stat::Mode::empty())?;
    Ok(File::from(file))
}

#[cfg(test)]
mod tests;
