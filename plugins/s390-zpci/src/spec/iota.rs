//! The I/O translation anchor, with which a function's tables are registered.

use stagecraft_sdk::bits::{Field, bit};

/// Size of frames, of designations that need one.
pub(crate) const FRAME_SIZE: Field = Field::new(1, 0);
/// What the anchor designates.
pub(crate) const DESIGNATION: Field = Field::new(4, 2);
/// Nothing may be written.
pub(crate) const PROTECTED: u64 = bit(9);
/// The anchor designates something at all; without it the function is not translated.
pub(crate) const TRANSLATION: u64 = bit(11);
/// Table, where it stands.
pub(crate) const ORIGIN: Field = Field::new(63, 12);
/// Zero in the address of a region or segment table.
pub(crate) const TABLE_ALIGNMENT: Field = Field::new(13, 0);

/// [`DESIGNATION`]: segment table.
pub(crate) const SEGMENT_TABLE: u64 = 0;
/// [`DESIGNATION`]: region-third table.
pub(crate) const REGION_THIRD_TABLE: u64 = 1;
/// [`DESIGNATION`]: region-second table.
pub(crate) const REGION_SECOND_TABLE: u64 = 2;
/// [`DESIGNATION`]: region-first table.
pub(crate) const REGION_FIRST_TABLE: u64 = 3;
/// [`DESIGNATION`]: one frame of memory, without any table.
pub(crate) const FRAME: u64 = 4;
/// [`DESIGNATION`]: another way to say one frame.
pub(crate) const IO_FRAME: u64 = 5;
/// [`DESIGNATION`]: page table.
pub(crate) const PAGE_TABLE: u64 = 7;

/// [`FRAME_SIZE`]: 4 KiB.
pub(crate) const FRAME_4K: u64 = 0;
/// Frames by [`FRAME_SIZE`], log2 of their bytes; 3 is reserved.
pub(crate) const FRAMES_LOG2: [u32; 3] = [12, 20, 31];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_stands_where_it_should() {
        let fields = [(FRAME_SIZE, 2), (DESIGNATION, 5), (ORIGIN, 0xf_edcb_a987_6543)];
        let mut word = PROTECTED | TRANSLATION;
        for (field, value) in fields {
            assert_eq!(word & field.mask(), 0);
            word |= field.put(value);
        }
        assert_eq!(word, 0xfedc_ba98_7654_3a16);
        for (field, value) in fields {
            assert_eq!(field.of(word), value);
        }
        assert_eq!((PROTECTED, TRANSLATION, TABLE_ALIGNMENT.mask()), (0x200, 0x800, 0x3fff));
    }

    #[test]
    fn drivers_write_0x804_for_a_region_third_table() {
        assert_eq!(TRANSLATION | DESIGNATION.put(REGION_THIRD_TABLE) | FRAME_SIZE.put(FRAME_4K), 0x804);
        assert_eq!(TRANSLATION | DESIGNATION.put(REGION_SECOND_TABLE), 0x808);
        assert_eq!(TRANSLATION | DESIGNATION.put(REGION_FIRST_TABLE), 0x80c);
    }
}
