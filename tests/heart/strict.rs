//! Power cuts on a disk that promises no more than it must: a synced file is there afterwards if the
//! names of all directories above it were synced, too.

use super::world::*;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vmailfs::cache::disk::{Disk, DiskEntry, DiskFile, How, RealDisk, Space, make_dirs};
use vmailfs::store::Op;
use vmailfs::store::faulty::Fault;
use vmailfs::vmail::promise::Ack;

/// Directories whose names are not on the disk yet go with a power cut, with what is in them.
#[derive(Debug, Default)]
struct StrictDisk {
    inner: RealDisk,
    unsynced: Mutex<BTreeSet<PathBuf>>,
    syncs: Mutex<Vec<PathBuf>>,
}

impl StrictDisk {
    fn power_cut(&self) {
        for dir in std::mem::take(&mut *self.unsynced.lock()) {
            self.inner.remove_tree(&dir).unwrap();
        }
    }

    fn synced(&self, dir: &Path) {
        self.unsynced.lock().retain(|made| made.parent() != Some(dir));
    }

    fn syncs(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.syncs.lock())
    }
}

impl Disk for StrictDisk {
    fn open(&self, path: &Path, how: How) -> io::Result<Arc<dyn DiskFile>> {
        self.inner.open(path, how)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.inner.exchange(a, b)
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.hard_link(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.inner.remove_file(path)
    }
    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        self.unsynced.lock().retain(|made| !made.starts_with(path));
        self.inner.remove_tree(path)
    }
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        let made: Vec<PathBuf> =
            path.ancestors().take_while(|dir| !dir.exists()).map(Path::to_path_buf).collect();
        self.unsynced.lock().extend(made);
        self.inner.create_dirs(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.inner.sync_dir(path)?;
        self.syncs.lock().push(path.to_path_buf());
        self.synced(path);
        Ok(())
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        self.inner.exists(path)
    }
    fn is_dir(&self, path: &Path) -> io::Result<bool> {
        self.inner.is_dir(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<DiskEntry>> {
        self.inner.list(dir)
    }
    fn space(&self, path: &Path) -> io::Result<Space> {
        self.inner.space(path)
    }
    fn replace(&self, path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
        self.inner.replace(path, bytes, durable)?;
        if durable {
            self.synced(path.parent().unwrap());
        }
        Ok(())
    }
}

fn promising(world: &World, on: On, disk: &Arc<StrictDisk>) -> Client {
    let mut settings = world.settings(on);
    settings.ack = Ack::Journal;
    world.session_with(settings, disk.clone())
}

fn no_mail_arrives(world: &World) {
    world.faults(|r| match r.op {
        Op::Put if r.key.contains("/mail/") => Fault::Before(down()),
        _ => Fault::None,
    });
}

/// I1: what is promised on this machine's disk can be reached there after a power cut, from the first
/// mail on that a machine ever takes for a user.
#[tokio::test]
async fn i1_the_way_to_a_promise_is_on_the_disk() {
    let world = World::new();
    let disk: Arc<StrictDisk> = Arc::default();
    let client = promising(&world, HERE, &disk);
    client.maildir(&["u"]).await;
    client.flush("u").await;
    no_mail_arrives(&world);
    client.deliver("u", "1", b"mail").await.unwrap();
    drop(client);
    disk.power_cut();
    let client = promising(&world, REBOOTED, &disk);
    world.no_faults();
    let found = client.list("u/new").await.unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(client.read(&format!("u/new/{}", found[0])).await.unwrap(), b"mail");
    // Another machine takes the user, and the state that it has here is obsolete: its promises lie
    // elsewhere then, and are still there.
    no_mail_arrives(&world);
    client.deliver("u", "2", b"more").await.unwrap();
    drop(client);
    let other = world.session(FRESH);
    other.list("u/new").await.unwrap();
    drop(other);
    // Died once the promises were put aside.
    let client = promising(&world, REBOOTED, &disk);
    world.store.set_down(false);
    world.faults(|r| match (r.op, r.key.ends_with("/head")) {
        (Op::Put, true) => Fault::Before(down()),
        _ => Fault::None,
    });
    assert!(client.list("u/new").await.is_err());
    drop(client);
    disk.power_cut();
    world.no_faults();
    let client = promising(&world, HERE, &disk);
    let mut bodies = Vec::new();
    for name in client.list("u/new").await.unwrap() {
        bodies.push(client.read(&format!("u/new/{name}")).await.unwrap());
    }
    assert!(bodies.contains(&b"more".to_vec()), "{bodies:?}");
}

/// Only a user's first opening here, and its first promise, sync a directory for its name alone.
#[tokio::test]
async fn directories_that_are_there_cost_no_sync() {
    let world = World::new();
    let disk: Arc<StrictDisk> = Arc::default();
    let client = promising(&world, HERE, &disk);
    client.maildir(&["u"]).await;
    client.deliver("u", "1", b"mail").await.unwrap();
    let state = client.session().state_dir_of("u");
    let above = |dirs: Vec<PathBuf>| {
        dirs.into_iter().filter(|dir| state.starts_with(dir)).collect::<Vec<_>>()
    };
    assert!(above(disk.syncs()).contains(&state));
    client.deliver("u", "2", b"mail").await.unwrap();
    assert_eq!(above(disk.syncs()), Vec::<PathBuf>::new());
    client.close().await;
    disk.syncs();
    let client = promising(&world, HERE, &disk);
    client.list("u/new").await.unwrap();
    let found = above(disk.syncs());
    assert!(found.iter().all(|dir| *dir == state), "{found:?}");
    let dir = world.machine_dir(HERE).join("x");
    make_dirs(&*disk, &dir.join("y/z")).unwrap();
    assert_eq!(disk.syncs(), [world.machine_dir(HERE), dir.clone(), dir.join("y")]);
    make_dirs(&*disk, &dir.join("y/z")).unwrap();
    assert_eq!(disk.syncs(), Vec::<PathBuf>::new());
}
