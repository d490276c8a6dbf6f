//! Records that a recovery appends to a `dovecot.index.log`.
//!
//! After a recovery by listing, mails exist that their folder's index does not know, and UIDs
//! may have been given out that the index has forgotten. Two things must then be true before
//! the first process opens the folder: next-UID is at or above the folder's ceiling (I2), and
//! the mails show. Both are done by appending to the newest log what Dovecot itself would have
//! written, which needs no Dovecot and leaves flags, keywords and UIDVALIDITY alone.
//!
//! Rejected: `doveadm force-resync` or Dovecot's own rebuild (needs a process per folder,
//! refuses one delivery with a 451, loses flags newer than its backup, and in mdbox a delivery
//! that comes first reuses UIDs); editing `dovecot.index` (it is replaced, never edited, and
//! readers map it).
//!
//! All records are external: they state facts, so no sync has anything left to do. A log may
//! end in a torn write; what is appended replaces it ([`LogAppend::at`]). A crash between
//! truncation and append leaves a valid older log, and the recovery is simply done again: UIDs
//! that the log does not name yet were shown to nobody.

use super::{
    bytes::u32_at,
    records::{self, LogError, LogHeader, Records, header, kind, whole_records_len},
    replay::{IndexState, ReplayError},
    transaction::Transaction,
};

/// Dovecot refuses UIDs near the top of their range; nothing is given out above this.
const MAX_UID: u32 = u32::MAX - 2;

/// Bytes that belong at the end of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogAppend {
    /// Where they belong. What the file holds beyond is a torn write: truncate it first.
    pub at: usize,
    /// May be empty: then nothing is to be written.
    pub bytes: Vec<u8>,
}

/// Why a log cannot be appended to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    #[error(transparent)]
    Index(#[from] ReplayError),
    /// The folder was never set up: there is no UID to protect, and Dovecot will set it up.
    #[error("the index has no UIDVALIDITY yet")]
    NoUidValidity,
    /// The mail's number is not free: it must get one at or above the ceiling.
    #[error("UID {0} is below next-UID {1} and belongs to no live mail")]
    UidTaken(u32, u32),
    #[error("there is no UID left")]
    UidsExhausted,
    /// Only a rebuild by Dovecot can help; see [`mark_fsckd`].
    #[error("the storage needs a rebuild: {0}")]
    NeedsRebuild(String),
}

impl From<LogError> for RecoverError {
    fn from(error: LogError) -> RecoverError {
        RecoverError::Index(ReplayError::Log(error))
    }
}

/// Raises next-UID to at least `at_least` (a value at or below it changes nothing for Dovecot,
/// which ignores lower ones). `log` is the newest log file; the state is not needed.
///
/// # Errors
/// [`RecoverError::NoUidValidity`] when the log is the first of its index and sets none:
/// Dovecot calls next-UID without UIDVALIDITY damage.
pub fn raise_next_uid(log: &[u8], at_least: u32) -> Result<LogAppend, RecoverError> {
    let log_header = LogHeader::parse(log)?;
    if at_least > MAX_UID {
        return Err(RecoverError::UidsExhausted);
    }
    if log_header.prev_file_seq == 0 && !sets_uid_validity(log, &log_header) {
        return Err(RecoverError::NoUidValidity);
    }
    Ok(one_header_update(log, header::NEXT_UID, at_least))
}

fn sets_uid_validity(log: &[u8], log_header: &LogHeader) -> bool {
    let wanted = usize::from(header::UID_VALIDITY);
    Records::new(log, log_header.hdr_size).filter(|r| r.kind == kind::HEADER_UPDATE).any(|r| {
        records::header_updates(r.body).any(|(offset, data)| {
            wanted.checked_sub(offset).and_then(|at| u32_at(data, at)).is_some_and(|v| v != 0)
        })
    })
}

/// Makes Dovecot rebuild the folder's index (mdbox: the whole storage) when it next syncs the
/// folder: the last resort when the exact ways fail. `flags` are the index header's flags as
/// last known ([`IndexState::flags`], or 0).
///
/// With mdbox, mark every folder (one rebuild clears all marks), not the map: Dovecot looks at
/// the map's flags only once the map is open, which a sync does not wait for. A delivery that
/// comes first is accepted and does not rebuild; so raise every next-UID as well.
pub fn mark_fsckd(log: &[u8], flags: u32) -> Result<LogAppend, RecoverError> {
    LogHeader::parse(log)?;
    Ok(one_header_update(log, header::FLAGS, flags | header::FLAG_FSCKD))
}

/// The first log of a folder's index that makes Dovecot look for the mails that lie there, as
/// [`mark_fsckd`] does: without an index it takes a folder for a new one, and for empty. `now` is
/// in seconds since 1970.
pub fn first_log(now: u32) -> Vec<u8> {
    // Version 1.3, 40 bytes, little endian; the index is called by its time, as Dovecot does.
    let mut log = vec![1, 3, 40, 0];
    for field in [now, 1, 0, 0, now, 0, 0, 1, 0] {
        log.extend_from_slice(&u32::to_le_bytes(field));
    }
    let mut update = Transaction::new();
    update.header_update(header::FLAGS, header::FLAG_FSCKD);
    log.extend(update.finish());
    log
}

fn one_header_update(log: &[u8], offset: u16, value: u32) -> LogAppend {
    let mut update = Transaction::new();
    update.header_update(offset, value);
    LogAppend { at: whole_records_len(log), bytes: update.finish() }
}

/// Makes the files `u.<uid>` show as mails, without flags, and raises next-UID to `at_least`.
///
/// `uids` are numbers of files that exist; those that the index knows are passed over. The
/// state is that of the folder up to its newest log, where the bytes belong.
///
/// # Errors
/// [`RecoverError::UidTaken`] for a number below next-UID that the index does not know: it may
/// have been another mail's. Give the file a number at or above the ceiling.
pub fn append_sdbox(
    state: &IndexState,
    uids: &[u32],
    at_least: u32,
) -> Result<LogAppend, RecoverError> {
    correct_sdbox(state, &[], uids, at_least)
}

/// The same, and mails whose files are `gone` do not show any more.
///
/// # Errors
/// As [`append_sdbox`].
pub fn correct_sdbox(
    state: &IndexState,
    gone: &[u32],
    uids: &[u32],
    at_least: u32,
) -> Result<LogAppend, RecoverError> {
    let mut new: Vec<u32> =
        uids.iter().copied().filter(|uid| !state.records.contains_key(uid)).collect();
    new.sort_unstable();
    new.dedup();
    if let Some(low) = new.first().filter(|uid| **uid < state.next_uid) {
        return Err(RecoverError::UidTaken(*low, state.next_uid));
    }
    let gone: Vec<u32> =
        gone.iter().copied().filter(|uid| state.records.contains_key(uid)).collect();
    let mut transaction = Transaction::new();
    transaction.expunge(&gone);
    append_mails(&mut transaction, state, &new, at_least)?;
    Ok(LogAppend { at: state.log_end.1, bytes: transaction.finish() })
}

/// Appends of `uids` (ascending, at or above next-UID) and next-UID at or above `at_least`.
pub(super) fn append_mails(
    transaction: &mut Transaction,
    state: &IndexState,
    uids: &[u32],
    at_least: u32,
) -> Result<(), RecoverError> {
    if state.uid_validity == 0 {
        return Err(RecoverError::NoUidValidity);
    }
    let next = uids.last().map_or(state.next_uid, |last| last.saturating_add(1));
    if next > MAX_UID || at_least > MAX_UID {
        return Err(RecoverError::UidsExhausted);
    }
    transaction.append(uids);
    if at_least > next {
        transaction.header_update(header::NEXT_UID, at_least);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::replay::replay, *};

    fn log(prev: u32, validity: u32) -> Vec<u8> {
        let mut out = vec![1, 3, 40, 0];
        for n in [77u32, 1, prev, 0, 0, 0, 0, 1, 0] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        let mut t = Transaction::new();
        if validity != 0 {
            t.header_update(header::UID_VALIDITY, validity);
            t.append(&[1, 2, 3]);
        }
        out.extend(t.finish());
        out
    }

    fn apply(mut log: Vec<u8>, append: &LogAppend) -> Vec<u8> {
        log.truncate(append.at);
        log.extend_from_slice(&append.bytes);
        log
    }

    #[test]
    fn next_uid_is_raised_past_a_torn_end() {
        let mut torn = log(0, 9);
        let whole = torn.len();
        torn.extend_from_slice(&[0x80, 0x80, 0x80]);
        let append = raise_next_uid(&torn, 1000).unwrap();
        assert_eq!((append.at, append.bytes.len()), (whole, 16));
        let state = replay(None, &[&apply(torn, &append)]).unwrap();
        assert_eq!((state.next_uid, state.uid_validity, state.records.len()), (1000, 9, 3));
        assert_eq!(state.log_tail, state.log_end.1);
    }

    #[test]
    fn a_folder_never_set_up_is_left_alone() {
        assert_eq!(raise_next_uid(&log(0, 0), 1000), Err(RecoverError::NoUidValidity));
        assert!(raise_next_uid(&log(1, 0), 1000).is_ok());
        assert_eq!(raise_next_uid(&log(0, 9), u32::MAX), Err(RecoverError::UidsExhausted));
        assert!(raise_next_uid(&[], 5).is_err());
    }

    #[test]
    fn sdbox_files_become_mails_once() {
        let old = log(0, 9);
        let state = replay(None, &[&old]).unwrap();
        let append = append_sdbox(&state, &[1006, 2, 1005], 1010).unwrap();
        let new = apply(old, &append);
        let state = replay(None, &[&new]).unwrap();
        assert_eq!(state.records.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 1005, 1006]);
        assert_eq!(state.next_uid, 1010);
        assert!(append_sdbox(&state, &[1005, 1006], 1010).unwrap().bytes.is_empty());
        assert_eq!(append_sdbox(&state, &[1007], 0), Err(RecoverError::UidTaken(1007, 1010)));
    }

    #[test]
    fn sdbox_mails_whose_files_are_gone_are_expunged() {
        let old = log(0, 9);
        let state = replay(None, &[&old]).unwrap();
        let append = correct_sdbox(&state, &[2, 7], &[1005], 0).unwrap();
        let state = replay(None, &[&apply(old, &append)]).unwrap();
        assert_eq!(state.records.keys().copied().collect::<Vec<_>>(), [1, 3, 1005]);
        // Nothing is left for a sync to do.
        assert_eq!(state.log_tail, state.log_end.1);
        assert!(correct_sdbox(&state, &[2], &[], 0).unwrap().bytes.is_empty());
    }

    #[test]
    fn a_first_log_asks_for_a_rebuild() {
        let state = replay(None, &[&first_log(1_700_000_000)]).unwrap();
        assert_eq!(state.flags, header::FLAG_FSCKD);
        assert_eq!((state.uid_validity, state.records.len()), (0, 0));
    }

    #[test]
    fn the_flag_for_a_rebuild_keeps_the_others() {
        let old = log(0, 9);
        let append = mark_fsckd(&old, 2).unwrap();
        assert_eq!(replay(None, &[&apply(old, &append)]).unwrap().flags, 6);
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(data: Vec<u8>, at_least: u32) {
            let _ = raise_next_uid(&data, at_least);
            let mut whole = log(0, 9);
            whole.extend_from_slice(&data);
            let append = raise_next_uid(&whole, at_least.min(MAX_UID)).unwrap();
            let after = replay(None, &[&apply(whole, &append)]).unwrap();
            proptest::prop_assert!(after.next_uid >= at_least.min(MAX_UID));
        }
    }
}
