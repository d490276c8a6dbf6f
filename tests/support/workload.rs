//! What the users do to their mail: seeded, noted in the model, and short.

use super::check::{Tolerance, compare};
use super::dovecot::{Dovecot, Format, Ports};
use super::imap::{Flags, Imap, flags};
use super::lmtp::Lmtp;
use super::messages::message;
use super::model::{MailId, Model, Op};
use super::{Outcome, fail};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
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

    fn note(&self, outcome: Outcome<()>) {
        if let Err(failure) = outcome {
            self.note_failure(failure.0);
        }
    }

    /// What went wrong so far, except what was cut off.
    pub fn failures(&self) -> Vec<String> {
        std::mem::take(&mut self.failures.lock().unwrap())
    }

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
    fn maintain(&self, dovecot: &Dovecot) {
        for user in &self.users {
            let mut commands = vec![vec!["force-resync", "-u", user, "*"]];
            if dovecot.layout.format == Format::Mdbox {
                commands.insert(0, vec!["purge", "-u", user]);
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
    /// the first access, rebuild them, and drop that connection; it is the next one that counts.
    pub fn let_dovecot_repair(&self, dovecot: &Dovecot) {
        if dovecot.layout.format != Format::Maildir {
            let _ = dovecot.look();
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

/// A user at work: each operation is noted in the model before and after.
pub struct Session<'a> {
    work: &'a Workload,
    user: &'a str,
    pub imap: Imap,
    rng: StdRng,
    selected: Option<String>,
}

impl<'a> Session<'a> {
    pub fn open(work: &'a Workload, ports: Ports, user: &'a str) -> Outcome<Session<'a>> {
        let stream = work.counter.fetch_add(1, Ordering::Relaxed);
        let seed = blake3::hash(format!("{} {user} {stream}", work.seed).as_bytes());
        let rng = StdRng::from_seed(*seed.as_bytes());
        Ok(Session { work, user, imap: ports.imap(user)?, rng, selected: None })
    }

    /// Notes `op`, runs it, and notes the answer.
    fn run(&mut self, op: Op, run: impl FnOnce(&mut Imap) -> Outcome<Option<u32>>) -> Outcome<()> {
        let ticket = self.work.model().begin(self.user, op);
        let uid = run(&mut self.imap)?;
        self.work.model().done(ticket, uid);
        Ok(())
    }

    fn select(&mut self, folder: &str) -> Outcome<()> {
        if self.selected.as_deref() != Some(folder) {
            self.imap.select(folder)?;
            self.selected = Some(folder.to_owned());
        }
        Ok(())
    }

    /// Mails of a folder whose UID is known, by UID.
    fn mails(&self, folder: &str) -> Vec<(u32, MailId)> {
        let mut model = self.work.model();
        let mails = model.folder(self.user, folder).mails.iter();
        let mut mails: Vec<_> = mails.filter_map(|(id, m)| Some((m.uid?, id.clone()))).collect();
        mails.sort();
        mails
    }

    fn holds(&self, folder: &str, id: &str) -> bool {
        self.work.model().folder(self.user, folder).mails.contains_key(id)
    }

    fn uid(&self, folder: &str, id: &str) -> Outcome<u32> {
        let uid = self.work.model().folder(self.user, folder).mails.get(id).and_then(|m| m.uid);
        uid.map_or_else(|| fail(format!("no UID known for {id} in {folder}")), Ok)
    }

    pub fn append(&mut self, folder: &str, names: &[&str], date: Option<i64>) -> Outcome<()> {
        let mail = message(self.work.seed, &self.work.next_id("appended"));
        let names = flags(names);
        let op = Op::Put {
            folder: folder.into(),
            id: mail.id,
            hash: mail.hash,
            flags: names.clone(),
            date,
        };
        self.run(op, |imap| imap.append(folder, &names, date, &mail.bytes))
    }

    pub fn store(
        &mut self,
        folder: &str,
        id: &str,
        how: &'static str,
        names: &[&str],
    ) -> Outcome<()> {
        self.select(folder)?;
        let (uid, names) = (self.uid(folder, id)?, flags(names));
        let op = Op::Store { folder: folder.into(), id: id.into(), how, flags: names.clone() };
        self.run(op, |imap| imap.store(uid, how, &names).map(|()| None))
    }

    pub fn copy(&mut self, from: &str, to: &str, id: &str) -> Outcome<()> {
        self.select(from)?;
        let uid = self.uid(from, id)?;
        let op = Op::Copy { from: from.into(), to: to.into(), id: id.into() };
        self.run(op, |imap| imap.copy(uid, to))
    }

    pub fn move_to(&mut self, from: &str, to: &str, id: &str) -> Outcome<()> {
        self.select(from)?;
        let uid = self.uid(from, id)?;
        let op = Op::Move { from: from.into(), to: to.into(), id: id.into() };
        self.run(op, |imap| imap.move_to(uid, to))
    }

    pub fn expunge(&mut self, folder: &str, id: &str) -> Outcome<()> {
        self.store(folder, id, "+", &["\\Deleted"])?;
        let uid = self.uid(folder, id)?;
        let op = Op::Expunge { folder: folder.into(), id: id.into() };
        self.run(op, |imap| imap.expunge(uid).map(|()| None))
    }

    pub fn create(&mut self, folder: &str) -> Outcome<()> {
        let op = Op::Create { folder: folder.into() };
        self.run(op, |imap| imap.create(folder).map(|()| None))
    }

    pub fn rename(&mut self, from: &str, to: &str) -> Outcome<()> {
        let op = Op::Rename { from: from.into(), to: to.into() };
        self.run(op, |imap| imap.rename(from, to).map(|()| None))
    }

    pub fn delete(&mut self, folder: &str) -> Outcome<()> {
        let op = Op::Delete { folder: folder.into() };
        self.run(op, |imap| imap.delete(folder).map(|()| None))
    }

    pub fn subscribe(&mut self, folder: &str) -> Outcome<()> {
        let op = Op::Subscribe { folder: folder.into() };
        self.run(op, |imap| imap.subscribe(folder).map(|()| None))
    }

    pub fn unsubscribe(&mut self, folder: &str) -> Outcome<()> {
        let op = Op::Unsubscribe { folder: folder.into() };
        self.run(op, |imap| imap.unsubscribe(folder).map(|()| None))
    }

    fn make_folders(&mut self, appended: usize) -> Outcome<()> {
        for name in ["Sent", "Archive", "Archive/2023", "Archive/2023/Q1 & Q2", "Entwürfe"] {
            self.create(name)?;
        }
        for name in ["Sent", "Archive", "Entwürfe"] {
            self.subscribe(name)?;
        }
        self.unsubscribe("Archive")?;
        self.append("Archive/2023/Q1 & Q2", &["\\Seen", "Kept"], Some(1_700_000_000))?;
        self.rename("Archive/2023", "Archive/Früher")?;
        self.create("Tmp")?;
        self.append("Tmp", &["\\Flagged"], None)?;
        self.rename("Tmp", "日本語/メール")?;
        self.create("Gone")?;
        self.append("Gone", &[], None)?;
        self.delete("Gone")?;
        let kinds: [&[&str]; 4] = [&["\\Seen"], &[], &["\\Seen", "$Label1"], &["\\Draft", "Work"]];
        for n in 0..appended {
            let folder = if n % 3 == 2 { "Entwürfe" } else { "Sent" };
            let date = (n % 4 != 3).then_some(1_500_000_000 + 86_399 * n as i64);
            self.append(folder, kinds[n % 4], date)?;
        }
        Ok(())
    }

    fn more_folders(&mut self, round: u64) -> Outcome<()> {
        let (first, second) = (format!("Archive/Jahr {round}"), format!("Später/{round}"));
        self.create(&first)?;
        self.append(&first, &["\\Seen"], Some(1_600_000_000))?;
        self.subscribe(&first)?;
        self.create(&second)?;
        let third = format!("{second}-neu");
        self.append(&second, &["$Label2"], None)?;
        self.rename(&second, &third)?;
        // A name may come back; what was there before must not.
        self.create("Gone")?;
        self.append("Gone", &[], None)?;
        self.append("Gone", &[], None)?;
        self.delete("Gone")
    }

    fn change_mails(&mut self) -> Outcome<()> {
        let mails = self.mails("INBOX");
        let kinds: [(&'static str, &[&str]); 5] = [
            ("+", &["\\Seen"]),
            ("+", &["\\Flagged", "$Label1"]),
            ("", &["\\Answered", "\\Seen", "Work"]),
            ("+", &["Work", "NotJunk"]),
            ("-", &["\\Seen", "Work"]),
        ];
        for (n, (_, id)) in mails.iter().enumerate() {
            let (how, names) = kinds[n % 5];
            self.store("INBOX", id, how, names)?;
        }
        let every_second = mails.into_iter().step_by(2).map(|(_, id)| id);
        let ids = every_second.filter(|id| !self.holds("Archive", id));
        let ids: Vec<MailId> = ids.take(6).collect();
        for (n, id) in ids.iter().enumerate() {
            match n {
                0..2 => self.copy("INBOX", "Archive", id)?,
                2..4 => self.move_to("INBOX", "Archive", id)?,
                // The copy outlives the original.
                4 => {
                    self.copy("INBOX", "Archive", id)?;
                    self.expunge("INBOX", id)?;
                }
                _ => self.expunge("INBOX", id)?,
            }
        }
        let copied = self.mails("Archive").last().map(|(_, id)| id.clone());
        if let Some(id) = copied.filter(|id| !self.holds("Entwürfe", id)) {
            self.copy("Archive", "Entwürfe", &id)?;
            self.move_to("Archive", "Sent", &id)?;
        }
        Ok(())
    }

    fn any_change(&mut self) -> Outcome<()> {
        let mails = self.mails("INBOX");
        let Some((uid, id)) = mails.choose(&mut self.rng).cloned() else {
            return self.append("INBOX", &[], None);
        };
        let names: &[&str] = [&["\\Seen"][..], &["\\Flagged"], &["$Label1", "\\Seen"]]
            .choose(&mut self.rng)
            .unwrap();
        match self.rng.random_range(0..20) {
            0..4 => self.store("INBOX", &id, "+", names),
            4..7 => self.store("INBOX", &id, "-", names),
            7..9 => self.store("INBOX", &id, "", names),
            9..12 => self.append("Sent", names, Some(1_650_000_000)),
            12..14 => self.append("INBOX", names, None),
            14..16 if !self.holds("Archive", &id) => self.copy("INBOX", "Archive", &id),
            16..18 if !self.holds("Archive", &id) => self.move_to("INBOX", "Archive", &id),
            18 => self.expunge("INBOX", &id),
            _ => {
                self.select("INBOX")?;
                self.imap.fetch(&uid.to_string(), "UID FLAGS BODY.PEEK[]").map(|_| ())
            }
        }
    }

    fn search_and_status(&mut self) -> Outcome<()> {
        let mails = self.mails("INBOX");
        self.select("INBOX")?;
        for (uid, id) in mails.iter().step_by(7) {
            let found = self.imap.search_text(&message(self.work.seed, id).token)?;
            if found != [*uid] {
                return fail(format!("SEARCH for {id}: want {uid}, have {found:?}"));
            }
        }
        for name in self.imap.list()? {
            let status = self.imap.status(&name)?;
            let selected = self.imap.select(&name)?;
            if status != selected {
                return fail(format!("{name}: STATUS {status:?}, SELECT {selected:?}"));
            }
        }
        self.selected = None;
        Ok(())
    }
}

/// Names for `count` users of one domain.
pub fn user_names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("user{n}@mail.test")).collect()
}
