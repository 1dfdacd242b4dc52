//! Device table entries, section 2.2.2: 32 bytes, indexed by DeviceID; and the entries of guest CR3 tables, section 2.2.6.

use stagecraft_sdk::bits::{Field, bit, mask};

/// Size in bytes.
pub(crate) const BYTES: u32 = 32;
/// 64-bit words of an entry.
pub(crate) const WORDS: usize = 4;

/// Word 0: the entry is valid; otherwise the device's DMA is not translated.
pub(crate) const V: u64 = bit(0);
/// Word 0: the translation fields are valid; otherwise nothing passes.
pub(crate) const TV: u64 = bit(1);
/// Word 0: must be zero.
pub(crate) const RESERVED_0: u64 = mask(6, 2) | bit(63);
/// Word 0: hardware sets accessed (bit 0) and dirty (bit 1) flags in the host table.
pub(crate) const HAD: Field = Field::new(8, 7);
/// Word 0: levels of the host table; 0 no host table, 7 reserved.
pub(crate) const MODE: Field = Field::new(11, 9);
/// Word 0: the host table, where it stands.
pub(crate) const HOST_ROOT: Field = Field::new(51, 12);
/// Word 0: page requests (PPR), and PASIDs in the answers to them (GPRP). Of no interest here.
#[cfg(test)]
const PAGE_REQUESTS: u64 = mask(53, 52);
/// Word 0: requests without PASID use the guest table of PASID 0.
pub(crate) const GIOV: u64 = bit(54);
/// Word 0: there are guest tables.
pub(crate) const GV: u64 = bit(55);
/// Word 0: levels of the guest CR3 table, minus one; 3 is reserved.
pub(crate) const GLX: Field = Field::new(57, 56);
/// Word 0: guest CR3 table, address bits 14:12.
pub(crate) const GCR3_14_12: Field = Field::new(60, 58);
/// Word 0: reads pass.
pub(crate) const IR: u64 = bit(61);
/// Word 0: writes pass.
pub(crate) const IW: u64 = bit(62);
/// Word 1: domain id, by which translations are invalidated.
pub(crate) const DOMAIN_ID: Field = Field::new(15, 0);
/// Word 1: guest CR3 table, address bits 30:15.
pub(crate) const GCR3_30_15: Field = Field::new(31, 16);
/// Word 1: the exclusion range is for this device.
pub(crate) const EX: u64 = bit(39);
/// SA, bit 98: no page fault of the device is logged. (SE, bit 97, logs the first alone, which is one of those that are told here.)
pub(crate) const SA: u64 = bit(34);
/// Word 1: guest CR3 table, address bits 51:31.
pub(crate) const GCR3_51_31: Field = Field::new(63, 43);
/// Word 2: levels of the guest tables, minus four; 2 and 3 are reserved.
pub(crate) const GUEST_PAGING_MODE: Field = Field::new(55, 54);

/// Word 2: reserved; the unit's walks for DMA do not look at it.
pub(crate) const RESERVED_2: u64 = mask(53, 52);
/// Word 3: the same.
pub(crate) const RESERVED_3: u64 = mask(14, 0) | mask(53, 48);

/// Address of the guest CR3 table.
pub(crate) const fn gcr3_root(entry: &[u64; WORDS]) -> u64 {
    GCR3_14_12.of(entry[0]) << 12 | GCR3_30_15.of(entry[1]) << 15 | GCR3_51_31.of(entry[1]) << 31
}

/// Word 0 and word 1 with nothing but the address of the guest CR3 table.
pub(crate) const fn gcr3_words(root: u64) -> [u64; 2] {
    [GCR3_14_12.put(root >> 12), GCR3_30_15.put(root >> 15) | GCR3_51_31.put(root >> 31)]
}

/// Entry of a guest CR3 table, section 2.2.6: 8 bytes, indexed by nine bits of the PASID; it points to the next table, or at the last level to the root of
/// the PASID's guest table.
pub(crate) mod gcr3 {
    use super::{Field, bit, mask};

    /// Entries of a table.
    pub(crate) const ENTRIES: u64 = 512;
    /// The entry is valid.
    pub(crate) const V: u64 = bit(0);
    /// What it points to, where it stands.
    pub(crate) const ADDRESS: Field = Field::new(51, 12);
    /// Must be zero.
    pub(crate) const RESERVED: u64 = mask(63, 52);
    /// Reserved, and ignored.
    pub(crate) const IGNORED: u64 = mask(11, 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::assert_layout;

    #[test]
    fn every_field_stands_where_the_specification_says() {
        assert_layout(&[(HAD, 0b10), (MODE, 0b101), (HOST_ROOT, 0xa_1234_5678), (GLX, 0b01), (GCR3_14_12, 0b110)], 0x1900_a123_4567_8b00);
        assert_layout(&[(DOMAIN_ID, 0x1234), (GCR3_30_15, 0xbeef), (GCR3_51_31, 0x15_5555)], 0xaaaa_a800_beef_1234);
        assert_layout(&[(GUEST_PAGING_MODE, 0b01)], 1 << 54);
        assert_layout(&[(gcr3::ADDRESS, 0x9_8765_4321)], 0x9876_5432_1000);
        assert_eq!([V, TV, GIOV, GV, IR, IW, EX, gcr3::V].map(u64::trailing_zeros), [0, 1, 54, 55, 61, 62, 39, 0]);
    }

    #[test]
    fn the_masks_of_word_0_neither_overlap_nor_leave_a_hole() {
        let parts = [V, TV, RESERVED_0, HAD.mask(), MODE.mask(), HOST_ROOT.mask(), PAGE_REQUESTS, GIOV, GV, GLX.mask(), GCR3_14_12.mask(), IR, IW];
        assert_eq!(parts.iter().fold(0, |all, part| all ^ part), u64::MAX);
        assert_eq!(parts.iter().map(|part| part.count_ones()).sum::<u32>(), 64);
    }

    #[test]
    fn the_three_pieces_of_the_guest_cr3_table_address_make_one() {
        for position in 12..52 {
            let [low, high] = gcr3_words(1 << position);
            assert_eq!(low.count_ones() + high.count_ones(), 1, "bit {position}");
            assert_eq!(gcr3_root(&[low, high, 0, 0]), 1 << position);
        }
        assert_eq!(gcr3_root(&[!0x1c00_0000_0000_0000, !0xffff_f800_ffff_0000, u64::MAX, u64::MAX]), 0);
        // an entry that a Linux driver wrote
        assert_eq!(gcr3_root(&[0x70c0_0000_0000_0003, 0x0000_1000_1100_0010, 0, 0]), 0x1_0880_4000);
    }
}
