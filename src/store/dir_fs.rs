//! File systems on which a new file needs one sync instead of two.
//!
//! POSIX asks for a sync of the file before it gets its name, or a power loss may leave the name
//! without the bytes, and for one of the directory after, or it may leave no name. Each of the two
//! waits for the file system's journal. ext4 and XFS have one journal for all metadata, written in order:
//!
//! * [`write_back`] sends the bytes to the disk and waits for that. What the journal gets to know by it
//!   (where the blocks are, the length) is there before the name is given, so a name that
//!   survives has its bytes: the commit that has the name flushes the disk's cache first.
//! * The name changes the file's own inode (its ctime), so a full sync of the file waits for the
//!   commit that has the name, too, and with it for all that was done before.
//!
//! `sync_file_range` by itself promises nothing to anybody, and elsewhere (btrfs, NFS, ext4
//! without a journal) none of this holds: there a put takes the two syncs. Nothing is guessed: a file
//! system that cannot be told for sure is one of those. `tests/store_power` cuts the journal off in
//! the middle of puts.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Whether `dir` is on a file system of this kind.
pub(super) fn in_order(dir: &Path) -> bool {
    let Ok(stat) = std::fs::metadata(dir) else { return false };
    let device = (nix::sys::stat::major(stat.dev()), nix::sys::stat::minor(stat.dev()));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    match kind(&mounts, device) {
        Some("xfs") => true,
        Some("ext4") => has_journal(device),
        _ => false,
    }
}

/// The type of the file system on a device; `None` if mounts disagree, or there is none.
fn kind(mounts: &str, (major, minor): (u64, u64)) -> Option<&str> {
    let device = format!("{major}:{minor}");
    let mut found = None;
    for line in mounts.lines() {
        if line.split(' ').nth(2) != Some(&*device) {
            continue;
        }
        let kind = line.split_once(" - ")?.1.split(' ').next()?;
        if found.is_some_and(|other| other != kind) {
            return None;
        }
        found = Some(kind);
    }
    found
}

fn has_journal((major, minor): (u64, u64)) -> bool {
    let block = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let Ok(block) = block else { return false };
    let Some(name) = block.file_name() else { return false };
    let about = Path::new("/sys/fs/ext4").join(name).join("journal_task");
    // The process that writes the journal, or a word that there is none.
    let task = std::fs::read_to_string(about).unwrap_or_default();
    task.trim().parse::<u32>().is_ok_and(|pid| pid > 0)
}

/// Sends a file's bytes to the disk and waits until it has taken them.
pub(super) fn write_back(file: &File) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open; no memory is passed.
    let rc = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, how) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
        21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        30 21 0:5 / /dev rw - devtmpfs udev rw\n\
        40 21 254:0 /srv /bind\\040mount rw - ext4 /dev/vda rw\n\
        41 21 8:1 / /a rw - ext4 /dev/sda1 rw\n\
        42 21 8:1 / /b rw - ext2 /dev/sda1 rw\n";

    #[test]
    fn a_device_is_found_among_the_mounts() {
        assert_eq!(kind(MOUNTS, (254, 0)), Some("ext4"));
        assert_eq!(kind(MOUNTS, (0, 5)), Some("devtmpfs"));
        assert_eq!(kind(MOUNTS, (8, 1)), None, "two kinds");
        assert_eq!(kind(MOUNTS, (8, 2)), None);
    }

    #[test]
    fn what_is_not_a_disk_is_not_in_order() {
        assert!(!in_order(Path::new("/proc")));
        assert!(!in_order(Path::new("/nowhere")));
    }
}
