//! POSIX locks, taken where other hosts see them.
//!
//! The kernel hands on each lock with its owner (a process, as POSIX means it). Each owner gets an
//! open file description of his own for each file, and the lock is taken on that one (`F_OFD_*`): so
//! owners exclude each other, and an NFS client tells the server. When a process closes any
//! descriptor of a file (FLUSH) all its locks on that file go, as POSIX has it; so here the
//! description is closed. With the last descriptor of a file all that is left goes.
//!
//! `flock` does not come here: fuser does not tell it from `fcntl`. The kernel keeps it by itself,
//! between the processes of this host alone.

use super::Answer;
use super::files::Handle;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fs::File;
use std::sync::Arc;

/// A lock as FUSE tells it: the last byte, not the length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: i32,
}

impl Range {
    fn flock(self) -> Answer<libc::flock> {
        let start = i64::try_from(self.start).map_err(|_| Errno::EOVERFLOW)?;
        let length = match i64::try_from(self.end) {
            // To the end of all files.
            Err(_) | Ok(i64::MAX) => 0,
            Ok(end) if end >= start => end - start + 1,
            Ok(_) => return Err(Errno::EINVAL),
        };
        let kind = libc::c_short::try_from(self.kind).map_err(|_| Errno::EINVAL)?;
        Ok(libc::flock {
            l_type: kind,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: length,
            l_pid: 0,
        })
    }

    fn of(lock: &libc::flock) -> Range {
        let start = u64::try_from(lock.l_start).unwrap_or(0);
        let end = match u64::try_from(lock.l_len) {
            Ok(0) | Err(_) => i64::MAX as u64,
            Ok(length) => start + length - 1,
        };
        Range { start, end, kind: i32::from(lock.l_type) }
    }
}

/// The descriptions through which owners hold locks.
#[derive(Debug, Default)]
pub struct Locks {
    held: Mutex<HashMap<(u64, u64), Arc<File>>>,
}

impl Locks {
    /// Takes, changes or gives back a lock; `false`: somebody else has it.
    pub(super) fn set(
        &self,
        owner: u64,
        node: u64,
        wanted: Range,
        open: impl FnOnce() -> Answer<File>,
    ) -> Answer<bool> {
        let lock = wanted.flock()?;
        let known = self.held.lock().get(&(owner, node)).cloned();
        let file = match known {
            Some(file) => file,
            None if wanted.kind == libc::F_UNLCK => return Ok(true),
            None => {
                let file = Arc::new(open()?);
                // Another thread of the owner may have been here meanwhile: there is one for each.
                self.held.lock().entry((owner, node)).or_insert(file).clone()
            }
        };
        loop {
            match fcntl(&*file, FcntlArg::F_OFD_SETLK(&lock)) {
                Ok(_) => return Ok(true),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// What another owner, here or on another host, has in the way of a lock.
    pub(super) fn test(&self, owner: u64, handle: &Handle, wanted: Range) -> Answer<Option<Range>> {
        let mut lock = wanted.flock()?;
        let own = self.held.lock().get(&(owner, handle.node)).cloned();
        let file = own.as_deref().unwrap_or(&handle.file);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
        Ok((i32::from(lock.l_type) != libc::F_UNLCK).then(|| Range::of(&lock)))
    }

    /// An owner has closed a descriptor of a file.
    pub(super) fn release(&self, owner: u64, node: u64) {
        let gone = self.held.lock().remove(&(owner, node));
        // Closed without the lock: the server is told.
        drop(gone);
    }

    /// Nobody has a file open any more.
    pub(super) fn release_all(&self, node: u64) {
        let gone: Vec<Arc<File>> = {
            let mut held = self.held.lock();
            held.extract_if(|(_, of), _| *of == node).map(|(_, file)| file).collect()
        };
        drop(gone);
    }

    /// How many descriptions there are.
    pub fn len(&self) -> usize {
        self.held.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Whether a thread that waits for a lock has something else to do: it was killed, or its alarm went
/// off (that is how Dovecot limits its waits). The kernel's own word for it (INTERRUPT) is
/// answered "unknown" by fuser, so nobody tells us.
pub fn is_interrupted(thread: u32) -> bool {
    match std::fs::read_to_string(format!("/proc/{thread}/status")) {
        Ok(status) => has_signal(&status),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

fn has_signal(status: &str) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let pending = mask("SigPnd:").unwrap_or(0) | mask("ShdPnd:").unwrap_or(0);
    let blocked = mask("SigBlk:").unwrap_or(0) | mask("SigIgn:").unwrap_or(0);
    pending & !blocked != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_those_of_fcntl() {
        for (start, end) in [(0, 0), (5, 9), (0, i64::MAX as u64), (7, i64::MAX as u64)] {
            let range = Range { start, end, kind: libc::F_WRLCK };
            assert_eq!(Range::of(&range.flock().unwrap()), range);
        }
        assert_eq!(Range { start: 0, end: u64::MAX, kind: 0 }.flock().unwrap().l_len, 0);
        assert!(Range { start: 9, end: 5, kind: 0 }.flock().is_err());
        assert!(Range { start: u64::MAX, end: u64::MAX, kind: 0 }.flock().is_err());
    }

    #[test]
    fn owners_exclude_each_other_and_lose_all_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let open = || Ok(File::options().read(true).write(true).open(&path).unwrap());
        let locks = Locks::default();
        let write = |start, end| Range { start, end, kind: libc::F_WRLCK };
        assert!(locks.set(1, 9, write(0, 9), open).unwrap());
        assert!(!locks.set(2, 9, write(5, 14), open).unwrap());
        assert!(locks.set(2, 9, write(10, 14), open).unwrap());
        // Own locks are not in one's way.
        assert!(locks.set(1, 9, write(0, 3), open).unwrap());
        let handle = Handle { node: 9, file: open().unwrap() };
        assert_eq!(locks.test(1, &handle, write(0, 9)).unwrap(), None);
        assert_eq!(locks.test(1, &handle, write(0, 99)).unwrap(), Some(write(10, 14)));
        let unlock = Range { start: 0, end: 3, kind: libc::F_UNLCK };
        assert!(locks.set(1, 9, unlock, open).unwrap());
        assert!(locks.set(2, 9, write(0, 3), open).unwrap());
        assert!(!locks.set(2, 9, write(4, 4), open).unwrap());
        locks.release(1, 9);
        assert!(locks.set(2, 9, write(4, 4), open).unwrap());
        assert_eq!(locks.len(), 1);
        locks.release_all(9);
        assert!(locks.is_empty());
        assert!(locks.set(3, 9, write(0, 99), open).unwrap());
    }

    #[test]
    fn a_signal_that_waits_is_seen() {
        let status = |pending: &str, shared: &str, blocked: &str| {
            format!(
                "Name:\tx\nSigPnd:\t{pending}\nShdPnd:\t{shared}\nSigBlk:\t{blocked}\nSigIgn:\t0000\n"
            )
        };
        assert!(!has_signal(&status("0000", "0000", "0000")));
        assert!(has_signal(&status("0000", "2000", "0000")));
        assert!(has_signal(&status("0100", "0000", "0000")));
        assert!(!has_signal(&status("2000", "0000", "2000")));
        assert!(!is_interrupted(std::process::id()));
        assert!(is_interrupted(u32::MAX));
    }
}
