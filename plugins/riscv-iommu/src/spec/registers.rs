//! Registers that decide how DMA is translated: IOMMU sections 5.3 to 5.5.

use stagecraft_sdk::bits::Field;

/// Capabilities, IOMMU section 5.3. All units have Svnapot.
pub(crate) mod capabilities {
    use super::Field;

    /// First stage of two levels.
    pub(crate) const SV32: Field = Field::new(8, 8);
    /// First stage of three levels.
    pub(crate) const SV39: Field = Field::new(9, 9);
    /// First stage of four levels.
    pub(crate) const SV48: Field = Field::new(10, 10);
    /// First stage of five levels.
    pub(crate) const SV57: Field = Field::new(11, 11);
    /// Bits 60:59 of page table entries are software's (an extension of version 1.0).
    pub(crate) const SVRSW60T59B: Field = Field::new(14, 14);
    /// Memory types in page table entries.
    pub(crate) const SVPBMT: Field = Field::new(15, 15);
    /// Second stage of two levels.
    pub(crate) const SV32X4: Field = Field::new(16, 16);
    /// Second stage of three levels.
    pub(crate) const SV39X4: Field = Field::new(17, 17);
    /// Second stage of four levels.
    pub(crate) const SV48X4: Field = Field::new(18, 18);
    /// Second stage of five levels.
    pub(crate) const SV57X4: Field = Field::new(19, 19);
    /// Flat MSI page tables; device contexts have the extended format.
    pub(crate) const MSI_FLAT: Field = Field::new(22, 22);
    /// Hardware can set accessed and dirty flags.
    pub(crate) const AMO_HWAD: Field = Field::new(24, 24);
    /// Address translation services, and page requests.
    pub(crate) const ATS: Field = Field::new(25, 25);
    /// Such services can answer guest-physical addresses.
    pub(crate) const T2GPA: Field = Field::new(26, 26);
    /// Both byte orders.
    pub(crate) const END: Field = Field::new(27, 27);
    /// Physical addresses have so many bits.
    pub(crate) const PAS: Field = Field::new(37, 32);
    /// Process directories of one level.
    pub(crate) const PD8: Field = Field::new(38, 38);
    /// Process directories of two levels.
    pub(crate) const PD17: Field = Field::new(39, 39);
    /// Process directories of three levels.
    pub(crate) const PD20: Field = Field::new(40, 40);
    /// Quality-of-service ids in device contexts (an extension of version 1.0).
    pub(crate) const QOSID: Field = Field::new(41, 41);
    /// Invalidations by address can be for tables too (an extension of version 1.0).
    pub(crate) const NL: Field = Field::new(42, 42);
}

/// Features control, IOMMU section 5.4.
pub(crate) mod fctl {
    use super::Field;

    /// Device directory and second stage are big-endian.
    pub(crate) const BE: Field = Field::new(0, 0);
    /// Second stages have the formats of 32-bit guests.
    pub(crate) const GXL: Field = Field::new(2, 2);
}

/// Device directory table pointer, IOMMU section 5.5.
pub(crate) mod ddtp {
    use super::Field;

    /// Mode.
    pub(crate) const MODE: Field = Field::new(3, 0);
    /// Page number of the root.
    pub(crate) const PPN: Field = Field::new(53, 10);

    /// [`MODE`]: all requests are refused.
    pub(crate) const OFF: u64 = 0;
    /// [`MODE`]: no translation.
    pub(crate) const BARE: u64 = 1;
    /// [`MODE`]: a directory of three levels; two and one level come before it.
    pub(crate) const THREE_LEVELS: u64 = 4;
}

#[cfg(test)]
mod tests {
    use super::{capabilities, ddtp, fctl};
    use crate::spec::assert_layout;

    #[test]
    fn every_register_field_stands_where_the_specification_says() {
        let flags = [
            (capabilities::SV32, 8),
            (capabilities::SV39, 9),
            (capabilities::SV48, 10),
            (capabilities::SV57, 11),
            (capabilities::SVRSW60T59B, 14),
            (capabilities::SVPBMT, 15),
            (capabilities::SV32X4, 16),
            (capabilities::SV39X4, 17),
            (capabilities::SV48X4, 18),
            (capabilities::SV57X4, 19),
            (capabilities::MSI_FLAT, 22),
            (capabilities::AMO_HWAD, 24),
            (capabilities::ATS, 25),
            (capabilities::T2GPA, 26),
            (capabilities::END, 27),
            (capabilities::PD8, 38),
            (capabilities::PD17, 39),
            (capabilities::PD20, 40),
            (capabilities::QOSID, 41),
            (capabilities::NL, 42),
            (fctl::BE, 0),
            (fctl::GXL, 2),
        ];
        for (field, position) in flags {
            assert_layout(&[(field, 1)], 1 << position);
        }
        assert_layout(&[(capabilities::PAS, 0x38)], 56 << 32);
        assert_layout(&[(ddtp::MODE, 4), (ddtp::PPN, 0xfed_cba9_8765)], 0xfed_cba9_8765 << 10 | 4);
    }
}
