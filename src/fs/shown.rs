//! `.vmailfs` at the mount's root: what the mount says of itself, as text files.
//!
//! The directory is found by name and not listed, so a walk over the mount does not meet it. No
//! user can have such a name (names with a leading dot are none); where the layout itself has a
//! directory of this name, that one is shown.
//!
//! A file's text is made when it is opened, and stays the same for as long as the handle lives.
//! Whoever opens a file again within a moment gets the same text, so nobody keeps the mount busy by
//! opening it in a loop; how many may be open is bounded, too.

use super::api::{Attr, DirEntry, Fh, FileKind, Found, Ino, Lookup, Need, OpenMode, Opened, Step};
use super::attr;
use super::calls::{VmailFs, plain};
use crate::format::Timestamp;
use crate::format::listing::Owner;
use crate::vmail::error::{Error, Plain};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// The directory.
pub const DIR: &[u8] = b".vmailfs";
/// For how long a text is fresh.
const FRESH: Duration = Duration::from_millis(250);
/// Files open at a time.
const OPEN: usize = 256;

/// Makes the text of the file with this name.
pub type Make = Box<dyn Fn(&'static str) -> BoxFuture<'static, String> + Send + Sync>;

#[derive(Debug, Clone)]
struct Text {
    bytes: Arc<str>,
    made: Duration,
    mtime: Timestamp,
}

/// The directory's files.
pub struct Shown {
    owner: Owner,
    names: &'static [&'static str],
    make: Make,
    texts: Mutex<HashMap<&'static str, Text>>,
    open: Mutex<HashMap<Fh, Arc<str>>>,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Shown {
    /// `names` in the order of a listing.
    pub fn new(owner: Owner, names: &'static [&'static str], make: Make) -> Shown {
        Shown { owner, names, make, texts: Mutex::default(), open: Mutex::default() }
    }

    fn file(&self, name: &[u8]) -> Option<&'static str> {
        self.names.iter().copied().find(|n| n.as_bytes() == name)
    }
}

/// What an open waits for.
struct MakeText(&'static str);

/// A need of this module, or what it was.
pub(super) enum Ours {
    Text(&'static str),
    Other(Need),
}

impl Ours {
    pub(super) fn of(need: Need) -> Ours {
        match need.try_downcast::<MakeText>() {
            Ok(MakeText(name)) => Ours::Text(name),
            Err(need) => Ours::Other(need),
        }
    }
}

impl VmailFs {
    /// Shows the directory from now on. Once in a mount's life.
    pub fn show(&self, shown: Shown) {
        if self.session.settings.layout.prefix_possible(&[DIR]) {
            tracing::warn!("the layout has a directory .vmailfs: the mount's own is not shown");
        } else if self.shown.set(shown).is_err() {
            tracing::error!(".vmailfs was set up twice");
        }
    }

    /// The directory or one of its files, by the path of what is above the users.
    fn shown_at(&self, path: &[Vec<u8>]) -> Option<(&Shown, Option<&'static str>)> {
        let shown = self.shown.get()?;
        match path {
            [dir] if dir == DIR => Some((shown, None)),
            [dir, name] if dir == DIR => Some((shown, Some(shown.file(name)?))),
            _ => None,
        }
    }

    pub(super) fn is_shown(&self, path: &[Vec<u8>]) -> bool {
        self.shown_at(path).is_some()
    }

    pub(super) fn shown_attr(&self, path: &[Vec<u8>], ino: Ino) -> Option<Attr> {
        let (shown, name) = self.shown_at(path)?;
        let dir = Attr { cacheable: false, ..attr::above(&self.session, ino) };
        let (owner, mode) = (shown.owner, 0o550);
        let dir = Attr { uid: owner.uid, gid: owner.gid, mode, ..dir };
        let Some(name) = name else { return Some(dir) };
        let (kind, mode) = (FileKind::Regular, 0o440);
        let file = Attr { kind, mode, size: 0, ..dir };
        Some(match shown.texts.lock().get(name) {
            None => file,
            Some(text) => Attr {
                size: text.bytes.len() as u64,
                atime: text.mtime,
                mtime: text.mtime,
                ctime: text.mtime,
                ..file
            },
        })
    }

    /// A lookup in the mount's root or in the directory; `None`: of something else.
    pub(super) fn lookup_shown(&self, path: &[Vec<u8>], name: &[u8]) -> Option<Step<Lookup>> {
        let shown = self.shown.get()?;
        let of_ours = match path {
            [] => name == DIR,
            [dir] => dir == DIR,
            _ => false,
        };
        if !of_ours {
            return None;
        }
        if !path.is_empty() && shown.file(name).is_none() {
            return Some(Step::Done(Ok(Lookup::Absent { cacheable: false })));
        }
        let mut full = path.to_vec();
        full.push(name.to_vec());
        let parts: Vec<&[u8]> = full.iter().map(Vec::as_slice).collect();
        let attr = self.shown_attr(&full, self.above_ino(&parts))?;
        Some(Step::Done(Ok(Lookup::Found(Found { attr, cacheable: false }))))
    }

    pub(super) fn list_shown(
        &self,
        ino: Ino,
        cookie: u64,
        emit: &mut dyn FnMut(&DirEntry) -> bool,
    ) -> Step<()> {
        let names = self.shown.get().map_or(&[][..], |shown| shown.names);
        let dots =
            [(".", ino, FileKind::Directory), ("..", super::above::ROOT, FileKind::Directory)];
        let files = names
            .iter()
            .map(|name| (*name, self.above_ino(&[DIR, name.as_bytes()]), FileKind::Regular));
        for (at, (name, ino, kind)) in (1..).zip(dots.into_iter().chain(files)) {
            let entry = DirEntry { ino, name: name.into(), kind, cookie: at };
            if at > cookie && !emit(&entry) {
                break;
            }
        }
        Step::Done(Ok(()))
    }

    /// Opens something above the users; only these files can be.
    pub(super) fn open_shown(&self, path: &[Vec<u8>], how: OpenMode) -> Step<Opened> {
        let Some((shown, Some(name))) = self.shown_at(path) else { return plain(Plain::IsDir) };
        if how.write || how.truncate {
            return plain(Plain::Access);
        }
        let now = self.session.env.clock.boot();
        let text = match shown.texts.lock().get(name) {
            Some(text) if now.saturating_sub(text.made) < FRESH => text.bytes.clone(),
            _ => return Step::Wait(Need::new(MakeText(name))),
        };
        let mut open = shown.open.lock();
        if open.len() >= OPEN {
            let full = Error::Full("too many files of .vmailfs are open".into());
            return Step::Done(Err(full.answer()));
        }
        let fh = self.handles.number();
        open.insert(fh, text);
        Step::Done(Ok(Opened {
            fh,
            keep_cache: false,
            uncached: true,
            backing: None,
            quiet_close: false,
        }))
    }

    pub(super) async fn make_shown(&self, name: &'static str) {
        let Some(shown) = self.shown.get() else { return };
        let bytes: Arc<str> = (shown.make)(name).await.into();
        let clock = &self.session.env.clock;
        let text = Text { bytes, made: clock.boot(), mtime: clock.wall() };
        shown.texts.lock().insert(name, text);
    }

    /// The text of a handle, if it is one of these.
    fn shown_text(&self, fh: Fh) -> Option<Arc<str>> {
        self.shown.get()?.open.lock().get(&fh).cloned()
    }

    pub(super) fn has_shown(&self, fh: Fh) -> bool {
        self.shown_text(fh).is_some()
    }

    pub(super) fn read_shown(&self, fh: Fh, offset: u64, size: u32) -> Step<Vec<u8>> {
        let Some(text) = self.shown_text(fh) else { return plain(Plain::BadHandle) };
        let bytes = text.as_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let to = from.saturating_add(size as usize).min(bytes.len());
        Step::Done(Ok(bytes[from..to].to_vec()))
    }

    pub(super) fn release_shown(&self, fh: Fh) {
        if let Some(shown) = self.shown.get() {
            shown.open.lock().remove(&fh);
        }
    }
}
