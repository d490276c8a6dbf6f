use super::super::{records::whole_records_len, transaction::Transaction};
use super::*;

fn header_bytes() -> Vec<u8> {
    let mut out = vec![1, 3, 40, 0];
    for n in [77u32, 1, 0, 0, 0, 0, 0, 1, 0] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    out
}

fn transaction(build: impl FnOnce(&mut Transaction)) -> Vec<u8> {
    let mut t = Transaction::new();
    build(&mut t);
    t.finish()
}

fn sample() -> Vec<u8> {
    let mut log = header_bytes();
    log.extend(transaction(|t| t.header_update(header::UID_VALIDITY, 5)));
    log.extend(transaction(|t| {
        t.append(&[1, 2, 7]);
        t.header_update(header::LOG_TAIL_OFFSET, 100);
    }));
    log.extend(transaction(|t| t.header_update(header::NEXT_UID, 500)));
    log
}

#[test]
fn a_log_is_followed_through_any_split() {
    let log = sample();
    for step in 1..40 {
        let mut tracker = LogTracker::new();
        for (i, piece) in log.chunks(step).enumerate() {
            tracker.feed((i * step) as u64, piece);
            let fed = (i * step + piece.len()).min(log.len());
            assert_eq!(tracker.whole_len(), whole_records_len(&log[..fed]) as u64, "{fed}");
        }
        assert_eq!(tracker.next_uid(), 500);
        assert_eq!(tracker.uid_validity(), Some(5));
        assert_eq!(tracker.header().unwrap().indexid, 77);
        assert!(!tracker.is_lost());
    }
}

#[test]
fn an_unfinished_transaction_raises_next_uid_early() {
    let log = sample();
    let cut = log.len() - 16 - 16;
    let tracker = LogTracker::of(&log[..cut], None);
    assert_eq!(tracker.next_uid(), 8);
    assert_eq!(tracker.whole_len(), 40 + 16);
}

#[test]
fn a_rotation_keeps_what_is_known() {
    let mut tracker = LogTracker::of(&sample(), None);
    tracker.reset(&header_bytes());
    assert_eq!((tracker.next_uid(), tracker.uid_validity()), (500, Some(5)));
    assert_eq!(tracker.whole_len(), 40);
}

#[test]
fn a_mark_of_corruption_is_noticed_and_a_gap_is_lost() {
    let mut tracker = LogTracker::of(&sample(), None);
    tracker.feed(4, &[0; 4]);
    assert_eq!(tracker.header().unwrap().indexid, 0);
    assert!(!tracker.is_lost());
    tracker.feed(10_000, &[1; 4]);
    assert!(tracker.is_lost());
    assert!(tracker.feed(0, &[]).important);
}

#[test]
fn importance_follows_the_record() {
    let keyword = |name: &[u8]| {
        let mut body = vec![0, 0];
        body.extend_from_slice(&(name.len() as u16).to_le_bytes());
        body.extend_from_slice(name);
        body.resize(super::super::bytes::pad4(body.len()), 0);
        body.extend_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0]);
        transaction(|t| t.record(kind::KEYWORD_UPDATE, &body))
    };
    assert!(!important(&keyword(b"$HasAttachment")));
    assert!(!important(&keyword(b"$HasNoAttachment")));
    assert!(important(&keyword(b"work")));
    assert!(important(&transaction(|t| t.record(kind::FLAG_UPDATE, &[0; 12]))));
    assert!(important(&transaction(|t| t.record(kind::EXT_ATOMIC_INC, &[0; 8]))));
    assert!(important(&transaction(|t| t.record(kind::ATTRIBUTE_UPDATE, &[0; 8]))));
    assert!(important(&transaction(|t| t.record(0x80_0000, &[0; 8]))));
    assert!(important(&transaction(|t| t.header_update(header::UID_VALIDITY, 1))));
    assert!(!important(&transaction(|t| t.header_update(header::LOG_TAIL_OFFSET, 1))));
    assert!(!important(&transaction(|t| {
        t.append(&[1]);
        t.header_update(48, 1);
    })));
    // A piece of a record cannot be decided.
    assert!(important(&transaction(|t| t.append(&[1]))[..10]));
    assert!(!important(&[]));
}

proptest::proptest! {
    #[test]
    fn nothing_panics(writes: Vec<(u16, Vec<u8>)>) {
        let mut tracker = LogTracker::new();
        for (offset, bytes) in &writes {
            tracker.feed(u64::from(*offset), bytes);
            let _ = (tracker.whole_len(), tracker.next_uid());
            let _ = important(bytes);
        }
        let mut tracker = LogTracker::of(&sample(), None);
        for (_, bytes) in &writes {
            tracker.feed(tracker.at + tracker.pending.len() as u64, bytes);
        }
    }
}
