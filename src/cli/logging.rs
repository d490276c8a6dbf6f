//! Where the log goes and what it looks like.

use super::exit::{Code, Failure};
use crate::config::{Log, LogFormat};
use parking_lot::Mutex;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

const DEV_LOG: &str = "/dev/log";

/// Sets up logging for the process; `log` records of libraries are included.
pub(super) fn start(log: &Log, daemon: bool, state_dir: &Path) -> Result<(), Failure> {
    let filter = EnvFilter::builder().parse(levels(&log.level)).map_err(|e| {
        Failure::new(
            Code::Config,
            format!("log.level `{}`: {e}: use error, warn, info, debug or trace", log.level),
        )
    })?;
    let default_file = state_dir.join("vmailfs.log");
    let to = match log.to.as_deref() {
        Some(to) => to.to_owned(),
        None if !daemon => "stderr".to_owned(),
        None if Path::new(DEV_LOG).exists() => "syslog".to_owned(),
        None => default_file.to_string_lossy().into_owned(),
    };
    // The journal and syslog put the time in front themselves.
    let (sink, dated) = match to.as_str() {
        "stderr" => (Sink::Stderr, std::env::var_os("JOURNAL_STREAM").is_none()),
        "syslog" => (Sink::Syslog(Arc::new(Syslog::default())), false),
        path => {
            let file = File::options()
                .append(true)
                .create(true)
                .open(path)
                .map_err(|e| Failure::new(Code::CantCreate, format!("log.to {path}: {e}")))?;
            (Sink::File(Arc::new(file)), true)
        }
    };
    let ansi = matches!(sink, Sink::Stderr) && io::stderr().is_terminal();
    let base = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(ansi).with_writer(sink);
    let done = match (log.format, dated) {
        (LogFormat::Json, _) => base.json().flatten_event(true).try_init(),
        (LogFormat::Text, true) => base.try_init(),
        (LogFormat::Text, false) => base.without_time().try_init(),
    };
    done.map_err(|e| Failure::new(Code::Software, format!("cannot start logging: {e}")))
}

/// Where AWS's library looks for credentials and a region, and does not find them, is told by the
/// error that this ends in; who wants to know more asks for `debug`, or for this module.
fn levels(wanted: &str) -> String {
    match wanted {
        "info" | "warn" => format!("{wanted},aws_config=error"),
        _ => wanted.to_owned(),
    }
}

#[derive(Debug, Clone)]
enum Sink {
    Stderr,
    File(Arc<File>),
    Syslog(Arc<Syslog>),
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Box<dyn Write + 'a>;

    fn make_writer(&'a self) -> Self::Writer {
        match self {
            Sink::Stderr => Box::new(io::stderr()),
            Sink::File(file) => Box::new(file.as_ref()),
            Sink::Syslog(log) => Box::new(Line { log, severity: 6 }),
        }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        let severity = match *meta.level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        match self {
            Sink::Syslog(log) => Box::new(Line { log, severity }),
            _ => self.make_writer(),
        }
    }
}

/// The local syslog socket, reconnected when the syslog daemon was restarted. What cannot be
/// sent is dropped: a full log must not stop mail.
#[derive(Debug, Default)]
struct Syslog(Mutex<Option<UnixDatagram>>);

/// Facility mail.
const FACILITY: u8 = 2;

impl Syslog {
    fn send(&self, severity: u8, text: &[u8]) {
        let mut message = format!("<{}>vmailfs[{}]: ", FACILITY * 8 + severity, std::process::id());
        message.push_str(String::from_utf8_lossy(text).trim_end());
        let mut socket = self.0.lock();
        for _ in 0..2 {
            if socket.is_none() {
                *socket = UnixDatagram::unbound()
                    .ok()
                    .filter(|s| s.connect(DEV_LOG).is_ok() && s.set_nonblocking(true).is_ok());
            }
            match socket.as_ref().map(|s| s.send(message.as_bytes())) {
                Some(Ok(_)) | None => return,
                Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => return,
                Some(Err(_)) => *socket = None,
            }
        }
    }
}

#[derive(Debug)]
struct Line<'a> {
    log: &'a Syslog,
    severity: u8,
}

impl Write for Line<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.log.send(self.severity, text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
