//! What a requester's DMA gets besides one table: two stages, windows, everything, nothing, and addresses that something else serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{Direct, Outcome, TableConfig, Tag, Translated};
use stagecraft::sync::{CommitError, Live, Reason, Report, ShadowLimits, Sink, Space, Unwatched, Watcher, Way};
use stagecraft::table::{Format, Intercept, Mapping, Window};
use stagecraft::{Access, Attributes, Change, Gpa, Span};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::walk::Walker;

use super::behaviour::{Watched, range};
use super::equality::seeds;
use super::guest::{DATA, Guest, MEMORY, PS, RO, RW};
use super::stages::{Both, Pair, both_writable};
use super::support::{Failing, Model, View, append, format};
use crate::configs::plugin_config;

/// A sink that insists on the order of changes, and keeps what they say.
#[derive(Default)]
pub struct Heard(pub Model);

impl Sink for Heard {
    fn apply(&mut self, batch: &[Change]) {
        self.0.apply(batch);
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(())
    }
}

/// Read, and read and write, of a second stage.
pub const R: u64 = 0b01;
pub const BOTH: u64 = 0b11;

/// VT-d second-stage tables in the memory of a guest that has first-stage tables, too.
pub struct Second<'a> {
    guest: &'a Guest,
    pub root: u64,
}

impl<'a> Second<'a> {
    /// All of memory where it is, in pages of 2 MiB.
    pub fn identity(guest: &'a Guest) -> Self {
        let second = Self { guest, root: guest.table() };
        for address in (0..MEMORY).step_by(2 << 20) {
            second.set(address, 1, address | BOTH | PS);
        }
        second
    }

    pub fn slot(&self, input: u64, height: u32) -> u64 {
        let mut table = self.root;
        for above in (height + 1..4).rev() {
            let slot = table + (input >> (12 + 9 * above) & 0x1ff) * 8;
            if self.guest.load(slot) == 0 {
                self.guest.store(slot, self.guest.table() | BOTH);
            }
            table = self.guest.load(slot) & 0x000f_ffff_ffff_f000;
        }
        table + (input >> (12 + 9 * height) & 0x1ff) * 8
    }

    pub fn set(&self, input: u64, height: u32, entry: u64) -> Gpa {
        let slot = self.slot(input, height);
        self.guest.store(slot, entry);
        Gpa(slot)
    }

    /// Small pages in place of a large one.
    pub fn split(&self, input: u64) {
        let large = self.guest.load(self.slot(input, 1));
        let table = self.guest.table();
        (0..512).for_each(|index| self.guest.store(table + index * 8, (large & !PS) + (index << 12)));
        self.set(input, 1, table | BOTH);
    }

    pub fn config(&self) -> TableConfig {
        TableConfig::new("intel-vtd/second-stage", &[("levels", 4), ("root", self.root)])
    }

    pub fn way(&self) -> Way {
        Way::tables(format(&self.guest.config()), format(&self.config()))
    }
}

pub fn live(guest: &Guest, way: Way, limits: ShadowLimits, watcher: Box<dyn Watcher>) -> Live<Heard> {
    let space = Space::open(way, Guest::map(), limits, watcher).unwrap();
    let mut live = Live::new(space, Heard::default(), Tag::default(), 0, 1 << 10);
    live.synchronise(&guest.view()).unwrap();
    live
}

pub fn second_stage(input: u64, bytes: u64) -> Invalidation {
    let scope = Scope { leaf: false, second_stage: true, domain: None, space: None, id: None };
    Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first: input, last: input + (bytes - 1) } } }
}

fn goes(live: &Live<Heard>, iova: u64) -> Option<(u64, Access)> {
    let piece = live.sink().0.pieces.range(..=iova).next_back().map(|(_, piece)| *piece).filter(|piece| piece.iova.contains(iova))?;
    Some((piece.address + (iova - piece.iova.first), piece.attributes.access(false)))
}

const READ_WRITE: Access = Access { read: true, write: true };

#[test]
fn a_change_of_the_second_stage_is_told_for_what_passes_through_it() {
    let guest = Guest::new();
    (0..64).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    let second = Second::identity(&guest);
    let mut live = live(&guest, second.way(), ShadowLimits::default(), Box::new(Unwatched));
    assert_eq!(live.sink().0.pieces.len(), 64);
    // In small pages the same is the same.
    second.split(DATA);
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(DATA, 2 << 20)]).unwrap().changes, 0);
    // One page goes elsewhere, and is seen at each of its two IOVAs; and another one may not be written.
    guest.put(1 << 30, 0, DATA | RO);
    assert_eq!(live.invalidate(&guest.view(), &[range(1 << 30, 1 << 30, false)]).unwrap().changes, 1);
    second.set(DATA, 0, (DATA + 0x40_0000) | BOTH);
    second.set(DATA + 0x1000, 0, (DATA + 0x1000) | R);
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(DATA + 0x2000, 0x1000)]).unwrap().changes, 0, "another page");
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(DATA, 0x1000)]).unwrap().changes, 4);
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(DATA, 0x2000)]).unwrap().changes, 2);
    assert_eq!(goes(&live, 0x123), Some((DATA + 0x40_0123, READ_WRITE)));
    assert_eq!(goes(&live, (1 << 30) | 0x456), Some((DATA + 0x40_0456, Access::READ)));
    assert_eq!(goes(&live, 0x1000), Some((DATA + 0x1000, Access::READ)));
    // Where the second stage ends, so does the first.
    second.set(DATA, 1, 0);
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(DATA, 2 << 20)]).unwrap().changes, 65);
    assert!(live.sink().0.pieces.is_empty());
}

#[test]
fn first_stage_tables_are_where_the_second_stage_puts_them() {
    let (guest, watched) = (Guest::new(), Watched::default());
    (0..64).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    let second = Second::identity(&guest);
    let table = guest.slot(0, 0).0;
    second.split(table);
    let mut live = live(&guest, second.way(), ShadowLimits::default(), Box::new(watched.clone()));
    let is_watched = |page: u64| watched.0.lock().unwrap().contains(&Gpa(page));
    // Four tables of the first stage; of the second the three on the way, and the one of the split.
    assert_eq!(watched.0.lock().unwrap().len(), 8);
    // The last table of the first stage is somewhere else now, with the same entries.
    let moved = guest.table();
    (0..512).for_each(|index| guest.store(moved + index * 8, guest.load(table + index * 8)));
    let slot = second.set(table, 0, moved | BOTH);
    assert_eq!(live.table_written(&guest.view(), slot, 8).unwrap().changes, 0);
    assert!(is_watched(moved) && !is_watched(table) && watched.0.lock().unwrap().len() == 8);
    guest.store(table, 0);
    assert_eq!(live.table_written(&guest.view(), Gpa(table), 4096).unwrap().changes, 0, "no table is there any more");
    guest.store(moved + 8, 0);
    assert_eq!(live.table_written(&guest.view(), Gpa(moved + 8), 8).unwrap().changes, 1);
    // An entry that is different there is seen when the page moves back, without a word about the first stage.
    guest.store(table + 8, guest.load(table + 16));
    second.set(table, 0, table | BOTH);
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(table, 0x1000)]).unwrap().changes, 2, "entry 0 is gone, entry 1 came");
    assert_eq!((goes(&live, 0), goes(&live, 0x1000)), (None, Some((DATA + 0x2000, READ_WRITE))));
    // Tables that may not be read are none; where they may be again, they are.
    for (access, changes) in [(BOTH & !R, 63), (R, 63)] {
        let slot = second.set(table, 0, table | access);
        assert_eq!(live.table_written(&guest.view(), slot, 8).unwrap().changes, changes);
        assert_eq!(is_watched(table), access == R);
    }
    assert_eq!(*watched.0.lock().unwrap(), live.space().watched_pages().collect());
    drop(live);
    assert!(watched.0.lock().unwrap().is_empty());
}

#[test]
fn limits_hold_for_both_stages_together() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    second.split(DATA);
    // Two large pages to what are 512 small ones.
    let large = [0, 2 << 20];
    large.iter().for_each(|iova| guest.put(*iova, 1, DATA | RW | PS));
    let limits = ShadowLimits { table_pages: 16, leaves: 700 };
    let mut live = live(&guest, second.way(), limits, Box::new(Unwatched));
    assert_eq!(live.sink().0.pieces.len(), 700);
    let report = live.synchronise(&guest.view()).unwrap();
    let told: Vec<_> = report.blocked.iter().map(|blocked| (blocked.stage, blocked.reason)).collect();
    assert_eq!((report.changes, told), (0, vec![(1, Reason::Leaves)]));
    assert_eq!(
        report.blocked[0].iova,
        Span { first: (2 << 20) + (188 << 12), last: (2 << 20) + (189 << 12) - 1 },
        "from the first page that has no room"
    );
    // Another range is not looked at, and does not hear of it.
    assert_eq!(live.invalidate(&guest.view(), &[range(0, 0xfff, false)]).unwrap().blocked_count, 0);
    // Room comes.
    guest.put(0, 1, 0);
    let report = live.invalidate(&guest.view(), &[range(0, 0x3f_ffff, false)]).unwrap();
    assert_eq!((report.changes, report.blocked_count), (512 + 324, 0));
    assert_eq!(live.sink().0.pieces.len(), 512);
    // Leaves of both stages count: 513 for these tables, 700 may be.
    (0..512).for_each(|index| guest.put((8 << 30) | index << 12, 0, (DATA + (index << 12)) | RO));
    let report = live.synchronise(&guest.view()).unwrap();
    assert!(report.blocked_count > 0 && live.space().figures().leaves == 700, "{report:?}");
}

#[test]
fn pages_of_tables_of_both_stages_count() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    (0..512).for_each(|index| guest.put((8 << 30) | index << 12, 0, (DATA + (index << 12)) | RO));
    let mut live = live(&guest, second.way(), ShadowLimits { table_pages: 16, leaves: 1 << 20 }, Box::new(Unwatched));
    // The root of the first stage counts twice: it has two halves.
    assert_eq!(live.space().figures().table_pages, 5 + 3);
    (0..16).for_each(|index| second.split(index * (2 << 20)));
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!(report.blocked_count, 8, "eight of sixteen have room");
    assert!(report.blocked.iter().all(|blocked| (blocked.stage, blocked.reason) == (2, Reason::TablePages)), "{report:?}");
    assert_eq!(live.space().figures().table_pages, 16);
    // A table of the first stage waits for one of the second to go.
    guest.put(16 << 30, 0, DATA | RW);
    let report = live.invalidate(&guest.view(), &[range(16 << 30, 16 << 30, false)]).unwrap();
    assert_eq!((report.blocked[0].stage, report.blocked[0].reason), (1, Reason::TablePages));
    for index in 5..16 {
        second.set(index * (2 << 20), 1, 0);
    }
    live.synchronise(&guest.view()).unwrap();
    assert_eq!(live.synchronise(&guest.view()).unwrap().blocked_count, 0);
    assert_eq!(goes(&live, 16 << 30), Some((DATA, READ_WRITE)));
}

/// Marks of the first stage's entries, and of the second's.
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const SECOND_A: u64 = 1 << 8;
const SECOND_D: u64 = 1 << 9;

#[test]
fn marks_go_to_both_stages() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    (0..2).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW & !A & !D));
    let marking = TableConfig::new("intel-vtd/second-stage", &[("levels", 4), ("root", second.root), ("accessed-dirty", 1)]);
    let mut live = live(&guest, Way::tables(format(&guest.config()), format(&marking)), ShadowLimits::default(), Box::new(Unwatched));
    let marks = |live: &mut Live<Heard>| {
        let written = live.mark_all(&guest.view(), Span { first: 0x1000, last: 0x1fff });
        (written.accessed, written.dirty, written.skipped)
    };
    let first = |index: u64| guest.load(guest.slot(index << 12, 0).0) & (A | D);
    let outer = |address: u64| guest.load(second.slot(address, 1)) & (SECOND_A | SECOND_D);
    // The page's entry, the second stage's for the page, and the second stage's for the page that the entry is in.
    assert_eq!(marks(&mut live), (3, 3, 0));
    assert_eq!((first(0), first(1)), (0, A | D));
    assert_eq!([DATA, super::guest::ROOT, 0x100_0000].map(outer), [SECOND_A | SECOND_D, SECOND_A | SECOND_D, 0]);
    assert_eq!(marks(&mut live), (0, 0, 0));
    assert_eq!(live.synchronise(&guest.view()).unwrap().changes, 0, "the engine's own writes are no changes by the guest");
    // Marks that the guest takes away are told, of either stage, so that whoever follows begins anew: one page, and both.
    guest.put(0x1000, 0, (DATA + 0x1000) | RW & !D);
    assert_eq!(live.invalidate(&guest.view(), &[range(0x1000, 0x1fff, true)]).unwrap().changes, 2);
    second.set(DATA, 1, DATA | BOTH | PS);
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(DATA, 2 << 20)]).unwrap().changes, 4);
    assert_eq!(marks(&mut live), (1, 2, 0));
    // An entry that the second stage does not let hardware write is nothing that could be used.
    let table = guest.slot(0, 0).0 & !0x1f_ffff;
    second.set(table, 1, table | R | PS);
    guest.put(0x1000, 0, (DATA + 0x1000) | RW & !A & !D);
    live.synchronise(&guest.view()).unwrap();
    assert_eq!(marks(&mut live), (0, 0, 0));
    assert_eq!(goes(&live, 0x1000), None, "hardware faults where it cannot set a mark");
}

/// A mark that the guest takes away in the second stage is told although, in the same batch, the first stage says the same in pages of another size.
#[test]
fn a_mark_that_is_taken_away_is_told_whatever_else_is_in_the_batch() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    second.split(DATA);
    guest.put(0, 1, DATA | RW | PS);
    let marking = TableConfig::new("intel-vtd/second-stage", &[("levels", 4), ("root", second.root), ("accessed-dirty", 1)]);
    let mut live = live(&guest, Way::tables(format(&guest.config()), format(&marking)), ShadowLimits::default(), Box::new(Unwatched));
    let block = Span { first: 0, last: (2 << 20) - 1 };
    live.mark_all(&guest.view(), block);
    assert_eq!(guest.load(second.slot(DATA + 0x1000, 0)) & (SECOND_A | SECOND_D), SECOND_A | SECOND_D);
    live.synchronise(&guest.view()).unwrap();
    second.set(DATA + 0x1000, 0, (DATA + 0x1000) | BOTH);
    guest.split(0);
    let batch = [range(block.first, block.last, false), second_stage(DATA + 0x1000, 0x1000)];
    assert_eq!(live.invalidate(&guest.view(), &batch).unwrap().changes, 2, "one page is unmapped and mapped again");
    assert_eq!(live.sink().0.pieces.len(), 512);
}

#[test]
fn memory_that_goes_takes_targets_and_tables_of_both_stages_along() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    (0..4).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    let mut live = live(&guest, second.way(), ShadowLimits::default(), Box::new(Unwatched));
    let without = |page: u64| {
        let ram = |first, last| Region { kind: Kind::Ram, span: Span { first, last } };
        MemoryMap::new(vec![ram(0, page - 1), ram(page + 0x1000, MEMORY - 1)]).unwrap()
    };
    let pieces = |live: &Live<Heard>| live.sink().0.pieces.len();
    for (page, left) in [(DATA + 0x1000, 3), (guest.slot(0, 0).0, 0), (second.root, 0), (0x100_0000, 4)] {
        live.memory_changed(&guest.view(), without(page)).unwrap();
        assert_eq!(pieces(&live), left, "without {page:#x}");
        live.memory_changed(&guest.view(), Guest::map()).unwrap();
        assert_eq!(pieces(&live), 4, "{page:#x} is there again");
    }
    // Windows, and one table that something is cut out of.
    live.switch(Way::bypass(), &guest.view()).unwrap();
    live.memory_changed(&guest.view(), without(DATA)).unwrap();
    assert_eq!((pieces(&live), goes(&live, DATA)), (2, None));
    let cut = Way::table(format(&guest.config())).with_intercepts(vec![intercept(0, !0xfff, 0x2000)]);
    live.switch(cut, &guest.view()).unwrap();
    assert_eq!((pieces(&live), goes(&live, 0)), (2, None));
    live.memory_changed(&guest.view(), Guest::map()).unwrap();
    assert_eq!((pieces(&live), goes(&live, 0), goes(&live, 0x2000)), (3, Some((DATA, READ_WRITE)), None));
}

/// Windows as somebody would who looks at each page.
fn windows_by_page(windows: &[Window], intercepts: &[Intercept], map: &MemoryMap, pages: impl Iterator<Item = u64>) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    for iova in pages {
        let caught = intercepts.iter().any(|intercept| iova & intercept.mask == intercept.value);
        let Some(window) = windows.iter().find(|window| window.iova.contains(iova)).filter(|_| !caught) else { continue };
        let address = window.address + (iova - window.iova.first);
        if map.target(address).is_some() {
            let iova = Span { first: iova, last: iova | 0xfff };
            append(&mut mappings, Mapping { iova, address, access: window.attributes.access(false) });
        }
    }
    mappings
}

pub fn intercept(passed: u8, mask: u64, value: u64) -> Intercept {
    Intercept { passed, mask, value: value & mask, server: "something else".to_owned(), address: None, section: String::new() }
}

#[test]
fn windows_and_what_is_cut_out_of_them() {
    let guest = Guest::new();
    let region = |kind, first, last| Region { kind, span: Span { first, last } };
    let map =
        MemoryMap::new(vec![region(Kind::Ram, 0, 0x3f_ffff), region(Kind::Table, 0x40_0000, 0x40_ffff), region(Kind::Device, 0x41_0000, 0x5f_ffff)])
            .unwrap();
    let space = Space::new(map.clone(), ShadowLimits::default(), Box::new(Unwatched));
    let mut live = Live::new(space, Heard::default(), Tag::default(), 0, 1 << 10);
    let mut rng = Rng::new(7);
    for round in 0..200 {
        let mut next = 0;
        let windows: Vec<Window> = (0..1 + rng.below(4))
            .map(|_| {
                let first = next + (rng.below(64) << 12);
                let last = first + ((1 + rng.below(512)) << 12) - 1;
                next = last + 1;
                let attributes = rng.pick(&[Attributes::READ, Attributes::READ.with(Attributes::WRITE)]);
                Window { iova: Span { first, last }, address: rng.below(0x600) << 12, attributes }
            })
            .collect();
        let intercepts: Vec<Intercept> = (0..rng.below(3)).map(|_| intercept(0, !0xfff & !(rng.below(16) << 13), rng.below(0x400) << 12)).collect();
        let outcome = Outcome::Direct(Direct { windows: windows.clone(), intercepts: intercepts.clone() });
        let way = || Way::of(&outcome, |_| Err("there are no tables")).unwrap();
        live.switch(way(), &guest.view()).unwrap();
        let expected = windows_by_page(&windows, &intercepts, &map, (0..next).step_by(0x1000));
        assert_eq!(live.sink().0.mappings(), expected, "round {round}: {windows:x?} without {intercepts:x?}");
        assert_eq!(live.switch(way(), &guest.view()).unwrap().changes, 0, "the same");
        assert_eq!(live.synchronise(&guest.view()).unwrap().changes, 0, "round {round}");
    }
    // Two that overlap, and one that does not end.
    let window = |first, last, address| Window { iova: Span { first, last }, address, attributes: Attributes::READ };
    live.switch(Way::direct(vec![window(0x1000, 0x2fff, 0), window(0x2000, 0x3fff, 0), window(0x8000, u64::MAX, 0x8001)]), &guest.view()).unwrap();
    assert_eq!(live.sink().0.mappings().len(), 1);
}

/// One guest's DMA takes every way to memory; each byte that goes where it went before is not told of.
#[test]
fn what_stays_the_same_is_not_told_when_all_else_changes() {
    let (guest, watched) = (Guest::new(), Watched::default());
    let second = Second::identity(&guest);
    (0..16).for_each(|index| second.split(index * (2 << 20)));
    (0..64).for_each(|index| guest.put(DATA + (index << 12), 0, (DATA + (index << 12)) | RW));
    let mut live = live(&guest, Way::blocked(), ShadowLimits::default(), Box::new(watched.clone()));
    let mut switch = |way: Way| {
        let report = live.switch(way, &guest.view()).unwrap();
        (report.changes, live.sink().0.pieces.len(), watched.0.lock().unwrap().len())
    };
    let table = || Way::table(format(&guest.config()));
    let five = TableConfig::new("intel-vtd/first-stage", &[("levels", 5), ("root", guest.table())]);
    guest.store(five.settings.get("root").unwrap(), guest.root() | 0b10_0111);
    let page = Window { iova: Span { first: DATA, last: DATA + 0xfff }, address: DATA, attributes: Attributes::READ.with(Attributes::WRITE) };
    assert_eq!(switch(Way::blocked()), (0, 0, 0));
    assert_eq!(switch(Way::bypass()), (1, 1, 0));
    assert_eq!(switch(table()), (65, 64, 4));
    assert_eq!(switch(second.way()), (0, 64, 4 + 3 + 16), "the second stage moves nothing");
    assert_eq!(switch(second.way()), (0, 64, 23));
    assert_eq!(switch(table()), (0, 64, 4));
    assert_eq!(switch(Way::table(format(&five))), (0, 64, 5), "a table of another shape");
    assert_eq!(switch(table()), (0, 64, 4));
    // Something else serves a page, and then another one.
    let caught = |way: Way, page: u64| way.with_intercepts(vec![intercept(1, !0xfff, DATA + (page << 12))]);
    assert_eq!(switch(caught(table(), 3)), (1, 63, 4));
    assert_eq!(switch(caught(table(), 4)), (2, 63, 4));
    assert_eq!(switch(caught(second.way(), 4)), (0, 63, 23));
    assert_eq!(switch(caught(second.way(), 5)), (2, 63, 23));
    assert_eq!(switch(caught(table(), 1000)), (1, 64, 4));
    let mut alike = page;
    alike.attributes = live_attributes(&guest);
    assert_eq!(switch(Way::direct(vec![alike])), (63, 1, 0), "a window that is a page of the table");
    assert_eq!(switch(second.way()), (63, 64, 23));
    assert_eq!(switch(Way::blocked()), (64, 0, 0));
    assert_eq!(goes(&live, DATA), None);
}

/// What a page of the guest's table allows, all of it.
fn live_attributes(guest: &Guest) -> Attributes {
    let live = live(guest, Way::table(format(&guest.config())), ShadowLimits::default(), Box::new(Unwatched));
    live.sink().0.pieces[&DATA].attributes
}

#[test]
fn a_way_that_cannot_be_taken_changes_nothing() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    guest.put(0, 0, DATA | RW);
    let mut live = live(&guest, second.way(), ShadowLimits::default(), Box::new(Unwatched));
    let failing = |config: &TableConfig| -> Box<dyn Format> { Box::new(Failing::to_read(format(config), Arc::new(AtomicBool::new(true)))) };
    for way in [
        Way::tables(format(&guest.config()), failing(&second.config())),
        Way::tables(failing(&guest.config()), format(&second.config())),
        Way::table(failing(&guest.config())),
    ] {
        assert!(live.switch(way, &guest.view()).is_err());
        assert_eq!(live.synchronise(&guest.view()).unwrap(), Report::default());
        assert_eq!(goes(&live, 0), Some((DATA, READ_WRITE)));
    }
    // A format of the second stage that fails later blocks what it does not know, and comes back.
    let fails = Arc::new(AtomicBool::new(false));
    let outer = Box::new(Failing::to_read(format(&second.config()), Arc::clone(&fails)));
    assert_eq!(live.switch(Way::tables(format(&guest.config()), outer), &guest.view()).unwrap().changes, 0);
    fails.store(true, Ordering::Relaxed);
    second.set(DATA, 1, DATA | R | PS);
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!((report.changes, report.blocked[0].stage, report.blocked[0].reason), (1, 2, Reason::Format));
    assert!(live.reopen_stage(1, format(&second.config())).is_err() && live.reopen_stage(3, format(&second.config())).is_err());
    live.reopen_stage(2, format(&second.config())).unwrap();
    assert_eq!(live.synchronise(&guest.view()).unwrap().blocked_count, 0);
    assert_eq!(goes(&live, 0), Some((DATA, Access::READ)));
}

/// Of runs that do not overlap: the one that has this address.
fn run_of(runs: &[Run], address: u64) -> Option<&Run> {
    let index = runs.partition_point(|run| run.iova <= address).checked_sub(1)?;
    runs.get(index).filter(|run| address - run.iova < run.size)
}

/// Pages, one by one: through the first stage, through the second, and compared with intercepts at each place.
fn pages_by_hand(first: &[Run], second: &[Run], intercepts: &[Intercept]) -> Vec<Mapping> {
    let caught = |passed: u8, address: u64| intercepts.iter().any(|one| one.passed == passed && address & one.mask == one.value);
    let mut mappings: Vec<Mapping> = Vec::new();
    for inner in first {
        // The second stage has fewer pages than the first, whose runs may be of any length.
        let from = second.partition_point(|run| run.iova + (run.size - 1) < inner.address);
        for outer in second[from..].iter().take_while(|run| run.iova <= inner.address + (inner.size - 1)) {
            let (begin, last) = (outer.iova.max(inner.address), (outer.iova + (outer.size - 1)).min(inner.address + (inner.size - 1)));
            for intermediate in (begin & !0xfff..=last).step_by(0x1000).map(|page| page.max(begin)) {
                let iova = inner.iova + (intermediate - inner.address);
                let address = run_of(second, intermediate).map(|run| run.address + (intermediate - run.iova)).unwrap();
                let access = inner.access.and(outer.access);
                let access = Access { read: access.read, write: access.write };
                if access.is_none() || caught(0, iova) || caught(1, intermediate) || caught(2, address) {
                    continue;
                }
                let length = (intermediate | 0xfff).min(last) - intermediate;
                append(&mut mappings, Mapping { iova: Span { first: iova, last: iova + length }, address, access });
            }
        }
    }
    mappings
}

#[test]
fn what_is_intercepted_between_stages_and_beyond_them_is_not_mapped() {
    let mut caught = 0;
    for (pair, seed) in [Pair::Smmu, Pair::Vtd, Pair::Amd, Pair::Riscv].into_iter().flat_map(|pair| (0..seeds()).map(move |seed| (pair, seed))) {
        let mut rng = Rng::new(seed ^ 0x1c);
        let Both { first, second, memory, .. } = both_writable(pair, seed, &mut rng);
        let outer = Walker::new(&memory, std::slice::from_ref(&second)).unwrap().mappings().unwrap();
        let all = pages_by_hand(&first.truth, &outer, &[]);
        let tables = [first.config, second].map(|config| plugin_config(&config));
        let translated = |intercepts: Vec<Intercept>| Outcome::Tables(Translated { tables: tables.to_vec(), intercepts, tag: Tag::default() });
        let way = |intercepts: Vec<Intercept>| Way::of(&translated(intercepts), |config| Ok::<_, ()>(format(config))).unwrap();
        let space = Space::open(way(Vec::new()), MemoryMap::everything(52), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let mut live = Live::new(space, Heard::default(), Tag::default(), 0, 1 << 14);
        live.synchronise(&View(&memory)).unwrap();
        let same = |live: &Live<Heard>, expected: &[Mapping], what: &str| {
            super::equality::assert_same(&live.sink().0.mappings(), expected, &format!("{pair:?} seed {seed}: {what}"));
        };
        same(&live, &all, "at first");
        for round in 0..4 {
            let intercepts: Vec<Intercept> = (0..1 + rng.below(3))
                .filter_map(|_| {
                    // Around something that is mapped.
                    let mapping = if all.is_empty() { return None } else { rng.pick(&all) };
                    let offset = rng.below(mapping.iova.length_minus_one() + 1);
                    let inner = run_of(&first.truth, mapping.iova.first + offset)?;
                    let passed = rng.below(3) as u8;
                    let address = match passed {
                        0 => mapping.iova.first + offset,
                        1 => inner.address + (mapping.iova.first + offset - inner.iova),
                        _ => mapping.address + offset,
                    };
                    let ignored = rng.pick(&[0, 0x1000, 0x3000, 0xf_f000, 0x5_5000]);
                    Some(intercept(passed, !0xfff & !ignored, address))
                })
                .collect();
            live.switch(way(intercepts.clone()), &View(&memory)).unwrap();
            let expected = pages_by_hand(&first.truth, &outer, &intercepts);
            same(&live, &expected, &format!("round {round}, without {intercepts:x?}"));
            assert_eq!(live.synchronise(&View(&memory)).unwrap().changes, 0);
            caught += u64::from(expected != all);
        }
    }
    assert!(caught > 4 * seeds(), "{caught}");
}
