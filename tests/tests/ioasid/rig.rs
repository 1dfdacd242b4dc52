//! A machine, a guest's memory, and a context over both.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::guests::Arch;
use stagecraft::ioasid::{Context, GuestMemory, Setup, TableSupply};
use stagecraft::kernel::sim::{DeviceConfig, DmaAccess, Sim, SimBuilder, UnitConfig, UnitIndex};
use stagecraft::kernel::{Before, Errno, Invalidate, InvalidateError, Kernel, Pasid};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::{Iova, Span};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// Guest memory is from 0 up to here.
pub const MEMORY: u64 = 32 << 20;
/// Where pages for DMA begin.
pub const DATA: u64 = 0x80_0000;

/// The plugins, compiled once.
pub fn plugins() -> Arc<Plugins> {
    static PLUGINS: OnceLock<Arc<Plugins>> = OnceLock::new();
    Arc::clone(PLUGINS.get_or_init(|| Arc::new(Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())))
}

/// A machine with a guest.
pub struct Rig {
    pub sim: Arc<Sim>,
    pub memory: Arc<GuestMemoryMmap>,
}

impl Rig {
    /// Units, and for each device the numbers of the units on its path.
    pub fn new(units: &[UnitConfig], devices: &[(&str, &[usize])]) -> Self {
        let mut builder = SimBuilder::new();
        let units: Vec<UnitIndex> = units.iter().map(|unit| builder.unit(unit.clone())).collect();
        for (requester, (label, path)) in (1..).zip(devices) {
            let path: Vec<UnitIndex> = path.iter().map(|unit| units[*unit]).collect();
            builder.device(DeviceConfig::new(label, requester), &path);
        }
        let sim = builder.build().unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        sim.register_memory(&memory).unwrap();
        sim.set_patience(50);
        Self { sim, memory }
    }

    pub fn kernel(&self) -> Arc<dyn Kernel> {
        Arc::clone(&self.sim) as Arc<dyn Kernel>
    }

    pub fn setup(&self) -> Setup {
        let memory = GuestMemory::of_mmap(&self.memory).unwrap();
        Setup { tables: Arc::clone(&self.sim) as Arc<dyn TableSupply>, ..Setup::new(self.kernel(), plugins(), memory) }
    }

    pub fn context(&self) -> Context {
        Context::with(self.setup()).unwrap()
    }

    /// Whether a device writes and reads back at an IOVA, and where it got to: the address in guest memory.
    pub fn dma(&self, label: &str, iova: u64) -> Option<u64> {
        self.dma_of(label, None, iova)
    }

    pub fn dma_of(&self, label: &str, pasid: Option<Pasid>, iova: u64) -> Option<u64> {
        self.gets_to(label, pasid, iova, DmaAccess::Read)
    }

    /// Where in guest memory an access of a device gets to.
    pub fn reaches(&self, label: &str, iova: u64, access: DmaAccess) -> Option<u64> {
        self.gets_to(label, None, iova, access)
    }

    fn gets_to(&self, label: &str, pasid: Option<Pasid>, iova: u64, access: DmaAccess) -> Option<u64> {
        let device = self.sim.device(label).unwrap();
        let found = device.translate(pasid, Iova(iova), access).ok()?;
        found.user_address.checked_sub(self.memory_at())
    }

    /// Where guest memory is in this process.
    pub fn memory_at(&self) -> u64 {
        let region = GuestMemoryBackend::iter(&*self.memory).next().unwrap();
        region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64
    }

    /// Whether a device may write there.
    pub fn writes(&self, label: &str, iova: u64) -> bool {
        self.sim.device(label).unwrap().write(None, Iova(iova), &[1]).is_ok()
    }

    /// Nothing is left in the kernel.
    pub fn assert_clean(&self) {
        assert_eq!((self.sim.objects(), self.sim.pinned_pages(), self.sim.areas()), (0, 0, 0));
    }
}

/// A kernel that does not invalidate any more, from some call on.
#[derive(Debug)]
pub struct Deaf {
    kernel: Arc<dyn Kernel>,
    /// Invalidations that it still takes.
    takes: AtomicU64,
    refused: AtomicBool,
}

impl Deaf {
    /// One that takes all.
    pub fn before(kernel: Arc<dyn Kernel>) -> Arc<Self> {
        Arc::new(Self { kernel, takes: AtomicU64::new(u64::MAX), refused: AtomicBool::new(false) })
    }

    /// It takes so many, and then none.
    pub fn takes(&self, calls: u64) {
        self.refused.store(false, Ordering::Relaxed);
        self.takes.store(calls, Ordering::Relaxed);
    }

    /// It takes all again; whether it has refused any.
    pub fn hears(&self) -> bool {
        self.takes.store(u64::MAX, Ordering::Relaxed);
        self.refused.load(Ordering::Relaxed)
    }
}

impl Before for Deaf {
    fn behind(&self) -> &dyn Kernel {
        &*self.kernel
    }

    fn invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError> {
        if self.takes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |takes| takes.checked_sub(1)).is_err() {
            self.refused.store(true, Ordering::Relaxed);
            return Err(InvalidateError { errno: Errno::EIO, handled: 0 });
        }
        self.kernel.hwpt_invalidate(request)
    }
}

/// Tells others to stop, also when a test fails meanwhile.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A host's unit with everything.
pub fn unit(arch: Arch) -> UnitConfig {
    match arch {
        Arch::Arm => UnitConfig::smmuv3("host"),
        Arch::Vtd => UnitConfig::vtd("host"),
        Arch::Amd => UnitConfig::amd("host"),
        Arch::Riscv => UnitConfig::riscv("host"),
    }
}

/// A command for a range of IOVAs of everybody.
pub fn range(first: u64, last: u64, leaf: bool) -> Invalidation {
    let scope = Scope { leaf, second_stage: false, domain: None, space: None, id: None };
    Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first, last } } }
}

pub fn page(iova: u64) -> Invalidation {
    range(iova, iova | 0xfff, true)
}

pub const EVERYTHING: Invalidation = Invalidation { index: 0, effect: Effect::Everything };
