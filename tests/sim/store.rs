//! The store as one life of a machine reaches it: slow, and failing as the weather has it.
//! What it holds is always consistent; only answers get lost, and requests arrive late.

use super::world::{Life, Moment};
use async_trait::async_trait;
use bytes::Bytes;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use vmailfs::store::{
    Body, ETag, ObjectMeta, ObjectStore, PutMode, Reason, StoreError, StoreResult,
};

/// How the store behaves for now. Percentages of requests.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Nothing arrives at all.
    pub down: bool,
    /// Fail before they do anything.
    pub fails: u64,
    /// Are carried out, and the answer is lost.
    pub lost: u64,
    /// Are given up by the client, and arrive all the same (writes), up to minutes later.
    pub late: u64,
    /// Take seconds.
    pub slow: u64,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    Fails,
    Lost,
    /// Arrives after this many milliseconds, long after the client was told of a failure.
    Late(u64),
}

#[derive(Debug)]
pub struct SimStore {
    life: Arc<Life>,
}

fn failed() -> StoreError {
    StoreError::Unavailable { detail: "simulated".into() }
}

impl SimStore {
    pub fn new(life: Arc<Life>) -> SimStore {
        SimStore { life }
    }

    fn fate(&self, write: bool) -> Fate {
        let weather = *self.life.core.weather.lock();
        let roll = self.life.chance.below(100);
        let cut_off = self.life.cut_off.load(std::sync::atomic::Ordering::SeqCst);
        if weather.down || cut_off || roll < weather.fails {
            Fate::Fails
        } else if roll < weather.fails + weather.lost {
            Fate::Lost
        } else if write && roll < weather.fails + weather.lost + weather.late {
            Fate::Late(self.life.chance.between(100, 400_000))
        } else {
            Fate::Done
        }
    }

    fn latency(&self) -> Duration {
        let slow = self.life.core.weather.lock().slow;
        let chance = &self.life.chance;
        let most = if chance.percent(slow) { 8_000 } else { 30 };
        Duration::from_micros(chance.between(500, 500 + most * 1000))
    }

    async fn request<T, F>(
        &self,
        what: String,
        now: impl Future<Output = StoreResult<T>>,
        later: Option<F>,
    ) -> StoreResult<T>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.request_within(u64::MAX, what, now, later).await
    }

    /// Carries a request out, or not. `later`: the same request, to be carried out by the store
    /// whatever becomes of the client, after so many milliseconds at most; `None` for one that only
    /// reads.
    async fn request_within<T, F>(
        &self,
        longest: u64,
        what: String,
        now: impl Future<Output = StoreResult<T>>,
        later: Option<F>,
    ) -> StoreResult<T>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let life = &self.life;
        life.check().await;
        life.log(&format!("store {what}"));
        let moment = life.store_moment();
        if moment == Some(Moment::Before) {
            life.die(&format!("before {what}"));
            return life.nothing().await;
        }
        let fate = self.fate(later.is_some());
        if fate != Fate::Done {
            life.log(&format!("store {fate:?}: {what}"));
        }
        let arrive = |after: u64, later: Option<F>| {
            let core = life.core.clone();
            core.arrives_late(&what);
            if let Some(later) = later {
                let what = what.clone();
                tokio::spawn(async move {
                    core.time.sleep(Duration::from_millis(after.min(longest))).await;
                    core.log(&format!("store: late {what}"));
                    later.await;
                });
            }
        };
        if moment == Some(Moment::Middle) {
            // It is under way when its sender dies.
            if fate != Fate::Fails && life.chance.percent(60) {
                arrive(life.chance.between(0, 200_000), later);
            }
            life.die(&format!("during {what}"));
            return life.nothing().await;
        }
        life.core.time.sleep(self.latency()).await;
        let answer = match fate {
            Fate::Done | Fate::Lost => {
                // A request that is on its way arrives, whether its sender lives or not.
                let answer = now.await;
                life.log(&format!("store done {what} {}", answer.is_ok()));
                Some(answer)
            }
            Fate::Late(after) => {
                arrive(after, later);
                None
            }
            Fate::Fails => None,
        };
        if moment == Some(Moment::After) {
            life.die(&format!("after {what}"));
        }
        life.check().await;
        match (fate, answer) {
            (Fate::Done, Some(answer)) => answer,
            _ => {
                // Sometimes the failure is silence, until the client has waited long enough.
                if life.chance.percent(30) {
                    life.core.time.sleep(Duration::from_secs(life.chance.between(1, 15))).await;
                    life.check().await;
                }
                Err(failed())
            }
        }
    }

    async fn read<T>(
        &self,
        what: String,
        now: impl Future<Output = StoreResult<T>>,
    ) -> StoreResult<T> {
        self.request(what, now, None::<std::future::Ready<()>>).await
    }
}

#[async_trait]
impl ObjectStore for SimStore {
    fn describe(&self) -> String {
        "sim:".to_owned()
    }

    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        let now = self.life.core.mem.get(key, range.clone(), limit, why);
        self.read(format!("get {key} {range:?} ({why})"), now).await
    }

    async fn download(
        &self,
        key: &str,
        file: &std::fs::File,
        why: Reason,
    ) -> StoreResult<ObjectMeta> {
        let now = self.life.core.mem.download(key, file, why);
        self.read(format!("download {key} ({why})"), now).await
    }

    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        why: Reason,
    ) -> StoreResult<ETag> {
        let Body::Bytes(bytes) = &body else { panic!("a simulated disk has no paths") };
        let what = format!("put {key} {:08x} ({why})", crc32c::crc32c(bytes));
        let core = self.life.core.clone();
        self.life.core.put_called(&self.life, key);
        let (owned, metadata) = (key.to_owned(), metadata.to_vec());
        let opens = why.0 == "open" && key.ends_with("/head");
        let arrived = {
            let (core, key, name) = (core.clone(), owned.clone(), self.life.name().to_owned());
            move || {
                core.put_done(&key);
                if opens {
                    core.taken_by(&name);
                }
            }
        };
        let late_arrived = arrived.clone();
        let later = {
            let (core, key, mode) = (core.clone(), owned.clone(), mode.clone());
            let (body, metadata) = (body.clone(), metadata.clone());
            async move {
                if core.mem.put(&key, body, mode, &metadata, why).await.is_ok() {
                    late_arrived();
                }
            }
        };
        let now = async {
            let done = core.mem.put(&owned, body.clone(), mode, &metadata, why).await;
            if done.is_ok() {
                arrived();
            }
            done
        };
        self.request(what, now, Some(later)).await
    }

    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        self.read(format!("head {key} ({why})"), self.life.core.mem.head(key, why)).await
    }

    async fn list(
        &self,
        dir: &str,
        start_after: Option<&str>,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let now = self.life.core.mem.list(dir, start_after, why);
        self.read(format!("list {dir} {start_after:?} ({why})"), now).await
    }

    async fn list_some(
        &self,
        dir: &str,
        start_after: Option<&str>,
        most: usize,
        why: Reason,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let now = self.life.core.mem.list_some(dir, start_after, most, why);
        self.read(format!("list {dir} {start_after:?} ({why})"), now).await
    }

    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        self.read(format!("dirs {dir} ({why})"), self.life.core.mem.list_dirs(dir, why)).await
    }

    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        let what = format!("delete {} ({why})", keys.join(" "));
        // See `vmail::gc` on what is assumed of it.
        let longest = self.life.core.longest_delete.load(std::sync::atomic::Ordering::SeqCst);
        let (core, keys) = (self.life.core.clone(), keys.to_vec());
        let later = {
            let (core, keys) = (core.clone(), keys.clone());
            async move { core.mem.delete(&keys, why).await.unwrap_or_default() }
        };
        self.request_within(longest, what, core.mem.delete(&keys, why), Some(later)).await
    }
}
