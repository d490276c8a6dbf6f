//! What clients do all day, with everything in caches: the same commands on each place in turn,
//! some on one, the same number on the next, so that whatever else the machine does meets all.

use crate::Wanted;
use crate::cpus::Cpus;
use crate::place::{Kind, Place, append, deliver};
use crate::support::dovecot::Format;
use crate::support::imap::Imap;
use crate::support::lmtp::Lmtp;
use crate::support::messages::message;
use crate::table::{Limit, Row, Table, median, quantile};
use std::time::{Duration, Instant};

const PART: &str = "warm";
const USER: &str = "anna";
/// How long a block of quick commands takes.
const BLOCK: Duration = Duration::from_millis(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Login,
    Select,
    Flags,
    Body,
    Store,
    Search,
    Append,
    Deliver,
    Copy,
    Move,
    Expunge,
}

const OPS: [Op; 11] = [
    Op::Login,
    Op::Select,
    Op::Flags,
    Op::Body,
    Op::Store,
    Op::Search,
    Op::Append,
    Op::Deliver,
    Op::Copy,
    Op::Move,
    Op::Expunge,
];

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Login => "login, SELECT, FETCH FLAGS",
            Op::Select => "SELECT",
            Op::Flags => "FETCH 1:* FLAGS",
            Op::Body => "FETCH a body",
            Op::Store => "STORE",
            Op::Search => "SEARCH TEXT",
            Op::Append => "APPEND",
            Op::Deliver => "LMTP delivery",
            Op::Copy => "COPY",
            Op::Move => "MOVE",
            Op::Expunge => "EXPUNGE",
        }
    }

    /// Whether the issue of the work has a figure for it.
    fn limit(self) -> Limit {
        match self {
            Op::Login | Op::Append | Op::Deliver => Limit::None,
            _ => Limit::AtMost(1.25),
        }
    }

    /// Whether each takes a mail away, or makes one.
    fn uses_up(self) -> bool {
        matches!(self, Op::Append | Op::Deliver | Op::Copy | Op::Move | Op::Expunge)
    }

    /// How often in a block, for the slow ones.
    fn times(self, usual: usize) -> usize {
        match self {
            Op::Search => usual.div_ceil(3),
            _ => usual,
        }
    }
}

/// One place with a client that is logged in.
struct Client {
    place: Place,
    imap: Imap,
    lmtp: Lmtp,
    uids: Vec<u32>,
    turn: usize,
}

pub fn run(table: &mut Table, wanted: &Wanted, cpus: &Cpus) {
    let (mails, per_block) = if wanted.quick { (100, 5) } else { (250, 10) };
    let blocks = wanted.rounds.unwrap_or(if wanted.quick { 8 } else { 15 });
    for format in wanted.formats(&[Format::Maildir, Format::Sdbox]) {
        let mut kinds = vec![Kind::Ext4, Kind::File];
        if !wanted.quick {
            kinds.push(Kind::S3);
        }
        // Those that are moved and expunged away.
        let mails = mails + 2 * blocks * per_block + 50;
        let mut clients: Vec<Client> =
            kinds.iter().map(|kind| Client::new(*kind, format, mails, cpus)).collect();
        for op in OPS {
            if wanted.skips(op.name()) {
                continue;
            }
            let times = op.times(per_block);
            let took = measure(&mut clients, op, blocks, times);
            let ext4 = median(took[0].concat());
            for (client, blocks) in clients.iter_mut().zip(&took).skip(1) {
                let here = median(blocks.concat());
                let ratios: Vec<f64> = blocks
                    .iter()
                    .zip(&took[0])
                    .map(|(a, b)| median(a.clone()) / median(b.clone()))
                    .collect();
                let (low, high) = (quantile(ratios.clone(), 0.25), quantile(ratios, 0.75));
                let asked = client.asked(op);
                let note = format!("half of the blocks {low:.2} to {high:.2}; kernel: {asked}");
                let row = Row::new(PART, op.name(), format.name(), client.place.name());
                let row = row.value(here, "ms").ext4(ext4).figure(here / ext4, op.limit());
                table.row(row.note(note));
            }
        }
        for client in clients {
            client.imap.logout();
            drop(client.lmtp);
            client.place.end();
        }
    }
}

/// Times in ms: of each client, of each block.
fn measure(clients: &mut [Client], op: Op, blocks: usize, times: usize) -> Vec<Vec<Vec<f64>>> {
    let mut took: Vec<Vec<Vec<f64>>> = clients.iter().map(|_| Vec::new()).collect();
    for client in &mut *clients {
        client.before(op);
        client.once(op);
    }
    for block in 0..blocks {
        for at in 0..clients.len() {
            // Not always in the same order.
            let at = (at + block) % clients.len();
            let client = &mut clients[at];
            took[at].push(client.block(op, times));
        }
    }
    took
}

impl Client {
    fn new(kind: Kind, format: Format, mails: usize, cpus: &Cpus) -> Client {
        let place = Place::start(kind, format, &[USER], &[], cpus);
        let mut imap = place.imap(USER);
        imap.create("Work").unwrap();
        let texts: Vec<Vec<u8>> = (0..mails).map(|n| text(n as u32)).collect();
        append(&mut imap, "INBOX", &texts);
        imap.select("INBOX").unwrap();
        let mut client = Client { lmtp: place.lmtp(), place, imap, uids: Vec::new(), turn: 0 };
        // Fills Dovecot's caches.
        client.command("UID FETCH 1:* (FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])");
        client.uids = client.imap.fetch("1:*", "UID").unwrap().iter().map(|m| m.uid).collect();
        client
    }

    fn command(&mut self, line: &str) -> Duration {
        let start = Instant::now();
        self.imap.measured(line).unwrap();
        start.elapsed()
    }

    /// Times in ms of so many commands, and of more where they are quick: what the daemon does behind
    /// the scenes now and then must not meet all of one place's.
    fn block(&mut self, op: Op, times: usize) -> Vec<f64> {
        let start = Instant::now();
        let mut took = Vec::new();
        while took.len() < times || !op.uses_up() && start.elapsed() < BLOCK && took.len() < 100 {
            took.push(self.once(op).as_secs_f64() * 1e3);
        }
        took
    }

    /// Requests of the kernel for one such command.
    fn asked(&mut self, op: Op) -> String {
        let times = 5;
        let before = self.place.kernel_requests();
        for _ in 0..times {
            self.once(op);
        }
        let after = self.place.kernel_requests();
        let count = |(name, n): (&String, &u64)| {
            let more = n - before.get(name).copied().unwrap_or_default();
            // Reading the numbers takes some, too.
            (more >= times).then(|| format!("{} {name}", more / times))
        };
        after.iter().filter_map(count).collect::<Vec<_>>().join(", ")
    }

    /// Whether there are UIDs that the client does not know is for the server to say.
    fn before(&mut self, op: Op) {
        if matches!(op, Op::Copy | Op::Move | Op::Expunge) {
            self.command("NOOP");
        }
    }

    fn once(&mut self, op: Op) -> Duration {
        self.turn += 1;
        // All of them before one comes again, whatever their number: a flag that is set already is
        // no change.
        let uid = self.uids[self.turn % self.uids.len()];
        match op {
            Op::Login => {
                let start = Instant::now();
                let mut imap = self.place.imap(USER);
                imap.measured("SELECT INBOX").unwrap();
                imap.measured("UID FETCH 1:* (FLAGS)").unwrap();
                imap.logout();
                start.elapsed()
            }
            Op::Select => {
                self.command("UNSELECT");
                self.command("SELECT INBOX")
            }
            Op::Flags => self.command("UID FETCH 1:* (FLAGS)"),
            Op::Body => self.command(&format!("UID FETCH {uid} (BODY.PEEK[])")),
            Op::Store => {
                let sign = if (self.turn / self.uids.len()).is_multiple_of(2) { '+' } else { '-' };
                self.command(&format!("UID STORE {uid} {sign}FLAGS.SILENT (\\Flagged)"))
            }
            Op::Search => self.command("UID SEARCH TEXT thatnomailholds"),
            Op::Append => {
                let mail = text(1_000_000 + self.turn as u32);
                let start = Instant::now();
                self.imap.append("Work", &Default::default(), None, &mail).unwrap();
                start.elapsed()
            }
            Op::Deliver => {
                let mail = text(2_000_000 + self.turn as u32);
                let start = Instant::now();
                deliver(&mut self.lmtp, USER, &mail);
                start.elapsed()
            }
            Op::Copy => self.command(&format!("UID COPY {uid} Work")),
            Op::Move => {
                let uid = self.uids.pop().unwrap();
                self.command(&format!("UID MOVE {uid} Work"))
            }
            Op::Expunge => {
                let uid = self.uids.pop().unwrap();
                self.command(&format!("UID STORE {uid} +FLAGS.SILENT (\\Deleted)"));
                self.command(&format!("UID EXPUNGE {uid}"))
            }
        }
    }
}

fn text(number: u32) -> Vec<u8> {
    message(7, &format!("mail{number}")).bytes
}
