//! Which opens the kernel may serve from a local file, without asking.
//!
//! The kernel allows one mode per inode at a time: while a plain handle lives (or a mapping
//! made through one), a passthrough open fails with EIO, and the other way round. A handle's
//! RELEASE is sent after the kernel has left the handle's mode, so counting from the answer to
//! OPEN until RELEASE errs on the safe side only. So:
//!
//! * an inode without plain handles goes passthrough with its first read-only open that has a
//!   backing file; all later opens share that one backing id, also one that came without a
//!   file (the file is immutable, so any copy of it is the same);
//! * while plain handles live (the mail was just written), every open is plain;
//! * a writing open while passthrough handles live breaks the file system's promise that
//!   backing files are immutable; it is refused, for the kernel would answer EIO.
//!
//! The first failure to register a backing file (no privilege, a stacked file system below the
//! cache) turns passthrough off for the rest of the mount: it would fail each time.

use crate::fs::api::{Fh, Ino};
use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How a handle is opened. `B` is the kernel's name of a backing file.
#[derive(Debug)]
pub(super) enum Mode<B> {
    Plain,
    Through(Arc<B>),
    /// A writer on an inode that is in passthrough mode.
    Conflict,
}

/// The modes of all open inodes.
#[derive(Debug)]
pub(super) struct Passthrough<B> {
    /// Whether the kernel offered it: nothing is counted otherwise.
    negotiated: AtomicBool,
    broken: AtomicBool,
    open: Mutex<Open<B>>,
}

#[derive(Debug)]
struct Open<B> {
    inodes: HashMap<Ino, Inode<B>>,
    /// Handles in passthrough mode.
    through: HashSet<Fh>,
}

#[derive(Debug)]
enum Inode<B> {
    Plain { handles: u32 },
    Through { handles: u32, backing: Arc<B> },
}

impl<B> Default for Passthrough<B> {
    fn default() -> Self {
        Passthrough {
            negotiated: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            open: Mutex::new(Open { inodes: HashMap::new(), through: HashSet::new() }),
        }
    }
}

impl<B> Passthrough<B> {
    pub(super) fn negotiated(&self) {
        self.negotiated.store(true, Ordering::Relaxed);
    }

    /// Decides for a handle that the file system has just opened. `register` makes the
    /// kernel's name for a backing file.
    pub(super) fn opened(
        &self,
        ino: Ino,
        fh: Fh,
        writes: bool,
        backing: Option<&File>,
        register: impl FnOnce(&File) -> io::Result<B>,
    ) -> Mode<B> {
        if !self.negotiated.load(Ordering::Relaxed) {
            return Mode::Plain;
        }
        let mut open = self.open.lock();
        let open = &mut *open;
        match open.inodes.get_mut(&ino) {
            Some(Inode::Plain { handles }) => {
                *handles += 1;
                Mode::Plain
            }
            Some(Inode::Through { .. }) if writes => Mode::Conflict,
            Some(Inode::Through { handles, backing }) => {
                *handles += 1;
                open.through.insert(fh);
                Mode::Through(backing.clone())
            }
            None => {
                let wanted = backing.filter(|_| !writes && !self.broken.load(Ordering::Relaxed));
                match wanted.and_then(|file| self.register(file, register)) {
                    Some(backing) => {
                        let backing = Arc::new(backing);
                        let shared = backing.clone();
                        open.inodes.insert(ino, Inode::Through { handles: 1, backing });
                        open.through.insert(fh);
                        Mode::Through(shared)
                    }
                    None => {
                        open.inodes.insert(ino, Inode::Plain { handles: 1 });
                        Mode::Plain
                    }
                }
            }
        }
    }

    fn register(&self, file: &File, register: impl FnOnce(&File) -> io::Result<B>) -> Option<B> {
        match register(file) {
            Ok(backing) => Some(backing),
            Err(error) => {
                self.broken.store(true, Ordering::Relaxed);
                tracing::warn!(%error, "passthrough of local copies is off: the kernel refuses it");
                None
            }
        }
    }

    /// The kernel has released a handle.
    pub(super) fn released(&self, ino: Ino, fh: Fh) {
        if !self.negotiated.load(Ordering::Relaxed) {
            return;
        }
        // Dropped after the lock: unregistering is a system call.
        let _gone;
        let mut open = self.open.lock();
        open.through.remove(&fh);
        let over = match open.inodes.get_mut(&ino) {
            Some(Inode::Plain { handles } | Inode::Through { handles, .. }) => {
                *handles = handles.saturating_sub(1);
                *handles == 0
            }
            None => false,
        };
        _gone = if over { open.inodes.remove(&ino) } else { None };
        drop(open);
    }

    /// Whether reads of this handle go past the daemon.
    #[cfg(test)]
    fn is_through(&self, fh: Fh) -> bool {
        self.open.lock().through.contains(&fh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Passthrough<u32> {
        let table = Passthrough::default();
        table.negotiated();
        table
    }

    fn file() -> File {
        File::open("/dev/null").unwrap()
    }

    fn open(table: &Passthrough<u32>, ino: Ino, fh: Fh, writes: bool, backed: bool) -> Mode<u32> {
        let file = file();
        table.opened(ino, fh, writes, backed.then_some(&file), |_| Ok(fh as u32))
    }

    #[test]
    fn opens_of_one_inode_share_a_backing_until_the_last_is_released() {
        let table = table();
        for fh in [10, 11, 12] {
            let Mode::Through(id) = open(&table, 1, fh, false, fh != 11) else { panic!() };
            assert_eq!(*id, 10);
        }
        for fh in [10, 11] {
            table.released(1, fh);
        }
        assert!(table.is_through(12));
        table.released(1, 12);
        let Mode::Through(id) = open(&table, 1, 13, false, true) else { panic!() };
        assert_eq!(*id, 13);
    }

    #[test]
    fn stays_plain_while_a_plain_handle_lives() {
        let table = table();
        assert!(matches!(open(&table, 1, 1, true, false), Mode::Plain));
        assert!(matches!(open(&table, 1, 2, false, true), Mode::Plain));
        table.released(1, 1);
        assert!(matches!(open(&table, 1, 3, false, true), Mode::Plain));
        table.released(1, 2);
        table.released(1, 3);
        assert!(matches!(open(&table, 1, 4, false, true), Mode::Through(_)));
    }

    #[test]
    fn a_writer_meets_a_conflict_and_leaves_no_trace() {
        let table = table();
        assert!(matches!(open(&table, 1, 1, false, true), Mode::Through(_)));
        assert!(matches!(open(&table, 1, 2, true, false), Mode::Conflict));
        table.released(1, 1);
        assert!(matches!(open(&table, 1, 2, true, false), Mode::Plain));
    }

    #[test]
    fn the_first_failure_is_remembered() {
        let table = table();
        let refuse = |_: &File| Err(io::Error::from_raw_os_error(libc::EPERM));
        assert!(matches!(table.opened(1, 1, false, Some(&file()), refuse), Mode::Plain));
        assert!(matches!(open(&table, 2, 2, false, true), Mode::Plain));
    }

    #[test]
    fn counts_nothing_unless_negotiated() {
        let table: Passthrough<u32> = Passthrough::default();
        assert!(matches!(open(&table, 1, 1, false, true), Mode::Plain));
        assert!(table.open.lock().inodes.is_empty());
    }
}
