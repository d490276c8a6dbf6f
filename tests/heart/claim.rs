//! One name, one session: the name of a backend is claimed, kept and lost.

use super::world::*;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmailfs::cache::disk::RealDisk;
use vmailfs::format::key::backend_key;
use vmailfs::store::faulty::{Fault, Request};
use vmailfs::store::{Body, ObjectStore, Op, PutMode, Reason, StoreError};
use vmailfs::vmail::error::{Error, Result};
use vmailfs::vmail::flush::{self, Options};
use vmailfs::vmail::lease::Lease;

/// Short enough that the test's clock moves by itself.
const LEASE: Duration = Duration::from_secs(30);
const MARGIN: Duration = Duration::from_secs(10);
/// Another machine with the same name.
const TWIN: On = On { machine: "twin", boot: "boot-5", backend: "a" };

fn start(world: &World, on: On) -> Client {
    let mut settings = world.settings(on);
    settings.single_backend = false;
    settings.lease = LEASE;
    settings.host = format!("host-{}", on.machine);
    world.session_with(settings, Arc::new(RealDisk))
}

async fn claim(client: &Client) -> Result<()> {
    client.session().lease.claim(client.session(), false, &mut |_| ()).await
}

async fn renew(client: &Client) -> Result<()> {
    client.session().lease.renew(client.session()).await
}

/// Requests for signs since the last call.
fn asked(world: &World) -> Vec<Op> {
    let all = world.requests().into_iter();
    all.filter(|(_, key, why)| *why == "lease" && *key == backend_key("a")).map(|r| r.0).collect()
}

fn sign(world: &World) -> String {
    String::from_utf8(world.mem.bytes_of(&backend_key("a")).unwrap().to_vec()).unwrap()
}

fn is_sign(r: &Request, op: Op) -> bool {
    r.op == op && r.key == backend_key("a")
}

/// A fault for the first `n` requests of a kind for the sign.
fn first(world: &World, n: usize, op: Op, fault: fn() -> Fault) {
    let count = AtomicUsize::new(0);
    world.faults(move |r| match is_sign(r, op) && count.fetch_add(1, Ordering::SeqCst) < n {
        true => fault(),
        false => Fault::None,
    });
}

fn refused() -> StoreError {
    StoreError::Precondition { key: backend_key("a") }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|e| e.unwrap()) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// I5: nobody has the name: it costs a look and a write, and each renewal one write.
#[tokio::test]
async fn i5_a_new_name_is_claimed_at_once() {
    let world = World::new();
    let a = start(&world, HERE);
    assert!(!a.session().lease.holds());
    let before = world.clock_boot();
    claim(&a).await.unwrap();
    assert_eq!(asked(&world), [Op::Get, Op::Put]);
    assert!(a.session().lease.holds() && world.clock_boot() - before < Duration::from_secs(1));
    assert!(sign(&world).contains(&a.session().id) && sign(&world).contains("host-a"));
    for _ in 0..3 {
        renew(&a).await.unwrap();
    }
    assert_eq!(asked(&world), [Op::Put; 3]);
}

/// I5: a restart and a reboot of the same machine wait for nothing.
#[tokio::test]
async fn i5_the_same_machine_takes_its_name_back_at_once() {
    let world = World::new();
    let mut old = start(&world, HERE);
    claim(&old).await.unwrap();
    for on in [HERE, REBOOTED, HERE] {
        renew(&old).await.unwrap();
        drop(old);
        asked(&world);
        let before = world.clock_boot();
        let new = start(&world, on);
        claim(&new).await.unwrap();
        assert_eq!(asked(&world), [Op::Get, Op::Put]);
        assert!(new.session().lease.holds());
        assert!(world.clock_boot() - before < Duration::from_secs(1));
        old = new;
    }
}

/// I5: who ended in good order leaves nothing to wait for, to its own name or to others.
#[tokio::test]
async fn i5_a_session_that_ended_is_waited_for_by_nobody() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    let session = a.session().clone();
    a.close().await;
    session.lease.end(&session).await;
    assert!(!session.lease.holds());
    // Nor does it come back by a renewal that was due.
    session.lease.renew(&session).await.unwrap();
    assert!(!session.lease.holds() && sign(&world).contains("\"ended\": true"));
    let other = start(&world, On { machine: "b", boot: "boot-7", backend: "b" });
    assert!(other.session().lease.is_over(other.session(), "a").await.unwrap());
    let before = world.clock_boot();
    let twin = start(&world, TWIN);
    claim(&twin).await.unwrap();
    assert!(twin.session().lease.holds());
    assert!(world.clock_boot() - before < Duration::from_secs(1));
}

/// I5: a name is not taken from a session that lives, and the refusal says whose it is.
#[tokio::test]
async fn i5_a_living_session_keeps_its_name() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    let keeper = tokio::spawn(Lease::keep(a.session().clone()));
    let before = world.clock_boot();
    let twin = start(&world, TWIN);
    let error = claim(&twin).await.unwrap_err();
    assert!(matches!(error, Error::NameTaken { .. }), "{error:?}");
    let text = error.to_string();
    for word in ["backend name a", "host-a", &a.session().id, "option backend"] {
        assert!(text.contains(word), "{text}");
    }
    assert!(world.clock_boot() - before <= LEASE / 2, "a renewal is seen as soon as it is made");
    assert!(!twin.session().lease.holds());
    keeper.abort();
    renew(&a).await.unwrap();
    assert!(a.session().lease.holds());
}

/// I5: a state directory that was lost costs at most the lease and its margin; who only seemed to be
/// dead finds out, writes nothing any more, and loses nothing that it had.
#[tokio::test]
async fn i5_a_name_is_taken_from_who_does_not_move() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    a.maildir(&["u"]).await;
    a.deliver("u", "1", b"mail").await.unwrap();
    a.flush("u").await;
    a.deliver("u", "2", b"mail").await.unwrap();
    a.rename("u/new/1", "u/cur/1:2,S").await.unwrap();
    let twin = start(&world, TWIN);
    let mut told = Vec::new();
    let before = world.clock_boot();
    let session = twin.session();
    session.lease.claim(session, false, &mut |wait| told.push(wait.clone())).await.unwrap();
    let waited = world.clock_boot() - before;
    assert!(waited > LEASE + MARGIN && waited < LEASE + MARGIN * 2, "{waited:?}");
    assert!(told.len() > 3 && told[0].left == LEASE + MARGIN && told[0].holder.host == "host-a");
    assert!(told.windows(2).all(|w| w[1].left < w[0].left));

    // Before it knows, its lease is over; afterwards its name is.
    a.create("u/dovecot-uidlist.lock").await.unwrap();
    assert_eq!(a.rename("u/cur/1:2,S", "u/cur/1:2,RS").await, Err(libc::ESTALE));
    let error = renew(&a).await.unwrap_err();
    assert!(matches!(error, Error::NameTaken { .. }), "{error:?}");
    assert_eq!(a.session().lease.taken_by().unwrap().session, twin.session().id);
    world.requests();
    assert!(matches!(renew(&a).await, Err(Error::NameTaken { .. })));
    assert_eq!(a.deliver("u", "4", b"mail").await, Err(libc::ESTALE));
    assert_eq!(a.rename("u/cur/1:2,S", "u/cur/1:2,RS").await, Err(libc::ESTALE));
    let flushed = flush::flush(&a.cell("u"), Options::default()).await;
    assert!(matches!(flushed, Err(Error::NameTaken { .. })), "{flushed:?}");
    // Nobody is opened in a name that is another's: it would take the user from the other.
    assert_eq!(a.mkdir("v").await.and(a.list("v").await.map(drop)), Err(libc::ESTALE));
    assert_eq!(
        world.requests().iter().filter(|r| r.0 == Op::Put && !r.1.contains("/mail/")).count(),
        0
    );
    assert_eq!(a.read("u/cur/1:2,S").await.unwrap(), b"mail", "what is here can be read");
    let (_, waiting) = a.session().waiting();
    assert!(waiting.iter().any(|w| w.user == "u" && w.anything()), "it is not forgotten");

    let there = twin.list("u/new").await.unwrap();
    assert!(there.len() == 2 && there[0] == "1" && there[1].starts_with('2'), "{there:?}");
    // Once the new one is gone, the old machine is a stranger as any other.
    let keeper = tokio::spawn(Lease::keep(twin.session().clone()));
    drop(a);
    let a = start(&world, HERE);
    assert!(matches!(claim(&a).await, Err(Error::NameTaken { .. })));
    keeper.abort();
    claim(&a).await.unwrap();
    assert!(a.session().lease.holds());
    assert!(matches!(renew(&twin).await, Err(Error::NameTaken { .. })));
}

/// I4, I5: a lease that ended in an outage is held again soon after it, not a third of it later.
#[tokio::test]
async fn i5_a_lease_comes_back_with_the_store() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    let session = a.session().clone();
    let failed = Arc::new(AtomicUsize::new(0));
    let count = failed.clone();
    world.faults(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Fault::Before(StoreError::Unavailable { detail: "down".into() })
    });
    let keeper = tokio::spawn(Lease::keep(session.clone()));
    tokio::task::yield_now().await;
    world.clock.advance(LEASE / 3);
    let real = std::time::Instant::now();
    while session.lease.holds() || failed.load(Ordering::SeqCst) < 5 {
        assert!(real.elapsed() < Duration::from_secs(60), "{failed:?} tries");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    world.faults(|_| Fault::None);
    let back = world.clock_boot();
    while !session.lease.holds() {
        assert!(real.elapsed() < Duration::from_secs(60), "not renewed");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(world.clock_boot() - back < LEASE / 6, "{:?}", world.clock_boot() - back);
    keeper.abort();
}

/// I5: a copy of a machine, its state included, has written no sign since.
#[tokio::test]
async fn i5_a_copied_state_directory_is_a_stranger() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    copy_dir(&world.machine_dir(HERE), &world.machine_dir(TWIN));
    renew(&a).await.unwrap();
    let keeper = tokio::spawn(Lease::keep(a.session().clone()));
    let error = claim(&start(&world, TWIN)).await.unwrap_err();
    assert!(matches!(error, Error::NameTaken { .. }), "{error:?}");
    keeper.abort();
    renew(&a).await.unwrap();
    // One that starts before the first has renewed is taken for it; then the first notices.
    std::fs::remove_dir_all(world.machine_dir(TWIN)).unwrap();
    copy_dir(&world.machine_dir(HERE), &world.machine_dir(TWIN));
    let twin = start(&world, TWIN);
    claim(&twin).await.unwrap();
    assert!(matches!(renew(&a).await, Err(Error::NameTaken { .. })));
    renew(&twin).await.unwrap();
}

/// I5: a claim whose answer was lost is no rival's, for this start and for the next.
#[tokio::test]
async fn i5_a_lost_answer_of_a_claim_is_no_rival() {
    for fault in [|| Fault::After(down()), || Fault::After(refused())] {
        for there in [false, true] {
            let world = World::new();
            if there {
                claim(&start(&world, HERE)).await.unwrap();
            }
            let before = world.clock_boot();
            first(&world, 1, Op::Put, fault);
            let a = start(&world, HERE);
            claim(&a).await.unwrap();
            assert!(a.session().lease.holds());
            renew(&a).await.unwrap();
            drop(a);
            // And the question what became of it is not answered, either.
            let (puts, gets) = (AtomicUsize::new(0), AtomicUsize::new(0));
            world.faults(move |r| {
                let put = is_sign(r, Op::Put) && puts.fetch_add(1, Ordering::SeqCst) == 0;
                let get = is_sign(r, Op::Get) && gets.fetch_add(1, Ordering::SeqCst) == 1;
                match (put, get) {
                    (true, _) => fault(),
                    (_, true) => Fault::Before(down()),
                    _ => Fault::None,
                }
            });
            let a = start(&world, HERE);
            assert!(matches!(claim(&a).await, Err(Error::Store { .. })));
            assert!(!a.session().lease.holds());
            assert!(sign(&world).contains(&a.session().id));
            drop(a);
            let a = start(&world, HERE);
            claim(&a).await.unwrap();
            assert!(a.session().lease.holds());
            assert!(world.clock_boot() - before < Duration::from_secs(1));
        }
    }
}

/// I5: nor is a renewal whose answer was lost; and the lease counts from one that was answered.
#[tokio::test]
async fn i5_a_lost_answer_of_a_renewal_is_no_rival() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    world.clock.advance(LEASE / 2);
    asked(&world);
    first(&world, 1, Op::Put, || Fault::After(refused()));
    renew(&a).await.unwrap();
    assert_eq!(asked(&world), [Op::Put, Op::Get, Op::Put]);
    assert!(a.session().lease.seconds_left() > 28);
    world.clock.advance(LEASE / 2);
    first(&world, 2, Op::Put, || Fault::After(down()));
    let seen = sign(&world);
    assert!(matches!(renew(&a).await, Err(Error::Store { .. })));
    assert!(matches!(renew(&a).await, Err(Error::Store { .. })), "the second finds the first");
    assert!(sign(&world) != seen && a.session().lease.seconds_left() < 16);
    let seen = sign(&world);
    renew(&a).await.unwrap();
    assert!(a.session().lease.seconds_left() > 28);
    assert_ne!(sign(&world), seen, "whoever watches sees that it was renewed");
    // One that somebody removed is made again.
    let key = backend_key("a");
    world.mem.delete(&[key], Reason("test")).await.unwrap();
    renew(&a).await.unwrap();
    assert!(sign(&world).contains(&a.session().id));
    // What is no sign takes nobody's name, and lasts no longer than the lease.
    let page = Body::Bytes(b"<html>"[..].into());
    world.mem.put(&backend_key("a"), page, PutMode::Overwrite, &[], Reason("test")).await.unwrap();
    assert!(matches!(renew(&a).await, Err(Error::Store { .. })));
    assert!(a.session().lease.taken_by().is_none() && a.session().lease.holds());
}

/// I5: of two that claim one name at a time one gets it.
#[tokio::test]
async fn i5_of_two_claims_one_holds() {
    for left_over in [false, true] {
        let world = World::new();
        if left_over {
            claim(&start(&world, FRESH)).await.unwrap();
        }
        let (a, b) = (start(&world, HERE), start(&world, TWIN));
        // The winner goes on to show that it lives.
        let run = |client: Client| async move {
            let done = claim(&client).await;
            if done.is_ok() {
                tokio::spawn(Lease::keep(client.session().clone()));
            }
            done
        };
        let (one, other) = tokio::join!(run(a.clone()), run(b.clone()));
        let lost = if one.is_ok() { other } else { one };
        assert!(matches!(lost, Err(Error::NameTaken { .. })), "{lost:?}");
        assert_ne!(a.session().lease.holds(), b.session().lease.holds());
    }
}

/// I5: who knows that the last session is dead need not wait; if it was not, it is fenced.
#[tokio::test]
async fn i5_somebody_who_knows_takes_the_name_at_once() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    let twin = start(&world, TWIN);
    let before = world.clock_boot();
    twin.session().lease.claim(twin.session(), true, &mut |_| ()).await.unwrap();
    assert!(twin.session().lease.holds());
    assert!(world.clock_boot() - before < Duration::from_secs(1));
    assert!(matches!(renew(&a).await, Err(Error::NameTaken { .. })));
    assert!(!a.session().lease.holds());
}

/// I4, I5: a store that fails meanwhile shows nothing of who lives.
#[tokio::test]
async fn i5_a_wait_goes_on_while_the_store_is_down() {
    let world = World::new();
    claim(&start(&world, HERE)).await.unwrap();
    let count = AtomicUsize::new(0);
    world.faults(move |r| {
        let down_now =
            is_sign(r, Op::Get) && (2..8).contains(&count.fetch_add(1, Ordering::SeqCst));
        if down_now { Fault::Before(down()) } else { Fault::None }
    });
    let twin = start(&world, TWIN);
    let before = world.clock_boot();
    claim(&twin).await.unwrap();
    let waited = world.clock_boot() - before;
    assert!(waited > LEASE + MARGIN && waited < LEASE + MARGIN * 2, "{waited:?}");
    // One that never answers is not waited for for ever.
    world.faults(|r| if is_sign(r, Op::Get) { Fault::Before(down()) } else { Fault::None });
    assert!(matches!(claim(&start(&world, FRESH)).await, Err(Error::Store { .. })));
}

/// A single backend pays nothing: no request, no waiting, whatever lies in the store.
#[tokio::test]
async fn a_single_backend_has_no_name_to_claim() {
    let world = World::new();
    claim(&start(&world, HERE)).await.unwrap();
    world.requests();
    let fresh = world.session(TWIN);
    claim(&fresh).await.unwrap();
    renew(&fresh).await.unwrap();
    fresh.session().lease.end(fresh.session()).await;
    assert!(world.requests().is_empty());
    assert!(fresh.session().lease.holds());
}

/// I1, I5: mail that was on its way when the name was lost is deferred.
#[tokio::test]
async fn i5_mail_under_way_when_the_name_is_lost_is_deferred() {
    let world = World::new();
    let a = start(&world, HERE);
    claim(&a).await.unwrap();
    a.maildir(&["u"]).await;
    a.flush("u").await;
    let mail = a.create("u/tmp/1").await.unwrap();
    a.write(mail, 0, b"mail").await.unwrap();
    let twin = start(&world, TWIN);
    twin.session().lease.claim(twin.session(), true, &mut |_| ()).await.unwrap();
    renew(&a).await.unwrap_err();
    assert_eq!(a.fsync(mail).await, Err(libc::ESTALE));
    assert_eq!(a.close_file(mail).await, Err(libc::ESTALE));
}
