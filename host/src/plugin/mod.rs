//! Format plugins: sandboxed WebAssembly components that know one IOMMU architecture each.
//!
//! ```text
//!   bytes --admission--> manifest --compile, or cache--> Plugin --instantiate--> Instance       lookup, pasids, offers, bind_data, suggest,
//!                                                          |                         decode_commands, encode_event
//!                                                          |
//!                                                          +------open-------->  PluginFormat   the table engine's Format
//! ```
//!
//! An [`Instance`] and a [`PluginFormat`] each own a Wasmtime `Store`: the fault domain. What a plugin does wrong is a typed error and ends that Store; the
//! [`Plugin`] and all other instances are untouched.
//!
//! # What a plugin can reach
//!
//! Nothing but its own memory (at most [`Limits::memory_bytes`]), a logger, and during `lookup` and `pasids` the guest memory that the caller lends it.
//! There is no WASI, no clock, no file, no socket, no thread. A call that does not return is interrupted after [`Limits::warm`] or [`Limits::cold`] of
//! processor time; the machine being busy with something else does not count.
//!
//! # Signals
//!
//! Wasmtime can catch a plugin's out-of-bounds accesses with handlers for `SIGSEGV`, `SIGILL`, `SIGBUS` and `SIGFPE`, which it installs for the
//! whole process. A VMM has its own ideas about these, so they are off: compiled plugins check bounds with instructions instead, and this library installs
//! no signal handler. The cost does not show: the median `decode` of the SMMUv3 plugin takes 332 ns without and 342 ns with signals. With it go Cranelift's Spectre mitigations for memory accesses, which rely on faults; a plugin has no clock and no shared memory
//! to measure with.

#![deny(unsafe_code)]

mod admission;
mod artefact;
mod bindings;
mod cache;
mod component;
mod config;
mod directory;
mod engine;
mod error;
mod format;
mod instance;
mod limits;
mod manifest;
mod notes;
mod outcome;
pub mod queue;
pub mod recipe;
mod registry;
mod store;
mod supervise;
mod ticker;
mod words;

pub use admission::admit;
pub use cache::CacheError;
pub use component::Plugin;
pub use config::{Settings, TableConfig};
pub use directory::{DirectoryError, PluginDirectory};
pub use engine::{Config, Engine, EngineError};
pub use error::{CallError, LoadError, Refusal};
pub use format::PluginFormat;
pub use instance::{Binding, DetectMemory, Instance, Offer, PlaceToBind, Requester};
pub use limits::Limits;
pub use manifest::{FormatManifest, Manifest, SettingManifest};
pub use notes::{Note, Notes};
pub use outcome::{BlockKind, Blocked, Direct, Outcome, Tag, Translated};
pub use registry::{Origin, Plugins, PluginsError};
pub use supervise::{
    Answer, Difference, Health, OpenFormatError, Policy, Question, ReplaceError, SuperviseError, Supervised, Supervisor, SupervisorFigures,
    Supervisors,
};
pub use ticker::Ticker;

/// Version of the contract, `stagecraft:format`, that this host speaks.
pub const CONTRACT: &str = "0.1.0";

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
