//! The file interface: random operations run on the directory under test and on a plain one,
//! and every answer and the whole tree must be the same; then odd names.
//! Each test runs on a mount and, to keep it honest, on a plain directory.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use support::fsops::{Generator, Side, difference};
use support::mount::mounted_home;
use support::scratch;

fn on_plain(test: impl Fn(&Path)) {
    let place = scratch("posix");
    test(place.path());
}

/// Runs the same operations on both; returns the sides for later comparisons.
fn same_answers(tested: &Path, plain: &Path, seed: u64, count: usize) -> (Side, Side) {
    let (mut have, mut want) = (Side::new(tested), Side::new(plain));
    let mut recent = Vec::new();
    for (n, op) in Generator::new(seed).take(count).enumerate() {
        let (a, b) = (have.run(&op), want.run(&op));
        let text: String = format!("{op:?}").chars().take(150).collect();
        recent.push(format!("{text} -> {b:?}"));
        let shown = recent.len().saturating_sub(25);
        assert_eq!(a, b, "seed {seed}, step {n}, after\n{}", recent[shown..].join("\n"));
        if n % 10 == 0 {
            let lines = difference(&have.tree(), &want.tree());
            let (lines, recent) = (lines.join("\n"), recent[shown..].join("\n"));
            assert!(lines.is_empty(), "seed {seed}, step {n}:\n{lines}\nafter\n{recent}");
        }
    }
    have.close_all();
    want.close_all();
    assert_same(&have, &want, &format!("seed {seed}, at the end"));
    (have, want)
}

fn assert_same(have: &Side, want: &Side, when: &str) {
    let lines = difference(&have.tree(), &want.tree());
    assert!(lines.is_empty(), "{when}:\n{}", lines.join("\n"));
}

/// Without what tells two names of one file from two files: of files that are no mails, a fresh
/// machine gets each name's content, but not that they are one.
fn one_name_each(tree: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let shown = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let mut kept = Vec::new();
        for (i, word) in words.iter().enumerate() {
            let count = i > 0 && words[i - 1] == "links";
            if !count && !word.starts_with('#') {
                kept.push(*word);
            }
        }
        kept.join(" ")
    };
    tree.iter().map(|(name, line)| (name.clone(), shown(line))).collect()
}

#[test]
fn random_operations_plain() {
    for seed in 0..3 {
        let (one, two) = (scratch("posix"), scratch("posix"));
        same_answers(one.path(), two.path(), seed, 1500);
    }
}

#[test]
fn random_operations() {
    let (mut mount, home) = mounted_home().unwrap();
    let mut sides = Vec::new();
    for seed in 0..3 {
        let plain = scratch("posix");
        let tested = home.join(format!("box{seed}"));
        fs::create_dir(&tested).unwrap();
        sides.push((same_answers(&tested, plain.path(), seed, 1500), plain));
    }
    mount.umount().unwrap();
    mount.mount().unwrap();
    for ((have, want), _) in &sides {
        assert_same(have, want, "after umount and mount");
    }
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    for ((have, want), _) in &sides {
        let lines = difference(&one_name_each(have.tree()), &one_name_each(want.tree()));
        assert!(lines.is_empty(), "on a fresh machine:\n{}", lines.join("\n"));
    }
    mount.umount().unwrap();
}

fn odd_names() -> BTreeSet<OsString> {
    let mut names = BTreeSet::new();
    for byte in (1..=255u8).filter(|b| *b != b'/') {
        names.insert(OsString::from_vec(vec![byte, b'x', byte]));
    }
    names.insert(OsString::from_vec(vec![b'n'; 255]));
    names.insert(OsString::from_vec((1..=255).map(|b| if b == b'/' { b'_' } else { b }).collect()));
    names.insert(OsString::from_vec(vec![0xff; 255]));
    for name in ["...", "..x", "%2F", "%", "a b", " ", "~", "-rf", "con", "a+b", "a=b,S=1:2,S"] {
        names.insert(name.into());
    }
    names
}

fn check_odd_names(home: &Path) {
    let listed: BTreeSet<OsString> =
        fs::read_dir(home).unwrap().map(|e| e.unwrap().file_name()).collect();
    let wanted = odd_names();
    let differing: Vec<_> = listed.symmetric_difference(&wanted).collect();
    assert!(differing.is_empty(), "{differing:?}");
    for name in &wanted {
        assert_eq!(fs::read(home.join(name)).unwrap(), name.as_bytes(), "{name:?}");
    }
}

fn make_odd_names(home: &Path) {
    for name in odd_names() {
        let mut file = File::create_new(home.join(&name)).unwrap();
        file.write_all(name.as_bytes()).unwrap();
    }
    let long = OsString::from_vec(vec![b'n'; 256]);
    assert_eq!(File::create(home.join(long)).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    check_odd_names(home);
}

#[test]
fn odd_names_plain() {
    on_plain(make_odd_names);
}

#[test]
fn odd_names_survive_the_store() {
    let (mut mount, home) = mounted_home().unwrap();
    for folder in ["mail", "mail/cur"] {
        fs::create_dir(home.join(folder)).unwrap();
    }
    let (cur, other) = (home.join("mail/cur"), home.join("other"));
    fs::create_dir(&other).unwrap();
    make_odd_names(&cur);
    make_odd_names(&other);
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    check_odd_names(&cur);
    check_odd_names(&other);
    mount.umount().unwrap();
}
