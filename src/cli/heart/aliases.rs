//! Other names of users (`user_*` fields), as an admin has set them: shown in lists, and users can be
//! found by them. One small JSON file in the state directory.

use super::whom::{fits, one};
use crate::admin::{AdminError, ErrorKind};
use crate::cache::disk::How;
use crate::vmail::session::Session;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

type Fields = BTreeMap<String, String>;

/// Users' fields.
#[derive(Debug, Default)]
pub(super) struct Aliases(BTreeMap<String, Fields>);

/// A file of so many bytes is not one of ours.
const LARGEST: u64 = 256 << 20;

fn path(session: &Session) -> PathBuf {
    session.settings.state_dir.join("userdb-fields.json")
}

fn failed(doing: &str, error: impl std::fmt::Display) -> AdminError {
    AdminError::new(ErrorKind::Internal, format!("{doing} userdb-fields.json: {error}"))
}

impl Aliases {
    pub(super) fn read(session: &Session) -> Result<Aliases, AdminError> {
        let file = match session.disk().open(&path(session), How::Read) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Aliases::default()),
            file => file.map_err(|e| failed("reading", e))?,
        };
        let size = file.size().map_err(|e| failed("reading", e))?;
        if size > LARGEST {
            return Err(failed("reading", "it is too large"));
        }
        let len = usize::try_from(size).map_err(|e| failed("reading", e))?;
        let bytes = file.read_exact_at(0, len).map_err(|e| failed("reading", e))?;
        serde_json::from_slice(&bytes).map(Aliases).map_err(|e| failed("reading", e))
    }

    /// Sets a field of a user that there is, or takes it away if the value is empty: also from one
    /// that is gone. Requests of this kind come one at a time or overwrite one another; admins set
    /// fields from one place.
    pub(super) async fn set(
        session: &Arc<Session>,
        user: &str,
        field: &str,
        value: &str,
    ) -> Result<(), AdminError> {
        if !field.starts_with("user_") || field.chars().any(|c| c.is_control() || c == '=') {
            let text = format!("{field}: fields are called user_ and something");
            return Err(AdminError::new(ErrorKind::Usage, text));
        }
        let takes_away = value.is_empty() && Aliases::read(session)?.0.contains_key(user);
        if !takes_away {
            one(session, user).await?;
        }
        let mut all = Aliases::read(session)?.0;
        let fields = all.entry(user.to_owned()).or_default();
        if value.is_empty() {
            fields.remove(field);
        } else {
            fields.insert(field.to_owned(), value.to_owned());
        }
        all.retain(|_, fields| !fields.is_empty());
        let bytes = serde_json::to_vec_pretty(&all).map_err(|e| failed("writing", e))?;
        session.disk().replace(&path(session), &bytes, true).map_err(|e| failed("writing", e))
    }

    pub(super) fn of(&self, user: &str) -> Fields {
        self.0.get(user).cloned().unwrap_or_default()
    }

    /// `field` may be `username`, too.
    pub(super) fn fits(&self, user: &str, field: &str, mask: Option<&str>) -> bool {
        if field == "username" {
            return fits(mask, user);
        }
        self.0.get(user).and_then(|f| f.get(field)).is_some_and(|value| fits(mask, value))
    }
}
