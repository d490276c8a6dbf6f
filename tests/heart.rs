//! The heart without a mount: the file system driven through its calls over a store that fails
//! as told, real directories and a clock of its own. Tests name the invariant they stand for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod heart {
    mod ack;
    mod ahead;
    mod begun;
    mod caches;
    mod claim;
    mod close;
    mod crash;
    mod erase;
    mod evict;
    mod flush;
    mod fscache;
    mod fsck;
    mod full_disk;
    mod gc;
    mod hedge;
    mod idle;
    mod later;
    mod leftover;
    mod metacache;
    mod ownership;
    mod publish;
    mod random;
    mod repair;
    mod reset;
    mod sdbox;
    mod strict;
    mod trickle;
    mod uids;
    mod undelete;
    mod world;
}
