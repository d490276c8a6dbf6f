use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A directory like /dev/shm.
fn shared() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    mode(dir.path(), 0o1777);
    dir
}

fn give(path: &Path, uid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(uid)).unwrap();
}

fn root() -> bool {
    Who::me().uid == 0
}

#[test]
fn directories_are_made_for_their_owner_alone() {
    let dir = shared();
    let user = if root() { Who { uid: 4321, gid: 4321 } } else { Who::me() };
    let path = dir.path().join("list/a/user");
    assert!(Dir::own(&path, user, Missing::Leave).unwrap().is_none());
    assert!(!dir.path().join("list").exists());
    Dir::own(&path, user, Missing::Make).unwrap().unwrap();
    let made = std::fs::metadata(&path).unwrap();
    assert_eq!((made.uid(), made.mode() & 0o7777), (user.uid, 0o700));
    assert_eq!(std::fs::metadata(dir.path().join("list")).unwrap().mode() & 0o022, 0);
    // Others may have been let in by hand, or by Dovecot.
    mode(&path, 0o777);
    Dir::own(&path, user, Missing::Make).unwrap().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn what_others_planted_is_neither_followed_nor_used() {
    if !root() {
        return;
    }
    let dir = shared();
    let elsewhere = tempfile::tempdir().unwrap();
    let user = Who { uid: 4321, gid: 4321 };
    let refused = |path: &Path| match Dir::own(path, user, Missing::Make) {
        Err(Trouble::Refused { .. }) => {}
        other => panic!("{other:?}"),
    };
    // A link, another's directory and a file in the place of the root.
    let planted = dir.path().join("link");
    symlink(elsewhere.path(), &planted).unwrap();
    give(&planted, 999);
    refused(&planted.join("user"));
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    give(&other, 999);
    refused(&other.join("user"));
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    give(&file, 999);
    refused(&file.join("user"));
    // A link in the place of the user's own directory, even if it is the user's.
    let ours = dir.path().join("ours");
    std::fs::create_dir(&ours).unwrap();
    symlink(elsewhere.path(), ours.join("user")).unwrap();
    give(&ours.join("user"), user.uid);
    refused(&ours.join("user"));
    // And another user's directory in its place.
    std::fs::create_dir(ours.join("theirs")).unwrap();
    give(&ours.join("theirs"), 5555);
    refused(&ours.join("theirs"));
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    refused(Path::new("relative/path"));
    refused(&ours.join("../other/user"));
}

#[test]
fn roots_own_links_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    symlink("real", dir.path().join("link")).unwrap();
    let path = dir.path().join("link/user");
    Dir::own(&path, Who::me(), Missing::Make).unwrap().unwrap();
    assert!(dir.path().join("real/user").is_dir());
}

#[test]
fn names_in_it_are_never_followed() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    std::fs::write(&target, "x").unwrap();
    let own = Dir::own(&dir.path().join("user"), Who::me(), Missing::Make).unwrap().unwrap();
    symlink(&target, own.join("dovecot.list.index")).unwrap();
    let error = own.open("dovecot.list.index", OFlag::O_RDWR | OFlag::O_TRUNC).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    own.remove("dovecot.list.index").unwrap();
    assert!(target.exists());
    own.remove("dovecot.list.index").unwrap();
    std::fs::write(own.join("dovecot.list.index.log"), "").unwrap();
    std::fs::write(own.join("dovecot.index"), "").unwrap();
    assert_eq!(own.list_index().unwrap(), ["dovecot.list.index.log"]);
}

/// A path that leads elsewhere by mistake: nothing there changes owner or mode.
#[test]
fn a_directory_of_something_else_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let etc = dir.path().join("etc");
    std::fs::create_dir(&etc).unwrap();
    std::fs::write(etc.join("passwd"), "").unwrap();
    mode(&etc, 0o755);
    symlink(&etc, dir.path().join("user")).unwrap();
    let users: &[u32] = if root() { &[0, 4321] } else { &[Who::me().uid] };
    for uid in users {
        let user = Who { uid: *uid, gid: *uid };
        for path in [etc.clone(), dir.path().join("user")] {
            let told = Dir::own(&path, user, Missing::Make);
            assert!(matches!(told, Err(Trouble::Refused { .. })), "{told:?}");
        }
        let there = std::fs::metadata(&etc).unwrap();
        assert_eq!((there.uid(), there.mode() & 0o7777), (Who::me().uid, 0o755));
    }
}
