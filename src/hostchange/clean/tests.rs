use super::*;
use crate::hostchange::creds::Who;
use crate::hostchange::place::Missing;
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(86_400);

fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64
}

/// A user's directory that was used so many days ago.
fn user(root: &Path, name: &str, days: u32, bytes: usize) -> PathBuf {
    let path = root.join(name);
    Dir::own(&path, Who::me(), Missing::Make).unwrap().unwrap();
    let used = SystemTime::now() - DAY * days;
    for (file, size) in
        [("dovecot.list.index", bytes), ("dovecot.list.index.log", 10), (LASTHOST, 3)]
    {
        std::fs::write(path.join(file), vec![b'x'; size]).unwrap();
        let times = std::fs::FileTimes::new().set_accessed(used).set_modified(used);
        std::fs::File::options()
            .write(true)
            .open(path.join(file))
            .unwrap()
            .set_times(times)
            .unwrap();
    }
    path
}

#[test]
fn only_who_was_away_long_enough_is_cleaned() {
    let root = tempfile::tempdir().unwrap();
    let old = user(root.path(), "0a/old", 8, 100);
    let new = user(root.path(), "0b/new", 6, 100);
    assert!(matches!(clean(&new, 7 * DAY, now()).unwrap(), Cleaned::Used(_)));
    assert!(new.join("dovecot.list.index").exists());
    assert!(matches!(clean(&old, 7 * DAY, now()).unwrap(), Cleaned::Removed(n) if n > 0));
    assert!(!old.exists());
    assert_eq!(clean(&old, 7 * DAY, now()).unwrap(), Cleaned::Absent);
    // A login a moment ago counts, whatever the other files say.
    let back = user(root.path(), "0c/back", 8, 100);
    super::super::lock::touch_in(&Dir::existing(&back).unwrap().unwrap()).unwrap();
    assert!(matches!(clean(&back, 7 * DAY, now()).unwrap(), Cleaned::Used(_)));
    // And so does a session that goes on.
    let busy = user(root.path(), "0d/busy", 8, 100);
    std::fs::write(busy.join("dovecot.list.index.log"), "more").unwrap();
    assert!(matches!(clean(&busy, 7 * DAY, now()).unwrap(), Cleaned::Used(_)));
}

#[test]
fn who_is_logging_in_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let path = user(root.path(), "u", 8, 100);
    let dir = Dir::existing(&path).unwrap().unwrap();
    let locked = Locked::new(&dir, Duration::ZERO).unwrap();
    assert_eq!(clean(&path, 7 * DAY, now()).unwrap(), Cleaned::Busy);
    drop(locked);
    assert!(matches!(clean(&path, 7 * DAY, now()).unwrap(), Cleaned::Removed(_)));
}

#[test]
fn what_is_not_ours_is_not_touched() {
    let root = tempfile::tempdir().unwrap();
    let path = user(root.path(), "u", 8, 100);
    std::fs::write(path.join("something"), "else").unwrap();
    assert!(matches!(clean(&path, DAY, now()).unwrap(), Cleaned::Removed(_)));
    assert_eq!(std::fs::read_to_string(path.join("something")).unwrap(), "else");
    assert!(clean(&path, DAY, now()).is_err(), "no user's directory");
    let link = root.path().join("link");
    let old = user(root.path(), "old", 8, 10);
    std::os::unix::fs::symlink(&old, &link).unwrap();
    assert_eq!(clean_all(root.path(), None, None, now(), &|_| false).unwrap().kept, 1);
}

#[test]
fn all_of_a_root_by_age_and_by_budget() {
    let root = tempfile::tempdir().unwrap();
    for (name, days) in [("a/one", 10), ("a/two", 5), ("b/three", 3), ("b/four", 1)] {
        user(root.path(), name, days, 100_000);
    }
    let listed = list(root.path()).unwrap();
    let names = |entries: &[Entry]| -> Vec<String> {
        entries.iter().map(|e| e.path.file_name().unwrap().to_str().unwrap().into()).collect()
    };
    assert_eq!(names(&listed), ["one", "two", "three", "four"]);
    assert!(listed.iter().all(|e| e.size >= 100_000 && e.state == EntryState::Invalid));
    let swept = clean_all(root.path(), Some(7 * DAY), None, now(), &|_| false).unwrap();
    assert_eq!((swept.removed, swept.kept), (1, 3));
    // The next in age goes for the budget, but for one that is in use.
    let budget = listed[1].size + listed[2].size;
    let spared = |path: &Path| path.ends_with("two");
    let swept = clean_all(root.path(), Some(7 * DAY), Some(budget), now(), &spared).unwrap();
    assert_eq!((swept.removed, swept.kept, swept.failed.len()), (1, 2, 0));
    assert_eq!(names(&list(root.path()).unwrap()), ["two", "four"]);
    assert!(swept.left <= budget);
}
