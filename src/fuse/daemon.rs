//! The process around a mount: going to the background, systemd, signals, pid file.
//!
//! `mount(8)` and fstab want a command that returns when the mount is there and fails with a
//! reason when it is not. So the parent waits, on a pipe, for one of two words of the child:
//! that it is ready, or why it is not. A child that dies silently is a failure, too.

use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::unistd::{ForkResult, fork, pipe2, setsid};
use sd_notify::NotifyState;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use tokio::signal::unix::{SignalKind, signal};

const READY: u8 = b'+';
const FAILED: u8 = b'-';

/// The child's end of the pipe to the waiting parent.
#[derive(Debug)]
pub struct Background {
    parent: File,
}

/// What the parent reads.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Ready,
    Failed(String),
}

/// Goes on in a child of its own session. The parent does not return: it exits with 0 once
/// [`Background::ready`] is called, with 1 and the text on stderr after [`Background::failed`].
/// Relative paths stay valid until `ready`.
///
/// # Errors
/// This process has more than one thread already, or no process could be made.
pub fn daemonize() -> io::Result<Background> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("cannot go to the background: threads were started"));
    }
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    // SAFETY: there is one thread only, so no lock is held and the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => {
            drop(write);
            std::process::exit(match read_word(File::from(read)) {
                Word::Ready => 0,
                Word::Failed(text) => {
                    let _ = writeln!(io::stderr(), "{text}");
                    1
                }
            })
        }
        ForkResult::Child => {
            setsid()?;
            Ok(Background { parent: File::from(write) })
        }
    }
}

fn read_word(mut pipe: impl Read) -> Word {
    let mut said = Vec::new();
    let ended = pipe.read_to_end(&mut said);
    match (ended, said.split_first()) {
        (Ok(_), Some((&READY, _))) => Word::Ready,
        (_, Some((&FAILED, text))) => Word::Failed(String::from_utf8_lossy(text).into_owned()),
        _ => Word::Failed("vmailfs: the background process ended before it was ready".to_owned()),
    }
}

impl Background {
    /// Lets the parent exit with 0, and leaves the terminal: stdin and stdout, and without
    /// `keep_stderr` (for logs that go to a file there) stderr, become /dev/null, and the
    /// working directory `/`.
    pub fn ready(mut self, keep_stderr: bool) -> io::Result<()> {
        std::env::set_current_dir("/")?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        if !keep_stderr {
            nix::unistd::dup2_stderr(&null)?;
        }
        self.parent.write_all(&[READY])
    }

    /// Lets the parent print `text` and exit with 1.
    pub fn failed(mut self, text: &str) {
        // A parent that was killed need not be told.
        let _ = self.parent.write_all(&[&[FAILED], text.as_bytes()].concat());
    }
}

/// Tells systemd, if it started us, that the mount is there.
pub fn notify_ready(status: &str) {
    told(sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(status)]));
}

/// Tells systemd that the daemon is on its way out; a flush may follow.
pub fn notify_stopping(status: &str) {
    told(sd_notify::notify(&[NotifyState::Stopping, NotifyState::Status(status)]));
}

/// Asks systemd for more time to start or stop, in microseconds from now.
pub fn notify_extend_timeout(usec: u32) {
    told(sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(usec)]));
}

fn told(result: io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "systemd could not be told");
    }
}

/// A signal that ends the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Terminate,
    Interrupt,
    HangUp,
}

/// Waits for SIGTERM, SIGINT or SIGHUP. Once called, none of them kills the process any more,
/// also after it returned: a second call sees a second signal.
///
/// # Errors
/// The signals could not be caught.
pub async fn until_signal() -> io::Result<Stop> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    Ok(tokio::select! {
        _ = terminate.recv() => Stop::Terminate,
        _ = interrupt.recv() => Stop::Interrupt,
        _ = hang_up.recv() => Stop::HangUp,
    })
}

/// A file with this process's number, locked while it lives and removed with it.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _lock: Flock<File>,
}

impl PidFile {
    /// Call it after [`daemonize`]. What a dead process left behind is overwritten.
    ///
    /// # Errors
    /// `AlreadyExists` if a living process has it.
    pub fn create(path: &Path) -> io::Result<PidFile> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
            let text = format!("{}: held by a running process", path.display());
            io::Error::new(io::ErrorKind::AlreadyExists, text)
        })?;
        lock.set_len(0)?;
        writeln!(&mut *lock, "{}", std::process::id())?;
        Ok(PidFile { path: path.to_owned(), _lock: lock })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_understands_the_child() {
        assert_eq!(read_word(&b"+"[..]), Word::Ready);
        assert_eq!(read_word(&b"-no store"[..]), Word::Failed("no store".into()));
        assert!(matches!(read_word(&b""[..]), Word::Failed(_)));
    }

    /// The exit code of a process that goes to the background and there calls `then`.
    fn exit_code_of(then: fn(Background)) -> i32 {
        // SAFETY: the child calls little, and glibc keeps its allocator usable after a fork.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => match nix::sys::wait::waitpid(child, None).unwrap() {
                nix::sys::wait::WaitStatus::Exited(_, code) => code,
                other => panic!("{other:?}"),
            },
            ForkResult::Child => {
                let code = match daemonize() {
                    Ok(background) => {
                        then(background);
                        0
                    }
                    Err(_) => 99,
                };
                // SAFETY: ends this process without running what belongs to the test.
                unsafe { libc::_exit(code) }
            }
        }
    }

    #[test]
    fn the_parent_exits_as_the_child_says() {
        assert_eq!(exit_code_of(|background| background.ready(false).unwrap()), 0);
        assert_eq!(exit_code_of(|background| background.failed("(a test: no store)")), 1);
        assert_eq!(exit_code_of(drop), 1);
    }

    #[test]
    fn threads_are_a_reason_to_refuse() {
        assert!(daemonize().is_err());
    }

    #[test]
    fn one_process_at_a_time_has_a_pid_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        std::fs::write(&path, "left behind by somebody long gone").unwrap();
        let held = PidFile::create(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
        let error = PidFile::create(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        drop(held);
        assert!(!path.exists());
    }
}
