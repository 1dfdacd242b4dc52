//! The host: units, devices behind them, and a context; what simulated DMA gets.

use std::sync::{Arc, OnceLock};

use stagecraft::ioasid::{Context, GuestMemory, MemoryRegion, Setup, Shared, TableSupply};
use stagecraft::kernel::Kernel;
use stagecraft::kernel::sim::{Device, DeviceConfig, DmaAccess, Sim, SimBuilder, UnitConfig};
use stagecraft::memory::Kind;
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::{Iova, Span};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

/// Memory that is always there is from 0 up to here.
pub const RAM: u64 = 32 << 20;
/// Where memory comes and goes.
pub const SLOT: u64 = 64 << 20;
pub const SLOT_BYTES: u64 = 4 << 20;

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

pub struct Machine {
    pub sim: Arc<Sim>,
    pub memory: GuestMemoryMmap,
    pub devices: Vec<Device>,
    /// The memory that comes and goes is there.
    pub plugged: bool,
}

impl Machine {
    pub fn new(hardware: Hardware) -> Self {
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
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize), (GuestAddress(SLOT), SLOT_BYTES as usize)]).unwrap();
        sim.register_memory(&memory).unwrap();
        let devices = (0..hardware.devices).map(|device| sim.device(&label(device)).unwrap()).collect();
        Self { sim, memory, devices, plugged: true }
    }

    pub fn guest_memory(&self) -> GuestMemory {
        let region = |region: &vm_memory::GuestRegionMmap| MemoryRegion {
            span: Span { first: region.start_addr().0, last: region.last_addr().0 },
            kind: Kind::Ram,
            user_address: Some(region.as_ptr() as u64),
            writable: true,
            block: None,
        };
        let regions = self.memory.iter().filter(|region| self.plugged || region.start_addr().0 == 0).map(region).collect();
        GuestMemory::new(Arc::new(Shared(self.memory.clone())), regions).unwrap()
    }

    pub fn context(&self) -> Context {
        let kernel = Arc::clone(&self.sim) as Arc<dyn Kernel>;
        Context::with(Setup { tables: Arc::clone(&self.sim) as Arc<dyn TableSupply>, ..Setup::new(kernel, plugins(), self.guest_memory()) }).unwrap()
    }

    /// Whether there is memory.
    pub fn has(&self, address: u64) -> bool {
        address < RAM || self.plugged && (SLOT..SLOT + SLOT_BYTES).contains(&address)
    }

    /// The address in guest memory that a device's access gets to.
    pub fn dma(&self, device: usize, iova: u64, write: bool) -> Option<u64> {
        let access = if write { DmaAccess::Write } else { DmaAccess::Read };
        let found = self.devices[device].translate(None, Iova(iova), access).ok()?;
        let address = self.memory.iter().find_map(|region| {
            let offset = found.user_address.checked_sub(region.as_ptr() as u64)?;
            (offset < region.len()).then(|| region.start_addr().0 + offset)
        });
        Some(address.expect("devices reach guest memory and nothing else"))
    }
}

pub fn label(device: usize) -> String {
    format!("device {device}")
}
