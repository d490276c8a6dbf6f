//! What the kernel must forget, told to it from a thread of its own.
//!
//! A notification takes the locks of directories and pages inside the kernel, and waits there
//! for whoever holds them: perhaps a caller whose reply this daemon owes. So the file system
//! only leaves a note here, and never waits.
//!
//! Notes are told in order. One that is left again while it still waits is not kept twice (it
//! will be told later than both moments), which bounds the queue by what the kernel can know.

use crate::fs::api::Invalidate;
use fuser::{INodeNo, Notifier};
use parking_lot::{Condvar, Mutex};
use std::collections::{HashSet, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::thread;

/// Where the file system leaves its notes.
#[derive(Debug, Clone, Default)]
pub struct Invalidations(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    notes: VecDeque<Invalidate>,
    waiting: HashSet<Invalidate>,
    closed: bool,
}

impl Invalidations {
    /// Never waits; without effect once the mount is gone.
    pub fn push(&self, note: Invalidate) {
        let mut state = self.0.state.lock();
        if !state.closed && state.waiting.insert(note.clone()) {
            state.notes.push_back(note);
            self.0.changed.notify_one();
        }
    }

    /// How many notes the kernel has not been told yet.
    pub fn len(&self) -> usize {
        self.0.state.lock().notes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops what waits and ends the thread: the mount is gone.
    pub(super) fn close(&self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        state.notes.clear();
        state.waiting.clear();
        self.0.changed.notify_all();
    }

    /// The next note; `None` at the end.
    fn next(&self) -> Option<Invalidate> {
        let mut state = self.0.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(note) = state.notes.pop_front() {
                // Before it is told: the same note, left from now on, is a new one.
                state.waiting.remove(&note);
                return Some(note);
            }
            self.0.changed.wait(&mut state);
        }
    }

    /// Starts the thread that tells the kernel; it ends with [`Invalidations::close`].
    pub(super) fn start(&self, notifier: Notifier) -> io::Result<()> {
        let queue = self.clone();
        thread::Builder::new().name("fuse-notify".into()).spawn(move || {
            while let Some(note) = queue.next() {
                if let Err(error) = tell(&notifier, &note)
                    && !queue.0.state.lock().closed
                {
                    tracing::debug!(?note, %error, "the kernel refused an invalidation");
                }
            }
        })?;
        Ok(())
    }
}

/// ENOENT (the kernel does not know it) is success already in `Notifier`.
fn tell(notifier: &Notifier, note: &Invalidate) -> io::Result<()> {
    match note {
        // Attributes and all pages.
        Invalidate::Inode { ino } => notifier.inval_inode(INodeNo(*ino), 0, 0),
        Invalidate::Name { parent, name } => {
            notifier.inval_entry(INodeNo(*parent), OsStr::from_bytes(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ino(ino: u64) -> Invalidate {
        Invalidate::Inode { ino }
    }

    #[test]
    fn keeps_order_and_holds_each_note_once() {
        let queue = Invalidations::default();
        for n in [1, 2, 1, 3] {
            queue.push(ino(n));
        }
        assert_eq!(queue.len(), 3);
        assert_eq!(queue.next(), Some(ino(1)));
        queue.push(ino(1));
        assert_eq!(queue.next(), Some(ino(2)));
        assert_eq!(queue.next(), Some(ino(3)));
        assert_eq!(queue.next(), Some(ino(1)));
        assert!(queue.is_empty());
    }

    #[test]
    fn nothing_is_kept_once_closed() {
        let queue = Invalidations::default();
        queue.push(ino(1));
        queue.close();
        queue.push(ino(2));
        assert_eq!(queue.next(), None);
        assert_eq!(queue.len(), 0);
    }
}
