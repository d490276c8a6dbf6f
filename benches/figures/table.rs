//! The results, printed as they come and as lines of a Markdown table.

/// What a figure must be.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    AtMost(f64),
    /// Told for information.
    None,
}

#[derive(Debug, Default)]
pub struct Table {
    started: bool,
    missed: bool,
}

impl Table {
    /// One row; `how` says where the number comes from.
    pub fn row(&mut self, what: &str, place: &str, value: f64, limit: Limit, how: &str) {
        if !self.started {
            self.started = true;
            println!("| figure | where | measured | limit | | made of |");
            println!("|---|---|---|---|---|---|");
        }
        let (limit, verdict) = match limit {
            Limit::AtMost(most) if value <= most => (number(most), "met"),
            Limit::AtMost(most) => {
                self.missed = true;
                (number(most), "MISSED")
            }
            Limit::None => (String::new(), ""),
        };
        println!("| {what} | {place} | {} | {limit} | {verdict} | {how} |", number(value));
    }

    pub fn missed(&self) -> bool {
        self.missed
    }
}

fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
