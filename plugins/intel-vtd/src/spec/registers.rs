//! Registers that decide how DMA is translated: sections 11.4.2 to 11.4.5.

use stagecraft_sdk::bits::Field;

/// Capability Register, section 11.4.2.
pub(crate) mod cap {
    use super::Field;

    /// Domain ids have `4 + 2 * ND` bits; 7 is reserved.
    pub(crate) const ND: Field = Field::new(2, 0);
    /// Supported address widths of second-stage tables: bit 1 three levels, bit 2 four, bit 3 five.
    pub(crate) const SAGAW: Field = Field::new(12, 8);
    /// Maximum guest address width, minus one.
    pub(crate) const MGAW: Field = Field::new(21, 16);
    /// 2 MiB second-stage pages: bit 0 of SSLPS.
    pub(crate) const SSLPS_2M: Field = Field::new(34, 34);
    /// 1 GiB second-stage pages: bit 1 of SSLPS.
    pub(crate) const SSLPS_1G: Field = Field::new(35, 35);
    /// 1 GiB first-stage pages.
    pub(crate) const FS1GP: Field = Field::new(56, 56);
    /// Five-level first-stage tables.
    pub(crate) const FS5LP: Field = Field::new(60, 60);
}

/// Extended Capability Register, section 11.4.3.
pub(crate) mod ecap {
    use super::Field;

    /// Device TLBs.
    pub(crate) const DT: Field = Field::new(2, 2);
    /// Pass-through.
    pub(crate) const PT: Field = Field::new(6, 6);
    /// Snoop control: `SNP` of second-stage leaves and `PGSNP` of PASID table entries.
    pub(crate) const SC: Field = Field::new(7, 7);
    /// Memory types.
    pub(crate) const MTS: Field = Field::new(25, 25);
    /// Nested translation.
    pub(crate) const NEST: Field = Field::new(26, 26);
    /// Page requests.
    pub(crate) const PRS: Field = Field::new(29, 29);
    /// Supervisor requests.
    pub(crate) const SRS: Field = Field::new(31, 31);
    /// Extended-accessed flag.
    pub(crate) const EAFS: Field = Field::new(34, 34);
    /// PASIDs have `PSS + 1` bits.
    pub(crate) const PSS: Field = Field::new(39, 35);
    /// Requests with PASID.
    pub(crate) const PASID: Field = Field::new(40, 40);
    /// Scalable mode.
    pub(crate) const SMTS: Field = Field::new(43, 43);
    /// Accessed and dirty flags of the second stage.
    pub(crate) const SSADS: Field = Field::new(45, 45);
    /// Second stage, in scalable mode.
    pub(crate) const SSTS: Field = Field::new(46, 46);
    /// First stage.
    pub(crate) const FSTS: Field = Field::new(47, 47);
    /// Page-walk coherency, in scalable mode.
    pub(crate) const SMPWCS: Field = Field::new(48, 48);
    /// `RID_PASID` of context entries.
    pub(crate) const RPS: Field = Field::new(49, 49);
    /// Abort-DMA mode.
    pub(crate) const ADMS: Field = Field::new(52, 52);
    /// `RID_PRIV` of context entries.
    pub(crate) const RPRIVS: Field = Field::new(53, 53);
    /// Host permission tables.
    pub(crate) const HPTS: Field = Field::new(55, 55);
    /// PASIDs in translated requests.
    pub(crate) const PTRS: Field = Field::new(56, 56);
    /// I/O read and write bits of the second stage.
    pub(crate) const SSIRWS: Field = Field::new(57, 57);
}

/// Global Status Register, section 11.4.4.2.
pub(crate) mod gsts {
    use super::Field;

    /// Translation is on.
    pub(crate) const TES: Field = Field::new(31, 31);
}

/// Invalidation Queue Address Register, section 11.4.9.3.
pub(crate) mod iqa {
    use super::Field;

    /// Descriptors have 32 bytes instead of 16.
    pub(crate) const DW: Field = Field::new(11, 11);
}

/// Root Table Address Register, section 11.4.5.
pub(crate) mod rtaddr {
    use super::Field;

    /// The second stage's permissions are bits 61 and 62 instead of 0 and 1.
    pub(crate) const SSIRWE: Field = Field::new(7, 7);
    /// Translation table mode.
    pub(crate) const TTM: Field = Field::new(11, 10);
    /// Root table, where it stands.
    pub(crate) const RTA: Field = Field::new(63, 12);

    /// [`TTM`]: root and context tables.
    pub(crate) const LEGACY: u64 = 0b00;
    /// [`TTM`]: scalable-mode root, context and PASID tables.
    pub(crate) const SCALABLE: u64 = 0b01;
    /// [`TTM`]: all DMA is aborted.
    pub(crate) const ABORT: u64 = 0b11;
}

#[cfg(test)]
mod tests {
    use super::{cap, ecap, gsts, iqa, rtaddr};
    use crate::spec::assert_layout;

    #[test]
    fn every_register_field_stands_where_the_specification_says() {
        let fields =
            [(cap::ND, 5), (cap::SAGAW, 0b01110), (cap::MGAW, 0x2f), (cap::SSLPS_2M, 1), (cap::SSLPS_1G, 1), (cap::FS1GP, 1), (cap::FS5LP, 1)];
        assert_layout(&fields, 1 << 60 | 1 << 56 | 0b11 << 34 | 0x2f << 16 | 0b1110 << 8 | 5);
        assert_layout(&[(ecap::PSS, 0x13)], 0x13 << 35);
        let flags = [
            (ecap::DT, 2),
            (ecap::PT, 6),
            (ecap::SC, 7),
            (ecap::MTS, 25),
            (ecap::NEST, 26),
            (ecap::PRS, 29),
            (ecap::SRS, 31),
            (ecap::EAFS, 34),
            (ecap::PASID, 40),
            (ecap::SMTS, 43),
            (ecap::SSADS, 45),
            (ecap::SSTS, 46),
            (ecap::FSTS, 47),
            (ecap::SMPWCS, 48),
            (ecap::RPS, 49),
            (ecap::ADMS, 52),
            (ecap::RPRIVS, 53),
            (ecap::HPTS, 55),
            (ecap::PTRS, 56),
            (ecap::SSIRWS, 57),
        ];
        for (field, position) in flags {
            assert_layout(&[(field, 1)], 1 << position);
        }
        assert_layout(&[(gsts::TES, 1)], 0x8000_0000);
        assert_layout(&[(iqa::DW, 1)], 0x800);
        assert_layout(&[(rtaddr::SSIRWE, 1), (rtaddr::TTM, 0b01), (rtaddr::RTA, 0xf_edcb_a987_6543)], 0xfedc_ba98_7654_3480);
    }
}
