//! Keys of objects in the store.
//!
//! A mail's key says everything that rebuilds its listing entry, for a mail is safe from the
//! moment its object is stored, before any listing that names it has left this machine (I1).

use super::escape::{clip, escape_key, is_name, unescape_key};
use super::listing::{hex, mode, number};
use super::{Epoch, FolderId, FormatError, ObjectId, Timestamp};
use std::fmt;

/// The last component of a mail object's key, already validated. Everything that is needed to
/// rebuild a lost listing entry can be read from it: see [`MailKey`].
///
/// A folder holds one for each of its mails in memory, so it keeps the fields, in
/// [`KeyTail::FIXED`] bytes with the name behind them, and not the text, which is half as long
/// again. Equal fields are equal bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct KeyTail(Box<[u8]>);

/// What an object holds of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// All of it.
    Whole,
    /// The bytes from `offset` on; a later extent at an earlier offset cuts what lay beyond it.
    /// `predecessor` is the extent that ends where this one begins.
    Extent { offset: u64, predecessor: Option<ObjectId> },
}

/// The meaning of a [`KeyTail`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailKey {
    pub id: ObjectId,
    pub folder: FolderId,
    pub mtime: Timestamp,
    pub mode: u32,
    /// CRC-32C of the object's bytes.
    pub crc: u32,
    pub piece: Piece,
    /// The file's name when it was published (Maildir: its base name completed by `,S=,W=`).
    /// `None`: it did not fit the key and is in the object's metadata.
    pub name: Option<Vec<u8>>,
}

/// Metadata of a mail object: the folder's path below the user's root, see [`meta_folder`].
pub const META_FOLDER: &str = "vmailfs-folder";
/// Metadata of a mail object: the file's name, by [`escape_key`], where the key has no room.
pub const META_NAME: &str = "vmailfs-name";
/// Metadata of a mail object: ids, separated by spaces, under which the same file was put, or may
/// have been put, before. One file published twice is one mail; two files that had one name after
/// another are two.
pub const META_REPLACES: &str = "vmailfs-replaces";
/// Metadata: the user's name, by [`escape_key`], where the directory holds only its hash.
pub const META_USER: &str = "vmailfs-user";

/// The longest value of [`META_FOLDER`], in bytes. With a name and a user's name it stays
/// within the 2048 bytes that S3 allows for all metadata of an object.
pub const META_FOLDER_MAX: usize = 800;

/// The longest user directory that spells out the user's name, in bytes.
const USER_DIR_MAX: usize = 200;
/// What starts a user directory that is a hash; [`escape_key`] makes no such text.
const HASHED: &str = "_-";
/// A key tail's name where the name is in the metadata; [`escape_key`] makes no such text.
const NO_NAME: &str = "_";

fn parse_mtime(text: &str) -> Option<Timestamp> {
    let (secs, nanos) = text.split_once('-')?;
    let secs = match secs.strip_prefix('n') {
        Some("0") => return None,
        Some(secs) => 0i64.checked_sub_unsigned(number(secs)?)?,
        None => i64::try_from(number(secs)?).ok()?,
    };
    if nanos.len() != 9 || !nanos.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(Timestamp { secs, nanos: nanos.parse().ok()? })
}

fn parse_piece(text: &str) -> Option<Piece> {
    if text == "m" {
        return Some(Piece::Whole);
    }
    let (offset, predecessor) = text.strip_prefix('x')?.split_once('-')?;
    let offset = hex(offset, 16)?;
    let predecessor = match predecessor {
        "0" => None,
        id => Some(id.parse().ok()?),
    };
    Some(Piece::Extent { offset, predecessor })
}

fn parse_tail(text: &str) -> Option<MailKey> {
    let mut fields = text.splitn(7, '.');
    let key = MailKey {
        id: fields.next()?.parse().ok()?,
        folder: fields.next()?.parse().ok()?,
        mtime: parse_mtime(fields.next()?)?,
        mode: mode(fields.next()?)?,
        crc: u32::try_from(hex(fields.next()?, 8)?).ok()?,
        piece: parse_piece(fields.next()?)?,
        name: match fields.next()? {
            NO_NAME => None,
            name => Some(unescape_key(name).ok().filter(|name| is_name(name))?),
        },
    };
    Some(key)
}

/// Takes the fields of a packed key one by one.
struct Packed<'a>(&'a [u8]);

impl Packed<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().map_or(([0; N], &[][..]), |(f, r)| (*f, r));
        self.0 = rest;
        field
    }

    fn id(&mut self) -> ObjectId {
        let epoch = Epoch(u32::from_be_bytes(self.take()));
        let counter: [u8; 6] = self.take();
        let counter = counter.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        ObjectId { epoch, counter }
    }
}

fn put_id(id: ObjectId, out: &mut Vec<u8>) {
    out.extend_from_slice(&id.epoch.0.to_be_bytes());
    out.extend_from_slice(&id.counter.to_be_bytes()[2..]);
}

impl KeyTail {
    /// The longest text, in bytes.
    pub const MAX_LEN: usize = 200;
    /// Length of the packed fields of a whole mail without its name.
    const FIXED: usize = 37;

    const WHOLE: u8 = 0;
    const FIRST_EXTENT: u8 = 1;
    const EXTENT: u8 = 2;

    /// Reads a text that [`MailKey::encode`] made.
    ///
    /// # Errors
    /// [`FormatError::Malformed`] for any other text.
    pub fn parse(text: &str) -> Result<KeyTail, FormatError> {
        let key = (text.len() <= Self::MAX_LEN).then(|| parse_tail(text)).flatten();
        Ok(KeyTail::pack(&key.ok_or_else(|| FormatError::malformed("mail key", clip(text)))?))
    }

    /// Of fields that all have a text form.
    fn pack(key: &MailKey) -> KeyTail {
        let name = key.name.as_deref().unwrap_or_default();
        let mut out = Vec::with_capacity(Self::FIXED + name.len());
        put_id(key.id, &mut out);
        out.extend_from_slice(&key.folder.0.to_be_bytes());
        out.extend_from_slice(&key.mtime.secs.to_be_bytes());
        out.extend_from_slice(&key.mtime.nanos.to_be_bytes());
        out.extend_from_slice(&(key.mode as u16).to_be_bytes());
        out.extend_from_slice(&key.crc.to_be_bytes());
        match key.piece {
            Piece::Whole => out.push(Self::WHOLE),
            Piece::Extent { offset, predecessor: None } => {
                out.push(Self::FIRST_EXTENT);
                out.extend_from_slice(&offset.to_be_bytes());
            }
            Piece::Extent { offset, predecessor: Some(before) } => {
                out.push(Self::EXTENT);
                out.extend_from_slice(&offset.to_be_bytes());
                put_id(before, &mut out);
            }
        }
        out.extend_from_slice(name);
        KeyTail(out.into())
    }

    /// What it says.
    pub fn decode(&self) -> MailKey {
        let mut fields = Packed(&self.0);
        MailKey {
            id: fields.id(),
            folder: FolderId(u64::from_be_bytes(fields.take())),
            mtime: Timestamp {
                secs: i64::from_be_bytes(fields.take()),
                nanos: u32::from_be_bytes(fields.take()),
            },
            mode: u32::from(u16::from_be_bytes(fields.take())),
            crc: u32::from_be_bytes(fields.take()),
            piece: match fields.take() {
                [Self::WHOLE] => Piece::Whole,
                [kind] => {
                    let offset = u64::from_be_bytes(fields.take());
                    let predecessor = (kind == Self::EXTENT).then(|| fields.id());
                    Piece::Extent { offset, predecessor }
                }
            },
            // No file has the empty name.
            name: Some(fields.0.to_vec()).filter(|name| !name.is_empty()),
        }
    }

    /// The object's id, without decoding the rest.
    pub fn id(&self) -> ObjectId {
        Packed(&self.0).id()
    }
}

impl fmt::Display for KeyTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.decode().text().0)
    }
}

impl fmt::Debug for KeyTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyTail({self})")
    }
}

impl MailKey {
    /// The key, and whether the name has to go to the metadata ([`META_NAME`]) because the text
    /// would be longer than [`KeyTail::MAX_LEN`] with it. A name that no directory can hold is
    /// left out likewise. Of the other fields the parts that have no text form are cut off:
    /// mode bits above `0o7777`, counters above [`ObjectId::MAX_COUNTER`], nanoseconds above
    /// 999,999,999.
    pub fn encode(&self) -> (KeyTail, bool) {
        let id = |id: ObjectId| ObjectId { counter: id.counter & ObjectId::MAX_COUNTER, ..id };
        let mut key = MailKey {
            id: id(self.id),
            folder: self.folder,
            mtime: Timestamp { nanos: self.mtime.nanos.min(999_999_999), ..self.mtime },
            mode: self.mode & 0o7777,
            crc: self.crc,
            piece: match self.piece {
                Piece::Whole => Piece::Whole,
                Piece::Extent { offset, predecessor } => {
                    Piece::Extent { offset, predecessor: predecessor.map(id) }
                }
            },
            name: self.name.clone().filter(|name| is_name(name)),
        };
        if !key.text().1 {
            key.name = None;
        }
        (KeyTail::pack(&key), key.name.is_none() && self.name.is_some())
    }

    /// The text, and whether it holds the name: not where it would be too long with it.
    fn text(&self) -> (String, bool) {
        let sign = if self.mtime.secs < 0 { "n" } else { "" };
        let piece = match self.piece {
            Piece::Whole => "m".to_string(),
            Piece::Extent { offset, predecessor: None } => format!("x{offset:016x}-0"),
            Piece::Extent { offset, predecessor: Some(before) } => {
                format!("x{offset:016x}-{before}")
            }
        };
        let mut text = format!(
            "{}.{}.{sign}{}-{:09}.{:04o}.{:08x}.{piece}.",
            self.id,
            self.folder,
            self.mtime.secs.unsigned_abs(),
            self.mtime.nanos,
            self.mode,
            self.crc,
        );
        match self.name.as_deref().map(escape_key) {
            Some(name) if text.len() + name.len() <= KeyTail::MAX_LEN => {
                text.push_str(&name);
                (text, true)
            }
            _ => {
                text.push_str(NO_NAME);
                (text, false)
            }
        }
    }
}

/// The directory of a user in the store: `<hh>/<user>`, without a final `/`. `<hh>` are the first
/// two hex digits of the name's BLAKE3 hash, `<user>` is [`escape_key`] of the name, or, where
/// that is longer than 200 bytes, `_-` and the 64 hex digits of the hash.
pub fn user_dir(user: &str) -> String {
    let hash = blake3::hash(user.as_bytes()).to_hex();
    let name = escape_key(user.as_bytes());
    if name.len() > USER_DIR_MAX {
        format!("{}/{HASHED}{hash}", &hash[..2])
    } else {
        format!("{}/{name}", &hash[..2])
    }
}

/// Whether the last component of a user's directory is a hash. The name is in the user's head,
/// and in the metadata of each of the user's mails ([`META_USER`]).
pub fn is_hashed_user_dir(component: &str) -> bool {
    component.strip_prefix(HASHED).is_some_and(|hash| {
        hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The user whose directory has this last component.
///
/// # Errors
/// [`FormatError::Malformed`] if it is no user's directory, or a hashed one
/// ([`is_hashed_user_dir`]).
pub fn parse_user_dir(component: &str) -> Result<String, FormatError> {
    if component.len() > USER_DIR_MAX {
        return Err(FormatError::malformed("user's directory", clip(component)));
    }
    String::from_utf8(unescape_key(component)?)
        .map_err(|_| FormatError::malformed("user's directory", clip(component)))
}

/// The key of a user's head.
pub fn head_key(user: &str) -> String {
    user_dir(user) + "/head"
}

/// The directory of a user's mail objects, without a final `/`.
pub fn mail_dir(user: &str) -> String {
    user_dir(user) + "/mail"
}

/// The key of a mail object.
pub fn mail_key(user: &str, tail: &KeyTail) -> String {
    format!("{}/mail/{tail}", user_dir(user))
}

/// The key of a bundle.
pub fn bundle_key(user: &str, id: ObjectId) -> String {
    format!("{}/bundle/{id}.tar.zst", user_dir(user))
}

/// The key of a large local file's object.
pub fn file_key(user: &str, id: ObjectId) -> String {
    format!("{}/file/{id}", user_dir(user))
}

/// The key of a backend's lease and state.
pub fn backend_key(name: &str) -> String {
    format!("backends/{}", escape_key(name.as_bytes()))
}

/// The value of [`META_FOLDER`]: the names from below the user's root down to the folder, each by
/// [`escape_key`], joined by `/`; for the root folder `_`. Where that is longer than
/// [`META_FOLDER_MAX`] leading names are left out and a `_` stands first.
pub fn meta_folder<'a>(path: impl IntoIterator<Item = &'a [u8]>) -> String {
    let names: Vec<String> = path.into_iter().map(escape_key).collect();
    if names.is_empty() {
        return NO_NAME.to_string();
    }
    let mut len = names.iter().map(|name| name.len() + 1).sum::<usize>() - 1;
    let mut from = 0;
    while len > META_FOLDER_MAX && from + 1 < names.len() {
        len -= names[from].len() + 1;
        if from == 0 {
            len += NO_NAME.len() + 1;
        }
        from += 1;
    }
    let kept = names[from..].join("/");
    if from == 0 { kept } else { format!("{NO_NAME}/{kept}") }
}

/// The names that [`meta_folder`] joined, and whether all of them are there.
///
/// # Errors
/// [`FormatError::Malformed`] if the text is something else.
pub fn parse_meta_folder(text: &str) -> Result<(Vec<Vec<u8>>, bool), FormatError> {
    let bad = || FormatError::malformed("folder in metadata", clip(text));
    if text == NO_NAME {
        return Ok((Vec::new(), true));
    }
    let (names, all) = match text.strip_prefix("_/") {
        Some(kept) => (kept, false),
        None => (text, true),
    };
    let names = names
        .split('/')
        .map(|name| unescape_key(name).ok().filter(|name| is_name(name)).ok_or_else(bad))
        .collect::<Result<_, _>>()?;
    Ok((names, all))
}
