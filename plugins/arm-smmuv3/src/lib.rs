//! Stagecraft format plugin for the Arm SMMUv3: its stream table and context descriptors, and the VMSAv8-64 tables of both stages.
//!
//! | module | idea |
//! |---|---|
//! | `spec` | where the bits are, with the section that says so |
//! | `vmsa` | granules, levels and addresses: what the stages share |
//! | [`Stage1`], [`Stage2`] | the two table formats |
//! | `stream` | registers to stream table entry |
//! | `context` | stream table entry to context descriptor |
//! | `kernel` | the same facts as Linux passes them |
//! | `queue` | commands and event records |
//! | [`Smmuv3`] | all of that put together |
//!
//! What the architecture has and this plugin does not: AArch32 (LPAE) and 128-bit tables, permission indirection and overlays, the attribute index
//! extension, Secure and Realm streams. A configuration that uses one of them is an `unsupported` error, never a guess.

#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod context;
mod kernel;
mod notes;
mod queue;
mod review;
mod spec;
mod stage1;
mod stage2;
mod stream;
mod unit;
mod vmsa;

pub use stage1::Stage1;
pub use stage2::Stage2;
pub use unit::Smmuv3;

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: Smmuv3,
    formats: [Stage1, Stage2],
}
