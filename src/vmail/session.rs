//! A mount session: what all users of a mount share, and the users themselves.

use super::env::Env;
use super::error::{Error, Result};
use super::lease::Lease;
use super::lost::{self, LostMails};
use super::need::{Need, Op, Stop};
use super::node::NodeIx;
use super::promise::Ack;
use super::stream::Streams;
use super::turns::Turns;
use super::user::User;
use crate::cache::disk::{Disk, make_dirs};
use crate::cache::fscache::{self, Fscache};
use crate::cache::metacache::{Books, Limits};
use crate::cache::staging::Staging;
use crate::cache::weight::Weights;
use crate::dovecot::template::Layout;
use crate::format::listing::Owner;
use crate::format::{FolderId, ObjectId, Place};
use crate::fs::api::{Ino, Invalidate};
use parking_lot::{Mutex, RwLock};
use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

/// What the configuration says to the heart.
#[derive(Debug, Clone)]
pub struct Settings {
    pub state_dir: PathBuf,
    pub metacache_dir: PathBuf,
    /// At least one.
    pub fscache: Vec<fscache::Place>,
    /// Memory for mails that fscache has no room for.
    pub stream_memory: u64,
    /// Requests in flight for mails that are read ahead; 0: none are.
    pub read_ahead: usize,
    /// Of a hundred mails read, how many may be asked for a second time; 0: none.
    pub hedge: u32,
    pub staging_dir: PathBuf,
    pub staging_max: u64,
    pub metacache: Metacache,
    pub layout: Layout,
    pub backend: String,
    /// This machine's name, for people.
    pub host: String,
    pub single_backend: bool,
    pub lease: Duration,
    /// Whom all files below users' roots belong to, whatever is stored.
    pub owner: Option<Owner>,
    /// Whom users' roots and what lies above them belong to.
    pub root_owner: Option<Owner>,
    pub root_mode: u32,
    pub allow_root_delete: bool,
    pub upload_interval: Duration,
    pub max_rescan_mail_count: u32,
    /// A change of folders is flushed once nothing changed for so long,
    pub quiet: Duration,
    /// and at the latest after this.
    pub quiet_max: Duration,
    /// Changes that a listing could bring back are flushed after so long without use.
    pub idle_upload: Duration,
    /// How long a delivery waits for a store that fails.
    pub delivery_timeout: Duration,
    /// When a mail counts as safe.
    pub ack: Ack,
    /// Which mails whose objects are gone are shown as blank ones.
    pub lost_mails: LostMails,
    /// Flushes that may run at once.
    pub max_flushes: usize,
    /// Which boot of the machine this is.
    pub boot_id: String,
    /// What is deleted from the store, and when.
    pub gc: super::gc::Limits,
    /// How an absent user looks: asked for, or always there.
    pub ask_for_users: bool,
}

/// How the metacache is kept within its bounds.
#[derive(Debug, Clone)]
pub struct Metacache {
    pub limits: Limits,
    pub weights: Weights,
    /// Folders whose index files have priority 2, as clients write them.
    pub soon: Vec<Vec<u8>>,
    /// A user that nobody uses is closed after so long,
    pub close_idle: Duration,
    /// or as soon as more are open.
    pub max_open_users: usize,
    /// Flushes of unimportant changes that are begun in a minute.
    pub idle_uploads: u32,
}

impl Default for Metacache {
    fn default() -> Metacache {
        Metacache {
            limits: Limits { max_space: 10 << 30, max_grace: 1 << 30 },
            weights: Weights::default(),
            soon: vec![b"INBOX".to_vec(), b"Junk".to_vec()],
            close_idle: Duration::from_secs(4 * 3600),
            max_open_users: 10_000,
            idle_uploads: 600,
        }
    }
}

/// What an inode number stands for.
#[derive(Debug, Clone)]
pub enum InoTarget {
    /// A directory above the users' level: the path components below the mount.
    Above(Arc<Vec<Vec<u8>>>),
    Dir(Arc<UserCell>, Place),
    Node(Arc<UserCell>, NodeIx),
}

/// What is known of a user's existence without opening it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Exists {
    #[default]
    Unknown,
    Yes,
    /// The store said no; good for the call that asked.
    No,
}

#[derive(Debug, Default)]
pub struct RootInfo {
    pub exists: Exists,
    /// Who made the directory here, for a user that has no head yet.
    pub maker: Option<(Owner, u32)>,
    pub lookups: u64,
    /// The directory above, as the kernel knows it.
    pub parent: Option<Ino>,
}

#[derive(Debug, Default)]
pub enum CellState {
    #[default]
    Closed,
    Open(Box<User>),
}

/// A user, open or not.
#[derive(Debug)]
pub struct UserCell {
    pub name: Arc<str>,
    /// Path components below the mount.
    pub path: Vec<String>,
    pub ino: Ino,
    pub session: Arc<Session>,
    pub state: Mutex<CellState>,
    pub root: Mutex<RootInfo>,
    /// One opening at a time, one load, one flush.
    pub opening: tokio::sync::Mutex<()>,
    pub loading: tokio::sync::Mutex<()>,
    pub flushing: tokio::sync::Mutex<()>,
    pub uploading: tokio::sync::Mutex<()>,
    /// Somebody sees to it that promises are kept.
    pub uploader: AtomicBool,
    /// Its journal is to be synced soon.
    pub(super) sync_later: AtomicBool,
    /// One gc at a time; taken before `flushing`.
    pub collecting: tokio::sync::Mutex<()>,
    /// How many evictions of it are under way.
    pub makes_room: std::sync::atomic::AtomicUsize,
    /// Publishes that have not written their record.
    pub publishing: super::close::UnderWay,
    /// Files whose bytes are under way between staging and store: one at a time for each file.
    under_way: Turns<Ino>,
}

impl UserCell {
    /// The right to move a file's bytes. Two publishes of one file at a time would each think
    /// that theirs is the content.
    pub async fn one_at_a_time(&self, ino: Ino) -> tokio::sync::OwnedMutexGuard<()> {
        self.under_way.take(ino).await
    }

    /// Calls `f` with the open user, or says that it must be opened first.
    pub fn with<T>(self: &Arc<Self>, f: impl FnOnce(&mut User) -> Op<T>) -> Op<T> {
        match &mut *self.state.lock() {
            CellState::Open(user) if user.ready => match user
                .unshown()
                .map_or_else(|| f(user), |id| Err(Stop::Wait(Need::Restore(self.clone(), id))))
            {
                Err(Stop::Error(Error::Vanished { folder, .. })) => {
                    Err(Stop::Wait(Need::Restore(self.clone(), folder)))
                }
                // Made again once it is known whose the user is then.
                Err(Stop::Error(Error::HandingOver { .. })) if !self.session.is_closing() => {
                    Err(Stop::Wait(Need::Open(self.clone())))
                }
                done => done,
            },
            CellState::Open(_) | CellState::Closed => Err(Stop::Wait(Need::Open(self.clone()))),
        }
    }

    /// Calls `f` with the user if it is open. For work behind the scenes, which never waits.
    pub fn if_open<T>(&self, f: impl FnOnce(&mut User) -> T) -> Option<T> {
        match &mut *self.state.lock() {
            CellState::Open(user) => Some(f(user)),
            CellState::Closed => None,
        }
    }

    /// Like [`UserCell::if_open`], for work on a user that must be open.
    pub fn open_user<T>(&self, f: impl FnOnce(&mut User) -> Result<T>) -> Result<T> {
        self.if_open(f).unwrap_or(Err(Error::Closing))
    }
}

/// The name of a process, from its number.
pub type ServiceFn = Box<dyn Fn(u32) -> Option<String> + Send + Sync>;

type InvalidateFn = Box<dyn Fn(Invalidate) + Send + Sync>;

/// Work on a publish that failed at close.
pub type Retry = (Weak<UserCell>, NodeIx, Ino);

pub struct Session {
    pub env: Env,
    pub runtime: tokio::runtime::Handle,
    pub settings: Settings,
    pub staging: Arc<Staging>,
    pub fscache: Arc<Fscache>,
    pub metacache: Books,
    pub streams: Streams,
    pub promises: super::promise::Promises,
    pub aside: super::aside::Aside,
    /// Slots for what is read ahead.
    pub(super) ahead: tokio::sync::Semaphore,
    pub(super) hedge: super::hedge::Hedge,
    /// Objects that are being brought to fscache.
    pub(super) fetching: Turns<(Arc<str>, ObjectId)>,
    pub lease: Lease,
    pub lost_mails: lost::Met,
    pub blanks: lost::Blanks,
    pub unserved: super::unserved::Unserved,
    pub counts: super::counts::Counts,
    /// Random name of this session.
    pub id: String,
    pub started: Duration,
    next_ino: AtomicU64,
    pub inos: RwLock<HashMap<Ino, InoTarget>>,
    pub(super) users: Mutex<HashMap<Arc<str>, Arc<UserCell>>>,
    pub wake: tokio::sync::Notify,
    /// More users are open than may be.
    pub too_many: tokio::sync::Notify,
    pub retries: Mutex<Vec<Retry>>,
    /// Whose journals are to be synced, see [`super::sync`].
    pub(super) sync_later: super::sync::Later,
    invalidate: OnceLock<InvalidateFn>,
    services: OnceLock<ServiceFn>,
    pub closing: std::sync::atomic::AtomicBool,
    pub flushes: tokio::sync::Semaphore,
    /// Paths of all users in the store, as listed lately.
    pub user_list: Mutex<Option<Vec<Vec<String>>>>,
    pub heads: super::heads::Heads,
    pub leftovers: super::leftover::Leftovers,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Session {
    /// Opens the local directories. Nothing is asked of the store yet. Called within the runtime
    /// that runs the session's tasks.
    pub fn open(env: Env, settings: Settings) -> Result<Arc<Session>> {
        let disk = |what: &str, e: std::io::Error| Error::disk(what.to_string(), &e);
        for dir in [&users_dir(&settings), &settings.metacache_dir] {
            make_dirs(&*env.disk, dir).map_err(|e| disk(&dir.display().to_string(), e))?;
        }
        let staging = Staging::open(env.disk.clone(), &settings.staging_dir, settings.staging_max)
            .map_err(|e| disk("staging", e))?;
        let fscache =
            Fscache::open(&env.disk, &settings.fscache).map_err(|e| disk("fscache", e))?;
        // Inode numbers are not given twice within a run, nor, by starting from the clock, in
        // the next one: Postfix writes them into the names of mails.
        let base = u64::try_from(env.clock.wall().secs).unwrap_or(1) << 20;
        let id = format!("{:016x}", env.random.u64());
        let flushes = settings.max_flushes.max(1);
        let metacache = Books::new(settings.metacache.limits, settings.metacache.weights.clone());
        let session = Arc::new(Session {
            metacache,
            lease: Lease::new(&settings),
            lost_mails: lost::Met::default(),
            blanks: lost::Blanks::default(),
            unserved: super::unserved::Unserved::default(),
            counts: super::counts::Counts::default(),
            streams: Streams::new(settings.stream_memory),
            promises: super::promise::Promises::default(),
            aside: super::aside::Aside::default(),
            ahead: tokio::sync::Semaphore::new(settings.read_ahead),
            hedge: super::hedge::Hedge::default(),
            fetching: Turns::default(),
            started: env.clock.boot(),
            env,
            runtime: tokio::runtime::Handle::current(),
            settings,
            staging,
            fscache,
            id,
            next_ino: AtomicU64::new(base.max(2)),
            inos: RwLock::new(HashMap::new()),
            users: Mutex::new(HashMap::new()),
            wake: tokio::sync::Notify::new(),
            too_many: tokio::sync::Notify::new(),
            retries: Mutex::new(Vec::new()),
            sync_later: super::sync::Later::default(),
            invalidate: OnceLock::new(),
            services: OnceLock::new(),
            closing: std::sync::atomic::AtomicBool::new(false),
            flushes: tokio::sync::Semaphore::new(flushes),
            user_list: Mutex::new(None),
            heads: super::heads::Heads::default(),
            leftovers: super::leftover::Leftovers::default(),
        });
        session.count_all()?;
        Ok(session)
    }

    /// Seconds since 1970 by the store's clock, by which retention counts; by the machine's if the
    /// store has none.
    pub fn store_time(&self) -> i64 {
        self.env.store.time().unwrap_or_else(|| self.env.clock.wall().secs)
    }

    pub fn new_ino(&self) -> Ino {
        self.next_ino.fetch_add(1, Ordering::Relaxed)
    }

    pub fn new_folder_id(&self) -> FolderId {
        loop {
            let id = FolderId(self.env.random.u64());
            if id != FolderId::ROOT {
                return id;
            }
        }
    }

    pub fn forget_ino(&self, ino: Ino) {
        self.blanks.forget(ino);
        self.inos.write().remove(&ino);
    }

    pub fn register(&self, ino: Ino, target: impl FnOnce() -> InoTarget) {
        if !self.inos.read().contains_key(&ino) {
            self.inos.write().insert(ino, target());
        }
    }

    pub fn target(&self, ino: Ino) -> Option<InoTarget> {
        self.inos.read().get(&ino).cloned()
    }

    /// The cell of a user, made at its first mention.
    pub fn user(self: &Arc<Self>, name: &str, path: &[&[u8]]) -> Arc<UserCell> {
        let mut users = self.users.lock();
        if let Some(cell) = users.get(name) {
            return cell.clone();
        }
        let name: Arc<str> = name.into();
        let cell = Arc::new(UserCell {
            name: name.clone(),
            path: path.iter().map(|c| String::from_utf8_lossy(c).into_owned()).collect(),
            ino: self.new_ino(),
            session: self.clone(),
            state: Mutex::new(CellState::Closed),
            root: Mutex::new(RootInfo::default()),
            opening: tokio::sync::Mutex::new(()),
            loading: tokio::sync::Mutex::new(()),
            flushing: tokio::sync::Mutex::new(()),
            uploading: tokio::sync::Mutex::new(()),
            uploader: AtomicBool::new(false),
            sync_later: AtomicBool::new(false),
            collecting: tokio::sync::Mutex::new(()),
            makes_room: std::sync::atomic::AtomicUsize::new(0),
            publishing: super::close::UnderWay::default(),
            under_way: Turns::default(),
        });
        users.insert(name, cell.clone());
        cell
    }

    /// A user by name, with its path made from the layout.
    pub fn user_by_name(self: &Arc<Self>, name: &str) -> Option<Arc<UserCell>> {
        let path = self.settings.layout.path_of(name)?;
        let parts: Vec<&[u8]> = path.iter().map(|c| c.as_bytes()).collect();
        Some(self.user(name, &parts))
    }

    pub fn known_user(&self, name: &str) -> Option<Arc<UserCell>> {
        self.users.lock().get(name).cloned()
    }

    /// All users mentioned so far, in the order of their names.
    pub fn all_users(&self) -> Vec<Arc<UserCell>> {
        let mut all = self.users_in_any_order();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    pub fn users_in_any_order(&self) -> Vec<Arc<UserCell>> {
        self.users.lock().values().cloned().collect()
    }

    /// The whole mount ends: nobody is opened any more.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Lets go of all users. They and their session hold each other, which is no matter for a
    /// process that ends with its session, and would fill the memory of one that goes on.
    pub fn forget_users(&self) {
        let users = std::mem::take(&mut *self.users.lock());
        let inos = std::mem::take(&mut *self.inos.write());
        // Not under the locks: a user that goes may take things from the session's books.
        drop((users, inos));
    }

    pub fn wake_scheduler(&self) {
        self.wake.notify_one();
    }

    pub fn retry_publish(&self, cell: &Arc<UserCell>, ix: NodeIx, ino: Ino) {
        self.retries.lock().push((Arc::downgrade(cell), ix, ino));
        self.wake_scheduler();
    }

    /// Opens a user behind the scenes; an error shows at the first call that needs it.
    pub fn open_soon(&self, cell: &Arc<UserCell>) {
        let cell = cell.clone();
        let _task = self.runtime.spawn(async move {
            if let Err(error) = super::open::open(&cell).await {
                tracing::warn!(user = %cell.name, %error, "new user not made yet");
            }
        });
    }

    pub fn set_invalidator(&self, send: InvalidateFn) {
        // Set once per mount; a second driver of the same session would be a mistake.
        if self.invalidate.set(send).is_err() {
            tracing::error!("a second driver tried to attach to this session");
        }
    }

    pub fn invalidate(&self, what: Invalidate) {
        if let Some(send) = self.invalidate.get() {
            send(what);
        }
    }

    /// How programs are told that use files here.
    pub fn set_services(&self, name: ServiceFn) {
        if self.services.set(name).is_err() {
            tracing::error!("who tells the names of programs was set before");
        }
    }

    /// Not for every call: it may read a file.
    pub(super) fn service(&self, pid: u32) -> Option<String> {
        self.services.get().and_then(|name| name(pid))
    }

    pub fn disk(&self) -> &dyn Disk {
        &*self.env.disk
    }

    /// Directory of a user's head, journal and snapshots.
    pub fn state_dir_of(&self, user: &str) -> PathBuf {
        self.users_dir().join(crate::format::key::user_dir(user))
    }

    /// Where these lie. It is there, for good.
    pub(super) fn users_dir(&self) -> PathBuf {
        users_dir(&self.settings)
    }
}

fn users_dir(settings: &Settings) -> PathBuf {
    settings.state_dir.join("users")
}
