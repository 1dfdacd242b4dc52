//! What a guest, a plugin and a device may do while an address space is kept in step.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use stagecraft::memory::{Budget, Limits, MemoryMap};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, Reason, Shadow, ShadowLimits, Sink, Unwatched, Watcher};
use stagecraft::table::{Mapping, Table};
use stagecraft::{Attributes, Change, Gpa, Span};
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::walk::Walker;

use super::equality::{assert_same, clipped, converted};
use super::guest::{DATA, Guest, MEMORY, PS, RO, RW};
use super::support::{Failing, Host, format, walk};

const HOST: (&str, &[(&str, u64)]) = ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48), ("output-bits", 48)]);

fn live_with(guest: &Guest, limits: ShadowLimits, watcher: Box<dyn Watcher>) -> Live<Host> {
    let shadow = Shadow::open(format(&guest.config()), Guest::map(), limits, watcher).unwrap();
    let mut live = Live::new(shadow, Host::new(&TableConfig::new(HOST.0, HOST.1), 8 << 20), Tag::default(), 0, 1 << 10);
    live.synchronise(&guest.view()).unwrap();
    live
}

fn live(guest: &Guest) -> Live<Host> {
    live_with(guest, ShadowLimits::default(), Box::new(Unwatched))
}

pub fn range(first: u64, last: u64, leaf: bool) -> Invalidation {
    let scope = Scope { leaf, second_stage: false, domain: None, space: None, id: None };
    Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first, last } } }
}

fn page(iova: u64) -> Invalidation {
    range(iova, iova | 0xfff, true)
}

fn assert_in_step(guest: &Guest, live: &Live<Host>) {
    let mut table = Table::open(format(&guest.config())).unwrap();
    let wanted = walk(&mut table, &guest.view(), &Guest::map());
    assert_eq!(live.sink().model.mappings(), wanted);
    assert_eq!(live.sink().walked(), wanted);
}

/// The pages that are watched, by a watcher that insists on order.
#[derive(Clone, Default)]
pub struct Watched(pub Arc<Mutex<std::collections::BTreeSet<Gpa>>>);

impl Watcher for Watched {
    fn watch(&mut self, page: Gpa) {
        assert!(self.0.lock().unwrap().insert(page), "{page} is watched already");
    }
    fn unwatch(&mut self, page: Gpa) {
        assert!(self.0.lock().unwrap().remove(&page), "{page} was not watched");
    }
}

#[test]
fn a_change_is_told_exactly_and_costs_no_questions() {
    let guest = Guest::new();
    (0..256).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    guest.set(1 << 30, 0, DATA | RO);
    let mut live = live(&guest);
    assert_in_step(&guest, &live);
    let questions = live.space().figures().questions;
    for index in [0, 7, 255] {
        let iova = index << 12;
        guest.set(iova, 0, 0);
        assert_eq!(live.invalidate(&guest.view(), &[page(iova)]).unwrap().changes, 1);
        assert_in_step(&guest, &live);
        guest.set(iova, 0, DATA | RO);
        assert_eq!(live.invalidate(&guest.view(), &[page(iova)]).unwrap().changes, 1);
        assert_in_step(&guest, &live);
        // Another page's command sees nothing, and nothing is committed for it.
        guest.set(iova, 0, DATA | RW);
        let commits = live.sink().committer.calls;
        assert_eq!(live.invalidate(&guest.view(), &[page(99 << 12)]).unwrap().changes, 0);
        assert_eq!(live.sink().committer.calls, commits);
        assert_eq!(live.invalidate(&guest.view(), &[page(iova), page(iova), range(0, 0xff_ffff, false)]).unwrap().changes, 2);
        assert_eq!(live.sink().committer.calls, commits + 1, "one call for a batch");
        assert_in_step(&guest, &live);
    }
    assert_eq!(live.space().figures().questions, questions);
}

#[test]
fn tables_that_move_change_what_differs_only() {
    let guest = Guest::new();
    (0..512).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    let mut live = live(&guest);
    // A copy of the last table with one page less, somewhere else; and then of the root.
    let copy = |from: u64, to: u64| (0..512).for_each(|index| guest.store(to + index * 8, guest.load(from + index * 8)));
    let (old, new) = (guest.slot(0, 0).0, guest.table());
    copy(old, new);
    guest.store(new + 8 * 5, 0);
    guest.set(0, 1, new | 0b10_0111);
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!(report.changes, 1, "one page is gone");
    assert_in_step(&guest, &live);
    let root = guest.table();
    copy(guest.root(), root);
    guest.set_root(root);
    let report = live.switch(format(&guest.config()), &guest.view()).unwrap();
    assert_eq!(report.changes, 0, "the same table at another place");
    assert_in_step(&guest, &live);
    // One table at two places.
    guest.set(1 << 30, 1, new | 0b10_0111);
    live.synchronise(&guest.view()).unwrap();
    guest.store(new + 8 * 9, 0);
    let report = live.table_written(&guest.view(), Gpa(new + 8 * 9), 8).unwrap();
    assert_eq!(report.changes, 2, "both places");
    assert_in_step(&guest, &live);
}

#[test]
fn written_pages_are_enough_and_pages_are_watched_exactly() {
    let (guest, watched) = (Guest::new(), Watched::default());
    let mut live = live_with(&guest, ShadowLimits::default(), Box::new(watched.clone()));
    assert_eq!(watched.0.lock().unwrap().len(), 1, "the root");
    // Every store is told, as a watcher would, with its address; the guest says nothing.
    let mut rng = Rng::new(1);
    for _ in 0..300 {
        let iova = rng.below(6) << 30 | rng.below(3) << 21 | rng.below(4) << 12;
        let tell = |live: &mut Live<Host>, at: Gpa| live.table_written(&guest.view(), at, 8).unwrap();
        guest.slot(iova, 0);
        for height in (0..4).rev() {
            let at = guest.slot(iova, height);
            tell(&mut live, at);
        }
        let at = guest.set(iova, 0, if rng.percent(40) { 0 } else { (DATA + (rng.below(64) << 12)) | rng.pick(&[RW, RO]) });
        assert!(tell(&mut live, at).changes <= 2);
        if rng.percent(5) {
            let at = guest.set(iova, rng.below(2) as u32 + 1, 0);
            tell(&mut live, at);
        }
        assert_in_step(&guest, &live);
        assert_eq!(*watched.0.lock().unwrap(), live.space().watched_pages().collect());
    }
    assert_eq!(live.table_written(&guest.view(), Gpa(DATA), 4096).unwrap().changes, 0, "no table is there");
    drop(live);
    assert!(watched.0.lock().unwrap().is_empty());
}

#[test]
fn without_a_word_nothing_is_seen() {
    let guest = Guest::new();
    let mut live = live(&guest);
    let slot = guest.set(0, 0, DATA | RW);
    assert!(live.sink().walked().is_empty());
    live.table_written(&guest.view(), Gpa(slot.0 & !0xfff), 4096).unwrap();
    assert!(live.sink().walked().is_empty(), "the table itself is not known yet: the entry that points to it was written, too");
    live.table_written(&guest.view(), guest.slot(0, 3), 8).unwrap();
    assert_in_step(&guest, &live);
}

#[test]
fn limits_block_what_is_beyond_them_and_nothing_else() {
    let guest = Guest::new();
    let mut live = live_with(&guest, ShadowLimits { table_pages: 6, leaves: 20 }, Box::new(Unwatched));
    (0..30).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!((report.changes, report.blocked_count), (20, 10));
    assert!(report.blocked.iter().all(|blocked| blocked.reason == Reason::Leaves));
    // A leaf goes: another one has room.
    guest.set(3 << 12, 0, 0);
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!((report.changes, report.blocked_count), (2, 9));
    // Tables: a table that points to itself from every entry costs what is left, and ends.
    let table = guest.table();
    (0..512).for_each(|index| guest.store(table + index * 8, table | 0b10_0111));
    guest.set(1 << 40, 3, table | 0b10_0111);
    let report = live.synchronise(&guest.view()).unwrap();
    assert!(report.blocked.iter().any(|blocked| blocked.reason == Reason::TablePages));
    assert_eq!(live.space().figures().table_pages, 6);
    // The first pages live on.
    let written = guest.set(5 << 12, 0, DATA | RO);
    assert_eq!(live.table_written(&guest.view(), written, 8).unwrap().changes, 2);
    guest.set(1 << 40, 3, 0);
    (8..30).for_each(|index| guest.put(index << 12, 0, 0));
    assert_eq!(live.synchronise(&guest.view()).unwrap().blocked_count, 0);
    assert_in_step(&guest, &live);
}

#[test]
fn a_format_that_fails_blocks_unknown_patterns_and_comes_back() {
    let (guest, fails) = (Guest::new(), Arc::new(AtomicBool::new(false)));
    guest.set(0, 0, DATA | RW);
    let failing = Failing::to_read(format(&guest.config()), Arc::clone(&fails));
    let shadow = Shadow::open(Box::new(failing), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
    let mut live = Live::new(shadow, Host::new(&TableConfig::new(HOST.0, HOST.1), 8 << 20), Tag::default(), 0, 1 << 10);
    live.synchronise(&guest.view()).unwrap();
    fails.store(true, Ordering::Relaxed);
    guest.set(0x1000, 0, DATA | RW);
    guest.set(0x2000, 0, DATA | RO);
    guest.set(0, 0, DATA | RO);
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!(report.blocked_count, 2);
    assert!(report.blocked.iter().all(|blocked| blocked.reason == Reason::Format));
    let mapped: Vec<Span> = live.sink().walked().iter().map(|mapping| mapping.iova).collect();
    assert_eq!(mapped, [Span { first: 0x1000, last: 0x1fff }], "what was changed to something unknown is not left as it was");
    let other = TableConfig::new("intel-vtd/first-stage", &[("levels", 5), ("root", guest.root())]);
    assert!(live.reopen(format(&other)).is_err(), "another geometry");
    live.reopen(format(&guest.config())).unwrap();
    assert_eq!(live.synchronise(&guest.view()).unwrap().blocked_count, 0);
    assert_in_step(&guest, &live);
}

/// Large pages are split and merged, and neighbours change, while somebody translates all the time: not one translation that stays is missing.
#[test]
fn pages_that_stay_translate_at_every_moment() {
    let guest = Guest::new();
    let large = |index: u64| (0x100_0000 + (index << 21)) | RW | PS;
    for index in 0..4 {
        guest.set(index << 21, 1, large(index));
    }
    (0..512).for_each(|index| guest.put(4 << 21 | index << 12, 0, (DATA + (index << 12)) | RW));
    let mut live = live(&guest);
    let stay: Vec<u64> = (0..4).map(|index| index << 21 | 0x12_3000).chain((0..256).map(|index| 4 << 21 | index << 13)).collect();
    let (config, region, stop, walks) = (live.sink().config.clone(), live.sink().region(), AtomicBool::new(false), AtomicU64::new(0));
    let walking = Arc::clone(&live.sink().walking);
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let tables = stagecraft::sync::RegionTables::new(region, Gpa(super::support::HOST_BASE));
            let mut space = Table::open(format(&config)).unwrap();
            while !stop.load(Ordering::Relaxed) {
                for iova in &stay {
                    let budget = Budget::new(Limits::default());
                    let mut found = stagecraft::table::Collector::new(false, 4);
                    let span = Span { first: *iova, last: *iova };
                    let one = walking.read().unwrap();
                    space.walk(&tables, &MemoryMap::everything(48), span, &budget, &mut found).unwrap();
                    drop(one);
                    let address = if *iova < 4 << 21 { 0x100_0000 + iova } else { DATA + (iova & 0x1f_ffff) };
                    let [Mapping { address: there, access, .. }] = found.mappings() else { panic!("{iova:#x} is not there: {:?}", found.faults()) };
                    assert!(*there == address && access.read, "{iova:#x}");
                }
                walks.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut rng = Rng::new(3);
        let mut rounds = 0_u32;
        while (rounds < 2000 || walks.load(Ordering::Relaxed) < 20) && !walker.is_finished() {
            rounds += 1;
            let index = rng.below(4);
            if guest.load(guest.slot(index << 21, 1).0) & PS != 0 {
                guest.split(index << 21);
            } else {
                guest.put(index << 21, 1, large(index));
            }
            let neighbour = 4 << 21 | rng.below(256) << 13 | 0x1000;
            guest.set(neighbour, 0, if rng.percent(50) { 0 } else { DATA | RO });
            live.invalidate(&guest.view(), &[range(0, 0xff_ffff, false)]).unwrap();
            if rounds.is_multiple_of(256) {
                // Tables of a split are not used again by this guest: begin anew before its memory ends.
                guest.restart(0x20_0000);
            }
        }
        stop.store(true, Ordering::Relaxed);
        walker.join().unwrap();
    });
    assert_in_step(&guest, &live);
}

/// Ends the other thread also when this one fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A guest that writes anything anywhere while it is read: all that is mapped stands in some entry that it wrote, within its memory. When it has stopped, one
/// look brings everything in step.
#[test]
fn a_guest_that_scribbles_gets_what_some_read_found() {
    let mut compared = 0;
    for seed in 0..4 {
        let guest = Guest::new();
        (0..512).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
        let mut live = live_with(&guest, ShadowLimits { table_pages: 1024, leaves: 1 << 16 }, Box::new(Unwatched));
        let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
        let entries = || (0..4 * 512).map(|index| super::guest::ROOT + index * 8);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = Rng::new(seed);
                while !stop.load(Ordering::Relaxed) {
                    let at = super::guest::ROOT + rng.below(4 * 512) * 8;
                    // Addresses beyond memory are among them.
                    let address = if rng.percent(50) { super::guest::ROOT + (rng.below(4) << 12) } else { rng.below(2 * MEMORY) & !0xfff };
                    let any = rng.number();
                    guest.store(at, rng.pick(&[0, address | RW, address | RO, address & !0x1f_ffff | RW | PS, any]));
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
            let _end = Stop(&stop);
            let mut looks = 0;
            while looks < 10 || writes.load(Ordering::Relaxed) < 20_000 {
                looks += 1;
                live.synchronise(&guest.view()).unwrap();
                live.table_written(&guest.view(), Gpa(super::guest::ROOT), 4 * 4096).unwrap();
                for mapping in live.sink().model.mappings() {
                    assert!(mapping.address + mapping.iova.length_minus_one() < MEMORY, "{mapping:x?}");
                }
            }
        });
        for mapping in live.sink().walked() {
            assert!(mapping.address + mapping.iova.length_minus_one() < MEMORY, "{mapping:x?}");
        }
        // Of what it wrote, as much stays as can be followed.
        let mut rng = Rng::new(!seed);
        let mut goes = 95;
        loop {
            entries().filter(|_| rng.percent(goes)).for_each(|at| guest.store(at, 0));
            if live.synchronise(&guest.view()).unwrap().blocked_count == 0 {
                break;
            }
            goes = 30;
        }
        let naive = Walker::new(&guest.snapshot(), &[guest.reference()]).unwrap().walk();
        let wanted = clipped(&naive.runs, &Guest::map());
        assert!(!naive.exhausted);
        compared += wanted.len();
        assert_same(&live.sink().model.mappings(), &wanted, "what was told, and the naive walk");
        let mut table = Table::open(format(&guest.config())).unwrap();
        let lossless = converted(&mut table, &guest.view(), &Guest::map(), &live.sink().config);
        assert_same(&live.sink().walked(), &lossless, "the host's table, and a conversion");
    }
    assert!(compared > 100, "{compared}");
}

/// A sink can be fed by whoever finds changes.
#[test]
fn batches_need_no_shadow() {
    let mut host = Host::new(&TableConfig::new(HOST.0, HOST.1), 1 << 20);
    let piece = stagecraft::table::Piece { iova: Span { first: 0x4000, last: 0x6fff }, address: DATA, attributes: Attributes::READ };
    host.apply(&[Change::Map(piece)]);
    host.commit().unwrap();
    assert_eq!(host.committer.calls, 0, "nothing was taken away");
    assert_eq!(host.walked().len(), 1);
    host.apply(&[Change::Unmap(piece.iova)]);
    assert_eq!(host.table.figures().retired, 3, "tables wait");
    host.commit().unwrap();
    assert_eq!((host.committer.calls, host.committer.last.spans.clone(), host.committer.last.tables), (1, vec![piece.iova], true));
    assert_eq!((host.table.figures().retired, host.table.figures().tables), (0, 1));
}

/// What must be invalidated is kept until that was done, in whatever order it came.
#[test]
fn what_is_needed_adds_up_until_it_was_invalidated() {
    let mut host = Host::new(&TableConfig::new(HOST.0, HOST.1), 1 << 20);
    let page = |number: u64| Span { first: number << 12, last: number << 12 | 0xfff };
    let piece = |number| stagecraft::table::Piece { iova: page(number), address: DATA, attributes: Attributes::READ };
    host.apply(&(0..16).map(|number| Change::Map(piece(number))).collect::<Vec<_>>());
    host.commit().unwrap();
    // One by one and several at once, not in order, with neighbours on both sides.
    for numbers in [&[5][..], &[4], &[9, 10, 12], &[8], &[6, 7], &[1]] {
        host.apply(&numbers.iter().map(|number| Change::Unmap(page(*number))).collect::<Vec<_>>());
    }
    host.commit().unwrap();
    let spans = [page(1), Span { first: 0x4000, last: 0xafff }, page(12)];
    assert_eq!((host.committer.calls, &host.committer.last.spans[..]), (1, &spans[..]));
}
