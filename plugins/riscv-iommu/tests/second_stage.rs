//! The second stage: every bit of every kind of entry, the wide root, and the other direction.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{
    A, ALL, D, G, N, R, U, V, W, check_answer, check_encoding, check_every_bit_of_leaves, check_every_bit_of_pointers, check_geometry, everything,
    leaf, line, open, settings, split,
};
use proptest::prelude::*;
use stagecraft_plugin_riscv_iommu::second_stage::SecondStage;
use stagecraft_sdk::{Attributes, ByteOrder, Error, FaultKind, Format, Meaning, MemoryType, Need, Next, Severity};

fn second(list: &[(&str, u64)]) -> SecondStage {
    open(list)
}

#[test]
fn every_bit_of_every_kind_of_entry() {
    let format = second(&[("levels", 5)]);
    check_every_bit_of_leaves(&format, |level| 12 + 9 * level);
    check_every_bit_of_pointers(&format);
}

#[test]
fn nobody_passes_without_the_user_bit() {
    let format = second(&[]);
    assert_eq!(format.decode(0, 0, ALL & !U), Meaning::Fault(FaultKind::Permission));
    let findings = format.explain(0, 0, ALL & !U);
    assert_eq!((findings.len(), findings[0].bits, findings[0].severity), (1, U, Severity::Error));
    assert_eq!(format.encode_leaf(0, 12, Attributes { privileged_only: true, ..everything() }), None);
    assert!(!format.geometry().privileged);
}

#[test]
fn the_global_bit_is_odd_and_harmless() {
    let format = second(&[]);
    assert_eq!(leaf(&format, 0, ALL | G), everything());
    for (level, pattern) in [(0, ALL | G), (1, V | G)] {
        let findings = format.explain(level, 0, pattern);
        assert_eq!((findings.len(), findings[0].bits, findings[0].severity), (1, G, Severity::Warning));
    }
}

#[test]
fn the_root_has_two_bits_more() {
    for (levels, last, index) in [
        (2, 0x3_ffff_ffff_u64, [(12, 10), (22, 12)].as_slice()),
        (3, 0x1ff_ffff_ffff, &[(12, 9), (21, 9), (30, 11)]),
        (4, 0x3_ffff_ffff_ffff, &[(12, 9), (21, 9), (30, 9), (39, 11)]),
        (5, 0x7ff_ffff_ffff_ffff, &[(12, 9), (21, 9), (30, 9), (39, 9), (48, 11)]),
    ] {
        let geometry = second(&[("levels", levels), ("root", 0x1234_4000)]).geometry();
        check_geometry(&geometry);
        let root = &geometry.roots[0];
        assert_eq!((geometry.roots.len(), root.setting, root.first, root.last, root.address), (1, "root", 0, last, 0x1234_4000));
        assert_eq!(geometry.levels.iter().map(|l| (l.index_lsb, l.index_bits)).collect::<Vec<_>>(), index);
        assert_eq!(u64::from(geometry.entry_bytes) << geometry.levels.last().unwrap().index_bits, 16 << 10);
        assert_eq!(geometry.entry_bytes, if levels == 2 { 4 } else { 8 });
    }
    assert_eq!(second(&[("levels", 4), ("input-bits", 34)]).geometry().roots[0].last, 0x3_ffff_ffff);
    assert_eq!(second(&[("levels", 3), ("input-bits", 50)]).geometry().roots[0].last, 0x1ff_ffff_ffff);
    let misaligned = SecondStage::open(&settings(&[("root", 0x1234_5000)]));
    assert!(matches!(misaligned, Err(Error::Invalid(invalid)) if invalid.field == "root"));
}

#[test]
fn extensions_and_flags_are_as_in_the_first_stage() {
    let format = second(&[("svnapot", 1), ("svpbmt", 1), ("svrsw60t59b", 1), ("hardware-update", 1), ("big-endian", 1)]);
    assert_eq!(format.decode(0, 0, N | ALL | 8 << 10), Meaning::Leaf { size_log2: 16, attributes: everything() });
    assert_eq!(format.decode(0, 0, N | ALL | 9 << 10), Meaning::Fault(FaultKind::Reserved));
    assert_eq!(leaf(&format, 0, ALL | 1 << 61 | 3 << 59).memory_type, MemoryType::NonCacheable);
    assert_eq!(format.decode(0, 0, ALL | 3 << 61), Meaning::Fault(FaultKind::Reserved));
    let clean = leaf(&format, 0, ALL & !(A | D));
    assert!(clean.write && clean.writable_when_dirty && !clean.accessed && !clean.dirty);
    assert_eq!((format.levels()[0].accessed.mask, format.levels()[0].dirty.mask), (A, D));
    assert_eq!((format.byte_order(), second(&[]).byte_order()), (ByteOrder::Big, ByteOrder::Little));
    assert_eq!(format.levels()[0].leaf_sizes, 1 << 12 | 1 << 16);
    let narrow = second(&[("levels", 2)]);
    assert_eq!(narrow.decode(1, 0, ALL), Meaning::Leaf { size_log2: 22, attributes: everything() });
    assert_eq!(split(&narrow.geometry(), 1, ALL | 0xfff0_0000), (ALL, 0x3_ffc0_0000));
}

#[test]
fn bad_settings_are_refused_by_name() {
    let bad =
        [("levels", 1), ("levels", 6), ("output-bits", 57), ("input-bits", 60), ("input-bits", 11), ("root", 0x1000), ("supervisor", 0), ("sum", 0)];
    for (name, value) in bad {
        match SecondStage::open(&settings(&[(name, value)])) {
            Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn suggestions_are_the_smallest_that_hold_the_need() {
    let suggest = |given: &[(&str, u64)], last_low| {
        let need = Need { last_low: Some(last_low), first_high: Some(0), last_address: u64::MAX, alignment_log2: 12 };
        line(&SecondStage::suggest(&settings(given), &need).unwrap())
    };
    assert_eq!(suggest(&[], (1 << 41) - 1), "levels=3");
    assert_eq!(suggest(&[], 1 << 41), "levels=4");
    assert_eq!(suggest(&[], 1 << 50), "levels=5");
    assert_eq!(suggest(&[], 1 << 60), "levels=5");
    assert_eq!(suggest(&[("svpbmt", 1), ("levels", 4)], 0), "levels=4 svpbmt=1");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn encoding_never_grants_more_and_decodes_to_what_it_says(
        word in 0_u64..1 << 10, level in 0_u8..6, size in 10_u8..50, flags in 0_u64..16, levels in 2_u64..6,
    ) {
        let flag = |position: u32| flags >> position & 1;
        let wide = |position| if levels > 2 { flag(position) } else { 0 };
        let format = second(&[
            ("levels", levels), ("svnapot", wide(0)), ("svpbmt", wide(1)), ("svrsw60t59b", wide(2)), ("hardware-update", flag(3)),
        ]);
        let asked = Attributes::unpack(word);
        let Some(granted) = check_encoding(&format, level, size, asked) else { return Ok(()) };
        prop_assert!(!granted.privileged_only);
        prop_assert_eq!(granted.writable_when_dirty, flag(3) == 1 && asked.write && asked.writable_when_dirty);
    }

    #[test]
    fn tables_restrict_nothing(level in 0_u8..7, next in 0_u8..7, levels in 2_u64..6) {
        let format = second(&[("levels", levels)]);
        match format.encode_table(level, next) {
            Some(pattern) => prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 }),
            None => prop_assert!(level != next + 1 || u64::from(level) >= levels),
        }
    }

    #[test]
    fn any_pattern_at_any_level_has_an_answer(level: u8, inherited: u64, pattern: u64, low in 0_u64..1 << 14, size: u8, word: u64, levels in 2_u64..6) {
        for format in [second(&[("levels", levels)]), second(&[("svnapot", 1), ("svpbmt", 1), ("hardware-update", 1)])] {
            let level = level % format.levels().len() as u8;
            check_answer(&format, level, inherited, pattern);
            check_answer(&format, level, inherited, low | R | W);
            check_answer(&format, level, inherited, low | N);
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
        }
    }
}
