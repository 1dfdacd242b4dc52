//! The `stagecraft` command, as people and programs use it: what it prints, what it writes, and what its exit status says.
#![allow(clippy::unwrap_used)]

mod changes;
mod errors;
mod golden;
mod guess;
mod reports;
mod streams;
mod support;
