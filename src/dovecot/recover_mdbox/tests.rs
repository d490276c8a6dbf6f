use super::super::{dbox_file::test_mail, transaction::Transaction};
use super::{
    super::{
        bytes::u32_at,
        records::header,
        replay::{IndexState, replay},
        transaction::Intro,
    },
    parts::{ExtShape, GUID, HEADER, MAP, MDBOX, REF, map_entry},
    *,
};

fn log(validity: u32, build: impl FnOnce(&mut Transaction)) -> Vec<u8> {
    let mut out = vec![1, 3, 40, 0];
    for n in [77u32, 1, 0, 0, 0, 0, 0, 1, 0] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    let mut t = Transaction::new();
    t.header_update(header::UID_VALIDITY, validity);
    build(&mut t);
    out.extend(t.finish());
    out
}

fn intro(shape: &ExtShape) -> Intro<'static> {
    shape.intro(&IndexState::default())
}

fn map_record(file: u32, offset: u32, size: u32) -> Vec<u8> {
    [file, offset, size].iter().flat_map(|n| n.to_le_bytes()).collect()
}

/// A map with (map UID, file, offset, count).
fn map_log(entries: &[(u32, u32, u32, u16)]) -> Vec<u8> {
    log(42, |t| {
        t.append(&entries.iter().map(|e| e.0).collect::<Vec<_>>());
        let records: Vec<_> = entries.iter().map(|e| (e.0, map_record(e.1, e.2, 100))).collect();
        t.ext_intro(&intro(&MAP));
        t.ext_header_update(0, &1u32.to_le_bytes());
        t.ext_records(records.iter().map(|(uid, d)| (*uid, d.as_slice())));
        let counts: Vec<_> = entries.iter().map(|e| (e.0, e.3.to_le_bytes())).collect();
        t.ext_intro(&intro(&REF));
        t.ext_records(counts.iter().map(|(uid, d)| (*uid, d.as_slice())));
    })
}

/// A folder with (UID, map UID, GUID byte).
fn folder_log(mails: &[(u32, u32, u8)]) -> Vec<u8> {
    log(9, |t| {
        t.ext_intro(&Intro {
            name: HEADER,
            reset_id: 0,
            hdr_size: 24,
            record_size: 0,
            record_align: 0,
        });
        t.ext_header_update(0, &42u32.to_le_bytes());
        t.append(&mails.iter().map(|m| m.0).collect::<Vec<_>>());
        let links: Vec<_> = mails.iter().map(|m| (m.0, (u64::from(m.1)).to_le_bytes())).collect();
        t.ext_intro(&intro(&MDBOX));
        t.ext_records(links.iter().map(|(uid, d)| (*uid, d.as_slice())));
        let guids: Vec<_> = mails.iter().map(|m| (m.0, [m.2; 16])).collect();
        t.ext_intro(&intro(&GUID));
        t.ext_records(guids.iter().map(|(uid, d)| (*uid, d.as_slice())));
    })
}

/// Recovers and gives back the output and the states after it: the map, then the folders.
fn run(
    map: &[u8],
    folders: &[(&str, &[u8], u32)],
    ranges: &[(u32, u64, &[u8])],
) -> (MdboxOutput, IndexState, Vec<IndexState>) {
    let logs: Vec<[&[u8]; 1]> = folders.iter().map(|f| [f.1]).collect();
    let given: Vec<_> = folders
        .iter()
        .zip(&logs)
        .map(|(f, logs)| MdboxFolder { name: f.0.as_bytes(), snapshot: None, logs, at_least: f.2 })
        .collect();
    let ranges: Vec<_> =
        ranges.iter().map(|r| MdboxRange { file: r.0, offset: r.1, bytes: r.2 }).collect();
    let out = recover_mdbox(&MdboxInput {
        map_snapshot: None,
        map_logs: &[map],
        folders: &given,
        ranges: &ranges,
        highest_file: 2,
        save_date: 5,
        restore_unreferenced: true,
    })
    .unwrap();
    let apply = |log: &[u8], append: &LogAppend| {
        let log = [&log[..append.at], &append.bytes].concat();
        replay(None, &[&log]).unwrap()
    };
    let map = apply(map, &out.map);
    assert_eq!(map.log_tail, map.log_end.1);
    let states = folders
        .iter()
        .zip(&out.folders)
        .map(|(f, append)| apply(f.1, append.as_ref().unwrap()))
        .collect();
    (out, map, states)
}

#[test]
fn new_mails_get_entries_in_map_and_folder() {
    let map = map_log(&[(1, 1, 16, 1)]);
    let inbox = folder_log(&[(1, 1, 0xaa)]);
    let sub = folder_log(&[]);
    let mails = [
        test_mail(b"one\n", 1, "INBOX"),
        test_mail(b"two\n", 2, "A/B"),
        test_mail(b"three\n", 3, "Gone"),
    ];
    let (out, map, folders) = run(
        &map,
        &[("INBOX", &inbox, 1000), ("A/B", &sub, 50)],
        &[
            (1, 116, &mails[0]),
            (1, 116 + mails[0].len() as u64, &mails[1]),
            (2, 0, &{
                let mut file = b"2 M1e C65a00000\n".to_vec();
                file.extend_from_slice(&mails[2]);
                file
            }),
        ],
    );
    assert_eq!(out.placed, [(0, 1000), (1, 50), (0, 1001)]);
    assert_eq!((out.redirected, out.copies, out.dangling), (1, 0, 0));
    assert_eq!(map.next_uid, 5);
    assert_eq!(
        map.ext_of(3, "map"),
        Some(map_record(1, 116 + mails[0].len() as u32, mails[1].len() as u32).as_slice())
    );
    assert_eq!(map.ext_of(4, "ref"), Some([1, 0].as_slice()));
    assert_eq!(u32_at(&map.extension("map").unwrap().header, 0), Some(2));
    assert_eq!(folders[0].records.keys().copied().collect::<Vec<_>>(), [1, 1000, 1001]);
    assert_eq!((folders[0].next_uid, folders[1].next_uid), (1002, 51));
    assert_eq!(folders[0].ext_of(1001, "guid"), Some([3; 16].as_slice()));
    assert_eq!(folders[1].ext_of(50, "mdbox"), Some([3, 0, 0, 0, 5, 0, 0, 0].as_slice()));
}

#[test]
fn known_expunged_and_copied_mails_stay_what_they_are() {
    let map = map_log(&[(1, 1, 16, 1), (2, 1, 200, 0), (3, 1, 400, 1)]);
    let inbox = folder_log(&[(1, 1, 0xaa), (7, 1, 0xaa)]);
    let live = test_mail(b"live\n", 0xaa, "INBOX");
    let expunged = test_mail(b"expunged\n", 0xbb, "INBOX");
    let between = test_mail(b"cut\n", 0xcc, "INBOX");
    let ranges: [(u32, u64, &[u8]); 4] =
        [(1, 16, &live), (1, 200, &expunged), (1, 400, &between), (2, 16, &live)];
    let (out, map, folders) = run(&map, &[("INBOX", &inbox, 20)], &ranges);
    // The mail of the delivery that the cut went through is back, with its map entry.
    assert_eq!(out.placed, [(0, 20)]);
    assert_eq!(map_uid_of(&folders[0], 20), 3);
    // The purge's copy has an entry without references; the shared mail's count is raised.
    assert_eq!(out.copies, 1);
    assert_eq!(map_entry(&map, 4).unwrap().1, 0);
    assert_eq!(map_entry(&map, 1).unwrap().1, 2);
    assert_eq!(map_entry(&map, 2).unwrap().1, 0);
    assert!(out.unreferenced.is_empty());
    let map = map_log(&[(1, 1, 16, 1), (2, 1, 200, 0), (3, 1, 400, 1)]);
    let (out, ..) = run(&map, &[("INBOX", &inbox, 20)], &[]);
    assert_eq!(out.unreferenced, [MapEntry { map_uid: 3, file: 1, offset: 400, size: 100 }]);
}

#[test]
fn a_second_run_changes_nothing() {
    let map = map_log(&[(1, 1, 16, 1)]);
    let inbox = folder_log(&[(1, 1, 0xaa)]);
    let mail = test_mail(b"one\n", 1, "INBOX");
    let ranges: [(u32, u64, &[u8]); 1] = [(1, 116, &mail)];
    let (out, ..) = run(&map, &[("INBOX", &inbox, 1000)], &ranges);
    let apply = |log: &[u8], append: &LogAppend| [&log[..append.at], &append.bytes].concat();
    let map = apply(&map, &out.map);
    // Crashed after the map was written.
    let (again, ..) = run(&map, &[("INBOX", &inbox, 1000)], &ranges);
    assert_eq!(again.placed, [(0, 1000)]);
    assert!(again.map.bytes.is_empty());
    // Crashed after everything was written.
    let inbox = apply(&inbox, out.folders[0].as_ref().unwrap());
    let (again, ..) = run(&map, &[("INBOX", &inbox, 1000)], &ranges);
    assert!(again.placed.is_empty());
    assert!(again.map.bytes.is_empty());
    assert!(again.folders[0].as_ref().unwrap().bytes.is_empty());
}

#[test]
fn an_entry_without_its_map_record_is_linked_again() {
    let map = map_log(&[(1, 1, 16, 1)]);
    let inbox = folder_log(&[(1, 1, 0xaa), (2, 99, 1), (3, 98, 5)]);
    let mail = test_mail(b"one\n", 1, "INBOX");
    let (out, map, folders) = run(&map, &[("INBOX", &inbox, 0)], &[(1, 116, &mail)]);
    assert!(out.placed.is_empty());
    assert_eq!(out.dangling, 1);
    assert_eq!(map_uid_of(&folders[0], 2), 2);
    assert_eq!(map_entry(&map, 2).unwrap().1, 1);
}

/// An empty log in place of another: what the folder had must not go to INBOX.
#[test]
fn a_folder_that_was_begun_anew_needs_a_rebuild() {
    let map = map_log(&[(1, 1, 0, 1)]);
    let old = folder_log(&[(1, 1, 7)]);
    let inbox = folder_log(&[]);
    let mut anew = old[..40].to_vec();
    anew[8] = 2;
    let whole = [inbox.as_slice()];
    let recover =
        |logs: &[&[u8]]| {
            let folders = [("INBOX", &whole[..]), ("Archive", logs)].map(|(name, logs)| {
                MdboxFolder { name: name.as_bytes(), snapshot: None, logs, at_least: 0 }
            });
            recover_mdbox(&MdboxInput {
                map_snapshot: None,
                map_logs: &[&map],
                folders: &folders,
                ranges: &[],
                highest_file: 1,
                save_date: 5,
                restore_unreferenced: true,
            })
        };
    assert!(matches!(recover(&[&old, &anew]), Err(RecoverError::NeedsRebuild(_))));
    // The first log of a folder that Dovecot has not set up yet.
    assert!(recover(&[&old[..40]]).is_ok());
}

#[test]
fn what_does_not_fit_needs_a_rebuild() {
    let inbox = folder_log(&[(1, 1, 0xaa)]);
    let logs: [&[u8]; 1] = [&inbox];
    let folders = [MdboxFolder { name: b"INBOX", snapshot: None, logs: &logs, at_least: 5 }];
    let mut input = MdboxInput {
        map_snapshot: None,
        map_logs: &[],
        folders: &folders,
        ranges: &[],
        highest_file: 0,
        save_date: 0,
        restore_unreferenced: true,
    };
    assert!(matches!(recover_mdbox(&input), Err(RecoverError::NeedsRebuild(_))));
    let other = log(43, |t| t.append(&[1]));
    let logs: [&[u8]; 1] = [&other];
    input.map_logs = &logs;
    assert!(matches!(recover_mdbox(&input), Err(RecoverError::NeedsRebuild(_))));
}

proptest::proptest! {
    #[test]
    fn nothing_panics(junk: Vec<u8>, file: u32, offset: u64, flips: Vec<(u16, u8)>) {
        let mut map = map_log(&[(1, 1, 16, 1), (2, 1, 200, 0)]);
        let mut inbox = folder_log(&[(1, 1, 0xaa), (2, 99, 1)]);
        for (at, byte) in &flips {
            let (m, i) = (usize::from(*at) % map.len(), usize::from(*at) % inbox.len());
            map[m] = *byte;
            inbox[i] = *byte;
        }
        let mail = [test_mail(b"one\n", 1, "INBOX"), junk].concat();
        let logs: [&[u8]; 1] = [&inbox];
        let folders = [MdboxFolder { name: b"INBOX", snapshot: None, logs: &logs, at_least: 5 }];
        let _ = recover_mdbox(&MdboxInput {
            map_snapshot: None,
            map_logs: &[&map],
            folders: &folders,
            ranges: &[MdboxRange { file, offset, bytes: &mail }],
            highest_file: 0,
            save_date: 0,
            restore_unreferenced: true,
        });
    }
}
