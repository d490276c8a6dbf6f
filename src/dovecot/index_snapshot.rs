//! `dovecot.index`, format 7.3: the state of a mailbox at a position of its log.
//!
//! Base header (120 bytes), then extension headers (each on a multiple of eight: sizes, name,
//! the extension's own header), then one record a mail: UID, flags, and at fixed offsets the
//! data of each extension.

use super::{
    bytes::{pad8, u16_at, u32_at},
    records::header,
};

/// More extensions than any index has.
const MAX_EXTENSIONS: usize = 512;

/// Why a snapshot cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    #[error("the index is shorter than its header says")]
    Short,
    #[error("the index has format version {0}, not 7")]
    Version(u8),
    #[error("the index was written on a machine of another byte order")]
    ByteOrder,
    #[error("the index is damaged: {0}")]
    Damaged(&'static str),
}

/// What the base header tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotHeader {
    pub indexid: u32,
    pub flags: u32,
    pub uid_validity: u32,
    pub next_uid: u32,
    pub messages: u32,
    /// The log file that continues the snapshot.
    pub log_file_seq: u32,
    /// What lies before has been synced into the mailbox.
    pub log_tail_offset: u32,
    /// What lies before is contained in the snapshot.
    pub log_head_offset: u32,
    base_size: usize,
    header_size: usize,
    record_size: usize,
}

impl SnapshotHeader {
    /// Reads the base header; the rest of the file need not be there.
    pub fn parse(index: &[u8]) -> Result<SnapshotHeader, SnapshotError> {
        let field = |at| u32_at(index, at).ok_or(SnapshotError::Short);
        match index.first() {
            None => return Err(SnapshotError::Short),
            Some(7) => {}
            Some(other) => return Err(SnapshotError::Version(*other)),
        }
        if index.get(12).is_none_or(|compat| compat & 1 == 0) {
            return Err(SnapshotError::ByteOrder);
        }
        let header = SnapshotHeader {
            indexid: field(16)?,
            flags: field(20)?,
            uid_validity: field(24)?,
            next_uid: field(28)?,
            messages: field(32)?,
            log_file_seq: field(60)?,
            log_tail_offset: field(64)?,
            log_head_offset: field(68)?,
            base_size: usize::from(u16_at(index, 2).ok_or(SnapshotError::Short)?),
            header_size: field(4)? as usize,
            record_size: field(8)? as usize,
        };
        if header.base_size < header::BASE_SIZE || header.header_size < header.base_size {
            return Err(SnapshotError::Damaged("header size"));
        }
        if header.record_size < 8 {
            return Err(SnapshotError::Damaged("record size"));
        }
        if header.next_uid == 0 {
            return Err(SnapshotError::Damaged("next UID is 0"));
        }
        Ok(header)
    }
}

/// An extension as the snapshot holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SnapshotExtension<'a> {
    pub name: &'a [u8],
    pub reset_id: u32,
    pub header: &'a [u8],
    pub record_offset: usize,
    pub record_size: u16,
    pub record_align: u16,
}

/// The extensions, in the order that numbers them.
pub(super) fn extensions<'a>(
    index: &'a [u8],
    header: &SnapshotHeader,
) -> Result<Vec<SnapshotExtension<'a>>, SnapshotError> {
    let area = index.get(..header.header_size).ok_or(SnapshotError::Short)?;
    let mut found = Vec::new();
    let mut at = pad8(header.base_size);
    while at < area.len() {
        let parse = || {
            let head = area.get(at..at + 16)?;
            let hdr_size = u32_at(head, 0)? as usize;
            let name = area.get(at + 16..at + 16 + usize::from(u16_at(head, 14)?))?;
            let data_at = at + pad8(16 + name.len());
            let ext = SnapshotExtension {
                name,
                reset_id: u32_at(head, 4)?,
                header: area.get(data_at..data_at.checked_add(hdr_size)?)?,
                record_offset: usize::from(u16_at(head, 8)?),
                record_size: u16_at(head, 10)?,
                record_align: u16_at(head, 12)?,
            };
            Some((ext, data_at.checked_add(pad8(hdr_size))?))
        };
        let (ext, next) = parse().ok_or(SnapshotError::Damaged("extension header"))?;
        if ext.record_offset + usize::from(ext.record_size) > header.record_size
            || found.len() >= MAX_EXTENSIONS
        {
            return Err(SnapshotError::Damaged("extension"));
        }
        found.push(ext);
        at = next;
    }
    Ok(found)
}

/// The mails' records, each of the header's record size.
pub(super) fn records<'a>(
    index: &'a [u8],
    header: &SnapshotHeader,
) -> Result<std::slice::ChunksExact<'a, u8>, SnapshotError> {
    let len = (header.messages as usize)
        .checked_mul(header.record_size)
        .ok_or(SnapshotError::Damaged("message count"))?;
    let end = header.header_size.checked_add(len).ok_or(SnapshotError::Short)?;
    let area = index.get(header.header_size..end).ok_or(SnapshotError::Short)?;
    Ok(area.chunks_exact(header.record_size))
}
