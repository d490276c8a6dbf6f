//! The objects of a user, and how they go with what is named.

use super::super::error::{Error, Result};
use super::super::export::mail_bytes;
use super::super::stored::{Paths, Stored};
use super::{Check, Kind};
use crate::format::head::{Head, PartRef};
use crate::format::key::{KeyTail, bundle_key, file_key, mail_dir, mail_key, user_dir};
use crate::format::part::{Dropped, DroppedList};
use crate::format::{ObjectId, Place};
use crate::store::{ObjectMeta, StoreError};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Mails read, or asked for, at the same time.
const AT_ONCE: usize = 16;

/// All objects of a user.
#[derive(Debug, Default)]
pub(super) struct Objects {
    pub mails: BTreeMap<ObjectId, (KeyTail, u64)>,
    pub bundles: BTreeMap<ObjectId, u64>,
    pub files: BTreeMap<ObjectId, u64>,
    strange: Vec<String>,
}

impl Objects {
    pub(super) async fn list(stored: &Stored) -> Result<Objects> {
        let dir = user_dir(&stored.user);
        let mut all = Objects::default();
        for object in listed(stored, &mail_dir(&stored.user)).await? {
            match last(&object).and_then(|name| KeyTail::parse(name).ok()) {
                Some(tail) => _ = all.mails.insert(tail.id(), (tail, object.size)),
                None => all.strange.push(object.key),
            }
        }
        for object in listed(stored, &format!("{dir}/bundle")).await? {
            let id = last(&object).and_then(|n| n.strip_suffix(".tar.zst")?.parse().ok());
            match id {
                Some(id) => _ = all.bundles.insert(id, object.size),
                None => all.strange.push(object.key),
            }
        }
        for object in listed(stored, &format!("{dir}/file")).await? {
            match last(&object).and_then(|n| n.parse().ok()) {
                Some(id) => _ = all.files.insert(id, object.size),
                None => all.strange.push(object.key),
            }
        }
        Ok(all)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.mails.is_empty() && self.bundles.is_empty() && self.files.is_empty()
    }

    pub(super) fn strangers(&self, check: &mut Check<'_>) {
        for key in &self.strange {
            check.add(Kind::Stray, None, None, Some(key.clone()), "not a key of ours");
        }
    }

    pub(super) fn file_key(&self, stored: &Stored, id: ObjectId) -> String {
        file_key(&stored.user, id)
    }
}

fn last(object: &ObjectMeta) -> Option<&str> {
    Some(object.key.rsplit_once('/')?.1)
}

async fn listed(stored: &Stored, dir: &str) -> Result<Vec<ObjectMeta>> {
    stored.store.list(dir, None, stored.why).await.map_err(|e| stored.failed(e))
}

/// Where an object is named.
#[derive(Debug, Clone)]
pub(super) struct NamedAt {
    pub folder: String,
    pub name: String,
}

/// An object that listings name.
#[derive(Debug)]
pub(super) struct NamedObject {
    pub tail: KeyTail,
    /// Bytes that are needed of it.
    pub size: u64,
    /// It is one mail, so it has exactly that size.
    pub exact: bool,
    pub names: u32,
    /// One of the names.
    pub at: NamedAt,
}

/// What the listings of a head name.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Every folder could be read.
    pub complete: bool,
    pub mails: u64,
    pub objects: HashMap<ObjectId, NamedObject>,
    pub files: HashSet<ObjectId>,
}

impl Named {
    pub(super) fn add(&mut self, object: &KeyTail, size: u64, exact: bool, at: &NamedAt) {
        let found = self.objects.entry(object.id()).or_insert_with(|| NamedObject {
            tail: object.clone(),
            size,
            exact,
            names: 0,
            at: at.clone(),
        });
        found.names += 1;
        found.size = found.size.max(size);
    }
}

impl Check<'_> {
    /// Objects that are named: are they there, as large as they should be?
    pub(super) async fn lost(&mut self, named: &Named, objects: &Objects) -> Result<()> {
        let mut missing = Vec::new();
        for (id, found) in &named.objects {
            let key = mail_key(&self.stored.user, &found.tail);
            match objects.mails.get(id) {
                Some((tail, _)) if *tail != found.tail => missing.push(found),
                Some((_, size)) if found.exact && *size != found.size || *size < found.size => {
                    let what = format!("{size} bytes instead of {}", found.size);
                    self.add_at(Kind::Size, &found.at, key, what);
                }
                Some(_) => {}
                None => missing.push(found),
            }
        }
        // A listing may lag behind; what it lacks is asked for by name.
        let asked = missing.into_iter().map(|found| {
            let (stored, key) = (self.stored.clone(), mail_key(&self.stored.user, &found.tail));
            async move {
                match stored.store.head(&key, stored.why).await {
                    Ok(_) => Ok(None),
                    Err(StoreError::NotFound { .. }) => Ok(Some(found)),
                    Err(e) => Err(stored.failed(e)),
                }
            }
        });
        let asked: Vec<_> = asked.collect();
        let gone: Vec<Option<&NamedObject>> =
            stream::iter(asked).buffer_unordered(AT_ONCE).try_collect().await?;
        for found in gone.into_iter().flatten() {
            let key = mail_key(&self.stored.user, &found.tail);
            let what = match found.names {
                1 => "the store does not have it".to_owned(),
                n => format!("the store does not have it; {n} names lead to it"),
            };
            self.add_at(Kind::Lost, &found.at, key, what);
        }
        Ok(())
    }

    /// The dropped list; `None` if it cannot be read.
    pub(super) async fn dropped(
        &mut self,
        head: &Head,
        named: &Named,
    ) -> Result<Option<DroppedList>> {
        let dropped = match self.stored.dropped(head).await {
            Ok(dropped) => dropped,
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(error) => {
                self.bad_parts(None, &head.dropped, &error);
                return Ok(None);
            }
        };
        self.report.dropped = dropped.len() as u64;
        let used = bundles_of(head);
        for at in dropped.iter() {
            let what =
                if at.doomed { "named, and about to be deleted" } else { "named and dropped" };
            match &at.object {
                Dropped::Mail(tail) => {
                    if let Some(found) = named.objects.get(&tail.id()) {
                        let key = mail_key(&self.stored.user, tail);
                        self.add_at(Kind::Dropped, &found.at, key, what);
                    }
                }
                Dropped::Bundle(id) if used.contains(id) => {
                    let key = bundle_key(&self.stored.user, *id);
                    self.add(Kind::Dropped, None, None, Some(key), what);
                }
                Dropped::File(id) if named.files.contains(id) => {
                    let key = file_key(&self.stored.user, *id);
                    self.add(Kind::Dropped, None, None, Some(key), what);
                }
                Dropped::Bundle(_) | Dropped::File(_) => {}
            }
        }
        Ok(Some(dropped))
    }

    /// Objects that nothing names: mails on their way, late arrivals, leftovers.
    pub(super) fn unnamed(
        &mut self,
        head: &Head,
        named: &Named,
        dropped: &DroppedList,
        objects: &Objects,
    ) {
        let (mut mails, mut bundles, mut files) = (HashSet::new(), HashSet::new(), HashSet::new());
        for at in dropped.iter() {
            match &at.object {
                Dropped::Mail(tail) => mails.insert(tail.id()),
                Dropped::Bundle(id) => bundles.insert(*id),
                Dropped::File(id) => files.insert(*id),
            };
        }
        let paths = Paths::new(head);
        // With an owner, what is above the watermark is looked at when the owner flushes, or
        // when the user is opened after a loss.
        let pending = |id: ObjectId| head.owner.is_some() && id > head.watermark;
        for (id, (tail, _)) in &objects.mails {
            if named.objects.contains_key(id) || mails.contains(id) {
                continue;
            }
            if pending(*id) && id.epoch <= head.epoch {
                self.report.newer += 1;
                continue;
            }
            let key = mail_key(&self.stored.user, tail);
            let decoded = tail.decode();
            let place = paths.folder(decoded.folder).map(|f| paths.text(Place::own(f.id)));
            let name = decoded.name.map(|name| crate::format::escape::escape(&name));
            let what = match id.epoch <= head.epoch {
                true => "a mail that no listing names",
                false => "a mail of an epoch to come, which no listing names",
            };
            self.add(Kind::Late, place, name, Some(key), what);
        }
        let used = bundles_of(head);
        let mine = |id: ObjectId| head.owner.is_some() && id.epoch >= head.epoch;
        let left = |id: &&ObjectId| !mine(**id);
        let stray_bundle = |id: &&ObjectId| !used.contains(id) && !bundles.contains(*id);
        let stray_file = |id: &&ObjectId| !named.files.contains(id) && !files.contains(*id);
        let leftovers = objects.bundles.keys().filter(left).filter(stray_bundle).count()
            + objects.files.keys().filter(left).filter(stray_file).count();
        self.report.leftovers = leftovers as u64;
    }

    /// Reads every mail that is named and there, and compares its checksum.
    pub(super) async fn read_all(&mut self, named: &Named, objects: &Objects) -> Result<()> {
        let there: Vec<_> = named
            .objects
            .iter()
            .filter(|(id, found)| objects.mails.get(id).is_some_and(|o| o.0 == found.tail))
            .map(|(_, found)| {
                let (stored, tail) = (self.stored.clone(), found.tail.clone());
                async move { (found, mail_bytes(&stored, &tail).await) }
            })
            .collect();
        let mut reading = stream::iter(there).buffer_unordered(AT_ONCE);
        while let Some((found, bytes)) = reading.next().await {
            match bytes? {
                Ok(bytes) => self.report.read += bytes.len() as u64,
                Err(why) => {
                    let key = mail_key(&self.stored.user, &found.tail);
                    self.add_at(Kind::Content, &found.at, key, why);
                }
            }
        }
        Ok(())
    }
}

/// Bundles that a head needs.
fn bundles_of(head: &Head) -> HashSet<ObjectId> {
    let folders = head.folders.iter().flat_map(|f| &f.parts);
    let tables = head.names.iter().chain(&head.dropped).chain(&head.previous);
    folders.chain(tables).map(|p: &PartRef| p.bundle).collect()
}
