//! Cleanup weights: in which order the metacache is evicted.
//!
//! What is evicted together is one user's files of one priority. Each such unit has a weight, and
//! the lowest goes first:
//!
//! ```text
//! weight = time of the last access (seconds since 1970)
//!        + what the priority gets while all its files together take no more of max_space than so much
//!        + what the unit's size gets
//! ```
//!
//! `priority_weights` is one pair for each priority, `10% +1d 10% +1d 50% +1h 100% 0`: users' roots
//! are kept a day longer than their last use says, as long as roots take at most a tenth of the
//! space. So no priority can crowd out the others.
//!
//! `size_weights` is two pairs, `2M +30 1G +120`: nothing at all gets 30 seconds more, which falls
//! to 0 at 2M (what is small costs little to keep); from there it rises to 120 seconds at 1G (what
//! is large costs much to fetch again).
//!
//! Both may be empty: what was used longest ago goes first, and nothing else counts.

use std::fmt;
use std::str::FromStr;

/// Priorities: 0 a user's root, 1 full-text search, 2 INBOX and the like, 3 other folders.
pub const PRIORITIES: usize = 4;

/// What is wrong with a text of weights.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WeightError(pub String);

/// Up to which share of the space (percent) the files of a priority get how many seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Share {
    percent: u64,
    seconds: i64,
}

/// `priority_weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PriorityWeights(Option<[Share; PRIORITIES]>);

/// `size_weights`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SizeWeights(Option<[(u64, i64); 2]>);

/// As documented for obox.
pub const PRIORITY_DEFAULT: &str = "10% +1d 10% +1d 50% +1h 100% 0";
pub const SIZE_DEFAULT: &str = "2M +30 1G +120";

fn seconds(text: &str) -> Result<i64, WeightError> {
    let bad =
        || WeightError(format!("`{text}` is no number of seconds: write it like +30, +1h or 0"));
    let (sign, rest) = match text.as_bytes().first() {
        Some(b'-') => (-1, &text[1..]),
        Some(b'+') => (1, &text[1..]),
        _ => (1, text),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (number, unit) = rest.split_at(end);
    let number: i64 = number.parse().map_err(|_| bad())?;
    let factor = match unit {
        "" | "s" | "sec" | "secs" => 1,
        "m" | "min" | "mins" => 60,
        "h" | "hour" | "hours" => 3600,
        "d" | "day" | "days" => 24 * 3600,
        "w" | "week" | "weeks" => 7 * 24 * 3600,
        _ => return Err(bad()),
    };
    number.checked_mul(factor).and_then(|n| n.checked_mul(sign)).ok_or_else(bad)
}

fn size(text: &str) -> Result<u64, WeightError> {
    let bad = || WeightError(format!("`{text}` is no size: write it like 2M or 1G"));
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let factor: u64 = match unit.to_ascii_uppercase().trim_end_matches('B') {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(bad()),
    };
    number.checked_mul(factor).ok_or_else(bad)
}

impl FromStr for PriorityWeights {
    type Err = WeightError;
    fn from_str(text: &str) -> Result<Self, WeightError> {
        let words: Vec<&str> = text.split_whitespace().collect();
        if words.is_empty() {
            return Ok(PriorityWeights(None));
        }
        if words.len() != PRIORITIES * 2 {
            return Err(WeightError(format!(
                "`{text}`: four pairs are needed, one for each priority, as in `{PRIORITY_DEFAULT}`"
            )));
        }
        let mut all = [Share { percent: 0, seconds: 0 }; PRIORITIES];
        for (share, pair) in all.iter_mut().zip(words.chunks(2)) {
            let percent = pair[0].strip_suffix('%').and_then(|n| n.parse().ok());
            let percent = percent.filter(|n| *n <= 100).ok_or_else(|| {
                WeightError(format!("`{}` is no share: write it like 10%", pair[0]))
            })?;
            *share = Share { percent, seconds: seconds(pair[1])? };
        }
        Ok(PriorityWeights(Some(all)))
    }
}

impl FromStr for SizeWeights {
    type Err = WeightError;
    fn from_str(text: &str) -> Result<Self, WeightError> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [low, low_seconds, max, max_seconds] = words.as_slice() else {
            if words.is_empty() {
                return Ok(SizeWeights(None));
            }
            return Err(WeightError(format!(
                "`{text}`: two pairs are needed, as in `{SIZE_DEFAULT}`"
            )));
        };
        let all = [(size(low)?, seconds(low_seconds)?), (size(max)?, seconds(max_seconds)?)];
        if all[0].0 == 0 || all[0].0 >= all[1].0 {
            return Err(WeightError(format!("`{text}`: the first size must be the smaller one")));
        }
        Ok(SizeWeights(Some(all)))
    }
}

impl fmt::Display for PriorityWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.0.iter().flatten().map(|s| format!("{}% {:+}", s.percent, s.seconds));
        f.write_str(&words.collect::<Vec<_>>().join(" "))
    }
}

impl fmt::Display for SizeWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = self.0.iter().flatten().map(|(size, s)| format!("{size} {s:+}"));
        f.write_str(&words.collect::<Vec<_>>().join(" "))
    }
}

/// To the nearest whole number.
fn share(part: u64, whole: u64, seconds: i64) -> i64 {
    let product = i128::from(part) * i128::from(seconds);
    let whole = i128::from(whole.max(1));
    let half = if product < 0 { -whole / 2 } else { whole / 2 };
    i64::try_from((product + half) / whole).unwrap_or(seconds)
}

impl PriorityWeights {
    /// What the files of a priority get that all together take `used` of `max_space` bytes.
    fn term(&self, priority: usize, used: u64, max_space: u64) -> i64 {
        let Some(share) = self.0.as_ref().and_then(|all| all.get(priority)) else { return 0 };
        let limit = u128::from(max_space) * u128::from(share.percent);
        if u128::from(used) * 100 <= limit { share.seconds } else { 0 }
    }
}

impl SizeWeights {
    fn term(&self, size: u64) -> i64 {
        let Some([(low, low_seconds), (max, max_seconds)]) = self.0 else { return 0 };
        if size <= low {
            share(low - size, low, low_seconds)
        } else {
            share(size.min(max) - low, max - low, max_seconds)
        }
    }
}

/// Both settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weights {
    pub priority: PriorityWeights,
    pub size: SizeWeights,
}

impl Default for Weights {
    fn default() -> Weights {
        // Both texts are read by a test.
        Weights {
            priority: PRIORITY_DEFAULT.parse().unwrap_or(PriorityWeights(None)),
            size: SIZE_DEFAULT.parse().unwrap_or(SizeWeights(None)),
        }
    }
}

/// What a unit is weighed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unit {
    pub priority: usize,
    /// Seconds since 1970.
    pub last_access: i64,
    pub bytes: u64,
    /// Bytes of all users in this priority.
    pub of_priority: u64,
}

impl Weights {
    /// Plain least recently used.
    pub fn none() -> Weights {
        Weights { priority: PriorityWeights(None), size: SizeWeights(None) }
    }

    pub fn weigh(&self, unit: Unit, max_space: u64) -> i64 {
        unit.last_access
            .saturating_add(self.priority.term(unit.priority, unit.of_priority, max_space))
            .saturating_add(self.size.term(unit.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;
    const DAY: i64 = 24 * 3600;

    /// The table of obox's documentation.
    #[test]
    fn the_documented_sizes_get_the_documented_seconds() {
        let weights: SizeWeights = SIZE_DEFAULT.parse().unwrap();
        for (size, want) in [
            (0, 30),
            (M, 15),
            (2 * M, 0),
            (10 * M, 1),
            (100 * M, 12),
            (258 * M, 30),
            (1024 * M, 120),
            (5000 * M, 120),
        ] {
            assert_eq!(weights.term(size), want, "{size}");
        }
        // The documentation says 60, which is rounded: the formula gives 58.5.
        assert_eq!(weights.term(500 * M), 58);
    }

    #[test]
    fn a_priority_is_kept_longer_while_all_of_it_takes_little() {
        let weights: PriorityWeights = PRIORITY_DEFAULT.parse().unwrap();
        let space = 1000 * M;
        for (priority, used, want) in [
            (0, 100 * M, DAY),
            (0, 100 * M + 1, 0),
            (1, 0, DAY),
            (1, 101 * M, 0),
            (2, 500 * M, 3600),
            (2, 501 * M, 0),
            (3, 1000 * M, 0),
            (3, 2000 * M, 0),
        ] {
            assert_eq!(weights.term(priority, used, space), want, "{priority} {used}");
        }
    }

    #[test]
    fn a_weight_is_the_sum() {
        let unit = Unit { priority: 2, last_access: 1_700_000_000, bytes: M, of_priority: 10 * M };
        assert_eq!(Weights::default().weigh(unit, 100 * M), 1_700_000_000 + 3600 + 15);
        assert_eq!(Weights::none().weigh(unit, 100 * M), 1_700_000_000);
        // An INBOX outlives another folder that was used up to an hour after it.
        let other = Unit { priority: 3, last_access: 1_700_003_599, ..unit };
        let weights = Weights::default();
        assert!(weights.weigh(other, 100 * M) < weights.weigh(unit, 100 * M));
    }

    #[test]
    fn what_people_write() {
        assert_eq!("".parse::<PriorityWeights>().unwrap(), PriorityWeights(None));
        assert_eq!(" ".parse::<SizeWeights>().unwrap(), SizeWeights(None));
        assert!("10% +1d".parse::<PriorityWeights>().is_err());
        assert!("10 +1d 10% +1d 50% +1h 100% 0".parse::<PriorityWeights>().is_err());
        assert!("101% 0 10% +1d 50% +1h 100% 0".parse::<PriorityWeights>().is_err());
        assert!("10% 1x 10% +1d 50% +1h 100% 0".parse::<PriorityWeights>().is_err());
        assert!("2M".parse::<SizeWeights>().is_err());
        assert!("2G +30 1M +120".parse::<SizeWeights>().is_err());
        for text in [PRIORITY_DEFAULT, "0% -5 1% 2min 3% 4w 100% +0"] {
            let read: PriorityWeights = text.parse().unwrap();
            assert_eq!(read.to_string().parse::<PriorityWeights>().unwrap(), read);
        }
        let read: SizeWeights = "1K +1m 2T 0".parse().unwrap();
        assert_eq!(read.to_string().parse::<SizeWeights>().unwrap(), read);
        assert_eq!(
            Weights::default().priority.to_string(),
            "10% +86400 10% +86400 50% +3600 100% +0"
        );
    }
}
