//! Slow reads: who waits for a mail for unusually long asks once more.
//!
//! Of many requests to a store a few take many times as long as the others, because they met a busy disk
//! or a lost packet; another one, made then, mostly meets neither. So a read that has no answer after the
//! time within which 99 of the last 100 had theirs is made a second time (reason `hedge` in the counts),
//! and what comes first is taken. The other one is dropped.
//!
//! **What it may cost.** Each read that succeeds earns a part of a second request
//! (`store_limits.hedge` hundredths), and few are saved up: a store that is slow as a whole, or down, gets no
//! more than that on top of what it cannot do anyway.
//!
//! Only mails that pass through memory are read so; a large one is written into its file as it comes,
//! and two of those would meet there.

use super::session::Session;
use crate::store::{Reason, StoreResult};
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::Duration;

/// How many times are remembered, and from how many on they tell what is usual.
const KEPT: usize = 256;
const ENOUGH: usize = 64;
/// A wait that is not worth a second request.
const LEAST: Duration = Duration::from_millis(10);
/// What a second request costs, and what can be saved up.
const COST: u32 = 100;
const SAVED: u32 = 10 * COST;

#[derive(Debug, Default)]
pub(super) struct Hedge(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What the last reads took.
    times: VecDeque<Duration>,
    credit: u32,
}

impl Hedge {
    /// After how long a read is unusual; `None`: not known, or nothing is saved up.
    fn patience(&self) -> Option<Duration> {
        let state = self.0.lock();
        if state.times.len() < ENOUGH || state.credit < COST {
            return None;
        }
        let mut times: Vec<Duration> = state.times.iter().copied().collect();
        drop(state);
        let at = times.len() * 99 / 100;
        let (_, usual, _) = times.select_nth_unstable(at);
        Some((*usual).max(LEAST))
    }

    /// Whether a second request may be made; it is paid for.
    fn pay(&self) -> bool {
        let mut state = self.0.lock();
        let left = state.credit.checked_sub(COST);
        state.credit = left.unwrap_or(state.credit);
        left.is_some()
    }

    fn took(&self, time: Duration, earns: u32) {
        let mut state = self.0.lock();
        if state.times.len() == KEPT {
            state.times.pop_front();
        }
        state.times.push_back(time);
        state.credit = state.credit.saturating_add(earns).min(SAVED);
    }
}

/// All bytes of an object.
pub(super) async fn get(session: &Session, key: &str, size: u64) -> StoreResult<Bytes> {
    let (store, clock) = (&session.env.store, &session.env.clock);
    let begun = clock.boot();
    let answer = async {
        let mut first = store.get(key, None, size, Reason("fetch"));
        let earns = session.settings.hedge > 0;
        let Some(patience) = earns.then(|| session.hedge.patience()).flatten() else {
            return first.await;
        };
        tokio::select! {
            biased;
            answer = &mut first => return answer,
            () = clock.sleep(patience) => {}
        }
        if !session.hedge.pay() {
            return first.await;
        }
        let mut second = store.get(key, None, size, Reason("hedge"));
        // A failure of one of them is no answer yet.
        tokio::select! {
            answer = &mut first => match answer {
                Ok(answer) => Ok(answer),
                Err(error) => second.await.map_err(|_| error),
            },
            answer = &mut second => match answer {
                Ok(answer) => Ok(answer),
                Err(_) => first.await,
            },
        }
    };
    let (_, bytes) = answer.await?;
    session.hedge.took(clock.boot().saturating_sub(begun), session.settings.hedge);
    Ok(bytes)
}
