//! Times as people write them.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment, in seconds since 1970.
///
/// RFC 3339 (`2026-11-22T05:30:00Z`, `...+01:00`), the machine's own time (`2026-11-22`,
/// `2026-11-22 05:30`, `2026-11-22 05:30:10`), or so long ago (`90min`, `2h`, `3days`, also
/// `3 days`).
pub(super) fn moment(text: &str) -> Result<i64, String> {
    let bad = || {
        format!(
            "{text:?} is no time: write 2026-11-22T05:30:00Z, \"2026-11-22 05:30\", 2h or 3days"
        )
    };
    if let Ok(span) = text.replace(' ', "").parse::<crate::config::Span>() {
        return Ok(now().saturating_sub(i64::try_from(span.0.as_secs()).map_err(|_| bad())?));
    }
    parse(text).ok_or_else(bad)
}

pub(super) fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

fn parse(text: &str) -> Option<i64> {
    let (date, time) = match text.split_once(['T', 't', ' ']) {
        Some((date, time)) => (date, Some(time)),
        None => (text, None),
    };
    let [year, month, day] = numbers(date, '-', &[4, 2, 2])?[..] else { return None };
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) {
        return None;
    }
    if day < 1 || day > days_in(year, month) {
        return None;
    }
    let Some(time) = time else { return local(year, month, day, 0, 0, 0) };
    let (clock, zone) = zone_of(time)?;
    // Parts of a second mean nothing here.
    let clock = clock.split_once('.').map_or(clock, |(whole, _)| whole);
    let parts = numbers(clock, ':', &[2, 2, 2]).or_else(|| numbers(clock, ':', &[2, 2]))?;
    let (hour, minute) = (parts[0], parts[1]);
    let second = parts.get(2).copied().unwrap_or(0);
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    match zone {
        Some(east) => Some(utc(year, month, day, hour, minute, second) - east),
        None => local(year, month, day, hour, minute, second),
    }
}

/// The time of day and, if one is named, how many seconds its zone is ahead of UTC.
fn zone_of(time: &str) -> Option<(&str, Option<i64>)> {
    if let Some(clock) = time.strip_suffix(['Z', 'z']) {
        return Some((clock, Some(0)));
    }
    let Some(at) = time.rfind(['+', '-']) else { return Some((time, None)) };
    let [hours, minutes] = numbers(&time[at + 1..], ':', &[2, 2])?[..] else { return None };
    if hours > 23 || minutes > 59 {
        return None;
    }
    let east = hours * 3600 + minutes * 60;
    Some((&time[..at], Some(if time[at..].starts_with('-') { -east } else { east })))
}

fn numbers(text: &str, between: char, digits: &[usize]) -> Option<Vec<i64>> {
    let parts: Vec<&str> = text.split(between).collect();
    if parts.len() != digits.len() {
        return None;
    }
    let number = |(part, digits): (&&str, &usize)| {
        let good = part.len() == *digits && part.bytes().all(|b| b.is_ascii_digit());
        good.then(|| part.parse().ok()).flatten()
    };
    parts.iter().zip(digits).map(number).collect()
}

fn days_in(year: i64, month: i64) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn utc(year: i64, month: i64, day: i64, hour: i64, minute: i64, second: i64) -> i64 {
    let years = (1970..year).map(|y| if days_in(y, 2) == 29 { 366 } else { 365 }).sum::<i64>();
    let months = (1..month).map(|m| days_in(year, m)).sum::<i64>();
    ((years + months + day - 1) * 24 + hour) * 3600 + minute * 60 + second
}

fn local(year: i64, month: i64, day: i64, hour: i64, minute: i64, second: i64) -> Option<i64> {
    let int = |n: i64| i32::try_from(n).ok();
    // SAFETY: all-zero bytes are a valid `tm`.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    tm.tm_year = int(year - 1900)?;
    tm.tm_mon = int(month - 1)?;
    tm.tm_mday = int(day)?;
    tm.tm_hour = int(hour)?;
    tm.tm_min = int(minute)?;
    tm.tm_sec = int(second)?;
    tm.tm_isdst = -1;
    // SAFETY: `tm` is a valid `tm` of ours.
    let time = unsafe { libc::mktime(&mut tm) };
    (time != -1).then_some(time)
}

/// A moment in the machine's own time, as [`moment`] reads it.
pub(super) fn shown(time: i64) -> String {
    // SAFETY: all-zero bytes are a valid `tm`.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to values of ours that live through the call.
    if unsafe { libc::localtime_r(&time, &mut tm) }.is_null() {
        return time.to_string();
    }
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        i64::from(tm.tm_year) + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, time) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("2000-02-29 12:00:00+01:30", 951_820_200),
            ("2000-02-29t12:00:00.25-00:30", 951_827_400),
            ("2026-11-22T05:30Z", 1_795_325_400),
        ] {
            assert_eq!(moment(text), Ok(time), "{text}");
        }
        for text in
            ["2001-02-29", "2001-13-01", "yesterday", "12:00", "2001-01-01 24:00", "", "-1h"]
        {
            assert!(moment(text).is_err(), "{text}");
        }
        let day = moment("2026-11-22").unwrap();
        assert_eq!(moment("2026-11-22 01:02:03").unwrap() - day, 3723);
        assert_eq!(moment(&shown(day + 7)), Ok(day + 7));
        let ago = |text| now() - moment(text).unwrap();
        assert!((7200..7203).contains(&ago("2h")));
        assert!((259_200..259_203).contains(&ago("3 days")));
    }
}
