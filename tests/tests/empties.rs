//! Tables of every format whose unused slots lead to tables with nothing in them, which they share: what is mapped is what it was, and each table costs once.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run; a failure names its seed.
#![allow(clippy::unwrap_used)]

mod configs;

use std::cell::RefCell;
use std::collections::BTreeMap;

use stagecraft::guest::Guest;
use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Limits, MemoryMap, ReadError};
use stagecraft::plugin::TableConfig;
use stagecraft::table::{AddressSpace, Arena, Builder, Collector, FaultAt, Mapping, Piece, Step, Table, Visitor, WalkError};
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference;
use stagecraft_tests::reference::generate::{Format, Options, Rng, generate_with, share_empty_tables};
use stagecraft_tests::reference::snapshot::{Memory, Page};
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::walk::Walker;

fn runs(mappings: &[Mapping]) -> Vec<reference::Run> {
    let run = |mapping: &Mapping| reference::Run {
        iova: mapping.iova.first,
        address: mapping.address,
        size: mapping.iova.length_minus_one() + 1,
        access: reference::Access { read: mapping.access.read, write: mapping.access.write },
    };
    mappings.iter().map(run).collect()
}

#[test]
fn what_is_mapped_is_what_it_was() {
    let seeds: u64 = std::env::var("STAGECRAFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(16);
    let folder = tempfile::tempdir().unwrap();
    for format in Format::ALL {
        let (mut shared, mut mapped, mut built) = (0, 0, 0);
        for seed in 0..seeds {
            let mut rng = Rng::new(seed ^ 0xe3b7);
            let mut generated = generate_with(format, seed, Options::default());
            let plain = generated.clone();
            let percent = rng.pick(&[100, 100, 90, 30]);
            let what = format!("{format:?} seed {seed}, {percent} percent: {:?}", generated.config);
            let filled = share_empty_tables(&mut generated, &mut rng, percent);
            shared += filled;
            // The naive walk, which was told of such tables for itself, and what was written.
            let stages = [generated.config];
            let naive = Walker::new(&generated.snapshot.memory, &stages).unwrap().walk();
            assert!(!naive.exhausted && naive.runs == generated.truth, "{what}: the naive walk");
            let snapshot = configs::load(&generated.snapshot, folder.path());
            let guest = Guest::new(&snapshot, configs::plugins()).unwrap();
            // Limits for a guest of so few pages.
            let mut space = guest.open(&[configs::plugin_config(&generated.config)]).unwrap();
            let collected = guest.collect(&mut space, 10).unwrap();
            assert_eq!(collected.stopped, None, "{what}");
            assert!(runs(collected.collector.mappings()) == generated.truth, "{what}: the walk");
            mapped += generated.truth.len();
            // The way of runs, and of pages in passing, is another one.
            let one = converted(&generated.config, &plain.snapshot.memory);
            let other = converted(&generated.config, &generated.snapshot.memory);
            assert!(one == other, "{what}: converted");
            built += one.0.len();
        }
        println!("{format:?}: {shared} slots share tables, {mapped} runs, {built} pages of tables built");
        // An s390 entry that is absent has its own bit for that, and is not zero: it is not taken for one that is free.
        assert!(
            (shared > 100 * seeds || format == Format::S390) && mapped as u64 > seeds && built > 0,
            "{format:?}: {shared} slots, {mapped} runs, {built} pages"
        );
    }
}

/// The tables that a conversion writes, and what it refuses.
fn converted(config: &tables::TableConfig, memory: &Memory) -> (Vec<(Gpa, Vec<u64>)>, u128) {
    let settings = [("granule", 4096), ("input-bits", 48), ("output-bits", 48), ("input-bits-high", 48)];
    let target = TableConfig::new("arm-smmuv3/stage1", &settings);
    let mut arena = Arena::new(1 << 28, 1 << 28);
    let format = configs::plugins().by_format(&target.format).unwrap().open(&target).unwrap();
    let mut builder = Builder::new(Box::new(format), &mut arena).unwrap();
    let pages = Limits::for_pages(memory.pages.len() as u64);
    open(&configs::plugin_config(config))
        .walk(&configs::View(memory), &MemoryMap::everything(64), Span::ALL, &Budget::new(pages), &mut builder)
        .unwrap();
    let refused = builder.finish().unwrap().losses.refused_bytes();
    (arena.pages().map(|(address, words)| (address, words.to_vec())).collect(), refused)
}

fn open(config: &TableConfig) -> Table {
    Table::open(Box::new(configs::plugins().by_format(&config.format).unwrap().open(config).unwrap())).unwrap()
}

/// Memory that remembers which entries were read.
#[derive(Default)]
struct Pages {
    pages: BTreeMap<u64, Page>,
    read: RefCell<BTreeMap<u64, u64>>,
}

impl Pages {
    /// Fills a table of 512 entries.
    fn fill(&mut self, table: u64, entry: u64) {
        self.pages.insert(table, Page::zeroed());
        (0..512).for_each(|index| self.put(table, index, entry));
    }

    fn put(&mut self, table: u64, index: u64, entry: u64) {
        self.pages.entry(table).or_insert_with(Page::zeroed)[index as usize * 8..][..8].copy_from_slice(&entry.to_le_bytes());
    }
}

impl EntryMemory for Pages {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        assert_eq!(layout.bytes, 8);
        for (place, entry) in (address.0..).step_by(8).zip(entries) {
            let page = self.pages.get(&(place & !0xfff)).ok_or(ReadError(Gpa(place)))?;
            *entry = u64::from_le_bytes(page[(place & 0xfff) as usize..][..8].try_into().unwrap());
            *self.read.borrow_mut().entry(place).or_insert(0) += 1;
        }
        Ok(())
    }
}

/// What a walk found, and how many tables it was charged for.
fn walk(config: &TableConfig, memory: &Pages, span: Span, limits: Limits) -> Result<(Vec<Mapping>, u64, Vec<Span>), WalkError> {
    memory.read.borrow_mut().clear();
    let (budget, mut seen) = (Budget::new(limits), Seen { collector: Collector::new(false, 0), absent: Vec::new() });
    open(config).walk(memory, &MemoryMap::everything(48), span, &budget, &mut seen)?;
    Ok((seen.collector.into_mappings(), budget.tables_visited(), seen.absent))
}

/// Also hears where nothing is mapped.
struct Seen {
    collector: Collector,
    absent: Vec<Span>,
}

impl Visitor for Seen {
    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        self.collector.piece(piece, path)
    }

    fn absent(&mut self, span: Span, _: &[Step]) -> Result<(), WalkError> {
        if let Some(last) = self.absent.last_mut().filter(|last| last.last + 1 == span.first) {
            last.last = span.last;
            return Ok(());
        }
        self.absent.push(span);
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.collector.fault(fault)
    }
}

/// Every table is read once, and charged once, and all that is not mapped is told as such.
#[test]
fn each_table_costs_once() {
    for seed in 0..24 {
        let mut rng = Rng::new(seed);
        let plain = Options { clusters: 8, decoys: false, ..Options::default() };
        let mut generated = generate_with(Format::LoongArch, seed, plain);
        share_empty_tables(&mut generated, &mut rng, 100);
        let tables::TableConfig::LoongArch(config) = generated.config else { unreachable!() };
        let memory = Pages { pages: generated.snapshot.memory.pages, ..Pages::default() };
        let all = memory.pages.len() as u64 * 4096 / config.granule;
        let (mappings, visited, absent) = walk(&configs::plugin_config(&generated.config), &memory, Span::ALL, Limits::for_pages(all)).unwrap();
        assert!(runs(&mappings) == generated.truth, "seed {seed}");
        // A half of which the table has more than the IOVAs have bits is read in part, and with it tables that only the rest leads to.
        let held = config.granule.trailing_zeros() + (config.granule.trailing_zeros() - 3) * config.levels;
        assert!(visited == all || visited < all && config.input_bits < held, "seed {seed}: {visited} of {all} tables: {config:?}");
        assert!(memory.read.borrow().values().all(|times| *times == 1), "seed {seed}: an entry is read twice");
        let mut next = 0;
        for span in absent {
            assert!(span.first >= next && !mappings.iter().any(|mapping| mapping.iova.intersection(span).is_some()), "seed {seed}: {span}");
            next = span.last.saturating_add(1);
        }
    }
}

const BASE: u64 = 0x4000_0000;

/// AMD's entry that points to a table of `level`, or is a page for level 0 (48882 section 2.2.3): present, level, read and write.
const fn amd(address: u64, level: u64) -> u64 {
    address | 1 | level << 9 | 3 << 61
}

fn amd_config() -> TableConfig {
    TableConfig::new("amd-vi/v1", &[("levels", 6), ("root", BASE)])
}

/// Six levels of full tables, each of one table over and over: 2^54 pages, none of which is mapped. One page at the very end, and it is no longer nothing.
#[test]
fn six_levels_of_tables_that_lead_to_nothing() {
    let mut memory = Pages::default();
    let table = |level: u64| BASE + (6 - level) * 0x1000;
    for level in 2..=6 {
        memory.fill(table(level), amd(table(level - 1), level - 1));
    }
    memory.fill(table(1), 0);
    let (mappings, visited, absent) = walk(&amd_config(), &memory, Span::ALL, Limits::for_pages(6)).unwrap();
    assert_eq!((mappings, visited), (Vec::new(), 6));
    assert_eq!(absent, [Span::ALL]);
    assert!(memory.read.borrow().values().all(|times| *times == 1));
    // A page in the first table of the top level alone: each table is there twice.
    let mut mapped = Pages { pages: memory.pages.clone(), ..Pages::default() };
    for level in 2..=6 {
        let (own, below) = (table(level) + 0x10_0000, table(level - 1) + 0x10_0000);
        mapped.fill(own, amd(table(level - 1), level - 1));
        mapped.put(if level == 6 { table(6) } else { own }, 100, amd(below, level - 1));
    }
    mapped.put(table(1) + 0x10_0000, 7, amd(0x5000, 0));
    let (mappings, visited, _) = walk(&amd_config(), &mapped, Span::ALL, Limits::for_pages(6)).unwrap();
    let iova = (1..6).fold(0, |iova, level| iova | 100 << (12 + 9 * level)) | 7 << 12;
    assert_eq!(mappings.iter().map(|mapping| (mapping.iova.first, mapping.address)).collect::<Vec<_>>(), [(iova, 0x5000)]);
    assert_eq!(visited, 11);
    memory.put(table(1), 511, amd(0x5000, 0));
    let limits = Limits::for_pages(6);
    let ended = walk(&amd_config(), &memory, Span::ALL, limits).unwrap_err();
    assert_eq!(ended.to_string(), format!("stopped by budget: more than {} tables visited", limits.tables));
}

/// A table with an entry that points to the table is not empty: at the next level the same entry is a fault, at the last one a page or nothing, and each is what
/// is found.
#[test]
fn loops_are_what_is_found_in_them() {
    let mut memory = Pages::default();
    memory.fill(BASE, amd(BASE, 5));
    let limits = Limits::for_pages(1);
    let (mappings, visited, absent) = walk(&amd_config(), &memory, Span::ALL, limits).unwrap_or_else(|error| {
        assert!(error.to_string().starts_with("stopped by budget: more than "), "{error}");
        (Vec::new(), limits.tables, Vec::new())
    });
    assert!(mappings.is_empty() && absent.is_empty(), "faults are no absent entries: {absent:?}");
    assert_eq!(visited, limits.tables.min(513));
    // Without a valid bit a pointer has no bits but the address, and is no page at the last level: this loop leads to nothing at all.
    memory.fill(BASE, BASE);
    let config = TableConfig::new("loongarch/paging", &[("granule", 4096), ("levels", 4), ("root", BASE)]);
    assert_eq!(walk(&config, &memory, Span::ALL, limits).unwrap().1, 4);
    // One entry that is a page at the last level: there are 511 to the third of them.
    memory.put(BASE, 9, BASE | 0x19f);
    let ended = walk(&config, &memory, Span::ALL, limits).unwrap_err();
    assert_eq!(ended.to_string(), format!("stopped by budget: more than {} tables visited", limits.tables));
}

/// Of a table that was walked in part, nothing is known: here the upper half of it, in which there is nothing, comes first.
#[test]
fn a_part_without_anything_is_no_empty_table() {
    let mut memory = Pages::default();
    let config = TableConfig::new("amd-vi/v1", &[("levels", 2), ("root", BASE)]);
    memory.put(BASE, 0, amd(BASE + 0x1000, 1));
    memory.put(BASE, 1, amd(BASE + 0x1000, 1));
    memory.put(BASE, 2, amd(BASE + 0x1000, 1));
    memory.put(BASE + 0x1000, 3, amd(0x5000, 0));
    let page = |iova: u64, address: u64| (iova, address);
    let found = |first: u64, last: u64| {
        let mappings = walk(&config, &memory, Span { first, last }, Limits::for_pages(2)).unwrap().0;
        mappings.iter().map(|mapping| page(mapping.iova.first, mapping.address)).collect::<Vec<_>>()
    };
    assert_eq!(found(0x10_0000, 0x3f_ffff), [page(0x20_3000, 0x5000)]);
    assert_eq!(found(0x20_4000, u64::MAX), [page(0x40_3000, 0x5000)]);
    assert_eq!(found(0, 0x20_2fff), [page(0x3000, 0x5000)]);
    let mut table = open(&config);
    // And from one walk to the next nothing is remembered.
    let mut walk_again = |memory: &Pages| {
        let mut collector = Collector::new(false, 0);
        table.walk(memory, &MemoryMap::everything(48), Span::ALL, &Budget::new(Limits::default()), &mut collector).unwrap();
        collector.into_mappings().len()
    };
    let mut other = Pages { pages: memory.pages.clone(), ..Pages::default() };
    other.put(BASE + 0x1000, 3, 0);
    assert_eq!((walk_again(&other), walk_again(&memory), walk_again(&other)), (0, 3, 0));
}

/// The same with the tables behind a second stage, which has empty tables as well.
#[test]
fn behind_a_second_stage() {
    let (first, second) = (TableConfig::new("loongarch/paging", &[("granule", 4096), ("levels", 3), ("root", BASE)]), amd_config());
    let mut memory = Pages::default();
    let empty = |level: u64| BASE + 0x10_0000 + level * 0x1000;
    // The first stage: the root, a directory and a table with one page, and what all other slots lead to.
    memory.fill(BASE, empty(1));
    memory.fill(BASE + 0x1000, empty(0));
    memory.fill(BASE + 0x2000, 0);
    memory.fill(empty(1), empty(0));
    memory.fill(empty(0), 0);
    memory.put(BASE, 5, BASE + 0x1000);
    memory.put(BASE + 0x1000, 6, BASE + 0x2000);
    memory.put(BASE + 0x2000, 7, 0x4000_5000 | 0x19f);
    // The second: the first 4 GiB, by huge pages of 1 GiB, as they are. Its other slots lead to tables with nothing in them.
    let outer = |level: u64| 0x8000_0000 + level * 0x1000;
    let nothing = |level: u64| 0x8010_0000 + level * 0x1000;
    for level in 1..=6 {
        memory.fill(nothing(level), if level == 1 { 0 } else { amd(nothing(level - 1), level - 1) });
        if level >= 3 {
            memory.fill(outer(level), amd(nothing(level - 1), level - 1));
            memory.put(outer(level), 0, if level == 3 { amd(0, 0) } else { amd(outer(level - 1), level - 1) });
        }
    }
    for gigabyte in 1..4 {
        memory.put(outer(3), gigabyte, amd(gigabyte << 30, 0));
    }
    let second = TableConfig { settings: TableConfig::new(&second.format, &[("levels", 6), ("root", outer(6))]).settings, ..second };
    let mut space = AddressSpace::nested(open(&first), open(&second));
    let (budget, mut collector) = (Budget::new(Limits::for_pages(5)), Collector::new(false, 10));
    space.walk(&memory, &MemoryMap::everything(48), Span::ALL, &budget, &mut collector).unwrap();
    let mappings = collector.into_mappings();
    assert_eq!(
        mappings.iter().map(|mapping| (mapping.iova.first, mapping.address)).collect::<Vec<_>>(),
        [(5 << 30 | 6 << 21 | 7 << 12, 0x4000_5000)]
    );
    assert_eq!(budget.tables_visited(), 5);
}
