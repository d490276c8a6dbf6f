//! A small blocking LMTP client.

use super::{Outcome, fail};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

#[derive(Debug)]
pub struct Lmtp {
    reader: BufReader<TcpStream>,
}

/// A reply: its code and the text of its last line.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: u16,
    pub text: String,
}

impl Answer {
    pub fn accepted(&self) -> bool {
        self.code / 100 == 2
    }
}

impl Lmtp {
    pub fn connect(port: u16) -> Outcome<Lmtp> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        let mut lmtp = Lmtp { reader: BufReader::new(stream) };
        if !lmtp.answer()?.accepted() {
            return fail("no LMTP greeting");
        }
        lmtp.expect("LHLO client.test")?;
        Ok(lmtp)
    }

    fn answer(&mut self) -> Outcome<Answer> {
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            let Some(code) = line.get(..3).and_then(|c| c.parse().ok()) else {
                return fail(format!("the LMTP connection was closed: {line:?}"));
            };
            if line.as_bytes().get(3) != Some(&b'-') {
                return Ok(Answer { code, text: line.trim_end().to_owned() });
            }
        }
    }

    fn command(&mut self, line: &str) -> Outcome<Answer> {
        self.reader.get_mut().write_all(format!("{line}\r\n").as_bytes())?;
        self.answer()
    }

    fn expect(&mut self, line: &str) -> Outcome<()> {
        let answer = self.command(line)?;
        if answer.code / 100 <= 3 { Ok(()) } else { fail(format!("LMTP {line}: {}", answer.text)) }
    }

    /// Sends one mail; one answer for each recipient, in their order.
    pub fn deliver(&mut self, recipients: &[&str], mail: &[u8]) -> Outcome<Vec<Answer>> {
        self.expect("MAIL FROM:<sender@client.test>")?;
        let mut answers = Vec::new();
        for to in recipients {
            answers.push(self.command(&format!("RCPT TO:<{to}>"))?);
        }
        if !answers.iter().any(Answer::accepted) {
            self.expect("RSET")?;
            return Ok(answers);
        }
        self.expect("DATA")?;
        let mut data = Vec::with_capacity(mail.len() + 1000);
        for line in mail.split_inclusive(|&c| c == b'\n') {
            if line.first() == Some(&b'.') {
                data.push(b'.');
            }
            data.extend_from_slice(line);
        }
        data.extend_from_slice(b".\r\n");
        self.reader.get_mut().write_all(&data)?;
        for answer in answers.iter_mut().filter(|a| a.accepted()) {
            *answer = self.answer()?;
        }
        Ok(answers)
    }
}
