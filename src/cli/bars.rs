//! How long work shows how far it is: a bar or a line on a terminal; nothing where somebody reads
//! what is written, unless -v asks for it.

use crate::admin::Told;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

static VERBOSE: AtomicBool = AtomicBool::new(false);

/// `-v` was given.
pub(super) fn be_verbose() {
    VERBOSE.store(true, Ordering::Relaxed);
}

/// What a command does with what it is told. Dropped, it leaves the terminal as it was.
pub(super) struct Watch {
    terminal: bool,
    bar: Option<ProgressBar>,
}

impl Watch {
    pub(super) fn new() -> Watch {
        Watch { terminal: std::io::stderr().is_terminal(), bar: None }
    }

    pub(super) fn told(&mut self, told: &Told) {
        match told {
            Told::Line(text) if self.terminal || VERBOSE.load(Ordering::Relaxed) => {
                match &self.bar {
                    Some(bar) => bar.println(text),
                    None => _ = writeln!(std::io::stderr(), "{text}"),
                }
            }
            Told::Line(_) => {}
            Told::Step { done, of, what } if self.terminal => {
                let bar = self.bar.get_or_insert_with(|| {
                    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}");
                    let bar =
                        ProgressBar::with_draw_target(Some(*of), ProgressDrawTarget::stderr());
                    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                });
                bar.set_length(*of);
                bar.set_message(what.clone());
                bar.set_position(*done);
            }
            Told::Step { done, of, what } if VERBOSE.load(Ordering::Relaxed) => {
                let _ = writeln!(std::io::stderr(), "{done} of {of} {what}");
            }
            Told::Step { .. } => {}
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
