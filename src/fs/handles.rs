//! Handles of open files.

use super::api::{Fh, Ino};
use crate::cache::fscache::Cached;
use crate::vmail::node::NodeIx;
use crate::vmail::session::UserCell;
use parking_lot::RwLock;
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
}

#[derive(Debug, Default)]
pub struct Handles {
    open: RwLock<HashMap<Fh, Arc<Handle>>>,
    last: AtomicU64,
}

impl Handles {
    pub fn add(&self, handle: Handle) -> Fh {
        let fh = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(fh, Arc::new(handle));
        fh
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
