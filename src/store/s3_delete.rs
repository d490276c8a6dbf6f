//! Deletions: in bulk where the store knows that, what it leaves one by one.

use super::s3::S3Store;
use super::s3_error::{Asked, chain, explain};
use super::s3_whole::WholeXml;
use super::{StoreError, StoreResult};
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

/// Keys per bulk delete.
const BULK: usize = 1000;
/// Single deletes in flight where bulk deletes are refused.
const SINGLE_DELETES: usize = 16;
/// The root element of an answer.
pub(super) const DELETED: &str = "DeleteResult";

impl S3Store {
    /// Deletes all of them; one that is not there counts as deleted.
    pub(super) async fn delete_all(&self, keys: &[String]) -> StoreResult<()> {
        for key in keys {
            self.full_key(key)?;
        }
        for keys in keys.chunks(BULK) {
            if keys.len() == 1 || self.no_bulk_delete.load(Ordering::Relaxed) {
                self.delete_each(keys).await?;
                continue;
            }
            match self.delete_bulk(keys).await {
                Ok(left) => self.delete_each(&left).await?,
                Err(error @ (StoreError::NoSuchStore { .. } | StoreError::Denied { .. })) => {
                    return Err(error);
                }
                Err(error) => {
                    let refused = matches!(error, StoreError::Unsupported { .. });
                    if refused {
                        self.no_bulk_delete.store(true, Ordering::Relaxed);
                    }
                    tracing::debug!(%error, refused, "bulk delete failed, deleting one by one");
                    self.delete_each(keys).await?;
                }
            }
        }
        Ok(())
    }

    async fn delete_one(&self, key: &str) -> StoreResult<()> {
        let full = &self.full_key(key)?;
        let deleted = self
            .request("DELETE", key, |client, _| async move {
                client
                    .delete_object()
                    .bucket(&self.bucket)
                    .key(full)
                    .send()
                    .await
                    .map_err(|e| explain(e, key, Asked::Object))
            })
            .await;
        match deleted {
            Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn delete_each(&self, keys: &[String]) -> StoreResult<()> {
        let deletes: Vec<_> = keys.iter().map(|key| self.delete_one(key)).collect();
        stream::iter(deletes).buffer_unordered(SINGLE_DELETES).try_collect::<()>().await
    }

    /// Deletes up to [`BULK`] keys by one request; gives those that it did not delete.
    async fn delete_bulk(&self, keys: &[String]) -> StoreResult<Vec<String>> {
        let mut by_full = HashMap::with_capacity(keys.len());
        let mut objects = Vec::with_capacity(keys.len());
        for key in keys {
            let full = self.full_key(key)?;
            let object = ObjectIdentifier::builder().key(&full).build();
            objects.push(object.map_err(|e| StoreError::Unsupported { detail: chain(&e) })?);
            by_full.insert(full, key);
        }
        let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build();
        let delete = &delete.map_err(|e| StoreError::Unsupported { detail: chain(&e) })?;
        let first = keys.first().map_or("", String::as_str);
        let answer = self
            .request("DELETE several", first, |client, _| async move {
                client
                    .delete_objects()
                    .bucket(&self.bucket)
                    .delete(delete.clone())
                    .customize()
                    .interceptor(WholeXml { root: DELETED })
                    .send()
                    .await
                    .map_err(|e| explain(e, first, Asked::Bucket))
            })
            .await?;
        let mut left = Vec::new();
        for error in answer.errors() {
            if error.code() == Some("NoSuchKey") {
                continue;
            }
            match error.key().and_then(|full| by_full.get(full)) {
                Some(key) => left.push((*key).clone()),
                // It failed for a key that we do not know: all may be meant.
                None => return Ok(keys.to_vec()),
            }
        }
        Ok(left)
    }
}
