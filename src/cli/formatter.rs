//! Tables in doveadm's formats, which scripts of admins read.

use super::exit::{Code, Failure};
use clap::ValueEnum;
use serde_json::{Map, Value};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// One line a record: key=value key=value.
    Flow,
    /// One line a value, records separated by form feeds.
    Pager,
    /// A header and lines, with tabs between the values.
    Tab,
    /// A header and aligned columns.
    Table,
    /// An array of objects.
    Json,
}

/// Columns and rows; each row has as many values as there are columns.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Value>>,
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// As Dovecot escapes what must not break a line of tabs.
fn tab_escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\0' => out.push_str("\u{1}0"),
            '\u{1}' => out.push_str("\u{1}1"),
            '\t' => out.push_str("\u{1}t"),
            '\r' => out.push_str("\u{1}r"),
            '\n' => out.push_str("\u{1}n"),
            c => out.push(c),
        }
    }
    out
}

/// Control characters would let a user's name draw on the admin's terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl Table {
    pub(super) fn new<const N: usize>(columns: [&str; N]) -> Table {
        Table { columns: columns.map(str::to_owned).to_vec(), rows: Vec::new() }
    }

    pub(super) fn text(&self, format: Format) -> Result<String, Failure> {
        Ok(match format {
            Format::Flow => self.lines(|pairs| {
                let all: Vec<_> = pairs.map(|(k, v)| format!("{k}={}", printable(&v))).collect();
                all.join(" ") + "\n"
            }),
            Format::Pager => {
                let records: Vec<String> = self.rows.iter().map(|row| self.page(row)).collect();
                records.join("\u{c}\n")
            }
            Format::Tab => {
                let mut out = self.columns.join("\t") + "\n";
                for row in &self.rows {
                    let all: Vec<_> = row.iter().map(|v| tab_escaped(&plain(v))).collect();
                    out.push_str(&all.join("\t"));
                    out.push('\n');
                }
                out
            }
            Format::Table => self.aligned(),
            Format::Json => {
                let object = |row: &Vec<Value>| {
                    let pairs = self.columns.iter().cloned().zip(row.iter().cloned());
                    Value::Object(pairs.collect::<Map<_, _>>())
                };
                let all = Value::Array(self.rows.iter().map(object).collect());
                let text = serde_json::to_string_pretty(&all)
                    .map_err(|e| Failure::new(Code::Software, e.to_string()))?;
                text + "\n"
            }
        })
    }

    fn lines(&self, line: impl Fn(&mut dyn Iterator<Item = (&str, String)>) -> String) -> String {
        let columns = || self.columns.iter().map(String::as_str);
        self.rows.iter().map(|row| line(&mut columns().zip(row.iter().map(plain)))).collect()
    }

    fn page(&self, row: &[Value]) -> String {
        let pairs = self.columns.iter().zip(row);
        pairs.map(|(k, v)| format!("{k}: {}\n", printable(&plain(v)))).collect()
    }

    fn aligned(&self) -> String {
        let shown = |row: &Vec<Value>| -> Vec<String> {
            let text = |v: &Value| if v.is_null() { "-".to_owned() } else { printable(&plain(v)) };
            row.iter().map(text).collect()
        };
        let rows: Vec<Vec<String>> = self.rows.iter().map(shown).collect();
        let width = |at: usize| {
            let cells = rows.iter().map(|row| row.get(at).map_or(0, |c| c.chars().count()));
            cells.chain([self.columns[at].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let right = |at: usize| {
            let mut values =
                self.rows.iter().map(|row| &row[at]).filter(|v| !v.is_null()).peekable();
            values.peek().is_some() && values.all(Value::is_number)
        };
        let mut out = String::new();
        for row in std::iter::once(&self.columns).chain(&rows) {
            let mut line = String::new();
            for (at, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[at].saturating_sub(cell.chars().count()));
                let (before, after) =
                    if right(at) { (pad.as_str(), "") } else { ("", pad.as_str()) };
                line.push_str(&format!("{before}{cell}{after} "));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["username", "bytes-used", "last-service"]);
        table.rows.push(vec!["a@x".into(), 5.into(), Value::Null]);
        table.rows.push(vec!["b\t\u{1b}c".into(), 12345678901_u64.into(), "imap".into()]);
        table
    }

    #[test]
    fn each_format_looks_as_scripts_expect() {
        let t = table();
        assert_eq!(
            t.text(Format::Flow).unwrap(),
            "username=a@x bytes-used=5 last-service=\n\
             username=b??c bytes-used=12345678901 last-service=imap\n"
        );
        assert_eq!(
            t.text(Format::Pager).unwrap(),
            "username: a@x\nbytes-used: 5\nlast-service: \n\u{c}\n\
             username: b??c\nbytes-used: 12345678901\nlast-service: imap\n"
        );
        assert_eq!(
            t.text(Format::Tab).unwrap(),
            "username\tbytes-used\tlast-service\na@x\t5\t\nb\u{1}t\u{1b}c\t12345678901\timap\n"
        );
        assert_eq!(
            t.text(Format::Table).unwrap(),
            "username  bytes-used last-service\n\
             a@x                5 -\n\
             b??c     12345678901 imap\n"
        );
        let json: Value = serde_json::from_str(&t.text(Format::Json).unwrap()).unwrap();
        assert_eq!(json[1]["bytes-used"], 12345678901_u64);
        assert_eq!(json[0]["last-service"], Value::Null);
    }

    #[test]
    fn nothing_is_a_header_or_nothing() {
        let t = Table::new(["a", "b"]);
        assert_eq!(t.text(Format::Tab).unwrap(), "a\tb\n");
        assert_eq!(t.text(Format::Table).unwrap(), "a b\n");
        assert_eq!(t.text(Format::Flow).unwrap(), "");
        assert_eq!(t.text(Format::Pager).unwrap(), "");
        assert_eq!(t.text(Format::Json).unwrap(), "[]\n");
    }
}
