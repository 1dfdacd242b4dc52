//! What a second stage lets a first one do, while it changes: its tables can be written or not, may be read or not. Single changes that random guests hardly
//! make; after each, what is told is what the naive reader finds.

use stagecraft::memory::{Budget, Limits, MemoryMap};
use stagecraft::sync::{Changes, ShadowLimits, Space, Unwatched, Way};
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference::generate::{Options, Rng, build};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};
use stagecraft_tests::reference::walk::Walker;
use stagecraft_tests::reference::{Access, Run, merge};

use super::support::{Model, View, format};
use crate::configs::plugin_config;

/// Tables of the first stage: the root, one of the second level, one of the third, two of the last. Then a page.
const TABLES: [u64; 5] = [0x10_0000, 0x20_1000, 0x30_2000, 0x40_3000, 0x40_5000];
const DATA: u64 = 0x50_4000;

/// Where the second stage puts an intermediate page.
fn place(intermediate: u64) -> u64 {
    0x20_0000_0000 + (intermediate & 0xff_f000)
}

struct Case {
    stages: [TableConfig; 2],
    memory: Memory,
    space: Space,
    model: Model,
    /// Changes of the second stage are told by commands, and not by what was written.
    commands: bool,
}

impl Case {
    fn new(first: TableConfig, second: TableConfig, entries: &[(u64, u64)]) -> Self {
        let pages = TABLES.into_iter().chain([DATA]);
        let leaves: Vec<Run> = pages.map(|page| Run { iova: page, address: place(page), size: 4096, access: Access::RW }).collect();
        let second = build(second, &leaves, &mut Rng::new(1), Options { restrictions: false, decoys: false, noise: false, ..Options::default() });
        let mut memory = second.snapshot.memory;
        TABLES.into_iter().for_each(|table| memory.add_zeroed(place(table), 4096));
        for (at, entry) in entries {
            memory.write(place(*at) + (at & 0xfff), *entry, false);
        }
        let stages = [first, second.config];
        let limits = ShadowLimits { table_pages: 1 << 10, leaves: 1 << 16 };
        let space = Space::open(way(&stages), MemoryMap::everything(52), limits, Box::new(Unwatched)).unwrap();
        let mut case = Self { stages, memory, space, model: Model::default(), commands: false };
        case.look(|space, view, budget, changes| space.synchronise(view, Span::ALL, false, budget, changes));
        case
    }

    fn look(&mut self, act: impl FnOnce(&mut Space, &View<'_>, &Budget, &mut Changes)) {
        let mut changes = Changes::new();
        act(&mut self.space, &View(&self.memory), &Budget::new(Limits::default()), &mut changes);
        self.model.apply(changes.batch());
    }

    /// A guest's write, which it tells of.
    fn write(&mut self, at: u64, entry: u64) {
        self.memory.write(at, entry, false);
        self.look(|space, view, budget, changes| space.table_written(view, Gpa(at), 8, budget, changes));
    }

    /// The same for an entry of the first stage.
    fn write_first(&mut self, at: u64, entry: u64) {
        self.write(place(at) + (at & 0xfff), entry);
    }

    /// Changes the second stage's entry for a page.
    fn change_second(&mut self, page: u64, change: impl Fn(u64) -> u64) {
        let address = place(page);
        let places = self.memory.pages.keys().flat_map(|page| (0..512).map(move |index| page + index * 8));
        let is_it = |at: &u64| {
            let word = self.memory.read(*at, false).unwrap();
            word & 0xffff_ffff_f000 == address && word & 1 != 0
        };
        // Entries of the first stage have intermediate addresses.
        let at: Vec<u64> = places.filter(is_it).collect();
        assert_eq!(at.len(), 1, "{page:#x}");
        let entry = change(self.memory.read(at[0], false).unwrap());
        if self.commands {
            self.memory.write(at[0], entry, false);
            self.look(|space, view, budget, changes| space.synchronise_second(view, Span::of_log2(page, 12), true, budget, changes));
        } else {
            self.write(at[0], entry);
        }
    }

    /// First IOVAs and access of what is told, which is what the naive reader finds.
    fn told(&self, what: &str) -> Vec<(u64, bool)> {
        let naive = Walker::new(&self.memory, &self.stages).unwrap().mappings().unwrap();
        let run = |mapping: &stagecraft::table::Mapping| Run {
            iova: mapping.iova.first,
            address: mapping.address,
            size: mapping.iova.length_minus_one() + 1,
            access: Access { read: mapping.access.read, write: mapping.access.write },
        };
        assert_eq!(merge(self.model.mappings().iter().map(run).collect()), naive, "{what}");
        naive.iter().map(|run| (run.iova, run.access.write)).collect()
    }
}

fn way(stages: &[TableConfig; 2]) -> Way {
    Way::tables(format(&plugin_config(&stages[0])), format(&plugin_config(&stages[1])))
}

/// VT-d, four levels each: present, writable, user, accessed; dirty.
const POINTER: u64 = 0x27;
const PAGE: u64 = 0x67;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

fn vtd(entries: &[(u64, u64)]) -> Case {
    let first = VtdFirst { root: TABLES[0], levels: 4, output_bits: 52, large_1g: true, execute_disable: true, extended_access: false };
    let second = VtdSecond::default();
    Case::new(TableConfig::VtdFirst(first), TableConfig::VtdSecond(second), entries)
}

/// The first table of the last level serves IOVAs from 0, the second from 2 MiB.
fn tree() -> Vec<(u64, u64)> {
    vec![(TABLES[0], TABLES[1] | POINTER), (TABLES[1], TABLES[2] | POINTER), (TABLES[2], TABLES[3] | POINTER), (TABLES[2] + 8, TABLES[4] | POINTER)]
}

const SECOND: u64 = 2 << 20;
const READ_ONLY: fn(u64) -> u64 = |entry| entry & !2;
const WRITABLE: fn(u64) -> u64 = |entry| entry | 2;

#[test]
fn a_table_that_cannot_be_written_any_more_and_can_again() {
    // What lacks a mark, in which table, and what is left once that cannot be written: nothing, or reads.
    let all = [(0, 0, A, None), (1, 1, A, None), (2, 2, A, None), (3, 4, A, None), (3, 4, D, Some(false))];
    for ((table, at, lacks, left), commands) in all.into_iter().flat_map(|one| [(one, false), (one, true)]) {
        let mut entries = tree();
        entries.push((TABLES[3], DATA | PAGE));
        entries[at].1 &= !lacks;
        let mut case = Case { commands, ..vtd(&entries) };
        let what = format!("table {table} lacks {lacks:#x}, told by commands: {commands}");
        for _ in 0..2 {
            assert_eq!(case.told(&what), [(0, true)], "{what}");
            case.change_second(TABLES[table], READ_ONLY);
            assert_eq!(case.told(&what), left.map(|write| (0, write)).into_iter().collect::<Vec<_>>(), "{what}, read-only");
            case.change_second(TABLES[table], WRITABLE);
        }
        // What has its marks minds nothing.
        case.write_first(entries[at].0, entries[at].1 | lacks);
        case.change_second(TABLES[table], READ_ONLY);
        assert_eq!(case.told(&what), [(0, true)], "{what}, marked");
    }
}

#[test]
fn a_table_moves_from_a_page_that_can_be_written_to_one_that_cannot_and_back() {
    for lacks in [A, D] {
        let mut entries = tree();
        entries.extend([TABLES[3], TABLES[4]].map(|table| (table, DATA | PAGE & !lacks)));
        let mut case = vtd(&entries);
        case.change_second(TABLES[4], READ_ONLY);
        let (here, there) =
            if lacks == A { (vec![(0, true)], vec![]) } else { (vec![(0, true), (SECOND, false)], vec![(0, false), (SECOND, false)]) };
        for round in 0..3 {
            let what = format!("lacks {lacks:#x}, round {round}");
            assert_eq!(case.told(&what), here, "{what}");
            // The same entries, in another page.
            case.write_first(TABLES[2], TABLES[4] | POINTER);
            assert_eq!(case.told(&what), there, "{what}, read-only");
            case.write_first(TABLES[2], TABLES[3] | POINTER);
        }
    }
}

#[test]
fn the_same_pattern_in_a_table_that_can_be_written_and_in_one_that_cannot() {
    for lacks in [A, D] {
        for first_in_read_only in [false, true] {
            let mut case = vtd(&tree());
            case.change_second(TABLES[4], READ_ONLY);
            let what = format!("lacks {lacks:#x}, first where it cannot be marked: {first_in_read_only}");
            let refused = if lacks == A { vec![] } else { vec![(SECOND, false)] };
            // Pages come and go, so that their patterns are remembered as they are.
            for round in 0..3 {
                for read_only in [first_in_read_only, !first_in_read_only] {
                    let table = TABLES[3 + usize::from(read_only)];
                    case.write_first(table, DATA | PAGE & !lacks);
                    assert_eq!(case.told(&what), if read_only { refused.clone() } else { vec![(0, true)] }, "{what}, round {round}");
                    case.write_first(table, 0);
                    assert_eq!(case.told(&what), [], "{what}, round {round}");
                }
            }
        }
    }
}

/// A table with a pointer that cannot be marked has nothing in it, and is shared by the entries that lead there.
#[test]
fn a_shared_table_that_can_be_written_has_something_in_it() {
    let mut entries = tree();
    entries.extend([(TABLES[3], DATA | PAGE), (TABLES[0] + 8, TABLES[1] | POINTER), (TABLES[0] + 16, TABLES[1] | POINTER)]);
    entries[1].1 &= !A;
    let mut case = vtd(&entries);
    let slot = 1_u64 << 39;
    let all = [(0, true), (slot, true), (2 * slot, true)];
    for _ in 0..2 {
        assert_eq!(case.told("writable"), all);
        case.change_second(TABLES[1], READ_ONLY);
        assert_eq!(case.told("read-only"), []);
        // Looked at anew, the three entries share it.
        case.write_first(TABLES[0] + 8, 0);
        case.write_first(TABLES[0] + 16, 0);
        case.write_first(TABLES[0] + 8, TABLES[1] | POINTER);
        case.write_first(TABLES[0] + 16, TABLES[1] | POINTER);
        assert_eq!(case.told("read-only, shared"), []);
        case.change_second(TABLES[1], WRITABLE);
    }
}

/// SMMUv3's S2PTW: tables of the first stage become device memory, and ordinary memory again; and the bit comes and goes.
#[test]
fn tables_in_device_memory() {
    let low = ArmHalf { root: TABLES[0], granule: 4096, input_bits: 48, top_byte_ignored: false, hierarchical_disabled: false };
    let first = TableConfig::ArmStage1(ArmStage1 { low: Some(low), output_bits: 48, mair: 0xff, ..ArmStage1::default() });
    let stage2 = |protected_walk| ArmStage2 { granule: 4096, input_bits: 48, output_bits: 48, protected_walk, ..ArmStage2::default() };
    let device: fn(u64) -> u64 = |entry| entry & !(0xf << 2) | 1 << 2;
    let ordinary: fn(u64) -> u64 = |entry| entry | 0xf << 2;
    let entries = [(TABLES[0], TABLES[1] | 3), (TABLES[1], TABLES[2] | 3), (TABLES[2], TABLES[3] | 3), (TABLES[3], DATA | 0x0060_0000_0000_0743)];
    let mut case = Case::new(first, TableConfig::ArmStage2(stage2(true)), &entries);
    TABLES.into_iter().chain([DATA]).for_each(|page| case.change_second(page, ordinary));
    for table in TABLES.into_iter().take(4) {
        assert_eq!(case.told("ordinary memory"), [(0, true)]);
        case.change_second(table, device);
        assert_eq!(case.told(&format!("table {table:#x} is device memory")), []);
        // The second stage as it is, without S2PTW and with it again.
        for (protected, told) in [(false, vec![(0, true)]), (true, vec![])] {
            let TableConfig::ArmStage2(second) = &mut case.stages[1] else { unreachable!() };
            second.protected_walk = protected;
            let way = way(&case.stages);
            case.look(|space, view, budget, changes| space.switch(way, view, budget, changes).unwrap());
            assert_eq!(case.told(&format!("table {table:#x}, S2PTW {protected}")), told);
        }
        case.change_second(table, ordinary);
    }
    case.change_second(DATA, device);
    assert_eq!(case.told("the page is device memory"), [(0, true)]);
}
