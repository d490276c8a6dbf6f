//! Who keeps a mount busy, for the message that says why it could not be unmounted.
//!
//! Only link texts and maps are read: nothing here touches the mount itself.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// More than this are not worth listing.
const MAX_HOLDERS: usize = 32;

/// A process that uses something below a mountpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    pub pid: u32,
    /// As in `ps -o comm`.
    pub name: String,
    /// One thing it holds: an open file, a mapped file or a working directory.
    pub path: PathBuf,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}): {}", self.name, self.pid, self.path.display())
    }
}

/// The processes that hold `mountpoint` or something below it, at most 32; processes that end
/// meanwhile or may not be looked at are left out.
pub(super) fn holders(mountpoint: &Path) -> Vec<Holder> {
    let Ok(proc) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = proc.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let path = held(&dir, mountpoint)?;
        let name = fs::read_to_string(dir.join("comm")).unwrap_or_default();
        Some(Holder { pid, name: name.trim_end().to_owned(), path })
    })
    .take(MAX_HOLDERS)
    .collect()
}

fn held(process: &Path, mountpoint: &Path) -> Option<PathBuf> {
    let links = ["cwd", "root", "exe"].into_iter().map(|link| process.join(link));
    let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|e| e.path());
    links
        .chain(open)
        .filter_map(|link| fs::read_link(link).ok())
        .find(|path| path.starts_with(mountpoint))
        .or_else(|| mapped(&fs::read(process.join("maps")).ok()?, mountpoint))
}

/// A mapped file: the sixth field of a line, which may hold blanks.
fn mapped(maps: &[u8], mountpoint: &Path) -> Option<PathBuf> {
    maps.split(|&b| b == b'\n')
        .filter_map(|line| line.iter().position(|&b| b == b'/').map(|at| &line[at..]))
        .map(|path| Path::new(OsStr::from_bytes(path)))
        .find(|path| path.starts_with(mountpoint))
        .map(Path::to_path_buf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_an_open_file_of_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        assert_eq!(holders(&path), []);
        let _open = fs::File::create(path.join("file")).unwrap();
        let found = holders(&path);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].pid, &found[0].path), (std::process::id(), &path.join("file")));
    }

    #[test]
    fn finds_mapped_files() {
        let maps = b"7f0-7f1 r--p 00000000 00:2a 12   /m/a b\n55-56 rw-p 0 00:00 0 [heap]\n";
        assert_eq!(mapped(maps, Path::new("/m")), Some(PathBuf::from("/m/a b")));
        assert_eq!(mapped(maps, Path::new("/n")), None);
    }
}
