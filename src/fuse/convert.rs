//! Between the words of `fuser` and those of [`crate::fs::api`].

use crate::format::Timestamp;
use crate::fs::api::{Attr, Caller, FileKind, FsError, OpenMode, RenameMode, SetTime};
use fuser::{FileAttr, FileType, INodeNo, RenameFlags, Request, TimeOrNow};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long the kernel keeps what it may keep; it is told when that changes.
pub(super) const TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// The longest name, in bytes.
const NAME_MAX: usize = 255;

pub(super) fn ttl(cacheable: bool) -> Duration {
    if cacheable { TTL } else { Duration::ZERO }
}

pub(super) fn caller(req: &Request) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), pid: req.pid() }
}

/// The bytes of a name that [`crate::fs::api::MailFs`] accepts.
pub(super) fn name(name: &OsStr) -> Result<&[u8], FsError> {
    let name = name.as_bytes();
    if name.len() > NAME_MAX {
        return Err(error(libc::ENAMETOOLONG, "name too long"));
    }
    Ok(name)
}

/// An error of the caller's own making.
pub(super) fn error(errno: i32, text: &str) -> FsError {
    FsError { errno, text: text.to_owned(), quiet: true }
}

pub(super) fn open_mode(flags: i32) -> OpenMode {
    let access = flags & libc::O_ACCMODE;
    OpenMode {
        read: access != libc::O_WRONLY,
        write: access != libc::O_RDONLY,
        append: flags & libc::O_APPEND != 0,
        truncate: flags & libc::O_TRUNC != 0,
        exclusive: flags & libc::O_EXCL != 0,
    }
}

pub(super) fn rename_mode(flags: RenameFlags) -> Result<RenameMode, FsError> {
    if flags.is_empty() {
        Ok(RenameMode::Replace)
    } else if flags == RenameFlags::RENAME_NOREPLACE {
        Ok(RenameMode::NoReplace)
    } else if flags == RenameFlags::RENAME_EXCHANGE {
        Ok(RenameMode::Exchange)
    } else {
        Err(error(libc::EINVAL, "unknown rename flags"))
    }
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::Regular => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
    }
}

pub(super) fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.size.div_ceil(512),
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        perm: (attr.mode & 0o7777) as u16,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// What an entry without a file looks like: the kernel remembers that the name is absent.
pub(super) fn no_attr() -> FileAttr {
    let zero = Timestamp { secs: 0, nanos: 0 };
    let mut attr = file_attr(&Attr {
        ino: 0,
        kind: FileKind::Regular,
        size: 0,
        mode: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        atime: zero,
        mtime: zero,
        ctime: zero,
        cacheable: false,
    });
    attr.blksize = 0;
    attr
}

fn system_time(time: Timestamp) -> SystemTime {
    let whole = if time.secs >= 0 {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.secs.unsigned_abs()))
    } else {
        UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs()))
    };
    whole
        .and_then(|t| t.checked_add(Duration::from_nanos(u64::from(time.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

/// A time that a request carries. For times before 1970 fuser 0.18 subtracts the nanoseconds
/// where it should add them; this undoes it, so both fields are those the kernel sent.
fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp {
            secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        Err(before) => Timestamp {
            secs: 0i64.saturating_sub_unsigned(before.duration().as_secs()),
            nanos: before.duration().subsec_nanos(),
        },
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timestamp(time)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_flags() {
        let how = open_mode(libc::O_WRONLY | libc::O_APPEND | libc::O_EXCL | libc::O_CREAT);
        assert!(!how.read && how.write && how.append && !how.truncate && how.exclusive);
        let how = open_mode(libc::O_RDWR | libc::O_TRUNC);
        assert!(how.read && how.write && how.truncate);
        assert!(open_mode(libc::O_RDONLY).read && !open_mode(libc::O_RDONLY).write);
    }

    #[test]
    fn rename_flags() {
        assert_eq!(rename_mode(RenameFlags::empty()).unwrap(), RenameMode::Replace);
        assert_eq!(
            rename_mode(RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE)
                .unwrap_err()
                .errno,
            libc::EINVAL
        );
        assert!(rename_mode(RenameFlags::RENAME_WHITEOUT).is_err());
    }

    #[test]
    fn times_before_1970_keep_both_fields() {
        let t = system_time(Timestamp { secs: -2, nanos: 800_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(t).unwrap(), Duration::new(1, 200_000_000));
        let as_fuser_reads_it = UNIX_EPOCH - Duration::new(2, 800_000_000);
        assert_eq!(timestamp(as_fuser_reads_it), Timestamp { secs: -2, nanos: 800_000_000 });
    }

    #[test]
    fn extreme_times_do_not_panic() {
        for secs in [i64::MIN, i64::MAX] {
            system_time(Timestamp { secs, nanos: 999_999_999 });
        }
    }

    #[test]
    fn long_names_are_refused() {
        assert!(name(OsStr::new(&"x".repeat(255))).is_ok());
        assert_eq!(name(OsStr::new(&"x".repeat(256))).unwrap_err().errno, libc::ENAMETOOLONG);
    }
}
