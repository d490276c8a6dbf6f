//! Every command line in the tables of `docs/ADMIN.md` runs, and ends with the exit code that stands
//! there; and what stands beside a line of obox is that line in our name.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use support::mount::Mount;

struct Line {
    obox: Option<String>,
    ours: String,
    exit: i32,
}

/// The rows of all tables with a column `exit`.
fn lines(text: &str) -> Vec<Line> {
    let mut found = Vec::new();
    let mut column = None;
    for line in text.lines() {
        if !line.starts_with('|') {
            column = None;
            continue;
        }
        let hidden = line.replace("\\|", "\u{1}");
        let cells: Vec<String> = hidden
            .trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().replace('\u{1}', "|"))
            .collect();
        if let Some(at) = cells.iter().position(|cell| cell == "exit") {
            column = Some(at);
            continue;
        }
        let Some(at) = column else { continue };
        if cells[0].starts_with("---") {
            continue;
        }
        let code = |cell: &String| cell.trim_matches('`').to_owned();
        found.push(Line {
            obox: (at == 2).then(|| code(&cells[0])),
            ours: code(&cells[at - 1]),
            exit: cells[at].parse().unwrap_or_else(|_| panic!("{line}")),
        });
    }
    found
}

/// Words as a shell makes them of a line: only single quotes are known.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(|word| word.trim_matches('\'').to_owned()).collect()
}

fn bundle(store: &Path) -> PathBuf {
    let mut dirs = vec![store.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                dirs.push(path);
            } else if path.to_str().unwrap().ends_with(".tar.zst") {
                return path.strip_prefix(store).unwrap().to_owned();
            }
        }
    }
    panic!("no bundle in the store")
}

#[test]
fn every_line_ends_as_the_tables_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/ADMIN.md");
    let all = lines(&fs::read_to_string(path).unwrap());
    assert!(all.len() > 30, "only {} lines", all.len());

    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    for user in ["anna", "busy", "clean"] {
        fs::create_dir(mount.root().join(user)).unwrap();
        fs::write(mount.root().join(user).join("subscriptions"), "a\n").unwrap();
    }
    assert!(mount.vmailfs(&["metacache", "flushall"]).unwrap().0);
    let held = fs::File::open(mount.root().join("busy/subscriptions")).unwrap();
    let list = mount.beside("list");
    fs::write(&list, "anna\nbusy\n").unwrap();
    let store = PathBuf::from(mount.store().strip_prefix("file://").unwrap());
    let bundle = bundle(&store);

    let mut wrong = Vec::new();
    for (number, line) in all.iter().enumerate() {
        if let Some(obox) = &line.obox {
            let in_our_name = obox.replacen("doveadm", "vmailfs", 1);
            assert_eq!(in_our_name, line.ours, "not the same words");
        }
        // Something to flush.
        let _ = fs::write(mount.root().join("anna/subscriptions"), format!("{number}\n"));
        let dir = mount.beside(&format!("dir{number}"));
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let filled: Vec<String> = words(&line.ours)
            .into_iter()
            .map(|word| match word.as_str() {
                "ANNA" => "anna".to_owned(),
                "NOBODY" => "nobody".to_owned(),
                "CLEAN" => "clean".to_owned(),
                "BUSY" => "busy".to_owned(),
                "LIST" => path(&list),
                "BUNDLE" => path(&bundle),
                "DIR" => path(&dir),
                "FSCACHE" => path(&mount.state().join("fscache")),
                _ => word,
            })
            .collect();
        assert_eq!(filled[0], "vmailfs");
        let arguments: Vec<&str> = filled[1..].iter().map(String::as_str).collect();
        let (code, out, err) = mount.exit_of(&arguments).unwrap();
        if code != Some(line.exit) {
            wrong.push(format!("{}: {code:?}, not {}: {out}{err}", line.ours, line.exit));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    drop(held);
    mount.umount().unwrap();
}
