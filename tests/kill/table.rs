//! What a run of kills came to.

use std::fmt;

/// One round: a load, one or more kills, a recovery, a check.
#[derive(Debug, Clone, Default)]
pub struct Row {
    pub format: &'static str,
    pub store: &'static str,
    pub wiped: bool,
    pub kills: u32,
    /// Mails that a server said it has, and changes it said it made, in this round.
    pub mails: u64,
    pub changes: u64,
    pub lost: usize,
    pub uid_clashes: usize,
    pub uid_validity: usize,
    /// Lines of Dovecot's log that call something corrupted, broken or to be rebuilt.
    pub corrupted: Vec<String>,
    pub flags: usize,
    pub duplicates: usize,
    pub others: usize,
    /// Operations refused while the daemon was alive.
    pub refused: usize,
}

impl Row {
    pub fn bad(&self) -> bool {
        let found = [self.lost, self.uid_clashes, self.uid_validity, self.flags, self.others];
        found.iter().any(|n| *n > 0) || self.duplicates > 0 || !self.corrupted.is_empty()
    }

    fn add(&mut self, other: &Row) {
        self.kills += other.kills;
        self.mails += other.mails;
        self.changes += other.changes;
        self.lost += other.lost;
        self.uid_clashes += other.uid_clashes;
        self.uid_validity += other.uid_validity;
        self.corrupted.extend(other.corrupted.iter().cloned());
        self.flags += other.flags;
        self.duplicates += other.duplicates;
        self.others += other.others;
        self.refused += other.refused;
    }
}

/// Rounds, summed by format, store, and what was left of the local state.
pub struct Table(pub Vec<Row>);

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines: Vec<(Row, usize)> = Vec::new();
        for row in &self.0 {
            let same = |(l, _): &&mut (Row, usize)| {
                (l.format, l.store, l.wiped) == (row.format, row.store, row.wiped)
            };
            match lines.iter_mut().find(same) {
                Some((line, rounds)) => {
                    line.add(row);
                    *rounds += 1;
                }
                None => lines.push((row.clone(), 1)),
            }
        }
        lines.sort_by_key(|(l, _)| (l.store, l.format, l.wiped));
        let mut sum = (Row { format: "all", store: "", ..Row::default() }, 0);
        for (line, rounds) in &lines {
            sum.0.add(line);
            sum.1 += rounds;
        }
        lines.push(sum);
        writeln!(
            f,
            "{:8} {:5} {:6} {:>6} {:>5} {:>6} {:>7} {:>5} {:>5} {:>5} {:>9} {:>5} {:>5} {:>6} {:>7}",
            "format",
            "store",
            "state",
            "rounds",
            "kills",
            "mails",
            "changes",
            "lost",
            "uids",
            "uidv",
            "corrupted",
            "flags",
            "dups",
            "others",
            "refused"
        )?;
        for (line, rounds) in &lines {
            let state = match (line.store, line.wiped) {
                ("", _) => "",
                (_, true) => "wiped",
                (_, false) => "kept",
            };
            writeln!(
                f,
                "{:8} {:5} {:6} {:>6} {:>5} {:>6} {:>7} {:>5} {:>5} {:>5} {:>9} {:>5} {:>5} {:>6} {:>7}",
                line.format,
                line.store,
                state,
                rounds,
                line.kills,
                line.mails,
                line.changes,
                line.lost,
                line.uid_clashes,
                line.uid_validity,
                line.corrupted.len(),
                line.flags,
                line.duplicates,
                line.others,
                line.refused
            )?;
        }
        Ok(())
    }
}
