//! How an answer of the file system becomes a reply: at once, or from a task once it is known.
//! Every error leaves by one door, [`Core::fail`].

use super::convert::{file_attr, no_attr, ttl};
use super::passthrough::{Mode, Passthrough};
use super::stats::{Begun, FuseStats, Op};
use crate::fs::api::{Attr, Fh, Found, FsError, Ino, Lookup, MailFs, Need, OpenMode, Opened, Step};
use fuser::{
    BackingId, Errno, FileHandle, FopenFlags, Generation, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// Inode numbers are not used again during a mount.
const GENERATION: Generation = Generation(0);

/// What callbacks and the tasks they start share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) fs: Fs,
    pub(super) rt: Handle,
    pub(super) stats: Arc<FuseStats>,
    pub(super) passthrough: Passthrough<BackingId>,
}

/// The file system behind the mount.
#[derive(Clone)]
pub(super) struct Fs(pub(super) Arc<dyn MailFs>);

impl std::fmt::Debug for Fs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MailFs")
    }
}

/// A reply that can carry a `T`.
pub(super) trait Answer<T>: Refuse {
    fn done(self, core: &Core, value: T);
}

/// A reply that can carry an error.
pub(super) trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

impl Core {
    /// Replies with the first answer of a call, or has it made again on a task once what it
    /// needs is there. `own` is asked only then to make the repeatable call, which owns its
    /// arguments.
    pub(super) fn serve<T, R, O, A>(
        self: &Arc<Self>,
        begun: Begun,
        reply: R,
        first: Step<T>,
        own: O,
    ) where
        T: Send + 'static,
        R: Answer<T>,
        O: FnOnce() -> A,
        A: Fn(&dyn MailFs) -> Step<T> + Send + 'static,
    {
        match first {
            Step::Done(result) => self.answer(begun, reply, result),
            Step::Wait(need) => {
                let core = self.clone();
                let again = own();
                self.rt.spawn(async move {
                    let result = core.settle(begun.op, need, again).await;
                    core.answer(begun, reply, result);
                });
            }
        }
    }

    async fn settle<T>(
        &self,
        op: Op,
        mut need: Need,
        again: impl Fn(&dyn MailFs) -> Step<T>,
    ) -> Result<T, FsError> {
        let _waiting = self.stats.wait(op);
        loop {
            self.fs.0.wait(need).await?;
            match again(&*self.fs.0) {
                Step::Done(result) => return result,
                Step::Wait(next) => need = next,
            }
        }
    }

    fn answer<T>(&self, begun: Begun, reply: impl Answer<T>, result: Result<T, FsError>) {
        match result {
            Ok(value) => reply.done(self, value),
            Err(error) => self.fail(begun.op, reply, &error),
        }
        self.stats.answered(begun);
    }

    /// The one door for errors: logged, counted, told to the caller.
    pub(super) fn fail(&self, op: Op, reply: impl Refuse, error: &FsError) {
        let errno = Errno::from_i32(error.errno);
        if error.quiet {
            tracing::debug!(op = op.name(), errno = errno.code(), "{}", error.text);
        } else {
            tracing::warn!(op = op.name(), errno = errno.code(), "{}", error.text);
        }
        self.stats.error(op, errno.code());
        reply.refuse(errno);
    }

    /// As `serve`, for a listing: entries go straight into the reply. A call that asks to wait
    /// after it gave some entries has answered: the kernel comes back for the rest.
    pub(super) fn serve_listing(
        self: &Arc<Self>,
        mut reply: ReplyDirectory,
        ino: Ino,
        fh: Fh,
        cookie: u64,
    ) {
        const OP: Op = Op::Readdir;
        let begun = self.stats.request(OP);
        match self.list(&mut reply, ino, fh, cookie) {
            Listed::Done(result) => self.listed(begun, reply, result),
            Listed::Wait(mut need) => {
                let core = self.clone();
                self.rt.spawn(async move {
                    let waiting = core.stats.wait(OP);
                    let result = loop {
                        if let Err(error) = core.fs.0.wait(need).await {
                            break Err(error);
                        }
                        match core.list(&mut reply, ino, fh, cookie) {
                            Listed::Done(result) => break result,
                            Listed::Wait(next) => need = next,
                        }
                    };
                    drop(waiting);
                    core.listed(begun, reply, result);
                });
            }
        }
    }

    fn listed(&self, begun: Begun, reply: ReplyDirectory, result: Result<(), FsError>) {
        match result {
            Ok(()) => reply.ok(),
            Err(error) => self.fail(begun.op, reply, &error),
        }
        self.stats.answered(begun);
    }

    fn list(&self, reply: &mut ReplyDirectory, ino: Ino, fh: Fh, cookie: u64) -> Listed {
        use std::os::unix::ffi::OsStrExt;
        let mut taken = false;
        let step = self.fs.0.readdir(ino, fh, cookie, &mut |entry| {
            let full = reply.add(
                fuser::INodeNo(entry.ino),
                entry.cookie,
                super::convert::file_type(entry.kind),
                std::ffi::OsStr::from_bytes(&entry.name),
            );
            taken |= !full;
            !full
        });
        match step {
            Step::Done(result) => Listed::Done(result),
            Step::Wait(_) if taken => Listed::Done(Ok(())),
            Step::Wait(need) => Listed::Wait(need),
        }
    }

    /// Flags and backing of a handle; `None` if it cannot be had (then it is closed again).
    fn opened(
        &self,
        ino: Ino,
        how: OpenMode,
        created: bool,
        opened: &Opened,
        register: impl FnOnce(&std::fs::File) -> std::io::Result<BackingId>,
    ) -> Option<(FopenFlags, Option<Arc<BackingId>>)> {
        let writes = how.write || how.truncate;
        let backing = opened.backing.as_deref();
        let mut flags = FopenFlags::empty();
        if opened.keep_cache || backing.is_some() {
            flags |= FopenFlags::FOPEN_KEEP_CACHE;
        }
        if opened.uncached {
            flags |= FopenFlags::FOPEN_DIRECT_IO;
        }
        if opened.quiet_close || !writes && !created {
            // Spares a round trip.
            flags |= FopenFlags::FOPEN_NOFLUSH;
        }
        match self.passthrough.opened(ino, opened.fh, writes, backing, register) {
            Mode::Plain => Some((flags, None)),
            Mode::Through(id) => {
                self.stats.passthrough_open();
                // The other flags speak of the page cache, which such a handle does not use.
                Some((flags & FopenFlags::FOPEN_NOFLUSH, Some(id)))
            }
            Mode::Conflict => {
                self.fs.0.release(ino, opened.fh);
                None
            }
        }
    }
}

enum Listed {
    Done(Result<(), FsError>),
    Wait(Need),
}

fn conflict(ino: Ino) -> FsError {
    FsError {
        errno: libc::ETXTBSY,
        text: format!("inode {ino} was opened for writing while its immutable copy is in use"),
        quiet: false,
    }
}

/// A reply to OPEN with what the decision about passthrough needs.
pub(super) struct OpenReply {
    pub(super) reply: ReplyOpen,
    pub(super) ino: Ino,
    pub(super) how: OpenMode,
}

/// A reply to CREATE, likewise.
pub(super) struct CreateReply {
    pub(super) reply: ReplyCreate,
    pub(super) how: OpenMode,
}

/// A reply to OPENDIR.
pub(super) struct OpendirReply(pub(super) ReplyOpen);

macro_rules! refuse {
    ($($reply:ty: $self:ident => $inner:expr,)*) => {
        $(impl Refuse for $reply {
            fn refuse($self, errno: Errno) {
                $inner.error(errno);
            }
        })*
    };
}

refuse! {
    ReplyEmpty: self => self,
    ReplyEntry: self => self,
    ReplyAttr: self => self,
    ReplyData: self => self,
    ReplyWrite: self => self,
    ReplyDirectory: self => self,
    ReplyOpen: self => self,
    ReplyCreate: self => self,
    OpenReply: self => self.reply,
    CreateReply: self => self.reply,
    OpendirReply: self => self.0,
}

impl Answer<()> for ReplyEmpty {
    fn done(self, _: &Core, (): ()) {
        self.ok();
    }
}

impl Answer<Found> for ReplyEntry {
    fn done(self, _: &Core, found: Found) {
        self.entry_with_ttls(
            &ttl(found.attr.cacheable),
            &ttl(found.cacheable),
            &file_attr(&found.attr),
            GENERATION,
        );
    }
}

impl Answer<Lookup> for ReplyEntry {
    fn done(self, core: &Core, lookup: Lookup) {
        match lookup {
            Lookup::Found(found) => Answer::<Found>::done(self, core, found),
            Lookup::Absent { cacheable: true } => {
                self.entry_with_ttls(&Duration::ZERO, &ttl(true), &no_attr(), GENERATION);
            }
            Lookup::Absent { cacheable: false } => self.error(Errno::ENOENT),
        }
    }
}

impl Answer<Attr> for ReplyAttr {
    fn done(self, _: &Core, attr: Attr) {
        self.attr(&ttl(attr.cacheable), &file_attr(&attr));
    }
}

impl Answer<Vec<u8>> for ReplyData {
    fn done(self, _: &Core, data: Vec<u8>) {
        self.data(&data);
    }
}

impl Answer<u32> for ReplyWrite {
    fn done(self, _: &Core, written: u32) {
        self.written(written);
    }
}

impl Answer<Fh> for OpendirReply {
    fn done(self, _: &Core, fh: Fh) {
        self.0.opened(FileHandle(fh), FopenFlags::empty());
    }
}

impl Answer<Opened> for OpenReply {
    fn done(self, core: &Core, opened: Opened) {
        let OpenReply { reply, ino, how } = self;
        let fh = FileHandle(opened.fh);
        match core.opened(ino, how, false, &opened, |file| reply.open_backing(file)) {
            Some((flags, None)) => reply.opened(fh, flags),
            Some((flags, Some(backing))) => reply.opened_passthrough(fh, flags, &backing),
            None => core.fail(Op::Open, reply, &conflict(ino)),
        }
    }
}

impl Answer<(Found, Opened)> for CreateReply {
    fn done(self, core: &Core, (found, opened): (Found, Opened)) {
        let CreateReply { reply, how } = self;
        let (fh, ino) = (FileHandle(opened.fh), found.attr.ino);
        let ttl = ttl(found.cacheable && found.attr.cacheable);
        let attr = file_attr(&found.attr);
        match core.opened(ino, how, true, &opened, |file| reply.open_backing(file)) {
            Some((flags, None)) => reply.created(&ttl, &attr, GENERATION, fh, flags),
            Some((flags, Some(backing))) => {
                reply.created_passthrough(&ttl, &attr, GENERATION, fh, flags, &backing);
            }
            None => {
                core.fs.0.forget(ino, 1);
                core.fail(Op::Create, reply, &conflict(ino));
            }
        }
    }
}
