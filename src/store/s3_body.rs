//! Bodies of puts: bytes or files, in pieces that tell how far they got.

use super::dir_io::plain;
use super::retry::Progress;
use super::{Body, StoreError, StoreResult};
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::byte_stream::ByteStream;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use md5::{Digest, Md5};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Bodies up to this size go as one piece from memory.
const SMALL: u64 = 1 << 20;
/// The pieces of larger ones.
const PIECE: usize = 256 << 10;

/// A body that can be sent several times, with the digest by which the server verifies it.
#[derive(Debug, Clone)]
pub(super) struct Upload {
    source: Source,
    pub(super) len: u64,
    /// The MD5 of the whole body.
    pub(super) md5: [u8; 16],
}

#[derive(Debug, Clone)]
enum Source {
    Bytes(Bytes),
    File(PathBuf),
}

impl Upload {
    /// Reads the body once, to check its length and to digest it; small files are kept.
    pub(super) async fn prepare(key: &str, body: Body) -> StoreResult<Upload> {
        match body {
            Body::Bytes(bytes) => Ok(Upload::of_bytes(bytes)),
            Body::File { path, len } => {
                let key = key.to_owned();
                tokio::task::spawn_blocking(move || Upload::of_file(&key, path, len))
                    .await
                    .unwrap_or_else(|e| Err(StoreError::Unavailable { detail: e.to_string() }))
            }
        }
    }

    fn of_bytes(bytes: Bytes) -> Upload {
        let len = bytes.len() as u64;
        Upload { md5: Md5::digest(&bytes).into(), source: Source::Bytes(bytes), len }
    }

    fn of_file(key: &str, path: PathBuf, len: u64) -> StoreResult<Upload> {
        let local = |e| plain(e, &format!("local file {}", path.display()));
        let mut file = File::open(&path).map_err(local)?;
        let mut md5 = Md5::new();
        let mut kept = Vec::new();
        let mut piece = vec![0; PIECE];
        let mut size = 0;
        loop {
            let n = file.read(&mut piece).map_err(local)?;
            if n == 0 {
                break;
            }
            size += n as u64;
            md5.update(&piece[..n]);
            if len <= SMALL {
                kept.extend_from_slice(&piece[..n]);
            }
            if size > len {
                break;
            }
        }
        if size != len {
            let detail = format!("the local file has {size} bytes or more, not {len}");
            return Err(StoreError::BadBody { key: key.to_owned(), detail });
        }
        let source = if len <= SMALL { Source::Bytes(kept.into()) } else { Source::File(path) };
        Ok(Upload { source, len, md5: md5.finalize().into() })
    }

    /// The body for one attempt.
    pub(super) fn stream(&self, progress: Progress) -> ByteStream {
        let pieces = match &self.source {
            Source::Bytes(bytes) if self.len <= SMALL => return bytes.clone().into(),
            Source::Bytes(bytes) => Pieces::Memory(bytes.clone()),
            Source::File(path) => Pieces::Read(read_pieces(path, self.len)),
        };
        let body = Pieced { pieces, left: self.len, progress };
        ByteStream::new(SdkBody::from_body_1_x(body))
    }
}

/// A thread that reads ahead by two pieces; it ends when the receiver is dropped.
fn read_pieces(path: &Path, len: u64) -> mpsc::Receiver<io::Result<Bytes>> {
    let (to, from) = mpsc::channel(2);
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        let mut file = match File::open(&path) {
            Ok(file) => file.take(len),
            Err(e) => {
                let _ = to.blocking_send(Err(e));
                return;
            }
        };
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            let read = (&mut file).take(PIECE as u64).read_to_end(&mut piece);
            let end = !matches!(read, Ok(n) if n > 0);
            if matches!(read, Ok(0)) || to.blocking_send(read.map(|_| piece.into())).is_err() || end
            {
                return;
            }
        }
    });
    from
}

#[derive(Debug)]
enum Pieces {
    Memory(Bytes),
    Read(mpsc::Receiver<io::Result<Bytes>>),
}

#[derive(Debug)]
struct Pieced {
    pieces: Pieces,
    left: u64,
    progress: Progress,
}

impl http_body::Body for Pieced {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let next = match &mut self.pieces {
            Pieces::Memory(bytes) if bytes.is_empty() => None,
            Pieces::Memory(bytes) => Some(Ok(bytes.split_to(bytes.len().min(PIECE)))),
            Pieces::Read(pieces) => std::task::ready!(pieces.poll_recv(cx)),
        };
        Poll::Ready(match next {
            Some(Ok(piece)) => {
                self.left = self.left.saturating_sub(piece.len() as u64);
                self.progress.add(piece.len() as u64);
                Some(Ok(Frame::data(piece)))
            }
            Some(Err(e)) => Some(Err(e)),
            None if self.left > 0 => {
                self.left = 0;
                Some(Err(io::Error::other("the local file became shorter")))
            }
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
