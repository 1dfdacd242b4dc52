//! Entries of guest tables, section 2.2.6: as processors have them. Bits 62:52 and 11:9 are for software; PWT, PCD, PAT and G say nothing to the unit.

use stagecraft_sdk::bits::{bit, mask};

/// Present.
pub(crate) const P: u64 = bit(0);
/// Writes pass.
pub(crate) const RW: u64 = bit(1);
/// Requests without privilege pass.
pub(crate) const US: u64 = bit(2);
/// Accessed.
pub(crate) const A: u64 = bit(5);
/// Leaf: dirty.
pub(crate) const D: u64 = bit(6);
/// Page size: a leaf above the last level.
pub(crate) const PS: u64 = bit(7);
/// The two highest levels, PML4E and PML5E: must be zero (24593 section 5.3.3).
pub(crate) const RESERVED_TOP: u64 = mask(8, 7);
/// Leaf of 2 MiB: must be zero; bit 12 is PAT.
pub(crate) const RESERVED_2M: u64 = mask(20, 13);
/// Leaf of 1 GiB: the same.
pub(crate) const RESERVED_1G: u64 = mask(29, 13);
/// No execution.
pub(crate) const NX: u64 = bit(63);

#[cfg(test)]
mod tests {
    #[test]
    fn every_bit_stands_where_the_specification_says() {
        let bits = [super::P, super::RW, super::US, super::A, super::D, super::PS, super::NX];
        assert_eq!(bits.map(u64::trailing_zeros), [0, 1, 2, 5, 6, 7, 63]);
        assert_eq!([super::RESERVED_2M, super::RESERVED_1G, super::RESERVED_TOP], [0x001f_e000, 0x3fff_e000, 0x180]);
    }
}
