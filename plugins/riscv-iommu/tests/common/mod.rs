//! What several tests need. Bits are written as numbers here and in the tests: the specification's, not the crate's.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{Attributes, FaultKind, Format, Geometry, Meaning, Next, Settings};

pub const V: u64 = 1;
pub const R: u64 = 1 << 1;
pub const W: u64 = 1 << 2;
pub const X: u64 = 1 << 3;
pub const U: u64 = 1 << 4;
pub const G: u64 = 1 << 5;
pub const A: u64 = 1 << 6;
pub const D: u64 = 1 << 7;
pub const N: u64 = 1 << 63;
/// A leaf that allows everything.
pub const ALL: u64 = V | R | W | X | U | A | D;

pub fn settings(list: &[(&str, u64)]) -> Settings {
    list.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

pub fn open<F: Format>(list: &[(&str, u64)]) -> F {
    F::open(&settings(list)).unwrap()
}

/// Names and values in one line.
pub fn line(settings: &Settings) -> String {
    let one = |(name, value): (&str, u64)| if name.ends_with("root") { format!("{name}={value:#x}") } else { format!("{name}={value}") };
    settings.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// What [`ALL`] means.
pub fn everything() -> Attributes {
    Attributes { read: true, write: true, execute: true, coherent: true, accessed: true, dirty: true, ..Attributes::default() }
}

pub fn leaf<F: Format>(format: &F, level: u8, pattern: u64) -> Attributes {
    match format.decode(level, 0, pattern) {
        Meaning::Leaf { attributes, .. } => attributes,
        other => panic!("{pattern:#x}: {other:?}"),
    }
}

/// Every bit of a leaf of 8 bytes that is not address, flipped alone: without Svnapot, Svpbmt, Svrsw60t59b and hardware update, and with requests that
/// have no privilege.
pub fn check_every_bit_of_leaves<F: Format>(format: &F, slots: impl Fn(u8) -> u8) {
    for level in 0..5 {
        let lowest_address_bit = slots(level) - 2;
        for bit in (0..64).filter(|bit| !(lowest_address_bit..=53).contains(bit)) {
            let like = |attributes| Meaning::Leaf { size_log2: slots(level), attributes };
            let expected = match bit {
                0 => Meaning::Absent,
                2 => like(Attributes { write: false, ..everything() }),
                3 => like(Attributes { execute: false, ..everything() }),
                4 => Meaning::Fault(FaultKind::Permission),
                6 => Meaning::Fault(FaultKind::AccessFlag),
                7 => like(Attributes { write: false, dirty: false, ..everything() }),
                10..=53 => Meaning::Fault(FaultKind::Misaligned),
                1 | 54..=63 => Meaning::Fault(FaultKind::Reserved),
                _ => like(everything()),
            };
            assert_eq!(format.decode(level, 0, ALL ^ 1 << bit), expected, "level {level} bit {bit}");
        }
    }
}

/// The same for pointers to tables.
pub fn check_every_bit_of_pointers<F: Format>(format: &F) {
    assert_eq!(format.decode(0, 0, V), Meaning::Fault(FaultKind::Reserved), "the last level points nowhere");
    for level in 1..5 {
        assert_eq!(format.decode(level, 0, V), Meaning::Table { next: Next::whole(level - 1), inherited: 0 });
        for bit in (0..64).filter(|bit| !(10..=53).contains(bit)) {
            let expected = match bit {
                0 => Meaning::Absent,
                // a leaf, without U
                1 | 3 => Meaning::Fault(FaultKind::Permission),
                2 | 4 | 6 | 7 | 54..=63 => Meaning::Fault(FaultKind::Reserved),
                _ => Meaning::Table { next: Next::whole(level - 1), inherited: 0 },
            };
            assert_eq!(format.decode(level, 0, V ^ 1 << bit), expected, "level {level} bit {bit}");
        }
    }
}

/// What the host relies on: bits that decide are not address bits, and neither leave the entry.
pub fn check_geometry(geometry: &Geometry) {
    let width = if geometry.entry_bytes == 4 { u64::from(u32::MAX) } else { u64::MAX };
    for root in &geometry.roots {
        assert!(usize::from(root.level) == geometry.levels.len() - 1 && root.first <= root.last && root.inherited == 0);
    }
    for level in &geometry.levels {
        assert!(level.shapes.len() <= 8 && level.absent == 0);
        let address = |segment: &stagecraft_sdk::Segment| mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb);
        let deciding = level.shapes.iter().fold(0, |all, shape| all | shape.mask);
        for shape in &level.shapes {
            assert_eq!(shape.value & !shape.mask, 0);
            assert!(shape.address.iter().all(|segment| address(segment) & (deciding | !width) == 0));
        }
    }
    for (below, above) in geometry.levels.iter().zip(&geometry.levels[1..]) {
        assert_eq!(below.index_lsb + below.index_bits, above.index_lsb);
    }
}

/// The pattern and the address of an entry.
pub fn split(geometry: &Geometry, level: u8, entry: u64) -> (u64, u64) {
    let kind = &geometry.levels[usize::from(level)];
    let shape = kind.shapes.iter().find(|shape| entry & shape.mask == shape.value);
    let (mut pattern, mut address) = (entry, 0);
    for segment in shape.iter().flat_map(|shape| &shape.address) {
        let bits = mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb);
        pattern &= !bits;
        address |= (entry & bits) >> segment.entry_lsb << segment.address_lsb;
    }
    (pattern, address)
}

/// What was encoded can be decoded, has no address bits, and grants no more than was asked.
pub fn check_encoding<F: Format>(format: &F, level: u8, size: u8, asked: Attributes) -> Option<Attributes> {
    let encoded = format.encode_leaf(level, size, asked)?;
    let geometry = format.geometry();
    let kind = &geometry.levels[usize::from(level)];
    assert!(kind.leaf_sizes & 1 << size != 0);
    assert_eq!(split(&geometry, level, encoded.pattern), (encoded.pattern, 0));
    assert_eq!(format.decode(level, 0, encoded.pattern), Meaning::Leaf { size_log2: size, attributes: encoded.attributes });
    let granted = encoded.attributes;
    assert_eq!((granted.read, granted.write, granted.execute), (asked.read, asked.write, asked.execute));
    assert_eq!(granted.privileged_only, asked.privileged_only);
    assert!(!granted.grants_nothing() && granted.accessed);
    assert!(geometry.entry_bytes == 8 || encoded.pattern >> 32 == 0);
    Some(granted)
}

/// Any pattern has an answer, and a fault an explanation.
pub fn check_answer<F: Format>(format: &F, level: u8, inherited: u64, pattern: u64) {
    let meaning = format.decode(level, inherited, pattern);
    let explained = format.explain(level, inherited, pattern);
    assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == stagecraft_sdk::Severity::Error));
    assert!(explained.iter().all(|f| f.bits != 0 && !f.reason.ends_with('.') && f.section.starts_with("RISC-V ")));
}
