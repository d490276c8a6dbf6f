//! An HTTP proxy between the program and a real S3 server, which fails as a test tells it to.
//!
//! Requests go through as they came, the `Host` they were signed with included, so signatures
//! hold. Requests and answers are read whole before they go on: what is late, cut or altered is
//! so because a rule says it. One thread for each connection, which stays open as the client
//! and the server want.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What becomes of a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The connection is reset before the body of the request was read.
    ResetBefore,
    /// The body was read, the server was not asked.
    ResetAfterBody,
    /// The server did it, and nothing of its answer arrives.
    LoseAnswer,
    /// The server did it, and the connection is reset within its answer.
    ResetMiddle,
    /// A black hole: read and never answered; the server is not asked.
    Stall,
    /// A black hole behind the first half of the answer.
    StallMiddle,
    Delay(Duration),
    /// This answer: status line, more headers, body. The server is not asked.
    Answer(&'static str, Vec<(&'static str, String)>, Vec<u8>),
    /// The body ends early, at the announced end of the connection.
    ShortBody,
    /// One bit of the answer's body differs, its length does not.
    FlipBit,
    /// One bit of the request's body differs on its way to the server.
    FlipUpload,
    /// Half of the body, under a length that says so.
    Truncate,
}

impl Fault {
    /// An error as S3 tells it.
    pub fn error(status: &'static str, code: &str) -> Fault {
        let body = format!("<Error><Code>{code}</Code><Message>as told</Message></Error>");
        let kind = ("Content-Type", "application/xml".to_owned());
        Fault::Answer(status, vec![kind], body.into_bytes())
    }

    pub fn busy(seconds: u32) -> Fault {
        let headers = vec![("Retry-After", seconds.to_string())];
        Fault::Answer("503 Service Unavailable", headers, b"<html>busy</html>".to_vec())
    }
}

/// A request, as rules see it and as it is noted.
#[derive(Debug, Clone)]
pub struct Call {
    pub method: String,
    /// Path and query as they were sent.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub at: Instant,
    /// Whether a rule or the state of the proxy spoilt it.
    pub spoilt: bool,
}

impl Call {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or("")
    }

    /// A listing, not an object.
    pub fn lists(&self) -> bool {
        self.method == "GET" && self.target.contains("list-type=")
    }

    pub fn is_head_object(&self) -> bool {
        self.path().ends_with("/head")
    }

    pub fn is_mail(&self) -> bool {
        self.path().contains("/mail/")
    }

    pub fn is_bundle(&self) -> bool {
        self.path().contains("/bundle/")
    }
}

type Matches = Arc<dyn Fn(&Call) -> bool + Send + Sync>;

/// Which requests meet a fault.
#[derive(Clone)]
pub struct Rule {
    fault: Fault,
    matches: Matches,
    left: Option<u64>,
    chance: f64,
}

impl Rule {
    /// Every request.
    pub fn all(fault: Fault) -> Rule {
        Rule::when(fault, |_| true)
    }

    pub fn when(fault: Fault, matches: impl Fn(&Call) -> bool + Send + Sync + 'static) -> Rule {
        Rule { fault, matches: Arc::new(matches), left: None, chance: 1.0 }
    }

    /// Only so many requests.
    pub fn times(mut self, n: u64) -> Rule {
        self.left = Some(n);
        self
    }

    /// Each with this probability.
    pub fn chance(mut self, p: f64) -> Rule {
        self.chance = p;
        self
    }
}

/// The state of the way to the server as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// Nobody listens.
    Refused,
    /// Connections are taken, and nothing is answered.
    BlackHole,
}

struct Inner {
    port: u16,
    upstream: SocketAddr,
    rules: Mutex<Vec<Rule>>,
    calls: Mutex<Vec<Call>>,
    way: Mutex<Way>,
    listening: AtomicBool,
    stop: AtomicBool,
    open: Mutex<HashMap<u64, TcpStream>>,
    next: AtomicU64,
}

/// The proxy; it ends when dropped.
pub struct Proxy {
    inner: Arc<Inner>,
    accepting: Option<JoinHandle<()>>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Proxy").field(&self.inner.port).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Proxy {
    /// Before the server at `endpoint` (`http://127.0.0.1:port`).
    pub fn start(endpoint: &str) -> Proxy {
        let upstream = endpoint.trim_start_matches("http://").parse().expect("an address");
        // Below the range of connections' ports: it must be free again after an outage.
        let listener = loop {
            let port: u16 = rand::random_range(22_000..32_000);
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
                break listener;
            }
        };
        let inner = Arc::new(Inner {
            port: listener.local_addr().expect("an address").port(),
            upstream,
            rules: Mutex::default(),
            calls: Mutex::default(),
            way: Mutex::new(Way::Open),
            listening: AtomicBool::new(true),
            stop: AtomicBool::new(false),
            open: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let held = inner.clone();
        let accepting = Some(thread::spawn(move || accept(&held, listener)));
        Proxy { inner, accepting }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.inner.port)
    }

    /// Adds a rule; the first that fits decides.
    pub fn rule(&self, rule: Rule) {
        lock(&self.inner.rules).push(rule);
    }

    /// No rules from now on.
    pub fn clear(&self) {
        lock(&self.inner.rules).clear();
    }

    /// Nobody listens from now on, and open connections are reset.
    pub fn refuse(&self) {
        self.turn(Way::Refused);
    }

    /// Nothing is answered from now on, on no connection.
    pub fn black_hole(&self) {
        self.turn(Way::BlackHole);
    }

    /// The way is open again. What fell into the black hole does not come back.
    pub fn open(&self) {
        self.turn(Way::Open);
    }

    fn turn(&self, way: Way) {
        *lock(&self.inner.way) = way;
        while self.inner.listening.load(Ordering::SeqCst) == (way == Way::Refused) {
            thread::sleep(Duration::from_millis(2));
        }
        if way == Way::Refused {
            self.inner.cut_all();
        }
    }

    /// What was asked so far.
    pub fn calls(&self) -> Vec<Call> {
        lock(&self.inner.calls).clone()
    }

    /// Forgets what was asked so far.
    pub fn forget_calls(&self) {
        lock(&self.inner.calls).clear();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        self.inner.cut_all();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        self.inner.cut_all();
    }
}

impl Inner {
    fn cut_all(&self) {
        for stream in lock(&self.open).values() {
            reset(stream);
        }
    }

    /// Notes the request; what is to become of it.
    fn judge(&self, mut call: Call) -> Option<Fault> {
        let mut found = None;
        for rule in lock(&self.rules).iter_mut() {
            if rule.left == Some(0) || !(rule.matches)(&call) || !rand::random_bool(rule.chance) {
                continue;
            }
            rule.left = rule.left.map(|n| n - 1);
            found = Some(rule.fault.clone());
            break;
        }
        let way = *lock(&self.way);
        match way {
            Way::Open => {}
            Way::BlackHole => found = Some(Fault::Stall),
            Way::Refused => found = Some(Fault::ResetBefore),
        }
        call.spoilt = found.is_some();
        lock(&self.calls).push(call);
        found
    }
}

/// Ends a connection by a reset, not by an orderly end.
fn reset(stream: &TcpStream) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: a plain system call on a descriptor that is open, with a value of the right size.
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of_val(&linger) as libc::socklen_t,
        );
    }
    // Wakes a thread that reads from it; the reset goes out at the last close.
    let _ = stream.shutdown(Shutdown::Read);
}

fn accept(inner: &Arc<Inner>, listener: TcpListener) {
    let mut listener = Some(listener);
    while !inner.stop.load(Ordering::SeqCst) {
        let refused = *lock(&inner.way) == Way::Refused;
        match &listener {
            Some(_) if refused => listener = None,
            None if !refused => listener = TcpListener::bind(("127.0.0.1", inner.port)).ok(),
            _ => {}
        }
        inner.listening.store(listener.is_some(), Ordering::SeqCst);
        let Some(listening) = &listener else {
            thread::sleep(Duration::from_millis(5));
            continue;
        };
        let mut poll = libc::pollfd { fd: listening.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: a plain system call on one descriptor that is open.
        if unsafe { libc::poll(&raw mut poll, 1, 10) } <= 0 {
            continue;
        }
        let Ok((stream, _)) = listening.accept() else { continue };
        let number = inner.next.fetch_add(1, Ordering::Relaxed);
        let Ok(held) = stream.try_clone() else { continue };
        lock(&inner.open).insert(number, held);
        let inner = inner.clone();
        thread::spawn(move || {
            let _ = Connection { inner: &inner, client: &stream, server: None }.run();
            lock(&inner.open).remove(&number);
        });
    }
}

/// A request or an answer: the first line, headers, body.
struct Message {
    first: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Message {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    fn length(&self) -> Option<usize> {
        self.header("content-length")?.parse().ok()
    }

    /// The whole, with `announced` as its length; none where the headers tell one already (HEAD).
    fn bytes(&self, announced: Option<usize>) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.first);
        for (name, value) in &self.headers {
            let replaced = announced.is_some() && name.eq_ignore_ascii_case("content-length");
            if !replaced && !name.eq_ignore_ascii_case("transfer-encoding") {
                text.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        if let Some(length) = announced {
            text.push_str(&format!("Content-Length: {length}\r\n"));
        }
        text.push_str("\r\n");
        [text.as_bytes(), &self.body].concat()
    }
}

fn ended() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

fn read_line(stream: &mut impl Read) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 1 << 16 {
        if stream.read(&mut byte)? == 0 {
            return Err(ended());
        }
        if byte[0] == b'\n' {
            line.pop_if(|last| *last == b'\r');
            return Ok(String::from_utf8_lossy(&line).into_owned());
        }
        line.push(byte[0]);
    }
    Err(ended())
}

fn read_head(stream: &mut impl Read) -> io::Result<Message> {
    let first = read_line(stream)?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(stream)?;
        if line.is_empty() {
            return Ok(Message { first, headers, body: Vec::new() });
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.push((name.to_owned(), value.trim().to_owned()));
        }
    }
}

fn read_answer(stream: &mut impl Read, method: &str) -> io::Result<Message> {
    let mut answer = loop {
        let head = read_head(stream)?;
        if !head.first.contains(" 100 ") {
            break head;
        }
    };
    let status = answer.first.split(' ').nth(1).unwrap_or("");
    if method == "HEAD" || status == "204" || status == "304" {
        return Ok(answer);
    }
    if answer.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
        loop {
            let size = read_line(stream)?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(|_| ended())?;
            let start = answer.body.len();
            answer.body.resize(start + size, 0);
            stream.read_exact(&mut answer.body[start..])?;
            read_line(stream)?;
            if size == 0 {
                return Ok(answer);
            }
        }
    }
    match answer.length() {
        Some(length) => {
            answer.body = vec![0; length];
            stream.read_exact(&mut answer.body)?;
        }
        None => drop(stream.read_to_end(&mut answer.body)?),
    }
    Ok(answer)
}

struct Connection<'a> {
    inner: &'a Inner,
    client: &'a TcpStream,
    server: Option<io::BufReader<TcpStream>>,
}

impl Connection<'_> {
    fn run(&mut self) -> io::Result<()> {
        self.client.set_nodelay(true)?;
        let mut reader = io::BufReader::new(self.client);
        loop {
            let mut request = read_head(&mut reader)?;
            let mut words = request.first.split(' ').map(str::to_owned);
            let (method, target) = (words.next(), words.next());
            let (Some(method), Some(target)) = (method, target) else { return Err(ended()) };
            let lower =
                |(name, value): &(String, String)| (name.to_ascii_lowercase(), value.clone());
            let fault = self.inner.judge(Call {
                method: method.clone(),
                target,
                headers: request.headers.iter().map(lower).collect(),
                at: Instant::now(),
                spoilt: false,
            });
            if let Some(Fault::ResetBefore) = fault {
                return self.reset();
            }
            if request.header("expect").is_some() {
                self.client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
                request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("expect"));
            }
            request.body = vec![0; request.length().unwrap_or(0)];
            reader.read_exact(&mut request.body)?;
            self.serve(&method, request, fault)?;
        }
    }

    fn serve(
        &mut self,
        method: &str,
        mut request: Message,
        fault: Option<Fault>,
    ) -> io::Result<()> {
        match &fault {
            Some(Fault::ResetAfterBody) => return self.reset(),
            Some(Fault::Stall) => return self.stall(),
            Some(Fault::Delay(time)) => thread::sleep(*time),
            Some(Fault::Answer(status, headers, body)) => {
                let mut headers: Vec<(String, String)> =
                    headers.iter().map(|(n, v)| ((*n).to_owned(), v.clone())).collect();
                headers.push(("Content-Length".to_owned(), body.len().to_string()));
                let body = if method == "HEAD" { Vec::new() } else { body.clone() };
                let answer = Message { first: format!("HTTP/1.1 {status}"), headers, body };
                return self.client.write_all(&answer.bytes(None));
            }
            Some(Fault::FlipUpload) if !request.body.is_empty() => {
                let middle = request.body.len() / 2;
                request.body[middle] ^= 4;
            }
            _ => {}
        }
        let mut answer = self.forward(method, &request)?;
        // Somebody may have closed the way meanwhile.
        if *lock(&self.inner.way) == Way::BlackHole {
            return self.stall();
        }
        let half = answer.body.len() / 2;
        let whole = (method != "HEAD").then_some(answer.body.len());
        match fault {
            Some(Fault::LoseAnswer) => self.reset(),
            Some(cut @ (Fault::ResetMiddle | Fault::StallMiddle)) => {
                let bytes = answer.bytes(whole);
                // At least one byte of the body lacks, or of the headers where there is none.
                let sent = if half > 0 { bytes.len() - half } else { bytes.len() / 2 };
                self.client.write_all(&bytes[..sent])?;
                if matches!(cut, Fault::StallMiddle) {
                    return self.stall();
                }
                // What was sent must arrive before the reset overtakes it.
                thread::sleep(Duration::from_millis(20));
                self.reset()
            }
            Some(Fault::ShortBody) => {
                answer.body.truncate(half);
                self.client.write_all(&answer.bytes(whole))?;
                let _ = self.client.shutdown(Shutdown::Both);
                Err(ended())
            }
            Some(Fault::Truncate) => {
                answer.body.truncate(half);
                self.client.write_all(&answer.bytes(whole.map(|_| half)))
            }
            Some(Fault::FlipBit) => {
                if let Some(byte) = answer.body.get_mut(half) {
                    *byte ^= 4;
                }
                self.client.write_all(&answer.bytes(whole))
            }
            _ => self.client.write_all(&answer.bytes(whole)),
        }
    }

    /// Asks the server; once more on a new connection, as it may have closed the old one.
    fn forward(&mut self, method: &str, request: &Message) -> io::Result<Message> {
        let bytes = request.bytes(None);
        let kept = self.server.is_some();
        match self.ask(method, &bytes) {
            Err(_) if kept => {
                self.server = None;
                self.ask(method, &bytes)
            }
            done => done,
        }
    }

    fn ask(&mut self, method: &str, bytes: &[u8]) -> io::Result<Message> {
        let server = match &mut self.server {
            Some(server) => server,
            none => none.insert(io::BufReader::new(TcpStream::connect(self.inner.upstream)?)),
        };
        server.get_mut().set_nodelay(true)?;
        server.get_mut().write_all(bytes)?;
        let answer = read_answer(server, method)?;
        if answer.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")) {
            self.server = None;
        }
        Ok(answer)
    }

    fn reset(&self) -> io::Result<()> {
        reset(self.client);
        Err(ended())
    }

    /// Until the client gives up.
    fn stall(&self) -> io::Result<()> {
        let mut client = self.client;
        let mut piece = [0; 4096];
        while client.read(&mut piece)? > 0 {}
        Err(ended())
    }
}
