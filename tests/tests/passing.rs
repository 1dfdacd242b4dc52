//! Tables that are judged and rewritten at once, and leaves that fill several slots and come many at a time, become what they become otherwise: the same
//! tables, leaves, losses and charges.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::LazyLock;

use stagecraft::memory::{Budget, Kind, Limits, MemoryMap, Region, VmMemory};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{
    Arena, Builder, Built, Encoded, FaultAt, Finding, Format, FormatError, Geometry, Meaning, Passed, Piece, Receiver, Run, Segment, Step,
};
use stagecraft::table::{Table, Visitor, WalkError};
use stagecraft::{Attributes, Gpa, Span};
use stagecraft_tests::random::Random;
use stagecraft_tests::sides::{SIDES, Side};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

static PLUGINS: LazyLock<Plugins> = LazyLock::new(|| Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap());

/// Where guest memory is; the tables stand at its beginning.
const RAM: u64 = 0x4000_0000;
const BYTES: u64 = 16 << 20;
/// A second part of it, behind a hole.
const HIGH: u64 = 0x8000_0000;
/// A third, which only some formats reach; nobody reads there.
const FAR: u64 = 1 << 50;
/// Where tables are built, low enough for entries of 4 bytes.
const TARGET: u64 = 0xc000_0000;

fn open((format, settings): Side, roots: &[(String, Gpa)]) -> Box<dyn Format> {
    let roots = roots.iter().map(|(name, root)| (name.as_str(), root.0));
    let settings: Vec<(&str, u64)> = settings.iter().copied().chain(roots).collect();
    Box::new(PLUGINS.by_format(format).unwrap().open(&TableConfig::new(format, &settings)).unwrap())
}

fn map() -> MemoryMap {
    let ram = |first: u64| Region { kind: Kind::Ram, span: Span { first, last: first + BYTES - 1 } };
    MemoryMap::new(vec![ram(RAM), ram(HIGH), ram(FAR)]).unwrap()
}

/// A guest's tables of one format in its memory, for pages of `2^unit` bytes: like those of drivers, and then damaged in places.
fn guest(format: Side, unit: u8, random: &mut Random) -> (GuestMemoryMmap, Vec<(String, Gpa)>) {
    let mut arena = Arena::new(RAM, BYTES);
    let mut builder = Builder::new(open(format, &[]), &mut arena).unwrap();
    let (mut iova, page_bytes) = (0x1000_0000_u64, 1 << unit);
    for _ in 0..if unit == 16 { 60 } else { 140 } {
        // As much as a table each: full, sparse, contiguous, of one kind or of several.
        let (holes, readers, contiguous) = (random.below(4), random.below(4), random.below(8) == 0);
        let start = [RAM, RAM, RAM, RAM, HIGH, HIGH, FAR][random.below(7) as usize];
        for page in 0..512_u64 {
            let hole = match holes {
                0 => random.below(20) != 0,
                1 => random.below(512) == 0,
                _ => false,
            };
            if hole {
                continue;
            }
            let first = iova + page * page_bytes;
            let pages = BYTES / page_bytes;
            let address = start + if contiguous { page % pages } else { random.below(pages) } * page_bytes;
            let read_only = match readers {
                0 => random.below(2) == 0,
                1 => random.below(100) == 0,
                _ => false,
            };
            let attributes = if read_only { Attributes::READ } else { Attributes::READ.with(Attributes::WRITE) };
            builder.piece(&Piece { iova: Span { first, last: first + page_bytes - 1 }, address, attributes }, &[]).unwrap();
        }
        iova += (1 + random.below(2)) * 512 * page_bytes;
    }
    let built = builder.finish().unwrap();
    let memory = stored(&arena);
    let tables = arena.bytes() / 8;
    for _ in 0..random.below(60) {
        let place = GuestAddress(RAM + random.below(tables) * 8);
        let entry: u64 = memory.read_obj(place).unwrap();
        let entry = match random.below(5) {
            0 => entry ^ 1 << random.below(64),
            1 => 0,
            2 => entry | 1 << 33 | 1 << 38, // beyond memory
            3 => entry ^ 1 << random.below(8) ^ 1 << (56 + random.below(8)),
            _ => entry & !0xfff_f000 | (random.below(0x1_0000) << 12),
        };
        memory.write_obj(entry, place).unwrap();
    }
    (memory, built.roots)
}

/// A guest's tables that are all alike: leaves where `has` says so of an entry, with addresses in no order.
fn alike(format: Side, unit: u8, random: &mut Random, has: impl Fn(u64) -> bool) -> (GuestMemoryMmap, Vec<(String, Gpa)>) {
    let mut arena = Arena::new(RAM, BYTES);
    let mut builder = Builder::new(open(format, &[]), &mut arena).unwrap();
    let attributes = Attributes::READ.with(Attributes::WRITE);
    for page in (0..40 * 512_u64).filter(|page| has(page % 512)) {
        let (first, address) = (0x1000_0000 + (page << unit), RAM + (random.below(BYTES >> unit) << unit));
        builder.piece(&Piece { iova: Span::of_log2(first, unit), address, attributes }, &[]).unwrap();
    }
    let built = builder.finish().unwrap();
    (stored(&arena), built.roots)
}

/// Guest memory with the tables of an arena.
fn stored(arena: &Arena) -> GuestMemoryMmap {
    let ram = |first: u64| (GuestAddress(first), BYTES as usize);
    let memory = GuestMemoryMmap::from_ranges(&[ram(RAM), ram(HIGH)]).unwrap();
    for (page, words) in arena.pages() {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(page.0)).unwrap();
    }
    memory
}

/// A builder, and whether it takes part in what is faster.
struct Watched<'a, 'b> {
    builder: &'a mut Builder<'b>,
    fast: bool,
    passed: u64,
}

impl Visitor for Watched<'_, '_> {
    fn takes_gaps(&self) -> bool {
        self.builder.takes_gaps()
    }

    fn takes_large(&self) -> bool {
        self.fast && self.builder.takes_large()
    }

    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        self.fast.then(|| self.builder.receive(run)).flatten()
    }

    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        let received = self.builder.received(run, passed)?;
        self.passed += u64::from(received);
        Ok(received)
    }

    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        self.builder.leaves(run, path)
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        self.builder.piece(piece, path)
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.builder.fault(fault)
    }
}

/// What comes out.
struct Converted {
    built: Built,
    pages: Vec<(Gpa, Vec<u64>)>,
    charged: u64,
    passed: u64,
}

fn convert(memory: &GuestMemoryMmap, source: &mut Table, target: Box<dyn Format>, fast: bool, arena: &mut Arena) -> Converted {
    let mut builder = Builder::new(target, arena).unwrap();
    let budget = Budget::new(Limits { questions: 1 << 24, ..Limits::default() });
    let mut visitor = Watched { builder: &mut builder, fast, passed: 0 };
    let walked = source.walk(&VmMemory(memory), &map(), Span::ALL, &budget, &mut visitor);
    let passed = visitor.passed;
    // What the builder says first: it may have stopped the walk.
    let built = builder.finish().unwrap_or_else(|error| panic!("fast: {fast}: {error}"));
    walked.unwrap();
    let pages = arena.pages().map(|(page, words)| (page, words.to_vec())).collect();
    Converted { built, pages, charged: budget.leaves_seen(), passed }
}

/// The size of pages that both formats have.
fn unit((format, settings): Side) -> u8 {
    let granule = settings.iter().find(|(name, _)| *name == "granule").map(|(_, granule)| granule.trailing_zeros() as u8);
    granule.unwrap_or(if format.starts_with("apple") || format.starts_with("loongarch") { 14 } else { 12 })
}

#[test]
fn what_is_fast_becomes_what_is_read_first() {
    let seed = std::env::var("STAGECRAFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("STAGECRAFT_SEED={seed}");
    let mut random = Random::new(0x5eed ^ seed);
    let (mut tables, mut passed, mut passing) = (0, 0, BTreeSet::new());
    // What is fast may leave alone what is zero in memory that was used before, for tables of all formats.
    let mut used = Arena::new(TARGET, 256 << 20);
    for (source_index, source) in SIDES.into_iter().enumerate() {
        for (target_index, target) in SIDES.into_iter().enumerate() {
            // All sources, all targets, and another third of the pairs with each seed.
            if !(source_index + target_index + seed as usize).is_multiple_of(3) {
                continue;
            }
            let larger = if random.below(4) == 0 { 16 } else { 12 };
            let (memory, roots) = guest(source, unit(source).max(unit(target)).max(larger), &mut random);
            let mut table = Table::open(open(source, &roots)).unwrap();
            let wanted = convert(&memory, &mut table, open(target, &[]), false, &mut Arena::new(TARGET, 256 << 20));
            used.reset();
            let found = convert(&memory, &mut table, open(target, &[]), true, &mut used);
            let what = format!("{source:?} to {target:?}");
            // Neighbours count as one piece or as several, by the way that they took.
            let counts = |built: &Built| built.losses.iter().map(|(loss, count)| (loss, count.bytes)).collect::<Vec<_>>();
            assert_eq!((&found.built.roots, found.built.leaves), (&wanted.built.roots, wanted.built.leaves), "{what}");
            assert_eq!(counts(&found.built), counts(&wanted.built), "{what}");
            assert_eq!(found.charged, wanted.charged, "{what}: leaves charged");
            assert_eq!(found.pages.len(), wanted.pages.len(), "{what}");
            for ((page, words), (_, other)) in found.pages.iter().zip(&wanted.pages) {
                assert_eq!(words, other, "{what}: the table at {page}");
            }
            tables += found.pages.len();
            passed += found.passed;
            if found.passed > 0 {
                passing.extend([(true, source_index), (false, target_index)]);
            }
        }
    }
    println!("{tables} pages of tables; {passed} pages of entries passed, of {} formats", passing.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        assert!(passing.len() >= 2 * SIDES.len() - 4, "{passing:?}");
        return assert!(passed > tables as u64 / 20, "{passed} of {tables}");
    }
    println!("skipped: tables that pass (no processor for it)");
}

/// A format whose tables are smaller than what their addresses are multiples of: page tables of 2 KiB, each at the beginning of a page.
struct Apart(Box<dyn Format>);

impl Apart {
    fn new() -> Self {
        Self(open(("s390-zpci/dma", &[]), &[]))
    }
}

impl Format for Apart {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        let mut geometry = self.0.geometry()?;
        let at = geometry.levels.iter().position(|level| level.index_lsb == 20).unwrap();
        for shape in geometry.levels[at].shapes.iter_mut().filter(|shape| shape.value == 0) {
            assert_eq!(shape.address, [Segment { entry_lsb: 11, address_lsb: 11, width: 53 }]);
            shape.address = vec![Segment { entry_lsb: 12, address_lsb: 12, width: 52 }];
        }
        Ok(geometry)
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        self.0.decode(level, inherited, pattern)
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        self.0.decode_entry(level, inherited, entry)
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        self.0.explain(level, inherited, pattern)
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        self.0.encode_leaf(level, size_log2, attributes)
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        self.0.encode_table(level, next)
    }
}

/// Tables with leaves in a few lines, in all of them, and in a few others, and tables that are smaller than their room, one after the other in the same memory.
#[test]
fn memory_that_was_used_before_holds_nothing_of_that() {
    type Target = (&'static str, fn() -> Box<dyn Format>);
    type Has = fn(u64) -> bool;
    let targets: [Target; 4] = [
        ("VT-d", || open(("intel-vtd/second-stage", &[]), &[])),
        ("AMD", || open(("amd-vi/v1", &[]), &[])),
        ("apart", || Box::new(Apart::new())),
        ("VT-d again", || open(("intel-vtd/second-stage", &[]), &[])),
    ];
    let rounds: [Has; 4] = [|entry| entry % 64 == 0, |_| true, |entry| entry % 64 == 32, |entry| entry % 64 == 16];
    let (mut random, mut used, mut passed) = (Random::new(0x5eed), Arena::new(TARGET, 256 << 20), [0; 4]);
    for (name, target) in targets {
        for (has, passed) in rounds.into_iter().zip(&mut passed) {
            let (memory, roots) = alike(SIDES[0], 12, &mut random, has);
            let mut table = Table::open(open(SIDES[0], &roots)).unwrap();
            let wanted = convert(&memory, &mut table, target(), false, &mut Arena::new(TARGET, 256 << 20));
            used.reset();
            let found = convert(&memory, &mut table, target(), true, &mut used);
            assert_eq!(found.pages.len(), wanted.pages.len(), "{name}");
            for ((page, words), (_, other)) in found.pages.iter().zip(&wanted.pages) {
                assert_eq!(words, other, "{name}: the table at {page}");
            }
            *passed += found.passed;
        }
    }
    println!("pages of entries passed: {passed:?}");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        assert!(passed.into_iter().all(|passed| passed > 50), "{passed:?}");
    }
}
