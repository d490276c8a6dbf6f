//! Other people's tools read what we write. Skipped, with a word, where they are not installed.

use super::frozen;
use std::fs;
use std::path::Path;
use std::process::Command;

fn sh(dir: &Path, script: &str) -> String {
    let script = format!("set -e; export LC_ALL=C TZ=UTC; {script}");
    let out =
        Command::new("bash").args(["-o", "pipefail", "-c", &script]).current_dir(dir).output();
    let out = out.unwrap();
    assert!(out.status.success(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
    assert!(out.stderr.is_empty(), "{script}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn have(tools: &[&str]) -> bool {
    let there = |tool: &&str| Command::new(tool).arg("--version").output().is_ok();
    let missing: Vec<_> = tools.iter().filter(|tool| !there(tool)).collect();
    if !missing.is_empty() {
        eprintln!("skipped: {missing:?} not installed");
    }
    missing.is_empty()
}

#[test]
fn zstd_and_tar_read_a_bundle() {
    if !have(&["bash", "zstd", "tar"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (refs, bytes) = frozen::bundle();
    fs::write(dir.path().join("b.tar.zst"), &bytes).unwrap();

    sh(dir.path(), "zstd -q -t b.tar.zst");
    let list = sh(dir.path(), "zstd -dc b.tar.zst | tar -tvif -");
    let names: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    assert_eq!(names[0], "INBOX/@listing", "{list}");
    for due in [
        "INBOX/dovecot-uidlist",
        "INBOX/cur/dovecot-uidlist",
        "./@listing-diff",
        "./dovecot.index.log@tail-1184",
        "./me%40home@blocks-9-4",
        "@names",
        "@dropped",
        "@head",
    ] {
        assert!(names.contains(&due), "{due} is not in\n{list}");
    }
    assert!(list.contains(&format!("INBOX/long-{}", "n".repeat(250))), "{list}");
    // Attributes are shown as the listing has them.
    let line = list.lines().find(|line| line.ends_with("INBOX/dovecot-uidlist")).unwrap();
    assert!(line.starts_with("-rw-------") && line.contains(" 5 2024-11-22 00:00 "), "{line}");

    // One part by its range, without -i.
    let (from, len) = (refs[0].offset + 1, refs[0].len);
    let part = format!("tail -c +{from} b.tar.zst | head -c {len} | zstd -dc | tar -xf -");
    sh(dir.path(), &part);
    let inbox = dir.path().join("INBOX");
    assert_eq!(fs::read(inbox.join("dovecot-uidlist")).unwrap(), b"3 V1\n");
    assert_eq!(fs::read(inbox.join("cur/dovecot-uidlist")).unwrap(), b"in cur");
    assert!(fs::read_to_string(inbox.join("@listing")).unwrap().starts_with("vmailfs listing 1\n"));
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"100%25 %40 \t\n\xff");
    assert_eq!(fs::read(inbox.join(odd)).unwrap(), b"");
}
