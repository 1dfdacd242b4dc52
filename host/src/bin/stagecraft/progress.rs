//! A bar on stderr while something takes long; nothing where stderr is no terminal.

use std::fmt;
use std::io::{IsTerminal as _, stderr};
use std::sync::atomic::Ordering;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use stagecraft::guest::Guest;

/// A bar that goes away when it is dropped; none where nobody sees it, or where there is no thread to draw it.
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// A bar for `what`, such as `walking tables`. It advances with each address space, and says how many tables were read, so that it moves within one, too.
    pub fn new(what: &'static str, guest: &Guest<'_>) -> Self {
        if !stderr().is_terminal() || !can_spawn() {
            return Self(None);
        }
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
        Self(Some(bar))
    }

    /// `done` of `all`.
    pub fn at(&self, done: usize, all: usize) {
        if let Some(bar) = &self.0 {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Whether there may be one more thread: the bar's own would panic without. A limit on processes or on address space may leave none.
fn can_spawn() -> bool {
    std::thread::Builder::new().spawn(|| ()).is_ok_and(|thread| thread.join().is_ok())
}
