//! All numbers of a mount as OpenMetrics text, which Prometheus and its kin read.
//!
//! Nothing is kept here: each layer counts for itself, and a scrape reads the counters of that
//! moment. Names follow the conventions: base units, `_total` for what only grows.

use super::{CacheUse, Status};
use crate::fuse::stats::{FuseStats, Op};
use crate::histogram::Durations;
use crate::store::HealthNow;
use crate::store::counted::CountRow;
use crate::vmail::counts::CountsNow;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use std::fmt::Error;
use std::sync::Arc;
use std::time::Duration;

/// How HTTP calls the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the text is made of.
#[derive(Debug)]
pub struct Numbers {
    pub status: Status,
    pub store: Vec<CountRow>,
    pub health: HealthNow,
    /// Requests sent, those of retries and of uploads in pieces included, if the store counts them.
    pub wire_requests: Option<u64>,
    pub fuse: Option<Arc<FuseStats>>,
    pub heart: CountsNow,
}

/// The whole text.
pub fn text(numbers: Numbers) -> String {
    let mut registry = Registry::with_prefix("vmailfs");
    registry.register_collector(Box::new(numbers));
    let mut out = String::new();
    // Writing to a string does not fail.
    if let Err(error) = text::encode(&mut out, &registry) {
        tracing::error!(%error, "metrics cannot be written");
    }
    out
}

/// Name, help and value of a metric that each row of the store's counts has.
type OfRows = (&'static str, &'static str, fn(&CountRow) -> u64);

/// One metric: its rows are written one after the other.
struct Family<'a>(MetricEncoder<'a>);

/// Names and values.
type Labels<'a> = [(&'a str, &'a str)];

const NONE: &Labels<'static> = &[];

impl Family<'_> {
    fn row(
        &mut self,
        labels: &Labels<'_>,
        write: impl FnOnce(&mut MetricEncoder<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if labels.is_empty() {
            write(&mut self.0)
        } else {
            write(&mut self.0.encode_family(&labels)?)
        }
    }

    fn count(&mut self, labels: &Labels<'_>, value: u64) -> Result<(), Error> {
        self.row(labels, |row| row.encode_counter::<NoLabelSet, _, f64>(&value, None))
    }

    fn seconds(&mut self, labels: &Labels<'_>, value: Duration) -> Result<(), Error> {
        let value = value.as_secs_f64();
        self.row(labels, |row| row.encode_counter::<NoLabelSet, _, f64>(&value, None))
    }

    fn gauge(&mut self, labels: &Labels<'_>, value: u64) -> Result<(), Error> {
        self.row(labels, |row| row.encode_gauge(&value))
    }

    fn durations(&mut self, labels: &Labels<'_>, value: &Durations) -> Result<(), Error> {
        let rows: Vec<(f64, u64)> = value.rows().collect();
        let (sum, count) = (value.sum.as_secs_f64(), value.count());
        self.row(labels, |row| row.encode_histogram::<NoLabelSet>(sum, count, &rows, None))
    }
}

/// Begins metrics by kind.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn family<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
        unit: Option<&'s Unit>,
        kind: MetricType,
    ) -> Result<Family<'s>, Error> {
        self.0.encode_descriptor(name, help, unit, kind).map(Family)
    }

    fn counter<'s>(&'s mut self, name: &'s str, help: &str) -> Result<Family<'s>, Error> {
        self.family(name, help, None, MetricType::Counter)
    }

    fn byte_counter<'s>(&'s mut self, name: &'s str, help: &str) -> Result<Family<'s>, Error> {
        self.family(name, help, Some(&Unit::Bytes), MetricType::Counter)
    }

    fn gauge<'s>(&'s mut self, name: &'s str, help: &str) -> Result<Family<'s>, Error> {
        self.family(name, help, None, MetricType::Gauge)
    }

    fn byte_gauge<'s>(&'s mut self, name: &'s str, help: &str) -> Result<Family<'s>, Error> {
        self.family(name, help, Some(&Unit::Bytes), MetricType::Gauge)
    }

    fn second_gauge<'s>(&'s mut self, name: &'s str, help: &str) -> Result<Family<'s>, Error> {
        self.family(name, help, Some(&Unit::Seconds), MetricType::Gauge)
    }

    fn histogram<'s>(&'s mut self, name: &'s str, help: &str) -> Result<Family<'s>, Error> {
        self.family(name, help, Some(&Unit::Seconds), MetricType::Histogram)
    }
}

impl Collector for Numbers {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut page = Page(encoder);
        self.mount(&mut page)?;
        self.risk(&mut page)?;
        self.caches(&mut page)?;
        self.heart(&mut page)?;
        self.store(&mut page)?;
        match &self.fuse {
            Some(fuse) => kernel(fuse, &mut page),
            None => Ok(()),
        }
    }
}

impl Numbers {
    fn mount(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let s = &self.status;
        let labels = [("version", s.version.as_str()), ("backend", s.backend.as_str())];
        page.family("build", "The program that serves the mount.", None, MetricType::Info)?
            .0
            .encode_info(&labels)?;
        page.second_gauge("start_time", "When the mount began, seconds since 1970.")?
            .gauge(NONE, u64::try_from(s.since).unwrap_or(0))?;
        page.gauge("stopping", "1 while the mount is being ended.")?
            .gauge(NONE, u64::from(s.stopping))?;
        page.gauge("users_open", "Users whose state is in memory.")?.gauge(NONE, s.users_open)?;
        if let Some(lease) = &s.lease {
            page.gauge("lease_held", "1 while this backend may write its users.")?
                .gauge(NONE, u64::from(lease.held))?;
        }
        Ok(())
    }

    fn risk(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let (risk, backlog) = (&self.status.at_risk, &self.status.backlog);
        let mut family = page.byte_gauge(
            "at_risk",
            "What would be lost with this machine's disk: index files of users with important \
             changes, mails promised to servers, mails that no server was told are safe.",
        )?;
        family.gauge(&[("kind", "changes")], risk.changed_bytes)?;
        family.gauge(&[("kind", "promised")], risk.promised_bytes)?;
        family.gauge(&[("kind", "unpublished")], risk.unpublished_bytes)?;
        page.gauge("promised_mails", "Mails acknowledged and only on this machine's disk.")?
            .gauge(NONE, risk.promised_mails)?;
        page.gauge("unpublished_mails", "Mails being written, acknowledged to no server.")?
            .gauge(NONE, risk.unpublished_mails)?;
        let mut family =
            page.gauge("backlog_users", "Users with changes that wait for a flush.")?;
        family.gauge(&[("changes", "important")], backlog.users_important)?;
        family.gauge(&[("changes", "unimportant")], backlog.users_unimportant)?;
        page.gauge("backlog_mails", "Mails in the store that are in no bundle yet; not at risk.")?
            .gauge(NONE, backlog.mails_newer_than_bundle)?;
        let mut family =
            page.second_gauge("oldest_unflushed_change_age", "0 when there is no such change.")?;
        family.gauge(&[("changes", "important")], risk.oldest_age.unwrap_or(0))?;
        family.gauge(&[("changes", "any")], backlog.oldest_age.unwrap_or(0))
    }

    fn caches(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let caches = &self.status.caches;
        let all: [(&str, &CacheUse); 3] = [
            ("fscache", &caches.fscache),
            ("metacache", &caches.metacache),
            ("staging", &caches.staging),
        ];
        let mut family = page.byte_gauge("cache_used", "Local disk in use by a cache.")?;
        for (name, cache) in all {
            family.gauge(&[("cache", name)], cache.used)?;
        }
        let mut family = page.byte_gauge("cache_limit", "What a cache may use.")?;
        for (name, cache) in all {
            family.gauge(&[("cache", name)], cache.max)?;
        }
        let mut family = page.gauge("cache_files", "Files in a cache, where they are counted.")?;
        for (name, cache) in all {
            cache.files.map_or(Ok(()), |files| family.gauge(&[("cache", name)], files))?;
        }
        let mut family = page.counter(
            "cache_hits",
            "Mails found in fscache; users and folders found in the metacache when opened.",
        )?;
        for (name, cache) in all {
            cache.hits.map_or(Ok(()), |hits| family.count(&[("cache", name)], hits))?;
        }
        let mut family = page.counter("cache_misses", "The same, read from the store instead.")?;
        for (name, cache) in all {
            cache.misses.map_or(Ok(()), |misses| family.count(&[("cache", name)], misses))?;
        }
        let mut family = page.counter("cache_evictions", "Files removed to make room.")?;
        for (name, cache) in all {
            cache.evictions.map_or(Ok(()), |n| family.count(&[("cache", name)], n))?;
        }
        let aside = &self.status.aside;
        page.byte_gauge("aside", "Changes kept on local disk for a person, in no budget.")?
            .gauge(NONE, aside.bytes)?;
        page.gauge("aside_users", "What that holds changes of.")?.gauge(NONE, aside.users)?;
        let mut family =
            page.byte_counter("cache_streamed", "Bytes read past a cache for want of room.")?;
        for (name, cache) in all {
            cache.streamed.map_or(Ok(()), |n| family.count(&[("cache", name)], n))?;
        }
        Ok(())
    }

    fn heart(&self, page: &mut Page<'_>) -> Result<(), Error> {
        let heart = &self.heart;
        let mut family =
            page.counter("flushes", "Flushes of users that had something to write.")?;
        family.count(&[("result", "done")], heart.flushes)?;
        family.count(&[("result", "failed")], heart.flushes_failed)?;
        page.byte_counter("flushed", "Bytes that flushes wrote to the store.")?
            .count(NONE, heart.flushed_bytes)?;
        page.histogram("flush_duration", "How long flushes took, those that failed included.")?
            .durations(NONE, &heart.flush_time)?;
        let mut family = page.counter("user_opens", "Users opened, by where their state was.")?;
        family.count(&[("from", "metacache")], heart.opens_local)?;
        family.count(&[("from", "store")], heart.opens_store)?;
        let mut family = page.counter("folder_loads", "Folders loaded, by where they were.")?;
        family.count(&[("from", "metacache")], heart.loads_local)?;
        family.count(&[("from", "store")], heart.loads_store)?;
        let mut family = page.counter(
            "metacache_evictions",
            "Users of whom index files of a priority left the local disk to make room.",
        )?;
        let priorities = ["0", "1", "2", "3"];
        for (priority, n) in priorities.into_iter().zip(heart.evictions) {
            family.count(&[("priority", priority)], n)?;
        }
        let mut family =
            page.byte_counter("metacache_evicted", "Local disk that this gave back.")?;
        for (priority, n) in priorities.into_iter().zip(heart.evicted_bytes) {
            family.count(&[("priority", priority)], n)?;
        }
        page.gauge("damaged", "Users and folders that are damaged and cannot be served.")?
            .gauge(NONE, self.status.damaged.len() as u64)?;
        page.counter("lost_mails", "Mails met that are named and gone from the store.")?
            .count(NONE, self.status.lost_mails)
    }

    fn store(&self, page: &mut Page<'_>) -> Result<(), Error> {
        page.gauge("store_up", "0 while the store fails and nothing is answered.")?
            .gauge(NONE, u64::from(self.health.down_for.is_none()))?;
        page.counter("store_outages", "Times that the store was down.")?
            .count(NONE, self.health.outages)?;
        page.family(
            "store_outage",
            "How long the store was down in all.",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?
        .seconds(NONE, self.health.down)?;
        if let Some(wire) = self.wire_requests {
            page.counter("store_wire_requests", "Requests sent, those of retries included.")?
                .count(NONE, wire)?;
        }
        let labels = |row: &CountRow| [("operation", row.op.name()), ("reason", row.reason)];
        let counters: [OfRows; 4] = [
            ("store_requests", "Requests to the store and why they were made.", |r| r.requests),
            ("store_errors", "Calls that failed after their retries.", |r| r.errors),
            (
                "store_refusals",
                "Calls answered with `no such object` or `condition does not hold`.",
                |r| r.refusals,
            ),
            ("store_abandoned", "Calls that nobody waited for to their end.", |r| r.abandoned),
        ];
        for (name, help, value) in counters {
            let mut family = page.counter(name, help)?;
            for row in &self.store {
                family.count(&labels(row), value(row))?;
            }
        }
        let volumes: [OfRows; 2] = [
            ("store_received", "Bytes of bodies read from the store.", |r| r.bytes_in),
            ("store_sent", "Bytes of bodies written to the store.", |r| r.bytes_out),
        ];
        for (name, help, value) in volumes {
            let mut family = page.byte_counter(name, help)?;
            for row in &self.store {
                family.count(&labels(row), value(row))?;
            }
        }
        let mut family = page.histogram(
            "store_call_duration",
            "How long calls of the store took with their retries; a listing may be many requests.",
        )?;
        for row in &self.store {
            family.durations(&labels(row), &row.time)?;
        }
        Ok(())
    }
}

fn kernel(fuse: &FuseStats, page: &mut Page<'_>) -> Result<(), Error> {
    let used: Vec<Op> = Op::ALL.iter().copied().filter(|op| fuse.requests(*op) > 0).collect();
    let labels = |op: Op| [("operation", op.name())];
    let mut family = page.counter("fuse_requests", "Requests of the kernel.")?;
    for op in &used {
        family.count(&labels(*op), fuse.requests(*op))?;
    }
    let mut family =
        page.counter("fuse_waits", "Requests of the kernel that waited for store or disk.")?;
    for op in &used {
        family.count(&labels(*op), fuse.waits(*op))?;
    }
    page.gauge("fuse_waiting", "Requests of the kernel that wait just now.")?
        .gauge(NONE, fuse.waiting())?;
    page.counter("fuse_passthrough_opens", "Opens whose reads the kernel serves by itself.")?
        .count(NONE, fuse.passthrough_opens())?;
    let mut family = page.counter("fuse_errors", "Errors told to the kernel.")?;
    for (op, errno, count) in fuse.errors() {
        let errno = errno_name(errno);
        family.count(&[("operation", op.name()), ("errno", errno.as_str())], count)?;
    }
    let mut family =
        page.histogram("fuse_request_duration", "From a request's arrival to its answer.")?;
    for op in used {
        let answers = fuse.answers(op);
        if answers.count() > 0 {
            family.durations(&labels(op), &answers)?;
        }
    }
    Ok(())
}

/// `ENOENT`; a number that has no name stays a number.
pub fn errno_name(errno: i32) -> String {
    match nix::errno::Errno::from_raw(errno) {
        nix::errno::Errno::UnknownErrno => errno.to_string(),
        known => format!("{known:?}"),
    }
}
