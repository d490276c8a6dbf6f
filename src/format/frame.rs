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

/// The content of exactly one frame.
pub(super) fn decompress(bytes: &[u8], limit: u64) -> Result<Vec<u8>, FormatError> {
    let bad = |e: std::io::Error| FormatError::malformed(WHAT, e.to_string());
    let mut rest = bytes;
    let mut decoder =
        zstd::stream::read::Decoder::with_buffer(&mut rest).map_err(bad)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(bad)?;
    let mut raw = Vec::new();
    decoder.by_ref().take(limit.saturating_add(1)).read_to_end(&mut raw).map_err(bad)?;
    if raw.len() as u64 > limit {
        return Err(FormatError::TooLarge { what: WHAT, limit });
    }
    drop(decoder);
    if !rest.is_empty() {
        return Err(FormatError::malformed(WHAT, "more bytes behind the frame"));
    }
    Ok(raw)
}

/// How long the frame's content is, as its header says; 0 if it does not say.
pub(super) fn content_size(frame: &[u8]) -> u64 {
    zstd::zstd_safe::get_frame_content_size(frame).ok().flatten().unwrap_or(0)
}
