//! The NFS mode under a mount that dies at each of its places, and under sessions of one user at
//! the same moment. What `vmailfs nfs` does when it dies is in `hostchange.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use serde_json::Value;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Barrier, Mutex};
use std::time::Duration;
use support::mount::Mount;
use support::{mail_root, scratch, wait_until};

const FILES: [&str; 2] = ["dovecot.list.index", "dovecot.list.index.log"];

fn mount_of(nfs: &Path, host: &str, more: &[&str]) -> Mount {
    let settings = [
        "hostchange.login_idle=200ms",
        "hostchange.attribute_cache=10ms",
        "hostchange.index_dir=index",
        "hostchange.listindex_layout=%u",
    ];
    let sets: Vec<&str> = settings.iter().flat_map(|set| ["--set", set]).collect();
    Mount::on_nfs(nfs, host).option(&sets).option(more)
}

fn until_idle(mount: &Mount) {
    let root = mount.root();
    let idle = wait_until(Duration::from_secs(60), || {
        let (_, text) = mount.vmailfs(&["status", root.to_str().unwrap(), "--json"]).unwrap();
        let status: Value = serde_json::from_str(&text).unwrap();
        status["hostchange"]["active"] == 0
    });
    assert!(idle, "sessions do not end\n{}", mount.log());
}

/// A directory on "NFS", a host `a` that mounts it, and a host `b` that makes the check by command.
struct Site {
    place: tempfile::TempDir,
    nfs: PathBuf,
    plan: PathBuf,
    a: Mount,
}

impl Site {
    fn new(more: &[&str]) -> Site {
        let place = scratch("nfs-server");
        let nfs = mail_root(place.path());
        let plan = place.path().join("failpoints");
        std::fs::write(&plan, "").unwrap();
        let a = mount_of(&nfs, "a", more).variable("VMAILFS_FAILPOINTS", plan.to_str().unwrap());
        let site = Site { place, nfs, plan, a };
        std::fs::create_dir_all(site.index()).unwrap();
        site
    }

    fn index(&self) -> PathBuf {
        self.nfs.join("u/index")
    }

    fn arm(&self, point: &str) {
        std::fs::write(&self.plan, format!("{point}=kill@1")).unwrap();
    }

    /// What host `a` shows of the list index; that is an access.
    fn shown(&self) -> Vec<Option<String>> {
        let dir = self.a.root().join("u/index");
        FILES.iter().map(|file| std::fs::read_to_string(dir.join(file)).ok()).collect()
    }

    fn build(&self, text: &str) {
        let dir = self.a.root().join("u/index");
        FILES.iter().for_each(|file| std::fs::write(dir.join(file), text).unwrap());
    }

    /// Until what `a` has is kept from session to session.
    fn settle(&self, text: &str) {
        self.build(text);
        until_idle(&self.a);
        assert_eq!(self.shown(), both(text), "a keeps it\n{}", self.a.log());
        until_idle(&self.a);
    }

    /// `b` serves the user; whether what it had was kept.
    fn b_logs_in(&self) -> bool {
        let local = self.place.path().join("shm-b/u");
        let output = Command::new(env!("CARGO_BIN_EXE_vmailfs"))
            .args(["nfs", "login", "-u", "u", "--host", "b", "--settle", "0s", "--index"])
            .arg(self.index())
            .arg("--listindex")
            .arg(&local)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let kept = local.join(FILES[0]).exists();
        std::fs::write(local.join(FILES[0]), "of b").unwrap();
        kept
    }

    /// The armed place has been passed: a fresh daemon takes the dead one's place.
    fn died(&mut self, point: &str) {
        let shot = self.a.must_have_been_shot(Duration::from_secs(20));
        assert!(shot.is_ok(), "{point}: {shot:?}");
        self.a.kill9();
        std::fs::write(&self.plan, "").unwrap();
        self.a.mount().unwrap();
    }
}

fn both(text: &str) -> Vec<Option<String>> {
    vec![Some(text.to_owned()); 2]
}

const NONE: [Option<String>; 2] = [None, None];

/// Both hosts notice one another as ever.
fn goes_on(site: &Site, point: &str) {
    site.settle("after it");
    site.b_logs_in();
    assert_eq!(site.shown(), NONE, "{point}: b was not noticed\n{}", site.a.log());
    assert!(!site.b_logs_in(), "{point}: a was not noticed");
    let clean = || site.index().read_dir().unwrap().all(|e| e.unwrap().file_name() == ".lasthost");
    assert!(wait_until(Duration::from_secs(20), clean), "{point}: something is left on NFS");
}

/// Done-when 3: the check.
#[test]
fn a_mount_dies_in_the_check() {
    for point in [
        "hostchange.locked",
        "hostchange.invalidated",
        "hostchange.dropping",
        "hostchange.dropped",
        "hostchange.written",
        "hostchange.recorded",
        "hostchange.renamed",
    ] {
        let mut site = Site::new(&[]);
        site.a.mount().unwrap();
        site.settle("stale after b");
        site.b_logs_in();
        site.arm(point);
        // The first access makes the check, and the daemon dies in it.
        let _ = std::fs::read_dir(site.a.root().join("u/index"));
        site.died(point);
        assert_eq!(site.shown(), NONE, "{point}: trusts what is stale\n{}", site.a.log());
        goes_on(&site, point);
    }
}

/// Done-when 3: the end of a session that was alone, and of one that was not.
#[test]
fn a_mount_dies_at_the_end_of_a_session() {
    let alone = ["hostchange.settling"].map(|point| (point, false));
    let contested = [
        "hostchange.invalidated",
        "hostchange.dropping",
        "hostchange.written",
        "hostchange.recorded",
        "hostchange.renamed",
    ];
    for (point, contested) in alone.into_iter().chain(contested.map(|point| (point, true))) {
        let mut site = Site::new(&[]);
        site.a.mount().unwrap();
        site.build("of the session");
        if contested {
            site.b_logs_in();
            site.build("stale after b");
        }
        site.arm(point);
        site.died(point);
        let shown = site.shown();
        let fresh = !contested && shown == both("of the session");
        assert!(shown == NONE || fresh, "{point}: {shown:?}\n{}", site.a.log());
        until_idle(&site.a);
        assert!(!site.b_logs_in(), "{point}: b keeps what is stale");
        assert_eq!(site.shown(), NONE, "{point}: b was not noticed\n{}", site.a.log());
        goes_on(&site, point);
    }
}

/// Done-when 3: migration. All of the list index comes, or none of it.
#[test]
fn a_mount_dies_in_a_migration() {
    for point in ["migrate.copying", "migrate.copied", "migrate.removing", "hostchange.recorded"] {
        let mut site = Site::new(&["--set", "hostchange.migration=true"]);
        FILES.iter().for_each(|file| std::fs::write(site.index().join(file), "nfs").unwrap());
        site.a.mount().unwrap();
        site.arm(point);
        let _ = std::fs::read_dir(site.a.root().join("u/index"));
        site.died(point);
        let shown = site.shown();
        assert!(shown == both("nfs") || shown == NONE, "{point}: {shown:?}");
        FILES.iter().for_each(|f| assert!(!site.index().join(f).exists(), "{point}: on NFS"));
        goes_on(&site, point);
    }
}

/// Done-when 3: cleaning, which a mount does to stay within its size.
#[test]
fn a_mount_dies_while_it_makes_room() {
    for point in
        ["usercache.invalidated", "hostchange.dropping", "usercache.emptied", "usercache.unlocked"]
    {
        let mut site = Site::new(&[]);
        site.a.mount().unwrap();
        site.settle("whole");
        site.a.umount().unwrap();
        site.arm(point);
        // It looks at the sizes as soon as it is there.
        site.a = site.a.option(&["--set", "hostchange.listindex_max_size=1"]);
        let mut child = site.a.start().unwrap();
        assert!(wait_until(Duration::from_secs(60), || !matches!(child.try_wait(), Ok(None))));
        assert_eq!(child.wait().unwrap().signal(), Some(9), "{point} is not passed");
        site.a.kill9();
        std::fs::write(&site.plan, "").unwrap();
        site.a = site.a.option(&["--set", "hostchange.listindex_max_size=1M"]);
        site.a.mount().unwrap();
        assert_eq!(site.shown(), NONE, "{point}: half of it is trusted");
        goes_on(&site, point);
    }
}

/// By hand, or by `usercache clean 0s`: the session goes on with a new list index.
#[test]
fn a_list_index_is_removed_under_a_session() {
    let mut site = Site::new(&["--set", "hostchange.login_idle=10min"]);
    site.a.mount().unwrap();
    for round in 0..3 {
        site.build("of the session");
        assert_eq!(site.shown(), both("of the session"), "{round}");
        let local = site.a.beside("shm/list/u");
        std::fs::remove_dir_all(&local).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(site.shown(), NONE, "{round}");
        site.build("anew");
        assert_eq!(std::fs::read_to_string(local.join(FILES[1])).unwrap(), "anew");
        assert!(!site.index().join(FILES[1]).exists(), "on NFS");
    }
}

/// What one login does: it leaves a trace on NFS, and a list index that says what there is.
fn session(root: &Path, user: &str, text: &str, one_host: &Mutex<()>) {
    let dir = root.join(user).join("index");
    std::fs::metadata(&dir).unwrap();
    // Whoever logged in first may well be done last: that is what goes stale.
    std::thread::sleep(Duration::from_millis(rand::random_range(0..20)));
    // Dovecot locks its list index, too: sessions of one host do not write an older one over a newer.
    let _locked = one_host.lock().unwrap();
    let mut log = std::fs::File::options().append(true).open(dir.join("folders")).unwrap();
    log.write_all(text.as_bytes()).unwrap();
    drop(log);
    let there = std::fs::read_to_string(dir.join("folders")).unwrap();
    std::fs::write(dir.join(FILES[0]), there).unwrap();
}

/// What a host would believe at its next login: nothing, or what there is.
fn is_right(mount: &Mount, nfs: &Path, user: &str) -> bool {
    let there = std::fs::read_to_string(nfs.join(user).join("index/folders")).unwrap();
    match std::fs::read_to_string(mount.root().join(user).join("index").join(FILES[0])) {
        Ok(shown) => shown == there,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Done-when 4: two logins of each user at the same moment, on one host and on two. All users of a
/// round wait for the same session ends, or a thousand would take an hour.
fn at_the_same_moment(users: usize, rounds: usize) {
    let place = scratch("nfs-server");
    let nfs = mail_root(place.path());
    let names: Vec<String> = (0..users).map(|n| format!("u{n}")).collect();
    for name in &names {
        std::fs::create_dir_all(nfs.join(name).join("index")).unwrap();
        std::fs::write(nfs.join(name).join("index/folders"), "").unwrap();
    }
    let mut hosts = ["a", "b"].map(|host| mount_of(&nfs, host, &[]));
    hosts.iter_mut().for_each(|host| host.mount().unwrap());
    let mut kept = 0;
    for round in 0..rounds {
        // Every third round both are on the first host.
        let on = [0, usize::from(round % 3 != 0)];
        let begin = Barrier::new(2);
        let one_host = [Mutex::new(()), Mutex::new(())];
        std::thread::scope(|scope| {
            for (who, host) in on.into_iter().enumerate() {
                let (begin, names, root) = (&begin, &names, hosts[host].root());
                let lock = &one_host[host];
                scope.spawn(move || {
                    for name in names {
                        begin.wait();
                        session(&root, name, &format!("{round}.{who} "), lock);
                    }
                });
            }
        });
        hosts.iter().for_each(until_idle);
        // The next login, on either host: mostly on the one that might keep what it has. The other
        // one's comes after it has ended.
        let keeper = |name: &String| {
            let last = std::fs::read_to_string(nfs.join(name).join("index/.lasthost")).unwrap();
            usize::from(last == "b\n")
        };
        let first: Vec<usize> = (0..)
            .zip(&names)
            .map(|(n, name)| if (round + n) % 4 > 0 { keeper(name) } else { 1 - keeper(name) })
            .collect();
        for turn in [0, 1] {
            for (name, first) in names.iter().zip(&first) {
                let host = if turn == 0 { *first } else { 1 - *first };
                let right = is_right(&hosts[host], &nfs, name);
                assert!(right, "round {round}: {name} on {host}\n{}", hosts[host].log());
            }
            hosts.iter().for_each(until_idle);
        }
        let there = |name: &&String| {
            hosts[0].beside("shm/list").join(name.as_str()).join(FILES[0]).exists()
        };
        kept += names.iter().filter(there).count();
    }
    println!("{users} users, {rounds} rounds: {kept} list indexes kept by the first host");
}

#[test]
fn two_logins_at_the_same_moment() {
    at_the_same_moment(20, 6);
}

/// The thousand, on mounts: `cargo test --test hostchange_sessions -- --ignored`.
#[test]
#[ignore = "two minutes; its short form always runs"]
fn two_logins_at_the_same_moment_a_thousand_times() {
    at_the_same_moment(50, 40);
}
