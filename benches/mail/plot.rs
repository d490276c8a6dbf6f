//! The figures as a picture: how far each is from what is wanted.

use crate::table::Row;
use std::fmt::Write;
use std::path::Path;

const LEFT: f64 = 470.0;
const WIDTH: f64 = 420.0;
const LINE: f64 = 20.0;
/// What is wanted, in the middle of the scale from a tenth to ten times.
const DECADES: f64 = 1.0;

/// One bar for each figure that has a limit, on a logarithmic scale: left of the line is reached.
pub fn write(path: &Path, rows: &[Row], about: &serde_json::Value) {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.wanted().is_some()).collect();
    let height = LINE * (rows.len() as f64 + 5.0);
    let middle = LEFT + WIDTH / 2.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{w}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"18\" font-size=\"14\">Figures against what is wanted (the line); left of it is reached</text>\n\
         <text x=\"10\" y=\"36\" fill=\"#666\">{}</text>\n",
        escape(&format!(
            "vmailfs {} ({}), kernel {}, Dovecot {}, load {}",
            word(about, "vmailfs"),
            word(about, "commit"),
            word(about, "kernel"),
            word(about, "dovecot"),
            word(about, "load"),
        )),
        w = LEFT + WIDTH + 120.0,
    );
    for (n, row) in rows.iter().enumerate() {
        let Some((times, figure, wanted)) = row.wanted() else { continue };
        let y = LINE * (n as f64 + 3.0);
        let at = (times.max(1e-9).log10() / DECADES).clamp(-1.0, 1.0) * WIDTH / 2.0;
        let (x, width) = (middle.min(middle + at), at.abs().max(1.0));
        let colour = if times <= 1.0 { "#4a8f5b" } else { "#c0504d" };
        let what = escape(&format!("{}: {} ({}, {})", row.part, row.what, row.format, row.place));
        // Writing to a string does not fail.
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{what}</text>\
             <rect x=\"{x}\" y=\"{}\" width=\"{width}\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"{}\">{figure:.2} ({})</text>",
            LEFT - 8.0,
            y + 11.0,
            y + 1.0,
            LEFT + WIDTH + 8.0,
            y + 11.0,
            escape(wanted),
        );
    }
    let _ = writeln!(
        svg,
        "<line x1=\"{middle}\" y1=\"{}\" x2=\"{middle}\" y2=\"{}\" stroke=\"black\"/>",
        LINE * 3.0 - 6.0,
        LINE * (rows.len() as f64 + 3.0),
    );
    for (times, text) in [(0.1, "a tenth"), (1.0, "as wanted"), (10.0, "ten times")] {
        let x = middle + f64::log10(times) / DECADES * WIDTH / 2.0;
        let y = LINE * (rows.len() as f64 + 4.0);
        let _ = writeln!(
            svg,
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" fill=\"#666\">{text}</text>"
        );
    }
    svg.push_str("</svg>\n");
    std::fs::write(path, svg).unwrap();
}

fn word(about: &serde_json::Value, key: &str) -> String {
    about[key].as_str().unwrap_or_default().to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
