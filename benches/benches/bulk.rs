//! Bulk conversion, SMMUv3 stage 1 to VT-d first stage: Stagecraft against `memcpy`, a converter by hand, and crates.
#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::table::{Arena, Table};
use stagecraft_benches::contest::{Contestant, contest, is_measuring, is_wanted};
use stagecraft_benches::crates;
use stagecraft_benches::fused::Fused;
use stagecraft_benches::guest::{Permissions, Recipe, Tables};
use stagecraft_benches::pool::Pool;
use stagecraft_benches::production::{self, Reused};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, VolatileSlice};

/// Where built tables claim to be.
const TARGET: u64 = 1 << 40;

/// Leaves of made guests: 1 GiB in 4K pages.
const LEAVES: u64 = 262_144;

/// A guest, and memory for targets.
struct Copy {
    guest: GuestMemoryMmap,
    pool: RefCell<Pool>,
    arena: RefCell<Arena>,
}

/// Used one after the other, so that whatever is touched was last touched long ago.
struct Copies(Vec<Copy>);

impl Copies {
    fn new(tables: &Tables, mebibytes: u64) -> Self {
        let count = if is_measuring() { ((mebibytes << 20) / tables.bytes()).max(1) } else { 2 };
        let copy = |_| Copy {
            guest: tables.memory(),
            pool: RefCell::new(Pool::new(TARGET, tables.pages.len() + 1)),
            arena: RefCell::new(Arena::new(TARGET, 1 << 30)),
        };
        Self((0..count).map(copy).collect())
    }

    /// Does something with the next copy, each time it is called.
    fn each<'a>(&'a self, mut run: impl FnMut(&'a Copy) + 'a) -> impl FnMut() + 'a {
        let mut next = 0;
        move || {
            next = (next + 1) % self.0.len();
            run(&self.0[next]);
        }
    }
}

/// `memcpy` of the tables' bytes.
fn memcpy(guest: &GuestMemoryMmap, ranges: &[(u64, usize)], pool: &mut Pool) {
    let pages = pool.all();
    // SAFETY: the pages are plain integers, borrowed as long as the slice lives.
    let target = unsafe { VolatileSlice::new(pages.as_mut_ptr().cast(), std::mem::size_of_val(pages)) };
    let mut offset = 0;
    for &(address, bytes) in ranges {
        let source = guest.get_slice(GuestAddress(address), bytes).unwrap();
        source.copy_to_volatile_slice(target.subslice(offset, bytes).unwrap());
        offset += bytes;
    }
}

/// Which rivals can do it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rivals {
    All,
    /// Another granule: nobody else can.
    Memcpy,
}

/// All contestants on one input whose copies fill at least `mebibytes` each of sources and targets.
fn compare(criterion: &mut Criterion, name: &str, plugins: &Plugins, tables: &Tables, mebibytes: u64, rivals: Rivals) {
    if !is_wanted(name) {
        return;
    }
    let copies = Copies::new(tables, mebibytes);
    let target = production::target(tables.five_levels);
    let format = production::open_format(plugins, &target);
    let (first, last) = (tables.pages[0].0, tables.pages[tables.pages.len() - 1].0 + 4096);
    let ranges = tables.ranges();
    let fused = Fused::new(&tables.map);
    let warm = |source: &mut Table, format: Reused, copy: &Copy| {
        black_box(production::convert(source, &copy.guest, &tables.map, format, &mut copy.arena.borrow_mut()))
    };
    // Everything is touched once.
    let mut source = production::open(plugins, &tables.config);
    for copy in &copies.0 {
        let built = warm(&mut source, format.clone(), copy);
        assert!(built.losses.refused_bytes() == 0 && built.leaves > 0);
    }
    let mut again = production::open(plugins, &tables.config);
    let (warm, target, fused, ranges) = (&warm, &target, &fused, &ranges);
    let mut contestants = vec![
        Contestant::new("stagecraft, warm", copies.each(move |copy| drop(warm(&mut source, format.clone(), copy)))),
        Contestant::new(
            "stagecraft, target opened anew",
            copies.each(move |copy| drop(warm(&mut again, production::open_format(plugins, target), copy))),
        ),
        Contestant::new(
            "stagecraft, cold",
            copies.each(move |copy| {
                drop(warm(&mut production::open(plugins, &tables.config), production::open_format(plugins, target), copy));
            }),
        ),
        Contestant::new("memcpy of the tables", copies.each(move |copy| memcpy(&copy.guest, ranges, &mut copy.pool.borrow_mut()))),
    ];
    if rivals == Rivals::All {
        contestants.push(Contestant::new(
            "fused, by hand",
            copies.each(move |copy| {
                let pool = &mut copy.pool.borrow_mut();
                black_box(fused.convert(&copy.guest, tables.root(), tables.five_levels, pool).unwrap());
            }),
        ));
        contestants.push(Contestant::new(
            "aarch64-paging and x86_64",
            copies.each(move |copy| {
                let pool = &mut copy.pool.borrow_mut();
                black_box(crates::convert(&copy.guest, first, last - first, tables.root(), &tables.map, pool));
            }),
        ));
    }
    println!("{name}: {} copies of {} KiB of guest tables", copies.0.len(), tables.bytes() >> 10);
    contest(criterion, name, tables.leaves, 41, &mut contestants);
}

/// Size of the sources, and of the targets, that contestants rotate through, in MiB: together more than the last-level cache. `STAGECRAFT_BENCH_MIB` overrides it.
fn mebibytes() -> u64 {
    let cache = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let cache = cache.trim().strip_suffix('K').and_then(|kibibytes| kibibytes.parse::<u64>().ok()).map_or(0, |kibibytes| kibibytes >> 10);
    std::env::var("STAGECRAFT_BENCH_MIB").ok().and_then(|value| value.parse().ok()).unwrap_or(cache.clamp(64, 512))
}

fn bulk(criterion: &mut Criterion) {
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let recipe = Recipe { leaves: LEAVES, granule_log2: 12, permissions: Permissions::MostlyUniform, hole: false };
    let scattered = Tables::make(&recipe);
    compare(criterion, "scattered 4K pages, out of DRAM", &plugins, &scattered, mebibytes(), Rivals::All);
    let small = Tables::make(&Recipe { leaves: LEAVES / 8, ..recipe });
    compare(criterion, "scattered 4K pages, in cache", &plugins, &small, 0, Rivals::All);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures/arm64-s1-4k-big");
    match Tables::load(&folder, &plugins) {
        Some(tables) => compare(criterion, "a real guest, out of DRAM", &plugins, &tables, mebibytes(), Rivals::All),
        None => println!("skipped: a real guest (no fixture arm64-s1-4k-big)"),
    }
    let mixed = Tables::make(&Recipe { permissions: Permissions::Alternating, ..recipe });
    compare(criterion, "alternating permissions, out of DRAM", &plugins, &mixed, mebibytes(), Rivals::All);
    let hole = Tables::make(&Recipe { hole: true, ..recipe });
    compare(criterion, "RAM with a hole, out of DRAM", &plugins, &hole, mebibytes(), Rivals::All);
    let large = Tables::make(&Recipe { leaves: LEAVES / 4, granule_log2: 14, ..recipe });
    compare(criterion, "16K pages to 4K pages, out of DRAM", &plugins, &large, mebibytes() / 4, Rivals::Memcpy);
}

criterion_group!(benches, bulk);
criterion_main!(benches);
