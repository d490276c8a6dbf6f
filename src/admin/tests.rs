use super::caches::Whom;
use super::client::{self, ClientError};
use super::place::{Registration, link_of};
use super::server::Server;
use super::*;
use parking_lot::Mutex;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

#[derive(Default)]
struct Fake {
    asked: Mutex<Vec<String>>,
    mountpoint: String,
}

#[async_trait]
impl AdminApi for Fake {
    async fn flush(
        &self,
        what: FlushRequest,
        progress: &Progress,
    ) -> Result<FlushReport, AdminError> {
        let FlushRequest { whom, important_only, .. } = what;
        self.asked.lock().push(format!("{whom:?} {important_only}"));
        match whom {
            Whom::User(user) if user == "slow" => {
                tokio::time::sleep(Duration::from_secs(8)).await;
                Ok(FlushReport { flushed: 1, ..FlushReport::default() })
            }
            Whom::User(user) if user == "nobody" => {
                Err(AdminError::new(ErrorKind::NoSuchUser, "nobody: no such user"))
            }
            Whom::User(_) => {
                progress.say("one part uploaded");
                progress.step(1, 2, "users");
                Ok(FlushReport { flushed: 1, bytes: 17, ..FlushReport::default() })
            }
            _ => Ok(FlushReport {
                failed: vec![("u1".into(), "down".into())],
                ..FlushReport::default()
            }),
        }
    }

    async fn gc(
        &self,
        what: crate::admin::gc::GcRequest,
        _progress: &Progress,
    ) -> Result<crate::admin::gc::GcReport, AdminError> {
        Ok(crate::admin::gc::GcReport { dry_run: what.dry_run, ..Default::default() })
    }

    async fn status(&self) -> Status {
        Status { mountpoint: self.mountpoint.clone(), users_open: 3, ..Status::default() }
    }

    async fn metrics(&self) -> String {
        "# EOF\n".into()
    }

    async fn stop(&self, progress: &Progress) -> Result<StopReport, AdminError> {
        for n in 0..1000 {
            progress.say(format!("step {n}"));
        }
        Ok(StopReport::default())
    }
}

struct Running {
    socket: PathBuf,
    fake: Arc<Fake>,
    _runtime: tokio::runtime::Runtime,
}

fn start(dir: &Path, name: &str) -> Running {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let socket = dir.join(name);
    let fake = Arc::new(Fake { mountpoint: format!("/m/{name}"), ..Fake::default() });
    let guard = runtime.enter();
    let server = Server::bind(&socket).unwrap();
    drop(guard);
    runtime.spawn(server.serve(fake.clone()));
    Running { socket, fake, _runtime: runtime }
}

#[test]
fn requests_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path(), "a.sock");
    let mode = std::fs::metadata(&running.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let one = |user: &str| {
        let whom = Whom::User(user.into());
        Request::Flush(FlushRequest { whom, important_only: true, min_priority: None })
    };
    let mut told = Vec::new();
    let answer = client::call(&running.socket, &one("u@x"), &mut |t| told.push(t.clone())).unwrap();
    assert!(matches!(answer, Answer::Flush(r) if r.flushed == 1 && r.bytes == 17));
    let step = Told::Step { done: 1, of: 2, what: "users".into() };
    assert_eq!(told, [Told::Line("one part uploaded".into()), step]);

    let all = Request::Flush(FlushRequest::all());
    let answer = client::call(&running.socket, &all, &mut |_| {}).unwrap();
    assert!(matches!(answer, Answer::Flush(r) if r.failed.len() == 1));
    let asked = running.fake.asked.lock().clone();
    assert_eq!(asked, ["User(\"u@x\") true", "Matching { mask: None, field: None } false"]);

    let answer = client::call(&running.socket, &Request::Status, &mut |_| {}).unwrap();
    assert!(matches!(answer, Answer::Status(s) if s.users_open == 3));

    match client::call(&running.socket, &one("nobody"), &mut |_| {}) {
        Err(ClientError::Refused(e)) => assert_eq!(e.kind, ErrorKind::NoSuchUser),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bad_request_is_answered_and_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path(), "a.sock");
    for bad in ["", "\n", "{}\n", "{\"command\":\"rm\"}\n", "\u{0}\n", &"x".repeat(5 << 20)] {
        let mut s = std::os::unix::net::UnixStream::connect(&running.socket).unwrap();
        let _ = s.write_all(bad.as_bytes());
        let _ = s.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = s.read_to_string(&mut answer);
        assert!(answer.is_empty() || answer.contains("no request"), "{answer}");
    }
    assert!(client::call(&running.socket, &Request::Status, &mut |_| {}).is_ok());
}

#[test]
fn stop_waits_for_the_end_of_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path(), "a.sock");
    let socket = running.socket.clone();
    let waiter = std::thread::spawn(move || {
        let mut lines = 0;
        // The daemon is this process here: only the connection's end can be waited for.
        let answer = client::stop(&socket, Duration::from_millis(300), &mut |_| lines += 1);
        (answer, lines)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiter.is_finished(), "the connection must outlive the answer");
    drop(running);
    let (answer, lines) = waiter.join().unwrap();
    assert!(matches!(answer.unwrap(), Answer::Stop(r) if r.at_risk.nothing()));
    assert!(lines > 0);
}

#[test]
fn mounts_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().canonicalize().unwrap();
    let run = base.join("run");
    let find = |mountpoint: Option<&Path>| client::find(&run, None, mountpoint);
    assert!(matches!(find(None), Err(ClientError::NotFound(_))));

    let (m1, m2) = (base.join("m1"), base.join("m2"));
    std::fs::create_dir(&m1).unwrap();
    std::fs::create_dir(&m2).unwrap();
    let a = start(&base, "a.sock");
    let b = start(&base, "b.sock");
    let first = Registration::new(&run, &m1, &a.socket).unwrap();
    assert_eq!(find(None).unwrap(), a.socket);
    let second = Registration::new(&run, &m2, &b.socket).unwrap();
    match find(None) {
        Err(ClientError::Several(names)) => {
            assert_eq!(names, ["--mountpoint /m/a.sock", "--mountpoint /m/b.sock"]);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(find(Some(&m2)).unwrap(), b.socket);
    assert_eq!(find(Some(&base.join("x/../m1"))).ok(), None);
    assert_eq!(client::find(&run, Some(Path::new("/s")), None).unwrap(), Path::new("/s"));

    // A killed daemon leaves its link and its socket: neither is in the way.
    drop(second);
    assert!(!link_of(&run, &m2).exists());
    let stale = base.join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    std::mem::forget(Registration::new(&run, &m2, &stale).unwrap());
    assert_eq!(find(None).unwrap(), a.socket);
    let again = start(&base, "stale.sock");
    assert!(client::call(&again.socket, &Request::Status, &mut |_| {}).is_ok());

    // A later mount's link is not removed by an earlier one's end.
    let replaced = Registration::new(&run, &m1, &b.socket).unwrap();
    drop(first);
    assert_eq!(find(Some(&m1)).unwrap(), b.socket);
    drop(replaced);
    assert!(find(Some(&m1)).is_err());
}

#[test]
fn a_socket_in_use_and_other_files_are_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path(), "a.sock");
    let guard = running._runtime.enter();
    assert_eq!(Server::bind(&running.socket).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(Server::bind(&file).is_err());
    assert!(file.exists());
    drop(guard);
}

#[test]
fn long_paths_work() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120)).join("e".repeat(120));
    std::fs::create_dir_all(&deep).unwrap();
    let running = start(&deep, "admin.sock");
    assert!(client::call(&running.socket, &Request::Status, &mut |_| {}).is_ok());
}

/// A place that cannot be looked into is not one with no mount in it.
#[test]
fn who_cannot_look_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let round = dir.path().join("round");
    std::os::unix::fs::symlink(&round, &round).unwrap();
    let told = |run: &Path, at: Option<&Path>| client::find(run, None, at).unwrap_err();
    for at in [None, Some(dir.path())] {
        assert!(matches!(told(&round, at), ClientError::NotRunning { .. }), "{at:?}");
        assert!(matches!(told(dir.path(), at), ClientError::NotFound(_)), "{at:?}");
    }
    // Nor is a mount that cannot be asked one that is not there.
    let run = dir.path().join("run");
    std::fs::create_dir(&run).unwrap();
    std::os::unix::fs::symlink(&round, run.join("m.sock")).unwrap();
    assert_eq!(client::find(&run, None, None).unwrap(), round);
    std::os::unix::fs::symlink(dir.path().join("none"), run.join("n.sock")).unwrap();
    assert_eq!(client::find(&run, None, None).unwrap(), round);
}

/// Work may take as long as it does, and a daemon that hangs is not waited for.
#[test]
fn silence_is_not_waited_for_and_long_work_is() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path(), "a.sock");
    let whom = Whom::User("slow".into());
    let slow = Request::Flush(FlushRequest { whom, important_only: false, min_priority: None });
    let patience = Duration::from_secs(6);
    let answer = client::call_within(patience, &running.socket, &slow, &mut |_| {});
    assert!(matches!(answer, Ok(Answer::Flush(r)) if r.flushed == 1));

    // The kernel lets us in; nobody ever reads.
    let silent = dir.path().join("silent.sock");
    let listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    let patience = Duration::from_millis(200);
    let ask = || client::call_within(patience, &silent, &Request::Status, &mut |_| {});
    let told = |answer| match answer {
        Err(error @ ClientError::Silent(_)) => ClientError::to_string(&error),
        other => panic!("{other:?}"),
    };
    let text = told(ask());
    assert!(text.contains(&format!("silent.sock (process {})", std::process::id())), "{text}");
    // Nor is a place in its queue waited for.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let text = told(ask());
    assert!(text.contains("silent.sock does not answer"), "{text}");
}
