//! A mail server that delivers to a Maildir by plain system calls, as Postfix's virtual(8) does,
//! and keeps in its queue what it could not deliver.

use super::messages::Message;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// The call that failed, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Refusal {
    pub call: &'static str,
    pub errno: i32,
}

impl Refusal {
    /// Whether Postfix keeps the mail for a later try and does not send it back.
    pub fn deferred(self) -> bool {
        matches!(self.errno, libc::EAGAIN | libc::ENOSPC | libc::ESTALE)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.call, io::Error::from_raw_os_error(self.errno))
    }
}

fn refused(call: &'static str) -> impl Fn(io::Error) -> Refusal {
    move |error| Refusal { call, errno: error.raw_os_error().unwrap_or(0) }
}

/// Delivers a mail with LF line ends. Where `make` says so, missing directories are made first.
/// What is left in `tmp/` after a failure is removed, as virtual(8) does.
pub fn deliver(maildir: &Path, mail: &Message, make: bool) -> Result<(), Refusal> {
    static COUNTER: AtomicUsize = AtomicUsize::new(0);
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let tmp = maildir.join(format!("tmp/{}.P{number}.host.test", time.as_secs()));
    let create = || File::options().write(true).create_new(true).mode(0o600).open(&tmp);
    let file = match create() {
        Err(e) if make && e.kind() == io::ErrorKind::NotFound => {
            for sub in ["tmp", "new", "cur"] {
                fs::create_dir_all(maildir.join(sub)).map_err(refused("mkdir"))?;
            }
            create()
        }
        file => file,
    };
    let file = file.map_err(refused("create"))?;
    let done = fill_and_link(maildir, mail, &tmp, file, time, number);
    // A mail that has its name is delivered, whatever becomes of the other one.
    let _ = fs::remove_file(&tmp);
    done
}

fn fill_and_link(
    maildir: &Path,
    mail: &Message,
    tmp: &Path,
    mut file: File,
    time: Duration,
    number: usize,
) -> Result<(), Refusal> {
    let bytes: Vec<u8> = mail.bytes.iter().copied().filter(|&c| c != b'\r').collect();
    for part in bytes.chunks(4096) {
        file.write_all(part).map_err(refused("write"))?;
    }
    file.sync_all().map_err(refused("fsync"))?;
    let meta = file.metadata().map_err(refused("fstat"))?;
    nix::unistd::close(file).map_err(|e| Refusal { call: "close", errno: e as i32 })?;
    let (dev, ino) = (meta.dev(), meta.ino());
    let name = format!("{}.V{dev:x}I{ino:x}M{number}.host.test", time.as_secs());
    fs::hard_link(tmp, maildir.join("new").join(name)).map_err(refused("link"))
}

/// How long calls took, of one kind.
#[derive(Debug, Clone, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    /// Runs it and notes how long it took.
    pub fn take<T>(&mut self, run: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let done = run();
        self.0.push(start.elapsed());
        done
    }

    pub fn add(&mut self, other: Times) {
        self.0.extend(other.0);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The time within which this part of them ended; 1.0 is the longest.
    pub fn within(&self, part: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let index = (sorted.len() as f64 * part).ceil() as usize;
        sorted.get(index.saturating_sub(1)).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (half, p99, max) = (self.within(0.5), self.within(0.99), self.within(1.0));
        write!(f, "{} calls, p50 {half:.1?}, p99 {p99:.1?}, max {max:.1?}", self.count())
    }
}

/// Makes this thread act as the mail user, and no other thread.
pub fn become_mail_user() {
    let (keep, id) = (u32::MAX, super::MAIL_UID);
    // SAFETY: plain system calls. The raw ones change the calling thread only, which is what is
    // wanted here; the C library's would change all threads.
    let failed = unsafe {
        libc::syscall(libc::SYS_setresgid, keep, id, keep) != 0
            || libc::syscall(libc::SYS_setresuid, keep, id, keep) != 0
    };
    assert!(!failed, "cannot become uid {id}");
}
