//! Page tables for any vIOMMU, on any IOMMU.

mod address;
mod attributes;
mod change;
pub mod convert;
pub mod device;
pub mod guess;
pub mod guest;
pub mod ioasid;
pub mod kernel;
pub mod lookup;
pub mod memory;
pub mod offers;
pub mod pins;
pub mod plugin;
pub mod snapshot;
pub mod sync;
pub mod table;
pub mod viommu;
pub mod virtio_iommu;
pub mod watch;

pub use address::{Gpa, Iova, Span};
pub use attributes::{Access, Attributes, MemoryType};
pub use change::Change;
