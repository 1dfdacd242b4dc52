//! Tables that are judged and rewritten at once, and leaves that fill several slots and come many at a time, become what they become otherwise: the same
//! tables, leaves, losses and charges.
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Kind, Limits, MemoryMap, Nearby, ReadError, Region, VmMemory};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{
    AddressSpace, Arena, Builder, Built, Encoded, FaultAt, FaultKind, Finding, Format, FormatError, Geometry, Meaning, Passed, Passing, Piece,
    Receiver, Run, Segment, Step,
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
    store(&memory, arena);
    memory
}

/// Writes the tables of an arena.
fn store(memory: &GuestMemoryMmap, arena: &Arena) {
    for (page, words) in arena.pages() {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(page.0)).unwrap();
    }
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
    stagecraft_tests::skipped("tables that are rewritten as they are read: this processor has no registers of 64 bytes");
}

/// Guest memory that gives away small tables one at a time, if it is asked to, and counts how often it is read.
struct OneByOne<'a> {
    memory: VmMemory<'a, GuestMemoryMmap>,
    /// Pages in which small tables are, each of so many entries.
    alone: &'a BTreeSet<u64>,
    /// A page that is missing.
    lacks: u64,
    reads: Cell<u64>,
}

/// Entries of a small table.
const SMALL: usize = 256;

const fn page(address: u64) -> u64 {
    address & !0xfff
}

impl EntryMemory for OneByOne<'_> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        if page(address.0) == self.lacks || entries.len() > SMALL && self.alone.contains(&page(address.0)) {
            return Err(ReadError(address));
        }
        self.reads.set(self.reads.get() + 1);
        self.memory.read_entries(address, layout, entries)
    }
}

/// All that a walk says, one piece after the other, or what a builder makes of it.
struct Heard<'a, 'b> {
    builder: Option<&'a mut Builder<'b>>,
    /// It takes part in what is faster.
    fast: bool,
    said: Vec<String>,
    /// Pages of tables at the end of a path.
    last: BTreeSet<u64>,
    /// Where entries are that lead to those.
    pointers: BTreeMap<u64, u64>,
    entry_bytes: u64,
    /// Tables that were received.
    taken: u64,
    /// How often entries were about to be read.
    tables: u64,
}

impl<'a, 'b> Heard<'a, 'b> {
    fn new(builder: Option<&'a mut Builder<'b>>, fast: bool, entry_bytes: u64) -> Self {
        Self { builder, fast, said: Vec::new(), last: BTreeSet::new(), pointers: BTreeMap::new(), entry_bytes, taken: 0, tables: 0 }
    }
}

impl Visitor for Heard<'_, '_> {
    fn table(&mut self) {
        self.tables += 1;
    }

    fn takes_gaps(&self) -> bool {
        true
    }

    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        self.builder.as_mut().filter(|_| self.fast)?.receive(run)
    }

    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        let received = self.builder.as_mut().map_or(Ok(false), |builder| builder.received(run, passed))?;
        self.taken += u64::from(received);
        Ok(received)
    }

    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        match &mut self.builder {
            Some(builder) => builder.leaves(run, path),
            None => run.pieces().try_for_each(|piece| self.piece(&piece, path)),
        }
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        if let Some(builder) = &mut self.builder {
            return builder.piece(piece, path);
        }
        if let ([.., above, last], 0xfff) = (path, piece.iova.length_minus_one()) {
            self.last.insert(page(last.table.0));
            self.pointers.insert(above.table.0 + above.index * self.entry_bytes, last.table.0);
        }
        // Which entries come in one run depends on what was seen before: of those, the path leads to the first.
        let tables: Vec<_> = path.iter().map(|step| (step.level, step.table)).collect();
        self.said.push(format!("{piece:?} {tables:?}"));
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.said.push(format!("{fault:?}"));
        Ok(())
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        if self.builder.is_none() {
            self.said.push(format!("nothing at {span} {path:?}"));
        }
        Ok(())
    }
}

/// What a walk came to.
#[derive(PartialEq, Debug)]
struct Told {
    said: Vec<String>,
    ended: Option<String>,
    charged: (u64, u64),
    built: Option<(u64, Vec<Vec<u64>>)>,
}

/// Small tables that stand side by side are read together: what is said of them is what is said when each is read alone, whatever is wrong with one of them.
#[test]
fn tables_that_are_read_together_are_as_if_alone() {
    let mut random = Random::new(0x51de);
    let none = BTreeSet::new();
    for format in [("s390-zpci/dma", &[] as &[_]), ("arm-v7s/short", &[]), ("arm-v7s/short", &[("split", 1), ("output-bits", 40)])] {
        let (mut reads, mut ended, mut passed) = ([0, 0], 0, 0);
        for round in 0..8 {
            // Damaged here and there, or as a driver leaves them.
            let (memory, roots) = if round % 4 == 3 { alike(format, 12, &mut random, |_| true) } else { guest(format, 12, &mut random) };
            let mut table = Table::open(open(format, &roots)).unwrap();
            let entry_bytes = u64::from(table.geometry().entry_bytes);
            let mut walk = |span: Span, tables: u64, alone: &BTreeSet<u64>, lacks: u64, builds: bool| {
                let memory = OneByOne { memory: VmMemory(&memory), alone, lacks, reads: Cell::new(0) };
                let budget = Budget::new(Limits { tables, questions: 1 << 24, ..Limits::default() });
                let mut arena = Arena::new(TARGET, 256 << 20);
                let mut builder = Builder::new(open(SIDES[5], &[]), &mut arena).unwrap();
                let builder_here = builds.then_some(&mut builder);
                let mut heard = Heard::new(builder_here, true, entry_bytes);
                let ended = table.walk(&memory, &map(), span, &budget, &mut heard).err().map(|error| error.to_string());
                let (said, known) = (heard.said, (heard.last, heard.pointers));
                let built = builder.finish().unwrap();
                let pages = arena.pages().map(|(_, words)| words.to_vec()).collect();
                let told =
                    Told { said, ended, charged: (budget.tables_visited(), budget.leaves_seen()), built: builds.then_some((built.leaves, pages)) };
                (told, known, memory.reads.get())
            };
            let (_, (small, pointers), _) = walk(Span::ALL, 1 << 16, &none, 0, false);
            let pointers: Vec<(u64, u64)> = pointers.into_iter().collect();
            let (table_bytes, mut leads) = (SMALL as u64 * entry_bytes, [0; 16]);
            let (leads, is_pair) = (&mut leads[..2 * entry_bytes as usize], |pair: &&[(u64, u64)]| pair[1].0 == pair[0].0 + entry_bytes);
            let pairs: Vec<&[(u64, u64)]> = pointers.windows(2).filter(is_pair).collect();
            if round % 4 == 3 {
                // Two neighbours in which there is nothing, and to which many others lead.
                let nothing = pairs.iter().find(|pair| pair[1].1 == pair[0].1 + table_bytes && page(pair[0].1) == page(pair[1].1)).unwrap();
                let absent: u64 = if entry_bytes == 8 { 0x400_u64.to_be() } else { 0 };
                memory.write_slice(&vec![absent.to_ne_bytes(); (table_bytes / 4) as usize].concat(), GuestAddress(nothing[0].1)).unwrap();
                memory.read_slice(leads, GuestAddress(nothing[0].0)).unwrap();
                pairs.iter().skip(12).step_by(2).for_each(|pair| memory.write_slice(leads, GuestAddress(pair[0].0)).unwrap());
            } else {
                // Some are not in the order of memory, or two in a row are the same.
                for pair in pairs {
                    let (to, other) = (GuestAddress(pair[0].0), GuestAddress(pair[1].0));
                    memory.read_slice(leads, to).unwrap();
                    let (first, second) = leads.split_at(leads.len() / 2);
                    match random.below(24) {
                        0 => memory.write_slice(first, other).unwrap(),
                        1 | 2 => memory.write_slice(&[second, first].concat(), to).unwrap(),
                        _ => {}
                    }
                }
            }
            for trial in 0..6 {
                // From anywhere to anywhere, in the middle of tables.
                let first = 0x1000_0000 + random.below(40 << 20);
                let span = if trial % 2 == 0 { Span { first, last: first + random.below(80 << 20) } } else { Span::ALL };
                let tables = if trial % 3 == 0 { 2 + random.below(40) } else { 1 << 16 };
                let lacks = if trial == 2 { small.iter().nth(small.len() / 2).copied().unwrap_or(0) } else { 0 };
                for builds in [false, true] {
                    let (alone, _, many) = walk(span, tables, &small, lacks, builds);
                    let (together, _, fewer) = walk(span, tables, &none, lacks, builds);
                    let other = alone.said.iter().zip(&together.said).find(|(alone, together)| alone != together);
                    assert!(alone == together, "{format:?}, round {round}, trial {trial}, builds {builds}: {other:?}");
                    reads = [reads[0] + many, reads[1] + fewer];
                    ended += u64::from(together.ended.is_some());
                    passed += u64::from(together.built.is_some_and(|(leaves, _)| leaves > 0));
                }
            }
        }
        println!("{format:?}: read {} times, together {} times; {ended} walks ended early", reads[0], reads[1]);
        assert!(reads[1] * 10 < reads[0] * 9 && ended > 2 && passed > 2, "{format:?}: {reads:?}, {ended}, {passed}");
    }
}

/// A second stage that puts most of guest memory where it is, with tables in the rest.
fn second_stage(memory: &GuestMemoryMmap) -> Table {
    let format = *SIDES.iter().find(|(name, _)| *name == "arm-smmuv3/stage2").unwrap();
    let mut arena = Arena::new(HIGH, 1 << 20);
    let mut builder = Builder::new(open(format, &[]), &mut arena).unwrap();
    let attributes = Attributes::READ.with(Attributes::WRITE);
    builder.map(&Piece { iova: Span { first: RAM, last: RAM + BYTES - 1 }, address: RAM, attributes }).unwrap();
    let built = builder.finish().unwrap();
    store(memory, &arena);
    Table::open(open(format, &built.roots)).unwrap()
}

/// The same behind a second stage: that tables could not be read together says nothing of each of them.
#[test]
fn tables_that_are_not_read_together_fail_for_themselves() {
    let mut random = Random::new(0x51df);
    let (mut failed, mut faults) = (0, 0);
    for format in [("s390-zpci/dma", &[] as &[_]), ("arm-v7s/short", &[])] {
        for round in 0..12 {
            let (memory, roots) = guest(format, 12, &mut random);
            let entry_bytes = u64::from(Table::open(open(format, &roots)).unwrap().geometry().entry_bytes);
            let mut space = AddressSpace::nested(Table::open(open(format, &roots)).unwrap(), second_stage(&memory));
            let mut walk = |alone: &BTreeSet<u64>| {
                let memory = OneByOne { memory: VmMemory(&memory), alone, lacks: 0, reads: Cell::new(0) };
                let budget = Budget::new(Limits { questions: 1 << 24, ..Limits::default() });
                let mut heard = Heard::new(None, true, entry_bytes);
                space.walk(&memory, &map(), Span::ALL, &budget, &mut heard).unwrap();
                (heard.said, heard.last, memory.reads.get())
            };
            let (together, small, fewer) = walk(&BTreeSet::new());
            let (alone, _, many) = walk(&small);
            let other = alone.iter().zip(&together).find(|(alone, together)| alone != together);
            assert!(alone == together, "{format:?}, round {round}: {other:?}");
            failed += many.saturating_sub(fewer);
            faults += alone.iter().filter(|said| said.contains("stage: 1")).count();
        }
    }
    println!("{failed} more reads, {faults} faults of the first stage");
    assert!(failed > 1000 && faults > 20, "{failed} {faults}");
}

/// Guest memory that gives away what is rewritten as it is read, and lacks a page.
struct Lacking<'a> {
    memory: VmMemory<'a, GuestMemoryMmap>,
    lacks: u64,
    /// It reads so many entries at once, no more.
    most: usize,
}

impl EntryMemory for Lacking<'_> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        if page(address.0) == self.lacks { Err(ReadError(address)) } else { self.memory.read_entries(address, layout, entries) }
    }

    fn read_entries_passing(
        &self,
        address: Gpa,
        layout: EntryLayout,
        entries: &mut [u64],
        passing: &mut Passing<'_, '_>,
    ) -> Result<Nearby, ReadError> {
        if page(address.0) == self.lacks {
            return Err(ReadError(address));
        }
        let bytes = u64::from(layout.bytes);
        let mut nearby = Nearby::UNKNOWN;
        for (index, part) in entries.chunks_mut(self.most).enumerate() {
            let address = Gpa(address.0 + (index * self.most) as u64 * bytes);
            nearby = self.memory.read_entries_passing(address, layout, part, passing)?;
        }
        Ok(nearby)
    }
}

/// Tables of a page that come one after the other, and are rewritten as they are read: what is built, said and charged is the same as when they are read first,
/// whatever is wrong with one of them.
#[test]
fn tables_in_a_row_are_as_if_alone() {
    let mut random = Random::new(0x2010);
    let pages_of_tables = |format: &Side| {
        let table = Table::open(open(*format, &[])).unwrap();
        table.geometry().entry_bytes == 8 && table.geometry().levels.iter().any(|level| level.index_bits == 9) && unit(*format) == 12
    };
    let sides: Vec<Side> = SIDES.into_iter().filter(pages_of_tables).collect();
    let (mut ended, mut missing, mut outsiders, mut faults, mut taken) = ([0, 0], 0, 0, 0, 0);
    for (round, format) in (0..4).flat_map(|round| sides.iter().map(move |side| (round, *side))) {
        let sparse = random.below(2) == 0;
        let (memory, roots) = match round {
            3 => alike(format, 12, &mut random, |page| !sparse || page.is_multiple_of(5)),
            _ => guest(format, 12, &mut random),
        };
        let target = sides[random.below(sides.len() as u64) as usize];
        let mut table = Table::open(open(format, &roots)).unwrap();
        let absent = table.geometry().levels[0].absent;
        let mut walk = |span: Span, (tables, leaves): (u64, u64), lacks: u64, builds: bool, fast: bool, most: usize| {
            let memory = Lacking { memory: VmMemory(&memory), lacks, most };
            let budget = Budget::new(Limits { tables, leaves, questions: 1 << 24, ..Limits::default() });
            let mut arena = Arena::new(TARGET, 256 << 20);
            let mut builder = Builder::new(open(target, &[]), &mut arena).unwrap();
            let builder_here = builds.then_some(&mut builder);
            let mut heard = Heard::new(builder_here, fast, 8);
            let ended = table.walk(&memory, &map(), span, &budget, &mut heard).err().map(|error| error.to_string());
            let (said, known, taken, read) = (heard.said, heard.pointers, heard.taken, heard.tables);
            let built = builder.finish().unwrap();
            let pages = arena.pages().map(|(_, words)| words.to_vec()).collect();
            let charged = (budget.tables_visited(), budget.leaves_seen());
            (Told { said, ended, charged, built: builds.then_some((built.leaves, pages)) }, known, taken, read)
        };
        let everything = (1 << 16, 1 << 25);
        let (_, pointers, ..) = walk(Span::ALL, everything, 0, false, false, 512);
        let pointers: Vec<(u64, u64)> = pointers.into_iter().collect();
        // One table in which there is nothing, and to which others lead; some in another order, some twice, some outside of memory.
        let nothing = pointers[pointers.len() / 2];
        let big = format.1.contains(&("big-endian", 1));
        let empty: Vec<u8> = if big { absent.to_be_bytes() } else { absent.to_le_bytes() }.repeat(512);
        let outside = |entry: u64| entry | if big { (1_u64 << 36).swap_bytes() } else { 1 << 36 };
        memory.write_slice(&empty, GuestAddress(nothing.1)).unwrap();
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        for pair in pointers.windows(2).filter(|pair| pair[0].0 != nothing.0) {
            let (first, second) = (read(pair[0].0), read(pair[1].0));
            let write = |at: u64, entry: u64| memory.write_obj(entry, GuestAddress(at)).unwrap();
            match random.below(if round == 3 { 8 } else { 30 }) {
                0 => write(pair[0].0, read(nothing.0)),
                1 => write(pair[1].0, first),
                2 => [(pair[0].0, second), (pair[1].0, first)].into_iter().for_each(|(at, entry)| write(at, entry)),
                3 => write(pair[1].0, outside(second)),
                _ => {}
            }
        }
        for trial in 0..6 {
            // From anywhere to anywhere, in the middle of tables.
            let first = 0x1000_0000 + random.below(80 << 20);
            let span = if trial % 2 == 0 { Span { first, last: first + random.below(200 << 20) } } else { Span::ALL };
            let limits = match trial % 3 {
                0 => (4 + random.below(60), 1 << 25),
                1 => (1 << 16, 1 + random.below(20_000)),
                _ => everything,
            };
            let lacks = if trial == 1 || trial == 2 { pointers[random.below(pointers.len() as u64) as usize].1 } else { 0 };
            // Memory that gives away tables in parts has them read, and rewritten later.
            let most = if trial == 5 { [64, 256][random.below(2) as usize] } else { 512 };
            let (alone, _, _, read) = walk(span, limits, lacks, true, false, 512);
            let (row, _, received, announced) = walk(span, limits, lacks, true, true, most);
            assert!(row.ended.is_some() || read == announced, "{format:?} to {target:?}, round {round}, trial {trial}: {read} {announced}");
            let other = alone.said.iter().zip(&row.said).find(|(alone, row)| alone != row);
            assert_eq!(
                (&alone.ended, alone.charged, alone.said.len(), other),
                (&row.ended, row.charged, row.said.len(), None),
                "{format:?} to {target:?}, round {round}, trial {trial}"
            );
            // Which leaves were paid for last depends on which are told of together; those that were not are not built. Damaged tables have large leaves as well.
            let by_leaves = row.ended.as_ref().is_some_and(|ended| ended.ends_with("leaves"));
            let paid = |told: &Told| told.built.as_ref().is_some_and(|(leaves, _)| *leaves <= limits.1);
            let within = round != 3 || paid(&alone) && paid(&row);
            assert!(
                if by_leaves { within } else { alone.built == row.built },
                "{format:?} to {target:?}, round {round}, trial {trial}: other tables are built"
            );
            ended[usize::from(limits.0 == everything.0)] += u64::from(row.ended.is_some());
            // What is outside of memory is not asked for.
            let asked = row.said.iter().filter(|said| said.contains("Missing")).count();
            assert!(lacks != 0 || asked == 0, "{format:?} to {target:?}, round {round}, trial {trial}");
            missing += asked;
            outsiders += row.said.iter().filter(|said| said.contains("OutsideMemory")).count();
            faults += row.said.len();
            taken += received;
        }
    }
    println!(
        "{taken} tables were rewritten as they were read; {faults} faults, {missing} of them for missing memory, {outsiders} outside of it; {ended:?} walks ended early"
    );
    assert!(ended[0] > 10 && ended[1] > 10 && missing > 10 && outsiders > 100, "{ended:?} {missing} {outsiders}");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        return assert!(taken > 1000, "{taken}");
    }
    stagecraft_tests::skipped("tables in a row that are rewritten as they are read: this processor has no registers of 64 bytes");
}

/// A format that is another one in what these say.
struct Altered {
    format: Box<dyn Format>,
    geometry: fn(Geometry) -> Geometry,
    decode: Decode,
    decode_entry: Decode,
}

/// As [`Format::decode`] and [`Format::decode_entry`], of a format.
type Decode = fn(&mut dyn Format, u8, u64, u64) -> Result<Meaning, FormatError>;

impl Format for Altered {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        self.format.geometry().map(self.geometry)
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        (self.decode)(&mut *self.format, level, inherited, pattern)
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        (self.decode_entry)(&mut *self.format, level, inherited, entry)
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        self.format.explain(level, inherited, pattern)
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        self.format.encode_leaf(level, size_log2, attributes)
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        self.format.encode_table(level, next)
    }
}

/// A format that looks at addresses: tables at odd pages are for nobody, and leaves at odd pages that may only be read are none.
fn by_address(format: Box<dyn Format>) -> Altered {
    let decode: Decode = |format, level, inherited, pattern| {
        let meaning = format.decode(level, inherited, pattern)?;
        let is_read_only = matches!(meaning, Meaning::Leaf { attributes, .. } if !attributes.access(true).write);
        Ok(if is_read_only || matches!(meaning, Meaning::Table { .. }) { Meaning::WholeEntry } else { meaning })
    };
    let decode_entry: Decode = |format, level, inherited, entry| {
        let lsb = format.geometry()?.levels[usize::from(level)].index_lsb;
        Ok(match format.decode(level, inherited, entry & !0xf_ffff_ffff_f000)? {
            Meaning::Table { .. } if lsb == 21 && entry & 0x1000 != 0 => Meaning::Fault(FaultKind::Permission),
            Meaning::Leaf { attributes, .. } if !attributes.access(true).write && entry & 0x1000 != 0 => Meaning::Absent,
            meaning => meaning,
        })
    };
    Altered { format, geometry: |geometry| geometry, decode, decode_entry }
}

/// What a format says of an entry with its address is of that entry, not of those beside it that are alike but for the address.
#[test]
fn what_is_said_of_a_whole_entry_is_said_of_no_other() {
    let format = ("intel-vtd/second-stage", &[] as &[_]);
    let (memory, roots) = alike(format, 12, &mut Random::new(0xadd), |_| true);
    let walk = |looks: bool, fast: bool| {
        let opened = open(format, &roots);
        let mut table = Table::open(if looks { Box::new(by_address(opened)) } else { opened }).unwrap();
        let mut arena = Arena::new(TARGET, 256 << 20);
        let mut builder = Builder::new(open(SIDES[5], &[]), &mut arena).unwrap();
        let budget = Budget::new(Limits { questions: 1 << 20, ..Limits::default() });
        let mut heard = Heard::new(Some(&mut builder), fast, 8);
        table.walk(&VmMemory(&memory), &map(), Span::ALL, &budget, &mut heard).unwrap();
        let mut told = Heard::new(None, false, 8);
        table.walk(&VmMemory(&memory), &map(), Span::ALL, &budget, &mut told).unwrap();
        (builder.finish().unwrap().leaves, told.said.iter().filter(|said| said.starts_with("Piece")).count() as u64, told.pointers)
    };
    let (leaves, pieces, pointers) = walk(false, false);
    assert_eq!((leaves, pieces, pointers.len()), (40 * 512, 40 * 512, 40));
    let even: Vec<u64> = pointers.values().copied().filter(|table| table & 0x1000 == 0).collect();
    assert!((10..30).contains(&even.len()), "{}", even.len());
    for fast in [false, true] {
        let (leaves, pieces, _) = walk(true, fast);
        assert_eq!((leaves, pieces), (512 * even.len() as u64, 512 * even.len() as u64), "fast: {fast}");
    }
    // Read-only pages, every second of which is odd.
    let entries: Vec<u8> = (0..512_u64).flat_map(|page| ((RAM + (page << 12)) | 1).to_le_bytes()).collect();
    memory.write_slice(&entries, GuestAddress(even[0])).unwrap();
    for fast in [false, true] {
        let (leaves, pieces, _) = walk(true, fast);
        assert_eq!((leaves, pieces), (512 * even.len() as u64 - 256, 512 * even.len() as u64 - 256), "fast: {fast}");
    }
}

/// A format whose tables are smaller than what their addresses are multiples of: page tables of 2 KiB, each at the beginning of a page.
fn apart() -> Altered {
    let geometry = |mut geometry: Geometry| {
        let at = geometry.levels.iter().position(|level| level.index_lsb == 20).unwrap();
        for shape in geometry.levels[at].shapes.iter_mut().filter(|shape| shape.value == 0) {
            assert_eq!(shape.address, [Segment { entry_lsb: 11, address_lsb: 11, width: 53 }]);
            shape.address = vec![Segment { entry_lsb: 12, address_lsb: 12, width: 52 }];
        }
        geometry
    };
    let decode: Decode = |format, level, inherited, pattern| format.decode(level, inherited, pattern);
    let decode_entry: Decode = |format, level, inherited, entry| format.decode_entry(level, inherited, entry);
    Altered { format: open(("s390-zpci/dma", &[]), &[]), geometry, decode, decode_entry }
}

/// Tables with leaves in a few lines, in all of them, and in a few others, and tables that are smaller than their room, one after the other in the same memory.
#[test]
fn memory_that_was_used_before_holds_nothing_of_that() {
    type Target = (&'static str, fn() -> Box<dyn Format>);
    type Has = fn(u64) -> bool;
    let targets: [Target; 4] = [
        ("VT-d", || open(("intel-vtd/second-stage", &[]), &[])),
        ("AMD", || open(("amd-vi/v1", &[]), &[])),
        ("apart", || Box::new(apart())),
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
