//! Entries of host tables: section 2.2.3. Bits 63, 8:7 and 4:1 are ignored, and so are A and D as long as hardware does not set them.

use stagecraft_sdk::bits::{Field, bit, mask};

/// Present.
pub(crate) const PR: u64 = bit(0);
/// Accessed.
pub(crate) const A: u64 = bit(5);
/// Leaf: dirty. In an entry that points to a table it is ignored.
pub(crate) const D: u64 = bit(6);
/// The level of the table that follows; 0 for a leaf of the level's own size, 7 for one whose size is in the address bits.
pub(crate) const NEXT_LEVEL: Field = Field::new(11, 9);
/// Where the address is.
pub(crate) const ADDRESS: Field = Field::new(51, 12);
/// Must be zero.
pub(crate) const RESERVED: u64 = mask(58, 52);
/// Leaf: for untranslated requests only; devices with a TLB of their own are told.
pub(crate) const U: u64 = bit(59);
/// Leaf: accesses snoop even if the request says no-snoop.
pub(crate) const FC: u64 = bit(60);
/// Reads pass.
pub(crate) const IR: u64 = bit(61);
/// Writes pass.
pub(crate) const IW: u64 = bit(62);

/// [`NEXT_LEVEL`]: a leaf of the level's own size.
pub(crate) const LEAF: u64 = 0;
/// [`NEXT_LEVEL`]: a leaf of `2^(n + 1)` bytes, where `n` is the lowest address bit from 12 upwards that is zero.
pub(crate) const SIZED_LEAF: u64 = 7;

/// The size in log2 bytes that the address bits of a [`SIZED_LEAF`] code. Bits from 52 upwards count as zero.
pub(crate) const fn coded_size_log2(entry: u64) -> u8 {
    13 + ADDRESS.of(entry).trailing_ones() as u8
}

/// The address bits that code `2^size_log2` bytes, 13 to 52.
pub(crate) const fn size_code(size_log2: u8) -> u64 {
    ((1 << (size_log2 - 1)) - 1) & ADDRESS.mask()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::assert_layout;

    #[test]
    fn every_bit_stands_where_the_specification_says() {
        assert_layout(&[(NEXT_LEVEL, 0b101), (ADDRESS, 0xa_1234_5678)], 0xa123_4567_8a00);
        assert_eq!([PR, A, D, U, FC, IR, IW].map(u64::trailing_zeros), [0, 5, 6, 59, 60, 61, 62]);
        assert_eq!(RESERVED, 0x07f0_0000_0000_0000);
    }

    #[test]
    fn sizes_are_coded_as_the_specifications_examples_say() {
        // section 2.2.3, page size encodings: 8K, 16K, 1M, 2M, 4M, 2G, 4G
        for (code, size) in [(0, 13), (0x1000, 14), (0x7_f000, 20), (0xf_f000, 21), (0x1f_f000, 22), (0x3fff_f000, 31), (0x7fff_f000, 32)] {
            assert_eq!((coded_size_log2(code), size_code(size)), (size, code));
        }
        for size in 13..=52 {
            assert_eq!(coded_size_log2(size_code(size)), size);
            // what stands above the first zero is address
            assert_eq!(coded_size_log2(size_code(size) | !((1 << size) - 1)), size);
        }
        assert_eq!(coded_size_log2(u64::MAX), 53);
    }
}
