//! Stage 1 descriptors, written from DDI 0487 tables D8-50, D8-52 and D8-62 to D8-66, and what new ones look like.
#![allow(clippy::unwrap_used)]

mod common;

use common::{join, settings, split};
use proptest::prelude::*;
use stagecraft_plugin_arm_smmuv3::Stage1;
use stagecraft_sdk::{Attributes, ByteOrder, Error, FaultKind, Format, Kind, Mark, Meaning, MemoryType, Need, Segment, Settings, Severity};

fn stage1(pairs: &[(&str, u64)]) -> Stage1 {
    Stage1::open(&settings(pairs)).unwrap()
}

fn refusal(pairs: &[(&str, u64)]) -> String {
    match Stage1::open(&settings(pairs)) {
        Err(Error::Invalid(invalid)) => invalid.field,
        other => panic!("{pairs:?}: {other:?}"),
    }
}

/// Level numbers, index ranges and leaf sizes of the tables.
fn ladder(format: &Stage1) -> Vec<(i8, u8, u8, u64)> {
    format.levels().iter().map(|l| (l.number, l.index_lsb, l.index_bits, l.leaf_sizes)).collect()
}

const K4: u64 = 1 << 12;
const M2: u64 = 1 << 21;
const G1: u64 = 1 << 30;
const G512: u64 = 1 << 39;

/// Page with AF, SH inner, AttrIndx 1 (write-back), AP=01 (user, writable): what Linux writes, without nG and XN.
const PAGE: u64 = 0x747;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const DBM: u64 = 1 << 51;
const AF: u64 = 1 << 10;
const READ_ONLY: u64 = 1 << 7;
const USER: u64 = 1 << 6;

#[test]
fn levels_follow_granule_and_input_size() {
    assert_eq!(ladder(&stage1(&[])), [(0, 39, 9, 0), (1, 30, 9, G1), (2, 21, 9, M2), (3, 12, 9, K4)]);
    assert_eq!(ladder(&stage1(&[("input-bits", 39)])), [(1, 30, 9, G1), (2, 21, 9, M2), (3, 12, 9, K4)]);
    assert_eq!(ladder(&stage1(&[("input-bits", 40)]))[0], (0, 39, 1, 0), "a first table of two entries");
    assert_eq!(ladder(&stage1(&[("input-bits", 25)])), [(2, 21, 4, M2), (3, 12, 9, K4)]);
    assert_eq!(ladder(&stage1(&[("input-bits", 16)])), [(3, 12, 4, K4)]);
    let lpa2 = stage1(&[("input-bits", 52), ("lpa2", 1), ("output-bits", 52)]);
    assert_eq!(ladder(&lpa2), [(-1, 48, 4, 0), (0, 39, 9, G512), (1, 30, 9, G1), (2, 21, 9, M2), (3, 12, 9, K4)]);
    assert_eq!(ladder(&stage1(&[("input-bits", 49), ("lpa2", 1)]))[0], (-1, 48, 1, 0));

    let k16 = |pairs: &[(&str, u64)]| ladder(&stage1(&[&[("granule", 16384)], pairs].concat()));
    assert_eq!(k16(&[]), [(0, 47, 1, 0), (1, 36, 11, 0), (2, 25, 11, 1 << 25), (3, 14, 11, 1 << 14)]);
    assert_eq!(k16(&[("input-bits", 47)])[0], (1, 36, 11, 0));
    assert_eq!(k16(&[("input-bits", 36)])[0], (2, 25, 11, 1 << 25));
    assert_eq!(k16(&[("input-bits", 52), ("lpa2", 1)])[..2], [(0, 47, 5, 0), (1, 36, 11, 1 << 36)]);

    let k64 = |pairs: &[(&str, u64)]| ladder(&stage1(&[&[("granule", 65536)], pairs].concat()));
    assert_eq!(k64(&[]), [(1, 42, 6, 0), (2, 29, 13, 1 << 29), (3, 16, 13, 1 << 16)]);
    assert_eq!(k64(&[("input-bits", 52), ("output-bits", 52)])[0], (1, 42, 10, 1 << 42), "4T blocks with 52-bit output");
    assert_eq!(k64(&[("input-bits", 42)]), [(2, 29, 13, 1 << 29), (3, 16, 13, 1 << 16)]);
    assert_eq!(k64(&[("input-bits", 17)]), [(3, 16, 1, 1 << 16)]);
}

#[test]
fn addresses_stand_where_the_granule_puts_them() {
    let shapes = |format: &Stage1, level: usize| -> Vec<(u64, u64, Vec<Segment>)> {
        format.levels()[level].shapes.iter().map(|s| (s.mask, s.value, s.address.clone())).collect()
    };
    let plain = stage1(&[]);
    assert_eq!(shapes(&plain, 1), [(3, 3, vec![Segment::in_place(47, 12)]), (3, 1, vec![Segment::in_place(47, 30)])]);
    assert_eq!(shapes(&plain, 3), [(1, 1, vec![Segment::in_place(47, 12)])]);
    let k16 = stage1(&[("granule", 16384)]);
    assert_eq!(shapes(&k16, 2), [(3, 3, vec![Segment::in_place(47, 14)]), (3, 1, vec![Segment::in_place(47, 25)])]);
    let lpa2 = stage1(&[("lpa2", 1)]);
    let high = Segment { entry_lsb: 8, address_lsb: 50, width: 2 };
    assert_eq!(shapes(&lpa2, 0), [(3, 3, vec![Segment::in_place(49, 12), high]), (3, 1, vec![Segment::in_place(49, 39), high])]);
    let k64 = stage1(&[("granule", 65536)]);
    let high = Segment { entry_lsb: 12, address_lsb: 48, width: 4 };
    assert_eq!(shapes(&k64, 1), [(3, 3, vec![Segment::in_place(47, 16), high]), (3, 1, vec![Segment::in_place(47, 29), high])]);

    assert_eq!(split(&k64.levels()[1], 0x0000_1234_6000_f001), (0x1, 0x000f_1234_6000_0000));
    assert_eq!(split(&lpa2.levels()[3], 0x0003_1234_5678_9303), (0x3, 0x000f_1234_5678_9000));
}

#[test]
fn the_low_range_starts_at_zero_and_the_high_one_ends_at_the_end() {
    let both = stage1(&[
        ("input-bits", 39),
        ("root", 0x4000_0000),
        ("input-bits-high", 42),
        ("granule-high", 65536),
        ("root-high", 0x8000_0000),
        ("tbi-high", 1),
    ]);
    let [low, high] = both.roots().try_into().unwrap();
    assert_eq!((low.setting, low.first, low.last, low.ignored, low.address, low.level), ("root", 0, 0x7f_ffff_ffff, 0, 0x4000_0000, 0));
    assert_eq!((high.setting, high.first, high.last), ("root-high", 0xffff_fc00_0000_0000, u64::MAX));
    assert_eq!((high.ignored, high.address, high.level), (0xff00_0000_0000_0000, 0x8000_0000, 3));
    assert_eq!(ladder(&both), [(1, 30, 9, G1), (2, 21, 9, M2), (3, 12, 9, K4), (2, 29, 13, 1 << 29), (3, 16, 13, 1 << 16)]);
    assert_eq!(both.decode(3, 0, 3), Meaning::Table { next: stagecraft_sdk::Next::whole(4), inherited: 0 }, "chains do not mix");

    let mixed = stage1(&[("lpa2", 1), ("input-bits-high", 42), ("granule-high", 65536)]);
    let Meaning::Leaf { attributes, .. } = mixed.decode(5, 0, PAGE & !0x300) else { panic!("not a leaf") };
    assert!(!attributes.coherent, "64K descriptors have shareability bits also where the low range has LPA2");
    assert!(mixed.explain(3, 0, PAGE | 1 << 50).is_empty() && mixed.explain(5, 0, PAGE | 3 << 48)[0].bits == 3 << 48);

    let shared = stage1(&[("input-bits-high", 48)]);
    assert_eq!(shared.levels().len(), 4, "equal ranges share their tables");
    assert_eq!(shared.roots()[1].level, 0);
    assert_eq!((shared.roots()[1].address, shared.roots()[1].first), (0, 0xffff_0000_0000_0000));
    let differing = stage1(&[("input-bits-high", 48), ("hierarchy-disabled-high", 1)]);
    assert_eq!(differing.levels().len(), 8, "ranges that differ do not");

    let high_only = stage1(&[("low-disabled", 1), ("root-high", 0x1000)]);
    assert_eq!(high_only.roots().len(), 1);
    assert_eq!(high_only.roots()[0].setting, "root-high");
    assert_eq!(stage1(&[("root", 0x1000)]).roots().len(), 1, "no high range unless asked for");
}

#[test]
fn settings_that_make_no_sense_are_refused_by_name() {
    assert_eq!(refusal(&[("granule", 8192)]), "granule");
    assert_eq!(refusal(&[("input-bits", 49)]), "input-bits");
    assert_eq!(refusal(&[("input-bits", 15)]), "input-bits");
    assert_eq!(refusal(&[("granule", 65536), ("input-bits", 16)]), "input-bits");
    assert_eq!(refusal(&[("input-bits", 53), ("lpa2", 1)]), "input-bits");
    assert_eq!(refusal(&[("output-bits", 47)]), "output-bits");
    assert_eq!(refusal(&[("root", 0x1008)]), "root");
    assert_eq!(refusal(&[("root", 1 << 48)]), "root");
    assert_eq!(refusal(&[("root", 1 << 48), ("output-bits", 52)]), "root", "the 4K granule has no such addresses");
    assert_eq!(refusal(&[("root", 1 << 40), ("output-bits", 40)]), "root");
    assert_eq!(refusal(&[("input-bits", 40), ("root", 8), ("output-bits", 48)]), "root", "two entries: 16 bytes");
    assert_eq!(refusal(&[("input-bits", 40), ("root", 0x20), ("output-bits", 52)]), "root", "52-bit output: 64 bytes at least");
    stage1(&[("input-bits", 40), ("root", 0x10)]);
    assert_eq!(refusal(&[("granule-high", 4096)]), "granule-high");
    assert_eq!(refusal(&[("tbi-high", 1)]), "tbi-high");
    assert_eq!(refusal(&[("low-disabled", 1)]), "low-disabled");
    assert_eq!(refusal(&[("low-disabled", 1), ("root", 0), ("root-high", 0)]), "root");
    assert_eq!(refusal(&[("hardware-dirty", 1)]), "hardware-dirty");
    assert_eq!(refusal(&[("hardware-table-access", 1)]), "hardware-table-access");
    assert_eq!(refusal(&[("lpa2", 1), ("granule", 65536)]), "lpa2");
    assert_eq!(refusal(&[("lpa", 1)]), "lpa", "only the 64K granule has it");
    assert_eq!(refusal(&[("lpa", 0), ("granule", 65536), ("output-bits", 52)]), "lpa", "where else would 52 bits come from");
    stage1(&[("lpa", 1), ("granule-high", 65536), ("input-bits-high", 48)]);
    assert_eq!(refusal(&[("single-privilege", 1), ("root-high", 0)]), "single-privilege");
    assert_eq!(refusal(&[("start-level", 1)]), "start-level");
    assert_eq!(refusal(&[("tbi", 2)]), "tbi");
}

/// The attributes of a leaf at level 3.
fn leaf(format: &Stage1, inherited: u64, pattern: u64) -> Attributes {
    match format.decode(format.levels().len() as u8 - 1, inherited, pattern) {
        Meaning::Leaf { attributes, .. } => attributes,
        other => panic!("{pattern:#x}: {other:?}"),
    }
}

#[test]
fn types_of_descriptors() {
    let format = stage1(&[]);
    for level in 0..4 {
        for absent in [0, 2, u64::MAX - 1] {
            assert_eq!(format.decode(level, 0, absent), Meaning::Absent);
        }
    }
    let next = |level| Meaning::Table { next: stagecraft_sdk::Next::whole(level), inherited: 0 };
    assert_eq!([0, 1, 2].map(|level| format.decode(level, 0, 3)), [next(1), next(2), next(3)]);
    let reserved = Meaning::Fault(FaultKind::Translation);
    assert_eq!(format.decode(0, 0, PAGE & !2), reserved, "no 512G blocks without LPA2");
    assert_eq!(format.decode(3, 0, PAGE & !2), reserved, "0b01 at level 3");
    assert_eq!(format.kind(3, PAGE & !2), Kind::Leaf);
    let size = |format: &Stage1, level, pattern| match format.decode(level, 0, pattern) {
        Meaning::Leaf { size_log2, .. } => Some(size_log2),
        _ => None,
    };
    assert_eq!([1, 2, 3].map(|level| size(&format, level, if level == 3 { PAGE } else { PAGE & !2 })), [Some(30), Some(21), Some(12)]);
    assert_eq!(size(&stage1(&[("lpa2", 1)]), 0, PAGE & !2), Some(39));
    assert_eq!(size(&stage1(&[("granule", 16384)]), 1, PAGE & !2), None, "no 64G blocks without LPA2");
    assert_eq!(size(&stage1(&[("granule", 16384), ("lpa2", 1)]), 1, PAGE & !2), Some(36));
    assert_eq!(size(&stage1(&[("granule", 65536)]), 0, PAGE & !2), None, "no 4T blocks without 52-bit output");
    assert_eq!(size(&stage1(&[("granule", 65536), ("output-bits", 52)]), 0, PAGE & !2), Some(42));
    assert_eq!(format.decode(200, 0, 3), Meaning::Absent, "a level that is not there is not a panic");
}

#[test]
fn permissions_of_a_stream_with_two_privilege_levels() {
    let format = stage1(&[]);
    // UXN, PXN, AP[2:1] -> write, execute, privileged only. Table D8-65 for unprivileged requests; privileged ones where AP[1] is 0.
    let table = [
        (0, 0, 0b00, true, true, true),
        (0, 0, 0b01, true, true, false),
        (0, 0, 0b10, false, true, true),
        (0, 0, 0b11, false, true, false),
        (0, 1, 0b00, true, false, true),
        (0, 1, 0b01, true, true, false),
        (0, 1, 0b10, false, false, true),
        (0, 1, 0b11, false, true, false),
        (1, 0, 0b00, true, true, true),
        (1, 0, 0b01, true, false, false),
        (1, 0, 0b10, false, true, true),
        (1, 0, 0b11, false, false, false),
        (1, 1, 0b00, true, false, true),
        (1, 1, 0b01, true, false, false),
        (1, 1, 0b10, false, false, true),
        (1, 1, 0b11, false, false, false),
    ];
    for (uxn, pxn, ap, write, execute, privileged_only) in table {
        let found = leaf(&format, 0, 0x703 | uxn << 54 | pxn << 53 | ap << 6 | 1 << 2);
        let expected = (true, write, execute, privileged_only);
        assert_eq!((found.read, found.write, found.execute, found.privileged_only), expected, "UXN {uxn} PXN {pxn} AP {ap:#b}");
    }
    let wxn = stage1(&[("wxn", 1)]);
    assert!(!leaf(&wxn, 0, PAGE).execute && leaf(&wxn, 0, PAGE | READ_ONLY).execute);
}

#[test]
fn permissions_of_streams_that_are_privileged() {
    let privileged = stage1(&[("privileged", 1)]);
    assert!(Format::privileged(&privileged));
    assert!(!leaf(&privileged, 0, PAGE).execute, "what users can write, privileged code cannot execute");
    assert!(leaf(&privileged, 0, PAGE | READ_ONLY).execute);
    assert!(!leaf(&privileged, 0, PAGE | READ_ONLY | PXN).execute);
    let pan = stage1(&[("privileged", 1), ("pan", 1)]);
    assert!(!leaf(&pan, 0, PAGE).read && !leaf(&pan, 0, PAGE).write);
    assert!(leaf(&pan, 0, PAGE & !USER).write);
    assert!(leaf(&stage1(&[("pan", 1)]), 0, PAGE).write, "unprivileged requests pass");

    let single = stage1(&[("single-privilege", 1)]);
    assert!(Format::privileged(&single));
    for user in [0, USER] {
        let found = leaf(&single, 0, (PAGE & !USER) | user | PXN);
        assert!(found.write && found.execute && !found.privileged_only, "AP[1] and PXN play no part");
        assert!(!leaf(&single, 0, (PAGE & !USER) | user | UXN).execute);
    }
    assert_eq!(single.inherit(0, 0, 3 | 1 << 61 | 1 << 59), 0, "nor do APTable[0] and PXNTable");

    let e0pd = stage1(&[("unprivileged-disabled", 1)]);
    assert!(leaf(&e0pd, 0, PAGE).privileged_only);
}

#[test]
fn table_descriptors_restrict_what_is_below() {
    let format = stage1(&[]);
    let through = |bits: u64| match format.decode(0, 0, 3 | bits) {
        Meaning::Table { inherited, .. } => leaf(&format, inherited, PAGE),
        other => panic!("{other:?}"),
    };
    assert_eq!(through(0), leaf(&format, 0, PAGE));
    assert!(through(1 << 61).privileged_only, "APTable[0]");
    assert!(!through(1 << 62).write, "APTable[1]");
    assert!(!through(1 << 60).execute, "UXNTable");
    assert!(through(1 << 59).execute, "PXNTable says nothing about unprivileged requests");
    let all = through(0b1111 << 59);
    assert_eq!((all.read, all.write, all.execute, all.privileged_only), (true, false, false, true));
    let two = format.inherit(1, format.inherit(0, 0, 3 | 1 << 61), 3 | 1 << 62);
    assert_eq!(two, format.inherit(0, 0, 3 | 3 << 61), "restrictions add up");
    assert_eq!(format.inherit(0, 0, 3 | 1 << 63), 0, "NSTable means nothing to Non-secure streams");

    let disabled = stage1(&[("hierarchy-disabled", 1)]);
    assert_eq!(disabled.inherit(0, 0, 3 | 0b1111 << 59), 0);
    let high = stage1(&[("input-bits-high", 48), ("hierarchy-disabled-high", 1)]);
    let (low, high) = (high.inherit(0, 0, 3 | 1 << 62), high.inherit(high.roots()[1].level, 0, 3 | 1 << 62));
    assert_ne!(low, 0, "the low range keeps them");
    assert_eq!(high, 0, "the high range does not");
}

#[test]
fn the_access_flag_and_dirty_marks() {
    let plain = stage1(&[]);
    assert_eq!(plain.decode(3, 0, PAGE & !AF), Meaning::Fault(FaultKind::AccessFlag));
    assert_eq!(plain.levels()[3].accessed, Mark::default());
    assert!(leaf(&plain, 0, PAGE).accessed && !leaf(&plain, 0, PAGE).dirty);
    assert!(!leaf(&plain, 0, PAGE | READ_ONLY | DBM).write, "without HD, DBM means nothing");

    let ignored = stage1(&[("access-flag-disabled", 1)]);
    assert!(leaf(&ignored, 0, PAGE & !AF).accessed, "AF counts as 1");

    let access = stage1(&[("hardware-access", 1)]);
    assert!(!leaf(&access, 0, PAGE & !AF).accessed && leaf(&access, 0, PAGE).accessed);
    assert_eq!(access.levels()[3].accessed, Mark { mask: AF, value: AF });
    assert_eq!(access.levels()[3].dirty, Mark::default());

    let dirty = stage1(&[("hardware-access", 1), ("hardware-dirty", 1)]);
    assert_eq!(dirty.levels()[3].dirty, Mark { mask: READ_ONLY, value: 0 });
    let clean = leaf(&dirty, 0, PAGE | READ_ONLY | DBM);
    assert!(clean.write && clean.writable_when_dirty && !clean.dirty);
    assert!(!leaf(&dirty, 0, PAGE | READ_ONLY).write, "really read-only");
    let written = leaf(&dirty, 0, PAGE | DBM);
    assert!(written.write && !written.writable_when_dirty && written.dirty);
    let above = dirty.inherit(0, 0, 3 | 1 << 62);
    assert!(!leaf(&dirty, above, PAGE | READ_ONLY | DBM).write, "hardware does not make writable what APTable forbids");
    assert_eq!((dirty.levels()[0].table_accessed, dirty.encode_table(0, 1)), (Mark::default(), Some(3)));
    let tables = stage1(&[("hardware-access", 1), ("hardware-table-access", 1)]);
    let marks: Vec<Mark> = tables.levels().iter().map(|level| level.table_accessed).collect();
    let mark = Mark { mask: AF, value: AF };
    assert_eq!(marks, [mark, mark, mark, Mark::default()], "entries of the last table lead to no other");
    assert_eq!(tables.encode_table(0, 1), Some(3 | AF), "new tables count as used");
    let wxn = stage1(&[("hardware-access", 1), ("hardware-dirty", 1), ("wxn", 1)]);
    assert!(!leaf(&wxn, 0, PAGE | READ_ONLY | DBM).execute, "a clean leaf counts as writable");
}

#[test]
fn memory_types_come_from_mair() {
    use MemoryType::{Device, NonCacheable, WriteBack};
    let cases = [
        (0x00, Device),
        (0x04, Device),
        (0x08, Device),
        (0x0c, Device),
        (0x05, Device),
        (0x44, NonCacheable),
        (0x40, NonCacheable),
        (0x4f, NonCacheable),
        (0xf4, NonCacheable),
        (0xff, WriteBack),
        (0xee, WriteBack),
        (0x77, WriteBack),
        (0xbb, WriteBack),
        (0xf0, WriteBack),
        (0x11, WriteBack),
    ];
    for (byte, memory_type) in cases {
        for index in 0..8_u64 {
            let format = stage1(&[("mair", byte << (8 * index))]);
            let found = leaf(&format, 0, (PAGE & !0x1c) | index << 2);
            assert_eq!((found.memory_type, found.coherent), (memory_type, memory_type == WriteBack), "{byte:#x} at {index}");
        }
    }
    let linux = stage1(&[]);
    let types = [0, 1, 2, 3].map(|index: u64| leaf(&linux, 0, (PAGE & !0x1c) | index << 2).memory_type);
    assert_eq!(types, [NonCacheable, WriteBack, Device, NonCacheable]);
    let coherent = [0, 1, 2, 3].map(|sh: u64| leaf(&linux, 0, (PAGE & !0x300) | sh << 8).coherent);
    assert_eq!(coherent, [false, false, true, true]);
    assert!(leaf(&stage1(&[("lpa2", 1)]), 0, PAGE & !0x300).coherent, "with LPA2 the context descriptor says so");
    assert!(!leaf(&stage1(&[("lpa2", 1), ("non-shareable", 1)]), 0, PAGE & !0x300).coherent);
}

#[test]
fn odd_bits_are_explained_and_do_not_fault() {
    let explain = |format: &Stage1, level, pattern| -> Vec<(Severity, u64)> {
        let level: u8 = level;
        format.explain(level, 0, pattern).iter().map(|finding| (finding.severity, finding.bits)).collect()
    };
    let format = stage1(&[]);
    assert_eq!(explain(&format, 3, PAGE | 0xf << 60 | 0xf << 55 | 1 << 52 | 1 << 11 | 1 << 5), [], "software bits, contiguous, nG and NS");
    assert_eq!(explain(&format, 3, 3 << 48 | PAGE), [(Severity::Warning, 3 << 48)]);
    assert_eq!(explain(&format, 2, (PAGE & !2) | 1 << 20 | 1 << 13 | 1 << 16), [(Severity::Warning, 1 << 20 | 1 << 13)], "nT is a hint");
    assert_eq!(explain(&format, 3, (PAGE & !0x300) | 0x100), [(Severity::Warning, 0x300)]);
    assert_eq!(explain(&format, 0, 3 | 1 << 50), [(Severity::Warning, 1 << 50)]);
    assert_eq!(explain(&stage1(&[("mair", 0x0500)]), 3, PAGE), [(Severity::Warning, 0x1c)]);
    let k16 = stage1(&[("granule", 16384)]);
    assert_eq!(explain(&k16, 3, PAGE | 1 << 12), [(Severity::Warning, 1 << 12)]);
    assert_eq!(explain(&stage1(&[("granule", 65536)]), 1, (PAGE & !2) | 1 << 20), [(Severity::Warning, 1 << 20)]);
    assert_eq!(explain(&format, 3, PAGE & !AF), [(Severity::Error, AF)]);
    assert_eq!(explain(&format, 3, 1), [(Severity::Error, 3)]);
    assert_eq!(explain(&format, 3, 0), []);
    for finding in format.explain(3, 0, PAGE & !AF) {
        assert!(finding.section.starts_with("DDI 0487"));
    }
}

#[test]
fn new_leaves_look_as_the_architecture_wants_them() {
    let format = stage1(&[]);
    let asked = Attributes { read: true, write: true, coherent: true, accessed: true, ..Attributes::default() };
    let page = format.encode_leaf(3, 12, asked).unwrap();
    assert_eq!(page.pattern, PXN | UXN | 1 << 11 | PAGE, "as Linux writes a page for a device");
    assert_eq!(page.attributes, asked);
    assert_eq!(format.encode_leaf(2, 21, asked).unwrap().pattern, page.pattern & !2);
    assert_eq!(format.encode_leaf(2, 12, asked), None, "a level has one size");
    assert_eq!(format.encode_leaf(0, 39, asked), None);
    assert_eq!(join(&format.levels()[2], page.pattern & !2, 0x4020_0000) & 0xffff_ffff_f000, 0x4020_0000);

    let ask = |attributes: Attributes| format.encode_leaf(3, 12, attributes);
    assert_eq!(ask(Attributes { read: false, ..asked }), None, "write-only cannot be said");
    assert_eq!(ask(Attributes { execute: true, ..Attributes::default() }), None, "nor execute-only");
    assert_eq!(ask(Attributes::default()), None);
    let read_only = ask(Attributes { write: false, ..asked }).unwrap();
    assert_eq!(read_only.pattern & 0xc0, READ_ONLY | USER);
    assert_eq!(ask(Attributes { privileged_only: true, ..asked }).unwrap().pattern & 0xc0, 0);
    assert_eq!(ask(Attributes { memory_type: MemoryType::Device, ..asked }).unwrap().pattern & 0x31c, 2 << 2 | 2 << 8);
    let clean = ask(Attributes { writable_when_dirty: true, ..asked }).unwrap();
    assert_eq!((clean.pattern, clean.attributes), (page.pattern, asked), "without HD, a clean leaf is simply writable");
    let old = ask(Attributes { accessed: false, ..asked }).unwrap();
    assert_eq!((old.pattern, old.attributes.accessed), (page.pattern, false), "without HA, AF is always set and means nothing");

    let marks = stage1(&[("hardware-access", 1), ("hardware-dirty", 1)]);
    let clean = marks.encode_leaf(3, 12, Attributes { writable_when_dirty: true, accessed: false, ..asked }).unwrap();
    assert_eq!(clean.pattern & (DBM | AF | READ_ONLY), DBM | READ_ONLY);
    assert!(clean.attributes.writable_when_dirty && !clean.attributes.accessed && !clean.attributes.dirty);
    let dirty = marks.encode_leaf(3, 12, Attributes { dirty: true, ..asked }).unwrap();
    assert_eq!(dirty.pattern & (DBM | AF | READ_ONLY), DBM | AF, "so that it can be made clean again");
    assert_eq!(dirty.attributes, Attributes { dirty: true, ..asked });

    assert_eq!([0, 1, 2, 3].map(|level| format.encode_table(level, level + 1)), [Some(3), Some(3), Some(3), None]);
    assert_eq!(format.encode_table(0, 2), None);
    assert_eq!(format.encode_table(255, 0), None);
}

#[test]
fn memory_that_must_not_be_cached_never_is() {
    let asked = |memory_type| Attributes { read: true, memory_type, coherent: true, ..Attributes::default() };
    let only = |byte: u64| stage1(&[("mair", byte * 0x0101_0101_0101_0101)]);
    let granted = |byte, memory_type| only(byte).encode_leaf(3, 12, asked(memory_type)).map(|e| e.attributes.memory_type);
    use MemoryType::{Device, NonCacheable, WriteBack};
    assert_eq!(granted(0xff, WriteBack), Some(WriteBack));
    assert_eq!(granted(0xff, NonCacheable), None);
    assert_eq!(granted(0xff, Device), None);
    assert_eq!(granted(0x44, WriteBack), Some(NonCacheable));
    assert_eq!(granted(0x44, Device), Some(NonCacheable));
    assert_eq!(granted(0x04, NonCacheable), Some(Device));
    assert_eq!(granted(0x04, WriteBack), None);
}

#[test]
fn suggestions_hold_what_is_needed() {
    let suggest = |pairs: &[(&str, u64)], need: Need| Stage1::suggest(&settings(pairs), &need).unwrap();
    let need = |last: u64| Need { last_low: Some(last), ..Need::default() };
    assert_eq!(suggest(&[], need(0xffff_ffff)), settings(&[("granule", 4096), ("input-bits", 39), ("output-bits", 48)]));
    assert_eq!(suggest(&[], need(0x7f_ffff_ffff)).get("input-bits"), Some(39));
    assert_eq!(suggest(&[], need(0x80_0000_0000)).get("input-bits"), Some(48));
    assert_eq!(suggest(&[], need(u64::MAX)).get("input-bits"), Some(48), "as much as the settings allow");
    assert_eq!(suggest(&[("lpa2", 1)], need(1 << 48)).get("input-bits"), Some(52));
    assert_eq!(suggest(&[("granule", 16384)], need(1 << 36)).get("input-bits"), Some(47));
    assert_eq!(suggest(&[("granule", 65536)], need(1 << 48)).get("input-bits"), Some(52));
    assert_eq!(suggest(&[("input-bits", 32)], need(1 << 40)).get("input-bits"), Some(32), "given settings win");
    let far = Need { last_address: 1 << 48, ..Need::default() };
    assert_eq!(suggest(&[], far).get("output-bits"), Some(48));
    assert_eq!(suggest(&[("granule", 65536)], far).get("output-bits"), Some(52));
    let high = Need { last_low: Some(0), first_high: Some(0xffff_ff80_0000_0000), ..Need::default() };
    let found = suggest(&[], high);
    assert_eq!((found.get("granule-high"), found.get("input-bits-high")), (Some(4096), Some(39)));
    assert!(Stage1::suggest(&settings(&[("granule", 1)]), &high).is_err());
}

#[test]
fn the_byte_order_is_the_settings() {
    assert_eq!(stage1(&[]).byte_order(), ByteOrder::Little);
    assert_eq!(stage1(&[("big-endian", 1)]).byte_order(), ByteOrder::Big);
    assert_eq!(stage1(&[("output-bits", 40)]).output_bits(), 40);
}

fn flag(name: &'static str) -> impl Strategy<Value = Option<(String, u64)>> {
    any::<bool>().prop_map(move |set| set.then(|| (name.to_owned(), 1)))
}

prop_compose! {
    fn any_settings()(
        granule in prop::sample::select(vec![4096_u64, 16384, 65536]),
        lpa2 in any::<bool>(),
        output in prop::sample::select(vec![32_u64, 40, 48, 52]),
        flags in (flag("hardware-access"), flag("access-flag-disabled"), flag("wxn"), flag("pan"), flag("privileged"), flag("unprivileged-disabled"), flag("non-shareable")),
        dirty in any::<bool>(), single in any::<bool>(), high in any::<bool>(), bits in 25_u64..=48, mair in any::<u64>(), plain in any::<bool>(),
    ) -> Settings {
        let mut settings = settings(&[("granule", granule), ("input-bits", bits), ("output-bits", output)]);
        let (a, b, c, d, e, f, g) = flags;
        for (name, value) in [a, b, c, d, e, f, g].into_iter().flatten() {
            settings.set(&name, value);
        }
        if dirty && settings.get("hardware-access").is_some() { settings.set("hardware-dirty", 1) }
        if lpa2 && granule != 65536 { settings.set("lpa2", 1) }
        if single { settings.set("single-privilege", 1) } else if high { settings.set("input-bits-high", 73 - bits) }
        if !plain { settings.set("mair", mair) }
        settings
    }
}

proptest! {
    /// What is granted is a part of what was asked for, and is what the new entry means.
    #[test]
    fn encoding_never_widens(settings in any_settings(), word in 0_u64..1024) {
        let format = Stage1::open(&settings).unwrap();
        let asked = Attributes::unpack(word);
        for (level, kind) in format.levels().iter().enumerate() {
            for size in (0..64).filter(|size| kind.leaf_sizes >> size & 1 != 0) {
                let Some(encoded) = format.encode_leaf(level as u8, size, asked) else {
                    let may_lack_memory_type = settings.get("mair").is_some();
                    prop_assert!(!asked.read || may_lack_memory_type || (settings.get("single-privilege").is_some() && asked.privileged_only));
                    continue;
                };
                let granted = encoded.attributes;
                prop_assert!(!granted.write || asked.write);
                prop_assert!(!granted.execute || asked.execute);
                prop_assert!(!granted.read || asked.read);
                prop_assert!(granted.privileged_only || !asked.privileged_only);
                prop_assert!(!granted.grants_nothing());
                prop_assert!(granted.memory_type == asked.memory_type || granted.memory_type != MemoryType::WriteBack);
                prop_assert_eq!(split(kind, encoded.pattern), (encoded.pattern, 0));
                let meaning = format.decode(level as u8, 0, encoded.pattern);
                let Meaning::Leaf { size_log2, attributes } = meaning else { panic!("{meaning:?}") };
                prop_assert_eq!(size_log2, size);
                let marks = |a: Attributes| Attributes { accessed: false, dirty: false, ..a };
                prop_assert_eq!(marks(attributes), marks(granted));
                prop_assert!(format.explain(level as u8, 0, encoded.pattern).iter().all(|f| f.severity != Severity::Error));
                if settings.get("hardware-access").is_some() {
                    prop_assert_eq!((attributes.accessed, granted.accessed), (asked.accessed, asked.accessed));
                }
                if settings.get("hardware-dirty").is_some() && asked.write && (asked.dirty || asked.writable_when_dirty) && granted.write {
                    prop_assert_eq!(attributes.dirty, asked.dirty);
                    prop_assert_eq!(attributes.writable_when_dirty, asked.writable_when_dirty && !asked.dirty);
                }
            }
        }
    }

    /// Whatever stands in an entry has a meaning, and its explanation agrees with it.
    #[test]
    fn any_pattern_has_a_meaning(settings in any_settings(), entry in any::<u64>(), inherited in any::<u64>(), level in 0_u8..12) {
        let format = Stage1::open(&settings).unwrap();
        let errors = format.explain(level, inherited, entry).iter().any(|finding| finding.severity == Severity::Error);
        match format.decode(level, inherited, entry) {
            Meaning::Fault(_) => prop_assert!(errors),
            Meaning::Table { next, .. } => prop_assert!(usize::from(next.level) < format.levels().len()),
            Meaning::Part { .. } | Meaning::WholeEntry => prop_assert!(false),
            Meaning::Absent | Meaning::Leaf { .. } => prop_assert!(!errors),
        }
        let _ = format.encode_leaf(level, (entry & 0xff) as u8, Attributes::unpack(entry));
        let _ = format.encode_table(level, (entry & 0xff) as u8);
    }

    /// No settings make the format panic.
    #[test]
    fn any_settings_are_taken_or_refused(values in prop::collection::vec((0_usize..28, prop_oneof![0_u64..70, any::<u64>(), Just(4096), Just(16384), Just(65536)]), 0..8)) {
        let names = ["granule", "input-bits", "output-bits", "root", "granule-high", "input-bits-high", "root-high", "mair", "low-disabled", "tbi", "tbi-high",
            "hierarchy-disabled", "hierarchy-disabled-high", "unprivileged-disabled", "unprivileged-disabled-high", "non-shareable", "non-shareable-high",
            "hardware-access", "hardware-dirty", "access-flag-disabled", "hardware-table-access", "big-endian", "lpa", "lpa2", "privileged", "single-privilege", "wxn", "pan"];
        let mut settings = Settings::default();
        for (name, value) in values { settings.set(names[name], value) }
        if let Ok(format) = Stage1::open(&settings) {
            let geometry = format.geometry();
            prop_assert!(!geometry.roots.is_empty() && geometry.roots.is_sorted_by_key(|root| root.first));
            for root in &geometry.roots {
                prop_assert!(root.address >> geometry.output_bits == 0 && root.address % 8 == 0);
            }
        }
        let need = Need { last_low: Some(u64::MAX), first_high: Some(0), last_address: u64::MAX, alignment_log2: 255 };
        let _ = Stage1::suggest(&settings, &need);
    }
}
