//! Marks in the guest's entries, those that point to tables among them: what is written, in which order, and what is not. The judge is the reference, which follows a request
//! through the same tables and says what hardware leaves behind.

use std::cell::{Cell, RefCell};

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Limits, MarkMemory, MemoryMap, ReadError, WriteError};
use stagecraft::sync::{Changes, Live, Marked, MarksWritten, ShadowLimits, Space, Unwatched, Way};
use stagecraft::table::ByteOrder;
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::{Format, Generated, Options, Rng, generate_with};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::{Entry, Region, TableConfig};
use stagecraft_tests::reference::units::{Nested, amd_nested, riscv_nested, smmu_nested, vtd_nested};
use stagecraft_tests::reference::walk::{self, Walker};

use super::behaviour::range;
use super::equality::seeds;
use super::guest::{DATA, Guest, PS, RO, RW};
use super::space::Heard;
use super::support::{View, format};
use crate::configs::plugin_config;

/// An entry that was written: where, what stood there, what stands there.
type Written = (u64, u64, u64);

/// The reference's memory, which can be marked; keeps what was.
struct Marks {
    memory: RefCell<Memory>,
    written: RefCell<Vec<Written>>,
}

impl Marks {
    fn new(memory: Memory) -> Self {
        Self { memory: RefCell::new(memory), written: RefCell::default() }
    }
}

impl EntryMemory for Marks {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        View(&self.memory.borrow()).read_entries(address, layout, entries)
    }
}

fn load(memory: &Memory, address: u64, bytes: u64, big_endian: bool) -> Option<u64> {
    let read = if bytes == 8 { memory.read(address, big_endian) } else { memory.read4(address, big_endian) };
    read.ok()
}

fn store(memory: &mut Memory, address: u64, entry: u64, bytes: u64, big_endian: bool) {
    if bytes == 8 { memory.write(address, entry, big_endian) } else { memory.write4(address, entry, big_endian) }
}

impl MarkMemory for Marks {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        let (bytes, big_endian) = (u64::from(layout.bytes), layout.order == ByteOrder::Big);
        let mut memory = self.memory.borrow_mut();
        if load(&memory, address.0, bytes, big_endian).ok_or(WriteError(address))? != old {
            return Ok(false);
        }
        store(&mut memory, address.0, new, bytes, big_endian);
        self.written.borrow_mut().push((address.0, old, new));
        Ok(true)
    }
}

/// Takes and gives marks at random, in all entries of a stage that lead somewhere. `place` says where its tables are in memory.
fn shuffle_marks(memory: &mut Memory, config: &TableConfig, place: &dyn Fn(u64) -> Option<u64>, rng: &mut Rng) {
    fn visit(
        memory: &mut Memory,
        config: &TableConfig,
        region: &Region,
        depth: usize,
        (table, half): (u64, usize),
        place: &dyn Fn(u64) -> Option<u64>,
        rng: &mut Rng,
    ) {
        let (step, bytes, big_endian) = (region.steps[depth], config.entry_bytes(), config.big_endian());
        for index in 0..step.entries {
            let Some(at) = place(table + index * bytes) else { continue };
            let Some(mut entry) = load(memory, at, bytes, big_endian).filter(|entry| *entry != 0) else { continue };
            let decoded = config.decode(half, step, entry);
            if decoded == Entry::Fault {
                continue;
            }
            for bit in 0..64 {
                // What makes no difference, and hardware would make one of.
                let other = entry ^ 1 << bit;
                let alike = config.decode(half, step, other) == decoded && config.marked(step, other, true) == config.marked(step, entry, true);
                entry = if alike && rng.percent(50) { other } else { entry };
            }
            store(memory, at, entry, bytes, big_endian);
            if let Entry::Table { address, skip, half, .. } = decoded {
                visit(memory, config, region, depth + 1 + skip, (address, half), place, rng);
            }
        }
    }
    for region in config.regions().unwrap() {
        visit(memory, config, &region, 0, (region.root, region.half), place, rng);
    }
}

fn synchronise(space: &mut Space, memory: &Marks) -> usize {
    let mut changes = Changes::new();
    space.synchronise(memory, Span::ALL, false, &Budget::new(Limits::default()), &mut changes);
    changes.batch().len()
}

/// Requests at random IOVAs of `truth`: what they leave in memory, and in which order; how many entries that point to tables were marked.
fn compare(stages: &[TableConfig], memory: Memory, truth: &[Run], rng: &mut Rng, what: &str) -> u64 {
    let formats: Vec<_> = stages.iter().map(|stage| format(&plugin_config(stage))).collect();
    let way = match <[_; 2]>::try_from(formats) {
        Ok([first, second]) => Way::tables(first, second),
        Err(mut one) => Way::table(one.remove(0)),
    };
    let limits = ShadowLimits { table_pages: 1 << 14, leaves: 1 << 18 };
    let mut space = Space::open(way, MemoryMap::everything(56), limits, Box::new(Unwatched)).unwrap();
    let marks = Marks::new(memory);
    synchronise(&mut space, &marks);
    let mut tables = 0;
    for _ in 0..if truth.is_empty() { 0 } else { 12 } {
        let run = rng.pick(truth);
        let (iova, write) = (run.iova + rng.below(run.size), run.access.write && (!run.access.read || rng.percent(50)));
        let mut expected = marks.memory.borrow().clone();
        let wanted = Walker::new(&expected, stages).unwrap().marks(iova, write).unwrap_or_else(|_| panic!("{what}: {iova:#x} is mapped"));
        for one in &wanted {
            let config = stages[one.stage];
            store(&mut expected, one.address, one.new, config.entry_bytes(), config.big_endian());
        }
        let mut written = MarksWritten::default();
        let marked = Marked { iova: Span { first: iova, last: iova }, accessed: true, dirty: write };
        space.mark(&marks, marked, &Budget::new(Limits::default()), &mut written);
        assert_eq!(written.skipped, 0, "{what}: {iova:#x}");
        let found = marks.written.take();
        let order = |stage: usize, wanted: &[walk::Marked]| {
            wanted.iter().filter(|one| one.stage == stage).map(|one| (one.address, one.old, one.new)).collect::<Vec<Written>>()
        };
        if let [_] = stages {
            assert_eq!(found, order(0, &wanted), "{what}: {iova:#x}, write {write}");
        } else {
            // Entries of the second stage may be marked for several reasons, and written once for each.
            let first = order(0, &wanted);
            let of_first: Vec<Written> = found.iter().filter(|one| first.iter().any(|other| other.0 == one.0)).copied().collect();
            assert_eq!(of_first, first, "{what}: {iova:#x}, write {write}");
        }
        assert!(*marks.memory.borrow() == expected, "{what}: {iova:#x}, write {write}: {found:x?} instead of {wanted:x?}");
        assert_eq!(synchronise(&mut space, &marks), 0, "{what}: the engine's own writes are no changes by the guest");
        tables += written.tables;
    }
    tables
}

#[test]
fn requests_leave_in_entries_what_hardware_leaves() {
    let mut marked = Vec::new();
    for kind in Format::ALL {
        let mut tables = 0;
        for seed in 0..seeds() {
            let Generated { snapshot, truth, config } = generate_with(kind, seed, Options { clusters: 6, ..Options::default() });
            let (mut memory, mut rng) = (snapshot.memory, Rng::new(seed));
            shuffle_marks(&mut memory, &config, &Some, &mut rng);
            tables += compare(&[config], memory, &truth, &mut rng, &format!("{kind:?} seed {seed}"));
        }
        marked.extend((tables > 0).then_some(kind));
    }
    assert_eq!(marked, [Format::ArmStage1, Format::ArmStage2, Format::VtdFirst, Format::VtdSecond, Format::AmdV1, Format::AmdV2]);
}

/// The same settings, with hardware that marks what it uses, or does not.
fn marking(config: TableConfig, marks: bool) -> TableConfig {
    let mut config = config;
    match &mut config {
        TableConfig::ArmStage1(config) => (config.hardware_access, config.hardware_dirty, config.hardware_tables) = (marks, marks, marks),
        TableConfig::ArmStage2(config) => (config.hardware_access, config.hardware_dirty, config.hardware_tables) = (marks, marks, marks),
        TableConfig::VtdSecond(config) => config.accessed_dirty = marks,
        TableConfig::AmdV1(config) => (config.update_accessed, config.update_dirty) = (marks, marks),
        TableConfig::AmdV2(config) => (config.update_accessed, config.update_dirty) = (marks, marks),
        TableConfig::RiscvFirst(config) => config.entries.hardware_update = marks,
        TableConfig::RiscvSecond(config) => config.entries.hardware_update = marks,
        _ => {}
    }
    config
}

#[test]
fn requests_leave_in_entries_of_two_stages_what_hardware_leaves() {
    let mut tried = 0;
    for seed in 0..seeds() {
        let nested: [Option<Nested>; 4] =
            [smmu_nested(seed).map(|(_, nested)| nested), Some(vtd_nested(seed).1), Some(amd_nested(seed).2), Some(riscv_nested(seed).2)];
        let mut rng = Rng::new(seed);
        for nested in nested.into_iter().flatten() {
            let stages = [marking(nested.first.config, rng.percent(70)), marking(nested.second.config, rng.percent(70))];
            let mut memory = nested.memory;
            shuffle_marks(&mut memory, &stages[1], &Some, &mut rng);
            let before = memory.clone();
            let second = Walker::new(&before, &stages[1..]).unwrap();
            shuffle_marks(&mut memory, &stages[0], &|address| second.fetch(address).ok(), &mut rng);
            let truth = Walker::new(&memory, &stages).unwrap().mappings().unwrap();
            compare(&stages, memory, &truth, &mut rng, &format!("{stages:?} seed {seed}"));
            tried += 1;
        }
    }
    assert!(tried > 3 * seeds());
}

/// VT-d's first stage.
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

/// Marks guest memory, after the guest has done something that nobody saw.
struct Racing<'a> {
    guest: &'a Guest,
    /// Before the entry there is touched, what the guest writes there.
    change: Cell<Option<(u64, u64)>>,
    places: RefCell<Vec<u64>>,
}

impl MarkMemory for Racing<'_> {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        if let Some((at, entry)) = self.change.get().filter(|(at, _)| *at == address.0) {
            self.guest.store(at, entry);
        }
        self.places.borrow_mut().push(address.0);
        self.guest.view().compare_exchange_entry(address, layout, old, new)
    }
}

/// The entries on the way to a page, from the root down.
fn way_to(guest: &Guest, iova: u64) -> [u64; 4] {
    [3, 2, 1, 0].map(|height| guest.slot(iova, height).0)
}

/// Entries that were never used, on the way to a page.
fn put_unused(guest: &Guest, iova: u64, page: u64) -> [u64; 4] {
    guest.put(iova, 0, page & !A & !D);
    let way = way_to(guest, iova);
    way[..3].iter().for_each(|at| guest.store(*at, guest.load(*at) & !A));
    way
}

fn live(guest: &Guest) -> Live<Heard> {
    super::space::live(guest, Way::table(format(&guest.config())), ShadowLimits::default(), Box::new(Unwatched))
}

#[test]
fn what_leads_to_a_leaf_is_marked_before_it() {
    let guest = Guest::new();
    let way = put_unused(&guest, 0x1000, (DATA + 0x1000) | RW);
    let mut live = live(&guest);
    let racing = Racing { guest: &guest, change: Cell::new(None), places: RefCell::default() };
    let page = Span { first: 0x1000, last: 0x1fff };
    assert_eq!(live.mark_all(&racing, page), MarksWritten { accessed: 1, dirty: 1, tables: 3, earlier: 0, skipped: 0 });
    assert_eq!(racing.places.take(), way);
    // What has its mark is not touched.
    assert_eq!(live.mark_all(&racing, page), MarksWritten::default());
    assert!(racing.places.take().is_empty());
    // A leaf that was marked long ago was used all the same.
    guest.store(way[1], guest.load(way[1]) & !A);
    live.invalidate(&guest.view(), &[range(0x1000, 0x1fff, false)]).unwrap();
    assert_eq!(live.mark_all(&racing, page), MarksWritten { tables: 1, ..MarksWritten::default() });
    assert_eq!(racing.places.take(), [way[1]]);
}

#[test]
fn an_entry_that_the_guest_changed_is_left_alone_wherever_it_stands() {
    for changed in 0..4 {
        for gone in [false, true] {
            let guest = Guest::new();
            let way = put_unused(&guest, 0x1000, (DATA + 0x1000) | RW);
            let before = way.map(|at| guest.load(at));
            let mut live = live(&guest);
            // The guest takes the entry away, or writes one of its own bits.
            let entry = if gone { 0 } else { before[changed] | 1 << 9 };
            let racing = Racing { guest: &guest, change: Cell::new(Some((way[changed], entry))), places: RefCell::default() };
            let written = live.mark_all(&racing, Span { first: 0x1000, last: 0x1fff });
            let marks = |index: usize| if index == 3 { A | D } else { A };
            let wanted: [u64; 4] = std::array::from_fn(|index| if index == changed { entry } else { before[index] | marks(index) });
            assert_eq!(way.map(|at| guest.load(at)), wanted, "{changed}, gone {gone}");
            let (tables, leaf) = if changed == 3 { (3, 0) } else { (2, 1) };
            assert_eq!(written, MarksWritten { accessed: leaf, dirty: leaf, tables, earlier: 0, skipped: 1 }, "{changed}, gone {gone}");
        }
    }
}

/// Tables that lead to nothing, or to nothing that was used.
#[test]
fn entries_that_lead_to_no_leaf_are_not_marked() {
    let guest = Guest::new();
    let way = put_unused(&guest, 0x1000, (DATA + 0x1000) | RO);
    // A table without an entry beside it, one with a page that nobody may use, and one with a page elsewhere.
    let [empty, supervisor, other] = [1 << 21, 2 << 21, 3 << 21].map(|iova| {
        let way = put_unused(&guest, iova, (DATA + 0x2000) | RW);
        guest.put(iova, 0, [0, (DATA | RW) & !(1 << 2) & !A, DATA | RO & !A][(iova >> 21) as usize - 1]);
        way
    });
    let mut live = live(&guest);
    let all_but_other = Span { first: 0, last: (3 << 21) - 1 };
    assert_eq!(live.mark_all(&guest.view(), all_but_other), MarksWritten { accessed: 1, dirty: 0, tables: 3, earlier: 0, skipped: 0 });
    assert_eq!(way.map(|at| guest.load(at) & (A | D)), [A; 4]);
    assert_eq!([empty, supervisor, other].map(|way| guest.load(way[2]) & A), [0; 3]);
    assert_eq!(guest.load(supervisor[3]) & A, 0);
    assert_eq!(live.mark_all(&guest.view(), Span::ALL), MarksWritten { accessed: 1, dirty: 0, tables: 1, earlier: 0, skipped: 0 });
    // Large pages: their entry is a leaf.
    guest.put(4 << 21, 1, 0x100_0000 | RW & !A & !D | PS);
    live.synchronise(&guest.view()).unwrap();
    assert_eq!(live.mark_all(&guest.view(), Span::ALL), MarksWritten { accessed: 1, dirty: 1, tables: 0, earlier: 0, skipped: 0 });
}

/// Two address spaces follow the same tables, and one of these tables stands in two places.
#[test]
fn what_somebody_else_has_marked_is_no_change_by_the_guest() {
    let guest = Guest::new();
    let way = put_unused(&guest, 0x1000, (DATA + 0x1000) | RW);
    // The root's second entry points to the same table.
    guest.store(guest.root() + 8, guest.load(way[0]));
    let again = 1 << 39 | 0x1000;
    let look = |space: &mut Space| space.synchronise(&guest.view(), Span::ALL, false, &Budget::new(Limits::default()), &mut Changes::new());
    let [mut one, mut other] = [(); 2].map(|()| {
        let way = Way::table(format(&guest.config()));
        let mut space = Space::open(way, Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        look(&mut space);
        space
    });
    let mark = |space: &mut Space, iova: u64, dirty: bool| {
        let (budget, mut written) = (Budget::new(Limits::default()), MarksWritten::default());
        let marked = Marked { iova: Span { first: iova, last: iova }, accessed: true, dirty };
        space.mark(&guest.view(), marked, &budget, &mut written);
        written
    };
    assert_eq!(mark(&mut one, 0x1000, false), MarksWritten { accessed: 1, dirty: 0, tables: 3, earlier: 0, skipped: 0 });
    assert_eq!(mark(&mut one, again, true), MarksWritten { accessed: 0, dirty: 1, tables: 1, earlier: 0, skipped: 0 });
    assert_eq!(way.map(|at| guest.load(at) & (A | D)), [A, A, A, A | D]);
    assert_eq!(mark(&mut other, 0x1000, true), MarksWritten::default());
    // A write that only the other one knows of.
    guest.put(0x1000, 0, (DATA + 0x1000) | RW & !A & !D);
    [&mut one, &mut other].into_iter().for_each(look);
    assert_eq!(mark(&mut one, 0x1000, false), MarksWritten { accessed: 1, ..MarksWritten::default() });
    assert_eq!(mark(&mut other, 0x1000, true), MarksWritten { dirty: 1, ..MarksWritten::default() });
    assert_eq!(guest.load(way[3]) & (A | D), A | D);
}
