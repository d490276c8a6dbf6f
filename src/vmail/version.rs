//! The version of what lies in a store and in a state directory, as a whole.
//!
//! Heads, listings and journals say their own version, but a mount must not find out user by
//! user that a newer vmailfs was here. So the store has an object `format`, and the state
//! directory a file of that name, with one line each. A newer one refuses the mount.
//!
//! The state directory also names the store that it was used with. If the place of that store has no
//! mark, it is not an empty store but another place (a disk that is not mounted, a mistyped prefix):
//! in it every user would seem to be new, and what is delivered would be gone when the store is back.

use super::env::Env;
use super::error::{During, Error, Result};
use crate::cache::disk::make_dirs;
use crate::format::FormatError;
use crate::store::{Body, PutMode, Reason, StoreError};
use bytes::Bytes;
use std::path::Path;

/// The newest version known here, of both.
const KNOWN: u32 = 1;
/// Key of the object, and name of the file.
pub const NAME: &str = "format";
const STORE: &str = "vmailfs store";
const STATE: &str = "vmailfs state";
/// File of the state directory that says which store it was used with.
const USED: &str = "store";

fn line(what: &str) -> String {
    format!("{what} {KNOWN}\n")
}

fn check(what: &'static str, bytes: &[u8]) -> std::result::Result<(), FormatError> {
    let text = std::str::from_utf8(bytes).ok().and_then(|text| text.strip_prefix(what));
    let found = text.and_then(|rest| rest.lines().next()?.trim().parse::<u32>().ok());
    match found {
        Some(found) if found > KNOWN => Err(FormatError::TooNew { what, found, known: KNOWN }),
        Some(_) => Ok(()),
        None => Err(FormatError::malformed(what, "its `format` was not written by vmailfs")),
    }
}

/// Refuses a store of a newer version, and a place that has none where this state directory has seen
/// one; marks a store that is new.
pub async fn check_store(env: &Env, state_dir: &Path) -> Result<()> {
    let path = state_dir.join(USED);
    let failed = |e| Error::disk(path.display().to_string(), &e);
    let name = format!("{}\n", env.store.describe());
    let used = env.disk.read(&path, 4096).map_err(failed)?;
    check_mark(env, used.is_none(), &path).await?;
    if used.as_deref() == Some(name.as_bytes()) {
        return Ok(());
    }
    make_dirs(&*env.disk, state_dir).map_err(failed)?;
    env.disk.replace(&path, name.as_bytes(), true).map_err(failed)
}

async fn check_mark(env: &Env, may_be_new: bool, used: &Path) -> Result<()> {
    const WHY: Reason = Reason("version");
    let what = || env.store.describe();
    let failed = |e| Error::store(what(), During::Delivery, e);
    match env.store.get(NAME, None, 4096, WHY).await {
        Ok((_, bytes)) => check(STORE, &bytes).map_err(|e| Error::corrupt(what(), e)),
        Err(StoreError::NotFound { .. }) if !may_be_new => Err(Error::Doubt {
            what: format!(
                "{}: there is no store, but {} says that this machine has used one. Is its disk \
                 mounted, are bucket and prefix right? If an empty store is meant, or its object \
                 `{NAME}` was lost, remove that file",
                what(),
                used.display()
            ),
        }),
        Err(StoreError::NotFound { .. }) => {
            let body = Body::Bytes(Bytes::from(line(STORE)));
            match env.store.put(NAME, body, PutMode::Create, &[], WHY).await {
                // Somebody was faster, with the same word or a newer one.
                Err(StoreError::Precondition { .. }) => {
                    let (_, bytes) = env.store.get(NAME, None, 4096, WHY).await.map_err(failed)?;
                    check(STORE, &bytes).map_err(|e| Error::corrupt(what(), e))
                }
                done => done.map(|_| ()).map_err(failed),
            }
        }
        Err(e) => Err(failed(e)),
    }
}

/// The same for a state directory.
pub fn check_state(env: &Env, dir: &Path) -> Result<()> {
    let path = dir.join(NAME);
    let failed = |e| Error::disk(path.display().to_string(), &e);
    match env.disk.read(&path, 4096).map_err(failed)? {
        Some(bytes) => {
            check(STATE, &bytes).map_err(|e| Error::corrupt(path.display().to_string(), e))
        }
        None => env.disk.replace(&path, line(STATE).as_bytes(), true).map_err(failed),
    }
}

#[cfg(test)]
mod tests {
    use super::{STORE, check, line};
    use crate::format::FormatError;

    #[test]
    fn a_newer_version_and_foreign_bytes_are_refused() {
        assert_eq!(check(STORE, line(STORE).as_bytes()), Ok(()));
        let newer = check(STORE, b"vmailfs store 2\nwhatever else\n");
        assert!(matches!(newer, Err(FormatError::TooNew { found: 2, .. })));
        for foreign in [&b""[..], b"vmailfs store", b"vmailfs state 1\n", b"\xff\xfe"] {
            assert!(matches!(check(STORE, foreign), Err(FormatError::Malformed { .. })));
        }
    }
}
