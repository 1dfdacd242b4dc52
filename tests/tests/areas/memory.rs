//! Guest memory: pinned once, counted once, within the budget; and it comes and goes while address spaces use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stagecraft::kernel::handle::Device;
use stagecraft::kernel::sim::{Call, UnitConfig};
use stagecraft::kernel::{Errno, HwptFlags};
use stagecraft::pins::{Backing, PinError, PinFigures, Region};
use stagecraft::sync::{Areas, Sink};
use stagecraft::{Change, Gpa, Span};
use vm_memory::{FileOffset, MmapRegion};

use super::support::{BASE, BLOCK, Lab, Model, PAGE, ROM, RW, SIZE, Stop, change, map, piece, unmap};

const fn block(index: u64) -> Span {
    Span { first: BASE + index * BLOCK, last: BASE + (index + 1) * BLOCK - 1 }
}

#[test]
fn pages_are_pinned_once_however_many_use_them() {
    let lab = Lab::filled();
    let devices = ["dev0", "twin0", "dev1", "twin1", "both"].map(|label| lab.bind(label));
    let everything = [map(piece(0, SIZE, BASE, RW)), map(piece(SIZE, SIZE, BASE, RW))];
    assert_eq!(lab.sim.pinned_pages(), 0, "nothing needs it yet");
    let mut spaces: Vec<Areas> = Vec::new();
    for device in &devices {
        let mut areas = lab.areas(0);
        areas.attach(device, None).unwrap();
        areas.apply(&everything);
        areas.commit().unwrap();
        assert_eq!(lab.sim.pinned_pages(), SIZE / PAGE);
        spaces.push(areas);
    }
    // Held, it is all pinned, and a mapping pins nothing.
    let held = lab.pins.hold(&devices[0]).unwrap();
    let all = lab.sim.pinned_pages();
    assert_eq!(all * PAGE, lab.pins.figures().bytes);
    spaces[0].apply(&[unmap(0, SIZE), unmap(SIZE, SIZE)]);
    spaces[0].commit().unwrap();
    assert_eq!(lab.sim.pinned_pages(), all);
    let parent = lab.pins.ioas().hwpt(&devices[1], HwptFlags::NONE, None).unwrap();
    assert_eq!(lab.sim.pinned_pages(), all);
    drop((parent, held));
    assert_eq!(lab.sim.pinned_pages(), SIZE / PAGE);
    drop(spaces);
    assert_eq!(lab.sim.pinned_pages(), 0);
    assert_eq!(lab.sim.calls()[&Call::Map], 5, "four blocks and one");
    drop(devices);
    lab.assert_clean();
}

#[test]
fn the_budget_names_what_was_asked_and_what_is_left() {
    let lab = Lab::with(vec![UnitConfig::vtd("u")], SIZE);
    lab.pins.add(&lab.ram()).unwrap();
    let error = lab.pins.add(&lab.rom()).unwrap_err();
    assert_eq!(error, PinError::Budget { gpa: Gpa(ROM), asked: 0x10_0000, left: 0 });
    assert_eq!(error.to_string(), "0x100000 bytes of guest memory at 0x41000000 are more than the 0x0 that may still be pinned");
    assert_eq!(lab.pins.remove(block(3)).unwrap(), BLOCK);
    lab.pins.add(&lab.rom()).unwrap();
    let figures = PinFigures { blocks: 4, bytes: SIZE - BLOCK + 0x10_0000, limit: SIZE, copies: 0 };
    assert_eq!(lab.pins.figures(), figures);
    // The process's own limit is the kernel's: with everything held, memory that cannot be pinned is refused, and nothing of it stays.
    let device = lab.bind("dev0");
    let held = lab.pins.hold(&device).unwrap();
    assert_eq!(lab.pins.remove(block(2)).unwrap(), BLOCK);
    lab.sim.set_locked_limit(figures.bytes / PAGE - 1);
    let again =
        Region { gpa: Gpa(block(2).first), length: BLOCK, backing: Backing::User(lab.at(block(2).first)), block: Some(BLOCK / 2), writable: true };
    let half = Span { first: block(2).first + BLOCK / 2, last: block(2).last };
    assert_eq!(lab.pins.add(&again), Err(PinError::Kernel { span: half, errno: Errno::ENOMEM }));
    assert_eq!((lab.pins.figures().bytes, lab.sim.pinned_pages()), (figures.bytes - BLOCK, (figures.bytes - BLOCK) / PAGE));
    lab.sim.set_locked_limit(u64::MAX);
    lab.pins.add(&again).unwrap();
    assert_eq!(lab.pins.figures().blocks, 5);
    drop((held, device));
    lab.assert_clean();
}

/// Whether an error is the right one.
type Expected = fn(PinError) -> bool;

#[test]
fn what_makes_no_sense_is_refused_with_the_reason() {
    let lab = Lab::filled();
    let ram = lab.ram();
    let before = lab.pins.figures();
    let cases: [(Region<'_>, Expected); 8] = [
        (Region { gpa: Gpa(0), length: 0, ..ram }, |error| matches!(error, PinError::Pages { .. })),
        (Region { gpa: Gpa(0x800), length: PAGE, ..ram }, |error| matches!(error, PinError::Pages { .. })),
        (Region { gpa: Gpa(0), length: PAGE, backing: Backing::User(lab.user + 1), ..ram }, |error| matches!(error, PinError::Pages { .. })),
        (Region { gpa: Gpa(0), length: PAGE, block: Some(0x1001), ..ram }, |error| matches!(error, PinError::Pages { .. })),
        (Region { gpa: Gpa(u64::MAX - 0xfff), length: 2 * PAGE, ..ram }, |error| matches!(error, PinError::Beyond { .. })),
        (Region { gpa: Gpa(ROM - PAGE), length: 2 * PAGE, ..ram }, |error| matches!(error, PinError::Overlap { .. })),
        (Region { gpa: Gpa(0), length: PAGE, backing: Backing::Alias(Gpa(0x1000)), ..ram }, |error| matches!(error, PinError::Absent(_))),
        (Region { gpa: Gpa(0), length: PAGE, backing: Backing::Alias(Gpa(ROM)), ..ram }, |error| {
            matches!(error, PinError::Kernel { errno: Errno::EPERM, .. })
        }),
    ];
    for (index, (region, expected)) in cases.into_iter().enumerate() {
        let error = lab.pins.add(&region).unwrap_err();
        assert!(expected(error), "case {index}: {error}");
    }
    let half = Span { first: BASE, last: BASE + BLOCK / 2 };
    assert_eq!(lab.pins.remove(half), Err(PinError::Cut { asked: half, block: block(0) }));
    assert_eq!(lab.pins.withdraw(Span { first: 0, last: 0xfff }), Err(PinError::Absent(Span { first: 0, last: 0xfff })));
    assert_eq!(lab.pins.figures(), before);
    lab.assert_clean();
}

/// Ballooning and hot-unplug: a block goes while two address spaces have it mapped, also in the middle of one large page, and comes back.
#[test]
fn memory_goes_and_comes_back_while_it_is_mapped() {
    let lab = Lab::filled();
    let devices = ["dev0", "dev1"].map(|label| lab.bind(label));
    let mut spaces: Vec<(Areas, Model)> = devices
        .iter()
        .map(|device| {
            let mut areas = lab.areas(0);
            areas.attach(device, None).unwrap();
            (areas, Model::default())
        })
        .collect();
    for (areas, model) in &mut spaces {
        // Everything as one, and some small pages of the block that will go.
        let small = |index: u64| map(piece(0x8000_0000 + index * PAGE, PAGE, BASE + BLOCK + (index % 3) * PAGE, RW));
        let batch: Vec<Change> = std::iter::once(map(piece(0, SIZE, BASE, RW))).chain((0..9).map(small)).collect();
        change(areas, model, &batch);
    }
    let check = |spaces: &[(Areas, Model)], what: &str| {
        for ((_, model), label) in spaces.iter().zip(["dev0", "dev1"]) {
            let blocks = (0..SIZE).step_by((BLOCK / 2) as usize).flat_map(|offset| [offset, offset + PAGE, (offset + BLOCK / 2) - 1]);
            model.check(&lab, &[label], blocks.chain((0..10).map(|index| 0x8000_0000 + index * PAGE)), what);
        }
    };
    check(&spaces, "at first");
    let calls = lab.sim.calls_total();
    assert_eq!(lab.pins.remove(block(1)), Err(PinError::InUse { block: block(1), copies: 20 }));
    check(&spaces, "in use");
    assert_eq!(lab.sim.calls_total(), calls, "refused without a word to the kernel");
    lab.pins.withdraw(block(1)).unwrap();
    assert_eq!(lab.pins.remove(block(1)), Err(PinError::InUse { block: block(1), copies: 20 }), "nobody has let go yet");
    for (areas, model) in &mut spaces {
        model.withdrawn = vec![block(1)];
        areas.commit().unwrap();
        assert_eq!(areas.figures().swaps, 0, "blocks are areas of their own");
    }
    check(&spaces, "withdrawn");
    // A guest that maps what is not there gets nothing, and gets it when it comes back.
    for (areas, model) in &mut spaces {
        change(areas, model, &[unmap(0x8000_0000, PAGE), map(piece(0x9000_0000, PAGE, BASE + BLOCK + 5 * PAGE, RW))]);
        assert_eq!(areas.losses().refused_bytes(), 4096);
    }
    assert_eq!(lab.pins.remove(block(1)), Ok(BLOCK));
    check(&spaces, "removed");
    assert_eq!(lab.sim.pinned_pages(), (SIZE - BLOCK) / PAGE);
    let region = Region { gpa: Gpa(block(1).first), length: BLOCK, backing: Backing::User(lab.at(block(1).first)), writable: true, block: None };
    lab.pins.add(&region).unwrap();
    check(&spaces, "added, and nobody has looked");
    for (areas, model) in &mut spaces {
        model.withdrawn.clear();
        areas.commit().unwrap();
    }
    check(&spaces, "back");
    // Withdrawn and restored.
    lab.pins.withdraw(block(1)).unwrap();
    spaces[0].0.commit().unwrap();
    spaces[0].1.withdrawn = vec![block(1)];
    check(&spaces, "withdrawn, and one has looked");
    lab.pins.restore(block(1)).unwrap();
    spaces[0].1.withdrawn.clear();
    spaces.iter_mut().for_each(|(areas, _)| areas.commit().unwrap());
    check(&spaces, "restored");
    assert_eq!(lab.pins.remove(block(1)), Err(PinError::InUse { block: block(1), copies: 20 }));
    drop((spaces, devices));
    assert_eq!(lab.pins.remove(Span::ALL).unwrap(), SIZE + 0x10_0000);
    lab.assert_clean();
}

/// An area of several pieces goes with its memory, in a batch that means one of them only: the others come back with the memory.
#[test]
fn pieces_of_a_joined_area_come_back_with_their_memory() {
    let lab = Lab::filled();
    let (mut areas, mut model, device) = (lab.areas(BLOCK), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    let batch: Vec<Change> = (0..8).map(|index| map(piece(index * PAGE, PAGE, BASE + index * PAGE, RW))).collect();
    change(&mut areas, &mut model, &batch);
    assert_eq!(areas.figures().areas, 1);
    lab.pins.withdraw(block(0)).unwrap();
    model.withdrawn = vec![block(0)];
    change(&mut areas, &mut model, &[unmap(3 * PAGE, PAGE)]);
    assert_eq!((areas.figures().areas, areas.figures().pieces), (0, 7));
    lab.pins.restore(block(0)).unwrap();
    areas.commit().unwrap();
    model.withdrawn.clear();
    assert!(model.check(&lab, &["dev0"], (0..9).map(|index| index * PAGE), "restored") == 14);
    drop((areas, device));
    lab.assert_clean();
}

#[test]
fn aliases_are_neither_pinned_nor_counted_again() {
    let lab = Lab::filled();
    let bytes = lab.pins.figures().bytes;
    // Over the border of two blocks.
    let alias = Region { gpa: Gpa(0x1000_0000), length: BLOCK, backing: Backing::Alias(Gpa(BASE + BLOCK / 2)), writable: true, block: None };
    lab.pins.add(&alias).unwrap();
    assert_eq!((lab.pins.figures().bytes, lab.pins.figures().blocks), (bytes, 7));
    let (mut areas, device) = (lab.areas(0), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    areas.apply(&[map(piece(0, 2 * PAGE, 0x1000_0000 + BLOCK / 2 - PAGE, RW)), map(piece(0x10_0000, 2 * PAGE, BASE + BLOCK - PAGE, RW))]);
    areas.commit().unwrap();
    let found = |iova| lab.dma("dev0").translate(None, stagecraft::Iova(iova), stagecraft::kernel::sim::DmaAccess::Write).unwrap().user_address;
    for offset in [0, PAGE] {
        assert_eq!(found(offset), lab.at(BASE + BLOCK - PAGE + offset));
        assert_eq!(found(0x10_0000 + offset), found(offset));
    }
    assert_eq!(lab.sim.pinned_pages(), 2);
    areas.apply(&[unmap(0, 2 * PAGE), unmap(0x10_0000, 2 * PAGE)]);
    areas.commit().unwrap();
    assert_eq!(lab.pins.remove(block(0)), Err(PinError::InUse { block: block(0), copies: 1 }), "the alias");
    assert_eq!(lab.pins.remove(Span { first: 0x1000_0000, last: 0x1000_0000 + BLOCK - 1 }), Ok(0));
    assert_eq!(lab.pins.remove(block(0)), Ok(BLOCK));
    drop((areas, device));
    lab.assert_clean();
}

#[test]
fn files_of_memory_are_mapped_by_what_they_are() {
    let lab = Lab::new();
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 * PAGE).unwrap();
    let region = Arc::new(MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 8 * PAGE as usize).unwrap());
    let user = region.as_ptr() as u64;
    lab.sim.register_region(region).unwrap();
    let backing = Backing::File(std::os::fd::AsFd::as_fd(&file), 2 * PAGE);
    lab.pins.add(&Region { gpa: Gpa(0), length: 4 * PAGE, backing, writable: true, block: Some(PAGE) }).unwrap();
    assert_eq!(lab.sim.calls()[&Call::MapFile], 4);
    let (mut areas, device) = (lab.areas(0), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    areas.apply(&[map(piece(0x1000, 4 * PAGE, 0, RW))]);
    areas.commit().unwrap();
    let found = lab.dma("dev0").translate(None, stagecraft::Iova(0x3123), stagecraft::kernel::sim::DmaAccess::Write).unwrap();
    assert_eq!((found.user_address, areas.figures().areas), (user + 4 * PAGE + 0x123, 4));
    drop((areas, device));
    lab.assert_clean();
}

/// Every call and step of adding and removing fails once.
#[test]
fn adding_and_removing_is_all_or_nothing() {
    for step in [false, true] {
        for n in 1.. {
            let lab = Lab::new();
            let device = lab.bind("dev0");
            let held = lab.pins.hold(&device).unwrap();
            if step {
                lab.sim.fail_step_nth(n, Errno::ENOMEM);
            } else {
                lab.sim.fail_nth(n, Errno::ENOMEM);
            }
            let added = lab.pins.add(&lab.ram());
            if added.is_err() {
                assert_eq!((lab.sim.areas(), lab.sim.pinned_pages(), lab.pins.figures().bytes), (0, 0, 0));
                lab.pins.add(&lab.ram()).unwrap();
            }
            let removed = lab.pins.remove(Span { first: BASE + BLOCK, last: BASE + 3 * BLOCK - 1 });
            if removed.is_err() {
                assert_eq!(lab.pins.remove(Span { first: BASE + BLOCK, last: BASE + 3 * BLOCK - 1 }), Ok(2 * BLOCK));
            }
            assert_eq!((lab.sim.areas(), lab.sim.pinned_pages()), (2, (SIZE - 2 * BLOCK) / PAGE));
            let waiting = lab.sim.disarm();
            drop((held, device));
            lab.assert_clean();
            if waiting {
                assert!(n > 4);
                break;
            }
        }
    }
    // The kernel does not even take back what it made: that is counted, and tried again by whoever comes next.
    let lab = Lab::new();
    let device = lab.bind("dev0");
    let held = lab.pins.hold(&device).unwrap();
    // Three steps for each block: the second one fails, and then the first cannot be unmapped.
    lab.sim.fail_step_nth(4, Errno::ENOMEM);
    lab.sim.fail_nth(3, Errno::EINTR);
    assert!(matches!(lab.pins.add(&lab.ram()), Err(PinError::Kernel { errno: Errno::ENOMEM, .. })));
    assert_eq!((lab.sim.disarm(), lab.sim.areas(), lab.pins.figures().bytes, lab.pins.figures().blocks), (false, 1, BLOCK, 0));
    lab.pins.add(&lab.ram()).unwrap();
    assert_eq!((lab.sim.areas(), lab.pins.figures().bytes), (4, SIZE));
    drop((held, device));
    lab.assert_clean();
}

/// Address spaces come and go in threads, all over the same memory, while blocks are withdrawn and removed: nobody ever has what is removed.
#[test]
fn threads_share_memory_that_comes_and_goes() {
    let lab = Lab::filled();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for label in ["dev0", "twin0", "dev1"] {
            let (lab, stop) = (&lab, &stop);
            scope.spawn(move || {
                let device = Device::bind(&lab.kernel, label).unwrap();
                let mut areas = lab.areas(0);
                areas.attach(&device, None).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    areas.apply(&[map(piece(0, SIZE, BASE, RW)), map(piece(SIZE, PAGE, BASE + BLOCK, RW))]);
                    areas.commit().unwrap();
                    areas.apply(&[unmap(0, SIZE), unmap(SIZE, PAGE)]);
                    areas.commit().unwrap();
                }
            });
        }
        let _stop = Stop(&stop);
        let region = Region { gpa: Gpa(block(1).first), length: BLOCK, backing: Backing::User(lab.at(block(1).first)), writable: true, block: None };
        for _ in 0..50 {
            lab.pins.withdraw(block(1)).unwrap();
            while let Err(error) = lab.pins.remove(block(1)) {
                assert!(matches!(error, PinError::InUse { .. }), "{error}");
                std::thread::yield_now();
            }
            lab.pins.add(&region).unwrap();
        }
    });
    lab.assert_clean();
}
