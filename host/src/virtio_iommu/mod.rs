//! virtio-iommu: a guest that asks for mappings instead of writing tables. The second source beside the walker.
//!
//! ```text
//!   request queue            Device                              whoever keeps a host table
//!   bytes  --serve-->  decode -> handle -> status  --Effect-->   changes of a domain, endpoints that move
//!                                   |
//!                                Domain (a Source)  --walk-->    builder, collector, translate: as from tables
//!   event queue  <--to_bytes--   Report             <-- fault of a DMA
//! ```
//!
//! The device model's address space side of the specification: Virtio 1.3 section 5.13 (1.2 is the same). The virtqueues themselves belong to the VMM, which
//! hands over the readable and the writable part of one request.
//!
//! A request succeeds whole, and its effects are exact, or it changes nothing. Everything that a guest can make the device remember is bounded by
//! [`RequestLimits`]; MAP, UNMAP and a translation take time logarithmic in the number of mappings, for each mapping that is touched.

mod config;
mod device;
mod domain;
mod fault;
mod request;
mod rules;

pub use config::{Config, ConfigError, DomainRange, Features};
pub use device::{Device, Effect, EndpointError, Landing, Reach, RequestLimits};
pub use domain::{Domain, MapError, Split};
pub use fault::{Reason, Report};
pub use request::{DecodeError, MapFlags, Request, Reserved, ReservedKind, Status, attach_flags};

/// The `unit.kind` of a snapshot of such a guest.
pub const UNIT: &str = "virtio-iommu";

/// What stands for a format's name where a domain is listed among tables; the setting `domain` says which one. It is no format that a plugin has.
pub const FORMAT: &str = "virtio-iommu/requests";
