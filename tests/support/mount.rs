//! The mount under test: the built program, run as an administrator would.

use super::{MAIL_UID, Outcome, die_with_parent, fail, scratch, wait_until};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How the daemon says that it is ready, the admin socket included.
const MOUNTED: &str = ": mounted store=";

/// The program under test; VMAILFS_PROGRAM names another build of it.
fn program() -> OsString {
    std::env::var_os("VMAILFS_PROGRAM").unwrap_or_else(|| env!("CARGO_BIN_EXE_vmailfs").into())
}

/// A store, a mount point and the local state between them; mounted or not.
#[derive(Debug)]
pub struct Mount {
    work: tempfile::TempDir,
    state: PathBuf,
    store: String,
    options: Vec<OsString>,
    environment: Vec<(String, String)>,
    root_may_delete: bool,
    child: Option<Child>,
    /// The next mount is another machine's, and whoever made it knows that the last one is dead.
    fresh: AtomicBool,
}

impl Mount {
    /// On a directory of its own as the store (`file://`).
    pub fn on_directory() -> Mount {
        let work = scratch("mount");
        let store = format!("file://{}", work.path().join("store").display());
        std::fs::create_dir(work.path().join("store")).unwrap();
        Mount::new(work, store)
    }

    /// On a bucket of an S3 server at `endpoint`.
    pub fn on_s3(endpoint: &str, bucket: &str, access_key: &str, secret_key: &str) -> Mount {
        let mut mount = Mount::new(scratch("mount"), format!("s3://{bucket}/prefix"));
        mount.environment.extend([
            ("AWS_ACCESS_KEY_ID".into(), access_key.to_owned()),
            ("AWS_SECRET_ACCESS_KEY".into(), secret_key.to_owned()),
            ("AWS_REGION".into(), "us-east-1".into()),
            ("AWS_EC2_METADATA_DISABLED".into(), "true".into()),
        ]);
        mount.option(&["--s3-endpoint", endpoint, "--s3-path-style"])
    }

    /// Of a directory as if it were on NFS, by a host of this name with a `/dev/shm` of its own.
    pub fn on_nfs(nfs: &Path, host: &str) -> Mount {
        let work = scratch("nfs");
        let shm = work.path().join("shm").display().to_string();
        std::fs::create_dir(work.path().join("shm")).unwrap();
        Mount::new(work, format!("nfs://{}", nfs.display())).option(&[
            "--backend",
            host,
            "--set",
            &format!("hostchange.listindex_root={shm}/list"),
        ])
    }

    /// Another machine with the same configuration.
    pub fn twin(&self) -> Mount {
        let mut twin = Mount::new(scratch("mount"), self.store.clone());
        let own = |(name, _): &&(String, String)| name != "VMAILFS_RUN_DIR";
        twin.environment.extend(self.environment.iter().filter(own).cloned());
        twin.options.clone_from(&self.options);
        twin
    }

    fn new(work: tempfile::TempDir, store: String) -> Mount {
        for name in ["mnt", "state", "run"] {
            std::fs::create_dir(work.path().join(name)).unwrap();
        }
        let run = work.path().join("run").display().to_string();
        let environment = vec![("VMAILFS_RUN_DIR".to_owned(), run)];
        Mount {
            state: work.path().join("state"),
            work,
            store,
            options: Vec::new(),
            environment,
            root_may_delete: true,
            child: None,
            fresh: AtomicBool::new(false),
        }
    }

    /// More arguments for `vmailfs mount`.
    pub fn option(mut self, arguments: &[&str]) -> Mount {
        self.options.extend(arguments.iter().map(OsString::from));
        self
    }

    /// With its keys to the store in a file, as AWS tools have them, and not in the environment.
    pub fn keys_in(mut self, file: &Path) -> Mount {
        self.environment.retain(|(name, _)| !name.contains("_KEY"));
        let file = file.display().to_string();
        self.environment.push(("AWS_SHARED_CREDENTIALS_FILE".to_owned(), file));
        self
    }

    /// As an administrator gets it who does not ask for more.
    pub fn root_may_not_delete(mut self) -> Mount {
        self.root_may_delete = false;
        self
    }

    /// The mount point.
    pub fn root(&self) -> PathBuf {
        self.work.path().join("mnt")
    }

    /// What it is a mount of.
    pub fn store(&self) -> &str {
        &self.store
    }

    /// Where caches, journals and staging are.
    pub fn state(&self) -> PathBuf {
        self.state.clone()
    }

    /// With its caches, journals and staging in another directory.
    pub fn state_in(mut self, dir: &Path) -> Mount {
        self.state = dir.to_owned();
        self
    }

    /// A variable for every later command.
    pub fn variable(mut self, name: &str, value: &str) -> Mount {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Where a file may be put beside the mount point and the state.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }

    /// The daemon's process, while it is mounted.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(program());
        command.arg(verb).stdin(Stdio::null());
        command.envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Begins to mount, in the foreground of a child.
    pub fn start(&self) -> Outcome<Child> {
        let log_path = self.work.path().join("daemon.log");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&log_path)?;
        let mut command = self.command("mount");
        command.arg(&self.store).arg(self.root()).arg("--state-dir").arg(self.state());
        command.args(["--root-owner", &format!("{MAIL_UID}:{MAIL_UID}")]);
        if self.root_may_delete {
            command.arg("--allow-root-delete");
        }
        if self.fresh.swap(false, Ordering::Relaxed) {
            command.arg("--take-backend");
        }
        command.args(&self.options).stdout(log.try_clone()?).stderr(log);
        die_with_parent(&mut command, libc::SIGTERM);
        Ok(command.spawn()?)
    }

    /// Mounts, and waits until it is there and says so.
    pub fn mount(&mut self) -> Outcome<()> {
        let told = self.log().matches(MOUNTED).count();
        let mut child = self.start()?;
        let root = self.root();
        let ready = wait_until(Duration::from_secs(120), || {
            self.log().matches(MOUNTED).count() > told && is_mounted(&root)
                || matches!(child.try_wait(), Ok(Some(_)) | Err(_))
        });
        let ended = child.try_wait()?;
        self.child = Some(child);
        if ready && ended.is_none() {
            return Ok(());
        }
        let log = self.log();
        self.kill9();
        fail(format!("vmailfs mount: {ended:?}\n{log}"))
    }

    /// What the daemon has written so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.work.path().join("daemon.log")).unwrap_or_default()
    }

    /// `vmailfs umount`; fails unless it succeeds and the daemon then ends with 0.
    pub fn umount(&mut self) -> Outcome<()> {
        let output = self.command("umount").arg(self.root()).output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            return fail(format!("vmailfs umount: {}\n{text}", output.status));
        }
        let Some(mut child) = self.child.take() else { return Ok(()) };
        if !wait_until(Duration::from_secs(60), || !matches!(child.try_wait(), Ok(None))) {
            self.child = Some(child);
            return fail("the daemon is still there after umount");
        }
        let status = child.wait()?;
        if !status.success() || is_mounted(&self.root()) {
            return fail(format!("umount left {status}\n{}", self.log()));
        }
        Ok(())
    }

    /// Ends the daemon without a chance to do anything, and takes the dead mount away.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        while is_mounted(&self.root()) {
            let flags = nix::mount::MntFlags::MNT_DETACH;
            if nix::mount::umount2(&self.root(), flags).is_err() {
                break;
            }
        }
    }

    /// Ends the daemon as above but leaves the dead mount for those who still use it.
    pub fn kill9_only(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The daemon's process, known by its program, its mount point and its being alive. A test
    /// that kills something else must not pass.
    pub fn running(&mut self) -> Outcome<u32> {
        let Some(child) = &mut self.child else { return fail("no daemon was started") };
        if let Some(status) = child.try_wait()? {
            return fail(format!("the daemon has ended: {status}"));
        }
        let pid = child.id();
        let program = std::fs::read_link(format!("/proc/{pid}/exe"))?;
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline"))?;
        let root = self.root();
        let mounts = arguments.split(|b| *b == 0).any(|a| a == root.as_os_str().as_encoded_bytes());
        if program != std::fs::canonicalize(self::program())? || !mounts {
            return fail(format!("process {pid} is {} and not the daemon", program.display()));
        }
        Ok(pid)
    }

    /// Kills the daemon, which must be alive, and leaves the dead mount.
    pub fn shoot(&mut self) -> Outcome<()> {
        self.running()?;
        if let Some(child) = &mut self.child {
            child.kill()?;
        }
        self.must_have_been_shot(Duration::from_secs(60))
    }

    /// Waits for the daemon's end, which must be by SIGKILL.
    pub fn must_have_been_shot(&mut self, limit: Duration) -> Outcome<()> {
        use std::os::unix::process::ExitStatusExt;
        let Some(child) = &mut self.child else { return fail("no daemon was started") };
        if !wait_until(limit, || !matches!(child.try_wait(), Ok(None))) {
            return fail("the daemon does not die");
        }
        match child.wait()?.signal() {
            Some(libc::SIGKILL) => Ok(()),
            _ => fail(format!("the daemon was not killed: {}\n{}", child.wait()?, self.log())),
        }
    }

    /// What this machine had is gone: its next mount does not wait for the one before.
    pub fn is_fresh(&self) {
        self.fresh.store(true, Ordering::Relaxed);
    }

    /// Removes both caches, journals and staging: what a fresh machine does not have.
    pub fn wipe_state(&self) -> Outcome<()> {
        self.is_fresh();
        std::fs::remove_dir_all(self.state())?;
        std::fs::remove_dir_all(self.work.path().join("run"))?;
        std::fs::create_dir(self.work.path().join("run"))?;
        Ok(std::fs::create_dir(self.state())?)
    }

    /// The same with what was there kept aside until the end: a file system without a journal does not
    /// give inodes again that were free for less than a minute, and searches long for others.
    pub fn set_state_aside(&self) -> Outcome<()> {
        self.is_fresh();
        for name in ["state", "run"] {
            let place = if name == "state" { self.state() } else { self.work.path().join(name) };
            let aside = (0..).map(|n| place.with_extension(format!("{n}"))).find(|p| !p.exists());
            std::fs::rename(&place, aside.expect("a name that is free"))?;
            std::fs::create_dir(&place)?;
        }
        Ok(())
    }

    /// Removes the cached mails only.
    pub fn empty_fscache(&self) -> Outcome<()> {
        let cache = self.state().join("fscache");
        if cache.exists() {
            std::fs::remove_dir_all(cache)?;
        }
        Ok(())
    }

    /// The exit code of another command, what it writes to its standard output, and the rest.
    pub fn exit_of(&self, arguments: &[&str]) -> Outcome<(Option<i32>, String, String)> {
        let Some((verb, rest)) = arguments.split_first() else { return fail("no command") };
        let output = self.command(verb).args(rest).output()?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
    }

    /// Starts another command with these as its input, output and error output.
    pub fn spawn(&self, arguments: &[&str], ends: [Stdio; 3]) -> Outcome<Child> {
        let Some((verb, rest)) = arguments.split_first() else { return fail("no command") };
        let [input, output, errors] = ends;
        let mut command = self.command(verb);
        Ok(command.args(rest).stdin(input).stdout(output).stderr(errors).spawn()?)
    }

    /// Runs another command of the program, with this mount's environment.
    pub fn vmailfs(&self, arguments: &[&str]) -> Outcome<(bool, String)> {
        let Some((verb, rest)) = arguments.split_first() else { return fail("no command") };
        let output = self.command(verb).args(rest).output()?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// A mount with one user's directory, in which anything may be done.
pub fn mounted_home() -> Outcome<(Mount, PathBuf)> {
    let mut mount = Mount::on_directory();
    mount.mount()?;
    let home = mount.root().join("someone");
    std::fs::create_dir(&home)?;
    Ok((mount, home))
}

/// Whether something is mounted exactly there, alive or not.
pub fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let path = path.as_os_str().to_string_lossy();
    table.lines().any(|line| line.split(' ').nth(4) == Some(&*path))
}
