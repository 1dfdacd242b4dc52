//! I/O address spaces as a VMM uses them, on the simulated kernel and hardware: every promise is looked at through DMA.
#![allow(clippy::unwrap_used)]

mod absurd;
mod again;
mod blocked;
mod broken;
#[path = "../configs/mod.rs"]
mod configs;
mod converted;
mod counters;
mod dirty;
mod explain;
mod failures;
mod guests;
mod hitless;
mod idle;
mod managed;
mod marks;
mod memory;
mod moves;
mod paths;
mod requests;
mod rig;
mod scribbled;
mod serves;
mod state;
mod threads;
mod told;
mod units;
mod wished;
