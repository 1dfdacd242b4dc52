//! The host: units, devices behind them, and a context; what simulated DMA gets.

use std::sync::{Arc, OnceLock};

use stagecraft::ioasid::{Context, GuestMemory, MemoryRegion, Setup, Shared, TableSupply};
use stagecraft::kernel::sim::{Device, DeviceConfig, DmaAccess, Sim, SimBuilder, UnitConfig};
use stagecraft::kernel::{Kernel, Pasid};
use stagecraft::memory::Kind;
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::{Iova, Span};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

/// Memory that is always there is from 0 up to here, but for the hole.
pub const RAM: u64 = 32 << 20;
/// Memory with tables that goes for a moment.
pub const HOLE: u64 = 0x10_8000;
pub const HOLE_BYTES: u64 = 0x8000;
/// Where memory comes and goes.
pub const SLOT: u64 = 64 << 20;
pub const SLOT_BYTES: u64 = 4 << 20;
/// Where memory comes and goes in blocks.
pub const BALLOON: u64 = 96 << 20;
pub const BALLOON_BYTES: u64 = 8 << 20;
const BLOCK: u64 = 2 << 20;

pub const HOSTS: [&str; 4] = ["VT-d", "SMMUv3", "AMD", "RISC-V"];

fn unit(host: usize, name: &str) -> UnitConfig {
    match host {
        0 => UnitConfig::vtd(name),
        1 => UnitConfig::smmuv3(name),
        2 => UnitConfig::amd(name),
        _ => UnitConfig::riscv(name),
    }
}

/// The plugins, compiled once.
pub fn plugins() -> Arc<Plugins> {
    static PLUGINS: OnceLock<Arc<Plugins>> = OnceLock::new();
    Arc::clone(PLUGINS.get_or_init(|| Arc::new(Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())))
}

/// Units and devices.
#[derive(Clone, Copy, Debug)]
pub struct Hardware {
    /// Which of [`HOSTS`] each unit is; without a second one all devices are behind the first.
    pub units: (usize, Option<usize>),
    /// Units take tables of their users.
    pub nesting: bool,
    pub devices: usize,
}

impl Hardware {
    /// What each device is behind.
    pub fn hosts(&self) -> Vec<&'static str> {
        (0..self.devices).map(|device| HOSTS[self.units.1.filter(|_| device + 1 == self.devices).unwrap_or(self.units.0)]).collect()
    }
}

/// Which memory is there, of that which is not always there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct There {
    pub slot: bool,
    pub hole: bool,
    /// Bits of the balloon's blocks.
    pub blocks: u8,
}

impl There {
    pub const ALL: Self = Self { slot: true, hole: true, blocks: 0xf };

    /// Whether there is memory.
    pub fn has(self, address: u64) -> bool {
        match address {
            HOLE.. if address < HOLE + HOLE_BYTES => self.hole,
            0..RAM => true,
            SLOT.. if address < SLOT + SLOT_BYTES => self.slot,
            BALLOON.. if address < BALLOON + BALLOON_BYTES => self.blocks >> ((address - BALLOON) / BLOCK) & 1 == 1,
            _ => false,
        }
    }

    /// First address, bytes, and bytes that can go by themselves.
    fn regions(self) -> Vec<(u64, u64, Option<u64>)> {
        let mut regions = vec![(0, HOLE, None), (HOLE + HOLE_BYTES, RAM - HOLE - HOLE_BYTES, None)];
        regions.extend(self.hole.then_some((HOLE, HOLE_BYTES, None)));
        regions.extend(self.slot.then_some((SLOT, SLOT_BYTES, None)));
        let (mut next, end) = (0, BALLOON_BYTES / BLOCK);
        while next < end {
            let here = |block: &u64| self.blocks >> block & 1 == 1;
            let first = (next..end).find(here).unwrap_or(end);
            next = (first..end).find(|block| !here(block)).unwrap_or(end);
            regions.extend((first < next).then_some((BALLOON + first * BLOCK, (next - first) * BLOCK, Some(BLOCK))));
        }
        regions
    }

    /// Bytes of all of it.
    pub fn bytes(self) -> u64 {
        self.regions().iter().map(|(_, bytes, _)| bytes).sum()
    }
}

pub struct Machine {
    pub sim: Arc<Sim>,
    pub memory: GuestMemoryMmap,
    pub devices: Vec<Device>,
    pub there: There,
}

impl Machine {
    pub fn new(hardware: Hardware, there: There) -> Self {
        let mut builder = SimBuilder::new();
        let make = |host: usize, name: &str| if hardware.nesting { unit(host, name) } else { unit(host, name).without_nesting() };
        let first = builder.unit(make(hardware.units.0, "first"));
        let second = hardware.units.1.map(|host| builder.unit(make(host, "second")));
        for device in 0..hardware.devices {
            // The last one is behind the second unit.
            let behind = second.filter(|_| device + 1 == hardware.devices).unwrap_or(first);
            builder.device(DeviceConfig::new(&label(device), device as u32 + 1), &[behind]);
        }
        let sim = builder.build().unwrap();
        let ranges = [(0, RAM), (SLOT, SLOT_BYTES), (BALLOON, BALLOON_BYTES)].map(|(first, bytes)| (GuestAddress(first), bytes as usize));
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        sim.register_memory(&memory).unwrap();
        // Nobody answers page requests but where a test says so.
        sim.set_patience(0);
        let devices = (0..hardware.devices).map(|device| sim.device(&label(device)).unwrap()).collect();
        Self { sim, memory, devices, there }
    }

    pub fn guest_memory(&self) -> GuestMemory {
        let region = |(first, bytes, block): (u64, u64, Option<u64>)| MemoryRegion {
            span: Span { first, last: first + (bytes - 1) },
            kind: Kind::Ram,
            user_address: Some(self.memory.get_host_address(GuestAddress(first)).unwrap() as u64),
            writable: true,
            block,
        };
        GuestMemory::new(Arc::new(Shared(self.memory.clone())), self.there.regions().into_iter().map(region).collect()).unwrap()
    }

    pub fn setup(&self) -> Setup {
        let kernel = Arc::clone(&self.sim) as Arc<dyn Kernel>;
        Setup { tables: Arc::clone(&self.sim) as Arc<dyn TableSupply>, ..Setup::new(kernel, plugins(), self.guest_memory()) }
    }

    pub fn context(&self) -> Context {
        Context::with(self.setup()).unwrap()
    }

    /// The address in guest memory that an access of a device, or of a PASID of it, gets to.
    pub fn dma(&self, (device, pasid): (usize, Option<u32>), iova: u64, write: bool) -> Option<u64> {
        let access = if write { DmaAccess::Write } else { DmaAccess::Read };
        let found = self.devices[device].translate(pasid.map(Pasid), Iova(iova), access).ok()?;
        let address = self.memory.iter().find_map(|region| {
            let offset = found.user_address.checked_sub(region.as_ptr() as u64)?;
            (offset < region.len()).then(|| region.start_addr().0 + offset)
        });
        Some(address.expect("devices reach guest memory and nothing else"))
    }

    /// Nothing is left in the kernel.
    pub fn is_clean(&self) -> Result<(), String> {
        let left = (self.sim.objects(), self.sim.pinned_pages(), self.sim.areas());
        if left == (0, 0, 0) { Ok(()) } else { Err(format!("{left:?} are left in the kernel")) }
    }
}

pub fn label(device: usize) -> String {
    format!("device {device}")
}
