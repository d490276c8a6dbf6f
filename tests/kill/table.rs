//! What a run of kills came to.

use std::collections::BTreeMap;
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
    /// Differences in mdbox after Dovecot rebuilt a storage, as it does after every crash of its
    /// own, on any file system.
    pub rebuilt: usize,
    /// Operations refused while the daemon was alive, and what Dovecot's log says of that time.
    pub refused: Vec<String>,
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
        self.rebuilt += other.rebuilt;
        self.refused.extend(other.refused.iter().cloned());
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
        let heads = [
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
            "rebuilt",
            "refused",
        ];
        writeln!(f, "{}", heads.map(|head| format!("{head:>9}")).concat())?;
        for (line, rounds) in &lines {
            let state = match (line.store, line.wiped) {
                ("", _) => "",
                (_, true) => "wiped",
                (_, false) => "kept",
            };
            let numbers = [
                *rounds as u64,
                line.kills.into(),
                line.mails,
                line.changes,
                line.lost as u64,
                line.uid_clashes as u64,
                line.uid_validity as u64,
                line.corrupted.len() as u64,
                line.flags as u64,
                line.duplicates as u64,
                line.others as u64,
                line.rebuilt as u64,
                line.refused.len() as u64,
            ];
            let names = [line.format, line.store, state].map(|name| format!("{name:>9}"));
            let numbers = numbers.map(|number| format!("{number:>9}"));
            writeln!(f, "{}{}", names.concat(), numbers.concat())?;
        }
        let mut refused: BTreeMap<String, u32> = BTreeMap::new();
        for text in self.0.iter().flat_map(|row| &row.refused) {
            // Lines of a log begin with their time and who wrote them.
            let text = text.split_once(">: ").map_or(text.as_str(), |(_, text)| text);
            *refused.entry(text.chars().filter(|c| !c.is_ascii_digit()).collect()).or_default() +=
                1;
        }
        refused.iter().try_for_each(|(text, times)| writeln!(f, "refused {times} times: {text}"))
    }
}
