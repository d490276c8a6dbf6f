//! The ext4 to compare with: a directory of the disk that also has the mounts' local state, if that
//! is ext4. Else, and where its caches must be emptied without emptying anybody else's, a file
//! system of its own in a file, mounted through a loop device that goes past the page cache below.

use crate::support::scratch;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = 4 << 30;

#[derive(Debug)]
pub struct Disk {
    work: tempfile::TempDir,
    device: Option<String>,
}

impl Disk {
    pub fn directory() -> Disk {
        let work = scratch("ext4");
        let about = nix::sys::statfs::statfs(work.path()).unwrap();
        if about.filesystem_type() == nix::sys::statfs::EXT4_SUPER_MAGIC {
            Disk { work, device: None }
        } else {
            Disk::image()
        }
    }

    pub fn image() -> Disk {
        let work = scratch("ext4");
        let image = work.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        let text = image.display().to_string();
        run("mkfs.ext4", &["-q", "-F", &text]);
        let device =
            run("losetup", &["--find", "--show", "--direct-io=on", &text]).trim().to_owned();
        let disk = Disk { work, device: Some(device) };
        std::fs::create_dir(disk.mountpoint()).unwrap();
        disk.mount();
        disk
    }

    fn mountpoint(&self) -> PathBuf {
        self.work.path().join("mnt")
    }

    pub fn path(&self) -> PathBuf {
        match self.device {
            Some(_) => self.mountpoint(),
            None => self.work.path().to_owned(),
        }
    }

    fn mount(&self) {
        let Some(device) = &self.device else { return };
        run("mount", &["-t", "ext4", device, &path_text(&self.mountpoint())]);
    }

    /// Empties the kernel's caches of it.
    pub fn cold(&self) {
        assert!(self.device.is_some(), "only those of a file system of its own");
        run("umount", &[&path_text(&self.mountpoint())]);
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let Some(device) = &self.device else { return };
        // A measurement that failed may have left it busy.
        let mountpoint = path_text(&self.mountpoint());
        for (program, arguments) in
            [("umount", vec!["-l", &*mountpoint]), ("losetup", vec!["-d", device])]
        {
            if let Err(error) = Command::new(program).args(&arguments).status() {
                eprintln!("{program} {arguments:?}: {error}");
            }
        }
    }
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

/// Runs a program of the system, which must succeed; what it wrote.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
