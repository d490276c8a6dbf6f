//! A real S3 server behind a proxy that fails: each fault is passed over by a retry, or told by
//! its right name, within a bounded number of tries and a bounded time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use std::time::{Duration, Instant};
use support::proxy::{Call, Fault, Proxy, Rule};
use support::weed;
use vmailfs::store::s3::{S3Config, S3Store};
use vmailfs::store::{Body, ObjectStore, PutMode, Reason, RetryPolicy, StoreError, StoreResult};

const WHY: Reason = Reason("test");
const ATTEMPTS: u32 = 4;
/// No server of a busy machine is silent for so long.
const SILENCE: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(8);

async fn world() -> (Proxy, S3Store) {
    let server = weed::server();
    let bucket = server.new_bucket().await;
    let proxy = Proxy::start(&server.endpoint());
    let config = S3Config {
        endpoint: Some(proxy.endpoint()),
        region: Some("us-east-1".to_owned()),
        retry: RetryPolicy {
            attempt_timeout: SILENCE,
            deadline: DEADLINE,
            first_pause: Duration::from_millis(20),
            attempts: ATTEMPTS,
        },
        ..server.config(&bucket, "p")
    };
    (proxy, S3Store::connect(config).await.unwrap())
}

fn mail(n: usize) -> Bytes {
    (0..20_000 + n).map(|i| (i / 7 + n) as u8).collect::<Vec<u8>>().into()
}

/// One request of each kind, and what it must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Get,
    Range,
    Download,
    Head,
    List,
    ListDirs,
    Put,
    PutFile,
    Create,
    Update,
    Delete,
    DeleteMany,
}

impl Ask {
    const ALL: [Ask; 12] = [
        Ask::Get,
        Ask::Range,
        Ask::Download,
        Ask::Head,
        Ask::List,
        Ask::ListDirs,
        Ask::Put,
        Ask::PutFile,
        Ask::Create,
        Ask::Update,
        Ask::Delete,
        Ask::DeleteMany,
    ];

    fn writes(self) -> bool {
        matches!(self, Ask::Put | Ask::PutFile | Ask::Create | Ask::Update)
    }

    fn conditional(self) -> bool {
        matches!(self, Ask::Create | Ask::Update)
    }

    /// What must be there before.
    async fn prepare(self, store: &S3Store, dir: &str) {
        let put = |name: &str, n| {
            let (key, body) = (format!("{dir}/{name}"), Body::Bytes(mail(n)));
            async move { store.put(&key, body, PutMode::Overwrite, &[], WHY).await.unwrap() }
        };
        for (n, name) in ["a", "b", "sub/c"].into_iter().enumerate() {
            put(name, n).await;
        }
    }

    /// Asks, and checks what is told to have been done.
    async fn ask(self, store: &S3Store, dir: &str) -> StoreResult<()> {
        let key = |name: &str| format!("{dir}/{name}");
        let (a, new) = (key("a"), key("new"));
        match self {
            Ask::Get => assert_eq!(store.get(&a, None, 1 << 20, WHY).await?.1, mail(0)),
            Ask::Range => {
                let (meta, bytes) = store.get(&a, Some(100..9000), 1 << 20, WHY).await?;
                assert_eq!((meta.size, bytes), (20_000, mail(0).slice(100..9000)));
            }
            Ask::Download => {
                let file = tempfile::NamedTempFile::new().unwrap();
                store.download(&a, file.as_file(), WHY).await?;
                assert!(std::fs::read(file.path()).unwrap() == mail(0));
            }
            Ask::Head => assert_eq!(store.head(&a, WHY).await?.size, 20_000),
            Ask::List => {
                let found = store.list(dir, None, WHY).await?;
                let found: Vec<_> = found.into_iter().map(|m| (m.key, m.size)).collect();
                assert_eq!(found, [(key("a"), 20_000), (key("b"), 20_001)]);
            }
            Ask::ListDirs => assert_eq!(store.list_dirs(dir, WHY).await?, ["sub"]),
            Ask::Put => {
                store.put(&new, Body::Bytes(mail(7)), PutMode::Overwrite, &[], WHY).await?;
            }
            Ask::PutFile => {
                let file = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(file.path(), mail(7)).unwrap();
                let body = Body::File { path: file.path().to_owned(), len: 20_007 };
                store.put(&new, body, PutMode::Overwrite, &[], WHY).await?;
            }
            Ask::Create => {
                store.put(&new, Body::Bytes(mail(7)), PutMode::Create, &[], WHY).await?;
            }
            Ask::Update => {
                let tag = store.head(&a, WHY).await?.etag.unwrap();
                store.put(&a, Body::Bytes(mail(7)), PutMode::Update(tag), &[], WHY).await?;
            }
            Ask::Delete => store.delete(&[a], WHY).await?,
            Ask::DeleteMany => store.delete(&[a, key("b")], WHY).await?,
        }
        Ok(())
    }

    /// What is in the store once the request is known to have been carried out.
    async fn check(self, store: &S3Store, dir: &str) {
        let key = |name: &str| format!("{dir}/{name}");
        let written = match self {
            Ask::Put | Ask::PutFile | Ask::Create => key("new"),
            Ask::Update => key("a"),
            Ask::Delete | Ask::DeleteMany => {
                let gone = store.get(&key("a"), None, 1 << 20, WHY).await;
                assert!(matches!(gone, Err(StoreError::NotFound { .. })), "{gone:?}");
                return;
            }
            _ => return,
        };
        assert_eq!(store.get(&written, None, 1 << 20, WHY).await.unwrap().1, mail(7));
    }
}

fn ours(call: &Call) -> bool {
    call.target.contains("/p") || call.target.contains("prefix=p") || call.method == "POST"
}

/// Faults that pass, with what they are called.
fn passing() -> Vec<(&'static str, Fault)> {
    vec![
        ("reset before", Fault::ResetBefore),
        ("reset after the body", Fault::ResetAfterBody),
        ("lost answer", Fault::LoseAnswer),
        ("reset in the answer", Fault::ResetMiddle),
        ("black hole", Fault::Stall),
        ("black hole in the answer", Fault::StallMiddle),
        ("slow", Fault::Delay(SILENCE / 4)),
        ("too slow", Fault::Delay(SILENCE * 2)),
        ("500", Fault::error("500 Internal Server Error", "InternalError")),
        ("502", Fault::Answer("502 Bad Gateway", vec![], b"<html>bad</html>".to_vec())),
        ("503", Fault::error("503 Service Unavailable", "SlowDown")),
        ("504", Fault::Answer("504 Gateway Timeout", vec![], Vec::new())),
        ("429", Fault::error("429 Too Many Requests", "SlowDown")),
        ("short", Fault::ShortBody),
        ("error with 200", Fault::error("200 OK", "InternalError")),
        ("nothing with 200", Fault::Answer("200 OK", vec![], Vec::new())),
        ("page with 200", Fault::Answer("200 OK", vec![], b"<html>welcome</html>".to_vec())),
        ("404 of a proxy", Fault::Answer("404 Not Found", vec![], b"<html>?</html>".to_vec())),
    ]
}

/// Which faults a request cannot tell from an answer; others must.
fn deceives(ask: Ask, fault: &Fault) -> bool {
    match fault {
        // A body of other length and bytes than were put: who knows the checksum finds out.
        Fault::Answer("200 OK", ..) => {
            matches!(ask, Ask::Get | Ask::Download | Ask::Head | Ask::Delete)
        }
        // The answer to a HEAD is headers only.
        Fault::Answer("404 Not Found", ..) => ask == Ask::Delete,
        _ => false,
    }
}

/// Whether the store may have done it although the answer did not come.
fn loses_the_answer(fault: &Fault) -> bool {
    let cut = matches!(fault, Fault::LoseAnswer | Fault::ResetMiddle | Fault::StallMiddle);
    cut || matches!(fault, Fault::Delay(_))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_fault_is_passed_over() {
    let (proxy, store) = world().await;
    let mut wrong = Vec::new();
    for (number, (name, fault)) in passing().into_iter().enumerate() {
        let asks: Vec<Ask> = Ask::ALL.into_iter().filter(|ask| !deceives(*ask, &fault)).collect();
        let dir = |ask: Ask| format!("{ask:?}{number}/d");
        for ask in &asks {
            ask.prepare(&store, &dir(*ask)).await;
        }
        proxy.forget_calls();
        for ask in &asks {
            let (ask, word) = (*ask, format!("{ask:?}{number}"));
            // An update looks first; it is the write that is meant. A bulk delete names its keys
            // in its body.
            let fits = move |call: &Call| match ask {
                Ask::DeleteMany => call.method == "POST",
                _ => call.target.contains(&word) && (!ask.writes() || call.method == "PUT"),
            };
            proxy.rule(Rule::when(fault.clone(), fits).times(1));
        }
        let asked = asks.iter().map(|ask| {
            let (store, dir) = (&store, dir(*ask));
            async move {
                let start = Instant::now();
                (*ask, ask.ask(store, &dir).await, start.elapsed())
            }
        });
        let outcomes = futures_util::future::join_all(asked).await;
        proxy.clear();
        let calls = proxy.calls();
        if calls.iter().filter(|call| call.spoilt).count() != asks.len() {
            wrong.push(format!("{name}: not every request met it"));
        }
        // One more for each; an absence is asked for twice.
        if calls.len() > asks.len() * 2 + 4 {
            wrong.push(format!("{name}: {} calls", calls.len()));
        }
        for (ask, outcome, took) in outcomes {
            let own = ask.conditional() && loses_the_answer(&fault);
            match outcome {
                Ok(()) => {}
                // Its own first attempt: the caller reads back and compares.
                Err(StoreError::Precondition { .. }) if own => {}
                Err(error) => {
                    wrong.push(format!("{name}, {ask:?}: {error}"));
                    continue;
                }
            }
            if took > SILENCE * 5 {
                wrong.push(format!("{name}, {ask:?}: {took:?}"));
            }
            ask.check(&store, &dir(ask)).await;
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lasting_fault_is_told_in_time_and_never_as_an_absence() {
    let (proxy, store) = world().await;
    let mut wrong = Vec::new();
    for ask in Ask::ALL {
        ask.prepare(&store, &format!("{ask:?}")).await;
    }
    for (name, fault) in passing() {
        if name == "slow" {
            continue;
        }
        proxy.rule(Rule::when(fault.clone(), ours));
        proxy.forget_calls();
        let start = Instant::now();
        // An update looks first, by a HEAD; a bulk delete that failed is made one by one; some
        // answers have no body that could be short.
        let clear = |ask: &Ask| match (ask, &fault) {
            (Ask::Update, _) if deceives(Ask::Head, &fault) => false,
            (Ask::DeleteMany, _) if deceives(Ask::Delete, &fault) => false,
            (Ask::Get | Ask::Range | Ask::Download, Fault::ShortBody) => true,
            (Ask::List | Ask::ListDirs, Fault::ShortBody) => true,
            (_, Fault::ShortBody) => false,
            _ => !deceives(*ask, &fault),
        };
        let asked = Ask::ALL.into_iter().filter(clear).map(|ask| {
            let store = &store;
            async move { (ask, ask.ask(store, &format!("{ask:?}")).await) }
        });
        let outcomes = futures_util::future::join_all(asked).await;
        let (took, calls) = (start.elapsed(), proxy.calls().len());
        proxy.clear();
        for (ask, outcome) in &outcomes {
            let told = match outcome {
                Err(StoreError::Unavailable { .. } | StoreError::BadBody { .. }) => true,
                Err(StoreError::Precondition { .. }) => ask.conditional(),
                Err(StoreError::Unsupported { .. }) => *ask == Ask::Range,
                _ => false,
            };
            if !told {
                wrong.push(format!("{name}, {ask:?}: {outcome:?}"));
            }
        }
        // A delete of two falls back to deletes of one; an absence is asked for twice.
        let most = (outcomes.len() + 4) * ATTEMPTS as usize;
        if took > DEADLINE * 2 + SILENCE || calls > most {
            wrong.push(format!("{name}: {took:?}, {calls} calls"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // And as soon as it works again, it works.
    for ask in Ask::ALL {
        ask.prepare(&store, &format!("after-{ask:?}")).await;
        ask.ask(&store, &format!("after-{ask:?}")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_for_a_while() {
    let (proxy, store) = world().await;
    for ask in Ask::ALL {
        ask.prepare(&store, &format!("{ask:?}")).await;
    }
    proxy.refuse();
    for ask in Ask::ALL {
        let start = Instant::now();
        let failed = ask.ask(&store, &format!("{ask:?}")).await.unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable { .. }), "{ask:?}: {failed}");
        assert!(start.elapsed() < DEADLINE, "{ask:?}: {:?}", start.elapsed());
    }
    proxy.open();
    for ask in Ask::ALL {
        ask.ask(&store, &format!("{ask:?}")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_spoilt_on_its_way_there_is_refused_and_sent_again() {
    let (proxy, store) = world().await;
    for (times, ask) in [(1, Ask::Put), (2, Ask::PutFile), (1, Ask::Create), (1, Ask::Update)] {
        let dir = format!("{ask:?}");
        ask.prepare(&store, &dir).await;
        proxy.rule(Rule::when(Fault::FlipUpload, |call| call.method == "PUT").times(times));
        ask.ask(&store, &dir).await.unwrap();
        proxy.clear();
        ask.check(&store, &dir).await;
    }
    proxy.rule(Rule::when(Fault::FlipUpload, |call| call.method == "PUT"));
    let failed = Ask::Put.ask(&store, "never").await.unwrap_err();
    assert!(matches!(failed, StoreError::BadBody { .. }), "{failed}");
    proxy.clear();
    assert!(store.list("never", None, WHY).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pause_that_is_asked_for_is_made_and_the_others_differ() {
    let (proxy, store) = world().await;
    Ask::Get.prepare(&store, "d").await;
    for (fault, least) in [
        (Fault::busy(1), Duration::from_secs(1)),
        (Fault::error("429 Too Many Requests", "SlowDown"), Duration::from_millis(10)),
    ] {
        proxy.rule(Rule::when(fault, ours).times(1));
        let start = Instant::now();
        Ask::Get.ask(&store, "d").await.unwrap();
        assert!(start.elapsed() >= least, "{:?}", start.elapsed());
        proxy.clear();
    }
    // One that is longer than the deadline is not waited for.
    proxy.rule(Rule::when(Fault::busy(1000), ours));
    let start = Instant::now();
    Ask::Get.ask(&store, "d").await.unwrap_err();
    assert!(start.elapsed() < DEADLINE);
    proxy.clear();
    // Clients that failed together do not come back together.
    proxy.forget_calls();
    proxy.rule(Rule::when(Fault::ResetAfterBody, ours).times(32));
    let gets: Vec<_> = (0..16).map(|_| Ask::Get.ask(&store, "d")).collect();
    for got in futures_util::future::join_all(gets).await {
        got.unwrap();
    }
    let calls = proxy.calls();
    let last = &calls[calls.len() - 16..];
    let spread = last[15].at - last[0].at;
    assert!(spread >= Duration::from_millis(10), "all within {spread:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_is_whole_or_fails() {
    let (proxy, store) = world().await;
    let puts = (0..1010).map(|n| {
        let (store, key) = (&store, format!("many/{n:05}"));
        let body = Body::Bytes(Bytes::from_static(b"x"));
        async move { store.put(&key, body, PutMode::Overwrite, &[], WHY).await.unwrap() }
    });
    stream::iter(puts).buffer_unordered(16).collect::<Vec<_>>().await;
    let second = |call: &Call| call.target.contains("continuation-token");
    let faults = [
        Fault::ResetBefore,
        Fault::LoseAnswer,
        Fault::ResetMiddle,
        Fault::ShortBody,
        Fault::Truncate,
        Fault::Stall,
        Fault::error("503 Service Unavailable", "SlowDown"),
        Fault::error("200 OK", "InternalError"),
        Fault::Answer("200 OK", vec![], Vec::new()),
    ];
    for fault in faults {
        proxy.rule(Rule::when(fault.clone(), second).times(1));
        let listed = store.list("many", None, WHY).await;
        let listed = listed.unwrap_or_else(|e| panic!("{fault:?} once: {e}"));
        assert_eq!(listed.len(), 1010, "{fault:?}");
        proxy.clear();
        proxy.rule(Rule::when(fault.clone(), second));
        let failed = store.list("many", None, WHY).await.map(|all| all.len());
        let told =
            matches!(failed, Err(StoreError::Unavailable { .. } | StoreError::BadBody { .. }));
        assert!(told, "{fault:?}: {failed:?}");
        proxy.clear();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_third_request_fails_and_all_is_well() {
    let (proxy, store) = world().await;
    for (_, fault) in passing().into_iter().filter(|(_, fault)| {
        !matches!(fault, Fault::Answer("200 OK" | "404 Not Found", ..) | Fault::Delay(_))
    }) {
        proxy.rule(Rule::all(fault).chance(0.03));
    }
    let work = (0..60).map(|n| {
        let (store, key) = (&store, format!("k{n}/x"));
        async move {
            // More patience than one request has: what a delivery's own tries are for.
            for _ in 0..5 {
                let body = Body::Bytes(mail(n));
                let put = store.put(&key, body, PutMode::Overwrite, &[], WHY).await;
                let Ok(_) = put else { continue };
                if let Ok((_, bytes)) = store.get(&key, None, 1 << 20, WHY).await {
                    assert_eq!(bytes, mail(n));
                    return true;
                }
            }
            false
        }
    });
    assert!(futures_util::future::join_all(work).await.into_iter().all(|done| done));
}
