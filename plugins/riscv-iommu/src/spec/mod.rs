//! Bit layouts and nothing else. "IOMMU" sections are those of the "RISC-V IOMMU Architecture Specification", version 1.0, and "Privileged" sections
//! those of "The RISC-V Instruction Set Manual, Volume II: Privileged Architecture", version 1.12 (20211203).

pub(crate) mod entry;
pub(crate) mod registers;
pub(crate) mod structures;

/// Every field gets a value of its own, so a wrong or overlapping position shows. Test helper of the layouts.
#[cfg(test)]
pub(crate) fn assert_layout(fields: &[(stagecraft_sdk::bits::Field, u64)], word: u64) {
    let mut composed = 0;
    for &(field, value) in fields {
        assert_eq!(composed & field.mask(), 0, "{field:?} overlaps another field");
        assert_eq!(field.put(value) >> field.mask().trailing_zeros(), value, "{field:?} is too narrow for {value:#x}");
        composed |= field.put(value);
    }
    assert_eq!(composed, word, "{composed:#x} is not {word:#x}");
    for &(field, value) in fields {
        assert_eq!(field.of(word), value, "{field:?}");
    }
}

/// The parts of a word cover it without overlap. Test helper of the layouts.
#[cfg(test)]
pub(crate) fn assert_partition(parts: &[u64]) {
    assert_eq!(parts.iter().fold(0, |all, part| all | part), u64::MAX, "{parts:x?}");
    assert_eq!(parts.iter().map(|part| part.count_ones()).sum::<u32>(), 64, "{parts:x?}");
}
