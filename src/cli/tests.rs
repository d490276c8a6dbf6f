use super::options::parse_options;
use super::*;
use crate::admin::{
    AtRisk, Backlog, CacheUse, Changes, LeaseStatus, RequestCount, Status, StoreHealth, UserStatus,
};
use crate::config::{Config, LogFormat, Span};
use clap::CommandFactory;

fn mount_args(args: &[&str]) -> MountArgs {
    let all = ["vmailfs", "mount"].iter().chain(args);
    match Cli::try_parse_from(all).unwrap().command {
        Command::Mount(args) => *args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
    for bad in [
        &["vmailfs"][..],
        &["vmailfs", "mount", "file:///x"],
        &["vmailfs", "umount"],
        &["vmailfs", "metacache", "flush"],
        &["vmailfs", "mount", "--frobnicate"],
    ] {
        assert!(Cli::try_parse_from(bad).is_err(), "{bad:?}");
    }
    for good in [
        &["vmailfs", "mount", "--config", "/x"][..],
        &["vmailfs", "metacache", "flushall", "-i", "u*"],
        &["vmailfs", "metacache", "flush", "-u", "u@x", "-i", "--mountpoint", "/m"],
        &["vmailfs", "status", "/m", "--json"],
    ] {
        assert!(Cli::try_parse_from(good).is_ok(), "{good:?}");
    }
}

#[test]
fn flags_win_over_options_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(
        &file,
        "layout = \"%d/%n\"\nbackend = \"from-file\"\n[metacache]\nupload_interval = \"1min\"\n\
         [log]\nlevel = \"warn\"\n",
    )
    .unwrap();
    let config = format!("config={},backend=from-option,layout=%2.256Nu/%u", file.display());
    let args = mount_args(&[
        "file:///s",
        "/m",
        "-o",
        &config,
        "-o",
        "_netdev,no_allow_other,fuse.threads=3",
        "--backend",
        "from-flag",
        "--upload-interval",
        "10s",
        "--log-format",
        "json",
        "--log-level",
        "debug",
        "--set",
        "metacache.max_space=4G",
        "--single-backend",
    ]);
    let c = args.effective().unwrap();
    assert_eq!(c.backend.as_deref(), Some("from-flag"));
    assert_eq!(c.layout, "%2.256Nu/%u");
    assert_eq!(c.metacache.upload_interval, Span::secs(10));
    assert_eq!(c.metacache.max_space.0, 4 << 30);
    assert_eq!((c.fuse.threads, c.allow_other, c.single_backend), (3, false, true));
    assert_eq!((c.log.level.as_str(), c.log.format), ("debug", LogFormat::Json));
    assert_eq!(c.store.as_deref(), Some("file:///s"));

    let plain = mount_args(&["file:///s", "/m"]);
    let expected = Config {
        store: Some("file:///s".into()),
        mountpoint: Some("/m".into()),
        ..Config::default()
    };
    assert_eq!(plain.effective_in(&|_| None).unwrap(), expected);

    let env = |name: &str| match name {
        "VMAILFS_CONFIG" => Some(file.to_str().unwrap().to_owned()),
        _ => Some("trace".to_owned()),
    };
    let c = plain.effective_in(&env).unwrap();
    assert_eq!((c.backend.as_deref(), c.log.level.as_str()), (Some("from-file"), "trace"));
    let args = mount_args(&["file:///s", "/m", "-o", "log.level=error,config=/does/not/exist"]);
    assert_eq!(args.effective_in(&env).unwrap_err().code, Code::Config);
    let args = mount_args(&["file:///s", "/m", "-o", "log.level=error"]);
    assert_eq!(args.effective_in(&env).unwrap().log.level, "error");
}

#[test]
fn bad_options_are_usage_errors() {
    for (args, expected) in [
        (&["-o", "frobnicate"][..], "unknown key `frobnicate`"),
        (&["-o", "ro"], "no read-only mount"),
        (&["-o", "allow_other=perhaps"], "not yes or no"),
        (&["--set", "metacache"], "KEY=VALUE"),
        (&["--root-mode", "rwx"], "octal"),
        (&["--upload-interval", "5"], "5min"),
    ] {
        let failure = mount_args(args).effective().unwrap_err();
        assert_eq!(failure.code, Code::Usage, "{args:?}");
        assert!(failure.text.contains(expected), "{args:?}: {failure}");
    }
    let failure = mount_args(&["--config", "/does/not/exist"]).effective().unwrap_err();
    assert_eq!(failure.code, Code::Config);
    assert!(failure.text.contains("/does/not/exist"));
}

#[test]
fn what_fstab_gives_is_ignored() {
    let lists =
        ["defaults,_netdev,noauto,x-systemd.automount,nofail".to_owned(), "rw,,".to_owned()];
    assert!(parse_options(&lists).unwrap().keys.is_empty());
    let found = parse_options(&["state-dir=/x,allow_root_delete".to_owned()]).unwrap();
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(found.keys, [pair("state_dir", "/x"), pair("allow_root_delete", "yes")]);
}

#[test]
fn numbers_for_people() {
    assert_eq!(show::bytes(0), "0B");
    assert_eq!(show::bytes(1536), "1.5K");
    assert_eq!(show::bytes(2 << 30), "2.0G");
    assert_eq!(show::bytes(300 << 20), "300M");
    assert_eq!([5, 300, 4000, 200_000].map(show::age), ["5s", "5min", "1h 6min", "2 days"]);
}

#[test]
fn a_status_says_what_is_at_risk() {
    let mut s = Status {
        mountpoint: "/m".into(),
        store: "file:///s".into(),
        since: 1000,
        lease: Some(LeaseStatus { held: true, seconds_left: 100, ..LeaseStatus::default() }),
        ..Status::default()
    };
    let text = show::status(&s, 1300);
    assert!(text.starts_with("file:///s on /m\n"), "{text}");
    assert!(text.contains("for 5min") && text.contains("lease held for 1min more"), "{text}");
    assert!(text.contains("At risk: nothing: every mail"), "{text}");
    s.at_risk = AtRisk {
        users: 1,
        oldest_age: Some(7),
        changed_bytes: 4096,
        unpublished_mails: 2,
        unpublished_bytes: 2048,
        ..AtRisk::default()
    };
    s.users = (0..25)
        .map(|n| UserStatus {
            user: format!("u{n}"),
            changes: Changes::Important,
            oldest_age: Some(7),
            ..UserStatus::default()
        })
        .collect();
    s.backlog = Backlog { users_important: 25, ..Backlog::default() };
    s.requests = vec![RequestCount {
        operation: "put".into(),
        reason: "publish".into(),
        count: 12,
        failed: 1,
        bytes_out: 3 << 20,
        mean_seconds: 0.0042,
        ..RequestCount::default()
    }];
    s.caches.fscache =
        CacheUse { hits: Some(3), misses: Some(1), max: 10, used: 5, ..CacheUse::default() };
    s.store_health = StoreHealth { down_for: Some(125), outages: 2, down_seconds: 130.0 };
    let text = show::status(&s, 1300);
    for part in [
        "important changes of 1 user (4.0K), the oldest 7s old; 2 mails being written (2.0K)",
        "25 with changes to upload",
        "and 5 more",
        "1 failed",
        "3.0M out",
        "4.2 ms",
        "hits  75 %",
        "Store: DOWN for 2min; 2 outages, 2min in all",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
