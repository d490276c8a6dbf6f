//! The main job, end to end: an unmodified Dovecot delivers to and serves from a mount; the
//! mailboxes must be the same after an umount, on a fresh machine, after a crash of the
//! daemon, and, up to what a lost machine may undo, after a crash that also loses the disk.

use super::check::Tolerance;
use super::dovecot::{Dovecot, Format, Layout};
use super::mount::Mount;
use super::remove_locks;
use super::workload::{Size, Workload, user_names};
use std::time::Duration;

/// All of it, for one format on one store.
pub fn survives_everything(format: Format, mut mount: Mount) {
    let root = mount.root();
    let users = user_names(3);
    let work = Workload::new(2, &users);
    mount.mount().unwrap();
    let mut dovecot = Dovecot::start(&root, &Layout::usual(format), &users).unwrap();
    work.first_round(&dovecot, Size::USUAL);
    work.must_have_worked(&dovecot, "first round");
    work.must_hold(&dovecot, Tolerance::Nothing, "first round");

    dovecot.stop();
    mount.umount().unwrap();
    mount.mount().unwrap();
    dovecot.resume(&root).unwrap();
    work.must_hold(&dovecot, Tolerance::Nothing, "after umount and mount");
    work.must_have_worked(&dovecot, "after umount and mount");

    dovecot.stop();
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    dovecot.resume(&root).unwrap();
    work.must_hold(&dovecot, Tolerance::Nothing, "on a fresh machine");
    work.must_have_worked(&dovecot, "on a fresh machine");

    work.more(&dovecot);
    work.must_have_worked(&dovecot, "second round");
    crash(&work, &mut dovecot, &mut mount);
    mount.mount().unwrap();
    remove_locks(&root);
    dovecot.resume(&root).unwrap();
    work.let_dovecot_repair(&dovecot);
    work.must_hold(&dovecot, Tolerance::Nothing, "after kill -9 of the daemon");

    // Only what happens from here on may be undone by the loss of the machine.
    dovecot.stop();
    mount.umount().unwrap();
    work.model().settled();
    mount.mount().unwrap();
    dovecot.resume(&root).unwrap();
    work.changes(&dovecot);
    work.must_have_worked(&dovecot, "third round");
    crash(&work, &mut dovecot, &mut mount);
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    remove_locks(&root);
    dovecot.resume(&root).unwrap();
    work.let_dovecot_repair(&dovecot);
    work.must_hold(&dovecot, Tolerance::LostMachine, "after kill -9 and loss of the disk");

    // What was recovered is a mailbox like any other.
    work.changes(&dovecot);
    assert_eq!(work.failures(), [""; 0], "operations failed after the recovery");
    work.must_hold(&dovecot, Tolerance::Nothing, "work after the recovery");
    work.maintain(&dovecot);
    assert_eq!(work.failures(), [""; 0], "doveadm failed after the recovery");
    work.must_hold(&dovecot, Tolerance::Nothing, "purged and resynced after the recovery");
    dovecot.stop();
    mount.umount().unwrap();
}

/// Kills the daemon under traffic, and shortly after it the mail server that still uses it.
fn crash(work: &Workload, dovecot: &mut Dovecot, mount: &mut Mount) {
    let ports = dovecot.ports();
    work.traffic_until(ports, Duration::from_millis(500), || {
        mount.kill9_only();
        std::thread::sleep(Duration::from_millis(50));
        dovecot.kill9();
    });
    mount.kill9();
}
