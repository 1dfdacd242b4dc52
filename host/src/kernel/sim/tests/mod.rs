//! Tests of the simulated kernel and hardware.
#![allow(clippy::unwrap_used)]

mod errno;
mod failures;
mod hardware;
mod nested;
mod threads;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::{DeviceConfig, Sim, SimBuilder, UnitConfig, UnitIndex};
use crate::Iova;
use crate::kernel::handle::{Device, Hwpt, Ioas};
use crate::kernel::{HwptFlags, IoasId, Kernel, Map, MapFlags, Result};

pub(super) const RW: MapFlags = MapFlags(MapFlags::READABLE.0 | MapFlags::WRITEABLE.0);
/// Where guest memory begins, and how much there is.
pub(super) const BASE: u64 = 0x4000_0000;
pub(super) const SIZE: u64 = 32 << 20;
pub(super) const PAGE: u64 = 4096;

/// A machine with guest memory that is registered.
pub(super) struct Lab {
    pub(super) sim: Arc<Sim>,
    pub(super) kernel: Arc<dyn Kernel>,
    pub(super) memory: GuestMemoryMmap,
    /// Address of `BASE` in this process.
    pub(super) user: u64,
}

impl Lab {
    /// Device `dev0` behind the first unit, `dev1` behind the last, and so on for each unit; `both` behind all of them.
    pub(super) fn new(units: Vec<UnitConfig>) -> Self {
        let mut builder = SimBuilder::new();
        let units: Vec<UnitIndex> = units.into_iter().map(|unit| builder.unit(unit)).collect();
        for (index, unit) in (0..).zip(&units) {
            builder.device(DeviceConfig::new(&format!("dev{index}"), 0x10 + index), &[*unit]);
            builder.device(DeviceConfig::new(&format!("twin{index}"), 0x20 + index), &[*unit]);
        }
        builder.device(DeviceConfig::new("both", 0x30), &units);
        let sim = builder.build().unwrap();
        let region = MmapRegion::new(SIZE as usize).unwrap();
        let user = region.as_ptr() as u64;
        let memory = GuestMemoryMmap::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(BASE)).unwrap()]).unwrap();
        sim.register_memory(&memory).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        Self { sim, kernel, memory, user }
    }

    /// The address in this process of a guest-physical address.
    pub(super) fn at(&self, gpa: u64) -> u64 {
        self.user + (gpa - BASE)
    }

    pub(super) fn store(&self, gpa: u64, value: u64) {
        self.memory.store(value, GuestAddress(gpa), Ordering::Release).unwrap();
    }

    pub(super) fn load(&self, gpa: u64) -> u64 {
        self.memory.load(GuestAddress(gpa), Ordering::Acquire).unwrap()
    }

    pub(super) fn map(&self, ioas: IoasId, iova: u64, gpa: u64, length: u64) -> Result<Iova> {
        self.kernel.ioas_map(ioas, &Map { flags: RW, iova: Some(Iova(iova)), user_address: self.at(gpa), length })
    }

    /// All of guest memory in an IOAS, and a page table for the device that can be a parent.
    pub(super) fn parent(&self, device: &str, flags: HwptFlags) -> (Device, Ioas, Hwpt) {
        let device = Device::bind(&self.kernel, device).unwrap();
        let ioas = Ioas::alloc(&self.kernel).unwrap();
        self.map(ioas.id(), BASE, BASE, SIZE).unwrap();
        let hwpt = ioas.hwpt(&device, HwptFlags::NEST_PARENT | flags, None).unwrap();
        (device, ioas, hwpt)
    }

    /// Nothing is left of what a test made.
    pub(super) fn assert_clean(&self) {
        assert_eq!((self.sim.objects(), self.sim.pinned_pages(), self.sim.areas()), (0, 0, 0));
    }
}
