//! The words by which an admin names a store, and the store behind them.

use super::dir::DirStore;
use super::s3::{S3Config, S3Store};
use super::{ObjectStore, StoreResult};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

/// `file:///dir` or `s3://bucket/prefix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// An absolute path.
    File(PathBuf),
    /// The prefix is empty or a key without slashes at its ends.
    S3 { bucket: String, prefix: String },
}

/// What is wrong with a store's name, for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("store {given:?}: {what}")]
pub struct StoreUrlError {
    given: String,
    what: &'static str,
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(given: &str) -> Result<StoreUrl, StoreUrlError> {
        parse(given).map_err(|what| StoreUrlError { given: given.to_owned(), what })
    }
}

fn parse(given: &str) -> Result<StoreUrl, &'static str> {
    const SHAPES: &str = "a store is file:///directory or s3://bucket/prefix";
    let Some((scheme, rest)) = given.split_once("://") else {
        return Err(if given.starts_with('/') {
            "a directory is written with file:// in front of its path (file:///srv/mail)"
        } else {
            SHAPES
        });
    };
    match scheme {
        "file" if !rest.starts_with('/') => Err(
            "file:// needs an absolute path after it, with three slashes in all (file:///srv/mail)",
        ),
        "file" if rest.contains('\0') => Err("a path cannot hold a NUL byte"),
        "file" if rest.trim_end_matches('/').is_empty() => {
            Err("the root directory of the machine cannot be the store; name a directory in it")
        }
        "file" => Ok(StoreUrl::File(PathBuf::from(rest.trim_end_matches('/')))),
        "s3" => {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_end_matches('/');
            if bucket.is_empty() {
                return Err("s3:// needs a bucket after it (s3://bucket/prefix)");
            }
            if !bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
                return Err(
                    "a bucket's name has letters, digits, '-', '.' and '_' only; keys, endpoint and region have options of their own",
                );
            }
            if !prefix.is_empty() && super::key::check_key(prefix).is_err() {
                return Err("the prefix must be printable ASCII, without '//', '.' or '..' in it");
            }
            // Room must stay for our keys below the prefix.
            if prefix.len() > MAX_PREFIX {
                return Err("the prefix is longer than 256 bytes");
            }
            Ok(StoreUrl::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
        }
        "http" | "https" => Err(
            "an S3 server is named by s3://bucket/prefix and its address by the endpoint option",
        ),
        _ => Err(SHAPES),
    }
}

/// The longest prefix, in bytes.
const MAX_PREFIX: usize = 256;

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreUrl::File(path) => write!(f, "file://{}", path.display()),
            StoreUrl::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            StoreUrl::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
        }
    }
}

/// Opens the store. `s3` gives all that the name does not say; its bucket and prefix are
/// replaced. An S3 store is not asked anything yet: see [`super::probe::probe`].
///
/// # Errors
/// `NoSuchStore` for a directory that does not exist; what [`S3Store::connect`] refuses.
pub async fn open_store(url: &StoreUrl, s3: &S3Config) -> StoreResult<Arc<dyn ObjectStore>> {
    match url {
        StoreUrl::File(path) => Ok(Arc::new(DirStore::open(path)?)),
        StoreUrl::S3 { bucket, prefix } => {
            let config = S3Config { bucket: bucket.clone(), prefix: prefix.clone(), ..s3.clone() };
            Ok(Arc::new(S3Store::connect(config).await?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names() {
        for (given, shown) in [
            ("file:///srv/mail", "file:///srv/mail"),
            ("file:///srv/my mail/", "file:///srv/my mail"),
            ("s3://b", "s3://b"),
            ("s3://b/", "s3://b"),
            ("s3://my-bucket/a/b/", "s3://my-bucket/a/b"),
        ] {
            assert_eq!(given.parse::<StoreUrl>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn bad_names_say_what_to_write() {
        for (given, word) in [
            ("/srv/mail", "file://"),
            ("srv", "s3://bucket/prefix"),
            ("file://srv/mail", "three slashes"),
            ("file:///", "root directory"),
            ("s3://", "needs a bucket"),
            ("s3:///x", "needs a bucket"),
            ("s3://key:secret@b/x", "letters"),
            ("s3://b//x", "prefix"),
            ("s3://b/../x", "prefix"),
            ("https://s3.example.org/b", "endpoint"),
            ("gs://b", "file:///directory"),
        ] {
            let error = given.parse::<StoreUrl>().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
