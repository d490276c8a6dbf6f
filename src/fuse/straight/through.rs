//! Which inodes are open in passthrough mode.

use crate::hostchange::straight::Handle;
use fuser::BackingId;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// All opens of one are in the same mode, and share what
/// the kernel calls its backing file.
#[derive(Debug, Default)]
pub(super) struct Through {
    pub(super) wanted: AtomicBool,
    open: Mutex<HashMap<u64, Open>>,
}

#[derive(Debug)]
struct Open {
    handles: u32,
    /// `None`: the inode is open without.
    backing: Option<Arc<BackingId>>,
}

impl Through {
    /// Counts an open file and tells how it is to be opened.
    pub(super) fn opened(
        &self,
        handle: &Handle,
        register: impl FnOnce(&Handle) -> io::Result<BackingId>,
    ) -> Option<Arc<BackingId>> {
        let mut all = self.open.lock();
        let open = all.entry(handle.node).or_insert_with(|| {
            let backing = match self.wanted.load(Ordering::Relaxed) {
                true => register(handle).map_err(|error| self.refused(&error)).ok(),
                false => None,
            };
            Open { handles: 0, backing: backing.map(Arc::new) }
        });
        open.handles += 1;
        open.backing.clone()
    }

    /// One that is refused once is refused always: no privilege, or a file system below that
    /// cannot.
    fn refused(&self, error: &io::Error) {
        if self.wanted.swap(false, Ordering::Relaxed) {
            tracing::warn!(%error, "passthrough is off: the kernel refuses it; files are read and written through the daemon");
        }
    }

    /// A handle of the inode was closed.
    pub(super) fn released(&self, node: u64) {
        let gone = {
            let mut all = self.open.lock();
            let Some(open) = all.get_mut(&node) else { return };
            open.handles = open.handles.saturating_sub(1);
            if open.handles == 0 { all.remove(&node) } else { None }
        };
        drop(gone);
    }
}
