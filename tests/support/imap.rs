//! A small blocking IMAP client. Folder names are UTF-8 on this side.

use super::imap_text::{self, Value, announced_literal, date_time, decode_name, encode_name};
use super::{Failure, Outcome, fail};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Flags and keywords of a mail; `\Recent` is never among them.
pub type Flags = BTreeSet<String>;

pub fn flags(names: &[&str]) -> Flags {
    names.iter().map(|n| n.to_string()).collect()
}

#[derive(Debug)]
pub struct Imap {
    reader: BufReader<TcpStream>,
    tag: u32,
}

/// What SELECT tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selected {
    pub exists: u32,
    pub uid_validity: u32,
    pub uid_next: u32,
}

/// A mail as FETCH shows it; what was not asked for is empty.
#[derive(Debug, Clone, Default)]
pub struct Fetched {
    pub uid: u32,
    pub flags: Flags,
    /// INTERNALDATE, seconds since 1970.
    pub date: i64,
    pub size: u64,
    pub body: Vec<u8>,
}

/// The answer to a command.
#[derive(Debug)]
pub struct Reply {
    /// The text after the tagged OK.
    pub text: String,
    pub untagged: Vec<Vec<Value>>,
}

impl Reply {
    /// Words that follow `name` in a response code such as `[APPENDUID 12 7]`, wherever it is.
    fn code(&self, name: &str) -> Option<Vec<String>> {
        let untagged = self.untagged.iter().flatten().filter_map(|v| match v {
            Value::Atom(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            _ => None,
        });
        std::iter::once(self.text.clone()).chain(untagged).find_map(|text| {
            let inner = text.strip_prefix('[')?;
            let inner = &inner[..inner.find(']')?];
            let mut words = inner.split(' ');
            (words.next()? == name).then(|| words.map(str::to_owned).collect())
        })
    }

    fn code_number(&self, name: &str) -> Option<u32> {
        self.code(name)?.first()?.parse().ok()
    }

    /// The numbers of an untagged `* SEARCH`.
    fn numbers(&self, kind: &[u8]) -> Vec<u32> {
        let lines = self.untagged.iter().filter(|l| l.first().is_some_and(|v| v.bytes() == kind));
        lines.flat_map(|l| l[1..].iter().filter_map(Value::number)).collect()
    }
}

impl Imap {
    /// Connects and reads the greeting; every later read and write gives up after `limit`.
    pub fn connect(port: u16, limit: Duration) -> Outcome<Imap> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let mut imap = Imap { reader: BufReader::new(stream), tag: 0 };
        if imap.response()?.starts_with(b"* OK") { Ok(imap) } else { fail("no IMAP greeting") }
    }

    /// Connects and logs in.
    pub fn login(port: u16, user: &str) -> Outcome<Imap> {
        let mut imap = Imap::connect(port, Duration::from_secs(60))?;
        imap.command(&format!("LOGIN \"{user}\" \"pw\""))?;
        Ok(imap)
    }

    /// One response with its literals, without the last CRLF.
    fn response(&mut self) -> Outcome<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let start = all.len();
            self.reader.read_until(b'\n', &mut all)?;
            if !all[start..].ends_with(b"\r\n") {
                return fail("the IMAP connection was closed");
            }
            let Some(size) = announced_literal(&all[start..all.len() - 2]) else {
                all.truncate(all.len() - 2);
                return Ok(all);
            };
            let start = all.len();
            all.resize(start + size, 0);
            self.reader.read_exact(&mut all[start..])?;
        }
    }

    /// Sends a command and reads until its tagged reply; anything but OK is a failure.
    pub fn command(&mut self, line: &str) -> Outcome<Reply> {
        self.command_bytes(line.as_bytes())
    }

    fn command_bytes(&mut self, line: &[u8]) -> Outcome<Reply> {
        let (ok, reply) = self.attempt(line)?;
        let shown = String::from_utf8_lossy(&line[..line.len().min(80)]).into_owned();
        if ok { Ok(reply) } else { fail(format!("IMAP {shown}: {}", reply.text)) }
    }

    /// Sends a command and reads until its tagged reply, and whether that was OK.
    pub fn attempt(&mut self, line: &[u8]) -> Outcome<(bool, Reply)> {
        self.tag += 1;
        let tag = format!("t{} ", self.tag);
        self.reader.get_mut().write_all(&[tag.as_bytes(), line, b"\r\n"].concat())?;
        self.tagged(&tag)
    }

    fn tagged(&mut self, tag: &str) -> Outcome<(bool, Reply)> {
        let mut untagged = Vec::new();
        loop {
            let response = self.response()?;
            if let Some(rest) = response.strip_prefix(tag.as_bytes()) {
                let rest = String::from_utf8_lossy(rest).into_owned();
                return Ok(match rest.strip_prefix("OK ") {
                    Some(text) => (true, Reply { text: text.to_owned(), untagged }),
                    None => (false, Reply { text: rest, untagged }),
                });
            }
            if let Some(rest) = response.strip_prefix(b"* ") {
                untagged.push(untagged_values(rest)?);
            }
        }
    }

    /// Sends a command and reads its answer without looking into it: how many bytes that was. For
    /// measuring the server and not this client.
    pub fn measured(&mut self, line: &str) -> Outcome<usize> {
        self.tag += 1;
        let tag = format!("t{} ", self.tag);
        self.reader.get_mut().write_all(format!("{tag}{line}\r\n").as_bytes())?;
        let mut bytes = 0;
        loop {
            let response = self.response()?;
            bytes += response.len() + 2;
            if let Some(rest) = response.strip_prefix(tag.as_bytes()) {
                let rest = String::from_utf8_lossy(rest);
                return if rest.starts_with("OK ") {
                    Ok(bytes)
                } else {
                    fail(format!("IMAP {line}: {rest}"))
                };
            }
        }
    }

    pub fn select(&mut self, folder: &str) -> Outcome<Selected> {
        let reply = self.command(&format!("SELECT {}", quote(folder)))?;
        let exists =
            reply.untagged.iter().find(|l| l.get(1).is_some_and(|v| v.bytes() == b"EXISTS"));
        let missing = || Failure(format!("SELECT {folder}: an answer without UIDs"));
        Ok(Selected {
            exists: exists.and_then(|l| l[0].number()).ok_or_else(missing)?,
            uid_validity: reply.code_number("UIDVALIDITY").ok_or_else(missing)?,
            uid_next: reply.code_number("UIDNEXT").ok_or_else(missing)?,
        })
    }

    /// `UID FETCH set (items)` in the server's order. A server may tell of flag changes that
    /// nobody asked for: those without a UID are left out, others are merged.
    pub fn fetch(&mut self, set: &str, items: &str) -> Outcome<Vec<Fetched>> {
        let reply = self.command(&format!("UID FETCH {set} ({items})"))?;
        let mut order = Vec::new();
        let mut mails: BTreeMap<u32, Fetched> = BTreeMap::new();
        for line in &reply.untagged {
            let [_, name, values] = line.as_slice() else { continue };
            let uid = values.after("UID").and_then(Value::number::<u32>);
            let (b"FETCH", Some(uid)) = (name.bytes(), uid) else { continue };
            let mail = mails.entry(uid).or_insert_with(|| {
                order.push(uid);
                Fetched { uid, ..Fetched::default() }
            });
            merge(mail, values)?;
        }
        Ok(order.iter().filter_map(|uid| mails.remove(uid)).collect())
    }

    /// All mails of the selected folder, whole.
    pub fn fetch_all(&mut self) -> Outcome<Vec<Fetched>> {
        self.fetch("1:*", "UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[]")
    }

    /// `how` is `+`, `-` or empty (replace).
    pub fn store(&mut self, uid: u32, how: &str, names: &Flags) -> Outcome<()> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        self.command(&format!("UID STORE {uid} {how}FLAGS.SILENT ({})", names.join(" ")))?;
        Ok(())
    }

    /// The UID of the copy.
    pub fn copy(&mut self, uid: u32, to: &str) -> Outcome<Option<u32>> {
        let reply = self.command(&format!("UID COPY {uid} {}", quote(to)))?;
        Ok(reply.code("COPYUID").and_then(|w| w.get(2)?.parse().ok()))
    }

    /// The UID in the new folder.
    pub fn move_to(&mut self, uid: u32, to: &str) -> Outcome<Option<u32>> {
        let reply = self.command(&format!("UID MOVE {uid} {}", quote(to)))?;
        Ok(reply.code("COPYUID").and_then(|w| w.get(2)?.parse().ok()))
    }

    /// Expunges one mail that already is `\Deleted`.
    pub fn expunge(&mut self, uid: u32) -> Outcome<()> {
        self.command(&format!("UID EXPUNGE {uid}")).map(|_| ())
    }

    /// The UID of the new mail. `date` is in seconds since 1970.
    pub fn append(
        &mut self,
        folder: &str,
        names: &Flags,
        date: Option<i64>,
        mail: &[u8],
    ) -> Outcome<Option<u32>> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let date = date.map(|d| format!("\"{}\" ", date_time(d))).unwrap_or_default();
        let mut line =
            format!("APPEND {} ({}) {date}{{{}+}}\r\n", quote(folder), names.join(" "), mail.len())
                .into_bytes();
        line.extend_from_slice(mail);
        let reply = self.command_bytes(&line)?;
        Ok(reply.code("APPENDUID").and_then(|w| w.get(1)?.parse().ok()))
    }

    /// Begins to store a mail and stops after so many bytes of it.
    pub fn append_part(&mut self, folder: &str, mail: &[u8], part: usize) -> Outcome<()> {
        self.tag += 1;
        let line = format!("t{} APPEND {} {{{}+}}\r\n", self.tag, quote(folder), mail.len());
        let bytes = [line.as_bytes(), &mail[..part]].concat();
        Ok(self.reader.get_mut().write_all(&bytes)?)
    }

    /// Sends the rest of a mail that [`Imap::append_part`] began: whether it was then stored.
    pub fn append_rest(&mut self, rest: &[u8]) -> Outcome<bool> {
        self.reader.get_mut().write_all(&[rest, b"\r\n"].concat())?;
        let tag = format!("t{} ", self.tag);
        Ok(self.tagged(&tag)?.0)
    }

    /// Several mails in one command.
    pub fn append_many(&mut self, folder: &str, mails: &[Vec<u8>]) -> Outcome<()> {
        let mut line = format!("APPEND {}", quote(folder)).into_bytes();
        for mail in mails {
            line.extend_from_slice(format!(" {{{}+}}\r\n", mail.len()).as_bytes());
            line.extend_from_slice(mail);
        }
        self.command_bytes(&line).map(|_| ())
    }

    pub fn create(&mut self, folder: &str) -> Outcome<()> {
        self.command(&format!("CREATE {}", quote(folder))).map(|_| ())
    }

    pub fn rename(&mut self, from: &str, to: &str) -> Outcome<()> {
        self.command(&format!("RENAME {} {}", quote(from), quote(to))).map(|_| ())
    }

    pub fn delete(&mut self, folder: &str) -> Outcome<()> {
        self.command(&format!("DELETE {}", quote(folder))).map(|_| ())
    }

    pub fn subscribe(&mut self, folder: &str) -> Outcome<()> {
        self.command(&format!("SUBSCRIBE {}", quote(folder))).map(|_| ())
    }

    pub fn unsubscribe(&mut self, folder: &str) -> Outcome<()> {
        self.command(&format!("UNSUBSCRIBE {}", quote(folder))).map(|_| ())
    }

    /// The folders that can be selected.
    pub fn list(&mut self) -> Outcome<BTreeSet<String>> {
        self.names("LIST", true)
    }

    /// The subscribed names, whether or not such a folder exists.
    pub fn lsub(&mut self) -> Outcome<BTreeSet<String>> {
        self.names("LSUB", false)
    }

    fn names(&mut self, verb: &str, selectable: bool) -> Outcome<BTreeSet<String>> {
        let reply = self.command(&format!("{verb} \"\" \"*\""))?;
        let mut names = BTreeSet::new();
        for line in &reply.untagged {
            let [kind, attributes, _, name] = line.as_slice() else { continue };
            let hidden = |a: &Value| matches!(a.bytes(), b"\\NonExistent" | b"\\Noselect");
            if kind.bytes() == verb.as_bytes()
                && !(selectable && attributes.list().iter().any(hidden))
            {
                names.insert(decode_name(&name.string()));
            }
        }
        Ok(names)
    }

    /// UIDs of the selected folder's mails that hold `word`.
    pub fn search_text(&mut self, word: &str) -> Outcome<Vec<u32>> {
        Ok(self.command(&format!("UID SEARCH TEXT {word}"))?.numbers(b"SEARCH"))
    }

    /// MESSAGES, UIDNEXT and UIDVALIDITY of a folder that need not be selected.
    pub fn status(&mut self, folder: &str) -> Outcome<Selected> {
        let items = "(MESSAGES UIDNEXT UIDVALIDITY)";
        let reply = self.command(&format!("STATUS {} {items}", quote(folder)))?;
        let line = reply.untagged.iter().find(|l| l[0].bytes() == b"STATUS" && l.len() == 3);
        let number = |name| line.and_then(|l| l[2].after(name)?.number());
        let missing = || Failure(format!("STATUS {folder}: an answer without numbers"));
        Ok(Selected {
            exists: number("MESSAGES").ok_or_else(missing)?,
            uid_validity: number("UIDVALIDITY").ok_or_else(missing)?,
            uid_next: number("UIDNEXT").ok_or_else(missing)?,
        })
    }

    /// Waits at IDLE until the server says that mails exist which were not there before.
    pub fn idle_until_exists(&mut self) -> Outcome<u32> {
        self.tag += 1;
        let line = format!("t{} IDLE\r\n", self.tag);
        self.reader.get_mut().write_all(line.as_bytes())?;
        let count = loop {
            let response = self.response()?;
            let values = untagged_values(response.strip_prefix(b"* ").unwrap_or_default())?;
            if values.get(1).is_some_and(|v| v.bytes() == b"EXISTS") {
                break values[0].number().unwrap_or(0);
            }
        };
        self.reader.get_mut().write_all(b"DONE\r\n")?;
        while !self.response()?.starts_with(b"t") {}
        Ok(count)
    }

    pub fn logout(mut self) {
        // The answer does not matter: everything was answered before.
        let _ = self.command("LOGOUT");
    }
}

/// The text of a status response stays one value: it is for people and follows no grammar.
fn untagged_values(rest: &[u8]) -> Outcome<Vec<Value>> {
    for kind in [&b"OK"[..], b"NO", b"BAD", b"BYE"] {
        if let Some(text) = rest.strip_prefix(kind).and_then(|r| r.strip_prefix(b" ")) {
            return Ok(vec![Value::Atom(kind.to_vec()), Value::Atom(text.to_vec())]);
        }
    }
    imap_text::parse(rest)
}

fn merge(mail: &mut Fetched, values: &Value) -> Outcome<()> {
    if let Some(names) = values.after("FLAGS") {
        let names = names.list().iter().map(Value::string);
        mail.flags = names.filter(|n| n != "\\Recent").collect();
    }
    if let Some(date) = values.after("INTERNALDATE") {
        let text = date.string();
        mail.date = imap_text::parse_date_time(&text)
            .ok_or_else(|| Failure(format!("INTERNALDATE {text}")))?;
    }
    if let Some(size) = values.after("RFC822.SIZE").and_then(Value::number) {
        mail.size = size;
    }
    if let Some(body) = values.after("BODY[]") {
        mail.body = body.bytes().to_vec();
    }
    Ok(())
}

fn quote(folder: &str) -> String {
    format!("\"{}\"", encode_name(folder).replace('\\', "\\\\").replace('"', "\\\""))
}
