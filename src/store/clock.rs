//! The store's own clock, as its answers tell it.
//!
//! Retention is counted by it (I6): the clocks of the machines that share a store may differ, or
//! be set, between the moment when something is dropped and the one when it is deleted. Each
//! answer of an S3 server carries the date; from then on the machine's steady clock counts.

use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::BeforeDeserializationInterceptorContextRef;
use aws_smithy_types::DateTime;
use aws_smithy_types::date_time::Format;
use parking_lot::Mutex;
use std::sync::Arc;

/// What the last answer said, and when it came (seconds of the boot clock).
#[derive(Debug, Clone, Default)]
pub(super) struct StoreClock(Arc<Mutex<Option<(i64, i64)>>>);

impl StoreClock {
    /// Seconds since 1970; `None` before the first answer.
    pub(super) fn now(&self) -> Option<i64> {
        let (date, at) = (*self.0.lock())?;
        Some(date.saturating_add(boot().saturating_sub(at)))
    }

    fn heard(&self, date: i64) {
        *self.0.lock() = Some((date, boot()));
    }
}

/// Seconds since the machine was started, suspended time included.
fn boot() -> i64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid timespec; with a clock that exists the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut t) };
    t.tv_sec
}

impl Intercept for StoreClock {
    fn name(&self) -> &'static str {
        "StoreClock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        if let Some(Ok(date)) = date.map(|text| DateTime::from_str(text, Format::HttpDate)) {
            self.heard(date.secs());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_on_from_what_was_heard() {
        let clock = StoreClock::default();
        assert_eq!(clock.now(), None);
        clock.heard(1_700_000_000);
        assert!((1_700_000_000..1_700_000_060).contains(&clock.now().unwrap()));
        clock.heard(1_600_000_000);
        assert!(clock.now().unwrap() < 1_600_000_060);
    }
}
