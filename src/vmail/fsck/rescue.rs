//! A head that can be opened again, made from what is left (`fsck --repair`).
//!
//! For users that cannot be opened, or not wholly, because their head or a bundle is damaged. The
//! base is the head itself if it can be read, else the newest one that a bundle holds. A folder of
//! it that cannot be read goes back to its newest state that can, or is empty. The new head is
//! swapped in like that of a session that died: whoever opens the user next lists the store from
//! its watermark, and every mail that nothing names then comes back (`super::super::recover`).
//! So the watermark is set below the oldest such mail; what is named or dropped above it is
//! known (`known_above`).
//!
//! No mail is lost by this that the store has. Flags and folders are as in the state that was
//! gone back to, and of what that state names, mails that were expunged since are there again. What it
//! does not name and a later flush says was expunged stays on the dropped list.
//!
//! UIDs: the opening burns everything below the ceilings (I2). Those of an older head do not bound
//! what was given since: they are raised by [`UIDS`], far more than a flush interval can use, and
//! past every ceiling that can still be made out in the damaged head.
//!
//! What was there is kept below `aside/`, which nothing reads or deletes.
//!
//! The owner must be gone: the swap fences a living one, but what it had not flushed would be
//! put aside.

use super::super::error::{During, Error, Result};
use super::super::history::{self, Ends, State};
use super::super::lease::REPAIRED;
use super::super::parts::PART_LIMIT;
use super::super::stored::{Paths, Stored};
use super::objects::{Named, NamedAt, Objects};
use crate::format::head::{
    ClosedEpoch, HEAD_LIMIT, Head, HeadFolder, HeadOwner, PartKind, PartRef,
};
use crate::format::key::{bundle_key, head_key, user_dir};
use crate::format::listing::Entry;
use crate::format::part::{
    BundleWriter, Dropped, DroppedList, DroppedRow, decode_dropped, decode_head_part,
    encode_dropped, encode_names,
};
use crate::format::{Epoch, ObjectId, Place};
use crate::store::{Body, ETag, PutMode, StoreError};
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap, HashSet};

/// UIDs that are left out where an older head is gone back to.
pub const UIDS: u32 = 1 << 20;
/// Ids above the watermark that the new head tells of. Every login reads them.
pub const KNOWN_MAX: usize = 100_000;
/// UIDVALIDITYs; Dovecot takes them from the clock.
const VALIDITIES: u32 = 1 << 16;
/// The largest bundle that is looked through for a head.
const BUNDLE_LIMIT: u64 = 4 << 30;

/// What a rescue needs of the world.
#[derive(Debug, Clone)]
pub struct Rescue {
    /// Two random numbers.
    pub random: (u64, u64),
    /// The owner is known not to run any more.
    pub owner_gone: bool,
}

/// Makes a user openable again. Gives what was done, for people; nothing if nothing had to be.
///
/// # Errors
/// [`Error::Refused`] if somebody owns the user, or may; [`Error::NoUser`] if nothing is left of
/// it; a store that does not answer; [`Error::Lost`] if the head was swapped meanwhile.
pub async fn rescue(stored: &Stored, how: &Rescue) -> Result<Vec<String>> {
    let mut done = Vec::new();
    let found = stored.head_object().await?;
    let objects = Objects::list(stored).await?;
    let (bytes, tag, head) = match found {
        Some(found) => {
            let tag = found.some_tag()?;
            (Some(found.bytes), tag, found.head.ok())
        }
        None if objects.is_empty() => {
            return Err(Error::NoUser { user: stored.user.to_string() });
        }
        None => (None, None, None),
    };
    if !how.owner_gone && head.as_ref().is_none_or(|head| head.owner.is_some()) {
        let who = head.as_ref().and_then(|head| head.owner.as_ref()).map(|o| o.backend.as_str());
        return Err(Error::Refused(format!(
            "user {}: owned by {}: let that mount repair it, or say --owner-gone if it is \
             certainly not running any more",
            stored.user,
            who.unwrap_or("a backend that cannot be made out")
        )));
    }
    let whole = head.is_some();
    let (old, since) = match head {
        Some(head) => (head, None),
        None => {
            let (bundle, head) = last_readable(stored, &objects, &mut done).await?;
            (head, Some(bundle))
        }
    };
    let mut plan = Plan { stored, objects: &objects, done, head: old.clone() };
    plan.folders(&old).await?;
    let mut dropped = plan.tables(&old).await?;
    let named = plan.named().await?;
    let expunged = match since {
        Some(bundle) => plan.expunged_since(bundle, &named, &dropped).await?,
        None => Vec::new(),
    };
    dropped.extend(expunged.iter().cloned());
    let (orphans, later) = plan.watermark(&named, &dropped);
    if whole && plan.done.is_empty() && orphans == 0 {
        return Ok(Vec::new());
    }
    if orphans > later {
        let now = orphans - later;
        plan.done.push(format!("{now} mails that nothing named come back at the next opening"));
    }
    if later > 0 {
        plan.done.push(format!(
            "{later} more mails that nothing names are too far back for that: once the user was \
             opened, vmailfs fsck --repair brings them back"
        ));
    }
    if !expunged.is_empty() {
        plan.done.push(format!(
            "{} mails that were expunged since stay away; vmailfs user undelete brings them back",
            expunged.len()
        ));
    }
    if !whole {
        plan.ceilings(bytes.as_deref().unwrap_or_default());
    }
    plan.epoch(how);
    plan.links(&named, expunged).await?;
    if let Some(bytes) = bytes.filter(|_| !whole) {
        let kept = keep(stored, "head", bytes).await?;
        plan.done.push(format!("the damaged head is kept as {kept}"));
    }
    let Plan { head, done, .. } = plan;
    swap(stored, &head, tag).await?;
    Ok(done)
}

impl super::super::stored::HeadObject {
    fn some_tag(&self) -> Result<Option<ETag>> {
        match &self.tag {
            Some(tag) => Ok(Some(tag.clone())),
            None => Err(Error::Internal("the store gives no tag for an object".into())),
        }
    }
}

async fn swap(stored: &Stored, head: &Head, tag: Option<ETag>) -> Result<()> {
    head.check().map_err(|e| Error::corrupt(format!("new head of {}", stored.user), e))?;
    let mode = tag.map_or(PutMode::Create, PutMode::Update);
    let bytes = head.encode();
    if bytes.len() as u64 > HEAD_LIMIT {
        return Err(Error::Full(format!("the new head of {} is too large", stored.user)));
    }
    let body = Body::Bytes(Bytes::from(bytes));
    match stored.store.put(&head_key(&stored.user), body, mode, &[], stored.why).await {
        Ok(_) => Ok(()),
        Err(StoreError::Precondition { .. }) => Err(Error::Lost { user: stored.user.to_string() }),
        Err(e) => Err(stored.failed(e)),
    }
}

/// The newest head that some bundle holds, and that bundle.
async fn last_readable(
    stored: &Stored,
    objects: &Objects,
    done: &mut Vec<String>,
) -> Result<(ObjectId, Head)> {
    match newest_head(stored, objects, None).await? {
        Some((id, head)) => {
            let time = head.written;
            done.push(format!("gone back to the head before bundle {id} (flushed at {time})"));
            Ok((id, head))
        }
        None => Err(Error::Damaged {
            what: format!("user {}: no head can be read, and no bundle holds one", stored.user),
        }),
    }
}

/// The head in the newest bundle that holds one, of those before `before`.
async fn newest_head(
    stored: &Stored,
    objects: &Objects,
    before: Option<ObjectId>,
) -> Result<Option<(ObjectId, Head)>> {
    for id in objects.bundles.keys().rev().filter(|id| before.is_none_or(|b| **id < b)) {
        let key = bundle_key(&stored.user, *id);
        let bytes = match stored.store.get(&key, None, BUNDLE_LIMIT, stored.why).await {
            Ok((_, bytes)) => bytes,
            Err(StoreError::NotFound { .. } | StoreError::BadBody { .. }) => continue,
            Err(e) => return Err(stored.failed(e)),
        };
        if let Some(head) = head_in(&bytes).filter(|head| *head.user == *stored.user) {
            return Ok(Some((*id, head)));
        }
    }
    Ok(None)
}

/// The head that a bundle holds, among its other parts.
fn head_in(bundle: &[u8]) -> Option<Head> {
    let limit = HEAD_LIMIT + 4096;
    let head = |frame| Head::decode(&decode_head_part(frame, limit).ok()?).ok();
    frames(bundle).filter_map(head).last()
}

/// The frames of a bundle, as far as they can be made out.
fn frames(mut bundle: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let len = zstd::zstd_safe::find_frame_compressed_size(bundle).ok()?;
        let (frame, rest) = bundle.split_at_checked(len.max(1))?;
        bundle = rest;
        Some(frame)
    })
}

/// A new head that is being made.
struct Plan<'a> {
    stored: &'a Stored,
    objects: &'a Objects,
    done: Vec<String>,
    head: Head,
}

impl Plan<'_> {
    /// Every folder gets parts that can be read.
    async fn folders(&mut self, old: &Head) -> Result<()> {
        let mut earlier: Option<Vec<State>> = None;
        for i in 0..self.head.folders.len() {
            let folder = self.head.folders[i].clone();
            if self.readable(&folder).await? {
                continue;
            }
            if earlier.is_none() {
                earlier = Some(self.earlier(old).await?);
            }
            let mut parts = Vec::new();
            let mut when = None;
            for state in earlier.iter().flatten().skip(1) {
                let then = state.head.folders.iter().find(|f| f.id == folder.id);
                if let Some(then) = then.filter(|f| f.parts != folder.parts)
                    && self.readable(then).await?
                {
                    parts = then.parts.clone();
                    when = Some(state.time);
                    break;
                }
            }
            for part in &folder.parts {
                self.keep_bundle(part).await?;
            }
            let path = Paths::new(old).text(Place::own(folder.id));
            self.done.push(match when {
                Some(time) => format!("{path} is as it was flushed at {time}"),
                None => format!("{path} had no state that can be read, and is empty"),
            });
            self.head.folders[i].parts = parts;
        }
        Ok(())
    }

    /// States before this one; where the chain of heads is broken, from the next bundle on that
    /// holds a head.
    async fn earlier(&self, old: &Head) -> Result<Vec<State>> {
        let history = history::follow(self.stored, old.clone(), None).await?;
        let mut states = history.states;
        let end = states.last().and_then(|s| s.head.previous.as_ref()).map(|part| part.bundle);
        if let (Ends::Broken(_), Some(end)) = (history.ends, end)
            && let Some((_, head)) = newest_head(self.stored, self.objects, Some(end)).await?
        {
            states.extend(history::follow(self.stored, head, None).await?.states);
        }
        Ok(states)
    }

    async fn readable(&self, folder: &HeadFolder) -> Result<bool> {
        match self.stored.folder(folder).await {
            Ok(_) => Ok(true),
            Err(error @ Error::Store { .. }) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// Segments of the dropped list that can be read, and whether there is a head before this.
    async fn tables(&mut self, old: &Head) -> Result<DroppedList> {
        let mut list = DroppedList::default();
        let mut kept = Vec::new();
        for part in &old.dropped {
            match self.stored.ranges(&[part]).await {
                Ok(bytes) => {
                    let bytes = bytes.into_iter().next().unwrap_or_default();
                    let limit = part.raw_len.saturating_add(4096);
                    let rows = decode_dropped(&bytes, limit);
                    list.extend(rows.map_err(|e| Error::corrupt("dropped list", e))?);
                    kept.push(part.clone());
                }
                Err(error @ Error::Store { .. }) => return Err(error),
                Err(_) => self.done.push(format!(
                    "a part of the dropped list in bundle {} is gone: mails it named come back",
                    part.bundle
                )),
            }
        }
        if let Some(first) = kept.first_mut() {
            first.kind = PartKind::Base;
        }
        self.head.dropped = kept;
        match self.stored.before(old).await {
            Ok(_) => {}
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(_) => self.head.previous = None,
        }
        Ok(list)
    }

    /// What the folders name with the parts they have now.
    async fn named(&self) -> Result<Named> {
        let mut named = Named::default();
        let at = NamedAt { folder: String::new(), name: String::new() };
        for folder in &self.head.folders {
            let state = self.stored.folder(folder).await?;
            for (_, _, entry) in state.listing.names() {
                match entry {
                    Entry::Mail { object, size, .. } => named.add(object, *size, true, &at),
                    Entry::Extents { extents, .. } => {
                        extents.iter().for_each(|e| named.add(&e.object, e.len, false, &at));
                    }
                    Entry::Local { .. } | Entry::Symlink { .. } => {}
                }
            }
        }
        Ok(named)
    }

    /// The mails that later flushes say were expunged: bundle `from` is the first after the head
    /// that was gone back to. What that head names is there again, and is told with it.
    async fn expunged_since(
        &self,
        from: ObjectId,
        named: &Named,
        known: &DroppedList,
    ) -> Result<Vec<DroppedRow>> {
        let mut list = DroppedList::default();
        for id in self.objects.bundles.range(from..).map(|(id, _)| *id) {
            let key = bundle_key(&self.stored.user, id);
            let bytes = match self.stored.store.get(&key, None, BUNDLE_LIMIT, self.stored.why).await
            {
                Ok((_, bytes)) => bytes,
                Err(StoreError::NotFound { .. } | StoreError::BadBody { .. }) => continue,
                Err(e) => return Err(self.stored.failed(e)),
            };
            let rows = frames(&bytes).filter_map(|f| decode_dropped(f, PART_LIMIT).ok());
            list.extend(rows.flatten());
        }
        let mail = |row: &DroppedRow| match row {
            DroppedRow::In { object: Dropped::Mail(tail), .. } => {
                !named.objects.contains_key(&tail.id()) && known.mail(tail.id()).is_none()
            }
            DroppedRow::In { .. } | DroppedRow::Out(_) => false,
        };
        Ok(list.rows().into_iter().filter(mail).collect())
    }

    /// Puts the watermark below every mail that nothing names; says how many there are, and how
    /// many of them are below it all the same, because the head would have to tell of too much.
    fn watermark(&mut self, named: &Named, dropped: &DroppedList) -> (usize, usize) {
        let known = |id: &ObjectId| named.objects.contains_key(id) || dropped.mail(*id).is_some();
        let orphans: BTreeSet<ObjectId> =
            self.objects.mails.keys().filter(|id| !known(id)).copied().collect();
        let Some(first) = orphans.first() else { return (0, 0) };
        let below = match first.counter.checked_sub(1) {
            Some(counter) => ObjectId { epoch: first.epoch, counter },
            None => ObjectId {
                epoch: Epoch(first.epoch.0.saturating_sub(1)),
                counter: ObjectId::MAX_COUNTER,
            },
        };
        let mut low = below.min(self.head.watermark);
        let mails = dropped.iter().filter_map(|at| match &at.object {
            Dropped::Mail(tail) => Some(tail.id()),
            Dropped::Bundle(_) | Dropped::File(_) => None,
        });
        let above: BTreeSet<ObjectId> =
            named.objects.keys().copied().chain(mails).filter(|id| *id > low).collect();
        let mut above: Vec<ObjectId> = above.into_iter().collect();
        if let Some(excess) = above.len().checked_sub(KNOWN_MAX).filter(|excess| *excess > 0) {
            low = above[excess - 1];
            above.drain(..excess);
        }
        self.head.watermark = low;
        self.head.known_above = above;
        (orphans.len(), orphans.range(..=low).count())
    }

    /// Ceilings of an older head: beyond what may have been given since.
    fn ceilings(&mut self, damaged: &[u8]) {
        let told = ceilings_in(damaged);
        let beyond = |old: u32, told: Option<&u32>| {
            old.max(told.copied().filter(|n| *n < u32::MAX / 2).unwrap_or(0)).saturating_add(UIDS)
        };
        for folder in &mut self.head.folders {
            let told = told.get(&folder.id.to_string());
            if folder.uid_ceiling.is_some() || told.is_some() {
                folder.uid_ceiling = Some(beyond(folder.uid_ceiling.unwrap_or(0), told));
            }
        }
        if let Some(old) = self.head.uidvalidity_ceiling {
            self.head.uidvalidity_ceiling = Some(old.saturating_add(VALIDITIES));
        }
    }

    /// A new epoch, in nobody's name.
    fn epoch(&mut self, how: &Rescue) {
        let used = |ids: Option<&ObjectId>| ids.map_or(Epoch(0), |id| id.epoch);
        let newest = self.head.epoch.max(used(self.objects.mails.keys().next_back()));
        let newest = newest.max(used(self.objects.bundles.keys().next_back()));
        let newest = newest.max(used(self.objects.files.keys().next_back()));
        let head = &mut self.head;
        let end = head.watermark;
        head.closed.retain(|closed| closed.epoch < newest);
        head.closed.push(ClosedEpoch { epoch: newest, end });
        let excess = head.closed.len().saturating_sub(8);
        head.closed.drain(..excess);
        head.epoch = Epoch(newest.0.saturating_add(1));
        head.write_id = format!("{:016x}{:016x}", how.random.0, how.random.1);
        let session = format!("{:016x}", how.random.0);
        head.owner = Some(HeadOwner { backend: REPAIRED.to_owned(), session });
    }

    /// The table of objects with several names is made anew if it is not what the folders say.
    /// What was expunged since goes on the dropped list.
    async fn links(&mut self, named: &Named, expunged: Vec<DroppedRow>) -> Result<()> {
        let counted: HashMap<ObjectId, u32> = named
            .objects
            .iter()
            .filter(|(_, found)| found.names > 1)
            .map(|(id, found)| (*id, found.names))
            .collect();
        let right = match self.stored.links(&self.head).await {
            Ok(table) => table == counted,
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(_) => false,
        };
        // Nobody else gives ids in this epoch.
        let mut bundle = BundleWriter::new(ObjectId { epoch: self.head.epoch, counter: 1 });
        if !right {
            self.head.names = Vec::new();
        }
        if !right && !counted.is_empty() {
            let mut rows: Vec<_> = counted.into_iter().collect();
            rows.sort_unstable();
            self.head.names = vec![bundle.add(PartKind::Base, &encode_names(&rows))];
        } else if expunged.is_empty() {
            return Ok(());
        }
        if !expunged.is_empty() {
            let first = self.head.dropped.is_empty();
            let kind = if first { PartKind::Base } else { PartKind::Diff };
            self.head.dropped.push(bundle.add(kind, &encode_dropped(&expunged)));
        }
        let key = bundle_key(&self.stored.user, bundle.id());
        let body = Body::Bytes(bundle.finish());
        let put = self.stored.store.put(&key, body, PutMode::Overwrite, &[], self.stored.why);
        put.await.map(|_| ()).map_err(|e| self.stored.failed(e))
    }

    async fn keep_bundle(&mut self, part: &PartRef) -> Result<()> {
        let good = match self.stored.ranges(&[part]).await {
            Ok(_) => true,
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(_) => false,
        };
        let key = bundle_key(&self.stored.user, part.bundle);
        if good {
            return Ok(());
        }
        match self.stored.store.get(&key, None, BUNDLE_LIMIT, self.stored.why).await {
            Ok((_, bytes)) => {
                let kept = keep(self.stored, &format!("bundle-{}", part.bundle), bytes).await?;
                let told = format!("the damaged bundle {} is kept as {kept}", part.bundle);
                if !self.done.contains(&told) {
                    self.done.push(told);
                }
                Ok(())
            }
            Err(StoreError::NotFound { .. } | StoreError::BadBody { .. }) => Ok(()),
            Err(e) => Err(self.stored.failed(e)),
        }
    }
}

/// Keeps bytes where nothing looks for them; gives the key.
pub(in super::super) async fn keep(stored: &Stored, what: &str, bytes: Bytes) -> Result<String> {
    let sum = crc32c::crc32c(&bytes);
    let key = format!("{}/aside/{what}-{sum:08x}", user_dir(&stored.user));
    let put = stored.store.put(&key, Body::Bytes(bytes), PutMode::Overwrite, &[], stored.why);
    put.await.map_err(|e| Error::store(format!("keeping {key}"), During::Delivery, e))?;
    Ok(key)
}

/// The UID ceilings that can be made out in a damaged head, by folder id: it has a folder a line.
fn ceilings_in(damaged: &[u8]) -> HashMap<String, u32> {
    let text = String::from_utf8_lossy(damaged);
    let after = |line: &str, what: &str| -> Option<String> {
        let at = line.find(what)? + what.len();
        Some(line[at..].chars().take_while(char::is_ascii_alphanumeric).collect())
    };
    let mut found = HashMap::new();
    let mut twice = HashSet::new();
    for line in text.lines() {
        if let Some(id) = after(line, "{\"id\":\"")
            && let Some(Ok(ceiling)) = after(line, "\"uid_ceiling\":").map(|n| n.parse())
            && twice.insert(id.clone())
        {
            found.insert(id, ceiling);
        }
    }
    found
}
