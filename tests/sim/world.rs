//! What all machines share, and one life of a machine: from its start until it dies.

use super::chance::Chance;
use super::clock::{START, Time};
use super::disk::{Platter, SimDisk};
use super::model::{Cut, Model};
use super::server::Told;
use super::store::{SimStore, Weather};
use super::wrong::{Kind, Violation};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use vmailfs::cache::fscache::Place;
use vmailfs::dovecot::template::Layout;
use vmailfs::format::Timestamp;
use vmailfs::format::head::Head;
use vmailfs::format::key::bundle_key;
use vmailfs::fs::VmailFs;
use vmailfs::store::mem::MemStore;
use vmailfs::vmail::env::{Clock, Env};
use vmailfs::vmail::gc;
use vmailfs::vmail::lease::Lease;
use vmailfs::vmail::lost::LostMails;
use vmailfs::vmail::schedule;
use vmailfs::vmail::session::{Session, Settings};

/// Lines of the log that are kept to be shown.
const LINES: usize = 4000;

#[derive(Debug, Default)]
struct Log {
    lines: VecDeque<String>,
    sum: u64,
    count: u64,
}

/// Everything that is not a machine.
#[derive(Debug)]
pub struct Core {
    pub time: Time,
    pub mem: MemStore,
    pub weather: Mutex<Weather>,
    pub chance: Chance,
    log: Mutex<Log>,
    shown: bool,
    serial: AtomicU64,
    /// The first thing that should not have been.
    failure: Mutex<Option<Violation>>,
    pub model: Mutex<Model>,
    pub told: Mutex<Told>,
    /// What is there after a death is being looked at: the model is not the truth.
    looking: AtomicBool,
    /// What the last death left was not looked at to the end.
    unseen: AtomicBool,
    slow_until_taken: AtomicBool,
    gave_up: tokio::sync::Notify,
    lives: Mutex<Vec<Arc<Life>>>,
    sessions: Mutex<Vec<Weak<Session>>>,
    /// After so many milliseconds a request that deletes has arrived, or never does.
    pub longest_delete: AtomicU64,
}

impl Core {
    pub fn new(seed: u64, shown: bool) -> Arc<Core> {
        let time = Time::default();
        let dates = time.clone();
        Arc::new(Core {
            mem: MemStore::with_clock(move || START + dates.now().as_secs() as i64),
            time,
            weather: Mutex::default(),
            chance: Chance::new(seed),
            log: Mutex::default(),
            shown,
            serial: AtomicU64::new(0),
            failure: Mutex::default(),
            model: Mutex::default(),
            told: Mutex::default(),
            looking: AtomicBool::new(false),
            unseen: AtomicBool::new(false),
            slow_until_taken: AtomicBool::new(false),
            gave_up: tokio::sync::Notify::new(),
            lives: Mutex::default(),
            sessions: Mutex::default(),
            longest_delete: AtomicU64::new(u64::MAX),
        })
    }

    /// The run is over: nothing of it may stay in memory. Many runs follow each other.
    pub fn end(self: &Arc<Self>) {
        for session in std::mem::take(&mut *self.sessions.lock()) {
            session.upgrade().iter().for_each(|session| session.forget_users());
        }
        self.lives.lock().clear();
        let known = Arc::strong_count(self);
        if known > 1 {
            self.fail(Kind::Other, format!("{} things outlive their run", known - 1));
        }
    }

    pub fn give_up(&self, why: &str) {
        self.fail(Kind::Stuck, why.to_string());
        self.gave_up.notify_one();
    }

    pub async fn given_up(&self) {
        self.gave_up.notified().await;
    }

    pub fn unseen(&self) -> bool {
        self.unseen.load(Ordering::SeqCst)
    }

    pub fn set_unseen(&self, on: bool) {
        self.unseen.store(on, Ordering::SeqCst);
    }

    pub fn is_looking(&self) -> bool {
        self.looking.load(Ordering::SeqCst)
    }

    pub fn look(&self, on: bool) {
        self.looking.store(on, Ordering::SeqCst);
    }

    /// A put is sent: of a bundle, everything done so far is in its cut.
    pub fn put_called(&self, life: &Life, key: &str) {
        if key.contains("/bundle/") {
            let mut model = self.model.lock();
            // While a death's remains are looked at, the model does not know what is there. What a
            // session does that goes on beside its successor, it knows all along.
            let unknown = self.is_looking() && !life.followed.load(Ordering::SeqCst);
            let cut = match unknown {
                true => Cut::Found(life.name.clone()),
                false => Cut::At(model.index()),
            };
            model.bundles.insert(key.to_string(), cut);
        }
    }

    /// A request was given up and arrives later.
    pub fn arrives_late(&self, what: &str) {
        let mut model = self.model.lock();
        let name = |name: &String| what.contains(name.as_str());
        let late = model.mails.values_mut().filter(|mail| mail.name.as_ref().is_some_and(name));
        late.for_each(|mail| mail.late = true);
    }

    pub fn clear_up(&self) {
        self.slow_until_taken.store(false, Ordering::SeqCst);
        *self.weather.lock() = Weather::default();
    }

    /// The store is slow until somebody has taken the user: the session that has it makes many a mail
    /// safe meanwhile, between any two requests of the one that takes it.
    pub fn slow_until_taken(&self) {
        self.slow_until_taken.store(true, Ordering::SeqCst);
        *self.weather.lock() = Weather { slow: 50, ..Weather::default() };
        self.log("a slow store");
    }

    /// A head of a life that opens a user is in the store: all others have lost it.
    pub fn taken_by(&self, name: &str) {
        if self.slow_until_taken.load(Ordering::SeqCst) {
            self.clear_up();
        }
        for life in self.lives.lock().iter().filter(|l| !l.is_dead()) {
            if life.name == name {
                life.fenced.store(false, Ordering::SeqCst);
            } else if !life.fenced.swap(true, Ordering::SeqCst) {
                life.log("is fenced");
            }
        }
    }

    /// A put arrived. A head must name nothing that is not there, and what its bundle holds
    /// cannot be lost any more.
    pub fn put_done(&self, key: &str) {
        if !key.ends_with("/head") {
            return;
        }
        let bytes = self.mem.bytes_of(key).unwrap_or_default();
        let head = match Head::decode(&bytes) {
            Ok(head) => head,
            Err(error) => {
                return self
                    .fail(Kind::HeadTooEarly, format!("a head that cannot be read: {error}"));
            }
        };
        let parts = head.folders.iter().flat_map(|f| &f.parts);
        for part in parts.chain(&head.names).chain(&head.dropped).chain(&head.previous) {
            let there = self.mem.bytes_of(&bundle_key(&head.user, part.bundle));
            let there = there.and_then(|b| {
                let from = usize::try_from(part.offset).ok()?;
                let frame = b.get(from..from + usize::try_from(part.len).ok()?)?;
                part.check(frame).ok()
            });
            if there.is_none() {
                self.fail(
                    Kind::HeadTooEarly,
                    format!("the head names a part of {} that is not there", part.bundle),
                );
            }
        }
        if let Some(part) = &head.previous {
            let mut model = self.model.lock();
            let cut = model.bundles.get(&bundle_key(&head.user, part.bundle)).cloned();
            match &cut {
                Some(Cut::At(index)) => model.flushed = model.flushed.max(*index),
                Some(Cut::Found(life)) => model.flushed_unseen = Some(life.clone()),
                None => {}
            }
            drop(model);
            self.log(&format!("flushed up to {cut:?}"));
        }
    }

    /// Notes what happens: part of what two runs of a seed have in common.
    pub fn log(&self, line: &str) {
        let mut log = self.log.lock();
        let line = format!("{:>12.6} {line}", self.time.now().as_secs_f64());
        log.sum = (log.sum.rotate_left(9) ^ u64::from(crc32c::crc32c(line.as_bytes())))
            .wrapping_mul(0x9E37_79B9_7F4A_7C15);
        log.count += 1;
        if self.shown {
            eprintln!("{line}");
        }
        if log.lines.len() == LINES {
            log.lines.pop_front();
        }
        log.lines.push_back(line);
    }

    pub fn log_sum(&self) -> (u64, u64) {
        let log = self.log.lock();
        (log.sum, log.count)
    }

    pub fn lines(&self) -> Vec<String> {
        self.log.lock().lines.iter().cloned().collect()
    }

    /// Something is as it must not be.
    pub fn fail(&self, kind: Kind, what: String) {
        self.wrong(Violation::new(kind, what));
    }

    pub fn wrong(&self, wrong: Violation) {
        self.log(&format!("VIOLATION {:?} {}", wrong.kinds, wrong.what));
        self.failure.lock().get_or_insert(wrong);
    }

    pub fn failure(&self) -> Option<Violation> {
        self.failure.lock().clone()
    }
}

/// When in the course of something a machine dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Before,
    Middle,
    After,
}

/// Dies at the n-th event from now.
#[derive(Debug, Clone, Copy)]
pub struct Fuse {
    pub left: u64,
    pub moment: Moment,
}

fn burn(fuse: &Mutex<Option<Fuse>>) -> Option<Moment> {
    let mut fuse = fuse.lock();
    let burning = fuse.as_mut()?;
    if burning.left > 0 {
        burning.left -= 1;
        return None;
    }
    fuse.take().map(|fuse| fuse.moment)
}

/// One life of a machine.
#[derive(Debug)]
pub struct Life {
    pub core: Arc<Core>,
    pub chance: Chance,
    name: String,
    dead: AtomicBool,
    /// Another life has taken the user.
    pub fenced: AtomicBool,
    /// Another life begins while this one goes on.
    pub followed: AtomicBool,
    /// No request reaches the store.
    pub cut_off: AtomicBool,
    died: tokio::sync::Notify,
    pub disk_fuse: Mutex<Option<Fuse>>,
    pub store_fuse: Mutex<Option<Fuse>>,
    /// Of ten thousand changes of the disk so many are refused.
    pub disk_faults: AtomicU64,
}

impl Life {
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    pub fn die(&self, why: &str) {
        if !self.dead.swap(true, Ordering::SeqCst) {
            self.core.log(&format!("{} DIES: {why}", self.name));
            self.died.notify_one();
        }
    }

    /// Until it dies.
    pub async fn end(&self) {
        while !self.is_dead() {
            self.died.notified().await;
        }
    }

    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the dead do.
    pub async fn nothing<T>(&self) -> T {
        std::future::pending().await
    }

    /// Ends here if the machine is dead.
    pub async fn check(&self) {
        if self.is_dead() {
            self.nothing::<()>().await;
        }
    }

    pub fn serial(&self) -> u64 {
        self.core.serial.fetch_add(1, Ordering::SeqCst)
    }

    pub fn disk_moment(&self, what: &str) -> Option<Moment> {
        self.core.log(&format!("{} disk {what}", self.name));
        burn(&self.disk_fuse)
    }

    pub fn disk_fault(&self, what: &str) -> Option<io::Error> {
        let rate = self.disk_faults.load(Ordering::SeqCst);
        if rate == 0 || self.chance.below(10_000) >= rate {
            return None;
        }
        let kind =
            if self.chance.percent(70) { io::ErrorKind::StorageFull } else { io::ErrorKind::Other };
        self.core.log(&format!("{} disk refuses ({kind}): {what}", self.name));
        Some(io::Error::from(kind))
    }

    pub fn store_moment(&self) -> Option<Moment> {
        burn(&self.store_fuse)
    }

    pub fn log(&self, what: &str) {
        self.core.log(&format!("{} {what}", self.name));
    }
}

/// The clock of one life.
#[derive(Debug)]
struct LifeClock(Arc<Life>);

impl Clock for LifeClock {
    fn wall(&self) -> Timestamp {
        let now = self.0.core.time.tick();
        Timestamp { secs: START + now.as_secs() as i64, nanos: now.subsec_nanos() }
    }

    fn boot(&self) -> Duration {
        self.0.core.time.now()
    }

    fn sleep(&self, time: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let life = self.0.clone();
        Box::pin(async move {
            life.check().await;
            life.core.time.sleep(time).await;
            life.check().await;
        })
    }
}

/// A machine, whether it runs or not.
#[derive(Debug)]
pub struct Machine {
    pub backend: String,
    pub platter: Arc<Platter>,
    boots: u64,
    lives: u64,
}

/// What a seed decides for all machines.
#[derive(Debug, Clone)]
pub struct Rules {
    pub single_backend: bool,
    pub upload_interval: Duration,
    pub max_rescan: u32,
    pub fscache_max: u64,
    pub delivery_timeout: Duration,
    pub idle_upload: Duration,
    pub gc: gc::Limits,
}

impl Machine {
    pub fn new(backend: &str) -> Machine {
        Machine { backend: backend.into(), platter: Arc::default(), boots: 0, lives: 0 }
    }

    /// The power went and came back.
    pub fn power_cut(&mut self, core: &Core) {
        self.platter.power_cut(&core.chance);
        self.boots += 1;
    }

    /// Another machine takes its place, with nothing on its disk.
    pub fn lose(&mut self) {
        self.platter = Arc::default();
        self.boots += 1;
    }

    pub fn begin(&mut self, core: &Arc<Core>) -> Arc<Life> {
        self.lives += 1;
        let life = Arc::new(Life {
            core: core.clone(),
            chance: core.chance.split(),
            name: format!("{}{}", self.backend, self.lives),
            dead: AtomicBool::new(false),
            fenced: AtomicBool::new(false),
            followed: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
            died: tokio::sync::Notify::new(),
            disk_fuse: Mutex::default(),
            store_fuse: Mutex::default(),
            disk_faults: AtomicU64::new(0),
        });
        core.lives.lock().push(life.clone());
        life
    }

    fn settings(&self, rules: &Rules) -> Settings {
        Settings {
            state_dir: "state".into(),
            metacache_dir: "meta".into(),
            fscache: vec![Place { path: "fscache".into(), max: rules.fscache_max }],
            stream_memory: 8 << 20,
            read_ahead: 16,
            hedge: 0,
            ack: vmailfs::vmail::promise::Ack::Store,
            gc: rules.gc,
            staging_dir: "staging".into(),
            staging_max: 64 << 20,
            metacache: vmailfs::vmail::session::Metacache {
                close_idle: Duration::from_secs(3600),
                ..Default::default()
            },
            layout: Layout::parse("%u").unwrap(),
            backend: self.backend.clone(),
            host: "host".into(),
            single_backend: rules.single_backend,
            lease: Duration::from_secs(180),
            owner: None,
            root_owner: None,
            root_mode: 0o755,
            allow_root_delete: true,
            upload_interval: rules.upload_interval,
            max_rescan_mail_count: rules.max_rescan,
            quiet: Duration::from_secs(1),
            quiet_max: Duration::from_secs(5),
            idle_upload: rules.idle_upload,
            delivery_timeout: rules.delivery_timeout,
            max_flushes: 4,
            boot_id: format!("boot{}", self.boots),
            ask_for_users: true,
            lost_mails: LostMails::Error,
        }
    }

    /// Mounts. `None`: the machine died, or refused for lack of a disk or a store.
    pub async fn mount(&self, life: &Arc<Life>, rules: &Rules) -> Option<Arc<VmailFs>> {
        let env = Env {
            store: Arc::new(SimStore::new(life.clone())),
            disk: Arc::new(SimDisk::new(self.platter.clone(), life.clone())),
            clock: Arc::new(LifeClock(life.clone())),
            random: Arc::new(life.chance.split()),
        };
        let session = match Session::open(env, self.settings(rules)) {
            Ok(session) => session,
            Err(error) => {
                life.log(&format!("not mounted: {error}"));
                return None;
            }
        };
        life.core.sessions.lock().push(Arc::downgrade(&session));
        // The last session's sign may only just have reached the store.
        while let Err(error) = session.lease.claim(&session, false, &mut |_| ()).await {
            life.log(&format!("claim: {error}"));
            life.core.time.sleep(Duration::from_secs(10)).await;
        }
        tokio::spawn(Lease::keep(session.clone()));
        tokio::spawn(schedule::run(session.clone()));
        tokio::spawn(gc::run(session.clone()));
        Some(Arc::new(VmailFs::new(session)))
    }
}
