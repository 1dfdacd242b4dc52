//! Bytes, not time: what converted tables take, with everything that is remembered about them, against the guest's tables.
#![allow(clippy::unwrap_used, missing_docs, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::table::Arena;
use stagecraft_benches::guest::{Permissions, Recipe, Tables};
use stagecraft_benches::production;

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

fn main() {
    println!(
        "Heap of the process; a plugin instance's own memory is outside of it, at most {} KiB each.",
        stagecraft::plugin::Limits::default().memory_bytes >> 10
    );
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let recipe = Recipe { leaves: 262_144, granule_log2: 12, permissions: Permissions::MostlyUniform, hole: false };
    report("scattered 4K pages", &plugins, &Tables::make(&recipe));
    report("16K pages to 4K pages", &plugins, &Tables::make(&Recipe { leaves: 65_536, granule_log2: 14, ..recipe }));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures/arm64-s1-4k-big");
    match Tables::load(&folder, &plugins) {
        Some(tables) => report("a real guest", &plugins, &tables),
        None => println!("skipped: a real guest (no fixture arm64-s1-4k-big)"),
    }
}
