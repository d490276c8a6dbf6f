//! Acting as the owner of the files.
//!
//! The file system identity (`setfsuid(2)`) belongs to the thread alone, and changing it takes the
//! file capabilities from root and gives them back. So an NFS server with `root_squash` sees who
//! it should see, new files get the right owner, and what a user may not do is refused where the
//! files are. Groups beside the primary one do not count.

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

/// Who acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Who {
    pub uid: u32,
    pub gid: u32,
}

impl Who {
    /// This process.
    pub fn me() -> Who {
        Who { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
    }

    /// Acts as these until the value is dropped; without effect unless we are root.
    pub fn act(self) -> Acting {
        let before = Who::me();
        if before.uid == 0 && self != before {
            // The group first: afterwards we may not.
            setfsgid(Gid::from_raw(self.gid));
            setfsuid(Uid::from_raw(self.uid));
            return Acting { back: Some(before), _thread: std::marker::PhantomData };
        }
        Acting { back: None, _thread: std::marker::PhantomData }
    }
}

/// Ends with the identity that was there before. Stays on its thread.
#[derive(Debug)]
#[must_use]
pub struct Acting {
    back: Option<Who>,
    _thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Acting {
    fn drop(&mut self) {
        if let Some(who) = self.back {
            setfsuid(Uid::from_raw(who.uid));
            setfsgid(Gid::from_raw(who.gid));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn files_belong_to_whom_we_act_as() {
        if Who::me().uid != 0 {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let owner = Who { uid: 12_345, gid: 12_346 };
        std::os::unix::fs::chown(dir.path(), Some(owner.uid), Some(owner.gid)).unwrap();
        {
            let _as_owner = owner.act();
            std::fs::write(dir.path().join("a"), "").unwrap();
        }
        let made = std::fs::metadata(dir.path().join("a")).unwrap();
        assert_eq!((made.uid(), made.gid()), (owner.uid, owner.gid));
        std::fs::write(dir.path().join("b"), "").unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("b")).unwrap().uid(), 0);
        let _as_other = Who { uid: 12_347, gid: 12_347 }.act();
        assert!(std::fs::write(dir.path().join("c"), "").is_err());
    }
}
