//! Stage 2 descriptors, written from DDI 0487 tables D8-51, D8-53, D8-76, D8-78, D8-96 and D8-101, and what new ones look like.
#![allow(clippy::unwrap_used)]

mod common;

use common::{settings, split};
use proptest::prelude::*;
use stagecraft_plugin_arm_smmuv3::Stage2;
use stagecraft_sdk::{Attributes, Error, FaultKind, Format, Mark, Meaning, MemoryType, Need, Severity};

fn stage2(pairs: &[(&str, u64)]) -> Stage2 {
    Stage2::open(&settings(pairs)).unwrap()
}

fn refusal(pairs: &[(&str, u64)]) -> String {
    match Stage2::open(&settings(pairs)) {
        Err(Error::Invalid(invalid)) => invalid.field,
        other => panic!("{pairs:?}: {other:?}"),
    }
}

/// Number and index bits of the first table.
fn first(pairs: &[(&str, u64)]) -> (i8, u8) {
    let format = stage2(pairs);
    (format.levels()[0].number, format.levels()[0].index_bits)
}

/// Page with AF, SH inner, S2AP=11, MemAttr=1111, executable.
const PAGE: u64 = 0x7ff;
const AF: u64 = 1 << 10;
const READ: u64 = 1 << 6;
const WRITE: u64 = 1 << 7;
const DBM: u64 = 1 << 51;

fn leaf(format: &Stage2, pattern: u64) -> Attributes {
    match format.decode(format.levels().len() as u8 - 1, 0, pattern) {
        Meaning::Leaf { attributes, .. } => attributes,
        other => panic!("{pattern:#x}: {other:?}"),
    }
}

#[test]
fn the_first_table_may_be_several() {
    assert_eq!(first(&[]), (0, 9));
    assert_eq!(first(&[("input-bits", 40)]), (0, 1), "one table by default");
    assert_eq!(first(&[("input-bits", 40), ("start-level", 1)]), (1, 10), "two tables");
    assert_eq!(first(&[("input-bits", 43), ("start-level", 1)]), (1, 13), "sixteen tables");
    assert_eq!(refusal(&[("input-bits", 44), ("start-level", 1)]), "start-level");
    assert_eq!(refusal(&[("input-bits", 39), ("start-level", 0)]), "start-level");
    assert_eq!(first(&[("input-bits", 34), ("start-level", 2)]), (2, 13));
    assert_eq!(first(&[("input-bits", 25), ("start-level", 3)]), (3, 13));
    assert_eq!(first(&[("input-bits", 52), ("lpa2", 1)]), (-1, 4));
    assert_eq!(first(&[("input-bits", 52), ("lpa2", 1), ("start-level", 0)]), (0, 13));
    assert_eq!(first(&[("input-bits", 49), ("lpa2", 1), ("start-level", 255)]), (-1, 1));
    assert_eq!(refusal(&[("start-level", 255)]), "start-level");

    let k16 = |bits: u64, more: &[(&str, u64)]| first(&[&[("granule", 16384), ("input-bits", bits)], more].concat());
    assert_eq!(k16(48, &[]), (1, 12), "rule DXBSH: two tables at level 1");
    assert_eq!(k16(47, &[]), (1, 11));
    assert_eq!(k16(40, &[("start-level", 2)]), (2, 15));
    assert_eq!(k16(52, &[("lpa2", 1)]), (0, 5));
    assert_eq!(k16(51, &[("lpa2", 1), ("start-level", 1)]), (1, 15));
    assert_eq!(refusal(&[("granule", 16384), ("start-level", 0)]), "start-level");

    let k64 = |bits: u64, more: &[(&str, u64)]| first(&[&[("granule", 65536), ("input-bits", bits)], more].concat());
    assert_eq!(k64(48, &[]), (1, 6));
    assert_eq!(k64(52, &[]), (1, 10));
    assert_eq!(k64(46, &[("start-level", 2)]), (2, 17));
    assert_eq!(refusal(&[("granule", 65536), ("input-bits", 48), ("start-level", 0)]), "start-level");
    assert_eq!(refusal(&[("granule", 65536), ("lpa2", 1)]), "lpa2");
    assert_eq!(refusal(&[("input-bits", 40), ("start-level", 1), ("root", 0x1000)]), "root", "two tables: 8K");
    assert_eq!(refusal(&[("start-level", 4)]), "start-level");
    assert_eq!(refusal(&[("mair", 0)]), "mair");
}

#[test]
fn the_range_starts_at_zero() {
    let [root] = stage2(&[("input-bits", 40), ("start-level", 1), ("root", 0x2000)]).roots().try_into().unwrap();
    assert_eq!((root.setting, root.first, root.last, root.address, root.level), ("root", 0, 0xff_ffff_ffff, 0x2000, 0));
}

#[test]
fn permissions() {
    let format = stage2(&[]);
    for (s2ap, read, write) in [(0, false, false), (1, true, false), (2, false, true), (3, true, true)] {
        for (xn, execute) in [(0b00, true), (0b01, true), (0b10, false), (0b11, false)] {
            let found = leaf(&format, (PAGE & !0xc0) | s2ap << 6 | xn << 53);
            assert_eq!((found.read, found.write, found.execute, found.privileged_only), (read, write, execute, false), "S2AP {s2ap} XN {xn}");
        }
    }
    let nothing = leaf(&format, (PAGE & !0xc0) | 2 << 53);
    assert!(nothing.grants_nothing(), "a leaf that grants nothing is not absent");
    assert_eq!(format.inherit(0, 0, 3 | 0b11111 << 59), 0, "table descriptors restrict nothing");
    assert_eq!(format.explain(0, 0, 3 | 1 << 61)[0].severity, Severity::Warning);
}

#[test]
fn types_of_descriptors() {
    let format = stage2(&[]);
    assert_eq!(format.decode(3, 0, PAGE & !2), Meaning::Fault(FaultKind::Translation));
    assert_eq!(format.decode(0, 0, PAGE & !2), Meaning::Fault(FaultKind::Translation));
    assert_eq!(format.decode(1, 0, 2), Meaning::Absent);
    assert_eq!(format.decode(3, 0, PAGE & !AF), Meaning::Fault(FaultKind::AccessFlag));
    assert_eq!(format.decode(9, 0, PAGE), Meaning::Absent);
}

#[test]
fn memory_types_with_and_without_fwb() {
    use MemoryType::{Device, NonCacheable, WriteBack};
    let types =
        |format: &Stage2| [0; 16].iter().enumerate().map(|(i, _)| leaf(format, (PAGE & !0x3c) | (i as u64) << 2).memory_type).collect::<Vec<_>>();
    let plain = [
        Device,
        Device,
        Device,
        Device,
        WriteBack,
        NonCacheable,
        NonCacheable,
        NonCacheable,
        Device,
        NonCacheable,
        WriteBack,
        WriteBack,
        Device,
        NonCacheable,
        WriteBack,
        WriteBack,
    ];
    assert_eq!(types(&stage2(&[])), plain);
    let forced = [
        Device,
        Device,
        Device,
        Device,
        Device,
        NonCacheable,
        WriteBack,
        WriteBack,
        Device,
        Device,
        Device,
        Device,
        Device,
        NonCacheable,
        WriteBack,
        WriteBack,
    ];
    assert_eq!(types(&stage2(&[("force-write-back", 1)])), forced);
    assert!(leaf(&stage2(&[]), PAGE).coherent && !leaf(&stage2(&[]), PAGE & !0x300).coherent);
    assert!(leaf(&stage2(&[("lpa2", 1)]), PAGE & !0x300).coherent);
    assert!(!leaf(&stage2(&[("lpa2", 1), ("non-shareable", 1)]), PAGE & !0x300).coherent);
    assert_eq!(stage2(&[]).explain(3, 0, (PAGE & !0x3c) | 8 << 2)[0].bits, 0x3c);
}

#[test]
fn dirty_marks_are_the_other_way_round_than_in_stage_1() {
    let format = stage2(&[("hardware-access", 1), ("hardware-dirty", 1)]);
    assert_eq!(format.levels()[3].dirty, Mark { mask: WRITE, value: WRITE });
    assert_eq!(format.levels()[3].accessed, Mark { mask: AF, value: AF });
    let clean = leaf(&format, (PAGE & !WRITE) | DBM);
    assert!(clean.read && clean.write && clean.writable_when_dirty && !clean.dirty);
    assert!(!leaf(&format, PAGE & !WRITE).write);
    let written = leaf(&format, PAGE | DBM);
    assert!(written.write && written.dirty && !written.writable_when_dirty);
    assert!(!leaf(&stage2(&[]), (PAGE & !WRITE) | DBM).write, "without HD, DBM means nothing");
    assert!(!leaf(&format, PAGE & !AF).accessed);
    assert!(leaf(&stage2(&[("access-flag-disabled", 1)]), PAGE & !AF).accessed);
}

#[test]
fn new_leaves_look_as_the_architecture_wants_them() {
    let format = stage2(&[]);
    let asked = Attributes { read: true, write: true, coherent: true, accessed: true, ..Attributes::default() };
    let page = format.encode_leaf(3, 12, asked).unwrap();
    assert_eq!((page.pattern, page.attributes), (PAGE | 2 << 53, asked));
    let write_only = format.encode_leaf(3, 12, Attributes { read: false, ..asked }).unwrap();
    assert_eq!(write_only.pattern & 0xc0, WRITE, "stage 2 can say write-only");
    assert_eq!(format.encode_leaf(3, 12, Attributes { read: true, write: false, ..asked }).unwrap().pattern & 0xc0, READ);
    assert_eq!(format.encode_leaf(3, 12, Attributes { privileged_only: true, ..asked }), None, "to drop it would widen");
    assert_eq!(format.encode_leaf(3, 12, Attributes::default()), None);
    assert_eq!(format.encode_leaf(1, 30, asked).unwrap().pattern, page.pattern & !2);
    assert_eq!(format.encode_leaf(0, 39, asked), None);
    let device = format.encode_leaf(3, 12, Attributes { memory_type: MemoryType::Device, ..asked }).unwrap();
    assert_eq!((device.pattern >> 2) & 15, 1);
    assert!(!device.attributes.coherent, "device memory is not cached");
    assert_eq!(format.encode_table(0, 1), Some(3));
    assert_eq!(format.encode_table(3, 4), None);
}

#[test]
fn suggestions_hold_what_is_needed() {
    let suggest = |pairs: &[(&str, u64)], last| Stage2::suggest(&settings(pairs), &Need { last_low: Some(last), ..Need::default() }).unwrap();
    let expected = settings(&[("granule", 4096), ("input-bits", 39), ("output-bits", 48), ("start-level", 1)]);
    assert_eq!(suggest(&[], 0xffff_ffff), expected);
    assert_eq!(suggest(&[("input-bits", 40)], 0).get("start-level"), Some(0));
    assert_eq!(suggest(&[("granule", 16384)], 1 << 47).get("start-level"), Some(1));
    assert_eq!(suggest(&[("lpa2", 1)], 1 << 50).get("start-level"), Some(255));
}

proptest! {
    /// What is granted is a part of what was asked for, and is what the new entry means.
    #[test]
    fn encoding_never_widens(
        granule in prop::sample::select(vec![4096_u64, 16384, 65536]), output in prop::sample::select(vec![40_u64, 48, 52]), bits in 25_u64..=48,
        flags in 0_u8..32, word in 0_u64..1024,
    ) {
        let mut settings = settings(&[("granule", granule), ("input-bits", bits), ("output-bits", output)]);
        let names = ["hardware-access", "access-flag-disabled", "force-write-back", "non-shareable"];
        for (i, name) in names.iter().enumerate() {
            if flags >> i & 1 != 0 { settings.set(name, 1) }
        }
        if flags & 17 == 17 { settings.set("hardware-dirty", 1) }
        if flags & 8 != 0 && granule != 65536 { settings.set("lpa2", 1) }
        let format = Stage2::open(&settings).unwrap();
        let asked = Attributes::unpack(word);
        for (level, kind) in format.levels().iter().enumerate() {
            for size in (0..64).filter(|size| kind.leaf_sizes >> size & 1 != 0) {
                let Some(encoded) = format.encode_leaf(level as u8, size, asked) else {
                    prop_assert!(asked.grants_nothing() || asked.privileged_only);
                    continue;
                };
                let granted = encoded.attributes;
                prop_assert_eq!((granted.read, granted.write, granted.execute), (asked.read, asked.write, asked.execute));
                prop_assert_eq!(granted.memory_type, asked.memory_type);
                prop_assert_eq!(split(kind, encoded.pattern), (encoded.pattern, 0));
                let Meaning::Leaf { size_log2, attributes } = format.decode(level as u8, 0, encoded.pattern) else { panic!("not a leaf") };
                prop_assert_eq!(size_log2, size);
                let marks = |a: Attributes| Attributes { accessed: false, dirty: false, ..a };
                prop_assert_eq!(marks(attributes), marks(granted));
                if settings.get("hardware-access").is_some() {
                    prop_assert_eq!((attributes.accessed, granted.accessed), (asked.accessed, asked.accessed));
                }
                if settings.get("hardware-dirty").is_some() && asked.write && (asked.dirty || asked.writable_when_dirty) {
                    prop_assert_eq!((attributes.dirty, granted.dirty), (asked.dirty, asked.dirty));
                }
            }
        }
    }

    /// Whatever stands in an entry has a meaning, and its explanation agrees with it.
    #[test]
    fn any_pattern_has_a_meaning(granule in prop::sample::select(vec![4096_u64, 16384, 65536]), entry in any::<u64>(), level in 0_u8..8) {
        let format = stage2(&[("granule", granule)]);
        let errors = format.explain(level, entry, entry).iter().any(|finding| finding.severity == Severity::Error);
        match format.decode(level, entry, entry) {
            Meaning::Fault(_) => prop_assert!(errors),
            Meaning::Table { next, .. } => prop_assert!(usize::from(next.level) < format.levels().len()),
            Meaning::Part { .. } | Meaning::WholeEntry => prop_assert!(false),
            Meaning::Absent | Meaning::Leaf { .. } => prop_assert!(!errors),
        }
    }

    /// No settings make the format panic.
    #[test]
    fn any_settings_are_taken_or_refused(values in prop::collection::vec((0_usize..14, prop_oneof![0_u64..70, any::<u64>(), Just(255), Just(4096), Just(16384), Just(65536)]), 0..8)) {
        let names = ["granule", "input-bits", "output-bits", "start-level", "root", "hardware-access", "hardware-dirty", "access-flag-disabled", "hardware-table-access", "big-endian",
            "lpa", "lpa2", "force-write-back", "non-shareable"];
        let mut settings = settings(&[]);
        for (name, value) in values { settings.set(names[name], value) }
        if let Ok(format) = Stage2::open(&settings) {
            let geometry = format.geometry();
            prop_assert!(geometry.levels[0].index_bits >= 1 && geometry.levels[0].index_bits <= 18);
        }
        let need = Need { last_low: Some(u64::MAX), first_high: Some(0), last_address: u64::MAX, alignment_log2: 255 };
        let _ = Stage2::suggest(&settings, &need);
    }
}
