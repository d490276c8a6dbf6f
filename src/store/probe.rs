//! The proof that a store can hold mail: what it is asked at the start of a mount.
//!
//! One owner per user rests on conditional writes, and there are servers that accept the
//! condition and ignore it. Documentation does not tell; two writers do. The rest (bodies,
//! metadata, listings after a key) is proved with the same few keys, before the conditions, so
//! that a failure of those alone can be waived by an admin who has only one backend.

use super::{Body, ETag, ObjectStore, PutMode, Reason, StoreError, StoreResult};
use bytes::Bytes;

const WHY: Reason = Reason("probe");
/// A server that looks first and writes then shows it in few races.
const RACES: usize = 4;
const ONLY_ONE: &str =
    "use another store, or --single-backend if this is the only vmailfs that ever uses it";

/// What a store failed to prove. The text is for the admin.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProbeError {
    /// A step failed as any request can fail: unreachable, denied, no such bucket.
    #[error("{step}: {source}")]
    Store { step: &'static str, source: StoreError },
    /// The store loses or alters what it is given.
    #[error("{what}: this store cannot hold mail")]
    Broken { what: String },
    /// It does not know conditional writes, and says so.
    #[error(
        "this store knows no conditional writes ({what} was refused: {detail}): nothing would keep two backends from both believing to own a user; {ONLY_ONE}"
    )]
    NoConditions { what: &'static str, detail: String },
    /// It takes the condition and writes nevertheless.
    #[error(
        "this store ignores {header} ({what}): two backends could both believe to own a user; {ONLY_ONE}"
    )]
    Ignored { header: &'static str, what: &'static str },
    /// Conditions hold, but not between writers at the same time.
    #[error(
        "this store does not keep writers apart ({winners} of 2 concurrent writes with {header} succeeded): two backends could both believe to own a user; {ONLY_ONE}"
    )]
    Race { header: &'static str, winners: usize },
}

impl ProbeError {
    /// Whether the store would do where a single backend uses it.
    pub fn waived_by_single_backend(&self) -> bool {
        match self {
            ProbeError::NoConditions { .. }
            | ProbeError::Ignored { .. }
            | ProbeError::Race { .. } => true,
            ProbeError::Store { .. } | ProbeError::Broken { .. } => false,
        }
    }
}

/// Proves the store with keys directly in `key_dir` that hold `token`, a word that no other
/// probe uses, and removes them. About 30 requests.
///
/// # Errors
/// See [`ProbeError`]; of several faults the first is told, and those that no option waives
/// come first.
pub async fn probe(store: &dyn ObjectStore, key_dir: &str, token: &str) -> Result<(), ProbeError> {
    let mut probe = Probe { store, dir: format!("{key_dir}/"), token, keys: Vec::new() };
    // Asked first: there are servers where a write makes a missing bucket.
    store.list(key_dir, None, WHY).await.map_err(at("reaching the store"))?;
    let mut outcome = probe.basics().await;
    if outcome.is_ok() {
        outcome = probe.conditions().await;
    }
    // Also what a failed step may have left.
    if let Err(error) = store.delete(&probe.keys, WHY).await {
        tracing::warn!(%error, keys = ?probe.keys, "the probe's objects could not be removed");
    }
    outcome
}

struct Probe<'a> {
    store: &'a dyn ObjectStore,
    dir: String,
    token: &'a str,
    keys: Vec<String>,
}

fn at(step: &'static str) -> impl Fn(StoreError) -> ProbeError {
    move |source| ProbeError::Store { step, source }
}

fn broken(what: impl Into<String>) -> ProbeError {
    ProbeError::Broken { what: what.into() }
}

impl Probe<'_> {
    fn key(&mut self, name: &str) -> String {
        let key = format!("{}{}-{name}", self.dir, self.token);
        self.keys.push(key.clone());
        key
    }

    fn text(&self, name: &str) -> Bytes {
        Bytes::from(format!("vmailfs probe {} {name}\n", self.token))
    }

    async fn write(&self, key: &str, text: &Bytes, mode: PutMode) -> StoreResult<ETag> {
        self.store.put(key, Body::Bytes(text.clone()), mode, &[], WHY).await
    }

    async fn read(&self, key: &str) -> StoreResult<Bytes> {
        Ok(self.store.get(key, None, 4096, WHY).await?.1)
    }

    /// What each store must do: keep bytes and metadata, give parts, list after a key.
    async fn basics(&mut self) -> Result<(), ProbeError> {
        let dir = self.dir.trim_end_matches('/').to_owned();
        let (one, two, three) = (self.key("1"), self.key("2"), self.key("3"));
        let text = self.text("basics");
        let metadata = vec![("probe".to_owned(), "INBOX/a b;c=%20".to_owned())];
        let body = Body::Bytes(text.clone());
        self.store
            .put(&one, body, PutMode::Overwrite, &metadata, WHY)
            .await
            .map_err(at("writing an object"))?;
        for key in [&two, &three] {
            self.write(key, &text, PutMode::Overwrite).await.map_err(at("writing an object"))?;
        }
        let (meta, bytes) =
            self.store.get(&one, None, 4096, WHY).await.map_err(at("reading an object back"))?;
        if bytes != text {
            return Err(broken("an object came back with other bytes"));
        }
        if meta.metadata != metadata {
            let got = meta.metadata;
            return Err(broken(format!("user metadata did not survive ({metadata:?} -> {got:?})")));
        }
        let part = self.store.get(&one, Some(3..9), 6, WHY).await;
        if part.map_err(at("reading a part of an object"))?.1 != text.slice(3..9) {
            return Err(broken("a part of an object came back with other bytes"));
        }
        let listed = |after: Option<String>| {
            let (store, dir, token) = (self.store, &dir, self.token);
            async move {
                let all = store.list(dir, after.as_deref(), WHY).await;
                let all = all.map_err(at("listing objects"))?;
                let ours = |key: &String| key.contains(token);
                Ok::<_, ProbeError>(all.into_iter().map(|m| m.key).filter(ours).collect::<Vec<_>>())
            }
        };
        if listed(None).await? != [one.clone(), two.clone(), three.clone()] {
            return Err(broken("a listing does not show what was just written"));
        }
        if listed(Some(one)).await? != [two, three] {
            return Err(broken("a listing after a key does not show what follows it"));
        }
        Ok(())
    }

    /// Create and update: alone with a good and a bad condition, then two writers at once.
    async fn conditions(&mut self) -> Result<(), ProbeError> {
        const NONE_MATCH: &str = "If-None-Match";
        const MATCH: &str = "If-Match";
        let key = self.key("cond");
        let (first, second) = (self.text("first"), self.text("second"));
        let created = self.write(&key, &first, PutMode::Create).await;
        let tag = self.won("creating an object with If-None-Match", created, &key, &first).await?;
        match self.write(&key, &second, PutMode::Create).await {
            Err(StoreError::Precondition { .. }) => {}
            Ok(_) => {
                let what = "it created an object that existed";
                return Err(ProbeError::Ignored { header: NONE_MATCH, what });
            }
            Err(source) => {
                return Err(at("creating an object a second time with If-None-Match")(source));
            }
        }
        let updated = self.write(&key, &second, PutMode::Update(tag.clone())).await;
        let new_tag = self.won("replacing an object with If-Match", updated, &key, &second).await?;
        if new_tag == tag {
            return Err(ProbeError::Ignored {
                header: MATCH,
                what: "an object with other bytes has the same tag",
            });
        }
        match self.write(&key, &first, PutMode::Update(tag)).await {
            Err(StoreError::Precondition { .. }) => {}
            Ok(_) => {
                let what = "it replaced an object that had changed";
                return Err(ProbeError::Ignored { header: MATCH, what });
            }
            Err(source) => return Err(at("replacing an object with a stale If-Match")(source)),
        }
        if self.read(&key).await.map_err(at("reading an object back"))? != second {
            return Err(ProbeError::Ignored {
                header: MATCH,
                what: "it refused a write and carried it out",
            });
        }
        for round in 0..RACES {
            let key = self.key(&format!("race{round}"));
            let tag = self.race(NONE_MATCH, &key, PutMode::Create).await?;
            self.race(MATCH, &key, PutMode::Update(tag)).await?;
        }
        Ok(())
    }

    /// A conditional write that must succeed. A condition that does not hold may be met by our
    /// own first attempt, whose answer was lost.
    async fn won(
        &self,
        what: &'static str,
        outcome: StoreResult<ETag>,
        key: &str,
        text: &Bytes,
    ) -> Result<ETag, ProbeError> {
        match outcome {
            Ok(tag) => Ok(tag),
            Err(StoreError::Unsupported { detail }) => {
                Err(ProbeError::NoConditions { what, detail })
            }
            Err(StoreError::Precondition { .. }) => {
                match self.store.get(key, None, 4096, WHY).await {
                    Ok((meta, bytes)) if bytes == *text => {
                        meta.etag.ok_or_else(|| broken("an object was read without a tag"))
                    }
                    Ok(_) | Err(StoreError::NotFound { .. }) => Err(ProbeError::NoConditions {
                        what,
                        detail: "although the condition held".to_owned(),
                    }),
                    Err(source) => Err(at(what)(source)),
                }
            }
            Err(source) => Err(at(what)(source)),
        }
    }

    /// Two writers at once, of whom at most one may win, and one must have.
    async fn race(
        &self,
        header: &'static str,
        key: &str,
        mode: PutMode,
    ) -> Result<ETag, ProbeError> {
        const STEP: &str = "two concurrent conditional writes";
        let texts = [self.text(&format!("{header} left")), self.text(&format!("{header} right"))];
        let (left, right) = tokio::join!(
            self.write(key, &texts[0], mode.clone()),
            self.write(key, &texts[1], mode)
        );
        let mut winners = Vec::new();
        for (outcome, text) in [left, right].into_iter().zip(&texts) {
            match outcome {
                Ok(_) => winners.push(text),
                Err(StoreError::Precondition { .. }) => {}
                Err(source) => return Err(at(STEP)(source)),
            }
        }
        let (meta, bytes) = self.store.get(key, None, 4096, WHY).await.map_err(at(STEP))?;
        let winners = match winners.as_slice() {
            [one] if bytes == **one => 1,
            // Its answer was lost, and the retry met its own object.
            [] if texts.contains(&bytes) => 1,
            [_] | [_, _, ..] => 2,
            [] => 0,
        };
        match meta.etag {
            Some(tag) if winners == 1 => Ok(tag),
            Some(_) => Err(ProbeError::Race { header, winners }),
            None => Err(broken("an object was read without a tag")),
        }
    }
}

#[cfg(test)]
#[path = "probe/tests.rs"]
mod tests;
