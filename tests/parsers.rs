//! Every parser of what came from a store, from a mail server's files or from an admin: no panic,
//! bounded memory, and no name that could lead out of the user's directory (I9).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::cell::Cell;
use vmailfs::config::Config;
use vmailfs::dovecot::index_log::{LogTracker, important};
use vmailfs::dovecot::index_snapshot::SnapshotHeader;
use vmailfs::dovecot::records::{LogHeader, Records, whole_records_len};
use vmailfs::dovecot::recover::{append_sdbox, first_log, mark_fsckd, raise_next_uid};
use vmailfs::dovecot::replay::replay;
use vmailfs::dovecot::template::{Layout, is_valid_user};
use vmailfs::dovecot::uidlist::{self, UidTracker};
use vmailfs::dovecot::{classes, dbox_file, uidvalidity};
use vmailfs::format::escape::is_name;
use vmailfs::format::head::Head;
use vmailfs::format::journal::JournalReader;
use vmailfs::format::part::{
    decode_dropped, decode_head_part, decode_names, decode_part, decode_table,
};
use vmailfs::store::url::StoreUrl;

/// Counts what the current thread holds, and the most it held.
struct Counting;

thread_local! {
    static HELD: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

// SAFETY: everything is the system's; counting allocates nothing, and a thread that ends is not
// counted any more.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Memory) -> *mut u8 {
        let _ = HELD.try_with(|held| {
            let (now, most) = held.get();
            held.set((now + layout.size(), most.max(now + layout.size())));
        });
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Memory) {
        let _ = HELD.try_with(|held| {
            let (now, most) = held.get();
            held.set((now.saturating_sub(layout.size()), most));
        });
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How much more than before a call holds at its worst, in bytes.
fn most_held(run: impl FnOnce()) -> usize {
    let before = HELD.with(|held| {
        let (now, _) = held.get();
        held.set((now, now));
        now
    });
    run();
    HELD.with(|held| held.get().1 - before)
}

/// Nothing small may make a parser hold much.
const MOST: usize = 24 << 20;

fn all_of_dovecot(bytes: &[u8], more: &[u8]) {
    let _ = (LogHeader::parse(bytes), whole_records_len(bytes), important(bytes));
    Records::new(bytes, 0).take(100_000).for_each(drop);
    let snapshot = SnapshotHeader::parse(bytes).ok();
    let mut tracker = LogTracker::of(more, snapshot.as_ref());
    let _ = tracker.feed(more.len() as u64, bytes);
    let _ = tracker.feed(tracker.whole_len(), bytes);
    let _ = (tracker.uid_validity(), tracker.next_uid(), tracker.is_lost());
    let _ = (raise_next_uid(bytes, 77), mark_fsckd(bytes, 1));
    for snapshot in [None, Some(bytes)] {
        if let Ok(state) = replay(snapshot, &[bytes, more]) {
            let _ = append_sdbox(&state, &[1, 2, u32::MAX], 5);
        }
        let _ = replay(snapshot, &[more]);
    }
    let _ = (uidlist::parse(bytes), uidlist::whole_lines_len(bytes));
    let _ = uidlist::raise_next_uid(bytes, 100);
    let mut uids = UidTracker::new();
    uids.reset(bytes);
    uids.fed(bytes.len() as u64, more);
    let _ = (uids.next_uid(), uids.uid_validity());
    let _ = (dbox_file::scan(0, bytes), dbox_file::scan(u64::MAX - 10, bytes));
    let _ = uidvalidity::parse(bytes);
    let pieces: Vec<&[u8]> = bytes.split(|b| *b == b'/').collect();
    let _ = (classes::classify(&pieces), classes::priority(&pieces, &[more]));
}

fn all_of_ours(bytes: &[u8]) {
    let _ = (Head::decode(bytes), decode_head_part(bytes, 1 << 20));
    let _ = (decode_table(bytes, 1 << 20), decode_names(bytes, 1 << 20));
    let _ = decode_dropped(bytes, 1 << 20);
    JournalReader::new(bytes).for_each(drop);
    if let Ok(part) = decode_part(bytes, 1 << 20) {
        for member in &part.members {
            assert!(is_name(&member.name), "{:?}", String::from_utf8_lossy(&member.name));
        }
    }
}

fn all_of_the_admin(text: &str) {
    let _ = (text.parse::<StoreUrl>(), Config::parse(text), is_valid_user(text));
    if let Ok(layout) = Layout::parse(text) {
        let name: Vec<&[u8]> = text.as_bytes().split(|b| *b == b'/').collect();
        let _ = (layout.depth(), layout.user_of(&name), layout.prefix_possible(&name));
        for user in ["a@b.c", "..", "", "x/y", text] {
            for piece in layout.path_of(user).into_iter().flatten() {
                assert!(is_name(piece.as_bytes()), "{text:?}: {user:?}: {piece:?}");
            }
        }
    }
}

fn hit(bytes: &mut Vec<u8>, blows: &[(u8, Index, Index, u8)]) {
    for (kind, at, to, byte) in blows {
        if bytes.is_empty() {
            return;
        }
        let (at, to) = (at.index(bytes.len()), to.index(bytes.len()));
        match kind {
            0 => bytes[at] ^= byte,
            1 => bytes[at] = [0, 0xff, 0x7f, 0x80][usize::from(*byte) % 4],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at.min(to)..at.max(to))),
            _ => {
                let copy = bytes[at.min(to)..at.max(to)].to_vec();
                bytes.splice(at..at, copy);
            }
        }
    }
}

fn blows() -> impl Strategy<Value = Vec<(u8, Index, Index, u8)>> {
    vec((0..5u8, any::<Index>(), any::<Index>(), any::<u8>()), 1..6)
}

/// A log with some mails in it.
fn good_log(mails: u32) -> Vec<u8> {
    let mut log = first_log(1_700_000_000);
    // Its record sets a field of the index header; once more for UIDVALIDITY, which is at 24.
    let mut record = log[40..].to_vec();
    record[8] = 24;
    log.extend(record);
    let uids: Vec<u32> = (1..=mails).collect();
    let state = replay(None, &[&log]).unwrap();
    let append = append_sdbox(&state, &uids, mails + 1).unwrap();
    log.truncate(append.at);
    log.extend(append.bytes);
    log
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn i9_noise(bytes in vec(any::<u8>(), 0..600), more in vec(any::<u8>(), 0..300)) {
        let most = most_held(|| {
            all_of_dovecot(&bytes, &more);
            all_of_ours(&bytes);
            all_of_the_admin(&String::from_utf8_lossy(&bytes));
        });
        prop_assert!(most < MOST, "{most}");
    }

    #[test]
    fn i9_spoilt_logs(mails in 0..20u32, blows in blows(), other in blows()) {
        let (mut log, mut more) = (good_log(mails), good_log(mails + 3));
        hit(&mut log, &blows);
        hit(&mut more, &other);
        let most = most_held(|| all_of_dovecot(&log, &more));
        prop_assert!(most < MOST, "{most}");
    }

    #[test]
    fn i9_spoilt_uid_lists(
        lines in vec("[0-9]{1,11}( [A-Z][0-9a-z]{0,9}){0,2} :[ -~]{0,20}", 0..9),
        next in any::<u32>(),
        blows in blows(),
    ) {
        let head = format!("3 V1234567890 N{next} G0123456789abcdef0123456789abcdef\n");
        let mut list = [head.into_bytes(), lines.join("\n").into_bytes()].concat();
        hit(&mut list, &blows);
        let most = most_held(|| all_of_dovecot(&list, b"5 :x\n"));
        prop_assert!(most < MOST, "{most}");
    }

    #[test]
    fn i9_words_of_the_admin(text in "[%a-zA-Z0-9._/@:\\-\\[\\]=\"\n {}~]{0,80}") {
        all_of_the_admin(&text);
    }
}

/// A tar of one file with this name and kind, as our bundles hold it.
fn tar(name: &[u8], kind: u8, content: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    let short = &name[..name.len().min(100)];
    header[..short.len()].copy_from_slice(short);
    header[100..108].copy_from_slice(b"0000600\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[148..156].copy_from_slice(b"        ");
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
    [&header, content, &padding].concat()
}

/// I9: nothing in a bundle names a file outside of its folder.
#[test]
fn i9_no_name_in_a_bundle_leads_elsewhere() {
    let long = vec![b'a'; 10_000];
    let names: [&[u8]; 14] = [
        b"../x",
        b"INBOX/../../x",
        b"/etc/passwd",
        b"INBOX/..",
        b"..",
        b".",
        b"",
        b"INBOX/",
        b"INBOX//x",
        b"a\0b",
        b"INBOX/x/../../y",
        b"%2e%2e/x",
        b"%2e%2e%2fx",
        &long,
    ];
    for name in names {
        for kind in [b'0', 0, b'1', b'2', b'3', b'5', b'6', b'L', b'x', b'g', b'K'] {
            // A long name or an attribute comes before the file that it is for.
            let pax = [b"30 path=", name, b"\n"].concat();
            for content in [&b"target"[..], name, &pax] {
                let mut raw = tar(name, kind, content);
                raw.extend(tar(b"INBOX/@listing", b'0', b""));
                raw.extend(tar(b"INBOX/good", b'0', b"x"));
                raw.extend([0; 1024]);
                let frame = zstd::bulk::compress(&raw, 1).unwrap();
                let most = most_held(|| all_of_ours(&frame));
                assert!(most < MOST, "{most}");
            }
        }
    }
}

/// I9, I8: a frame that grows without end is refused at its limit.
#[test]
fn i8_a_bomb_does_not_go_off() {
    let zeros = zstd::bulk::compress(&vec![0; 200 << 20], 19).unwrap();
    assert!(zeros.len() < 100_000);
    let lines = zstd::bulk::compress(&b"-\n".repeat(50 << 20), 3).unwrap();
    for frame in [zeros, lines] {
        let most = most_held(|| {
            assert!(decode_part(&frame, 1 << 20).is_err());
            assert!(decode_table(&frame, 1 << 20).is_err());
            assert!(decode_names(&frame, 1 << 20).is_err());
            assert!(decode_dropped(&frame, 1 << 20).is_err());
            assert!(decode_head_part(&frame, 1 << 20).is_err());
        });
        assert!(most < MOST, "{most}");
    }
}
