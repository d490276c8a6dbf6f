//! Sizes, times and modes as people write them.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A value that cannot be read; says what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

/// A number of bytes. Text: `512M`, `2G`; units are powers of 1024, a bare number is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl Size {
    pub const fn gib(n: u64) -> Size {
        Size(n << 30)
    }
}

/// Largest unit first, so that printing finds the shortest exact text.
const SIZE_UNITS: [(&str, u64); 4] =
    [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];

fn split_number(s: &str) -> Option<(u64, &str)> {
    let s = s.trim();
    let end = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let (number, unit) = s.split_at(end);
    Some((number.parse().ok()?, unit.trim()))
}

impl FromStr for Size {
    type Err = ParseError;
    fn from_str(s: &str) -> Result<Self, ParseError> {
        let bad = || ParseError(format!("`{s}` is no size: write it like 512M or 2G"));
        let (number, unit) = split_number(s).ok_or_else(bad)?;
        let unit = unit.to_ascii_uppercase();
        let letter = match unit.as_str() {
            "" | "B" => return Ok(Size(number)),
            u => u.strip_suffix("IB").or_else(|| u.strip_suffix('B')).unwrap_or(u),
        };
        let (_, factor) = SIZE_UNITS.iter().find(|(u, _)| *u == letter).ok_or_else(bad)?;
        number.checked_mul(*factor).map(Size).ok_or_else(bad)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, factor) in SIZE_UNITS {
            if self.0 > 0 && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A length of time. Text: `500ms`, `30s`, `5min`, `2h`, `7days`; a unit is required.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl Span {
    pub const fn secs(n: u64) -> Span {
        Span(Duration::from_secs(n))
    }
}

impl FromStr for Span {
    type Err = ParseError;
    fn from_str(s: &str) -> Result<Self, ParseError> {
        let bad = || {
            ParseError(format!("`{s}` is no length of time: write it like 30s, 5min, 2h or 7days"))
        };
        let (number, unit) = split_number(s).ok_or_else(bad)?;
        let millis = match unit.to_ascii_lowercase().as_str() {
            "" if number == 0 => 0,
            "ms" | "msec" | "msecs" | "milliseconds" => 1,
            "s" | "sec" | "secs" | "second" | "seconds" => 1000,
            "m" | "min" | "mins" | "minute" | "minutes" => 60_000,
            "h" | "hour" | "hours" => 3_600_000,
            "d" | "day" | "days" => 86_400_000,
            "w" | "week" | "weeks" => 604_800_000,
            _ => return Err(bad()),
        };
        number.checked_mul(millis).map(Duration::from_millis).map(Span).ok_or_else(bad)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        for (unit, factor) in [("days", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)]
        {
            if ms > 0 && ms.is_multiple_of(factor) {
                return write!(f, "{}{unit}", ms / factor);
            }
        }
        write!(f, "{ms}ms")
    }
}

/// Permission bits. Text: octal, `0755`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(pub u32);

impl FromStr for Mode {
    type Err = ParseError;
    fn from_str(s: &str) -> Result<Self, ParseError> {
        match u32::from_str_radix(s.trim_start_matches("0o"), 8) {
            Ok(mode) if mode <= 0o7777 => Ok(Mode(mode)),
            _ => Err(ParseError(format!("`{s}` is no mode: write it in octal, like \"0755\""))),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

macro_rules! as_text {
    ($type:ty, $what:literal, $int:expr) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                struct Visit;
                impl de::Visitor<'_> for Visit {
                    type Value = $type;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($what)
                    }
                    fn visit_str<E: de::Error>(self, v: &str) -> Result<$type, E> {
                        v.parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, v: i64) -> Result<$type, E> {
                        let make: fn(i64) -> Option<$type> = $int;
                        make(v).ok_or_else(|| E::invalid_type(de::Unexpected::Signed(v), &self))
                    }
                }
                d.deserialize_any(Visit)
            }
        }
    };
}

as_text!(Size, "a size like \"512M\" or \"2G\"", |v| u64::try_from(v).ok().map(Size));
as_text!(Span, "a length of time with its unit, like \"30s\" or \"5min\"", |v| {
    (v == 0).then_some(Span::secs(0))
});
// TOML reads a bare 755 as decimal; whoever wrote that meant octal, so it must be quoted.
as_text!(Mode, "a mode in quotes, like \"0755\"", |_| None);
