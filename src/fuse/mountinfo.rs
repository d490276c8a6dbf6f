//! `/proc/self/mountinfo`: what is mounted where.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount, as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Unique among the mounts that exist; used again later.
    pub id: u64,
    /// Major and minor number of the device.
    pub device: (u32, u32),
    pub mountpoint: PathBuf,
    /// As `fuse.vmailfs`.
    pub fstype: String,
    pub source: OsString,
}

impl MountEntry {
    pub fn is_fuse(&self) -> bool {
        self.fstype == "fuse" || self.fstype == "fuseblk" || self.fstype.starts_with("fuse.")
    }
}

/// All mounts; of those at one place the last is on top.
pub fn read() -> io::Result<Vec<MountEntry>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse).collect())
}

/// What is on top at `mountpoint`, which must be absolute and without symbolic links.
pub fn top<'a>(mounts: &'a [MountEntry], mountpoint: &Path) -> Option<&'a MountEntry> {
    mounts.iter().rev().find(|m| m.mountpoint == mountpoint)
}

/// `36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw`; lines that do not follow
/// this are skipped.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut words = line.split(|&b| b == b' ');
    let mut text = || words.next().and_then(|w| std::str::from_utf8(w).ok());
    let id = text()?.parse().ok()?;
    let _parent = text()?;
    let (major, minor) = text()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let _root = words.next()?;
    let mountpoint = PathBuf::from(OsString::from_vec(unescape(words.next()?)));
    // Mount options and any number of optional fields.
    words.find(|w| *w == b"-")?;
    let fstype = String::from_utf8_lossy(&unescape(words.next()?)).into_owned();
    let source = OsString::from_vec(unescape(words.next()?));
    Some(MountEntry { id, device, mountpoint, fstype, source })
}

/// Blank, tab, newline, backslash (and `#`) are written as a backslash and three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = |b: u8| (b'0'..=b'7').contains(&b).then(|| u32::from(b - b'0'));
        if let (b'\\', [a, b, c, after @ ..]) = (first, tail)
            && let (Some(a), Some(b), Some(c)) = (octal(*a), octal(*b), octal(*c))
            && let Ok(byte) = u8::try_from(a * 64 + b * 8 + c)
        {
            out.push(byte);
            rest = after;
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_lines_with_and_without_optional_fields() {
        let m = parse(b"36 35 98:7 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw")
            .unwrap();
        assert_eq!((m.id, m.device), (36, (98, 7)));
        assert_eq!((m.mountpoint.as_path(), m.fstype.as_str()), (Path::new("/mnt2"), "ext3"));
        let m = parse(b"40 22 0:44 / /var/vmail rw - fuse.vmailfs s3://b/p rw,user_id=0").unwrap();
        assert!(m.is_fuse());
        assert_eq!(m.source, "s3://b/p");
    }

    #[test]
    fn octal_escapes_in_paths() {
        let m = parse(br"1 2 0:1 / /a\040b\011c\012d\134e rw - x y\040z rw").unwrap();
        assert_eq!(m.mountpoint, Path::new("/a b\tc\nd\\e"));
        assert_eq!(m.source, "y z");
        assert_eq!(unescape(br"\9\77\777x"), br"\9\77\777x");
    }

    #[test]
    fn nonsense_is_skipped() {
        for line in [&b""[..], b"x", b"1 2 3 4 5 - 6", b"1 2 0:1 / /a rw"] {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn the_last_mount_at_a_place_is_on_top() {
        let at = |id, path: &str| MountEntry {
            id,
            device: (0, 1),
            mountpoint: path.into(),
            fstype: "tmpfs".into(),
            source: "none".into(),
        };
        let mounts = [at(1, "/m"), at(2, "/m"), at(3, "/m/below")];
        assert_eq!(top(&mounts, Path::new("/m")).unwrap().id, 2);
        assert_eq!(top(&mounts, Path::new("/elsewhere")), None);
    }

    #[test]
    fn reads_this_machine() {
        let mounts = read().unwrap();
        assert!(top(&mounts, Path::new("/proc")).is_some());
    }
}
