//! Bit layouts and nothing else: page-table entries, section 5.4.

use stagecraft_sdk::bits::{Field, bit, mask};

/// Leaf: valid.
pub(crate) const V: u64 = bit(0);
/// Leaf: dirty; a write needs it.
pub(crate) const D: u64 = bit(1);
/// Leaf: least privileged level that may use it.
pub(crate) const PLV: Field = Field::new(3, 2);
/// Leaf: memory access type.
pub(crate) const MAT: Field = Field::new(5, 4);
/// Directory: the entry is a leaf. In page tables the same bit is G, and says nothing to us.
pub(crate) const HUGE: u64 = bit(6);
/// Leaf: present; V may be set. Software's own without hardware updates, as are all of bits 11:7.
pub(crate) const P: u64 = bit(7);
/// Leaf: writable; D may be set.
pub(crate) const W: u64 = bit(8);
/// Directory entry that is a leaf: where G went.
pub(crate) const HUGE_G: u64 = bit(12);
/// Leaf: reads are refused.
pub(crate) const NR: u64 = bit(61);
/// Leaf: instruction fetches are refused.
pub(crate) const NX: u64 = bit(62);
/// Leaf: PLV must be matched exactly.
pub(crate) const RPLV: u64 = bit(63);
/// Highest address bit of an entry.
pub(crate) const ADDRESS_HIGH: u8 = 47;
/// Leaf: above the address, not assigned.
pub(crate) const UNASSIGNED: u64 = mask(60, 48);
/// Directory entry that points to a table: bits below the address that must be zero.
pub(crate) const TABLE_LOW: u64 = mask(11, 0) & !HUGE;

/// [`PLV`]: user.
pub(crate) const USER: u64 = 3;
/// [`MAT`]: strongly-ordered, uncached.
pub(crate) const STRONGLY_ORDERED: u64 = 0;
/// [`MAT`]: coherent, cached.
pub(crate) const CACHED: u64 = 1;
/// [`MAT`]: weakly-ordered, uncached.
pub(crate) const WEAKLY_ORDERED: u64 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_stands_where_the_manual_says() {
        let bits = [V, D, HUGE, P, W, HUGE_G, NR, NX, RPLV];
        assert_eq!(bits.map(u64::trailing_zeros), [0, 1, 6, 7, 8, 12, 61, 62, 63]);
        assert_eq!(bits.map(u64::count_ones), [1; 9]);
        let mut word = bits.iter().fold(0, |word, bit| word | bit);
        for (field, value) in [(PLV, 2), (MAT, 1)] {
            assert_eq!(word & field.mask(), 0);
            word |= field.put(value);
        }
        assert_eq!(word, 0xe000_0000_0000_11db);
        assert_eq!((TABLE_LOW, UNASSIGNED), (0xfbf, 0x1fff << ADDRESS_HIGH << 1));
    }
}
