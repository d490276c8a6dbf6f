//! How what the metacache says of itself is written.

use super::super::exit::Failure;
use super::super::formatter::{Format, Table};
use super::super::show;
use crate::admin::caches::{ListRow, MetacacheReport, Rescanned};
use serde_json::Value;

fn optional<T: Into<Value>>(value: Option<T>) -> Value {
    value.map_or(Value::Null, Into::into)
}

/// The documented columns.
pub(super) fn list(rows: &[ListRow]) -> Table {
    let names: std::collections::BTreeSet<&String> =
        rows.iter().flat_map(|row| row.fields.keys()).collect();
    let mut table = Table::default();
    let mut column = |name: String| table.columns.push(name);
    column("username".into());
    names.iter().for_each(|name| column((*name).clone()));
    ["upload-within", "dev-major", "dev-minor"].into_iter().for_each(|name| column(name.into()));
    (0..4).for_each(|priority| column(format!("bytes-used({priority})")));
    (0..4).for_each(|priority| column(format!("last-access({priority})")));
    ["changes", "last-service", "cleanup-weight"].into_iter().for_each(|name| column(name.into()));
    for row in rows {
        let mut values: Vec<Value> = vec![row.username.clone().into()];
        values.extend(names.iter().map(|name| optional(row.fields.get(*name).cloned())));
        values.push(optional(row.upload_within));
        values.push(row.dev_major.into());
        values.push(row.dev_minor.into());
        values.extend((0..4).map(|p| row.bytes_used.get(p).copied().unwrap_or(0).into()));
        values.extend((0..4).map(|p| row.last_access.get(p).copied().unwrap_or(0).into()));
        values.push(row.changes.as_str().into());
        values.push(optional(row.last_service.clone()));
        values.push(optional(row.cleanup_weight));
        table.rows.push(values);
    }
    table
}

/// The text of `.vmailfs/list`.
pub(in crate::cli) fn list_text(rows: &[ListRow]) -> Result<String, Failure> {
    list(rows).text(Format::Table)
}

pub(in crate::cli) fn size(bytes: u64, exact: bool) -> Value {
    if exact { bytes.into() } else { show::bytes(bytes).into() }
}

pub(super) fn by_time(report: &MetacacheReport, exact: bool) -> Table {
    let mut table = Table::new(["last-access", "users", "bytes-used"]);
    for span in &report.by_time {
        let within = match span.within {
            Some(3600) => "within an hour".to_owned(),
            Some(86_400) => "within a day".to_owned(),
            Some(secs) => format!("within {} days", secs / 86_400),
            None => "longer ago".to_owned(),
        };
        let users = span.users.into();
        table.rows.push(vec![within.into(), users, size(span.bytes, exact)]);
    }
    table
}

pub(super) fn by_root(report: &MetacacheReport, exact: bool) -> Table {
    let mut table = Table::new([
        "root",
        "dev-major",
        "dev-minor",
        "users",
        "bytes-used",
        "max-space",
        "max-grace",
        "bytes-used(0)",
        "bytes-used(1)",
        "bytes-used(2)",
        "bytes-used(3)",
    ]);
    let users: u64 = report.by_time.iter().map(|span| span.users).sum();
    let mut row: Vec<Value> = vec![
        report.root.display().to_string().into(),
        report.dev_major.into(),
        report.dev_minor.into(),
        users.into(),
        size(report.bytes_used, exact),
        size(report.max_space, exact),
        size(report.max_grace, exact),
    ];
    row.extend((0..4).map(|p| size(report.by_priority.get(p).copied().unwrap_or(0), exact)));
    table.rows.push(row);
    table
}

pub(super) fn rescanned(found: &Rescanned) -> String {
    let users = show::count(found.users, "user");
    let mut text = match found.booked.cmp(&found.found) {
        std::cmp::Ordering::Equal if found.wrong.is_empty() => {
            format!("{users}, {} bytes: the books were right\n", found.found)
        }
        _ => format!(
            "{users}, {} bytes: the books said {}, they were wrong by {}\n",
            found.found,
            found.booked,
            i128::from(found.booked) - i128::from(found.found)
        ),
    };
    for (user, booked, bytes) in &found.wrong {
        text.push_str(&format!("{user}: {bytes} bytes, the books said {booked}\n"));
    }
    text
}
