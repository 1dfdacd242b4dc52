//! Mappings that are made one by one, exactly or not at all.

use stagecraft::Span;
use stagecraft::kernel::Errno;
use stagecraft::pins::PinError;
use stagecraft::sync::{AreaLimits, Areas, Managed, MapError, Sink, UnmapError};
use stagecraft::table::{Loss, Piece};

use super::support::{BASE, BLOCK, Lab, Model, PAGE, READ, ROM, RW, SIZE, map, piece};

/// Whether an error is the right one.
type Expected = Box<dyn Fn(MapError) -> bool>;

#[test]
fn single_mappings_are_exact_or_refused() {
    let lab = Lab::filled();
    let limits = AreaLimits { areas: 6, ..AreaLimits::default() };
    let (mut areas, mut model, device) = (Areas::new(&lab.pins, limits).unwrap(), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    let first = piece(0x1_0000, 4 * PAGE, BASE + BLOCK - 2 * PAGE, RW);
    areas.map(&first).unwrap();
    model.apply(&[map(first)]);
    assert_eq!(areas.figures().areas, 2, "over the border of two blocks");
    let second = piece(0x2_0000, PAGE, ROM, READ);
    areas.map(&second).unwrap();
    model.apply(&[map(second)]);
    let lost = |loss| move |error: MapError| matches!(error, MapError::Lost { loss: other, .. } if other == loss);
    let refused: [(Piece, Expected); 8] = [
        (
            piece(0x1_3000, 2 * PAGE, BASE, RW),
            Box::new(|error| {
                error == MapError::Overlap { asked: Span { first: 0x1_3000, last: 0x1_4fff }, present: Span { first: 0x1_0000, last: 0x1_3fff } }
            }),
        ),
        (piece(0xfedf_f000, 2 * PAGE, BASE, RW), Box::new(lost(Loss::InputRange))),
        (piece(0x3_0000, 2 * PAGE, BASE - PAGE, RW), Box::new(lost(Loss::OutputRange))),
        (piece(0x3_0000, PAGE - 1, BASE, RW), Box::new(lost(Loss::Granule))),
        (piece(0x3_0000, PAGE, BASE, RW.with(stagecraft::Attributes::PRIVILEGED_ONLY)), Box::new(lost(Loss::Permission))),
        (piece(0x3_0000, 2 * PAGE, ROM - PAGE, RW), Box::new(|error| matches!(error, MapError::ReadOnly(span) if span.first == 0x3_1000))),
        (piece(0x100_0000, SIZE, BASE, RW), Box::new(|error| error == MapError::Full(6))),
        (piece(0x3_0000, PAGE, BASE, RW), Box::new(|error| matches!(error, MapError::Kernel { errno: Errno::EINTR, .. }))),
    ];
    let figures = areas.figures();
    for (index, (piece, expected)) in refused.iter().enumerate() {
        if index == 7 {
            lab.sim.fail_nth(1, Errno::EINTR);
        }
        let error = areas.map(piece).unwrap_err();
        assert!(expected(error), "case {index}: {error}");
        assert_eq!((areas.figures().areas, areas.figures().pieces), (figures.areas, figures.pieces));
    }
    model.reserved = vec![Span { first: 0xfee0_0000, last: 0xfeef_ffff }];
    model.check(&lab, &["dev0"], model.edges().into_iter().chain([0x3_0000, 0xfedf_f000, 0x100_0000]), "refused");
    assert!(matches!(areas.unmap(Span { first: 0x1_1000, last: 0x1_3fff }), Err(UnmapError::Cut { .. })));
    assert!(matches!(areas.unmap(Span { first: 0x5_0000, last: 0x5_3fff }), Err(UnmapError::Absent(_))));
    // Over a hole, both at once; the kernel refuses once.
    lab.sim.fail_nth(1, Errno::EINTR);
    areas.unmap(Span { first: 0, last: 0x2_ffff }).unwrap();
    model.pieces.clear();
    model.check(&lab, &["dev0"], [0x1_0000, 0x1_3000, 0x2_0000], "unmapped");
    drop((areas, device));
    lab.assert_clean();
}

/// What could not be unmapped is gone with the next commit, and in the way until then.
#[test]
fn what_is_not_gone_yet_is_in_the_way() {
    let lab = Lab::filled();
    let (mut areas, device) = (lab.areas(0), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    // Of two blocks, the second of which goes and comes.
    let both = piece(0, 2 * PAGE, ROM - PAGE, READ);
    lab.pins.remove(Span { first: ROM, last: ROM + 0xf_ffff }).unwrap();
    assert!(matches!(areas.map(&both), Err(MapError::Lost { .. })));
    lab.pins.add(&lab.rom()).unwrap();
    areas.map(&both).unwrap();
    lab.sim.fail_nth(1, Errno::EINTR);
    areas.apply(&[stagecraft::Change::Unmap(both.iova)]);
    assert_eq!(areas.map(&both), Err(MapError::Stale(both.iova)));
    assert!(matches!(lab.pins.remove(Span { first: ROM, last: ROM + 0xf_ffff }), Err(PinError::InUse { .. })));
    areas.commit().unwrap();
    areas.map(&both).unwrap();
    drop((areas, device));
    lab.assert_clean();
}
