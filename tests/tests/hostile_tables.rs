//! Tables of the formats beside Arm's and Intel's that never end, or that stand where addresses end: each walk ends within its budget.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::OnceLock;

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Kind, Limits, MemoryMap, ReadError, Region};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{AddressSpace, Arena, Builder, Cause, Collector, FaultKind, Table, WalkError};
use stagecraft::{Access, Gpa, Iova, Span};

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

/// All entries of a page point to the page, in every format whose tables are that small or smaller; whatever the kind of table that it is taken for.
#[test]
fn self_maps_of_every_format_end_by_budget() {
    let little = |entry: u64| entry.to_le_bytes().to_vec();
    let cases = [
        ("amd-vi/v2", vec![("levels", 5)], little(PAGE | 0x67), true),
        ("riscv-iommu/first-stage", vec![("levels", 5)], little(PAGE >> 2 | 1), true),
        ("loongarch/paging", vec![("granule", 4096), ("levels", 4)], little(PAGE), false),
        ("apple-dart/dart1", vec![("granule", 4096), ("levels", 3)], little(PAGE | 1), true),
    ];
    for (format, settings, entry, ends) in cases {
        let settings = [&settings[..], &[("root", PAGE)]].concat();
        let (_, collector, ended) = walk(open(format, &settings), &Pages::full(PAGE, &entry), &MemoryMap::everything(48));
        // RISC-V pointers are no leaves at the last level, a part of a DART page is refused: all of them many times. LoongArch's pointers are not valid at the last
        // level, so that there is nothing at all, which is seen once at each level.
        assert_eq!(ended, ends, "{format}: {} mappings, {} faults", collector.mappings().len(), collector.fault_count());
        assert!(ends || collector.mappings().is_empty() && collector.fault_count() == 0, "{format}");
    }
    // Tables of 4 MiB of input and 4-byte entries: two levels end by themselves.
    let entry = (PAGE as u32 | 1).to_le_bytes();
    let mut pages = Pages::default();
    (0..4).for_each(|page| drop(pages.0.insert(PAGE + page * 0x1000, entry.repeat(1024))));
    let (_, collector, ended) = walk(open("arm-v7s/short", &[("root", PAGE)]), &pages, &MemoryMap::everything(32));
    assert!(ended || collector.fault_count() > 0);
}

/// AMD v1: a page is the table of every level at once, and its entries skip to any level below.
#[test]
fn a_table_of_all_levels_whose_entries_skip_levels() {
    let present = PAGE | 1 | 3 << 61;
    for skips in [&[1_u64][..], &[5], &[1, 2, 3, 4, 5], &[5, 4, 3, 2, 1, 0, 7], &[6, 7, 0]] {
        let entries: Vec<u8> = (0..512).flat_map(|index| (present | skips[index % skips.len()] << 9).to_le_bytes()).collect();
        let memory = Pages([(PAGE, entries)].into());
        for levels in 1..=6 {
            let (_, collector, ended) = walk(open("amd-vi/v1", &[("levels", levels), ("root", PAGE)]), &memory, &MemoryMap::everything(52));
            // Entry 0 may skip; an IOVA with bits of a skipped level has no translation.
            assert!(ended || collector.fault_count() > 0 || !collector.mappings().is_empty() || levels > 1, "{skips:?}, {levels} levels");
        }
    }
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
