//! What every store must do, as functions over the trait, run on each of them; and what the S3
//! client makes of servers that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use bytes::Bytes;
use std::sync::Arc;
use support::weed;
use vmailfs::store::dir::DirStore;
use vmailfs::store::mem::MemStore;
use vmailfs::store::probe::probe;
use vmailfs::store::s3::{S3Config, S3Store};
use vmailfs::store::{Body, ETag, ObjectStore, PutMode, Reason, StoreError, StoreResult};

const WHY: Reason = Reason("test");
const MIB: u64 = 1 << 20;

type Store = Arc<dyn ObjectStore>;

fn body(text: &str) -> Body {
    Body::Bytes(Bytes::copy_from_slice(text.as_bytes()))
}

async fn put(store: &dyn ObjectStore, key: &str, text: &str, mode: PutMode) -> StoreResult<ETag> {
    store.put(key, body(text), mode, &[], WHY).await
}

fn names(keys: &[&str]) -> Vec<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}

fn is_absent<T>(outcome: StoreResult<T>) -> bool {
    matches!(outcome, Err(StoreError::NotFound { .. }))
}

fn is_refused<T>(outcome: StoreResult<T>) -> bool {
    matches!(outcome, Err(StoreError::Precondition { .. }))
}

fn is_bad_body<T>(outcome: StoreResult<T>) -> bool {
    matches!(outcome, Err(StoreError::BadBody { .. }))
}

/// Bytes that compress badly and tell their place.
fn pattern(len: u64) -> Vec<u8> {
    (0..len).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// All of it, on one store. Each part uses a directory of its own.
async fn conformance(store: Store) {
    put_get_head(&*store).await;
    ranges_and_limits(&*store).await;
    metadata(&*store).await;
    odd_keys(&*store).await;
    listings(&*store).await;
    deletes(&*store).await;
    conditions(&*store).await;
    create_race(&store).await;
    counter(&store).await;
    large_file(&*store).await;
    bad_arguments(&*store).await;
    probe(&*store, "probe", "t0ken").await.unwrap();
    assert!(store.list("probe", None, WHY).await.unwrap().is_empty());
}

async fn put_get_head(store: &dyn ObjectStore) {
    assert!(is_absent(store.get("a/x/none", None, 10, WHY).await));
    assert!(is_absent(store.head("a/x/none", WHY).await));
    let file = tempfile::tempfile().unwrap();
    assert!(is_absent(store.download("a/x/none", &file, WHY).await));
    for text in ["hello", "", "hello again"] {
        let tag = put(store, "a/x/one", text, PutMode::Overwrite).await.unwrap();
        let (meta, bytes) = store.get("a/x/one", None, 11, WHY).await.unwrap();
        assert_eq!(bytes, text);
        assert_eq!((meta.key.as_str(), meta.size), ("a/x/one", text.len() as u64));
        assert_eq!(meta.etag, Some(tag.clone()));
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
        assert!((meta.modified.unwrap() - now).abs() < 120, "{:?} {now}", meta.modified);
        let head = store.head("a/x/one", WHY).await.unwrap();
        assert_eq!((head.size, head.etag), (text.len() as u64, Some(tag)));
    }
}

async fn ranges_and_limits(store: &dyn ObjectStore) {
    put(store, "r/one", "0123456789", PutMode::Overwrite).await.unwrap();
    for (range, want) in [(0..1, "0"), (3..7, "3456"), (9..10, "9"), (0..10, "0123456789")] {
        let (meta, bytes) = store.get("r/one", Some(range), 10, WHY).await.unwrap();
        assert_eq!((bytes, meta.size), (Bytes::from_static(want.as_bytes()), 10));
    }
    for range in [5..11, 10..11, 100..200] {
        assert!(is_bad_body(store.get("r/one", Some(range.clone()), 999, WHY).await), "{range:?}");
    }
    assert!(is_absent(store.get("r/none", Some(0..5), 10, WHY).await));
    assert!(is_bad_body(store.get("r/one", None, 9, WHY).await));
    assert!(is_bad_body(store.get("r/one", Some(0..6), 5, WHY).await));
    assert_eq!(store.get("r/one", Some(0..5), 5, WHY).await.unwrap().1, "01234");
}

async fn metadata(store: &dyn ObjectStore) {
    let pairs = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
    };
    let long = "x".repeat(1500);
    for (n, odd) in [
        pairs(&[]),
        pairs(&[("folder", "INBOX")]),
        pairs(&[
            ("a-b", "a=b;c,d\"e\"'f'"),
            ("path", "Entw&APw-rfe/2024 (alt)/%C3%BC"),
            ("z9", "~!@#$^*()_+|{}:<>?`[]\\"),
        ]),
        pairs(&[("long", &long)]),
        pairs(&[("base64", "/+8=")]),
    ]
    .iter()
    .enumerate()
    {
        let key = format!("m/{n}");
        store.put(&key, body("x"), PutMode::Create, odd, WHY).await.unwrap();
        assert_eq!(&store.head(&key, WHY).await.unwrap().metadata, odd);
        assert_eq!(&store.get(&key, None, 1, WHY).await.unwrap().0.metadata, odd);
    }
    for (name, value) in [("Upper", "x"), ("n", " x"), ("n", "ü"), ("n", "a\nb"), ("n", "")] {
        let odd = pairs(&[(name, value)]);
        let refused = store.put("m/bad", body("x"), PutMode::Create, &odd, WHY).await;
        assert!(matches!(refused, Err(StoreError::Unsupported { .. })), "{name:?} {value:?}");
    }
}

async fn odd_keys(store: &dyn ObjectStore) {
    let mut keys: Vec<String> = [
        "1-2.3.M1P2.host,S=10,W=11:2,FS",
        "a b+c%20d%",
        "x&y=z?q#f",
        "~!@$^*()_{}[]|<>`'\"",
        "..a",
    ]
    .iter()
    .map(|name| format!("odd/d{{}} +%/{name}"))
    .collect();
    keys.sort_unstable();
    for key in &keys {
        put(store, key, key, PutMode::Create).await.unwrap();
        let (meta, bytes) = store.get(key, None, 200, WHY).await.unwrap();
        assert_eq!((&meta.key, bytes), (key, Bytes::copy_from_slice(key.as_bytes())));
    }
    let listed = store.list("odd/d{} +%", None, WHY).await.unwrap();
    assert_eq!(listed.into_iter().map(|m| m.key).collect::<Vec<_>>(), keys);
    assert_eq!(store.list_dirs("odd", WHY).await.unwrap(), ["d{} +%"]);
    store.delete(&keys, WHY).await.unwrap();
    assert!(store.list("odd/d{} +%", None, WHY).await.unwrap().is_empty());
}

async fn listings(store: &dyn ObjectStore) {
    assert!(store.list("l/none", None, WHY).await.unwrap().is_empty());
    assert!(store.list_dirs("l/none", WHY).await.unwrap().is_empty());
    for key in ["l/d/b", "l/d/a", "l/d/a-", "l/d/a0", "l/d/sub/x", "l/d-e/x", "l/d.f/x", "l/Z"] {
        put(store, key, key, PutMode::Create).await.unwrap();
    }
    let keys = |dir: &'static str, after: Option<&'static str>| async move {
        let listed = store.list(dir, after, WHY).await.unwrap();
        listed.into_iter().map(|meta| meta.key).collect::<Vec<_>>()
    };
    assert_eq!(keys("l/d", None).await, ["l/d/a", "l/d/a-", "l/d/a0", "l/d/b"]);
    assert_eq!(keys("l/d", Some("l/d/a")).await, ["l/d/a-", "l/d/a0", "l/d/b"]);
    assert_eq!(keys("l/d", Some("l/d/a+")).await, ["l/d/a-", "l/d/a0", "l/d/b"]);
    assert_eq!(keys("l/d", Some("l/d/b")).await, [""; 0]);
    let between = store.list_before("l/d", Some("l/d/a"), "l/d/b", WHY).await.unwrap();
    assert_eq!(between.iter().map(|meta| &*meta.key).collect::<Vec<_>>(), ["l/d/a-", "l/d/a0"]);
    assert_eq!(keys("l", None).await, ["l/Z"]);
    // Directories do not count.
    let some = store.list_some("l/d", Some("l/d/a0"), 1, WHY).await.unwrap();
    assert_eq!(some.iter().map(|meta| &*meta.key).collect::<Vec<_>>(), ["l/d/b"]);
    assert!(store.list_some("l/d", Some("l/d/b"), 1, WHY).await.unwrap().is_empty());
    assert_eq!(store.list_dirs("l", WHY).await.unwrap(), ["d", "d-e", "d.f"]);
    assert_eq!(store.list_dirs("l/d", WHY).await.unwrap(), ["sub"]);
    assert!(store.list_dirs("", WHY).await.unwrap().contains(&"l".to_owned()));
    let meta = &store.list("l/d", None, WHY).await.unwrap()[0];
    // The store's clock is the one by which it dates its objects.
    let (time, modified) = (store.time().unwrap(), meta.modified.unwrap());
    assert!((modified - 5..modified + 300).contains(&time), "{time} {modified}");
    assert_eq!((meta.size, meta.modified.is_some()), (5, true));
    put(store, "top", "x", PutMode::Create).await.unwrap();
    assert_eq!(keys("", None).await, ["top"]);
}

/// More than a page of a listing and of a bulk delete.
async fn many(store: Store) {
    let keys: Vec<String> = (0..2345).map(|n| format!("many/{n:05}")).collect();
    for some in keys.chunks(64) {
        let puts = some.iter().map(|key| put(&*store, key, "x", PutMode::Overwrite));
        for outcome in futures_util::future::join_all(puts).await {
            outcome.unwrap();
        }
    }
    let listed = store.list("many", None, WHY).await.unwrap();
    assert_eq!(listed.into_iter().map(|meta| meta.key).collect::<Vec<_>>(), keys);
    let listed = store.list("many", Some("many/01000"), WHY).await.unwrap();
    assert_eq!(listed.into_iter().map(|meta| meta.key).collect::<Vec<_>>(), keys[1001..]);
    let some = store.list_some("many", Some("many/00003"), 1500, WHY).await.unwrap();
    assert_eq!(some.into_iter().map(|meta| meta.key).collect::<Vec<_>>(), keys[4..1504]);
    let rest = store.list_some("many", Some("many/02340"), 1500, WHY).await.unwrap();
    assert_eq!(rest.into_iter().map(|meta| meta.key).collect::<Vec<_>>(), keys[2341..]);
    // The pages behind the end are not asked for.
    let before = store.wire_requests();
    assert_eq!(store.list_some("many", None, 10, WHY).await.unwrap().len(), 10);
    if let (Some(before), Some(after)) = (before, store.wire_requests()) {
        assert_eq!(after - before, 1);
    }
    let before = store.wire_requests();
    let listed = store.list_before("many", Some("many/00003"), "many/00006", WHY).await.unwrap();
    assert_eq!(listed.len(), 2);
    if let (Some(before), Some(after)) = (before, store.wire_requests()) {
        assert_eq!(after - before, 1);
    }
    let before = store.wire_requests();
    store.delete(&keys, WHY).await.unwrap();
    if let (Some(before), Some(after)) = (before, store.wire_requests()) {
        assert_eq!(after - before, 3);
    }
    assert!(store.list("many", None, WHY).await.unwrap().is_empty());
}

async fn deletes(store: &dyn ObjectStore) {
    for key in ["del/a", "del/b", "del/c"] {
        put(store, key, "x", PutMode::Create).await.unwrap();
    }
    store.delete(&names(&["del/a", "del/none", "del/b"]), WHY).await.unwrap();
    assert!(is_absent(store.head("del/a", WHY).await));
    store.head("del/c", WHY).await.unwrap();
    store.delete(&names(&["del/c"]), WHY).await.unwrap();
    store.delete(&names(&["del/c"]), WHY).await.unwrap();
    store.delete(&[], WHY).await.unwrap();
    assert!(store.list("del", None, WHY).await.unwrap().is_empty());
    put(store, "del/a", "again", PutMode::Create).await.unwrap();
}

async fn conditions(store: &dyn ObjectStore) {
    let stranger = ETag("\"0123456789abcdef0123456789abcdef\"".to_owned());
    assert!(is_refused(put(store, "c/one", "x", PutMode::Update(stranger.clone())).await));
    let first = put(store, "c/one", "first", PutMode::Create).await.unwrap();
    assert!(is_refused(put(store, "c/one", "other", PutMode::Create).await));
    assert!(is_refused(put(store, "c/one", "other", PutMode::Update(stranger)).await));
    let second = put(store, "c/one", "second", PutMode::Update(first.clone())).await.unwrap();
    assert_ne!(first, second);
    assert!(is_refused(put(store, "c/one", "third", PutMode::Update(first)).await));
    let (meta, bytes) = store.get("c/one", None, 99, WHY).await.unwrap();
    assert_eq!((meta.etag, bytes), (Some(second), Bytes::from_static(b"second")));
}

async fn create_race(store: &Store) {
    for round in 0..5 {
        let key = format!("race/{round}");
        let writers: Vec<_> = (0..8)
            .map(|n| {
                let (store, key) = (store.clone(), key.clone());
                tokio::spawn(
                    async move { put(&*store, &key, &n.to_string(), PutMode::Create).await },
                )
            })
            .collect();
        let mut winner = None;
        for (n, writer) in writers.into_iter().enumerate() {
            match writer.await.unwrap() {
                Ok(_) => assert_eq!(winner.replace(n), None, "two winners in round {round}"),
                Err(StoreError::Precondition { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        let bytes = store.get(&key, None, 9, WHY).await.unwrap().1;
        assert_eq!(bytes, winner.expect("a winner").to_string());
    }
}

/// Six writers add 20 each by compare-and-swap.
async fn counter(store: &Store) {
    put(&**store, "counter/n", "0", PutMode::Create).await.unwrap();
    let writers: Vec<_> = (0..6)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut done = 0;
                while done < 20 {
                    let (meta, bytes) = store.get("counter/n", None, 9, WHY).await.unwrap();
                    let n: u32 = std::str::from_utf8(&bytes).unwrap().parse().unwrap();
                    let mode = PutMode::Update(meta.etag.unwrap());
                    match put(&*store, "counter/n", &(n + 1).to_string(), mode).await {
                        Ok(_) => done += 1,
                        Err(StoreError::Precondition { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(store.get("counter/n", None, 9, WHY).await.unwrap().1, "120");
}

async fn large_file(store: &dyn ObjectStore) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("body");
    for len in [100, MIB, MIB + 1, 20 * MIB] {
        let bytes = pattern(len);
        std::fs::write(&path, &bytes).unwrap();
        let key = format!("large/{len}");
        let from_file = Body::File { path: path.clone(), len };
        let tag = store.put(&key, from_file, PutMode::Create, &[], WHY).await.unwrap();
        let to = dir.path().join("copy");
        let file = std::fs::File::create(&to).unwrap();
        let meta = store.download(&key, &file, WHY).await.unwrap();
        assert_eq!((meta.size, &meta.etag), (len, &Some(tag.clone())));
        assert!(std::fs::read(&to).unwrap() == bytes, "{len}");
        let middle = len / 2..len / 2 + 50;
        let part = store.get(&key, Some(middle.clone()), 50, WHY).await.unwrap();
        assert_eq!((&part.0.etag, part.0.size), (&Some(tag.clone()), len));
        assert_eq!(part.1, bytes[middle.start as usize..middle.end as usize]);
        assert_eq!(store.head(&key, WHY).await.unwrap().etag, Some(tag.clone()));
        let from_memory = Body::Bytes(bytes.into());
        let mode = PutMode::Update(tag);
        store.put(&key, from_memory, mode, &[], WHY).await.unwrap();
        assert_eq!(store.head(&key, WHY).await.unwrap().size, len);
        let wrong = Body::File { path: path.clone(), len: len + 1 };
        assert!(is_bad_body(store.put("large/x", wrong, PutMode::Create, &[], WHY).await));
        assert!(is_absent(store.head("large/x", WHY).await));
    }
}

async fn bad_arguments(store: &dyn ObjectStore) {
    let unsupported = |what: &str, e: StoreError| {
        assert!(matches!(e, StoreError::Unsupported { .. }), "{what:?}: {e}");
    };
    for key in ["", "/a", "a/", "a//b", "../a", "a/./b", "a\\b", "ä"] {
        unsupported(key, put(store, key, "x", PutMode::Overwrite).await.unwrap_err());
        unsupported(key, store.get(key, None, 9, WHY).await.unwrap_err());
        unsupported(key, store.head(key, WHY).await.unwrap_err());
        unsupported(key, store.delete(&names(&[key]), WHY).await.unwrap_err());
    }
    unsupported("list", store.list("a/", None, WHY).await.unwrap_err());
    unsupported("after", store.list("a", Some("b/c"), WHY).await.unwrap_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    let store: Store = Arc::new(MemStore::new());
    conformance(store.clone()).await;
    many(store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn directory() {
    let dir = tempfile::tempdir().unwrap();
    let store: Store = Arc::new(DirStore::open(dir.path()).unwrap());
    conformance(store.clone()).await;
    many(store).await;
}

/// Conditions hold between processes: two openings share nothing but the directory.
#[tokio::test(flavor = "multi_thread")]
async fn directory_opened_twice() {
    let dir = tempfile::tempdir().unwrap();
    let one: Store = Arc::new(DirStore::open(dir.path()).unwrap());
    let two: Store = Arc::new(DirStore::open(dir.path()).unwrap());
    for round in 0..50 {
        let key = format!("two/{round}");
        let (a, b) = tokio::join!(
            put(&*one, &key, "a", PutMode::Create),
            put(&*two, &key, "b", PutMode::Create)
        );
        let tag = match (a, b) {
            (Ok(tag), Err(StoreError::Precondition { .. })) => tag,
            (Err(StoreError::Precondition { .. }), Ok(tag)) => tag,
            other => panic!("{other:?}"),
        };
        let (a, b) = tokio::join!(
            put(&*one, &key, "aa", PutMode::Update(tag.clone())),
            put(&*two, &key, "bb", PutMode::Update(tag))
        );
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    }
}

async fn weed_server() -> &'static weed::Weed {
    tokio::task::spawn_blocking(weed::server).await.expect("SeaweedFS for the S3 tests")
}

#[tokio::test(flavor = "multi_thread")]
async fn seaweedfs() {
    let weed = weed_server().await;
    let config = weed.config(&weed.new_bucket().await, "some/prefix");
    conformance(Arc::new(S3Store::connect(config).await.unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seaweedfs_without_prefix_and_with_checksums() {
    let weed = weed_server().await;
    let config = S3Config { request_checksums: true, ..weed.config(&weed.new_bucket().await, "") };
    let store: Store = Arc::new(S3Store::connect(config).await.unwrap());
    conformance(store.clone()).await;
    many(store).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn seaweedfs_says_what_is_wrong() {
    let weed = weed_server().await;
    let bucket = weed.new_bucket().await;
    let missing = S3Store::connect(weed.config("no-such-bucket", "p")).await.unwrap();
    let no_store = |what: &str, e: StoreError| {
        assert!(matches!(e, StoreError::NoSuchStore { .. }), "{what}: {e}");
    };
    no_store("get", missing.get("a", None, 9, WHY).await.unwrap_err());
    no_store("head", missing.head("a", WHY).await.unwrap_err());
    no_store("list", missing.list("a", None, WHY).await.unwrap_err());
    // SeaweedFS makes the bucket when something is put into it: the probe must ask first.
    let error = probe(&missing, "probe", "t0ken").await.unwrap_err();
    assert!(error.to_string().starts_with("reaching the store: no such store: "), "{error}");
    let config =
        S3Config { secret_access_key: Some("wrong".to_owned()), ..weed.config(&bucket, "p") };
    let denied = S3Store::connect(config).await.unwrap();
    for error in [
        denied.get("a", None, 9, WHY).await.unwrap_err(),
        denied.head("a", WHY).await.unwrap_err(),
        denied.list("a", None, WHY).await.unwrap_err(),
        put(&denied, "a", "x", PutMode::Create).await.unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    }
}
