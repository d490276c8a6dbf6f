//! Deliberate mistakes at the places where a mistake would lose mail.
//!
//! A test that never fails proves little. Built with the feature `sabotage` (never for use), the
//! simulation chooses one of these and must notice it; without the feature nothing of them is
//! compiled in.

use crate::format::ObjectId;
#[cfg(not(feature = "sabotage"))]
use crate::store::StoreError;
use crate::store::{ETag, StoreResult};
#[cfg(not(feature = "sabotage"))]
use std::future::Future;

/// A mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A mail is called safe while its PUT is under way.
    AckBeforePut,
    /// The head is swapped before the bundle that it names is up.
    HeadBeforeBundle,
    /// The watermark passes an id whose PUT was not answered.
    WatermarkAbovePut,
    /// A flush carries one folder of a MOVE and not the other.
    HalfMove,
    /// A takeover lists the mails first and swaps the head then.
    ListBeforeSwap,
    /// A UID ceiling stays where it was.
    CeilingNotRaised,
    /// A gc deletes what is in the store and not in the head.
    GcByDifference,
}

impl Bug {
    pub const ALL: [Bug; 7] = [
        Bug::AckBeforePut,
        Bug::HeadBeforeBundle,
        Bug::WatermarkAbovePut,
        Bug::HalfMove,
        Bug::ListBeforeSwap,
        Bug::CeilingNotRaised,
        Bug::GcByDifference,
    ];
}

/// Whether the mistake is to be made.
#[cfg(not(feature = "sabotage"))]
pub const fn is(_bug: Bug) -> bool {
    false
}

/// The answer to a request that nobody waits for.
#[cfg(not(feature = "sabotage"))]
pub fn unasked(_request: impl Future<Output = StoreResult<ETag>>) -> StoreResult<ETag> {
    Err(StoreError::Unsupported { detail: "not built to make mistakes".into() })
}

/// What a listing found that came too early.
#[cfg(not(feature = "sabotage"))]
pub fn listed(_ids: Vec<ObjectId>) {}

/// Whether that listing had an object.
#[cfg(not(feature = "sabotage"))]
pub const fn was_listed(_id: ObjectId) -> bool {
    true
}

#[cfg(feature = "sabotage")]
pub use chosen::{choose, is, listed, unasked, was_listed};

#[cfg(feature = "sabotage")]
mod chosen {
    use super::{Bug, ETag, ObjectId, StoreResult};
    use parking_lot::Mutex;
    use std::future::Future;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// One more than the mistake's number; 0: none.
    static CHOSEN: AtomicUsize = AtomicUsize::new(0);

    static LISTED: Mutex<Vec<ObjectId>> = Mutex::new(Vec::new());

    pub fn listed(ids: Vec<ObjectId>) {
        *LISTED.lock() = ids;
    }

    pub fn was_listed(id: ObjectId) -> bool {
        LISTED.lock().contains(&id)
    }

    pub fn choose(bug: Option<Bug>) {
        CHOSEN.store(bug.map_or(0, |bug| bug as usize + 1), Ordering::SeqCst);
    }

    pub fn unasked(
        request: impl Future<Output = StoreResult<ETag>> + Send + 'static,
    ) -> StoreResult<ETag> {
        let _nobody_waits = tokio::spawn(request);
        Ok(ETag(String::new()))
    }

    pub fn is(bug: Bug) -> bool {
        CHOSEN.load(Ordering::SeqCst) == bug as usize + 1
    }
}
