//! Little-endian fields read from, and written to, untrusted byte strings.

pub(super) fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(data.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

pub(super) fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The next multiple of four.
pub(super) fn pad4(len: usize) -> usize {
    len.saturating_add(3) & !3
}

/// The next multiple of eight.
pub(super) fn pad8(len: usize) -> usize {
    len.saturating_add(7) & !7
}
