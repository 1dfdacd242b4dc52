//! Plugins judge patterns, never entries: the number of calls is the same for 512 mappings and for a quarter of a million.
#![allow(clippy::unwrap_used)]

mod fixtures;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use stagecraft::convert::{Target, convert};
use stagecraft::guest::{Guest, State};
use stagecraft::memory::{Budget, Limits, MemoryMap};
use stagecraft::plugin::{Config, Engine, PluginFormat, Plugins, TableConfig};
use stagecraft::snapshot::Snapshot;
use stagecraft::table::{Arena, Builder, Collector, Encoded, Finding, Format, FormatError, Geometry, Meaning, Piece, Table};
use stagecraft::{Attributes, Span};
use stagecraft_tests::reference::{self, bit, bits};

const SOURCE: &str = "arm-smmuv3/stage1";
const TARGET: &str = "intel-vtd/first-stage";

/// Fewer than this many calls for a whole conversion.
const DOZENS: u64 = 100;

fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())
}

/// A plugin's format that tells how often the plugin was called.
struct Counted {
    format: PluginFormat,
    calls: Arc<AtomicU64>,
}

impl Counted {
    fn open(plugins: &Plugins, config: &TableConfig) -> (Box<Self>, Arc<AtomicU64>) {
        let format = plugins.by_format(&config.format).unwrap().open(config).unwrap();
        let calls = Arc::new(AtomicU64::new(format.calls()));
        (Box::new(Self { format, calls: Arc::clone(&calls) }), calls)
    }

    fn ask<R>(&mut self, question: impl FnOnce(&mut PluginFormat) -> R) -> R {
        let answer = question(&mut self.format);
        self.calls.store(self.format.calls(), Ordering::Relaxed);
        answer
    }
}

impl Format for Counted {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        self.ask(Format::geometry)
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        self.ask(|format| format.decode(level, inherited, pattern))
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        self.ask(|format| format.decode_entry(level, inherited, entry))
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        self.ask(|format| format.explain(level, inherited, pattern))
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        self.ask(|format| format.encode_leaf(level, size_log2, attributes))
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        self.ask(|format| format.encode_table(level, next))
    }
}

/// `count` pages to addresses all over the place, read-only and writable by turns, in tables of [`SOURCE`]; as many slots are empty. The last page is far
/// from the others, so that tables of every level have empty slots however many pages there are.
fn source(plugins: &Plugins, arena: &mut Arena, count: u64) -> TableConfig {
    let format = plugins.by_format(SOURCE).unwrap().open(&TableConfig::new(SOURCE, &[])).unwrap();
    let mut builder = Builder::new(Box::new(format), arena).unwrap();
    let common = Attributes::READ.with(Attributes::COHERENT).with(Attributes::ACCESSED);
    for index in 0..count {
        let attributes = if index % 3 == 0 { common } else { common.with(Attributes::WRITE) };
        let address = 0x10_0000_0000 + ((index * 0x9e37_79b1 % (1 << 24)) << 12);
        let first = if index == count - 1 { 1 << 40 } else { index << 13 };
        builder.map(&Piece { iova: Span::of_log2(first, 12), address, attributes }).unwrap();
    }
    let built = builder.finish().unwrap();
    assert_eq!(built.leaves, count);
    let roots: Vec<(&str, u64)> = built.roots.iter().map(|(name, root)| (name.as_str(), root.0)).collect();
    TableConfig::new(SOURCE, &roots)
}

/// Converts `count` pages: calls of the source's plugin and of the target's.
fn conversion(plugins: &Plugins, count: u64) -> (u64, u64) {
    let mut memory = Arena::new(1 << 32, 64 << 20);
    let (format, source_calls) = Counted::open(plugins, &source(plugins, &mut memory, count));
    let mut table = Table::open(format).unwrap();
    let (format, target_calls) = Counted::open(plugins, &TableConfig::new(TARGET, &[]));
    let mut arena = Arena::new(1 << 33, 64 << 20);
    let mut builder = Builder::new(format, &mut arena).unwrap();
    let limits = Limits { leaves: 1 << 20, ..Limits::default() };
    table.walk(&memory, &MemoryMap::everything(48), Span::ALL, &Budget::new(limits), &mut builder).unwrap();
    let built = builder.finish().unwrap();
    assert_eq!((built.leaves, built.losses.refused_bytes()), (count, 0));
    let calls = (source_calls.load(Ordering::Relaxed), target_calls.load(Ordering::Relaxed));
    // Opening is two calls, whose answers are kept; every question is one.
    assert_eq!(calls, (2 + table.questions(), 2 + built.questions));
    calls
}

#[test]
fn calls_do_not_depend_on_the_number_of_entries() {
    let plugins = plugins();
    let counts = [512, 4096, 65_536, 262_144].map(|count| conversion(plugins, count));
    println!("calls of the source's and of the target's plugin: {counts:?}");
    assert!(counts.iter().all(|calls| *calls == counts[0]), "{counts:?}");
    assert!(counts[0].0 + counts[0].1 < DOZENS && counts[0].0 > 2 && counts[0].1 > 2, "{counts:?}");
}

/// The count is one of questions that were really asked: a walk by one that asks for every entry would be told apart.
#[test]
fn every_pattern_more_is_a_call_more() {
    let plugins = plugins();
    let walk = |patterns: u64| {
        let mut memory = Arena::new(1 << 32, 4 << 20);
        let mut config = source(plugins, &mut memory, 512);
        config.settings.set("hardware-access", 1);
        let (format, calls) = Counted::open(plugins, &config);
        let mut table = Table::open(format).unwrap();
        // Bits 58:55 of a leaf are the guest's own.
        let memory = Marked { memory: &memory, patterns };
        table.walk(&memory, &MemoryMap::everything(48), Span::ALL, &Budget::new(Limits::default()), &mut Collector::new(false, 0)).unwrap();
        calls.load(Ordering::Relaxed)
    };
    let one = walk(1);
    // Two kinds of leaf, each with sixteen marks instead of one.
    assert_eq!(walk(16), one + 2 * 15);
}

/// Leaves of the last level with marks of the guest.
struct Marked<'a> {
    memory: &'a Arena,
    patterns: u64,
}

impl stagecraft::memory::EntryMemory for Marked<'_> {
    fn read_entries(
        &self,
        address: stagecraft::Gpa,
        layout: stagecraft::memory::EntryLayout,
        entries: &mut [u64],
    ) -> Result<(), stagecraft::memory::ReadError> {
        self.memory.read_entries(address, layout, entries)?;
        for (index, entry) in entries.iter_mut().enumerate() {
            // Only leaves have an access flag.
            if *entry & 1 << 10 != 0 {
                *entry |= (index as u64 / 2 % self.patterns) << 55;
            }
        }
        Ok(())
    }
}

/// How many different entries the guest's pages hold whose size is coded in the address: a plugin is asked for each of them once, because what such an entry
/// means is not in its pattern. They are read from the pages, without any walk: AMD-Vi's NextLevel 7 (48882 section 2.2.3), and RISC-V's N (Svnapot).
fn entries_with_sizes(snapshot: &reference::snapshot::Snapshot, format: &str) -> u64 {
    let coded = |entry: u64| match format {
        "amd-vi/v1" => bit(entry, 0) && bits(entry, 11, 9) == 7,
        "riscv-iommu/first-stage" | "riscv-iommu/second-stage" => bit(entry, 0) && bit(entry, 63),
        _ => false,
    };
    let words = snapshot.memory.pages.keys().flat_map(|page| (0..512).map(move |index| page + index * 8));
    let entries: BTreeSet<u64> = words.map(|word| snapshot.memory.read(word, false).unwrap()).filter(|entry| coded(*entry)).collect();
    entries.len() as u64
}

/// Dozens of calls, and one more for each different entry that has its size in the address.
#[test]
fn real_guests_take_dozens_of_calls() {
    let plugins = plugins();
    for fixture in fixtures::all() {
        let naive = reference::snapshot::Snapshot::load(&fixture.path).unwrap();
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, plugins).unwrap();
        let streams = guest.streams().unwrap();
        for stream in &streams {
            let State::Translated(configs) = &stream.state else { continue };
            let mut space = guest.open(configs).unwrap();
            guest.collect(&mut space, 0).unwrap();
            let sizes: u64 = configs.iter().map(|config| entries_with_sizes(&naive, &config.format)).sum();
            println!("{}: {} questions, {sizes} entries with their size in the address", fixture.name, space.questions());
            assert!(space.questions() < DOZENS + sizes, "{}: {} questions, {sizes} such entries", fixture.name, space.questions());
        }
        let conversion = convert(&guest, &streams, &Target::new(TARGET), &mut |_, _| {}).unwrap();
        for table in &conversion.tables {
            assert!(table.built.questions < DOZENS, "{}: {} questions for {} leaves", fixture.name, table.built.questions, table.source_leaves);
        }
    }
}
