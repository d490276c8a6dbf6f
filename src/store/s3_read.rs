//! Bodies of GETs: what their headers promise, and whether they keep it.

use super::dir_io::plain;
use super::key::check_range;
use super::retry::{Failure, Progress};
use super::s3_error::explain_body;
use super::{ETag, ObjectMeta, StoreError};
use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_smithy_types::DateTime;
use aws_smithy_types::byte_stream::ByteStream;
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A download is written in pieces of about this size.
const WRITE_PIECE: usize = 1 << 20;

/// Checks the head of a GET's answer; gives what is known, the body's length, and the body.
pub(super) fn opened(
    key: &str,
    range: Option<&Range<u64>>,
    answer: GetObjectOutput,
) -> Result<(ObjectMeta, u64, ByteStream), Failure> {
    let bad = |detail: String| StoreError::BadBody { key: key.to_owned(), detail };
    let Some(len) = answer.content_length().and_then(|len| u64::try_from(len).ok()) else {
        return Err(Failure::passing(bad("an answer without a length".to_owned())));
    };
    let mut size = len;
    if let Some(range) = range {
        let Some((from, total)) = answer.content_range().and_then(parse_content_range) else {
            let detail = format!("{key}: the store ignores that a part was asked for");
            // It may be somebody's page with status 200 and not the store.
            return Err(Failure::passing(StoreError::Unsupported { detail }));
        };
        check_range(key, total, Some(range), u64::MAX).map_err(Failure::last)?;
        if from != range.start || len != range.end - range.start {
            let detail = format!("{len} bytes from {from}, asked for {range:?}");
            return Err(Failure::passing(bad(detail)));
        }
        size = total;
    }
    let meta = ObjectMeta {
        key: key.to_owned(),
        size,
        etag: answer.e_tag.map(ETag),
        modified: answer.last_modified.as_ref().map(DateTime::secs),
        metadata: sorted(answer.metadata),
    };
    Ok((meta, len, answer.body))
}

/// First byte and total size of `bytes 5-9/20`.
fn parse_content_range(header: &str) -> Option<(u64, u64)> {
    let (part, total) = header.strip_prefix("bytes ")?.split_once('/')?;
    let (from, _) = part.split_once('-')?;
    Some((from.trim().parse().ok()?, total.trim().parse().ok()?))
}

pub(super) fn sorted(metadata: Option<HashMap<String, String>>) -> Vec<(String, String)> {
    let lower = |(name, value): (String, String)| (name.to_ascii_lowercase(), value);
    let mut pairs: Vec<_> = metadata.unwrap_or_default().into_iter().map(lower).collect();
    pairs.sort_unstable();
    pairs
}

/// Reads a body to its end, giving pieces to `take`; it must have exactly `len` bytes.
pub(super) async fn read_body<F, Fut>(
    key: &str,
    len: u64,
    mut body: ByteStream,
    progress: &Progress,
    mut take: F,
) -> Result<(), Failure>
where
    F: FnMut(Bytes) -> Fut,
    Fut: Future<Output = Result<(), Failure>>,
{
    let mut got = 0;
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|e| explain_body(&e, key, got, len))?;
        got += piece.len() as u64;
        progress.add(piece.len() as u64);
        if got > len {
            break;
        }
        take(piece).await?;
    }
    if got == len {
        return Ok(());
    }
    let detail = format!("{got} bytes came, {len} were announced");
    Err(Failure::passing(StoreError::BadBody { key: key.to_owned(), detail }))
}

/// Writes pieces of a body to their places in a file, outside of the async threads.
pub(super) struct Writer {
    file: Arc<File>,
    at: u64,
    waiting: BytesMut,
}

impl Writer {
    pub(super) fn new(file: Arc<File>) -> Writer {
        Writer { file, at: 0, waiting: BytesMut::new() }
    }

    pub(super) async fn add(&mut self, piece: &[u8]) -> Result<(), Failure> {
        self.waiting.extend_from_slice(piece);
        if self.waiting.len() >= WRITE_PIECE { self.flush().await } else { Ok(()) }
    }

    pub(super) async fn flush(&mut self) -> Result<(), Failure> {
        let piece = self.waiting.split().freeze();
        let (file, at) = (self.file.clone(), self.at);
        self.at += piece.len() as u64;
        tokio::task::spawn_blocking(move || file.write_all_at(&piece, at))
            .await
            .unwrap_or_else(|e| Err(std::io::Error::other(e)))
            .map_err(|e| Failure::last(plain(e, "local file")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/20"), Some((5, 20)));
        for bad in ["", "bytes */20", "bytes 5-9/*", "5-9/20", "bytes 5/20"] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}
