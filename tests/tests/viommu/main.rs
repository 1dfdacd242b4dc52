//! The guest's IOMMU as a VMM drives it, end to end: real plugins, guests in memory, raw commands, and DMA through simulated hardware.
#![allow(clippy::unwrap_used)]

mod absurd;
mod behaviour;
mod contexts;
mod failures;
mod guests;
mod host;
mod kernel;
mod lacking;
mod marks;
mod memory;
mod neighbours;
mod nested;
mod pasids;
mod plain;
mod real;
mod records;
mod refresh;
mod refusing;
mod requests;
mod saved;
mod served;
mod watching;
mod written;
