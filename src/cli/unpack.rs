//! `metacache unpack`: a bundle as ordinary files, for inspection.
//!
//! Each frame of the bundle (a folder's part, a table, an earlier head) becomes a directory with
//! its number, so that parts of one folder do not overwrite one another. Names come from the
//! store: what would lie outside of the directory is refused.

use super::care::Source;
use super::exit::{Code, Failure};
use super::{out, show};
use crate::admin::care::{Care, Cared};
use crate::format::FormatError;
use crate::format::escape::is_name;
use crate::format::unpack::{LIMIT, frames};
use clap::Args;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(super) struct UnpackArgs {
    /// A file, or the key of a bundle in the store (<hh>/<user>/bundle/<id>.tar.zst).
    bundle: PathBuf,
    /// A new or empty directory.
    dir: PathBuf,
    #[command(flatten)]
    source: Source,
}

pub(super) fn unpack(args: &UnpackArgs) -> Result<(), Failure> {
    let cannot = |path: &Path, e: std::io::Error| {
        Failure::new(Code::CantCreate, format!("{}: {e}", path.display()))
    };
    match std::fs::create_dir(&args.dir) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let mut inside = std::fs::read_dir(&args.dir).map_err(|e| cannot(&args.dir, e))?;
            if inside.next().is_some() {
                let text = format!("{}: is not empty", args.dir.display());
                return Err(Failure::new(Code::CantCreate, text));
            }
        }
        made => made.map_err(|e| cannot(&args.dir, e))?,
    }
    let bytes = read(args)?;
    let (mut files, mut total) = (0, 0);
    let broken =
        |e: FormatError| Failure::new(Code::DataErr, format!("{}: {e}", args.bundle.display()));
    for (number, frame) in frames(&bytes).enumerate() {
        let dir = args.dir.join(format!("{number:04}"));
        for member in frame.map_err(broken)? {
            let path = place(&dir, &member.name).ok_or_else(|| {
                let name = String::from_utf8_lossy(&member.name);
                Failure::new(Code::DataErr, format!("a member's name is not allowed: {name:?}"))
            })?;
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|e| cannot(parent, e))?;
            }
            let mut options = std::fs::OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
            let mut file =
                options.write(true).create_new(true).open(&path).map_err(|e| cannot(&path, e))?;
            std::io::Write::write_all(&mut file, &member.content).map_err(|e| cannot(&path, e))?;
            files += 1;
            total += member.content.len() as u64;
        }
    }
    out(&format!(
        "{} ({}) in {}\n",
        show::count(files, "file"),
        show::bytes(total),
        args.dir.display()
    ))
}

/// Below `dir`, whatever the name says.
fn place(dir: &Path, name: &[u8]) -> Option<PathBuf> {
    let mut path = dir.to_owned();
    for part in name.split(|b| *b == b'/') {
        if part == b"." {
            continue;
        }
        if !is_name(part) {
            return None;
        }
        path.push(OsStr::from_bytes(part));
    }
    Some(path)
}

fn read(args: &UnpackArgs) -> Result<Vec<u8>, Failure> {
    let failed =
        |e: std::io::Error| Failure::new(Code::NoInput, format!("{}: {e}", args.bundle.display()));
    match std::fs::metadata(&args.bundle) {
        Ok(found) if found.len() > LIMIT => {
            Err(Failure::new(Code::DataErr, format!("{}: is too large", args.bundle.display())))
        }
        Ok(_) => std::fs::read(&args.bundle).map_err(failed),
        Err(e) if e.kind() == ErrorKind::NotFound && args.bundle.is_relative() => {
            let key = args.bundle.to_str().ok_or_else(|| failed(e))?;
            fetch(args, key)
        }
        Err(e) => Err(failed(e)),
    }
}

/// From the store, by way of a file beside those that come out of it.
fn fetch(args: &UnpackArgs, key: &str) -> Result<Vec<u8>, Failure> {
    let dir = std::path::absolute(&args.dir)
        .map_err(|e| Failure::new(Code::CantCreate, format!("{}: {e}", args.dir.display())))?;
    let to = dir.join(".bundle");
    let bundle = Care::Bundle { key: key.to_owned(), to: to.clone() };
    let asked = args.source.open(None)?.ask(bundle);
    let bytes = std::fs::read(&to);
    let _ = std::fs::remove_file(&to);
    match asked? {
        Cared::Bundle(_) => {
            bytes.map_err(|e| Failure::new(Code::IoErr, format!("{}: {e}", to.display())))
        }
        _ => Err(super::talk::unexpected()),
    }
}
