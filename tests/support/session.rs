//! A user at an IMAP connection: single operations, and the sequences of them that rounds use.

use super::dovecot::Ports;
use super::imap::{Imap, flags};
use super::messages::message;
use super::model::{MailId, Op};
use super::workload::Workload;
use super::{Outcome, fail};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

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
        let stream = work.next_id("session");
        let seed = blake3::hash(format!("{} {user} {stream}", work.seed()).as_bytes());
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
        let mail = message(self.work.seed(), &self.work.next_id("appended"));
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
        self.run(op, |imap| match imap.create(folder) {
            // So Dovecot says of a folder that it is just making while mail comes in (Maildir: of 4 of
            // 450 on a plain directory). What the folder holds is compared in the end.
            Err(failure) if failure.to_string().contains("[ALREADYEXISTS]") => Ok(None),
            made => made.map(|()| None),
        })
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

    pub fn make_folders(&mut self, appended: usize) -> Outcome<()> {
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

    pub fn more_folders(&mut self, round: u64) -> Outcome<()> {
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

    pub fn change_mails(&mut self) -> Outcome<()> {
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

    pub fn any_change(&mut self) -> Outcome<()> {
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

    pub fn search_and_status(&mut self) -> Outcome<()> {
        let mails = self.mails("INBOX");
        self.select("INBOX")?;
        for (uid, id) in mails.iter().step_by(7) {
            let found = self.imap.search_text(&message(self.work.seed(), id).token)?;
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
