//! Registers that decide how DMA is translated: section 3.4.

use stagecraft_sdk::bits::Field;

/// Device Table Base Address Register, MMIO offset 0000h, and the segment registers at 0100h to 0130h.
pub(crate) mod devtab {
    use super::Field;

    /// Pages of the table, minus one.
    pub(crate) const SIZE: Field = Field::new(8, 0);
    /// The table, where it stands.
    pub(crate) const BASE: Field = Field::new(51, 12);
}

/// IOMMU Control Register, MMIO offset 0018h.
pub(crate) mod control {
    use super::Field;

    /// The unit translates.
    pub(crate) const IOMMU_EN: Field = Field::new(0, 0);
    /// Guest translation; without it GV of device table entries means nothing.
    pub(crate) const GT_EN: Field = Field::new(16, 16);
    /// The device table has `2^n` segments; above 3 reserved.
    pub(crate) const DEV_TBL_SEG_EN: Field = Field::new(36, 34);
    /// Memory address routing and control: windows of input addresses that go elsewhere.
    pub(crate) const MARC_EN: Field = Field::new(40, 40);
    /// Guest tables' dirty flags are not set by hardware.
    pub(crate) const GD_UPDATE_DIS: Field = Field::new(48, 48);
    /// Guest tables' accessed flags are not set by hardware.
    pub(crate) const GA_UPDATE_DIS: Field = Field::new(54, 54);
    /// The guest CR3 table's address in device table entries is guest-physical: the host table translates it.
    pub(crate) const GCR3_TRP_MODE: Field = Field::new(58, 58);
}

/// IOMMU Exclusion Base Register, MMIO offset 0020h.
pub(crate) mod exclusion {
    use super::Field;

    /// There is a range of addresses that are not translated.
    pub(crate) const EX_EN: Field = Field::new(0, 0);
    /// It is for all devices, not only for those with EX in their device table entry.
    pub(crate) const ALLOW: Field = Field::new(1, 1);
}

/// IOMMU Extended Feature Register, MMIO offset 0030h.
pub(crate) mod efr {
    use super::Field;

    /// Page requests.
    pub(crate) const PPR_SUP: Field = Field::new(1, 1);
    /// No-execute protection.
    pub(crate) const NX_SUP: Field = Field::new(3, 3);
    /// Guest translation.
    pub(crate) const GT_SUP: Field = Field::new(4, 4);
    /// Most levels of host tables, minus four; 3 means that there are no host tables.
    pub(crate) const HATS: Field = Field::new(11, 10);
    /// Most levels of guest tables, minus four.
    pub(crate) const GATS: Field = Field::new(13, 12);
    /// Most levels of guest CR3 tables, minus one.
    pub(crate) const GLX_SUP: Field = Field::new(15, 14);
    /// Guest I/O protection: GIoV of device table entries.
    pub(crate) const GIO_SUP: Field = Field::new(48, 48);

    /// [`HATS`]: no host tables.
    pub(crate) const NO_HOST_TABLES: u64 = 0b11;
}

/// IOMMU Extended Feature 2 Register, MMIO offset 01A0h.
pub(crate) mod efr2 {
    use super::Field;

    /// The guest CR3 table's address can be guest-physical.
    pub(crate) const GCR3_TRP_MODE: Field = Field::new(3, 3);
}

#[cfg(test)]
mod tests {
    use super::{control, devtab, efr, efr2, exclusion};
    use crate::spec::assert_layout;

    #[test]
    fn every_register_field_stands_where_the_specification_says() {
        assert_layout(&[(devtab::SIZE, 0x1a5), (devtab::BASE, 0x12_3456_789a)], 0x0001_2345_6789_a1a5);
        assert_layout(&[(control::DEV_TBL_SEG_EN, 0b101)], 0b101 << 34);
        assert_layout(&[(efr::HATS, 0b01), (efr::GATS, 0b10), (efr::GLX_SUP, 0b01)], 0x6400);
        let flags = [
            (control::IOMMU_EN, 0),
            (control::GT_EN, 16),
            (control::MARC_EN, 40),
            (control::GD_UPDATE_DIS, 48),
            (control::GA_UPDATE_DIS, 54),
            (control::GCR3_TRP_MODE, 58),
            (exclusion::EX_EN, 0),
            (exclusion::ALLOW, 1),
            (efr::NX_SUP, 3),
            (efr::GT_SUP, 4),
            (efr::GIO_SUP, 48),
            (efr2::GCR3_TRP_MODE, 3),
        ];
        for (field, position) in flags {
            assert_layout(&[(field, 1)], 1 << position);
        }
    }
}
