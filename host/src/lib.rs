//! Page tables for any vIOMMU, on any IOMMU.

mod address;
mod attributes;
pub mod convert;
pub mod device;
pub mod guest;
pub mod kernel;
pub mod memory;
pub mod plugin;
pub mod snapshot;
pub mod table;

pub use address::{Gpa, Iova, Span};
pub use attributes::{Access, Attributes, MemoryType};
