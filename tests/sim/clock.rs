//! Virtual time: it stands still while anything can run, and jumps to the next timer when
//! nothing can.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Where wall-clock time begins, in seconds since 1970.
pub const START: i64 = 1_700_000_000;

#[derive(Debug, Default)]
struct State {
    /// Nanoseconds since the start.
    now: u64,
    made: u64,
    /// By time, and among equals by the order in which they were made.
    timers: BTreeMap<(u64, u64), Waker>,
}

#[derive(Debug, Clone, Default)]
pub struct Time(Arc<Mutex<State>>);

impl Time {
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.lock().now)
    }

    /// The present moment; no two are the same.
    pub fn tick(&self) -> Duration {
        let mut state = self.0.lock();
        state.now += 1000;
        Duration::from_nanos(state.now)
    }

    pub fn sleep(&self, time: Duration) -> Sleep {
        let mut state = self.0.lock();
        state.made += 1;
        let at = state.now + u64::try_from(time.as_nanos()).unwrap();
        Sleep { time: self.clone(), key: (at, state.made) }
    }

    /// Nothing can run: goes to the next timer. False if there is none.
    pub fn jump(&self) -> bool {
        let next = {
            let mut state = self.0.lock();
            let next = state.timers.pop_first();
            if let Some(((at, _), _)) = &next {
                state.now = state.now.max(*at);
            }
            next
        };
        next.map(|(_, waker)| waker.wake()).is_some()
    }
}

#[derive(Debug)]
pub struct Sleep {
    time: Time,
    key: (u64, u64),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.time.0.lock();
        if state.now >= self.key.0 {
            state.timers.remove(&self.key);
            return Poll::Ready(());
        }
        state.timers.insert(self.key, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.time.0.lock().timers.remove(&self.key);
    }
}
