//! The kernel's side: the only place that names `fuser`, and no policy at all.
//!
//! * [`adapter`] turns each kernel request into one call of [`crate::fs::api::MailFs`] and its
//!   answer into a reply. What is in memory is answered on the FUSE thread; a call that must
//!   wait goes to a task that owns the reply, so no FUSE thread ever waits.
//! * [`notify`] tells the kernel what to forget, from a thread of its own.
//! * [`straight`] does the same for the NFS mode ([`crate::hostchange`]), with rules of its own.
//! * [`mount`] mounts, [`mounted`] watches and unmounts, with their own system calls: fuser 0.18
//!   may unmount what somebody else mounted at the same place since, and forgets its mount on
//!   EBUSY.
//! * [`daemon`] is about the process: background, signals, systemd.
//!
//! Locks (fcntl, flock) are never asked for: the kernel then keeps them itself, between all
//! processes of this machine, at native cost. Extended attributes are answered ENOSYS once,
//! which the kernel remembers and shows as EOPNOTSUPP; `fsync` never is, because the kernel
//! would remember that as "always succeeds".

pub mod adapter;
mod convert;
pub mod daemon;
mod holders;
pub mod mount;
pub mod mounted;
pub mod mountinfo;
pub mod notify;
mod passthrough;
mod reply;
pub mod stats;
pub mod straight;
