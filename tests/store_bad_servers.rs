//! What the S3 client makes of servers that misbehave: ones that ignore conditions, fail for a
//! while, cut bodies short, fall silent, or answer with something that is not S3.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::deaf::{self, Deaf};
use support::http::{self, answer, error};
use vmailfs::store::probe::probe;
use vmailfs::store::s3::{S3Config, S3Store};
use vmailfs::store::{Body, ObjectStore, PutMode, Reason, RetryPolicy, StoreError};

const WHY: Reason = Reason("test");
const OK: &str = "200 OK";
const DATE: (&str, &str) = ("Last-Modified", "Sun, 22 Nov 2026 02:00:00 GMT");

async fn connect(endpoint: &str) -> S3Store {
    S3Store::connect(config(endpoint)).await.unwrap()
}

/// As [`config`], for tests of what silence does.
fn impatient(endpoint: &str) -> S3Config {
    let mut config = config(endpoint);
    config.retry.attempt_timeout = Duration::from_millis(300);
    config.retry.deadline = Duration::from_secs(3);
    config
}

/// A machine that is busy for a while is not a silent server: these wait long.
fn config(endpoint: &str) -> S3Config {
    S3Config {
        bucket: "b".to_owned(),
        prefix: "p".to_owned(),
        endpoint: Some(endpoint.to_owned()),
        region: Some("us-east-1".to_owned()),
        path_style: true,
        access_key_id: Some("id".to_owned()),
        secret_access_key: Some("secret".to_owned()),
        retry: RetryPolicy {
            attempt_timeout: Duration::from_secs(30),
            deadline: Duration::from_secs(60),
            first_pause: Duration::from_millis(5),
            attempts: 5,
        },
        ..S3Config::default()
    }
}

fn object(bytes: &[u8]) -> Vec<u8> {
    answer(OK, &[("ETag", "\"t\""), DATE], bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_refuses_a_server_that_ignores_conditions() {
    let (server, objects) = deaf::start(Deaf::Ignores).await;
    let store = connect(&server.endpoint).await;
    let error = probe(&store, "backends", "t1").await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("this store ignores If-None-Match"), "{text}");
    assert!(text.contains("--single-backend"), "{text}");
    assert!(error.waived_by_single_backend());
    // It also had no bulk delete: the objects went one by one.
    assert!(objects.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_may_pass_are_retried() {
    let server = http::start(|request| async move {
        match request.nth {
            0 => error("500 Internal Server Error", "InternalError"),
            1 => error("503 Service Unavailable", "SlowDown"),
            2 => answer("503 Service Unavailable", &[], b"<html>overload</html>"),
            _ => object(b"hello"),
        }
    })
    .await;
    let store = connect(&server.endpoint).await;
    let (meta, bytes) = store.get("k", None, 10, WHY).await.unwrap();
    assert_eq!((meta.size, bytes), (5, Bytes::from_static(b"hello")));
    assert_eq!(store.wire_requests(), Some(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_are_retried_with_their_whole_body() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("body");
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    std::fs::write(&path, &bytes).unwrap();
    type Seen = Mutex<Vec<(usize, Option<String>)>>;
    let seen: Arc<Seen> = Arc::default();
    let held = seen.clone();
    let server = http::start(move |request| {
        let digest = request.header("content-md5").map(str::to_owned);
        held.lock().push((request.body.len(), digest));
        async move {
            match request.nth {
                0 => error("500 Internal Server Error", "InternalError"),
                // The answer gets lost.
                1 => Vec::new(),
                2 => error("400 Bad Request", "BadDigest"),
                _ => answer(OK, &[("ETag", "\"t\"")], b""),
            }
        }
    })
    .await;
    let store = connect(&server.endpoint).await;
    let body = Body::File { path, len: bytes.len() as u64 };
    let tag = store.put("k", body, PutMode::Create, &[], WHY).await.unwrap();
    assert_eq!(tag.0, "\"t\"");
    let seen = seen.lock();
    assert_eq!(seen.len(), 4);
    assert!(seen.iter().all(|one| *one == (bytes.len(), seen[0].1.clone())), "{seen:?}");
    assert!(seen[0].1.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_goes_on_failing_is_unavailable_and_the_attempts_are_bounded() {
    let server = http::start(|_| async { error("503 Service Unavailable", "SlowDown") }).await;
    let store = connect(&server.endpoint).await;
    let failed = store.head("k", WHY).await.unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable { .. }), "{failed}");
    assert_eq!(store.wire_requests(), Some(5));
    let failed = store.list("d", None, WHY).await.unwrap_err();
    assert!(failed.to_string().contains("SlowDown"), "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pause_that_the_store_asks_for_is_made() {
    let server = http::start(|request| async move {
        match request.nth {
            0 => answer("503 Service Unavailable", &[("Retry-After", "1")], b""),
            _ => object(b"x"),
        }
    })
    .await;
    let store = connect(&server.endpoint).await;
    let start = Instant::now();
    store.get("k", None, 10, WHY).await.unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_cut_short_is_never_taken_for_the_object() {
    let cut = Arc::new(AtomicUsize::new(2));
    let held = cut.clone();
    let server = http::start(move |_| {
        let short = held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        async move {
            let mut bytes = object(&[7; 100_000]);
            if short.is_ok() {
                bytes.truncate(50_000);
            }
            bytes
        }
    })
    .await;
    let store = connect(&server.endpoint).await;
    // Twice short, then whole.
    assert_eq!(store.get("k", None, 100_000, WHY).await.unwrap().1, vec![7; 100_000]);
    assert_eq!(store.wire_requests(), Some(3));
    cut.store(1, Ordering::SeqCst);
    let file = tempfile::NamedTempFile::new().unwrap();
    store.download("k", file.as_file(), WHY).await.unwrap();
    assert!(std::fs::read(file.path()).unwrap() == vec![7; 100_000]);
    cut.store(usize::MAX, Ordering::SeqCst);
    for failed in [
        store.get("k", None, 100_000, WHY).await.map(|_| ()).unwrap_err(),
        store.download("k", file.as_file(), WHY).await.map(|_| ()).unwrap_err(),
    ] {
        assert!(matches!(failed, StoreError::BadBody { .. }), "{failed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_ends_an_attempt_before_and_within_the_body() {
    let server = http::start(|request| async move {
        if request.nth == 0 {
            std::future::pending::<()>().await;
        }
        object(b"hello")
    })
    .await;
    let mut once_more = impatient(&server.endpoint);
    once_more.retry.deadline = Duration::from_secs(60);
    let store = S3Store::connect(once_more).await.unwrap();
    let start = Instant::now();
    assert_eq!(store.get("k", None, 10, WHY).await.unwrap().1, "hello");
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(300), "{took:?}");
    let silent = http::start(|_| std::future::pending::<Vec<u8>>()).await;
    let store = S3Store::connect(impatient(&silent.endpoint)).await.unwrap();
    let body = Body::Bytes(vec![1; 3_000_000].into());
    let put = store.put("k", body, PutMode::Overwrite, &[], WHY);
    let failed = tokio::time::timeout(Duration::from_secs(60), put).await.unwrap().unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable { .. }), "{failed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_at_the_endpoint_is_an_outage_and_not_an_absence() {
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let store = connect(&format!("http://127.0.0.1:{port}")).await;
    for failed in [
        store.get("k", None, 10, WHY).await.map(|_| ()).unwrap_err(),
        store.head("k", WHY).await.map(|_| ()).unwrap_err(),
        store.list("d", None, WHY).await.map(|_| ()).unwrap_err(),
        store.delete(&["k".to_owned()], WHY).await.unwrap_err(),
    ] {
        assert!(matches!(failed, StoreError::Unavailable { .. }), "{failed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_404_that_is_not_the_stores_own_word_is_an_outage() {
    let server = http::start(|_| async {
        answer("404 Not Found", &[("Content-Type", "text/html")], b"<html>no such site</html>")
    })
    .await;
    let store = connect(&server.endpoint).await;
    for failed in [
        store.get("k", None, 10, WHY).await.map(|_| ()).unwrap_err(),
        store.head("k", WHY).await.map(|_| ()).unwrap_err(),
        store.list("d", None, WHY).await.map(|_| ()).unwrap_err(),
    ] {
        assert!(matches!(failed, StoreError::Unavailable { .. }), "{failed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicts_and_lost_answers_of_conditional_puts_are_told() {
    let server = http::start(|request| async move {
        match request.nth {
            0 => error("409 Conflict", "ConditionalRequestConflict"),
            // The first attempt's answer is lost, the second meets its object.
            1 => Vec::new(),
            _ => error("412 Precondition Failed", "PreconditionFailed"),
        }
    })
    .await;
    let store = connect(&server.endpoint).await;
    for requests in [1, 3] {
        let body = Body::Bytes(Bytes::from_static(b"x"));
        let refused = store.put("k", body, PutMode::Create, &[], WHY).await.unwrap_err();
        assert!(matches!(refused, StoreError::Precondition { .. }), "{refused}");
        assert_eq!(store.wire_requests(), Some(requests));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_ranges_is_told_apart() {
    let server = http::start(|_| async { object(b"0123456789") }).await;
    let store = connect(&server.endpoint).await;
    let refused = store.get("k", Some(2..5), 10, WHY).await.unwrap_err();
    assert!(matches!(refused, StoreError::Unsupported { .. }), "{refused}");
    let refused = store.get("k", None, 9, WHY).await.unwrap_err();
    assert!(matches!(refused, StoreError::BadBody { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_that_does_not_say_how_it_goes_on_is_refused() {
    let server = http::start(|_| async {
        answer(OK, &[], b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")
    })
    .await;
    let store = connect(&server.endpoint).await;
    let refused = store.list("d", None, WHY).await.unwrap_err();
    assert!(matches!(refused, StoreError::BadBody { .. }), "{refused}");
}

/// A page that names a next one is not the last, whatever else it forgets to say.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_names_a_next_one_goes_on() {
    let server = http::start(|request| async move {
        let dir = request.query("prefix").unwrap_or_default();
        let entry = |name| format!("<Contents><Key>{dir}{name}</Key><Size>1</Size></Contents>");
        let (entry, next) = match request.query("continuation-token").as_deref() {
            None => (entry("a"), "<NextContinuationToken>t</NextContinuationToken>"),
            Some(_) => (entry("b"), ""),
        };
        let page = format!("<ListBucketResult>{entry}{next}</ListBucketResult>");
        answer(OK, &[], page.as_bytes())
    })
    .await;
    let store = connect(&server.endpoint).await;
    let keys = |listed: Vec<vmailfs::store::ObjectMeta>| -> Vec<String> {
        listed.into_iter().map(|meta| meta.key).collect()
    };
    assert_eq!(keys(store.list("d", None, WHY).await.unwrap()), ["d/a", "d/b"]);
    assert_eq!(keys(store.list_some("d", None, 1, WHY).await.unwrap()), ["d/a"]);
    assert_eq!(store.wire_requests(), Some(3));
}

/// In the server's log, and in no signature: a proxy may change it.
#[tokio::test(flavor = "multi_thread")]
async fn every_request_says_why_it_is_made() {
    let seen: Arc<Mutex<Vec<(String, String, String)>>> = Arc::default();
    let sees = seen.clone();
    let server = http::start(move |request| {
        let header = |name| request.header(name).unwrap_or_default().to_owned();
        let kind = format!("{} {}", request.method, request.query("list-type").is_some());
        sees.lock().push((kind, header("user-agent"), header("authorization")));
        let bytes = match request.query("list-type") {
            Some(_) => answer(OK, &[], b"<ListBucketResult></ListBucketResult>"),
            None => object(b"x"),
        };
        async move { bytes }
    })
    .await;
    let store = connect(&server.endpoint).await;
    let one = || Body::Bytes(Bytes::from_static(b"x"));
    store.get("k", None, 1, Reason("fetch")).await.unwrap();
    store.put("k", one(), PutMode::Create, &[], Reason("publish")).await.unwrap();
    store.head("k", Reason("fsck")).await.unwrap();
    store.list("d", None, Reason("recover")).await.unwrap();
    store.list_dirs("", Reason("users")).await.unwrap();
    store.delete(&["k".to_owned()], Reason("gc")).await.unwrap();
    let seen = seen.lock().clone();
    let want = [
        ("GET false", "fetch"),
        ("PUT false", "publish"),
        ("HEAD false", "fsck"),
        ("GET true", "recover"),
        ("GET true", "users"),
        ("DELETE false", "gc"),
    ];
    assert_eq!(seen.len(), want.len(), "{seen:?}");
    for ((kind, agent, signed), (want, why)) in seen.iter().zip(want) {
        assert_eq!(kind, want);
        assert!(agent.ends_with(&format!(" reason/{why}")), "{agent}");
        let (_, headers) = signed.split_once("SignedHeaders=").unwrap();
        let headers = headers.split(',').next().unwrap();
        assert!(headers.split(';').all(|name| name != "user-agent"), "{signed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_wait_their_turn() {
    let server = http::start(|_| async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        object(b"x")
    })
    .await;
    let mut config = S3Config { max_requests: 1, ..config(&server.endpoint) };
    config.retry.attempt_timeout = Duration::from_secs(3);
    let store = S3Store::connect(config).await.unwrap();
    let start = Instant::now();
    // The last one waits longer than a silent store would be waited for.
    let gets = (0..7).map(|_| store.get("k", None, 1, WHY));
    for got in futures_util::future::join_all(gets).await {
        got.unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(4200));
    assert_eq!(store.wire_requests(), Some(7));
}
