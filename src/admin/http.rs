//! Metrics over HTTP, for those who scrape them. It answers GET and HEAD of `/metrics`, to anybody
//! who can reach the address, with numbers only: no user is named in them.

use super::metrics::CONTENT_TYPE;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE as CONTENT_TYPE_HEADER, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// Connections at a time; more are closed at once.
const CONNECTIONS: usize = 16;
/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may live: one request, and its answer taken.
const LIFETIME: Duration = Duration::from_secs(30);
/// Longest request with its headers, bytes.
const REQUEST: usize = 16 << 10;

/// Makes the text of a scrape.
pub type Scrape = Arc<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>;

/// A bound address.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Within a tokio runtime.
    pub async fn bind(address: SocketAddr) -> io::Result<Server> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Server { listener, address })
    }

    /// With the port that was found, where none was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until the future is dropped.
    pub async fn serve(self, scrape: Scrape) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = tokio::task::JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "metrics: cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                tracing::debug!("metrics: too many connections");
                continue;
            };
            let scrape = scrape.clone();
            connections.spawn(async move {
                if tokio::time::timeout(LIFETIME, connection(stream, scrape)).await.is_err() {
                    tracing::debug!("metrics: a connection took too long");
                }
                drop(slot);
            });
        }
    }
}

async fn connection(stream: TcpStream, scrape: Scrape) {
    let service = service_fn(move |request| {
        let scrape = scrape.clone();
        async move { Ok::<_, Infallible>(answer(&request, &scrape).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .max_buf_size(REQUEST)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "metrics: connection ended");
    }
}

async fn answer(request: &Request<Incoming>, scrape: &Scrape) -> Response<Full<Bytes>> {
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            (StatusCode::OK, HeaderValue::from_static(CONTENT_TYPE), scrape().await)
        }
        (&Method::GET | &Method::HEAD, _) => {
            (StatusCode::NOT_FOUND, plain, "vmailfs: see /metrics\n".to_owned())
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, plain, "only GET and HEAD\n".to_owned()),
    };
    // Of an answer to HEAD, only the length is sent.
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE_HEADER, kind);
    if status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Who is not wanted may find the connection closed before all is sent.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    async fn server() -> SocketAddr {
        let server = Server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.address();
        tokio::spawn(server.serve(Arc::new(|| Box::pin(async { "a 1\n# EOF\n".to_owned() }))));
        address
    }

    #[tokio::test]
    async fn it_answers_what_it_knows() {
        let address = server().await;
        let got = ask(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(got.starts_with("HTTP/1.1 200") && got.ends_with("\r\n\r\na 1\n# EOF\n"), "{got}");
        assert!(got.contains("content-type: application/openmetrics-text; version=1.0.0"), "{got}");
        let got = ask(address, "HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(got.contains("content-length: 10") && got.ends_with("\r\n\r\n"), "{got}");
        assert!(ask(address, "GET / HTTP/1.0\r\n\r\n").await.contains(" 404 "));
        assert!(ask(address, "DELETE /metrics HTTP/1.0\r\n\r\n").await.contains(" 405 "));
        assert!(ask(address, "nonsense\r\n\r\n").await.contains(" 400 "));
        let long = format!("GET /{} HTTP/1.0\r\n\r\n", "x".repeat(4 * REQUEST));
        assert!(!ask(address, &long).await.contains(" 200 "));
    }

    #[tokio::test]
    async fn connections_are_bounded_in_number_and_time() {
        let address = server().await;
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(ask(address, "GET /metrics HTTP/1.0\r\n\r\n").await, "", "one too many");
        // Whoever says nothing is sent away.
        let begun = std::time::Instant::now();
        let mut rest = Vec::new();
        let _ = idle[0].read_to_end(&mut rest).await;
        assert!(begun.elapsed() < PATIENCE * 2);
        drop(idle);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(ask(address, "GET /metrics HTTP/1.0\r\n\r\n").await.contains(" 200 "));
    }
}
