//! What keys and metadata may look like: one rule for all stores, so that what works with a
//! directory works with S3.

use super::{StoreError, StoreResult};
use std::ops::Range;

/// S3's limit, which holds for prefix and key together.
pub(super) const MAX_KEY: usize = 1024;
/// S3's limit for all user metadata of an object, names and values.
const MAX_METADATA: usize = 2048;

fn refuse(detail: String) -> StoreError {
    StoreError::Unsupported { detail }
}

/// Refuses what is no key: empty components, `.`, `..`, a leading `/`, bytes that are not
/// printable ASCII, the backslash (SeaweedFS makes it a slash), overlong ones.
pub(super) fn check_key(key: &str) -> StoreResult<()> {
    let sound = key.len() <= MAX_KEY
        && key.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'\\')
        && key.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if sound { Ok(()) } else { Err(refuse(format!("the key {key:?} is not one of ours"))) }
}

/// As [`check_key`], but the empty string is the root.
pub(super) fn check_dir(dir: &str) -> StoreResult<()> {
    if dir.is_empty() { Ok(()) } else { check_key(dir) }
}

/// `start_after` must lie in `dir`; gives the name that names must be greater than.
pub(super) fn name_after<'a>(
    dir: &str,
    start_after: Option<&'a str>,
) -> StoreResult<Option<&'a str>> {
    let Some(key) = start_after else { return Ok(None) };
    let name = if dir.is_empty() {
        Some(key)
    } else {
        key.strip_prefix(dir).and_then(|rest| rest.strip_prefix('/'))
    };
    match name {
        Some(name) if !name.contains('/') => Ok(Some(name)),
        _ => Err(refuse(format!("the key {key:?} to start after does not lie in {dir:?}"))),
    }
}

/// The key of `name` in `dir`.
pub(super) fn join(dir: &str, name: &str) -> String {
    if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") }
}

/// Refuses metadata that some store would alter or reject.
pub(super) fn check_metadata(metadata: &[(String, String)]) -> StoreResult<()> {
    let mut total = 0;
    for (name, value) in metadata {
        total += name.len() + value.len();
        let good_name = !name.is_empty()
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let good_value = !value.is_empty()
            && value.bytes().all(|b| (0x20..0x7f).contains(&b))
            && !value.starts_with(' ')
            && !value.ends_with(' ')
            && !value.contains("  ");
        if !good_name || !good_value {
            return Err(refuse(format!("the metadata {name:?}: {value:?} would not survive")));
        }
    }
    if total > MAX_METADATA {
        return Err(refuse(format!("{total} bytes of metadata, more than {MAX_METADATA}")));
    }
    Ok(())
}

/// Cuts `range` out of a body that is the whole object; checks it and the limit.
pub(super) fn check_range(
    key: &str,
    size: u64,
    range: Option<&Range<u64>>,
    limit: u64,
) -> StoreResult<()> {
    let (end, len) = match range {
        Some(range) => (range.end, range.end.saturating_sub(range.start)),
        None => (size, size),
    };
    if range.is_some() && len == 0 {
        return Err(refuse(format!("{key}: an empty range was asked for")));
    }
    let detail = if end > size {
        format!("bytes up to {end} asked for, but it has {size}")
    } else if len > limit {
        format!("{len} bytes, more than the {limit} that it may have")
    } else {
        return Ok(());
    };
    Err(StoreError::BadBody { key: key.to_owned(), detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        for good in ["a", "a/b.c:2,S=1", "x y/%~", "a/..b", ".hidden/x"] {
            assert!(check_key(good).is_ok(), "{good}");
        }
        for bad in ["", "/a", "a/", "a//b", ".", "a/../b", "a/./b", "ä", "a\0b", "a\nb", "a\\b"] {
            assert!(check_key(bad).is_err(), "{bad:?}");
        }
        assert!(check_key(&"k".repeat(1025)).is_err());
    }

    #[test]
    fn start_after_lies_in_the_directory() {
        assert_eq!(name_after("a/b", Some("a/b/c")).unwrap(), Some("c"));
        assert_eq!(name_after("", Some("c")).unwrap(), Some("c"));
        assert!(name_after("a/b", Some("a/c/d")).is_err());
        assert!(name_after("a", Some("a/b/c")).is_err());
    }

    #[test]
    fn metadata() {
        let one = |n: &str, v: &str| check_metadata(&[(n.into(), v.into())]);
        assert!(one("folder-path", "INBOX/a b;c=%20\"'").is_ok());
        for (n, v) in [("A", "x"), ("a", " x"), ("a", "x  y"), ("a", ""), ("a", "ü"), ("", "x")] {
            assert!(one(n, v).is_err(), "{n:?} {v:?}");
        }
        assert!(one("a", &"v".repeat(2048)).is_err());
    }
}
