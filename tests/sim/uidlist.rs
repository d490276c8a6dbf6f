//! The simulated server's uidlist.

use std::collections::BTreeMap;

/// `dovecot-uidlist`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UidList {
    pub validity: u32,
    pub next: u32,
    pub guid: String,
    pub mails: BTreeMap<u32, String>,
    /// It ends in a line that was not written whole.
    pub torn: bool,
}

impl UidList {
    pub fn parse(content: &[u8]) -> Option<UidList> {
        let text = String::from_utf8_lossy(content);
        let mut lines = text.split_inclusive('\n').filter_map(|l| l.strip_suffix('\n'));
        let mut list = UidList::default();
        let mut fields = lines.next()?.split(' ');
        if fields.next() != Some("3") {
            return None;
        }
        for field in fields {
            match field.split_at_checked(1)? {
                ("V", v) => list.validity = v.parse().ok()?,
                ("N", n) => list.next = n.parse().ok()?,
                ("G", guid) => list.guid = guid.to_string(),
                _ => {}
            }
        }
        for line in lines {
            let (uid, name) = line.split_once(" :")?;
            list.mails.insert(uid.parse().ok()?, name.to_string());
        }
        let last = list.mails.keys().next_back().copied().unwrap_or(0);
        list.next = list.next.max(last.saturating_add(1));
        list.torn = !text.ends_with('\n');
        (list.validity > 0).then_some(list)
    }

    pub fn write(&self) -> Vec<u8> {
        let mut out = format!("3 V{} N{} G{}\n", self.validity, self.next, self.guid);
        for (uid, name) in &self.mails {
            out.push_str(&format!("{uid} :{name}\n"));
        }
        out.into_bytes()
    }
}
