//! Guests that mean no good, and what the tests of them share: seeds, a hang detector, and the reference's view of the same guest.
#![allow(dead_code)]

pub mod compare;
mod files;
mod loops;
pub mod mutate;
pub mod nested;

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

pub use crate::configs::{load, plugins};

/// How long one case may take. It detects hangs and says nothing about speed: cases take some milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// `STAGECRAFT_SEED`, or a fixed one; printed, so that a failure can be had again.
pub fn seed() -> u64 {
    let seed = std::env::var("STAGECRAFT_SEED").map_or(0x5747_6563_7261_6674, |text| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).expect("STAGECRAFT_SEED is a number"),
        None => text.parse().expect("STAGECRAFT_SEED is a number"),
    });
    println!("STAGECRAFT_SEED={seed:#x}");
    seed
}

/// `STAGECRAFT_ROUNDS`, or `usual`.
pub fn rounds(usual: u64) -> u64 {
    std::env::var("STAGECRAFT_ROUNDS").map_or(usual, |text| text.parse().expect("STAGECRAFT_ROUNDS is a number"))
}

/// Runs a case, and ends the program with the case's name if it does not come back.
pub fn timed<R>(name: &str, case: impl FnOnce() -> R) -> R {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let watched = Arc::clone(&gate);
    let label = name.to_owned();
    let watchdog = std::thread::spawn(move || {
        let (done, changed) = &*watched;
        let start = Instant::now();
        let mut done = done.lock().expect("nobody panics with this lock");
        while !*done {
            let Some(left) = PATIENCE.checked_sub(start.elapsed()) else {
                println!("{label}: no end after {PATIENCE:?}");
                eprintln!("{label}: no end after {PATIENCE:?}");
                std::process::exit(101);
            };
            done = changed.wait_timeout(done, left).expect("nobody panics with this lock").0;
        }
    });
    /// Ends the watch also when the case panics.
    struct End(Arc<(Mutex<bool>, Condvar)>);
    impl Drop for End {
        fn drop(&mut self) {
            *self.0.0.lock().expect("nobody panics with this lock") = true;
            self.0.1.notify_all();
        }
    }
    let end = End(gate);
    let result = case();
    drop(end);
    watchdog.join().expect("the watchdog sleeps");
    result
}
