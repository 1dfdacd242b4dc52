//! Address spaces that are made of the kernel's areas, on the simulated kernel and hardware.
//!
//! `STAGECRAFT_SEEDS=n` runs n random guests instead of the few of the short run; a failure names its seed.
#![allow(clippy::unwrap_used)]

mod attach;
#[path = "../configs/mod.rs"]
mod configs;
mod failures;
#[path = "../live/guest.rs"]
#[allow(dead_code)]
mod guest;
mod hitless;
mod live;
mod memory;
mod random;
mod support;
