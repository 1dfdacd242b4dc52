//! A kernel and IOMMU hardware inside this process.
//!
//! [`Sim`] implements [`Kernel`](super::Kernel) with iommufd's errno contract. Its hardware really walks tables in memory, with walkers of its own;
//! its IOTLB and walk caches keep what they saw until an invalidation covers it, so that a forgotten invalidation is a wrong DMA. Devices do DMA from
//! as many threads as there are.
//!
//! ```text
//!    Device::read(pasid, iova)                                  Kernel calls
//!        |  gate of each unit, shared                               |
//!        |  binding: what (device, PASID) is attached to  <-------- attach, detach (swap, then drain)
//!        |  context: CD, GCR3 entry, process context  ---- caches <-- invalidate (exclusive gate)
//!        |  stage 1: IOTLB, or a walk in user memory  ---- caches <-- invalidate (exclusive gate)
//!        |  stage 2: the kernel's table of each unit  <------------ map, copy, unmap (remove, then drain)
//!        v
//!    user memory
//! ```
//!
//! What a machine has is said once, in [`SimBuilder`]; then memory is registered as it comes and goes. Physical addresses are the addresses of this
//! process.
//!
//! Where a path has several units, the nearest one walks stage 1, and every unit translates the result by its own copy of the kernel's table: a DMA
//! succeeds only if all of them lead to the same memory. So a unit that was forgotten in mirroring shows.
//!
//! What the real kernel does not have, and the simulation does, has type numbers with `SIM_` in their names: vIOMMUs and invalidation for AMD, and
//! all nesting for RISC-V. Devices have no translation caches of their own (ATC); commands for them are checked and do nothing.

mod areas;
mod attach;
mod cache;
mod calls;
mod commands;
mod device;
mod domain;
mod events;
mod fault;
mod inject;
mod lock;
mod memory;
mod nested;
mod objects;
mod pins;
mod unit;
mod walk;

#[cfg(test)]
mod tests;

pub use device::{Data, Device, DeviceConfig, Translation};
pub use fault::{DmaAccess, Fault, Reason, Stage};
pub use inject::Call;
pub use unit::{UnitConfig, UnitKind};

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, MmapRegion};

use super::{Errno, Result};
use areas::{Charge, Piece};
use device::{DeviceState, FaultLog};
use inject::{Calls, Steps};
use lock::lock;
use memory::UserMemory;
use objects::{Object, Objects};
use pins::Locked;
use unit::Unit;

/// Which unit of a [`SimBuilder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnitIndex(pub usize);

/// The machine to be simulated.
#[derive(Clone, Debug, Default)]
pub struct SimBuilder {
    units: Vec<UnitConfig>,
    devices: Vec<(DeviceConfig, Vec<UnitIndex>)>,
}

/// The description of a machine makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// Two devices have one label.
    #[error("there are two devices {0}")]
    Label(String),
    /// A device is behind a unit that does not exist, or behind none.
    #[error("device {0} has no path")]
    Path(String),
    /// A page size is no power of two from 1 to 4096.
    #[error("unit {unit} cannot have pages of {page_size:#x} bytes")]
    PageSize {
        /// Its name.
        unit: String,
        /// Bytes.
        page_size: u64,
    },
}

impl SimBuilder {
    /// An empty machine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a unit.
    pub fn unit(&mut self, config: UnitConfig) -> UnitIndex {
        self.units.push(config);
        UnitIndex(self.units.len() - 1)
    }

    /// Adds a device; its DMA passes the units of the path, the nearest first.
    pub fn device(&mut self, config: DeviceConfig, path: &[UnitIndex]) -> &mut Self {
        self.devices.push((config, path.to_vec()));
        self
    }

    /// The machine, with its kernel.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn build(&self) -> Result<Arc<Sim>, SimError> {
        if let Some(bad) = self.units.iter().find(|unit| !unit.page_size.is_power_of_two() || unit.page_size > pins::PAGE) {
            return Err(SimError::PageSize { unit: bad.name.clone(), page_size: bad.page_size });
        }
        let units: Vec<Arc<Unit>> = self.units.iter().cloned().map(Unit::new).collect();
        let (memory, log) = (Arc::new(UserMemory::default()), Arc::new(FaultLog::default()));
        let mut devices = BTreeMap::new();
        for ((config, path), serial) in self.devices.iter().zip(1..) {
            let no_path = || SimError::Path(config.label.clone());
            let path = path.iter().map(|index| units.get(index.0).cloned().ok_or_else(no_path)).collect::<Result<Vec<_>, _>>()?;
            if path.is_empty() {
                return Err(no_path());
            }
            let state = DeviceState {
                serial,
                config: config.clone(),
                path,
                bindings: RwLock::default(),
                memory: Arc::clone(&memory),
                log: Arc::clone(&log),
                patience: AtomicU32::new(PATIENCE),
            };
            if devices.insert(config.label.clone(), Device(Arc::new(state))).is_some() {
                return Err(SimError::Label(config.label.clone()));
            }
        }
        Ok(Arc::new(Sim {
            units,
            devices,
            memory,
            log,
            locked: Locked::default(),
            calls: Calls::default(),
            steps: Steps::default(),
            objects: Mutex::default(),
            rlimit_per_process: AtomicBool::new(false),
            privileged: AtomicBool::new(true),
        }))
    }
}

/// Page requests wait so many milliseconds unless told otherwise.
const PATIENCE: u32 = 5000;

/// The simulated kernel: see the [module](self).
#[derive(Debug)]
pub struct Sim {
    units: Vec<Arc<Unit>>,
    devices: BTreeMap<String, Device>,
    memory: Arc<UserMemory>,
    log: Arc<FaultLog>,
    locked: Locked,
    calls: Calls,
    steps: Steps,
    objects: Mutex<Objects>,
    rlimit_per_process: AtomicBool,
    privileged: AtomicBool,
}

impl Sim {
    /// The device with this label, for DMA.
    #[must_use]
    pub fn device(&self, label: &str) -> Option<Device> {
        self.devices.get(label).cloned()
    }

    /// Lets the kernel reach memory of this process: what is not registered does not exist. The region is kept alive.
    ///
    /// # Errors
    /// EEXIST: part of it is registered already.
    pub fn register_region(&self, region: Arc<MmapRegion>) -> Result<()> {
        self.memory.register(region)
    }

    /// The same for all regions of a guest's memory. None stays registered on an error.
    ///
    /// # Errors
    /// EEXIST as in [`Sim::register_region`].
    pub fn register_memory(&self, memory: &GuestMemoryMmap) -> Result<()> {
        let mut done = Vec::new();
        for region in memory.iter() {
            let region = region.get_mmap();
            let first = region.as_ptr() as u64;
            if let Err(errno) = self.memory.register(region) {
                for first in done {
                    self.memory.unregister(first);
                }
                return Err(errno);
            }
            done.push(first);
        }
        Ok(())
    }

    /// Forgets the region that begins at this address of the process. DMA that still leads there fails with [`Reason::NoMemory`].
    ///
    /// # Errors
    /// ENOENT.
    pub fn unregister_region(&self, user_address: u64) -> Result<()> {
        if self.memory.unregister(user_address) { Ok(()) } else { Err(Errno::ENOENT) }
    }

    /// RLIMIT_MEMLOCK, in pages of 4 KiB.
    pub fn set_locked_limit(&self, pages: u64) {
        self.locked.set_limit(pages);
    }

    /// Pages that are pinned, each once per mapping call that it came from.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        self.locked.pages()
    }

    /// Whether the process may do what needs privileges (CAP_SYS_RESOURCE).
    pub fn set_privileged(&self, privileged: bool) {
        self.privileged.store(privileged, Ordering::Relaxed);
    }

    /// Kernel objects that exist, bound devices included. Zero at the end of a test that leaks nothing.
    #[must_use]
    pub fn objects(&self) -> usize {
        lock(&self.objects).len()
    }

    /// Areas in all IOASes.
    #[must_use]
    pub fn areas(&self) -> usize {
        lock(&self.objects).iter().map(|(_, object)| if let Object::Ioas(areas) = object { areas.len() } else { 0 }).sum()
    }

    /// How many areas each table of the kernel holds, by unit: tables of one IOAS hold the same.
    #[must_use]
    pub fn mirrored(&self) -> Vec<(String, usize)> {
        let objects = lock(&self.objects);
        let domains = objects.iter().filter_map(|(_, object)| if let Object::Paging(paging) = object { Some(&paging.domains) } else { None });
        domains.flatten().map(|domain| (domain.unit.config.name.clone(), domain.len())).collect()
    }

    /// Entries in the caches of a unit: translations, tables, contexts.
    #[must_use]
    pub fn cached(&self, unit: UnitIndex) -> usize {
        self.units.get(unit.0).map_or(0, |unit| unit.caches.entries())
    }

    /// Takes the faults that are in the log, oldest first; of very many only the newest are kept.
    pub fn take_faults(&self) -> Vec<Fault> {
        self.log.take()
    }

    /// How many faults there have been.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.log.count()
    }

    /// The n-th kernel call from now, counted from 1, fails with this error before it does anything. Calls that cannot fail by contract do not count:
    /// destroying, detaching, unbinding.
    pub fn fail_nth(&self, n: u64, errno: Errno) {
        self.calls.fail_nth(n, errno);
    }

    /// The same for the n-th call and all after it, until [`Sim::disarm`].
    pub fn fail_from(&self, n: u64, errno: Errno) {
        self.calls.fail_from(n, errno);
    }

    /// The n-th step inside of kernel calls from now fails: each object that is made, area that is pinned, table that is filled is one.
    pub fn fail_step_nth(&self, n: u64, errno: Errno) {
        self.steps.fail_nth(n, errno);
    }

    /// Takes back what [`Sim::fail_nth`], [`Sim::fail_from`] and [`Sim::fail_step_nth`] said; true if it had not happened yet.
    pub fn disarm(&self) -> bool {
        let (call, step) = (self.calls.disarm(), self.steps.disarm());
        call || step
    }

    /// Kernel calls so far, by kind.
    #[must_use]
    pub fn calls(&self) -> BTreeMap<Call, u64> {
        self.calls.counts()
    }

    /// Kernel calls so far, of all kinds.
    #[must_use]
    pub fn calls_total(&self) -> u64 {
        self.calls.counts().values().sum()
    }

    /// Calls this at the beginning of every kernel call, when nothing of it has happened: what DMA finds then is what it finds between two calls. None takes it
    /// back.
    pub fn observe(&self, observer: Option<Arc<dyn Fn(Call) + Send + Sync>>) {
        self.calls.observe(observer);
    }

    /// How many milliseconds a page request of any device waits for its answer.
    pub fn set_patience(&self, rounds: u32) {
        self.devices.values().for_each(|device| device.0.patience.store(rounds, Ordering::Relaxed));
    }

    fn charge(&self) -> Charge<'_> {
        Charge { memory: &self.memory, locked: &self.locked, steps: &self.steps }
    }
}
