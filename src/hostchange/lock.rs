//! The lock on a user's local record.
//!
//! It is a lock of an open file description, so it excludes threads as well as processes, and ends
//! with the process. Whoever cleans removes the file while he has it locked: so after the wait it
//! is looked at whether the name still means the file that was locked.

use super::place::Dir;
use super::record::{Bad, MAX_RECORD, Record};
use super::{LASTHOST, Trouble};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{SFlag, UtimensatFlags, fstat, futimens};
use nix::sys::time::TimeSpec;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);
/// How often the file may be exchanged under us.
const TRIES: u32 = 1000;

/// A user's local record while we have it locked.
#[derive(Debug)]
pub struct Locked<'d> {
    dir: &'d Dir,
    file: File,
}

/// What is asked for with `F_OFD_*`.
pub fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

impl<'d> Locked<'d> {
    /// Locks the record of a user's directory, making an empty one if there is none.
    ///
    /// # Errors
    /// It is locked for longer than `patience`, or is no file that we can use.
    pub fn new(dir: &'d Dir, patience: Duration) -> Result<Locked<'d>, Trouble> {
        let until = Instant::now() + patience;
        let path = dir.join(LASTHOST);
        for _ in 0..TRIES {
            let flags = OFlag::O_RDWR | OFlag::O_CREAT;
            let file = match dir.open(LASTHOST, flags) {
                Ok(file) => file,
                // A link: it is removed, not what it leads to.
                Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
                    dir.remove(LASTHOST).map_err(Trouble::io("removing the link", &path))?;
                    continue;
                }
                Err(e) => return Err(Trouble::io("opening it", &path)(e)),
            };
            let here = fstat(&file).map_err(|e| Trouble::io("looking at it", &path)(e.into()))?;
            if here.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
                return Err(Trouble::refused(path, "not a file"));
            }
            wait_for(&file, until).map_err(|errno| match errno {
                Errno::EAGAIN | Errno::EACCES => Trouble::Locked(path.clone()),
                errno => Trouble::io("locking it", &path)(errno.into()),
            })?;
            let named = dir.look(LASTHOST).map_err(Trouble::io("looking at it", &path))?;
            let id = (here.st_dev, here.st_ino);
            if named.is_some_and(|named| (named.st_dev, named.st_ino) == id) {
                return Ok(Locked { dir, file });
            }
        }
        Err(Trouble::refused(path, "comes and goes"))
    }

    pub fn dir(&self) -> &'d Dir {
        self.dir
    }

    /// What it says.
    ///
    /// # Errors
    /// It says nothing that counts.
    pub fn read(&self) -> Result<Record, Bad> {
        let mut bytes = [0; MAX_RECORD];
        let mut filled = 0;
        loop {
            match self.file.read_at(&mut bytes[filled..], filled as u64) {
                Ok(0) => return Record::parse(&bytes[..filled]),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Bad::Damaged),
            }
        }
    }

    /// From here on the list index counts as another host's.
    ///
    /// # Errors
    /// What the system says.
    pub fn invalidate(&self) -> Result<(), Trouble> {
        self.file.set_len(0).map_err(Trouble::io("emptying it", self.dir.join(LASTHOST)))
    }

    /// Writes it anew. Half of it counts as none.
    ///
    /// # Errors
    /// What the system says; it is empty then, or torn.
    pub fn write(&self, record: &Record) -> Result<(), Trouble> {
        self.invalidate()?;
        let text = record.text();
        self.file
            .write_all_at(text.as_bytes(), 0)
            .map_err(Trouble::io("writing it", self.dir.join(LASTHOST)))
    }

    /// Its access time says when the user was here last, whatever the file system is mounted with.
    ///
    /// # Errors
    /// What the system says.
    pub fn touch(&self) -> Result<(), Trouble> {
        touch(&self.file).map_err(Trouble::io("touching it", self.dir.join(LASTHOST)))
    }

    /// Removes it; the lock is worth nothing afterwards.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(self) -> Result<(), Trouble> {
        self.dir.remove(LASTHOST).map_err(Trouble::io("removing it", self.dir.join(LASTHOST)))
    }

    /// When the user was here last, in seconds since 1970.
    ///
    /// # Errors
    /// What the system says.
    pub fn accessed(&self) -> Result<i64, Trouble> {
        let stat = fstat(&self.file)
            .map_err(|e| Trouble::io("looking at it", self.dir.join(LASTHOST))(e.into()))?;
        Ok(stat.st_atime.max(stat.st_mtime))
    }
}

/// What the record of a user's directory says, without a lock: for people.
///
/// # Errors
/// It says nothing that counts.
pub fn peek(dir: &Dir) -> Result<Record, Bad> {
    // Looking must not count as use.
    let flags = OFlag::O_RDONLY | OFlag::O_NOATIME;
    let file = dir.open(LASTHOST, flags).map_err(|_| Bad::Empty)?;
    Locked { dir, file }.read()
}

/// Sets the access time alone to this moment.
///
/// # Errors
/// What the system says.
pub fn touch(file: &File) -> io::Result<()> {
    Ok(futimens(file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_OMIT)?)
}

/// The same for the record of a user's directory, if there is one.
///
/// # Errors
/// What the system says.
pub fn touch_in(dir: &Dir) -> io::Result<()> {
    let flags = UtimensatFlags::NoFollowSymlink;
    let (now, keep) = (TimeSpec::UTIME_NOW, TimeSpec::UTIME_OMIT);
    match nix::sys::stat::utimensat(dir.fd(), LASTHOST, &now, &keep, flags) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn wait_for(file: &File, until: Instant) -> Result<(), Errno> {
    let mut pause = PAUSE;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno @ (Errno::EAGAIN | Errno::EACCES)) => {
                if Instant::now() >= until {
                    return Err(errno);
                }
                sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            Err(errno) => return Err(errno),
        }
    }
}
