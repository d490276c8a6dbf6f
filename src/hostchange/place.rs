//! Directories below `/dev/shm`, where every local user can make what he likes.
//!
//! A path is walked one name at a time, by descriptor. In a directory that others can write, the next
//! one must belong to root or to us, and is never reached through a symbolic link; elsewhere a
//! link counts only if it is root's or ours. The last directory, a user's own, is no link, belongs to
//! that user and has mode 0700. What is below it is named relative to its descriptor and never
//! followed, so nothing that anybody planted makes us read or write anywhere else.

use super::Trouble;
use super::creds::Who;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, fstatat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// An open directory, and its path for people.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

/// Whether directories that are missing are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    Make,
    Leave,
}

impl Dir {
    /// The INDEX directory: it lies where the administrator said, and opening it makes an NFS client
    /// ask the server whether names in it changed.
    ///
    /// # Errors
    /// What the system says.
    pub fn index(path: &Path) -> Result<Dir, Trouble> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())
            .map_err(|e| Trouble::io("opening the INDEX directory", path)(e.into()))?;
        Ok(Dir { fd, path: path.to_owned() })
    }

    /// A directory that is open already.
    pub fn of(fd: OwnedFd, path: impl Into<PathBuf>) -> Dir {
        Dir { fd, path: path.into() }
    }

    /// A user's own directory for the list index; see the module. `None`: it is not there, and was
    /// to be left so.
    ///
    /// # Errors
    /// It is not the user's, or cannot be made.
    pub fn own(path: &Path, owner: Who, missing: Missing) -> Result<Option<Dir>, Trouble> {
        let Some(dir) = walk(path, owner, missing, true)? else { return Ok(None) };
        let mut stat = dir.stat()?;
        if stat.st_uid == 0 && owner.uid != 0 && Who::me().uid == 0 {
            // Just made, perhaps by somebody who died before this.
            dir.is_ours_to_change()?;
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            fchownat(&dir.fd, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
                .map_err(|e| Trouble::io("giving it to its user", &dir.path)(e.into()))?;
            stat = dir.stat()?;
        }
        if stat.st_uid != owner.uid {
            let why = format!("belongs to uid {}, not to {}: not used", stat.st_uid, owner.uid);
            return Err(Trouble::refused(&dir.path, why));
        }
        if stat.st_mode & 0o7777 != 0o700 {
            dir.is_ours_to_change()?;
            // An O_PATH descriptor cannot be changed by itself.
            let open = dir.reopen(OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            fchmod(&open, Mode::S_IRWXU)
                .map_err(|e| Trouble::io("setting mode 0700", &dir.path)(e.into()))?;
        }
        Ok(Some(dir))
    }

    /// A path that was mistyped must not cost a directory its owner or mode.
    fn is_ours_to_change(&self) -> Result<(), Trouble> {
        let ours = |name: &OsString| {
            name == super::LASTHOST || super::is_list_index(name.as_encoded_bytes())
        };
        match self.names()?.iter().find(|name| !ours(name)) {
            None => Ok(()),
            Some(other) => {
                let why = format!("holds `{}`, so it is no list index: not used", other.display());
                Err(Trouble::refused(&self.path, why))
            }
        }
    }

    /// A directory that is there, of whomever, but reached safely; for cleaning.
    ///
    /// # Errors
    /// As [`Dir::own`].
    pub fn existing(path: &Path) -> Result<Option<Dir>, Trouble> {
        walk(path, Who::me(), Missing::Leave, false)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Who owns it.
    ///
    /// # Errors
    /// What the system says.
    pub fn owner(&self) -> Result<Who, Trouble> {
        let stat = self.stat()?;
        Ok(Who { uid: stat.st_uid, gid: stat.st_gid })
    }

    /// Whether it still has a name.
    pub fn is_there(&self) -> bool {
        fstat(&self.fd).is_ok_and(|stat| stat.st_nlink > 0)
    }

    fn stat(&self) -> Result<FileStat, Trouble> {
        fstat(&self.fd).map_err(|e| Trouble::io("looking at it", &self.path)(e.into()))
    }

    fn reopen(&self, flags: OFlag) -> Result<OwnedFd, Trouble> {
        openat(&self.fd, ".", flags | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|e| Trouble::io("opening it", &self.path)(e.into()))
    }

    /// Opens a file in it, never through a link, never waiting (a FIFO).
    ///
    /// # Errors
    /// What the system says.
    pub fn open(&self, name: impl AsRef<OsStr>, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        Ok(File::from(openat(&self.fd, name.as_ref(), flags, mode)?))
    }

    /// Opens a directory in it, never through a link.
    ///
    /// # Errors
    /// What the system says.
    pub fn below(&self, name: impl AsRef<OsStr>) -> io::Result<Dir> {
        let name = name.as_ref();
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::empty())?;
        Ok(Dir { fd, path: self.path.join(name) })
    }

    /// What a name in it is, itself and not what it leads to; `None` if it is not there.
    ///
    /// # Errors
    /// What the system says.
    pub fn look(&self, name: impl AsRef<OsStr>) -> io::Result<Option<FileStat>> {
        match fstatat(&self.fd, name.as_ref(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(nix::errno::Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes a file (a link itself); one that is not there is removed already.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        match unlinkat(&self.fd, name.as_ref(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(nix::errno::Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove_dir(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(unlinkat(&self.fd, name.as_ref(), UnlinkatFlags::RemoveDir)?)
    }

    /// # Errors
    /// What the system says.
    pub fn rename(&self, from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(nix::fcntl::renameat(&self.fd, from.as_ref(), &self.fd, to.as_ref())?)
    }

    /// All names in it.
    ///
    /// # Errors
    /// What the system says.
    pub fn names(&self) -> Result<Vec<OsString>, Trouble> {
        // Through /proc the directory itself is read, wherever its path leads by now.
        let listed = std::fs::read_dir(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
            .and_then(|entries| entries.map(|e| Ok(e?.file_name())).collect());
        listed.map_err(Trouble::io("listing it", &self.path))
    }

    /// The names in it that are of the list index.
    ///
    /// # Errors
    /// What the system says.
    pub fn list_index(&self) -> Result<Vec<OsString>, Trouble> {
        let mut names = self.names()?;
        names.retain(|name| super::is_list_index(name.as_encoded_bytes()));
        names.sort();
        Ok(names)
    }
}

/// See the module.
fn walk(path: &Path, owner: Who, missing: Missing, is_own: bool) -> Result<Option<Dir>, Trouble> {
    if !path.is_absolute() {
        return Err(Trouble::refused(path, "not an absolute path"));
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let top = nix::fcntl::open("/", flags, Mode::empty())
        .map_err(|e| Trouble::io("opening it", "/")(e.into()))?;
    let mut here = Dir { fd: top, path: "/".into() };
    let mut names = path.components().peekable();
    while let Some(name) = names.next() {
        let name = match name {
            Component::Normal(name) => name,
            Component::RootDir | Component::CurDir => continue,
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Trouble::refused(path, "holds `..`"));
            }
        };
        let last = names.peek().is_none();
        let Some(next) = step(&here, name, owner, missing, last, is_own)? else { return Ok(None) };
        here = next;
    }
    Ok(Some(here))
}

fn step(
    here: &Dir,
    name: &OsStr,
    owner: Who,
    missing: Missing,
    last: bool,
    is_own: bool,
) -> Result<Option<Dir>, Trouble> {
    let path = here.path.join(name);
    let looking = || Trouble::io("looking at it", &path);
    // Somebody else may make or remove it between two calls.
    for _ in 0..10 {
        match (here.look(name).map_err(looking())?, missing) {
            (Some(stat), _) => return enter(here, name, &stat, owner, last && is_own).map(Some),
            (None, Missing::Leave) => return Ok(None),
            (None, Missing::Make) => make(here, name, last)?,
        }
    }
    Err(Trouble::refused(path, "comes and goes"))
}

fn make(here: &Dir, name: &OsStr, last: bool) -> Result<(), Trouble> {
    let path = here.path.join(name);
    // What leads to many users' directories must let each of them through.
    let mode = if !last && Who::me().uid == 0 { 0o711 } else { 0o700 };
    let making = || Trouble::io("making it", &path);
    match mkdirat(&here.fd, name, Mode::from_bits_truncate(mode)) {
        Ok(()) if mode == 0o711 => {
            // The umask may have taken more than was wanted.
            let made = here.below(name).map_err(making())?;
            let made = made.reopen(OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            fchmod(&made, Mode::from_bits_truncate(mode)).map_err(|e| making()(e.into()))
        }
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(errno) => Err(making()(errno.into())),
    }
}

fn enter(
    here: &Dir,
    name: &OsStr,
    stat: &FileStat,
    owner: Who,
    own_is_last: bool,
) -> Result<Dir, Trouble> {
    let path = here.path.join(name);
    let parent = here.stat()?;
    let trusted = |uid: u32| uid == 0 || uid == Who::me().uid;
    let shared =
        parent.st_mode & 0o022 != 0 || !(trusted(parent.st_uid) || parent.st_uid == owner.uid);
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let known = trusted(stat.st_uid) || stat.st_uid == owner.uid;
    if kind == SFlag::S_IFLNK {
        if own_is_last {
            return Err(Trouble::refused(
                path,
                "a symbolic link, and should be a directory: not followed",
            ));
        }
        if shared || !trusted(stat.st_uid) {
            return Err(Trouble::refused(
                path,
                "a symbolic link that anybody may have planted: not followed",
            ));
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = openat(&here.fd, name, flags, Mode::empty())
            .map_err(|e| Trouble::io("opening it", &path)(e.into()))?;
        return Ok(Dir { fd, path });
    }
    if kind != SFlag::S_IFDIR {
        return Err(Trouble::refused(path, "not a directory: not used"));
    }
    if shared && !known {
        let why = format!(
            "belongs to uid {}, in a directory that others can write: not used",
            stat.st_uid
        );
        return Err(Trouble::refused(path, why));
    }
    let next = here.below(name).map_err(Trouble::io("opening it", &path))?;
    let now = next.stat()?;
    if (now.st_dev, now.st_ino) != (stat.st_dev, stat.st_ino) && shared {
        return Err(Trouble::refused(path, "was exchanged while it was looked at: not used"));
    }
    Ok(next)
}

#[cfg(test)]
mod tests;
