//! A bar on stderr while something takes long; nothing where stderr is no terminal.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use stagecraft::guest::Guest;

/// A bar that goes away when it is dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar for `what`, such as `walking tables`. It advances with each address space, and says how many tables were read, so that it moves within one, too.
    pub fn new(what: &'static str, guest: &Guest<'_>) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{spinner} {msg} {bar:24} {pos}/{len}, {tables} tables read {elapsed}");
        let read = guest.tables_read();
        // The bar asks whenever it is drawn, which a thread of its own does.
        let tables = move |_: &ProgressState, out: &mut dyn fmt::Write| {
            let _ = write!(out, "{}", crate::output::count(read.load(Ordering::Relaxed)));
        };
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).with_key("tables", tables));
        bar.set_message(what);
        bar.enable_steady_tick(Duration::from_millis(150));
        Self(bar)
    }

    /// `done` of `all`.
    pub fn at(&self, done: usize, all: usize) {
        self.0.set_length(all as u64);
        self.0.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
