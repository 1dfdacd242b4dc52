//! A VMM in small: an emulated device does DMA behind the guest's SMMU, through `vm_memory`'s `IommuMemory`.
//!
//! The guest is a snapshot: SMMUv3 tables that Linux built. Its driver is played here; it puts requests into a ring whose addresses are IOVAs. The device knows
//! nothing of tables: it reads and writes IOVAs. What the lookup does not have yet, it gets by walking the guest's tables, once.
//!
//! ```text
//! cargo run -p stagecraft --example emulated_device [SNAPSHOT] [DEVICE ID]
//! ```
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use stagecraft::guest::Guest;
use stagecraft::lookup::{Limits, LookupIommu, Miss, Updater};
use stagecraft::memory::{Budget, Kind, Limits as WalkLimits, MemoryMap, VmMemory};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::snapshot::Snapshot;
use stagecraft::table::{AddressSpace, Piece, Step, Visitor, WalkError};
use stagecraft::{Change, Span};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, IommuMemory};

type Memory = GuestMemoryMmap<()>;
type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PAGE: u64 = 4096;
/// Requests that the ring has room for. A request is 16 bytes: IOVA, length. In front of them is the number of requests made so far.
const RING: u64 = 64;

/// The guest's side of an address space: its tables, and the lookup that is filled from them.
struct Space {
    tables: AddressSpace,
    memory: Memory,
    map: MemoryMap,
    limits: WalkLimits,
    updater: Updater,
    walks: u64,
}

/// What a walk finds, and where the entry of it stands.
#[derive(Default)]
struct Pieces(Vec<(Piece, Option<u64>)>);

impl Visitor for Pieces {
    fn piece(&mut self, piece: &Piece, path: &[Step]) -> std::result::Result<(), WalkError> {
        self.0.push((*piece, path.last().map(|step| step.table.0 + step.index * 8)));
        Ok(())
    }
}

impl Space {
    fn walk(&mut self, span: Span) -> Result<Vec<(Piece, Option<u64>)>> {
        let mut pieces = Pieces::default();
        self.walks += 1;
        self.tables.walk(&VmMemory(&self.memory), &self.map, span, &Budget::new(self.limits), &mut pieces)?;
        Ok(pieces.0)
    }

    /// Whole pages around what was missed: this guest's smallest.
    fn resolve(&mut self, miss: &Miss) -> Result<()> {
        let span = Span { first: miss.iova.first & !(PAGE - 1), last: miss.iova.last | (PAGE - 1) };
        let changes: Vec<Change> = self.walk(span)?.into_iter().map(|(piece, _)| Change::Map(piece)).collect();
        self.updater.apply(&changes)?;
        Ok(())
    }

    /// The guest's driver unmaps a page, and invalidates it.
    fn unmap(&mut self, iova: u64) -> Result<()> {
        let span = Span::of_log2(iova, 12);
        for (_, entry) in self.walk(span)? {
            self.memory.store(0_u64, GuestAddress(entry.ok_or("no entry")?), Ordering::Release)?;
        }
        // What a VMM does when the guest's invalidation command arrives.
        self.updater.apply(&[Change::Unmap(span)])?;
        Ok(())
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

/// The emulated device: serves all requests in the ring at `ring`, an IOVA, that it has not served yet. It doubles every byte of each.
fn serve<M: GuestMemory>(dma: &M, ring: u64, served: &mut u64) -> Result<()> {
    let made: u64 = dma.load(GuestAddress(ring), Ordering::Acquire)?;
    while *served < made {
        let request = ring + 16 + (*served % RING) * 16;
        let iova: u64 = dma.load(GuestAddress(request), Ordering::Relaxed)?;
        let length: u32 = dma.load(GuestAddress(request + 8), Ordering::Relaxed)?;
        *served += 1;
        // A device that a guest tells to read 4 GiB does not get memory for it.
        let mut data = vec![0; length.min(1 << 16) as usize];
        dma.read_slice(&mut data, GuestAddress(iova))?;
        data.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(2));
        dma.write_slice(&data, GuestAddress(iova))?;
    }
    Ok(())
}

/// The guest's driver: one more request.
fn request(memory: &Memory, ring: u64, iova: u64, length: u32) -> Result<()> {
    let made: u64 = memory.load(GuestAddress(ring), Ordering::Relaxed)?;
    let request = ring + 16 + (made % RING) * 16;
    memory.store(iova, GuestAddress(request), Ordering::Relaxed)?;
    memory.store(length, GuestAddress(request + 8), Ordering::Relaxed)?;
    Ok(memory.store(made + 1, GuestAddress(ring), Ordering::Release)?)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/arm64-s1-4k")), PathBuf::from);
    let id = arguments.next().map_or(Ok(0x38), |id| u64::from_str_radix(id.trim_start_matches("0x"), 16))?;
    run(&folder, id, &mut std::io::stdout())
}

/// Plays a few moments in the life of a device, and says what happened.
pub fn run(folder: &Path, id: u64, out: &mut impl Write) -> Result<()> {
    let snapshot = Snapshot::load(folder)?;
    let plugins = Plugins::builtin(&Engine::new(Config::default())?)?;
    let guest = Guest::new(&snapshot, &plugins)?;
    let stream = guest.stream(id, None)?;
    let mut tables = guest.space(&stream)?.ok_or("this device is not translated")?;

    // Pages that the guest's driver mapped for this device: the first is the ring, the others are buffers.
    let mut found = Pieces::default();
    guest.walk(&mut tables, &mut found)?;
    let is_ram = |address| snapshot.map.region(address).is_some_and(|region| region.kind == Kind::Ram);
    let known = |address| snapshot.memory.iter().any(|region| (region.start_addr().0..=region.last_addr().0).contains(&address));
    let mut pages: Vec<Piece> = found.0.iter().map(|(piece, _)| *piece).collect();
    pages.retain(|page| {
        let access = page.attributes.access(false);
        access.read && access.write && page.iova.length_minus_one() == PAGE - 1 && is_ram(page.address) && !known(page.address)
    });
    pages.sort_by_key(|page| page.address);
    pages.dedup_by_key(|page| page.address);
    let [ring, buffers @ ..] = &pages[..] else { return Err("this device has no pages to read and write".into()) };
    let buffers = buffers.get(..8).ok_or("this device has too few pages")?;

    let memory = ram(&snapshot)?;
    let (updater, lookup) = Updater::new(Limits::default())?;
    let space = Space { tables, memory: memory.clone(), map: snapshot.map.clone(), limits: snapshot.limits(), updater, walks: 0 };
    let space = Mutex::new(space);
    let resolve = |miss: &Miss| {
        let mut space = space.lock().map_err(|error| error.to_string())?;
        space.resolve(miss).map_err(|error| error.to_string())
    };
    let dma = IommuMemory::new(memory.clone(), LookupIommu::new(lookup, resolve), true, ());

    writeln!(out, "{} {id:#x}: ring at IOVA {:#x}, {} buffers", stream.label, ring.iova.first, buffers.len())?;
    let mut served = 0;
    for round in 1..=32_u8 {
        for buffer in buffers {
            memory.write_slice(&[round; 1500], GuestAddress(buffer.address))?;
            request(&memory, ring.address, buffer.iova.first, 1500)?;
        }
        serve(&dma, ring.iova.first, &mut served)?;
        for buffer in buffers {
            let mut data = [0; 1500];
            memory.read_slice(&mut data, GuestAddress(buffer.address))?;
            if data != [round.wrapping_mul(2); 1500] {
                return Err(format!("the device did not double what is at {:#x}", buffer.address).into());
            }
        }
    }
    let walks = space.lock().map_err(|error| error.to_string())?.walks;
    writeln!(out, "{served} requests served, {walks} walks of the guest's tables")?;

    let gone = buffers[0];
    space.lock().map_err(|error| error.to_string())?.unmap(gone.iova.first)?;
    request(&memory, ring.address, gone.iova.first, 1500)?;
    match serve(&dma, ring.iova.first, &mut served) {
        Err(error) => writeln!(out, "after the guest unmapped {:#x}: {error}", gone.iova.first)?,
        Ok(()) => return Err("the device reached a page that was unmapped".into()),
    }
    // Its neighbours are there as before.
    request(&memory, ring.address, buffers[1].iova.first, 1500)?;
    serve(&dma, ring.iova.first, &mut served)?;
    Ok(writeln!(out, "and {:#x} still works", buffers[1].iova.first)?)
}
