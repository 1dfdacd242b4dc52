//! Bytes, not time: what converted tables take, with everything that is remembered about them, against the guest's tables.
#![allow(clippy::unwrap_used, missing_docs, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stagecraft::ioasid::{Context, Device, GuestMemory, GuestView, Request, Setup, Strategy, TableSupply};
use stagecraft::kernel::sim::{DeviceConfig, SimBuilder, UnitConfig};
use stagecraft::kernel::{Kernel, Pasid};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::Arena;
use stagecraft_benches::guest::{Permissions, Recipe, Tables};
use stagecraft_benches::production;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The system's allocator, counted.
struct Counted;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator, and counts beside it.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

fn heap() -> usize {
    NOW.load(Ordering::Relaxed)
}

fn report(name: &str, plugins: &Plugins, tables: &Tables) {
    let memory = tables.memory();
    // The plugins are compiled before.
    drop(production::open(plugins, &tables.config));
    drop(production::open_format(plugins, &production::target(tables.five_levels)));
    let before = heap();
    let mut source = production::open(plugins, &tables.config);
    let format = production::open_format(plugins, &production::target(tables.five_levels));
    let opened = heap() - before;
    PEAK.store(heap(), Ordering::Relaxed);
    let mut arena = Arena::new(1 << 40, 1 << 30);
    let built = production::convert(&mut source, &memory, &tables.map, format, &mut arena);
    let (kept, peak) = (heap() - before, PEAK.load(Ordering::Relaxed) - before);
    let (guest, host) = (tables.bytes() as f64, arena.bytes() as f64);
    let kib = |bytes: usize| bytes as f64 / 1024.0;
    println!("{name}: {} leaves, {} written", tables.leaves, built.leaves);
    println!("  guest tables                         {:>10.1} KiB", guest / 1024.0);
    println!("  host tables                          {:>10.1} KiB   {:.3} times the guest's", host / 1024.0, host / guest);
    println!("  reserved for host tables             {:>10.1} KiB", kib(arena.capacity() as usize));
    println!(
        "  bookkeeping that stays               {:>10.1} KiB   {:.3} in all",
        kib(kept - arena.capacity() as usize),
        (kept as f64 - arena.capacity() as f64 + host) / guest
    );
    println!("  of which the opened formats          {:>10.1} KiB", kib(opened));
    println!("  bookkeeping at most, while building  {:>10.1} KiB", kib(peak - arena.capacity() as usize));
}

const DEVICES: usize = 100;
const PASIDS: u32 = 10;

/// Pages of this process that are in memory, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// A guest's table of VT-d's first stage with one page, at its second page.
fn one_page(memory: &GuestMemoryMmap) -> GuestView {
    for (level, entry) in [(1_u64, 0x2000_u64), (2, 0x3000), (3, 0x4000), (4, 0x8000)] {
        // Present, writable, for users, accessed, dirty where it is a leaf.
        let flags = if level == 4 { 0x67 } else { 0x27 };
        memory.store(entry | flags, GuestAddress(level * 0x1000 + if level == 4 { 8 } else { 0 }), Ordering::Release).unwrap();
    }
    GuestView::table(TableConfig::new("intel-vtd/first-stage", &[("levels", 4), ("root", 0x1000)]))
}

/// IOASIDs that do nothing, each of a guest's table with one page and attached to a PASID of its own: what one of them takes.
fn idle(plugins: &Arc<Plugins>, strategy: Strategy) {
    let mut builder = SimBuilder::new();
    let unit = builder.unit(UnitConfig::vtd("one"));
    let labels: Vec<String> = (0..DEVICES).map(|index| format!("device{index}")).collect();
    for (requester, label) in (1..).zip(&labels) {
        builder.device(DeviceConfig::new(label, requester), &[unit]);
    }
    let sim = builder.build().unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap());
    sim.register_memory(&memory).unwrap();
    let setup = Setup {
        tables: Arc::clone(&sim) as Arc<dyn TableSupply>,
        ..Setup::new(Arc::clone(&sim) as Arc<dyn Kernel>, Arc::clone(plugins), GuestMemory::of_mmap(&memory).unwrap())
    };
    let context = Context::with(setup).unwrap();
    let request = Request::guest(one_page(&memory)).with_strategies(&[strategy]);
    let devices: Vec<Device> = labels.iter().map(|label| context.connect(label).unwrap()).collect();
    let make = |device: &Device, pasid: u32| {
        let ioasid = context.allocate(request.clone()).unwrap();
        ioasid.attach(device, Some(Pasid(pasid))).unwrap();
        ioasid
    };
    // The first one pays for what all share.
    let first = make(&devices[0], PASIDS + 1);
    let (heap_before, before) = (heap(), resident());
    let all: Vec<_> = devices.iter().flat_map(|device| (1..=PASIDS).map(|pasid| make(device, pasid))).collect();
    let count = all.len() as u64;
    let tables: u64 = all.iter().map(|ioasid| ioasid.stats().table_bytes).sum();
    println!(
        "  {:<24} {:>10} {:>14} {:>14}",
        strategy.describe(),
        (heap() - heap_before) as u64 / count,
        tables / count,
        resident().saturating_sub(before) / count
    );
    drop((all, first));
}

fn main() {
    println!(
        "Heap of the process; a plugin instance's own memory is outside of it, at most {} KiB each.",
        stagecraft::plugin::Limits::default().memory_bytes >> 10
    );
    let plugins = Arc::new(Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap());
    let recipe = Recipe { leaves: 262_144, granule_log2: 12, permissions: Permissions::MostlyUniform, hole: false };
    report("scattered 4K pages", &plugins, &Tables::make(&recipe));
    report("16K pages to 4K pages", &plugins, &Tables::make(&Recipe { leaves: 65_536, granule_log2: 14, ..recipe }));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures/arm64-s1-4k-big");
    match Tables::load(&folder, &plugins) {
        Some(tables) => report("a real guest", &plugins, &tables),
        None => println!("skipped: a real guest (no fixture arm64-s1-4k-big)"),
    }
    println!("{} idle IOASIDs with one page each, {DEVICES} devices: bytes for each", DEVICES * PASIDS as usize);
    println!("  {:<24} {:>10} {:>14} {:>14}", "", "heap", "host tables", "resident");
    // Lookups in software take all nodes of their limit at once: what that is follows from the limit.
    Strategy::ALL.into_iter().filter(|strategy| *strategy != Strategy::Software).for_each(|strategy| idle(&plugins, strategy));
}
