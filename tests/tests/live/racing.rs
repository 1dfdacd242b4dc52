//! Address spaces of two stages, and such that become others, while devices and guests do what they want.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::memory::{Budget, Limits, MemoryMap};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, RegionTables, ShadowLimits, Space, Unwatched, Way};
use stagecraft::table::{AddressSpace, Collector, Mapping, Table};
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference::generate::Rng;

use super::behaviour::{Stop, range};
use super::equality::assert_same;
use super::guest::{DATA, Guest, MEMORY, PS, RO, ROOT, RW};
use super::space::{BOTH, R, Second, intercept, second_stage};
use super::support::{HOST_BASE, Host, format};

fn live(guest: &Guest, way: Way, limits: ShadowLimits) -> Live<Host> {
    let host = TableConfig::new("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48), ("output-bits", 48)]);
    let space = Space::open(way, Guest::map(), limits, Box::new(Unwatched)).unwrap();
    let mut live = Live::new(space, Host::new(&host, 8 << 20), Tag::default(), 0, 1 << 16);
    live.synchronise(&guest.view()).unwrap();
    live
}

/// Blocks of the second stage are split and merged, first-stage tables move behind it, neighbours come and go, and the guest takes its second stage away and
/// back, while somebody translates all the time: not one translation that stays is missing.
#[test]
fn what_stays_translates_while_stages_come_and_go() {
    let guest = Guest::new();
    let second = Second::identity(&guest);
    (0..512).for_each(|index| guest.put(DATA + (index << 12), 0, (DATA + (index << 12)) | RW));
    // Beside a large page of the first stage, in small pages of the second.
    guest.put(0x100_0000, 1, 0x100_0000 | RW | PS);
    second.split(0x100_0000);
    let table = guest.slot(DATA, 0).0;
    second.split(table);
    let copy = guest.table();
    (0..512).for_each(|index| guest.store(copy + index * 8, guest.load(table + index * 8)));
    let mut live = live(&guest, second.way(), ShadowLimits::default());
    let stay: Vec<u64> = (0..256).map(|index| DATA + (index << 13)).chain((0..16).map(|index| 0x100_0000 + (index << 17))).collect();
    let (config, region, stop, walks) = (live.sink().config.clone(), live.sink().region(), AtomicBool::new(false), AtomicU64::new(0));
    let walking = Arc::clone(&live.sink().walking);
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let tables = RegionTables::new(region, Gpa(HOST_BASE));
            let mut host = Table::open(format(&config)).unwrap();
            while !stop.load(Ordering::Relaxed) {
                for iova in &stay {
                    let mut found = Collector::new(false, 4);
                    let one = walking.read().unwrap();
                    let span = Span { first: *iova, last: *iova };
                    host.walk(&tables, &MemoryMap::everything(48), span, &Budget::new(Limits::default()), &mut found).unwrap();
                    drop(one);
                    let [Mapping { address, access, .. }] = found.mappings() else { panic!("{iova:#x} is not there: {:?}", found.faults()) };
                    assert!(address == iova && access.read, "{iova:#x}");
                }
                walks.fetch_add(1, Ordering::Relaxed);
            }
        });
        let _end = Stop(&stop);
        let (mut rng, mut rounds, mut large) = (Rng::new(11), 0_u32, true);
        while (rounds < 400 || walks.load(Ordering::Relaxed) < 20) && !walker.is_finished() {
            rounds += 1;
            let neighbour = DATA + (rng.below(256) << 13 | 0x1000);
            let entry = rng.pick(&[0, DATA | RO, neighbour | RW]);
            [table, copy].iter().for_each(|table| guest.store(table + (neighbour >> 12 & 0x1ff) * 8, entry));
            match rng.below(6) {
                0 => {
                    // The same outputs in one block, and in pages.
                    if large {
                        second.split(DATA);
                    } else {
                        drop_split(&second);
                    }
                    large = !large;
                    live.invalidate(&guest.view(), &[second_stage(DATA, 2 << 20)]).unwrap();
                }
                1 => {
                    second.set(table, 0, rng.pick(&[table, copy]) | BOTH);
                    live.invalidate(&guest.view(), &[second_stage(table, 0x1000)]).unwrap();
                }
                2 => {
                    let way = || Way::table(format(&guest.config()));
                    live.switch(way().with_intercepts(vec![intercept(1, !0xfff, DATA + 0x1000)]), &guest.view()).unwrap();
                    live.switch(way(), &guest.view()).unwrap();
                    live.switch(second.way(), &guest.view()).unwrap();
                }
                3 => {
                    let beside = 0x100_0000 + ((rng.below(511) + 1) << 12);
                    let stays = (beside - 0x100_0000).is_multiple_of(1 << 17);
                    second.set(beside, 0, beside | rng.pick(&[0, R, BOTH]) | if stays { R } else { 0 });
                    live.invalidate(&guest.view(), &[second_stage(beside, 0x1000)]).unwrap();
                }
                _ => drop(live.invalidate(&guest.view(), &[range(neighbour, neighbour | 0xfff, true)]).unwrap()),
            }
            if rounds.is_multiple_of(256) {
                // Tables of a split are not used again by this guest: begin anew before its memory ends.
                guest.restart(0x40_0000);
            }
        }
        drop(_end);
        walker.join().unwrap();
    });
    live.synchronise(&guest.view()).unwrap();
    in_step(&guest, &second, &live);
}

/// One block where pages were.
fn drop_split(second: &Second<'_>) {
    second.set(DATA, 1, DATA | BOTH | PS);
}

/// The host's table has what a walk of both stages finds.
fn in_step(guest: &Guest, second: &Second<'_>, live: &Live<Host>) -> usize {
    let open = |config: &TableConfig| Table::open(format(config)).unwrap();
    let mut space = AddressSpace::nested(open(&guest.config()), open(&second.config()));
    let mut found = Collector::new(false, 0);
    let budget = Budget::new(Limits { tables: 1 << 20, ..Limits::default() });
    space.walk(&guest.view(), &Guest::map(), Span::ALL, &budget, &mut found).unwrap();
    let wanted = found.into_mappings();
    assert_same(&live.sink().model.mappings(), &wanted, "what was told, and a walk");
    assert_same(&live.sink().walked(), &wanted, "the host's table, and a walk");
    wanted.len()
}

/// A guest that writes anything into the tables of both stages while they are read: every batch keeps its promises, and nothing that is mapped is beyond its
/// memory. When it has stopped, everything comes in step.
#[test]
fn a_guest_that_scribbles_over_both_stages_stays_within_its_memory() {
    let mut compared = 0;
    for seed in 0..4 {
        let guest = Guest::new();
        let second = Second::identity(&guest);
        (0..512).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
        (0..4).for_each(|index| second.split(index * (2 << 20)));
        // All tables of both stages, side by side.
        let tables = (guest.table() - ROOT) / 4096;
        let last: Vec<u64> = (1..4).map(|index| second.slot(index * (2 << 20), 0)).chain([guest.slot(0, 0).0]).map(|at| at & !0xfff).collect();
        let before: Vec<(u64, u64)> = (0..tables * 512).map(|index| ROOT + index * 8).map(|at| (at, guest.load(at))).collect();
        let mut live = live(&guest, second.way(), ShadowLimits { table_pages: 512, leaves: 1 << 14 });
        let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut rng = Rng::new(seed);
                while !stop.load(Ordering::Relaxed) {
                    let at = ROOT + rng.below(tables * 512) * 8;
                    let address = if rng.percent(60) { ROOT + (rng.below(tables) << 12) } else { rng.below(2 * MEMORY) & !0xfff };
                    let any = rng.number();
                    let (block, small) = (address & !0x1f_ffff, rng.pick(&[address | RW, address | RO, address | BOTH, address | R]));
                    let entry = rng.pick(&[0, block | RW | PS, block | BOTH | PS, any, small, small]);
                    guest.store(at, entry);
                    writes.fetch_add(1, Ordering::Relaxed);
                }
            });
            let _end = Stop(&stop);
            let mut looks = 0;
            while looks < 10 || writes.load(Ordering::Relaxed) < 20_000 {
                looks += 1;
                match looks % 3 {
                    0 => live.synchronise(&guest.view()).unwrap(),
                    1 => live.table_written(&guest.view(), Gpa(ROOT), tables * 4096).unwrap(),
                    _ => live.invalidate(&guest.view(), &[second_stage(0, MEMORY), range(0, 1 << 30, false)]).unwrap(),
                };
                let inside = |mapping: &Mapping| mapping.address + mapping.iova.length_minus_one() < MEMORY;
                assert!(live.sink().model.mappings().iter().all(inside));
                let figures = live.space().figures();
                assert!(figures.table_pages <= 512 && figures.leaves <= 1 << 14, "{figures:?}");
            }
        });
        // Of what it wrote, all stays that stands in tables of the last level, but those that the first stage's tables are behind.
        before.iter().filter(|(at, _)| !last.contains(&(at & !0xfff))).for_each(|(at, entry)| guest.store(*at, *entry));
        // At a limit, a look may meet what is new before it has let go of what is gone.
        for _ in 0..3 {
            live.synchronise(&guest.view()).unwrap();
        }
        assert_eq!(live.space().figures().blocked, 0, "{:?}", live.space().figures());
        compared += in_step(&guest, &second, &live);
        // And as it began.
        (0..tables * 512).for_each(|index| guest.store(ROOT + index * 8, 0));
        for address in (0..MEMORY).step_by(2 << 20) {
            second.set(address, 1, address | BOTH | PS);
        }
        (0..512).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
        live.synchronise(&guest.view()).unwrap();
        assert_eq!(in_step(&guest, &second, &live), 1, "512 pages side by side");
    }
    assert!(compared > 100, "{compared}");
}
