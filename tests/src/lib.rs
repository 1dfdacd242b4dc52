//! End-to-end tests of Stagecraft, and the independent reference that they compare it with.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;

pub mod random;
pub mod reference;
pub mod sides;

/// Says what a test leaves out, and why: `cargo xtask test` names it at the end, in the file that `STAGECRAFT_SKIPPED` names.
pub fn skipped(what: &str) {
    println!("skipped: {what}");
    if let Some(file) = std::env::var_os("STAGECRAFT_SKIPPED") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        // One write: others append, too.
        file.write_all(format!("{what}\n").as_bytes()).unwrap();
    }
}
