//! What was once written is readable for ever: the files in `tests/fixtures/formats` are never
//! changed. A new version of a format adds files.

use bytes::Bytes;
use std::path::PathBuf;
use vmailfs::format::head::*;
use vmailfs::format::journal::*;
use vmailfs::format::key::*;
use vmailfs::format::listing::*;
use vmailfs::format::part::*;
use vmailfs::format::*;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats").join(name)
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn id(epoch: u32, counter: u64) -> ObjectId {
    ObjectId { epoch: Epoch(epoch), counter }
}

const INBOX: FolderId = FolderId(0x5f3a_9c01_d2e4_b678);
const TRASH: FolderId = FolderId(0x0bad_cafe_0000_0001);

fn time(secs: i64, nanos: u32) -> Timestamp {
    Timestamp { secs, nanos }
}

fn keys() -> Vec<MailKey> {
    let whole = MailKey {
        id: id(7, 0x1a2),
        folder: INBOX,
        mtime: time(1_732_233_600, 123_456_789),
        mode: 0o600,
        crc: 0xe306_9283,
        piece: Piece::Whole,
        name: Some(b"1732233600.M123456P42.mx1,S=1204,W=1231".to_vec()),
    };
    let first = Piece::Extent { offset: 0, predecessor: None };
    let second = Piece::Extent { offset: 8192, predecessor: Some(id(7, 0x1a3)) };
    let growing =
        MailKey { id: id(7, 0x1a3), piece: first, name: Some(b"m.1".to_vec()), ..whole.clone() };
    let grown = MailKey { id: id(8, 1), piece: second, ..growing.clone() };
    let old = MailKey {
        id: id(8, 2),
        mtime: time(-1, 999_999_999),
        name: Some(b".odd name\xff".to_vec()),
        ..whole.clone()
    };
    let nameless = MailKey { id: id(8, 3), name: None, ..whole.clone() };
    vec![whole, growing, grown, old, nameless]
}

fn tail(index: usize) -> KeyTail {
    keys()[index].encode().0
}

fn lines() -> Vec<Line> {
    let attrs = Attrs { mode: 0o600, owner: None, mtime: time(1_732_233_600, 123_456_789) };
    let other = Attrs {
        mode: 0o640,
        owner: Some(Owner { uid: 1000, gid: 8 }),
        mtime: time(-1, 999_999_999),
    };
    let set = |sub, name: &[u8], entry| Line::Set { sub, name: name.to_vec(), entry };
    vec![
        Line::Dir { sub: Sub::Own, attrs: Attrs { mode: 0o700, ..attrs } },
        Line::Dir { sub: Sub::Cur, attrs: Attrs { mode: 0o2770, ..other } },
        set(
            Sub::New,
            b"1732233600.M123456P42.mx1,S=1204,W=1231",
            Entry::Mail { size: 1204, attrs, object: tail(0) },
        ),
        set(
            Sub::Own,
            b"m.1",
            Entry::Extents {
                size: 8200,
                attrs,
                extents: vec![
                    Extent { offset: 0, len: 8192, object: tail(1) },
                    Extent { offset: 8192, len: 8, object: tail(2) },
                ],
            },
        ),
        set(Sub::Own, b"dovecot-uidlist", Entry::Local { size: 5, attrs, object: None }),
        set(Sub::Own, b"100% @ \t\n\xff", Entry::Local { size: 0, attrs: other, object: None }),
        set(Sub::Own, b"fts.big", Entry::Local { size: 1 << 33, attrs, object: Some(id(8, 9)) }),
        set(Sub::Own, b"active", Entry::Symlink { target: b"sieve/my rules".to_vec(), attrs }),
    ]
}

fn diff_lines() -> Vec<Line> {
    let mut lines = lines();
    lines.truncate(1);
    lines.push(Line::NoDir { sub: Sub::Tmp });
    lines.push(Line::Unset { sub: Sub::Cur, name: b"gone:2,S".to_vec() });
    lines
}

fn records() -> Vec<Record> {
    let (cur, new) =
        (Place { folder: INBOX, sub: Sub::Cur }, Place { folder: INBOX, sub: Sub::New });
    let name = b"1732233600.M123456P42.mx1,S=1204,W=1231".to_vec();
    let log = || b"dovecot.index.log".to_vec();
    let own = Place::own(INBOX);
    let disk = Change::Disk;
    let mut first: Vec<Change> = vec![
        Change::User { owner: Owner { uid: 1000, gid: 8 }, mode: 0o700 },
        Change::Folder { id: FolderId::ROOT, parent: Place::ROOT, name: Vec::new() },
        Change::Folder { id: INBOX, parent: Place::ROOT, name: b"INBOX".to_vec() },
    ];
    first.extend(lines().into_iter().map(|line| Change::Line { folder: INBOX, line }));
    let moved = vec![
        Change::Line { folder: INBOX, line: Line::Unset { sub: new.sub, name: name.clone() } },
        Change::Line { folder: INBOX, line: Line::NoDir { sub: cur.sub } },
        Change::Names { object: id(7, 0x1a2), count: 2 },
        Change::Drop { object: tail(0) },
        Change::NoFolder { id: TRASH },
    ];
    let next = || b"dovecot.index.log.2".to_vec();
    let ops = vec![
        disk(DiskOp::Create { at: own, name: log() }),
        disk(DiskOp::Unlink { at: own, name: log() }),
        disk(DiskOp::Rename { from: own, name: log(), to: own, new_name: next() }),
        disk(DiskOp::Exchange { from: own, name: log(), to: cur, new_name: next() }),
        disk(DiskOp::Link { from: own, name: log(), to: new, new_name: next() }),
    ];
    let all = [first, moved, Vec::new(), ops];
    let number = |(index, changes)| Record { seq: 41 + index as u64, changes };
    all.into_iter().enumerate().map(number).collect()
}

fn base() -> Part {
    let whole = |sub, name: &[u8], bytes: &'static [u8]| Member {
        sub,
        name: name.to_vec(),
        content: Content::Whole(Bytes::from_static(bytes)),
    };
    let long = [b"long-".to_vec(), vec![b'n'; 250]].concat();
    let members = vec![
        whole(Sub::Own, b"dovecot-uidlist", b"3 V1\n"),
        whole(Sub::Own, b"100% @ \t\n\xff", b""),
        whole(Sub::Cur, b"dovecot-uidlist", b"in cur"),
        whole(Sub::Own, &long, b"a long name"),
    ];
    Part { lines: lines(), members }
}

fn diff() -> Part {
    let member = |name: &[u8], content| Member { sub: Sub::Own, name: name.to_vec(), content };
    let tail = Content::Tail { offset: 1184, bytes: Bytes::from_static(b"appended") };
    let blocks = vec![(0, Bytes::from_static(b"1234")), (2, Bytes::from_static(b"9"))];
    let blocks = Content::Blocks { size: 9, block_size: 4, blocks };
    Part {
        lines: diff_lines(),
        members: vec![member(b"dovecot.index.log", tail), member(b"me@home", blocks)],
    }
}

fn names() -> Vec<(ObjectId, u32)> {
    vec![(id(7, 0x1a2), 2), (id(8, 1), 0)]
}

fn dropped() -> Vec<DroppedRow> {
    vec![
        DroppedRow::since(1_732_233_700, Dropped::Mail(tail(0))),
        DroppedRow::since(1_732_233_701, Dropped::Bundle(id(6, 4))),
        DroppedRow::since(1_732_233_702, Dropped::File(id(6, 5))),
    ]
}

/// What later flushes and gcs say of the list.
fn dropped_later() -> Vec<DroppedRow> {
    vec![
        DroppedRow::In { when: 1_732_233_701, object: Dropped::Bundle(id(6, 4)), doomed: true },
        DroppedRow::Out(Dropped::Mail(tail(0))),
        DroppedRow::Out(Dropped::File(id(6, 5))),
    ]
}

fn frames() -> Vec<(PartKind, Vec<u8>)> {
    vec![
        (PartKind::Base, encode_part(&base(), b"INBOX")),
        (PartKind::Diff, encode_part(&diff(), b"")),
        (PartKind::Base, encode_names(&names())),
        (PartKind::Base, encode_dropped(&dropped())),
        (PartKind::Base, encode_table(&["one".to_string(), "two".to_string()])),
        (PartKind::Base, encode_head_part(b"{ an earlier head }\n")),
    ]
}

/// A bundle with one frame of each kind.
pub fn bundle() -> (Vec<PartRef>, Bytes) {
    let mut writer = BundleWriter::new(id(8, 0x10));
    let refs = frames().iter().map(|(kind, frame)| writer.add(*kind, frame)).collect();
    (refs, writer.finish())
}

pub fn head() -> Head {
    let part = |kind, offset, len| PartRef {
        bundle: id(8, 0x10),
        offset,
        len,
        crc: 0x0012_abcd,
        kind,
        raw_len: 4096,
    };
    let folder = |id, parent, name: &[u8], parts, uid_ceiling| HeadFolder {
        id,
        parent,
        name: name.to_vec(),
        parts,
        uid_ceiling,
        burnt_below: uid_ceiling.map(|c| c / 2),
        unfinished: uid_ceiling.is_some(),
    };
    Head {
        user: "j\u{f6}e@example.com".into(),
        epoch: Epoch(8),
        write_id: "9f86d081884c7d65".into(),
        owner: Some(HeadOwner { backend: "mx1".into(), session: "2c26b46b68ffc68f".into() }),
        watermark: id(8, 0x0f),
        closed: vec![ClosedEpoch { epoch: Epoch(7), end: id(7, 0x1a3) }],
        root_owner: Owner { uid: 1000, gid: 8 },
        root_mode: 0o700,
        folders: vec![
            folder(FolderId::ROOT, Place::ROOT, b"", Vec::new(), None),
            folder(
                INBOX,
                Place::ROOT,
                b"INBOX",
                vec![part(PartKind::Base, 0, 700), part(PartKind::Diff, 700, 90)],
                Some(2000),
            ),
            folder(
                TRASH,
                Place { folder: INBOX, sub: Sub::Cur },
                b"M\xfcll \"x\"",
                Vec::new(),
                None,
            ),
        ],
        uidvalidity_ceiling: Some(1_732_240_000),
        uidvalidity_burnt: Some(1_732_239_000),
        known_above: vec![id(8, 0x11), id(8, 0x13)],
        names: vec![part(PartKind::Base, 790, 10)],
        dropped: Vec::new(),
        previous: Some(part(PartKind::Base, 800, 20)),
        written: 1_732_233_800,
    }
}

fn journal() -> Vec<u8> {
    let mut bytes = encode_journal_header(41);
    records().iter().for_each(|record| bytes.extend(encode_record(record)));
    bytes
}

fn key_text() -> String {
    keys().iter().map(|key| format!("{}\n", key.encode().0)).collect()
}

fn journal_again() -> Vec<u8> {
    let record = Record { seq: 1, changes: vec![Change::Again { object: tail(0) }] };
    [encode_journal_header(1), encode_record(&record)].concat()
}

/// Writes the files that are not there: `cargo test --test formats frozen -- --ignored`.
#[test]
#[ignore = "only for a new version of a format"]
fn write_missing() {
    let write = |name: &str, bytes: &[u8]| {
        if !path(name).exists() {
            std::fs::write(path(name), bytes).unwrap();
        }
    };
    write("keys.1", key_text().as_bytes());
    write("listing.1", encode_listing(lines().iter()).as_bytes());
    write("listing-diff.1", encode_listing(diff_lines().iter()).as_bytes());
    write("journal.1", &journal());
    write("journal-again.1", &journal_again());
    write("head.1", &head().encode());
    write("bundle.1.tar.zst", &bundle().1);
    write("dropped.1.tar.zst", &encode_dropped(&dropped_later()));
}

#[test]
fn version_1_keys() {
    let text = String::from_utf8(read("keys.1")).unwrap();
    let tails: Vec<_> = text.lines().map(|line| KeyTail::parse(line).unwrap()).collect();
    assert_eq!(tails.iter().map(KeyTail::decode).collect::<Vec<_>>(), keys());
    assert_eq!(text, key_text());
    assert_eq!(mail_key("joe", &tails[1]), format!("{}/{}", mail_dir("joe"), tails[1]));
    assert_eq!(head_key("joe@example.com"), "cb/joe@example.com/head");
    assert_eq!(bundle_key("joe", id(7, 1)), "b9/joe/bundle/00000007-000000000001.tar.zst");
    assert_eq!(file_key("joe", id(7, 1)), "b9/joe/file/00000007-000000000001");
    assert_eq!(backend_key("mx1.example.com"), "backends/mx1.example.com");
}

#[test]
fn version_1_listing() {
    assert_eq!(decode_listing(&read("listing.1"), 100).unwrap(), lines());
    assert_eq!(decode_listing(&read("listing-diff.1"), 100).unwrap(), diff_lines());
    assert_eq!(read("listing.1"), encode_listing(lines().iter()).into_bytes());
}

#[test]
fn version_1_journal() {
    let bytes = read("journal.1");
    let back: Result<Vec<_>, _> = JournalReader::new(&bytes).collect();
    let back: Vec<Record> = back.unwrap().into_iter().map(|(record, _)| record).collect();
    assert_eq!(back, records());
    assert_eq!(bytes, journal());
}

#[test]
fn version_1_head() {
    assert_eq!(Head::decode(&read("head.1")).unwrap(), head());
    assert_eq!(read("head.1"), head().encode());
}

#[test]
fn version_1_dropped_list() {
    assert_eq!(decode_dropped(&read("dropped.1.tar.zst"), 1 << 20).unwrap(), dropped_later());
    let lines = decode_table(&encode_dropped(&dropped_later()), 1 << 20).unwrap();
    assert_eq!(lines[0], "1732233701\tbundle/00000006-000000000004.tar.zst\tdoomed");
    assert_eq!(lines[1], format!("out\t{}", tail(0)));
    assert_eq!(lines[2], "out\tfile/00000006-000000000005");
}

#[test]
fn version_1_journal_of_gc() {
    let bytes = read("journal-again.1");
    let back: Result<Vec<_>, _> = JournalReader::new(&bytes).collect();
    let changes = back.unwrap().remove(0).0.changes;
    assert_eq!(changes, [Change::Again { object: tail(0) }]);
    assert_eq!(bytes, journal_again());
}

/// The ranges are frozen with the bundle: another zstd may compress to other lengths.
#[test]
fn version_1_bundle() {
    let bytes = read("bundle.1.tar.zst");
    let mut at = 0;
    let mut frame = || {
        let len = zstd::zstd_safe::find_frame_compressed_size(&bytes[at..]).unwrap();
        at += len;
        &bytes[at - len..at]
    };
    assert_eq!(decode_part(frame(), 1 << 20).unwrap(), base());
    assert_eq!(decode_part(frame(), 1 << 20).unwrap(), diff());
    assert_eq!(decode_names(frame(), 1 << 20).unwrap(), names());
    assert_eq!(decode_dropped(frame(), 1 << 20).unwrap(), dropped());
    assert_eq!(decode_table(frame(), 1 << 20).unwrap(), ["one", "two"]);
    assert_eq!(decode_head_part(frame(), 1 << 20).unwrap(), b"{ an earlier head }\n");
    assert_eq!(at, bytes.len());
}
