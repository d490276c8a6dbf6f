//! A private Dovecot: own configuration, ports and processes; nothing of the system's is touched.

use super::check::{Problem, Seen, Tolerance, compare, look};
use super::imap::Imap;
use super::lmtp::Lmtp;
use super::model::Model;
use super::{MAIL_UID, Outcome, die_with_parent, fail, scratch, wait_until};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Maildir,
    Sdbox,
    Mdbox,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Format::Maildir => "maildir",
            Format::Sdbox => "sdbox",
            Format::Mdbox => "mdbox",
        }
    }
}

/// Where Dovecot puts what.
#[derive(Debug, Clone)]
pub struct Layout {
    pub format: Format,
    /// `mail_location`.
    pub location: String,
    /// A user's home below the root, with Dovecot's variables.
    pub home: String,
    /// Further settings.
    pub settings: String,
}

impl Layout {
    /// Mails and indexes each in a directory of their own in the home `ROOT/user`.
    pub fn usual(format: Format) -> Layout {
        Layout::new(format, &format!("{}:~/mail:INDEX=~/index", format.name()))
    }

    pub fn new(format: Format, location: &str) -> Layout {
        Layout {
            format,
            location: location.to_owned(),
            home: "%u".to_owned(),
            settings: String::new(),
        }
    }

    pub fn setting(mut self, line: &str) -> Layout {
        self.settings.push_str(line);
        self.settings.push('\n');
        self
    }

    pub fn home(mut self, home: &str) -> Layout {
        self.home = home.to_owned();
        self
    }
}

#[derive(Debug)]
pub struct Dovecot {
    work: tempfile::TempDir,
    pub layout: Layout,
    pub users: Vec<String>,
    pub imap_port: u16,
    pub lmtp_port: u16,
    child: Option<Child>,
    /// Where in the log the run since the last start begins.
    log_start: u64,
}

impl Dovecot {
    /// Configures and starts an instance whose homes are below `root`, which the mail processes
    /// must be able to write to.
    pub fn start(root: &Path, layout: &Layout, users: &[String]) -> Outcome<Dovecot> {
        let work = scratch("dovecot");
        let mut dovecot = Dovecot {
            work,
            layout: layout.clone(),
            users: users.to_vec(),
            imap_port: 0,
            lmtp_port: 0,
            child: None,
            log_start: 0,
        };
        for name in ["run", "state"] {
            std::fs::create_dir(dovecot.path(name))?;
        }
        let lines: Vec<String> = users.iter().map(|u| format!("{u}:{{PLAIN}}pw\n")).collect();
        std::fs::write(dovecot.path("users"), lines.concat())?;
        dovecot.choose_ports(root)?;
        dovecot.resume(root)?;
        Ok(dovecot)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// Both ports are held until both are known, so that they differ.
    fn choose_ports(&mut self, root: &Path) -> Outcome<()> {
        let (imap, lmtp) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        self.imap_port = imap.local_addr()?.port();
        self.lmtp_port = lmtp.local_addr()?.port();
        Ok(std::fs::write(self.path("dovecot.conf"), self.configuration(root))?)
    }

    fn configuration(&self, root: &Path) -> String {
        let (work, root) = (self.work.path().display(), root.display());
        let Layout { location, home, settings, .. } = &self.layout;
        let (imap_port, lmtp_port) = (self.imap_port, self.lmtp_port);
        format!(
            r#"
base_dir = {work}/run
state_dir = {work}/state
instance_name = test-{imap_port}
log_path = {work}/dovecot.log
protocols = imap lmtp
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain
mail_location = {location}
first_valid_uid = 0
first_valid_gid = 0
mail_max_userip_connections = 0
passdb {{
  driver = passwd-file
  args = username_format=%u {work}/users
}}
userdb {{
  driver = static
  args = uid={MAIL_UID} gid={MAIL_UID} home={root}/{home}
}}
namespace inbox {{
  inbox = yes
  separator = /
}}
{settings}
service imap-login {{
  chroot =
  service_count = 0
  inet_listener imap {{
    address = 127.0.0.1
    port = {imap_port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service lmtp {{
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {lmtp_port}
  }}
}}
"#
        )
    }

    /// Starts it again after [`Dovecot::stop`] or [`Dovecot::kill9`].
    pub fn resume(&mut self, root: &Path) -> Outcome<()> {
        // Another process may have taken a port since it was chosen.
        for _ in 0..3 {
            self.log_start = self.log_size();
            if self.launch()? {
                return Ok(());
            }
            self.kill9();
            self.choose_ports(root)?;
        }
        fail(format!("Dovecot does not start: {}", self.log_text(self.log_start)))
    }

    /// The first process, whose group all others are in, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub fn resume_unless_running(&mut self, root: &Path) -> Outcome<()> {
        if self.is_running() { Ok(()) } else { self.resume(root) }
    }

    fn launch(&mut self) -> Outcome<bool> {
        let output = std::fs::File::create(self.path("output"))?;
        let mut command = Command::new("dovecot");
        command.arg("-F").arg("-c").arg(self.path("dovecot.conf"));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output).process_group(0);
        die_with_parent(&mut command, libc::SIGTERM);
        // SAFETY: a plain system call. Orphans of the instance become children of this process.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
        let mut child = command.spawn()?;
        let ready = wait_until(Duration::from_secs(60), || {
            let gone = matches!(child.try_wait(), Ok(Some(_)) | Err(_));
            gone || (Imap::connect(self.imap_port, Duration::from_secs(5)).is_ok()
                && Lmtp::connect(self.lmtp_port).is_ok())
        });
        let alive = matches!(child.try_wait(), Ok(None));
        self.child = Some(child);
        Ok(ready && alive)
    }

    /// Ends it in its own way, and whatever is left of its process group after that: sessions that
    /// are at work outlive the server. False if there were any.
    pub fn stop(&mut self) -> bool {
        self.end(libc::SIGTERM, Duration::from_secs(60))
    }

    /// Ends it as a crash would.
    pub fn kill9(&mut self) {
        self.end(libc::SIGKILL, Duration::ZERO);
    }

    /// Whether the signal was enough.
    fn end(&mut self, signal: libc::c_int, patience: Duration) -> bool {
        let Some(mut child) = self.child.take() else { return true };
        let pid = child.id() as libc::pid_t;
        // SAFETY: plain system calls; the process and its group are ours until it is reaped.
        unsafe { libc::kill(pid, signal) };
        let by_itself = wait_until(patience, || reaped(&mut child));
        let gone = wait_until(Duration::from_secs(60), || {
            // SAFETY: as above.
            unsafe { libc::kill(-pid, libc::SIGKILL) };
            reaped(&mut child)
        });
        assert!(gone, "processes of Dovecot's group {pid} do not end");
        by_itself
    }

    /// Runs `doveadm` with this instance's configuration: whether it succeeded, and its output.
    pub fn doveadm(&self, args: &[&str]) -> Outcome<(bool, String)> {
        let mut command = Command::new("doveadm");
        command.arg("-c").arg(self.path("dovecot.conf")).args(args).stdin(Stdio::null());
        let output = command.output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    }

    fn log_size(&self) -> u64 {
        std::fs::metadata(self.path("dovecot.log")).map_or(0, |m| m.len())
    }

    fn log_text(&self, from: u64) -> String {
        let mut text = Vec::new();
        if let Ok(mut file) = std::fs::File::open(self.path("dovecot.log")) {
            let _ = file.seek(SeekFrom::Start(from)).and_then(|_| file.read_to_end(&mut text));
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Keeps the log of all runs for a person.
    pub fn copy_log(&self, to: &Path) {
        let _ = std::fs::copy(self.path("dovecot.log"), to);
    }

    /// Whether the log of all runs has a line with `text`.
    pub fn ever_said(&self, text: &str) -> bool {
        self.log_text(0).contains(text)
    }

    /// What was logged up to now is no longer looked at.
    pub fn forget_log(&mut self) {
        self.log_start = self.log_size();
    }

    /// Lines of the log since the last start that tell of trouble.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.log_text(self.log_start);
        let bad = ["Error:", "Panic:", "Fatal:", "Warning:", "Corrupted"];
        // Those who are still there when it is stopped are told so.
        // A busy machine is no trouble of ours.
        let usual = ["SIGTERM", "Killed with signal", "server shut down", "Time moved forwards"];
        let lines = log.lines().filter(|l| bad.iter().any(|b| l.contains(b)));
        lines.filter(|l| !usual.iter().any(|u| l.contains(u))).map(str::to_owned).collect()
    }

    pub fn ports(&self) -> Ports {
        Ports { imap: self.imap_port, lmtp: self.lmtp_port }
    }

    pub fn imap(&self, user: &str) -> Outcome<Imap> {
        self.ports().imap(user)
    }

    pub fn look(&self) -> Outcome<BTreeMap<String, Seen>> {
        look(self.imap_port, &self.users)
    }

    /// Compares what IMAP shows with the model.
    pub fn check(&self, model: &Model, tolerance: Tolerance) -> Outcome<Vec<Problem>> {
        Ok(compare(model, &self.look()?, tolerance))
    }
}

/// Whether the leader and all others of its process group have ended; reaps them. A zombie
/// would do harm: Dovecot waits minutes for a lock file of a process that seems to live.
fn reaped(leader: &mut Child) -> bool {
    if matches!(leader.try_wait(), Ok(None)) {
        return false;
    }
    let group = -(leader.id() as libc::pid_t);
    // SAFETY: plain system calls; orphans of the group are children of this process.
    unsafe { while libc::waitpid(group, std::ptr::null_mut(), libc::WNOHANG) > 0 {} }
    // SAFETY: signal 0 only asks.
    unsafe { libc::kill(group, 0) != 0 }
}

/// Where clients connect to: it outlives the instance, as clients of a crashed server do.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    pub imap: u16,
    pub lmtp: u16,
}

impl Ports {
    pub fn imap(self, user: &str) -> Outcome<Imap> {
        Imap::login(self.imap, user)
    }

    pub fn lmtp(self) -> Outcome<Lmtp> {
        Lmtp::connect(self.lmtp)
    }
}

impl Drop for Dovecot {
    fn drop(&mut self) {
        self.kill9();
    }
}
