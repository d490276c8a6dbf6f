//! The dropped list: objects that no listing names any more, and since when.
//!
//! A table (see [`super::bundle`]) of rows, applied one after the other. It is what may be
//! deleted once: an object goes on it by the swap that stops naming it, is marked as doomed by
//! another one when its time is over, and only then deleted. What is doomed is never named
//! again; what is not may be, and is taken off the list by the swap that names it.

use super::bundle::{table, take_table};
use super::escape::clip;
use super::{FormatError, ObjectId, key::KeyTail};
use std::collections::BTreeMap;

pub(super) const DROPPED: &str = "@dropped";
const DOOMED: &str = "doomed";
const OUT: &str = "out";

/// An object that nothing names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Dropped {
    Mail(KeyTail),
    Bundle(ObjectId),
    File(ObjectId),
}

/// What tells dropped objects apart, in the order in which lists have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DroppedId {
    Mail(ObjectId),
    Bundle(ObjectId),
    File(ObjectId),
}

impl Dropped {
    pub fn id(&self) -> DroppedId {
        match self {
            Dropped::Mail(tail) => DroppedId::Mail(tail.id()),
            Dropped::Bundle(id) => DroppedId::Bundle(*id),
            Dropped::File(id) => DroppedId::File(*id),
        }
    }

    fn text(&self) -> String {
        match self {
            Dropped::Mail(tail) => tail.to_string(),
            Dropped::Bundle(id) => format!("bundle/{id}.tar.zst"),
            Dropped::File(id) => format!("file/{id}"),
        }
    }

    fn parse(text: &str) -> Option<Dropped> {
        Some(if let Some(id) = text.strip_prefix("bundle/") {
            Dropped::Bundle(id.strip_suffix(".tar.zst")?.parse().ok()?)
        } else if let Some(id) = text.strip_prefix("file/") {
            Dropped::File(id.parse().ok()?)
        } else {
            Dropped::Mail(KeyTail::parse(text).ok()?)
        })
    }
}

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DroppedRow {
    /// Nothing names the object since `when` (seconds since 1970 by the store's clock).
    In { when: i64, object: Dropped, doomed: bool },
    /// It is off the list: it has a name again, or is deleted.
    Out(Dropped),
}

impl DroppedRow {
    /// An object that was dropped and may still be named again.
    pub fn since(when: i64, object: Dropped) -> DroppedRow {
        DroppedRow::In { when, object, doomed: false }
    }

    fn text(&self) -> String {
        match self {
            DroppedRow::In { when, object, doomed: false } => format!("{when}\t{}", object.text()),
            DroppedRow::In { when, object, doomed: true } => {
                format!("{when}\t{}\t{DOOMED}", object.text())
            }
            DroppedRow::Out(object) => format!("{OUT}\t{}", object.text()),
        }
    }

    fn parse(line: &str) -> Option<DroppedRow> {
        let (first, rest) = line.split_once('\t')?;
        if first == OUT {
            return Some(DroppedRow::Out(Dropped::parse(rest)?));
        }
        let when: i64 = first.parse().ok().filter(|n: &i64| n.to_string() == first)?;
        let (object, doomed) = match rest.split_once('\t') {
            Some((object, DOOMED)) => (object, true),
            Some(_) => return None,
            None => (rest, false),
        };
        Some(DroppedRow::In { when, object: Dropped::parse(object)?, doomed })
    }
}

/// Rows as a table `@dropped`.
pub fn encode_dropped(rows: &[DroppedRow]) -> Vec<u8> {
    table(DROPPED, rows.iter().map(DroppedRow::text))
}

/// Reads what [`encode_dropped`] wrote.
///
/// # Errors
/// As [`super::bundle::decode_table`].
pub fn decode_dropped(bytes: &[u8], limit: u64) -> Result<Vec<DroppedRow>, FormatError> {
    let bad = |line| FormatError::malformed("dropped", clip(line));
    let lines = take_table(bytes, limit, &[super::bundle::TABLE, DROPPED])?;
    lines.iter().map(|line| DroppedRow::parse(line).ok_or_else(|| bad(line))).collect()
}

/// An entry of a [`DroppedList`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DroppedAt {
    pub object: Dropped,
    /// Since when nothing names it, seconds since 1970 by the store's clock.
    pub when: i64,
    /// It may be deleted at any moment, or is already: never to be named again.
    pub doomed: bool,
}

/// What the rows come to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DroppedList(BTreeMap<DroppedId, DroppedAt>);

impl DroppedList {
    /// Takes a further row. Of two times the later counts, and what is doomed stays so.
    pub fn apply(&mut self, row: DroppedRow) {
        match row {
            DroppedRow::In { when, object, doomed } => {
                let id = object.id();
                let at = self.0.entry(id).or_insert(DroppedAt { object, when, doomed });
                at.when = at.when.max(when);
                at.doomed |= doomed;
            }
            DroppedRow::Out(object) => _ = self.0.remove(&object.id()),
        }
    }

    pub fn get(&self, id: DroppedId) -> Option<&DroppedAt> {
        self.0.get(&id)
    }

    /// A dropped mail by its object's id.
    pub fn mail(&self, id: ObjectId) -> Option<&DroppedAt> {
        self.get(DroppedId::Mail(id))
    }

    pub fn iter(&self) -> impl Iterator<Item = &DroppedAt> {
        self.0.values()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut DroppedAt> {
        self.0.values_mut()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The list as rows of a base.
    pub fn rows(&self) -> Vec<DroppedRow> {
        let row = |at: &DroppedAt| DroppedRow::In {
            when: at.when,
            object: at.object.clone(),
            doomed: at.doomed,
        };
        self.iter().map(row).collect()
    }
}

impl Extend<DroppedRow> for DroppedList {
    fn extend<T: IntoIterator<Item = DroppedRow>>(&mut self, rows: T) {
        rows.into_iter().for_each(|row| self.apply(row));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Epoch;

    fn bundle(counter: u64) -> Dropped {
        Dropped::Bundle(ObjectId { epoch: Epoch(7), counter })
    }

    #[test]
    fn rows_are_applied_in_their_order() {
        let mut list = DroppedList::default();
        list.extend([
            DroppedRow::since(10, bundle(1)),
            DroppedRow::since(10, bundle(2)),
            DroppedRow::In { when: 10, object: bundle(2), doomed: true },
            DroppedRow::since(10, bundle(3)),
            DroppedRow::Out(bundle(3)),
            DroppedRow::since(12, bundle(1)),
            DroppedRow::since(11, bundle(2)),
            DroppedRow::Out(bundle(4)),
        ]);
        let rows = list.rows();
        assert_eq!(
            rows,
            [
                DroppedRow::since(12, bundle(1)),
                DroppedRow::In { when: 11, object: bundle(2), doomed: true },
            ]
        );
        let frame = encode_dropped(&rows);
        assert_eq!(decode_dropped(&frame, 1 << 20).unwrap(), rows);
    }

    #[test]
    fn other_rows_are_refused() {
        let object = "bundle/00000007-000000000001.tar.zst";
        for line in [
            format!("01\t{object}"),
            format!("1\t{object}\t"),
            format!("1\t{object}\tdoomed\t"),
            format!("out\t{object}\tdoomed"),
            format!("1\t{object}\tother"),
            "out".into(),
            "out\t".into(),
            object.into(),
        ] {
            assert_eq!(DroppedRow::parse(&line), None, "{line}");
        }
    }
}
