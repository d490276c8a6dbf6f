//! The text side of IMAP: responses into values, dates, and mailbox names in modified UTF-7.

use super::{Outcome, fail};

/// One element of a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// An atom, with its `[...]` part if it has one, or `NIL`.
    Atom(Vec<u8>),
    /// A quoted string or a literal.
    Text(Vec<u8>),
    List(Vec<Value>),
}

impl Value {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Value::Atom(bytes) | Value::Text(bytes) => bytes,
            Value::List(_) => b"",
        }
    }

    pub fn string(&self) -> String {
        String::from_utf8_lossy(self.bytes()).into_owned()
    }

    pub fn number<T: std::str::FromStr>(&self) -> Option<T> {
        std::str::from_utf8(self.bytes()).ok()?.parse().ok()
    }

    pub fn list(&self) -> &[Value] {
        match self {
            Value::List(values) => values,
            _ => &[],
        }
    }

    /// The value that follows `name` in a list of names and values.
    pub fn after(&self, name: &str) -> Option<&Value> {
        let pairs = self.list().chunks_exact(2);
        pairs
            .into_iter()
            .find(|p| p[0].bytes().eq_ignore_ascii_case(name.as_bytes()))
            .map(|p| &p[1])
    }
}

/// Splits a whole response (literals included, without the last CRLF) into values. What stands
/// in brackets belongs to its atom.
pub fn parse(text: &[u8]) -> Outcome<Vec<Value>> {
    let mut at = 0;
    let values = parse_until(text, &mut at, None)?;
    Ok(values)
}

fn parse_until(text: &[u8], at: &mut usize, close: Option<u8>) -> Outcome<Vec<Value>> {
    let mut values = Vec::new();
    while *at < text.len() {
        match text[*at] {
            b' ' => *at += 1,
            b'(' => {
                *at += 1;
                values.push(Value::List(parse_until(text, at, Some(b')'))?));
            }
            b')' if close.is_some() => {
                *at += 1;
                return Ok(values);
            }
            b'"' => values.push(Value::Text(quoted(text, at)?)),
            b'{' if close.is_some() || text[*at..].contains(&b'\n') => {
                values.push(Value::Text(literal(text, at)?));
            }
            _ => values.push(Value::Atom(atom(text, at, close.is_some()))),
        }
    }
    if close.is_some() { fail("a list is not closed") } else { Ok(values) }
}

fn quoted(text: &[u8], at: &mut usize) -> Outcome<Vec<u8>> {
    let mut out = Vec::new();
    *at += 1;
    while let Some(&c) = text.get(*at) {
        *at += 1;
        match c {
            b'"' => return Ok(out),
            b'\\' => {
                out.extend(text.get(*at));
                *at += 1;
            }
            c => out.push(c),
        }
    }
    fail("a quoted string is not closed")
}

fn literal(text: &[u8], at: &mut usize) -> Outcome<Vec<u8>> {
    let rest = &text[*at + 1..];
    let end = rest.iter().position(|&c| c == b'}');
    let Some(size) = end.and_then(|end| std::str::from_utf8(&rest[..end]).ok()?.parse().ok())
    else {
        return fail("a literal without a size");
    };
    let size: usize = size;
    let start = *at + 1 + end.unwrap_or(0) + 3;
    *at = start + size;
    match text.get(start..start + size) {
        Some(bytes) => Ok(bytes.to_vec()),
        None => fail("a literal is cut short"),
    }
}

fn atom(text: &[u8], at: &mut usize, in_list: bool) -> Vec<u8> {
    let start = *at;
    let mut depth = 0;
    while let Some(&c) = text.get(*at) {
        match c {
            b'[' => depth += 1,
            b']' => depth -= 1,
            b' ' if depth <= 0 => break,
            b'(' | b')' if depth <= 0 && in_list => break,
            _ => {}
        }
        *at += 1;
    }
    text[start..*at].to_vec()
}

/// The `{n}` at the end of a line, if a literal follows it.
pub fn announced_literal(line: &[u8]) -> Option<usize> {
    let inner = line.strip_suffix(b"}")?;
    let open = inner.iter().rposition(|&c| c == b'{')?;
    std::str::from_utf8(&inner[open + 1..]).ok()?.parse().ok()
}

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Days from 1 January 1970 to a date of the Gregorian calendar.
fn days_from_date(year: i64, month: i64, day: i64) -> i64 {
    // Years begin in March here, so that a leap day is the last of its year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day
        - 719_469
}

/// Seconds since 1970 as `"17-Jul-2024 02:44:25 +0000"`.
pub fn date_time(seconds: i64) -> String {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let mut year = 1970 + days / 366;
    while days_from_date(year + 1, 1, 1) <= days {
        year += 1;
    }
    let mut month = 12;
    while days_from_date(year, month, 1) > days {
        month -= 1;
    }
    let day = days - days_from_date(year, month, 1) + 1;
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let name = MONTHS[month as usize - 1];
    format!("{day:02}-{name}-{year:04} {hour:02}:{minute:02}:{second:02} +0000")
}

/// The inverse of [`date_time`], for any zone.
pub fn parse_date_time(text: &str) -> Option<i64> {
    let mut words = text.split_whitespace();
    let mut date = words.next()?.split('-');
    let day: i64 = date.next()?.parse().ok()?;
    let name = date.next()?;
    let month = MONTHS.iter().position(|m| *m == name)? as i64 + 1;
    let year: i64 = date.next()?.parse().ok()?;
    let mut seconds = days_from_date(year, month, day) * 86_400;
    for (part, unit) in words.next()?.split(':').zip([3600, 60, 1]) {
        seconds += part.parse::<i64>().ok()? * unit;
    }
    let zone: i64 = words.next()?.parse().ok()?;
    Some(seconds - (zone / 100 * 3600 + zone % 100 * 60))
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+,";

/// A mailbox name as IMAP carries it: modified UTF-7.
pub fn encode_name(name: &str) -> String {
    let mut out = String::new();
    let mut wide: Vec<u16> = Vec::new();
    for c in name.chars() {
        if !(' '..='~').contains(&c) {
            wide.extend(c.encode_utf16(&mut [0; 2]).iter());
            continue;
        }
        flush_wide(&mut wide, &mut out);
        out.push(c);
        if c == '&' {
            out.push('-');
        }
    }
    flush_wide(&mut wide, &mut out);
    out
}

fn flush_wide(wide: &mut Vec<u16>, out: &mut String) {
    if wide.is_empty() {
        return;
    }
    let bytes: Vec<u8> = wide.drain(..).flat_map(u16::to_be_bytes).collect();
    out.push('&');
    for group in bytes.chunks(3) {
        let all = group.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - group.len()));
        for i in 0..=group.len() {
            out.push(char::from(BASE64[(all >> (18 - 6 * i) & 63) as usize]));
        }
    }
    out.push('-');
}

/// The inverse of [`encode_name`]; what is not valid stays as it is.
pub fn decode_name(name: &str) -> String {
    let mut out = String::new();
    let mut rest = name;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        let Some(length) = rest[start + 1..].find('-') else { break };
        let code = &rest[start + 1..start + 1 + length];
        rest = &rest[start + length + 2..];
        if code.is_empty() {
            out.push('&');
            continue;
        }
        let (mut bits, mut held, mut bytes) = (0u32, 0, Vec::new());
        for c in code.bytes().filter_map(|c| BASE64.iter().position(|b| *b == c)) {
            bits = bits << 6 | c as u32;
            held += 6;
            if held >= 8 {
                held -= 8;
                bytes.push((bits >> held) as u8);
            }
        }
        let wide: Vec<u16> =
            bytes.chunks_exact(2).map(|b| u16::from_be_bytes([b[0], b[1]])).collect();
        out.push_str(&String::from_utf16_lossy(&wide));
    }
    out.push_str(rest);
    out
}
