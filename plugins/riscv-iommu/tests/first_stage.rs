//! The first stage: every bit of every kind of entry, and the other direction.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{
    A, ALL, D, G, N, R, U, V, W, X, check_answer, check_encoding, check_every_bit_of_leaves, check_every_bit_of_pointers, check_geometry, everything,
    leaf, line, open, settings, split,
};
use proptest::prelude::*;
use stagecraft_plugin_riscv_iommu::first_stage::FirstStage;
use stagecraft_sdk::{Attributes, ByteOrder, Error, FaultKind, Format, Meaning, MemoryType, Need, Next};

const RESERVED: Meaning = Meaning::Fault(FaultKind::Reserved);

fn first(list: &[(&str, u64)]) -> FirstStage {
    open(list)
}

#[test]
fn every_bit_of_every_kind_of_entry() {
    let format = first(&[("levels", 5)]);
    check_every_bit_of_leaves(&format, |level| 12 + 9 * level);
    check_every_bit_of_pointers(&format);
}

#[test]
fn what_is_not_valid_is_absent() {
    let format = first(&[("levels", 5)]);
    for level in 0..5 {
        assert_eq!(format.decode(level, 0, !V), Meaning::Absent);
        assert!(format.explain(level, 0, !V).is_empty());
    }
}

#[test]
fn read_write_and_execute_make_seven_kinds_of_leaf() {
    let format = first(&[]);
    let rwx = |bits| match format.decode(0, 0, V | U | A | D | bits) {
        Meaning::Leaf { attributes: a, .. } => Ok((a.read, a.write, a.execute)),
        Meaning::Fault(kind) => Err(kind),
        other => panic!("{other:?}"),
    };
    assert_eq!(rwx(R), Ok((true, false, false)));
    assert_eq!(rwx(R | W), Ok((true, true, false)));
    assert_eq!(rwx(X), Ok((false, false, true)));
    assert_eq!(rwx(R | X), Ok((true, false, true)));
    assert_eq!(rwx(R | W | X), Ok((true, true, true)));
    // shadow stack pages among them
    assert_eq!((rwx(W), rwx(W | X)), (Err(FaultKind::Reserved), Err(FaultKind::Reserved)));
}

#[test]
fn accessed_and_dirty_are_hardwares_or_faults() {
    let flags = |format: &FirstStage, pattern| {
        let a = leaf(format, 0, pattern);
        (a.write, a.accessed, a.dirty, a.writable_when_dirty)
    };
    let update = first(&[("hardware-update", 1)]);
    assert_eq!(flags(&update, ALL & !(A | D)), (true, false, false, true));
    assert_eq!(flags(&update, ALL & !D), (true, true, false, true));
    assert_eq!(flags(&update, ALL), (true, true, true, false));
    assert_eq!(flags(&update, ALL & !(W | D)), (false, true, false, false));
    let fixed = first(&[]);
    assert_eq!(fixed.decode(0, 0, ALL & !A), Meaning::Fault(FaultKind::AccessFlag));
    assert_eq!(flags(&fixed, ALL & !D), (false, true, false, false));
    let masks = |format: &FirstStage| format.levels().iter().map(|l| (l.accessed.mask, l.dirty.mask)).collect::<Vec<_>>();
    assert_eq!(masks(&update), [(A, D); 3]);
    assert_eq!(masks(&fixed), [(0, 0); 3]);
}

#[test]
fn supervisor_pages_are_for_those_who_may_have_the_privilege() {
    assert_eq!(first(&[]).decode(0, 0, ALL & !U), Meaning::Fault(FaultKind::Permission));
    let privileged = Attributes { privileged_only: true, ..everything() };
    assert_eq!(leaf(&first(&[("supervisor", 1)]), 0, ALL & !U), privileged);
    assert_eq!(leaf(&first(&[("supervisor", 1), ("sum", 1)]), 0, ALL & !U), privileged);
    assert_eq!(leaf(&first(&[("supervisor", 1)]), 0, ALL), everything());
    assert!(!first(&[("supervisor", 1)]).geometry().privileged);
}

#[test]
fn napot_has_one_size_in_one_level() {
    let format = first(&[("svnapot", 1)]);
    for low in 0..16 {
        let expected = if low == 8 { Meaning::Leaf { size_log2: 16, attributes: everything() } } else { RESERVED };
        assert_eq!(format.decode(0, 0, N | ALL | low << 10), expected, "{low:#b}");
    }
    assert_eq!(format.decode(1, 0, N | ALL), RESERVED);
    assert_eq!(format.decode(1, 0, N | V), RESERVED);
    assert_eq!(first(&[]).decode(0, 0, N | ALL | 8 << 10), RESERVED);
    let geometry = format.geometry();
    // the low four bits of the page number code the size and are pattern
    assert_eq!(split(&geometry, 0, N | ALL | 0x1_2348 << 10), (N | ALL | 8 << 10, 0x1234_0000));
    assert_eq!(split(&geometry, 0, N | V | X | 0x1_2347 << 10), (N | V | X | 7 << 10, 0x1234_0000));
    assert_eq!(split(&geometry, 0, ALL | 0x1_2348 << 10), (ALL, 0x1234_8000));
    let encoded = format.encode_leaf(0, 16, everything()).unwrap();
    assert_eq!(encoded.pattern, N | ALL | 8 << 10);
    assert_eq!(geometry.levels.iter().map(|l| l.leaf_sizes).collect::<Vec<_>>(), [1 << 12 | 1 << 16, 1 << 21, 1 << 30]);
    assert_eq!(first(&[]).levels()[0].leaf_sizes, 1 << 12);
    assert_eq!(first(&[]).encode_leaf(0, 16, everything()), None);
}

#[test]
fn memory_types() {
    let format = first(&[("svpbmt", 1)]);
    let of = |bits: u64| leaf(&format, 0, ALL | bits << 61);
    assert_eq!([of(0), of(1), of(2)].map(|a| a.memory_type), [MemoryType::WriteBack, MemoryType::NonCacheable, MemoryType::Device]);
    assert_eq!([of(0), of(1), of(2)].map(|a| a.coherent), [true, false, false]);
    assert_eq!(format.decode(0, 0, ALL | 3 << 61), RESERVED);
    for bits in 1..4 {
        assert_eq!(format.decode(1, 0, V | bits << 61), RESERVED);
        assert_eq!(first(&[]).decode(0, 0, ALL | bits << 61), RESERVED);
    }
    let device = Attributes { memory_type: MemoryType::Device, ..everything() };
    assert_eq!(format.encode_leaf(0, 12, device).unwrap().pattern, ALL | 2 << 61);
    assert_eq!(first(&[]).encode_leaf(0, 12, device).unwrap().attributes.memory_type, MemoryType::WriteBack);
}

#[test]
fn bits_60_and_59_can_be_softwares() {
    let format = first(&[("svrsw60t59b", 1)]);
    for bit in 54..=60 {
        let reserved = bit < 59;
        assert_eq!(format.decode(0, 0, ALL | 1 << bit) == RESERVED, reserved, "bit {bit}");
        assert_eq!(format.decode(1, 0, V | 1 << bit) == RESERVED, reserved, "bit {bit}");
    }
}

#[test]
fn large_pages_must_be_aligned() {
    let geometry = first(&[("levels", 5)]).geometry();
    for level in 1..5_u8 {
        let low = 10 + 9 * level;
        let entry = ALL | ((1 << 54) - (1 << low)) | 1 << (low - 1);
        let (pattern, address) = split(&geometry, level, entry);
        assert_eq!((pattern, address), (ALL | 1 << (low - 1), (1 << 56) - (1 << (low + 2))));
        assert_eq!(first(&[("levels", 5)]).decode(level, 0, pattern), Meaning::Fault(FaultKind::Misaligned));
        // a pointer's address starts at 4 KiB
        assert_eq!(split(&geometry, level, V | G | 0x1_2347 << 10), (V | G, 0x1234_7000));
        // the same without R: executable only, and the reserved writable only
        assert_eq!(split(&geometry, level, V | X | 1 << 53 | 1 << 10), (V | X | 1 << 10, 1 << 55));
        assert_eq!(split(&geometry, level, V | W | 1 << 53 | 1 << 10), (V | W, 1 << 55 | 1 << 12));
    }
}

#[test]
fn two_levels_have_entries_of_4_bytes() {
    let format = first(&[("levels", 2), ("root", 0x1234_5000)]);
    let geometry = format.geometry();
    check_geometry(&geometry);
    assert_eq!((geometry.entry_bytes, geometry.output_bits), (4, 56));
    assert_eq!(geometry.levels.iter().map(|l| (l.index_lsb, l.index_bits, l.leaf_sizes)).collect::<Vec<_>>(), [(12, 10, 1 << 12), (22, 10, 1 << 22)]);
    assert_eq!(geometry.roots.iter().map(|r| (r.first, r.last, r.level)).collect::<Vec<_>>(), [(0, 0xffff_ffff, 1)]);
    assert_eq!(split(&geometry, 0, ALL | 0xffff_fc00), (ALL, 0x3_ffff_f000));
    assert_eq!(split(&geometry, 1, ALL | 0xfff0_0000), (ALL, 0x3_ffc0_0000));
    assert_eq!(split(&geometry, 1, V | 0xffff_fc00), (V, 0x3_ffff_f000));
    assert_eq!(format.decode(1, 0, ALL), Meaning::Leaf { size_log2: 22, attributes: everything() });
    for bit in 10..20 {
        assert_eq!(format.decode(1, 0, ALL | 1 << bit), Meaning::Fault(FaultKind::Misaligned));
    }
    assert_eq!(format.decode(1, 0, V), Meaning::Table { next: Next::whole(0), inherited: 0 });
    for name in ["svnapot", "svpbmt", "svrsw60t59b"] {
        assert!(FirstStage::open(&settings(&[("levels", 2), (name, 1)])).is_err());
    }
}

#[test]
fn the_geometry_has_both_canonical_halves_of_one_table() {
    let halves = |levels| {
        let geometry = first(&[("levels", levels), ("root", 0x1234_5000)]).geometry();
        check_geometry(&geometry);
        assert!(geometry.roots.iter().all(|root| root.setting == "root" && root.address == 0x1234_5000));
        geometry.roots.iter().map(|root| (root.first, root.last)).collect::<Vec<_>>()
    };
    assert_eq!(halves(3), [(0, 0x3f_ffff_ffff), (0xffff_ffc0_0000_0000, u64::MAX)]);
    assert_eq!(halves(4), [(0, 0x7fff_ffff_ffff), (0xffff_8000_0000_0000, u64::MAX)]);
    assert_eq!(halves(5), [(0, 0xff_ffff_ffff_ffff), (0xff00_0000_0000_0000, u64::MAX)]);
    let levels = first(&[("levels", 5)]).levels();
    assert_eq!(
        levels.iter().map(|l| (l.number, l.index_lsb, l.index_bits)).collect::<Vec<_>>(),
        [(0, 12, 9), (1, 21, 9), (2, 30, 9), (3, 39, 9), (4, 48, 9)]
    );
    assert_eq!(levels.iter().map(|l| l.leaf_sizes.trailing_zeros()).collect::<Vec<_>>(), [12, 21, 30, 39, 48]);
    check_geometry(&first(&[("svnapot", 1), ("output-bits", 40)]).geometry());
    assert_eq!(first(&[("output-bits", 40)]).geometry().output_bits, 40);
    assert_eq!((first(&[]).byte_order(), first(&[("big-endian", 1)]).byte_order()), (ByteOrder::Little, ByteOrder::Big));
}

#[test]
fn bad_settings_are_refused_by_name() {
    let bad = [
        ("levels", 1),
        ("levels", 6),
        ("output-bits", 57),
        ("output-bits", 11),
        ("svnapot", 2),
        ("root", 0x800),
        ("root", 1 << 56),
        ("sum", 1),
        ("msi-root", 0x1000),
        ("input-bits", 34),
    ];
    for (name, value) in bad {
        match FirstStage::open(&settings(&[(name, value)])) {
            Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(FirstStage::open(&settings(&[("root", 1 << 40), ("output-bits", 40)])).is_err());
}

#[test]
fn suggestions_are_the_smallest_that_hold_the_need() {
    let suggest = |given: &[(&str, u64)], need: &Need| line(&FirstStage::suggest(&settings(given), need).unwrap());
    let need = Need { last_low: Some(0x3f_ffff_ffff), first_high: Some(0xffff_ffc0_0000_0000), last_address: (1 << 56) - 1, alignment_log2: 12 };
    assert_eq!(suggest(&[], &need), "levels=3");
    assert_eq!(suggest(&[], &Need::default()), "levels=3");
    assert_eq!(suggest(&[], &Need { last_low: Some(0x40_0000_0000), ..need }), "levels=4");
    assert_eq!(suggest(&[], &Need { first_high: Some(0xffff_ffbf_ffff_f000), ..need }), "levels=4");
    assert_eq!(suggest(&[], &Need { last_low: Some(1 << 47), ..need }), "levels=5");
    assert_eq!(suggest(&[], &Need { last_low: Some(1 << 60), ..need }), "levels=5");
    assert_eq!(suggest(&[("svnapot", 1)], &need), "levels=3 svnapot=1");
    assert_eq!(suggest(&[("big-endian", 1), ("levels", 2)], &Need { last_low: Some(1 << 50), ..need }), "levels=2 big-endian=1");
}

#[test]
fn what_cannot_be_said_is_not_encoded() {
    let format = first(&[]);
    let asked = |read, write, execute| Attributes { read, write, execute, coherent: true, ..Attributes::default() };
    let pattern = |attributes| format.encode_leaf(0, 12, attributes).map(|encoded| encoded.pattern);
    assert_eq!(pattern(asked(true, false, false)), Some(V | R | U | A));
    assert_eq!(pattern(asked(true, true, false)), Some(V | R | W | U | A | D));
    assert_eq!(pattern(asked(false, false, true)), Some(V | X | U | A));
    assert_eq!([pattern(asked(false, true, false)), pattern(asked(false, true, true)), pattern(asked(false, false, false))], [None; 3]);
    let privileged = Attributes { privileged_only: true, ..asked(true, false, false) };
    assert_eq!(pattern(privileged), None);
    assert_eq!(first(&[("supervisor", 1)]).encode_leaf(0, 12, privileged).unwrap().pattern, V | R | A);
    let clean = Attributes { writable_when_dirty: true, ..asked(true, true, false) };
    assert_eq!(pattern(clean), Some(V | R | W | U | A | D));
    assert_eq!(first(&[("hardware-update", 1)]).encode_leaf(0, 12, clean).unwrap().pattern, V | R | W | U | A);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn encoding_never_grants_more_and_decodes_to_what_it_says(
        word in 0_u64..1 << 10, level in 0_u8..6, size in 10_u8..50, flags in 0_u64..64, levels in 2_u64..6,
    ) {
        let flag = |position: u32| flags >> position & 1;
        let wide = |position| if levels > 2 { flag(position) } else { 0 };
        let format = first(&[
            ("levels", levels), ("svnapot", wide(0)), ("svpbmt", wide(1)), ("svrsw60t59b", wide(2)), ("hardware-update", flag(3)),
            ("supervisor", flag(4)), ("big-endian", flag(5)),
        ]);
        let asked = Attributes::unpack(word);
        let Some(granted) = check_encoding(&format, level, size, asked) else { return Ok(()) };
        prop_assert!(flag(4) == 1 || !granted.privileged_only);
        if levels > 2 && flag(1) == 1 {
            prop_assert_eq!(granted.memory_type, asked.memory_type);
        }
        prop_assert_eq!(granted.writable_when_dirty, flag(3) == 1 && asked.write && asked.writable_when_dirty);
    }

    #[test]
    fn a_plain_leaf_can_always_be_said(write: bool, level in 0_u8..5, levels in 3_u64..6) {
        let asked = Attributes { read: true, write, coherent: true, ..Attributes::default() };
        let granted = check_encoding(&first(&[("levels", levels)]), level, 12 + 9 * level, asked);
        prop_assert_eq!(granted.is_some(), u64::from(level) < levels);
    }

    #[test]
    fn tables_restrict_nothing(level in 0_u8..7, next in 0_u8..7, levels in 2_u64..6) {
        let format = first(&[("levels", levels)]);
        match format.encode_table(level, next) {
            Some(pattern) => prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 }),
            None => prop_assert!(level != next + 1 || u64::from(level) >= levels),
        }
    }

    #[test]
    fn any_pattern_at_any_level_has_an_answer(level: u8, inherited: u64, pattern: u64, low in 0_u64..1 << 14, size: u8, word: u64, levels in 2_u64..6) {
        for format in [first(&[("levels", levels)]), first(&[("levels", levels), ("supervisor", 1), ("hardware-update", 1)]), first(&[("svnapot", 1), ("svpbmt", 1)])] {
            let level = level % format.levels().len() as u8;
            check_answer(&format, level, inherited, pattern);
            check_answer(&format, level, inherited, low);
            check_answer(&format, level, inherited, low | N);
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
        }
    }
}
