//! Second-stage paging entries: section 9.8, tables 41 to 47. Bits 63, 60:52, 10 and 2 are ignored, and so are 6:3 (IPAT and EMT, memory types of
//! devices in the processors' coherency domain) as long as the PASID table entry has no extended memory types.

use stagecraft_sdk::bits::{bit, mask};

/// Reads pass, unless I/O permissions are enabled.
pub(crate) const R: u64 = bit(0);
/// Writes pass, unless I/O permissions are enabled.
pub(crate) const W: u64 = bit(1);
/// Page size: a leaf above the last level. Reserved in PML4 and PML5 entries, ignored in the last level.
pub(crate) const PS: u64 = bit(7);
/// Accessed, if such flags are enabled.
pub(crate) const A: u64 = bit(8);
/// Leaf: dirty, if such flags are enabled.
pub(crate) const D: u64 = bit(9);
/// Leaf: accesses snoop even if the request says no-snoop. Reserved in entries that point to tables.
pub(crate) const SNP: u64 = bit(11);
/// Leaf of 2 MiB: must be zero.
pub(crate) const RESERVED_2M: u64 = mask(20, 12);
/// Leaf of 1 GiB: must be zero.
pub(crate) const RESERVED_1G: u64 = mask(29, 12);
/// I/O read: reads pass, if I/O permissions are enabled; otherwise ignored.
pub(crate) const IR: u64 = bit(61);
/// I/O write: writes pass, if I/O permissions are enabled; otherwise reserved.
pub(crate) const IW: u64 = bit(62);

#[cfg(test)]
mod tests {
    #[test]
    fn every_bit_stands_where_the_specification_says() {
        let bits = [super::R, super::W, super::PS, super::A, super::D, super::SNP, super::IR, super::IW];
        assert_eq!(bits.map(u64::trailing_zeros), [0, 1, 7, 8, 9, 11, 61, 62]);
        assert_eq!([super::RESERVED_2M, super::RESERVED_1G], [0x001f_f000, 0x3fff_f000]);
    }
}
