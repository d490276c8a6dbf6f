use super::super::faulty::{Fault, FaultyStore};
use super::super::mem::MemStore;
use super::super::{ObjectMeta, Op};
use super::*;
use async_trait::async_trait;
use std::ops::Range;
use std::sync::Arc;

/// What a bad server makes of a put.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Vice {
    IgnoresCreate,
    IgnoresUpdate,
    LooksThenWrites,
    Refuses,
    DropsMetadata,
    ListsNothing,
}

#[derive(Debug)]
struct BadStore(MemStore, Vice);

#[async_trait]
impl ObjectStore for BadStore {
    fn describe(&self) -> String {
        "bad".into()
    }
    async fn get(
        &self,
        key: &str,
        range: Option<Range<u64>>,
        limit: u64,
        why: Reason,
    ) -> StoreResult<(ObjectMeta, Bytes)> {
        self.0.get(key, range, limit, why).await
    }
    async fn download(&self, k: &str, f: &std::fs::File, w: Reason) -> StoreResult<ObjectMeta> {
        self.0.download(k, f, w).await
    }
    async fn put(
        &self,
        key: &str,
        body: Body,
        mode: PutMode,
        metadata: &[(String, String)],
        why: Reason,
    ) -> StoreResult<ETag> {
        let mut metadata = metadata;
        let mut mode = mode;
        match (self.1, &mode) {
            (Vice::IgnoresCreate, PutMode::Create) | (Vice::IgnoresUpdate, PutMode::Update(_)) => {
                mode = PutMode::Overwrite;
            }
            (Vice::Refuses, PutMode::Create) => {
                return Err(StoreError::Unsupported { detail: "501".into() });
            }
            (Vice::LooksThenWrites, PutMode::Create) => {
                let absent = self.0.head(key, why).await.is_err();
                tokio::task::yield_now().await;
                if absent {
                    mode = PutMode::Overwrite;
                }
            }
            (Vice::DropsMetadata, _) => metadata = &[],
            _ => {}
        }
        self.0.put(key, body, mode, metadata, why).await
    }
    async fn head(&self, key: &str, why: Reason) -> StoreResult<ObjectMeta> {
        self.0.head(key, why).await
    }
    async fn list(&self, d: &str, a: Option<&str>, w: Reason) -> StoreResult<Vec<ObjectMeta>> {
        if self.1 == Vice::ListsNothing { Ok(Vec::new()) } else { self.0.list(d, a, w).await }
    }
    async fn list_dirs(&self, dir: &str, why: Reason) -> StoreResult<Vec<String>> {
        self.0.list_dirs(dir, why).await
    }
    async fn delete(&self, keys: &[String], why: Reason) -> StoreResult<()> {
        self.0.delete(keys, why).await
    }
}

#[tokio::test]
async fn each_vice_is_named_and_nothing_is_left() {
    for (vice, word, waived) in [
        (Vice::IgnoresCreate, "ignores If-None-Match", true),
        (Vice::IgnoresUpdate, "ignores If-Match", true),
        (Vice::LooksThenWrites, "2 of 2 concurrent writes", true),
        (Vice::Refuses, "knows no conditional writes", true),
        (Vice::DropsMetadata, "metadata did not survive", false),
        (Vice::ListsNothing, "listing does not show", false),
    ] {
        let mem = MemStore::new();
        let error = probe(&BadStore(mem.clone(), vice), "backends", "t1").await.unwrap_err();
        assert!(error.to_string().contains(word), "{vice:?}: {error}");
        assert_eq!(error.waived_by_single_backend(), waived, "{vice:?}");
        assert_eq!(error.to_string().contains("--single-backend"), waived, "{error}");
        assert_eq!(mem.keys(), [""; 0]);
    }
}

#[tokio::test]
async fn a_good_store_passes_beside_other_objects() {
    let mem = MemStore::new();
    let other = Body::Bytes(Bytes::from_static(b"x"));
    mem.put("backends/mx1", other, PutMode::Create, &[], WHY).await.unwrap();
    probe(&mem, "backends", "t1").await.unwrap();
    assert_eq!(mem.keys(), ["backends/mx1"]);
}

#[tokio::test]
async fn a_lost_answer_is_no_rival() {
    let mem = MemStore::new();
    let store = FaultyStore::new(Arc::new(mem));
    // As a store that retries by itself reports its own success.
    store.set_hook(|request| {
        if request.op == Op::Put && request.key.ends_with("-cond") && request.nth == 11 {
            Fault::After(StoreError::Precondition { key: request.key.clone() })
        } else {
            Fault::None
        }
    });
    probe(&store, "backends", "t1").await.unwrap();
}

#[tokio::test]
async fn an_outage_is_told_with_its_step() {
    let store = FaultyStore::new(Arc::new(MemStore::new()));
    store.set_down(true);
    let error = probe(&store, "backends", "t1").await.unwrap_err();
    assert!(error.to_string().starts_with("reaching the store: "), "{error}");
    assert!(!error.waived_by_single_backend());
}
