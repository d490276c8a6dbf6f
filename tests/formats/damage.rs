//! What comes from a store or a disk is not trusted (I9): no decoder panics, and damage never
//! passes for another value where a checksum stands.

use super::any;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use vmailfs::format::escape::*;
use vmailfs::format::head::*;
use vmailfs::format::journal::*;
use vmailfs::format::key::*;
use vmailfs::format::listing::*;
use vmailfs::format::part::*;
use vmailfs::format::*;

/// A few blows to some bytes.
fn blows() -> impl Strategy<Value = Vec<(u8, Index, Index, u8)>> {
    vec((0..5u8, any::<Index>(), any::<Index>(), any::<u8>()), 1..4)
}

fn hit(bytes: &mut Vec<u8>, blows: &[(u8, Index, Index, u8)]) {
    for (kind, at, to, byte) in blows {
        if bytes.is_empty() {
            return;
        }
        let at = at.index(bytes.len());
        let to = to.index(bytes.len());
        match kind {
            0 => bytes[at] ^= byte,
            1 => bytes.truncate(at),
            2 => bytes.insert(at, *byte),
            3 => drop(bytes.drain(at.min(to)..at.max(to))),
            _ => {
                let copy = bytes[at.min(to)..at.max(to)].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
}

fn decode_all(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = (unescape(&text), unescape_key(&text), parse_user_dir(&text));
    let _ = (KeyTail::parse(&text), decode_line(&text), parse_meta_folder(&text));
    let _ = (decode_listing(bytes, 1000), Head::decode(bytes), decode_head_part(bytes, 1 << 16));
    let _ = (decode_part(bytes, 1 << 16), decode_table(bytes, 1 << 16));
    let _ = (decode_names(bytes, 1 << 16), decode_dropped(bytes, 1 << 16));
    JournalReader::new(bytes).for_each(drop);
}

fn reseal_head(bytes: &mut Vec<u8>) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let body = text.rfind("\"crc\"").map_or(text.as_str(), |at| &text[..at]);
    *bytes = format!("{body}\"crc\": \"{:08x}\"\n}}\n", crc32c::crc32c(body.as_bytes())).into();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn noise(bytes in vec(any::<u8>(), 0..400)) {
        decode_all(&bytes);
    }

    #[test]
    fn noisy_key(tail in any::key_tail(), blows in blows()) {
        let mut bytes = tail.to_string().into_bytes();
        hit(&mut bytes, &blows);
        if let Ok(tail) = KeyTail::parse(&String::from_utf8_lossy(&bytes)) {
            let (again, outside) = tail.decode().encode();
            prop_assert_eq!(again, tail);
            prop_assert!(!outside);
        }
    }

    #[test]
    fn noisy_line(line in any::line(), blows in blows()) {
        let mut text = String::new();
        encode_line(&line, &mut text);
        let mut bytes = text.into_bytes();
        hit(&mut bytes, &blows);
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(line) = decode_line(&text) {
            let mut again = String::new();
            encode_line(&line, &mut again);
            prop_assert_eq!(again, text, "one text for each line");
        }
    }

    #[test]
    fn noisy_head(head in any::head(), blows in blows()) {
        let good = head.encode();
        let mut bytes = good.clone();
        hit(&mut bytes, &blows);
        prop_assert!(bytes == good || Head::decode(&bytes).is_err());
        // With the checksum put right, what is decoded is at least a legal head.
        reseal_head(&mut bytes);
        if let Ok(head) = Head::decode(&bytes) {
            prop_assert!(head.check().is_ok());
            prop_assert_eq!(Head::decode(&head.encode()).unwrap(), head);
        }
    }

    #[test]
    fn noisy_part(part in any::part(), blows in blows()) {
        let good = encode_part(&part, b"INBOX");
        let mut bytes = good.clone();
        hit(&mut bytes, &blows);
        if let Ok(decoded) = decode_part(&bytes, 1 << 20) {
            prop_assert_eq!(decoded, part.clone(), "zstd has a checksum");
        }
        // Under the compression.
        let mut raw = zstd::bulk::decompress(&good, 1 << 20).unwrap();
        hit(&mut raw, &blows);
        let frame = zstd::bulk::compress(&raw, 1).unwrap();
        let _ = (decode_part(&frame, 1 << 20), decode_table(&frame, 1 << 20));
        if let Ok(part) = decode_part(&frame, 1 << 20) {
            prop_assert_eq!(&decode_part(&encode_part(&part, b"INBOX"), 1 << 22).unwrap(), &part);
            for member in &part.members {
                let _ = apply_content(None, &member.content);
                let _ = apply_content(Some(b"some old bytes"), &member.content);
            }
        }
    }

    /// A crash leaves a prefix: its whole records are there, and the rest is told as torn.
    #[test]
    fn torn_journal(records in any::records(5), cut in any::<Index>()) {
        let mut bytes = encode_journal_header(5);
        let mut ends = vec![bytes.len()];
        for record in &records {
            bytes.extend(encode_record(record));
            ends.push(bytes.len());
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        let last = ends.iter().rposition(|&end| end <= bytes.len());
        let whole = last.unwrap_or(0);
        let items: Vec<_> = JournalReader::new(&bytes).collect();
        for (item, record) in items.iter().zip(&records).take(whole) {
            prop_assert_eq!(&item.as_ref().unwrap().0, record);
        }
        let clean = last.is_some_and(|last| ends[last] == bytes.len());
        if clean {
            prop_assert_eq!(items.len(), whole);
        } else {
            let offset = last.map_or(0, |last| ends[last] as u64);
            prop_assert_eq!(items.len(), whole + 1);
            prop_assert_eq!(items[whole].as_ref().unwrap_err(), &JournalEnd::Torn { offset });
        }
    }

    /// One wrong byte with a good record behind it is damage, and no wrong record comes out.
    #[test]
    fn damaged_journal(records in any::records(1), at in any::<Index>(), flip in 1u8..) {
        let mut bytes = encode_journal_header(1);
        let mut ends = vec![bytes.len()];
        for record in &records {
            bytes.extend(encode_record(record));
            ends.push(bytes.len());
        }
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        // The records up to the damaged one.
        let good = ends.iter().filter(|&&end| end <= at).count().saturating_sub(1);
        let items: Vec<_> = JournalReader::new(&bytes).collect();
        if items.is_empty() {
            // Nothing but the first record vouches for the header's number.
            prop_assert!(records.is_empty());
            prop_assert_ne!(JournalReader::new(&bytes).first_seq(), Some(1));
            return Ok(());
        }
        prop_assert_eq!(items.len(), good + 1);
        for (item, record) in items.iter().zip(&records).take(good) {
            prop_assert_eq!(&item.as_ref().unwrap().0, record);
        }
        let in_last = records.is_empty() || at >= ends[ends.len() - 2];
        match items[good].as_ref().unwrap_err() {
            JournalEnd::Torn { .. } => prop_assert!(in_last),
            JournalEnd::Corrupt { .. } => {}
        }
    }
}

fn line_is_bad(text: &str) -> bool {
    decode_line(text).is_err()
}

#[test]
fn lines_that_are_refused() {
    let tail = "00000001-000000000002.0000000000000003.5-000000000.0600.00000000.m.a";
    let attrs = "0600\t-\t5.000000000";
    assert!(!line_is_bad(&format!("mail\tnew\tx\t1\t{attrs}\t{tail}")));
    assert!(!line_is_bad(&format!("grow\t.\tm.1\t9\t{attrs}\t2\t0:4:{tail}\t4:5:{tail}")));
    assert!(line_is_bad(&format!("grow\t.\tm.1\t9\t{attrs}\t2\t0:4:{tail}\t5:4:{tail}")), "gap");
    assert!(line_is_bad(&format!("grow\t.\tm.1\t8\t{attrs}\t2\t0:4:{tail}\t4:5:{tail}")), "size");
    assert!(line_is_bad(&format!("grow\t.\tm.1\t9\t{attrs}\t3\t0:4:{tail}\t4:5:{tail}")), "count");
    assert!(line_is_bad(&format!("grow\t.\tm.1\t0\t{attrs}\t18446744073709551615")));
    assert!(line_is_bad(&format!("mail\tnew\tx\t1\t{attrs}\t{tail}\t")), "one field more");
    assert!(line_is_bad(&format!("mail\tnew\t..\t1\t{attrs}\t{tail}")));
    assert!(line_is_bad(&format!("mail\tnew\ta/b\t1\t{attrs}\t{tail}")));
    assert!(line_is_bad(&format!("mail\tnew\ta%00b\t1\t{attrs}\t{tail}")));
    assert!(line_is_bad(&format!("mail\tnew\t{}\t1\t{attrs}\t{tail}", "x".repeat(256))));
    assert!(line_is_bad(&format!("mail\tnew\tx\t+1\t{attrs}\t{tail}")));
    assert!(line_is_bad(&format!("mail\told\tx\t1\t{attrs}\t{tail}")));
    assert!(line_is_bad(&format!("link\t.\tx\t%-\t{attrs}")), "no target");
    assert!(line_is_bad("dir\t.\t0600\t-\t-0.000000000"));
    assert!(line_is_bad("dir\t.\t10600\t-\t0.000000000"));
    assert!(line_is_bad("nodir\t."));
    assert!(line_is_bad(""));
}

#[test]
fn newer_versions_are_told_apart() {
    let newer = |error: &FormatError| {
        matches!(error, FormatError::TooNew { known: 1, .. })
            && error.to_string().contains("upgrade")
    };
    assert!(newer(&decode_listing(b"vmailfs listing 2 zstd\nwhatever\n", 9).unwrap_err()));
    assert!(newer(&Head::decode(b"{\"new\": [{}], \"vmailfs-head\": 2}").unwrap_err()));
    let item = JournalReader::new(b"vmailfs journal 3 1 x\n").next();
    match item {
        Some(Err(JournalEnd::Corrupt { offset: 0, error })) => assert!(newer(&error)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn folders_that_are_no_tree() {
    let head = super::frozen::head();
    assert!(head.check().is_ok());
    let bad = |change: fn(&mut Head)| {
        let mut head = head.clone();
        change(&mut head);
        Head::decode(&head.encode()).is_err()
    };
    assert!(bad(|h| h.folders[1].parent.folder = FolderId(99)), "no such parent");
    assert!(bad(|h| h.folders[1].parent.folder = h.folders[1].id), "its own parent");
    assert!(bad(|h| {
        h.folders[1].parent.folder = h.folders[2].id;
        h.folders[2].parent.folder = h.folders[1].id;
    }));
    assert!(bad(|h| h.folders[1].id = h.folders[2].id), "one id twice");
    assert!(
        bad(|h| {
            h.folders[1].name = h.folders[2].name.clone();
            h.folders[2].parent = Place::ROOT;
            h.folders[1].parent = Place::ROOT;
        }),
        "one name twice"
    );
    assert!(bad(|h| h.folders[1].name = b"..".to_vec()));
    assert!(bad(|h| drop(h.folders.remove(0))), "no root");
    assert!(bad(|h| h.folders[0].name = b"x".to_vec()));
    assert!(bad(|h| h.folders[1].parts[0].offset = u64::MAX));
    let chain = |length: u64| {
        let mut head = head.clone();
        head.folders.truncate(1);
        for id in 1..=length {
            let parent = Place::own(FolderId(id - 1));
            let (parts, name) = (Vec::new(), b"x".to_vec());
            head.folders.push(HeadFolder {
                id: FolderId(id),
                parent,
                name,
                parts,
                uid_ceiling: None,
                burnt_below: None,
                unfinished: false,
            });
        }
        Head::decode(&head.encode())
    };
    assert!(chain(DEPTH_MAX as u64).is_ok());
    assert!(chain(DEPTH_MAX as u64 + 1).is_err());
}

/// A frame that is small and claims or makes a lot.
#[test]
fn bombs() {
    let zeros = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    assert!(zeros.len() < 10_000);
    // The end of a tar, which ought to be the end: nothing behind it is decompressed.
    assert!(matches!(decode_part(&zeros, 1 << 20), Err(FormatError::Malformed { .. })));
    let content = Content::Whole(vec![0; 64 << 20].into());
    let member = Member { sub: Sub::Own, name: b"zeros".to_vec(), content };
    let large = encode_part(&Part { lines: Vec::new(), members: vec![member] }, b"");
    assert!(large.len() < 20_000);
    let error = decode_part(&large, 1 << 20).unwrap_err();
    assert_eq!(error, FormatError::TooLarge { what: "part", limit: 1 << 20 });
    // A window of 64 MiB.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(26).unwrap();
    std::io::Write::write_all(&mut encoder, b"x").unwrap();
    let wide = encoder.finish().unwrap();
    assert!(matches!(decode_part(&wide, 1 << 20), Err(FormatError::Malformed { .. })));
    // Two frames where one is due.
    let part = encode_part(&Part::default(), b"");
    assert!(decode_part(&part, 1 << 20).is_ok());
    assert!(decode_part(&[part.as_slice(), &part].concat(), 1 << 20).is_err());
    assert!(decode_part(&part[..part.len() - 1], 1 << 20).is_err());
}
