//! Where the parts of folders lie, so that few requests read them back.
//!
//! A fresh machine that opens one mailbox reads the head, then (a) all *light* folders and
//! (b) the mailbox. Each costs one request for each bundle that holds something of it, whatever
//! its size, so a flush places parts by these rules:
//!
//! - A folder whose part is small is written whole with each flush, changed or not. So all light
//!   folders lie side by side in the newest bundle, and one request brings whatever leads to a
//!   mailbox: the directories above it, and all small mailboxes.
//! - A heavy folder is a chain: a base and at most two diffs. A diff is folded into the next one
//!   while it is small, the second one also while it is small beside the first, and all becomes a
//!   base once the diffs have grown to half of it: what a flush writes follows what changed.
//! - The two folders of a mailbox (mails here, indexes there) are read together, so their chains
//!   have their links in the same bundles: what is decided for one is decided for the other.
//!
//! A mailbox is so read from three bundles at most, and all light folders from one.
//!
//! Folding needs to know what the folded diff holds ([`Layer`]). That is not on the local disk:
//! after a restart a second diff may be put on the first, but then a base is due. Of a large folder the
//! diffs are read again instead ([`User::unknown_layers`]), or each session would write all of it once.

use super::tree::{Folder, Layer, NameBytes};
use super::user::User;
use crate::format::head::{PartKind, PartRef};
use crate::format::{FolderId, ObjectId, Place};
use std::collections::{BTreeMap, HashMap, HashSet};

/// A folder whose part is at most so long (compressed) is light,
const LIGHT: u64 = 8 * 1024;
/// and so many bytes of them are written again by each flush.
const LIGHT_TOTAL: u64 = 256 * 1024;
/// Bytes, not compressed, that a name takes in a listing, roughly.
const NAME_BYTES: u64 = 200;
/// Bytes, not compressed, up to which a diff is always folded into the next one.
const SMALL_DIFF: u64 = 32 * 1024;

/// A base of so many bytes, not compressed, is not written for want of what small diffs hold,
const WORTH_READING: u64 = 4 << 20;
/// which have no more than this.
const READ_MOST: u64 = 32 << 20;

/// The next part of a folder: how many of the parts before stay under it. None: it is a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Next {
    pub keep: usize,
}

impl Next {
    const BASE: Next = Next { keep: 0 };

    pub fn kind(self) -> PartKind {
        if self == Next::BASE { PartKind::Base } else { PartKind::Diff }
    }
}

/// Whether a folder is read with all others of its kind.
pub fn is_light(parts: &[PartRef]) -> bool {
    matches!(parts, [only] if only.len <= LIGHT)
}

/// Whether it will be light, to judge by the number of names that changed.
pub fn stays_light(folder: &Folder) -> bool {
    let few = folder.unflushed.names.len() < 64;
    few && (folder.parts.is_empty() || is_light(&folder.parts))
}

/// The next part of a folder of which `changed` names changed.
fn next(parts: &[PartRef], layers: &[Option<Layer>], changed: u64) -> Next {
    let Some((base, diffs)) = parts.split_first() else { return Next::BASE };
    let grown = diffs.iter().map(|p| p.raw_len).sum::<u64>() + changed * NAME_BYTES;
    if grown > base.raw_len / 2 + 16 * 1024 || base.len <= LIGHT {
        return Next::BASE;
    }
    let keep = match diffs {
        [] => 1,
        [one] if one.raw_len < SMALL_DIFF => 1,
        [_] => 2,
        [first, second] if second.raw_len < first.raw_len / 2 => 2,
        _ => 1,
    };
    match foldable(layers, keep) {
        true => Next { keep },
        false if parts.len() < 3 => Next { keep: parts.len() },
        false => Next::BASE,
    }
}

/// Whether all that would be folded is known.
fn foldable(layers: &[Option<Layer>], keep: usize) -> bool {
    layers.iter().skip(keep.saturating_sub(1)).all(Option::is_some)
}

/// What two folders that are read together do.
fn joint(a: (&Folder, Next), b: (&Folder, Next)) -> Next {
    let next = a.1.min(b.1);
    if foldable(&a.0.layers, next.keep) && foldable(&b.0.layers, next.keep) {
        next
    } else {
        Next::BASE
    }
}

/// The mailboxes of a user: the folders that are one mailbox in different trees, by what their
/// paths have in common.
#[derive(Debug)]
pub struct Mailboxes(HashMap<Vec<NameBytes>, Vec<(NameBytes, FolderId)>>);

impl Mailboxes {
    /// The other folders of a folder's mailbox.
    pub fn others(&self, user: &User, id: FolderId) -> Vec<FolderId> {
        let Some((top, mailbox)) = mailbox_of(&user.tree.path(Place::own(id))) else {
            return Vec::new();
        };
        let all = self.0.get(&mailbox).map_or(&[][..], Vec::as_slice);
        let mut others: Vec<FolderId> =
            all.iter().filter(|(t, other)| *t != top && *other != id).map(|(_, id)| *id).collect();
        others.sort();
        others
    }
}

/// The top directory and the mailbox that a directory belongs to, by its path: `mail/.Sent` and
/// `index/.Sent` are one mailbox, as are `mail/mailboxes/A/dbox-Mails` and `index/mailboxes/A`.
/// Maildir++ keeps INBOX at the top and its index in `.INBOX`.
fn mailbox_of(path: &[NameBytes]) -> Option<(NameBytes, Vec<NameBytes>)> {
    let (top, rest) = path.split_first()?;
    let rest = match rest.split_last() {
        Some((last, above)) if &**last == b"dbox-Mails" => above,
        _ => rest,
    };
    let mut names = rest.to_vec();
    if names.is_empty() {
        names.push(NameBytes::from(&b".INBOX"[..]));
    }
    Some((top.clone(), names))
}

impl User {
    pub fn mailboxes(&self) -> Mailboxes {
        let mut all: HashMap<_, Vec<_>> = HashMap::new();
        for id in self.tree.folders.keys() {
            if let Some((top, mailbox)) = mailbox_of(&self.tree.path(Place::own(*id))) {
                all.entry(mailbox).or_default().push((top, *id));
            }
        }
        Mailboxes(all)
    }

    /// What is written of which folder, where `changed` have changed.
    pub fn next_parts(&self, changed: &HashSet<FolderId>) -> BTreeMap<FolderId, Next> {
        let alone = |folder: &Folder| {
            if folder.parts.len() < 3 && !folder.parts.is_empty() && self.has_evicted(folder.id) {
                // Whatever else it would hold must be fetched first.
                return Next { keep: folder.parts.len() };
            }
            let names = folder.unflushed.names.len() as u64;
            next(&folder.parts, &folder.layers, names)
        };
        let mut all = BTreeMap::new();
        let mailboxes = self.mailboxes();
        for id in changed {
            let Some(folder) = self.tree.folders.get(id) else { continue };
            let mut decided = alone(folder);
            let others: Vec<&Folder> = mailboxes
                .others(self, *id)
                .iter()
                .filter_map(|other| self.tree.folders.get(other))
                .filter(|other| other.loaded && !is_light(&other.parts) && !other.parts.is_empty())
                .collect();
            if !is_light(&folder.parts) && !folder.parts.is_empty() {
                for other in &others {
                    decided = joint((folder, decided), (other, alone(other)));
                }
                for other in others {
                    // Nothing new in it, and nothing to fold.
                    if !changed.contains(&other.id) && other.parts.len() > decided.keep {
                        all.insert(other.id, decided);
                    }
                }
            }
            all.insert(*id, decided);
        }
        for id in self.light_with_next(&all) {
            all.insert(id, Next::BASE);
        }
        all
    }

    /// Diffs of which must be known what they hold, by the places of their layers: if it were, no base
    /// would be written of these large folders.
    pub fn unknown_layers(&self) -> Vec<(FolderId, Vec<(usize, PartRef)>)> {
        let changed: HashSet<FolderId> = self
            .tree
            .folders
            .values()
            .filter(|f| f.loaded && !f.unflushed.is_empty() && f.layers.iter().any(Option::is_none))
            .filter(|f| f.parts.first().is_some_and(|base| base.raw_len >= WORTH_READING))
            .map(|f| f.id)
            .collect();
        if changed.is_empty() {
            return Vec::new();
        }
        let (due, mailboxes) = (self.next_parts(&changed), self.mailboxes());
        let if_known = |folder: &Folder| {
            let known = vec![Some(Layer::default()); folder.layers.len()];
            next(&folder.parts, &known, folder.unflushed.names.len() as u64)
        };
        let mut unknown = BTreeMap::new();
        for id in changed.iter().filter(|id| due.get(id) == Some(&Next::BASE)) {
            // Those that decide together.
            let others = mailboxes.others(self, *id).into_iter();
            let together: Vec<&Folder> = std::iter::once(*id)
                .chain(others)
                .filter_map(|id| self.tree.folders.get(&id))
                .filter(|f| f.id == *id || f.loaded && !f.parts.is_empty() && !is_light(&f.parts))
                .collect();
            let keep = together.iter().map(|folder| if_known(folder).keep).min().unwrap_or(0);
            if keep == 0 {
                continue;
            }
            for folder in together {
                let diffs = folder.parts.iter().skip(1).zip(&folder.layers).enumerate();
                let wanted: Vec<(usize, PartRef)> = diffs
                    .skip(keep - 1)
                    .filter(|(_, (part, layer))| layer.is_none() && part.raw_len <= READ_MOST)
                    .map(|(n, (part, _))| (n, part.clone()))
                    .collect();
                if !wanted.is_empty() {
                    unknown.insert(folder.id, wanted);
                }
            }
        }
        unknown.into_iter().collect()
    }

    /// Light folders that did not change and are written again.
    fn light_with_next(&self, all: &BTreeMap<FolderId, Next>) -> Vec<FolderId> {
        let mut light: Vec<(usize, FolderId, u64)> = self
            .tree
            .folders
            .values()
            .filter(|f| f.loaded && is_light(&f.parts) && !all.contains_key(&f.id))
            .filter(|f| !self.has_evicted(f.id))
            .map(|f| (self.tree.depth(Place::own(f.id)), f.id, f.parts.iter().map(|p| p.len).sum()))
            .collect();
        light.sort();
        let mut total = 0;
        light
            .into_iter()
            .take_while(|(_, _, len)| {
                total += len;
                total <= LIGHT_TOTAL
            })
            .map(|(_, id, _)| id)
            .collect()
    }

    /// Folders that cost no request of their own, or one together, when others are fetched: all
    /// light ones in the newest bundle.
    pub fn light_beside(&self) -> Vec<FolderId> {
        let newest: Option<ObjectId> =
            self.tree.folders.values().flat_map(|f| &f.parts).map(|p| p.bundle).max();
        let mut light: Vec<(usize, FolderId)> = self
            .tree
            .folders
            .values()
            .filter(|f| is_light(&f.parts) && f.parts.first().map(|p| p.bundle) == newest)
            .map(|f| (self.tree.depth(Place::own(f.id)), f.id))
            .collect();
        light.sort();
        light.into_iter().map(|(_, id)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(kind: PartKind, len: u64, raw_len: u64) -> PartRef {
        PartRef { kind, bundle: ObjectId::ZERO, offset: 0, len, crc: 0, raw_len }
    }

    fn chain(base: u64, diffs: &[u64]) -> Vec<PartRef> {
        let diffs = diffs.iter().map(|raw| part(PartKind::Diff, raw / 8, *raw));
        std::iter::once(part(PartKind::Base, base / 8, base)).chain(diffs).collect()
    }

    fn known(n: usize) -> Vec<Option<Layer>> {
        vec![Some(Layer::default()); n]
    }

    #[test]
    fn a_chain_is_a_base_and_two_diffs_at_most_and_grows_with_what_changed() {
        const M: u64 = 1 << 20;
        let keep =
            |diffs: &[u64], changed| next(&chain(M, diffs), &known(diffs.len()), changed).keep;
        assert_eq!(next(&[], &[], 5), Next::BASE);
        assert_eq!(keep(&[], 5), 1);
        // Small diffs are folded; large ones get a second one on top, which is folded in turn.
        assert_eq!(keep(&[10_000], 5), 1);
        assert_eq!(keep(&[200_000], 5), 2);
        assert_eq!(keep(&[200_000, 10_000], 5), 2);
        assert_eq!(keep(&[200_000, 150_000], 5), 1);
        // Half of the base has changed, or will have.
        assert_eq!(keep(&[400_000, 150_000], 5), 0);
        assert_eq!(keep(&[], 10_000), 0);
        // Light.
        assert_eq!(next(&chain(LIGHT * 8, &[]), &[], 1), Next::BASE);
    }

    #[test]
    fn what_is_not_known_is_not_folded_and_no_chain_gets_longer_for_it() {
        let parts = chain(1 << 20, &[10_000]);
        assert_eq!(next(&parts, &[None], 1).keep, 2);
        let parts = chain(1 << 20, &[10_000, 8_000]);
        assert_eq!(next(&parts, &[None, Some(Layer::default())], 1).keep, 0);
        let parts = chain(1 << 20, &[100_000, 8_000]);
        assert_eq!(next(&parts, &[None, Some(Layer::default())], 1).keep, 2);
        assert_eq!(next(&parts, &[None, None], 1).keep, 0);
    }

    #[test]
    fn the_folders_of_a_mailbox_are_known_by_their_paths() {
        let of = |path: &str| {
            let names: Vec<NameBytes> = path.split('/').map(|n| n.as_bytes().into()).collect();
            mailbox_of(&names).unwrap()
        };
        assert_eq!(of("mail/.Sent").1, of("index/.Sent").1);
        assert_eq!(of("mail").1, of("index/.INBOX").1);
        assert_eq!(of("mail/mailboxes/A/dbox-Mails").1, of("index/mailboxes/A").1);
        assert_ne!(of("mail/.Sent").1, of("index/.Drafts").1);
    }
}
