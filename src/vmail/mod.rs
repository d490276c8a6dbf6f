//! The heart: users, folders, publishing, flushing, recovering.
//!
//! It knows neither the kernel nor S3: it is driven by plain calls under a user's lock
//! ([`user::User`]) and by the waits those calls ask for ([`need::Need`], [`wait::satisfy`]),
//! over a store, a disk, a clock and randomness that it is given ([`env::Env`]).

pub mod admin;
pub mod bring_back;
pub mod build;
pub mod ceilings;
pub mod chain;
pub mod close;
pub mod counts;
pub mod cut;
pub mod dropped;
pub mod entries;
pub mod env;
pub mod erase;
pub mod error;
pub mod evict;
pub mod exchange;
pub mod export;
pub mod fetch;
pub mod flush;
pub mod folders;
pub mod fsck;
pub mod gc;
mod gc_scan;
pub mod gc_users;
pub mod heads;
pub mod history;
pub mod idle;
pub mod io;
pub mod journal;
pub mod lease;
pub mod lines;
pub mod load;
pub mod local;
pub mod lost;
pub mod metacache;
pub mod names;
pub mod need;
pub mod node;
pub mod open;
pub mod parts;
pub mod promise;
pub mod publish;
pub mod read;
pub mod recover;
pub mod recover_mdbox;
pub mod recover_sdbox;
pub mod rename;
pub mod repair;
pub mod restore;
pub mod schedule;
pub mod session;
pub mod snapshot;
pub mod space;
pub mod stage;
pub mod stored;
pub mod stream;
pub mod swap;
pub mod tree;
mod turns;
pub mod uids;
pub mod undelete;
pub mod user;
pub mod version;
pub mod wait;
