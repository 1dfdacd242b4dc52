//! First-stage paging entries: section 9.7, tables 34 to 40. Bits 63:52, 11 and 9 are ignored, bit 63 (once execute-disable) among them.

use stagecraft_sdk::bits::{bit, mask};

/// Present.
pub(crate) const P: u64 = bit(0);
/// Writes pass.
pub(crate) const RW: u64 = bit(1);
/// Requests without supervisor privilege pass.
pub(crate) const US: u64 = bit(2);
/// Leaf: part of the index into the page attribute table.
pub(crate) const PWT: u64 = bit(3);
/// Leaf: part of the index into the page attribute table.
pub(crate) const PCD: u64 = bit(4);
/// Accessed.
pub(crate) const A: u64 = bit(5);
/// Leaf: dirty.
pub(crate) const D: u64 = bit(6);
/// Page size: a leaf above the last level. Reserved in PML4 and PML5 entries.
pub(crate) const PS: u64 = bit(7);
/// Accessed by something that is not a processor.
pub(crate) const EA: u64 = bit(10);
/// Leaf of 2 MiB: must be zero; bit 12 is the third bit of the page attribute index.
pub(crate) const RESERVED_2M: u64 = mask(20, 13);
/// Leaf of 1 GiB: the same.
pub(crate) const RESERVED_1G: u64 = mask(29, 13);

#[cfg(test)]
mod tests {
    #[test]
    fn every_bit_stands_where_the_specification_says() {
        let bits = [super::P, super::RW, super::US, super::PWT, super::PCD, super::A, super::D, super::PS, super::EA];
        assert_eq!(bits.map(u64::trailing_zeros), [0, 1, 2, 3, 4, 5, 6, 7, 10]);
        assert_eq!([super::RESERVED_2M, super::RESERVED_1G], [0x001f_e000, 0x3fff_e000]);
    }
}
