//! Random work with deaths and losses against a model (I1, I3, I6). A failure names its seed.

use super::world::*;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::{flush, gc};

/// Names and what they hold: mails in `cur` and `new`, other files in the folders.
type State = BTreeMap<String, Vec<u8>>;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % sides
    }
}

struct Run {
    world: World,
    client: Client,
    dice: Dice,
    now: State,
    /// As the last head in the store has it.
    flushed: State,
    folders: Vec<String>,
    /// Bodies published since then.
    since: BTreeSet<Vec<u8>>,
    on: On,
    made: usize,
}

fn is_mail(path: &str) -> bool {
    path.contains("/cur/") || path.contains("/new/")
}

impl Run {
    async fn new(seed: u64) -> Run {
        let world = World::new();
        let client = world.session(HERE);
        let mut run = Run {
            world,
            client,
            dice: Dice(seed),
            now: State::new(),
            flushed: State::new(),
            folders: Vec::new(),
            since: BTreeSet::new(),
            on: HERE,
            made: 0,
        };
        for folder in ["u", "u/.A", "u/.A.B"] {
            run.client.maildir(&[folder]).await;
            run.folders.push(folder.into());
        }
        run.flush().await;
        run
    }

    fn name(&mut self) -> String {
        self.made += 1;
        format!("{}.M{}P1.host", 1_700_000_000 + self.made, self.made)
    }

    fn pick(&mut self, which: impl Fn(&str) -> bool) -> Option<String> {
        let all: Vec<&String> = self.now.keys().filter(|p| which(p)).collect();
        if all.is_empty() { None } else { Some(all[self.dice.roll(all.len())].clone()) }
    }

    fn folder(&mut self) -> String {
        self.folders[self.dice.roll(self.folders.len())].clone()
    }

    async fn step(&mut self) {
        let what = self.dice.roll(100);
        eprintln!("  {what}");
        match what {
            0..25 => {
                let (folder, name) = (self.folder(), self.name());
                let body =
                    format!("mail {}\n", self.made).repeat(1 + self.dice.roll(40)).into_bytes();
                let bundle = self.world.head("u").previous.map(|p| p.bundle);
                match self.dice.roll(3) {
                    0 => {
                        // Postfix: link and unlink.
                        let tmp = format!("{folder}/tmp/{name}");
                        let file = self.client.create(&tmp).await.unwrap();
                        self.client.write(file, 0, &body).await.unwrap();
                        self.client.fsync(file).await.unwrap();
                        self.client.close_file(file).await.unwrap();
                        self.client.link(&tmp, &format!("{folder}/new/{name}")).await.unwrap();
                        self.client.unlink(&tmp).await.unwrap();
                    }
                    _ => self.client.deliver(&folder, &name, &body).await.unwrap(),
                }
                if self.world.head("u").previous.map(|p| p.bundle) != bundle {
                    // The folder was not in the store yet, and went there before its first mail.
                    self.is_flushed();
                }
                self.since.insert(body.clone());
                self.now.insert(format!("{folder}/new/{name}"), body);
            }
            25..40 => {
                let Some(from) = self.pick(is_mail) else { return };
                let (folder, name) = (self.folder(), self.name());
                let to = format!("{folder}/cur/{name}:2,S");
                if self.dice.roll(2) == 0 {
                    // Dovecot's COPY: a link in tmp/, then a rename.
                    let tmp = format!("{folder}/tmp/{name}");
                    self.client.link(&from, &tmp).await.unwrap();
                    self.client.rename(&tmp, &to).await.unwrap();
                } else {
                    self.client.link(&from, &to).await.unwrap();
                }
                self.now.insert(to, self.now[&from].clone());
            }
            40..52 => {
                let Some(from) = self.pick(is_mail) else { return };
                let folder = match self.dice.roll(2) {
                    0 => self.folder(),
                    _ => from.rsplitn(3, '/').nth(2).unwrap().to_string(),
                };
                let to = format!("{folder}/cur/{}:2,R", self.name());
                self.client.rename(&from, &to).await.unwrap();
                let body = self.now.remove(&from).unwrap();
                self.now.insert(to, body);
            }
            52..60 => {
                let Some(path) = self.pick(is_mail) else { return };
                self.client.unlink(&path).await.unwrap();
                self.now.remove(&path);
            }
            60..75 => {
                let path = format!("{}/file{}", self.folder(), self.dice.roll(3));
                let text = vec![b'a' + self.dice.roll(26) as u8; 1 + self.dice.roll(90_000)];
                let old = self.now.get(&path).cloned();
                let new = match (self.dice.roll(4), old) {
                    (0, Some(old)) => {
                        self.client.append(&path, &text).await.unwrap();
                        [old, text].concat()
                    }
                    (1, Some(mut old)) => {
                        let at = self.dice.roll(old.len());
                        let file = self.client.open(&path, WRITE).await.unwrap();
                        self.client.write(file, at as u64, b"inside").await.unwrap();
                        self.client.close_file(file).await.unwrap();
                        old.resize(old.len().max(at + 6), 0);
                        old[at..at + 6].copy_from_slice(b"inside");
                        old
                    }
                    (2, Some(mut old)) => {
                        let len = self.dice.roll(old.len());
                        let file = self.client.open(&path, WRITE).await.unwrap();
                        self.client.truncate(file, len as u64).await.unwrap();
                        self.client.close_file(file).await.unwrap();
                        old.truncate(len);
                        if len == 0 { vec![] } else { old }
                    }
                    _ => {
                        self.client.replace(&path, &text).await.unwrap();
                        text
                    }
                };
                if new.is_empty() {
                    self.client.unlink(&path).await.unwrap();
                    self.now.remove(&path);
                } else {
                    self.now.insert(path, new);
                }
            }
            75..78 => {
                let Some(path) = self.pick(|p| !is_mail(p)) else { return };
                let to = format!("{}/file{}", self.folder(), self.dice.roll(3));
                self.client.rename(&path, &to).await.unwrap();
                let body = self.now.remove(&path).unwrap();
                self.now.insert(to, body);
            }
            78..80 => {
                let folder = format!("u/.F{}", self.made);
                self.made += 1;
                self.client.maildir(&[&folder]).await;
                self.folders.push(folder);
            }
            80..82 => {
                // A folder is renamed, with all in it.
                let i = self.dice.roll(self.folders.len());
                if self.folders[i] == "u" {
                    return;
                }
                let to = format!("u/.R{}", self.made);
                self.made += 1;
                self.client.rename(&self.folders[i], &to).await.unwrap();
                let prefix = format!("{}/", self.folders[i]);
                let moved = |p: &str| p.strip_prefix(&prefix).map(|rest| format!("{to}/{rest}"));
                let all = std::mem::take(&mut self.now);
                self.now = all.into_iter().map(|(p, b)| (moved(&p).unwrap_or(p), b)).collect();
                self.folders[i] = to;
            }
            82..89 => self.flush().await,
            89 => self.gc().await,
            90..92 => self.failing_flush().await,
            92..95 => self.die().await,
            95 => self.reboot().await,
            96..98 => self.hand_over().await,
            _ => self.lose().await,
        }
    }

    async fn flush(&mut self) {
        if self.dice.roll(3) == 0 {
            self.client.flush_all("u").await;
        } else {
            self.client.flush("u").await;
        }
        self.is_flushed();
    }

    fn is_flushed(&mut self) {
        self.flushed = self.now.clone();
        self.since.clear();
    }

    /// A flush of which one request fails, before or after it was carried out.
    async fn failing_flush(&mut self) {
        let (nth, after) = (self.dice.roll(2), self.dice.roll(2) == 0);
        let puts = std::sync::atomic::AtomicUsize::new(0);
        self.world.faults(move |r| {
            let this =
                r.op == Op::Put && puts.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == nth;
            match (this, after) {
                (true, true) => Fault::After(down()),
                (true, false) => Fault::Before(down()),
                _ => Fault::None,
            }
        });
        let cell = self.client.cell("u");
        let done = flush::flush(&cell, flush::Options::default()).await;
        self.world.no_faults();
        if done.is_ok() {
            self.is_flushed();
        }
    }

    /// Deletes what is due, sometimes long after the last flush, and looks at everything that is in
    /// the store: each mail object up to the watermark is named or dropped.
    async fn gc(&mut self) {
        if self.dice.roll(2) == 0 {
            self.world.clock.advance(Duration::from_secs(8 * 24 * 3600));
        }
        let options = gc::Options { scan: true, ..gc::Options::default() };
        self.client.list("u").await.unwrap();
        let report = gc::collect(&self.client.cell("u"), options).await.unwrap();
        assert!(report.adopted.is_empty() && report.late.is_empty(), "{report:?}");
        self.check("after a gc").await;
    }

    async fn die(&mut self) {
        self.client = self.world.session(self.on);
        self.check("after a death").await;
    }

    /// A power cut after which all that was written is on the disk.
    async fn reboot(&mut self) {
        self.made += 1;
        self.on.boot = Box::leak(format!("boot{}", self.made).into_boxed_str());
        self.client = self.world.session(self.on);
        self.check("after a reboot").await;
    }

    async fn hand_over(&mut self) {
        let next = self.world.session(self.on);
        std::mem::replace(&mut self.client, next).close().await;
        self.is_flushed();
        if self.dice.roll(2) == 0 {
            self.move_on();
        }
        self.check("after a hand-over").await;
    }

    fn move_on(&mut self) {
        self.made += 1;
        self.on.machine = Box::leak(format!("m{}", self.made).into_boxed_str());
        self.client = self.world.session(self.on);
    }

    async fn lose(&mut self) {
        self.move_on();
        let found = self.look().await;
        for (path, body) in &self.flushed {
            assert_eq!(found.get(path), Some(body), "{path} of the last flush");
        }
        let mut extra = BTreeMap::new();
        for (path, body) in &found {
            if !self.flushed.contains_key(path) {
                assert!(is_mail(path), "{path} out of nowhere");
                assert!(self.since.contains(body), "{path} is nothing new");
                let twice = extra.insert(body.clone(), path.clone());
                assert!(twice.is_none(), "{path} twice: {twice:?}");
            }
        }
        for (path, body) in &self.now {
            let safe = !self.since.contains(body) || extra.contains_key(body);
            assert!(!is_mail(path) || safe, "{path} is lost");
        }
        // Folders that were not flushed are gone, or were made anew for their mails.
        let all = self.client.list("u").await.unwrap();
        self.folders =
            all.iter().filter(|n| n.starts_with('.')).map(|n| format!("u/{n}")).collect();
        self.folders.push("u".into());
        for folder in self.folders.clone() {
            for sub in ["cur", "new", "tmp"] {
                match self.client.mkdir(&format!("{folder}/{sub}")).await {
                    Ok(()) | Err(libc::EEXIST) => {}
                    other => panic!("{folder}/{sub}: {other:?}"),
                }
            }
        }
        self.now = found;
        self.check("after a loss").await;
    }

    /// All there is.
    async fn look(&self) -> State {
        let mut found = State::new();
        let mut dirs = vec!["u".to_string()];
        while let Some(dir) = dirs.pop() {
            for name in self.client.list(&dir).await.unwrap() {
                let path = format!("{dir}/{name}");
                let attr = self.client.stat(&path).await.unwrap();
                if attr.kind == vmailfs::fs::api::FileKind::Directory {
                    dirs.push(path);
                } else {
                    let body = self.client.read(&path).await.unwrap();
                    assert_eq!(attr.size, body.len() as u64, "{path}");
                    found.insert(path, body);
                }
            }
        }
        found
    }

    async fn check(&mut self, when: &str) {
        let found = self.look().await;
        let names = |s: &State| s.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&self.now), "{when}");
        for (path, body) in &found {
            assert!(*body == self.now[path], "{when}: {path} differs");
        }
        let mut count: BTreeMap<&[u8], u32> = BTreeMap::new();
        for (_, body) in self.now.iter().filter(|(p, _)| is_mail(p)) {
            *count.entry(body).or_default() += 1;
        }
        for (path, body) in self.now.iter().filter(|(p, _)| is_mail(p)) {
            let nlink = self.client.stat(path).await.unwrap().nlink;
            assert_eq!(nlink, count[body.as_slice()], "{when}: links of {path}");
        }
    }
}

#[tokio::test]
async fn i1_i3_random_work_survives_deaths_and_losses() {
    let only = std::env::var("HEART_SEED").ok().and_then(|s| s.parse::<u64>().ok());
    let steps = std::env::var("HEART_STEPS").ok().and_then(|s| s.parse().ok()).unwrap_or(120);
    for seed in only.map_or(0..5, |seed| seed..seed + 1) {
        let mut run = Run::new(seed * 7919 + 1).await;
        for step in 0..steps {
            // Shown when an assertion fails.
            eprintln!("seed {seed} step {step}");
            run.step().await;
        }
        run.check("at the end").await;
    }
}
