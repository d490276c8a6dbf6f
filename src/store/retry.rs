//! Retries of requests to a store over the network: which may pass, how long to wait, when to
//! give up.
//!
//! Two clocks bound a request. An attempt that moves no byte for `attempt_timeout` has failed.
//! All attempts together have `deadline`, which the bytes moved prolong (one second for each
//! 256 KiB), so that a large body on a slow line gets through and a trickle does not hold its
//! caller for ever. Cancelling the future cancels the attempt; whether the store carried it out
//! is then unknown, as after any lost answer.

use super::{RetryPolicy, StoreError, StoreResult};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// The slowest transfer that still counts as one, in bytes per second.
const SLOWEST: u64 = 256 << 10;
/// No pause is longer, whatever the doubling or the store's `Retry-After` says.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Bytes moved by a request, in either direction, by all of its attempts.
#[derive(Debug, Clone)]
pub struct Progress {
    moved: Arc<AtomicU64>,
    /// Milliseconds from `start` to the last sign of life.
    last: Arc<AtomicU64>,
    start: Instant,
}

impl Progress {
    fn new() -> Progress {
        Progress { moved: Arc::default(), last: Arc::default(), start: Instant::now() }
    }

    /// Notes `bytes` more, or with 0 only that something was heard.
    pub fn add(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
        let now = self.start.elapsed().as_millis();
        self.last.store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn stalled_at(&self, policy: &RetryPolicy) -> Instant {
        self.start
            + Duration::from_millis(self.last.load(Ordering::Relaxed))
            + policy.attempt_timeout
    }

    fn deadline(&self, policy: &RetryPolicy) -> Instant {
        let extra = self.moved.load(Ordering::Relaxed) / SLOWEST;
        self.start + policy.deadline + Duration::from_secs(extra)
    }
}

/// Why an attempt failed, and whether another one makes sense.
#[derive(Debug)]
pub struct Failure {
    pub error: StoreError,
    pub again: Again,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// The same request would fail in the same way.
    No,
    Yes,
    /// The store said how long to wait at least.
    After(Duration),
}

impl Failure {
    pub fn last(error: StoreError) -> Failure {
        Failure { error, again: Again::No }
    }

    pub fn passing(error: StoreError) -> Failure {
        Failure { error, again: Again::Yes }
    }
}

/// Runs `attempt` until it succeeds, fails for good, or the policy says enough. `what` names
/// the request in the log and in the error of a timeout.
pub async fn retry<T, F, Fut>(policy: &RetryPolicy, what: &str, mut attempt: F) -> StoreResult<T>
where
    F: FnMut(Progress) -> Fut,
    Fut: Future<Output = Result<T, Failure>>,
{
    let progress = Progress::new();
    let mut pause = policy.first_pause;
    let mut nth = 1;
    loop {
        progress.add(0);
        let failure = match watched(policy, what, &progress, attempt(progress.clone())).await {
            Ok(done) => return Ok(done),
            Err(failure) => failure,
        };
        // Half of the pause is by chance: clients that failed together must not return together.
        let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
        let wait = match failure.again {
            Again::No => return Err(failure.error),
            Again::Yes => jittered,
            Again::After(told) => told.max(jittered),
        }
        .min(LONGEST_PAUSE);
        if nth >= policy.attempts || Instant::now() + wait >= progress.deadline(policy) {
            return Err(failure.error);
        }
        tracing::debug!(what, attempt = nth, wait_ms = wait.as_millis() as u64, error = %failure.error, "request failed, trying again");
        tokio::time::sleep(wait).await;
        pause = pause.saturating_mul(2);
        nth += 1;
    }
}

/// One attempt under both clocks.
async fn watched<T>(
    policy: &RetryPolicy,
    what: &str,
    progress: &Progress,
    attempt: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut attempt = std::pin::pin!(attempt);
    loop {
        let deadline = progress.deadline(policy);
        let stalled = progress.stalled_at(policy);
        tokio::select! {
            biased;
            outcome = &mut attempt => return outcome,
            () = tokio::time::sleep_until(deadline.min(stalled)) => {}
        }
        let now = Instant::now();
        let unavailable = |detail| StoreError::Unavailable { detail };
        if now >= progress.deadline(policy) {
            let detail = format!("{what}: not done within {} s", policy.deadline.as_secs_f32());
            return Err(Failure::last(unavailable(detail)));
        }
        if now >= progress.stalled_at(policy) {
            let silent = policy.attempt_timeout.as_secs_f32();
            let detail = format!("{what}: nothing heard for {silent} s");
            return Err(Failure::passing(unavailable(detail)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            attempt_timeout: Duration::from_millis(40),
            deadline: Duration::from_millis(400),
            first_pause: Duration::from_millis(1),
            attempts: 4,
        }
    }

    fn unavailable() -> StoreError {
        StoreError::Unavailable { detail: "x".into() }
    }

    #[tokio::test]
    async fn tries_again_while_it_may_pass() {
        let n = AtomicU32::new(0);
        let done = retry(&policy(), "t", |_| async {
            match n.fetch_add(1, Ordering::Relaxed) {
                0 | 1 => Err(Failure::passing(unavailable())),
                2 => Err(Failure {
                    error: unavailable(),
                    again: Again::After(Duration::from_millis(5)),
                }),
                n => Ok(n),
            }
        })
        .await;
        assert_eq!(done.unwrap(), 3);
    }

    #[tokio::test]
    async fn gives_up_after_the_attempts_and_at_once_on_final_errors() {
        let n = AtomicU32::new(0);
        let end = retry::<(), _, _>(&policy(), "t", |_| async {
            n.fetch_add(1, Ordering::Relaxed);
            Err(Failure::last(unavailable()))
        })
        .await;
        assert!(end.is_err());
        assert_eq!(n.swap(0, Ordering::Relaxed), 1);
        let end = retry::<(), _, _>(&policy(), "t", |_| async {
            n.fetch_add(1, Ordering::Relaxed);
            Err(Failure::passing(unavailable()))
        })
        .await;
        assert!(end.is_err());
        assert_eq!(n.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn a_silent_attempt_ends_and_a_moving_one_goes_on() {
        let n = AtomicU32::new(0);
        let end = retry::<(), _, _>(&policy(), "t", |_| async {
            n.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<()>().await;
            Ok(())
        })
        .await;
        assert!(matches!(end, Err(StoreError::Unavailable { .. })));
        assert_eq!(n.load(Ordering::Relaxed), 4);
        // Moves for longer than an attempt may be silent; never so long at a time, on a busy
        // machine either.
        let attempt_timeout = Duration::from_millis(500);
        let patient =
            RetryPolicy { attempt_timeout, deadline: Duration::from_secs(60), ..policy() };
        let done = retry(&patient, "t", |progress| async move {
            for _ in 0..30 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                progress.add(1);
            }
            Ok(7)
        })
        .await;
        assert_eq!(done.unwrap(), 7);
    }

    #[tokio::test]
    async fn the_deadline_ends_a_trickle_and_bytes_prolong_it() {
        let slow = |bytes: u64| async move {
            let attempt_timeout = Duration::from_millis(500);
            retry(&RetryPolicy { attempt_timeout, ..policy() }, "t", move |progress| async move {
                for _ in 0..60 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    progress.add(bytes);
                }
                Ok(())
            })
            .await
        };
        assert!(slow(1).await.is_err());
        assert!(slow(SLOWEST).await.is_ok());
    }
}
