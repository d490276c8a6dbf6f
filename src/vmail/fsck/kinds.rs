//! What a check finds, and how it is told.

use crate::format::escape::escape;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The head is gone, cannot be read, or contradicts itself.
    Head,
    /// What the head names in a bundle is gone, short, damaged or incomplete.
    Part,
    /// A listing names an object that the store does not have.
    Lost,
    /// An object has another size than the listing says.
    Size,
    /// An object's bytes are not those that were published (only looked for when mails are read).
    Content,
    /// An object is named and on the dropped list: it may be deleted.
    Dropped,
    /// A mail that no head ever named and that nobody will look for by itself: it arrived in the
    /// store after its session was over.
    Late,
    /// The table of objects with several names is wrong.
    Links,
    /// Earlier states cannot be read, though nothing has deleted them.
    History,
    /// An object whose key is not one of ours.
    Stray,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Head => "head",
            Kind::Part => "part",
            Kind::Lost => "lost",
            Kind::Size => "size",
            Kind::Content => "content",
            Kind::Dropped => "dropped",
            Kind::Late => "late",
            Kind::Links => "links",
            Kind::History => "history",
            Kind::Stray => "stray",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    pub kind: Kind,
    pub user: String,
    /// Path of the folder below the user's root, escaped as in listings; `.` is the root.
    pub folder: Option<String>,
    /// The name in the folder, with `cur/` and the like in front.
    pub name: Option<String>,
    /// The object's key.
    pub object: Option<String>,
    /// For people.
    pub detail: String,
}

/// `kind user folder name object detail`, separated by tabs, `-` for what there is not. None of
/// the fields but the last has a space or a tab in it.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        let user = escape(self.user.as_bytes());
        let (folder, name, object) = (or(&self.folder), or(&self.name), or(&self.object));
        let detail = self.detail.replace(['\t', '\n', '\r'], " ");
        write!(f, "{}\t{user}\t{folder}\t{name}\t{object}\t{detail}", self.kind.as_str())
    }
}

/// What a check of a user came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    pub user: String,
    pub epoch: u32,
    /// The backend that owns the user.
    pub owner: Option<String>,
    pub folders: u64,
    /// Mails that listings name.
    pub mails: u64,
    /// Mail objects in the store, those included that were dropped.
    pub objects: u64,
    /// Mails that are newer than the last flush: a recovery, or the owner, knows them.
    pub newer: u64,
    /// Bundles and large files that no head names: a full listing by gc takes them away.
    pub leftovers: u64,
    /// Objects that wait on the dropped list.
    pub dropped: u64,
    /// States that can be gone back to.
    pub states: u64,
    /// Bytes of mails that were read and compared.
    pub read: u64,
    /// Why what changed since the last flush was not flushed before this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_flushed: Option<String>,
    pub findings: Vec<Finding>,
    /// What a repair did, for people.
    pub repaired: Vec<String>,
}

impl Report {
    pub(super) fn new(user: &str) -> Report {
        Report { user: user.to_owned(), ..Report::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_of_six_fields() {
        let finding = Finding {
            kind: Kind::Lost,
            user: "a b@x".into(),
            folder: Some("mail/.Sent".into()),
            name: None,
            object: Some("k".into()),
            detail: "gone\nfor\tgood".into(),
        };
        assert_eq!(finding.to_string(), "lost\ta%20b@x\tmail/.Sent\t-\tk\tgone for good");
    }
}
