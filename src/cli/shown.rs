//! What stands in the files of `.vmailfs`.

use super::show;
use crate::admin::caches::{CacheAnswer, CacheRequest};
use crate::admin::{AdminApi, Progress};
use crate::format::listing::Owner;
use crate::fs::VmailFs;
use crate::fs::shown::Shown;
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

const NAMES: &[&str] = &["list", "metrics", "status", "status.json"];

/// Shows the directory. It belongs to the account that the mount runs as.
pub(super) fn show(fs: &VmailFs, api: &Arc<dyn AdminApi>) {
    let owner =
        Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
    // The mount holds the file system, not the other way round.
    let api = Arc::downgrade(api);
    let make = move |name| -> futures_util::future::BoxFuture<'static, String> {
        let api = api.clone();
        Box::pin(async move { text(name, &api).await })
    };
    fs.show(Shown::new(owner, NAMES, Box::new(make)));
}

async fn text(name: &str, api: &Weak<dyn AdminApi>) -> String {
    let Some(api) = api.upgrade() else { return String::new() };
    match name {
        "metrics" => api.metrics().await,
        "list" => {
            let what = CacheRequest::MetacacheList { mask: None, field: None };
            match api.caches(what, &Progress::none()).await {
                Ok(CacheAnswer::List(rows)) => match super::caches::list_text(&rows) {
                    Ok(text) => text,
                    Err(error) => format!("{error}\n"),
                },
                Ok(_) => String::new(),
                Err(error) => format!("{error}\n"),
            }
        }
        "status.json" => match serde_json::to_string_pretty(&api.status().await) {
            Ok(text) => text + "\n",
            Err(error) => format!("{error}\n"),
        },
        _ => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            show::status(&api.status().await, now.map_or(0, |d| d.as_secs() as i64))
        }
    }
}
