//! What may be seen in the index logs of sdbox after a death. Here and only here stands which mails
//! a folder has, and their flags; a listing does not show it.

use super::maillog::{self, State};
use super::model::{Item, MailNo, Seen};
use super::sdbox::number;
use super::wrong::Kind;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

const LOG: &str = "/dovecot.index.log";

/// Whether a path is that of a log which says what is in a folder of sdbox.
pub fn is_log(path: &str) -> bool {
    path.ends_with(LOG) && path.contains("/mailboxes/")
}

/// Whether a log only asks for an index to be made.
pub fn is_first(path: &str, log: &[u8]) -> bool {
    is_log(path) && maillog::read(log).is_some_and(|s| s.rebuild && s.validity == 0)
}

/// Whether a log is one that a server began and could not fill.
pub fn is_empty(path: &str, log: &[u8]) -> bool {
    let empty = |s: State| s.validity == 0 && s.mails.is_empty() && !s.rebuild;
    is_log(path) && maillog::read(log).is_some_and(empty)
}

/// The directory of the mails that a log is about.
fn mails_of(log: &str) -> String {
    let dir = log.strip_suffix(LOG).unwrap_or(log);
    match dir.ends_with("/dbox-Mails") {
        true => dir.into(),
        false => format!("{}/dbox-Mails", dir.replacen("/index/", "/mail/", 1)),
    }
}

/// Logs that may be about the mails in a directory: beside them, and where indexes lie.
fn logs_of(dir: &str) -> [String; 2] {
    let beside = format!("{dir}{LOG}");
    let apart = dir.strip_suffix("/dbox-Mails").unwrap_or(dir).replacen("/mail/", "/index/", 1);
    [beside, format!("{apart}{LOG}")]
}

/// Logs that were read, by where their content is, which stays there as long as this holds it.
type Known = BTreeMap<usize, (Arc<Vec<u8>>, Option<Rc<State>>)>;

thread_local! {
    static KNOWN: RefCell<Known> = const { RefCell::new(Known::new()) };
}

/// A judgement reads the same logs for each mail of each state.
const MOST_KNOWN: usize = 2000;

fn read(seen: &Seen, path: &str) -> Option<Rc<State>> {
    let Item::File(content) = seen.get(path)? else { return None };
    KNOWN.with_borrow_mut(|known| {
        if known.len() > MOST_KNOWN {
            known.clear();
        }
        let entry = known.entry(Arc::as_ptr(content).addr()).or_insert_with(|| {
            let state = maillog::read(content).filter(|s| s.validity > 0 || s.rebuild);
            (content.clone(), state.map(Rc::new))
        });
        entry.1.clone()
    })
}

fn log_beside(seen: &Seen, dir: &str) -> Option<Rc<State>> {
    logs_of(dir).iter().find_map(|log| read(seen, log))
}

/// Whether a mail file of sdbox is one that its folder's index does not name.
pub fn is_unnamed(seen: &Seen, path: &str) -> bool {
    let Some((dir, name)) = path.rsplit_once('/') else { return false };
    match (number(name), log_beside(seen, dir)) {
        (Some(uid), Some(log)) => !log.mails.contains_key(&uid),
        (Some(_), None) => true,
        (None, _) => false,
    }
}

/// Whether a write of a log takes flags or mails away, or changes flags.
pub fn is_important(old: &[u8], new: &[u8]) -> bool {
    let (Some(old), Some(new)) = (maillog::read(old), maillog::read(new)) else { return false };
    old.mails.iter().any(|(uid, flags)| new.mails.get(uid) != Some(flags))
}

/// How a log differs from what it was: only additions are allowed.
fn differs(state: &Seen, path: &str, old: &State, new: Option<&State>) -> Option<String> {
    let Some(new) = new else { return (old.validity > 0).then(|| "is gone".into()) };
    if old.validity == 0 {
        return None;
    }
    if new.validity != old.validity {
        return Some(format!("UIDVALIDITY {} instead of {}", new.validity, old.validity));
    }
    if new.next < old.next {
        return Some(format!("next UID {} after {}", new.next, old.next));
    }
    let dir = mails_of(path);
    for (uid, flags) in &old.mails {
        match new.mails.get(uid) {
            Some(now) if now == flags => {}
            None if !state.contains_key(&format!("{dir}/u.{uid}")) => {}
            now => return Some(format!("UID {uid} has flags {now:?} instead of {flags}")),
        }
    }
    let low = new.mails.keys().find(|uid| **uid < old.next && !old.mails.contains_key(uid));
    low.map(|uid| format!("UID {uid} comes out of nowhere"))
}

/// What of the logs that are seen does not go with a state of which everything was flushed. `last` is
/// how it was when the machine died.
pub fn wrong_after_loss(
    state: &Seen,
    last: &Seen,
    seen: &Seen,
    safe: &dyn Fn(&MailNo) -> bool,
    wrong: &mut Vec<(Kind, String)>,
) {
    for path in state.keys().filter(|path| is_log(path)) {
        let dir = mails_of(path);
        let Some(old) = read(state, path).filter(|_| state.contains_key(&dir)) else { continue };
        let new = read(seen, path);
        if let Some(what) = differs(state, path, &old, new.as_deref()) {
            wrong.push((Kind::NoState, format!("{path}: {what}")));
        }
    }
    let mails = seen.iter().filter(|(_, item)| matches!(item, Item::Mail(_)));
    let mut asked: BTreeSet<&str> = BTreeSet::new();
    for (path, item) in mails {
        let Some((dir, name)) = path.rsplit_once('/') else { continue };
        let (Some(uid), Item::Mail(mail)) = (number(name), item) else { continue };
        if !safe(mail) {
            continue;
        }
        let log = log_beside(seen, dir);
        // A mail of a folder whose index was lost or left behind by a rename, or one that had its
        // number and no record: it shows with the next delivery, which meets its number. What showed
        // to the end must show, also if its record came after the cut.
        let was_hidden = || {
            let hidden = |at: &Seen| at.get(path) == Some(item) && is_unnamed(at, path);
            let known = log_beside(state, dir).is_none_or(|old| uid < old.next);
            hidden(state) && (known || hidden(last))
        };
        match log {
            Some(log) if log.rebuild => {}
            Some(log) if log.mails.contains_key(&uid) => {}
            _ if was_hidden() => {}
            Some(_) => {
                let what = format!("{path}: mail {mail} does not show");
                wrong.push((Kind::MailLost, what));
            }
            None => {
                if asked.insert(dir) {
                    wrong.push((Kind::MailLost, format!("{dir} has mails and no index")));
                }
            }
        }
    }
    for path in seen.keys().filter(|path| is_log(path)) {
        let dir = mails_of(path);
        let Some(log) = read(seen, path).filter(|log| !log.rebuild) else { continue };
        for uid in log.mails.keys() {
            let mail = format!("{dir}/u.{uid}");
            let before = read(state, path).is_some_and(|old| old.mails.contains_key(uid));
            let gone = before && !state.contains_key(&mail);
            if !gone && !seen.contains_key(&mail) {
                wrong
                    .push((Kind::MailWrong, format!("{path} shows UID {uid}, which is not there")));
            }
        }
    }
}

/// Whether a log has, beyond what it had, only mails that reached the store late.
pub fn has_only_more(
    path: &str,
    old: &[u8],
    new: &[u8],
    seen: &Seen,
    late: &dyn Fn(&MailNo) -> bool,
) -> bool {
    let (Some(before), Some(after)) = (maillog::read(old), maillog::read(new)) else {
        return false;
    };
    let dir = mails_of(path);
    let is_late = |uid: &u32| match seen.get(&format!("{dir}/u.{uid}")) {
        Some(Item::Mail(mail)) => late(mail),
        _ => false,
    };
    let more = after.mails.keys().filter(|uid| !before.mails.contains_key(uid));
    is_log(path)
        && new.starts_with(old)
        && after.mails.len() > before.mails.len()
        && !is_important(old, new)
        && more.into_iter().all(is_late)
}

/// After a power cut each log is one that it was at some moment since its last sync, or what the
/// store has of it; what was raised or came back is on top.
pub fn may_be<'a>(states: &mut impl Iterator<Item = &'a Seen>, path: &str, seen: &Seen) -> bool {
    let new = read(seen, path);
    states.any(|state| match read(state, path) {
        Some(old) => differs(state, path, &old, new.as_deref()).is_none(),
        None => true,
    })
}
