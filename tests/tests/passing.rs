//! Tables that are judged and rewritten while they are read become what they become when they are read first: the same tables, leaves, losses and faults.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::sync::LazyLock;

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Kind, Limits, MemoryMap, Nearby, ReadError, Region, VmMemory};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{Arena, Builder, Built, Passage, Piece, Table, Visitor as _};
use stagecraft::{Attributes, Gpa, Span};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

static PLUGINS: LazyLock<Plugins> = LazyLock::new(|| Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap());

/// Formats whose last tables have 512 entries of eight bytes.
const FORMATS: [(&str, &[(&str, u64)]); 8] = [
    ("arm-smmuv3/stage1", &[]),
    ("arm-smmuv3/stage1", &[("lpa2", 1), ("input-bits", 52), ("output-bits", 52)]),
    ("arm-smmuv3/stage2", &[]),
    ("intel-vtd/first-stage", &[]),
    ("intel-vtd/second-stage", &[]),
    ("amd-vi/v1", &[]),
    ("amd-vi/v2", &[]),
    ("riscv-iommu/first-stage", &[]),
];

/// Where guest memory is; the tables stand at its beginning.
const RAM: u64 = 0x4000_0000;
const BYTES: u64 = 16 << 20;
/// A second part of it, behind a hole.
const HIGH: u64 = 0x1_0000_0000;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) * bound) >> 32
    }
}

fn open((format, settings): (&str, &[(&str, u64)]), roots: &[(String, Gpa)]) -> Box<dyn stagecraft::table::Format> {
    let roots = roots.iter().map(|(name, root)| (name.as_str(), root.0));
    let settings: Vec<(&str, u64)> = settings.iter().copied().chain(roots).collect();
    Box::new(PLUGINS.by_format(format).unwrap().open(&TableConfig::new(format, &settings)).unwrap())
}

fn map() -> MemoryMap {
    let ram = |first: u64| Region { kind: Kind::Ram, span: Span { first, last: first + BYTES - 1 } };
    MemoryMap::new(vec![ram(RAM), ram(HIGH)]).unwrap()
}

/// A guest's tables of one format in its memory: like those of drivers, and then damaged in places.
fn guest(format: (&str, &[(&str, u64)]), random: &mut Random) -> (GuestMemoryMmap, Vec<(String, Gpa)>) {
    let mut arena = Arena::new(RAM, BYTES);
    let mut builder = Builder::new(open(format, &[]), &mut arena).unwrap();
    let mut iova = 0x1000_0000_u64;
    for _ in 0..140 {
        // A table each: full, sparse, contiguous, of one kind or of several.
        let (holes, readers, contiguous) = (random.below(4), random.below(4), random.below(8) == 0);
        let start = if random.below(3) == 0 { HIGH } else { RAM };
        for page in 0..512_u64 {
            let hole = match holes {
                0 => random.below(20) != 0,
                1 => random.below(512) == 0,
                _ => false,
            };
            if hole {
                continue;
            }
            let first = iova + page * 4096;
            let address = if contiguous { start + page * 4096 } else { start + random.below(BYTES / 4096) * 4096 };
            let read_only = match readers {
                0 => random.below(2) == 0,
                1 => random.below(100) == 0,
                _ => false,
            };
            let attributes = if read_only { Attributes::READ } else { Attributes::READ.with(Attributes::WRITE) };
            builder.piece(&Piece { iova: Span { first, last: first + 4095 }, address, attributes }, &[]).unwrap();
        }
        iova += (1 + random.below(2)) << 21;
    }
    let built = builder.finish().unwrap();
    let ram = |first: u64| (GuestAddress(first), BYTES as usize);
    let memory = GuestMemoryMmap::from_ranges(&[ram(RAM), ram(HIGH)]).unwrap();
    for (page, words) in arena.pages() {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(page.0)).unwrap();
    }
    let tables = arena.bytes() / 8;
    for _ in 0..random.below(60) {
        let place = GuestAddress(RAM + random.below(tables) * 8);
        let entry: u64 = memory.read_obj(place).unwrap();
        let entry = match random.below(4) {
            0 => entry ^ 1 << random.below(64),
            1 => 0,
            2 => entry | 1 << 33 | 1 << 38, // beyond memory
            _ => entry & !0xfff_f000 | (random.below(0x1_0000) << 12),
        };
        memory.write_obj(entry, place).unwrap();
    }
    (memory, built.roots)
}

/// Reads tables and lets nothing pass, or counts what does.
struct Memory<'a> {
    memory: &'a GuestMemoryMmap,
    passes: bool,
    passed: Cell<u64>,
}

impl EntryMemory for Memory<'_> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        VmMemory(self.memory).read_entries(address, layout, entries)
    }

    fn read_passing(&self, address: Gpa, entries: &mut [u64; 512], passage: &mut Passage<'_>) -> Option<Nearby> {
        let nearby = self.passes.then(|| VmMemory(self.memory).read_passing(address, entries, passage)).flatten()?;
        self.passed.set(self.passed.get() + 1);
        Some(nearby)
    }
}

/// What comes out: what was built, all pages of tables, and what was charged.
fn convert(memory: &Memory<'_>, source: &mut Table, target: (&str, &[(&str, u64)]), before: u64) -> (Built, Vec<(Gpa, Vec<u64>)>, u64) {
    let mut arena = Arena::new(1 << 36, 256 << 20);
    // What stands in it already decides whether tables are written past the cache.
    let mut first = Builder::new(open(target, &[]), &mut arena).unwrap();
    for table in 0..before {
        let iova = Span { first: 0x1000_0000 + (table << 21), last: 0x1000_0fff + (table << 21) };
        first.piece(&Piece { iova, address: RAM, attributes: Attributes::READ }, &[]).unwrap();
    }
    first.finish().unwrap();
    let mut builder = Builder::new(open(target, &[]), &mut arena).unwrap();
    let budget = Budget::new(Limits::default());
    source.walk(memory, &map(), Span::ALL, &budget, &mut builder).unwrap();
    let built = builder.finish().unwrap();
    let pages = arena.pages().map(|(page, words)| (page, words.to_vec())).collect();
    (built, pages, budget.leaves_seen())
}

#[test]
fn what_passes_becomes_what_is_read_first() {
    let seed = std::env::var("STAGECRAFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("STAGECRAFT_SEED={seed}");
    let mut random = Random(0x5eed ^ seed);
    let (mut tables, mut passed) = (0, 0);
    for source in FORMATS {
        for target in FORMATS {
            let (memory, roots) = guest(source, &mut random);
            let roots: Vec<(String, Gpa)> = roots;
            let mut table = Table::open(open(source, &roots)).unwrap();
            let [plain, passing] = [false, true].map(|passes| Memory { memory: &memory, passes, passed: Cell::default() });
            let wanted = convert(&plain, &mut table, target, 0);
            let found = convert(&passing, &mut table, target, 0);
            let what = format!("{source:?} to {target:?}");
            // Neighbours count as one piece or as several, by the way that they took.
            let counts = |built: &Built| built.losses.iter().map(|(loss, count)| (loss, count.bytes)).collect::<Vec<_>>();
            assert_eq!((&found.0.roots, found.0.leaves), (&wanted.0.roots, wanted.0.leaves), "{what}");
            assert_eq!(counts(&found.0), counts(&wanted.0), "{what}");
            assert_eq!(found.2, wanted.2, "{what}: leaves charged");
            assert_eq!(found.1.len(), wanted.1.len(), "{what}");
            for ((page, words), (_, other)) in found.1.iter().zip(&wanted.1) {
                assert_eq!(words, other, "{what}: the table at {page}");
            }
            tables += found.1.len();
            passed += passing.passed.get();
        }
    }
    println!("{tables} tables, {passed} of them passed");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return assert!(passed > tables as u64 / 20, "{passed} of {tables}");
    }
    println!("skipped: tables that pass (no processor for it)");
}
