//! Handles of open files and directories.

use super::api::{Fh, Ino};
use crate::cache::fscache::Cached;
use crate::vmail::node::NodeIx;
use crate::vmail::session::UserCell;
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open file.
#[derive(Debug)]
pub struct Handle {
    pub cell: Arc<UserCell>,
    pub ix: NodeIx,
    pub ino: Ino,
    pub write: bool,
    /// The cached copy of a published mail, held while the handle is.
    pub copy: Option<Arc<Cached>>,
    /// Which of a growing file's writes was the last through this handle; 0 for none.
    pub written: AtomicU64,
}

#[derive(Debug, Default)]
pub struct Handles {
    open: RwLock<HashMap<Fh, Arc<Handle>>>,
    last: AtomicU64,
}

impl Handles {
    pub fn add(&self, handle: Handle) -> Fh {
        let fh = self.number();
        self.open.write().insert(fh, Arc::new(handle));
        fh
    }

    /// A number that no handle has or will have.
    pub fn number(&self) -> Fh {
        self.last.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub fn get(&self, fh: Fh) -> Option<Arc<Handle>> {
        self.open.read().get(&fh).cloned()
    }

    pub fn remove(&self, fh: Fh) -> Option<Arc<Handle>> {
        self.open.write().remove(&fh)
    }

    pub fn drain(&self) -> Vec<Arc<Handle>> {
        self.open.write().drain().map(|(_, handle)| handle).collect()
    }
}

/// Open directories. Each is listed up to where it ended when it was opened or rewound: who
/// makes names while reading them (Dovecot's rebuild of mdbox gives files new numbers that way)
/// must come to an end.
#[derive(Debug, Default)]
pub struct OpenDirs {
    ends: Mutex<HashMap<Fh, u64>>,
    last: AtomicU64,
}

impl OpenDirs {
    /// `end`: the last cookie at present.
    pub fn add(&self, end: u64) -> Fh {
        let fh = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.ends.lock().insert(fh, end);
        fh
    }

    /// The last cookie to list from `cookie` on, if the directory ends at `now`.
    pub fn end(&self, fh: Fh, cookie: u64, now: u64) -> u64 {
        match self.ends.lock().get_mut(&fh) {
            Some(end) => {
                if cookie == 0 {
                    *end = now;
                }
                *end
            }
            None => now,
        }
    }

    pub fn remove(&self, fh: Fh) {
        self.ends.lock().remove(&fh);
    }

    pub fn clear(&self) {
        self.ends.lock().clear();
    }
}
