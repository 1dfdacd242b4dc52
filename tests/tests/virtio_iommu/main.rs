//! Guests that ask for mappings instead of writing tables: the rules of Virtio 1.3 section 5.13, hostile bytes, a naive model of the device, a real driver's
//! requests as QEMU recorded them, and conversion into every format.
#![allow(clippy::unwrap_used)]

mod bytes;
mod convert;
mod model;
mod recorded;
mod rules;

use std::sync::Arc;

use stagecraft::Span;
use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::virtio_iommu::{Config, Device, Features, RequestLimits};

/// A memory map of these regions: kind, first and last address.
pub fn memory(regions: &[(Kind, u64, u64)]) -> Arc<MemoryMap> {
    let regions = regions.iter().map(|(kind, first, last)| Region { kind: *kind, span: Span { first: *first, last: *last } });
    Arc::new(MemoryMap::new(regions.collect()).unwrap())
}

/// A device whose driver accepted everything.
pub fn device(config: Config, map: Arc<MemoryMap>, limits: RequestLimits) -> Device {
    let mut device = Device::new(Features::ALL, config, map, limits).unwrap();
    device.accept(Features::ALL, &mut Vec::new()).unwrap();
    device
}
