//! Threads do DMA to pages that stay, all the while everything around them changes: not one transaction fails.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::kernel::Pasid;
use stagecraft::kernel::handle::PageTable;
use stagecraft::kernel::sim::{self, DmaAccess};
use stagecraft::kernel::{HwptFlags, handle::Ioas};
use stagecraft::sync::{AreaLimits, Areas, Sink};
use stagecraft::{Change, Iova};
use stagecraft_tests::reference::generate::Rng;

use super::support::{BASE, Lab, Model, PAGE, READ, RW, Stop, change, map, piece, unmap};

/// Pages that must translate, and where to.
type Stays<'a> = (&'a sim::Device, Option<Pasid>, Vec<(u64, u64)>);

/// Runs `change` while a thread per device reads and writes the pages that stay.
fn meanwhile(stays: &[Stays<'_>], change: impl FnOnce()) {
    let (stop, rounds) = (AtomicBool::new(false), stays.iter().map(|_| AtomicU64::new(0)).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for ((device, pasid, pages), rounds) in stays.iter().zip(&rounds) {
            let stop = &stop;
            scope.spawn(move || {
                let _stop = Stop(stop);
                while !stop.load(Ordering::Relaxed) {
                    for (page, user) in pages {
                        let found = device.translate(*pasid, Iova(*page), DmaAccess::Read).unwrap();
                        assert_eq!(found.user_address, *user, "{page:#x}");
                        device.read(*pasid, Iova(*page), &mut [0; 64]).unwrap();
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = Stop(&stop);
        while rounds.iter().any(|rounds| rounds.load(Ordering::Relaxed) < 5) && !stop.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        change();
        // The threads were at it until the end.
        let seen: Vec<u64> = rounds.iter().map(|rounds| rounds.load(Ordering::Relaxed)).collect();
        while rounds.iter().zip(&seen).any(|(rounds, seen)| rounds.load(Ordering::Relaxed) == *seen) && !stop.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    });
}

const LARGE: u64 = 2 << 20;

/// A large page as small ones, one of which says something else.
fn split(first: u64, address: u64, other: u64) -> Vec<Change> {
    let small = |index: u64| {
        let attributes = if index == other { READ } else { RW };
        let target = if index == other { BASE } else { address + index * PAGE };
        map(piece(first + index * PAGE, PAGE, target, attributes))
    };
    std::iter::once(unmap(first, LARGE)).chain((0..LARGE / PAGE).map(small)).collect()
}

fn merge(first: u64, address: u64) -> Vec<Change> {
    let unmaps = (0..LARGE / PAGE).map(|index| unmap(first + index * PAGE, PAGE));
    unmaps.chain([map(piece(first, LARGE, address, RW))]).collect()
}

/// Two devices behind different units, one behind both, and a PASID: large pages are split with a change in the middle, merged, and neighbours change.
#[test]
fn splitting_merging_and_neighbours() {
    let lab = Lab::filled();
    let limits = AreaLimits { flags: HwptFlags::PASID, join: 64 * PAGE, ..AreaLimits::default() };
    let (mut areas, mut model) = (Areas::new(&lab.pins, limits).unwrap(), Model::default());
    let devices = [lab.bind("dev0"), lab.bind("dev1"), lab.bind("both")];
    devices.iter().for_each(|device| areas.attach(device, None).unwrap());
    areas.attach(&devices[0], Some(Pasid(5))).unwrap();
    let address = |index: u64| BASE + index * LARGE;
    let mut batch: Vec<Change> = (0..3).map(|index| map(piece(index * LARGE, LARGE, address(index), RW))).collect();
    // Small pages, in a row in memory, so that they are joined.
    batch.extend((0..64).map(|index| map(piece(3 * LARGE + index * PAGE, PAGE, address(3) + index * PAGE, RW))));
    change(&mut areas, &mut model, &batch);
    assert_eq!(areas.figures().areas, 4);
    // Page 100 of each large page changes; odd ones of the small ones do.
    let pages = |index: u64| [0, 1, 99, 101, 511].map(|page| index * LARGE + page * PAGE);
    let stay: Vec<(u64, u64)> =
        (0..3).flat_map(pages).chain((0..64).step_by(2).map(|index| 3 * LARGE + index * PAGE)).map(|page| (page, lab.at(BASE + page))).collect();
    let dma = ["dev0", "dev1", "both"].map(|label| lab.dma(label));
    let stays: Vec<Stays<'_>> =
        vec![(&dma[0], None, stay.clone()), (&dma[1], None, stay.clone()), (&dma[2], None, stay.clone()), (&dma[0], Some(Pasid(5)), stay)];
    meanwhile(&stays, || {
        let mut rng = Rng::new(1);
        let mut is_split = [false; 3];
        for round in 0..60_u64 {
            let index = rng.below(3);
            let (first, target) = (index * LARGE, address(index));
            let batch = if is_split[index as usize] { merge(first, target) } else { split(first, target, 100) };
            is_split[index as usize] ^= true;
            change(&mut areas, &mut model, &batch);
            let odd = 3 * LARGE + (rng.below(32) * 2 + 1) * PAGE;
            let there = model.pieces.contains_key(&odd);
            let batch = if there { unmap(odd, PAGE) } else { map(piece(odd, PAGE, BASE + rng.below(512) * PAGE, RW)) };
            change(&mut areas, &mut model, &[batch]);
            // A page that comes and goes as a whole, and is split in between.
            let victim = 8 * LARGE;
            change(&mut areas, &mut model, &[map(piece(victim, LARGE, BASE, RW))]);
            change(&mut areas, &mut model, &split(victim, BASE, rng.below(512)));
            change(&mut areas, &mut model, &(0..512).map(|index| unmap(victim + index * PAGE, PAGE)).collect::<Vec<_>>());
            if round % 10 == 0 {
                model.check(&lab, &["dev1", "both"], model.edges().into_iter().filter(|iova| *iova < 4 * LARGE), "after a change");
            }
        }
    });
    let figures = areas.figures();
    assert!(figures.swaps >= 60 && figures.interrupted == 0 && figures.failures == 0, "{figures:?}");
    drop((areas, devices));
    lab.assert_clean();
}

/// Splitting without a change, merging without one, and new marks cost no kernel call at all.
#[test]
fn what_stays_costs_no_call() {
    let lab = Lab::filled();
    let (mut areas, mut model, device) = (lab.areas(0), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    change(&mut areas, &mut model, &[map(piece(0, LARGE, BASE, RW))]);
    let calls = lab.sim.calls_total();
    change(&mut areas, &mut model, &split(0, BASE, u64::MAX));
    change(&mut areas, &mut model, &merge(0, BASE));
    change(&mut areas, &mut model, &[unmap(0, LARGE), map(piece(0, LARGE, BASE, RW.with(stagecraft::Attributes::DIRTY)))]);
    assert_eq!((lab.sim.calls_total(), areas.figures().areas, areas.figures().swaps), (calls, 1, 0));
    // One of the small pages goes, and the others must stay.
    let objects = lab.sim.objects();
    change(&mut areas, &mut model, &split(0, BASE, u64::MAX));
    change(&mut areas, &mut model, &[unmap(7 * PAGE, PAGE)]);
    assert_eq!((areas.figures().swaps, areas.figures().areas), (1, 511));
    assert_eq!((lab.sim.objects(), lab.pins.figures().copies), (objects, 511), "nothing is left of the first IOAS");
    model.check(&lab, &["dev0"], (0..512).map(|index| index * PAGE), "a page is gone");
    // The next one needs none: each page is an area now. A range of them goes with one call.
    let calls = lab.sim.calls_total();
    change(&mut areas, &mut model, &[unmap(8 * PAGE, PAGE)]);
    assert_eq!(lab.sim.calls_total(), calls + 1);
    change(&mut areas, &mut model, &(100..200).map(|index| unmap(index * PAGE, PAGE)).collect::<Vec<_>>());
    assert_eq!((lab.sim.calls_total(), areas.figures().swaps), (calls + 2, 1));
    drop((areas, device));
    lab.assert_clean();
}

/// A device moves between two address spaces that have a page in common.
#[test]
fn moving_between_address_spaces() {
    let lab = Lab::filled();
    let mut spaces = [lab.areas(0), lab.areas(0)];
    for (space, other) in spaces.iter_mut().zip([PAGE, 2 * PAGE]) {
        space.apply(&[map(piece(0x1000, PAGE, BASE, RW)), map(piece(0x2000, PAGE, BASE + other, RW))]);
        space.commit().unwrap();
    }
    let (device, dma) = (lab.bind("dev0"), lab.dma("dev0"));
    let elsewhere = Ioas::alloc(&lab.kernel).unwrap();
    let attachment = device.attach(None, PageTable::Ioas(&elsewhere)).unwrap();
    let usable = lab.kernel.ioas_iova_ranges(elsewhere.id()).unwrap();
    spaces[0].adopt(attachment, None, &usable).unwrap();
    meanwhile(&[(&dma, None, vec![(0x1000, lab.user)])], || {
        for round in 0..200 {
            let (from, to) = (round % 2, (round + 1) % 2);
            let attachment = spaces[from].release(device.id(), None).unwrap();
            spaces[to].adopt(attachment, None, &usable).unwrap();
            let found = dma.translate(None, Iova(0x2000), DmaAccess::Write).unwrap();
            assert_eq!(found.user_address, lab.at(BASE + PAGE * (to as u64 + 1)));
        }
    });
    assert_eq!(lab.sim.faults(), 0);
    drop((spaces, device, elsewhere));
    lab.assert_clean();
}

/// Permissions that change: the page is read all the while if that was asked for, and as long as a swap may be so large. Otherwise the kernel unmaps and maps, and
/// nobody swaps anything.
#[test]
fn permissions_change_with_a_swap_if_that_is_asked_for() {
    for (hitless_changes, swap) in [(true, 1 << 16), (true, 0), (false, 1 << 16)] {
        let lab = Lab::filled();
        let limits = AreaLimits { hitless_changes, swap, join: 0, ..AreaLimits::default() };
        let (mut areas, mut model) = (Areas::new(&lab.pins, limits).unwrap(), Model::default());
        let devices = [lab.bind("dev0"), lab.bind("dev1")];
        let page = |attributes| map(piece(0x5000, PAGE, BASE + 0x7000, attributes));
        let (large, beside) = (map(piece(LARGE, LARGE, BASE, RW)), map(piece(0x7000, PAGE, BASE + 0x3000, RW)));
        // Nobody is attached: nobody can notice.
        change(&mut areas, &mut model, &[page(RW), beside, large]);
        change(&mut areas, &mut model, &[unmap(0x5000, PAGE), page(READ)]);
        assert_eq!(areas.figures().swaps, 0);
        devices.iter().for_each(|device| areas.attach(device, None).unwrap());
        let rounds = 12;
        let toggle = |areas: &mut Areas, model: &mut Model| {
            for round in 0..rounds {
                change(areas, model, &[unmap(0x5000, PAGE), page(if round % 2 == 0 { RW } else { READ })]);
                model.check(&lab, &["dev0", "dev1"], [0x4000, 0x5000, 0x6000, 0x7000, LARGE, 2 * LARGE], &format!("round {round}"));
            }
        };
        let is_swapped = hitless_changes && swap > 0;
        if is_swapped {
            let devices = [lab.dma("dev0"), lab.dma("dev1")];
            let pages = || vec![(0x5000, lab.at(BASE + 0x7000)), (0x7000, lab.at(BASE + 0x3000)), (LARGE, lab.at(BASE))];
            let stays: Vec<Stays<'_>> = devices.iter().map(|device| (device, None, pages())).collect();
            meanwhile(&stays, || toggle(&mut areas, &mut model));
        } else {
            toggle(&mut areas, &mut model);
        }
        let (swaps, interrupted) = (areas.figures().swaps, areas.figures().interrupted);
        let expected = if is_swapped { (rounds, 0) } else { (0, if hitless_changes { rounds } else { 0 }) };
        assert_eq!((swaps, interrupted), expected, "hitless: {hitless_changes}, at most {swap} copies");
        // What only comes or goes needs none.
        change(&mut areas, &mut model, &[unmap(0x7000, PAGE)]);
        change(&mut areas, &mut model, &[map(piece(0x9000, PAGE, BASE, RW))]);
        assert_eq!(areas.figures().swaps, swaps);
        drop((areas, devices));
        lab.assert_clean();
    }
}
