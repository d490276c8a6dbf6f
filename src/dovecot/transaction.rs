//! Writing a transaction of `dovecot.index.log`.

use super::{
    bytes::pad4,
    records::{EXPUNGE_PROTECTION, EXTERNAL, RECORD_HEADER, kind},
};

/// The largest record the packed size can express.
const MAX_RECORD: usize = 1 << 30;

/// Packs a record's size: 28 bits of 4-byte words, seven to a byte, each byte's top bit set.
pub(super) fn pack_size(size: usize) -> [u8; 4] {
    let words = (size >> 2) as u32;
    [21, 14, 7, 0].map(|shift| 0x80 | (words >> shift & 0x7f) as u8)
}

/// How an extension is introduced before records that use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intro<'a> {
    pub name: &'a str,
    pub reset_id: u32,
    pub hdr_size: u32,
    pub record_size: u16,
    pub record_align: u16,
}

/// Builds one transaction of external records.
///
/// Everything a recovery writes is external: it states what is so and asks for nothing, so
/// Dovecot's next sync has nothing to do because of it.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    out: Vec<u8>,
    records: usize,
}

impl Transaction {
    pub fn new() -> Transaction {
        Transaction::default()
    }

    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// Adds a record; an empty body adds nothing, as a record without a body is invalid.
    pub fn record(&mut self, kind: u32, body: &[u8]) {
        // A longer one cannot be expressed; callers split at far less (see `chunks`).
        if body.is_empty() || body.len() > MAX_RECORD - 64 {
            return;
        }
        let size = RECORD_HEADER + pad4(body.len());
        self.out.extend_from_slice(&pack_size(size));
        self.out.extend_from_slice(&(kind | EXTERNAL).to_le_bytes());
        self.out.extend_from_slice(body);
        self.out.resize(self.out.len() + pad4(body.len()) - body.len(), 0);
        self.records += 1;
    }

    /// Overwrites four bytes of the index header.
    pub fn header_update(&mut self, offset: u16, value: u32) {
        self.record(kind::HEADER_UPDATE, &header_update_body(offset, value));
    }

    /// New mails without flags. UIDs ascend and are at or above next-UID.
    pub fn append(&mut self, uids: &[u32]) {
        let body: Vec<u8> = uids.iter().flat_map(|uid| (u64::from(*uid)).to_le_bytes()).collect();
        self.record(kind::APPEND, &body);
    }

    /// Mails that are gone. Their GUIDs are not told: no sync looks for a file because of it.
    pub fn expunge(&mut self, uids: &[u32]) {
        let body = uids.iter().flat_map(|uid| {
            let mut mail = [0; 20];
            mail[..4].copy_from_slice(&uid.to_le_bytes());
            mail
        });
        self.record(kind::EXPUNGE_GUID | EXPUNGE_PROTECTION, &body.collect::<Vec<u8>>());
    }

    /// Says which extension the next extension records mean. By name, which Dovecot accepts for
    /// one it knows, too: our numbering of extensions then need not agree with its own.
    pub fn ext_intro(&mut self, intro: &Intro<'_>) {
        let mut body = Vec::with_capacity(20 + intro.name.len());
        body.extend_from_slice(&u32::MAX.to_le_bytes());
        body.extend_from_slice(&intro.reset_id.to_le_bytes());
        body.extend_from_slice(&intro.hdr_size.to_le_bytes());
        body.extend_from_slice(&intro.record_size.to_le_bytes());
        body.extend_from_slice(&intro.record_align.to_le_bytes());
        // Never shrink what is there.
        body.extend_from_slice(&1u16.to_le_bytes());
        body.extend_from_slice(&(intro.name.len() as u16).to_le_bytes());
        body.extend_from_slice(intro.name.as_bytes());
        self.record(kind::EXT_INTRO, &body);
    }

    /// Sets the introduced extension's data of mails.
    pub fn ext_records<'d>(&mut self, records: impl Iterator<Item = (u32, &'d [u8])>) {
        let mut body = Vec::new();
        for (uid, data) in records {
            body.extend_from_slice(&uid.to_le_bytes());
            body.extend_from_slice(data);
            body.resize(pad4(body.len()), 0);
        }
        self.record(kind::EXT_REC_UPDATE, &body);
    }

    /// Overwrites a part of the introduced extension's header.
    pub fn ext_header_update(&mut self, offset: u16, data: &[u8]) {
        let mut body = Vec::with_capacity(4 + data.len());
        body.extend_from_slice(&offset.to_le_bytes());
        body.extend_from_slice(&(data.len() as u16).to_le_bytes());
        body.extend_from_slice(data);
        self.record(kind::EXT_HDR_UPDATE, &body);
    }

    /// The bytes to append: more than one record get a boundary, so that all or none count.
    pub fn finish(self) -> Vec<u8> {
        if self.records < 2 {
            return self.out;
        }
        let mut boundary = Transaction::new();
        let total = (RECORD_HEADER + 4 + self.out.len()) as u32;
        boundary.record(kind::BOUNDARY, &total.to_le_bytes());
        let mut out = boundary.out;
        out.extend_from_slice(&self.out);
        out
    }
}

/// A lone header update of four bytes: 16 bytes in the file.
fn header_update_body(offset: u16, value: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..2].copy_from_slice(&offset.to_le_bytes());
    body[2..4].copy_from_slice(&4u16.to_le_bytes());
    body[4..].copy_from_slice(&value.to_le_bytes());
    body
}

#[cfg(test)]
mod tests {
    use super::{super::records::unpack_size, *};

    #[test]
    fn sizes_pack_as_documented() {
        assert_eq!(pack_size(20), [0x80, 0x80, 0x80, 0x85]);
        for size in [12, 508, 512, 65_536, (1 << 30) - 4] {
            assert_eq!(unpack_size(pack_size(size)), Some(size));
        }
        assert_eq!(unpack_size([0x80, 0x80, 0x80, 0x05]), None);
    }
}
