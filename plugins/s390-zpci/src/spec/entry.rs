//! Table entries. In each kind an entry is valid when its invalid bit is zero.

use stagecraft_sdk::bits::{Field, bit, mask};

/// All entries: nothing below may be written.
pub(crate) const PROTECTED: u64 = bit(9);

/// What entries of region and segment tables have in common.
pub(crate) mod table {
    use super::{Field, bit};

    /// The entry is not valid.
    pub(crate) const INVALID: u64 = bit(5);
    /// Kind of the table that this entry is in, which must be right: 0 segment, 1 to 3 region-third, -second and -first.
    pub(crate) const TYPE: Field = Field::new(3, 2);
}

/// Region-table entry: points to a table of the next lower kind, 2,048 entries.
pub(crate) mod region {
    use super::{Field, bit, mask};

    /// Quarters of the next table that are there: the last one.
    pub(crate) const LENGTH: Field = Field::new(1, 0);
    /// Quarters of the next table that are there: the first one.
    pub(crate) const OFFSET: Field = Field::new(7, 6);
    /// Next table, where it stands: highest and lowest bit. A table of which the first quarters are missing begins at a page.
    pub(crate) const ORIGIN: (u8, u8) = (63, 12);
    /// The same where tables are whole: they are aligned to their size, and bits 13:12 are ignored.
    pub(crate) const WHOLE_ORIGIN: (u8, u8) = (63, 14);
    /// Not assigned in I/O tables, and ignored.
    pub(crate) const UNASSIGNED: u64 = mask(11, 10) | bit(8) | bit(4);
    /// The same where tables are whole.
    pub(crate) const WHOLE_UNASSIGNED: u64 = mask(13, 12) | UNASSIGNED;

    /// [`LENGTH`]: to the end.
    pub(crate) const WHOLE: u64 = 3;
    /// Entries in a quarter of a table.
    pub(crate) const QUARTER: u16 = 512;
}

/// Segment-table entry: points to a page table, or is a frame of 1 MiB.
pub(crate) mod segment {
    use super::{bit, mask};

    /// Format control: the entry is a frame.
    pub(crate) const FRAME: u64 = bit(10);
    /// Page table, where it stands: highest and lowest bit.
    pub(crate) const ORIGIN: (u8, u8) = (63, 11);
    /// Frame, where it stands: highest and lowest bit.
    pub(crate) const FRAME_ORIGIN: (u8, u8) = (63, 20);
    /// Not assigned in I/O tables, and ignored. A frame also has bits 19:11, which mean something to processors only.
    pub(crate) const UNASSIGNED: u64 = mask(8, 6) | bit(4) | mask(1, 0);
}

/// Page-table entry: a frame of 4 KiB. Bits 8:0 are free.
pub(crate) mod page {
    use super::bit;

    /// The entry is not valid.
    pub(crate) const INVALID: u64 = bit(10);
    /// Frame, where it stands: highest and lowest bit.
    pub(crate) const FRAME_ORIGIN: (u8, u8) = (63, 12);
    /// Not assigned in I/O tables, and ignored; processors refuse it.
    pub(crate) const UNASSIGNED: u64 = bit(11);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_stands_where_drivers_write_it() {
        assert_eq!((table::INVALID, page::INVALID, PROTECTED, segment::FRAME), (0x20, 0x400, 0x200, 0x400));
        assert_eq!([0, 1, 2, 3].map(|kind| table::TYPE.put(kind)), [0, 4, 8, 0xc]);
        assert_eq!((region::LENGTH.mask(), region::OFFSET.mask()), (3, 0xc0));
    }

    #[test]
    fn every_bit_of_an_entry_has_one_owner() {
        let range = |(high, low)| mask(high, low);
        let named = table::INVALID | table::TYPE.mask() | PROTECTED;
        let region = [named, region::LENGTH.mask(), region::OFFSET.mask(), range(region::ORIGIN), region::UNASSIGNED];
        let whole = [named, region::LENGTH.mask(), region::OFFSET.mask(), range(region::WHOLE_ORIGIN), region::WHOLE_UNASSIGNED];
        let segment = [named, segment::FRAME, range(segment::ORIGIN), segment::UNASSIGNED];
        let page = [page::INVALID, PROTECTED, range(page::FRAME_ORIGIN), page::UNASSIGNED, mask(8, 0)];
        for parts in [&region[..], &whole, &segment, &page] {
            let all = parts.iter().fold(0, |all, part| {
                assert_eq!(all & part, 0);
                all | part
            });
            assert_eq!(all, u64::MAX);
        }
        assert_eq!(region::QUARTER * 4, 1 << 11);
    }
}
