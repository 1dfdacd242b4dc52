//! A VMM in small: a device is passed through to a guest that has another IOMMU than the host.
//!
//! The guest is a snapshot: SMMUv3 registers, structures and tables that Linux made. The host has a VT-d unit, simulated with its kernel, so that this runs anywhere; what a VMM does is
//! the same over the real ones. Everything that the guest's driver and the device do is played here, and marked so.
//!
//! ```text
//!   guest RAM, registers, command queue          this program                       kernel (here: sim)
//!      | commands, as raw bytes -----------------> Viommu::commands --+
//!      | writes to pages that are watched -------> Viommu::table_written -> ContextSpaces -> Context -> IOASIDs, nested tables
//!      |                                           Viommu::faults <---------------------- blocked DMA
//!      | event record, as raw bytes <-------------------+
//! ```
//!
//! ```text
//! cargo run -p stagecraft --example passed_through_device [SNAPSHOT] [DEVICE ID]
//! ```
use std::collections::HashMap;
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use stagecraft::ioasid::{Context, GuestMemory, GuestView, Request, Setup, TableSupply};
use stagecraft::kernel::Kernel;
use stagecraft::kernel::sim::{DeviceConfig, SimBuilder, UnitConfig};
use stagecraft::memory::Kind;
use stagecraft::plugin::queue::EventAccess;
use stagecraft::plugin::{Config, Engine, Outcome, Plugins, Policy, Requester, Supervisors};
use stagecraft::snapshot::{Snapshot, Source};
use stagecraft::sync::Watcher;
use stagecraft::table::{Piece, Step, Visitor, WalkError};
use stagecraft::viommu::{self, BlockedDma, ContextSpaces, Handled, Limits, StreamState, Viommu};
use stagecraft::{Gpa, Iova};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

type Memory = GuestMemoryMmap<()>;
type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;
/// What the host calls the device.
const LABEL: &str = "0000:03:00.0";

/// Pages that the VMM is to watch for writes, with how many need each. A VMM write-protects them: in its memory slots, or with `stagecraft::watch::UffdWatcher` (then
/// `stagecraft::viommu::Watching` is this type). Here the guest's driver is played, and asks whether it would trap.
#[derive(Clone, Debug, Default)]
struct Watched(Arc<Mutex<HashMap<u64, u32>>>);

impl Watched {
    fn contains(&self, address: u64) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&(address & !(PAGE - 1)))
    }
}

impl Watcher for Watched {
    fn watch(&mut self, page: Gpa) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(page.0).or_default() += 1;
    }

    fn unwatch(&mut self, page: Gpa) {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(users) = pages.get_mut(&page.0) {
            *users -= 1;
            if *users == 0 {
                pages.remove(&page.0);
            }
        }
    }
}

/// The VMM's side of one virtual IOMMU.
struct Vmm {
    viommu: Viommu<Memory, ContextSpaces>,
    memory: Memory,
    watched: Watched,
}

impl Vmm {
    /// Everything that a VMM sets up, once.
    fn new(snapshot: &Snapshot, memory: Memory, kernel: Arc<dyn Kernel>, tables: Arc<dyn TableSupply>) -> Result<Self> {
        // Formats. A VMM keeps compiled plugins in a folder of its own: `Config::with_cache`.
        let plugins = Arc::new(Plugins::builtin(&Engine::new(Config::default())?)?);
        // A plugin that fails is opened again, or put into quarantine; the guest's DMA is never wider than what was said before.
        let supervisors = Supervisors::new(Arc::clone(&plugins), Policy::default());
        // One context per guest: it owns the kernel's fd and pins guest memory once. Limits bound what the guest can make it hold.
        let setup = Setup { tables, supervisors: Some(supervisors.clone()), ..Setup::new(kernel, plugins, GuestMemory::of_mmap(&memory)?) };
        // What address spaces are made like: any strategy. What is in them is the guest's to say.
        let template = Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 });
        let spaces = ContextSpaces::new(Context::with(setup)?, template);
        // The guest's unit, with the registers as the guest has programmed them.
        let Source::Unit { kind, registers } = snapshot.source.clone() else { return Err("this snapshot has no registers".into()) };
        let supervisor = supervisors.by_unit(&kind)?;
        let unit = viommu::UnitConfig { kind, registers, map: Arc::new(snapshot.map.clone()), limits: Limits::default() };
        let watched = Watched::default();
        let viommu = Viommu::new(supervisor, unit, memory.clone(), spaces, Box::new(watched.clone()));
        Ok(Self { viommu, memory, watched })
    }

    /// A device is plugged in. The guest has set it up already: its DMA gets what its tables say from now on.
    fn plug(&mut self, label: &str, id: u64) -> Result<()> {
        self.viommu.host_mut().connect(id, label)?;
        let handled = self.viommu.connect(id, false);
        self.check(&handled)
    }

    /// And unplugged.
    fn unplug(&mut self, id: u64) -> Result<()> {
        let handled = self.viommu.disconnect(id);
        self.viommu.host_mut().disconnect(id);
        self.check(&handled)
    }

    /// The guest rang the doorbell of its command queue; these are the entries between its two pointers. When this returns, no DMA uses what they take away: the
    /// consumer pointer may move.
    fn doorbell(&mut self, entries: &[u8]) -> Result<()> {
        let handled = self.viommu.commands(entries)?;
        if let Some(illegal) = handled.illegal {
            // The emulated unit stops here, as hardware does, and shows the code in its registers.
            println!("  illegal command {}: error code {:#x}", illegal.index, illegal.code);
        }
        self.check(&handled)
    }

    /// The guest wrote to a page that is watched.
    fn trap(&mut self, address: u64, length: u64) -> Result<()> {
        let handled = self.viommu.table_written(Gpa(address), length);
        self.check(&handled)
    }

    /// What every call hands back, and a VMM has to look at.
    fn check(&self, handled: &Handled) -> Result<()> {
        // Records for the guest's event queue, as its architecture has them.
        handled.events.iter().for_each(|record| println!("  event for the guest's {}: {:02x?}", record.queue, record.bytes));
        // A device that could not be kept from DMA although it must be: stop it, or the guest.
        match handled.loose.first() {
            Some((requester, error)) => Err(format!("device {:#x} must be stopped: {error}", requester.id).into()),
            None => Ok(()),
        }
    }

    /// The host reported blocked DMA (with iommufd: events of the vIOMMU's queue, or the VFIO device's error).
    fn blocked(&mut self, id: u64, iova: u64) -> Vec<Vec<u8>> {
        let requester = Requester { id, pasid: None };
        let events = self.viommu.faults(&[BlockedDma { requester, iova: Iova(iova), access: EventAccess::Write, privileged: false }]);
        events.records.into_iter().map(|record| record.bytes).collect()
    }

    /// How the device gets the guest's mappings, in words.
    fn explain(&self, id: u64) -> Result<String> {
        let Some(StreamState::Space(number)) = self.viommu.stream(Requester { id, pasid: None }) else {
            return Err(format!("the guest has no address space for device {id:#x}").into());
        };
        let (space, _) = self.viommu.space(*number).ok_or("the address space is gone")?;
        let ioasid = self.viommu.host().ioasid(space).ok_or("the IOASID is gone")?;
        Ok(ioasid.explain().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
    }

    /// The guest's driver, played: it writes an entry. Where the page is watched, that traps.
    fn write_entry(&mut self, address: u64, entry: u64) -> Result<()> {
        self.memory.store(entry, GuestAddress(address), Ordering::Release)?;
        if self.watched.contains(address) { self.trap(address, 8) } else { Ok(()) }
    }
}

/// The guest's RAM, with the pages of the snapshot in it.
fn ram(snapshot: &Snapshot) -> Result<Memory> {
    let regions = snapshot.map.regions().iter().filter(|region| region.kind == Kind::Ram);
    let ranges: Vec<_> = regions.map(|region| (GuestAddress(region.span.first), region.span.length_minus_one() as usize + 1)).collect();
    let memory = Memory::from_ranges(&ranges)?;
    for region in snapshot.memory.iter() {
        let mut bytes = vec![0; region.len() as usize];
        snapshot.memory.read_slice(&mut bytes, region.start_addr())?;
        memory.write_slice(&bytes, region.start_addr())?;
    }
    Ok(memory)
}

/// A page that the guest's driver has mapped for its device: what it knows, and a VMM need not.
struct Buffer {
    iova: u64,
    address: u64,
    /// Where its entry is.
    entry: u64,
}

/// Finds pages of RAM that a device may read and write.
fn buffers(snapshot: &Snapshot, id: u64) -> Result<Vec<Buffer>> {
    struct Pages(Vec<(Piece, u64)>);
    impl Visitor for Pages {
        fn piece(&mut self, piece: &Piece, path: &[Step]) -> std::result::Result<(), WalkError> {
            let entry = path.last().map_or(0, |step| step.table.0 + step.index * 8);
            self.0.push((*piece, entry));
            Ok(())
        }
    }
    let plugins = Plugins::builtin(&Engine::new(Config::default())?)?;
    let guest = stagecraft::guest::Guest::new(snapshot, &plugins)?;
    let mut space = guest.space(&guest.stream(id, None)?)?.ok_or("this device is not translated")?;
    let mut pages = Pages(Vec::new());
    guest.walk(&mut space, &mut pages)?;
    let is_ram = |address| snapshot.map.region(address).is_some_and(|region| region.kind == Kind::Ram);
    let known = |address| snapshot.memory.iter().any(|region| (region.start_addr().0..=region.last_addr().0).contains(&address));
    pages.0.retain(|(page, _)| {
        let access = page.attributes.access(false);
        access.read && access.write && page.iova.length_minus_one() == PAGE - 1 && is_ram(page.address) && !known(page.address)
    });
    Ok(pages.0.into_iter().map(|(page, entry)| Buffer { iova: page.iova.first, address: page.address, entry }).collect())
}

/// Commands of the guest's unit: forget all translations (CMD_TLBI_NSNH_ALL), and wait for that (CMD_SYNC); IHI 0070 sections 4.4 and 4.7.
fn flush() -> Vec<u8> {
    [0x30_u64, 0, 0x46, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/arm64-s1-4k")), PathBuf::from);
    let id = arguments.next().map_or(Ok(0x38), |id| u64::from_str_radix(id.trim_start_matches("0x"), 16))?;
    run(&folder, id, &mut std::io::stdout())
}

/// Plays a few moments in the life of a guest, and says what happened.
pub fn run(folder: &Path, id: u64, out: &mut impl Write) -> Result<()> {
    let snapshot = Snapshot::load(folder)?;
    let memory = ram(&snapshot)?;
    let buffers = buffers(&snapshot, id)?;
    let [gone, kept, ..] = &buffers[..] else { return Err("this device has too few pages".into()) };

    // The host: one VT-d unit with nesting, one device behind it. A VMM opens /dev/iommu and the device's VFIO file instead.
    let mut machine = SimBuilder::new();
    let unit = machine.unit(UnitConfig::vtd("VT-d"));
    machine.device(DeviceConfig::new(LABEL, 0x0300), &[unit]);
    let sim = machine.build()?;
    sim.register_memory(&memory)?;
    let device = sim.device(LABEL).ok_or("no such device")?;

    let mut vmm = Vmm::new(&snapshot, memory.clone(), Arc::clone(&sim) as Arc<dyn Kernel>, Arc::clone(&sim) as Arc<dyn TableSupply>)?;
    vmm.plug(LABEL, id)?;
    writeln!(out, "{}", vmm.explain(id)?)?;

    // The device does DMA to IOVAs; no call of the VMM is in its way.
    for buffer in &buffers {
        device.write(None, Iova(buffer.iova), &buffer.iova.to_le_bytes())?;
        let found: u64 = memory.read_obj(GuestAddress(buffer.address))?;
        if found != buffer.iova {
            return Err(format!("DMA to {:#x} did not arrive at {:#x}", buffer.iova, buffer.address).into());
        }
    }
    writeln!(out, "DMA to {} buffers arrived in guest memory", buffers.len())?;

    // The guest's driver unmaps a buffer: it clears the entry and queues commands.
    let entry: u64 = memory.load(GuestAddress(gone.entry), Ordering::Acquire)?;
    vmm.write_entry(gone.entry, 0)?;
    vmm.doorbell(&flush())?;
    if device.write(None, Iova(gone.iova), &[1]).is_ok() {
        return Err("the device reached a page that was unmapped".into());
    }
    device.write(None, Iova(kept.iova), &[1])?;
    // The guest is told of the DMA that was blocked, in its own architecture's words.
    let records = vmm.blocked(id, gone.iova);
    writeln!(
        out,
        "DMA to {:#x} is blocked after the guest unmapped it; its event queue gets {:02x?}",
        gone.iova,
        records.first().ok_or("no event")?
    )?;

    // It maps the buffer again, and says nothing: its architecture does not want it. The page of the table is watched.
    vmm.write_entry(gone.entry, entry)?;
    device.write(None, Iova(gone.iova), &[1])?;
    writeln!(out, "and arrives again after it was mapped, unannounced")?;

    // The end: nothing is left in the kernel.
    vmm.unplug(id)?;
    drop(vmm);
    match (sim.objects(), sim.pinned_pages(), sim.areas()) {
        (0, 0, 0) => Ok(()),
        left => Err(format!("left in the kernel: {left:?}").into()),
    }
}
