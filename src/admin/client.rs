//! The commands' side of the socket: blocking, since a command has nothing else to do.

use super::place::{self, Address};
use super::{AdminError, Answer, Reply, Request, Told};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest answer, bytes: a status names every user with changes.
const MAX_ANSWER: u64 = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon listens there.
    #[error("no vmailfs answers for {what}: {source}")]
    NotRunning { what: String, source: io::Error },
    /// There is no mount at all, or none at this mount point.
    #[error("{0}")]
    NotFound(String),
    /// More than one mount, and none named.
    #[error("several mounts run: name one ({})", .0.join(", "))]
    Several(Vec<String>),
    #[error("the connection to the mount broke: {0}")]
    Broken(#[from] io::Error),
    #[error("the mount's answer cannot be understood: {0}")]
    Protocol(String),
    #[error("{0}")]
    Refused(AdminError),
}

/// The socket of the mount to talk to: the one given, that of a mount point, or that of the only
/// mount there is.
pub fn find(
    run_dir: &Path,
    socket: Option<&Path>,
    mountpoint: Option<&Path>,
) -> Result<PathBuf, ClientError> {
    if let Some(socket) = socket {
        return Ok(socket.to_owned());
    }
    if let Some(mountpoint) = mountpoint {
        // A dead mount cannot be resolved itself (ENOTCONN), its parent can.
        let full = resolve(mountpoint)?;
        let link = place::link_of(run_dir, &full);
        return match std::fs::read_link(&link) {
            Ok(socket) => Ok(socket),
            Err(e) if is_absence(&e) => {
                Err(ClientError::NotFound(format!("no vmailfs is mounted on {}", full.display())))
            }
            Err(source) => {
                Err(ClientError::NotRunning { what: link.display().to_string(), source })
            }
        };
    }
    let links = place::registered(run_dir).map_err(|source| ClientError::NotRunning {
        what: run_dir.display().to_string(),
        source,
    })?;
    // Who may not ask a mount is told so by it, not that there is none.
    let answers = |socket: &PathBuf| connect(socket).err().is_none_or(|e| !is_absence(&e));
    let alive: Vec<PathBuf> =
        links.iter().filter_map(|link| std::fs::read_link(link).ok()).filter(answers).collect();
    match alive.as_slice() {
        [] => Err(ClientError::NotFound("no vmailfs is mounted".to_owned())),
        [one] => Ok(one.clone()),
        _ => Err(ClientError::Several(alive.iter().map(|s| name_of(s)).collect())),
    }
}

/// Whether nobody is there, as opposed to somebody whom we may not ask.
fn is_absence(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, InvalidInput, NotADirectory, NotFound};
    matches!(error.kind(), ConnectionRefused | InvalidInput | NotADirectory | NotFound)
}

/// How a mount is called in a list: by its mount point if it tells it.
fn name_of(socket: &Path) -> String {
    match call(socket, &Request::Status, &mut |_| {}) {
        Ok(Answer::Status(status)) => format!("--mountpoint {}", status.mountpoint),
        _ => format!("--socket {}", socket.display()),
    }
}

fn resolve(mountpoint: &Path) -> Result<PathBuf, ClientError> {
    let absolute = std::path::absolute(mountpoint)?;
    let parent = absolute.parent().and_then(|p| p.canonicalize().ok());
    if let Ok(full) = absolute.canonicalize() {
        return Ok(full);
    }
    Ok(match (parent, absolute.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute,
    })
}

fn connect(socket: &Path) -> io::Result<UnixStream> {
    let address = Address::of(socket)?;
    UnixStream::connect(address.path())
}

/// Sends one request and waits for its answer; `progress` gets the lines before it.
pub fn call(
    socket: &Path,
    request: &Request,
    progress: &mut dyn FnMut(&Told),
) -> Result<Answer, ClientError> {
    let (answer, _) = exchange(socket, request, progress)?;
    Ok(answer)
}

/// Asks a mount to stop, and waits until its process has ended (at most `patience` after its
/// final answer).
pub fn stop(
    socket: &Path,
    patience: Duration,
    progress: &mut dyn FnMut(&Told),
) -> Result<Answer, ClientError> {
    let (answer, mut stream) = exchange(socket, &Request::Stop, progress)?;
    let daemon = getsockopt(&stream, PeerCredentials).map_err(io::Error::from)?.pid();
    let deadline = Instant::now() + patience;
    stream.set_read_timeout(Some(patience))?;
    let mut rest = [0u8; 64];
    while matches!(stream.read(&mut rest), Ok(n) if n > 0) {}
    while alive(daemon) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(answer)
}

/// Whether a process exists and is more than a zombie.
fn alive(pid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => false,
        Ok(stat) => match stat.rsplit_once(')') {
            Some((_, rest)) => !matches!(rest.trim_start().chars().next(), Some('Z' | 'X')),
            None => true,
        },
    }
}

fn exchange(
    socket: &Path,
    request: &Request,
    progress: &mut dyn FnMut(&Told),
) -> Result<(Answer, UnixStream), ClientError> {
    let mut stream = connect(socket)
        .map_err(|source| ClientError::NotRunning { what: socket.display().to_string(), source })?;
    let mut line =
        serde_json::to_string(request).map_err(|e| ClientError::Protocol(e.to_string()))?;
    line.push('\n');
    // A daemon that refuses us may have closed before reading; its reason is then to be read.
    let sent = stream.write_all(line.as_bytes());
    let mut lines = BufReader::new(stream.try_clone()?.take(MAX_ANSWER));
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            sent?;
            return Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&line).map_err(|e| ClientError::Protocol(e.to_string()))? {
            Reply::Progress(told) => progress(&told),
            Reply::Done(answer) => return Ok((answer, stream)),
            Reply::Error(error) => return Err(ClientError::Refused(error)),
        }
    }
}
