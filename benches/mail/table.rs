//! Results: as lines of Markdown tables, and as JSON.

use serde::Serialize;
use std::path::Path;

/// What a figure should be.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
    None,
}

/// One line of the result.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub part: &'static str,
    pub what: String,
    pub format: &'static str,
    pub place: String,
    pub value: f64,
    pub unit: &'static str,
    /// The same on ext4, where it was measured.
    pub ext4: Option<f64>,
    /// `value` in terms of the figure that is promised.
    pub figure: Option<f64>,
    pub wanted: String,
    pub reached: Option<bool>,
    pub note: String,
}

#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Row>,
    headed: Option<&'static str>,
}

impl Row {
    pub fn new(part: &'static str, what: &str, format: &'static str, place: &str) -> Row {
        Row {
            part,
            what: what.to_owned(),
            format,
            place: place.to_owned(),
            value: 0.0,
            unit: "ms",
            ext4: None,
            figure: None,
            wanted: String::new(),
            reached: None,
            note: String::new(),
        }
    }

    pub fn value(mut self, value: f64, unit: &'static str) -> Row {
        self.value = value;
        self.unit = unit;
        self
    }

    /// The same thing on ext4.
    pub fn ext4(mut self, value: f64) -> Row {
        self.ext4 = Some(value);
        self
    }

    /// What is held against the limit.
    pub fn figure(mut self, figure: f64, limit: Limit) -> Row {
        self.figure = Some(figure);
        (self.wanted, self.reached) = match limit {
            Limit::AtMost(most) => (format!("<= {}", number(most)), Some(figure <= most)),
            Limit::AtLeast(least) => (format!(">= {}", number(least)), Some(figure >= least)),
            Limit::None => (String::new(), None),
        };
        self
    }

    /// How many times what is wanted the figure is (above 1: missed), the figure, and what is wanted.
    pub fn wanted(&self) -> Option<(f64, f64, &str)> {
        let figure = self.figure?;
        let (sign, limit) = self.wanted.split_once(' ')?;
        let limit: f64 = limit.parse().ok()?;
        let times = match sign {
            "<=" if limit == 0.0 => 1.0 + figure,
            "<=" => figure / limit,
            _ => limit / figure,
        };
        Some((times, figure, &self.wanted))
    }

    pub fn note(mut self, note: impl Into<String>) -> Row {
        self.note = note.into();
        self
    }
}

impl Table {
    /// Takes a row and prints it.
    pub fn row(&mut self, row: Row) {
        if self.headed != Some(row.part) {
            self.headed = Some(row.part);
            println!("\n### {}\n", row.part);
            println!("| what | format | place | measured | ext4 | figure | wanted | | note |");
            println!("|---|---|---|---|---|---|---|---|---|");
        }
        let some = |value: Option<f64>| value.map(number).unwrap_or_default();
        let verdict = match row.reached {
            Some(true) => "reached",
            Some(false) => "MISSED",
            None => "",
        };
        println!(
            "| {} | {} | {} | {} {} | {} | {} | {} | {verdict} | {} |",
            row.what,
            row.format,
            row.place,
            number(row.value),
            row.unit,
            some(row.ext4),
            some(row.figure),
            row.wanted,
            row.note
        );
        self.rows.push(row);
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    pub fn write(&self, path: &Path, about: &serde_json::Value) {
        let all = serde_json::json!({ "about": about, "rows": self.rows });
        let text = serde_json::to_string_pretty(&all).unwrap();
        std::fs::write(path, text + "\n").unwrap();
    }
}

/// The value in the middle.
pub fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

pub fn quantile(mut values: Vec<f64>, q: f64) -> f64 {
    assert!(!values.is_empty(), "nothing was measured");
    values.sort_by(f64::total_cmp);
    let at = q * (values.len() - 1) as f64;
    let (low, part) = (at.floor(), at.fract());
    let (low, high) = (low as usize, (low as usize + 1).min(values.len() - 1));
    values[low] * (1.0 - part) + values[high] * part
}

pub fn number(value: f64) -> String {
    let digits = if value.abs() >= 100.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        3
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}
