//! Structures between the root table register and the page tables: sections 9.1 to 9.6.

use stagecraft_sdk::bits::{Field, bit, mask};

/// Tables of this chapter are 4 KiB, and pointers to them are bits 63:12 of a word.
pub(crate) const POINTER: Field = Field::new(63, 12);
/// Bit 0 of every structure's first word.
pub(crate) const PRESENT: u64 = bit(0);

/// Root entry, sections 9.1 and 9.2: 16 bytes, indexed by bus. A scalable-mode entry has one such word for each half of the bus.
pub(crate) mod root {
    use super::mask;

    /// Size in bytes.
    pub(crate) const BYTES: u32 = 16;
    /// Must be zero in a present word.
    pub(crate) const RESERVED: u64 = mask(11, 1);
}

/// Context entry, section 9.3: 16 bytes, indexed by device and function.
pub(crate) mod context {
    use super::{Field, bit, mask};

    /// Size in bytes.
    pub(crate) const BYTES: u32 = 16;
    /// Word 0: translation type.
    pub(crate) const TT: Field = Field::new(3, 2);
    /// Word 0: must be zero.
    pub(crate) const RESERVED_0: u64 = mask(11, 4);
    /// Word 1: address width of the tables.
    pub(crate) const AW: Field = Field::new(2, 0);
    /// Word 1: domain id.
    pub(crate) const DID: Field = Field::new(23, 8);
    /// Word 1: must be zero.
    pub(crate) const RESERVED_1: u64 = mask(63, 24) | bit(7);

    /// [`TT`]: second stage.
    pub(crate) const SECOND_STAGE: u64 = 0b00;
    /// [`TT`]: second stage, and device TLBs may ask.
    pub(crate) const DEVICE_TLB: u64 = 0b01;
    /// [`TT`]: no translation.
    pub(crate) const PASS_THROUGH: u64 = 0b10;
}

/// Scalable-mode context entry, section 9.4: 32 bytes, indexed by the low 7 bits of device and function.
pub(crate) mod scalable_context {
    use super::{Field, bit, mask};

    /// Size in bytes.
    pub(crate) const BYTES: u32 = 32;
    /// Word 0: device TLB enable.
    pub(crate) const DTE: u64 = bit(2);
    /// Word 0: PASID enable.
    pub(crate) const PASIDE: u64 = bit(3);
    /// Word 0: page request enable.
    pub(crate) const PRE: u64 = bit(4);
    /// Word 0: host permission tables enable.
    pub(crate) const HPTE: u64 = bit(5);
    /// Word 0: PASIDs in translated requests enable.
    pub(crate) const EPTR: u64 = bit(6);
    /// Word 0: must be zero.
    pub(crate) const RESERVED_0: u64 = mask(8, 7);
    /// Word 0: the PASID directory has `2^(PDTS + 7)` entries.
    pub(crate) const PDTS: Field = Field::new(11, 9);
    /// Word 1: the PASID of requests without PASID.
    pub(crate) const RID_PASID: Field = Field::new(19, 0);
    /// Word 1: requests without PASID are privileged.
    pub(crate) const RID_PRIV: u64 = bit(20);
    /// Word 1: must be zero.
    pub(crate) const RESERVED_1: u64 = mask(63, 21);
}

/// Scalable-mode PASID directory entry, section 9.5: 8 bytes, indexed by PASID bits 19:6.
pub(crate) mod directory {
    use super::mask;

    /// Size in bytes.
    pub(crate) const BYTES: u32 = 8;
    /// Must be zero.
    pub(crate) const RESERVED: u64 = mask(11, 2);
}

/// Scalable-mode PASID table entry, section 9.6: 64 bytes, indexed by PASID bits 5:0.
pub(crate) mod pasid {
    use super::{Field, bit, mask};

    /// Size in bytes.
    pub(crate) const BYTES: u32 = 64;
    /// Entries of a table.
    pub(crate) const ENTRIES: u32 = 64;
    /// Word 0: address width of the second stage.
    pub(crate) const AW: Field = Field::new(4, 2);
    /// Word 0: translation type.
    pub(crate) const PGTT: Field = Field::new(8, 6);
    /// Word 0: the second stage has accessed and dirty flags.
    pub(crate) const SSADE: u64 = bit(9);
    /// Word 0: must be zero.
    pub(crate) const RESERVED_0: u64 = bit(5) | mask(11, 10);
    /// Word 1: domain id.
    pub(crate) const DID: Field = Field::new(15, 0);
    /// Word 1: page walks snoop.
    pub(crate) const PWSNP: u64 = bit(23);
    /// Word 1: all accesses snoop.
    pub(crate) const PGSNP: u64 = bit(24);
    /// Word 1: cache disable, extended memory types, page attribute table.
    pub(crate) const MEMORY_TYPE: u64 = bit(25) | bit(26) | mask(63, 32);
    /// Word 1: must be zero.
    pub(crate) const RESERVED_1: u64 = mask(22, 16) | mask(31, 27);
    /// Word 2: supervisor requests enable.
    pub(crate) const SRE: u64 = bit(0);
    /// Word 2: first-stage paging mode.
    pub(crate) const FSPM: Field = Field::new(3, 2);
    /// Word 2: supervisor requests respect read-only.
    pub(crate) const WPE: u64 = bit(4);
    /// Word 2: extended-accessed flag enable.
    pub(crate) const EAFE: u64 = bit(7);
    /// Word 2: were NXE and SMEP once and are ignored.
    pub(crate) const FORMERLY_USED: u64 = mask(6, 5);
    /// Word 2: must be zero.
    pub(crate) const RESERVED_2: u64 = bit(1) | mask(11, 8);
    /// Word 4: host permission table fields, reserved without such tables.
    pub(crate) const HPT_4: u64 = mask(2, 0) | mask(63, 12);
    /// Word 4: must be zero.
    pub(crate) const RESERVED_4: u64 = mask(11, 3);
    /// Word 5: host permission domain id, reserved without such tables.
    pub(crate) const HPT_5: Field = Field::new(15, 0);
    /// Word 5: must be zero. Words 3, 6 and 7 are reserved as a whole.
    pub(crate) const RESERVED_5: u64 = mask(63, 16);

    /// [`PGTT`]: first stage.
    pub(crate) const FIRST_STAGE: u64 = 0b001;
    /// [`PGTT`]: second stage.
    pub(crate) const SECOND_STAGE: u64 = 0b010;
    /// [`PGTT`]: first stage, then second stage.
    pub(crate) const NESTED: u64 = 0b011;
    /// [`PGTT`]: no translation.
    pub(crate) const PASS_THROUGH: u64 = 0b100;
}

#[cfg(test)]
mod tests {
    use super::{POINTER, PRESENT, context, directory, pasid, root, scalable_context};
    use crate::spec::assert_layout;

    #[test]
    fn every_field_stands_where_the_specification_says() {
        assert_layout(&[(context::TT, 0b10), (POINTER, 0x1_2345_6789)], 0x1234_5678_9008);
        assert_layout(&[(context::AW, 0b011), (context::DID, 0xa5c3)], 0x00a5_c303);
        assert_layout(&[(scalable_context::PDTS, 0b101), (POINTER, 0x9_8765)], 0x9876_5a00);
        assert_layout(&[(scalable_context::RID_PASID, 0x5_4321)], 0x5_4321);
        assert_layout(&[(pasid::AW, 0b010), (pasid::PGTT, 0b101), (POINTER, 0x7_6543)], 0x7654_3148);
        assert_layout(&[(pasid::DID, 0x9abc)], 0x9abc);
        assert_layout(&[(pasid::FSPM, 0b01), (POINTER, 0x3_2109)], 0x3210_9004);
        assert_layout(&[(pasid::HPT_5, 0x8421)], 0x8421);
    }

    #[test]
    fn the_masks_of_a_word_neither_overlap_nor_leave_a_hole() {
        let fpd = 0b10;
        let words: [&[u64]; 9] = [
            &[PRESENT, root::RESERVED, POINTER.mask()],
            &[PRESENT, fpd, context::TT.mask(), context::RESERVED_0, POINTER.mask()],
            // 70:67 are ignored
            &[context::AW.mask(), 0x78, context::DID.mask(), context::RESERVED_1],
            &[
                PRESENT,
                fpd,
                scalable_context::DTE,
                scalable_context::PASIDE,
                scalable_context::PRE,
                scalable_context::HPTE,
                scalable_context::EPTR,
                scalable_context::RESERVED_0,
                scalable_context::PDTS.mask(),
                POINTER.mask(),
            ],
            &[scalable_context::RID_PASID.mask(), scalable_context::RID_PRIV, scalable_context::RESERVED_1],
            &[PRESENT, fpd, directory::RESERVED, POINTER.mask()],
            &[PRESENT, fpd, pasid::AW.mask(), pasid::PGTT.mask(), pasid::SSADE, pasid::RESERVED_0, POINTER.mask()],
            &[pasid::DID.mask(), pasid::PWSNP, pasid::PGSNP, pasid::MEMORY_TYPE, pasid::RESERVED_1],
            &[pasid::SRE, pasid::FSPM.mask(), pasid::WPE, pasid::FORMERLY_USED, pasid::EAFE, pasid::RESERVED_2, POINTER.mask()],
        ];
        for parts in words {
            assert_eq!(parts.iter().fold(0, |all, part| all ^ part), u64::MAX);
            assert_eq!(parts.iter().map(|part| part.count_ones()).sum::<u32>(), 64);
        }
        assert_eq!(pasid::HPT_4 ^ pasid::RESERVED_4, u64::MAX);
        assert_eq!(pasid::HPT_5.mask() ^ pasid::RESERVED_5, u64::MAX);
    }
}
