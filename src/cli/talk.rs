//! Commands that talk to a running mount.

use super::bars::Watch;
use super::exit::{Code, Failure};
use super::{Target, out, show};
use crate::admin::caches::FlushRequest;
use crate::admin::client::{self, ClientError};
use crate::admin::{Answer, FlushReport, Request, place};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a daemon may take to end after it said that it is done.
const LAST_BREATH: Duration = Duration::from_secs(10);

pub(super) fn ask(
    socket: Option<&Path>,
    mountpoint: Option<&Path>,
    request: &Request,
) -> Result<Answer, Failure> {
    let socket = client::find(&place::run_dir(), socket, mountpoint)?;
    let mut watch = Watch::new();
    Ok(client::call(&socket, request, &mut |told| watch.told(told))?)
}

pub(super) fn ask_of(target: &Target, request: &Request) -> Result<Answer, Failure> {
    ask(target.socket.as_deref(), target.mountpoint.as_deref(), request)
}

pub(super) fn unexpected() -> Failure {
    Failure::new(Code::Software, "the mount answered something else than it was asked")
}

pub(super) fn status(
    mountpoint: Option<&Path>,
    socket: Option<&Path>,
    json: bool,
) -> Result<(), Failure> {
    let Answer::Status(status) = ask(socket, mountpoint, &Request::Status)? else {
        return Err(unexpected());
    };
    if json {
        let text = serde_json::to_string_pretty(&status)
            .map_err(|e| Failure::new(Code::Software, e.to_string()))?;
        return out(&format!("{text}\n"));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    out(&show::status(&status, now))
}

pub(super) fn flush(target: &Target, what: FlushRequest) -> Result<(), Failure> {
    flushed(ask_of(target, &Request::Flush(what))?)
}

fn flushed(answer: Answer) -> Result<(), Failure> {
    let Answer::Flush(report) = answer else {
        return Err(unexpected());
    };
    out(&show::flushed(&report))?;
    let FlushReport { failed, unknown, .. } = &report;
    let n = failed.len();
    if n == 0 {
        return match unknown.len() {
            0 => Ok(()),
            n => Err(Failure::new(Code::NoUser, format!("{n} of the names are no user's"))),
        };
    }
    Err(Failure::new(
        Code::TempFail,
        format!("{n} of the users could not be flushed; their changes are kept on local disk"),
    ))
}

pub(super) fn umount(mountpoint: &Path, socket: Option<&Path>) -> Result<(), Failure> {
    let mut watch = Watch::new();
    let result = client::find(&place::run_dir(), socket, Some(mountpoint))
        .and_then(|s| client::stop(&s, LAST_BREATH, &mut |told| watch.told(told)));
    match result {
        Ok(Answer::Stop(report)) => {
            let text = show::stopped(&report);
            if !text.is_empty() {
                let _ = write!(std::io::stderr(), "{text}");
            }
            if report.at_risk.nothing() {
                return Ok(());
            }
            Err(Failure::new(Code::TempFail, "unmounted, but not everything is in the store"))
        }
        Ok(_) => Err(unexpected()),
        Err(e @ (ClientError::NotFound(_) | ClientError::NotRunning { .. })) => {
            detach_dead(mountpoint, e)
        }
        Err(e) => Err(e.into()),
    }
}

/// For service managers: after the daemon's end, whatever it was, nothing may be left mounted.
pub(super) fn umount_dead(mountpoint: &Path) -> Result<(), Failure> {
    let path = absolute(mountpoint);
    if is_dead(&path) { detach(&path) } else { Ok(()) }
}

/// Whether it answers as a mount does whose daemon was killed.
fn is_dead(path: &Path) -> bool {
    std::fs::metadata(path)
        .is_err_and(|e| e.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32))
}

fn detach(path: &Path) -> Result<(), Failure> {
    nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH)
        .map_err(|e| Failure::new(Code::OsErr, format!("{}: cannot unmount: {e}", path.display())))
}

fn detach_dead(mountpoint: &Path, why: ClientError) -> Result<(), Failure> {
    let path = absolute(mountpoint);
    if !is_dead(&path) {
        return Err(why.into());
    }
    detach(&path)?;
    Err(Failure::new(
        Code::TempFail,
        format!(
            "{}: its daemon was gone; unmounted. What it had not flushed is on local disk and goes \
             to the store after the next mount",
            path.display()
        ),
    ))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
