//! Guests whose unused slots lead to tables with nothing in them, which they share: what is kept is bounded by what is there, and not by how many ways lead to it.

use std::collections::BTreeMap;

use stagecraft::memory::MemoryMap;
use stagecraft::plugin::queue::{Effect, Invalidation};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{CommitError, Live, Reason, Report, ShadowFigures, ShadowLimits, Sink, Space, Way};
use stagecraft::table::{Mapping, Table};
use stagecraft::{Change, Gpa, Span};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::{self, LoongArch};
use stagecraft_tests::reference::walk::Walker;

use super::behaviour::{Watched, range};
use super::equality::{assert_same, clipped};
use super::support::{Model, View, format, walk};
use crate::configs;

/// Valid, dirty, for user level, cached, present, writable.
const PAGE: u64 = 0x19f;
const FIRST: u64 = 0x8000_0000;

/// Hears what a device gets, and has room for all of it.
#[derive(Default)]
struct Hearing(Model);

impl Sink for Hearing {
    fn apply(&mut self, batch: &[Change]) {
        self.0.apply(batch);
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(())
    }
}

/// A guest of an architecture without a valid bit in its directories.
struct Guest {
    granule_log2: u32,
    levels: u32,
    memory: Memory,
    /// By level: the table that unused slots of the next share.
    empty: Vec<u64>,
    root: u64,
    next: u64,
}

impl Guest {
    fn new(granule_log2: u32, levels: u32) -> Self {
        let mut guest = Self { granule_log2, levels, memory: Memory::default(), empty: Vec::new(), root: 0, next: FIRST };
        for level in 0..levels - 1 {
            let table = guest.table(level);
            guest.empty.push(table);
        }
        guest.root = guest.table(levels - 1);
        guest
    }

    fn table(&mut self, level: u32) -> u64 {
        let table = self.next;
        self.next += 1 << self.granule_log2;
        self.memory.add_zeroed(table, 1 << self.granule_log2);
        if level > 0 {
            let empty = self.empty[level as usize - 1];
            (table..self.next).step_by(8).for_each(|slot| self.memory.write(slot, empty, false));
        }
        table
    }

    fn config(&self) -> LoongArch {
        let bits = self.granule_log2 + (self.granule_log2 - 3) * self.levels;
        LoongArch {
            granule: 1 << self.granule_log2,
            levels: self.levels,
            input_bits: bits,
            output_bits: 48,
            root: Some(self.root),
            root_high: None,
            hardware_update: false,
        }
    }

    fn plugin_config(&self) -> TableConfig {
        configs::plugin_config(&tables::TableConfig::LoongArch(self.config()))
    }

    /// Where the entry for an IOVA stands in the table of a level, on the way that there is.
    fn slot(&self, iova: u64, level: u32) -> u64 {
        let mut table = self.root;
        for at in (level..self.levels).rev() {
            let index = iova >> (self.granule_log2 + (self.granule_log2 - 3) * at) & ((1 << (self.granule_log2 - 3)) - 1);
            let slot = table + index * 8;
            if at == level {
                return slot;
            }
            table = self.memory.read(slot, false).unwrap();
        }
        unreachable!("the level is below the root")
    }

    /// Maps a page, with new tables on the way where there are shared ones: what was written, the last entry that leads there last.
    fn map(&mut self, iova: u64, address: u64) -> Vec<u64> {
        let mut written = Vec::new();
        for level in (1..self.levels).rev() {
            let slot = self.slot(iova, level);
            if self.memory.read(slot, false).unwrap() == self.empty[level as usize - 1] {
                let table = self.table(level - 1);
                self.memory.write(slot, table, false);
                written.push(slot);
            }
        }
        let slot = self.slot(iova, 0);
        self.memory.write(slot, address | PAGE, false);
        written.push(slot);
        written.reverse();
        written
    }

    /// Takes away the table that an entry of a level points to.
    fn drop_table(&mut self, iova: u64, level: u32) -> u64 {
        let slot = self.slot(iova, level);
        self.memory.write(slot, self.empty[level as usize - 1], false);
        slot
    }
}

struct Case {
    guest: Guest,
    live: Live<Hearing>,
    watched: Watched,
    limits: ShadowLimits,
}

impl Case {
    fn new(guest: Guest, limits: ShadowLimits) -> Self {
        let watched = Watched::default();
        let space = Space::open(Way::table(format(&guest.plugin_config())), MemoryMap::everything(48), limits, Box::new(watched.clone())).unwrap();
        let live = Live::new(space, Hearing::default(), Tag::default(), 0, 1 << 10);
        let mut case = Self { guest, live, watched, limits };
        let report = case.synchronise();
        assert_eq!(report.blocked_count, 0, "{report:?}");
        case.check("at first");
        case
    }

    fn synchronise(&mut self) -> Report {
        self.live.synchronise(&View(&self.guest.memory)).unwrap()
    }

    fn figures(&self) -> ShadowFigures {
        self.live.space().figures()
    }

    fn write(&mut self, address: u64, word: u64) -> Report {
        self.guest.memory.write(address, word, false);
        self.live.table_written(&View(&self.guest.memory), Gpa(address), 8).unwrap()
    }

    fn told(&mut self, written: &[u64]) -> Report {
        let mut all = Report::default();
        for address in written {
            all.join(self.live.table_written(&View(&self.guest.memory), Gpa(*address), 8).unwrap());
        }
        all
    }

    fn walked(&self) -> Vec<Mapping> {
        walk(&mut Table::open(format(&self.guest.plugin_config())).unwrap(), &View(&self.guest.memory), &MemoryMap::everything(48))
    }

    /// What was told is what the engine and the naive reader find; and what is kept is within limits, and watched.
    fn check(&self, what: &str) {
        let told = self.live.sink().0.mappings();
        assert_same(&told, &self.walked(), &format!("{what}: what was told, and a walk"));
        let stages = [tables::TableConfig::LoongArch(self.guest.config())];
        let naive = Walker::new(&self.guest.memory, &stages).unwrap().mappings().unwrap();
        assert_same(&told, &clipped(&naive, &MemoryMap::everything(48)), &format!("{what}: what was told, and the naive walk"));
        assert!(self.figures().table_pages <= self.limits.table_pages, "{what}");
        assert_eq!(self.figures().blocked, 0, "{what}");
        self.check_watched(what);
    }

    fn check_watched(&self, what: &str) {
        let watched = self.watched.0.lock().unwrap().clone();
        let pages = self.live.space().watched_pages().collect::<std::collections::BTreeSet<Gpa>>();
        assert!(watched == pages, "{what}");
    }
}

/// Pages, one after the other and far apart.
fn populated(granule_log2: u32, levels: u32) -> Guest {
    let mut guest = Guest::new(granule_log2, levels);
    let page = 1_u64 << granule_log2;
    let last = 1_u64 << (granule_log2 + (granule_log2 - 3) * levels).min(50);
    for index in 0..50 {
        guest.map(0x4000_0000 + index * page, 0x1_0000_0000 + index * page);
        guest.map((last / 64 * index + index * 7 * page) & !(page - 1), 0x2_0000_0000 + index * 5 * page);
    }
    guest
}

#[test]
fn they_are_kept_in_step_within_what_is_there() {
    for (granule_log2, levels) in [(14, 3), (12, 3), (12, 4), (14, 4), (16, 2)] {
        let guest = populated(granule_log2, levels);
        let pages = guest.memory.pages.len() as u64;
        let mut case = Case::new(guest, ShadowLimits { table_pages: 3 * pages, leaves: 1 << 10 });
        let what = format!("2^{granule_log2}, {levels} levels");
        let at_first = case.figures();
        // Each table once, those that are shared twice: in their first place, and for all others.
        assert!(at_first.table_pages <= pages + u64::from(levels) * (4 << (granule_log2 - 12)), "{what}: {at_first:?} of {pages} pages");
        // A page where nothing was, told by the words that were written; and gone again, with its tables.
        let iova = 0x7_0000_0000 & !((1 << granule_log2) - 1) | 1 << granule_log2;
        let written = case.guest.map(iova, 0x5000_0000);
        assert!(case.told(&written).blocked.is_empty());
        case.check(&format!("{what}, mapped"));
        let slot = case.guest.drop_table(iova, levels - 1);
        case.told(&[slot]);
        case.check(&format!("{what}, unmapped"));
        // What the first place of a shared table leads to may change, too.
        for level in 1..levels {
            let (iova, mut at) = (0x7_0000_0000, Vec::new());
            at.extend(case.guest.map(iova, 0x6000_0000));
            at.push(case.guest.drop_table(0x4000_0000, level));
            case.told(&at);
            case.check(&format!("{what}, level {level}"));
            at.clear();
            at.push(case.guest.drop_table(iova, level));
            case.told(&at);
            case.check(&format!("{what}, level {level} back"));
        }
        case.synchronise();
        case.check(&format!("{what}, all looked at"));
        assert!(case.figures().table_pages <= at_first.table_pages + (8 << (granule_log2 - 12)), "{what}: {:?}", case.figures());
    }
}

/// Unmapping all of many tables leaves no more than there was.
#[test]
fn tables_that_come_and_go_leave_nothing() {
    let mut case = Case::new(populated(12, 3), ShadowLimits { table_pages: 1 << 10, leaves: 1 << 12 });
    let before = case.figures();
    for round in 0..4 {
        let iovas: Vec<u64> = (0..300).map(|index| 0x11_0000_0000 + (index << 21) + (round << 12)).collect();
        for iova in &iovas {
            let written = case.guest.map(*iova, 0x7000_0000);
            case.told(&written);
        }
        case.check("many mapped");
        let slots: Vec<u64> = iovas.iter().map(|iova| case.guest.drop_table(*iova, 1)).collect();
        case.told(&slots);
        case.check("all unmapped");
    }
    let root_slot = case.guest.drop_table(0x11_0000_0000, 2);
    case.told(&[root_slot]);
    let after = case.figures();
    assert!(after.table_pages <= before.table_pages + 1, "{before:?}, {after:?}");
    assert_eq!(after.leaves, before.leaves);
}

/// No sane guest writes into a table that all unused slots share. One that does has what it wrote in every one of them.
#[test]
fn a_leaf_in_a_shared_table_is_there_for_all_that_share_it() {
    for told_by in ["write", "everything", "range", "leaves"] {
        // Two levels: 512 slots, of which 511 share one table.
        let mut guest = Guest::new(12, 2);
        guest.map(0x20_3000, 0x9000_0000);
        let mut case = Case::new(guest, ShadowLimits { table_pages: 2000, leaves: 1 << 12 });
        let few = case.figures().table_pages;
        let slot = case.guest.empty[0] + 8 * 9;
        for (word, leaves) in [(0xa000_0000 | PAGE, 512), (0xb000_0000 | PAGE, 512), (0, 1), (0xa000_0000 | PAGE, 512), (0, 1)] {
            match told_by {
                "write" => {
                    case.write(slot, word);
                }
                _ => {
                    case.guest.memory.write(slot, word, false);
                    let commands: Vec<Invalidation> = match told_by {
                        "everything" => vec![Invalidation { index: 0, effect: Effect::Everything }],
                        "range" => vec![range(0, u64::MAX, false)],
                        // One after the other: each page for itself, as a guest that knows what it did would.
                        _ => (0..512).map(|slot| range((slot << 21) + 0x9000, (slot << 21) + 0x9fff, true)).collect(),
                    };
                    case.live.invalidate(&View(&case.guest.memory), &commands).unwrap();
                }
            }
            assert_eq!(case.live.sink().0.pieces.len(), leaves, "{told_by}: {word:#x}");
            case.check(&format!("{told_by}: {word:#x}"));
        }
        assert!(case.figures().table_pages > few, "each has a table of its own now");
    }
}

/// The same where there are more than there may be tables: as many as there is room for are followed, the others are blocked, and nothing wrong is told. When
/// the guest takes it back, all is as before.
#[test]
fn what_there_is_no_room_for_is_blocked() {
    for (granule_log2, levels) in [(12, 3), (12, 4), (14, 3)] {
        let limits = ShadowLimits { table_pages: 1000, leaves: 1 << 12 };
        let mut case = Case::new(populated(granule_log2, levels), limits);
        let before = case.figures();
        let honest: BTreeMap<u64, _> = case.live.sink().0.pieces.clone();
        let slot = case.guest.empty[0] + 8 * 9;
        for round in 0..3 {
            let report = case.write(slot, 0xa000_0000 | PAGE);
            assert!(report.blocked_count > 0 && report.blocked.iter().all(|blocked| blocked.reason == Reason::TablePages), "{report:?}");
            let figures = case.figures();
            assert!(figures.blocked > 0 && figures.table_pages <= limits.table_pages && figures.leaves <= limits.leaves, "{figures:?}");
            case.check_watched("full");
            // All that was told is true: the page that was written, in some slots, and what was there before.
            for (iova, piece) in &case.live.sink().0.pieces {
                assert!(honest.get(iova) == Some(piece) || piece.address == 0xa000_0000, "{piece:?}");
            }
            assert!(honest.keys().all(|iova| case.live.sink().0.pieces.contains_key(iova)));
            // Where it is written again and again, nothing more comes of it.
            if round == 1 {
                case.write(slot, 0xb000_0000 | PAGE);
                assert!(case.figures().table_pages <= limits.table_pages);
            }
            case.write(slot, 0);
            assert!(case.live.sink().0.pieces == honest, "2^{granule_log2}, {levels} levels");
            case.synchronise();
            case.check("taken back");
            assert!(case.figures().table_pages <= before.table_pages + 8, "{before:?}, {:?}", case.figures());
        }
    }
}

/// The pages of shared tables go and come, and another root takes the place of the one there was.
#[test]
fn memory_goes_and_roots_change() {
    let mut case = Case::new(populated(14, 3), ShadowLimits { table_pages: 2000, leaves: 1 << 12 });
    let honest = case.live.sink().0.pieces.clone();
    for level in [1, 0] {
        let gone = case.guest.empty[level];
        let (first, last) = (Span { first: 0, last: gone - 1 }, Span { first: gone + 0x4000, last: (1 << 48) - 1 });
        let regions = [first, last].map(|span| stagecraft::memory::Region { kind: stagecraft::memory::Kind::Ram, span });
        case.live.memory_changed(&View(&case.guest.memory), MemoryMap::new(regions.to_vec()).unwrap()).unwrap();
        assert!(case.live.sink().0.pieces == honest && case.figures().blocked == 0, "level {level} gone");
        case.live.memory_changed(&View(&case.guest.memory), MemoryMap::everything(48)).unwrap();
        case.check("all memory is there again");
    }
    // Another root of the same shape, which leads to the same tables at other places.
    let mut other = Guest { memory: case.guest.memory.clone(), empty: case.guest.empty.clone(), ..Guest::new(14, 3) };
    other.next = case.guest.next;
    other.root = other.table(2);
    other.map(0x1234_4000, 0x3000_0000);
    case.guest = other;
    let way = Way::table(format(&case.guest.plugin_config()));
    case.live.switch(way, &View(&case.guest.memory)).unwrap();
    case.check("another root");
    assert_eq!(case.live.sink().0.pieces.len(), 1);
    assert!(case.figures().table_pages < 60, "{:?}", case.figures());
    // And one of another shape.
    let other = populated(12, 3);
    case.guest = other;
    case.live.switch(Way::table(format(&case.guest.plugin_config())), &View(&case.guest.memory)).unwrap();
    case.check("another shape");
}
