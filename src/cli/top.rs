//! `vmailfs top`: a status that renews itself, with rates instead of totals.

use super::exit::{Code, Failure};
use super::out;
use super::show::{age, at_risk, bytes, count, health, millis};
use super::talk::{ask, unexpected};
use crate::admin::{Answer, CacheUse, OperationCount, Request, RequestCount, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use std::fmt::Write as _;
use std::io::{IsTerminal, Read, Write as _};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Rows of each table at most.
const ROWS: usize = 10;

/// What is left when the view ends is the terminal as it was.
struct Screen {
    before: Termios,
}

impl Screen {
    fn take() -> Result<Screen, Failure> {
        let failed = |e: nix::Error| Failure::new(Code::OsErr, format!("the terminal: {e}"));
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        // Keys come one by one and are not shown. Ctrl-C comes as a key, too: the terminal is to
        // be left as it was.
        raw.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw).map_err(failed)?;
        let screen = Screen { before };
        // The other screen, without a cursor.
        out("\x1b[?1049h\x1b[?25l")?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = out("\x1b[?25h\x1b[?1049l");
        let _ = std::io::stdout().flush();
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Waits for a key, at most so long; whether it ends the view.
fn quits(within: Duration) -> Result<bool, Failure> {
    let stdin = std::io::stdin();
    let end = Instant::now() + within;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let millis = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(millis)) {
            Ok(0) => return Ok(false),
            Err(nix::Error::EINTR) => continue,
            Err(e) => return Err(Failure::new(Code::OsErr, format!("the terminal: {e}"))),
            Ok(_) => {}
        }
        let mut key = [0u8; 1];
        match stdin.lock().read(&mut key) {
            // The end of input, q, Ctrl-C, Ctrl-D.
            Ok(0) => return Ok(true),
            Ok(_) if matches!(key[0], b'q' | b'Q' | 3 | 4) => return Ok(true),
            Ok(_) => {}
            Err(e) => return Err(Failure::new(Code::IoErr, format!("the terminal: {e}"))),
        }
    }
}

fn look(socket: Option<&Path>, mountpoint: Option<&Path>) -> Result<Status, Failure> {
    match ask(socket, mountpoint, &Request::Status)? {
        Answer::Status(status) => Ok(*status),
        _ => Err(unexpected()),
    }
}

pub(super) fn top(
    mountpoint: Option<&Path>,
    socket: Option<&Path>,
    every: Duration,
    once: bool,
) -> Result<(), Failure> {
    let every = every.clamp(Duration::from_millis(100), Duration::from_secs(60));
    let mut before = (look(socket, mountpoint)?, Instant::now());
    if once {
        std::thread::sleep(every);
        let now = look(socket, mountpoint)?;
        return out(&page(&before.0, &now, before.1.elapsed(), usize::MAX));
    }
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        let text = "top needs a terminal; --once shows one view";
        return Err(Failure::new(Code::Usage, text));
    }
    let _screen = Screen::take()?;
    // The first view is there at once.
    let mut wait = Duration::ZERO;
    while !quits(wait)? {
        wait = every;
        let now = (look(socket, mountpoint)?, Instant::now());
        let text = page(&before.0, &now.0, now.1 - before.1, height());
        let mut screen = String::from("\x1b[H");
        for line in text.lines() {
            let _ = write!(screen, "{line}\x1b[K\r\n");
        }
        screen.push_str("\x1b[J");
        out(&screen)?;
        std::io::stdout().flush().map_err(|e| Failure::new(Code::IoErr, e.to_string()))?;
        before = now;
    }
    Ok(())
}

/// Lines of the terminal.
fn height() -> usize {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request fills in a winsize, which `size` is.
    let told = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    if told == 0 && size.ws_row > 0 { usize::from(size.ws_row) } else { 24 }
}

fn a_second(before: u64, now: u64, over: Duration) -> f64 {
    now.saturating_sub(before) as f64 / over.as_secs_f64().max(0.001)
}

/// The mean of what came between two looks.
fn mean_between(before: (u64, f64), now: (u64, f64)) -> f64 {
    let more = now.0.saturating_sub(before.0);
    if more == 0 {
        return 0.0;
    }
    let seconds = now.1 * now.0 as f64 - before.1 * before.0 as f64;
    (seconds / more as f64).max(0.0)
}

fn cache_line(name: &str, cache: &CacheUse) -> String {
    let percent = cache.used.saturating_mul(100).checked_div(cache.max).unwrap_or(0);
    let hits = cache.hit_ratio().map(|r| format!(" hits {:.0} %", r * 100.0)).unwrap_or_default();
    format!("{name} {} of {} ({percent} %){hits}", bytes(cache.used), bytes(cache.max))
}

fn operations(out: &mut String, before: &[OperationCount], now: &[OperationCount], over: Duration) {
    let none = OperationCount::default();
    let mut rows: Vec<_> = now
        .iter()
        .map(|op| {
            let old = before.iter().find(|b| b.operation == op.operation).unwrap_or(&none);
            let mean = mean_between((old.count, old.mean_seconds), (op.count, op.mean_seconds));
            (a_second(old.count, op.count, over), a_second(old.waited, op.waited, over), mean, op)
        })
        .collect();
    rows.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.3.operation.cmp(&b.3.operation)));
    let _ = writeln!(out, "\n{:<24} {:>9} {:>9} {:>11}", "KERNEL", "/S", "WAITED/S", "MEAN");
    for (rate, waited, mean, op) in rows.into_iter().take(ROWS) {
        let mean = millis(mean);
        let _ = writeln!(out, "{:<24} {rate:>9.1} {waited:>9.1} {mean:>11}", op.operation);
    }
}

fn requests(out: &mut String, before: &[RequestCount], now: &[RequestCount], over: Duration) {
    let none = RequestCount::default();
    let mut rows: Vec<_> = now
        .iter()
        .map(|r| {
            let same = |b: &&RequestCount| b.operation == r.operation && b.reason == r.reason;
            let old = before.iter().find(same).unwrap_or(&none);
            let volume = |r: &RequestCount| r.bytes_in.saturating_add(r.bytes_out);
            let moved = a_second(volume(old), volume(r), over) as u64;
            (a_second(old.count, r.count, over), moved, r.failed.saturating_sub(old.failed), r)
        })
        .collect();
    let name = |r: &RequestCount| format!("{} for {}", r.operation, r.reason);
    rows.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| name(a.3).cmp(&name(b.3))));
    let _ = writeln!(out, "\n{:<24} {:>9} {:>9} {:>11}", "STORE", "/S", "BYTES/S", "FAILED");
    for (rate, moved, failed, r) in rows.into_iter().take(ROWS) {
        let _ = writeln!(out, "{:<24} {rate:>9.1} {:>9} {failed:>11}", name(r), bytes(moved));
    }
}

/// One view: the latest numbers, and rates from those of a while ago.
fn page(before: &Status, now: &Status, over: Duration, lines: usize) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{} on {}   (q ends)", now.store, now.mountpoint);
    let _ = writeln!(out, "At risk: {}.", at_risk(&now.at_risk));
    let _ = write!(out, "Store: {}", health(&now.store_health));
    let waiting = now.backlog.users_important + now.backlog.users_unimportant;
    let _ = write!(out, "   Users: {} open, {waiting} with changes", now.users_open);
    let oldest = now.backlog.oldest_age.map(|a| format!(", the oldest {} old", age(a)));
    let _ = writeln!(out, "{}", oldest.unwrap_or_default());
    let caches = &now.caches;
    let _ = writeln!(out, "{}", cache_line("fscache", &caches.fscache));
    let _ = writeln!(out, "{}", cache_line("metacache", &caches.metacache));
    let _ = writeln!(out, "{}", cache_line("staging", &caches.staging));
    let flushes = a_second(before.flushes.done, now.flushes.done, over);
    let failed = now.flushes.failed.saturating_sub(before.flushes.failed);
    let _ = writeln!(out, "flushes {flushes:.1}/s, {failed} failed");
    requests(&mut out, &before.requests, &now.requests, over);
    operations(&mut out, &before.operations, &now.operations, over);
    if !now.users.is_empty() {
        let _ = writeln!(out, "\n{:<24} {:<11} {:>9}", "USER", "CHANGES", "OLDEST");
        for user in now.users.iter().take(ROWS) {
            let oldest = user.oldest_age.map_or_else(|| "-".to_owned(), age);
            let changes = user.changes.as_str();
            let _ = writeln!(out, "{:<24} {changes:<11} {oldest:>9}", user.user);
        }
        let more = now.users.len().saturating_sub(ROWS) as u64;
        if more > 0 {
            let _ = writeln!(out, "and {}", count(more, "more user"));
        }
    }
    if out.lines().count() > lines {
        let kept: Vec<&str> = out.lines().take(lines.saturating_sub(1)).collect();
        out = kept.join("\n") + "\n";
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(count: u64, bytes_in: u64) -> RequestCount {
        RequestCount {
            operation: "get".into(),
            reason: "fetch".into(),
            count,
            bytes_in,
            ..RequestCount::default()
        }
    }

    #[test]
    fn a_view_shows_rates_and_fits_the_terminal() {
        let read = |count, mean_seconds| OperationCount {
            operation: "read".into(),
            count,
            mean_seconds,
            ..OperationCount::default()
        };
        let before = Status {
            requests: vec![get(10, 1 << 20)],
            operations: vec![read(100, 0.001)],
            ..Status::default()
        };
        let now = Status {
            requests: vec![get(30, 3 << 20)],
            // Ten more, of 12 ms each.
            operations: vec![read(110, 0.002)],
            ..Status::default()
        };
        let text = page(&before, &now, Duration::from_secs(2), usize::MAX);
        let line = |start: &str| text.lines().find(|l| l.starts_with(start)).unwrap().to_owned();
        let words = |l: String| l.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(line("get for fetch")), ["get", "for", "fetch", "10.0", "1.0M", "0"]);
        assert_eq!(words(line("read")), ["read", "5.0", "0.0", "12.0", "ms"]);
        assert!(text.contains("At risk: nothing"));
        assert_eq!(page(&before, &now, Duration::from_secs(2), 5).lines().count(), 4);
        // A mount that was started anew in between: no rates below zero.
        let text = page(&now, &before, Duration::from_secs(2), usize::MAX);
        assert!(!text.contains('-'), "{text}");
    }
}
