//! The commands' side of the socket: blocking, since a command has nothing else to do.
//!
//! A daemon says something at least every [`super::server::SIGN_OF_LIFE`], however long its work takes.
//! One that says nothing for much longer (stopped, hung, its disk stuck) is not waited for.

use super::place::{self, Address};
use super::{AdminError, Answer, Reply, Request, Told};
use nix::sys::socket::sockopt::{PeerCredentials, SendTimeout};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_to, getsockopt, setsockopt,
    socket as new_socket,
};
use nix::sys::time::TimeVal;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest answer, bytes: a status names every user with changes.
const MAX_ANSWER: u64 = 256 << 20;
/// A daemon that is silent for so long does not answer.
const PATIENCE: Duration = Duration::from_secs(10);

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
    /// Somebody listens there, and says nothing.
    #[error(
        "{0} does not answer: it is stopped, hangs, or serves too many; what was asked may be done later"
    )]
    Silent(String),
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
        let full = resolve(run_dir, mountpoint)?;
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
    let answers =
        |socket: &PathBuf| connect(socket, PATIENCE).err().is_none_or(|e| !is_absence(&e));
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

/// The mount point without symbolic links. A mount is not asked itself if that can be avoided: a dead
/// one refuses (ENOTCONN), a hanging one says nothing for ever. Its parent can be asked.
fn resolve(run_dir: &Path, mountpoint: &Path) -> Result<PathBuf, ClientError> {
    let absolute = std::path::absolute(mountpoint)?;
    let parent = absolute.parent().and_then(|p| p.canonicalize().ok());
    let beside = match (parent, absolute.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute.clone(),
    };
    if std::fs::read_link(place::link_of(run_dir, &beside)).is_ok() {
        return Ok(beside);
    }
    Ok(absolute.canonicalize().unwrap_or(beside))
}

/// Where many wait to be let in, a connection has to wait, too: for `patience`.
fn connect(socket: &Path, patience: Duration) -> io::Result<UnixStream> {
    let address = Address::of(socket)?;
    let fd = new_socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let secs = i64::try_from(patience.as_secs()).unwrap_or(i64::MAX);
    setsockopt(&fd, SendTimeout, &TimeVal::new(secs, patience.subsec_micros().into()))?;
    connect_to(fd.as_raw_fd(), &UnixAddr::new(address.path())?)?;
    let stream = UnixStream::from(fd);
    stream.set_read_timeout(Some(patience))?;
    Ok(stream)
}

/// How a call that has waited for too long ends.
fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// Sends one request and waits for its answer; `progress` gets the lines before it.
pub fn call(
    socket: &Path,
    request: &Request,
    progress: &mut dyn FnMut(&Told),
) -> Result<Answer, ClientError> {
    call_within(PATIENCE, socket, request, progress)
}

/// The same where a daemon may be silent for so long.
pub(super) fn call_within(
    patience: Duration,
    socket: &Path,
    request: &Request,
    progress: &mut dyn FnMut(&Told),
) -> Result<Answer, ClientError> {
    let (answer, _) = exchange(patience, socket, request, progress)?;
    Ok(answer)
}

/// Asks a mount to stop, and waits until its process has ended (at most `patience` after its
/// final answer).
pub fn stop(
    socket: &Path,
    patience: Duration,
    progress: &mut dyn FnMut(&Told),
) -> Result<Answer, ClientError> {
    let (answer, mut stream) = exchange(PATIENCE, socket, &Request::Stop, progress)?;
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
    patience: Duration,
    socket: &Path,
    request: &Request,
    progress: &mut dyn FnMut(&Told),
) -> Result<(Answer, UnixStream), ClientError> {
    let what = || socket.display().to_string();
    let mut stream = connect(socket, patience).map_err(|source| match is_silence(&source) {
        true => ClientError::Silent(format!("the mount of {}", what())),
        false => ClientError::NotRunning { what: what(), source },
    })?;
    let daemon = getsockopt(&stream, PeerCredentials).map_err(io::Error::from)?.pid();
    let failed = |error: io::Error| match is_silence(&error) {
        true => ClientError::Silent(format!("the mount of {} (process {daemon})", what())),
        false => ClientError::Broken(error),
    };
    let mut line =
        serde_json::to_string(request).map_err(|e| ClientError::Protocol(e.to_string()))?;
    line.push('\n');
    // A daemon that refuses us may have closed before reading; its reason is then to be read.
    let sent = match stream.write_all(line.as_bytes()) {
        Err(error) if is_silence(&error) => return Err(failed(error)),
        sent => sent,
    };
    let mut lines = BufReader::new(stream.try_clone()?.take(MAX_ANSWER));
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line).map_err(failed)? == 0 {
            sent?;
            return Err(ClientError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        match serde_json::from_str(&line).map_err(|e| ClientError::Protocol(e.to_string()))? {
            Reply::Alive => {}
            Reply::Progress(told) => progress(&told),
            Reply::Done(answer) => return Ok((answer, stream)),
            Reply::Error(error) => return Err(ClientError::Refused(error)),
        }
    }
}
