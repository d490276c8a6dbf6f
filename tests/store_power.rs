//! The directory store on an ext4 whose journal is cut off while objects are put, as a power loss
//! does: what was answered is there, and what has a name has all its bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use bytes::Bytes;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmailfs::store::dir::DirStore;
use vmailfs::store::{Body, ObjectStore, PutMode, Reason};

const WHY: Reason = Reason("test");
const ROUNDS: u64 = 12;

nix::ioctl_read!(shutdown, b'X', 125, u32);
/// Nothing that is not in the journal gets there any more.
const WITHOUT_FLUSHING: u32 = 2;

fn run(program: &str, arguments: &[&str]) -> bool {
    Command::new(program).args(arguments).status().unwrap().success()
}

/// A file system in a file.
struct Disk {
    work: tempfile::TempDir,
}

impl Disk {
    fn new(options: &[&str]) -> Disk {
        let disk = Disk { work: tempfile::tempdir().unwrap() };
        File::create(disk.image()).unwrap().set_len(64 << 20).unwrap();
        let image = disk.image().display().to_string();
        assert!(run("mkfs.ext4", &[&["-q", "-F"], options, &[&image]].concat()));
        std::fs::create_dir(disk.root()).unwrap();
        disk.mount();
        disk
    }

    fn image(&self) -> PathBuf {
        self.work.path().join("image")
    }

    fn root(&self) -> PathBuf {
        self.work.path().join("mnt")
    }

    fn mount(&self) {
        let (image, root) = (self.image().display().to_string(), self.root().display().to_string());
        assert!(run("mount", &["-o", "loop", &image, &root]));
    }

    fn umount(&self) {
        // Something may still close a file of it.
        for _ in 0..100 {
            if nix::mount::umount(&self.root()).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{} stays busy", self.root().display());
    }

    /// The power goes, and comes back.
    fn cut(&self) {
        let root = File::open(self.root()).unwrap();
        let mut how = WITHOUT_FLUSHING;
        // SAFETY: the descriptor is open, the number is valid for the call.
        unsafe { shutdown(root.as_raw_fd(), &mut how) }.unwrap();
        drop(root);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.root(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn body(n: u64) -> Vec<u8> {
    let len = 1 + n * 7919 % 70_000;
    (0..len).map(|at| (at.wrapping_mul(31).wrapping_add(n) % 251) as u8).collect()
}

/// What is there is whole.
fn check(dir: &Path) -> Vec<u64> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        let n: u64 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        assert!(std::fs::read(&path).unwrap() == body(n), "{} is not whole", path.display());
        found.push(n);
    }
    found
}

/// Puts until the power goes; what was answered.
async fn put_some(
    store: DirStore,
    from: u64,
    mode: PutMode,
    over: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> Vec<u64> {
    let mut answered = Vec::new();
    for n in from.. {
        let (key, bytes) = (format!("users/mail/{n}"), Body::Bytes(Bytes::from(body(n))));
        let put = store.put(&key, bytes, mode.clone(), &[], WHY).await;
        // A sync that is under way while the journal is shut may return a success that no machine
        // without power could give.
        if put.is_err() || over.load(Ordering::SeqCst) {
            return answered;
        }
        answered.push(n);
        count.fetch_add(1, Ordering::SeqCst);
    }
    answered
}

/// Between its name and its sync each put waits, so that others' syncs come in between.
fn slow_puts() -> tempfile::NamedTempFile {
    let mut plan = tempfile::NamedTempFile::new().unwrap();
    plan.write_all(b"dir.named=sleep(8)").unwrap();
    // SAFETY: it is read by puts only, and none has begun.
    unsafe { std::env::set_var(vmailfs::failpoint::VARIABLE, plan.path()) };
    plan
}

#[test]
fn i1_a_power_loss_leaves_whole_objects_and_all_that_were_answered() {
    let _plan = slow_puts();
    let disk = Disk::new(&[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut kept = Vec::new();
    for round in 0..ROUNDS {
        let store = DirStore::open(&disk.root()).unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        // Somebody else's syncs, so that the journal is written at any moment of a put.
        let (other, end) = (disk.root().join("other"), over.clone());
        let noise = std::thread::spawn(move || {
            let mut file = File::create(other).unwrap();
            while !end.load(Ordering::SeqCst) {
                let _ = file.write_all(b"x").and_then(|()| file.sync_all());
            }
        });
        let puts: Vec<_> = [PutMode::Overwrite, PutMode::Create]
            .into_iter()
            .enumerate()
            .map(|(who, mode)| {
                let from = round * 1_000_000 + who as u64 * 100_000;
                runtime.spawn(put_some(store.clone(), from, mode, over.clone(), count.clone()))
            })
            .collect();
        // At any moment of a put, and not before some were answered.
        let end = Instant::now() + Duration::from_secs(60);
        while count.load(Ordering::SeqCst) < 2 {
            assert!(Instant::now() < end, "no put is answered");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(37 * round % 150));
        over.store(true, Ordering::SeqCst);
        disk.cut();
        for put in puts {
            kept.extend(runtime.block_on(put).unwrap());
        }
        noise.join().unwrap();
        drop(store);
        disk.umount();
        disk.mount();
        let found = check(&disk.root().join("users/mail"));
        let lost: Vec<_> = kept.iter().filter(|n| !found.contains(n)).collect();
        assert!(lost.is_empty(), "answered and lost: {lost:?}");
    }
    disk.umount();
    without_a_journal();
}

/// Such a file system gives no order: there each put takes its two syncs.
fn without_a_journal() {
    let disk = Disk::new(&["-O", "^has_journal"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let store = DirStore::open(&disk.root()).unwrap();
    assert!(!format!("{store:?}").contains("in_order: true"));
    let put = store.put("a/b", Body::Bytes(Bytes::from(body(1))), PutMode::Create, &[], WHY);
    runtime.block_on(put).unwrap();
    drop(store);
    disk.umount();
    disk.mount();
    assert!(std::fs::read(disk.root().join("a/b")).unwrap() == body(1));
    disk.umount();
    let journalled = Disk::new(&[]);
    let store = DirStore::open(&journalled.root()).unwrap();
    assert!(format!("{store:?}").contains("in_order: true"));
    drop(store);
    journalled.umount();
}
