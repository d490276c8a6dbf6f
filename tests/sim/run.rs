//! A run: lives and deaths of machines under a seed, and what is looked at after each.

use super::chance::{Chance, seed_thread};
use super::model::Death;
use super::mount::{Answer, Mount};
use super::server::{Format, Locks, Server};
use super::store::Weather;
use super::world::{Core, Fuse, Life, Machine, Moment, Rules};
use super::wrong::{Kind, Violation};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use vmailfs::fs::VmailFs;
use vmailfs::vmail::gc;

/// How a seed ended.
#[derive(Debug)]
pub struct Outcome {
    pub seed: u64,
    pub failure: Option<Violation>,
    /// The end of the log.
    pub lines: Vec<String>,
    /// Sum and number of all lines.
    pub sum: (u64, u64),
    pub safe_mails: usize,
    pub deaths: usize,
}

const USER: &str = "u";
/// No run takes so long, by its own clock.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The format that a seed's server keeps its mails in.
pub fn format_of(seed: u64) -> Format {
    match Chance::new(!seed).percent(50) {
        true => Format::Maildir,
        false => Format::Sdbox,
    }
}

/// What a run is of.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub seed: u64,
    pub format: Format,
    /// An administrator brings mails back. The chance of that is its own, so nothing else of the seed
    /// depends on it but what follows from it.
    pub undeletes: bool,
}

fn undelete_chance(seed: u64) -> Chance {
    let chance = Chance::new(seed.rotate_left(32) ^ 0x756e_6465);
    // The first number is not used: so the seeds in the list stay what they were.
    chance.below(100);
    chance
}

/// Runs a seed on a thread of its own.
pub fn run(plan: Plan, shown: bool) -> Outcome {
    std::thread::Builder::new()
        .name(format!("seed {}", plan.seed))
        .stack_size(16 << 20)
        .spawn(move || {
            seed_thread(plan.seed);
            run_here(plan, shown)
        })
        .unwrap()
        .join()
        .unwrap()
}

fn run_here(plan: Plan, shown: bool) -> Outcome {
    let seed = plan.seed;
    let core = Core::new(seed, shown);
    let (time, stuck) = (core.time.clone(), core.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .on_thread_park(move || {
            if time.now() > LONGEST {
                stuck.give_up("it takes for ever");
            }
            if !time.jump() {
                stuck.give_up("nothing can go on any more");
            }
        })
        .build()
        .unwrap();
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(async {
            let mut run = Run::new(plan, core.clone());
            let main = run.go();
            tokio::select! {
                biased;
                () = main => {}
                () = core.given_up() => {}
            }
            run.deaths
        })
    }));
    drop(runtime);
    core.end();
    let mut failure = core.failure();
    let deaths = match done {
        Ok(deaths) => deaths,
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
            let text = format!("panic: {}", text.unwrap_or_default());
            failure.get_or_insert(Violation::new(Kind::Other, text));
            0
        }
    };
    let safe_mails = core.model.lock().mails.values().filter(|m| m.safe).count();
    let sum = core.log_sum();
    Outcome { seed, failure, lines: core.lines(), sum, safe_mails, deaths }
}

struct Run {
    core: Arc<Core>,
    rules: Rules,
    /// Where the user is, first, and another backend.
    machines: [Machine; 2],
    clients: u64,
    /// A life that has not ended while another begins, and what goes on in it.
    old: Option<(Arc<Life>, JoinSet<()>)>,
    format: Format,
    index: bool,
    deaths: usize,
    /// The disk refuses things in this life.
    disk_fails: bool,
    /// An administrator brings mails back. Its chance is its own.
    undeletes: Option<Chance>,
    /// The machine has nothing on its disk, and nobody has looked at what that means.
    bare: bool,
    /// How takeovers go. Its own, too.
    takeovers: Chance,
}

impl Run {
    fn new(plan: Plan, core: Arc<Core>) -> Run {
        let Plan { seed, format, undeletes } = plan;
        let chance = &core.chance;
        let rules = Rules {
            single_backend: chance.percent(65),
            upload_interval: Duration::from_secs([20, 60, 300][chance.index(3)]),
            max_rescan: [1, 10][chance.index(2)],
            fscache_max: [64 << 20, 150_000][chance.index(2)],
            delivery_timeout: Duration::from_secs(20),
            idle_upload: Duration::from_secs([60, 3600][chance.index(2)]),
            gc: gc::Limits {
                retention: Duration::from_secs([1, 100, 1000][chance.index(3)]),
                interval: Duration::from_secs([10, 100][chance.index(2)]),
                full_scan: Duration::from_secs([20, 600][chance.index(2)]),
                ..gc::Limits::default()
            },
        };
        let clients = chance.between(1, 4);
        let index = chance.percent(75);
        let longest = u64::try_from(rules.gc.interval.as_millis()).unwrap();
        core.longest_delete.store(longest, std::sync::atomic::Ordering::SeqCst);
        core.model.lock().sdbox = format == Format::Sdbox;
        core.log(&format!("{rules:?} clients {clients} {format:?} index {index}"));
        Run {
            machines: [Machine::new("a"), Machine::new("b")],
            old: None,
            core,
            rules,
            clients,
            format,
            index,
            deaths: 0,
            disk_fails: false,
            undeletes: undeletes.then(|| undelete_chance(seed)),
            bare: false,
            takeovers: Chance::new(seed.rotate_left(16) ^ 0x7461_6b65),
        }
    }

    async fn go(&mut self) {
        let lives = self.core.chance.between(3, 8);
        let mut death = Death::None;
        for n in 0..=lives {
            death = self.life(death, n == lives).await;
            if self.core.failure().is_some() {
                return;
            }
            self.deaths += 1;
        }
    }

    fn set_weather(&self) {
        let chance = &self.core.chance;
        let weather = match chance.below(6) {
            0 => Weather { fails: 10, lost: 5, late: 5, slow: 10, down: false },
            1 => Weather { lost: 15, slow: 30, ..Weather::default() },
            2 => Weather { late: 20, ..Weather::default() },
            3 => Weather { slow: 50, ..Weather::default() },
            _ => Weather::default(),
        };
        self.core.log(&format!("{weather:?}"));
        *self.core.weather.lock() = weather;
    }

    /// Important changes are in the store after the upload interval, if it takes them (I3).
    fn judge_flushes(&self) {
        let Weather { fails: 0, lost: 0, late: 0, down: false, .. } = *self.core.weather.lock()
        else {
            return;
        };
        if self.core.is_looking() || self.core.unseen() || self.disk_fails {
            return;
        }
        let oldest = self.core.model.lock().oldest_important();
        let age = oldest.map_or(Duration::ZERO, |at| self.core.time.now().saturating_sub(at));
        if age > self.rules.upload_interval + Duration::from_secs(60) {
            self.core.fail(
                Kind::Late,
                format!("an important change of {age:?} ago is in no flush (I3)"),
            );
        }
    }

    fn fine_weather(&self) {
        self.core.clear_up();
    }

    /// One life; says what ended it.
    async fn life(&mut self, after: Death, last: bool) -> Death {
        let core = self.core.clone();
        let chance = &core.chance;
        let life = self.machines[0].begin(&core);
        core.log(&format!("--- a life after {after:?}"));
        core.set_unseen(true);
        if !last {
            let moment = || [Moment::Before, Moment::Middle, Moment::After][chance.index(3)];
            match chance.below(5) {
                0 | 1 => {
                    let left = chance.below(if chance.percent(30) { 40 } else { 600 });
                    *life.disk_fuse.lock() = Some(Fuse { left, moment: moment() });
                }
                2 => {
                    let left = chance.below(if chance.percent(30) { 8 } else { 60 });
                    *life.store_fuse.lock() = Some(Fuse { left, moment: moment() });
                }
                _ => {}
            }
        }
        self.disk_fails = chance.percent(20) && !last;
        self.fine_weather();
        if self.old.is_some() && self.rules.single_backend && self.takeovers.percent(50) {
            core.slow_until_taken();
        }
        let mounted = tokio::select! {
            biased;
            () = life.end() => None,
            mounted = self.machines[0].mount(&life, &self.rules) => mounted,
        };
        if !life.is_dead() {
            let fs = mounted.expect("a machine that lives mounts");
            let clients = tokio::select! {
                biased;
                () = life.end() => None,
                clients = self.work(&life, fs.clone(), after, last) => Some(clients),
            };
            if let Some(clients) = clients.filter(|c| !c.is_empty())
                && !life.is_dead()
                && core.failure().is_none()
            {
                let death = self.taken_over(life, clients);
                // Nobody notices sooner, and no counter that starts from the clock runs ahead of it.
                core.time.sleep(Duration::from_secs(10)).await;
                return death;
            }
            if !life.is_dead() && core.failure().is_none() && (last || chance.percent(15)) {
                self.fine_weather();
                life.disk_faults.store(0, std::sync::atomic::Ordering::SeqCst);
                if !self.rules.single_backend {
                    // A lease that ran out in bad weather is renewed first: a minute after the end of
                    // a try that may still be under way, for the 8 s of a slow store and 15 of silence.
                    tokio::select! {
                        biased;
                        () = life.end() => {}
                        () = core.time.sleep(Duration::from_secs(90)) => {}
                    }
                }
                fs.release_all();
                let failed = tokio::select! {
                    biased;
                    () = life.end() => Vec::new(),
                    failed = fs.session().close(Duration::from_secs(600)) => failed,
                };
                for (user, error) in failed {
                    core.fail(Kind::Stuck, format!("{user} could not be closed: {error}"));
                }
                if !life.is_dead() {
                    life.die("closed");
                    let lost = self.rules.single_backend && chance.percent(50);
                    {
                        let mut model = core.model.lock();
                        let end = model.index();
                        model.synced = end;
                        if lost || !self.rules.single_backend {
                            model.flushed = end;
                        }
                    }
                    if lost {
                        self.machines[0].lose();
                        core.time.sleep(Duration::from_secs(60)).await;
                    } else if !self.rules.single_backend {
                        self.machines.swap(0, 1);
                    }
                    self.bare = lost || !self.rules.single_backend;
                    core.look(true);
                    return Death::None;
                }
            }
        }
        self.judge_flushes();
        life.die("by chance");
        if let Some((old, _)) = self.old.take() {
            old.die("its successor died, too");
        }
        core.look(true);
        // What a death before this one left was not looked at to the end: the worse counts.
        if !self.rules.single_backend && chance.percent(15) {
            // Its work goes on elsewhere.
            self.machines.swap(0, 1);
            core.log("the other backend goes on");
            // One that died before this one may have all its state, if this one took nothing over.
            core.model.lock().came_back = core.unseen();
            return Death::Disk;
        }
        let death = match chance.below(10) {
            0..5 => Death::Process,
            5..8 => {
                self.machines[0].power_cut(&core);
                Death::Power
            }
            _ => {
                self.machines[0].lose();
                Death::Disk
            }
        };
        core.log(&format!("{death:?}"));
        if death != Death::Process {
            // No machine starts, or is replaced, in less.
            core.time.sleep(Duration::from_secs(60)).await;
        }
        if !core.unseen() {
            self.bare = false;
            return death;
        }
        // Nothing is known here of what was handed over.
        if self.bare { Death::Disk } else { worse(after, death) }
    }

    async fn work(
        &mut self,
        life: &Arc<Life>,
        fs: Arc<VmailFs>,
        after: Death,
        last: bool,
    ) -> JoinSet<()> {
        let mut clients = JoinSet::new();
        let mount = Mount { fs, life: life.clone(), single: self.rules.single_backend };
        self.look(&mount, after).await;
        if let Some((old, _)) = self.old.take() {
            old.die("taken over");
        }
        self.core.look(false);
        self.core.set_unseen(false);
        self.core.model.lock().came_back = false;
        if self.core.failure().is_some() {
            return clients;
        }
        let server = Server {
            mount,
            locks: Arc::new(Locks::default()),
            user: USER.into(),
            format: self.format,
            index: self.index,
        };
        // Whoever opens a folder after a death sees UIDs at once.
        if let Err(errno) = self.select_all(&server).await {
            self.core
                .fail(Kind::Answer, format!("folders cannot be opened after {after:?}: {errno}"));
        }
        if last {
            return clients;
        }
        self.set_weather();
        if self.disk_fails {
            let rate = self.core.chance.between(10, 500);
            life.disk_faults.store(rate, std::sync::atomic::Ordering::SeqCst);
        }
        if let Some(undeletes) = &self.undeletes {
            let (server, chance) = (server.clone(), undeletes.split());
            clients.spawn(async move { server.undeletes(chance).await });
        }
        for _ in 0..self.clients {
            let (server, calls) = (server.clone(), self.core.chance.between(5, 40));
            clients.spawn(async move { client(&server, calls).await });
        }
        if self.core.chance.percent(20) {
            let time = Duration::from_millis(self.core.chance.between(50, 20_000));
            // Mail comes in all the while.
            let (server, core) = (server.clone(), self.core.clone());
            clients.spawn(async move {
                while core.failure().is_none() {
                    let _ = server.deliver("INBOX").await;
                    core.time.sleep(Duration::from_millis(core.chance.between(1, 200))).await;
                }
            });
            tokio::select! {
                biased;
                () = ended(&self.core, &mut clients) => {}
                () = self.core.time.sleep(time) => {}
            }
        } else {
            ended(&self.core, &mut clients).await;
        }
        clients
    }

    /// Another machine begins while this one still works: one that took its place under the
    /// same name, or another backend, for which this one is cut off from the store.
    fn taken_over(&mut self, life: Arc<Life>, clients: JoinSet<()>) -> Death {
        self.core.log("another takes over");
        self.core.look(true);
        life.followed.store(true, std::sync::atomic::Ordering::SeqCst);
        *life.disk_fuse.lock() = None;
        *life.store_fuse.lock() = None;
        if self.rules.single_backend {
            self.machines[0].lose();
        } else {
            life.cut_off.store(true, std::sync::atomic::Ordering::SeqCst);
            self.machines.swap(0, 1);
        }
        self.old = Some((life, clients));
        Death::Disk
    }

    async fn select_all(&self, server: &Server) -> Answer<()> {
        server.login().await?;
        for folder in server.folders().await? {
            server.select(&folder).await?;
        }
        Ok(())
    }

    /// Compares what is there with what may be there.
    async fn look(&self, mount: &Mount, after: Death) {
        let mut tries = 0;
        let seen = loop {
            match mount.look_at_all().await {
                Ok(seen) => break seen,
                Err(errno) => {
                    tries += 1;
                    if tries > 60 {
                        self.core.fail(
                            Kind::Answer,
                            format!("nothing can be seen after {after:?}: {errno}"),
                        );
                        return;
                    }
                    self.core.time.sleep(Duration::from_secs(10)).await;
                }
            }
        };
        let done = self.core.model.lock().after(after, &seen, mount.life.name());
        match done {
            Ok(()) => self.core.log(&format!("all is as it may be after {after:?}")),
            Err(wrong) => self.core.wrong(wrong),
        }
    }
}

/// Until no client has anything left to do.
async fn ended(core: &Core, clients: &mut JoinSet<()>) {
    while let Some(done) = clients.join_next().await {
        if let Err(error) = done {
            core.fail(Kind::Other, format!("a client failed: {error}"));
        }
    }
}

/// The worse of two deaths of which nobody has seen the first's end.
fn worse(a: Death, b: Death) -> Death {
    let rank = |d| match d {
        Death::None => 0,
        Death::Process => 1,
        Death::Power => 2,
        Death::Disk => 3,
    };
    if rank(a) > rank(b) { a } else { b }
}

/// A client, or a queue of deliveries.
async fn client(server: &Server, calls: u64) {
    let core = server.mount.life.core.clone();
    let chance = &core.chance;
    for _ in 0..calls {
        let Ok(folders) = server.folders().await else { continue };
        let folder = chance.pick(&folders).unwrap().clone();
        let other = chance.pick(&folders).unwrap().clone();
        let what = chance.below(100);
        let done = match what {
            0..35 => server.deliver(&folder).await,
            35..45 => server.select(&folder).await.map(drop),
            45..57 => server.store_flags(&folder).await,
            57..65 => server.copy(&folder, &other, false).await,
            65..75 => server.copy(&folder, &other, true).await,
            75..83 => server.expunge(&folder).await,
            83..88 => server.fetch(&folder).await,
            88..92 => server.create(&format!("F{}", chance.below(6))).await,
            99 => server.raise_next_uid(&folder).await,
            92..95 if folder != "INBOX" => {
                server.rename(&folder, &format!("F{}", chance.below(6))).await
            }
            95..97 if folder != "INBOX" => server.delete(&folder).await,
            _ => server.subscribe(&folder).await,
        };
        server.mount.life.log(&format!("op {what} {folder} {other}: {done:?}"));
        if core.failure().is_some() {
            return;
        }
        let pause = match chance.below(20) {
            0 => chance.between(1_000, 400_000),
            1..8 => chance.between(100, 3_000),
            _ => chance.below(100),
        };
        core.time.sleep(Duration::from_millis(pause)).await;
    }
}
