//! The `stagecraft` command, as people and programs use it: what it prints, what it writes, and what its exit status says.
#![allow(clippy::unwrap_used)]

mod changes;
mod clumsy;
mod damage;
mod empties;
mod errors;
mod examples;
mod golden;
mod guess;
mod hostile;
mod outcomes;
mod reports;
mod requests;
mod run;
mod streams;
mod structures;
mod support;
mod variants;
