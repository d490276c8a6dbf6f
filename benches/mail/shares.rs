//! Whose processor time a measurement took: what was busy is what bounds it.

use crate::place::Place;
use crate::support::weed;
use crate::table::number;
use std::collections::BTreeMap;
use std::time::Instant;

/// The name of the threads of a [`crate::link::Link`].
pub const LINK: &str = "link";

/// Processor time so far, in ms.
#[derive(Debug, Clone)]
pub struct Used {
    at: Instant,
    by: BTreeMap<&'static str, f64>,
    /// That all processors of the machine were busy with anything.
    busy: f64,
}

#[derive(Debug)]
struct Process {
    pid: u32,
    parent: u32,
    group: u32,
    ms: f64,
}

/// A line of `/proc/.../stat`: the name, and the fields behind it.
fn stat(path: &str) -> Option<(String, Vec<String>)> {
    let text = std::fs::read_to_string(path).ok()?;
    let (before, after) = text.rsplit_once(')')?;
    let name = before.split_once('(')?.1.to_owned();
    Some((name, after.split_whitespace().map(str::to_owned).collect()))
}

fn tick() -> f64 {
    // SAFETY: a plain system call.
    1e3 / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}

/// User and system time in a line of `stat`.
fn ms(fields: &[String]) -> f64 {
    let of = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    (of(11) + of(12)) * tick()
}

fn processes() -> Vec<Process> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let Some((_, fields)) = stat(&format!("/proc/{pid}/stat")) else { continue };
        let of = |at: usize| fields.get(at).and_then(|f: &String| f.parse().ok()).unwrap_or(0);
        all.push(Process { pid, parent: of(1), group: of(2), ms: ms(&fields) });
    }
    all
}

fn with_children(all: &[Process], root: Option<u32>) -> f64 {
    let Some(root) = root else { return 0.0 };
    let mut pids = vec![root];
    let mut at = 0;
    while let Some(pid) = pids.get(at).copied() {
        pids.extend(all.iter().filter(|p| p.parent == pid).map(|p| p.pid));
        at += 1;
    }
    all.iter().filter(|p| pids.contains(&p.pid)).map(|p| p.ms).sum()
}

fn busy() -> f64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let fields: Vec<f64> = line.split_whitespace().skip(1).filter_map(|f| f.parse().ok()).collect();
    // All but idle and waiting for a disk; what guests use is in the first two already.
    let counted = [0, 1, 2, 5, 6];
    counted.iter().filter_map(|at| fields.get(*at)).sum::<f64>() * tick()
}

impl Used {
    pub fn now(place: Option<&Place>) -> Used {
        let all = processes();
        let mut by = BTreeMap::new();
        let (mut link, mut client) = (0.0, 0.0);
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            let path = task.path().join("stat").display().to_string();
            let Some((name, fields)) = stat(&path) else { continue };
            *(if name == LINK { &mut link } else { &mut client }) += ms(&fields);
        }
        by.insert("way", link);
        by.insert("client", client);
        by.insert("store", with_children(&all, weed::pid()));
        if let Some(place) = place {
            let group = place.dovecot.pid();
            let dovecot = all.iter().filter(|p| Some(p.group) == group).map(|p| p.ms).sum();
            by.insert("Dovecot", dovecot);
            by.insert("daemon", with_children(&all, place.mount().and_then(|m| m.pid())));
        }
        Used { at: Instant::now(), by, busy: busy() }
    }

    /// What was used since then, for people.
    pub fn since(&self, before: &Used, cpus: usize) -> String {
        let took = (self.at - before.at).as_secs_f64() * 1e3;
        let mut text = String::new();
        let mut ours = 0.0;
        for (name, ms) in &self.by {
            let used = ms - before.by.get(name).copied().unwrap_or(0.0);
            ours += used;
            text.push_str(&format!("{name} {}, ", number(used)));
        }
        let all = took * cpus as f64;
        let busy = self.busy - before.busy;
        format!(
            "processor, ms: {text}others {}; {:.0} % of {} busy",
            number((busy - ours).max(0.0)),
            busy / all * 100.0,
            number(all)
        )
    }
}
