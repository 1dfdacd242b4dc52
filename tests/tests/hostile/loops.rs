//! Tables that never end: self-maps, cycles, shared subtables. Each is ended by a budget that the error names.

use std::collections::BTreeMap;

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Exhausted, Kind, Limits, MemoryMap, ReadError, Region};
use stagecraft::plugin::TableConfig;
use stagecraft::table::{Arena, BuildError, Builder, Collector, FaultAt, Mapping, Piece, Run, Step, Table, Visitor, WalkError};
use stagecraft::{Access, Gpa, Span};

use stagecraft::guest::Guest;
use stagecraft_tests::reference::generate::{Format, generate};

use super::compare::plugin_config;
use super::mutate::Words;
use super::{load, plugins, timed};

const PAGE: u64 = 0x4000_0000;

/// Pages of 512 entries.
#[derive(Default)]
struct Pages(BTreeMap<u64, [u64; 512]>);

impl EntryMemory for Pages {
    fn read_entries(&self, address: Gpa, _: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let page = self.0.get(&(address.0 & !0xfff)).ok_or(ReadError(address))?;
        let first = (address.0 % 4096 / 8) as usize;
        entries.copy_from_slice(&page[first..first + entries.len()]);
        Ok(())
    }
}

/// Four levels of 512 entries in each format, and an entry that is a table above the last level and a readable leaf at it, without its address.
fn formats() -> [(&'static str, u64); 5] {
    [
        ("arm-smmuv3/stage1", 0x743),
        ("arm-smmuv3/stage2", 0x7ff),
        // Present, writable, for all, accessed, dirty.
        ("intel-vtd/first-stage", 0x67),
        ("amd-vi/v2", 0x67),
        ("intel-vtd/second-stage", 0x3),
    ]
}

fn open(format: &str) -> Table {
    let plugin = plugins().by_format(format).unwrap();
    Table::open(Box::new(plugin.open(&TableConfig::new(format, &[("root", PAGE)])).unwrap())).unwrap()
}

/// How often the first table is visited: once for each half where both share it.
fn roots(format: &str) -> u64 {
    if ["intel-vtd/first-stage", "amd-vi/v2"].contains(&format) { 2 } else { 1 }
}

fn map() -> MemoryMap {
    MemoryMap::everything(48)
}

/// Counts, and keeps nothing.
#[derive(Default)]
struct Counter {
    leaves: u64,
    faults: u64,
}

impl Visitor for Counter {
    fn leaves(&mut self, run: &Run<'_>, _: &[Step]) -> Result<(), WalkError> {
        self.leaves += run.entries.len() as u64;
        Ok(())
    }

    fn piece(&mut self, _: &Piece, _: &[Step]) -> Result<(), WalkError> {
        self.leaves += 1;
        Ok(())
    }

    fn fault(&mut self, _: &FaultAt<'_>) -> Result<(), WalkError> {
        self.faults += 1;
        Ok(())
    }
}

fn exhausted(result: Result<(), WalkError>) -> Exhausted {
    match result {
        Err(WalkError::Exhausted(exhausted)) => exhausted,
        other => panic!("not ended by a budget: {other:?}"),
    }
}

fn mapping(iova: u64, address: u64, bytes: u64, access: Access) -> Mapping {
    Mapping { iova: Span { first: iova, last: iova + bytes - 1 }, address, access }
}

const RW: Access = Access { read: true, write: true };

/// All entries of a page point to the page: 2^36 leaves.
#[test]
fn a_self_map_is_ended_by_each_budget() {
    for (format, entry) in formats() {
        let memory = Pages([(PAGE, [PAGE | entry; 512])].into());
        let small = Limits::for_pages(1);
        let cases = [
            (small, "tables visited", small.tables),
            (Limits { leaves: 10_000, ..Limits::default() }, "leaves", 10_000),
            (Limits { questions: 1, ..Limits::default() }, "different patterns asked about", 1),
            // What a live guest gets: all that is done is counted.
            (Limits::default(), "", 0),
        ];
        for (limits, what, limit) in cases {
            timed(&format!("self-map of {format}, {what}"), || {
                let budget = Budget::new(limits);
                let mut counter = Counter::default();
                let ended = exhausted(open(format).walk(&memory, &map(), Span::ALL, &budget, &mut counter));
                if what.is_empty() {
                    assert!(ended.what == "tables visited" || ended.what == "leaves", "{ended}");
                } else {
                    assert_eq!(ended, Exhausted { what, limit }, "{format}");
                    assert_eq!(ended.to_string(), format!("stopped by budget: more than {limit} {what}"));
                }
                assert!(budget.tables_visited() <= limits.tables && budget.leaves_seen() <= limits.leaves);
                assert!(counter.leaves <= limits.leaves && counter.faults == 0, "{format}: {}", counter.leaves);
            });
        }
        // Building from it ends with the budget or the memory for tables, whichever is less.
        timed(&format!("conversion of a self-map of {format}"), || {
            let plugin = plugins().by_format("intel-vtd/second-stage").unwrap();
            let mut arena = Arena::new(1 << 33, 4 << 20);
            let mut builder = Builder::new(Box::new(plugin.open(&TableConfig::new("intel-vtd/second-stage", &[])).unwrap()), &mut arena).unwrap();
            let walked = open(format).walk(&memory, &map(), Span::ALL, &Budget::new(Limits::default()), &mut builder);
            assert!(matches!(walked, Err(WalkError::Stopped)), "{format}: {walked:?}");
            assert!(matches!(builder.finish(), Err(BuildError::Full(_))), "{format}");
            assert!(arena.bytes() <= 4 << 20 && arena.capacity() <= 4 << 20);
        });
    }
}

/// One entry of a page points to the page: it is the table of every level, and at last a leaf.
#[test]
fn a_page_that_is_its_own_next_level_is_four_tables() {
    for (format, entry) in formats() {
        let mut page = [0; 512];
        page[5] = PAGE | entry;
        let memory = Pages([(PAGE, page)].into());
        let budget = Budget::new(Limits::for_pages(1));
        let mut collector = Collector::new(false, 10);
        open(format).walk(&memory, &map(), Span::ALL, &budget, &mut collector).unwrap();
        let iova = 5 << 39 | 5 << 30 | 5 << 21 | 5 << 12;
        assert_eq!(collector.mappings(), [mapping(iova, PAGE, 4096, RW)], "{format}");
        assert_eq!(budget.tables_visited(), 3 + roots(format), "{format}");
    }
}

#[test]
fn two_pages_that_point_to_each_other_end_at_the_last_level() {
    for (format, entry) in formats() {
        let other = PAGE + 0x1000;
        let (mut first, mut second) = ([0; 512], [0; 512]);
        (first[1], second[2]) = (other | entry, PAGE | entry);
        let memory = Pages([(PAGE, first), (other, second)].into());
        let mut collector = Collector::new(false, 10);
        open(format).walk(&memory, &map(), Span::ALL, &Budget::new(Limits::for_pages(2)), &mut collector).unwrap();
        let iova = 1 << 39 | 2 << 30 | 1 << 21 | 2 << 12;
        assert_eq!(collector.mappings(), [mapping(iova, PAGE, 4096, RW)], "{format}");
        // All entries of both: two to the 36th again.
        let memory = Pages([(PAGE, [other | entry; 512]), (other, [PAGE | entry; 512])].into());
        let limits = Limits::for_pages(2);
        let ended = exhausted(open(format).walk(&memory, &map(), Span::ALL, &Budget::new(limits), &mut Counter::default()));
        assert_eq!(ended, Exhausted { what: "tables visited", limit: limits.tables }, "{format}");
    }
}

/// Every level has `fan` entries that point to one table of the next: `fan^4` leaves in four pages.
#[test]
fn shared_subtables_count_each_time() {
    for (format, entry) in formats() {
        for fan in [2_u64, 512] {
            let mut pages = BTreeMap::new();
            for level in 0..4_u64 {
                let mut page = [0; 512];
                page[..fan as usize].fill((PAGE + (level + 1) * 0x1000) | entry);
                pages.insert(PAGE + level * 0x1000, page);
            }
            let limits = Limits::for_pages(4);
            let budget = Budget::new(limits);
            let mut counter = Counter::default();
            let walked =
                timed(&format!("shared subtables of {format}"), || open(format).walk(&Pages(pages), &map(), Span::ALL, &budget, &mut counter));
            if fan == 2 {
                walked.unwrap();
                assert_eq!((counter.leaves, budget.tables_visited()), (16, roots(format) + 2 + 4 + 8), "{format}");
            } else {
                assert_eq!(exhausted(walked), Exhausted { what: "tables visited", limit: limits.tables }, "{format}");
            }
        }
    }
}

/// A guest that writes another pattern into every entry slows itself only, and the host remembers a bounded number.
#[test]
fn patterns_are_charged_to_the_guest() {
    for (format, entry) in formats() {
        // Bits that hardware ignores: above the address in a leaf.
        let mut next = 0_u64;
        let mut page = || {
            std::array::from_fn(|_| {
                next += 1;
                PAGE | entry | (next & 0xf) << 55 | (next >> 4 & 0x7) << 52 | (next >> 7 & 1) << 59 | (next >> 8 & 1) << 60
            })
        };
        let mut memory = Pages([(PAGE, page())].into());
        memory.0.insert(PAGE + 0x1000, page());
        let limits = Limits { questions: 300, ..Limits::default() };
        let ended = exhausted(open(format).walk(&memory, &map(), Span::ALL, &Budget::new(limits), &mut Counter::default()));
        assert_eq!(ended, Exhausted { what: "different patterns asked about", limit: 300 }, "{format}");
    }
}

/// A leaf over a memory map of very many pieces is as much work as there are pieces.
#[test]
fn pieces_of_leaves_are_charged() {
    let regions = (0..100_000).map(|index| Region { kind: Kind::Ram, span: Span { first: index << 13, last: (index << 13) + 0xfff } });
    let map = MemoryMap::new(regions.collect()).unwrap();
    // Leaves of 1 GiB, all to the same address, in a table of level 1.
    let leaves = [0x741; 512];
    let mut root = [0; 512];
    root[0] = 0x1_0000 | 0x3;
    let memory = Pages([(0, root), (0x1_0000, leaves)].into());
    let plugin = plugins().by_format("arm-smmuv3/stage1").unwrap();
    let mut table = Table::open(Box::new(plugin.open(&TableConfig::new("arm-smmuv3/stage1", &[("root", 0)])).unwrap())).unwrap();
    timed("leaves over a memory map of many pieces", || {
        let limits = Limits::for_pages(2);
        let budget = Budget::new(limits);
        let mut counter = Counter::default();
        let ended = exhausted(table.walk(&memory, &map, Span::ALL, &budget, &mut counter));
        assert_eq!(ended, Exhausted { what: "leaves", limit: limits.leaves });
        assert!(counter.leaves <= limits.leaves, "{}", counter.leaves);
    });
}

/// Every format's root table, all of whose entries point to it, or lie about where they point: an end, whatever the format.
#[test]
fn self_maps_of_every_format_end() {
    for format in Format::ALL {
        for seed in 0..6 {
            let generated = generate(format, seed);
            let regions = generated.config.regions().unwrap();
            let root = regions[0].root;
            let words = Words::of(&generated.config);
            let mut snapshot = generated.snapshot;
            let page = root & !0xfff;
            // The first entry in use that is a table stands for all.
            let read = |at: u64| snapshot.memory.read(at, words.big_endian).unwrap();
            let entry = (0..512).map(|index| read(page + index * 8)).find(|entry| *entry != 0).unwrap_or(1);
            for index in 0..512 {
                snapshot.memory.write(page + index * 8, words.point(entry, page), words.big_endian);
            }
            timed(&format!("self-map of {format:?}, seed {seed}"), || {
                let folder = tempfile::tempdir().unwrap();
                let loaded = load(&snapshot, folder.path());
                let guest = Guest::new(&loaded, plugins()).unwrap();
                let mut space = guest.open(&[plugin_config(&generated.config)]).unwrap();
                let budget = guest.budget();
                let walked = space.walk(&guest.memory(), guest.map(), Span::ALL, &budget, &mut Counter::default());
                assert!(matches!(walked, Ok(()) | Err(WalkError::Exhausted(_))), "{format:?}: {walked:?}");
                assert!(budget.tables_visited() <= budget.limits().tables && budget.leaves_seen() <= budget.limits().leaves);
            });
        }
    }
}
