//! What was done through the mount, as a history of states, and which of them may be seen after
//! something died.
//!
//! Each call that was answered is a step. A crash of the process may undo nothing but the call
//! that was not answered yet; a power cut nothing before the last sync that was answered; a
//! lost disk nothing before the cut of the last flush. So what is seen afterwards must be
//! exactly one of the states since then, and every mail that was made safe must be in it, or
//! have come back beside it.

use super::indexes;
use super::wrong::{Kind, Violation};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

pub type DirNo = u32;
pub type MailNo = u32;
pub const TOP: DirNo = 0;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Dir(DirNo),
    /// A mail, by what it says of itself.
    Mail(MailNo),
    /// Any other file, with what it holds.
    File(Arc<Vec<u8>>),
}

pub type Key = (DirNo, String);

/// New meanings of names.
pub type Change = Vec<(Key, Option<Item>)>;

#[derive(Debug)]
struct Step {
    /// What the names meant before.
    undo: Change,
    at: Duration,
    /// Not done by anybody: what was found after a death.
    seen: bool,
    /// It changed flags in the index of an sdbox folder, or took a mail out of it.
    important: bool,
}

/// A mail that somebody began to deliver.
#[derive(Debug, Clone, Default)]
pub struct MailInfo {
    pub body: Vec<u8>,
    /// The name it was written under.
    pub name: Option<String>,
    /// The step that first named it, once it was safe.
    pub named: Option<usize>,
    /// The call that makes it safe was answered.
    pub safe: bool,
    /// A request with it was given up and arrived later. Whoever finds it there gives it a name
    /// once more, though it may be known, or expunged, since: never lost is worth a duplicate.
    pub late: bool,
    /// Directories of folders it was published in.
    pub folder: Option<DirNo>,
}

#[derive(Debug, Default)]
pub struct Model {
    names: BTreeMap<Key, Item>,
    steps: Vec<Step>,
    dirs: DirNo,
    pub mails: BTreeMap<MailNo, MailInfo>,
    by_body: BTreeMap<Vec<u8>, MailNo>,
    /// All steps before this are on the disk.
    pub synced: usize,
    /// All steps before this are in the store.
    pub flushed: usize,
    /// The last step may or may not have been done.
    pub doubt: bool,
    /// Index of steps at which the puts of bundles were called.
    pub bundles: BTreeMap<String, Cut>,
    /// Where this life's steps begin.
    begun: usize,
    /// The life that flushed what is there after a death before it was seen.
    pub flushed_unseen: Option<String>,
    /// The machine may be the one that died before the last, with its state: then it goes on as after
    /// the death of a process.
    pub came_back: bool,
    /// Mails are kept as sdbox.
    pub sdbox: bool,
    /// What files other than mails held at these steps is on the disk.
    files: BTreeMap<Key, usize>,
    /// So many undeletes go on.
    undeletes: u32,
}

/// What of the steps a bundle holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// All before this.
    At(usize),
    /// What this life found, and nobody has seen.
    Found(String),
}

/// What died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// Nothing: the user was handed over.
    None,
    Process,
    Power,
    Disk,
}

/// What is found on a mount: paths, without what only lives for a moment.
pub type Seen = BTreeMap<String, Item>;

/// Names in which nobody looks after a death.
pub fn is_passing(path: &str) -> bool {
    path.contains("/tmp/")
        || path.ends_with(".lock")
        || path.ends_with(".newlock")
        || path.ends_with(".tmp")
        || path.contains("/.temp.")
        // Raised by a recovery, or when it is made; clients are told what follows from it.
        || path.contains("dovecot-uidvalidity.")
}

pub fn is_mail(path: &str) -> bool {
    path.contains("/cur/") || path.contains("/new/") || path.contains("/dbox-Mails/u.")
}

impl Model {
    pub fn index(&self) -> usize {
        self.steps.len()
    }

    pub fn find(&self, path: &str) -> Option<&Item> {
        let mut at = TOP;
        let mut parts = path.split('/').peekable();
        loop {
            let item = self.names.get(&(at, parts.next()?.to_string()))?;
            match (item, parts.peek()) {
                (item, None) => return Some(item),
                (Item::Dir(dir), _) => at = *dir,
                _ => return None,
            }
        }
    }

    pub fn dir(&self, path: &str) -> Option<DirNo> {
        match self.find(path)? {
            Item::Dir(dir) => Some(*dir),
            _ => None,
        }
    }

    pub fn key(&self, path: &str) -> Option<Key> {
        match path.rsplit_once('/') {
            Some((dir, name)) => Some((self.dir(dir)?, name.to_string())),
            None => Some((TOP, path.to_string())),
        }
    }

    pub fn new_dir(&mut self) -> Item {
        self.dirs += 1;
        Item::Dir(self.dirs)
    }

    /// A step that was done.
    pub fn apply(&mut self, change: Change, at: Duration) {
        let undo = change
            .iter()
            .map(|(key, _)| (key.clone(), self.names.get(key).cloned()))
            .rev()
            .collect();
        let important = change.iter().any(|(key, item)| self.is_important(key, item.as_ref()));
        let renamed = change.len() > 1;
        for (key, item) in change {
            // Another file, of which nothing was synced.
            let file = |item: Option<&Item>| matches!(item, Some(Item::File(_)));
            if renamed || !file(self.names.get(&key)) || !file(item.as_ref()) {
                self.files.remove(&key);
            }
            self.set(key, item);
        }
        self.steps.push(Step { undo, at, seen: false, important });
        self.doubt = false;
        if self.undeletes > 0 {
            self.may_all_come_back();
        }
    }

    /// What has no name may have one from now on.
    pub fn undelete_begins(&mut self) {
        self.undeletes += 1;
        self.may_all_come_back();
    }

    pub fn undelete_ends(&mut self) {
        self.undeletes = self.undeletes.saturating_sub(1);
    }

    fn may_all_come_back(&mut self) {
        let named: BTreeSet<MailNo> = self
            .names
            .values()
            .filter_map(|item| if let Item::Mail(no) = item { Some(*no) } else { None })
            .collect();
        let gone = self.mails.iter_mut().filter(|(no, _)| !named.contains(no));
        gone.for_each(|(_, mail)| mail.late = true);
    }

    /// Whether a new meaning of a name is an important change in an index.
    fn is_important(&self, key: &Key, item: Option<&Item>) -> bool {
        match (self.names.get(key), item) {
            (Some(Item::File(old)), Some(Item::File(new)))
                if self.sdbox && key.1 == "dovecot.index.log" =>
            {
                indexes::is_important(old, new)
            }
            _ => false,
        }
    }

    /// A step that was begun when the machine died.
    pub fn perhaps(&mut self, change: Change, at: Duration) {
        self.apply(change, at);
        self.doubt = true;
    }

    fn set(&mut self, key: Key, item: Option<Item>) {
        match item {
            Some(item) => _ = self.names.insert(key, item),
            None => _ = self.names.remove(&key),
        }
    }

    pub fn new_mail(&mut self, body: &[u8]) -> MailNo {
        let no = self.mails.len() as MailNo + 1;
        self.mails.insert(no, MailInfo { body: body.to_vec(), ..MailInfo::default() });
        self.by_body.insert(body.to_vec(), no);
        no
    }

    /// A mail is safe under its first name.
    pub fn name_mail(&mut self, no: MailNo, key: Key, at: Duration) {
        if let Some(info) = self.mails.get_mut(&no) {
            info.named = Some(self.steps.len());
        }
        self.apply(vec![(key, Some(Item::Mail(no)))], at);
    }

    /// A mail was given a name while the user was served.
    ///
    /// # Errors
    /// It had been named, or was never sent.
    pub fn adopted(&mut self, path: &str, body: &[u8], at: Duration) -> Result<(), String> {
        let no = self.mail_of(body).ok_or_else(|| format!("{path} holds what nobody sent"))?;
        let info = &self.mails[&no];
        if info.safe && !info.late {
            return Err(format!("{path}: mail {no} comes out of nowhere"));
        }
        if let Some(key) = self.key(path) {
            self.nobodys(no);
            self.apply(vec![(key, Some(Item::Mail(no)))], at);
        }
        Ok(())
    }

    /// A mail lost its name in `tmp/`. Without another one, its delivery was given up; should it
    /// come back some day, that is what its sender sends again.
    pub fn abandoned(&mut self, no: MailNo) {
        self.nobodys(no);
    }

    /// A mail without a name is one that nobody waits for: given up, or expunged. Should it come back,
    /// as what a request left that was given up, that is owed to nobody until a flush has it.
    fn nobodys(&mut self, no: MailNo) {
        if !self.names.values().any(|item| *item == Item::Mail(no))
            && let Some(info) = self.mails.get_mut(&no)
        {
            info.safe = false;
            info.named = None;
        }
    }

    pub fn mail_of(&self, body: &[u8]) -> Option<MailNo> {
        self.by_body.get(body).copied()
    }

    /// What a file holds at a step is on the disk.
    pub fn file_synced(&mut self, path: &str, step: usize) {
        if let Some(key) = self.key(path) {
            let synced = self.files.entry(key).or_default();
            *synced = step.max(*synced);
        }
    }

    /// All paths below the top.
    pub fn paths(&self) -> Seen {
        paths_of(&self.names)
    }

    /// The oldest change of flags, MOVE or EXPUNGE that no flush holds.
    pub fn oldest_important(&self) -> Option<Duration> {
        let cur = |dir: &DirNo| {
            self.names.iter().any(|((_, name), item)| name == "cur" && *item == Item::Dir(*dir))
        };
        let important = |step: &&Step| {
            let from_cur = |((dir, _), item): &(Key, Option<Item>)| {
                matches!(item, Some(Item::Mail(_))) && cur(dir)
            };
            !step.seen && (step.important || step.undo.iter().any(from_cur))
        };
        self.steps.get(self.flushed.max(self.begun)..)?.iter().find(important).map(|step| step.at)
    }

    /// Compares what `life` shows after a death with what may be, and goes on from what is seen.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn after(&mut self, death: Death, seen: &Seen, life: &str) -> Result<(), Violation> {
        let end = self.steps.len();
        let first = match death {
            Death::None => end,
            Death::Process => end - usize::from(self.doubt),
            Death::Power => self.synced.min(end),
            Death::Disk => self.flushed.min(end),
        };
        let last = self.paths();
        let mut names = self.names.clone();
        let mut problem = None;
        // Each file by itself is what it was at some moment.
        let one_by_one = self.sdbox && death == Death::Power;
        let (mut logs, mut fitted) = (Vec::<(usize, Seen)>::new(), false);
        let owned = |(path, item): (&String, &Item)| (path.clone(), item.clone());
        let start = if one_by_one { first.min(self.flushed) } else { first };
        for k in (start..=end).rev() {
            if k < end {
                for (key, item) in &self.steps[k].undo {
                    match item {
                        Some(item) => _ = names.insert(key.clone(), item.clone()),
                        None => _ = names.remove(key),
                    }
                }
            }
            let paths = paths_of(&names);
            if one_by_one {
                let boxes = paths.iter().filter(|(p, _)| p.contains("/mailboxes/"));
                logs.push((k, boxes.map(owned).collect()));
            }
            if fitted || k < first {
                continue;
            }
            match self.fits(death, k, &paths, &last, seen) {
                Ok(()) => {
                    problem = None;
                    fitted = true;
                    if !one_by_one {
                        break;
                    }
                }
                // The differences to the oldest state that would do say most.
                Err(what) => problem = Some((k, what)),
            }
        }
        if let Some((k, mut wrong)) = problem {
            wrong.what = format!(
                "after {death:?}: no state of {first}..={end} fits; state {k}:\n{}",
                wrong.what
            );
            return Err(wrong);
        }
        for path in last.keys().filter(|path| one_by_one && indexes::is_log(path)) {
            let from = self.key(path).and_then(|key| self.files.get(&key).copied());
            let from = from.unwrap_or(0).max(self.flushed);
            let mut states = logs.iter().filter(|(k, _)| *k >= from).map(|(_, state)| state);
            if !indexes::may_be(&mut states, path, seen) {
                let what = format!("after {death:?}: {path} never was so since its last sync");
                return Err(Violation::new(Kind::NoState, what));
            }
        }
        self.reset(seen, life);
        Ok(())
    }

    fn fits(
        &self,
        death: Death,
        k: usize,
        state: &Seen,
        last: &Seen,
        seen: &Seen,
    ) -> Result<(), Violation> {
        let exact = matches!(death, Death::None | Death::Process);
        let mut wrong = String::new();
        let mut kinds = BTreeSet::new();
        let (found, named) = (count_mails(seen), count_mails(state));
        let waiting = self.without_record(death, state);
        let late = |mail: &MailNo| {
            self.mails.get(mail).is_some_and(|m| m.late || !m.safe) || waiting.contains_key(mail)
        };
        let everywhere: BTreeSet<&String> = state.keys().chain(seen.keys()).collect();
        for path in everywhere {
            // A user's directory is there at once, and made behind the answer.
            let empty_user = !path.contains('/') && !state.keys().any(|p| p.contains('/'));
            if is_passing(path) || empty_user {
                continue;
            }
            match (state.get(path), seen.get(path)) {
                (Some(a), Some(b)) if same(a, b, !exact) => {}
                (Some(Item::File(old)), Some(Item::File(new)))
                    if self.sdbox && indexes::has_only_more(path, old, new, seen, &late) => {}
                // Filling it failed, and a start that found mails beside it asks for that again.
                (Some(Item::File(old)), Some(Item::File(new)))
                    if self.sdbox
                        && death != Death::None
                        && indexes::is_empty(path, old)
                        && indexes::is_first(path, new) => {}
                (Some(Item::File(old)), Some(Item::File(new))) if self.doubt && exact => {
                    if !mixed(old, new, last.get(path)) {
                        _ = writeln!(wrong, "  {path}: holds what nobody wrote");
                    }
                }
                // It has another number, and a record.
                (None, Some(Item::Mail(mail)))
                    if waiting.get(mail).is_some_and(|old| {
                        parent(old) == parent(path) && !seen.contains_key(*old)
                    }) => {}
                (None, Some(Item::Mail(mail))) => {
                    if let Err(why) = self.may_come_back(death, k, *mail, path, state, last) {
                        kinds.insert(match named.contains_key(mail) {
                            true => Kind::MailDoubled,
                            false => Kind::MailWrong,
                        });
                        let at = |(_, item): &(&String, &Item)| **item == Item::Mail(*mail);
                        let places: Vec<&String> =
                            state.iter().filter(at).map(|(path, _)| path).collect();
                        _ = writeln!(wrong, "  {path}: mail {mail} {why} (was at {places:?})");
                    }
                }
                // A folder may have been made anew for a mail that arrived late.
                (None, Some(Item::Dir(_))) => {}
                // The first log of a folder without an index in which a mail came back.
                (None, Some(Item::File(log))) if self.sdbox && indexes::is_first(path, log) => {}
                // Files of an index may come and go.
                (Some(Item::File(_)), None) | (None, Some(Item::File(_))) if !exact => {}
                // It gets another number, and so shows.
                (Some(Item::Mail(mail)), None)
                    if self.sdbox
                        && death != Death::None
                        && found.contains_key(mail)
                        // A power cut takes unsynced records: what may be lost so is judged below.
                        && (death == Death::Power || indexes::is_unnamed(state, path)) => {}
                (a, b) => {
                    let is_at = |item: &Item| -> Vec<&String> {
                        seen.iter().filter(|(_, i)| *i == item).map(|(p, _)| p).collect()
                    };
                    let places = match a {
                        Some(item @ Item::Mail(_)) => format!(" (is at {:?})", is_at(item)),
                        _ => String::new(),
                    };
                    _ = writeln!(wrong, "  {path}: {} instead of {}{places}", word(b), word(a));
                }
            }
        }
        // Who delivered a mail is gone with the machine, and nobody else looks at temporary names.
        let gone = matches!(death, Death::Power | Death::Disk) && !self.came_back;
        let shown: BTreeSet<MailNo> = seen
            .iter()
            .filter(|(path, _)| is_mail(path))
            .filter_map(|(_, item)| if let Item::Mail(no) = item { Some(*no) } else { None })
            .collect();
        let hidden = |path: &str, mail| gone && is_mail(path) && !shown.contains(mail);
        for (path, item) in last {
            if let Item::Mail(mail) = item
                && self.mails.get(mail).is_some_and(|m| m.safe)
                && (!found.contains_key(mail) || hidden(path, mail))
            {
                kinds.insert(Kind::MailLost);
                _ = writeln!(wrong, "  mail {mail} is LOST (was {path})");
            }
        }
        if self.sdbox && death == Death::Disk {
            let mut more = Vec::new();
            let safe = |mail: &MailNo| self.mails.get(mail).is_some_and(|m| m.safe);
            indexes::wrong_after_loss(state, last, seen, &safe, &mut more);
            for (kind, what) in more {
                kinds.insert(kind);
                _ = writeln!(wrong, "  {what}");
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        kinds.insert(Kind::NoState);
        Err(Violation { kinds, what: wrong })
    }

    /// Mails of sdbox that had their number when the daemon died and no record yet, so that nobody was
    /// told of them: a server would refuse the next mail for their sake and make its index anew.
    fn without_record<'a>(&self, death: Death, state: &'a Seen) -> BTreeMap<MailNo, &'a String> {
        let mut found = BTreeMap::new();
        if self.sdbox && death == Death::Process {
            for (path, item) in state {
                if let Item::Mail(mail) = item
                    && indexes::is_unnamed(state, path)
                {
                    found.insert(*mail, path);
                }
            }
        }
        found
    }

    /// A mail that is seen where the state has none.
    fn may_come_back(
        &self,
        death: Death,
        k: usize,
        mail: MailNo,
        path: &str,
        state: &Seen,
        _last: &Seen,
    ) -> Result<(), &'static str> {
        let Some(info) = self.mails.get(&mail) else { return Err("was never sent") };
        if !path.contains("/new/") && !path.contains("/dbox-Mails/u.") {
            return Err("came back where no new mail is");
        }
        if info.late || !info.safe {
            return Ok(());
        }
        if matches!(death, Death::None | Death::Process) {
            return Err("comes out of nowhere");
        }
        if info.named.is_some_and(|n| n < k) && state.values().all(|i| *i != Item::Mail(mail)) {
            return Err("was expunged long ago");
        }
        Ok(())
    }

    /// Goes on from what is seen.
    fn reset(&mut self, seen: &Seen, life: &str) {
        let mut names = BTreeMap::new();
        let mut dirs: BTreeMap<&str, DirNo> = BTreeMap::from([("", TOP)]);
        let old: BTreeMap<String, DirNo> = self
            .paths()
            .into_iter()
            .filter_map(
                |(path, item)| if let Item::Dir(no) = item { Some((path, no)) } else { None },
            )
            .collect();
        // Sorted, so a directory comes before what is in it.
        for (path, item) in seen {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let item = match item {
                Item::Dir(_) => {
                    let no = old.get(path).copied().unwrap_or_else(|| {
                        self.dirs += 1;
                        self.dirs
                    });
                    dirs.insert(path, no);
                    Item::Dir(no)
                }
                item => item.clone(),
            };
            names.insert((dirs[dir], name.to_string()), item);
        }
        let mut change: Change = Vec::new();
        for key in self.names.keys().filter(|key| !names.contains_key(*key)) {
            change.push((key.clone(), None));
        }
        for (key, item) in names {
            if self.names.get(&key) != Some(&item) {
                change.push((key, Some(item)));
            }
        }
        if !change.is_empty() {
            let at = self.steps.last().map_or(Duration::ZERO, |s| s.at);
            self.apply(change, at);
            if let Some(last) = self.steps.last_mut() {
                last.seen = true;
            }
        }
        self.doubt = false;
        self.undeletes = 0;
        let end = self.steps.len();
        self.begun = end;
        // What a life found and flushed that died before it was seen is not known to the letter: the
        // one that is seen may have brought back more, or finished what the other began.
        if self.flushed_unseen.take().is_some_and(|by| by == life) {
            self.flushed = end;
        }
        let flushed = self.flushed;
        for cut in self.bundles.values_mut() {
            if let Cut::Found(by) = cut {
                *cut = Cut::At(if by == life { end } else { flushed });
            }
        }
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

/// How many names each mail has.
fn count_mails(paths: &Seen) -> BTreeMap<MailNo, u32> {
    let mut found = BTreeMap::new();
    for item in paths.values() {
        if let Item::Mail(mail) = item {
            *found.entry(*mail).or_default() += 1;
        }
    }
    found
}

fn same(a: &Item, b: &Item, loosely: bool) -> bool {
    match (a, b) {
        (Item::Dir(_), Item::Dir(_)) => true,
        (Item::File(a), Item::File(b)) => loosely || a == b,
        (a, b) => a == b,
    }
}

/// Whether a file is what was there with some of what was being written over it.
fn mixed(old: &[u8], seen: &[u8], new: Option<&Item>) -> bool {
    let Some(Item::File(new)) = new else { return false };
    let long = old.len().max(new.len());
    seen.len() <= long
        && seen.len() >= old.len().min(new.len())
        && seen.iter().enumerate().all(|(i, b)| old.get(i) == Some(b) || new.get(i) == Some(b))
}

fn word(item: Option<&Item>) -> String {
    match item {
        None => "nothing".into(),
        Some(Item::Dir(_)) => "a directory".into(),
        Some(Item::Mail(no)) => format!("mail {no}"),
        Some(Item::File(data)) => {
            format!("a file of {} bytes {:08x}", data.len(), crc32c::crc32c(data))
        }
    }
}

fn paths_of(names: &BTreeMap<Key, Item>) -> Seen {
    let mut out = Seen::new();
    let mut waiting = vec![(TOP, String::new())];
    while let Some((dir, prefix)) = waiting.pop() {
        for ((_, name), item) in
            names.range((dir, String::new())..).take_while(|((d, _), _)| *d == dir)
        {
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
            if let Item::Dir(no) = item {
                waiting.push((*no, path.clone()));
            }
            out.insert(path, item.clone());
        }
    }
    out
}
