//! What each record does to the state.

use super::{
    super::{
        bytes::{pad4, u32_at},
        records::{self, ReadIntro, Record, header, kind},
    },
    Extension, IndexState, KEYWORDS, MAX_EXT_HEADER, MAX_EXT_HEADERS, MAX_EXTENSIONS, MailRecord,
};

/// The extension that extension records mean.
#[derive(Debug, Clone, Copy)]
struct Current {
    number: u16,
    record_size: u16,
    /// Introduced with another reset id: its updates are for data that is gone.
    ignore: bool,
}

/// Applies records to a state.
pub(super) struct Player<'s> {
    state: &'s mut IndexState,
    current: Option<Current>,
}

impl<'s> Player<'s> {
    pub(super) fn new(state: &'s mut IndexState) -> Player<'s> {
        Player { state, current: None }
    }

    pub(super) fn play(&mut self, record: &Record<'_>) {
        let body = record.body;
        match record.kind {
            kind::APPEND => self.append(body),
            kind::EXPUNGE if record.external => {
                for (first, last) in records::uid_ranges(body) {
                    self.each(first, last, None);
                }
            }
            kind::EXPUNGE_GUID if record.external => {
                for expunge in body.chunks_exact(20) {
                    self.state.records.remove(&u32_at(expunge, 0).unwrap_or_default());
                }
            }
            kind::FLAG_UPDATE => {
                for update in body.chunks_exact(12) {
                    let (first, last) =
                        (u32_at(update, 0).unwrap_or(1), u32_at(update, 4).unwrap_or(0));
                    let (add, remove) = (update[8], update[9]);
                    self.each(first, last, Some(&|r| r.flags = r.flags & !remove | add));
                }
            }
            kind::HEADER_UPDATE => self.header_update(body),
            kind::EXT_INTRO => {
                records::intros(body).for_each(|intro| self.current = self.intro(&intro));
            }
            kind::EXT_RESET => self.ext_reset(body),
            kind::EXT_HDR_UPDATE => self.ext_header(records::patches(body, 2)),
            kind::EXT_HDR_UPDATE32 => self.ext_header(records::patches(body, 4)),
            kind::EXT_REC_UPDATE => self.ext_records(body),
            kind::EXT_ATOMIC_INC => self.ext_increments(body),
            kind::KEYWORD_UPDATE => self.keyword_update(body),
            kind::KEYWORD_RESET => {
                for (first, last) in records::uid_ranges(body) {
                    self.each(first, last, Some(&|r| r.keywords.clear()));
                }
            }
            _ => {}
        }
    }

    /// Does something to the records of a range of UIDs; `None` removes them.
    fn each(&mut self, first: u32, last: u32, change: Option<&dyn Fn(&mut MailRecord)>) {
        if first == 0 || first > last {
            return;
        }
        match change {
            Some(change) => self.state.records.range_mut(first..=last).for_each(|(_, r)| change(r)),
            None => {
                let uids: Vec<u32> =
                    self.state.records.range(first..=last).map(|(uid, _)| *uid).collect();
                for uid in uids {
                    self.state.records.remove(&uid);
                }
            }
        }
    }

    fn append(&mut self, body: &[u8]) {
        for mail in body.chunks_exact(8) {
            let uid = u32_at(mail, 0).unwrap_or_default();
            if uid < self.state.next_uid || uid == u32::MAX {
                continue;
            }
            self.state.records.insert(uid, MailRecord { flags: mail[4], ..MailRecord::default() });
            self.state.next_uid = uid + 1;
        }
    }

    fn header_update(&mut self, body: &[u8]) {
        for (offset, data) in records::header_updates(body) {
            let field = |wanted: u16| {
                usize::from(wanted).checked_sub(offset).and_then(|at| u32_at(data, at))
            };
            if let Some(flags) = field(header::FLAGS) {
                self.state.flags = flags;
            }
            if let Some(uid_validity) = field(header::UID_VALIDITY) {
                self.state.uid_validity = uid_validity;
            }
            if let Some(next_uid) = field(header::NEXT_UID) {
                self.state.next_uid = self.state.next_uid.max(next_uid);
            }
        }
    }

    fn intro(&mut self, intro: &ReadIntro<'_>) -> Option<Current> {
        let known = match intro.ext_id {
            Some(id) => Some(
                u16::try_from(id).ok().filter(|n| usize::from(*n) < self.state.extensions.len())?,
            ),
            None => self.state.extension_number(std::str::from_utf8(intro.name).ok()?),
        };
        let total: usize = self.state.extensions.iter().map(|e| e.header.len()).sum();
        if intro.hdr_size > MAX_EXT_HEADER
            || total.saturating_add(intro.hdr_size as usize) > MAX_EXT_HEADERS
        {
            return None;
        }
        let Some(number) = known else {
            let name = std::str::from_utf8(intro.name).ok().filter(|n| *n != KEYWORDS)?;
            let number = self.register(name, intro)?;
            return Some(Current { number, record_size: intro.record_size, ignore: false });
        };
        let ext = self.state.extensions.get_mut(usize::from(number))?;
        let ignore = ext.reset_id != intro.reset_id || ext.name == KEYWORDS;
        if !ignore {
            let size = intro.hdr_size as usize;
            if size > ext.header.len() || !intro.no_shrink {
                ext.header.resize(size, 0);
            }
            if intro.record_align > ext.record_align || !intro.no_shrink {
                ext.record_align = intro.record_align;
            }
            if intro.record_size > ext.record_size || !intro.no_shrink {
                ext.record_size = intro.record_size;
            }
        }
        Some(Current { number, record_size: intro.record_size, ignore })
    }

    fn register(&mut self, name: &str, intro: &ReadIntro<'_>) -> Option<u16> {
        if self.state.extensions.len() >= MAX_EXTENSIONS || name.is_empty() {
            return None;
        }
        self.state.extensions.push(Extension {
            name: name.to_owned(),
            reset_id: intro.reset_id,
            header: vec![0; intro.hdr_size as usize],
            record_size: intro.record_size,
            record_align: intro.record_align,
        });
        Some(self.state.extensions.len() as u16 - 1)
    }

    fn ext_reset(&mut self, body: &[u8]) {
        let (Some(current), Some(reset_id)) = (self.current, u32_at(body, 0)) else { return };
        let Some(ext) = self.state.extensions.get_mut(usize::from(current.number)) else { return };
        ext.reset_id = reset_id;
        if body.get(4).is_none_or(|preserve| *preserve == 0) {
            ext.header.fill(0);
            for record in self.state.records.values_mut() {
                record.ext.retain(|(n, _)| *n != current.number);
            }
        }
    }

    fn ext_header<'a>(&mut self, patches: impl Iterator<Item = (usize, &'a [u8])>) {
        let Some(current) = self.current.filter(|c| !c.ignore) else { return };
        let Some(ext) = self.state.extensions.get_mut(usize::from(current.number)) else { return };
        for (offset, data) in patches {
            let end = offset.saturating_add(data.len());
            if let Some(place) = ext.header.get_mut(offset..end) {
                place.copy_from_slice(data);
            }
        }
    }

    fn ext_records(&mut self, body: &[u8]) {
        let Some(current) = self.current.filter(|c| !c.ignore) else { return };
        let size = usize::from(current.record_size);
        for update in body.chunks_exact(pad4(4 + size)) {
            let uid = u32_at(update, 0).unwrap_or_default();
            if let Some(record) = self.state.records.get_mut(&uid) {
                *record.ext_mut(current.number) = update[4..4 + size].to_vec();
            }
        }
    }

    fn ext_increments(&mut self, body: &[u8]) {
        let Some(current) = self.current.filter(|c| !c.ignore) else { return };
        let size = usize::from(current.record_size);
        if !matches!(size, 1 | 2 | 4 | 8) {
            return;
        }
        for increment in body.chunks_exact(8) {
            let uid = u32_at(increment, 0).unwrap_or_default();
            let diff = u32_at(increment, 4).unwrap_or_default() as i32;
            let Some(record) = self.state.records.get_mut(&uid) else { continue };
            let data = record.ext_mut(current.number);
            data.resize(size, 0);
            let mut number = [0; 8];
            number[..size].copy_from_slice(data);
            let max = u64::MAX >> (64 - 8 * size);
            let sum = u64::from_le_bytes(number).checked_add_signed(i64::from(diff));
            // What would leave the number's range Dovecot refuses, too.
            if let Some(sum) = sum.filter(|sum| *sum <= max) {
                data.copy_from_slice(&sum.to_le_bytes()[..size]);
            }
        }
    }

    fn keyword_update(&mut self, body: &[u8]) {
        let Some((how, name, ranges)) = records::keyword_update(body) else { return };
        if name.is_empty() {
            return;
        }
        let name = String::from_utf8_lossy(name);
        let number = match self.state.keywords.iter().position(|k| *k == name) {
            Some(number) => number as u16,
            None => {
                // Dovecot makes the extension at the first keyword, which numbers those after it.
                if self.state.extension_number(KEYWORDS).is_none() {
                    let intro = ReadIntro {
                        ext_id: None,
                        name: KEYWORDS.as_bytes(),
                        reset_id: 0,
                        hdr_size: 0,
                        record_size: 1,
                        record_align: 1,
                        no_shrink: true,
                    };
                    self.register(KEYWORDS, &intro);
                }
                if self.state.keywords.len() >= usize::from(u16::MAX) {
                    return;
                }
                self.state.keywords.push(name.into_owned());
                self.state.keywords.len() as u16 - 1
            }
        };
        for (first, last) in records::uid_ranges(ranges) {
            self.each(
                first,
                last,
                Some(&|record| {
                    if how == 2 {
                        record.keywords.clear();
                    }
                    record.keywords.retain(|k| *k != number);
                    if how != 1 {
                        record.keywords.push(number);
                    }
                }),
            );
        }
    }
}
