//! Where mail is kept, each with a Dovecot of its own: a directory of ext4, or a mount on a
//! directory or on an S3 server behind a [`Link`].

use crate::cpus::Cpus;
use crate::disk::Disk;
use crate::link::Link;
use crate::peers::{Peer, Which};
use crate::support::dovecot::{Dovecot, Format, Layout};
use crate::support::imap::Imap;
use crate::support::lmtp::Lmtp;
use crate::support::mount::Mount;
use crate::support::{mail_root, weed};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    /// The same where [`Place::cold`] is possible.
    ColdExt4,
    File,
    S3,
    Peer(Which),
}

/// What holds the mail.
#[derive(Debug)]
enum Below {
    Disk(Disk),
    Mount(Mount),
    Peer(Peer),
}

#[derive(Debug)]
pub struct Place {
    pub kind: Kind,
    pub dovecot: Dovecot,
    pub link: Option<Link>,
    below: Below,
}

impl Place {
    /// An empty one. `users` are all that there will be; `options` are those of the mount.
    pub fn start(
        kind: Kind,
        format: Format,
        users: &[&str],
        options: &[&str],
        cpus: &Cpus,
    ) -> Place {
        let mut link = None;
        let below = match kind {
            Kind::Ext4 => Below::Disk(Disk::directory()),
            Kind::ColdExt4 => Below::Disk(Disk::image()),
            Kind::File => Below::Mount(Mount::on_directory()),
            Kind::S3 => {
                let (way, mount) = cpus.beside(mount_on_s3);
                link = Some(way);
                Below::Mount(mount)
            }
            Kind::Peer(which) => {
                let (way, peer) = cpus.beside(|| peer_on_s3(which));
                link = Some(way);
                Below::Peer(peer)
            }
        };
        let below = match below {
            Below::Mount(mount) => {
                let mut mount = mount.option(options);
                mount.mount().unwrap();
                Below::Mount(mount)
            }
            other => other,
        };
        let (root, layout) = match &below {
            Below::Disk(disk) => (mail_root(&disk.path()), Layout::usual(format)),
            Below::Mount(mount) => (mount.root(), Layout::usual(format)),
            Below::Peer(peer) => (peer.root(), peer.layout(format)),
        };
        let users: Vec<String> = users.iter().map(|user| (*user).to_owned()).collect();
        let dovecot = Dovecot::start(&root, &layout, &users).unwrap();
        Place { kind, dovecot, link, below }
    }

    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Ext4 | Kind::ColdExt4 => "ext4",
            Kind::File => "vmailfs file",
            Kind::S3 => "vmailfs s3",
            Kind::Peer(which) => which.name(),
        }
    }

    /// Where users' homes are.
    pub fn root(&self) -> PathBuf {
        match &self.below {
            Below::Disk(disk) => disk.path().join("mail"),
            Below::Mount(mount) => mount.root(),
            Below::Peer(peer) => peer.root(),
        }
    }

    pub fn mount(&self) -> Option<&Mount> {
        match &self.below {
            Below::Disk(_) | Below::Peer(_) => None,
            Below::Mount(mount) => Some(mount),
        }
    }

    /// How often the kernel has asked the daemon, by operation.
    pub fn kernel_requests(&self) -> BTreeMap<String, u64> {
        let Some(mount) = self.mount() else { return BTreeMap::new() };
        // What is shown there may be that old; and releases are told later.
        std::thread::sleep(Duration::from_millis(400));
        let text = std::fs::read_to_string(mount.root().join(".vmailfs/metrics")).unwrap();
        let lines = text.lines().filter_map(|line| {
            let rest = line.strip_prefix("vmailfs_fuse_requests_total{operation=\"")?;
            let (op, count) = rest.split_once("\"} ")?;
            Some((op.to_owned(), count.trim().parse().ok()?))
        });
        lines.collect()
    }

    pub fn imap(&self, user: &str) -> Imap {
        self.dovecot.imap(user).unwrap()
    }

    pub fn lmtp(&self) -> Lmtp {
        self.dovecot.ports().lmtp().unwrap()
    }

    /// Sets the time that the store is away, in ms, where it is away.
    pub fn delay(&self, ms: u64) {
        if let Some(link) = &self.link {
            link.delay(ms);
        }
    }

    /// Nothing of it is in a cache any more: of the disk, not in the kernel's; of a mount, not on
    /// this machine. Dovecot's processes are new, and so are their connections.
    pub fn cold(&mut self) {
        self.dovecot.stop();
        let root = self.root();
        match &mut self.below {
            Below::Disk(disk) => disk.cold(),
            Below::Peer(peer) => peer.cold(),
            Below::Mount(mount) => {
                mount.umount().unwrap();
                mount.set_state_aside().unwrap();
                mount.mount().unwrap();
            }
        }
        self.dovecot.resume(&root).unwrap();
    }

    /// The end, with everything in the store; what Dovecot or the daemon had to complain of shows.
    pub fn end(mut self) -> Option<Link> {
        let complaints = self.dovecot.complaints();
        if !complaints.is_empty() {
            println!("Dovecot on {} says: {complaints:#?}", self.name());
        }
        self.dovecot.stop();
        if let Below::Mount(mount) = &mut self.below {
            mount.umount().unwrap();
        }
        self.link.take()
    }
}

/// A way to an empty bucket, its name, and the keys.
fn bucket() -> (Link, String, (&'static str, &'static str)) {
    let server = weed::server();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bucket = runtime.block_on(server.new_bucket());
    let link = Link::start(&server.endpoint());
    (link, bucket, (server.access_key_id(), server.secret_access_key()))
}

fn mount_on_s3() -> (Link, Mount) {
    let (link, bucket, keys) = bucket();
    let mount = Mount::on_s3(&link.endpoint(), &bucket, keys.0, keys.1);
    (link, mount)
}

fn peer_on_s3(which: Which) -> (Link, Peer) {
    let (link, bucket, keys) = bucket();
    let peer = Peer::start(which, &link, &bucket, keys);
    (link, peer)
}

pub fn deliver(lmtp: &mut Lmtp, user: &str, mail: &[u8]) {
    let answers = lmtp.deliver(&[user], mail).unwrap();
    assert!(answers.iter().all(|a| a.accepted()), "{answers:?}");
}

/// Mails into a folder by IMAP, many to a command.
pub fn append(imap: &mut Imap, folder: &str, mails: &[Vec<u8>]) {
    for some in mails.chunks(100) {
        imap.append_many(folder, some).unwrap();
    }
}
