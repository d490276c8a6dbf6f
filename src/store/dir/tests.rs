use super::*;

const WHY: Reason = Reason("test");

fn bytes(text: &str) -> Body {
    Body::Bytes(Bytes::copy_from_slice(text.as_bytes()))
}

fn pair(name: &str, value: &str) -> Vec<(String, String)> {
    vec![(name.into(), value.into())]
}

async fn overwrite(store: &DirStore, key: &str, text: &str) -> StoreResult<ETag> {
    store.put(key, bytes(text), PutMode::Overwrite, &[], WHY).await
}

#[tokio::test]
async fn a_root_that_vanishes_is_an_outage() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    std::fs::create_dir(&root).unwrap();
    let store = DirStore::open(&root).unwrap();
    overwrite(&store, "a/b", "x").await.unwrap();
    assert!(matches!(store.head("a/c", WHY).await, Err(StoreError::NotFound { .. })));
    std::fs::rename(&root, dir.path().join("away")).unwrap();
    for round in ["gone", "another directory", "another store"] {
        let no_store = |e: StoreError| assert!(matches!(e, StoreError::NoSuchStore { .. }), "{e}");
        no_store(store.head("a/b", WHY).await.unwrap_err());
        no_store(store.get("a/b", None, 9, WHY).await.unwrap_err());
        no_store(store.list("a", None, WHY).await.unwrap_err());
        no_store(store.list_dirs("", WHY).await.unwrap_err());
        no_store(store.delete(&["a/b".into()], WHY).await.unwrap_err());
        no_store(overwrite(&store, "a/b", "y").await.unwrap_err());
        match round {
            "gone" => std::fs::create_dir(&root).unwrap(),
            "another directory" => {
                assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
                overwrite(&DirStore::open(&root).unwrap(), "a/b", "z").await.unwrap();
            }
            _ => assert_eq!(std::fs::read(root.join("a/b")).unwrap(), b"z"),
        }
    }
    std::fs::remove_dir_all(&root).unwrap();
    let error = DirStore::open(&root).unwrap_err();
    assert!(matches!(error, StoreError::NoSuchStore { .. }), "{error}");
}

#[tokio::test]
async fn leftovers_are_removed_and_fresh_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    DirStore::open(dir.path()).unwrap();
    let old = dir.path().join(".tmp/old");
    let file = File::create(&old).unwrap();
    file.set_modified(SystemTime::now() - LEFTOVER - Duration::from_secs(60)).unwrap();
    let fresh = dir.path().join(".tmp/fresh");
    File::create(&fresh).unwrap();
    DirStore::open(dir.path()).unwrap();
    assert!(!old.exists());
    assert!(fresh.exists());
}

#[tokio::test]
async fn sidecars_hold_metadata_where_attributes_cannot() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    store.inner.xattrs.store(false, Ordering::Relaxed);
    let folder = pair("folder", "INBOX/a b");
    store.put("u/mail/1", bytes("x"), PutMode::Create, &folder, WHY).await.unwrap();
    assert!(dir.path().join(".meta/u/mail/1").exists());
    let again = DirStore::open(dir.path()).unwrap();
    assert_eq!(again.head("u/mail/1", WHY).await.unwrap().metadata, folder);
    assert_eq!(again.list_dirs("", WHY).await.unwrap(), ["u"]);
    overwrite(&again, "u/mail/1", "x").await.unwrap();
    assert_eq!(again.head("u/mail/1", WHY).await.unwrap().metadata, []);
    store.put("u/mail/2", bytes("x"), PutMode::Create, &folder, WHY).await.unwrap();
    store.delete(&["u/mail/2".into()], WHY).await.unwrap();
    assert!(!dir.path().join(".meta/u/mail/2").exists());
}

#[tokio::test]
async fn nothing_but_objects_is_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    let tag = overwrite(&store, "a/b/c", "1").await.unwrap();
    store.put("a/b/c", bytes("2"), PutMode::Update(tag.clone()), &[], WHY).await.unwrap();
    store.put("a/b/c", bytes("3"), PutMode::Update(tag), &[], WHY).await.unwrap_err();
    store.put("a/b/c", bytes("4"), PutMode::Create, &[], WHY).await.unwrap_err();
    store.put("a/b/d", bytes("5"), PutMode::Create, &[], WHY).await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join(".tmp")).unwrap().count(), 0);
    assert_eq!(std::fs::read(dir.path().join("a/b/c")).unwrap(), b"2");
    let link = dir.path().join("a/b/d").metadata().unwrap();
    assert_eq!((link.nlink(), link.mode() & 0o777), (1, 0o600));
    store.delete(&["a/b/c".into(), "a/b/d".into(), "none".into()], WHY).await.unwrap();
    assert!(!dir.path().join("a").exists());
    overwrite(&store, "a/b/c", "6").await.unwrap();
    assert_eq!(store.list("a/b", None, WHY).await.unwrap().len(), 1);
}

#[tokio::test]
async fn keys_of_its_own_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    for key in [".tmp/x", ".lock/00", "../x", "/etc/passwd", "a/../b", ""] {
        let refused = overwrite(&store, key, "x").await;
        assert!(matches!(refused, Err(StoreError::Unsupported { .. })), "{key}");
    }
    overwrite(&store, "a", "x").await.unwrap();
    assert!(matches!(store.head("a/b", WHY).await, Err(StoreError::NotFound { .. })));
    assert!(overwrite(&store, "a/b", "x").await.is_err());
}

#[tokio::test]
async fn a_file_of_another_length_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    let path = dir.path().join("local");
    for (size, told) in [(10, 11), (10, 9), (2 << 20, (2 << 20) - 1), (10, 2 << 20)] {
        std::fs::write(&path, vec![7; size]).unwrap();
        let body = Body::File { path: path.clone(), len: told as u64 };
        let refused = store.put("k", body, PutMode::Overwrite, &[], WHY).await;
        assert!(matches!(refused, Err(StoreError::BadBody { .. })), "{size} {told}");
    }
    let gone = Body::File { path: dir.path().join("none"), len: 3 };
    let refused = store.put("k", gone, PutMode::Overwrite, &[], WHY).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { .. })));
}

#[tokio::test]
async fn puts_and_deletes_in_parallel_keep_directories_right() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirStore::open(dir.path()).unwrap();
    let tasks: Vec<_> = (0..4)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move {
                for round in 0..30 {
                    let key = format!("d/e/{n}-{round}");
                    overwrite(&store, &key, "x").await.unwrap();
                    store.delete(&[key], WHY).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(!dir.path().join("d").exists());
}
