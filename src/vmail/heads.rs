//! Heads that were read to see whether a user exists, for whoever opens it right after that.

use crate::format::head::Head;
use crate::store::ETag;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// How long a head is worth trying.
const FRESH: Duration = Duration::from_secs(5);
/// A look at all users reads all heads, and opens none.
const MOST: usize = 32;

#[derive(Debug)]
struct Read {
    user: Arc<str>,
    at: Duration,
    head: Head,
    tag: ETag,
}

#[derive(Debug, Default)]
pub struct Heads(Mutex<VecDeque<Read>>);

impl Heads {
    /// Keeps a head that was read at `at`, by [`super::env::Clock::boot`].
    pub fn keep(&self, user: &Arc<str>, at: Duration, head: Head, tag: ETag) {
        let mut all = self.0.lock();
        all.retain(|read| read.user != *user && at.saturating_sub(read.at) <= FRESH);
        if all.len() == MOST {
            all.pop_front();
        }
        all.push_back(Read { user: user.clone(), at, head, tag });
    }

    /// A user's head, once, if it was read just before `now`.
    pub fn take(&self, user: &str, now: Duration) -> Option<(Head, ETag)> {
        let mut all = self.0.lock();
        let place = all.iter().position(|read| *read.user == *user)?;
        let read = all.remove(place)?;
        (now.saturating_sub(read.at) <= FRESH).then_some((read.head, read.tag))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::head::HeadFolder;
    use crate::format::listing::Owner;
    use crate::format::{Epoch, ObjectId};

    fn head(user: &str) -> Head {
        Head {
            user: user.to_owned(),
            epoch: Epoch(1),
            write_id: String::new(),
            owner: None,
            watermark: ObjectId::ZERO,
            closed: Vec::new(),
            root_owner: Owner { uid: 0, gid: 0 },
            root_mode: 0o700,
            folders: Vec::<HeadFolder>::new(),
            uidvalidity_ceiling: None,
            uidvalidity_burnt: None,
            known_above: Vec::new(),
            names: Vec::new(),
            dropped: Vec::new(),
            previous: None,
            written: 0,
        }
    }

    #[test]
    fn a_head_serves_once_and_not_for_long() {
        let heads = Heads::default();
        let at = Duration::from_secs;
        let keep = |user: &str, secs| {
            heads.keep(&user.into(), at(secs), head(user), ETag(format!("{user}{secs}")));
        };
        keep("a", 10);
        keep("a", 11);
        keep("b", 11);
        assert_eq!(heads.take("a", at(12)).unwrap().1, ETag("a11".into()));
        assert!(heads.take("a", at(12)).is_none());
        assert!(heads.take("b", at(17)).is_none());
        for n in 0..100 {
            keep(&format!("user{n}"), 20);
        }
        assert!(heads.0.lock().len() <= MOST);
        assert!(heads.take("user99", at(20)).is_some());
    }
}
