//! A strict reader of OpenMetrics text: whatever breaks a rule of the format, or a convention on
//! names, is an error.

use super::{Outcome, fail};
use std::collections::{BTreeMap, BTreeSet};

/// Labels, by name.
pub type Labels = BTreeMap<String, String>;

#[derive(Debug, Clone, Default)]
pub struct Family {
    pub kind: String,
    pub unit: String,
    pub help: String,
    /// Name of the sample, its labels, its value.
    pub samples: Vec<(String, Labels, f64)>,
}

#[derive(Debug, Clone, Default)]
pub struct Page(pub BTreeMap<String, Family>);

impl Page {
    /// The value of the one sample with this name whose labels include these.
    pub fn value(&self, sample: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut found = self.0.values().flat_map(|f| &f.samples).filter(|(name, have, _)| {
            name == sample && labels.iter().all(|(k, v)| have.get(*k).is_some_and(|x| x == v))
        });
        let one = found.next().map(|(_, _, value)| *value);
        assert!(found.next().is_none(), "{sample} {labels:?} is not one sample");
        one
    }

    /// The sum over all samples with this name whose labels include these.
    pub fn sum(&self, sample: &str, labels: &[(&str, &str)]) -> f64 {
        let fits = |have: &Labels| labels.iter().all(|(k, v)| have.get(*k).is_some_and(|x| x == v));
        let all = self.0.values().flat_map(|f| &f.samples);
        all.filter(|(name, have, _)| name == sample && fits(have)).map(|(_, _, v)| v).sum()
    }
}

fn is_name(text: &str) -> bool {
    let first = text.chars().next().is_some_and(|c| c.is_ascii_lowercase());
    first && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// Reads a whole page.
pub fn read(text: &str) -> Outcome<Page> {
    let Some(body) = text.strip_suffix("# EOF\n") else { return fail("no # EOF at the end") };
    let mut page = Page::default();
    let mut current = String::new();
    for line in body.split_terminator('\n') {
        if let Some(rest) = line.strip_prefix("# ") {
            let mut words = rest.splitn(3, ' ');
            let (Some(what), Some(name), Some(value)) = (words.next(), words.next(), words.next())
            else {
                return fail(format!("half a line: {line}"));
            };
            if name != current {
                if page.0.contains_key(name) {
                    return fail(format!("{name} stands twice, or in pieces"));
                }
                if !is_name(name) || !name.starts_with("vmailfs_") {
                    return fail(format!("{name}: not a good name"));
                }
                current = name.to_owned();
                page.0.insert(current.clone(), Family::default());
            }
            let Some(family) = page.0.get_mut(&current) else { return fail(line) };
            if !family.samples.is_empty() {
                return fail(format!("{line}: after the samples"));
            }
            let field = match what {
                "TYPE" => &mut family.kind,
                "UNIT" => &mut family.unit,
                "HELP" => &mut family.help,
                _ => return fail(format!("unknown line {line}")),
            };
            if !field.is_empty() || value.is_empty() || value.contains('\n') {
                return fail(format!("{line}: twice, or empty"));
            }
            *field = value.to_owned();
            continue;
        }
        let (name, labels, value) = sample(line)?;
        let Some(family) = page.0.get_mut(&current) else {
            return fail(format!("{line}: no metric was begun"));
        };
        let Some(suffix) = name.strip_prefix(&current) else {
            return fail(format!("{line}: does not belong to {current}"));
        };
        let allowed: &[&str] = match family.kind.as_str() {
            "counter" => &["_total"],
            "gauge" => &[""],
            "info" => &["_info"],
            "histogram" => &["_bucket", "_count", "_sum"],
            kind => return fail(format!("{current}: type {kind:?}")),
        };
        if !allowed.contains(&suffix) {
            return fail(format!("{line}: not a sample of a {}", family.kind));
        }
        if family.samples.iter().any(|(n, l, _)| *n == name && *l == labels) {
            return fail(format!("{line}: twice"));
        }
        let never_negative = family.kind != "gauge";
        if value.is_nan() || never_negative && value < 0.0 {
            return fail(format!("{line}: not a value"));
        }
        family.samples.push((name, labels, value));
    }
    for (name, family) in &page.0 {
        check(name, family)?;
    }
    Ok(page)
}

/// `name{label="value",...} number`
fn sample(line: &str) -> Outcome<(String, Labels, f64)> {
    let end = line.find(['{', ' ']).unwrap_or(line.len());
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let Some((label, after)) = rest.split_once("=\"") else { return fail(line) };
            let mut value = String::new();
            let mut chars = after.char_indices();
            let close = loop {
                match chars.next() {
                    None => return fail(format!("{line}: an open quote")),
                    Some((at, '"')) => break at,
                    Some((_, '\\')) => match chars.next() {
                        Some((_, 'n')) => value.push('\n'),
                        Some((_, c @ ('"' | '\\'))) => value.push(c),
                        _ => return fail(format!("{line}: a bad escape")),
                    },
                    Some((_, c)) => value.push(c),
                }
            };
            if !is_name(label) || labels.insert(label.to_owned(), value).is_some() {
                return fail(format!("{line}: label {label}"));
            }
            rest = &after[close + 1..];
            match rest.strip_prefix(',') {
                Some(more) if !more.starts_with('}') => rest = more,
                Some(_) => return fail(format!("{line}: a comma too many")),
                None if rest.starts_with('}') => {}
                None => return fail(format!("{line}: no comma")),
            }
        }
        rest = &rest[1..];
    }
    let Some(number) = rest.strip_prefix(' ') else { return fail(format!("{line}: no value")) };
    let plain = number.chars().all(|c| c.is_ascii_digit() || "+-.e".contains(c));
    match number.parse() {
        Ok(value) if plain => Ok((name.to_owned(), labels, value)),
        _ => fail(format!("{line}: {number} is no number")),
    }
}

fn check(name: &str, family: &Family) -> Outcome<()> {
    if family.kind.is_empty() || family.help.is_empty() {
        return fail(format!("{name}: without a type or a help text"));
    }
    if !family.unit.is_empty() && !name.ends_with(&format!("_{}", family.unit)) {
        return fail(format!("{name}: its unit {} is not in its name", family.unit));
    }
    for unit in ["seconds", "bytes"] {
        if name.ends_with(unit) && family.unit != unit {
            return fail(format!("{name}: looks like {unit}, and does not say so"));
        }
    }
    for suffix in ["_total", "_count", "_sum", "_bucket", "_info", "_milliseconds", "_kilobytes"] {
        if name.ends_with(suffix) {
            return fail(format!("{name}: {suffix} in the name of a family"));
        }
    }
    let names = |l: &Labels| l.keys().cloned().collect::<BTreeSet<_>>();
    let all: BTreeSet<_> = family.samples.iter().map(|(n, l, _)| (n.clone(), names(l))).collect();
    let by_name: BTreeSet<_> = all.iter().map(|(n, _)| n).collect();
    if all.len() != by_name.len() {
        return fail(format!("{name}: samples with different labels"));
    }
    if family.kind == "histogram" { histogram(name, family) } else { Ok(()) }
}

fn histogram(name: &str, family: &Family) -> Outcome<()> {
    let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    for (_, labels, value) in family.samples.iter().filter(|(n, ..)| n.ends_with("_bucket")) {
        let mut labels = labels.clone();
        let Some(bound) = labels.remove("le") else { return fail(format!("{name}: no le")) };
        let bound = if bound == "+Inf" { Ok(f64::INFINITY) } else { bound.parse() };
        let Ok(bound) = bound else { return fail(format!("{name}: a bound that is no number")) };
        series.entry(labels).or_default().push((bound, *value));
    }
    for (labels, buckets) in &series {
        let rising = buckets.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1);
        let last = buckets.last().copied().unwrap_or_default();
        let of = |suffix: &str| {
            let wanted = format!("{name}{suffix}");
            family.samples.iter().find(|(n, l, _)| *n == wanted && l == labels).map(|s| s.2)
        };
        if !rising || last.0 != f64::INFINITY || of("_count") != Some(last.1) {
            return fail(format!("{name} {labels:?}: buckets do not add up"));
        }
        let Some(sum) = of("_sum") else { return fail(format!("{name}: no sum")) };
        // What is in the buckets bounds the sum from below.
        let mut least = 0.0;
        for pair in buckets.windows(2) {
            least += (pair[1].1 - pair[0].1) * pair[0].0;
        }
        if sum + 1e-6 < least {
            return fail(format!("{name} {labels:?}: the sum {sum} is below {least}"));
        }
    }
    Ok(())
}
