//! Which program used a user last: `last-service` of `metacache list`.
//!
//! The kernel tells the number of the process that opens a file. Its name is asked for when a process
//! is met for the first time with a user, not at each call.

use super::user::User;
use std::collections::VecDeque;
use std::sync::Arc;

/// Processes that are remembered: a number is given again some day.
const KNOWN: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub struct Services(VecDeque<(u32, Option<Arc<str>>)>);

impl Services {
    /// What a process is called, asked of `name` unless it is known.
    fn of(&mut self, pid: u32, name: impl FnOnce(u32) -> Option<String>) -> Option<Arc<str>> {
        if let Some((_, known)) = self.0.iter().find(|(known, _)| *known == pid) {
            return known.clone();
        }
        let found: Option<Arc<str>> = name(pid).map(Arc::from);
        if self.0.len() >= KNOWN {
            self.0.pop_front();
        }
        self.0.push_back((pid, found.clone()));
        found
    }
}

impl User {
    /// A process opens a file of it. 0: it is in another process namespace, or it is the kernel.
    pub fn used_by(&mut self, pid: u32) {
        if pid == 0 {
            return;
        }
        let session = self.session.clone();
        if let Some(service) = self.users_of.of(pid, |pid| session.service(pid)) {
            self.space.account.used_by(service);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn each_process_is_asked_for_once_while_it_is_among_the_last() {
        let asked = Cell::new(0);
        let mut services = Services::default();
        let mut of = |pid: u32| {
            services.of(pid, |pid| {
                asked.set(asked.get() + 1);
                (pid != 3).then(|| format!("imap{pid}"))
            })
        };
        for _ in 0..5 {
            assert_eq!(of(1).as_deref(), Some("imap1"));
            assert_eq!(of(2).as_deref(), Some("imap2"));
            assert_eq!(of(3), None);
        }
        assert_eq!(asked.get(), 3);
        (4..12).for_each(|pid| drop(of(pid)));
        assert_eq!(asked.get(), 11);
        of(1);
        assert_eq!(asked.get(), 12);
    }
}
