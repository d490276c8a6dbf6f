//! The table that decides by path what a file is.
//!
//! A path is given as its components below the user's root; the last is the file's name. Only
//! names are looked at, so the answer is the same before and after the file exists. A name that
//! no rule knows is an ordinary file ([`Class::Other`]): kept, flushed, never dropped.
//!
//! Order matters: what lies in `cur` or `new` is a mail even when its name looks like a lock
//! file (a sender chose part of it), but the exact names of Dovecot's own files stay what they
//! are everywhere, because a folder of LAYOUT=fs or a dbox folder may be called `new`.

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// A published mail, immutable: its own object.
    Mail,
    /// A mail being written, which gets its published name by link or rename.
    MailTemp,
    /// Many mails in one file that grows by appending (mdbox `m.N`).
    Growing,
    /// A file of a server's index.
    Index(IndexKind),
    /// A lock file: local, meaningless on another machine.
    Lock,
    /// A file that is never read under this name after a crash: local.
    Temporary,
    /// An ordinary file of its folder.
    Other,
}

/// Which file of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IndexKind {
    /// `dovecot.index.log`.
    Log,
    /// `dovecot.index.log.2`, and the same of the list and the map index.
    LogRotated,
    /// `dovecot.index`.
    Snapshot,
    /// `dovecot.index.backup`.
    Backup,
    /// `dovecot.index.cache`.
    Cache,
    /// `dovecot-uidlist`.
    UidList,
    /// `dovecot-keywords`.
    Keywords,
    /// `dovecot-uidvalidity` and `dovecot-uidvalidity.<8hex>`.
    UidValidity,
    /// `subscriptions`, `courierimapsubscribed`.
    Subscriptions,
    /// `dovecot.list.index.log`.
    ListLog,
    /// `dovecot.list.index`.
    ListSnapshot,
    /// `dovecot.mailbox.log`.
    MailboxLog,
    /// `dovecot.map.index.log` (mdbox).
    MapLog,
    /// `dovecot.map.index` (mdbox).
    MapSnapshot,
    /// An index file of which no more than that is known (threads, private flags, Courier's).
    OtherIndex,
}

impl Class {
    /// Never journalled, never in a bundle: exists on this machine only.
    pub fn is_local_only(self) -> bool {
        matches!(self, Class::Lock | Class::Temporary)
    }

    /// May become absent at any time without loss.
    pub fn is_cache(self) -> bool {
        matches!(self, Class::Index(IndexKind::Cache))
    }

    /// Whether what is written to such a file follows from other files, in which what matters is
    /// seen: from the records of an index log, from the names of mails. (`dovecot-keywords` only
    /// says which letter in a mail's name stands for which keyword.)
    pub fn follows(self) -> bool {
        self.is_cache()
            || self.is_local_only()
            || matches!(
                self,
                Class::Index(
                    IndexKind::UidList
                        | IndexKind::Keywords
                        | IndexKind::ListLog
                        | IndexKind::ListSnapshot
                        | IndexKind::Snapshot
                        | IndexKind::MapLog
                        | IndexKind::MapSnapshot
                        | IndexKind::Backup
                        | IndexKind::LogRotated
                )
            )
    }

    /// A published mail or a file of mails.
    pub fn holds_mail(self) -> bool {
        matches!(self, Class::Mail | Class::MailTemp | Class::Growing)
    }
}

impl IndexKind {
    /// Grows by appending until it is replaced as a whole; a cut may end it at any whole record.
    pub fn append_only(self) -> bool {
        matches!(
            self,
            IndexKind::Log
                | IndexKind::LogRotated
                | IndexKind::UidList
                | IndexKind::ListLog
                | IndexKind::MailboxLog
                | IndexKind::MapLog
        )
    }
}

/// What the file at `path` (components below the user's root) is.
pub fn classify(path: &[&[u8]]) -> Class {
    let Some((&name, dirs)) = path.split_last() else { return Class::Other };
    let parent = dirs.last().copied().unwrap_or_default();
    let grandparent = if dirs.len() >= 2 { dirs[dirs.len() - 2] } else { b"".as_slice() };

    if let Some(kind) = index_kind(name) {
        return Class::Index(kind);
    }
    if is_unlinked_open(name) {
        return Class::Temporary;
    }
    if is_index_lock(name) {
        return Class::Lock;
    }
    if is_index_temporary(name) {
        return Class::Temporary;
    }
    match parent {
        b"cur" | b"new" => return Class::Mail,
        // Pigeonhole writes scripts in a `tmp` of its own and renames them into place.
        b"tmp" if grandparent == b"sieve" => return Class::Temporary,
        b"tmp" => return Class::MailTemp,
        b"dbox-Mails" if numbered(name, b"u.") => return Class::Mail,
        b"storage" if numbered(name, b"m.") => return Class::Growing,
        b"dbox-Mails" | b"storage" if name.starts_with(b".temp.") => return Class::MailTemp,
        b"courierimapkeywords" => return Class::Index(IndexKind::OtherIndex),
        _ => {}
    }
    if is_lock(name) {
        return Class::Lock;
    }
    // `.temp.<host>.<pid>.<hex>` is what Dovecot's dotlocks are called before they are linked.
    if name.starts_with(b".temp.") {
        return Class::Temporary;
    }
    Class::Other
}

/// How soon a file must be on disk when a user is opened: 0 the user's root, 1 full-text
/// search, 2 a folder of `soon` (INBOX, Junk), 3 another folder.
///
/// `soon` are folder names as a client writes them with `/` or `.` between levels. Where the
/// folder begins in the path is the site's choice (`mail/`, `index/`), so this is a good guess:
/// it orders work and decides nothing else.
pub fn priority(path: &[&[u8]], soon: &[&[u8]]) -> u8 {
    let Some((&name, dirs)) = path.split_last() else { return 0 };
    if name.starts_with(b"dovecot.index.search") || dirs.iter().any(|d| is_fts_dir(d)) {
        return 1;
    }
    match folder_of(name, dirs) {
        None => 0,
        Some(folder) if soon.iter().any(|s| same_folder(&folder, s)) => 2,
        Some(_) => 3,
    }
}

/// The priority of a whole folder: its index files belong together. `dirs` is the folder's path,
/// `names` are names in it. A directory that holds files of the root and of a mailbox (Maildir's
/// own is INBOX, too) has the mailbox's.
pub fn folder_priority<'a>(
    dirs: &[&'a [u8]],
    names: impl IntoIterator<Item = &'a [u8]>,
    soon: &[Vec<u8>],
) -> u8 {
    let soon: Vec<&[u8]> = soon.iter().map(Vec::as_slice).collect();
    let mut path = dirs.to_vec();
    path.push(b"x");
    let by_path = priority(&path, &soon);
    if by_path > 0 || dirs.is_empty() && soon.is_empty() {
        return by_path;
    }
    let mut of_names = 0;
    for name in names {
        path.truncate(dirs.len());
        if matches!(name, b"cur" | b"new") {
            path.extend([name, b"x"]);
        } else if index_kind(name).is_some() {
            path.push(name);
        } else {
            continue;
        }
        of_names = of_names.max(priority(&path, &soon));
        if of_names >= 2 {
            break;
        }
    }
    of_names
}

fn is_fts_dir(dir: &[u8]) -> bool {
    matches!(dir, b"fts-flatcurve" | b"lucene-indexes" | b"xapian-indexes" | b"fts")
}

fn same_folder(folder: &[u8], wanted: &[u8]) -> bool {
    folder.len() == wanted.len()
        && folder.iter().zip(wanted).all(|(a, b)| {
            let sep = |c: u8| if c == b'.' { b'/' } else { c.to_ascii_lowercase() };
            sep(*a) == sep(*b)
        })
}

/// The folder a path belongs to, levels separated by `/` or `.`; `None` for the user's root.
fn folder_of(name: &[u8], dirs: &[&[u8]]) -> Option<Vec<u8>> {
    if let Some(at) = dirs.iter().position(|d| *d == b"mailboxes") {
        let rest = dirs.get(at + 1..).unwrap_or_default();
        let end = rest.iter().position(|d| *d == b"dbox-Mails").unwrap_or(rest.len());
        let folder = rest.get(..end).unwrap_or_default().join(&b'/');
        return (!folder.is_empty()).then_some(folder);
    }
    if let Some(dir) = dirs.iter().rev().find(|d| d.len() > 1 && d[0] == b'.') {
        return Some(dir[1..].to_vec());
    }
    let in_maildir = dirs.last().is_some_and(|d| matches!(*d, b"cur" | b"new" | b"tmp"));
    let of_folder = in_maildir
        || matches!(
            index_kind(name),
            Some(
                IndexKind::Log
                    | IndexKind::LogRotated
                    | IndexKind::Snapshot
                    | IndexKind::Backup
                    | IndexKind::Cache
                    | IndexKind::UidList
                    | IndexKind::Keywords
            )
        ) && !name.starts_with(b"dovecot.list.")
            && !name.starts_with(b"dovecot.map.");
    if !of_folder {
        return None;
    }
    let levels = dirs.len() - usize::from(in_maildir);
    // `Maildir/cur`: the first level is the mail directory, not a folder of it.
    match (levels, dirs.get(levels.wrapping_sub(1))) {
        (0 | 1, Some(dir)) if dir.eq_ignore_ascii_case(b"INBOX") => Some(dir.to_vec()),
        (0 | 1, _) => Some(b"INBOX".to_vec()),
        (_, Some(dir)) => Some(dir.to_vec()),
        (_, None) => None,
    }
}

/// `prefix` followed by decimal digits only.
fn numbered(name: &[u8], prefix: &[u8]) -> bool {
    name.strip_prefix(prefix)
        .is_some_and(|n| !n.is_empty() && n.len() <= 10 && n.iter().all(u8::is_ascii_digit))
}

/// The name of all caches.
pub const CACHE: &[u8] = b"dovecot.index.cache";

/// The kind of an index file, by its exact name.
pub fn index_kind(name: &[u8]) -> Option<IndexKind> {
    Some(match name {
        b"dovecot.index.log" => IndexKind::Log,
        b"dovecot.index" => IndexKind::Snapshot,
        b"dovecot.index.backup" => IndexKind::Backup,
        CACHE => IndexKind::Cache,
        b"dovecot.index.log.2" | b"dovecot.list.index.log.2" | b"dovecot.map.index.log.2" => {
            IndexKind::LogRotated
        }
        b"dovecot-uidlist" => IndexKind::UidList,
        b"dovecot-keywords" => IndexKind::Keywords,
        b"subscriptions" | b"courierimapsubscribed" => IndexKind::Subscriptions,
        b"dovecot.list.index.log" => IndexKind::ListLog,
        b"dovecot.list.index" => IndexKind::ListSnapshot,
        b"dovecot.mailbox.log" | b"dovecot.mailbox.log.2" => IndexKind::MailboxLog,
        b"dovecot.map.index.log" => IndexKind::MapLog,
        b"dovecot.map.index" => IndexKind::MapSnapshot,
        b"dovecot.index.thread"
        | b"dovecot.index.pvt"
        | b"dovecot.index.pvt.log"
        | b"dovecot.index.pvt.log.2"
        | b"dovecot.map.index.backup"
        | b"dovecot.list.index.backup"
        | b"courierimapuiddb"
        | b"courierimapacl"
        | b"courierpop3dsizelist" => IndexKind::OtherIndex,
        _ if name == b"dovecot-uidvalidity" || super::uidvalidity::parse(name).is_some() => {
            IndexKind::UidValidity
        }
        _ => return None,
    })
}

/// Names that NFS and FUSE give to files unlinked while open.
fn is_unlinked_open(name: &[u8]) -> bool {
    name.starts_with(b".nfs0") || name.starts_with(b".fuse_hidden")
}

/// A lock beside an index file, which may lie in a folder called `new`.
fn is_index_lock(name: &[u8]) -> bool {
    let locked = name.strip_suffix(b".lock").or_else(|| name.strip_suffix(b".newlock"));
    locked.is_some_and(|file| index_kind(file).is_some())
}

fn is_lock(name: &[u8]) -> bool {
    // Some locks are made under `<lock><random hex>` and then linked to their name.
    let made = |prefix: &[u8]| {
        name.strip_prefix(prefix).is_some_and(|rest| rest.iter().all(u8::is_ascii_hexdigit))
    };
    (name.len() > 5 && name.ends_with(b".lock"))
        || name.ends_with(b".newlock")
        || made(b"mailboxes.lock")
        || made(b".dovecot-box-sync.lock")
        || made(b"dovecot-vsize.lock")
}

fn is_index_temporary(name: &[u8]) -> bool {
    name.strip_suffix(b".tmp")
        .is_some_and(|n| index_kind(n).is_some() || n.starts_with(b"dovecot.index"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(path: &str) -> Class {
        classify(&path.split('/').map(str::as_bytes).collect::<Vec<_>>())
    }

    fn prio(path: &str) -> u8 {
        priority(
            &path.split('/').map(str::as_bytes).collect::<Vec<_>>(),
            &[b"INBOX", b"Junk", b"Mail/Spam"],
        )
    }

    #[test]
    fn mails_and_their_temporaries() {
        for path in [
            "cur/1700000000.M1P2.host,S=10,W=11:2,S",
            "Maildir/new/1700000000.V801I1M2.host",
            "mail/.A.B/cur/x.lock",
            "Maildir/Archive/new/y",
            "mailboxes/INBOX/dbox-Mails/u.17",
        ] {
            assert_eq!(class(path), Class::Mail, "{path}");
        }
        for path in [
            "tmp/1700000000.P12.host",
            "mail/.A/tmp/x.lock",
            "mailboxes/A/dbox-Mails/.temp.1700.P1Q2M3.host",
            "mdbox/storage/.temp.1700.P1Q2M3.host",
        ] {
            assert_eq!(class(path), Class::MailTemp, "{path}");
        }
        assert_eq!(class("mdbox/storage/m.12"), Class::Growing);
        assert_eq!(class("mdbox/store/m.12"), Class::Other);
        assert_eq!(class("mdbox/storage/m.12a"), Class::Other);
        assert_eq!(class("mailboxes/A/dbox-Mails/u."), Class::Other);
    }

    #[test]
    fn index_files() {
        use IndexKind::*;
        for (path, kind) in [
            ("index/.INBOX/dovecot.index.log", Log),
            ("index/mailboxes/new/dovecot.index.log", Log),
            ("index/.INBOX/dovecot.index.log.2", LogRotated),
            ("dovecot.index", Snapshot),
            ("dovecot.index.backup", Backup),
            ("dovecot.index.cache", Cache),
            ("Maildir/dovecot-uidlist", UidList),
            ("Maildir/.A/dovecot-keywords", Keywords),
            ("dovecot-uidvalidity", UidValidity),
            ("dovecot-uidvalidity.5a3b2c1d", UidValidity),
            ("subscriptions", Subscriptions),
            ("dovecot.list.index.log", ListLog),
            ("dovecot.list.index", ListSnapshot),
            ("dovecot.mailbox.log", MailboxLog),
            ("storage/dovecot.map.index.log", MapLog),
            ("storage/dovecot.map.index", MapSnapshot),
            ("courierimapuiddb", OtherIndex),
            ("courierimapkeywords/:list", OtherIndex),
        ] {
            assert_eq!(class(path), Class::Index(kind), "{path}");
        }
        assert_eq!(class("dovecot-uidvalidity.5a3b2c1"), Class::Other);
    }

    #[test]
    fn local_files_never_travel() {
        for path in [
            "dovecot-uidlist.lock",
            "dovecot.index.log.newlock",
            "index/mailboxes/new/dovecot.index.log.newlock",
            "index/mailboxes/cur/dovecot.index.tmp",
            "dovecot.index.log.lock",
            "mailboxes.lock",
            "index/mailboxes.lock0123456789abcdef",
            ".dovecot-box-sync.lock",
            ".dovecot-box-sync.lock01ab",
            "subscriptions.lock",
            "dovecot.index.tmp",
            "dovecot.index.cache.tmp",
            "dovecot.index.backup.tmp",
            "dovecot-uidlist.tmp",
            "dovecot.map.index.tmp",
            "dovecot.list.index.tmp",
            ".temp.host.12.abcdef",
            ".nfs000000000001",
            "cur/.nfs000000000001",
            ".fuse_hidden0000001",
            "sieve/tmp/a.sieve",
        ] {
            assert!(class(path).is_local_only(), "{path}");
        }
        for path in ["sieve/a.sieve", "maildirfolder", "x.tmp", "dovecot-acl", ".lock", "a/b/c"] {
            assert_eq!(class(path), Class::Other, "{path}");
        }
        assert_eq!(classify(&[]), Class::Other);
    }

    #[test]
    fn priorities() {
        for (path, want) in [
            ("subscriptions", 0),
            ("index/dovecot.list.index.log", 0),
            ("mdbox/storage/dovecot.map.index.log", 0),
            ("sieve/a.sieve", 0),
            ("index/.INBOX/fts-flatcurve/index.1", 1),
            ("index/.INBOX/dovecot.index.search", 1),
            ("index/.INBOX/dovecot.index.log", 2),
            ("cur/x", 2),
            ("Maildir/new/x", 2),
            ("Maildir/dovecot-uidlist", 2),
            ("Maildir/.Junk/cur/x", 2),
            ("Maildir/.Mail.Spam/cur/x", 2),
            ("mdbox/mailboxes/INBOX/dbox-Mails/dovecot.index", 2),
            ("sdbox/mailboxes/Mail/Spam/dbox-Mails/u.1", 2),
            ("Maildir/.Junk.old/cur/x", 3),
            ("Maildir/Archive/cur/x", 3),
            ("sdbox/mailboxes/A/B/dbox-Mails/u.1", 3),
        ] {
            assert_eq!(prio(path), want, "{path}");
        }
        assert_eq!(priority(&[], &[]), 0);
    }
}
