//! Fetching the parts of folders from bundles, and putting them together.
//!
//! Parts that lie side by side come in one request. A bundle that the head names and the store
//! has not, or that is shorter than the head says, is damage, never an absence (I4, I9).

use super::error::{During, Error, Result};
use super::fetch::SPOILT_TRIES;
use super::lines::Final;
use super::node::Since;
use super::publish::blocking;
use super::session::UserCell;
use super::tree::{Layer, NameBytes};
use crate::format::head::PartRef;
use crate::format::key::{bundle_key, file_key};
use crate::format::listing::{Entry, Line};
use crate::format::part::{Content, apply_content, read_part};
use crate::format::{FolderId, ObjectId, Sub};
use crate::store::{ObjectStore, Reason, StoreError};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Decompressed size of one part at most.
pub const PART_LIMIT: u64 = 4 << 30;

/// Parts this near to each other are fetched in one request.
pub(super) const GAP: u64 = 256 * 1024;

/// What was found of a folder, before the journal's lines.
pub(super) struct Source {
    pub state: Final,
    /// `None`: from the snapshot on the local disk.
    pub parts: Option<FromParts>,
}

/// What files hold, by their names.
pub(super) type Contents = HashMap<(Sub, NameBytes), Vec<u8>>;

/// What the parts of a folder hold besides the listing.
#[derive(Default)]
pub(super) struct FromParts {
    pub contents: Contents,
    pub layers: Vec<Option<Layer>>,
}

pub(super) struct Wanted {
    pub id: FolderId,
    pub parts: Vec<PartRef>,
    pub snapshot: Option<std::path::PathBuf>,
}

/// Index files that lie in objects of their own and are not on the local disk.
pub(super) async fn large_files(
    cell: &Arc<UserCell>,
    id: FolderId,
    source: &Source,
) -> Result<HashMap<ObjectId, bytes::Bytes>> {
    let mut objects = BTreeMap::new();
    for (_, _, entry) in source.state.names() {
        if let Entry::Local { size, object: Some(object), .. } = entry {
            objects.insert(*object, *size);
        }
    }
    let mut found = HashMap::new();
    for (object, size) in objects {
        let key = file_key(&cell.name, object);
        match cell.session.env.store.get(&key, None, size, Reason("load")).await {
            Ok((_, bytes)) => _ = found.insert(object, bytes),
            // Perhaps named by an older line only; if it is needed, it counts as missing.
            Err(StoreError::NotFound { .. })
                if is_gone(&*cell.session.env.store, &key, Reason("load")).await? =>
            {
                tracing::warn!(user = %cell.name, folder = %id, key, "large file gone from the store");
            }
            Err(e) => {
                return Err(Error::store(format!("loading {}", cell.name), During::Delivery, e));
            }
        }
    }
    Ok(found)
}

/// Asks again for an object of which the store said that it is not there. One wrong answer must
/// not be taken for damage.
async fn is_gone(store: &dyn ObjectStore, key: &str, why: Reason) -> Result<bool> {
    match store.head(key, why).await {
        Ok(_) => Ok(false),
        Err(StoreError::NotFound { .. }) => Ok(true),
        Err(e) => Err(Error::store(key, During::Delivery, e)),
    }
}

/// Fetches the parts of folders, side by side ones together.
pub(super) async fn fetch_parts(
    cell: &Arc<UserCell>,
    wanted: &[Wanted],
) -> Result<Vec<(FolderId, Source)>> {
    let all: Vec<&PartRef> = wanted.iter().flat_map(|w| &w.parts).collect();
    let mut bytes = fetch_ranges(cell, &all).await?.into_iter();
    let mut out = Vec::new();
    for want in wanted {
        let parts: Vec<_> = want.parts.iter().cloned().zip(bytes.by_ref()).collect();
        let user = cell.name.clone();
        out.push((want.id, blocking(move || read_parts(&user, parts)).await??));
    }
    Ok(out)
}

/// Puts the parts of a folder together.
pub(super) fn read_parts(user: &str, parts: Vec<(PartRef, bytes::Bytes)>) -> Result<Source> {
    let (mut state, mut found) = (Final::default(), FromParts::default());
    for (i, (part, raw)) in parts.into_iter().enumerate() {
        let corrupt = |e| Error::corrupt(format!("user {user}: bundle {}", part.bundle), e);
        part.check(&raw).map_err(corrupt)?;
        let limit = part.raw_len.saturating_add(4096).min(PART_LIMIT);
        let mut layer = Layer::default();
        let members = read_part(&raw, limit, |line| {
            if i > 0
                && let Line::Set { sub, name, .. } | Line::Unset { sub, name } = &line
            {
                layer.names.insert((*sub, NameBytes::from(name.as_slice())));
            }
            state.apply(line);
        });
        for member in members.map_err(corrupt)? {
            let key = (member.sub, NameBytes::from(member.name));
            let old = found.contents.get(&key).map(Vec::as_slice);
            let new = apply_content(old, &member.content).map_err(corrupt)?;
            layer.members.insert(key.clone(), since_of(&member.content));
            found.contents.insert(key, new);
        }
        if i > 0 {
            found.layers.push(Some(layer));
        }
    }
    Ok(Source { state, parts: Some(found) })
}

fn since_of(content: &Content) -> Since {
    match content {
        Content::Tail { offset, .. } => Since::nothing(*offset),
        Content::Whole(_) | Content::Blocks { .. } => Since::everything(),
    }
}

/// What a diff holds, to fold it into the next one.
pub(super) fn read_layer(user: &str, part: &PartRef, raw: &[u8]) -> Result<Layer> {
    let corrupt = |e| Error::corrupt(format!("user {user}: bundle {}", part.bundle), e);
    part.check(raw).map_err(corrupt)?;
    let limit = part.raw_len.saturating_add(4096).min(PART_LIMIT);
    let mut layer = Layer::default();
    let members = read_part(raw, limit, |line| {
        if let Line::Set { sub, name, .. } | Line::Unset { sub, name } = line {
            layer.names.insert((sub, name.into()));
        }
    });
    for member in members.map_err(corrupt)? {
        layer.members.insert((member.sub, member.name.into()), since_of(&member.content));
    }
    Ok(layer)
}

fn too_short(user: &str, bundle: ObjectId) -> Error {
    Error::Damaged { what: format!("user {user}: bundle {bundle} is shorter than its head says") }
}

/// The bytes of parts, in the order asked for, with as few requests as their places allow. What
/// fails its checksum was fetched more than once; to check it is the caller's.
pub async fn fetch_ranges(cell: &Arc<UserCell>, parts: &[&PartRef]) -> Result<Vec<bytes::Bytes>> {
    fetch_ranges_for(cell, parts, Reason("load")).await
}

/// The same for another reason.
pub async fn fetch_ranges_for(
    cell: &Arc<UserCell>,
    parts: &[&PartRef],
    why: Reason,
) -> Result<Vec<bytes::Bytes>> {
    ranges_of(&*cell.session.env.store, &cell.name, parts, why).await
}

/// The same of a user that need not be open.
pub async fn ranges_of(
    store: &dyn ObjectStore,
    user: &str,
    parts: &[&PartRef],
    why: Reason,
) -> Result<Vec<bytes::Bytes>> {
    let mut tries = 0;
    loop {
        let got = ranges_once(store, user, parts, why).await?;
        tries += 1;
        let good = got.iter().zip(parts).all(|(bytes, part)| part.check(bytes).is_ok());
        if good || tries == SPOILT_TRIES {
            return Ok(got);
        }
        tracing::warn!(user, "a part of a bundle was spoilt on its way, reading it again");
    }
}

async fn ranges_once(
    store: &dyn ObjectStore,
    user: &str,
    parts: &[&PartRef],
    why: Reason,
) -> Result<Vec<bytes::Bytes>> {
    let mut order: Vec<usize> = (0..parts.len()).collect();
    order.sort_by_key(|i| (parts[*i].bundle, parts[*i].offset));
    let mut ranges: Vec<(ObjectId, std::ops::Range<u64>)> = Vec::new();
    let mut place = vec![0; parts.len()];
    for i in order {
        let part = parts[i];
        let end = part.offset.saturating_add(part.len);
        match ranges.last_mut() {
            Some((bundle, range)) if *bundle == part.bundle && part.offset <= range.end + GAP => {
                range.end = range.end.max(end);
            }
            _ => ranges.push((part.bundle, part.offset..end)),
        }
        place[i] = ranges.len() - 1;
    }
    let gets = ranges.iter().map(|(bundle, range)| async move {
        let key = bundle_key(user, *bundle);
        let limit = range.end - range.start;
        match store.get(&key, Some(range.clone()), limit, why).await {
            Ok((_, bytes)) => Ok(bytes),
            Err(StoreError::NotFound { .. }) if is_gone(store, &key, why).await? => {
                Err(Error::Damaged {
                    what: format!("user {user}: bundle {bundle} is named but gone from the store"),
                })
            }
            Err(e) => {
                // Cut off on the way, which may pass, or lying there too short, which does not.
                let short = matches!(e, StoreError::BadBody { .. })
                    && matches!(
                        store.head(&key, why).await,
                        Ok(meta) if meta.size < range.end
                    );
                Err(match short {
                    true => too_short(user, *bundle),
                    false => Error::store(format!("loading {user}"), During::Delivery, e),
                })
            }
        }
    });
    let got = futures_util::future::try_join_all(gets).await?;
    let mut out = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let start = part.offset - ranges[place[i]].1.start;
        let slice = usize::try_from(start)
            .ok()
            .zip(usize::try_from(start + part.len).ok())
            .filter(|(_, end)| *end <= got[place[i]].len());
        let (start, end) = slice.ok_or_else(|| too_short(user, part.bundle))?;
        out.push(got[place[i]].slice(start..end));
    }
    Ok(out)
}
