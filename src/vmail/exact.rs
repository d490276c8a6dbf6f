//! Files that are gone from the metacache and come back as they were (I7).
//!
//! A file that somebody has open is still there without its name: it gets a new one with the same
//! content. One that the parts hold exactly as it was comes from them. Only what was changed since
//! the last flush, and what nobody has open, has to be undone ([`super::restore`]).

use super::error::{Error, Result, pass};
use super::node::{Kind, NodeIx, Since};
use super::parts::Contents;
use super::restore::File;
use super::user::User;
use crate::failpoint;
use crate::format::FolderId;

impl User {
    /// Brings back what is gone of a folder and was not lost. False if a flush must end first, to
    /// tell what the parts hold.
    pub(super) fn return_exact(&mut self, id: FolderId, contents: &Contents) -> Result<bool> {
        for file in self.gone(id)? {
            if self.return_open(file.ix)? {
                continue;
            }
            // What is being flushed counts as unchanged, and is in no part yet.
            if self.cut_out.is_some() {
                return Ok(false);
            }
            if let Some(content) = self.in_parts(&file, contents)? {
                self.write_local(file.at, &file.name, content)?;
                pass(failpoint::RESTORE_BETWEEN)?;
            }
        }
        Ok(true)
    }

    fn in_parts<'c>(&self, file: &File, contents: &'c Contents) -> Result<Option<&'c [u8]>> {
        let node = self.node(file.ix)?;
        let Kind::Local(local) = &node.kind else { return Ok(None) };
        let key = (file.at.sub, file.name.clone());
        let changed = !local.shipped
            || local.since != Since::nothing(node.size)
            || node.nlink != 1
            || self.unflushed(file.at.folder, &key);
        let content = contents.get(&key).map(Vec::as_slice);
        Ok(content.filter(|content| !changed && content.len() as u64 == node.size))
    }

    /// Gives an open file its name back, if that is gone. False if it is not open.
    fn return_open(&mut self, ix: NodeIx) -> Result<bool> {
        let node = self.node(ix)?;
        let (size, Kind::Local(local)) = (node.size, &node.kind) else { return Ok(false) };
        let (Some(file), [name]) = (local.file.clone(), node.names.all()) else { return Ok(false) };
        let (name, Some(bytes)) = (*name, self.tree.name_bytes(*name).cloned()) else {
            return Ok(false);
        };
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let content = file.read_exact_at(0, len).map_err(|e| Error::disk("a removed file", &e))?;
        match node.class.is_local_only() {
            true => self.write_local(name.at, &bytes, &content)?,
            // What was synced of it must be again.
            false => self.rewrite_local(name.at, &bytes, &content)?,
        }
        if let Kind::Local(local) = &mut self.node_mut(ix)?.kind {
            local.file = None;
        }
        self.open_local(ix)?;
        tracing::warn!(
            user = %self.name, file = %String::from_utf8_lossy(&bytes),
            "removed from the metacache while it was open; it is there again"
        );
        Ok(true)
    }

    /// The last handle of a file is about to go, and its content with it if its name is gone.
    pub(super) fn keep_removed(&mut self, ix: NodeIx) {
        let Some(node) = self.tree.nodes.get(ix) else { return };
        let (Kind::Local(local), [name]) = (&node.kind, node.names.all()) else { return };
        if local.file.is_none() {
            return;
        }
        let Some(bytes) = self.tree.name_bytes(*name).cloned() else { return };
        let path = self.file_path(name.at, &bytes);
        let kept = match self.session.disk().exists(&path) {
            Ok(false) => self.return_open(ix).map(drop),
            Ok(true) => Ok(()),
            Err(e) => Err(Error::disk(path.display().to_string(), &e)),
        };
        if let Err(error) = kept {
            tracing::error!(user = %self.name, %error, "removed from the metacache, and not put back");
        }
    }
}
