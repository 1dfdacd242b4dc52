//! I/O address spaces as a VMM uses them: devices are connected, IOASIDs allocated, and both joined.
//!
//! ```text
//!   Context --connect--> Device        what its whole path can do (Capabilities)
//!      |                    |
//!      +--allocate--> Ioasid <--attach, replace, detach--+
//!                       |
//!                       |  what is in it                    how the device's unit gets it, best first (Strategy)
//!                       |    map and unmap    (Managed)       native    the unit walks the guest's own table
//!                       |    virtio-iommu     (Requests)      nested    it walks a table in its own format that follows the guest's
//!                       |    what structures  (Guest)         areas     the kernel maps and unmaps what the guest's table says
//!                       |    and tables say                   software  nobody but the VMM's own device models looks
//!                       v
//!            invalidate, table_written, switch, map, unmap, fault: when they return, no DMA uses what was taken away
//! ```
//!
//! One [`Context`] has one kernel (an open `/dev/iommu`), one guest's memory, and the plugins. An [`Ioasid`] is made without any device; when the first device
//! is attached, the strategy is chosen for its path, and [`Ioasid::explain`] says in words what was chosen and why nothing better was. Devices behind the same
//! unit share what was made. For a device behind another unit, mappings of the kernel's are mirrored; a user's table is refused with the reason, or a
//! second host table is made where the request allows it.
//!
//! # Locks
//!
//! Each IOASID has a lock of its own, which its calls hold while they work; calls on different IOASIDs run in parallel. Locks of the context are taken while
//! devices are connected and page tables are made. [`Ioasid::lookup`] hands out lookups that take no lock. Nothing here starts threads or looks at a clock,
//! and nothing is global.
//!
//! # Life and death
//!
//! A [`Device`] that is attached keeps its IOASID; an IOASID keeps the context. A device is detached, and its DMA blocked, before anything that it uses goes.
//! When the last handles are dropped, the kernel has no object of ours any more.

mod anew;
mod attach;
mod build;
mod commit;
mod context;
mod device;
mod dirty;
mod error;
mod events;
mod exchange;
mod faults;
mod left;
mod limits;
mod managed;
mod memory;
mod metrics;
mod nested;
mod outlook;
mod parent;
mod part;
mod plan;
mod record;
mod recover;
mod request;
mod software;
mod space;
mod state;
mod stats;
mod strategy;
mod tables;
mod watch;

pub use context::{Context, ContextCapabilities, FormatOffer, Setup};
pub use device::{Capabilities, Device};
pub use error::{Error, Property, Refusal};
pub use events::HostEvents;
pub use faults::Response;
pub use limits::{ContextLimits, SpaceLimits};
pub use managed::Target;
pub(crate) use memory::compare;
pub use memory::{GuestMemory, MemoryRegion, PlainTables, Shared, TableSupply};
#[cfg(feature = "metrics")]
pub use metrics::Metrics;
pub use request::{GuestView, Kind, Request, Strategies, Strategy};
pub use space::{Ioasid, SpaceId};
pub use state::{Restored, Saved};
pub use stats::Stats;
pub use strategy::{Chosen, Explanation, Rejected};
