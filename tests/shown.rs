//! `.vmailfs` at the mount's root, with ordinary file tools.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::process::Command;
use support::MAIL_UID;
use support::mount::Mount;

#[test]
fn status_and_metrics_are_text_files_that_nobody_can_change() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let dir = mount.root().join(".vmailfs");
    fs::create_dir(mount.root().join("someone")).unwrap();
    let listed: Vec<_> =
        fs::read_dir(mount.root()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(listed, ["someone"], "it is not listed");
    let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert!(names.len() >= 3, "{names:?}");

    let status = fs::read_to_string(dir.join("status")).unwrap();
    assert!(status.contains("At risk: ") && status.contains("Users: "), "{status}");
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("status.json")).unwrap()).unwrap();
    assert_eq!(json["mountpoint"], mount.root().to_str().unwrap());
    support::openmetrics::read(&fs::read_to_string(dir.join("metrics")).unwrap()).unwrap();

    // As tools of people read it.
    for (tool, arguments) in [("tail", &["-n", "1"][..]), ("wc", &["-c"]), ("md5sum", &[])] {
        let found = Command::new(tool).args(arguments).arg(dir.join("status")).output().unwrap();
        assert!(found.status.success() && found.stdout.len() > 3, "{tool}: {found:?}");
    }
    let copy = mount.beside("copy");
    assert!(Command::new("cp").arg(dir.join("metrics")).arg(&copy).status().unwrap().success());
    support::openmetrics::read(&fs::read_to_string(&copy).unwrap()).unwrap();

    // A handle shows one moment.
    let mut file = fs::File::open(dir.join("metrics")).unwrap();
    let mut begun = [0u8; 100];
    file.read_exact(&mut begun).unwrap();
    let size = file.metadata().unwrap().len();
    for n in 0..50 {
        let _ = fs::metadata(mount.root().join(format!("someone/{n}")));
    }
    let mut rest = String::new();
    file.read_to_string(&mut rest).unwrap();
    let whole = String::from_utf8(begun.to_vec()).unwrap() + &rest;
    assert_eq!(whole.len() as u64, size);
    support::openmetrics::read(&whole).unwrap();

    for (what, done) in [
        ("write", fs::write(dir.join("status"), "x")),
        ("make", fs::write(dir.join("new"), "x")),
        ("mkdir", fs::create_dir(dir.join("d"))),
        ("mkdir of it", fs::create_dir(&dir)),
        ("remove", fs::remove_file(dir.join("status"))),
        ("rmdir", fs::remove_dir(&dir)),
        ("rename", fs::rename(dir.join("status"), mount.root().join("someone/status"))),
        ("rename of it", fs::rename(&dir, mount.root().join("other"))),
        ("link", fs::hard_link(dir.join("status"), mount.root().join("someone/status"))),
    ] {
        assert!(done.is_err(), "{what}");
    }
    let absent = fs::metadata(dir.join("none")).unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound);
    let stranger = Command::new("cat").arg(dir.join("status")).uid(MAIL_UID).gid(MAIL_UID).output();
    let stranger = stranger.unwrap();
    assert!(!stranger.status.success() && stranger.stdout.is_empty(), "{stranger:?}");
    mount.umount().unwrap();
}

#[test]
fn it_can_be_turned_off_and_is_no_users_name() {
    let mut mount = Mount::on_directory().option(&["--set", "admin.directory=false"]);
    mount.mount().unwrap();
    let dir = mount.root().join(".vmailfs");
    assert_eq!(fs::metadata(&dir).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(fs::create_dir(&dir).is_err(), "such a name is no user's");
    mount.umount().unwrap();

    let mut deep = Mount::on_directory().option(&["--set", "layout=%d/%n"]);
    deep.mount().unwrap();
    assert!(fs::read_to_string(deep.root().join(".vmailfs/status")).unwrap().contains("At risk"));
    assert!(fs::metadata(deep.root().join(".vmailfs/anna")).is_err());
    deep.umount().unwrap();

    let mut own = Mount::on_directory().option(&["--set", "layout=.vmailfs/%u"]);
    own.mount().unwrap();
    fs::create_dir(own.root().join(".vmailfs/anna")).unwrap();
    fs::write(own.root().join(".vmailfs/anna/file"), "hers").unwrap();
    assert!(own.log().contains("the layout has a directory .vmailfs"));
    own.umount().unwrap();
}
