//! What an answer of an S3 server means, and whether to ask again.

use super::StoreError;
use super::retry::{Again, Failure};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use std::error::Error;
use std::io;
use std::time::Duration;

/// What was asked, as far as it matters for the meaning of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// Something about one object.
    Object,
    /// A HEAD: errors come without a body, so that a 404 may also mean the bucket.
    Head,
    /// To write under a condition.
    Conditional,
    /// A listing or a bulk delete.
    Bucket,
}

/// Turns a failed request into its meaning. `key` is the store's key, without the prefix.
pub(super) fn explain<E>(error: SdkError<E, HttpResponse>, key: &str, asked: Asked) -> Failure
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let unavailable = |detail| Failure::passing(StoreError::Unavailable { detail });
    match &error {
        SdkError::ServiceError(inner) => {
            let answer = Answer {
                status: inner.raw().status().as_u16(),
                code: inner.err().code().unwrap_or(""),
                message: inner.err().message().unwrap_or(""),
                retry_after: retry_after(inner.raw()),
                region: inner.raw().headers().get("x-amz-bucket-region"),
            };
            answer.explain(key, asked)
        }
        // An answer that is none: a proxy's error page, a body cut short.
        SdkError::ResponseError(inner) => {
            let answer = Answer {
                status: inner.raw().status().as_u16(),
                code: "",
                message: &chain(&error),
                retry_after: retry_after(inner.raw()),
                region: None,
            };
            if answer.status < 300 {
                unavailable(format!("{key}: unreadable answer: {}", answer.message))
            } else {
                answer.explain(key, asked)
            }
        }
        SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_) => {
            match find::<CredentialsError>(&error) {
                Some(CredentialsError::CredentialsNotLoaded(_)) => {
                    Failure::last(StoreError::Denied {
                        detail: "no credentials found (neither in the configuration nor where AWS tools look for them)".to_owned(),
                    })
                }
                Some(CredentialsError::InvalidConfiguration(_)) => {
                    Failure::last(StoreError::Denied { detail: chain(&error) })
                }
                // All that is left to ask is a service on the network, which may come back.
                Some(failed) => {
                    let why = chain(failed);
                    unavailable(format!(
                        "no credentials in the configuration or the environment, and the service \
                         that gives them on a cloud machine fails: {why}"
                    ))
                }
                _ => unavailable(format!("{key}: {}", chain(&error))),
            }
        }
        _ => unavailable(format!("{key}: {}", chain(&error))),
    }
}

struct Answer<'a> {
    status: u16,
    code: &'a str,
    message: &'a str,
    retry_after: Option<Duration>,
    region: Option<&'a str>,
}

impl Answer<'_> {
    fn explain(&self, key: &str, asked: Asked) -> Failure {
        let Answer { status, code, message, .. } = self;
        let detail = match (code.is_empty(), message.is_empty()) {
            (true, true) => format!("{key}: HTTP status {status}"),
            (true, false) => format!("{key}: HTTP status {status}: {message}"),
            (false, _) => format!("{key}: HTTP status {status} {code}: {message}"),
        };
        let key = key.to_owned();
        let last = Failure::last;
        match (*status, *code) {
            (404, "NoSuchBucket") => last(StoreError::NoSuchStore { detail }),
            // Amazon says so for If-Match on a key that does not exist.
            (404, "NoSuchKey") if asked == Asked::Conditional => {
                last(StoreError::Precondition { key })
            }
            (404, "NoSuchKey") if asked != Asked::Bucket => last(StoreError::NotFound { key }),
            (404, _) if asked == Asked::Head => last(StoreError::NotFound { key }),
            // A 404 without the store's own word for it is some proxy's: an outage (I4).
            (404, _) => self.passing(StoreError::Unavailable { detail }),
            (412, _) => last(StoreError::Precondition { key }),
            (409, _) if asked == Asked::Conditional => last(StoreError::Precondition { key }),
            (416, _) => last(StoreError::BadBody { key, detail }),
            (301 | 302 | 307 | 308, _) => {
                let region = self.region.unwrap_or("another one");
                let detail = format!("{detail} (the bucket's region is {region}: set it)");
                last(StoreError::NoSuchStore { detail })
            }
            (403, "RequestTimeTooSkewed") => {
                let detail = format!("{detail} (this machine's clock is wrong)");
                last(StoreError::Denied { detail })
            }
            (401 | 403, _)
            | (400, "ExpiredToken" | "InvalidToken" | "AuthorizationHeaderMalformed") => {
                last(StoreError::Denied { detail })
            }
            (400, "BadDigest" | "XAmzContentChecksumMismatch" | "IncompleteBody") => {
                self.passing(StoreError::BadBody { key, detail })
            }
            (501 | 405, _) | (_, "NotImplemented") => last(StoreError::Unsupported { detail }),
            (400, "RequestTimeout" | "SlowDown") | (408 | 409 | 429, _) => {
                self.passing(StoreError::Unavailable { detail })
            }
            (400..=499, _) => last(StoreError::Unavailable { detail }),
            _ => self.passing(StoreError::Unavailable { detail }),
        }
    }

    fn passing(&self, error: StoreError) -> Failure {
        Failure { error, again: self.retry_after.map_or(Again::Yes, Again::After) }
    }
}

/// The seconds of a `Retry-After` (its form as a date is rare enough to be ignored).
fn retry_after(response: &HttpResponse) -> Option<Duration> {
    response.headers().get("retry-after")?.trim().parse().ok().map(Duration::from_secs)
}

/// What a body that broke off means: ended too early, or the connection failed.
pub(super) fn explain_body(
    error: &(dyn Error + 'static),
    key: &str,
    got: u64,
    expected: u64,
) -> Failure {
    let ended = find::<io::Error>(error).is_some_and(|e| e.kind() == io::ErrorKind::UnexpectedEof);
    let why = chain(error);
    if ended || why.contains("checksum") {
        let detail = format!("after {got} of {expected} bytes: {why}");
        Failure::passing(StoreError::BadBody { key: key.to_owned(), detail })
    } else {
        let detail = format!("{key}: after {got} of {expected} bytes: {why}");
        Failure::passing(StoreError::Unavailable { detail })
    }
}

/// The last error of the given type in the chain of sources: an I/O error may wrap another.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut found = None;
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(hit) = error.downcast_ref::<T>() {
            found = Some(hit);
        }
        next = error.source();
    }
    found
}

/// The error with its sources, as one line without repetitions.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(status: u16, code: &str, asked: Asked) -> (&'static str, bool) {
        let answer = Answer { status, code, message: "", retry_after: None, region: None };
        let failure = answer.explain("k", asked);
        let word = match failure.error {
            StoreError::NotFound { .. } => "absent",
            StoreError::Precondition { .. } => "condition",
            StoreError::Denied { .. } => "denied",
            StoreError::Unsupported { .. } => "unsupported",
            StoreError::BadBody { .. } => "body",
            StoreError::Full { .. } => "full",
            StoreError::NoSuchStore { .. } => "store",
            StoreError::Unavailable { .. } => "outage",
        };
        (word, failure.again != Again::No)
    }

    #[test]
    fn meanings() {
        use Asked::{Bucket, Conditional, Head, Object};
        for (status, code, asked, word, again) in [
            (404, "NoSuchKey", Object, "absent", false),
            (404, "", Object, "outage", true),
            (404, "", Head, "absent", false),
            (404, "NoSuchKey", Bucket, "outage", true),
            (404, "NoSuchBucket", Object, "store", false),
            (404, "NoSuchBucket", Bucket, "store", false),
            (404, "NoSuchKey", Conditional, "condition", false),
            (412, "PreconditionFailed", Conditional, "condition", false),
            (409, "ConditionalRequestConflict", Conditional, "condition", false),
            (409, "OperationAborted", Object, "outage", true),
            (403, "AccessDenied", Object, "denied", false),
            (401, "", Head, "denied", false),
            (400, "ExpiredToken", Object, "denied", false),
            (400, "BadDigest", Object, "body", true),
            (400, "InvalidArgument", Object, "outage", false),
            (501, "NotImplemented", Conditional, "unsupported", false),
            (400, "NotImplemented", Conditional, "unsupported", false),
            (301, "PermanentRedirect", Bucket, "store", false),
            (500, "InternalError", Object, "outage", true),
            (503, "SlowDown", Object, "outage", true),
            (429, "", Object, "outage", true),
            (416, "InvalidRange", Object, "body", false),
        ] {
            assert_eq!(meaning(status, code, asked), (word, again), "{status} {code} {asked:?}");
        }
    }
}
