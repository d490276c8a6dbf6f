//! An index that its server is just making anew.
//!
//! To reset an index (each rebuild of a mailbox does) Dovecot first puts an empty log in place of the
//! old one, one without a predecessor, and in a second step writes all that the mailbox has into that
//! log: `mail_index_transaction_commit` with `reset`, in its lib-index. In between the files say that
//! the mailbox is new and has no mail, and that is what a machine lost would bring back: no flags,
//! another UIDVALIDITY, and for a map of mdbox that no stored mail is known. On a local disk only a
//! crash in these microseconds shows it. A cut would keep it for as long as an upload interval.
//!
//! So a cut that meets such an index is taken again a little later. If the server has died there, or
//! rebuilds something large, it stays as it is, and is taken in the end: it is what the disk holds.
//! A snapshot that belongs to an empty log makes it whole.

use super::error::{Error, Result};
use super::node::{Kind, NodeIx};
use super::user::User;
use crate::dovecot::index_log::LogTracker;
use crate::dovecot::index_snapshot::SnapshotHeader;
use crate::dovecot::records::LogHeader;
use crate::format::FolderId;

const INDEXES: [&[u8]; 3] = [b"dovecot.index", b"dovecot.map.index", b"dovecot.list.index"];
/// The header of a log, and that of a snapshot as far as it matters.
const HEADER: usize = 128;

impl User {
    /// A folder that a cut would take whose index is just being made anew.
    pub(super) fn being_reset(&mut self) -> Result<Option<FolderId>> {
        let changed = self.tree.folders.values().filter(|f| f.loaded && !f.unflushed.is_empty());
        let changed: Vec<FolderId> = changed.map(|folder| folder.id).collect();
        for id in changed {
            for index in INDEXES {
                if self.is_being_reset(id, index)? {
                    return Ok(Some(id));
                }
            }
        }
        Ok(None)
    }

    fn is_being_reset(&mut self, id: FolderId, index: &[u8]) -> Result<bool> {
        let Some(log) = self.child(id, &[index, b".log"].concat()) else { return Ok(false) };
        let Ok(header) = LogHeader::parse(&self.beginning(log, HEADER)?) else { return Ok(false) };
        if header.prev_file_seq != 0 {
            return Ok(false);
        }
        let continued = match self.child(id, index) {
            Some(snapshot) => SnapshotHeader::parse(&self.beginning(snapshot, HEADER)?)
                .is_ok_and(|snapshot| snapshot.log_file_seq == header.file_seq),
            // The first log of an index.
            None => header.file_seq <= 1,
        };
        if continued {
            return Ok(false);
        }
        let bytes = self.beginning(log, usize::MAX)?;
        Ok(LogTracker::of(&bytes, None).whole_len() <= header.hdr_size as u64)
    }

    /// At most so many of a local file's first bytes. None, where it was evicted: it has not changed.
    fn beginning(&mut self, ix: NodeIx, most: usize) -> Result<Vec<u8>> {
        let node = self.node(ix)?;
        if !matches!(&node.kind, Kind::Local(local) if !local.evicted) {
            return Ok(Vec::new());
        }
        let len = usize::try_from(node.size).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; len];
        let read = self.local_file(ix)?.read_at(&mut bytes, 0);
        bytes.truncate(read.map_err(|e| Error::disk("metacache", &e))?);
        Ok(bytes)
    }
}
