//! Bit layouts and nothing else.

/// Parameter registers: what the unit is.
pub(crate) mod params {
    use stagecraft_sdk::bits::Field;

    /// PARAMS1: page size in log2 bytes.
    pub(crate) const PAGE_SHIFT: Field = Field::new(27, 24);
    /// PARAMS3 of T8110: output address bits.
    pub(crate) const OUTPUT_BITS: Field = Field::new(29, 24);
    /// PARAMS3 of T8110: input address bits.
    pub(crate) const INPUT_BITS: Field = Field::new(21, 16);
}

/// T8020's and T6000's registers of a stream.
pub(crate) mod t8020 {
    use stagecraft_sdk::bits::{Field, bit};

    /// TCR: addresses are translated.
    pub(crate) const TRANSLATE: u64 = bit(7);
    /// TCR: addresses pass as they are.
    pub(crate) const BYPASS: u64 = bit(8);
    /// TTBR: there is a table.
    pub(crate) const VALID: u64 = bit(31);
    /// TTBR: address of the table in units of 4 KiB.
    pub(crate) const ADDRESS: Field = Field::new(30, 0);
    /// Unit of [`ADDRESS`].
    pub(crate) const ADDRESS_SHIFT: u32 = 12;
}

/// T8110's registers of a stream.
pub(crate) mod t8110 {
    use stagecraft_sdk::bits::{Field, bit};

    /// TCR: addresses are translated.
    pub(crate) const TRANSLATE: u64 = bit(0);
    /// TCR: addresses pass as they are.
    pub(crate) const BYPASS: u64 = bit(1);
    /// TCR: three levels of tables below the root instead of two.
    pub(crate) const FOUR_LEVEL: u64 = bit(3);
    /// TCR: another stream's registers are used.
    pub(crate) const REMAP: u64 = bit(7);
    /// TTBR: there is a table.
    pub(crate) const VALID: u64 = bit(0);
    /// TTBR: address of the table in units of 16 KiB.
    pub(crate) const ADDRESS: Field = Field::new(29, 2);
    /// Unit of [`ADDRESS`].
    pub(crate) const ADDRESS_SHIFT: u32 = 14;
}

/// Entries.
pub(crate) mod entry {
    use stagecraft_sdk::bits::{Field, bit};

    /// Valid, of both versions.
    pub(crate) const VALID: u64 = bit(0);
    /// First unit of a page that may be used; there are 4,096 units in a page.
    pub(crate) const FIRST: Field = Field::new(63, 52);
    /// Last unit of a page that may be used.
    pub(crate) const LAST: Field = Field::new(51, 40);

    /// DART1: the address, where it stands: its highest and lowest bit.
    pub(crate) const ADDRESS_1: (u8, u8) = (35, 12);
    /// DART1: first and last unit play no part.
    pub(crate) const WHOLE_PAGE_1: u64 = bit(1);
    /// DART1: writes are refused.
    pub(crate) const NO_WRITE_1: u64 = bit(7);
    /// DART1: reads are refused.
    pub(crate) const NO_READ_1: u64 = bit(8);

    /// DART2: the address: its highest and lowest bit in the entry, and its lowest bit in the address.
    pub(crate) const ADDRESS_2: (u8, u8, u8) = (37, 10, 14);
    /// DART2: accesses do not snoop.
    pub(crate) const NO_CACHE_2: u64 = bit(1);
    /// DART2: writes are refused.
    pub(crate) const NO_WRITE_2: u64 = bit(2);
    /// DART2: reads are refused.
    pub(crate) const NO_READ_2: u64 = bit(3);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_stands_where_drivers_have_it() {
        assert_eq!([params::PAGE_SHIFT.mask(), params::OUTPUT_BITS.mask(), params::INPUT_BITS.mask()], [0x0f00_0000, 0x3f00_0000, 0x3f_0000]);
        assert_eq!([t8020::TRANSLATE, t8020::BYPASS, t8020::VALID, t8020::ADDRESS.mask()], [0x80, 0x100, 0x8000_0000, 0x7fff_ffff]);
        assert_eq!([t8110::TRANSLATE, t8110::BYPASS, t8110::FOUR_LEVEL, t8110::REMAP], [1, 2, 8, 0x80]);
        assert_eq!((t8110::VALID, t8110::ADDRESS.mask()), (1, 0x3fff_fffc));
        assert_eq!((entry::FIRST.put(0x123), entry::LAST.put(0xabc), entry::VALID), (0x1230_0000_0000_0000, 0xa_bc00_0000_0000, 1));
        assert_eq!([entry::WHOLE_PAGE_1, entry::NO_WRITE_1, entry::NO_READ_1], [2, 0x80, 0x100]);
        assert_eq!([entry::NO_CACHE_2, entry::NO_WRITE_2, entry::NO_READ_2], [2, 4, 8]);
    }
}
