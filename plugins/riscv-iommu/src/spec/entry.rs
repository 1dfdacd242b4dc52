//! Page table entries of both stages: Privileged sections 4.3.1 (Sv32, 4 bytes: bits 31:0), 4.4.1, 4.5.1, 4.6.1 and 8.5.1; chapters 5 (Svnapot) and
//! 6 (Svpbmt).

use stagecraft_sdk::bits::{Field, bit, mask};

/// Valid.
pub(crate) const V: u64 = bit(0);
/// Leaf: reads pass. R, W and X all zero: a pointer to the next table.
pub(crate) const R: u64 = bit(1);
/// Leaf: writes pass. Reserved without R.
pub(crate) const W: u64 = bit(2);
/// Leaf: instruction fetches pass.
pub(crate) const X: u64 = bit(3);
/// Leaf: requests without supervisor privilege pass, and in the second stage any at all. Reserved in pointers.
pub(crate) const U: u64 = bit(4);
/// First stage: the same in all address spaces, which a walk does not mind. Second stage: should be zero.
pub(crate) const G: u64 = bit(5);
/// Leaf: accessed. Reserved in pointers.
pub(crate) const A: u64 = bit(6);
/// Leaf: dirty. Reserved in pointers.
pub(crate) const D: u64 = bit(7);
/// Lowest bit of the physical page number; its address bit is 12. Bits 9:8 are software's.
pub(crate) const PPN_LOW: u8 = 10;
/// Highest bit of the physical page number of an entry of 8 bytes.
pub(crate) const PPN_HIGH: u8 = 53;
/// Highest bit of the physical page number of an entry of 4 bytes.
pub(crate) const PPN_HIGH_32: u8 = 31;
/// Entries of 8 bytes: must be zero.
pub(crate) const RESERVED: u64 = mask(60, 54);
/// Entries of 8 bytes: software's, if the unit has Svrsw60t59b.
pub(crate) const SOFTWARE: u64 = mask(60, 59);
/// Entries of 8 bytes: memory type of a leaf. Reserved in pointers and without Svpbmt.
pub(crate) const PBMT: Field = Field::new(62, 61);
/// Entries of 8 bytes: a leaf of 64 KiB, in the last level.
pub(crate) const N: u64 = bit(63);
/// The part of the physical page number that codes the size of a leaf with N.
pub(crate) const NAPOT: Field = Field::new(13, 10);

/// [`PBMT`]: as the physical memory attributes say.
pub(crate) const PMA: u64 = 0;
/// [`PBMT`]: not cacheable, idempotent, weakly ordered.
pub(crate) const NC: u64 = 1;
/// [`PBMT`]: not cacheable, not idempotent, strongly ordered.
pub(crate) const IO: u64 = 2;

/// [`NAPOT`]: the only size there is, 64 KiB.
pub(crate) const NAPOT_64K: u64 = 0b1000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::assert_partition;

    #[test]
    fn every_bit_stands_where_the_specification_says() {
        assert_eq!([V, R, W, X, U, G, A, D, N].map(u64::trailing_zeros), [0, 1, 2, 3, 4, 5, 6, 7, 63]);
        assert_partition(&[V, R, W, X, U, G, A, D, 0x300, mask(PPN_HIGH, PPN_LOW), RESERVED, PBMT.mask(), N]);
        assert_eq!(RESERVED & SOFTWARE, 3 << 59);
        assert_eq!((PBMT.put(IO), NAPOT.put(NAPOT_64K), mask(PPN_HIGH_32, PPN_LOW)), (1 << 62, 1 << 13, 0xffff_fc00));
        assert_eq!([PMA, NC, IO], [0, 1, 2]);
    }
}
