//! A machine, a store and clients: what every test here is made of.

use async_trait::async_trait;
use parking_lot::Mutex;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;
use vmailfs::cache::disk::{Disk, RealDisk};
use vmailfs::cache::fscache::Place;
use vmailfs::dovecot::template::Layout;
use vmailfs::format::Timestamp;
use vmailfs::format::head::Head;
use vmailfs::format::key::head_key;
use vmailfs::fs::VmailFs;
use vmailfs::fs::api::{
    Attr, Caller, Fh, Found, FsError, Ino, Lookup, MailFs, OpenMode, RenameMode, SetAttr, Step,
};
use vmailfs::store::faulty::{Fault, FaultyStore, Request};
use vmailfs::store::mem::MemStore;
use vmailfs::store::{Op, StoreError};
use vmailfs::vmail::env::{Clock, Env, Random};
use vmailfs::vmail::flush::{self, Options, Report};
use vmailfs::vmail::lost::LostMails;
use vmailfs::vmail::promise::Ack;
use vmailfs::vmail::session::{Metacache, Session, Settings, UserCell};

/// Time that moves when somebody sleeps a little (a pause between two tries) or a test says so.
#[derive(Debug, Default)]
pub struct TestClock(AtomicU64);

impl TestClock {
    pub fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_nanos() as u64, Ordering::SeqCst);
    }

    fn secs(&self) -> i64 {
        (self.0.load(Ordering::SeqCst) / 1_000_000_000) as i64
    }
}

/// The store's clock, as seconds since the start of the test.
struct StoreClock {
    ahead: AtomicI64,
    /// Not `i64::MIN`: it stands still.
    frozen: AtomicI64,
}

impl Default for StoreClock {
    fn default() -> StoreClock {
        StoreClock { ahead: AtomicI64::new(0), frozen: AtomicI64::new(i64::MIN) }
    }
}

impl StoreClock {
    fn of(&self, clock: &TestClock) -> i64 {
        match self.frozen.load(Ordering::SeqCst) {
            i64::MIN => clock.secs() + self.ahead.load(Ordering::SeqCst),
            at => at,
        }
    }
}

/// Sleeps longer than this end only when a test moves the clock.
const SHORT: Duration = Duration::from_secs(5);
const START: i64 = 1_700_000_000;

impl Clock for Arc2<TestClock> {
    fn wall(&self) -> Timestamp {
        // No two moments are the same.
        let nanos = self.0.0.fetch_add(1000, Ordering::SeqCst);
        let secs = START + (nanos / 1_000_000_000) as i64;
        Timestamp { secs, nanos: (nanos % 1_000_000_000) as u32 }
    }

    fn boot(&self) -> Duration {
        Duration::from_nanos(self.0.0.load(Ordering::SeqCst))
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let clock = self.0.clone();
        Box::pin(async move {
            let until = clock.0.load(Ordering::SeqCst) + time.as_nanos() as u64;
            if time <= SHORT {
                tokio::time::sleep(Duration::from_millis(1)).await;
                clock.0.fetch_max(until, Ordering::SeqCst);
            }
            while clock.0.load(Ordering::SeqCst) < until {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    }
}

/// A shared thing of this crate, for which it may implement traits.
#[derive(Debug, Clone)]
pub struct Arc2<T>(pub Arc<T>);

/// Repeatable numbers.
#[derive(Debug)]
struct Seeded(AtomicU64);

impl Random for Seeded {
    fn u64(&self) -> u64 {
        let mut z = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

/// A request: what, of which key, and why.
pub type Asked = (Op, String, &'static str);

type Decide = Arc<dyn Fn(&Request) -> Fault + Send + Sync>;

/// A store and the machines that use it.
pub struct World {
    pub mem: MemStore,
    pub store: Arc<FaultyStore>,
    pub clock: Arc<TestClock>,
    store_clock: Arc<StoreClock>,
    pub log: Arc<Mutex<Vec<Asked>>>,
    decide: Arc<Mutex<Option<Decide>>>,
    dir: tempfile::TempDir,
    sessions: AtomicU64,
    random: Arc<Seeded>,
}

/// Where a session runs.
#[derive(Clone, Copy)]
pub struct On {
    pub machine: &'static str,
    pub boot: &'static str,
    pub backend: &'static str,
}

pub const HERE: On = On { machine: "a", boot: "boot-1", backend: "a" };
/// The same machine after it was started again.
pub const REBOOTED: On = On { machine: "a", boot: "boot-2", backend: "a" };
/// A machine with nothing on its disks that took the place of the first.
pub const FRESH: On = On { machine: "fresh", boot: "boot-9", backend: "a" };

impl World {
    pub fn new() -> World {
        let clock: Arc<TestClock> = Arc::default();
        let store_clock: Arc<StoreClock> = Arc::default();
        let (time, ahead) = (clock.clone(), store_clock.clone());
        let mem = MemStore::with_clock(move || START + ahead.of(&time));
        let store = Arc::new(FaultyStore::new(Arc::new(mem.clone())));
        let log: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let decide: Arc<Mutex<Option<Decide>>> = Arc::default();
        let (seen, asked) = (log.clone(), decide.clone());
        store.set_hook(move |request| {
            seen.lock().push((request.op, request.key.clone(), request.why.0));
            let decide = asked.lock().clone();
            decide.map_or(Fault::None, |decide| decide(request))
        });
        World {
            mem,
            store,
            clock,
            store_clock,
            log,
            decide,
            dir: tempfile::tempdir().unwrap(),
            sessions: AtomicU64::new(0),
            random: Arc::new(Seeded(AtomicU64::new(42))),
        }
    }

    /// The store's clock runs so far ahead of the machines' clocks.
    pub fn skew(&self, ahead: Duration) {
        self.store_clock.ahead.store(ahead.as_secs() as i64, Ordering::SeqCst);
    }

    /// The store's clock stands still, and then goes on from there.
    pub fn freeze_store_clock(&self, frozen: bool) {
        let now = self.store_clock.of(&self.clock);
        if frozen {
            self.store_clock.frozen.store(now, Ordering::SeqCst);
        } else {
            self.store_clock.frozen.store(i64::MIN, Ordering::SeqCst);
            let ahead = now - self.clock.secs();
            self.store_clock.ahead.store(ahead, Ordering::SeqCst);
        }
    }

    pub fn faults(&self, decide: impl Fn(&Request) -> Fault + Send + Sync + 'static) {
        *self.decide.lock() = Some(Arc::new(decide));
    }

    pub fn no_faults(&self) {
        *self.decide.lock() = None;
    }

    /// Requests since the last call.
    pub fn requests(&self) -> Vec<Asked> {
        std::mem::take(&mut self.log.lock())
    }

    pub fn machine_dir(&self, on: On) -> PathBuf {
        self.dir.path().join(on.machine)
    }

    pub fn settings(&self, on: On) -> Settings {
        let dir = self.machine_dir(on);
        Settings {
            state_dir: dir.join("state"),
            metacache_dir: dir.join("meta"),
            fscache: vec![Place { path: dir.join("fscache"), max: 64 << 20 }],
            stream_memory: 8 << 20,
            read_ahead: 16,
            hedge: 0,
            staging_dir: dir.join("staging"),
            staging_max: 64 << 20,
            metacache: Metacache::default(),
            layout: Layout::parse("%u").unwrap(),
            backend: on.backend.into(),
            host: "host".into(),
            single_backend: true,
            lease: Duration::from_secs(180),
            owner: None,
            root_owner: None,
            root_mode: 0o755,
            allow_root_delete: true,
            upload_interval: Duration::from_secs(300),
            max_rescan_mail_count: 10,
            quiet: Duration::from_secs(1),
            quiet_max: Duration::from_secs(5),
            idle_upload: Duration::from_secs(3600),
            delivery_timeout: Duration::from_secs(20),
            ack: Ack::Store,
            lost_mails: LostMails::Error,
            max_flushes: 4,
            boot_id: on.boot.into(),
            gc: vmailfs::vmail::gc::Limits::default(),
            ask_for_users: true,
        }
    }

    pub fn session(&self, on: On) -> Client {
        self.session_with(self.settings(on), Arc::new(RealDisk))
    }

    pub fn session_with(&self, settings: Settings, disk: Arc<dyn Disk>) -> Client {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        let env = Env {
            store: self.store.clone(),
            disk,
            clock: Arc::new(Arc2(self.clock.clone())),
            random: self.random.clone(),
        };
        let session = Session::open(env, settings).unwrap();
        Client { fs: Arc::new(VmailFs::new(session)) }
    }

    pub fn head(&self, user: &str) -> Head {
        Head::decode(&self.mem.bytes_of(&head_key(user)).unwrap()).unwrap()
    }

    /// Keys of a user's mail objects.
    pub fn mails(&self) -> Vec<String> {
        self.mem.keys().into_iter().filter(|k| k.contains("/mail/")).collect()
    }
}

pub fn down() -> StoreError {
    StoreError::Unavailable { detail: "down".into() }
}

/// A mail server on a session. Dropping it without [`Client::close`] is the death of the process.
#[derive(Clone)]
pub struct Client {
    pub fs: Arc<VmailFs>,
}

/// An open file.
#[derive(Debug, Clone, Copy)]
pub struct Open {
    pub ino: Ino,
    pub fh: Fh,
}

pub type Answer<T> = Result<T, i32>;

pub const WHO: Caller = Caller { uid: 1000, gid: 1000, pid: 1 };
pub const READ: OpenMode =
    OpenMode { read: true, write: false, append: false, truncate: false, exclusive: false };
pub const WRITE: OpenMode =
    OpenMode { read: true, write: true, append: false, truncate: false, exclusive: false };

#[async_trait]
pub trait Mailbox {
    async fn deliver(&self, folder: &str, name: &str, body: &[u8]) -> Answer<()>;
}

#[async_trait]
impl Mailbox for Client {
    /// As Dovecot does it: `tmp/`, fsync, close, rename.
    async fn deliver(&self, folder: &str, name: &str, body: &[u8]) -> Answer<()> {
        let tmp = format!("{folder}/tmp/{name}");
        let file = self.create(&tmp).await?;
        self.write(file, 0, body).await?;
        self.fsync(file).await?;
        self.close_file(file).await?;
        self.rename(&tmp, &format!("{folder}/new/{name}")).await
    }
}

fn errno(e: FsError) -> i32 {
    e.errno
}

impl Client {
    pub async fn go<T>(&self, call: impl Fn(&VmailFs) -> Step<T>) -> Answer<T> {
        for _ in 0..100 {
            match call(&self.fs) {
                Step::Done(done) => return done.map_err(errno),
                Step::Wait(need) => self.fs.wait(need).await.map_err(errno)?,
            }
        }
        panic!("a call waits for ever");
    }

    pub async fn look(&self, path: &str) -> Answer<Found> {
        self.look_bytes(&path.split('/').map(str::as_bytes).collect::<Vec<_>>()).await
    }

    pub async fn look_bytes(&self, path: &[&[u8]]) -> Answer<Found> {
        let mut at = 1;
        let mut found = None;
        for name in path {
            match self.go(|fs| fs.lookup(WHO, at, name)).await? {
                Lookup::Found(next) => {
                    at = next.attr.ino;
                    found = Some(next);
                }
                Lookup::Absent { .. } => return Err(libc::ENOENT),
            }
        }
        Ok(found.unwrap())
    }

    async fn parent<'a>(&self, path: &'a str) -> Answer<(Ino, &'a [u8])> {
        match path.rsplit_once('/') {
            Some((dir, name)) => Ok((self.look(dir).await?.attr.ino, name.as_bytes())),
            None => Ok((1, path.as_bytes())),
        }
    }

    pub async fn stat(&self, path: &str) -> Answer<Attr> {
        Ok(self.look(path).await?.attr)
    }

    pub async fn mkdir(&self, path: &str) -> Answer<()> {
        let (at, name) = self.parent(path).await?;
        self.go(|fs| fs.mkdir(WHO, at, name, 0o700)).await.map(drop)
    }

    /// A user with Maildir folders.
    pub async fn maildir(&self, folders: &[&str]) {
        let user = folders[0].split('/').next().unwrap();
        match self.mkdir(user).await {
            Ok(()) | Err(libc::EEXIST) => {}
            other => panic!("{other:?}"),
        }
        for folder in folders {
            if folder.contains('/') {
                self.mkdir(folder).await.unwrap();
            }
            for sub in ["cur", "new", "tmp"] {
                self.mkdir(&format!("{folder}/{sub}")).await.unwrap();
            }
        }
    }

    pub async fn create(&self, path: &str) -> Answer<Open> {
        let (at, name) = self.parent(path).await?;
        let (found, opened) = self.go(|fs| fs.create(WHO, at, name, 0o600, WRITE)).await?;
        Ok(Open { ino: found.attr.ino, fh: opened.fh })
    }

    pub async fn open(&self, path: &str, how: OpenMode) -> Answer<Open> {
        let ino = self.look(path).await?.attr.ino;
        let opened = self.go(|fs| fs.open(WHO, ino, how)).await?;
        Ok(Open { ino, fh: opened.fh })
    }

    pub async fn write(&self, file: Open, offset: u64, data: &[u8]) -> Answer<()> {
        self.go(|fs| fs.write(WHO, file.ino, file.fh, offset, data)).await.map(drop)
    }

    pub async fn fsync_dir(&self, path: &str) -> Answer<()> {
        let ino = self.look(path).await?.attr.ino;
        let fh = self.go(|fs| fs.opendir(WHO, ino)).await?;
        let done = self.go(|fs| fs.fsyncdir(ino, fh)).await;
        self.fs.releasedir(ino, fh);
        done
    }

    pub async fn fsync(&self, file: Open) -> Answer<()> {
        self.go(|fs| fs.fsync(file.ino, file.fh, false)).await
    }

    pub async fn close_file(&self, file: Open) -> Answer<()> {
        let done = self.go(|fs| fs.flush(file.ino, file.fh)).await;
        self.fs.release(file.ino, file.fh);
        done
    }

    pub async fn truncate(&self, file: Open, size: u64) -> Answer<()> {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        self.go(|fs| fs.setattr(WHO, file.ino, Some(file.fh), set)).await.map(drop)
    }

    /// A whole file written at once, over what was there.
    pub async fn put(&self, path: &str, data: &[u8]) -> Answer<()> {
        let file = self.create(path).await?;
        self.truncate(file, 0).await?;
        self.write(file, 0, data).await?;
        self.close_file(file).await
    }

    /// A whole file written beside and renamed into place, as Dovecot does with its lists.
    pub async fn replace(&self, path: &str, data: &[u8]) -> Answer<()> {
        let lock = format!("{path}.lock");
        self.put(&lock, data).await?;
        self.rename(&lock, path).await
    }

    pub async fn append(&self, path: &str, data: &[u8]) -> Answer<()> {
        let file = self.open(path, WRITE).await?;
        let size = self.stat(path).await?.size;
        self.write(file, size, data).await?;
        self.close_file(file).await
    }

    pub async fn read_open(&self, file: Open) -> Answer<Vec<u8>> {
        let mut out = Vec::new();
        loop {
            let at = out.len() as u64;
            let more = self.go(|fs| fs.read(file.ino, file.fh, at, 65536)).await?;
            if more.is_empty() {
                return Ok(out);
            }
            out.extend(more);
        }
    }

    pub async fn read(&self, path: &str) -> Answer<Vec<u8>> {
        let file = self.open(path, READ).await?;
        let bytes = self.read_open(file).await;
        self.fs.release(file.ino, file.fh);
        bytes
    }

    pub async fn rename(&self, from: &str, to: &str) -> Answer<()> {
        let (a, name) = self.parent(from).await?;
        let (b, new) = self.parent(to).await?;
        self.go(|fs| fs.rename(WHO, a, name, b, new, RenameMode::Replace)).await
    }

    pub async fn link(&self, from: &str, to: &str) -> Answer<()> {
        let ino = self.look(from).await?.attr.ino;
        let (at, name) = self.parent(to).await?;
        self.go(|fs| fs.link(WHO, ino, at, name)).await.map(drop)
    }

    pub async fn unlink(&self, path: &str) -> Answer<()> {
        let (at, name) = self.parent(path).await?;
        self.go(|fs| fs.unlink(WHO, at, name)).await
    }

    pub async fn rmdir(&self, path: &str) -> Answer<()> {
        let (at, name) = self.parent(path).await?;
        self.go(|fs| fs.rmdir(WHO, at, name)).await
    }

    /// Sorted names, without the dots.
    pub async fn list(&self, path: &str) -> Answer<Vec<String>> {
        let ino = if path.is_empty() { 1 } else { self.look(path).await?.attr.ino };
        let names: Mutex<Vec<String>> = Mutex::default();
        self.go(|fs| {
            names.lock().clear();
            fs.readdir(ino, 0, 0, &mut |entry| {
                names.lock().push(String::from_utf8_lossy(&entry.name).into_owned());
                true
            })
        })
        .await?;
        let mut names = names.into_inner();
        names.retain(|n| n != "." && n != "..");
        names.sort();
        Ok(names)
    }

    pub fn session(&self) -> &Arc<Session> {
        self.fs.session()
    }

    /// The name of the session's backend, which nobody else has.
    pub async fn claim(&self) {
        self.session().lease.claim(self.session(), false, &mut |_| ()).await.unwrap();
    }

    pub fn cell(&self, user: &str) -> Arc<UserCell> {
        self.session().known_user(user).unwrap()
    }

    pub async fn flush(&self, user: &str) -> Report {
        flush::flush(&self.cell(user), Options::default()).await.unwrap()
    }

    pub async fn flush_all(&self, user: &str) -> Report {
        let options = Options { caches: true, ..Options::default() };
        flush::flush(&self.cell(user), options).await.unwrap()
    }

    /// A clean end.
    pub async fn close(self) {
        self.fs.release_all();
        let failed = self.session().close(Duration::from_secs(600)).await;
        assert!(failed.is_empty(), "{failed:?}");
    }
}

impl Client {
    pub async fn set_mtime(&self, path: &str, time: Timestamp) {
        let ino = self.look(path).await.unwrap().attr.ino;
        let at = vmailfs::fs::api::SetTime::At(time);
        let set = SetAttr { mtime: Some(at), ..SetAttr::default() };
        self.go(|fs| fs.setattr(WHO, ino, None, set)).await.unwrap();
    }
}

impl World {
    pub fn clock_boot(&self) -> Duration {
        Duration::from_nanos(self.clock.0.load(Ordering::SeqCst))
    }
}

/// Bytes that do not compress.
pub fn noise(len: usize) -> Vec<u8> {
    let mut seed = 7u64;
    (0..len)
        .map(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            (seed >> 33) as u8
        })
        .collect()
}

/// Paths of any bytes.
impl Client {
    pub async fn rename_bytes(&self, from: &str, to: &[&str], name: &[u8]) -> Answer<()> {
        let (a, old) = self.parent(from).await?;
        let b = self.look(&to.join("/")).await?.attr.ino;
        self.go(|fs| fs.rename(WHO, a, old, b, name, RenameMode::Replace)).await
    }

    pub async fn create_bytes(&self, dir: &[&str], name: &[u8], data: &[u8]) -> Answer<()> {
        let at = self.look(&dir.join("/")).await?.attr.ino;
        let (found, opened) = self.go(|fs| fs.create(WHO, at, name, 0o600, WRITE)).await?;
        let file = Open { ino: found.attr.ino, fh: opened.fh };
        self.write(file, 0, data).await?;
        self.fsync(file).await?;
        self.close_file(file).await
    }

    pub async fn read_bytes(&self, path: &[&[u8]]) -> Answer<Vec<u8>> {
        let ino = self.look_bytes(path).await?.attr.ino;
        let opened = self.go(|fs| fs.open(WHO, ino, READ)).await?;
        let bytes = self.read_open(Open { ino, fh: opened.fh }).await;
        self.fs.release(ino, opened.fh);
        bytes
    }
}

/// What the log says on this thread while somebody listens.
#[derive(Clone, Default)]
pub struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    pub fn listen(&self) -> tracing::subscriber::DefaultGuard {
        let said = self.clone();
        let log = tracing_subscriber::fmt().with_writer(move || said.clone()).with_ansi(false);
        tracing::subscriber::set_default(log.finish())
    }

    /// How many lines of the log hold a text.
    pub fn count(&self, text: &str) -> usize {
        String::from_utf8_lossy(&self.0.lock()).lines().filter(|line| line.contains(text)).count()
    }
}

impl std::io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
