use super::super::transaction::{Intro, Transaction};
use super::*;

pub(crate) fn log_header(seq: u32, prev: u32, prev_offset: u32) -> Vec<u8> {
    let mut out = vec![1, 3, 40, 0];
    for n in [77u32, seq, prev, prev_offset, 0, 0, 0, 1, 0] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    out
}

fn transaction(build: impl FnOnce(&mut Transaction)) -> Vec<u8> {
    let mut t = Transaction::new();
    build(&mut t);
    t.finish()
}

const GUID: Intro<'_> =
    Intro { name: "guid", reset_id: 0, hdr_size: 0, record_size: 16, record_align: 1 };
const REF: Intro<'_> =
    Intro { name: "ref", reset_id: 0, hdr_size: 0, record_size: 2, record_align: 2 };

#[test]
fn a_log_alone_gives_the_state() {
    let mut log = log_header(1, 0, 0);
    log.extend(transaction(|t| {
        t.header_update(header::UID_VALIDITY, 9);
        t.append(&[1, 2, 5]);
        t.ext_intro(&GUID);
        t.ext_records([(2, [7u8; 16].as_slice())].into_iter());
        t.ext_intro(&REF);
        t.ext_records([(1, [1, 0].as_slice())].into_iter());
        t.record(kind::EXT_ATOMIC_INC, &[1, 0, 0, 0, 2, 0, 0, 0]);
        t.record(kind::EXT_ATOMIC_INC, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        t.record(kind::FLAG_UPDATE, &[1, 0, 0, 0, 4, 0, 0, 0, 8, 2, 0, 0]);
    }));
    let state = replay(None, &[&log]).unwrap();
    assert_eq!((state.uid_validity, state.next_uid), (9, 6));
    assert_eq!(state.records.keys().copied().collect::<Vec<_>>(), [1, 2, 5]);
    assert_eq!(state.records[&2].flags, 8);
    assert_eq!(state.records[&5].flags, 0);
    assert_eq!(state.ext_of(2, "guid"), Some([7u8; 16].as_slice()));
    assert_eq!(state.ext_of(1, "ref"), Some([2, 0].as_slice()));
    assert_eq!(state.log_end, (1, log.len()));
    assert_eq!(state.log_tail, log.len());
}

#[test]
fn logs_are_chained_and_gaps_are_found() {
    let mut first = log_header(1, 0, 0);
    first.extend(transaction(|t| t.append(&[1, 2])));
    let mut second = log_header(2, 1, first.len() as u32);
    second.extend(transaction(|t| t.append(&[3])));
    let state = replay(None, &[&first, &second]).unwrap();
    assert_eq!((state.records.len(), state.next_uid, state.log_end.0), (3, 4, 2));
    assert_eq!(replay(None, &[&second]), Err(ReplayError::LogMissing { wanted: 1 }));
    assert_eq!(replay(None, &[]), Err(ReplayError::NoLog));
    let cut = &first[..first.len() - 4];
    assert!(matches!(replay(None, &[cut, &second]), Err(ReplayError::LogShort { .. })));
    let mut reset = log_header(2, 0, 0);
    reset.extend(transaction(|t| t.append(&[9])));
    let state = replay(None, &[&first, &reset]).unwrap();
    assert_eq!(state.records.keys().copied().collect::<Vec<_>>(), [9]);
}

#[test]
fn a_request_is_not_yet_an_expunge_and_holds_the_tail() {
    let mut log = log_header(1, 0, 0);
    log.extend(transaction(|t| t.append(&[1, 2])));
    let before = log.len();
    let mut request = transaction(|t| t.record(kind::EXPUNGE | 0xcd90, &[1, 0, 0, 0, 1, 0, 0, 0]));
    request[7] &= !0x10;
    log.extend_from_slice(&request);
    let state = replay(None, &[&log]).unwrap();
    assert_eq!((state.records.len(), state.log_tail), (2, before));
    log.extend(transaction(|t| t.record(kind::EXPUNGE | 0xcd90, &[1, 0, 0, 0, 1, 0, 0, 0])));
    let state = replay(None, &[&log]).unwrap();
    assert_eq!(state.records.keys().copied().collect::<Vec<_>>(), [2]);
}

#[test]
fn keywords_number_the_extensions_after_them() {
    let mut log = log_header(1, 0, 0);
    let keyword = |how: u8| {
        let mut body = vec![how, 0, 4, 0];
        body.extend_from_slice(b"work");
        body.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        body
    };
    log.extend(transaction(|t| {
        t.append(&[1, 2]);
        t.record(kind::KEYWORD_UPDATE, &keyword(0));
        t.ext_intro(&GUID);
        t.record(kind::KEYWORD_RESET, &[2, 0, 0, 0, 2, 0, 0, 0]);
    }));
    let state = replay(None, &[&log]).unwrap();
    assert_eq!(state.keywords_of(1), ["work"]);
    assert!(state.keywords_of(2).is_empty());
    assert_eq!(
        state.extensions.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(),
        ["keywords", "guid"]
    );
}

proptest::proptest! {
    #[test]
    fn nothing_panics(index: Vec<u8>, records: Vec<(u32, Vec<u8>)>, junk: Vec<u8>) {
        let mut log = log_header(1, 0, 0);
        let mut t = Transaction::new();
        t.append(&[1, 2, 3]);
        t.ext_intro(&REF);
        for (kind, body) in &records {
            t.record(*kind & 0x1f_ffff, body);
            t.record(1 << (kind % 21), body);
        }
        log.extend(t.finish());
        let _ = replay(None, &[&log]);
        log.extend_from_slice(&junk);
        let _ = replay(None, &[&log, &junk]);
        let mut snapshot = vec![7, 3, 120, 0];
        snapshot.resize(12, 0);
        snapshot.extend_from_slice(&[1, 0, 0, 0, 77, 0, 0, 0]);
        snapshot.extend_from_slice(&index);
        let _ = replay(Some(&snapshot), &[&log]);
        let _ = replay(Some(&index), &[&log]);
    }
}
