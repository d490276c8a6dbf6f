//! Other people's tools read what we write. Skipped, with a word, where they are not installed.

use super::frozen;
use std::fs;
use std::path::Path;
use std::process::Command;
use vmailfs::format::head::*;
use vmailfs::format::key::*;
use vmailfs::format::listing::*;
use vmailfs::format::part::*;
use vmailfs::format::*;

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

const FOLDER: FolderId = FolderId(0x77);

fn id(counter: u64) -> ObjectId {
    ObjectId { epoch: Epoch(1), counter }
}

fn attrs(secs: i64) -> Attrs {
    Attrs { mode: 0o600, owner: None, mtime: Timestamp { secs, nanos: 5 } }
}

/// Stores a mail object as a flush would find it.
fn mail(user: &Path, counter: u64, name: &[u8], piece: Piece, bytes: &[u8]) -> KeyTail {
    let (mtime, crc) = (attrs(1_732_000_000).mtime, crc32c::crc32c(bytes));
    let key = MailKey {
        id: id(counter),
        folder: FOLDER,
        mtime,
        mode: 0o600,
        crc,
        piece,
        name: Some(name.to_vec()),
    };
    let tail = key.encode().0;
    fs::write(user.join("mail").join(tail.to_string()), bytes).unwrap();
    tail
}

fn set(sub: Sub, name: &[u8], entry: Entry) -> Line {
    Line::Set { sub, name: name.to_vec(), entry }
}

fn local(name: &[u8], size: u64) -> Line {
    set(Sub::Own, name, Entry::Local { size, attrs: attrs(3), object: None })
}

fn member(name: &[u8], content: Content) -> Member {
    Member { sub: Sub::Own, name: name.to_vec(), content }
}

fn whole(name: &[u8], bytes: &'static [u8]) -> Member {
    member(name, Content::Whole(bytes::Bytes::from_static(bytes)))
}

/// A user's directory with a folder of a base and a diff in two bundles.
fn make_user(user: &Path) {
    for dir in ["mail", "bundle"] {
        fs::create_dir(user.join(dir)).unwrap();
    }
    let one = mail(user, 1, b"1.one", Piece::Whole, b"first\n");
    let two = mail(user, 2, b"2.two", Piece::Whole, b"second\n");
    let odd = mail(user, 3, b"3.odd _\\n%41", Piece::Whole, b"third\n");
    let grow = |offset| Piece::Extent { offset, predecessor: None };
    let (a, b) = (mail(user, 4, b"m.1", grow(0), b"abcXX"), mail(user, 5, b"m.1", grow(3), b"de"));
    let entry = |object: &KeyTail, secs| {
        let object = object.clone();
        Entry::Mail { size: 6, attrs: attrs(secs), object }
    };
    let extents =
        vec![Extent { offset: 0, len: 3, object: a }, Extent { offset: 3, len: 2, object: b }];
    let base = Part {
        lines: vec![
            Line::Dir { sub: Sub::Own, attrs: attrs(1) },
            set(Sub::New, b"1.one", entry(&one, 1_700_000_001)),
            set(Sub::New, b"2.two", entry(&two, 1_700_000_002)),
            set(Sub::Cur, b"3.odd _\\n%41", entry(&odd, 1_700_000_003)),
            set(Sub::Own, b"m.1", Entry::Extents { size: 5, attrs: attrs(2), extents }),
            local(b"dovecot.index.log", 5),
            local(b"me@home", 4),
            local(b"old", 3),
        ],
        members: vec![
            whole(b"dovecot.index.log", b"12345"),
            whole(b"me@home", b"here"),
            whole(b"old", b"old"),
        ],
    };
    let tail = Content::Tail { offset: 4, bytes: bytes::Bytes::from_static(b"-appended") };
    let diff = Part {
        lines: vec![
            Line::Unset { sub: Sub::New, name: b"1.one".to_vec() },
            set(Sub::Cur, b"1.one:2,S", entry(&one, 1_700_000_001)),
            Line::Unset { sub: Sub::New, name: b"2.two".to_vec() },
            Line::Unset { sub: Sub::Own, name: b"old".to_vec() },
            local(b"dovecot.index.log", 13),
        ],
        members: vec![member(b"dovecot.index.log", tail)],
    };
    let mut parts = Vec::new();
    for (counter, kind, part) in [(6, PartKind::Base, &base), (7, PartKind::Diff, &diff)] {
        let mut bundle = BundleWriter::new(id(counter));
        bundle.add(PartKind::Base, &encode_part(&Part::default(), b"Other"));
        parts.push(bundle.add(kind, &encode_part(part, b"Archive/INBOX")));
        bundle.add(PartKind::Base, &encode_names(&[]));
        fs::write(user.join(format!("bundle/{}.tar.zst", id(counter))), bundle.finish()).unwrap();
    }
    let mut head = frozen::head();
    head.watermark = id(4);
    head.folders[1].parts = parts;
    fs::write(user.join("head"), head.encode()).unwrap();
}

/// The document's own example gives the mailbox back.
#[test]
fn reading_a_folder_by_hand() {
    if !have(&["bash", "zstd", "tar", "awk"]) {
        return;
    }
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/FORMATS.md")).unwrap();
    let (_, text) = text.split_once("<!-- the tests run this block -->\n```bash\n").unwrap();
    let (script, _) = text.split_once("```").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let user = dir.path().join("user");
    fs::create_dir(&user).unwrap();
    make_user(&user);
    sh(&user, &format!("set +o pipefail; folder=INBOX out=../out\n{script}"));

    let out = dir.path().join("out");
    let files = sh(&out, "find . -type f -not -path './parts/*' | sort");
    let due =
        "./cur/1.one:2,S\n./cur/3.odd _\\n%41\n./dovecot.index.log\n./listing\n./m.1\n./me@home\n";
    assert_eq!(files, due);
    assert_eq!(fs::read(out.join("cur/1.one:2,S")).unwrap(), b"first\n");
    assert_eq!(fs::read(out.join("cur/3.odd _\\n%41")).unwrap(), b"third\n");
    assert_eq!(fs::read(out.join("m.1")).unwrap(), b"abcde");
    assert_eq!(fs::read(out.join("dovecot.index.log")).unwrap(), b"1234-appended");
    assert_eq!(fs::read(out.join("me@home")).unwrap(), b"here");
    assert_eq!(sh(&out, "stat -c %Y 'cur/1.one:2,S'"), "1700000001\n");
}

/// The document's examples are legal.
#[test]
fn examples_in_the_document() {
    let text = include_str!("../../docs/FORMATS.md");
    // The indented block that starts with this line.
    let block = |first: &str| -> String {
        let lines = text.lines().skip_while(|line| line.strip_prefix("    ") != Some(first));
        lines.map_while(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n")).collect()
    };
    let head = Head::decode(block("{").as_bytes()).unwrap();
    assert_eq!(String::from_utf8(head.encode()).unwrap(), block("{"));
    let lines = decode_listing(block("vmailfs listing 1").as_bytes(), 10).unwrap();
    assert_eq!(encode_listing(lines.iter()), block("vmailfs listing 1"));
    let key = text.lines().find_map(|line| line.strip_prefix("    00000007-")).unwrap();
    assert!(KeyTail::parse(&format!("00000007-{key}")).is_ok());
}
