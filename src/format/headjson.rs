//! The head as JSON.
//!
//! Written by hand, one folder per line; read by serde, which refuses members it does not know:
//! a head is written back whole, and what was not understood would be lost.

use super::escape::{escape, unescape};
use super::head::{
    ClosedEpoch, HEAD_VERSION, Head, HeadFolder, HeadOwner, PartKind, PartRef, WHAT,
};
use super::{Epoch, FormatError, Place, listing::Owner};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonPart {
    bundle: String,
    offset: u64,
    len: u64,
    crc: String,
    kind: JsonKind,
    raw: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum JsonKind {
    Base,
    Diff,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonFolder {
    id: String,
    #[serde(rename = "in")]
    parent: String,
    sub: String,
    name: String,
    uid_ceiling: Option<u32>,
    burnt_below: Option<u32>,
    unfinished: bool,
    parts: Vec<JsonPart>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonOwner {
    backend: String,
    session: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonClosed {
    epoch: u32,
    end: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonRoot {
    uid: u32,
    gid: u32,
    mode: String,
}

#[derive(Deserialize)]
struct JsonVersion {
    #[serde(rename = "vmailfs-head")]
    version: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonHead {
    #[serde(rename = "vmailfs-head")]
    _version: u32,
    user: String,
    epoch: u32,
    write_id: String,
    written: i64,
    owner: Option<JsonOwner>,
    watermark: String,
    closed: Vec<JsonClosed>,
    root: JsonRoot,
    uidvalidity_ceiling: Option<u32>,
    uidvalidity_burnt: Option<u32>,
    known_above: Vec<String>,
    names: Vec<JsonPart>,
    dropped: Vec<JsonPart>,
    previous: Option<JsonPart>,
    folders: Vec<JsonFolder>,
    #[serde(rename = "crc")]
    _crc: String,
}

fn bad(detail: impl Into<String>) -> FormatError {
    FormatError::malformed(WHAT, detail)
}

fn put_part(part: &PartRef) -> JsonPart {
    JsonPart {
        bundle: part.bundle.to_string(),
        offset: part.offset,
        len: part.len,
        crc: format!("{:08x}", part.crc),
        kind: match part.kind {
            PartKind::Base => JsonKind::Base,
            PartKind::Diff => JsonKind::Diff,
        },
        raw: part.raw_len,
    }
}

fn take_part(part: JsonPart) -> Result<PartRef, FormatError> {
    part.offset.checked_add(part.len).ok_or_else(|| bad("a part's range overflows"))?;
    let crc = super::listing::hex(&part.crc, 8).and_then(|crc| u32::try_from(crc).ok());
    Ok(PartRef {
        bundle: part.bundle.parse()?,
        offset: part.offset,
        len: part.len,
        crc: crc.ok_or_else(|| bad("a part's crc"))?,
        kind: match part.kind {
            JsonKind::Base => PartKind::Base,
            JsonKind::Diff => PartKind::Diff,
        },
        raw_len: part.raw,
    })
}

fn take_parts(parts: Vec<JsonPart>) -> Result<Vec<PartRef>, FormatError> {
    parts.into_iter().map(take_part).collect()
}

fn put_folder(folder: &HeadFolder) -> JsonFolder {
    JsonFolder {
        id: folder.id.to_string(),
        parent: folder.parent.folder.to_string(),
        sub: folder.parent.sub.as_str().to_string(),
        name: escape(&folder.name),
        uid_ceiling: folder.uid_ceiling,
        burnt_below: folder.burnt_below,
        unfinished: folder.unfinished,
        parts: folder.parts.iter().map(put_part).collect(),
    }
}

fn take_folder(folder: JsonFolder) -> Result<HeadFolder, FormatError> {
    Ok(HeadFolder {
        id: folder.id.parse()?,
        parent: Place { folder: folder.parent.parse()?, sub: folder.sub.parse()? },
        name: unescape(&folder.name)?,
        parts: take_parts(folder.parts)?,
        uid_ceiling: folder.uid_ceiling,
        burnt_below: folder.burnt_below,
        unfinished: folder.unfinished,
    })
}

fn take_closed(closed: JsonClosed) -> Result<ClosedEpoch, FormatError> {
    Ok(ClosedEpoch { epoch: Epoch(closed.epoch), end: closed.end.parse()? })
}

/// The value on one line. The types here have nothing that JSON cannot hold.
fn json(value: &impl Serialize) -> String {
    #[expect(clippy::expect_used, reason = "no map with keys other than strings, no failing type")]
    serde_json::to_string(value).expect("plain data")
}

/// A list with one element per line.
fn list<T: Serialize>(out: &mut String, name: &str, items: impl Iterator<Item = T>) {
    let _ = write!(out, "\"{name}\": [");
    for (index, item) in items.enumerate() {
        out.push_str(if index == 0 { "\n" } else { ",\n" });
        out.push_str(&json(&item));
    }
    out.push_str("],\n");
}

pub(super) fn encode(head: &Head) -> Vec<u8> {
    let mut out = format!("{{\n\"vmailfs-head\": {HEAD_VERSION},\n");
    let mut put = |name: &str, value: String| {
        let _ = writeln!(out, "\"{name}\": {value},");
    };
    put("user", json(&head.user));
    put("epoch", head.epoch.0.to_string());
    put("write_id", json(&head.write_id));
    put("written", head.written.to_string());
    let owner = head
        .owner
        .as_ref()
        .map(|owner| JsonOwner { backend: owner.backend.clone(), session: owner.session.clone() });
    put("owner", json(&owner));
    put("watermark", json(&head.watermark.to_string()));
    let Owner { uid, gid } = head.root_owner;
    put("root", json(&JsonRoot { uid, gid, mode: format!("{:04o}", head.root_mode & 0o7777) }));
    put("uidvalidity_ceiling", json(&head.uidvalidity_ceiling));
    put("uidvalidity_burnt", json(&head.uidvalidity_burnt));
    let above: Vec<String> = head.known_above.iter().map(ToString::to_string).collect();
    put("known_above", json(&above));
    put("previous", json(&head.previous.as_ref().map(put_part)));
    let closed = |c: &ClosedEpoch| JsonClosed { epoch: c.epoch.0, end: c.end.to_string() };
    list(&mut out, "closed", head.closed.iter().map(closed));
    list(&mut out, "names", head.names.iter().map(put_part));
    list(&mut out, "dropped", head.dropped.iter().map(put_part));
    list(&mut out, "folders", head.folders.iter().map(put_folder));
    let crc = crc32c::crc32c(out.as_bytes());
    let _ = write!(out, "\"crc\": \"{crc:08x}\"\n}}\n");
    out.into_bytes()
}

/// Checks the last line, which has a fixed length, against all before it.
fn check_crc(bytes: &[u8]) -> Result<(), FormatError> {
    const LEN: usize = "\"crc\": \"00000000\"\n}\n".len();
    let at = bytes.len().checked_sub(LEN).ok_or_else(|| bad("too short"))?;
    let (body, end) = bytes.split_at(at);
    let says = end.strip_prefix(b"\"crc\": \"").and_then(|e| e.strip_suffix(b"\"\n}\n"));
    let says = says.ok_or_else(|| bad("does not end with its crc"))?;
    if says != format!("{:08x}", crc32c::crc32c(body)).as_bytes() {
        return Err(FormatError::Checksum { what: WHAT });
    }
    Ok(())
}

pub(super) fn decode(bytes: &[u8]) -> Result<Head, FormatError> {
    let json_error = |e: serde_json::Error| bad(e.to_string());
    let JsonVersion { version } = serde_json::from_slice(bytes).map_err(json_error)?;
    if version > HEAD_VERSION {
        return Err(FormatError::TooNew { what: WHAT, found: version, known: HEAD_VERSION });
    }
    if version == 0 {
        return Err(bad("version 0"));
    }
    check_crc(bytes)?;
    let json: JsonHead = serde_json::from_slice(bytes).map_err(json_error)?;
    let mode = super::listing::mode(&json.root.mode).ok_or_else(|| bad("the root's mode"))?;
    Ok(Head {
        user: json.user,
        epoch: Epoch(json.epoch),
        write_id: json.write_id,
        owner: json.owner.map(|o| HeadOwner { backend: o.backend, session: o.session }),
        watermark: json.watermark.parse()?,
        closed: json.closed.into_iter().map(take_closed).collect::<Result<_, _>>()?,
        root_owner: Owner { uid: json.root.uid, gid: json.root.gid },
        root_mode: mode,
        folders: json.folders.into_iter().map(take_folder).collect::<Result<_, _>>()?,
        uidvalidity_ceiling: json.uidvalidity_ceiling,
        uidvalidity_burnt: json.uidvalidity_burnt,
        known_above: json.known_above.iter().map(|id| id.parse()).collect::<Result<_, _>>()?,
        names: take_parts(json.names)?,
        dropped: take_parts(json.dropped)?,
        previous: json.previous.map(take_part).transpose()?,
        written: json.written,
    })
}
