//! What `docs/DURABILITY.md` promises names its proof: each test it names exists.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

/// Names in backquotes that look like a test or a file of tests.
fn named(text: &str) -> Vec<&str> {
    let quoted = text.split('`').skip(1).step_by(2);
    let tests = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")).unwrap();
    let files: Vec<String> = tests
        .map(|e| e.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    quoted
        .filter(|name| {
            let first = name.split(['/', ':']).next().unwrap();
            name.contains("::") || name.contains('/') && files.iter().any(|f| f == first)
        })
        .collect()
}

fn exists(name: &str) -> bool {
    let (file, test) = name.split_once("::").unwrap_or((name, ""));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let Ok(code) = std::fs::read_to_string(root.join(format!("{file}.rs"))) else { return false };
    test.is_empty()
        || code.lines().zip(code.lines().skip(1)).any(|(above, line)| {
            let is_test = above.contains("test]") || above.contains("#[");
            is_test && line.contains(&format!("fn {test}("))
        })
}

#[test]
fn every_promise_names_a_test_that_exists() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/DURABILITY.md");
    let text = std::fs::read_to_string(path).unwrap();
    let all = named(&text);
    assert!(all.len() > 40, "only {} tests are named", all.len());
    let missing: Vec<_> = all.into_iter().filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "no such test: {missing:?}");
    assert!(!exists("heart/crash::no_such_test"));
}
