//! The daemon's side of the socket.

use super::place::Address;
use super::{AdminApi, AdminError, Answer, ErrorKind, Progress, Reply, Request};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

/// Longest request, bytes: a file of users' names.
const MAX_REQUEST: u64 = 4 << 20;
/// Connections served at the same time; others wait in the listen queue.
const MAX_CONNECTIONS: usize = 32;
/// How long a peer may take to send its request, or to take one line of the answer.
const PEER_PATIENCE: Duration = Duration::from_secs(10);
/// Whoever waits for an answer hears of us so often. Well below the patience of `super::client`: a
/// loaded machine is late.
pub(super) const SIGN_OF_LIFE: Duration = Duration::from_secs(2);

/// A listening socket, removed when dropped.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    socket: PathBuf,
    own_uid: u32,
    slots: Arc<Semaphore>,
}

/// Waits for answers that are still being sent.
#[derive(Debug)]
pub struct Drain(Arc<Semaphore>);

impl Drain {
    /// Returns when every request that is under way was answered, at most after `patience`;
    /// no new ones begin.
    pub async fn wait(self, patience: Duration) {
        let all = self.0.acquire_many(MAX_CONNECTIONS as u32);
        let _ = tokio::time::timeout(patience, all).await;
        self.0.close();
    }
}

impl Server {
    /// Listens at `socket`; to be called within a tokio runtime. A socket that nobody listens on
    /// any more is replaced; one in use is an error (`AddrInUse`), and so is another file there.
    pub fn bind(socket: &Path) -> io::Result<Server> {
        let address = Address::of(socket)?;
        match std::fs::symlink_metadata(socket) {
            Ok(m) if !m.file_type().is_socket() => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    format!("{}: exists and is no socket", socket.display()),
                ));
            }
            Ok(_) => match std::os::unix::net::UnixStream::connect(address.path()) {
                Ok(_) => {
                    return Err(io::Error::new(
                        io::ErrorKind::AddrInUse,
                        format!("{}: another mount uses this socket", socket.display()),
                    ));
                }
                Err(_) => std::fs::remove_file(socket)?,
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let listener = UnixListener::bind(address.path())?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let own_uid = nix::unistd::geteuid().as_raw();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Ok(Server { listener, socket: socket.to_owned(), own_uid, slots })
    }

    /// For the end: see [`Drain`].
    pub fn drain(&self) -> Drain {
        Drain(Arc::clone(&self.slots))
    }

    /// Serves until the future is dropped. Requests that are under way then end with it.
    pub async fn serve(self, api: Arc<dyn AdminApi>) {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "admin socket: cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // After accepting: a slot held while nobody comes would keep the end waiting.
            let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else { return };
            let (api, own_uid) = (Arc::clone(&api), self.own_uid);
            connections.spawn(async move {
                match connection(stream, own_uid, api).await {
                    Ok(None) => {}
                    Ok(Some(held)) => {
                        drop(slot);
                        // For as long as the process lives.
                        std::future::pending::<()>().await;
                        drop(held);
                    }
                    Err(error) => tracing::debug!(%error, "admin socket: connection ended"),
                }
            });
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// An answered connection that stays open until the process ends.
type Held = Box<dyn std::any::Any + Send>;

async fn connection(
    stream: UnixStream,
    own_uid: u32,
    api: Arc<dyn AdminApi>,
) -> io::Result<Option<Held>> {
    let peer = stream.peer_cred()?.uid();
    let (read, mut write) = stream.into_split();
    if peer != 0 && peer != own_uid {
        let error = AdminError::new(ErrorKind::Denied, "only root and the mount's own account may");
        return send(&mut write, &Reply::Error(error)).await.map(|()| None);
    }
    let mut read = BufReader::new(read.take(MAX_REQUEST));
    let mut line = String::new();
    if within(read.read_line(&mut line)).await? == 0 {
        return Ok(None); // somebody looked whether we live
    }
    let request: Request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(e) => {
            let text = format!("this is no request that vmailfs {} knows: {e}", version());
            let error = AdminError::new(ErrorKind::Usage, text);
            return send(&mut write, &Reply::Error(error)).await.map(|()| None);
        }
    };
    tracing::info!(?request, uid = peer, "admin request");
    let stop = request == Request::Stop;
    let (progress, mut lines) = Progress::channel();
    let work = answer(request, api, progress);
    tokio::pin!(work);
    let mut signs = tokio::time::interval(SIGN_OF_LIFE);
    signs.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let reply = loop {
        tokio::select! {
            biased;
            Some(text) = lines.recv() => {
                // Whoever asked may go away; what was asked for is done all the same.
                let _ = send(&mut write, &Reply::Progress(text)).await;
            }
            reply = &mut work => break reply,
            _ = signs.tick() => {
                let _ = send(&mut write, &Reply::Alive).await;
            }
        }
    };
    while let Ok(text) = lines.try_recv() {
        let _ = send(&mut write, &Reply::Progress(text)).await;
    }
    let stopped = stop && matches!(reply, Reply::Done(_));
    send(&mut write, &reply).await?;
    Ok(stopped.then(|| Box::new((read, write)) as Held))
}

async fn answer(request: Request, api: Arc<dyn AdminApi>, progress: Progress) -> Reply {
    let answer = match request {
        Request::Flush(what) => api.flush(what, &progress).await.map(Answer::Flush),
        Request::Caches { what } => api.caches(what, &progress).await.map(Answer::Caches),
        Request::Gc(what) => api.gc(what, &progress).await.map(Answer::Gc),
        Request::Status => Ok(Answer::Status(Box::new(api.status().await))),
        Request::Care { care } => api.care(care, &progress).await.map(Answer::Care),
        Request::Stop => api.stop(&progress).await.map(Answer::Stop),
    };
    match answer {
        Ok(answer) => Reply::Done(answer),
        Err(error) => Reply::Error(error),
    }
}

async fn send(write: &mut OwnedWriteHalf, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    within(write.write_all(&line)).await
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(PEER_PATIENCE, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not answer")),
    }
}

fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}
