//! Other ways to have mail in an S3 store, with the same mails and the same distance: JuiceFS (metadata
//! in SQLite on the local disk), s3fs and rclone mount. The last two make no hard links, without which
//! Dovecot does not get past the first login, so their indexes and control files are on the
//! local disk and a COPY copies (rclone asks for `fusermount3`, Debian's fuse3). Who is not installed is skipped, with a word; `target/peers/bin` is looked
//! at first (`make peers`).

use crate::Wanted;
use crate::cpus::Cpus;
use crate::link::{Link, text};
use crate::place::{Kind, Place, append, deliver};
use crate::support::dovecot::{Format, Layout};
use crate::support::messages::message;
use crate::support::{MAIL_UID, scratch};
use crate::table::{Limit, Row, Table, median};
use std::os::unix::fs::chown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PART: &str = "peers";
const USER: &str = "anna";
const AWAY: u64 = 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    JuiceFs,
    S3fs,
    Rclone,
}

impl Which {
    pub fn name(self) -> &'static str {
        match self {
            Which::JuiceFs => "juicefs",
            Which::S3fs => "s3fs, local indexes",
            Which::Rclone => "rclone, local indexes",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Which::JuiceFs => "juicefs",
            Which::S3fs => "s3fs",
            Which::Rclone => "rclone",
        }
    }

    /// Its program; `None` if there is none.
    fn find(self) -> Option<PathBuf> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/peers/bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(own).chain(std::env::split_paths(&path));
        dirs.map(|dir| dir.join(self.program())).find(|file| file.is_file())
    }

    fn version(self) -> String {
        let Some(program) = self.find() else { return String::new() };
        let output = Command::new(program).arg("--version").output();
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        text.unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned()
    }
}

/// A mount of one of them.
#[derive(Debug)]
pub struct Peer {
    which: Which,
    program: PathBuf,
    work: tempfile::TempDir,
    endpoint: String,
    bucket: String,
    keys: (String, String),
}

impl Peer {
    pub fn start(which: Which, link: &Link, bucket: &str, keys: (&str, &str)) -> Peer {
        let program = which.find().unwrap();
        let peer = Peer {
            which,
            program,
            work: scratch("peer"),
            endpoint: link.endpoint(),
            bucket: bucket.to_owned(),
            keys: (keys.0.to_owned(), keys.1.to_owned()),
        };
        for dir in ["mnt", "local"] {
            std::fs::create_dir(peer.path(dir)).unwrap();
        }
        chown(peer.path("local"), Some(MAIL_UID), Some(MAIL_UID)).unwrap();
        if which == Which::JuiceFs {
            let bucket = format!("{}/{}", peer.endpoint, peer.bucket);
            let (user, secret) = (&*peer.keys.0, &*peer.keys.1);
            peer.run(&[
                "format",
                "--storage",
                "s3",
                "--bucket",
                &bucket,
                "--access-key",
                user,
                "--secret-key",
                secret,
                "--trash-days",
                "0",
                &peer.metadata(),
                "bench",
            ]);
        }
        peer.mount();
        peer
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn metadata(&self) -> String {
        format!("sqlite3://{}", self.text("meta.db"))
    }

    pub fn root(&self) -> PathBuf {
        self.path("mnt")
    }

    pub fn layout(&self, format: Format) -> Layout {
        if self.which == Which::JuiceFs {
            return Layout::usual(format);
        }
        let local = self.text("local");
        let location = format!(
            "{}:~/mail:INDEX={local}/%u/index:CONTROL={local}/%u/control:VOLATILEDIR={local}/%u/volatile",
            format.name()
        );
        Layout::new(format, &location).setting("maildir_copy_with_hardlinks = no")
    }

    fn run(&self, arguments: &[&str]) {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("HOME", self.work.path());
        if self.which == Which::Rclone {
            let settings = [
                ("TYPE", "s3"),
                ("PROVIDER", "Other"),
                ("ENDPOINT", &self.endpoint),
                ("ACCESS_KEY_ID", &self.keys.0),
                ("SECRET_ACCESS_KEY", &self.keys.1),
                ("FORCE_PATH_STYLE", "true"),
            ];
            for (name, value) in settings {
                command.env(format!("RCLONE_CONFIG_STORE_{name}"), value);
            }
        }
        let output = command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} {arguments:?}: {errors}", self.which.name());
    }

    fn mount(&self) {
        let (mnt, cache) = (self.text("mnt"), self.text("cache"));
        match self.which {
            Which::JuiceFs => self.run(&[
                "mount",
                "-d",
                "--no-usage-report",
                "--backup-meta",
                "0",
                "--cache-dir",
                &cache,
                "--log",
                &self.text("log"),
                "-o",
                "allow_other",
                &self.metadata(),
                &mnt,
            ]),
            Which::S3fs => {
                let passwd = self.path("passwd");
                std::fs::write(&passwd, format!("{}:{}", self.keys.0, self.keys.1)).unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(&passwd, mode).unwrap();
                let options = format!(
                    "url={},use_path_request_style,passwd_file={},use_cache={cache},allow_other,\
                     uid={MAIL_UID},gid={MAIL_UID},umask=0077",
                    self.endpoint,
                    passwd.display()
                );
                self.run(&[&self.bucket, &mnt, "-o", &options]);
            }
            Which::Rclone => {
                let (remote, id) = (format!("store:{}", self.bucket), MAIL_UID.to_string());
                self.run(&[
                    "mount",
                    &remote,
                    &mnt,
                    "--daemon",
                    "--allow-other",
                    "--vfs-cache-mode",
                    "full",
                    "--s3-directory-markers",
                    "--cache-dir",
                    &cache,
                    "--uid",
                    &id,
                    "--gid",
                    &id,
                    "--umask",
                    "077",
                    "--config",
                    "/dev/null",
                ]);
            }
        }
        let mounted = || {
            let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            mounts.lines().any(|line| line.split(' ').nth(1) == Some(&*mnt))
        };
        let end = Instant::now() + Duration::from_secs(30);
        while !mounted() {
            assert!(Instant::now() < end, "{} does not mount", self.which.name());
            std::thread::sleep(Duration::from_millis(100));
        }
        if self.which == Which::JuiceFs {
            chown(&mnt, Some(MAIL_UID), Some(MAIL_UID)).unwrap();
        }
    }

    fn umount(&self) {
        // What it still writes is waited for; who uses it may need a moment to be gone.
        for _ in 0..300 {
            let done = Command::new("umount").arg(self.path("mnt")).output().unwrap();
            if done.status.success() {
                break;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        // Its process ends later.
        let end = Instant::now() + Duration::from_secs(60);
        while self.is_running() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn is_running(&self) -> bool {
        let mnt = self.text("mnt");
        let Ok(processes) = std::fs::read_dir("/proc") else { return false };
        processes.flatten().any(|process| {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == mnt.as_bytes())
        })
    }

    /// Nothing of the mails is on this machine any more.
    pub fn cold(&self) {
        self.umount();
        if let Err(error) = std::fs::remove_dir_all(self.path("cache")) {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}");
        }
        self.mount();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.umount();
        let _ = Command::new("umount").arg("-l").arg(self.path("mnt")).output();
    }
}

/// What one place took.
#[derive(Debug)]
struct Took {
    delivery: f64,
    /// Requests of a delivery, and which.
    requests: Option<(f64, String)>,
    store: f64,
    body: f64,
    bodies: f64,
}

pub fn run(table: &mut Table, wanted: &Wanted, cpus: &Cpus) {
    let mails = if wanted.quick { 100 } else { 500 };
    let mut kinds = vec![Kind::Ext4, Kind::S3];
    for which in [Which::JuiceFs, Which::S3fs, Which::Rclone] {
        if wanted.skips(which.program()) {
            continue;
        }
        match which.find() {
            Some(_) => {
                println!("{}: {}", which.program(), which.version());
                kinds.push(Kind::Peer(which));
            }
            None => println!("{} is not installed and is skipped", which.program()),
        }
    }
    let format = Format::Maildir;
    let mut ext4: Option<Took> = None;
    let mut ours: Option<Took> = None;
    for kind in kinds {
        // One that cannot do it is a result, too.
        let measured = catch_unwind(AssertUnwindSafe(|| one(kind, format, mails, cpus)));
        let Ok((name, took)) = measured else {
            println!("{kind:?} did not get through the workload");
            continue;
        };
        match kind {
            Kind::Ext4 => ext4 = Some(took),
            Kind::S3 => {
                rows(table, name, format, mails, &took, ext4.as_ref(), None);
                ours = Some(took);
            }
            _ => rows(table, name, format, mails, &took, ext4.as_ref(), ours.as_ref()),
        }
    }
}

fn rows(
    table: &mut Table,
    name: &str,
    format: Format,
    mails: usize,
    took: &Took,
    ext4: Option<&Took>,
    ours: Option<&Took>,
) {
    let place = format!("{name}, {AWAY} ms");
    let mut row = |what: &str, value: fn(&Took) -> f64, note: String, limit: Limit| {
        let row = Row::new(PART, what, format.name(), &place).value(value(took), "ms");
        let row = match ext4 {
            Some(ext4) => row.ext4(value(ext4)),
            None => row,
        };
        table.row(match ours {
            Some(ours) => row
                .figure(value(took) / value(ours), limit)
                .note(format!("figure: times vmailfs {note}")),
            None => row.note(note),
        });
    };
    let (requests, which) = took.requests.clone().unwrap_or_default();
    let note = format!("{requests:.1} requests a mail: {which}");
    row("LMTP delivery, p50", |t| t.delivery, note, Limit::None);
    row("STORE, p50", |t| t.store, String::new(), Limit::None);
    row("FETCH a body again, p50", |t| t.body, String::new(), Limit::None);
    let limit = if name.starts_with("s3fs") { Limit::AtLeast(10.0) } else { Limit::None };
    row(&format!("cold FETCH of {mails} bodies"), |t| t.bodies, String::new(), limit);
}

fn one(kind: Kind, format: Format, mails: usize, cpus: &Cpus) -> (&'static str, Took) {
    const DELIVERIES: usize = 30;
    let kind = if kind == Kind::Ext4 { Kind::ColdExt4 } else { kind };
    let mut place = Place::start(kind, format, &[USER], &[], cpus);
    let mut imap = place.imap(USER);
    imap.create("Real").unwrap();
    let texts: Vec<Vec<u8>> = (0..mails).map(|n| message(13, &format!("real{n}")).bytes).collect();
    append(&mut imap, "Real", &texts);
    let mut lmtp = place.lmtp();
    deliver(&mut lmtp, USER, &texts[0]);
    place.delay(AWAY);
    let _before = place.link.as_ref().map(Link::take);
    let mut times = Vec::new();
    for text in texts.iter().take(DELIVERIES) {
        let start = Instant::now();
        deliver(&mut lmtp, USER, text);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let delivery = median(times);
    // What is sent behind the answers counts, too.
    std::thread::sleep(Duration::from_secs(8));
    let requests = place.link.as_ref().map(|link| {
        let calls = link.take();
        (calls.len() as f64 / DELIVERIES as f64, text(&calls))
    });
    drop(lmtp);
    imap.select("Real").unwrap();
    let mut timed = |line: &dyn Fn(usize) -> String| {
        let mut times = Vec::new();
        for turn in 1..=30 {
            let line = line(turn);
            imap.measured(&line).unwrap();
            let start = Instant::now();
            imap.measured(&line.replace("+FLAGS", "-FLAGS")).unwrap();
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        median(times)
    };
    let store = timed(&|n| format!("STORE {n} +FLAGS.SILENT (\\Flagged)"));
    let body = timed(&|n| format!("FETCH {n} (BODY.PEEK[])"));
    imap.logout();
    place.delay(0);
    std::thread::sleep(Duration::from_secs(8));
    place.cold();
    let mut imap = place.imap(USER);
    imap.select("Real").unwrap();
    place.delay(AWAY);
    let start = Instant::now();
    imap.measured("FETCH 1:* (BODY.PEEK[])").unwrap();
    let bodies = start.elapsed().as_secs_f64() * 1e3;
    place.delay(0);
    imap.logout();
    let name = place.name();
    place.end();
    (name, Took { delivery, requests, store, body, bodies })
}
