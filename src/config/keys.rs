//! What every key means.

/// How a value is written in TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Text,
    Number,
    Bool,
}

/// One key of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// `key`, or `section.key`.
    pub name: &'static str,
    pub kind: Kind,
    /// Never printed.
    pub secret: bool,
    /// Shown for a key that has no fixed default.
    pub example: &'static str,
    /// Unit and meaning; lines are kept.
    pub help: &'static str,
}

const fn text(name: &'static str, example: &'static str, help: &'static str) -> Key {
    Key { name, kind: Kind::Text, secret: false, example, help }
}

const fn secret(name: &'static str, help: &'static str) -> Key {
    Key { name, kind: Kind::Text, secret: true, example: "", help }
}

const fn number(name: &'static str, help: &'static str) -> Key {
    Key { name, kind: Kind::Number, secret: false, example: "", help }
}

const fn flag(name: &'static str, help: &'static str) -> Key {
    Key { name, kind: Kind::Bool, secret: false, example: "", help }
}

/// What stands above each section.
pub(super) const SECTIONS: &[(&str, &str)] = &[
    ("fscache", "Copies of mails that were read or delivered lately."),
    ("staging", "Mails that are being written and are not in the store yet."),
    ("metacache", "Index files, listings and journals of the users seen lately."),
    (
        "s3",
        "Only for s3:// stores. What is not given here is taken from where AWS tools take it:\n\
         AWS_* variables, ~/.aws/config and ~/.aws/credentials, the machine's role.",
    ),
    ("store_limits", "How long and how hard the store is asked."),
    ("gc", "Deleting from the store what was dropped longer than `retention` ago."),
    ("fuse", "The connection to the kernel."),
    (
        "hostchange",
        "Only for nfs:// (docs/NFS.md): mail on NFS, with the users' indexes of mailboxes\n\
         (dovecot.list.index*) on this machine.",
    ),
    ("admin", "How commands reach the running mount."),
    ("log", "What is logged, and how."),
];

/// Every key, in the order in which they are printed.
pub const KEYS: &[Key] = &[
    text(
        "store",
        "s3://bucket/prefix",
        "Where mails are kept: file:///some/dir or s3://bucket/prefix.\n\
         Usually the first argument of `vmailfs mount`.",
    ),
    text(
        "mountpoint",
        "/var/dovecot/vmail",
        "Where to mount; an existing directory. Usually the second argument of `vmailfs mount`.",
    ),
    text(
        "state_dir",
        "/var/lib/vmailfs/var-dovecot-vmail",
        "Local disk for caches, journals and staging. One directory serves one mount.\n\
         Default: /var/lib/vmailfs/ and the mount point's path with `-` for `/`.",
    ),
    text(
        "layout",
        "",
        "Which directories below the mount point are users: %u is the whole name, %n and %d its\n\
         parts before and after the @, %2.256Nu a hash. Examples: \"%u\", \"%d/%n\", \"%2.256Nu/%u\".\n\
         It must not change once mail is in the store.",
    ),
    text(
        "owner",
        "vmail:vmail",
        "Show every file below a user as owned by this account (names or numbers).\n\
         Default: as it was stored.",
    ),
    text(
        "root_owner",
        "vmail:vmail",
        "Owner of the directories at and above the users' own: the account that makes a new user's\n\
         directory. Default: as it was stored; at the top, whoever mounts.",
    ),
    text("root_mode", "", "Mode of the directories at and above the users' own; octal, in quotes."),
    flag(
        "allow_other",
        "Let other accounts than the one that mounts use the files, by their modes.",
    ),
    flag(
        "allow_root_delete",
        "Let uid 0 delete mails and index files. They are the mails themselves, not a cache; so\n\
         a script's `rm -rf /var/dovecot/vmail/*` is refused unless this is true.",
    ),
    flag(
        "nonempty",
        "Mount also over a directory that holds something; it is hidden as long as the mount lasts.",
    ),
    text(
        "backend",
        "mx1",
        "The name under which this machine owns users; unique among those that share the store. A mount\n\
         is refused while another session goes by its name. Default: the host name.",
    ),
    flag(
        "single_backend",
        "Promise that no other machine ever mounts this store. Then writing goes on when the lease\n\
         cannot be renewed because the store is down, and a store without conditional writes\n\
         is accepted, and no name is claimed, so nothing is waited for when state_dir was lost.",
    ),
    text(
        "ack",
        "",
        "When a delivery is answered: \"store\" (the mail is in the object store) or \"journal\" (it is\n\
         on this machine's disk, durably, and uploaded within seconds). With \"journal\" the loss of\n\
         this machine's disk loses the mails that `vmailfs status` shows as promised: choose it\n\
         only where state_dir lies on storage that you trust with mail. Mails that wait take as\n\
         much disk as staging.max_size at most; more are deferred while the store is down.",
    ),
    text(
        "retention",
        "",
        "Time for which deleted mails and earlier states stay in the store, by the store's clock;\n\
         `vmailfs user history`, `undelete` and `restore` reach back so far.",
    ),
    text(
        "lost_mails",
        "",
        "What reading a mail gives that the listing names and the store says it does not have:\n\
         \"error\" (EIO; nothing is hidden) or \"empty\" (a blank mail of the same size, so that a\n\
         client that insists on every mail can go on; Maildir only, never cached, always logged).",
    ),
    text(
        "lost_mails_for",
        "",
        "With lost_mails = \"empty\": for which users (\"*@example.com\") or directories of users\n\
         (\"a@example.com/.Archive*\"); masks with * and ?, separated by spaces. A file system does\n\
         not know which client is reading, so it cannot be set for one client's address.",
    ),
    text(
        "fscache.path",
        "/var/cache/vmailfs",
        "Directory. Default: <state_dir>/fscache. With %4Nu in it, four directories share the users by\n\
         Dovecot's hash, each with max_size. Several sections [[fscache]] do the same with directories of\n\
         any names and sizes; each needs a path.",
    ),
    text(
        "fscache.max_size",
        "",
        "Size that is never exceeded, as du shows it. Mails read once go first, then those delivered,\n\
         then those read again. What finds no room is streamed from the store.",
    ),
    text("staging.path", "/var/lib/vmailfs/staging", "Directory. Default: <state_dir>/staging."),
    text(
        "staging.max_size",
        "",
        "Size that is never exceeded; when it is reached, deliveries wait, then are deferred. A mail\n\
         larger than this cannot be delivered.",
    ),
    text("metacache.path", "/ssd/metacache", "Directory. Default: <state_dir>/metacache."),
    text(
        "metacache.max_space",
        "",
        "Size that the index files, listings and journals of all users may have; above it some are\n\
         evicted. 2M for each user seen in the last quarter of an hour is a good start, 90% of the\n\
         disk the most.",
    ),
    text("metacache.max_grace", "", "Size above max_space that may be used while room is made."),
    text(
        "metacache.priority_weights",
        "",
        "How much longer than their last use says files are kept, by priority (0 a user's root,\n\
         1 full-text search, 2 INBOX and the like, 3 other folders): four pairs of a share of\n\
         max_space up to which it holds, and a time. Empty: not at all.",
    ),
    text(
        "metacache.size_weights",
        "",
        "How much longer small and large ones are kept: two pairs of a size and a time.\n\
         Empty: not at all.",
    ),
    text(
        "metacache.priority2_names",
        "",
        "Folders that have priority 2, as clients name them, separated by commas.",
    ),
    text(
        "metacache.upload_interval",
        "",
        "Time after which important changes (flags, moves, expunges) are in the store.\n\
         Should this machine's disk be lost, changes younger than this are undone.",
    ),
    number(
        "metacache.max_rescan_mail_count",
        "Number of mails newer than the last flush from which a flush is due (each mail itself is\n\
         in the store at once).",
    ),
    text(
        "metacache.folder_change_quiet",
        "",
        "Time without further changes after which created, renamed and deleted folders are flushed.",
    ),
    text("metacache.folder_change_max", "", "The same, counted from the first such change."),
    text(
        "metacache.idle_upload",
        "",
        "Time without access after which a user's unimportant changes (caches, mainly) are flushed,\n\
         at most once a day.",
    ),
    number(
        "metacache.idle_uploads",
        "Number of such flushes that are begun in a minute at most, all users together.",
    ),
    text(
        "metacache.close_idle",
        "",
        "Time without access after which a user is closed: flushed, no longer in memory, and handed\n\
         over, so that nothing needs to be recovered of it should this machine be lost. Closing and\n\
         opening again takes four requests: a time shorter than that between two mails pays them\n\
         for each.",
    ),
    number(
        "metacache.max_open_users",
        "Number of users in memory; of more, those that were used longest ago are closed.",
    ),
    number("metacache.max_parallel_requests", "Number of users that are flushed at the same time."),
    text("s3.endpoint", "https://s3.example.com", "URL of the server. Default: AWS."),
    text("s3.region", "eu-central-1", "Region. Default: from the environment, else us-east-1."),
    flag("s3.path_style", "Put the bucket into the path, not into the host name."),
    text("s3.access_key_id", "AKIA...", "Access key."),
    secret("s3.secret_access_key", "Its secret; keep this file's mode at 0600."),
    secret("s3.session_token", "Token of temporary credentials."),
    text(
        "s3.checksums",
        "",
        "\"when_supported\", or \"when_required\" for stores that refuse the newer checksum headers.",
    ),
    text(
        "store_limits.attempt_timeout",
        "",
        "Time without a byte after which a request is given up.",
    ),
    text("store_limits.deadline", "", "Time for all attempts of one request together."),
    number("store_limits.attempts", "Number of attempts at most."),
    text(
        "store_limits.delivery_timeout",
        "",
        "Time that a delivery may wait for the store before the mail server is told to try later.",
    ),
    number("store_limits.max_requests", "Number of requests in flight at most."),
    number(
        "store_limits.read_ahead",
        "Of these, for the next mails of a folder that somebody reads mail by mail, at most; 0: none\n\
         are fetched before they are opened.",
    ),
    number(
        "store_limits.hedge",
        "Of a hundred mails read, how many may be asked for a second time because the answer takes\n\
         longer than 99 of 100 lately took; 0: none.",
    ),
    text(
        "store_limits.stream_memory",
        "",
        "Memory for mails that are streamed because fscache has no room for them; at least 8M.",
    ),
    text(
        "store_limits.lease",
        "",
        "Time for which this backend owns its users without the store; at least 10s. Another\n\
         backend can take over a dead one's users after this time. So long, too, a mount waits whose\n\
         state_dir was lost, to see that no other machine goes by its name (--take-backend: not at all).",
    ),
    text(
        "store_limits.unmount_timeout",
        "",
        "Time for flushing everything at unmount. If the store does not answer within it, the\n\
         local state is kept, the exit code is 75 and what is at risk is listed.",
    ),
    text(
        "gc.interval",
        "",
        "Time between two looks for what can be deleted of a user that is open here. Users that\n\
         nobody opens are looked at by `vmailfs gc -A`.",
    ),
    text(
        "gc.full_scan",
        "",
        "Time between two listings of everything a user has in the store, for mails that reached it\n\
         late and for what dead sessions left.",
    ),
    number("gc.parallel", "Number of users looked at at once."),
    number("gc.delete_rate", "Objects deleted in a second, for each of them."),
    number("fuse.threads", "Number of threads that answer the kernel; 0: by the number of CPUs."),
    flag(
        "fuse.passthrough",
        "Let the kernel read cached mails directly, where it can (Linux 6.9).",
    ),
    text(
        "hostchange.index_dir",
        "indexes",
        "The INDEX directory below a user's own directory. Default: that directory itself.",
    ),
    text(
        "hostchange.listindex_root",
        "",
        "Where the indexes of mailboxes are kept; nothing else should be there.",
    ),
    text("hostchange.listindex_layout", "", "Where users are below that; like `layout`."),
    text(
        "hostchange.listindex_max_size",
        "",
        "Size that they may have together. Above it, those used longest ago are removed.",
    ),
    text(
        "hostchange.login_idle",
        "",
        "Time without access after which a user's next access counts as a login: it is checked whether\n\
         another host served him.",
    ),
    flag(
        "hostchange.migration",
        "Look at each login for an index of mailboxes on NFS, which a host without this mode left, and\n\
         take it over or remove it. Costs a request; to be switched off after the change.",
    ),
    text(
        "hostchange.attribute_cache",
        "",
        "Time for which names and attributes are believed, on top of the NFS client's own.",
    ),
    text(
        "hostchange.lock_wait",
        "",
        "Time that a process may wait for a lock another one has; it gets EAGAIN then.",
    ),
    text(
        "admin.socket",
        "/run/vmailfs.sock",
        "Path of the socket. Default: <state_dir>/admin.sock.",
    ),
    flag(
        "admin.directory",
        "Show a read-only directory .vmailfs at the mount's root, with status and metrics as text\n\
         files. It is not listed, and only the account that mounts may enter it.",
    ),
    text(
        "metrics.listen",
        "127.0.0.1:9154",
        "Address and port where numbers for Prometheus are served over HTTP, at /metrics, to\n\
         anybody who can reach them. No user is named in them. Default: nowhere.",
    ),
    text(
        "log.level",
        "",
        "error, warn, info, debug or trace; also per module, as in \"info,vmailfs::store=debug\".",
    ),
    text("log.format", "", "\"text\" or \"json\" (one object a line)."),
    text(
        "log.to",
        "syslog",
        "\"stderr\", \"syslog\" (facility mail) or the path of a file. Default: stderr; with --daemon\n\
         syslog, or <state_dir>/vmailfs.log where no syslog runs.",
    ),
];
