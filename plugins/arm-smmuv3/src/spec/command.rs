//! Commands that drop cached translations: IHI 0070 sections 4.4 and 4.4.1. 16 bytes each, of two words.

use stagecraft_sdk::bits::{Field, bit};

/// Word 0: CMD_TLBI_NH_ALL, everything of the VMID.
pub(crate) const NH_ALL: u64 = 0x10;
/// Word 0: CMD_TLBI_NH_ASID, everything of the ASID but global entries.
pub(crate) const NH_ASID: u64 = 0x11;
/// Word 0: CMD_TLBI_NH_VA, addresses of the ASID, and global entries for them.
pub(crate) const NH_VA: u64 = 0x12;
/// Word 0, lowest bit and width: one less than the number of a range.
pub(crate) const NUM: (u8, u8) = (12, 5);
/// Word 0, lowest bit and width: log2 of what the number counts, in granules.
pub(crate) const SCALE: (u8, u8) = (20, 5);
/// Word 0.
pub(crate) const ASID: Field = Field::new(63, 48);
/// Word 1: only leaves.
pub(crate) const LEAF: u64 = bit(0);
/// Word 1: 1, 2, 3 for granules of 4K, 16K, 64K; 0 is a command without a range.
pub(crate) const TG: Field = Field::new(11, 10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_stands_where_the_specification_says() {
        assert_eq!((ASID.put(0x1234), TG.put(2)), (0x1234 << 48, 2 << 10));
        assert_eq!([4096_u64, 16384, 65536].map(|granule| u64::from(granule.trailing_zeros() - 10) / 2), [1, 2, 3]);
    }
}
