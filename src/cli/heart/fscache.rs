//! What an admin asks of the fscaches.

use crate::admin::caches::{
    CacheAnswer, CacheRequest, FscacheCleaned, FscacheReport, FscacheRescanned,
};
use crate::admin::{AdminError, ErrorKind};
use crate::cache::fscache::FscacheUsage;
use crate::vmail::session::Session;
use std::io;
use std::sync::Arc;

pub(super) async fn serve(
    session: &Arc<Session>,
    what: CacheRequest,
) -> Result<CacheAnswer, AdminError> {
    let cache = session.fscache.clone();
    let now = session.env.clock.wall().secs;
    // All of these look at the disk.
    let work = tokio::task::spawn_blocking(move || match what {
        CacheRequest::FscacheStatus => {
            Ok(CacheAnswer::Fscaches(cache.usage().into_iter().map(report).collect()))
        }
        CacheRequest::FscacheRescan { path, max_age } => {
            let oldest = max_age.map(|age| now.saturating_sub(i64::try_from(age).unwrap_or(now)));
            let found = cache.rescan(path.as_deref(), oldest).map_err(failed)?;
            let rescanned = found.into_iter().map(|one| FscacheRescanned {
                off_by: one.off_by(),
                was_right: one.was_right(),
                bytes_used: one.used,
                files: one.files,
                strange_files: one.strange_files,
                strange_bytes: one.strange_bytes,
                removed_files: one.removed_files,
                removed_bytes: one.removed_bytes,
                path: one.path,
            });
            Ok(CacheAnswer::FscachesRescanned(rescanned.collect()))
        }
        CacheRequest::FscacheClean => {
            let cleaned = cache.clean().into_iter().map(|one| FscacheCleaned {
                path: one.path,
                files: one.files,
                bytes: one.bytes,
                open: one.open,
            });
            Ok(CacheAnswer::FscachesCleaned(cleaned.collect()))
        }
        _ => Err(AdminError::new(ErrorKind::Internal, "not a request about fscache")),
    });
    match work.await {
        Ok(done) => done,
        Err(error) => Err(AdminError::new(ErrorKind::Internal, error.to_string())),
    }
}

fn failed(error: io::Error) -> AdminError {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::Usage,
        _ => ErrorKind::TempFail,
    };
    AdminError::new(kind, format!("fscache: {error}"))
}

fn report(one: FscacheUsage) -> FscacheReport {
    FscacheReport {
        path: one.path,
        bytes_used: one.used,
        max_size: one.max,
        files: one.files,
        hits: one.hits,
        misses: one.misses,
        streamed: one.streamed,
        evictions: one.evictions,
        evicted: one.evicted,
        open: one.pinned,
        failing: one.failing,
    }
}
