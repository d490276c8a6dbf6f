use super::*;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

/// Every optional key set, so that the serialized form shows all keys.
fn full() -> Config {
    let mut c = Config::default();
    for key in KEYS.iter().filter(|k| !k.example.is_empty() || k.secret) {
        c.set(key.name, if key.secret { "x" } else { key.example }).unwrap();
    }
    c
}

fn names(table: &toml::Table) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(t) => out.extend(t.keys().map(|k| format!("{name}.{k}"))),
            _ => drop(out.insert(name.clone())),
        }
    }
    out
}

#[test]
fn the_table_of_keys_is_the_struct() {
    let table = toml::Table::try_from(full()).unwrap();
    let known: BTreeSet<String> = KEYS.iter().map(|k| k.name.to_owned()).collect();
    assert_eq!(names(&table), known);
    assert_eq!(KEYS.len(), known.len(), "a key stands twice");
}

#[test]
fn printed_defaults_read_back() {
    let text = Config::default().print().unwrap();
    assert_eq!(Config::parse(&text).unwrap(), Config::default());
    for key in KEYS {
        let name = key.name.rsplit('.').next().unwrap();
        assert!(
            text.lines().any(|l| l.trim_start_matches("# ").starts_with(&format!("{name} = ")))
        );
    }
    assert!(text.lines().all(|l| l.len() <= 100), "{text}");
}

#[test]
fn commented_examples_are_legal() {
    let mut text = String::new();
    for line in Config::default().print().unwrap().lines() {
        let key = line.strip_prefix("# ").filter(|l| {
            KEYS.iter()
                .any(|k| l.starts_with(&format!("{} = ", k.name.rsplit('.').next().unwrap())))
        });
        text.push_str(key.unwrap_or(line));
        text.push('\n');
    }
    Config::parse(&text).unwrap();
}

#[test]
fn effective_values_are_printed_and_secrets_are_not() {
    let mut c = full();
    c.set("s3.secret_access_key", "hush-hush").unwrap();
    c.set("s3.session_token", "hush-hush").unwrap();
    let text = c.print().unwrap();
    assert!(!text.contains("hush"), "{text}");
    assert!(!format!("{c:?}").contains("hush"));
    let mut expected = c.clone();
    expected.s3.secret_access_key = None;
    expected.s3.session_token = None;
    assert_eq!(Config::parse(&text).unwrap(), expected);
}

#[test]
fn sizes_and_times() {
    for (text, bytes) in
        [("0", 0), ("17", 17), ("17B", 17), ("4k", 4096), ("512M", 512 << 20), ("2GiB", 2 << 30)]
    {
        assert_eq!(text.parse::<Size>().unwrap().0, bytes, "{text}");
    }
    for text in ["", "G", "1.5G", "-1", "2X", "99999999999T", "1 2"] {
        assert!(text.parse::<Size>().is_err(), "{text}");
    }
    for (text, ms) in [
        ("0", 0),
        ("500ms", 500),
        ("30s", 30_000),
        ("30 secs", 30_000),
        ("5min", 300_000),
        ("5 mins", 300_000),
        ("2h", 7_200_000),
        ("7days", 604_800_000),
        ("1week", 604_800_000),
    ] {
        assert_eq!(text.parse::<Span>().unwrap().0, Duration::from_millis(ms), "{text}");
    }
    for text in ["", "5", "min", "5 parsecs", "-1s", "99999999999999999999s"] {
        assert!(text.parse::<Span>().is_err(), "{text}");
    }
    for text in ["500ms", "30s", "5min", "2h", "7days", "90s", "25h"] {
        assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
    }
    for text in ["0", "1000", "4K", "512M", "2G", "3T"] {
        assert_eq!(text.parse::<Size>().unwrap().to_string(), text);
    }
    assert_eq!("0750".parse::<Mode>().unwrap().0, 0o750);
    assert!("rwx".parse::<Mode>().is_err());
}

#[test]
fn errors_are_one_line_with_place_and_remedy() {
    let say = |text: &str| {
        let e = Config::parse(text).unwrap_err().to_string();
        assert!(!e.contains('\n'), "{e}");
        e
    };
    let e = say("store = \"file:///x\"\n\n[metacache]\nmax_spice = \"1G\"\n");
    assert_eq!(e, "line 4: unknown key `max_spice`; is `metacache.max_space` meant?");
    assert!(
        say("frobnicate = 1\n").starts_with("line 1: unknown key `frobnicate`; `vmailfs config`")
    );
    assert!(
        say("upload_interval = \"5min\"\n")
            .contains("does not belong here; there is `metacache.up")
    );
    assert!(
        say("[fscache]\nmax_size = \"2 gallons\"\n").contains("line 2: `2 gallons` is no size")
    );
    assert!(say("[metacache]\nupload_interval = 300\n").contains("with its unit"));
    assert!(say("root_mode = 755\n").contains("in quotes"));
    assert!(say("[fscache\n").starts_with("line 1: "));
    assert!(say("[log]\nformat = \"xml\"\n").contains("xml"));
    assert!(say("allow_other = \"yes\"\n").starts_with("line 1: "));
}

#[test]
fn set_takes_text_of_every_kind() {
    let mut c = Config::default();
    c.set("fuse.threads", "4").unwrap();
    c.set("allow_other", "no").unwrap();
    c.set("metacache.upload_interval", "10s").unwrap();
    c.set("s3.checksums", "when_required").unwrap();
    assert_eq!((c.fuse.threads, c.allow_other), (4, false));
    assert_eq!(c.metacache.upload_interval, Span::secs(10));
    assert_eq!(c.s3.checksums, Checksums::WhenRequired);
    let e = c.set("fuse.threads", "many").unwrap_err().to_string();
    assert_eq!(e, "fuse.threads: `many` is not a number");
    assert!(c.set("fuse.thread", "4").unwrap_err().to_string().contains("is `fuse.threads` meant"));
    assert!(c.set("fuse", "4").is_err());
    assert!(c.set("metacache.upload_interval", "5").is_err());
}

fn usable(dir: &Path) -> Config {
    let mnt = dir.join("mnt");
    std::fs::create_dir_all(&mnt).unwrap();
    Config {
        store: Some(format!("file://{}/store", dir.display())),
        mountpoint: Some(mnt),
        state_dir: Some(dir.join("state")),
        backend: Some("mx1".into()),
        ..Config::default()
    }
}

#[test]
fn paths_default_to_the_state_directory() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().canonicalize().unwrap();
    let mut c = usable(&base);
    c.owner = Some("0:0".into());
    let s = c.resolve().unwrap();
    assert_eq!(s.fscache[0].path, base.join("state/fscache"));
    assert_eq!(s.metacache.path, base.join("state/metacache"));
    assert_eq!(s.admin_socket, base.join("state/admin.sock"));
    assert_eq!(s.owner, Some(Owner { uid: 0, gid: 0 }));
    assert_eq!((s.fscache.len(), s.fscache[0].max_size), (1, 2 << 30));
    c.state_dir = None;
    let s = c.resolve().unwrap();
    assert_eq!(s.state_dir, Path::new("/var/lib/vmailfs").join(escape_path(&base.join("mnt"))));
}

#[test]
fn contradictions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().canonicalize().unwrap();
    let at = |p: &str| base.join(p).display().to_string();
    let cases: &[(&[(&str, String)], &str)] = &[
        (&[("staging.path", at("state/fscache/x"))], "staging.path lies inside fscache.path"),
        (&[("staging.path", at("c")), ("fscache.path", at("c"))], "are the same directory"),
        (&[("metacache.path", at("store/x"))], "metacache.path lies inside store"),
        (&[("state_dir", at("mnt/state"))], "the mount point"),
        (&[("store", format!("file://{}", at("mnt")))], "the mount point"),
        (&[("fscache.path", at("y/../mnt/x"))], "the mount point"),
        (&[("admin.socket", at("mnt/sock"))], "the mount point"),
        (&[("fscache.max_size", "0".into())], "at least 1M"),
        (&[("store_limits.lease", "9s".into())], "at least 10s"),
        (&[("store_limits.lease", "30s".into())], "shorter than lease"),
        (&[("store_limits.attempts", "0".into())], "at least 1"),
        (&[("metacache.folder_change_quiet", "6s".into())], "longer than"),
        (&[("s3.access_key_id", "a".into())], "only work together"),
        (&[("s3.endpoint", "localhost:1".into())], "must begin with"),
        (&[("backend", "a/b".into())], "letters, digits"),
        (&[("owner", "no-such-account".into())], "there is no account"),
        (&[("store", "ftp://x".into())], "use file:///some/dir or s3://"),
        (&[("store", "nfs://server/x".into())], "where NFS is mounted"),
        (&[("hostchange.listindex_root", at("mnt/x"))], "the mount point"),
        (&[("hostchange.index_dir", "a/../../b".into())], "leads out"),
        (&[("hostchange.login_idle", "1s".into())], "twice hostchange.attribute_cache"),
        (&[("store", "file://x".into())], "absolute path"),
        (&[("store", "s3:///x".into())], "s3://bucket"),
        (&[("mountpoint", at("absent"))], "create it first"),
    ];
    usable(&base).resolve().unwrap();
    for (settings, expected) in cases {
        let mut c = usable(&base);
        for (key, value) in *settings {
            c.set(key, value).unwrap();
        }
        let e = c.resolve().expect_err(&format!("{settings:?}")).to_string();
        assert!(e.contains(expected) && !e.contains('\n'), "{settings:?}: {e}");
    }
    assert!(Config::default().resolve().unwrap_err().to_string().contains("no store given"));
}

#[test]
fn escaped_paths_are_unique_file_names() {
    let e = |p: &str| escape_path(Path::new(p));
    assert_eq!(e("/var/dovecot/vmail"), "var-dovecot-vmail");
    assert_eq!(e("/"), "-");
    assert_ne!(e("/a-b"), e("/a/b"));
    assert_eq!(e("/.x/ü"), "%2ex-%c3%bc");
    let long = format!("/{}", "x/".repeat(300));
    assert!(e(&long).len() < 220);
    assert_ne!(e(&long), e(&format!("{long}y")));
}

fn resolved(text: &str) -> Result<Settings, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::parse(text)?;
    config.store = Some("file:///srv/nothing".into());
    config.mountpoint = Some(dir.path().into());
    config.state_dir = Some("/var/lib/x".into());
    config.resolve()
}

#[test]
fn there_may_be_several_fscaches() {
    let places = |text: &str| -> Vec<(String, u64)> {
        let all = resolved(text).unwrap().fscache;
        all.into_iter().map(|c| (c.path.display().to_string(), c.max_size >> 20)).collect()
    };
    let place = |path: &str, size| (path.to_owned(), size);
    let two = "[[fscache]]\npath = \"/a\"\nmax_size = \"5M\"\n[[fscache]]\npath = \"/b\"\n";
    assert_eq!(places(two), [place("/a", 5), place("/b", 2048)]);
    let split = "[fscache]\npath = \"/c/%4Nu/x\"\nmax_size = \"512M\"\n";
    let four = ["/c/0/x", "/c/1/x", "/c/2/x", "/c/3/x"];
    assert_eq!(places(split), four.map(|path| place(path, 512)));
    // They are printed as they are read, and are no place for an option.
    let mut config = Config::parse(two).unwrap();
    let text = config.print().unwrap();
    assert_eq!(Config::parse(&text).unwrap(), config, "{text}");
    assert!(config.set("fscache.path", "/c").unwrap_err().0.contains("several [[fscache]]"));
    let refused = |text: &str, why: &str| {
        let error = resolved(text).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused("fscache = []\n", "several [[fscache]]");
    refused("[[fscache]]\n[[fscache]]\npath = \"/b\"\n", "needs a path");
    refused(&two.replace("/b", "/a"), "the same directory");
    refused(&two.replace("/b", "/a/b"), "lies inside");
    refused(&two.replace("5M", "5K"), "at least 1M");
    refused(&two.replace("/b", "/b/%4Nu"), "exclude each other");
    refused("[fscache]\npath = \"/c/%u\"\n", "%<1 to 256>Nu");
    refused("[[fscache]]\nmax_size = \"x\"\n", "line 2: `x` is no size");
    refused("[store_limits]\nstream_memory = \"1M\"\n", "at least 8M");
}
