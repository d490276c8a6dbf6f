//! Appending to Dovecot's index logs while Dovecot runs.
//!
//! Dovecot locks `dovecot.index.log` (fcntl) while it assigns UIDs and appends, and writes at the
//! end that it saw. Whoever else appends must hold that lock, and the kernel must see the write,
//! or Dovecot would write over it. Locks of a mount are the kernel's own business, so both are
//! done through the mount, as any mail process does it: by a process of its own (`vmailfs
//! index-lock`), because a daemon that waits for its own mount cannot be killed.
//!
//! The two talk over a pipe: the child says `locked` and the log's length; then it gets `append`,
//! an offset and a length, and the bytes; it answers `done`. The lock goes with the child.

use super::exit::{Code, Failure};
use crate::dovecot::recover::LogAppend;
use crate::vmail::bring_back::{LockedLog, LogFile, LogWriter};
use crate::vmail::error::{Error, Result};
use crate::vmail::session::UserCell;
use async_trait::async_trait;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long Dovecot may hold a lock; its own limit is three minutes.
const PATIENCE: Duration = Duration::from_secs(60);
/// More is not appended at once: a record for each mail.
const MOST: u64 = 64 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct ThroughMount {
    pub mountpoint: PathBuf,
}

struct Locked {
    child: Child,
    answers: BufReader<ChildStdout>,
    len: u64,
}

impl Drop for Locked {
    fn drop(&mut self) {
        // The end of its input ends it; a kill is for one that hangs.
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn failed(what: impl std::fmt::Display) -> Error {
    Error::Full(format!("index log: {what}"))
}

#[async_trait]
impl LogWriter for ThroughMount {
    async fn lock(&self, cell: &Arc<UserCell>, log: &LogFile) -> Result<Box<dyn LockedLog>> {
        let user = cell.path.iter().fold(self.mountpoint.clone(), |p, name| p.join(name));
        let path = log.path.iter().fold(user, |p, name| p.join(OsStr::from_bytes(name)));
        let locked = tokio::task::spawn_blocking(move || start(&path)).await;
        locked.map_err(failed)?.map(|l| Box::new(Handle(Some(l))) as Box<dyn LockedLog>)
    }
}

fn start(path: &Path) -> Result<Locked> {
    let mut child = Command::new("/proc/self/exe")
        .arg("index-lock")
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let Some(stdout) = child.stdout.take() else { return Err(failed("no pipe")) };
    let mut locked = Locked { child, answers: BufReader::new(stdout), len: 0 };
    let line = locked.answer()?;
    let len = line.strip_prefix("locked ").and_then(|n| n.parse().ok());
    locked.len = len.ok_or_else(|| failed(&line))?;
    Ok(locked)
}

impl Locked {
    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.answers.read_line(&mut line).map_err(failed)? {
            0 => Err(failed("the process that locks it ended early")),
            _ => Ok(line.trim_end().to_owned()),
        }
    }

    fn append(&mut self, append: &LogAppend) -> Result<()> {
        if append.at as u64 != self.len {
            return Err(failed("it ends in a torn write; try again once its user has logged in"));
        }
        let Some(stdin) = &mut self.child.stdin else { return Err(failed("no pipe")) };
        writeln!(stdin, "append {} {}", append.at, append.bytes.len())
            .and_then(|()| stdin.write_all(&append.bytes))
            .and_then(|()| stdin.flush())
            .map_err(failed)?;
        match self.answer()?.as_str() {
            "done" => Ok(()),
            other => Err(failed(other)),
        }
    }
}

/// Moved to a thread that may block, and back.
struct Handle(Option<Locked>);

#[async_trait]
impl LockedLog for Handle {
    async fn append(&mut self, append: &LogAppend) -> Result<()> {
        let Some(mut locked) = self.0.take() else { return Err(failed("not locked any more")) };
        let append = append.clone();
        let done = tokio::task::spawn_blocking(move || {
            let done = locked.append(&append);
            (locked, done)
        });
        let (locked, done) = done.await.map_err(failed)?;
        self.0 = Some(locked);
        done
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Its end may have to wait for the mount, and so for us.
        let locked = self.0.take();
        std::thread::spawn(move || drop(locked));
    }
}

/// `vmailfs index-lock`: see the module.
pub(super) fn hold(path: &Path) -> std::result::Result<(), Failure> {
    let io = |e: io::Error| Failure::new(Code::IoErr, format!("{}: {e}", path.display()));
    let result = lock(path).map_err(io).and_then(|(file, _flock)| {
        let len = file.metadata().map_err(io)?.len();
        super::out(&format!("locked {len}\n"))?;
        serve(&file).map_err(io)
    });
    if let Err(failure) = &result {
        let _ = super::out(&format!("{failure}\n"));
    }
    result
}

/// Takes both kinds of locks that Dovecot knows, of the file that has the name now.
fn lock(path: &Path) -> io::Result<(File, Flock<File>)> {
    let end = Instant::now() + PATIENCE;
    loop {
        let file = File::options().read(true).write(true).open(path)?;
        let lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        if fcntl(&file, FcntlArg::F_SETLK(&lock)).is_ok() {
            // A descriptor of the same open file: closing another one would end the lock.
            let twin = file.try_clone()?;
            if let Ok(flock) = Flock::lock(twin, FlockArg::LockExclusiveNonblock) {
                let (held, named) = (file.metadata()?, std::fs::metadata(path)?);
                if held.ino() == named.ino() {
                    return Ok((file, flock));
                }
            }
        }
        if Instant::now() >= end {
            let text = "its server holds its lock";
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn serve(file: &File) -> io::Result<()> {
    let mut input = io::stdin().lock();
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "not what was agreed on");
    loop {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["append", at, len] = words[..] else { return Err(bad()) };
        let at: u64 = at.parse().map_err(|_| bad())?;
        let len: u64 = len.parse().ok().filter(|n| *n <= MOST).ok_or_else(bad)?;
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| bad())?];
        input.read_exact(&mut bytes)?;
        file.write_all_at(&bytes, at)?;
        file.sync_all()?;
        super::out("done\n").map_err(|e| io::Error::other(e.to_string()))?;
    }
}
