//! `vmailfs mount`: from the command line to a mount that can start.
//!
//! Order matters. Everything that can be wrong with the request is found while we are still in
//! the foreground, so that one clear line and an exit code reach whoever asked. Going to the
//! background comes before the first thread is started: a fork keeps only one.

use super::exit::{Code, Failure};
use super::options::MountArgs;
use super::{logging, run};
use crate::cache::disk::{RealDisk, make_dirs};
use crate::config::Settings;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

pub(super) fn mount(args: &MountArgs) -> Result<(), Failure> {
    crate::memory::configure();
    let mut settings = args.effective()?.resolve()?;
    settings.take_backend = args.take_backend;
    super::heart::layout(&settings)?;
    let claim = prepare(&settings)?;
    logging::start(&settings.log, args.daemon, &settings.state_dir)?;
    run::run_mount(settings, claim, args.daemon)
}

/// The exclusive right to a state directory; held as long as the mount lives.
#[derive(Debug)]
pub(super) struct Claim {
    _lock: Flock<File>,
}

/// Checks the mount point, makes the local directories and claims them.
fn prepare(settings: &Settings) -> Result<Claim, Failure> {
    check_mountpoint(&settings.mountpoint, settings.nonempty)?;
    if let Err(e) = File::options().read(true).write(true).open("/dev/fuse") {
        let text = format!("/dev/fuse: {e}: load the fuse module, and mount as root");
        return Err(Failure::new(Code::Unavailable, text));
    }
    // Mails of all users: for nobody else's eyes.
    let make = |dir: &Path| DirBuilder::new().recursive(true).mode(0o700).create(dir);
    if settings.nfs().is_some() {
        // There are no caches; the lock and the socket need a place.
        make(&settings.state_dir).map_err(|e| cannot_make(&settings.state_dir, &e))?;
        return claim(&settings.state_dir);
    }
    for dir in [&settings.state_dir, &settings.staging.path, &settings.metacache.path] {
        make_dirs(&RealDisk, dir).map_err(|e| cannot_make(dir, &e))?;
    }
    for cache in &settings.fscache {
        match make(&cache.path) {
            // The others go on without it; the log says so.
            Err(_) if settings.fscache.len() > 1 => {}
            made => made.map_err(|e| cannot_make(&cache.path, &e))?,
        }
    }
    claim(&settings.state_dir)
}

fn cannot_make(dir: &Path, error: &io::Error) -> Failure {
    Failure::new(Code::CantCreate, format!("{}: cannot make it: {error}", dir.display()))
}

fn check_mountpoint(path: &Path, nonempty: bool) -> Result<(), Failure> {
    let say = |code, text: String| Err(Failure::new(code, format!("{}: {text}", path.display())));
    let here = match std::fs::metadata(path) {
        Ok(m) => m,
        Err(e) => return say(Code::Unavailable, format!("{e}: name an existing directory")),
    };
    if !here.is_dir() {
        return say(Code::Usage, "not a directory: name one to mount on".to_owned());
    }
    let above = path.parent().and_then(|p| std::fs::metadata(p).ok());
    if above.is_some_and(|a| a.dev() != here.dev() || a.ino() == here.ino()) {
        return say(
            Code::Unavailable,
            "something is mounted there already: unmount it first".to_owned(),
        );
    }
    // Mail that a server delivered while nothing was mounted would vanish from sight.
    if !nonempty && std::fs::read_dir(path).is_ok_and(|mut d| d.next().is_some()) {
        let text = "not empty, and mounting would hide what it holds: move that away, or give \
                    option nonempty";
        return say(Code::Unavailable, text.to_owned());
    }
    Ok(())
}

fn claim(state_dir: &Path) -> Result<Claim, Failure> {
    let path = state_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Failure::new(Code::CantCreate, format!("{}: {e}", path.display())))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Claim { _lock: lock }),
        Err((_, e)) if io::Error::from(e).kind() == io::ErrorKind::WouldBlock => Err(Failure::new(
            Code::TempFail,
            format!("{}: another vmailfs uses it: give each mount its own", state_dir.display()),
        )),
        Err((_, e)) => Err(Failure::new(Code::OsErr, format!("{}: {e}", path.display()))),
    }
}
