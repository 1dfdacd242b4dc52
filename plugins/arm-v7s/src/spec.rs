//! Bit layouts and nothing else: section B3.5.1. Entries have 32 bits.

use stagecraft_sdk::bits::{Field, bit, mask};

/// What an entry is, in both levels.
pub(crate) const TYPE: Field = Field::new(1, 0);
/// Leaf: bufferable.
pub(crate) const B: Field = Field::new(2, 2);
/// Leaf: cacheable.
pub(crate) const C: Field = Field::new(3, 3);

/// First level.
pub(crate) mod first {
    use super::{Field, bit, mask};

    /// [`super::TYPE`]: a second-level table.
    pub(crate) const TABLE: u64 = 1;
    /// Bit of [`super::TYPE`] that all sections have. The other is PXN, where there is one.
    pub(crate) const SECTION: u64 = bit(1);
    /// Section: no instruction fetches by privileged requests.
    pub(crate) const PXN: u64 = bit(0);
    /// Table entry: the same for all that it leads to.
    pub(crate) const TABLE_PXN: u64 = bit(2);
    /// Section: no instruction fetches.
    pub(crate) const XN: u64 = bit(4);
    /// Table entry and section: domain. Supersection: address bits 39:36.
    pub(crate) const DOMAIN: Field = Field::new(8, 5);
    /// Section: AP[1:0].
    pub(crate) const AP: Field = Field::new(11, 10);
    /// Section: TEX.
    pub(crate) const TEX: Field = Field::new(14, 12);
    /// Section: AP[2].
    pub(crate) const AP_HIGH: Field = Field::new(15, 15);
    /// Section: shareable.
    pub(crate) const S: Field = Field::new(16, 16);
    /// Section: 16 of these are one supersection.
    pub(crate) const SUPERSECTION: u64 = bit(18);
    /// Address of a second-level table: highest and lowest bit.
    pub(crate) const TABLE_ADDRESS: (u8, u8) = (31, 10);
    /// Address of a section: highest and lowest bit.
    pub(crate) const ADDRESS: (u8, u8) = (31, 20);
    /// Address of a supersection: highest and lowest bit.
    pub(crate) const SUPERSECTION_ADDRESS: (u8, u8) = (31, 24);
    /// Supersection: address bits 35:32, where a section has its lowest.
    pub(crate) const ADDRESS_35_32: (u8, u8) = (23, 20);
    /// Supersection: address bits 39:36, where a section has its domain.
    pub(crate) const ADDRESS_39_36: (u8, u8) = (8, 5);
    /// Table entry: should be zero; bit 3 (non-secure) and bit 9 (implementation defined) say nothing here.
    pub(crate) const TABLE_UNUSED: u64 = mask(4, 4);
}

/// Second level.
pub(crate) mod second {
    use super::{Field, bit, mask};

    /// [`super::TYPE`]: 16 of these are one large page.
    pub(crate) const LARGE: u64 = 1;
    /// Bit of [`super::TYPE`] that small pages have. The other is XN.
    pub(crate) const SMALL: u64 = bit(1);
    /// Small page: no instruction fetches.
    pub(crate) const SMALL_XN: u64 = bit(0);
    /// Large page: the same.
    pub(crate) const LARGE_XN: u64 = bit(15);
    /// AP[1:0].
    pub(crate) const AP: Field = Field::new(5, 4);
    /// Small page: TEX.
    pub(crate) const SMALL_TEX: Field = Field::new(8, 6);
    /// Large page: TEX.
    pub(crate) const LARGE_TEX: Field = Field::new(14, 12);
    /// AP[2].
    pub(crate) const AP_HIGH: Field = Field::new(9, 9);
    /// Shareable.
    pub(crate) const S: Field = Field::new(10, 10);
    /// Address of a small page: highest and lowest bit.
    pub(crate) const SMALL_ADDRESS: (u8, u8) = (31, 12);
    /// Address of a large page: highest and lowest bit.
    pub(crate) const LARGE_ADDRESS: (u8, u8) = (31, 16);
    /// Large page: should be zero.
    pub(crate) const LARGE_UNUSED: u64 = mask(8, 6);
}

/// PRRR, section B4.1.127: what the eight types are.
pub(crate) mod prrr {
    /// Lowest of the two bits of type `n`.
    pub(crate) const fn kind_lsb(n: u64) -> u64 {
        2 * n
    }
    /// Normal memory; 0 is strongly-ordered and 1 device.
    pub(crate) const NORMAL: u64 = 2;
    /// Reserved.
    pub(crate) const RESERVED: u64 = 3;
    /// Normal memory with S clear is shareable if this bit is set; the next bit is for S set.
    pub(crate) const SHAREABLE_LSB: u64 = 18;
}

/// NMRR, section B4.1.111: cacheability of normal memory, zero for none.
pub(crate) mod nmrr {
    /// Lowest of the two bits of type `n`, inner.
    pub(crate) const fn inner_lsb(n: u64) -> u64 {
        2 * n
    }
    /// Lowest of the two bits of type `n`, outer.
    pub(crate) const fn outer_lsb(n: u64) -> u64 {
        2 * n + 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields do not overlap, and all of them set to distinct values make the word.
    fn assert_layout(flags: u64, fields: &[(Field, u64)], word: u64) {
        let mut composed = flags;
        for &(field, value) in fields {
            assert_eq!(composed & field.mask(), 0, "{field:?}");
            composed |= field.put(value);
        }
        assert_eq!(composed, word, "{composed:#x}");
        for &(field, value) in fields {
            assert_eq!(field.of(word), value, "{field:?}");
        }
    }

    #[test]
    fn every_field_stands_where_the_manual_says() {
        let section = [(B, 1), (C, 1), (first::DOMAIN, 0xa), (first::AP, 2), (first::TEX, 5), (first::AP_HIGH, 1), (first::S, 1)];
        assert_layout(first::SECTION | first::PXN | first::XN | first::SUPERSECTION, &section, 0x5_d95f);
        assert_layout(first::TABLE | first::TABLE_PXN | first::TABLE_UNUSED, &[(first::DOMAIN, 0xa)], 0x155);
        let small = [(B, 1), (C, 1), (second::AP, 2), (second::SMALL_TEX, 5), (second::AP_HIGH, 1), (second::S, 1)];
        assert_layout(second::SMALL | second::SMALL_XN, &small, 0x76f);
        let large = [(B, 1), (C, 1), (second::AP, 2), (second::LARGE_TEX, 5), (second::AP_HIGH, 1), (second::S, 1)];
        assert_layout(second::LARGE | second::LARGE_XN | second::LARGE_UNUSED, &large, 0xd7ed);
        assert_eq!((TYPE.mask(), prrr::kind_lsb(7), nmrr::inner_lsb(7), nmrr::outer_lsb(7)), (3, 14, 14, 30));
    }
}
