//! What the users do to their mail: seeded, noted in the model, and short.

use super::Outcome;
use super::check::{Tolerance, compare};
use super::dovecot::{Dovecot, Format, Ports};
use super::imap::Flags;
use super::lmtp::Lmtp;
use super::messages::{Message, message};
use super::model::{MailId, Model, Op};
use super::session::Session;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// How much the first round does.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Mails to each user, by one session.
    pub one_by_one: usize,
    /// Mails to each user, by several sessions at once.
    pub at_once: usize,
    /// Mails to all users together.
    pub to_all: usize,
    /// Mails stored by each user.
    pub appended: usize,
}

impl Size {
    pub const USUAL: Size = Size { one_by_one: 12, at_once: 12, to_all: 3, appended: 10 };
    pub const SHORT: Size = Size { one_by_one: 4, at_once: 4, to_all: 1, appended: 4 };
}

/// Whether a delivered mail's UID comes before those of later mails. While others are at work
/// in a Maildir, Dovecot delivers without waiting for the lock of the UID list: such a mail gets
/// its UID later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Kept,
    Any,
}

/// The model of what must be there, and the means to change it.
#[derive(Debug)]
pub struct Workload {
    seed: u64,
    users: Vec<String>,
    model: Mutex<Model>,
    /// Operations that the server refused or that broke.
    failures: Mutex<Vec<String>>,
    counter: AtomicU64,
    round: AtomicU64,
}

impl Workload {
    pub fn new(seed: u64, users: &[String]) -> Workload {
        Workload {
            seed,
            users: users.to_vec(),
            model: Mutex::new(Model::new(users)),
            failures: Mutex::default(),
            counter: AtomicU64::new(0),
            round: AtomicU64::new(0),
        }
    }

    pub fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap()
    }

    fn note_failure(&self, text: String) {
        if !self.model().is_cut() {
            self.failures.lock().unwrap().push(text);
        }
    }

    pub fn note(&self, outcome: Outcome<()>) {
        if let Err(failure) = outcome {
            self.note_failure(failure.0);
        }
    }

    /// What went wrong so far, except what was cut off.
    pub fn failures(&self) -> Vec<String> {
        std::mem::take(&mut self.failures.lock().unwrap())
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A name that was not given before.
    pub fn next_id(&self, kind: &str) -> MailId {
        format!("{kind}-{}", self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// Everything once: deliveries, folders, flags, copies, moves, expunges, searches.
    pub fn first_round(&self, dovecot: &Dovecot, size: Size) {
        let ports = dovecot.ports();
        self.note(self.deliver_one_by_one(ports, size.one_by_one, Turn::Kept));
        self.deliver_at_once(ports, size.at_once);
        self.note(self.deliver_to_all(ports, size.to_all));
        self.learn(dovecot);
        self.each_user(ports, |session| session.make_folders(size.appended));
        self.learn(dovecot);
        self.each_user(ports, |session| session.change_mails());
        self.learn(dovecot);
        self.each_user(ports, |session| session.search_and_status());
        self.maintain(dovecot);
    }

    /// Some more of all, the folders included.
    pub fn more(&self, dovecot: &Dovecot) {
        let ports = dovecot.ports();
        let round = self.round.fetch_add(1, Ordering::Relaxed);
        self.each_user(ports, |session| session.more_folders(round));
        self.changes(dovecot);
    }

    /// Mails come and change; folders and subscriptions stay.
    pub fn changes(&self, dovecot: &Dovecot) {
        let ports = dovecot.ports();
        self.note(self.deliver_one_by_one(ports, 3, Turn::Kept));
        self.note(self.deliver_to_all(ports, 1));
        self.learn(dovecot);
        self.each_user(ports, |session| session.change_mails());
        self.learn(dovecot);
    }

    /// Traffic from all sides until `crash`, which must end the mail server, too; what is not
    /// answered before that may have happened or not.
    pub fn traffic_until(&self, ports: Ports, time: Duration, crash: impl FnOnce()) {
        thread::scope(|scope| {
            for user in &self.users {
                scope.spawn(move || self.note(self.user_traffic(ports, user)));
            }
            scope.spawn(move || self.note(self.delivery_traffic(ports)));
            thread::sleep(time);
            self.model().cut();
            crash();
        });
    }

    fn user_traffic(&self, ports: Ports, user: &str) -> Outcome<()> {
        let mut session = Session::open(self, ports, user)?;
        // Until the connection breaks: the crash must hit operations half done.
        loop {
            session.any_change()?;
        }
    }

    fn delivery_traffic(&self, ports: Ports) -> Outcome<()> {
        let mut lmtp = ports.lmtp()?;
        loop {
            for user in &self.users {
                self.deliver(&mut lmtp, &[user], Turn::Any)?;
            }
        }
    }

    fn deliver_one_by_one(&self, ports: Ports, count: usize, turn: Turn) -> Outcome<()> {
        let mut lmtp = ports.lmtp()?;
        for _ in 0..count {
            for user in &self.users {
                self.deliver(&mut lmtp, &[user], turn)?;
            }
        }
        Ok(())
    }

    fn deliver_at_once(&self, ports: Ports, count: usize) {
        let sessions = 3;
        thread::scope(|scope| {
            for session in 0..sessions {
                let share = count * (session + 1) / sessions - count * session / sessions;
                scope.spawn(move || self.note(self.deliver_one_by_one(ports, share, Turn::Any)));
            }
        });
    }

    fn deliver_to_all(&self, ports: Ports, count: usize) -> Outcome<()> {
        let mut lmtp = ports.lmtp()?;
        let all: Vec<&String> = self.users.iter().collect();
        (0..count).try_for_each(|_| self.deliver(&mut lmtp, &all, Turn::Kept))
    }

    /// One mail to the INBOX of each of `users`.
    pub fn deliver(&self, lmtp: &mut Lmtp, users: &[&String], turn: Turn) -> Outcome<()> {
        let mail = message(self.seed, &self.next_id("delivered"));
        self.deliver_mail(lmtp, users, turn, &mail)
    }

    /// The same with a mail of the caller's.
    pub fn deliver_mail(
        &self,
        lmtp: &mut Lmtp,
        users: &[&String],
        turn: Turn,
        mail: &Message,
    ) -> Outcome<()> {
        let put = |user: &&String| {
            let op = Op::Put {
                folder: "INBOX".into(),
                id: mail.id.clone(),
                hash: mail.hash.clone(),
                flags: Flags::new(),
                date: None,
            };
            self.model().begin(user, op)
        };
        let tickets: Vec<_> = users.iter().map(put).collect();
        let names: Vec<&str> = users.iter().map(|u| u.as_str()).collect();
        let answers = lmtp.deliver(&names, &mail.bytes)?;
        for ((answer, ticket), user) in answers.iter().zip(tickets).zip(users) {
            if answer.accepted() {
                let mut model = self.model();
                model.done(ticket, None);
                if let (Turn::Any, Some(mail)) =
                    (turn, model.folder(user, "INBOX").mails.get_mut(&mail.id))
                {
                    mail.answered = u64::MAX;
                }
            } else {
                self.note_failure(answer.text.clone());
            }
        }
        Ok(())
    }

    /// Runs `job` in a session of each user, all at once.
    fn each_user(&self, ports: Ports, job: impl Fn(&mut Session<'_>) -> Outcome<()> + Sync) {
        let job = &job;
        thread::scope(|scope| {
            for user in &self.users {
                scope.spawn(move || {
                    let done = Session::open(self, ports, user).and_then(|mut session| {
                        job(&mut session)?;
                        session.imap.logout();
                        Ok(())
                    });
                    self.note(done);
                });
            }
        });
    }

    /// What administrators run now and then; it must change nothing that users see.
    pub fn maintain(&self, dovecot: &Dovecot) {
        for user in &self.users {
            let mut commands = vec![vec!["force-resync", "-u", user, "*"]];
            if dovecot.layout.format == Format::Mdbox {
                // After the resync: a crash may have left counts of references too low.
                commands.push(vec!["purge", "-u", user]);
            }
            for command in commands {
                match dovecot.doveadm(&command) {
                    Ok((true, _)) => {}
                    Ok((false, text)) => self.note_failure(format!("{command:?}: {text}")),
                    Err(failure) => self.note_failure(failure.0),
                }
            }
        }
    }

    /// Looks at all mailboxes and notes what the server chose.
    pub fn learn(&self, dovecot: &Dovecot) {
        match dovecot.look() {
            Ok(seen) => self.model().learn(&seen),
            Err(failure) => self.note_failure(failure.0),
        }
    }

    /// Panics with a report unless everything done so far went well.
    pub fn must_have_worked(&self, dovecot: &Dovecot, when: &str) {
        let (failures, complaints) = (self.failures(), dovecot.complaints());
        assert!(
            failures.is_empty() && complaints.is_empty(),
            "{when}: operations failed:\n{}\nDovecot's log:\n{}",
            failures.join("\n"),
            complaints.join("\n")
        );
    }

    /// To be called when a crashed Dovecot is back. Its dbox formats find half-written indexes at
    /// the first access, rebuild them, and drop that connection; a file that was saved but not
    /// yet logged is found by the next save to its number, which fails, unless an administrator
    /// has had the folders rebuilt. It is what comes then that counts.
    pub fn let_dovecot_repair(&self, dovecot: &Dovecot) {
        if dovecot.layout.format != Format::Maildir {
            let _ = dovecot.look();
            self.maintain(dovecot);
            let _ = self.failures();
        }
    }

    /// Panics with a report unless all mailboxes are as they must be. Afterwards the model is
    /// sure of everything again.
    pub fn must_hold(&self, dovecot: &Dovecot, tolerance: Tolerance, when: &str) {
        let sure = self.model().all_answered() && tolerance == Tolerance::Nothing;
        self.model().resolve();
        let seen = dovecot.look().unwrap_or_else(|failure| panic!("{when}: {failure}"));
        let problems = compare(&self.model(), &seen, tolerance);
        let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert!(
            lines.is_empty(),
            "{when}: {} problems:\n{}\nDovecot's log:\n{}",
            lines.len(),
            lines.join("\n"),
            dovecot.complaints().join("\n")
        );
        if sure {
            self.model().learn(&seen);
        } else {
            self.model().adopt(&seen);
        }
    }
}

/// Names for `count` users of one domain.
pub fn user_names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("user{n}@mail.test")).collect()
}
