//! Whether the store answers: outages as its users meet them.
//!
//! An outage begins when a request fails and nothing was answered since it was sent; it ends with
//! the next answer. So one request that fails while others succeed is an error and no outage.

use super::StoreError;
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// What is known at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HealthNow {
    /// For how long nothing has been answered, while there is an outage.
    pub down_for: Option<Duration>,
    /// Outages so far, with the present one.
    pub outages: u64,
    /// How long all of them took together.
    pub down: Duration,
}

#[derive(Debug, Default)]
struct State {
    answered: Option<Instant>,
    down_since: Option<Instant>,
    outages: u64,
    down: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Health(Mutex<State>);

/// Whether an error says that the store does not do its work. The others are answers.
fn is_failure(error: &StoreError) -> bool {
    match error {
        StoreError::Unavailable { .. }
        | StoreError::Denied { .. }
        | StoreError::NoSuchStore { .. }
        | StoreError::Full { .. } => true,
        StoreError::NotFound { .. }
        | StoreError::Precondition { .. }
        | StoreError::Unsupported { .. }
        | StoreError::BadBody { .. } => false,
    }
}

impl Health {
    /// A request sent at `sent` ended at `now`.
    pub(super) fn ended(&self, sent: Instant, now: Instant, error: Option<&StoreError>) {
        let mut state = self.0.lock();
        match error.filter(|e| is_failure(e)) {
            None => {
                state.answered = Some(now);
                if let Some(since) = state.down_since.take() {
                    let took = now.saturating_duration_since(since);
                    state.down += took;
                    drop(state);
                    tracing::info!(seconds = took.as_secs(), "the store answers again");
                }
            }
            Some(error) => {
                let answered = state.answered.is_some_and(|at| at > sent);
                if state.down_since.is_none() && !answered {
                    state.down_since = Some(sent);
                    state.outages += 1;
                    let ever = state.answered.is_some();
                    drop(state);
                    // Whoever asks it for the first time says what became of that.
                    if ever {
                        tracing::warn!(%error, "the store does not answer");
                    }
                }
            }
        }
    }

    pub(super) fn now(&self, now: Instant) -> HealthNow {
        let state = self.0.lock();
        let down_for = state.down_since.map(|since| now.saturating_duration_since(since));
        let down = state.down + down_for.unwrap_or_default();
        HealthNow { down_for, outages: state.outages, down }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn down() -> StoreError {
        StoreError::Unavailable { detail: String::new() }
    }

    #[test]
    fn an_outage_lasts_from_the_first_unanswered_request_to_the_next_answer() {
        let health = Health::default();
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        health.ended(at(0), at(1), None);
        assert_eq!(health.now(at(5)), HealthNow::default());
        // Something was answered while it waited: an error, no outage.
        health.ended(at(0), at(6), Some(&down()));
        assert_eq!(health.now(at(6)).outages, 0);
        health.ended(at(7), at(10), Some(&down()));
        health.ended(at(8), at(11), Some(&down()));
        let now = health.now(at(12));
        assert_eq!(now.down_for, Some(Duration::from_secs(5)));
        assert_eq!((now.outages, now.down), (1, Duration::from_secs(5)));
        // "No such object" is an answer.
        let absent = StoreError::NotFound { key: String::new() };
        health.ended(at(12), at(17), Some(&absent));
        let now = health.now(at(99));
        assert_eq!((now.down_for, now.outages, now.down), (None, 1, Duration::from_secs(10)));
        health.ended(at(99), at(100), Some(&down()));
        assert_eq!(health.now(at(101)).outages, 2);
    }
}
