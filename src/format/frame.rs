//! zstd frames: the unit that is read by byte range.

use super::FormatError;
use std::io::Read;

const WHAT: &str = "part";
const LEVEL: i32 = 3;
/// Level 3 stays within 2 MiB; the rest is room for later writers. Bounds a reader's memory.
const WINDOW_LOG_MAX: u32 = 24;

/// One zstd frame with its content's size and a checksum in it, as `zstd -t` wants them.
pub(super) fn compress(raw: &[u8]) -> Vec<u8> {
    let compress = || {
        let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
        compressor.include_checksum(true)?;
        compressor.compress(raw)
    };
    #[expect(clippy::expect_used, reason = "compressing into enough room fails for lack of memory")]
    compress().expect("memory")
}

/// The content of a frame as it is decompressed, so that nobody needs room for all of it.
pub(super) struct Content<'a> {
    decoder: zstd::stream::read::Decoder<'a, &'a [u8]>,
    limit: u64,
    left: u64,
}

impl<'a> Content<'a> {
    /// `limit` bounds the bytes that can be read: the next one is an error.
    pub(super) fn of(bytes: &'a [u8], limit: u64) -> Result<Content<'a>, FormatError> {
        let bad = |e| FormatError::from_io(WHAT, e);
        let decoder = zstd::stream::read::Decoder::with_buffer(bytes).map_err(bad)?;
        let mut decoder = decoder.single_frame();
        decoder.window_log_max(WINDOW_LOG_MAX).map_err(bad)?;
        Ok(Content { decoder, limit, left: limit })
    }

    /// That the frame was read to its end and nothing lies behind it.
    pub(super) fn end(mut self) -> Result<(), FormatError> {
        let more = self.read(&mut [0]).map_err(|e| FormatError::from_io(WHAT, e))?;
        if more != 0 || !self.decoder.finish().is_empty() {
            return Err(FormatError::malformed(WHAT, "more bytes behind the end"));
        }
        Ok(())
    }
}

impl Read for Content<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.decoder.read(buf)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            let too_large = FormatError::TooLarge { what: WHAT, limit: self.limit };
            std::io::Error::other(too_large)
        })?;
        Ok(n)
    }
}

/// How long the frame's content is, as its header says; 0 if it does not say.
pub(super) fn content_size(frame: &[u8]) -> u64 {
    zstd::zstd_safe::get_frame_content_size(frame).ok().flatten().unwrap_or(0)
}
