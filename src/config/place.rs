//! Paths, stores and accounts as they are written in the configuration.

use super::settings::Owner;
use super::{ConfigError, err};
use nix::unistd::{Group, User};
use std::path::{Component, Path, PathBuf};

/// The directories that `%4Nu` in a path stands for.
pub(super) fn split_path(path: &Path) -> Result<Option<Vec<PathBuf>>, ConfigError> {
    let Some((before, rest)) = path.to_str().and_then(|text| text.split_once('%')) else {
        return Ok(None);
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (range, variable) = rest.split_at(digits);
    let range: u32 = range.parse().unwrap_or(0);
    match variable.strip_prefix("Nu") {
        Some(after) if (1..=256).contains(&range) && !after.contains('%') => {
            Ok(Some((0..range).map(|n| format!("{before}{n:x}{after}").into()).collect()))
        }
        _ => err(format!(
            "fscache.path {}: of Dovecot's variables only %<1 to 256>Nu, once, is understood here",
            path.display()
        )),
    }
}

/// What the "store" of the NFS mode begins with.
pub(super) const NFS: &str = "nfs://";

/// The form of a store's URL; the directory of a file store, or of the NFS mode.
pub(super) fn check_store(store: &str) -> Result<Option<PathBuf>, ConfigError> {
    if let Some(path) = store.strip_prefix(NFS) {
        if !path.starts_with('/') {
            return err(format!(
                "store `{store}`: name the directory where NFS is mounted, like nfs:///srv/vmail"
            ));
        }
        return Ok(Some(real(Path::new(path))));
    }
    if let Some(path) = store.strip_prefix("file://") {
        if !path.starts_with('/') {
            return err(format!("store `{store}`: write an absolute path, like file:///srv/mail"));
        }
        return Ok(Some(real(Path::new(path))));
    }
    let Some(rest) = store.strip_prefix("s3://") else {
        return err(format!(
            "store `{store}`: use file:///some/dir, s3://bucket/prefix or nfs:///some/dir"
        ));
    };
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() || prefix.contains("//") || prefix.starts_with('/') {
        return err(format!("store `{store}`: write it like s3://bucket or s3://bucket/prefix"));
    }
    Ok(None)
}

/// Refuses directories that are equal or lie in one another: what empties one would empty both.
pub(super) fn apart(places: &[(&str, &Path)]) -> Result<(), ConfigError> {
    for (i, (key, path)) in places.iter().enumerate() {
        for (other_key, other) in &places[i + 1..] {
            let (inner, outer) = match (path.starts_with(other), other.starts_with(path)) {
                (true, true) => {
                    return err(format!(
                        "{key} and {other_key} are the same directory ({}): each needs its own",
                        path.display()
                    ));
                }
                (true, false) => (key, other_key),
                (false, true) => (other_key, key),
                (false, false) => continue,
            };
            return err(format!("{inner} lies inside {outer}: each needs a directory of its own"));
        }
    }
    Ok(())
}

pub(super) fn absolute(key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
    if path.as_os_str().is_empty() {
        return err(format!("{key} is empty: name a path or leave it out"));
    }
    match std::path::absolute(path) {
        Ok(path) => Ok(real(&path)),
        Err(e) => err(format!("{key} {}: {e}", path.display())),
    }
}

/// The path without symbolic links as far as it exists, so that comparing paths means something.
fn real(path: &Path) -> PathBuf {
    let mut rest = Vec::new();
    let mut head = path;
    loop {
        if let Ok(mut found) = head.canonicalize() {
            for part in rest.iter().rev() {
                match part {
                    Component::ParentDir => {
                        found.pop();
                    }
                    Component::Normal(name) => found.push(name),
                    _ => {}
                }
            }
            return found;
        }
        match (head.parent(), head.components().next_back()) {
            (Some(parent), Some(last)) => {
                rest.push(last);
                head = parent;
            }
            _ => return path.to_owned(),
        }
    }
}

/// `user:group`, or `user` with that account's group; names or numbers.
pub(super) fn account(key: &str, text: &str) -> Result<Owner, ConfigError> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let known = match user.parse::<u32>() {
        Ok(uid) => {
            User::from_uid(uid.into()).ok().flatten().map(|u| (uid, u.gid.as_raw())).or_else(
                || group.map(|_| (uid, 0)), // the group follows
            )
        }
        Err(_) => User::from_name(user).ok().flatten().map(|u| (u.uid.as_raw(), u.gid.as_raw())),
    };
    let Some((uid, own_gid)) = known else {
        return err(format!("{key} `{text}`: there is no account `{user}` on this machine"));
    };
    let gid = match group {
        None => own_gid,
        Some(group) => match group.parse::<u32>() {
            Ok(gid) => gid,
            Err(_) => match Group::from_name(group).ok().flatten() {
                Some(group) => group.gid.as_raw(),
                None => {
                    return err(format!(
                        "{key} `{text}`: there is no group `{group}` on this machine"
                    ));
                }
            },
        },
    };
    Ok(Owner { uid, gid })
}

/// A file name for a path: `/var/vmail` becomes `var-vmail`. Two paths never give one name.
pub fn escape_path(path: &Path) -> String {
    use std::fmt::Write as _;
    use std::os::unix::ffi::OsStrExt as _;
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_prefix(b"/").unwrap_or(bytes);
    let mut out = String::with_capacity(bytes.len());
    for b in bytes {
        match b {
            b'/' => out.push('-'),
            b'.' if out.is_empty() => out.push_str("%2e"),
            b if b.is_ascii_alphanumeric() || b"_.".contains(b) => out.push(*b as char),
            b => {
                let _ = write!(out, "%{b:02x}");
            }
        }
    }
    if out.is_empty() {
        return "-".to_owned();
    }
    if out.len() > 200 {
        let hash = blake3::hash(path.as_os_str().as_bytes()).to_hex();
        out.truncate(160);
        out.push('%');
        out.push_str(&hash[..32]);
    }
    out
}
