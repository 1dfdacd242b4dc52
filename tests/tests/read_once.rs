//! A table entry is never read twice: a memory that changes after every read proves it.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use stagecraft::device::Unit;
use stagecraft::memory::{Budget, Limits, MemoryMap, VmMemory};
use stagecraft::plugin::{Config, Engine, Outcome, Plugins, Requester, TableConfig, Translated};
use stagecraft::table::{AddressSpace, Arena, Builder, Collector, Mapping, Piece, Table};
use stagecraft::{Access, Attributes, Iova, Span};
use stagecraft_tests::reference::generate::Format;
use stagecraft_tests::reference::snapshot::{Memory, Snapshot};
use stagecraft_tests::reference::units;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as MemoryResult;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress,
    MmapRegion, VolatileMemory, VolatileSlice,
};

/// What was handed out of a memory, and what happens to it afterwards.
#[derive(Debug, Default)]
struct Log {
    /// Every range: first address and length.
    given: Vec<(u64, u64)>,
    /// The range that was given out last and has not changed yet.
    pending: Option<(u64, u64)>,
    /// What handed-out words become; none: they stay.
    poison: Option<u64>,
}

/// Some pages side by side, which remember who looked.
#[derive(Debug)]
struct Page {
    start: u64,
    bytes: MmapRegion,
    log: Arc<Mutex<Log>>,
}

impl GuestMemoryRegion for Page {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.bytes.size() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> MemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
        if offset.0 + count as u64 > self.len() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let address = self.start + offset.0;
        let mut log = self.log.lock().unwrap();
        log.given.push((address, count as u64));
        log.pending = Some((address, count as u64));
        Ok(self.bytes.get_slice(offset.0 as usize, count)?)
    }
}

impl GuestMemoryRegionBytes for Page {}

/// A guest that writes over everything as soon as it was read.
#[derive(Clone, Debug)]
struct Restless {
    pages: Arc<Vec<Page>>,
    log: Arc<Mutex<Log>>,
}

impl GuestMemoryBackend for Restless {
    type R = Page;

    fn iter(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    /// Every look at memory begins here: what was given out before changes now.
    fn find_region(&self, address: GuestAddress) -> Option<&Page> {
        self.change();
        self.pages.iter().find(|page| address.0 >= page.start && address.0 - page.start < page.len())
    }
}

impl Restless {
    fn new(pages: impl IntoIterator<Item = (u64, Vec<u8>)>, poison: Option<u64>) -> Self {
        let log = Arc::new(Mutex::new(Log { poison, ..Log::default() }));
        let page = |(start, content): (u64, Vec<u8>)| {
            let bytes = MmapRegion::new(content.len()).unwrap();
            bytes.as_volatile_slice().write_slice(&content, 0).unwrap();
            Page { start, bytes, log: Arc::clone(&log) }
        };
        Self { pages: Arc::new(pages.into_iter().map(page).collect()), log: Arc::clone(&log) }
    }

    fn change(&self) {
        let mut log = self.log.lock().unwrap();
        let (Some((address, length)), Some(poison)) = (log.pending.take(), log.poison) else { return };
        let page = self.pages.iter().find(|page| address >= page.start && address - page.start < page.len()).unwrap();
        for word in (address..address + length).step_by(8) {
            page.bytes.as_volatile_slice().write_obj(poison, (word - page.start) as usize).unwrap();
        }
    }

    /// The number of ranges that were given out; none of them overlaps another.
    fn assert_read_once(&self, what: &str) -> usize {
        let mut given = self.log.lock().unwrap().given.clone();
        given.sort_unstable();
        for pair in given.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{what}: {:#x?} and {:#x?} were both read", pair[0], pair[1]);
        }
        given.len()
    }
}

fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())
}

const RW: Attributes = Attributes::READ.with(Attributes::WRITE);
/// Where every handed-out leaf points once it was read.
const EVIL: u64 = 0x6_6666_6000;

/// Each format, and a leaf of one page to [`EVIL`] that everybody may write.
fn formats() -> [(&'static str, u64); 4] {
    [
        ("arm-smmuv3/stage1", 0x743 | EVIL),
        ("arm-smmuv3/stage2", 0x7ff | EVIL),
        ("intel-vtd/first-stage", 0x67 | EVIL),
        ("intel-vtd/second-stage", 0x3 | EVIL),
    ]
}

/// A table with pages, large pages and holes, and what it maps.
fn source(plugins: &Plugins, format: &str, poison: Option<u64>) -> (TableConfig, Restless, Vec<Mapping>) {
    let plugin = plugins.by_format(format).unwrap();
    let mut arena = Arena::new(1 << 32, 16 << 20);
    let mut builder = Builder::new(Box::new(plugin.open(&TableConfig::new(format, &[])).unwrap()), &mut arena).unwrap();
    let attributes = RW.with(Attributes::COHERENT).with(Attributes::ACCESSED).with(Attributes::DIRTY);
    let mut mapped: Vec<Mapping> = Vec::new();
    for index in 0..3000_u64 {
        // Scattered pages with a hole now and then, then 2 MiB and 1 GiB pages.
        let (first, size, address) = match index {
            0..2900 if index % 7 == 3 => continue,
            0..2900 => (0x4000_0000 + (index << 12), 12, 0x8000_0000 + ((index * 37 % 4096) << 12)),
            2900..2990 => (0x1_0000_0000 + ((index - 2900) << 22), 21, 0x10_0000_0000 + ((index * 5 % 512) << 21)),
            _ => (0x100_0000_0000 + ((index - 2990) << 31), 30, 0x200_0000_0000 + ((index * 3 % 64) << 30)),
        };
        let iova = Span::of_log2(first, size);
        builder.map(&Piece { iova, address, attributes }).unwrap();
        let access = Access { read: true, write: true };
        match mapped.last_mut() {
            Some(last) if last.iova.last + 1 == iova.first && last.address + last.iova.length_minus_one() + 1 == address => {
                last.iova.last = iova.last;
            }
            _ => mapped.push(Mapping { iova, address, access }),
        }
    }
    let built = builder.finish().unwrap();
    let roots: Vec<(&str, u64)> = built.roots.iter().map(|(name, root)| (name.as_str(), root.0)).collect();
    let pages: Vec<(u64, Vec<u8>)> =
        arena.pages().map(|(address, words)| (address.0, words.iter().flat_map(|word| word.to_ne_bytes()).collect())).collect();
    assert!(pages.len() > 8, "{format}: {} tables", pages.len());
    (TableConfig::new(format, &roots), Restless::new(pages, poison), mapped)
}

fn open(plugins: &Plugins, config: &TableConfig) -> Table {
    Table::open(Box::new(plugins.by_format(&config.format).unwrap().open(config).unwrap())).unwrap()
}

fn budget() -> Budget {
    Budget::new(Limits::default())
}

#[test]
fn the_memory_changes_what_was_read() {
    let plugins = plugins();
    for (format, poison) in formats() {
        let (config, memory, mapped) = source(plugins, format, Some(poison));
        let walk = || {
            let mut collector = Collector::new(false, 10);
            open(plugins, &config).walk(&VmMemory(&memory), &MemoryMap::everything(48), Span::ALL, &budget(), &mut collector).unwrap();
            collector.into_mappings()
        };
        assert_eq!(walk(), mapped, "{format}");
        // The second walk sees what the first left behind: this test memory is not a constant one.
        assert_ne!(walk(), mapped, "{format}");
    }
}

#[test]
fn a_walk_reads_every_entry_once() {
    let plugins = plugins();
    for (format, poison) in formats() {
        let (config, memory, mapped) = source(plugins, format, Some(poison));
        let mut collector = Collector::new(false, 10);
        open(plugins, &config).walk(&VmMemory(&memory), &MemoryMap::everything(48), Span::ALL, &budget(), &mut collector).unwrap();
        assert_eq!(collector.mappings(), mapped, "{format}");
        assert_eq!(collector.faults(), [], "{format}");
        // VT-d's first stage shares one table between two halves, each of which is read for itself.
        let roots = if format == "intel-vtd/first-stage" { 2 } else { 1 };
        assert_eq!(memory.assert_read_once(format), memory.pages.len() + roots - 1, "{format}");
    }
}

#[test]
fn what_is_built_is_what_was_read_first() {
    let plugins = plugins();
    for (format, poison) in formats() {
        for (target, _) in formats() {
            let (config, memory, mapped) = source(plugins, format, Some(poison));
            let mut arena = Arena::new(1 << 33, 16 << 20);
            let plugin = plugins.by_format(target).unwrap();
            let mut builder = Builder::new(Box::new(plugin.open(&TableConfig::new(target, &[])).unwrap()), &mut arena).unwrap();
            open(plugins, &config).walk(&VmMemory(&memory), &MemoryMap::everything(48), Span::ALL, &budget(), &mut builder).unwrap();
            let built = builder.finish().unwrap();
            memory.assert_read_once(format);
            let roots: Vec<(&str, u64)> = built.roots.iter().map(|(name, root)| (name.as_str(), root.0)).collect();
            let mut collector = Collector::new(false, 10);
            let mut table = open(plugins, &TableConfig::new(target, &roots));
            table.walk(&arena, &MemoryMap::everything(48), Span::ALL, &budget(), &mut collector).unwrap();
            assert_eq!(collector.mappings(), mapped, "{format} to {target}");
        }
    }
}

#[test]
fn a_translation_reads_one_entry_of_each_level() {
    let plugins = plugins();
    for (format, poison) in formats() {
        for (iova, levels) in [(0x4000_0000_u64, 4), (0x1_0000_0123, 3), (0x100_0000_4567, 2), (0x7000_0000_0000, 1)] {
            let (config, memory, mapped) = source(plugins, format, Some(poison));
            let mut space = AddressSpace::single(open(plugins, &config));
            let found = space.translate(&VmMemory(&memory), &MemoryMap::everything(48), Iova(iova), Access::WRITE, &budget()).unwrap();
            let expected = mapped.iter().find(|mapping| mapping.iova.contains(iova)).map(|mapping| mapping.address + (iova - mapping.iova.first));
            assert_eq!(found.ok().map(|found| found.address.0), expected, "{format} {iova:#x}");
            assert_eq!(memory.assert_read_once(format), levels, "{format} {iova:#x}");
            assert!(memory.log.lock().unwrap().given.iter().all(|(_, length)| *length == 8), "{format}");
        }
    }
}

fn restless(memory: &Memory) -> Restless {
    Restless::new(memory.pages.iter().map(|(page, content)| (*page, content.to_vec())), Some(0x5a5a_5a5a_5a5a_5a5a))
}

/// Looks a stream up in a guest that changes every structure once it was read, and in one that does not.
fn lookup(plugins: &Plugins, snapshot: &Snapshot, requester: Requester, reads: usize) {
    let map = Arc::new(MemoryMap::everything(52));
    let registers: Vec<(String, u64)> = snapshot.registers.iter().map(|(name, value)| (name.clone(), *value)).collect();
    let plugin = plugins.by_unit(&snapshot.unit_kind).unwrap();
    let look = |memory: Restless| {
        Unit::new(plugin.clone(), &snapshot.unit_kind, registers.clone(), memory, Arc::clone(&map), Limits::default()).lookup(requester)
    };
    let still = restless(&snapshot.memory);
    still.log.lock().unwrap().poison = None;
    let expected = look(still).unwrap();
    assert!(matches!(&expected.value, Outcome::Tables(Translated { tables, .. }) if !tables.is_empty()), "{expected:?}");
    let memory = restless(&snapshot.memory);
    assert_eq!(look(memory.clone()).unwrap(), expected);
    assert_eq!(memory.assert_read_once(&snapshot.unit_kind), reads, "{:x?}", memory.log.lock().unwrap().given);
}

#[test]
fn device_structures_are_read_once() {
    let plugins = plugins();
    for seed in 0..20 {
        for format in [Format::ArmStage1, Format::ArmStage2] {
            // Level 1 descriptor, stream table entry, and for stage 1 the context descriptor.
            let reads = if format == Format::ArmStage1 { 3 } else { 2 };
            lookup(plugins, &units::smmu_single(format, seed).0, Requester { id: 0x103, pasid: None }, reads);
        }
        // Root, context, PASID directory and PASID entry.
        lookup(plugins, &units::vtd_nested(seed).0, Requester { id: 0x5fe, pasid: None }, 4);
    }
}

/// With two stages the first stage's tables are read once. The second stage is looked up anew for each of its leaves and tables, as hardware without a
/// cache does: each time what was read is what is used.
#[test]
fn tables_behind_a_second_stage_are_read_once() {
    let plugins = plugins();
    for seed in 0..40 {
        let (Some((snapshot, nested)), (other, vtd)) = (units::smmu_nested(seed), units::vtd_nested(seed)) else { continue };
        for (snapshot, both, id) in [(snapshot, nested, 0x38), (other, vtd, 0x5fe)] {
            let map = Arc::new(MemoryMap::everything(52));
            let registers = snapshot.registers.iter().map(|(name, value)| (name.clone(), *value)).collect();
            let memory = restless(&snapshot.memory);
            memory.log.lock().unwrap().poison = None;
            let plugin = plugins.by_unit(&snapshot.unit_kind).unwrap();
            let unit = Unit::new(plugin, &snapshot.unit_kind, registers, memory.clone(), Arc::clone(&map), Limits::default());
            let Outcome::Tables(Translated { tables, .. }) = unit.lookup(Requester { id, pasid: None }).unwrap().value else { panic!("{seed}") };
            let mut space = AddressSpace::nested(open(plugins, &tables[0]), open(plugins, &tables[1]));
            memory.log.lock().unwrap().given.clear();
            let mut collector = Collector::new(false, 10);
            space.walk(&VmMemory(&memory), &map, Span::ALL, &budget(), &mut collector).unwrap();
            assert!(!collector.mappings().is_empty() || both.truth.is_empty(), "{seed}");
            // Decoys share tables with nobody, so that no table of the first stage is found twice; those of the second stage are elsewhere.
            let is_second = |address: u64| both.second.snapshot.memory.pages.contains_key(&(address & !0xfff));
            memory.log.lock().unwrap().given.retain(|(address, _)| !is_second(*address));
            assert!(memory.assert_read_once(&format!("seed {seed}")) > 0);
        }
    }
}

/// Ends the other thread, also when this one panics.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Entries are loaded whole: while another thread flips one between two values, a walk sees one or the other.
#[test]
fn a_flipping_entry_is_one_of_its_two_values() {
    let plugins = plugins();
    for (format, leaf) in formats() {
        // Their halves differ, so that half of one and half of the other would be a third.
        let attributes = leaf & !EVIL;
        let values = [0x0000_0011_2222_2000_u64, 0x0000_0044_5555_5000].map(|address| address | attributes);
        let table = 0x10_0000_0000_u64;
        // Four tables in a row, each of which leads to the next by its first entry.
        let word = |level: u64, index: u64| match (level, index) {
            (3, _) => values[0],
            (_, 0) => (table + (level + 1) * 4096) | attributes,
            _ => 0,
        };
        let pages = (0..4).map(|level| (table + level * 4096, (0..512).flat_map(|index| word(level, index).to_le_bytes()).collect()));
        let memory = Restless::new(pages, None);
        let config = TableConfig::new(format, &[("root", table)]);
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let (memory, done) = (&memory, &done);
            scope.spawn(move || {
                let slice = memory.pages[3].bytes.as_volatile_slice();
                let mut round = 0_usize;
                while !done.load(Ordering::Relaxed) {
                    for index in 0..512 {
                        slice.store(values[(round + index) % 2], index * 8, Ordering::Relaxed).unwrap();
                    }
                    round += 1;
                }
            });
            let _end = End(done);
            let mut opened = open(plugins, &config);
            let mut seen = [0_u64; 2];
            // Long enough that both threads run, whatever else the machine does.
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(400) || seen.contains(&0) {
                let mut collector = Collector::new(false, 10);
                let span = Span { first: 0, last: (512 << 12) - 1 };
                opened.walk(&VmMemory(memory), &MemoryMap::everything(48), span, &budget(), &mut collector).unwrap();
                for mapping in collector.mappings() {
                    // Pages are not contiguous, whichever values they have.
                    let which = [0x0000_0011_2222_2000, 0x0000_0044_5555_5000].iter().position(|address| *address == mapping.address);
                    seen[which.unwrap_or_else(|| panic!("{format}: {mapping:x?} was never written"))] += 1;
                }
                memory.log.lock().unwrap().given.clear();
                assert!(start.elapsed() < Duration::from_secs(20), "{format}: only one value is ever seen: {seen:?}");
            }
            seen
        });
        assert!(seen.iter().sum::<u64>() % 512 == 0, "{format}: {seen:?}");
    }
}
