//! What the benches share: guest tables of known content, Stagecraft's production path, its rivals, and the comparison of all of them in turn.
//!
//! Panics are fine here: a bench whose input is wrong must not print figures.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod contest;
pub mod crates;
pub mod fused;
pub mod guest;
pub mod nested;
pub mod pairs;
pub mod pool;
pub mod production;
