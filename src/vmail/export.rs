//! A state of a user as ordinary files in a directory.
//!
//! Names and contents come from the store and are not trusted (I9). The directory is new or
//! empty, directories and files are only ever created in it (never opened, never replaced), so
//! no name can lead out of it; symbolic links are made last, when nothing is written through
//! a path any more. Modes lose set-id bits, which mail does not need and which a stranger's store
//! must not give to files that root makes.

use super::error::{Error, Result};
use super::history::State;
use super::publish::blocking;
use super::stored::{FolderState, Paths, Stored};
use super::tree::NameBytes;
use crate::format::head::HeadFolder;
use crate::format::key::{KeyTail, file_key, mail_key};
use crate::format::listing::{Attrs, Entry, Owner};
use crate::format::{ObjectId, Place, Sub, Timestamp};
use crate::store::StoreError;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Objects fetched at the same time.
const AT_ONCE: usize = 16;

/// What was written, and what could not be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exported {
    pub folders: u64,
    /// Mails, a file of many counting as one.
    pub mails: u64,
    /// Index files and others.
    pub files: u64,
    pub bytes: u64,
    /// Paths below the directory that are not there, each with the reason.
    pub missing: Vec<(String, String)>,
}

/// Writes a state into `dir`, which is made, or must be empty. Mails whose objects are gone
/// or damaged are left out and told.
///
/// # Errors
/// [`Error::Refused`] for a directory that holds something; a store that does not answer; a
/// folder that cannot be read; a full disk.
pub async fn export(stored: &Stored, state: &State, dir: &Path) -> Result<Exported> {
    let mut tree = Target::make(dir, state.head.root_owner, state.time)?;
    let mut out = Exported::default();
    let head = &state.head;
    let paths = Paths::new(head);
    let mut folders: Vec<(Vec<NameBytes>, &HeadFolder)> =
        head.folders.iter().map(|f| (paths.of(Place::own(f.id)), f)).collect();
    // A folder comes after the one it lies in.
    folders.sort_by(|a, b| a.0.cmp(&b.0));
    let mut links = Vec::new();
    for (path, folder) in folders {
        let found = stored.folder(folder).await?;
        out.folders += 1;
        let at = tree.path(&path);
        let root = path.is_empty();
        let own = found.listing.dirs[Sub::Own as usize];
        tree.directory(&at, own.or(root.then_some(root_attrs(head))))?;
        for sub in [Sub::Cur, Sub::New, Sub::Tmp] {
            // A folder that lies in `cur` needs the directory, whatever the listing says.
            if let Some(attrs) = found.listing.dirs[sub as usize] {
                tree.directory(&at.join(sub.as_str()), Some(attrs))?;
            }
        }
        write_folder(stored, &mut tree, &at, found, &mut links, &mut out).await?;
    }
    tree.finish(links)?;
    Ok(out)
}

fn root_attrs(head: &crate::format::head::Head) -> Attrs {
    Attrs { mode: head.root_mode, owner: None, mtime: Timestamp { secs: head.written, nanos: 0 } }
}

/// A symbolic link to be made: where, and to what.
type Link = (PathBuf, Vec<u8>);

async fn write_folder(
    stored: &Stored,
    tree: &mut Target,
    at: &Path,
    found: FolderState,
    links: &mut Vec<Link>,
    out: &mut Exported,
) -> Result<()> {
    let FolderState { listing, mut contents } = found;
    let mut mails = Vec::new();
    for (sub, name, entry) in listing.into_names() {
        let path = place(at, sub, &name);
        if let Some(parent) = path.parent() {
            tree.directory(parent, None)?;
        }
        match entry {
            Entry::Symlink { target, .. } => links.push((path, target)),
            Entry::Local { attrs, object, size } => {
                let content = match (contents.remove(&(sub, name)), object) {
                    (Some(content), _) => Some(Bytes::from(content)),
                    (None, Some(object)) => large_file(stored, object, size).await?,
                    (None, None) => None,
                };
                match content {
                    Some(content) => {
                        out.files += 1;
                        out.bytes += content.len() as u64;
                        tree.file(&path, &[content], attrs)?;
                    }
                    // A cache that did not travel is no loss.
                    None if is_cache(&path) => {}
                    None => out.missing.push((tree.relative(&path), "in no bundle".into())),
                }
            }
            Entry::Mail { attrs, object, size } => {
                mails.push((path, attrs, vec![(object, size)]));
            }
            Entry::Extents { attrs, extents, .. } => {
                mails.push((path, attrs, extents.into_iter().map(|e| (e.object, e.len)).collect()));
            }
        }
    }
    let fetched = stream::iter(mails)
        .map(|(path, attrs, pieces)| async move {
            let content = pieces_of(stored, &pieces).await?;
            Ok::<_, Error>((path, attrs, content))
        })
        .buffer_unordered(AT_ONCE);
    let target = &*tree;
    fetched
        .try_fold(out, |out, (path, attrs, content)| async move {
            match content {
                Ok(pieces) => {
                    out.mails += 1;
                    out.bytes += pieces.iter().map(|p| p.len() as u64).sum::<u64>();
                    target.file(&path, &pieces, attrs)?;
                }
                Err(why) => out.missing.push((target.relative(&path), why)),
            }
            Ok(out)
        })
        .await?;
    Ok(())
}

fn place(at: &Path, sub: Sub, name: &[u8]) -> PathBuf {
    let dir = if sub == Sub::Own { at.to_path_buf() } else { at.join(sub.as_str()) };
    dir.join(OsStr::from_bytes(name))
}

fn is_cache(path: &Path) -> bool {
    path.file_name().is_some_and(|n| crate::dovecot::classes::classify(&[n.as_bytes()]).is_cache())
}

async fn large_file(stored: &Stored, object: ObjectId, size: u64) -> Result<Option<Bytes>> {
    let key = file_key(&stored.user, object);
    match stored.store.get(&key, None, size, stored.why).await {
        Ok((_, bytes)) => Ok(Some(bytes)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(e) => Err(stored.failed(e)),
    }
}

type Pieces = std::result::Result<Vec<Bytes>, String>;

/// The bytes of a mail's objects; an inner error for what is gone or not what was published.
async fn pieces_of(stored: &Stored, pieces: &[(KeyTail, u64)]) -> Result<Pieces> {
    let mut out = Vec::with_capacity(pieces.len());
    for (object, len) in pieces {
        match mail_bytes(stored, object).await? {
            Ok(bytes) => match usize::try_from(*len).ok().filter(|len| *len <= bytes.len()) {
                Some(len) => out.push(bytes.slice(..len)),
                None => return Ok(Err(format!("object {object} is too short"))),
            },
            Err(why) => return Ok(Err(why)),
        }
    }
    Ok(Ok(out))
}

/// A mail object's bytes, checked against its key.
///
/// # Errors
/// A store that does not answer. The inner error says what is wrong with the object.
pub async fn mail_bytes(
    stored: &Stored,
    object: &KeyTail,
) -> Result<std::result::Result<Bytes, String>> {
    /// No mail is larger.
    const LIMIT: u64 = 16 << 30;
    match stored.store.get(&mail_key(&stored.user, object), None, LIMIT, stored.why).await {
        Ok((_, bytes)) => {
            let object = object.clone();
            let (bytes, good) = blocking(move || {
                let good = crc32c::crc32c(&bytes) == object.decode().crc;
                (bytes, good)
            })
            .await?;
            Ok(if good { Ok(bytes) } else { Err("its bytes are not what was published".into()) })
        }
        Err(StoreError::NotFound { .. }) => Ok(Err("its object is gone from the store".into())),
        Err(e @ StoreError::BadBody { .. }) => Ok(Err(e.to_string())),
        Err(e) => Err(stored.failed(e)),
    }
}

/// The directory that is written.
struct Target {
    root: PathBuf,
    owner: Owner,
    /// For directories of which the listing says nothing.
    written: i64,
    /// Only root can give files away.
    chown: bool,
    /// Directories made so far, with what they are to be in the end.
    made: BTreeMap<PathBuf, Option<Attrs>>,
}

fn disk(path: &Path) -> impl Fn(io::Error) -> Error + '_ {
    move |e| Error::disk(path.display().to_string(), &e)
}

impl Target {
    fn make(root: &Path, owner: Owner, written: i64) -> Result<Target> {
        match std::fs::DirBuilder::new().mode(0o700).create(root) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let found = std::fs::symlink_metadata(root).map_err(disk(root))?;
                let empty =
                    found.is_dir() && std::fs::read_dir(root).map_err(disk(root))?.next().is_none();
                if !empty {
                    let text = format!("{}: name a new or an empty directory", root.display());
                    return Err(Error::Refused(text));
                }
            }
            Err(e) => return Err(disk(root)(e)),
        }
        let chown = nix::unistd::geteuid().is_root();
        let made = BTreeMap::from([(root.to_path_buf(), None)]);
        Ok(Target { root: root.to_path_buf(), owner, written, chown, made })
    }

    fn path(&self, names: &[NameBytes]) -> PathBuf {
        names.iter().fold(self.root.clone(), |path, name| path.join(OsStr::from_bytes(name)))
    }

    fn relative(&self, path: &Path) -> String {
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        let names = below.iter().map(|n| crate::format::escape::escape(n.as_bytes()));
        names.collect::<Vec<_>>().join("/")
    }

    /// Makes a directory of ours unless it is there, and notes what it is to be.
    fn directory(&mut self, path: &Path, attrs: Option<Attrs>) -> Result<()> {
        if let Some(known) = self.made.get_mut(path) {
            *known = attrs.or(*known);
            return Ok(());
        }
        if let Some(parent) = path.parent().filter(|p| p.starts_with(&self.root)) {
            self.directory(parent, None)?;
        }
        std::fs::DirBuilder::new().mode(0o700).create(path).map_err(disk(path))?;
        self.made.insert(path.to_path_buf(), attrs);
        Ok(())
    }

    fn file(&self, path: &Path, pieces: &[Bytes], attrs: Attrs) -> Result<()> {
        let failed = disk(path);
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(&failed)?;
        for piece in pieces {
            file.write_all(piece).map_err(&failed)?;
        }
        self.attributes(&file, attrs, 0o777).map_err(failed)
    }

    fn attributes(&self, file: &std::fs::File, attrs: Attrs, bits: u32) -> io::Result<()> {
        if self.chown {
            let owner = attrs.owner.unwrap_or(self.owner);
            std::os::unix::fs::fchown(file, Some(owner.uid), Some(owner.gid))?;
        }
        file.set_permissions(std::fs::Permissions::from_mode(attrs.mode & bits))?;
        let time = system_time(attrs.mtime);
        file.set_times(std::fs::FileTimes::new().set_accessed(time).set_modified(time))
    }

    /// Links, then the directories' own times, from the inside out.
    fn finish(self, links: Vec<Link>) -> Result<()> {
        for (path, target) in links {
            std::os::unix::fs::symlink(OsStr::from_bytes(&target), &path).map_err(disk(&path))?;
        }
        for (path, attrs) in self.made.iter().rev() {
            let failed = disk(path);
            let dir = std::fs::File::open(path).map_err(&failed)?;
            let now = Timestamp { secs: self.written, nanos: 0 };
            let attrs = attrs.unwrap_or(Attrs { mode: 0o700, owner: None, mtime: now });
            self.attributes(&dir, attrs, 0o2777).map_err(failed)?;
        }
        Ok(())
    }
}

fn system_time(time: Timestamp) -> std::time::SystemTime {
    use std::time::{Duration, UNIX_EPOCH};
    let nanos = Duration::from_nanos(u64::from(time.nanos));
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let base = match time.secs {
        0.. => UNIX_EPOCH.checked_add(whole),
        _ => UNIX_EPOCH.checked_sub(whole),
    };
    base.and_then(|base| base.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}
