//! Programs that know Maildir from its description: Postfix and Courier deliver, a plain client
//! reads and flags by renaming, all at once and beside Dovecot in the same mailbox.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use support::check::Tolerance;
use support::dovecot::{Dovecot, Format, Layout};
use support::imap::Flags;
use support::messages::{Message, identify, message};
use support::model::Op;
use support::mount::Mount;
use support::mta::{become_mail_user, deliver};
use support::workload::{Turn, Workload, user_names};
use support::{mail_root, scratch};

const POSTFIX_PROCESSES: usize = 3;
const COURIER_PROCESSES: usize = 2;
const MAILS_EACH: usize = 12;

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}

/// A name nobody else uses at this moment.
fn unique() -> usize {
    static COUNTER: AtomicUsize = AtomicUsize::new(0);
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

fn unix_lines(mail: &[u8]) -> Vec<u8> {
    mail.iter().copied().filter(|&c| c != b'\r').collect()
}

/// Courier: no fsync, the size in the name, a rename.
fn deliver_like_courier(maildir: &Path, mail: &Message) {
    let time = now();
    let bytes = unix_lines(&mail.bytes);
    let base = format!("{}.M{}P{}.host.test", time.as_secs(), time.subsec_micros(), unique());
    let tmp = maildir.join("tmp").join(&base);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&tmp).unwrap();
    file.write_all(&bytes).unwrap();
    drop(file);
    fs::rename(&tmp, maildir.join(format!("new/{base},S={}", bytes.len()))).unwrap();
}

/// What the plain client did.
#[derive(Debug, Default)]
struct Done {
    flags: BTreeMap<String, Flags>,
    deleted: BTreeSet<String>,
}

fn flags_of(letters: &str) -> Flags {
    let name = |c| match c {
        'S' => "\\Seen",
        'F' => "\\Flagged",
        'R' => "\\Answered",
        _ => panic!("flag letter {c}"),
    };
    letters.chars().map(|c| name(c).to_owned()).collect()
}

/// Goes through `new/` and `cur/` once. Another may have renamed a file since it was listed:
/// then it is left for the next time.
fn client_pass(maildir: &Path, pass: usize, done: &mut Done) {
    let names = |sub: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(maildir.join(sub)).unwrap();
        entries.map(|e| e.unwrap().path()).collect()
    };
    let read = |path: &Path| match fs::read(path) {
        Ok(bytes) => Some(identify(&bytes).0.unwrap_or_else(|| panic!("{path:?} is damaged"))),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => panic!("{path:?}: {error}"),
    };
    let renamed = |from: &Path, to: &Path| match fs::rename(from, to) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => panic!("{from:?} -> {to:?}: {error}"),
    };
    for path in names("new") {
        let Some(id) = read(&path) else { continue };
        let base = path.file_name().unwrap().to_str().unwrap();
        if renamed(&path, &maildir.join(format!("cur/{base}:2,S"))) {
            done.flags.insert(id, flags_of("S"));
        }
    }
    for (n, path) in names("cur").into_iter().enumerate() {
        if !(n + pass).is_multiple_of(3) {
            continue;
        }
        let Some(id) = read(&path) else { continue };
        let name = path.file_name().unwrap().to_str().unwrap();
        let (base, _) = name.split_once(":2,").unwrap_or((name, ""));
        let letters = ["FS", "RS", "", "F"][(n + pass) / 3 % 4];
        if (n + pass).is_multiple_of(21) {
            match fs::remove_file(&path) {
                Ok(()) => drop(done.deleted.insert(id)),
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound),
            }
        } else if renamed(&path, &maildir.join(format!("cur/{base}:2,{letters}"))) {
            done.flags.insert(id, flags_of(letters));
        }
    }
}

/// All at once; `work` knows afterwards what the mailbox must hold.
fn all_at_once(dovecot: &Dovecot, maildir: &Path, work: &Workload) {
    let user = &dovecot.users[0];
    let sent: Mutex<Vec<Message>> = Mutex::default();
    let delivering = AtomicUsize::new(POSTFIX_PROCESSES + COURIER_PROCESSES);
    let reading = AtomicBool::new(true);
    let done = thread::scope(|scope| {
        for process in 0..POSTFIX_PROCESSES + COURIER_PROCESSES {
            let (sent, delivering) = (&sent, &delivering);
            scope.spawn(move || {
                become_mail_user();
                for _ in 0..MAILS_EACH {
                    let mail = message(4, &work.next_id("client"));
                    if process < POSTFIX_PROCESSES {
                        deliver(maildir, &mail, false).unwrap();
                    } else {
                        deliver_like_courier(maildir, &mail);
                    }
                    sent.lock().unwrap().push(mail);
                }
                delivering.fetch_sub(1, Ordering::SeqCst);
            });
        }
        scope.spawn(|| {
            let mut lmtp = dovecot.ports().lmtp().unwrap();
            for _ in 0..MAILS_EACH {
                // A mail by LMTP is the client's to flag, too: it is noted with the others.
                let mail = message(4, &work.next_id("client"));
                let answers = lmtp.deliver(&[user], &mail.bytes).unwrap();
                assert!(answers[0].accepted(), "{answers:?}");
                sent.lock().unwrap().push(mail);
            }
        });
        let reader = scope.spawn(|| {
            let mut imap = dovecot.imap(user).unwrap();
            imap.select("INBOX").unwrap();
            while reading.load(Ordering::SeqCst) {
                imap.command("NOOP").unwrap();
                let uids = imap.fetch("1:*", "UID FLAGS").unwrap();
                if let Some(last) = uids.last() {
                    imap.fetch(&last.uid.to_string(), "UID RFC822.SIZE").unwrap();
                }
            }
            imap.logout();
        });
        let client = scope.spawn(|| {
            become_mail_user();
            let mut done = Done::default();
            let mut pass = 0;
            while delivering.load(Ordering::SeqCst) > 0 || pass < 6 {
                client_pass(maildir, pass, &mut done);
                pass += 1;
            }
            done
        });
        let done = client.join().unwrap();
        reading.store(false, Ordering::SeqCst);
        reader.join().unwrap();
        done
    });
    let mut model = work.model();
    for mail in sent.into_inner().unwrap() {
        if done.deleted.contains(&mail.id) {
            continue;
        }
        let flags = done.flags.get(&mail.id).cloned().unwrap_or_default();
        let (folder, id, hash) = ("INBOX".to_owned(), mail.id.clone(), mail.hash);
        let ticket = model.begin(user, Op::Put { folder, id, hash, flags, date: None });
        model.done(ticket, None);
        model.folder(user, "INBOX").mails.get_mut(&mail.id).unwrap().answered = u64::MAX;
    }
}

/// Whoever waits in IDLE is told at once, not when the server next looks by itself.
fn idle_is_told(dovecot: &Dovecot, work: &Workload) {
    let user = &dovecot.users[0];
    let mut imap = dovecot.imap(user).unwrap();
    let before = imap.select("INBOX").unwrap().exists;
    thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            let count = imap.idle_until_exists().unwrap();
            imap.logout();
            count
        });
        thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        work.deliver(&mut dovecot.ports().lmtp().unwrap(), &[user], Turn::Kept).unwrap();
        assert_eq!(waiting.join().unwrap(), before + 1);
        assert!(start.elapsed() < Duration::from_secs(20), "told after {:?}", start.elapsed());
    });
}

fn clients_and_dovecot_agree(root: &Path) -> (Dovecot, Workload) {
    let users = user_names(1);
    let dovecot = Dovecot::start(root, &Layout::usual(Format::Maildir), &users).unwrap();
    let work = Workload::new(4, &users);
    // Opening the mailbox makes its directories.
    work.must_hold(&dovecot, Tolerance::Nothing, "empty");
    all_at_once(&dovecot, &root.join(&users[0]).join("mail"), &work);
    work.must_hold(&dovecot, Tolerance::Nothing, "clients and Dovecot at once");
    idle_is_told(&dovecot, &work);
    work.must_hold(&dovecot, Tolerance::Nothing, "after IDLE");
    assert_eq!(work.failures(), [""; 0]);
    (dovecot, work)
}

#[test]
fn on_a_plain_directory() {
    let place = scratch("clients");
    clients_and_dovecot_agree(&mail_root(place.path()));
}

#[test]
fn on_a_mount() {
    let mut mount = Mount::on_directory();
    mount.mount().unwrap();
    let root = mount.root();
    let (mut dovecot, work) = clients_and_dovecot_agree(&root);
    dovecot.stop();
    mount.umount().unwrap();
    mount.wipe_state().unwrap();
    mount.mount().unwrap();
    dovecot.resume(&root).unwrap();
    work.must_hold(&dovecot, Tolerance::Nothing, "on a fresh machine");
    dovecot.stop();
    mount.umount().unwrap();
}
