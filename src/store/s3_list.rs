//! Listings, page by page.
//!
//! They are asked for one directory (delimiter `/`) and sorted here: some servers do not sort by
//! bytes across directories.

use super::key::{check_key, join, name_after};
use super::s3::S3Store;
use super::s3_error::{Asked, explain};
use super::s3_whole::WholeXml;
use super::{ETag, ObjectMeta, StoreError, StoreResult};
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_smithy_types::DateTime;

/// The root element of an answer.
const LISTED: &str = "ListBucketResult";

impl S3Store {
    async fn page(
        &self,
        dir: &str,
        prefix: &str,
        start_after: Option<&str>,
        token: Option<&str>,
    ) -> StoreResult<ListObjectsV2Output> {
        self.request("LIST", dir, |client, _| async move {
            client
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(prefix)
                .delimiter("/")
                .set_start_after(start_after.map(|name| format!("{prefix}{name}")))
                .set_continuation_token(token.map(str::to_owned))
                .customize()
                .interceptor(WholeXml { root: LISTED })
                .send()
                .await
                .map_err(|e| explain(e, dir, Asked::Bucket))
        })
        .await
    }

    /// The pages of a listing, each given to `take`, until that has enough.
    async fn pages(
        &self,
        dir: &str,
        prefix: &str,
        start_after: Option<&str>,
        mut take: impl FnMut(ListObjectsV2Output) -> bool,
    ) -> StoreResult<()> {
        let mut token: Option<String> = None;
        loop {
            let mut page = self.page(dir, prefix, start_after, token.as_deref()).await?;
            let more = page.is_truncated().unwrap_or(page.next_continuation_token().is_some());
            let next = page.next_continuation_token.take();
            if !take(page) || !more {
                return Ok(());
            }
            // Without a new token the rest is out of reach, and a part is not a listing.
            if next.is_none() || next == token {
                let detail = "a listing that goes on without saying where".to_owned();
                return Err(StoreError::BadBody { key: dir.to_owned(), detail });
            }
            token = next;
        }
    }

    /// The objects of a directory, from one name to another and so many at most.
    pub(super) async fn list_range(
        &self,
        dir: &str,
        start_after: Option<&str>,
        before: Option<&str>,
        most: usize,
    ) -> StoreResult<Vec<ObjectMeta>> {
        let prefix = self.full_dir(dir)?;
        let after = name_after(dir, start_after)?;
        let mut found = Vec::new();
        self.pages(dir, &prefix, after, |page| {
            let mut more = true;
            for object in page.contents.unwrap_or_default() {
                let name = object.key.as_deref().and_then(|key| key.strip_prefix(&prefix));
                // Not ours: markers of directories, names that are no keys.
                let Some(name) = name.filter(|n| !n.contains('/') && check_key(n).is_ok()) else {
                    continue;
                };
                if after.is_some_and(|after| name <= after) {
                    continue;
                }
                let key = join(dir, name);
                if before.is_some_and(|before| key.as_str() >= before) {
                    more = false;
                    continue;
                }
                found.push(ObjectMeta {
                    key,
                    size: object.size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
                    etag: object.e_tag.map(ETag),
                    modified: object.last_modified.as_ref().map(DateTime::secs),
                    metadata: Vec::new(),
                });
            }
            more && found.len() < most
        })
        .await?;
        found.sort_by(|a, b| a.key.cmp(&b.key));
        found.dedup_by(|a, b| a.key == b.key);
        found.truncate(most);
        Ok(found)
    }

    /// The directories in a directory.
    pub(super) async fn dirs(&self, dir: &str) -> StoreResult<Vec<String>> {
        let prefix = self.full_dir(dir)?;
        let mut names = Vec::new();
        self.pages(dir, &prefix, None, |page| {
            for common in page.common_prefixes.unwrap_or_default() {
                let name = common.prefix.as_deref().and_then(|p| p.strip_prefix(&prefix));
                let name = name.and_then(|name| name.strip_suffix('/'));
                if let Some(name) = name.filter(|name| check_key(name).is_ok()) {
                    names.push(name.to_owned());
                }
            }
            true
        })
        .await?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }
}
