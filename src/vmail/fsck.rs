//! Checking a user's data in the store: what the head names against what is there, both ways.
//!
//! The check only reads, owns nothing and needs no mount. It may run beside the user's owner:
//! heads, bundles and mails are never changed in place, so what one head says is checked as a
//! whole, and if the head was swapped meanwhile and something seems to be wrong the check begins
//! again. A store that does not answer ends it with an error; it is never a finding (I4).
//!
//! What can be found is listed in [`Kind`]. Findings are facts, told as lines that scripts can
//! read; what to do about them is the business of [`rescue`] and [`super::repair`].

mod kinds;
mod objects;
pub mod rescue;

pub use kinds::{Finding, Kind, Report};

use super::error::{Error, Result};
use super::history::{self, Ends};
use super::stored::{FolderState, Paths, Stored};
use crate::dovecot::classes::classify;
use crate::format::head::{Head, HeadFolder, PartKind, PartRef};
use crate::format::key::bundle_key;
use crate::format::listing::Entry;
use crate::format::{ObjectId, Place, Sub};
use objects::{Named, Objects};
use std::collections::{BTreeSet, HashMap};

/// How thorough a check is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Read every mail and compare its checksum; else only names and sizes are compared.
    pub read: bool,
}

/// Times that a check begins again because the head was swapped under it.
const TRIES: usize = 3;

/// Checks a user.
///
/// # Errors
/// [`Error::NoUser`] if the store has nothing of that name; a store that does not answer.
pub async fn check(stored: &Stored, options: Options) -> Result<Report> {
    let mut tries = 0;
    loop {
        tries += 1;
        let (report, write_id) = check_once(stored, options).await?;
        if report.findings.is_empty() || tries == TRIES {
            return Ok(report);
        }
        let now = stored.head_object().await?.and_then(|found| found.head.ok());
        if now.map(|head| head.write_id) == write_id {
            return Ok(report);
        }
    }
}

async fn check_once(stored: &Stored, options: Options) -> Result<(Report, Option<String>)> {
    let mut check = Check { stored, report: Report::new(&stored.user) };
    let found = stored.head_object().await?;
    let objects = Objects::list(stored).await?;
    let head = match found.map(|found| found.head) {
        None if objects.is_empty() => {
            return Err(Error::NoUser { user: stored.user.to_string() });
        }
        None => {
            check.add(Kind::Head, None, None, Some(check.head_key()), "there is no head");
            None
        }
        Some(Err(error)) => {
            check.add(Kind::Head, None, None, Some(check.head_key()), error.to_string());
            None
        }
        Some(Ok(head)) => Some(head),
    };
    objects.strangers(&mut check);
    check.report.objects = objects.mails.len() as u64;
    let Some(head) = head else { return Ok((check.report, None)) };
    check.report.epoch = head.epoch.0;
    check.report.owner = head.owner.as_ref().map(|owner| owner.backend.clone());
    check.report.folders = head.folders.len() as u64;
    check.consistent(&head);
    let named = check.folders(&head, &objects).await?;
    check.lost(&named, &objects).await?;
    check.links(&head, &named).await?;
    let dropped = check.dropped(&head, &named).await?;
    if let (true, Some(dropped)) = (named.complete, &dropped) {
        check.unnamed(&head, &named, dropped, &objects);
    }
    check.history(&head).await?;
    if options.read {
        check.read_all(&named, &objects).await?;
    }
    check.report.findings.sort();
    Ok((check.report, Some(head.write_id)))
}

/// A check that is under way.
struct Check<'a> {
    stored: &'a Stored,
    report: Report,
}

impl Check<'_> {
    fn head_key(&self) -> String {
        crate::format::key::head_key(&self.stored.user)
    }

    fn add(
        &mut self,
        kind: Kind,
        folder: Option<String>,
        name: Option<String>,
        object: Option<String>,
        detail: impl Into<String>,
    ) {
        self.report.findings.push(Finding {
            kind,
            user: self.stored.user.to_string(),
            folder,
            name,
            object,
            detail: detail.into(),
        });
    }

    /// What must hold between the fields of a head, beyond what its decoder demands.
    fn consistent(&mut self, head: &Head) {
        let paths = Paths::new(head);
        let key = self.head_key();
        let mut bad = |folder: Option<String>, what: &str| {
            self.add(Kind::Head, folder, None, Some(key.clone()), what);
        };
        if head.watermark.epoch > head.epoch {
            bad(None, "its watermark is of an epoch to come");
        }
        if head.closed.iter().any(|c| c.epoch >= head.epoch) {
            bad(None, "its own epoch, or one to come, is closed");
        }
        if !head.closed.is_sorted_by_key(|c| c.epoch) {
            bad(None, "its closed epochs are not in order");
        }
        if head.known_above.iter().any(|id| *id <= head.watermark) {
            bad(None, "ids that are above the watermark are not");
        }
        for folder in &head.folders {
            let kinds: Vec<PartKind> = folder.parts.iter().map(|p| p.kind).collect();
            let path = || Some(paths.text(Place::own(folder.id)));
            if kinds.first().is_some_and(|k| *k != PartKind::Base)
                || kinds.iter().skip(1).any(|k| *k != PartKind::Diff)
            {
                bad(path(), "its parts are not a base and diffs");
            }
            if folder.burnt_below > folder.uid_ceiling {
                bad(path(), "UIDs above its ceiling are burnt");
            }
        }
    }

    fn bad_parts(&mut self, folder: Option<String>, parts: &[PartRef], error: &Error) {
        let bundle = parts.last().map(|p| bundle_key(&self.stored.user, p.bundle));
        self.add(Kind::Part, folder, None, bundle, error.to_string());
    }

    /// Reads all folders, and gives what they name.
    async fn folders(&mut self, head: &Head, objects: &Objects) -> Result<Named> {
        let paths = Paths::new(head);
        let mut named = Named { complete: true, ..Named::default() };
        let parts: Vec<&PartRef> = head.folders.iter().flat_map(|f| &f.parts).collect();
        // Together where all is well; one by one to tell which is not.
        let mut all = match self.stored.ranges(&parts).await {
            Ok(bytes) => Some(bytes.into_iter()),
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(_) => None,
        };
        for folder in &head.folders {
            let path = paths.text(Place::own(folder.id));
            let state = match &mut all {
                Some(bytes) => {
                    let bytes = bytes.by_ref().take(folder.parts.len()).collect();
                    self.stored.assemble(folder, bytes).await
                }
                None => self.stored.folder(folder).await,
            };
            match state {
                Ok(state) => self.folder(&path, folder, &state, objects, &mut named),
                Err(error @ Error::Store { .. }) => return Err(error),
                Err(error) => {
                    named.complete = false;
                    let parts = self.broken_first(&folder.parts).await?;
                    self.bad_parts(Some(path), &parts, &error);
                }
            }
        }
        self.report.mails = named.mails;
        Ok(named)
    }

    /// The parts up to the first that cannot be read.
    async fn broken_first(&self, parts: &[PartRef]) -> Result<Vec<PartRef>> {
        for (i, part) in parts.iter().enumerate() {
            match self.stored.ranges(&[part]).await {
                Ok(_) => {}
                Err(error @ Error::Store { .. }) => return Err(error),
                Err(_) => return Ok(parts[..=i].to_vec()),
            }
        }
        Ok(parts.to_vec())
    }

    fn folder(
        &mut self,
        path: &str,
        folder: &HeadFolder,
        state: &FolderState,
        objects: &Objects,
        named: &mut Named,
    ) {
        for (sub, name, entry) in state.listing.names() {
            let shown = shown_name(sub, name);
            let at = objects::NamedAt { folder: path.to_owned(), name: shown };
            match entry {
                Entry::Mail { size, object, .. } => {
                    named.mails += 1;
                    named.add(object, *size, true, &at);
                }
                Entry::Extents { extents, .. } => {
                    named.mails += 1;
                    for extent in extents {
                        named.add(&extent.object, extent.len, false, &at);
                    }
                }
                Entry::Local { object: Some(object), size, .. } => {
                    named.files.insert(*object);
                    match objects.files.get(object) {
                        Some(found) if found == size => {}
                        Some(found) => {
                            let what = format!("{found} bytes instead of {size}");
                            self.add_at(
                                Kind::Size,
                                &at,
                                objects.file_key(self.stored, *object),
                                what,
                            );
                        }
                        None => {
                            let key = objects.file_key(self.stored, *object);
                            self.add_at(Kind::Lost, &at, key, "the store does not have it");
                        }
                    }
                }
                Entry::Local { object: None, .. } => {
                    let has = state.contents.contains_key(&(sub, name.clone()));
                    if !has && !classify(&[name]).is_cache() {
                        let bundle = folder.parts.first();
                        let key = bundle.map(|p| bundle_key(&self.stored.user, p.bundle));
                        let what = "a file without its content";
                        self.add(Kind::Part, Some(at.folder), Some(at.name), key, what);
                    }
                }
                Entry::Symlink { .. } => {}
            }
        }
    }

    fn add_at(&mut self, kind: Kind, at: &objects::NamedAt, key: String, what: impl Into<String>) {
        self.add(kind, Some(at.folder.clone()), Some(at.name.clone()), Some(key), what);
    }

    /// The table of objects with several names against the listings.
    async fn links(&mut self, head: &Head, named: &Named) -> Result<()> {
        let table = match self.stored.links(head).await {
            Ok(table) => table,
            Err(error @ Error::Store { .. }) => return Err(error),
            Err(error) => {
                self.bad_parts(None, &head.names, &error);
                return Ok(());
            }
        };
        if !named.complete {
            return Ok(());
        }
        let counted: HashMap<ObjectId, u32> = named
            .objects
            .iter()
            .filter(|(_, found)| found.names > 1)
            .map(|(id, found)| (*id, found.names))
            .collect();
        let ids: BTreeSet<ObjectId> = table.keys().chain(counted.keys()).copied().collect();
        for id in ids {
            let (told, counted) = (table.get(&id), counted.get(&id));
            if told != counted {
                let number = |n: Option<&u32>| n.copied().unwrap_or(1);
                let what = format!("{} names, the table says {}", number(counted), number(told));
                let found = named.objects.get(&id);
                let key = found.map(|f| crate::format::key::mail_key(&self.stored.user, &f.tail));
                let at = found.map(|f| f.at.clone());
                let (folder, name) = at.map(|at| (at.folder, at.name)).unzip();
                self.add(Kind::Links, folder, name, key, what);
            }
        }
        Ok(())
    }

    /// Whether earlier states can be read for as long as they are kept.
    async fn history(&mut self, head: &Head) -> Result<()> {
        let history = history::follow(self.stored, head.clone(), None).await?;
        self.report.states = history.states.len() as u64;
        if let Ends::Broken(why) = history.ends {
            let last = history.states.last().and_then(|s| s.head.previous.as_ref());
            let key = last.map(|part| bundle_key(&self.stored.user, part.bundle));
            self.add(Kind::History, None, None, key, why);
        }
        Ok(())
    }
}

/// A name and the directory of its folder that it is in.
fn shown_name(sub: Sub, name: &[u8]) -> String {
    let name = crate::format::escape::escape(name);
    match sub {
        Sub::Own => name,
        sub => format!("{}/{name}", sub.as_str()),
    }
}
