//! Reading, changing and printing the configuration.

use super::Config;
use super::keys::{KEYS, Key, Kind, SECTIONS};
use std::fmt::Write as _;
use std::path::Path;
use toml::{Table, Value};

/// A configuration that cannot be used. One line that says where and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// What a secret is shown as.
const MASK: &str = "(hidden)";

impl Config {
    /// Reads a file. Unknown keys are errors.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| ConfigError(format!("{}: cannot read it: {e}", path.display())))?;
        Config::parse(&text).map_err(|e| ConfigError(format!("{}: {e}", path.display())))
    }

    /// Reads the text of a file; errors begin with the line's number.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        toml::from_str(text).map_err(|e| {
            let line = e.span().map(|s| 1 + text[..s.start.min(text.len())].matches('\n').count());
            let place = line.map(|l| format!("line {l}: ")).unwrap_or_default();
            ConfigError(format!("{place}{}", plain(e.message())))
        })
    }

    /// Sets one key from text, as flags and mount options do. `name` is `key` or `section.key`.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), ConfigError> {
        let key = KEYS.iter().find(|k| k.name == name).ok_or_else(|| unknown(name))?;
        let wrong = |what: &str| ConfigError(format!("{name}: `{value}` is not {what}"));
        let value = match key.kind {
            Kind::Text => Value::String(value.to_owned()),
            Kind::Number => Value::Integer(value.parse().map_err(|_| wrong("a number"))?),
            Kind::Bool => Value::Boolean(match value {
                "true" | "yes" | "on" | "1" => true,
                "false" | "no" | "off" | "0" => false,
                _ => return Err(wrong("yes or no")),
            }),
        };
        let mut table = self.to_table()?;
        let place = match name.split_once('.') {
            None => table.insert(name.to_owned(), value),
            Some((section, key)) => match table.get_mut(section) {
                Some(Value::Table(t)) => t.insert(key.to_owned(), value),
                Some(Value::Array(_)) => {
                    let text = format!("{name}: there are several [[{section}]]: change the file");
                    return Err(ConfigError(text));
                }
                _ => return Err(unknown(name)),
            },
        };
        drop(place);
        *self = Value::Table(table)
            .try_into()
            .map_err(|e: toml::de::Error| ConfigError(format!("{name}: {}", plain(e.message()))))?;
        Ok(())
    }

    fn to_table(&self) -> Result<Table, ConfigError> {
        Table::try_from(self).map_err(|e| ConfigError(format!("cannot print it: {e}")))
    }

    /// All keys with their values and meanings, as a file that reads back to this configuration
    /// (but for secrets, which are not shown). Keys without a value are commented out.
    pub fn print(&self) -> Result<String, ConfigError> {
        let table = self.to_table()?;
        let mut out = String::from(
            "# vmailfs: every key with its value and meaning.\n\
             # Sizes: 512M, 2G (powers of 1024). Times: 500ms, 30s, 5min, 2h, 7days.\n",
        );
        let mut section = "";
        for key in KEYS {
            let (in_section, name) = key.name.split_once('.').unwrap_or(("", key.name));
            let tables = match table.get(in_section) {
                Some(Value::Array(several)) => several.iter().filter_map(Value::as_table).collect(),
                Some(Value::Table(one)) => vec![one],
                _ => Vec::new(),
            };
            if in_section != section {
                section = in_section;
                out.push('\n');
                if let Some((_, about)) = SECTIONS.iter().find(|(s, _)| *s == section) {
                    comment(&mut out, about);
                }
                if let [first, others @ ..] = tables.as_slice()
                    && !others.is_empty()
                {
                    print_several(&mut out, section, first, others);
                } else {
                    let _ = writeln!(out, "[{section}]");
                }
            }
            if tables.len() > 1 {
                continue;
            }
            out.push('\n');
            comment(&mut out, key.help);
            let value = match tables.first() {
                Some(one) => one.get(name),
                None if section.is_empty() => table.get(name),
                None => None,
            };
            print_value(&mut out, key, name, value);
        }
        Ok(out)
    }
}

/// Tables of the same keys; the first tells what they mean.
fn print_several(out: &mut String, section: &str, first: &Table, others: &[&Table]) {
    let all = std::iter::once((true, &first)).chain(others.iter().map(|t| (false, t)));
    for (explained, table) in all {
        let _ = writeln!(out, "\n[[{section}]]");
        for key in KEYS {
            let Some(name) = key.name.strip_prefix(section).and_then(|n| n.strip_prefix('.'))
            else {
                continue;
            };
            if explained {
                comment(out, key.help);
            }
            print_value(out, key, name, table.get(name));
        }
    }
}

fn print_value(out: &mut String, key: &Key, name: &str, value: Option<&Value>) {
    let _ = match value {
        Some(_) if key.secret => writeln!(out, "# {name} = \"{MASK}\""),
        Some(value) => writeln!(out, "{name} = {value}"),
        None => writeln!(out, "# {name} = \"{}\"", key.example),
    };
}

fn comment(out: &mut String, text: &str) {
    for line in text.lines() {
        let _ = writeln!(out, "# {}", line.trim_start());
    }
}

/// The parser's words in ours: keys, not fields; no list of forty names.
fn plain(message: &str) -> String {
    let message = message.lines().next().unwrap_or_default();
    match message.strip_prefix("unknown field `").and_then(|m| m.split_once('`')) {
        Some((name, _)) => unknown(name).0,
        None => message.to_owned(),
    }
}

fn unknown(name: &str) -> ConfigError {
    let last = |n: &'static str| n.rsplit('.').next().unwrap_or(n);
    let near = KEYS
        .iter()
        .map(|k| (distance(name, k.name).min(distance(name, last(k.name))), k.name))
        .min()
        .filter(|(d, _)| *d * 3 <= name.len());
    ConfigError(match near {
        Some((0, key)) => format!("key `{name}` does not belong here; there is `{key}`"),
        Some((_, key)) => format!("unknown key `{name}`; is `{key}` meant?"),
        None => format!("unknown key `{name}`; `vmailfs config` prints all keys"),
    })
}

/// Number of letters to insert, delete or change to get from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
