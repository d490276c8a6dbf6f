//! What the simulation can find wrong.

use std::collections::BTreeSet;

/// In which way something is as it must not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A mail that was made safe is nowhere.
    MailLost,
    /// A mail has more names than it may have.
    MailDoubled,
    /// A mail that nobody sent, or that was expunged for good.
    MailWrong,
    /// A UID names two mails, or a UIDVALIDITY two folders.
    UidTwice,
    /// The head names what is not in the store.
    HeadTooEarly,
    /// What is there after a death is no state that ever was.
    NoState,
    /// A change is older than it may be and in no flush.
    Late,
    /// Something waits for ever.
    Stuck,
    /// A call was answered as it must not be.
    Answer,
    Other,
}

/// Something that is as it must not be, in words.
#[derive(Debug, Clone)]
pub struct Violation {
    pub kinds: BTreeSet<Kind>,
    pub what: String,
}

impl Violation {
    pub fn new(kind: Kind, what: String) -> Violation {
        Violation { kinds: BTreeSet::from([kind]), what }
    }
}
