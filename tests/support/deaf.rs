//! An S3 server without conditional writes.

use super::http::{self, HttpRequest, HttpServer, answer, error};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How it does not do them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deaf {
    /// It writes whatever the condition says.
    Ignores,
    /// It says that it does not know them.
    Refuses,
}

/// Bytes, tag, and the metadata headers of each object.
pub type Objects = Mutex<BTreeMap<String, (Vec<u8>, String, Vec<(String, String)>)>>;

const DATE: (&str, &str) = ("Last-Modified", "Sun, 22 Nov 2026 02:00:00 GMT");
const OK: &str = "200 OK";

/// Starts a server with the bucket `b`, and gives its objects.
pub async fn start(kind: Deaf) -> (HttpServer, Arc<Objects>) {
    let objects: Arc<Objects> = Arc::default();
    let held = objects.clone();
    let server = http::start(move |request| {
        let bytes = serve(kind, &held, &request);
        async move { bytes }
    });
    (server.await, objects)
}

/// Enough of S3 for the probe and for a user.
fn serve(kind: Deaf, objects: &Objects, request: &HttpRequest) -> Vec<u8> {
    let path = request.path().to_owned();
    let mut objects = objects.lock();
    let conditional = ["if-match", "if-none-match"].iter().any(|h| request.header(h).is_some());
    match request.method.as_str() {
        "PUT" if kind == Deaf::Refuses && conditional => {
            error("501 Not Implemented", "NotImplemented")
        }
        "PUT" => {
            let tag = format!("\"{}\"", blake3::hash(&request.body).to_hex());
            let is_meta = |(name, _): &&(String, String)| name.starts_with("x-amz-meta-");
            let meta = request.headers.iter().filter(is_meta).cloned().collect();
            objects.insert(path, (request.body.clone(), tag.clone(), meta));
            answer(OK, &[("ETag", &tag)], b"")
        }
        "GET" if request.query("list-type").is_some() => {
            let prefix = format!("/b/{}", request.query("prefix").unwrap_or_default());
            let after = format!("/b/{}", request.query("start-after").unwrap_or_default());
            let mut xml = "<ListBucketResult><IsTruncated>false</IsTruncated>".to_owned();
            for (key, (bytes, tag, _)) in objects.iter() {
                if key.starts_with(&prefix) && *key > after {
                    let (key, size) = (&key[3..], bytes.len());
                    let tag = tag.replace('"', "&quot;");
                    xml += &format!(
                        "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>{tag}</ETag></Contents>"
                    );
                }
            }
            answer(OK, &[], format!("{xml}</ListBucketResult>").as_bytes())
        }
        "HEAD" if !objects.contains_key(&path) => answer("404 Not Found", &[], b""),
        "GET" | "HEAD" => {
            let Some((bytes, tag, meta)) = objects.get(&path) else {
                return error("404 Not Found", "NoSuchKey");
            };
            let mut headers: Vec<(&str, &str)> = vec![("ETag", tag), DATE];
            headers.extend(meta.iter().map(|(n, v)| (n.as_str(), v.as_str())));
            if request.method == "HEAD" {
                let mut whole = answer(OK, &headers, bytes);
                whole.truncate(whole.len() - bytes.len());
                return whole;
            }
            let range = request.header("range").and_then(|r| r.strip_prefix("bytes="));
            let Some((from, to)) = range.and_then(|range| range.split_once('-')) else {
                return answer(OK, &headers, bytes);
            };
            let told = format!("bytes {from}-{to}/{}", bytes.len());
            headers.push(("Content-Range", &told));
            let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
            answer("206 Partial Content", &headers, &bytes[from..=to])
        }
        "DELETE" => {
            objects.remove(&path);
            answer("204 No Content", &[], b"")
        }
        // Bulk delete.
        _ => error("501 Not Implemented", "NotImplemented"),
    }
}
