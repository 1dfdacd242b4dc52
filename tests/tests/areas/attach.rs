//! Devices come and go: what they reserve is not mapped while they are there.

use stagecraft::kernel::handle::{Ioas, PageTable};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::kernel::{Errno, HwptFlags, Pasid};
use stagecraft::sync::{AreaLimits, Areas, Sink};
use stagecraft::table::Loss;
use stagecraft::{Attributes, Iova, Span};

use super::support::{BASE, Lab, Model, PAGE, READ, ROM, RW, SIZE, change, map, piece, unmap};

/// The interrupt range of x86.
const WINDOW: Span = Span { first: 0xfee0_0000, last: 0xfeef_ffff };

/// One large piece around the window, and small ones in it.
#[test]
fn what_a_newcomer_reserves_goes_and_comes_back() {
    let lab = Lab::filled();
    let (mut areas, mut model) = (lab.areas(0), Model::default());
    let (vtd, smmu) = (lab.bind("dev0"), lab.bind("dev1"));
    areas.attach(&smmu, None).unwrap();
    let around = piece(WINDOW.first - 0x10_0000, 0x30_0000, BASE, RW);
    change(&mut areas, &mut model, &[map(around), map(piece(0x1000, PAGE, BASE, RW))]);
    let pages =
        || (around.iova.first..=around.iova.last).step_by(0x8_0000).chain([WINDOW.first - 1, WINDOW.first, WINDOW.last, WINDOW.last + 1, 0x1000]);
    model.check(&lab, &["dev1"], pages(), "one device");
    assert_eq!((areas.figures().areas, areas.losses().refused_bytes()), (2, 0));
    areas.attach(&vtd, None).unwrap();
    model.reserved = vec![WINDOW, Span { first: 0x0800_0000, last: 0x080f_ffff }];
    model.check(&lab, &["dev0", "dev1"], pages(), "two devices");
    assert_eq!((areas.figures().areas, areas.figures().swaps), (3, 1));
    assert_eq!(areas.losses().get(Loss::InputRange).map(|count| (count.pieces, count.bytes)), Some((1, 0x10_0000)));
    // Told anew, it is lost anew; then the device goes.
    change(&mut areas, &mut model, &[unmap(around.iova.first, 0x30_0000), map(piece(WINDOW.first, PAGE, BASE, RW))]);
    model.check(&lab, &["dev0", "dev1"], pages(), "in the window only");
    assert_eq!(areas.losses().get(Loss::InputRange).map(|count| count.pieces), Some(2));
    assert!(areas.detach(vtd.id(), None));
    model.reserved.remove(0);
    areas.commit().unwrap();
    assert!(model.check(&lab, &["dev1"], pages(), "one device again") >= 4);
    assert_eq!(areas.ranges().len(), 2);
    drop((areas, vtd, smmu));
    lab.assert_clean();
}

/// A device that comes attached, so that none of its transactions is to fail, and must not translate some of what is mapped. Whatever fails, it is where it was, and nobody
/// misses anything after the next commit.
#[test]
fn what_reserves_something_comes_from_elsewhere() {
    for is_alone in [true, false] {
        let lab = Lab::filled();
        let (mut areas, mut model) = (lab.areas(0), Model::default());
        let (vtd, smmu) = (lab.bind("dev0"), lab.bind("dev1"));
        if !is_alone {
            areas.attach(&smmu, None).unwrap();
        }
        let pages =
            || (WINDOW.first - 0x10_0000..WINDOW.last + 0x10_0000).step_by(0x8_0000).chain([WINDOW.first - 1, WINDOW.first, WINDOW.last + 1, 0x1000]);
        change(&mut areas, &mut model, &[map(piece(WINDOW.first - 0x10_0000, 0x30_0000, BASE, RW)), map(piece(0x1000, PAGE, BASE, RW))]);
        let smmu_alone: &[&str] = if is_alone { &[] } else { &["dev1"] };
        let elsewhere = Ioas::alloc(&lab.kernel).unwrap();
        let (mut failures, mut swallowed) = (0, 0);
        for n in 1.. {
            let attachment = vtd.attach(None, PageTable::Ioas(&elsewhere)).unwrap();
            let usable = lab.kernel.ioas_iova_ranges(elsewhere.id()).unwrap();
            let before = attachment.hwpt();
            lab.sim.fail_nth(n, Errno::EINTR);
            let adopted = areas.adopt(attachment, None, &usable);
            let is_over = lab.sim.disarm();
            match adopted {
                Ok(()) => {
                    swallowed += usize::from(!is_over);
                    model.reserved = vec![WINDOW];
                    let both = [smmu_alone, &["dev0"]].concat();
                    model.check(&lab, &both, pages(), "both");
                    areas.commit().unwrap();
                    model.check(&lab, &both, pages(), "both, after a commit");
                    assert!(areas.detach(vtd.id(), None));
                }
                Err((attachment, errno)) => {
                    failures += 1;
                    assert_eq!((errno, attachment.hwpt()), (Errno::EINTR, before), "call {n}");
                }
            }
            areas.commit().unwrap();
            model.reserved.clear();
            model.check(&lab, smmu_alone, pages(), "without it");
            if is_over {
                break;
            }
        }
        assert!(failures >= 4 && swallowed <= 2, "{failures} failures, {swallowed} of them without an effect");
        drop((areas, vtd, smmu, elsewhere));
        lab.assert_clean();
    }
}

/// One piece around what both of two devices reserve.
#[test]
fn what_is_reserved_adds_up() {
    let windows = [Span { first: 0x1_0000, last: 0x1_ffff }, Span { first: 0x3_0000, last: 0x3_ffff }];
    let unit = |(name, window)| UnitConfig { reserved: vec![window], ..UnitConfig::riscv(name) }.without_nesting();
    let lab = Lab::with(["one", "two"].into_iter().zip(windows).map(unit).collect(), u64::MAX);
    lab.pins.add(&lab.ram()).unwrap();
    let (mut areas, mut model) = (lab.areas(0), Model::default());
    let devices = ["dev0", "dev1"].map(|label| lab.bind(label));
    change(&mut areas, &mut model, &[map(piece(0, 0x5_0000, BASE, RW))]);
    for (count, device) in (1..).zip(&devices) {
        areas.attach(device, None).unwrap();
        model.reserved = windows[..count].to_vec();
        model.check(&lab, &["dev0", "dev1"][..count], (0..0x60).map(|page| page * PAGE), "reserved");
    }
    assert_eq!((areas.figures().areas, areas.figures().swaps), (3, 2));
    for (count, device) in (1..).zip(&devices) {
        areas.detach(device.id(), None);
        areas.commit().unwrap();
        model.reserved = windows[count..].to_vec();
        model.check(&lab, &["dev0", "dev1"][count..], (0..0x60).map(|page| page * PAGE), "released");
    }
    assert_eq!(areas.figures().areas, 5);
    drop((areas, devices));
    lab.assert_clean();
}

/// Without an attachment nothing is reserved; the first device is told by the kernel what it must do without.
#[test]
fn the_first_device_finds_what_was_mapped_before() {
    let lab = Lab::filled();
    let (mut areas, mut model, device) = (lab.areas(0), Model::default(), lab.bind("dev0"));
    change(&mut areas, &mut model, &[map(piece(WINDOW.first - PAGE, 2 * PAGE, BASE, RW)), map(piece(1 << 57, PAGE, BASE, RW))]);
    assert_eq!(areas.figures().areas, 2);
    // Whatever fails on the way, nothing changes, and the device is free.
    for steps in [false, true] {
        for n in 1.. {
            if steps {
                lab.sim.fail_step_nth(n, Errno::ENOMEM);
            } else {
                lab.sim.fail_nth(n, Errno::ENOMEM);
            }
            let before = areas.figures();
            let objects = lab.sim.objects();
            let attached = areas.attach(&device, None);
            if lab.sim.disarm() {
                attached.unwrap();
                areas.detach(device.id(), None);
                areas.commit().unwrap();
                break;
            }
            if attached.is_err() {
                assert_eq!((areas.figures().areas, lab.sim.objects(), areas.attachments().count()), (before.areas, objects, 0));
            } else {
                // What failed was the question for the ranges, which the next commit asks again.
                areas.commit().unwrap();
                areas.detach(device.id(), None);
                areas.commit().unwrap();
            }
        }
    }
    areas.attach(&device, None).unwrap();
    model.reserved = vec![WINDOW, Span { first: 1 << 57, last: u64::MAX }];
    model.check(&lab, &["dev0"], [WINDOW.first - PAGE, WINDOW.first, 1 << 57], "attached");
    assert_eq!(areas.attach(&device, None), Err(Errno::EBUSY));
    drop((areas, device));
    lab.assert_clean();
}

#[test]
fn pasids_share_the_address_space_with_their_device() {
    let lab = Lab::filled();
    let limits = AreaLimits { flags: HwptFlags::PASID, ..AreaLimits::default() };
    let (mut areas, device) = (Areas::new(&lab.pins, limits).unwrap(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    areas.attach(&device, Some(Pasid(3))).unwrap();
    areas.attach(&device, Some(Pasid(4))).unwrap();
    let tables: Vec<_> = areas.attachments().map(|(.., hwpt)| hwpt).collect();
    assert!(tables.windows(2).all(|pair| pair[0] == pair[1]), "{tables:?}");
    areas.apply(&[map(piece(0, 4 * PAGE, BASE, RW))]);
    areas.commit().unwrap();
    // Cut: all of them move.
    areas.apply(&[unmap(0, 4 * PAGE), map(piece(0, PAGE, BASE, RW))]);
    areas.commit().unwrap();
    assert_eq!(areas.figures().swaps, 1);
    let dma = lab.dma("dev0");
    for pasid in [None, Some(Pasid(3)), Some(Pasid(4))] {
        let found = |iova| dma.translate(pasid, Iova(iova), stagecraft::kernel::sim::DmaAccess::Read).is_ok();
        assert_eq!((found(0), found(PAGE)), (true, false));
    }
    let tables: Vec<_> = areas.attachments().map(|(.., hwpt)| hwpt).collect();
    assert!(tables.windows(2).all(|pair| pair[0] == pair[1]), "{tables:?}");
    assert!(areas.detach(device.id(), Some(Pasid(3))) && !areas.detach(device.id(), Some(Pasid(3))));
    drop((areas, device));
    lab.assert_clean();
}

#[test]
fn what_the_kernel_cannot_say_is_counted() {
    let lab = Lab::filled();
    let (mut areas, mut model, device) = (lab.areas(0), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    model.reserved = vec![WINDOW, Span { first: 1 << 57, last: u64::MAX }];
    let batch = [
        map(piece(0, PAGE, BASE, RW.with(Attributes::EXECUTE))),
        map(piece(0x1_0000, PAGE, BASE, RW.with(Attributes::PRIVILEGED_ONLY))),
        map(piece(0x2_0000, PAGE, BASE, Attributes::none())),
        map(piece(0x3_0000, 2 * PAGE - 1, BASE, RW)),
        map(piece(0x4_0000, PAGE, BASE + 1, RW)),
        map(piece(0x5_0000, 4 * PAGE, BASE - 2 * PAGE, RW)),
        map(piece(0x6_0000, 2 * PAGE, ROM - PAGE, RW)),
        map(piece(0x7_0000, PAGE, ROM, Attributes::WRITE)),
        map(piece(0x8_0000, PAGE, BASE, Attributes::WRITE)),
        map(piece(0x9_0000, PAGE, BASE, READ.with(Attributes::COHERENT))),
        map(piece(WINDOW.first - PAGE, 2 * PAGE, BASE, RW)),
        map(piece((1 << 57) - PAGE, 2 * PAGE, BASE, RW)),
        map(piece(1 << 60, SIZE, u64::MAX - PAGE, RW)),
    ];
    change(&mut areas, &mut model, &batch);
    model.check(&lab, &["dev0"], model.edges(), "lossy");
    let lost: Vec<(Loss, u64, u128)> = areas.losses().iter().map(|(loss, count)| (loss, count.pieces, count.bytes)).collect();
    let page = u128::from(PAGE);
    let wanted = [
        (Loss::InputRange, 2, 2 * page),
        (Loss::OutputRange, 2, 2 * page + u128::from(SIZE)),
        (Loss::Granule, 2, page - 1 + page),
        (Loss::Permission, 3, 3 * page),
        (Loss::Execute, 1, page),
    ];
    assert_eq!(lost.iter().filter(|(loss, ..)| *loss != Loss::Coherent).copied().collect::<Vec<_>>(), wanted);
    assert_eq!(areas.figures().read_only, 1);
    drop((areas, device));
    lab.assert_clean();
}

/// At the limit of areas nothing more is mapped, and everything is once there is room.
#[test]
fn areas_and_pieces_are_bounded() {
    let lab = Lab::filled();
    let limits = AreaLimits { areas: 10, pieces: 20, join: 0, ..AreaLimits::default() };
    let (mut areas, mut model, device) = (Areas::new(&lab.pins, limits).unwrap(), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    let pages: Vec<_> = (0..30).map(|index| piece(index * 2 * PAGE, PAGE, BASE + index * PAGE, RW)).collect();
    let calls = lab.sim.calls_total();
    areas.apply(&pages.iter().copied().map(map).collect::<Vec<_>>());
    areas.commit().unwrap();
    let figures = areas.figures();
    assert_eq!((figures.areas, figures.pieces, figures.pending, figures.forgotten, lab.sim.calls_total() - calls), (10, 20, 10, 10, 10));
    model.apply(&pages[..10].iter().copied().map(map).collect::<Vec<_>>());
    model.check(&lab, &["dev0"], (0..60).map(|index| index * PAGE), "at the limit");
    // Five go: of those that wait, five come.
    let gone: Vec<_> = pages[..5].iter().map(|piece| unmap(piece.iova.first, PAGE)).collect();
    areas.apply(&gone);
    areas.commit().unwrap();
    let found = (0..60).filter(|index| lab.dma("dev0").translate(None, Iova(index * PAGE), stagecraft::kernel::sim::DmaAccess::Read).is_ok()).count();
    assert_eq!((found, areas.figures().areas, areas.figures().pending), (10, 10, 5));
    // The rest goes as well, those that were forgotten included.
    areas.apply(&pages[5..].iter().map(|piece| unmap(piece.iova.first, PAGE)).collect::<Vec<_>>());
    areas.commit().unwrap();
    assert_eq!((areas.figures().areas, areas.figures().pieces, areas.figures().pending), (0, 0, 0));
    drop((areas, device));
    lab.assert_clean();
}

/// A unit with pages of its own size: smaller ones than the kernel counts in are no use.
#[test]
fn a_unit_that_translates_little_is_enough() {
    let mut unit = UnitConfig::riscv("u").without_nesting();
    (unit.aperture, unit.reserved) = (Span { first: 0x1_0000, last: 0x1_ffff }, Vec::new());
    let lab = Lab::with(vec![unit], u64::MAX);
    lab.pins.add(&lab.ram()).unwrap();
    let (mut areas, mut model, device) = (lab.areas(0), Model::default(), lab.bind("dev0"));
    change(&mut areas, &mut model, &[map(piece(0, 0x4_0000, BASE, RW))]);
    areas.attach(&device, None).unwrap();
    model.reserved = vec![Span { first: 0, last: 0xffff }, Span { first: 0x2_0000, last: u64::MAX }];
    assert_eq!(model.check(&lab, &["dev0"], (0..0x50).map(|index| index * PAGE), "a small aperture"), 32);
    assert_eq!(areas.losses().refused_bytes(), 0x3_0000);
    drop((areas, device));
    lab.assert_clean();
}
