//! The way to the store: a proxy that adds time to each request, notes what was asked and when,
//! and holds single requests back. It passes on as it reads, on one thread of its own, so that
//! what it costs by itself is small beside what it adds.

use http_body_util::{Either, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};

/// A request that was answered.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub kind: &'static str,
    pub begun: Instant,
    pub ended: Instant,
}

#[derive(Debug)]
struct Inner {
    upstream: SocketAddr,
    delay_us: AtomicU64,
    calls: Mutex<Vec<Call>>,
    /// The next PUT whose path has this in it is held back.
    hold: Mutex<Option<String>>,
    held: Notify,
    release: watch::Sender<u64>,
}

#[derive(Debug)]
pub struct Link {
    inner: Arc<Inner>,
    port: u16,
    runtime: tokio::runtime::Runtime,
}

type Body = Either<Incoming, Empty<Bytes>>;

impl Link {
    /// Before the server at `endpoint` (`http://127.0.0.1:port`), without delay at first.
    pub fn start(endpoint: &str) -> Link {
        let upstream = endpoint.trim_start_matches("http://").parse().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name(crate::shares::LINK)
            .enable_all()
            .build()
            .unwrap();
        let inner = Arc::new(Inner {
            upstream,
            delay_us: AtomicU64::new(0),
            calls: Default::default(),
            hold: Default::default(),
            held: Notify::new(),
            release: watch::Sender::new(0),
        });
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = inner.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(serving.clone(), stream));
            }
        });
        Link { inner, port, runtime }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn delay(&self, ms: u64) {
        self.inner.delay_us.store(ms * 1000, Ordering::Relaxed);
    }

    /// What was answered since this was last called.
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.inner.calls.lock())
    }

    /// Holds back the next PUT below a path with `part` in it.
    pub fn hold(&self, part: &str) {
        *self.inner.hold.lock() = Some(part.to_owned());
    }

    /// Waits until a request is held back.
    pub fn wait_until_held(&self) {
        let waited = self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(30), self.inner.held.notified()).await
        });
        assert!(waited.is_ok(), "no request was held back");
    }

    /// What is held back goes on.
    pub fn release(&self) {
        self.inner.release.send_modify(|round| *round += 1);
    }
}

async fn serve(inner: Arc<Inner>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let sender = tokio::sync::Mutex::new(None);
    let service = service_fn(|request| pass(&inner, &sender, request));
    // A client that goes away is no matter.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn pass(
    inner: &Inner,
    sender: &tokio::sync::Mutex<Option<SendRequest<Incoming>>>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, hyper::Error> {
    let begun = Instant::now();
    let kind = kind(&request);
    // Answered here, by reading the body.
    request.headers_mut().remove("expect");
    let delay = Duration::from_micros(inner.delay_us.load(Ordering::Relaxed));
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    let held = {
        let mut hold = inner.hold.lock();
        let meant = request.method() == Method::PUT
            && hold.as_ref().is_some_and(|part| request.uri().path().contains(part.as_str()));
        if meant { hold.take() } else { None }
    };
    if held.is_some() {
        let mut released = inner.release.subscribe();
        inner.held.notify_one();
        let _ = released.changed().await;
    }
    let mut sender = sender.lock().await;
    let open = match &mut *sender {
        Some(open) => open.ready().await.is_ok(),
        None => false,
    };
    if !open {
        *sender = connect(inner.upstream).await;
    }
    let Some(open) = &mut *sender else { return Ok(bad_gateway()) };
    let answer = open.send_request(request).await;
    inner.calls.lock().push(Call { kind, begun, ended: Instant::now() });
    match answer {
        Ok(answer) => Ok(answer.map(Either::Left)),
        Err(_) => {
            *sender = None;
            Ok(bad_gateway())
        }
    }
}

fn bad_gateway() -> Response<Body> {
    let mut answer = Response::new(Either::Right(Empty::new()));
    *answer.status_mut() = StatusCode::BAD_GATEWAY;
    answer
}

async fn connect(upstream: SocketAddr) -> Option<SendRequest<Incoming>> {
    let stream = TcpStream::connect(upstream).await.ok()?;
    let _ = stream.set_nodelay(true);
    let (sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
    tokio::spawn(connection);
    Some(sender)
}

fn kind(request: &Request<Incoming>) -> &'static str {
    let path = request.uri().path();
    let query = request.uri().query().unwrap_or("");
    let what = if path.contains("/mail/") {
        0
    } else if path.contains("/bundle/") {
        1
    } else if path.ends_with("/head") {
        2
    } else {
        3
    };
    match request.method().as_str() {
        "GET" if query.contains("list-type") => "LIST",
        "PUT" => ["PUT mail", "PUT bundle", "PUT head", "PUT other"][what],
        "GET" => ["GET mail", "GET bundle", "GET head", "GET other"][what],
        "HEAD" => ["HEAD mail", "HEAD bundle", "HEAD head", "HEAD other"][what],
        "DELETE" => "DELETE",
        "POST" if query.contains("delete") => "DELETE (bulk)",
        _ => "other",
    }
}

/// How often each kind was asked for.
pub fn text(calls: &[Call]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for call in calls {
        *counts.entry(call.kind).or_default() += 1;
    }
    let rows: Vec<String> = counts.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    if rows.is_empty() { "nothing".to_owned() } else { rows.join(", ") }
}

/// The most requests of which each began after the one before was answered.
pub fn in_sequence(calls: &[Call]) -> usize {
    let mut calls = calls.to_vec();
    calls.sort_by_key(|call| call.ended);
    let mut count = 0;
    let mut last: Option<Instant> = None;
    for call in calls {
        if last.is_none_or(|last| call.begun >= last) {
            count += 1;
            last = Some(call.ended);
        }
    }
    count
}

/// How many requests were in flight, on average in each tenth of a time, and at most.
pub fn in_flight(calls: &[Call], start: Instant, end: Instant) -> ([f64; 10], usize) {
    let mut tenths = [0.0; 10];
    let whole = (end - start).as_secs_f64();
    let place = |at: Instant| at.saturating_duration_since(start).as_secs_f64() / whole * 10.0;
    let mut changes = Vec::new();
    for call in calls {
        let (from, to) = (place(call.begun), place(call.ended));
        for (n, tenth) in tenths.iter_mut().enumerate() {
            let n = n as f64;
            *tenth += (to.min(n + 1.0) - from.max(n)).max(0.0);
        }
        changes.extend([(call.begun, 1), (call.ended, -1)]);
    }
    changes.sort();
    let (mut now, mut most) = (0_isize, 0);
    for (_, change) in changes {
        now += change;
        most = most.max(now);
    }
    (tenths, most.unsigned_abs())
}

/// How long a request took, in the middle, in ms.
pub fn round_trip(calls: &[Call]) -> f64 {
    let times = calls.iter().map(|c| (c.ended - c.begun).as_secs_f64() * 1e3).collect();
    crate::table::median(times)
}
