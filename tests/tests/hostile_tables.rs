//! Tables that never end, or that stand where addresses end: each walk ends within its budget, and says the same as the independent reference of what it reached.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::OnceLock;

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Kind, Limits, MemoryMap, ReadError, Region};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{AddressSpace, Arena, Builder, Cause, Collector, FaultKind, Mapping, Table, WalkError};
use stagecraft::{Access, Gpa, Iova, Span};
use stagecraft_tests::random::Random;
use stagecraft_tests::reference;
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::walk::Walker;

fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())
}

/// Pages of bytes.
#[derive(Default)]
struct Pages(BTreeMap<u64, Vec<u8>>);

impl Pages {
    /// A page that holds one entry over and over, in the byte order of memory.
    fn full(address: u64, entry: &[u8]) -> Self {
        Self([(address, entry.repeat(4096 / entry.len()))].into())
    }
}

impl EntryMemory for Pages {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let page = self.0.get(&(address.0 & !0xfff)).ok_or(ReadError(address))?;
        let (at, size) = ((address.0 & 0xfff) as usize, usize::from(layout.bytes));
        for (entry, bytes) in entries.iter_mut().zip(page[at..].chunks_exact(size)) {
            let big = layout.order == stagecraft::table::ByteOrder::Big;
            *entry =
                bytes.iter().enumerate().fold(0, |word, (index, byte)| word | u64::from(*byte) << (8 * if big { size - 1 - index } else { index }));
        }
        Ok(())
    }
}

fn open(format: &str, settings: &[(&str, u64)]) -> Table {
    let plugin = plugins().by_format(format).unwrap();
    Table::open(Box::new(plugin.open(&TableConfig::new(format, settings)).unwrap())).unwrap()
}

/// A walk within small limits: what it found, and whether a budget ended it.
fn walk(table: Table, memory: &Pages, map: &MemoryMap) -> (AddressSpace, Collector, bool) {
    let limits = Limits::for_pages(1);
    let (budget, mut collector) = (Budget::new(limits), Collector::new(false, 100));
    let mut space = AddressSpace::single(table);
    let ended = match space.walk(memory, map, Span::ALL, &budget, &mut collector) {
        Ok(()) => false,
        Err(WalkError::Exhausted(exhausted)) => {
            assert!(exhausted.to_string().starts_with("stopped by budget: more than "), "{exhausted}");
            true
        }
        Err(error) => panic!("{error}"),
    };
    assert!(budget.tables_visited() <= limits.tables && budget.leaves_seen() <= limits.leaves && budget.questions_asked() <= limits.questions);
    for iova in [0, 1 << 12, 1 << 32, 1 << 40, u64::MAX] {
        let _ = space.translate(memory, map, Iova(iova), Access::READ, &Budget::new(limits)).unwrap();
    }
    (space, collector, ended)
}

const PAGE: u64 = 0x4000_0000;

/// A reader that shares no code with the engine, of the same bytes.
fn reference_memory(pages: &Pages) -> Memory {
    let pages = pages.0.iter().map(|(address, bytes)| (*address, <[u8; 4096]>::try_from(&bytes[..]).unwrap().into())).collect();
    Memory { pages }
}

fn reference_config(format: &str, settings: &[(&str, u64)]) -> reference::tables::TableConfig {
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    reference::tables::TableConfig::from_settings(format, &settings).unwrap()
}

/// The engine's answers at an IOVA are the reference's, for reads and for writes. How many requests went through.
fn same_answers(space: &mut AddressSpace, pages: &Pages, map: &MemoryMap, naive: &Walker<'_>, iova: u64) -> u64 {
    let ask = |access: Access| {
        let found = space.translate(pages, map, Iova(iova), access, &Budget::new(Limits::for_pages(1))).unwrap();
        let address = found.as_ref().ok().map(|found| found.address.0);
        assert_eq!(address, naive.translate(iova, access.write).ok(), "{iova:#x} {access}: {found:x?}");
        u64::from(address.is_some())
    };
    [Access::READ, Access::WRITE].map(ask).iter().sum()
}

/// What the engine says is mapped, is; at both ends and in the middle, with that address and no more access. At most 500 of the mappings.
fn mappings_are_those_of(naive: &Walker<'_>, mappings: &[Mapping]) {
    for mapping in mappings.iter().step_by(mappings.len().div_ceil(500).max(1)) {
        let length = mapping.iova.length_minus_one();
        for offset in [0, length / 2, length] {
            for (write, allowed) in [(false, mapping.access.read), (true, mapping.access.write)] {
                let found = naive.translate(mapping.iova.first + offset, write).ok();
                assert_eq!(found, allowed.then_some(mapping.address + offset), "{mapping:x?} at {offset:#x}, write {write}");
            }
        }
    }
}

/// A format, its settings, and entries that stand in turn in one table, which is that of every level.
type SelfMap = (&'static str, Vec<(&'static str, u64)>, Vec<u64>);

fn self_maps() -> Vec<SelfMap> {
    const ARM: [(&str, u64); 3] = [("granule", 4096), ("input-bits", 48), ("output-bits", 48)];
    const RISCV: [u64; 2] = [PAGE >> 2 | 1, PAGE >> 2 | 0xd7];
    const DART_PAGE: u64 = 0xfff << 40 | 1;
    vec![
        // Access flag, shareable, AP[1] or S2AP and MemAttr: a page at the last level, a table above.
        ("arm-smmuv3/stage1", ARM.to_vec(), vec![PAGE | 1 << 10 | 3 << 8 | 1 << 6 | 3]),
        ("arm-smmuv3/stage2", [&ARM[..], &[("start-level", 0)]].concat(), vec![PAGE | 1 << 10 | 3 << 8 | 3 << 6 | 15 << 2 | 3]),
        ("intel-vtd/first-stage", vec![("levels", 5)], vec![PAGE | 0x67]),
        ("intel-vtd/second-stage", vec![("levels", 5)], vec![PAGE | 3]),
        // NextLevel is lower than the table's own level in one of them at least.
        ("amd-vi/v1", vec![("levels", 6)], (0..6).map(|next| PAGE | 3 << 61 | next << 9 | 1).collect()),
        ("amd-vi/v2", vec![("levels", 5)], vec![PAGE | 0x67]),
        // Pointers are no leaves at the last level.
        ("riscv-iommu/first-stage", vec![("levels", 5)], RISCV.to_vec()),
        ("riscv-iommu/second-stage", vec![("levels", 5)], RISCV.to_vec()),
        // An entry of each kind of table, of which the right one counts.
        ("s390-zpci/dma", vec![("levels", 5)], (0..4).map(|kind| PAGE | kind << 2 | 3).collect()),
        // Pointers have no other bit. V, D, PLV 3, MAT 1.
        ("loongarch/paging", vec![("granule", 4096), ("levels", 4)], vec![PAGE, PAGE | 0x1f]),
        // All of the page at the last level.
        ("apple-dart/dart1", vec![("granule", 4096), ("levels", 3), ("input-bits", 39)], vec![PAGE | DART_PAGE]),
        ("apple-dart/dart2", vec![("levels", 3), ("input-bits", 47)], vec![PAGE >> 4 | DART_PAGE]),
        // A pointer; a small page with AP[1:0], whose place in the first table is a section without access.
        ("arm-v7s/short", vec![], vec![PAGE | 1, PAGE | 3 << 4 | 1 << 2 | 2]),
    ]
}

/// All entries of a table point to the table, in every format; whatever the kind of table that it is taken for.
#[test]
fn self_maps_of_every_format_end_by_budget() {
    let cases = self_maps();
    for format in plugins().iter().flat_map(|(manifest, _)| &manifest.formats) {
        assert!(cases.iter().any(|(name, ..)| *name == format.name), "no table that contains itself for {}", format.name);
    }
    for (format, settings, entries) in cases {
        let settings = [&settings[..], &[("root", PAGE)]].concat();
        let config = reference_config(format, &settings);
        let bytes: Vec<u8> = (0..0x4000 / config.entry_bytes())
            .flat_map(|index| {
                let entry = entries[index as usize % entries.len()];
                let size = config.entry_bytes() as usize;
                if config.big_endian() { entry.to_be_bytes()[8 - size..].to_vec() } else { entry.to_le_bytes()[..size].to_vec() }
            })
            .collect();
        let pages = Pages((0..4).map(|page| (PAGE + page * 0x1000, bytes[page as usize * 0x1000..][..0x1000].to_vec())).collect());
        let map = MemoryMap::everything(64);
        let (mut space, collector, ended) = walk(open(format, &settings), &pages, &map);
        assert!(ended && !collector.mappings().is_empty(), "{format}: {ended}, {} faults {:x?}", collector.fault_count(), collector.faults().first());
        let (memory, stages) = (reference_memory(&pages), [config]);
        let naive = Walker::new(&memory, &stages).unwrap();
        mappings_are_those_of(&naive, collector.mappings());
        let mut random = Random::new(1);
        let mut reached = 0;
        for _ in 0..200 {
            let any = random.below(1 << 32) << 32 | random.below(1 << 32);
            let mapping = &collector.mappings()[random.below(collector.mappings().len() as u64) as usize];
            // Anywhere, and in the neighbourhood, at any level, of what the walk came to.
            for iova in [any >> random.below(52), mapping.iova.first ^ 1 << random.below(64)] {
                reached += same_answers(&mut space, &pages, &map, &naive, iova);
            }
        }
        assert!(reached > 50, "{format}: {reached}");
    }
}

/// LoongArch's pointers are not valid at the last level: a table of nothing but pointers to itself has nothing in it, which is seen once at each level.
#[test]
fn a_table_that_leads_nowhere_but_to_itself_is_gone_through_once_at_each_level() {
    let settings = [("granule", 4096), ("levels", 4), ("root", PAGE)];
    let (_, collector, ended) = walk(open("loongarch/paging", &settings), &Pages::full(PAGE, &PAGE.to_le_bytes()), &MemoryMap::everything(48));
    assert!(!ended && collector.mappings().is_empty());
    assert_eq!(collector.fault_count(), 0);
}

/// The bits of the levels that are left out on the way of an IOVA, by what NextLevel is in the table's entries in turn; none if the way does not end in a leaf.
fn skipped_bits(skips: &[u64], levels: u64, iova: u64) -> Option<u64> {
    let (mut level, mut bits) = (levels, 0);
    loop {
        let shift = 12 + 9 * (level - 1);
        let next = skips[(iova >> shift) as usize % 512 % skips.len()];
        match next {
            0 | 7 => return Some(bits),
            _ if next >= level => return None,
            _ => bits |= (1 << shift) - (1 << (12 + 9 * next)),
        }
        level = next;
    }
}

/// AMD v1: a page is the table of every level at once, and its entries skip to any level below. An IOVA with a bit of a level that is left out has no translation.
#[test]
fn a_table_of_all_levels_whose_entries_skip_levels() {
    let present = PAGE | 1 | 3 << 61;
    let (mut compared, mut refused, mut random) = (0, 0, Random::new(1));
    for skips in [&[1_u64][..], &[5], &[0, 1], &[0, 0, 2, 1], &[1, 2, 3, 4, 5], &[5, 4, 3, 2, 1, 0, 7], &[6, 7, 0]] {
        let entries: Vec<u8> = (0..512).flat_map(|index| (present | skips[index % skips.len()] << 9).to_le_bytes()).collect();
        let pages = Pages([(PAGE, entries)].into());
        let map = MemoryMap::everything(52);
        for levels in 1..=6 {
            let settings = [("levels", levels), ("root", PAGE)];
            let (mut space, collector, ended) = walk(open("amd-vi/v1", &settings), &pages, &map);
            let what = format!("NextLevel {skips:?}, {levels} levels");
            let (memory, stages) = (reference_memory(&pages), [reference_config("amd-vi/v1", &settings)]);
            let naive = Walker::new(&memory, &stages).unwrap().with_budget(1 << 18);
            mappings_are_those_of(&naive, collector.mappings());
            let complete = naive.walk();
            if !ended && !complete.exhausted {
                let found: Vec<_> = collector.mappings().iter().map(|mapping| (mapping.iova.first, mapping.address, mapping.iova.last)).collect();
                let wanted: Vec<_> = complete.runs.iter().map(|run| (run.iova, run.address, run.iova + (run.size - 1))).collect();
                assert_eq!(found, wanted, "{what}");
                compared += 1;
            }
            for mapping in collector.mappings().iter().step_by(collector.mappings().len().div_ceil(500).max(1)) {
                for iova in [mapping.iova.first, mapping.iova.last] {
                    let skipped = skipped_bits(skips, levels, iova);
                    assert!(skipped.is_some_and(|bits| iova & bits == 0), "{what}: {iova:#x} has bits of {skipped:x?}");
                    // The same with one of these bits.
                    let bits: Vec<u64> = (0..64).filter(|bit| skipped.unwrap() >> bit & 1 != 0).collect();
                    if !bits.is_empty() {
                        let iova = iova | 1 << bits[random.below(bits.len() as u64) as usize];
                        let found = space.translate(&pages, &map, Iova(iova), Access::READ, &Budget::new(Limits::for_pages(1))).unwrap();
                        assert_eq!(found.map_err(|fault| fault.cause), Err(Cause::Entry(FaultKind::Translation)), "{what}: {iova:#x}");
                        refused += 1;
                    }
                }
            }
            for _ in 0..200 {
                let iova = random.below(1 << 32) << 32 | random.below(1 << 32);
                same_answers(&mut space, &pages, &map, &naive, iova >> random.below(52));
            }
        }
    }
    assert!(compared > 10 && refused > 1000, "{compared} {refused}");
}

/// s390: offsets and lengths of the next table, sensible or not, and tables that contain themselves.
#[test]
fn parts_of_tables_at_their_extremes() {
    for partial in [0, 1] {
        for offset in 0..4_u64 {
            for length in 0..4_u64 {
                for levels in 3..=5_u64 {
                    // A region entry of each kind of table, of which the right one counts.
                    let entries: Vec<u8> = (0..512_u64).flat_map(|index| (PAGE | offset << 6 | (index % 4) << 2 | length).to_be_bytes()).collect();
                    let mut memory = Pages::default();
                    (0..4).for_each(|page| drop(memory.0.insert(PAGE + page * 0x1000, entries.clone())));
                    let settings = [("levels", levels), ("root", PAGE), ("partial-tables", partial)];
                    let (_, collector, ended) = walk(open("s390-zpci/dma", &settings), &memory, &MemoryMap::everything(64));
                    let whole = offset == 0 && length == 3;
                    if !whole && partial == 0 {
                        assert!(!ended && collector.mappings().is_empty() && collector.fault_count() > 0, "{settings:?} {offset} {length}");
                    }
                }
            }
        }
    }
}

/// The last pages of the address space: a table that is cut short by its end does not go on at address zero.
#[test]
fn tables_at_the_end_of_all_addresses() {
    let last = 0xffff_ffff_ffff_f000;
    let mut memory = Pages::full(last, &[0xff; 8]);
    // What would be read if addresses wrapped: valid entries.
    (0..8).for_each(|page| drop(memory.0.insert(page * 0x1000, (PAGE | 7).to_be_bytes().repeat(512))));
    for levels in 1..=5_u64 {
        let (_, collector, ended) = walk(open("s390-zpci/dma", &[("levels", levels), ("root", last)]), &memory, &MemoryMap::everything(64));
        assert!(!ended && collector.mappings().is_empty(), "{levels} levels: {:?}", collector.mappings());
        // A page table is as large as what is left; all others are larger.
        let last_fault = collector.faults().last().map(|(_, fault)| (fault.cause, fault.address));
        assert_eq!(last_fault, (levels > 1).then_some((Cause::Entry(FaultKind::AddressSize), Some(last))), "{levels} levels");
    }
    // Frames there: the last byte of all is mapped, from a page table and from a segment table.
    for (levels, entry, size) in [(1, last, 4096_u64), (2, 0xffff_ffff_fff0_0000 | 1 << 10, 1 << 20)] {
        let mut memory = Pages::full(PAGE, &entry.to_be_bytes());
        (1..4).for_each(|page| drop(memory.0.insert(PAGE + page * 0x1000, (entry | 0x420).to_be_bytes().repeat(512))));
        let settings = [("levels", levels), ("root", PAGE), ("first-iova", 0), ("last-iova", size - 1)];
        let everything = MemoryMap::everything(64);
        let (mut space, collector, _) = walk(open("s390-zpci/dma", &settings), &memory, &everything);
        assert_eq!(collector.mappings().len(), 1, "{levels}: {:?}", collector.faults());
        assert_eq!(
            (collector.mappings()[0].address, collector.mappings()[0].iova),
            (entry & !0x4ff & !(size - 1), Span { first: 0, last: size - 1 })
        );
        let found = space.translate(&memory, &everything, Iova(size - 1), Access::WRITE, &Budget::new(Limits::for_pages(1))).unwrap();
        assert_eq!(found.unwrap().address, Gpa(u64::MAX), "{levels}");
        // And converted to a format that has no such addresses: counted, not cut.
        build_everywhere(&mut space, &memory, &everything);
    }
}

/// Converts to every format, into very little memory.
fn build_everywhere(space: &mut AddressSpace, memory: &Pages, map: &MemoryMap) {
    let formats: Vec<String> = plugins().iter().flat_map(|(manifest, _)| manifest.formats.iter().map(|format| format.name.clone())).collect();
    for format in formats {
        let mut arena = Arena::new(0x20_0000, 1 << 20);
        let opened = plugins().by_format(&format).unwrap().open(&TableConfig::new(&format, &[])).unwrap();
        let mut builder = Builder::new(Box::new(opened), &mut arena).unwrap();
        let walked = space.walk(memory, map, Span::ALL, &Budget::new(Limits::for_pages(16)), &mut builder);
        assert!(matches!(walked, Ok(()) | Err(WalkError::Stopped | WalkError::Exhausted(_))), "{format}: {walked:?}");
        if let Err(error) = builder.finish() {
            assert!(error.to_string().contains("no room") || error.to_string().contains("cannot be pointed to"), "{format}: {error}");
        }
    }
}

/// Memory in single bytes, anywhere, and up to the last byte of all: leaves are cut to what is there, and nothing smaller than a page is converted.
#[test]
fn memory_of_single_bytes() {
    let byte = |address: u64| Region { kind: Kind::Ram, span: Span { first: address, last: address } };
    let mut regions = vec![byte(0), byte(2), byte(4095), byte(u64::MAX), byte(u64::MAX - 2)];
    regions.extend((0..1000).map(|index| byte(0x1_0000 + index * 7)));
    regions.push(Region { kind: Kind::Ram, span: Span { first: PAGE, last: PAGE + 0x3fff } });
    let map = MemoryMap::new(regions).unwrap();
    // A page of 2 MiB at address 0, and 2 MiB at PAGE; the root and the two levels below in one page each.
    let mut memory = Pages::default();
    let table = |next: u64| [&((PAGE + next) | 0x27).to_le_bytes()[..], &[0; 4088]].concat();
    memory.0.insert(PAGE, table(0x1000));
    memory.0.insert(PAGE + 0x1000, table(0x2000));
    memory.0.insert(PAGE + 0x2000, [&0xe7_u64.to_le_bytes()[..], &(PAGE | 0xe7).to_le_bytes(), &[0; 4080]].concat());
    let (mut space, collector, ended) = walk(open("amd-vi/v2", &[("root", PAGE)]), &memory, &map);
    assert!(!ended);
    let bytes: u64 = collector.mappings().iter().map(|mapping| mapping.iova.length_minus_one() + 1).sum();
    assert_eq!((bytes, collector.mappings().len()), (3 + 1000 + 0x4000, 3 + 1000 + 1));
    build_everywhere(&mut space, &memory, &map);
}

/// The largest leaves that there are, over all of the memory that can be: AMD's of half of all addresses, and those beyond.
#[test]
fn leaves_larger_than_anything() {
    let map = MemoryMap::everything(64);
    for ones in 0..=40_u64 {
        // The lowest `ones` address bits are set: 2^(13 + ones) bytes.
        let entry = ((1_u64 << ones) - 1) << 12 | 7 << 9 | 1 | 3 << 61;
        let memory = Pages::full(PAGE, &entry.to_le_bytes());
        for levels in 1..=6 {
            let (mut space, collector, _) = walk(open("amd-vi/v1", &[("levels", levels), ("root", PAGE)]), &memory, &map);
            let size = 13 + ones;
            let slot = 12 + 9 * (levels - 1);
            let legal = levels < 6 && size > slot && size < slot + 9;
            assert_eq!(collector.mappings().is_empty(), !legal, "{ones} ones, {levels} levels: {:?}", collector.faults().first());
            build_everywhere(&mut space, &memory, &map);
        }
    }
}
