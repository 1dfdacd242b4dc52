//! Write a Stagecraft format plugin: what one IOMMU architecture's tables mean, as pure functions.
//!
//! A plugin is a crate with one [`Unit`] (which tables does a device use) and one [`Format`] per table format. The host walks, reads, bounds and
//! builds; the plugin judges patterns. [`export_format!`] turns the crate into a WebAssembly component with the interfaces of
//! `wit/0.1.0/format.wit`. Compiled natively the same crate is an ordinary library, so its unit and property tests need no Wasm.
//!
//! ```text
//!   Format (tiny functions) --derive--> decode / explain / encode --export_format!--> component
//! ```

pub mod bits;
mod config;
#[doc(hidden)]
pub mod export;
mod format;
pub mod queue;
mod unit;

pub use config::{Error, Invalid, Settings, TableConfig};
pub use format::{
    Attributes, ByteOrder, Encoded, FaultKind, Finding, Findings, Format, Geometry, Kind, Level, Mark, Meaning, MemoryType, Missing, Need, Next,
    Root, Segment, Severity, Shape,
};
pub use queue::{Answer, BlockedDma, Command, Effect, Event, EventRecord, PageRequest, Response, Scope};
pub use unit::{
    Binding, BlockKind, Blocked, Direct, Extent, GuestMemory, Intercept, InvalidationTarget, Note, Offer, Outcome, Place, PlaceToBind, RangeEntry,
    Recipe, Registers, Requester, Structure, Tag, Translated, Unit, Window,
};
