//! Many commands at once: the same as one after the other, with each entry read once.

use std::cell::RefCell;
use std::collections::BTreeMap;

use stagecraft::memory::{EntryLayout, EntryMemory, ReadError, VmMemory};
use stagecraft::plugin::queue::Invalidation;
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, ShadowLimits, Sink, Space, Unwatched, Way};
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Gpa, Span};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::GuestMemoryMmap;

use super::behaviour::range;
use super::guest::{DATA, Guest, MEMORY, PS, RO, RW};
use super::space::{BOTH, R, Second, second_stage};
use super::support::{Host, format};

/// Guest memory, and how often each entry was read.
struct Counted<'a> {
    memory: VmMemory<'a, GuestMemoryMmap>,
    reads: RefCell<BTreeMap<u64, u64>>,
}

impl EntryMemory for Counted<'_> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let mut reads = self.reads.borrow_mut();
        (0..entries.len()).for_each(|index| *reads.entry(address.0 + index as u64 * u64::from(layout.bytes)).or_default() += 1);
        self.memory.read_entries(address, layout, entries)
    }
}

fn live(guest: &Guest) -> Live<Host> {
    live_with(guest, ShadowLimits::default())
}

fn live_with(guest: &Guest, limits: ShadowLimits) -> Live<Host> {
    live_by(guest, Way::table(format(&guest.config())), limits)
}

fn live_by(guest: &Guest, way: Way, limits: ShadowLimits) -> Live<Host> {
    let host = Host::new(&TableConfig::new("intel-vtd/first-stage", &[("levels", 4)]), 4 << 20);
    let space = Space::open(way, Guest::map(), limits, Box::new(Unwatched)).unwrap();
    let mut live = Live::new(space, host, Tag::default(), 0, 1 << 10);
    live.synchronise(&guest.view()).unwrap();
    live
}

/// Three tables of pages side by side, one somewhere else, and large pages between.
const TABLES: [u64; 4] = [0, 1 << 21, 2 << 21, 5 << 30];

fn page(rng: &mut Rng) -> u64 {
    rng.pick(&TABLES) + (rng.below(512) << 12)
}

fn change(guest: &Guest, rng: &mut Rng, iova: u64) {
    let entry = DATA + (rng.below(4096) << 12);
    guest.set(iova, 0, rng.pick(&[0, entry | RW, entry | RO, entry | RW, 0]));
}

fn guest(rng: &mut Rng) -> Guest {
    let guest = Guest::new();
    for table in TABLES {
        for index in 0..512 {
            if rng.percent(70) {
                guest.put(table + (index << 12), 0, (DATA + (rng.below(4096) << 12)) | RW);
            }
        }
    }
    (3..9).for_each(|index| guest.put(index << 21, 1, (DATA + ((index % 8) << 21)) | RW | PS));
    guest
}

/// Pages and ranges, in no order and overlapping; and some commands for leaves only.
fn commands(rng: &mut Rng, changed: &[u64]) -> Vec<Invalidation> {
    let mut commands: Vec<Invalidation> = changed.iter().map(|iova| range(*iova, iova | 0xfff, rng.percent(50))).collect();
    for _ in 0..rng.below(6) {
        let first = page(rng);
        commands.push(range(first, first + (rng.below(700) << 12 | 0xfff), rng.percent(50)));
    }
    for index in (1..commands.len()).rev() {
        commands.swap(index, rng.below(index as u64 + 1) as usize);
    }
    commands
}

#[test]
fn a_batch_says_what_its_commands_say_one_by_one() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let guest = guest(&mut rng);
        let (mut together, mut apart) = (live(&guest), live(&guest));
        for round in 0..8 {
            let count = rng.pick(&[1, 3, 20, 200]);
            let changed: Vec<u64> = (0..count).map(|_| page(&mut rng)).collect();
            changed.iter().for_each(|iova| change(&guest, &mut rng, *iova));
            // A large page becomes another.
            if rng.percent(30) {
                guest.set(4 << 21, 1, (DATA + (rng.below(4) << 21)) | RW | PS);
            }
            let commands = commands(&mut rng, &changed);
            let calls = together.sink().committer.calls;
            together.invalidate(&guest.view(), &commands).unwrap();
            assert!(together.sink().committer.calls - calls <= 1, "seed {seed}: one call for a batch");
            for command in &commands {
                apart.invalidate(&guest.view(), &[*command]).unwrap();
            }
            let (one, other) = (together.sink().model.mappings(), apart.sink().model.mappings());
            assert!(one == other, "seed {seed}, round {round}: {} commands", commands.len());
            assert!(one == together.sink().walked(), "seed {seed}, round {round}: the host's table");
        }
        together.synchronise(&guest.view()).unwrap();
        apart.synchronise(&guest.view()).unwrap();
        assert!(together.sink().model.mappings() == apart.sink().model.mappings(), "seed {seed}: all that was not told");
    }
}

#[test]
fn what_commands_have_in_common_is_read_once() {
    for seed in 0..60 {
        let mut rng = Rng::new(!seed);
        let guest = guest(&mut rng);
        let mut live = live(&guest);
        for round in 0..8 {
            let count = rng.pick(&[1, 5, 40, 400]);
            let changed: Vec<u64> = (0..count).map(|_| page(&mut rng)).collect();
            changed.iter().for_each(|iova| change(&guest, &mut rng, *iova));
            let memory = Counted { memory: guest.view(), reads: RefCell::default() };
            live.invalidate(&memory, &commands(&mut rng, &changed)).unwrap();
            let reads = memory.reads.into_inner();
            let again = reads.iter().find(|(_, count)| **count > 1);
            assert_eq!(again, None, "seed {seed}, round {round}: an entry that is read again");
            assert!(!reads.is_empty());
        }
    }
}

/// Where one of several commands for the same pages is for tables, these are looked at, whichever comes first.
#[test]
fn of_commands_that_overlap_one_may_be_for_tables() {
    for turned in [false, true] {
        let guest = Guest::new();
        guest.put(0, 0, DATA | RW);
        let mut live = live(&guest);
        guest.set(0, 1, guest.table() | 0b10_0111);
        let mut commands = [range(0, 0xfff, true), range(0, 0x1fff, false)];
        assert_eq!(live.invalidate(&guest.view(), &commands[..1]).unwrap().changes, 0, "the same tables, as the guest says");
        if turned {
            commands.reverse();
        }
        assert_eq!(live.invalidate(&guest.view(), &commands).unwrap().changes, 1, "turned: {turned}");
        assert!(live.sink().walked().is_empty(), "turned: {turned}");
    }
}

/// Where there is one table, commands for a second stage are for its pages as well.
#[test]
fn of_one_table_commands_may_name_either_stage() {
    let guest = Guest::new();
    (0..4).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    let mut live = live(&guest);
    (0..3).for_each(|index| guest.put(index << 12, 0, 0));
    assert_eq!(live.invalidate(&guest.view(), &[second_stage(0, 0x1000)]).unwrap().changes, 1);
    assert_eq!(live.invalidate(&guest.view(), &[range(0x1000, 0x1fff, true), second_stage(0x2000, 0x1000)]).unwrap().changes, 2);
    assert_eq!(live.sink().model.pieces.keys().copied().collect::<Vec<_>>(), [0x3000]);
}

/// What stands between the entries that commands mean may have been read with them, and is not used: only what was told is seen.
#[test]
fn what_no_command_means_is_not_seen() {
    let guest = guest(&mut Rng::new(1));
    (0..512).for_each(|index| guest.put(index << 12, 0, DATA | RW));
    let mut live = live(&guest);
    (0..512).for_each(|index| guest.put(index << 12, 0, 0));
    let commands: Vec<Invalidation> = (0..512).step_by(3).map(|index| range(index << 12, index << 12 | 0xfff, true)).collect();
    assert_eq!(live.invalidate(&guest.view(), &commands).unwrap().changes, commands.len() as u64);
    let left = live.sink().model.pieces.range(..1 << 21).map(|(first, _)| first >> 12).collect::<Vec<u64>>();
    assert_eq!(left, (0..512).filter(|index| index % 3 != 0).collect::<Vec<u64>>());
    assert_eq!(live.space().figures().blocked, 0);
}

/// Pages that come and go one by one, where the last one was: the host's table stays as long as it has one, and goes with the last; what comes to its number and its memory is another table.
#[test]
fn a_table_goes_with_its_last_page() {
    let mut host = Host::new(&TableConfig::new("intel-vtd/first-stage", &[("levels", 4)]), 1 << 20);
    let piece = |iova: u64| Piece { iova: Span { first: iova, last: iova | 0xfff }, address: DATA + (iova & 0xf_f000), attributes: Attributes::READ };
    for round in 0..4 {
        let base = round << 30;
        for iova in [base, base + 0x1000, base + 0x5000] {
            host.apply(&[Change::Map(piece(iova))]);
        }
        for (left, iova) in [(2, base + 0x1000), (1, base), (0, base + 0x5000)] {
            host.apply(&[Change::Unmap(piece(iova).iova)]);
            host.commit().unwrap();
            assert_eq!((!host.walked().is_empty(), host.table.figures().tables > 1), (left > 0, left > 0), "{left} left");
        }
        // Where it was there is another one now, and this one is somewhere else.
        host.apply(&[Change::Map(piece(7 << 39))]);
        host.apply(&[Change::Map(piece(base))]);
        assert!(host.walked() == host.model.mappings());
        host.apply(&[Change::Unmap(piece(7 << 39).iova)]);
        host.apply(&[Change::Unmap(piece(base).iova)]);
        host.commit().unwrap();
        assert_eq!(host.table.figures().tables, 1, "the root is left");
    }
}

/// What entries stood for is forgotten with the format that said so, also of patterns that no entry has at that moment.
#[test]
fn another_format_is_asked_about_patterns_that_were_known() {
    const CACHE_DISABLE: u64 = 1 << 4;
    let guest = Guest::new();
    guest.put(0, 0, DATA | RW);
    guest.put(0x1000, 0, (DATA + 0x1000) | RW | CACHE_DISABLE);
    let way =
        |types: u64| Way::table(format(&TableConfig::new("intel-vtd/first-stage", &[("levels", 4), ("root", guest.root()), ("memory-type", types)])));
    let mut live = live(&guest);
    guest.put(0x1000, 0, 0);
    live.synchronise(&guest.view()).unwrap();
    live.switch(way(1), &guest.view()).unwrap();
    let slot = guest.set(0x1000, 0, (DATA + 0x1000) | RW | CACHE_DISABLE);
    live.table_written(&guest.view(), slot, 8).unwrap();
    let mut fresh = self::live(&guest);
    fresh.switch(way(1), &guest.view()).unwrap();
    assert_eq!(live.sink().model.pieces, fresh.sink().model.pieces);
    assert_ne!(live.sink().model.pieces[&0x1000].attributes, live.sink().model.pieces[&0].attributes, "not cached");
}

/// The limit of leaves holds for pages that come one by one, with patterns that are known.
#[test]
fn a_known_page_beyond_the_limit_is_blocked() {
    let guest = Guest::new();
    (0..4).for_each(|index| guest.put(index << 12, 0, DATA | RW));
    let mut live = live_with(&guest, ShadowLimits { leaves: 4, ..ShadowLimits::default() });
    let slot = guest.set(4 << 12, 0, DATA | RW);
    let report = live.table_written(&guest.view(), slot, 8).unwrap();
    assert_eq!((report.changes, report.blocked_count, live.space().figures().leaves), (0, 1, 4));
    let gone = guest.set(0, 0, 0);
    live.table_written(&guest.view(), gone, 8).unwrap();
    let report = live.invalidate(&guest.view(), &[range(4 << 12, (5 << 12) - 1, true)]).unwrap();
    assert_eq!((report.changes, report.blocked_count, live.space().figures().leaves), (1, 0, 4));
    assert_eq!(live.space().figures().blocked, 0);
}

/// Blocks of a second stage that are pages, of which some go elsewhere, allow less or are gone.
const SPLIT: std::ops::Range<u64> = 0..6;

fn behind(guest: &Guest) -> Second<'_> {
    let second = Second::identity(guest);
    SPLIT.for_each(|block| second.split(DATA + (block << 21)));
    second
}

/// Changes some pages of the second stage; the commands for them, in no order and with larger ranges among them.
fn change_second(second: &Second<'_>, rng: &mut Rng) -> Vec<Invalidation> {
    let mut commands = Vec::new();
    for _ in 0..rng.pick(&[0, 1, 5, 40]) {
        let input = DATA + (rng.below(SPLIT.end * 512) << 12);
        let target = DATA + (rng.below(4096) << 12);
        second.set(input, 0, rng.pick(&[0, target | BOTH, target | R, input | BOTH, input | BOTH]));
        let bytes = rng.pick(&[0x1000, 0x1000, 0x1_0000, 0x40_0000]);
        commands.push(second_stage(input & !(bytes - 1), bytes));
    }
    commands
}

#[test]
fn a_batch_for_two_stages_says_what_its_commands_say_one_by_one() {
    for seed in 0..40 {
        let mut rng = Rng::new(seed ^ 0x2_57a9);
        let guest = guest(&mut rng);
        let second = behind(&guest);
        let new = || live_by(&guest, second.way(), ShadowLimits::default());
        let (mut together, mut apart) = (new(), new());
        for round in 0..6 {
            let changed: Vec<u64> = (0..rng.pick(&[0, 1, 20, 200])).map(|_| page(&mut rng)).collect();
            changed.iter().for_each(|iova| change(&guest, &mut rng, *iova));
            let mut all = change_second(&second, &mut rng);
            for command in &all {
                apart.invalidate(&guest.view(), &[*command]).unwrap();
            }
            let first = commands(&mut rng, &changed);
            for command in &first {
                apart.invalidate(&guest.view(), &[*command]).unwrap();
            }
            all.extend(first);
            for index in (1..all.len()).rev() {
                all.swap(index, rng.below(index as u64 + 1) as usize);
            }
            let calls = together.sink().committer.calls;
            together.invalidate(&guest.view(), &all).unwrap();
            assert!(together.sink().committer.calls - calls <= 1, "seed {seed}: one call for a batch");
            let (one, other) = (together.sink().model.mappings(), apart.sink().model.mappings());
            assert!(one == other, "seed {seed}, round {round}: {} commands", all.len());
            assert!(one == new().sink().model.mappings(), "seed {seed}, round {round}: all was told");
            assert!(one == together.sink().walked(), "seed {seed}, round {round}: the host's table");
        }
    }
}

#[test]
fn what_commands_for_two_stages_have_in_common_is_read_once() {
    for seed in 0..40 {
        let mut rng = Rng::new(!seed ^ 0x2_57a9);
        let guest = guest(&mut rng);
        let second = behind(&guest);
        let mut live = live_by(&guest, second.way(), ShadowLimits::default());
        for round in 0..6 {
            let changed: Vec<u64> = (0..rng.pick(&[1, 5, 40, 400])).map(|_| page(&mut rng)).collect();
            changed.iter().for_each(|iova| change(&guest, &mut rng, *iova));
            let mut all = change_second(&second, &mut rng);
            all.extend(commands(&mut rng, &changed));
            let memory = Counted { memory: guest.view(), reads: RefCell::default() };
            live.invalidate(&memory, &all).unwrap();
            let reads = memory.reads.into_inner();
            let again = reads.iter().find(|(_, count)| **count > 1);
            assert_eq!(again, None, "seed {seed}, round {round}: an entry that is read again");
            assert!(!reads.is_empty());
        }
    }
}

/// Pages of one table that are apart from each other, so that each has a command of its own.
fn in_a_row(guest: &Guest, count: u64, entry: impl Fn(u64) -> u64) -> Vec<Invalidation> {
    let page = |index: u64| {
        guest.set(index << 13, 0, entry(index));
        range(index << 13, index << 13 | 0xfff, true)
    };
    (0..count).map(page).collect()
}

/// Many that come at once lead no further than one that comes alone.
#[test]
fn pages_in_a_row_do_not_lead_beyond_what_there_is() {
    let guest = Guest::new();
    let here = |index: u64| (DATA + (index << 12)) | RW;
    in_a_row(&guest, 64, here);
    let mut live = live(&guest);
    assert_eq!(live.sink().model.pieces.len(), 64);
    for beyond in [MEMORY, 1 << 45] {
        let gone = in_a_row(&guest, 64, |_| 0);
        let there = live.sink().model.pieces.len() as u64;
        assert_eq!(live.invalidate(&guest.view(), &gone).unwrap().changes, there);
        let come = in_a_row(&guest, 64, |index| if index % 10 == 5 { beyond | RW } else { here(index) });
        live.invalidate(&guest.view(), &come).unwrap();
        let pieces = &live.sink().model.pieces;
        assert!((0..64).all(|index| pieces.contains_key(&(index << 13)) == (index % 10 != 5)), "{beyond:#x}");
        assert!(live.sink().walked() == live.sink().model.mappings());
    }
}

/// Nor are there more of them than there may be; those that are blocked are not there, and do not go.
#[test]
fn pages_in_a_row_are_no_more_than_there_may_be() {
    let guest = Guest::new();
    let here = |index: u64| (DATA + (index << 12)) | RW;
    guest.put(1 << 30, 0, here(0));
    in_a_row(&guest, 64, |_| 0);
    let mut live = live_with(&guest, ShadowLimits { leaves: 41, ..ShadowLimits::default() });
    for _ in 0..3 {
        let report = live.invalidate(&guest.view(), &in_a_row(&guest, 64, here)).unwrap();
        assert_eq!((report.changes, report.blocked_count), (40, 24));
        assert_eq!((live.space().figures().leaves, live.space().figures().blocked), (41, 24));
        let report = live.invalidate(&guest.view(), &in_a_row(&guest, 64, |_| 0)).unwrap();
        assert_eq!((report.changes, report.blocked_count), (40, 0));
        assert_eq!((live.space().figures().leaves, live.space().figures().blocked, live.sink().model.pieces.len()), (1, 0, 1));
        assert!(live.sink().walked() == live.sink().model.mappings());
    }
}
