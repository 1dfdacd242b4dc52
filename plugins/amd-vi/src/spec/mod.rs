//! Bit layouts and nothing else. Sections are those of the "AMD I/O Virtualization Technology (IOMMU) Specification", publication 48882 (revision 3.10);
//! a structure's fields are counted from bit 0 of the 64-bit word that holds them.

pub(crate) mod device_table;
pub(crate) mod registers;
pub(crate) mod v1;
pub(crate) mod v2;

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
