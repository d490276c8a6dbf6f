//! Recovering mdbox: mails in `m.N` that neither the map nor any folder knows.
//!
//! A mail of mdbox needs two entries: one in the map (`storage/dovecot.map.index`: where it
//! lies, how many folders hold it) and one in its folder (UID, map UID, GUID). Both come from
//! one cut, so together they are an older state of the whole storage, and what the recovered
//! ranges of `m.N` hold on top of it was written later. For each mail found there:
//!
//! - the map knows its place and a folder holds it: nothing to do;
//! - the map knows its place with a reference count of 0: it was expunged, and stays so (the
//!   count goes down before the folder's expunge is logged, so 0 is certain);
//! - the map counts a reference that no folder holds: a delivery that the cut went through. The
//!   map is written before the folder and the delivery may have been acknowledged since, so the
//!   mail is put into its folder (unless `restore_unreferenced` is off);
//! - the map does not know it, but its GUID is live: the copy that a purge made. It gets a map
//!   entry without references, so that the next purge removes it;
//! - else it is new: a map entry, and an entry in the folder its `B` line names, or INBOX.
//!
//! Counts that are lower than what the folders hold (a COPY that the cut went through) are
//! raised, never lowered: too high costs space, too low loses mail at the next purge.
//!
//! Write the map's bytes first, then the folders'. A crash in between leaves map entries with a
//! count of 1 that no folder holds, which the next recovery puts into their folders as above.
//! The map's tail is set to its end, as Dovecot takes any difference for a crash and rebuilds.

use std::collections::{HashMap, HashSet};

use super::{
    dbox_file::{self, DboxMail},
    recover::{LogAppend, RecoverError},
};
use parts::{Map, NO_GUID, guid_of, map_uid_of, open_folders};

/// A folder of the storage.
#[derive(Debug, Clone, Copy)]
pub struct MdboxFolder<'a> {
    /// As `B` lines name it: the path below `mailboxes`, levels separated by `/`.
    pub name: &'a [u8],
    pub snapshot: Option<&'a [u8]>,
    /// Oldest first. Empty: the folder has no index yet, and is not used.
    pub logs: &'a [&'a [u8]],
    /// Its UID ceiling; 0 for none.
    pub at_least: u32,
}

/// A stretch of a file `m.<file>`.
#[derive(Debug, Clone, Copy)]
pub struct MdboxRange<'a> {
    pub file: u32,
    pub offset: u64,
    pub bytes: &'a [u8],
}

/// What a recovery starts from. **All** folders of the storage must be given.
#[derive(Debug, Clone, Copy)]
pub struct MdboxInput<'a> {
    pub map_snapshot: Option<&'a [u8]>,
    /// Oldest first.
    pub map_logs: &'a [&'a [u8]],
    pub folders: &'a [MdboxFolder<'a>],
    /// Later ones win where they overlap.
    pub ranges: &'a [MdboxRange<'a>],
    /// The highest number of any `m.N` that exists.
    pub highest_file: u32,
    /// The save date of recovered mails, seconds since 1970.
    pub save_date: u32,
    /// Put a mail back that the map counts and no folder holds, if its bytes are given.
    pub restore_unreferenced: bool,
}

/// Where a mail lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    pub map_uid: u32,
    pub file: u32,
    pub offset: u32,
    pub size: u32,
}

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MdboxOutput {
    /// For the newest `storage/dovecot.map.index.log`. Write it first.
    pub map: LogAppend,
    /// For each folder given, in that order; `None` for those without an index.
    pub folders: Vec<Option<LogAppend>>,
    /// Mails put into a folder: (number of the folder, UID), in storage order.
    pub placed: Vec<(usize, u32)>,
    /// Of them, those whose own folder is not there, now in INBOX.
    pub redirected: usize,
    /// Copies of live mails, left for the next purge.
    pub copies: usize,
    /// The map counts a reference to them, no folder holds them, and their bytes were not given
    /// (or restoring is off). Given in another run, they are put back.
    pub unreferenced: Vec<MapEntry>,
    /// Entries of folders whose map entry is missing and whose mail was not found.
    pub dangling: usize,
}

/// Brings recovered mails into the map and their folders; see the module's text.
///
/// # Errors
/// [`RecoverError::NeedsRebuild`] when only Dovecot's own rebuild can help: the map or a
/// folder's index cannot be read, or they do not belong together. Raise every folder's next-UID
/// and mark every folder ([`super::recover::mark_fsckd`]).
pub fn recover_mdbox(input: &MdboxInput<'_>) -> Result<MdboxOutput, RecoverError> {
    let mut map = Map::open(input)?;
    let mut folders = open_folders(input, map.state.uid_validity)?;

    let mut live = HashSet::new();
    let mut dangling: HashMap<[u8; 16], Vec<(usize, u32)>> = HashMap::new();
    let mut lost = 0;
    for (number, folder) in folders.iter().enumerate() {
        let Some(folder) = folder else { continue };
        for uid in folder.state.records.keys() {
            let map_uid = map_uid_of(&folder.state, *uid);
            let guid = guid_of(&folder.state, *uid);
            if map.state.records.contains_key(&map_uid) {
                *map.held.entry(map_uid).or_default() += 1;
                live.insert(guid);
            } else if guid != NO_GUID {
                dangling.entry(guid).or_default().push((number, *uid));
            } else {
                lost += 1;
            }
        }
    }
    live.remove(&NO_GUID);

    let inbox = input
        .folders
        .iter()
        .zip(&folders)
        .position(|(f, state)| f.name.eq_ignore_ascii_case(b"INBOX") && state.is_some());
    let by_name: HashMap<&[u8], usize> = (input.folders.iter().enumerate())
        .filter(|(n, _)| folders[*n].is_some())
        .map(|(n, f)| (f.name, n))
        .collect();

    let mut out = MdboxOutput {
        map: LogAppend { at: 0, bytes: Vec::new() },
        folders: Vec::new(),
        placed: Vec::new(),
        redirected: 0,
        copies: 0,
        unreferenced: Vec::new(),
        dangling: 0,
    };
    let mut placed: HashSet<([u8; 16], u64)> = HashSet::new();
    let mut restored: HashSet<u32> = HashSet::new();
    for (file, mail) in mails_in(input.ranges) {
        let (Ok(offset), Ok(size)) = (u32::try_from(mail.offset), u32::try_from(mail.size)) else {
            continue;
        };
        let known = map.by_place.get(&(file, offset)).copied();
        let map_uid = match known {
            Some((uid, count)) => {
                let wanted = count > 0 && !map.held.contains_key(&uid) && !restored.contains(&uid);
                if !wanted || !input.restore_unreferenced || live.contains(&mail.guid) {
                    continue;
                }
                restored.insert(uid);
                if count != 1 {
                    map.counts.push((uid, 1));
                }
                uid
            }
            None => {
                if let Some(entries) = dangling.remove(&mail.guid) {
                    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
                    let uid = map.add(file, offset, size, count)?;
                    for (number, entry) in entries {
                        if let Some(folder) = folders[number].as_mut() {
                            folder.relink(entry, uid);
                        }
                    }
                    live.insert(mail.guid);
                    continue;
                }
                if live.contains(&mail.guid) || placed.contains(&(mail.guid, mail.body_size)) {
                    map.add(file, offset, size, 0)?;
                    out.copies += 1;
                    continue;
                }
                map.add(file, offset, size, 1)?
            }
        };
        placed.insert((mail.guid, mail.body_size));
        let own = mail.folder.as_deref().and_then(|name| by_name.get(name)).copied();
        let number = own.or(inbox).ok_or_else(|| {
            RecoverError::NeedsRebuild("a mail's folder is unknown and INBOX has no index".into())
        })?;
        out.redirected += usize::from(own.is_none());
        if let Some(folder) = folders[number].as_mut() {
            let uid = folder.add(map_uid, mail.guid)?;
            out.placed.push((number, uid));
        }
    }
    out.unreferenced = map.unreferenced(&restored);
    out.dangling = lost + dangling.values().map(Vec::len).sum::<usize>();
    map.raise_counts();
    out.map = map.finish(input.highest_file)?;
    for folder in folders {
        out.folders.push(match folder {
            Some(folder) => Some(folder.finish(map.state.uid_validity, input.save_date)?),
            None => None,
        });
    }
    Ok(out)
}

/// The whole mails of the ranges, by file and offset.
fn mails_in(ranges: &[MdboxRange<'_>]) -> Vec<(u32, DboxMail)> {
    let merged = dbox_file::merge_ranges(ranges.iter().map(|r| (r.file, r.offset, r.bytes)));
    let mut mails = Vec::new();
    for ((file, offset), bytes) in &merged {
        mails.extend(dbox_file::scan(*offset, bytes).mails.into_iter().map(|m| (*file, m)));
    }
    mails
}

#[path = "recover_mdbox/parts.rs"]
mod parts;

#[cfg(test)]
#[path = "recover_mdbox/tests.rs"]
mod tests;
