//! What is encoded is decoded to the same.

use super::any;
use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use vmailfs::format::head::*;
use vmailfs::format::journal::*;
use vmailfs::format::key::*;
use vmailfs::format::listing::*;
use vmailfs::format::part::*;
use vmailfs::format::*;

fn is_too_large(error: &FormatError) -> bool {
    matches!(error, FormatError::TooLarge { .. })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn key(key in any::mail_key()) {
        let (tail, outside) = key.encode();
        prop_assert!(tail.to_string().len() <= KeyTail::MAX_LEN);
        prop_assert!(!tail.to_string().contains('/'));
        prop_assert_eq!(&KeyTail::parse(&tail.to_string()).unwrap(), &tail);
        prop_assert_eq!(tail.id(), key.id);
        let mut back = tail.decode();
        if outside {
            prop_assert_eq!(back.name.take(), None);
            back.name = key.name.clone();
        }
        prop_assert_eq!(back, key);
    }

    #[test]
    fn keys_sort_as_ids(a in any::mail_key(), b in any::mail_key()) {
        prop_assume!(a.id != b.id);
        let by_text = a.encode().0.to_string().cmp(&b.encode().0.to_string());
        prop_assert_eq!(by_text, a.id.cmp(&b.id));
    }

    #[test]
    fn folder_in_metadata(path in vec(any::name(), 0..8)) {
        let text = meta_folder(path.iter().map(Vec::as_slice));
        prop_assert!(text.len() <= META_FOLDER_MAX);
        let (back, all) = parse_meta_folder(&text).unwrap();
        prop_assert!(path.ends_with(&back));
        prop_assert_eq!(all, back.len() == path.len());
        prop_assert!(path.is_empty() || !back.is_empty());
    }

    #[test]
    fn listing(lines in vec(any::line(), 0..10)) {
        for line in &lines {
            let mut text = String::new();
            encode_line(line, &mut text);
            prop_assert!(text.bytes().all(|b| b == b'\t' || (0x21..=0x7e).contains(&b)));
            prop_assert_eq!(&decode_line(&text).unwrap(), line);
        }
        let text = encode_listing(lines.iter());
        let count = lines.len();
        prop_assert_eq!(decode_listing(text.as_bytes(), count).unwrap(), lines);
        if count > 0 {
            let error = decode_listing(text.as_bytes(), count - 1).unwrap_err();
            prop_assert!(is_too_large(&error));
        }
    }

    #[test]
    fn journal(first in 0..u64::MAX / 2, records in any::records(7)) {
        let mut bytes = encode_journal_header(first);
        let mut due = Vec::new();
        for (index, record) in records.into_iter().enumerate() {
            let record = Record { seq: first + index as u64, ..record };
            bytes.extend(encode_record(&record));
            due.push((record, bytes.len() as u64));
        }
        let reader = JournalReader::new(&bytes);
        prop_assert_eq!(reader.first_seq(), Some(first));
        let back: Result<Vec<_>, _> = reader.collect();
        prop_assert_eq!(back.unwrap(), due);
    }

    #[test]
    fn head(head in any::head()) {
        let bytes = head.encode();
        prop_assert_eq!(Head::decode(&bytes).unwrap(), head.clone());
        let part = encode_head_part(&bytes);
        prop_assert_eq!(decode_head_part(&part, HEAD_LIMIT + 4096).unwrap(), bytes.clone());
        // Plain JSON to others, and a line for each folder.
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(json["folders"].as_array().unwrap().len(), head.folders.len());
        let text = String::from_utf8(bytes).unwrap();
        let folders = text.lines().filter(|line| line.starts_with("{\"id\":")).count();
        prop_assert_eq!(folders, head.folders.len());
    }

    #[test]
    fn part(part in any::part(), path in any::folder_path()) {
        let frame = encode_part(&part, &path);
        prop_assert_eq!(decode_part(&frame, 1 << 20).unwrap(), part);
        let raw = zstd::bulk::decompress(&frame, 1 << 20).unwrap();
        prop_assert_eq!(raw.len() % 512, 0);
        let error = decode_part(&frame, raw.len() as u64 - 1).unwrap_err();
        prop_assert!(is_too_large(&error));
        prop_assert!(decode_part(&frame, raw.len() as u64).is_ok());
    }

    #[test]
    fn tables(
        lines in vec("[ -~]{0,30}", 0..20),
        names in vec((any::object_id(), any::<u32>()), 0..20),
        mails in vec((any::<i64>(), any::key_tail()), 0..10),
        others in vec((any::<i64>(), any::object_id(), any::<bool>()), 0..10),
    ) {
        prop_assert_eq!(decode_table(&encode_table(&lines), 1 << 20).unwrap(), lines);
        prop_assert_eq!(decode_names(&encode_names(&names), 1 << 20).unwrap(), names);
        let mails = mails.into_iter().map(|(when, tail)| match when {
            0.. => DroppedRow::since(when, Dropped::Mail(tail)),
            _ => DroppedRow::Out(Dropped::Mail(tail)),
        });
        let others = others.into_iter().map(|(when, id, bundle)| {
            let object = if bundle { Dropped::Bundle(id) } else { Dropped::File(id) };
            DroppedRow::In { when, object, doomed: when % 2 == 0 }
        });
        let dropped: Vec<_> = mails.chain(others).collect();
        let frame = encode_dropped(&dropped);
        prop_assert_eq!(decode_table(&frame, 1 << 20).unwrap().len(), dropped.len());
        prop_assert_eq!(decode_dropped(&frame, 1 << 20).unwrap(), dropped);
    }

    #[test]
    fn bundle(parts in vec(any::part(), 0..4)) {
        let id = ObjectId { epoch: Epoch(3), counter: 9 };
        let mut writer = BundleWriter::new(id);
        let refs: Vec<PartRef> =
            parts.iter().map(|p| writer.add(PartKind::Diff, &encode_part(p, b"x"))).collect();
        let bytes = writer.finish();
        for (at, part) in refs.iter().zip(&parts) {
            let range = bytes.slice(at.offset as usize..(at.offset + at.len) as usize);
            at.check(&range).unwrap();
            prop_assert_eq!(&decode_part(&range, at.raw_len).unwrap(), part);
            prop_assert!(at.check(&range[1..]).is_err());
        }
    }

    #[test]
    fn changed_blocks_make_the_new_file(
        old in vec(any::<u8>(), 0..3000),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        new_len in 0..4000usize,
        block_size in 1..700u32,
    ) {
        let mut new = old.clone();
        new.resize(new_len, 0x5a);
        for (at, byte) in changes {
            if !new.is_empty() {
                let at = at.index(new.len());
                new[at] = byte;
            }
        }
        let size = block_size as usize;
        let differs = |number: usize, block: &[u8]| old.chunks(size).nth(number) != Some(block);
        let blocks: Vec<(u64, Bytes)> = new
            .chunks(size)
            .enumerate()
            .filter(|(number, block)| differs(*number, block))
            .map(|(number, block)| (number as u64, Bytes::copy_from_slice(block)))
            .collect();
        let content = Content::Blocks { size: new.len() as u64, block_size, blocks };
        prop_assert_eq!(apply_content(Some(&old), &content).unwrap(), new);
    }
}

#[test]
fn long_user_names_are_hashed() {
    let user = "\u{e9}".repeat(100);
    let dir = user_dir(&user);
    let component = dir.rsplit('/').next().unwrap();
    assert!(is_hashed_user_dir(component) && component.len() < 100);
    assert!(parse_user_dir(component).is_err());
    let dir = user_dir("example.com/j\u{f6}e");
    let component = dir.rsplit('/').next().unwrap();
    assert_eq!(component, "example.com_2Fj_C3_B6e");
    assert!(!is_hashed_user_dir(component));
    assert_eq!(parse_user_dir(component).unwrap(), "example.com/j\u{f6}e");
}

#[test]
fn content_is_only_built_on_what_it_was_made_for() {
    let tail = Content::Tail { offset: 3, bytes: Bytes::from_static(b"def") };
    assert_eq!(apply_content(Some(b"abcxyz"), &tail).unwrap(), b"abcdef");
    assert!(apply_content(Some(b"ab"), &tail).is_err());
    assert!(apply_content(None, &tail).is_err());
    let start = Content::Tail { offset: 0, bytes: Bytes::from_static(b"a") };
    assert_eq!(apply_content(None, &start).unwrap(), b"a");

    let two = |size, block_size| Content::Blocks {
        size,
        block_size,
        blocks: vec![(1, Bytes::from_static(b"cd"))],
    };
    assert_eq!(apply_content(Some(b"ab"), &two(4, 2)).unwrap(), b"abcd");
    assert_eq!(apply_content(Some(b"abXXe"), &two(5, 2)).unwrap(), b"abcde");
    assert!(apply_content(Some(b"a"), &two(4, 2)).is_err(), "block 0 is not there");
    assert!(apply_content(None, &two(4, 2)).is_err());
    assert!(apply_content(Some(b"ab"), &two(u64::MAX, 2)).is_err());
    assert!(apply_content(Some(b"ab"), &two(5, 2)).is_err(), "block 2 is not there");
    assert!(apply_content(Some(b"ab"), &two(3, 2)).is_err(), "longer than the file");
    assert!(apply_content(Some(b"ab"), &two(4, 0)).is_err());
}
