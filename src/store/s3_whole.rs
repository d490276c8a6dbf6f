//! Answers in XML are whole, or they are errors.
//!
//! The SDK's parser takes the end of the text for the end of the document: a listing cut off
//! by some proxy, under a length that fits, would be a shorter listing, and mails would be
//! absent that are there (I4). So the text must end with the end of its root element. It also has
//! a limit, as the SDK holds it in memory.

use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_types::body::SdkBody;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A page of a listing has 1000 keys of at most 1 KiB, and little more for each.
const LIMIT: u64 = 16 << 20;
/// What is kept of the end of the text: an end tag with a namespace's prefix and line ends.
const TAIL: usize = 128;

/// Watches over the answer to one request.
#[derive(Debug)]
pub(super) struct WholeXml {
    /// The root element of a good answer.
    pub(super) root: &'static str,
}

impl Intercept for WholeXml {
    fn name(&self) -> &'static str {
        "WholeXml"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response_mut();
        let root = response.status().is_success().then_some(self.root);
        let inner = response.take_body();
        let watched = Watched { inner, root, left: LIMIT, tail: Vec::new() };
        *response.body_mut() = SdkBody::from_body_1_x(watched);
        Ok(())
    }
}

#[derive(Debug)]
struct Watched {
    inner: SdkBody,
    root: Option<&'static str>,
    left: u64,
    tail: Vec<u8>,
}

impl Watched {
    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        let left = self.left.checked_sub(piece.len() as u64);
        self.left = left.ok_or_else(|| io::Error::other("an answer longer than any can be"))?;
        self.tail.extend_from_slice(&piece[piece.len().saturating_sub(TAIL)..]);
        let excess = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..excess);
        Ok(())
    }
}

/// Whether a text with this end can be a whole document with this root.
fn ends_well(tail: &[u8], root: &str) -> bool {
    let text = tail.trim_ascii_end();
    let Some(rest) = text.strip_suffix(b">") else { return false };
    // An empty element stands for an empty answer; no page of a listing is empty.
    if rest.ends_with(b"/") {
        return root == super::s3_delete::DELETED;
    }
    let Some(rest) = rest.trim_ascii_end().strip_suffix(root.as_bytes()) else { return false };
    let Some(open) = rest.iter().rposition(|b| *b == b'<') else { return false };
    let prefix = &rest[open..];
    prefix == b"</" || (prefix.starts_with(b"</") && prefix.ends_with(b":"))
}

impl Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let next = std::task::ready!(Pin::new(&mut self.inner).poll_frame(cx));
        Poll::Ready(match next {
            Some(Ok(frame)) => {
                let taken = frame.data_ref().cloned().map_or(Ok(()), |piece| self.take(&piece));
                Some(taken.map(|()| frame).map_err(Into::into))
            }
            Some(Err(error)) => Some(Err(error)),
            None => match self.root.take() {
                Some(root) if !ends_well(&self.tail, root) => {
                    Some(Err(io::Error::other(format!("the answer ends before its {root}")).into()))
                }
                _ => None,
            },
        })
    }

    fn size_hint(&self) -> SizeHint {
        Body::size_hint(&self.inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends() {
        let list = |text: &str| ends_well(text.as_bytes(), "ListBucketResult");
        assert!(list("</Contents></ListBucketResult>"));
        assert!(list("</s3:ListBucketResult >\r\n"));
        for cut in ["", "</ListBucketResul", "</Contents>", "<Prefix/>", "ListBucketResult>"] {
            assert!(!list(cut), "{cut}");
        }
        assert!(!list("<a></x><ListBucketResult>"));
        assert!(ends_well(b"<DeleteResult xmlns=\"x\"/>", "DeleteResult"));
        assert!(ends_well(b"</DeleteResult>", "DeleteResult"));
    }
}
